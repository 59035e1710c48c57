from unittest.mock import Mock

import numpy as np
import pytest
from astropy import units
from astropy.io import fits
from astropy.table import QTable

from sersicnet.catalogue import table as catalogue
from sersicnet.errors import InputError
from sersicnet.image import mosaic
from sersicnet.schema import COLUMN


@pytest.fixture
def table():
    return QTable({"id": np.arange(3, dtype=np.int32), "mag": np.array([20.0, 21.5, np.nan], np.float32) * units.mag})


@pytest.mark.parametrize("ending", [".ecsv", ".csv", ".parquet", ".fits", ".vot"])
def test_every_format_holds_the_same_numbers(table, tmp_path, ending):
    path = tmp_path / f"cat{ending}"
    catalogue.write(table, path)
    read = catalogue.read_table(path)
    assert read.colnames == table.colnames
    np.testing.assert_allclose(read["mag"], table["mag"].value, rtol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_votables_carry_units_ucds_and_the_header(table, tmp_path):
    table.meta["ZPSOURCE"] = "MAGZERO"
    table["mag"].info.description = "total"
    catalogue.write(table, tmp_path / "cat.vot")
    text = (tmp_path / "cat.vot").read_text()
    assert 'ucd="phot.mag"' in text
    assert 'unit="mag"' in text
    assert 'name="ZPSOURCE" value="MAGZERO"' in text
    assert "<DESCRIPTION>" in text


def test_fits_carries_units_descriptions_ucds_and_the_header(table, tmp_path):
    table.meta |= {"ZPSOURCE": "MAGZERO", "COMMAND": "sersicnet measure é.fits", "HISTORY": ["one", "two"]}
    catalogue.write(table, tmp_path / "cat.fits")
    with fits.open(tmp_path / "cat.fits", checksum=True) as hdus:
        header = hdus["CATALOG"].header
        assert [header[f"{key}2"] for key in ("TTYPE", "TFORM", "TUNIT", "TUCD")] == ["mag", "E", "mag", "phot.mag"]
        assert header["TCOMM2"] == COLUMN["mag"].description
        assert "TUNIT1" not in header
        assert header.comments["ZPSOURCE"] == "where ZEROPT was read"
        assert list(header["HISTORY"]) == ["sersicnet measure \\xe9.fits", "one", "two"]


@pytest.mark.parametrize("length", [7, 30, 35, 38, 39, 45, 66, 69, 140])
def test_cards_of_any_length_are_written_whole(tmp_path, length):
    """With their comment where there is room for it."""
    table = catalogue.assembled({"id": np.arange(2)})
    table.meta.update(PSFDOUBT="x" * length, ZEROPT=25.94632720410676)
    catalogue.write(table, tmp_path / "t.fits")
    header = fits.getheader(tmp_path / "t.fits", 1)
    assert header["PSFDOUBT"] == "x" * length
    assert header["ZEROPT"] == 25.94632720410676
    assert header.comments["PSFDOUBT"] in ("why the PSF may be of another image", "")
    assert (header.comments["PSFDOUBT"] != "") == (length <= 30)


def test_names_beyond_ascii_are_written_in_every_format(tmp_path):
    table = catalogue.assembled({"id": np.arange(1), "image": np.array(["fjöld.fits"])})
    for ending in (".fits", ".ecsv", ".csv", ".parquet", ".vot"):
        catalogue.write(table, tmp_path / f"cat{ending}")
        expected = "fj\\xf6ld.fits" if ending == ".fits" else "fjöld.fits"  # FITS holds ASCII alone
        assert str(catalogue.read_table(tmp_path / f"cat{ending}")["image"][0]) == expected


def test_unreadable_tables(tmp_path):
    (tmp_path / "bad.fits").write_text("no")
    (tmp_path / "a.txt").write_text("no")
    for name, message in (
        ("bad.fits", "cannot be read as fits"),
        ("a.txt", "A table ends in"),
        ("none.csv", "none at"),
    ):
        with pytest.raises(InputError, match=message):
            catalogue.read_table(tmp_path / name)


def test_a_table_that_is_cut_short_is_refused(table, tmp_path):
    large = catalogue.assembled({"id": np.arange(3000), "mag": np.zeros(3000)})
    catalogue.write(large, tmp_path / "cat.fits")
    whole = (tmp_path / "cat.fits").read_bytes()
    (tmp_path / "cut.fits").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cut.fits cannot be read as fits: .*truncated"):
        catalogue.read_table(tmp_path / "cut.fits")


@pytest.mark.parametrize(("error", "expected"), [(ValueError(""), "fits: ValueError"), (ValueError("a\nb"), "fits: a")])
def test_a_reader_s_error_is_one_line(table, tmp_path, monkeypatch, error, expected):
    catalogue.write(table, tmp_path / "cat.fits")
    monkeypatch.setattr(catalogue.Table, "read", Mock(side_effect=error))
    with pytest.raises(InputError, match=f"{expected}$"):
        catalogue.read_table(tmp_path / "cat.fits")


def test_want_of_memory_is_no_fault_of_the_table(table, tmp_path, monkeypatch):
    catalogue.write(table, tmp_path / "cat.fits")
    monkeypatch.setattr(catalogue.Table, "read", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        catalogue.read_table(tmp_path / "cat.fits")


def test_images_beyond_ascii_have_models(tmp_path):
    fits.PrimaryHDU(np.ones((200, 200), "f4"), fits.Header({"MAGZERO": 25.0})).writeto(tmp_path / "fjöld.fits")
    frame = mosaic.read_image(tmp_path / "fjöld.fits")
    with catalogue.writing_image(frame, tmp_path / "model.fits") as pixels:
        pixels[:] = 2
    assert fits.getdata(tmp_path / "model.fits").mean() == 2
    assert fits.getheader(tmp_path / "model.fits")["IMAGE"] == "fj\\xf6ld.fits[0]"


STRANGE = "a\tb\x1b\udcff\né.fits"


@pytest.mark.parametrize("ending", [".ecsv", ".csv", ".parquet", ".fits", ".vot"])
def test_names_that_are_no_text_are_written_as_escapes(tmp_path, ending):
    table = catalogue.assembled({"id": np.arange(2), "image": np.array([STRANGE, "b.fits"])})
    table.meta |= {"IMAGE": STRANGE, "COMMAND": f"sersicnet measure '{STRANGE}'", "HISTORY": [STRANGE]}
    path = tmp_path / f"c\x01\udcff{ending}"
    catalogue.write(table, path)
    read = catalogue.read_table(path)
    expected = r"a\tb\x1b\udcff\né.fits".replace("é", r"\xe9" if ending == ".fits" else "é")
    assert read["image"].tolist() == [expected, "b.fits"]
    assert table["image"][0] == STRANGE
    if ending in (".ecsv", ".fits"):
        assert read.meta["IMAGE"] == expected


def test_images_of_strange_names_have_models(tmp_path):
    path = tmp_path / "a\tb\x1b\udcff.fits"
    fits.PrimaryHDU(np.ones((200, 200), "f4"), fits.Header({"MAGZERO": 25.0})).writeto(path)
    with catalogue.writing_image(mosaic.read_image(path), tmp_path / "model\udcff.fits") as pixels:
        pixels[:] = 2
    assert fits.getheader(tmp_path / "model\udcff.fits")["IMAGE"] == r"a\tb\x1b\udcff.fits[0]"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("id", "mag"), ["id", "mag_A", "mag_B"]),
        (("mag",), ["mag_A", "mag_B"]),
        (("id",), ["id"]),
        (("ra", "ra_err", "mag"), ["ra", "ra_err", "mag_A", "ra_B", "mag_B", "ra_err_B"]),
        (("flags",), ["flags", "flags_A", "flags_B"]),
    ],
)
def test_bands_beside_each_other_have_the_columns_that_are_wanted(names, expected):
    """Band B is fitted: its position and the error of this are its own, whether or not other columns of fits are."""
    measured = dict.fromkeys(("id", "ra", "ra_err", "mag", "flags"), np.arange(3))
    bands = {"A": catalogue.assembled(measured), "B": catalogue.assembled(measured | {"fit_status": np.zeros(3)})}
    table = catalogue.side_by_side(bands["A"]["id", "ra", "ra_err"], bands, names)
    assert table.colnames == expected
    assert len(table) == 3


def test_what_single_precision_cannot_hold_is_infinite():
    """The upper quantile of a radius whose relative error is 100: no warning, which tests take for an error."""
    assert np.isinf(catalogue.assembled({"r_eff_pix_p84": np.array([1e300])})["r_eff_pix_p84"].value).all()
