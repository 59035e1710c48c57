"""Telescopes whose images are simulated: pixel scale, zero point, PSF and noise.

GalSim, which draws the PSF, is imported where it is needed: training on a machine
without it can draw galaxies with the PSFs that a dataset holds.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sersicnet.errors import WeightsError, first_line

PSF_SIZE = 167


@dataclass(frozen=True)
class Instrument:
    """Pixel scale, zero point, PSF and noise of a set of images.

    Attributes
    ----------
    name : str
    pixel_scale : float
        Arcseconds per pixel.
    zero_point : float
        AB magnitude of one image unit (electron/s).
    exposure : float
        Seconds: sets the Poisson noise of the sources themselves.
    rms_low, rms_high : float
        Noise of a blank pixel; stamps draw it log-uniformly in between.
    sky_residual : float
        Standard deviation of the sky left after subtraction, in units of rms.
    noise_tap : float
        Drizzled noise is white noise convolved with (tap, 1, tap) along both
        axes; the correlation of next neighbours is 2 tap / (1 + 2 tap**2).
    wavelength, aperture, obscuration : float
        Of the PSF's core: nm, m, and the linear fraction of the aperture.
    pixels : tuple of float
        Side lengths of the square boxes (detector pixel, drizzle drop, output
        pixel) that widen the core, arcsec.
    blur : float
        Standard deviation of a Gaussian that widens the core further, arcsec.
    halo_fraction, halo_scale, halo_beta : float
        A Moffat profile that holds the PSF's wings: its share of the light, its
        scale radius in arcsec, and its exponent.
    noise_passes : int
        How often the noise is convolved with the taps: twice where pixels are a small
        fraction of the detector's.
    sky_slope : float
        Standard deviation of the slope of the sky that is left, along each axis, in units
        of rms per 20 pixels: haloes of bright galaxies, and what a mesh does not follow.
    """

    name: str
    pixel_scale: float
    zero_point: float
    exposure: float
    rms_low: float
    rms_high: float
    sky_residual: float
    noise_tap: float
    wavelength: float
    aperture: float
    obscuration: float
    pixels: tuple[float, ...]
    blur: float
    halo_fraction: float
    halo_scale: float
    halo_beta: float
    noise_passes: int = 1
    sky_slope: float = 0.0

    def noise_kernel(self) -> np.ndarray:
        """What white noise is convolved with along each axis, float64, (2 noise_passes + 1,); of unit sum."""
        taps = np.array([self.noise_tap, 1.0, self.noise_tap])
        taps /= taps.sum()
        return functools.reduce(np.convolve, [taps] * self.noise_passes)

    @property
    def correlation(self) -> float:
        """Noise of a large aperture over that of uncorrelated pixels with the same rms."""
        return float(1 / (self.noise_kernel() ** 2).sum())

    def autocorrelation(self) -> np.ndarray:
        """Of the noise of blank pixels, by lag along y and x, float64, (K, K); 1 in the middle."""
        kernel = self.noise_kernel()
        line = np.convolve(kernel, kernel)
        line /= line.max()  # exactly 1 in the middle, and so is the product
        return np.outer(line, line)


F160W = Instrument(
    name="HST WFC3/IR F160W, drizzled to 0.06 arcsec",
    pixel_scale=0.06,
    zero_point=25.9463,
    exposure=3200.0,
    # CANDELS wide and deep fields: GOODS 0.0022, EGS 0.0036, UDS 0.0055.
    rms_low=0.002,
    rms_high=0.006,
    sky_residual=0.03,
    # Measured on blank sky of the same fields: 0.50-0.56 at lag 1, 0.05-0.10 at lag 2.
    noise_tap=0.31,
    wavelength=1537.0,
    aperture=2.4,
    obscuration=0.33,
    pixels=(0.128, 0.1024, 0.06),
    # Fitted to the CANDELS hybrid F160W PSF of van der Wel et al. (2012).
    blur=0.025,
    halo_fraction=0.271,
    halo_scale=0.234,
    halo_beta=1.6,
)


def effective_psf(instrument: Instrument, size: int = PSF_SIZE, stretch: float = 1.0) -> np.ndarray:
    """The PSF as the image samples it, pixel included.

    Parameters
    ----------
    instrument : Instrument
    size : int
        Odd number of pixels a side.
    stretch : float
        Factor on its width.

    Returns
    -------
    ndarray, float64, (size, size)
        Unit sum, centred on the middle pixel.
    """
    import galsim

    core = [galsim.Airy(lam=instrument.wavelength, diam=instrument.aperture, obscuration=instrument.obscuration)]
    core += [galsim.Pixel(side) for side in instrument.pixels]
    core.append(galsim.Gaussian(sigma=instrument.blur))
    halo = galsim.Moffat(beta=instrument.halo_beta, scale_radius=instrument.halo_scale)
    psf = (1 - instrument.halo_fraction) * galsim.Convolve(core) + instrument.halo_fraction * halo
    if stretch != 1:
        psf = psf.dilate(stretch)
    image = psf.drawImage(nx=size, ny=size, scale=instrument.pixel_scale, method="no_pixel", dtype=float).array
    return image / image.sum()


def training_psf(trained_on: Mapping[str, Any]) -> np.ndarray:
    """The effective PSF of the instrument that a card of weights states.

    Parameters
    ----------
    trained_on : mapping
        The fields of an `Instrument`, as the card lists them.

    Returns
    -------
    ndarray, float64, (size, size)
        As of `effective_psf`.

    Raises
    ------
    WeightsError
        If they describe no instrument.
    """
    try:
        image = effective_psf(Instrument(**{**trained_on, "pixels": tuple(trained_on["pixels"])}))
    except Exception as error:  # GalSim raises several kinds
        raise WeightsError(
            f"The instrument on the card of the weights has no PSF: {first_line(error)} Give `psf`."
        ) from error
    if not np.isfinite(image).all():
        raise WeightsError("The instrument on the card of the weights has no PSF: it is not finite. Give `psf`.")
    return image
