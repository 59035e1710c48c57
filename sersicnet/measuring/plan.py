"""What is to be measured, and how: checked as a whole, foreseen, and run."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from astropy.table import QTable, Table

import sersicnet
from sersicnet import weights, workers
from sersicnet.catalogue.parameters import Galaxies
from sersicnet.errors import InputError, warn
from sersicnet.image import psf as psfs
from sersicnet.image import stars
from sersicnet.image.exposure import Exposure
from sersicnet.image.header import Reading
from sersicnet.image.mosaic import Image
from sersicnet.image.pixels import Window, correlation
from sersicnet.image.psf import Psf, Width
from sersicnet.image.resample import Resampled
from sersicnet.image.sky import Mesh, estimate_sky
from sersicnet.measuring import columns, tiles
from sersicnet.measuring.fitting import Fitting, ImageFitting
from sersicnet.measuring.outputs import Files, Outputs, Result
from sersicnet.output import Report, Run, silent
from sersicnet.schema import TARGET_NAMES
from sersicnet.weights import Weights

_log = logging.getLogger(__name__)

TILE = 2048
"""Side of the pieces that a large image is worked on in, pixels."""

PROCESS_MEMORY, PIXEL_MEMORY = 2.5e8, 80.0
"""Bytes that a process takes, and besides for each pixel of its tile: 1.4 GB with two processes, of which 1.2 to 1.4
were measured (``benchmarks/survey.py``)."""

MOST_FINER = 1.2
"""Factor of resampling above which the user is warned of the correlation of the noise."""

MAP_LIMIT = 3.0
"""Factor on a noise map above which, or below its inverse, the user is warned."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """How the work is done. The catalogue does not depend on it.

    Attributes
    ----------
    tile : int
        Side of the pieces that a large image is worked on in, pixels.
    workers : int
        Processes that work on the pieces.
    scheduler : str, optional
        Address of a Dask scheduler whose workers do it instead.
    run : Path, optional
        Directory that keeps the finished tiles, and is left when all is done. By default
        one beside the catalogue, where there are several tiles, which is dropped in the end.
    """

    tile: int = TILE
    workers: int = 1
    scheduler: str | None = None
    run: Path | None = None


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
    zero_point: Reading
    pixel_scale: Reading
    factor: float
    weights: str
    tiles: int
    workers: int
    memory: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """A measurement that is checked and ready to run.

    Attributes
    ----------
    exposure : Exposure
        The image.
    source : Exposure or Resampled
        The image, or what it is brought to before it is measured.
    network : Weights or None
        None for fits alone.
    psf : Psf or None
        The PSF that the user gave.
    fitting : ImageFitting or None
        None without fits.
    places : ndarray, float64, (N, 2) or None
        Where to measure, x and y in pixels of `source`; None for what is detected.
    starts : dict
        Parameters that fits start from, by name, for each of the places.
    files : Files
    overwrite : bool
        Whether to drop an unfinished run with other options.
    work : Work
    command : str
        The command line, for the catalogue's header.
    """

    exposure: Exposure
    source: Exposure | Resampled
    network: Weights | None
    psf: Psf | None
    fitting: ImageFitting | None
    places: np.ndarray | None
    starts: dict[str, np.ndarray]
    files: Files
    overwrite: bool
    work: Work
    command: str

    @classmethod
    def of(
        cls,
        exposure: Any,
        *,
        network: str | Path | Weights | None,
        psf: str | Path | Psf | None,
        fitting: Fitting | None,
        resample: bool,
        positions: str | Path | Table | None,
        outputs: Outputs,
        work: Work,
        command: str,
        report: Report = silent,
    ) -> Plan:
        """Check everything that can be refused before the pixels are read; see `sersicnet.measuring.measure`."""
        report("reading", 0, 0)
        exposure = Exposure.of(exposure)
        files = outputs.checked(exposure.image.path)
        if network is not None and not isinstance(network, Weights):
            network = weights.load(network)
        if psf is not None and not isinstance(psf, Psf):
            psf = psfs.read_psf(psf)
        galaxies, places = _places(positions, exposure)
        _log.info("%s: %d x %d pixels", exposure.name, *exposure.shape[::-1])
        _log.info("zero point %.4f from %s; pixel scale %.4f from %s", *exposure.zero_point, *exposure.pixel_scale)
        if exposure.wcs is None:
            reason = exposure.image.wcs_problem
            warn(
                f"{exposure.name} has no celestial WCS{f' that can be used ({reason})' * bool(reason)}: the catalogue "
                "has pixel columns only."
            )
        source = exposure if network is None else _at_scale_of(network, exposure, resample)
        if places is not None and isinstance(source, Resampled):
            places = source.to_grid(places)
        return cls(
            exposure=exposure,
            source=source,
            network=network,
            psf=psf,
            fitting=None if fitting is None else fitting.of_image(exposure, psf, network),
            places=places,
            starts={} if galaxies is None or network is not None else _starts(galaxies, exposure.pixel_scale),
            files=files,
            overwrite=outputs.overwrite,
            work=work,
            command=command,
        )

    # --- the grid that is measured on ---

    @property
    def factor(self) -> float:
        """Pixels of the source along one of the image."""
        return self.source.factor if isinstance(self.source, Resampled) else 1.0

    def to_image(self, pixels: np.ndarray) -> np.ndarray:
        """Positions in pixels of the image, from those in the source."""
        return self.source.from_grid(pixels) if isinstance(self.source, Resampled) else pixels

    def _widened(self, size: float) -> float:
        """Standard deviation of a point in pixels of the source, from that in the image."""
        if not isinstance(self.source, Resampled):
            return size
        return self.factor * float(np.sqrt(size**2 + (1 + 1 / self.factor**2) / 12))

    def _on_grid(self, width: Width) -> Width:
        """The width of a PSF in pixels of the source."""
        sigma = 2 * np.sqrt(2 * np.log(2))
        return width._replace(value=sigma * self._widened(width.value / sigma), error=width.error * self.factor)

    # --- how the work is done ---

    @functools.cached_property
    def cores(self) -> list[Window]:
        """The tiles."""
        return tiles.cores(self.source.shape, self.work.tile)

    @property
    def _held(self) -> Image | None:
        """An image that is in memory, if there is one: other processes would need copies of it."""
        return next((image for image in self.exposure.images if image.is_held), None)

    @property
    def processes(self) -> int:
        """How many do the work; one where an image is held in memory."""
        return 1 if self._held is not None else min(self.work.workers, len(self.cores))

    def outlook(self) -> Outlook:
        """What `run` would do; nothing is measured or written."""
        n = self.processes
        largest = max((rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in self.cores)
        held = sum(image.shape[0] * image.shape[1] * 4 for image in self.exposure.images if image.is_held)
        memory = (n + (n > 1)) * PROCESS_MEMORY + n * largest * PIXEL_MEMORY + held
        self.exposure.close()
        return Outlook(
            image=self.exposure.name,
            shape=self.exposure.shape,
            zero_point=self.exposure.zero_point,
            pixel_scale=self.exposure.pixel_scale,
            factor=self.factor,
            weights="none" if self.network is None else self.network.name,
            tiles=len(self.cores),
            workers=n,
            memory=memory / 1e9,
        )

    def run(self, report: Report = silent) -> QTable:
        """Measure, and write what is to be written.

        Parameters
        ----------
        report : callable
            Receives the stage, and how many of how many sources it has done.
        """
        with self._kept() as kept, self._workers() as apply:
            mesh = self._mesh(kept, apply, report)
            fitter = None if self.fitting is None else self.fitting.fitter(mesh)
            setting = tiles.Setting(
                exposure=self.source,
                zero_point=self.exposure.zero_point.value,
                mesh=mesh,
                places=self.places,
                starts=self.starts,
                network=None if self.network is None else (self.network.path, self.network.sha256),
                fitter=fitter,
                psf_width=0.0 if self.fitting is None else self.fitting.psf_width,
                profiles=self.network is not None and self.psf is None,
                saturation=self.exposure.saturation / self.factor**2,
                # All cores where there is one tile; one for each tile where many are worked on at once.
                threads=(os.cpu_count() or 1) if len(self.cores) == 1 else 1,
            )
            values, profiles = self._measured(setting, kept, apply, report)
            columns.flag_large(values)
            meta = columns.provenance(self, mesh)
            if self.network is not None:
                width, largest = self._stars(profiles)
                meta["OUTSIDE"] = columns.flag_domain(values, self.network, self, width, largest)
                meta["PSFSRC"] = width.source
                if np.isfinite(width.value):
                    meta["PSFFWHM"] = width.value
            table = columns.catalogue(self, values)
            table.meta.update(meta)
            if self.fitting is not None:
                table.meta.update(self.fitting.meta)
            self.files.write(Result(table, self.exposure, self.source, mesh, values, fitter, self.work.tile))
        return table

    def _stars(self, profiles: np.ndarray) -> tuple[Width, float]:
        """Width of the PSF, and size of the largest star, pixels of the source; from the user's PSF or the stars."""
        if self.psf is None:
            found = profiles[stars.stellar_locus(profiles)]
            return stars.width_of(found), stars.largest_star(found[:, 3])
        size = stars.size_of(self.psf.image) / self.psf.oversampling
        return self._on_grid(self.psf.width), 1.05 * self._widened(size)

    @contextmanager
    def _kept(self) -> Iterator[Run]:
        """What holds finished tiles: in a directory that is given, or beside the catalogue until all is done."""
        path = self.work.run
        if path is None and self.files.catalogue is not None and len(self.cores) > 1:
            path = self.files.catalogue.with_name(self.files.catalogue.name + ".run")
        images = {image.name: image.identity() for image in self.exposure.images} if path is not None else {}
        fits = {} if self.fitting is None else self.fitting.config
        config = {
            "weights": None if self.network is None else self.network.sha256,
            "psf given": self.psf is not None,
            "factor": self.factor,
            "images": images,
            "noise kind": self.exposure.noise_kind,
            "zero point": self.exposure.zero_point.value,
            "pixel scale": self.exposure.pixel_scale.value,
            "positions": None if self.places is None else hashlib.sha256(self.places.tobytes()).hexdigest(),
            "tile": self.work.tile,
            "version": sersicnet.__version__,
            **fits,
        }
        with Run(path, config, self.overwrite) as kept:
            try:
                yield kept
            except KeyboardInterrupt:
                if path is not None:
                    warn(f"Interrupted: what is finished is kept in {path}, and the same command continues.")
                raise
            finally:
                self.exposure.close()
            if self.work.run is None:
                kept.remove()

    @contextmanager
    def _workers(self) -> Iterator[workers.Apply]:
        """What works on the tiles; this process alone where there is a single one."""
        if self.work.scheduler is not None:
            with workers.cluster(self.work.scheduler) as apply:
                yield apply
            return
        if self._held is not None and min(self.work.workers, len(self.cores)) > 1:
            warn(f"{self._held.name} is held in memory as a whole: one process does the work.")
        with workers.pools(self.processes, weights.use_one_thread) as apply:
            yield apply

    def _mesh(self, kept: Run, apply: workers.Apply, report: Report) -> Mesh:
        """Sky and noise of the image, or what was kept of them."""
        found = kept.arrays("mesh")
        if found is None:
            report("measuring the sky", 0, 0)
            mesh = estimate_sky(self.source, tiles.DETECTOR.threshold, workers.in_order(apply))
            _log.info("sky %.4g, noise %.4g (medians)", np.median(mesh.level), np.median(mesh.rms))
            kept.keep_arrays("mesh", mesh.arrays())
        else:
            mesh = Mesh.of(found)
        noise = self.exposure.noise
        if noise is not None and not 1 / MAP_LIMIT < mesh.map_factor < MAP_LIMIT:
            warn(
                f"{noise.name} was multiplied by {mesh.map_factor:.3g} as a map of the noise, to match "
                f"the scatter of blank pixels: only its relative values are used. Is it the {self.exposure.noise_kind} "
                "in units of the image? Weights of drizzled images often are exposure "
                "times, not inverse variances. Correlated noise makes pixels scatter less than a map says; NOISECOR, "
                f"by which the noise of an aperture exceeds theirs, is {correlation(mesh.autocorrelation):.2f}."
            )
        return mesh

    def _measured(
        self, setting: tiles.Setting, kept: Run, apply: workers.Apply, report: Report
    ) -> tuple[tiles.Values, np.ndarray]:
        """The values of all tiles in an order that does not depend on the tiles, and the profiles of sources."""
        found: list[dict[str, np.ndarray]] = []
        missing = []
        for core in self.cores:
            done = kept.arrays(_tile_name(core))
            if done is None:
                missing.append(core)
            else:
                found.append(done)
        alone = len(self.cores) == 1
        if found:
            _log.info("%d of %d tiles were finished before", len(found), len(self.cores))
        before, started = sum(len(arrays["x"]) for arrays in found), time.monotonic()

        def tell() -> None:
            if not alone:
                n = sum(len(arrays["x"]) for arrays in found)
                rate = (n - before) / max(time.monotonic() - started, 1e-9)
                report(f"measuring tiles: {n:,} sources, {rate:.0f}/s", len(found), len(self.cores))

        tell()
        inner = report if alone else silent
        for number, arrays in apply(functools.partial(tiles.measure_tile, setting, report=inner), missing):
            kept.keep_arrays(_tile_name(missing[number]), arrays)
            found.append(arrays)
            _log.info("%s: %d sources", _tile_name(missing[number]), len(arrays["x"]))
            tell()
        joined = {name: np.concatenate([arrays[name] for arrays in found]) for name in found[0]}
        profiles = joined.pop("profiles")
        if self.places is None:
            order = np.lexsort((joined["x0"], joined["y0"]))
            if not len(order):
                warn(
                    f"No source was detected in {self.exposure.name}: the catalogue has no rows. "
                    "Is the image background-limited, with light positive?"
                )
        else:
            order = np.argsort(joined["place"])
        return tiles.Values(**{name: values[order] for name, values in joined.items()}), profiles


