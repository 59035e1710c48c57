import pickle
import re
import warnings

import matplotlib as mpl
import numpy as np
import pytest
from astropy.io import fits
from astropy.nddata import CCDData
from astropy.table import QTable, vstack

import sersicnet
from sersicnet import Catalogue
from sersicnet.catalogue.galaxy import SHOWN
from sersicnet.errors import InputError, SersicnetError
from sersicnet.schema import CORRELATIONS, FLAG_MEANING, TARGET_NAMES, Flag
from sersicnet.simulating.telescopes import F160W, effective_psf

mpl.use("Agg")


@pytest.fixture(scope="module")
def psf():
    return sersicnet.Psf.of(effective_psf(F160W), "F160W")


@pytest.fixture(scope="module")
def data(field):
    return fits.getdata(field[0])


@pytest.fixture(scope="module")
def catalogue(field, psf):
    return sersicnet.measure(field[0], psf=psf)


@pytest.fixture(scope="module")
def alone(catalogue):
    """The catalogue's brightest row among those that neither touch another source nor the border."""
    rows = catalogue[catalogue["flags"] & (Flag.EDGE | Flag.BLENDED) == 0]
    return rows[np.argsort(rows["mag"])[:1]]


@pytest.fixture
def brightest(catalogue, alone):
    return catalogue.galaxy(alone["id"][0])


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    from matplotlib import pyplot as plt

    plt.close("all")


# --- the table ---


def test_a_catalogue_is_a_table_that_keeps_its_image_in_slices_copies_and_pickles(catalogue):
    assert isinstance(catalogue, QTable)
    some = catalogue[catalogue["id"] != 1]
    others = (
        catalogue[3:], some, catalogue["id", "x", "y", "mag"], catalogue.copy(), Catalogue(catalogue),
        pickle.loads(pickle.dumps(catalogue)),
    )  # fmt: skip
    for other in others:
        assert other.exposure.name == catalogue.exposure.name
        assert other.galaxy(4).id == 4
    assert len(some) == len(catalogue) - 1
    with pytest.raises(InputError, match=r"no image: join them by `sersicnet\.Catalogue\.of"):
        vstack([catalogue, catalogue]).plot()


def test_a_pickled_catalogue_of_a_file_holds_no_pixels(catalogue):
    assert len(pickle.dumps(catalogue)) < 300_000  # the image has 1 MB


def test_a_written_catalogue_is_joined_with_its_image_again(catalogue, tmp_path, field, psf):
    catalogue.write(tmp_path / "cat.ecsv")
    table = QTable.read(tmp_path / "cat.ecsv")
    assert type(table) is QTable
    joined = Catalogue.of(table, field[0], psf=psf)
    np.testing.assert_allclose(joined.galaxy(2).residual, catalogue.galaxy(2).residual, rtol=1e-4, atol=1e-6)
    assert joined.galaxy(2).covariance is None


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda t: t.remove_column("id"), {}, "has no id"),
        (lambda t: None, {"zero_point": 30.0}, "same zero point; that of the catalogue is 25.9463, of .* 30 "),
        (lambda t: t.replace_column("x", t["x"] + 600 * t["x"].unit), {}, "belongs to another image"),
    ],
)
def test_a_table_of_another_image_is_refused(catalogue, field, change, options, message):
    table = QTable(catalogue)
    change(table)
    with pytest.raises(InputError, match=message):
        Catalogue.of(table, field[0], **options)


def test_every_kind_of_image_gives_the_same_catalogue_in_one_line(catalogue, data, field, psf):
    few = {"x": catalogue["x"][:2], "y": catalogue["y"][:2]}
    ccd = CCDData(data, unit="ct / s")
    for image in (data, ccd):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sersicnet.SersicnetWarning)  # no WCS
            found = sersicnet.measure(image, zero_point=25.9463, pixel_scale=0.06, psf=psf, positions=QTable(few))
        np.testing.assert_allclose(found["mag"].value, catalogue["mag"][:2].value, atol=1e-3)


def test_an_array_without_a_zero_point_is_refused_in_one_line(data):
    with pytest.raises(InputError, match="gives no zero point: give `zero_point`") as caught:
        sersicnet.measure(data)
    (line,) = caught.value._render_traceback_()  # what a notebook shows
    assert line.startswith("InputError: ")
    assert "\n" not in line


def test_an_exposure_is_complete(catalogue):
    with pytest.raises(InputError, match="complete; received zero_point"):
        sersicnet.measure(catalogue.exposure, zero_point=25)


# --- pictures ---


