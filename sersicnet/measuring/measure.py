"""The main job: an image and weights in, a flagged catalogue out.

`measure` asks a network, and with ``refine`` a fit that starts from its answer;
`fit` does without a network, as GALFIT does, from a table or from moments on.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from astropy.table import QTable, Table

from sersicnet import domain, weights
from sersicnet import workers as work
from sersicnet.catalogue import crossmatch
from sersicnet.catalogue import report as look
from sersicnet.catalogue import table as catalogue
from sersicnet.engine.fit import SKY_LEFT, STRUCTURE, Fitter, Noise, Prior
from sersicnet.errors import InputError, warn
from sersicnet.image import header as instrument
from sersicnet.image import stars as points
from sersicnet.image.pixels import Window, correlation
from sersicnet.image.sky import Mesh, estimate_sky
from sersicnet.measuring import tiles
from sersicnet.measuring.plan import Plan
from sersicnet.output import check_output
from sersicnet.schema import (
    LARGE_LIMIT,
    RANGE_FLAGS,
    STAMP_SIZE,
    TARGET_NAMES,
    Flag,
)
from sersicnet.simulating import blank_sky as realsky
from sersicnet.simulating import population

TILE = 2048
"""Side of the pieces that a large image is worked on in, pixels."""

_log = logging.getLogger(__name__)

PROCESS_MEMORY, PIXEL_MEMORY = 2.5e8, 80.0
"""Bytes that a process takes, and besides for each pixel of its tile: 1.4 GB with two processes, of which 1.2 to 1.4
were measured (``benchmarks/survey.py``)."""

PRIOR_SAMPLE = 4000
"""Galaxies drawn from a distribution to make a prior of it."""


def measure(
    image: str | Path,
    output: str | Path | None = None,
    *,
    hdu: int | str | None = None,
    zero_point: float | None = None,
    pixel_scale: float | None = None,
    rms: str | Path | None = None,
    wht: str | Path | None = None,
    var: str | Path | None = None,
    mask: str | Path | None = None,
    positions: str | Path | Table | None = None,
    weights_name: str | Path = weights.DEFAULT,
    resample: bool = False,
    refine: bool = False,
    psf: str | Path | None = None,
    psf_oversampling: int = 1,
    gain: float | None = None,
    prior: str | Path = "candels",
    structure: float = STRUCTURE,
    robust: bool = False,
    model: str | Path | None = None,
    residual: str | Path | None = None,
    regions: str | Path | None = None,
    page: str | Path | None = None,
    match: str | Path | None = None,
    tile: int = TILE,
    workers: int | None = None,
    scheduler: str | None = None,
    run: Path | None = None,
    overwrite: bool = False,
    command: str = "",
    report: tiles.Report = tiles.silent,
) -> QTable:
    """Measure the galaxies of an image.

    Parameters
    ----------
    image : str or Path
        FITS image in any linear unit.
    output : str or Path, optional
        Catalogue to write: .fits, .ecsv, .csv, .parquet or .vot. None writes nothing.
    hdu : int or str, optional
        Extension of `image`; see `sersicnet.image.mosaic.read_image`.
    zero_point, pixel_scale : float, optional
        AB magnitude of one image unit, and arcsec per pixel; from the header
        by default.
    rms, wht, var : str or Path, optional
        FITS map of the noise, of its inverse variance, or of its variance; only one
        of them. In a file of several extensions, RMS or ERR is taken, WHT or IVM,
        VAR or VARIANCE, else the first image; ``file.fits[NAME]`` chooses another. Its
        scale is fitted to the scatter of blank pixels. Pixels that are not
        finite or not positive have no data.
    mask : str or Path, optional
        FITS image; pixels that are not zero are ignored.
    positions : str, Path or Table, optional
        Table with columns x and y (zero-based) or ra and dec (degrees, unless
        they have another unit): measure these and detect nothing. One row each,
        in their order. Where it has both, and the image a WCS, the sky counts.
    weights_name : str or Path
        Name of shipped weights, or a weights directory.
    resample : bool
        Whether to bring the image to the pixel scale of the weights first, light kept. The
        catalogue is in pixels of the image all the same, but for the circle of ``mag_aper``.
        Not together with `refine`: fits need no certain scale.
    refine : bool
        Whether to fit a Sersic profile to each source, starting from the
        network's answer; neighbours that overlap are fitted together with it.
        Where the fit does not converge, the network's values stay.
    psf : str or Path, optional
        FITS image of the effective PSF, an odd number of pixels a side. Its width
        is compared with the weights' domain, instead of that of the image's point
        sources; and the fits use it, instead of that of the weights' domain.
    psf_oversampling : int
        How many times finer than the image the pixels of `psf` are.
    gain : float, optional
        Electrons per image unit, for the Poisson noise of the sources in the
        fits; as in the weights' domain by default.
    prior : str or Path
        What the fits assume of radius, index and axis ratio at a given
        magnitude: "candels" (see `sersicnet.simulating.population`), "none", or a table of
        galaxies with columns mag, r_eff_pix or r_eff, sersic_n, and
        ellipticity or q.
    structure : float
        What galaxies scatter about a Sersic profile, as a fraction of their
        surface brightness: one more noise in the fits.
    robust : bool
        Whether fits bound the influence of pixels far from the model.
    model, residual : str or Path, optional
        FITS images to write: all fitted galaxies as drawn, and the image minus
        its sky and them.
    regions : str or Path, optional
        Region file for ds9 to write; see `sersicnet.catalogue.report.regions`.
    page : str or Path, optional
        HTML page to write; see `sersicnet.look.report`.
    match : str or Path, optional
        Another catalogue to compare with: ``NAME_match.md`` and ``.png`` are written beside
        `output`, and it stands on the page; see `sersicnet.catalogue.crossmatch.match`.
    tile : int
        Side of the pieces that a large image is worked on in, pixels. The catalogue does
        not depend on it.
    workers : int, optional
        Processes that work on the pieces; as many as there are cores by default.
    scheduler : str, optional
        Address of a Dask scheduler whose workers do it instead.
    run : Path, optional
        Directory that keeps the finished tiles, and is left when all is done. By default
        one beside `output`, where there are several tiles, which is dropped in the end.
    overwrite : bool
        Whether to replace what is written, and to drop an unfinished run with other
        options.
    command : str
        The command line, for the catalogue's header.
    report : callable
        Receives the stage, and how many of how many sources it has done.

    Returns
    -------
    QTable
        Columns of `sersicnet.schema.COLUMNS`, NaN for what could not be
        measured. Without a WCS there are no ``ra`` and ``dec``, and without a
        pixel scale no ``r_eff``.

    Raises
    ------
    InputError, WeightsError
        If an input cannot be used; nothing is written then.

    Warns
    -----
    SersicnetWarning
        When nothing is detected, there is no WCS, the image is outside of what the
        weights were trained on, or a noise map is far from the scatter of its sky.
    """
    if not refine:
        for name, value in (("gain", gain), ("model", model), ("residual", residual)):
            if value is not None:
                raise InputError(f"--{name} belongs to fits: give --refine with it.")
    elif resample:
        raise InputError("Fits need no certain pixel scale: give --refine without --resample, or use `sersicnet fit`.")
    files = _Files.checked(
        image, overwrite, output, model=model, residual=residual, regions=regions, page=page, match=match
    )
    _check_noise(gain, structure)
    network = weights.load(weights_name)
    plan = Plan.of(image, hdu, zero_point, pixel_scale, rms, wht, var, mask, positions, report)
    plan = plan.at_scale_of(network, resample)
    width = None if psf is None else plan.on_grid(domain.width_of_file(psf, psf_oversampling))
    fitting = None
    if refine:
        point, source = _psf_of_weights(network) if psf is None else _psf_of_file(psf)
        if gain is None:
            gain = _gain_of_weights(network, plan.zero.value)
        fitting = _Fitting(point, source, psf_oversampling, gain, _prior(prior, plan), str(prior), structure, robust)
    config = {"weights": network.sha256, "own psf": psf is not None, **({} if fitting is None else fitting.config)}
    with (
        plan.kept(files.catalogue, run, config, tile, overwrite) as kept,
        plan.workers(workers, scheduler, tile) as apply,
    ):
        mesh = plan.mesh(kept, apply, report)
        fitter = None if fitting is None else fitting.fitter(mesh)
        setting = tiles.Setting(
            exposure=plan.source,
            zero_point=plan.zero.value,
            mesh=mesh,
            places=plan.places,
            network=network.path,
            fitter=fitter,
            psf_width=0.0 if fitting is None else fitting.psf_width,
            profiles=width is None,
            saturation=plan.saturation,
            threads=plan.threads(tile),
        )
        values, profiles = _all_tiles(setting, plan, tile, kept, apply, report)
        if width is None:
            stars = profiles[domain.points_among(profiles)]
            width = domain.width_of_profiles(stars)
            sizes = stars[np.isfinite(stars[:, 3]), 3]
            largest = float(np.quantile(sizes, 0.9)) if len(sizes) else np.nan
        else:
            assert psf is not None
            largest = 1.05 * plan.widened(points.size_of(realsky.read_psf(psf).image) / psf_oversampling)
        with np.errstate(invalid="ignore"):
            values.flags[values.size <= largest * (1 + 2 / values.size_snr)] |= Flag.POINT_LIKE
        verdict = network.domain.compare(plan.zero, width, values.rms)
        values.flags[verdict.rows] |= Flag.OUT_OF_DOMAIN
        for flag, outside in zip(RANGE_FLAGS, network.domain.out_of_range(values.targets).T, strict=True):
            values.flags[outside] |= flag
        table = _table(plan, values, network, fitted=refine)
        table.meta.update(_provenance(plan, mesh, network, command))
        table.meta.update(PSFSRC=width.source, OUTSIDE=", ".join(verdict.reasons) or "nothing")
        if np.isfinite(width.value):
            table.meta["PSFFWHM"] = width.value
        if fitting is not None:
            table.meta.update(fitting.meta)
        files.write(table, plan, mesh, values, fitter, tile)
    return table


def measure_many(
    images: Sequence[Path],
    output: Path,
    *,
    overwrite: bool = False,
    report: tiles.Report = tiles.silent,
    **options: Any,
) -> list[tuple[QTable, Path]]:
    """Measure the galaxies of many images, into one catalogue or into one for each.

    An image that cannot be used does not stop the others; finished ones are kept, and
    the same command continues.

    Parameters
    ----------
    images : sequence of Path
        At least two.
    output : Path
        A directory, for one catalogue ``IMAGE_cat.fits`` a mosaic, or the name of one
        catalogue of all, which gets a column ``image``. Sources on two images have two
        rows in it.
    overwrite, report, **options
        As for `measure`, but for what belongs to a single image.

    Returns
    -------
    list of (QTable, Path)
        The catalogues that were written.

    Raises
    ------
    InputError
        In the end, if an image could not be used: then there is no common catalogue.
    """
    names = [f"{stem(path)}_cat.fits" for path in images]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"Each image needs a name of its own; two would be {twice}. Measure them one by one.")
    together = not output.is_dir()
    keep = output.with_name(output.name + ".run")
    if together:
        check_output(output, overwrite)
        catalogue.check_ending(output)
        keep.mkdir(exist_ok=True)
    done, failed = [], []
    for number, (path, name) in enumerate(zip(images, names, strict=True), start=1):

        def tell(stage: str, at: int, total: int, prefix: str = f"{number}/{len(images)} {path.name}: ") -> None:
            report(prefix + stage, at, total)

        to = None if together else output / name
        try:
            table = measure(
                path, to, run=keep / name if together else None, overwrite=overwrite, report=tell, **options
            )
        except InputError as error:
            failed.append(str(error))
            continue
        done.append((table, to or output))
    if failed:
        kept = f"What is finished is kept in {keep}: mend" if together else "The others are written. Mend"
        raise InputError(
            f"{len(failed)} of {len(images)} images could not be measured: {' '.join(failed)} {kept} or leave out "
            "these, and repeat the command."
        )
    if together:
        table = catalogue.joined([table for table, _ in done])
        catalogue.write(table, output)
        shutil.rmtree(keep)
        return [(table, output)]
    return done


@dataclass(frozen=True)
class Outlook:
    """What a run would do.

    Attributes
    ----------
    image : str
    shape : (int, int)
        Height and width, pixels.
    zero_point, pixel_scale : Reading
    factor : float
        Pixels that one of the image becomes along each axis; 1 without resampling.
    weights : str
    tiles, workers : int
    memory : float
        That all processes take together, GB, about.
    """

    image: str
    shape: tuple[int, int]
    zero_point: instrument.Reading
    pixel_scale: instrument.Reading
    factor: float
    weights: str
    tiles: int
    workers: int
    memory: float


def foresee(
    image: str | Path,
    output: str | Path | None = None,
    *,
    hdu: int | str | None = None,
    zero_point: float | None = None,
    pixel_scale: float | None = None,
    rms: str | Path | None = None,
    wht: str | Path | None = None,
    var: str | Path | None = None,
    mask: str | Path | None = None,
    positions: str | Path | Table | None = None,
    weights_name: str | Path = weights.DEFAULT,
    resample: bool = False,
    tile: int = TILE,
    workers: int | None = None,
    overwrite: bool = False,
) -> Outlook:
    """Check the inputs of `measure`, and tell what it would do; nothing is measured or written.

    Parameters, errors and warnings are those of `measure`.

    Returns
    -------
    Outlook
    """
    _Files.checked(image, overwrite, output)
    network = weights.load(weights_name)
    plan = Plan.of(image, hdu, zero_point, pixel_scale, rms, wht, var, mask, positions, tiles.silent)
    plan = plan.at_scale_of(network, resample)
    pieces = tiles.cores(plan.source.shape, tile)
    n = plan.processes(workers, tile)
    largest = max((rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in pieces)
    held = sum(image.shape[0] * image.shape[1] * 4 for image in plan.exposure.images if image.is_held)
    memory = (n + (n > 1)) * PROCESS_MEMORY + n * largest * PIXEL_MEMORY + held
    plan.exposure.close()
    return Outlook(
        plan.frame.name, plan.frame.shape, plan.zero, plan.scale, plan.factor, network.name, len(pieces), n,
        memory / 1e9,
    )  # fmt: skip


def stem(image: Path) -> str:
    """Name of an image without its directory and endings."""
    return re.sub(r"(\.fits?)?(\.fz|\.gz)?(\[.*\])?$", "", image.name, count=1)


def fit(
    image: str | Path,
    output: str | Path | None = None,
    *,
    psf: str | Path,
    hdu: int | str | None = None,
    zero_point: float | None = None,
    pixel_scale: float | None = None,
    rms: str | Path | None = None,
    wht: str | Path | None = None,
    var: str | Path | None = None,
    mask: str | Path | None = None,
    positions: str | Path | Table | None = None,
    psf_oversampling: int = 1,
    gain: float | None = None,
    prior: str | Path = "none",
    structure: float = STRUCTURE,
    robust: bool = False,
    model: str | Path | None = None,
    residual: str | Path | None = None,
    tile: int = TILE,
    workers: int | None = None,
    scheduler: str | None = None,
    overwrite: bool = False,
    command: str = "",
    report: tiles.Report = tiles.silent,
) -> QTable:
    """Fit Sersic profiles to the galaxies of an image, without a network.

    Parameters
    ----------
    psf : str or Path
        FITS image of the effective PSF, an odd number of pixels a side.
    positions : str, Path or Table, optional
        As for `measure`; fits start from its columns mag, r_eff_pix or r_eff,
        sersic_n, ellipticity or q, and theta, as far as it has them, and from
        the moments of the detected source for the rest. Where there is none,
        only a row with mag and a radius can be fitted.
    gain : float, optional
        Electrons per image unit, for the Poisson noise of the sources; without
        it they have none, and the cores of bright galaxies weigh too much.
    prior : str or Path
        As for `measure`, here none by default: labels should not know what to expect.
    image, output, hdu, zero_point, pixel_scale, rms, wht, var, mask, psf_oversampling, \
