"""Simulated galaxies: priors, instrument and seed in; stamps and truth out.

Each object has a seed of its own, made from the seed of the run and the index
of the object, so a file does not depend on the number of workers.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

import galsim
import numpy as np
import scipy
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS

import sersicnet
from sersicnet import dataset
from sersicnet.errors import InputError, check_output
from sersicnet.instrument import F160W, Instrument
from sersicnet.render import Renderer
from sersicnet.schema import STAMP_CENTRE, STAMP_SIZE, TARGETS

PSF_SIZE = 167


@dataclass(frozen=True)
class Prior:
    """Ranges that parameters are drawn from, uniformly and independently.

    The defaults are those of the study; the radius is along the semi-major axis.

    Attributes
    ----------
    mag, r_eff_pix, sersic_n, ellipticity : (float, float)
    log_radii : float
        Fraction of the galaxies whose radius is drawn log-uniformly instead;
        uniform radii leave few small galaxies to learn from.
    """

    mag: tuple[float, float] = (TARGETS[0].low, TARGETS[0].high)
    r_eff_pix: tuple[float, float] = (TARGETS[1].low, TARGETS[1].high)
    sersic_n: tuple[float, float] = (TARGETS[2].low, TARGETS[2].high)
    ellipticity: tuple[float, float] = (TARGETS[3].low, TARGETS[3].high)
    log_radii: float = 0.0


@dataclass(frozen=True)
class Simulation:
    """Everything that determines a set of stamps.

    Attributes
    ----------
    n : int
        Number of stamps.
    seed : int
    prior : Prior
    instrument : Instrument
    """

    n: int
    seed: int = 0
    prior: Prior = field(default_factory=Prior)
    instrument: Instrument = F160W


def effective_psf(instrument: Instrument, size: int = PSF_SIZE) -> np.ndarray:
    """The PSF as the image samples it, pixel included.

    Parameters
    ----------
    instrument : Instrument
    size : int
        Odd number of pixels a side.

    Returns
    -------
    ndarray, float64, (size, size)
        Unit sum, centred on the middle pixel.
    """
    core = [galsim.Airy(lam=instrument.wavelength, diam=instrument.aperture, obscuration=instrument.obscuration)]
    core += [galsim.Pixel(side) for side in instrument.pixels]
    core.append(galsim.Gaussian(sigma=instrument.blur))
    halo = galsim.Moffat(beta=instrument.halo_beta, scale_radius=instrument.halo_scale)
    psf = (1 - instrument.halo_fraction) * galsim.Convolve(core) + instrument.halo_fraction * halo
    image = psf.drawImage(nx=size, ny=size, scale=instrument.pixel_scale, method="no_pixel", dtype=float).array
    return image / image.sum()


def full_width(psf: np.ndarray) -> float:
    """Full width at half maximum of a PSF's azimuthal mean, in pixels."""
    half = psf.shape[0] // 2
    y, x = np.indices(psf.shape) - half
    distance = np.hypot(x, y)
    radii, which = np.unique(distance[distance < 8].round(3), return_inverse=True)
    profile = np.bincount(which, psf[distance < 8]) / np.bincount(which)
    return 2 * float(np.interp(-psf.max() / 2, -profile, radii))


