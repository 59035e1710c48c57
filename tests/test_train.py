import errno
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from conftest import shown, tiny_core, tiny_recipe

from sersicnet import calibration, networks, weights
from sersicnet.dataset import Dataset
from sersicnet.engine.noise import correlated_noise
from sersicnet.errors import DatasetError, InputError, OutputError, SersicnetWarning
from sersicnet.measuring import predicting
from sersicnet.networks import keras, ops
from sersicnet.output import Run
from sersicnet.schema import Inputs, noise_numbers, pulls
from sersicnet.simulating.telescopes import F160W
from sersicnet.training import augment, card, device, loop, losses, train
from sersicnet.training import finetune as finetuning
from sersicnet.training.finetune import finetune
from sersicnet.training.joined import Joined, judging_rows
from sersicnet.training.labels import real_galaxies
from sersicnet.training.on_the_fly import OnTheFly
from sersicnet.training.recipe import ADAPT, FINETUNE, RECIPES, Recipe


def quick(network, **changes):
    return replace(RECIPES[network], epochs=1, **changes)


def test_a_run_ends_in_verified_weights_with_a_card(tiny_weights):
    card = weights.load(tiny_weights).card
    assert card["network"] == "fovea-fixed"
    assert card["command"] == "train"
    assert card["seed"] == 1
    assert card["data"]["n"] == 64
    assert card["domain"]["pixel_scale"] == 0.06
    assert card["scores"]["samples"]["all"]["n"] == 64
    assert not tiny_weights.with_name("tiny.run").exists()


class KilledError(Exception):
    pass


