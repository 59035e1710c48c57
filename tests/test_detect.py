import warnings

import numpy as np
import pytest
from photutils.segmentation import deblend_sources, detect_sources
from scipy import ndimage
from skimage.segmentation import expand_labels

from sersicnet.image.deblend import Deblending
from sersicnet.image.detect import Detector
from sersicnet.image.pixels import Held, Pixels, Sky, within
from sersicnet.image.regions import Regions, Threshold, grown_labels
from sersicnet.image.sky import estimate_sky


def test_a_zone_has_the_sources_of_the_whole_image(held, mesh):
    detector = Detector()
    everything = (slice(0, 512), slice(0, 512))
    whole = detector.find(held.pixels, mesh.at(everything, held.pixels), mesh)
    seen = np.zeros(len(whole), int)
    for zone in ((slice(0, 300), slice(0, 210)), (slice(300, 512), slice(0, 210)), (slice(0, 512), slice(210, 512))):
        window, pixels, _sky, found = detector.around(held, mesh, zone)
        np.testing.assert_array_equal(pixels.data, held.pixels.data[window])
        for i in range(len(found)):
            x, y = found.x[i], found.y[i]
            j = int(np.argmin(np.hypot(whole.x - x, whole.y - y)))
            assert (x, y) == pytest.approx((whole.x[j], whole.y[j]), abs=1e-6)
            for name in ("flux", "area", "a", "b", "theta", "blended"):
                assert getattr(found, name)[i] == getattr(whole, name)[j]
            seen[j] += zone[1].start <= round(x) < zone[1].stop and zone[0].start <= round(y) < zone[0].stop
    assert (seen == 1).all()


@pytest.fixture(scope="module")
def faint():
    """White noise with faint Gaussians of 15 pixels, bright points, and a point on one of the Gaussians."""
    y, x = np.indices((600, 700), dtype=float)
    data = np.random.default_rng(0).normal(0, 1, y.shape)
    for x0, y0 in [*EXTENDED, (580, 120)]:
        data += 0.5 * np.exp(-((x - x0) ** 2 + (y - y0) ** 2) / (2 * 15**2))
    for x0, y0 in [*POINTS, (580, 120)]:
        data += 200 * np.exp(-((x - x0) ** 2 + (y - y0) ** 2) / (2 * 1.3**2))
    data = data.astype(np.float32)
    return Held(Pixels(data, np.zeros(data.shape, bool)))


EXTENDED = [(100, 110), (297, 121), (101, 301), (299, 303), (430, 200), (421, 480), (103, 487)]
POINTS = [(200, 200), (350, 400), (560, 520)]


def test_faint_and_extended_galaxies_are_found_whole(faint):
    """The first pass alone makes pieces of some, and does not see the others."""
    _, found = Detector()(faint.pixels.data, faint.pixels.bad)
    distance = np.hypot(*(np.subtract.outer(np.array(EXTENDED)[:, k], (found.x, found.y)[k]) for k in (0, 1)))
    assert (distance.min(axis=1) < 6).all()
    assert (found.a[distance.argmin(axis=1)] > 6).all()
    assert not found.blended[distance.argmin(axis=1)].any()


def test_a_compact_source_is_one_in_both_passes(faint):
    _, found = Detector()(faint.pixels.data, faint.pixels.bad)
    for x, y in [*POINTS, (580, 120)]:
        assert (np.hypot(found.x - x, found.y - y) < 12).sum() == 1
    assert len(found) == len(EXTENDED) + len(POINTS) + 1


def test_bad_pixels_do_not_hide_an_extended_galaxy(faint):
    bad = np.zeros(faint.pixels.bad.shape, bool)
    bad[1::6, 1::6] = True
    _, found = Detector()(np.where(bad, np.nan, faint.pixels.data).astype(np.float32), bad)
    distance = np.hypot(*(np.subtract.outer(np.array(EXTENDED)[:, k], (found.x, found.y)[k]) for k in (0, 1)))
    assert (distance.min(axis=1) < 8).all()
    row, column = np.nonzero((found.segmentation > 0) & bad)
    for side in (-1, 1):  # bad pixels belong to a source where it surrounds them
        assert found.segmentation[row + side, column].any() or not len(row)
    np.testing.assert_array_equal(np.bincount(found.segmentation[~bad])[1:], found.area)


