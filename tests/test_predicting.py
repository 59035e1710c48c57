from dataclasses import replace

import numpy as np
import pytest

from sersicnet.image.psf import Psf
from sersicnet.measuring.predicting import LIGHT_INCLUDED, through
from sersicnet.simulating.telescopes import F160W, effective_psf
from sersicnet.weights import Prediction

PSF = Psf.of(effective_psf(F160W, 101), "f160w")
STAMPS = np.zeros((3, 128, 128), np.float32)
ERRORS = np.array([0.002, 0.05, 0.5])


class Point:
    """A network that measures the magnitude of a point by the light of the PSF in the middle; row i has `ERRORS[i]`."""

    def __init__(self):
        self.answers = 0

    def predict(self, inputs):
        n = inputs.n
        self.answers += n
        light = np.broadcast_to(inputs.psf[:, 1, 12:20, 12:20].sum(axis=(1, 2)), n)
        targets = np.tile([0, 5.0, 2.0, 0.3], (n, 1))
        targets[:, 0] = 2.5 * np.log10(light)
        errors = np.tile([0, 0.2, 0.1, 0.02], (n, 1))
        errors[:, 0] = ERRORS[:n]
        return Prediction(targets, errors, np.zeros((n, 6)), np.full(n, 30.0), np.full(n, 1.0))


def answered(psf, **options):
    network, where = Point(), np.arange(3.0)
    found, of_psf = through(psf, STAMPS, np.zeros((3, 3), np.float32), where, where, network, **options)
    return network.answers, found, of_psf


def test_a_psf_that_is_known_adds_no_error():
    answers, found, of_psf = answered(PSF)
    assert answers == 3
    assert not of_psf.any()
    np.testing.assert_array_equal(found.errors[:, 0], ERRORS)


def test_an_error_of_the_light_like_those_of_the_calibration_is_not_counted_twice():
    answers, found, of_psf = answered(replace(PSF, light_error=LIGHT_INCLUDED))
    assert answers == 3
    assert not of_psf.any()
    np.testing.assert_array_equal(found.errors[:, 0], ERRORS)


def test_the_light_of_the_psf_adds_to_small_errors():
    answers, found, of_psf = answered(replace(PSF, light_error=np.hypot(LIGHT_INCLUDED, 0.02)))
    assert answers == 3 + 2
    assert not of_psf[:, 0].any()
    assert of_psf[:2, 1, 0] == pytest.approx(-2.5 * np.log10(0.98), abs=0.002)
    assert (of_psf[2] == 0).all()  # its own error is much larger
    np.testing.assert_allclose(found.errors[:, 0], np.hypot(ERRORS, of_psf[:, 1, 0]))


def test_fits_have_the_whole_error_of_the_light():
    """Their errors are of the noise alone, and include none of it."""
    psf = replace(PSF, light_error=0.025)
    _, part, of_part = answered(psf)
    _, found, of_psf = answered(psf, whole=True)
    assert of_psf[:2, 1, 0] == pytest.approx(-2.5 * np.log10(0.975), abs=0.002)
    assert of_part[:2, 1, 0] == pytest.approx(0.8 * of_psf[:2, 1, 0], rel=0.02)
    np.testing.assert_allclose(found.errors[:2], part.errors[:2], rtol=0.02)
    _, found, of_psf = answered(replace(PSF, light_error=0.01), whole=True)
    assert of_psf[0, 1, 0] == pytest.approx(-2.5 * np.log10(0.99), abs=0.002)
    np.testing.assert_array_equal(found.errors[:, 0], ERRORS)


def test_errors_of_width_and_light_are_independent():
    _, both, of_psf = answered(replace(PSF, light_error=0.025, error=0.05))
    assert of_psf[:, 0, 0].all()
    np.testing.assert_allclose(both.errors[:, 0], np.sqrt(ERRORS**2 + (of_psf[..., 0] ** 2).sum(axis=1)))
