"""The effective PSF from stamps of stars, finer than their pixels.

An effective PSF includes the pixel: a pixel of a star is its value at the centre of the pixel, times the flux (Anderson
& King 2000, PASP 112, 1360). Stars at different places within their pixels therefore sample it between the pixels.

The model of `sersicnet.image.epsfmodel` is fitted to all stars by least squares. The radial profile is fitted to the
means of rings, together with the skies under the stars. The departure from the profile is fitted to the pixels,
together with the core of the profile and with fluxes and centres of the stars. Its coefficients have a Gaussian prior
in proportion to the profile, so that noise is not taken for structure of the PSF. Where the noise hides the wings, the
profile continues as a power law.
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
from sersicnet.image.epsfstars import (
    CLIP_WING,
    CLIP_WINGS,
    CORE,
    LEAST_STARS,
    MODEL_ERROR,
    SKY_ERROR,
    Stars,
    StarStamps,
    scatter_of,
    second_derivatives,
)
from sersicnet.image.psf import full_width

LEAST_VARIED, LEAST_CURVED = 60, 120
"""Stars from which a PSF may vary over the field linearly, and quadratically."""

FINE = ((1.3, 4), (2.0, 3), (np.inf, 2))
"""Pixels of the PSF per pixel of the image, below a FWHM in pixels."""

_PRIOR, _PRIOR_VARIED = 0.3, 0.3  # standard deviation of the departure, as a fraction of the profile
_NEAR_SKY_ERROR = 0.2  # of the sky under a star where the departure is fitted, in units of the noise
_RING_ERROR = 0.1  # of the mean of a ring about a star, because of faint sources, in units of the noise of a pixel
_ABOUT, _UNLIT = 1.5, 0.3  # radius from which rings show light of other sources, FWHM; share of stars without it
_SHARED_ERROR = 0.03  # of the mean of a ring, alike about all stars, in units of the noise of a pixel
_SAME_LIGHT = 1e-4  # change of the light of the core in a fit of the departure
_REWEIGHTED, _TRUSTED = 3, 1.5  # rounds of weights; rings that are off by more sigma have less weight
_MATCHES, _ROUNDS = 3, 5
_SMOOTH = 0.002  # relative error of the light within two FWHM, because the profile is a smooth curve
_PAYS = 0.95  # scatter of the shapes of stars that are left out, over that with a lower degree


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
        Relative error of `fwhm`, 1 sigma: that of the fit, which includes how well the stars sample the peak, and that
        of the mean of the widths of the stars, if these differ.
    light_error : float
        Relative error of the light within two FWHM, 1 sigma, because noise and an error of the sky hide the wings.
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
    light_error: float
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


# --- fitting the model --------------------------------------------------------------------------------


def _with_profile(model: Model, stars: Stars) -> tuple[Model, float]:
    """The model with the profile that fits the mean star in rings, and the relative error of its light within two FWHM.

    The means of rings about single stars scatter more than the noise of pixels allows, because of faint sources.
    Rings that differ from the profile by more than that have less weight. An error of the sky, which all stars may
    share, limits how far out the profile is known.
    """
    which = np.flatnonzero(stars.kept)
    stars.estimate_sky(model)
    rings = _rings(model, stars, which)
    off_sky = rings.dark * (stars.noise[which] / stars.flux[which])[:, None]
    about = rings.t > log_radius(np.array(_ABOUT * model.scale), model.scale)
    profile, trust = model.profile, np.ones_like(rings.weight)
    left = rings.value - np.exp(BSpline(model.knots, profile, 3)(rings.t))
    for _ in range(_REWEIGHTED):
        lit = _lit(rings.weight * about, left, off_sky)
        weight = rings.weight / (1 + rings.weight * ((_RING_ERROR + lit) * off_sky) ** 2)
        trusted = weight * trust
        total = np.maximum(trusted.sum(axis=0), 1e-300)
        value, shared = ((trusted * of).sum(axis=0) / total for of in (rings.value, off_sky))
        profile, now, covariance = _profile(model, rings.t, value, total, shared, profile)
        left = rings.value - now
        trust = _TRUSTED / np.maximum(np.abs(left) * np.sqrt(weight), _TRUSTED)
    model = replace(model, profile=profile)
    near, all_light = (_light_by(model, reach) for reach in (2 * model.scale, float(REACH)))
    by = near / near.sum() - all_light / all_light.sum()  # B-splines add up to 1, and so their light to all of it
    return model, float(np.sqrt(max(by @ covariance @ by, 0) + _SMOOTH**2))


def _lit(weight: np.ndarray, left: np.ndarray, off_sky: np.ndarray) -> np.ndarray:
    """How far other sources light up the rings about each star, in units of the noise of a pixel, (S, 1).

    Neighbours and galaxies behind a star only add light, and all rings about it have some: these do not disagree with
    each other, but with those of other stars. The zero is that of the stars with least light.
    """
    light = (weight * off_sky * left).sum(axis=1) / np.maximum((weight * off_sky**2).sum(axis=1), 1e-300)
    unit = (weight * off_sky).sum(axis=1) / np.maximum(weight.sum(axis=1), 1e-300)
    share = light * unit  # of the profile, which is alike for all stars
    return np.asarray(np.abs(share - np.quantile(share, _UNLIT)) / np.maximum(unit, 1e-300))[:, None]


def _profile(
    model: Model, t: np.ndarray, value: np.ndarray, weight: np.ndarray, shared: np.ndarray, profile: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coefficients of the profile that fits the mean star, values of both the profile and a common sky, (R,).

    The last is the covariance of the coefficients. `shared` is what a sky of one sigma of the noise adds.
    """
    design = BSpline.design_matrix(t, model.knots, 3).toarray()
    penalty, wanted = smoothness(model)
    # Rings between two knots share their error, and all of them share a common sky.
    crowd = np.bincount(np.digitize(t, model.knots), minlength=len(model.knots) + 1)[np.digitize(t, model.knots)]
    weight = weight / (1 + weight * crowd * (_SHARED_ERROR * shared) ** 2)
    design = np.column_stack([design, np.zeros(len(t))])
    penalty = linalg.block_diag(penalty, 1 / SKY_ERROR)
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
    covariance = size[:, None] * linalg.inv(scaled) * size
    return found[:-1], value - left(found), covariance[:-1, :-1]


