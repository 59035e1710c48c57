"""Moments and aperture photometry of sources, with the definitions of `photutils.segmentation.SourceCatalog`.

That class takes a millisecond per source, mostly in Python; these functions take less than half of it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from photutils.geometry import circular_overlap_grid, elliptical_overlap_grid

APERTURE = 5.0
"""Radius of the fixed circular aperture, pixels."""


KRON, KRON_MEASURED, KRON_REACH = 2.5, 6.0, 10.0
"""Scale of the Kron ellipse in Kron radii; and, in units of the 1 sigma axes, the ellipse in which the Kron radius is
measured, and the largest Kron ellipse."""


SUBPIXELS = 5
"""A pixel on the border of an ellipse is divided into 5 x 5 subpixels, as in SExtractor. Exact areas take four times as
long and change a flux by some hundredths of its error."""


LEAST_KRON = 1.4
"""Minimum Kron radius; also the Kron radius of a source without a positive flux."""


def reach(a: np.ndarray, kron_radius: np.ndarray) -> np.ndarray:
    """Extent of the apertures of sources, pixels; without a Kron radius, of the ellipse in which it is measured."""
    return np.fmax(KRON_MEASURED, KRON * kron_radius) * a + 2


class Moments(NamedTuple):
    """Centroids and second moments of sources, float64, (N,); NaN for sources without positive flux.

    Attributes
    ----------
    x, y : ndarray
        Centroids, pixels of the image.
    a, b : ndarray
        Semi-major and semi-minor axes (1 sigma), pixels.
    theta : ndarray
        Angle of the major axis, degrees from +x towards +y, from -90 to below 90.
    """

    x: np.ndarray
    y: np.ndarray
    a: np.ndarray
    b: np.ndarray
    theta: np.ndarray


def moments(light: np.ndarray, row: np.ndarray, column: np.ndarray, label: np.ndarray, n: int) -> Moments:
    """Measure centroids and second moments of sources from their pixels.

    The sums of a source are relative to its own first row and column and in the order of its
    pixels, so that they do not depend on the window.

    Parameters
    ----------
    light : ndarray, float32, (P,)
        Values of the pixels; negative ones count as 0.
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
        # As in SExtractor, sources thinner than a pixel get the second moments of a pixel.
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
    """Aperture photometry of sources, float64, (N,); NaN where it cannot be measured.

    Attributes
    ----------
    kron_radius : ndarray
        First moment of the light in units of the 1 sigma axes (Kron 1980). The aperture is an ellipse of
        2.5 Kron radii, as SExtractor's AUTO. Kron radius and flux are NaN where the ellipse would
        exceed 10 times the axes: the moment is then dominated by noise.
    kron_flux, kron_error : ndarray
        Flux in the Kron ellipse and its error, image units.
    aperture_flux, aperture_error : ndarray
        Flux in a circle of radius `APERTURE` and its error, image units.
    """

    kron_radius: np.ndarray
    kron_flux: np.ndarray
    kron_error: np.ndarray
    aperture_flux: np.ndarray
    aperture_error: np.ndarray


class Scene(NamedTuple):
    """The arrays that photometry is measured on.

    Attributes
    ----------
    clean : ndarray, float32, (H, W)
        Image with the sky subtracted.
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
    """Measure the aperture photometry of sources.

    The pixels of neighbours are replaced by their point reflections about the source.

    Parameters
    ----------
    scene : Scene
    found : Moments
        Moments of the sources of the scene, in pixels of the scene.
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
        if not near.data.size:  # a source beyond this image, in a blend that reaches into it
            continue
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
    """A cutout of a scene around a source, with the pixels of neighbours replaced.

    `along` and `across` are the offsets of its rows and columns from the source; `used` are the pixels
    with data.
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
        rows, columns = (
            slice(*(min(max(end, 0), n) for end in (at - reach, at + reach + 1)))
            for at, n in zip(middle, (height, width), strict=True)
        )
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
        """Offsets of the left, right, lower and upper side from the source."""
        return self.across[0] - 0.5, self.across[-1] + 0.5, self.along[0] - 0.5, self.along[-1] + 0.5

    def sums(self, weight: np.ndarray) -> tuple[float, float]:
        """Weighted flux and its error."""
        inside = (weight > 0) & self.used
        share = weight[inside]
        if not len(share):
            return math.nan, math.nan
        return float(share @ self.data[inside]), math.sqrt(float(share @ self.variance[inside]))

    def kron_radius(self, a: float, b: float, theta: float) -> float:
        """Kron radius in units of the axes; NaN if it exceeds the ellipse in which it is measured."""
        cos, sin = math.cos(theta), math.sin(theta)
        along, across = self.along[:, None], self.across[None, :]
        radius = np.hypot((cos * across + sin * along) / a, (cos * along - sin * across) / b)
        inside = (radius <= KRON_MEASURED) & self.used
        light = self.data[inside]
        first, total = float(light @ radius[inside]), float(light.sum())
        if first <= 0 or total <= 0:
            return LEAST_KRON
        return max(first / total, LEAST_KRON) if first / total <= KRON_MEASURED else math.nan
