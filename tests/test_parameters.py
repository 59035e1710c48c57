"""Every command reads galaxies from a table in the same formats, names and units."""

import gzip
import re
import warnings
from decimal import Decimal

import numpy as np
import pyarrow
import pytest
from astropy import units
from astropy.io import fits
from astropy.table import Column, MaskedColumn, QTable, Table
from astropy.utils.exceptions import AstropyWarning
from astropy.wcs import WCS
from pyarrow import parquet

from sersicnet.catalogue import crossmatch
from sersicnet.catalogue.parameters import Galaxies, holds_table
from sersicnet.errors import DatasetError, InputError, SersicnetWarning
from sersicnet.evaluating.evaluate import evaluate_catalogue
from sersicnet.image.exposure import Exposure
from sersicnet.measuring.outputs import Outputs
from sersicnet.measuring.plan import Plan, Work
from sersicnet.simulating import population
from sersicnet.training.labels import real_galaxies

FORMATS = {
    ".fits": "fits", ".ecsv": "ascii.ecsv", ".csv": "ascii.csv", ".parquet": "parquet", ".vot": "votable"
}  # fmt: skip
WITH_UNITS = [ending for ending in FORMATS if ending != ".csv"]
SCALE = 0.05
N = 150

_RNG = np.random.default_rng(4)
TRUE = {
    "x": _RNG.uniform(70, 180, N), "y": _RNG.uniform(70, 180, N), "mag": _RNG.uniform(20, 24, N),
    "r_eff_pix": _RNG.uniform(2, 15, N), "sersic_n": _RNG.uniform(0.5, 4, N), "ellipticity": _RNG.uniform(0, 0.8, N),
}  # fmt: skip
TARGETS = np.column_stack([TRUE[name] for name in ("mag", "r_eff_pix", "sersic_n", "ellipticity")])


def wcs():
    out = WCS(naxis=2)
    out.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    out.wcs.crval, out.wcs.crpix, out.wcs.cdelt = [30.0, 10.0], [125.0, 125.0], [-SCALE / 3600, SCALE / 3600]
    return out


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "field.fits"
    pixels = np.random.default_rng(0).normal(0, 1, (250, 250)).astype("f4")
    fits.PrimaryHDU(pixels, fits.Header([*wcs().to_header().cards, ("MAGZERO", 25.0)])).writeto(path)
    return path


def written(path, columns):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AstropyWarning)  # such as hours, which are no unit of FITS
        Table(columns).write(path, format=FORMATS[path.suffix])
    return path


RA, DEC = wcs().pixel_to_world_values(TRUE["x"], TRUE["y"])
IN_PIXELS = {name: TRUE[name] for name in ("x", "y")}
SHAPES = {name: TRUE[name] for name in ("mag", "sersic_n", "ellipticity")}
R_EFF = TRUE["r_eff_pix"] * SCALE

SPELLINGS = {
    "sersicnet": {**IN_PIXELS, **SHAPES, "r_eff_pix": TRUE["r_eff_pix"]},
    "arcsec": {"ra": RA, "dec": DEC, **SHAPES, "r_eff": R_EFF},
    "galfit": {
        "X_IMAGE": TRUE["x"] + 1, "Y_IMAGE": TRUE["y"] + 1, "MAG": TRUE["mag"], "r_eff_pix": TRUE["r_eff_pix"],
        "N": TRUE["sersic_n"], "Q": 1 - TRUE["ellipticity"],
    },
    "vizier": {
        "RAJ2000": RA, "DEJ2000": DEC, "mag": TRUE["mag"], "R_eff": R_EFF, "n": TRUE["sersic_n"],
        "q": 1 - TRUE["ellipticity"],
    },
}  # fmt: skip

