import numpy as np
import pytest
from astropy import units
from astropy.table import Table
from test_report import Page, catalogue, noisy

from sersicnet.catalogue import crossmatch, report
from sersicnet.errors import InputError, SersicnetWarning


def sky(n=400):
    """A catalogue with ra, dec, and radii in arcsec of 0.06 arcsec pixels, around right ascension 0."""
    table = catalogue(n)
    table["ra"] = ((table["x"].value - 100) * 0.5 / 3600 % 360) * units.deg
    table["dec"] = (60 + (table["y"].value - 100) * 0.5 / 3600) * units.deg
    table["r_eff"] = table["r_eff_pix"].value * 0.06 * units.arcsec
    return table


def written(path, columns, **changes):
    Table({**{name: np.asarray(getattr(c, "value", c)) for name, c in columns.items()}, **changes}).write(path)
    return path


def places(table, east=0.0, north=0.0):
    """Positions that lie this many arcsec from those of a table."""
    dec = table["dec"].value + north / 3600
    return {"ra": (table["ra"].value + east / 3600 / np.cos(np.radians(dec))) % 360, "dec": dec}


def test_pairs_are_each_other_s_nearest():
    found = np.array([[0.0, 0.0], [0.4, 0.0], [9.0, 9.0], [np.nan, 1.0]])
    true = np.array([[0.1, 0.0], [20.0, 20.0], [9.0, 9.9]])
    i, j = crossmatch.pairs(found, true, 1.0)
    assert (i.tolist(), j.tolist()) == ([0, 2], [0, 2])
    assert crossmatch.pairs(found, true, 0.5)[0].tolist() == [0]
    assert len(crossmatch.pairs(found, np.full((2, 2), np.nan), 1.0)[0]) == 0


def test_offset_bias_scatter_and_outliers_are_found(tmp_path):
    table, rng = sky(), np.random.default_rng(3)
    order = rng.permutation(len(table))
    noise = rng.normal(0, 0.05, len(table))
    noise[:40] = 5.0
    changed = {
        **places(table, 0.3, -0.2), "mag": table["mag"].value - 0.1 - noise, "r_eff": table["r_eff"].value / 1.2,
        "sersic_n": table["sersic_n"] * 10**-0.3, "q": 1 - table["ellipticity"],
    }  # fmt: skip
    path = written(tmp_path / "other.csv", {name: np.asarray(values)[order] for name, values in changed.items()})
    with pytest.warns(SersicnetWarning, match=r"differ from those of .*other.csv by 0.361 ± 0.000 arcsec"):
        found = crossmatch.match(table, path)
    assert found.on == "sky"
    np.testing.assert_array_equal(order[found.j], found.i)
    np.testing.assert_allclose(found.offset, [-0.3, 0.2], atol=1e-3)
    one = {name: samples["all"] for name, samples in found.statistics().items()}
    assert one["mag"].n == len(found.i) > 390
    assert one["mag"].bias == pytest.approx(0.1, abs=0.02)
    assert one["mag"].scatter == pytest.approx(0.06, abs=0.02)
    assert one["mag"].outliers == pytest.approx(0.1, abs=0.01)
    assert one["r_eff"].bias == pytest.approx(0.2, abs=1e-5)
    assert one["sersic_n"].bias == pytest.approx(0.3, abs=1e-5)
    assert one["ellipticity"].bias == pytest.approx(0, abs=1e-6)
    clean = (table["flags"][found.i] == 0).sum()
    assert found.statistics()["mag"]["flags == 0"].n == clean
    page = found.as_markdown()
    assert f"{len(found.i)} of 400 sources have a partner among the 400" in page
    assert "-0.300 ± 0.000 arcsec in east and +0.200 ± 0.000 arcsec in north" in page
    assert sum(low for low, *_ in found.by_magnitude()) > 0
    found.draw(tmp_path / "match.png")
    assert (tmp_path / "match.png").stat().st_size > 1000


def test_pixels_count_where_one_has_no_sky(tmp_path):
    table = sky()
    del table["ra"], table["dec"]
    changes = {"X_IMAGE": table["x"].value + 1, "Y_IMAGE": table["y"].value + 1}  # SExtractor counts from 1
    found = crossmatch.match(table, written(tmp_path / "other.fits", {"mag": table["mag"]}, **changes))
    assert found.on == "pixels"
    assert len(found.i) == len(table)
    np.testing.assert_allclose(found.offset, 0, atol=1e-9)
    assert "pixels in x" in found.as_markdown()


def test_an_offset_of_pixels_warns(tmp_path):
    table = catalogue(100)
    path = written(tmp_path / "other.csv", {"x": table["x"].value + 1.2, "y": table["y"].value})
    with pytest.warns(SersicnetWarning, match="by 1.20 pixels in the median: does it count from 1"):
        crossmatch.match(table, path)


