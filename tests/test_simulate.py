import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import h5py
import numpy as np
import pytest
from astropy.io import fits
from astropy.nddata import overlap_slices
from astropy.table import Table
from astropy.wcs import WCS

from sersicnet import dataset
from sersicnet.dataset import Dataset
from sersicnet.engine.render import Renderer
from sersicnet.errors import InputError, OutputError, SersicnetWarning, WorkError
from sersicnet.image import mosaic
from sersicnet.image.pixels import Sky
from sersicnet.image.psf import full_width
from sersicnet.image.psffile import read_psf
from sersicnet.image.stamps import cut
from sersicnet.schema import TARGET_NAMES
from sersicnet.simulating import observatories, population
from sersicnet.simulating.field import Field, simulate_field
from sersicnet.simulating.recipe import FIT_COLUMNS, Prior, Simulation
from sersicnet.simulating.simulate import LEAST_BYTES, simulate
from sersicnet.simulating.stamps import OUT_OF_RANGE, draw_stamps, draw_truth, observe, observe_in_place
from sersicnet.simulating.telescopes import F160W, effective_psf


def test_psf_is_normalised_and_as_wide_as_measured():
    psf = effective_psf(F160W)
    assert psf.sum() == pytest.approx(1)
    assert full_width(psf) * F160W.pixel_scale == pytest.approx(0.19, abs=0.005)


def test_noise_has_the_rms_and_correlation_of_drizzled_images():
    noise = observe(np.zeros((800, 800)), 0.003, F160W, np.random.default_rng(1))
    noise -= noise.mean()
    assert noise.std() == pytest.approx(0.003, rel=0.01)
    assert (noise[:, 1:] * noise[:, :-1]).mean() / noise.var() == pytest.approx(0.52, abs=0.02)
    assert (noise[2:] * noise[:-2]).mean() / noise.var() == pytest.approx(0.08, abs=0.02)


def test_noise_of_a_large_aperture_is_larger_than_that_of_its_pixels():
    noise = observe(np.zeros((2000, 2000)), 1.0, F160W, np.random.default_rng(1))
    noise -= noise.mean()
    sums = noise.reshape(50, 40, 50, 40).sum(axis=(1, 3))
    assert sums.std() / 40 == pytest.approx(2.2, rel=0.07)


def test_noise_of_fine_pixels_is_convolved_twice():
    fine = replace(F160W, noise_tap=0.6, noise_passes=2, sky_residual=0.0)
    noise = observe(np.zeros((1000, 1000)), 1.0, fine, np.random.default_rng(1))
    assert noise.std() == pytest.approx(1, rel=0.01)
    for lag, expected in enumerate(fine.autocorrelation()[4, 5:], start=1):
        assert (noise[:, lag:] * noise[:, :-lag]).mean() == pytest.approx(expected, abs=0.02)
    sums = noise.reshape(25, 40, 25, 40).sum(axis=(1, 3))
    assert sums.std() / 40 == pytest.approx(fine.correlation, rel=0.1)


@pytest.mark.parametrize("passes", [1, 2])
def test_sources_add_their_poisson_noise(passes):
    bright = np.full((500, 500), 50.0)
    noise = observe(bright, 1e-6, replace(F160W, noise_passes=passes), np.random.default_rng(1)) - 50
    sums = noise.reshape(25, 20, 25, 20).sum(axis=(1, 3))
    assert sums.std() == pytest.approx(np.sqrt(400 * 50 / F160W.exposure), rel=0.1)


def test_the_sky_that_is_left_slopes_about_the_middle_of_the_stamp():
    sloping = replace(F160W, sky_residual=0.0, sky_slope=0.1)
    rng = np.random.default_rng(1)
    skies = np.array([observe(np.zeros((128, 128)), 1.0, sloping, rng) for _ in range(300)])
    assert skies[:, 62:67, 62:67].mean() == pytest.approx(0, abs=0.1)
    rises = skies[:, :, 118:].mean(axis=(1, 2)) - skies[:, :, :10].mean(axis=(1, 2))
    assert rises.std() == pytest.approx(0.1 * 118 / 20, rel=0.15)


