"""Stamps of simulated galaxies and their truth.

Each object has a seed of its own, made from the seed of the simulation and the index
of the object, so that any object can be drawn alone. What options add to a stamp is
drawn from a second generator of the object: the galaxy stays the same galaxy.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import array_api_compat
import numpy as np

from sersicnet.engine.noise import photon_noise
from sersicnet.image.psf import Psf
from sersicnet.schema import STAMP_CENTRE, STAMP_SIZE, TARGETS
from sersicnet.simulating import morphology, neighbours, population
from sersicnet.simulating.blank_sky import BlankSky
from sersicnet.simulating.neighbours import camera
from sersicnet.simulating.recipe import PSF_STRETCHES, Prior, Simulation
from sersicnet.simulating.telescopes import Instrument

if TYPE_CHECKING:
    from sersicnet.engine.fit import Fitter

_STRIP = 256
"""Number of rows of a mosaic to which noise is added at a time."""

OUT_OF_RANGE = 10
"""Status of a fit that converged outside the ranges that networks learn."""


def observe(model: np.ndarray, rms: float, instrument: Instrument, rng: np.random.Generator) -> np.ndarray:
    """Add the noise of the sky, the Poisson noise of the sources and a residual of the sky.

    The noise of detector pixels is independent. Drizzling correlates it and makes the
    scatter of single pixels smaller than large apertures imply.

    Parameters
    ----------
    model : ndarray, float, (H, W)
        Noiseless image, electrons/s.
    rms : float
        Standard deviation of a blank pixel of the result.
    instrument : Instrument
    rng : numpy Generator

    Returns
    -------
    ndarray, float32, (H, W)
    """
    height, width = model.shape
    border = 2 * instrument.noise_passes
    white = rng.standard_normal((height + border, width + border), dtype=np.float32)
    sky = _sky_left(height, width, rms, instrument, rng)
    return exposed(model, float(rms), instrument, white, sky).astype(np.float32)


def _sky_left(height: int, width: int, rms: float, instrument: Instrument, rng: np.random.Generator) -> Any:
    """What the subtraction of the sky leaves: a level, or a plane, (H, W)."""
    level = float(rng.normal(0, instrument.sky_residual * rms))
    if instrument.sky_slope == 0:
        return level
    along_x, along_y = rng.normal(0, instrument.sky_slope * rms / 20, 2)
    y, x = np.ogrid[:height, :width]
    return (level + along_x * (x - width // 2) + along_y * (y - height // 2)).astype(np.float32)


def observe_in_place(canvas: np.ndarray, rms: float, instrument: Instrument, rng: np.random.Generator) -> None:
    """Do what `observe` does to an image so large that no second one should be made.

    Parameters
    ----------
    canvas : ndarray, float32, (H, W)
        Noiseless image, electrons/s; overwritten by the same values that `observe` returns.
    rms, instrument, rng
        As for `observe`.
    """
    (height, width), reach = canvas.shape, instrument.noise_passes
    # Noise of the rows around the next one.
    white = rng.standard_normal((2 * reach, width + 2 * reach), dtype=np.float32)
    above = canvas[:0]  # the rows before the strip, without noise
    for first in range(0, height, _STRIP):
        last = min(first + _STRIP, height)
        white = np.concatenate([white, rng.standard_normal((last - first, width + 2 * reach), dtype=np.float32)])
        model = np.concatenate([above, canvas[first : last + reach]])
        # Rows of model beyond the strip need other rows of noise, which do not reach the strip.
        margins = len(above), len(model) - len(above) - (last - first)
        noise = np.pad(white, [margins, (0, 0)])
        above = canvas[last - reach : last].copy()
        observed = exposed(model, float(rms), instrument, noise, 0.0)
        canvas[first:last] = observed[margins[0] : margins[0] + last - first]
        white = white[-2 * reach :]
    canvas += _sky_left(height, width, rms, instrument, rng)


def exposed(model: Any, rms: Any, instrument: Instrument, white: Any, sky: Any) -> Any:
    """Do what `observe` does with given random numbers, for one image or many, in any array library.

    Parameters
    ----------
    model : array, float, (..., H, W)
        Noiseless images, electrons/s.
    rms : array, float, (..., 1, 1), or float
        Standard deviation of a blank pixel of the result.
    instrument : Instrument
    white : array, float, (..., H + 2 P, W + 2 P)
        Standard normal numbers; P is the instrument's `noise_passes`.
    sky : array, float, (..., 1, 1) or (..., H, W), or float
        Residual of the sky subtraction, electrons/s.

    Returns
    -------
    array, float, (..., H, W)
    """
    xp = array_api_compat.array_namespace(model)
    middle, side = (float(v) / (1 + 2 * instrument.noise_tap) for v in (1, instrument.noise_tap))
    level = rms * instrument.correlation
    photons = xp.clip(model, 0, None) / instrument.exposure
    for axis in (-2, -1) * instrument.noise_passes:  # pixels around the image are blank
        edge = xp.zeros_like(photons[..., :1, :] if axis == -2 else photons[..., :1])
        photons = xp.concat([edge, photons, edge], axis=axis)
    noise = white * xp.sqrt(level**2 + photons)
    for _ in range(instrument.noise_passes):
        noise = middle * noise[..., 1:-1, :] + side * (noise[..., :-2, :] + noise[..., 2:, :])
        noise = middle * noise[..., 1:-1] + side * (noise[..., :-2] + noise[..., 2:])
    return model + noise + sky


def draw_truth(simulation: Simulation, index: int) -> tuple[dict[str, float], np.random.Generator, np.random.Generator]:
    """Draw an object's galaxy and noise level; also return its generators, for noise and for what options add."""
    rng = np.random.default_rng([simulation.seed, index])
    instrument = simulation.instrument
    truth = {
        **_draw_shape(simulation.prior, rng),
        "theta": rng.uniform(-90, 90),
        "x": STAMP_CENTRE + rng.uniform(-0.5, 0.5),
        "y": STAMP_CENTRE + rng.uniform(-0.5, 0.5),
        "rms": np.exp(rng.uniform(np.log(instrument.rms_low), np.log(instrument.rms_high))),
    }
    return truth, rng, np.random.default_rng([simulation.seed, index, 1])


