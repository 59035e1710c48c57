"""Stars on their stamps: centre, flux and sky of each, from a model of the PSF, and how they differ from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sersicnet.image.epsfmodel import TO_FWHM, Model

LEAST_STARS = 5
"""Stars that a PSF is measured from at least."""

CORE = 3.0
"""Radius within which stars are fitted, FWHM; where the PSF may vary over the field, too."""

# Of stars, their skies and their pixels.
MODEL_ERROR = 0.01  # of a pixel of a star, as a fraction of its value
_CLIP, _CLIP_MODEL, _CLIP_CENTRE = 5.0, 0.1, 0.1  # sigma, fraction of the value, pixels
SKY_ERROR = 0.03  # of the sky under a star, in units of the noise
CLIP_WINGS, CLIP_WING = 4.0, 0.5  # beyond the core: sigma, fraction of the value
_HALO = 5e-6  # what wings of a star may have in a pixel far out, of its flux
_SKY_CLEAR = 0.03  # from which the sky under a star may differ from that of the image, in units of the noise
_FAINT = 1e-6  # flux of a star without light
_MOVED = 2.0  # pixels that a centre may be from where it was expected
_LEAST_WEIGHT = 0.7  # least share of a star's core that is used
_MISFIT, _MISFIT_RATIO = 0.05, 2.5
_WIDER, _WIDER_SIGMA = 0.03, 3.5
_LIT, _LIT_FROM, _LIT_TO = 0.01, 1.5, 5.0  # excess of light, of the flux, between two radii in FWHM
_CROSS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1))


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


@dataclass(eq=False)
class Stars:
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
    def of(cls, stamps: StarStamps, correlation: float) -> Stars:
        """All stars, with flux 1 at their rough centres; see `sersicnet.image.epsf.measure_psf`."""
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
        """Indices of the pixels of squares about the stars, and their offsets from the centres, (S, m, m).

        The squares end at the borders of the stamps.
        """
        side = self.values.shape[1]
        half = min(int(np.ceil(radius)), (side - 1) // 2)
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
        # The sum under the weight is half the flux of a Gaussian star.
        self.flux = np.where(total > 0, 2 * total, _FAINT)

    def evaluated(self, model: Model) -> Evaluated:
        """The PSF and its slopes at the pixels of the cores of all stars, about their present centres."""
        index, u, v = self.core(CORE * model.scale)
        small = 0.05 * model.scale
        along_x = (model(u + small, v) - model(u - small, v)) / (2 * small)
        along_y = (model(u, v + small) - model(u, v - small)) / (2 * small)
        return Evaluated(index, u, v, model(u, v), along_x, along_y, np.hypot(u, v) < CORE * model.scale)

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
        weight = at.inside * good / (variance * self.correlation**2 + (MODEL_ERROR * star) ** 2)
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

    def drop_lit(self, model: Model, least: int = LEAST_STARS) -> None:
        """Drop the stars in the light of other sources: those with more light about the core than the others.

        None is dropped if fewer than `least`, or than half of the stars, would be left.
        """
        index, u, v = self.core(_LIT_TO * model.scale)
        r = np.hypot(u, v)
        there = (r > _LIT_FROM * model.scale) & (r < _LIT_TO * model.scale) & self.good[index]
        flux = np.maximum(self.flux, _FAINT)
        star = flux[:, None, None] * model(u, v)
        left = self.values[index] - self.sky[:, None, None] - star
        there &= np.abs(left) < CLIP_WINGS * np.sqrt(self.variance[index] + (CLIP_WING * star) ** 2)
        number = np.maximum(there.sum((1, 2)), 1)
        area = np.pi * (_LIT_TO**2 - _LIT_FROM**2) * model.scale**2
        light = area * np.where(there, left, 0).sum((1, 2)) / number / flux
        error = area * self.noise * self.correlation / np.sqrt(number) / flux
        # Other sources only add light: the scatter is that of the stars with less of it than most.
        off = (light - np.median(light[self.kept])) / np.maximum(error, _LIT / 3)
        limit = 3 * max(1.4826 * float(np.median(np.abs(off[self.kept & (off <= 0)]))), 1)
        clear = self.kept & (off < limit)
        if clear.sum() >= max(least, self.kept.sum() / 2):
            self.kept = clear

    def shapes(self, model: Model) -> tuple[np.ndarray, np.ndarray]:
        """Width and two ellipticities of each star less those of the PSF, and their errors, float64, (S, 3).

        They are the amplitudes of second derivatives of the PSF, which a change of the second moments by so many
        pixels squared gives.
        """
        at = self.evaluated(model)
        flux, middle = self.flux[:, None, None], at.psf
        basis = np.stack([middle, -at.along_x, -at.along_y, np.ones_like(middle)], axis=-1)
        basis = np.concatenate([basis, second_derivatives(model, at.u, at.v, middle) * flux[..., None]], axis=-1)
        star = flux * middle
        variance = self.variance[at.pixels] * self.correlation**2 + (MODEL_ERROR * star) ** 2
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
            clear = max(_SKY_CLEAR, 3 * self.correlation / np.sqrt(used.sum()))
            if abs(level) > clear * self.noise[s] + _HALO * self.flux[s]:
                self.sky[s] = level

    @property
    def sky_error(self) -> np.ndarray:
        """How far the sky under each star may be off, (S,).

        It is a fraction of the noise under most stars; where it is more, the star itself shows it.
        """
        return np.maximum(SKY_ERROR * self.noise, 0.3 * np.abs(self.sky))


def _level(values: np.ndarray, noise: float) -> float:
    """Mean of values without outliers."""
    return float(values[np.abs(values - np.median(values)) < 2.5 * noise].mean())


def second_derivatives(model: Model, u: np.ndarray, v: np.ndarray, psf: np.ndarray) -> np.ndarray:
    """How a PSF changes with its second moments, see `Stars.shapes`, (..., 3); `psf` is its values at the offsets."""
    wide = 0.15 * model.scale
    right, left, up, down, *corners = (model(u + a * wide, v + b * wide) for a, b in _CROSS)
    in_x, in_y = (right + left - 2 * psf) / wide**2, (up + down - 2 * psf) / wide**2
    mixed = (corners[0] + corners[1] - corners[2] - corners[3]) / (4 * wide**2)
    return np.stack([0.5 * (in_x + in_y), 0.5 * (in_x - in_y), mixed], axis=-1)


class Evaluated(NamedTuple):
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


def scatter_of(values: np.ndarray) -> np.ndarray:
    """Standard deviation of each column, from the median of the deviations."""
    return np.asarray(1.4826 * np.median(np.abs(values - np.median(values, axis=0)), axis=0))
