"""A world of telescopes: images through many PSFs, of any depth, noise and sampling.

A network that is trained on it is shown the PSF and what is known of the noise, and need not know which telescope
took an image. Each block of stamps is a piece of one image: one PSF, one depth, one kind of noise.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from sersicnet.engine.noise import tap_of
from sersicnet.errors import InputError
from sersicnet.image.psf import Psf, full_width
from sersicnet.image.views import psf_views
from sersicnet.schema import TARGETS
from sersicnet.simulating import described, observatories, optics, population
from sersicnet.simulating.optics import Optics
from sersicnet.simulating.population import Ranges
from sersicnet.simulating.recipe import Prior, Simulation
from sersicnet.simulating.telescopes import F160W, Instrument

ANY = replace(F160W, name="any telescope", pixel_scale=1.0, zero_point=30.0, exposure=1.0, rms_low=1.0, rms_high=1.0)
"""Of a dataset of many telescopes: its pixels are as wide as its arcseconds, and each block has another noise."""

ANYTHING = "any"
"""Name of all telescopes together."""

DEPTH = (24.0, 27.5)
"""AB magnitude of the rms of a pixel times its area in arcsec^2, which sets the number of neighbours; CANDELS: 25.8."""

PIXELS = (0.03, 0.4)
"""Width of a pixel, arcsec, which sets the number of neighbours, too."""

NEIGHBOURS = 3.0
"""Least signal to noise of neighbours, as that of a star of their light: fainter ones cannot be seen."""

NAMED = 1 / 3
"""Fraction of the images of any telescope that are of one of `observatories`; the others have PSFs beyond theirs."""

CROWDED = 0.35
"""Fraction of the images whose galaxies have neighbours, in a simulation with neighbours: in others nothing is near."""

REAL_LIKE = 0.2
"""Fraction of the images with real-like galaxies, in a simulation of both kinds."""

ELECTRONS = (1.0, 3000.0)
"""Electrons of a flux equal to the rms of a pixel: the photon noise of galaxies is large for few of them."""

TAPS = (0.0, 0.65)
"""Of `Instrument.noise_tap`; the noise of a large aperture is 1 to 2.9 times that of uncorrelated pixels."""

FINELY_DRIZZLED = 0.15
"""Fraction of the images of no named telescope whose noise is convolved twice: up to 3.9 times."""

SKY_LEFT = (0.02, 0.2)
"""Of `Instrument.sky_residual` in half of the images, log-uniform, and half of it as `sky_slope`.

Haloes of bright galaxies leave 0.1 rms at 10 to 20 pixels from sources in GOODS-N. The other images have the residual
of `ANY`.
"""

KNOWN_ELECTRONS = 0.75
"""Fraction of the images whose gain is known."""

SNR = (3.0, 3000.0, 30_000.0)
"""Signal to noise of galaxies: nine in ten are below the second number."""

RADII = (0.1, 64.0)
"""Least effective radius in FWHM of the PSF, and largest in pixels."""

FINE = 2.5
"""PSFs of at least this FWHM are sampled once a pixel; narrower ones twice."""


@dataclass(frozen=True)
class Galaxies:
    """Prior of galaxies as one image of the world shows them.

    Half of them have the joint distribution of radius, index and ellipticity of CANDELS, with all radii multiplied so
    that the PSF is as wide as that of F160W, and then by a factor between 1/3 and 3. A quarter has logarithmically
    uniform radii and indices, another quarter the uniform radii, indices and ellipticities of the study.

    Attributes
    ----------
    fwhm : float
        Of the PSF, pixels.
    zero_point, rms : float
        The flux of a galaxy follows from its signal to noise, in the area that it and the PSF fill.
    correlation : float
        Noise of a large aperture over that of uncorrelated pixels.
    """

    fwhm: float
    zero_point: float
    rms: float
    correlation: float

    def record(self) -> dict[str, Any]:
        """What names it in a dataset's configuration."""
        return {"name": "galaxies of any telescope", "sha256": ""}

    def draw(self, rng: np.random.Generator, ranges: Ranges) -> dict[str, float]:
        """Draw one galaxy: magnitude, radius, index and ellipticity."""
        kind, stretch = rng.random(), np.exp(rng.uniform(-1, 1) * np.log(3.0))
        while True:
            if kind < 0.5:
                shape = _candels().draw(rng, population.CANDELS_RANGES)
                r_eff, n, e = (shape[name] for name in ("r_eff_pix", "sersic_n", "ellipticity"))
                r_eff *= stretch * self.fwhm / _F160W_FWHM
            elif kind < 0.75:
                r_eff = np.exp(rng.uniform(*np.log((RADII[0] * self.fwhm, RADII[1]))))
                n = np.exp(rng.uniform(*np.log(ranges["sersic_n"])))
                e = rng.uniform(*ranges["ellipticity"])
            else:
                r_eff, n, e = (rng.uniform(target.low, target.high) for target in TARGETS[1:])
            if RADII[0] * self.fwhm <= r_eff <= RADII[1]:
                break
            stretch = 1.0
        bright = rng.random() < 0.1
        snr = np.exp(rng.uniform(*np.log(SNR[1:] if bright else SNR[:2])))
        area = 4 * np.pi * ((self.fwhm / 2.355) ** 2 + 0.5 * (1 - e) * r_eff**2)
        flux = snr * self.rms * self.correlation * np.sqrt(area)
        mag = self.zero_point - 2.5 * np.log10(flux)
        return {"mag": float(mag), "r_eff_pix": float(r_eff), "sersic_n": float(n), "ellipticity": float(e)}


