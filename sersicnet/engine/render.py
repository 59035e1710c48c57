r"""Draw many Sersic profiles, convolved with a PSF.

A Sersic profile is drawn in Fourier space. Its transform depends on the Sersic
index and on one number, the wave number along the stretched axes times the
effective radius, so one table serves every galaxy:

.. math:: \hat I(k) = F\, S_n(R_e k'),\quad k'^2 = k_u^2 + q^2 k_v^2

with (u, v) along the major and the minor axis. The product with the transform of
the PSF, transformed back by an FFT, gives exact samples of the convolved galaxy,
including a central cusp and a thin minor axis. Frequencies of the PSF above the
Nyquist frequency of the image are aliased, as in a detector.

An FFT is periodic, so the wings of the galaxy's periodic images overlap the stamp.
They are smooth there, so their sum is evaluated in real space on a few nodes,
interpolated and subtracted. The wings of thin galaxies are not smooth; these
galaxies are drawn with a longer period.

The PSF is always the *effective* PSF, which includes the pixel response. Nothing
is integrated over pixels a second time.

The arithmetic uses the Python array API. With a PSF in NumPy, the renderer draws
on the CPU, one galaxy at a time, so that the arrays stay in the cache. With a PSF
on a GPU, it draws there, in batches. The parameters of the galaxies are prepared
on the host.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import array_api_compat
import numpy as np
from numpy.typing import ArrayLike
from scipy import fft, special

from sersicnet.errors import InputError
from sersicnet.schema import STAMP_SIZE
from sersicnet.workers import cores

N_RANGE = (0.3, 8.0)
"""Sersic indices that can be drawn."""

N_PARAMETERS = 7

MOST_OVERSAMPLING = 16
"""A stamp is drawn on a grid that is finer by the oversampling; at 16 one takes 0.5 GB."""

_K_RANGE = (1e-4, 2e4)  # range of wave numbers of the table, in units of 1 / R_e
_N_NODES = 140
_LONGEST = 4  # longest period, in units of the default period
_WINGS = 1e-5  # periodic images are neglected if a smaller fraction of their light reaches the stamp
_THIN, _THIN_WINGS = 0.2, 1e-3  # galaxies with a smaller axis ratio and a larger fraction get a longer period
_NODES = ((0, 0), (8, 48), (16, 64))  # nodes per side and periodic images: no wings, round galaxies, flat galaxies
_FADE = 0.4  # periodic images fade beyond this fraction of the area of the ellipse that they fill
_BATCH = 2**24  # wave numbers of a batch outside NumPy: 128 MiB for each array in use
_PSF_TAIL = 1e-4  # fraction of a PSF's transform that may be cut off above a multiple of the Nyquist frequency

Array = Any
"""An array of the PSF's array namespace."""


class _HankelTable(NamedTuple):
    log_n: np.ndarray  # (nodes,)
    log_k: float  # log of the first wave number
    step: float  # step in log k
    transforms: np.ndarray  # float32, (3, nodes, wave numbers): S_n, its derivatives with respect to log k and n


@functools.cache
def _hankel_table() -> _HankelTable:
    """Transforms of the unit profile (flux 1, R_e 1) on a grid of index and log k.

    They are computed by the fast Hankel transform (FFTLog; Hamilton 2000, MNRAS 312, 257)
    on a logarithmic grid that is so wide that its periodicity is negligible.
    """
    log_n = np.linspace(np.log(N_RANGE[0]) - 0.05, np.log(N_RANGE[1]) + 0.05, _N_NODES)
    points = 9216
    step = float(np.log(1e20)) / points
    log_r = (np.arange(points) - (points - 1) / 2) * step
    radius = np.exp(log_r)
    offset = fft.fhtoffset(step, mu=0)
    log_k = offset - log_r[::-1]
    first, last = np.searchsorted(log_k, np.log(_K_RANGE))
    rows = []
    with np.errstate(under="ignore", over="ignore"):
        for n in np.exp(log_n):
            transformed = fft.fht(radius * _unit_profile(radius, n), step, mu=0, offset=offset)
            rows.append((2 * np.pi * transformed * np.exp(-log_k))[:, first : last + 1].astype(np.float32))
    return _HankelTable(log_n, float(log_k[first]), step, np.stack(rows, axis=1))


