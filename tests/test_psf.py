import galsim
import numpy as np
import pytest
from astropy.io import fits

from sersicnet.errors import InputError
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