UNITS = {
    "mas": {"ra": RA * units.deg, "dec": DEC * units.deg, **SHAPES, "r_eff": 1000 * R_EFF * units.mas},
    "deg": {"ra": RA * units.deg, "dec": DEC * units.deg, **SHAPES, "r_eff": R_EFF / 3600 * units.deg},
    "arcmin": {**IN_PIXELS, **SHAPES, "re": R_EFF / 60 * units.arcmin},
    "pixels": {
        "x": TRUE["x"] * units.pix, "y": TRUE["y"] * units.pix, **SHAPES, "r_eff": TRUE["r_eff_pix"] * units.pix
    },
    "hours": {"ra": RA / 15 * units.hourangle, "dec": DEC * 60 * units.arcmin, **SHAPES, "r_eff": R_EFF},
    "radians": {
        "ra": np.radians(RA) * units.rad, "dec": np.radians(DEC) * units.rad, **SHAPES,
        "mag": TRUE["mag"] * units.mag, "r_eff": R_EFF * units.arcsec,
    },
    "percent": {**IN_PIXELS, **SHAPES, "ellipticity": 100 * TRUE["ellipticity"] * units.percent, "r_eff": R_EFF},
}  # fmt: skip

CASES = [(name, columns, ending) for name, columns in SPELLINGS.items() for ending in FORMATS]
CASES += [
    (name, columns, ending)
    for name, columns in UNITS.items()
    for ending in WITH_UNITS
    if (name, ending) != ("hours", ".fits")  # no unit of FITS
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[2]}")
def table(request, tmp_path):
    _, columns, ending = request.param
    return written(tmp_path / f"galaxies{ending}", columns)


def test_parameters_and_positions_are_the_same(table):
    galaxies = Galaxies.read(table)
    np.testing.assert_allclose(galaxies.targets(SCALE), TARGETS, rtol=1e-6)
    sky, pixels = galaxies.sky(), galaxies.pixels()
    assert sky is not None or pixels is not None
    if sky is not None:
        np.testing.assert_allclose(sky, np.column_stack([RA, DEC]), rtol=1e-9)
    if pixels is not None:
        np.testing.assert_allclose(pixels, np.column_stack([TRUE["x"], TRUE["y"]]))


def test_a_prior_reads_them(table):
    mixture, ranges = population.from_catalogue(table, SCALE)
    assert len(mixture.means) == N
    assert ranges["r_eff_pix"] == pytest.approx((TRUE["r_eff_pix"].min(), TRUE["r_eff_pix"].max()))
    assert ranges["ellipticity"] == pytest.approx((TRUE["ellipticity"].min(), TRUE["ellipticity"].max()))


def test_positions_and_starts_of_fits_read_them(table, image):
    made = Plan.of(
        Exposure.open(image), network=None, psf=None, fitting=None, resample=False, positions=table,
        outputs=Outputs(), work=Work(), command="",
    )  # fmt: skip
    np.testing.assert_allclose(made.places, np.column_stack([TRUE["x"], TRUE["y"]]), atol=1e-4)
    assert set(made.starts) == {"mag", "r_eff_pix", "sersic_n", "ellipticity"}
    np.testing.assert_allclose(made.starts["r_eff_pix"], TRUE["r_eff_pix"], rtol=1e-6)


def test_a_comparison_reads_them(table):
    ours = QTable({
        **IN_PIXELS, "ra": RA * units.deg, "dec": DEC * units.deg, **SHAPES, "r_eff": R_EFF * units.arcsec,
        "r_eff_pix": TRUE["r_eff_pix"] * units.pix,
    })  # fmt: skip
    found = crossmatch.match(ours, table)
    assert len(found.i) == N
    assert set(found.differences) == set(crossmatch.PARAMETERS)
    for off in found.differences.values():
        np.testing.assert_allclose(off, 0, atol=1e-6)


def test_an_evaluation_reads_them_as_truth_and_as_catalogue(table, tmp_path):
    whole = Table({**IN_PIXELS, "ra": RA, "dec": DEC, **SHAPES, "r_eff_pix": TRUE["r_eff_pix"]})
    whole.meta["PIXSCALE"] = SCALE
    whole.write(tmp_path / "whole.ecsv")
    results = [evaluate_catalogue(tmp_path / "whole.ecsv", table)]
    if "pix" in Galaxies.read(table).radii():
        results.append(evaluate_catalogue(table, tmp_path / "whole.ecsv"))
    for result in results:
        assert result["matching"]["matched"] == N
        [found] = result["scores"].values()
        assert all(abs(bias) < 1e-6 for bias in found["samples"]["all"]["bias"].values())