def _draw_shape(prior: Prior, rng: np.random.Generator) -> dict[str, float]:
    if prior.joint is not None and not (prior.uniform and rng.random() < prior.uniform):
        return prior.joint.draw(rng, prior.ranges)
    low, high = prior.r_eff_pix
    logarithmic = rng.random() < prior.log_radii
    return {
        "r_eff_pix": np.exp(rng.uniform(np.log(low), np.log(high))) if logarithmic else rng.uniform(low, high),
        "mag": rng.uniform(*prior.mag),
        "sersic_n": rng.uniform(*prior.sersic_n),
        "ellipticity": rng.uniform(*prior.ellipticity),
    }


def draw_psf(simulation: Simulation, truth: dict[str, float], more: np.random.Generator) -> int:
    """Draw the number of a stamp's PSF among `Simulation.psf_images`, and enter it into the truth."""
    if simulation.psfs:
        number = int(more.integers(len(simulation.psfs)))
        truth["psf"] = number
        return number
    if simulation.psf_scatter:
        number = int(more.integers(PSF_STRETCHES))
        truth["psf_stretch"] = simulation.stretches[number]
        return number
    return 0


@functools.lru_cache(16)
def _fitter(psf: Instrument | Psf, stretch: float, instrument: Instrument, sky: BlankSky | None, noise: bool) -> Fitter:
    """The fitter that makes labels; without noise, it knows the sky and iterates until chi-square hardly changes."""
    from sersicnet.engine.fit import MODEL_ERROR, SKY_LEFT, Fitter, Noise

    correlation = instrument.autocorrelation() if sky is None else sky.autocorrelation
    seen = Noise(correlation, instrument.exposure, SKY_LEFT if noise else 1e-3, MODEL_ERROR)
    through = camera(psf, stretch)
    return Fitter(
        through.psf, seen, STAMP_SIZE, psf_oversampling=through.oversampling, tolerance=2e-2 if noise else 1e-3
    )


