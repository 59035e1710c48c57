import warnings

import numpy as np
import pytest
from astropy.io import fits

from sersicnet.errors import InputError, SersicnetWarning
from sersicnet.image.exposure import Exposure
from sersicnet.image.header import pixel_scale, unit_of, zero_point
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
    milli, mega = (zero_point({"BUNIT": unit, "PIXAR_SR": 2.29e-14}).value for unit in ("mJy/sr", "MJy/sr"))
    assert milli - mega == pytest.approx(22.5)


@pytest.mark.parametrize("unit", ["mjy/sr", "MJY"])
def test_a_prefix_that_the_letters_leave_open_is_refused(unit):
    with pytest.raises(InputError, match=f"gives no zero point.*received {unit}"):
        zero_point({"BUNIT": unit, "PIXAR_SR": 2.29e-14})


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
    with pytest.warns(
        SersicnetWarning, match=r"different zero points: .* from BUNIT is used, not 25\.9463 from PHOTFLAM"
    ):
        found = zero_point({**HST, "BUNIT": unit})
    assert found == (value, "BUNIT")


SPELLINGS = {
    0.0: "maggy maggies Maggies MAGGY mgy Mgy maggies/pixel",
    22.5: "nanomaggy nanomaggies NANOMAGGIES nMgy nmgy nano-maggy 1e-9*maggy 10**-9*maggies 1.0E-09*maggy",
    8.9: "Jy JY jansky Janskys Jy/pix",
    16.4: "mJy mjy millijansky milliJy MilliJansky",
    23.9: "uJy UJY ujy microjansky microJy [uJy]",
    31.4: "nJy njy nanojansky",
    28.9: "10.0*nanoJansky",
    1.4: "kJy",
    -6.1: "1e6*Jy",
    -48.6: "erg/s/cm2/Hz erg/s/cm^2/Hz ERG/S/CM2/HZ ergs/sec/cm**2/hertz erg.s-1.cm-2.Hz-1",
    -56.1: "W/m2/Hz watt.m-2.Hz-1",
}


@pytest.mark.parametrize(("value", "unit"), [(value, unit) for value, of in SPELLINGS.items() for unit in of.split()])
def test_spellings_of_units_of_flux(value, unit):
    assert zero_point({"BUNIT": unit}) == (value, "BUNIT")


@pytest.mark.parametrize(
    "unit", ["erg s-1 cm-2 Hz-1", "erg / (s cm2 Hz)", "erg cm**-2 s**-1 Hz**-1", "erg s^{-1} cm^{-2} Hz^{-1}"]
)
def test_spellings_with_blanks(unit):
    assert zero_point({"BUNIT": unit}) == (-48.6, "BUNIT")


SURFACE = {
    26.581369: "MJy/sr MJY/SR MJysr-1 MJy.sr-1 MJy.sr^-1 MJy/steradian MegaJansky/steradian",
    15.009244: "Jy/arcsec2",
    30.009244: "uJy/arcsec^2 uJy/arcsec**2 microJansky/sqarcsec uJy.arcsec-2",
    28.609244: "nmgy/arcsec2 nanomaggies/arcsec^2",
}


@pytest.mark.parametrize(("value", "unit"), [(value, unit) for value, of in SURFACE.items() for unit in of.split()])
def test_surface_brightness_takes_the_area_of_the_wcs(tmp_path, value, unit):
    found, source = read(tmp_path, {"BUNIT": unit}, scale=0.06)
    assert found == pytest.approx(value, abs=1e-6)
    assert source == "BUNIT, WCS"


def test_a_pixel_area_of_0_is_not_known(tmp_path):
    assert read(tmp_path, {"BUNIT": "MJy/sr", "PIXAR_SR": 0.0}).source == "BUNIT, WCS"


@pytest.mark.parametrize("unit", ["erg/s/cm2/A", "1E-17 erg/cm^2/s/Ang", "erg/s/cm2/Angstrom"])
def test_flux_per_wavelength_needs_the_wavelength(unit):
    photplam = 15369.176
    with pytest.raises(InputError, match="gives no zero point"):
        zero_point({"BUNIT": unit})
    value, source = zero_point({"BUNIT": unit, "PHOTPLAM": photplam})
    scale = 1e-17 if unit.startswith("1E-17") else 1.0
    # A flux density of f per Angstrom is f lambda^2 / c per Hz.
    assert value == pytest.approx(-48.6 - 2.5 * np.log10(scale * photplam**2 / 2.99792458e18), abs=1e-4)
    assert source == "BUNIT, PHOTPLAM"


