import functools
import json
import shutil
import types
import warnings
from dataclasses import replace

import numpy as np
import pytest
from astropy import units
from astropy.io import fits
from astropy.table import QTable, Table
from conftest import flat
from scipy.ndimage import zoom

from sersicnet import weights
from sersicnet.engine.fit import Fits, Fitter
from sersicnet.engine.render import Renderer
from sersicnet.errors import InputError, OutputError, SersicnetWarning
from sersicnet.image import mosaic
from sersicnet.image.exposure import Exposure
from sersicnet.image.pixels import Sky
from sersicnet.image.psf import Psf
from sersicnet.image.psffield import Polynomial
from sersicnet.image.psffile import read_psf
from sersicnet.image.regions import Regions, Threshold
from sersicnet.image.stamps import cut
from sersicnet.image.stars import saturated
from sersicnet.measuring import fitting, outputs, scene, tiles
from sersicnet.measuring import measure as module
from sersicnet.measuring.plan import Work
from sersicnet.measuring.seeing import largest_stars
from sersicnet.schema import COLUMN, COLUMNS, RANGE_FLAGS, TARGET_NAMES, Flag
from sersicnet.simulating.field import Field, simulate_field
from sersicnet.simulating.stamps import observe
from sersicnet.simulating.telescopes import F160W, effective_psf

measure = functools.partial(flat, module.measure)

FIXED = "fovea-sky"
"""Weights of one PSF and pixel scale."""

OF_FITS = ("sky", "chi2", "fit_status")
PLAIN = [column for column in COLUMNS if not column.group and column.name not in ("image", "mag_limit", *OF_FITS)]


@pytest.fixture(scope="module")
def catalogue(field):
    return measure(field[0])


def matched(catalogue, truth):
    """Rows of truth and of the catalogue, paired by position."""
    x, y = catalogue["x"].value, catalogue["y"].value
    distance = np.hypot(truth["x"][:, None] - x, truth["y"][:, None] - y)
    pairs = [(i, j) for i, j in enumerate(distance.argmin(axis=1)) if distance[i, j] < 2]
    return (np.array(a) for a in zip(*pairs, strict=True))


def write(path, data, header=None):
    """Write an image of WFC3 in F160W, whose PSF is known."""
    header = fits.Header({"INSTRUME": "WFC3", "FILTER": "F160W"}) + fits.Header(header or {})
    fits.PrimaryHDU(data, header).writeto(path, overwrite=True)
    return path


def test_unflagged_galaxies_are_measured_right(catalogue, field):
    truth = field[1]
    rows, found = matched(catalogue, truth)
    clean = catalogue["flags"][found] == 0
    rows, found = rows[clean], found[clean]
    assert len(rows) >= 5
    difference = catalogue["mag"].value[found] - truth["mag"][rows]
    assert abs(np.median(difference)) < 0.05
    assert np.abs(difference).max() < 0.5
    assert np.median(np.abs(catalogue["r_eff_pix"].value[found] / truth["r_eff_pix"][rows] - 1)) < 0.1
    assert np.median(np.abs(catalogue["ellipticity"][found] - truth["ellipticity"][rows])) < 0.05


def test_angles_of_elongated_galaxies(catalogue, field):
    truth = field[1]
    rows, found = matched(catalogue, truth)
    long = truth["ellipticity"][rows] > 0.3
    difference = catalogue["theta"].value[found] - truth["theta"][rows]
    assert np.median(np.abs((difference[long] + 90) % 180 - 90)) < 5


def test_radius_in_arcsec_is_the_radius_in_pixels_times_the_scale(catalogue):
    np.testing.assert_allclose(catalogue["r_eff"].value, 0.06 * catalogue["r_eff_pix"].value, rtol=1e-5)


def test_units_of_the_image_do_not_matter(catalogue, field, tmp_path):
    image = mosaic.read_image(field[0])
    header = fits.Header({"MAGZERO": 25.9463 + 7.5})
    header.update({k: v for k, v in image.header.items() if k.startswith(("C", "WCS", "RA"))})
    scaled = write(tmp_path / "scaled.fits", image.data * 1000 + 3e3, header)
    again = measure(scaled)
    assert len(again) == len(catalogue)
    # The sky of the scaled image has other roundings, which a galaxy at the limit feels.
    shift = np.abs(again["mag"].value - catalogue["mag"].value)
    assert (shift < 0.01 + 0.1 * catalogue["mag_err"].value).all()
    np.testing.assert_allclose(again["sersic_n"], catalogue["sersic_n"], rtol=0.1)


def test_the_file_opens_with_units_and_descriptions(field, tmp_path):
    path = tmp_path / "cat.fits"
    measure(field[0], path, command="sersicnet measure field.fits")
    read = QTable.read(path)
    assert read.colnames == [c.name for c in PLAIN]
    assert read["r_eff"].unit == units.arcsec
    assert read["ra"].unit == units.deg
    header = fits.getheader(path, 1)
    for i, column in enumerate(PLAIN, start=1):
        assert header[f"TTYPE{i}"] == column.name
        assert header[f"TCOMM{i}"] == column.description
        assert header[f"TUCD{i}"] == column.ucd
        assert header.get(f"TUNIT{i}", "") == column.unit
    assert header["MAGSYS"] == "AB"
    assert header["ZEROPT"] == 25.9463
    assert header["ZPSOURCE"] == "MAGZERO"
    assert header["PIXSRC"] == "WCS"
    assert header["WTSHA256"] == weights.load(weights.DEFAULT).sha256
    assert header["DEVICE"] == "cpu"
    assert "sersicnet measure field.fits" in header["HISTORY"]
    fits.open(path, checksum=True).close()


def test_positions_keep_their_order_and_number(catalogue, field):
    order = np.array([3, 0, 5, 1])
    wanted = Table({"x": catalogue["x"].value[order], "y": catalogue["y"].value[order]})
    wanted.add_row({"x": -400.0, "y": 10.0})
    wanted.add_row({"x": np.nan, "y": 10.0})
    again = measure(field[0], positions=wanted)
    assert list(again["id"]) == [1, 2, 3, 4, 5, 6]
    for name in ("mag", "sersic_n", "theta", "snr"):
        here = getattr(again[name], "value", again[name])[:4]
        np.testing.assert_allclose(here, getattr(catalogue[name], "value", catalogue[name])[order], rtol=1e-4)
    assert np.isnan(again["mag"][4:]).all()
    assert (again["flags"][4:] & Flag.NO_DATA == Flag.NO_DATA).all()


def test_a_place_without_a_source_has_the_flux_of_its_pixels(catalogue, field):
    clean = (catalogue["flags"] == 0).nonzero()[0][0]
    away = np.stack(np.meshgrid(np.arange(40.0, 480, 20), np.arange(40.0, 480, 20)), -1).reshape(-1, 2)
    x, y = catalogue["x"].value, catalogue["y"].value
    distance = np.hypot(away[:, :1] - x, away[:, 1:] - y).min(axis=1)
    places = np.vstack([away[np.argsort(-distance)[:40]], [x[clean], y[clean]]])
    found = measure(field[0], positions=Table(places, names=["x", "y"]))
    dark = np.array(found["area"] == 0)
    assert dark.tolist() == [True] * 40 + [False]
    flux, error = (np.array(found[name]) for name in ("flux", "flux_err"))
    pull = (flux / error)[dark]
    assert abs(pull.mean()) < 1
    assert 0.5 < pull.std() < 1.5
    np.testing.assert_array_equal(np.isnan(found["mag"].value), flux <= 0)
    zero = found.meta["ZEROPT"]
    up = dark & (flux > 0)
    np.testing.assert_allclose(found["mag_aper"].value[up], zero - 2.5 * np.log10(flux[up]), rtol=1e-6)
    limit = found["mag_limit"].value
    np.testing.assert_allclose(
        limit[dark & (flux < 3 * error)], zero - 2.5 * np.log10(3 * error)[dark & (flux < 3 * error)]
    )
    assert np.isnan(limit[-1])
    assert flux[-1] == pytest.approx(10 ** (-0.4 * (found["mag"][-1].value - zero)), rel=1e-5)
    np.testing.assert_allclose(found["mag"][-1].value, catalogue["mag"][clean].value, rtol=1e-5)


