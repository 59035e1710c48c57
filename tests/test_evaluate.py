import json
import shutil

import numpy as np
import pytest
from astropy.table import Table
from conftest import shown

from sersicnet import networks, weights
from sersicnet.catalogue import scores
from sersicnet.dataset import Dataset
from sersicnet.engine.render import Renderer
from sersicnet.errors import InputError, SersicnetError, SersicnetWarning
from sersicnet.evaluating import domains, evaluate
from sersicnet.measuring.measure import measure
from sersicnet.measuring.outputs import Outputs
from sersicnet.schema import TARGET_NAMES
from sersicnet.simulating import world
from sersicnet.simulating.recipe import Prior, Simulation
from sersicnet.simulating.simulate import simulate
from sersicnet.simulating.telescopes import effective_psf

RNG = np.random.default_rng(0)
TRUTH = np.column_stack([RNG.uniform(16, 27, 400), RNG.uniform(1, 50, 400), RNG.uniform(0.3, 6, 400), RNG.random(400)])


def test_r_squared_of_known_cases():
    assert scores.r_squared(TRUTH[:, 0], TRUTH[:, 0]) == 1
    assert scores.r_squared(TRUTH[:, 0], np.full(400, TRUTH[:, 0].mean())) == pytest.approx(0)


def test_r_squared_is_not_defined_where_all_are_the_same():
    assert np.isnan(scores.r_squared(np.ones(4), np.arange(4.0)))


def test_scores_of_a_known_bias_and_scatter():
    noise = RNG.normal(0, 0.2, TRUTH.shape)
    found = scores.scores(TRUTH, TRUTH + 0.5 + noise, np.full(TRUTH.shape, 0.54))
    for name in ("mag", "r_eff_pix", "sersic_n", "ellipticity"):
        assert found["all"]["bias"][name] == pytest.approx(0.5, abs=0.04)
        assert found["all"]["scatter"][name] == pytest.approx(0.2, abs=0.04)
        assert found["all"]["coverage"][name] == pytest.approx(0.58, abs=0.08)


def test_bright_galaxies_have_a_row_of_their_own():
    found = scores.scores(TRUTH, TRUTH)
    assert found["mag <= 23"]["n"] == (TRUTH[:, 0] <= 23).sum()
    assert "coverage" not in found["all"]


def test_statistics_by_magnitude_of_known_errors():
    predicted = TRUTH.copy()
    predicted[:, 0] += 0.1
    predicted[:, 1] *= 1.2
    predicted[:, 2] *= 10**0.05
    predicted[:, 3] -= 0.3
    rows = scores.by_magnitude(TRUTH, predicted, np.full(TRUTH.shape, 0.2))
    assert sum(row["n"] for row in rows) == 400
    for row in rows:
        assert [row[t]["bias"] for t in TARGET_NAMES] == pytest.approx([0.1, 0.2, 0.05, 0.3])
        assert [row[t]["dispersion"] for t in TARGET_NAMES] == pytest.approx([0, 0, 0, 0], abs=1e-9)
        assert (row["mag"]["within68"], row["ellipticity"]["within68"], row["ellipticity"]["within95"]) == (1, 0, 1)
        assert row["r_eff_pix"]["outliers"] == 0


def test_bins_hold_their_lower_border_and_may_be_open():
    values = np.repeat([1.0, 3.0, 1e9, np.nan], 100)
    rows = scores.binned(values, (1, 3, np.inf), TRUTH, TRUTH)
    assert [(row["range"], row["n"]) for row in rows] == [([1, 3], 100), ([3, None], 200)]


def test_signal_to_noise_is_near_that_of_a_matched_filter(small_dataset):
    with Dataset(small_dataset) as data:
        found, simulation = evaluate.signal_to_noise(data), Simulation(64, seed=5)
        truth = data.truth
    instrument = simulation.instrument
    render = Renderer(effective_psf(instrument))
    ratios = []
    for i in range(20):
        flux = 10 ** (-0.4 * (truth["mag"][i] - instrument.zero_point))
        shape = (truth["r_eff_pix"][i], truth["sersic_n"][i], 1 - truth["ellipticity"][i], truth["theta"][i])
        image = render(np.array([truth["x"][i], truth["y"][i], flux, *shape]))[0].astype(float)
        sky = truth["rms"][i] ** 2 * instrument.autocorrelation().sum()
        best = np.sqrt((image**2 / (sky + np.maximum(image, 0) / instrument.exposure)).sum())
        ratios.append(found[i] / best)
    assert 0.4 < min(ratios) < max(ratios) < 1.4
    assert 0.7 < np.median(ratios) < 1


