"""PSFs of any telescope: random ones, that cover those of real images, and as they come out of a stack of stars.

They are drawn in Fourier space, where each part of a PSF (aperture, seeing, jitter, pixels) is a factor: that of the
aperture is the autocorrelation of its wave, and all others have formulas. They agree with those that GalSim draws to a
thousandth of the peak; drawing one takes some 40 ms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

FIELD = 129
"""Width and height of the image of a PSF, pixels of the exposure."""

_PERIOD = 192
"""Pixels after which a PSF that is drawn in Fourier space repeats itself; the image shows the middle of them."""

_RAYS = 120
_COLOURS = (-0.5, 0.0, 0.5)

_WEBB_STRUTS = (0.0, 150.0, 210.0)
"""Degrees; the first is towards the middle of a side of the central hexagon."""

RESAMPLINGS = ("none", "drizzle", "bilinear", "lanczos3")


@dataclass(frozen=True)
class Optics:
    """What makes a PSF, in pixels of the exposure.

    The light is that of an aperture (if `diffraction` is not 0) plus those of `profiles`. All of it is spread by
    `rays` and `blur`, and integrated over the pixels.

    Attributes
    ----------
    diffraction : float
        Wavelength over diameter of the aperture, pixels; 0 if diffraction is not resolved, as below an atmosphere.
    band : float
        Width of the passband, as a fraction of its wavelength.
    obscuration : float
        Diameter of the central obscuration, of that of the aperture.
    struts : int
        Number of struts from the centre to the rim, at equal angles; between hexagons, the three of JWST.
    strut_width : float
        Of a strut, in diameters of the aperture.
    hexagons : bool
        Whether the aperture is that of two rings of hexagonal mirrors (JWST) instead of a circle.
    angle : float
        Of the first strut, degrees from +x to +y.
    wavefront : tuple of float
        Coefficients of the Zernike polynomials 4 to 15 (Noll 1976), waves rms, of the aperture's wave.
    profiles : tuple of (float, float, float)
        Share of the light, FWHM in pixels, and exponent beta of Moffat profiles; beta 0 is for atmospheric
        turbulence (von Karman with `outer_scale`).
    outer_scale : float
        Outer scale of turbulence over Fried's parameter; 0 for none (Kolmogorov).
    ellipticity, position_angle : float
        1 - b/a of the profiles and the blur, and the angle of their major axis, degrees from +x to +y.
    rays : tuple of float
        Coefficients of the same polynomials: their gradients are the distances, in pixels, from the centre at which
        rays arrive (geometrical optics of a large aperture).
    blur : float
        Standard deviation of a Gaussian for jitter and diffusion of charge, pixels.
    pixel : float
        Side of the detector's pixels.
    resampling : str
        How the exposure was made of the detector's pixels: one of `RESAMPLINGS`. "none" is for the detector itself.
    drop : float
        Side of a drop of "drizzle", in pixels of the detector.
    turn : float
        Angle of the detector's pixels to those of the exposure, degrees.
    """

    diffraction: float = 0.0
    band: float = 0.0
    obscuration: float = 0.0
    struts: int = 0
    strut_width: float = 0.0
    hexagons: bool = False
    angle: float = 0.0
    wavefront: tuple[float, ...] = ()
    profiles: tuple[tuple[float, float, float], ...] = ()
    outer_scale: float = 0.0
    ellipticity: float = 0.0
    position_angle: float = 0.0
    rays: tuple[float, ...] = ()
    blur: float = 0.0
    pixel: float = 1.0
    resampling: str = "none"
    drop: float = 1.0
    turn: float = 0.0

    def image(self, oversampling: int = 1) -> np.ndarray:
        """The effective PSF: integrated over the pixel once, whatever the sampling.

        Parameters
        ----------
        oversampling : int
            Samples per pixel of the exposure, along an axis.

        Returns
        -------
        ndarray, float64, (P, P)
            With P = 128 `oversampling` + 1, so that every second sample of ``image(2)`` is one of ``image(1)``, but
            for the norm. The sum is 1: light outside of the field is left out. The centroid of the core is on the
            middle pixel.
        """
        fine = oversampling * -(-self._finest() // oversampling)
        side = _PERIOD * fine
        ky = np.fft.fftfreq(side, 1 / fine)[:, None]
        kx = np.fft.rfftfreq(side, 1 / fine)[None, :]
        transfer = self._light(kx, ky) * self._pixels(kx, ky)
        from scipy import fft

        drawn = fft.irfft2(transfer, (side, side))
        dx, dy = _core_offset(drawn, fine)
        transfer *= np.exp(2j * np.pi * dx * kx)
        transfer *= np.exp(2j * np.pi * dy * ky)
        drawn = fft.irfft2(transfer, (side, side))
        half, step = FIELD // 2 * oversampling, fine // oversampling
        at = np.arange(-half, half + 1) * step
        image = drawn[np.ix_(at, at)].astype(float)
        return image / image.sum()

    def _finest(self) -> int:
        """Samples per pixel that hold all frequencies of the PSF: an even number."""
        limit = 1.0
        if self.diffraction:
            limit = max(limit, 1 / (self.diffraction * (1 - self.band / 2)))
        narrowest = min((width for share, width, _ in self.profiles if share > 0.3), default=np.inf)
        limit = max(limit, min(2 / narrowest, 3.0))
        return 2 * int(np.ceil(limit))

    def _light(self, kx: np.ndarray, ky: np.ndarray) -> np.ndarray:
        """Transfer function of all that is before the detector, complex64."""
        q = 1 - self.ellipticity
        turn = np.deg2rad(self.position_angle)
        along = (kx * np.cos(turn) + ky * np.sin(turn)) / np.sqrt(q)
        across = (ky * np.cos(turn) - kx * np.sin(turn)) * np.sqrt(q)
        square = (along**2 + across**2).astype(np.float32)
        light = np.zeros(square.shape, np.complex64)
        if self.diffraction:
            light += (1 - sum(share for share, _, _ in self.profiles)) * self._aperture(len(ky), kx.shape[1])
        if self.profiles:
            # Profiles are functions of the radius alone: they are read from one table, finer towards zero frequency.
            table = np.linspace(0, 1, 2048)
            radius = np.sqrt(float(square.max())) * table**2
            value = sum(
                share * (_moffat(radius, width, beta) if beta else _turbulence(radius, width, self.outer_scale))
                for share, width, beta in self.profiles
            )
            light += np.interp(np.sqrt(np.sqrt(square) / radius[-1]), table, value).astype(np.float32)
        if self.blur:
            light *= np.exp(np.float32(-2 * np.pi**2 * self.blur**2) * square)
        if self.rays:
            light *= self._scatter(kx, ky)
        return light

    def _aperture(self, side: int, columns: int) -> np.ndarray:
        """Transfer function of the aperture: the mean of those at three wavelengths."""
        from scipy import fft

        total: Any = 0.0
        for colour in _COLOURS:
            stretch = 1 + colour * self.band
            wave = self._wave(2 * self.diffraction * stretch / _PERIOD, 1 / stretch)
            wide = fft.fft(wave, side, axis=1)
            total = total + np.abs(fft.fft(wide, side, axis=0)) ** 2 / np.abs(wave**2).sum()
        # Pixels of the aperture that the edge crosses hold a mean over them, which dims the light far from the centre.
        dimmed = np.sinc(np.fft.fftfreq(side)).astype(np.float32) ** 2
        transfer = fft.rfft2(total / dimmed / dimmed[:, None])[:, :columns]
        return transfer / transfer[0, 0]

    def _wave(self, step: float, phase: float) -> np.ndarray:
        """The wave in the aperture, complex64, on pixels of `step` radii; aberrations are multiplied by `phase`."""
        half = int(np.ceil(1 / step)) + 1
        line = (np.arange(-half, half + 1) * step).astype(np.float32)
        y, x = line[:, None], line[None, :]
        radius = np.sqrt(x**2 + y**2)
        open_ = _hexagons(x, y, step, np.deg2rad(self.angle)) if self.hexagons else _inside(1 - radius, step)
        if self.obscuration and not self.hexagons:
            open_ = open_ * _inside(radius - self.obscuration, step)
        apart = _WEBB_STRUTS if self.hexagons and self.struts else np.arange(self.struts) * 360 / max(self.struts, 1)
        for strut in apart:
            turn = np.deg2rad(self.angle + strut)
            cos, sin = float(np.cos(turn)), float(np.sin(turn))
            across, outward = y * cos - x * sin, x * cos + y * sin > 0
            hidden = _inside(self.strut_width + across, step) + _inside(self.strut_width - across, step) - 1
            open_ = open_ * (1 - outward * np.clip(hidden, 0, 1))
        lag = np.float32(2 * np.pi * phase) * _zernike(self.wavefront, x, y)
        return np.asarray(open_ * np.cos(lag) + 1j * (open_ * np.sin(lag)), np.complex64)

    def _scatter(self, kx: np.ndarray, ky: np.ndarray) -> np.ndarray:
        """Transfer function of rays that arrive at the distances given by `rays`."""
        dx, dy = _arrivals(self.rays, self.obscuration)
        rows = np.exp(-2j * np.pi * ky * dy).astype(np.complex64)
        columns = np.exp(-2j * np.pi * dx[:, None] * kx).astype(np.complex64)
        return rows @ columns / _RAYS

    def _pixels(self, kx: np.ndarray, ky: np.ndarray) -> np.ndarray:
        """Transfer function of the detector's pixels and of the resampling, float32."""
        turn = np.deg2rad(self.turn)
        if abs(turn) > 1e-9:
            kx, ky, straight = kx * np.cos(turn) + ky * np.sin(turn), ky * np.cos(turn) - kx * np.sin(turn), (kx, ky)
        else:
            straight = (kx, ky)
        product: Any = 1.0
        for k, output in zip((kx, ky), straight, strict=True):
            factor = np.sinc(k * self.pixel)
            if self.resampling == "drizzle":
                factor = factor * np.sinc(k * self.pixel * self.drop)
                product = product * np.sinc(output).astype(np.float32)
            elif self.resampling == "bilinear":
                factor = factor * np.sinc(k * self.pixel) ** 2
            elif self.resampling == "lanczos3":
                factor = factor * _lanczos(k * self.pixel)
            product = product * factor.astype(np.float32)
        return product


