import numpy as np
import pytest

from sersicnet.simulating import morphology as reallike
from sersicnet.simulating import observatories
from sersicnet.simulating.morphology import Arms, Galaxy, Painter
from sersicnet.simulating.recipe import Prior
from sersicnet.simulating.telescopes import F160W, effective_psf

PSF = effective_psf(F160W, 101)


@pytest.fixture(scope="module")
def paint():
    return Painter(PSF, 192)


@pytest.mark.parametrize("radius", [2.0, 9.0, 20.0])
def test_structure_is_drawn_as_the_smooth_parts_are(paint, radius, monkeypatch):
    """A structure that doubles the disc is the disc, drawn on the finer grid, both grids."""
    disc = np.array([95.3, 96.4, 50.0, radius, 0.9, 0.6, 30.0])
    smooth = paint.render(disc)[0]
    galaxy = Galaxy(disc[None], disc, ring=(1.0, 1.0))
    monkeypatch.setattr(reallike, "_RING_WIDTH", 1e6)
    doubled = paint(galaxy)
    assert np.abs(doubled - 2 * smooth).max() < 0.01 * smooth.max()
    assert doubled.sum() == pytest.approx(2 * smooth.sum(), rel=0.03)


def test_clumps_are_seen_through_the_psf(paint):
    clump = np.array([[97.3, 94.6, 10.0, 1.3]])
    disc = np.array([96.0, 96.0, 1e-12, 5.0, 1.0, 0.5, 0.0])
    image = paint(Galaxy(disc[None], disc, clumps=clump))
    expected = paint.render(np.array([97.3, 94.6, 10.0, 1.3 * 1.17741, 0.5, 1.0, 0.0]))[0]
    assert np.abs(image - expected).max() < 0.002 * expected.max()


def test_arms_wind_and_the_heavier_side_is_heavier(paint):
    disc = np.array([96.0, 96.0, 100.0, 12.0, 1.0, 1.0, 0.0])
    plain = paint(Galaxy(disc[None], disc))
    lopsided = paint(Galaxy(disc[None], disc, lopsided=(0.5, 0.0)))
    assert lopsided[:, 97:].sum() > 1.3 * lopsided[:, :96].sum()
    assert lopsided.sum() == pytest.approx(plain.sum(), rel=0.02)
    arms = paint(Galaxy(disc[None], disc, arms=Arms(2, 0.6, 1.5, 2.5, 0.4))) - plain
    assert arms.sum() == pytest.approx(0, abs=3)
    y, x = np.indices(arms.shape) - 96.0
    radius, angle = np.maximum(np.hypot(x, y), 1), np.arctan2(y, x)
    for low in (8, 12, 16):
        ring = (radius > low) & (radius < low + 3)
        crests = np.cos(2 * (angle - 2.5 * np.log(radius / 12) - 0.4))
        assert np.corrcoef(arms[ring], crests[ring])[0, 1] > 0.8


def half_light(image):
    """Radius of the circle about the middle with half of the light of an image."""
    y, x = np.indices(image.shape) - 96.0
    radius = np.hypot(x, y).ravel()
    order = np.argsort(radius)
    light = np.cumsum(image.ravel()[order])
    return radius[order][np.searchsorted(light, light[-1] / 2)]


def test_invented_galaxies_keep_about_their_light_and_size():
    """Half of the light lies within about as much as for the Sersic profile that was asked for."""
    paint = Painter(PSF, 192)
    prior = Prior.candels()
    rng = np.random.default_rng(0)
    ratios, kinds = [], set()
    for _ in range(40):
        drawn = prior.joint.draw(rng, {**prior.ranges, "r_eff_pix": (5.0, 9.0), "ellipticity": (0.0, 0.2)})
        asked = np.array([96.0, 96.0, 100.0, drawn["r_eff_pix"], drawn["sersic_n"], 1 - drawn["ellipticity"], 20.0])
        galaxy = reallike.invent(asked, rng)
        image = paint(galaxy)
        assert np.isfinite(image).all()
        assert image.min() > -0.01 * image.max()
        assert image.sum() == pytest.approx(100, rel=0.6)
        ratios.append(half_light(image) / half_light(paint.render(asked)[0]))
        kinds.add((len(galaxy.components), galaxy.arms is not None, len(galaxy.clumps) > 0))
    assert np.median(ratios) == pytest.approx(1, abs=0.08)
    assert 0.6 < min(ratios) < max(ratios) < 1.8
    assert len(kinds) >= 4


def test_a_psf_that_is_sampled_more_finely_gives_the_same_galaxy():
    through = observatories.TELESCOPES["hst-ir"].typical("F160W", 0.06)
    galaxy = reallike.invent(np.array([96.2, 95.7, 100.0, 6.0, 1.5, 0.6, 30.0]), np.random.default_rng(5))
    once, twice = Painter(through.image(1), 192)(galaxy), Painter(through.image(2), 192, 2)(galaxy)
    np.testing.assert_allclose(twice, once, atol=2e-4 * once.max())


def test_distorted_psfs_are_slightly_distorted():
    y, x = np.indices(PSF.shape) - 50.0
    shears = []
    for variant in range(reallike.PSF_VARIANTS):
        psf = reallike.distorted(PSF, variant)
        assert psf.sum() == pytest.approx(1)
        weight = psf * np.exp(-(x**2 + y**2) / 18)
        xx, yy, xy = (np.sum(weight * a) / weight.sum() for a in (x * x, y * y, x * y))
        assert abs(np.sum(weight * x) / weight.sum()) < 0.02
        shears.append(np.hypot(xx - yy, 2 * xy) / (xx + yy))
    assert 0.005 < np.median(shears) < 0.06
