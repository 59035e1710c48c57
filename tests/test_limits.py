import numpy as np
import pytest

from sersicnet.dataset import Dataset
from sersicnet.engine.fit import Fitter, Noise
from sersicnet.engine.render import Renderer
from sersicnet.errors import InputError
from sersicnet.schema import TARGETS
from sersicnet.simulating import fisher as limits
from sersicnet.simulating import population
from sersicnet.simulating.recipe import Prior, Simulation
from sersicnet.simulating.stamps import _draw_shape
from sersicnet.simulating.telescopes import F160W, effective_psf

TAPS = np.array([0.31, 1.0, 0.31]) / 1.62
GALAXY = np.array([15.8, 15.2, 30.0, 3.0, 1.5, 0.6, 30.0])


@pytest.mark.parametrize("taps", [TAPS, np.convolve(TAPS, TAPS)])
def test_the_covariance_is_that_of_noise_through_the_kernel(taps):
    size, n = 6, len(taps)
    sigma = np.random.default_rng(0).uniform(0.5, 2, (size + n - 1, size + n - 1))
    mixing = np.zeros((size, size, *sigma.shape))
    for y in range(size):
        for x in range(size):
            mixing[y, x, y : y + n, x : x + n] = np.outer(taps, taps)
    mixing = mixing.reshape(size**2, -1)
    expected = (mixing * sigma.ravel() ** 2) @ mixing.T
    bands = limits.covariance_bands(sigma, taps)
    for lag, band in enumerate(bands):
        assert band[: size**2 - lag] == pytest.approx(np.diag(expected, -lag))


def test_the_fisher_matrix_of_white_noise_is_a_sum_over_pixels():
    render = Renderer(effective_psf(F160W, 31), 32)
    fisher = limits.fisher_matrix(render, GALAXY, np.full((34, 34), 0.2), np.array([0.0, 1.0, 0.0]))
    slopes = render.with_derivatives(GALAXY)[1][0].reshape(7, -1).astype(float)
    assert fisher[7, 7] == pytest.approx(32**2 / 0.04)
    assert fisher[3, 4] == pytest.approx(slopes[3] @ slopes[4] / 0.04)
    assert fisher[2, 5] == pytest.approx(slopes[2] @ slopes[5] / 0.04 * 30 * np.log(10) / 2.5)


def test_what_is_known_of_the_sky_makes_errors_smaller():
    render = Renderer(effective_psf(F160W, 31), 32)
    sigma = limits.independent_sigma(np.pad(render(GALAXY)[0], 1), 0.2, 3200.0)
    fisher = limits.fisher_matrix(render, GALAXY, sigma, TAPS)[None]
    free, loose, tight, known = (
        np.diagonal(limits.covariance(fisher, sky)[0]) for sky in (np.inf, np.array([0.01]), np.array([1e-7]), 0)
    )
    assert (free > loose).all()
    assert (loose > tight).all()
    assert tight == pytest.approx(known, rel=1e-4)


def test_fits_without_a_prior_reach_the_bound():
    """The fitter says of itself what the Fisher matrix says, but for the edges of the stamp."""
    psf = effective_psf(F160W, 31)
    render, white = Renderer(psf, 64), 0.02
    galaxy = np.array([31.8, 31.2, *GALAXY[2:]])
    image = render(galaxy)[0]
    fisher = limits.fisher_matrix(render, galaxy, limits.independent_sigma(np.pad(image, 1), white, 3200.0), TAPS)
    rms = white * (TAPS**2).sum()
    fitter = Fitter(psf, Noise(F160W.autocorrelation(), 3200.0), 64)
    found = fitter(image[None], np.array([rms]), galaxy[None]).covariance[0]
    ours = np.sqrt(np.diagonal(limits.covariance(fisher[None], np.inf)[0]))
    theirs = np.sqrt(np.diagonal(found))[2:6] * (2.5 / np.log(10) / galaxy[2], 1, 1, 1)
    assert theirs == pytest.approx(ours, rel=0.05)


