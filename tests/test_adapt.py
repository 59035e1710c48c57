import contextlib
import re
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table

from sersicnet import cli, weights
from sersicnet.engine.noise import photon_noise
from sersicnet.errors import DatasetError, InputError, SersicnetWarning
from sersicnet.image import detect, mosaic
from sersicnet.image import header as instrument
from sersicnet.image import stars as points
from sersicnet.image.psf import Psf, full_width
from sersicnet.image.psffile import read_psf
from sersicnet.image.views import psf_views
from sersicnet.measuring.measure import measure
from sersicnet.schema import noise_numbers
from sersicnet.simulating.field import Field, simulate_field
from sersicnet.simulating.neighbours import Camera
from sersicnet.simulating.population import POINT
from sersicnet.simulating.recipe import Prior, Simulation
from sersicnet.simulating.telescopes import F160W, effective_psf
from sersicnet.training import adapt, labels, loop

SCALE = 0.08


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    """A mosaic of another survey: larger pixels, another zero point, a wider PSF, galaxies and stars."""
    from dataclasses import replace

    ours = replace(F160W, name="ours", pixel_scale=SCALE, zero_point=24.0, blur=0.06, exposure=20_000.0)
    path = tmp_path_factory.mktemp("survey") / "ours.fits"
    field = Field(512, n=24, seed=3, mag=(18.0, 21.5), instrument=ours, rms=0.004)
    simulate_field(path, field)
    with fits.open(path) as hdus:
        header, image = hdus["SCI"].header, hdus["SCI"].data.astype(np.float32)
    camera, rng = Camera(effective_psf(ours)), np.random.default_rng(4)
    stars = np.zeros(image.shape, np.float32)
    for _ in range(16):
        x, y = rng.uniform(70, 440, 2)
        corner = np.rint([x, y]).astype(int) - 64
        star = np.array([x - corner[0], y - corner[1], 10 ** (-0.4 * (rng.uniform(18.5, 20) - 24.0)), POINT, 1, 1, 0])
        stars[corner[1] : corner[1] + 128, corner[0] : corner[0] + 128] += camera.render(star, 128)
    image += stars + photon_noise(stars, ours.exposure, ours.noise_tap, rng)
    cards = {k: header[k] for k in ("CTYPE1", "CTYPE2", "CRVAL1", "CRVAL2", "CRPIX1", "CRPIX2", "CDELT1", "CDELT2")}
    fits.PrimaryHDU(image, fits.Header({**cards, "MAGZERO": 24.0})).writeto(path, overwrite=True)
    return path, ours


class KilledError(Exception):
    pass


def until(wanted, at=0):
    """A report that kills the run at a stage."""

    def kill(stage, done, total):
        if stage.startswith(wanted) and done >= at:
            raise KilledError

    return kill


@pytest.fixture(scope="module")
def quick_plan():
    """Galaxies without neighbours, which are drawn much faster; that neighbours were asked for is checked."""
    plan = Simulation.of_options

    def without(*arguments, neighbours, **options):
        assert neighbours
        return plan(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Simulation, "of_options", without)
        yield


@pytest.fixture(scope="module")
def adapted(survey, tiny_weights, tmp_path_factory, quick_plan):
    """Weights adapted to the survey by a run that was killed twice; what was told, and done each time."""
    directory = tmp_path_factory.mktemp("adapted")
    calls, lines, history = [], [], []

    def spied(module, name):
        original = getattr(module, name)

        def call(*arguments, **named):
            calls.append(name)
            return original(*arguments, **named)

        return call

    def run(**more):
        calls.clear()
        try:
            done = adapt.adapt(survey[0], directory / "w", base=tiny_weights, n=32, gain=20_000.0, workers=1, **more)
        finally:
            history.append((list(calls), [p.name for p in directory.iterdir()]))
        return done

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*blank patches")
        for module, name in ((points, "find_stars"), (adapt, "simulate"), (adapt, "train")):
            patch.setattr(module, name, spied(module, name))
        for stage, at in (("simulating", 16), ("testing", 0)):
            with contextlib.suppress(KilledError):
                run(epochs=1, report=until(stage, at), tell=lines.append)
        with pytest.raises(InputError, match="unfinished run with other options"):
            run(epochs=2)
        done = run(epochs=1)
    return done, lines, history


