import galsim
import numpy as np
import pytest

from sersicnet.errors import InputError
from sersicnet.instrument import F160W
from sersicnet.render import Renderer, sersic_b
from sersicnet.simulate import effective_psf

SCALE = F160W.pixel_scale


def gaussian_psf(sigma=1.5, size=41):
    y, x = np.indices((size, size)) - size // 2
    return np.exp(-(x**2 + y**2) / (2 * sigma**2))


def galsim_stamp(x, y, flux, r_eff, n, q, theta, sigma=1.5):
    """The same galaxy by GalSim, whose half-light radius is the circularised one."""
    accuracy = galsim.GSParams(folding_threshold=1e-3, maxk_threshold=1e-4, maximum_fft_size=20000)
    galaxy = galsim.Sersic(n=n, half_light_radius=r_eff * np.sqrt(q), flux=flux, gsparams=accuracy)
    galaxy = galaxy.shear(q=q, beta=theta * galsim.degrees)
    seen = galsim.Convolve([galaxy, galsim.Gaussian(sigma=sigma)], gsparams=accuracy)
    offset = (x - 63.5, y - 63.5)
    return seen.drawImage(nx=128, ny=128, scale=1.0, offset=offset, method="no_pixel").array


@pytest.mark.parametrize(
    ("r_eff", "n", "q", "theta"),
    [
        (1.3, 0.5, 1.0, 0),
        (1.3, 6.2, 0.3, 30),
        (8.0, 1.0, 0.6, -50),
        (8.0, 4.0, 0.05, 120),
        (25.0, 2.5, 0.4, 75),
        (50.2, 1.0, 0.03, 45),
        (50.2, 4.0, 0.9, 10),
    ],
)
def test_agrees_with_galsim(r_eff, n, q, theta):
    row = (63.3, 63.9, 1000.0, r_eff, n, q, theta)
    ours = Renderer(gaussian_psf())(np.array(row))[0]
    theirs = galsim_stamp(*row)
    assert np.abs(ours - theirs).max() < 2e-3 * theirs.max()
    assert ours.sum() == pytest.approx(theirs.sum(), rel=1e-3)


def test_flux_is_total_flux():
    stamp = Renderer(gaussian_psf())(np.array([63.5, 63.5, 42.0, 5.0, 1.0, 0.7, 20]))[0]
    assert stamp.sum() == pytest.approx(42.0, rel=1e-4)


@pytest.mark.parametrize("q", [1.0, 0.4])
def test_half_of_the_light_is_within_the_semi_major_radius(q):
    r_eff, n, theta = 18.0, 1.0, 33.0
    stamp = Renderer(gaussian_psf(0.8))(np.array([63.5, 63.5, 1.0, r_eff, n, q, theta]))[0]
    y, x = np.indices(stamp.shape) - 63.5
    cos, sin = np.cos(np.radians(theta)), np.sin(np.radians(theta))
    radius = np.hypot(x * cos + y * sin, (y * cos - x * sin) / q)
    assert stamp[radius < r_eff].sum() == pytest.approx(0.5, abs=0.01)


def test_angle_runs_from_x_to_y():
    render = Renderer(gaussian_psf())
    along_x, along_y = render(np.array([[63.5, 63.5, 1, 9, 2, 0.3, angle] for angle in (0, 90)]))
    assert along_x[64, 84] > along_x[84, 64]
    np.testing.assert_allclose(np.rot90(along_x), along_y, atol=1e-6 * along_x.max())


def test_a_shift_by_whole_pixels_moves_the_image():
    render = Renderer(gaussian_psf())
    here, there = render(np.array([[60.2, 63.7, 1, 3, 1.5, 0.5, 12], [63.2, 65.7, 1, 3, 1.5, 0.5, 12]]))
    np.testing.assert_allclose(there[10:100, 10:100], here[8:98, 7:97], atol=1e-5 * here.max())