_F160W_FWHM = 3.15


@functools.cache
def _candels() -> population.FlatInMagnitude:
    return population.candels_evenly()


@dataclass(frozen=True, eq=False)
class Piece:
    """A piece of one image of the world.

    Attributes
    ----------
    instrument : Instrument
    psf : Psf
        The true one.
    views : ndarray, float32, (4, 32, 32)
        What the network is shown: of the true PSF, or of one that was measured from a few stars.
    fwhm : float
        Of the true PSF, pixels.
    correlation : float
        Noise of a large aperture over that of uncorrelated pixels.
    electrons : float
        Of a flux equal to the rms of a pixel; NaN if the network is not shown it.
    crowded, real_like : bool
        Whether galaxies have neighbours, in a simulation with neighbours; and whether they are real-like, in one of
        both kinds. Real-like galaxies always have neighbours.
    """

    instrument: Instrument
    psf: Psf
    views: np.ndarray
    fwhm: float
    correlation: float
    electrons: float
    crowded: bool
    real_like: bool

    @property
    def neighbour_limit(self) -> float:
        """AB magnitude of a star of the least signal to noise of `NEIGHBOURS`."""
        faintest = NEIGHBOURS * self.instrument.rms_low * self.correlation * np.sqrt(4 * np.pi) * self.fwhm / 2.355
        return float(self.instrument.zero_point - 2.5 * np.log10(faintest))

    def of(self, simulation: Simulation) -> Simulation:
        """The simulation of this piece alone."""
        rms, zero_point, limit = self.instrument.rms_low, self.instrument.zero_point, self.neighbour_limit
        prior = replace(simulation.prior, joint=Galaxies(self.fwhm, zero_point, rms, self.correlation))
        galaxies = simulation.galaxies
        if galaxies == "both":
            galaxies = "real-like" if self.real_like else "sersic"
        return replace(
            simulation, prior=prior, instrument=self.instrument, psfs=(self.psf,), neighbour_limit=limit,
            galaxies=galaxies, neighbours=simulation.neighbours and self.crowded,
        )  # fmt: skip


class _Exposed(NamedTuple):
    """What is drawn of an image: its PSF, the width of its pixels in arcsec, and its noise."""

    optics: Optics
    pixel: float
    depth: float  # AB magnitude of the rms of a pixel
    electrons: float
    tap: float
    passes: int = 1


def _of_any(rng: np.random.Generator) -> _Exposed:
    drawn = optics.draw_optics(rng)
    pixel = float(np.exp(rng.uniform(*np.log(PIXELS))))
    depth = rng.uniform(*DEPTH) - 5 * np.log10(pixel)
    electrons = np.exp(rng.uniform(*np.log(ELECTRONS)))
    exposed = _Exposed(drawn, pixel, depth, electrons, rng.uniform(*TAPS) * (rng.random() > 0.25))
    return exposed._replace(passes=2 if rng.random() < FINELY_DRIZZLED else 1)


