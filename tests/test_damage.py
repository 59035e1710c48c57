"""Mosaics that are damaged, or odd: each gives the right catalogue, or one line that tells what is wrong."""

import bz2
import gzip
import json
import lzma
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import QTable, Table

from sersicnet import cli
from sersicnet.errors import InputError, SersicnetWarning
from sersicnet.measuring.measure import measure
from sersicnet.measuring.outputs import Outputs
from sersicnet.measuring.plan import Work
from sersicnet.schema import Flag
from sersicnet.simulating.field import Field, simulate_field

SIZE = 256
CARDS = {
    "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 150.1, "CRVAL2": 2.2, "CRPIX1": 128.5, "CRPIX2": 128.5,
    "CDELT1": -0.06 / 3600, "CDELT2": 0.06 / 3600, "RADESYS": "ICRS", "MAGZERO": 25.9463,
}  # fmt: skip
FIXED = "fovea-sky"
"""Weights of one PSF, which need neither a pixel scale nor stars to find it."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "whole.fits"
    simulate_field(path, Field(SIZE, n=6, seed=4, mag=(18.0, 21.0)))
    return fits.getdata(path).astype(np.float32)


@pytest.fixture
def run(capsys, tmp_path):
    """Measure on the command line in this process; returns the exit code and what was said."""

    def call(image, *options):
        with pytest.raises(SystemExit) as done:
            cli.main(["measure", str(image), "-o", str(tmp_path / "cat.ecsv"), "-w", FIXED, *map(str, options)])
        return done.value.code or 0, capsys.readouterr().err

    return call


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The catalogue of the undamaged mosaic."""
    return measure(write(tmp_path_factory.mktemp("good"), data), weights=FIXED)


def write(folder, data, **cards):
    path = folder / "mosaic.fits"
    fits.PrimaryHDU(data, fits.Header({**CARDS, **cards})).writeto(path)
    return path


def change(path, old, new):
    """Replace a card of the first header, found by its keyword, by raw text."""
    content = path.read_bytes()
    at = content.index(old.ljust(8).encode())
    assert at % 80 == 0
    path.write_bytes(content[:at] + new.ljust(80).encode("latin1") + content[at + 80 :])
    return path


def rewrite(path, content, name="mosaic.fits"):
    path.unlink()
    path = path.with_name(name)
    path.write_bytes(content)
    return path


def swapped(folder, data):
    path = write(folder, data)
    content = path.read_bytes()
    start = len(content) - data.nbytes - (-data.nbytes % 2880)
    return rewrite(path, content[:start] + data.astype("<f4").tobytes() + bytes(-data.nbytes % 2880))


def tiled(folder, data, damage=lambda content: content):
    path = folder / "mosaic.fits.fz"
    fits.HDUList([fits.PrimaryHDU(), fits.CompImageHDU(data, fits.Header(CARDS), quantize_level=64)]).writeto(path)
    path.write_bytes(damage(path.read_bytes()))
    return path


def blanked(content):
    middle = int(0.6 * len(content))
    return content[:middle] + bytes(200) + content[middle + 200 :]


def scaled(folder, data, damaged=False):
    path = folder / "mosaic.fits"
    scale = 5e-4
    hdu = fits.PrimaryHDU(np.clip(np.round(data / scale) + 2000, -32767, 32767).astype(np.int16))
    if damaged:
        hdu.data[10:14, 20:30] = -32768
    hdu.header.update(CARDS | {"BSCALE": scale, "BZERO": -2000 * scale, "BLANK": -32768})
    hdu.writeto(path)
    return path


def changed(data, *places):
    """A copy with other values at some places."""
    out = data.copy()
    for place, value in places:
        out[place] = value
    return out


def several(folder, data, primary=None):
    path = folder / "mosaic.fits"
    planes = [fits.ImageHDU(data, fits.Header(CARDS)), fits.ImageHDU(np.full_like(data, 7), name="OTHER")]
    fits.HDUList([fits.PrimaryHDU(primary), *planes]).writeto(path)
    return path


