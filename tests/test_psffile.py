"""PSFs from files: each format gives the PSF that it describes."""

import functools
import re
import sys
import types
import warnings
from dataclasses import replace

import galsim
import galsim.des
import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from scipy import special

from sersicnet.engine.render import Renderer
from sersicnet.errors import InputError, SersicnetWarning
from sersicnet.image.exposure import Exposure
from sersicnet.image.mosaic import HeldImage
from sersicnet.image.psf import Psf, core_of
from sersicnet.image.psffield import Polynomial
from sersicnet.image.psffile import _without_pedestal, read_psf, write_psf
from sersicnet.image.views import psf_views
from sersicnet.measuring.fitting import Fitting
from sersicnet.measuring.measure import fit
from sersicnet.simulating.telescopes import F160W, effective_psf

WIDTH, HEIGHT = 1200, 1000


def drawn(x=0.0, size=41, samples=1, shift=(0, 0), pixel=1.0):
    """An effective PSF that is round at x = 0, and elongated along x by 20 % at the right border of the image.

    It is a sum of two Gaussian profiles, integrated over the pixel.
    """
    stretch = 1 + 0.1 * x / WIDTH
    places = (np.arange(size) - (size - 1) / 2) / samples
    out = np.zeros((size, size))
    for share, sigma in ((0.7, 1.3), (0.3, 2.6)):
        along = [integrated(places - by, sigma * f, pixel) for by, f in zip(shift, (stretch, 1 / stretch), strict=True)]
        out += share * np.outer(along[1], along[0])
    return out / out.sum()


def integrated(places, sigma, pixel):
    return special.ndtr((places + pixel / 2) / sigma) - special.ndtr((places - pixel / 2) / sigma)


def same(psf, x, y=400.0, atol=2e-4):
    """Compare with the PSF at a position, to a fraction of its peak."""
    here, samples = psf.at(x, y).image, psf.oversampling
    expected = drawn(x, len(here), samples)
    np.testing.assert_allclose(here / expected.max(), expected / expected.max(), atol=atol)


@pytest.fixture
def write(tmp_path):
    """Write HDUs or an image; returns a function of these, header cards and the name."""

    def to_file(data, cards=None, name="psf.fits"):
        hdus = data if isinstance(data, list) else [fits.PrimaryHDU(data, fits.Header(cards or {}))]
        fits.HDUList(hdus).writeto(tmp_path / name)
        return tmp_path / name

    return to_file


def image_of(wcs=None):
    return HeldImage(np.zeros((HEIGHT, WIDTH), np.float32), wcs=wcs, name="the image")


# --- images ---


