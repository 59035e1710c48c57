import numpy as np
import pytest
from photutils.geometry import elliptical_overlap_grid
from test_fit import PSF, QUIET, RMS, drizzled, galaxy

from sersicnet.catalogue import derived
from sersicnet.engine.fit import Fitter, Noise
from sersicnet.engine.render import Renderer
from sersicnet.measuring.fitting import correlations_of
from sersicnet.simulating.stamps import observe
from sersicnet.weights import PAIRS

TARGETS = np.array([[22.0, 8.0, 1.3, 0.4]])
ERRORS = np.array([[0.08, 1.1, 0.3, 0.05]])
CORRELATIONS = np.array([[-0.8, -0.6, 0.2, 0.7, -0.1, 0.15]])


def drawn(n=100_000):
    """Galaxies whose magnitude, log radius, log index and ellipticity scatter with the covariance."""
    matrix = np.eye(4)
    matrix[PAIRS] = matrix.T[PAIRS] = CORRELATIONS[0]
    relative = ERRORS[0] / np.where([False, True, True, False], TARGETS[0], 1)
    normal = np.random.default_rng(1).multivariate_normal(np.zeros(4), matrix * np.outer(relative, relative), n)
    mag, log_r, log_n, e = normal.T
    return np.column_stack([22 + mag, 8 * np.exp(log_r), 1.3 * np.exp(log_n), 0.4 + e])


def test_a_flux_is_that_of_its_magnitude_with_the_scatter_of_the_posterior():
    (flux,), (error,) = derived.flux_of(TARGETS[:, 0], ERRORS[:, 0], 25.0)
    assert flux == pytest.approx(10 ** (0.4 * 3.0))
    low, middle, high = np.quantile(10 ** (-0.4 * (drawn()[:, 0] - 25.0)), [0.1587, 0.5, 0.8413])
    assert flux == pytest.approx(middle, rel=2e-3)
    assert error == pytest.approx((high - low) / 2, rel=0.01)


def test_a_limit_is_three_times_the_error_where_less_was_seen():
    flux, error = np.array([-1.0, 0.0, 2.9, 3.0, np.nan, -1.0]), np.array([1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    limit = derived.upper_limit(flux, error, 25.0)
    np.testing.assert_allclose(limit[:3], 25 - 2.5 * np.log10(3))
    assert np.isnan(limit[3:]).all()


def test_quantiles_are_those_of_galaxies_that_scatter_with_the_covariance():
    found = derived.quantiles(TARGETS, ERRORS)[0]
    np.testing.assert_allclose(found, np.quantile(drawn(), [0.16, 0.5, 0.84], axis=0).T, rtol=5e-3)


def test_the_posterior_of_an_ellipticity_ends_at_its_bounds():
    e, error = np.array([0.05]), np.array([0.1])
    targets, errors = (np.column_stack([values] * 4) for values in (e, error))
    draws = np.random.default_rng(2).normal(e, error, 200_000)
    draws = draws[(draws >= 0) & (draws <= 1)]
    found = derived.quantiles(targets, errors)[0, 3]
    np.testing.assert_allclose(found, np.quantile(draws, [0.16, 0.5, 0.84]), atol=1e-3)
    absurd = derived.quantiles(targets * [1, 1, 1, -20], errors * 30)[0, 3]
    assert ((absurd >= 0) & (absurd <= 1)).all()


def test_nothing_is_derived_from_what_is_not_known():
    unknown = np.full((1, 4), np.nan)
    assert np.isnan(derived.quantiles(unknown, unknown)).all()
    brightness, error = derived.mean_surface_brightness(TARGETS, ERRORS, np.full((1, 6), np.nan), 0.06)
    assert np.isfinite(brightness).all()
    assert np.isnan(error).all()


@pytest.mark.parametrize("q", [1.0, 0.5])
def test_the_mean_surface_brightness_is_that_of_a_drawn_image(q):
    """The light in the ellipse of the effective radius, over its area."""
    r_eff, middle, flux, scale, zero = 18.0, 63.5, 1000.0, 0.1, 25.0
    image = Renderer(np.ones((1, 1)), 128)(np.array([middle, middle, flux, r_eff, 1.0, q, 0.0]))[0].astype(float)
    inside = elliptical_overlap_grid(-64, 64, -64, 64, 128, 128, r_eff, q * r_eff, 0.0, 0, 10)
    seen = zero - 2.5 * np.log10((image * inside).sum() / (inside.sum() * scale**2))
    targets = np.array([[zero - 2.5 * np.log10(flux), r_eff, 1.0, 1 - q]])
    found, _ = derived.mean_surface_brightness(targets, ERRORS, CORRELATIONS, scale)
    assert found[0] == pytest.approx(seen, abs=0.01)


def test_the_error_of_the_surface_brightness_is_from_the_covariance():
    draws = drawn()
    nothing = np.zeros((len(draws), 6))
    each, _ = derived.mean_surface_brightness(draws, np.zeros_like(draws), nothing, 0.06)
    _, error = derived.mean_surface_brightness(TARGETS, ERRORS, CORRELATIONS, 0.06)
    assert error[0] == pytest.approx(each.std(), rel=0.02)


def test_correlations_and_position_errors_of_fits_are_those_of_repeated_noise():
    row, n = galaxy(21.5, 4.0, 1.5, 0.5), 80
    model, noise = Renderer(PSF, 64)(row)[0], Noise(drizzled())
    camera = QUIET.__class__(**{**QUIET.__dict__, "exposure": 1e9})
    stamps = np.array([observe(model, RMS, camera, np.random.default_rng(seed)) for seed in range(n)])
    fits = Fitter(PSF, noise, 64)(stamps, np.full(n, RMS), np.tile(row, (n, 1)))
    x, y, flux, r_eff, index, q, _ = fits.parameters.T
    scatter = np.corrcoef([-2.5 * np.log10(flux), r_eff, index, 1 - q])[PAIRS]
    predicted = np.median(correlations_of(fits.covariance[:, 2:6, 2:6]), axis=0)
    assert np.abs(np.arctanh(scatter) - np.arctanh(predicted)).max() < 4 / np.sqrt(n - 3)
    assert abs(predicted).max() > 0.6
    errors = np.sqrt(np.median(np.diagonal(fits.covariance, axis1=1, axis2=2), axis=0))
    np.testing.assert_allclose([x.std(), y.std()], errors[:2], rtol=4 / np.sqrt(2 * n))
