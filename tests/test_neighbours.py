import astropy.units as u
import numpy as np
import pytest
from astropy.table import Table

from sersicnet.engine.render import Renderer
from sersicnet.errors import SersicnetWarning
from sersicnet.image.pixels import Sky
from sersicnet.image.psf import Psf
from sersicnet.image.stamps import cut
from sersicnet.measuring.fitting import Fitting
from sersicnet.measuring.measure import fit, measure
from sersicnet.measuring.neighbours import HIDDEN_SHARE, HIDDEN_SNR, REACH, Neighbours
from sersicnet.measuring.plan import Work
from sersicnet.schema import LARGE_LIMIT
from sersicnet.simulating.telescopes import F160W, effective_psf

SIZE, RMS, ZERO = 300, 0.003, F160W.zero_point
PSF = effective_psf(F160W, 101)
#            x,    y,    flux, R_e, n,  q,   theta
GALAXY = [150.2, 149.7, 6.0, 4.0, 1.0, 0.6, 30.0]
NEIGHBOUR = [171.6, 160.1, 40.0, 6.0, 2.5, 0.8, -50.0]
BRIGHT = [171.6, 160.1, 150.0, 6.0, 2.5, 0.8, -50.0]


def image_of(*galaxies, seed=0):
    model = Renderer(PSF, SIZE)(np.array(galaxies)).sum(axis=0)
    return model, (model + np.random.default_rng(seed).normal(0, RMS, model.shape)).astype(np.float32)


def found(*galaxies, rms=RMS):
    galaxies = np.array(galaxies, float)
    return Neighbours(galaxies, Psf.of(PSF, "F160W"), np.full(len(galaxies), rms), 1.0)


def stamps_of(data, *galaxies):
    sky = Sky(np.zeros_like(data), np.full_like(data, RMS), np.ones((1, 1)), 1.0)
    x, y = np.array(galaxies)[:, :2].T
    return cut(data, np.zeros(data.shape, bool), sky, x, y)


def window(image, galaxy):
    """The part of an image that is the stamp of a galaxy."""
    x, y = (int(np.ceil(place - 64)) for place in galaxy[:2])
    return image[y : y + 128, x : x + 128]


def test_the_light_of_a_neighbour_is_that_of_its_model():
    """Without the little that the galaxy's own light adds to the measured flux of the neighbour."""
    _, data = image_of(GALAXY, NEIGHBOUR)
    others = found(GALAXY, NEIGHBOUR)
    which = others.of(np.arange(2))
    assert which.tolist() == [0, 1]
    light = others.light(which[:1], stamps_of(data, GALAXY))[0]
    model, _ = image_of(NEIGHBOUR)
    truth = window(model, GALAXY)
    np.testing.assert_allclose(light, truth, rtol=0.06, atol=0.1 * RMS)
    assert light.sum() == pytest.approx(truth.sum(), rel=0.05)


@pytest.mark.parametrize(("there", "most"), [(0.0, 0.1), (0.5, 0.65)])
def test_light_that_is_not_in_the_stamp_is_not_subtracted(there, most):
    fainter = [*NEIGHBOUR[:2], there * NEIGHBOUR[2], *NEIGHBOUR[3:]]
    _, data = image_of(GALAXY, fainter)
    others = found(GALAXY, NEIGHBOUR)
    light = others.light(np.array([0]), stamps_of(data, GALAXY))[0]
    model, _ = image_of(NEIGHBOUR)
    share = light.sum() / window(model, GALAXY).sum()
    assert there - 0.15 < share < most


@pytest.mark.parametrize(
    "other",
    [
        [150.2 + REACH + 1, *NEIGHBOUR[1:]],
        [*NEIGHBOUR[:2], 0.01, *NEIGHBOUR[3:]],
        [*NEIGHBOUR[:2], np.nan, *NEIGHBOUR[3:]],
        [*NEIGHBOUR[:2], -40.0, *NEIGHBOUR[3:]],
        [*NEIGHBOUR[:3], LARGE_LIMIT + 1, *NEIGHBOUR[4:]],
        [*NEIGHBOUR[:5], -0.8, 0.0],
        [*NEIGHBOUR[:3], 30.0, 1.0, -0.8, 0.0],
        [*NEIGHBOUR[:4], 50.0, 0.8, 0.0],
    ],
    ids=["far", "faint", "unknown", "negative", "too large", "thinner than a line", "and large", "too steep"],
)
def test_some_are_nobodys_neighbour(other):
    assert 0 not in found(GALAXY, other).of(np.arange(2))