@pytest.mark.parametrize("height", [255, 256, 257, 700])
@pytest.mark.parametrize("instrument", [F160W, replace(F160W, noise_passes=2, sky_slope=0.1)])
def test_a_large_image_is_observed_strip_by_strip_to_the_same_values(height, instrument):
    model = (np.random.default_rng(0).random((height, 30)) ** 20 * 30).astype(np.float32)
    expected = observe(model, 0.0035, instrument, np.random.default_rng(1))
    observe_in_place(model, 0.0035, instrument, np.random.default_rng(1))
    np.testing.assert_allclose(model, expected, rtol=0, atol=0 if instrument == F160W else 1e-8)


def test_the_file_does_not_depend_on_the_workers(tmp_path):
    simulation = Simulation(40, seed=3)
    paths = [simulate(tmp_path / f"{w}.h5", simulation, workers=w) for w in (1, 2)]
    with h5py.File(paths[0]) as one, h5py.File(paths[1]) as two:
        np.testing.assert_array_equal(one["stamps"][:], two["stamps"][:])
        np.testing.assert_array_equal(one["truth/mag"][:], two["truth/mag"][:])


def test_a_killed_run_continues_to_the_same_file(tmp_path):
    code = (
        "import os, sys\n"
        "from sersicnet.simulating.recipe import Simulation\n"
        "from sersicnet.simulating.simulate import simulate\n"
        "stop = lambda done: os.kill(os.getpid(), 9) if done >= 48 else None\n"
        "simulate(sys.argv[1], Simulation(80, seed=3), workers=1, progress=stop)\n"
    )
    path = tmp_path / "killed.h5"
    killed = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert killed.returncode == -9
    assert not path.exists()
    seen = []
    simulate(path, Simulation(80, seed=3), workers=1, progress=seen.append)
    assert seen == [48, 64, 80]
    simulate(tmp_path / "whole.h5", Simulation(80, seed=3), workers=1)
    with h5py.File(path) as one, h5py.File(tmp_path / "whole.h5") as two:
        np.testing.assert_array_equal(one["stamps"][:], two["stamps"][:])


def test_a_disk_that_fills_up_loses_nothing(tmp_path):
    code = (
        "import resource, sys\n"
        "from sersicnet.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
        "main(['simulate', '--n', '48', '--seed', '3', '--workers', '1', '-o', sys.argv[1]])\n"
    )
    path = tmp_path / "full.h5"
    full = subprocess.run([sys.executable, "-c", code, str(path)], check=False, capture_output=True, text=True)
    assert full.returncode == 1
    assert full.stderr.startswith(f"Error: {path}.run/stamps.journal could not be written: File too large.")
    assert "the same command continues" in full.stderr
    seen = []
    simulate(path, Simulation(48, seed=3), workers=1, progress=seen.append)
    assert seen == [16, 32, 48]
    with Dataset(path) as data:
        assert len(data) == 48


def killed_at_once(simulation):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr("sersicnet.simulating.simulate._start_work", killed_at_once)
    with pytest.raises(WorkError, match="worker process was killed"):
        simulate(tmp_path / "t.h5", Simulation(40), workers=2)
    assert not list(tmp_path.iterdir())


def test_a_script_without_a_guard_simulates(tmp_path):
    code = (
        "import sys\n"
        "from sersicnet.simulating.recipe import Simulation\n"
        "from sersicnet.simulating.simulate import simulate\n"
        "simulate(sys.argv[1], Simulation(20))\n"
    )
    (tmp_path / "script.py").write_text(code)
    subprocess.run([sys.executable, tmp_path / "script.py", tmp_path / "t.h5"], check=True)
    with Dataset(tmp_path / "t.h5") as data:
        assert len(data) == 20


