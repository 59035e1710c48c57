"""Training under each Keras backend that is installed, in a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from sersicnet import weights
from sersicnet.dataset import Dataset
from sersicnet.errors import WeightsError

SCRIPT = """
import json, sys, warnings
from dataclasses import replace
import numpy as np
from sersicnet import weights
from sersicnet import networks
from sersicnet.networks import keras, ops
from sersicnet.training import loop, train
from sersicnet.training.labels import real_galaxies
from sersicnet.training.recipe import RECIPES
from sersicnet.dataset import Dataset

data, output, network, on_the_fly = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "on_the_fly"
loop.KEEP_SECONDS = 0.0
warnings.simplefilter("ignore")
if on_the_fly:  # as on an accelerator
    import torch
    train.on_accelerator = lambda: torch.asarray
plain = network == "fovea"
recipe = replace(RECIPES[network], epochs=2, batch=16, anneal=False, learning_rate=1e-3, patience=9)
options = {"recipe": recipe, "seed": 1, "network": network, "on_the_fly": on_the_fly}
losses, steps, killed = [], [], []

def report(progress):
    if progress.record:
        losses.append(progress.record["loss"])
    elif plain and not killed and (progress.epoch, progress.step) == (2, 2):
        killed.append(True)
        raise KeyboardInterrupt
    else:
        steps.append((progress.epoch, progress.step))

if not plain:
    options |= {"adapt": "dann", "real": real_galaxies(data), "recipe": replace(recipe, epochs=1, learning_rate=1e-4)}
try:
    train.train(data, output, report=report, **options)
except KeyboardInterrupt:
    train.train(data, output, report=report, **options)
found = weights.load(output, to_train=True)
with Dataset(data) as some:
    out = ops.convert_to_numpy(found.keras_model()(some.stamps(0, 8)))
keras.utils.set_random_seed(1)
before, after = networks.ARCHITECTURES[network].build(), found.keras_model().get_layer("core")
pairs = zip(before.trainable_weights, after.trainable_weights, strict=True)
moved = [bool((ops.convert_to_numpy(a) != ops.convert_to_numpy(b)).any()) for a, b in pairs]
backend = keras.backend.backend()
print(json.dumps({"moved": moved, "backend": backend, "losses": losses, "steps": steps, "out": out.tolist()}))
"""

BACKENDS = [
    pytest.param("tensorflow", marks=pytest.mark.slow),  # test_train does the same without a process
    "jax",
    "torch",
]


@pytest.mark.parametrize(
    ("backend", "network", "on_the_fly"),
    [
        *(pytest.param(*b.values, n, "stored", marks=b.marks) if not isinstance(b, str) else (b, n, "stored")
          for b in BACKENDS for n in ("fovea", "dann")),
        ("torch", "fovea", "on_the_fly"),
    ],
)  # fmt: skip
def test_a_network_trains_and_is_resumed(small_dataset, tmp_path, backend, network, on_the_fly):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(small_dataset), str(tmp_path / "w"), network, on_the_fly],
        env=os.environ | {"KERAS_BACKEND": backend, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["backend"] == backend
    assert np.isfinite(result["losses"]).all()
    assert np.isfinite(result["out"]).all()
    assert all(result["moved"])
    if network == "fovea":
        assert [tuple(step) for step in result["steps"]] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]
    with Dataset(small_dataset) as data:
        inputs = data.inputs(0, 8)
    if importlib.util.find_spec("tensorflow") is None:
        with pytest.raises(WeightsError, match="sersicnet export"):
            weights.load(tmp_path / "w")
        return
    targets, errors, *_ = weights.load(tmp_path / "w").predict(inputs)
    if errors is None:
        np.testing.assert_allclose(targets, result["out"], rtol=2e-3, atol=2e-3)
    else:
        np.testing.assert_allclose(targets, np.array(result["out"])[:, :4], rtol=2e-3, atol=2e-3)