def draw_stamps(simulation: Simulation, indices: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Draw some objects of a simulation.

    Parameters
    ----------
    simulation : Simulation
    indices : ndarray, int, (N,)
        Numbers of the objects.

    Returns
    -------
    stamps : ndarray, float32, (N, 128, 128)
        In electrons/s.
    truth : dict of ndarray, float64, (N,)
        The columns of `sersicnet.dataset.TRUTH_COLUMNS`; with own PSFs ``psf``, the
        number of the stamp's PSF among them; with neighbours ``neighbours``, the fraction of
        pixels that were replaced; with real-like galaxies
        `sersicnet.simulating.recipe.FIT_COLUMNS`.
    """
    images = np.empty((len(indices), STAMP_SIZE, STAMP_SIZE), dtype=np.float32)
    truths = []
    for image, index in zip(images, indices, strict=True):
        truth, rng, more = draw_truth(simulation, int(index))
        image[:] = _stamp(simulation, truth, rng, more)
        truths.append(truth)
    names = [name for name in simulation.columns if name in truths[0]]
    return images, {name: np.array([t[name] for t in truths], float) for name in names}


def _stamp(
    simulation: Simulation, truth: dict[str, float], rng: np.random.Generator, more: np.random.Generator
) -> np.ndarray:
    """Draw the stamp of a galaxy, complete its truth, and shift the position to where the stamp is cut.

    Everything that options add is drawn from `more`.
    """
    instrument = simulation.instrument
    number = draw_psf(simulation, truth, more)
    psf = simulation.psfs[number] if simulation.psfs else instrument
    stretch = truth.get("psf_stretch", 1.0)
    draw = camera(psf, stretch)
    galaxy = np.array(neighbours.parameters(truth, instrument))
    expose = functools.partial(_observed, simulation, truth, rng)
    if not (simulation.neighbours or simulation.real_like):
        if simulation.centring:
            step = neighbours.centring_step(
                neighbours.centring_error(draw.render(galaxy, STAMP_SIZE), truth["rms"]), more
            )
            truth["x"], truth["y"] = truth["x"] + step[0], truth["y"] + step[1]
            galaxy[:2] += step
        return expose(draw.render(galaxy, STAMP_SIZE))
    galaxy[:2] += neighbours.MARGIN
    if simulation.real_like:
        # The PSFs of many telescopes differ anyhow, and networks are shown them.
        variant = None if simulation.telescopes else int(more.integers(morphology.PSF_VARIANTS))
        model = draw.paint(morphology.invent(galaxy, more), variant, neighbours.SIZE)
    else:
        model = draw.render(galaxy, neighbours.SIZE)
    limit = simulation.neighbour_limit
    stamp = neighbours.cut_among_neighbours(model, galaxy, draw, instrument, expose, more, simulation.centring, limit)
    image = stamp.pixels[0]
    truth["x"], truth["y"], truth["neighbours"] = stamp.x[0], stamp.y[0], stamp.neighbours[0]
    if simulation.real_like:
        fitter = _fitter(psf, stretch, instrument, simulation.sky, not simulation.noiseless_labels)
        if simulation.noiseless_labels:
            column, row = np.rint(galaxy[:2] - (stamp.x[0], stamp.y[0])).astype(int)
            alone = model[row : row + STAMP_SIZE, column : column + STAMP_SIZE]
            _label(fitter, truth, simulation, alone)
        else:
            _label(fitter, truth, simulation, image, stamp.replaced[0])
    return image


def _observed(
    simulation: Simulation, truth: dict[str, float], rng: np.random.Generator, model: np.ndarray
) -> np.ndarray:
    """Add noise to the model, and enter its rms into the truth."""
    if simulation.sky is None:
        return observe(model, truth["rms"], simulation.instrument, rng)
    noise, truth["rms"] = simulation.sky.draw(rng, len(model))
    return model + photon_noise(model, simulation.instrument.exposure, simulation.instrument.noise_tap, rng) + noise


def _label(
    fitter: Fitter, truth: dict[str, float], simulation: Simulation, image: np.ndarray, mask: np.ndarray | None = None
) -> None:
    """Replace the truth by the result of a single Sersic fit, with its status and errors."""
    instrument = simulation.instrument
    # Images of many telescopes have ranges of their own: magnitudes have another zero point in each.
    learned = simulation.prior.ranges if simulation.telescopes else population.FULL_RANGES
    start = np.array([neighbours.parameters(truth, instrument)])
    found = fitter(image[None], np.array([truth["rms"]]), start, None if mask is None else mask[None])
    truth["x"], truth["y"], flux, r_eff, n, q, truth["theta"] = (float(v) for v in found.parameters[0])
    values = (instrument.zero_point - 2.5 * np.log10(flux), r_eff, n, 1 - q)
    errors = np.sqrt(np.diagonal(found.covariance[0]))[2:6] * (2.5 / np.log(10) / flux, 1, 1, 1)
    truth["status"] = int(found.status[0])
    for target, value, error in zip(TARGETS, values, errors, strict=True):
        truth[target.name], truth[f"{target.name}_err"] = float(value), float(error)
        low, high = learned[target.name]
        if truth["status"] == 0 and not low <= value <= high:
            truth["status"] = OUT_OF_RANGE
