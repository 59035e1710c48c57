import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from sersicnet import weights
from sersicnet.domain import LEAST_POINTS, Domain, Width, width_of_points
from sersicnet.engine.render import Renderer
from sersicnet.errors import InputError, SersicnetWarning
from sersicnet.image import detect
from sersicnet.image.header import Reading
from sersicnet.simulating.blank_sky import full_width
from sersicnet.simulating.telescopes import F160W, effective_psf
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
    return domain.compare(Reading(zero, "test"), Width(width, error, "test"), rms)


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


@pytest.mark.parametrize("name", weights.shipped())
def test_shipped_cards_tell_their_domain(name):
    assert 0 < weights.load(name).domain.widths[0] <= weights.load(name).domain.widths[1]


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


# --- the width of point sources ---------------------------------------------------------------


def sky_with(sources, psf, size=512, seed=0):
    """An image with one source in each cell of 64 pixels: (flux, r_eff, n, q)."""
    rng = np.random.default_rng(seed)
    image = rng.normal(0, 0.0035, (size, size)).astype(np.float32)
    draw = Renderer(psf, 64)
    for k, (flux, r_eff, n, q) in enumerate(sources):
        y, x = divmod(k, size // 64)
        source = np.array([*rng.uniform(31, 32, 2), flux, r_eff, n, q, rng.uniform(0, 180)])
        image[64 * y : 64 * y + 64, 64 * x : 64 * x + 64] += draw(source)[0]
    return image


def found_in(image, bad=None):
    bad = np.zeros(image.shape, bool) if bad is None else bad
    sky, found = detect.Detector()(image, bad)
    return width_of_points(image, bad, sky, found)


def stars(rng, n):
    return [(flux, 0.02, 1.0, 1.0) for flux in 10 ** rng.uniform(0.7, 3, n)]


def galaxies(rng, n):
    radii, indices = 10 ** rng.normal(0.7, 0.25, n), np.clip(10 ** rng.normal(0.15, 0.28, n), 0.3, 6.2)
    shapes = zip(radii, indices, np.clip(rng.normal(0.6, 0.2, n), 0.1, 1), strict=True)
    return [(flux, *shape) for flux, shape in zip(10 ** rng.uniform(0.7, 2, n), shapes, strict=True)]


@pytest.mark.parametrize("stretch", [0.7, 1.0, 1.5])
def test_stars_among_galaxies_tell_the_width(stretch):
    rng = np.random.default_rng(1)
    psf = effective_psf(F160W, stretch=stretch)
    sources = [*stars(rng, 14), *galaxies(rng, 45)]
    found = found_in(sky_with([sources[i] for i in rng.permutation(len(sources))], psf))
    assert found.value == pytest.approx(full_width(psf), rel=0.03)
    assert found.error < 0.02 * found.value
    assert int(found.source.split()[0]) >= LEAST_POINTS


def test_galaxies_tell_no_width():
    found = found_in(sky_with(galaxies(np.random.default_rng(2), 64), effective_psf(F160W)))
    assert np.isnan(found.value)
    assert found.source == "too few point sources"


def test_few_stars_tell_no_width():
    rng = np.random.default_rng(5)
    sources = [*stars(rng, LEAST_POINTS - 2), *galaxies(rng, 30)]
    assert np.isnan(found_in(sky_with(sources, effective_psf(F160W))).value)


def test_saturated_stars_and_cosmic_rays_do_not_count():
    rng = np.random.default_rng(6)
    psf = effective_psf(F160W)
    image = sky_with([*stars(rng, 40), *[(3000.0, 0.02, 1.0, 1.0)] * 24], psf)
    image = np.minimum(image, 60)  # flat tops
    bad = image == 60
    bad[:256] = False  # some are marked, some are not
    image[rng.integers(20, 490, 40), rng.integers(20, 490, 40)] += 30  # single hot pixels
    assert found_in(image, bad).value == pytest.approx(full_width(psf), rel=0.03)


def test_an_empty_sky_tells_no_width():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(found_in(np.random.default_rng(0).normal(0, 1, (200, 200)).astype(np.float32)).value)