def test_a_psf_is_read_and_normalised(write):
    psf = read_psf(write(7 * effective_psf(F160W, 41)))
    assert psf.image.sum() == pytest.approx(1)
    assert psf.fwhm * 0.06 == pytest.approx(0.19, abs=0.005)
    assert psf.width == (psf.fwhm, 0, "psf.fits")
    assert not psf.varies
    assert psf.error == 0


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("side", [40, 41])
def test_any_side_and_centre_is_read(write, side, samples):
    image = drawn(600, side, samples)[1:, 3:]
    shifted = drawn(600, 60, samples, shift=(2.3, -1.4))
    for k, one in enumerate((image, shifted)):
        psf = read_psf(write(1e5 * one, name=f"{k}.fits"), samples)
        core = core_of(psf.image)
        assert np.hypot(core.row - len(psf.image) // 2, core.column - len(psf.image) // 2) < 0.01
        same(psf, 600, atol=3e-3 if samples == 1 else 1e-3)


@pytest.mark.parametrize(
    ("cards", "samples"),
    [
        ({"PSF_SAMP": 0.5}, 2), ({"OVERSAMP": 2}, 2), ({"DET_SAMP": 2}, 2), ({"HIERARCH OVERSAMPLING": 2}, 2),
        ({"SAMPLING": 2}, 2), ({"SAMPLING": 0.5}, 2), ({"EXTNAME": "DET_SAMP", "DET_SAMP": 4}, 1), ({"OVERSAMP": 1}, 1),
    ],
)  # fmt: skip
def test_the_header_states_the_oversampling(write, cards, samples):
    psf = read_psf(write(drawn(0, 81, samples), cards))
    assert psf.oversampling == samples
    same(psf, 0, atol=1e-6)


def test_the_option_overrides_the_header(write):
    assert read_psf(write(drawn(0, 121, 3), {"OVERSAMP": 2}), 3).oversampling == 3


def test_a_sampling_that_is_no_whole_number_is_made_finer(write):
    psf = read_psf(write(drawn(0, 81, 1 / 0.7), {"PSF_SAMP": 0.7}))
    assert psf.oversampling == 2
    same(psf, 0, atol=1e-3)


@pytest.mark.parametrize(
    ("cards", "message"),
    [
        (
            {"PSF_SAMP": 2.0},
            r"PSF_SAMP is the number of pixels .* at most 1; that of .* is 2. .* `psf_oversampling`",
        ),
        ({"OVERSAMP": 0}, r"from 1; that of .* is 0"),
        ({"OVERSAMP": "four"}, r"OVERSAMP in the header of .* is a number; received 'four'"),
        ({"PSFLERR": -0.02}, r"PSFLERR in the header of .* is from 0 to 1; received -0.02"),
    ],
)
def test_a_sampling_that_cannot_be_right_is_refused(write, cards, message):
    with pytest.raises(InputError, match=message):
        read_psf(write(drawn(), cards))


def test_a_pixel_scale_in_the_header_is_compared_with_that_of_the_image(write):
    path = write(drawn(0, 81, 2), {"PIXELSCL": 0.05})
    assert read_psf(path, pixel_scale=0.1).oversampling == 2
    assert read_psf(path).on(image_of(), 0.1).oversampling == 2
    assert read_psf(path, 1, pixel_scale=0.1).oversampling == 1
    with pytest.raises(InputError, match="whole number of pixels of its PSF"):
        read_psf(path, pixel_scale=0.07)


def test_a_psf_of_stpsf_without_the_pixel_is_convolved_with_it(write):
    sub = drawn(0, 161, 4, pixel=0.25)  # integrated over its own fine pixels
    hdus = [fits.PrimaryHDU()]
    for name in ("OVERSAMP", "DET_SAMP", "OVERDIST", "DET_DIST"):
        image = sub if name == "OVERDIST" else np.ones((9, 9))
        cards = {"EXTNAME": name, "DET_SAMP": 4, "OVERSAMP": 4, "PIXELSCL": 0.02}
        hdus.append(fits.ImageHDU(image, fits.Header(cards)))
    with pytest.warns(SersicnetWarning, match="of STPSF, sampled 4 times a pixel, .* convolved"):
        psf = read_psf(write(hdus))
    assert psf.oversampling == 4
    same(psf, 0, atol=0.01)


def test_a_binned_psf_of_stpsf_is_effective(write):
    unit = fits.ImageHDU(drawn(), fits.Header({"EXTNAME": "DET_DIST", "DET_SAMP": 4, "OVERSAMP": 1, "PIXELSCL": 0.06}))
    assert read_psf(write([fits.PrimaryHDU(), unit])).oversampling == 1


def holed(row, column):
    image = drawn()
    image[row, column] = np.nan
    return image


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((21, 21), -1.0), "positive sum"),
        (np.zeros((21, 21)), "positive sum"),
        (np.full((21, 21), np.nan), "no finite pixel"),
        (holed(20, 24), r"finite pixels; 1 of .* are not, and some of these are within 3 FWHM of its centre"),
        (drawn(shift=(18, 0)), r"reaches at least a FWHM from its centre; .* is 41 x 41 pixels, its core is at x = 38"),
        (sum(drawn(0, 99, 1, shift) for shift in ((0, 0), (20, 9), (-30, 5), (9, -31))), "one star on zero background"),
        (np.zeros((5, 41, 41)), "a stack of 5 images and no table of 5 positions"),
    ],
)
def test_bad_psfs_are_refused(write, image, message):
    with pytest.raises(InputError, match=message):
        read_psf(write(image))


def test_missing_pixels_at_the_rim_are_zero_with_a_warning(write):
    with pytest.warns(SersicnetWarning, match="1 of 1681 pixels of .* are not finite: they are set to 0"):
        psf = read_psf(write(holed(1, 2)))
    same(psf, 0)


def test_light_that_is_negative_gives_a_warning(write):
    radius = np.hypot(*np.indices((41, 41)) - 20)
    with pytest.warns(SersicnetWarning, match=r"A PSF is positive; \d+ % of the light of .* is negative"):
        read_psf(write(drawn() - 3e-4 * ((radius > 6) & (radius < 12))))


def test_an_oversampling_below_one_is_refused(write):
    with pytest.raises(InputError, match="whole number from 1; received 0"):
        read_psf(write(drawn()), 0)


def test_an_oversampling_that_makes_the_psf_narrower_than_a_pixel_is_refused(write):
    with pytest.raises(InputError, match=r"at least 0\.5 pixels of the image wide; with an oversampling of 1000"):
        read_psf(write(drawn()), 1000)
    with pytest.raises(InputError, match="at most 16; received 40"):
        Renderer(drawn(), 64, oversampling=40)


@pytest.mark.parametrize("share", [-0.2, 0.3, 4.0])
def test_a_pedestal_is_subtracted_with_a_warning(write, share):
    psf = effective_psf(F160W, 41)
    raised = psf + share * psf.sum() / psf.size
    with pytest.warns(SersicnetWarning, match=r"has a pedestal of .* % of the flux of the rest, which is subtracted"):
        found = read_psf(write(raised))
    np.testing.assert_allclose(found.image.max(), psf.max() / psf.sum(), rtol=0.03)


def wide():
    profile = galsim.Convolve(galsim.Moffat(beta=2.5, fwhm=8), galsim.Pixel(1))
    return profile.drawImage(nx=25, ny=25, scale=1, method="no_pixel", dtype=float).array


@pytest.mark.parametrize("share", [-0.015, 0.01])
def test_the_wings_of_a_psf_are_no_pedestal(write, share):
    psf = effective_psf(F160W, 41)
    psf = psf + share * psf.sum() / psf.size
    np.testing.assert_allclose(read_psf(write(psf)).image, psf / psf.sum(), rtol=1e-6)
    with pytest.warns(SersicnetWarning, match=r"ends 1\.5 FWHM from the centre"):
        wings = read_psf(write(wide(), name="wide.fits"))
    np.testing.assert_allclose(wings.image, wide() / wide().sum(), rtol=1e-5)