def parameters_of(galaxies: Mapping[str, Any], zero_point: float) -> np.ndarray:
    """Parameters of a `Renderer` for the galaxies of a catalogue.

    Parameters
    ----------
    galaxies : mapping of array_like, or Table
        Columns ``x``, ``y``, ``mag`` (AB), ``r_eff_pix``, ``sersic_n``, ``ellipticity`` and ``theta`` (degrees),
        with or without units; a NaN in ``theta`` counts as 0.
    zero_point : float
        AB magnitude of one image unit.

    Returns
    -------
    ndarray, float64, (N, 7)
        x, y, flux, effective radius [pix], Sersic index, axis ratio, angle [degrees].
    """
    names = ("x", "y", "mag", "r_eff_pix", "sersic_n", "ellipticity", "theta")
    x, y, mag, r_eff, n, e, theta = (
        np.atleast_1d(np.asarray(getattr(galaxies[name], "value", galaxies[name]), dtype=float)) for name in names
    )
    flux = 10 ** (-0.4 * (mag - zero_point))
    return np.column_stack([x, y, flux, r_eff, n, 1 - e, np.nan_to_num(theta)])


def sersic_b(n: ArrayLike) -> np.ndarray:
    """The constant b_n for which half of the light is inside the effective radius.

    Solves ``gamma(2n, b) = Gamma(2n) / 2`` exactly (Ciotti & Bertin 1999).
    """
    return special.gammaincinv(2 * np.asarray(n, dtype=float), 0.5)


def _b_slope(n: ArrayLike) -> np.ndarray:
    """Derivative of `sersic_b`."""
    h = 1e-4
    return (sersic_b(np.asarray(n) + h) - sersic_b(np.asarray(n) - h)) / (2 * h)


def log_norm(n: ArrayLike) -> np.ndarray:
    """Logarithm of the central surface brightness of the unit profile."""
    n = np.asarray(n)
    return 2 * n * np.log(sersic_b(n)) - np.log(2 * np.pi * n) - special.gammaln(2 * n)


def _log_norm_slope(n: ArrayLike) -> np.ndarray:
    """Derivative of `log_norm`."""
    n, b = np.asarray(n), sersic_b(n)
    return 2 * np.log(b) + 2 * n * _b_slope(n) / b - 1 / n - 2 * special.digamma(2 * n)


def _unit_profile(radius: np.ndarray, n: float) -> np.ndarray:
    """Surface brightness of the round profile of unit flux and unit R_e, and two derived profiles: (3, radii).

    The transforms of the derived profiles are the derivatives of its transform with respect to log k and n.
    """
    b = sersic_b(n)
    power = np.minimum(radius ** (1 / n), 1e4)
    light = np.exp(log_norm(n) - b * power)
    by_n = light * (_log_norm_slope(n) - _b_slope(n) * power + b / n**2 * power * np.log(radius))
    return np.stack([light, light * (b / n * power - 2), by_n])


