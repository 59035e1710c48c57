"""What a network is shown of a PSF: four small images that are sharp in the middle and coarse outside.

A stamp goes through the same views (see `sersicnet.networks.fovea`), except for the finest one.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from sersicnet.schema import PSF_VIEWS, STAMP_SIZE, VIEW_SIZE

BINNINGS = (0.5, 1, 2, 4)
"""Width of a pixel of each view, in pixels of the image."""

_SPLINE = 5


def psf_views(image: np.ndarray, oversampling: float = 1) -> np.ndarray:
    """Views of an effective PSF, centred between four pixels as a stamp is.

    The PSF is interpolated by a quintic spline. The coarse views are sums of its values at the positions of pixels,
    divided by the width of a pixel of the view: the noise of an image with a noise of 1 per pixel would be
    1 in all of them. The finest view holds the values at half pixels.

    Parameters
    ----------
    image : ndarray, float, (P, P)
        Effective PSF, P odd, centred on the middle pixel; light beyond its border counts as zero.
    oversampling : float
        Pixels of `image` per pixel of the stamp, along an axis.

    Returns
    -------
    ndarray, float32, (4, 32, 32)
        For a PSF of unit sum.
    """
    image = np.asarray(image, float)
    image = image * (oversampling**2 / image.sum())
    coefficients = ndimage.spline_filter(np.pad(image, 4), _SPLINE, mode="constant")
    middle = len(image) // 2 + 4

    def sampled(step: float, n: int) -> np.ndarray:
        line = middle + oversampling * step * (np.arange(n) - (n - 1) / 2)
        rows, columns = np.meshgrid(line, line, indexing="ij")
        return ndimage.map_coordinates(coefficients, [rows, columns], order=_SPLINE, mode="constant", prefilter=False)

    whole = sampled(1.0, STAMP_SIZE)
    out = np.empty((PSF_VIEWS, VIEW_SIZE, VIEW_SIZE), np.float32)
    out[0] = sampled(BINNINGS[0], VIEW_SIZE)
    for view, width in zip(out[1:], BINNINGS[1:], strict=True):
        side = int(width) * VIEW_SIZE
        border = (STAMP_SIZE - side) // 2
        inner = whole[border : border + side, border : border + side]
        view[:] = inner.reshape(VIEW_SIZE, int(width), VIEW_SIZE, int(width)).sum(axis=(1, 3)) / width
    return out


def shape_of(views: np.ndarray, fwhm: float) -> np.ndarray:
    """Three numbers of a PSF that its width does not state.

    Parameters
    ----------
    views : ndarray, float, (4, 32, 32)
        From `psf_views`.
    fwhm : float
        Full width at half maximum, pixels; at most 8.

    Returns
    -------
    ndarray, float64, (3,)
        Light within a circle of one FWHM radius, and of two, as fractions of the light within 64 pixels; and the
        ellipticity 1 - b/a of the moments under a round Gaussian with the FWHM of the PSF.
    """
    light = [_light_within(views, radius) for radius in (fwhm, 2 * fwhm)]
    step, view = (BINNINGS[0], views[0]) if fwhm < _FINE_REACH / 2 else (BINNINGS[1], views[1])
    line = step * (np.arange(VIEW_SIZE) - (VIEW_SIZE - 1) / 2)
    x, y = np.meshgrid(line, line)
    sigma = fwhm / 2.355
    weighted = view * np.exp(-(x**2 + y**2) / (2 * sigma**2))
    xx, yy, xy = (float((weighted * term).sum() / weighted.sum()) for term in (x**2, y**2, x * y))
    # The product of two Gaussians has the sum of their inverse covariances.
    inverse = np.clip(1 / np.linalg.eigvalsh([[xx, xy], [xy, yy]]) - 1 / sigma**2, 1e-6, None)
    return np.array([*light, 1 - np.sqrt(inverse.min() / inverse.max())])


_FINE_REACH = 7.5
"""Radius of the largest circle within the finest view, pixels."""

_PARTS = 5


def _light_within(views: np.ndarray, radius: float) -> float:
    """Light within a circle, of the finest view that holds it; pixels at the edge count with their area inside."""
    step, view = (BINNINGS[0], views[0]) if radius < _FINE_REACH else (BINNINGS[1], views[1])
    line = step * (np.arange(VIEW_SIZE * _PARTS) - (VIEW_SIZE * _PARTS - 1) / 2) / _PARTS
    inside = line[:, None] ** 2 + line**2 < radius**2
    share = inside.reshape(VIEW_SIZE, _PARTS, VIEW_SIZE, _PARTS).mean(axis=(1, 3))
    return float((view * share).sum() * step**2 / (views[3].sum() * BINNINGS[3]))
