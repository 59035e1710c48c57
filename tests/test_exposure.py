"""An exposure is the same whatever it is made of; a script needs no file and no guard."""

import re
import subprocess
import sys

import numpy as np
import pytest
from astropy import units
from astropy.config.paths import set_temp_cache
from astropy.io import fits
from astropy.nddata import CCDData, InverseVariance, NDData, StdDevUncertainty
from astropy.table import QTable
from astropy.wcs import WCS

from sersicnet import cli
from sersicnet.engine.render import Renderer, parameters_of
from sersicnet.errors import InputError, SersicnetWarning
from sersicnet.image.exposure import Exposure
from sersicnet.image.psf import Psf
from sersicnet.measuring.fitting import Fitting
from sersicnet.measuring.measure import measure
from sersicnet.measuring.outputs import Outputs
from sersicnet.measuring.plan import Work
from sersicnet.simulating.telescopes import F160W, effective_psf


def plain(table):
    return {name: np.asarray(getattr(table[name], "value", table[name])) for name in table.colnames}


@pytest.fixture(scope="module")
def opened(field):
    return Exposure.open(field[0])


@pytest.fixture(scope="module")
def catalogue(opened):
    return measure(opened, weights="fovea-sky")


@pytest.fixture(scope="module")
def arrays(opened):
    return opened.image.data, opened.wcs


def everything(exposure):
    pixels = exposure.read(exposure.image.whole)
    return pixels.data, pixels.bad, exposure.zero_point.value, exposure.pixel_scale.value


def kinds(data, wcs):
    header = wcs.to_header()
    header["MAGZERO"] = 25.9463
    hdu = fits.ImageHDU(data, header, name="SCI")
    yield "HDU", hdu, {}
    yield "HDU list", fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(data[:20, :20]), hdu]), {}
    yield "CCDData", CCDData(data, unit="electron/s", wcs=wcs, meta={"MAGZERO": 25.9463}), {}
    yield "NDData", NDData(data, wcs=wcs), {"zero_point": 25.9463}
    yield "array", data, {"zero_point": 25.9463, "wcs": wcs}
    yield "masked array", np.ma.masked_array(data, np.zeros(data.shape, bool)), {"zero_point": 25.9463, "wcs": wcs}
    yield "integers of the other byte order", np.asarray(data, ">f8"), {"zero_point": 25.9463, "wcs": wcs}


def test_whatever_holds_an_image_makes_the_same_exposure(opened, arrays):
    expected = everything(opened)
    for kind, source, options in kinds(*arrays):
        for here, there in zip(everything(Exposure.of(source, **options)), expected, strict=True):
            np.testing.assert_allclose(here, there, rtol=1e-6, err_msg=kind)


def test_an_array_gives_the_catalogue_of_its_file(catalogue, arrays):
    data, wcs = arrays
    found = measure(Exposure.of_arrays(data, wcs=wcs, zero_point=25.9463), weights="fovea-sky")
    for name, values in plain(catalogue).items():
        np.testing.assert_array_equal(plain(found)[name], values, err_msg=name)
    assert found.meta["IMAGE"] == "the array"


def test_arrays_take_noise_and_mask(arrays, opened):
    data, wcs = arrays
    mask, noise = np.zeros(data.shape, np.uint8), np.full(data.shape, 2.0, np.float32)
    mask[:50], noise[:, :60] = 1, np.nan
    one = Exposure.of_arrays(data, noise=noise, mask=mask, wcs=wcs, zero_point=25.0)
    two = Exposure.of(
        NDData(data, mask=mask.astype(bool), uncertainty=StdDevUncertainty(noise), wcs=wcs), zero_point=25.0
    )
    three = Exposure.of(
        NDData(data, mask=mask.astype(bool), uncertainty=InverseVariance(noise**-2), wcs=wcs), zero_point=25.0
    )
    for exposure in (one, two, three):
        pixels = exposure.read(exposure.image.whole)
        assert pixels.bad[:50].all()
        assert pixels.bad[:, :60].all()
        assert not pixels.bad[50:, 60:].any()
        np.testing.assert_allclose(pixels.noise[50:, 60:], 2.0, rtol=1e-6)


