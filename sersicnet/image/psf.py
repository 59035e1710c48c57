"""The point spread function of an image."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sersicnet.errors import InputError


class Width(NamedTuple):
    """Full width at half maximum of an image's PSF.

    Attributes
    ----------
    value : float
        In pixels; NaN if nothing can be said.
    error : float
        1 sigma; 0 for a file.
    source : str
        Where it is from, or why there is none.
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
    sha256 : str
        Of the pixels.
    image : ndarray, float64, (P, P)
        Unit sum, odd P, centred on the middle pixel.
    oversampling : int
        How many times finer than the image its pixels are.
    """

    name: str
    sha256: str
    image: np.ndarray
    oversampling: int = 1

    @classmethod
    def of(cls, image: np.ndarray, name: str, oversampling: int = 1) -> Psf:
        """From pixels."""
        return cls(name, hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest(), image, oversampling)

    @property
    def fwhm(self) -> float:
        """Full width at half maximum, image pixels."""
        return full_width(self.image, self.oversampling)

    @property
    def width(self) -> Width:
        """The full width as that of an image."""
        return Width(self.fwhm, 0.0, Path(self.name).name)


def full_width(psf: np.ndarray, oversampling: int = 1) -> float:
    """Full width at half maximum of a PSF's azimuthal mean, in pixels."""
    half = psf.shape[0] // 2
    y, x = np.indices(psf.shape) - half
    radii, which = np.unique(np.hypot(x, y).round(3), return_inverse=True)
    which = which.ravel()
    profile = np.bincount(which, psf.ravel()) / np.bincount(which)
    top = int(np.argmax(profile))
    below = np.flatnonzero(profile[top:] < profile[top] / 2)
    if not len(below):
        return 2 * float(radii[-1]) / oversampling
    part = slice(top + below[0] - 1, top + below[0] + 1)
    return 2 * float(np.interp(-profile[top] / 2, -profile[part], radii[part])) / oversampling


def read_psf(path: str | Path, oversampling: int = 1) -> Psf:
    """Read a PSF from a FITS file.

    Parameters
    ----------
    path : str or Path
        Image at the pixel scale of the simulation; an extension named PSF, or
        the first image, or the one in brackets, ``file.fits[NAME]``.

    Returns
    -------
    Psf

    Raises
    ------
    InputError
        If it is not square and of odd size, has pixels that are not finite or
        no positive sum, or does not have its peak in the middle.
    """
    from sersicnet.image import mosaic  # which needs Astropy; training on datasets does without

    frame = mosaic.read_image(path, prefer=("PSF",), least=1)
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
    return Psf(str(path), hashlib.sha256(image.tobytes()).hexdigest(), image / image.sum(), oversampling)
