"""Which PSF a measurement uses, and what follows for networks that are shown it."""

import numpy as np
import pytest
from astropy.io import fits
from conftest import flat

from sersicnet.engine.render import Renderer
from sersicnet.errors import InputError, SersicnetWarning
from sersicnet.image.exposure import Exposure
from sersicnet.image.psf import Psf, Width
from sersicnet.image.psffile import read_psf
from sersicnet.image.sky import estimate_sky
from sersicnet.measuring import scene, seeing
from sersicnet.measuring.fitting import Fitting
from sersicnet.measuring.measure import fit, measure, plan
from sersicnet.schema import Flag
from sersicnet.simulating import observatories
from sersicnet.simulating.telescopes import F160W, effective_psf

OURS = Psf.of(effective_psf(F160W), "f160w.fits")
QUIET = pytest.mark.filterwarnings("ignore::sersicnet.errors.SersicnetWarning")


def measured(field, network, **options):
    return flat(measure, field[0], weights=network, **options)


def test_a_width_makes_a_psf_of_that_width():
    for fwhm in (1.5, 3.0, 8.0):
        psf = seeing.moffat(fwhm, "a width", 0.02)
        assert psf.fwhm == pytest.approx(fwhm, rel=0.01)
        assert psf.error == 0.02


@pytest.mark.parametrize("fwhm", [0.5, 30.0, np.nan])
def test_a_width_of_no_psf_is_an_error(fwhm):
    with pytest.raises(InputError, match="from 1 to 16 pixels"):
        seeing.moffat(fwhm, "a width", 0.02)


def test_the_users_psf_is_used(field, psf_weights):
    table = measured(field, psf_weights, psf=OURS)
    assert table.meta["PSFSRC"] == "f160w.fits"
    assert table.meta["PSFFWHM"] == pytest.approx(OURS.fwhm)
    assert not (table["flags"] & Flag.PSF_ASSUMED).any()
    assert np.isfinite(table["r_eff"]).all()
    assert ((table["theta_err"].value > 0) & (table["theta_err"].value <= 52)).all()


@QUIET
def test_another_psf_gives_other_parameters(field, psf_weights):
    one = measured(field, psf_weights, psf=OURS)
    other = measured(field, psf_weights, psf=seeing.moffat(5.0, "wide", 0.0))
    assert not np.isclose(one["r_eff"].value, other["r_eff"].value, rtol=1e-3).any()


@QUIET
def test_an_assumed_psf_is_flagged_and_widens_the_errors(field, psf_weights):
    known = measured(field, psf_weights, psf=seeing.moffat(3.0, "file", 0.0))
    assumed = measured(field, psf_weights, psf_fwhm=3.0)
    assert (assumed["flags"] & Flag.PSF_ASSUMED).all()
    np.testing.assert_allclose(assumed["r_eff"].value, known["r_eff"].value, rtol=1e-5)
    assert (assumed["r_eff_err"] > known["r_eff_err"]).all()


@pytest.mark.filterwarnings("ignore:.*has no celestial WCS")
def test_without_stars_and_header_a_width_is_guessed(psf_weights, blank):
    noise = np.random.default_rng(0).normal(0, 1, (300, 300)).astype(np.float32)
    noise[100:110, 100:110] += 20
    with pytest.warns(SersicnetWarning, match=r"shows no PSF.*Give `psf` or `psf_fwhm`"):
        table = measure(Exposure.open(blank(data=noise), pixel_scale=0.1), weights=psf_weights)
    assert (table["flags"] & Flag.PSF_ASSUMED).all()
    assert table.meta["PSFERR"] == seeing.GUESSED_ERROR


