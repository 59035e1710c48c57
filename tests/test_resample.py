import pickle

import numpy as np
import pytest
from astropy.io import fits

from sersicnet.errors import InputError
from sersicnet.image.exposure import Exposure
from sersicnet.image.header import zero_point
from sersicnet.image.mosaic import read_image
from sersicnet.image.resample import Resampled

FACTORS = [0.5, 0.03 / 0.1, 1.0, 0.1 / 0.06, 2.0, 3.7]
CARDS = {
    "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 53.1, "CRVAL2": -27.8, "CRPIX1": 31.0, "CRPIX2": 77.3,
    "CD1_1": -2.5e-5, "CD1_2": 4e-6, "CD2_1": 3e-6, "CD2_2": 2.6e-5,
}  # fmt: skip
SIP = {
    "CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP", "A_ORDER": 2, "B_ORDER": 2, "A_2_0": 2e-6, "A_1_1": -3e-6,
    "B_0_2": 4e-6, "B_1_1": 1e-6, "AP_ORDER": 2, "BP_ORDER": 2, "AP_1_1": 3e-6, "BP_0_2": -4e-6,
}  # fmt: skip


@pytest.fixture
def exposure(tmp_path):
    """Write an image with maps; returns a function of (data, header cards, noise, kind)."""

    def write(data, cards=None, noise=None, kind="rms"):
        fits.writeto(tmp_path / "image.fits", data, fits.Header(cards or {}), overwrite=True)
        image = read_image(tmp_path / "image.fits")
        if noise is None:
            return Exposure(image)
        fits.writeto(tmp_path / "noise.fits", noise, overwrite=True)
        return Exposure(image, noise=read_image(tmp_path / "noise.fits"), noise_kind=kind)

    return write


def whole(resampled):
    pixels = resampled.read((slice(0, resampled.shape[0]), slice(0, resampled.shape[1])))
    resampled.close()
    return pixels


def gaussian(shape, x, y, sigma):
    rows, columns = np.indices(shape)
    return np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * sigma**2))


@pytest.mark.parametrize("factor", FACTORS)
def test_light_stays_where_it_is(exposure, factor):
    data = gaussian((90, 100), 45.3, 52.8, 4.0)
    resampled = Resampled(exposure(data), factor)
    values, _, noise = whole(resampled)
    assert noise is None
    values = np.nan_to_num(values.astype(float))
    rows, columns = np.indices(values.shape)
    total = values.sum()
    assert total == pytest.approx(data.sum(), rel=1e-6)
    x, y = (values * columns).sum() / total, (values * rows).sum() / total
    assert resampled.from_grid(x) == pytest.approx(45.3, abs=2e-3)
    assert resampled.from_grid(y) == pytest.approx(52.8, abs=2e-3)
    # The boxes of the old and of the new pixels widen it, the smaller one less where it divides the larger one.
    boxes = abs(1 - factor**2) if factor in (0.5, 1.0, 2.0) else 1 + factor**2
    widened = factor**2 * 16 + boxes / 12
    assert (values * (columns - x) ** 2).sum() / total == pytest.approx(widened, rel=0.01)
    assert (values * (rows - y) ** 2).sum() / total == pytest.approx(widened, rel=0.01)


def test_the_same_scale_changes_nothing(exposure):
    data = np.random.default_rng(0).normal(0, 1, (40, 50)).astype(np.float32)
    values, bad, _ = whole(Resampled(exposure(data), 1.0))
    np.testing.assert_array_equal(values, data)
    assert not bad.any()


