"""The networks: how fast they measure and train, and how large they are.

``python benchmarks/networks.py [--train] [--networks fovea fovea-fixed] [--stamps 64] [--rounds 9] [--options]``

Stamps a second through ONNX Runtime, as `sersicnet measure` runs it, and through
Keras, in batches of `sersicnet.weights.BATCH` with one PSF; multiply-adds and weights. If ONNX
Runtime has a GPU, the column of ONNX Runtime is that of the GPU, as the first line of the output states. Networks
have weights that ship, else random ones, which are as fast. All take turns in each
round, so that ratios do not depend on what else the machine does; printed are medians
over the rounds. CPU time of one thread is what a core has to do: it tells most on a
machine that is busy.

``--train`` measures seconds an epoch of 50,000 stamps, from a few dozen steps of each
network: the forward and backward pass and Adam's step, in batches of the recipe, stamps in
memory; ``dann`` with its adversary. ``--options`` compares options of ONNX Runtime.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime

from sersicnet import networkfile, networks, weights
from sersicnet import session as sessions
from sersicnet.image.views import psf_views
from sersicnet.networks import keras
from sersicnet.schema import N_TARGETS, STAMP_SIZE, Inputs, noise_numbers
from sersicnet.training.device import device, jit
from sersicnet.training.recipe import RECIPES

EPOCH = 50_000


def multiply_adds(model):
    """Multiply-adds of convolutions and dense layers, for one stamp."""
    total = 0
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            total += multiply_adds(layer)
        elif isinstance(layer, keras.layers.DepthwiseConv2D):
            total += int(np.prod(layer.output.shape[1:3])) * int(np.prod(layer.kernel.shape))
        elif isinstance(layer, keras.layers.SeparableConv2D):
            pixels = int(np.prod(layer.output.shape[1:3]))
            total += pixels * sum(int(np.prod(w.shape)) for w in layer.trainable_weights if len(w.shape) == 4)
        elif isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense)):
            places = int(np.prod(layer.output.shape[1:-1]))
            total += places * int(np.prod(layer.kernel.shape))
    return total


def built(name, folder):
    """A network with its units as a Keras model, its ONNX file, and where its weights are from."""
    architecture = networks.ARCHITECTURES[name]
    core = architecture.build()
    for found in map(weights.load, weights.shipped()):
        if found.card["network"] == name and found.card["parameters"] == core.count_params():
            return found.keras_model(), found.path / weights.ONNX, f"weights of {found.name}"
    scale = np.ones(N_TARGETS) if architecture.spreads else None
    model = networks.with_units(architecture, core, np.zeros(N_TARGETS), np.ones(N_TARGETS), error_scale=scale)
    path = Path(folder) / f"{name}.onnx"
    networkfile.export_onnx(model, path)
    return model, path, "random weights"


def session(path, providers, **changes):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for name, value in changes.items():
        setattr(options, name, value)
    return onnxruntime.InferenceSession(str(path), options, providers=providers)


def shown_inputs(n):
    """Inputs of `n` stamps of noise, with one PSF of 3 pixels for all."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:65, :65] - 32
    psf = psf_views(np.exp(-(x**2 + y**2) / (2 * 1.27**2)))[None]
    noise = noise_numbers(np.full(n, 1.5), np.full(n, np.nan))
    return Inputs(rng.normal(size=(n, STAMP_SIZE, STAMP_SIZE)).astype(np.float32), psf, noise)


def runner(path, inputs, batch=weights.BATCH, providers=None, **changes):
    """A function that puts all stamps through an ONNX file."""
    opened = session(path, providers or sessions.providers(), **changes)
    names = [port.name for port in opened.get_inputs()]
    parts = [inputs.taken(slice(i, i + batch)) for i in range(0, inputs.n, batch)]
    return lambda: [opened.run(None, {name: getattr(part, name) for name in names}) for part in parts]


def keras_runner(model, inputs):
    # Keras wants as many PSFs as stamps.
    inputs = inputs._replace(psf=np.repeat(inputs.psf, inputs.n, axis=0))

    def work():
        for i in range(0, inputs.n, weights.BATCH):
            part = inputs.taken(slice(i, i + weights.BATCH))
            keras.ops.convert_to_numpy(model.predict_on_batch(networks.shown(model, part)))

    return work


def paired(works, rounds):
    """Wall and CPU seconds of each piece of work, medians over rounds in which all take turns."""
    names = list(works)
    wall, cpu = ({name: [] for name in names} for _ in range(2))
    for work in works.values():
        work()
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            started, spent = time.perf_counter(), time.process_time()
            works[name]()
            cpu[name].append(time.process_time() - spent)
            wall[name].append(time.perf_counter() - started)
    return {n: float(np.median(wall[n])) for n in names}, {n: float(np.median(cpu[n])) for n in names}