def test_centroid_is_the_position():
    stamp = Renderer(effective_psf(F160W))(np.array([63.1, 63.8, 1, 2.0, 1.0, 0.8, 0]))[0]
    y, x = np.indices(stamp.shape)
    core = np.hypot(x - 63.1, y - 63.8) < 30
    assert (stamp * x)[core].sum() / stamp[core].sum() == pytest.approx(63.1, abs=0.01)
    assert (stamp * y)[core].sum() / stamp[core].sum() == pytest.approx(63.8, abs=0.01)


@pytest.mark.parametrize(
    "row",
    [
        (63.3, 63.9, 100.0, 1.5, 4.0, 0.8, 30),
        (63.3, 63.9, 100.0, 8.0, 1.0, 0.5, -50),
        (63.3, 63.9, 100.0, 45.0, 5.0, 0.6, 75),
        (60.3, 66.9, 100.0, 45.0, 2.0, 0.2, 75),
        (63.3, 63.9, 100.0, 30.0, 4.0, 0.06, 20),
    ],
)
@pytest.mark.parametrize("parameter", range(7))
def test_derivatives_agree_with_differences(row, parameter):
    render = Renderer(gaussian_psf())
    step = (0.02, 0.02, 1.0, 0.01 * row[3], 0.01 * row[4], 0.01 * row[5], 0.5)[parameter]
    ends = np.array([row, row], float)
    ends[:, parameter] += [-step, step]
    low, high = render(ends)
    stamps, derivatives = render.with_derivatives(np.array(row))
    np.testing.assert_allclose(stamps[0], render(np.array(row))[0], atol=1e-6 * stamps.max())
    difference = (high - low) / (2 * step)
    ours = derivatives[0, parameter]
    assert np.abs(ours - difference).max() < 5e-3 * np.abs(difference).max()


def test_derivatives_of_a_bad_galaxy_are_nan_and_alone():
    rows = np.array([[63.5, 63.5, 1, 5, np.nan, 0.7, 0], [63.5, 63.5, 1, 5, 1, 0.7, 0]])
    _, derivatives = Renderer(gaussian_psf()).with_derivatives(rows)
    assert np.isnan(derivatives[0]).all()
    assert np.isfinite(derivatives[1]).all()


def test_a_galaxy_far_from_the_middle():
    row = (12.3, 110.9, 1000.0, 20.0, 4.0, 0.5, 30)
    ours, theirs = Renderer(gaussian_psf())(np.array(row))[0], galsim_stamp(*row)
    assert np.abs(ours - theirs).max() < 2e-3 * theirs.max()
    assert ours.sum() == pytest.approx(theirs.sum(), rel=1e-3)


def test_high_index_can_be_drawn():
    stamp = Renderer(gaussian_psf())(np.array([63.5, 63.5, 1.0, 5.0, 8.0, 0.7, 0]))[0]
    assert np.isfinite(stamp).all()
    assert 0.8 < stamp.sum() < 1


@pytest.mark.parametrize("bad", [{3: np.nan}, {3: -1}, {4: 0.1}, {4: 9}, {5: 0}, {5: 1.1}, {0: np.inf}])
def test_a_bad_galaxy_is_nan_and_alone(bad):
    rows = np.array([[63.5, 63.5, 1, 5, 1, 0.7, 0]] * 2, float)
    for column, value in bad.items():
        rows[0, column] = value
    stamps = Renderer(gaussian_psf())(rows)
    assert np.isnan(stamps[0]).all()
    assert np.isfinite(stamps[1]).all()


@pytest.mark.parametrize(
    "psf", [np.ones((4, 4)), np.ones((5, 7)), np.full((5, 5), np.nan), -np.ones((5, 5)), np.ones(5)]
)
def test_a_bad_psf_is_refused(psf):
    with pytest.raises(InputError, match="A PSF"):
        Renderer(psf)


def test_b_of_a_known_index():
    assert sersic_b(1) == pytest.approx(1.6783469900166605)
    assert sersic_b(4) == pytest.approx(7.669249443)