def test_the_columns_of_a_catalogue_are_chosen(field, tmp_path, monkeypatch):
    """A finished run gives other columns without measuring again."""
    path, run = tmp_path / "cat.fits", tmp_path / "kept"
    whole = measure(field[0], path, run=run)
    monkeypatch.setattr(tiles, "measure_tile", lambda *args, **options: pytest.fail("measured again"))
    regions = tmp_path / "cat.reg"
    named = measure(field[0], path, run=run, columns="mag,id,r_eff_p84,corr_mag_r_eff", regions=regions, overwrite=True)
    assert named.colnames == ["id", "mag", "corr_mag_r_eff", "r_eff_p84"]
    assert QTable.read(path).colnames == named.colnames
    np.testing.assert_array_equal(named["mag"], whole["mag"])
    assert regions.read_text().count("\nellipse(") == len(whole)  # files beside it need no columns of it
    added = measure(field[0], path, run=run, columns=["+surface_brightness", "+position_errors"], overwrite=True)
    more = ["x_err", "y_err", "ra_err", "dec_err", "mu_mean", "mu_mean_err"]
    assert added.colnames == [*whole.colnames, *more]
    header = fits.getheader(path, 1)
    number = 1 + added.colnames.index("mu_mean")
    assert (header[f"TUNIT{number}"], header[f"TUCD{number}"]) == ("mag arcsec-2", "phot.mag.sb")
    assert QTable.read(path)["mu_mean"].unit == units.mag / units.arcsec**2
    correlation = whole.galaxy(1).covariance[0, 1] / (whole["mag_err"][0].value * whole["r_eff_pix_err"][0].value)
    assert named["corr_mag_r_eff"][0] == pytest.approx(correlation, rel=1e-5)


@pytest.mark.parametrize(
    ("columns", "message"),
    [("id,magg", "received 'magg'. Is it mag"), ("id,sky", "`columns` lists sky, which needs fits. Leave it out.")],
)
def test_columns_that_cannot_be_had_are_refused_before_any_work(field, tmp_path, monkeypatch, columns, message):
    monkeypatch.setattr(module.Plan, "run", lambda *args: pytest.fail("began to work"))
    with pytest.raises(InputError, match=message):
        measure(field[0], tmp_path / "cat.fits", columns=columns)
    with pytest.raises(InputError, match="received 'magg'"):
        module.measure_many([field[0], tmp_path / "other.fits"], tmp_path / "all.fits", columns="id,magg")
    assert not list(tmp_path.iterdir())


def test_positions_on_the_sky(catalogue, field, tmp_path):
    wanted = Table({"ra": catalogue["ra"][:3], "dec": catalogue["dec"][:3]})
    wanted.write(tmp_path / "sky.ecsv")
    again = measure(field[0], positions=tmp_path / "sky.ecsv")
    np.testing.assert_allclose(again["x"].value, catalogue["x"].value[:3], atol=1e-6)


def test_the_sky_goes_before_pixels_of_another_image(catalogue, field):
    wanted = Table({"ra": catalogue["ra"][:2], "dec": catalogue["dec"][:2], "x": [1.0, 2.0], "y": [3.0, 4.0]})
    np.testing.assert_allclose(measure(field[0], positions=wanted)["x"].value, catalogue["x"].value[:2], atol=1e-6)


def test_coordinates_in_other_units_and_unknown_ones(catalogue, field):
    wanted = QTable({"ra": catalogue["ra"][:2].to("rad"), "dec": catalogue["dec"][:2].to("arcmin")})
    np.testing.assert_allclose(measure(field[0], positions=wanted)["x"].value, catalogue["x"].value[:2], atol=1e-5)
    unknown = Table({"ra": [-99.0], "dec": [-99.0]})
    with pytest.warns(SersicnetWarning, match="None of the 1 positions of `positions` is inside"):
        assert measure(field[0], positions=unknown)["flags"][0] & Flag.NO_DATA


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (Table({"col": [1.0]}), "has columns x and y, or ra and dec; received col"),
        (Table({"x": ["a"], "y": ["b"]}), "must hold numbers"),
    ],
)
def test_bad_positions_are_refused(field, table, message):
    with pytest.raises(InputError, match=message):
        measure(field[0], positions=table)


def test_detection_quantities_agree_with_the_truth(catalogue, field):
    truth = field[1]
    rows, found = matched(catalogue, truth)
    alone = (catalogue["flags"][found] & (Flag.BLENDED | Flag.CROWDED | Flag.EDGE)) == 0
    rows, found = rows[alone], found[alone]
    assert len(rows) >= 5
    # A Kron ellipse of 2.5 radii holds 90 to 97 % of the light (Graham & Driver 2005).
    missing = catalogue["mag_auto"].value[found] - truth["mag"][rows]
    assert -0.05 < np.median(missing) < 0.2
    assert (catalogue["mag_aper"].value[found] > catalogue["mag_auto"].value[found] - 0.02).all()
    assert (catalogue["mag_auto_err"].value[found] > 0).all()
    assert (catalogue["a_image"] >= catalogue["b_image"]).all()


def test_the_circularised_radius_is_the_geometric_mean_of_the_axes(catalogue):
    expected = catalogue["r_eff_pix"] * np.sqrt(1 - catalogue["ellipticity"])
    np.testing.assert_allclose(catalogue["r_circ_pix"].value, expected.value, rtol=1e-5)
    np.testing.assert_allclose(catalogue["r_circ"].value, 0.06 * expected.value, rtol=1e-5)


def test_the_parent_is_the_brightest_source_that_touches(catalogue, field, isolated, tmp_path):
    ids, parents = np.asarray(catalogue["id"]), np.asarray(catalogue["parent"])
    alone = (catalogue["flags"] & Flag.BLENDED) == 0
    assert alone.any()
    np.testing.assert_array_equal(parents[alone], ids[alone])
    x, y = isolated
    blend = measure(write(tmp_path / "blend.fits", beside(field, x, y), fits.getheader(field[0], 1)))
    here, there = (int(np.argmin(np.hypot(blend["x"].value - x - dx, blend["y"].value - y))) for dx in (0, 30))
    assert (blend["flags"][[here, there]] & Flag.BLENDED).all()
    brightest = blend["id"][there if blend["mag_auto"][there] < blend["mag_auto"][here] else here]
    assert blend["parent"][here] == blend["parent"][there] == brightest


def test_an_empty_sky_gives_every_column_and_no_row(field, tmp_path, blank):
    header = fits.Header({k: v for k, v in mosaic.read_image(field[0]).header.items() if k.startswith(("C", "MAG"))})
    sky = np.random.default_rng(0).normal(0, 0.0035, (300, 300)).astype(np.float32)
    path = write(tmp_path / "sky.fits", sky, header)
    with pytest.warns(SersicnetWarning, match="No source was detected"):
        table = measure(path, tmp_path / "cat.fits")
    assert len(table) == 0
    read = QTable.read(tmp_path / "cat.fits")
    assert len(read) == 0
    assert read.colnames == [c.name for c in PLAIN]


def test_without_a_wcs_there_are_pixel_columns_only(field, tmp_path):
    path = write(tmp_path / "plain.fits", mosaic.read_image(field[0]).data)
    with pytest.warns(SersicnetWarning, match="no celestial WCS"):
        table = measure(path, zero_point=25.9463, psf_fwhm=3.1)
    assert not {"ra", "dec", "r_eff", "r_eff_err"} & set(table.colnames)
    assert {"x", "y", "mag", "r_eff_pix"} <= set(table.colnames)
    with pytest.warns(SersicnetWarning, match="no celestial WCS"):
        table = measure(path, zero_point=25.9463, pixel_scale=0.06)
    assert "r_eff" in table.colnames
    assert "ra" not in table.colnames


# --- flags ----------------------------------------------------------------------------------


def flags_at(field, x, y, data=None, tmp_path=None, **options):
    path = field[0]
    if data is not None:
        header = mosaic.read_image(field[0]).header
        kept = {k: v for k, v in header.items() if k.startswith(("C", "MAG"))}
        path = write(tmp_path / "changed.fits", data, fits.Header(kept))
    return int(measure(path, positions=Table({"x": [float(x)], "y": [float(y)]}), **options)["flags"][0])


def beside(field, x, y, away=30.0, sigma=7.0):
    """The field with a bright source beside a place."""
    data = mosaic.read_image(field[0]).data.copy()
    rows, cols = np.indices(data.shape)
    return data + 5 * np.exp(-((cols - x - away) ** 2 + (rows - y) ** 2) / (2 * sigma**2)).astype(np.float32)


@pytest.fixture
def isolated(catalogue):
    """Position of a galaxy without any flag."""
    row = catalogue[catalogue["flags"] == 0][0]
    return row["x"].value, row["y"].value


def test_flag_no_data(field, tmp_path, isolated):
    data = mosaic.read_image(field[0]).data.copy()
    x, y = (round(v) for v in isolated)
    data[y - 4 : y + 5, x - 4 : x + 5] = np.nan
    assert flags_at(field, *isolated, data, tmp_path) & Flag.NO_DATA


