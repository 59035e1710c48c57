"""The effective PSF from stamps of stars, finer than their pixels.

An effective PSF includes the pixel: a pixel of a star is its value at the pixel's centre, times the flux (Anderson & King
2000, PASP 112, 1360). Stars at different places within their pixels therefore sample it between the pixels of the image.

The PSF is the sum of two parts. The first is a radial profile on ellipses, the exponential of a spline through the values
of all stars; beyond the radius where the noise hides the wings it continues as a power law. The second part is the
departure from that profile, cubic B-splines on a square grid of a quarter of the FWHM. Its coefficients have a Gaussian prior
in proportion to the profile, so that the noise of the stars is not taken for structure of the PSF. Both are least squares,
alternated with the centres, fluxes and skies of the stars.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy import linalg, ndimage, sparse
from scipy.interpolate import BSpline

from sersicnet.image.psf import full_width

REACH = 64
"""Radius of a PSF that is measured, pixels of the image."""

LEAST_STARS = 5
"""Stars that a PSF is measured from at least."""

LEAST_VARIED, LEAST_CURVED = 60, 120
"""Stars from which a PSF may vary over the field linearly, and quadratically."""

FINE = ((1.3, 4), (2.0, 3), (np.inf, 2))
"""Pixels of the PSF per pixel of the image, below a FWHM in pixels."""

CORE = 3.0
"""Radius within which stars are fitted, FWHM; where the PSF may vary over the field, too."""

DEPARTURE, MOST_DEPARTURE = 6.0, 24.0
"""Radius within which the PSF departs from its radial profile: FWHM, and pixels at most."""

STEP = 0.25
"""Spacing of the splines of the departure, FWHM."""

_PRIOR, _PRIOR_VARIED = 0.3, 0.15  # standard deviation of the departure, as a fraction of the profile
_ROUGH = 0.4  # standard deviation of the difference of neighbouring coefficients over that of a coefficient
_MODEL_ERROR = 0.01  # of a pixel of a star, as a fraction of its value
_CLIP, _CLIP_MODEL, _CLIP_CENTRE = 5.0, 0.1, 0.1  # sigma, fraction of the value, pixels
_SKY_ERROR = 0.03  # of the sky under a star, in units of the noise
_MOVED = 2.0  # pixels that a centre may be from where it was expected
_LEAST_WEIGHT = 0.7  # least share of a star's core that is used
_MISFIT, _MISFIT_RATIO = 0.05, 2.5
_WIDER, _WIDER_SIGMA = 0.03, 3.5
_WINGS = 2.5  # FWHM from which the slope of the log profile in log radius has a prior
_WING_SLOPE, _WING_SLOPE_ERROR = -3.5, 4.0
_BEND = 60.0  # standard deviation of the bend of the log profile in log radius, where rings are
_CORE_BEND = 5.0  # the same in the core
_SOFT = 0.8  # radius within which the log profile bends in the square of the radius, FWHM
_MATCHES, _ROUNDS = 4, 5
_PAYS = 0.95  # scatter of the shapes of stars that are left out, over that with a lower degree
_BETA = 3.0  # of the Moffat profile that the radial profile is a correction of
_PIXEL = 0.78  # what a pixel adds to the square of the FWHM of a narrow PSF, pixels squared
_LEAST_MOFFAT = 0.4  # FWHM of the Moffat profile, pixels
_TO_FWHM = 2.3548


class StarStamps(NamedTuple):
    """Stamps of stars.

    Attributes
    ----------
    values : ndarray, float, (S, n, n)
        Sky-subtracted pixels, in any unit.
    noise : ndarray, float, (S, n, n)
        Noise of a blank pixel, in the same unit.
    unusable : ndarray, bool, (S, n, n)
        Pixels without data, or of other sources.
    x, y : ndarray, float64, (S,)
        Rough centres in the stamps, zero-based pixels, good to a pixel.
    """

    values: np.ndarray
    noise: np.ndarray
    unusable: np.ndarray
    x: np.ndarray
    y: np.ndarray

    def chosen(self, which: np.ndarray) -> StarStamps:
        """The stamps of some stars."""
        return StarStamps(*(array[which] for array in self))


@dataclass(frozen=True, eq=False)
class EffectivePsf:
    """An effective PSF that was measured from stars.

    Attributes
    ----------
    images : ndarray, float64, (K, P, P)
        The PSF, unit sum, odd P, centred on the middle pixel; where it varies, it is the first of the coefficients of a
        polynomial, see `terms`.
    oversampling : int
        Pixels of `images` per pixel of the image, along an axis.
    degree : int
        Degree of the polynomial in position: 0 for a constant PSF.
    used : ndarray, bool, (S,)
        Stars that the PSF was measured from.
    x, y, flux, sky : ndarray, float64, (S,)
        Centres, fluxes and skies of the stars, NaN for the others.
    fwhm : float
        Full width at half maximum in the middle of the field, pixels of the image.
    error : float
        Relative error of `fwhm`, 1 sigma: that of the mean of the stars.
    scatter : float
        Relative scatter of the widths of the stars about the PSF at their place, beyond their noise.
    misfit : float
        Median of the rms of the difference of a star from the PSF within 1.2 FWHM, over the rms of the star, beyond the
        noise of a blank pixel.
    """

    images: np.ndarray
    oversampling: int
    degree: int
    used: np.ndarray
    x: np.ndarray
    y: np.ndarray
    flux: np.ndarray
    sky: np.ndarray
    fwhm: float
    error: float
    scatter: float
    misfit: float

    def at(self, x: float, y: float) -> np.ndarray:
        """The PSF at a place in the field, from -1 to 1 along both axes; unit sum, float64, (P, P)."""
        image = np.tensordot(terms(np.array([x]), np.array([y]), self.degree)[0], self.images, 1)
        return np.asarray(image / image.sum())


def powers(degree: int) -> tuple[tuple[int, int], ...]:
    """Exponents of x and y in the terms of a polynomial: 1, x, y, x², xy, y²."""
    return tuple((n - k, k) for n in range(degree + 1) for k in range(n + 1))


def terms(x: np.ndarray, y: np.ndarray, degree: int) -> np.ndarray:
    """Terms of a polynomial in two variables, see `powers`, float64, (N, K)."""
    return np.stack([x**i * y**j for i, j in powers(degree)], axis=1).astype(float)


# --- the model ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Model:
    """A Moffat profile integrated over the pixel, a radial correction of its log, and the departure from both."""

    scale: float  # FWHM that knots and grids are spaced by, pixels
    shape: np.ndarray  # second moments of the Gaussian of the Moffat profile's FWHM, without the pixel, pixels², (2, 2)
    knots: np.ndarray
    profile: np.ndarray  # coefficients of the log of the correction
    departure: np.ndarray  # coefficients of B-splines on a grid, (m, m)

    @classmethod
    def moffat(cls, fwhm: float) -> _Model:
        near = np.arange(0.3, 5, 0.2) * fwhm
        far = np.geomspace(near[-1], 2 * REACH, max(3, int(np.log(2 * REACH / near[-1]) / 0.2) + 1))[1:]
        inner = _log_radius(np.concatenate([[0], near, far]), fwhm)
        knots = np.concatenate([[inner[0]] * 3, inner, [inner[-1]] * 3])
        half = int(min(DEPARTURE * fwhm, MOST_DEPARTURE) / (STEP * fwhm)) + 3
        variance = max(fwhm**2 - _PIXEL, _LEAST_MOFFAT**2) / _TO_FWHM**2
        return cls(fwhm, variance * np.eye(2), knots, np.zeros(len(knots) - 4), np.zeros((2 * half + 1, 2 * half + 1)))

    def wider(self, by: np.ndarray) -> _Model:
        """The model with other second moments: trace, difference and mixed term change by so much, pixels squared."""
        values, vectors = np.linalg.eigh(self.shape + np.array([[by[0] + by[1], by[2]], [by[2], by[0] - by[1]]]))
        values = np.maximum(values, (_LEAST_MOFFAT / _TO_FWHM) ** 2)
        return replace(self, shape=(vectors * values) @ vectors.T)

    @property
    def step(self) -> float:
        return STEP * self.scale

    def radius(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Elliptical radius at offsets, pixels."""
        a, b, c = self.shape[0, 0], self.shape[0, 1], self.shape[1, 1]
        return np.sqrt((c * u**2 - 2 * b * u * v + a * v**2) / np.sqrt(a * c - b * b))

    def moffat_at(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """The Moffat profile, integrated over the pixel, at offsets."""
        area = np.pi * np.sqrt(np.linalg.det(self.shape)) * _TO_FWHM**2 / 4 / (2 ** (1 / _BETA) - 1)
        out = np.zeros(u.shape)
        near = np.hypot(u, v) < 3
        for nodes, where in ((5, near), (2, ~near)):
            node, weight = np.polynomial.legendre.leggauss(nodes)
            there = np.zeros(int(where.sum()))
            for i, j in np.ndindex(nodes, nodes):
                r = self.radius(u[where] + node[i] / 2, v[where] + node[j] / 2)
                there += weight[i] * weight[j] / 4 * (1 + np.pi * r**2 / area) ** -_BETA
            out[where] = there
        return out * (_BETA - 1) / area

    def round(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """The profile at offsets."""
        table = np.linspace(self.knots[0], self.knots[-1], 4000)
        log = BSpline(self.knots, self.profile, 3)(table)
        return self.moffat_at(u, v) * np.exp(np.interp(_log_radius(self.radius(u, v), self.scale), table, log))

    def rest(self, u: np.ndarray, v: np.ndarray, departure: np.ndarray | None = None) -> np.ndarray:
        """The departure at offsets."""
        coefficients = self.departure if departure is None else departure
        middle = len(coefficients) // 2
        places = np.array([v / self.step + middle, u / self.step + middle])
        return ndimage.map_coordinates(coefficients, places, order=3, mode="grid-constant", prefilter=False)

    def __call__(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """The PSF at offsets from its centre along x and y, per pixel of the image."""
        return self.round(u, v) + self.rest(u, v)


def _log_radius(r: np.ndarray, scale: float) -> np.ndarray:
    """The radial coordinate of the profile: the log of the radius, softened in the core."""
    return 0.5 * np.log(r**2 + (_SOFT * scale) ** 2)


def _bumps(u: np.ndarray, v: np.ndarray, step: float, side: int) -> sparse.csr_matrix:
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


# --- the stars ----------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Stars:
    """Stars with their centres, fluxes and skies, which are improved in place."""

    values: np.ndarray
    variance: np.ndarray  # infinite where a pixel is unusable
    correlation: float
    x: np.ndarray
    y: np.ndarray
    flux: np.ndarray
    sky: np.ndarray
    kept: np.ndarray
    good: np.ndarray  # pixels that are not clipped, (S, n, n)
    start: tuple[np.ndarray, np.ndarray]
    misfit: np.ndarray

    @classmethod
    def of(cls, stamps: StarStamps, correlation: float) -> _Stars:
        n = len(stamps.x)
        unusable = stamps.unusable | ~np.isfinite(stamps.values) | ~(stamps.noise > 0)
        variance = np.where(unusable, np.inf, np.where(unusable, 1, stamps.noise) ** 2)
        values = np.where(unusable, 0, stamps.values).astype(float)
        none = np.full(n, np.nan)
        start = stamps.x.astype(float), stamps.y.astype(float)
        x, y = start[0].copy(), start[1].copy()
        return cls(
            values, variance, correlation, x, y, none.copy(), np.zeros(n), np.ones(n, bool), ~unusable, start, none
        )

    def core(self, radius: float) -> tuple[tuple[np.ndarray, ...], np.ndarray, np.ndarray]:
        """Indices of the pixels of squares about the stars, and their offsets from the centres, (S, m, m)."""
        half = int(np.ceil(radius))
        side = self.values.shape[1]
        offset = np.arange(-half, half + 1)
        rows, columns = (
            np.clip(np.rint(c).astype(int), half, side - 1 - half)[:, None] + offset for c in (self.y, self.x)
        )
        star = np.arange(len(self.x))[:, None, None]
        index = (star, rows[:, :, None], columns[:, None, :])
        u, v = np.broadcast_arrays(
            columns[:, None, :] - self.x[:, None, None], rows[:, :, None] - self.y[:, None, None]
        )
        return index, u, v

    def begin(self, fwhm: float) -> None:
        """Centroids under a Gaussian, and fluxes from it."""
        for _ in range(5):
            index, u, v = self.core(2 * fwhm)
            weight = np.exp(-(u**2 + v**2) * 4 * np.log(2) / fwhm**2) * np.isfinite(self.variance[index])
            values = weight * self.values[index]
            total = values.sum((1, 2))
            with np.errstate(invalid="ignore", divide="ignore"):
                for centre, to in ((self.x, u), (self.y, v)):
                    centre += np.nan_to_num(np.clip(2 * (values * to).sum((1, 2)) / total, -0.5, 0.5))
        index, u, v = self.core(CORE * fwhm)
        self.flux = total / (weight**2).sum((1, 2)) * fwhm**2 * np.pi / 4 / np.log(2)
        self.kept &= np.isfinite(self.flux) & (self.flux > 0)

    def evaluated(self, model: _Model) -> _Evaluated:
        """The PSF and its slopes at the pixels of the cores of all stars, about their present centres."""
        index, u, v = self.core(CORE * model.scale)
        small = 0.05 * model.scale
        along_x = (model(u + small, v) - model(u - small, v)) / (2 * small)
        along_y = (model(u, v + small) - model(u, v - small)) / (2 * small)
        return _Evaluated(index, u, v, model(u, v), along_x, along_y, np.hypot(u, v) < CORE * model.scale)

    def fit(self, model: _Model, tolerance: float) -> None:
        """Fit centre, flux and sky of each star, without the pixels that disagree, and measure its misfit."""
        at = self.evaluated(model)
        values, variance = self.values[at.index], self.variance[at.index]
        star = self.flux[:, None, None] * at.psf
        with np.errstate(invalid="ignore"):
            limit = variance + (tolerance * _CLIP_MODEL * star) ** 2
            limit += (tolerance * _CLIP_CENTRE * self.flux[:, None, None]) ** 2 * (at.along_x**2 + at.along_y**2)
            good = np.isfinite(variance) & (np.abs(values - star - self.sky[:, None, None]) < _CLIP * np.sqrt(limit))
        self.good[at.index] = good
        weight = at.inside * good / (variance * self.correlation**2 + (_MODEL_ERROR * star) ** 2)
        basis = np.stack([at.psf, -at.along_x, -at.along_y, np.ones_like(star)], axis=-1)
        found, _ = _amplitudes(basis, weight, values - self.sky[:, None, None], 0.5 * self.sky_error)
        with np.errstate(invalid="ignore", divide="ignore"):
            moved = np.clip(np.nan_to_num(found[:, 1:3] / found[:, :1]), -0.5, 0.5)
        self.flux = found[:, 0]
        self.x, self.y = self.x + moved[:, 0], self.y + moved[:, 1]
        seen = (good * at.psf**2).sum((1, 2)) / (at.psf**2).sum((1, 2))
        near = np.hypot(self.x - self.start[0], self.y - self.start[1]) < _MOVED
        self.kept = np.isfinite(self.flux) & (self.flux > 0) & (seen > _LEAST_WEIGHT) & near
        used = good & (np.hypot(at.u, at.v) < 1.2 * model.scale)
        number = np.maximum(used.sum((1, 2)), 1)
        rest = np.where(used, values - self.sky[:, None, None] - np.einsum("snmk,sk->snm", basis, found), 0)
        noise = np.where(used, variance, 0).sum((1, 2)) * (1 + 2 * self.correlation * np.sqrt(2 / number))
        with np.errstate(invalid="ignore", divide="ignore"):
            self.misfit = np.sqrt(np.maximum((rest**2).sum((1, 2)) - noise, 0) / (used * star**2).sum((1, 2)))

    def drop(self, tolerance: float) -> None:
        """Drop the stars that differ from the PSF: doubles, galaxies and clipped ones."""
        if self.kept.any():
            usual = _MISFIT_RATIO * float(np.median(self.misfit[self.kept]))
            self.kept &= self.misfit < tolerance * max(_MISFIT, usual)

    def drop_shapes(self, off: np.ndarray, errors: np.ndarray, model: _Model) -> None:
        """Drop the stars whose width or ellipticity is off by more than the others' scatter, their noise and a minimum."""
        if self.kept.any():
            usual = _WIDER_SIGMA * scatter_of(off[self.kept])
            limit = np.maximum(np.maximum(usual, _WIDER * 2 * (model.scale / 2.3548) ** 2), 3 * errors)
            self.kept &= (np.abs(off) < limit).all(axis=1)

    def shapes(self, model: _Model) -> tuple[np.ndarray, np.ndarray]:
        """Width and two ellipticities of each star less those of the PSF, and their errors, float64, (S, 3).

        They are the amplitudes of second derivatives of the PSF, which a change of the second moments by so many
        pixels squared gives.
        """
        at = self.evaluated(model)
        wide = 0.15 * model.scale
        middle, (right, left, up, down) = at.psf, (model(at.u + a * wide, at.v + b * wide) for a, b in _CROSS[:4])
        corners = [model(at.u + a * wide, at.v + b * wide) for a, b in _CROSS[4:]]
        in_x, in_y = (right + left - 2 * middle) / wide**2, (up + down - 2 * middle) / wide**2
        mixed = (corners[0] + corners[1] - corners[2] - corners[3]) / (4 * wide**2)
        flux = self.flux[:, None, None]
        basis = np.stack([middle, -at.along_x, -at.along_y, np.ones_like(middle)], axis=-1)
        second = np.stack([0.5 * (in_x + in_y), 0.5 * (in_x - in_y), mixed], axis=-1) * flux[..., None]
        basis = np.concatenate([basis, second], axis=-1)
        star = flux * middle
        variance = self.variance[at.index] * self.correlation**2 + (_MODEL_ERROR * star) ** 2
        weight = at.inside * self.good[at.index] / variance
        values = self.values[at.index] - self.sky[:, None, None]
        found, errors = _amplitudes(basis, weight, values, 0.5 * self.sky_error)
        return found[:, 4:], errors[:, 4:]

    @property
    def noise(self) -> np.ndarray:
        """Noise of a blank pixel about each star, (S,)."""
        return np.sqrt(np.nanmedian(np.where(np.isfinite(self.variance), self.variance, np.nan), axis=(1, 2)))

    @property
    def sky_error(self) -> np.ndarray:
        """How far the sky under each star may be off, (S,).

        It is a fraction of the noise under most stars; where it is more, the star itself shows it.
        """
        return np.maximum(_SKY_ERROR * self.noise, np.abs(self.sky))


_CROSS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1))


class _Evaluated(NamedTuple):
    """A PSF at the pixels of the cores of stars, (S, m, m)."""

    index: tuple[np.ndarray, ...]
    u: np.ndarray
    v: np.ndarray
    psf: np.ndarray
    along_x: np.ndarray
    along_y: np.ndarray
    inside: np.ndarray


def _amplitudes(
    basis: np.ndarray, weight: np.ndarray, values: np.ndarray, sky_error: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Amplitudes of a basis for each star and their errors, (S, K); the fourth is the sky, 0 within its error."""
    normal = np.einsum("snmk,snm,snml->skl", basis, weight, basis)
    right = np.einsum("snmk,snm->sk", basis, weight * values)
    normal[:, 3, 3] += 1 / np.maximum(sky_error, 1e-30) ** 2
    size = np.sqrt(np.maximum(np.einsum("skk->sk", normal), 1e-300))
    scaled = normal / size[:, :, None] / size[:, None, :] + 1e-10 * np.eye(basis.shape[-1])
    inverse = np.linalg.inv(scaled) / size[:, :, None] / size[:, None, :]
    return np.einsum("skl,sl->sk", inverse, right), np.sqrt(np.einsum("skk->sk", inverse))


# --- fitting the model --------------------------------------------------------------------------------


def _with_profile(model: _Model, stars: _Stars) -> _Model:
    """The model with the profile that fits the stars in all of their pixels; their skies are fitted with it."""
    which = np.flatnonzero(stars.kept)
    weight, value, radius, dark = _binned(model, stars, which)
    total = weight.sum(axis=0)
    some = total > 0
    weight, value, dark, total = weight[:, some], value[:, some], dark[:, some], total[some]
    t = np.clip(
        _log_radius((weight * radius[:, some]).sum(axis=0) / total, model.scale), model.knots[0], model.knots[-1]
    )
    design = BSpline.design_matrix(t, model.knots, 3).toarray()
    penalty, wanted = _smoothness(model)
    # The sky of each star, in units of its flux, is another parameter, which is eliminated from the equations.
    certain = 1 / (stars.sky_error[which] / stars.flux[which]) ** 2 + (weight * dark**2).sum(axis=1)

    def off(profile: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is left of the values, and the skies."""
        left = value - np.exp(design @ profile)
        return left, (weight * dark * left).sum(axis=1) / certain

    def cost(profile: np.ndarray) -> float:
        left, sky = off(profile)
        return float((weight * left**2).sum() - (certain * sky**2).sum() + ((wanted - penalty @ profile) ** 2).sum())

    profile = model.profile
    for _ in range(20):
        jacobian = np.exp(design @ profile)[:, None] * design
        left, sky = off(profile)
        skies = (weight * dark) @ jacobian
        normal = (jacobian.T * total) @ jacobian - (skies.T / certain) @ skies + penalty.T @ penalty
        right = jacobian.T @ (weight * (left - dark * sky[:, None])).sum(axis=0) + penalty.T @ (
            wanted - penalty @ profile
        )
        size = 1 / np.sqrt(np.diagonal(normal))
        scaled = normal * size[:, None] * size + 1e-12 * np.eye(len(size))
        change = size * linalg.solve(scaled, right * size, assume_a="sym")
        change *= min(1, 1 / np.abs(change).max())
        while cost(profile + change) > cost(profile) and np.abs(change).max() > 1e-5:
            change /= 2
        profile = profile + change
        if np.abs(change).max() < 1e-4:
            break
    stars.sky[which] = off(profile)[1] * stars.flux[which]
    return replace(model, profile=profile)


def _binned(model: _Model, stars: _Stars, which: np.ndarray) -> tuple[np.ndarray, ...]:
    """Weights of the pixels of stars in rings, their mean ratios to the Moffat profile, radii, and its inverse, (S, R)."""
    edges = np.concatenate([np.arange(0, 4, 0.04), np.geomspace(4, 2 * REACH / model.scale, 120)]) * model.scale
    weight, value, radius, sky = np.zeros((4, len(which), len(edges) + 1))
    rows, columns = np.indices(stars.values.shape[1:])
    for k, s in enumerate(which):
        u, v, flux = columns - stars.x[s], rows - stars.y[s], stars.flux[s]
        r, moffat = model.radius(u, v), model.moffat_at(u, v)
        variance = stars.variance[s] * stars.correlation**2 + (_MODEL_ERROR * flux * moffat) ** 2
        certain = stars.good[s] * flux**2 / variance
        ring = np.searchsorted(edges, r).ravel()
        ratio = (stars.values[s] / flux - model.rest(u, v)) / moffat
        for total, of in ((weight, 1), (value, ratio), (radius, r), (sky, 1 / moffat)):
            total[k] = np.bincount(ring, (certain * moffat**2 * of).ravel(), weight.shape[1])
    there = np.maximum(weight, 1e-300)
    return weight, value / there, radius / there, sky / there


def _smoothness(model: _Model) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a prior on the profile, and what they should give: little bend, and a usual slope at the end."""
    inner = model.knots[3:-3]
    middle, width = (inner[1:] + inner[:-1]) / 2, np.diff(inner)
    second, first = (
        np.stack([BSpline(model.knots, one, 3).derivative(order)(middle) for one in np.eye(len(model.profile))], axis=1)
        for order in (2, 1)
    )
    r = np.sqrt(np.maximum(np.exp(2 * middle) / model.scale**2 - _SOFT**2, 0))
    bend = np.clip(
        _BEND * np.minimum((r / 1.5) ** 2, (4 / np.maximum(r, 1)) ** 6), np.where(r < 2, _CORE_BEND, 1), None
    )
    rows = second * (np.sqrt(width) / bend)[:, None]
    far = first[middle > np.log(_WINGS * model.scale)]
    steeper = (_WING_SLOPE + 2 * _BETA) / _WING_SLOPE_ERROR
    return np.vstack([rows, far / _WING_SLOPE_ERROR]), np.append(np.zeros(len(rows)), np.full(len(far), steeper))


def _with_departure(model: _Model, stars: _Stars) -> _Model:
    """The model with the departure from its profile that the stars show.

    Fluxes and centres of the stars are free, too, and eliminated from the equations: of an undersampled star they depend
    on the PSF so much that fitting the two in turn hardly converges.
    """
    reach = min(DEPARTURE * model.scale, MOST_DEPARTURE)
    rows = _rows(model, stars, reach)
    side = len(model.departure)
    prior = _prior(model, reach, _PRIOR)
    free = np.flatnonzero(prior > 0)
    b = (rows.splines[:, free] @ sparse.diags_array(prior[free])).tocsr()
    before = np.divide(model.departure.ravel()[free], prior[free])
    rest = rows.left + b @ before
    weighted = b.multiply(rows.weight[:, None]).tocsr()
    normal, right = (b.T @ weighted).toarray() + _roughness(side, free), weighted.T @ rest
    # Three more parameters of each star.
    n = len(rows.left)
    own = [sparse.csr_array((slope, (np.arange(n), rows.star)), (n, len(stars.x))) for slope in rows.slopes.T]
    mixed = np.stack([(one.T @ weighted).toarray() for one in own], axis=1)
    theirs = np.zeros((len(stars.x), 3, 3))
    for i, j in np.ndindex(3, 3):
        product = rows.weight * rows.slopes[:, i] * rows.slopes[:, j]
        theirs[:, i, j] = np.bincount(rows.star, product, len(stars.x))
    off = np.stack(
        [np.bincount(rows.star, rows.weight * slope * rest, len(stars.x)) for slope in rows.slopes.T], axis=1
    )
    some = np.flatnonzero(stars.kept)
    inverse = np.linalg.inv(theirs[some])
    folded = np.einsum("sij,sjn->sin", inverse, mixed[some])
    normal -= np.tensordot(mixed[some], folded, ([0, 1], [0, 1]))
    right -= np.einsum("sin,si->n", folded, off[some])
    found = linalg.solve(normal, right, assume_a="pos", overwrite_a=True)
    departure = np.zeros(side * side)
    departure[free] = prior[free] * found
    return replace(model, departure=departure.reshape(side, side))


class _Rows(NamedTuple):
    """Pixels of all stars within a radius, in units of the stars' fluxes."""

    splines: sparse.csr_matrix  # values of the B-splines of the departure, (N, m²)
    weight: np.ndarray
    left: np.ndarray  # what the PSF leaves
    slopes: np.ndarray  # the PSF and its slopes along x and y, (N, 3)
    star: np.ndarray


def _rows(model: _Model, stars: _Stars, reach: float) -> _Rows:
    index, u, v = stars.core(reach)
    near = (np.hypot(u, v) < reach) & stars.good[index] & stars.kept[:, None, None]
    star = np.broadcast_to(np.arange(len(u))[:, None, None], u.shape)[near]
    u, v, flux = u[near], v[near], stars.flux[star]
    psf, small = model(u, v), 0.05 * model.scale
    along_x = (model(u + small, v) - model(u - small, v)) / (2 * small)
    along_y = (model(u, v + small) - model(u, v - small)) / (2 * small)
    weight = flux**2 / (stars.variance[index][near] * stars.correlation**2 + (_MODEL_ERROR * flux * psf) ** 2)
    left = (stars.values[index][near] - stars.sky[star]) / flux - psf
    splines = _bumps(u, v, model.step, len(model.departure))
    return _Rows(splines, weight, left, np.stack([psf, along_x, along_y], axis=1), star)


def _prior(model: _Model, reach: float, fraction: float) -> np.ndarray:
    """Standard deviation of each coefficient of the departure, (side²,); 0 beyond the reach."""
    side = len(model.departure)
    along = (np.arange(side) - side // 2) * model.step
    u, v = np.meshgrid(along, along)
    r = np.hypot(u, v)
    fade = np.clip((reach - r) / (0.25 * reach), 0, 1)
    return (fraction * model.round(u, v) * fade).ravel()


def _roughness(side: int, free: np.ndarray) -> np.ndarray:
    """Inverse covariance of the coefficients in units of their standard deviation, (F, F)."""
    line = sparse.diags_array([-np.ones(side - 1), np.ones(side - 1)], offsets=[0, 1], shape=(side - 1, side))
    eye = sparse.eye_array(side)
    steps = sparse.vstack([sparse.kron(line, eye), sparse.kron(eye, line)]).tocsc()[:, free]
    return np.asarray((steps.T @ steps / _ROUGH**2).toarray() + np.eye(len(free)))


# --- the measurement ----------------------------------------------------------------------------------


def measure_psf(
    stamps: StarStamps, fwhm: float, correlation: float = 1.0, places: np.ndarray | None = None
) -> EffectivePsf | None:
    """Measure the effective PSF from stamps of stars.

    Stars that differ from the others are dropped (doubles, galaxies, clipped ones), and so are single pixels that
    differ from the PSF (cosmic rays, hot pixels).

    Parameters
    ----------
    stamps : StarStamps
    fwhm : float
        Rough full width at half maximum, pixels.
    correlation : float
        Noise in a large aperture over the noise for uncorrelated pixels.
    places : ndarray, float64, (S, 2), optional
        x and y of the stars in the field, from -1 to 1. The PSF may then vary over the field: linearly from
        `LEAST_VARIED` stars and as a quadratic polynomial from `LEAST_CURVED`, if the widths and ellipticities of the stars
        are predicted better by it when each is left out.

    Returns
    -------
    EffectivePsf or None
        None if fewer than `LEAST_STARS` stars agree on a PSF.
    """
    stars = _Stars.of(stamps, correlation)
    if len(stars.x) < LEAST_STARS:
        return None
    model, degree, fitted = _Model.moffat(fwhm), 0, np.zeros((len(stars.x), 3))
    stars.begin(fwhm)
    for _ in range(_MATCHES):
        stars.fit(model, 4.0)
        if stars.kept.any():
            model = model.wider(np.median(stars.shapes(model)[0][stars.kept], axis=0))
    for turn in range(_ROUNDS):
        tolerance = max(3 - turn, 1)
        stars.fit(model, tolerance)
        stars.fit(model, tolerance)
        stars.drop(tolerance)
        if tolerance == 1:
            shapes, errors = stars.shapes(model)
            degree, fitted = _variation(shapes, places, stars.kept)
            stars.drop_shapes(shapes - fitted, errors, model)
        if stars.kept.sum() < LEAST_STARS - (turn + 1 < _ROUNDS):
            return None
        model = _with_profile(model, stars) if turn < 2 else _with_departure(model, stars)
    return _finished(model, stars, degree, places)


def _variation(shapes: np.ndarray, places: np.ndarray | None, kept: np.ndarray) -> tuple[int, np.ndarray]:
    """Degree of the polynomial in position that predicts shapes of stars best, and its values, float64, (S, 3)."""
    use = np.flatnonzero(kept)
    middle = np.median(shapes[use], axis=0)
    if places is None:
        return 0, np.broadcast_to(middle, shapes.shape)
    limits = [0, LEAST_VARIED, LEAST_CURVED]
    possible = [
        degree for degree, least in enumerate(limits) if len(use) >= least and (not degree or _spread(places[use]))
    ]
    scale, lowest, best, values = scatter_of(shapes[use]), np.inf, 0, np.broadcast_to(middle, shapes.shape)
    near = use[(np.abs(shapes[use] - middle) < 6 * scale).all(axis=1)]
    for degree in possible:
        every = terms(*places.T, degree)
        some = every[near]
        inverse = np.linalg.pinv(some)
        left_out = (shapes[near] - some @ (inverse @ shapes[near])) / (1 - np.einsum("sk,ks->s", some, inverse))[
            :, None
        ]
        error = float((scatter_of(left_out) / np.maximum(scale, 1e-30)).mean()) if len(near) else np.inf
        if error < _PAYS * lowest:
            lowest, best, values = error, degree, every @ (inverse @ shapes[near])
    return best, values


def scatter_of(values: np.ndarray) -> np.ndarray:
    """Standard deviation of each column, from the median of the deviations."""
    return np.asarray(1.4826 * np.median(np.abs(values - np.median(values, axis=0)), axis=0))


def _spread(places: np.ndarray) -> bool:
    """Whether stars cover the field: two or more in all but two of its ninths."""
    cell = np.clip(((places + 1) * 1.5).astype(int), 0, 2)
    return int((np.bincount(cell @ [1, 3], minlength=9) >= 2).sum()) >= 7


def _components(model: _Model, stars: _Stars, places: np.ndarray, degree: int) -> np.ndarray:
    """Coefficients of departures from the model that are polynomials in position, float64, (K, m, m)."""
    b, weight, rest, _, star = _rows(model, stars, CORE * model.scale)
    side = len(model.departure)
    prior = _prior(model, CORE * model.scale, _PRIOR_VARIED)
    free = np.flatnonzero(prior > 0)
    b = (b[:, free] @ sparse.diags_array(prior[free])).tocsr()
    by = terms(*places.T, degree)[star]
    n, k = len(free), by.shape[1]
    normal, right = np.zeros((k, n, k, n)), np.zeros((k, n))
    rough = _roughness(side, free)
    for i in range(k):
        for j in range(i + 1):
            block = (b.T @ b.multiply((weight * by[:, i] * by[:, j])[:, None]).tocsr()).toarray()
            normal[i, :, j] = normal[j, :, i] = block
        normal[i, :, i] += rough
        right[i] = b.T @ (weight * by[:, i] * rest)
    found = linalg.solve(normal.reshape(k * n, k * n), right.ravel(), assume_a="pos", overwrite_a=True)
    out = np.zeros((k, side * side))
    out[:, free] = prior[free] * found.reshape(k, n)
    return out.reshape(k, side, side)


def _finished(model: _Model, stars: _Stars, degree: int, places: np.ndarray | None) -> EffectivePsf:
    """The PSF on its grid, centred and normalised, and what the stars say about it."""
    oversampling = next(fine for limit, fine in FINE if model.scale < limit)
    centre = _centre(model)
    along = np.arange(-REACH * oversampling, REACH * oversampling + 1) / oversampling
    u, v = np.meshgrid(along + centre[0], along + centre[1])
    images = model(u, v)[None]
    shapes, errors = stars.shapes(model)
    fitted = np.median(shapes[stars.kept], axis=0)
    if degree and places is not None:
        varied = np.array([model.rest(u, v, one) for one in _components(model, stars, places, degree)])
        images = np.concatenate([images + varied[:1], varied[1:]])
        fitted = _variation(shapes, places, stars.kept)[1][stars.kept]
    total = float(images[0].sum()) / oversampling**2
    images /= images[0].sum()
    fwhm = full_width(images[0], oversampling)
    # A Gaussian of a slightly larger second moment is so much wider.
    width = (shapes[stars.kept] - fitted)[:, 0] / (2 * (fwhm / 2.3548) ** 2)
    noise = float(np.median(errors[stars.kept, 0])) / (2 * (fwhm / 2.3548) ** 2)
    scatter = float(scatter_of(width[:, None])[0])
    known = [np.where(stars.kept, values, np.nan) for values in (stars.x, stars.y, stars.flux, stars.sky)]
    return EffectivePsf(
        images=images,
        oversampling=oversampling,
        degree=degree,
        used=stars.kept,
        x=known[0] + centre[0],
        y=known[1] + centre[1],
        flux=known[2] * total,
        sky=known[3],
        fwhm=fwhm,
        error=1.25 * scatter / float(np.sqrt(stars.kept.sum())),
        scatter=float(np.sqrt(max(scatter**2 - noise**2, 0))),
        misfit=float(np.median(stars.misfit[stars.kept])),
    )


def _centre(model: _Model) -> tuple[float, float]:
    """Centroid of the core under a Gaussian of its own width, pixels."""
    x = y = 0.0
    along = np.arange(-30, 31) * 0.07 * model.scale
    for _ in range(20):
        u, v = np.meshgrid(along + x, along + y)
        light = model(u, v) * np.exp(-((u - x) ** 2 + (v - y) ** 2) * 4 * np.log(2) / model.scale**2)
        x, y = (c + 2 * (float((light * to).sum() / light.sum()) - c) for c, to in ((x, u), (y, v)))
    return x, y
