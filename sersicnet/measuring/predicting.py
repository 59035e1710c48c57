"""What the network answers at the places of a tile: a first look, and a second one without the light of neighbours."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sersicnet import weights
from sersicnet.catalogue.factors import angle_between
from sersicnet.errors import WeightsError
from sersicnet.image import pixels
from sersicnet.image.psf import Psf
from sersicnet.image.psferror import with_light
from sersicnet.image.stamps import Stamps
from sersicnet.image.views import psf_views
from sersicnet.measuring.neighbours import Neighbours
from sersicnet.measuring.scene import Scene, Values, stamps_of
from sersicnet.output import Report, silent
from sersicnet.schema import N_TARGETS, Flag, Inputs, absolute_magnitude_of_rms, noise_numbers

OF_NEIGHBOURS = 0.5
"""Error of what subtracting the light of neighbours changes, as a fraction of the change."""

OF_HIDDEN = (0.9, 1.0, 1.5, 0.4)
"""Errors of mag, ln R_e, ln n and ellipticity for each unit of `sersicnet.measuring.neighbours.hidden_light`."""


class Look(NamedTuple):
    """What fits need of the network's answers besides the values.

    Attributes
    ----------
    of_psf : ndarray, float64, (N, 2, 4)
        What the PSF adds to the errors, see `through`.
    hidden : ndarray, float64, (N,) or None
        See `sersicnet.measuring.neighbours.hidden_light`; None with one look.
    galaxies : ndarray, float64, (N, 7)
        Parameters of the first look, as for `sersicnet.engine.render.Renderer`: those of the second look are known in
        the tile itself alone, and a fit must not depend on the tiles.
    """

    of_psf: np.ndarray
    hidden: np.ndarray | None
    galaxies: np.ndarray


def predict(scene: Scene, values: Values, own: np.ndarray, network: weights.Weights, report: Report = silent) -> Look:
    """Predict the targets with the network.

    If the PSF is known, places of the tile itself are measured again without the light of their neighbours, as far
    as it counts, see `sersicnet.measuring.neighbours`.
    """
    n, setting = len(scene.x), scene.setting
    of_psf = np.zeros((n, 2, N_TARGETS))
    report("measuring", 0, n)
    for part, stamps in stamps_of(scene, scene.source + 1):
        stamps.pixels[stamps.empty] = np.nan
        rows = np.arange(n)[part]
        of_psf[rows] = _answered(scene, values, rows, stamps, network)
        values.note(scene, part, stamps)
        report("measuring", part.stop, n)
    first = values.parameters(setting.zero_point)
    if not setting.second_look:
        return Look(of_psf, None, first)
    assert setting.psf is not None
    saturated = values.flags & Flag.SATURATED != 0  # what they would be is not known
    galaxies = np.where(saturated[:, None], np.nan, first)
    others = Neighbours(galaxies, setting.psf, values.rms, pixels.correlation(setting.mesh.autocorrelation))
    again = others.of(np.flatnonzero(own))
    report("measuring without neighbours", 0, len(again))
    for part, stamps in stamps_of(scene, scene.source + 1, again):
        rows = again[part]
        stamps.subtract(others.light(rows, stamps))
        of_psf[rows] = _answered(scene, values, rows, stamps, network, again=True)
        report("measuring without neighbours", part.stop, len(again))
    mine = np.flatnonzero(own)
    add_hidden(values, mine, others.hidden[mine])
    return Look(of_psf, others.hidden, first)


def add_hidden(values: Values, rows: np.ndarray, hidden: np.ndarray) -> None:
    """Add the error that hidden sources cause to the errors of some rows; correlations stay.

    Parameters
    ----------
    values : Values
    rows : ndarray, int, (K,)
    hidden : ndarray, float64, (K,)
        See `sersicnet.measuring.neighbours.hidden_light`; NaN where it is not known, which adds nothing.
    """
    hidden = np.nan_to_num(hidden)
    light = hidden[:, None] * OF_HIDDEN
    light[:, 1:3] *= values.targets[rows, 1:3]
    before = values.errors[rows]
    values.errors[rows] = np.hypot(before, light)
    # An angle is as uncertain as the ellipticity, relative to what it was.
    with np.errstate(invalid="ignore", divide="ignore"):
        rise = values.errors[rows, 3] / before[:, 3]
    values.theta_err[rows] *= np.where(np.isfinite(rise), rise, 1.0)
    values.theta_err[rows] = np.minimum(values.theta_err[rows], weights.UNKNOWN_ANGLE)
    of_flux = OF_HIDDEN[0] * np.log(10) / 2.5 * hidden * values.flux[rows]
    values.flux_err[rows] = np.hypot(values.flux_err[rows], of_flux)


def _answered(
    scene: Scene, values: Values, rows: np.ndarray, stamps: Stamps, network: weights.Weights, *, again: bool = False
) -> np.ndarray:
    """Put the answers of the network into rows of `values`; what the PSF adds to their errors.

    What subtracting the light of neighbours changes is uncertain by `OF_NEIGHBOURS`, if it is the second answer.
    """
    found, of_psf = _predicted(scene, stamps, scene.x[rows], scene.y[rows], network)
    targets = found.targets.copy()
    targets[:, 0] += absolute_magnitude_of_rms(scene.setting.zero_point, stamps.rms)
    if again:
        turn = None if found.theta is None else OF_NEIGHBOURS * angle_between(found.theta, values.theta[rows])
        found = found.with_error(OF_NEIGHBOURS * (targets - values.targets[rows]), turn)
    values.targets[rows] = targets
    if found.errors is not None:
        values.errors[rows] = found.errors
    if found.correlations is not None:
        values.correlations[rows] = found.correlations
    if found.theta is not None:
        values.theta[rows], values.theta_err[rows] = found.theta, found.theta_err
    return of_psf


LEAST_PSF_ERROR = 0.01
"""A PSF whose FWHM is known better than this counts as known."""

LIGHT_INCLUDED = 0.015
"""Error of the light of a PSF that the errors of a network include: half of the PSFs of their calibration are from a
few stars, too. What is beyond it is added, in quadrature."""

LIGHT_MATTERS = 3.0
"""Errors of magnitudes up to so many times that of the light of the PSF include it; larger ones would hardly change."""


def _predicted(
    scene: Scene, stamps: Stamps, x: np.ndarray, y: np.ndarray, network: weights.Weights
) -> tuple[weights.Prediction, np.ndarray]:
    """What the network answers, and the part of its errors that is due to the PSF, (N, 2, 4)."""
    setting, psf = scene.setting, scene.setting.psf
    if psf is None:
        return network.predict(Inputs(stamps.pixels)), np.zeros((len(x), 2, N_TARGETS))
    correlation = pixels.correlation(setting.mesh.autocorrelation)
    noise = noise_numbers(correlation, (np.nan if setting.gain is None else setting.gain) * stamps.rms)
    return through(psf, stamps.pixels, noise, x, y, network, whole=setting.fitters is not None)


def through(
    psf: Psf,
    stamps: np.ndarray,
    noise: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    network: weights.Weights,
    *,
    whole: bool = False,
) -> tuple[weights.Prediction, np.ndarray]:
    """What a network answers that is shown a PSF, and the part of its errors that is due to the errors of the PSF.

    That part is from answers through a narrower and a wider PSF, and through one with brighter wings.

    Parameters
    ----------
    psf : Psf
        In pixels of the image.
    stamps : ndarray, float32, (N, 128, 128)
        In units of their noise.
    noise : ndarray, float32, (N, 3)
        See `sersicnet.schema.noise_numbers`.
    x, y : ndarray, float64, (N,)
        Places in the image.
    network : Weights
    whole : bool
        Whether to return the effect of the whole error of the light, for fits, whose errors include none of it.

    Returns
    -------
    found : Prediction
        Its errors include those of the PSF. Of the error of the light, they include the part beyond `LIGHT_INCLUDED`.
    of_psf : ndarray, float64, (N, 2, 4)
        By how much the targets of each galaxy move together with a PSF that is wider by its error, and with one that
        has more light within two FWHM by the error of that, or by the part of it that is in the errors of `found`.
    """
    labels, psfs = psf.cells(x, y)
    of_psf = np.zeros((len(x), 2, N_TARGETS))

    def answer(width: float, light: float = 1.0, rows: np.ndarray | slice = slice(None)) -> weights.Prediction:
        views = np.array([_views(one, width, light) for one in psfs])
        # One for all is looked at once; of a varying PSF, the last bits must not depend on the cells of a tile.
        return network.predict(Inputs(stamps[rows], views[labels[rows]] if psf.varies else views, noise[rows]))

    found = answer(1.0)
    if found.errors is None:
        return found, of_psf
    beyond = float(np.sqrt(max(psf.light_error**2 - LIGHT_INCLUDED**2, 0)))
    light_error = psf.light_error if whole else beyond
    some = np.flatnonzero(found.errors[:, 0] < LIGHT_MATTERS * light_error)
    turns = np.zeros((2, len(x)))
    if psf.error >= LEAST_PSF_ERROR:
        narrower, wider = (answer(1 + sign * psf.error) for sign in (-1, 1))
        of_psf[:, 0] = (wider.targets - narrower.targets) / 2
        if wider.theta is not None and narrower.theta is not None:
            turns[0] = angle_between(wider.theta, narrower.theta) / 2
    if len(some):
        diffuse = answer(1.0, 1 - light_error, some)
        of_psf[some, 1] = found.targets[some] - diffuse.targets
        if diffuse.theta is not None and found.theta is not None:
            turns[1, some] = angle_between(found.theta[some], diffuse.theta)
    if psf.error >= LEAST_PSF_ERROR:
        found = found.with_error(of_psf[:, 0], None if found.theta is None else turns[0])
    if beyond > 0:
        part = beyond / light_error
        found = found.with_error(part * of_psf[:, 1], None if found.theta is None else part * turns[1])
    return found, of_psf


@functools.lru_cache(256)
def _views(psf: Psf, width: float, light: float) -> np.ndarray:
    """What a network is shown of a constant PSF, made wider, and brighter within two FWHM, by factors."""
    return psf_views(with_light(psf, light).image, psf.oversampling / width)


@functools.lru_cache(1)
def loaded(path: Path, identity: str, device: str) -> weights.Weights:
    """The network, loaded once per process; weights that were trained or calibrated again have another identity."""
    network = weights.load(path)
    if network.identity != identity:
        raise WeightsError(f"{path} was replaced during the run. Repeat the command.")
    return replace(network, device=device)