def test_any_object_can_be_drawn_alone():
    simulation = Simulation(100, seed=3)
    together, _ = draw_stamps(simulation, np.arange(10))
    alone, _ = draw_stamps(simulation, np.array([7]))
    np.testing.assert_array_equal(together[7], alone[0])


def test_seeds_differ():
    one, _ = draw_stamps(Simulation(1, seed=1), np.array([0]))
    two, _ = draw_stamps(Simulation(1, seed=2), np.array([0]))
    assert not np.array_equal(one, two)


def test_draws_lie_within_the_prior():
    prior = Prior()
    truths = [draw_truth(Simulation(1, 0, prior), i)[0] for i in range(500)]
    for name in ("mag", "r_eff_pix", "sersic_n", "ellipticity"):
        values = np.array([t[name] for t in truths])
        low, high = getattr(prior, name)
        assert low <= values.min() < values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.05 * (high - low))


def test_log_radii_make_small_galaxies_common():
    def small(log_radii):
        simulation = Simulation(1, 0, Prior(log_radii=log_radii))
        return np.mean([draw_truth(simulation, i)[0]["r_eff_pix"] < 8 for i in range(500)])

    assert small(1.0) > 0.45 > 0.2 > small(0.0)


@pytest.mark.parametrize("index", range(6))
def test_a_simulated_stamp_cut_from_a_mosaic_is_itself(index):
    """No half pixel lies between training and use: both put a galaxy at the same pixels."""
    simulated, truth = draw_stamps(Simulation(1, 0, Prior(mag=(17, 17.1))), np.array([index]))
    canvas = np.zeros((400, 420), np.float32)
    canvas[100:228, 150:278] = simulated[0]
    position = np.array([150 + truth["x"][0]]), np.array([100 + truth["y"][0]])
    sky = Sky(np.zeros_like(canvas), np.full_like(canvas, truth["rms"][0]), np.ones((1, 1)), np.nan)
    stamp = cut(canvas, np.zeros(canvas.shape, bool), sky, *position).pixels[0]
    np.testing.assert_allclose(stamp * truth["rms"][0], simulated[0], rtol=1e-5)


def test_centres_of_training_and_cut_stamps_have_the_same_range():
    dithers = [draw_truth(Simulation(1), i)[0]["x"] for i in range(300)]
    x = np.linspace(150, 152, 41)
    image, one = np.zeros((400, 400), np.float32), np.ones((400, 400), np.float32)
    sky = Sky(image, one, np.ones((1, 1)), np.nan)
    found = cut(image, np.zeros(image.shape, bool), sky, x, 200 + 0 * x).x
    assert 63 <= min(dithers) < max(dithers) <= 64
    assert 63 < found.min() < found.max() <= 64
    starts = [overlap_slices((400, 400), (128, 128), (200, value))[0][1].start for value in x]
    np.testing.assert_allclose(found, x - starts)


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
    again, truth = simulate_field(tmp_path / "again.fits", Field(512, 14, 11, mag=(18.0, 22.0)))
    np.testing.assert_array_equal(mosaic.read_image(again).data, mosaic.read_image(field[0]).data)
    assert list(Table.read(truth)["mag"]) == list(field[1]["mag"])


def test_a_field_of_a_telescope_has_galaxies_and_stars_through_its_psf(tmp_path):
    sky = Field.of_telescope(400, "hsc/i", seed=3)
    path, truth = simulate_field(tmp_path / "hsc.fits", sky)
    image, objects = mosaic.read_image(path), Table.read(truth)
    star = np.array(objects["star"])
    assert 0 < star.sum() < len(objects) / 5
    assert np.isnan(np.array(objects["r_eff_pix"])[star]).all()
    assert np.isfinite(np.array([objects[name] for name in (*TARGET_NAMES, "theta")])[:, ~star]).all()
    assert len(objects) == pytest.approx(sky.count, abs=5 * np.sqrt(sky.count))
    assert observatories.camera_of(image.header) == ("HSC", "i")
    psf = read_psf(tmp_path / "hsc_psf.fits")
    assert psf.fwhm == pytest.approx(sky.psf.fwhm, rel=1e-3)
    # All light that the truth lists is in the image, but for what is beyond its border.
    counts = np.sum(10 ** (-0.4 * (np.array(objects["mag"]) - sky.instrument.zero_point)))
    assert image.data.sum() == pytest.approx(counts, rel=0.15)


