"""Factors on errors, and biases, that a validation found, as smooth functions of what a catalogue lists."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from astropy.io import fits
from astropy.table import Table
from threadpoolctl import threadpool_limits

from sersicnet.catalogue.parameters import holds_table
from sersicnet.errors import InputError, first_line, printable
from sersicnet.schema import TARGET_NAMES, TARGETS, decode, encode, pulls
from sersicnet.weights import UNKNOWN_ANGLE

ONE_SIGMA = 0.6827
"""Fraction of a normal distribution within 1 sigma."""

LEAST = 100
"""Galaxies that must be found for factors on errors."""

FARTHEST = 1000.0
"""Distance of the next source where there is none, in FWHM of the PSF."""

PARAMETERS = (*TARGET_NAMES, "theta")
"""What has an error; the angle has one only with some networks and with fits."""

QUANTITIES = ("mag", "size", "distance", "error")
"""What the factors depend on: magnitude; logarithms of the effective radius and the distance of the next source, in
FWHM of the PSF; and logarithm of the claimed error, which is relative for radius and index."""

NODES = (0.01, 0.06, 0.2, 0.4, 0.6, 0.8, 0.94, 0.99)
"""Nodes of the curves: these fractions of the galaxies are below them."""

STIFFNESS = (30.0, 300.0, 3000.0)
"""Choices of the penalty on the second differences of a curve, in units of galaxies. The penalty on the first
differences is a tenth of it."""

FOLDS, LEAST_GAIN, MOST_TESTED = 5, 1.0, 5000
"""To choose the penalty, the galaxies are split into `FOLDS` parts, and each part tests the curves of the others.
Softer curves must be better by `LEAST_GAIN` standard errors, because soft curves of few galaxies follow chance. At most
`MOST_TESTED` galaxies take part."""

_ROUNDS, _WIDEST, _NARROWEST = 60, 0.5, 0.03
_OTHER = {
    "mosaic": "another mosaic",
    "noise map": "another noise map",
    "mask": "another mask",
    "weights": "other weights, or another version of them",
    "psf given": "another PSF",
    "method": "another version of the measurement",
}


# --- quantities ------------------------------------------------------------------------------------------------


def quantities_of(predicted: np.ndarray, errors: np.ndarray, distance: np.ndarray, fwhm: float) -> np.ndarray:
    """What the factors of each parameter depend on.

    Parameters
    ----------
    predicted : ndarray, float64, (N, 4)
        Targets, radii in pixels of the image.
    errors : ndarray, float64, (N, P)
        Claimed errors of the first P of `PARAMETERS`.
    distance : ndarray, float64, (N,)
        See `distances`.
    fwhm : float
        Of the PSF, pixels of the image.

    Returns
    -------
    ndarray, float64, (N, P, 4)
        `QUANTITIES` for each parameter; only the last one differs between parameters. NaN where a value is.
    """
    out = np.empty((*errors.shape, len(QUANTITIES)))
    with np.errstate(invalid="ignore", divide="ignore"):
        out[:, :, 0] = predicted[:, :1]
        out[:, :, 1] = np.log(predicted[:, 1:2] / fwhm)
        out[:, :, 2] = np.log(np.minimum(np.maximum(distance / fwhm, 1e-3), FARTHEST))[:, None]
        relative = errors.copy()
        logs = [i for i, target in enumerate(TARGETS) if target.log]
        relative[:, logs] /= predicted[:, logs]
        out[:, :, 3] = np.log(np.maximum(relative, 1e-6))
    return out


def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance of the next source, pixels, float64, (N,); infinite where there is none."""
    from scipy.spatial import KDTree

    places = np.column_stack([x, y])
    out, good = np.full(len(places), np.inf), np.isfinite(places).all(axis=1)
    if good.sum() > 1:
        out[good] = KDTree(places[good]).query(places[good], 2)[0][:, 1]
    return out


