"""Quantities that follow from magnitude, effective radius, Sersic index and ellipticity with their covariance.

Everywhere, the errors of the effective radius and the index are those of normal distributions of their logarithms, as
networks learn them: the relative error is the standard deviation of the natural logarithm.
"""

from __future__ import annotations

import numpy as np
from scipy import special

from sersicnet.schema import QUANTILES, TARGETS
from sersicnet.weights import PAIRS

A_MAGNITUDE = 2.5 / np.log(10)
"""Magnitudes of a relative change of flux."""

LIMIT = 3.0
"""An upper limit is this many times the error of a flux."""

_WIDEST = 0.99
"""Largest variance of an ellipticity, in units of that of one which is either 0 or 1."""


def flux_of(mag: np.ndarray, mag_err: np.ndarray, zero_point: float) -> tuple[np.ndarray, np.ndarray]:
    """Fluxes of magnitudes, and their errors, in image units.

    A magnitude with a normal error is a flux with a log-normal one: the flux is its median, and the error the
    relative one, ``flux * mag_err * ln(10) / 2.5``.
    """
    flux = 10 ** (-0.4 * (mag - zero_point))
    return flux, flux * mag_err / A_MAGNITUDE


def upper_limit(flux: np.ndarray, flux_err: np.ndarray, zero_point: float) -> np.ndarray:
    """Magnitude of three times the error of a flux, float64, (N,); NaN where the flux is not below that."""
    with np.errstate(invalid="ignore", divide="ignore"):
        limit = LIMIT * flux_err
        return np.where((flux < limit) & (limit > 0), zero_point - 2.5 * np.log10(limit), np.nan)


def mean_surface_brightness(
    targets: np.ndarray, errors: np.ndarray, correlations: np.ndarray, pixel_scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mean surface brightness within the ellipse of the effective radius, which holds half of the light.

    Parameters
    ----------
    targets, errors : ndarray, float64, (N, 4)
        Magnitude, effective radius [pix], Sersic index, ellipticity, and their 1 sigma errors.
    correlations : ndarray, float64, (N, 6)
        Of the errors, as in `sersicnet.weights.Prediction`.
    pixel_scale : float
        Arcsec per pixel.

    Returns
    -------
    brightness, error : ndarray, float64, (N,)
        In mag/arcsec2. The error is NaN where the correlations are not known: magnitude and radius are strongly
        correlated.
    """
    mag, r_eff, _, e = targets.T
    with np.errstate(invalid="ignore", divide="ignore"):
        brightness = mag + 2.5 * np.log10(2 * np.pi * (1 - e) * (r_eff * pixel_scale) ** 2)
        slopes = np.column_stack(
            [np.ones(len(mag)), 2 * A_MAGNITUDE / r_eff, np.zeros(len(mag)), -A_MAGNITUDE / (1 - e)]
        )
        own = slopes * errors
        first, second = PAIRS
        variance = np.sum(own**2, axis=1) + 2 * np.sum(own[:, first] * own[:, second] * correlations, axis=1)
        return brightness, np.sqrt(variance)


def quantiles(targets: np.ndarray, errors: np.ndarray, fitted: np.ndarray) -> np.ndarray:
    """Quantiles of the targets, float64, (N, 4, 3): those of `sersicnet.schema.QUANTILES`.

    Parameters
    ----------
    targets, errors : ndarray, float64, (N, 4)
    fitted : ndarray, bool, (N,)
        Whether a row is of a fit. The ellipticity and its error are the mean and the standard deviation of a
        network's posterior, for which a beta distribution from 0 to 1 is taken. Those of a fit are the peak and the
        width of a likelihood, which is taken as normal and cut at 0 and 1.
    """
    shares = np.array(QUANTILES) / 100
    out = np.empty((*targets.shape, len(shares)))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        for i, target in enumerate(TARGETS):
            value, error, score = targets[:, i, None], errors[:, i, None], special.ndtri(shares)
            out[:, i] = value * np.exp(score * error / value) if target.log else value + score * error
    e, error = targets[:, 3], errors[:, 3]
    out[:, 3] = np.where(fitted[:, None], _cut_normal(e, error, shares), _beta(e, error, shares))
    return out


def _beta(mean: np.ndarray, error: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Quantiles of the beta distributions with these means and standard deviations, (N, K)."""
    mean = np.clip(mean, 1e-4, 1 - 1e-4)
    largest = mean * (1 - mean)
    with np.errstate(invalid="ignore", divide="ignore"):
        size = largest / np.minimum(error**2, _WIDEST * largest) - 1
        return np.asarray(special.betaincinv((mean * size)[:, None], ((1 - mean) * size)[:, None], shares))


def _cut_normal(peak: np.ndarray, error: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Quantiles of normal distributions between 0 and 1, (N, K)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = special.ndtr(-peak / error)[:, None], special.ndtr((1 - peak) / error)[:, None]
        return np.clip(peak[:, None] + error[:, None] * special.ndtri(low + shares * (high - low)), 0, 1)
