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


def within(table, out, truth, which, seen=None):
    errors = out[:, 4:8] * calibration.factors(table, out, seen)[:, :4]
    return (np.abs(pulls(out[:, :4], errors, truth)) < 1)[which].mean(axis=0)


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
    factors = calibration.factors(calibration.fitted(out, truth), out)
    assert factors[:, 1:3].mean(axis=0) == pytest.approx([2, 2], rel=0.05)


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
    sigma = others[:, 16] * calibration.factors(table, others)[:, 4] / length
    off = np.arctan2(*others[:, 15:13:-1].T) - np.arctan2(*turned[:, ::-1].T)
    off = np.abs((off + np.pi) % (2 * np.pi) - np.pi)
    for which in (true[:, 0] < -11, true[:, 0] > -7):
        assert (off < sigma)[which & (length > 0.1)].mean() == pytest.approx(0.6827, abs=0.025)


def test_an_unknown_orientation_leaves_its_errors_as_they_are():
    out, truth, orientation = answers(2000)
    table = calibration.fitted(out, truth, np.where(orientation > 0.3, np.nan, orientation))
    assert np.all(calibration.factors(table, out)[:, 4] == 1)


def test_few_galaxies_give_a_calibration_and_fewer_none():
    out, truth, orientation = answers(700)
    others, true, _ = answers(5000, seed=1)
    everywhere = np.ones(len(true), bool)
    found = within(calibration.fitted(out, truth, orientation), others, true, everywhere)
    assert found == pytest.approx([0.6827] * 4, abs=0.06)
    assert calibration.fitted(out[:500], truth[:500], orientation[:500]) is None
    assert np.all(calibration.factors(None, out) == 1)


def test_factors_stay_in_their_range_far_from_the_galaxies_that_gave_them():
    out, truth, orientation = answers(5000)
    table = calibration.fitted(out, truth, orientation)
    far = out.copy()
    far[:, 0], far[:, 1], far[:, 4:8] = 30.0, 1e5, 1e6
    low, high = np.exp(table["range"])
    factors = calibration.factors(table, far)
    assert np.all((factors >= low) & (factors <= high))
    far[0] = np.nan
    assert np.isnan(calibration.factors(table, far)[0]).all()


def test_tables_by_magnitude_of_earlier_weights_count():
    out, _, _ = answers(3)
    out[:, 0] = [-20, -9, 0]
    table = {"mag": [-10.0, -8.0], "factors": [[1.0] * 4, [2.0] * 4], "orientation": [1.0, 3.0]}
    assert calibration.factors(table, out) == pytest.approx(np.array([[1.0] * 5, [*[1.5] * 4, 2], [*[2.0] * 4, 3]]))


def test_eight_numbers_of_an_answer_are_enough():
    out, truth, _ = answers(2000)
    table = calibration.fitted(out[:, :8], truth)
    assert calibration.factors(table, out[:, :8]) == pytest.approx(calibration.factors(table, out))


def test_factors_depend_on_what_the_network_saw_of_the_image():
    """Through the wider PSF, the deviations are twice as large as through the narrower one, and the answers alike."""
    views = np.array([psf_views(Gaussian2DKernel(width, x_size=41, y_size=41).array) for width in (1.0, 3.0)])

    def through_both(seed):
        out, truth, _ = answers(12_000, seed)
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


def test_a_psf_counts_by_its_noise_equivalent_area():
    """4 pi sigma^2 of a Gaussian, with the variance of a pixel in it; one PSF counts for all galaxies."""
    views = psf_views(Gaussian2DKernel(2.0, x_size=61, y_size=61, mode="oversample").array)
    inputs = Inputs(np.empty((3, 0)), views[None], noise_numbers(np.full(3, 1.5), 100.0))
    seen = calibration.conditions(inputs, {"stamps", "psf", "noise"})
    assert np.exp(seen[:, 0]) == pytest.approx([4 * np.pi * (2.0**2 + 1 / 12)] * 3, rel=1e-3)
    assert seen[:, 1:] == pytest.approx(np.tile([np.log(1.5), 2, 1], (3, 1)))
    assert calibration.conditions(inputs, {"stamps"}).shape == (3, 0)


def test_what_all_galaxies_share_has_no_effect_on_others():
    """A set through one PSF says nothing of other widths: they must not change the factors."""
    out, truth, orientation = answers(3000)
    seen = np.tile([4.09, 0.79, 1.0, 1.0], (len(out), 1))
    table = calibration.fitted(out, truth, orientation, seen)
    expected = calibration.factors(table, out, seen)
    for shift in ([0.001, 0.001, 0, 0], [0.3, -0.3, -1, -1]):
        np.testing.assert_allclose(calibration.factors(table, out, seen + shift), expected, rtol=1e-3)


def test_a_psf_without_light_gives_numbers():
    inputs = Inputs(np.empty((2, 0)), np.zeros((2, 4, 32, 32)), np.zeros((2, 3)))
    assert np.isfinite(calibration.conditions(inputs, {"stamps", "psf", "noise"})).all()


def test_a_calibration_of_earlier_versions_depends_on_the_answer_alone():
    out, truth, _ = answers(2000)
    table = calibration.fitted(out, truth)
    calibration.check(table, ["noise", "psf", "stamps"])
    seen = np.random.default_rng(0).normal(size=(len(out), 4))
    np.testing.assert_array_equal(calibration.factors(table, out, seen), calibration.factors(table, out))