def angle_between(measured: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Measured minus true position angle, from -90 to 90 degrees."""
    return (measured - true + 90) % 180 - 90


def weighted_quantile(values: np.ndarray, weights: np.ndarray, share: float) -> float:
    """The value that a share of the weight is below."""
    order = np.argsort(values)
    mass = np.cumsum(weights[order]) - weights[order] / 2
    return float(np.interp(share * weights.sum(), mass, values[order]))


# --- curves ----------------------------------------------------------------------------------------------------


class Curves(NamedTuple):
    """For each parameter, a constant plus a curve of each of `QUANTITIES`.

    Attributes
    ----------
    constants : ndarray, float64, (P,)
    nodes, values : ndarray, float64, (P, 4, K)
        Curves are linear between ascending nodes and constant beyond.
    """

    constants: np.ndarray
    nodes: np.ndarray
    values: np.ndarray

    def at(self, quantities: np.ndarray) -> np.ndarray:
        """The sums, float64, (N, P), at quantities of shape (N, P, 4); NaN where one is NaN."""
        out = np.tile(self.constants, (len(quantities), 1))
        for i, (nodes, values) in enumerate(zip(self.nodes, self.values, strict=True)):
            for k in range(len(QUANTITIES)):
                out[:, i] += np.interp(quantities[:, i, k], nodes[k], values[k])
        return out

    @classmethod
    def fitted(cls, quantities: np.ndarray, values: np.ndarray, share: float, weights: np.ndarray) -> Curves:
        """The curves that a share of the values is below: a quantile regression with stiff curves.

        The curves of a parameter are the stiffest of `STIFFNESS` that predict other galaxies as well as the best ones
        do, within `LEAST_GAIN` standard errors of the difference (Hastie, Tibshirani & Friedman 2009, section 7.10).

        Parameters
        ----------
        quantities : ndarray, float64, (N, P, 4)
        values : ndarray, float64, (N, P)
        share : float
            0.5 for medians.
        weights : ndarray, float64, (N,)
            Of the galaxies.
        """
        steps = 1e-6 * np.arange(len(NODES))
        nodes = np.moveaxis(np.quantile(quantities, NODES, axis=0), 0, -1) + steps
        found = []
        with threadpool_limits(1, user_api="blas"):  # threads cost more than they save in products this small
            for i in range(values.shape[1]):
                parts = [hats(quantities[:, i, k], nodes[i, k]) for k in range(len(QUANTITIES))]
                design = np.column_stack([np.ones(len(values)), *parts])
                own = design, values[:, i], share, weights
                found.append(_regressed(*own, _stiffness(*own)))
        best = np.array(found)
        return cls(best[:, 0], nodes, best[:, 1:].reshape(nodes.shape))


def hats(x: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Functions that are 1 at one node and linear to 0 at the next ones, (N, K)."""
    return np.column_stack([np.interp(x, nodes, one) for one in np.eye(len(nodes))])


def _stiffness(design: np.ndarray, values: np.ndarray, share: float, weights: np.ndarray) -> float:
    """The largest of `STIFFNESS` that is as good as the best one; see `Curves.fitted`."""
    order = np.random.default_rng(0).permutation(len(values))[:MOST_TESTED]
    design, values, weights, part = design[order], values[order], weights[order], np.arange(len(order)) % FOLDS
    losses = np.empty((len(STIFFNESS), len(values)))
    for stiffness, loss in zip(STIFFNESS, losses, strict=True):
        for k in range(FOLDS):
            own = part == k
            others = _regressed(design[~own], values[~own], share, weights[~own], stiffness)
            off = values[own] - design[own] @ others
            loss[own] = np.maximum(share * off, (share - 1) * off)
    losses = losses * (weights / weights.sum())
    best = losses[np.argmin(losses.sum(axis=1))]
    worse = losses - best
    spread = np.sqrt(((worse - worse.sum(axis=1, keepdims=True) * weights / weights.sum()) ** 2).sum(axis=1))
    good = worse.sum(axis=1) <= LEAST_GAIN * spread
    return max(stiffness for stiffness, is_good in zip(STIFFNESS, good, strict=True) if is_good)


def _penalty(stiffness: float) -> np.ndarray:
    """The quadratic penalty on the constant, which has none, and on the values at the nodes of all curves."""
    first, second = (np.diff(np.eye(len(NODES)), order, axis=0) for order in (1, 2))
    one = stiffness * (second.T @ second + first.T @ first / 10) + 0.02 * np.eye(len(NODES))
    out = np.zeros((1 + len(QUANTITIES) * len(NODES),) * 2)
    out[1:, 1:] = np.kron(np.eye(len(QUANTITIES)), one)
    return out


def _regressed(
    design: np.ndarray, values: np.ndarray, share: float, weights: np.ndarray, stiffness: float
) -> np.ndarray:
    """Coefficients of a quantile regression, by least squares with changing weights."""
    weights = weights / weights.mean()
    penalty = _penalty(stiffness) + 1e-9 * np.eye(design.shape[1])
    pull = (share - 0.5) * (design.T @ weights)
    best, width = np.zeros(design.shape[1]), _WIDEST
    best[0] = weighted_quantile(values, weights, share)
    for _ in range(_ROUNDS):
        each = weights * 0.5 / np.hypot(values - design @ best, width)
        weighted = design.T * each
        before, best = best, np.linalg.solve(weighted @ design + penalty, weighted @ values + pull)
        if width <= _NARROWEST and np.abs(best - before).max() < 1e-3:
            break
        width = max(0.7 * width, _NARROWEST)
    return best


# --- factors ---------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """Galaxies that were found and measured.

    Attributes
    ----------
    truth, predicted : ndarray, float64, (N, 4)
    turned : ndarray, float64, (N,)
        Measured minus true position angle, degrees.
    errors : ndarray, float64, (N, P)
        Claimed errors of the first P of `PARAMETERS`; NaN where the network gives none.
    quantities : ndarray, float64, (N, P, 4)
        See `quantities_of`.
    weights : ndarray, float64, (N,)
        Galaxies of the mosaic that each stands for, in relation.
    """

    truth: np.ndarray
    predicted: np.ndarray
    turned: np.ndarray
    errors: np.ndarray
    quantities: np.ndarray
    weights: np.ndarray

    def pulls(self, errors: np.ndarray) -> np.ndarray:
        """Sizes of the deviations in units of errors, (N, P); see `sersicnet.schema.pulls`."""
        n = len(TARGETS)
        own = pulls(self.predicted, errors[:, :n], self.truth)
        return np.abs(np.column_stack([own, self.turned[:, None] / errors[:, n:]]))

    def taken(self, which: np.ndarray) -> Found:
        """Some of the galaxies."""
        return Found(*(values[which] for values in self))


def factors_on(found: Found) -> Curves:
    """Logarithms of the factors on errors with which these hold `ONE_SIGMA` of the galaxies."""
    away = np.log(np.maximum(found.pulls(found.errors), 1e-6))
    return Curves.fitted(found.quantities, away, ONE_SIGMA, found.weights)


@dataclass(frozen=True, eq=False)
class Factors:
    """What a validation found on errors and biases, to be applied to a catalogue of the same mosaic.

    Attributes
    ----------
    errors : Curves
        Logarithms of the factors on errors, of the four targets and of theta if it has an error.
    bias : Curves
        Measured minus true magnitude, log radius, log index and ellipticity.
    errors_without_bias : Curves
        Logarithms of the factors on errors after the bias is taken out.
    fwhm : float
        Of the PSF, pixels of the image.
    options : dict
        Of the measurement, with digests of the mosaic and its maps.
    name, sha256 : str
        Of the file.
    """

    errors: Curves
    bias: Curves
    errors_without_bias: Curves
    fwhm: float
    options: dict[str, Any]
    name: str = ""
    sha256: str = ""

    @classmethod
    def fitted(cls, found: Found, fwhm: float, options: dict[str, Any]) -> Factors:
        """The factors that give the errors of galaxies their coverage."""
        where, n = found.quantities, len(TARGETS)
        off = encode(found.predicted) - encode(found.truth)
        bias = Curves.fitted(where[:, :n], off, 0.5, found.weights)
        freed, errors = _without_bias(found.predicted, found.errors, bias.at(where[:, :n]))
        return cls(factors_on(found), bias, factors_on(found._replace(predicted=freed, errors=errors)), fwhm, options)

    @classmethod
    def read(cls, path: str | Path) -> Factors:
        """Read the factors of a validation file.

        Raises
        ------
        InputError
            If it is no validation file, or too few galaxies were found for factors.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"A validation is a file that `sersicnet validate` writes; there is none at {path}.")
        header = None
        try:
            with fits.open(path) as hdus:
                header = hdus[0].header
                options, fwhm = json.loads(header["OPTIONS"]), float(header["PSFFWHM"])
                table = Table(hdus["FACTORS"].data) if "FACTORS" in hdus else None
            curves = None if table is None else {kind: _from_table(table, kind) for kind in ("errors", "bias", "after")}
        except Exception as error:  # astropy raises many types for damaged files
            raise InputError(
                f"{path} is not a file that `sersicnet validate` writes{_instead(path, header, error)}."
            ) from error
        if curves is None:
            raise InputError(
                f"{path} has no factors on errors: fewer than {LEAST} galaxies were found, or they have no errors. "
                "Validate with more galaxies."
            )
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return cls(curves["errors"], curves["bias"], curves["after"], fwhm, options, printable(path.name), digest)

    def table(self) -> Table:
        """The curves as a table with a row for each constant and each node."""
        rows = []
        for kind, curves in (("errors", self.errors), ("bias", self.bias), ("after", self.errors_without_bias)):
            for i, constant in enumerate(curves.constants.tolist()):
                rows.append((kind, PARAMETERS[i], "constant", 0.0, constant))
                for k, quantity in enumerate(QUANTITIES):
                    nodes, values = curves.nodes[i, k].tolist(), curves.values[i, k].tolist()
                    rows += [(kind, PARAMETERS[i], quantity, *one) for one in zip(nodes, values, strict=True)]
        return Table(rows=rows, names=("curve", "parameter", "quantity", "node", "value"))

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse a measurement of another mosaic or with other options.

        Raises
        ------
        InputError
            Which states the first difference.
        """
        mine = json.loads(json.dumps(options))
        for name in {**self.options, **mine}:
            before, now = self.options.get(name), mine.get(name)
            if before != now:
                what = _OTHER.get(name, f"other options: {name}")
                shown = [_shown(value) for value in (before, now)]
                if name not in _OTHER and max(map(len, shown)) < 60:
                    what += f" was {shown[0]}, and is {shown[1]} now"
                raise InputError(
                    f"A validation is applied to the same mosaic, measured with the same options; {self.name} is of "
                    f"{what}. Validate this one."
                )

    def applied(
        self, predicted: np.ndarray, errors: np.ndarray, distance: np.ndarray, *, debias: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Values and errors of a catalogue with the factors applied.

        Parameters
        ----------
        predicted : ndarray, float64, (N, 4)
            Radii in pixels of the image.
        errors : ndarray, float64, (N, 5)
            Of the targets and of theta, degrees.
        distance : ndarray, float64, (N,)
            See `distances`.
        debias : bool
            Whether to take the biases out of the values, too.

        Returns
        -------
        predicted, errors : ndarray, float64, (N, 4) and (N, 5)
            NaN where a value is. The error of theta has its usual limit, and no factor if the validation has none.
        """
        p = len(self.errors.constants)
        where, out = quantities_of(predicted, errors[:, :p], distance, self.fwhm), errors.copy()
        curves = self.errors
        if debias:
            curves = self.errors_without_bias
            predicted, out = _without_bias(predicted, out, self.bias.at(where[:, : len(TARGETS)]))
        out[:, :p] *= np.exp(curves.at(where))
        out[:, -1] = np.minimum(out[:, -1], UNKNOWN_ANGLE)
        return predicted, out


