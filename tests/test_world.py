from dataclasses import asdict

import numpy as np
import pytest

from sersicnet.dataset import BLOCK, Dataset
from sersicnet.errors import InputError
from sersicnet.image.psf import full_width
from sersicnet.schema import noise_numbers
from sersicnet.simulating import observatories, population, world
from sersicnet.simulating.simulate import simulate
from sersicnet.simulating.stamps import draw_stamps


@pytest.fixture(scope="module")
def any_telescope(tmp_path_factory):
    path = tmp_path_factory.mktemp("world") / "any.h5"
    return simulate(path, world.simulation("any", 2 * BLOCK + 4, 3, centring=True), workers=1)


def test_a_piece_depends_on_seed_and_number_only():
    one, again, other = (world.piece("any", 3, number) for number in (1, 1, 2))
    assert asdict(one.instrument) == asdict(again.instrument) != asdict(other.instrument)
    np.testing.assert_array_equal(one.views, again.views)
    np.testing.assert_array_equal(one.psf.image, again.psf.image)


def test_a_block_has_one_psf_and_another_block_another(any_telescope):
    with Dataset(any_telescope) as data:
        inputs = data.inputs(0, len(data))
        assert list(np.unique(data.truth["psf"])) == [0, 1, 2]
        for number in range(3):
            expected = world.piece("any", 3, number)
            block = slice(BLOCK * number, BLOCK * (number + 1))
            assert (inputs.psf[block] == expected.views).all()
            np.testing.assert_array_equal(
                inputs.noise[block],
                np.tile(noise_numbers(expected.correlation, expected.electrons), (len(inputs.psf[block]), 1)),
            )
            assert (data.truth["fwhm"][block] == expected.fwhm).all()
        assert data.psf is None
        assert np.isfinite(data.targets).all()


def test_a_batch_holds_the_psf_of_each_of_its_stamps(any_telescope):
    with Dataset(any_telescope) as data:
        for inputs, rows in data.batches(8, 0, len(data), np.random.default_rng(0)):
            for psf, row in zip(inputs.psf, rows, strict=True):
                assert (psf == data.views[int(data.truth["psf"][row])]).all()


def test_stamps_have_the_psf_and_the_noise_that_the_network_is_shown():
    piece = next(p for p in (world.piece("any", 0, number) for number in range(20)) if p.correlation > 1.5)
    simulation = piece.of(world.simulation("any", 400))
    stamps, truth = draw_stamps(simulation, np.arange(40))
    assert full_width(piece.psf.image, piece.psf.oversampling) == pytest.approx(piece.fwhm, rel=0.01)
    corners = stamps[:, :16, :16] / truth["rms"][:, None, None]
    faint = corners[np.abs(corners.mean(axis=(1, 2))) < 0.3]
    assert faint.std(axis=(1, 2)).mean() == pytest.approx(1, abs=0.1)
    lag = (faint[:, :, 1:] * faint[:, :, :-1]).mean() - faint.mean() ** 2
    autocorrelation = piece.instrument.autocorrelation()
    middle = len(autocorrelation) // 2
    assert lag == pytest.approx(autocorrelation[middle, middle + 1], abs=0.08)


def test_images_differ_in_what_the_subtraction_of_the_sky_left():
    instruments = [world.piece("any", 7, number).instrument for number in range(60)]
    left = np.array([instrument.sky_residual for instrument in instruments])
    usual = left == world.ANY.sky_residual
    assert 15 < usual.sum() < 45
    assert (left[~usual] > 0.02).all()
    assert (left[~usual] < 0.2).all()
    for instrument in instruments:
        level = instrument.sky_residual
        assert instrument.sky_slope == (0 if level == world.ANY.sky_residual else level / 2)
    assert {instrument.noise_passes for instrument in instruments} == {1, 2}
    assert max(instrument.correlation for instrument in instruments) > 2.9


def test_galaxies_are_of_every_size_and_signal_to_noise():
    fwhm, rms, correlation = 3.0, 0.01, 2.0
    prior = world.Galaxies(fwhm, 30.0, rms, correlation)
    rng = np.random.default_rng(0)
    drawn = [prior.draw(rng, population.FULL_RANGES) for _ in range(500)]
    mag, r_eff, e = (np.array([galaxy[name] for galaxy in drawn]) for name in ("mag", "r_eff_pix", "ellipticity"))
    area = 4 * np.pi * ((fwhm / 2.355) ** 2 + 0.5 * (1 - e) * r_eff**2)
    snr = 10 ** (-0.4 * (mag - 30.0)) / (rms * correlation * np.sqrt(area))
    assert 3 <= snr.min() < 5
    assert 10_000 < snr.max() <= 30_000
    assert 0.1 * fwhm <= r_eff.min() < 0.2 * fwhm
    assert 50 < r_eff.max() <= 64


def test_a_set_of_both_kinds_has_real_like_galaxies_and_neighbours_in_some_of_its_images(tmp_path):
    numbers = range(12)
    pieces = [world.piece("any", 5, number) for number in numbers]
    alone = next(n for n in numbers if not (pieces[n].real_like or pieces[n].crowded))
    real = next(n for n in numbers if pieces[n].real_like)
    simulation = world.simulation("any", 12 * BLOCK, 5, neighbours=True, galaxies="both")
    for number, real_like in ((alone, False), (real, True)):
        one = pieces[number].of(simulation)
        assert (one.real_like, one.neighbours) == (real_like, real_like and pieces[number].crowded)
        stamps, truth = draw_stamps(one, np.arange(number * BLOCK, number * BLOCK + 4))
        assert np.isfinite(stamps).all()
        assert ("status" in truth) == real_like
    path = simulate(tmp_path / "both.h5", world.simulation("sdss", BLOCK, 5, galaxies="both"))
    with Dataset(path, every=True) as data:
        assert "mag_err" in data.truth
        assert np.isfinite(data.targets).all()


def test_an_unknown_kind_of_galaxies_is_an_error():
    with pytest.raises(InputError, match="received 'spiral'"):
        world.simulation("any", 16, galaxies="spiral")


def test_a_filter_of_a_telescope_has_its_psf():
    found = [world.piece("hst-ir/F160W", 0, number) for number in range(6)]
    widths = np.array([p.fwhm * p.instrument.pixel_scale for p in found])
    assert (np.abs(widths - 0.19) < 0.04).all()


@pytest.mark.parametrize("name", ["nasa", "hst-ir/F999W"])
def test_an_unknown_telescope_or_filter_is_an_error(name):
    with pytest.raises(InputError, match="received"):
        world.simulation(name, 16)


def test_the_header_of_a_simulated_camera_names_it():
    for name, camera in observatories.TELESCOPES.items():
        for band in camera.wavelengths:
            cards = observatories.cards_of(f"{name}/{band}")
            assert observatories.known_psf(*cards.values(), camera.pixel_scales[0]) is not None, name
    assert observatories.cards_of("euclid-vis") == {"INSTRUME": "VIS", "FILTER": "VIS"}
    for several in ("hst-ir", "hst", "any", "mine.toml"):
        assert observatories.cards_of(several) == {}
