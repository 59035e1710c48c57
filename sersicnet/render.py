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

N_PARAMETERS = 7

_LOG_K_MIN, _LOG_K_STEP, _TABLE_LENGTH = np.log(1e-4), 0.008, 2102  # up to k = 2000
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
    log_k = _LOG_K_MIN + _LOG_K_STEP * np.arange(_TABLE_LENGTH)
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
        # What a derivative by the position multiplies a spectrum with. A real image
        # has none of it at the Nyquist frequency.
        self._slope_x, self._slope_y = (-1j * np.where(np.abs(k) < np.pi - 1e-6, k, 0) for k in (kx, ky))
        self._slope_x, self._slope_y = self._slope_x.astype(np.complex64), self._slope_y.astype(np.complex64)

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
        stamps = np.full((len(parameters), self.size, self.size), np.nan, dtype=np.float32)
        for stamp, row in zip(stamps, parameters, strict=True):
            if _drawable(row):
                stamp[:] = self._draw(_Galaxy.of(row), derivatives=False)[0]
        return stamps

    def with_derivatives(self, parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Draw galaxies, and their derivatives with respect to each parameter.

        Parameters
        ----------
        parameters : ndarray, float, (N, 7)
            As for calling the renderer.

        Returns
        -------
        stamps : ndarray, float32, (N, size, size)
        derivatives : ndarray, float32, (N, 7, size, size)
            Analytic, in the order and the units of the parameters (the angle's
            is per degree). NaN where the stamps are.
        """
        parameters = np.atleast_2d(np.asarray(parameters, dtype=float))
        out = np.full((len(parameters), 1 + N_PARAMETERS, self.size, self.size), np.nan, dtype=np.float32)
        for images, row in zip(out, parameters, strict=True):
            if _drawable(row):
                images[:] = self._draw(_Galaxy.of(row), derivatives=True)
        return out[:, 0], out[:, 1:]

    def _draw(self, galaxy: _Galaxy, *, derivatives: bool) -> np.ndarray:
        """The image, and behind it the seven derivatives: (1 or 8, size, size)."""
        x, y, flux, r_eff, n, q, cos, sin = galaxy
        k2 = self._kxx * np.float32(r_eff**2 * (cos**2 + (q * sin) ** 2))
        k2 += self._kyy * np.float32(r_eff**2 * (sin**2 + (q * cos) ** 2))
        k2 += self._kxy * np.float32(2 * r_eff**2 * (1 - q**2) * sin * cos)
        table = _transform_rows(n, derivatives=derivatives)
        index, fraction = _position(k2)
        transform = _look_up(table[0], index, fraction)
        parts = [transform]
        if derivatives:
            by_log_k, by_n = (_look_up(row, index, fraction) for row in table[1:])
            # Half the relative change of k^2 with the axis ratio, and with the angle.
            k_minor2 = self._kxx * np.float32(sin**2) + self._kyy * np.float32(cos**2)
            k_minor2 -= self._kxy * np.float32(2 * sin * cos)
            k_both = (self._kyy - self._kxx) * np.float32(sin * cos) + self._kxy * np.float32(cos**2 - sin**2)
            with np.errstate(divide="ignore", invalid="ignore"):
                by_q = np.where(k2 > 0, by_log_k * np.float32(q * r_eff**2) * k_minor2 / k2, 0)
                by_angle = np.where(k2 > 0, by_log_k * np.float32((1 - q**2) * r_eff**2) * k_both / k2, 0)
            parts += [by_log_k / np.float32(r_eff), by_n, by_q, by_angle]
        spectra = np.zeros((len(parts), self._period, len(self._kx)), dtype=np.complex64)
        for spectrum, part in zip(spectra, parts, strict=True):
            spectrum[self._rows, self._cols] = part * self._psf_transform
        spectra *= np.exp(-1j * self._ky * y).astype(np.complex64)[:, None]
        spectra *= np.exp(-1j * self._kx * x).astype(np.complex64)
        if derivatives:
            shifted = spectra[0] * self._slope_x, spectra[0] * self._slope_y[:, None]
            spectra = np.concatenate([spectra[:1], shifted, spectra[1:]])
        images = fft.irfft2(spectra, (self._period, self._period))[:, : self.size, : self.size]
        images -= self._wrapped(galaxy, derivatives=derivatives)
        if not derivatives:
            return images * np.float32(flux)
        image = images[:1].copy()
        images *= np.float32(flux)
        images[6] *= np.float32(np.pi / 180)
        return np.concatenate([images[:3], image, images[3:]])

    def _wrapped(self, galaxy: _Galaxy, *, derivatives: bool) -> np.ndarray | float:
        """Light of the periodic images of a galaxy of unit flux, and its derivatives.

        In the order image, x, y, radius, index, axis ratio, angle (radians).
        """
        x, y, _, r_eff, n, q, cos, sin = galaxy
        farthest = max(abs(c - edge) for c in (x, y) for edge in (0, self.size - 1))
        if farthest < self._period and _light_outside(n, (self._period - farthest) / r_eff) < 1e-5:
            return 0.0
        # Narrow galaxies throw narrow wings: more nodes, fewer images.
        nodes_per_side, reach = (10, 4) if q > 0.3 else (24, 3) if q > 0.1 else (self.size, 2)
        nodes, weights = _interpolation(nodes_per_side, self.size)
        shifts = np.arange(-reach, reach + 1) * self._period
        shift_y, shift_x = (a.ravel() for a in np.meshgrid(shifts, shifts))
        away = (shift_x != 0) | (shift_y != 0)
        dx = (nodes[None, :] - x - shift_x[away, None]).astype(np.float32)
        dy = (nodes[None, :] - y - shift_y[away, None]).astype(np.float32)
        u = (dx * np.float32(cos))[:, None, :] + (dy * np.float32(sin))[:, :, None]
        v = (dy * np.float32(cos / q))[:, :, None] - (dx * np.float32(sin / q))[:, None, :]
        radius2 = u * u + v * v
        b = float(sersic_b(n))
        log_radius = np.log(radius2)
        log_radius *= np.float32(0.5)
        log_radius -= np.float32(np.log(r_eff))
        power = np.exp(log_radius * np.float32(1 / n))
        light = np.exp(np.float32(_log_norm(n, q, r_eff)) - np.float32(b) * power)
        beyond = _beyond(galaxy, reach, self._period)
        if not derivatives:
            on_nodes = light.sum(axis=0)[None] + np.float32(beyond)
        else:
            by_log_radius = light * power * np.float32(-b / n)
            per_radius2 = by_log_radius / radius2
            h = 1e-4
            b_slope = float(sersic_b(n + h) - sersic_b(n - h)) / (2 * h)
            norm_slope = float(_log_norm(n + h, q, r_eff) - _log_norm(n - h, q, r_eff)) / (2 * h)
            by_n = light * (
                np.float32(norm_slope) - np.float32(b_slope) * power + np.float32(b / n**2) * power * log_radius
            )
            changes = [
                light,
                per_radius2 * (v * np.float32(sin / q) - u * np.float32(cos)),
                per_radius2 * (-u * np.float32(sin) - v * np.float32(cos / q)),
                (-2 * light - by_log_radius) / np.float32(r_eff),
                by_n,
                -light / np.float32(q) - per_radius2 * v * v / np.float32(q),
                per_radius2 * u * v * np.float32(q - 1 / q),
            ]
            on_nodes = np.stack([change.sum(axis=0) for change in changes])
            slopes = [
                (
                    _beyond(galaxy._replace(**{k: value + h}), reach, self._period)
                    - _beyond(galaxy._replace(**{k: value - h}), reach, self._period)
                )
                / (2 * h)
                for k, value in (("r_eff", r_eff), ("n", n), ("q", q))
            ]
            on_nodes += np.array([beyond, 0, 0, *slopes, 0], np.float32)[:, None, None]
        return on_nodes if weights is None else weights @ on_nodes @ weights.T


class _Galaxy(NamedTuple):
    """Parameters of one galaxy, its angle as cosine and sine."""

    x: float
    y: float
    flux: float
    r_eff: float
    n: float
    q: float
    cos: float
    sin: float

    @classmethod
    def of(cls, row: np.ndarray) -> _Galaxy:
        angle = np.radians(row[6])
        x, y, flux, r_eff, n, q = (float(value) for value in row[:6])
        return cls(x, y, flux, r_eff, n, q, float(np.cos(angle)), float(np.sin(angle)))


def _drawable(row: np.ndarray) -> bool:
    _, _, _, r_eff, n, q, _ = row
    return bool(np.isfinite(row).all() and r_eff > 0 and N_RANGE[0] <= n <= N_RANGE[1] and 0 < q <= 1)


def _log_norm(n: float, q: float, r_eff: float) -> float:
    """Logarithm of the central surface brightness at unit flux."""
    b = sersic_b(n)
    return float(2 * n * np.log(b) - np.log(2 * np.pi * n * q * r_eff**2) - special.gammaln(2 * n))


def _beyond(galaxy: _Galaxy, reach: int, period: int) -> float:
    """Light a pixel from images farther away than `reach`: as good as uniform."""
    half_width = (reach + 0.5) * period
    eccentric = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    along, across = np.cos(eccentric), galaxy.q * np.sin(eccentric)
    edge_x = along * galaxy.cos - across * galaxy.sin
    edge_y = along * galaxy.sin + across * galaxy.cos
    semi_major = half_width / np.maximum(np.abs(edge_x), np.abs(edge_y))
    return float(_light_outside(galaxy.n, semi_major / galaxy.r_eff).mean()) / period**2


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


def _transform_rows(n: float, *, derivatives: bool) -> np.ndarray:
    """S_n on the table's wave numbers, its slope in log k and its slope in n, float32.

    Cubic interpolation in log n. Without `derivatives` the first row alone.
    """
    table = _hankel_table()
    step = table.log_n[1] - table.log_n[0]
    position = (np.log(n) - table.log_n[0]) / step
    first = int(np.clip(np.floor(position) - 1, 0, len(table.log_n) - 4))
    t = position - first
    weights = [
        [
            -(t - 1) * (t - 2) * (t - 3) / 6,
            t * (t - 2) * (t - 3) / 2,
            -t * (t - 1) * (t - 3) / 2,
            t * (t - 1) * (t - 2) / 6,
        ]
    ]
    if derivatives:
        weights.append(
            [
                -(3 * t**2 - 12 * t + 11) / 6,
                (3 * t**2 - 10 * t + 6) / 2,
                -(3 * t**2 - 8 * t + 3) / 2,
                (3 * t**2 - 6 * t + 2) / 6,
            ]
        )
    rows = np.array(weights) @ table.transform[first : first + 4]
    if derivatives:
        rows = np.stack([rows[0], np.gradient(rows[0], _LOG_K_STEP), rows[1] / (step * n)])
    return rows.astype(np.float32)


def _position(k2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index and fraction in the table of squared wave numbers times radius."""
    position = np.log(np.maximum(k2, np.float32(np.exp(2 * _LOG_K_MIN))))
    position *= np.float32(0.5 / _LOG_K_STEP)
    position -= np.float32(_LOG_K_MIN / _LOG_K_STEP)
    index = position.astype(np.int32)
    np.minimum(index, _TABLE_LENGTH - 2, out=index)
    position -= index
    return index, position


def _look_up(row: np.ndarray, index: np.ndarray, fraction: np.ndarray) -> np.ndarray:
    """Linear interpolation of a table row."""
    low = row[index]
    return low + fraction * (row[index + 1] - low)
