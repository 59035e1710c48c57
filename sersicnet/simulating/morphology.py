"""Galaxies that are not Sersic profiles, as most bright galaxies are not.

A galaxy is a bulge and a disc of different index, axis ratio and angle, or a
spheroid with a halo. Discs may have a bar, logarithmic spiral arms, a ring, clumps of
young stars, a brighter side, an outer edge and, if they are edge-on, a dust lane; both
kinds may have a tidal tail and a small companion. The smooth parts are drawn
exactly, by `sersicnet.engine.render`; what arms, clumps and dust add or remove is
drawn on a finer grid and convolved with the PSF.

The label of such a stamp is the result of a single Sersic fit to it, which is what
catalogues made with GALFIT list for real galaxies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy import fft, ndimage, optimize, special

from sersicnet.engine.render import Renderer, sersic_b

GRIDS = ((160, 4), (320, 2))
"""Periods in pixels and oversampling of the grids for structure; the smaller grid is for small galaxies."""

PSF_VARIANTS = 8

_RING_WIDTH = 0.2


class Arms(NamedTuple):
    """Logarithmic spiral arms: number, contrast, sharpness, winding d(angle) / d(ln r), phase."""

    number: int
    contrast: float
    sharpness: float
    winding: float
    phase: float


@dataclass(frozen=True)
class Galaxy:
    """A galaxy before the PSF.

    Attributes
    ----------
    components : ndarray, float, (K, 7)
        Smooth Sersic components, as `sersicnet.engine.render.Renderer` takes them.
    disc : ndarray, float, (7,) or None
        The component that has the structure.
    arms : Arms or None
    lopsided : (float, float)
        Strength and angle of the brighter side, in the plane of the disc.
    dust : (float, float, float)
        Depth, height and offset [pix] of a lane along the major axis.
    ring : (float, float)
        Strength, and radius in effective radii of the disc.
    edge : float
        Radius at which the disc ends, in effective radii of the disc.
    tail : (float, float, float)
        Strength, winding and phase of a tidal tail.
    clumps : ndarray, float, (M, 4)
        x, y, flux and standard deviation [pix].
    """

    components: np.ndarray
    disc: np.ndarray | None = None
    arms: Arms | None = None
    lopsided: tuple[float, float] = (0.0, 0.0)
    dust: tuple[float, float, float] = (0.0, 1.0, 0.0)
    ring: tuple[float, float] = (0.0, 1.0)
    edge: float = np.inf
    tail: tuple[float, float, float] = (0.0, 1.0, 0.0)
    clumps: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))


def invent(galaxy: np.ndarray, rng: np.random.Generator) -> Galaxy:
    """Make a galaxy of several parts whose single Sersic fit is close to a given one.

    Parameters
    ----------
    galaxy : ndarray, float, (7,)
        Position, flux, half-light radius, index, axis ratio and angle, as
        `sersicnet.engine.render.Renderer` takes them.
    rng : numpy Generator
    """
    x, y, flux, r_eff, n, q, theta = galaxy
    late = np.clip(np.log(4.5 / n) / np.log(4.5 / 0.9), 0, 1)
    bulge = np.clip(0.9 * (1 - late) ** 1.3 + (0.12 * rng.standard_normal() if 0 < late < 1 else 0), 0, 1)
    if bulge > 0.75:
        halo = rng.uniform(0.05, 0.25)
        angle = theta + 15 * rng.standard_normal()
        inner = [x, y, flux * (1 - halo), 0.85 * r_eff, n * np.exp(0.05 * rng.standard_normal()), q, theta]
        outer = [x, y, flux * halo, 2.2 * r_eff, 1.0, min(1.0, q + 0.1 * rng.random()), angle]
        parts = [_drawable(inner), _drawable(outer), *_companion(galaxy, rng)]
        lopsided = abs(0.4 * rng.standard_normal()), rng.uniform(0, 2 * np.pi)
        return Galaxy(np.array(parts), np.array(outer), lopsided=lopsided, tail=_tail(rng))
    return _disc_galaxy(galaxy, bulge if bulge > 0.03 else 0.0, rng)


def _disc_galaxy(galaxy: np.ndarray, bulge: float, rng: np.random.Generator) -> Galaxy:
    x, y, flux, r_eff, n, q, theta = galaxy
    n_disc = float(np.clip(0.9 + 0.15 * rng.standard_normal(), 0.5, 1.3))
    if bulge == 0:
        n_disc = float(np.clip(n * np.exp(0.1 * rng.standard_normal()), 0.35, 1.4))
    n_bulge = float(np.clip(2.2 * np.exp(0.35 * rng.standard_normal()), 0.8, 5))
    ratio = float(np.clip(0.25 * np.exp(0.4 * rng.standard_normal()), 0.08, 0.8))
    r_disc = r_eff / _half_light(bulge, ratio, n_bulge, n_disc)
    q_disc = float(np.clip(q - 0.5 * bulge * (1 - q) * rng.random(), 0.12, 1))
    q_bulge = min(1.0, q_disc + (1 - q_disc) * rng.uniform(0.3, 0.8))
    disc = np.array([x, y, flux * (1 - bulge), r_disc, n_disc, q_disc, theta])
    parts = [disc]
    if bulge > 0:
        angle = theta + 8 * rng.standard_normal()
        parts.append(np.array(_drawable([x, y, flux * bulge, ratio * r_disc, n_bulge, q_bulge, angle])))
    if rng.random() < 0.35 and q_disc > 0.3:
        share = rng.uniform(0.04, 0.16) * disc[2]
        parts.append(_bar(disc, share, rng))
        disc[2] -= share
    arms = None
    if rng.random() < 0.7:
        number = int(rng.choice([1, 2, 2, 2, 3, 4]))
        pitch = np.radians(np.clip(20 * np.exp(0.35 * rng.standard_normal()), 8, 45))
        contrast = float(np.clip(0.6 * np.exp(0.5 * rng.standard_normal()), 0, 1.2))
        winding = rng.choice([-1, 1]) / np.tan(pitch)
        arms = Arms(number, contrast, rng.uniform(0.7, 2.5), winding, rng.uniform(0, 2 * np.pi))
    lopsided = min(0.8, abs(0.5 * rng.standard_normal())), rng.uniform(0, 2 * np.pi)
    dust = (0.0, 1.0, 0.0)
    if q_disc < 0.35 and rng.random() < 0.6:
        dust = rng.uniform(0.15, 0.6), rng.uniform(0.08, 0.16) * r_disc, 0.08 * r_disc * rng.standard_normal()
    ring = (rng.uniform(0.2, 1.0), rng.uniform(0.7, 1.7)) if rng.random() < 0.25 else (0.0, 1.0)
    edge = rng.uniform(1.4, 2.6) if rng.random() < 0.6 else np.inf
    young = 0.09 if bulge < 0.25 else 0.04
    share = float(np.clip(young * np.exp(0.7 * rng.standard_normal()), 0, 0.35))
    clumps = _clumps(disc, share, 1 + rng.poisson(8 if bulge < 0.25 else 4), arms, rng)
    disc[2] -= clumps[:, 2].sum()
    parts += [np.array(row) for row in _companion(galaxy, rng)]
    return Galaxy(np.array(parts), disc, arms, lopsided, dust, ring, edge, _tail(rng), clumps)


def _tail(rng: np.random.Generator) -> tuple[float, float, float]:
    if rng.random() > 0.15:
        return 0.0, 1.0, 0.0
    return rng.uniform(1, 4), float(rng.choice([-1, 1])) * rng.uniform(0.5, 2), rng.uniform(0, 2 * np.pi)


def _companion(galaxy: np.ndarray, rng: np.random.Generator) -> list[list[float]]:
    """Draw an infalling small galaxy, which one galaxy in eight has; its light counts as the galaxy's."""
    x, y, flux, r_eff, *_ = galaxy
    if rng.random() > 0.125:
        return []
    distance, angle = rng.uniform(0.7, 2) * r_eff, rng.uniform(0, 2 * np.pi)
    radius, share = max(0.5, rng.uniform(0.15, 0.35) * r_eff), rng.uniform(0.02, 0.12)
    place = [x + distance * np.cos(angle), y + distance * np.sin(angle)]
    return [[*place, share * flux, radius, rng.uniform(0.8, 2), rng.uniform(0.4, 1), rng.uniform(-90, 90)]]


