"""Calibrated errors: as many truths within one error for bright and faint, small and large galaxies."""

import numpy as np
import pytest
from astropy.convolution import Gaussian2DKernel

from sersicnet import calibration
from sersicnet.image.views import psf_views
from sersicnet.schema import Inputs, decode, encode, noise_numbers, pulls


def answers(n, seed=0):
    """Answers and true values; the size of the deviations depends on magnitude and radius, the errors are constant."""
    rng = np.random.default_rng(seed)
    truth = np.column_stack(
        [rng.uniform(-14, -4, n), rng.uniform(1, 30, n), rng.uniform(0.5, 6, n), rng.uniform(0, 0.8, n)]
    )
    orientation = rng.uniform(-0.4, 0.4, (n, 2))
    size = np.exp(0.05 * (truth[:, 0] + 9) + 0.02 * (truth[:, 1] - 15))[:, None]
    unit = np.tile([0.05, 0.0, 0.0, 0.02], (n, 1))
    values = truth + unit * size * rng.standard_normal((n, 4))
    values[:, 1:3] = (truth * np.exp(0.05 * size * rng.standard_normal((n, 4))))[:, 1:3]
    unit[:, 1:3] = 0.05 * values[:, 1:3]
    components = orientation + 0.03 * size * rng.standard_normal((n, 2))
    out = np.column_stack([values, unit, np.zeros((n, 6)), components, np.full(n, 0.03)])
    return out, truth, orientation


def within(table, out, truth, which, seen=None, sigma=1.0):
    found = calibration.calibrated(table, out, seen)
    return (np.abs(pulls(found[:, :4], found[:, 4:8], truth)) < sigma)[which].mean(axis=0)


def factors(table, out, seen=None):
    """By how much errors grow, those of radius and index as errors of logarithms; of the targets and the angle."""
    found = calibration.calibrated(table, out, seen)
    grown = found[:, 4:8] / out[:, 4:8]
    grown[:, 1:3] *= out[:, 1:3] / found[:, 1:3]
    return np.column_stack([grown, found[:, 16] / out[:, 16]]) if out.shape[1] > 8 else grown


def test_as_many_truths_are_within_one_error_for_all_kinds_of_galaxies():
    table = calibration.fitted(*answers(20_000))
    out, truth, _ = answers(20_000, seed=1)
    for which in (truth[:, 0] < -11, truth[:, 0] > -7, truth[:, 1] < 8, truth[:, 1] > 22):
        assert np.abs(within(None, out, truth, which) - 0.6827).max() > 0.04
        assert within(table, out, truth, which) == pytest.approx([0.6827] * 4, abs=0.025)


def test_large_errors_of_radius_and_index_are_those_of_their_logarithms():
    """As quantiles and correlations take them: truths from v exp(-s / v) to v exp(s / v) are within 1 sigma."""
    rng = np.random.default_rng(3)
    truth = np.column_stack([np.zeros(4000), *np.exp(rng.normal(1, 0.8, (2, 4000))), np.full(4000, 0.5)])
    out = np.column_stack([truth, np.full((4000, 4), 0.1)])
    out[:, 1:3] = np.exp(1.0)
    out[:, 5:7] = 0.4 * np.exp(1.0)
    out[:, [0, 3]] += 0.1 * rng.standard_normal((4000, 2))
    found = factors(calibration.fitted(out, truth), out)
    assert found[:, 1:3].mean(axis=0) == pytest.approx([2, 2], rel=0.05)


def across(orientation, out, factor=1.5):
    """The answers with components that are farther off across the direction of the ellipticity than along it."""
    out, unit = out.copy(), orientation / np.hypot(*orientation.T)[:, None]
    off = out[:, 14:16] - orientation
    along = (off * unit).sum(axis=1, keepdims=True) * unit
    out[:, 14:16] = orientation + along + factor * (off - along)
    return out