REFUSED = {
    "cut in the data": (lambda f, d: cut(write(f, d), 0.5), "may have been truncated"),
    "last block missing": (lambda f, d: cut(write(f, d), 0.99), "may have been truncated"),
    "cut in the header": (lambda f, d: rewrite(write(f, d), write_head(d)[:800]), "Empty or corrupt FITS file"),
    "no END": (lambda f, d: change(write(f, d), "END", "ENX"), "missing END card"),
    "no SIMPLE": (lambda f, d: change(write(f, d), "SIMPLE", "SAMPLE  =                    T"), "No SIMPLE card"),
    "BITPIX of 13": (lambda f, d: change(write(f, d), "BITPIX", f"BITPIX  = {13:20}"), "not a readable FITS file"),
    "BITPIX of text": (lambda f, d: change(write(f, d), "BITPIX", "BITPIX  = 'float'"), "not a readable FITS file"),
    "BITPIX too large": (lambda f, d: change(write(f, d), "BITPIX", f"BITPIX  = {-64:20}"), "may have been truncated"),
    "BITPIX too small": (lambda f, d: change(write(f, d), "BITPIX", f"BITPIX  = {16:20}"), "not a readable FITS file"),
    "NAXIS1 enormous": (lambda f, d: change(write(f, d), "NAXIS1", f"NAXIS1  = {10**11:20}"), "not a readable FITS"),
    "NAXIS1 negative": (lambda f, d: change(write(f, d), "NAXIS1", f"NAXIS1  = {-10:20}"), "not a readable FITS"),
    "NAXIS1 of text": (lambda f, d: change(write(f, d), "NAXIS1", "NAXIS1  = 'abc'"), "not a readable FITS file"),
    "NAXIS1 missing": (lambda f, d: change(write(f, d), "NAXIS1", "COMMENT"), "not a readable FITS file"),
    "zeros": (lambda f, d: write(f, np.zeros_like(d)), "no pixel left that is finite, exposed"),
    "nothing but NaN": (lambda f, d: write(f, np.full_like(d, np.nan)), "no pixel left that is finite"),
    "constant": (lambda f, d: write(f, np.full_like(d, 3.5)), "has no noise"),
    "BSCALE of 0": (lambda f, d: change(scaled(f, d), "BSCALE", f"BSCALE  = {0:20}"), "no pixel left|has no noise"),
    "bytes in the wrong order": (swapped, "Are its bytes in the wrong order"),
    "enormous values": (lambda f, d: write(f, d * np.float32(1e30)), "have values beyond 1e\\+18"),
    "beyond single precision": (lambda f, d: write(f, d.astype(float) * 1e60), "no pixel left|no blank sky|no noise"),
    "cube": (lambda f, d: write(f, np.stack([d, d, d])), "has 3 axes"),
    "no axes": (lambda f, d: write(f, None), "holds no image"),
    "no width": (lambda f, d: write(f, np.zeros((0, 300), np.float32)), "300 x 0 pixels"),
    "gzip cut short": (lambda f, d: zipped(f, d, lambda content: content[:90_000]), "cut short"),
    "gzip cut in the header": (lambda f, d: zipped(f, d, lambda content: content[:300]), "cut short"),
    "bzip2 cut short": (lambda f, d: packed(f, d, "bz2", lambda content: content[:-20_000]), "cut short"),
    "xz cut short": (lambda f, d: packed(f, d, "xz", lambda content: content[:-20_000]), "cut short"),
    "gzip with a wrong checksum": (lambda f, d: zipped(f, d, lambda content: content[:-8] + b"12345678"), "CRC"),
    "tile-compressed, cut short": (lambda f, d: tiled(f, d, lambda content: content[:-20_000]), "truncated"),
    "tile-compressed, damaged": (lambda f, d: tiled(f, d, blanked), "decompression error"),
    "empty": (lambda f, d: rewrite(write(f, d), b""), "Empty or corrupt"),
    "text": (lambda f, d: rewrite(write(f, d), b"x,y\n1,2\n" * 900), "No SIMPLE card"),
    "PNG": (lambda f, d: rewrite(write(f, d), b"\x89PNG\r\n\x1a\n" + bytes(4000)), "No SIMPLE card"),
    "directory": (lambda f, d: folder_named(f), "is a directory"),
    "table": (lambda f, d: table(f), "holds no image"),
    "two zero points": (
        lambda f, d: change(write(f, d), "RADESYS", f"MAGZERO = {20.0:20}"),
        "MAGZERO in the header should be a number; received '20.0 and 25.9463'. Give --zero-point",
    ),
    "garbled zero point": (
        lambda f, d: change(write(f, d), "MAGZERO", "MAGZERO = 25.9.4.6"),
        "MAGZERO in the header should be a number; received",
    ),
}  # fmt: skip


