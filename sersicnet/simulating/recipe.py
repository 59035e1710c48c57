"""What determines a set of simulated stamps: a prior of galaxies, an instrument, a seed, and options."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sersicnet import dataset
from sersicnet.errors import DatasetError, InputError, warn
from sersicnet.image.psf import Psf, full_width
from sersicnet.schema import TARGET_NAMES, TARGETS
from sersicnet.simulating import described, population
from sersicnet.simulating.blank_sky import BlankSky, blank_sky
from sersicnet.simulating.neighbours import camera
from sersicnet.simulating.population import FlatInMagnitude, Mixture
from sersicnet.simulating.telescopes import F160W, Instrument, effective_psf

PSF_STRETCHES = 9
"""Number of widths of the PSF that `Simulation.psf_scatter` makes."""

LEAST_SAMPLED = 1.9
"""A PSF that is narrower than this, in pixels, is not well described by one sample per pixel."""

FIT_COLUMNS = ("status", *(f"{name}_err" for name in TARGET_NAMES))
"""Truth columns of real-like galaxies: status and formal errors of the fit that labels them."""


class Joint(Protocol):
    """A joint distribution of galaxies of which no density is known."""

    def draw(self, rng: np.random.Generator, ranges: population.Ranges) -> dict[str, float]:
        """Draw one galaxy."""

    def record(self) -> dict[str, Any]:
        """What names it in a dataset's configuration."""


