"""Moments of sources and their light in apertures, as `photutils.segmentation.SourceCatalog` measures them.

It takes a millisecond a source for that, mostly in Python; these take less than half of that.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from photutils.geometry import circular_overlap_grid, elliptical_overlap_grid

APERTURE = 5.0
"""Radius of the fixed circular aperture, pixels."""


KRON, KRON_MEASURED, KRON_REACH = 2.5, 6.0, 10.0
"""In units of the semi-major axis: the ellipse per Kron radius, the one in which that is measured, and the largest."""


SUBPIXELS = 5
"""Into so many parts a side a pixel on the border of an ellipse is divided, as SExtractor does it. Exact areas take
four times as long and change a flux by some hundredths of its error."""


LEAST_KRON = 1.4
"""Kron radius of what has none, or a smaller one."""


def reach(a: np.ndarray, kron_radius: np.ndarray) -> np.ndarray:
    """Pixels that the apertures of sources reach; without a Kron radius, as far as it was sought."""
    return np.fmax(KRON_MEASURED, KRON * kron_radius) * a + 2


class Moments(NamedTuple):
    """Centroids and second moments of sources, float64, (N,); NaN for those without light.

    Attributes
    ----------
    x, y : ndarray
        Pixels of the image.
    a, b : ndarray
        1 sigma axes, pixels.
    theta : ndarray
        Angle of the major axis, degrees from +x towards +y, from -90 to below 90.
    """

    x: np.ndarray
    y: np.ndarray
    a: np.ndarray
    b: np.ndarray
    theta: np.ndarray


def moments(light: np.ndarray, row: np.ndarray, column: np.ndarray, label: np.ndarray, n: int) -> Moments:
    """Measure sources from their pixels.

    Each source's sums are about its own first row and column and in the order of its
    pixels, so that they do not depend on the window.

    Parameters
    ----------
    light : ndarray, float32, (P,)
        Of the pixels; what is negative counts as none.
    row, column : ndarray, int, (P,)
    label : ndarray, int, (P,)
        Source of each pixel, from 1.
    n : int
        Number of sources.

    Returns
    -------
    Moments
    """
    origin = []
    for values in (column, row):
        first = np.full(n + 1, np.iinfo(np.int64).max)
        np.minimum.at(first, label, values)
        origin.append(first)
    x, y = ((values - first[label]).astype(float) for values, first in zip((column, row), origin, strict=True))
    weight = np.maximum(light, 0).astype(float)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(label, weight * values, n + 1) / total

    with np.errstate(invalid="ignore", divide="ignore"):
        total = np.bincount(label, weight, n + 1)
        x0, y0 = mean(x), mean(y)
        dx, dy = x - x0[label], y - y0[label]
        xx, xy, yy = (mean(product)[1:] for product in (dx * dx, dx * dy, dy * dy))
        # SExtractor's way with lines and points: they are as thick as a pixel.
        determinant = xx * yy - xy**2
        xx[determinant < 0] = np.nan
        while (thin := xx * yy - xy**2 < 1 / 144).any():
            xx[thin] += 1 / 12
            yy[thin] += 1 / 12
        middle, half = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
        theta = np.degrees(np.arctan2(2 * xy, xx - yy)) / 2
        axes = np.sqrt(middle + half), np.sqrt(middle - half)
    place = x0[1:] + origin[0][1:], y0[1:] + origin[1][1:]
    return Moments(*place, *axes, (theta + 90) % 180 - 90)


class Photometry(NamedTuple):
    """Light of sources in apertures, float64, (N,); NaN where it cannot be measured.

    Attributes
    ----------
    kron_radius : ndarray
        Kron's first moment in units of the 1 sigma axes: the ellipse is 2.5 times as large
        (Kron 1980; as SExtractor's AUTO). NaN, with its flux, where that would be more than
        10 times the axes: noise, then.
    kron_flux, kron_error : ndarray
        In that ellipse, image units.
    aperture_flux, aperture_error : ndarray
        In a circle of `APERTURE`, image units.
    """

    kron_radius: np.ndarray
    kron_flux: np.ndarray
    kron_error: np.ndarray
    aperture_flux: np.ndarray
    aperture_error: np.ndarray


class Scene(NamedTuple):
    """What light is measured in.

    Attributes
    ----------
    clean : ndarray, float32, (H, W)
        Sky subtracted.
    bad : ndarray, bool, (H, W)
        Pixels without data.
    rms : ndarray, float32, (H, W)
        Noise of a blank pixel.
    segmentation : ndarray, int32, (H, W)
        Source of each pixel, from 1; 0 is sky.
    """

    clean: np.ndarray
    bad: np.ndarray
    rms: np.ndarray
    segmentation: np.ndarray


def photometry(scene: Scene, found: Moments, which: np.ndarray) -> Photometry:
    """Measure sources in apertures; pixels of neighbours count as those opposite to them.

    Parameters
    ----------
    scene : Scene
    found : Moments
        Of its sources, in pixels of the scene.
    which : ndarray, int, (N,)
        Indices of the sources to measure.

    Returns
    -------
    Photometry
        Errors are those of independent pixels.
    """
    out = np.full((len(Photometry._fields), len(which)), np.nan)
    for i, k in enumerate(which.tolist()):
        x, y, a, b, theta = (float(values[k]) for values in found)
        if not (math.isfinite(x) and math.isfinite(y)):
            continue
        extent = KRON_MEASURED * a if math.isfinite(a) else 0.0
        near = _Cutout.of(scene, k + 1, x, y, max(extent, APERTURE))
        circle = circular_overlap_grid(*near.edges, *near.data.shape[::-1], APERTURE, 1, 1)
        out[3:, i] = near.sums(circle)
        if not (b > 0 and math.isfinite(a)):
            continue
        radius = near.kron_radius(a, b, math.radians(theta))
        if not KRON * radius <= KRON_REACH:
            continue
        if KRON * radius * a > max(extent, APERTURE):
            near = _Cutout.of(scene, k + 1, x, y, KRON * radius * a)
        axes = KRON * radius * a, KRON * radius * b
        shape = near.data.shape[::-1]
        ellipse = elliptical_overlap_grid(*near.edges, *shape, *axes, math.radians(theta), 0, SUBPIXELS)
        out[:3, i] = radius, *near.sums(ellipse)
    return Photometry(*out)


class _Cutout(NamedTuple):
    """A part of a scene around a source, with its neighbours replaced.

    `along` and `across` are the distances of its rows and columns from the source, `used` the pixels
    that have data.
    """

    data: np.ndarray
    variance: np.ndarray
    used: np.ndarray
    along: np.ndarray
    across: np.ndarray

    @classmethod
    def of(cls, scene: Scene, label: int, x: float, y: float, extent: float) -> _Cutout:
        height, width = scene.clean.shape
        middle, reach = (math.floor(y + 0.5), math.floor(x + 0.5)), math.ceil(extent) + 1
        rows = slice(max(middle[0] - reach, 0), min(middle[0] + reach + 1, height))
        columns = slice(max(middle[1] - reach, 0), min(middle[1] + reach + 1, width))
        data, rms = (values[rows, columns].astype(float) for values in (scene.clean, scene.rms))
        used, labels = ~scene.bad[rows, columns], scene.segmentation[rows, columns]
        other = (labels != label) & (labels != 0)
        if other.any():
            theirs = np.nonzero(other)
            opposite = [2 * (m - s.start) - i for m, s, i in zip(middle, (rows, columns), theirs, strict=True)]
            seen = np.ones(len(theirs[0]), bool)
            for i, n in zip(opposite, data.shape, strict=True):
                seen &= (i >= 0) & (i < n)
            there = tuple(np.where(seen, i, 0) for i in opposite)
            seen &= used[there] & ~other[there]
            for values in (data, rms):
                values[theirs] = np.where(seen, values[there], 0.0)
        along, across = np.arange(rows.start, rows.stop) - y, np.arange(columns.start, columns.stop) - x
        return cls(data, rms**2, used, along, across)

    @property
    def edges(self) -> tuple[float, float, float, float]:
        """Left, right, lower and upper side, from the source."""
        return self.across[0] - 0.5, self.across[-1] + 0.5, self.along[0] - 0.5, self.along[-1] + 0.5

    def sums(self, weight: np.ndarray) -> tuple[float, float]:
        """Weighted flux and its error."""
        inside = (weight > 0) & self.used
        share = weight[inside]
        if not len(share):
            return math.nan, math.nan
        return float(share @ self.data[inside]), math.sqrt(float(share @ self.variance[inside]))

    def kron_radius(self, a: float, b: float, theta: float) -> float:
        """Kron's radius in units of the axes; NaN beyond what it is measured in."""
        cos, sin = math.cos(theta), math.sin(theta)
        along, across = self.along[:, None], self.across[None, :]
        radius = np.hypot((cos * across + sin * along) / a, (cos * along - sin * across) / b)
        inside = (radius <= KRON_MEASURED) & self.used
        light = self.data[inside]
        first, total = float(light @ radius[inside]), float(light.sum())
        if first <= 0 or total <= 0:
            return LEAST_KRON
        return max(first / total, LEAST_KRON) if first / total <= KRON_MEASURED else math.nan
