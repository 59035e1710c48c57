import numpy as np
import pytest
from astropy.table import QTable, Table

from sersicnet.errors import InputError
from sersicnet.schema import TARGET_NAMES
from sersicnet.simulating import population
from sersicnet.simulating.population import FULL_RANGES
from sersicnet.simulating.recipe import Prior, Simulation
from sersicnet.simulating.stamps import _draw_shape


def drawn(prior, n=3000, seed=0):
    rng = np.random.default_rng(seed)
    galaxies = [_draw_shape(prior, rng) for _ in range(n)]
    return np.array([[galaxy[name] for name in TARGET_NAMES] for galaxy in galaxies])


def test_candels_has_the_distributions_of_the_catalogue():
    """Of the 10,968 good galaxies of van der Wel et al. (2014) in COSMOS with 18 < mag < 25."""
    values = drawn(Prior.candels())
    assert values[:, 0].min() >= 18
    assert values[:, 0].max() <= 25
    medians, widths = (23.853, 0.713, 0.127, 0.490), (0.06, 0.02, 0.025, 0.02)
    values[:, 1:3] = np.log10(values[:, 1:3])
    for column, median, width in zip(values.T, medians, widths, strict=True):
        assert np.median(column) == pytest.approx(median, abs=width)
    correlation = np.corrcoef(values.T)
    assert correlation[0, 1] == pytest.approx(-0.26, abs=0.05)
    assert correlation[1, 3] == pytest.approx(0.24, abs=0.06)


def test_galaxies_to_a_limit_are_as_many_at_every_magnitude():
    prior = Prior.candels(limit=27.0)
    values = drawn(prior, 10_000)
    assert prior.mag == (18, 27)
    counts, _ = np.histogram(values[:, 0], np.arange(18, 27.5))
    assert counts == pytest.approx(len(values) / 9, rel=0.1)
    usual = drawn(Prior.candels(), 10_000)
    for low, high in ((22, 23), (24, 25)):  # where they are shaped as the survey's
        own, theirs = (v[(v[:, 0] > low) & (v[:, 0] < high)] for v in (values, usual))
        np.testing.assert_allclose(np.median(own, axis=0)[1:], np.median(theirs, axis=0)[1:], rtol=0.1)
    faint = values[values[:, 0] > 26]  # as those where the survey ends
    assert np.median(faint[:, 1]) == pytest.approx(np.median(usual[usual[:, 0] > 24.7, 1]), rel=0.15)


def test_the_density_to_a_limit_is_that_of_the_draws():
    """The mean of 1 / density over the draws, within a box, is the volume of the box over the share of it."""
    prior = Prior.candels(limit=27.0)
    values = drawn(prior, 20_000)
    boxes = [((19, 21), (5, 15)), ((24, 25), (3, 8)), ((26, 27), (2, 6))]
    norms = []
    for (m0, m1), (r0, r1) in boxes:
        low, high = np.array([m0, r0, 0.7, 0.2]), np.array([m1, r1, 2.0, 0.7])
        inside = ((values > low) & (values < high)).all(axis=1)
        weights = np.exp(-prior.log_density(values[inside]))
        norms.append(weights.sum() / np.prod(high - low))
    np.testing.assert_allclose(norms, np.mean(norms), rtol=0.25)


def test_a_fraction_is_uniform_and_the_density_is_of_unit_integral():
    prior = Simulation.of_options(1, prior="candels", depth=27.0, uniform=0.3).prior
    values = drawn(prior, 20_000)
    assert prior.mag == (16, 27)
    assert np.mean(values[:, 0] < 18) == pytest.approx(0.3 * 2 / 11, rel=0.1)
    assert np.mean(values[:, 1] > 25) == pytest.approx(0.3 * 0.52, rel=0.15)
    for (m0, m1), (r0, r1) in (((16, 18), (10, 40)), ((19, 21), (5, 15)), ((24, 25), (3, 8)), ((24, 27), (25, 50))):
        low, high = np.array([m0, r0, 0.7, 0.2]), np.array([m1, r1, 2.0, 0.7])
        inside = ((values > low) & (values < high)).all(axis=1)
        volume = np.exp(-prior.log_density(values[inside])).sum() / len(values)
        assert volume == pytest.approx(np.prod(high - low), rel=4 / np.sqrt(inside.sum()))


@pytest.fixture
def catalogue(tmp_path):
    """Write a table of galaxies whose radii follow their magnitudes; returns a function of the ending."""
    rng = np.random.default_rng(0)
    mag = rng.normal(22, 1, 600)
    radius = 10 ** (1 - 0.2 * (mag - 22) + 0.02 * rng.standard_normal(600))

    def write(name="galaxies.csv", **changes):
        n, q = np.full(600, 2.0) * rng.lognormal(0, 0.1, 600), rng.uniform(0.2, 0.8, 600)
        columns = {"mag": mag, "r_eff": radius * 0.06, "sersic_n": n, "q": q, **changes}
        table = Table({name: column for name, column in columns.items() if column is not None})
        table.write(tmp_path / name)
        return tmp_path / name

    return write


