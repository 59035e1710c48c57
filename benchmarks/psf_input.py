"""What each way of showing a network the PSF is worth: networks trained alike on one training set.

``python benchmarks/psf_input.py TRAIN.h5 TEST.h5 --work FOLDER [--limit 40000] [--epochs 3] [--ways none numbers ...]``

The ways are ``none``; ``numbers``: fluxes and moments of the PSF, for the head alone; ``image``: the views of the PSF
as well, for the first convolution and the head; ``fovea``: these, and scales and shifts of the residual blocks; and
``wiener``: `fovea` with the stamp's finest view deconvolved as one more channel. All are shown the noise. Printed are,
for galaxies of S/N above 50, R^2 and the median error and 68 % scatter of magnitude, ln R_e, ln n and ellipticity, the
fraction within 1 sigma, and the loss. A run that was interrupted continues.
"""

import argparse
from pathlib import Path

import numpy as np

from sersicnet import networks
from sersicnet.dataset import Dataset
from sersicnet.networks import keras, layers, ops
from sersicnet.output import Run
from sersicnet.schema import N_TARGETS
from sersicnet.training import train
from sersicnet.training.loop import fit, silent
from sersicnet.training.losses import REGRESSION
from sersicnet.training.recipe import RECIPES, Recipe

WAYS = ("none", "numbers", "image", "fovea", "wiener")
FLOOR = 0.02
"""Power of the PSF's transform below which Wiener's filter suppresses frequencies."""


def network(way: str) -> keras.Model:
    """The network `fovea`, shown the PSF in another way."""
    given = networks.inputs()
    views = networks._views(given.stamps)
    stamp_sums = networks._stamp_sums(views)
    psf, first, psf_sums = networks._seen_psf(given.psf)
    code = layers.Dense(128)(given.noise)
    if way != "none":
        code = code + layers.Dense(128)(psf_sums if way == "numbers" else layers.Concatenate()([psf, psf_sums]))
    code = layers.Dense(128, activation="relu", name="code")(ops.maximum(code, 0.0))
    shown = networks._shown_together(views)
    if way == "wiener":
        shown = layers.Concatenate()([shown, networks._asinh(deconvolved(views[1], given.psf[:, 1]))])
    x = layers.Conv2D(32, 3, padding="same", use_bias=False, kernel_initializer="he_normal")(shown)
    x = layers.BatchNormalization()(x)
    x = layers.ReLU()(x if way in ("none", "numbers") else x + first)
    scaling = code if way in ("fovea", "wiener") else None
    x = networks._convolved(x, 64, strides=2)
    x = networks._residual(x, 64, scaling)
    x = networks._residual(x, 64, scaling)
    x = networks._convolved(x, 128, strides=2)
    x = networks._residual(x, 128, scaling)
    x = layers.Conv2D(48, 1, activation="relu")(x)
    x = layers.Concatenate()([layers.Flatten()(x), stamp_sums])
    x = ops.maximum(layers.Dense(256)(x) + layers.Dense(256, use_bias=False)(code), 0.0)
    x = layers.Dense(128, activation="relu", name="features")(x)
    means = layers.Dense(N_TARGETS, name="means")(layers.Concatenate()([x, stamp_sums]))
    factors = ops.clip(layers.Dense(networks.N_FACTORS, name="factors")(x), *networks.FACTOR_LIMITS)
    components = layers.Dense(networks.N_ORIENTATION, name="components")(layers.Concatenate()([x, stamp_sums]))
    spread = ops.clip(layers.Dense(1, name="log_spread")(x), *networks.SPREAD_LIMITS)
    outputs = layers.Concatenate()([means, factors, components, spread])
    return keras.Model({port.name: port for port in given}, outputs, name="fovea")


def deconvolved(view: keras.KerasTensor, psf: keras.KerasTensor) -> keras.KerasTensor:
    """The finest view of a stamp, (N, 32, 32, 1), deconvolved by Wiener's filter with the PSF, (N, 32, 32)."""
    image = ops.fft2((view[:, :, :, 0], ops.zeros_like(view[:, :, :, 0])))
    seen = ops.fft2((psf, ops.zeros_like(psf)))
    power = ops.square(seen[0]) + ops.square(seen[1]) + FLOOR
    real = (image[0] * seen[0] + image[1] * seen[1]) / power
    imaginary = (image[1] * seen[0] - image[0] * seen[1]) / power
    return ops.expand_dims(ops.roll(ops.ifft2((real, imaginary))[0], (16, 16), axis=(1, 2)), -1)


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps unfinished runs")
    parser.add_argument("--limit", type=int, default=40_000, help="stamps of the training set")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ways", nargs="*", default=WAYS, choices=WAYS)
    options = parser.parse_args()
    options.work.mkdir(exist_ok=True)
    recipe = Recipe(**{**vars(RECIPES["fovea"]), "epochs": options.epochs})
    known = networks.ARCHITECTURES["fovea"]
    print("| shown the PSF as | weights | mag | ln R_e | ln n | e | loss |\n|---|---|---|---|---|---|---|")
    for way in options.ways:
        networks.ARCHITECTURES["fovea"] = known._replace(build=lambda way=way: network(way))
        keras.utils.set_random_seed(options.seed)
        with Dataset(options.data) as data:
            examples = train._examples(data, recipe, options.limit, None, True, options.seed)
            task = train._task("fovea", recipe, None, None, examples)
            config = {"way": way, "limit": options.limit, "epochs": options.epochs, "data": data.sha256()}
            with Run(options.work / f"{way}.run", config, False) as run:
                fit(task, recipe, options.seed, run, silent)
        print(scores(way, task, known, options.test), flush=True)


def scores(way: str, task: train.Task, architecture: networks.Architecture, path: Path) -> str:
    """A row of the table."""
    with Dataset(path) as test:
        inputs, truth = test.inputs(0, len(test)), test.targets
        learned = np.concatenate([task.scaling(truth), test.orientation], axis=1)
        fwhm, correlation = test.truth["fwhm"], test.truth["correlation"]
    out = task.predictor.predict(networks.shown(task.predictor, inputs), batch_size=256, verbose=0)
    loss = float(np.mean(REGRESSION["fovea"](learned.astype(np.float32), out)))
    predicted = task.scaling.back(out[:, :N_TARGETS])
    pulls = (out[:, :N_TARGETS] - learned[:, :N_TARGETS]) / networks.spreads(architecture, out)
    area = 4 * np.pi * ((fwhm / 2.355) ** 2 + 0.5 * (1 - truth[:, 3]) * truth[:, 1] ** 2)
    bright = 10 ** (-0.4 * truth[:, 0]) / (correlation * np.sqrt(area)) > 50
    cells = []
    for i, logarithm in enumerate((False, True, True, False)):
        a, b = ((np.log(v[bright, i]) if logarithm else v[bright, i]) for v in (predicted, truth))
        low, middle, high = np.quantile(a - b, [0.1587, 0.5, 0.8413])
        r2 = 1 - np.sum((a - b) ** 2) / np.sum((b - b.mean()) ** 2)
        inside = np.mean(np.abs(pulls[bright, i]) < 1)
        cells.append(f"{r2:.4f}; {middle:+.3f} ± {(high - low) / 2:.3f}; {inside:.0%}")
    return f"| {way} | {task.predictor.count_params():,} | {' | '.join(cells)} | {loss:.3f} |"


if __name__ == "__main__":
    main()
