r"""Many Sersic profiles at once, as a telescope sees them.

A Sersic profile is drawn in Fourier space. Its transform depends on the Sersic
index and on one number, the wave number along the stretched axes times the
effective radius, so a table made once serves every galaxy:

.. math:: \hat I(k) = F\, S_n(R_e k'),\quad k'^2 = k_u^2 + q^2 k_v^2

with (u, v) along the major and the minor axis. Multiplied with the transform of
the PSF and taken back by an FFT, it gives exact samples of the convolved galaxy,
with its cusp and its thin axis, as long as the PSF holds nothing above the
Nyquist frequency; that is so for HST's F160W at 0.06 arcsec per pixel.

The one defect of an FFT is that it is periodic: the wings of the galaxy come
back from the other side. They are smooth there, so their sum is evaluated in
real space on a few nodes and subtracted.

Only the *effective* PSF is meant here: the PSF as the image samples it, with
the pixel already in it. Nothing is integrated over pixels a second time.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import fft, special

from sersicnet.errors import InputError
from sersicnet.schema import STAMP_SIZE

N_RANGE = (0.3, 8.0)
"""Sersic indices that can be drawn."""

_LOG_K_MIN, _LOG_K_MAX, _LOG_K_STEP = np.log(1e-4), np.log(2e3), 0.008
_N_NODES = 140


class _HankelTable(NamedTuple):
    log_n: np.ndarray  # (nodes,)
    transform: np.ndarray  # (nodes, wave numbers)


@functools.cache
def _hankel_table() -> _HankelTable:
    """Transforms of the unit profile (flux 1, R_e 1) on a grid of index and log k.

    By the fast Hankel transform (FFTLog; Hamilton 2000, MNRAS 312, 257) on a
    logarithmic grid so wide that its periodicity does not show.
    """
    log_n = np.linspace(np.log(N_RANGE[0]) - 0.05, np.log(N_RANGE[1]) + 0.05, _N_NODES)
    points = 8192
    step = np.log(1e20) / points
    log_r = (np.arange(points) - (points - 1) / 2) * step
    radius = np.exp(log_r)
    log_k = np.arange(_LOG_K_MIN, _LOG_K_MAX, _LOG_K_STEP)
    rows = []
    for n in np.exp(log_n):
        offset = fft.fhtoffset(step, mu=0)
        k = np.exp(offset) / radius[::-1]
        with np.errstate(under="ignore"):
            transformed = 2 * np.pi * fft.fht(radius * _unit_profile(radius, n), step, mu=0, offset=offset) / k
        rows.append(np.interp(log_k, np.log(k), transformed))
    return _HankelTable(log_n, np.array(rows))


def sersic_b(n: ArrayLike) -> np.ndarray:
    """The constant b_n for which the effective radius holds half of the light.

    Solves ``gamma(2n, b) = Gamma(2n) / 2`` exactly (Ciotti & Bertin 1999).
    """
    return special.gammaincinv(2 * np.asarray(n, dtype=float), 0.5)


def _unit_profile(radius: np.ndarray, n: float) -> np.ndarray:
    """Surface brightness of the round profile of unit flux and unit R_e."""
    b = sersic_b(n)
    log_norm = 2 * n * np.log(b) - np.log(2 * np.pi * n) - special.gammaln(2 * n)
    with np.errstate(over="ignore"):
        return np.exp(log_norm - b * radius ** (1 / n))


class Renderer:
    """Draws Sersic galaxies seen through one PSF.

    Parameters
    ----------
    psf : ndarray, float, (P, P)
        Effective PSF at the pixel scale, odd P, its centre on the middle pixel.
        It is normalised to unit sum.
    size : int
        Width and height of the stamps in pixels.

    Raises
    ------
    InputError
        If the PSF is not a square image of odd size and positive, finite sum.
    """

    def __init__(self, psf: np.ndarray, size: int = STAMP_SIZE) -> None:
        psf = np.asarray(psf, dtype=float)
        if psf.ndim != 2 or psf.shape[0] != psf.shape[1] or psf.shape[0] % 2 == 0:
            raise InputError(
                f"A PSF is a square image with an odd number of pixels a side; received shape {psf.shape}. "
                "Crop it about its centre."
            )
        if not np.isfinite(psf).all() or psf.sum() <= 0:
            raise InputError(f"A PSF has finite pixels and a positive sum; received sum {psf.sum()}. Check the file.")
        self.size = size
        self._period = period = fft.next_fast_len(max(2 * size, psf.shape[0] + 1), real=True)
        padded = np.zeros((period, period))
        half = psf.shape[0] // 2
        padded[: psf.shape[0], : psf.shape[1]] = psf / psf.sum()
        transform = fft.rfft2(np.roll(padded, (-half, -half), axis=(0, 1)))
        kx, ky = 2 * np.pi * np.fft.rfftfreq(period), 2 * np.pi * np.fft.fftfreq(period)
        # Only wave numbers that the PSF lets through are ever evaluated.
        rows, cols = np.nonzero(np.abs(transform) > 1e-7)
        self._rows, self._cols = rows, cols
        self._psf_transform = transform[rows, cols].astype(np.complex64)
        self._kx, self._ky = kx, ky
        x, y = kx[cols], ky[rows]
        self._kxx, self._kxy, self._kyy = (a.astype(np.float32) for a in (x * x, x * y, y * y))
        self._spectrum = np.zeros((period, len(kx)), dtype=np.complex64)

    def __call__(self, parameters: np.ndarray) -> np.ndarray:
        """Draw galaxies.

        Parameters
        ----------
        parameters : ndarray, float, (N, 7)
            x, y (zero-based pixels), flux (total, image units), effective
            radius along the semi-major axis [pix], Sersic index, axis ratio
            b/a, angle of the major axis [degrees from +x towards +y].

        Returns
        -------
        ndarray, float32, (N, size, size)
            Noiseless stamps; NaN throughout where a parameter is not finite
            or outside of what can be drawn.
        """
        parameters = np.atleast_2d(np.asarray(parameters, dtype=float))
        stamps = np.empty((len(parameters), self.size, self.size), dtype=np.float32)
        for stamp, row in zip(stamps, parameters, strict=True):
            _, _, _, r_eff, n, q, _ = row
            drawable = np.isfinite(row).all() and r_eff > 0 and N_RANGE[0] <= n <= N_RANGE[1] and 0 < q <= 1
            stamp[:] = self._draw(*row) if drawable else np.nan
        return stamps

    def _draw(self, x: float, y: float, flux: float, r_eff: float, n: float, q: float, theta: float) -> np.ndarray:
        cos, sin = np.cos(np.radians(theta)), np.sin(np.radians(theta))
        k2 = self._kxx * np.float32(r_eff**2 * (cos**2 + (q * sin) ** 2))
        k2 += self._kyy * np.float32(r_eff**2 * (sin**2 + (q * cos) ** 2))
        k2 += self._kxy * np.float32(2 * r_eff**2 * (1 - q**2) * sin * cos)
        values = _look_up(_transform_row(n), k2) * self._psf_transform
        self._spectrum[self._rows, self._cols] = values
        phase_x = np.exp(-1j * self._kx * x).astype(np.complex64)
        phase_y = np.exp(-1j * self._ky * y).astype(np.complex64)
        spectrum = self._spectrum * phase_y[:, None]
        spectrum *= phase_x
        image = fft.irfft2(spectrum, (self._period, self._period))[: self.size, : self.size]
        image -= self._wrapped(x, y, r_eff, n, q, cos, sin)
        return image * np.float32(flux)

    def _wrapped(
        self, x: float, y: float, r_eff: float, n: float, q: float, cos: float, sin: float
    ) -> np.ndarray | float:
        """Light of the periodic images of a galaxy of unit flux, (size, size)."""
        nearest = self._period - self.size / 2
        if _light_outside(n, nearest / r_eff) < 1e-5:
            return 0.0
        # Narrow galaxies throw narrow wings: more nodes, fewer images.
        nodes_per_side, reach = (10, 4) if q > 0.3 else (24, 3) if q > 0.1 else (self.size, 2)
        nodes, weights = _interpolation(nodes_per_side, self.size)
        shifts = np.arange(-reach, reach + 1) * self._period
        shift_y, shift_x = (a.ravel() for a in np.meshgrid(shifts, shifts))
        away = (shift_x != 0) | (shift_y != 0)
        dx = (nodes[None, :] - x - shift_x[away, None]).astype(np.float32)
        dy = (nodes[None, :] - y - shift_y[away, None]).astype(np.float32)
        u2 = (dx * cos)[:, None, :] + (dy * sin)[:, :, None]
        v2 = (dy * (cos / q))[:, :, None] - (dx * (sin / q))[:, None, :]
        u2 *= u2
        v2 *= v2
        u2 += v2
        b = float(sersic_b(n))
        log_norm = 2 * n * np.log(b) - np.log(2 * np.pi * n * q * r_eff**2) - special.gammaln(2 * n)
        np.log(u2, out=u2)
        u2 -= np.float32(2 * np.log(r_eff))
        u2 *= np.float32(0.5 / n)
        np.exp(u2, out=u2)
        u2 *= np.float32(-b)
        u2 += np.float32(log_norm)
        np.exp(u2, out=u2)
        on_nodes = u2.sum(axis=0)
        # Images farther away than `reach` are as good as uniform.
        half_width = (reach + 0.5) * self._period
        eccentric = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        edge_x = np.cos(eccentric) * cos - q * np.sin(eccentric) * sin
        edge_y = np.cos(eccentric) * sin + q * np.sin(eccentric) * cos
        semi_major = half_width / np.maximum(np.abs(edge_x), np.abs(edge_y))
        on_nodes += np.float32(_light_outside(n, semi_major / r_eff).mean() / self._period**2)
        if weights is None:
            return on_nodes
        return weights @ on_nodes @ weights.T


def _light_outside(n: float, radius: ArrayLike) -> np.ndarray:
    """Fraction of the light outside of the ellipse `radius` times the effective one."""
    return special.gammaincc(2 * n, sersic_b(n) * np.asarray(radius) ** (1 / n))


@functools.cache
def _interpolation(nodes_per_side: int, size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Chebyshev nodes over a stamp's side and the matrix that interpolates from them."""
    if nodes_per_side == size:
        return np.arange(size, dtype=float), None
    angles = np.pi * (np.arange(nodes_per_side) + 0.5) / nodes_per_side
    nodes = np.cos(angles)
    signs = (-1.0) ** np.arange(nodes_per_side) * np.sin(angles)
    at = (np.arange(size) - (size - 1) / 2) / (size / 2)
    ratio = signs / (at[:, None] - nodes)
    weights = ratio / ratio.sum(axis=1, keepdims=True)
    return (size - 1) / 2 + nodes * size / 2, weights.astype(np.float32)