def _inside(depth: np.ndarray, step: float) -> np.ndarray:
    """Share of pixels of size `step` that is inside of an edge, whose depth is given at their centres."""
    return np.clip(0.5 + depth / step, 0, 1)


def _hexagons(x: np.ndarray, y: np.ndarray, step: float, turn: float) -> np.ndarray:
    """Share of pixels that two rings of hexagons, in a circle of radius 1, cover."""
    apart = 2 / math.sqrt(25 + 1 / 3)  # of the centres of neighbours: the outermost corners are on the circle
    share: Any = 0.0
    for ox in (-0.25, 0.25):
        for oy in (-0.25, 0.25):
            u, v = x + ox * step, y + oy * step
            u, v = u * math.cos(turn) + v * math.sin(turn), v * math.cos(turn) - u * math.sin(turn)
            a = (u - v / math.sqrt(3)) / apart
            b = 2 * v / math.sqrt(3) / apart
            c = -a - b
            ra, rb, rc = np.rint(a), np.rint(b), np.rint(c)
            ea, eb, ec = np.abs(ra - a), np.abs(rb - b), np.abs(rc - c)
            first = (ea > eb) & (ea > ec)
            second = ~first & (eb > ec)
            ra, rb = np.where(first, -rb - rc, ra), np.where(second, -ra - rc, rb)
            ring = np.maximum(np.maximum(np.abs(ra), np.abs(rb)), np.abs(ra + rb))
            share = share + ((ring > 0) & (ring < 3)) / 4
    return share