@pytest.mark.parametrize("unit", ["Jy/beam", "MJy/sr/pixel", "1.2.3*nJy", "0*nJy", "erg/s", "Jy km/s"])
def test_photflam_is_not_for_an_unknown_unit_of_flux(unit):
    with pytest.raises(InputError, match="gives no zero point"):
        zero_point({**HST, "BUNIT": unit})
    with pytest.warns(SersicnetWarning, match=r"16\.4000 from MAGZERO is used, not 25\.9463 from PHOTFLAM, PHOTPLAM"):
        assert zero_point({**HST, "BUNIT": unit, "MAGZERO": 16.4}) == (16.4, "MAGZERO")


@pytest.mark.parametrize("header", [{"MAGZERO": 25.0}, {**HST, "BUNIT": ""}, {}])
@pytest.mark.parametrize(
    "unit",
    ["mag", "mag/arcsec2", "mag/arcsec^2", "mag arcsec-2", "MAG/SQARCSEC", "ABmag", "mag(AB)", "mag_AB", "STMAG",
     "magnitudes", "asinh", "arcsinh(nMgy)", "luptitude", "luptitudes", "log10(Jy)", "dex(Jy)", "AB"],
)  # fmt: skip
def test_units_that_are_not_linear_are_refused(header, unit):
    with pytest.raises(InputError, match="must be linear in flux; BUNIT is"):
        zero_point({**header, "BUNIT": unit})
    with pytest.raises(InputError, match="must be linear in flux; BUNIT is"):
        zero_point({**header, "BUNIT": unit}, 25.0)


def test_images_scaled_by_asinh_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"linear in flux; BSOFTEN .* asinh.*BOFFSET"):
        read(tmp_path, {"MAGZERO": 25.0, "BSOFTEN": 5.0, "BOFFSET": 0.1})
    with pytest.raises(InputError, match="linear in flux; STRETCH is 'asinh'"):
        zero_point({"MAGZERO": 25.0, "STRETCH": "asinh"})
    assert zero_point({"MAGZERO": 25.0, "STRETCH": "linear"}).value == 25.0


RATES = ["ELECTRONS/S", "electron / s", "electrons s-1", "e-/s", "e/s", "e-/sec", "E-/S", "counts/sec", "ct s**(-1)"]
RATES += ["counts per second", "cps", "photons/s", "ph/s", "DN/s", "ADU/s", "counts/s/pix"]


@pytest.mark.parametrize("unit", RATES)
def test_photflam_is_for_rates(unit):
    value, source = zero_point({**HST, "BUNIT": unit, "EXPTIME": 1000.0})
    assert value == pytest.approx(25.9463, abs=1e-4)
    assert source == "PHOTFLAM, PHOTPLAM"


def test_a_rate_in_another_time():
    value = zero_point({**HST, "BUNIT": "electrons/min"}).value
    assert value == pytest.approx(25.94634 + 2.5 * np.log10(60), abs=1e-4)


COUNTS = "ct cts CTS cnts count counts photon photons ph phot e e- E- electron electrons photo-electrons ADU adus DN"
COUNTS += " DNs counts/pixel UNITLESS electrons/exposure ct*s"


@pytest.mark.parametrize("unit", COUNTS.split())
def test_counts_by_any_name_are_refused(unit):
    with pytest.raises(InputError, match=r"EXPTIME 1000\. Divide the image by its exposure time"):
        zero_point({**HST, "BUNIT": unit, "EXPTIME": 1000.0, "MAGZERO": 25.9463})
    assert zero_point({**HST, "BUNIT": unit, "EXPTIME": 1.0}).source == "PHOTFLAM, PHOTPLAM"


def test_photflam_without_a_unit_is_doubtful():
    header = {"PHOTFLAM": HST["PHOTFLAM"], "PHOTPLAM": HST["PHOTPLAM"]}
    assert zero_point(header).value == pytest.approx(25.9463, abs=1e-4)
    with pytest.warns(SersicnetWarning, match=r"states no BUNIT, and EXPTIME is 1000"):
        zero_point({**header, "EXPTIME": 1000.0})