@dataclass(frozen=True)
class Prior:
    """Ranges that parameters are drawn from, uniformly and independently.

    The default ranges are those of the study; the radius is along the semi-major axis.
    With `joint`, parameters are drawn from that distribution within the ranges, except
    for a fraction `uniform`, which lets a network learn rare galaxies, too.

    Attributes
    ----------
    mag, r_eff_pix, sersic_n, ellipticity : (float, float)
    log_radii : float
        Fraction of the galaxies whose radius is drawn log-uniformly instead;
        uniform radii leave few small galaxies to learn from.
    joint : Mixture or FlatInMagnitude, optional
        A joint distribution; see `sersicnet.simulating.population`.
    uniform : float
        If `joint` is a `FlatInMagnitude`, the fraction of galaxies drawn without it.
    """

    mag: tuple[float, float] = (TARGETS[0].low, TARGETS[0].high)
    r_eff_pix: tuple[float, float] = (TARGETS[1].low, TARGETS[1].high)
    sersic_n: tuple[float, float] = (TARGETS[2].low, TARGETS[2].high)
    ellipticity: tuple[float, float] = (TARGETS[3].low, TARGETS[3].high)
    log_radii: float = 0.0
    joint: Mixture | FlatInMagnitude | Joint | None = None
    uniform: float = 0.0

    @classmethod
    def candels(
        cls, pixel_scale: float = population.CANDELS_SCALE, limit: float | None = None, uniform: float = 0.0
    ) -> Prior:
        """The galaxies of CANDELS/COSMOS with 18 < mag < 25; see `sersicnet.simulating.population.candels_mixture`.

        With a `limit`, magnitudes are uniform from 18 to the limit, or to the faintest magnitude that networks
        learn. Beyond 25.5, where the survey ends, galaxies have the shapes that they have there. A fraction
        `uniform` is drawn from the default prior instead, which begins at 16.
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
            assert isinstance(self.joint, Mixture | FlatInMagnitude)
            return self.joint.log_density(values)
        low, high = self.r_eff_pix
        logarithmic = self.log_radii / (values[:, 1] * np.log(high / low))
        alone = np.log((1 - self.log_radii) / (high - low) + logarithmic)
        if self.joint is None:
            return alone
        alone -= sum(np.log(high - low) for low, high in (self.mag, self.sersic_n, self.ellipticity))
        assert isinstance(self.joint, FlatInMagnitude)
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
        PSFs to use instead of the instrument's; each stamp has one of them, chosen at random.
        Sampled once a pixel; see `sersicnet.image.psffile.read_psf`.
    psf_scatter : float
        Largest fraction by which the instrument's PSF is made narrower or wider, in
        `PSF_STRETCHES` steps, so that a network does not rely on one width.
    sky : BlankSky, optional
        Noise of a real image instead of the instrument's; see
        `sersicnet.simulating.blank_sky.blank_sky`.
    neighbours : bool
        Whether other galaxies and stars surround each galaxy, and are detected, cut and
        replaced as `sersicnet measure` does.
    centring : bool
        Whether centres scatter like those of detections, see
        `sersicnet.simulating.neighbours.centring_error`, in addition to lying anywhere in a pixel. With
        `neighbours`, the centres are those of detections in any case; those of galaxies too
        faint to be detected scatter by a pixel.
    galaxies : str
        ``sersic``, or ``real-like``: galaxies of several parts among neighbours,
        through slightly distorted PSFs, see `sersicnet.simulating.morphology`. Their truth is what
        a single Sersic fit finds in the stamp. For many telescopes ``both``, too: see
        `sersicnet.simulating.world`.
    noiseless_labels : bool
        Whether that fit is made to the galaxy alone and without noise instead. Noise misleads
        a fit to the stamp and a network that is shown the same stamp in the same direction: such
        a label does not reveal the network's error, and teaches it to follow the noise.
    telescopes : str
        Every block of stamps is from another image, of any telescope or a named one; see
        `sersicnet.simulating.world.simulation`. Empty for stamps of `instrument`.
    neighbour_limit : float
        AB magnitude of the faintest neighbours.
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
    telescopes: str = ""
    neighbour_limit: float = math.inf

    @property
    def real_like(self) -> bool:
        """Whether galaxies are more than one Sersic profile."""
        return self.galaxies != "sersic"

    def record(self) -> dict[str, Any]:
        """Return all of it as plain values, for a dataset's configuration.

        Options that are not used are left out. Files are listed with the SHA-256 of
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
        if self.telescopes:
            return out | {
                "telescopes": self.telescopes,
                **(
                    {"described": asdict(described.cameras(self.telescopes)[0][0])}
                    if ".toml" in self.telescopes
                    else {}
                ),
                **{name: True for name in ("neighbours", "centring", "noiseless_labels") if getattr(self, name)},
                **({"galaxies": self.galaxies} if self.real_like else {}),
            }
        if self.psfs:
            out["psfs"] = [{"name": Path(p.name).name, "sha256": p.sha256, "fwhm": p.fwhm * scale} for p in self.psfs]
        if self.psf_scatter:
            out["psf_scatter"] = self.psf_scatter
        if self.sky is not None:
            out["sky"] = self.sky.record()
        for option in ("neighbours", "centring", "noiseless_labels"):
            if getattr(self, option):
                out[option] = True
        if self.real_like:
            out["galaxies"] = self.galaxies
        widths = [p.fwhm for p in self.psfs] or [full_width(effective_psf(instrument))]
        out["psf_fwhm"] = float(np.mean(widths)) * scale
        return out

    @classmethod
    def of_options(
        cls,
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
        """Make a simulation from files and names, as the command line gives them.

        Parameters
        ----------
        n, seed : int
            See `Simulation`.
        prior : str or Path, optional
            ``candels``, or a table; see `Prior.candels` and `Prior.of_catalogue`.
            Uniform by default, and ``candels`` for real-like galaxies.
        depth : float, optional
            For ``candels``: uniform AB magnitudes from 18 to this one.
        uniform : float
            With `depth`, the fraction of galaxies drawn from the uniform prior, from mag 16 to that depth.
        log_radii : float
            For the uniform prior; see `Prior`.
        psf : sequence of str or Path
            Files, see `sersicnet.image.psffile.read_psf`; of a PSF that varies over the image, the one in the middle of
            its field is used, with a warning.
        psf_scatter : float
            See `Simulation`; not together with `psf`.
        noise_from : str or Path, optional
            FITS image whose blank sky is the noise; see `sersicnet.simulating.blank_sky.blank_sky`.
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
            raise InputError("`log_radii` is for the uniform prior: leave out either `log_radii` or `prior`.")
        if psf and psf_scatter:
            raise InputError("`psf_scatter` stretches the instrument's PSF: leave out either `psf` or `psf_scatter`.")
        if not 0 <= psf_scatter < 0.5:
            raise InputError(f"`psf_scatter` is a fraction from 0 to below 0.5; received {psf_scatter}.")
        if zero_point is not None and noise_from is None:
            raise InputError("`zero_point` is that of the image of `noise_from`: give both, or neither.")
        if galaxies not in ("sersic", "real-like"):
            raise InputError(f"Galaxies are sersic or real-like; received {galaxies}.")
        if noiseless_labels and galaxies != "real-like":
            raise InputError("`noiseless_labels` is for `galaxies='real-like'`; others have their true parameters.")
        if galaxies == "real-like" and log_radii > 0:
            raise InputError(
                "`log_radii` is for the uniform prior, which real-like galaxies do not have: leave it out."
            )
        if prior is None and galaxies == "real-like":
            prior = "candels"
        bright, faint = population.CANDELS_MAG[0], TARGETS[0].high
        if depth is not None and str(prior) != "candels":
            raise InputError("`depth` is for `prior='candels'`, which ends at mag 25 without it.")
        if depth is not None and not bright + 1 <= depth <= faint:
            raise InputError(f"`depth` is a magnitude from {bright + 1:g} to {faint:g}; received {depth:g}.")
        if uniform and depth is None:
            raise InputError("`uniform` goes with `depth`: give both, or neither.")
        if not 0 <= uniform < 1:
            raise InputError(f"`uniform` is a fraction from 0 to below 1; received {uniform}.")
        if prior is None:
            chosen = Prior(log_radii=log_radii)
        elif str(prior) == "candels":
            chosen = Prior.candels(instrument.pixel_scale, depth, uniform)
        else:
            chosen = Prior.of_catalogue(prior, instrument.pixel_scale)
        return cls(
            n,
            seed,
            chosen,
            instrument,
            psfs=tuple(_read(path) for path in psf),
            psf_scatter=psf_scatter,
            sky=None if noise_from is None else blank_sky(noise_from, instrument, zero_point),
            neighbours=neighbours,
            centring=centring,
            galaxies=galaxies,
            noiseless_labels=noiseless_labels,
        )

    @classmethod
    def of_record(cls, record: Mapping[str, Any], psf: np.ndarray | None = None) -> Simulation:
        """Return the simulation that a record describes.

        Parameters
        ----------
        record : mapping
            The configuration of a dataset.
        psf : ndarray, float, (K, P, P), optional
            The PSFs that the dataset holds.

        Raises
        ------
        DatasetError
            If it depended on files that are not in the record: a real sky, a table of
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
            telescopes=record.get("telescopes", ""),
            psf_scatter=record.get("psf_scatter", 0.0),
            neighbours=record.get("neighbours", False),
            centring=record.get("centring", False),
            galaxies=record.get("galaxies", "sersic"),
            noiseless_labels=record.get("noiseless_labels", False),
        )

    @property
    def stretches(self) -> list[float]:
        """Factors by which the width of the instrument's PSF is multiplied."""
        if not self.psf_scatter:
            return [1.0]
        return [1 + self.psf_scatter * (2 * i / (PSF_STRETCHES - 1) - 1) for i in range(PSF_STRETCHES)]

    def psf_images(self) -> np.ndarray | None:
        """The effective PSFs of the stamps, float32, (K, P, P); smaller ones are padded with zeros.

        None for many telescopes: a dataset holds the views of their PSFs.
        """
        if self.telescopes:
            return None
        images = [p.image for p in self.psfs] or [camera(self.instrument, stretch).psf for stretch in self.stretches]
        half = max(len(image) for image in images) // 2
        frames = [np.pad(image, half - len(image) // 2) for image in images]
        return np.array(frames, np.float32)

    def psf_numbers(self, truth: Mapping[str, np.ndarray]) -> np.ndarray:
        """Which of `psf_images` each stamp was drawn with, int, (N,), from the truth columns."""
        if self.psfs:
            return np.asarray(truth["psf"]).astype(int)
        if self.psf_scatter:
            return np.abs(np.subtract.outer(truth["psf_stretch"], self.stretches)).argmin(axis=1)
        return np.zeros(len(truth["rms"]), int)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the truth columns."""
        more = (
            ("psf",) * bool(self.psfs or self.telescopes)
            + ("fwhm", "correlation", "electrons") * bool(self.telescopes)
            + ("psf_stretch",) * bool(self.psf_scatter)
            + ("neighbours",) * (self.neighbours or self.real_like)
        )
        return dataset.TRUTH_COLUMNS + more + FIT_COLUMNS * self.real_like


def _read(path: str | Path) -> Psf:
    """The PSF of a file, sampled once a pixel, as stamps are drawn."""
    from sersicnet.image.psffile import read_psf  # which needs Astropy; training on datasets does without

    psf = read_psf(path)
    if psf.varies:
        warn(f"{psf.name} varies over the image: the PSF in the middle of its field is used.")
    if psf.oversampling > 1 and psf.fwhm < LEAST_SAMPLED:
        warn(
            f"{psf.name} has a FWHM of {psf.fwhm:.2g} pixels: stamps are drawn with one sample of it per pixel, "
            "which is too coarse for its shape."
        )
    return psf.at_pixel_scale()
