"""Stamps cut from an image, cleaned for a network."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sersicnet.image.pixels import Sky, Window, median
from sersicnet.schema import STAMP_SIZE


@dataclass
class Stamps:
    """Stamps of an image, cleaned for a network.

    Attributes
    ----------
    pixels : ndarray, float32, (N, 128, 128)
        Sky-subtracted stamps in units of `rms`; pixels of neighbours and bad pixels are replaced.
    replaced : ndarray, bool, (N, 128, 128)
        Pixels that were replaced.
    x, y : ndarray, float64, (N,)
        Positions of the sources in their stamps, zero-based.
    rms : ndarray, float64, (N,)
        Noise of a blank pixel around each source, image units.
    noise : ndarray, float32, (N, 128, 128)
        Noise of a blank pixel, image units; NaN in pixels without data.
    inside : ndarray, int, (N, 4)
        Part of the stamp within the image: first and last row, exclusive, and first and last column.
    unusable : ndarray, float64, (N,)
        Fraction of the stamp that is within the image and without data: masked, not finite or unexposed.
    neighbours : ndarray, float64, (N,)
        Fraction of pixels that belong to other sources.
    empty : ndarray, bool, (N,)
        Whether none of the central 5 x 5 pixels has data.
    sky : ndarray, float64, (N,)
        Sky that was subtracted at each source, image units.
    """

    pixels: np.ndarray
    replaced: np.ndarray
    x: np.ndarray
    y: np.ndarray
    rms: np.ndarray
    noise: np.ndarray
    inside: np.ndarray
    unusable: np.ndarray
    neighbours: np.ndarray
    empty: np.ndarray
    sky: np.ndarray

    def masked_light(self, a: np.ndarray, b: np.ndarray, theta: np.ndarray) -> np.ndarray:
        """Fraction of the light of each source that is in pixels of the image without data, float64, (N,).

        The light is that of an exponential disc. If the pixel at the position has no data, the fraction is 1:
        the peak is then not known. Pixels outside the image are not counted.

        Parameters
        ----------
        a, b : ndarray, float, (N,)
            Semi-major and semi-minor axes (1 sigma) of the sources, pixels.
        theta : ndarray, float, (N,)
            Angle of the major axis, degrees from +x towards +y.
        """
        out = np.zeros(len(self.x))
        for i in np.flatnonzero(self.unusable > 0):
            top, bottom, left, right = self.inside[i]
            row, column = np.nonzero(np.isnan(self.noise[i, top:bottom, left:right]))
            along, across = row + top - self.y[i], column + left - self.x[i]
            if (np.maximum(np.abs(along), np.abs(across)) <= 0.5).any():
                out[i] = 1.0
                continue
            cos, sin = math.cos(math.radians(theta[i])), math.sin(math.radians(theta[i]))
            scales = max(a[i] / SIGMA, 1.0), max(b[i] / SIGMA, 1.0)
            radius = np.hypot((cos * across + sin * along) / scales[0], (cos * along - sin * across) / scales[1])
            out[i] = min(float(np.exp(-radius).sum()) / (2 * math.pi * scales[0] * scales[1]), 1.0)
        return out

    def subtract(self, light: np.ndarray) -> None:
        """Subtract light from the stamps, in place; replaced pixels are replaced again.

        Parameters
        ----------
        light : ndarray, float32, (N, 128, 128)
            Image units.
        """
        for values, replaced, x, y, rms, there in zip(
            self.pixels, self.replaced, self.x, self.y, self.rms, light, strict=True
        ):
            values -= there / np.float32(rms)
            _fill(values, replaced, (x, y))

    def aperture(self, which: np.ndarray) -> np.ndarray:
        """Flux in the circle of `sersicnet.image.photometry.APERTURE` and its error, float64, (K, 2), image units.

        It is the sum of the pixels, and so may be negative. The error is that of independent pixels of blank sky.
        NaN for stamps without data in the middle.

        Parameters
        ----------
        which : ndarray, int, (K,)
            Indices of the stamps.
        """
        from photutils.geometry import circular_overlap_grid  # simulations, which need none of it, start sooner

        from sersicnet.image.photometry import APERTURE

        out = np.full((len(which), 2), np.nan)
        side = 2 * math.ceil(APERTURE) + 4
        first = (STAMP_SIZE - side) // 2
        inner = slice(first, first + side)
        for row, i in zip(out, which.tolist(), strict=True):
            if self.empty[i]:
                continue
            left, lower = first - 0.5 - self.x[i], first - 0.5 - self.y[i]
            share = circular_overlap_grid(left, left + side, lower, lower + side, side, side, APERTURE, 1, 1)
            noise = self.noise[i, inner, inner].astype(float)
            variance = np.where(np.isfinite(noise), noise, self.rms[i]) ** 2
            row[:] = np.sum(share * self.pixels[i, inner, inner]) * self.rms[i], np.sqrt(np.sum(share * variance))
        return out

    def offsets(self) -> np.ndarray:
        """Centroids of the light near the positions, minus the positions, float64, (N, 2) pixels.

        The centroid is that of the light times a Gaussian of `CENTROID_SIGMA`, which is moved until its centre is the
        centroid. NaN where it leaves the middle of the stamp.
        """
        half = round(4 * CENTROID_SIGMA)
        middle = slice(STAMP_SIZE // 2 - half, STAMP_SIZE // 2 + half)
        light, axis = self.pixels[:, middle, middle], np.arange(middle.start, middle.stop)
        x, y = self.x.copy(), self.y.copy()
        with np.errstate(invalid="ignore", divide="ignore"):
            for _ in range(_CENTROID_STEPS):
                along, across = axis - y[:, None], axis - x[:, None]
                weights = [np.exp(-0.5 * (away / CENTROID_SIGMA) ** 2) for away in (along, across)]
                total = np.einsum("nij,ni,nj->n", light, *weights)
                x = x + 2 * np.einsum("nij,ni,nj->n", light, weights[0], weights[1] * across) / total
                y = y + 2 * np.einsum("nij,ni,nj->n", light, weights[0] * along, weights[1]) / total
            out = np.column_stack([x - self.x, y - self.y])
            out[~((total > 0) & (np.abs(out) < half / 2).all(axis=1))] = np.nan
        return out


CENTROID_SIGMA = 2.0
"""Width (1 sigma) of the window of `Stamps.offsets`, pixels."""

_CENTROID_STEPS = 12

SIGMA = 3**0.5
"""Root of the second moment of an exponential disc along an axis, in scale lengths."""


def cut(
    data: np.ndarray,
    bad: np.ndarray,
    sky: Sky,
    x: np.ndarray,
    y: np.ndarray,
    dilated: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    origin: tuple[int, int] = (0, 0),
) -> Stamps:
    """Cut stamps around positions.

    The source lies in (63, 64] on both axes of its stamp, as in the simulations.
    Pixels of neighbours, and pixels without data, are replaced by their point
    reflections about the centre of the source, since galaxies are nearly symmetric;
    where the reflected pixel cannot be used either, by the sky.

    Parameters
    ----------
    data : ndarray, float32, (H, W)
        Image, sky included.
    bad : ndarray, bool, (H, W)
    sky : Sky
    x, y : ndarray, float, (N,)
        Zero-based positions, which may be outside the image or NaN.
    dilated : ndarray, int, (H, W), optional
        Dilated segmentation: label of the source at each pixel, 0 for sky; see `Detections.dilated`.
    labels : ndarray, int, (N,) or (N, M), optional
        Label of the source at each position, 0 for none; or labels of all sources that
        are not replaced in its stamp.
    origin : (int, int)
        x and y of the first pixel of the arrays in the image, if the arrays are a window of it.

    Returns
    -------
    Stamps
    """
    n, size = len(x), STAMP_SIZE
    out = Stamps(
        np.zeros((n, size, size), np.float32),
        np.ones((n, size, size), bool),
        np.full(n, np.nan),
        np.full(n, np.nan),
        np.full(n, np.nan),
        np.full((n, size, size), np.nan, np.float32),
        np.zeros((n, 4), int),
        np.zeros(n),
        np.zeros(n),
        np.ones(n, bool),
        np.full(n, np.nan),
    )
    middle = slice(size // 2 - 3, size // 2 + 2)
    for i in range(n):
        if not (np.isfinite(x[i]) and np.isfinite(y[i])):
            continue
        corner = math.ceil(y[i] - origin[1] - size / 2), math.ceil(x[i] - origin[0] - size / 2)
        image_part, stamp_part = _overlap(corner, data.shape)
        if image_part[0].start >= image_part[0].stop or image_part[1].start >= image_part[1].stop:
            continue
        values, noise = out.pixels[i], sky.rms[image_part]
        np.subtract(data[image_part], sky.level[image_part], out=values[stamp_part])
        replaced = bad[image_part].copy()
        lost = np.count_nonzero(replaced)
        if dilated is not None:
            there = dilated[image_part]
            other = there != 0
            for own in np.atleast_1d(labels[i]) if labels is not None else ():
                other &= there != own
            replaced |= other
        out.replaced[i][stamp_part] = replaced
        out.noise[i][stamp_part] = noise
        some = noise[::_NOISE_STEP, ::_NOISE_STEP]
        some = some[np.isfinite(some)]
        if not len(some):
            some = noise[np.isfinite(noise)]
        out.rms[i] = median(some) if len(some) else np.nan
        place = zip((y[i] - origin[1], x[i] - origin[0]), data.shape, strict=True)
        out.sky[i] = sky.level[tuple(min(max(round(at), 0), side - 1) for at, side in place)]
        out.inside[i] = [end for part in stamp_part for end in (part.start, part.stop)]
        out.unusable[i] = lost / size**2
        out.neighbours[i] = (np.count_nonzero(replaced) - lost) / size**2
        usable = np.zeros((size, size), bool)
        usable[stamp_part] = ~bad[image_part]
        out.empty[i] = not usable[middle, middle].any()
        out.x[i] = x[i] - (origin[0] + corner[1])
        out.y[i] = y[i] - (origin[1] + corner[0])
        _fill(values, out.replaced[i], (out.x[i], out.y[i]))
        values /= out.rms[i]
    return out


_NOISE_STEP = 4
"""The noise of a stamp is the median over every fourth row and column."""


def _overlap(corner: tuple[int, int], shape: tuple[int, int]) -> tuple[Window, Window]:
    """The overlap of a stamp and an image, as windows of the image and of the stamp; empty without overlap."""
    image, stamp = [], []
    for first, n in zip(corner, shape, strict=True):
        low, high = min(max(first, 0), n), max(min(first + STAMP_SIZE, n), 0)
        image.append(slice(low, high))
        stamp.append(slice(low - first, high - first))
    return (image[0], image[1]), (stamp[0], stamp[1])


def _fill(values: np.ndarray, replaced: np.ndarray, centre: tuple[float, float]) -> None:
    """Replace pixels by their point reflections about the centre, in place."""
    if not replaced.any():
        return
    rows, cols = np.nonzero(replaced)
    opposite_rows = np.rint(2 * centre[1] - rows).astype(int)
    opposite_cols = np.rint(2 * centre[0] - cols).astype(int)
    inside = (opposite_rows >= 0) & (opposite_rows < len(values))
    inside &= (opposite_cols >= 0) & (opposite_cols < len(values))
    opposite_rows, opposite_cols = np.where(inside, opposite_rows, 0), np.where(inside, opposite_cols, 0)
    usable = inside & ~replaced[opposite_rows, opposite_cols]
    values[rows, cols] = np.where(usable, values[opposite_rows, opposite_cols], 0)