structure, robust, model, residual, tile, workers, scheduler, overwrite, command, report
        As for `measure`.

    Returns
    -------
    QTable
        As from `measure`, with ``fit_status`` and ``chi2``; a fit that did not
        converge keeps the values where it stopped, and has a flag.

    Raises
    ------
    InputError
        If an input cannot be used; nothing is written then.

    Warns
    -----
    SersicnetWarning
        When nothing is detected, there is no WCS or no gain, or a noise map is far
        from the scatter of the image's sky.
    """
    files = _Files.checked(image, overwrite, output, model=model, residual=residual)
    _check_noise(gain, structure)
    if gain is None:
        warn("No --gain was given: galaxies have no Poisson noise of their own, and bright ones too small errors.")
    point, source = _psf_of_file(psf)
    plan = Plan.of(image, hdu, zero_point, pixel_scale, rms, wht, var, mask, positions, report)
    fitting = _Fitting(point, source, psf_oversampling, gain, _prior(prior, plan), str(prior), structure, robust)
    starts = plan.starts()
    with (
        plan.kept(files.catalogue, None, {"weights": None, **fitting.config}, tile, overwrite) as kept,
        plan.workers(workers, scheduler, tile) as apply,
    ):
        mesh = plan.mesh(kept, apply, report)
        fitter = fitting.fitter(mesh)
        setting = tiles.Setting(
            exposure=plan.source,
            zero_point=plan.zero.value,
            mesh=mesh,
            places=plan.places,
            starts=starts,
            fitter=fitter,
            psf_width=fitting.psf_width,
            saturation=plan.saturation,
            threads=plan.threads(tile),
        )
        values, _ = _all_tiles(setting, plan, tile, kept, apply, report)
        table = _table(plan, values, None, fitted=True)
        table.meta.update(_provenance(plan, mesh, None, command))
        table.meta.update(fitting.meta)
        files.write(table, plan, mesh, values, fitter, tile)
    return table


@dataclass(frozen=True, eq=False)
class _Fitting:
    """How galaxies are fitted; made before anything is kept, for it may be refused."""

    psf: np.ndarray
    source: str
    oversampling: int
    gain: float | None
    assumed: Prior | None
    prior: str
    structure: float
    robust: bool

    @property
    def config(self) -> dict[str, Any]:
        """What runs that share tiles must share."""
        seen = hashlib.sha256(np.ascontiguousarray(self.psf).tobytes())
        if self.assumed is not None:
            seen.update(self.assumed.mean.tobytes() + self.assumed.precision.tobytes())
        options = (self.oversampling, self.gain, self.prior, self.structure, self.robust)
        return {"fits": [seen.hexdigest(), *options]}

    @property
    def meta(self) -> dict[str, str | float]:
        """For the header of the catalogue."""
        out: dict[str, str | float] = {"PSF": self.source}
        if self.gain is not None:
            out["GAIN"] = self.gain
        return {**out, "PRIOR": self.prior, "STRUCTUR": self.structure}

    @property
    def psf_width(self) -> float:
        """Diameter of the circle in which the PSF is above half of its maximum, image pixels."""
        return float(2 * np.sqrt((self.psf > self.psf.max() / 2).sum() / np.pi) / self.oversampling)

    def fitter(self, mesh: Mesh) -> Fitter:
        """What fits, with the noise of an image."""
        noise = Noise(mesh.autocorrelation, np.inf if self.gain is None else self.gain, SKY_LEFT, self.structure)
        return Fitter(self.psf, noise, prior=self.assumed, robust=self.robust, psf_oversampling=self.oversampling)


@dataclass(frozen=True)
class _Files:
    """What a run writes."""

    catalogue: Path | None = None
    model: Path | None = None
    residual: Path | None = None
    regions: Path | None = None
    page: Path | None = None
    reference: crossmatch.Reference | None = None

    @classmethod
    def checked(
        cls,
        image: str | Path,
        overwrite: bool,
        output: str | Path | None,
        *,
        model: str | Path | None = None,
        residual: str | Path | None = None,
        regions: str | Path | None = None,
        page: str | Path | None = None,
        match: str | Path | None = None,
    ) -> _Files:
        named = {"catalogue": output, "model": model, "residual": residual, "regions": regions, "page": page}
        paths = {kind: check_output(path, overwrite) for kind, path in named.items() if path is not None}
        for kind, path in paths.items():
            if kind == "catalogue":
                catalogue.check_ending(path)
            elif not path.name.endswith(_ENDINGS[kind]):
                what = {"regions": "A region file", "page": "A report"}.get(kind, "An image")
                raise InputError(f"{what} ends in {' or '.join(_ENDINGS[kind])}; received {path.name}.")
        out = cls(**paths, reference=None if match is None else crossmatch.Reference.read(match))
        written = [*paths.values(), *[check_output(path, overwrite) for path in out.differences]]
        given = [path.absolute() for path in (Path(image), *written)]
        if len(set(given)) < len(given):
            raise InputError(f"Each output needs a name of its own; received {', '.join(p.name for p in given)}.")
        return out

    @property
    def differences(self) -> list[Path]:
        """Table and figure of the comparison with another catalogue, beside the catalogue."""
        if self.reference is None or self.catalogue is None:
            return []
        return [self.catalogue.with_name(f"{stem(self.catalogue)}_match{ending}") for ending in (".md", ".png")]

    def write(
        self, table: QTable, plan: Plan, mesh: Mesh, values: tiles.Values, fitter: Fitter | None, tile: int
    ) -> None:
        """Write the catalogue, and then what goes with it: this must not cost that."""
        if self.catalogue is not None:
            catalogue.write(table, self.catalogue)
        products: list[Callable[[], None]] = []
        draw = None
        if fitter is not None:
            draw = functools.partial(tiles.drawn, values=values, zero_point=plan.zero.value, fitter=fitter)
            products.append(lambda: self._write_images(plan, mesh, draw, tile))
        if (to := self.regions) is not None:
            products.append(lambda: look.regions(table, to, plan.frame))
        products.append(lambda: self._write_reports(table, plan, mesh, draw))
        failed = []
        for product in products:
            try:
                product()
            except InputError as error:
                if self.catalogue is None:
                    raise
                failed.append(str(error))
        if failed:
            raise InputError(
                f"{' '.join(failed)} {self.catalogue} is written; the same command with --overwrite writes the rest."
            )

    def _write_images(self, plan: Plan, mesh: Mesh, draw: look.Draw, tile: int) -> None:
        if self.model is None and self.residual is None:
            return
        with (
            catalogue.writing_image(plan.frame, self.model) as model,
            catalogue.writing_image(plan.frame, self.residual) as residual,
        ):
            for core in tiles.cores(plan.frame.shape, tile):
                drawn = draw(core)
                if model is not None:
                    model[core] = drawn
                if residual is not None:
                    pixels = plan.exposure.read(core)
                    residual[core] = pixels.data - mesh.at(core, pixels).level - drawn

    def _write_reports(self, table: QTable, plan: Plan, mesh: Mesh, draw: look.Draw | None) -> None:
        comparison = None if self.reference is None else crossmatch.match(table, self.reference)
        if comparison is not None and self.differences:
            text, figure = self.differences
            with catalogue.beside(text) as partial:
                partial.write_text(comparison.as_markdown(), "utf-8")
            comparison.draw(figure)
        if self.page is not None:
            if plan.factor != 1:  # the page shows the image as it is
                mesh = estimate_sky(plan.exposure, plan.detector.threshold)
            look.report(self.page, table, plan.exposure, mesh, draw, comparison)


_IMAGES = (".fits", ".fit", ".fits.gz")
_ENDINGS = {"model": _IMAGES, "residual": _IMAGES, "regions": (".reg",), "page": (".html",)}


def _all_tiles(
    setting: tiles.Setting, plan: Plan, tile: int, kept: work.Kept, apply: work.Apply, report: tiles.Report
) -> tuple[tiles.Values, np.ndarray]:
    """The values of all tiles in an order that does not depend on them, and the profiles of sources."""
    cores = tiles.cores(plan.source.shape, tile)
    found: list[dict[str, np.ndarray]] = []
    missing = []
    for core in cores:
        done = kept.get(_tile_name(core))
        if done is None:
            missing.append(core)
        else:
            found.append(done)
    alone = len(cores) == 1
    if found:
        _log.info("%d of %d tiles were finished before", len(found), len(cores))
    before, started = sum(len(arrays["x"]) for arrays in found), time.monotonic()

    def tell() -> None:
        if not alone:
            n = sum(len(arrays["x"]) for arrays in found)
            rate = (n - before) / max(time.monotonic() - started, 1e-9)
            report(f"measuring tiles: {n:,} sources, {rate:.0f}/s", len(found), len(cores))

    tell()
    inner = report if alone else tiles.silent
    for number, arrays in apply(functools.partial(tiles.measure_tile, setting, report=inner), missing):
        kept.put(_tile_name(missing[number]), arrays)
        found.append(arrays)
        _log.info("%s: %d sources", _tile_name(missing[number]), len(arrays["x"]))
        tell()
    joined = {name: np.concatenate([arrays[name] for arrays in found]) for name in found[0]}
    profiles = joined.pop("profiles")
    if plan.places is None:
        order = np.lexsort((joined["x0"], joined["y0"]))
        if not len(order):
            warn(
                f"No source was detected in {plan.frame.name}: the catalogue has no rows. "
                "Is the image background-limited, with light positive?"
            )
    else:
        order = np.argsort(joined["place"])
    return tiles.Values(**{name: values[order] for name, values in joined.items()}), profiles


def _tile_name(core: Window) -> str:
    return f"tile-{core[0].start}-{core[1].start}"


def _check_noise(gain: float | None, structure: float) -> None:
    if not 0 <= structure < 1:
        raise InputError(f"The structure of galaxies is a fraction from 0 to below 1; received {structure}.")
    if gain is not None and not (np.isfinite(gain) and gain > 0):
        raise InputError(f"A gain is a positive number of electrons per image unit; received {gain}.")


def _trained_on(network: weights.Weights, missing: str) -> dict[str, Any]:
    trained_on = network.card["data"].get("config", {}).get("instrument")
    if trained_on is None:
        raise InputError(f"The card of {network.name} tells no {missing}: give --psf and --gain with --refine.")
    return trained_on


def _gain_of_weights(network: weights.Weights, zero_point: float) -> float:
    """As deep as the training images: their electrons a second, in units of this image."""
    trained_on = _trained_on(network, "exposure")
    return float(trained_on["exposure"] * 10 ** (-0.4 * (zero_point - trained_on["zero_point"])))


def _psf_of_weights(network: weights.Weights) -> tuple[np.ndarray, str]:
    from sersicnet.simulating.simulate import effective_psf

    trained_on = _trained_on(network, "PSF")
    if network.card["data"]["config"].get("psfs"):
        raise InputError(f"{network.name} was trained with PSFs of its own: give the image's PSF with --psf.")
    warn(f"No --psf was given: fits use that of the weights' domain, {trained_on['name']}.")
    preset = instrument.Instrument(**{**trained_on, "pixels": tuple(trained_on["pixels"])})
    return effective_psf(preset), f"of the weights: {trained_on['name']}"


def _psf_of_file(path: str | Path) -> tuple[np.ndarray, str]:
    return realsky.read_psf(path).image, str(path)


def _prior(prior: str | Path, plan: Plan) -> Prior | None:
    """What to assume of galaxies, in pixels and units of an image."""
    if str(prior) == "none":
        return None
    scale = plan.scale.value
    if not np.isfinite(scale):
        raise InputError(
            f"{plan.frame.name} has no pixel scale, which the prior of radii needs: "
            "give --pixel-scale, or --prior none."
        )
    if str(prior) == "candels":
        mixture, ranges = population.candels_mixture(), population.CANDELS_RANGES
        scale_of_prior = population.CANDELS_SCALE
    else:
        mixture, ranges = population.from_catalogue(prior, scale)
        scale_of_prior = scale
    rng = np.random.default_rng(0)
    drawn = [mixture.draw(rng, ranges) for _ in range(PRIOR_SAMPLE)]
    mag, r_eff, n, e = (np.array([galaxy[name] for galaxy in drawn]) for name in TARGET_NAMES)
    return Prior.of(np.column_stack([10 ** (-0.4 * (mag - plan.zero.value)), r_eff * scale_of_prior / scale, n, 1 - e]))


def _table(plan: Plan, values: tiles.Values, network: weights.Weights | None, *, fitted: bool) -> QTable:
    """Columns with units and descriptions, and the flags that need the whole catalogue."""
    n = len(values.x)
    targets, flags = values.targets, values.flags
    with np.errstate(invalid="ignore"):
        flags[targets[:, 1] > LARGE_LIMIT] |= Flag.LARGE
    x, y = plan.to_image(values.x), plan.to_image(values.y)
    columns: dict[str, np.ndarray] = {"id": np.arange(1, n + 1), "x": x, "y": y}
    if plan.frame.wcs is not None:
        columns["ra"], columns["dec"] = plan.frame.sky(x, y) if n else (np.zeros(0), np.zeros(0))
        columns["pa"] = plan.frame.position_angle(x, y, values.theta) if n else np.zeros(0)
    for i, name in enumerate(TARGET_NAMES):
        unit = 1 / plan.factor if name == "r_eff_pix" else 1.0
        columns[name] = targets[:, i] * unit
        if fitted or (network is not None and network.card["errors"]):
            columns[f"{name}_err"] = values.errors[:, i] * unit
    with np.errstate(invalid="ignore"):
        columns["r_circ_pix"] = columns["r_eff_pix"] * np.sqrt(1 - targets[:, 3])
    if np.isfinite(plan.scale.value):
        for name in ("r_eff", "r_eff_err", "r_circ"):
            pixels = columns.get(name.replace("r_eff", "r_eff_pix").replace("r_circ", "r_circ_pix"))
            if pixels is not None:
                columns[name] = pixels * plan.scale.value
    columns.update(theta=values.theta, snr=values.snr, flags=flags)
    columns.update(_detected(plan, values))
    if fitted:
        columns.update(sky=values.sky, chi2=values.chi2, fit_status=values.status)
    return catalogue.assembled(columns)


def _detected(plan: Plan, values: tiles.Values) -> dict[str, np.ndarray]:
    """Columns that tell what the detection saw, without a network or a fit."""
    found = dict(zip(tiles.DETECTED, values.detected.T, strict=True))
    out = {"a_image": found["a"] / plan.factor, "b_image": found["b"] / plan.factor}
    out["kron_radius"] = found["kron_radius"]
    for name, kind in (("auto", "kron"), ("aper", "aperture")):
        flux = np.where(found[f"{kind}_flux"] > 0, found[f"{kind}_flux"], np.nan)
        out[f"mag_{name}"] = plan.zero.value - 2.5 * np.log10(flux)
        out[f"mag_{name}_err"] = 2.5 / np.log(10) * found[f"{kind}_error"] / flux
    out["area"] = np.rint(np.nan_to_num(found["area"]) / plan.factor**2)
    if plan.places is None:
        row = {place: i for i, place in enumerate(zip(values.x0.tolist(), values.y0.tolist(), strict=True), start=1)}
        parents = zip(found["parent_x"].tolist(), found["parent_y"].tolist(), strict=True)
        out["parent"] = np.array([row.get(place, 0) for place in parents], int)
    return out


def _provenance(plan: Plan, mesh: Mesh, network: weights.Weights | None, command: str) -> dict[str, str | float]:
    """What the catalogue was made from, as FITS cards of at most eight characters."""
    meta: dict[str, str | float] = {
        "IMAGE": plan.frame.name,
        "MAGSYS": "AB",
        "ZEROPT": plan.zero.value,
        "ZPSOURCE": plan.zero.source,
        "PIXSRC": plan.scale.source,
        "SKYRMS": float(np.median(mesh.rms)),
        "NOISECOR": correlation(mesh.autocorrelation),
        "STAMPSIZ": STAMP_SIZE,
        **catalogue.origin(),
    }
    if network is not None:
        meta.update(WEIGHTS=network.name, WTSHA256=network.sha256)
    if np.isfinite(plan.scale.value):
        meta["PIXSCALE"] = plan.scale.value
    if plan.factor != 1:
        meta["RESAMPLE"] = plan.factor
    if np.isfinite(mesh.map_factor):
        meta["MAPFACT"] = mesh.map_factor
    if command:
        meta["COMMAND"] = command
    return meta
