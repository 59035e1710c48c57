"""How many galaxies of a mosaic each added galaxy stands for."""

import numpy as np
import pytest

from sersicnet.catalogue.weighting import weights_of
from sersicnet.schema import decode, encode


def measured(truth, seed):
    """Parameters with errors that grow where it is faint; the faintest are not found."""
    rng = np.random.default_rng(seed)
    error = 0.03 * 10 ** (0.2 * (truth[:, :1] - 22)) * [1.0, 1.0, 1.0, 0.3]
    out = decode(encode(truth) + error * rng.standard_normal(truth.shape))
    out[rng.uniform(size=len(truth)) < 1 / (1 + np.exp(-4 * (truth[:, 0] - 26)))] = np.nan
    return out


def galaxies(mag, seed, ellipticity=(0.1, 0.8)):
    rng, n = np.random.default_rng(seed), len(mag)
    shapes = [np.exp(rng.normal(1.4, 0.5, n)), np.exp(rng.normal(0.4, 0.5, n)), rng.uniform(*ellipticity, n)]
    return np.column_stack([mag, *shapes])


def test_evenly_added_galaxies_get_the_counts_of_the_mosaic():
    rng = np.random.default_rng(0)
    truth = galaxies(rng.uniform(20, 27, 2000), 1)
    counts = 27 + np.log(rng.uniform(0, 1, 40000)) / np.log(10) / 0.3  # ten times as many every 3.3 mag
    own = measured(galaxies(counts[counts > 20], 2), 3)
    weights = weights_of(truth, measured(truth, 4), own, np.empty((0, 4)))
    bright, faint = (weights[(truth[:, 0] > low) & (truth[:, 0] < low + 0.5)].mean() for low in (22.0, 25.0))
    assert np.log10(faint / bright) == pytest.approx(0.9, abs=0.15)
    large, small = (weights[chosen].mean() for chosen in (truth[:, 1] > 4, truth[:, 1] < 4))
    assert large / small == pytest.approx(1, abs=0.25)


def test_galaxies_of_other_sizes_are_weighed_down():
    rng = np.random.default_rng(5)
    truth = galaxies(rng.uniform(20, 25, 2000), 6)
    own = galaxies(rng.uniform(20, 25, 5000), 7)
    own[:, 1] = np.exp(rng.normal(1.0, 0.4, 5000))
    weights = weights_of(truth, measured(truth, 8), measured(own, 9), np.empty((0, 4)))
    average = np.average(np.log(truth[:, 1]), weights=weights)
    assert average == pytest.approx(1.0, abs=0.1)


def test_rounder_galaxies_get_more_weight_where_the_mosaic_has_them():
    rng = np.random.default_rng(5)
    truth = galaxies(rng.uniform(20, 25, 2000), 6)
    own = galaxies(rng.uniform(20, 25, 5000), 7, ellipticity=(0.0, 0.5))
    weights = weights_of(truth, measured(truth, 8), measured(own, 9), np.empty((0, 4)))
    assert truth[:, 3].mean() == pytest.approx(0.45, abs=0.02)
    assert np.average(truth[:, 3], weights=weights) == pytest.approx(0.27, abs=0.04)


def test_detections_of_noise_are_taken_off():
    rng = np.random.default_rng(10)
    truth = galaxies(rng.uniform(20, 26, 2000), 11)
    own = measured(galaxies(rng.uniform(20, 26, 4000), 12), 13)
    noise = galaxies(rng.normal(25, 0.2, 2000), 16)
    got = [
        weights_of(truth, measured(truth, 14), np.vstack([own, noise]), known) for known in (noise, np.empty((0, 4)))
    ]
    near = np.abs(truth[:, 0] - 25) < 0.3
    right, wrong = (weights[near].mean() / weights[truth[:, 0] < 24].mean() for weights in got)
    assert right == pytest.approx(1, abs=0.2)
    assert wrong > 1.35


def test_few_galaxies_give_no_weights():
    truth = galaxies(np.linspace(20, 25, 100), 15)
    np.testing.assert_array_equal(weights_of(truth, truth, truth, np.empty((0, 4))), 1)
