"""Galaxies that are added to a mosaic, what is found of them, and the factors on errors that follow."""

import json
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import QTable, Table

from sersicnet import cli, weights
from sersicnet.catalogue import validation
from sersicnet.catalogue.factors import PARAMETERS, Factors, distances, quantities_of
from sersicnet.engine.render import Renderer
from sersicnet.errors import InputError
from sersicnet.image.exposure import Exposure
from sersicnet.image.injected import Galaxies, Injected, Negative, WithPhotonNoise
from sersicnet.image.mosaic import HeldImage
from sersicnet.image.psf import Psf
from sersicnet.image.psferror import stretched
from sersicnet.measuring import validate as validating
from sersicnet.measuring.fitting import Fitting
from sersicnet.measuring.identity import identity
from sersicnet.measuring.injecting import Injection, places
from sersicnet.measuring.measure import measure, plan
from sersicnet.measuring.outputs import Outputs
from sersicnet.measuring.plan import Work
from sersicnet.measuring.validate import validate
from sersicnet.schema import TARGET_NAMES, Flag
from sersicnet.simulating.telescopes import F160W, effective_psf

PSF = Psf.of(effective_psf(F160W, 61), "f160w")
QUIET = pytest.mark.filterwarnings("ignore::sersicnet.errors.SersicnetWarning")


def galaxies(n=5, side=300, gain=3200.0, psf=PSF):
    rng = np.random.default_rng(1)
    rows = np.column_stack([
        rng.uniform(20, side - 20, n), rng.uniform(20, side - 20, n), rng.uniform(5, 50, n), rng.uniform(2, 6, n),
        rng.uniform(0.5, 4, n), rng.uniform(0.3, 1, n), rng.uniform(-90, 90, n),
    ])  # fmt: skip
    return Galaxies(parameters=rows, numbers=np.arange(n) + 7, seed=3, psf=psf, gain=gain, tap=0.3, rms=0.0035)


# --- adding galaxies -----------------------------------------------------------------------------------------


def test_the_pixels_of_added_galaxies_do_not_depend_on_the_window():
    image = Injected(HeldImage(np.random.default_rng(0).normal(0, 0.0035, (300, 300))), galaxies())
    image = pickle.loads(pickle.dumps(image))  # as another process gets it
    whole = image.read(image.whole)
    for rows, columns in (
        (slice(0, 120), slice(40, 300)),
        (slice(120, 300), slice(0, 300)),
        (slice(77, 78), slice(3, 9)),
    ):
        other = Injected(HeldImage(image.image.data), galaxies())
        np.testing.assert_array_equal(other.read((rows, columns)), whole[rows, columns])


def test_an_added_galaxy_is_the_engines_galaxy_with_its_photon_noise():
    one = replace(galaxies(1, gain=np.inf))
    added = Injected(HeldImage(np.full((300, 300), 1.0)), one).read((slice(0, 300), slice(0, 300))) - 1
    drawn = Renderer(PSF.image, 300)(one.parameters)[0]
    assert np.abs(added - drawn).max() < 1e-4 * drawn.max() + 0.02 * one.rms
    noise = [replace(one, gain=100.0, seed=seed).stamp(0)[1].sum() for seed in range(200)]
    expected = np.sqrt(one.stamp(0)[0].sum() / 100.0)
    assert np.std(noise) == pytest.approx(expected, rel=0.15)


def test_pixels_without_data_stay_without():
    data = np.random.default_rng(0).normal(0, 1, (300, 300)).astype(np.float32)
    data[:, :150], data[200, 200] = 0, np.nan
    image = Injected(HeldImage(data), galaxies(20))
    found = image.read(image.whole)
    assert (found[:, :150] == 0).all()
    assert np.isnan(found[200, 200])
    assert (found[:, 150:] != data[:, 150:]).any()


