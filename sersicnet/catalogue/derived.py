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


def quantiles(targets: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Quantiles of the targets, float64, (N, 4, 3): those of `sersicnet.schema.QUANTILES`.

    Parameters
    ----------
    targets, errors : ndarray, float64, (N, 4)
        The magnitude is normal, radius and index are log-normal, and the ellipticity is normal between 0 and 1.
    """
    shares = np.array(QUANTILES) / 100
    out = np.empty((*targets.shape, len(shares)))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        for i, target in enumerate(TARGETS):
            value, error, score = targets[:, i, None], errors[:, i, None], special.ndtri(shares)
            out[:, i] = value * np.exp(score * error / value) if target.log else value + score * error
    out[:, 3] = _cut_normal(targets[:, 3], errors[:, 3], shares)
    return out


def _cut_normal(peak: np.ndarray, error: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Quantiles of normal distributions between 0 and 1, (N, K)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = special.ndtr(-peak / error)[:, None], special.ndtr((1 - peak) / error)[:, None]
        return np.clip(peak[:, None] + error[:, None] * special.ndtri(low + shares * (high - low)), 0, 1)
