"""Forced photometry: fluxes of galaxies whose positions and shapes are known, by a linear solve.

With positions and shapes fixed, the model of a window is a sum of known images: one for the galaxy, one for each of
its neighbours and a constant for the sky. Their amplitudes are solved together, on residuals that are whitened as in
`sersicnet.engine.fit`. A flux may be negative. The Poisson noise of the galaxies is that of the model, so the solve is
repeated with the weights of its first result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from scipy import linalg
from scipy.spatial import KDTree
from threadpoolctl import threadpool_limits

from sersicnet.engine.fit import WINDOWS, Fitter, Noise, Status
from sersicnet.engine.render import N_RANGE
from sersicnet.engine.whitening import Cutout, Frame
from sersicnet.schema import STAMP_SIZE

LEAST_WINDOW = 64
"""Minimum side of a window, pixels: a smaller one constrains the sky too weakly."""

RADII = 3.0
"""A window contains a galaxy out to this many effective radii."""

NEIGHBOUR_RADII = 5.0
"""A neighbour is solved for if a circle of this many of its effective radii reaches the window."""

MARGIN = 8.0
"""Margin of both, for the PSF and for pixels that whitening loses at the edge, pixels."""

_SAME = 1e6
"""Growth of a variance by neighbours beyond which galaxies are too much alike to be told apart."""

_PASSES = 3
"""Solves of a window with Poisson noise: with the weights of the sky, and of the model before."""


class Fluxes(NamedTuple):
    """Results of forced photometry, one row per galaxy; NaN for galaxies that were not solved for.

    Attributes
    ----------
    flux, error : ndarray, float64, (N,)
        Total flux with its sign, and its 1 sigma error, marginalised over the sky and the neighbours; image units.
    sky : ndarray, float64, (N,)
        Sky level under the galaxy, image units.
    chi2 : ndarray, float64, (N,)
        Reduced chi-square of the whitened residuals.
    status : ndarray, int, (N,)
        Values of `sersicnet.engine.fit.Status`: CONVERGED, NO_DATA, BAD_START where a parameter cannot be drawn, or
        NOT_CONVERGED where galaxies are too much alike to be told apart.
    """

    flux: np.ndarray
    error: np.ndarray
    sky: np.ndarray
    chi2: np.ndarray
    status: np.ndarray


def window_side(r_eff: float) -> int:
    """Side of the window in which a galaxy is solved for: the smallest one that contains it, pixels."""
    needed = max(LEAST_WINDOW, 2 * (RADII * r_eff + MARGIN) + 1)
    return next((side for side in WINDOWS if side >= needed), STAMP_SIZE)


def reaching(x: np.ndarray, y: np.ndarray, r_eff: np.ndarray, side: float) -> np.ndarray:
    """Whether neighbours reach a window, bool, (M,).

    Parameters
    ----------
    x, y : ndarray, float, (M,)
        Their distances from the middle of the window, pixels.
    r_eff : ndarray, float, (M,)
        Their effective radii, pixels.
    side : float
        Side of the window, pixels.
    """
    return np.maximum(np.abs(x), np.abs(y)) < side / 2 + NEIGHBOUR_RADII * r_eff + MARGIN


def neighbours(galaxies: np.ndarray, which: np.ndarray, reach: float) -> list[np.ndarray]:
    """The galaxies whose light reaches the window of each of `which`: arrays of indices.

    Parameters
    ----------
    galaxies : ndarray, float, (N, 7)
        Those that cannot be drawn are no neighbours. A galaxy that is listed twice is one: two fluxes of one model
        have no solution.
    which : ndarray, int, (K,)
    reach : float
        Maximum distance of a neighbour, pixels.
    """
    good, models = np.flatnonzero(drawable(galaxies)), np.delete(galaxies, 2, axis=1)
    tree = KDTree(galaxies[good, :2])
    out = []
    for i in which.tolist():
        found = np.sort(good[tree.query_ball_point(galaxies[i, :2], reach)])
        found = found[np.sort(np.unique(models[found], axis=0, return_index=True)[1])]
        found = found[(models[found] != models[i]).any(axis=1)]
        away = galaxies[found] - galaxies[i]
        out.append(found[reaching(away[:, 0], away[:, 1], galaxies[found, 3], window_side(galaxies[i, 3]))])
    return out


def fluxes(
    fitter: Fitter,
    stamps: np.ndarray,
    rms: np.ndarray,
    galaxies: np.ndarray,
    masks: np.ndarray,
    others: Sequence[np.ndarray],
    *,
    workers: int = 1,
    report: Callable[[int], None] = lambda done: None,
) -> Fluxes:
    """Measure the fluxes of galaxies with known positions and shapes.

    Parameters
    ----------
    fitter : Fitter
        Gives PSF, noise and windows; its prior is not used.
    stamps, rms, masks, workers, report
        As for `sersicnet.engine.fit.Fitter.__call__`.
    galaxies : ndarray, float, (N, 7)
        Parameters of `sersicnet.engine.render.Renderer` in pixels of the stamps; fluxes are ignored.
    others : sequence of ndarray, float, (M, 7)
        Parameters of the neighbours of each galaxy, whose fluxes are solved for together with the galaxy's and
        discarded. A neighbour that cannot be drawn is left out.

    Returns
    -------
    Fluxes
    """
    n = len(stamps)
    nothing = np.full((4, n), np.nan)
    out = Fluxes(nothing[0], nothing[1], nothing[2], nothing[3], np.full(n, int(Status.NO_DATA)))

    good = drawable(galaxies)

    def one(i: int) -> None:
        if not good[i]:
            out.status[i] = Status.BAD_START
            return
        side = window_side(galaxies[i, 3])
        frame = next((f for f in fitter.frames if f.size >= side), fitter.frames[-1])
        inner = slice((fitter.size - frame.size) // 2, (fitter.size + frame.size) // 2)
        noise = rms[i][inner, inner] if np.ndim(rms[i]) else rms[i]
        data, noise, used = fitter.prepared(stamps[i][inner, inner], noise, masks[i][inner, inner])
        near = np.vstack([galaxies[i], others[i][drawable(others[i])]])
        near[:, :2] -= inner.start
        middle = (frame.size - 1) / 2
        reach = reaching(near[:, 0] - middle, near[:, 1] - middle, near[:, 3], frame.size)
        reach[0] = True
        if np.count_nonzero(used) < 10 * (np.count_nonzero(reach) + 1):
            return
        unit = float(np.mean(noise, where=used))
        cutout = Cutout.of(data, noise, used, unit, fitter.noise.correlation.size > 1)
        found = _solved(frame, cutout, near[reach], fitter.noise)
        if found is None:
            out.status[i] = Status.NOT_CONVERGED
            return
        out.status[i] = Status.CONVERGED
        out.flux[i], out.error[i] = found.amplitudes[0] * fitter.unit, found.error * fitter.unit
        out.sky[i], out.chi2[i] = found.amplitudes[-1] * unit * fitter.unit, found.chi2

    # BLAS uses one thread in each of the threads: more would only wait for each other.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(max(1, workers)) as pool:
        for done, _ in enumerate(pool.map(one, range(n)), start=1):
            report(done)
    return out


def drawable(galaxies: np.ndarray) -> np.ndarray:
    """Whether all parameters but the flux are finite and within the range of the renderer, bool, (N,)."""
    x, y, _, r_eff, n, q, angle = np.asarray(galaxies, float).T
    finite = np.isfinite(x + y + r_eff + angle)
    with np.errstate(invalid="ignore"):
        return finite & (r_eff > 0) & (n >= N_RANGE[0]) & (n <= N_RANGE[1]) & (q > 0) & (q <= 1)


class _Solved(NamedTuple):
    """Amplitudes of one window: the galaxies' fluxes, and the sky in units of its rms last; the error of the first."""

    amplitudes: np.ndarray
    error: float
    chi2: float