def test_a_plot_draws_an_ellipse_for_each_row_in_the_given_axes(catalogue):
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    assert catalogue.plot(ax) is ax
    assert ax.get_xlim() == (-0.5, 511.5)
    ellipses = max(ax.collections, key=lambda one: len(one.get_offsets()))
    assert sum(len(one.get_offsets()) for one in ax.collections) == 2 * np.isfinite(catalogue["mag"]).sum()
    assert len(ellipses.get_offsets()) > 0
    assert {text.get_text() for text in ax.texts} == {str(number) for number in catalogue["id"]}


def test_a_plot_of_a_window_shows_its_sources_alone(catalogue):
    ax = catalogue.plot(window=(slice(None, 200), slice(100, 300)))
    x, y = catalogue["x"].value, catalogue["y"].value
    inside = (x > 99.5) & (x < 299.5) & (y < 199.5)
    assert len(ax.texts) == inside.sum()
    with pytest.raises(InputError, match="two slices, of rows and of columns, within 512 x 512"):
        catalogue.plot(window=(slice(600, 700), slice(None)))


def test_a_catalogue_without_rows_is_plotted(catalogue):
    empty = catalogue[:0]
    assert empty.plot().get_legend() is None
    with pytest.raises(InputError, match="by its id; received 1, and the catalogue has no rows"):
        empty.galaxy(1)


def test_the_residual_of_a_bright_galaxy_is_small(brightest):
    inner = (slice(20, -20),) * 2
    assert brightest.panels == ["image", "model", "residual", "PSF"]
    assert np.abs(brightest.residual[inner]).sum() < 0.15 * brightest.stamp[inner].sum()
    assert brightest.stamp.shape == brightest.model.shape == brightest.noise.shape
    assert [axis.get_title() for axis in brightest.plot()][1:3] == ["model", "residual"]
    with pytest.raises(InputError, match="4 panels, each of which needs axes; received 1"):
        brightest.plot([None])


def test_a_galaxy_at_the_border_has_no_pixels_beyond_it(catalogue, field):
    table = QTable(catalogue[:2])
    table["x"][0], table["x"][1] = 3 * table["x"].unit, -40 * table["x"].unit
    table["y"] = np.array([508.0, 20.0]) * table["y"].unit
    near, off = (Catalogue.of(table, field[0]).galaxy(number) for number in (1, 2))
    assert np.isnan(near.stamp[:, 0]).all()
    assert np.isfinite(near.stamp[0, -1])
    assert near.model is None  # there is no PSF
    with pytest.raises(InputError, match=r"Galaxy 2 is at x = -40\.0, y = 20\.0, outside of the image"):
        off.plot()
    assert "outside of the image" in off._repr_html_()


# --- numbers ---


def test_a_galaxy_has_its_numbers_with_errors_and_its_flags_in_words(catalogue, field):
    galaxy = catalogue.galaxy(1)
    assert str(galaxy["mag"].unit) == "mag"
    assert [name for name, _, _ in galaxy.numbers()] == [name for name in SHOWN if name in catalogue.colnames]
    assert f"{catalogue['mag'][0].value:.2f}"[:4] in repr(galaxy)
    table = QTable(catalogue[:1])
    table["flags"] = [int(Flag.CROWDED | Flag.MASKED)]
    table["mag"] = np.nan * table["mag"].unit
    flagged = Catalogue.of(table, field[0]).galaxy(1)
    assert flagged.meanings == [FLAG_MEANING[Flag.MASKED], FLAG_MEANING[Flag.CROWDED]]
    assert repr(flagged).endswith("MASKED, CROWDED>")
    assert "mag not measured" in repr(flagged)


def test_a_page_of_a_galaxy_holds_its_picture_and_loads_nothing(brightest):
    page = brightest._repr_html_()
    assert 'src="data:image/png;base64,' in page
    assert "http" not in page.split("base64,")[0] + page.rpartition('"')[2]
    assert " ± " in page


@pytest.mark.parametrize("number", [0, 99, -1])
def test_an_id_that_no_row_has_is_refused(catalogue, number):
    with pytest.raises(InputError, match=f"by its id; received {number}, and .* ids from 1 to {len(catalogue)}"):
        catalogue.galaxy(number)


def test_the_covariance_is_that_of_the_errors(catalogue):
    for galaxy in map(catalogue.galaxy, catalogue["id"]):
        errors = [galaxy[f"{name}_err"] for name in TARGET_NAMES]
        covariance = galaxy.covariance
        np.testing.assert_allclose(np.sqrt(np.diag(covariance)), [getattr(e, "value", e) for e in errors], rtol=1e-6)
        assert (covariance == covariance.T).all()
        assert (np.linalg.eigvalsh(covariance) > 0).all()
    assert abs(covariance[0, 1]) > 0