def test_labels_read_them(table, image):
    galaxies = real_galaxies(table, image)
    assert len(galaxies) == N
    np.testing.assert_allclose(galaxies.targets[:, 1:], TARGETS[:, 1:], rtol=1e-6)
    np.testing.assert_allclose(galaxies.mag, TRUE["mag"])


def test_labels_whose_pixels_are_of_another_image_than_their_sky_positions_are_refused(tmp_path, image):
    """Stamps at pixels of a survey's own image would be of other galaxies than the labels."""
    columns = {**SPELLINGS["sersicnet"], "ra": RA, "dec": DEC}
    assert len(real_galaxies(written(tmp_path / "same.csv", columns), image)) == N
    shifted = written(tmp_path / "other.csv", {**columns, "x": TRUE["x"] - 20})
    with pytest.raises(DatasetError, match=r"are 20.0 pixels apart in .*field.fits\[0\]. Leave out those of another"):
        real_galaxies(shifted, image)


# --- what a column may hold ---


@pytest.mark.parametrize("ids", [[3, 3], [0, 1], [2**40, 1], ["a", "b"], [1.0, 2.5]])
def test_ids_that_are_not_kept_are_told_once(ids):
    """A catalogue whose ids are others than those of its table is matched with it by mistake."""
    galaxies = Galaxies(Table({"id": ids, "x": [1.0, 2.0], "y": [1.0, 2.0]}), "the table")
    with pytest.warns(SersicnetWarning, match="ids of the table are not kept, and rows are numbered from 1"):
        assert galaxies.ids() is None
    assert galaxies.ids() is None


@pytest.mark.parametrize("ending", FORMATS)
def test_a_catalogue_of_several_bands_is_read_for_one(tmp_path, ending):
    """By the names of its columns where a format has no header; columns of sources stay."""
    kinds = ("r_eff", "r_eff_err", "r_eff_pix", "sersic_n", "sersic_n_err", "sersic_n_p16", "pa", "ra")
    table = Table({"id": [3, 8], "ra": [1.0, 2.0], "dec": [1.0, 2.0], "snr": [9.0, 9.0]})
    for k, band in enumerate(("F814W", "deep_H")):
        for name in kinds if k else kinds[:-1]:
            table[f"{name}_{band}"] = [k + 1.0, k + 2.0]
    table.write(tmp_path / f"bands{ending}", format=FORMATS[ending])
    galaxies = Galaxies.read(tmp_path / f"bands{ending}")
    assert galaxies.bands == ["F814W", "deep_H"]
    with pytest.raises(InputError, match=r"has the bands F814W, deep_H, and it was detected on none .* `from_band`"):
        galaxies.of_band()
    with pytest.raises(
        InputError, match=r"mag and r_eff_pix|for each of F814W, deep_H. Give the catalogue of one band"
    ):
        galaxies.require("sersic_n")
    one, other = galaxies.of_band("f814w"), galaxies.of_band("deep_H")
    assert other.band == "deep_H"
    assert one.bands == other.bands == []
    assert set(other.table.colnames) == {"id", "dec", "snr", *kinds}
    np.testing.assert_array_equal(one.sky()[:, 0], [1, 2])
    np.testing.assert_array_equal(other.sky()[:, 0], [2, 3])
    np.testing.assert_array_equal(other.parameter("sersic_n"), [2, 3])
    np.testing.assert_array_equal(one.ids(), [3, 8])
    assert Galaxies(Table({"ra": [1.0], "dec": [1.0], "pa_2MASS": [3.0]})).bands == []  # one column makes no band


@pytest.mark.parametrize("ending", FORMATS)
def test_masked_values_are_nan(tmp_path, ending):
    columns = {
        "ra": MaskedColumn([10.0, 20.0], mask=[True, False], unit="deg"), "dec": [1.0, 2.0],
        "mag": MaskedColumn([20, 21], mask=[False, True]), "image": MaskedColumn(["a.fits", "b"], mask=[False, True]),
    }  # fmt: skip
    galaxies = Galaxies.read(written(tmp_path / f"a{ending}", columns))
    np.testing.assert_array_equal(galaxies.parameter("mag"), [20, np.nan])
    np.testing.assert_array_equal(galaxies.sky()[:, 0], [np.nan, 20])
    assert galaxies.text("image") == ["a.fits", ""]