def _solved(frame: Frame, cutout: Cutout, galaxies: np.ndarray, noise: Noise) -> _Solved | None:
    """Solve for the fluxes of all galaxies in a window; None if they cannot be told apart."""
    unit = galaxies.copy()
    unit[:, 2] = 1.0
    models = frame.render(unit)
    sky = np.full((1, frame.size, frame.size), cutout.unit, np.float32)
    data, *design = cutout.whitened(frame, np.concatenate([cutout.data[None], models, sky])).astype(float)
    columns = np.array(design)
    white_variance = float(np.sum(noise.correlation)) * cutout.rms.astype(float) ** 2  # before the kernel
    weight, more_noise = np.ones(len(data)), bool(np.isfinite(noise.gain) or noise.model_error > 0)
    for _ in range(_PASSES if more_noise else 1):
        normal = (columns * weight) @ columns.T
        normal[-1, -1] += noise.sky**-2
        scale = np.sqrt(np.maximum(np.diag(normal), 1e-300))
        normal /= scale * scale[:, None]
        try:
            inverse = linalg.inv(normal, check_finite=False)
        except linalg.LinAlgError:
            return None
        if not np.abs(inverse).max() < _SAME:
            return None
        amplitudes = inverse @ (columns @ (weight * data) / scale) / scale
        chi2 = float(weight @ (data - amplitudes @ columns) ** 2)
        light = np.maximum(np.tensordot(amplitudes[:-1], models, 1), 0)
        weight = 1 / (1 + light * (1 / noise.gain + noise.model_error**2 * light) / white_variance).ravel()
    pixels = float(cutout.counted.sum())
    return _Solved(amplitudes, float(np.sqrt(inverse[0, 0]) / scale[0]), chi2 / max(1.0, pixels - len(columns)))