@pytest.mark.filterwarnings("ignore:.*has no celestial WCS")
def test_without_stars_and_header_the_width_is_that_of_the_narrowest_source(blank):
    """A star and a galaxy: one star is no stellar locus; a cosmic ray is narrower, and does not count."""
    data = np.random.default_rng(0).normal(0, 0.003, (300, 300)).astype(np.float32)
    galaxy, star = [100.2, 99.7, 50.0, 4.0, 1.0, 0.95, 0.0], [200.4, 180.1, 50.0, 0.02, 1.0, 1.0, 0.0]
    data += Renderer(effective_psf(F160W), 300)(np.array([galaxy, star])).sum(axis=0)
    data[50, 240], data[50, 241] = 2.0, 0.9
    exposure = Exposure.open(blank(data=data, cards={"MAGZERO": 25.0}), pixel_scale=0.06)
    mesh = estimate_sky(exposure, scene.DETECTOR.threshold)
    with pytest.warns(SersicnetWarning, match="the width of the narrowest source is assumed, with a FWHM of 3"):
        found = seeing.seeing(exposure, mesh, None, None)
    assert found.assumed
    assert found.psf.error == seeing.LONE_ERROR
    assert found.psf.fwhm == pytest.approx(Psf.of(effective_psf(F160W), "F160W").fwhm, rel=0.03)


@pytest.mark.filterwarnings("ignore:.*has no celestial WCS")
def test_a_galaxy_does_not_replace_the_usual_seeing(blank):
    """The only bright source is four times as wide as the usual PSF."""
    data = np.random.default_rng(0).normal(0, 0.003, (300, 300)).astype(np.float32)
    data += Renderer(effective_psf(F160W), 300)(np.array([[150.2, 149.7, 100.0, 8.0, 1.0, 0.95, 0.0]]))[0]
    cards = {"MAGZERO": 25.0, "INSTRUME": "DECam", "FILTER": "r"}
    exposure = Exposure.open(blank(data=data, cards=cards), pixel_scale=0.263)
    with pytest.warns(SersicnetWarning, match="the usual PSF of DECam r is assumed"):
        seeing.seeing(exposure, estimate_sky(exposure, scene.DETECTOR.threshold), None, None)


@QUIET
def test_the_instrument_of_the_header_is_known(blank):
    cards = {"MAGZERO": 25.0, "TELESCOP": "HST", "INSTRUME": "WFC3", "FILTER": "F160W"}
    exposure = Exposure.open(blank(cards=cards), pixel_scale=0.06)
    psf, in_space = observatories.usual_psf(exposure.image.header, exposure.pixel_scale.value)
    assert in_space
    assert psf.source == "the usual PSF of WFC3 F160W"
    assert psf.fwhm * 0.06 == pytest.approx(0.19, abs=0.02)
    assert psf.error == pytest.approx(0.06, abs=0.01)


@QUIET
def test_the_filter_of_acs_is_in_one_of_two_wheels(blank):
    cards = {"MAGZERO": 25.0, "INSTRUME": "ACS", "FILTER1": "CLEAR1L", "FILTER2": "F814W"}
    psf, _ = observatories.usual_psf(Exposure.open(blank(cards=cards), pixel_scale=0.05).image.header, 0.05)
    assert psf.source == "the usual PSF of ACS F814W"


@pytest.mark.filterwarnings("ignore:.*has no celestial WCS")
@pytest.mark.parametrize(
    ("cards", "scale", "assumed"),
    [
        ({"INSTRUME": "WFC3", "FILTER": "F160W"}, 0.06, False),
        ({"INSTRUME": "DECam", "FILTER": "r"}, 0.3, True),
    ],
)
def test_few_stars_that_the_header_confirms_are_used(blank, cards, scale, assumed):
    rng = np.random.default_rng(0)
    data = rng.normal(0, 0.003, (400, 400)).astype(np.float32)
    for x, y in ((60, 70), (300, 90), (120, 310), (310, 320)):
        data[y - 40 : y + 40, x - 40 : x + 40] += Renderer(effective_psf(F160W), 80)(
            np.array([[40 + rng.uniform(), 40 + rng.uniform(), 50.0, 0.02, 1.0, 1.0, 0.0]])
        )[0]
    exposure = Exposure.open(blank(data=data, cards={"MAGZERO": 25.0, **cards}), pixel_scale=scale)
    found = seeing.seeing(exposure, estimate_sky(exposure, scene.DETECTOR.threshold), None, None)
    assert found.psf.source == f"4 stars and the usual PSF of {' '.join(cards.values())}"
    assert found.psf.fwhm == pytest.approx(Psf.of(effective_psf(F160W), "truth").fwhm, rel=0.02)
    assert found.assumed == assumed
    assert found.meta()["PSFSTARS"] == 4


