import numpy as np
import pytest

from sersicnet.errors import InputError
from sersicnet.instrument import pixel_scale, zero_point

HST = {"PHOTFLAM": 1.9275602e-20, "PHOTPLAM": 15369.176, "BUNIT": "ELECTRONS/S"}


def test_hst_zero_point():
    value, source = zero_point(HST)
    assert value == pytest.approx(25.9463, abs=1e-3)
    assert source == "PHOTFLAM, PHOTPLAM"


def test_jwst_zero_point():
    value, source = zero_point({"BUNIT": "MJy/sr", "PIXAR_SR": 2.29e-14})
    assert value == pytest.approx(28.0, abs=0.01)
    assert source == "BUNIT, PIXAR_SR"


def test_nanojansky():
    assert zero_point({"BUNIT": "nJy"}) == (31.4, "BUNIT")


@pytest.mark.parametrize("keyword", ["MAGZERO", "MAGZPT", "ZEROPNT", "ZP", "MAG_ZP", "PHOTZP"])
def test_plain_keywords(keyword):
    assert zero_point({keyword: 24.6}) == (24.6, keyword)


def test_a_unit_of_flux_goes_before_photflam():
    assert zero_point({**HST, "BUNIT": "nJy"}) == (31.4, "BUNIT")


def test_option_goes_before_header():
    assert zero_point(HST, 20.0) == (20.0, "option --zero-point")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"PHOTFLAM": 0.0, "PHOTPLAM": 15369.0}, "must be positive; received 0"),
        ({"PHOTFLAM": 2e-20}, "must be positive"),
        ({"PHOTFLAM": "n/a", "PHOTPLAM": 1.0}, "should be a number; received 'n/a'"),
        ({**HST, "BUNIT": "ELECTRONS", "EXPTIME": 3000.0}, "Divide the image by its exposure time"),
        ({"BUNIT": "MJy/sr"}, "PIXAR_SR"),
        ({"MAGZERO": -1.0}, "should be an AB magnitude"),
        ({}, "tells no zero point"),
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
