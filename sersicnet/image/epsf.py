"""The effective PSF from stamps of stars, finer than their pixels.

An effective PSF includes the pixel: a pixel of a star is its value at the centre of the pixel, times the flux (Anderson
& King 2000, PASP 112, 1360). Stars at different places within their pixels therefore sample it between the pixels.

The model of `sersicnet.image.epsfmodel` is fitted to all stars by least squares. The radial profile is fitted to the
means of rings, together with the skies under the stars. The departure from the profile is fitted to the pixels,
together with the fluxes and centres of the stars; its coefficients have a Gaussian prior in proportion to the
profile, so that noise is not taken for structure of the PSF. Where the noise hides the wings, the profile continues
as a power law.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy import linalg, sparse
from scipy.interpolate import BSpline

from sersicnet.image.epsfmodel import (
    DEPARTURE,
    MOST_DEPARTURE,
    REACH,
    TO_FWHM,
    Model,
    bumps,
    log_radius,
    prior_of,
    roughness,
    smoothness,
)
from sersicnet.image.psf import full_width

LEAST_STARS = 5
"""Stars that a PSF is measured from at least."""

LEAST_VARIED, LEAST_CURVED = 60, 120
"""Stars from which a PSF may vary over the field linearly, and quadratically."""

FINE = ((1.3, 4), (2.0, 3), (np.inf, 2))
"""Pixels of the PSF per pixel of the image, below a FWHM in pixels."""

CORE = 3.0
"""Radius within which stars are fitted, FWHM; where the PSF may vary over the field, too."""

_PRIOR, _PRIOR_VARIED = 0.3, 0.3  # standard deviation of the departure, as a fraction of the profile
_MODEL_ERROR = 0.01  # of a pixel of a star, as a fraction of its value
_CLIP, _CLIP_MODEL, _CLIP_CENTRE = 5.0, 0.1, 0.1  # sigma, fraction of the value, pixels
_SKY_ERROR = 0.03  # of the sky under a star, in units of the noise
_CLIP_WINGS, _CLIP_WING = 4.0, 0.5  # beyond the core: sigma, fraction of the value
_HALO = 5e-6  # what wings of a star may have in a pixel far out, of its flux
_SKY_CLEAR = 0.15  # from which the sky under a star differs from that of the image, in units of the noise
_RING_ERROR = 0.1  # of the mean of a ring about a star, because of faint sources, in units of the noise of a pixel
_SHARED_ERROR = 0.05  # of the mean of a ring, alike about all stars, in units of the noise of a pixel
_REWEIGHTED, _TRUSTED = 3, 1.5  # rounds of weights; rings that are off by more sigma have less weight
_FAINT = 1e-6  # flux of a star without light
_MOVED = 2.0  # pixels that a centre may be from where it was expected
_LEAST_WEIGHT = 0.7  # least share of a star's core that is used
_MISFIT, _MISFIT_RATIO = 0.05, 2.5
_WIDER, _WIDER_SIGMA = 0.03, 3.5
_MATCHES, _ROUNDS = 3, 5
_PAYS = 0.95  # scatter of the shapes of stars that are left out, over that with a lower degree


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


# --- the stars ----------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Stars:
    """Stars with their centres, fluxes and skies, which are improved in place."""

    values: np.ndarray
    variance: np.ndarray  # infinite where a pixel is unusable
    noise: np.ndarray  # of a blank pixel about each star, (S,)
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
        known = [variance[i][~unusable[i]] for i in range(n)]
        noise = np.sqrt([np.median(one) if len(one) else 1.0 for one in known])
        start = stamps.x.astype(float), stamps.y.astype(float)
        return cls(
            values=values,
            variance=variance,
            noise=noise,
            correlation=correlation,
            x=start[0].copy(),
            y=start[1].copy(),
            flux=np.ones(n),
            sky=np.zeros(n),
            kept=np.ones(n, bool),
            good=~unusable,
            start=start,
            misfit=np.zeros(n),
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
        # The sum under the weight is half the flux of a Gaussian star.
        self.flux = np.where(total > 0, 2 * total, _FAINT)

    def evaluated(self, model: Model) -> _Evaluated:
        """The PSF and its slopes at the pixels of the cores of all stars, about their present centres."""
        index, u, v = self.core(CORE * model.scale)
        small = 0.05 * model.scale
        along_x = (model(u + small, v) - model(u - small, v)) / (2 * small)
        along_y = (model(u, v + small) - model(u, v - small)) / (2 * small)
        return _Evaluated(index, u, v, model(u, v), along_x, along_y, np.hypot(u, v) < CORE * model.scale)

    def fit(self, model: Model, tolerance: float) -> None:
        """Fit centre, flux and sky of each star, without the pixels that disagree, and measure its misfit."""
        at = self.evaluated(model)
        values, variance = self.values[at.pixels], self.variance[at.pixels]
        star = self.flux[:, None, None] * at.psf
        with np.errstate(invalid="ignore"):
            limit = variance + (tolerance * _CLIP_MODEL * star) ** 2
            limit += (tolerance * _CLIP_CENTRE * self.flux[:, None, None]) ** 2 * (at.along_x**2 + at.along_y**2)
            good = np.isfinite(variance) & (np.abs(values - star - self.sky[:, None, None]) < _CLIP * np.sqrt(limit))
        self.good[at.pixels] = good
        weight = at.inside * good / (variance * self.correlation**2 + (_MODEL_ERROR * star) ** 2)
        basis = np.stack([at.psf, -at.along_x, -at.along_y, np.ones_like(star)], axis=-1)
        found, _ = _amplitudes(basis, weight, values - self.sky[:, None, None], 0.5 * self.sky_error)
        with np.errstate(invalid="ignore", divide="ignore"):
            moved = np.clip(np.nan_to_num(found[:, 1:3] / found[:, :1]), -0.5, 0.5)
        positive = found[:, 0] > 0
        self.flux = np.where(positive, found[:, 0], _FAINT)
        self.x, self.y = self.x + moved[:, 0], self.y + moved[:, 1]
        seen = (good * at.psf**2).sum((1, 2)) / (at.psf**2).sum((1, 2))
        near = np.hypot(self.x - self.start[0], self.y - self.start[1]) < _MOVED
        self.kept = positive & (seen > _LEAST_WEIGHT) & near
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

    def drop_shapes(self, off: np.ndarray, errors: np.ndarray, model: Model) -> None:
        """Drop the stars whose width or ellipticity is off by more than their scatter, noise and a minimum."""
        if self.kept.any():
            usual = _WIDER_SIGMA * scatter_of(off[self.kept])
            limit = np.maximum(np.maximum(usual, _WIDER * 2 * (model.scale / TO_FWHM) ** 2), 3 * errors)
            self.kept &= (np.abs(off) < limit).all(axis=1)

    def shapes(self, model: Model) -> tuple[np.ndarray, np.ndarray]:
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
        variance = self.variance[at.pixels] * self.correlation**2 + (_MODEL_ERROR * star) ** 2
        weight = at.inside * self.good[at.pixels] / variance
        values = self.values[at.pixels] - self.sky[:, None, None]
        found, errors = _amplitudes(basis, weight, values, 0.5 * self.sky_error)
        return found[:, 4:], errors[:, 4:]

    def estimate_sky(self, model: Model) -> None:
        """Measure the sky under the stars far from their centres; it stays 0 unless it clearly is not."""
        rows, columns = np.indices(self.values.shape[1:])
        self.sky[:] = 0
        for s in range(len(self.x)):
            u, v = columns - self.x[s], rows - self.y[s]
            used = np.isfinite(self.variance[s]) & (np.hypot(u, v) > min(2 * CORE * model.scale, 0.35 * len(u)))
            if not used.any():
                continue
            wings = self.flux[s] * model.round(u[used], v[used])
            least, most = sorted(_level(self.values[s][used] - part, self.noise[s]) for part in (wings, 0))
            # Wings that are not known yet are no reason for a sky that is not there.
            level = max(least, 0) + min(most, 0)
            if abs(level) > _SKY_CLEAR * self.noise[s] + _HALO * self.flux[s]:
                self.sky[s] = level

    @property
    def sky_error(self) -> np.ndarray:
        """How far the sky under each star may be off, (S,).

        It is a fraction of the noise under most stars; where it is more, the star itself shows it.
        """
        return np.maximum(_SKY_ERROR * self.noise, 0.3 * np.abs(self.sky))


def _level(values: np.ndarray, noise: float) -> float:
    """Mean of values without outliers."""
    return float(values[np.abs(values - np.median(values)) < 2.5 * noise].mean())


_CROSS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1))


class _Evaluated(NamedTuple):
    """A PSF at the pixels of the cores of stars, (S, m, m)."""

    pixels: tuple[np.ndarray, ...]  # their indices in the stamps
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


def _with_profile(model: Model, stars: _Stars) -> Model:
    """The model with the profile that fits the mean star in rings.

    The means of rings about single stars scatter more than the noise of pixels allows, because of faint sources.
    Rings that differ from the profile by more than that have less weight. An error of the sky, which all stars may
    share, limits how far out the profile is known.
    """
    which = np.flatnonzero(stars.kept)
    stars.estimate_sky(model)
    rings = _rings(model, stars, which)
    off_sky = rings.dark * (stars.noise[which] / stars.flux[which])[:, None]
    weight = rings.weight / (1 + rings.weight * (_RING_ERROR * off_sky) ** 2)
    profile, trust = model.profile, np.ones_like(weight)
    for _ in range(_REWEIGHTED):
        trusted = weight * trust
        total = np.maximum(trusted.sum(axis=0), 1e-300)
        value, shared = ((trusted * of).sum(axis=0) / total for of in (rings.value, off_sky))
        profile, now = _profile(model, rings.t, value, total, shared, profile)
        off = np.abs(rings.value - now) * np.sqrt(weight)
        trust = np.where(off > _TRUSTED, _TRUSTED / np.maximum(off, _TRUSTED), 1)
    return replace(model, profile=profile)


def _profile(
    model: Model, t: np.ndarray, value: np.ndarray, weight: np.ndarray, shared: np.ndarray, profile: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of the profile that fits the mean star, and the values of both the profile and a common sky, (R,).

    `shared` is what a sky of one sigma of the noise adds.
    """
    design = BSpline.design_matrix(t, model.knots, 3).toarray()
    penalty, wanted = smoothness(model)
    # Rings between two knots share their error, and all of them share a common sky.
    crowd = np.bincount(np.digitize(t, model.knots), minlength=len(model.knots) + 1)[np.digitize(t, model.knots)]
    weight = weight / (1 + weight * crowd * (_SHARED_ERROR * shared) ** 2)
    design = np.column_stack([design, np.zeros(len(t))])
    penalty = linalg.block_diag(penalty, 1 / _SKY_ERROR)
    wanted, found = np.append(wanted, 0), np.append(profile, 0)

    def left(found: np.ndarray) -> np.ndarray:
        return value - np.exp(design @ found) - found[-1] * shared

    def cost(found: np.ndarray) -> float:
        return float((weight * left(found) ** 2).sum() + ((wanted - penalty @ found) ** 2).sum())

    for _ in range(20):
        jacobian = np.exp(design @ found)[:, None] * design
        jacobian[:, -1] = shared
        normal = (jacobian.T * weight) @ jacobian + penalty.T @ penalty
        right = jacobian.T @ (weight * left(found)) + penalty.T @ (wanted - penalty @ found)
        size = 1 / np.sqrt(np.diagonal(normal))
        scaled = normal * size[:, None] * size + 1e-12 * np.eye(len(size))
        change = size * linalg.solve(scaled, right * size, assume_a="sym")
        change *= min(1, 1 / np.abs(change[:-1]).max())
        while cost(found + change) > cost(found) and np.abs(change[:-1]).max() > 1e-5:
            change /= 2
        found = found + change
        if np.abs(change[:-1]).max() < 1e-4:
            break
    return found[:-1], value - left(found)