def test_a_level_that_may_be_wing_or_background_is_refused(write):
    with pytest.raises(InputError, match="cannot be told from the wings of the PSF"):
        read_psf(write(wide() + 0.8 * wide().sum() / wide().size))


def test_the_psf_of_a_file_with_images_is_chosen_by_name(write):
    psf = effective_psf(F160W, 41)
    image = np.random.default_rng(0).normal(0, 1, (60, 60))
    hdus = [fits.PrimaryHDU(), fits.ImageHDU(image, name="IMAGE"), fits.ImageHDU(psf, name="PSF_R")]
    assert read_psf(write(hdus, name="one.fits")).fwhm == pytest.approx(3.1, abs=0.2)
    two = write([*hdus, fits.ImageHDU(psf, name="PSF_Z")], name="two.fits")
    with pytest.raises(InputError, match=r"more than one extension that is named a PSF: 2 PSF_R, 3 PSF_Z. Choose one"):
        read_psf(two)
    assert read_psf(f"{two}[PSF_Z]").image.shape == (41, 41)


@pytest.mark.parametrize(("fwhm", "side", "samples"), [(2, 41, 2), (3, 25, 1), (6, 63, 1)])
def test_the_rings_of_diffraction_are_no_pedestal(fwhm, side, samples):
    """The median of the outermost ring may be that of a bright one."""
    airy = obscured(fwhm, side, samples)
    np.testing.assert_allclose(_without_pedestal(airy, "airy"), airy)


def effective(profile, side, samples=1, off=(0, 0)):
    """A profile of GalSim with the pixel, as an image with its core off the middle, in samples."""
    seen = galsim.Convolve(profile, galsim.Pixel(1), gsparams=galsim.GSParams(maximum_fft_size=16384))
    options = {"nx": side, "ny": side, "scale": 1 / samples, "offset": off, "method": "no_pixel", "dtype": float}
    return seen.drawImage(**options).array


def obscured(fwhm, side, samples):
    """An Airy profile with a central obscuration, as a mean of 9 x 9 values in each pixel."""
    line = ((np.arange(side) - (side - 1) / 2)[:, None] / samples + (np.arange(9) - 4) / 9).ravel()
    radius = np.pi * 1.029 / fwhm * np.hypot(line[:, None], line)
    radius[radius == 0] = 1e-9
    light = (special.j1(radius) / radius - 0.33**2 * special.j1(0.33 * radius) / (0.33 * radius)) ** 2
    return light.reshape(side, 9, side, 9).mean(axis=(1, 3))


GALAXIES = np.array([[31.8, 32.3, 1, 2.0, 1, 0.6, 30], [31.8, 32.3, 1, 2, 4, 0.6, 30], [31.8, 32.3, 1, 8, 2, 0.6, 30]])


@functools.cache
def through(profile):
    """The `GALAXIES` as GalSim draws them through the profile and the pixel: (3, 64, 64)."""
    out = []
    for x, y, _, radius, n, q, angle in GALAXIES:
        galaxy = galsim.Sersic(n, half_light_radius=radius * np.sqrt(q)).shear(q=q, beta=angle * galsim.degrees)
        out.append(effective(galsim.Convolve(galaxy, profile), 64, off=(x - 31.5, y - 31.5)))
    return np.array(out)