def inference(names, inputs, rounds):
    with tempfile.TemporaryDirectory() as folder:
        models = {name: built(name, folder) for name in names}
        works = {}
        for name, (model, path, _) in models.items():
            works[name, "ONNX Runtime"] = runner(path, inputs)
            works[name, "Keras"] = keras_runner(model, inputs)
            works[name, "one thread"] = runner(path, inputs, providers=["CPUExecutionProvider"], intra_op_num_threads=1)
        wall, cpu = paired(works, rounds)
        sizes = {name: (multiply_adds(model), model.count_params()) for name, (model, _, _) in models.items()}
    print("| network | M multiply-adds | weights | ONNX stamps/s | ms | Keras stamps/s | ms | CPU ms, one thread |")
    print("|" + "---|" * 8)
    for name in names:
        cells = [name, f"{sizes[name][0] / 1e6:.1f}", f"{sizes[name][1]:,}"]
        for way in ("ONNX Runtime", "Keras"):
            seconds = wall[name, way] / inputs.n
            cells += [f"{1 / seconds:.0f}", f"{1e3 * seconds:.2f}"]
        cells.append(f"{1e3 * cpu[name, 'one thread'] / inputs.n:.2f}")
        print("| " + " | ".join(cells) + " |")
    for name in names[1:]:
        ratios = [f"{way} {wall[name, way] / wall[names[0], way]:.2f}" for way in ("ONNX Runtime", "Keras")]
        ratios.append(f"CPU time of one thread {cpu[name, 'one thread'] / cpu[names[0], 'one thread']:.2f}")
        print(f"{names[0]} is faster than {name} by: " + ", ".join(ratios))
    for name, (_, _, origin) in models.items():
        print(f"{name}: {origin}")


def training(names, steps):
    """Seconds an epoch; networks take turns, some steps at a time."""
    works, batches = {}, {}
    rng = np.random.default_rng(0)
    for name in names:
        core, batch = networks.ARCHITECTURES[name].build(), RECIPES[name].batch
        inputs = shown_inputs(batch)
        inputs = inputs._replace(psf=np.repeat(inputs.psf, batch, axis=0))
        targets = rng.normal(size=(batch, core.output_shape[1])).astype(np.float32)
        arguments = (networks.shown(core, inputs), targets)
        losses = "mse"
        if name == "dann":
            core = networks.with_adversary(core)
            given = [inputs.stamps, np.ones((batch, 1), np.float32)]
            arguments = (given, {"means": targets, "domain": rng.integers(2, size=batch)})
            losses = {"means": "mse", "domain": "sparse_categorical_crossentropy"}
        # As in training: XLA where there is an accelerator; TensorFlow on a CPU is slower with it.
        core.compile("adam", loss=losses, jit_compile=jit())
        works[name] = lambda core=core, arguments=arguments: core.train_on_batch(*arguments)
        batches[name] = batch
        for _ in range(3):  # compiles
            works[name]()
    wall, cpu = paired(works, steps)
    print()
    print("| network | batch | ms a step | s an epoch of 50,000 | CPU s of it |")
    print("|" + "---|" * 5)
    for name in names:
        n = EPOCH / batches[name]
        print(f"| {name} | {batches[name]} | {1e3 * wall[name]:.1f} | {n * wall[name]:.0f} | {n * cpu[name]:.0f} |")


def compare_options(names, inputs, rounds):
    """ONNX Runtime's options, each beside what `sersicnet.weights` takes."""
    levels = onnxruntime.GraphOptimizationLevel
    ways = {
        "as it is": {},
        "one thread": {"intra_op_num_threads": 1},
        "all cores, by number": {"intra_op_num_threads": os.cpu_count() or 1},
        "extended optimisation": {"graph_optimization_level": levels.ORT_ENABLE_EXTENDED},
        "basic optimisation": {"graph_optimization_level": levels.ORT_ENABLE_BASIC},
        "no arena": {"enable_cpu_mem_arena": False},
        "no memory pattern": {"enable_mem_pattern": False},
        **{f"batch {batch}": {"batch": batch} for batch in (8, 16, 32, 128)},
    }
    print()
    print("time over that of the options in use: wall (CPU)")
    print("| option | " + " | ".join(names) + " |")
    print("|" + "---|" * (1 + len(names)))
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name in names:
            _, path, _ = built(name, folder)
            found[name] = paired({way: runner(path, inputs, **options) for way, options in ways.items()}, rounds)
    for way in ways:
        cells = [f"{w[way] / w['as it is']:.2f} ({c[way] / c['as it is']:.2f})" for w, c in found.values()]
        print(f"| {way} | " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="seconds an epoch")
    parser.add_argument("--options", action="store_true", help="compare options of ONNX Runtime")
    parser.add_argument("--networks", nargs="+", choices=networks.ARCHITECTURES, help="all by default")
    parser.add_argument("--stamps", type=int, default=2 * weights.BATCH)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=24, help="of --train")
    options = parser.parse_args()
    names = options.networks or list(networks.ARCHITECTURES)
    inputs = shown_inputs(options.stamps)
    print(f"{device()}; ONNX Runtime {onnxruntime.__version__} with {', '.join(sessions.providers())}; ", end="")
    print(f"keras {keras.__version__} on {keras.backend.backend()}; load {os.getloadavg()[0]:.1f} at the start")
    inference(names, inputs, options.rounds)
    if options.options:
        compare_options(names, inputs, options.rounds)
    if options.train:
        training(names, options.steps)
    print(f"load {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
