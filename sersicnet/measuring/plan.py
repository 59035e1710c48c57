"""What is to be measured: an image with its maps, what its header tells, the places, and how the work is done."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from astropy.table import Table

import sersicnet
from sersicnet import domain, weights
from sersicnet import workers as work
from sersicnet.catalogue.parameters import Galaxies
from sersicnet.errors import InputError, SersicnetWarning
from sersicnet.image import detect, mosaic
from sersicnet.image import header as instrument
from sersicnet.image.sky import Mesh, correlation, estimate_sky
from sersicnet.measuring import tiles
from sersicnet.schema import TARGET_NAMES

_log = logging.getLogger(__name__)

MOST_FINER = 1.2
"""Factor of resampling from which on the user is told what finer pixels do to the noise."""


MAP_LIMIT = 3.0
"""Factor on a noise map from which on, up or down, the user is told."""


class Plan(NamedTuple):
    """What is to be measured: an image with its maps, what its header tells, and the places if they are given."""

    exposure: mosaic.Exposure
    zero: instrument.Reading
    scale: instrument.Reading
    galaxies: Galaxies | None  # what the user gave
    places: np.ndarray | None  # x and y of its rows in pixels of the source, (N, 2)
    detector: detect.Detector
    source: mosaic.Exposure | mosaic.Resampled  # the exposure, or what it was brought to

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
        report: tiles.Report,
    ) -> Plan:
        """Read what the options of `sersicnet.measuring.measure.measure` name."""
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
        galaxies, places = None, None
        if positions is not None:
            galaxies = Galaxies(positions, "`positions`") if isinstance(positions, Table) else Galaxies.read(positions)
            places = _positions(galaxies, frame)
        _log.info("%s: %d x %d pixels", frame.name, *frame.shape[::-1])
        _log.info("zero point %.4f from %s; pixel scale %.4f from %s", *zero, *scale)
        if frame.wcs is None:
            _warn(f"{frame.name} has no celestial WCS: the catalogue has pixel columns only.")
        exposure = mosaic.Exposure(frame, noise, kind, hidden)
        return cls(exposure, zero, scale, galaxies, places, detect.Detector(), exposure)

    def at_scale_of(self, network: weights.Weights, resample: bool) -> Plan:
        """The same, brought to the pixel scale of a network if that is asked for; else it must have that."""
        if not resample:
            network.domain.check_scale(self.scale)
            return self
        if not np.isfinite(self.scale.value):
            raise InputError(f"{self.frame.name} has no pixel scale to resample from: give --pixel-scale.")
        grid = mosaic.Resampled(self.exposure, self.scale.value / network.domain.pixel_scale)
        if grid.factor > MOST_FINER:
            _warn(
                f"Pixels of {self.scale.value:.4f} arcsec become {grid.factor:.2f} times finer: their noise is "
                "correlated over more pixels than is measured, so that S/N and errors are too good."
            )
        places = None if self.places is None else grid.to_grid(self.places)
        return self._replace(source=grid, places=places)

    def starts(self) -> dict[str, np.ndarray]:
        """Parameters of galaxies that the user gave with the places, as far as there are any."""
        return {} if self.galaxies is None else _starts(self.galaxies, self.scale)

    @property
    def factor(self) -> float:
        """Pixels of the source along one of the image."""
        return self.source.factor if isinstance(self.source, mosaic.Resampled) else 1.0

    def to_image(self, pixels: np.ndarray) -> np.ndarray:
        """Positions in pixels of the image, of those in the source."""
        return self.source.from_grid(pixels) if isinstance(self.source, mosaic.Resampled) else pixels

    def widened(self, size: float) -> float:
        """Standard deviation of a point in pixels of the source, of that in the image."""
        if not isinstance(self.source, mosaic.Resampled):
            return size
        return self.factor * float(np.sqrt(size**2 + (1 + 1 / self.factor**2) / 12))

    def on_grid(self, width: domain.Width) -> domain.Width:
        """The width of a PSF in pixels of the source."""
        sigma = 2 * np.sqrt(2 * np.log(2))
        return width._replace(value=sigma * self.widened(width.value / sigma), error=width.error * self.factor)

    @property
    def frame(self) -> mosaic.Image:
        """The image."""
        return self.exposure.image

    @property
    def saturation(self) -> float:
        """Value from which on a pixel is saturated; infinite if the header does not tell."""
        try:
            return float(self.frame.header.get("SATURATE", np.inf)) / self.factor**2
        except (TypeError, ValueError):
            return np.inf

    def threads(self, tile: int) -> int:
        """Of the fits of a tile: all cores where there is one tile, and where many are worked on at once one."""
        return (os.cpu_count() or 1) if len(tiles.cores(self.source.shape, tile)) == 1 else 1

    @contextmanager
    def kept(
        self, output: Path | None, run: Path | None, config: dict[str, Any], tile: int, overwrite: bool
    ) -> Iterator[work.Kept]:
        """What holds finished tiles: in `run`, or where there are several, beside the catalogue until all is done."""
        path = run
        if run is None and output is not None and len(tiles.cores(self.source.shape, tile)) > 1:
            path = output.with_name(output.name + ".run")
        stamp = {
            image.name: [image.path.stat().st_size, image.path.stat().st_mtime_ns] for image in self.exposure.images
        }
        places = None if self.places is None else hashlib.sha256(self.places.tobytes()).hexdigest()
        full = {
            **config, "factor": self.factor, "images": stamp, "kind": self.exposure.kind, "zero_point": self.zero.value,
            "pixel_scale": self.scale.value, "positions": places, "tile": tile, "version": sersicnet.__version__,
        }  # fmt: skip
        kept = work.Kept(path, full, overwrite)
        try:
            yield kept
        except KeyboardInterrupt:
            if path is not None:
                _warn(f"Interrupted: what is finished is kept in {path}, and the same command continues.")
            raise
        finally:
            self.exposure.close()
        if run is None:
            kept.remove()

    def processes(self, n: int | None, tile: int) -> int:
        """How many do the work, if `n` are wanted; one where an image is held in memory."""
        if any(image.is_held for image in self.exposure.images):
            return 1
        return min(n or os.cpu_count() or 1, len(tiles.cores(self.source.shape, tile)))

    @contextmanager
    def workers(self, n: int | None, scheduler: str | None, tile: int) -> Iterator[work.Apply]:
        """What works on the tiles; this process alone where there is a single one."""
        if scheduler is not None:
            with work.cluster(scheduler) as apply:
                yield apply
            return
        most = min(n or os.cpu_count() or 1, len(tiles.cores(self.source.shape, tile)))
        if self.processes(n, tile) < most:
            held = next(image for image in self.exposure.images if image.is_held)
            _warn(f"{held.name} is compressed as a whole: it is held in memory, and one process does the work.")
        with work.workers(self.processes(n, tile), weights.use_one_thread) as apply:
            yield apply

    def mesh(self, kept: work.Kept, apply: work.Apply, report: tiles.Report) -> Mesh:
        """Sky and noise of the image, or what was kept of them."""
        found = kept.get("mesh")
        if found is None:
            report("measuring the sky", 0, 0)
            mesh = estimate_sky(self.source, self.detector, work.in_order(apply))
            _log.info("sky %.4g, noise %.4g (medians)", np.median(mesh.level), np.median(mesh.rms))
            kept.put("mesh", mesh.arrays())
        else:
            mesh = Mesh.of(found)
        if self.exposure.noise is not None and not 1 / MAP_LIMIT < mesh.map_factor < MAP_LIMIT:
            _warn(
                f"{self.exposure.noise.name} was multiplied by {mesh.map_factor:.3g} as a map of the noise, to match "
                "the scatter of blank pixels: only its relative values are used. Is it what "
                f"--{self.exposure.kind} takes, in units of the image? Weights of drizzled images often are exposure "
                "times, not inverse variances. Correlated noise makes pixels scatter less than a map says; NOISECOR, "
                f"by which the noise of an aperture exceeds theirs, is {correlation(mesh.autocorrelation):.2f}."
            )
        return mesh


def _positions(galaxies: Galaxies, frame: mosaic.Image) -> np.ndarray:
    """Places of galaxies in an image, (N, 2): those on the sky, unless the image has no WCS."""
    sky, pixels = galaxies.sky(), galaxies.pixels()
    if sky is not None and (frame.wcs is not None or pixels is None):
        return np.column_stack(frame.pixels(*sky.T))
    if pixels is not None:
        return pixels
    raise InputError(f"A table of positions has columns x and y, or ra and dec; received {galaxies.columns}.")


def _starts(galaxies: Galaxies, scale: instrument.Reading) -> dict[str, np.ndarray]:
    """Parameters of galaxies that a table has, under the names of the targets, and theta.

    A radius of a unit that the table does not state is not used.
    """
    found = {name: galaxies.parameter(name) for name in (*TARGET_NAMES, "theta") if name != "r_eff_pix"}
    if galaxies.radii().keys() & {"pix", "arcsec"}:
        found["r_eff_pix"] = galaxies.radius_in_pixels(scale.value, "give `pixel_scale`, or r_eff_pix.")
    return {name: values for name, values in found.items() if values is not None}


def _warn(message: str) -> None:
    warnings.warn(message, SersicnetWarning, stacklevel=3)
