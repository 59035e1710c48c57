import json
import time

import numpy as np
import pytest
from conftest import tiny_recipe

from sersicnet import train, weights
from sersicnet.dataset import Arrays, Dataset, real_galaxies
from sersicnet.errors import DatasetError, InputError


def quick(network, **changes):
    from dataclasses import replace

    return replace(train.RECIPES[network], epochs=1, **changes)


def test_a_run_ends_in_verified_weights_with_a_card(tiny_weights):
    card = weights.load(tiny_weights).card
    assert card["network"] == "fovea"
    assert card["command"] == "train"
    assert card["seed"] == 1
    assert card["data"]["n"] == 64
    assert card["domain"]["pixel_scale"] == 0.06
    assert card["scores"]["samples"]["all"]["n"] == 64
    assert not tiny_weights.with_name("tiny.run").exists()


class KilledError(Exception):
    pass


def test_a_killed_run_continues_to_the_same_end(small_dataset, tmp_path):
    recipe = tiny_recipe(patience=9)
    recipe = train.Recipe(**{**recipe.__dict__, "epochs": 3})

    def kill(progress):
        if progress.epoch == 3:
            raise KilledError

    with pytest.raises(KilledError):
        train.train(small_dataset, tmp_path / "w", recipe=recipe, seed=2, report=kill)
    assert not (tmp_path / "w").exists()
    lines = [json.loads(line) for line in (tmp_path / "w.run" / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    seen = []
    train.train(small_dataset, tmp_path / "w", recipe=recipe, seed=2, report=lambda p: seen.append(p.epoch))
    assert set(seen) == {3}
    train.train(small_dataset, tmp_path / "whole", recipe=recipe, seed=2)
    with Dataset(small_dataset) as data:
        stamps = data.stamps(0, 16)
    resumed, _ = weights.load(tmp_path / "w").predict(stamps)
    whole, _ = weights.load(tmp_path / "whole").predict(stamps)
    np.testing.assert_allclose(resumed, whole, rtol=1e-3, atol=1e-3)


def test_a_run_killed_in_an_epoch_continues_at_the_step(small_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "KEEP_SECONDS", 0.0)
    steps = []

    def kill(progress):
        if progress.step == 3:
            raise KilledError

    with pytest.raises(KilledError):
        train.train(small_dataset, tmp_path / "w", recipe=tiny_recipe(), seed=2, report=kill)
    train.train(small_dataset, tmp_path / "w", recipe=tiny_recipe(), seed=2, report=lambda p: steps.append(p.step))
    assert steps[0] == 3
    train.train(small_dataset, tmp_path / "whole", recipe=tiny_recipe(), seed=2)
    with Dataset(small_dataset) as data:
        stamps = data.stamps(0, 16)
    resumed, whole = (weights.load(tmp_path / name).predict(stamps)[0] for name in ("w", "whole"))
    np.testing.assert_allclose(resumed, whole, rtol=1e-3, atol=1e-3)


def test_an_unfinished_run_with_other_options_is_kept(small_dataset, tmp_path):
    def kill(progress):
        raise KilledError

    with pytest.raises(KilledError):
        train.train(small_dataset, tmp_path / "w", recipe=tiny_recipe(), seed=2, report=kill)
    with pytest.raises(InputError, match="unfinished run with other options"):
        train.train(small_dataset, tmp_path / "w", recipe=tiny_recipe(), seed=3)
    with pytest.raises(DatasetError, match="there is none"):
        train.train("tpyo.h5", tmp_path / "w", overwrite=True)
    assert (tmp_path / "w.run" / "config.json").exists()


def test_the_study_network_leaves_faint_galaxies_out(small_dataset, tmp_path):
    done = train.train(small_dataset, tmp_path / "tl", network="tl", recipe=quick("tl"))
    with Dataset(small_dataset) as data:
        assert done.card["data"]["n"] == (data.mag <= 23).sum()
    assert done.card["domain"]["ranges"]["mag"] == [16.0, 23.0]
    assert done.predict(np.zeros((2, 128, 128), np.float32))[1] is None


def test_the_adversary_trains(small_dataset, tmp_path):
    done = train.train(
        small_dataset, tmp_path / "w", network="dann", recipe=quick("dann"), real=real_galaxies(small_dataset)
    )
    assert done.card["data"]["n"] == 128
    assert "64 real ones, with their labels" in done.card["summary"]


def test_labels_of_real_galaxies_reach_the_loss_only_when_asked():
    is_real = np.array([False, True, True, False])
    source = Arrays(np.zeros((4, 128, 128), np.float32), np.zeros((4, 4)), is_real, np.zeros(4))
    standardised = np.zeros((4, 4), np.float32)
    core = train.networks.dann()
    for labelled, expected in ((np.ones(4, bool), [1, 1, 1]), (~is_real, [0, 1, 1])):
        _, arguments = train._adversarial(core, source, standardised, labelled, train.RECIPES["dann"])
        x, y, sample_weight = arguments(np.zeros((3, 128, 128)), np.array([2, 3, 0]), 0.5)
        assert list(sample_weight["means"]) == expected
        assert list(y["domain"]) == [1, 0, 0]
        assert 0.9 < x[1][0, 0] < 1


def test_without_labels_nothing_depends_on_the_labels(small_dataset, tmp_path):
    outputs = []
    for i, shift in enumerate((0.0, 5.0)):
        real = real_galaxies(small_dataset)
        real.targets += shift
        done = train.train(
            small_dataset, tmp_path / f"{i}", network="dann", recipe=quick("dann"), real=real, real_labels=False
        )
        outputs.append(done.predict(real.stamps(0, 4))[0])
    np.testing.assert_allclose(*outputs, rtol=1e-4)


def test_fine_tuning_learns_from_labels(small_dataset, tiny_weights, tmp_path):
    real = real_galaxies(small_dataset)
    recipe = train.Recipe(**{**train.FINETUNE.__dict__, "epochs": 2})
    records = []
    done = train.finetune(
        real, tmp_path / "tuned", base=tiny_weights, recipe=recipe, report=lambda p: records.append(p.record)
    )
    assert done.card["base"]["name"] == "tiny"
    assert done.card["data"]["n"] == 64
    assert [r["epoch"] for r in records if r] == [1, 2]
    before, _ = weights.load(tiny_weights).predict(real.stamps(0, 64))
    after, _ = done.predict(real.stamps(0, 64))
    truth = real.targets[:, 3]
    assert np.abs(after[:, 3] - truth).mean() < np.abs(before[:, 3] - truth).mean()


def test_fine_tuning_needs_some_galaxies(small_dataset, tiny_weights, tmp_path):
    few = real_galaxies(small_dataset).taken(np.arange(5))
    with pytest.raises(DatasetError, match="at least 10 labelled galaxies; received 5"):
        train.finetune(few, tmp_path / "w", base=tiny_weights)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "resnet"}, "one of fovea, tl, dann; received resnet"),
        ({"network": "dann"}, "needs real galaxies"),
        ({"limit": 30}, "at least 32 stamps; received 30"),
    ],
)
def test_bad_options_write_nothing(small_dataset, tmp_path, options, message):
    with pytest.raises((InputError, DatasetError), match=message):
        train.train(small_dataset, tmp_path / "w", **options)
    assert not list(tmp_path.iterdir())


