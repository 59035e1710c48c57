"""The PSF of an image with few stars, which the usual PSF of its instrument confirms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy import ndimage

from sersicnet.errors import InputError
from sersicnet.image.epsf import measure_psf
from sersicnet.image.psf import Psf
from sersicnet.image.starpsf import ImagePsf
from sersicnet.image.stars import FEW_STARS

_DISAGREE = 3.0  # sigma by which the width of the stars may differ from the usual one


def confirmed(found: ImagePsf, usual: Psf) -> ImagePsf:
    """The PSF of the few stars of an image, if it is about as wide as the usual PSF of the instrument.

    Few sources that agree may be galaxies. Those that are as wide as the PSF of the instrument are stars. The width of
    the result is the mean of both widths, weighted by their errors.

    Parameters
    ----------
    found : ImagePsf
        Without a PSF; its `few` has the stars.
    usual : Psf
        Its `error` states how well the usual width is known.

    Returns
    -------
    ImagePsf
        `found` itself if fewer than `sersicnet.image.stars.FEW_STARS` stars or half of them agree on a PSF, or if its
        width is not the usual one.
    """
    if found.few is None or found.psf is not None:
        return found
    least = max(FEW_STARS, (len(found.few.x) + 1) // 2)
    measured = measure_psf(found.few, usual.fwhm, found.few_correlation, least=least)
    if measured is None:
        return found
    wider = float(np.log(usual.fwhm / measured.fwhm))
    if abs(wider) > _DISAGREE * np.hypot(measured.error, usual.error):
        return found
    share = measured.error**2 / max(measured.error**2 + usual.error**2, 1e-30)
    n = int(measured.used.sum())
    try:
        psf = Psf.of(
            _stretched(measured.images[0], float(np.exp(share * wider))),
            "the stars of the image",
            measured.oversampling,
            source=f"{n} stars and {usual.source}",
            error=float(np.sqrt(1 - share) * measured.error),
        )
    except InputError:  # their stack is no PSF
        return found
    return replace(
        found,
        psf=replace(psf, light_error=measured.light_error),
        reason="",
        x=found.x[measured.used],
        y=found.y[measured.used],
        scatter=measured.scatter,
        misfit=measured.misfit,
        narrowest=psf.fwhm,
        widest=psf.fwhm,
        ellipticity=psf.ellipticity,
        few=None,
    )


def _stretched(image: np.ndarray, by: float) -> np.ndarray:
    """An image that is wider about its middle by a factor."""
    middle = len(image) // 2
    places = middle + (np.arange(len(image)) - middle) / by
    rows, columns = np.meshgrid(places, places, indexing="ij")
    return np.asarray(ndimage.map_coordinates(image, [rows, columns], order=5, mode="nearest"))
