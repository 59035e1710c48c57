"""Validate a measurement: galaxies of known parameters are added to the user's own mosaic and measured."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from astropy import units
from astropy.table import QTable

from sersicnet import weights as trained
from sersicnet.catalogue import table as tables
from sersicnet.catalogue import validationpage
from sersicnet.catalogue.columns import column, flags_of
from sersicnet.catalogue.crossmatch import pairs
from sersicnet.catalogue.factors import distances
from sersicnet.catalogue.validation import Validation
from sersicnet.domain import Domain
from sersicnet.engine.noise import tap_of
from sersicnet.engine.render import parameters_of
from sersicnet.errors import InputError, SersicnetWarning, warn
from sersicnet.image.exposure import Exposure
from sersicnet.image.injected import Galaxies, Injected, Negative, WithPhotonNoise
from sersicnet.image.psf import Psf
from sersicnet.image.resample import Resampled
from sersicnet.image.starpsf import find_psf
from sersicnet.measuring import measure as measuring
from sersicnet.measuring import tiles
from sersicnet.measuring.fitting import Fitting, check_gain, gain_of_weights, psf_of_weights
from sersicnet.measuring.injecting import AVOIDED, Injection, Places, least_passes, places
from sersicnet.measuring.outputs import Outputs, Result
from sersicnet.measuring.plan import Outlook, Plan, Work
from sersicnet.measuring.scene import DETECTOR
from sersicnet.output import Report, Run, check_apart, check_output, silent
from sersicnet.schema import COLUMN, TARGET_NAMES
from sersicnet.simulating.population import Mixture
from sersicnet.weights import Weights

_log = logging.getLogger(__name__)

REACH = 2.0
"""Distance at which a detection may be an added galaxy, pixels, at least; it is the FWHM of the PSF or half of the
effective radius, if these are larger."""

PIXEL_SECONDS = 5e-7
"""Time that a process needs to measure a pixel of a mosaic with 100 sources on a million pixels, seconds."""

GAINED = 0.5
"""Part of the light of an added galaxy by which a source of the mosaic is brighter if the galaxy is found in it."""


def validate(
    exposure: Any,
    output: str | Path | None = None,
    *,
    injection: Injection | None = None,
    weights: str | Path | Weights = trained.DEFAULT,
    psf: str | Path | Psf | None = None,
    psf_fwhm: float | None = None,
    gain: float | None = None,
    refine: Fitting | None = None,
    resample: bool = False,
    injected: str | Path | None = None,
    overwrite: bool = False,
    work: Work | None = None,
    command: str = "",
    report: Report = silent,
) -> Validation:
    """Add galaxies of known parameters to a mosaic, and measure everything as `measure` does.

    The PSF is found once, on the mosaic itself. Galaxies are added in passes, one to a cell of 128 pixels at most, so
    that they do not crowd the mosaic; each pass is a measurement with the tiles, processes and memory of `measure`.
    The mosaic itself and its negative are measured, too.

    Parameters
    ----------
    exposure : Exposure, or any input of `sersicnet.image.exposure.Exposure.of`
        The mosaic.
    output : str or Path, optional
        FITS file with the truth of each galaxy beside its measurement, statistics, and factors for
        `sersicnet.measuring.measure.measure`; a page of figures is written beside it. None writes nothing.
    injection : Injection, optional
        Which galaxies are added, and where.
    weights, psf, psf_fwhm, refine, resample, work, command, report
        As for `sersicnet.measuring.measure.measure`.
    gain : float, optional
        Electrons per image unit, for the photon noise of the galaxies; where `measure` takes a gain, it also gets
        this one.
    injected : str or Path, optional
        FITS image to write: the mosaic with the galaxies; ``NAME-1.fits`` and so on for several passes.
    overwrite : bool
        Whether to replace existing files, and to drop an unfinished run with other options.

    Returns
    -------
    Validation

    Raises
    ------
    InputError, WeightsError
        If an input cannot be used; nothing is written.
    OutputError, WorkError
        If a file cannot be written, or a worker was killed. Finished tiles and passes are kept.

    Warns
    -----
    SersicnetWarning
        As for `measure`, and if the gain or the PSF is not known.
    """
    injection, work = injection or Injection(), work or Work()
    files = _Files.checked(output, injected, overwrite)
    made, known = _checked(
        exposure, files, injection, weights=weights, psf=psf, psf_fwhm=psf_fwhm, gain=gain, refine=refine,
        resample=resample, overwrite=overwrite, work=work, command=command, report=report,
    )  # fmt: skip
    options = made.options()
    config = {"options": options, "injection": injection.config(), "gain": gain, "tile": work.tile}
    with Run(files.run, config, overwrite) as kept:
        kept.keep("command", command)
        run = _Run(made, kept, report)
        base = run.result("the mosaic", made)
        scene = _Scene.of(made, base, gain)
        try:
            drawn = injection.drawn(known, base.table)
            avoid = None if injection.avoid is None else scene.bright(injection.avoid)
            passes = places(made.exposure, drawn["r_eff_pix"], injection.seed, _away_from(avoid))
        except InputError:
            kept.remove()  # a run with these options always ends here
            raise
        images = [check_output(path, overwrite) for path in files.images(len(passes))]
        _log.info("%d galaxies in %d passes", injection.n, len(passes))
        negative = run.negative(base)

        def added(k: int) -> Exposure:
            """The mosaic with the galaxies of pass k, from 1; a new one each time, for it keeps what it draws."""
            return scene.exposure(drawn, passes[k - 1], injection.seed)

        measured = [
            run.measured(f"pass {k}/{len(passes)}", scene, drawn, one, added(k))
            for k, one in enumerate(passes, start=1)
        ]
        rows = _rows(made.exposure, drawn, passes, measured)
        rows.meta.update(base.table.meta)
        rows.meta.update(tables.origin())
        found = Validation(rows, _detections(base.table), negative, scene.psf.fwhm, options)
        for k, path in enumerate(images, start=1):
            _write_image(added(k), path, work.tile)
        if files.output is not None and files.page is not None:
            found.write(files.output)
            validationpage.write(files.page, found, added, base.mesh_of_image(), scene.psf)
        if files.run is not None:
            kept.remove()
    return found


class Foresight(NamedTuple):
    """What a validation would do.

    Attributes
    ----------
    outlook : Outlook
        Of the measurement.
    galaxies : int
        Number of galaxies that are added.
    kinds : str
        Which galaxies, in words.
    mag : (float, float) or None
        Range of their magnitudes; None if it follows from the mosaic's own galaxies.
    passes : int
        Times that galaxies are added, at least; the mosaic and its negative are measured, too.
    seconds : float
        Approximate time, without fits, where there are 100 sources on a million pixels.
    """

    outlook: Outlook
    galaxies: int
    kinds: str
    mag: tuple[float, float] | None
    passes: int
    seconds: float


def foresee(
    exposure: Any,
    output: str | Path | None = None,
    *,
    injection: Injection | None = None,
    injected: str | Path | None = None,
    overwrite: bool = False,
    work: Work | None = None,
    **options: Any,
) -> Foresight:
    """Check the parameters of `validate`, with the same errors and warnings, and describe the run without measuring.

    Returns
    -------
    Foresight
    """
    injection, work = injection or Injection(), work or Work()
    files = _Files.checked(output, injected, overwrite)
    made, known = _checked(exposure, files, injection, overwrite=overwrite, work=work, **options)
    outlook = made.outlook()
    mag = injection.mag
    if mag is None and isinstance(known, np.ndarray):
        mag = float(known[:, 0].min()), float(known[:, 0].max())
    passes = least_passes(outlook.shape, injection.n)
    seconds = (passes + 2) * outlook.shape[0] * outlook.shape[1] * PIXEL_SECONDS / outlook.workers
    return Foresight(outlook, injection.n, injection.kinds, mag, passes, seconds)


def _checked(
    exposure: Any,
    files: _Files,
    injection: Injection,
    *,
    weights: str | Path | Weights = trained.DEFAULT,
    gain: float | None = None,
    refine: Fitting | None = None,
    overwrite: bool = False,
    **options: Any,
) -> tuple[Plan, np.ndarray | Mixture | None]:
    """The plan of the measurement, and what is known of the galaxies before the mosaic is measured."""
    check_gain(gain)
    network = weights if isinstance(weights, Weights) else trained.load(weights)
    taken = gain if "psf" in network.inputs or refine is not None else None
    outputs = Outputs(overwrite=overwrite)
    made = measuring.plan(exposure, weights=network, gain=taken, refine=refine, outputs=outputs, **options)
    read = [image.path for image in made.exposure.images]
    check_apart(files.written, *read, options.get("psf"), injection.galaxies, refine and refine.prior)
    return made, injection.known(made.exposure.pixel_scale.value)


MOST_PASSES = 1000
"""Passes whose images are kept from replacing a file that is read."""


# --- files -----------------------------------------------------------------------------------------------------


class _Files(NamedTuple):
    output: Path | None
    injected: Path | None

    @classmethod
    def checked(cls, output: str | Path | None, injected: str | Path | None, overwrite: bool) -> _Files:
        """Refuse files that cannot be written."""
        paths = [None if path is None else Path(path) for path in (output, injected)]
        for path, what in zip(paths, ("A validation", "An image"), strict=True):
            if path is not None and path.suffix.lower() != ".fits":
                raise InputError(f"{what} is a file that ends in .fits; received {path.name}.")
        out = cls(*paths)
        for path in (out.output, out.page, out.injected):
            if path is not None:
                check_output(path, overwrite)
        if out.output is not None and out.injected is not None and out.output.absolute() == out.injected.absolute():
            raise InputError(f"Each output needs a name of its own; received {out.output} twice.")
        return out

    @property
    def page(self) -> Path | None:
        """The page of figures, beside the output."""
        return None if self.output is None else self.output.with_suffix(".html")

    @property
    def run(self) -> Path | None:
        """The directory that keeps finished tiles and passes."""
        return None if self.output is None else self.output.with_name(self.output.name + ".run")

    @property
    def written(self) -> list[Path]:
        """All files that may be written: how many passes there are is not known yet."""
        return [path for path in (self.output, self.page, self.injected, *self.images(MOST_PASSES)) if path is not None]

    def images(self, passes: int) -> list[Path]:
        """The images with the galaxies of each pass; none if they are not wanted."""
        if self.injected is None:
            return []
        if passes == 1:
            return [self.injected]
        stem = self.injected.name.removesuffix(self.injected.suffix)
        return [self.injected.with_name(f"{stem}-{k}{self.injected.suffix}") for k in range(1, passes + 1)]


def _write_image(exposure: Exposure, path: Path, tile: int) -> None:
    with tables.writing_image(exposure.image, path) as out:
        for core in tiles.cores(exposure.shape, tile):
            if out is not None:
                out[core] = exposure.image.read(core)
    exposure.close()


# --- the passes ------------------------------------------------------------------------------------------------


class _Scene(NamedTuple):
    """What the mosaic without added galaxies shows.

    Attributes
    ----------
    plan : Plan
    result : Result
    psf : Psf
        That galaxies are drawn through.
    gain, tap, rms : float
        See `sersicnet.image.injected.Galaxies`.
    x, y, mag : ndarray, float64, (N,)
        Sources, with their Kron magnitudes; pixels.
    """

    plan: Plan
    result: Result
    psf: Psf
    gain: float
    tap: float
    rms: float
    x: np.ndarray
    y: np.ndarray
    mag: np.ndarray

    @classmethod
    def of(cls, plan: Plan, result: Result, gain: float | None) -> _Scene:
        """From the measurement of the mosaic; the gain is the user's."""
        mesh = result.mesh_of_image()
        psf = _psf(plan, result)
        side = mesh.autocorrelation.shape[0] // 2
        next_ones = mesh.autocorrelation[side, side + 1], mesh.autocorrelation[side + 1, side]
        x, y, mag = (column(result.table, name) for name in ("x", "y", "mag_auto"))
        return cls(
            plan,
            result,
            psf,
            _gain(plan, result) if gain is None else gain,
            tap_of(float(np.mean(next_ones))),
            float(np.median(mesh.rms)),
            x,
            y,
            mag,
        )

    def bright(self, limit: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions of the sources brighter than a magnitude, and the radius around them that is avoided, pixels."""
        with np.errstate(invalid="ignore"):
            chosen = self.mag < limit
        radius = AVOIDED * column(self.result.table, "a_image")[chosen] + self.psf.fwhm
        return self.x[chosen], self.y[chosen], radius

    def exposure(self, drawn: dict[str, np.ndarray], where: Places, seed: int) -> Exposure:
        """The mosaic with the galaxies of a pass."""
        own = {name: values[where.numbers] for name, values in drawn.items()} | {"x": where.x, "y": where.y}
        exposure, mesh = self.plan.exposure, self.result.mesh
        galaxies = Galaxies(
            parameters=parameters_of(own, exposure.zero_point.value), numbers=where.numbers, seed=seed, psf=self.psf,
            gain=self.gain, tap=self.tap, rms=self.rms,
        )  # fmt: skip
        noise = exposure.noise
        if noise is not None and exposure.noise_includes == "total" and np.isfinite(self.gain):
            noise = WithPhotonNoise(noise, exposure.noise_kind, mesh.map_factor, galaxies)
        return replace(exposure, image=Injected(exposure.image, galaxies), noise=noise)


def _psf(plan: Plan, result: Result) -> Psf:
    """The PSF that galaxies are drawn through: the user's, that of the stars, or that of the weights."""
    known = result.seen.psf if result.seen is not None else plan.psf
    if known is not None:
        return known
    stars = find_psf(plan.exposure, result.mesh_of_image(), DETECTOR, plan.exposure.saturation)
    if stars.psf is not None:
        return stars.psf
    if result.psf is not None:
        return result.psf
    assert plan.network is not None
    with _quietly():
        psf = psf_of_weights(plan.network)
    warn(
        f"{plan.exposure.name} shows no PSF ({stars.reason}): galaxies are drawn through that of the weights, "
        f"{psf.fwhm:.2f} pixels wide. Give `psf`."
    )
    return psf


def _gain(plan: Plan, result: Result) -> float:
    """Electrons per image unit; infinite, with a warning, if it is not known."""
    known = result.table.meta.get("GAIN") if plan.refine is None or plan.refine.gain is None else plan.refine.gain
    if known is None and plan.network is not None and isinstance(plan.network.domain, Domain):
        known = gain_of_weights(plan.network, plan.exposure)
    if known is None:
        warn(
            "No `gain` was given: the added galaxies have no photon noise, so that bright ones are measured better "
            "than real ones."
        )
        return np.inf
    return float(known)


def _away_from(avoided: tuple[np.ndarray, np.ndarray, np.ndarray] | None) -> Any:
    if avoided is None:
        return lambda x, y: True
    x, y, radius = avoided
    return lambda here, there: bool((np.hypot(x - here, y - there) > radius).all())


@contextmanager
def _quietly() -> Iterator[None]:
    """What is wrong with the mosaic was said when it was measured without added galaxies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SersicnetWarning)
        yield


class _Run:
    """The measurements of a validation, each kept when it is finished."""

    def __init__(self, plan: Plan, kept: Run, report: Report) -> None:
        self.plan, self.kept, self.report = plan, kept, report

    def result(self, name: str, plan: Plan) -> Result:
        """Measure an image; its tiles are kept in a directory of its own."""
        return replace(plan, work=replace(plan.work, run=self._directory(name))).result(
            lambda stage, done, total: self.report(f"{name}: {stage}", done, total)
        )

    def _directory(self, name: str) -> Path | None:
        return None if self.kept.path is None else self.kept.path / name.replace("/", " of ").replace(" ", "-")

    def _with(self, exposure: Exposure, **known: Any) -> Plan:
        factor = self.plan.source.factor
        source = exposure if self.plan.source is self.plan.exposure else Resampled(exposure, factor)
        return replace(self.plan, exposure=exposure, source=source, **known)

    def measured(
        self, name: str, scene: _Scene, drawn: dict[str, np.ndarray], where: Places, exposure: Exposure
    ) -> dict[str, np.ndarray]:
        """What was measured of the galaxies of a pass: columns of the catalogue, and whether they were found."""
        key = self._directory(name)
        done = None if key is None else self.kept.arrays(f"{key.name}-found")
        if done is None:
            with _quietly():
                table = self.result(name, self._with(exposure, seen=scene.result.seen)).catalogue
            done = _matched(scene, {n: v[where.numbers] for n, v in drawn.items()}, where, table)
            if key is not None:
                self.kept.keep_arrays(f"{key.name}-found", done)
                shutil.rmtree(key, ignore_errors=True)
        return done

    def negative(self, base: Result) -> np.ndarray:
        """The detections of the negative, whose sky is that of the mosaic; see `_detections`."""
        exposure = replace(self.plan.exposure, image=Negative(self.plan.exposure.image), saturation=np.inf)
        mesh = replace(base.mesh, level=-base.mesh.level)
        with _quietly():
            return _detections(self.result("negative", self._with(exposure, seen=base.seen, mesh=mesh)).table)


def _detections(table: QTable) -> np.ndarray:
    """Targets and flags of a catalogue, float64, (N, 5)."""
    return np.column_stack([*(column(table, name) for name in TARGET_NAMES), flags_of(table)])


# --- matching --------------------------------------------------------------------------------------------------

_LEFT_OUT = ("id", "image", "parent")


def _matched(scene: _Scene, drawn: dict[str, np.ndarray], where: Places, table: QTable) -> dict[str, np.ndarray]:
    """The rows of a catalogue that are the added galaxies.

    A galaxy is found if a detection and it are each other's nearest within `REACH`. A detection that is nearer to a
    source of the mosaic is that source: the galaxy is merged with it if the source is brighter, and otherwise found
    only if `GAINED` of its light is added to that of the source. A galaxy that is not found is merged, too, where a
    brighter source of the mosaic is within its reach.
    """
    true = np.column_stack([where.x, where.y])
    seen = np.column_stack([column(table, "x"), column(table, "y")])
    reach = np.maximum(np.maximum(0.5 * drawn["r_eff_pix"], scene.psf.fwhm), REACH)
    i, j = pairs(seen, true, float(reach.max()))
    off = np.hypot(*(seen[i] - true[j]).T)
    i, j, off = (values[off <= reach[j]] for values in (i, j, off))
    old = np.column_stack([scene.x, scene.y])
    found, merged = np.zeros(len(true), bool), np.zeros(len(true), bool)
    light, kron = (10 ** (-0.4 * mag) for mag in (drawn["mag"], column(table, "mag_auto")))
    before = 10 ** (-0.4 * scene.mag)
    for detection, galaxy, distance in zip(i.tolist(), j.tolist(), off.tolist(), strict=True):
        nearer = np.flatnonzero(np.hypot(*(old - seen[detection]).T) < distance)
        merged[galaxy] = (before[nearer] > light[galaxy]).any()
        added = kron[detection] - before[nearer].sum() > GAINED * light[galaxy]
        found[galaxy] = not merged[galaxy] and (not len(nearer) or bool(added))
    away = np.full(len(true), np.inf)
    near_mag = np.full(len(true), np.nan)
    for galaxy, place in enumerate(true):
        distance = np.hypot(*(old - place).T)
        if len(distance):
            nearest = int(np.argmin(distance))
            away[galaxy], near_mag[galaxy] = distance[nearest], scene.mag[nearest]
            brighter = (distance <= reach[galaxy]) & (scene.mag < drawn["mag"][galaxy])
            merged[galaxy] |= bool(brighter.any()) and not found[galaxy]
    out = {"found": found, "merged": merged, "neighbour_distance": away, "neighbour_mag": near_mag}
    rows, here = i[found[j]], j[found[j]]
    apart = distances(*seen.T)
    for name in table.colnames:
        if name not in _LEFT_OUT:
            values = np.asarray(getattr(table[name], "value", table[name]))
            out[name] = np.full(len(true), np.nan if values.dtype.kind == "f" else 0, values.dtype)
            out[name][here] = values[rows]
    out["distance"] = np.full(len(true), np.nan)
    out["distance"][here] = apart[rows]
    return out


_DESCRIBED = {
    "found": ("", "whether it was found"),
    "merged": ("", "whether a brighter source of the mosaic is in its place"),
    "neighbour_distance": ("pix", "distance of the next source of the mosaic"),
    "neighbour_mag": ("mag", "Kron magnitude of the next source of the mosaic"),
    "distance": ("pix", "distance of the next source of the catalogue"),
}


def _rows(
    exposure: Exposure, drawn: dict[str, np.ndarray], passes: list[Places], measured: list[dict[str, np.ndarray]]
) -> QTable:
    """The table of truth beside measurement, in the order of the galaxies."""
    numbers = np.concatenate([one.numbers for one in passes])
    order = np.argsort(numbers)
    count = [len(one.numbers) for one in passes]
    x, y = (np.concatenate([getattr(one, axis) for one in passes])[order] for axis in ("x", "y"))
    table = QTable({"id": np.arange(1, len(order) + 1), "pass": np.repeat(np.arange(1, len(count) + 1), count)[order]})
    true = {"x": x, "y": y, **drawn}
    if exposure.wcs is not None:
        true["ra"], true["dec"] = exposure.image.sky(x, y)
        true["pa"] = exposure.image.position_angle(x, y, drawn["theta"])
    if np.isfinite(exposure.pixel_scale.value):
        true["r_eff"] = drawn["r_eff_pix"] * exposure.pixel_scale.value
    for name in (name for name in COLUMN if name in true):
        unit = COLUMN[name].unit
        table[f"true_{name}"] = true[name] * units.Unit(unit) if unit else true[name]
    for name in measured[0]:
        values = np.concatenate([one[name] for one in measured])[order]
        unit, description = _DESCRIBED.get(name) or (COLUMN[name].unit, COLUMN[name].description)
        table[name] = values * units.Unit(unit) if unit else values
        table[name].info.description = description
    return table