def test_masked_quantities_are_nan():
    table = QTable({"a": MaskedColumn([1.0, 2.0], mask=[True, False], unit="deg")})
    np.testing.assert_array_equal(Galaxies(table).column("a", "deg"), [np.nan, 2])


@pytest.mark.parametrize("ending", FORMATS)
def test_numbers_as_text_are_numbers(tmp_path, ending):
    galaxies = Galaxies.read(written(tmp_path / f"a{ending}", {"mag": [" 20.5", "", "21"], "q": ["1", "x", ""]}))
    np.testing.assert_array_equal(galaxies.parameter("mag"), [20.5, np.nan, 21])
    where = "line 3" if ending == ".csv" else "row 2"
    with pytest.raises(InputError, match=f"Column q of .*a{ending} must hold numbers; {where} has 'x'"):
        galaxies.parameter("ellipticity")


def test_lines_of_csv_files_are_counted_with_blank_ones(tmp_path):
    (tmp_path / "a.csv").write_text('mag,image\n20,"two\nlines"\n\n  \n21,b\nx,c\n')
    with pytest.raises(InputError, match="line 7 has 'x'"):
        Galaxies.read(tmp_path / "a.csv").parameter("mag")


def test_csv_with_a_byte_order_mark_blanks_and_other_line_ends(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfx, y , mag\r\n1, 2 ,20\r\n3,4, 21\r\n")
    galaxies = Galaxies.read(tmp_path / "a.csv")
    np.testing.assert_array_equal(galaxies.pixels(), [[1, 2], [3, 4]])
    np.testing.assert_array_equal(galaxies.parameter("mag"), [20, 21])


@pytest.mark.parametrize("content", ["", "x,y", "x,y\n"])
def test_a_csv_file_without_rows(tmp_path, content):
    (tmp_path / "a.csv").write_text(content)
    assert len(Galaxies.read(tmp_path / "a.csv")) == 0


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"r_eff": R_EFF * units.kpc}, "Column r_eff of .* must be an angle or in pixels; received the unit kpc"),
        ({"re": R_EFF}, "Column re of .* has no unit. Call it r_eff_pix if it is in pixels, r_eff if it is in arcsec"),
        (
            {"r_eff": R_EFF, "ellipticity": R_EFF * units.deg},
            "ellipticity of .* must be numbers without a unit; .* deg",
        ),
        ({"r_eff": R_EFF, "mag": TRUE["mag"] * units.Jy}, "mag of .* must be AB magnitudes; received the unit Jy"),
        ({"r_eff": R_EFF, "sersic_n": np.ones((N, 2))}, "sersic_n of .* must hold one number a row"),
        (
            {"r_eff": R_EFF, "sersic_n": None, "q": None, "ellipticity": None},
            r"needs columns sersic_n \(or n\), .*; it",
        ),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path, columns, message):
    whole = {**SHAPES, **columns}
    path = written(tmp_path / "a.fits", {name: values for name, values in whole.items() if values is not None})
    with pytest.raises(InputError, match=message) as caught:
        population.from_catalogue(path, SCALE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "unit"), [("ra", "pix"), ("dec", "s"), ("x", "deg"), ("x", "mm")])
def test_positions_in_units_of_something_else_are_refused(name, unit):
    other = {"ra": "dec", "dec": "ra", "x": "y"}[name]
    galaxies = Galaxies(QTable({name: [1.0] * units.Unit(unit), other: [1.0]}), "here")
    with pytest.raises(InputError, match=f"Column {name} of here must be .*; received the unit {unit}"):
        _ = galaxies.sky(), galaxies.pixels()