def star(radius, profile):
    """A star or a galaxy at (64.3, 63.8) whose core is not known."""
    y, x = np.indices((128, 128))
    along = np.hypot(x - 64.3, (y - 63.8) * (1 if profile == "star" else 1.4))
    light = 200 * (1 + along**2 / 4) ** -2.5 if profile == "star" else 2 * np.exp(-along / 5)
    data = np.random.default_rng(1).normal(0, 0.004, x.shape) + light
    data[np.hypot(x - 64.3, y - 63.8) <= radius] = np.nan
    return data.astype(np.float32)


@pytest.mark.parametrize("profile", ["star", "galaxy"])
@pytest.mark.parametrize("radius", [1, 3, 5, 8, 12])
def test_a_source_without_a_core_is_one_source(radius, profile):
    data = star(radius, profile)
    _, found = Detector()(data, ~np.isfinite(data))
    assert len(found) == 1
    assert (found.x[0], found.y[0]) == pytest.approx((64.3, 63.8), abs=0.5)
    assert not found.blended[0]
    assert found.segmentation[64, 64] == 1


@pytest.mark.parametrize("width", [1, 3, 6, 9])
def test_a_masked_column_neither_splits_nor_joins_sources(width):
    y, x = np.indices((256, 256))
    data = np.random.default_rng(1).normal(0, 0.004, x.shape)
    for place in (80, 110, 200):
        data += 2 * np.exp(-np.hypot(x - place, 1.4 * (y - 128.4)) / 3)
    for first in (94, 197):
        data[:, first : first + width] = np.nan
    data = data.astype(np.float32)
    _, found = Detector()(data, ~np.isfinite(data))
    bright = np.flatnonzero(found.flux > 1)
    bright = bright[np.argsort(found.x[bright])]
    assert found.x[bright] == pytest.approx([80, 110, 200], abs=1.5)
    assert list(found.blended[bright]) == [True, True, False]


def test_bridges_do_not_depend_on_the_zone():
    data = np.random.default_rng(0).normal(0, 1, (400, 400))
    y, x = np.indices(data.shape)
    for place in (90, 130, 200, 252):
        data += 5000 * np.exp(-np.hypot(x - place, y - 200) / 4)
        data[np.hypot(x - place, y - 200) < 9] = np.nan
    data[:, 60:64] = np.nan
    source, detector = Held(Pixels(data.astype(np.float32), ~np.isfinite(data))), Detector()
    mesh = estimate_sky(source, detector.threshold)
    everything = slice(0, 400), slice(0, 400)
    whole = detector.find(source.pixels, mesh.at(everything, source.pixels), mesh)
    for zone in ((slice(0, 400), slice(0, 40)), (slice(199, 201), slice(129, 131)), (slice(0, 210), slice(240, 400))):
        window, _, _, found = detector.around(source, mesh, zone)
        np.testing.assert_array_equal(found.segmentation[within(zone, window)] > 0, whole.segmentation[zone] > 0)
        assert {*zip(found.x, found.flux, strict=True)} <= {*zip(np.round(whole.x, 6), whole.flux, strict=True)}


def test_hot_pixels_are_no_sources():
    y, x = np.indices((200, 200))
    data = np.random.default_rng(0).normal(0, 0.004, x.shape) + 2 * np.exp(-np.hypot(x - 90, y - 100) / 4)
    data[30, 40], data[150, 150:152], data[100, 100], data[60, 0] = 1e9, 1e7, 1e8, -1e7
    data = data.astype(np.float32)
    _, found = Detector()(data, np.zeros(data.shape, bool))
    assert (found.x, found.y) == (pytest.approx([90], abs=0.5), pytest.approx([100], abs=0.5))


def test_a_bright_narrow_star_is_no_hot_pixel():
    y, x = np.indices((200, 200))
    data = np.random.default_rng(0).normal(0, 0.004, x.shape)
    data += 1e4 * np.exp(-((x - 90) ** 2 + (y - 100) ** 2) / (2 * 0.5**2))
    data = data.astype(np.float32)
    _, found = Detector()(data, np.zeros(data.shape, bool))
    assert found.flux == pytest.approx([1e4 * 2 * np.pi * 0.25], rel=0.05)


