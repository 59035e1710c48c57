"""The main job: an image and weights in, a flagged catalogue out.

`measure` asks a network, and with ``refine`` a fit that starts from its answer;
`fit` does without a network, as GALFIT does, from a table or from moments on.
"""

from __future__ import annotations

import functools
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from astropy import units
from astropy.table import Column, QTable, Table
from scipy.spatial import KDTree

import sersicnet
from sersicnet import catalogue, detect, domain, instrument, mosaic, points, population, realsky, weights, work
from sersicnet.errors import InputError, SersicnetWarning, check_output
from sersicnet.fit import SKY_LEFT, STRUCTURE, Fits, Fitter, Noise, Prior, Status
from sersicnet.schema import (
    COLUMNS,
    CROWDED_LIMIT,
    LARGE_LIMIT,
    LOW_SNR_LIMIT,
    MASKED_LIMIT,
    RANGE_FLAGS,
    STAMP_SIZE,
    TARGET_NAMES,
    Flag,
    absolute_magnitude_of_rms,
)

STAMPS_AT_ONCE = 512
"""Stamps cut before they go through the network: 32 MB."""

TILE = 2048
"""Side of the pieces that a large image is worked on in, pixels."""

PRIOR_SAMPLE = 4000
"""Galaxies drawn from a distribution to make a prior of it."""

MOST_NEIGHBOURS = 3
"""Overlapping neighbours that are fitted together with a galaxy; others are masked."""

NEIGHBOUR_FLUX = 0.1
"""Least flux of such a neighbour, as a fraction of the galaxy's."""

MAP_LIMIT = 3.0
"""Factor on a noise map from which on, up or down, the user is told."""