def test_magnitudes_of_other_systems_are_converted_or_refused():
    ab = QTable({"mag": [20.0] * units.ABmag})
    np.testing.assert_array_equal(Galaxies(ab).parameter("mag"), [20])
    of_jansky = QTable({"mag": units.Magnitude([0.0], "mag(Jy)")})
    np.testing.assert_allclose(Galaxies(of_jansky).parameter("mag"), [8.9])
    with pytest.raises(InputError, match=re.escape("must be AB magnitudes; received the unit mag(ST)")):
        Galaxies(QTable({"mag": [20.0] * units.STmag})).parameter("mag")


def test_a_column_of_an_odd_unit_beside_a_good_one_does_not_matter():
    table = Table({"r_eff": [1.0] * units.arcsec, "re": [3.0] * units.kpc})
    assert list(Galaxies(table).radii()) == ["arcsec"]


def test_the_name_in_lower_case_goes_before_another_one():
    galaxies = Galaxies(Table({"N": [200.0], "n": [2.0], "MAG": [20.0], "Mag": [21.0]}))
    assert galaxies.parameter("sersic_n") == [2]
    assert galaxies.parameter("mag") == [20]


def test_degrees_go_before_sexagesimal_text():
    table = Table({"RAJ2000": ["00 40 00"], "DEJ2000": ["+10 00 00"], "_RAJ2000": [10.0], "_DEJ2000": [10.0]})
    np.testing.assert_array_equal(Galaxies(table).sky(), [[10, 10]])


def test_unknown_places_on_the_sky_are_nan():
    assert np.isnan(Galaxies(Table({"ra": [-99.0, np.inf], "dec": [-99.0, 2.0]})).sky()).all()


# --- files ---


def test_units_that_astropy_does_not_know_are_no_warning(tmp_path):
    hdu = fits.BinTableHDU.from_columns([
        fits.Column("x", "D", "pixels!", array=[1.0]), fits.Column("y", "D", array=[2.0]),
        fits.Column("mag", "D", array=[20.0]),
    ])  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hdu.writeto(tmp_path / "a.fits")
        galaxies = Galaxies.read(tmp_path / "a.fits")
        assert galaxies.parameter("mag") == [20]
        with pytest.raises(InputError, match=r"Column x of .* must be in pixels; received the unit pixels!"):
            galaxies.pixels()


def test_plural_units_are_read():
    assert Galaxies(Table({"r_eff": Column([1.0], unit="pixels")})).radii() == {"pix": [1]}
    assert Galaxies(Table({"ra": Column([1.0], unit="degrees"), "dec": [2.0]})).sky().tolist() == [[1, 2]]


def test_the_objects_of_a_sextractor_table_are_read(tmp_path):
    header = fits.BinTableHDU(Table({"Field Header Card": ["SIMPLE"]}), name="LDAC_IMHEAD")
    objects = fits.BinTableHDU(Table({"X_IMAGE": [1.0], "Y_IMAGE": [2.0]}), name="LDAC_OBJECTS")
    fits.HDUList([fits.PrimaryHDU(), header, objects]).writeto(tmp_path / "a.fits")
    assert Galaxies.read(tmp_path / "a.fits").pixels().tolist() == [[0, 1]]


def test_a_fits_file_is_a_table_if_its_first_data_are(tmp_path, image):
    table = fits.BinTableHDU(Table({"x": [1.0]}))
    picture = np.zeros((20, 20), "f4")
    for name, hdus, expected in (
        ("table.fits", [fits.PrimaryHDU(), table], True),
        ("beside.fits", [fits.PrimaryHDU(picture), table], False),
        ("packed.fits", [fits.PrimaryHDU(), fits.CompImageHDU(picture)], False),
        ("extension.fits", [fits.PrimaryHDU(), fits.ImageHDU(picture), table], False),
    ):
        fits.HDUList(hdus).writeto(tmp_path / name)
        assert holds_table(tmp_path / name) is expected, name
    assert not holds_table(image)
    assert not holds_table(f"{image}[0]")
    assert not holds_table(tmp_path / "none.fits")
    assert holds_table(tmp_path / "none.csv")
    assert not holds_table(tmp_path / "data.h5")