def test_the_second_pass_does_not_depend_on_the_zone(faint):
    detector = Detector()
    mesh = estimate_sky(faint, detector.threshold)
    everything = slice(0, 600), slice(0, 700)
    whole = detector.find(faint.pixels, mesh.at(everything, faint.pixels), mesh)
    for zone in ((slice(0, 301), slice(0, 299)), (slice(115, 130), slice(299, 301)), (slice(480, 500), slice(95, 440))):
        window, _, _, found = detector.around(faint, mesh, zone)
        np.testing.assert_array_equal(found.segmentation[within(zone, window)] > 0, whole.segmentation[zone] > 0)
        assert len(found)
        assert {*zip(found.x, found.flux, strict=True)} <= {*zip(np.round(whole.x, 6), whole.flux, strict=True)}


@pytest.mark.parametrize("filled", [0.01, 0.2, 0.6])
def test_labels_grow_as_in_skimage(filled):
    rng = np.random.default_rng(0)
    labels = np.where(rng.random((90, 80)) < filled, rng.integers(1, 40, (90, 80)), 0).astype(np.int32)
    np.testing.assert_array_equal(grown_labels(labels, 2), expand_labels(labels, 2))


def test_what_cannot_part_need_not_be_deblended():
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((300, 300)), 2.5).astype(np.float32)
    found = detect_sources(smooth, 0.02, 15)
    deblending = Deblending(prominence=0, relief=0)
    noise = np.ones_like(smooth)
    several = [deblending.separable(smooth[p], found.data[p] == k, noise[p], 15) for k, p in enumerate(found.slices, 1)]
    assert 0 < sum(several) < len(several)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        all_of_them = deblend_sources(smooth, found, 15, n_levels=32, contrast=0.005)
    at = np.flatnonzero(found.data)
    regions = Regions(smooth.shape, at, found.data.ravel()[at])
    assert regions.boxes() == list(found.slices)
    sources = found.data.copy()
    deblending.separate(smooth, sources, at, regions, noise, 15)
    np.testing.assert_array_equal(sources, all_of_them.data)


def test_what_does_not_rise_need_not_be_deblended(monkeypatch):
    """The quick look leaves out nothing that would be separated."""
    rng = np.random.default_rng(1)
    smooth = ndimage.gaussian_filter(rng.standard_normal((400, 400)), 2.5).astype(np.float32)
    noise = rng.uniform(0.008, 0.012, smooth.shape).astype(np.float32)
    found = detect_sources(smooth, 0.05, 15)
    at = np.flatnonzero(found.data)
    regions, deblending = Regions(smooth.shape, at, found.data.ravel()[at]), Deblending(relief=0.3)
    quick = [deblending.separable(smooth[p], found.data[p] == k, noise[p], 15) for k, p in enumerate(found.slices, 1)]
    separated, slowly = found.data.copy(), found.data.copy()
    deblending.separate(smooth, separated, at, regions, noise, 15)
    monkeypatch.setattr(Deblending, "separable", lambda *_: True)
    deblending.separate(smooth, slowly, at, regions, noise, 15)
    np.testing.assert_array_equal(separated, slowly)
    assert len(regions) / 20 < sum(quick) < len(regions) / 2
    assert separated.max() > len(regions)


def test_regions_are_those_of_photutils():
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((300, 300)), 2.5).astype(np.float32)
    rms = np.full(smooth.shape, 0.01, np.float32)
    rms[40:60, 100:200] = np.nan
    sky = Sky(np.zeros_like(smooth), rms, np.ones((1, 1)), np.nan)
    found = detect_sources(smooth, np.where(np.isnan(rms), np.inf, 0.03), 15)
    regions = Threshold(level=3.0).regions(smooth, sky, 1.0)
    np.testing.assert_array_equal(regions.mask(), found.data > 0)
    np.testing.assert_array_equal(regions.label, found.data[found.data > 0])
    assert len(regions) == found.n_labels
