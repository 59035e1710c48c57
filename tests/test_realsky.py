from dataclasses import replace

import numpy as np
import pytest
from astropy.table import Table
from astropy.wcs import WCS

from sersicnet.engine.noise import photon_noise, tap_of
from sersicnet.errors import InputError, SersicnetWarning
from sersicnet.image import mosaic
from sersicnet.simulating import blank_sky as realsky
from sersicnet.simulating.field import Field, simulate_field
from sersicnet.simulating.telescopes import F160W


@pytest.fixture(scope="module")
def mosaic_file(tmp_path_factory):
    """A mosaic of 112 galaxies, and its truth."""
    return simulate_field(tmp_path_factory.mktemp("sky") / "mosaic.fits", Field(1000, seed=1))


@pytest.fixture(scope="module")
def sky(mosaic_file):
    return realsky.blank_sky(mosaic_file[0], F160W)


def test_blank_sky_has_the_noise_of_the_image(sky):
    assert realsky.LEAST_PATCHES <= len(sky.patches) <= realsky.MOST_PATCHES
    noise = np.concatenate([sky.draw(np.random.default_rng(i), 128)[0].ravel() for i in range(20)])
    assert noise.std() == pytest.approx(0.0035, rel=0.03)
    assert abs(noise.mean()) < 0.0002
    piece, rms = sky.draw(np.random.default_rng(0), 192)
    assert piece.shape == (192, 192)
    assert rms == pytest.approx(0.0035, rel=0.03)
    assert (piece[1:] * piece[:-1]).mean() / piece.var() == pytest.approx(0.52, abs=0.03)


def test_sources_are_not_in_the_blank_sky(sky, mosaic_file):
    assert Table.read(mosaic_file[1])["mag"].min() < 21
    assert sky.patches.max() < 7 * 0.0035


def test_pieces_of_blank_sky_differ(sky):
    pieces = {sky.draw(np.random.default_rng(i), 128)[0].tobytes() for i in range(50)}
    assert len(pieces) == 50


def test_noise_is_brought_to_the_zero_point_of_the_simulation(sky, mosaic_file):
    deeper = realsky.blank_sky(mosaic_file[0], F160W, F160W.zero_point + 2.5)
    np.testing.assert_allclose(deeper.rms, sky.rms / 10, rtol=1e-5)
    np.testing.assert_allclose(deeper.patches, sky.patches / 10, atol=1e-6)
    assert deeper.sha256 != sky.sha256


def test_an_image_without_blank_patches_gives_its_power_spectrum(mosaic_file, blank):
    small = blank(cards={"MAGZERO": F160W.zero_point}, data=mosaic.read_image(mosaic_file[0]).data[:300, :300])
    with pytest.warns(SersicnetWarning, match="blank patches of 224 x 224 pixels, 8 are needed"):
        sky = realsky.blank_sky(small, F160W)
    assert len(sky.patches) == 0
    noise, rms = sky.draw(np.random.default_rng(0), 192)
    assert rms == pytest.approx(0.0035, rel=0.1)
    assert noise.std() == pytest.approx(rms, rel=0.05)
    assert (noise[1:] * noise[:-1]).mean() / noise.var() == pytest.approx(0.52, abs=0.04)


def test_an_image_of_another_pixel_scale_is_a_warning(tmp_path, blank):
    header = WCS(naxis=2)
    header.wcs.ctype, header.wcs.cdelt = ["RA---TAN", "DEC--TAN"], [-1e-4, 1e-4]
    cards = header.to_header()
    cards["MAGZERO"] = 25.0
    with pytest.warns(SersicnetWarning) as caught:
        realsky.blank_sky(blank(cards=cards), F160W)
    assert any("0.36 arcsec per pixel, the simulation 0.06" in str(w.message) for w in caught)


def test_an_image_without_a_zero_point_is_refused(blank):
    with pytest.raises(InputError, match="gives no zero point"):
        realsky.blank_sky(blank(cards={}), F160W)


@pytest.mark.parametrize("correlation", [0.0, 0.01, 0.52, 0.7])
def test_a_tap_gives_the_correlation_of_next_neighbours_that_it_is_of(correlation):
    noise = replace(F160W, noise_tap=tap_of(correlation)).autocorrelation()
    assert noise[2, 3] == noise[3, 2] == pytest.approx(correlation, abs=1e-9)


def test_a_correlation_that_no_tap_gives_has_the_tap_of_the_nearest_that_has_one():
    assert tap_of(-0.1) == tap_of(np.nan) == 0.0
    assert tap_of(0.9) == tap_of(0.7) == pytest.approx(0.6133, abs=1e-4)


def test_photon_noise_is_that_of_the_simulation():
    bright = np.full((500, 500), 50.0)
    noise = photon_noise(bright, F160W.exposure, F160W.noise_tap, np.random.default_rng(1))
    sums = noise.reshape(25, 20, 25, 20).sum(axis=(1, 3))
    assert sums.std() == pytest.approx(np.sqrt(400 * 50 / F160W.exposure), rel=0.1)