def _of_telescope(name: str, rng: np.random.Generator) -> _Exposed:
    """An image of a telescope, ``hst``, ``hst-ir`` or a file, or of one of its filters, ``hst-ir/F160W``."""
    cameras, band = described.cameras(name)
    camera = cameras[int(rng.integers(len(cameras)))]
    pixel = float(rng.choice(camera.pixel_scales))
    depth = camera.rms_magnitude(rng.uniform(*camera.depth), pixel)
    electrons = np.exp(rng.uniform(*np.log(camera.electrons)))
    tap = tap_of(rng.uniform(*camera.correlation))
    return _Exposed(camera.draw(rng, band or None, pixel), pixel, depth, electrons, tap)


def piece(telescopes: str, seed: int, number: int) -> Piece:
    """Draw a piece of an image of the world: the same one for the same arguments.

    Parameters
    ----------
    telescopes : str
        See `simulation`.
    seed, number : int

    Raises
    ------
    InputError
        If there is no such telescope, or it lacks the filter.
    """
    rng = np.random.default_rng([seed, number, 2])
    if telescopes == ANYTHING and rng.random() < NAMED:
        exposed = _of_telescope(str(rng.choice(list(observatories.TELESCOPES))), rng)
    else:
        exposed = _of_any(rng) if telescopes == ANYTHING else _of_telescope(telescopes, rng)
    drawn, oversampling = exposed.optics.image(2), 2
    fwhm = full_width(drawn, 2)
    views = psf_views(optics.measured(drawn, 2, rng), 2)
    if fwhm >= FINE:
        first = len(drawn) // 2 % 2
        drawn, oversampling = drawn[first::2, first::2], 1
    rms = float(10 ** (-0.4 * (exposed.depth - ANY.zero_point)))
    known = rng.random() < KNOWN_ELECTRONS
    psf = Psf(f"PSF {number}", "", drawn / drawn.sum(), oversampling)
    electrons = float(exposed.electrons) if known else np.nan
    crowded, real_like = rng.random() < CROWDED, rng.random() < REAL_LIKE
    sky = float(np.exp(rng.uniform(*np.log(SKY_LEFT))))
    residual, slope = (sky, sky / 2) if rng.random() < 0.5 else (ANY.sky_residual, 0.0)
    instrument = replace(
        ANY, pixel_scale=exposed.pixel, exposure=float(exposed.electrons / rms), rms_low=rms, rms_high=rms,
        noise_tap=float(exposed.tap), noise_passes=exposed.passes, sky_residual=residual, sky_slope=slope,
    )  # fmt: skip
    return Piece(instrument, psf, views, fwhm, instrument.correlation, electrons, crowded, real_like)


def simulation(
    telescopes: str,
    n: int,
    seed: int = 0,
    *,
    neighbours: bool = False,
    centring: bool = False,
    galaxies: str = "sersic",
) -> Simulation:
    """A simulation of images of many telescopes.

    Parameters
    ----------
    telescopes : str
        ``any``, for PSFs and noise beyond those of today's telescopes; or a telescope of
        `sersicnet.simulating.observatories` such as ``hst``, one of its cameras, ``hst-ir``, or one of their filters,
        ``hst-ir/F160W``; or a TOML file, see `sersicnet.simulating.described.read_telescope`.
    n, seed : int
    neighbours : bool
        Whether the galaxies of one image in three have neighbours.
    centring : bool
        See `sersicnet.simulating.recipe.Simulation`.
    galaxies : str
        ``sersic``; ``real-like``, labelled by fits to the galaxy alone without noise; or ``both``, a fifth of the
        images with real-like galaxies.

    Raises
    ------
    InputError
        If there is no such telescope, or it lacks the filter, or there is no such kind of galaxies.
    """
    if galaxies not in (kinds := ("sersic", "real-like", "both")):
        raise InputError(f"Galaxies of many telescopes are {', '.join(kinds)}; received {galaxies!r}.")
    if telescopes != ANYTHING:
        _of_telescope(telescopes, np.random.default_rng(0))
    unknown = Galaxies(1.0, ANY.zero_point, 1.0, 1.0)
    prior = Prior(mag=(0.0, 40.0), r_eff_pix=(RADII[0], RADII[1]), joint=unknown)
    return Simulation(
        n, seed, prior, ANY, neighbours=neighbours, centring=centring, galaxies=galaxies,
        noiseless_labels=galaxies != "sersic", telescopes=telescopes,
    )  # fmt: skip
