import warnings
from types import SimpleNamespace

import numpy as np
import photutils
import pytest
from packaging.version import Version
from photutils.aperture import CircularAperture
from photutils.segmentation import SegmentationImage, SourceCatalog

from sersicnet.image.detect import Detector
from sersicnet.image.photometry import APERTURE, _Cutout
from sersicnet.image.pixels import Sky
from sersicnet.image.stamps import cut

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


def test_a_source_beyond_the_image_has_no_pixels():
    """It is in a blend that reaches into the image: a band that is smaller than the detection image."""
    nothing = np.zeros((40, 40), np.float32)
    scene = SimpleNamespace(clean=nothing, rms=nothing + 1, bad=nothing > 0, segmentation=nothing.astype(int))
    for x, y in ((-80.0, 20.0), (20.0, -80.0), (120.0, 20.0)):
        assert not _Cutout.of(scene, 1, x, y, 10.0).data.size
    assert _Cutout.of(scene, 1, -5.0, 20.0, 10.0).data.shape == (23, 7)


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


def test_the_circle_about_any_place_holds_the_light_of_its_pixels():
    rng, rms = np.random.default_rng(5), 3.0
    data = rng.normal(0, rms, (300, 300)).astype(np.float32)
    bad = np.zeros(data.shape, bool)
    bad[150, 150] = True
    sky = Sky(np.zeros_like(data), np.where(bad, np.nan, np.float32(rms)), np.ones((1, 1)), 1.0)
    places = np.vstack([rng.uniform(70, 230, (30, 2)), [[150.2, 149.7], [-900, 0]]])
    flux, error = cut(data, bad, sky, *places.T).aperture(np.arange(32)).T

    def summed(place, values):
        return CircularAperture(place, APERTURE).to_mask(method="exact").multiply(values.astype(float)).sum()

    expected = [summed(place, data) for place in places[:30]]
    np.testing.assert_allclose(flux[:30], expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(error[:31], rms * APERTURE * np.sqrt(np.pi), rtol=1e-3)
    assert np.isnan([flux[31], error[31]]).all()
    assert np.nanmin(flux) < 0
    assert np.std(flux[:30] / error[:30]) == pytest.approx(1, abs=0.35)
    masked = summed(places[30], np.where(bad, data[149, 150], data))
    assert flux[30] == pytest.approx(masked, abs=3 * rms)  # a bad pixel has the value of the opposite one
