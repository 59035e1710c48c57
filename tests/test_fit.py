from dataclasses import replace

import numpy as np
import pytest

from sersicnet.engine import fit
from sersicnet.engine.fit import Fitter, Noise, Status
from sersicnet.engine.prior import Prior
from sersicnet.engine.render import Renderer
from sersicnet.errors import InputError
from sersicnet.simulating.stamps import observe
from sersicnet.simulating.telescopes import F160W, effective_psf

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
    stamps = np.array([stamp_of(row)] * 6)
    stamps[1] = np.nan
    start = np.tile(poor(row), (6, 1))
    start[2, 3] = np.nan
    start[3, 2] = -1
    start[5, 2] = 1e300
    rms = np.array([RMS, RMS, RMS, RMS, 0.0, RMS])
    fits = fitter(stamps, rms, start)
    bad = Status.BAD_START
    assert list(fits.status) == [Status.CONVERGED, Status.NO_DATA, bad, bad, Status.NO_DATA, bad]
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


def test_two_overlapping_galaxies_fitted_together_come_back():
    row, other = galaxy(21.0, 4.0, 1.5, 0.6), galaxy(20.0, 5.0, 3.0, 0.8, -40.0, 42.0, 36.0)
    render = Renderer(PSF, 64)
    stamp = observe(render(np.array([row, other])).sum(axis=0), RMS, QUIET, np.random.default_rng(4))
    fitter = Fitter(PSF, Noise(drizzled(), F160W.exposure), 64)
    rms, start = np.array([RMS]), poor(row)[None]
    alone = fitter(stamp[None], rms, start)
    together = fitter(stamp[None], rms, start, neighbours=[poor(other)[None]])
    error = np.sqrt(np.diagonal(together.covariance[0]))[:7]
    assert together.status[0] == Status.CONVERGED
    assert np.abs((together.parameters[0] - row) / error)[2:6].max() < 4
    assert abs(alone.parameters[0, 3] / row[3] - 1) > 5 * abs(together.parameters[0, 3] / row[3] - 1)


def test_a_neighbour_without_a_start_is_left_out(fitter):
    row = galaxy()
    stamp = stamp_of(row)
    nothing = np.full((1, 7), np.nan)
    fits = fitter(stamp[None], np.array([RMS]), poor(row)[None], neighbours=[nothing])
    alone = fitter(stamp[None], np.array([RMS]), poor(row)[None])
    np.testing.assert_array_equal(fits.parameters, alone.parameters)


def test_a_prior_keeps_a_faint_galaxy_from_running_away():
    row = galaxy(27.0, 4.0, 1.0, 0.6)
    stamps = np.array([stamp_of(row, seed) for seed in range(12)])
    start, rms = np.tile(poor(row), (12, 1)), np.full(12, RMS)
    noise = Noise(drizzled(), F160W.exposure)
    prior = Prior.uniform((row[2] / 5, row[2] * 5), (1.0, 10.0), (0.5, 4.0), (0.2, 1.0))
    free, kept = (Fitter(PSF, noise, 64, prior=p)(stamps, rms, start).parameters[:, 3] for p in (None, prior))
    assert kept.std() < 0.7 * free.std()
    assert ((kept > 1) & (kept < 10)).all()


def test_noise_does_not_elongate_round_galaxies_where_there_is_a_prior():
    row = galaxy(25.5, 5.0, 1.0, 0.98)
    stamps = np.array([stamp_of(row, seed) for seed in range(16)])
    start, rms = np.tile(poor(row), (16, 1)), np.full(16, RMS)
    prior = Prior.uniform((row[2] / 5, row[2] * 5), (1.0, 10.0), (0.5, 4.0), (0.1, 1.0))
    noise = Noise(drizzled(), F160W.exposure)
    free, kept = (Fitter(PSF, noise, 64, prior=p)(stamps, rms, start).parameters[:, 5] for p in (None, prior))
    assert np.mean(kept - free) > 0.03


