"""Further noise, which changes stamps from epoch to epoch."""

from __future__ import annotations

import numpy as np

from sersicnet.engine.noise import correlated_noise
from sersicnet.schema import STAMP_SIZE, Inputs
from sersicnet.training.joined import Source

AUTOCORRELATION_STAMPS = 256
"""Stamps that the correlation of the noise is measured on."""


NOISE_FIELD = 512
"""Side of the piece of noise that a batch takes its noise from, in pixels."""


def noise_correlation(source: Source, is_real: bool) -> np.ndarray:
    """Autocorrelation of the noise of the simulated, or the real, stamps of a source.

    The median over the corners, 32 pixels wide, of the faintest stamps.

    Parameters
    ----------
    source : Dataset, Arrays or Joined
    is_real : bool
        Which stamps.

    Returns
    -------
    ndarray, float64, (7, 7)
        1 in the middle; lags along y and x up to three pixels.
    """
    rows = np.flatnonzero(source.is_real == is_real)
    faintest = np.argsort(np.nan_to_num(source.targets[rows, 0], nan=-np.inf), kind="stable")[-AUTOCORRELATION_STAMPS:]
    side, last = STAMP_SIZE // 4, STAMP_SIZE - STAMP_SIZE // 4
    corners = []
    for row in np.sort(rows[faintest]).tolist():
        ((inputs, _),) = source.batches(1, row, row + 1)
        corners += [inputs.stamps[0, y : y + side, x : x + side] for y in (0, last) for x in (0, last)]
    pieces = np.array(corners, float)
    pieces -= pieces.mean(axis=(1, 2), keepdims=True)
    found = np.empty((len(pieces), 7, 7))
    for dy in range(4):
        for dx in range(-3, 4):
            left, right = max(0, -dx), side - max(0, dx)
            product = pieces[:, dy:, left + dx : right + dx] * pieces[:, : side - dy, left:right]
            found[:, 3 + dy, 3 + dx] = found[:, 3 - dy, 3 - dx] = product.mean(axis=(1, 2))
    found /= found[:, 3:4, 3:4]
    return np.median(found, axis=0)


def deepened(
    inputs: Inputs, factors: np.ndarray, correlation: np.ndarray, rng: np.random.Generator
) -> tuple[Inputs, np.ndarray]:
    """Galaxies with more noise, as a shallower image shows them.

    In units of the new noise, stamps are ``(stamp + f noise) / sqrt(1 + f^2)``. More electrons make a flux equal to
    the new rms.

    Parameters
    ----------
    inputs : Inputs
        Of N galaxies.
    factors : ndarray, float, (N,)
        f, the rms of the noise that is added over that of the noise there is.
    correlation : ndarray, float, (7, 7)
        Autocorrelation of the noise.
    rng : numpy Generator

    Returns
    -------
    inputs : Inputs
    fainter : ndarray, float64, (N,)
        What is to be added to relative magnitudes.
    """
    noise = correlated_noise(rng, NOISE_FIELD, correlation)
    noise /= noise.std()
    corners = rng.integers(NOISE_FIELD - STAMP_SIZE + 1, size=(inputs.n, 2))
    total = np.sqrt(1 + np.square(factors))
    out = inputs.stamps / total.astype(np.float32)[:, None, None]
    for stamp, share, (y, x) in zip(out, factors / total, corners, strict=True):
        stamp += np.float32(share) * noise[y : y + STAMP_SIZE, x : x + STAMP_SIZE]
    numbers = inputs.noise
    if numbers is not None:  # the electrons, where they are known
        numbers = numbers.copy()
        numbers[:, 1] += numbers[:, 2] * np.log10(total)
    return inputs._replace(stamps=out, noise=numbers), 2.5 * np.log10(total)