def test_labels_that_cannot_be_used_are_one_line(tmp_path, image):
    whole = SPELLINGS["sersicnet"]
    mag = TRUE["mag"].copy()
    mag[2] = np.nan
    for changes, message in (
        ({"mag": mag}, "row 3: mag should be a number; received nan"),
        ({"ellipticity": TRUE["ellipticity"] + 0.9}, r"row 2: ellipticity = [\d.]+ is not physical"),
        ({"r_eff_pix": R_EFF * units.kpc}, "must be an angle or in pixels"),
        ({"x": TRUE["x"] + 900}, "row 1: x = .* is outside of"),
    ):
        written(tmp_path / "a.fits", {**whole, **changes})
        with pytest.raises(DatasetError, match=message):
            real_galaxies(tmp_path / "a.fits", image)
        (tmp_path / "a.fits").unlink()


# --- tables of other programs ---


def two_tables(path):
    tables = [fits.BinTableHDU(Table({"x": [float(k)], "y": [0.0]}), name=name) for k, name in ((1, "ONE"), (2, "two"))]
    fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(np.zeros((3, 3), "f4"), name="SCI"), *tables]).writeto(path)
    return path


@pytest.mark.parametrize(("extension", "x"), [("ONE", 1), ("two", 2), ("TWO", 2), ("2", 1), ("3", 2)])
def test_a_table_is_chosen_in_brackets(tmp_path, extension, x):
    path = f"{two_tables(tmp_path / 'a.fits')}[{extension}]"
    assert Galaxies.read(path).pixels().tolist() == [[x, 0]]
    assert holds_table(path)


@pytest.mark.parametrize(("extension", "message"), [
    ("SCI", "tables ONE, TWO; SCI is an image"), ("0", "0 is an image"), ("none", "none is none of its extensions"),
    ("9", "9 is none of"),
])  # fmt: skip
def test_what_is_no_table_is_told_with_the_tables_there_are(tmp_path, extension, message):
    path = f"{two_tables(tmp_path / 'a.fits')}[{extension}]"
    with pytest.raises(InputError, match=message):
        Galaxies.read(path)
    assert not holds_table(path)


def test_the_first_of_several_tables_is_read_with_a_warning(tmp_path):
    path = two_tables(tmp_path / "a.fits")
    with pytest.warns(SersicnetWarning, match=r"has the tables ONE, TWO: ONE, number 2, is read\. .* a.fits\[3\]"):
        assert Galaxies.read(path).pixels().tolist() == [[1, 0]]


