import warnings

import numpy as np
import pytest
from astropy.stats import SigmaClip, mad_std
from photutils.background import MADStdBackgroundRMS, SExtractorBackground
from photutils.segmentation import deblend_sources, detect_sources
from scipy import ndimage
from skimage.segmentation import expand_labels

from sersicnet.detect import Detector, Held, Mesh, _clipped, _dilated, _grown_labels, _mad_std, _median, _sky_of
from sersicnet.mosaic import Pixels, grown, read_image


@pytest.fixture(scope="module")
def held(field):
    image = read_image(field[0])
    return Held(Pixels(image.data, image.without_data()))


@pytest.fixture(scope="module")
def mesh(held):
    return Detector().mesh(held)


def test_a_zone_has_the_sources_of_the_whole_image(held, mesh):
    detector = Detector()
    everything = (slice(0, 512), slice(0, 512))
    whole = detector.find(held.pixels, mesh.at(everything, held.pixels), mesh.smoothed)
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


def test_sky_and_noise_of_a_pixel_do_not_depend_on_the_window(held, mesh):
    everything, part = (slice(0, 512), slice(0, 512)), (slice(101, 307), slice(33, 350))
    whole, inner = (mesh.at(window, held.read(window)) for window in (everything, part))
    np.testing.assert_array_equal(inner.level, whole.level[part])
    np.testing.assert_array_equal(inner.rms, whole.rms[part])
    smooth = Detector().smooth
    wide = grown(part, Detector().halo, held.shape)
    np.testing.assert_array_equal(
        smooth(held.pixels.data[wide], held.pixels.bad[wide])[7:-7, 7:-7],
        smooth(held.pixels.data, held.pixels.bad)[wide][7:-7, 7:-7],
    )


def test_a_mesh_follows_a_sloping_sky():
    rng = np.random.default_rng(0)
    y, x = np.indices((700, 900))
    slope = (0.004 * x - 0.002 * y + 5).astype(np.float32)
    data = slope + rng.normal(0, 1 + x / 900, x.shape).astype(np.float32)
    held = Held(Pixels(data, np.zeros(data.shape, bool)))
    window = slice(0, 700), slice(0, 900)
    sky = Detector().mesh(held).at(window, held.pixels)
    inner = slice(150, -150), slice(150, -150)
    assert np.abs(sky.level - slope)[inner].max() < 0.12
    assert np.abs(sky.rms / (1 + x / 900) - 1)[inner].max() < 0.06
    assert np.abs(sky.level - slope).max() < 0.6  # half a box's step of the slope, in the corners


def test_a_box_full_of_a_source_takes_the_sky_from_around():
    rng = np.random.default_rng(0)
    data = rng.normal(3, 1, (640, 640)).astype(np.float32)
    y, x = np.indices(data.shape) - 320.0
    data += (200 * np.exp(-np.hypot(x, y) / 25)).astype(np.float32)
    held = Held(Pixels(data, np.zeros(data.shape, bool)))
    mesh = Detector().mesh(held)
    assert isinstance(mesh, Mesh)
    assert mesh.level == pytest.approx(3, abs=0.25)
    assert mesh.rms == pytest.approx(1, abs=0.1)


def test_a_mask_grows_by_a_disc():
    inside = np.random.default_rng(0).random((60, 50)) > 0.995
    for reach in (1, 2, 8):
        np.testing.assert_array_equal(_dilated(inside, reach), expand_labels(inside.astype(int), reach) > 0)


@pytest.mark.parametrize("filled", [0.01, 0.2, 0.6])
def test_labels_grow_as_in_skimage(filled):
    rng = np.random.default_rng(0)
    labels = np.where(rng.random((90, 80)) < filled, rng.integers(1, 40, (90, 80)), 0).astype(np.int32)
    np.testing.assert_array_equal(_grown_labels(labels, 2), expand_labels(labels, 2))


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_medians_are_those_of_numpy(n):
    values = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    assert _median(values) == np.median(values)
    assert _mad_std(values) == mad_std(values)


def test_outliers_are_clipped_as_by_astropy():
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((40, 4001)) + rng.exponential(0.5, (40, 4001)) ** 3 + 100).astype(np.float32)
    values[:10] = np.round(values[:10], 1)
    values[10, :3000], values[11], values[12, 100:200] = np.nan, 7.5, np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = SigmaClip(3.0, maxiters=10)(values, axis=1, masked=False)
    np.testing.assert_array_equal(_clipped(values), expected)


def test_sky_of_boxes_is_that_of_photutils():
    values = np.random.default_rng(0).standard_normal((5, 1000)).astype(np.float32)
    values[0], values[1, :500], values[2, 200:], values[3, :400] = 3, np.nan, np.nan, 1.5
    level, rms = _sky_of(values)
    np.testing.assert_array_equal(level, SExtractorBackground(sigma_clip=None).calc_background(values, axis=1))
    np.testing.assert_array_equal(rms, MADStdBackgroundRMS(sigma_clip=None).calc_background_rms(values, axis=1))


def test_what_cannot_part_need_not_be_deblended():
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((300, 300)), 2.5).astype(np.float32)
    found = detect_sources(smooth, 0.02, 15)
    detector = Detector()
    several = detector._separable(smooth, found)
    assert 0 < len(several) < len(found.labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        all_of_them = deblend_sources(smooth, found, 15, n_levels=32, contrast=0.005)
    np.testing.assert_array_equal(detector._deblended(smooth, found).data, all_of_them.data)


def test_a_large_mosaic_may_be_empty_over_whole_windows():
    data = np.random.default_rng(0).normal(0, 1, (2304, 2304)).astype(np.float32)
    data[:600, :700] = np.nan
    found = Detector().mesh(Held(Pixels(data, ~np.isfinite(data))))
    np.testing.assert_allclose(np.median(found.rms), 1, atol=0.02)
