import dataclasses
import json

import numpy as np
import pytest
from scipy import special

from sersicnet.errors import InputError
from sersicnet.image.psf import full_width
from sersicnet.simulating.described import cameras, read_telescope
from sersicnet.simulating.observatories import TELESCOPES, known_psf, telescopes
from sersicnet.simulating.optics import FIELD, Optics, draw_optics, measured

SPACE = Optics(
    diffraction=1.2,
    band=0.2,
    obscuration=0.3,
    struts=4,
    strut_width=0.02,
    angle=20.0,
    wavefront=(0.0, 0.03, 0.0, 0.04, 0.02, 0.02),
    profiles=((0.1, 4.0, 2.0),),
    blur=0.3,
    pixel=1.4,
    resampling="drizzle",
    drop=0.8,
    turn=30.0,
)
GROUND = Optics(profiles=((0.8, 3.5, 3.0), (0.2, 5.0, 0.0)), outer_scale=100.0, rays=(0.1, 0.1, 0.0, 0.1, 0.0, 0.1))
DRAWN = [draw_optics(np.random.default_rng(seed)) for seed in range(12)]


def offset(image):
    """Centroid of the core, x and y in pixels from the middle one."""
    middle, sigma = len(image) // 2, full_width(image) / 2.355
    line = np.arange(len(image)) - middle
    weight = image * np.exp(-0.5 * (line[:, None] ** 2 + line**2) / sigma**2)
    return np.array([(weight * line).sum(), (weight * line[:, None]).sum()]) / weight.sum()


def gaussian_in_pixels(sigma, positions):
    edges = positions[:, None] + [0.5, -0.5]
    return 0.5 * -np.diff(special.erf(edges / sigma / np.sqrt(2)), axis=1)[:, 0]


def test_the_light_of_the_field_is_one_and_its_core_is_in_the_middle():
    for optics in DRAWN[:6]:
        image = optics.image(2)
        assert image.shape == (2 * FIELD - 1,) * 2
        assert image.dtype == float
        assert image.sum() == pytest.approx(1, abs=1e-12)
        assert np.abs(offset(image)).max() < 0.02


@pytest.mark.parametrize("optics", [SPACE, GROUND], ids=["space", "ground"])
def test_a_finer_image_has_more_samples_of_the_same_psf(optics):
    once, twice, thrice = (optics.image(n) for n in (1, 2, 3))
    for fine, n in ((twice, 2), (thrice, 3)):
        same = fine[::n, ::n]
        np.testing.assert_allclose(same / same.sum(), once, atol=1e-4 * once.max())
    assert full_width(once) == pytest.approx(full_width(twice, 2), rel=0.02)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_a_narrow_profile_is_integrated_over_the_pixel_once(sigma):
    image = Optics(profiles=((1.0, 1e-3, 3.0),), blur=sigma).image(2)
    line = gaussian_in_pixels(sigma, np.arange(-FIELD + 1, FIELD) / 2)
    expected = np.outer(line, line) / line.sum() ** 2
    np.testing.assert_allclose(image, expected, atol=1e-4 * expected.max())


def test_profiles_agree_with_those_of_galsim():
    galsim = pytest.importorskip("galsim")
    exact = galsim.GSParams(folding_threshold=1e-3, maximum_fft_size=8192)
    pixel = galsim.Pixel(1, gsparams=exact)
    for optics, profile in (
        (Optics(diffraction=1.5, obscuration=0.3), galsim.Airy(lam_over_diam=1.5, obscuration=0.3, gsparams=exact)),
        (Optics(profiles=((1.0, 3.0, 2.5),)), galsim.Moffat(beta=2.5, fwhm=3, gsparams=exact)),
        (Optics(profiles=((1.0, 3.0, 0.0),)), galsim.Kolmogorov(fwhm=3, gsparams=exact)),
        (
            Optics(profiles=((1.0, 3.0, 3.0),), ellipticity=0.2, position_angle=30.0),
            galsim.Moffat(beta=3, fwhm=3, gsparams=exact).shear(q=0.8, beta=30 * galsim.degrees),
        ),
    ):
        drawn = galsim.Convolve(profile, pixel).drawImage(nx=129, ny=129, scale=1, method="no_pixel", dtype=float).array
        expected = drawn / drawn.sum()
        np.testing.assert_allclose(optics.image(), expected, atol=2e-3 * expected.max())