def test_flag_edge_where_light_is_lost(field, tmp_path, isolated):
    """Not where the stamp alone extends beyond the image."""
    assert flags_at(field, 3, 3) & Flag.EDGE
    assert not flags_at(field, 3, 3) & Flag.MASKED
    x, y = (round(v) for v in isolated)
    data = mosaic.read_image(field[0]).data
    for half in (1, 4):
        cut_off = data.copy()[y - 60 : y + 60, x - half : x + 120]
        assert flags_at(field, half, 60, cut_off, tmp_path) & Flag.EDGE
    assert not flags_at(field, 60, 60, data[y - 60 : y + 60, x - 60 : x + 60], tmp_path) & (Flag.EDGE | Flag.MASKED)


@pytest.mark.parametrize("frame", [0, 100])
def test_a_galaxy_in_a_small_cutout_has_no_flag(catalogue, field, tmp_path, frame):
    """A frame without data takes no light either."""
    clean = catalogue[(catalogue["flags"] == 0) & (catalogue["r_eff_pix"].value < 8)]
    assert len(clean) >= 2
    data = mosaic.read_image(field[0]).data
    seen = 0
    for row in clean:
        x, y = round(row["x"].value), round(row["y"].value)
        if not (30 <= x < 482 and 30 <= y < 482):
            continue
        small = np.pad(data[y - 30 : y + 30, x - 30 : x + 30], frame, constant_values=np.nan)
        header = {k: v for k, v in mosaic.read_image(field[0]).header.items() if k.startswith(("C", "MAG"))}
        table = measure(write(tmp_path / "small.fits", small, fits.Header(header)))
        nearest = np.argmin(np.hypot(table["x"].value - 30 - frame, table["y"].value - 30 - frame))
        assert table["flags"][nearest] & ~(Flag.LOW_SNR | Flag.CROWDED) == 0
        assert table["mag"][nearest].value == pytest.approx(row["mag"].value, abs=0.25)
        seen += 1
    assert seen >= 2


def test_flag_masked_where_light_is_lost(field, tmp_path, isolated):
    """A mask beside the galaxy takes no light of it."""
    y = round(isolated[1])
    for edge, lost in ((y - 40, False), (y - 1, True)):
        mask = np.zeros((512, 512), np.uint8)
        mask[:edge] = 1
        write(tmp_path / "mask.fits", mask)
        found = flags_at(field, *isolated, mask=tmp_path / "mask.fits")
        assert bool(found & Flag.MASKED) == lost
        assert not found & (Flag.EDGE | Flag.NO_DATA)


@pytest.mark.parametrize("radius", [0.5, 1.5, 3, 8])
def test_a_source_without_a_core_has_a_flag(tmp_path, field, radius):
    y, x = np.indices((256, 256))
    header = {k: v for k, v in mosaic.read_image(field[0]).header.items() if k.startswith(("C", "MAG"))}
    for light in (200 * (1 + np.hypot(x - 128, y - 128) ** 2 / 4) ** -2.5, 2 * np.exp(-np.hypot(x - 128, y - 128) / 5)):
        data = np.random.default_rng(1).normal(0, 0.004, x.shape) + light
        data[np.hypot(x - 128, y - 128) <= radius] = np.nan
        table = measure(write(tmp_path / "core.fits", data.astype(np.float32), fits.Header(header)))
        assert len(table) == 1
        assert table["flags"][0] & (Flag.MASKED | Flag.NO_DATA)
        assert (table["x"].value[0], table["y"].value[0]) == pytest.approx((128, 128), abs=1)


def test_flag_low_snr_and_undetected(field, catalogue):
    x = catalogue["x"].value
    y = catalogue["y"].value
    grid = [(a, b) for a in range(70, 440, 10) for b in range(70, 440, 10)]
    empty = max(grid, key=lambda p: np.hypot(x - p[0], y - p[1]).min())
    assert flags_at(field, *empty) & Flag.LOW_SNR


def test_flag_blended(field, tmp_path, isolated):
    x, y = isolated
    found = flags_at(field, x, y, beside(field, x, y), tmp_path)
    assert found & Flag.BLENDED
    assert not found & Flag.CROWDED, "a source that covers a fifth of a stamp is replaced without harm"


def test_flag_crowded_where_neighbours_cover_much_of_the_stamp(field, tmp_path, isolated):
    x, y = isolated
    assert flags_at(field, x, y, beside(field, x, y, 62, 17), tmp_path) & Flag.CROWDED


def test_flag_large(field, tmp_path):
    rows, cols = np.indices((512, 512))
    rng = np.random.default_rng(0)
    data = rng.normal(0, 0.0035, (512, 512)) + 0.5 * np.exp(-np.hypot(rows - 256, cols - 256) / 28)
    assert flags_at(field, 256, 256, data.astype(np.float32), tmp_path) & Flag.LARGE


@pytest.mark.parametrize("name", TARGET_NAMES)
def test_flag_out_of_range(field, isolated, tmp_path, name):
    copy = shutil.copytree(weights.load(weights.DEFAULT).path, tmp_path / "w")
    card = json.loads((copy / "card.json").read_text())
    card["domain"]["ranges"][name][1] = card["domain"]["ranges"][name][0] + 1e-3
    weights.rewrite_card(copy, card)
    flags = flags_at(field, *isolated, weights=copy)
    assert flags & Flag.OUT_OF_RANGE == RANGE_FLAGS[TARGET_NAMES.index(name)]


def test_flag_out_of_range_is_not_set_inside(field, isolated):
    assert not flags_at(field, *isolated) & Flag.OUT_OF_RANGE


@pytest.mark.filterwarnings("ignore:`pixel_scale` should agree with the WCS")
def test_another_pixel_scale_is_refused(field):
    with pytest.raises(InputError, match=r"has 0\.1000 arcsec per pixel, fovea-sky was trained at 0\.06.*`resample`"):
        measure(field[0], pixel_scale=0.1, weights=FIXED)


def test_flag_out_of_domain_by_depth(field, isolated):
    with pytest.warns(SersicnetWarning, match="The noise of the image"):
        assert flags_at(field, *isolated, zero_point=30.0, weights=FIXED) & Flag.OUT_OF_DOMAIN


def test_flag_out_of_domain_by_the_psf_of_a_file(field, tmp_path, isolated):
    wanted = Table({"x": [isolated[0]], "y": [isolated[1]]})
    wide = write(tmp_path / "wide.fits", effective_psf(F160W, stretch=1.4))
    with pytest.warns(
        SersicnetWarning, match=r"full width of 4\.\d\d pixels \(wide.fits\), fovea-sky was trained at 2\.70 to 3\.66"
    ):
        table = measure(field[0], positions=wanted, psf=wide, weights=FIXED)
    assert table["flags"][0] & Flag.OUT_OF_DOMAIN
    assert table.meta["OUTSIDE"] == "PSF"
    assert table.meta["PSFFWHM"] == pytest.approx(4.4, abs=0.1)
    fine = write(tmp_path / "fine.fits", effective_psf(replace(F160W, pixel_scale=0.02)))
    table = measure(field[0], positions=wanted, psf=read_psf(fine, 3), weights=FIXED)
    assert table.meta["OUTSIDE"] == "nothing"
    assert table.meta["PSFFWHM"] == pytest.approx(3.18, abs=0.05)


