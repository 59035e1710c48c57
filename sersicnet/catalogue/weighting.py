"""How many galaxies of a mosaic each added galaxy stands for.

Added galaxies are spread evenly over magnitudes, and those of a mosaic are not: far more faint galaxies than bright
ones are scattered into a bin of the measured magnitude. True magnitudes and radii of the mosaic's own galaxies are not
known, but what is measured of the added ones shows how truth is scattered. The weights are those smooth functions of
the true magnitude and radius that make the added galaxies, as they are measured, as numerous as the mosaic's own.
"""

from __future__ import annotations

import numpy as np

from sersicnet.catalogue.factors import hats

LEAST_OWN = 200
"""Galaxies of the mosaic that are needed for weights; with fewer, all weights are 1."""

MAG_STEP, MAG_CELL, SIZE_CELLS = 0.5, 0.25, 4
"""Distance of the nodes of the weights, and width of the cells in which numbers are compared, mag; and cells of the
radius, with as many galaxies of the mosaic in each."""

SIZE_NODES = (0.02, 0.3, 0.7, 0.98)
"""Nodes of the weights in radius: these fractions of the added galaxies are smaller."""

STIFFNESS = 3.0
"""Penalty on the second differences of the logarithm of the weights."""


def weights_of(truth: np.ndarray, measured: np.ndarray, own: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Weights of the added galaxies.

    Parameters
    ----------
    truth : ndarray, float64, (N, 2)
        Magnitude and effective radius [pix] of the added galaxies.
    measured : ndarray, float64, (N, 2)
        The same as measured; NaN for a galaxy that was not found, or does not count.
    own, negative : ndarray, float64, (M, 2) and (K, 2)
        The same of the mosaic's own galaxies, and of the detections of its negative.

    Returns
    -------
    ndarray, float64, (N,)
        Galaxies of the mosaic for each added one. 1 if the mosaic has too few, or if none of the added ones was found.
    """
    hit = np.isfinite(measured).all(axis=1)
    own, negative = (values[np.isfinite(values).all(axis=1)] for values in (own, negative))
    if len(own) < LEAST_OWN or hit.sum() < 2 * SIZE_CELLS:
        return np.ones(len(truth))
    low, high = np.quantile(measured[hit, 0], [0.005, 0.995])
    bright, faint = truth[:, 0].min(), truth[:, 0].max()
    mags = np.linspace(bright, faint, max(2, round((faint - bright) / MAG_STEP) + 1))
    sizes = np.quantile(np.log(truth[:, 1]), SIZE_NODES) + 1e-6 * np.arange(len(SIZE_NODES))
    design = np.column_stack([hats(truth[:, 0], mags), hats(np.log(truth[:, 1]), sizes)])
    edges = (
        np.linspace(low, high, max(2, round((high - low) / MAG_CELL) + 1)),
        np.quantile(own[:, 1], np.linspace(0, 1, SIZE_CELLS + 1)) * [0, *[1] * (SIZE_CELLS - 1), np.inf],
    )
    numbers = _counted(own, edges) - _counted(negative, edges)
    return np.exp(design @ _fitted(design[hit], _cells(measured[hit], edges), np.maximum(numbers, 0), len(mags)))


def _counted(values: np.ndarray, edges: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Numbers in the cells of magnitude and radius, one after the other."""
    cells = _cells(values, edges)
    return np.bincount(cells[cells >= 0], minlength=(len(edges[0]) - 1) * SIZE_CELLS).astype(float)


def _cells(values: np.ndarray, edges: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The cell of each galaxy; -1 beyond the edges."""
    mag, size = (np.searchsorted(own, one, side="right") - 1 for own, one in zip(edges, values.T, strict=True))
    inside = (mag >= 0) & (mag < len(edges[0]) - 1) & (size >= 0) & (size < SIZE_CELLS)
    return np.where(inside, mag * SIZE_CELLS + size, -1)


def _fitted(design: np.ndarray, cells: np.ndarray, numbers: np.ndarray, mags: int) -> np.ndarray:
    """Coefficients of the logarithm of the weights, by penalised maximum likelihood of the numbers in the cells."""
    from scipy.optimize import minimize

    added = np.bincount(cells[cells >= 0], minlength=len(numbers))
    used = added > 0
    # Both numbers scatter: that of the mosaic, and that of the added galaxies which it is compared with.
    trust = np.where(used, added / np.maximum(added + numbers, 1), 0)
    inside = cells >= 0
    rows, where = design[inside], cells[inside]
    penalty = np.zeros((design.shape[1],) * 2)
    for start, stop in ((0, mags), (mags, design.shape[1])):
        second = np.diff(np.eye(stop - start), 2, axis=0)
        penalty[start:stop, start:stop] = STIFFNESS * second.T @ second + 0.01 * np.eye(stop - start)

    def cost(theta: np.ndarray) -> tuple[float, np.ndarray]:
        each = np.exp(np.minimum(rows @ theta, 30))
        expected = np.bincount(where, each, minlength=len(numbers)) + 1e-9
        slope = trust * (1 - numbers / expected)
        value = (trust * (expected - numbers * np.log(expected)))[used].sum() + 0.5 * theta @ penalty @ theta
        return float(value), rows.T @ (each * slope[where]) + penalty @ theta

    level = np.log(max(numbers[used].sum(), 1) / len(rows))
    start = np.r_[np.full(mags, level), np.zeros(design.shape[1] - mags)]
    return np.asarray(minimize(cost, start, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x)