def test_an_uncertain_psf_is_as_uncertain_in_the_galaxies():
    unsure = galaxies(2000, psf=replace(PSF, error=0.05, light_error=0.02))
    factors = np.array([unsure.changes(k) for k in range(len(unsure))])
    assert factors.mean(axis=0) == pytest.approx(1, abs=0.005)
    assert factors.std(axis=0) == pytest.approx([0.05, 0.02], rel=0.05)
    assert np.corrcoef(factors.T)[0, 1] == pytest.approx(0, abs=0.06)
    one = replace(unsure, parameters=np.array([[150, 150, 30, 1.0, 1, 1, 0]] * 5), gain=np.inf)
    peaks = [one.stamp(k)[0][54:74, 54:74].max() for k in range(5)]
    assert np.ptp(peaks) > 0


@pytest.mark.parametrize("kind", ["rms", "var", "wht"])
def test_a_noise_map_with_photon_noise_gets_that_of_the_galaxies(kind):
    one = galaxies(3)
    of_variance = {"rms": np.sqrt, "var": lambda v: v, "wht": lambda v: 1 / v}[kind]
    noise = WithPhotonNoise(HeldImage(of_variance(np.full((300, 300), 4.0))), kind, 1.0, one)
    light = np.zeros((300, 300))
    for there, model, _ in one.drawn_in(noise.whole):
        light[there] += np.maximum(model, 0)
    share = (1 + 2 * 0.3**2) ** 2 / 1.6**4
    expected = of_variance(4.0 + light * share / one.gain)
    np.testing.assert_allclose(noise.read(noise.whole), expected, rtol=1e-5)


def test_the_negative_has_the_same_coordinates():
    image = HeldImage(np.arange(400.0).reshape(20, 20), name="it")
    assert Negative(image).identity() != image.identity()
    np.testing.assert_array_equal(Negative(image).read(image.whole), -image.data)


# --- where and which -----------------------------------------------------------------------------------------


def test_galaxies_of_a_pass_keep_their_distance_and_all_have_a_place():
    data = np.random.default_rng(0).normal(0, 1, (400, 500))
    data[:200] = np.nan
    found = places(Exposure.of_arrays(data, zero_point=25.0), np.full(20, 3.0), seed=1, is_free=lambda x, y: x > 100)
    assert sorted(np.concatenate([one.numbers for one in found]).tolist()) == list(range(20))
    for one in found:
        assert (one.y > 199).all()
        assert (one.x > 100).all()
        assert distances(one.x, one.y).min() >= 88
    with pytest.raises(InputError, match="has no place for a galaxy"):
        places(Exposure.of_arrays(data, zero_point=25.0), np.ones(1), 1, lambda x, y: False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "at least one galaxy"),
        ({"mag": (25.0, 20.0)}, "from bright to faint"),
        ({"avoid": np.nan}, "A magnitude is a number"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Injection(**options)


@pytest.mark.parametrize("evenly", [False, True])
def test_galaxies_are_drawn_from_a_table_or_evenly_over_its_range(tmp_path, evenly):
    table = Table({"mag": np.linspace(18, 26, 50), "r_eff_pix": np.geomspace(20, 2, 50), "n": np.geomspace(0.2, 7, 50),
                   "q": np.linspace(0.2, 1, 50)})  # fmt: skip
    table.write(tmp_path / "t.ecsv")
    injection = Injection(n=400, galaxies=tmp_path / "t.ecsv", evenly=evenly, mag=(20, 25))
    found = injection.drawn(injection.known(np.nan), QTable())
    assert 20 <= found["mag"].min() < 20.3
    assert 24.7 < found["mag"].max() <= 25
    assert np.corrcoef(found["mag"], np.log(found["r_eff_pix"]))[0, 1] == pytest.approx(0 if evenly else -1, abs=0.15)
    assert found["sersic_n"].min() >= 0.3
    with pytest.raises(InputError, match=r"none of the 50 .*: row 1 has mag = 18"):
        Injection(galaxies=tmp_path / "t.ecsv", mag=(10, 12)).known(np.nan)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("re", 0.0, "row 1 has re = 0"),
        ("r_eff_pix", -2.0, "row 1 has r_eff_pix = -2"),
        ("r_eff", np.nan, "row 1 has r_eff = nan"),
        ("r_eff_pix", 400.0, "row 1 has r_eff_pix = 400"),
        ("n", 9.5, "row 1 has n = 9.5"),
        ("q", 0.0, "row 1 has q = 0"),
        ("MAG", 99.0, "row 1 has MAG = 99"),
    ],
)
def test_a_table_of_which_nothing_can_be_drawn_names_a_value_that_is_in_the_way(tmp_path, name, value, told):
    good = {"r_eff_pix": 3.0, "mag": 22.0, "n": 1.0, "q": 0.5}
    same = {"re": "r_eff_pix", "r_eff": "r_eff_pix", "MAG": "mag"}.get(name, name)
    columns = {name if key == same else key: [value if key == same else one] * 2 for key, one in good.items()}
    table = Table(columns)
    if name == "re":
        table["re"].unit = "pix"
    table.write(tmp_path / "t.ecsv")
    with pytest.raises(InputError, match=f"a radius above 0 .*none of the 2 .* is one: {told}"):
        Injection(galaxies=tmp_path / "t.ecsv").known(0.06)