def test_a_killed_run_continues_to_the_same_end(small_dataset, tmp_path, tiny_network):
    recipe = replace(tiny_recipe(patience=9), epochs=3)
    trained = partial(train.train, small_dataset, network=tiny_network, recipe=recipe, seed=2)

    def kill(progress):
        if progress.epoch == 3:
            raise KilledError

    with pytest.raises(KilledError):
        trained(tmp_path / "w", report=kill)
    assert not (tmp_path / "w").exists()
    lines = [json.loads(line) for line in (tmp_path / "w.run" / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    seen = []
    trained(tmp_path / "w", report=lambda p: seen.append(p.epoch))
    assert set(seen) == {3}
    trained(tmp_path / "whole")
    with Dataset(small_dataset) as data:
        stamps = data.inputs(0, 16)
    resumed, whole = (weights.load(tmp_path / name).predict(stamps).targets for name in ("w", "whole"))
    np.testing.assert_allclose(resumed, whole, rtol=1e-3, atol=1e-3)


def test_a_run_killed_in_an_epoch_continues_at_the_step(small_dataset, tmp_path, monkeypatch, tiny_network):
    monkeypatch.setattr(loop, "KEEP_SECONDS", 0.0)
    trained = partial(train.train, small_dataset, network=tiny_network, recipe=tiny_recipe(), seed=2)
    steps = []

    def kill(progress):
        if progress.step == 3:
            raise KilledError

    with pytest.raises(KilledError):
        trained(tmp_path / "w", report=kill)
    trained(tmp_path / "w", report=lambda p: steps.append(p.step))
    assert steps[0] == 3
    trained(tmp_path / "whole")
    with Dataset(small_dataset) as data:
        stamps = data.inputs(0, 16)
    resumed, whole = (weights.load(tmp_path / name).predict(stamps)[0] for name in ("w", "whole"))
    np.testing.assert_allclose(resumed, whole, rtol=1e-3, atol=1e-3)


def test_an_unfinished_run_with_other_options_is_kept(small_dataset, tmp_path, tiny_network):
    def kill(progress):
        if progress.record is not None:  # the state after an epoch is kept
            raise KilledError

    trained = partial(train.train, small_dataset, tmp_path / "w", network=tiny_network, recipe=tiny_recipe())
    with pytest.raises(KilledError):
        trained(seed=2, report=kill)
    with pytest.raises(InputError, match="unfinished run with other options"):
        trained(seed=3)
    with pytest.raises(DatasetError, match="there is none"):
        train.train("tpyo.h5", tmp_path / "w", overwrite=True)
    assert (tmp_path / "w.run" / "config.json").exists()


def test_training_on_datasets_needs_no_astropy(small_dataset):
    """Nor what measures and simulates: a machine with a GPU may have little more than Keras."""
    absent = ["astropy", "photutils", "skimage", "galsim", "onnxruntime", "pyarrow", "pandas", "matplotlib"]
    code = f"""
import sys
for name in {absent}:
    sys.modules[name] = None
from sersicnet.cli import train as command, finetune as other
from sersicnet.training import train, finetune
from sersicnet.training.labels import real_galaxies
print(len(real_galaxies({str(small_dataset)!r})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "64\n", done.stderr


@pytest.mark.parametrize("verb", ["train", "finetune"])
def test_two_equal_commands_at_once_do_not_destroy_each_other(small_dataset, tmp_path, tiny_network, verb):
    recipe = replace(RECIPES["dann"], epochs=2, batch=16)
    if verb == "train":
        command = partial(train.train, small_dataset, tmp_path / "w", network=tiny_network, recipe=recipe)
    else:
        base = train.train(small_dataset, tmp_path / "base", network=tiny_network, recipe=quick("dann")).path
        real = real_galaxies(small_dataset)
        command = partial(finetune, real, tmp_path / "w", base=base, recipe=recipe, layers="head-first")
    refused = []

    def second(progress):
        if not refused:
            with pytest.raises(InputError, match=rf"in use: process {os.getpid()} on .* since .*\. Wait") as caught:
                command()
            refused.append(caught.value)

    done = command(report=second)
    assert refused
    assert done.path == tmp_path / "w"
    assert not (tmp_path / "w.run").exists()


def test_weights_trained_anew_into_a_directory_are_those_that_measure(small_dataset, tmp_path, tiny_network):
    """A process that measures keeps the network of the last tile open."""
    inputs = real_galaxies(small_dataset).inputs(0, 4)
    predicted = []
    for seed in (1, 2):
        done = train.train(
            small_dataset, tmp_path / "w", network=tiny_network, recipe=quick("dann"), seed=seed, overwrite=True
        )
        of_tile = predicting.loaded(done.path, done.identity, "cpu").predict(inputs)[0]
        np.testing.assert_array_equal(of_tile, weights.load(done.path).predict(inputs)[0])
        predicted.append(of_tile)
    assert not np.allclose(*predicted)


def test_an_annealed_rate_warms_up_and_follows_a_cosine():
    """The formula of the shipped weights."""
    recipe, steps = replace(RECIPES["fovea"], learning_rate=1.5e-3), 700
    for step in (0, 1, 10, 21, 22, 350, 690, 699):
        done = step / steps
        rate = 1.5e-3 * min(1.0, done / 0.03 + 1e-3) * 0.5 * (1 + np.cos(np.pi * done))
        assert losses.learning_rate(recipe, steps, step) == pytest.approx(rate, rel=1e-5)
    optimizer = losses.optimizer(recipe, steps)
    assert float(ops.convert_to_numpy(optimizer.learning_rate)) == pytest.approx(1.5e-6, rel=1e-5)
    assert losses.learning_rate(RECIPES["tl"], steps, 350) == RECIPES["tl"].learning_rate


def test_the_study_network_leaves_faint_galaxies_out(small_dataset, tmp_path):
    done = train.train(small_dataset, tmp_path / "tl", network="tl", recipe=quick("tl"))
    with Dataset(small_dataset) as data:
        assert done.card["data"]["n"] == (data.mag <= 23).sum()
    assert done.card["domain"]["ranges"]["mag"] == [16.0, 23.0]
    assert done.predict(Inputs(np.zeros((2, 128, 128), np.float32)))[1] is None
    assert not any("Errors" in limit for limit in done.card["limits"])


def test_the_adversary_trains(small_dataset, tmp_path, tiny_network):
    done = any_adapted(small_dataset, tmp_path / "w", network=tiny_network)
    assert done.card["data"]["n"] == 128
    assert "64 simulated ones, with their labels, against a domain classifier" in done.card["summary"]


def any_adapted(data, output, network="fovea", adapt="dann", real=None, recipe=None, **options):
    """Weights of one epoch with real galaxies."""
    recipe = recipe or replace(ADAPT[network], epochs=1, batch=16)
    real = real_galaxies(data) if real is None else real
    return train.train(data, output, network=network, adapt=adapt, real=real, recipe=recipe, **options)


@pytest.mark.parametrize("kept", [True, False])
def test_batch_normalisations_stay_as_they_began_if_the_recipe_says_so(small_dataset, tmp_path, monkeypatch, kept):
    def core():
        stamps = networks.inputs().stamps
        x = keras.layers.BatchNormalization()(ops.mean(stamps, axis=1))
        x = keras.layers.Dense(5, activation="tanh", name="features")(x)
        return keras.Model(stamps, keras.layers.Dense(4)(x), name="dann")

    def moments(done):
        layers = done.keras_model().get_layer("core").layers
        return next(x for x in layers if isinstance(x, keras.layers.BatchNormalization)).get_weights()

    monkeypatch.setitem(networks.ARCHITECTURES, "dann", networks.Architecture(core, log=False, spreads=False))
    base = train.train(small_dataset, tmp_path / "base", network="dann", recipe=quick("dann"))
    recipe = quick("dann", keep_norms=kept)
    done = any_adapted(small_dataset, tmp_path / "w", network="dann", start=base.path, recipe=recipe)
    before, after = moments(base), moments(done)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True)) == kept


def step(labelled, standardised, stamps, alpha=1.0, adapt="dann"):
    """The core's weights after a step on two simulated and two real galaxies."""
    keras.utils.set_random_seed(3)
    core = tiny_core()
    is_real = np.array([False, True, True, False])
    recipe = Recipe(1, 4, 0.1, False, 1, False, alpha=alpha)
    model, arguments = losses.aligned(core, adapt, is_real, labelled, recipe, steps=4)
    rows = np.array([2, 3, 0, 1])
    x, y, weight = arguments(Inputs(stamps), standardised[rows], rows, 0.5)
    model.run_eagerly = True  # a single step does not pay for a graph
    model.train_on_batch(x, y, sample_weight=weight)
    return core.get_weights()


@pytest.mark.parametrize("adapt", losses.ALIGNMENTS)
def test_an_unlabelled_galaxy_does_not_change_the_gradient_of_the_regression(adapt):
    rng = np.random.default_rng(0)
    stamps, targets = rng.normal(size=(4, 128, 128)).astype(np.float32), rng.normal(size=(4, 4)).astype(np.float32)
    labelled = np.array([True, False, True, True])
    known = step(labelled, targets, stamps, adapt=adapt)
    other = targets + np.array([0, 9, 0, 0], np.float32)[:, None]
    brighter = stamps * np.array([1, 1, 1, 7], np.float32)[:, None, None]  # that of row 1
    for again in (step(labelled, other, stamps, adapt=adapt), step(labelled, targets, brighter, adapt=adapt)):
        assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(known, again, strict=True))
    assert not np.allclose(step(np.ones(4, bool), other, stamps, adapt=adapt)[0], known[0], atol=1e-3)
    assert not np.allclose(step(labelled, targets, brighter, alpha=0.5, adapt=adapt)[0], known[0], atol=1e-3)


def test_the_regression_is_a_mean_over_the_labelled_of_a_batch():
    is_real = np.array([False, True, True, False])
    for labelled, expected in ((np.ones(4, bool), [1, 1, 1]), (~is_real, [0, 1.5, 1.5]), (is_real & False, [0, 0, 0])):
        _, arguments = losses.aligned(tiny_core(), "dann", is_real, labelled, RECIPES["dann"], steps=4)
        x, y, sample_weight = arguments(Inputs(np.zeros((3, 128, 128))), np.zeros((3, 4)), np.array([2, 3, 0]), 0.5)
        assert list(sample_weight["means"]) == expected
        assert list(y["domain"]) == [1, 0, 0]
        assert 0.9 < x[1][0, 0] < 1


def test_galaxies_whose_labels_are_missing_are_unlabelled(small_dataset, tmp_path, tiny_network):
    real = real_galaxies(small_dataset)
    real.targets[::2, 2] = np.nan
    done = any_adapted(small_dataset, tmp_path / "w", network=tiny_network, real=real, adapt="daregram")
    assert "64 simulated ones, 32 of them with labels" in done.card["summary"]
    assert np.isfinite(done.predict(real.inputs(0, 4))[0]).all()
    assert done.card["adaptation"]["labelled"] == 32


def test_half_of_each_batch_is_real(small_dataset):
    with Dataset(small_dataset) as simulated:
        real = real_galaxies(small_dataset).taken(np.arange(20))
        for use_labels, n_train, n_valid in ((True, 48 + 16, 16 + 4), (False, 48 + 20, 16)):
            joined = Joined(simulated, real, 48, use_labels, seed=1)
            assert joined.train_rows == (0, n_train)
            assert joined.valid_rows == (n_train, n_train + n_valid)
            drawn = list(joined.batches(10, *joined.train_rows, np.random.default_rng(0)))
            assert len(drawn) == 7
            seen = np.concatenate([rows for _, rows in drawn])
            assert (joined.is_real[seen].reshape(7, 10).sum(axis=1) == 5).all()
            assert seen.max() < n_train
            assert set(np.flatnonzero(joined.is_real[:n_train])) <= set(seen)
            whole = list(joined.batches(10, 0, len(joined)))
            assert list(np.concatenate([rows for _, rows in whole])) == list(range(84))
            for inputs, rows in (drawn[0], whole[6]):
                for stamp, target in zip(inputs.stamps, joined.targets[rows], strict=True):
                    row = int(np.flatnonzero((simulated.targets == target).all(axis=1))[0])
                    np.testing.assert_array_equal(stamp, simulated.stamps(row, row + 1)[0])


def test_labelled_real_galaxies_choose_the_epoch_if_there_are_enough():
    is_real = np.repeat([False, True], 20)
    labelled = np.ones(40, bool)
    assert list(np.flatnonzero(judging_rows(labelled, is_real, (10, 40)))) == list(range(20, 40))
    labelled[29:] = False
    assert list(np.flatnonzero(judging_rows(labelled, is_real, (10, 40)))) == list(range(20))


def gram(features, is_real, factor=1.0):
    domain = np.column_stack([is_real, np.full(len(is_real), factor)]).astype(np.float32)
    return float(ops.convert_to_numpy(losses.gram_distance(domain, features.astype(np.float32)))[0])


def test_the_gram_distance_of_two_domains():
    rng = np.random.default_rng(0)
    features, is_real = np.maximum(rng.normal(size=(40, 6)), 0), np.repeat([0, 1], [20, 20])
    features[:, 4] = 0  # a dead feature
    features[20:] = features[:20]
    assert gram(features, is_real) == pytest.approx(0, abs=1e-4)
    assert gram(np.concatenate([features, features[20:]]), np.repeat([0, 1], [20, 40])) == pytest.approx(0, abs=1e-4)
    turned = features.copy()
    turned[20:] = turned[20:, ::-1]
    assert gram(turned, is_real) > 0.1
    scaled = np.where(is_real[:, None], 2, 1) * features
    assert gram(scaled, is_real) > 0.1
    assert gram(scaled, is_real, 0.5) == pytest.approx(gram(scaled, is_real) / 2)


def test_the_gradient_of_the_gram_distance_is_right():
    """Against finite differences, with all directions kept; duplicates give equal eigenvalues elsewhere."""
    rng = np.random.default_rng(1)
    offset, is_real = rng.normal(size=(30, 3)), np.repeat([0, 1], [12, 18])
    inner = keras.Input((3,))
    layer = keras.layers.EinsumDense("nf,f->nf", output_shape=(3,), kernel_initializer="ones")
    model = keras.Model(inner, layer(inner))
    model.compile(keras.optimizers.SGD(1.0), loss=losses.gram_distance)
    domain = np.column_stack([is_real, np.ones(30)]).astype(np.float32)
    model.train_on_batch(offset.astype(np.float32), domain)
    gradient = 1 - layer.get_weights()[0]
    numeric = [(gram(offset * (1 + d), is_real) - gram(offset * (1 - d), is_real)) / 0.02 for d in 0.01 * np.eye(3)]
    np.testing.assert_allclose(gradient, numeric, atol=0.01 * np.abs(numeric).max())


def test_a_killed_adaptation_continues_to_the_same_end(small_dataset, tmp_path, monkeypatch, tiny_network):
    adapted = partial(any_adapted, network=tiny_network)
    monkeypatch.setattr(loop, "KEEP_SECONDS", 0.0)

    def kill(progress):
        if progress.step == 4:
            raise KilledError

    with pytest.raises(KilledError):
        adapted(small_dataset, tmp_path / "w", seed=2, report=kill)
    with pytest.raises(InputError, match="other options"):
        adapted(small_dataset, tmp_path / "w", seed=2, real_labels=False)
    steps = []
    resumed = adapted(small_dataset, tmp_path / "w", seed=2, report=lambda p: steps.append(p.step))
    assert steps[0] == 4
    whole = adapted(small_dataset, tmp_path / "whole", seed=2)
    stamps = real_galaxies(small_dataset).inputs(0, 16)
    np.testing.assert_allclose(resumed.predict(stamps)[0], whole.predict(stamps)[0], rtol=1e-3, atol=1e-3)
    assert resumed.card["adaptation"]["method"] == "dann"
    assert resumed.card["adaptation"]["data"]["n"] == 64


def test_training_begins_from_weights_with_their_label_statistics(small_dataset, tmp_path, tiny_network):
    base = train.train(small_dataset, tmp_path / "base", network=tiny_network, recipe=quick("dann"))
    recipe = quick("dann", learning_rate=1e-9)
    done = train.train(
        small_dataset, tmp_path / "w", network=tiny_network, start=tmp_path / "base", limit=48, recipe=recipe, seed=1
    )
    assert done.card["label_mean"] == base.card["label_mean"]
    assert done.card["label_std"] == base.card["label_std"]
    assert done.card["base"] == {
        "name": "base", "sha256": base.sha256, **{k: base.card[k] for k in ("command", "seed", "data")}
    }  # fmt: skip
    assert "started from `base`" in done.card["summary"]
    stamps = shown(np.random.default_rng(0).normal(size=(8, 128, 128)).astype(np.float32))
    np.testing.assert_allclose(done.predict(stamps)[0], base.predict(stamps)[0], atol=1e-4)


def test_without_labels_nothing_depends_on_the_labels(small_dataset, tmp_path, tiny_network):
    outputs = []
    for i, shift in enumerate((0.0, 5.0)):
        real = real_galaxies(small_dataset)
        real.targets += shift
        done = any_adapted(small_dataset, tmp_path / f"{i}", network=tiny_network, real=real, real_labels=False)
        assert any("adapted to without labels" in limit for limit in done.card["limits"])
        outputs.append(done.predict(real.inputs(0, 4))[0])
    np.testing.assert_allclose(*outputs, rtol=1e-4)


def test_fine_tuning_learns_from_labels(small_dataset, tiny_weights, tmp_path):
    real = real_galaxies(small_dataset)
    recipe = replace(FINETUNE["fovea"], epochs=2, batch=8)
    records = []
    done = finetune(
        real, tmp_path / "tuned", base=tiny_weights, recipe=recipe, layers="all", test=small_dataset,
        report=lambda p: records.append(p.record),
    )  # fmt: skip
    assert done.card["base"]["name"] == "tiny"
    assert "64 labelled simulated galaxies" in done.card["summary"]
    assert done.card["data"]["command"] == "simulate"
    assert done.card["scores"]["test_set"] == "64 stamps of `simulate`"
    assert "- begun at: `tiny`, made by `train`" in (tmp_path / "tuned" / "README.md").read_text()
    assert done.card["data"]["n"] == 64
    assert [r["epoch"] for r in records if r] == [1, 2]
    before, after = (found.predict(real.inputs(0, 64)).targets for found in (weights.load(tiny_weights), done))
    truth = real.targets[:, 3]
    assert np.abs(after[:, 3] - truth).mean() < np.abs(before[:, 3] - truth).mean()


def test_a_few_labels_hardly_change_the_size_of_the_errors(small_dataset, tiny_weights, tmp_path):
    """Twelve validation galaxies are no calibration: the factor that they give counts as 12 of 62."""
    start, real = weights.load(tiny_weights), real_galaxies(small_dataset)
    recipe = replace(FINETUNE["fovea"], epochs=1, batch=8, learning_rate=1e-9)
    done = finetune(real, tmp_path / "tuned", base=tiny_weights, recipe=recipe, layers="all")
    answers, found = (one.predict(real.inputs(0, 64)) for one in (start, done))
    judges = np.random.default_rng(0).permutation(64)[52:]
    off = np.abs(pulls(answers.targets, answers.errors, real.targets))[judges]
    expected = np.quantile(off, 0.6827, axis=0) ** (12 / 62)
    np.testing.assert_allclose(np.median(found.errors / answers.errors, axis=0), expected, rtol=0.02)
    assert done.card["limits"][-1].startswith("Errors are those of tiny, times factors from the 12 galaxies")


def test_fine_tuning_keeps_the_better_schedule(small_dataset, tmp_path, tiny_network):
    train.train(small_dataset, tmp_path / "base", network=tiny_network, recipe=quick("dann"))
    real = real_galaxies(small_dataset)
    real.targets[:4] = np.nan
    recipe = replace(FINETUNE["dann"], epochs=2)
    seen = []
    done = finetune(
        real, tmp_path / "tuned", base=tmp_path / "base", recipe=recipe,
        report=lambda p: seen.append((p.schedule, p.epoch)),
    )  # fmt: skip
    assert list(dict.fromkeys(seen)) == [
        ("all", 1), ("all", 2), ("head", 1), ("head-first", 1), ("head-first", 2)
    ]  # fmt: skip
    errors = done.card["fine_tuning"]["valid_mae"]
    assert set(errors) == {"all", "head", "head-first"}
    assert done.card["fine_tuning"]["layers"] == min(errors, key=errors.get)
    assert done.card["data"]["n"] == 60
    assert not (tmp_path / "tuned.run").exists()


def test_the_head_alone_learns_while_the_body_is_frozen():
    real = shown(np.random.default_rng(0).normal(size=(8, 128, 128)).astype(np.float32))
    for body in (False, True):
        core = networks.fovea()
        names, before = [v.path for v in core.weights], core.get_weights()
        networks.freeze(core, body=not body)
        model, _ = losses.regression(core, FINETUNE["fovea"], steps=4)
        model.run_eagerly = True
        model.train_on_batch(networks.shown(core, real), np.ones((8, 6), np.float32))
        changed = {n for n, a, b in zip(names, before, core.get_weights(), strict=True) if not np.array_equal(a, b)}
        assert any("features" in name for name in changed)
        assert any("means" in name for name in changed)
        assert not any("batch_normalization" in name for name in changed)
        assert any("conv" in name for name in changed) == body


def test_fine_tuning_needs_some_galaxies(small_dataset, tiny_weights, tmp_path):
    few = real_galaxies(small_dataset).taken(np.arange(5))
    with pytest.raises(DatasetError, match="at least 10 labelled galaxies; received 5"):
        finetune(few, tmp_path / "w", base=tiny_weights)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "resnet"}, "one of fovea, fovea-fixed, tl, dann; received resnet"),
        ({"adapt": "dann"}, "give both `adapt` and `real`"),
        ({"adapt": "mmd"}, "one of dann, daregram; received mmd"),
        ({"start": "fovea-sky", "network": "tl"}, "is a network fovea-fixed: give `network` fovea-fixed"),
        ({"limit": 30}, "at least 32 stamps; received 30"),
        ({"recipe": quick("fovea", alpha=1.5)}, "weight of the regression is from 0 to 1; received 1.5"),
        ({"recipe": quick("fovea", learning_rate=0.0)}, "learning rate is positive; received 0.0"),
    ],
)
def test_bad_options_write_nothing(small_dataset, tmp_path, options, message):
    with pytest.raises((InputError, DatasetError), match=message):
        train.train(small_dataset, tmp_path / "w", **options)
    assert not list(tmp_path.iterdir())