@pytest.mark.parametrize(
    ("kind", "fwhm", "samples", "side", "off", "tolerance"),
    [
        ("moffat", 1.1, 2, 64, (0, 0), 0.002), ("moffat", 1.1, 2, 65, (0.3, -0.4), 0.002),
        ("moffat", 1.1, 4, 96, (0.25, 0.25), 0.002), ("moffat", 1.1, 5, 121, (0.5, 0.5), 0.002),
        ("moffat", 2.0, 1, 41, (0, 0), 0.005), ("moffat", 2.0, 1, 41, (0.5, 0.5), 0.012),
        ("moffat", 3.0, 1, 64, (0.3, -0.4), 0.002), ("moffat", 3.0, 1, 65, (0.5, 0.5), 0.002),
        ("moffat", 6.0, 1, 101, (0.25, 0.25), 0.002), ("airy", 1.1, 4, 257, (0.25, 0.25), 0.002),
        ("airy", 2.0, 2, 256, (0, 0), 0.002), ("airy", 2.5, 1, 128, (0.5, 0.5), 0.002),
        ("airy", 3.0, 1, 129, (0.3, -0.4), 0.002), ("airy", 6.0, 1, 129, (0.5, 0.5), 0.002),
        ("airy", 6.0, 2, 300, (0.3, -0.4), 0.002),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*when it is moved there")
def test_galaxies_through_a_file_are_those_that_galsim_draws(write, kind, fwhm, samples, side, off, tolerance):
    """Even and odd sides, cores off the middle, peaks of 1: pixels to a part of the peak, and moments.

    An Airy profile has light outside of any file, as a file's sum shows: galaxies through it are brighter by that.
    """
    airy = kind == "airy"
    profile = galsim.Airy(lam_over_diam=fwhm / 1.029) if airy else galsim.Moffat(beta=3, fwhm=fwhm)
    image = effective(profile, side, samples, off)
    light = image.sum() if airy else 1
    psf = read_psf(write(image / image.max()), samples)
    ours, theirs = light * Renderer(psf.image, 64, samples)(GALAXIES), through(profile)
    y, x = np.indices((64, 64)) - 32.0
    weight = np.exp(-(x**2 + y**2) / (2 * 8**2))
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a - b).max() < tolerance * b.max()
        assert a.sum() == pytest.approx(b.sum(), abs=3e-3)
        for term in (x, y, x * x, x * y, y * y):
            size = 1 if term is x or term is y else 2 * (weight * b * y * y).sum() / (weight * b).sum()
            moments = [(weight * one * term).sum() / (weight * one).sum() for one in (a, b)]
            assert moments[0] == pytest.approx(moments[1], abs=0.005 * size)


@pytest.mark.parametrize("off", [0, 0.5])
def test_a_narrow_psf_with_one_sample_a_pixel_gives_one_warning(write, off):
    image = effective(galsim.Moffat(beta=3, fwhm=1.5), 41, 1, (off, off))
    with pytest.warns(SersicnetWarning) as raised:
        read_psf(write(image))
    (message,) = [str(one.message) for one in raised]
    assert re.search(r"one sample a pixel and a FWHM of 1\.\d .* radii .* Give a PSF sampled twice a pixel", message)
    read_psf(write(effective(galsim.Moffat(beta=3, fwhm=1.5), 82, 2), name="fine.fits"), 2)


@pytest.mark.parametrize(("fwhm", "side", "samples"), [(1.5, 25, 4), (3.0, 15, 1)])
def test_a_psf_that_ends_in_its_core_gives_a_warning(write, fwhm, side, samples):
    with pytest.warns(SersicnetWarning, match=r"ends [12]\.\d FWHM from the centre of the PSF, where about \d+ % of"):
        read_psf(write(effective(galsim.Moffat(beta=3, fwhm=fwhm), side, samples)), samples)


# --- PSFEx ---


def psfex(images, powers, cards=None, samp=1.0):
    """A file of PSFEx; the coefficients are those of normalised positions."""
    column = fits.Column("PSF_MASK", f"{images.size}E", dim=str(images.shape[::-1]), array=images[None])
    unit = fits.BinTableHDU.from_columns([column], name="PSF_DATA")
    unit.header.update({
        "POLNAXIS": 2, "POLGRP1": 1, "POLNAME1": "X_IMAGE", "POLZERO1": 601.0, "POLSCAL1": 1200.0, "POLGRP2": 1,
        "POLNAME2": "Y_IMAGE", "POLZERO2": 501.0, "POLSCAL2": 1000.0, "POLNGRP": 1, "POLDEG1": powers, "PSF_SAMP": samp,
        "PSFNAXIS": 3, "PSFAXIS1": images.shape[2], "PSFAXIS2": images.shape[1], "PSFAXIS3": images.shape[0],
        **(cards or {}),
    })  # fmt: skip
    return [fits.PrimaryHDU(), unit]


def quadratic(size=41, samples=1):
    """Coefficients 1, x, x², y, xy, y² of the PSF of `drawn`, which varies along x only."""
    left, middle, right = (drawn(x, size, samples) for x in (0, 600, 1200))
    zero = np.zeros_like(middle)
    return np.array([middle, right - left, 2 * (right + left - 2 * middle), zero, zero, zero])


def test_psfex_gives_the_psf_at_the_position(write):
    path = write(psfex(quadratic(), 2), name="a.psf")
    psf = read_psf(path)
    assert psf.varies
    assert psf.oversampling == 1
    for x in (0, 300, 600, 1200):
        same(psf, x)
    assert psf.at(1200, 0).ellipticity == pytest.approx(psf.at(1200, 900).ellipticity)


def test_psfex_counts_pixels_from_one_and_has_the_values_that_galsim_reads(write):
    rng = np.random.default_rng(1)
    images = np.array([drawn(0, 31), *(1e-3 * rng.normal(size=(5, 31, 31)) * drawn(0, 31) / drawn(0, 31).max())])
    path = write(psfex(images, 2), name="a.psf")
    psf, other = read_psf(path), galsim.des.DES_PSFEx(str(path))
    for x, y in ((0, 0), (1100, 20), (333, 900)):
        ours = np.tensordot(psf.field.weights(x, y)[0], psf.components, 1)
        theirs = other.getPSFArray(galsim.PositionD(x + 1, y + 1))
        np.testing.assert_allclose(ours, theirs, atol=1e-7 * ours.max())


def test_psfex_may_be_sampled_finer_and_has_any_side(write):
    fine = read_psf(write(psfex(quadratic(81, 2), 2, samp=0.5), name="fine.psf"))
    assert fine.oversampling == 2
    same(fine, 1200)
    uneven = read_psf(write(psfex(quadratic(60, 1 / 0.7), 2, samp=0.7), name="uneven.psf"))
    assert uneven.oversampling == 2
    same(uneven, 300, atol=3e-3)
    coarse = read_psf(write(psfex(quadratic(41, 1 / 1.1), 2, samp=1.1), name="coarse.psf"))
    assert coarse.oversampling == 1
    same(coarse, 900, atol=3e-3)


def test_the_polynomial_of_psfex_ends_with_its_stars(write):
    psf = read_psf(write(psfex(quadratic(), 2), name="a.psf"))
    psf.on(HeldImage(np.zeros((1080, 1300), np.float32), name="a little wider"))
    wide = HeldImage(np.zeros((1000, 1400), np.float32), name="wide")
    with pytest.warns(SersicnetWarning, match=r"made for x = 600 ± 600, y = 500 ± 500; wide, .* reaches far beyond"):
        found = psf.on(wide)
    np.testing.assert_array_equal(found.at(1399, 0).image, found.at(9999, -50).image)  # the corner of the image


def test_the_groups_of_psfex_have_degrees_of_their_own(write):
    cards = {"POLNGRP": 2, "POLGRP2": 2, "POLDEG1": 2, "POLDEG2": 1}
    psf = read_psf(write(psfex(quadratic(), 2, cards), name="a.psf"))
    assert psf.field.powers == ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1))
    same(psf, 1200)


