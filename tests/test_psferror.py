import numpy as np
import pytest

from sersicnet.image.psf import Psf
from sersicnet.image.psferror import stretched, with_light
from sersicnet.measuring.seeing import moffat
from sersicnet.simulating.telescopes import F160W, effective_psf

PSF = Psf.of(effective_psf(F160W, 101), "f160w")


@pytest.mark.parametrize("by", [0.95, 1.05])
def test_a_psf_is_made_wider_by_a_factor(by):
    assert stretched(PSF, by).fwhm == pytest.approx(by * PSF.fwhm, rel=0.005)
    assert stretched(PSF, by).image.sum() == pytest.approx(1)


def gaussian(x, y):
    return np.exp(-(x**2 + y**2) / 8)


@pytest.mark.parametrize("by", [0.93, 0.98, 1.02, 1.07])
@pytest.mark.parametrize("psf", [
    PSF, moffat(4.0, "seeing", 0.0), Psf.of(gaussian(*np.mgrid[-50:51, -50:51]), "no wings"),
], ids=lambda psf: psf.name)  # fmt: skip
def test_light_within_two_fwhm_is_exchanged_with_the_wings(psf, by):
    other = with_light(psf, by)
    assert other.image.sum() == pytest.approx(1)
    assert other.fwhm == pytest.approx(psf.fwhm, rel=0.005)
    share, near = (other.encircled(r * psf.fwhm) / psf.encircled(r * psf.fwhm) for r in (2, 0.5))
    assert share == pytest.approx(by, abs=0.003)
    assert near == pytest.approx(by, abs=0.01)


def test_no_change_is_the_same_psf_and_so_is_one_without_room_for_wings():
    assert stretched(PSF, 1.0) is PSF
    assert with_light(PSF, 1.0) is PSF
    small = Psf.of(gaussian(*np.mgrid[-8:9, -8:9]), "small")
    assert with_light(small, 0.9) is small