def test_a_ccddata_has_a_zero_point_by_its_unit():
    exposure = Exposure.of(CCDData(np.zeros((30, 30)), unit=units.nJy))
    assert exposure.zero_point.value == pytest.approx(31.4, abs=0.01)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (np.zeros((30, 30)), {}, "no zero point"),
        (np.zeros((2, 30, 30)), {"zero_point": 25.0}, "has 3 axes"),
        (np.zeros((10, 30)), {"zero_point": 25.0}, "at least 16"),
        (np.full((30, 30), "a"), {"zero_point": 25.0}, "an array of numbers"),
        (np.zeros((30, 30)), {"zero_point": 25.0, "noise": np.ones((30, 31))}, "must agree"),
        (np.zeros((30, 30)), {"zero_point": np.nan}, "finite AB magnitude"),
        (np.zeros((30, 30)), {"zero_point": 259463}, "from -100 to 100; received 259463"),
        (np.zeros((30, 30)), {"zero_point": 25.0, "noise": np.ones((30, 30)), "noise_kind": "ivar"}, "received ivar"),
    ],
)
def test_bad_arrays_are_refused(data, options, message):
    with pytest.raises(InputError, match=message):
        Exposure.of(data, **options)


@pytest.mark.parametrize("what", ["noise", "mask"])
def test_a_map_of_a_file_is_a_file_and_that_of_an_array_an_array(field, what):
    with pytest.raises(InputError, match=rf"^`{what}` of an image in a file is a path; received ndarray\. .*"):
        Exposure.of(field[0], **{what: np.ones((10, 10))})
    with pytest.raises(InputError, match=rf"^`{what}` of an image in memory is an array; received str\. "):
        Exposure.of(np.ones((10, 10)), zero_point=25.0, **{what: "map.fits"})


def test_an_exposure_takes_no_more_options(opened):
    assert Exposure.of(opened) is opened
    with pytest.raises(InputError, match="complete; received zero_point"):
        Exposure.of(opened, zero_point=25.0)


def test_the_representation_states_what_was_read(opened):
    assert repr(opened).endswith("512 x 512 pixels, zero point 25.9463 (MAGZERO), 0.06 arcsec per pixel (WCS)>")


def test_a_wcs_that_cannot_be_used_is_named_with_its_reason(blank):
    cards = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 999.0, "CRVAL2": 2.0, "CD1_1": 1e-5, "CD2_2": 1e-5}
    image = Exposure.open(blank(cards={"MAGZERO": 25.0, **cards})).image
    assert image.wcs is None
    assert image.wcs_problem.startswith("its reference value is [999.0")


def test_a_saturation_that_is_no_number_is_told(blank):
    with pytest.warns(SersicnetWarning, match="SATURATE in the header .* received 'unknown': it is ignored"):
        exposure = Exposure.open(blank(cards={"MAGZERO": 25.0, "SATURATE": "unknown"}))
    assert exposure.saturation == np.inf


def test_want_of_memory_is_no_fault_of_the_file(blank, monkeypatch):
    def none(*args, **options):
        raise MemoryError

    path = blank()
    monkeypatch.setattr(fits, "open", none)
    with pytest.raises(MemoryError):
        Exposure.open(path)