def test_binning_sums(exposure):
    data = np.random.default_rng(0).normal(0, 1, (40, 50)).astype(np.float32)
    values = whole(Resampled(exposure(data), 0.5)).data
    np.testing.assert_allclose(values, data.reshape(20, 2, 25, 2).sum(axis=(1, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factor", FACTORS)
def test_a_pixel_is_the_same_in_every_window(exposure, factor):
    rng = np.random.default_rng(1)
    data = rng.normal(0, 1, (60, 70)).astype(np.float32)
    data[20:23, 30], data[40:52, 5:17] = np.nan, 0
    resampled = pickle.loads(pickle.dumps(Resampled(exposure(data, noise=rng.uniform(1, 2, data.shape)), factor)))
    full = whole(resampled)
    height, width = resampled.shape
    for window in ((slice(3, 11), slice(5, 9)), (slice(0, height), slice(7, 8)), (slice(9, height), slice(2, width))):
        for part, values in zip(resampled.read(window), full, strict=True):
            np.testing.assert_array_equal(part, values[window])
    resampled.close()


@pytest.mark.parametrize("factor", FACTORS)
def test_holes_stay_holes_and_grow_by_the_pixels_they_touch(exposure, factor):
    data = np.ones((60, 60), np.float32)
    data[20:24, 30:33] = np.nan
    resampled = Resampled(exposure(data), factor)
    values, bad, _ = whole(resampled)
    np.testing.assert_array_equal(np.isnan(values), bad)
    np.testing.assert_allclose(values[~bad], 1 / factor**2, rtol=2e-3)
    edges_y, edges_x = (np.arange(n + 1) / factor for n in resampled.shape)
    beyond_y, beyond_x = edges_y[1:] > 60 + 1e-3, edges_x[1:] > 60 + 1e-3
    touched = np.outer(
        (edges_y[1:] > 20 + 1e-9) & (edges_y[:-1] < 24 - 1e-9), (edges_x[1:] > 30 + 1e-9) & (edges_x[:-1] < 33 - 1e-9)
    )
    assert (bad <= (touched | beyond_y[:, None] | beyond_x)).all()
    assert bad.sum() >= 12 * factor**2


def test_an_overlap_below_the_noise_is_no_hole(exposure):
    data = np.ones((40, 40), np.float32)
    data[20] = np.nan
    resampled = Resampled(exposure(data), 0.49999)
    bad = whole(resampled).bad
    assert bad[10, :19].all()
    assert not bad[9, :19].any()


@pytest.mark.parametrize(("kind", "value"), [("rms", 3.0), ("var", 9.0), ("wht", 1 / 9)])
def test_variances_add_with_the_squares_of_overlaps(exposure, kind, value):
    noise = np.full((40, 40), value)
    noise[7, 7] = np.nan
    pixels = whole(Resampled(exposure(np.ones((40, 40)), noise=noise, kind=kind), 0.5))
    np.testing.assert_allclose(pixels.noise[~pixels.bad], 6.0, rtol=1e-6)
    assert np.argwhere(pixels.bad).tolist() == [[3, 3]]
    assert np.isnan(pixels.noise[3, 3])
    # A pixel of 1.5 old ones a side takes 1 + 0.25 of the variance along each axis.
    coarse = whole(Resampled(exposure(np.ones((40, 40)), noise=np.full((40, 40), value), kind=kind), 2 / 3))
    np.testing.assert_allclose(coarse.noise[:26, :26], 3 * 1.25, rtol=1e-6)


def test_the_noise_of_an_image_is_what_is_told(exposure):
    data = np.random.default_rng(2).normal(0, 3, (1000, 1000))
    pixels = whole(Resampled(exposure(data, noise=np.full(data.shape, 3.0)), 0.06 / 0.1))
    assert np.nanstd(pixels.data / pixels.noise) == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("cards", [CARDS, {**CARDS, **SIP}])
def test_sky_coordinates_agree(exposure, cards, factor):
    resampled = Resampled(exposure(np.ones((100, 90)), cards), factor)
    old = np.array([0.0, 12.3, 89.0]), np.array([50.0, 0.0, 99.0])
    world = resampled.exposure.image.wcs.all_pix2world(*old, 0)
    new = tuple(resampled.to_grid(values) for values in old)
    from_grid = resampled.wcs.all_pix2world(*new, 0)
    back = resampled.exposure.image.wcs.all_world2pix(*from_grid, 0, tolerance=1e-9)
    np.testing.assert_allclose(back, old, atol=1e-6)
    np.testing.assert_allclose(from_grid, world, rtol=0, atol=1e-12)
    for values, again in zip(old, new, strict=True):
        np.testing.assert_allclose(resampled.from_grid(again), values, atol=1e-12)


def test_the_header_tells_the_new_grid(exposure, tmp_path):
    resampled = Resampled(exposure(np.ones((100, 90)), {**CARDS, **SIP, "MAGZERO": 24.6, "SATURATE": 8.0}), 0.4)
    fits.writeto(tmp_path / "new.fits", whole(resampled).data, resampled.header)
    image = read_image(tmp_path / "new.fits")
    np.testing.assert_allclose(image.scales, resampled.exposure.image.scales / 0.4)
    np.testing.assert_allclose(image.wcs.all_pix2world(3, 4, 0), resampled.wcs.all_pix2world(3, 4, 0), rtol=1e-12)
    assert image.header["SATURATE"] == pytest.approx(50.0)
    assert zero_point(image.header).value == 24.6


def test_a_surface_brightness_becomes_a_flux_with_the_zero_point_of_the_old_pixel(exposure):
    cards = {**CARDS, "BUNIT": "MJy/sr", "PIXAR_SR": 1.9e-13}
    data = gaussian((60, 60), 30, 30, 3.0)
    resampled = Resampled(exposure(data, cards), 0.5)
    old, new = zero_point(resampled.exposure.image.header), zero_point(resampled.header)
    assert new.value == pytest.approx(old.value)
    before = old.value - 2.5 * np.log10(data.sum())
    assert new.value - 2.5 * np.log10(whole(resampled).data.sum()) == pytest.approx(before, abs=1e-6)


def test_an_image_without_a_wcs_has_none_on_the_grid(exposure):
    resampled = Resampled(exposure(np.ones((40, 40))), 0.5)
    assert resampled.wcs is None
    assert "CRPIX1" not in resampled.header


@pytest.mark.parametrize("factor", [0.0, -1.0, 0.01, 20.0, np.nan, np.inf])
def test_extreme_factors_are_refused(exposure, factor):
    with pytest.raises(InputError, match=r"by a factor of up to 10; received"):
        Resampled(exposure(np.ones((40, 40))), factor)
