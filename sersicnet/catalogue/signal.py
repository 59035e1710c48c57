"""The image of a catalogue in units of its noise: averaged as a whole, and cut out around a galaxy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sersicnet.image.exposure import Exposure
from sersicnet.image.pixels import Window
from sersicnet.image.sky import Mesh

STRIP = 4_000_000
"""Pixels of the image that are read at once, roughly."""

LEAST_HALF, MOST_HALF, USUAL_HALF = 24, 100, 32
"""Half of the side of a cutout, pixels: least, most, and that of a galaxy without a radius."""


class View(NamedTuple):
    """A window of the image, averaged.

    Attributes
    ----------
    window : Window
    signal : ndarray, float32, (h, w)
        Means of blocks, in units of their noise; NaN without data.
    block : int
        Side of a block, pixels of the image.
    usable : int
        Pixels of the window that have data.
    """

    window: Window
    signal: np.ndarray
    block: int
    usable: int


def averaged(exposure: Exposure, mesh: Mesh, window: Window, block: int) -> View:
    """A window of the image in blocks, read strip by strip."""
    rows, columns = window
    step = block * max(1, STRIP // (block * (columns.stop - columns.start)))
    sums, counts = [], []
    for top in range(rows.start, rows.stop, step):
        signal, bad = signal_of(exposure, mesh, (slice(top, min(top + step, rows.stop)), columns))
        sums.append(_blocks(signal, block))
        counts.append(_blocks((~bad).astype(np.float32), block))
    total, count = np.concatenate(sums), np.concatenate(counts)
    mean = np.divide(total, count, out=np.full(total.shape, np.nan, np.float32), where=count > 0)
    if block > 1:
        # Measured, for the noise of pixels is correlated, and faint sources add to it.
        values = mean[np.isfinite(mean)]
        noise = 1.4826 * float(np.median(np.abs(values - np.median(values)))) if len(values) else 0.0
        mean /= noise or 1.0
    return View(window, mean, block, int(count.sum(dtype=float)))


def signal_of(exposure: Exposure, mesh: Mesh, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """A window without its sky in units of its noise, 0 where it has no data; and where it has none, bool."""
    pixels = exposure.read(window)
    sky = mesh.at(window, pixels)
    with np.errstate(invalid="ignore"):
        signal = (pixels.data - sky.level) / sky.rms
    bad = ~np.isfinite(signal)
    signal[bad] = 0
    return signal, bad


def _blocks(values: np.ndarray, block: int) -> np.ndarray:
    """Sums over blocks; those at the upper and right end may be smaller."""
    for axis in (0, 1):
        values = np.add.reduceat(values, np.arange(0, values.shape[axis], block), axis)
    return values


class Cutout(NamedTuple):
    """A square around a galaxy, which may reach beyond the image.

    Attributes
    ----------
    side : int
        Pixels; odd.
    corner : (int, int)
        Column and row of its first pixel in the image.
    window : Window
        Its part of the image.
    """

    side: int
    corner: tuple[int, int]
    window: Window

    @classmethod
    def of(cls, x: float, y: float, r_eff: float, shape: tuple[int, int], half: int | None = None) -> Cutout | None:
        """The square of a galaxy; None if its centre is off the image.

        Parameters
        ----------
        x, y, r_eff : float
            Pixels; the radius may be NaN.
        shape : (int, int)
            Height and width of the image.
        half : int, optional
            Half of its side, pixels; see `half_side` for the default.
        """
        height, width = shape
        if not (-0.5 < x < width - 0.5 and -0.5 < y < height - 0.5):
            return None
        half = half_side(r_eff) if half is None else half
        side, corner = 2 * half + 1, (round(x) - half, round(y) - half)
        window = (
            slice(max(corner[1], 0), min(corner[1] + side, height)),
            slice(max(corner[0], 0), min(corner[0] + side, width)),
        )
        return cls(side, corner, window)

    def placed(self, values: np.ndarray) -> np.ndarray:
        """Values of its part of the image in the whole square, NaN outside of the image, float32, (side, side)."""
        out = np.full((self.side, self.side), np.nan, np.float32)
        rows, columns = (
            slice(part.start - first, part.stop - first)
            for part, first in zip(self.window, self.corner[::-1], strict=True)
        )
        out[rows, columns] = values
        return out


def half_side(r_eff: float) -> int:
    """Half of the side of the cutout of a galaxy, pixels: four effective radii, which may be NaN, within limits."""
    return int(np.clip(np.ceil(4 * r_eff), LEAST_HALF, MOST_HALF)) if np.isfinite(r_eff) else USUAL_HALF
