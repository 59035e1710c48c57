"""The PSF as an object: its centre, its light, its variation over the image."""

import functools
import pickle

import galsim
import numpy as np
import pytest
from astropy.wcs import WCS

from sersicnet.errors import InputError, SersicnetWarning
from sersicnet.image.mosaic import HeldImage
from sersicnet.image.psf import CELL, Psf, core_of, full_width
from sersicnet.image.psffield import Nodes, Polynomial

PROFILES = {
    "gaussian": lambda fwhm: galsim.Gaussian(fwhm=fwhm),
    "moffat": lambda fwhm: galsim.Moffat(beta=2.5, fwhm=fwhm),
    "airy": lambda fwhm: galsim.Airy(lam_over_diam=fwhm / 1.029),
}


def drawn(profile, fwhm, size, scale=1.0, shift=(0, 0)):
    """A profile of that FWHM, integrated over square pixels of side 1, at samples `scale` apart."""
    wide = galsim.GSParams(maximum_fft_size=16384)
    seen = galsim.Convolve(PROFILES[profile](fwhm).shift(*shift), galsim.Pixel(1), gsparams=wide)
    return seen.drawImage(nx=size, ny=size, scale=scale, method="no_pixel", dtype=float).array


@pytest.mark.parametrize(
    ("profile", "fwhm"),
    [(profile, fwhm) for profile in PROFILES for fwhm in (1.2, 1.7, 3.2, 8.0) if (profile, fwhm) != ("airy", 8.0)],
)
def test_the_width_of_a_psf_is_that_of_the_continuous_profile(profile, fwhm):
    step = 0.05
    half = int(fwhm / step)
    fine = drawn(profile, fwhm, 2 * half + 1, step)
    angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    radii = np.arange(half)
    x, y = (np.rint(half + radii[:, None] * turn(angles)).astype(int) for turn in (np.cos, np.sin))
    mean = fine[y, x].mean(axis=1)
    truth = 2 * step * np.interp(-mean[0] / 2, -mean, radii)
    tolerance = 0.035 if (profile, fwhm) == ("airy", 1.2) else 0.01
    assert full_width(drawn(profile, fwhm, 41)) == pytest.approx(truth, rel=tolerance)


def test_the_width_of_an_oversampled_psf_is_in_pixels_of_the_image():
    coarse, fine = (Psf.of(drawn("moffat", 3, n, 1 / k), "x", k) for n, k in ((41, 1), (123, 3)))
    assert fine.fwhm == pytest.approx(coarse.fwhm, rel=0.005)


def test_the_width_does_not_depend_on_the_position_in_the_pixel():
    widths = [full_width(drawn("moffat", 3, 41, shift=by)) for by in ((0, 0), (0.3, 0.1), (0.5, 0.5))]
    np.testing.assert_allclose(widths, widths[0], rtol=0.01)


def test_a_psf_wider_than_its_image_has_the_width_of_the_image():
    assert full_width(np.ones((11, 11))) == 10


@pytest.mark.parametrize("oversampling", [1, 2])
@pytest.mark.parametrize("profile", PROFILES)
def test_the_light_within_a_radius_is_that_of_the_continuous_profile(profile, oversampling):
    radii = np.array([0.5, 1, 2, 3, 6, 15])
    fine = drawn(profile, 2.5, 411, 0.1)
    distance = np.hypot(*np.indices(fine.shape) - 205) * 0.1
    truth = [(fine * np.clip((r - distance) / 0.1 + 0.5, 0, 1)).sum() / fine.sum() for r in radii]
    psf = Psf.of(drawn(profile, 2.5, 41 * oversampling + oversampling - 1, 1 / oversampling), "x", oversampling)
    np.testing.assert_allclose(psf.encircled(radii), truth, atol=0.003)
    assert psf.encircled(100.0) == pytest.approx(1)
    assert psf.encircled(0.0) == 0


