r"""Fit Sersic profiles to stamps: Levenberg-Marquardt with the noise whitened.

The noise of a drizzled image is correlated: it is independent noise, convolved
with a kernel. Its power spectrum, measured on blank sky, is one more factor in
Fourier space: divided by its square root, residuals are independent again, and
the sum of their squares is a likelihood whose errors mean what they say. The
Poisson noise of the source belongs to the independent noise before the kernel,
and is computed from the model, since a variance taken from noisy data favours
pixels that are low by chance.

Bounded parameters are fitted through transforms, so that no step leaves them.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import fft, linalg, ndimage

from sersicnet.errors import InputError
from sersicnet.render import N_PARAMETERS, Renderer

N_BOUNDS = (0.3, 8.0)
Q_BOUNDS = (0.02, 1.0)
R_BOUNDS = (0.05, 1000.0)
_EDGE = 1e-3
"""How near, as a fraction of the range, a start or a result may come to a bound."""


_MIXED = 5
"""Width of the square of pixels that whitening noticeably mixes."""


class Status(enum.IntEnum):
    """How a fit ended."""

    CONVERGED = 0
    NOT_CONVERGED = 1
    AT_BOUND = 2
    NO_DATA = 3
    BAD_START = 4


@dataclass(frozen=True)
class Noise:
    """The noise of an image.

    Attributes
    ----------
    correlation : ndarray, float, (2r + 1, 2r + 1)
        Autocorrelation of blank pixels, 1 in the middle; ``[[1]]`` for white noise.
    gain : float
        Detected electrons per image unit, for the Poisson noise of the sources
        (the exposure time, where the unit is electron/s); inf for none.
    """

    correlation: np.ndarray
    gain: float = np.inf


class Fits(NamedTuple):
    """Results of `Fitter`, one row a galaxy.

    Attributes
    ----------
    parameters : ndarray, float64, (N, 7)
        As for `sersicnet.render.Renderer`: x, y, flux, effective radius, index,
        axis ratio, angle. NaN where nothing was fitted.
    sky : ndarray, float64, (N,)
        Level under the galaxy, image units.
    covariance : ndarray, float64, (N, 8, 8)
        Of the seven parameters and the sky. NaN where it is not defined.
    chi2 : ndarray, float64, (N,)
        Reduced chi-square of the whitened residuals.
    iterations : ndarray, int, (N,)
    status : ndarray, int, (N,)
        Values of `Status`.
    """

    parameters: np.ndarray
    sky: np.ndarray
    covariance: np.ndarray
    chi2: np.ndarray
    iterations: np.ndarray
    status: np.ndarray


class Fitter:
    """Fits stamps that share a PSF and a noise.

    Parameters
    ----------
    psf : ndarray, float, (P, P)
        Effective PSF; see `sersicnet.render.Renderer`.
    noise : Noise
    size : int
        Width and height of the stamps in pixels.
    max_iterations : int
    tolerance : float
        Change of chi-square below which a fit has converged.

    Raises
    ------
    InputError
        If the PSF or the noise cannot be used.
    """

    def __init__(
        self, psf: np.ndarray, noise: Noise, size: int, *, max_iterations: int = 60, tolerance: float = 1e-2
    ) -> None:
        correlation = np.asarray(noise.correlation, dtype=float)
        middle = correlation.shape[0] // 2
        if correlation.ndim != 2 or correlation.shape != (2 * middle + 1,) * 2 or correlation[middle, middle] != 1:
            raise InputError(
                "An autocorrelation is a square array of odd size with 1 in the middle; "
                f"received shape {correlation.shape}."
            )
        if not noise.gain > 0:
            raise InputError(f"A gain is positive; received {noise.gain}.")
        self.render = Renderer(psf, size)
        self.noise, self.size = noise, size
        self.max_iterations, self.tolerance = max_iterations, tolerance
        # Whitening leaks over the stamp's edge as far as its filter reaches.
        self._period = fft.next_fast_len(size + 32, real=True)
        padded = np.zeros((self._period, self._period))
        padded[: 2 * middle + 1, : 2 * middle + 1] = correlation
        power = fft.rfft2(np.roll(padded, (-middle, -middle), axis=(0, 1))).real
        self._whitener = (1 / np.sqrt(np.maximum(power, 1e-3 * power.max()))).astype(np.float32)
        self._independent = float(correlation.sum())

    def __call__(self, stamps: np.ndarray, rms: np.ndarray, start: np.ndarray, masks: np.ndarray | None = None) -> Fits:
        """Fit galaxies, each alone.

        Parameters
        ----------
        stamps : ndarray, float, (N, size, size)
            Image units, sky nearly subtracted. Pixels that are not finite are
            masked.
        rms : ndarray, float, (N,)
            Noise of a blank pixel around each galaxy, image units.
        start : ndarray, float, (N, 7)
            Parameters to start from.
        masks : ndarray, bool, (N, size, size), optional
            Pixels to ignore.

        Returns
        -------
        Fits
        """
        n = len(stamps)
        out = Fits(
            np.full((n, N_PARAMETERS), np.nan),
            np.full(n, np.nan),
            np.full((n, N_PARAMETERS + 1, N_PARAMETERS + 1), np.nan),
            np.full(n, np.nan),
            np.zeros(n, int),
            np.full(n, int(Status.NO_DATA)),
        )
        for i in range(n):
            used = np.isfinite(stamps[i])
            if masks is not None:
                used &= ~masks[i]
            if used.sum() < 10 * (N_PARAMETERS + 1) or not (np.isfinite(rms[i]) and rms[i] > 0):
                continue
            if not (np.isfinite(start[i]).all() and start[i, 2] > 0 and start[i, 3] > 0):
                out.status[i] = Status.BAD_START
                continue
            counted = used
            if self.noise.correlation.size > 1:
                counted = ndimage.binary_erosion(used, np.ones((_MIXED, _MIXED)))
            data = np.where(used, stamps[i], 0).astype(np.float32)
            self._fit(out, i, _Galaxy(data, used, counted, float(rms[i])), start[i])
        return out

    def _fit(self, out: Fits, i: int, galaxy: _Galaxy, start: np.ndarray) -> None:
        """Fit one galaxy and put the result into row `i`."""
        free = np.append(_to_free(start), 0.0)
        damping, status, iterations = 1e-3, Status.NOT_CONVERGED, 0
        residual, jacobian, variance = self._linearised(galaxy, free)
        chi2 = float(residual @ residual)
        while iterations < self.max_iterations and status is Status.NOT_CONVERGED:
            iterations += 1
            normal, scale = _normal(jacobian)
            normal[np.diag_indices_from(normal)] += damping
            step = linalg.lstsq(normal, (jacobian @ residual) / scale, check_finite=False)[0] / scale
            trial = free + np.clip(step, -_LONGEST_STEP, _LONGEST_STEP)
            # With the variance of the last accepted model, so that both chi-squares compare.
            tried = self._residual(galaxy, trial, variance)
            gained = chi2 - float(tried @ tried)
            if gained >= 0:
                free, damping = trial, max(damping / 10, 1e-7)
                residual, jacobian, variance = self._linearised(galaxy, free)
                chi2 = float(residual @ residual)
                if gained < self.tolerance:
                    status = Status.CONVERGED
            else:
                damping *= 10
                if damping > 1e8:
                    status = Status.CONVERGED
        parameters = _from_free(free)
        if status is Status.CONVERGED and _at_bound(parameters):
            status = Status.AT_BOUND
        out.parameters[i], out.sky[i] = parameters, free[-1] * galaxy.rms
        out.parameters[i, 6] = (out.parameters[i, 6] + 90) % 180 - 90
        out.chi2[i] = chi2 / max(1.0, float(galaxy.counted.sum()) - len(free))
        out.iterations[i], out.status[i] = iterations, status
        normal, scale = _normal(jacobian)
        if np.linalg.cond(normal) < 1e12:
            slopes = np.append(_slopes(free), galaxy.rms) / scale
            out.covariance[i] = linalg.inv(normal) * slopes[:, None] * slopes

    def _residual(self, galaxy: _Galaxy, free: np.ndarray, variance: np.ndarray) -> np.ndarray:
        """Whitened difference of data and model, (P,)."""
        model = self.render(_from_free(free))[0] + np.float32(free[-1] * galaxy.rms)
        return self._whitened(galaxy, (galaxy.data - model)[None], variance)[0]

    def _linearised(self, galaxy: _Galaxy, free: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Whitened residuals (P,), the model's derivatives (8, P), and the variance over the sky's."""
        model, derivatives = (a[0] for a in self.render.with_derivatives(_from_free(free)))
        images = np.empty((2 + N_PARAMETERS, self.size, self.size), np.float32)
        images[0] = galaxy.data - model - np.float32(free[-1] * galaxy.rms)
        images[1:-1] = derivatives * _slopes(free).astype(np.float32)[:, None, None]
        images[-1] = galaxy.rms
        of_sky = galaxy.rms**2 * self._independent
        variance = 1 + np.maximum(model, 0) / np.float32(self.noise.gain * of_sky)
        white = self._whitened(galaxy, images, variance)
        return white[0], white[1:], variance

    def _whitened(self, galaxy: _Galaxy, images: np.ndarray, variance: np.ndarray) -> np.ndarray:
        """Images in units of independent noise, (n, P); masked pixels and their neighbours are 0."""
        padded = (self._period, self._period)
        spectra = fft.rfft2(images * galaxy.used, padded)
        spectra *= self._whitener
        white = fft.irfft2(spectra, padded)[:, : self.size, : self.size]
        white *= galaxy.counted / (np.float32(galaxy.rms) * np.sqrt(variance))
        return white.reshape(len(images), -1).astype(float)


