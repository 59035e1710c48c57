"""Whether galaxies of two domains, such as simulated and real ones, differ in what a network sees of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sersicnet.errors import InputError
from sersicnet.output import Report
from sersicnet.schema import N_TARGETS, encode

if TYPE_CHECKING:
    from sersicnet import weights
    from sersicnet.dataset import Arrays, Dataset

GALAXIES = 1000
"""Galaxies of each domain that the classifier is given, at most."""

_FOLDS = 5
_RIDGE = 0.01


def accuracies(
    source: Dataset | Arrays, other: Dataset | Arrays, networks: Mapping[str, weights.Weights], report: Report
) -> dict[str, Any]:
    """Accuracy of a classifier of the domains, for each of the networks and for the true parameters.

    The latter, with the products of each two, tell how far the domains hold other galaxies.
    """
    from sersicnet.networks import features, shown

    counts = [min(len(one), GALAXIES) for one in (source, other)]
    known = encode(np.concatenate([one.targets[:n] for one, n in zip((source, other), counts, strict=True)]))
    known -= known.mean(axis=0)
    first, second = np.triu_indices(N_TARGETS)
    known = np.column_stack([known, known[:, first] * known[:, second]])
    accuracy = {"the true parameters": domain_accuracy(known[: counts[0]], known[counts[0] :])}
    inputs = [one.inputs(0, n) for one, n in zip((source, other), counts, strict=True)]
    for done, (label, network) in enumerate(networks.items()):
        report("telling domains apart", done, len(networks))
        model = features(network.keras_model())
        found = [np.asarray(model.predict(shown(model, one), verbose=0)).reshape(one.n, -1) for one in inputs]
        accuracy[label] = domain_accuracy(found[0], found[1])
    return {"n": counts, "accuracy": accuracy}


def domain_accuracy(first: np.ndarray, second: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Accuracy of a linear classifier that distinguishes two samples.

    Logistic regression on standardised features, with both samples at equal weight
    and a small ridge, fitted to four fifths and asked of the last, five times.

    Parameters
    ----------
    first, second : ndarray, float, (N, F) and (M, F)
        Features; rows with a value that is not finite are left out.
    seed : int
        Of the division into fifths.

    Returns
    -------
    dict
        ``accuracy``, the mean of the fractions of either sample that were told right: 0.5
        where they cannot be told apart; and its ``error`` from counting, 1 sigma.

    Raises
    ------
    InputError
        If a sample has fewer than ten rows.
    """
    samples = [rows[np.isfinite(rows).all(axis=1)] for rows in (first, second)]
    if min(map(len, samples)) < 2 * _FOLDS:
        raise InputError(
            f"Domains are told apart with at least {2 * _FOLDS} galaxies of each; "
            f"received {len(samples[0])} and {len(samples[1])}."
        )
    rng = np.random.default_rng(seed)
    values = np.concatenate(samples).astype(float)
    is_second = np.repeat([False, True], [len(rows) for rows in samples])
    fold = np.concatenate([rng.permutation(np.arange(len(rows)) % _FOLDS) for rows in samples])
    right = np.empty(len(values), bool)
    for k in range(_FOLDS):
        slopes, offset = _logistic(values[fold != k], is_second[fold != k])
        right[fold == k] = (values[fold == k] @ slopes + offset > 0) == is_second[fold == k]
    parts = [right[~is_second].mean(), right[is_second].mean()]
    error = 0.5 * np.sqrt(sum(part * (1 - part) / len(rows) for part, rows in zip(parts, samples, strict=True)))
    return {"accuracy": float(np.mean(parts)), "error": float(error)}


def _logistic(values: np.ndarray, is_second: np.ndarray) -> tuple[np.ndarray, float]:
    """Slopes and offset of a logistic regression, both classes at equal weight."""
    from scipy import optimize, special

    weight = np.where(is_second, 0.5 / is_second.sum(), 0.5 / (~is_second).sum())
    mean = weight @ values
    std = np.sqrt(weight @ (values - mean) ** 2)
    scale = np.where(std > 1e-6 * std.max(initial=1e-300), std, np.inf)
    scaled = (values - mean) / scale
    sign = np.where(is_second, 1.0, -1.0)

    def loss(free: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (scaled @ free[:-1] + free[-1])
        slope = -weight * sign * special.expit(-margin)
        gradient = np.append(slope @ scaled + _RIDGE * free[:-1], slope.sum())
        return float(weight @ np.logaddexp(0, -margin) + 0.5 * _RIDGE * free[:-1] @ free[:-1]), gradient

    best = optimize.minimize(loss, np.zeros(values.shape[1] + 1), jac=True, method="L-BFGS-B").x
    slopes = best[:-1] / scale
    return slopes, float(best[-1] - mean @ slopes)