def test_a_bright_galaxy_of_a_field_has_all_its_light(tmp_path, monkeypatch):
    galaxy = {"r_eff_pix": 7.0, "sersic_n": 3.0, "ellipticity": 0.2, "theta": 0.0, "x": 400.3, "y": 399.6}
    monkeypatch.setattr(population, "draw_neighbours", lambda *_, **__: [{"mag": 18.0, **galaxy}])
    sky = Field.of_telescope(800, "euclid-vis", seed=1)
    image = mosaic.read_image(simulate_field(tmp_path / "vis.fits", sky)[0]).data
    light = image[200:600, 200:600] - np.median(image)
    assert light.sum() == pytest.approx(10 ** (-0.4 * (18 - 30)), rel=0.01)


def test_a_star_of_a_field_is_the_psf(tmp_path, monkeypatch):
    star = {"mag": 18.0, "r_eff_pix": 0.02, "sersic_n": 1.0, "ellipticity": 0.0, "theta": 0.0, "x": 100.3, "y": 99.6}
    monkeypatch.setattr(population, "draw_neighbours", lambda *_, **__: [star])
    sky = Field.of_telescope(200, "euclid-vis", seed=1)
    image = mosaic.read_image(simulate_field(tmp_path / "vis.fits", sky)[0]).data
    model = Renderer(sky.psf.image, 200, sky.psf.oversampling)(
        np.array([100.3, 99.6, 10 ** (-0.4 * (18 - 30)), 0.02, 1, 1, 0])
    )[0]
    blank = np.ones_like(model, bool)
    blank[70:131, 70:131] = False
    assert np.std(image[blank]) == pytest.approx(sky.rms, rel=0.05)
    noise = np.hypot(sky.rms, np.sqrt(np.maximum(model, 0) / sky.instrument.exposure))
    assert np.abs((image - model)[~blank] / noise[~blank]).max() < 6


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
        simulate(path, Simulation(4))
    assert path.read_text() == "mine"


def test_no_stamps_are_refused(tmp_path):
    with pytest.raises(InputError, match="at least one stamp; received n = 0"):
        simulate(tmp_path / "train.h5", Simulation(0))
    with pytest.raises(InputError, match=r"is an HDF5 file; received train.fits.*`mosaic`"):
        simulate(tmp_path / "train.fits", Simulation(4))
    assert not list(tmp_path.iterdir())


def test_a_mosaic_is_called_fits(tmp_path):
    with pytest.raises(InputError, match=r"ends in .fits or .fits.fz; received field.gz"):
        simulate_field(tmp_path / "field.gz", Field(128))


def test_a_mosaic_is_not_smaller_than_a_stamp(tmp_path):
    with pytest.raises(InputError, match="at least 128"):
        simulate_field(tmp_path / "field.fits", Field(64))


# --- options ------------------------------------------------------------------------------------------


def test_without_options_the_recipe_is_what_it_was():
    """Runs and files of earlier versions go on: nothing is added to the configuration."""
    record = Simulation(5, seed=3).record()
    assert set(record) == {"n", "seed", "prior", "instrument", "psf_fwhm"}
    assert set(record["prior"]) == {"mag", "r_eff_pix", "sersic_n", "ellipticity", "log_radii"}
    assert Simulation(5).columns == dataset.TRUTH_COLUMNS


