"""How many galaxies of a mosaic each added galaxy stands for.

Added galaxies are spread evenly over magnitudes and have the shapes of a survey. Those of a mosaic do not: far more
faint galaxies than bright ones are scattered into a bin of the measured magnitude. What the mosaic's own galaxies truly
are is not known, but what is measured of the added ones shows how truth is scattered. The weights are those smooth
functions of the true parameters that make the added galaxies, as they are measured, as numerous as the mosaic's own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sersicnet.catalogue.factors import hats
from sersicnet.schema import encode

LEAST_OWN = 200
"""Galaxies of the mosaic that are needed for weights; with fewer, all weights are 1."""

MAG_STEP = 0.5
"""Distance of the nodes of the weights in magnitude."""

SHAPE_NODES = (0.02, 0.2, 0.5, 0.8, 0.98)
"""Nodes in log radius, log index and ellipticity: these fractions of the added galaxies are below them."""

MAG_CELLS, SHAPE_CELLS = (0.25, 0.5, 0.5), 4
"""Cells in which numbers are compared: magnitude by each of the other parameters. Their widths in magnitude, and cells
of the other parameter, with as many galaxies of the mosaic in each."""

STIFFNESS = 3.0
"""Penalty on the second differences of the logarithm of the weights."""


def weights_of(truth: np.ndarray, measured: np.ndarray, own: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Weights of the added galaxies.

    Parameters
    ----------
    truth : ndarray, float64, (N, 4)
        Targets of the added galaxies.
    measured : ndarray, float64, (N, 4)
        The same as measured; NaN for a galaxy that was not found, or does not count.
    own, negative : ndarray, float64, (M, 4) and (K, 4)
        The same of the mosaic's own galaxies, and of the detections of its negative.

    Returns
    -------
    ndarray, float64, (N,)
        Galaxies of the mosaic for each added one. 1 if the mosaic has too few, or too few of the added ones were found.
    """
    hit = np.isfinite(measured).all(axis=1)
    own, negative = (values[np.isfinite(values).all(axis=1)] for values in (own, negative))
    if len(own) < LEAST_OWN or hit.sum() < LEAST_OWN:
        return np.ones(len(truth))
    low, high = np.quantile(measured[hit, 0], [0.005, 0.995])
    bright, faint = truth[:, 0].min(), truth[:, 0].max()
    shapes = encode(truth)[:, 1:]
    nodes = [np.linspace(bright, faint, max(2, round((faint - bright) / MAG_STEP) + 1))]
    nodes += [np.quantile(shape, SHAPE_NODES) + 1e-6 * np.arange(len(SHAPE_NODES)) for shape in shapes.T]
    design = [hats(values, where) for values, where in zip([truth[:, 0], *shapes.T], nodes, strict=True)]
    compared = []
    for i, width in enumerate(MAG_CELLS, start=1):
        parts = np.quantile(own[:, i], np.linspace(0, 1, SHAPE_CELLS + 1)[1:-1])
        edges = np.linspace(low, high, max(2, round((high - low) / width) + 1)), np.r_[-np.inf, parts, np.inf]
        numbers = _counted(own[:, [0, i]], edges) - _counted(negative[:, [0, i]], edges)
        compared.append(_Compared(_cells(measured[hit][:, [0, i]], edges), np.maximum(numbers, 0)))
    return np.exp(np.hstack(design) @ _fitted([one[hit] for one in design], compared))


class _Compared(NamedTuple):
    """The cell of each added galaxy, int, (N,), -1 for none; and the numbers of the mosaic in the cells, float64."""

    cells: np.ndarray
    numbers: np.ndarray


def _counted(values: np.ndarray, edges: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Numbers in the cells of magnitude and another parameter, one after the other."""
    cells = _cells(values, edges)
    return np.bincount(cells[cells >= 0], minlength=(len(edges[0]) - 1) * SHAPE_CELLS).astype(float)


def _cells(values: np.ndarray, edges: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The cell of each galaxy; -1 beyond the edges."""
    mag, other = (np.searchsorted(own, one, side="right") - 1 for own, one in zip(edges, values.T, strict=True))
    return np.where((mag >= 0) & (mag < len(edges[0]) - 1), mag * SHAPE_CELLS + other, -1)


def _fitted(parts: list[np.ndarray], compared: list[_Compared]) -> np.ndarray:
    """Coefficients of the logarithm of the weights, by penalised maximum likelihood of the numbers in the cells."""
    from scipy.optimize import minimize

    design = np.hstack(parts)
    penalty = np.zeros((design.shape[1],) * 2)
    start = 0
    for part in parts:
        own = slice(start, start := start + part.shape[1])
        second = np.diff(np.eye(part.shape[1]), 2, axis=0)
        penalty[own, own] = STIFFNESS * second.T @ second + 0.01 * np.eye(part.shape[1])
    terms = []
    for cells, numbers in compared:
        inside = cells >= 0
        added = np.bincount(cells[inside], minlength=len(numbers))
        # Both numbers scatter: that of the mosaic, and that of the added galaxies which it is compared with.
        trust = added / np.maximum(added + numbers, 1) / len(compared)
        terms.append((design[inside], cells[inside], numbers, trust))

    def cost(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = 0.5 * theta @ penalty @ theta, penalty @ theta
        for rows, where, numbers, trust in terms:
            each = np.exp(np.minimum(rows @ theta, 30))
            expected = np.bincount(where, each, minlength=len(numbers)) + 1e-9
            value += (trust * (expected - numbers * np.log(expected))).sum()
            slope = slope + rows.T @ (each * (trust * (1 - numbers / expected))[where])
        return float(value), slope

    first = compared[0]
    level = np.log(max(first.numbers.sum(), 1) / np.sum(first.cells >= 0))
    begin = np.r_[np.full(parts[0].shape[1], level), np.zeros(design.shape[1] - parts[0].shape[1])]
    return np.asarray(minimize(cost, begin, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x)