def test_a_galaxy_of_an_array_with_its_model_and_residual(arrays, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, wcs = arrays
    exposure = Exposure.of_arrays(data, wcs=wcs, zero_point=25.9463)
    psf = Psf.of(effective_psf(F160W), "F160W")
    catalogue = measure(exposure, psf=psf, refine=Fitting(gain=F160W.exposure))
    row = catalogue[np.argmin(np.where(catalogue["flags"] == 0, catalogue["mag"].value, np.inf))]
    corner = [round(row[name].value) - 32 for name in ("x", "y")]
    galaxy = parameters_of(row, exposure.zero_point.value) - [*corner, 0, 0, 0, 0, 0]
    stamp = data[corner[1] : corner[1] + 64, corner[0] : corner[0] + 64]
    model = Renderer(psf.image, 64)(galaxy)[0]
    middle = slice(22, 43), slice(22, 43)
    assert (stamp - model)[middle].std() < 0.1 * stamp[middle].std()
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import numpy as np
import sersicnet
data = np.random.default_rng(0).normal(0, 1, (300, 300))
y, x = np.indices(data.shape)
data += 300 * np.exp(-np.hypot(x - 150, y - 150) / 4)
exposure = sersicnet.Exposure.of_arrays(data, zero_point=25.0, pixel_scale=0.06)
catalogue = sersicnet.measure(exposure, work=sersicnet.Work(tile=150))
print(len(catalogue), round(float(catalogue["x"][0].value)))
"""


def test_a_script_needs_no_guard_and_leaves_no_file(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "150"]
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


def test_two_equal_runs_at_once_do_not_destroy_each_other(field, tmp_path):
    """The second is refused while the first has finished tiles, and the first ends well."""
    outputs, refused = Outputs(catalogue=tmp_path / "cat.fits"), []

    def meanwhile(stage, done, total):
        if stage.startswith("measuring tiles") and done == 1 and not refused:
            with pytest.raises(InputError, match="is in use: process") as caught:
                measure(field[0], outputs=outputs, work=Work(tile=256))
            refused.append(caught.value)

    table = measure(field[0], outputs=outputs, work=Work(tile=256), report=meanwhile)
    assert refused
    assert len(QTable.read(tmp_path / "cat.fits")) == len(table)
    assert [path.name for path in tmp_path.iterdir()] == ["cat.fits"]


def test_of_two_runs_of_a_single_tile_at_once_the_second_is_refused(field, tmp_path):
    outputs, refused = Outputs(catalogue=tmp_path / "cat.fits"), []

    def meanwhile(stage, done, total):
        if stage == "measuring the sky" and not refused:
            with pytest.raises(InputError, match=r"cat\.fits\.run is in use: process") as caught:
                measure(field[0], outputs=outputs)
            refused.append(caught.value)

    measure(field[0], outputs=outputs, report=meanwhile)
    assert refused
    assert [path.name for path in tmp_path.iterdir()] == ["cat.fits"]


def test_a_wcs_without_a_sky_gives_no_sky(arrays):
    wcs = WCS(naxis=2)
    with pytest.warns(SersicnetWarning, match="no celestial WCS"):
        found = measure(
            Exposure.of_arrays(arrays[0], wcs=wcs, zero_point=25.9463, pixel_scale=0.06),
            positions=QTable({"x": [5.0], "y": [5.0]}),
            psf_fwhm=3.1,
        )
    assert "ra" not in found.colnames


@pytest.fixture
def server(field):
    """Serve the field's directory over HTTP; returns the address of the field."""

    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]
    with subprocess.Popen(
        command, cwd=field[0].parent, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as serving:
        port = re.search(r"port (\d+)", serving.stdout.readline())[1]
        yield f"http://127.0.0.1:{port}/{field[0].name}"
        serving.kill()


def test_an_image_at_an_address_is_the_image_of_the_file(server, opened, tmp_path):
    with set_temp_cache(tmp_path):
        remote = Exposure.of(server)
        bracketed = Exposure.open(f"{server}[1]")
    window = slice(10, 50), slice(20, 60)
    np.testing.assert_array_equal(remote.image.read(window), opened.image.read(window))
    assert remote.name == bracketed.name == f"{server}[1]"
    assert remote.zero_point == opened.zero_point


def test_measure_takes_an_address_and_names_it_in_the_catalogue(server, catalogue, tmp_path):
    options = ["-o", str(tmp_path / "cat.fits"), "-w", "fovea-sky", "--workers", "1", "--quiet"]
    with set_temp_cache(tmp_path), pytest.raises(SystemExit) as done:
        cli.main(["measure", server, *options])
    assert not done.value.code
    measured = QTable.read(tmp_path / "cat.fits")
    np.testing.assert_array_equal(measured["mag"].value, catalogue["mag"].value)
    assert measured.meta["IMAGE"] == f"{server}[1]"


def test_an_address_without_an_image_is_one_line(server, tmp_path):
    with set_temp_cache(tmp_path), pytest.raises(InputError, match=r"can be downloaded; .*nothing.fits cannot: .*404"):
        Exposure.open(server.replace(".fits", "_nothing.fits"))
