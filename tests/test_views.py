import numpy as np
import pytest

from sersicnet.image.views import psf_views, shape_of


def gaussian(fwhm, oversampling=1, half=64, ratio=1.0):
    line = np.arange(-half * oversampling, half * oversampling + 1) / oversampling
    x, y = line[None, :], line[:, None]
    sigma = fwhm / 2.3548
    image = np.exp(-(x**2 * ratio + y**2 / ratio) / (2 * sigma**2))
    return image / image.sum()


@pytest.mark.parametrize("oversampling", [1, 2, 3])
def test_every_view_holds_the_light_of_its_field(oversampling):
    views = psf_views(gaussian(3.0, oversampling), oversampling)
    widths = np.array([0.25, 1, 2, 4])  # a pixel of the view holds this much of the light in its units
    np.testing.assert_allclose(views.sum(axis=(1, 2)) * widths, 1, atol=2e-3)


def test_the_views_do_not_depend_on_the_sampling_of_the_psf():
    np.testing.assert_allclose(psf_views(gaussian(3.0)), psf_views(gaussian(3.0, 2), 2), atol=2e-4)


def test_the_views_are_centred_between_four_pixels():
    views = psf_views(gaussian(2.5))
    np.testing.assert_allclose(views, views[:, ::-1], atol=1e-6)
    np.testing.assert_allclose(views, views.transpose(0, 2, 1), atol=1e-6)


def test_a_psf_beyond_the_field_is_cut():
    wide = np.ones((257, 257))
    assert psf_views(wide).sum(axis=(1, 2))[3] * 4 == pytest.approx((128 / 257) ** 2, rel=1e-3)


@pytest.mark.parametrize("fwhm", [1.5, 3.0, 7.0])
def test_the_shape_is_that_of_the_psf(fwhm):
    views = psf_views(gaussian(fwhm, 2, ratio=1 / 0.9), 2)
    light_1, light_2, ellipticity = shape_of(views, fwhm)
    assert light_1 == pytest.approx(1 - 1 / 16, abs=0.01)  # half of the light is within half a FWHM
    assert light_2 == pytest.approx(1, abs=2e-3)
    assert ellipticity == pytest.approx(0.1, abs=0.01)