def test_any_seed_trains(small_dataset, tmp_path, tiny_network):
    """Keras takes seeds of 32 bits, which the seeds of users need not have."""
    seed = 2**40 + 1
    base = train.train(small_dataset, tmp_path / "w", network=tiny_network, recipe=quick("dann"), seed=seed)
    assert base.card["seed"] == seed
    real, recipe = real_galaxies(small_dataset), quick("dann")
    assert finetune(real, tmp_path / "f", base=base.path, recipe=recipe, layers="all", seed=seed).card["seed"] == seed


def test_sets_without_what_the_network_is_shown_are_refused_before_training(small_dataset, psf_weights, tmp_path):
    """Those of an earlier version hold no PSF."""
    old, older = tmp_path / "old.h5", tmp_path / "older.h5"
    shutil.copy(small_dataset, old)
    with h5py.File(old, "r+") as file:
        del file["psf"]
    shutil.copy(old, older)
    real = real_galaxies(old)
    for data, options, name in (
        (old, {}, "old.h5"),
        ([old, older], {}, "training sets"),
        (small_dataset, {"test": old}, "old.h5"),
        (small_dataset, {"adapt": "dann", "real": real}, "real galaxies"),
    ):
        with pytest.raises(DatasetError, match=f"fovea is shown the psf of galaxies, which .*{name}.* do not hold"):
            train.train(data, tmp_path / "w", **options)
    for galaxies, options, name in ((real, {}, "real galaxies"), (real_galaxies(small_dataset), {"test": old}, "old")):
        with pytest.raises(DatasetError, match=f"fovea is shown the psf of galaxies, which .*{name}.* do not hold"):
            finetune(galaxies, tmp_path / "w", base=psf_weights, **options)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["old.h5", "older.h5"]