class _Rings(NamedTuple):
    """The pixels of stars in elliptical rings, relative to the Moffat profile, (S, R)."""

    weight: np.ndarray
    value: np.ndarray  # mean ratio to the Moffat profile times the flux
    dark: np.ndarray  # mean of the inverse of the profile: what a sky of 1 adds
    t: np.ndarray  # radial coordinate, (R,)


def _rings(model: Model, stars: _Stars, which: np.ndarray) -> _Rings:
    edges = np.concatenate([np.arange(0, 4, 0.04), np.geomspace(4, 2 * REACH / model.scale, 120)]) * model.scale
    weight, value, radius, dark = np.zeros((4, len(which), len(edges) + 1))
    rows, columns = np.indices(stars.values.shape[1:])
    for k, s in enumerate(which):
        u, v, flux = columns - stars.x[s], rows - stars.y[s], stars.flux[s]
        r, moffat, rest = model.radius(u, v), model.moffat_at(u, v), model.rest(u, v)
        star = flux * (moffat * model.correction(r) + rest)
        off = np.abs(stars.values[s] - stars.sky[s] - star)
        variance = stars.variance[s] * stars.correlation**2 + (_MODEL_ERROR * flux * moffat) ** 2
        good = stars.good[s] & (off < _CLIP_WINGS * np.sqrt(stars.variance[s] + (_CLIP_WING * star) ** 2))
        certain = good * flux**2 / variance
        ring = np.searchsorted(edges, r).ravel()
        ratio = ((stars.values[s] - stars.sky[s]) / flux - rest) / moffat
        for total, of in ((weight, 1), (value, ratio), (radius, r), (dark, 1 / moffat)):
            total[k] = np.bincount(ring, (certain * moffat**2 * of).ravel(), weight.shape[1])
    some = weight.sum(axis=0) > 0
    weight, value, radius, dark = (array[:, some] for array in (weight, value, radius, dark))
    t = log_radius(radius.sum(axis=0) / weight.sum(axis=0), model.scale)
    there = np.maximum(weight, 1e-300)
    return _Rings(weight, value / there, dark / there, np.clip(t, model.knots[0], model.knots[-1]))


