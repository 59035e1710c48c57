import subprocess
import sys

import h5py
import numpy as np
import pytest
from astropy.table import Table
from astropy.wcs import WCS

from sersicnet import mosaic, simulate
from sersicnet.dataset import Dataset
from sersicnet.errors import InputError
from sersicnet.instrument import F160W
from sersicnet.simulate import Field, Prior, Simulation


def test_psf_is_normalised_and_as_wide_as_measured():
    psf = simulate.effective_psf(F160W)
    assert psf.sum() == pytest.approx(1)
    assert simulate.full_width(psf) * F160W.pixel_scale == pytest.approx(0.19, abs=0.005)


def test_noise_has_the_rms_and_correlation_of_drizzled_images():
    noise = simulate.observe(np.zeros((800, 800)), 0.003, F160W, np.random.default_rng(1))
    noise -= noise.mean()
    assert noise.std() == pytest.approx(0.003, rel=0.01)
    assert (noise[:, 1:] * noise[:, :-1]).mean() / noise.var() == pytest.approx(0.52, abs=0.02)
    assert (noise[2:] * noise[:-2]).mean() / noise.var() == pytest.approx(0.08, abs=0.02)


def test_noise_of_a_large_aperture_is_larger_than_that_of_its_pixels():
    noise = simulate.observe(np.zeros((2000, 2000)), 1.0, F160W, np.random.default_rng(1))
    noise -= noise.mean()
    sums = noise.reshape(50, 40, 50, 40).sum(axis=(1, 3))
    assert sums.std() / 40 == pytest.approx(2.2, rel=0.07)


def test_sources_add_their_poisson_noise():
    bright = np.full((500, 500), 50.0)
    noise = simulate.observe(bright, 1e-6, F160W, np.random.default_rng(1)) - 50
    sums = noise.reshape(25, 20, 25, 20).sum(axis=(1, 3))
    assert sums.std() == pytest.approx(np.sqrt(400 * 50 / F160W.exposure), rel=0.1)


def test_the_file_does_not_depend_on_the_workers(tmp_path):
    simulation = Simulation(40, seed=3)
    paths = [simulate.simulate(tmp_path / f"{w}.h5", simulation, workers=w) for w in (1, 2)]
    with h5py.File(paths[0]) as one, h5py.File(paths[1]) as two:
        np.testing.assert_array_equal(one["stamps"][:], two["stamps"][:])
        np.testing.assert_array_equal(one["truth/mag"][:], two["truth/mag"][:])


def test_a_killed_run_continues_to_the_same_file(tmp_path):
    code = (
        "import os, sys\n"
        "from sersicnet.simulate import Simulation, simulate\n"
        "stop = lambda done: os.kill(os.getpid(), 9) if done >= 48 else None\n"
        "simulate(sys.argv[1], Simulation(80, seed=3), workers=1, progress=stop)\n"
    )
    path = tmp_path / "killed.h5"
    killed = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert killed.returncode == -9
    assert not path.exists()
    seen = []
    simulate.simulate(path, Simulation(80, seed=3), workers=1, progress=seen.append)
    assert seen == [48, 64, 80]
    simulate.simulate(tmp_path / "whole.h5", Simulation(80, seed=3), workers=1)
    with h5py.File(path) as one, h5py.File(tmp_path / "whole.h5") as two:
        np.testing.assert_array_equal(one["stamps"][:], two["stamps"][:])


def test_any_object_can_be_drawn_alone():
    simulation = Simulation(100, seed=3)
    together, _ = simulate.stamps(simulation, np.arange(10))
    alone, _ = simulate.stamps(simulation, np.array([7]))
    np.testing.assert_array_equal(together[7], alone[0])


def test_seeds_differ():
    one, _ = simulate.stamps(Simulation(1, seed=1), np.array([0]))
    two, _ = simulate.stamps(Simulation(1, seed=2), np.array([0]))
    assert not np.array_equal(one, two)


def test_draws_lie_within_the_prior():
    prior = Prior()
    truths = [simulate._draw_truth(Simulation(1, 0, prior), i)[0] for i in range(500)]
    for name in ("mag", "r_eff_pix", "sersic_n", "ellipticity"):
        values = np.array([t[name] for t in truths])
        low, high = getattr(prior, name)
        assert low <= values.min() < values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.05 * (high - low))


