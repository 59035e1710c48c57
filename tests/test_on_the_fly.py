from dataclasses import replace

import numpy as np
import pytest

from sersicnet.dataset import Dataset
from sersicnet.errors import DatasetError
from sersicnet.image.psf import Psf
from sersicnet.image.views import psf_views
from sersicnet.schema import angle, noise_numbers
from sersicnet.simulating import world
from sersicnet.simulating.neighbours import camera, parameters
from sersicnet.simulating.recipe import PSF_STRETCHES, Simulation
from sersicnet.simulating.simulate import simulate
from sersicnet.simulating.stamps import draw_stamps, observe
from sersicnet.training import on_the_fly

SCATTERED = Simulation(20, seed=3, psf_scatter=0.15, centring=True)


def on_device(library, simulation):
    xp = pytest.importorskip(library)
    psfs = simulation.psf_images()
    return on_the_fly.OnDevice(psfs, np.array([psf_views(psf) for psf in psfs]), xp.asarray)


@pytest.fixture(scope="module")
def scattered(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("on_the_fly") / "s.h5", SCATTERED, workers=1)


def first(galaxies, size):
    inputs, targets = next(galaxies)
    assert inputs.stamps.shape == (size, 128, 128)
    return np.asarray(inputs.stamps), targets


def test_the_recipe_of_a_dataset_is_read_back(scattered):
    with Dataset(scattered) as data:
        assert Simulation.of_record(data.config, data.psf) == SCATTERED
        np.testing.assert_array_equal(data.psf, SCATTERED.psf_images())
        assert data.psf.shape == (PSF_STRETCHES, 167, 167)


def test_own_psfs_are_read_back(tmp_path):
    y, x = np.indices((21, 21)) - 10
    psfs = tuple(Psf(f"{s}.fits", f"{s}", np.exp(-(x**2 + y**2) / (2 * s**2)) / (2 * np.pi * s**2)) for s in (1.2, 2.0))
    own = Simulation(16, psfs=psfs)
    with Dataset(simulate(tmp_path / "own.h5", own, workers=1)) as data:
        again = Simulation.of_record(data.config, data.psf)
    assert [p.name for p in again.psfs] == ["1.2.fits", "2.0.fits"]
    np.testing.assert_allclose(draw_stamps(again, np.arange(2))[0], draw_stamps(own, np.arange(2))[0], atol=1e-4)
    with pytest.raises(DatasetError, match="before PSFs were kept"):
        Simulation.of_record(own.record(), None)


@pytest.mark.parametrize("library", ["numpy", "torch", "jax.numpy"])
def test_models_on_a_device_are_those_of_the_simulation(library):
    painter = on_device(library, SCATTERED)
    n = 12 if library == "numpy" else 4
    models, truth = painter.models(SCATTERED, np.arange(n))
    models = np.asarray(models)
    _, expected = draw_stamps(SCATTERED, np.arange(n))
    for name in expected:
        np.testing.assert_allclose(truth[name], expected[name], rtol=1e-5, err_msg=name)
    for i in range(n):
        row = np.array(parameters({n: c[i] for n, c in expected.items()}, SCATTERED.instrument))
        direct = camera(SCATTERED.instrument, expected["psf_stretch"][i]).render(row, 128)
        np.testing.assert_allclose(models[i], direct, atol=2e-5 * direct.max())


@pytest.mark.parametrize("library", ["numpy", "torch", "jax.numpy"])
def test_noise_on_a_device_is_that_of_the_instrument(library):
    simulation = Simulation(1, instrument=replace(SCATTERED.instrument, sky_residual=0.5))
    painter = on_device(library, simulation)
    rms = np.repeat([0.002, 0.006], 60)
    models = np.zeros((120, 128, 128), np.float32)
    models[:, 32:96, 32:96] = 0.3  # its photons have more noise than the sky
    seen = np.asarray(painter.observed(painter._asarray(models), rms, simulation, 7))
    rng = np.random.default_rng(0)
    expected = [observe(m, r, simulation.instrument, rng) / r for m, r in zip(models, rms, strict=True)]
    for found in (seen, np.array(expected)):
        blank = found[:, :28] - found[:, :28].mean(axis=(1, 2), keepdims=True)
        assert blank.std() == pytest.approx(1, abs=0.01)
        correlation = simulation.instrument.autocorrelation()
        for lag, product in ((3, blank[:, :, 1:] * blank[:, :, :-1]), (4, blank[:, :, 2:] * blank[:, :, :-2])):
            assert product.mean() == pytest.approx(correlation[2, lag], abs=0.01)
        assert found[:, :28].mean(axis=(1, 2)).std() == pytest.approx(0.5, rel=0.25)
    inside = np.s_[:, 40:88, 40:88]
    for half in (np.s_[:60], np.s_[60:]):
        noise = [
            (f[half][inside] - f[half][inside].mean(axis=(1, 2), keepdims=True)).std()
            for f in (seen, np.array(expected))
        ]
        assert noise[0] == pytest.approx(noise[1], rel=0.01)
    again = np.asarray(painter.observed(painter._asarray(models), rms, simulation, 7))
    np.testing.assert_array_equal(seen, again)