def test_a_catalogue_gives_its_joint_distribution(catalogue):
    prior = Prior.of_catalogue(catalogue(), 0.06)
    values = drawn(prior)
    residual = np.log10(values[:, 1]) - 1 + 0.2 * (values[:, 0] - 22)
    assert np.median(values[:, 0]) == pytest.approx(22, abs=0.1)
    assert values[:, 0].std() == pytest.approx(1, abs=0.06)
    assert np.median(residual) == pytest.approx(0, abs=0.01)
    assert residual.std() < 0.04
    assert np.median(values[:, 3]) == pytest.approx(0.5, abs=0.03)
    for name, (low, high) in prior.ranges.items():
        assert FULL_RANGES[name][0] <= low < high <= FULL_RANGES[name][1]


def test_radii_in_pixels_and_ellipticities_are_taken_as_they_are(catalogue):
    changes = {"r_eff_pix": np.linspace(4, 6, 600), "ellipticity": np.linspace(0.2, 0.3, 600)}
    values = drawn(Prior.of_catalogue(catalogue("pixels.ecsv", r_eff=None, **changes), 0.06), 300)
    assert 4 <= values[:, 1].min() < values[:, 1].max() <= 6
    assert values[:, 3].max() <= 0.3


def test_radii_in_arcsec_go_before_pixels_which_may_be_of_another_image(catalogue):
    both = catalogue("both.ecsv", r_eff_pix=np.full(600, 2.0))
    assert np.median(drawn(Prior.of_catalogue(both, 0.06), 300)[:, 1]) == pytest.approx(10, rel=0.1)


def test_a_catalogue_with_units_and_missing_values_is_read(tmp_path, catalogue):
    table = QTable.read(catalogue("plain.ecsv"))
    table["r_eff"].unit = "arcsec"
    whole = len(population.from_catalogue(tmp_path / "plain.ecsv", 0.06)[0].means)
    table["mag"][np.flatnonzero(table["r_eff"].value < 3)[:100]] = np.nan
    table.write(tmp_path / "units.fits")
    assert len(population.from_catalogue(tmp_path / "units.fits", 0.06)[0].means) == whole - 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": None}, "needs a column ellipticity or q"),
        ({"r_eff": None}, "needs a column r_eff_pix or r_eff"),
        ({"mag": np.full(600, np.nan)}, "at least 100 galaxies .* has 0"),
        ({"r_eff": np.full(600, 99.0)}, "at least 100 galaxies .* has 0"),
        ({"mag": np.full(600, 22.0)}, "all have the same mag"),
        ({"sersic_n": np.full(600, "x")}, "sersic_n of .* must hold numbers"),
    ],
)
def test_tables_that_say_too_little_are_refused(catalogue, changes, message):
    with pytest.raises(InputError, match=message):
        Prior.of_catalogue(catalogue("bad.ecsv", **changes), 0.06)


def test_a_changed_table_is_another_prior(catalogue):
    first = population.from_catalogue(catalogue("a.csv"), 0.06)[0].record()
    second = population.from_catalogue(catalogue("b.csv"), 0.06)[0].record()
    assert first["sha256"] != second["sha256"]


def test_ranges_without_galaxies_are_refused():
    with pytest.raises(InputError, match="has no galaxies within the ranges"):
        population.candels_mixture().draw(np.random.default_rng(0), {**FULL_RANGES, "mag": (3.0, 4.0)})
    with pytest.raises(InputError, match="has no galaxies within the ranges"):
        Prior.candels(limit=27.0).joint.draw(np.random.default_rng(0), {**FULL_RANGES, "r_eff_pix": (1e5, 1e6)})


def test_neighbours_have_the_counts_of_the_sky():
    rng = np.random.default_rng(0)
    objects = [o for _ in range(40) for o in population.draw_neighbours(rng, 1000, 0.06)]
    star = np.array([o["r_eff_pix"] < 0.1 for o in objects])
    mag = np.array([o["mag"] for o in objects])
    bright = (mag > 22) & (mag < 23)
    assert np.sum(bright & ~star) / 40 == pytest.approx(11.3, rel=0.15)
    assert np.sum(star) / 40 == pytest.approx(5.5, rel=0.2)
    assert mag.max() <= 26.5
    assert all(-0.5 <= o["x"] <= 999.5 for o in objects)
    sizes = np.array([o["r_eff_pix"] for o in objects])
    assert np.median(sizes[~star & (mag < 22)]) > 1.2 * np.median(sizes[~star & (mag > 24)])
