from dataclasses import replace

import numpy as np
import pytest

from sersicnet.errors import InputError
from sersicnet.fit import Fitter, Noise, Status
from sersicnet.instrument import F160W
from sersicnet.render import Renderer
from sersicnet.simulate import effective_psf, observe

PSF = effective_psf(F160W, 61)
RMS = 0.003
QUIET = replace(F160W, sky_residual=0.0)


def drizzled():
    """Autocorrelation of the noise that `observe` draws."""
    kernel = np.array([F160W.noise_tap, 1, F160W.noise_tap])
    along = np.convolve(kernel, kernel)
    return np.outer(along, along) / along[2] ** 2


def galaxy(mag=20.0, r_eff=6.0, n=2.0, q=0.6, theta=25.0, x=31.6, y=31.3):
    return np.array([x, y, 10 ** (-0.4 * (mag - F160W.zero_point)), r_eff, n, q, theta])


def stamp_of(row, seed=0, size=64):
    return observe(Renderer(PSF, size)(row)[0], RMS, QUIET, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def fitter():
    return Fitter(PSF, Noise(drizzled(), F160W.exposure), 64)


def poor(row):
    """A start as moments would give it."""
    return row * np.array([1.01, 0.99, 0.8, 1.3, 0.6, 1.2, 1.0]) + np.array([0, 0, 0, 0, 0, 0, 10.0])


def test_noiseless_parameters_come_back(fitter):
    row = galaxy()
    fits = fitter(Renderer(PSF, 64)(row), np.array([RMS]), poor(row)[None])
    assert fits.status[0] == Status.CONVERGED
    np.testing.assert_allclose(fits.parameters[0], row, rtol=2e-3)
    assert abs(fits.sky[0]) < 0.01 * RMS


@pytest.mark.parametrize("correlated", [True, False])
def test_errors_mean_what_they_say(correlated):
    row = galaxy(21.5, 4.0, 1.5, 0.5)
    n = 60
    if correlated:
        noise = Noise(drizzled(), F160W.exposure)
        stamps = np.array([stamp_of(row, seed) for seed in range(n)])
    else:
        noise = Noise(np.ones((1, 1)))
        model = Renderer(PSF, 64)(row)
        stamps = model + np.random.default_rng(3).normal(0, RMS, (n, 64, 64))
    fits = Fitter(PSF, noise, 64)(stamps, np.full(n, RMS), np.tile(poor(row), (n, 1)))
    assert (fits.status == Status.CONVERGED).all()
    errors = np.sqrt(np.diagonal(fits.covariance, axis1=1, axis2=2))[:, :7]
    pull = (fits.parameters - row) / errors
    assert np.abs(np.median(pull, axis=0)).max() < 0.5
    assert pull.std() == pytest.approx(1, abs=0.12)
    assert np.median(fits.chi2) == pytest.approx(1, abs=0.03)


def test_forgetting_the_correlation_makes_errors_too_small():
    row = galaxy(21.5, 4.0, 1.5, 0.5)
    stamps = np.array([stamp_of(row, seed) for seed in range(20)])
    start, rms = np.tile(poor(row), (20, 1)), np.full(20, RMS)
    right = Fitter(PSF, Noise(drizzled(), F160W.exposure), 64)(stamps, rms, start)
    wrong = Fitter(PSF, Noise(np.ones((1, 1)), F160W.exposure), 64)(stamps, rms, start)
    assert (np.sqrt(right.covariance[:, 2, 2]) > 1.4 * np.sqrt(wrong.covariance[:, 2, 2])).all()


def test_masked_pixels_have_no_influence(fitter):
    row = galaxy(20.0, 4.0, 1.2)
    stamp = stamp_of(row)
    mask = np.zeros((1, 64, 64), bool)
    mask[0, 40:50, 10:20] = True
    dirty = np.where(mask, 5.0, stamp)
    start = poor(row)[None]
    clean = fitter(stamp[None], np.array([RMS]), start, mask)
    masked = fitter(dirty, np.array([RMS]), start, mask)
    np.testing.assert_array_equal(clean.parameters, masked.parameters)
    without = fitter(np.where(mask, np.nan, stamp), np.array([RMS]), start)
    np.testing.assert_array_equal(without.parameters, masked.parameters)


def test_one_bad_galaxy_does_not_spoil_the_others(fitter):
    row = galaxy()
    stamps = np.array([stamp_of(row)] * 5)
    stamps[1] = np.nan
    start = np.tile(poor(row), (5, 1))
    start[2, 3] = np.nan
    start[3, 2] = -1
    rms = np.array([RMS, RMS, RMS, RMS, 0.0])
    fits = fitter(stamps, rms, start)
    assert list(fits.status) == [Status.CONVERGED, Status.NO_DATA, Status.BAD_START, Status.BAD_START, Status.NO_DATA]
    assert np.isnan(fits.parameters[1:]).all()
    np.testing.assert_allclose(fits.parameters[0], row, rtol=0.1)


def test_a_start_outside_of_the_bounds_is_brought_inside(fitter):
    row = galaxy()
    start = row.copy()
    start[3:6] = 5.0, 40.0, 3.0
    fits = fitter(stamp_of(row)[None], np.array([RMS]), start[None])
    np.testing.assert_allclose(fits.parameters[0, 3:6], row[3:6], rtol=0.1)


def test_a_stamp_without_a_source_ends_with_a_status(fitter):
    noise = observe(np.zeros((64, 64)), RMS, QUIET, np.random.default_rng(1))
    fits = fitter(noise[None], np.array([RMS]), galaxy(24.0)[None])
    error = np.sqrt(fits.covariance[0, 2, 2])
    assert fits.status[0] != Status.CONVERGED or not fits.parameters[0, 2] > 6 * error


def test_a_point_source_ends_at_the_bound_of_the_radius_or_small(fitter):
    point = galaxy(19.0, 0.06, 1.0, 0.9)
    fits = fitter(stamp_of(point)[None], np.array([RMS]), galaxy(19.0, 3.0)[None])
    assert fits.parameters[0, 3] < 0.5


@pytest.mark.parametrize("correlation", [np.ones((2, 2)), np.ones((3, 5)), np.zeros((3, 3)), np.ones(3)])
def test_a_bad_autocorrelation_is_refused(correlation):
    with pytest.raises(InputError, match="An autocorrelation"):
        Fitter(PSF, Noise(correlation), 64)


def test_a_bad_gain_is_refused():
    with pytest.raises(InputError, match="A gain is positive"):
        Fitter(PSF, Noise(np.ones((1, 1)), 0.0), 64)