def test_a_set_of_many_telescopes_has_scores_and_no_limit(psf_weights, tmp_path):
    path = simulate(tmp_path / "any.h5", world.simulation("any", 192, 3))
    with Dataset(path) as data:
        found, truth = evaluate.signal_to_noise(data), data.truth
    known = np.isfinite(truth["electrons"])
    np.testing.assert_array_equal(np.isfinite(found), known)
    area = 4 * np.pi * ((truth["fwhm"] / 2.355) ** 2 + 0.5 * (1 - truth["ellipticity"]) * truth["r_eff_pix"] ** 2)
    flux = 10 ** (-0.4 * (truth["mag"] - 30))
    of_sky = flux / (truth["rms"] * truth["correlation"] * np.sqrt(area))  # what the galaxies are drawn by
    ratio = (found / of_sky)[known]
    assert ratio.max() < 1.5
    assert 0.5 < np.median(ratio[of_sky[known] < 30]) < 1
    rows = next(iter(evaluate.evaluate(path, psf_weights)["scores"].values()))["by_snr"]
    assert 0 < sum(row["n"] for row in rows) <= known.sum()
    with pytest.raises(InputError, match=r"computed for images of one telescope; .*any\.h5 is of several"):
        evaluate.evaluate(path, psf_weights, limits=True)


def test_missing_measurements_are_counted():
    predicted = TRUTH.copy()
    predicted[:7] = np.nan
    assert scores.scores(TRUTH, predicted)["all"]["missing"] == 7
    assert scores.scores(TRUTH, predicted)["all"]["r2"]["mag"] == 1


FILES = {"scores.json", "scores.md", "predicted_against_true.png", "distributions.png", "by_magnitude.png"}


def test_magnitudes_relative_to_the_noise_are_scored_as_apparent_ones():
    rng = np.random.default_rng(1)
    predicted, depth = TRUTH + rng.normal(0, 0.1, TRUTH.shape), np.outer(rng.uniform(-1, 1, len(TRUTH)), [1, 0, 0, 0])
    relative = scores.scores(TRUTH - depth, predicted - depth, mag=TRUTH[:, 0])
    apparent = scores.scores(TRUTH, predicted)
    for part, found in apparent.items():
        assert relative[part]["r2"] == pytest.approx(found["r2"])
        assert relative[part]["scatter"] == pytest.approx(found["scatter"])


def test_a_report_holds_scores_and_figures(small_dataset, tmp_path):
    result = evaluate.evaluate(small_dataset, output=tmp_path / "scores")
    assert {p.name for p in (tmp_path / "scores").iterdir()} == FILES
    kept = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert kept == result
    assert kept["scores"][weights.DEFAULT]["samples"]["all"]["n"] == 64
    page = (tmp_path / "scores" / "scores.md").read_text()
    assert "| all | 64 | R² |" in page
    assert "| 1000 and more | " in page
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]


def copied(path, **changes):
    """The shipped weights in another directory, with another card."""
    shutil.copytree(weights.shipped_directory() / weights.DEFAULT, path)
    weights.rewrite_card(path, {**weights.load(path).card, **changes})
    return path


def test_several_weights_stand_side_by_side(small_dataset, tmp_path):
    result = evaluate.evaluate(small_dataset, [weights.DEFAULT, copied(tmp_path / "copy", name="other")])
    assert list(result["scores"]) == [weights.DEFAULT, "other"]
    assert result["scores"][weights.DEFAULT] == result["scores"]["other"]
    lines = evaluate.as_markdown(result).splitlines()
    rows = [line for line in lines if line.startswith("| mag <= 23 | R² |")]
    assert [row.split("|")[3].strip() for row in rows] == [weights.DEFAULT, "other"]
    assert "`other`:" in lines


def test_the_same_weights_twice_are_refused(small_dataset):
    with pytest.raises(InputError, match=f"scored once; received {weights.DEFAULT}, {weights.DEFAULT}"):
        evaluate.evaluate(small_dataset, [weights.DEFAULT, weights.DEFAULT])


def test_weights_of_one_name_are_told_apart_by_their_paths(small_dataset, tmp_path):
    found = evaluate.evaluate(small_dataset, [weights.DEFAULT, copied(tmp_path / "copy")])["scores"]
    assert list(found) == [weights.DEFAULT, str(tmp_path / "copy")]


def test_shipped_weights_beat_a_guess_on_bright_galaxies(small_dataset):
    found = evaluate.evaluate(small_dataset)["scores"][weights.DEFAULT]["samples"]["mag <= 23"]
    assert min(found["r2"].values()) > 0.9


def test_an_existing_report_is_kept(small_dataset, tmp_path):
    with pytest.raises(InputError, match="exists already"):
        evaluate.evaluate(small_dataset, output=tmp_path)
    with pytest.raises(InputError, match="not made by this command"):
        evaluate.evaluate(small_dataset, output=tmp_path, overwrite=True)


