"""Options of the fits, and the fits of one image with these options."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sersicnet.catalogue.parameters import possible
from sersicnet.domain import Domain
from sersicnet.engine.fit import MODEL_ERROR, SKY_LEFT, Fitter, Noise
from sersicnet.engine.prior import R_BOUNDS, Prior
from sersicnet.errors import InputError, warn
from sersicnet.image.exposure import Exposure
from sersicnet.image.pixels import Pixels, Window
from sersicnet.image.psf import Psf
from sersicnet.image.sky import Mesh
from sersicnet.schema import STAMP_SIZE, TARGET_NAMES
from sersicnet.simulating import population
from sersicnet.simulating.telescopes import training_psf
from sersicnet.weights import PAIRS, Weights

PRIOR_SAMPLE = 4000
"""Number of galaxies drawn from a distribution to make a prior."""

MOST_FITTERS = 64
"""Number of fitters that a process keeps, for as many cells of an image."""

UNUSUAL = 1e6
"""Fits use a unit of their own if the noise of an image is above this number or below its inverse."""

SAMPLE, BRIGHT, LEAST_BRIGHT, LEAST_EXCESS, LEAST_CORRELATION = 256, 10.0, 100, 0.2, 0.6
"""A noise map includes the photon noise of sources if its variance follows the light of bright pixels: side of the
windows that are compared; brightness, in units of the noise of a blank pixel, and number of these pixels; excess of
their variance; and its correlation with their light. Of real maps that include photon noise most have correlations
from 0.75 to 1, of others below 0.1."""


FIXABLE = {"position": (0, 1), "r_eff": (3,), "sersic_n": (4,), "ellipticity": (5,), "theta": (6,)}
"""What fits can keep, and its indices among the parameters of `sersicnet.engine.render.Renderer`."""

SHAPE = ("r_eff", "sersic_n", "ellipticity", "theta")
"""If all of these are kept, so is the position, and only fluxes are measured."""


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """Options of fits.

    Attributes
    ----------
    gain : float, optional
        Electrons per image unit, for the Poisson noise of the galaxies. It is not used with a noise map
        that includes this noise, see `sersicnet.image.exposure.Exposure`.
    prior : str or Path
        Prior of radius, index and axis ratio at a given magnitude: "candels" (see
        `sersicnet.simulating.population`), "none", or a table of galaxies, see
        `sersicnet.simulating.population.galaxies_of`. It is a prior in arcsec and AB magnitudes.
    model_error : float
        Scatter of galaxies about a Sersic profile, as a fraction of their surface
        brightness. It is added to the noise of the fits.
    robust : bool
        Whether to limit the influence of pixels far from the model.
    fix : sequence of str
        Parameters of `FIXABLE` that keep the values of the table of positions. All of `SHAPE` together fix the
        position, too: fluxes are then measured by a linear solve, see `sersicnet.engine.forced`.

    Raises
    ------
    InputError
        If `gain` or `model_error` is out of range, or `fix` holds another name.
    """

    gain: float | None = None
    prior: str | Path = "candels"
    model_error: float = MODEL_ERROR
    robust: bool = False
    fix: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.model_error < 1:
            raise InputError(f"`model_error` is a fraction from 0 to below 1; received {self.model_error}.")
        check_gain(self.gain)
        if unknown := [name for name in self.fix if name not in FIXABLE]:
            raise InputError(f"`fix` names some of {', '.join(FIXABLE)}; received {unknown[0]!r}.")

    @property
    def forced(self) -> bool:
        """Whether only fluxes are measured."""
        return all(name in self.fix for name in SHAPE)

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of what is kept, the position of forced photometry among them."""
        return tuple(FIXABLE if self.forced else self.fix)

    @property
    def fixed(self) -> list[int]:
        """Indices of the parameters that are kept."""
        return sorted({k for name in self.kept for k in FIXABLE[name]})

    def check_prior(self, exposure: Exposure) -> None:
        """Refuse a prior that cannot be used for an image, before anything is measured."""
        _prior(self.prior, exposure)

    def of_image(self, exposure: Exposure, psf: Psf | None, network: Weights | None) -> ImageFitting:
        """The fits of one image.

        Parameters
        ----------
        exposure : Exposure
        psf : Psf or None
            None for the PSF that `network` was trained with.
        network : Weights or None
            A missing gain is taken from its training images, if they are of one depth.

        Raises
        ------
        InputError
            If there is neither a PSF nor a network, or the prior cannot be used.

        Warns
        -----
        SersicnetWarning
            If a gain is missing, not used, or taken from training images of another instrument.
        """
        if psf is None:
            if network is None:
                raise InputError("Fits need the effective PSF of the image: give `psf`.")
            psf = psf_of_weights(network)
        return ImageFitting(psf, self._gain(exposure, network), _prior(self.prior, exposure), self)

    def _gain(self, exposure: Exposure, network: Weights | None) -> float | None:
        """Electrons per image unit; None if the fits add no Poisson noise."""
        if exposure.noise_includes == "total":
            if self.gain is not None:
                warn("`gain` is not used: the noise map includes the photon noise of the galaxies already.")
            return None
        if self.gain is not None:
            return self.gain
        if network is not None and isinstance(network.domain, Domain):
            return gain_of_weights(network, exposure)
        is_open = exposure.noise is not None and exposure.noise_includes is None
        warn(
            "No `gain` was given: fits ignore the Poisson noise of galaxies; errors of bright ones are too small"
            + (", unless the noise map includes it: `noise_includes='total'`." if is_open else ".")
        )
        return None