def test_galaxies_of_candels_need_a_pixel_scale_and_a_range():
    with pytest.raises(InputError, match="has no pixel scale"):
        Injection().known(np.nan)
    few = QTable({name: np.ones(3) for name in ("mag", "r_eff_pix", "sersic_n", "ellipticity")})
    with pytest.raises(InputError, match="at least 20 are needed; 3 were found"):
        Injection().drawn(Injection().known(0.06), few)
    drawn = Injection(n=50, mag=(20, 22)).drawn(Injection().known(0.06), few)
    assert drawn["mag"].min() >= 20
    assert drawn["mag"].max() <= 22


# --- purity --------------------------------------------------------------------------------------------------


def of_detections(own, negative):
    """A validation of one galaxy that was added, with detections by magnitude and flags."""
    true = {f"true_{name}": [value] for name, value in zip(TARGET_NAMES, (20.2, 3.0, 1.0, 0.3), strict=True)}
    detections, noise = (
        np.column_stack([np.tile([np.nan, 3.0, 1.0, 0.3], (len(rows), 1)), np.zeros(len(rows))])
        for rows in (own, negative)
    )
    detections[:, [0, -1]], noise[:, [0, -1]] = own, negative
    return validation.Validation(QTable({**true, "found": [True], "merged": [False]}), detections, noise, 3.0, {})


def test_purity_is_stated_of_all_detections_and_of_those_without_flags(tmp_path):
    low = int(Flag.LOW_SNR)
    found = of_detections(
        [(20.1, 0), (20.2, 0), (20.3, 0), (20.4, low), (21.0, 0)], [(20.1, low), (20.4, low), (20.3, 0)]
    )
    (share,) = (one for one in found.shares() if one.by == "mag")
    assert (share.detections, share.negative, share.purity) == (4, 3, 0.25)
    assert (share.clean, share.clean_negative, share.clean_purity) == (3, 1, pytest.approx(2 / 3))
    (alone,) = (one for one in of_detections([(20.1, low)], [(20.1, 0)]).shares() if one.by == "mag")
    assert np.isnan(alone.clean_purity)
    found.write(tmp_path / "v.fits")
    written = Table.read(tmp_path / "v.fits", hdu="SHARES")[0]
    assert (written["clean"], written["clean_negative"], written["clean_purity"]) == (3, 1, pytest.approx(2 / 3))


def test_noise_counts_against_galaxies_if_its_flags_would_count_in_the_mosaic(monkeypatch):
    monkeypatch.setattr(validation, "weights_of", lambda truth, measured, own, negative: (own, negative))
    flags = [0, Flag.LOW_SNR, Flag.EDGE, Flag.POINT_LIKE]
    found = of_detections([(20.0, flag) for flag in flags], [(20.0, flag) for flag in flags])
    found.__dict__["counted"] = np.array([False])
    for name in TARGET_NAMES:
        found.rows[name] = np.nan
    assert [values.shape for values in found.stands_for] == [(2, 4), (2, 4)]