def test_flag_out_of_domain_by_the_stars_of_the_image(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.normal(0, 0.0035, (512, 512))
    draw = Renderer(effective_psf(F160W, stretch=1.4), 64)
    for row in range(20, 500, 100):
        for column in range(20, 500, 100):
            star = draw(np.array([*rng.uniform(31, 32, 2), 50.0, 0.02, 1.0, 1.0, 0.0]))[0]
            part = slice(row, row + 64), slice(column, column + 64)
            image[part] += star[: image[part].shape[0], : image[part].shape[1]]
    path = write(tmp_path / "stars.fits", image.astype(np.float32), fits.Header({"MAGZERO": 25.9463}))
    wanted = Table({"x": [52.0], "y": [52.0]})
    with pytest.warns(SersicnetWarning) as caught:
        table = measure(path, tmp_path / "cat.fits", pixel_scale=0.06, positions=wanted, weights=FIXED)
    assert len(caught) == 2  # no WCS
    assert "stars), fovea-sky was trained at 2.70 to 3.66" in str(caught[1].message)
    assert table["flags"][0] & Flag.OUT_OF_DOMAIN
    assert table["flags"][0] & Flag.POINT_LIKE
    header = fits.getheader(tmp_path / "cat.fits", 1)
    assert int(header["PSFSRC"].removesuffix(" stars")) >= 15
    assert header["OUTSIDE"] == "PSF"
    assert header["PSFFWHM"] == pytest.approx(4.4, rel=0.03)


def test_flag_point_like_by_the_psf_of_elongated_stars(tmp_path):
    """Stars with an ellipticity above 0.1 make no stellar locus; no star of a simulated SDSS image had the flag."""
    rng = np.random.default_rng(0)
    round_one = effective_psf(F160W, stretch=1.4)
    long = zoom(round_one, (1, 1.2), order=3)
    psf = long[:, long.shape[1] // 2 - len(long) // 2 :][:, : len(long)]
    image = rng.normal(0, 0.0035, (512, 512))
    draw = Renderer(psf, 64)
    for row in range(20, 440, 70):
        for column in range(20, 440, 70):
            star = draw(np.array([*rng.uniform(31, 32, 2), 50.0, 0.02, 1.0, 1.0, 0.0]))[0]
            image[row : row + 64, column : column + 64] += star
    path = write(tmp_path / "stars.fits", image.astype(np.float32), fits.Header({"MAGZERO": 25.9463}))
    with pytest.warns(SersicnetWarning):  # no WCS, and a PSF that is not that of F160W
        table = measure(path, pixel_scale=0.06)
    assert int(table.meta["PSFSRC"].removesuffix(" stars")) >= 30
    assert table.meta["PSFELLIP"] > 0.12
    bright = table["snr"] > 50
    assert bright.sum() == 36
    assert (table["flags"][bright] & Flag.POINT_LIKE > 0).mean() > 0.9


def test_flag_point_like_by_the_psf_of_a_file(field, isolated, tmp_path):
    image, header = fits.getdata(field[0]), fits.getheader(field[0], 1)
    star = Renderer(effective_psf(F160W), 64)(np.array([31.6, 31.7, 60.0, 0.02, 1.0, 1.0, 0.0]))[0]
    place = 300, 60
    image[place[1] - 32 : place[1] + 32, place[0] - 32 : place[0] + 32] = star
    image += np.random.default_rng(0).normal(0, 1e-3, image.shape)
    path, psf = write(tmp_path / "star.fits", image, header), write(tmp_path / "psf.fits", effective_psf(F160W))
    wanted = Table({"x": [place[0] - 0.4, isolated[0]], "y": [place[1] - 0.3, isolated[1]]})
    flags = measure(path, positions=wanted, psf=psf, zero_point=25.9463)["flags"]
    assert flags[0] & Flag.POINT_LIKE
    assert not flags[1] & Flag.POINT_LIKE


def test_a_finely_sampled_psf_has_the_size_of_its_stars():
    """The window that measures sizes spans a few pixels: a PSF of 22 samples must be brought to pixels first."""
    y, x = np.mgrid[-60:61, -60:61] / 4
    sharp, fine = (
        Psf.of(np.exp(-4 * np.log(2) * (x**2 + y**2) * (samples / 4 / fwhm) ** 2), "mine", samples)
        for samples, fwhm in ((4, 3.0), (4, 5.5))
    )
    limits = [largest_stars(psf, None, np.zeros(1), np.zeros(1))[0] for psf in (sharp, fine)]
    assert np.isfinite(limits).all()
    assert limits[1] > 1.4 * limits[0]


def test_flag_saturated(field, isolated, tmp_path):
    image, header = fits.getdata(field[0]), fits.getheader(field[0], 1)
    wanted = Table({"x": [isolated[0]], "y": [isolated[1]]})
    options = {"positions": wanted, "zero_point": 25.9463}
    peak = image[round(isolated[1]) - 3 : round(isolated[1]) + 4, round(isolated[0]) - 3 : round(isolated[0]) + 4].max()
    clipped = write(tmp_path / "clipped.fits", np.minimum(image, 0.6 * peak), header)
    assert measure(clipped, **options)["flags"][0] & Flag.SATURATED
    told = write(tmp_path / "told.fits", image, fits.Header([*header.cards, ("SATURATE", 0.9 * float(peak))]))
    assert measure(told, **options)["flags"][0] & Flag.SATURATED
    level = fits.Header([*header.cards, ("SATURATE", 100 + 0.9 * float(peak))])
    on_a_sky = write(tmp_path / "on_a_sky.fits", image + np.float32(100), level)
    assert measure(on_a_sky, **options)["flags"][0] & Flag.SATURATED
    assert not measure(write(tmp_path / "as_it_is.fits", image, header), **options)["flags"][0] & Flag.SATURATED


@pytest.mark.parametrize("factor", [2, 3, 6])
@pytest.mark.parametrize("order", [0, 1, 3])
def test_an_interpolated_peak_is_not_saturated(factor, order):
    """It is flat, but so are its flanks; a peak that was cut off before is flatter."""
    y, x = np.indices((43, 43)) - 21.0
    star = 1000 * (1 + np.hypot(x - 0.1, y + 0.2) ** 2 / 4) ** -2.5
    for values, expected in ((star, False), (np.minimum(star, 250), True)):
        fine = zoom(values, factor, order=order, grid_mode=True, mode="grid-constant")
        middle = (fine.shape[0] - 1) / 2
        data = (fine + np.random.default_rng(0).normal(0, 1e-3, fine.shape)).astype(np.float32)
        sky = Sky(np.zeros_like(data), np.ones_like(data), np.ones((1, 1)), np.nan)
        stamps = cut(data, np.zeros(data.shape, bool), sky, np.array([middle]), np.array([middle]))
        assert bool(saturated(stamps)[0]) == (expected and order < 3)  # splines overshoot a plateau


@pytest.mark.parametrize("scale", [0.2, 0.396])
def test_a_resampled_peak_is_not_saturated(tmp_path, scale):
    y, x = np.indices((60, 60))
    star = 1000 * (1 + np.hypot(x - 30.1, y - 29.8) ** 2 / 4) ** -2.5 + np.random.default_rng(0).normal(0, 1, x.shape)
    for values, expected in ((star, False), (np.minimum(star, 250), True)):
        path = write(tmp_path / "ground.fits", values.astype(np.float32))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SersicnetWarning)
            table = measure(path, resample=True, pixel_scale=scale, zero_point=25.0, weights=FIXED)
        brightest = np.nanargmin(table["mag_auto"].value)
        assert bool(table["flags"][brightest] & Flag.SATURATED) == expected


def test_coarse_steps_are_no_saturation():
    y, x = np.indices((200, 200))
    data = np.random.default_rng(0).normal(0, 1, x.shape) + 15 * np.exp(-(np.hypot(x - 100, y - 100) ** 2) / 300)
    data = np.round(data).astype(np.float32)
    sky = Sky(np.zeros_like(data), np.ones_like(data), np.ones((1, 1)), np.nan)
    stamps = cut(data, np.zeros(data.shape, bool), sky, np.array([100.0]), np.array([100.0]))
    assert not saturated(stamps)[0]


def test_an_image_without_point_sources_shows_no_psf(field, catalogue):
    fixed = measure(field[0], weights=FIXED)
    assert fixed.meta["PSFSRC"] == "too few stars"
    assert fixed.meta["OUTSIDE"] == "nothing"
    assert "PSFFWHM" not in fixed.meta
    assert catalogue.meta["PSFSRC"] == "the usual PSF of WFC3 F160W"
    assert not (catalogue["flags"] & Flag.PSF_ASSUMED).any()


# --- refining -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def psf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("psf") / "psf.fits"
    fits.PrimaryHDU(effective_psf(F160W)).writeto(path)
    return path


@pytest.fixture(scope="module")
def refined(field, psf_file):
    return measure(field[0], refine=True, psf=psf_file, gain=F160W.exposure)


def test_a_fit_is_right_within_its_errors(refined, field):
    truth = field[1]
    rows, found = matched(refined, truth)
    clean = (refined["flags"][found] & ~Flag.BLENDED) == 0
    rows, found = rows[clean], found[clean]
    assert len(rows) >= 5
    pulls = [
        (getattr(refined[name], "value", refined[name])[found] - truth[name][rows])
        / getattr(refined[f"{name}_err"], "value", refined[f"{name}_err"])[found]
        for name in ("mag", "r_eff_pix", "sersic_n", "ellipticity")
    ]
    assert np.median(np.abs(pulls)) < 1.5
    assert np.abs(refined["mag"].value[found] - truth["mag"][rows]).max() < 0.1
    assert np.median(refined["chi2"][found]) == pytest.approx(1, abs=0.1)


def test_fits_say_where_their_psf_is_from(refined, field):
    assert refined.meta["PSF"].endswith("psf.fits")
    with pytest.warns(SersicnetWarning, match="No `psf` was given"):
        again = measure(field[0], refine=True, gain=3200.0, weights=FIXED)
    assert "of the weights: HST WFC3/IR F160W" in again.meta["PSF"]


def test_sources_that_are_not_fitted_keep_the_values_of_the_network(field, psf_file, monkeypatch):
    monkeypatch.setattr(fitting, "Fitter", functools.partial(Fitter, max_iterations=1))
    refined = measure(field[0], refine=True, psf=psf_file, gain=F160W.exposure)
    catalogue = measure(field[0], psf=psf_file, gain=F160W.exposure)
    left = (refined["flags"] & Flag.NOT_REFINED) != 0
    assert left.sum() > 5
    assert np.isnan(refined["chi2"][left]).all()
    for name in ("mag", "r_eff", "sersic_n", "ellipticity"):
        np.testing.assert_array_equal(refined[name][left], catalogue[name][left])


def test_flag_not_refined(field, isolated, monkeypatch):
    monkeypatch.setattr(fitting, "Fitter", functools.partial(Fitter, max_iterations=1))
    with pytest.warns(SersicnetWarning, match="No `psf`"):
        assert flags_at(field, *isolated, refine=True, gain=3200.0, weights=FIXED) & Flag.NOT_REFINED


@pytest.mark.parametrize("psf", [np.ones((20, 20)), np.full((21, 21), np.nan), np.ones((21, 23)), -np.ones((21, 21))])
def test_bad_psfs_are_refused(field, tmp_path, psf):
    with pytest.raises(InputError, match=r"PSF|no finite pixel"):
        measure(field[0], refine=True, psf=write(tmp_path / "psf.fits", psf))


@pytest.mark.parametrize("gain", [0.0, -1.0, np.inf, np.nan])
def test_bad_gains_are_refused(field, gain):
    with pytest.raises(InputError, match="A gain is a positive number"):
        measure(field[0], refine=True, gain=gain)


def test_model_and_residual_images_add_up(field, tmp_path, psf_file):
    path, model, residual = (tmp_path / name for name in ("cat.fits", "model.fits", "residual.fits"))
    cat = measure(field[0], path, refine=True, psf=psf_file, gain=F160W.exposure, model=model, residual=residual)
    frame = mosaic.read_image(field[0])
    drawn, left = fits.getdata(model), fits.getdata(residual)
    assert drawn.shape == left.shape == frame.data.shape
    good = (cat["fit_status"] == 0) & (cat["snr"] >= 5)  # noise peaks may be fitted by something flatter
    assert good.sum() >= 14
    for x, y in zip(cat["x"].value[good].round().astype(int), cat["y"].value[good].round().astype(int), strict=True):
        if 3 < x < 508 and 3 < y < 508:
            assert drawn[y, x] > 2 * cat.meta["SKYRMS"]
    assert left.std() < 0.2 * frame.data.std()
    sky = frame.data - drawn - left
    assert np.abs(sky).max() < cat.meta["SKYRMS"]
    assert fits.getheader(model)["CRVAL1"] == frame.header["CRVAL1"]


def test_images_of_the_model_need_fits_and_names_of_their_own(field, tmp_path, psf_file):
    with pytest.raises(InputError, match="`model` belongs to fits"):
        measure(field[0], model=tmp_path / "m.fits")
    with pytest.raises(InputError, match="name of its own"):
        measure(field[0], refine=True, psf=psf_file, model=tmp_path / "m.fits", residual=tmp_path / "m.fits")
    with pytest.raises(InputError, match=r"ends in \.fits"):
        measure(field[0], refine=True, psf=psf_file, model=tmp_path / "m.png")


def test_a_table_of_galaxies_is_a_prior_and_others_are_refused(field, isolated, tmp_path, psf_file):
    rng = np.random.default_rng(0)
    n = 200
    table = Table({"mag": rng.uniform(18, 24, n), "r_eff": rng.lognormal(-1, 0.3, n)})
    table["sersic_n"], table["q"] = rng.lognormal(0.5, 0.4, n), rng.uniform(0.3, 1, n)
    table.write(tmp_path / "prior.csv")
    place = Table({"x": [isolated[0]], "y": [isolated[1]]})
    cat = measure(field[0], positions=place, refine=True, psf=psf_file, gain=3200.0, prior=tmp_path / "prior.csv")
    assert cat["fit_status"][0] == 0
    table.remove_column("q")
    table.write(tmp_path / "less.csv")
    with pytest.raises(InputError, match="needs a column ellipticity or q"):
        measure(field[0], refine=True, psf=psf_file, gain=3200.0, prior=tmp_path / "less.csv")
    flat = write(tmp_path / "flat.fits", fits.getdata(field[0]), fits.Header({"MAGZERO": 25.0}))
    with (
        pytest.warns(SersicnetWarning, match="no celestial WCS"),
        pytest.raises(InputError, match="no pixel scale, which the prior"),
    ):
        measure(flat, refine=True, psf=psf_file, gain=3200.0)


def test_the_prior_of_radii_follows_the_pixel_scale():
    radii = []
    for scale in (0.06, 0.03):
        exposure = Exposure.of_arrays(np.zeros((20, 20)), zero_point=25.9463, pixel_scale=scale)
        prior = fitting.Fitting(gain=1.0).of_image(exposure, Psf.of(effective_psf(F160W), "psf"), None).assumed
        radii.append(float(prior.scales[1].from_free(prior.mean[1])))
    assert radii[0] == pytest.approx(5, rel=0.15)
    assert radii[1] == pytest.approx(2 * radii[0], rel=0.03)


def test_errors_of_fits_include_what_the_psf_adds():
    names = ("targets", "errors", "flux", "flux_err", "x", "y", "theta", "theta_err", "sky", "chi2", "status", "flags")
    shapes = [(2, 4), (2, 4), *[(2,)] * 10]
    values = types.SimpleNamespace(**{name: np.zeros(shape) for name, shape in zip(names, shapes, strict=True)})
    values.flags, values.correlations, values.position = values.flags.astype(int), np.zeros((2, 6)), np.zeros((2, 3))
    found = np.array([[5.0, 5, 100, 4, 2, 0.5, 30]] * 2)
    covariance = np.broadcast_to(np.diag([0.01, 0.01, 1, 0.01, 0.04, 1e-4, 1, 1]), (2, 8, 8))
    fits = Fits(found, np.zeros(2), covariance, np.ones(2), np.ones(2, int), np.zeros(2, int))
    of_psf = np.zeros((2, 2, 4))  # of its width, and of its light
    of_psf[1, 0] = 0.1, 0.3, -0.4, 0.02
    of_psf[1, 1] = 0.04, -0.1, 0.2, 0.01
    tiles._take(values, np.arange(2), fits, np.zeros((2, 7)), 25.0, of_psf, keep=True)
    np.testing.assert_allclose(values.errors[0], [0.01086, 0.1, 0.2, 0.01], rtol=1e-3)
    np.testing.assert_allclose(values.errors[1], np.sqrt(values.errors[0] ** 2 + (of_psf[1] ** 2).sum(axis=0)))
    np.testing.assert_allclose(values.position, [[0.01, 0.01, 0]] * 2)
    np.testing.assert_allclose(values.correlations[0], 0, atol=1e-12)
    radius_and_index = (0.3 * -0.4 + -0.1 * 0.2) / np.prod(values.errors[1, 1:3])
    assert values.correlations[1, 3] == pytest.approx(radius_and_index)


def test_a_prior_of_a_table_is_in_arcsec_and_magnitudes(tmp_path):
    rng, n = np.random.default_rng(0), 300
    table = Table({"mag": rng.uniform(14, 20, n), "r_eff": rng.lognormal(-1.2, 0.6, n)})
    table["r_eff_pix"], table["sersic_n"] = table["r_eff"] / 0.06, rng.lognormal(0.3, 0.3, n)
    table["q"] = rng.uniform(0.3, 1, n)
    table.write(tmp_path / "of_hst.csv")
    options = fitting.Fitting(gain=1.0, prior=tmp_path / "of_hst.csv")
    for scale, zero in ((0.02, 28.0), (0.06, 25.9), (0.4, 22.5)):
        exposure = Exposure.of_arrays(np.zeros((20, 20)), zero_point=zero, pixel_scale=scale)
        prior = options.of_image(exposure, Psf.of(effective_psf(F160W), "psf"), None).assumed
        assert float(prior.scales[1].from_free(prior.mean[1])) * scale == pytest.approx(np.exp(-1.2), rel=0.08)
        assert zero - 2.5 * np.log10(np.exp(prior.mean[0])) == pytest.approx(17, abs=0.3)


# --- fits alone -----------------------------------------------------------------------------


def fit_quietly(*args, **options):
    return flat(module.fit, *args, **{"gain": F160W.exposure, **options})


def test_fits_without_a_network_are_right_and_start_from_moments(field, psf_file, tmp_path):
    cat = fit_quietly(field[0], tmp_path / "cat.csv", psf=psf_file)
    rows, found = matched(cat, field[1])
    clean = (cat["flags"][found] & ~Flag.BLENDED) == 0
    rows, found = rows[clean], found[clean]
    assert len(rows) >= 5
    assert np.abs(cat["mag"].value[found] - field[1]["mag"][rows]).max() < 0.1
    assert np.abs(cat["r_eff_pix"].value[found] / field[1]["r_eff_pix"][rows] - 1).max() < 0.1
    assert "WEIGHTS" not in cat.meta
    assert cat.meta["PRIOR"] == "none"


def test_fits_start_from_a_table_where_nothing_is_detected(field, isolated, psf_file, monkeypatch):
    monkeypatch.setattr(Threshold, "regions", lambda self, smooth, *args: Regions(smooth.shape, *np.zeros((2, 0), int)))
    table = Table({"x": [isolated[0]], "y": [isolated[1]], "mag": [19.0], "r_eff_pix": [6.0], "theta": [10.0]})
    cat = fit_quietly(field[0], psf=psf_file, positions=table)
    assert cat["fit_status"][0] == 0


@pytest.mark.parametrize("unknown", [99.0, -99.0, 35.0])
def test_a_start_that_is_no_magnitude_is_unknown(field, isolated, psf_file, unknown):
    x, y = isolated
    table = Table({"x": [x, x, 2.0], "y": [y, y, 510.0], "mag": [unknown, 20.0, unknown], "r_eff_pix": [np.nan, 5, 3]})
    cat = fit_quietly(field[0], psf=psf_file, positions=table)
    assert cat["fit_status"][0] == 0
    assert cat["mag"].value[0] == pytest.approx(cat["mag"].value[1], abs=0.01)
    assert cat["fit_status"][2] != 0
    assert cat["flags"][2] & Flag.NOT_REFINED


def test_a_fit_without_errors_has_not_converged(field, isolated, psf_file, monkeypatch):
    monkeypatch.setattr(np.linalg, "cond", lambda _: np.inf)
    cat = fit_quietly(field[0], psf=psf_file, positions=Table({"x": [isolated[0]], "y": [isolated[1]]}))
    assert np.isnan(cat["mag_err"].value[0])
    assert cat["fit_status"][0] == 1
    assert cat["flags"][0] & Flag.NOT_REFINED


def test_a_place_without_a_source_has_nan_and_a_flag(field, psf_file):
    blank = Table({"x": [-300.0, 100.0], "y": [10.0, 100.0]})
    cat = fit_quietly(field[0], psf=psf_file, positions=blank)
    assert np.isnan(cat["mag"][0])
    assert cat["flags"][0] & Flag.NOT_REFINED
    assert cat["fit_status"][0] > 0


def test_overlapping_galaxies_are_fitted_together(tmp_path, psf_file):
    render = Renderer(effective_psf(F160W), 256)
    flux = 10 ** (-0.4 * (20.0 - F160W.zero_point))
    pair = np.array([[120.0, 128, flux, 5, 1.5, 0.7, 20], [136.0, 133, 0.7 * flux, 4, 2.5, 0.8, -50]])
    image = observe(render(pair).sum(axis=0), 0.003, F160W, np.random.default_rng(0))
    path = write(tmp_path / "pair.fits", image, fits.Header({"MAGZERO": F160W.zero_point}))
    with pytest.warns(SersicnetWarning, match="no celestial WCS"):
        cat = fit_quietly(path, psf=psf_file)
    order = np.abs(cat["x"].value - pair[:, :1]).argmin(axis=1)
    np.testing.assert_allclose(cat["r_eff_pix"].value[order], pair[:, 3], rtol=0.03)
    np.testing.assert_allclose(cat["sersic_n"][order], pair[:, 4], rtol=0.08)
    np.testing.assert_allclose(cat["mag"].value[order], [20.0, 20.387], atol=0.03)


def test_fits_without_a_gain_warn(field, isolated, psf_file):
    with pytest.warns(SersicnetWarning, match="No `gain`"):
        cat = flat(module.fit, field[0], psf=psf_file, positions=Table({"x": [isolated[0]], "y": [isolated[1]]}))
    assert "GAIN" not in cat.meta


# --- maps and bad input ---------------------------------------------------------------------


def test_maps_of_noise_weight_and_variance_agree(catalogue, field, tmp_path):
    rms = write(tmp_path / "rms.fits", np.full((512, 512), 0.01, np.float32))
    wht = write(tmp_path / "wht.fits", np.full((512, 512), 1e4, np.float32))
    var = write(tmp_path / "var.fits", np.full((512, 512), 1e-4, np.float32))
    one, two, three = (
        measure(field[0], noise=path, noise_kind=kind) for path, kind in ((rms, "rms"), (wht, "wht"), (var, "var"))
    )
    np.testing.assert_array_equal(one["mag"], two["mag"])
    np.testing.assert_array_equal(one["mag"], three["mag"])
    np.testing.assert_allclose(one["mag"].value[:5], catalogue["mag"].value[:5], atol=0.1)
    assert one.meta["MAPFACT"] == pytest.approx(0.35, rel=0.05)


def test_pixels_without_weight_have_no_data(field, tmp_path, isolated):
    wht = np.ones((512, 512), np.float32)
    x, y = (round(v) for v in isolated)
    wht[y - 5 : y + 6, x - 5 : x + 6] = 0
    with pytest.warns(SersicnetWarning, match=r"wht.fits\[0\] was multiplied by 0.00"):
        assert flags_at(field, *isolated, noise=write(tmp_path / "wht.fits", wht), noise_kind="wht") & Flag.NO_DATA


@pytest.mark.parametrize("run", [measure, functools.partial(flat, module.fit, gain=F160W.exposure)])
def test_a_map_far_from_the_scatter_of_the_sky_is_told_once(field, isolated, psf_file, tmp_path, run):
    times = write(tmp_path / "times.fits", np.full((512, 512), 3200.0, np.float32))
    place = Table({"x": [isolated[0]], "y": [isolated[1]]})
    with pytest.warns(SersicnetWarning) as caught:
        table = run(field[0], positions=place, psf=psf_file, noise=times, noise_kind="wht")
    assert len(caught) == 1
    factor, correlation = table.meta["MAPFACT"], table.meta["NOISECOR"]
    assert factor == pytest.approx(0.0035 * np.sqrt(3200), rel=0.05)
    for part in (f"multiplied by {factor:.3g}", "Is it the wht", f"is {correlation:.2f}.", "only its relative"):
        assert part in str(caught[0].message)


def test_a_variance_is_found_by_its_name(field, tmp_path):
    image, noise = mosaic.read_image(field[0]), np.full((512, 512), 1e-5, np.float32)
    planes = [fits.ImageHDU(image.data, image.header), fits.ImageHDU(noise, name="VARIANCE")]
    fits.HDUList([fits.PrimaryHDU(), *planes]).writeto(tmp_path / "rubin.fits")
    table = measure(tmp_path / "rubin.fits", noise=tmp_path / "rubin.fits", noise_kind="var")
    assert table.meta["MAPFACT"] == pytest.approx(0.0035 / np.sqrt(1e-5), rel=0.05)


@pytest.mark.parametrize("kind", ["rms", "wht", "mask"])
def test_an_image_is_not_its_own_map(field, tmp_path, kind):
    image = mosaic.read_image(field[0])
    planes = [fits.ImageHDU(image.data, image.header), fits.ImageHDU(np.abs(image.data), name="VAR_POISSON")]
    fits.HDUList([fits.PrimaryHDU(), *planes]).writeto(tmp_path / "jwst.fits")
    options = {"noise": tmp_path / "jwst.fits", "noise_kind": kind}
    if kind == "mask":
        options = {"mask": tmp_path / "jwst.fits"}
    with pytest.raises(InputError, match=r"jwst.fits holds no extension that is named .*; it has 0 PRIMARY"):
        measure(tmp_path / "jwst.fits", **options)


def test_a_name_that_is_not_ascii_reaches_the_header_escaped(field, tmp_path):
    image = shutil.copy(field[0], tmp_path / "galaxias_\u00f1.fits")
    measure(image, tmp_path / "cat.fits", command="sersicnet measure \u00f1")
    assert "galaxias_\\xf1" in fits.getheader(tmp_path / "cat.fits", 1)["IMAGE"]


def test_bad_maps_are_refused(field, tmp_path):
    zero = write(tmp_path / "zero.fits", np.zeros((512, 512), np.float32))
    small = write(tmp_path / "small.fits", np.ones((100, 512), np.float32))
    with pytest.raises(InputError, match="no pixel left that is finite, exposed, not masked and has a positive noise"):
        measure(field[0], noise=zero)
    with pytest.raises(InputError, match="must agree"):
        measure(field[0], noise=small, noise_kind="wht")
    with pytest.raises(InputError, match="A noise map holds one of rms, wht, var; received ivar"):
        measure(field[0], noise=zero, noise_kind="ivar")
    with pytest.raises(InputError, match="no pixel left"):
        measure(field[0], mask=write(tmp_path / "mask.fits", np.ones((512, 512), np.uint8)))


def test_outputs_that_cannot_be_written(field, tmp_path):
    existing = tmp_path / "cat.fits"
    existing.write_text("mine")
    for output, message in (
        (existing, "exists already"),
        (tmp_path, "is a directory"),
        (tmp_path / "cat.dat", "A catalogue ends in"),
        (tmp_path / "no" / "cat.fits", "does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            measure(field[0], output)
    assert existing.read_text() == "mine"


def test_overwriting_is_possible_when_asked(field, tmp_path):
    path = tmp_path / "cat.fits"
    path.write_text("old")
    measure(field[0], path, overwrite=True)
    assert len(QTable.read(path)) > 0


def test_descriptions_say_where_pixels_begin():
    assert "0 = centre of first" in COLUMN["x"].description


def sorted_columns(table):
    return {name: np.asarray(getattr(table[name], "value", table[name])) for name in table.colnames}


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """A mosaic with a slope in its sky, a hole and a bright galaxy that is larger than a small tile's margin."""
    folder = tmp_path_factory.mktemp("crowded")
    image, _ = simulate_field(folder / "field.fits", Field(700, n=40, seed=3, mag=(18.0, 24.0)))
    data, header = fits.getdata(image), fits.getheader(image, 1)
    y, x = np.indices(data.shape)
    data += 2e-5 * x + np.exp(-np.hypot(x - 300, (y - 350) * 2) / 25)
    data[100:130, 500:640] = np.nan
    return write(folder / "crowded.fits", data.astype(np.float32), header)


@pytest.mark.parametrize("refine", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_catalogue_does_not_depend_on_the_tiles(crowded, tiny_weights, refine):
    options = {"weights": tiny_weights, "refine": refine}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SersicnetWarning)
        whole = measure(crowded, tile=2048, **options)
        for tile in (256, 211):
            tiled = measure(crowded, tile=tile, workers=1, **options)
            for name, values in sorted_columns(whole).items():
                np.testing.assert_array_equal(sorted_columns(tiled)[name], values, err_msg=name)
    assert len(whole) > 25


@pytest.mark.slow
def test_processes_fit_like_one(crowded, tiny_weights):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SersicnetWarning)
        one, two = (measure(crowded, weights=tiny_weights, refine=True, tile=384, workers=n) for n in (1, 2))
    for name in one.colnames:
        np.testing.assert_array_equal(np.asarray(two[name]), np.asarray(one[name]), err_msg=name)


class KilledError(Exception):
    pass


def test_a_killed_run_continues_with_the_tiles_that_are_missing(crowded, tiny_weights, tmp_path, monkeypatch):
    def kill(stage, done, total):
        if stage.startswith("measuring tiles") and done == 3:
            raise KilledError

    run = functools.partial(measure, crowded, tmp_path / "cat.fits", weights=tiny_weights, tile=256)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SersicnetWarning)
        with pytest.raises(KilledError):
            run(workers=1, report=kill)
        assert not (tmp_path / "cat.fits").exists()
        with pytest.raises(InputError, match="unfinished run with other options"):
            run(zero_point=20.0)
        worked = []
        tile = tiles.measure_tile
        monkeypatch.setattr(
            tiles, "measure_tile", lambda *args, **named: worked.append(args[1]) or tile(*args, **named)
        )
        run(workers=1)
        monkeypatch.undo()
        assert len(worked) == 9 - 3
        measure(crowded, tmp_path / "whole.fits", weights=tiny_weights, tile=256, workers=2)
    files = [fits.open(tmp_path / name) for name in ("cat.fits", "whole.fits")]
    assert files[0][1].data.tobytes() == files[1][1].data.tobytes()
    for file in files:
        file.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat.fits", "whole.fits"]


def test_an_unfinished_run_of_another_version_is_another_run(field, tmp_path, monkeypatch):
    """Its tiles lack what is measured now, and versions in development have the same number."""
    made = module.plan(field[0], work=Work(run=tmp_path / "run"))
    with monkeypatch.context() as before:
        before.setattr(scene.Values, "_fields", tuple(set(scene.Values._fields) - {"position"}))
        with made._kept() as kept:
            kept.keep_arrays("mesh", {"level": np.zeros(2)})
    with pytest.raises(InputError, match=r"run of another version .* \(values of a source\), which"), made._kept():
        pass


def test_an_unfinished_run_with_other_fits_or_another_psf_is_another_run(field, tmp_path):
    """There are no fitters until the PSF is found, so the options themselves must identify the run."""
    begun = functools.partial(module.plan, field[0], work=Work(run=tmp_path / "run"), gain=3.0)
    with begun(refine=fitting.Fitting(gain=3.0))._kept() as kept:
        kept.keep_arrays("mesh", {"level": np.zeros(2)})
    for refine in (None, fitting.Fitting(gain=3.0, prior="none"), fitting.Fitting(gain=3.0, robust=True)):
        with pytest.raises(InputError, match="run with other options"), begun(refine=refine)._kept():
            pass
    with begun(refine=fitting.Fitting(gain=3.0))._kept():
        pass
    stars = np.exp(-(np.hypot(*np.mgrid[-20:21, -20:21]) ** 2) / 20)
    psfs = [Psf.of(stars, "mine", samples) for samples in (1, 2)]
    known = [module.plan(field[0], psf=psf).options()["psf given"] for psf in (*psfs, replace(psfs[0], error=0.1))]
    assert len({json.dumps(one) for one in known}) == 3


# --- several images -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pieces(field, tmp_path_factory):
    """Two halves of the field, each an image of its own."""
    folder = tmp_path_factory.mktemp("pieces")
    data, header = fits.getdata(field[0]), fits.getheader(field[0], 1)
    lower, upper = header.copy(), header.copy()
    upper["CRPIX2"] -= 256
    upper["MAGZERO"] += 1
    return [write(folder / "lower.fits", data[:256], lower), write(folder / "upper.fits", data[256:], upper)]


def test_many_images_in_one_catalogue(pieces, tmp_path):
    [(joined, path)] = module.measure_many(pieces, tmp_path / "all.fits")
    alone = [measure(piece) for piece in pieces]
    assert len(joined) == sum(len(part) for part in alone)
    assert list(joined["id"]) == list(range(1, len(joined) + 1))
    np.testing.assert_array_equal(joined["mag"].value, np.concatenate([part["mag"].value for part in alone]))
    second = joined[len(alone[0]) :]
    np.testing.assert_array_equal(second["parent"], alone[1]["parent"] + len(alone[0]))
    assert set(second["image"]) == {alone[1].meta["IMAGE"]}
    read = QTable.read(path)
    assert str(read["image"][-1]) == alone[1].meta["IMAGE"]
    header = fits.getheader(path, 1)
    assert "ZEROPT" not in header
    assert "ZEROPT 26.9463" in "".join(header["HISTORY"])
    assert [item.name for item in tmp_path.iterdir()] == ["all.fits"]


def test_the_column_of_the_image_alone_is_not_all_columns(pieces, tmp_path):
    [(joined, _)] = module.measure_many(pieces, tmp_path / "all.fits", columns="image")
    assert joined.colnames == ["image", "id"]
    with pytest.raises(InputError, match="lists image, which needs one catalogue of several images"):
        module.measure_many(pieces, tmp_path, columns="image", overwrite=True)


def test_many_images_in_a_catalogue_each(pieces, tmp_path):
    written = module.measure_many(pieces, tmp_path)
    assert [path.name for _, path in written] == ["lower_cat.fits", "upper_cat.fits"]
    assert len(QTable.read(tmp_path / "upper_cat.fits")) == len(written[1][0])
    (tmp_path / "upper_cat.fits").unlink()
    with pytest.raises(InputError, match=r"holds 1 of the 2 catalogues already, such as lower_cat.fits. Give the"):
        module.measure_many(pieces, tmp_path)
    assert not (tmp_path / "upper_cat.fits").exists()


def test_a_bad_image_among_many_costs_no_finished_work(pieces, tmp_path, monkeypatch):
    bad = tmp_path / "bad.fits"
    bad.write_text("no image")
    with pytest.raises(InputError, match=r"1 of 3 images could not be measured: .*bad.fits.* are kept in"):
        module.measure_many([pieces[0], bad, pieces[1]], tmp_path / "all.fits")
    assert not (tmp_path / "all.fits").exists()
    monkeypatch.setattr(tiles, "measure_tile", lambda *args, **named: pytest.fail("measured again"))
    [(joined, _)] = module.measure_many(pieces, tmp_path / "all.fits")
    assert len(joined) > 10


def test_a_list_without_a_good_image_leaves_nothing(tmp_path):
    bad = [tmp_path / "a.fits", tmp_path / "b.fits"]
    for path in bad:
        path.write_text("no image")
    with pytest.raises(InputError, match="2 of 2 images could not be measured") as error:
        module.measure_many(bad, tmp_path / "all.fits")
    assert "kept" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == bad


def test_images_of_one_name_are_refused(pieces, tmp_path):
    with pytest.raises(InputError, match="needs a name of its own"):
        module.measure_many([pieces[0], pieces[0]], tmp_path)


def test_what_is_foreseen_is_what_happens(field, catalogue):
    outlook = flat(module.plan, field[0], tile=256).outlook()
    assert outlook.zero_point.value == catalogue.meta["ZEROPT"]
    assert outlook.pixel_scale.value == pytest.approx(0.06)
    assert (outlook.shape, outlook.tiles) == ((512, 512), 4)
    assert 0.2 < outlook.memory < 3
    assert outlook.factor == 1
    with pytest.warns(SersicnetWarning, match=r"0\.03 arcsec, as given, is used, and the WCS states 0\.06"):
        finer = flat(module.plan, field[0], pixel_scale=0.03, resample=True, weights=FIXED).outlook()
    assert finer.factor == pytest.approx(0.5)
    assert finer.pixel_scale == (0.03, "the user (the WCS states 0.06)")


def test_an_interrupted_run_says_what_it_keeps(crowded, tiny_weights, tmp_path):
    def interrupt(stage, done, total):
        if stage.startswith("measuring tiles") and done == 2:
            raise KeyboardInterrupt

    with pytest.warns(SersicnetWarning, match="same command continues"), pytest.raises(KeyboardInterrupt):
        measure(crowded, tmp_path / "cat.fits", weights=tiny_weights, tile=256, workers=1, report=interrupt)
    assert len(list((tmp_path / "cat.fits.run").glob("tile-*.npz"))) == 2


def test_models_do_not_depend_on_the_tiles(field, psf_file, tmp_path):
    bright = field[1][np.argsort(field[1]["mag"])[:4]]
    for tile in (200, 2048):
        products = {name: tmp_path / f"{name}{tile}.fits" for name in ("model", "residual")}
        fit_quietly(field[0], psf=psf_file, positions=bright, tile=tile, workers=1, **products)
    for name in products:
        tiled, whole = (fits.getdata(tmp_path / f"{name}{tile}.fits") for tile in (200, 2048))
        np.testing.assert_allclose(tiled, whole, atol=1e-6)


def test_a_side_product_that_fails_does_not_cost_the_catalogue(field, psf_file, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OutputError("model.fits could not be written: no space left on device.")

    monkeypatch.setattr(outputs.tables, "writing_image", full)
    with pytest.raises(OutputError, match=r"no space left.*cat.fits is written"):
        fit_quietly(field[0], tmp_path / "cat.fits", psf=psf_file, model=tmp_path / "model.fits")
    assert len(QTable.read(tmp_path / "cat.fits")) > 10


# --- another pixel scale --------------------------------------------------------------------


@pytest.fixture(scope="module")
def finer(tmp_path_factory):
    """A mosaic of pixels of 0.04 arcsec, and its truth."""
    path = tmp_path_factory.mktemp("finer") / "finer.fits"
    fine = replace(F160W, pixel_scale=0.04, rms_low=0.0015, rms_high=0.0015)
    sky = Field(600, n=12, seed=11, mag=(18.0, 21.5), instrument=fine)
    image, truth = simulate_field(path, sky)
    return image, Table.read(truth)


def test_a_resampled_image_is_measured_in_its_own_pixels(finer, tmp_path):
    table = measure(finer[0], tmp_path / "cat.fits", resample=True, page=tmp_path / "page.html", weights=FIXED)
    rows, found = matched(table, finer[1])
    good = (table["flags"][found] & ~(Flag.OUT_OF_DOMAIN | Flag.CROWDED)) == 0
    rows, found = rows[good], found[good]
    assert len(rows) >= 4
    assert np.abs(np.median(table["mag"].value[found] - finer[1]["mag"][rows])) < 0.06
    assert np.abs(np.median(table["r_eff_pix"].value[found] / finer[1]["r_eff_pix"][rows] - 1)) < 0.1
    np.testing.assert_allclose(table["r_eff"].value, 0.04 * table["r_eff_pix"].value, rtol=1e-4)
    image = mosaic.read_image(finer[0])
    np.testing.assert_allclose(image.sky(table["x"].value, table["y"].value)[0], table["ra"].value, atol=1e-9)
    assert table.meta["RESAMPLE"] == pytest.approx(2 / 3, rel=1e-4)
    assert (tmp_path / "page.html").exists()


def test_resampling_needs_a_scale_and_no_fit(finer, blank):
    with pytest.raises(InputError, match="give `resample` without `refine`; or fit by `sersicnet fit`"):
        measure(finer[0], resample=True, refine=True, weights=FIXED)
    with (
        pytest.warns(SersicnetWarning, match="no celestial WCS"),
        pytest.raises(InputError, match="give `pixel_scale`"),
    ):
        measure(blank(), resample=True, weights=FIXED)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """An image whose PSF widens along x, with a galaxy in each of six cells: the PSF, the file and the galaxies."""
    narrow, wide = effective_psf(F160W, 61), effective_psf(F160W, 61, stretch=1.8)
    components = np.array([narrow, wide - narrow])
    psf = Psf.varying(components, Polynomial((0.0, 0.0), (1500.0, 1500.0), ((0, 0), (1, 0))), "uneven.psf")
    psf = psf.on(mosaic.HeldImage(np.zeros((600, 1500), np.float32)))
    places = [(x, y) for y in (140.3, 560.2) for x in (150.2, 700.4, 1340.7)]
    image = np.random.default_rng(3).normal(0, 1, (600, 1500)).astype(np.float32)
    for x, y in places:
        _, (here,) = psf.cells([x], [y])
        row, column = round(y) - 64, round(x) - 64
        drawn = Renderer(here.image, 128)(np.array([[x - column, y - row, 2e4, 4.0, 1.5, 0.7, 30.0]]))[0]
        part = image[row : row + 128, column : column + 128]
        part += drawn[: part.shape[0]]
    cards = {"MAGZERO": 25.0, "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CDELT1": -0.06 / 3600, "CDELT2": 0.06 / 3600}
    path = write(tmp_path_factory.mktemp("uneven") / "image.fits", image, fits.Header(cards))
    return psf, path, Table(np.array(places), names=("x", "y"))


def fitted_with(psf, uneven, catalogue=None, **options):
    _, path, places = uneven
    return flat(module.fit, path, catalogue, psf=psf, positions=places, gain=1e6, model_error=0.0, **options)


def test_fits_take_the_psf_of_the_place(uneven):
    table = fitted_with(uneven[0], uneven)
    np.testing.assert_allclose(table["r_eff_pix"].value, 4, rtol=0.02)
    np.testing.assert_allclose(table["sersic_n"], 1.5, rtol=0.05)
    np.testing.assert_allclose(table["ellipticity"], 0.3, atol=0.01)
    constant = fitted_with(uneven[0].at(0, 300), uneven)
    assert (constant["r_eff_pix"].value[[2, 5]] > 4.2).all()


def test_fits_with_a_psf_that_varies_do_not_depend_on_the_tiles(uneven):
    one, several = (fitted_with(uneven[0], uneven, tile=tile) for tile in (2048, 400))
    for name in ("x", "mag", "r_eff_pix", "sersic_n", "ellipticity"):
        np.testing.assert_allclose(np.asarray(one[name]), np.asarray(several[name]), rtol=1e-6, err_msg=name)


def test_models_are_drawn_with_the_psf_of_the_place(uneven, tmp_path):
    fitted_with(uneven[0], uneven, tmp_path / "cat.fits", residual=tmp_path / "residual.fits")
    left = fits.getdata(tmp_path / "residual.fits")
    for x, y in uneven[2]:
        assert left[round(y) - 5 : round(y) + 6, round(x) - 5 : round(x) + 6].std() < 1.2