@dataclass(frozen=True, eq=False)
class ImageFitting:
    """The fits of one image, before its noise is known.

    Attributes
    ----------
    psf : Psf
    gain : float or None
        Electrons per image unit; None for no Poisson noise.
    assumed : Prior or None
        Prior in pixels and units of the image.
    options : Fitting
    """

    psf: Psf
    gain: float | None
    assumed: Prior | None
    options: Fitting

    @property
    def config(self) -> dict[str, Any]:
        """Options of the fits that must be the same in a run that continues an unfinished one."""
        seen = hashlib.sha256(np.ascontiguousarray(self.psf.image).tobytes())
        if self.psf.varies:
            seen.update(self.psf.sha256.encode())
        if self.assumed is not None:
            seen.update(self.assumed.mean.tobytes() + self.assumed.precision.tobytes())
        own = self.options
        return {
            "fits": {
                "psf and prior": seen.hexdigest(), "psf oversampling": self.psf.oversampling, "gain": self.gain,
                "prior": str(own.prior), "model error": own.model_error, "robust": own.robust,
                "fix": sorted(own.fix),
            }
        }  # fmt: skip

    @property
    def meta(self) -> dict[str, str | float]:
        """Cards for the header of the catalogue."""
        out: dict[str, str | float] = {"PSF": self.psf.name}
        if self.gain is not None:
            out["GAIN"] = self.gain
        if self.options.fix:
            out["FIXED"] = ",".join(name for name in FIXABLE if name in self.options.fix)
        return {**out, "PRIOR": str(self.options.prior), "MODELERR": self.options.model_error}

    @property
    def psf_width(self) -> float:
        """FWHM of the PSF, image pixels."""
        return self.psf.fwhm

    def fitters(self, mesh: Mesh) -> Fitters:
        """The fitters of the image, with its noise."""
        gain = np.inf if self.gain is None else self.gain
        return Fitters(
            self.psf,
            Noise(mesh.autocorrelation, gain, SKY_LEFT, self.options.model_error),
            prior=self.assumed,
            robust=self.options.robust,
            fixed=self.options.fixed,
            unit=_unit(float(np.median(mesh.rms))),
        )