@pytest.mark.parametrize(("profile", "fwhm", "tolerance"), [("moffat", 3, 0.003), ("airy", 2.5, 0.001)])
@pytest.mark.parametrize("shift", [(0.5, 0.5), (0.2, -0.35), (-1.3, 2.1)])
def test_a_psf_off_the_middle_is_centred(profile, fwhm, tolerance, shift):
    check_centred(Psf.of(drawn(profile, fwhm, 41, shift=shift), "star"), drawn(profile, fwhm, 41), tolerance)


@pytest.mark.parametrize(("profile", "fwhm", "tolerance"), [("moffat", 1.5, 0.09), ("airy", 2, 0.03)])
def test_a_narrow_psf_is_centred_with_a_warning(profile, fwhm, tolerance):
    with pytest.warns(SersicnetWarning, match="one sample a pixel .* Give a PSF sampled twice a pixel or finer"):
        psf = Psf.of(drawn(profile, fwhm, 41, shift=(0.5, 0.5)), "star")
    check_centred(psf, drawn(profile, fwhm, 41), tolerance)


def check_centred(psf, truth, tolerance):
    core, half = core_of(psf.image), len(psf.image) // 2
    assert np.hypot(core.row - half, core.column - half) < 0.01
    error = psf.image[half - 10 : half + 11, half - 10 : half + 11] - truth[10:31, 10:31] / truth.sum()
    assert np.abs(error).max() < tolerance * truth.max()


def test_a_centred_psf_is_left_as_it_is():
    image = drawn("moffat", 2, 41)
    np.testing.assert_allclose(Psf.of(image, "star").image, image / image.sum(), rtol=1e-12)


def test_even_and_unequal_sides_are_padded_and_no_light_is_lost():
    image = drawn("moffat", 3, 40)  # its centre is between four pixels
    psf = Psf.of(image, "even")
    assert psf.image.shape == (41, 41)
    np.testing.assert_allclose(psf.image, drawn("moffat", 3, 41) / drawn("moffat", 3, 41).sum(), atol=2e-3)
    assert Psf.of(drawn("moffat", 3, 41)[3:-2, :-4], "cut").image.shape == (41, 41)


def test_the_ellipticity_is_that_of_the_core():
    shape = galsim.Shear(q=0.8, beta=30 * galsim.degrees)
    image = galsim.Gaussian(sigma=2.5).shear(shape).drawImage(nx=41, ny=41, scale=1, method="no_pixel").array
    assert Psf.of(image, "x").ellipticity == pytest.approx(0.2, abs=0.002)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((21, 21), -1.0), "positive sum"),
        (np.zeros((21, 21)), "positive sum"),
        (np.ones((21, 21)), "reaches at least a FWHM from its centre"),
        (np.random.default_rng(0).normal(1, 1, (64, 64)), "shows one star on zero background"),
        (drawn("moffat", 3, 41, shift=(-19, 0)), "reaches at least a FWHM from its centre; star is 41 x 41 .* x = 1"),
        (drawn("moffat", 3, 61) + drawn("moffat", 3, 61, shift=(15, 0)), "one star on zero background; .* of the peak"),
    ],
)
def test_an_image_that_is_no_psf_is_refused(image, message):
    with pytest.raises(InputError, match=message):
        Psf.of(image, "star")


# --- varying PSFs ---


@functools.cache
def elongated(along_x, size=31):
    """A PSF that is elongated along x by that factor."""
    seen = galsim.Convolve(galsim.Gaussian(sigma=1.4).transform(along_x, 0, 0, 1 / along_x), galsim.Pixel(1))
    image = seen.drawImage(nx=size, ny=size, scale=1, method="no_pixel", dtype=float).array
    return image / image.sum()


def with_x(span=1000.0):
    """A PSF that is round at x = 0, and rises to twice a slightly elongated one at x = `span`."""
    components = np.array([elongated(1.0), 2 * elongated(1.15)])
    return Psf.varying(components, Polynomial((0.0, 0.0), (span, span), ((0, 0), (1, 0))), "x")


def image_of(height, width, wcs=None):
    return HeldImage(np.zeros((height, width), np.float32), wcs=wcs, name="the image")