def test_fine_tuning_continues_only_under_the_backend_that_it_began_with(
    small_dataset, tiny_weights, tmp_path, monkeypatch
):
    def kill(progress):
        if progress.record is not None:
            raise KilledError

    recipe = replace(FINETUNE["fovea"], epochs=2)
    tuned = partial(finetune, real_galaxies(small_dataset), tmp_path / "w", base=tiny_weights, recipe=recipe)
    with pytest.raises(KilledError):
        tuned(layers="all", report=kill)
    monkeypatch.setattr(keras.backend, "backend", lambda: "another")
    with pytest.raises(InputError, match=r"backend: .*, now another"):
        tuned(layers="all")


def test_existing_weights_are_kept(small_dataset, tmp_path):
    (tmp_path / "w").mkdir()
    with pytest.raises(InputError, match="exists already"):
        train.train(small_dataset, tmp_path / "w")
    with pytest.raises(InputError, match="not made by this command"):
        train.train(small_dataset, tmp_path / "w", overwrite=True)


def test_a_missing_test_set_is_noticed_before_training(small_dataset, tmp_path):
    with pytest.raises(DatasetError, match="there is none"):
        train.train(small_dataset, tmp_path / "w", test=tmp_path / "none.h5")


def test_an_unknown_angle_does_not_change_the_loss():
    rng = np.random.default_rng(0)
    out, true = rng.normal(size=(3, 17)).astype(np.float32), rng.normal(size=(3, 6)).astype(np.float32)
    known = ops.convert_to_numpy(losses.covariance_loss(true, out))
    true[1, 4:] = np.nan
    found = ops.convert_to_numpy(losses.covariance_loss(true, out))
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[[0, 2]], known[[0, 2]])


