import functools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import QTable, Table
from astropy.wcs import WCS
from test_report import Page

from sersicnet import cli, measure, plan
from sersicnet.catalogue.crossmatch import Reference
from sersicnet.catalogue.factors import Curves, Factors
from sersicnet.engine.render import Renderer
from sersicnet.errors import InputError, SersicnetWarning
from sersicnet.image.carried import Carried, combined
from sersicnet.image.exposure import Exposure
from sersicnet.image.pixels import grown
from sersicnet.image.psffile import write_psf
from sersicnet.image.sky import estimate_sky
from sersicnet.measuring import bands
from sersicnet.measuring.bands import Band, measure_bands, plan_bands
from sersicnet.measuring.fitting import Fitting
from sersicnet.measuring.outputs import Outputs
from sersicnet.measuring.plan import Work
from sersicnet.measuring.scene import DETECTOR
from sersicnet.measuring.seeing import moffat

CENTRE = (150.1, 2.2)
N = 12


def sky_of(seed=4):
    """Galaxies on the sky: offsets in arcsec, flux, radius in arcsec, index, axis ratio, position angle."""
    rng = np.random.default_rng(seed)
    east, north = 4.0 * (np.arange(N) % 4) - 6 + 0.3, 4.0 * (np.arange(N) // 4) - 4
    rest = [rng.uniform(3, 12, N), rng.uniform(0.2, 0.4, N), rng.uniform(0.8, 2.5, N), rng.uniform(0.3, 0.8, N)]
    return np.column_stack([east, north, *rest, rng.uniform(0, 180, N)])


def band(path, *, size=320, scale=0.06, angle=0.0, fwhm=3.0, shift=(0, 0), rms=0.003, name="F160W", seed=1):
    """An image of the sky whose +y is at `angle` east of north, moved by `shift` pixels against its WCS; its PSF."""
    wcs, a = WCS(naxis=2), np.radians(angle)
    wcs.wcs.ctype, wcs.wcs.crval, wcs.wcs.crpix = ["RA---TAN", "DEC--TAN"], CENTRE, [size / 2 + 0.5] * 2
    wcs.wcs.cd = scale / 3600 * np.array([[-np.cos(a), np.sin(a)], [np.sin(a), np.cos(a)]])
    psf = moffat(fwhm, "", 0)
    east, north, flux, r_eff, n, q, pa = sky_of().T
    to_pixels = np.linalg.inv(3600 * wcs.wcs.cd)
    x, y = to_pixels @ [east, north] + (size - 1) / 2 + np.array(shift)[:, None]
    ahead = to_pixels @ [np.sin(np.radians(pa)), np.cos(np.radians(pa))]
    rows = np.column_stack([x, y, flux, r_eff / scale, n, q, np.degrees(np.arctan2(ahead[1], ahead[0]))])
    image = np.random.default_rng(seed).normal(0, rms, (size, size)).astype(np.float32)
    render = Renderer(psf.image, 128, psf.oversampling)
    corners = np.rint(rows[:, :2]).astype(int) - 64
    padded = np.pad(image, 128)  # with room for stamps that reach beyond the image
    for (x0, y0), row in zip(corners, rows, strict=True):
        padded[y0 + 128 : y0 + 256, x0 + 128 : x0 + 256] += render(row - [x0, y0, 0, 0, 0, 0, 0])[0]
    image = padded[128:-128, 128:-128]
    header = wcs.to_header()
    header["MAGZERO"], header["FILTER"] = 25.0, name
    fits.PrimaryHDU(image, header).writeto(path)
    return Exposure.open(path), psf, rows


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """The detection image, and a band of half its pixel scale that is turned."""
    path = tmp_path_factory.mktemp("bands")
    return band(path / "coarse.fits"), band(
        path / "fine.fits", size=620, scale=0.03, angle=35, fwhm=4.0, rms=0.0012, name="F814W", seed=2
    )


def test_sources_keep_their_places_shapes_and_pixels(scene):
    (detected, _, _), (fine, _, _) = scene
    mesh, own_mesh = (estimate_sky(one, DETECTOR.threshold) for one in (detected, fine))
    carried = Carried(detected, mesh, fine.image)
    here = DETECTOR.around(detected, mesh, detected.image.whole).detections
    there = carried.around(fine, own_mesh, fine.image.whole).detections
    assert len(here) == len(there) >= N
    np.testing.assert_array_equal(carried.source_at(there, *carried.places(here.x, here.y).T), np.arange(len(here)))
    for one, seen in zip(detected.image.sky(here.x, here.y), fine.image.sky(there.x, there.y), strict=True):
        np.testing.assert_allclose(seen, one, atol=1e-9)
    np.testing.assert_allclose([there.a, there.b], [2 * here.a, 2 * here.b], rtol=1e-6)
    long = here.a > 1.2 * here.b
    turned = fine.image.position_angle(there.x, there.y, there.theta)
    apart = turned - detected.image.position_angle(here.x, here.y, here.theta)
    np.testing.assert_allclose(((apart + 90) % 180 - 90)[long], 0, atol=1e-3)
    np.testing.assert_allclose(there.area, 4 * here.area, rtol=0.05)
    labels = there.segmentation[np.rint(there.y).astype(int), np.rint(there.x).astype(int)]
    np.testing.assert_array_equal(labels, np.arange(1, len(there) + 1))
    # A source is the same from every window.
    zone = grown((slice(260, 320), slice(260, 320)), 0, fine.shape)
    part = carried.around(fine, own_mesh, zone)
    np.testing.assert_array_equal(
        part.detections.segmentation > 0, (there.segmentation > 0)[part.window] & (part.detections.segmentation > 0)
    )
    which = carried.source_at(there, part.detections.x, part.detections.y)
    assert (which >= 0).all()
    np.testing.assert_allclose(part.detections.flux, there.flux[which], rtol=1e-5)
    np.testing.assert_array_equal(part.detections.area, there.area[which])


@pytest.mark.filterwarnings("ignore::sersicnet.errors.SersicnetWarning")
def test_bands_of_two_pixel_scales_agree_on_the_sky(scene, tmp_path):
    """Fitted positions agree to 0.1 pixel, and radii and angles with the truth; the catalogue has columns by band."""
    (detected, psf, rows), (fine, fine_psf, fine_rows) = scene
    both = [Band(exposure=detected, psf=psf), Band(exposure=fine, psf=fine_psf)]
    options = {"weights": "fovea", "refine": Fitting(gain=1e9, prior="none", model_error=0)}
    table = measure_bands(both, [detected], outputs=Outputs(catalogue=tmp_path / "bands.fits"), **options)
    assert list(table["id"]) == list(range(1, len(table) + 1))
    found = QTable.read(tmp_path / "bands.fits")
    assert found.colnames == table.colnames
    assert found.meta["BANDS"] == "F160W,F814W"
    header = fits.getheader(tmp_path / "bands.fits", 1)
    assert header[f"TUCD{1 + found.colnames.index('ra')}"] == "pos.eq.ra;meta.main"
    assert header[f"TUCD{1 + found.colnames.index('ra_F814W')}"] == "pos.eq.ra"
    column = 1 + found.colnames.index("mag_err_F814W")
    assert header[f"TUCD{column}"] == "stat.error;phot.mag"
    assert header[f"TCOMM{column}"] == "1 sigma error of mag; F814W"
    assert not (tmp_path / "bands.fits.run").exists()
    for name, truth, scale in (("F160W", rows, 0.06), ("F814W", fine_rows, 0.03)):
        nearest = np.hypot(*(table[f"{k}_{name}"].value - truth[:, i, None] for i, k in enumerate("xy"))).argmin(axis=1)
        one = table[nearest]
        assert (one[f"fit_status_{name}"] == 0).all()
        for i, k in enumerate("xy"):
            np.testing.assert_allclose(one[f"{k}_{name}"].value, truth[:, i], atol=0.1)
        pull = (one[f"r_eff_{name}"].value - truth[:, 3] * scale) / one[f"r_eff_err_{name}"].value
        assert np.abs(pull).max() < 4
        turned = (one[f"pa_{name}"].value - sky_of()[:, 6] + 90) % 180 - 90
        assert np.abs(turned / one[f"theta_err_{name}"].value).max() < 4
        here = detected if name == "F160W" else fine
        ra, dec = here.image.sky(one[f"x_{name}"].value, one[f"y_{name}"].value)
        np.testing.assert_allclose(one[f"ra_{name}"].value, ra, rtol=0, atol=1e-9)  # fits have positions of their own
        np.testing.assert_allclose(one[f"dec_{name}"].value, dec, rtol=0, atol=1e-9)
    assert found.meta["DETBAND"] == "F160W"
    assert "parent_F160W" not in table.colnames
    assert not (tmp_path / "bands.fits.run").exists()


@pytest.mark.filterwarnings("ignore::sersicnet.errors.SersicnetWarning")
def test_a_catalogue_for_each_band_has_the_same_rows(scene, tmp_path):
    (detected, psf, _), (fine, fine_psf, _) = scene
    both = [Band(exposure=detected, psf=psf), Band(exposure=fine, psf=fine_psf)]
    whole = plan_bands(both, [detected], weights="fovea", outputs=Outputs(catalogue=tmp_path)).run()
    assert [path.name for _, path in whole] == ["F160W_cat.fits", "F814W_cat.fits"]
    one, other = (QTable.read(path) for _, path in whole)
    np.testing.assert_array_equal(one["id"], other["id"])
    np.testing.assert_allclose(one["ra"], other["ra"], rtol=0, atol=1e-9 * one["ra"].unit)
    assert abs(other.meta["XOFFSET"]) < 4 * other.meta["OFFSETER"]
    names = "mag,mag_auto,flags,parent,id,flux_ujy,mag_limit,x_err"
    tiled = measure_bands(both[1:], [detected], weights="fovea", work=Work(tile=310), columns=names)
    of_band = [f"{name}_F814W" for name in ("mag", "flux_ujy", "mag_limit", "mag_auto", "flags", "x_err")]
    assert tiled.colnames == ["id", "parent", "mag_auto", "x_err", "flags", *of_band]
    assert np.isfinite(tiled["x_err"].value).all()
    np.testing.assert_allclose(tiled["mag_F814W"], other["mag"], rtol=1e-4)
    np.testing.assert_allclose(tiled["mag_auto_F814W"], other["mag_auto"], rtol=1e-4)
    np.testing.assert_array_equal(tiled["flags"], other["flags"])


@pytest.mark.filterwarnings("ignore::sersicnet.errors.SersicnetWarning")
def test_columns_of_bands_are_checked_before_any_work(scene, tmp_path):
    (detected, psf, _), _ = scene
    plan = functools.partial(plan_bands, [Band(exposure=detected, psf=psf)], [detected], weights="fovea")
    with pytest.raises(InputError, match=r"received 'mag_F160W'\. Is it mag\?"):
        plan(columns="id,mag_F160W")
    with pytest.raises(InputError, match="lists parent, which needs detections"):
        plan(columns="parent", outputs=Outputs(catalogue=tmp_path))
    with pytest.raises(InputError, match="lists chi2, which needs fits"):
        plan(columns="chi2")


@pytest.mark.filterwarnings("ignore:.*spreads:sersicnet.errors.SersicnetWarning")
def test_an_offset_is_measured_and_reported(scene, tmp_path):
    (detected, _, _), _ = scene
    moved, own, _ = band(tmp_path / "moved.fits", shift=(0.3, -0.2), angle=30, fwhm=2.2, seed=5)
    plan = plan_bands(
        [Band(exposure=moved, psf=own, name="a")], [detected], weights="fovea", outputs=Outputs(catalogue=tmp_path)
    )
    with pytest.warns(SersicnetWarning, match=r"bright sources of .*moved.fits.* lie \(0.\d+, -0.\d+\) pixels"):
        ((table, _),) = plan.run()
    assert table.meta["OFFSETER"] < 0.06
    assert table.meta["XOFFSET"] == pytest.approx(0.3, abs=4 * table.meta["OFFSETER"])
    assert table.meta["YOFFSET"] == pytest.approx(-0.2, abs=4 * table.meta["OFFSETER"])


@pytest.mark.filterwarnings("ignore::sersicnet.errors.SersicnetWarning")
def test_sources_outside_a_band_have_rows_without_values(scene, tmp_path):
    (detected, _, _), _ = scene
    small, own, _ = band(tmp_path / "small.fits", size=170, name="F606W")
    table = measure_bands([Band(exposure=small, psf=own)], [detected], weights="fovea")
    outside = (np.abs(table["x_F606W"].value - 85) > 90) | (np.abs(table["y_F606W"].value - 85) > 90)
    assert 0 < outside.sum() < len(table)
    assert np.isnan(table["mag_F606W"].value[outside]).all()
    assert (table["flags"][outside] & 1 == 1).all()
    assert np.isfinite(table["ra"]).all()


def test_images_are_combined_by_their_noise(tmp_path):
    rng = np.random.default_rng(0)
    band(tmp_path / "a.fits", rms=0.0)
    header = fits.getheader(tmp_path / "a.fits")
    light, exposures = 30 * fits.getdata(tmp_path / "a.fits"), []
    for rms, zero_point, sky in ((0.05, 25.0, 3.0), (0.2, 26.5, -1.0)):
        unit = 10 ** (0.4 * (zero_point - 25))
        data = unit * (light + rng.normal(0, rms, light.shape)) + sky
        data[:40, :60] = np.nan
        exposures.append(Exposure.of_arrays(data, header={**header}, wcs=WCS(header), zero_point=zero_point))
    meshes = [estimate_sky(one, DETECTOR.threshold) for one in exposures]
    both = combined(exposures, meshes)
    pixels = both.read(both.image.whole)
    assert pixels.bad[:40, :60].all()
    blank = (light < 1e-3) & ~pixels.bad
    expected = 1 / np.hypot(1 / 0.05, 1 / 0.2)
    assert pixels.data[blank].std() == pytest.approx(expected, rel=0.03)
    assert np.median(pixels.noise[blank]) == pytest.approx(expected, rel=0.05)
    bright = light > 0.5 * light.max()
    assert np.median(pixels.data[bright] / light[bright]) == pytest.approx(1, abs=0.02)
    other = replace(exposures[1], zero_point=exposures[1].zero_point._replace(value=26.0))
    assert combined([exposures[0], other], meshes).image.identity() != both.image.identity()


@pytest.mark.filterwarnings("ignore::sersicnet.errors.SersicnetWarning")
def test_an_interrupted_run_continues(scene, tmp_path, monkeypatch):
    (detected, psf, _), _ = scene
    only = [Band(exposure=detected, psf=psf)]
    options = {"weights": "fovea", "outputs": Outputs(catalogue=tmp_path / "bands.fits")}

    def stop(*tables):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(bands.tables, "side_by_side", stop)
        with pytest.raises(KeyboardInterrupt):
            measure_bands(only, [detected], **options)
    kept = tmp_path / "bands.fits.run"
    assert sorted(path.name for path in kept.iterdir()) == ["band-F160W", "detection"]
    assert not (tmp_path / "bands.fits").exists()
    written = (kept / "band-F160W" / "tile-0-0.npz").stat().st_mtime_ns
    with monkeypatch.context() as patched:
        patched.setattr(bands.shutil, "rmtree", lambda path: None)
        table = measure_bands(only, [detected], **options)
    assert len(table) >= N
    assert (kept / "band-F160W" / "tile-0-0.npz").stat().st_mtime_ns == written


@pytest.mark.filterwarnings("ignore::sersicnet.errors.SersicnetWarning")
def test_bands_without_a_source_have_empty_catalogues(scene, tmp_path):
    header = fits.getheader(scene[0][0].image.path)
    noise = np.random.default_rng(0).normal(0, 1, (200, 200)).astype(np.float32)
    fits.PrimaryHDU(noise, header).writeto(tmp_path / "noise.fits")
    empty = Exposure.open(tmp_path / "noise.fits")
    table = measure_bands(
        [Band(exposure=scene[0][0])], [empty], weights="fovea", outputs=Outputs(catalogue=tmp_path / "empty.fits")
    )
    assert len(table) == len(QTable.read(tmp_path / "empty.fits")) == 0
    assert "mag_F160W" in table.colnames


def test_options_of_bands_are_given_once_for_each(scene, tmp_path, capsys):
    (detected, _, _), (fine, _, _) = scene
    one, two = (str(exposure.image.path) for exposure in (detected, fine))
    pixels = tmp_path / "pixels.csv"
    pixels.write_text("x,y\n1,2\n")
    for options, rule in (
        (["--rms", one], r"--rms is given once for each band, 2 in all, in their order, .* received 1\."),
        (["--psf-fwhm", "3"], r"--psf-fwhm is given once for each band, 2 in all"),
        (["--model", str(tmp_path / "m.fits")], r"--model belongs to fits: give --refine with it"),
        (["--match", str(pixels)], r"Several bands are matched on the sky, by ra and dec; .*pixels\.csv has x, y"),
        (["--positions", str(pixels)], r"at the places of a table: .* either --detect-on or --positions"),
        (["--resample"], r"Several bands take no option that belongs to one image; received --resample"),
        (["--validated", one], r"--validated is given once for each band, 2 in all"),
        (["--debias", "--validated", "none", "--validated", "none"], r"--debias .* give --validated with it"),
        (["--validated", "none", "--validated", one], r"is not a file that `sersicnet validate` writes"),
        (["--detect-on", two], r"have the same pixels"),
    ):
        arguments = ["measure", one, two, "--detect-on", one, "-w", "fovea", "-o", str(tmp_path / "x.fits"), *options]
        with pytest.raises(SystemExit) as done:
            cli.main(arguments)
        error = capsys.readouterr().err
        assert done.value.code == 1
        assert re.search(rule, error)
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["pixels.csv"]


def listed(scene):
    """The places of the galaxies, in another order and with ids of their own."""
    (detected, _, rows), _ = scene
    order = np.random.default_rng(0).permutation(N)
    ra, dec = detected.image.sky(*rows[order, :2].T)
    return Table({"id": order + 31, "ra": ra, "dec": dec}), order


@pytest.mark.filterwarnings("ignore::sersicnet.errors.SersicnetWarning")
def test_the_places_of_a_table_are_measured_in_every_band(scene, tmp_path):
    (detected, psf, rows), (fine, fine_psf, fine_rows) = scene
    table, order = listed(scene)
    table.write(tmp_path / "targets.csv")
    for path, one in (("one_psf.fits", (psf, detected)), ("two_psf.fits", (fine_psf, fine))):
        write_psf(tmp_path / path, one[0], one[1].shape)
    images = [str(exposure.image.path) for exposure in (detected, fine)]
    with pytest.raises(SystemExit) as done:
        cli.main(
            ["measure", *images, "--positions", str(tmp_path / "targets.csv"), "-w", "fovea", "--workers", "1", "-q",
             "--psf", str(tmp_path / "one_psf.fits"), "--psf", str(tmp_path / "two_psf.fits"),
             "-o", str(tmp_path / "bands.fits")]
        )  # fmt: skip
    assert done.value.code == 0
    found = QTable.read(tmp_path / "bands.fits")
    np.testing.assert_array_equal(found["id"], table["id"])
    np.testing.assert_array_equal(found["ra"].value, table["ra"])
    assert "parent" not in found.colnames
    assert np.isfinite(found["a_image_F814W"]).all()  # of the ellipse of mag_auto, which is detected on the band
    assert "DETECTON" not in found.meta
    for name, truth in (("F160W", rows), ("F814W", fine_rows)):
        for i, k in enumerate("xy"):
            np.testing.assert_allclose(found[f"{k}_{name}"].value, truth[order, i], atol=1e-4)
        away = found[f"mag_{name}"].value - (25 - 2.5 * np.log10(sky_of()[order, 2]))
        assert np.abs(np.median(away)) < 0.1
    alone = measure(fine, positions=table, weights="fovea", psf=fine_psf)
    np.testing.assert_allclose(found["mag_F814W"], alone["mag"], rtol=1e-5)


def validation_of(exposure, psf, path, factor):
    """The file of a validation that multiplies all errors."""
    curves = Curves(np.full(4, np.log(factor)), np.tile(np.arange(8.0), (4, 4, 1)), np.zeros((4, 4, 8)))
    factors = Factors(curves, curves._replace(constants=np.zeros(4)), curves, psf.fwhm, {})
    header = fits.Header({"PSFFWHM": psf.fwhm})
    header["OPTIONS"] = json.dumps(plan(exposure, weights="fovea", psf=psf).options())
    fits.HDUList([fits.PrimaryHDU(header=header), fits.table_to_hdu(factors.table())]).writeto(path)
    fits.setval(path, "EXTNAME", value="FACTORS", ext=1)
    return path


@pytest.mark.filterwarnings("ignore::sersicnet.errors.SersicnetWarning")
def test_a_validation_of_a_band_corrects_the_errors_of_this_band(scene, tmp_path):
    (detected, psf, _), (fine, fine_psf, _) = scene
    both = [Band(exposure=detected, psf=psf), Band(exposure=fine, psf=fine_psf)]
    before = measure_bands(both, [detected], weights="fovea")
    both[1] = replace(both[1], validated=validation_of(fine, fine_psf, tmp_path / "v.fits", 3.0))
    after = measure_bands(both, [detected], weights="fovea", debias=True)
    np.testing.assert_array_equal(after["mag_err_F160W"], before["mag_err_F160W"])
    for name in ("mag_err", "r_eff_err", "sersic_n_err", "ellipticity_err"):
        np.testing.assert_allclose(after[f"{name}_F814W"], 3 * before[f"{name}_F814W"], rtol=1e-4)
    assert "VALFILE" not in after.meta
    lines = dict(line.split(": ", 1) for line in after.meta["HISTORY"])
    assert "VALFILE" not in lines["F160W"]
    assert "VALFILE v.fits" in lines["F814W"]
    assert "VALBIAS True" in lines["F814W"]
    with pytest.raises(InputError, match=r"v\.fits is of another mosaic"):
        plan_bands([replace(both[0], validated=tmp_path / "v.fits")], [detected], weights="fovea")
    with pytest.raises(InputError, match="positions was false, and is true now"):
        plan_bands(both[1:], positions=listed(scene)[0], weights="fovea")


@pytest.mark.filterwarnings("ignore::sersicnet.errors.SersicnetWarning")
def test_bands_are_compared_at_the_same_places_and_shown_side_by_side(scene, tmp_path, capsys):
    (detected, _, _), (fine, _, _) = scene
    table, order = listed(scene)
    _, _, flux, r_eff, n, q, _ = sky_of()[order].T
    for name, off in (("F160W", 0.5), ("F606W", 9.0)):
        table[f"mag_{name}"] = 25 - 2.5 * np.log10(flux) + off
        table[f"r_eff_{name}"], table[f"sersic_n_{name}"], table[f"ellipticity_{name}"] = r_eff, n, 1 - q
    table.write(tmp_path / "other.csv")
    images = [str(exposure.image.path) for exposure in (detected, fine)]
    options = ["-w", "fovea", "--workers", "1", "-q", "--detect-on", images[0], "-o", str(tmp_path / "bands.fits")]
    more = ["--match", str(tmp_path / "other.csv"), "--report", str(tmp_path / "page.html")]
    with pytest.raises(SystemExit) as done:
        cli.main(["measure", *images, *options, *more])
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert out.index("## F160W") < out.index("## F814W")
    texts = [(tmp_path / f"bands_match_{name}.md").read_text() for name in ("F160W", "F814W")]
    assert all(text in out for text in texts)
    partners = [text.split(" have a partner")[0] for text in texts]
    assert partners[0] == partners[1]
    assert partners[0].startswith(f"{N} of ")
    assert re.search(r"\| mag \| all \| 12 \| -0\.[45]", texts[0])
    assert "Not compared: mag, R_e, log10 n, ellipticity." in texts[1]
    assert len(list(tmp_path.glob("bands_match_*.png"))) == 2
    page = Page(tmp_path / "page.html")
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "F160W, F814W" in page.text
    assert "F814W: beside" in page.text
    assert not list(tmp_path.glob("page_*"))
    outputs = Outputs(catalogue=tmp_path, match=tmp_path / "other.csv")
    alone = plan_bands([Band(exposure=detected)], [detected], weights="fovea", outputs=outputs)
    assert [path.name for path in alone.files.differences["F160W"]] == ["F160W_cat_match.md", "F160W_cat_match.png"]
    plain = Table({"ra": table["ra"], "dec": table["dec"], "mag": table["mag_F160W"]})
    plain.write(tmp_path / "plain.csv")
    for band, other in Reference.read_bands(tmp_path / "plain.csv", ["F160W", "F814W"]).items():
        assert "differ by a colour" in other.notes[-1], band
    with pytest.raises(InputError, match=r"has the bands F160W, F606W; received J, none of them"):
        Reference.read_bands(tmp_path / "other.csv", ["J"])


def test_what_cannot_be_measured_together_is_refused(scene, blank, tmp_path):
    (detected, _, _), (fine, _, _) = scene
    options = {"weights": "fovea", "outputs": Outputs(catalogue=tmp_path / "x.fits")}
    far = fits.getheader(detected.image.path)
    far["CRVAL1"] += 1
    elsewhere = Exposure.open(blank("far.fits", far))
    with pytest.raises(InputError, match="does not overlap"):
        plan_bands([Band(exposure=detected)], [elsewhere], **options)
    with pytest.raises(InputError, match="has no celestial WCS"):
        plan_bands([Band(exposure=Exposure.open(blank("plain.fits")))], [detected], **options)
    with pytest.raises(InputError, match="have the same pixels"):
        plan_bands([Band(exposure=detected)], [detected, fine], **options)
    with pytest.raises(InputError, match="Each band is given once; received"):
        plan_bands([Band(exposure=detected), Band(exposure=detected)], [detected], **options)
    with pytest.raises(InputError, match=r"PSF.*none\.fits|none\.fits.*no such"):
        plan_bands([Band(exposure=detected, psf=Path("none.fits"))], [detected], **options)
    assert not list(tmp_path.glob("x.fits*"))
