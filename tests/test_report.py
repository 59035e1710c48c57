import re
from html.parser import HTMLParser

import numpy as np
import pytest
from astropy import units
from astropy.io import fits
from astropy.table import QTable
from conftest import turned

from sersicnet.catalogue import columns, depth, ds9, report, signal
from sersicnet.errors import OutputError
from sersicnet.image import mosaic
from sersicnet.image.exposure import Exposure
from sersicnet.image.regions import Threshold
from sersicnet.image.sky import estimate_sky
from sersicnet.schema import Flag

META = {
    "IMAGE": "field <1>.fits", "ZEROPT": 25.0, "ZPSOURCE": "MAGZERO", "PIXSCALE": 0.06, "PIXSRC": "WCS", "SKYRMS": 0.01,
    "NOISECOR": 2.0, "WEIGHTS": "fovea", "WTSHA256": "0123456789abcdef", "PSFFWHM": 3.0, "PSFSRC": "9 stars",
    "OUTSIDE": "nothing", "DATE": "2026-01-01T00:00:00", "SNETVER": "0.1.0",
}  # fmt: skip


class Page(HTMLParser):
    """Checks that tags are closed, and collects what a browser would load, and the text."""

    EMPTY = frozenset({"meta", "img", "br", "input"})

    def __init__(self, path):
        super().__init__()
        self.open, self.links, self.text, self.images = [], [], "", []
        self.source = path.read_text()
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[name] for name in ("src", "href", "srcset", "data") if name in attributes]
        if tag == "img":
            self.images.append(attributes)
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


def exposure(tmp_path, wcs=True, shape=(200, 200)):
    if wcs:
        return Exposure(turned(tmp_path, -1, 20.0))
    data = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
    fits.PrimaryHDU(data).writeto(tmp_path / "plain.fits")
    return Exposure(mosaic.read_image(tmp_path / "plain.fits"))


def noisy(tmp_path, shape=(200, 200)):
    image = exposure(tmp_path, wcs=False, shape=shape)
    mesh = estimate_sky(image, Threshold())
    image.close()
    return image, mesh


def catalogue(n, meta=META, *, errors=True):
    rng = np.random.default_rng(1)
    x, y = rng.uniform(0, 199, (2, n))
    columns = {
        "id": np.arange(1, n + 1), "x": x * units.pix, "y": y * units.pix,
        "mag": rng.uniform(20, 26, n).astype("f4") * units.mag, "r_eff": rng.uniform(0.1, 1, n) * units.arcsec,
        "r_eff_pix": rng.uniform(2, 15, n) * units.pix, "sersic_n": rng.uniform(0.5, 4, n),
        "ellipticity": rng.uniform(0, 0.8, n), "theta": rng.uniform(-90, 90, n) * units.deg, "snr": np.full(n, 20.0),
        "flags": rng.choice([0, Flag.EDGE, Flag.LOW_SNR, Flag.OUT_OF_DOMAIN, Flag.RANGE_N | Flag.BLENDED], n),
    }  # fmt: skip
    if errors:
        columns["mag_err"] = np.full(n, 0.125) * units.mag
    return QTable(columns, meta=dict(meta))


def test_a_report_holds_all_of_itself(tmp_path):
    image, mesh = noisy(tmp_path)
    table = catalogue(60)
    report.write_report(
        tmp_path / "report.html", table, image, mesh, lambda window: np.zeros((200, 200), np.float32)[window]
    )
    page = Page(tmp_path / "report.html")
    assert page.links
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"https?://|url\(|@import|<script", page.source)
    assert all(image["alt"] for image in page.images)
    assert "field <1>.fits" in page.text  # escaped, so that it is text
    assert "25.0000 AB mag for one image unit; from: MAGZERO" in page.text
    assert "3.00 pixels (FWHM); from: 9 stars" in page.text
    assert f"{(table['flags'] == 0).sum()} ({(table['flags'] == 0).mean():.0%}) without flags" in page.text
    assert "0.125" in page.text
    assert "the effective radius reaches the image border" in page.text
    assert [path.name for path in tmp_path.glob("*report*")] == ["report.html"]