def test_existing_weights_are_kept(small_dataset, tmp_path):
    (tmp_path / "w").mkdir()
    with pytest.raises(InputError, match="exists already"):
        train.train(small_dataset, tmp_path / "w")
    with pytest.raises(InputError, match="not made by this command"):
        train.train(small_dataset, tmp_path / "w", overwrite=True)


def test_a_missing_test_set_is_noticed_before_training(small_dataset, tmp_path):
    with pytest.raises(DatasetError, match="there is none"):
        train.train(small_dataset, tmp_path / "w", test=tmp_path / "none.h5")


def test_the_eight_orientations_differ():
    stamps = np.repeat(np.arange(128 * 128, dtype=np.float32).reshape(1, 128, 128), 8, axis=0)
    oriented = train._oriented(stamps, np.arange(8))
    assert len({tuple(stamp[[0, 0, -1, -1], [0, -1, 0, -1]]) for stamp in oriented}) == 8
    np.testing.assert_array_equal(oriented[0], stamps[0])


def test_the_same_seed_gives_the_same_weights(small_dataset, tmp_path):
    done = [train.train(small_dataset, tmp_path / name, recipe=tiny_recipe(), seed=4) for name in "ab"]
    stamps = np.random.default_rng(0).normal(size=(8, 128, 128)).astype(np.float32)
    np.testing.assert_allclose(done[0].predict(stamps)[0], done[1].predict(stamps)[0], rtol=1e-3)


def test_reading_ahead_stops_when_nobody_listens():
    drawn = []
    items = train._prefetched((drawn.append(i) or i for i in range(1000)), depth=2)
    next(items)
    items.close()
    time.sleep(0.5)
    assert len(drawn) < 10


def test_reading_ahead_hands_on_errors():
    def broken():
        yield 1
        raise ValueError("disk")

    items = train._prefetched(broken())
    assert next(items) == 1
    with pytest.raises(ValueError, match="disk"):
        next(items)


def test_errors_are_calibrated_by_magnitude():
    rng = np.random.default_rng(0)
    n = 6000
    predicted = np.column_stack([np.sort(rng.uniform(-10, 0, n)), *rng.uniform(1, 5, (3, n))])
    factor = 1 + np.arange(n) / n
    targets = predicted + 0.1 * factor[:, None] * rng.standard_normal((n, 4))
    errors = np.full((n, 4), 0.1)
    table = train.calibration(targets, predicted, errors)
    known = weights.calibrated({"calibration": table}, predicted[:, 0], errors)
    assert known[0] == pytest.approx([0.104] * 4, rel=0.1)
    assert known[-1] == pytest.approx([0.196] * 4, rel=0.1)
    for part in np.array_split(np.arange(n), 4):
        assert (np.abs(predicted - targets) < known)[part].mean() == pytest.approx(0.683, abs=0.02)
    assert train.calibration(targets[:500], predicted[:500], errors[:500]) is None
    assert weights.calibrated({}, predicted[:, 0], errors) is errors
