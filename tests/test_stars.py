import warnings
from dataclasses import replace

import numpy as np
import pytest

from sersicnet.engine.render import Renderer
from sersicnet.image import detect
from sersicnet.image.pixels import Sky
from sersicnet.image.psf import Psf, full_width
from sersicnet.image.stamps import cut
from sersicnet.image.stars import (
    LEAST_STARS,
    PSF_SIDE,
    find_stars,
    largest_star,
    look_like_stars,
    profiles,
    saturated,
    size_of,
    sizes,
    stellar_locus,
    width_of,
)
from sersicnet.simulating.telescopes import F160W, effective_psf


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


def profiles_of(image, bad=None):
    bad = np.zeros(image.shape, bool) if bad is None else bad
    sky, found = detect.Detector()(image, bad)
    return profiles(image, bad, sky, found)


def width_in(image, bad=None):
    measured = profiles_of(image, bad)
    return width_of(measured[stellar_locus(measured)])


def point_sources(rng, n):
    return [(flux, 0.02, 1.0, 1.0) for flux in 10 ** rng.uniform(0.7, 3, n)]


def galaxies(rng, n):
    radii, indices = 10 ** rng.normal(0.7, 0.25, n), np.clip(10 ** rng.normal(0.15, 0.28, n), 0.3, 6.2)
    shapes = zip(radii, indices, np.clip(rng.normal(0.6, 0.2, n), 0.1, 1), strict=True)
    return [(flux, *shape) for flux, shape in zip(10 ** rng.uniform(0.7, 2, n), shapes, strict=True)]


@pytest.mark.parametrize("stretch", [0.7, 1.0, 1.5])
def test_the_median_star_has_the_width_of_the_psf(stretch):
    rng = np.random.default_rng(1)
    psf = effective_psf(F160W, stretch=stretch)
    sources = [*point_sources(rng, 14), *galaxies(rng, 45)]
    found = width_in(sky_with([sources[i] for i in rng.permutation(len(sources))], psf))
    assert found.value == pytest.approx(full_width(psf), rel=0.015)
    assert found.error < 0.01 * found.value
    assert int(found.source.split()[0]) >= 12


@pytest.mark.parametrize("seed", range(2, 6))
def test_galaxies_are_no_stellar_locus(seed):
    found = width_in(sky_with(galaxies(np.random.default_rng(seed), 64), effective_psf(F160W)))
    assert np.isnan(found.value)
    assert found.source == "too few stars"


def test_fewer_than_five_stars_are_no_stellar_locus():
    rng = np.random.default_rng(5)
    sources = [*point_sources(rng, LEAST_STARS - 1), *galaxies(rng, 30)]
    assert np.isnan(width_in(sky_with(sources, effective_psf(F160W))).value)


def test_a_saturation_level_includes_the_sky():
    """A star in the middle of a pixel: many of its pixels are alike, so that its cut-off peak is not conspicuous."""
    y, x = np.indices((60, 60)) - 30.0
    star = 20 + 500 * (1 + np.hypot(x, y) ** 2 / 3) ** -2.5
    sky = Sky(np.full(star.shape, 20.0, np.float32), np.full(star.shape, 0.003, np.float32), np.ones((1, 1)), np.nan)
    middle = np.array([30.0])
    for values, level, expected in ((np.minimum(star, 60), 60.0, True), (star, 521.0, False), (star, 519.0, True)):
        stamps = cut(values.astype(np.float32), np.zeros(star.shape, bool), sky, middle, middle)
        assert saturated(stamps, level).tolist() == [expected]


def test_saturated_stars_and_cosmic_rays_do_not_count():
    rng = np.random.default_rng(6)
    psf = effective_psf(F160W)
    image = sky_with([*point_sources(rng, 40), *[(3000.0, 0.02, 1.0, 1.0)] * 24], psf)
    image = np.minimum(image, 60)  # flat tops
    bad = image == 60
    bad[:256] = False  # some are marked, some are not
    image[rng.integers(20, 490, 40), rng.integers(20, 490, 40)] += 30  # single hot pixels
    assert width_in(image, bad).value == pytest.approx(full_width(psf), rel=0.03)


def test_an_empty_sky_tells_no_width():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(width_in(np.random.default_rng(0).normal(0, 1, (200, 200)).astype(np.float32)).value)