def _tile_name(core: Window) -> str:
    return f"tile-{core[0].start}-{core[1].start}"


def _at_scale_of(network: Weights, exposure: Exposure, resample: bool) -> Exposure | Resampled:
    """The image, brought to the pixel scale of a network if that is asked for; else it must have that."""
    scale = exposure.pixel_scale.value
    if not resample:
        network.domain.check_scale(exposure.pixel_scale)
        return exposure
    if not np.isfinite(scale):
        raise InputError(f"{exposure.name} has no pixel scale to resample from: give `pixel_scale`.")
    grid = Resampled(exposure, scale / network.domain.pixel_scale)
    if grid.factor > MOST_FINER:
        warn(
            f"Pixels of {scale:.4f} arcsec become {grid.factor:.2f} times finer: their noise is "
            "correlated over more pixels than is measured, so that S/N and errors are too good."
        )
    return grid


def _places(positions: str | Path | Table | None, exposure: Exposure) -> tuple[Galaxies | None, np.ndarray | None]:
    """The galaxies that the user gave, and their x and y in pixels of the image, (N, 2).

    Positions on the sky count, unless the image has no WCS.
    """
    if positions is None:
        return None, None
    galaxies = Galaxies(positions, "`positions`") if isinstance(positions, Table) else Galaxies.read(positions)
    sky, pixels = galaxies.sky(), galaxies.pixels()
    if sky is not None and (exposure.wcs is not None or pixels is None):
        return galaxies, np.column_stack(exposure.image.pixels(*sky.T))
    if pixels is not None:
        return galaxies, pixels
    raise InputError(f"A table of positions has columns x and y, or ra and dec; received {galaxies.columns}.")


def _starts(galaxies: Galaxies, scale: Reading) -> dict[str, np.ndarray]:
    """Parameters of galaxies that a table has, under the names of the targets, and theta.

    A radius of a unit that the table does not state is not used.
    """
    found = {name: galaxies.parameter(name) for name in (*TARGET_NAMES, "theta") if name != "r_eff_pix"}
    if galaxies.radii().keys() & {"pix", "arcsec"}:
        found["r_eff_pix"] = galaxies.radius_in_pixels(scale.value, "give `pixel_scale`, or r_eff_pix.")
    return {name: values for name, values in found.items() if values is not None}