def test_the_same_seed_gives_the_same_weights(small_dataset, tmp_path, tiny_network):
    trained = partial(train.train, small_dataset, network=tiny_network, recipe=tiny_recipe(), seed=4)
    done = [trained(tmp_path / name) for name in "ab"]
    stamps = shown(np.random.default_rng(0).normal(size=(8, 128, 128)).astype(np.float32))
    np.testing.assert_allclose(done[0].predict(stamps)[0], done[1].predict(stamps)[0], rtol=1e-3)


def test_reading_ahead_stops_when_nobody_listens():
    drawn = []
    items = loop.prefetched((drawn.append(i) or i for i in range(1000)), depth=2)
    next(items)
    items.close()
    time.sleep(0.5)
    assert len(drawn) < 10


def test_reading_ahead_hands_on_errors():
    def broken():
        yield 1
        raise ValueError("disk")

    items = loop.prefetched(broken())
    assert next(items) == 1
    with pytest.raises(ValueError, match="disk"):
        next(items)


@pytest.mark.parametrize("flags", ["fpu sse2 amx_bf16", "fpu sse2", None])
def test_bfloat16_is_for_machines_that_compute_in_it(small_dataset, tmp_path, tiny_network, monkeypatch, flags):
    monkeypatch.setattr(device, "accelerators", list)
    monkeypatch.setattr(device, "CPU_FLAGS", tmp_path / "cpuinfo")
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"flags\t\t: {flags}\n")
    trained = partial(train.train, small_dataset, tmp_path / "w", network=tiny_network)
    if flags is not None and "bf16" in flags:
        assert trained(recipe=quick("dann", bfloat16=True)).card["recipe"]["bfloat16"]
        return
    with pytest.raises(InputError, match="`bfloat16` needs a GPU, or a CPU with amx_bf16"):
        trained(recipe=quick("dann", bfloat16=True))
    assert not list(tmp_path.glob("w*"))