# --- the whole of it -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A small mosaic."""
    from sersicnet.simulating.field import Field, simulate_field

    path = tmp_path_factory.mktemp("validate") / "small.fits"
    return simulate_field(path, Field(400, n=25, seed=4, mag=(19.0, 23.0)))[0]


@pytest.fixture(scope="module")
def done(image, tmp_path_factory):
    """A validation with 27 galaxies, which are enough for factors here, its file and its page."""
    path = tmp_path_factory.mktemp("done") / "val.fits"
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr(validation, "LEAST", 10)
        found = run(image, path, n=27)
    return found, path


def run(image, path=None, *, n=12, mag=(20.0, 24.0), **options):
    return validate(image, path, psf=PSF, gain=3200.0, injection=Injection(n=n, mag=mag, seed=2), **options)


def measured(image, **options):
    """Measure with the options of `run`; the gain is one where the network is shown the photon noise."""
    gain = 3200.0 if "psf" in weights.load(weights.DEFAULT).inputs else None
    return measure(image, psf=PSF, gain=gain, **options)


@QUIET
def test_the_repr_of_a_validation_sums_it_up(done):
    found, _ = done
    first, *others = repr(found).splitlines()
    assert first.endswith(f"small.fits[1]: 27 galaxies added, {found.rows['found'].sum()} found")
    names = ["mag", "ln r_eff_pix", "ln sersic_n", "ellipticity", "theta"]
    assert [line.split(":")[0].strip() for line in others] == names
    overall = [one for one in found.statistics() if one.by == "all"]
    assert f"bias {overall[1].bias:+.3f} ± " in others[1]


@QUIET
def test_truth_stands_beside_measurement_and_the_bright_are_found(done):
    found, path = done
    rows = found.rows
    assert len(rows) == 27
    assert path.with_suffix(".html").exists()
    assert not path.with_name("val.fits.run").exists()
    bright = rows["true_mag"].value < 22
    assert np.mean(rows["found"][bright]) > 0.8
    hit = rows[rows["found"]]
    off = np.hypot(hit["x"].value - hit["true_x"].value, hit["y"].value - hit["true_y"].value)
    assert (off <= np.maximum(hit["true_r_eff_pix"].value / 2, PSF.fwhm)).all()
    assert np.isnan(rows["mag"].value[~rows["found"]]).all()
    assert np.median(np.abs(hit["mag_auto"].value - hit["true_mag"].value)) < 0.3
    assert rows["true_r_eff"].unit == "arcsec"
    with fits.open(path) as hdus:
        assert [hdu.name for hdu in hdus[1:]] == ["GALAXIES", "STATISTICS", "SHARES", "FACTORS"]
    again = Table.read(path, hdu="GALAXIES")
    np.testing.assert_array_equal(again["true_mag"], rows["true_mag"].value)


@QUIET
def test_tiles_do_not_change_a_validation(image):
    one, other = (run(image, n=5, work=Work(tile=tile)) for tile in (2048, 200))
    for name in one.rows.colnames:
        np.testing.assert_array_equal(one.rows[name], other.rows[name], err_msg=name)


@pytest.fixture
def no_page(monkeypatch):
    """Leave out the page, which takes longer than the measurement."""
    monkeypatch.setattr(validating.validationpage, "write", lambda path, *rest: path.touch())