def test_psfex_may_vary_along_y_first(write):
    cards = {"POLNAME1": "YWIN_IMAGE", "POLNAME2": "XWIN_IMAGE", "POLZERO1": 501.0, "POLSCAL1": 1000.0,
             "POLZERO2": 601.0, "POLSCAL2": 1200.0}  # fmt: skip
    order = [0, 3, 5, 1, 4, 2]  # 1, y, y², x, xy, x²
    psf = read_psf(write(psfex(quadratic()[order], 2, cards), name="a.psf"))
    same(psf, 1200)
    same(psf, 0)


def test_psfex_without_variation_is_constant(write):
    psf = read_psf(write(psfex(drawn(0, 31)[None], 0), name="a.psf"))
    assert not psf.varies
    same(psf, 0)


@pytest.mark.parametrize(
    ("cards", "message"),
    [
        ({"POLNAME2": "MAG_AUTO"}, "is one of X_IMAGE and Y_IMAGE; .* has one of MAG_AUTO"),
        ({"POLNAME2": "X_IMAGE"}, "has one of X_IMAGE"),
        ({"PSF_SAMP": 0.0}, "states the sampling of a PSF in PSF_SAMP; .* lacks it"),
        ({"POLDEG1": 3}, "states 10 terms and has 6 images"),
    ],
)
def test_a_file_of_psfex_that_cannot_be_used_is_refused(write, cards, message):
    path = write(psfex(quadratic(), 2, cards), name="a.psf")
    with pytest.raises(InputError, match=message):
        read_psf(path)


def test_the_option_replaces_a_missing_sampling_of_psfex(write):
    hdus = psfex(quadratic(81, 2), 2)
    del hdus[1].header["PSF_SAMP"]
    path = write(hdus, name="a.psf")
    with pytest.raises(InputError, match=r"lacks it\. Add it, or give `psf_oversampling`"):
        read_psf(path)
    same(read_psf(path, 2), 600)


# --- grids ---

COLUMNS, ROWS = (0.0, 600, 1199), (0.0, 999)


def grid(samples, size):
    pairs = [(x, y) for y in ROWS for x in COLUMNS]
    return np.array([drawn(x, size, samples) for x, _ in pairs]) * samples**2, pairs


def test_stdpsf_is_a_grid_of_four_samples_a_pixel(write):
    images, _ = grid(4, 101)
    cards = {"NXPSFS": 3, "NYPSFS": 2}
    cards |= {f"IPSFX{i + 1:02d}": int(x) + 1 for i, x in enumerate(COLUMNS)}
    cards |= {f"JPSFY{i + 1:02d}": int(y) + 1 for i, y in enumerate(ROWS)}
    path = write(images, cards, "STDPSF_TEST_F606W.fits")
    psf = read_psf(path)
    assert psf.oversampling == 4
    assert psf.varies
    for x in (0, 600, 1199):
        same(psf, x)
    from photutils.psf import GriddedPSFModel

    theirs = GriddedPSFModel.read(path)
    x, y = 200.0, 300.0
    theirs.x_0, theirs.y_0 = x, y
    field = theirs(*np.meshgrid(x + np.arange(-3, 4), y + np.arange(-3, 4)))
    here = psf.at(x, y).image
    middle = len(here) // 2
    ours = here[middle - 12 : middle + 13 : 4, middle - 12 : middle + 13 : 4]
    np.testing.assert_allclose(ours / ours.sum(), field / field.sum(), atol=1e-3 * ours.max() / ours.sum())


def test_stdpsf_of_two_detectors_lists_positions_in_one_keyword(write):
    images, _ = grid(4, 141)
    cards = {"NXPSFS": 3, "NYPSFS": 2, "IPSFXA5": "1 601", "IPSFXB5": "1200", "JPSFYA5": "1", "JPSFYB5": "1000"}
    same(read_psf(write(images, cards)), 1199)
    with pytest.raises(InputError, match=r"states 4 positions in IPSFX01 .* has 3"):
        read_psf(write(images, {**cards, "NXPSFS": 4}, "bad.fits"))