def test_no_epochs_calibrate_and_leave_the_network(small_dataset, tiny_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "LEAST", 60)
    recipe, base = tiny_recipe(epochs=0), weights.load(tiny_weights)
    done = train.train(small_dataset, tmp_path / "w", start=tiny_weights, recipe=recipe, test=small_dataset)
    assert done.card["training"] == base.card["training"]
    assert done.card["data"] == base.card["data"]
    assert done.card["calibrated"]["data"]["n"] == 64
    assert done.card["scores"]["samples"]
    with Dataset(small_dataset) as data:
        stamps, truth = data.inputs(0, 64), data.targets
    np.testing.assert_array_equal(done.answers(stamps), base.answers(stamps))
    found = done.predict(stamps)
    away = np.abs(pulls(found.targets, found.errors, truth))
    # What one level holds too few, the other holds too many; for the ellipticity one of them counts.
    both = (away < 1).mean(axis=0) + (away < 1.96).mean(axis=0)
    assert both[:3] == pytest.approx([0.6827 + 0.95] * 3, abs=0.05)
    assert np.mean(away[:, 3] < 1) == pytest.approx(0.6827, abs=0.05)


def test_weights_calibrated_on_some_telescopes_have_the_domain_of_these():
    """In the width of the PSF and the correlation of the noise, on which the calibration depends."""
    domain = {"telescopes": "any", "psf": {"fwhm": [1.1, 8.3], "light_1": [0.4, 0.9]}, "correlation": [1.0, 3.9]}
    base = SimpleNamespace(name="all", card={"domain": domain})
    truth = {"fwhm": np.array([2.8, 4.7, 8.0]), "correlation": np.array([0.9, 1.3, 3.0])}
    found = card.calibrated_domain(base, SimpleNamespace(config={"telescopes": "hsc"}, truth=truth), 2)
    assert found["psf"] == {"fwhm": [2.8, 4.7], "light_1": [0.4, 0.9]}
    assert found["correlation"] == [1.0, 1.3]
    assert domain["psf"]["fwhm"] == [1.1, 8.3]
    assert card.calibrated_domain(base, SimpleNamespace(config={}, truth={}), 2) == domain
    truth["fwhm"] = np.array([8.5, 9.0])
    with pytest.raises(InputError, match=r"a width of the PSF of 1\.10 to 8\.30; received 8\.50 to 9\.00\. Train on"):
        card.calibrated_domain(base, SimpleNamespace(config={"telescopes": "wide"}, truth=truth), 2)


def test_no_epochs_need_weights_that_predict_errors(small_dataset, tiny_weights, tmp_path):
    for options in ({}, {"start": "tl"}, {"start": tiny_weights, "on_the_fly": True}):
        with pytest.raises(InputError, match="With 0 epochs"):
            train.train(small_dataset, tmp_path / "w", recipe=tiny_recipe(epochs=0), **options)
    with pytest.raises(InputError, match="at least 600 galaxies; received 64"):
        train.train(small_dataset, tmp_path / "w", start=tiny_weights, recipe=tiny_recipe(epochs=0))
    assert not (tmp_path / "w").exists()


def tiny_model():
    stamps = keras.Input((2,))
    model = keras.Model(stamps, keras.layers.Dense(1)(stamps))
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.mark.parametrize("name", ["2-0-last.weights.h5", "best.weights.h5", "state.json", "log.jsonl"])
def test_a_full_disk_leaves_what_was_kept(tmp_path, monkeypatch, name):
    model = tiny_model()

    def epoch(run):
        run.state["epoch"] += 1
        run.save(model, "best.weights.h5")
        run.log({"epoch": run.state["epoch"]})
        run.keep(model)

    def opened():
        return Run(tmp_path / "run", {"seed": 1}, overwrite=False)

    kept_by = opened()
    run = loop.RunState(kept_by)
    epoch(run)
    before, kept = model.get_weights(), {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    model.set_weights([w + 1 for w in before])
    writing = Run.writing

    @contextmanager
    def failing(self, target):
        with writing(self, target) as partial:
            yield partial
            if target == name:
                partial.write_bytes(b"half")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Run, "writing", failing)
    with pytest.raises(OutputError, match=f"{name} could not be written: No space left on device. .* is intact"):
        epoch(run)
    monkeypatch.undo()
    kept_by.close()
    assert (tmp_path / "run" / name).exists() == (name in kept)
    assert not list((tmp_path / "run").glob("partial*"))
    again = loop.RunState(opened())
    other = tiny_model()
    again.resume(other)
    assert again.state["epoch"] == 1
    for a, b in zip(other.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    epoch(again)
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]


def test_a_damaged_run_is_told(tmp_path):
    with Run(tmp_path / "run", {}, overwrite=False) as run:
        state = loop.RunState(run)
        state.keep(tiny_model())
        kept = tmp_path / "run" / state.state["last"]
        kept.write_bytes(kept.read_bytes()[:1000])
        with pytest.raises(InputError, match="the run is damaged"):
            loop.RunState(run).resume(tiny_model())


def a_task(source, galaxies=None):
    """All but a network, trained on every row but the last 16."""
    scaling = loop.Scaling(True, np.array([-9, 2, 0.5, 0.5]), np.array([3, 1, 0.8, 0.25]))
    n = len(source)
    model = tiny_model()
    standardised = scaling(np.where(np.isfinite(source.targets), source.targets, 1.0))
    return loop.Task(
        source,
        (0, n - 16),
        (n - 16, n),
        model,
        model,
        lambda *_: None,
        standardised,
        np.ones(n, bool),
        scaling,
        galaxies,
    )