def _zernike(coefficients: tuple[float, ...], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sum of the Zernike polynomials from the fourth (Noll 1976), each of unit rms over the circle."""
    r2 = x**2 + y**2
    x2, y2 = x**2 - y**2, 2 * x * y
    root = math.sqrt
    terms = (
        lambda: root(3) * (2 * r2 - 1),
        lambda: root(6) * y2,
        lambda: root(6) * x2,
        lambda: root(8) * (3 * r2 - 2) * y,
        lambda: root(8) * (3 * r2 - 2) * x,
        lambda: root(8) * (3 * x**2 - y**2) * y,
        lambda: root(8) * (x**2 - 3 * y**2) * x,
        lambda: root(5) * (6 * r2**2 - 6 * r2 + 1),
        lambda: root(10) * (4 * r2 - 3) * x2,
        lambda: root(10) * (4 * r2 - 3) * y2,
        lambda: root(10) * (x2**2 - y2**2),
        lambda: root(10) * 2 * x2 * y2,
    )
    return np.asarray(sum((c * term() for c, term in zip(coefficients, terms, strict=False) if c), 0 * r2))


def _arrivals(coefficients: tuple[float, ...], obscuration: float) -> tuple[np.ndarray, np.ndarray]:
    """Where rays arrive, x and y from their mean: the gradient of the polynomials at points all over the aperture."""
    number = np.arange(_RAYS) + 0.5  # as a sunflower's seeds, which cover it evenly
    radius = np.sqrt(obscuration**2 + (1 - obscuration**2) * number / _RAYS)
    turn = number * np.pi * (3 - math.sqrt(5))
    x, y, tiny = radius * np.cos(turn), radius * np.sin(turn), 1e-4
    dx = (_zernike(coefficients, x + tiny, y) - _zernike(coefficients, x - tiny, y)) / (2 * tiny)
    dy = (_zernike(coefficients, x, y + tiny) - _zernike(coefficients, x, y - tiny)) / (2 * tiny)
    return dx - dx.mean(), dy - dy.mean()


def _moffat(k: np.ndarray, fwhm: float, beta: float) -> np.ndarray:
    """Transfer function of a Moffat profile of unit flux, of exponent above 1."""
    from scipy import special

    x = np.maximum(np.pi * fwhm / np.sqrt(2 ** (1 / beta) - 1) * k, 1e-12)
    return np.where(x < 600, 2 * (x / 2) ** (beta - 1) * special.kv(beta - 1, np.minimum(x, 600)), 0) / special.gamma(
        beta - 1
    )


def _turbulence(k: np.ndarray, fwhm: float, outer_scale: float) -> np.ndarray:
    """Transfer function of a long exposure through von Karman turbulence; see e.g. Tokovinin (2002).

    `fwhm` is that without an outer scale: 0.9759 wavelengths over Fried's parameter.
    """
    from scipy import special

    ratio = k * fwhm / 0.9759  # the baseline in units of Fried's parameter
    if not outer_scale:
        return np.exp(-3.44 * ratio ** (5 / 3))
    x = np.maximum(2 * np.pi * ratio / outer_scale, 1e-9)
    rest = 1 - 2 ** (1 / 6) / special.gamma(5 / 6) * x ** (5 / 6) * special.kv(5 / 6, x)
    return np.exp(-0.5 * 0.17253 * outer_scale ** (5 / 3) * rest)


def _lanczos(k: np.ndarray) -> np.ndarray:
    """Transfer function of Lanczos's kernel of order 3, whose unit is a pixel; its mean over all phases is 1."""
    t = np.linspace(-3, 3, 601)
    kernel = np.sinc(t) * np.sinc(t / 3)
    table = np.linspace(0, 3, 601)
    value = np.cos(2 * np.pi * table[:, None] * t) @ kernel / kernel.sum()
    return np.interp(np.abs(k), table, value)


def _core_offset(image: np.ndarray, fine: int) -> tuple[float, float]:
    """Where the core of a PSF that is about the corner of an image has its centroid, x and y in pixels.

    It is weighted with the round Gaussian about itself that is as wide as the core seen through it.
    """
    reach = 16 * fine
    near = np.arange(-reach, reach + 1)
    core = image[np.ix_(near, near)]
    row, column = np.unravel_index(int(core.argmax()), core.shape)
    cx, cy = float(near[column]), float(near[row])
    sigma = np.sqrt((core > core.max() / 2).sum() / np.pi) * 2 / 2.355
    for _ in range(100):
        to_x, to_y = near - cx, near - cy
        wx, wy = (np.exp(-0.5 * (to / sigma) ** 2) for to in (to_x, to_y))
        along_x, along_y = (wy @ core) * wx, (core @ wx) * wy
        total = along_x.sum()
        mx, my = (along_x * to_x).sum() / total, (along_y * to_y).sum() / total
        square = ((along_x * to_x**2).sum() + (along_y * to_y**2).sum()) / total
        before, sigma = sigma, float(np.clip(np.sqrt(max(square, 0)), 0.3 * fine, 5 * fine))
        cx, cy = cx + 2 * mx, cy + 2 * my
        if max(abs(mx), abs(my), abs(sigma - before)) < 1e-5 * fine:
            break
    return cx / fine, cy / fine


def draw_optics(rng: np.random.Generator) -> Optics:
    """Draw a PSF of any telescope.

    Parameters
    ----------
    rng : numpy.random.Generator

    Returns
    -------
    Optics
        Of an FWHM that is about log-uniform from 1 to 8 pixels. Below 1.6 pixels the telescope is in space, and above
        it is either there or on the ground. One in ten has a sky that was taken too high around it: a wide profile
        of negative light.
    """
    fwhm = float(np.exp(rng.uniform(np.log(1.0), np.log(7.8))))
    space = rng.random() < np.interp(fwhm, [1.6, 2.0, 4.5, 8.0], [1, 0.6, 0.4, 0.3])
    drawn = _in_space(rng, fwhm) if space else _on_the_ground(rng, fwhm)
    if rng.random() > 0.1:
        return drawn
    share, width = 0.15 * rng.random(), fwhm * rng.uniform(3, 8)
    parts = [(part * (1 + share), wide, beta) for part, wide, beta in drawn.profiles]
    return replace(drawn, profiles=(*parts, (-share, float(width), float(rng.uniform(2, 5)))))


def _in_space(rng: np.random.Generator, fwhm: float) -> Optics:
    """Draw the PSF of a space telescope: diffraction, often a halo, and pixels."""
    resampling = "drizzle" if rng.random() < 0.65 and fwhm > 1.35 else "none"
    pixel = float(rng.uniform(0.6, min(4.0, max(0.7 * fwhm, 0.8)))) if resampling == "drizzle" else 1.0
    drop, band = float(rng.uniform(0.6, 1.0)), float(rng.uniform(0.05, 0.45))
    boxes = pixel**2 * (1 + drop**2) + 1 if resampling == "drizzle" else 1.0
    rest = fwhm**2 - 0.5 * boxes
    blurred = float(rng.uniform(0.0, 0.35))
    width = np.sqrt(max(rest, 0.2) * (1 - blurred))
    diffraction = float(max(width / 1.03, 0.5 / (1 - band / 2)))
    rms = 0.12 * rng.random() ** 1.5
    coefficients = rng.normal(size=12) / np.sqrt([1, 1, 1, 1, 1, 1.5, 1.5, 1, 3, 3, 3, 3])
    wavefront = rms * coefficients / np.sqrt((coefficients**2).sum())
    hexagons = rng.random() < 0.45
    struts = 3 if hexagons else int(rng.choice([0, 3, 4, 6], p=[0.15, 0.25, 0.4, 0.2]))
    profiles: tuple[tuple[float, float, float], ...] = ()
    if rng.random() < 0.7:
        share = float((0.15 if hexagons else 0.4) * rng.random() ** 1.5)
        profiles = ((share, float(fwhm * np.exp(rng.uniform(0.2, 1.8))), float(rng.uniform(1.3, 3.0))),)
    return Optics(
        diffraction=diffraction,
        band=band,
        obscuration=float(rng.uniform(0.0, 0.4)),
        struts=struts,
        strut_width=float(rng.uniform(0.005, 0.05)),
        hexagons=bool(hexagons),
        angle=float(rng.uniform(0, 360)),
        wavefront=tuple(float(c) for c in wavefront),
        profiles=profiles,
        ellipticity=float(rng.uniform(0, 0.3)),
        position_angle=float(rng.uniform(0, 180)),
        blur=float(np.sqrt(max(rest, 0.2) * blurred) / 2.355),
        pixel=pixel,
        resampling=resampling,
        drop=drop,
        turn=float(rng.uniform(0, 90)) if resampling == "drizzle" else 0.0,
    )


def _on_the_ground(rng: np.random.Generator, fwhm: float) -> Optics:
    """Draw the PSF of a telescope below the atmosphere: seeing, small aberrations, and pixels."""
    resampling = str(rng.choice(RESAMPLINGS, p=[0.45, 0.1, 0.1, 0.35]))
    pixel = 1.0 if resampling == "none" else float(rng.uniform(0.7, 1.2))
    boxes = {"none": 1, "drizzle": 3, "bilinear": 3, "lanczos3": 1}[resampling]
    obscuration, off = float(rng.uniform(0.2, 0.6)), 0.25 * fwhm * rng.random() * (rng.random() < 0.7)
    seeing = float(np.sqrt(max(fwhm**2 - 0.5 * boxes * pixel**2 - 2.8 * off**2, 0.5 * fwhm**2)))
    beta = float(np.exp(rng.uniform(np.log(2), np.log(7)))) if rng.random() < 0.7 else 0.0
    parts = [[1.0, seeing, beta]]
    if rng.random() < 0.4:  # exposures of two seeings, or a core in a wide wing
        if rng.random() < 0.5:
            share, ratio = rng.uniform(0.1, 0.6), rng.uniform(1.0, 1.8)
            parts = [[1 - share, seeing / np.sqrt(1 + share * (ratio**2 - 1) / 2), beta], [share, 0, beta]]
            parts[1][1] = parts[0][1] * ratio
        else:
            share = rng.uniform(0.02, 0.25)
            parts = [[1 - share, seeing, beta], [share, seeing * rng.uniform(1.5, 3.5), rng.uniform(1.6, 3.5)]]
    if rng.random() < 0.5:  # an aureole of dust and scattering
        share = 0.08 * rng.random()
        parts = [[s * (1 - share), w, b] for s, w, b in parts]
        parts.append([share, seeing * rng.uniform(3, 8), rng.uniform(1.3, 2.0)])
    coefficients = rng.normal(size=12) / np.sqrt([2, 2, 2, 4, 4, 4, 4, 12, 20, 20, 20, 20])
    rays = off * coefficients / np.sqrt(np.mean(np.square(_arrivals(tuple(coefficients), obscuration)).sum(axis=0)))
    return Optics(
        obscuration=obscuration,
        profiles=tuple((float(s), float(w), float(b)) for s, w, b in parts),
        outer_scale=float(np.exp(rng.uniform(np.log(30), np.log(1000)))) if rng.random() < 0.7 else 0.0,
        ellipticity=float(0.25 * rng.random() ** 2),
        position_angle=float(rng.uniform(0, 180)),
        rays=tuple(float(c) for c in rays) if off else (),
        blur=float(seeing * rng.uniform(0, 0.12)),
        pixel=pixel,
        resampling=resampling,
        drop=float(rng.uniform(0.6, 1.0)),
        turn=float(rng.uniform(0, 90)) if resampling != "none" else 0.0,
    )


def measured(image: np.ndarray, oversampling: int, rng: np.random.Generator) -> np.ndarray:
    """The same PSF as it comes out of a stack of stars, or, in half of the draws, as it is.

    The stack has 5 to 100 stars with a signal to noise of 30 to 1000. Its noise is correlated; its width is off by
    up to 2 %, and its centre by up to 0.03 pixels. Where the noise would hide the wings, they are a power law whose
    steepness is off; or, in every third stack, it has no light outside of a box of 6 to 16 FWHM. A sky that is off
    leaves a pedestal.

    Parameters
    ----------
    image : ndarray, float64, (P, P)
        Effective PSF, centred on the middle pixel.
    oversampling : int
        Pixels of `image` per pixel of the exposure, along an axis.
    rng : numpy.random.Generator

    Returns
    -------
    ndarray, float64, (P, P)
        Of unit sum. Pixels may be negative.
    """
    if rng.random() < 0.5:
        return image / image.sum()
    from scipy import ndimage

    snr = np.exp(rng.uniform(np.log(30), np.log(1000))) * np.sqrt(np.exp(rng.uniform(np.log(5), np.log(100))))
    middle = len(image) // 2
    stretch = 1 + float(np.clip(rng.normal(0, 0.008), -0.02, 0.02))
    off = np.clip(rng.normal(0, 0.012, 2), -0.03, 0.03) * oversampling
    stack = ndimage.affine_transform(
        image, np.full(2, 1 / stretch), middle - (middle + off) / stretch, order=3, mode="nearest"
    )
    # White noise, at which a fit of the PSF has this signal to noise, is smoothed: its power on large scales stays.
    smooth = oversampling * rng.uniform(0.35, 0.9)
    grain = ndimage.gaussian_filter(rng.normal(size=image.shape), smooth, mode="wrap", truncate=3)
    grain *= np.sqrt((image**2).sum()) / snr
    noise = grain.std()
    photons = rng.random()
    depth = np.sqrt(1 - photons + photons * np.maximum(image, 0) * image.sum() / (image**2).sum())
    stack += depth * grain
    stack += rng.normal(0, 0.002) / image.size
    if rng.random() < 1 / 3:
        line = np.abs(np.arange(len(image)) - middle)
        box = line <= rng.uniform(3, 8) * 2 * np.sqrt((image > image.max() / 2).sum() / np.pi)
        stack *= box[:, None] & box
    else:
        stack = _with_power_law(stack, image, 3 * noise * np.sqrt(1 - photons), oversampling, rng)
    return stack / stack.sum()


def _with_power_law(
    stack: np.ndarray, truth: np.ndarray, limit: float, oversampling: int, rng: np.random.Generator
) -> np.ndarray:
    """A stack whose wings, from where their mean is below `limit`, are a power law of about their height."""
    middle = len(truth) // 2
    line = np.arange(len(truth)) - middle
    radius = np.hypot(line[:, None], line[None, :])
    ring = np.rint(radius).astype(int)
    profile = np.bincount(ring.ravel(), truth.ravel())[: middle + 1] / np.bincount(ring.ravel())[: middle + 1]
    half = int(np.argmax(profile < profile[0] / 2))
    first = max(int(np.argmax(profile < limit)) if profile.min() < limit else middle, 4 * half, 3 * oversampling)
    if first > middle / 1.5:
        return stack
    # Rings wide enough for diffraction to average out, on both sides of where the power law begins.
    inner, outer = (profile[a:b].mean() for a, b in ((int(first / 1.5), first), (first, int(1.5 * first))))
    steepness = np.log(max(inner, limit / 100) / max(outer, limit / 100)) / np.log(1.5)
    level = np.sqrt(max(inner, limit / 100) * max(outer, limit / 100)) * np.exp(rng.normal(0, 0.08))
    slope = np.clip(steepness + rng.normal(0, 0.3), 2, 5)
    return np.where(radius < first, stack, level * (first / np.maximum(radius, 1)) ** slope)