class Fitters:
    """The fitters of an image, each for the PSF of a cell of it; one for a constant PSF.

    Parameters
    ----------
    psf : Psf
        In the pixels of the image.
    noise : Noise
    **options
        Options of `sersicnet.engine.fit.Fitter`.

    Raises
    ------
    InputError
        If the PSF or the noise cannot be used.
    """

    def __init__(self, psf: Psf, noise: Noise, **options: Any) -> None:
        self._psf, self._noise, self._options = psf, noise, options
        self._made = {psf.sha256: self._fitter(psf)}

    def __getstate__(self) -> dict[str, Any]:
        # Fitters of a varying PSF are made again by the process that needs them.
        return {**self.__dict__, "_made": {}} if self._psf.varies else self.__dict__

    def groups(self, x: np.ndarray, y: np.ndarray) -> Iterator[tuple[np.ndarray, Fitter]]:
        """Indices of the positions of each cell, and its fitter; see `sersicnet.image.psf.Psf.cells`.

        Parameters
        ----------
        x, y : ndarray, float, (N,)
            Zero-based pixels.
        """
        labels, psfs = self._psf.cells(x, y)
        for label, psf in enumerate(psfs):
            if psf.sha256 not in self._made:
                if len(self._made) >= MOST_FITTERS:
                    self._made.clear()
                self._made[psf.sha256] = self._fitter(psf)
            yield np.flatnonzero(labels == label), self._made[psf.sha256]

    def drawn(self, core: Window, parameters: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Models of all fitted galaxies in a window, convolved with the PSF of their cell, float32, (H, W).

        Parameters
        ----------
        core : Window
        parameters : ndarray, float, (N, 7)
            As for `sersicnet.engine.render.Renderer`, in pixels of the image; rows that are not finite are not drawn.
        x, y : ndarray, float, (N,)
            Positions that decide the cell.
        """
        canvas = np.zeros((core[0].stop - core[0].start, core[1].stop - core[1].start), np.float32)
        fitted = np.isfinite(parameters).all(axis=1)
        parameters, x, y = parameters[fitted], x[fitted], y[fitted]
        sizes = np.select([16 * parameters[:, 3] < STAMP_SIZE, 16 * parameters[:, 3] < 2 * STAMP_SIZE], [1, 2], 4)
        sizes *= STAMP_SIZE
        corners = np.rint(parameters[:, :2]).astype(int) - sizes[:, None] // 2
        low = np.maximum(corners, (core[1].start, core[0].start))
        high = np.minimum(corners + sizes[:, None], (core[1].stop, core[0].stop))
        touching = np.flatnonzero((high > low).all(axis=1))
        for group, fitter in self.groups(x[touching], y[touching]):
            for k in touching[group]:
                corner, (x0, y0), (x1, y1) = corners[k], low[k], high[k]
                stamp = fitter.draw(parameters[k] - np.array([*corner, 0, 0, 0, 0, 0]), int(sizes[k]))
                inner = slice(y0 - core[0].start, y1 - core[0].start), slice(x0 - core[1].start, x1 - core[1].start)
                canvas[inner] += stamp[y0 - corner[1] : y1 - corner[1], x0 - corner[0] : x1 - corner[0]]
        return canvas

    def _fitter(self, psf: Psf) -> Fitter:
        return Fitter(psf.image, self._noise, psf_oversampling=psf.oversampling, **self._options)


def known_galaxies(places: np.ndarray | None, starts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Parameters of all galaxies of the user's table, float64, (N, 7), with a flux of 1; NaN where they are not known.

    Parameters
    ----------
    places : ndarray, float, (N, 2)
        Zero-based pixels.
    starts : mapping of ndarray, float, (N,)
        Columns of the table. A galaxy that is round needs no angle.
    """
    assert places is not None
    n = len(places)
    given = {name: starts.get(name, np.full(n, np.nan)) for name in (*TARGET_NAMES[1:], "theta")}
    r_eff, index, e = (np.where(possible(name, given[name]), given[name], np.nan) for name in TARGET_NAMES[1:])
    theta = np.where(np.isnan(given["theta"]) & (e == 0), 0.0, given["theta"])
    return np.column_stack([places, np.ones(n), r_eff, index, 1 - e, theta])


def correlations_of(covariance: np.ndarray) -> np.ndarray:
    """Correlations of the errors of the targets, (N, 6), from the covariance of flux, radius, index and axis ratio."""
    signs = np.array([-1, 1, 1, -1])  # magnitude and ellipticity rise where the flux and the axis ratio fall
    first, second = PAIRS
    with np.errstate(invalid="ignore", divide="ignore"):
        sigma = signs * np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))
        return np.asarray(covariance[:, first, second] / (sigma[:, first] * sigma[:, second]))


def _unit(rms: float) -> float:
    """Unit of the arithmetic of fits: 1 for the noise of most images, a power of two for very small or large noise."""
    return 1.0 if 1 / UNUSUAL < rms < UNUSUAL else float(2.0 ** round(np.log2(rms)))


def _trained_on(network: Weights, missing: str) -> dict[str, Any]:
    trained_on = (network.card["data"].get("config") or {}).get("instrument")
    if trained_on is None:
        raise InputError(f"The card of {network.name} states no {missing}: give `psf` and `gain` with `refine`.")
    return trained_on  # type: ignore[no-any-return]


