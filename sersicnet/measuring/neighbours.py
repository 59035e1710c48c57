"""The light that the neighbours of a galaxy put into its stamp, drawn with their measured parameters.

Pixels of neighbours are replaced, but their wings reach farther: without subtracting them, galaxies with a neighbour
within 8 FWHM are measured a tenth too bright and too large.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from scipy.spatial import KDTree

from sersicnet.engine.forced import drawable
from sersicnet.engine.render import Renderer, log_norm, sersic_b
from sersicnet.image.psf import Psf, radial_profile
from sersicnet.image.stamps import Stamps
from sersicnet.schema import LARGE_LIMIT, STAMP_SIZE

REACH = STAMP_SIZE // 2
"""A neighbour is within this distance of a galaxy along both axes, pixels: it lies in its stamp."""

SAME = 0.5
"""Places within this distance are of the same galaxy, such as one that is listed twice, pixels."""

LEAST_LIGHT = 0.1
"""Light of a neighbour that counts: what it adds to the flux of the galaxy, in units of the noise of that flux."""

MODEL_ERROR = 0.1
"""Error of the light of neighbours, as a fraction; see `Neighbours.light`."""

HIDDEN_SHARE, HIDDEN_SNR = 0.3, 100.0
"""Brightest source that may be hidden in a galaxy: a fraction of its flux, and a signal to noise as a star."""

_SIDES = (STAMP_SIZE, 2 * STAMP_SIZE)
"""Sides of the images of galaxies: the smaller one if the light at its border is below `_FADED`, pixels."""

_KEPT = 256
"""Images of galaxies that are kept, for the stamps of several: 64 MB at most."""

_AT_ONCE = 100_000
"""Pairs whose light is computed at once: in a crowded tile there are millions."""

_FADED = 0.01
"""Surface brightness that is left out, in units of the noise of a pixel."""


class Neighbours:
    """Measured galaxies, whose light is drawn into the stamps of others.

    Parameters
    ----------
    galaxies : ndarray, float64, (N, 7)
        As for `sersicnet.engine.render.Renderer`, in pixels of the image. Those that cannot be drawn or have
        a flux that is not positive have no neighbours and are none. Of several at one place, see `SAME`, the first
        alone is a neighbour of others.
    psf : Psf
        In pixels of the image. It is drawn with one sample a pixel: where that is not enough, in the core, the
        pixels of a neighbour are replaced.
    rms : ndarray, float64, (N,)
        Noise of a pixel at each galaxy, image units.
    correlation : float
        Noise of a large aperture over that of uncorrelated pixels.

    Attributes
    ----------
    hidden : ndarray, float64, (N,)
        See `hidden_light`.
    """

    def __init__(self, galaxies: np.ndarray, psf: Psf, rms: np.ndarray, correlation: float) -> None:
        self._galaxies, self._rms = galaxies, rms
        with np.errstate(invalid="ignore"):
            usable = drawable(galaxies) & np.isfinite(galaxies[:, 2]) & (galaxies[:, 2] > 0) & (rms > 0)
            self._area = filled_area(galaxies, psf.fwhm)
        self._labels = np.zeros(len(galaxies), int)
        self._labels[usable], psfs = psf.cells(*galaxies[usable, :2].T)
        self._psfs = [one.at_pixel_scale() for one in psfs]
        self._renderers: dict[tuple[int, int], Renderer] = {}
        image = psf.at_pixel_scale().image
        self._radii = np.arange(len(image) // 2 + 1.0)
        self._profile = radial_profile(image, (len(image) // 2,) * 2, self._radii)
        self._noise = noise_of_star(rms, correlation, psf.fwhm)
        self.hidden = np.full(len(galaxies), np.nan)
        self._near = self._found(np.flatnonzero(usable), correlation)

    def _found(self, usable: np.ndarray, correlation: float) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """The neighbours of each galaxy that has any, and the parts of their measured fluxes that are their own."""
        tree = KDTree(self._galaxies[usable, :2])
        pairs = usable[tree.query_pairs(REACH, p=np.inf, output_type="ndarray")]
        pairs = pairs[np.hypot(*(self._galaxies[pairs[:, 0], :2] - self._galaxies[pairs[:, 1], :2]).T) > SAME]
        is_first = np.ones(len(self._galaxies), bool)
        is_first[usable[tree.query_pairs(SAME, output_type="ndarray")[:, 1]]] = False
        i, j = np.concatenate([pairs, pairs[:, ::-1]]).T
        flux = self._galaxies[:, 2]
        place = self._galaxies[:, :2]
        self.hidden[usable] = hidden_light(i, flux[j] * is_first[j], flux, self._area, self._noise)[usable]
        parts = np.array_split(np.arange(len(i)), 1 + len(i) // _AT_ONCE)
        light = np.concatenate([self._brightness(j[part], *(place[i[part]] - place[j[part]]).T) for part in parts])
        added = light * np.sqrt(self._area[i]) / (self._rms[i] * correlation)
        # The measured flux of each of two galaxies contains light of the other one.
        taken = np.roll(light, len(pairs)) * self._area[j]
        exchanged = light / flux[j] * self._area[i] * taken / flux[i]
        own = np.clip((flux[j] - taken) / (flux[j] * (1 - np.minimum(exchanged, 0.9))), 0, 1)
        whole = self._galaxies[j, 3] <= LARGE_LIMIT  # larger ones are parts of one
        counts = np.flatnonzero((added > LEAST_LIGHT) & whole & is_first[j])
        counts = counts[np.lexsort((j[counts], i[counts]))]
        first = np.unique(i[counts], return_index=True)[1]
        return {int(i[part[0]]): (j[part], own[part]) for part in np.split(counts, first[1:]) if len(part)}

    def _brightness(self, which: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
        """Surface brightness of galaxies at a distance: that of the profile plus that of a star; (K,), image units."""
        flux, r_eff, q, cos, sin, b, power, central = (values[which] for values in self._profiles)
        radius = np.hypot(cos * dx + sin * dy, (cos * dy - sin * dx) / q) / r_eff
        profile = central * np.exp(-b * radius**power)
        return flux * (profile + np.interp(np.hypot(dx, dy), self._radii, self._profile, right=0.0))

    @functools.cached_property
    def _profiles(self) -> tuple[np.ndarray, ...]:
        """What `_brightness` needs of each galaxy: a galaxy is in many pairs."""
        with np.errstate(invalid="ignore", divide="ignore"):  # of galaxies that are in none
            _, _, flux, r_eff, n, q, theta = self._galaxies.T
            angle = np.radians(theta)
            central = np.exp(log_norm(n)) / (q * r_eff**2)
            return flux, r_eff, q, np.cos(angle), np.sin(angle), sersic_b(n), 1 / n, central

    def of(self, which: np.ndarray) -> np.ndarray:
        """Those of some galaxies that have neighbours whose light counts, int, (K,)."""
        return np.array([i for i in which.tolist() if i in self._near], int)

    def light(self, which: np.ndarray, stamps: Stamps) -> np.ndarray:
        """The light of the neighbours in the stamps of some galaxies.

        Real galaxies are not Sersic profiles, and those that touch have been measured with light of each other. The
        light of the neighbours of a galaxy is therefore multiplied by a factor from 0 to 1, with which it and the
        galaxy itself, with another factor, fit the pixels of the stamp that are not replaced: a linear solve, in
        which the factor is known to be 1 within `MODEL_ERROR`.

        Parameters
        ----------
        which : ndarray, int, (K,)
            Of those that `of` returns.
        stamps : Stamps
            Their stamps.

        Returns
        -------
        ndarray, float32, (K, 128, 128)
            Image units.
        """
        out = np.zeros((len(which), STAMP_SIZE, STAMP_SIZE), np.float32)
        drawn = functools.lru_cache(_KEPT)(self._drawn)

        def add(j: int, factor: float, first: np.ndarray, stamp: np.ndarray) -> None:
            corner, image = drawn(j)
            low = np.maximum(corner - first, 0)
            high = np.minimum(corner - first + len(image), STAMP_SIZE)
            if (low < high).all():
                (x0, y0), (x1, y1) = low + first - corner, high + first - corner
                stamp[low[1] : high[1], low[0] : high[0]] += np.float32(factor) * image[y0:y1, x0:x1]

        for k, (stamp, i) in enumerate(zip(out, which.tolist(), strict=True)):
            first = np.array([math.ceil(place - STAMP_SIZE / 2) for place in self._galaxies[i, :2]])
            itself = np.zeros_like(stamp)
            add(i, 1.0, first, itself)
            for j, own in zip(*self._near[i], strict=True):
                add(j, own, first, stamp)
            stamp *= _factor(stamp / self._rms[i], itself / self._rms[i], stamps.pixels[k], ~stamps.replaced[k])
        return out

    def _drawn(self, j: int) -> tuple[np.ndarray, np.ndarray]:
        """Column and row of the first pixel of the image of a galaxy, and the image."""
        light = self._brightness(np.array([j]), np.array([_SIDES[0] / 2]), np.zeros(1))[0]
        cell, side = self._labels[j], _SIDES[int(light > _FADED * self._rms[j])]
        if (cell, side) not in self._renderers:
            self._renderers[cell, side] = Renderer(self._psfs[cell].image, side)
        corner = np.rint(self._galaxies[j, :2]).astype(int) - side // 2
        image = self._renderers[cell, side](self._galaxies[j] - np.array([*corner, 0, 0, 0, 0, 0]))[0]
        return corner, np.nan_to_num(image)


def filled_area(galaxies: np.ndarray, fwhm: float) -> np.ndarray:
    """The area that galaxies and the PSF fill, square pixels, (N,): the noise of their flux is that of such an area.

    Parameters
    ----------
    galaxies : ndarray, float64, (N, 7)
        As for `Neighbours`.
    fwhm : float
        Of the PSF, pixels.
    """
    return np.asarray(4 * np.pi * ((fwhm / 2.355) ** 2 + 0.5 * galaxies[:, 5] * galaxies[:, 3] ** 2))


def noise_of_star(rms: np.ndarray, correlation: float, fwhm: float) -> np.ndarray:
    """Noise of the flux of a star, image units, (N,), from the noise of a pixel at its place and the FWHM in pixels."""
    return np.asarray(rms * correlation * np.sqrt(4 * np.pi) * fwhm / 2.355)


def hidden_light(
    of: np.ndarray, others: np.ndarray, flux: np.ndarray, area: np.ndarray, noise: np.ndarray
) -> np.ndarray:
    """Scatter of the light that is hidden in galaxies, as a fraction of their fluxes, float64, (N,).

    It is that of sources as numerous as those in the stamp of a galaxy, at random places in the area that the galaxy
    and the PSF fill (Condon 1974, ApJ 188, 279). A source that would be seen beside the galaxy, see `HIDDEN_SHARE`,
    counts as the brightest one that would not.

    Parameters
    ----------
    of, others : ndarray, (K,)
        For each source in the stamp of a galaxy, the index of the galaxy and the flux of the source.
    flux, area, noise : ndarray, float64, (N,)
        Of the galaxies: see `filled_area` and `noise_of_star`. A flux that is not positive gives NaN.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        most = np.minimum(HIDDEN_SHARE * flux, HIDDEN_SNR * noise)
        ordered = np.argsort(others, kind="stable")  # the last bits of a sum must not depend on the tile
        squares = np.bincount(of[ordered], np.minimum(others, most[of])[ordered] ** 2, len(flux))
        return np.where(flux > 0, np.sqrt(area * squares) / (2 * REACH * flux), np.nan)


def _factor(light: np.ndarray, itself: np.ndarray, pixels: np.ndarray, used: np.ndarray) -> float:
    """The factor of the light of neighbours with which it and the galaxy fit the pixels; all in units of the noise."""
    light, itself, pixels = (values[used].astype(float) for values in (light, itself, pixels))
    prior = 1 / MODEL_ERROR**2
    across, own = light @ itself, max(itself @ itself, 1e-9)
    normal = light @ light + prior - across**2 / own
    return float(np.clip((light @ pixels + prior - across / own * (itself @ pixels)) / normal, 0, 1))