def test_stamps_that_are_not_finite_are_named(small_dataset):
    with Dataset(small_dataset) as data:
        source = data.selected(99, None)
    source.inputs(0, 64).stamps[37, 3, 4] = np.nan
    shuffled = source.taken(np.random.default_rng(0).permutation(64))
    with pytest.raises(DatasetError, match=r"row 37 of the simulated galaxies \(from 0\) has others"):
        loop.finite(shuffled, shuffled.inputs(0, 64), np.arange(64))
    with pytest.raises(DatasetError, match="row 37 of the"):
        list(loop.batches(a_task(source), tiny_recipe(), 0, 0, 0, {}))


def test_noise_makes_a_stamp_shallower_and_stays_what_it_is():
    rng = np.random.default_rng(0)
    correlation = F160W.autocorrelation()
    stamps = np.array([correlated_noise(rng, 128, correlation) for _ in range(64)])
    stamps /= stamps.std()
    factors = np.repeat([0.0, 0.5, 1.0, 2.0], 16)
    source = np.pad(correlation, 1)
    deep = stamps.copy()
    deep[:, 64, 64] += 1000
    deeper, fainter = augment.deepened(Inputs(deep), factors, source, rng)
    out = deeper.stamps
    assert deeper.noise is None
    np.testing.assert_array_equal(out[:16], deep[:16])
    np.testing.assert_allclose(fainter, 2.5 * np.log10(np.sqrt(1 + factors**2)))
    np.testing.assert_allclose(out[:, 64, 64], 1000 * 10 ** (-0.4 * fainter), rtol=0.01)
    out[:, 64, 64] = 0
    for some in np.split(out, 4):
        assert some.std() == pytest.approx(1, abs=0.02)
        for lag in ((0, 1), (1, 1), (2, 0), (3, 0)):
            product = some[:, lag[0] :, lag[1] :] * some[:, : 128 - lag[0], : 128 - lag[1]]
            assert product.mean() == pytest.approx(source[3 + lag[0], 3 + lag[1]], abs=0.02)


def test_more_electrons_make_the_rms_of_a_shallower_stamp():
    factors, known = np.array([0.0, 1.0, 2.0, 1.0]), noise_numbers(2.0, np.array([10.0, 10.0, 10.0, np.nan]))
    inputs = Inputs(np.zeros((4, 128, 128), np.float32), np.zeros((4, 4, 32, 32), np.float32), known)
    deeper, _ = augment.deepened(inputs, factors, np.pad(F160W.autocorrelation(), 1), np.random.default_rng(0))
    electrons = 10 * np.sqrt(1 + factors**2)
    electrons[3] = np.nan
    np.testing.assert_allclose(deeper.noise, noise_numbers(2.0, electrons), rtol=1e-6)
    np.testing.assert_array_equal(inputs.noise, noise_numbers(2.0, np.array([10.0, 10.0, 10.0, np.nan])))


def test_the_correlation_of_the_noise_is_measured(small_dataset):
    with Dataset(small_dataset) as data:
        found = augment.noise_correlation(data, False)
    np.testing.assert_allclose(found, np.pad(F160W.autocorrelation(), 1), atol=0.03)


def test_targets_follow_the_noise_that_is_added(small_dataset):
    with Dataset(small_dataset) as data:
        task, recipe = a_task(data), tiny_recipe(noise=1.0)
        correlations = {False: augment.noise_correlation(data, False)}
        epochs = [list(loop.batches(task, recipe, 3, epoch, 0, correlations)) for epoch in (0, 1)]
        (again,) = list(loop.batches(task, recipe, 3, 1, 2, correlations))
    np.testing.assert_array_equal(again.inputs.stamps, epochs[1][2].inputs.stamps)
    shifts = np.empty((2, 48, 4))
    for seen, batches in zip(shifts, epochs, strict=True):
        for batch in batches:
            seen[batch.rows] = task.scaling.back(batch.learned) - data.targets[batch.rows]
    np.testing.assert_allclose(shifts[..., 1:], 0, atol=1e-4)
    assert 0 < shifts[..., 0].min() < shifts[..., 0].max() < 2.5 * np.log10(np.sqrt(2)) + 1e-4
    assert (shifts[0, :, 0] != shifts[1, :, 0]).all()