def gain_of_weights(network: Weights, exposure: Exposure) -> float:
    """Gain, in electrons per unit of this image, with which it is as deep as the training images.

    A warning is issued unless the image's header states their instrument, or the image is the one that
    the weights were adapted to.
    """
    trained_on = _trained_on(network, "exposure")
    gain = float(trained_on["exposure"] * 10 ** (-0.4 * (exposure.zero_point.value - trained_on["zero_point"])))
    header, known = exposure.image.header, set(re.findall(r"\w+", trained_on["name"].lower()))
    stated = {key: str(header[key]).strip() for key in ("TELESCOP", "INSTRUME") if str(header.get(key, "")).strip()}
    is_known = all(known & set(re.findall(r"\w+", value.lower())) for value in stated.values())
    if not (("TELESCOP" in stated and is_known) or trained_on["name"] == exposure.name):
        of_header = ", ".join(f"{key} {value}" for key, value in stated.items()) or "no TELESCOP"
        warn(
            f"No `gain` was given: the photon noise of galaxies is that of the training images of {network.name} "
            f"({trained_on['name']}), {gain:.4g} electrons per image unit, but the header states {of_header}."
        )
    return gain


def holds_photon_noise(exposure: Exposure, mesh: Mesh) -> bool:
    """Whether the noise map rises with the light of sources, as it does if it includes their photon noise.

    The map's variance is compared with the light of the bright pixels in a few windows.
    """
    light, variance, blank = [], [], []
    for y, x in itertools.product(*(np.linspace(0, max(n - SAMPLE, 0), 3).astype(int) for n in exposure.shape)):
        window = slice(y, min(y + SAMPLE, exposure.shape[0])), slice(x, min(x + SAMPLE, exposure.shape[1]))
        data, bad, noise = exposure.read(window)
        assert noise is not None
        above = (data - mesh.at(window, Pixels(data, bad, noise)).level) / np.median(mesh.rms)
        bright = ~bad & (above > BRIGHT)
        light.append(above[bright])
        variance.append(noise[bright].astype(float) ** 2)
        blank.append(noise[~bad & (np.abs(above) < 2)].astype(float) ** 2)
    lights, variances, blanks = np.concatenate(light), np.concatenate(variance), np.concatenate(blank)
    if len(lights) < LEAST_BRIGHT or not len(blanks) or not np.ptp(variances) > 0:
        return False
    rises = np.quantile(variances, 0.95) > (1 + LEAST_EXCESS) * np.median(blanks)
    return bool(rises and np.corrcoef(lights, variances)[0, 1] > LEAST_CORRELATION)


def psf_of_weights(network: Weights) -> Psf:
    """The effective PSF of the instrument that the training images simulate."""
    trained_on = _trained_on(network, "PSF")
    if network.card["data"]["config"].get("psfs"):
        raise InputError(f"{network.name} was trained with PSFs from files: give the image's PSF with `psf`.")
    warn(f"No `psf` was given: the fits use the PSF of the weights' domain, {trained_on['name']}.")
    return Psf.of(training_psf(trained_on), f"of the weights: {trained_on['name']}")


def check_gain(gain: float | None) -> None:
    """Refuse a gain that is no positive number."""
    if gain is not None and not (np.isfinite(gain) and gain > 0):
        raise InputError(f"A gain is a positive number of electrons per image unit; received {gain}.")


def _prior(prior: str | Path, exposure: Exposure) -> Prior | None:
    """The prior of the galaxies, in pixels and units of an image; None for "none".

    It is known in magnitudes and arcsec, so that it is the same for images of any zero point and pixel scale.
    """
    if str(prior) == "none":
        return None
    scale = exposure.pixel_scale.value
    if not np.isfinite(scale):
        raise InputError(
            f"{exposure.name} has no pixel scale, which the prior of radii needs: give `pixel_scale`, or the `prior` "
            '"none".'
        )
    if str(prior) == "candels":
        rng, mixture = np.random.default_rng(0), population.candels_mixture()
        drawn = [mixture.draw(rng, population.CANDELS_RANGES) for _ in range(PRIOR_SAMPLE)]
        mag, r_eff, n, e = (np.array([galaxy[name] for galaxy in drawn]) for name in TARGET_NAMES)
        r_eff = r_eff * population.CANDELS_SCALE / scale
    else:
        # What a network learns does not matter here: fits have any magnitude and radius.
        ranges = {**population.FULL_RANGES, "mag": (-np.inf, np.inf), "r_eff_pix": R_BOUNDS}
        mag, r_eff, n, e = population.galaxies_of(prior, scale, ranges).T
    flux = 10 ** (-0.4 * (mag - exposure.zero_point.value))
    return Prior.of(np.column_stack([flux, r_eff, n, 1 - e]))