def test_a_polynomial_is_evaluated_at_the_position():
    psf = with_x()
    assert psf.varies
    assert not psf.at(10, 20).varies
    for x in (0, 300, 1000):
        expected = elongated(1.0) + x / 1000 * 2 * elongated(1.15)
        np.testing.assert_allclose(psf.at(x, 77.0).image, expected / expected.sum(), atol=1e-6)
    assert psf.at(1000, 0).ellipticity > psf.at(500, 900).ellipticity > psf.at(0, 500).ellipticity
    np.testing.assert_array_equal(psf.image, psf.at(0, 0).image)


def test_nodes_are_interpolated_linearly():
    images = np.array([elongated(f) for f in (0.9, 1.0, 1.1, 1.2)])
    grid = Psf.varying(images, Nodes(np.array([0.0, 100, 0, 100]), np.array([0.0, 0, 50, 50])), "grid")
    np.testing.assert_allclose(grid.at(25, 25).image, 0.375 * (images[0] + images[2]) + 0.125 * (images[1] + images[3]))
    np.testing.assert_allclose(grid.at(-30, 25).image, (images[0] + images[2]) / 2)  # beyond the border
    places = np.array([0.0, 100, 10, 90]), np.array([0.0, 5, 50, 70])
    weights = Nodes(*places).weights([30, 50, 400, -9], [20, 30, 60, -9])
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    np.testing.assert_allclose((weights @ places[0])[:2], [30, 50])
    np.testing.assert_allclose((weights @ places[1])[:2], [20, 30])
    assert weights[3].tolist() == [1, 0, 0, 0]
    assert weights.min() >= -1e-12


@pytest.mark.parametrize(("x", "y"), [([5.0], [5.0]), ([0.0, 10], [0.0, 10]), ([0.0, 5, 10], [0.0, 5, 10])])
def test_places_on_a_line_are_interpolated_along_it(x, y):
    weights = Nodes(np.array(x), np.array(y)).weights([0, 5, 20], [0, 5, 20])
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    np.testing.assert_allclose(weights @ np.array(x), np.clip([0, 5, 20], min(x), max(x)))


def test_a_constant_psf_has_one_cell():
    psf = Psf.of(drawn("moffat", 3, 41), "x")
    labels, psfs = psf.cells([1, 2000, np.nan], [3, 4000, 1])
    assert labels.tolist() == [0, 0, 0]
    assert psfs == [psf]
    assert psf.at(1, 2) is psf
    assert psf.on(image_of(64, 64)) is psf


def test_cells_are_those_of_a_grid_from_pixel_zero():
    psf = with_x().on(image_of(900, 900))
    x, y = [-0.4, 511.4, 511.6, 100, 600], [0, 511.4, 0, 600, 600]
    labels, psfs = psf.cells(x, y)
    assert labels.tolist() == [0, 0, 1, 2, 3]
    np.testing.assert_array_equal(psfs[0].image, psf.at(CELL / 2 - 0.5, CELL / 2 - 0.5).image)
    alone, one = psf.cells(x[2:3], y[2:3])
    assert alone.tolist() == [0]
    np.testing.assert_array_equal(one[0].image, psfs[1].image)
    assert psf.cells([], [])[1] == []


def test_beyond_the_image_the_psf_is_that_of_its_border():
    psf = with_x().on(image_of(900, 900))
    np.testing.assert_array_equal(psf.at(5000, 3).image, psf.at(899, 3).image)
    np.testing.assert_array_equal(psf.image, psf.at(449.5, 449.5).image)


def test_a_psf_can_be_sent_to_another_process():
    psf = with_x().on(image_of(900, 900))
    assert psf.fwhm > 0
    again = pickle.loads(pickle.dumps(psf))
    np.testing.assert_array_equal(again.at(100, 800).image, psf.at(100, 800).image)
    assert again.width == psf.width
    assert len(pickle.dumps(psf)) < 2.2 * psf.components.nbytes