def test_data_that_are_not_there():
    with pytest.raises(SersicnetError, match="there is none"):
        evaluate.evaluate("nothing.h5")


def test_labelled_galaxies_can_be_scored(field, tmp_path):
    rows = ["x,y,mag,r_eff_pix,sersic_n,ellipticity,snr"]
    rows += [f"{r['x']},{r['y']},{r['mag']},{r['r_eff_pix']},{r['sersic_n']},{r['ellipticity']},50" for r in field[1]]
    rows[1] = rows[1].removesuffix("50")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    found = evaluate.evaluate(tmp_path / "labels.csv", image=field[0])["scores"][weights.DEFAULT]
    assert found["samples"]["all"]["n"] == len(field[1])
    assert abs(found["samples"]["all"]["bias"]["mag"]) < 0.1
    assert [(row["range"], row["n"]) for row in found["by_snr"]] == [([30, 100], len(field[1]) - 1)]
    with pytest.raises(InputError, match=r"datasets of `sersicnet simulate`; received .*labels.csv"):
        evaluate.evaluate(tmp_path / "labels.csv", image=field[0], limits=True)


def test_the_limit_stands_beside_the_weights(small_dataset, monkeypatch):
    monkeypatch.setattr("sersicnet.simulating.fisher.GALAXIES", 6)
    result = evaluate.evaluate(small_dataset, limits=True)
    assert result["limits"]["n"] == 6
    assert list(result["limits"]["estimates"]) == ["sky free", "sky known", "sky known to 0.03 rms"]
    for found in (*result["limits"]["estimates"].values(), result["limits"]["weights"][weights.DEFAULT]):
        assert found["samples"]["all"]["n"] == 6
    assert "| all | R² | limit, sky free | 6 |" in evaluate.as_markdown(result)


# --- catalogues ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def catalogue(field, tmp_path_factory):
    path = tmp_path_factory.mktemp("catalogue") / "cat.fits"
    measure(field[0], outputs=Outputs(catalogue=path))
    return path


def truth_path(field):
    return str(field[0]).replace(".fits", "_truth.ecsv")


def test_a_catalogue_is_matched_on_the_sky(catalogue, field, tmp_path):
    result = evaluate.evaluate_catalogue(catalogue, truth_path(field), tmp_path / "scores")
    matching = result["matching"]
    assert (matching["on"], matching["tolerance"], matching["true"]) == ("sky", 0.3, len(field[1]))
    assert 10 <= matching["matched"] <= min(matching["catalogue"], matching["true"])
    assert sum(row["true"] for row in matching["by_magnitude"]) == len(field[1])
    assert sum(row["found"] for row in matching["by_magnitude"]) == matching["matched"]
    found = result["scores"]["cat.fits"]
    assert found["samples"]["all"]["n"] == matching["matched"]
    assert abs(found["samples"]["all"]["bias"]["mag"]) < 0.1
    assert "coverage" in found["samples"]["all"]
    assert "by_snr" in found
    assert result["scores"]["flags == 0"]["samples"]["all"]["n"] == sum(Table.read(catalogue)["flags"] == 0)
    assert {p.name for p in (tmp_path / "scores").iterdir()} == FILES
    assert f"{matching['matched']} of {matching['catalogue']} sources" in evaluate.as_markdown(result)


def test_numbers_for_unknown_values_do_not_count(catalogue, field, tmp_path):
    truth = Table.read(truth_path(field))
    truth["sersic_n"][:3], truth["mag"][3] = -99, 99
    truth.write(tmp_path / "truth.ecsv")
    with (
        pytest.warns(SersicnetWarning, match=r"such as sersic_n = -99: these rows do not count \(3\)"),
        pytest.warns(SersicnetWarning, match=r"such as mag = 99: these rows do not count \(1\)"),
    ):
        result = evaluate.evaluate_catalogue(catalogue, tmp_path / "truth.ecsv")
    whole = evaluate.evaluate_catalogue(catalogue, truth_path(field))
    name = next(iter(whole["scores"]))
    before, after = (one["scores"][name]["samples"]["all"] for one in (whole, result))
    assert before["n"] - 4 <= after["n"] < before["n"]


def test_matches_by_chance_are_doubted(catalogue, tmp_path):
    found = Table.read(catalogue)
    n = 300
    rng = np.random.default_rng(0)
    columns = {"x": rng.uniform(-9e5, -1e5, n), "y": rng.uniform(-9e5, -1e5, n), "mag": np.full(n, 22.0)}
    truth = Table({**columns, "r_eff_pix": np.full(n, 3.0), "sersic_n": np.ones(n), "ellipticity": np.full(n, 0.3)})
    truth["x"][0], truth["y"][0] = found["x"][0], found["y"][0]
    truth.write(tmp_path / "other.ecsv")
    with pytest.warns(SersicnetWarning, match="perhaps by chance"):
        evaluate.evaluate_catalogue(catalogue, tmp_path / "other.ecsv")


