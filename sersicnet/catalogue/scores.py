"""Truth against measurement: how well the four parameters of galaxies are measured."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from sersicnet.schema import TARGETS, pulls

BRIGHT = 23.0
"""The study's magnitude limit."""

MAG_EDGES = (16, 18, 20, 21, 22, 23, 24, 25, 26, 27)
SNR_EDGES = (0, 1, 3, 10, 30, 100, 300, 1000, np.inf)

OUTLIER = 0.5
"""Error above which a measurement is an outlier: in magnitudes, relative, in log10 or in axis ratio."""


def r_squared(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Coefficient of determination, ``1 - sum (y - f)^2 / sum (y - mean y)^2``; NaN if all y are the same."""
    spread = np.sum((truth - truth.mean()) ** 2)
    return float(1 - np.sum((truth - predicted) ** 2) / spread) if spread > 0 else float("nan")


def scores(
    truth: np.ndarray, predicted: np.ndarray, errors: np.ndarray | None = None, mag: np.ndarray | None = None
) -> dict[str, Any]:
    """Scores a parameter, for all galaxies and for those of mag <= 23.

    Parameters
    ----------
    truth, predicted : ndarray, float, (N, 4)
        In physical units, in the order of `sersicnet.schema.TARGETS`. Rows with
        a NaN in either are left out and counted.
    errors : ndarray, float, (N, 4), optional
        1 sigma errors of `predicted`.
    mag : ndarray, float, (N,), optional
        True AB magnitudes, where those of `truth` and `predicted` are relative to the noise:
        what is scored is apparent.

    Returns
    -------
    dict
        For ``all`` and ``mag <= 23``: ``n``, ``missing``, and for each
        parameter ``r2``, ``bias`` (median error), ``scatter`` (68 % of the
        deviations from it) and, with errors, ``coverage`` (within 1 sigma).
    """
    if mag is not None:
        shift = np.zeros((len(truth), len(TARGETS)))
        shift[:, 0] = mag - truth[:, 0]
        truth, predicted = truth + shift, predicted + shift
    mag = truth[:, 0]
    samples = {}
    for name, chosen in (("all", np.ones(len(truth), bool)), (f"mag <= {BRIGHT:g}", mag <= BRIGHT)):
        good = chosen & np.isfinite(truth).all(axis=1) & np.isfinite(predicted).all(axis=1)
        found: dict[str, Any] = {"n": int(good.sum()), "missing": int((chosen & ~good).sum())}
        if found["n"] > 1:
            difference = predicted[good] - truth[good]
            bias = np.median(difference, axis=0)
            values = {
                "r2": [r_squared(truth[good, i], predicted[good, i]) for i in range(len(TARGETS))],
                "bias": bias,
                "scatter": np.quantile(np.abs(difference - bias), 0.6827, axis=0),
            }
            if errors is not None:
                values["coverage"] = np.mean(np.abs(pulls(predicted[good], errors[good], truth[good])) <= 1, axis=0)
            for quantity, row in values.items():
                found[quantity] = {t.name: float(v) for t, v in zip(TARGETS, row, strict=True)}
        samples[name] = found
    return samples


def by_magnitude(truth: np.ndarray, predicted: np.ndarray, errors: np.ndarray | None = None) -> list[dict[str, Any]]:
    """The statistics of `binned` in bins of true AB magnitude."""
    return binned(truth[:, 0], MAG_EDGES, truth, predicted, errors)


def binned(
    values: np.ndarray,
    edges: Sequence[float],
    truth: np.ndarray,
    predicted: np.ndarray,
    errors: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """The statistics of the Euclid Morphology Challenge in bins of something.

    Errors are absolute in magnitude and axis ratio, relative in the radius, and
    of log10 of the index. Their median is the bias, the half-width that holds
    68 % of the deviations from it the dispersion, and outliers are off by more
    than 0.5.

    Parameters
    ----------
    values : ndarray, float, (N,)
        What the bins are of, such as magnitudes; NaN is in none.
    edges : sequence of float
        Borders of the bins, ascending.
    truth, predicted, errors
        As for `scores`; magnitudes are AB.

    Returns
    -------
    list of dict
        For each bin with at least ten galaxies: ``range``, with None for no upper end, ``n``, and a
        dict for each parameter with ``bias``, ``dispersion``, ``outliers`` and,
        with errors, ``within68`` and ``within95``: the fractions of truths within 1 and
        1.96 sigma.

    References
    ----------
    Bretonniere et al. 2023, A&A 671, A102.
    """
    rows = []
    for low, high in pairwise(edges):
        good = (values >= low) & (values < high)
        good &= np.isfinite(truth).all(axis=1) & np.isfinite(predicted).all(axis=1)
        if good.sum() < 10:
            continue
        t, p = truth[good], predicted[good]
        with np.errstate(invalid="ignore", divide="ignore"):
            off = np.column_stack(
                [p[:, 0] - t[:, 0], p[:, 1] / t[:, 1] - 1, np.log10(p[:, 2] / t[:, 2]), t[:, 3] - p[:, 3]]
            )
        row: dict[str, Any] = {"range": [low, high if np.isfinite(high) else None], "n": int(good.sum())}
        pull = None if errors is None else np.abs(pulls(p, errors[good], t))
        for i, target in enumerate(TARGETS):
            bias = float(np.median(off[:, i]))
            row[target.name] = {
                "bias": bias,
                "dispersion": float(np.quantile(np.abs(off[:, i] - bias), 0.6827)),
                "outliers": float((np.abs(off[:, i]) > OUTLIER).mean()),
            }
            if pull is not None:
                row[target.name]["within68"] = float((pull[:, i] <= 0.9945).mean())
                row[target.name]["within95"] = float((pull[:, i] <= 1.96).mean())
        rows.append(row)
    return rows