@pytest.mark.parametrize("case", ["no rows", "one row", "all NaN", "no scale", "nothing known", "outside", "wild"])
def test_a_report_is_made_of_anything(tmp_path, case):
    image, mesh = noisy(tmp_path)
    table = catalogue({"no rows": 0, "one row": 1}.get(case, 12), errors=case != "no scale")
    if case == "all NaN":
        for name in ("mag", "r_eff", "r_eff_pix", "sersic_n", "ellipticity", "theta", "snr"):
            table[name] = np.full(12, np.nan)
        table["flags"] = int(Flag.NO_DATA)
    elif case == "no scale":
        table.remove_column("r_eff")
        table.meta = {key: value for key, value in META.items() if not key.startswith("PIX")}
    elif case == "nothing known":
        table.meta = {}
        table.remove_columns(["flags", "snr", "theta"])
    elif case == "outside":
        table["x"], table["y"] = -500.0 * units.pix, np.nan * units.pix
    elif case == "wild":
        table["mag"][:4] = [-1e9, 1e9, np.inf, -np.inf] * units.mag
        table["r_eff_pix"][:3] = [1e9, np.inf, -2] * units.pix
        table["sersic_n"][:2] = [0, 1e30]
    report.write_report(tmp_path / "report.html", table, image, mesh)
    page = Page(tmp_path / "report.html")
    assert f"{len(table)} source" in page.text


def test_a_report_that_cannot_be_written_is_refused(tmp_path):
    image, mesh = noisy(tmp_path)
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match="could not be written"):
        report.write_report(tmp_path / "report.html", catalogue(3), image, mesh)
    assert len(list(tmp_path.glob(".report*"))) == 0


def test_a_report_of_bands_shows_each_galaxy_in_all_of_them(tmp_path):
    """With stamps as wide on the sky: twice as many pixels in the band of half the pixel scale."""
    image, mesh = noisy(tmp_path)
    coarse = catalogue(30)
    fine = catalogue(30, {**META, "PIXSCALE": 0.03, "VALFILE": "v.fits", "DETECTON": "deep.fits"})
    for name in ("x", "y", "r_eff_pix"):
        fine[name] = 2 * coarse[name]  # most are outside of the image of this band, which has the same pixels
    runs = {
        "F125W": columns.Measurement(coarse, image, mesh, None),
        "F<W": columns.Measurement(fine, image, mesh, lambda window: np.zeros((200, 200), np.float32)[window]),
    }
    report.write_report_of_bands(tmp_path / "report.html", runs)
    page = Page(tmp_path / "report.html")
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"https?://|url\(|@import|<script", page.source)
    ids = re.findall(r' id="([^"]+)"', page.source)
    assert len(set(ids)) == len(ids) > 0
    clean = (coarse["flags"] == 0) & (fine["flags"] == 0)
    assert f"{clean.sum()} ({clean.mean():.0%}) without flags" in page.text
    assert "F125W: counts and depth" in page.text
    assert "F<W: counts and depth" in page.text
    assert "v.fits" in page.text
    shown = re.findall(r"(\d+) (F125W|F<W) · ", page.text)
    assert [band for _, band in shown] == ["F125W", "F<W"] * (len(shown) // 2)
    assert len({number for number, _ in shown}) == len(shown) // 2 > 8
    assert "F<W · outside of the image" in page.text
    widths = re.findall(r'viewBox="0 0 (\d+) (\d+)" role="img" aria-label="source (\d+) (\S+):', page.source)
    sides = {(number, band): int(side) for _, side, number, band in widths}
    both = [number for number, band in sides if band == "F&lt;W"]
    assert both
    for number in both:
        assert (sides[number, "F&lt;W"] - 1) / (sides[number, "F125W"] - 1) == pytest.approx(2, abs=0.1)


def test_a_large_image_is_averaged_without_its_bad_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "STRIP", 4000)
    image, mesh = noisy(tmp_path, (203, 310))
    data = image.image.data
    data[:20, :20] = np.nan
    data[100, 100] = np.nan
    fits.PrimaryHDU(data).writeto(tmp_path / "holes.fits")
    holes = Exposure(mosaic.read_image(tmp_path / "holes.fits"))
    view = signal.averaged(holes, mesh, holes.image.whole, 10)
    assert view.signal.shape == (21, 31)
    assert np.isnan(view.signal[:2, :2]).all()
    assert np.isnan(view.signal).sum() == 4
    assert view.usable == 203 * 310 - 401
    values, bad = signal.signal_of(holes, mesh, (slice(100, 110), slice(100, 110)))
    other, _ = signal.signal_of(holes, mesh, (slice(50, 60), slice(200, 210)))
    assert view.signal[10, 10] / view.signal[5, 20] == pytest.approx(values[~bad].mean() / other.mean(), rel=1e-3)
    assert 0.9 < np.nanstd(view.signal) < 1.1
    holes.close()