def test_the_posterior_keeps_to_the_data_where_these_are_good_and_to_the_prior_where_not():
    truth = np.array([[20.0, 10.0, 2.0, 0.5]])
    low, high = (np.array([getattr(t, end) for t in TARGETS]) for end in ("low", "high"))
    rng = np.random.default_rng(0)
    sharp = limits.posterior_means(truth, 1e-8 * np.eye(4)[None], low, high, None, 3, rng)
    assert sharp == pytest.approx(np.tile(truth, (3, 1, 1)), abs=1e-3)
    blunt = limits.posterior_means(truth, np.diag([1e6, 1e6, 1e6, 1e6])[None], low, high, None, 1, rng, samples=100_000)
    assert blunt[0, 0] == pytest.approx((low + high) / 2, rel=0.1)


def test_a_density_moves_the_posterior():
    truth, wide = np.array([[21.5, 10.0, 2.0, 0.5]]), np.diag([1e6, 1e-6, 1e-6, 1e-6])[None]
    low, high = np.array([16, 1.3, 0.3, 0]), np.array([27, 50.2, 6.2, 0.97])
    means = limits.posterior_means(
        truth, wide, low, high, lambda p: -0.5 * (p[:, 0] - 20) ** 2, 2, np.random.default_rng(0), samples=20_000
    )
    assert means[:, 0, 0] == pytest.approx(20, abs=0.1)


def test_radii_have_the_density_that_they_are_drawn_from():
    """The mean of 1 / density over draws is the volume of where they come from."""
    rng = np.random.default_rng(3)
    prior = Prior(log_radii=0.5)
    drawn = [_draw_shape(prior, rng) for _ in range(4000)]
    points = np.array([[galaxy[t.name] for t in TARGETS] for galaxy in drawn])
    inverse, (low, high) = np.exp(-prior.log_density(points)), prior.r_eff_pix
    for first, last in ((low, 4), (4, 20), (20, high)):
        inside = (points[:, 1] >= first) & (points[:, 1] < last)
        assert inverse[inside].sum() / len(points) == pytest.approx(last - first, rel=0.1)


def test_a_mixture_is_normalised():
    mixture = population.candels_mixture()
    rng = np.random.default_rng(0)
    ranges = {"mag": (23, 24), "r_eff_pix": (2, 8), "sersic_n": (0.5, 3), "ellipticity": (0.1, 0.8)}
    low, high = np.array(list(ranges.values())).T
    points = rng.uniform(low, high, (40_000, 4))
    integral = np.exp(mixture.log_density(points)).mean() * np.prod(high - low) / (2 * np.pi) ** 2 / np.log(10) ** 2
    drawn = [mixture.draw(rng, population.FULL_RANGES) for _ in range(4000)]
    inside = np.mean([all(a <= galaxy[name] <= b for name, (a, b) in ranges.items()) for galaxy in drawn])
    assert integral == pytest.approx(inside, rel=0.1)


def test_a_dataset_gives_its_limit(small_dataset):
    seen = []
    with Dataset(small_dataset) as data:
        rows, found = limits.of_dataset(data, most=5, draws=3, report=lambda done, total: seen.append((done, total)))
        truth = np.column_stack([data.mag, data.targets[:, 1:]])[rows]
    assert seen[-1] == (5, 5)
    assert all(estimates.shape == (3, 5, 4) for estimates in found.values())
    bright = truth[:, 0] < 22
    assert bright.any()
    assert np.abs(found["sky known"] - truth)[:, bright, 0].max() < 0.3


def test_a_simulation_comes_back_from_its_record():
    for simulation in (
        Simulation(5, seed=3, psf_scatter=0.1, centring=True),
        Simulation(5, prior=Prior(log_radii=0.5), neighbours=True),
        Simulation(5, prior=Prior.candels(), galaxies="real-like"),
    ):
        assert Simulation.of_record(simulation.record()).record() == simulation.record()


def test_a_limit_that_cannot_be_known_is_one_line(small_dataset):
    with Dataset(small_dataset) as data:
        data.config["sky"] = {"name": "mosaic.fits"}
        with pytest.raises(InputError, match=r"small.h5 cannot be computed: Its noise came from .* Leave out `limits`"):
            limits.of_dataset(data)
        del data.config["sky"]
        data.config["galaxies"] = "real-like"
        with pytest.raises(InputError, match="fitted to the very noise"):
            limits.of_dataset(data)
