import warnings

import numpy as np
import pytest
from photutils.segmentation import deblend_sources, detect_sources
from scipy import ndimage
from skimage.segmentation import expand_labels

from sersicnet.detect import Detector, _grown_labels
from sersicnet.sky import Sky


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


@pytest.mark.parametrize("filled", [0.01, 0.2, 0.6])
def test_labels_grow_as_in_skimage(filled):
    rng = np.random.default_rng(0)
    labels = np.where(rng.random((90, 80)) < filled, rng.integers(1, 40, (90, 80)), 0).astype(np.int32)
    np.testing.assert_array_equal(_grown_labels(labels, 2), expand_labels(labels, 2))


def test_what_cannot_part_need_not_be_deblended():
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((300, 300)), 2.5).astype(np.float32)
    found = detect_sources(smooth, 0.02, 15)
    detector = Detector(prominence=0, relief=0)
    several = [detector._separable(smooth[p], found.data[p] == k) for k, p in enumerate(found.slices, 1)]
    assert 0 < sum(several) < len(several)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        all_of_them = deblend_sources(smooth, found, 15, n_levels=32, contrast=0.005)
    sources = detector._deblended(smooth, found.data, np.ones_like(smooth))
    np.testing.assert_array_equal(sources, all_of_them.data)


def test_regions_are_those_of_photutils():
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((300, 300)), 2.5).astype(np.float32)
    rms = np.full(smooth.shape, 0.01, np.float32)
    rms[40:60, 100:200] = np.nan
    sky = Sky(np.zeros_like(smooth), rms, np.ones((1, 1)), np.nan)
    found = detect_sources(smooth, np.where(np.isnan(rms), np.inf, 0.03), 15)
    np.testing.assert_array_equal(Detector(threshold=3.0).regions(smooth, sky, 1.0), found.data)