def test_only_fits_files_have_extensions(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    with pytest.raises(InputError, match=r"Only tables in FITS files have extensions; received a.csv\[1\]"):
        Galaxies.read(f"{tmp_path / 'a.csv'}[1]")


def test_an_image_is_no_table(image):
    with pytest.raises(InputError, match="has no table"):
        Galaxies.read(image)


@pytest.mark.parametrize("ending", [ending for ending in FORMATS if ending != ".parquet"])
def test_tables_may_be_gzipped(tmp_path, ending):
    path = written(tmp_path / f"a{ending}", {"x": [1.0, 3.0], "y": [2.0, 4.0], "mag": ["20", "bad"]})
    packed = tmp_path / f"a{ending}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    galaxies = Galaxies.read(packed)
    assert galaxies.pixels().tolist() == [[1, 2], [3, 4]]
    assert holds_table(packed)
    with pytest.raises(InputError, match=f"{'line 3' if ending == '.csv' else 'row 2'} has 'bad'"):
        galaxies.parameter("mag")


@pytest.mark.parametrize("unit", ["degrees", "Degree", "DEG", "deg.", "'deg'", "decimal degrees"])
def test_spellings_of_degrees_and_formats_of_display_are_read(tmp_path, unit):
    columns = [fits.Column(name, "D", unit, array=[value]) for name, value in (("ra", 150.1), ("dec", 2.2))]
    table = fits.BinTableHDU.from_columns([*columns, fits.Column("flux", "E", "nanomaggies", array=[1.0])])
    table.header["TDISP1"], table.header["TDISP2"] = "F10", "Z99.x"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table.writeto(tmp_path / "a.fits", output_verify="ignore")
    assert Galaxies.read(tmp_path / "a.fits").sky().tolist() == [[150.1, 2.2]]


@pytest.mark.parametrize("unit", ["mag", "MAG", "mags", "mag(AB)", "ABmag", "AB mag"])
def test_spellings_of_magnitudes_are_read(unit):
    assert Galaxies(Table({"mag": Column([20.0], unit=unit)})).parameter("mag") == [20]


@pytest.mark.parametrize("shape", [(2, 1), (2, 2)])
@pytest.mark.parametrize("ending", [".fits", ".ecsv", ".vot"])
def test_vectors_of_one_number_are_numbers_and_longer_ones_are_not(tmp_path, ending, shape):
    galaxies = Galaxies.read(written(tmp_path / f"a{ending}", {"x": np.ones(shape), "y": [1.0, 1.0]}))
    if shape == (2, 1):
        assert galaxies.pixels().tolist() == [[1, 1], [1, 1]]
    else:
        with pytest.raises(InputError, match=r"Column x of .* must hold one number a row; it holds several\.$"):
            galaxies.pixels()


@pytest.mark.parametrize(("values", "message"), [
    (np.array([1 + 1j, 2]), "holds complex128"), (np.array(["2020-01-01", "2021-01-01"], "M8[D]"), "holds datetime64"),
    (np.array([np.ones(2), np.ones(3)], object), "holds several"), (["x" * 2000, "1"], "has '" + "x" * 40 + "'"),
])  # fmt: skip
def test_columns_of_something_else_are_one_short_line(values, message):
    with pytest.raises(InputError, match=message) as caught:
        Galaxies(Table({"mag": values})).parameter("mag")
    assert len(str(caught.value)) < 150


PARQUET = {
    "float": ([1.0, None], None), "int": ([1, None], None), "text": (["1", None], None), "bool": ([True, None], None),
    "category": (["1", None], "dictionary"), "decimal": ([Decimal("1.00"), None], None), "none": ([None, None], None),
}  # fmt: skip


@pytest.mark.parametrize("kind", PARQUET)
def test_missing_values_in_parquet_of_other_programs_are_nan(tmp_path, kind):
    values, how = PARQUET[kind]
    column = pyarrow.array(values)
    column = column.dictionary_encode() if how else column
    parquet.write_table(pyarrow.table({"x": column, "y": [5.0, 6.0]}), tmp_path / "a.parquet")
    galaxies = Galaxies.read(tmp_path / "a.parquet")
    expected = np.nan if kind == "none" else 1
    np.testing.assert_array_equal(galaxies.pixels(), [[expected, 5], [np.nan, 6]])


def test_columns_of_parquet_that_are_no_numbers_do_not_matter(tmp_path):
    table = pyarrow.table({"x": [1.0], "s": [{"a": 1}], "l": [[1, 2]], "n": [None], "y": [2.0], "image": ["a.fits"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    galaxies = Galaxies.read(tmp_path / "a.parquet")
    assert galaxies.columns == "x, s, l, n, y, image"
    assert galaxies.pixels().tolist() == [[1, 2]]
    assert galaxies.text("image") == ["a.fits"]
    with pytest.raises(InputError, match="must hold"):
        galaxies.column("l")


def test_blanks_quotes_and_a_mark_before_the_head_of_csv_are_read(tmp_path):
    (tmp_path / "a.csv").write_text('# "x" , "y",\tmag\n "1",\t"2" , 20\n')
    galaxies = Galaxies.read(tmp_path / "a.csv")
    assert galaxies.pixels().tolist() == [[1, 2]]
    assert galaxies.parameter("mag") == [20]


@pytest.mark.parametrize("ending", FORMATS)
def test_masked_positions_are_not_measured(tmp_path, image, ending):
    columns = {n: MaskedColumn([v, 0.0], unit="deg", mask=[False, True]) for n, v in (("ra", RA[0]), ("dec", DEC[0]))}
    path = written(tmp_path / f"a{ending}", columns)
    plan = Plan.of(Exposure.open(image), network=None, psf=None, fitting=None, resample=False, positions=path,
                   outputs=Outputs(), work=Work(), command="")  # fmt: skip
    np.testing.assert_allclose(plan.places, [[TRUE["x"][0], TRUE["y"][0]], [np.nan, np.nan]])