class _Rings(NamedTuple):
    """The pixels of stars in elliptical rings, relative to the Moffat profile, (S, R)."""

    weight: np.ndarray
    value: np.ndarray  # mean ratio to the Moffat profile times the flux
    dark: np.ndarray  # mean of the inverse of the profile: what a sky of 1 adds
    t: np.ndarray  # radial coordinate, (R,)


def _rings(model: Model, stars: Stars, which: np.ndarray) -> _Rings:
    edges = np.concatenate([np.arange(0, 4, 0.04), np.geomspace(4, 2 * REACH / model.scale, 120)]) * model.scale
    weight, value, radius, dark = np.zeros((4, len(which), len(edges) + 1))
    rows, columns = np.indices(stars.values.shape[1:])
    for k, s in enumerate(which):
        u, v, flux = columns - stars.x[s], rows - stars.y[s], stars.flux[s]
        r, moffat, rest = model.radius(u, v), model.moffat_at(u, v), model.rest(u, v)
        star = flux * (moffat * model.correction(r) + rest)
        off = np.abs(stars.values[s] - stars.sky[s] - star)
        variance = stars.variance[s] * stars.correlation**2 + (MODEL_ERROR * flux * moffat) ** 2
        good = stars.good[s] & (off < CLIP_WINGS * np.sqrt(stars.variance[s] + (CLIP_WING * star) ** 2))
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