def test_mirrors_of_hexagons_make_six_spikes_and_four_struts_four():
    angles = np.arange(240) * np.pi / 120
    for optics, spikes in (
        (Optics(diffraction=2.0, hexagons=True), 6),
        (Optics(diffraction=2.0, struts=4, strut_width=0.03), 4),
    ):
        image = optics.image(2)
        along = np.zeros(240)
        for radius in np.linspace(15, 40, 26):
            rows, columns = (np.rint(128 + radius * turn).astype(int) for turn in (np.sin(angles), np.cos(angles)))
            along += image[rows, columns] * radius**3
        power = np.abs(np.fft.rfft(along))[1:9]
        assert np.argmax(power) + 1 == spikes


def test_drizzle_widens_a_psf_and_lanczos_keeps_it():
    narrow = Optics(diffraction=1.5)
    width = full_width(narrow.image(2), 2)
    drizzled = dataclasses.replace(narrow, resampling="drizzle", drop=0.8)
    assert full_width(drizzled.image(2), 2) > 1.1 * width
    wide = Optics(profiles=((1.0, 4.0, 3.0),))
    kept = dataclasses.replace(wide, resampling="lanczos3")
    assert full_width(kept.image(2), 2) == pytest.approx(full_width(wide.image(2), 2), rel=0.01)


def test_a_seed_draws_one_psf_and_a_record_restores_it():
    again = draw_optics(np.random.default_rng(3))
    assert again == DRAWN[3]
    assert draw_optics(np.random.default_rng(99)) != again
    record = json.loads(json.dumps(dataclasses.asdict(again)))
    record["profiles"] = tuple(tuple(profile) for profile in record["profiles"])
    record.update({name: tuple(record[name]) for name in ("wavefront", "rays")})
    assert Optics(**record) == again


def test_drawn_widths_are_those_of_real_telescopes():
    widths = np.array([full_width(optics.image(2), 2) for optics in DRAWN])
    assert (widths > 0.95).all()
    assert (widths < 9).all()
    assert widths.max() > 2.5 * widths.min()