@QUIET
def test_an_interrupted_validation_continues(image, tmp_path, monkeypatch, no_page):
    measured = validating._matched
    calls = []

    def stop(*given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measured(*given)

    monkeypatch.setattr(validating, "_matched", stop)
    path = tmp_path / "v.fits"
    with pytest.raises(KeyboardInterrupt):
        run(image, path)
    assert list(tmp_path.iterdir()) == [path.with_name("v.fits.run")]
    run(image, path)
    assert len(calls) == 3  # the first pass was kept
    with pytest.raises(InputError, match="exists already"):
        run(image, path)


@QUIET
def test_validated_errors_hold_and_are_recorded(image, done):
    found, path = done
    plain = measured(image)
    corrected = measured(image, validated=path)
    np.testing.assert_array_equal(plain["mag"], corrected["mag"])
    assert corrected.meta["VALFILE"] == "val.fits"
    assert corrected.meta["VALBIAS"] is False
    factors = found.factors
    errors = np.column_stack([plain[f"{name}_err"].value.astype(float) for name in PARAMETERS])
    targets = np.column_stack([plain[name].value.astype(float) for name in TARGET_NAMES])
    where = quantities_of(targets, errors, distances(plain["x"].value, plain["y"].value), PSF.fwhm)
    expected = errors * np.exp(factors.errors.at(where))
    expected[:, -1] = np.minimum(expected[:, -1], 52)
    found_errors = np.column_stack([corrected[f"{name}_err"].value for name in PARAMETERS])
    np.testing.assert_allclose(found_errors, expected, rtol=2e-3)
    np.testing.assert_allclose(corrected["r_eff_err"].value, found_errors[:, 1] * 0.06, rtol=1e-4)
    freed = measured(image, validated=path, debias=True)
    bias = factors.bias.at(where[:, :4])[:, 0]
    np.testing.assert_allclose(freed["mag"].value, plain["mag"].value - bias, atol=1e-3)
    assert freed.meta["VALBIAS"]


@QUIET
def test_models_of_debiased_fits_are_those_that_were_fitted(image, done, monkeypatch):
    monkeypatch.setattr(Factors, "check", lambda *options: None)  # it was made without fits
    options = {"psf": PSF, "gain": 3200.0, "refine": Fitting(gain=3200.0)}
    plain = plan(image, **options).result().values
    freed = plan(image, validated=done[1], debias=True, **options).result()
    np.testing.assert_array_equal(freed.values.targets, plain.targets)
    assert np.nanmax(np.abs(freed.table["sersic_n"] - plain.targets[:, 2])) > 1e-3


@QUIET
def test_a_validation_of_something_else_is_refused_and_nothing_is_written(image, done, tmp_path, blank):
    _, path = done
    output = Outputs(catalogue=tmp_path / "cat.fits")
    with pytest.raises(InputError, match="is of another mosaic"):
        measured(Exposure.open(blank(), pixel_scale=0.06), validated=path, outputs=output)
    with pytest.raises(InputError, match="is not a file that `sersicnet validate` writes"):
        measured(image, validated=image, outputs=output)
    with pytest.raises(InputError, match=r"writes, but an image\. Give"):
        measured(image, validated=image, outputs=output)
    catalogues = Table({"x": [1.0], "y": [2.0]}, meta={"IMAGE": "a.fits"})
    for name in ("a.fits", "a.csv"):
        catalogues.write(tmp_path / name)
        with pytest.raises(InputError, match=f"{name} is not a file that .* writes, but a catalogue or another table"):
            measured(image, validated=tmp_path / name, outputs=output)
        (tmp_path / name).unlink()
    with pytest.raises(InputError, match="there is none at"):
        measured(image, validated=tmp_path / "none.fits", outputs=output)
    with pytest.raises(InputError, match="give `validated` with it"):
        measured(image, debias=True, outputs=output)
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "blank.fits"] == []


def changed(image, tmp_path, data=lambda data: data, **cards):
    """A copy of the image with other pixels or cards."""
    with fits.open(image) as hdus:
        header = hdus["SCI"].header.copy()
        for key in ("ZBITPIX", "CHECKSUM", "DATASUM"):
            header.remove(key, ignore_missing=True)
        header.update(cards)
        fits.writeto(tmp_path / "changed.fits", data(hdus["SCI"].data), header)
    return tmp_path / "changed.fits"


def a_map(tmp_path, value):
    """A map of the image with one value."""
    fits.writeto(tmp_path / "map.fits", np.full((400, 400), value, np.float32))
    return tmp_path / "map.fits"