def observe(model: np.ndarray, rms: float, instrument: Instrument, rng: np.random.Generator) -> np.ndarray:
    """Add the sky's noise, the sources' Poisson noise and a residual of the sky.

    The noise of each detector pixel is independent; drizzling correlates it, and
    makes the scatter of a pixel smaller than what a large aperture sees.

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
    kernel = np.array([instrument.noise_tap, 1.0, instrument.noise_tap])
    kernel /= kernel.sum()
    white = rms / (kernel**2).sum()
    sigma = np.sqrt(white**2 + np.maximum(model, 0) / instrument.exposure)
    noise = rng.standard_normal((model.shape[0] + 2, model.shape[1] + 2), dtype=np.float32)
    noise[1:-1, 1:-1] *= sigma
    noise[[0, -1]] *= white
    noise[1:-1, [0, -1]] *= white
    noise = kernel[1] * noise[1:-1] + kernel[0] * (noise[:-2] + noise[2:])
    noise = kernel[1] * noise[:, 1:-1] + kernel[0] * (noise[:, :-2] + noise[:, 2:])
    sky = rng.normal(0, instrument.sky_residual * rms)
    return (model + noise + sky).astype(np.float32)


def _draw_truth(simulation: Simulation, index: int) -> tuple[dict[str, float], np.random.Generator]:
    rng = np.random.default_rng([simulation.seed, index])
    prior, instrument = simulation.prior, simulation.instrument
    low, high = prior.r_eff_pix
    logarithmic = rng.random() < prior.log_radii
    truth = {
        "r_eff_pix": np.exp(rng.uniform(np.log(low), np.log(high))) if logarithmic else rng.uniform(low, high),
        "mag": rng.uniform(*prior.mag),
        "sersic_n": rng.uniform(*prior.sersic_n),
        "ellipticity": rng.uniform(*prior.ellipticity),
        "theta": rng.uniform(-90, 90),
        "x": STAMP_CENTRE + rng.uniform(-0.5, 0.5),
        "y": STAMP_CENTRE + rng.uniform(-0.5, 0.5),
        "rms": np.exp(rng.uniform(np.log(instrument.rms_low), np.log(instrument.rms_high))),
    }
    return truth, rng


def _parameters(truth: dict[str, float], instrument: Instrument) -> list[float]:
    flux = 10 ** (-0.4 * (truth["mag"] - instrument.zero_point))
    return [
        truth["x"],
        truth["y"],
        flux,
        truth["r_eff_pix"],
        truth["sersic_n"],
        1 - truth["ellipticity"],
        truth["theta"],
    ]


@functools.cache
def _renderer(instrument: Instrument, size: int = STAMP_SIZE) -> Renderer:
    return Renderer(effective_psf(instrument), size)


def stamps(simulation: Simulation, indices: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Draw some objects of a simulation.

    Parameters
    ----------
    simulation : Simulation
    indices : ndarray, int, (N,)
        Which objects; any can be drawn alone.

    Returns
    -------
    stamps : ndarray, float32, (N, 128, 128)
        In electrons/s.
    truth : dict of ndarray, float64, (N,)
        The columns of `sersicnet.dataset.TRUTH_COLUMNS`.
    """
    render = _renderer(simulation.instrument)
    images = np.empty((len(indices), STAMP_SIZE, STAMP_SIZE), dtype=np.float32)
    truths = []
    for image, index in zip(images, indices, strict=True):
        truth, rng = _draw_truth(simulation, int(index))
        model = render(np.array(_parameters(truth, simulation.instrument)))[0]
        image[:] = observe(model, truth["rms"], simulation.instrument, rng)
        truths.append(truth)
    return images, {name: np.array([t[name] for t in truths]) for name in dataset.TRUTH_COLUMNS}


def _block(simulation: Simulation, first: int) -> dataset.Block:
    images, truth = stamps(simulation, np.arange(first, min(first + dataset.BLOCK, simulation.n)))
    return dataset.pack(first, images, truth)


def simulate(
    output: str | Path,
    simulation: Simulation,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    command: str = "",
    progress: Callable[[int], None] = lambda done: None,
) -> Path:
    """Write a training set; the same call continues one that was interrupted.

    Finished stamps wait in ``<output>.unfinished`` until all are there.

    Parameters
    ----------
    output : str or Path
        HDF5 file, laid out as in `sersicnet.dataset`.
    simulation : Simulation
    workers : int, optional
        Processes; one for each core by default. The file does not depend on it.
    overwrite : bool
        Whether to replace an existing file, and to drop an unfinished run with
        other options. One with the same options is continued in any case.
    command : str
        The command line, kept in the file.
    progress : callable
        Called with the number of stamps finished so far.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    InputError
        If the output exists or a number makes no sense.
    DatasetError
        If the file cannot be written.
    """
    output = check_output(output, overwrite)
    if simulation.n < 1:
        raise InputError(f"A training set has at least one stamp; received n = {simulation.n}.")
    config = {
        **asdict(simulation),
        "psf_fwhm": full_width(effective_psf(simulation.instrument)) * simulation.instrument.pixel_scale,
        "command": command,
    }
    attributes = {
        "kind": "single Sersic galaxies",
        "config": config,
        "versions": versions(),
        "zero_point": simulation.instrument.zero_point,
        "pixel_scale": simulation.instrument.pixel_scale,
    }
    with dataset.Journal(output, simulation.n, attributes, overwrite=overwrite) as journal:
        missing = journal.missing()
        done = simulation.n - sum(min(dataset.BLOCK, simulation.n - first) for first in missing)
        progress(done)
        for block in _blocks(simulation, missing, workers):
            journal.add(block)
            done += len(block.quantum)
            progress(done)
        return journal.finish()


def _blocks(simulation: Simulation, firsts: list[int], workers: int | None) -> Iterator[dataset.Block]:
    workers = min(workers or os.cpu_count() or 1, len(firsts))
    draw = functools.partial(_block, simulation)
    if workers <= 1:
        yield from map(draw, firsts)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(draw, firsts, chunksize=4)