@pytest.mark.parametrize("rows", [(0, 2048, 2048, 4096), (1, 2048, 2049, 4096)])
def test_stdpsf_of_two_detectors_jumps_at_their_gap(write, rows):
    places = [(x, below) for below in (0, 0, 1199, 1199) for x in (0, 600)]  # rows of one detector, and of the other
    images = np.array([drawn(x, 141, 4) for _, x in places]) * 16
    cards = {"NXPSFS": 2, "NYPSFS": 4, "IPSFX01": 1, "IPSFX02": 601}
    psf = read_psf(write(images, cards | {f"JPSFY{i + 1:02d}": y for i, y in enumerate(rows)}))
    for y, x in ((100, 0), (2040, 0), (2047, 0), (2048, 1199), (2060, 1199), (4000, 1199)):
        expected = np.pad(drawn(x, 141, 4), (len(psf.image) - 141) // 2)
        np.testing.assert_allclose(psf.at(300, y).image, expected / expected.sum(), atol=2e-5)


def test_a_grid_of_stpsf_lists_y_before_x(write):
    images, pairs = grid(2, 83)
    cards = {"OVERSAMP": 2, "DET_SAMP": 2} | {f"DET_YX{i}": f"({y}, {x})" for i, (x, y) in enumerate(pairs)}
    psf = read_psf(write(images, cards))
    assert psf.oversampling == 2
    for x in (0, 600, 1199):
        same(psf, x)
    assert psf.on(image_of()).varies
    with pytest.raises(InputError, match=r"DET_YX5 of .* is missing"):
        read_psf(write(images, {k: v for k, v in cards.items() if k != "DET_YX5"}, "bad.fits"))


# --- stamps with positions ---


def places(names, x, y):
    return [fits.Column(name, "D", array=v) for name, v in zip(names, (x, y), strict=True)]


SPOTS = (np.array([10.0, 1190, 15, 1150, 600]), np.array([10.0, 30, 960, 990, 500]))


def stamps(size=41):
    return np.array([drawn(x, size) for x in SPOTS[0]])


@pytest.mark.parametrize(
    ("names", "first"),
    [(("x", "y"), 0), (("X_CENTER", "Y_CENTER"), 0), (("X_IMAGE", "Y_IMAGE"), 1), (("xwin_image", "ywin_image"), 1)],
)
@pytest.mark.parametrize("kind", ["cube", "column"])
def test_stamps_have_a_table_of_positions(write, names, first, kind):
    where = places(names, *(v + first for v in SPOTS))
    if kind == "cube":
        hdus = [fits.PrimaryHDU(), fits.ImageHDU(3e4 * stamps()), fits.BinTableHDU.from_columns(where)]
    else:
        column = fits.Column("VIGNET", "1681E", dim="(41,41)", array=stamps())
        hdus = [fits.PrimaryHDU(), fits.BinTableHDU.from_columns([*where, column])]
    psf = read_psf(write(hdus))
    for x, y in zip(*SPOTS, strict=True):
        same(psf, x, y)
    same(psf, 300, 255, atol=2e-3)
    assert psf.on(image_of()).varies


def test_stamps_may_lie_on_the_sky(write):
    wcs = WCS({"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 150.0, "CRVAL2": 2.0, "CRPIX1": 601.0,
               "CRPIX2": 501.0, "CDELT1": -1e-5, "CDELT2": 1e-5})  # fmt: skip
    ra, dec = wcs.pixel_to_world_values(*SPOTS)
    table = fits.BinTableHDU.from_columns(places(("RA", "DEC"), ra, dec))
    psf = read_psf(write([fits.PrimaryHDU(), fits.ImageHDU(stamps()), table])).on(image_of(wcs))
    for x, y in zip(*SPOTS, strict=True):
        same(psf, x, y)


def test_stamps_side_by_side_with_their_places_on_the_sky_are_those_of_euclid(write):
    wcs = WCS({"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 150.0, "CRVAL2": 2.0, "CRPIX1": 601.0,
               "CRPIX2": 501.0, "CDELT1": -1e-5, "CDELT2": 1e-5})  # fmt: skip
    ra, dec = wcs.pixel_to_world_values(*SPOTS)
    side = 33
    tiled = np.zeros((2 * side, 3 * side))
    centres = [(i % 3, i // 3) for i in range(5)]
    for (i, j), stamp in zip(centres, stamps(side), strict=True):
        tiled[j * side : (j + 1) * side, i * side : (i + 1) * side] = stamp
    x, y = (np.array([c[k] for c in centres]) * side + side // 2 + 1.0 for k in (0, 1))
    table = fits.BinTableHDU.from_columns(
        [*places(("Ra", "Dec"), ra, dec), *places(("x_center", "y_center"), x, y), fits.Column("FWHM", "E", array=x)]
    )
    hdus = [fits.PrimaryHDU(), fits.ImageHDU(tiled, fits.Header({"STMPSIZE": side})), table]
    psf = read_psf(write(hdus)).on(image_of(wcs))
    for x, y in zip(*SPOTS, strict=True):
        same(psf, x, y)


def test_stamps_that_are_no_psf_are_left_out_with_a_warning(write):
    images = stamps()
    images[3] = -1e30
    hdus = [fits.PrimaryHDU(), fits.ImageHDU(images), fits.BinTableHDU.from_columns(places(("x", "y"), *SPOTS))]
    with pytest.warns(SersicnetWarning, match="1 of 5 images of .* are left out: image 3 of .* no finite pixel"):
        psf = read_psf(write(hdus))
    assert len(psf.components) == 4
    images[:] = np.nan
    hdus[1].data = images
    with pytest.raises(InputError, match="None of the 5 images of"):
        read_psf(write(hdus, name="none.fits"))


def test_stamps_without_positions_are_refused(write):
    table = fits.BinTableHDU.from_columns(places(("a", "b"), *SPOTS))
    with pytest.raises(InputError, match=r"columns x, y \(from 0\), .* has a, b"):
        read_psf(write([fits.PrimaryHDU(), fits.ImageHDU(stamps()), table]))


# --- Piff ---


def piff_file(write):
    one = fits.Column("type", "6A", array=["Simple"])
    units = [fits.BinTableHDU.from_columns([one], name=name) for name in ("psf", "psf_stars", "psf_wcs")]
    return write([fits.PrimaryHDU(), *units], name="a.piff")


def test_a_psf_of_piff_needs_piff(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "piff", None)
    with pytest.raises(InputError, match=re.escape("pip install 'sersicnet[piff]'")):
        read_psf(piff_file(write))


class Model:
    """What is used of a PSF of Piff, with its conventions."""

    interp_property_names = ("u", "v")

    def __init__(self):
        self.wcs = {0: None}
        self.stars = [
            types.SimpleNamespace(image_pos=galsim.PositionD(x + 1, y + 1)) for x, y in zip(*SPOTS, strict=True)
        ]

    def draw(self, x, y, center, offset, stamp_size):
        assert center is True
        return types.SimpleNamespace(array=drawn(x - 1, stamp_size, shift=offset))


def test_a_psf_of_piff_is_drawn_on_a_grid(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "piff", types.SimpleNamespace(read=lambda path: Model()))
    monkeypatch.setattr("sersicnet.image.psffile.PIFF_GRID", 3)
    monkeypatch.setattr("sersicnet.image.psffile.PIFF_SIDE", 41)
    psf = read_psf(piff_file(write))
    assert psf.oversampling == 2
    for x in (10, 600, 1190):
        same(psf, x)
    monkeypatch.setattr(Model, "interp_property_names", ("u", "v", "gi_color"))
    path = piff_file(lambda hdus, name: write(hdus, name="b.piff"))
    with pytest.raises(InputError, match=r"on the position only; that of .* also on gi_color"):
        read_psf(path)


def test_a_file_that_piff_wrote_gives_the_psf_that_piff_draws(tmp_path):
    """A profile whose width varies along x, fitted by Piff to stars on an image; its positions count from 1."""
    piff = pytest.importorskip("piff")
    image = galsim.ImageD(600, 600, scale=0.2)
    places = np.random.default_rng(1).uniform(30, 570, (40, 2))
    for x, y in places:
        bounds = galsim.BoundsI(round(x) - 25, round(x) + 25, round(y) - 25, round(y) + 25) & image.bounds
        star = galsim.Moffat(beta=3, fwhm=0.2 * (3 + x / 600), flux=1e5)
        image[bounds] += star.drawImage(galsim.ImageD(bounds, scale=0.2), center=galsim.PositionD(x, y))
    image.array[:] += np.random.default_rng(2).normal(0, 3, image.array.shape)
    image.write(str(tmp_path / "image.fits"))
    Table(places, names=("x", "y")).write(tmp_path / "stars.fits")
    files = {"image_file_name": str(tmp_path / "image.fits"), "cat_file_name": str(tmp_path / "stars.fits")}
    model, interpolated = {"type": "PixelGrid", "scale": 0.2, "size": 21}, {"type": "BasisPolynomial", "order": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Piff and what it uses
        piff.piffify(
            {
                "verbose": 0,
                "input": {**files, "x_col": "x", "y_col": "y", "noise": 9.0, "stamp_size": 31},
                "psf": {"type": "Simple", "model": model, "interp": interpolated},
                "output": {"file_name": str(tmp_path / "psf.piff")},
            }
        )
        theirs, ours = piff.read(str(tmp_path / "psf.piff")), read_psf(tmp_path / "psf.piff")
        for x, y in ((100, 300), (300, 100), (500, 480)):
            one, stamp = ours.at(x - 1.0, y - 1.0), theirs.draw(x, y, center=True, stamp_size=31).array
            middle = one.image[one.image.shape[0] // 2 % 2 :: 2, one.image.shape[0] // 2 % 2 :: 2]
            border = (len(middle) - 31) // 2
            middle = middle[border : border + 31, border : border + 31]
            assert np.abs(middle / middle.sum() - stamp / stamp.sum()).max() < 0.005 * (stamp / stamp.sum()).max()
            true = galsim.Convolve(galsim.Moffat(beta=3, fwhm=0.2 * (3 + x / 600)), galsim.Pixel(0.2))
            fine = true.drawImage(nx=127, ny=127, scale=0.1, method="no_pixel", dtype=float).array
            assert one.fwhm == pytest.approx(Psf.of(fine, "true", 2).fwhm, rel=0.03)


def test_a_constant_psf_that_is_written_is_read_again(tmp_path):
    psf = replace(Psf.of(drawn(samples=2), "mine", 2, error=0.03), light_error=0.02)
    write_psf(tmp_path / "p.fits", psf, (HEIGHT, WIDTH))
    again = read_psf(tmp_path / "p.fits")
    assert again.oversampling == 2
    assert (again.error, again.light_error) == (0.03, 0.02)
    np.testing.assert_allclose(again.image, psf.image, atol=1e-6)


def test_a_varying_psf_that_is_written_is_the_same_everywhere(tmp_path):
    middle = drawn(WIDTH / 2)
    field = Polynomial((WIDTH / 2, HEIGHT / 2), (WIDTH / 2, HEIGHT / 2), ((0, 0), (1, 0)))
    psf = Psf.varying(np.array([middle, drawn(WIDTH) - middle]), field, "mine")
    write_psf(tmp_path / "p.fits", psf, (HEIGHT, WIDTH))
    again = read_psf(tmp_path / "p.fits")
    assert again.varies
    for x, y in ((0.0, 0.0), (640.0, 100.0), (WIDTH - 1, HEIGHT - 1)):
        np.testing.assert_allclose(again.at(x, y).image, psf.at(x, y).image, atol=2e-3 * middle.max())


# --- all formats alike ---


def files_of_one_psf(write, wcs):
    """The same PSF, that of `drawn` at x = 600, as a file of each format."""

    def one(size, samples=1):
        return drawn(600, size, samples)

    columns, rows = (0, 110, 219), (0, 159)
    spots = np.array([2.0, 217, 3, 210, 110]), np.array([2.0, 5, 152, 158, 80])
    pairs = [(x, y) for y in rows for x in columns]
    std = {"NXPSFS": 3, "NYPSFS": 2} | {f"IPSFX{i + 1:02d}": x + 1 for i, x in enumerate(columns)}
    std |= {f"JPSFY{i + 1:02d}": y + 1 for i, y in enumerate(rows)}
    st = {"OVERSAMP": 2, "DET_SAMP": 2} | {f"DET_YX{i}": f"({y}, {x})" for i, (x, y) in enumerate(pairs)}
    stack = [fits.PrimaryHDU(), fits.ImageHDU(np.array([one(41)] * 5)), None]
    centres = np.array([[16.0, 49, 82, 16, 49], [16.0, 16, 16, 49, 49]])
    tiled = np.zeros((66, 99))
    for x, y in centres.T.astype(int):
        tiled[y - 16 : y + 17, x - 16 : x + 17] = one(33)
    sky = places(("Ra", "Dec"), *wcs.pixel_to_world_values(*spots))
    mer = fits.BinTableHDU.from_columns([*sky, *places(("x_center", "y_center"), *(centres + 1))])
    stack[2] = fits.BinTableHDU.from_columns(places(("x", "y"), *spots))
    terms = np.array([one(41), *np.zeros((5, 41, 41))])
    return {
        "image": write(1e3 * one(41), name="image.fits"),
        "oversampled": write(one(121, 3), {"OVERSAMP": 3}, "fine.fits"),
        "PSFEx": write(psfex(terms, 2), name="psfex.psf"),
        "STDPSF": write(np.array([one(161, 4)] * 6) * 16, std, "STDPSF.fits"),
        "STPSF": write(np.array([one(83, 2)] * 6), st, "stpsf.fits"),
        "stack": write(stack, name="stack.fits"),
        "MER": write([fits.PrimaryHDU(), fits.ImageHDU(tiled, fits.Header({"STMPSIZE": 33})), mer], name="mer.fits"),
    }


def test_a_psf_gives_the_same_catalogue_in_each_format(write):
    wcs = WCS({"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 150.0, "CRVAL2": 2.0, "CRPIX1": 111.0,
               "CRPIX2": 81.0, "CDELT1": -1e-5, "CDELT2": 1e-5})  # fmt: skip
    values = np.random.default_rng(0).normal(0, 1, (160, 220)).astype(np.float32)
    draw = Renderer(drawn(600), 100)
    values[30:130, 60:160] += draw(np.array([49.7, 50.2, 8000, 4, 1, 0.6, 30.0]))[0]
    image = Exposure.open(write(values, {**wcs.to_header(), "MAGZERO": 25.0}, "sky.fits"))
    found = {}
    for name, path in files_of_one_psf(write, wcs).items():
        table = fit(image, psf=read_psf(path), fitting=Fitting(gain=1e6, prior="none"))
        psf = read_psf(path).on(image.image, image.pixel_scale.value)
        found[name] = table, psf_views(psf.at(100, 80).image, psf.oversampling)
    first, views = found["image"]
    for name, (table, seen) in found.items():
        for column in ("mag", "r_eff", "sersic_n", "ellipticity", "theta"):
            assert np.abs((table[column] - first[column]) / first[f"{column}_err"]).max() < 0.01, (name, column)
        np.testing.assert_allclose(seen, views, atol=1e-3 * views.max(), err_msg=name)


def test_an_image_that_is_mostly_negative_is_no_psf(tmp_path):
    """A mosaic that was given as the PSF."""
    data = np.random.default_rng(0).normal(0, 1, (101, 101)).astype(np.float32)
    y, x = np.indices(data.shape) - 50
    data += 300 * np.exp(-(x**2 + y**2) / 6).astype(np.float32)
    fits.writeto(tmp_path / "mosaic.fits", data)
    with pytest.raises(InputError, match=r"A PSF is positive; .*mosaic.fits is none, \d+ % of its light is negative"):
        read_psf(tmp_path / "mosaic.fits")