def test_a_polynomial_that_is_no_psf_in_a_part_of_the_image_is_refused():
    wide = np.array([elongated(1.0), 300 * drawn("moffat", 9, 31)])
    psf = Psf.varying(wide, Polynomial((0.0, 0.0), (1000.0, 1000.0), ((0, 0), (8, 0))), "wild.psf")
    with pytest.raises(InputError, match=r"varies by less than a factor of 2 .* of wild.psf is .* of the image"):
        psf.on(image_of(900, 900))
    negative = Psf.varying(wide * [[[1]], [[-1]]], Polynomial((0.0, 0.0), (50.0, 50.0), ((0, 0), (1, 0))), "wild.psf")
    with pytest.warns(SersicnetWarning, match="reaches far beyond"), pytest.raises(InputError, match="positive sum"):
        negative.on(image_of(900, 900))


def nodes(x, y, sky=None):
    places = [np.array(v, float) for v in (x, y)]
    images = np.array([elongated(f) for f in (0.9, 1.0, 1.1, 1.2)])
    return Psf.varying(images, Nodes(*places, sky), "grid.fits")


def test_places_cover_the_image_or_say_that_they_do_not():
    inner = nodes([100, 500, 100, 500], [100, 100, 500, 500])
    assert inner.on(image_of(600, 600)).varies
    with pytest.warns(SersicnetWarning, match=r"end up to \d+ pixels inside the image"):
        inner.on(image_of(700, 850))
    with pytest.raises(InputError, match="are at x = 100 to 500, y = 100 to 500, and the image has 3000 x 3000 pixels"):
        inner.on(image_of(3000, 3000))
    with pytest.warns(SersicnetWarning, match="Is it the PSF of this image, or of one that it was cut out of"):
        inner.on(image_of(300, 300))


def test_places_on_the_sky_are_converted_by_the_image():
    wcs = WCS({"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 0.0, "CRVAL2": 10.0, "CRPIX1": 301.0,
               "CRPIX2": 301.0, "CDELT1": -1e-4, "CDELT2": 1e-4})  # fmt: skip
    x, y = np.array([0.0, 600, 0, 600]), np.array([0.0, 0, 600, 600])
    sky = np.column_stack(wcs.pixel_to_world_values(x, y))
    unknown = nodes(np.full(4, np.nan), np.full(4, np.nan), sky)
    with pytest.raises(InputError, match="right ascension and declination: use `on` of an image first"):
        unknown.at(1, 2)
    found = unknown.on(image_of(600, 600, wcs))
    np.testing.assert_allclose(found.at(150, 300).image, nodes(x, y).at(150, 300).image, atol=1e-9)
    with pytest.raises(InputError, match="no celestial WCS"):
        unknown.on(image_of(600, 600))


def test_the_ratio_of_pixel_scales_is_the_oversampling():
    fine = Psf.of(drawn("moffat", 3, 81, 0.5), "fine.fits")
    stated = Psf(fine.name, fine.sha256, fine.image, scale=0.1)
    assert stated.on(image_of(64, 64), 0.2).oversampling == 2
    assert stated.on(image_of(64, 64), 0.1005).oversampling == 1
    assert stated.on(image_of(64, 64)).oversampling == 1
    with pytest.raises(InputError, match=r"states 0.1 arcsec per pixel, the image has 0.15. Resample the PSF"):
        stated.on(image_of(64, 64), 0.15)


def test_an_oversampled_psf_is_sampled_once_a_pixel():
    coarse, fine = (Psf.of(drawn("moffat", 3, n, 1 / k), "x", k) for n, k in ((41, 1), (123, 3)))
    sampled = fine.at_pixel_scale()
    assert sampled.oversampling == 1
    np.testing.assert_allclose(sampled.image, coarse.image, atol=1e-4)
    assert coarse.at_pixel_scale() is coarse
    assert not with_x().at_pixel_scale().varies


def test_a_measured_psf_states_its_error_and_its_source():
    psf = Psf.of(drawn("moffat", 3, 41), "the stars of a.fits", source="31 stars", error=0.01)
    assert psf.width == (psf.fwhm, 0.01 * psf.fwhm, "31 stars")
    assert Psf.of(drawn("moffat", 3, 41), "data/star.fits").source == "star.fits"