def test_five_stars_are_enough_where_nothing_else_is_as_narrow():
    rng = np.random.default_rng(5)
    psf = effective_psf(F160W)
    found = width_in(sky_with([*point_sources(rng, LEAST_STARS), *[(30.0, r, 1.0, 0.8) for r in (4, 6, 8, 10)]], psf))
    assert found.value == pytest.approx(full_width(psf), rel=0.01)
    assert found.source == "5 stars"


def test_undersampled_stars_are_a_stellar_locus():
    """The width of a star of 1.8 pixels changes by 4 % with its position in the pixel."""
    rng = np.random.default_rng(7)
    psf = effective_psf(F160W, stretch=0.58)
    found = width_in(sky_with([*point_sources(rng, 10), *galaxies(rng, 40)], psf))
    assert int(found.source.split()[0]) >= 8
    assert found.value == pytest.approx(full_width(psf), rel=0.03)


def test_a_stellar_locus_does_not_depend_on_windows():
    rng = np.random.default_rng(1)
    image = sky_with([*point_sources(rng, 14), *galaxies(rng, 45)], effective_psf(F160W))
    bad = np.zeros(image.shape, bool)
    sky, found = detect.Detector()(image, bad)
    whole = profiles(image, bad, sky, found)
    left = found.x < 256
    parts = np.concatenate([profiles(image, bad, sky, found, which) for which in (left, ~left)])
    assert {*whole[stellar_locus(whole), 3]} == {*parts[stellar_locus(parts), 3]}


@pytest.mark.parametrize("stretch", [0.8, 1.5])
def test_the_stack_of_stars_is_the_psf(stretch):
    rng = np.random.default_rng(3)
    psf = effective_psf(F160W, stretch=stretch)
    image = sky_with([*point_sources(rng, 20), *galaxies(rng, 40)], psf)
    bad = np.zeros(image.shape, bool)
    sky, found = detect.Detector()(image, bad)
    stars = find_stars(image, bad, sky, found)
    assert stars.used.sum() >= LEAST_STARS
    assert stars.psf.shape == (PSF_SIDE, PSF_SIDE)
    assert full_width(stars.psf) == pytest.approx(full_width(psf), rel=0.01)
    assert size_of(Psf.of(stars.psf, "stack")) == pytest.approx(size_of(Psf.of(psf, "true")), rel=0.01)
    assert (stars.alike | ~stars.used).mean() > 0.95
    measured = profiles(image, bad, sky, found)
    locus = np.zeros(len(found), bool)
    locus[measured[stellar_locus(measured), 3].astype(int)] = True
    assert not (stars.used & ~locus).any()


def test_sources_look_like_stars_within_their_noise():
    size, snr = np.array([1.0, 1.2, 1.2, np.nan]), np.array([100.0, 100.0, 5.0, 100.0])
    assert list(look_like_stars(size, snr, 1.05)) == [True, False, True, False]
    assert not look_like_stars(size, snr, largest_star(np.zeros(0))).any()


@pytest.mark.parametrize(("stretch", "oversampling"), [(0.4, 2), (0.4, 3), (0.5, 2), (0.5, 3), (0.7, 1), (1.0, 1)])
def test_stars_anywhere_in_a_pixel_are_no_larger_than_the_size_of_the_psf(stretch, oversampling):
    """An undersampled PSF that was centred on a pixel had no size, so that no source looked like a star."""
    image = sky_with([(3000.0, 0.02, 1.0, 1.0)] * 25, effective_psf(F160W, stretch=stretch), size=320)
    bad = np.zeros(image.shape, bool)
    sky, found = detect.Detector()(image, bad)
    bright = np.argsort(-found.flux)[:25]
    stars, *_ = sizes(cut(image, bad, sky, found.x[bright], found.y[bright]))
    fine = Psf.of(
        effective_psf(replace(F160W, pixel_scale=F160W.pixel_scale / oversampling), stretch=stretch), "f", oversampling
    )
    size = size_of(fine)
    assert np.isfinite(stars).all()
    assert (stars < 1.02 * size).mean() > 0.75
    assert stars.max() > 0.95 * size


def test_five_stars_are_too_few_among_compact_galaxies():
    widths = np.array([3.15, 3.16, 3.16, 3.17, 3.15, 3.45, 3.6, 4.5])
    light = np.array([1.42, 1.43, 1.42, 1.43, 1.42, 1.6, 1.5, 1.7])
    table = np.column_stack([widths, light, np.ones((8, 2))])
    assert not len(stellar_locus(table))
    assert len(stellar_locus(np.delete(table, [5, 6], axis=0))) == 5