class _Galaxy(NamedTuple):
    """The data of one galaxy.

    `counted` leaves out the pixels next to masked ones, and to the edge: whitening
    mixes neighbours.
    """

    data: np.ndarray
    used: np.ndarray
    counted: np.ndarray
    rms: float


def _normal(jacobian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Normal matrix with a unit diagonal, and the scale of each parameter."""
    normal = jacobian @ jacobian.T
    scale = np.sqrt(np.maximum(np.diag(normal), 1e-30))
    return normal / scale / scale[:, None], scale


# --- transforms: x, y, log flux, log radius, logit of log index, logit of axis ratio, angle, sky --------

_LONGEST_STEP = np.array([3, 3, 1, 1, 1.5, 1.5, 30, 5.0])


def _logit(value: float, low: float, high: float) -> float:
    fraction = np.clip((value - low) / (high - low), _EDGE, 1 - _EDGE)
    return float(np.log(fraction / (1 - fraction)))


def _expit(free: float, low: float, high: float) -> float:
    return float(low + (high - low) / (1 + np.exp(-np.clip(free, -20, 20))))


_LOG_N = tuple(np.log(N_BOUNDS))


def _to_free(parameters: np.ndarray) -> np.ndarray:
    x, y, flux, r_eff, n, q, theta = parameters
    return np.array(
        [
            x,
            y,
            np.log(flux),
            np.log(np.clip(r_eff, *R_BOUNDS)),
            _logit(np.log(max(n, 1e-3)), *_LOG_N),
            _logit(q, *Q_BOUNDS),
            theta,
        ]
    )


def _from_free(free: np.ndarray) -> np.ndarray:
    return np.array(
        [
            free[0],
            free[1],
            np.exp(min(free[2], 80)),
            np.clip(np.exp(min(free[3], 50)), *R_BOUNDS),
            np.clip(np.exp(_expit(free[4], *_LOG_N)), *N_BOUNDS),
            _expit(free[5], *Q_BOUNDS),
            free[6],
        ]
    )


def _slopes(free: np.ndarray) -> np.ndarray:
    """Derivative of each parameter with respect to its free one."""
    parameters = _from_free(free)
    log_n, q = np.log(parameters[4]), parameters[5]
    width_n, width_q = _LOG_N[1] - _LOG_N[0], Q_BOUNDS[1] - Q_BOUNDS[0]
    return np.array(
        [
            1,
            1,
            parameters[2],
            parameters[3],
            parameters[4] * (log_n - _LOG_N[0]) * (_LOG_N[1] - log_n) / width_n,
            (q - Q_BOUNDS[0]) * (Q_BOUNDS[1] - q) / width_q,
            1,
        ]
    )


def _at_bound(parameters: np.ndarray) -> bool:
    """Whether index, thinness or radius ran into its bound; round galaxies are no failure."""
    log_n, q, r_eff = np.log(parameters[4]), parameters[5], parameters[3]
    from_bound = min(log_n - _LOG_N[0], _LOG_N[1] - log_n) / (_LOG_N[1] - _LOG_N[0])
    return bool(from_bound < _EDGE or q - Q_BOUNDS[0] < _EDGE or r_eff in R_BOUNDS)