def test_one_psf_in_ten_has_negative_surroundings():
    drawn = [draw_optics(np.random.default_rng([7, seed])) for seed in range(200)]
    negative = [o for o in drawn if o.profiles and o.profiles[-1][0] < 0]
    assert 10 <= len(negative) <= 32
    for one in negative:
        if not one.diffraction:
            assert sum(share for share, _, _ in one.profiles) == pytest.approx(1)
    deepest = min(negative, key=lambda o: o.profiles[-1][0]).image()
    assert deepest.sum() == pytest.approx(1)
    assert deepest.max() == deepest[FIELD // 2, FIELD // 2]


def test_a_stack_of_stars_is_about_the_psf_and_half_of_them_are_exact():
    image = GROUND.image(2)
    stacks = [measured(image, 2, np.random.default_rng(seed)) for seed in range(16)]
    exact = [np.array_equal(stack, image / image.sum()) for stack in stacks]
    assert 4 <= sum(exact) <= 12
    width = full_width(image, 2)
    for stack, same in zip(stacks, exact, strict=True):
        assert stack.shape == image.shape
        assert stack.sum() == pytest.approx(1, abs=1e-12)
        assert np.abs(offset(stack)).max() < 0.2
        if not same:
            assert full_width(stack, 2) == pytest.approx(width, rel=0.06)
    np.testing.assert_array_equal(stacks[0], measured(image, 2, np.random.default_rng(0)))


@pytest.mark.parametrize(
    ("instrument", "filter_", "scale", "arcsec"),
    [
        ("WFC3", "F160W", 0.06, 0.183),  # the CANDELS hybrid PSF
        ("NIRCAM", "F150W", 0.02, 0.059),  # stars in mosaics
        ("NIRCAM", "F200W", 0.02, 0.072),
        ("VIS", "VIS", 0.1, 0.16),  # McCracken et al. (2025)
        ("Hyper Suprime-Cam", "HSC-R2", 0.168, 0.63),  # from here on, the middle of the seeing
        ("DECam", "r DECam SDSS c0002 6415.0 1480.0", 0.263, 1.05),
        ("OMEGACAM", "r_SDSS", 0.2, 0.73),
        ("SDSS", "r", 0.396, 1.28),
    ],
)
def test_the_psf_of_a_known_instrument_has_its_width(instrument, filter_, scale, arcsec):
    optics = known_psf(instrument, filter_, scale)
    assert optics is not None
    assert full_width(optics.image(2), 2) * scale == pytest.approx(arcsec, rel=0.1)


def test_the_psf_of_an_unknown_instrument_is_not_guessed():
    assert known_psf("WFC3", "F999W", 0.06) is None
    assert known_psf("MUSE", "WHITE", 0.2) is None
    assert known_psf("", "", 0.06) is None
    assert known_psf("WFC3", "F160W", 0.5) is None
    assert known_psf("WFC3", "F160W", np.nan) is None


def test_telescopes_have_images_of_plausible_psfs():
    assert [t.title for t in telescopes("hst")] == ["HST ACS/WFC", "HST WFC3/UVIS", "HST WFC3/IR"]
    with pytest.raises(InputError, match=r"A telescope is one of .*hst.*; received 'hubble'"):
        telescopes("hubble")
    for seed, telescope in enumerate(TELESCOPES.values()):
        rng = np.random.default_rng(seed)
        optics = telescope.draw(rng, pixel_scale=telescope.pixel_scales[0])
        assert 1 < full_width(optics.image(2), 2) < 8
        assert telescope.depth[0] < telescope.depth[1]
        assert telescope.wavelengths.keys() == getattr(telescope.zero_points, "keys", telescope.wavelengths.keys)()


MINE = """
wavelengths = {g = 480, r = 620}
pixel_scales = 0.45
seeing = [1.2, 2.0]
electrons = [20, 60]
depth = 21.5
"""


def test_a_file_describes_a_telescope(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(MINE)
    mine = read_telescope(path)
    assert (mine.title, mine.detector, mine.pixel_scales, mine.depth) == ("mine", 0.45, (0.45,), (21.5, 21.5))
    (found,), band = cameras(f"{path}/r")
    assert (found, band) == (mine, "r")
    width = full_width(found.draw(np.random.default_rng(0), "r").image(2), 2) * 0.45
    assert 1.0 < width < 2.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("colour = 3", "colour, which no telescope has"),
        ("depth = [22, 21]", "depth = "),
        ("depth = 'deep'", "depth = 'deep'"),
        ("seeing = 0", "neither"),
        ("pixel_scales = 0", "pixel_scales = 0"),
        ("resampling = 'cubic'", "'cubic'"),
        ("= 3", "cannot be read"),
        ("wavelengths = 3", "wavelengths = 3"),
    ],
)
def test_a_file_that_describes_no_telescope_is_an_error(tmp_path, change, message):
    name = change.split(" ")[0]
    lines = [line for line in MINE.splitlines() if not line.startswith(name or "=")]
    path = tmp_path / "mine.toml"
    path.write_text("\n".join([*lines, change]))
    with pytest.raises(InputError, match=message):
        read_telescope(path)


def test_a_description_that_lacks_something_is_an_error(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("seeing = 1.0")
    with pytest.raises(InputError, match="lacks wavelengths"):
        cameras(str(path))


def test_zero_points_are_those_of_the_images():
    assert TELESCOPES["hst-ir"].zero_point("F160W") == 25.9463
    assert TELESCOPES["jwst-sw"].zero_point("F200W", 0.03) == pytest.approx(28.087, abs=0.001)
    with pytest.raises(InputError, match=r"The filters of HST WFC3/IR are F160W, .*; received 'F606W'"):
        TELESCOPES["hst-ir"].zero_point("F606W")


def test_the_noise_of_a_pixel_follows_from_the_depth():
    kids, depth = TELESCOPES["kids"], 25.0
    pixels = np.pi / 0.2**2
    five_sigma = 5 * np.sqrt(pixels) * 10 ** (-0.4 * kids.rms_magnitude(depth, 0.2))
    assert -2.5 * np.log10(five_sigma) == pytest.approx(depth)
