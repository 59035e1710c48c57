"""How a PSF varies over the image: the weights of its components at a position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial import Delaunay, QhullError

from sersicnet.errors import InputError, warn

if TYPE_CHECKING:
    from sersicnet.image.mosaic import Image

_LEAST_COVERED = 0.5
"""Least part of an image, by area, that the places of a PSF cover."""

_FAR = 0.25
"""Places of a PSF that reach beyond an image by more than this fraction of its side give a warning."""

_APART = 0.5
"""Least distance of two lines of a grid, pixels: two detectors may have lines in neighbouring pixels, at their gap."""

_FARTHEST = 1.2
"""Largest normalised coordinate of a polynomial, whose field is -1 to 1; a larger one gives a warning."""


@dataclass(frozen=True)
class Polynomial:
    """Components that are coefficients of a polynomial of the position, as in PSFEx.

    Attributes
    ----------
    centre : (float, float)
        x and y where the normalised coordinates are 0, zero-based pixels.
    span : (float, float)
        Pixels along x and y in which a normalised coordinate rises by 1: half of the extent of the stars or of the
        image that the polynomial was made of, so that its coordinates are -1 to 1.
    powers : tuple of (int, int)
        Exponents of the normalised x and y of each component.
    shape : (int, int) or None
        Height and width of the image. A position outside has the weights of the nearest pixel.
    """

    centre: tuple[float, float]
    span: tuple[float, float]
    powers: tuple[tuple[int, int], ...]
    shape: tuple[int, int] | None = None

    @property
    def middle(self) -> tuple[float, float]:
        """Middle of the field, x and y: of the image, if it is known, and otherwise where the coordinates are 0.

        PSFEx normalises its coordinates about the middle of its stars.
        """
        if self.shape is None:
            return self.centre
        return (self.shape[1] - 1) / 2, (self.shape[0] - 1) / 2

    def weights(self, x: ArrayLike, y: ArrayLike) -> np.ndarray:
        """Weights of the components, float64, (N, K), at zero-based pixels, (N,)."""
        normalised = []
        for i, values in enumerate((x, y)):
            values = np.atleast_1d(np.asarray(values, float))
            if self.shape is not None:
                values = np.clip(values, 0, self.shape[1 - i] - 1)
            normalised.append((values - self.centre[i]) / self.span[i])
        return np.column_stack([normalised[0] ** i * normalised[1] ** j for i, j in self.powers])

    def on(self, image: Image, name: str) -> Polynomial:
        """The polynomial within an image, with a warning if it is extrapolated far."""
        ends = [
            abs(edge - self.centre[i]) / self.span[i] for i in (0, 1) for edge in (0.0, float(image.shape[1 - i] - 1))
        ]
        if max(ends) > _FARTHEST:
            warn(
                f"The polynomial of the PSF {name} is made for x = {self.centre[0]:.0f} ± {self.span[0]:.0f}, y = "
                f"{self.centre[1]:.0f} ± {self.span[1]:.0f}; {image.name}, {image.shape[1]} x {image.shape[0]} "
                "pixels, reaches far beyond it. Is it the PSF of this image?"
            )
        return replace(self, shape=image.shape)


@dataclass(frozen=True, eq=False)
class Nodes:
    """Components that are PSFs at several places, with linear interpolation between them.

    Between the places of a rectangular grid the interpolation is bilinear, as in photutils' `GriddedPSFModel`;
    otherwise it is linear in the triangles of Delaunay. Outside, the PSF is that of the nearest position on the border.

    Attributes
    ----------
    x, y : ndarray, float64, (K,)
        Zero-based pixels; NaN if only `sky` is known, until `on` converts it.
    sky : ndarray, float64, (K, 2) or None
        Right ascension and declination, degrees (ICRS). `on` prefers them, if the image has a WCS.
    """

    x: np.ndarray
    y: np.ndarray
    sky: np.ndarray | None = None

    def __repr__(self) -> str:
        sky = "" if self.sky is None else self.sky.tolist()
        return f"Nodes({self.x.tolist()}, {self.y.tolist()}, {sky})"

    @property
    def middle(self) -> tuple[float, float]:
        """Position of the node, x and y, that is nearest to the middle of all."""
        if not np.isfinite(self.x).all():
            return float("nan"), float("nan")
        here = self._nearest((np.ptp(self.x) / 2 + self.x.min(), np.ptp(self.y) / 2 + self.y.min()))
        return float(self.x[here]), float(self.y[here])

    def _nearest(self, place: tuple[float, float]) -> int:
        return int(np.argmin(np.hypot(self.x - place[0], self.y - place[1])))

    @property
    def _lines(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Columns, rows and numbers (R, C) of the places of a rectangular grid; None for other places."""
        (columns, column), (rows, row) = _aligned(self.x), _aligned(self.y)
        number = np.full((len(rows), len(columns)), -1)
        number[row, column] = np.arange(len(self.x))
        return (columns, rows, number) if number.size == len(self.x) and (number >= 0).all() else None

    @property
    def spacing(self) -> float:
        """Typical distance of neighbouring places, pixels."""
        sides = [max(float(np.ptp(v)), 1.0) for v in (self.x, self.y)]
        if (lines := self._lines) is not None:
            steps = [side / (len(line) - 1) for side, line in zip(sides, lines[:2], strict=True) if len(line) > 1]
            return max(steps) if steps else np.inf
        return float(np.sqrt(sides[0] * sides[1] / len(self.x)))

    def weights(self, x: ArrayLike, y: ArrayLike) -> np.ndarray:
        """Weights of the components, float64, (N, K), at zero-based pixels, (N,)."""
        x, y = (np.atleast_1d(np.asarray(values, float)) for values in (x, y))
        if not np.isfinite(self.x).all():
            # The PSF in the middle of places on the sky is that of the place nearest to their mean direction.
            if self.sky is not None and np.isnan(x).all():
                return np.eye(len(self.x))[[_middle_of(self.sky)] * len(x)]
            raise InputError("The places of this PSF are right ascension and declination: use `on` of an image first.")
        if (lines := self._lines) is not None:
            return self._bilinear(x, y, *lines)
        out = np.zeros((len(x), len(self.x)))
        places = np.column_stack([self.x, self.y])
        try:
            mesh = Delaunay(places)
        except QhullError:  # fewer than three places, or all on a line
            edges = np.column_stack([np.arange(len(places))] * 2)
            order = np.lexsort((self.y, self.x))
            edges = np.column_stack([order[:-1], order[1:]]) if len(places) > 1 else edges
            return self._on_edges(out, np.arange(len(x)), np.column_stack([x, y]), edges)
        triangle = mesh.find_simplex(np.column_stack([x, y]))
        inside = np.flatnonzero(triangle >= 0)
        change = mesh.transform[triangle[inside]]
        part = np.einsum("nij,nj->ni", change[:, :2], np.column_stack([x, y])[inside] - change[:, 2])
        corners = mesh.simplices[triangle[inside]]
        out[inside[:, None], corners] = np.column_stack([part, 1 - part.sum(axis=1)])
        return self._on_edges(out, np.flatnonzero(triangle < 0), np.column_stack([x, y]), mesh.convex_hull)

    def _bilinear(
        self, x: np.ndarray, y: np.ndarray, columns: np.ndarray, rows: np.ndarray, number: np.ndarray
    ) -> np.ndarray:
        out = np.zeros((len(x), len(self.x)))
        sides = []
        for values, line in ((x, columns), (y, rows)):
            values = np.clip(values, line[0], line[-1])
            low = np.clip(np.searchsorted(line, values, side="right") - 1, 0, max(len(line) - 2, 0))
            high = np.minimum(low + 1, len(line) - 1)
            width = line[high] - line[low]
            share = np.divide(values - line[low], width, out=np.zeros(len(values)), where=width > 0)
            sides.append(((low, 1 - share), (high, share)))
        for i, across in sides[0]:
            for j, along in sides[1]:
                np.add.at(out, (np.arange(len(x)), number[j, i]), across * along)
        return out

    def _on_edges(self, out: np.ndarray, which: np.ndarray, at: np.ndarray, edges: np.ndarray) -> np.ndarray:
        """Fill the weights of some positions with those of the nearest position on lines between two places."""
        places = np.column_stack([self.x, self.y])
        for n in which:
            start, along = places[edges[:, 0]], places[edges[:, 1]] - places[edges[:, 0]]
            length = np.maximum((along**2).sum(axis=1), 1e-30)
            share = np.clip(((at[n] - start) * along).sum(axis=1) / length, 0, 1)
            best = int(np.argmin(((start + share[:, None] * along - at[n]) ** 2).sum(axis=1)))
            out[n, edges[best, 1]] += share[best]
            out[n, edges[best, 0]] += 1 - share[best]
        return out

    def on(self, image: Image, name: str) -> Nodes:
        """The places in pixels of an image, with a check that they cover it; see `sersicnet.image.psf.Psf.on`."""
        out = self
        if self.sky is not None and (image.wcs is not None or not np.isfinite(self.x).all()):
            x, y = image.pixels(*self.sky.T)
            if not np.isfinite(x + y).all():
                raise InputError(
                    f"The places of a PSF lie where the WCS of the image is defined; {np.sum(~np.isfinite(x + y))} of "
                    f"{name} do not in {image.name}. Leave them out."
                )
            out = Nodes(x, y, self.sky)
        height, width = image.shape
        y, x = (v.ravel() for v in np.meshgrid(*(np.linspace(0, n - 1, 9) for n in image.shape), indexing="ij"))
        weights = out.weights(x, y)
        beyond = np.hypot(weights @ out.x - x, weights @ out.y - y)  # linear weights give the position itself inside
        reach = out.spacing / 2
        if np.mean(beyond > reach + 1) > 1 - _LEAST_COVERED:
            raise InputError(
                f"The places of a PSF cover the image; those of {name} are at x = {out.x.min():.0f} to "
                f"{out.x.max():.0f}, y = {out.y.min():.0f} to {out.y.max():.0f}, and {image.name} has {width} x "
                f"{height} pixels. Give the PSF of this image, or a constant one."
            )
        if beyond.max() > reach + 1:
            warn(
                f"The places of the PSF {name} end up to {beyond.max():.0f} pixels inside {image.name}: the PSF of the "
                "nearest place is used there."
            )
        elif out.sky is None and any(
            v.min() < -_FAR * n or v.max() > (1 + _FAR) * n for v, n in ((out.x, width), (out.y, height))
        ):
            warn(
                f"The places of the PSF {name}, x = {out.x.min():.0f} to {out.x.max():.0f}, y = {out.y.min():.0f} to "
                f"{out.y.max():.0f}, reach far beyond {image.name}, {width} x {height} pixels. Is it the PSF of this "
                "image, or of one that it was cut out of?"
            )
        return out


def _aligned(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of the lines of a grid, in ascending order, and the number of each value's line."""
    order = np.argsort(values, kind="stable")
    line = np.zeros(len(values), int)
    line[order[1:]] = np.cumsum(np.diff(values[order]) > _APART)
    return np.bincount(line, values) / np.bincount(line), line


def _middle_of(sky: np.ndarray) -> int:
    """Number of the direction that is nearest to the mean of all."""
    ra, dec = np.radians(sky).T
    vectors = np.column_stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)])
    return int(np.argmax(vectors @ vectors.mean(axis=0)))


def terms_of_psfex(axes: Sequence[int], groups: Sequence[int], degrees: Sequence[int]) -> list[tuple[int, int]]:
    """Exponents of x and y of the terms of PSFEx, in its order: the first axis varies fastest.

    The exponents of axes in the same group add up to at most its degree.
    """
    out = []
    for second in range(degrees[1] + 1 if len(axes) > 1 else 1):
        together = len(axes) > 1 and groups[0] == groups[1]
        for first in range(degrees[0] + 1 - second * together):
            powers = [0, 0]
            powers[axes[0]] = first
            if len(axes) > 1:
                powers[axes[1]] = second
            out.append((powers[0], powers[1]))
    return out