@pytest.fixture(scope="module")
def psf_files(tmp_path_factory):
    """Two PSFs, the second of them twice as wide."""
    folder = tmp_path_factory.mktemp("psf")
    for name, instrument in (("a", F160W), ("b", replace(F160W, blur=0.2))):
        fits.PrimaryHDU(effective_psf(instrument, 121)).writeto(folder / f"{name}.fits")
    return [folder / "a.fits", folder / "b.fits"]


def test_each_stamp_has_one_of_the_psfs(psf_files):
    plain, truth = draw_stamps(Simulation(12, prior=BRIGHT), np.arange(12))
    simulation = Simulation.of_options(12, psf=psf_files)
    images, with_psfs = draw_stamps(replace(simulation, prior=BRIGHT), np.arange(12))
    wide = with_psfs["psf"] == 1
    assert 0 < wide.sum() < 12
    for name in truth:
        np.testing.assert_array_equal(truth[name], with_psfs[name])
    sharpness = images.max(axis=(1, 2)) / plain.max(axis=(1, 2))
    assert sharpness[wide].max() < 0.85
    assert sharpness[~wide] == pytest.approx(1, abs=0.03)


BRIGHT = Prior(mag=(17.0, 18.0), r_eff_pix=(2.0, 3.0), sersic_n=(0.5, 1.5))


def test_the_psf_scatters_in_width():
    simulation = replace(Simulation.of_options(12, psf_scatter=0.15), prior=BRIGHT)
    images, truth = draw_stamps(simulation, np.arange(12))
    assert 0.85 <= truth["psf_stretch"].min() < 1 < truth["psf_stretch"].max() <= 1.15
    plain, _ = draw_stamps(replace(simulation, psf_scatter=0.0), np.arange(12))
    same = truth["psf_stretch"] == 1
    for i in range(12):
        assert np.array_equal(images[i], plain[i]) == same[i]
    widths = [full_width(effective_psf(F160W, stretch=f)) for f in (0.85, 1, 1.15)]
    assert widths[0] / widths[1] == pytest.approx(0.85, abs=0.01)
    assert widths[2] / widths[1] == pytest.approx(1.15, abs=0.01)
    assert simulation.record()["psf_scatter"] == 0.15


def test_a_changed_psf_is_another_recipe(psf_files, tmp_path):
    def run(**options):
        simulation = Simulation.of_options(20, psf=[tmp_path / "psf.fits"])
        simulate(tmp_path / "t.h5", simulation, workers=1, **options)

    class Stopped(Exception):  # noqa: N818
        pass

    def stop(done):
        if done:
            raise Stopped

    (tmp_path / "psf.fits").write_bytes(psf_files[0].read_bytes())
    with pytest.raises(Stopped):
        run(progress=stop)
    (tmp_path / "psf.fits").write_bytes(psf_files[1].read_bytes())
    with pytest.raises(InputError, match=r"with other options \(psfs; psf_fwhm: 0\.1\d*, now 0\.4\d*\)"):
        run()
    (tmp_path / "psf.fits").write_bytes(psf_files[0].read_bytes())
    run()
    with Dataset(tmp_path / "t.h5") as data:
        assert data.config["psfs"][0]["name"] == "psf.fits"
        assert data.config["psf_fwhm"] == pytest.approx(0.19, abs=0.005)
        assert set(data.truth["psf"]) == {0}


@pytest.fixture(scope="module")
def everything(psf_files, tmp_path_factory):
    """A simulation with every option of single galaxies."""
    image, _ = simulate_field(tmp_path_factory.mktemp("sky") / "sky.fits", Field(1000, seed=1))
    return Simulation.of_options(
        20, 7, prior="candels", psf=psf_files, noise_from=image, neighbours=True, centring=True
    )