class Renderer:
    """Draws Sersic profiles convolved with a PSF.

    Several threads may use a renderer at once.

    Parameters
    ----------
    psf : array, float, (P, P)
        Effective PSF, P odd, centred on the middle pixel: the flux in a pixel
        centred at each sample, including the pixel response (and the drizzle
        drop), as stars in the image show it, and as Anderson & King's ePSF,
        photutils' `EPSFBuilder` and PSFEx define it. It is normalised to unit sum.
        Its type selects the device: galaxies are drawn on the CPU for a NumPy
        array, and on the array's device for an array of PyTorch, CuPy or another
        library with the Python array API.
    size : int
        Width and height of the stamps in pixels.
    oversampling : int
        Samples of the PSF per pixel, along each axis. A PSF at the pixel scale (1) is
        exact if the PSF has no power above the Nyquist frequency; this holds for HST's
        F160W at 0.06 arcsec per pixel. Undersampled images need oversampling.

    Raises
    ------
    InputError
        If the PSF is not a square image of odd size with finite pixels and a positive
        sum, or if size or oversampling is not a positive integer.
    """

    def __init__(self, psf: Array, size: int = STAMP_SIZE, oversampling: int = 1) -> None:
        numpy = array_api_compat.is_numpy_array(psf) or not array_api_compat.is_array_api_obj(psf)
        self._xp = np if numpy else array_api_compat.array_namespace(psf)
        self._device = None if self._xp is np else array_api_compat.device(psf)
        self._compiled = array_api_compat.is_jax_array(psf)
        psf = on_host(psf)
        if psf.ndim != 2 or psf.shape[0] != psf.shape[1] or psf.shape[0] % 2 == 0:
            raise InputError(
                f"A PSF is a square image with an odd number of pixels per side; received shape {psf.shape}. "
                "Crop it about its centre."
            )
        if not np.isfinite(psf).all():
            raise InputError(
                f"A PSF has finite pixels only; received {(~np.isfinite(psf)).sum()} that are not, of {psf.size}. "
                "Set them to zero, or interpolate."
            )
        if psf.sum() <= 0:
            raise InputError(f"A PSF has a positive sum; received {psf.sum():.3g}. Check its sign and its background.")
        self.size = _positive(size, "The size of a stamp")
        self.oversampling = _positive(oversampling, "The oversampling of a PSF")
        if self.oversampling > MOST_OVERSAMPLING:
            raise InputError(
                f"The oversampling of a PSF is at most {MOST_OVERSAMPLING}; received {self.oversampling}. "
                "Bin its pixels by a whole number."
            )
        # Light farther from the centre of the PSF than the width of the stamp reaches no pixel of the stamp.
        middle = len(psf) // 2
        reach = min(middle, (self.size - 1) * self.oversampling)
        inner = slice(middle - reach, middle + reach + 1)
        self._psf = psf[inner, inner] / psf.sum()
        width = -(-len(self._psf) // self.oversampling) + 1
        self._period = 2 * fft.next_fast_len(-(-max(2 * self.size, width) // 2), real=True)
        # Minimum distance of a periodic image, at which its light is smooth and beyond the extent of the PSF.
        self._nearest = max(self.size / 2, width / 2)
        self._grids: dict[int, _Grid] = {}
        self._grid(self._period)

    def __repr__(self) -> str:
        return f"<Renderer of stamps of {self.size} x {self.size} pixels, oversampling of the PSF {self.oversampling}>"

    def __getstate__(self) -> dict[str, Any]:
        # A renderer is pickled for other processes without its module, which cannot be pickled, and its grids.
        if self._xp is not np:
            raise TypeError("A renderer on a device cannot be used by another process.")
        return {**self.__dict__, "_xp": None, "_grids": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _xp=np)

    def __call__(self, parameters: Array, *, workers: int = 1) -> Array:
        """Draw galaxies.

        Parameters
        ----------
        parameters : array, float, (N, 7)
            x, y (zero-based pixels), flux (total, image units), effective
            radius along the semi-major axis [pix], Sersic index, axis ratio
            b/a, angle of the major axis [degrees from +x towards +y].
        workers : int
            Number of threads on the CPU, -1 for one per core. The default is 1, for callers
            that use several threads or processes themselves. It has no effect on a GPU.

        Returns
        -------
        array, float32, (N, size, size)
            Noiseless stamps, of the PSF's type. The stamp is NaN if a parameter is not
            finite or cannot be drawn: the radius must be positive, the axis ratio in (0, 1],
            the index in `N_RANGE`, and the centre near the stamp.

        Raises
        ------
        InputError
            If `workers` is neither positive nor -1.
        """
        return self._draw_all(parameters, workers, derivatives=False)[:, 0, ...]

    def with_derivatives(self, parameters: Array, *, workers: int = 1) -> tuple[Array, Array]:
        """Draw galaxies, and their derivatives with respect to each parameter.

        Parameters
        ----------
        parameters : array, float, (N, 7)
            As for `__call__`.
        workers : int
            As for `__call__`.

        Returns
        -------
        stamps : array, float32, (N, size, size)
        derivatives : array, float32, (N, 7, size, size)
            Analytic derivatives, in the order and the units of the parameters (per degree
            for the angle). NaN where the stamps are NaN.
        """
        images = self._draw_all(parameters, workers, derivatives=True)
        return images[:, 0, ...], images[:, 1:, ...]

    def _draw_all(self, parameters: Array, workers: int, *, derivatives: bool) -> Array:
        """Images of all galaxies, NaN for galaxies that cannot be drawn: (N, 1 or 8, size, size)."""
        rows = np.atleast_2d(on_host(parameters))
        shape = (1 + N_PARAMETERS if derivatives else 1, self.size, self.size)
        if workers < 1 and workers != -1:
            raise InputError(f"The number of workers is positive, or -1 for one per core; received {workers}. Give 1.")
        if self._xp is np:
            images = np.full((len(rows), *shape), np.nan, dtype=np.float32)
            batches = self._batches(rows, 1)

            def fill(batch: _Batch) -> None:
                images[batch.which] = self._draw(batch, derivatives=derivatives)

            threads = min(len(rows), workers if workers > 0 else cores())
            if threads > 1:
                with ThreadPoolExecutor(threads) as pool:
                    list(pool.map(fill, batches))
            else:
                for batch in batches:
                    fill(batch)
            return images
        xp = self._xp
        at_once = max(1, _BATCH // (math.prod(self._grid(self._period).psf.shape) * shape[0]))
        drawn, order = [], []
        for batch in self._batches(rows, at_once):
            if self._compiled:
                batch = batch.padded()
            drawn.append(self._draw(batch, derivatives=derivatives))
            order.append(batch.which)
        # Galaxies that cannot be drawn get the last image, which is NaN.
        drawn.append(xp.full((1, *shape), xp.nan, dtype=xp.float32, device=self._device))
        places = np.full(len(rows), sum(len(which) for which in order))
        if order:
            places[np.concatenate(order)] = np.arange(places[0] if len(places) else 0)
        return xp.take(xp.concat(drawn), self._put(places, None), axis=0)

    def _batches(self, rows: np.ndarray, at_once: int) -> Iterator[_Batch]:
        """Batches of the galaxies that can be drawn, each with one period and one number of nodes."""
        x, y, flux, r_eff, n, q, angle = rows.T
        with np.errstate(invalid="ignore"):
            good = np.isfinite(rows).all(axis=1) & (r_eff > 0) & (q > 0) & (q <= 1)
            good &= (n >= N_RANGE[0]) & (n <= N_RANGE[1])
            middle = (self.size - 1) / 2
            farthest = middle + np.maximum(np.abs(x - middle), np.abs(y - middle))
            good &= farthest + self.size <= _LONGEST * self._period
        which = np.flatnonzero(good)
        x, y, flux, r_eff, n, q, angle = rows[which].T
        farthest, b, angle = farthest[which], sersic_b(n), np.radians(angle)
        galaxies = _Galaxies(x, y, flux, r_eff, n, q, np.cos(angle), np.sin(angle), b)
        longer = np.ones(len(which), dtype=int)
        while True:
            # Distance of the nearest periodic image from the stamp; the light of a nearer one would not be smooth.
            distance = longer * self._period - farthest
            outside = special.gammaincc(2 * n, b * (np.maximum(distance, 0) / r_eff) ** (1 / n))
            short = (distance < self._nearest) | ((outside > _THIN_WINGS) & (q < _THIN) & (longer == 1))
            if not short.any():
                break
            longer[short] *= 2
        setting = np.where(outside < _WINGS, 0, np.where(q > 0.3, 1, 2))
        kind = longer * len(_NODES) + setting
        for value in sorted(set(kind.tolist())):
            same = np.flatnonzero(kind == value)
            longest, nodes = divmod(value, len(_NODES))
            for start in range(0, len(same), max(1, at_once // longest**2)):
                part = same[start : start + max(1, at_once // longest**2)]
                yield _Batch(which[part], galaxies.take(part), longest * self._period, *_NODES[nodes])

    def _draw(self, batch: _Batch, *, derivatives: bool) -> Array:
        """The image of each galaxy, followed by its seven derivatives: (B, 1 or 8, size, size)."""
        xp, put, galaxies = self._xp, self._put, batch.galaxies
        r_eff, q, cos, sin = galaxies.r_eff, galaxies.q, galaxies.cos, galaxies.sin
        grid = self._grid(batch.period)

        def each(values: np.ndarray) -> Array:
            return put(values)[:, None, None]

        # Wave numbers along the major and the minor axis, in units of one over the axes.
        u = each(r_eff * cos) * grid.kx + each(r_eff * sin) * grid.ky
        v = each(-r_eff * q * sin) * grid.kx + each(r_eff * q * cos) * grid.ky
        k2 = u * u
        k2 += v * v
        look_up = self._look_up(galaxies.n, k2)
        seen = grid.psf * put(np.exp(-1j * galaxies.y[:, None] * grid.ky_host), xp.complex64)[:, :, None]
        shift = put(np.exp(-1j * galaxies.x[:, None] * grid.kx_host), xp.complex64)[:, None, :]

        def columns(spectrum: Array) -> Array:
            if grid.band > 1:  # frequencies above the Nyquist frequency of the image are aliased
                spectrum = xp.sum(xp.reshape(spectrum, (-1, grid.band, batch.period, spectrum.shape[2])), axis=1)
            return self._fft.ifft(spectrum, axis=1)[:, : self.size, :] * shift

        def image(half: Array) -> Array:
            long = self._fft.irfft(half, n=grid.band * batch.period, axis=2)
            return long[:, :, : grid.band * self.size : grid.band]

        spectrum = look_up(0) * seen
        half = columns(spectrum)
        images = [image(half)]
        if derivatives:  # computed one after the other, so that the arrays stay in a CPU's cache
            images += [image(half * grid.slope_x), image(columns(spectrum * grid.slope_y))]
            by_log_k = look_up(1)
            images += [image(columns(by_log_k * seen)) * each(1 / r_eff), image(columns(look_up(2) * seen))]
            by_log_k *= v
            by_log_k /= xp.clip(k2, 1e-30, None)
            v *= by_log_k
            images.append(image(columns(v * seen)) * each(1 / q))
            u *= by_log_k
            images.append(image(columns(u * seen)) * each((1 - q * q) / q * np.pi / 180))
        if batch.nodes:
            images = [a - b for a, b in zip(images, self._wrapped(batch, derivatives=derivatives), strict=True)]
        flux = each(galaxies.flux)
        if derivatives:
            images.insert(3, images[0])
        return xp.stack([image if i == 3 else image * flux for i, image in enumerate(images)], axis=1)

    def _wrapped(self, batch: _Batch, *, derivatives: bool) -> list[Array]:
        """Light of the periodic images of galaxies of unit flux, and its derivatives.

        The order is: image, x, y, radius, index, axis ratio, angle [degrees]; each (B, size, size).
        """
        xp, put = self._xp, self._put
        x, y, _, r_eff, n, q, cos, sin, b = batch.galaxies
        nodes, weights = _interpolation(batch.nodes, self.size)
        shift_x, shift_y, shares = _images(batch, self.size)
        dx = nodes - (x[:, None] + shift_x)[:, :, None]  # (B, images, nodes)
        dy = nodes - (y[:, None] + shift_y)[:, :, None]

        def each(values: np.ndarray) -> Array:
            return put(values)[:, None, None, None]

        def axis(values: np.ndarray) -> np.ndarray:
            return (values / r_eff)[:, None, None]

        u = put(dx * axis(cos))[:, :, None, :] + put(dy * axis(sin))[:, :, :, None]
        v = put(-dx * axis(sin / q))[:, :, None, :] + put(dy * axis(cos / q))[:, :, :, None]
        radius2 = u * u + v * v
        log_radius = 0.5 * xp.log(radius2)
        power = each(b) * xp.exp(log_radius * each(1 / n))
        light = xp.exp(each(log_norm(n) - np.log(q * r_eff**2)) - power) * put(shares)[:, :, None, None]
        beyond = _beyond(batch, derivatives=derivatives)
        terms = [light]
        if derivatives:
            by_log_radius = light * power * each(-1 / n)
            per_radius2 = by_log_radius / radius2
            by_n = light * (each(_log_norm_slope(n)) - power * (each(_b_slope(n) / b) - each(1 / n**2) * log_radius))
            terms += [
                per_radius2 * (v * each(sin / q / r_eff) - u * each(cos / r_eff)),
                per_radius2 * (-u * each(sin / r_eff) - v * each(cos / q / r_eff)),
                (-2 * light - by_log_radius) * each(1 / r_eff),
                by_n,
                (-light - per_radius2 * v * v) * each(1 / q),
                per_radius2 * u * v * each((q - 1 / q) * np.pi / 180),
            ]
        sides = put(weights)
        summed = [xp.sum(term, axis=1) + put(rest)[:, None, None] for term, rest in zip(terms, beyond, strict=True)]
        return [sides @ on_nodes @ xp.matrix_transpose(sides) for on_nodes in summed]

    def _look_up(self, n: np.ndarray, k2: Array) -> Callable[[int], Array]:
        """A function that interpolates S_n (0) or its derivative in log k (1) or in n (2) at `k2`, (R_e k)^2.

        The interpolation is cubic in log n and linear in log k.
        """
        xp, (log_n, log_k, step, _) = self._xp, _hankel_table()
        place = (np.log(n) - log_n[0]) / (log_n[1] - log_n[0])
        first = np.clip(np.floor(place) - 1, 0, len(log_n) - 4).astype(int)
        t = place - first
        weights = np.stack(
            [
                -(t - 1) * (t - 2) * (t - 3) / 6,
                t * (t - 2) * (t - 3) / 2,
                -t * (t - 1) * (t - 3) / 2,
                t * (t - 1) * (t - 2) / 6,
            ],
            axis=1,
        )
        nodes = self._put((first[:, None] + np.arange(4)).ravel(), None)
        cubic = self._put(weights)[:, :, None]
        length = self._table[0].shape[1]
        lowest, highest = math.exp(2 * log_k + step), math.exp(2 * (log_k + step * (length - 2)))
        position = xp.log(xp.clip(k2, lowest, highest))
        position *= 0.5 / step
        position -= log_k / step
        floor = xp.floor(position)
        position -= floor
        index = xp.astype(floor, nodes.dtype)
        if len(n) > 1:
            index += self._put(length * np.arange(len(n)), None)[:, None, None]
        index = xp.reshape(index, (-1,))

        def look_up(which: int) -> Array:
            rows = xp.take(self._table[which], nodes, axis=0)
            row = xp.reshape(xp.sum(xp.reshape(rows, (len(n), 4, length)) * cubic, axis=1), (-1,))
            slope = row[1:] - row[:-1]
            found = xp.reshape(xp.take(slope, index), k2.shape)
            found *= position
            found += xp.reshape(xp.take(row, index), k2.shape)
            return found

        return look_up

    @functools.cached_property
    def _table(self) -> list[Array]:
        return [self._put(table) for table in _hankel_table().transforms]

    @property
    def _fft(self) -> Any:
        return fft if self._xp is np else self._xp.fft  # SciPy is twice as fast as NumPy for many small transforms

    def _put(self, values: np.ndarray, dtype: Any = np.float32) -> Array:
        """Move numbers from the host to the device; None as `dtype` keeps their type."""
        if self._xp is np:
            return values if dtype is None else values.astype(dtype, copy=False)
        if dtype is np.float32:
            dtype = self._xp.float32
        return self._xp.asarray(values, dtype=dtype, device=self._device)

    def _grid(self, period: int) -> _Grid:
        """Wave numbers and the PSF's transform for a period in pixels; cached."""
        if period not in self._grids:
            self._grids[period] = self._make_grid(period)
        return self._grids[period]

    def _make_grid(self, period: int) -> _Grid:
        fine = self.oversampling * period
        half = len(self._psf) // 2
        place = np.arange(-half, half + 1) % fine
        padded = np.zeros((fine, fine))
        np.add.at(padded, (place[:, None], place), self._psf)
        transform = fft.rfft2(padded)
        # A PSF without power above the image's Nyquist frequency needs only the image's own frequencies.
        size = np.abs(transform)
        order = np.maximum(np.abs(np.fft.fftfreq(fine, 1 / fine))[:, None], np.arange(size.shape[1]))
        band = next(
            band
            for band in range(1, self.oversampling + 1)
            if band == self.oversampling or size[order > band * period / 2].sum() < _PSF_TAIL * size.sum()
        )
        length = band * period
        columns, rows = np.arange(length // 2 + 1), (np.arange(length) + length // 2) % length - length // 2
        transform = np.ascontiguousarray(band * transform[rows][:, columns])
        kx, ky = 2 * np.pi / period * columns, 2 * np.pi / period * rows
        # A real image has no derivative at the highest frequency.
        slope_x, slope_y = (-1j * np.where(np.abs(k) < np.pi * band - 1e-6, k, 0) for k in (kx, ky))
        complex64 = self._xp.complex64
        return _Grid(
            band,
            kx,
            ky,
            self._put(kx),
            self._put(ky)[:, None],
            self._put(transform, complex64),
            self._put(slope_x, complex64),
            self._put(slope_y, complex64)[:, None],
        )


class _Grid(NamedTuple):
    """Wave numbers, (rows) or (columns), and the PSF's transform at them, (rows, columns)."""

    band: int  # largest frequency over the Nyquist frequency of the image
    kx_host: np.ndarray
    ky_host: np.ndarray
    kx: Array
    ky: Array
    psf: Array
    slope_x: Array
    slope_y: Array


class _Galaxies(NamedTuple):
    """Parameters of galaxies, with cosine and sine of the angle, and b_n; each float64, (B,)."""

    x: np.ndarray
    y: np.ndarray
    flux: np.ndarray
    r_eff: np.ndarray
    n: np.ndarray
    q: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    b: np.ndarray

    def take(self, which: np.ndarray) -> _Galaxies:
        return _Galaxies(*(values[which] for values in self))


class _Batch(NamedTuple):
    """Galaxies that are drawn together, with the same settings."""

    which: np.ndarray  # rows of the galaxies, (B,)
    galaxies: _Galaxies
    period: int
    nodes: int  # nodes per side for the interpolation of periodic images; 0 if the images are neglected
    images: int  # number of periodic images that are summed

    def padded(self) -> _Batch:
        """The batch with its last galaxy repeated up to a power of two: JAX compiles operations for each length."""
        index = np.minimum(np.arange(1 << (len(self.which) - 1).bit_length()), len(self.which) - 1)
        return self._replace(which=self.which[index], galaxies=self.galaxies.take(index))


def on_host(array: Array) -> np.ndarray:
    """A NumPy array of float64, from an array on any device."""
    try:
        return np.asarray(array, dtype=float)
    except TypeError:  # on a GPU
        return np.asarray(array_api_compat.to_device(array, "cpu"), dtype=float)


def _positive(value: int, what: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise InputError(f"{what} is a positive integer; received {value!r}. Give 1 or more.")
    return number


def _images(batch: _Batch, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shifts along x and y of the periodic images that are summed [pix], and their weights: each (B, images).

    The ellipse of an image passes through the centre of the stamp; the images with the smallest ellipses
    are summed. Their weights fade outwards, so that the sum of the remaining images, from `_beyond`, is
    smooth.
    """
    galaxies, farthest = batch.galaxies, _farthest_ellipse(batch)
    shift_x, shift_y = batch.period * _lattice(min(int(farthest.max() / batch.period), 40) + 1)
    dx = shift_x + (galaxies.x - (size - 1) / 2)[:, None]
    dy = shift_y + (galaxies.y - (size - 1) / 2)[:, None]
    cos, sin = galaxies.cos / farthest, galaxies.sin / farthest
    u = dx * cos[:, None] + dy * sin[:, None]
    v = dy * (cos / galaxies.q)[:, None] - dx * (sin / galaxies.q)[:, None]
    area = u * u + v * v
    nearest = np.argpartition(area, batch.images, axis=1)[:, : batch.images]
    out = (area[np.arange(len(area))[:, None], nearest] - _FADE) / (1 - _FADE)
    out = np.minimum(np.maximum(out, 0), 1)
    return shift_x[nearest], shift_y[nearest], 1 - out * out * (3 - 2 * out)


@functools.cache
def _lattice(reach: int) -> np.ndarray:
    """Integers along x and y up to `reach`, without the origin: (2, images)."""
    y, x = (np.indices((2 * reach + 1, 2 * reach + 1)) - reach).reshape(2, -1)
    return np.stack([x, y])[:, (x != 0) | (y != 0)]


@functools.cache
def _fading() -> tuple[np.ndarray, np.ndarray]:
    """Sharp edges and their weights; the weighted mean of sharp edges is the fading of `_images`."""
    nodes, weights = np.polynomial.legendre.leggauss(6)
    out = (nodes + 1) / 2
    return out, weights * 3 * out * (1 - out)


def _farthest_ellipse(batch: _Batch) -> np.ndarray:
    """Semi-major axis of the ellipse that the galaxy and its periodic images fill, pixels: (B,)."""
    return batch.period * np.sqrt((batch.images + 1) / (np.pi * batch.galaxies.q))


def _beyond(batch: _Batch, *, derivatives: bool) -> list[np.ndarray]:
    """Light per pixel from the periodic images that are not summed, which is nearly uniform: each (B,).

    It is for unit flux. Derivatives are in the order of `Renderer._wrapped`.
    """
    n, b, q, r_eff = (getattr(batch.galaxies, name)[:, None] for name in ("n", "b", "q", "r_eff"))
    # The weights of images fade from 1 to 0, which is a mean over sharp edges.
    out, weights = _fading()
    weights = weights / batch.period**2
    edges = _farthest_ellipse(batch)[:, None] * np.sqrt(_FADE + out * (1 - _FADE)) / r_eff

    def light(n: np.ndarray, b: np.ndarray) -> np.ndarray:
        return special.gammaincc(2 * n, b * edges ** (1 / n)) @ weights

    here = light(n, b)
    if not derivatives:
        return [here]
    h, reduced = 1e-4, b * edges ** (1 / n)
    by_log_edge = -np.exp(2 * n * np.log(reduced) - reduced - special.gammaln(2 * n)) / n
    by_n = (light(n + h, sersic_b(n + h)) - light(n - h, sersic_b(n - h))) / (2 * h)
    nothing = np.zeros_like(here)
    return [here, nothing, nothing, (-by_log_edge / r_eff) @ weights, by_n, (-by_log_edge / (2 * q)) @ weights, nothing]


@functools.cache
def _interpolation(nodes_per_side: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Chebyshev nodes over a stamp's side and the matrix that interpolates from them."""
    angles = np.pi * (np.arange(nodes_per_side) + 0.5) / nodes_per_side
    nodes = np.cos(angles)
    signs = (-1.0) ** np.arange(nodes_per_side) * np.sin(angles)
    at = (np.arange(size) - (size - 1) / 2) / (size / 2)
    distance = at[:, None] - nodes
    ratio = signs / np.where(distance == 0, 1e-300, distance)
    weights = ratio / ratio.sum(axis=1, keepdims=True)
    return (size - 1) / 2 + nodes * size / 2, weights.astype(np.float32)
