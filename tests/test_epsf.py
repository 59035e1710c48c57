from dataclasses import replace

import galsim
import numpy as np
import pytest

from sersicnet.engine.render import Renderer
from sersicnet.image import epsf
from sersicnet.image.epsf import LEAST_STARS, LEAST_VARIED, REACH, StarStamps, measure_psf
from sersicnet.image.epsfmodel import Model, smoothness
from sersicnet.image.epsfstars import Stars
from sersicnet.image.psf import Psf, core_of, full_width
from sersicnet.simulating.observatories import usual_psf

SIDE = 56


def moffat(fwhm, shear=0.0, pixel=1.0):
    """An effective PSF: a Moffat profile, and the pixel."""
    profile = galsim.Moffat(beta=3, fwhm=fwhm).shear(g1=shear, g2=shear / 2)
    return galsim.Convolve([profile, galsim.Pixel(pixel)])


def drawn(profile, x, y, side=SIDE):
    offset = x - (side - 1) / 2, y - (side - 1) / 2
    return profile.drawImage(nx=side, ny=side, scale=1, method="no_pixel", offset=offset, dtype=float).array


def truth(profile, oversampling):
    side = 2 * REACH * oversampling + 1
    image = profile.drawImage(nx=side, ny=side, scale=1 / oversampling, method="no_pixel", dtype=float).array
    return Psf.of(image / image.sum(), "truth", oversampling)


def stars_of(profiles, seed=0, flux=(2000, 20000), noise=1.0):
    """Stamps of one star a profile, with a rough centre."""
    rng = np.random.default_rng(seed)
    n = len(profiles)
    centres = 27.5 + rng.uniform(-0.5, 0.5, (n, 2))
    light = np.exp(rng.uniform(*np.log(flux), n))
    values = np.array([f * drawn(p, *c) for f, p, c in zip(light, profiles, centres, strict=True)])
    values += rng.normal(0, noise, values.shape)
    rough = centres + rng.uniform(-0.5, 0.5, (n, 2))
    return StarStamps(values, np.full(values.shape, noise), np.zeros(values.shape, bool), *rough.T), centres


def measured(stamps, fwhm, **options):
    found = measure_psf(stamps, fwhm, **options)
    assert found is not None
    assert found.images.shape[1] == 2 * REACH * found.oversampling + 1
    return found, Psf.of(found.images[0], "measured", found.oversampling)