@pytest.mark.parametrize("keyword", ["MAGZERO", "MAGZPT", "PHOTZP"])
@pytest.mark.parametrize(
    "unit", [{}, {"BUNIT": "counts"}, {"BUNIT": "ELECTRONS"}, {"BUNIT": "DN"}, {"BUNIT": "UNITLESS"}]
)
def test_a_zero_point_of_counts_beside_an_exposure_time_is_doubtful(unit, keyword):
    header = {keyword: 25.0, "EXPTIME": 1000.0, **unit}
    said = rf"{keyword} 25 is taken for one image unit .*EXPTIME is 1000.* give `zero_point` 32\.5\.$"
    with pytest.warns(SersicnetWarning, match=said):
        assert zero_point(header) == (25.0, keyword)
    assert zero_point(header, 32.5) == (32.5, "the user")
    for certain in ({"BUNIT": "ELECTRONS/S"}, {"BUNIT": "counts/min"}, {"EXPTIME": 1.0}, {"EXPTIME": 0.0}):
        assert zero_point({**header, **certain}) == (25.0, keyword)


@pytest.mark.parametrize("header", [{"FLUXMAG0": 1e10}, {"BUNIT": "nJy"}, {"SURVEY": "LegacySurvey"}])
def test_a_zero_point_that_is_of_the_image_unit_needs_no_exposure_time(header):
    assert zero_point(header) == zero_point({**header, "EXPTIME": 1000.0})


@pytest.mark.parametrize("exposure", ["n/a", None, True])
def test_an_exposure_time_that_is_no_number_raises_no_doubt(exposure):
    assert zero_point({"MAGZERO": 25.0, "EXPTIME": exposure}) == (25.0, "MAGZERO")


@pytest.mark.parametrize(
    ("header", "used", "others"),
    [
        ({**HST, "MAGZERO": 25.0}, "25.9463 from PHOTFLAM, PHOTPLAM", "25.0000 from MAGZERO"),
        ({"BUNIT": "nJy", "MAGZERO": 25.0, "ZP": 27.0}, "31.4000 from BUNIT", "25.0000 from MAGZERO, 27.0000 from ZP"),
        ({"MAGZERO": 25.0, "ZP": 25.02}, "25.0000 from MAGZERO", "25.0200 from ZP"),
        ({"FLUXMAG0": 1e10, "MAGZPT": 30.0}, "25.0000 from FLUXMAG0", "30.0000 from MAGZPT"),
        ({"SURVEY": "LegacySurvey", "MAGZERO": 25.0, "PHOTZP": 22.5}, "25.0000 from MAGZERO", "22.5000 from PHOTZP"),
        ({"BUNIT": "maggy", "MAGZERO": 25.0}, "0.0000 from BUNIT", "25.0000 from MAGZERO"),
    ],
)
def test_zero_points_that_contradict_each_other_give_a_warning(header, used, others):
    with pytest.warns(SersicnetWarning, match=f"{used} is used, not {others}. Give `zero_point`"):
        value = zero_point(header).value
    assert f"{value:.4f}" == used.split()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert zero_point(header, 24.0).value == 24.0


@pytest.mark.parametrize(
    "header",
    [
        {**HST, "MAGZERO": 25.9463}, {"MAGZERO": 25.0, "ZP": 25.001}, {"BUNIT": "nJy", "MAGZERO": 31.4},
        {"BUNIT": "nJy", "MAGZPT": 23.0, "CASUVERS": "vircam v1.5"}, {"BUNIT": "nJy", "MAGZERO": "n/a"},
    ],
)  # fmt: skip
def test_zero_points_that_agree_or_are_of_no_use_give_none(header):
    zero_point(header)


def test_a_zero_point_of_0_is_that_of_maggies(tmp_path):
    assert read(tmp_path, {"BUNIT": "maggy", "MAGZERO": 0.0}) == (0.0, "BUNIT")
    with pytest.warns(SersicnetWarning, match="MAGZERO is 0: magnitudes are AB only if the image is in maggies"):
        assert zero_point({"MAGZERO": 0.0}) == (0.0, "MAGZERO")


@pytest.mark.parametrize(
    ("cards", "source"),
    [
        ({"SURVEY": "LegacySurvey", "BRICK": "0001m002", "IMAGETYP": "image"}, "SURVEY, BRICK, IMAGETYP"),
        ({"SURVEY": "LegacySurvey", "VERSION": "DR9", "IMAGETYP": "IMAGE"}, "SURVEY, IMAGETYP"),
        ({"SURVEY": "DECaLS"}, "SURVEY"),
        ({"SURVEY": "BASS MzLS", "BUNIT": ""}, "SURVEY"),
    ],
)
def test_cutouts_of_the_legacy_surveys_are_in_nanomaggies(tmp_path, cards, source):
    assert read(tmp_path, {}, cards, 0.262) == (22.5, source)


@pytest.mark.parametrize(
    "cards", [{"SURVEY": "unWISE"}, {"SURVEY": "LegacySurvey", "IMAGETYP": "invvar"}, {"BRICK": "0001m002"}]
)
def test_other_cutouts_are_not(cards):
    with pytest.raises(InputError, match="gives no zero point"):
        zero_point(cards)


