"""Simulated galaxies: priors, instrument and seed in; stamps and truth out.

Each object has a seed of its own, made from the seed of the run and the index
of the object, so a file does not depend on the number of workers.

GalSim, which draws the instrument's PSF, and Astropy, which writes mosaics, are
imported where they are needed: training on a machine that has neither can draw
galaxies with the PSFs that a dataset holds.

What options add to a stamp is drawn from a second generator of the object, so
that its galaxy stays the same galaxy.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import array_api_compat
import numpy as np
import scipy

import sersicnet
from sersicnet import dataset
from sersicnet.errors import DatasetError, InputError
from sersicnet.image.header import F160W, Instrument
from sersicnet.output import check_output, whole
from sersicnet.schema import STAMP_CENTRE, STAMP_SIZE, TARGET_NAMES, TARGETS
from sersicnet.simulating import morphology as reallike
from sersicnet.simulating import neighbours as scene
from sersicnet.simulating import population
from sersicnet.simulating.blank_sky import BlankSky, Psf, blank_sky, full_width, photon_noise, read_psf
from sersicnet.simulating.neighbours import Camera
from sersicnet.simulating.neighbours import parameters as _parameters
from sersicnet.simulating.population import Even, Mixture
from sersicnet.workers import pools

if TYPE_CHECKING:
    from astropy.table import Table

    from sersicnet.engine.fit import Fitter

PSF_SIZE = 167

PSF_STRETCHES = 9
"""Widths of the PSF that `Simulation.psf_scatter` spreads over."""

FIT_COLUMNS = ("status", *(f"{name}_err" for name in TARGET_NAMES))
"""Truth columns of real-like galaxies: how their fit ended, and its formal errors."""

_STRIP = 256
"""Rows of a mosaic that get their noise at once."""

OUT_OF_RANGE = 10
"""Status of a fit that converged outside of the ranges that networks learn."""


@dataclass(frozen=True)
class Prior:
    """Ranges that parameters are drawn from, uniformly and independently.

    The defaults are those of the study; the radius is along the semi-major axis.
    With `joint`, the parameters are drawn from it, within the ranges, but for a
    fraction `uniform`, so that rare galaxies are known, too.

    Attributes
    ----------
    mag, r_eff_pix, sersic_n, ellipticity : (float, float)
    log_radii : float
        Fraction of the galaxies whose radius is drawn log-uniformly instead;
        uniform radii leave few small galaxies to learn from.
    joint : Mixture or Even, optional
        A joint distribution; see `sersicnet.simulating.population`.
    uniform : float
        With an `Even` one, the fraction of the galaxies that are drawn without it.
    """

    mag: tuple[float, float] = (TARGETS[0].low, TARGETS[0].high)
    r_eff_pix: tuple[float, float] = (TARGETS[1].low, TARGETS[1].high)
    sersic_n: tuple[float, float] = (TARGETS[2].low, TARGETS[2].high)
    ellipticity: tuple[float, float] = (TARGETS[3].low, TARGETS[3].high)
    log_radii: float = 0.0
    joint: Mixture | Even | None = None
    uniform: float = 0.0

    @classmethod
    def candels(
        cls, pixel_scale: float = population.CANDELS_SCALE, limit: float | None = None, uniform: float = 0.0
    ) -> Prior:
        """The galaxies of CANDELS/COSMOS with 18 < mag < 25; see `sersicnet.simulating.population.candels_mixture`.

        With a `limit` there are as many at every magnitude from 18 to there, but at most to the faintest
        that networks learn; beyond 25.5, where the survey ends, they are shaped as there. A fraction `uniform`
        of them is of the default prior instead, which begins at 16.
        """
        if limit is None:
            return cls(mag=population.CANDELS_MAG, joint=population.candels_mixture(pixel_scale))
        mag = TARGETS[0].low if uniform else population.CANDELS_MAG[0], min(limit, TARGETS[0].high)
        return cls(mag=mag, joint=population.candels_evenly(pixel_scale), uniform=uniform)

    @classmethod
    def of_catalogue(cls, path: str | Path, pixel_scale: float) -> Prior:
        """The galaxies of a table, smoothed; see `sersicnet.simulating.population.from_catalogue`."""
        joint, ranges = population.from_catalogue(path, pixel_scale)
        mag, r_eff_pix, sersic_n, ellipticity = (ranges[name] for name in TARGET_NAMES)
        return cls(mag, r_eff_pix, sersic_n, ellipticity, joint=joint)

    @property
    def ranges(self) -> population.Ranges:
        """Lowest and highest value of each parameter."""
        return {name: getattr(self, name) for name in TARGET_NAMES}

    def log_density(self, values: np.ndarray) -> np.ndarray:
        """Logarithm of the density within the ranges, up to a constant.

        Parameters
        ----------
        values : ndarray, float, (N, 4)
            In the order of `sersicnet.schema.TARGETS`, within `ranges`.

        Returns
        -------
        ndarray, float64, (N,)
        """
        if self.joint is not None and not self.uniform:
            return self.joint.log_density(values)
        low, high = self.r_eff_pix
        logarithmic = self.log_radii / (values[:, 1] * np.log(high / low))
        alone = np.log((1 - self.log_radii) / (high - low) + logarithmic)
        if self.joint is None:
            return alone
        alone -= sum(np.log(high - low) for low, high in (self.mag, self.sersic_n, self.ellipticity))
        assert isinstance(self.joint, Even)
        joint = self.joint.log_density(values) - np.log(self.mag[1] - max(self.mag[0], self.joint.known[0]))
        return np.logaddexp(np.log(self.uniform) + alone, np.log1p(-self.uniform) + joint)


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
    psfs : tuple of Psf
        One of them is drawn for each stamp, instead of the instrument's PSF; see
        `sersicnet.simulating.blank_sky.read_psf`.
    psf_scatter : float
        The instrument's PSF is stretched by up to this fraction, narrower or wider, in
        `PSF_STRETCHES` steps: so that a network does not rely on one width.
    sky : BlankSky, optional
        Noise of a real image instead of the instrument's; see
        `sersicnet.simulating.blank_sky.blank_sky`.
    neighbours : bool
        Whether other galaxies and stars lie around each galaxy, and are found,
        cut and replaced as `sersicnet measure` does it.
    centring : bool
        Whether the centres scatter as those of detections do, see
        `sersicnet.simulating.neighbours.centring_error`, besides lying anywhere in a pixel. With `neighbours` the
        centres are those of detections in any case; galaxies too faint to be
        detected scatter by a pixel then.
    galaxies : str
        ``sersic``, or ``real-like``: galaxies of several parts among neighbours,
        through slightly distorted PSFs, see `sersicnet.simulating.morphology`. Their truth is what
        a single Sersic fit finds in the stamp.
    noiseless_labels : bool
        Whether that fit is shown the galaxy alone and without noise instead. A fit to
        the stamp goes wrong together with a network that looks at the same stamp: it cannot
        tell how far off the network's answer is, and teaches it to follow the noise.
    """

    n: int
    seed: int = 0
    prior: Prior = field(default_factory=Prior)
    instrument: Instrument = F160W
    psfs: tuple[Psf, ...] = ()
    psf_scatter: float = 0.0
    sky: BlankSky | None = None
    neighbours: bool = False
    centring: bool = False
    galaxies: str = "sersic"
    noiseless_labels: bool = False

    @property
    def real_like(self) -> bool:
        """Whether galaxies are more than one Sersic profile."""
        return self.galaxies == "real-like"

    def record(self) -> dict[str, Any]:
        """All of it as plain values, for a dataset's configuration.

        Options that are not used are not in it. Files stand with the SHA-256 of
        their content.
        """
        instrument = self.instrument if self.sky is None else self.sky.applied(self.instrument)
        prior = {**self.prior.ranges, "log_radii": self.prior.log_radii}
        if self.prior.joint is not None:
            prior["joint"] = self.prior.joint.record()
        if self.prior.uniform:
            prior["uniform"] = self.prior.uniform
        out: dict[str, Any] = {"n": self.n, "seed": self.seed, "prior": prior, "instrument": asdict(instrument)}
        scale = instrument.pixel_scale
        if self.psfs:
            out["psfs"] = [{"name": p.name, "sha256": p.sha256, "fwhm": p.width * scale} for p in self.psfs]
        if self.psf_scatter:
            out["psf_scatter"] = self.psf_scatter
        if self.sky is not None:
            out["sky"] = self.sky.record()
        for option in ("neighbours", "centring", "noiseless_labels"):
            if getattr(self, option):
                out[option] = True
        if self.real_like:
            out["galaxies"] = self.galaxies
        widths = [p.width for p in self.psfs] or [full_width(effective_psf(instrument))]
        out["psf_fwhm"] = float(np.mean(widths)) * scale
        return out

    @classmethod
    def of_record(cls, record: Mapping[str, Any], psf: np.ndarray | None = None) -> Simulation:
        """What `record` was made of, as far as the record holds it.

        Parameters
        ----------
        record : mapping
            The configuration of a dataset.
        psf : ndarray, float, (K, P, P), optional
            The PSFs that the dataset holds.

        Raises
        ------
        DatasetError
            If it lived on files that are not in the record: a real sky, a table of
            galaxies, or PSFs that are not given.
        """
        prior, joint = dict(record["prior"]), record["prior"].get("joint")
        log_radii = prior.get("log_radii", 0.0)
        if "sky" in record:
            raise DatasetError(f"Its noise came from {record['sky']['name']}, which the dataset does not hold.")
        psfs: tuple[Psf, ...] = ()
        if "psfs" in record:
            if psf is None:
                raise DatasetError("Its PSFs came from files, and the dataset was made before PSFs were kept.")
            psfs = tuple(Psf(p["name"], p["sha256"], image) for p, image in zip(record["psfs"], psf, strict=True))
        try:
            instrument = Instrument(**{**record["instrument"], "pixels": tuple(record["instrument"]["pixels"])})
        except TypeError as error:
            raise DatasetError(f"Its instrument is described in another way than by this version ({error}).") from error
        candels = [make(instrument.pixel_scale) for make in (population.candels_mixture, population.candels_evenly)]
        drawn = next((own for own in candels if own.record() == joint), None)
        if joint is not None and drawn is None:
            raise DatasetError(f"Its galaxies came from {joint['name']}, which the dataset does not hold.")
        return cls(
            record["n"],
            record["seed"],
            Prior(
                **{name: tuple(prior[name]) for name in TARGET_NAMES},
                log_radii=log_radii,
                joint=drawn,
                uniform=prior.get("uniform", 0.0),
            ),
            instrument,
            psfs=psfs,
            psf_scatter=record.get("psf_scatter", 0.0),
            neighbours=record.get("neighbours", False),
            centring=record.get("centring", False),
            galaxies=record.get("galaxies", "sersic"),
            noiseless_labels=record.get("noiseless_labels", False),
        )

    @property
    def stretches(self) -> list[float]:
        """Factors on the width of the instrument's PSF."""
        if not self.psf_scatter:
            return [1.0]
        return [1 + self.psf_scatter * (2 * i / (PSF_STRETCHES - 1) - 1) for i in range(PSF_STRETCHES)]

    def psf_images(self) -> np.ndarray:
        """The effective PSFs that stamps are drawn with, float32, (K, P, P), smaller ones in a frame of zeros."""
        images = [p.image for p in self.psfs] or [_camera(self.instrument, stretch).psf for stretch in self.stretches]
        half = max(len(image) for image in images) // 2
        frames = [np.pad(image, half - len(image) // 2) for image in images]
        return np.array(frames, np.float32)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the truth columns."""
        more = (
            ("psf",) * bool(self.psfs)
            + ("psf_stretch",) * bool(self.psf_scatter)
            + ("neighbours",) * (self.neighbours or self.real_like)
        )
        return dataset.TRUTH_COLUMNS + more + FIT_COLUMNS * self.real_like


def plan(
    n: int,
    seed: int = 0,
    *,
    prior: str | Path | None = None,
    depth: float | None = None,
    uniform: float = 0.0,
    log_radii: float = 0.0,
    psf: Sequence[str | Path] = (),
    psf_scatter: float = 0.0,
    noise_from: str | Path | None = None,
    zero_point: float | None = None,
    neighbours: bool = False,
    centring: bool = False,
    galaxies: str = "sersic",
    noiseless_labels: bool = False,
    instrument: Instrument = F160W,
) -> Simulation:
    """A simulation from files and names, as the command line gives them.

    Parameters
    ----------
    n, seed : int
        See `Simulation`.
    prior : str or Path, optional
        ``candels``, or a table; see `Prior.candels` and `Prior.of_catalogue`.
        Uniform by default, and ``candels`` for real-like galaxies.
    depth : float, optional
        For ``candels``: as many galaxies at every AB magnitude, from 18 to this one.
    uniform : float
        With `depth`, the fraction of the galaxies drawn from the uniform prior to there, which begins at mag 16.
    log_radii : float
        For the uniform prior; see `Prior`.
    psf : sequence of str or Path
        FITS files; see `sersicnet.simulating.blank_sky.read_psf`.
    psf_scatter : float
        See `Simulation`; not with PSFs of one's own.
    noise_from : str or Path, optional
        FITS image with blank sky; see `sersicnet.simulating.blank_sky.blank_sky`.
    zero_point : float, optional
        Of `noise_from`; from its header by default.
    neighbours, centring : bool
    galaxies : str
    instrument : Instrument
        See `Simulation`.

    Returns
    -------
    Simulation

    Raises
    ------
    InputError
        If a file cannot be used, or options exclude each other.
    """
    if prior is not None and log_radii > 0:
        raise InputError("--log-radii is for the uniform prior: leave out either --log-radii or --prior.")
    if psf and psf_scatter:
        raise InputError("--psf-scatter stretches the instrument's PSF: leave out either --psf or --psf-scatter.")
    if not 0 <= psf_scatter < 0.5:
        raise InputError(f"--psf-scatter is a fraction from 0 to below 0.5; received {psf_scatter}.")
    if zero_point is not None and noise_from is None:
        raise InputError("--zero-point is that of the image of --noise-from: give both, or none.")
    if galaxies not in ("sersic", "real-like"):
        raise InputError(f"Galaxies are sersic or real-like; received {galaxies}.")
    if noiseless_labels and galaxies != "real-like":
        raise InputError("--noiseless-labels is for --galaxies real-like; others have their true parameters.")
    if galaxies == "real-like" and log_radii > 0:
        raise InputError("--log-radii is for the uniform prior, which real-like galaxies do not have: leave it out.")
    if prior is None and galaxies == "real-like":
        prior = "candels"
    bright, faint = population.CANDELS_MAG[0], TARGETS[0].high
    if depth is not None and str(prior) != "candels":
        raise InputError("--depth is for --prior candels, which ends at mag 25 without it: give both, or none.")
    if depth is not None and not bright + 1 <= depth <= faint:
        raise InputError(f"--depth is a magnitude from {bright + 1:g} to {faint:g}; received {depth:g}.")
    if uniform and depth is None:
        raise InputError("--uniform goes with --depth: give both, or none.")
    if not 0 <= uniform < 1:
        raise InputError(f"--uniform is a fraction from 0 to below 1; received {uniform}.")
    if prior is None:
        chosen = Prior(log_radii=log_radii)
    elif str(prior) == "candels":
        chosen = Prior.candels(instrument.pixel_scale, depth, uniform)
    else:
        chosen = Prior.of_catalogue(prior, instrument.pixel_scale)
    return Simulation(
        n,
        seed,
        chosen,
        instrument,
        psfs=tuple(read_psf(path) for path in psf),
        psf_scatter=psf_scatter,
        sky=None if noise_from is None else blank_sky(noise_from, instrument, zero_point),
        neighbours=neighbours,
        centring=centring,
        galaxies=galaxies,
        noiseless_labels=noiseless_labels,
    )


def effective_psf(instrument: Instrument, size: int = PSF_SIZE, stretch: float = 1.0) -> np.ndarray:
    """The PSF as the image samples it, pixel included.

    Parameters
    ----------
    instrument : Instrument
    size : int
        Odd number of pixels a side.
    stretch : float
        Factor on its width.

    Returns
    -------
    ndarray, float64, (size, size)
        Unit sum, centred on the middle pixel.
    """
    import galsim

    core = [galsim.Airy(lam=instrument.wavelength, diam=instrument.aperture, obscuration=instrument.obscuration)]
    core += [galsim.Pixel(side) for side in instrument.pixels]
    core.append(galsim.Gaussian(sigma=instrument.blur))
    halo = galsim.Moffat(beta=instrument.halo_beta, scale_radius=instrument.halo_scale)
    psf = (1 - instrument.halo_fraction) * galsim.Convolve(core) + instrument.halo_fraction * halo
    if stretch != 1:
        psf = psf.dilate(stretch)
    image = psf.drawImage(nx=size, ny=size, scale=instrument.pixel_scale, method="no_pixel", dtype=float).array
    return image / image.sum()


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
    height, width = model.shape
    white = rng.standard_normal((height + 2, width + 2), dtype=np.float32)
    sky = float(rng.normal(0, instrument.sky_residual * rms))
    return exposed(model, float(rms), instrument, white, sky).astype(np.float32)


def _observe_in_place(canvas: np.ndarray, rms: float, instrument: Instrument, rng: np.random.Generator) -> None:
    """What `observe` does, to an image that is so large that nothing else of its size should be made.

    Parameters
    ----------
    canvas : ndarray, float32, (H, W)
        Noiseless image, electrons/s; overwritten by the same values that `observe` returns.
    rms, instrument, rng
        As for `observe`.
    """
    height, width = canvas.shape
    white = rng.standard_normal((2, width + 2), dtype=np.float32)  # of the rows around the next one to be done
    above = canvas[:0]  # its neighbour, as it was without noise
    for first in range(0, height, _STRIP):
        last = min(first + _STRIP, height)
        white = np.concatenate([white, rng.standard_normal((last - first, width + 2), dtype=np.float32)])
        model = np.concatenate([above, canvas[first : last + 1]])
        # A margin of model needs one more row of noise, which does not reach what is kept.
        margins = len(above), len(model) - len(above) - (last - first)
        noise = np.pad(white, [margins, (0, 0)])
        above = canvas[last - 1 : last].copy()
        observed = exposed(model, float(rms), instrument, noise, 0.0)
        canvas[first:last] = observed[margins[0] : margins[0] + last - first]
        white = white[-2:]
    canvas += float(rng.normal(0, instrument.sky_residual * rms))


def exposed(model: Any, rms: Any, instrument: Instrument, white: Any, sky: Any) -> Any:
    """What `observe` does, with random numbers that are given; for one image or many, in any array library.

    Parameters
    ----------
    model : array, float, (..., H, W)
        Noiseless images, electrons/s.
    rms : array, float, (..., 1, 1), or float
        Standard deviation of a blank pixel of the result.
    instrument : Instrument
    white : array, float, (..., H + 2, W + 2)
        Standard normal numbers.
    sky : array, float, (..., 1, 1), or float
        Residual of the sky, electrons/s.

    Returns
    -------
    array, float, (..., H, W)
    """
    xp = array_api_compat.array_namespace(model)
    middle, side = (float(v) / (1 + 2 * instrument.noise_tap) for v in (1, instrument.noise_tap))
    level = rms / (middle**2 + 2 * side**2)
    photons = xp.clip(model, 0, None) / instrument.exposure
    for axis in (-2, -1):  # the pixels around the image are blank
        edge = xp.zeros_like(photons[..., :1, :] if axis == -2 else photons[..., :1])
        photons = xp.concat([edge, photons, edge], axis=axis)
    noise = white * xp.sqrt(level**2 + photons)
    noise = middle * noise[..., 1:-1, :] + side * (noise[..., :-2, :] + noise[..., 2:, :])
    noise = middle * noise[..., 1:-1] + side * (noise[..., :-2] + noise[..., 2:])
    return model + noise + sky


def draw_truth(simulation: Simulation, index: int) -> tuple[dict[str, float], np.random.Generator, np.random.Generator]:
    """The galaxy and the noise level of an object, and its two generators: for noise, and for what options bring."""
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
    """Number of the stamp's PSF among `Simulation.psf_images`; the truth receives what is to be known of it."""
    if simulation.psfs:
        number = int(more.integers(len(simulation.psfs)))
        truth["psf"] = number
        return number
    if simulation.psf_scatter:
        number = int(more.integers(PSF_STRETCHES))
        truth["psf_stretch"] = simulation.stretches[number]
        return number
    return 0


@functools.cache
def _camera(psf: Instrument | Psf, stretch: float = 1.0) -> Camera:
    return Camera(effective_psf(psf, stretch=stretch) if isinstance(psf, Instrument) else psf.image)


@functools.cache
def _fitter(psf: Instrument | Psf, stretch: float, instrument: Instrument, sky: BlankSky | None, noise: bool) -> Fitter:
    """What makes labels; without noise the sky is none, and it ends where chi-square hardly changes any more."""
    from sersicnet.engine.fit import MODEL_ERROR, SKY_LEFT, Fitter, Noise

    correlation = instrument.autocorrelation() if sky is None else sky.autocorrelation
    seen = Noise(correlation, instrument.exposure, SKY_LEFT if noise else 1e-3, MODEL_ERROR)
    return Fitter(_camera(psf, stretch).psf, seen, STAMP_SIZE, tolerance=2e-2 if noise else 1e-3)


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
        The columns of `sersicnet.dataset.TRUTH_COLUMNS`. With PSFs ``psf``, the
        number of the stamp's; with neighbours ``neighbours``, the fraction of
        pixels that were replaced; with real-like galaxies `FIT_COLUMNS`.
    """
    images = np.empty((len(indices), STAMP_SIZE, STAMP_SIZE), dtype=np.float32)
    truths = []
    for image, index in zip(images, indices, strict=True):
        truth, rng, more = draw_truth(simulation, int(index))
        image[:] = _stamp(simulation, truth, rng, more)
        truths.append(truth)
    return images, {name: np.array([t[name] for t in truths], float) for name in simulation.columns}


def _stamp(
    simulation: Simulation, truth: dict[str, float], rng: np.random.Generator, more: np.random.Generator
) -> np.ndarray:
    """Draw the stamp of a galaxy; its truth is completed, and follows it to where it is cut.

    Everything that options bring is drawn from `more`.
    """
    instrument = simulation.instrument
    number = draw_psf(simulation, truth, more)
    psf = simulation.psfs[number] if simulation.psfs else instrument
    stretch = truth.get("psf_stretch", 1.0)
    camera = _camera(psf, stretch)
    galaxy = np.array(_parameters(truth, instrument))
    expose = functools.partial(_observed, simulation, truth, rng)
    if not (simulation.neighbours or simulation.real_like):
        if simulation.centring:
            step = scene.centring_step(scene.centring_error(camera.render(galaxy, STAMP_SIZE), truth["rms"]), more)
            truth["x"], truth["y"] = truth["x"] + step[0], truth["y"] + step[1]
            galaxy[:2] += step
        return expose(camera.render(galaxy, STAMP_SIZE))
    galaxy[:2] += scene.MARGIN
    if simulation.real_like:
        variant = int(more.integers(reallike.PSF_VARIANTS))
        model = camera.paint(reallike.invent(galaxy, more), variant, scene.SIZE)
    else:
        model = camera.render(galaxy, scene.SIZE)
    stamp = scene.cut_among_neighbours(model, galaxy, camera, instrument, expose, more, simulation.centring)
    image = stamp.pixels[0]
    truth["x"], truth["y"], truth["neighbours"] = stamp.x[0], stamp.y[0], stamp.neighbours[0]
    if simulation.real_like:
        fitter = _fitter(psf, stretch, instrument, simulation.sky, not simulation.noiseless_labels)
        if simulation.noiseless_labels:
            column, row = np.rint(galaxy[:2] - (stamp.x[0], stamp.y[0])).astype(int)
            alone = model[row : row + STAMP_SIZE, column : column + STAMP_SIZE]
            _label(fitter, truth, instrument, alone)
        else:
            _label(fitter, truth, instrument, image, stamp.replaced[0])
    return image


def _observed(
    simulation: Simulation, truth: dict[str, float], rng: np.random.Generator, model: np.ndarray
) -> np.ndarray:
    """The model with noise; the truth receives the noise's rms."""
    if simulation.sky is None:
        return observe(model, truth["rms"], simulation.instrument, rng)
    noise, truth["rms"] = simulation.sky.draw(rng, len(model))
    return model + photon_noise(model, simulation.instrument, rng) + noise


def _label(
    fitter: Fitter, truth: dict[str, float], instrument: Instrument, image: np.ndarray, mask: np.ndarray | None = None
) -> None:
    """Replace the truth by what a single Sersic fit finds, with its status and errors."""
    start = np.array([_parameters(truth, instrument)])
    found = fitter(image[None], np.array([truth["rms"]]), start, None if mask is None else mask[None])
    truth["x"], truth["y"], flux, r_eff, n, q, truth["theta"] = (float(v) for v in found.parameters[0])
    values = (instrument.zero_point - 2.5 * np.log10(flux), r_eff, n, 1 - q)
    errors = np.sqrt(np.diagonal(found.covariance[0]))[2:6] * (2.5 / np.log(10) / flux, 1, 1, 1)
    truth["status"] = int(found.status[0])
    for target, value, error in zip(TARGETS, values, errors, strict=True):
        truth[target.name], truth[f"{target.name}_err"] = float(value), float(error)
        if truth["status"] == 0 and not target.low <= value <= target.high:
            truth["status"] = OUT_OF_RANGE


def _block(first: int) -> dataset.Block:
    simulation = _work[0]
    images, truth = stamps(simulation, np.arange(first, min(first + dataset.BLOCK, simulation.n)))
    return dataset.pack(first, images, truth)


_work: list[Simulation] = []
"""What a worker draws: it comes with PSFs and sky, and is sent once."""


def _start_work(simulation: Simulation) -> None:
    _work[:] = [simulation]


def simulate(
    output: str | Path,
    simulation: Simulation,
    *,
    workers: int = 1,
    overwrite: bool = False,
    command: str = "",
    progress: Callable[[int], None] = lambda done: None,
) -> Path:
    """Write a training set; the same call continues one that was interrupted.

    Finished stamps wait in ``<output>.run`` until all are there.

    Parameters
    ----------
    output : str or Path
        HDF5 file, laid out as in `sersicnet.dataset`.
    simulation : Simulation
    workers : int
        Number of processes; the file does not depend on it. With more than one, a
        Python script needs its calls below ``if __name__ == "__main__":``.
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
    OutputError
        If the file cannot be written.
    WorkError
        If a worker process was killed.
    """
    output = check_output(output, overwrite)
    if simulation.n < 1:
        raise InputError(f"A training set has at least one stamp; received n = {simulation.n}.")
    config = {**simulation.record(), "command": command}
    attributes = {
        "kind": "real-like galaxies" if simulation.real_like else "single Sersic galaxies",
        "config": config,
        "versions": versions(),
        "zero_point": simulation.instrument.zero_point,
        "pixel_scale": simulation.instrument.pixel_scale,
    }
    columns = simulation.columns
    with dataset.Journal(output, simulation.n, attributes, columns=columns, overwrite=overwrite) as journal:
        missing = journal.missing()
        done = simulation.n - sum(min(dataset.BLOCK, simulation.n - first) for first in missing)
        progress(done)
        for block in _blocks(simulation, missing, workers):
            journal.add(block)
            done += len(block.quantum)
            progress(done)
        return journal.finish(simulation.psf_images())


def _blocks(simulation: Simulation, firsts: list[int], n: int) -> Iterator[dataset.Block]:
    prepare = functools.partial(_start_work, simulation)
    n = min(n, len(firsts))
    if n <= 1:
        prepare()
    with pools(n, prepare, preload=__name__) as apply:
        for _, block in apply(_block, firsts):
            yield block


def versions() -> dict[str, str]:
    """Versions of what determines the stamps."""
    return {
        "sersicnet": sersicnet.__version__,
        "galsim": metadata.version("galsim"),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class Field:
    """A piece of sky with many galaxies, as deep surveys see it.

    Sizes follow CANDELS/COSMOS in F160W (van der Wel et al. 2014): log10 of radius
    [pix] and index scatter normally about a mean. The number of galaxies is that of
    COSMOS within 12 % (one in 7,900 pixels with 18 < mag < 26), but it rises by a
    factor 10**0.4 a magnitude, and that of the sky by 10**0.26 between mag 21 and 25:
    this field has too few bright galaxies and too many faint ones. The neighbours
    of single galaxies, `sersicnet.simulating.population.draw_neighbours`, have the counts of
    the sky.

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
    from astropy.table import Table

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
    from astropy.io import fits
    from astropy.wcs import WCS

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
    camera = _camera(sky.instrument)
    canvas = np.zeros((sky.size, sky.size), np.float32)
    for done, row in enumerate(truth, start=1):
        corner = [int(np.round(row[axis])) - drawn // 2 for axis in ("x", "y")]
        galaxy = dict(zip(row.colnames, row, strict=True))
        galaxy["x"], galaxy["y"] = row["x"] - corner[0], row["y"] - corner[1]
        stamp = camera.render(np.array(_parameters(galaxy, sky.instrument)), drawn)
        x0, y0 = (max(0, c) for c in corner)
        x1, y1 = (min(sky.size, c + drawn) for c in corner)
        canvas[y0:y1, x0:x1] += stamp[y0 - corner[1] : y1 - corner[1], x0 - corner[0] : x1 - corner[0]]
        progress(done)
    _observe_in_place(canvas, sky.rms, sky.instrument, np.random.default_rng([sky.seed, 1]))
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
    hdu = fits.CompImageHDU(canvas, header, name="SCI", quantize_level=16)
    truth["ra"], truth["dec"] = wcs.wcs_pix2world(truth["x"], truth["y"], 0)
    truth.meta["instrument"] = sky.instrument.name
    with whole(output) as image, whole(truth_path) as table:
        fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(image, overwrite=True)
        truth.write(table, format="ascii.ecsv", overwrite=True)
    return output, truth_path