Report = Callable[[str, int, int], None]


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
    refine: bool = False,
    psf: str | Path | None = None,
    psf_oversampling: int = 1,
    gain: float | None = None,
    prior: str | Path = "candels",
    structure: float = STRUCTURE,
    robust: bool = False,
    model: str | Path | None = None,
    residual: str | Path | None = None,
    tile: int = TILE,
    workers: int | None = None,
    scheduler: str | None = None,
    overwrite: bool = False,
    command: str = "",
    report: Report = lambda stage, done, total: None,
) -> QTable:
    """Measure the galaxies of an image.

    Parameters
    ----------
    image : str or Path
        FITS image in any linear unit.
    output : str or Path, optional
        Catalogue to write: .fits, .ecsv, .csv or .parquet. None writes nothing.
    hdu : int or str, optional
        Extension of `image`; see `sersicnet.mosaic.read_image`.
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
        magnitude: "candels" (see `sersicnet.population`), "none", or a table of
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
    tile : int
        Side of the pieces that a large image is worked on in, pixels. The catalogue does
        not depend on it.
    workers : int, optional
        Processes that work on the pieces; as many as there are cores by default.
    scheduler : str, optional
        Address of a Dask scheduler whose workers do it instead.
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
    files = _Files.checked(image, output, model, residual, overwrite)
    _check_noise(gain, structure)
    network = weights.load(weights_name)
    width = None if psf is None else domain.width_of_file(psf, psf_oversampling)
    plan = _Plan.of(image, hdu, zero_point, pixel_scale, rms, wht, var, mask, positions, report)
    fitter, source_of_psf, point_width = None, "", 0.0
    if refine:  # all that may be refused, before anything is kept
        point, source_of_psf = _psf_of_weights(network) if psf is None else _psf_of_file(psf)
        assumed = _prior(prior, plan)
        if gain is None:
            gain = _gain_of_weights(network, plan.zero.value)
    config = {
        "command": "measure",
        "weights": network.sha256,
        "refine": refine,
        "psf": None if psf is None else str(psf),
        "gain": gain,
        "prior": str(prior),
        "structure": structure,
        "robust": robust,
    }
    with plan.kept(files, config, tile, overwrite) as kept, plan.workers(workers, scheduler, tile) as apply:
        mesh = plan.mesh(kept, apply, report)
        if refine:
            assert gain is not None
            noise = Noise(mesh.autocorrelation, gain, SKY_LEFT, structure)
            fitter = Fitter(point, noise, prior=assumed, robust=robust, psf_oversampling=psf_oversampling)
            point_width = _width(point, psf_oversampling)
        setting = _Setting(
            plan.exposure,
            plan.zero.value,
            mesh,
            plan.places,
            {},
            network.path,
            fitter,
            point_width,
            width is None,
            plan.saturation,
        )
        values, profiles = _all_tiles(setting, plan, tile, kept, apply, report)
        if width is None:
            stars = profiles[domain.points_among(profiles)]
            width = domain.width_of_profiles(stars)
            sizes = stars[np.isfinite(stars[:, 3]), 3]
            largest = float(np.quantile(sizes, 0.9)) if len(sizes) else np.nan
        else:
            assert psf is not None
            largest = 1.05 * points.size_of(realsky.read_psf(psf).image) / psf_oversampling
        with np.errstate(invalid="ignore"):
            values.flags[values.size <= largest * (1 + 2 / values.size_snr)] |= Flag.POINT_LIKE
        verdict = network.domain.compare(plan.zero, plan.scale, width, values.rms)
        values.flags[verdict.rows] |= Flag.OUT_OF_DOMAIN
        for flag, outside in zip(RANGE_FLAGS, network.domain.out_of_range(values.targets).T, strict=True):
            values.flags[outside] |= flag
        table = _table(plan, values, network, fitted=refine)
        table.meta.update(_provenance(plan, mesh, network, command))
        table.meta.update(PSFSRC=width.source, OUTSIDE=", ".join(verdict.reasons) or "nothing")
        if np.isfinite(width.value):
            table.meta["PSFFWHM"] = width.value
        if fitter is not None:
            table.meta.update(PSF=source_of_psf, GAIN=fitter.noise.gain, PRIOR=str(prior), STRUCTUR=structure)
        files.write(table, plan, mesh, values, fitter, tile)
    return table


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
    report: Report = lambda stage, done, total: None,
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
    files = _Files.checked(image, output, model, residual, overwrite)
    _check_noise(gain, structure)
    if gain is None:
        _warn("No --gain was given: galaxies have no Poisson noise of their own, and bright ones too small errors.")
    point, source_of_psf = _psf_of_file(psf)
    plan = _Plan.of(image, hdu, zero_point, pixel_scale, rms, wht, var, mask, positions, report)
    point_width = _width(point, psf_oversampling)
    assumed = _prior(prior, plan)
    starts = {} if plan.table is None else _columns(plan.table, plan.scale)
    config = {
        "command": "fit",
        "psf": str(psf),
        "psf_oversampling": psf_oversampling,
        "gain": gain,
        "prior": str(prior),
        "structure": structure,
        "robust": robust,
    }
    with plan.kept(files, config, tile, overwrite) as kept, plan.workers(workers, scheduler, tile) as apply:
        mesh = plan.mesh(kept, apply, report)
        noise = Noise(mesh.autocorrelation, np.inf if gain is None else gain, SKY_LEFT, structure)
        fitter = Fitter(point, noise, prior=assumed, robust=robust, psf_oversampling=psf_oversampling)
        setting = _Setting(
            plan.exposure, plan.zero.value, mesh, plan.places, starts, None, fitter, point_width, False, plan.saturation
        )
        values, _ = _all_tiles(setting, plan, tile, kept, apply, report)
        table = _table(plan, values, None, fitted=True)
        table.meta.update(_provenance(plan, mesh, None, command))
        table.meta.update(PSF=source_of_psf, PRIOR=str(prior), STRUCTUR=structure)
        if gain is not None:
            table.meta["GAIN"] = gain
        files.write(table, plan, mesh, values, fitter, tile)
    return table


class _Files(NamedTuple):
    """What a run writes."""

    catalogue: Path | None
    model: Path | None
    residual: Path | None

    @classmethod
    def checked(
        cls,
        image: str | Path,
        output: str | Path | None,
        model: str | Path | None,
        residual: str | Path | None,
        overwrite: bool,
    ) -> _Files:
        paths = [None if path is None else check_output(path, overwrite) for path in (output, model, residual)]
        if paths[0] is not None and paths[0].suffix.lower() not in catalogue.FORMATS:
            raise InputError(f"A catalogue ends in {', '.join(catalogue.FORMATS)}; received {paths[0].name}.")
        for path in paths[1:]:
            if path is not None and not path.name.endswith((".fits", ".fit", ".fits.gz")):
                raise InputError(f"An image ends in .fits or .fits.gz; received {path.name}.")
        given = [path.absolute() for path in (Path(image), *paths) if path is not None]
        if len(set(given)) < len(given):
            raise InputError(f"Each output needs a name of its own; received {', '.join(p.name for p in given)}.")
        return cls(*paths)

    def write(
        self, table: QTable, plan: _Plan, mesh: detect.Mesh, values: _Values, fitter: Fitter | None, tile: int
    ) -> None:
        if fitter is not None and (self.model is not None or self.residual is not None):
            with (
                catalogue.writing_image(plan.frame, self.model) as model,
                catalogue.writing_image(plan.frame, self.residual) as residual,
            ):
                for core in _cores(plan.frame.shape, tile):
                    drawn = _drawn(core, values, plan.zero.value, fitter)
                    if model is not None:
                        model[core] = drawn
                    if residual is not None:
                        pixels = plan.exposure.read(core)
                        residual[core] = pixels.data - mesh.at(core, pixels).level - drawn
        if self.catalogue is not None:
            catalogue.write(table, self.catalogue)


class _Plan(NamedTuple):
    """What is to be measured: an image with its maps, what its header tells, and the places if they are given."""

    exposure: mosaic.Exposure
    zero: instrument.Reading
    scale: instrument.Reading
    table: Table | None  # what the user gave
    places: np.ndarray | None  # x and y of its rows, (N, 2)
    detector: detect.Detector

    @classmethod
    def of(
        cls,
        image: str | Path,
        hdu: int | str | None,
        zero_point: float | None,
        pixel_scale: float | None,
        rms: str | Path | None,
        wht: str | Path | None,
        var: str | Path | None,
        mask: str | Path | None,
        positions: str | Path | Table | None,
        report: Report,
    ) -> _Plan:
        maps = {kind: path for kind, path in (("rms", rms), ("wht", wht), ("var", var)) if path is not None}
        if len(maps) > 1:
            raise InputError(f"Give only one noise map; received {' and '.join(f'--{kind}' for kind in maps)}.")
        report("reading", 0, 0)
        frame = mosaic.read_image(image, hdu)
        zero = instrument.zero_point(frame.header, zero_point, frame.scales)
        scale = instrument.pixel_scale(frame.scales, pixel_scale)
        noise, kind = None, "rms"
        for kind, path in maps.items():
            noise = mosaic.read_map(path, kind, frame)
        hidden = None if mask is None else mosaic.read_map(mask, "mask", frame)
        table, places = None, None
        if positions is not None:
            table = positions if isinstance(positions, Table) else catalogue.read_table(positions)
            places = np.column_stack(_positions(table, frame))
        if frame.wcs is None:
            _warn(f"{frame.name} has no celestial WCS: the catalogue has pixel columns only.")
        return cls(mosaic.Exposure(frame, noise, kind, hidden), zero, scale, table, places, detect.Detector())

    @property
    def frame(self) -> mosaic.Image:
        """The image."""
        return self.exposure.image

    @property
    def saturation(self) -> float:
        """Value from which on a pixel is saturated; infinite if the header does not tell."""
        try:
            return float(self.frame.header.get("SATURATE", np.inf))
        except (TypeError, ValueError):
            return np.inf

    @contextmanager
    def kept(self, files: _Files, config: dict[str, Any], tile: int, overwrite: bool) -> Iterator[work.Kept]:
        """What holds finished tiles, where there are several; dropped in the end."""
        path = None
        if files.catalogue is not None and len(_cores(self.frame.shape, tile)) > 1:
            path = files.catalogue.with_name(files.catalogue.name + ".run")
        stamp = {
            image.name: [image.path.stat().st_size, image.path.stat().st_mtime_ns]
            for image in (self.exposure.image, self.exposure.noise, self.exposure.mask)
            if image is not None
        }
        places = None if self.places is None else hashlib.sha256(self.places.tobytes()).hexdigest()
        full = {
            **config, "images": stamp, "kind": self.exposure.kind, "zero_point": self.zero.value,
            "pixel_scale": self.scale.value, "positions": places, "tile": tile, "version": sersicnet.__version__,
        }  # fmt: skip
        kept = work.Kept(path, full, overwrite)
        try:
            yield kept
        finally:
            self.exposure.close()
        kept.remove()

    @contextmanager
    def workers(self, n: int | None, scheduler: str | None, tile: int) -> Iterator[work.Apply]:
        """What works on the tiles; this process alone where there is a single one."""
        if scheduler is not None:
            with work.cluster(scheduler) as apply:
                yield apply
            return
        most = min(n or os.cpu_count() or 1, len(_cores(self.frame.shape, tile)))
        held = [image for image in self.exposure if isinstance(image, mosaic.Image) and image.is_held]
        if held and most > 1:
            _warn(f"{held[0].name} is compressed as a whole: it is held in memory, and one process does the work.")
            most = 1
        with work.workers(most, weights.use_one_thread) as apply:
            yield apply

    def mesh(self, kept: work.Kept, apply: work.Apply, report: Report) -> detect.Mesh:
        """Sky and noise of the image, or what was kept of them."""
        found = kept.get("mesh")
        if found is None:
            report("measuring the sky", 0, 0)
            mesh = self.detector.mesh(self.exposure, work.in_order(apply))
            kept.put("mesh", mesh.arrays())
        else:
            mesh = detect.Mesh.of(found)
        if self.exposure.noise is not None and not 1 / MAP_LIMIT < mesh.map_factor < MAP_LIMIT:
            _warn(
                f"{self.exposure.noise.name} was multiplied by {mesh.map_factor:.3g} as a map of the noise, to match "
                "the scatter of blank pixels: only its relative values are used. Is it what "
                f"--{self.exposure.kind} takes, in units of the image? Weights of drizzled images often are exposure "
                "times, not inverse variances. Correlated noise makes pixels scatter less than a map says; NOISECOR, "
                f"by which the noise of an aperture exceeds theirs, is {detect.correlation(mesh.autocorrelation):.2f}."
            )
        return mesh


@dataclass(frozen=True, eq=False)
class _Setting:
    """All that work on a tile needs to know."""

    exposure: mosaic.Exposure
    zero_point: float
    mesh: detect.Mesh
    places: np.ndarray | None
    starts: dict[str, np.ndarray]
    network: Path | None
    fitter: Fitter | None
    psf_width: float
    profiles: bool
    saturation: float


class _Scene(NamedTuple):
    """A tile with what was detected in it, and the places to be measured; all positions are of the image."""

    setting: _Setting
    window: mosaic.Window
    pixels: mosaic.Pixels
    sky: detect.Sky
    found: detect.Detections
    x: np.ndarray
    y: np.ndarray
    source: np.ndarray  # index of the detection at each place, -1 for none
    place: np.ndarray  # number of the place, if places were given

    @classmethod
    def of(cls, setting: _Setting, core: mosaic.Window) -> tuple[_Scene, np.ndarray]:
        """The scene of a tile, and which of its places are the tile's own."""
        shape = setting.exposure.shape
        near = mosaic.grown(core, 0 if setting.fitter is None else _NEIGHBOUR_REACH, shape)
        zone = mosaic.grown(near, _STAMP_REACH, shape)
        if setting.places is not None:
            place = np.flatnonzero(_inside(setting.places[:, 0], setting.places[:, 1], near, shape))
            if not len(place):
                zone = slice(0, 0), slice(0, 0)
        window, pixels, sky, found = detect.Detector().around(setting.exposure, setting.mesh, zone)
        if setting.places is None:
            chosen = np.flatnonzero(_inside(found.x, found.y, near, shape))
            x, y, source, place = found.x[chosen], found.y[chosen], chosen, np.full(len(chosen), -1)
        else:
            x, y = setting.places[place].T
            source = _source_at(found.segmentation, x - window[1].start, y - window[0].start)
        scene = cls(setting, window, pixels, sky, found, x.copy(), y.copy(), source, place)
        return scene, _inside(x, y, core, shape)

    @property
    def origin(self) -> tuple[int, int]:
        """Column and row of the first pixel of the window."""
        return self.window[1].start, self.window[0].start

    def of_source(self, values: np.ndarray) -> np.ndarray:
        """Values of the detection at each place, NaN where there is none."""
        detected = self.source >= 0
        if not len(values):
            return np.full(len(self.x), np.nan)
        return np.where(detected, values[np.where(detected, self.source, 0)], np.nan)


