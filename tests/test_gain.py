"""Gain and noise maps of fits, saturation levels, and units with small numbers."""

import functools

import numpy as np
import pytest
from astropy.io import fits
from conftest import flat

from sersicnet.engine.fit import Fitter, Noise
from sersicnet.engine.render import parameters_of
from sersicnet.errors import InputError, SersicnetWarning
from sersicnet.image.psffile import read_psf
from sersicnet.measuring import measure as module
from sersicnet.schema import Flag
from sersicnet.simulating.telescopes import F160W, effective_psf

measure = functools.partial(flat, module.measure)


def write(path, data, header=None):
    fits.PrimaryHDU(data, header).writeto(path, overwrite=True)
    return path


@pytest.fixture(scope="module")
def psf_file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("psf") / "psf.fits", effective_psf(F160W))


@pytest.fixture(scope="module")
def refined(field, psf_file):
    return measure(field[0], refine=True, psf=psf_file, gain=F160W.exposure)


@pytest.fixture
def with_cards(field, tmp_path):
    """Write the field with other cards; returns a function of (cards)."""

    def write_it(**cards):
        with fits.open(field[0]) as hdus:
            unit = next(hdu for hdu in hdus if hdu.data is not None)
            header = unit.header.copy()
            header.update(cards)
            return write(tmp_path / "cards.fits", unit.data, header)

    return write_it


@pytest.mark.parametrize(
    ("cards", "stated"),
    [
        ({"INSTRUME": ""}, "no TELESCOP"),
        ({"TELESCOP": "CTIO 4.0-m telescope", "INSTRUME": "DECam"}, "TELESCOP CTIO 4.0-m telescope, INSTRUME DECam"),
        ({"TELESCOP": "HST", "INSTRUME": "ACS"}, "TELESCOP HST, INSTRUME ACS"),
        ({"INSTRUME": "WFC3"}, "INSTRUME WFC3"),
        ({"TELESCOP": "HST", "INSTRUME": "WFC3"}, None),
        ({"TELESCOP": "HST"}, None),
    ],
)
def test_the_gain_of_another_instrument_gives_a_warning(with_cards, psf_file, cards, stated):
    def gain():
        options = {"weights": "fovea-sky", "refine": True, "psf": psf_file}
        return flat(module.plan, with_cards(**cards), **options).fitting.gain

    if stated is None:
        assert gain() == pytest.approx(3200)
    else:
        with pytest.warns(SersicnetWarning, match=f"HST WFC3/IR F160W.*, 3200 electrons .* header states {stated}"):
            assert gain() == pytest.approx(3200)


def test_weights_of_any_telescope_know_no_gain(with_cards, psf_file):
    with pytest.warns(SersicnetWarning, match="No `gain` was given: fits ignore the Poisson noise"):
        assert flat(module.plan, with_cards(TELESCOP="HST"), refine=True, psf=psf_file).fitting.gain is None


def test_a_saturation_level_below_the_sky_is_ignored(with_cards):
    with pytest.warns(SersicnetWarning, match="SATURATE in the header .* should exceed the sky; received 1e-06"):
        found = measure(with_cards(SATURATE=1e-6))
    assert not (found["flags"] & Flag.SATURATED).any()
    assert not (measure(with_cards(SATURATE=0.0))["flags"] & Flag.SATURATED).any()


@pytest.fixture(scope="module")
def noisy(field, psf_file, tmp_path_factory):
    """The field with little sky noise and much photon noise, its map of the total noise, and its gain."""
    path, gain, sky = tmp_path_factory.mktemp("noisy"), 100.0, 0.003
    with fits.open(field[0]) as hdus:
        unit = next(hdu for hdu in hdus if hdu.data is not None)
        header, shape = unit.header.copy(), unit.data.shape
    truth = field[1]
    light = np.zeros(shape)
    render = Fitter(read_psf(psf_file).image, Noise(np.ones((1, 1))))
    for galaxy in parameters_of({name: truth[name] for name in truth.colnames}, 25.9463):
        corner = np.rint(galaxy[:2]).astype(int) - 128
        stamp = render.draw(galaxy - [*corner, 0, 0, 0, 0, 0], 256)
        (x0, y0), (x1, y1) = np.maximum(corner, 0), np.minimum(corner + 256, shape[::-1])
        light[y0:y1, x0:x1] += stamp[y0 - corner[1] : y1 - corner[1], x0 - corner[0] : x1 - corner[0]]
    variance = sky**2 + np.maximum(light, 0) / gain
    data = light + np.sqrt(variance) * np.random.default_rng(3).normal(size=shape)
    image, noise = write(path / "image.fits", data.astype("f4"), header), write(path / "noise.fits", np.sqrt(variance))
    return image, noise, gain


