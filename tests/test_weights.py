import json
import shutil

import numpy as np
import pytest

from sersicnet import weights
from sersicnet.dataset import Dataset
from sersicnet.errors import InputError, WeightsError
from sersicnet.schema import TARGETS


@pytest.fixture
def copy(tiny_weights, tmp_path):
    return shutil.copytree(tiny_weights, tmp_path / "copy")


def test_shipped_weights_are_found_by_name():
    assert weights.DEFAULT in weights.shipped()
    assert weights.load(weights.DEFAULT).name == weights.DEFAULT


@pytest.mark.parametrize("name", weights.shipped())
def test_shipped_weights_are_small_and_tell_their_story(name):
    found = weights.load(name)
    size = sum(file.stat().st_size for file in found.path.iterdir())
    assert size < 12e6
    assert found.card["command"].startswith("sersicnet ")
    assert found.card["scores"]["samples"]["mag <= 23"]["n"] > 1000
    assert (found.path / "README.md").read_text() == weights.readable(found.card)


@pytest.mark.parametrize("name", weights.shipped())
def test_keras_and_onnx_agree(name, small_dataset):
    found = weights.load(name)
    with Dataset(small_dataset) as data:
        stamps = data.stamps(0, 32)
    targets, errors = found.predict(stamps)
    ours = np.hstack([targets, errors]) if errors is not None else targets
    theirs = np.asarray(found.keras_model()(stamps))
    for i, target in enumerate(TARGETS):
        tolerance = 1e-4 * (target.high - target.low)
        np.testing.assert_allclose(ours[:, i], theirs[:, i], atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize("name", ["network.keras", "network.onnx", "card.json", "README.md"])
def test_a_changed_byte_is_noticed(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(WeightsError, match=f"{name} does not have the SHA-256"):
        weights.load(copy)


@pytest.mark.parametrize("name", ["network.keras", "network.onnx", "card.json", "README.md"])
def test_a_missing_file_is_noticed(copy, name):
    (copy / name).unlink()
    with pytest.raises(WeightsError, match=f"has no {name}"):
        weights.load(copy)


def test_what_is_no_weights_directory(tmp_path):
    with pytest.raises(WeightsError, match=r"a shipped name \(.*fovea-sim.*\) or a directory; received nothing"):
        weights.load("nothing")
    with pytest.raises(WeightsError, match="it has no SHA256SUMS"):
        weights.load(tmp_path)


def test_another_schema_is_refused(copy):
    card = json.loads((copy / "card.json").read_text())
    weights.rewrite_card(copy, {**card, "schema_version": 99})
    with pytest.raises(WeightsError, match="schema 99, this version reads 1"):
        weights.load(copy)


def test_a_stamp_with_nan_is_nan_and_alone(tiny_weights):
    stamps = np.zeros((3, 128, 128), np.float32)
    stamps[1, 5, 5] = np.nan
    targets, errors = weights.load(tiny_weights).predict(stamps)
    assert list(np.isnan(targets).all(axis=1)) == [False, True, False]
    assert list(np.isnan(errors).all(axis=1)) == [False, True, False]


def test_predictions_do_not_depend_on_the_batch(tiny_weights):
    stamps = np.random.default_rng(0).normal(size=(weights.BATCH + 3, 128, 128)).astype(np.float32)
    found = weights.load(tiny_weights)
    together, _ = found.predict(stamps)
    alone, _ = found.predict(stamps[-1:])
    np.testing.assert_allclose(together[-1:], alone, rtol=1e-4)


def test_no_stamps_give_no_rows(tiny_weights):
    targets, errors = weights.load(tiny_weights).predict(np.zeros((0, 128, 128), np.float32))
    assert targets.shape == errors.shape == (0, 4)


def test_stamps_of_another_size_are_refused(tiny_weights):
    with pytest.raises(InputError, match="128 x 128"):
        weights.load(tiny_weights).predict(np.zeros((1, 64, 64), np.float32))
