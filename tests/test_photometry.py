import warnings

import numpy as np
import photutils
import pytest
from packaging.version import Version
from photutils.segmentation import SegmentationImage, SourceCatalog

from sersicnet.image.detect import Detector

SHARES_COUNT_ONCE = Version(photutils.__version__) < Version("3.1")
"""Whether a pixel on the border of an aperture adds its share of its variance, as in SExtractor and here.

photutils 3.1 takes the square of the share, which makes the errors of these apertures 2 to 4 % smaller.
"""


@pytest.fixture(scope="module")
def both(held, mesh):
    """What we measure of a field with a bad stripe, and what photutils does."""
    bad = held.pixels.bad.copy()
    bad[200:203, :] = True
    pixels = held.pixels._replace(bad=bad)
    window = slice(0, 512), slice(0, 512)
    sky = mesh.at(window, pixels)
    detector = Detector()
    ours = detector.find(pixels, sky, mesh)
    clean = pixels.data - sky.level
    theirs = SourceCatalog(
        clean,
        SegmentationImage(ours.segmentation),
        convolved_data=detector.threshold.smooth(clean, bad),
        error=sky.rms,
        mask=bad,
        aperture_mask_method="correct",
    )
    return ours, theirs


def test_moments_are_those_of_photutils(both):
    ours, theirs = both
    for name, other in {
        "x": theirs.x_centroid,
        "y": theirs.y_centroid,
        "a": theirs.semimajor_axis.value,
        "b": theirs.semiminor_axis.value,
        "flux": theirs.segment_flux,
        "area": theirs.segment_area.value,
    }.items():
        np.testing.assert_allclose(getattr(ours, name), other, rtol=2e-5, err_msg=name)
    turned = (ours.theta - theirs.orientation.value + 90) % 180 - 90
    np.testing.assert_allclose(turned * (1 - ours.b / ours.a), 0, atol=1e-3)


def test_light_in_apertures_is_that_of_photutils(both):
    ours, theirs = both
    light = ours.photometry(np.arange(len(ours)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        aperture = theirs.circular_photometry(5.0)
        kron = theirs.kron_radius.value, theirs.kron_flux, theirs.kron_flux_err
    factor = ours._correlation
    np.testing.assert_allclose(light.aperture_flux, aperture[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(light.aperture_error, aperture[1] * factor, rtol=1e-4 if SHARES_COUNT_ONCE else 0.05)
    measured = np.isfinite(light.kron_radius)
    assert measured.sum() > 0.8 * len(ours)
    assert not (kron[0][~measured] <= 4.0).any()
    np.testing.assert_allclose(light.kron_radius[measured], kron[0][measured], rtol=1e-4)
    off = light.kron_flux[measured] - kron[1][measured]  # their pixels are divided exactly
    assert np.abs(off / kron[2][measured]).max() < 0.1
    np.testing.assert_allclose(
        light.kron_error[measured], kron[2][measured] * factor, rtol=5e-3 if SHARES_COUNT_ONCE else 0.05
    )
