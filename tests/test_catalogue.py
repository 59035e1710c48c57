import numpy as np
import pytest
from astropy import units
from astropy.table import QTable

from sersicnet.catalogue import table as catalogue
from sersicnet.errors import InputError


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
