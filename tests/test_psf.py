import galsim
import numpy as np
import pytest
from astropy.io import fits

from sersicnet.engine.render import Renderer
from sersicnet.errors import InputError, SersicnetWarning
from sersicnet.image.psf import Psf, full_width, read_psf
from sersicnet.simulating.telescopes import F160W, effective_psf


@pytest.fixture
def psf_file(tmp_path):
    """Write a PSF; returns a function of the image and the name."""

    def write(image=None, name="psf.fits"):
        image = effective_psf(F160W, 41) if image is None else image
        fits.PrimaryHDU(image).writeto(tmp_path / name)
        return tmp_path / name

    return write


def test_a_psf_is_read_and_normalised(psf_file):
    psf = read_psf(psf_file(7 * effective_psf(F160W, 41)))
    assert psf.image.sum() == pytest.approx(1)
    assert psf.fwhm * 0.06 == pytest.approx(0.19, abs=0.005)
    assert psf.width == (psf.fwhm, 0, "psf.fits")


def off_centre():
    image = np.zeros((21, 21))
    image[10, 14] = 1
    return image


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.ones((20, 20)), "odd number of pixels a side, .* is 20 x 20"),
        (np.ones((21, 23)), "is 23 x 21"),
        (np.full((21, 21), -1.0), "positive sum"),
        (np.where(off_centre() == 0, np.nan, 1), "finite pixels"),
        (off_centre(), r"peak on the middle pixel \(10, 10\); that of .* is at x = 14, y = 10"),
    ],
)
def test_bad_psfs_are_refused(psf_file, image, message):
    with pytest.raises(InputError, match=message):
        read_psf(psf_file(image))


def test_an_oversampling_below_one_is_refused(psf_file):
    with pytest.raises(InputError, match="whole number from 1; received 0"):
        read_psf(psf_file(), 0)


def test_an_oversampling_that_makes_the_psf_narrower_than_a_pixel_is_refused(psf_file):
    with pytest.raises(InputError, match=r"at least 0\.5 pixels of the image wide; with an oversampling of 1000"):
        read_psf(psf_file(), 1000)
    with pytest.raises(InputError, match="at most 16; received 40"):
        Renderer(effective_psf(F160W, 41), 64, oversampling=40)


@pytest.mark.parametrize("share", [-0.2, 0.3, 4.0])
def test_a_pedestal_is_subtracted_with_a_warning(psf_file, share):
    psf = effective_psf(F160W, 41)
    raised = psf + share * psf.sum() / psf.size
    with pytest.warns(SersicnetWarning, match=r"has a pedestal of .* % of the flux of the rest, which is subtracted"):
        found = read_psf(psf_file(raised))
    np.testing.assert_allclose(found.image.max(), psf.max() / psf.sum(), rtol=0.03)


@pytest.mark.parametrize("share", [-0.015, 0.01])
def test_the_wings_of_a_psf_are_no_pedestal(psf_file, share):
    psf = effective_psf(F160W, 41)
    psf = psf + share * psf.sum() / psf.size
    np.testing.assert_allclose(read_psf(psf_file(psf)).image, psf / psf.sum(), rtol=1e-6)
    wide = drawn("moffat", 8, 25)
    np.testing.assert_allclose(read_psf(psf_file(wide, "wide.fits")).image, wide / wide.sum(), rtol=1e-5)


def test_a_level_that_may_be_wing_or_background_is_refused(psf_file):
    psf = drawn("moffat", 8, 25)
    with pytest.raises(InputError, match="cannot be told from the wings of the PSF"):
        read_psf(psf_file(psf + 0.8 * psf.sum() / psf.size))


def test_the_psf_of_a_file_with_images_is_chosen_by_name(tmp_path):
    psf = effective_psf(F160W, 41)
    image = np.random.default_rng(0).normal(0, 1, (60, 60))
    hdus = [fits.PrimaryHDU(), fits.ImageHDU(image, name="IMAGE"), fits.ImageHDU(psf, name="PSF_R")]
    fits.HDUList(hdus).writeto(tmp_path / "one.fits")
    assert read_psf(tmp_path / "one.fits").fwhm == pytest.approx(3.1, abs=0.2)
    fits.HDUList([*hdus, fits.ImageHDU(psf, name="PSF_Z")]).writeto(tmp_path / "two.fits")
    with pytest.raises(InputError, match=r"more than one extension that is named a PSF: 2 PSF_R, 3 PSF_Z. Choose one"):
        read_psf(tmp_path / "two.fits")
    assert read_psf(f"{tmp_path / 'two.fits'}[PSF_Z]").image.shape == (41, 41)


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
