from types import SimpleNamespace

import numpy as np
import pytest

from sersicnet import weights
from sersicnet.domain import Domain, Seen, WideDomain, read
from sersicnet.errors import InputError, SersicnetWarning
from sersicnet.image.exposure import Exposure
from sersicnet.image.header import Reading
from sersicnet.image.psf import Width
from sersicnet.measuring.fitting import Fitting
from sersicnet.measuring.measure import plan
from sersicnet.training.card import domain_of
from sersicnet.training.recipe import RECIPES

RMS = np.array([0.003, 0.004])
CARD = {
    "name": "mine",
    "domain": {
        "pixel_scale": 0.06,
        "zero_point": 25.9463,
        "psf_fwhm": 0.18,
        "psf_fwhm_range": [0.15, 0.21],
        "rms": [0.002, 0.006],
        "ranges": {"mag": [16, 27], "r_eff_pix": [1.3, 50.2], "sersic_n": [0.3, 6.2], "ellipticity": [0, 0.97]},
    },
}


def compared(domain, *, zero=25.9463, width=3.0, error=0.01, rms=RMS):
    return domain.compare(Seen(Reading(zero, "test"), Width(width, error, "test"), rms))


# --- the comparison ---------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{}, {"width": 2.1}, {"width": 4.1}, {"width": np.nan}])
def test_inside_nothing_is_said(change):
    verdict = compared(Domain.of(CARD), **change)
    assert verdict.reasons == ()
    assert not verdict.rows.any()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"width": 1.9}, "PSF"),
        ({"width": 4.3}, "PSF"),
        ({"rms": RMS * 10}, "depth"),
        ({"zero": 29.0}, "depth"),
    ],
)
def test_outside_all_rows_are_and_the_remedy_is_told(change, reason):
    with pytest.warns(SersicnetWarning, match="mine was trained at .* flagged. `sersicnet adapt`"):
        verdict = compared(Domain.of(CARD), **change)
    assert verdict.reasons == (reason,)
    assert verdict.rows.all()


def test_another_pixel_scale_is_refused():
    domain = Domain.of(CARD)
    for scale in (0.058, 0.062, np.nan):
        domain.check_scale(Reading(scale, "test"))
    with pytest.raises(InputError, match=r"0\.0640 arcsec per pixel, mine was trained at 0\.06\. Give `resample`"):
        domain.check_scale(Reading(0.064, "test"))


def test_a_width_that_is_badly_known_is_no_alarm():
    assert compared(Domain.of(CARD), width=4.6, error=0.2).reasons == ()


def test_a_card_without_a_range_of_widths_knows_one():
    old = {**CARD, "domain": {k: v for k, v in CARD["domain"].items() if k != "psf_fwhm_range"}}
    assert Domain.of(old).widths == pytest.approx((3.0, 3.0))
    with pytest.warns(SersicnetWarning, match=r"3.70 pixels \(test\), mine was trained at 3.00: every"):
        compared(Domain.of(old), width=3.7)


def test_single_deep_places_are_flagged_without_a_warning():
    verdict = compared(Domain.of(CARD), rms=np.array([0.003, 0.0005, 0.003, np.nan]))
    assert list(verdict.rows) == [False, True, False, False]
    assert verdict.reasons == ()


@pytest.mark.parametrize("target", range(4))
@pytest.mark.parametrize("end", [0, 1])
def test_each_parameter_has_its_range(target, end):
    domain = Domain.of(CARD)
    inside = np.array([22.0, 5.0, 2.0, 0.4])
    outside = inside.copy()
    outside[target] = domain.low[target] - 0.01 if end == 0 else domain.high[target] + 0.01
    missing = np.where(np.arange(4) == target, np.nan, inside)
    found = domain.out_of_range(np.array([inside, outside, missing]))
    assert found.any(axis=1).tolist() == [False, True, False]


WIDE = {
    "name": "any",
    "domain": {
        "telescopes": "any", "correlation": [1.0, 2.8],
        "psf": {"fwhm": [1.0, 8.0], "light_1": [0.4, 0.9], "light_2": [0.6, 1.0], "ellipticity": [0.0, 0.2]},
        "ranges": {"mag": [-16, -3], "r_eff_pix": [0.2, 60], "sersic_n": [0.3, 6.2], "ellipticity": [0, 0.97]},
    },
}  # fmt: skip