def _with_departure(model: Model, stars: Stars, off: np.ndarray | None) -> tuple[Model, float]:
    """The model with the departure from its profile that the stars show, and the relative error of its FWHM.

    Fluxes and centres of the stars are free, too, and eliminated from the equations. They depend so much on the PSF
    that alternate fits hardly converge: a star with its peak on a pixel gets a flux that suits a peak that is too
    high. The profile within the reach is free as well, because the splines of the departure are too wide for its peak.
    `off` is how far the shapes of the stars are from the mean shape, if the PSF varies over the field.
    """
    reach = min(DEPARTURE * model.scale, MOST_DEPARTURE)
    rows = _rows(model, stars, reach, off)
    side = len(model.departure)
    prior = prior_of(model, reach, _PRIOR)
    free = np.flatnonzero(prior > 0)
    known = model.departure.ravel()[free] / prior[free]
    b = (rows.splines[:, free] @ sparse.diags_array(prior[free])).tocsr()
    radial = np.flatnonzero(model.knots[4:] <= log_radius(np.array(reach), model.scale))
    both = sparse.hstack([b, rows.radial[:, radial]]).tocsr()
    weighted = both.multiply(rows.weight[:, None]).tocsr()
    penalty, wanted = smoothness(model)
    normal = (both.T @ weighted).toarray()
    normal += linalg.block_diag(roughness(side, free), penalty[:, radial].T @ penalty[:, radial])
    rest = rows.left + b @ known
    right = weighted.T @ rest
    right[len(free) :] += penalty[:, radial].T @ (wanted - penalty @ model.profile)
    # The light within the reach stays as it is: fluxes of the stars make up for any change of it, the wings do not.
    light = np.concatenate([prior[free] * model.step**2, _light_by(model, reach)[radial]]) / _SAME_LIGHT
    normal += np.outer(light, light)
    right += light * float(light[: len(free)] @ known)
    # Four more parameters of each star: the last is the sky, which light of galaxies nearby may change.
    n = len(rows.left)
    own = [sparse.csr_array((slope, (np.arange(n), rows.star)), (n, len(stars.x))) for slope in rows.slopes.T]
    mixed = np.stack([(one.T @ weighted).toarray() for one in own], axis=1)
    theirs = np.zeros((len(stars.x), 4, 4))
    for i, j in np.ndindex(4, 4):
        product = rows.weight * rows.slopes[:, i] * rows.slopes[:, j]
        theirs[:, i, j] = np.bincount(rows.star, product, len(stars.x))
    theirs[:, 3, 3] += 1 / _NEAR_SKY_ERROR**2
    off = np.stack(
        [np.bincount(rows.star, rows.weight * slope * rest, len(stars.x)) for slope in rows.slopes.T], axis=1
    )
    some = np.flatnonzero(stars.kept)
    inverse = np.linalg.inv(theirs[some])
    folded = np.einsum("sij,sjn->sin", inverse, mixed[some])
    normal -= np.tensordot(mixed[some], folded, ([0, 1], [0, 1]))
    right -= np.einsum("sin,si->n", folded, off[some])
    factor = linalg.cho_factor(normal, overwrite_a=True)
    found = linalg.cho_solve(factor, right)
    departure, profile = np.zeros(side * side), model.profile.copy()
    departure[free] = prior[free] * found[: len(free)]
    profile[radial] += np.clip(found[len(free) :], -0.5, 0.5)
    model = replace(model, profile=profile, departure=departure.reshape(side, side))
    by = _width_by(model)
    by = np.concatenate([prior[free] * by[: side * side][free], by[side * side :][radial]])
    return model, float(np.sqrt(max(by @ linalg.cho_solve(factor, by), 0)))


def _light_by(model: Model, reach: float) -> np.ndarray:
    """Change of the light within a radius with the coefficients of the profile, float64, (K,)."""
    along = np.arange(-np.ceil(2 * reach), np.ceil(2 * reach) + 1) / 2
    u, v = (offsets.ravel() for offsets in np.meshgrid(along, along))
    near = np.hypot(u, v) < reach
    return np.asarray(_radial(model, u[near], v[near]).sum(axis=0)).ravel() / 4


def _width_by(model: Model) -> np.ndarray:
    """Relative change of the FWHM with the coefficients of departure and profile, float64, (m² + K,)."""
    x, y = _centre(model)
    along = np.arange(0.02, 1, 0.02) * model.scale
    turn = np.arange(24) * 2 * np.pi / 24
    ring = np.cos(turn), np.sin(turn)
    mean = model(along[:, None] * ring[0] + x, along[:, None] * ring[1] + y).mean(axis=1)
    top = float(model(np.array([x]), np.array([y]))[0])
    half = float(np.interp(-top / 2, -mean, along))
    slope = float(np.interp(half, along, np.gradient(mean, along)))
    u, v = np.append(half * ring[0] + x, x), np.append(half * ring[1] + y, y)
    weight = np.append(np.full(24, -1 / 24), 0.5) / (slope * half)
    change = weight @ bumps(u, v, model.step, len(model.departure)), weight @ _radial(model, u, v)
    return np.concatenate([np.asarray(one).ravel() for one in change])