def cut(path, fraction):
    content = path.read_bytes()
    return rewrite(path, content[: int(fraction * len(content)) - 3000])


def write_head(data):
    return fits.PrimaryHDU(data, fits.Header(CARDS)).header.tostring().encode()


def zipped(folder, data, damage=lambda content: content):
    return packed(folder, data, "gz", damage)


def packed(folder, data, ending, damage=lambda content: content):
    path = write(folder, data)
    pack = {"gz": gzip, "bz2": bz2, "xz": lzma}[ending].compress
    return rewrite(path, damage(pack(path.read_bytes())), f"mosaic.fits.{ending}")


def folder_named(folder):
    path = folder / "mosaic.fits"
    path.mkdir()
    return path


def table(folder):
    path = folder / "mosaic.fits"
    Table({"a": [1.0]}).write(path)
    return path


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_measured_is_one_line_and_leaves_nothing(run, data, tmp_path, kind):
    make, message = REFUSED[kind]
    path = make(tmp_path, data)
    code, err = run(path)
    assert code == 1, err
    assert "Warning" not in err
    assert err.startswith("Error: ")
    assert re.search(message, err)
    assert list(tmp_path.iterdir()) == [path]


HARMLESS = {
    "NaN in stripes": lambda f, d: write(f, changed(d, (np.s_[:, 2:5], np.nan), (np.s_[7:10], np.nan))),
    "infinite pixels": lambda f, d: write(f, changed(d, (np.s_[3, 3], np.inf), (np.s_[250, 5], -np.inf))),
    "enormous pixels": lambda f, d: write(f, changed(d, (np.s_[3, 3], 1e30), (np.s_[250, 5], -1e30))),
    "two images": several,
    "cube of one plane": lambda f, d: write(f, d[None]),
    "an empty primary of no width": lambda f, d: several(f, d, np.zeros((0, 0), np.float32)),
    "undecodable bytes in a unit": lambda f, d: change(write(f, d, BUNIT="x"), "BUNIT", "BUNIT   = '\xb5\xff\xfe'"),
    "control characters in a name": lambda f, d: write(f, d).rename(f / "a\tb\nc\x1b[31m\udcff.fits"),
    "scaled integers": scaled,
    "integers with BLANK": lambda f, d: scaled(f, d, damaged=True),
    "double precision": lambda f, d: write(f, d.astype(">f8")),
    "written from little-endian memory": lambda f, d: write(f, d.astype("<f8")),
    "gzip": zipped,
    "bzip2": lambda f, d: packed(f, d, "bz2"),
    "xz": lambda f, d: packed(f, d, "xz"),
    "tile-compressed": tiled,
    "a garbled card": lambda f, d: change(write(f, d, OBSERVER="me"), "OBSERVER", "OBS\x01\x02 ?? = $$$ '"),
    "an open string": lambda f, d: change(write(f, d, OBSERVER="me"), "OBSERVER", "OBSERVER= O'Brien"),
    "letters beyond ASCII": lambda f, d: change(write(f, d, OBSERVER="me"), "OBSERVER", "OBSERVER= 'Nu\xf1ez'"),
    "a card of zero bytes": lambda f, d: change(write(f, d, OBSERVER="me"), "OBSERVER", "\0" * 80),
    "the same zero point twice": lambda f, d: change(write(f, d, OBSERVER="me"), "OBSERVER", f"MAGZERO = {25.9463:20}"),
}
"""Kinds of damage away from galaxies, or of no consequence."""

