from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sersicnet.engine.render import Renderer
from sersicnet.image import starpsf
from sersicnet.image.detect import Detector
from sersicnet.image.pixels import Held, Pixels
from sersicnet.image.psf import Psf
from sersicnet.image.sky import estimate_sky
from sersicnet.image.starpsf import WINDOW, find_psf
from sersicnet.simulating.telescopes import F160W, effective_psf

NOISE = 0.0035


def field(stars, galaxies, psf, size=448, seed=0):
    """An image with stars of some fluxes and with galaxies, one in each cell of 64 pixels."""
    rng = np.random.default_rng(seed)
    image = rng.normal(0, NOISE, (size, size)).astype(np.float32)
    draw = Renderer(psf, 64)
    n = size // 64
    sources = [(flux, 0.02, 1.0, 1.0) for flux in stars]
    sources += [(rng.uniform(5, 60), 10 ** rng.normal(0.7, 0.2), 1.5, rng.uniform(0.3, 1)) for _ in range(galaxies)]
    for cell, source in zip(rng.permutation(n * n), sources, strict=False):
        y, x = divmod(int(cell), n)
        parameters = np.array([*rng.uniform(31, 32, 2), *source, rng.uniform(0, 180)])
        image[64 * y : 64 * y + 64, 64 * x : 64 * x + 64] += draw(parameters)[0]
    return image


def found_in(image, **options):
    source = Held(Pixels(image, np.zeros(image.shape, bool)))
    return find_psf(source, estimate_sky(source, Detector().threshold), **options)


def test_the_psf_of_a_field_is_that_of_its_stars():
    psf = effective_psf(F160W)
    found = found_in(field(10 ** np.random.default_rng(107).uniform(1, 2.7, 20), 24, psf, seed=7))
    true = Psf.of(psf, "truth")
    assert found.reason == ""
    assert not found.psf.varies
    assert found.psf.oversampling == 2
    assert found.psf.source == f"{len(found.x)} stars"
    assert len(found.x) >= 14
    assert found.psf.fwhm == pytest.approx(true.fwhm, rel=0.004)
    assert abs(found.psf.fwhm / true.fwhm - 1) < 2 * found.psf.error
    within = true.fwhm * np.array([1, 2])
    share = found.psf.encircled(within) / found.psf.encircled(4 * true.fwhm)
    assert share == pytest.approx(true.encircled(within) / true.encircled(4 * true.fwhm), rel=0.005)
    assert found.narrowest == found.widest == found.psf.fwhm
    assert found.ellipticity < 0.02
    assert 0 <= found.scatter < 0.02
    assert found.psf.error < 0.01


def test_broad_stars_are_found_in_blocks_of_pixels():
    psf = effective_psf(F160W, stretch=2.2)
    found = found_in(field(10 ** np.random.default_rng(1).uniform(1.5, 2.7, 14), 0, psf))
    assert found.psf.fwhm == pytest.approx(Psf.of(psf, "truth").fwhm, rel=0.02)


def test_the_reason_for_no_psf_is_given_in_words():
    psf = effective_psf(F160W)
    assert "no stellar locus among 0 bright sources" in found_in(field([], 0, psf)).reason
    few = found_in(field([100.0, 200.0, 300.0], 20, psf))
    assert few.psf is None
    assert few.reason.startswith("no stellar locus among ")
    assert few.few is not None
    assert len(few.few.x) == len(few.x) == 3
    saturated = found_in(field(10 ** np.linspace(1.5, 2.5, 8), 0, psf), saturation=0.2)
    assert saturated.psf is None
    assert saturated.reason == "8 stars, all saturated; 5 others are needed"


def test_the_psf_does_not_depend_on_workers(monkeypatch):
    monkeypatch.setattr(starpsf, "WINDOW", 192)
    image = field(10 ** np.random.default_rng(1).uniform(1, 2.7, 9), 10, effective_psf(F160W), size=384)
    alone = found_in(image)
    with ThreadPoolExecutor(2) as pool:
        together = found_in(image, apply=pool.map)
    assert np.array_equal(alone.psf.image, together.psf.image)
    assert np.array_equal(alone.x, together.x)


def test_a_star_in_two_windows_counts_once(monkeypatch):
    for name, value in (("WINDOW", 256), ("WINDOWS", 2), ("MORE_WINDOWS", 1)):
        monkeypatch.setattr(starpsf, name, value)
    image = field(10 ** np.random.default_rng(1).uniform(1, 2.7, 20), 10, effective_psf(F160W), size=384)
    first, more = starpsf._windows(image.shape)
    assert first[0][0].stop > first[1][0].start
    assert more[0][0].start < first[0][0].stop
    found = found_in(image)
    assert len(found.x) > 8
    assert np.unique(np.rint([found.x, found.y]), axis=1).shape[1] == len(found.x)


@pytest.mark.parametrize("shape", [(700, 900), (5000, 5000), (3000, 40000), (60000, 60000)])
def test_windows_are_spread_over_the_whole_image(shape):
    first, *more = list(starpsf._windows(shape))
    both = [*first, *(window for windows in more for window in windows)]
    for windows in (first, both):
        assert min(rows.start for rows, _ in windows) == 0
        assert max(rows.stop for rows, _ in windows) == shape[0]
        assert min(columns.start for _, columns in windows) == 0
        assert max(columns.stop for _, columns in windows) == shape[1]
    area = sum((r.stop - r.start) * (c.stop - c.start) for r, c in both)
    assert area <= 35 * WINDOW**2
    if len(first) <= starpsf.WINDOWS + starpsf.MORE_WINDOWS and not more:
        assert area == shape[0] * shape[1]