def _drawable(row: list[float]) -> list[float]:
    """Clip the Sersic index of a component to the range of the renderer."""
    return [*row[:4], float(np.clip(row[4], 0.35, 7.5)), *row[5:]]


def _half_light(bulge: float, ratio: float, n_bulge: float, n_disc: float) -> float:
    """Half-light radius of bulge and disc together, in units of the disc's."""

    def enclosed(log_radius: float) -> float:
        radius = np.exp(log_radius)
        of_bulge = special.gammainc(2 * n_bulge, sersic_b(n_bulge) * (radius / ratio) ** (1 / n_bulge))
        of_disc = special.gammainc(2 * n_disc, sersic_b(n_disc) * radius ** (1 / n_disc))
        return float(bulge * of_bulge + (1 - bulge) * of_disc - 0.5)

    return float(np.exp(optimize.brentq(enclosed, np.log(0.5 * ratio), np.log(2.0))))


def _bar(disc: np.ndarray, flux: float, rng: np.random.Generator) -> np.ndarray:
    """A bar in the plane of a disc, projected."""
    x, y, _, r_disc, _, q, theta = disc
    angle, length, thin = rng.uniform(0, np.pi), rng.uniform(0.25, 0.55) * r_disc, rng.uniform(0.25, 0.45)
    cos, sin = np.cos(angle), np.sin(angle)
    projected = np.diag([1, q]) @ np.array([[cos, -sin], [sin, cos]]) @ np.diag([1, thin])
    axes, (major, minor), _ = np.linalg.svd(projected)
    seen = theta + np.degrees(np.arctan2(axes[1, 0], axes[0, 0]))
    return np.array([x, y, flux, major * length, 0.5, max(0.1, minor / major), seen])