def test_with_options_the_file_does_not_depend_on_the_workers(everything, tmp_path):
    paths = [simulate(tmp_path / f"{w}.h5", everything, workers=w) for w in (1, 2)]
    with h5py.File(paths[0]) as one, h5py.File(paths[1]) as two:
        np.testing.assert_array_equal(one["stamps"][:], two["stamps"][:])
        assert list(one["truth"]) == list(two["truth"])
        for name in one["truth"]:
            np.testing.assert_array_equal(one["truth"][name][:], two["truth"][name][:])
        config = json.loads(one.attrs["config"])
    assert config["prior"]["joint"]["name"] == "candels"
    assert config["prior"]["mag"] == [18.0, 25.0]
    assert config["neighbours"] is config["centring"] is True
    assert len(config["sky"]["sha256"]) == len(config["psfs"][1]["sha256"]) == 64
    assert config["instrument"]["rms_low"] == pytest.approx(0.0035, rel=0.05)


def test_with_options_any_object_can_be_drawn_alone(everything):
    together, truth = draw_stamps(everything, np.arange(3))
    alone, one = draw_stamps(everything, np.array([2]))
    np.testing.assert_array_equal(together[2], alone[0])
    assert {name: column[2] for name, column in truth.items()} == {name: column[0] for name, column in one.items()}


def test_noise_of_an_image_is_that_of_the_image(everything):
    simulation = replace(everything, prior=Prior(mag=(27.0, 27.1)), neighbours=False)
    images, truth = draw_stamps(simulation, np.arange(6))
    assert truth["rms"] == pytest.approx(0.0035, rel=0.05)
    assert images[:, :40].std() == pytest.approx(0.0035, rel=0.05)


def test_a_stamp_with_neighbours_is_what_measure_would_cut():
    """A bright, isolated galaxy keeps its place; what belongs to others is replaced, so that little is left."""
    simulation = Simulation(1, 2, Prior(mag=(20.0, 20.5), r_eff_pix=(4.0, 6.0), sersic_n=(1.0, 2.0)), neighbours=True)
    images, truth = draw_stamps(simulation, np.arange(8))
    assert np.hypot(truth["x"] - 63.5, truth["y"] - 63.5) == pytest.approx(0.4, abs=0.5)
    assert truth["neighbours"].max() > 0.02
    y, x = np.indices((128, 128))
    for image, rms, x0, y0 in zip(images, truth["rms"], truth["x"], truth["y"], strict=True):
        outside = np.hypot(x - x0, y - y0) > 40
        assert np.quantile(image[outside], 0.999) < 8 * rms
        assert image[round(y0), round(x0)] > 30 * rms


def test_the_galaxies_do_not_depend_on_their_neighbours():
    plain = Simulation(1, 2, Prior.candels())
    names = ("mag", "r_eff_pix", "sersic_n", "ellipticity", "theta", "rms")
    _, alone = draw_stamps(plain, np.arange(3))
    _, among = draw_stamps(replace(plain, neighbours=True), np.arange(3))
    for name in names:
        np.testing.assert_array_equal(alone[name], among[name])


@pytest.mark.parametrize("galaxies", ["sersic", "real-like"])
def test_the_prior_candels_reaches_a_depth(galaxies):
    simulation = Simulation.of_options(1, prior="candels", depth=27.0, galaxies=galaxies)
    assert simulation.prior.mag == (18, 27)
    magnitudes = [draw_truth(simulation, index)[0]["mag"] for index in range(400)]
    assert np.mean(np.array(magnitudes) < 20) == pytest.approx(2 / 9, abs=0.07)
    assert np.mean(np.array(magnitudes) > 25) == pytest.approx(2 / 9, abs=0.07)


