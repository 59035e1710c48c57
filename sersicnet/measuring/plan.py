"""The plan of a measurement: its checks, an outlook on tiles and memory, and the run."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from astropy.table import QTable

import sersicnet
from sersicnet import session, weights, workers
from sersicnet.catalogue import chosen
from sersicnet.catalogue.factors import Factors
from sersicnet.catalogue.galaxy import Correlations, Picture
from sersicnet.catalogue.measured import Catalogue
from sersicnet.domain import Domain, Seen
from sersicnet.errors import InputError, WeightsError, warn
from sersicnet.image import psffile, stars
from sersicnet.image.carried import Carried
from sersicnet.image.detect import Detector
from sersicnet.image.exposure import Exposure
from sersicnet.image.header import Reading
from sersicnet.image.mosaic import Image
from sersicnet.image.pixels import Window, correlation
from sersicnet.image.psf import Psf, Width
from sersicnet.image.resample import Resampled
from sersicnet.image.sky import Mesh, estimate_sky
from sersicnet.measuring import columns, tiles
from sersicnet.measuring.fitting import Fitting, ImageFitting, check_gain, holds_photon_noise
from sersicnet.measuring.identity import METHOD, identity, options_of
from sersicnet.measuring.outputs import Files, Outputs, Result
from sersicnet.measuring.positions import Listed, Positions, digest, read_positions
from sersicnet.measuring.scene import DETECTOR, Setting, Values
from sersicnet.measuring.seeing import Seeing, doubts, largest_stars, moffat, seeing
from sersicnet.output import Report, Run, silent
from sersicnet.schema import Flag
from sersicnet.weights import Weights

_log = logging.getLogger(__name__)

TILE = 2048
"""Default side of the tiles that a large image is divided into, pixels."""

PROCESS_MEMORY, PIXEL_MEMORY = 2.5e8, 80.0
"""Memory of a process, and of each pixel of its tile, bytes. This predicts 1.4 GB for two processes; 1.2 to 1.4 GB were
measured (``benchmarks/survey.py``)."""

MOST_FINER = 1.2
"""Resampling to finer pixels by more than this factor gives a warning about correlated noise."""

MOST_MAP_FACTOR = 1e3
"""A factor on a noise map above this limit or below its inverse is refused: it is no map of the noise."""

MAP_LIMIT = 3.0
"""A factor on a noise map above this limit or below its inverse gives a warning."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Tiles, processes and device of a run. The catalogue does not depend on tiles and processes.

    Attributes
    ----------
    tile : int
        Side of the tiles that a large image is divided into, pixels.
    workers : int
        Number of processes that measure tiles.
    scheduler : str, optional
        Address of a Dask scheduler; its workers then measure the tiles.
    device : str
        Where the network runs: ``cpu``, ``gpu``, or ``auto``, which is a GPU if ONNX Runtime has one that works. Every
        process opens the network on the GPU for itself. The workers of a scheduler take a GPU only with ``gpu``. The
        last digits of a catalogue depend on the device.
    run : Path, optional
        Directory that keeps the finished tiles, also after the run. By default, a run of several
        tiles keeps them in a directory beside the catalogue, and removes it at the end.
    """

    tile: int = TILE
    workers: int = 1
    scheduler: str | None = None
    device: str = "auto"
    run: Path | None = None


@dataclass(frozen=True)
class Outlook:
    """Properties of a planned run.

    Attributes
    ----------
    image : str
    shape : (int, int)
        Height and width, pixels.
    zero_point, pixel_scale : Reading
    factor : float
        Number of resampled pixels along a pixel of the image; 1 without resampling.
    weights : str
    device : str
        That the network runs on: ``cpu`` or ``gpu``.
    tiles, workers : int
    memory : float
        Approximate memory of all processes together, GB.
    """

    image: str
    shape: tuple[int, int]
    zero_point: Reading
    pixel_scale: Reading
    factor: float
    weights: str
    device: str
    tiles: int
    workers: int
    memory: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """A measurement whose inputs are checked.

    Attributes
    ----------
    exposure : Exposure
        The image.
    source : Exposure or Resampled
        The image that is measured: the exposure, or the exposure resampled.
    network : Weights or None
        None for fits without a network.
    psf : Psf or None
        The user's PSF, in the pixels of the exposure.
    psf_fwhm : float or None
        Its width in pixels, if this is all that the user has.
    gain : float or None
        Electrons per image unit, for a network that is shown the photon noise.
    refine : Fitting or None
        Options of the fits; None without fits.
    fitting : ImageFitting or None
        The fits; None without fits, and until the PSF of the image is known.
    places : ndarray, float64, (N, 2) or None
        Positions to measure, x and y in pixels of `source`; None to measure the detected sources.
    starts : dict
        Start parameters of the fits at the positions, by name.
    listed : Listed or None
        The table of positions.
    detector : Detector or Carried
        What detects: on the source, or on another image.
    files : Files
    overwrite : bool
        Whether to drop an unfinished run with other options.
    work : Work
    command : str
        The command line, for the catalogue's header.
    factors : Factors or None
        Of a validation, for the errors.
    debias : bool
        Whether to take out the biases that the validation found, too.
    columns : tuple of str
        Columns of the catalogue, as `sersicnet.catalogue.chosen.wanted` returns them.
    seen : Seeing or None
        The PSF, if it is known from a measurement of the same image.
    mesh : Mesh or None
        Sky and noise, if they are known from a measurement of the same image.
    """

    exposure: Exposure
    source: Exposure | Resampled
    network: Weights | None
    psf: Psf | None
    psf_fwhm: float | None
    gain: float | None
    refine: Fitting | None
    fitting: ImageFitting | None
    places: np.ndarray | None
    starts: dict[str, np.ndarray]
    listed: Listed | None = None
    detector: Detector | Carried = DETECTOR
    files: Files
    overwrite: bool
    work: Work
    command: str
    factors: Factors | None = None
    debias: bool = False
    columns: chosen.Wanted = ()
    seen: Seeing | None = None
    mesh: Mesh | None = None

    def __repr__(self) -> str:
        network = "no network" if self.network is None else f"weights {self.network.name}"
        return f"<Plan {self.exposure!r}, {network}, {len(self.cores)} tiles, {self.processes} processes>"

    @classmethod
    def of(
        cls,
        exposure: Any,
        *,
        network: str | Path | Weights | None,
        psf: str | Path | Psf | None,
        psf_fwhm: float | None = None,
        gain: float | None = None,
        fitting: Fitting | None,
        resample: bool,
        positions: Positions | None,
        from_band: str | None = None,
        outputs: Outputs,
        work: Work,
        command: str,
        validated: str | Path | None = None,
        debias: bool = False,
        wanted: str | Sequence[str] = (),
        report: Report = silent,
    ) -> Plan:
        """Check all inputs before the pixels are read; for the parameters see `sersicnet.measuring.measure.measure`."""
        report("reading", 0, 0)
        if work.workers > 1:
            workers.check_main()
        exposure = Exposure.of(exposure)
        read = [image.path for image in exposure.images]
        files = outputs.checked(*read, psf, positions, validated, fitting and fitting.prior)
        if network is not None and not isinstance(network, Weights):
            network = weights.load(network)
        if network is not None:
            network = _on(network, work)
        if psf is not None:
            psf = psf if isinstance(psf, Psf) else psffile.read_psf(psf)
            psf = psf.on(exposure.image, exposure.pixel_scale.value)
        shown = network is not None and "psf" in network.inputs
        _check_psf_width(psf_fwhm, shown and psf is None)
        check_gain(gain)
        if not shown and fitting is None:
            if gain is not None:
                raise InputError("`gain` belongs to fits: give `refine` with it.")
            if files.psf_out is not None:
                raise InputError("`psf_out` is written by a network that is shown the PSF, or by fits.")
        if debias and validated is None:
            raise InputError("`debias` subtracts the biases that a validation found: give `validated` with it.")
        factors = None if validated is None else Factors.read(validated)
        later = shown and psf is None  # the fits get the PSF that the image shows
        if later and fitting is not None:
            fitting.check_prior(exposure)
        fix = () if fitting is None else fitting.fix
        listed, places, starts = read_positions(positions, exposure, from_band, fix, with_network=network is not None)
        _log.info("%s: %d x %d pixels", exposure.name, *exposure.shape[::-1])
        _log.info("zero point %.4f from %s; pixel scale %.4f from %s", *exposure.zero_point, *exposure.pixel_scale)
        _warn_without_wcs(exposure)
        source = exposure if network is None else _at_scale_of(network, exposure, resample, refine=fitting is not None)
        plan = cls(
            exposure=exposure,
            source=source,
            network=network,
            psf=psf,
            psf_fwhm=psf_fwhm,
            gain=gain,
            refine=fitting,
            fitting=None if fitting is None or later else fitting.of_image(exposure, psf, network),
            places=None if places is None else source.to_grid(places),
            starts=starts,
            listed=listed,
            files=files,
            overwrite=outputs.overwrite,
            work=work,
            command=command,
            factors=factors,
            debias=debias,
            columns=chosen.wanted(wanted),
        )
        chosen.check(plan.columns, plan.table(columns.no_values()).colnames)
        if factors is not None:
            factors.check(plan.options())
        return plan

    # --- conversions between the image and the source ---

    def _widened(self, size: np.ndarray) -> np.ndarray:
        """Widths (1 sigma) of stars in pixels of the source, from those in pixels of the image."""
        factor = self.source.factor
        return size if factor == 1 else factor * np.sqrt(size**2 + (1 + 1 / factor**2) / 12)

    def _on_grid(self, width: Width) -> Width:
        """The width of a PSF in pixels of the source."""
        sigma = 2 * np.sqrt(2 * np.log(2))
        value = sigma * self._widened(np.array(width.value / sigma))
        return Width(float(value), width.error * self.source.factor, width.source)

    # --- the run ---

    @functools.cached_property
    def cores(self) -> list[Window]:
        """The tiles of the source."""
        return tiles.cores(self.source.shape, self.work.tile)

    @property
    def _held(self) -> Image | None:
        """An image or map that is in memory, if there is one: other processes would need copies of it."""
        others = self.detector.exposure.images if isinstance(self.detector, Carried) else []
        return next((image for image in (*self.exposure.images, *others) if image.is_held), None)

    @property
    def processes(self) -> int:
        """Number of processes; 1 if an image is in memory."""
        return 1 if self._held is not None else min(self.work.workers, len(self.cores))

    def outlook(self) -> Outlook:
        """Describe the run without measuring or writing anything."""
        n = self.processes
        largest = max((rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in self.cores)
        held = sum(image.shape[0] * image.shape[1] * 4 for image in self.exposure.images if image.is_held)
        images = 2 if isinstance(self.detector, Carried) else 1
        memory = (n + (n > 1)) * PROCESS_MEMORY + n * largest * PIXEL_MEMORY * images + held
        self.exposure.close()
        return Outlook(
            image=self.exposure.name,
            shape=self.exposure.shape,
            zero_point=self.exposure.zero_point,
            pixel_scale=self.exposure.pixel_scale,
            factor=self.source.factor,
            weights="none" if self.network is None else self.network.name,
            device=session.CPU if self.network is None else self.network.device,
            tiles=len(self.cores),
            workers=n,
            memory=memory / 1e9,
        )

    def options(self) -> dict[str, Any]:
        """All that the values of a catalogue depend on, with digests of the image and its maps."""
        return identity(self.exposure, self._described(), positions=self.places is not None, fitting=self.refine)

    def _described(self) -> dict[str, Any]:
        psf = self.psf
        return {
            "weights": None if self.network is None else self.network.identity,
            "psf given": None if psf is None else [psf.sha256, psf.oversampling, psf.error, psf.light_error],
            "psf width": self.psf_fwhm,
            "gain": self.gain,
            "factor": self.source.factor,
            "noise kind": self.exposure.noise_kind,
            "noise as given": self.exposure.noise_as_given,
            "noise includes": self.exposure.noise_includes,
            "zero point": self.exposure.zero_point.value,
            "pixel scale": self.exposure.pixel_scale.value,
            "saturation": self.exposure.saturation,
            "version": sersicnet.__version__,
            "method": METHOD,
        }

    def run(self, report: Report = silent) -> Catalogue:
        """Measure the image, write the requested files, and return the catalogue with its image; see `result`."""
        found = self.result(report)
        picture = Picture(
            self.exposure,
            self.psf if found.psf is None else found.psf,
            found.mesh if self.source is self.exposure else None,
            Correlations(
                np.array(found.table["id"]), np.array(found.table["x"].value),
                found.values.correlations.astype(np.float32),
            ),
        )  # fmt: skip
        return Catalogue._with(found.catalogue, picture)

    def sky(self, report: Report = silent) -> Mesh:
        """Sky and noise of the source, without measuring anything else."""
        report("measuring the sky", 0, 0)
        with self._workers() as apply:
            return estimate_sky(self.source, DETECTOR.threshold, workers.in_order(apply))

    def result(self, report: Report = silent) -> Result:
        """Measure the image, and write the requested files.

        Parameters
        ----------
        report : callable
            Receives the stage, the number of sources done and their total number.

        Returns
        -------
        Result
            With the catalogue, see `sersicnet.measuring.measure.measure`.
        """
        with self._kept() as kept, self._workers() as apply:
            mesh = self._mesh(kept, apply, report)
            saturation = self._saturation(mesh)
            seen = self._seeing(mesh, saturation, apply, report)
            fitting = self.fitting
            if fitting is None and self.refine is not None and seen is not None:
                fitting = self.refine.of_image(self.exposure, seen.psf, self.network)
            fitters = None if fitting is None else fitting.fitters(mesh)
            setting = Setting(
                exposure=self.source,
                zero_point=self.exposure.zero_point.value,
                mesh=mesh,
                detector=self.detector,
                places=self.places,
                starts=self.starts,
                network=None if (own := self.network) is None else (own.path, own.identity, own.device),
                fitters=fitters,
                psf=None if seen is None else seen.psf,
                gain=self.gain,
                fix=() if self.refine is None else self.refine.kept,
                forced=self.refine is not None and self.refine.forced,
                psf_width=0.0 if fitting is None else fitting.psf_width,
                profiles=self.network is not None or self.psf is not None,
                saturation=saturation,
                # A single tile uses all cores; several tiles are measured at once, with one core each.
                threads=workers.cores() if len(self.cores) == 1 else 1,
            )
            values, profiles = self._measured(setting, kept, apply, report)
            if self.network is not None and columns.flag_unanswered(values, self.network):
                kept.remove()
                raise WeightsError(
                    f"The network of {self.network.name} returns no number for any galaxy in "
                    f"{self.exposure.name}: its training failed. Measure with other weights, or train these again."
                )
            columns.flag_large(values)
            meta = columns.provenance(self.exposure, self.source, mesh, self.network, self.command)
            if self.network is not None:
                width, largest = self._stars(profiles, seen, values)
                if seen is not None:
                    width = seen.psf.width
                traits = Seen(
                    self.exposure.zero_point, width, values.rms, correlation(mesh.autocorrelation),
                    None if seen is None else seen.shape,
                )  # fmt: skip
                meta["OUTSIDE"] = columns.flag_domain(values, self.network, traits, largest)
                meta["PSFSRC"] = width.source
                if np.isfinite(width.value):
                    meta["PSFFWHM"] = width.value
                if seen is not None:
                    meta.update(seen.meta())
                    values.flags[:] |= Flag.PSF_ASSUMED * seen.assumed
            fitted = values._replace(targets=values.targets.copy())  # models are those of the fits
            if self.factors is not None:
                columns.correct(values, self.factors, self.source.factor, debias=self.debias)
                meta.update(VALFILE=self.factors.name, VALSHA=self.factors.sha256, VALBIAS=self.debias)
            used = seen.psf if seen is not None else None if fitting is None else fitting.psf
            doubted = self.psf if self.psf is not None else used
            if doubted is not None and not (seen is not None and seen.assumed):
                doubt = doubts(self.exposure, doubted, None if self.psf is None else self._of_stars(profiles))
                if doubt:
                    meta["PSFDOUBT"] = doubt
            table = self.table(values)
            table.meta.update(meta)
            if fitting is not None:
                table.meta.update(fitting.meta)
            if self.listed is not None:
                table.meta.update(self.listed.mark(table))
            if isinstance(self.detector, Carried):
                origin = table.meta["DETECTON"] = self.detector.exposure.name
                table.meta.update(columns.offset(self.exposure.name, f"where the WCS of {origin} puts them", values))
            elif self.listed is not None and self.refine is not None and "position" in self.refine.kept:
                table.meta.update(columns.offset(self.exposure.name, f"their positions in {self.listed.name}", values))
            found = Result(
                table, self.exposure, self.source, mesh, fitted, fitters, used, self.work.tile, seen, self.columns
            )
            self.files.write(found)
        return found

    def table(self, values: Values) -> QTable:
        """The catalogue with all columns that it can have."""
        return columns.catalogue(
            self.exposure, self.source, values, network=self.network, fitted=self.refine is not None,
            detections=self.places is None, limits=self.refine is not None or self.places is not None,
        )  # fmt: skip

    def _seeing(self, mesh: Mesh, saturation: float, apply: workers.Apply, report: Report) -> Seeing | None:
        """The PSF that the network is shown; None if it is shown none."""
        if self.network is None or "psf" not in self.network.inputs:
            return None
        if self.seen is not None:
            return self.seen
        report("measuring the PSF", 0, 0)
        seen = seeing(self.exposure, mesh, self.psf, self.psf_fwhm, saturation, workers.in_order(apply))
        _log.info("PSF: FWHM %.3f pixels, from %s", seen.psf.fwhm, seen.psf.source)
        return seen

    def _saturation(self, mesh: Mesh) -> float:
        """Saturation level of the source; infinite, with a warning, if blank sky exceeds the level of the header."""
        level = self.source.saturation
        sky = float(np.median(mesh.level) + 5 * np.median(mesh.rms))
        if level > sky:
            return level
        warn(
            f"SATURATE in the header of {self.exposure.name} should exceed the sky; received "
            f"{self.exposure.saturation:g}, and blank pixels reach {sky:.4g}: it is ignored."
        )
        return np.inf

    def _stars(self, profiles: np.ndarray, seen: Seeing | None, values: Values) -> tuple[Width, np.ndarray]:
        """Width of the PSF and size of the largest star at each place, pixels of the source."""
        found = profiles[stars.stellar_locus(profiles)]
        width = stars.width_of(found) if self.psf is None else self._on_grid(self.psf.width)
        sizes = largest_stars(self.psf, seen, self.source.from_grid(values.x), self.source.from_grid(values.y))
        return width, np.array(stars.largest_star(found[:, 3])) if sizes is None else self._widened(sizes)

    def _of_stars(self, profiles: np.ndarray) -> Width | None:
        """Width of the stars, pixels of the image; None if the image is resampled."""
        return None if self.source.factor != 1 else stars.width_of(profiles[stars.stellar_locus(profiles)])

    @contextmanager
    def _kept(self) -> Iterator[Run]:
        """The store of finished tiles: in the user's directory, or beside the catalogue until the run is complete.

        A run of a single tile beside the catalogue only locks the directory, against a second run, and keeps nothing.
        """
        path, locked_only = self.work.run, self.work.run is None and len(self.cores) == 1
        if path is None and self.files.catalogue is not None:
            path = self.files.catalogue.with_name(self.files.catalogue.name + ".run")
        images = {image.name: image.identity() for image in self.exposure.images} if path is not None else {}
        fits = {} if self.fitting is None else self.fitting.config
        config = {
            **self._described(),
            "device": None if self.network is None else self.network.device,
            "images": images,
            "refine": options_of(self.refine),
            "detected on": self._detected_on(path is not None),
            "positions": digest(self.places, self.starts),
            "tile": self.work.tile,
            "values of a source": list(Values._fields),
            **fits,
        }
        with Run(path, config, self.overwrite) as held:
            kept = Run(None, config, self.overwrite) if locked_only else held
            try:
                yield kept
            except KeyboardInterrupt:
                if kept.has_begun:
                    warn(f"Interrupted: finished tiles are kept in {path}, and the same command continues.")
                raise
            finally:
                self.exposure.close()
            if self.work.run is None:
                kept.remove()

    def _detected_on(self, kept: bool) -> list[Any] | None:
        """The images that the sources are from, if it is not the source."""
        if not kept or not isinstance(self.detector, Carried):
            return None
        return [[image.name, image.identity()] for image in self.detector.exposure.images]

    @contextmanager
    def _workers(self) -> Iterator[workers.Apply]:
        """The processes that measure tiles; a single tile is measured by this process."""
        if self.work.scheduler is not None:
            with workers.cluster(self.work.scheduler) as apply:
                yield apply
            return
        if self._held is not None and min(self.work.workers, len(self.cores)) > 1:
            warn(f"{self._held.name} is held in memory as a whole: one process measures it.")
        with workers.pools(self.processes, session.use_one_thread) as apply:
            yield apply

    def _mesh(self, kept: Run, apply: workers.Apply, report: Report) -> Mesh:
        """Sky and noise of the source, or those that an unfinished run kept."""
        found = kept.arrays("mesh") if self.mesh is None else self.mesh.arrays()
        if found is None:
            report("measuring the sky", 0, 0)
            mesh = estimate_sky(self.source, DETECTOR.threshold, workers.in_order(apply))
            self._check_map(mesh.map_factor)
            _log.info("sky %.4g, noise %.4g (medians)", np.median(mesh.level), np.median(mesh.rms))
            kept.keep_arrays("mesh", mesh.arrays())
        else:
            mesh = Mesh.of(found)
        noise = self.exposure.noise
        if noise is not None and self.exposure.noise_as_given:
            if not 1 / MAP_LIMIT < mesh.map_factor < MAP_LIMIT:
                warn(
                    f"Blank pixels scatter {mesh.map_factor:.3g} times as much as {noise.name} states, which is taken "
                    f"as it is. Is it the {self.exposure.noise_kind} in units of the image?"
                )
            mesh = replace(mesh, map_factor=1.0)
        elif noise is not None and not 1 / MAP_LIMIT < mesh.map_factor < MAP_LIMIT:
            warn(
                f"{noise.name} was multiplied by {mesh.map_factor:.3g} as a map of the noise, to match "
                f"the scatter of blank pixels: only its relative values are used. Is it the {self.exposure.noise_kind} "
                "in units of the image? Weight maps of drizzled images are often exposure times instead of inverse "
                "variances. Pixels with correlated noise scatter less than their noise map states; NOISECOR, the "
                f"noise of a large aperture over the uncorrelated one, is {correlation(mesh.autocorrelation):.2f}."
            )
        counted = noise is not None and self.fitting is not None and self.fitting.gain is not None
        if counted and self.exposure.noise_includes is None and holds_photon_noise(self.exposure, mesh):
            assert noise is not None
            warn(
                f"{noise.name} rises with the light of sources, so it seems to include their photon noise, which the "
                "fits count twice. Give `noise_includes='total'`, or `noise_includes='sky'` if it does not."
            )
        return mesh

    def _check_map(self, factor: float) -> None:
        """Refuse a noise map whose scale is so far off that it is none."""
        noise = self.exposure.noise
        if noise is not None and not 1 / MOST_MAP_FACTOR <= factor <= MOST_MAP_FACTOR:
            raise InputError(
                f"{noise.name} would be multiplied by {factor:.3g} as a map of the noise, to match the scatter of "
                f"blank pixels: it is not the {self.exposure.noise_kind} of this image in any usual unit. Give another "
                "map of `noise`, or another extension of its file."
            )

    def _measured(self, setting: Setting, kept: Run, apply: workers.Apply, report: Report) -> tuple[Values, np.ndarray]:
        """The values of all tiles, in an order that does not depend on the tiles, and the profiles of sources."""
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

        def show_progress() -> None:
            if not alone:
                n = sum(len(arrays["x"]) for arrays in found)
                rate = (n - before) / max(time.monotonic() - started, 1e-9)
                report(f"measuring tiles: {n:,} sources, {rate:.0f}/s", len(found), len(self.cores))

        show_progress()
        inner = report if alone else silent
        for number, arrays in apply(functools.partial(tiles.measure_tile, setting, report=inner), missing):
            kept.keep_arrays(_tile_name(missing[number]), arrays)
            found.append(arrays)
            _log.info("%s: %d sources", _tile_name(missing[number]), len(arrays["x"]))
            show_progress()
        joined = {name: np.concatenate([arrays[name] for arrays in found]) for name in found[0]}
        profiles = joined.pop("profiles")
        if self.places is None:
            order = np.lexsort((joined["x0"], joined["y0"]))
            if not len(order):
                warn(
                    f"No source was detected in {self.exposure.name}: the catalogue has no rows. "
                    "Is the image background-limited, with positive sources?"
                )
        else:
            order = np.argsort(joined["place"])
        return Values(**{name: values[order] for name, values in joined.items()}), profiles


def _tile_name(core: Window) -> str:
    return f"tile-{core[0].start}-{core[1].start}"


def _check_psf_width(psf_fwhm: float | None, needed: bool) -> None:
    """Refuse a width of the PSF that is impossible, or that nothing needs."""
    if psf_fwhm is None:
        return
    if not needed:
        raise InputError(
            "`psf_fwhm` is for a network that is shown the PSF, where no PSF is known: leave it out, or give `psf`."
        )
    moffat(psf_fwhm, "the user", 0.0)  # refuses an impossible width


def _warn_without_wcs(exposure: Exposure) -> None:
    if exposure.wcs is None:
        reason = exposure.image.wcs_problem
        warn(
            f"{exposure.name} has no celestial WCS{f' that can be used ({reason})' * bool(reason)}: the catalogue "
            "has pixel columns only."
        )


def _on(network: Weights, work: Work) -> Weights:
    """The network on the device of a run; that of other machines is not tried here."""
    if work.scheduler is None:
        network = network.on(work.device)
        _log.info("%s runs on %s", network.name, network.provider)
        return network
    if work.device == session.GPU:
        return replace(network, device=session.GPU)
    return network.on(session.CPU if work.device == "auto" else work.device)


def _at_scale_of(network: Weights, exposure: Exposure, resample: bool, *, refine: bool) -> Exposure | Resampled:
    """The image, resampled to the pixel scale of a network if requested; otherwise its pixel scale is checked."""
    scale = exposure.pixel_scale.value
    if not resample:
        if isinstance(network.domain, Domain):
            network.domain.check_scale(exposure.pixel_scale, refine=refine)
        return exposure
    if not isinstance(network.domain, Domain):
        raise InputError(f"`resample` is for weights of one pixel scale; {network.name} has none: leave it out.")
    if not np.isfinite(scale):
        raise InputError(f"{exposure.name} has no pixel scale to resample from: give `pixel_scale`.")
    grid = Resampled(exposure, scale / network.domain.pixel_scale)
    if grid.factor > MOST_FINER:
        warn(
            f"Pixels of {scale:.4f} arcsec become {grid.factor:.2f} times finer: their noise is correlated beyond "
            "the lags that are measured, so that S/N is overestimated and errors are underestimated."
        )
    return grid