def _clumps(disc: np.ndarray, share: float, number: int, arms: Arms | None, rng: np.random.Generator) -> np.ndarray:
    """Draw star-forming regions, on the arms if there are any, with a power law of fluxes."""
    x, y, flux, r_disc, _, q, theta = disc
    radius = np.minimum(0.7 * r_disc * rng.gamma(2, 1, number), 2.5 * r_disc)
    angle = rng.uniform(0, 2 * np.pi, number)
    if arms is not None:
        along = arms.winding * np.log(np.maximum(radius / r_disc, 1e-3)) + arms.phase
        angle = along + 2 * np.pi * rng.integers(arms.number, size=number) / arms.number
        angle += rng.normal(0, 0.35, number)
    fluxes = 1 + rng.pareto(2.2, number)
    fluxes *= share * flux / fluxes.sum()
    u, v = radius * np.cos(angle), q * radius * np.sin(angle)
    cos, sin = np.cos(np.radians(theta)), np.sin(np.radians(theta))
    sigma = rng.uniform(0.5, 1.8, number) * np.clip(np.sqrt(r_disc / 6), 0.5, 2)
    return np.column_stack([x + u * cos - v * sin, y + u * sin + v * cos, fluxes, sigma])


class Painter:
    """Draws galaxies of several parts through one PSF.

    Parameters
    ----------
    psf : ndarray, float, (P, P)
        Effective PSF; see `sersicnet.engine.render.Renderer`.
    size : int
        Width and height of the images.
    oversampling : int
        Samples of the PSF per pixel of the images, along an axis: 1 or 2.
    """

    def __init__(self, psf: np.ndarray, size: int, oversampling: int = 1) -> None:
        self.size, self.oversampling = size, oversampling
        self.render = Renderer(psf, size, oversampling)
        self._transforms = [_transform(psf, period * oversampling) for period, _ in GRIDS]

    def __call__(self, galaxy: Galaxy) -> np.ndarray:
        """Draw a galaxy, float32, (size, size)."""
        image = self.render(galaxy.components).sum(axis=0)
        if galaxy.disc is not None:
            self._add_structure(image, galaxy, galaxy.disc)
        return image

    def _add_structure(self, image: np.ndarray, galaxy: Galaxy, disc: np.ndarray) -> None:
        x, y, _, r_disc, *_ = disc
        reach = 4.0 * r_disc
        which = 0 if reach < GRIDS[0][0] / 2 - 24 else 1
        period, fine = GRIDS[which]
        # The grid is centred on the image; grid point `fine * i` is pixel `first + i`.
        first = (self.size - period) // 2
        grid = np.zeros((period * fine, period * fine), np.float32)
        low = np.array([y - first - reach, x - first - reach]) * fine
        high = np.array([y - first + reach, x - first + reach]) * fine
        rows, columns = (slice(max(0, int(a)), min(len(grid), int(b) + 1)) for a, b in zip(low, high, strict=True))
        dy = (np.arange(rows.start, rows.stop, dtype=np.float32) / fine + np.float32(first - y))[:, None]
        dx = np.arange(columns.start, columns.stop, dtype=np.float32) / fine + np.float32(first - x)
        grid[rows, columns] = _structure(galaxy, disc, dx, dy)
        for clump in galaxy.clumps:
            _add_clump(grid, clump, first, fine)
        spectrum = fft.rfft2(grid)
        side = period * self.oversampling
        half = side // 2
        # The PSF suppresses frequencies above the Nyquist frequency of its samples.
        coarse = np.concatenate([spectrum[:half], spectrum[-half:]])[:, : half + 1]
        seen = fft.irfft2(coarse * self._transforms[which], (side, side)) / fine**2
        seen = seen[:: self.oversampling, :: self.oversampling] * self.oversampling**2
        inside = slice(max(0, first), min(self.size, first + period))
        shown = slice(inside.start - first, inside.stop - first)
        image[inside, inside] += seen[shown, shown]