def test_a_run_killed_after_the_last_step_of_an_epoch_has_seen_no_stamps_since(small_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_validated", lambda task: {})
    with Dataset(small_dataset) as data, Run(tmp_path / "run", {}, overwrite=False) as run:
        files = loop.RunState(run)
        files.state["step"] = 3
        record = loop._epoch(a_task(data), replace(tiny_recipe(), batch=20), 3, files, {}, loop.silent)
    assert record["stamps_per_second"] == 0


def test_noise_is_not_added_to_galaxies_drawn_on_the_fly(small_dataset, tmp_path):
    with pytest.raises(InputError, match=r"a recipe with `noise` 0\.5\. Set it to 0"):
        train.train(small_dataset, tmp_path / "w", recipe=tiny_recipe(noise=0.5), on_the_fly=True)


@pytest.mark.parametrize(
    ("config", "limit"), [({"neighbours": True}, "single"), ({"galaxies": "real-like"}, "invented")]
)
def test_limits_are_those_of_the_training_set_where_a_part_of_it_trains(small_dataset, config, limit):
    with Dataset(small_dataset) as data:
        data.config.update(config)
        part = data.selected(np.inf, 32)
        first, *_ = card.limits(a_task(part), data, None, errors=True)
    assert limit in first
    assert "isolated" not in first


@pytest.mark.slow
def test_galaxies_drawn_on_the_fly_train_and_a_killed_run_continues(small_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "on_accelerator", lambda: np.asarray)
    monkeypatch.setattr(loop, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr("sersicnet.training.on_the_fly.DEVICE_PORTION", 32)

    def kill(progress):
        if progress.step == 2:
            raise KilledError

    with pytest.raises(KilledError):
        train.train(small_dataset, tmp_path / "w", recipe=tiny_recipe(), seed=2, on_the_fly=True, report=kill)
    records = []
    done = train.train(
        small_dataset, tmp_path / "w", recipe=tiny_recipe(), seed=2, on_the_fly=True, report=records.append
    )
    whole = train.train(small_dataset, tmp_path / "whole", recipe=tiny_recipe(), seed=2, on_the_fly=True)
    stamps = shown(np.random.default_rng(0).normal(size=(8, 128, 128)).astype(np.float32))
    np.testing.assert_allclose(done.predict(stamps)[0], whole.predict(stamps)[0], rtol=1e-3, atol=1e-3)
    assert "on the fly" in whole.card["summary"]
    assert records[-1].record["error_mag"] > 0


def test_galaxies_drawn_on_the_fly_stand_in_for_the_simulated_ones_only(small_dataset, monkeypatch):
    monkeypatch.setattr("sersicnet.training.on_the_fly.DEVICE_PORTION", 32)
    real = real_galaxies(small_dataset)
    with Dataset(small_dataset) as data, OnTheFly(data, 5, asarray=np.asarray) as galaxies:
        source = Joined(data, real, 48, True, 0)
        task, recipe = a_task(source, galaxies), tiny_recipe(symmetries=False)
        batches = list(loop.batches(task, recipe, 3, 0, 0, {}))
        resumed = list(loop.batches(task, recipe, 3, 0, 2, {}))
        stored = list(source.batches(16, *task.train_rows, np.random.default_rng([3, 0, 0])))
    for batch, (inputs, rows) in zip(batches, stored, strict=True):
        is_real = source.is_real[rows]
        np.testing.assert_array_equal(batch.rows, rows)
        same = (batch.inputs.stamps == inputs.stamps).all(axis=(1, 2))
        np.testing.assert_array_equal(same, is_real)
        np.testing.assert_array_equal((batch.learned == task.standardised[rows]).all(axis=1), is_real)
    for batch, other in zip(batches[2:], resumed, strict=True):
        np.testing.assert_array_equal(batch.inputs.stamps, other.inputs.stamps)
        np.testing.assert_array_equal(batch.learned, other.learned)


def test_labels_beyond_the_ranges_of_the_weights_are_left_out(small_dataset, tiny_weights, tmp_path):
    real = real_galaxies(small_dataset)
    real.targets[5, 2] = 9.1
    real.targets[9, 0] = 4.0
    with pytest.warns(SersicnetWarning, match="2 of 64 labelled .* sersic_n = 9.1, beyond 0.3 to 6.2"):
        assert np.flatnonzero(~finetuning._within(weights.load(tiny_weights), real.targets, real.mag)).tolist() == [
            5,
            9,
        ]
    real.targets[:60, 2] = 9.1
    warned, raised = pytest.warns(SersicnetWarning, match="60 of 64"), pytest.raises(DatasetError, match="received 4")
    with warned, raised:
        finetune(real, tmp_path / "w", base=tiny_weights)


def test_a_magnitude_beyond_the_range_is_told_as_it_is_listed(small_dataset, tiny_weights):
    real = real_galaxies(small_dataset)
    real.mag[3] += 9
    real.targets[3, 0] += 9
    with pytest.warns(SersicnetWarning, match=rf"has mag = {real.mag[3]:.4g}, beyond 1[5-9]\.\d+ to 2[4-8]\.\d+"):
        finetuning._within(weights.load(tiny_weights), real.targets, real.mag)


def test_fine_tuning_without_labels_names_what_takes_galaxies_without(small_dataset, tiny_weights, tmp_path):
    real = real_galaxies(small_dataset)
    real.targets[:] = np.nan
    with pytest.raises(DatasetError, match=r"from labels; .* 64 galaxies without\. `sersicnet adapt` takes an image"):
        finetune(real, tmp_path / "w", base=tiny_weights)


def test_datasets_whose_stamps_would_not_be_finite_are_refused(small_dataset, tmp_path):
    path = shutil.copy(small_dataset, tmp_path / "d.h5")
    with h5py.File(path, "r+") as file:
        file["truth/rms"][21] = np.nan
    with pytest.raises(DatasetError, match=r"row 21: .*rms nan make no finite stamp"):
        train.train(path, tmp_path / "w")
    with h5py.File(path, "r+") as file:
        file["truth/rms"][21], file["truth/sersic_n"][7] = 0.003, np.nan
    with pytest.raises(DatasetError, match=r"needs finite targets .*; row 7 of the simulated galaxies"):
        train.train(path, tmp_path / "w", recipe=tiny_recipe())
    with h5py.File(path, "r+") as file:
        file.attrs["schema_version"] = 99
    with pytest.raises(DatasetError, match="has dataset schema 99"):
        train.train(path, tmp_path / "w")
    assert [file.name for file in tmp_path.iterdir()] == ["d.h5"]


def test_a_table_of_epochs_is_told_to_tensorboard(tmp_path, monkeypatch):
    record = {"epoch": 1, "loss": 0.5, "valid_mae": 0.25}
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    with pytest.raises(InputError, match="pip install tensorboard"), loop.tensorboard(tmp_path / "t"):
        pass
    monkeypatch.undo()
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with loop.tensorboard(tmp_path / "t") as write:
        write(loop.Progress(1, 2, 1, 3, 0.7, None))
        write(loop.Progress(1, 2, 3, 3, 0.5, record))
    events = EventAccumulator(str(tmp_path / "t")).Reload()
    assert events.Tensors("loss")[0].tensor_proto.float_val[0] == 0.5
    assert events.Tensors("valid_mae")[0].step == 1
    with loop.tensorboard(None) as write:
        write(loop.Progress(1, 2, 3, 3, 0.5, record))