def test_rows_that_are_not_of_the_run_have_no_covariance(catalogue):
    moved = catalogue.copy()
    moved["id"] = np.roll(moved["id"], 1)
    assert moved.galaxy(1).covariance is None
    assert catalogue[::-1].galaxy(3).covariance is not None


def test_a_file_with_correlations_has_the_covariance(catalogue, alone, field, tmp_path):
    near = np.hypot(*((catalogue[k] - alone[k][0]).value for k in "xy")) < 30
    found = sersicnet.measure(field[0], positions=catalogue[near]["x", "y"], columns="+correlations")
    found.write(tmp_path / "cat.fits")
    read = Catalogue.of(QTable.read(tmp_path / "cat.fits"), field[0])
    np.testing.assert_allclose(read.galaxy(1).covariance, found.galaxy(1).covariance, rtol=1e-5)


def test_rows_with_ids_of_a_table_have_their_own_covariance(alone, field, psf):
    """Also where two rows are at the same x."""
    (row,) = alone
    places = QTable({"id": [2, 1, 7], "x": [row["x"].value] * 3, "y": row["y"].value + np.array([0.0, 3.0, 6.0])})
    found = sersicnet.measure(field[0], psf=psf, positions=places, columns="+correlations")
    plain = found[[name for name in found.colnames if name not in CORRELATIONS]]
    for number in (2, 1, 7):
        np.testing.assert_allclose(plain.galaxy(number).covariance, found.galaxy(number).covariance, rtol=1e-4)


def test_a_galaxy_needs_its_place(catalogue):
    with pytest.raises(InputError, match="this table has no x, y"):
        catalogue["id", "mag"].galaxy(1)


def test_fits_have_covariances(field, psf, alone):
    fitting = sersicnet.Fitting(prior="none", gain=3200, model_error=0)
    found = sersicnet.fit(field[0], psf=psf, fitting=fitting, positions=alone)
    covariance = found.galaxy(alone["id"][0]).covariance
    np.testing.assert_allclose(np.diag(covariance)[0], found["mag_err"][0].value ** 2, rtol=1e-6)
    # A profile that is larger, or has more light in its wings, has more light in all: its magnitude is smaller.
    assert covariance[0, 1] < 0
    assert covariance[0, 2] < 0


def test_correlations_of_a_fit_are_those_of_magnitude_and_ellipticity():
    from sersicnet.measuring.fitting import correlations_of

    draws = np.random.default_rng(0).normal(size=(4, 4))
    covariance = draws @ draws.T  # of flux, radius, index and axis ratio
    slopes = np.diag([-2.5 / np.log(10) / 7.0, 1, 1, -1])
    expected = slopes @ covariance @ slopes
    expected /= np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    found = correlations_of(covariance[None])[0]
    np.testing.assert_allclose(found, expected[np.triu_indices(4, 1)])


def test_an_error_of_the_psf_moves_the_parameters_together():
    from sersicnet.weights import PAIRS, Prediction

    own = Prediction(np.zeros((1, 4)), np.ones((1, 4)), np.full((1, 6), 0.3))
    shift = np.array([[1.0, -2.0, 0.5, 0.0]])
    both = own.with_error(shift)
    covariance = np.full((4, 4), 0.3) + 0.7 * np.eye(4) + shift.T @ shift
    np.testing.assert_allclose(both.errors[0] ** 2, np.diag(covariance))
    scale = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    np.testing.assert_allclose(both.correlations[0], (covariance / scale)[PAIRS])
    turned = own._replace(theta=np.zeros(1), theta_err=np.array([3.0])).with_error(shift, np.array([-4.0]))
    assert turned.theta_err == 5
    np.testing.assert_allclose(turned.errors, both.errors)
    unknown = own._replace(theta=np.full(1, np.nan), theta_err=np.full(1, np.nan))
    assert np.isnan(unknown.with_error(shift, np.array([1.0])).theta_err)


# --- the PSF, and reprs ---


def test_the_psf_of_an_array_needs_no_zero_point(data):
    found = sersicnet.find_psf(data[:200, :200])
    assert found.psf is None
    assert repr(found) == f"<ImagePsf none: {found.reason}>"
    with pytest.raises(InputError, match=r"shows no PSF .*: there is none to plot"):
        found.plot()


def test_a_psf_is_plotted(psf):
    first, second = psf.plot()
    assert "PSF, FWHM" in first.get_title()
    assert second.lines[0].get_ydata()[-1] == pytest.approx(psf.encircled(4 * psf.fwhm))
    with pytest.raises(InputError, match="2 panels, each of which needs axes; received 1"):
        psf.plot([None])


