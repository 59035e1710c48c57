"""The point-spread function: its image, and its width."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from sersicnet.errors import InputError, printable, warn

_ANGLES = 24
_STEPS = 128
_SPLINE = 5
_POWER = 0.6
"""Pixels are interpolated in this power of their value.

A PSF is smoother in it, so a spline follows the core of an undersampled PSF better than in the values themselves.
"""


LEAST_FWHM = 0.5
"""Least full width of a PSF, pixels of the exposure; the pixel itself, which an effective PSF includes, is 1 wide."""

_LEAST_SIDE = 11
"""Least side of a PSF whose rim is looked at for a pedestal, pixels."""

_WINGS = (2.0, 3.0, 5.0)
"""Steepness of the wings of PSFs, the power of the radius that they fall with: least, typical and largest."""

_PEDESTAL = 0.02
"""Least flux of a pedestal in all pixels together, as a fraction of that of the PSF without it."""

_UNCLEAR = 0.1
"""Largest uncertainty of the same flux, from the unknown steepness of the wings, of a pedestal that is subtracted."""


class Width(NamedTuple):
    """Full width at half maximum of an image's PSF.

    Attributes
    ----------
    value : float
        In pixels; NaN if it is not known.
    error : float
        1 sigma; 0 for a file.
    source : str
        Where the width was measured, or why it is not known.
    """

    value: float
    error: float
    source: str


@dataclass(frozen=True, eq=False)
class Psf:
    """An effective PSF: as the image samples it, the pixel included.

    Attributes
    ----------
    name : str
        Of the file, as it was given; or a few words.
    sha256 : str
        Of the pixels.
    image : ndarray, float64, (P, P)
        Unit sum, odd P, centred on the middle pixel.
    oversampling : int
        Pixels of `image` per pixel of the exposure, along an axis.
    """

    name: str
    sha256: str
    image: np.ndarray
    oversampling: int = 1

    @classmethod
    def of(cls, image: np.ndarray, name: str, oversampling: int = 1) -> Psf:
        """A PSF of pixels in memory."""
        return cls(name, hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest(), image, oversampling)

    @property
    def fwhm(self) -> float:
        """Full width at half maximum, pixels of the exposure; see `full_width`."""
        return full_width(self.image, self.oversampling)

    @property
    def width(self) -> Width:
        """The same, with the name of the file as its source."""
        return Width(self.fwhm, 0.0, Path(self.name).name)


def read_psf(path: str | Path, oversampling: int = 1) -> Psf:
    """Read a PSF from a FITS file.

    Parameters
    ----------
    path : str or Path
        FITS image. An extension in brackets, ``file.fits[NAME]``, is read first;
        then one named PSF; then the first image without a name of another kind.
    oversampling : int
        Pixels of the file per pixel of the exposure, along an axis.

    Returns
    -------
    Psf

    Raises
    ------
    InputError
        If the image is not square, has an even number of pixels a side, has pixels that
        are not finite, has no positive sum, does not peak in the middle, or has at its rim what
        may be a pedestal or a wing; or if `oversampling` is below 1 or too large for its width.

    Warns
    -----
    SersicnetWarning
        If a pedestal is subtracted.
    """
    if oversampling < 1:
        raise InputError(f"The oversampling of a PSF is a whole number from 1; received {oversampling}.")
    from sersicnet.image import mosaic  # which needs Astropy; training on datasets does without

    frame = mosaic.read_image(path, kind="psf", least=1)
    image, name = frame.data.astype(float), frame.name
    if image.shape[0] != image.shape[1] or image.shape[0] % 2 == 0:
        raise InputError(
            f"A PSF is square, an odd number of pixels a side, with its centre on the middle one; {name} is "
            f"{image.shape[1]} x {image.shape[0]}. Crop or shift it."
        )
    if not np.isfinite(image).all() or not image.sum() > 0:
        raise InputError(f"A PSF has finite pixels and a positive sum; {name} has the sum {image.sum():g}.")
    peak = np.unravel_index(np.argmax(image), image.shape)
    middle = image.shape[0] // 2
    if max(abs(int(p) - middle) for p in peak) > 1:
        raise InputError(
            f"A PSF has its peak on the middle pixel ({middle}, {middle}); that of {name} is at x = {peak[1]}, "
            f"y = {peak[0]}. Shift it."
        )
    image = _without_pedestal(image, name)
    digest = hashlib.sha256(image.tobytes()).hexdigest()
    psf = Psf(printable(str(path)), digest, image / image.sum(), oversampling)
    if oversampling > 1 and psf.fwhm < LEAST_FWHM:
        raise InputError(
            f"A PSF that includes the pixel is at least {LEAST_FWHM} pixels of the image wide; with an oversampling of "
            f"{oversampling}, that of {name} is {psf.fwhm:.2g}. Correct `psf_oversampling`."
        )
    return psf


def _without_pedestal(image: np.ndarray, name: str) -> np.ndarray:
    """The PSF without a constant that was added to all of its pixels, which its rim shows.

    Raises
    ------
    InputError
        If it is not clear whether the level at the rim is a pedestal or a wing of the PSF, or nothing is left.
    """
    half = len(image) // 2
    if len(image) < _LEAST_SIDE:
        return image
    radius = np.hypot(*np.indices(image.shape) - half) / half
    inner, outer = ((radius >= low) & (radius < low + 0.15) for low in (0.65, 0.85))
    level, step = (float(np.median(image[ring])) for ring in (outer, inner))
    step -= level
    # Where the rings hold a pedestal and a wing, their difference is the wing's, whose steepness gives its level.
    rise = [float(np.median(radius[outer]) / np.median(radius[inner])) ** power - 1 for power in _WINGS]
    least, typical, most = (level - step / more for more in rise)
    spread = float(np.median(np.abs(image[outer] - level)))
    error = 1.858 * spread / np.sqrt(np.count_nonzero(outer))  # of a median: 1.4826 by 1.2533
    rest = image.sum() - typical * image.size
    shares = np.array([least, typical, most]) * image.size / (rest if rest > 0 else image.sum())
    certain = min(abs(shares[0]), abs(shares[2])) if shares[0] * shares[2] > 0 else 0.0
    if certain < _PEDESTAL or abs(level) < 5 * error:
        return image
    what = f"{typical:.3g} in all of its pixels, {100 * shares[1]:.0f} % of the flux of the rest"
    if not rest > 0 or abs(shares[2] - shares[0]) > _UNCLEAR:
        raise InputError(
            f"A PSF falls to zero; {name} has a pedestal of about {what}, which cannot be told from the wings of the "
            "PSF. Subtract its background, or give an image that reaches farther out."
        )
    warn(f"A PSF falls to zero; {name} has a pedestal of {what}, which is subtracted.")
    return image - typical


def full_width(image: np.ndarray, oversampling: int = 1) -> float:
    """Full width at half maximum of a PSF, pixels of the exposure.

    The width is that of the azimuthal mean about the peak, of a quintic spline through
    the pixels (raised to the power 0.6, with their sign). For PSFs that are integrated over
    the pixel, it is within 1 % of the width of the continuous profile: Gaussian and
    Moffat profiles whose FWHM before the integration is 1.2 to 8 pixels, and Airy
    profiles from 1.7 pixels. A narrower Airy profile comes out up to 3 % too narrow,
    because the pixels no longer hold its shape.

    Parameters
    ----------
    image : ndarray, float, (H, W)
        Peaks within a pixel of the middle.
    oversampling : int
        Pixels of `image` per pixel of the exposure, along an axis.

    Returns
    -------
    float
        The width of the image where the profile does not fall to half its maximum.
    """
    image = np.asarray(image, float)
    middle = image.shape[0] // 2, image.shape[1] // 2
    near = image[max(middle[0] - 1, 0) : middle[0] + 2, max(middle[1] - 1, 0) : middle[1] + 2]
    up, right = np.unravel_index(np.argmax(near), near.shape)
    row, column = max(middle[0] - 1, 0) + int(up), max(middle[1] - 1, 0) + int(right)
    centre = row + _vertex(image[:, column], row), column + _vertex(image[row], column)
    # The area above half maximum, in whole pixels, says how far to look.
    guess = np.sqrt((image > image[row, column] / 2).sum() / np.pi) + 1
    while True:
        radii = np.linspace(0, min(2 * guess, min(middle)), _STEPS)
        width = half_width(radii, radial_profile(image, centre, radii))
        if np.isfinite(width):
            return 2 * width / oversampling
        if radii[-1] >= min(middle):
            return 2 * float(radii[-1]) / oversampling
        guess *= 2


def radial_profile(image: np.ndarray, centre: tuple[float, float], radii: np.ndarray) -> np.ndarray:
    """Azimuthal mean of an image, between its pixels; see `full_width`.

    Parameters
    ----------
    image : ndarray, float64, (H, W)
    centre : (float, float)
        Row and column.
    radii : ndarray, float64, (R,)
        Pixels.

    Returns
    -------
    ndarray, float64, (R,)
    """
    powers = np.sign(image) * np.abs(image) ** _POWER
    angles = np.arange(_ANGLES) * 2 * np.pi / _ANGLES
    rows, columns = (
        c + radii[:, None] * turn for c, turn in zip(centre, (np.sin(angles), np.cos(angles)), strict=True)
    )
    between = ndimage.map_coordinates(powers, [rows, columns], order=_SPLINE, mode="mirror")
    return (np.sign(between) * np.abs(between) ** (1 / _POWER)).mean(axis=1)


def half_width(radii: np.ndarray, profile: np.ndarray) -> float:
    """Radius at which a radial profile first falls below half its maximum; NaN if it never does."""
    top = int(np.argmax(profile))
    below = np.flatnonzero(profile[top:] < profile[top] / 2)
    if not len(below):
        return np.nan
    part = slice(top + below[0] - 1, top + below[0] + 1)
    return float(np.interp(-profile[top] / 2, -profile[part], radii[part]))


def _vertex(values: np.ndarray, k: int) -> float:
    """How far from pixel k, the highest of its neighbours, the Gaussian through the three has its peak."""
    if not 0 < k < len(values) - 1 or not (values[k - 1 : k + 2] > 0).all():
        return 0.0
    left, middle, right = np.log(values[k - 1 : k + 2])
    bend = left - 2 * middle + right
    return float(np.clip((left - right) / (2 * bend), -0.5, 0.5)) if bend < 0 else 0.0