def test_photon_noise_in_a_map_is_counted_once(noisy, field, psf_file):
    image, noise, gain = noisy
    brightest = field[1][np.argsort(field[1]["mag"])[:7]]["x", "y"]
    options = {"refine": True, "psf": psf_file, "model_error": 0.0, "prior": "none", "positions": brightest}
    without = measure(image, gain=gain, **options)
    total = measure(image, noise=noise, noise_includes="total", **options)
    with pytest.warns(SersicnetWarning, match=r"rises with the light of sources.*`noise_includes='total'`"):
        twice = measure(image, noise=noise, gain=gain, **options)
    sky = measure(image, noise=noise, noise_includes="sky", gain=gain, **options)
    assert total.meta["NOISEHAS"] == "total"
    assert "GAIN" not in total.meta
    assert "NOISEHAS" not in twice.meta
    errors = []
    for table in (without, total, twice, sky):
        bright = table[(table["fit_status"] == 0) & (table["mag"].value < 21)]
        assert len(bright) >= 5
        errors.append(np.sort(bright["mag_err"].value / np.sqrt(np.maximum(bright["chi2"], 1)))[:5])
    np.testing.assert_allclose(errors[1], errors[0], rtol=0.1)
    assert np.median(errors[2] / errors[0]) > 1.2
    np.testing.assert_array_equal(errors[2], errors[3])


def test_a_gain_is_not_used_with_a_map_of_the_total_noise(noisy, psf_file):
    image, noise, gain = noisy
    with pytest.warns(SersicnetWarning, match="`gain` is not used"):
        plan = flat(module.plan, image, noise=noise, noise_includes="total", gain=gain, refine=True, psf=psf_file)
    assert plan.fitting.gain is None


def test_a_noise_map_as_given_is_not_scaled(noisy, tmp_path):
    image, noise, _ = noisy
    as_given = measure(image, noise=noise, noise_as_given=True)
    assert as_given.meta["MAPFACT"] == 1
    scaled = measure(image, noise=noise)
    assert 0.9 < scaled.meta["MAPFACT"] < 1.1
    fourfold = write(tmp_path / "fourfold.fits", 4 * fits.getdata(noise))
    with pytest.warns(SersicnetWarning, match=r"Blank pixels scatter 0\.2.* which is taken as it is"):
        found = measure(image, noise=fourfold, noise_as_given=True)
    assert len(found) < len(scaled)


@pytest.mark.parametrize("option", [{"noise_includes": "total"}, {"noise_as_given": True}])
def test_what_describes_a_noise_map_needs_one(field, option):
    with pytest.raises(InputError, match=r"`noise_.*` describes a noise map: give `noise`"):
        measure(field[0], **option)


def test_what_a_noise_map_includes_is_checked(field):
    with pytest.raises(InputError, match="one of sky, total; received all"):
        measure(field[0], noise_includes="all")


def test_fits_do_not_depend_on_the_unit(field, psf_file, refined, tmp_path):
    with fits.open(field[0]) as hdus:
        unit = next(hdu for hdu in hdus if hdu.data is not None)
        header, data = unit.header.copy(), unit.data.astype(float)
    header.remove("MAGZERO")
    for name, zero in (("maggy", 0.0), ("erg/s/cm2/Hz", -48.6), ("1e-20*Jy", 58.9)):
        header["BUNIT"], scale = name, 10 ** (-0.4 * (25.9463 - zero))
        path = write(tmp_path / "unit.fits", (data * scale).astype("f4"), header)
        found = measure(path, refine=True, psf=psf_file, gain=F160W.exposure / scale)
        np.testing.assert_array_equal(found["fit_status"], refined["fit_status"])
        np.testing.assert_array_equal(found["flags"], refined["flags"])
        np.testing.assert_allclose(found["mag"].value, refined["mag"].value, atol=1e-3)
        np.testing.assert_allclose(found["mag_err"].value, refined["mag_err"].value, rtol=1e-2)
        np.testing.assert_allclose(found["sky"].value / scale, refined["sky"].value, rtol=1e-2, atol=1e-6)