def test_a_knot_on_a_galaxy_takes_nothing_from_it():
    """What was measured of it is the light of the galaxy."""
    galaxy = [150.0, 150.0, 400.0, 15.0, 1.0, 0.9, 0.0]
    knot = [160.0, 150.0, 8.0, 5.0, 1.0, 0.9, 0.0]
    _, data = image_of(galaxy)
    others = found(galaxy, knot)
    which = others.of(np.array([0]))
    assert which.tolist() == [0]
    assert np.abs(others.light(which, stamps_of(data, galaxy))).sum() < 0.1


def test_the_light_hidden_in_a_galaxy_is_that_of_sources_like_those_around_it():
    """As of Poisson-distributed sources in the area of the galaxy and the PSF; bright ones count as the limit."""
    at = np.random.default_rng(1).uniform(100, 200, (30, 2))
    faint = [[x, y, 0.1, 1.0, 1.0, 1.0, 0.0] for x, y in at]
    width = Psf.of(PSF, "F160W").fwhm / 2.355
    area = 4 * np.pi * (width**2 + 0.5 * GALAXY[5] * GALAXY[3] ** 2)
    expected = np.sqrt(30 * area / 128**2) * 0.1 / GALAXY[2]
    assert found(GALAXY, *faint).hidden[0] == pytest.approx(expected, rel=1e-6)
    assert found(GALAXY).hidden.tolist() == [0.0]
    limit = min(HIDDEN_SHARE * GALAXY[2], HIDDEN_SNR * RMS * np.sqrt(4 * np.pi) * width)
    more = np.hypot(expected, np.sqrt(area / 128**2) * limit / GALAXY[2])
    assert found(GALAXY, NEIGHBOUR, *faint).hidden[0] == pytest.approx(more, rel=1e-6)
    assert np.isnan(found([150.0, 150.0, -1.0, 2.0, 1.0, 1.0, 0.0], *faint).hidden[0])


def test_the_light_hidden_does_not_depend_on_the_order_of_the_sources():
    rng = np.random.default_rng(2)
    all_of_them = np.array([[*rng.uniform(90, 210, 2), rng.lognormal(-2, 2), 1.0, 1.0, 1.0, 0.0] for _ in range(60)])
    order = rng.permutation(60)
    np.testing.assert_array_equal(found(*all_of_them).hidden[order], found(*all_of_them[order]).hidden)


def test_the_wings_of_a_bright_star_reach_farther_than_a_profile():
    star = [150.0, 150.0, 3000.0, 0.1, 0.5, 1.0, 0.0]
    assert found(star, [200.0, 150.0, *GALAXY[2:]]).of(np.arange(2)).tolist() == [1]


def ring(flux=0.15):
    """Fourteen faint sources around the galaxy, none nearer than 30 pixels, and what that hides in it."""
    angle = np.arange(14) * 2 * np.pi / 14
    around = [[150 + 45 * np.cos(a), 150 + 45 * np.sin(a), flux, 1.0, 1.0, 0.9, 0.0] for a in angle]
    return around, np.sqrt(14 * 4 * np.pi * (1.34**2 + 0.3 * 16) / 128**2) * flux / 6


def measured(*others, positions=None):
    _, data = image_of(GALAXY, *others)
    with pytest.warns(SersicnetWarning, match="WCS"):
        return measure(data, zero_point=ZERO, pixel_scale=0.06, psf=Psf.of(PSF, "F160W"), gain=1e6, positions=positions)


def of_galaxy(catalogue):
    return catalogue[np.argmin(np.hypot(catalogue["x"].value - GALAXY[0], catalogue["y"].value - GALAXY[1]))]


@pytest.fixture(scope="module")
def row():
    return of_galaxy(measured(NEIGHBOUR))


def test_a_galaxy_beside_a_brighter_one_is_measured_without_its_light(row):
    """With the light of its neighbour, it is 0.19 mag too bright and 13 % too large."""
    assert row["mag"].value == pytest.approx(ZERO - 2.5 * np.log10(GALAXY[2]), abs=0.06)
    assert row["r_eff_pix"].value == pytest.approx(GALAXY[3], rel=0.05)
    assert row["sersic_n"] == pytest.approx(GALAXY[4], rel=0.12)
    assert row["ellipticity"] == pytest.approx(1 - GALAXY[5], abs=0.03)