def _inside(x: np.ndarray, y: np.ndarray, window: mosaic.Window, shape: tuple[int, int]) -> np.ndarray:
    """Which positions belong to a window, bool, (N,); those beyond the image to the nearest one, NaN to the first."""
    out = np.ones(len(x), bool)
    for values, part, n in ((x, window[1], shape[1]), (y, window[0], shape[0])):
        nearest = np.clip(np.rint(np.nan_to_num(values, nan=0.0)), 0, n - 1)
        out &= (nearest >= part.start) & (nearest < part.stop)
    return out


def _cores(shape: tuple[int, int], tile: int) -> list[mosaic.Window]:
    """The tiles of an image, row by row; they do not overlap."""
    if tile < STAMP_SIZE:
        raise InputError(f"A tile has at least {STAMP_SIZE} pixels a side; received {tile}.")
    starts = [range(0, max(n - tile // 2, 1), tile) for n in shape]
    ends = [[*list(line)[1:], n] for line, n in zip(starts, shape, strict=True)]
    return [
        (slice(y, y_end), slice(x, x_end))
        for y, y_end in zip(starts[0], ends[0], strict=True)
        for x, x_end in zip(starts[1], ends[1], strict=True)
    ]


def _all_tiles(
    setting: _Setting, plan: _Plan, tile: int, kept: work.Kept, apply: work.Apply, report: Report
) -> tuple[_Values, np.ndarray]:
    """The values of all tiles in an order that does not depend on them, and the profiles of sources."""
    cores = _cores(plan.frame.shape, tile)
    found: list[dict[str, np.ndarray]] = []
    missing = []
    for core in cores:
        done = kept.get(_tile_name(core))
        if done is None:
            missing.append(core)
        else:
            found.append(done)
    alone = len(cores) == 1
    if not alone:
        report("measuring tiles", len(found), len(cores))
    inner = report if alone else _silent
    for number, arrays in apply(functools.partial(_tile, setting, report=inner), missing):
        kept.put(_tile_name(missing[number]), arrays)
        found.append(arrays)
        if not alone:
            report("measuring tiles", len(found), len(cores))
    joined = {name: np.concatenate([arrays[name] for arrays in found]) for name in found[0]}
    profiles = joined.pop("profiles")
    if plan.places is None:
        order = np.lexsort((joined["x0"], joined["y0"]))
        if not len(order):
            _warn(
                f"No source was detected in {plan.frame.name}: the catalogue has no rows. "
                "Is the image background-limited, with light positive?"
            )
    else:
        order = np.argsort(joined["place"])
    return _Values(**{name: values[order] for name, values in joined.items()}), profiles


def _silent(stage: str, done: int, total: int) -> None:
    pass


def _tile_name(core: mosaic.Window) -> str:
    return f"tile-{core[0].start}-{core[1].start}"


_NEIGHBOUR_REACH = round(0.7 * STAMP_SIZE) + 2
"""Pixels within which neighbours are fitted together with a galaxy."""

_STAMP_REACH = STAMP_SIZE // 2 + 4
"""Pixels around a place that its stamp, and the sources in it, take."""


def _tile(setting: _Setting, core: mosaic.Window, report: Report = _silent) -> dict[str, np.ndarray]:
    """Measure the places of a tile."""
    try:
        report("detecting", 0, 0)
        scene, own = _Scene.of(setting, core)
        values = _Values.empty(scene)
        if setting.network is not None:
            _predict(scene, values, _network(setting.network), report)
        else:
            _start(scene, values)
        if setting.fitter is not None:
            _fit(scene, values, own, setting.fitter, report, keep=setting.network is None)
        profiles = np.zeros((0, 4))
        if setting.profiles:
            mine = _inside(scene.found.x, scene.found.y, core, setting.exposure.shape)
            profiles = _profiles(scene, mine)
        return {**{name: array[own] for name, array in values._asdict().items()}, "profiles": profiles}
    finally:
        setting.exposure.close()


def _profiles(scene: _Scene, which: np.ndarray) -> np.ndarray:
    """The `sersicnet.domain.profiles` of detections, with their size in place of their number."""
    (data, bad, _), found = scene.pixels, scene.found
    out = domain.profiles(data, bad, scene.sky, found, which, scene.origin)
    claimed = found.claimed()
    for first in range(0, len(out), STAMPS_AT_ONCE):
        part = slice(first, first + STAMPS_AT_ONCE)
        i = out[part, 3].astype(int)
        stamps = mosaic.cut(data, bad, scene.sky, found.x[i], found.y[i], claimed, i + 1, scene.origin)
        out[part, 3] = points.sizes(stamps)[0]
    return out


@functools.lru_cache(1)
def _network(path: Path) -> weights.Weights:
    return weights.load(path)


def _positions(table: Table, frame: mosaic.Image) -> tuple[np.ndarray, np.ndarray]:
    names = set(table.colnames)
    if {"ra", "dec"} <= names and (frame.wcs is not None or not {"x", "y"} <= names):
        return frame.pixels(_coordinate(table["ra"], "deg"), _coordinate(table["dec"], "deg"))
    if {"x", "y"} <= names:
        return _coordinate(table["x"]), _coordinate(table["y"])
    raise InputError(
        f"A table of positions has columns x and y, or ra and dec; received {', '.join(table.colnames) or 'none'}."
    )


def _coordinate(column: Column, unit: str | None = None) -> np.ndarray:
    """Values of a column, in `unit` if it has another one; NaN where masked."""
    try:
        if unit is not None and column.unit is not None:
            column = units.Quantity(column).to(unit)
        values: np.ma.MaskedArray = np.ma.asarray(getattr(column, "value", column), dtype=float)
    except (TypeError, ValueError, units.UnitConversionError) as error:
        raise InputError(f"Column {column.name} of --positions must hold numbers: {error}.") from error
    return np.ma.filled(values, np.nan)


def _source_at(segmentation: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Index of the detection under each position, -1 for none."""
    inside = np.isfinite(x) & np.isfinite(y)
    column, row = np.rint(np.where(inside, x, -1)).astype(int), np.rint(np.where(inside, y, -1)).astype(int)
    inside &= (column >= 0) & (column < segmentation.shape[1]) & (row >= 0) & (row < segmentation.shape[0])
    out = np.full(len(x), -1)
    out[inside] = segmentation[row[inside], column[inside]] - 1
    return out


class _Values(NamedTuple):
    """What is known of each place so far; magnitudes are AB."""

    place: np.ndarray  # number of the place given, -1 for a detection
    x0: np.ndarray  # of the detection or the place, which a fit does not change
    y0: np.ndarray
    x: np.ndarray
    y: np.ndarray
    targets: np.ndarray
    errors: np.ndarray
    theta: np.ndarray
    sky: np.ndarray
    chi2: np.ndarray
    status: np.ndarray
    rms: np.ndarray
    snr: np.ndarray
    size: np.ndarray  # of the Gaussian that the source is most like; NaN if it cannot be trusted
    size_snr: np.ndarray
    flags: np.ndarray

    @classmethod
    def empty(cls, scene: _Scene) -> _Values:
        n = len(scene.x)
        signal = scene.of_source(scene.found.flux) / np.sqrt(scene.of_source(scene.found.area))
        out = cls(
            place=scene.place,
            x0=scene.x.copy(),
            y0=scene.y.copy(),
            x=scene.x.copy(),
            y=scene.y.copy(),
            targets=np.full((n, len(TARGET_NAMES)), np.nan),
            errors=np.full((n, len(TARGET_NAMES)), np.nan),
            theta=scene.of_source(scene.found.theta),
            sky=np.full(n, np.nan),
            chi2=np.full(n, np.nan),
            status=np.full(n, -1),
            rms=np.full(n, np.nan),
            size=np.full(n, np.nan),
            size_snr=np.full(n, np.nan),
            snr=signal / scene.sky.correlation,
            flags=np.zeros(n, int),
        )
        out.flags[scene.of_source(scene.found.blended.astype(float)) == 1] |= Flag.BLENDED
        return out

    def note(self, rows: slice, stamps: mosaic.Stamps, saturation: float) -> None:
        """Noise and flags that stamps tell."""
        flags = self.flags[rows]
        self.rms[rows] = stamps.rms
        self.size[rows], self.size_snr[rows], _ = points.sizes(stamps)
        flags |= Flag.SATURATED * points.saturated(stamps, saturation)
        self.snr[rows] /= stamps.rms
        flags |= Flag.NO_DATA * stamps.empty
        flags |= Flag.EDGE * stamps.edge
        flags |= Flag.MASKED * (stamps.unusable > MASKED_LIMIT)
        flags |= Flag.CROWDED * (stamps.neighbours > CROWDED_LIMIT)
        with np.errstate(invalid="ignore"):
            flags |= Flag.LOW_SNR * ~(self.snr[rows] >= LOW_SNR_LIMIT)

    def parameters(self, zero_point: float) -> np.ndarray:
        """What `sersicnet.render.Renderer` draws, in pixels of the image, (N, 7)."""
        mag, r_eff, n, e = self.targets.T
        flux = 10 ** (-0.4 * (mag - zero_point))
        return np.column_stack([self.x, self.y, flux, r_eff, n, 1 - e, np.nan_to_num(self.theta)])


def _stamps(
    scene: _Scene, labels: np.ndarray, which: np.ndarray | None = None
) -> Iterator[tuple[slice, mosaic.Stamps]]:
    """Stamps of all places, or of some, a few at a time; `labels` as for `sersicnet.mosaic.cut`."""
    which = np.arange(len(scene.x)) if which is None else which
    claimed, n = scene.found.claimed(), len(which)
    for first in range(0, n, STAMPS_AT_ONCE):
        rows = slice(first, min(first + STAMPS_AT_ONCE, n))
        x, y = scene.x[which[rows]], scene.y[which[rows]]
        data, bad, _ = scene.pixels
        yield rows, mosaic.cut(data, bad, scene.sky, x, y, claimed, labels[which[rows]], scene.origin)


def _predict(scene: _Scene, values: _Values, network: weights.Weights, report: Report) -> None:
    """Cut the stamps, and ask the network."""
    n = len(scene.x)
    report("measuring", 0, n)
    for rows, stamps in _stamps(scene, scene.source + 1):
        stamps.pixels[stamps.empty] = np.nan
        values.targets[rows], errors = network.predict(stamps.pixels)
        if errors is not None:
            values.errors[rows] = errors
        values.note(rows, stamps, scene.setting.saturation)
        values.targets[rows, 0] += absolute_magnitude_of_rms(scene.setting.zero_point, stamps.rms)
        report("measuring", rows.stop, n)


def _start(scene: _Scene, values: _Values) -> None:
    """Take what fits start from out of the user's table, and from moments for the rest."""
    moments = _moments(scene.found, scene.setting.psf_width)
    flux, r_eff, n, q = (scene.of_source(moments[:, k]) for k in (2, 3, 4, 5))
    with np.errstate(invalid="ignore", divide="ignore"):
        mag = scene.setting.zero_point - 2.5 * np.log10(flux)
    guesses = {"mag": mag, "r_eff_pix": r_eff, "sersic_n": n, "ellipticity": 1 - q, "theta": values.theta}
    for name, column in scene.setting.starts.items():
        given = column[scene.place]
        guesses[name] = np.where(np.isfinite(given), given, guesses[name])
    for name, usual in (("sersic_n", 1.5), ("ellipticity", 0.3)):
        guesses[name] = np.where(np.isfinite(guesses[name]), guesses[name], usual)
    for k, name in enumerate(TARGET_NAMES):
        values.targets[:, k] = guesses[name]
    values.theta[:] = guesses["theta"]
    for rows, stamps in _stamps(scene, scene.source + 1):
        values.note(rows, stamps, scene.setting.saturation)
    values.targets[values.flags & Flag.NO_DATA != 0] = np.nan


def _moments(found: detect.Detections, psf_width: float) -> np.ndarray:
    """Rough parameters of all detections, (D, 7): the PSF is taken off in quadrature."""
    a, b = (np.sqrt(np.maximum(axis**2 - (psf_width / 2.355) ** 2, 0.25)) for axis in (found.a, found.b))
    index = np.full(len(found), 1.5)
    return np.column_stack([found.x, found.y, 1.2 * found.flux, 1.2 * a, index, np.clip(b / a, 0.1, 0.95), found.theta])


def _overlapping(scene: _Scene) -> list[np.ndarray]:
    """For each place, the detections that are fitted together with it: bright, and touching.

    Two sources touch when the circles with the area of their detected pixels do;
    of those with a tenth of the galaxy's flux or more, the ones with the most
    light at the galaxy count.
    """
    found, nobody = scene.found, np.zeros(0, int)
    if not len(found):
        return [nobody] * len(scene.x)
    reach = np.sqrt(found.area / np.pi)
    tree = KDTree(np.column_stack([found.x, found.y]))
    out = []
    for source in scene.source:
        if source < 0:
            out.append(nobody)
            continue
        near = np.array(tree.query_ball_point((found.x[source], found.y[source]), 0.7 * STAMP_SIZE), int)
        near = near[near != source]
        distance = np.hypot(found.x[near] - found.x[source], found.y[near] - found.y[source])
        touching = (distance < reach[near] + reach[source] + 2) & (
            found.flux[near] > NEIGHBOUR_FLUX * found.flux[source]
        )
        near, distance = near[touching], distance[touching]
        out.append(near[np.argsort(-found.flux[near] / distance**2)][:MOST_NEIGHBOURS])
    return out


def _fit(scene: _Scene, values: _Values, own: np.ndarray, fitter: Fitter, report: Report, *, keep: bool) -> None:
    """Fit a Sersic profile at the tile's own places; `keep` results that did not converge, else what was there."""
    zero_point = scene.setting.zero_point
    parameters = values.parameters(zero_point)
    starts = _moments(scene.found, scene.setting.psf_width)
    known = (scene.source >= 0) & np.isfinite(parameters).all(axis=1)
    starts[scene.source[known]] = parameters[known]
    neighbours = _overlapping(scene)
    labels = np.zeros((len(parameters), 1 + MOST_NEIGHBOURS), int)
    for row, source, near in zip(labels, scene.source, neighbours, strict=True):
        row[: 1 + len(near)] = source + 1, *(near + 1)
    mine = np.flatnonzero(own)
    n = len(mine)
    report("fitting", 0, n)
    for part, stamps in _stamps(scene, labels, mine):
        rows = mine[part]
        to_stamp = np.zeros((len(rows), 7))
        to_stamp[:, 0], to_stamp[:, 1] = stamps.x - scene.x[rows], stamps.y - scene.y[rows]
        stamps.replaced[stamps.empty] = True
        fits = fitter(
            stamps.pixels * stamps.rms[:, None, None].astype(np.float32),
            stamps.noise,
            parameters[rows] + to_stamp,
            stamps.replaced,
            [starts[neighbours[row]] + shift for row, shift in zip(rows, to_stamp, strict=True)],
            workers=1 if report is _silent else os.cpu_count() or 1,
            report=lambda done, first=part.start: report("fitting", first + done, n),  # type: ignore[misc]
        )
        _take(values, rows, fits, to_stamp, zero_point, keep=keep)


def _take(
    values: _Values, rows: np.ndarray, fits: Fits, to_stamp: np.ndarray, zero_point: float, *, keep: bool
) -> None:
    """Put the results of fits into their rows."""
    # What is left beyond the noise is taken for more noise of the same kind.
    worse = np.sqrt(np.maximum(fits.chi2, 1))[:, None]
    with np.errstate(invalid="ignore"):
        errors = np.sqrt(np.diagonal(fits.covariance, axis1=1, axis2=2)) * worse
    good = (fits.status == Status.CONVERGED) & np.isfinite(errors).all(axis=1)
    values.status[rows] = fits.status
    values.flags[rows[~good]] |= Flag.NOT_REFINED
    taken = np.isfinite(fits.parameters).all(axis=1) if keep else good
    if keep:
        values.targets[rows[~taken]] = np.nan
    at = rows[taken]
    x, y, flux, r_eff, n, q, theta = (fits.parameters - to_stamp)[taken].T
    errors = errors[taken]
    values.x[at], values.y[at], values.theta[at] = x, y, theta
    values.targets[at] = np.column_stack([zero_point - 2.5 * np.log10(flux), r_eff, n, 1 - q])
    values.errors[at] = np.column_stack([2.5 / np.log(10) * errors[:, 2] / flux, *errors[:, 3:6].T])
    values.sky[at], values.chi2[at] = fits.sky[taken], fits.chi2[taken]


def _drawn(core: mosaic.Window, values: _Values, zero_point: float, fitter: Fitter) -> np.ndarray:
    """All galaxies of a tile as the fits see them, float32, (H, W)."""
    canvas = np.zeros((core[0].stop - core[0].start, core[1].stop - core[1].start), np.float32)
    parameters = values.parameters(zero_point)
    for row in parameters[np.isfinite(parameters).all(axis=1)]:
        size = next((s for s in (STAMP_SIZE, 2 * STAMP_SIZE) if s > 16 * row[3]), 4 * STAMP_SIZE)
        corner = np.rint(row[:2]).astype(int) - size // 2
        x0, y0 = np.maximum(corner, (core[1].start, core[0].start))
        x1, y1 = np.minimum(corner + size, (core[1].stop, core[0].stop))
        if x1 > x0 and y1 > y0:
            stamp = fitter.draw(row - np.array([*corner, 0, 0, 0, 0, 0]), size)
            inner = slice(y0 - core[0].start, y1 - core[0].start), slice(x0 - core[1].start, x1 - core[1].start)
            canvas[inner] += stamp[y0 - corner[1] : y1 - corner[1], x0 - corner[0] : x1 - corner[0]]
    return canvas


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
    from sersicnet.simulate import effective_psf

    trained_on = _trained_on(network, "PSF")
    if network.card["data"]["config"].get("psfs"):
        raise InputError(f"{network.name} was trained with PSFs of its own: give the image's PSF with --psf.")
    _warn(f"No --psf was given: fits use that of the weights' domain, {trained_on['name']}.")
    preset = instrument.Instrument(**{**trained_on, "pixels": tuple(trained_on["pixels"])})
    return effective_psf(preset), f"of the weights: {trained_on['name']}"


def _psf_of_file(path: str | Path) -> tuple[np.ndarray, str]:
    return realsky.read_psf(path).image, str(path)


def _width(psf: np.ndarray, oversampling: int = 1) -> float:
    """Diameter of the circle in which a PSF is above half of its maximum, image pixels."""
    return float(2 * np.sqrt((psf > psf.max() / 2).sum() / np.pi) / oversampling)


def _prior(prior: str | Path, plan: _Plan) -> Prior | None:
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


def _columns(table: Table, scale: instrument.Reading) -> dict[str, np.ndarray]:
    """Parameters of galaxies in a table, under the names of the targets, and theta, as far as it has them."""
    out = {}
    for name in (*TARGET_NAMES, "theta"):
        if name in table.colnames:
            out[name] = _coordinate(table[name])
    if "r_eff_pix" not in out and "r_eff" in table.colnames:
        if not np.isfinite(scale.value):
            raise InputError("A table with r_eff in arcsec needs a pixel scale: give --pixel-scale, or r_eff_pix.")
        out["r_eff_pix"] = _coordinate(table["r_eff"], "arcsec") / scale.value
    if "ellipticity" not in out and "q" in table.colnames:
        out["ellipticity"] = 1 - _coordinate(table["q"])
    return out


def _table(plan: _Plan, values: _Values, network: weights.Weights | None, *, fitted: bool) -> QTable:
    """Columns with units and descriptions, and the flags that need the whole catalogue."""
    n = len(values.x)
    targets, flags = values.targets, values.flags
    with np.errstate(invalid="ignore"):
        flags[targets[:, 1] > LARGE_LIMIT] |= Flag.LARGE
    columns: dict[str, np.ndarray] = {"id": np.arange(1, n + 1), "x": values.x, "y": values.y}
    if plan.frame.wcs is not None:
        columns["ra"], columns["dec"] = plan.frame.sky(values.x, values.y) if n else (np.zeros(0), np.zeros(0))
    for i, name in enumerate(TARGET_NAMES):
        columns[name] = targets[:, i]
        if fitted or (network is not None and network.card["errors"]):
            columns[f"{name}_err"] = values.errors[:, i]
    if np.isfinite(plan.scale.value):
        for name in ("r_eff", "r_eff_err"):
            pixels = columns.get(name.replace("r_eff", "r_eff_pix"))
            if pixels is not None:
                columns[name] = pixels * plan.scale.value
    columns.update(theta=values.theta, snr=values.snr, flags=flags)
    if fitted:
        columns.update(sky=values.sky, chi2=values.chi2, fit_status=values.status)
    table = QTable()
    for column in COLUMNS:
        if column.name in columns:
            content = np.asarray(columns[column.name]).astype(column.dtype)
            table[column.name] = content * units.Unit(column.unit) if column.unit else content
            table[column.name].info.description = column.description
    return table


def _provenance(
    plan: _Plan, mesh: detect.Mesh, network: weights.Weights | None, command: str
) -> dict[str, str | float]:
    """What the catalogue was made from, as FITS cards of at most eight characters."""
    meta: dict[str, str | float] = {
        "IMAGE": plan.frame.name,
        "MAGSYS": "AB",
        "ZEROPT": plan.zero.value,
        "ZPSOURCE": plan.zero.source,
        "PIXSRC": plan.scale.source,
        "SKYRMS": float(np.median(mesh.rms)),
        "NOISECOR": detect.correlation(mesh.autocorrelation),
        "STAMPSIZ": STAMP_SIZE,
        **catalogue.origin(),
    }
    if network is not None:
        meta.update(WEIGHTS=network.name, WTSHA256=network.sha256)
    if np.isfinite(plan.scale.value):
        meta["PIXSCALE"] = plan.scale.value
    if np.isfinite(mesh.map_factor):
        meta["MAPFACT"] = mesh.map_factor
    if command:
        meta["COMMAND"] = command
    return meta


def _warn(message: str) -> None:
    warnings.warn(message, SersicnetWarning, stacklevel=3)