def versions() -> dict[str, str]:
    """Versions of what determines the stamps."""
    return {
        "sersicnet": sersicnet.__version__,
        "galsim": galsim.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class Field:
    """A piece of sky with many galaxies, as deep surveys see it.

    Numbers and sizes follow CANDELS/COSMOS in F160W (van der Wel et al. 2014):
    counts rise by a factor 10**0.4 a magnitude, and log10 of radius [pix] and
    index scatter normally about a mean.

    Attributes
    ----------
    size : int
        Pixels a side.
    n : int, optional
        Galaxies; by default those of COSMOS to mag 26, one in 9,000 pixels.
    seed : int
    instrument : Instrument
    rms : float
        Noise of a blank pixel, electrons/s.
    """

    size: int
    n: int | None = None
    seed: int = 0
    instrument: Instrument = F160W
    rms: float = 0.0035

    mag: tuple[float, float] = (18.0, 26.0)
    counts_slope: float = 0.4
    log_radius: tuple[float, float, float] = (0.81, -0.053, 0.30)  # at mag 22, a magnitude, scatter
    log_index: tuple[float, float] = (0.14, 0.28)
    axis_ratio: tuple[float, float] = (0.55, 0.21)

    @property
    def count(self) -> int:
        """Number of galaxies."""
        return self.n if self.n is not None else max(1, self.size**2 // 9000)


def field_truth(sky: Field) -> Table:
    """Draw the galaxies of a field; a table with pixel positions and parameters."""
    rng = np.random.default_rng([sky.seed, 0])
    n = sky.count
    low, high = (10 ** (sky.counts_slope * m) for m in sky.mag)
    mag = np.log10(rng.uniform(low, high, n)) / sky.counts_slope
    at22, slope, scatter = sky.log_radius
    r_eff = 10 ** (at22 + slope * (mag - 22) + scatter * rng.standard_normal(n))
    index = 10 ** (sky.log_index[0] + sky.log_index[1] * rng.standard_normal(n))
    q = sky.axis_ratio[0] + sky.axis_ratio[1] * rng.standard_normal(n)
    prior = Prior()
    return Table(
        {
            "x": rng.uniform(0, sky.size - 1, n),
            "y": rng.uniform(0, sky.size - 1, n),
            "mag": mag,
            "r_eff_pix": np.clip(r_eff, *prior.r_eff_pix),
            "sersic_n": np.clip(index, *prior.sersic_n),
            "ellipticity": 1 - np.clip(q, 0.1, 1),
            "theta": rng.uniform(-90, 90, n),
        }
    )


def simulate_field(
    output: str | Path,
    sky: Field,
    *,
    overwrite: bool = False,
    command: str = "",
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Path, Path]:
    """Write a simulated mosaic, and the truth beside it.

    Parameters
    ----------
    output : str or Path
        FITS image, compressed by tiles, with a WCS and a zero point like HST's.
    sky : Field
    overwrite : bool
    command : str
        The command line, kept in the header.
    progress : callable
        Called with the number of galaxies drawn so far.

    Returns
    -------
    image, truth : Path
        The truth is ``<output>_truth.ecsv``, one row a galaxy.

    Raises
    ------
    InputError
        If an output exists or a number makes no sense.
    """
    output = Path(output)
    if not output.name.endswith((".fits", ".fits.fz")):
        raise InputError(f"A mosaic ends in .fits or .fits.fz; received {output.name}.")
    truth_path = output.with_name(output.name.split(".fits")[0] + "_truth.ecsv")
    for path in (output, truth_path):
        check_output(path, overwrite)
    if sky.size < STAMP_SIZE:
        raise InputError(f"A mosaic is at least {STAMP_SIZE} pixels a side; received {sky.size}.")
    truth = field_truth(sky)
    drawn = 2 * STAMP_SIZE
    render = _renderer(sky.instrument, drawn)
    canvas = np.zeros((sky.size, sky.size), np.float32)
    for done, row in enumerate(truth, start=1):
        corner = [int(np.round(row[axis])) - drawn // 2 for axis in ("x", "y")]
        galaxy = dict(zip(row.colnames, row, strict=True))
        galaxy["x"], galaxy["y"] = row["x"] - corner[0], row["y"] - corner[1]
        stamp = render(np.array(_parameters(galaxy, sky.instrument)))[0]
        x0, y0 = (max(0, c) for c in corner)
        x1, y1 = (min(sky.size, c + drawn) for c in corner)
        canvas[y0:y1, x0:x1] += stamp[y0 - corner[1] : y1 - corner[1], x0 - corner[0] : x1 - corner[0]]
        progress(done)
    image = observe(canvas, sky.rms, sky.instrument, np.random.default_rng([sky.seed, 1]))
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = [150.1, 2.2]
    wcs.wcs.crpix = [sky.size / 2 + 0.5] * 2
    wcs.wcs.cdelt = [-sky.instrument.pixel_scale / 3600, sky.instrument.pixel_scale / 3600]
    header = wcs.to_header()
    header["BUNIT"] = "ELECTRONS/S"
    header["MAGZERO"] = (sky.instrument.zero_point, "AB magnitude of 1 electron/s")
    header["SEED"] = sky.seed
    if command:
        header.add_history(command)
    hdu = fits.CompImageHDU(image, header, name="SCI", quantize_level=16)
    truth["ra"], truth["dec"] = wcs.wcs_pix2world(truth["x"], truth["y"], 0)
    truth.meta["instrument"] = sky.instrument.name
    partial = output.with_name(output.name + ".partial")
    try:
        fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(partial, overwrite=True)
        truth.write(truth_path, format="ascii.ecsv", overwrite=True)
        partial.replace(output)
    except OSError as error:
        raise InputError(f"{output} could not be written: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)
    return output, truth_path
