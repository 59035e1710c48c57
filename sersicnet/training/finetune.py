"""Fine-tuning: weights are trained further on the labels of real galaxies."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from sersicnet import calibration, networks, weights
from sersicnet.catalogue.scores import scores
from sersicnet.dataset import Arrays, Dataset, check_shown
from sersicnet.errors import DatasetError, InputError, warn
from sersicnet.networks import freeze, keras, seed_keras
from sersicnet.output import Run, check_directory
from sersicnet.schema import N_TARGETS, TARGET_NAMES, relative_magnitude
from sersicnet.training.card import INVENTED, base_card, base_record, chosen_by, finished, kind_of, real_record, saved
from sersicnet.training.loop import Report, Scaling, Task, fit, predict, silent
from sersicnet.training.losses import Arguments, regression
from sersicnet.training.recipe import FINETUNE, SCHEDULE, Recipe

LAYERS = ("auto", "all", "head-first")

LEAST_GALAXIES = 10
"""Labelled galaxies that fine-tuning needs."""


def finetune(
    real: Arrays,
    output: str | Path,
    *,
    base: str | Path = weights.BASE,
    layers: str = SCHEDULE,
    recipe: Recipe | None = None,
    seed: int = 0,
    test: str | Path | None = None,
    overwrite: bool = False,
    command: str = "",
    report: Report = silent,
) -> weights.Weights:
    """Fine-tune weights on the labels of real galaxies.

    Two schedules are tried, and the weights with the best validation error are kept:
    ``all`` frees every layer at once; ``head-first`` trains what follows the
    features for a third of the epochs, and then frees every layer at a third of
    the learning rate. The weights of the first part are kept if the second part does
    not improve them.

    Batch normalisations keep their moments and factors: a batch of 8 galaxies
    measures moments too poorly.

    Parameters
    ----------
    real : Arrays
        Stamps and labels; a fifth of them, at random, validates. Galaxies
        without labels (targets that are not finite) are left out, and so are, with a
        warning, galaxies outside the ranges of `base`.
    output : str or Path
        Weights directory.
    base : str or Path
        Weights to start from.
    layers : {"auto", "all", "head-first"}
        A schedule, or ``auto`` for both.
    recipe : Recipe, optional
        The network's own in `FINETUNE` by default.
    seed, test, overwrite, command, report
        As for `train`.

    Returns
    -------
    Weights

    Raises
    ------
    InputError, DatasetError, WeightsError
        If an argument or the data cannot be used; nothing is written then.
    """
    output = Path(output)
    check_directory(output, weights.SUMS, overwrite)
    start, recipe = _checked(real, base, layers, recipe, test)
    network = start.card["network"]
    architecture = networks.ARCHITECTURES[network]
    galaxies = _usable(real, start, recipe)
    n = len(galaxies)
    galaxies = galaxies.taken(np.random.default_rng(seed).permutation(n))
    scaling = Scaling(architecture.log, np.array(start.card["label_mean"]), np.array(start.card["label_std"]))
    rows = (0, n - n // 5), (n - n // 5, n)

    def task(core: keras.Model, model: keras.Model, arguments: Arguments) -> Task:
        known = galaxies.orientation if architecture.oriented else None
        labels = scaling(galaxies.targets)
        return Task(galaxies, *rows, model, core, arguments, labels, np.ones(n, bool), scaling, None, known)

    found: dict[str, tuple[dict[str, Any], list[np.ndarray]]] = {}

    def follow(run: Run, schedule: str, origin: list[np.ndarray], recipe: Recipe, *, body: bool) -> None:
        seed_keras(seed)
        core, steps = architecture.build(), recipe.epochs * math.ceil(rows[0][1] / recipe.batch)
        core.set_weights(origin)
        freeze(core, body=not body)
        state = fit(task(core, *regression(core, recipe, steps)), recipe, seed, run, report, schedule)
        found[schedule] = state, core.get_weights()

    config = {"base": start.sha256, "recipe": asdict(recipe), "seed": seed, "data": real.sha256()}
    config["backend"] = keras.backend.backend()
    with Run(output.with_name(output.name + ".run"), config, overwrite) as run:
        given = start.core().get_weights()
        if layers in ("auto", "all"):
            follow(run, "all", given, recipe, body=True)
        if layers in ("auto", "head-first"):
            follow(run, "head", given, replace(recipe, epochs=math.ceil(recipe.epochs / 3)), body=False)
            slower = replace(recipe, learning_rate=recipe.learning_rate / 3)
            follow(run, "head-first", found["head"][1], slower, body=True)
        best = min(found, key=lambda name: found[name][0]["best"])
        core = architecture.build()
        core.set_weights(found[best][1])
        model, fields = finished(network, task(core, core, lambda *_: (None, None, None)), start)
        out, judges, _ = predict(model, galaxies, *rows[1], fields.get("quarter_turns", 0.0))
        seconds = sum(state["seconds"] for state, _ in found.values())
        kept = start.name if n // 5 < calibration.LEAST else ""
        card = {
            **{key: value for key, value in start.card.items() if key != "calibrated"},
            **base_card(output.name, network, core, {**found[best][0], "seconds": seconds}, seed, command),
            "summary": f"`{start.name}` fine-tuned on {n:,} labelled {kind_of(real)} galaxies ({SCHEDULES[best]}).",
            **fields,
            "recipe": asdict(recipe),
            "base": base_record(start),
            "fine_tuning": {"layers": best, "valid_mae": {name: state["best"] for name, (state, _) in found.items()}},
            "data": real_record(real, n, command),
            "limits": [
                *([INVENTED] if real.recipe else []),
                chosen_by(f"the {n // 5} galaxies", "the epoch and the layers", errors=architecture.spreads, base=kept),
            ],
            "scores": {
                "test_set": f"its {n // 5} validation galaxies, which chose the epoch",
                "samples": scores(galaxies.targets[judges], out[:, :N_TARGETS], mag=galaxies.mag[judges]),
            },
        }
        done = saved(output, model, card, test)
        run.remove()
    return done


def _checked(
    real: Arrays, base: str | Path, layers: str, recipe: Recipe | None, test: str | Path | None
) -> tuple[weights.Weights, Recipe]:
    """The weights to start from, and the recipe; refuses options that do not go together."""
    if layers not in LAYERS:
        raise InputError(f"Layers to train are one of {', '.join(LAYERS)}; received {layers}.")
    start = weights.load(base, to_train=True)
    network = start.card["network"]
    if test is not None:
        with Dataset(test) as other:
            check_shown(other, start.inputs, network)
    check_shown(real, start.inputs, network)
    recipe = recipe or FINETUNE[network]
    recipe.check()
    return start, recipe


def _usable(real: Arrays, start: weights.Weights, recipe: Recipe) -> Arrays:
    """The galaxies with labels, brighter than the recipe's limit, within the ranges of the weights."""
    labelled = np.isfinite(real.targets).all(axis=1)
    if not labelled.any():
        raise DatasetError(
            f"Fine-tuning learns from labels; received {len(real)} galaxies without. `sersicnet adapt` takes an image "
            "without labels."
        )
    usable = labelled & ~(real.mag > recipe.faint_limit)
    usable[usable] = _within(start, real.targets[usable], real.mag[usable])
    if usable.sum() < LEAST_GALAXIES:
        raise DatasetError(f"Fine-tuning needs at least {LEAST_GALAXIES} labelled galaxies; received {usable.sum()}.")
    return real.taken(np.flatnonzero(usable))