def test_radii_without_a_unit_are_told_by_their_size(tmp_path):
    table = sky(100)
    for name, factor, said in (("arcsec", 1, "taken for arcsec"), ("pixels", 1 / 0.06, "taken for pixels")):
        path = written(tmp_path / f"{name}.csv", {**places(table), "re": table["r_eff"].value * factor})
        found = crossmatch.match(table, path)
        assert found.statistics()["r_eff"]["all"].bias == pytest.approx(0, abs=1e-6)
        assert said in found.as_markdown()
    path = written(tmp_path / "odd.csv", {**places(table), "re": table["r_eff"].value * 4})
    found = crossmatch.match(table, path)
    assert "r_eff" not in found.differences
    assert "do not tell whether it is arcsec or pixels" in found.as_markdown()
    other = Table({**places(table), "re": table["r_eff_pix"].value * 0.06 * 1000 * units.marcsec})
    other.write(tmp_path / "unit.ecsv")
    assert crossmatch.match(table, tmp_path / "unit.ecsv").statistics()["r_eff"]["all"].bias == pytest.approx(
        0, abs=1e-6
    )


def test_what_sextractor_measures_otherwise_is_not_compared(tmp_path):
    table = sky(50)
    columns = {
        "ALPHA_J2000": table["ra"], "DELTA_J2000": table["dec"], "MAG_AUTO": table["mag"],
        "FLUX_RADIUS": table["r_eff_pix"], "ELLIPTICITY": table["ellipticity"],
    }  # fmt: skip
    found = crossmatch.match(table, written(tmp_path / "sex.fits", columns))
    assert set(found.differences) == {"mag"}
    page = found.as_markdown()
    assert "FLUX_RADIUS is the radius of a circle with half of the light, PSF included: it is not compared." in page
    assert "ELLIPTICITY is that of SExtractor's moments" in page
    assert "MAG_AUTO, not of all of a profile: expect them fainter" in page
    assert "Not compared: R_e, log10 n, ellipticity." in page


def test_like_is_compared_with_like(tmp_path):
    table = sky(50)
    table["mag_auto"] = table["mag"] + 0.25 * units.mag
    table["a_image"] = table["r_eff_pix"]
    sextractor = {**places(table), "MAG_AUTO": table["mag_auto"].value - 1.0}
    found = crossmatch.match(table, written(tmp_path / "sex.csv", sextractor))
    assert found.statistics()["mag"]["all"].bias == pytest.approx(1)
    assert "mag_auto here" in found.as_markdown()
    # A catalogue of sersicnet has columns of moments beside those of profiles.
    table.write(tmp_path / "ours.ecsv")
    found = crossmatch.match(table, tmp_path / "ours.ecsv")
    assert set(found.differences) == set(crossmatch.PARAMETERS)
    assert all(one["all"].bias == 0 for one in found.statistics().values())
    assert found.notes == ()


def test_numbers_that_stand_for_nothing_are_left_out(tmp_path):
    table = sky(50)
    mag = table["mag"].value.copy()
    mag[:3] = [-99, 99, -999.9]
    found = crossmatch.match(table, written(tmp_path / "other.csv", {**places(table), "mag": mag, "n": np.zeros(50)}))
    assert found.statistics()["mag"]["all"].n == 47
    assert found.statistics()["sersic_n"]["all"].n == 0


def test_catalogues_of_different_fields_do_not_match(tmp_path):
    table = sky(20)
    path = written(tmp_path / "other.csv", {"ra": [100.0], "dec": [-30.0], "mag": [20.0]})
    for rows in (20, 0):
        with pytest.warns(SersicnetWarning, match=f"None of the {rows} sources lies within 1 arcsec"):
            found = crossmatch.match(table[:rows], path)
        assert f"0 of {rows} sources have a partner" in found.as_markdown()
        found.draw(tmp_path / "match.png")


def test_few_pairs_leave_the_positions_alone(tmp_path):
    table = sky(3)
    found = crossmatch.match(table, written(tmp_path / "other.csv", {**places(table, 0.4), "mag": table["mag"]}))
    assert len(found.i) == 3
    assert "too few for a median offset" in found.as_markdown()
    found.draw(tmp_path / "match.png")


def test_what_cannot_be_matched_is_refused(tmp_path):
    table = sky(5)
    nowhere = written(tmp_path / "nowhere.csv", {"mag": table["mag"]})
    with pytest.raises(InputError, match=r"has ra and dec, or x and y; .*nowhere.csv has mag"):
        crossmatch.match(table, nowhere)
    in_sky = written(tmp_path / "sky.csv", places(table))
    with pytest.raises(InputError, match="has only ra and dec, and the image no WCS"):
        crossmatch.match(table["x", "y"], in_sky)
    with pytest.raises(InputError, match="A radius to match in is positive; received 0"):
        crossmatch.match(table, in_sky, radius=0)
    with pytest.raises(InputError, match=r"A figure ends in .png or .pdf; received match.jpg"):
        crossmatch.match(table, in_sky).draw(tmp_path / "match.jpg")


def test_a_report_shows_the_comparison(tmp_path):
    image, mesh = noisy(tmp_path)
    table = sky(80)
    other = written(tmp_path / "<other>.csv", {**places(table), "mag": table["mag"].value - 0.25})
    report.write_report(tmp_path / "report.html", table, image, mesh, comparison=crossmatch.match(table, other))
    page = Page(tmp_path / "report.html")
    assert "<other>.csv" in page.text
    assert "+0.2500 ± 0.0000" in page.text