def test_the_psf_of_a_mosaic_is_that_of_its_stars(survey, adapted):
    _, ours = survey
    measured, truth = read_psf(adapted[0].path / adapt.PSF), effective_psf(ours)
    assert measured.fwhm == pytest.approx(full_width(truth), rel=0.02)
    y, x = np.indices(measured.image.shape) - measured.image.shape[0] // 2
    half = truth.shape[0] // 2
    for radius in (2, 5, 20):
        enclosed = truth[half - radius : half + radius + 1, half - radius : half + radius + 1]
        box = (abs(x) <= radius) & (abs(y) <= radius)
        assert measured.image[box].sum() == pytest.approx(enclosed.sum(), abs=0.03)
    assert fits.getheader(adapted[0].path / adapt.PSF)["STARS"] == adapted[0].card["adapted"]["stars"] >= 5


def test_the_card_has_the_domain_of_the_mosaic(survey, adapted):
    card = adapted[0].card
    domain, found = card["domain"], card["adapted"]
    assert domain["instrument"] == "ours.fits[0]"
    assert domain["pixel_scale"] == pytest.approx(SCALE)
    assert domain["zero_point"] == 24.0
    assert domain["psf_fwhm"] == pytest.approx(found["psf_fwhm"], rel=1e-5)
    assert domain["rms"][0] <= 0.0044
    assert domain["rms"][1] >= 0.0036
    assert domain["ranges"]["mag"] == [16, pytest.approx(depth(found))]
    assert card["data"]["n"] == 32
    assert card["data"]["config"]["instrument"]["exposure"] == 20_000
    assert found["rms"] == pytest.approx(0.004, rel=0.1)
    assert found["correlation"] == pytest.approx(2.0, abs=0.5)
    assert found["before"]["all"]["n"] == card["scores"]["samples"]["all"]["n"] == 16
    assert card["base"]["name"] == "tiny"
    assert card["name"] == "w"
    assert [limit.split()[0] for limit in card["limits"]] == ["Knows", "Errors", "Stars"]


def test_what_was_measured_is_told_before_and_after(adapted):
    done, lines, _ = adapted
    assert "stars in the PSF; FWHM" in lines[0]
    assert "simulating 48 galaxies: about" in lines[1]
    assert any(re.fullmatch(r"training on .+: 32 galaxies, 1 epoch", line) for line in lines)
    table = adapt.as_markdown(done)
    assert "| tiny | R² |" in table
    assert "| w | R² |" in table


def test_adapted_weights_measure_their_mosaic(survey, adapted):
    table = measure(survey[0], weights=adapted[0].path)
    assert len(table) > 20
    assert not adapted[0].path.with_name("w.run").exists()


def test_how_long_training_takes_is_told_once_it_is_known(survey, tiny_weights, tmp_path, monkeypatch):
    lines, named = [], {"sources": 9, "galaxies": 9, "stars": 9, "psf_source": "stars", "next_correlation": 0.3}
    monkeypatch.setattr(adapt, "_measure", lambda *arguments: {**SEEN, **named})
    monkeypatch.setattr(adapt, "_simulate", lambda *arguments: None)

    def trained(*arguments, report, **options):
        for step in (1, 99, 150, 200):
            speed = np.nan if step == 1 else 640.0
            report(loop.Progress(1, 3, step, 400, 0.5, None, stamps_per_second=speed))
        raise KilledError

    monkeypatch.setattr(adapt, "train", trained)
    with pytest.raises(KilledError):
        adapt.adapt(survey[0], tmp_path / "w", base=tiny_weights, n=32, gain=20_000.0, tell=lines.append)
    assert [line.split(",")[0] for line in lines if "an epoch" in line] == ["about 40 s an epoch (640 stamps/s"]


def test_a_killed_run_continues_where_it_was(adapted):
    _, _, history = adapted
    assert history == [
        (["find_stars", "simulate"], ["w.run"]),
        (["simulate", "simulate", "train"], ["w.run"]),
        ([], ["w.run"]),
        ([], ["w"]),
    ]


SEEN = {"image": "a.fits", "zero_point": 24.0, "rms": 0.02, "correlation": 1.0, "mag": [18.0, 20.0, 22.0]}
SEEN |= {"psf_fwhm": 0.24, "pixel_scale": 0.08}
DEEP = {**SEEN, "rms": 2e-4, "mag": [18.0, 24.0, 26.2]}


def depth(found):
    """Magnitude of a point source with a signal to noise of 5 in a circle of one FWHM."""
    pixels = np.pi**0.5 * found["psf_fwhm"] / found["pixel_scale"]
    return found["zero_point"] - 2.5 * np.log10(5 * found["rms"] * found["correlation"] * pixels)