@pytest.mark.parametrize("library", [None, "torch", pytest.param("jax.numpy", marks=pytest.mark.slow)])
def test_a_galaxy_depends_on_seed_epoch_and_number_only(scattered, library, monkeypatch):
    monkeypatch.setattr(on_the_fly, "DEVICE_PORTION", 16)
    monkeypatch.setattr(on_the_fly, "PORTION", 16)
    asarray = None if library is None else pytest.importorskip(library).asarray
    with Dataset(scattered) as data, on_the_fly.OnTheFly(data, 1, asarray=asarray, workers=1) as galaxies:
        whole, targets = first(galaxies.galaxies(2, 0, iter([24])), 24)
        part, also = first(galaxies.galaxies(2, 18, iter([6])), 6)
        np.testing.assert_array_equal(part, whole[18:])
        np.testing.assert_array_equal(also, targets[18:])
        sizes = galaxies.galaxies(2, 0, iter([5, 12]))
        next(sizes)
        np.testing.assert_array_equal(np.asarray(next(sizes)[0].stamps), whole[5:17])
        other, _ = first(galaxies.galaxies(3, 0, iter([24])), 24)
        assert not (other == whole).all(axis=(1, 2)).any()
        assert whole[:, :10].std(axis=(1, 2)).min() == pytest.approx(1, abs=0.15)


def test_the_network_is_shown_psf_and_noise_of_each_galaxy(scattered):
    with Dataset(scattered) as data, on_the_fly.OnTheFly(data, 1, asarray=np.asarray) as galaxies:
        inputs, targets = next(galaxies.galaxies(0, 0, iter([20])))
        _, truth = galaxies._device.models(replace(SCATTERED, seed=on_the_fly._epoch_seed(1, 0)), np.arange(20))
        stored = data.inputs(0, 20)
    stretches = np.unique(truth["psf_stretch"], return_inverse=True)[1]
    for number in np.unique(stretches):  # one view a width
        assert (inputs.psf[stretches == number] == inputs.psf[stretches == number][:1]).all()
    assert (np.sort(truth["psf_stretch"]) == truth["psf_stretch"][np.argsort(-inputs.psf[:, 0, 15, 15])]).all()
    instrument = SCATTERED.instrument
    expected = noise_numbers(instrument.correlation, instrument.exposure * truth["rms"])
    np.testing.assert_allclose(inputs.noise, expected, rtol=1e-6)
    np.testing.assert_allclose(angle(targets[:, 4:]), truth["theta"], atol=1e-6)
    assert stored.psf.shape == inputs.psf.shape
    assert stored.noise.shape == inputs.noise.shape


def test_galaxies_of_many_telescopes_are_those_that_simulate_draws(tmp_path):
    recipe = world.simulation("hst-ir", 48, seed=4, centring=True)
    path = simulate(tmp_path / "w.h5", recipe, workers=1)
    with Dataset(path) as data, on_the_fly.OnTheFly(data, 1, workers=1) as galaxies:
        inputs, targets = next(galaxies.galaxies(3, 0, iter([40])))
        part, also = next(galaxies.galaxies(3, 21, iter([19])))
    again = replace(recipe, n=64, seed=on_the_fly._epoch_seed(1, 3))
    with Dataset(simulate(tmp_path / "again.h5", again, workers=1)) as data:
        stored = data.inputs(0, 40)
        np.testing.assert_allclose(targets[:, :4], data.targets[:40], rtol=1e-6)
        np.testing.assert_allclose(targets[:, 4:], data.orientation[:40], atol=1e-6)
    np.testing.assert_allclose(inputs.stamps, stored.stamps, atol=0.2)  # stored ones are rounded
    np.testing.assert_array_equal(inputs.psf, stored.psf)
    np.testing.assert_allclose(inputs.noise, stored.noise, rtol=1e-5)
    np.testing.assert_array_equal(part.stamps, inputs.stamps[21:])
    np.testing.assert_array_equal(also, targets[21:])


def test_faint_galaxies_can_be_left_out(scattered):
    with Dataset(scattered) as data, on_the_fly.OnTheFly(data, 1, faint_limit=23, asarray=np.asarray) as galaxies:
        _, truth = galaxies._device.models(galaxies.simulation, np.arange(50))
        assert truth["mag"].max() < 23
        with pytest.raises(DatasetError, match="no galaxy brighter than mag 12"):
            on_the_fly.OnTheFly(data, 1, faint_limit=12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"neighbours": True}, "neighbours take a tenth of a second"),
        ({"galaxies": "real-like"}, "real-like galaxies take"),
        ({"sky": {"name": "mosaic.fits"}}, "noise came from mosaic.fits, which the dataset does not hold"),
        ({"instrument": {"pixels": [], "fov": 1}}, "described in another way"),
    ],
)
def test_what_cannot_be_drawn_on_the_fly_is_told(scattered, change, message):
    with Dataset(scattered) as data:
        data.config.update(change)
        with pytest.raises(DatasetError, match=message):
            on_the_fly.OnTheFly(data, 0)


def test_a_table_of_galaxies_cannot_be_drawn_on_the_fly(scattered):
    with Dataset(scattered) as data:
        data.config["prior"]["joint"] = {"name": "mine.csv", "sha256": "0"}
        with pytest.raises(DatasetError, match=r"galaxies came from mine\.csv"):
            on_the_fly.OnTheFly(data, 0)
