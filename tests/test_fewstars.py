"""Few stars give a PSF where its width is known roughly."""

import galsim
import numpy as np
import pytest

from sersicnet.image.epsf import StarStamps
from sersicnet.image.fewstars import confirmed
from sersicnet.image.psf import Psf
from sersicnet.image.starpsf import ImagePsf

SIDE = 56


def star(fwhm):
    return galsim.Convolve([galsim.Moffat(beta=3, fwhm=fwhm), galsim.Pixel(1)])


def usual(fwhm, error):
    image = star(fwhm).drawImage(nx=129, ny=129, scale=0.5, method="no_pixel", dtype=float).array
    return Psf.of(image, "usual", 2, source="the usual PSF of a camera", error=error)


def few(n, fwhm=2.6, seed=0):
    """What `find_psf` returns with a few stars of some S/N of 200."""
    rng = np.random.default_rng(seed)
    centres = 27.5 + rng.uniform(-0.5, 0.5, (n, 2))
    offsets = centres - (SIDE - 1) / 2
    drawn = [
        star(fwhm).drawImage(nx=SIDE, ny=SIDE, scale=1, method="no_pixel", offset=tuple(at), dtype=float).array
        for at in offsets
    ]
    values = 2000 * np.array(drawn) + rng.normal(0, 1, (n, SIDE, SIDE))
    stamps = StarStamps(values, np.ones_like(values), np.zeros(values.shape, bool), *np.rint(centres).T)
    return ImagePsf(None, "too few stars", 100 * np.arange(n) + 50.0, np.full(n, 70.0), few=stamps)


@pytest.mark.parametrize("off", [0.9, 1.0, 1.12])
def test_a_few_stars_correct_the_usual_width(off):
    true = usual(2.6, 0.0).fwhm
    found = confirmed(few(4), usual(2.6 * off, 0.1))
    assert found.psf.source == "4 stars and the usual PSF of a camera"
    assert found.psf.fwhm == pytest.approx(true, rel=0.02)
    assert abs(found.psf.fwhm / true - 1) < 2.5 * found.psf.error < 0.05
    assert found.x.tolist() == [50, 150, 250, 350]
    assert (found.reason, found.narrowest) == ("", found.psf.fwhm)


def test_the_width_is_a_mean_that_is_weighted_by_the_errors():
    sure, vague, unknown = (confirmed(few(3), usual(2.65, error)).psf for error in (0.005, 0.02, 10.0))
    off = [abs(psf.fwhm / usual(2.65, 0.0).fwhm - 1) for psf in (sure, vague, unknown)]
    assert off == sorted(off)
    assert off[0] < 0.5 * off[2]
    assert sure.error < 0.005 < vague.error < unknown.error


def test_sources_that_are_wider_than_stars_of_the_instrument_are_no_stars():
    galaxies = few(4)
    assert confirmed(galaxies, usual(1.8, 0.05)) is galaxies
    assert galaxies.psf is None


def test_two_stars_and_none_are_too_few():
    for found in (few(2), ImagePsf(None, "no stellar locus among 0 bright sources")):
        assert confirmed(found, usual(2.6, 0.1)) is found
