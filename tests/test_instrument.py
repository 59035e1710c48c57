import numpy as np
import pytest
from astropy.io import fits

from sersicnet.errors import InputError
from sersicnet.image.header import pixel_scale, zero_point
from sersicnet.image.mosaic import read_image

HST = {"PHOTFLAM": 1.9275602e-20, "PHOTPLAM": 15369.176, "BUNIT": "ELECTRONS/S"}


def read(tmp_path, cards, primary=None, scale=0.06):
    """Zero point of a file with a celestial WCS, its cards in the first extension, and others in the primary header."""
    wcs = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRPIX1": 10.5, "CRPIX2": 10.5, "CRVAL1": 53.1, "CRVAL2": -27.8}
    wcs |= {"CD1_1": -scale / 3600, "CD1_2": 0.0, "CD2_1": 0.0, "CD2_2": scale / 3600}
    science = fits.ImageHDU(np.ones((20, 20), np.float32), fits.Header(wcs | cards), name="SCI")
    fits.HDUList([fits.PrimaryHDU(header=fits.Header(primary or {})), science]).writeto(tmp_path / "image.fits")
    image = read_image(tmp_path / "image.fits")
    return zero_point(image.header, None, image.scales)


def test_hst_drizzled_f160w(tmp_path):
    cards = {"BUNIT": "ELECTRONS/S", "PHOTMODE": "WFC3 IR F160W", "PHOTZPT": -21.1, "PHOTFNU": 1.5e-7}
    primary = {"TELESCOP": "HST", "EXPTIME": 3211.0, "PHOTFLAM": 1.9275602e-20, "PHOTPLAM": 15369.176}
    value, source = read(tmp_path, cards, primary)
    assert value == pytest.approx(25.9463, abs=1e-3)
    assert source == "PHOTFLAM, PHOTPLAM"


@pytest.mark.parametrize("unit", ["ELECTRONS", "COUNTS", "ADU", "e-"])
def test_hst_counts_over_an_exposure_are_refused(tmp_path, unit):
    with pytest.raises(InputError, match=r"EXPTIME 3211\. Divide the image by its exposure time"):
        read(tmp_path, {**HST, "BUNIT": unit}, {"TELESCOP": "HST", "EXPTIME": 3211.0})


def test_jwst_i2d(tmp_path):
    area = {"PIXAR_SR": 2.11539874851881e-14, "PIXAR_A2": 0.0009}
    cards = {"BUNIT": "MJy/sr", "PHOTMJSR": 1.71, "PHOTUJA2": 40.2, **area}
    value, source = read(tmp_path, cards, {"TELESCOP": "JWST", "INSTRUME": "NIRCAM", "FILTER": "F200W"}, 0.03)
    assert value == pytest.approx(28.0865, abs=1e-3)
    assert source == "BUNIT, PIXAR_SR"


def test_jwst_with_the_area_in_square_arcsec(tmp_path):
    value, source = read(tmp_path, {"BUNIT": "MJy/sr", "PIXAR_A2": 0.0009}, scale=0.03)
    assert value == pytest.approx(28.0865, abs=1e-3)
    assert source == "BUNIT, PIXAR_A2"


def test_a_pixel_area_that_outlived_its_pixels_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"PIXAR_SR must agree with the WCS; received pixels of 0.0009 and 0.0036"):
        read(tmp_path, {"BUNIT": "MJy/sr", "PIXAR_SR": 2.11539874851881e-14}, scale=0.06)


def test_millijansky_are_not_megajansky():
    with pytest.raises(InputError, match=r"gives no zero point.*received mJy/sr"):
        zero_point({"BUNIT": "mJy/sr", "PIXAR_SR": 2.29e-14})


def test_euclid_mer_mosaic(tmp_path):
    cards = {"BUNIT": "ADU/s", "MAGZERO": 24.6, "EXPTIME": 565.0, "GAIN": 3.4, "SATURATE": 60000.0}
    assert read(tmp_path, cards, {"TELESCOP": "Euclid", "INSTRUME": "VIS"}, 0.1) == (24.6, "MAGZERO")


def test_rubin_coadd_and_hsc_coadd(tmp_path):
    assert read(tmp_path, {"EXTTYPE": "IMAGE", "BUNIT": "nJy"}, {"TELESCOP": "LSST"}, 0.2) == (31.4, "BUNIT")
    (tmp_path / "image.fits").unlink()
    value, source = read(tmp_path, {"EXTTYPE": "IMAGE"}, {"FLUXMAG0": 63095734448.0194}, 0.168)
    assert value == pytest.approx(27.0, abs=1e-9)
    assert source == "FLUXMAG0"


