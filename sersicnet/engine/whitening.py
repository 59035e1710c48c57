"""Whitening: what fits compare with a model is free of the correlation that drizzling gives the noise."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import fft, ndimage

from sersicnet.engine.render import Renderer

WHITENING_WIDTH = 5
"""Width of the square of pixels that whitening noticeably mixes."""


class Frame:
    """A window size with its renderer and its whitening filter.

    Parameters
    ----------
    psf : ndarray, float, (P, P)
        Effective PSF; see `sersicnet.engine.render.Renderer`.
    correlation : ndarray, float, (2r + 1, 2r + 1)
        Autocorrelation of blank pixels, 1 in the middle.
    size : int
        Side of the window, pixels.
    oversampling : int
        Number of pixels of `psf` along a pixel of the image.
    """

    def __init__(self, psf: np.ndarray, correlation: np.ndarray, size: int, oversampling: int) -> None:
        self.size = size
        self.render = Renderer(psf, size, oversampling)
        # The padding keeps the whitening filter from wrapping around the edges of the window.
        self.period = fft.next_fast_len(size + 16, real=True)
        middle = correlation.shape[0] // 2
        padded = np.zeros((self.period, self.period))
        padded[: 2 * middle + 1, : 2 * middle + 1] = correlation
        power = fft.rfft2(np.roll(padded, (-middle, -middle), axis=(0, 1))).real
        self.whitener = (1 / np.sqrt(np.maximum(power, 1e-3 * power.max()))).astype(np.float32)


class Cutout(NamedTuple):
    """The data of one galaxy in a window.

    Attributes
    ----------
    data, rms : ndarray, float32, (S, S)
        Pixels, and the noise of a blank pixel, image units.
    inverse_rms : ndarray, float32, (S, S)
        0 where masked.
    counted : ndarray, float32, (S, S)
        1 for pixels that a fit uses. It excludes pixels next to masked ones and to the edge, because
        whitening mixes neighbouring pixels.
    unit : float
        Median rms, the unit of the sky.
    """

    data: np.ndarray
    rms: np.ndarray
    inverse_rms: np.ndarray
    counted: np.ndarray
    unit: float

    @classmethod
    def of(cls, data: np.ndarray, rms: np.ndarray, used: np.ndarray, unit: float, correlated: bool) -> Cutout:
        """The cutout of a window of a stamp, of which the pixels `used`, bool, have data."""
        counted = used
        if correlated and used.all():
            counted = np.zeros_like(used)
            counted[WHITENING_WIDTH // 2 : -(WHITENING_WIDTH // 2), WHITENING_WIDTH // 2 : -(WHITENING_WIDTH // 2)] = (
                True
            )
        elif correlated:
            counted = ndimage.binary_erosion(used, np.ones((WHITENING_WIDTH,) * 2))
        inverse_rms = np.where(used, 1 / rms, 0).astype(np.float32)
        return cls(data.astype(np.float32), rms.astype(np.float32), inverse_rms, counted.astype(np.float32), unit)

    def whitened(self, frame: Frame, images: np.ndarray) -> np.ndarray:
        """Whitened images in units of the sky's noise, (n, P); masked pixels and their neighbours are 0."""
        padded = (frame.period, frame.period)
        # Division by the rms makes noise that varies over the stamp stationary, as whitening assumes.
        spectra = fft.rfft2(images * self.inverse_rms, padded)
        spectra *= frame.whitener
        white = fft.irfft2(spectra, padded)[:, : frame.size, : frame.size] * self.counted
        return white.reshape(len(images), -1)
