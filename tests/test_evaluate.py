import json

import numpy as np
import pytest

from sersicnet import evaluate
from sersicnet.errors import InputError, SersicnetError
from sersicnet.schema import TARGET_NAMES

RNG = np.random.default_rng(0)
TRUTH = np.column_stack([RNG.uniform(16, 27, 400), RNG.uniform(1, 50, 400), RNG.uniform(0.3, 6, 400), RNG.random(400)])


def test_r_squared_of_known_cases():
    assert evaluate.r_squared(TRUTH[:, 0], TRUTH[:, 0]) == 1
    assert evaluate.r_squared(TRUTH[:, 0], np.full(400, TRUTH[:, 0].mean())) == pytest.approx(0)


def test_scores_of_a_known_bias_and_scatter():
    noise = RNG.normal(0, 0.2, TRUTH.shape)
    found = evaluate.scores(TRUTH, TRUTH + 0.5 + noise, np.full(TRUTH.shape, 0.54))
    for name in ("mag", "r_eff_pix", "sersic_n", "ellipticity"):
        assert found["all"]["bias"][name] == pytest.approx(0.5, abs=0.04)
        assert found["all"]["scatter"][name] == pytest.approx(0.2, abs=0.04)
        assert found["all"]["coverage"][name] == pytest.approx(0.58, abs=0.08)


def test_bright_galaxies_have_a_row_of_their_own():
    found = evaluate.scores(TRUTH, TRUTH)
    assert found["mag <= 23"]["n"] == (TRUTH[:, 0] <= 23).sum()
    assert "coverage" not in found["all"]


def test_statistics_by_magnitude_of_known_errors():
    predicted = TRUTH.copy()
    predicted[:, 0] += 0.1
    predicted[:, 1] *= 1.2
    predicted[:, 2] *= 10**0.05
    predicted[:, 3] -= 0.3
    rows = evaluate.by_magnitude(TRUTH, predicted, np.full(TRUTH.shape, 0.2))
    assert sum(row["n"] for row in rows) == 400
    for row in rows:
        assert [row[t]["bias"] for t in TARGET_NAMES] == pytest.approx([0.1, 0.2, 0.05, 0.3])
        assert [row[t]["dispersion"] for t in TARGET_NAMES] == pytest.approx([0, 0, 0, 0], abs=1e-9)
        assert (row["mag"]["within68"], row["ellipticity"]["within68"], row["ellipticity"]["within95"]) == (1, 0, 1)
        assert row["r_eff_pix"]["outliers"] == 0


def test_missing_measurements_are_counted():
    predicted = TRUTH.copy()
    predicted[:7] = np.nan
    assert evaluate.scores(TRUTH, predicted)["all"]["missing"] == 7
    assert evaluate.scores(TRUTH, predicted)["all"]["r2"]["mag"] == 1


def test_a_report_holds_scores_and_figures(small_dataset, tmp_path):
    result = evaluate.evaluate(small_dataset, output=tmp_path / "scores")
    names = {p.name for p in (tmp_path / "scores").iterdir()}
    assert names == {"scores.json", "scores.md", "predicted_against_true.png", "distributions.png"}
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())["samples"]["all"]["n"] == 64
    assert "| all | 64 | R² |" in evaluate.as_markdown(result)


def test_shipped_weights_beat_a_guess_on_bright_galaxies(small_dataset):
    found = evaluate.evaluate(small_dataset)["samples"]["mag <= 23"]
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
    rows = ["x,y,mag,r_eff_pix,sersic_n,ellipticity"]
    rows += [f"{r['x']},{r['y']},{r['mag']},{r['r_eff_pix']},{r['sersic_n']},{r['ellipticity']}" for r in field[1]]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    found = evaluate.evaluate(tmp_path / "labels.csv", image=field[0])["samples"]["all"]
    assert found["n"] == len(field[1])
    assert abs(found["bias"]["mag"]) < 0.1