def test_centres_scatter_as_those_of_detections():
    for mag, scale in ((19.0, 0.1), (24.5, 0.7)):
        prior = Prior(mag=(mag, mag + 0.1), r_eff_pix=(4.0, 6.0), sersic_n=(1.0, 2.0), ellipticity=(0.0, 0.3))
        _, dithered = draw_stamps(Simulation(1, 0, prior), np.arange(30))
        _, scattered = draw_stamps(Simulation(1, 0, prior, centring=True), np.arange(30))
        moved = np.concatenate([scattered["x"] - dithered["x"], scattered["y"] - dithered["y"]])
        assert 0.2 * scale < 1.48 * np.median(np.abs(moved)) < 2 * scale


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": "candels", "log_radii": 0.5}, "leave out either"),
        ({"depth": 26.0}, "`depth` is for"),
        ({"uniform": 0.3, "prior": "candels"}, "give both, or neither"),
        ({"uniform": 1.0, "prior": "candels", "depth": 26.0}, "from 0 to below 1; received 1.0"),
        ({"depth": 26.0, "prior": "table.csv"}, "`depth` is for"),
        ({"depth": 18.5, "prior": "candels"}, "from 19 to 27; received 18.5"),
        ({"zero_point": 25.0}, "`zero_point` is that of the image of `noise_from`"),
        ({"prior": "none.csv"}, "there is none"),
        ({"psf": ["none.fits"]}, "no such file"),
        ({"psf": ["none.fits"], "psf_scatter": 0.1}, "leave out either"),
        ({"psf_scatter": 0.7}, "a fraction from 0"),
        ({"noise_from": "none.fits"}, "no such file"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Simulation.of_options(10, **options)


@pytest.fixture(scope="module")
def real_like():
    simulation = Simulation.of_options(24, 1, galaxies="real-like")
    return simulation, *draw_stamps(simulation, np.arange(24))


def test_real_like_galaxies_are_labelled_by_a_fit(real_like):
    simulation, images, truth = real_like
    assert set(truth) == {*dataset.TRUTH_COLUMNS, "neighbours", *FIT_COLUMNS}
    drawn = [draw_truth(simulation, i)[0] for i in range(24)]
    good = truth["status"] == 0
    assert good.mean() > 0.7
    for name, width in (("mag", 0.5), ("r_eff_pix", 0.35), ("ellipticity", 0.2)):
        asked = np.array([galaxy[name] for galaxy in drawn])
        off = truth[name] - asked if name != "r_eff_pix" else np.log(truth[name] / asked)
        assert np.median(np.abs(off[good])) < width
        assert off[good].any()
        assert (truth[f"{name}_err"][good] > 0).all()
    assert np.isfinite(images).all()
    assert np.hypot(truth["x"] - 63.5, truth["y"] - 63.5)[good].max() < 8


def test_labels_without_noise_are_those_of_the_galaxy_alone(real_like):
    simulation, images, noisy = real_like
    faint = np.argsort([draw_truth(simulation, i)[0]["mag"] for i in range(24)])[-6:]
    alone = replace(simulation, noiseless_labels=True)
    assert Simulation.of_record(alone.record()).noiseless_labels
    stamps, clean = draw_stamps(alone, faint)
    np.testing.assert_array_equal(stamps, images[faint])  # only the labels differ
    np.testing.assert_array_equal(clean["neighbours"], noisy["neighbours"][faint])
    drawn = [draw_truth(simulation, int(i))[0] for i in faint]
    for name, width in (("mag", 0.3), ("r_eff_pix", 0.25), ("sersic_n", 0.6)):
        asked = np.array([galaxy[name] for galaxy in drawn])
        off = clean[name] - asked if name == "mag" else np.log(clean[name] / asked)
        assert np.median(np.abs(off)) < width


def test_labels_that_are_not_good_stay_out_of_training(real_like, tmp_path, monkeypatch):
    simulation, images, truth = real_like
    status = np.where(np.arange(24) % 4 == 0, OUT_OF_RANGE, truth["status"])
    monkeypatch.setattr(
        "sersicnet.simulating.simulate.draw_stamps",
        lambda s, rows: (images[rows], {**{k: v[rows] for k, v in truth.items()}, "status": status[rows]}),
    )
    path = simulate(tmp_path / "t.h5", simulation, workers=1)
    with Dataset(path) as data, Dataset(path, every=True) as whole:
        assert len(whole) == 24
        assert len(data) == np.sum(status == 0)
        assert data.config["galaxies"] == "real-like"
        np.testing.assert_array_equal(whole.truth["status"], status)


def test_labels_out_of_range_are_marked():
    prior = Prior(mag=(20.0, 20.1), r_eff_pix=(0.4, 0.5), sersic_n=(1.0, 1.1))
    _, truth = draw_stamps(Simulation(4, 0, prior, galaxies="real-like"), np.arange(4))
    small = truth["r_eff_pix"] < 1.3
    assert small.any()
    assert set(truth["status"][small]) <= {1, 2, OUT_OF_RANGE}


def test_galaxies_are_of_two_kinds():
    with pytest.raises(InputError, match="sersic or real-like; received spiral"):
        Simulation.of_options(10, galaxies="spiral")
    with pytest.raises(InputError, match="`log_radii` is for the uniform prior"):
        Simulation.of_options(10, galaxies="real-like", log_radii=0.5)
    with pytest.raises(InputError, match="`noiseless_labels` is for `galaxies='real-like'`"):
        Simulation.of_options(10, noiseless_labels=True)


@pytest.mark.parametrize(("limit", "uniform"), [(None, 0.0), (26.0, 0.0), (26.0, 0.5)])
def test_a_record_brings_back_the_galaxies_at_their_pixel_scale(limit, uniform):
    coarse = replace(F160W, pixel_scale=0.12)
    drawn = Simulation(8, seed=3, prior=Prior.candels(0.12, limit, uniform), instrument=coarse)
    again = Simulation.of_record(drawn.record())
    assert again.record() == drawn.record()
    assert [draw_truth(again, i)[0] for i in range(8)] == [draw_truth(drawn, i)[0] for i in range(8)]


def test_a_set_larger_than_the_disk_is_refused_at_once(tmp_path):
    with pytest.raises(OutputError, match=r"1,000,000,000,000 stamps need at least 24\.0 PB on disk; .* smaller `n`"):
        simulate(tmp_path / "a.h5", Simulation(10**12, seed=1))
    assert list(tmp_path.iterdir()) == []


def test_no_set_that_fits_is_refused(small_dataset):
    assert 2 * small_dataset.stat().st_size > 64 * LEAST_BYTES


def test_stamps_are_drawn_with_one_sample_per_pixel_of_the_psf_in_the_middle(tmp_path):
    fine = effective_psf(replace(F160W, pixel_scale=0.03), 123)
    fits.PrimaryHDU(fine, fits.Header({"OVERSAMP": 2})).writeto(tmp_path / "fine.fits")
    pair = fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(np.array([fine, fine], np.float32))])
    pair.append(fits.table_to_hdu(Table({"x": [0.0, 10], "y": [0.0, 10]})))
    pair.writeto(tmp_path / "varying.fits")
    (seen,) = Simulation.of_options(4, psf=[tmp_path / "fine.fits"]).psf_images()
    np.testing.assert_allclose(seen, fine[1::2, 1::2] / fine[1::2, 1::2].sum(), atol=1e-6)
    with pytest.warns(SersicnetWarning, match="varies over the image: the PSF in the middle of its field is used"):
        assert len(Simulation.of_options(4, psf=[tmp_path / "varying.fits"]).psf_images()) == 1


@pytest.mark.parametrize("passes", [1, 2])
def test_noise_is_correlated_with_itself_by_exactly_one(passes):
    """Fits of real-like galaxies refuse any other autocorrelation: one image in many hundred ended a simulation."""
    for tap in np.random.default_rng(0).uniform(0, 0.6, 3000):
        found = replace(F160W, noise_tap=tap, noise_passes=passes).autocorrelation()
        assert found[2 * passes, 2 * passes] == 1