@QUIET
def test_the_seeing_of_a_telescope_on_the_ground_is_not_known_well(blank):
    cards = {"MAGZERO": 25.0, "INSTRUME": "DECam", "FILTER": "r DECam SDSS"}
    exposure = Exposure.open(blank(cards=cards), pixel_scale=0.263)
    psf, in_space = observatories.usual_psf(exposure.image.header, 0.263)
    assert (psf.error, in_space) == (observatories.SEEING_ERROR, False)


@pytest.mark.filterwarnings("ignore:.*has no celestial WCS")
def test_a_psf_of_another_image_is_doubted(blank):
    cards = {"MAGZERO": 25.0, "INSTRUME": "WFC3", "FILTER": "F160W"}
    exposure = Exposure.open(blank(cards=cards), pixel_scale=0.06)
    stars = Width(2.9, 0.05, "20 stars")
    assert seeing.doubts(exposure, OURS, stars) == ""
    assert seeing.doubts(exposure, OURS, Width(np.nan, np.nan, "too few stars")) == ""
    wide = seeing.moffat(6.0, "other.fits", 0.0)
    with pytest.warns(SersicnetWarning, match=r"is 6.0. pixels wide \(other.fits\), but those of WFC3 F160W have 2.8"):
        assert "stars of the image have 2.90" in seeing.doubts(exposure, wide, stars)
    with pytest.warns(SersicnetWarning, match="but stars of the image have 2.10"):
        seeing.doubts(exposure, OURS, Width(2.1, 0.05, "20 stars"))
    assert seeing.doubts(exposure, OURS, Width(2.1, 0.4, "5 stars")) == ""


@QUIET
def test_a_doubt_is_in_the_header_of_the_catalogue(blank):
    cards = {"MAGZERO": 25.0, "INSTRUME": "WFC3", "FILTER": "F160W"}
    table = flat(fit, blank(cards=cards), pixel_scale=0.06, psf=seeing.moffat(7.0, "other.fits", 0.0))
    assert table.meta["PSFDOUBT"].startswith("those of WFC3 F160W have 2.8")


def test_the_psf_that_was_used_is_written(field, psf_weights, tmp_path):
    measured(field, psf_weights, psf=OURS, catalogue=tmp_path / "c.fits", psf_out=tmp_path / "psf.fits")
    np.testing.assert_allclose(read_psf(tmp_path / "psf.fits").image, OURS.image, atol=1e-6)
    assert fits.getheader(tmp_path / "psf.fits")["SOURCE"] == "f160w.fits"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"psf": OURS, "psf_fwhm": 3.0}, "`psf_fwhm` is for a network that is shown the PSF"),
        ({"psf_fwhm": 0.17}, "The FWHM of a PSF is from 1 to 16 pixels"),
        ({"gain": 0.0}, "A gain is a positive number"),
        ({"refine": Fitting(prior="no.csv")}, "there is none at no.csv"),
        ({"psf": OURS, "resample": True}, "`resample` is for weights of one pixel scale"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_measured(field, psf_weights, options, message):
    with pytest.raises(InputError, match=message):
        plan(str(field[0]), weights=psf_weights, **options)


def test_a_network_that_is_shown_no_psf_takes_no_width(field):
    with pytest.raises(InputError, match="`psf_fwhm` is for a network that is shown the PSF"):
        measured(field, "fovea-sky", psf_fwhm=3.0)


@QUIET
def test_any_pixel_scale_is_measured(field, psf_weights):
    for scale in (0.03, 0.4):
        table = measured(field, psf_weights, psf=OURS, pixel_scale=scale)
        np.testing.assert_allclose(table["r_eff"].value, table["r_eff_pix"].value * scale, rtol=1e-5)
