"""A PSF that is so narrow that its pixels do not show its peak, moved by a part of a pixel.

What lies between the pixels of such a PSF depends on what is assumed. Sinc functions, or the offset in a renderer, which
is the same, spread the peak over four pixels; splines do nearly so. A profile that is integrated over the pixel keeps
it.
"""

from __future__ import annotations

import numpy as np

_WITHIN = 1.6  # radius in which the profile is fitted, FWHM
_LEAST_WITHIN = 1.6  # the same, pixels
_BETA = (3.0, 30.0)  # of its wings: with less, an Airy profile between four pixels becomes a cusp
_STARTS = (3.5, 10.0)
_NODES = 4  # along an axis of a pixel


def moved(image: np.ndarray, place: tuple[float, float], half: int, fwhm: float) -> np.ndarray:
    """A square about a position between pixels.

    An elliptical Moffat profile, integrated over the pixel, is fitted to the core. It is drawn about the position, and
    what is left of the image is moved there by sinc functions.

    Parameters
    ----------
    image : ndarray, float64, (H, W)
        Effective PSF, sampled once a pixel.
    place : (float, float)
        Row and column.
    half : int
    fwhm : float
        Rough full width at half maximum, pixels.

    Returns
    -------
    ndarray, float64, (2 * half + 1, 2 * half + 1)
        Zero beyond the image.
    """
    rows, columns = (np.arange(n, dtype=float) for n in image.shape)
    near = np.hypot(rows[:, None] - place[0], columns - place[1]) < max(_WITHIN * fwhm, _LEAST_WITHIN)
    found = _fitted(image[near] / image.max(), *(axis[near] for axis in np.indices(image.shape)), place, fwhm)
    rest = image - image.max() * _profile(found, rows[:, None], columns)
    steps = np.arange(-half, half + 1)
    there = [p + steps for p in place]
    inside = [(axis >= -0.5) & (axis <= n - 0.5) for axis, n in zip(there, image.shape, strict=True)]
    across, along = (np.sinc(axis[:, None] - own) for axis, own in zip(there, (rows, columns), strict=True))
    out = across @ rest @ along.T + image.max() * _profile(found, there[0][:, None], there[1])
    return np.asarray(np.where(inside[0][:, None] & inside[1], out, 0))


def _fitted(
    values: np.ndarray, rows: np.ndarray, columns: np.ndarray, place: tuple[float, float], fwhm: float
) -> np.ndarray:
    """Parameters of the profile that fits some pixels best, see `_profile`."""
    from scipy.optimize import least_squares

    results = []
    for beta in _STARTS:
        wide = 4 * (2 ** (1 / beta) - 1) / max(fwhm**2 - 0.7, 0.3)
        results.append(
            least_squares(
                lambda p: _profile(p, rows, columns) - values,
                [1.3, *place, wide, 0.0, wide, beta],
                bounds=(
                    [0, place[0] - 1.5, place[1] - 1.5, 0.1 * wide, -3 * wide, 0.1 * wide, _BETA[0]],
                    [9, place[0] + 1.5, place[1] + 1.5, 9 * wide, 3 * wide, 9 * wide, _BETA[1]],
                ),
                x_scale=[1, 0.1, 0.1, wide, wide, wide, beta],
            )
        )
    return np.asarray(min(results, key=lambda result: result.cost).x)


def _profile(parameters: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """A Moffat profile, integrated over pixels: peak, row, column, three terms of the ellipse and the exponent."""
    peak, row, column, a, b, c, beta = parameters
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    out = np.zeros(np.broadcast_shapes(np.shape(rows), np.shape(columns)))
    for i, j in np.ndindex(_NODES, _NODES):
        v, u = rows - row + nodes[i] / 2, columns - column + nodes[j] / 2
        out += weights[i] * weights[j] / 4 * (1 + np.maximum(a * u**2 + 2 * b * u * v + c * v**2, 0)) ** -beta
    return peak * out