@pytest.mark.parametrize(
    ("unit", "value"),
    [
        ("nJy", 31.4), ("uJy", 23.9), ("Jy", 8.9), ("nJy / pixel", 31.4), ("nanomaggy", 22.5), ("nanomaggies", 22.5),
        ("10.0*nanoJansky", 28.9),
    ],
)  # fmt: skip
def test_units_of_flux_go_before_photflam(unit, value):
    found = zero_point({**HST, "BUNIT": unit})
    assert found.value == pytest.approx(value)
    assert found.source == "BUNIT"


@pytest.mark.parametrize("unit", ["mJy", "erg/s/cm2/A", "MJy/sr/pixel", "Jy/arcsec2", "1.2.3*nJy", "0*nJy"])
def test_photflam_is_not_for_an_unknown_unit_of_flux(unit):
    with pytest.raises(InputError, match="gives no zero point"):
        zero_point({**HST, "BUNIT": unit})
    assert zero_point({**HST, "BUNIT": unit, "MAGZERO": 16.4}) == (16.4, "MAGZERO")


@pytest.mark.parametrize("keyword", ["MAGZERO", "MAGZPT", "ZEROPNT", "ZP", "MAG_ZP", "PHOTZP"])
def test_plain_keywords(keyword):
    assert zero_point({keyword: 24.6}) == (24.6, keyword)


@pytest.mark.parametrize("card", [{"MAGSYS": "VEGA"}, {"PHOTSYS": "Vega mag"}, {"CASUVERS": "vircam v1.5"}])
def test_zero_points_of_vega_are_refused(card):
    with pytest.raises(InputError, match=r"must be an AB magnitude; .* Vega system"):
        zero_point({"MAGZPT": 23.0, **card})
    assert zero_point({"MAGZPT": 23.0, **card}, 23.9).value == 23.9
    assert zero_point({"MAGZPT": 23.0, "MAGSYS": "AB"}).value == 23.0


def test_option_goes_before_header():
    assert zero_point(HST, 20.0) == (20.0, "the user")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"PHOTFLAM": 0.0, "PHOTPLAM": 15369.0}, "must be positive; received 0"),
        ({"PHOTFLAM": 2e-20}, "must be positive"),
        ({"PHOTFLAM": "n/a", "PHOTPLAM": 1.0}, "should be a number; received 'n/a'"),
        ({**HST, "BUNIT": "ELECTRONS", "EXPTIME": 3000.0}, "Divide the image by its exposure time"),
        ({"BUNIT": "MJy/sr"}, "needs a positive PIXAR_SR .* or PIXAR_A2 .*; received None"),
        ({"BUNIT": "MJy/sr", "PIXAR_SR": 0.0, "PIXAR_A2": 0.0009}, "needs a positive PIXAR_SR .*; received 0.0"),
        ({"FLUXMAG0": 0.0}, "FLUXMAG0, the flux of magnitude 0, must be positive; received 0.0"),
        ({"FLUXMAG0": "n/a"}, "FLUXMAG0 in the header should be a number"),
        ({"PHOTFLAM": "Infinity", "PHOTPLAM": 15369.0}, "should be an AB magnitude"),
        ({"MAGZERO": 0.0}, "should be an AB magnitude"),
        ({"MAGZERO": -1.0}, "should be an AB magnitude from 0 to 60; received -1 from MAGZERO -1"),
        ({}, "gives no zero point"),
    ],
)
def test_a_zero_point_is_never_guessed(header, message):
    with pytest.raises(InputError, match=message):
        zero_point(header)


def test_a_nan_option_is_refused():
    with pytest.raises(InputError, match="finite"):
        zero_point({}, float("nan"))


def test_pixel_scale_is_the_geometric_mean():
    assert pixel_scale(np.array([0.05, 0.2])).value == pytest.approx(0.1)


def test_pixel_scale_unknown_is_nan():
    value, source = pixel_scale(None)
    assert np.isnan(value)
    assert source == "none"


@pytest.mark.parametrize("given", [0.0, -1.0, float("nan")])
def test_a_pixel_scale_is_positive(given):
    with pytest.raises(InputError, match="positive number of arcsec"):
        pixel_scale(None, given)
