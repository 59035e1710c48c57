"""Images with galaxies added while they are read, window by window.

Each galaxy has a seed of its own and is drawn as a whole, so that a pixel does not depend on the window.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sersicnet.engine.noise import photon_noise
from sersicnet.engine.render import Renderer, log_norm, sersic_b
from sersicnet.image.mosaic import Image
from sersicnet.image.pixels import ZERO_REACH, Window, grown, within, without_data
from sersicnet.image.psf import Psf
from sersicnet.image.psferror import stretched, with_light

SIDES = (128, 256, 512, 1024)
"""Sides of the stamps that galaxies are drawn in, pixels."""

EDGE = 0.02
"""A stamp ends where the surface brightness along the major axis is below this fraction of the noise of a blank pixel,
except the largest one."""

ERRORS = ((-1.48, -0.56), (-0.56, 1.48), (0.0, 0.0), (0.56, -1.48), (1.48, 0.56))
"""Errors of the PSF in units of 1 sigma, of its width and of its light within two FWHM. Each galaxy has one of the
pairs, with equal probability. Their variances are 1, and they are not correlated."""

KEPT, MOST_RENDERERS = 2**24, 32
"""Pixels of stamps (134 MB), and renderers, that a process keeps. A tile reads many windows that overlap, and would
draw its galaxies again in each of them."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Galaxies:
    """Galaxies that are added to an image, through its PSF and with their photon noise.

    Attributes
    ----------
    parameters : ndarray, float64, (N, 7)
        In pixels and units of the image, see `sersicnet.engine.render.Renderer`.
    numbers : ndarray, int, (N,)
        Number of each galaxy, which is a part of its seed.
    seed : int
    psf : Psf
        In pixels of the image. Where its width or its light has an error, the PSF of each galaxy is off by a random
        multiple of these errors.
    gain : float
        Electrons per image unit; infinite for no photon noise.
    tap : float
        Correlation of the photon noise, see `sersicnet.engine.noise.photon_noise`.
    rms : float
        Noise of a blank pixel, image units.
    """

    parameters: np.ndarray
    numbers: np.ndarray
    seed: int
    psf: Psf
    gain: float
    tap: float
    rms: float
    _stamps: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, init=False, repr=False)
    _renderers: dict[tuple[Any, ...], Renderer] = field(default_factory=dict, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stamps": {}, "_renderers": {}}

    def __len__(self) -> int:
        return len(self.parameters)

    @property
    def digest(self) -> str:
        """SHA-256 of all that the pixels depend on."""
        seen = hashlib.sha256(np.ascontiguousarray(self.parameters).tobytes())
        seen.update(np.asarray(self.numbers, np.int64).tobytes())
        psf = self.psf.sha256, self.psf.error, self.psf.light_error
        seen.update(repr((self.seed, *psf, self.gain, self.tap, self.rms)).encode())
        return seen.hexdigest()

    @functools.cached_property
    def sides(self) -> np.ndarray:
        """Side of the stamp of each galaxy, pixels, int, (N,)."""
        _, _, flux, r_eff, n, q, _ = self.parameters.T
        out = np.full(len(flux), SIDES[-1])
        for side in SIDES[-2::-1]:
            power = np.minimum(sersic_b(n) * (side / 2 / r_eff) ** (1 / n), 700)
            out[flux * np.exp(log_norm(n) - power) / (q * r_eff**2) < EDGE * self.rms] = side
        return out

    @functools.cached_property
    def corners(self) -> np.ndarray:
        """Column and row of the first pixel of each stamp, int, (N, 2)."""
        return np.rint(self.parameters[:, :2]).astype(int) - self.sides[:, None] // 2

    @functools.cached_property
    def _psfs(self) -> tuple[np.ndarray, list[Psf]]:
        return self.psf.cells(*self.parameters[:, :2].T)

    def changes(self, k: int) -> tuple[float, float]:
        """Factors on the width of the PSF of a galaxy, and on its light within two FWHM."""
        drawn = np.random.default_rng([self.seed, int(self.numbers[k]), 3]).integers(len(ERRORS))
        width, light = ERRORS[drawn]
        return 1 + self.psf.error * width, 1 + self.psf.light_error * light

    def stamp(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """A galaxy without noise and its photon noise, float32, (side, side) each; the first pixel is at `corners`."""
        if k not in self._stamps:
            labels, psfs = self._psfs
            psf, (width, light), side = psfs[labels[k]], self.changes(k), int(self.sides[k])
            key = psf.sha256, (width, light), side
            if key not in self._renderers:
                if len(self._renderers) >= MOST_RENDERERS:
                    del self._renderers[next(iter(self._renderers))]  # the oldest
                own = with_light(stretched(psf, width), light)
                self._renderers[key] = Renderer(own.image, side, own.oversampling)
            parameters = self.parameters[k].copy()
            parameters[:2] -= self.corners[k]
            model = self._renderers[key](parameters)[0]
            noise = np.zeros_like(model)
            if np.isfinite(self.gain):
                rng = np.random.default_rng([self.seed, int(self.numbers[k]), 2])
                noise = photon_noise(model, self.gain, self.tap, rng)
            while sum(kept.size for kept, _ in self._stamps.values()) > KEPT:
                del self._stamps[next(iter(self._stamps))]
            self._stamps[k] = model, noise
        return self._stamps[k]

    def drawn_in(self, window: Window) -> Iterator[tuple[Window, np.ndarray, np.ndarray]]:
        """The parts of all stamps in a window: where they are in it, the models and their photon noise."""
        low = np.maximum(self.corners, (window[1].start, window[0].start))
        high = np.minimum(self.corners + self.sides[:, None], (window[1].stop, window[0].stop))
        for k in np.flatnonzero((high > low).all(axis=1)).tolist():
            (x0, y0), (x1, y1), (x, y) = low[k], high[k], self.corners[k]
            model, noise = self.stamp(k)
            part = slice(y0 - y, y1 - y), slice(x0 - x, x1 - x)
            there = (slice(y0 - window[0].start, y1 - window[0].start),
                     slice(x0 - window[1].start, x1 - window[1].start))  # fmt: skip
            yield there, model[part], noise[part]


class _Made(Image):
    """An image that is made of another one; it has the same header, coordinates and name."""

    def __init__(self, image: Image) -> None:
        super().__init__(image.name, image.header, image.shape, image.wcs)
        self.wcs, self.wcs_problem = image.wcs, image.wcs_problem
        self.scales, self.scale_source = image.scales, image.scale_source
        self.image = image

    @property
    def path(self) -> Path | None:
        """The file of the other image."""
        return self.image.path

    @property
    def is_held(self) -> bool:
        """Whether all of the other image is in memory."""
        return self.image.is_held

    def close(self) -> None:
        """Close the file; reading opens it again."""
        self.image.close()


class Injected(_Made):
    """An image with galaxies added to it; pixels without data stay without.

    Parameters
    ----------
    image : Image
    galaxies : Galaxies
    """

    def __init__(self, image: Image, galaxies: Galaxies) -> None:
        super().__init__(image)
        self.galaxies = galaxies

    def identity(self) -> list[Any]:
        """That of the image, and the SHA-256 of the galaxies."""
        return [*self.image.identity(), self.galaxies.digest]

    def read(self, window: Window) -> np.ndarray:
        """The pixels of a window, float32; blank pixels are NaN."""
        parts = list(self.galaxies.drawn_in(window))
        if not parts:
            return self.image.read(window)
        wide = grown(window, ZERO_REACH, self.shape)
        data = self.image.read(wide)
        inner = within(window, wide)
        bad = without_data(data)[inner]
        data = np.ascontiguousarray(data[inner])
        added = np.zeros_like(data)
        for there, model, noise in parts:
            added[there] += model + noise
        np.copyto(data, data + added, where=~bad)
        return data


class WithPhotonNoise(_Made):
    """A noise map that includes photon noise, with that of galaxies added to it.

    Parameters
    ----------
    image : Image
    kind : {"rms", "wht", "var"}
    factor : float
        Factor on the noise of the map, after which it is in image units.
    galaxies : Galaxies
    """

    def __init__(self, image: Image, kind: str, factor: float, galaxies: Galaxies) -> None:
        super().__init__(image)
        self.kind, self.factor, self.galaxies = kind, factor, galaxies

    def identity(self) -> list[Any]:
        """That of the image, and the SHA-256 of the galaxies."""
        return [*self.image.identity(), self.galaxies.digest]

    def read(self, window: Window) -> np.ndarray:
        """The pixels of a window, float32."""
        data = self.image.read(window)
        gain, tap = self.galaxies.gain, self.galaxies.tap
        share = ((1 + 2 * tap**2) / (1 + 2 * tap) ** 2) ** 2 / gain / self.factor**2
        for there, model, _ in self.galaxies.drawn_in(window):
            more = np.maximum(model, 0) * share
            with np.errstate(all="ignore"):
                if self.kind == "rms":
                    data[there] = np.sqrt(data[there] ** 2 + more)
                elif self.kind == "var":
                    data[there] += more
                else:
                    data[there] = data[there] / (1 + data[there] * more)
        return data


class Negative(_Made):
    """The negative of an image: what is detected in it is noise."""

    def identity(self) -> list[Any]:
        """That of the image, and that it is its negative."""
        return [*self.image.identity(), "negative"]

    def read(self, window: Window) -> np.ndarray:
        """The pixels of a window, float32; blank pixels are NaN."""
        return -self.image.read(window)