def test_the_error_of_the_angle_is_calibrated():
    """Not that of the components, whose errors along the direction of the ellipticity do not turn it."""
    (out, truth, orientation), (others, true, turned) = answers(20_000), answers(20_000, seed=1)
    table = calibration.fitted(across(orientation, out), truth, orientation)
    others = across(turned, others)
    length = np.hypot(*others[:, 14:16].T)
    sigma = calibration.calibrated(table, others)[:, 16] / length
    off = np.arctan2(*others[:, 15:13:-1].T) - np.arctan2(*turned[:, ::-1].T)
    off = np.abs((off + np.pi) % (2 * np.pi) - np.pi)
    for which in (true[:, 0] < -11, true[:, 0] > -7):
        assert (off < sigma)[which & (length > 0.1)].mean() == pytest.approx(0.6827, abs=0.025)


def test_an_unknown_orientation_leaves_its_errors_as_they_are():
    out, truth, orientation = answers(2000)
    table = calibration.fitted(out, truth, np.where(orientation > 0.3, np.nan, orientation))
    assert np.all(factors(table, out)[:, 4] == 1)


def test_few_galaxies_give_a_calibration_and_fewer_none():
    out, truth, orientation = answers(700)
    others, true, _ = answers(5000, seed=1)
    everywhere = np.ones(len(true), bool)
    found = within(calibration.fitted(out, truth, orientation), others, true, everywhere)
    assert found == pytest.approx([0.6827] * 4, abs=0.06)
    assert calibration.fitted(out[:500], truth[:500], orientation[:500]) is None
    np.testing.assert_array_equal(calibration.calibrated(None, out), out)


def test_factors_stay_in_their_range_far_from_the_galaxies_that_gave_them():
    out, truth, orientation = answers(5000)
    table = calibration.fitted(out, truth, orientation)
    far = out.copy()
    far[:, 0], far[:, 1], far[:, 4:8] = 30.0, 1e5, 1e6
    low, high = np.exp(table["range"])
    found = factors(table, far)
    assert np.all((found >= 0.999 * low) & (found <= 1.001 * high))
    moved = -(encode(calibration.calibrated(table, far)[:, :4]) - encode(far[:, :4]))
    moved /= np.exp(table["domain"][1][4:8])  # in units of the largest errors that it was made with
    low, high = np.array(table["shift_range"])[:, :3]
    assert np.all((moved[:, :3] >= low - 1e-6) & (moved[:, :3] <= high + 1e-6))
    assert np.all(calibration.calibrated(table, far)[:, 3] >= np.minimum(far[:, 3], 0))
    far[0] = np.nan
    assert np.isnan(calibration.calibrated(table, far)[0]).all()


def test_tables_by_magnitude_of_earlier_weights_count():
    out, _, _ = answers(3)
    out[:, 0] = [-20, -9, 0]
    table = {"mag": [-10.0, -8.0], "factors": [[1.0] * 4, [2.0] * 4], "orientation": [1.0, 3.0]}
    assert factors(table, out) == pytest.approx(np.array([[1.0] * 5, [*[1.5] * 4, 2], [*[2.0] * 4, 3]]))


def test_eight_numbers_of_an_answer_are_enough():
    out, truth, _ = answers(2000)
    table = calibration.fitted(out[:, :8], truth)
    found = calibration.calibrated(table, out[:, :8])
    assert found == pytest.approx(calibration.calibrated(table, out)[:, :8])


def test_factors_depend_on_what_the_network_saw_of_the_image():
    """Through the wider PSF, the deviations are twice as large as through the narrower one, and the answers alike."""
    views = np.array([psf_views(Gaussian2DKernel(width, x_size=41, y_size=41).array) for width in (1.0, 3.0)])

    def through_both(seed):
        out, truth, _ = answers(8_000, seed)
        wide = np.random.default_rng([seed, 1]).random(len(out)) < 0.5
        off = np.where(wide, 2, 1)[:, None] * (encode(out[:, :4]) - encode(truth))
        out[:, :4] = decode(encode(truth) + off)
        out[:, 5:7] = 0.05 * out[:, 1:3]
        inputs = Inputs(np.empty((len(out), 0)), views[wide.astype(int)], np.zeros((len(out), 3)))
        return out, truth, wide, calibration.conditions(inputs, {"stamps", "psf", "noise"})

    out, truth, _, seen = through_both(0)
    others, true, wide, theirs = through_both(1)
    blind, table = calibration.fitted(out, truth), calibration.fitted(out, truth, seen=seen)
    for which in (wide, ~wide):
        assert np.abs(within(blind, others, true, which) - 0.6827).min() > 0.05
        assert within(table, others, true, which, theirs) == pytest.approx([0.6827] * 4, abs=0.025)
    calibration.check(table, ["noise", "psf", "stamps"])
    with pytest.raises(ValueError, match="the domain of its calibration has 2 x 8 numbers"):
        calibration.check(table, ["stamps"])