def _structure(galaxy: Galaxy, disc: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Change of a disc's surface brightness by arms, ring, tail, brighter side, edge and dust, without the PSF."""
    _, _, flux, r_disc, n, q, theta = disc
    cos, sin = np.float32(np.cos(np.radians(theta))), np.float32(np.sin(np.radians(theta)))
    u, v = dx * cos + dy * sin, dy * cos - dx * sin
    across = v / np.float32(q)
    radius = np.maximum(np.hypot(u, across), np.float32(0.02)) / np.float32(r_disc)
    b = sersic_b(n)
    log_norm = 2 * n * np.log(b) - np.log(2 * np.pi * n * q * r_disc**2) - special.gammaln(2 * n)
    light = np.float32(flux * np.exp(log_norm)) * np.exp(-np.float32(b) * radius ** np.float32(1 / n))
    factor = np.ones_like(light)
    outward = radius**2 / (radius**2 + np.float32(0.25)) * np.exp(-((radius / np.float32(3)) ** 2))
    azimuth = np.arctan2(across, u)
    if galaxy.arms is not None:
        number, contrast, sharpness, winding, phase = galaxy.arms
        behind = azimuth - np.float32(winding) * np.log(radius) - np.float32(phase)
        wave = np.exp(np.float32(sharpness) * (np.cos(np.float32(number) * behind) - 1))
        wave /= np.float32(special.i0e(sharpness))
        factor += np.float32(contrast) * outward * (wave - 1)
    strength, at = galaxy.ring
    if strength > 0:
        factor += np.float32(strength) * np.exp(-0.5 * ((radius - np.float32(at)) / np.float32(_RING_WIDTH)) ** 2)
    strength, winding, phase = galaxy.tail
    if strength > 0:
        behind = azimuth - np.float32(winding) * np.log(radius) - np.float32(phase)
        far = radius**4 / (radius**4 + np.float32(1.5**4))
        factor += np.float32(strength) * far * np.exp(6 * (np.cos(behind) - 1))
    strength, heavy = galaxy.lopsided
    toward = u * np.float32(np.cos(heavy)) + across * np.float32(np.sin(heavy))
    factor *= 1 + np.float32(strength) * np.tanh(toward / np.float32(1.5 * r_disc))
    if np.isfinite(galaxy.edge):
        factor /= 1 + np.exp(np.minimum((radius - np.float32(galaxy.edge)) / np.float32(0.15), 60))
    depth, height, offset = galaxy.dust
    if depth > 0:
        lane = np.exp(-0.5 * ((v - np.float32(offset)) / np.float32(height)) ** 2 - np.abs(u) / np.float32(2 * r_disc))
        factor *= 1 - np.float32(depth) * lane
    return light * (np.maximum(factor, 0) - 1)


def _add_clump(grid: np.ndarray, clump: np.ndarray, first: int, fine: int) -> None:
    x, y, flux, sigma = clump
    reach = 4 * sigma
    rows, columns = (
        slice(max(0, int((c - first - reach) * fine)), max(0, min(len(grid), int((c - first + reach) * fine) + 2)))
        for c in (y, x)
    )
    dy, dx = (
        np.exp(-0.5 * ((np.arange(part.start, part.stop) / fine + first - c) / sigma) ** 2)
        for part, c in ((rows, y), (columns, x))
    )
    grid[rows, columns] += (flux / (2 * np.pi * sigma**2) * dy[:, None] * dx).astype(np.float32)


def _transform(psf: np.ndarray, period: int) -> np.ndarray:
    """Fourier transform of a PSF, cropped to an odd side below the period and normalised to unit sum."""
    half = min(psf.shape[0] // 2, (period - 2) // 2)
    middle = psf.shape[0] // 2
    inner = psf[middle - half : middle + half + 1, middle - half : middle + half + 1]
    padded = np.zeros((period, period))
    padded[: 2 * half + 1, : 2 * half + 1] = inner / inner.sum()
    return fft.rfft2(np.roll(padded, (-half, -half), axis=(0, 1))).astype(np.complex64)


def distorted(psf: np.ndarray, variant: int) -> np.ndarray:
    """Shear a PSF and change its width, as it differs across the field and with time.

    Both components of shear scatter by 0.02 and widths by 2 %; `variant` numbers the
    draws, below `PSF_VARIANTS`.
    """
    rng = np.random.default_rng([variant, 20141])
    shear, cross = 0.02 * rng.standard_normal(2)
    width = 1 + 0.02 * rng.standard_normal()
    back = np.linalg.inv(width * np.array([[1 + shear, cross], [cross, 1 - shear]]))
    middle = np.full(2, psf.shape[0] // 2)
    image = ndimage.affine_transform(psf, back, middle - back @ middle, order=3)
    return np.maximum(image, 0) / np.maximum(image, 0).sum()
