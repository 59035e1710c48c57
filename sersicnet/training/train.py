"""Training: a network learns from simulated galaxies, and from real ones if asked.

A run keeps its state in a directory beside its output. The same command continues it; the
finished weights directory appears whole or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sersicnet import calibration, networks, weights
from sersicnet.dataset import Arrays, Dataset, check_shown
from sersicnet.errors import InputError
from sersicnet.networks import freeze, keras, seed_keras
from sersicnet.output import Run, check_directory
from sersicnet.schema import encode
from sersicnet.training.card import (
    base_card,
    base_record,
    calibrated_domain,
    data_record,
    domain_of,
    finished,
    limits,
    real_record,
    saved,
    scores_on,
    summary,
)
from sersicnet.training.device import check_bfloat16, on_accelerator
from sersicnet.training.joined import Examples, Joined, bright, judging_rows
from sersicnet.training.loop import Progress, Report, Scaling, Task, finite, fit, silent
from sersicnet.training.losses import ALIGNMENTS, aligned, regression
from sersicnet.training.on_the_fly import OnTheFly
from sersicnet.training.recipe import ADAPT, RECIPES, Recipe
from sersicnet.training.sets import Sets, border


def train(
    data: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    network: str | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    limit: int | None = None,
    start: str | Path | None = None,
    test: str | Path | None = None,
    adapt: str | None = None,
    real: Dataset | Arrays | None = None,
    real_labels: bool = True,
    on_the_fly: bool = False,
    overwrite: bool = False,
    command: str = "",
    report: Report = silent,
) -> weights.Weights:
    """Train a network on simulated stamps, and on real ones if asked, and write a weights directory.

    Parameters
    ----------
    data : str, Path or sequence of them
        Training set from `sersicnet.simulating.simulate`, or several of one kind that are used together; the last
        tenth of each validates.
    output : str or Path
        Weights directory. The run is kept in ``<output>.run`` until it is done,
        and is continued from there.
    network : {"fovea", "fovea-fixed", "tl", "dann"}, optional
        That of `start` by default, or else ``fovea``.
    recipe : Recipe, optional
        By default that of the network in `RECIPES`, or in `ADAPT` with `adapt`. With 0 epochs the network of `start`
        is not trained, but calibrated again on all galaxies of `data`, see `sersicnet.calibration.fitted`.
    seed : int
    limit : int, optional
        Use only this many stamps of `data`.
    start : str or Path, optional
        Weights of the same network to start from, instead of random ones. Targets are
        standardised with the mean and standard deviation on the card of these weights.
    test : str or Path, optional
        Another dataset, whose scores go on the card.
    adapt : {"dann", "daregram"}, optional
        Make the features of real and simulated galaxies alike: by an adversary
        that tells the domains apart (Ganin & Lempitsky 2015), or by aligning
        inverse Gram matrices (see `gram_distance`).
    real : Dataset or Arrays, optional
        The real galaxies for `adapt`; a fifth of them validates if any has a
        label. Those whose targets are not all finite are unlabelled: they count
        for the alignment, and not for the regression.
    real_labels : bool
        Whether the labels of `real` train the regression. If not, nothing depends on
        them.
    on_the_fly : bool
        Simulate the galaxies that train while the network trains, new ones in every epoch, by
        the recipe of `data`, whose own stamps only validate then; see
        `sersicnet.training.on_the_fly`.
    overwrite : bool
        Replace `output`, and drop an unfinished run with other options. One with
        the same options is continued in any case.
    command : str
        The command line, for the card.
    report : callable
        Receives a `Progress` after each step and each epoch.

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
    network, recipe, base = _checked(network, recipe, adapt, real, start)
    if test is not None:
        with Dataset(test) as other:
            check_shown(other, inputs_of(network), network)
    paths = [data] if isinstance(data, str | Path) else list(data)
    _check_on_the_fly(on_the_fly, len(paths), recipe, real)
    if real is not None:
        check_shown(real, inputs_of(network), network)
    with Dataset(paths[0]) if len(paths) == 1 else Sets(paths) as simulated:
        check_shown(simulated, inputs_of(network), network)
        if recipe.epochs == 0:
            return _recalibrated(base, simulated, limit, output, test, command, report)
        examples = _examples(simulated, recipe, limit, real, real_labels, seed)
        seed_keras(seed)
        task = _task(network, recipe, base, adapt, examples)
        galaxies = None
        if on_the_fly and isinstance(simulated, Dataset):
            galaxies = OnTheFly(simulated, seed, faint_limit=recipe.faint_limit, asarray=on_accelerator())
            task = task._replace(galaxies=galaxies)
        config = {
            "network": network,
            "recipe": asdict(recipe),
            "seed": seed,
            "data": simulated.sha256(),
            "n": len(examples.source),
            "start": None if base is None else base.sha256,
            "adapt": adapt,
            "real": None if real is None else real.sha256(),
            "real_labels": real_labels,
            "on_the_fly": on_the_fly,
            "backend": keras.backend.backend(),
        }
        with galaxies or nullcontext(), Run(output.with_name(output.name + ".run"), config, overwrite) as run:
            state = fit(task, recipe, seed, run, report)
            model, fields = finished(network, task)
            card = {
                **base_card(output.name, network, task.predictor, state, seed, command),
                **_origin(simulated, examples, real, adapt, base, command),
                "summary": summary(network, examples, real, adapt, base, on_the_fly),
                "errors": networks.ARCHITECTURES[network].spreads,
                **({"orientation": True} if networks.ARCHITECTURES[network].oriented else {}),
                "inputs": sorted(networks.ARCHITECTURES[network].inputs),
                **fields,
                "recipe": asdict(recipe),
                "label_mean": task.scaling.mean.tolist(),
                "label_std": task.scaling.std.tolist(),
                "domain": domain_of(simulated, recipe),
                "limits": limits(task, simulated, real, errors=networks.ARCHITECTURES[network].spreads),
            }
            done = saved(output, model, card, test)
            run.remove()
    return done