NO_SKY = {
    "CDELT of 0": lambda f, d: write(f, d, CDELT1=0.0, CDELT2=0.0),
    "singular CD": lambda f, d: write(f, d, CD1_1=1e-5, CD1_2=1e-5, CD2_1=1e-5, CD2_2=1e-5),
    "unknown CTYPE": lambda f, d: write(f, d, CTYPE1="FOO---BAR", CTYPE2="HELLO"),
    "one celestial axis": lambda f, d: write(f, d, CTYPE2="FREQ"),
    "CRVAL of NaN": lambda f, d: change(write(f, d), "CRVAL1", "CRVAL1  = 'NaN'"),
    "CRVAL beyond the sky": lambda f, d: write(f, d, CRVAL1=1e30),
    "declination of 200": lambda f, d: write(f, d, CRVAL2=200.0),
    "CRPIX of text": lambda f, d: change(write(f, d), "CRPIX1", "CRPIX1  = 'x'"),
    "CUNIT of parsec": lambda f, d: write(f, d, CUNIT1="parsec", CUNIT2="parsec"),
    "RADESYS garbled": lambda f, d: change(write(f, d), "RADESYS", "RADESYS = ICRS'"),
}


def assert_same(found, whole):
    distance = np.hypot(whole["x"].value[:, None] - found["x"].value, whole["y"].value[:, None] - found["y"].value)
    # Noise peaks may come and go, and what lies at the edge may be damaged.
    bright = (whole["snr"] > 20) & (np.abs(whole["x"].value - 128) < 110) & (np.abs(whole["y"].value - 128) < 110)
    assert bright.sum() >= 3
    assert (distance.min(axis=1)[bright] < 0.1).all()
    nearest = distance.argmin(axis=1)[bright]
    np.testing.assert_allclose(found["mag"].value[nearest], whole["mag"].value[bright], atol=0.03)
    np.testing.assert_allclose(found["r_eff_pix"].value[nearest], whole["r_eff_pix"].value[bright], rtol=0.05)


@pytest.mark.parametrize("kind", HARMLESS)
def test_harmless_damage_leaves_the_catalogue_as_it_is(run, data, whole, tmp_path, kind):
    code, err = run(HARMLESS[kind](tmp_path, data))
    assert code == 0, err
    assert "Warning" not in err
    found = QTable.read(tmp_path / "cat.ecsv")
    assert_same(found, whole)
    assert found["ra"][0].value == pytest.approx(150.1, abs=0.01)


@pytest.mark.parametrize("kind", NO_SKY)
def test_a_wcs_that_makes_no_sense_gives_no_coordinates(run, data, whole, tmp_path, kind):
    code, err = run(NO_SKY[kind](tmp_path, data))
    assert code == 0, err
    assert "Warning: " in err
    assert re.search(r"no celestial WCS(:| that can be used \(.+\):) the catalogue has pixel columns only", err)
    found = QTable.read(tmp_path / "cat.ecsv")
    assert_same(found, whole)
    assert not {"ra", "dec", "r_eff"} & set(found.colnames)


DISTORTED = {
    "SIP without the suffix": {"A_ORDER": 2, "B_ORDER": 2, "A_2_0": 1e-7, "B_0_2": 1e-7},
    "SIP that cannot be inverted": {
        "CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP", "A_ORDER": 2, "B_ORDER": 2, "A_2_0": 1.0, "B_0_2": 1.0,
    },
    "a look-up table": {"CPDIS1": "LOOKUP", "CPDIS2": "LOOKUP"},
}  # fmt: skip


@pytest.mark.parametrize("kind", DISTORTED)
def test_the_plain_part_of_a_wcs_serves_and_json_stays_json(data, whole, tmp_path, kind):
    path = write(tmp_path, data, **DISTORTED[kind])
    options = ["-o", tmp_path / "cat.ecsv", "-w", FIXED, "-q", "--workers", "1", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "sersicnet", "measure", path, *options], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["catalogues"][0]["sources"] > 3
    assert re.fullmatch(r"Warning: .* has a WCS of which only a part is used: .* left out.*\n", done.stderr)
    found = QTable.read(tmp_path / "cat.ecsv")
    assert_same(found, whole)
    np.testing.assert_allclose(found["ra"].value[:3], whole["ra"].value[:3], atol=1e-7)