def test_a_catalogue_is_matched_in_pixels_where_there_is_no_sky(catalogue, field, tmp_path):
    plain = Table.read(truth_path(field))
    plain.remove_columns(["ra", "dec"])
    plain["q"] = 1 - plain["ellipticity"]
    plain["r_eff"] = 0.06 * plain["r_eff_pix"]
    plain.remove_columns(["ellipticity", "r_eff_pix"])
    plain.write(tmp_path / "truth.csv")
    on_sky = evaluate.evaluate_catalogue(catalogue, truth_path(field))
    in_pixels = evaluate.evaluate_catalogue(catalogue, tmp_path / "truth.csv", tolerance=5)
    assert (in_pixels["matching"]["on"], in_pixels["matching"]["tolerance"]) == ("pixels", 5)
    assert in_pixels["matching"]["matched"] == on_sky["matching"]["matched"]
    for name in TARGET_NAMES:
        bias = [found["scores"]["cat.fits"]["samples"]["all"]["bias"][name] for found in (on_sky, in_pixels)]
        assert bias[0] == pytest.approx(bias[1], rel=1e-3)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"mag": [20.0]}, r"needs columns r_eff_pix \(or r_eff\), sersic_n \(or n\), ellipticity \(or q\); it has mag"),
        ({"x": [-900.0], "y": [1.0]}, "None of the .* lies within 5 pixels .* give a larger `tolerance`"),
        ({}, "by x and y, that both have"),
        ({"x": ["a"], "y": ["b"]}, "Column x of .* must hold numbers"),
    ],
)
def test_a_truth_that_does_not_fit_is_one_line(catalogue, tmp_path, columns, message):
    whole = {"mag": [20.0], "r_eff_pix": [3.0], "sersic_n": [1.0], "ellipticity": [0.3]}
    Table(columns if "mag" in columns else {**whole, **columns}).write(tmp_path / "truth.ecsv")
    with pytest.raises(InputError, match=message) as caught:
        evaluate.evaluate_catalogue(catalogue, tmp_path / "truth.ecsv")
    assert "\n" not in str(caught.value)


# --- domains -------------------------------------------------------------------------------------------------


def test_samples_of_one_distribution_cannot_be_told_apart():
    rng = np.random.default_rng(1)
    found = domains.domain_accuracy(rng.normal(size=(600, 20)), rng.normal(size=(150, 20)))
    assert abs(found["accuracy"] - 0.5) < 3.5 * found["error"]
    assert found["error"] == pytest.approx(0.5 * np.sqrt(0.25 / 600 + 0.25 / 150), rel=0.1)


def test_a_shift_is_found_as_well_as_a_linear_classifier_can():
    """Two normal distributions that are d apart are told apart in Phi(d / 2) of all cases."""
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=(800, 10)), rng.normal(size=(200, 10))
    second[:, 3] += 2
    constant = np.ones((1, 1))
    found = domains.domain_accuracy(
        np.hstack([1e6 * first, constant.repeat(800, 0)]), np.hstack([1e6 * second, constant.repeat(200, 0)])
    )
    assert found["accuracy"] == pytest.approx(0.841, abs=0.04)


def test_too_few_galaxies_have_no_domain():
    with pytest.raises(InputError, match="at least 10 galaxies of each; received 9 and 50"):
        domains.domain_accuracy(TRUTH[:9], TRUTH[:50])


def test_domains_are_told_apart_by_the_features_of_each_network(small_dataset, tmp_path):
    simulation = Simulation(32, seed=6, prior=Prior(mag=(24.0, 27.0)))
    faint = simulate(tmp_path / "faint.h5", simulation, workers=1)
    # The default was trained to have features that do not tell.
    found = evaluate.evaluate(small_dataset, [weights.BASE], domains=faint)
    assert found["domains"]["n"] == [64, 32]
    assert list(found["domains"]["accuracy"]) == ["the true parameters", weights.BASE]
    assert min(one["accuracy"] for one in found["domains"]["accuracy"].values()) > 0.7
    assert f"| features of `{weights.BASE}` | " in evaluate.as_markdown(found)


@pytest.mark.parametrize("name", sorted(networks.ARCHITECTURES))
def test_every_network_has_features(name):
    architecture = networks.ARCHITECTURES[name]
    model = networks.with_units(architecture, architecture.build(), np.zeros(4), np.ones(4))
    features = networks.features(model)
    assert features(networks.shown(features, shown(np.zeros((2, 128, 128), np.float32)))).shape[0] == 2