def _within(base: weights.Weights, targets: np.ndarray, mag: np.ndarray) -> np.ndarray:
    """Whether targets lie within the ranges of the weights, bool, (N,); warns of others."""
    domain = base.card["domain"]
    ranges = np.array([domain["ranges"][name] for name in TARGET_NAMES], float)
    if "rms" in domain:  # of one telescope, whose magnitudes are AB
        ranges[0] = relative_magnitude(ranges[0], domain["zero_point"], domain["rms"])
    good = (targets >= ranges[:, 0]) & (targets <= ranges[:, 1])
    inside = np.asarray(good.all(axis=1))
    if not inside.all():
        row = int(np.flatnonzero(~inside)[0])
        which = int(np.flatnonzero(~good[row])[0])
        # A magnitude as it is listed: networks are shown one that is relative to the noise.
        off = mag[row] - targets[row, 0] if which == 0 else 0.0
        value, low, high = off + np.array([targets[row, which], *ranges[which]])
        warn(
            f"{(~inside).sum()} of {len(targets)} labelled galaxies are left out, since {base.name} was not trained on "
            f"such galaxies: the first has {TARGET_NAMES[which]} = {value:.4g}, beyond {low:.4g} to {high:.4g}"
            f"{' for its noise' * (which == 0)}."
        )
    return inside


SCHEDULES = {
    "all": "every layer from the start",
    "head": "the layers behind the features alone",
    "head-first": "the layers behind the features first, then every layer",
}