def test_a_prior_of_a_sample_says_what_is_usual_at_a_flux_and_nothing_of_the_flux():
    rng = np.random.default_rng(0)
    flux = 10 ** rng.uniform(0, 3, 500)
    sample = np.column_stack(
        [
            flux,
            4 * flux**0.2 * np.exp(rng.normal(0, 0.3, 500)),
            rng.lognormal(0.5, 0.3, 500),
            rng.uniform(0.3, 0.9, 500),
        ]
    )
    prior = Prior.of(sample)
    assert np.linalg.matrix_rank(prior.precision) == 3

    def penalty(flux, r_eff):
        values = (flux, r_eff, 1.6, 0.6)
        off = [float(s.to_free(v)) for s, v in zip(prior.scales, values, strict=True)] - prior.mean
        return off @ prior.precision @ off

    usual = penalty(1.0, 4.0), penalty(1000.0, 4 * 1000**0.2)
    assert usual[0] == pytest.approx(usual[1], abs=0.5)
    assert penalty(1.0, 8.0) > usual[0] + 2
    with pytest.raises(InputError, match="at least 20"):
        Prior.of(sample[:10])


def test_robust_fits_are_less_moved_by_light_that_is_not_masked():
    row = galaxy(20.5, 4.0, 1.5, 0.6)
    stamp = stamp_of(row)
    stamp[38:41, 38:41] += 0.15
    noise, rms, start = Noise(drizzled(), F160W.exposure), np.array([RMS]), poor(row)[None]
    plain, robust = (Fitter(PSF, noise, 64, robust=flag)(stamp[None], rms, start).parameters[0] for flag in (0, 1))
    assert abs(robust[4] - row[4]) < 0.3 * abs(plain[4] - row[4])


@pytest.mark.parametrize(
    ("mag", "r_eff", "n", "side"),
    [(26.0, 2.0, 1.0, 32), (25.0, 2.0, 1.0, 40), (23.5, 6.0, 1.0, 64), (20.0, 3.0, 1.0, 48), (20.0, 12.0, 4.0, 128)],
)
def test_faint_and_small_galaxies_have_small_windows(mag, r_eff, n, side, monkeypatch):
    row, tried = galaxy(mag, r_eff, n, x=63.4, y=63.8), []
    run = fit._Fit.run
    monkeypatch.setattr(fit._Fit, "run", lambda self: tried.append(self.window.size) or run(self))
    stamp = stamp_of(row, size=128)
    fits = Fitter(PSF, Noise(drizzled(), F160W.exposure, 0.1), 128)(stamp[None], np.array([RMS]), row[None])
    assert tried[0] == side
    assert np.isfinite(fits.parameters).all()


def test_a_window_holds_the_neighbours_that_are_fitted_with_a_galaxy(monkeypatch):
    row, tried = galaxy(25.0, 2.0, 1.0, x=63.4, y=63.8), []
    other = galaxy(23.0, 3.0, 1.0, x=90.0, y=63.0)
    run = fit._Fit.run
    monkeypatch.setattr(fit._Fit, "run", lambda self: tried.append((self.window.size, self.count)) or run(self))
    stamp = stamp_of(row, size=128) + Renderer(PSF, 128)(other)[0]
    fitter = Fitter(PSF, Noise(drizzled(), F160W.exposure, 0.1), 128)
    fitter(stamp[None], np.array([RMS]), row[None], neighbours=[other[None]])
    assert tried[0] == (64, 2)


def test_the_stamp_around_a_window_tells_the_sky(monkeypatch):
    row = galaxy(24.0, 3.0, 1.0, x=63.4, y=63.8)
    n, level = 24, 0.08 * RMS
    stamps = np.array([stamp_of(row, seed, 128) for seed in range(n)]) + level
    rms, start = np.full(n, RMS), np.tile(poor(row), (n, 1))
    fitter = Fitter(PSF, Noise(drizzled(), F160W.exposure, 0.1), 128)
    fits = fitter(stamps, rms, start)
    error = np.sqrt(fits.covariance[:, 7, 7])
    assert (error < 0.025 * RMS).all()
    pull = (fits.sky - level) / error
    assert abs(pull.mean()) < 0.6
    assert pull.std() == pytest.approx(1, abs=0.4)
    # The start of a bright galaxy may be far off: its wings do not pass for sky.
    bright = galaxy(18.5, 4.0, 4.0, x=63.4, y=63.8)
    fits = fitter(stamp_of(bright, 0, 128)[None], rms[:1], (bright * [1, 1, 0.8, 1, 0.7, 1, 1])[None])
    assert abs(fits.sky[0]) < 4 * np.sqrt(fits.covariance[0, 7, 7])
    assert fits.parameters[0, 2] == pytest.approx(bright[2], rel=0.03)