@pytest.mark.parametrize(("fwhm", "shear", "oversampling"), [(0.8, 0.0, 4), (1.5, 0.0, 3), (2.8, 0.1, 2)])
def test_the_psf_is_measured_finer_than_the_pixels(fwhm, shear, oversampling):
    profile = moffat(fwhm, shear)
    stamps, centres = stars_of([profile] * 14)
    true = truth(profile, oversampling)
    found, psf = measured(stamps, 1.05 * true.fwhm)
    assert found.oversampling == oversampling
    assert found.used.all()
    assert psf.fwhm == pytest.approx(true.fwhm, rel=0.012)
    within = np.array([1, 2, 4]) * true.fwhm
    assert psf.encircled(within) == pytest.approx(true.encircled(within), rel=0.01)
    assert psf.ellipticity == pytest.approx(true.ellipticity, abs=0.01)
    core = core_of(found.images[0])
    assert np.hypot(core.row - len(found.images[0]) // 2, core.column - len(found.images[0]) // 2) < 0.01 * oversampling
    assert np.abs(np.column_stack([found.x, found.y]) - centres).max() < 0.03


@pytest.mark.parametrize(("instrument", "band", "scale"), [("NIRCAM", "F200W", 0.03), ("HSC", "i", 0.168)])
def test_wings_in_the_noise_are_those_of_diffraction_or_seeing(instrument, band, scale):
    true, _ = usual_psf({"INSTRUME": instrument, "FILTER": band}, scale)
    render, n, errors = Renderer(true.image, 81, true.oversampling), 30, []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        centres = 40 + rng.uniform(-0.5, 0.5, (n, 2))
        flux = np.exp(rng.uniform(*np.log((100, 1000)), n)) * 1.5 * true.fwhm
        point = np.tile([0.02, 1.0, 1.0, 0.0], (n, 1))
        values = render(np.column_stack([centres, flux, point])) + rng.normal(0, 1, (n, 81, 81))
        stamps = StarStamps(values, np.ones_like(values), np.zeros(values.shape, bool), *centres.T)
        _, psf = measured(stamps, 1.03 * true.fwhm)
        errors.append(psf.encircled(4 * true.fwhm) / true.encircled(4 * true.fwhm) - 1)
    assert abs(np.mean(errors)) < 0.01


def test_the_usual_slope_of_wings_does_not_depend_on_the_direction_of_an_ellipse():
    round_ = Model.moffat(4.0)
    bright = replace(round_, profile=np.clip(np.linspace(-2, 5, len(round_.profile)), 0, None))
    slopes = [smoothness(bright.wider(np.array([0, by, 0])))[1][-1] for by in (0.8, -0.8)]
    assert slopes[0] == pytest.approx(slopes[1], abs=0.03)
    assert 2.6 < slopes[0] < 3.2  # than the Moffat profile: between those of seeing and of diffraction


def test_the_error_of_the_width_covers_its_offset():
    profile = moffat(2.4)
    width, pulls = truth(profile, 2).fwhm, []
    for seed in range(2):
        stamps, _ = stars_of([profile] * 10, seed, flux=(1500, 6000))
        found, psf = measured(stamps, 1.05 * width)
        pulls.append((psf.fwhm / width - 1) / found.error)
        assert found.error < 0.02
    assert np.abs(pulls).max() < 2


def test_the_error_of_the_light_covers_its_offset_and_falls_with_better_stars():
    profile, errors = moffat(2.4), {}
    true = truth(profile, 2)
    for flux in (1500, 20000):
        found, pulls = [], []
        for seed in range(3):
            stamps, _ = stars_of([profile] * 10, seed, flux=(flux, 4 * flux))
            of_stars, psf = measured(stamps, 1.05 * true.fwhm)
            light = psf.encircled(2 * true.fwhm) / true.encircled(2 * true.fwhm)
            found.append(of_stars.light_error)
            pulls.append((light - 1) / of_stars.light_error)
        assert np.abs(pulls).max() < 2.5
        errors[flux] = np.mean(found)
    assert 0.002 < errors[20000] < 0.5 * errors[1500] < 0.01


def test_doubles_galaxies_and_clipped_stars_are_dropped():
    profile = moffat(2.6)
    stamps, centres = stars_of([profile] * 16, flux=(5000, 20000))
    (x, y), values = centres[0], stamps.values
    values[0] += 4000 * drawn(profile, x + 1.5, y)
    values[1] = 8000 * drawn(galsim.Convolve([galsim.Exponential(half_light_radius=0.8), profile]), *centres[1])
    values[2] = np.minimum(values[2], 0.6 * values[2].max())
    found, psf = measured(stamps, 2.8)
    assert list(np.flatnonzero(~found.used)) == [0, 1, 2]
    assert psf.fwhm == pytest.approx(truth(profile, 2).fwhm, rel=0.01)


def test_cosmic_rays_masks_and_offsets_of_the_sky_do_no_harm():
    profile = moffat(2.6)
    stamps, _ = stars_of([profile] * 12, flux=(5000, 20000))
    rng = np.random.default_rng(1)
    for star, values in enumerate(stamps.values):
        values[tuple(rng.integers(0, SIDE, (2, 5)))] += 300
        values[29, 26 + star % 4] += 500
        values += 0.5 * (star % 3)
    stamps.values[3, 8:18, 32:46] = np.nan
    stamps.values[4, :, 39:] += 100
    stamps.unusable[4, :, 39:] = True
    found, psf = measured(stamps, 2.8)
    true = truth(profile, 2)
    assert found.used.sum() >= 10
    assert psf.fwhm == pytest.approx(true.fwhm, rel=0.01)
    within = np.array([1, 2, 4]) * true.fwhm
    assert psf.encircled(within) == pytest.approx(true.encircled(within), rel=0.02)
    assert found.sky[found.used] == pytest.approx((0.5 * (np.arange(12) % 3))[found.used], abs=0.2)


def test_fewer_stars_than_needed_are_no_psf():
    stamps, _ = stars_of([moffat(2.6)] * (LEAST_STARS - 1))
    assert measure_psf(stamps, 2.8) is None
    different, _ = stars_of([moffat(f) for f in (1.5, 2, 3, 4, 5, 6)])
    assert measure_psf(different, 2.8) is None


def test_noise_alone_is_no_psf():
    values = np.random.default_rng(0).normal(0, 1, (8, SIDE, SIDE))
    middle = np.full(8, 27.5)
    assert measure_psf(StarStamps(values, np.ones_like(values), values > 9, middle, middle), 3.0) is None


@pytest.mark.parametrize("change", [0.0, 0.08])
def test_the_psf_varies_over_the_field_where_it_pays(change):
    rng = np.random.default_rng(2)
    places = rng.uniform(-1, 1, (LEAST_VARIED + 10, 2))
    profiles = [moffat(2.6 * (1 + change * x)) for x, _ in places]
    stamps, _ = stars_of(profiles, flux=(3000, 20000))
    cropped = StarStamps(*(a[:, 8:-8, 8:-8] for a in stamps[:3]), stamps.x - 8, stamps.y - 8)
    found, _ = measured(cropped, 2.8, places=places)
    assert found.degree == (1 if change else 0)
    for x in (-0.8, 0.0, 0.8):
        expected = truth(moffat(2.6 * (1 + change * x)), 2).fwhm
        assert full_width(found.at(x, 0.3), 2) == pytest.approx(expected, rel=0.012)


def test_broad_stars_vary_within_the_grid_of_the_departure():
    """Three FWHM of 12 pixels are more than the grid has."""
    side, places = 81, np.array([[x, y] for x in (-0.5, 0.5) for y in (-0.5, 0.5)])
    values = np.array([1e5 * drawn(moffat(12), 40, 40, side)] * 4)
    middle = np.full(4, 40.0)
    stars = Stars.of(StarStamps(values, np.ones_like(values), np.zeros(values.shape, bool), middle, middle), 1.0)
    model = Model.moffat(12.0)
    stars.begin(12.0)
    stars.fit(model, 3.0)
    components = epsf._components(model, stars, places, 1)
    assert components.shape == (3, *model.departure.shape)
    assert np.abs(components[1:]).max() < 1e-6 * model.round(np.zeros(1), np.zeros(1))[0]


def test_squares_about_broad_stars_end_with_their_stamps():
    values = np.zeros((1, 40, 40))
    middle = np.array([19.5])
    stars = Stars.of(StarStamps(values, values + 1, values > 0, middle, middle), 1.0)
    (_, rows, columns), u, v = stars.core(35.0)
    assert rows.min() == columns.min() >= 0
    assert np.array_equal(u[0, 0], columns.ravel() - 19.5)
    assert np.array_equal(v[0, :, 0], rows.ravel() - 19.5)