def _check_on_the_fly(on_the_fly: bool, sets: int, recipe: Recipe, real: Dataset | Arrays | None) -> None:
    """Refuse what does not go together with galaxies that are drawn while the network trains, or with no epochs."""
    if on_the_fly and sets > 1:
        raise InputError(f"`on_the_fly` draws galaxies like those of one training set; received {sets}.")
    if on_the_fly and recipe.noise and real is None:
        raise InputError(
            f"`on_the_fly` draws galaxies with their noise, and adds none to it; received a recipe with `noise` "
            f"{recipe.noise:g}. Set it to 0, or train without `on_the_fly`."
        )
    if recipe.epochs == 0 and (real is not None or on_the_fly):
        raise InputError(
            "With 0 epochs, `start` is only calibrated: give none of `adapt`, `real` and `on_the_fly`, "
            "or at least 1 epoch."
        )


def _recalibrated(
    base: weights.Weights | None,
    simulated: Dataset | Sets,
    limit: int | None,
    output: Path,
    test: str | Path | None,
    command: str,
    report: Report,
) -> weights.Weights:
    """The same network with a calibration by all galaxies of a set."""
    if base is None or not base.card["errors"]:
        raise InputError("With 0 epochs, weights are only calibrated: give `start`, weights that predict errors.")
    n = len(simulated) if limit is None else min(limit, len(simulated))
    if n < calibration.LEAST:
        raise InputError(f"A calibration needs at least {calibration.LEAST} galaxies; received {n}. Simulate more.")
    domain = calibrated_domain(base, simulated, n)
    out, rows, seen = _answered(base, simulated, n, report)
    orientation = simulated.orientation[rows] if base.card.get("orientation") else None
    table = calibration.fitted(out, simulated.targets[rows], orientation, seen)
    # The scores are those of the calibration before.
    card = {key: value for key, value in base.card.items() if key != "scores"}
    card |= {"name": output.name, "calibration": table, "domain": domain}
    card["calibrated"] = {"command": command, "data": data_record(simulated, n), "base": base.sha256}
    if test is not None:
        with Dataset(test) as other:
            card["scores"] = scores_on(other, card, *_answered(base, other, len(other), silent))
    return weights.with_card(base, output, card)