def _with_departure(model: Model, stars: _Stars) -> Model:
    """The model with the departure from its profile that the stars show.

    Fluxes and centres of the stars are free, too, and eliminated from the equations. For undersampled stars they depend
    so much on the PSF that alternate fits hardly converge.
    """
    reach = min(DEPARTURE * model.scale, MOST_DEPARTURE)
    rows = _rows(model, stars, reach)
    side = len(model.departure)
    prior = prior_of(model, reach, _PRIOR)
    free = np.flatnonzero(prior > 0)
    b = (rows.splines[:, free] @ sparse.diags_array(prior[free])).tocsr()
    before = np.divide(model.departure.ravel()[free], prior[free])
    rest = rows.left + b @ before
    weighted = b.multiply(rows.weight[:, None]).tocsr()
    normal, right = (b.T @ weighted).toarray() + roughness(side, free), weighted.T @ rest
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


def _rows(model: Model, stars: _Stars, reach: float) -> _Rows:
    index, u, v = stars.core(reach)
    near = (np.hypot(u, v) < reach) & stars.good[index] & stars.kept[:, None, None]
    star = np.broadcast_to(np.arange(len(u))[:, None, None], u.shape)[near]
    u, v, flux = u[near], v[near], stars.flux[star]
    psf, small = model(u, v), 0.05 * model.scale
    along_x = (model(u + small, v) - model(u - small, v)) / (2 * small)
    along_y = (model(u, v + small) - model(u, v - small)) / (2 * small)
    weight = flux**2 / (stars.variance[index][near] * stars.correlation**2 + (_MODEL_ERROR * flux * psf) ** 2)
    left = (stars.values[index][near] - stars.sky[star]) / flux - psf
    splines = bumps(u, v, model.step, len(model.departure))
    return _Rows(splines, weight, left, np.stack([psf, along_x, along_y], axis=1), star)


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
        `LEAST_VARIED` stars and as a quadratic polynomial from `LEAST_CURVED`, if it predicts the widths and
        ellipticities of stars better when each is left out.

    Returns
    -------
    EffectivePsf or None
        None if fewer than `LEAST_STARS` stars agree on a PSF.
    """
    stars = _Stars.of(stamps, correlation)
    if len(stars.x) < LEAST_STARS:
        return None
    model, degree, fitted = Model.moffat(fwhm), 0, np.zeros((len(stars.x), 3))
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
        every = terms(places[:, 0], places[:, 1], degree)
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


def _components(model: Model, stars: _Stars, places: np.ndarray, degree: int) -> np.ndarray:
    """Coefficients of departures from the model that are polynomials in position, float64, (K, m, m)."""
    b, weight, rest, _, star = _rows(model, stars, CORE * model.scale)
    side = len(model.departure)
    prior = prior_of(model, CORE * model.scale, _PRIOR_VARIED)
    free = np.flatnonzero(prior > 0)
    b = (b[:, free] @ sparse.diags_array(prior[free])).tocsr()
    by = terms(places[:, 0], places[:, 1], degree)[star]
    n, k = len(free), by.shape[1]
    normal, right = np.zeros((k, n, k, n)), np.zeros((k, n))
    rough = roughness(side, free)
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


def _finished(model: Model, stars: _Stars, degree: int, places: np.ndarray | None) -> EffectivePsf:
    """The PSF on its grid, centred and normalised, and what the stars say about it."""
    centre, most = _centre(model), max(fine for _, fine in FINE)
    core = np.arange(-8 * most, 8 * most + 1) / most
    narrow = full_width(model(*np.meshgrid(core + centre[0], core + centre[1])), most)
    oversampling = next(fine for limit, fine in FINE if min(narrow, model.scale) < limit)
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
    width = (shapes[stars.kept] - fitted)[:, 0] / (2 * (fwhm / TO_FWHM) ** 2)
    noise = float(np.median(errors[stars.kept, 0])) / (2 * (fwhm / TO_FWHM) ** 2)
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


def _centre(model: Model) -> tuple[float, float]:
    """Centroid of the core under a Gaussian of its own width, pixels."""
    x = y = 0.0
    along = np.arange(-30, 31) * 0.07 * model.scale
    for _ in range(20):
        u, v = np.meshgrid(along + x, along + y)
        light = model(u, v) * np.exp(-((u - x) ** 2 + (v - y) ** 2) * 4 * np.log(2) / model.scale**2)
        x, y = (c + 2 * (float((light * to).sum() / light.sum()) - c) for c, to in ((x, u), (y, v)))
    return x, y