def test_a_psf_counts_by_its_noise_equivalent_area_and_its_light_near_the_centre():
    """4 pi sigma^2 of a Gaussian, with the variance of a pixel in it; one PSF counts for all galaxies.

    Light under exp(-r^2 / (16 pi sigma^2)), of a Gaussian of sigma: 8 pi / (1 + 8 pi).
    """
    views = psf_views(Gaussian2DKernel(2.0, x_size=61, y_size=61, mode="oversample").array)
    inputs = Inputs(np.empty((3, 0)), views[None], noise_numbers(np.full(3, 1.5), 100.0))
    seen = calibration.conditions(inputs, {"stamps", "psf", "noise"})
    assert np.exp(seen[:, 0]) == pytest.approx([4 * np.pi * (2.0**2 + 1 / 12)] * 3, rel=1e-3)
    assert seen[:, 1:4] == pytest.approx(np.tile([np.log(1.5), 2, 1], (3, 1)))
    assert seen[:, 4] == pytest.approx([8 * np.pi / (1 + 8 * np.pi)] * 3, rel=3e-3)
    assert calibration.conditions(inputs, {"stamps"}).shape == (3, 0)


def test_what_all_galaxies_share_has_no_effect_on_others():
    """A set through one PSF says nothing of other widths: they must not change the factors."""
    out, truth, orientation = answers(3000)
    seen = np.tile([4.09, 0.79, 1.0, 1.0, 0.9], (len(out), 1))
    table = calibration.fitted(out, truth, orientation, seen)
    expected = factors(table, out, seen)
    for shift in ([0.001, 0.001, 0, 0, 0.001], [0.3, -0.3, -1, -1, 0.1]):
        np.testing.assert_allclose(factors(table, out, seen + shift), expected, rtol=1e-3)


def test_a_psf_without_light_gives_numbers():
    inputs = Inputs(np.empty((2, 0)), np.zeros((2, 4, 32, 32)), np.zeros((2, 3)))
    assert np.isfinite(calibration.conditions(inputs, {"stamps", "psf", "noise"})).all()


def test_calibrations_of_earlier_versions_move_nothing_and_depend_on_what_they_did():
    """On the answer alone, and on the answer, the width of the PSF and the noise."""
    out, truth, _ = answers(2000)
    seen = np.random.default_rng(0).normal(size=(len(out), 5))
    for numbers in (8, 12):
        table = calibration.fitted(out, truth, seen=seen[:, : numbers - 8])
        del table["shifts"], table["shift_range"]
        calibration.check(table, ["noise", "psf", "stamps"])
        found = calibration.calibrated(table, out, seen)
        np.testing.assert_array_equal(found[:, :4], out[:, :4])
        np.testing.assert_array_equal(found, calibration.calibrated(table, out, seen[:, : numbers - 8]))


def test_half_of_the_truths_are_above_the_answers_also_where_deviations_are_skew():
    """Radii of bright galaxies are too large by half an error, and most ellipticities are too small."""

    def skewed(seed):
        out, truth, orientation = answers(12_000, seed)
        rng = np.random.default_rng([seed, 1])
        out[:, 1] *= np.exp(0.025 * (truth[:, 0] < -9))
        out[:, 3] = truth[:, 3] + 0.03 * (rng.exponential(size=len(out)) - 1)
        out[:, 5] = 0.05 * out[:, 1]
        return out, truth, orientation

    (out, truth, orientation), (others, true, _) = skewed(0), skewed(1)
    found = calibration.calibrated(calibration.fitted(out, truth, orientation), others)
    for which in (true[:, 0] < -11, true[:, 0] > -7):
        assert (found[which, :4] > true[which]).mean(axis=0) == pytest.approx([0.5] * 4, abs=0.035)
    assert (others[:, 3] > true[:, 3]).mean() < 0.4
    # Correlations and components are those of the network.
    np.testing.assert_array_equal(found[:, 8:16], others[:, 8:16])