@pytest.mark.parametrize("found", [SEEN, DEEP])
def test_the_prior_ends_where_the_mosaic_does(found):
    prior = adapt._detectable("candels", found)
    assert prior.mag == (16, pytest.approx(min(depth(found), 27)))
    assert prior.uniform == adapt.RARE
    rng = np.random.default_rng(0)
    drawn = [prior.joint.draw(rng, prior.ranges)["mag"] for _ in range(1000)]
    assert np.median(drawn) == pytest.approx((18 + prior.mag[1]) / 2, abs=0.5)


def test_a_table_ends_where_the_mosaic_does(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "galaxies.csv"
    columns = {"mag": (18, 25), "r_eff_pix": (2, 20), "sersic_n": (1, 3), "ellipticity": (0.1, 0.8)}
    Table({name: rng.uniform(*ends, 300) for name, ends in columns.items()}).write(path)
    assert adapt._detectable(path, SEEN).mag == (pytest.approx(18, abs=0.1), pytest.approx(depth(SEEN)))
    with pytest.warns(SersicnetWarning, match=r"magnitudes 18.0 to 26.2 .* the prior 18.\d+ to 24.\d+\. Outside"):
        assert adapt._detectable(path, DEEP).mag[1] == pytest.approx(25, abs=0.1)


def test_radii_of_the_prior_are_angles():
    drawn = []
    for scale in (0.06, 0.12):
        prior, rng = Prior.candels(scale), np.random.default_rng(1)
        ranges = {**prior.ranges, "r_eff_pix": (0.01, 1000.0)}
        drawn.append([prior.joint.draw(rng, ranges)["r_eff_pix"] * scale for _ in range(50)])
    np.testing.assert_allclose(*drawn)


def test_the_galaxies_of_a_mosaic_are_unlabelled_and_no_stars(survey):
    frame = mosaic.read_image(survey[0])
    bad = frame.without_data()
    sky, found = detect.Detector()(frame.data, bad)
    stars = points.find_stars(frame.data, bad, sky, found)
    good = points.good_galaxies(frame.data, bad, sky, found)
    assert not (good & stars.alike).any()
    galaxies = labels.real_galaxies(survey[0])
    assert 3 < len(galaxies) == good.sum() < len(found) - stars.alike.sum()
    assert galaxies.is_real.all()
    assert np.isnan(galaxies.targets).all()
    assert galaxies.inputs(0, len(galaxies)).finite().all()
    np.testing.assert_allclose(galaxies.mag, 24.0 - 2.5 * np.log10(found.flux[good]))


def test_galaxies_of_a_mosaic_are_shown_what_simulated_ones_are(survey):
    path, ours = survey
    psf, inputs = effective_psf(ours), frozenset({"stamps", "psf", "noise"})
    galaxies = labels.mosaic_galaxies(path, inputs=inputs, like=(psf, ours))
    seen = galaxies.inputs(0, len(galaxies))
    np.testing.assert_allclose(seen.psf[-1], psf_views(psf))
    np.testing.assert_allclose(seen.noise, np.tile(noise_numbers(ours.correlation, 80.0), (len(galaxies), 1)), atol=0.1)


def seen_by(monkeypatch, psf):
    """Replace all stages of `adapt` but those that cut galaxies; the galaxies that would train."""
    galaxies, named = [], {"sources": 9, "galaxies": 9, "stars": 9, "psf_source": "stars", "next_correlation": 0.3}

    def simulated(image, run, *arguments):
        fits.PrimaryHDU(psf).writeto(run / adapt.PSF)

    def trained(run, start, real, *arguments):
        galaxies.append(real)
        raise KilledError

    for name, stage in (("_measure", lambda *_: {**SEEN, **named}), ("_simulate", simulated), ("_train", trained)):
        monkeypatch.setattr(adapt, name, stage)
    return galaxies


def test_galaxies_are_cut_from_a_mosaic_of_any_name(survey, tiny_weights, tmp_path, monkeypatch):
    path, ours = survey
    galaxies = seen_by(monkeypatch, effective_psf(ours))
    image = shutil.copy(path, tmp_path / "ours.img")
    with pytest.raises(KilledError):
        adapt.adapt(image, tmp_path / "w", base=tiny_weights, how="dann", n=32, gain=20_000.0)
    assert len(galaxies[0]) == len(labels.mosaic_galaxies(path))


def test_a_run_does_not_continue_with_another_table_of_the_same_name(survey, tiny_weights, tmp_path, monkeypatch):
    seen_by(monkeypatch, effective_psf(survey[1]))
    rng, path = np.random.default_rng(0), tmp_path / "galaxies.csv"
    columns = {"mag": (18, 22), "r_eff_pix": (2, 20), "sersic_n": (1, 3), "ellipticity": (0.1, 0.8)}
    for expected in (pytest.raises(KilledError), pytest.raises(InputError, match=r"other options .*galaxies\.sha256")):
        Table({name: rng.uniform(*ends, 300) for name, ends in columns.items()}).write(path, overwrite=True)
        with expected:
            adapt.adapt(survey[0], tmp_path / "w", base=tiny_weights, n=32, gain=20_000.0, prior=path)


def test_an_image_without_galaxies_has_none(blank):
    with pytest.raises(DatasetError, match="no galaxy with a signal to noise of 10"):
        labels.real_galaxies(blank())


def test_without_stars_a_psf_is_asked_for(field, tiny_weights, tmp_path):
    """The narrowest galaxy is wider than the PSF of the weights, which cannot stand in for that of the mosaic."""
    with pytest.raises(InputError, match=r"fewer than 5 stars .* give `psf`"):
        adapt.adapt(field[0], tmp_path / "w", base=tiny_weights, n=32)
    assert not (tmp_path / "w").exists()


def test_an_extension_of_the_mosaic_is_chosen(field, tiny_weights, tmp_path, capsys):
    image = mosaic.read_image(field[0])
    other = fits.ImageHDU(np.ones((30, 30), np.float32), name="OTHER")
    mine = fits.ImageHDU(image.data, fits.Header({"PHOTFLAM": 1.9275602e-20, "PHOTPLAM": 15369.176}), name="MINE")
    fits.HDUList([fits.PrimaryHDU(), other, mine]).writeto(tmp_path / "two.fits")
    with pytest.raises(SystemExit):
        cli.main(["adapt", str(tmp_path / "two.fits"), "--hdu", "7", "-o", str(tmp_path / "w")])
    assert "has no extension 7; it has 0 PRIMARY, 1 OTHER, 2 MINE" in capsys.readouterr().err
    with pytest.raises(InputError, match="fewer than 5 stars"):
        adapt.adapt(tmp_path / "two.fits", tmp_path / "w", base=tiny_weights, n=32, hdu="MINE", pixel_scale=0.06)


def test_the_psf_of_the_weights_stands_in_where_a_point_source_agrees(tiny_weights):
    start = weights.load(tiny_weights)
    size = points.size_of(Psf.of(effective_psf(F160W), "f160w"))
    frame = SimpleNamespace(name="few.fits")
    for factor, fits_in in ((1.03, True), (1.2, False), (0.8, False)):
        stars = SimpleNamespace(size=np.array([np.nan, factor * size]), snr=np.array([0, 99.0]))
        with pytest.warns(SersicnetWarning, match="the PSF of tiny is taken") if fits_in else pytest.raises(InputError):
            adapt._psf_of_weights(frame, stars, instrument.Reading(0.06, "WCS"), start)
    with pytest.raises(InputError, match="give `psf`"):
        adapt._psf_of_weights(frame, stars, instrument.Reading(0.1, "WCS"), start)


@pytest.mark.filterwarnings("ignore:.*blank patches")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"how": "magic"}, "alignment of features is none, dann or daregram; received magic"),
        ({"n": 8}, "`n` of at least 32 simulated galaxies; received 8"),
        ({"gain": -1.0}, "positive number of electrons"),
        ({"prior": "none.csv"}, "there is none"),
        ({"psf": "none.fits"}, "no such file"),
        ({"zero_point": 12.0}, "the prior begins at 18: give `prior`"),
    ],
)
def test_bad_options_are_refused(survey, tiny_weights, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        adapt.adapt(survey[0], tmp_path / "w", base=tiny_weights, **{"n": 32, "gain": 1.0, **options})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*blank patches")
def test_a_mosaic_adapts_by_an_adversary_without_labels(survey, tiny_weights, tmp_path, quick_plan):
    done = adapt.adapt(
        survey[0], tmp_path / "w", base=tiny_weights, how="dann", n=32, epochs=1, gain=20_000.0, workers=1
    )
    assert done.card["adaptation"]["method"] == "dann"
    assert done.card["adaptation"]["labelled"] == 0
    assert "real ones without labels (dann)" in done.card["summary"]