def _transform_row(n: float) -> np.ndarray:
    """S_n on the table's wave numbers: cubic interpolation in log n, float32."""
    table = _hankel_table()
    position = (np.log(n) - table.log_n[0]) / (table.log_n[1] - table.log_n[0])
    first = int(np.clip(np.floor(position) - 1, 0, len(table.log_n) - 4))
    t = position - first
    weights = np.array(
        [
            -(t - 1) * (t - 2) * (t - 3) / 6,
            t * (t - 2) * (t - 3) / 2,
            -t * (t - 1) * (t - 3) / 2,
            t * (t - 1) * (t - 2) / 6,
        ]
    )
    return (weights @ table.transform[first : first + 4]).astype(np.float32)


def _look_up(row: np.ndarray, k2: np.ndarray) -> np.ndarray:
    """Linear interpolation of a table row at squared wave numbers."""
    np.maximum(k2, np.float32(np.exp(2 * _LOG_K_MIN)), out=k2)
    position = np.log(k2)
    position *= np.float32(0.5 / _LOG_K_STEP)
    position -= np.float32(_LOG_K_MIN / _LOG_K_STEP)
    index = position.astype(np.int32)
    np.minimum(index, len(row) - 2, out=index)
    position -= index
    low = row[index]
    return low + position * (row[index + 1] - low)