def test_a_psf_of_stars_is_plotted_with_their_places():
    from sersicnet.image.starpsf import ImagePsf

    psf = sersicnet.Psf.of(effective_psf(F160W), "9 stars")
    found = ImagePsf(psf, x=np.arange(9.0), y=np.ones(9), narrowest=3, widest=3, ellipticity=0.01, shape=(40, 50))
    assert "of 9 stars: FWHM" in repr(found)
    stars = found.plot()[2]
    assert stars.get_title() == "9 stars"
    assert stars.get_xlim() == (-0.5, 49.5)
    assert stars.lines[0].get_xdata().tolist() == list(range(9))


def test_a_notebook_shows_the_picture_of_a_psf(psf):
    from sersicnet.image.starpsf import ImagePsf

    for thing in (psf, ImagePsf(psf, shape=(9, 9))):
        assert thing._repr_png_().startswith(b"\x89PNG")
    assert ImagePsf(None, "no stars")._repr_png_() is None


def test_the_repr_of_a_psf_states_its_width_and_sampling(psf):
    assert re.fullmatch(r"<Psf F160W: FWHM 3\.\d{3} pixels, \d+ x \d+ pixels>", repr(psf))
    finer = sersicnet.Psf.of(effective_psf(F160W), "stars", 2, error=0.012)
    assert repr(finer).endswith(" of 1/2 of a pixel of the image>")
    assert " known to 1.2%, " in repr(finer)


def test_a_catalogue_is_shown_with_the_digits_that_matter_and_keeps_all_of_them(catalogue):
    table = catalogue["id", "ra", "x", "mag", "r_eff", "flags"]
    exact = table["mag"].value.copy()
    for text in (repr(table), str(table), table._repr_html_()):
        for column, digits in (("ra", 6), ("x", 2), ("mag", 3)):
            assert re.search(rf"(?<![\d.]){table[column][0].value:.{digits}f}(?!\d)", text), column
    np.testing.assert_array_equal(table["mag"].value, exact)
    assert table["mag"].info.format is None
    table["mag"].info.format = ".1f"
    assert re.search(rf"(?<![\d.]){exact[0]:.1f}(?!\d)", repr(table))
    assert table["mag"].info.format == ".1f"


def test_a_catalogue_is_summed_up_above_its_table(catalogue):
    clean = (catalogue["flags"] == 0).sum()
    assert catalogue.summary().startswith(f"{len(catalogue)} sources of field.fits[1] by weights fovea, PSF of 3.")
    assert f" {clean} without flags" in catalogue.summary()
    assert catalogue.summary() in catalogue._repr_html_()
    assert catalogue[:1].summary().startswith("1 source of")
    assert "without flags" not in catalogue["id", "x"]._repr_html_()
    assert "without flags" not in Catalogue(QTable(catalogue))._repr_html_()


def test_flags_that_a_table_does_not_have_are_not_stated(catalogue):
    """No column of flags does not mean that there are no flags."""
    some = catalogue["id", "x", "y", "mag"]
    galaxy = some.galaxy(4)
    page = galaxy._repr_html_()
    assert some.summary().endswith(").")
    for text in (some.summary(), repr(galaxy), page.split("<table>")[1]):
        assert "lags" not in text
    assert "S/N" not in repr(galaxy) + page
    for name in ("flags", "meanings"):
        with pytest.raises(InputError, match="has no column flags"):
            getattr(galaxy, name)
    assert some.plot().get_legend() is None


def test_a_plot_needs_places(catalogue):
    with pytest.raises(InputError, match="this table has no x, y"):
        catalogue["id", "mag"].plot()


def test_reprs_are_short(catalogue, psf, small_dataset, field):
    from sersicnet import weights

    noise = sersicnet.Noise(np.ones((1, 1)))
    things = (
        psf, catalogue.exposure, catalogue.galaxy(1), weights.load("fovea"), sersicnet.Dataset(small_dataset), noise,
        sersicnet.plan(field[0], psf=psf), sersicnet.Fitter(psf.image, noise), sersicnet.Renderer(psf.image),
        sersicnet.Simulation(10), sersicnet.Work(), sersicnet.Progress(), catalogue.picture, sersicnet.Fitting(),
        sersicnet.Outputs(), sersicnet.Injection(), sersicnet.Field(300), sersicnet.Prior(), sersicnet.Band(
            exposure=catalogue.exposure, psf=psf
        ),
    )  # fmt: skip
    for thing in things:
        assert len(repr(thing)) < 800, type(thing)
        assert " object at 0x" not in repr(thing)


def test_errors_of_every_kind_are_one_line_in_a_notebook():
    assert SersicnetError("what to do")._render_traceback_() == ["SersicnetError: what to do"]