def _radial(model: Model, u: np.ndarray, v: np.ndarray) -> sparse.csr_matrix:
    """Change of the PSF at offsets with the coefficients of its profile, (N, K)."""
    t = np.clip(log_radius(model.radius(u, v), model.scale), model.knots[0], model.knots[-1])
    return BSpline.design_matrix(t, model.knots, 3).multiply(model.round(u, v)[:, None]).tocsr()


class _Rows(NamedTuple):
    """Pixels of all stars within a radius, in units of the stars' fluxes."""

    splines: sparse.csr_matrix  # values of the B-splines of the departure, (N, m²)
    radial: sparse.csr_matrix  # change of the PSF with the coefficients of its profile, (N, K)
    weight: np.ndarray
    left: np.ndarray  # what the PSF leaves
    slopes: np.ndarray  # the PSF, its slopes along x and y, and a sky of one sigma of the noise, (N, 4)
    star: np.ndarray


def _rows(model: Model, stars: Stars, reach: float, off: np.ndarray | None = None) -> _Rows:
    index, u, v = stars.core(reach)
    near = (np.hypot(u, v) < reach) & stars.good[index] & stars.kept[:, None, None]
    star = np.broadcast_to(np.arange(len(u))[:, None, None], u.shape)[near]
    u, v, flux = u[near], v[near], stars.flux[star]
    psf, small = model(u, v), 0.05 * model.scale
    along_x = (model(u + small, v) - model(u - small, v)) / (2 * small)
    along_y = (model(u, v + small) - model(u, v - small)) / (2 * small)
    weight = flux**2 / (stars.variance[index][near] * stars.correlation**2 + (MODEL_ERROR * flux * psf) ** 2)
    left = (stars.values[index][near] - stars.sky[star]) / flux - psf
    if off is not None:
        left -= (second_derivatives(model, u, v, psf) * off[star]).sum(axis=1)
    splines = bumps(u, v, model.step, len(model.departure))
    slopes = np.stack([psf, along_x, along_y, stars.noise[star] / flux], axis=1)
    return _Rows(splines, _radial(model, u, v), weight, left, slopes, star)


# --- the measurement ----------------------------------------------------------------------------------


def measure_psf(
    stamps: StarStamps,
    fwhm: float,
    correlation: float = 1.0,
    places: np.ndarray | None = None,
    least: int = LEAST_STARS,
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
    least : int
        Number of stars that have to agree.

    Returns
    -------
    EffectivePsf or None
        None if fewer than `least` stars agree on a PSF.
    """
    stars = Stars.of(stamps, correlation)
    if len(stars.x) < least:
        return None
    model, degree, fitted, errors = Model.moffat(fwhm), 0, np.zeros((len(stars.x), 3)), [0.0, 0.0]
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
            shapes, of_shapes = stars.shapes(model)
            degree, fitted = _variation(shapes, places, stars.kept)
            stars.drop_shapes(shapes - fitted, of_shapes, model)
            if stars.kept.any():
                stars.drop_lit(model, least)
        if stars.kept.sum() < least - (turn + 1 < _ROUNDS):
            return None
        if turn < 3:
            model, errors[1] = _with_profile(model, stars)
        if turn >= 2:
            off = fitted - np.median(fitted[stars.kept], axis=0) if degree else None
            model, errors[0] = _with_departure(model, stars, off)
    kept = stars.kept.copy()
    stars.fit(model, 1.0)
    stars.kept &= kept
    if stars.kept.sum() < least:
        return None
    return _finished(model, stars, degree, places, *errors)


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


def _spread(places: np.ndarray) -> bool:
    """Whether stars cover the field: two or more in all but two of its ninths."""
    cell = np.clip(((places + 1) * 1.5).astype(int), 0, 2)
    return int((np.bincount(cell @ [1, 3], minlength=9) >= 2).sum()) >= 7


def _components(model: Model, stars: Stars, places: np.ndarray, degree: int) -> np.ndarray:
    """Coefficients of departures from the model that are polynomials in position, float64, (K, m, m)."""
    reach = min(CORE * model.scale, MOST_DEPARTURE)
    b, _, weight, rest, _, star = _rows(model, stars, reach)
    side = len(model.departure)
    prior = prior_of(model, reach, _PRIOR_VARIED)
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


def _finished(
    model: Model, stars: Stars, degree: int, places: np.ndarray | None, fitted_error: float, light_error: float
) -> EffectivePsf:
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
        error=float(np.hypot(1.25 * scatter / np.sqrt(stars.kept.sum()), fitted_error)),
        light_error=light_error,
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