@pytest.mark.parametrize(
    "unit",
    [
        "",
        "  ",
        "K",
        "furlongs",
        "1",
        3.0,
        "e-/s/",
        "((",
        "Jy**99999",
        "1e400*Jy",
        "m" * 60,
        "10**99999999 Jy",
        "9**9**9**9*Jy",
        "Jy,nJy",
        "2,",
        "1/0*Jy",
        "Jy" * 500,
    ],
)
def test_strange_units_are_none_at_once(unit):
    header = {"BUNIT": unit}
    assert unit_of(header) is None or zero_point({**header, "MAGZERO": 25.0}) == (25.0, "MAGZERO")


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
        ({"BUNIT": "MJy/sr"}, "needs a WCS, a positive PIXAR_SR .* or PIXAR_A2 .*; received None"),
        ({"BUNIT": "MJy/sr", "PIXAR_SR": 0.0, "PIXAR_A2": 0.0009}, "needs a WCS, a positive PIXAR_SR .*; received 0.0"),
        ({"FLUXMAG0": 0.0}, "FLUXMAG0, the flux of magnitude 0, must be positive; received 0.0"),
        ({"FLUXMAG0": "n/a"}, "FLUXMAG0 in the header should be a number"),
        ({"PHOTFLAM": "Infinity", "PHOTPLAM": 15369.0}, "should be an AB magnitude"),
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
    assert pixel_scale(np.array([0.0600, 0.0606])).value == pytest.approx(np.sqrt(0.06 * 0.0606))


def test_pixels_that_are_not_square():
    with pytest.raises(InputError, match=r"must be square; received 0.045 x 0.08 arcsec, elongated by 77.8%.*Resample"):
        pixel_scale(np.array([0.045, 0.08]))
    with pytest.warns(SersicnetWarning, match=r"should be square; .* elongated by 5.0%.*are distorted by as much"):
        assert pixel_scale(np.array([0.06, 0.063])).value == pytest.approx(0.06148, abs=1e-5)
    with pytest.warns(SersicnetWarning, match="should be square"):
        assert pixel_scale(np.array([0.045, 0.08]), 0.06) == (0.06, "the user")


def test_a_pixel_scale_that_contradicts_the_wcs_gives_a_warning_and_is_recorded_with_that_of_the_wcs():
    said = r"`pixel_scale` should agree with the WCS: 0\.1 arcsec, as given, is used, and the WCS states 0\.06\."
    with pytest.warns(SersicnetWarning, match=said):
        assert pixel_scale(np.array([0.06, 0.06]), 0.1) == (0.1, "the user (the WCS states 0.06)")
    with pytest.warns(SersicnetWarning, match=r"the WCS states 0\.06067"):
        pixel_scale(np.array([0.06067, 0.06067]), 0.06)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixel_scale(np.array([0.0603, 0.0603]), 0.06) == (0.06, "the user")
        assert pixel_scale(None, 0.1) == (0.1, "the user")


@pytest.mark.parametrize("angle", [0, 30, 77])
def test_skewed_pixels_are_not_square(angle):
    turn, scale = np.radians(angle), 0.06 / 3600
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    cards = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 10.0, "CRVAL2": 2.0, "MAGZERO": 25.0}
    data = np.ones((20, 20))
    for skew, square in (([[-1, 0], [0, 1]], True), ([[-1, 0.3], [0, 1]], False)):
        matrix = scale * rotation @ np.array(skew)
        header = cards | {f"CD{i + 1}_{j + 1}": matrix[i, j] for i in range(2) for j in range(2)}
        if square:
            assert Exposure.of_arrays(data, header=header).pixel_scale.value == pytest.approx(0.06)
        else:
            with pytest.raises(InputError, match="must be square"):
                Exposure.of_arrays(data, header=header)


@pytest.mark.parametrize("level", [0, 0.0, -1.0, -32768])
def test_a_saturation_level_that_is_not_positive_is_not_known(level):
    exposure = Exposure.of_arrays(np.ones((20, 20)), header={"MAGZERO": 25.0, "SATURATE": level})
    assert exposure.saturation == np.inf


def test_pixel_scale_unknown_is_nan():
    value, source = pixel_scale(None)
    assert np.isnan(value)
    assert source == "none"


@pytest.mark.parametrize("given", [0.0, -1.0, float("nan")])
def test_a_pixel_scale_is_positive(given):
    with pytest.raises(InputError, match="positive number of arcsec"):
        pixel_scale(None, given)
