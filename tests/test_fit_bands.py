"""Fits of several bands at the places, and with the shapes, of a catalogue of several bands."""

import re

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import QTable, Table
from test_bands import CENTRE, N, band, sky_of

from sersicnet import cli
from sersicnet.cli.bands import PerImage
from sersicnet.errors import InputError, SersicnetWarning
from sersicnet.image.exposure import Exposure
from sersicnet.image.psffile import write_psf
from sersicnet.measuring.bands import Band, fit_bands, plan_fit_bands
from sersicnet.measuring.fitting import Fitting
from sersicnet.measuring.outputs import Outputs
from sersicnet.measuring.positions import digest

FLUXES = ("r_eff", "sersic_n", "ellipticity", "theta")
pytestmark = pytest.mark.filterwarnings("ignore::sersicnet.errors.SersicnetWarning")


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A band of finer pixels and one that is turned: exposure, PSF and rows of each; and the catalogue of two bands."""
    path = tmp_path_factory.mktemp("fits")
    both = (
        band(path / "fine.fits", size=620, scale=0.03, angle=35, fwhm=4.0, rms=0.0012, name="F814W", seed=2),
        band(path / "turned.fits", angle=-30, fwhm=2.5, name="F125W", seed=3),
    )
    for (exposure, psf, _), name in zip(both, ("fine", "turned"), strict=True):
        write_psf(path / f"{name}_psf.fits", psf, exposure.shape)
    return path, both, catalogue()


def catalogue():
    """A catalogue of the bands F160W, which has the true shapes, and F814W, which has others; its ids begin at 31."""
    east, north, flux, r_eff, n, q, pa = sky_of().T
    dec = CENTRE[1] + north / 3600
    table = Table({"id": np.arange(31, 31 + N), "ra": CENTRE[0] + east / 3600 / np.cos(np.radians(dec)), "dec": dec})
    table["flags"] = 0
    for name, wrong in (("F160W", 1.0), ("F814W", 3.0)):
        table[f"flags_{name}"] = 0
        table[f"mag_{name}"] = 25 - 2.5 * np.log10(flux)
        table[f"mag_err_{name}"], table[f"r_eff_err_{name}"], table[f"sersic_n_err_{name}"] = 0.1, 0.1, 0.1
        table[f"r_eff_{name}"], table[f"r_eff_pix_{name}"] = r_eff * wrong, 99.0
        table[f"sersic_n_{name}"], table[f"ellipticity_{name}"] = n, 1 - q
        table[f"pa_{name}"], table[f"theta_{name}"] = pa + 60 * (wrong - 1), 12.0
    table.meta.update(BANDS="F160W,F814W", DETBAND="F160W")
    return table


def bands_of(both):
    return [Band(exposure=exposure, psf=psf) for exposure, psf, _ in both]


def forced(**options):
    return Fitting(prior="none", model_error=0.0, gain=1e9, fix=FLUXES, **options)


def test_shapes_of_one_band_give_fluxes_in_others(scene, tmp_path):
    """Through other pixel scales and orientations; ids and order are those of the table."""
    _, both, table = scene
    table.write(tmp_path / "bands.fits")
    mixed = np.random.default_rng(0).permutation(N)
    outputs = Outputs(catalogue=tmp_path / "f.fits", model=tmp_path / "m.fits.gz", residual=tmp_path / "r.fits")
    for given in (tmp_path / "bands.fits", table[mixed]):
        rows = np.arange(N) if given is not table and not isinstance(given, Table) else mixed
        options = {"outputs": outputs} if not isinstance(given, Table) else {}
        found = fit_bands(bands_of(both), given, fitting=forced(), **options)
        np.testing.assert_array_equal(found["id"], table["id"][rows])
        np.testing.assert_allclose(found["ra"].value, table["ra"][rows], rtol=0, atol=1e-12)
        for name in ("F814W", "F125W"):
            flux, error = np.array(found[f"flux_{name}"]), np.array(found[f"flux_err_{name}"])
            assert np.abs((flux - sky_of()[rows, 2]) / error).max() < 3.5
            np.testing.assert_allclose(found[f"flux_ujy_{name}"].value, flux * 10 ** (-0.4 * (25 - 23.9)), rtol=1e-5)
            np.testing.assert_allclose(found[f"r_eff_{name}"].value, table["r_eff_F160W"][rows], rtol=1e-5)
            turned = found[f"pa_{name}"].value - table["pa_F160W"][rows]
            np.testing.assert_allclose((turned + 90) % 180 - 90, 0, atol=1e-2)
        colour = found["mag_F814W"] - found["mag_F125W"]
        error = np.hypot(found["mag_err_F814W"], found["mag_err_F125W"])
        assert np.abs(colour / error).max() < 3.5
        assert found.meta["FROMBAND"] == "F160W"
        assert found.meta["FIXED"] == ",".join(FLUXES)
    written = QTable.read(tmp_path / "f.fits")
    assert written.colnames == found.colnames
    for name, k in (("F814W", 0), ("F125W", 1)):
        model, residual = fits.getdata(tmp_path / f"m_{name}.fits.gz"), fits.getdata(tmp_path / f"r_{name}.fits")
        assert model.shape == residual.shape == both[k][0].shape
        assert model.sum() == pytest.approx(sky_of()[:, 2].sum(), rel=0.05)
        assert 1.4826 * np.median(np.abs(residual)) == pytest.approx((0.0012, 0.003)[k], rel=0.1)
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "bands.fits", "f.fits", "m_F125W.fits.gz", "m_F814W.fits.gz", "r_F125W.fits", "r_F814W.fits"
    ]  # fmt: skip


def test_another_band_of_the_table_is_chosen_by_its_name(scene):
    """Its radii are three times too large here, so that its fluxes are too bright."""
    _, both, table = scene
    true = sky_of()[:, 2]
    found = {name: fit_bands(bands_of(both[1:]), table, fitting=forced(), from_band=name) for name in ("f814w", None)}
    assert found["f814w"].meta["FROMBAND"] == "F814W"
    np.testing.assert_allclose(found["f814w"]["r_eff_F125W"].value, table["r_eff_F814W"], rtol=1e-5)
    assert np.median(found["f814w"]["flux_F125W"] / true) > 1.3
    assert np.median(found[None]["flux_F125W"] / true) == pytest.approx(1, abs=0.05)


def test_some_values_are_kept_and_the_rest_is_fitted(scene, tmp_path):
    """A catalogue for each band has the same rows; radius, angle and position agree on the sky within their errors."""
    _, both, table = scene
    fitting = Fitting(prior="none", model_error=0.0, gain=1e9, fix=("sersic_n", "ellipticity"))
    plan = plan_fit_bands(bands_of(both), table, fitting=fitting, outputs=Outputs(catalogue=tmp_path))
    done = plan.run()
    assert [path.name for _, path in done] == ["F814W_cat.fits", "F125W_cat.fits"]
    for found, path in done:
        np.testing.assert_array_equal(QTable.read(path)["id"], table["id"])
        assert (found["fit_status"] == 0).all()
        np.testing.assert_allclose(found["sersic_n"], table["sersic_n_F160W"], rtol=1e-6)
        pull = (found["r_eff"].value - table["r_eff_F160W"]) / found["r_eff_err"].value
        turned = (found["pa"].value - table["pa_F160W"] + 90) % 180 - 90
        assert np.abs(pull).max() < 4
        assert np.abs(turned / found["theta_err"].value).max() < 4
        for axis, factor in (("ra", np.cos(np.radians(CENTRE[1]))), ("dec", 1)):
            away = 3600 * factor * (found[axis].value - table[axis])
            assert np.abs(away).max() < 0.1 * found.meta["PIXSCALE"]


def test_an_offset_from_the_places_that_are_kept_is_reported(scene, tmp_path):
    _, _, table = scene
    moved, psf, _ = band(tmp_path / "moved.fits", shift=(0.3, -0.2), angle=30, seed=5, fwhm=2.2)
    with pytest.warns(SersicnetWarning, match=r"moved.fits.* lie \(0.\d+, -0.\d+\) pixels.*from their positions in"):
        found = fit_bands([Band(exposure=moved, psf=psf)], table, fitting=forced())
    assert found.meta["XOFFSET"] == pytest.approx(0.3, abs=4 * found.meta["OFFSETER"])
    assert found.meta["YOFFSET"] == pytest.approx(-0.2, abs=4 * found.meta["OFFSETER"])
    assert found.meta["OFFSETER"] < 0.1


def test_an_unfinished_run_with_other_shapes_is_another_run():
    places, shapes = np.ones((3, 2)), {"r_eff_pix": np.ones(3)}
    assert digest(None, {}) is None
    assert len({digest(places, each) for each in ({}, shapes, {"r_eff_pix": 2 * np.ones(3)})}) == 3


def test_options_are_repeated_in_the_order_of_the_bands():
    given = PerImage({"zero_point": [25.0, None], "hdu": ["SCI"], "mask": ["none", "m.fits"], "gain": None})
    each = given.of_each(2)
    assert [options["zero_point"] for options in each] == [25.0, None]
    assert [options["hdu"] for options in each] == ["SCI", "SCI"]
    assert [options["mask"] for options in each] == [None, "m.fits"]
    assert [options["gain"] for options in each] == [None, None]
    assert given.of_each(1, others=1)[1] == each[1]
    with pytest.raises(InputError, match="`zero_point` is given once for each band, 3 in all, in their order"):
        given.of_each(3)
    with pytest.raises(InputError, match="`gain` is given once for each band, 1 in all, in their order"):
        PerImage({"gain": [1.0, 2.0]}).of_each(1, others=1)


def test_files_of_a_band_have_its_name():
    own = Outputs(
        catalogue="c.fits", model="a/m.fits.gz", regions="x.y.reg", report="r.html", match="m.csv"
    ).of_band("F125W")  # fmt: skip
    assert [str(each) for each in (own.model, own.regions)] == ["a/m_F125W.fits.gz", "x.y_F125W.reg"]
    assert [own.catalogue, own.psf_out, own.report, own.match] == [None] * 4


def run(arguments, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["fit", *map(str, arguments)])
    return done.value.code, capsys.readouterr().err


def test_the_command_writes_one_catalogue(scene, tmp_path, capsys):
    path, _, table = scene
    table.write(tmp_path / "bands.fits")
    code, err = run(
        [path / "fine.fits", path / "turned.fits", "--psf", path / "fine_psf.fits", "--psf", path / "turned_psf.fits",
         "--positions", tmp_path / "bands.fits", "--fix", ",".join(FLUXES), "--gain", "none", "--gain", "1e9",
         "--zero-point", "none", "--zero-point", "26", "-o", tmp_path / "f.fits", "--workers", "1"],
        capsys,
    )  # fmt: skip
    assert code == 0, err
    found = QTable.read(tmp_path / "f.fits")
    assert np.median(found["mag_F125W"] - found["mag_F814W"]).value == pytest.approx(1, abs=0.02)
    assert "FROMBAND" in found.meta


def test_what_cannot_be_used_is_one_line(scene, tmp_path, capsys, blank):
    path, _, table = scene
    bands, plain, none = tmp_path / "bands.fits", tmp_path / "plain.csv", tmp_path / "none.fits"
    table.write(bands)
    table["id", "ra", "dec"].write(plain)
    other = table.copy()
    del other.meta["DETBAND"]
    other.write(none)
    far = table.copy()
    far["ra"] += 2
    far.write(tmp_path / "far.fits")
    fine, turned, psf = path / "fine.fits", path / "turned.fits", ["--psf", path / "fine_psf.fits"]
    fixed = ["--fix", ",".join(FLUXES)]
    here = blank("here.fits")
    before = sorted(tmp_path.iterdir())
    for images, options, rule in (
        ([fine, turned], [*psf, "--positions", bands], "--psf is given once for each band, 2 in all, in their order"),
        ([fine, turned], [*psf, *psf, *fixed], "give --positions"),
        ([fine, fine], [*psf, *psf, "--positions", bands], r"Each band is given once; received fine.fits twice"),
        ([fine, turned], [*psf, "--psf", "none", "--positions", bands], "there is none of F125W. Give --psf"),
        ([fine, turned], [*psf, *psf, "--positions", bands, "--fix", "radius"], "--fix names some of position, r_eff"),
        ([fine, turned], [*psf, *psf, "--positions", plain, *fixed], "it has no r_eff, sersic_n, ellipticity, theta"),
        ([fine, turned], [*psf, *psf, "--positions", plain, "--from-band", "F160W"], "--from-band is for a catalogue"),
        ([fine, turned], [*psf, *psf, "--positions", none], "has the bands F160W, F814W, and it was detected on none"),
        ([fine, turned], [*psf, *psf, "--positions", bands, "--from-band", "J"], "none is J: give one as --from-band"),
        ([fine], [*psf, "--positions", none, *fixed], "has the bands F160W, F814W"),
        ([fine], [*psf, "--from-band", "F160W"], "give --positions with it; received F160W"),
        ([fine], [*psf, *psf], "--psf is given once, or for each of several bands; received 2"),
        ([fine, turned], [*psf, *psf, "--positions", tmp_path / "far.fits"], "None of the 12 positions of .*far.fits"),
        ([fine, here], [*psf, *psf, "--positions", bands], "here.fits.* has no celestial WCS"),
        ([fine, turned], [*psf, *psf, "--positions", bands, "--model", "m.txt"], "An image ends in"),
    ):
        code, err = run([*images, *options, "-o", tmp_path / "x.fits"], capsys)
        assert code == 1, err
        assert re.search(rule, err), err
        assert err.count("\n") == 1, err
        assert sorted(tmp_path.iterdir()) == before
    code, err = run([fine, turned, *psf, *psf, "--positions", bands, "--zero-point", "x", "-o", "y.fits"], capsys)
    assert code == 2
    assert "neither a number nor none" in err


def test_no_output_replaces_an_image(scene, tmp_path):
    _, both, table = scene
    (moved, psf, _) = band(tmp_path / "m_F814W.fits", name="F606W")
    outputs = Outputs(catalogue=tmp_path / "c.fits", model=tmp_path / "m.fits", overwrite=True)
    with pytest.raises(InputError, match=r"No output replaces a file that is read; received m_F814W.fits for both"):
        plan_fit_bands([*bands_of(both[:1]), Band(exposure=moved, psf=psf)], table, outputs=outputs)
    table.write(tmp_path / "prior.fits")
    output = Outputs(catalogue=tmp_path / "prior.fits", overwrite=True)
    with pytest.raises(InputError, match=r"received prior\.fits for both"):
        plan_fit_bands(bands_of(both), table, outputs=output, fitting=Fitting(prior=tmp_path / "prior.fits"))
    with pytest.raises(InputError, match="zero point"):
        plan_fit_bands([Band(exposure=np.zeros((99, 99)), psf=psf, name="a")], table)
    with pytest.raises(InputError, match="has no celestial WCS"):
        plan_fit_bands([Band(exposure=Exposure.of(np.zeros((99, 99)), zero_point=25), psf=psf, name="a")], table)
