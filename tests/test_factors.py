"""Factors on errors, which are smooth functions of what a catalogue lists."""

import numpy as np
import pytest

from sersicnet.catalogue import factors as fitting
from sersicnet.catalogue.factors import Curves, Factors, Found, angle_between, distances, quantities_of
from sersicnet.errors import InputError
from sersicnet.measuring.identity import METHOD

LOGS = np.array([False, True, True, False])


def found_galaxies(n=4000, seed=0):
    """Galaxies whose errors are half of what they should be where it is crowded, and biased where they are faint."""
    rng = np.random.default_rng(seed)
    mag, away = rng.uniform(20, 26, n), np.exp(rng.uniform(0, 4, n))
    truth = np.column_stack([mag, np.exp(rng.normal(1.5, 0.4, n)), np.exp(rng.normal(0.7, 0.4, n)),
                             rng.uniform(0.1, 0.8, n)])  # fmt: skip
    sigma = 0.02 * 10 ** (0.15 * (mag - 22))
    real = sigma * np.where(away < 8, 2.0, 1.0)
    off = rng.standard_normal((n, 4)) * real[:, None] + 0.1 * (mag[:, None] - 20) / 6
    predicted = np.where(LOGS, truth * np.exp(off), truth + off)
    errors = np.column_stack([np.where(LOGS, sigma[:, None] * predicted, sigma[:, None]), np.full(n, 2.0)])
    turned = rng.normal(0, 4, n)
    where = quantities_of(predicted, errors, 3 * away, 3.0)
    return Found(truth, predicted, turned, errors, where, np.ones(n))


def test_factors_hold_for_other_galaxies_in_every_bin_with_and_without_the_bias():
    found, other = found_galaxies(), found_galaxies(20_000, seed=1)
    factors = Factors.fitted(found, 3.0, {})
    away = 3 * np.exp(other.quantities[:, 0, 2])
    for debias in (False, True):
        values, errors = factors.applied(other.predicted, other.errors, away, debias=debias)
        inside = other._replace(predicted=values).pulls(errors) <= 1
        for where in other.quantities[:, 0, :3].T:
            bins = np.searchsorted(np.quantile(where, [0.25, 0.5, 0.75]), where)
            for k in range(4):
                assert inside[bins == k].mean(axis=0) == pytest.approx(0.6827, abs=0.06)
    assert np.median(errors[:, 4]) == pytest.approx(4, rel=0.1)
    assert np.abs(np.median(values - other.truth, axis=0)).max() < 0.02
    assert np.median(other.predicted[:, 0] - other.truth[:, 0]) > 0.03


def test_few_galaxies_with_right_errors_get_factors_near_one():
    one, normal = found_galaxies(300), np.random.default_rng(2).standard_normal((300, 4))
    errors = np.column_stack([np.where(LOGS, 0.05 * one.predicted, 0.05), one.errors[:, 4]])
    where = quantities_of(one.predicted, errors, np.full(300, 30.0), 3.0)
    right = one._replace(truth=one.predicted - errors[:, :4] * normal, errors=errors, quantities=where)
    factors = np.exp(Factors.fitted(right, 3.0, {}).errors.at(where))[:, :4]
    assert np.abs(np.log(factors)).mean() < 0.2


@pytest.mark.parametrize("seed", range(3))
def test_factors_of_a_thousand_galaxies_with_right_errors_are_not_chance(seed):
    """Curves of one stiffness for all galaxies changed errors that are right by 4 to 6 %."""
    one, rng = found_galaxies(1000, seed=seed), np.random.default_rng(2 + seed)
    errors = np.column_stack([np.where(LOGS, 0.05 * one.predicted, 0.05), one.errors[:, 4]])
    where = quantities_of(one.predicted, errors, rng.uniform(5, 60, 1000), 3.0)
    right = one._replace(
        truth=one.predicted - errors[:, :4] * rng.standard_normal((1000, 4)), errors=errors, quantities=where
    )
    assert np.abs(Factors.fitted(right, 3.0, {}).errors.at(where)[:, :4]).mean() < 0.04


def test_galaxies_count_by_their_weight():
    """Half of the galaxies have errors that are too small by 4; they alone have a weight."""
    one = found_galaxies(2000)
    turned = np.random.default_rng(3).standard_normal(2000) * np.where(np.arange(2000) % 2, 8.0, 2.0)
    for weighted, expected in ((1, 8.0), (0, 2.0)):
        weights = np.where(np.arange(2000) % 2 == weighted, 1.0, 1e-6)
        factors = Factors.fitted(one._replace(turned=turned, weights=weights), 3.0, {})
        errors = factors.applied(one.predicted, one.errors, np.full(2000, 30.0), debias=False)[1]
        assert np.median(errors[:, 4]) == pytest.approx(expected, rel=0.15)


def test_curves_are_constant_beyond_their_nodes_and_nan_without_a_value():
    nodes, values = (np.tile(np.array(pair), (2, 4, 1)) for pair in ([1.0, 2.0], [3.0, 5.0]))
    curves = Curves(np.array([0.0, 1.0]), nodes, values)
    quantities = np.stack([np.full((2, 4), value) for value in (0.0, 9.0, np.nan)])
    np.testing.assert_allclose(curves.at(quantities), [[12, 13], [20, 21], [np.nan, np.nan]])


def test_a_row_without_values_stays_nan_and_an_unknown_angle_has_its_usual_error():
    found = found_galaxies(200)
    factors = Factors.fitted(found._replace(turned=30 * found.turned), 3.0, {})
    predicted, errors = found.predicted.copy(), found.errors.copy()
    predicted[0], errors[0] = np.nan, np.nan
    values, after = factors.applied(predicted, errors, np.full(200, np.inf), debias=True)
    assert np.isnan(values[0]).all()
    assert np.isnan(after[0]).all()
    assert np.isfinite(after[1:]).all()
    assert after[1:, 4].max() <= 52


def test_a_validation_by_another_version_of_the_measurement_is_refused():
    factors = Factors.fitted(found_galaxies(200), 3.0, {"gain": 1.0, "version": "0.1.0"})
    with pytest.raises(InputError, match="is of another version of the measurement"):
        factors.check({"gain": 1.0, "version": "0.1.0", "method": METHOD})


def test_a_table_keeps_the_curves():
    factors = Factors.fitted(found_galaxies(200), 3.0, {})
    again = fitting._from_table(factors.table(), "after")
    for mine, theirs in zip(again, factors.errors_without_bias, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_the_next_source_of_a_single_one_is_infinitely_far():
    assert np.isinf(distances(np.array([1.0]), np.array([2.0])))[0]
    np.testing.assert_allclose(distances(np.array([0.0, 3.0, np.nan]), np.array([0.0, 4.0, 1.0])), [5, 5, np.inf])


def test_an_axis_has_no_direction():
    np.testing.assert_allclose(angle_between(np.array([89.0, -80.0, 10.0]), np.array([-89.0, 80.0, 4.0])), [-2, 20, 6])