def _answered(
    base: weights.Weights, source: Dataset | Sets, n: int, report: Report
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Answers for the first `n` galaxies of a set, their rows, and what the network saw of their images.

    See `sersicnet.weights.Weights.answers` and `sersicnet.calibration.conditions`.
    """
    parts = []
    for inputs, rows in source.batches(weights.BATCH, 0, n):
        answers = base.answers(finite(source, inputs, rows))
        parts.append((answers, rows, calibration.conditions(inputs, base.inputs)))
        report(Progress(0, 0, len(parts), math.ceil(n / weights.BATCH), math.nan, None))
    out, rows, seen = (np.concatenate(part) for part in zip(*parts, strict=True))
    return out, rows, seen


def _origin(
    simulated: Dataset | Sets,
    examples: Examples,
    real: Dataset | Arrays | None,
    adapt: str | None,
    base: weights.Weights | None,
    command: str,
) -> dict[str, Any]:
    """What the card states of the galaxies, and of the weights that training started from."""
    out: dict[str, Any] = {"data": data_record(simulated, len(examples.source))}
    if base is not None:
        out["base"] = base_record(base)
    if real is not None:
        labelled = examples.labelled[examples.source.is_real]
        known = {"method": adapt, "labelled": int(labelled.sum())}
        out["adaptation"] = {**known, "data": real_record(real, len(labelled), command)}
    return out


def network_of(start: str | Path | weights.Weights | None) -> str:
    """The network of the weights that training starts from; ``fovea`` without any."""
    if start is None:
        return "fovea"
    base = start if isinstance(start, weights.Weights) else weights.load(start, to_train=True)
    return str(base.card["network"])


def inputs_of(network: str) -> frozenset[str]:
    """Which of `sersicnet.schema.Inputs` a network is shown; the stamps, if there is no such network."""
    known = networks.ARCHITECTURES.get(network)
    return frozenset({"stamps"}) if known is None else known.inputs


def _checked(
    network: str | None,
    recipe: Recipe | None,
    adapt: str | None,
    real: Dataset | Arrays | None,
    start: str | Path | None,
) -> tuple[str, Recipe, weights.Weights | None]:
    """The network, its recipe, and the weights to begin from; refuses options that do not go together."""
    base = None if start is None else weights.load(start, to_train=True)
    network = network or network_of(base)
    if network not in networks.ARCHITECTURES:
        raise InputError(f"A network is one of {', '.join(networks.ARCHITECTURES)}; received {network}.")
    if adapt is not None and adapt not in ALIGNMENTS:
        raise InputError(f"Adaptation is one of {', '.join(ALIGNMENTS)}; received {adapt}.")
    if (adapt is None) != (real is None):
        raise InputError(
            "Adaptation needs real galaxies, and real galaxies serve adaptation only: give both `adapt` and `real`, "
            "or neither."
        )
    recipe = recipe or (RECIPES if adapt is None else ADAPT)[network]
    recipe.check()
    if recipe.bfloat16:
        check_bfloat16()
    if base is not None and base.card["network"] != network:
        raise InputError(f"{start} is a network {base.card['network']}: give `network` {base.card['network']}.")
    return network, recipe, base


def _examples(
    simulated: Dataset | Sets,
    recipe: Recipe,
    limit: int | None,
    real: Dataset | Arrays | None,
    real_labels: bool,
    seed: int,
) -> Examples:
    """Simulated galaxies as bright as the recipe takes, joined by real ones if there are any."""
    chosen: Dataset | Sets | Arrays = simulated
    if limit is not None or recipe.faint_limit < simulated.mag.max():
        chosen = simulated.selected(recipe.faint_limit, limit)
    middle = chosen.border if isinstance(chosen, Sets) else border(len(chosen))
    train_rows, valid_rows = (0, middle), (middle, len(chosen))
    if real is None:
        return Examples(chosen, train_rows, valid_rows, np.ones(len(chosen), bool))
    joined = Joined(chosen, bright(real, recipe.faint_limit), train_rows[1], real_labels, seed)
    return Examples(joined, joined.train_rows, joined.valid_rows, joined.labelled)


def _task(network: str, recipe: Recipe, base: weights.Weights | None, adapt: str | None, examples: Examples) -> Task:
    """The network, compiled, with the standardised targets of each galaxy."""
    architecture = networks.ARCHITECTURES[network]
    source, train_rows, valid_rows, labelled = examples
    # Unlabelled galaxies weigh nothing, but a NaN would still be one.
    targets = np.where(labelled[:, None], source.targets, 1.0)
    if base is None:
        learned = (encode(targets) if architecture.log else targets)[slice(*train_rows)][labelled[slice(*train_rows)]]
        scaling = Scaling(architecture.log, learned.mean(axis=0), learned.std(axis=0))
    else:
        scaling = Scaling(architecture.log, np.array(base.card["label_mean"]), np.array(base.card["label_std"]))
    core = base.core() if base is not None else architecture.build()
    if recipe.bfloat16:
        core = networks.in_bfloat16(core)
    if base is not None and recipe.keep_norms:
        freeze(core, body=False)
    steps = recipe.epochs * math.ceil((train_rows[1] - train_rows[0]) / recipe.batch)
    if adapt is not None:
        model, arguments = aligned(core, adapt, source.is_real, labelled, recipe, steps)
    else:
        model, arguments = regression(core, recipe, steps)
    standardised = np.where(labelled[:, None], scaling(targets), 0)
    judges = judging_rows(labelled, source.is_real, valid_rows)
    components = source.orientation if architecture.oriented else None
    return Task(
        source, train_rows, valid_rows, model, core, arguments, standardised, judges, scaling, components=components
    )
