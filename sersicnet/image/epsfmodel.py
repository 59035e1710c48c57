"""A model of an effective PSF: a radial profile on ellipses, and the departure from it.

The profile is a Moffat profile that is integrated over the pixel, times a radial correction, the exponential of a
spline. The Moffat profile gives the core of an undersampled PSF the flat top of its pixel. The departure is a sum of
cubic B-splines on a square grid.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage, sparse
from scipy.interpolate import BSpline

REACH = 64
"""Radius of a PSF that is measured, pixels of the image."""

DEPARTURE, MOST_DEPARTURE = 5.0, 24.0
"""Radius within which the PSF departs from its radial profile: FWHM, and pixels at most."""

STEP = 0.3
"""Spacing of the splines of the departure, FWHM."""

_WINGS = 4.0  # FWHM from which the slope of the log profile in log radius has a prior
_LEVELS, _SLOPES = (-3.25, -3.0), (-3.45, -2.7)
"""Level of the profile at 4 FWHM, see `_wing_slope`, and the usual slope beyond it; from the ground, and in space."""
_WING_SLOPE_ERROR = 1.0
_BEND = 60.0  # standard deviation of the bend of the log profile in log radius, where rings are
_CORE_BEND = 5.0  # the same in the core
_SOFT = 0.8  # radius within which the log profile bends in the square of the radius, FWHM
_BETA = 3.0  # of the Moffat profile that the radial profile is a correction of
_PIXEL = 0.78  # what a pixel adds to the square of the FWHM of a narrow PSF, pixels squared
_LEAST_MOFFAT = 0.4  # FWHM of the Moffat profile, pixels
TO_FWHM = 2.3548
_ROUGH = 0.4  # standard deviation of the difference of neighbouring coefficients over that of a coefficient


@dataclass(frozen=True, eq=False)
class Model:
    """A Moffat profile integrated over the pixel, a radial correction of its log, and the departure from both."""

    scale: float  # FWHM that knots and grids are spaced by, pixels
    shape: np.ndarray  # second moments of the Gaussian of the Moffat profile's FWHM, without the pixel, pixels², (2, 2)
    knots: np.ndarray
    profile: np.ndarray  # coefficients of the log of the correction
    departure: np.ndarray  # coefficients of B-splines on a grid, (m, m)

    @classmethod
    def moffat(cls, fwhm: float) -> Model:
        """A round Moffat profile of so many pixels FWHM, the pixel included."""
        near = np.arange(0.3, 5, 0.2) * fwhm
        far = np.geomspace(near[-1], 2 * REACH, max(3, int(np.log(2 * REACH / near[-1]) / 0.2) + 1))[1:]
        inner = log_radius(np.concatenate([[0], near, far]), fwhm)
        knots = np.concatenate([[inner[0]] * 3, inner, [inner[-1]] * 3])
        half = int(min(DEPARTURE * fwhm, MOST_DEPARTURE) / (STEP * fwhm)) + 3
        variance = max(fwhm**2 - _PIXEL, _LEAST_MOFFAT**2) / TO_FWHM**2
        return cls(fwhm, variance * np.eye(2), knots, np.zeros(len(knots) - 4), np.zeros((2 * half + 1, 2 * half + 1)))

    def wider(self, by: np.ndarray) -> Model:
        """The model with other second moments: trace, difference and mixed term change by so much, pixels squared."""
        values, vectors = np.linalg.eigh(self.shape + np.array([[by[0] + by[1], by[2]], [by[2], by[0] - by[1]]]))
        values = np.maximum(values, (_LEAST_MOFFAT / TO_FWHM) ** 2)
        return replace(self, shape=(vectors * values) @ vectors.T)

    @property
    def step(self) -> float:
        """Spacing of the splines of the departure, pixels."""
        return STEP * self.scale

    @property
    def core(self) -> float:
        """Radius of the core of the Moffat profile, without the pixel, pixels."""
        return float(np.sqrt(np.sqrt(np.linalg.det(self.shape)) * TO_FWHM**2 / 4 / (2 ** (1 / _BETA) - 1)))

    def radius(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Elliptical radius at offsets, pixels."""
        a, b, c = self.shape[0, 0], self.shape[0, 1], self.shape[1, 1]
        return np.sqrt((c * u**2 - 2 * b * u * v + a * v**2) / np.sqrt(a * c - b * b))

    def moffat_at(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """The Moffat profile, integrated over the pixel, at offsets."""
        area = np.pi * self.core**2
        out = np.zeros(u.shape)
        near = np.hypot(u, v) < 3
        for nodes, where in ((4, near), (2, ~near)):
            node, weight = _nodes(nodes)
            there = np.zeros(int(where.sum()))
            for i, j in np.ndindex(nodes, nodes):
                r = self.radius(u[where] + node[i] / 2, v[where] + node[j] / 2)
                there += weight[i] * weight[j] / 4 * (1 + np.pi * r**2 / area) ** -_BETA
            out[where] = there
        return out * (_BETA - 1) / area

    def correction(self, radius: np.ndarray) -> np.ndarray:
        """Ratio of the profile to the Moffat profile at elliptical radii."""
        steps = 4000
        table = BSpline(self.knots, self.profile, 3)(np.linspace(self.knots[0], self.knots[-1], steps + 1))
        place = (log_radius(radius, self.scale) - self.knots[0]) * (steps / (self.knots[-1] - self.knots[0]))
        first = np.clip(place.astype(int), 0, steps - 1)
        share = np.clip(place - first, 0, 1)
        return np.asarray(np.exp(table[first] * (1 - share) + table[first + 1] * share))

    def round(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """The profile at offsets."""
        return self.moffat_at(u, v) * self.correction(self.radius(u, v))

    def rest(self, u: np.ndarray, v: np.ndarray, departure: np.ndarray | None = None) -> np.ndarray:
        """The departure at offsets."""
        coefficients = self.departure if departure is None else departure
        middle = len(coefficients) // 2
        places = np.array([v / self.step + middle, u / self.step + middle])
        return ndimage.map_coordinates(coefficients, places, order=3, mode="grid-constant", prefilter=False)

    def __call__(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """The PSF at offsets from its centre along x and y, per pixel of the image."""
        return self.round(u, v) + self.rest(u, v)


@functools.cache
def _nodes(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of Gauss and Legendre between -1 and 1."""
    node, weight = np.polynomial.legendre.leggauss(n)
    return node, weight


def log_radius(r: np.ndarray, scale: float) -> np.ndarray:
    """The radial coordinate of the profile: the log of the radius, softened in the core."""
    return 0.5 * np.log(r**2 + (_SOFT * scale) ** 2)


def bumps(u: np.ndarray, v: np.ndarray, step: float, side: int) -> sparse.csr_matrix:
    """Values of all cubic B-splines of a grid at offsets, (N, side²)."""
    n, middle = len(u), side // 2
    along = []
    for offset in (v, u):
        place = offset / step + middle
        first = np.floor(place).astype(int)
        t = place - first
        weights = np.array([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6
        along.append((first - 1, weights.T))
    (row, by_row), (column, by_column) = along
    four = np.arange(4)
    columns = (row[:, None, None] + four[:, None]) * side + column[:, None, None] + four
    values = by_row[:, :, None] * by_column[:, None, :]
    return sparse.csr_matrix((values.ravel(), columns.ravel(), np.arange(n + 1) * 16), shape=(n, side * side))


def smoothness(model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a prior on the profile, and what they should give: little bend, and a usual slope at the end."""
    inner = model.knots[3:-3]
    middle, width = (inner[1:] + inner[:-1]) / 2, np.diff(inner)
    second, first = (
        np.stack([BSpline(model.knots, one, 3).derivative(order)(middle) for one in np.eye(len(model.profile))], axis=1)
        for order in (2, 1)
    )
    r = np.sqrt(np.maximum(np.exp(2 * middle) / model.scale**2 - _SOFT**2, 0))
    bend = np.clip(_BEND * np.minimum((r / 1.5) ** 2, (4 / np.maximum(r, 1)) ** 6), _CORE_BEND, None)
    rows = second * (np.sqrt(width) / bend)[:, None]
    out = middle > np.log(_WINGS * model.scale)
    moffat = -2 * _BETA / (1 + (model.core / (r[out] * model.scale)) ** 2)
    steeper = _wing_slope(model) - moffat
    far = first[out] / _WING_SLOPE_ERROR
    return np.vstack([rows, far]), np.append(np.zeros(len(rows)), steeper / _WING_SLOPE_ERROR)


def _wing_slope(model: Model) -> float:
    """Usual slope of the log profile in log radius, beyond 4 FWHM.

    Diffraction leaves more light in the wings than the atmosphere, and it falls more slowly. They are told apart by the
    log of the profile at 4 FWHM, for light within 2 FWHM and an area of a square FWHM of 1.
    """
    radii = np.append(np.linspace(0, 2, 41), _WINGS) * model.scale
    *profile, edge = model.round(radii / model.radius(np.ones(1), np.zeros(1)), np.zeros(len(radii)))
    light = np.trapezoid(2 * np.pi * radii[:-1] * profile, radii[:-1])
    level = np.log10(max(edge, 1e-30) * model.scale**2 / light)
    return float(np.interp(level, _LEVELS, _SLOPES))


def prior_of(model: Model, reach: float, fraction: float) -> np.ndarray:
    """Standard deviation of each coefficient of the departure, (side²,); 0 beyond the reach."""
    side = len(model.departure)
    along = (np.arange(side) - side // 2) * model.step
    u, v = np.meshgrid(along, along)
    r = np.hypot(u, v)
    fade = np.clip((reach - r) / (0.25 * reach), 0, 1)
    return (fraction * model.round(u, v) * fade).ravel()


def roughness(side: int, free: np.ndarray) -> np.ndarray:
    """Inverse covariance of the coefficients in units of their standard deviation, (F, F)."""
    line = sparse.diags_array([-np.ones(side - 1), np.ones(side - 1)], offsets=[0, 1], shape=(side - 1, side))
    eye = sparse.eye_array(side)
    steps = sparse.vstack([sparse.kron(line, eye), sparse.kron(eye, line)]).tocsc()[:, free]
    return np.asarray((steps.T @ steps / _ROUGH**2).toarray() + np.eye(len(free)))