def test_radii_are_compared_in_units_of_the_psf_too():
    card = {**WIDE, "domain": {**WIDE["domain"], "radius_over_fwhm": [0.1, 20.0]}}
    targets = np.array([[-8.0, radius, 1.0, 0.3] for radius in (0.25, 0.5, 50.0)])
    domain = read(card)
    assert domain.out_of_range(targets, 3.0)[:, 1].tolist() == [True, False, False]
    assert domain.out_of_range(targets, 2.0)[:, 1].tolist() == [False, False, True]
    assert not domain.out_of_range(targets)[:, 1].any()
    assert not read(WIDE).out_of_range(targets, 3.0).any()


def seen(width=3.0, light=0.7, correlation=2.0, **options):
    shape = np.array([light, 0.9, 0.05])
    return Seen(Reading(25.0, "test"), Width(width, 0.0, "test"), RMS, correlation, shape, **options)


def test_a_psf_and_noise_of_any_telescope_are_inside():
    domain = read(WIDE)
    assert isinstance(domain, WideDomain)
    assert not domain.compare(seen()).rows.any()
    assert not domain.compare(seen(width=8.5)).rows.any()  # within a tenth of the range


@pytest.mark.parametrize(
    ("change", "reason", "message"),
    [
        ({"width": 12.0}, "PSF", "a full width of 12 pixels, any is for 1 to 8"),
        ({"light": 0.2}, "PSF", "0.2 of its light within one full width"),
        ({"correlation": 5.0}, "noise correlation", "5.00 times that of independent pixels"),
    ],
)
def test_a_psf_or_noise_of_no_telescope_is_flagged(change, reason, message):
    with pytest.warns(SersicnetWarning, match=message):
        verdict = read(WIDE).compare(seen(**change))
    assert verdict.rows.all()
    assert verdict.reasons == (reason,)


def test_weights_for_one_camera_are_for_psfs_that_are_hardly_narrower_or_wider():
    """Those of one camera are nearly alike: a tenth of their range would be less than the error of a width."""
    narrow = {**WIDE, "domain": {**WIDE["domain"], "psf": {**WIDE["domain"]["psf"], "fwhm": [3.0, 3.0]}}}
    assert not read(narrow).compare(seen(width=3.1)).rows.any()
    with pytest.warns(SersicnetWarning, match="a full width of 3.3 pixels"):
        assert read(narrow).compare(seen(width=3.3)).rows.all()


@pytest.mark.parametrize("missing", ["psf", "correlation", "ranges"])
def test_a_wide_domain_without_a_part_is_an_error(missing):
    domain = {name: value for name, value in WIDE["domain"].items() if name != missing}
    with pytest.raises(KeyError):
        read({**WIDE, "domain": domain})


@pytest.mark.parametrize("name", weights.shipped())
def test_shipped_cards_tell_their_domain(name):
    domain = weights.load(name).domain
    widths = domain.widths if isinstance(domain, Domain) else domain.psf["fwhm"]
    assert 0 < widths[0] <= widths[1]


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        ({}, [0.2, 0.2]),
        ({"psf_scatter": 0.15}, [0.17, 0.23]),
        ({"psfs": [{"fwhm": 0.18}, {"fwhm": 0.25}, {"fwhm": 0.21}]}, [0.18, 0.25]),
    ],
)
def test_training_writes_the_range_of_widths(options, widths):
    instrument = {"name": "x", "pixel_scale": 0.06, "zero_point": 25, "rms_low": 1, "rms_high": 2}
    prior = {"mag": [16, 27], "r_eff_pix": [1, 50], "sersic_n": [0.3, 6], "ellipticity": [0, 1]}
    data = SimpleNamespace(config={"instrument": instrument, "prior": prior, "psf_fwhm": 0.2, **options})
    domain = domain_of(data, RECIPES["fovea"])
    assert domain["psf_fwhm_range"] == pytest.approx(widths)
    assert Domain.of({"name": "x", "domain": domain}).widths == pytest.approx(np.array(widths) / 0.06)


def test_fits_and_resampling_do_not_send_the_user_from_one_to_the_other(field):
    with pytest.raises(InputError, match=r"fit by `sersicnet fit`, which needs no network"):
        plan(field[0], weights="fovea-sky", refine=Fitting(), resample=True)
    with pytest.warns(SersicnetWarning, match="`pixel_scale` should agree with the WCS"):
        coarse = Exposure.open(field[0], pixel_scale=0.2)
    with pytest.raises(InputError, match=r"trained at 0\.06\. Give `resample`; or"):
        plan(coarse, weights="fovea-sky")
    with pytest.raises(InputError, match=r"work at any pixel scale: `sersicnet fit`; or"):
        plan(coarse, weights="fovea-sky", refine=Fitting())