def _instead(path: Path, header: fits.Header | None, error: Exception) -> str:
    """What a file is that is no validation, or why it cannot be read."""
    if holds_table(path) and "OPTIONS" not in (header or {}):
        return ", but a catalogue or another table. Give a validation of the image"
    if header is not None and "OPTIONS" not in header:
        return ", but an image. Give a validation of the image"
    reason = first_line(error).strip("\"'.")
    return f": {reason}"


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)


def _from_table(table: Table, kind: str) -> Curves:
    known = {name: np.char.strip(np.asarray(table[name], str)) for name in ("curve", "parameter", "quantity")}
    constants, nodes, values = [], [], []
    for name in PARAMETERS:
        own = (known["curve"] == kind) & (known["parameter"] == name)
        if own.any():
            constants.append(float(table["value"][own & (known["quantity"] == "constant")][0]))
            parts = [table[own & (known["quantity"] == quantity)] for quantity in QUANTITIES]
            nodes.append([np.array(part["node"], float) for part in parts])
            values.append([np.array(part["value"], float) for part in parts])
    return Curves(np.array(constants), np.array(nodes), np.array(values))


def _without_bias(predicted: np.ndarray, errors: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values without a bias, within what is possible, and their errors, which are relative where targets are logs."""
    freed, out = decode(encode(predicted) - bias), errors.copy()
    freed[:, 3] = np.clip(freed[:, 3], 0, 1 - 1e-3)
    logs = [i for i, target in enumerate(TARGETS) if target.log]
    out[:, logs] *= freed[:, logs] / predicted[:, logs]
    return freed, out