def test_log_radii_make_small_galaxies_common():
    def small(log_radii):
        simulation = Simulation(1, 0, Prior(log_radii=log_radii))
        return np.mean([simulate._draw_truth(simulation, i)[0]["r_eff_pix"] < 8 for i in range(500)])

    assert small(1.0) > 0.45 > 0.2 > small(0.0)


@pytest.mark.parametrize("index", range(6))
def test_a_simulated_stamp_cut_from_a_mosaic_is_itself(index):
    """No half pixel lies between training and use: both put a galaxy at the same pixels."""
    simulated, truth = simulate.stamps(Simulation(1, 0, Prior(mag=(17, 17.1))), np.array([index]))
    canvas = np.zeros((400, 420), np.float32)
    canvas[100:228, 150:278] = simulated[0]
    position = np.array([150 + truth["x"][0]]), np.array([100 + truth["y"][0]])
    sky = mosaic.Sky(np.zeros_like(canvas), np.full_like(canvas, truth["rms"][0]), np.ones((1, 1)), np.nan)
    stamp = mosaic.cut(canvas, np.zeros(canvas.shape, bool), sky, *position).pixels[0]
    np.testing.assert_allclose(stamp * truth["rms"][0], simulated[0], rtol=1e-5)


def test_centres_of_training_and_cut_stamps_have_the_same_range(field):
    dithers = [simulate._draw_truth(Simulation(1), i)[0]["x"] for i in range(300)]
    x = np.linspace(150, 152, 41)
    starts = [mosaic.overlap_slices((400, 400), (128, 128), (200, value))[0][1].start for value in x]
    cut = x - np.array(starts)
    assert 63 <= min(dithers) < max(dithers) <= 64
    assert 63 < cut.min() < cut.max() <= 64


def test_a_field_has_its_galaxies_where_the_truth_says(field):
    image = mosaic.read_image(field[0])
    truth = field[1]
    brightest = truth[np.argmin(truth["mag"])]
    x, y = round(brightest["x"]), round(brightest["y"])
    inside = image.data[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
    assert inside.mean() > 20 * 0.0035
    assert isinstance(image.wcs, WCS)
    ra, dec = image.sky(truth["x"], truth["y"])
    np.testing.assert_allclose(ra, truth["ra"])
    np.testing.assert_allclose(dec, truth["dec"])


def test_a_field_can_be_drawn_again(tmp_path, field):
    again, truth = simulate.simulate_field(tmp_path / "again.fits", Field(512, 14, 11, mag=(18.0, 22.0)))
    np.testing.assert_array_equal(mosaic.read_image(again).data, mosaic.read_image(field[0]).data)
    assert list(Table.read(truth)["mag"]) == list(field[1]["mag"])


def test_dataset_tells_how_it_was_made(small_dataset):
    with Dataset(small_dataset) as data:
        assert data.config["seed"] == 5
        assert data.config["prior"]["mag"] == [16.0, 27.0]
        assert data.config["command"] == "simulate"
        assert {"sersicnet", "galsim", "numpy"} <= set(data.versions)


def test_an_existing_output_is_kept(tmp_path):
    path = tmp_path / "train.h5"
    path.write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        simulate.simulate(path, Simulation(4))
    assert path.read_text() == "mine"


def test_no_stamps_are_refused(tmp_path):
    with pytest.raises(InputError, match="at least one stamp; received n = 0"):
        simulate.simulate(tmp_path / "train.h5", Simulation(0))
    assert not list(tmp_path.iterdir())


def test_a_mosaic_is_called_fits(tmp_path):
    with pytest.raises(InputError, match=r"ends in .fits or .fits.fz; received field.gz"):
        simulate.simulate_field(tmp_path / "field.gz", Field(128))


def test_a_mosaic_is_not_smaller_than_a_stamp(tmp_path):
    with pytest.raises(InputError, match="at least 128"):
        simulate.simulate_field(tmp_path / "field.fits", Field(64))