@QUIET
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image, tmp: {"exposure": changed(image, tmp, lambda data: data + data.std())}, "another mosaic"),
        (lambda image, tmp: {"exposure": changed(image, tmp, lambda data: data[:390])}, "another mosaic"),
        (
            lambda image, tmp: {"exposure": Exposure.open(image, zero_point=26.0)},
            "zero point was 25.9463, and is 26 now",
        ),
        (lambda image, tmp: {"exposure": Exposure.open(image, pixel_scale=0.05)}, "pixel scale was 0.06, and is 0.05"),
        (lambda image, tmp: {"exposure": Exposure.open(image, noise=a_map(tmp, 1.0))}, "another noise map"),
        (lambda image, tmp: {"exposure": Exposure.open(image, mask=a_map(tmp, 0.0))}, "another mask"),
        (lambda image, tmp: {"exposure": changed(image, tmp, FILTER="F125W")}, 'instrument was "WFC3 F160W"'),
        (lambda image, tmp: {"exposure": changed(image, tmp, SATURATE=50.0)}, "saturation was"),
        (lambda image, tmp: {"psf": stretched(PSF, 1.05)}, "another PSF"),
        (lambda image, tmp: {"psf": None}, "another PSF"),
        (lambda image, tmp: {"psf": None, "psf_fwhm": 3.0}, "another PSF"),
        (lambda image, tmp: {"gain": 1600.0}, "gain was 3200, and is 1600 now"),
        (lambda image, tmp: {"gain": None}, "gain was 3200, and is null now"),
        (lambda image, tmp: {"weights": replace(weights.load("fovea"), sha256="0" * 64)}, "other weights"),
        (lambda image, tmp: {"refine": Fitting(gain=3200.0)}, "other options: refine"),
        (lambda image, tmp: {"positions": Table({"x": [50.0], "y": [50.0]})}, "positions was false, and is true now"),
    ],
)
def test_a_validation_is_of_one_image_and_one_set_of_options(image, done, tmp_path, change, message):
    options = {"exposure": image, "psf": PSF, "gain": 3200.0, "weights": "fovea", **change(image, tmp_path)}
    with pytest.raises(InputError) as refused:
        plan(options.pop("exposure"), validated=done[1], **options)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@QUIET
def test_an_image_without_a_pixel_scale_can_be_validated_and_the_prior_is_known_by_its_content(done, tmp_path):
    """A pixel scale that is not known is not equal to itself."""
    image = Exposure.of_arrays(np.random.default_rng(0).normal(0, 1, (300, 300)), zero_point=25.0)
    prior = tmp_path / "prior.csv"
    options = []
    for rows in ("mag,r_eff_pix\n20,3\n", "mag,r_eff_pix\n20,4\n"):
        prior.write_text(rows)
        options.append(plan(image, psf=PSF, weights="fovea").options() | {"refine": refine_of(image, prior)})
    assert options[0]["pixel scale"] is None
    Factors(*[None] * 3, 3.0, json.loads(json.dumps(options[0])), "v.fits").check(options[0])
    with pytest.raises(InputError, match="other options: refine"):
        Factors(*[None] * 3, 3.0, options[0], "v.fits").check(options[1])


def refine_of(image, prior):
    return identity(image, {}, positions=False, fitting=Fitting(prior=prior))["refine"]


@QUIET
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning:distributed")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_cluster_gives_the_same_validation(image):
    from distributed import LocalCluster

    with (
        warnings.catch_warnings(),
        LocalCluster(n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address=None) as cluster,
    ):
        on_cluster = run(image, n=5, work=Work(tile=200, scheduler=cluster.scheduler_address))
        alone = run(image, n=5, work=Work(tile=200))
    for name in alone.rows.colnames:
        np.testing.assert_array_equal(on_cluster.rows[name], alone.rows[name], err_msg=name)


def command(capsys, *arguments):
    """Exit code, stdout and stderr of `sersicnet validate`."""
    with pytest.raises(SystemExit) as left:
        cli.main(["validate", *map(str, arguments)])
    out = capsys.readouterr()
    return left.value.code or 0, out.out, out.err


