"""Noise of images: correlated by drizzling, and of the photons of sources."""

from __future__ import annotations

import math

import numpy as np
from scipy import fft, ndimage


def correlated_noise(rng: np.random.Generator, size: int, autocorrelation: np.ndarray) -> np.ndarray:
    """Normal noise of unit variance with a given autocorrelation.

    Parameters
    ----------
    rng : Generator
    size : int
        Pixels a side.
    autocorrelation : ndarray, float, (K, K)
        Odd K; 1 in the middle.

    Returns
    -------
    ndarray, float32, (size, size)
    """
    reach = autocorrelation.shape[0] // 2
    period = fft.next_fast_len(size + 2 * reach, real=True)
    padded = np.zeros((period, period))
    padded[: 2 * reach + 1, : 2 * reach + 1] = autocorrelation
    power = np.maximum(fft.rfft2(np.roll(padded, (-reach, -reach), axis=(0, 1))).real, 0)
    spectrum = fft.rfft2(rng.standard_normal((period, period), dtype=np.float32))
    noise = fft.irfft2(spectrum * np.sqrt(power).astype(np.float32), (period, period))
    return noise[:size, :size].astype(np.float32)


def tap_of(correlation: float) -> float:
    """The tap of the kernel (tap, 1, tap) that gives white noise a correlation of next neighbours.

    The correlation is 2 tap / (1 + 2 tap^2), which is at most 0.707, where the tap is 0.707, too.

    Parameters
    ----------
    correlation : float
        Of pixels next to each other along an axis. A negative one or NaN, which no tap gives, counts as 0, and
        one above 0.7 as 0.7.

    Returns
    -------
    float
    """
    rho = min(max(correlation, 0.0), 0.7)
    return (1 - math.sqrt(1 - 2 * rho**2)) / (2 * rho) if rho > 0 else 0.0


def photon_noise(model: np.ndarray, gain: float, tap: float, rng: np.random.Generator) -> np.ndarray:
    """The Poisson noise of the sources alone, as drizzling leaves it.

    Parameters
    ----------
    model : ndarray, float, (H, W)
        Noiseless image; negative pixels have no noise.
    gain : float
        Electrons per image unit.
    tap : float
        Drizzling correlates the noise by a kernel proportional to (tap, 1, tap) along each axis.
    rng : Generator

    Returns
    -------
    ndarray, float32, (H, W)
    """
    noise = rng.standard_normal(model.shape, dtype=np.float32)
    noise *= np.sqrt(np.maximum(model, 0) / gain).astype(np.float32)
    kernel = np.array([tap, 1.0, tap], np.float32)
    kernel /= kernel.sum()
    for axis in (0, 1):
        noise = ndimage.correlate1d(noise, kernel, axis, mode="constant")
    return noise