@pytest.mark.parametrize("sip", [False, True])
def test_absurd_positions_are_rows_without_data(run, data, tmp_path, sip):
    terms = {
        "CTYPE1": "RA---TAN-SIP",
        "CTYPE2": "DEC--TAN-SIP",
        "A_ORDER": 2,
        "B_ORDER": 2,
        "A_2_0": 2e-6,
        "B_0_2": 2e-6,
    }
    path = write(tmp_path, data, **(terms if sip else {}))
    for head, places in (
        ("ra,dec", ["150.1,2.2", "150.5,2.6", "170,10", "330.1,-2.2", "inf,2.2", "1e300,2.2", "999,-999"]),
        ("x,y", ["127,127", "inf,5", "1e300,-1e300", "1e18,3", "-3e9,5e9", "nan,4"]),
    ):
        (tmp_path / "places.csv").write_text("\n".join([head, *places]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what astropy and NumPy say
            code, err = run(path, "--positions", tmp_path / "places.csv", "--overwrite")
        assert code == 0, err
        found = QTable.read(tmp_path / "cat.ecsv")
        assert len(found) == len(places)
        assert ((found["flags"] & Flag.NO_DATA) != 0).tolist() == [False] + [True] * (len(places) - 1)
        ra, dec = found["ra"].value, found["dec"].value
        assert np.hypot(ra[0] - 150.1, dec[0] - 2.2) < 1e-4
        given = [row.split(",") for row in places] if head == "ra,dec" else []
        for row, sky in zip(given, zip(ra, dec, strict=True), strict=False):
            assert np.isnan(sky).all() or np.allclose(sky, np.array(row, float), atol=1e-6)


def test_an_inverted_image_has_no_sources_and_says_so(run, data, tmp_path):
    code, err = run(write(tmp_path, -data))
    assert code == 0, err
    assert "with positive sources?" in err
    assert len(QTable.read(tmp_path / "cat.ecsv")) == 0


MAPS = {
    "of another shape": (lambda p: fits.writeto(p, np.ones((100, SIZE))), "must agree"),
    "all zero": (lambda p: fits.writeto(p, np.zeros((SIZE, SIZE))), "has a positive noise"),
    "all NaN": (lambda p: fits.writeto(p, np.full((SIZE, SIZE), np.nan)), "has a positive noise"),
    "negative": (lambda p: fits.writeto(p, np.full((SIZE, SIZE), -1.0)), "has a positive noise"),
    "text": (lambda p: p.write_text("rms"), "not a readable FITS file"),
    "missing": (lambda p: None, "no such file"),
    "of another scale": (lambda p: fits.writeto(p, np.full((SIZE, SIZE), 1e14)), "would be multiplied by"),
}


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("option", ["rms", "wht", "var"])
def test_a_map_that_cannot_be_used_is_one_line(run, data, tmp_path, kind, option):
    make, message = MAPS[kind]
    make(tmp_path / "map.fits")
    path = write(tmp_path, data)
    code, err = run(path, f"--{option}", tmp_path / "map.fits")
    assert code == 1
    assert "Warning" not in err
    assert message in err
    assert {p.name for p in tmp_path.iterdir()} <= {path.name, "map.fits"}


@pytest.mark.parametrize("value", [np.nan, 0.0, 3.5])
def test_a_tiled_run_of_an_image_that_cannot_be_measured_leaves_nothing(data, tmp_path, value):
    path = write(tmp_path, np.full_like(data, value))
    with pytest.raises(InputError, match=r"no pixel left|has no noise"):
        measure(path, outputs=Outputs(catalogue=tmp_path / "cat.fits"), work=Work(tile=128))
    assert list(tmp_path.iterdir()) == [path]


def test_a_saturated_star_where_tiles_meet_is_the_same_in_all_of_them(data, tmp_path):
    rows, columns = np.indices(data.shape)
    star = 1e4 * np.exp(-np.hypot(rows - 128, columns - 127) / 4)
    path = write(tmp_path, np.minimum(data + star, 500).astype(np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SersicnetWarning)
        one = measure(path)
        many = measure(path, work=Work(tile=128))
    for name in one.colnames:
        np.testing.assert_array_equal(one[name], many[name], err_msg=name)
    assert np.hypot(one["x"].value - 127, one["y"].value - 128).min() < 2