def test_deviations_with_long_tails_have_errors_between_those_of_both_levels():
    """Student's t with three degrees of freedom: 68 % are within 1.20 of its units, 95 % within 3.18 = 1.96 x 1.62."""
    rng = np.random.default_rng(5)
    out, truth, _ = answers(15_000)
    out[:, 0] = truth[:, 0] + 0.05 * rng.standard_t(3, len(out))
    table = calibration.fitted(out, truth)
    assert 1.25 < np.median(factors(table, out)[:, 0]) < 1.55
    everywhere = np.ones(len(out), bool)
    assert 0.6827 < within(table, out, truth, everywhere)[0] < 0.76
    assert 0.9 < within(table, out, truth, everywhere, sigma=1.96)[0] < 0.95
    assert within(table, out, truth, everywhere, sigma=1.96)[1] == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize("key", ["shifts", "shift_range"])
def test_a_calibration_with_other_shifts_is_refused(key):
    out, truth, _ = answers(1000)
    table = calibration.fitted(out, truth)
    with pytest.raises(ValueError, match=f"the {key} of its calibration has"):
        calibration.check(table | {key: table[key][:-1]}, ["stamps"])
    with pytest.raises(ValueError, match="the shift_range of its calibration is within 10 of 0"):
        calibration.check(table | {"shift_range": [[-99.0] * 4, [99.0] * 4]}, ["stamps"])
    with pytest.raises(KeyError):
        calibration.check({name: value for name, value in table.items() if name != "shift_range"}, ["stamps"])


def test_few_galaxies_do_not_make_answers_worse():
    """Polynomials that follow the chance of 700 galaxies would: by 2 % with the ridge of the factors alone."""
    worse = []
    for seed in range(4):
        out, truth, orientation = answers(700, seed)
        seen = np.random.default_rng(seed).normal(size=(len(out), 5))
        table = calibration.fitted(out, truth, orientation, seen)
        others, true, _ = answers(5000, seed=10 + seed)
        found = calibration.calibrated(table, others, np.random.default_rng(99).normal(size=(len(others), 5)))
        off = [np.abs(encode(values[:, :4]) - encode(true)).mean(axis=0) for values in (found, others)]
        worse.append(off[0] / off[1])
    assert np.mean(worse) < 1.005


def test_galaxies_without_finite_values_do_not_count_and_odd_ones_change_little():
    out, truth, orientation = answers(2000)
    expected = calibration.calibrated(calibration.fitted(out, truth, orientation), out)
    out[0, 1], truth[1, 0], out[2, 4], truth[3, 1], out[4, 16] = np.inf, np.nan, 0.0, 1e-300, 0.0
    with np.errstate(divide="ignore"):
        table = calibration.fitted(out, truth, orientation)
    calibration.check(table, ["stamps"])
    np.testing.assert_allclose(calibration.calibrated(table, out)[5:], expected[5:], rtol=0.05, atol=1e-3)


def test_answers_that_are_far_off_give_a_calibration_that_can_be_read():
    """By fourteen errors: weights for one telescope, calibrated on images of another."""
    out, truth, _ = answers(1000)
    out[:, 0] += 0.7
    table = calibration.fitted(out, truth)
    calibration.check(table, ["stamps"])
    low, high = table["shift_range"]
    with pytest.raises(ValueError, match="from lower to higher"):
        calibration.check(table | {"shift_range": [high, np.subtract(low, 1).tolist()]}, ["stamps"])


def test_answers_do_not_depend_on_the_others_of_a_batch():
    out, truth, orientation = answers(1000)
    table = calibration.fitted(out, truth, orientation)
    whole = calibration.calibrated(table, out)
    for first in (0, 1, 333):
        np.testing.assert_array_equal(calibration.calibrated(table, out[first : first + 1]), whole[first : first + 1])
