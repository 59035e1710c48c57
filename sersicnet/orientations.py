"""Orientations of stamps: the eight of a square, and answers that are averaged over four of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from sersicnet.schema import N_TARGETS, TARGETS, Inputs

QUARTER_TURNS = 0.05
"""Predicted error of a magnitude below which answers are averaged over four orientations.

There the deviations of a network are its own as much as the noise's: on F160W and HSC images, one answer of an
earlier `fovea` for a galaxy of S/N 500 differs from the next turn's by 0.4 sigma, and averages
scatter by 10 to 20 % less.
"""

LOG = np.flatnonzero([target.log for target in TARGETS])
COMPONENTS = slice(2 * N_TARGETS + 6, 2 * N_TARGETS + 8)
"""Columns of the components of the ellipticity among the answers of a network, see `sersicnet.networks.with_units`."""


def oriented(inputs: Inputs, which: np.ndarray) -> Inputs:
    """Inputs in the orientations numbered 0 to 7; those that are no images stay as they are."""
    return inputs.map(lambda field: _turned(field, which) if field.ndim > 2 else field)


def _turned(images: np.ndarray, which: np.ndarray) -> np.ndarray:
    out = np.empty_like(images)
    for turn in range(8):
        chosen = which == turn
        view = np.rot90(images[chosen], turn % 4, axes=(-2, -1))
        out[chosen] = view if turn < 4 else view[..., ::-1]
    return out


def turned(components: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Components of ellipticities, see `sersicnet.schema.orientation`, in the orientations of `oriented`, (N, 2)."""
    sign = 1 - 2 * (which % 2)  # a quarter turn changes the sign of both
    return components * np.column_stack([sign, np.where(which < 4, sign, -sign)])


def average(answer: Callable[[Inputs], np.ndarray], inputs: Inputs, out: np.ndarray, limit: float) -> None:
    """Average a network's answers for well-measured galaxies over four quarter turns, in place.

    A quarter turn of image and PSF changes the angle of a galaxy and nothing else, but the answer of a network
    changes a little: the average is nearer to the truth, and nearly the same however an image is turned.

    Parameters
    ----------
    answer : callable
        The network: of the inputs of M galaxies, (M, 17).
    inputs : Inputs
        Of N galaxies.
    out : ndarray, float, (N, 17)
        Its answers, see `sersicnet.networks.with_units`. Magnitudes, ellipticities, components, correlations and
        the logarithms of radii and indices are averaged, and errors, of the latter relative ones.
    limit : float
        Predicted error of the magnitude below which a galaxy's answers are averaged.
    """
    with np.errstate(invalid="ignore"):
        rows = np.flatnonzero(out[:, N_TARGETS] < limit)
    if not len(rows):
        return
    some, answers = inputs.taken(rows), [out[rows]]
    answers += [answer(some.map(partial(_quarters, turns=turns))).astype(float) for turns in (1, 2, 3)]
    for turns, each in enumerate(answers):
        each[:, COMPONENTS] *= 1 - 2 * (turns % 2)
        each[:, N_TARGETS + LOG] /= each[:, LOG]
        each[:, LOG] = np.log(each[:, LOG])
    mean = np.mean(answers, axis=0)
    mean[:, LOG] = np.exp(mean[:, LOG])
    mean[:, N_TARGETS + LOG] *= mean[:, LOG]
    out[rows] = mean


def _quarters(field: np.ndarray, turns: int) -> np.ndarray:
    return np.ascontiguousarray(np.rot90(field, turns, axes=(-2, -1))) if field.ndim > 2 else field