def test_a_curved_valley_takes_few_iterations():
    row = galaxy(24.5, 5.0, 2.0, 0.5)
    stamps = np.array([stamp_of(row, seed) for seed in range(16)])
    prior = Prior.uniform((row[2] / 5, row[2] * 5), (1.0, 20.0), (0.3, 8.0), (0.02, 1.0))
    noise = Noise(drizzled(), F160W.exposure, 0.1, 0.05)
    rms, start = np.full(16, RMS), np.tile(row, (16, 1))
    usual = Fitter(PSF, noise, 64, prior=prior)(stamps, rms, start)
    exact = Fitter(PSF, noise, 64, prior=prior, tolerance=1e-6, max_iterations=200)(stamps, rms, start)
    error = np.sqrt(np.diagonal(exact.covariance, axis1=1, axis2=2))[:, 2:6]
    assert usual.iterations.max() <= 12
    assert (np.abs(usual.parameters - exact.parameters)[:, 2:6] < 0.25 * error).all()


@pytest.mark.parametrize("r_eff", [3.0, 12.0])
def test_windows_do_not_change_the_answer(r_eff, monkeypatch):
    row = galaxy(20.5, r_eff, 1.5, 0.6, x=63.4, y=63.8)
    stamp, rms = stamp_of(row, size=128)[None], np.array([RMS])
    noise = Noise(drizzled(), F160W.exposure, 0.1)
    start = galaxy(20.5, 3.0, 1.5, 0.6, x=63.5, y=63.5)[None]
    small = Fitter(PSF, noise, 128)(stamp, rms, start)
    monkeypatch.setattr(fit, "WINDOWS", ())
    whole = Fitter(PSF, noise, 128)(stamp, rms, start)
    error = np.sqrt(np.diagonal(whole.covariance[0]))[:7]
    assert (np.abs(small.parameters - whole.parameters)[0] < 0.7 * error).all()
    if r_eff > 10:
        np.testing.assert_allclose(small.parameters, whole.parameters, rtol=5e-3)


def test_a_noise_map_weighs_pixels_and_its_zeros_are_masked(fitter):
    row = galaxy(20.0, 4.0, 1.2)
    stamp = stamp_of(row)
    dirty, noise_map = stamp.copy(), np.full((1, 64, 64), RMS)
    dirty[40:50, 10:20] = 5.0
    noise_map[0, 40:50, 10:20] = 0
    start = poor(row)[None]
    masked = fitter(stamp[None], np.array([RMS]), start, noise_map == 0)
    mapped = fitter(dirty[None], noise_map, start)
    np.testing.assert_allclose(mapped.parameters, masked.parameters, rtol=1e-5)
    noise_map[0, 40:50, 10:20] = 1e4
    weighed = fitter(dirty[None], noise_map, start)
    np.testing.assert_allclose(weighed.parameters[0, 2:6], masked.parameters[0, 2:6], rtol=0.02)


def test_threads_give_the_same_and_report(fitter):
    rows = np.array([galaxy(m, r) for m, r in ((20, 3), (21, 4), (22, 5))])
    stamps = np.array([stamp_of(row, i) for i, row in enumerate(rows)])
    start, done = np.array([poor(row) for row in rows]), []
    one = fitter(stamps, np.full(3, RMS), start)
    two = fitter(stamps, np.full(3, RMS), start, workers=2, report=done.append)
    np.testing.assert_array_equal(one.parameters, two.parameters)
    assert done == [1, 2, 3]


@pytest.mark.parametrize("psf", [np.full((5, 5), np.nan), -np.ones((5, 5)), np.ones((4, 4))])
def test_a_bad_psf_is_refused(psf):
    with pytest.raises(InputError, match="A PSF"):
        Fitter(psf, Noise(np.ones((1, 1))), 64)


def test_a_bad_sky_is_refused():
    with pytest.raises(InputError, match="A standard deviation of the sky is positive"):
        Fitter(PSF, Noise(np.ones((1, 1)), sky=0.0), 64)