def test_the_depth_is_five_times_the_noise_of_an_aperture():
    area = np.pi * 3**2  # twice a PSF of 3 pixels wide
    expected = 25 - 2.5 * np.log10(5 * 0.01 * 2 * np.sqrt(area))
    assert depth.depth(META) == pytest.approx((expected, 6.0))
    assert depth.depth({"ZEROPT": 25.0}) is None
    assert depth.depth({**META, "SKYRMS": np.nan}) is None


def test_an_aperture_on_a_resampled_grid_has_its_size_on_the_sky(tmp_path):
    image, mesh = noisy(tmp_path)
    report.write_report(tmp_path / "report.html", catalogue(5, {**META, "RESAMPLE": 2.0}), image, mesh)
    page = Page(tmp_path / "report.html")
    assert "6.0 pixels (0.18 arcsec) diameter" in page.text
    assert "to pixels of 0.03 arcsec" in page.text


def test_counts_turn_over_where_most_are():
    mag = np.concatenate([np.full(20, 24.2), np.full(30, 24.7), np.full(5, 25.2), [np.nan]])
    assert depth.turnover(mag) == (24.5, 25.0)
    assert depth.turnover(mag[:50]) is None  # none is fainter
    assert depth.turnover(mag[-6:]) is None


def test_each_row_is_of_one_class():
    flags = np.array([0, Flag.EDGE, Flag.EDGE | Flag.NO_DATA, Flag.OUT_OF_DOMAIN, Flag.RANGE_E, 1 << 20])
    names = [columns.CLASSES[k].name for k in columns.classes(flags)]
    crowded, other = "crowded, masked or at an edge", "other flags"
    assert names == ["no flags", crowded, "no data", other, "values in doubt", other]


def ellipse(line):
    shape, values = re.match(r"(\w+)\(([^)]*)\)", line).groups()
    return shape, [float(value.rstrip('"')) for value in values.split(",")]


@pytest.mark.parametrize("parity", [-1, 1])
def test_regions_lie_where_the_ellipses_are(tmp_path, parity):
    frame = turned(tmp_path, parity, 35.0)
    table = catalogue(5)
    ds9.write_regions(table, tmp_path / "cat.reg", frame)
    lines = (tmp_path / "cat.reg").read_text().splitlines()
    assert lines[0] == "# Region file format: DS9 version 4.1"
    assert lines[3] == "icrs"
    for row, line in zip(table, lines[4:], strict=True):
        shape, (ra, dec, a, b, angle) = ellipse(line)
        assert shape == "ellipse"
        assert a / 0.06 == pytest.approx(row["r_eff_pix"].value, rel=1e-3)
        assert b / a == pytest.approx(1 - row["ellipticity"], abs=1e-3)
        # The end of the major axis on the sky, back in pixels: ds9 has 90 degrees at north.
        towards = np.radians(angle - 90)
        end = frame.pixels(ra + a / 3600 * np.sin(towards) / np.cos(np.radians(dec)), dec + a / 3600 * np.cos(towards))
        along = np.radians(row["theta"].value)
        ahead = row["r_eff_pix"].value * np.array([np.cos(along), np.sin(along)])
        there = np.array(end) - [row["x"].value, row["y"].value]
        assert min(np.abs(there - ahead).max(), np.abs(there + ahead).max()) < 0.02
        assert f"text={{{row['id']}}}" in line


def test_regions_without_a_wcs_count_from_one(tmp_path):
    table = catalogue(3)
    table["r_eff_pix"][1] = np.nan * units.pix
    table["theta"][2] = np.nan * units.deg
    table["flags"] = [0, int(Flag.NO_DATA), 0]
    ds9.write_regions(table, tmp_path / "cat.reg", exposure(tmp_path, wcs=False).image)
    lines = (tmp_path / "cat.reg").read_text().splitlines()
    assert lines[3] == "image"
    kinds, values = zip(*map(ellipse, lines[4:]), strict=True)
    assert kinds == ("ellipse", "point", "circle")
    np.testing.assert_allclose([v[:2] for v in values], np.column_stack([table["x"].value, table["y"].value]) + 1)
    assert values[0][4] == pytest.approx(table["theta"][0].value % 360, abs=1e-3)
    assert "color=#000000" in lines[5]


def test_regions_of_no_rows(tmp_path):
    ds9.write_regions(catalogue(0), tmp_path / "cat.reg", exposure(tmp_path).image)
    assert (tmp_path / "cat.reg").read_text().splitlines()[-1] == "icrs"