def test_the_command_writes_the_mosaic_with_galaxies_if_asked_and_few_galaxies_give_no_factors(
    image, tmp_path, no_page, capsys
):
    fits.writeto(tmp_path / "psf.fits", PSF.image)
    output, added = tmp_path / "v.fits", tmp_path / "with.fits"
    code, out, err = command(
        capsys, image, "-o", output, "--psf", tmp_path / "psf.fits", "--gain", 3200, "--n", 2,
        "--mag", 20, 22, "--injected", added, "--workers", 1, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["galaxies"] == 2
    assert f"wrote {output} and {output.with_suffix('.html')}" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["psf.fits", "v.fits", "v.html", "with.fits"]
    difference = fits.getdata(added) - fits.getdata(image)
    rows = Table.read(output, hdu="GALAXIES")
    flux = 10 ** (-0.4 * (rows["true_mag"] - F160W.zero_point))
    assert difference.sum() == pytest.approx(np.sum(flux), rel=0.05)
    with pytest.raises(InputError, match="has no factors on errors"):
        Factors.read(output)


def test_a_dry_run_says_what_would_be_added_and_does_nothing(image, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(capsys, image, "--dry-run", "--n", 30, "--mag", 20, 24, "--gain", 3200)
    assert (code, err) == (0, "")
    assert "400 x 400 pixels" in out
    assert "galaxies     30, those of CANDELS; mag 20 to 24" in out
    assert "at least 4, after the image and its negative" in out
    assert "small_validation.fits" in out
    code, out, _ = command(capsys, image, "--dry-run", "--evenly", "--json")
    facts = json.loads(out)
    assert (facts["galaxies"], facts["mag"], facts["tiles"]) == (2000, None, 1)
    assert facts["seconds"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "v.txt"), "A validation is a file that ends in .fits; received v.txt"),
        (("-o", "v.fits", "--injected", "v.fits"), "Each output needs a name of its own"),
        (("--mag", 25, 20), "A range of magnitudes is from bright to faint; received --mag (25.0, 20.0)"),
        (("--galaxies", "none.csv"), "there is none at none.csv"),
        (("--weights", "nothing"), "nothing"),
        (("--gain", 0), "A gain is a positive number"),
        (("--dry-run", "-o", "v.txt"), "A validation is a file that ends in .fits; received v.txt"),
        (("--dry-run", "--weights", "nothing"), "nothing"),
    ],
)
def test_a_bad_input_is_one_line_and_nothing_is_written(image, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(capsys, image, *arguments)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert message in err
    assert list(tmp_path.iterdir()) == []


@QUIET
def test_a_refusal_after_the_mosaic_was_measured_leaves_nothing_that_other_options_would_be_refused_for(blank):
    path = blank()
    with pytest.raises(InputError, match="Give `mag`, and a table"):
        validate(Exposure.open(path, pixel_scale=0.06), path.with_name("v.fits"), psf=PSF)
    assert list(path.parent.iterdir()) == [path]


def test_the_page_needs_no_network(done):
    text = done[1].with_suffix(".html").read_text("utf-8")
    assert text.count("<img") >= 6
    for forbidden in ("http://", "https://", "<script", 'src="/', "@import"):
        assert forbidden not in text
    assert "most wrong" in text


def test_a_galaxy_in_a_brighter_source_is_lost(done):
    """And a fainter source is a galaxy only if the galaxy's light is added to it."""
    at = np.array([100.0, 50.0, 300.0, 400.0])
    table = QTable({"x": at, "y": at, "flags": np.zeros(4, int), "mag_auto": [19.0, 22.0, 24.0, 21.9]})
    old = np.array([100.0, 300.0, 400.0])
    scene = validating._Scene(None, None, PSF, 1.0, 0.0, 1.0, old, old, np.array([19.0, 24.0, 24.0]))
    drawn = {"mag": np.array([22.0, 22.0, 23.0, 22.0, 22.0]), "r_eff_pix": np.full(5, 3.0)}
    x = np.array([101.0, 51.0, 200.0, 301.0, 401.0])
    found = validating._matched(scene, drawn, validating.Places(np.arange(5), x, np.floor(x / 50) * 50), table)
    assert found["found"].tolist() == [False, True, False, False, True]
    assert found["merged"].tolist() == [True, False, False, False, False]
    assert found["distance"][1] == pytest.approx(np.hypot(50, 50))