def test_the_error_includes_that_of_the_subtracted_light(row):
    brighter = of_galaxy(measured(BRIGHT))
    assert brighter["mag_err"] > 2 * row["mag_err"]
    assert abs(brighter["mag"].value - (ZERO - 2.5 * np.log10(GALAXY[2]))) < 2 * brighter["mag_err"].value


def test_the_error_includes_that_of_sources_that_are_hidden():
    around, hidden = ring()
    alone, among = of_galaxy(measured()), of_galaxy(measured(*around))
    assert among["mag_err"].value ** 2 - alone["mag_err"].value ** 2 > 0.8 * (0.9 * hidden) ** 2
    assert among["theta_err"] > alone["theta_err"]


@pytest.mark.parametrize("refine", [False, True])
def test_the_errors_of_fits_include_that_of_sources_that_are_hidden(refine):
    """Also that of the flux. Where no network measures the faint sources, their flux is that of the detected pixels."""
    around, hidden = ring(0.4)
    rows = []
    for others in ([], around):
        _, data = image_of(GALAXY, *others)
        fitting = Fitting(gain=1e6, prior="none")
        options = {"zero_point": ZERO, "pixel_scale": 0.06, "psf": Psf.of(PSF, "F160W")}
        options |= {"refine": fitting, "gain": 1e6} if refine else {"fitting": fitting}
        with pytest.warns(SersicnetWarning, match="WCS"):
            found = (measure if refine else fit)(data, **options)
        rows.append(of_galaxy(found))
    alone, among = rows
    assert alone["fit_status"] == among["fit_status"] == 0
    for name, expected in (("mag", 0.9), ("flux", 0.83 * GALAXY[2])):
        errors = [u.Quantity(row[f"{name}_err"]).value for row in (among, alone)]
        assert 0.7 < (errors[0] ** 2 - errors[1] ** 2) / (expected * hidden) ** 2 < 1.5
    assert among["theta_err"] > alone["theta_err"]


def test_neighbours_count_if_they_are_not_in_the_table_of_positions(row):
    """Whether both galaxies are measured, or one of them, its values are the same."""
    one = measured(NEIGHBOUR, positions=Table({"x": [row["x"].value], "y": [row["y"].value]}))
    assert len(one) == 1
    for name in ("mag", "r_eff_pix", "sersic_n", "ellipticity", "mag_err"):
        np.testing.assert_allclose(one[name][0], row[name], rtol=1e-5)


def test_a_galaxy_that_is_listed_twice_is_measured_as_if_it_was_listed_once():
    """And its neighbour, too: neither counts twice, nor as a neighbour of itself."""
    galaxy, other = GALAXY[:2], NEIGHBOUR[:2]
    once, twice = (
        measured(NEIGHBOUR, positions=Table(rows=rows, names=("x", "y")))
        for rows in ([galaxy, other], [galaxy, other, other, galaxy])
    )
    for name in ("mag", "mag_err", "r_eff_pix", "r_eff_pix_err", "sersic_n_err", "ellipticity", "theta_err"):
        np.testing.assert_allclose(twice[name][[0, 1]], once[name], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(twice[name][[3, 2]], once[name], rtol=1e-5, err_msg=name)


def test_the_errors_of_fits_do_not_depend_on_the_tiles():
    """The hidden light followed from the second look at the sources of the tile, and the first look at others."""
    rng = np.random.default_rng(5)
    others = [[*rng.uniform(20, 280, 2), 10 ** rng.uniform(0, 1.5), 3.0, 1.0, 0.7, 20.0] for _ in range(40)]
    _, data = image_of(GALAXY, *others)
    options = {"zero_point": ZERO, "pixel_scale": 0.06, "psf": Psf.of(PSF, "F160W"), "gain": 1e6}
    with pytest.warns(SersicnetWarning, match="WCS"):
        one, four = (
            measure(data, refine=Fitting(gain=1e6, prior="none"), work=Work(tile=tile), **options)
            for tile in (300, 128)
        )
    assert len(one) == len(four) > 30
    order = [np.lexsort((table["y"].value, table["x"].value)) for table in (one, four)]
    for name in ("mag", "mag_err", "r_eff_pix_err", "sersic_n_err", "ellipticity_err", "theta_err"):
        np.testing.assert_allclose(one[name][order[0]], four[name][order[1]], rtol=1e-5, err_msg=name)
