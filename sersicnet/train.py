"""Training: base networks, fine-tuning on real galaxies, the adversary.

A run keeps everything in a directory beside its output: its configuration, one
JSON line an epoch, the best weights and the last state, at most five minutes old. The same command
continues it; the finished weights directory appears whole or not at all.
"""

from __future__ import annotations

import json
import math
import os
import platform
import queue
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import sersicnet
from sersicnet import networks, weights
from sersicnet.dataset import BLOCK, Arrays, Dataset
from sersicnet.errors import DatasetError, InputError
from sersicnet.evaluate import scores
from sersicnet.networks import keras, ops
from sersicnet.schema import N_TARGETS, TARGET_NAMES, encode

Source = Dataset | Arrays

KEEP_SECONDS = 300.0
"""How often the state of a run is written, besides after each epoch."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes
    ----------
    epochs : int
        At most this many.
    batch : int
    learning_rate : float
        At the start, or at its peak when annealed.
    anneal : bool
        Warm up over 3 % of the steps, then follow a cosine to zero.
    patience : int
        Epochs without improvement of the validation error before it stops.
    symmetries : bool
        Show each stamp in a random one of its eight orientations.
    faint_limit : float
        Galaxies fainter than this AB magnitude are left out.
    alpha : float
        Weight of the regression against the domain classifier (adversary only).
    """

    epochs: int
    batch: int
    learning_rate: float
    anneal: bool
    patience: int
    symmetries: bool
    faint_limit: float = 99.0
    alpha: float = 0.9


RECIPES = {
    "fovea": Recipe(epochs=7, batch=64, learning_rate=1.5e-3, anneal=True, patience=7, symmetries=True),
    "tl": Recipe(
        epochs=100, batch=16, learning_rate=1e-4, anneal=False, patience=10, symmetries=False, faint_limit=23.0
    ),
    "dann": Recipe(epochs=300, batch=16, learning_rate=1e-4, anneal=False, patience=20, symmetries=False),
}
FINETUNE = Recipe(epochs=15, batch=8, learning_rate=1e-4, anneal=False, patience=15, symmetries=False)
"""The study's transfer learning: every layer trainable, best validation error kept."""


class Progress(NamedTuple):
    """Where a run stands; `record` is set at the end of an epoch."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    record: dict[str, float] | None


Report = Callable[[Progress], None]


def _silent(progress: Progress) -> None:
    pass


# --- losses ---------------------------------------------------------------------------------


def _spread_loss(true: Any, out: Any) -> Any:
    """Gaussian likelihood, weighted by the predicted deviation.

    The weight keeps galaxies with large errors from being given up on
    (beta-NLL, beta = 0.5; Seitzer et al. 2022, arXiv:2203.09168).
    """
    mean, log_spread = out[:, :N_TARGETS], out[:, N_TARGETS:]
    squared = ops.square((true - mean) * ops.exp(-log_spread))
    return ops.mean(ops.stop_gradient(ops.exp(log_spread)) * (0.5 * squared + log_spread), axis=-1)


# --- the loop -------------------------------------------------------------------------------


class _Task(NamedTuple):
    """What a run trains on, and how a batch becomes arguments of `train_on_batch`."""

    source: Source
    train_rows: tuple[int, int]
    valid_rows: tuple[int, int]
    model: keras.Model
    predictor: keras.Model
    arguments: Callable[[np.ndarray, np.ndarray, float], tuple[Any, Any, Any]]
    standardised: np.ndarray
    labelled: np.ndarray


def _prefetched(items: Iterator[Any], depth: int = 4) -> Iterator[Any]:
    """Read ahead in a thread, so that decompression and training overlap."""
    channel: queue.Queue[Any] = queue.Queue(depth)
    stop = threading.Event()
    end = object()

    def put(item: Any) -> None:
        while not stop.is_set():
            try:
                channel.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def fill() -> None:
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
            put(end)
        except BaseException as error:  # handed to the consumer, which raises it
            put(error)

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    try:
        while (item := channel.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()


def _oriented(stamps: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Stamps in the orientations numbered 0 to 7."""
    out = np.empty_like(stamps)
    for turn in range(8):
        chosen = which == turn
        view = np.rot90(stamps[chosen], turn % 4, axes=(1, 2))
        out[chosen] = view if turn < 4 else view[:, :, ::-1]
    return out


def _fit(
    task: _Task, recipe: Recipe, seed: int, run: Path, config: dict[str, Any], overwrite: bool, report: Report
) -> dict[str, Any]:
    """Train until the recipe is done; return the record of the run.

    The best weights stand in `run` / best.weights.h5 afterwards, and are loaded.
    """
    state_file, last, best = run / "state.json", run / "last.weights.h5", run / "best.weights.h5"
    config_file = run / "config.json"
    if config_file.exists() and json.loads(config_file.read_text()) != json.loads(json.dumps(config)):
        if not overwrite:
            raise InputError(
                f"{run} holds an unfinished run with other options. "
                "Repeat its command, or give --overwrite to start anew."
            )
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    config_file.write_text(json.dumps(config, indent=1))
    state: dict[str, Any] = {"epoch": 0, "best": math.inf, "best_epoch": 0, "seconds": 0.0}
    state |= {"step": 0, "loss": 0.0, "spent": 0.0}  # of the epoch under way
    model = task.model
    model.optimizer.build(model.trainable_variables)
    if state_file.exists():
        state |= json.loads(state_file.read_text())
        model.load_weights(run / state["last"])

    def keep() -> None:
        # The state names its weights file, so that a kill between the two writes is harmless.
        old = state.get("last")
        state["last"] = f"{state['epoch']}-{state['step']}-{last.name}"
        model.save_weights(run / state["last"])
        _write_whole(state_file, json.dumps(state))
        if old not in (None, state["last"]):
            (run / old).unlink(missing_ok=True)

    low, high = task.train_rows
    steps = math.ceil((high - low) / recipe.batch)
    while state["epoch"] < recipe.epochs and state["epoch"] - state["best_epoch"] < recipe.patience:
        epoch = state["epoch"]
        # Two generators, for the stamps are read ahead in a thread of their own.
        order, turns = (np.random.default_rng([seed, epoch, use]) for use in (0, 1))
        kept, recent = time.monotonic(), deque[float](maxlen=50)
        first = state["step"]
        batches = task.source.batches(recipe.batch, low, high, order)
        for step, (stamps, indices) in enumerate(_prefetched(batches)):
            orientations = turns.integers(8, size=len(stamps))
            if step < first:  # done before the interruption
                continue
            done = (epoch + step / steps) / recipe.epochs
            if recipe.anneal:
                warm = min(1.0, done / 0.03 + 1e-3)
                model.optimizer.learning_rate = recipe.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * done))
            if recipe.symmetries:
                stamps = _oriented(stamps, orientations)
            x, y, sample_weight = task.arguments(stamps, indices, done)
            model.reset_metrics()
            logs = model.train_on_batch(x, y, sample_weight=sample_weight, return_dict=True)
            loss = float(logs["loss"])
            if not math.isfinite(loss):
                raise DatasetError(
                    f"The loss became {loss} at epoch {epoch + 1}, step {step + 1}. Check the dataset for NaN stamps."
                )
            recent.append(loss)
            state["step"], state["loss"] = step + 1, state["loss"] + loss
            report(Progress(epoch + 1, recipe.epochs, step + 1, steps, float(np.mean(recent)), None))
            if time.monotonic() - kept > KEEP_SECONDS:
                state["spent"] += time.monotonic() - kept
                keep()
                kept = time.monotonic()
        out, rows = _predict(task.predictor, task.source, *task.valid_rows)
        out, rows = out[task.labelled[rows]], rows[task.labelled[rows]]
        errors = np.abs(out[:, :N_TARGETS] - task.standardised[rows])
        record = {
            "epoch": epoch + 1,
            "loss": state["loss"] / steps,
            "valid_mae": float(errors.mean()),
            **{f"valid_mae_{n}": float(e) for n, e in zip(TARGET_NAMES, errors.mean(axis=0), strict=True)},
            "seconds": round(state["spent"] + time.monotonic() - kept, 1),
        }
        state |= {"epoch": epoch + 1, "step": 0, "loss": 0.0, "spent": 0.0}
        state["seconds"] += record["seconds"]
        if record["valid_mae"] < state["best"]:
            state["best"], state["best_epoch"] = record["valid_mae"], epoch + 1
            model.save_weights(best)
        with (run / "log.jsonl").open("a") as log:
            log.write(json.dumps(record) + "\n")
        keep()
        report(Progress(epoch + 1, recipe.epochs, steps, steps, record["loss"], record))
    model.load_weights(best)
    return state


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def _predict(model: keras.Model, source: Source, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Outputs of a model for rows of a source, and the rows in the same order."""
    out, rows = [], []
    for stamps, indices in source.batches(weights.BATCH, start, stop):
        out.append(ops.convert_to_numpy(model.predict_on_batch(stamps)))
        rows.append(indices)
    return np.concatenate(out), np.concatenate(rows)


# --- base training --------------------------------------------------------------------------


def train(
    data: str | Path,
    output: str | Path,
    *,
    network: str = "fovea",
    recipe: Recipe | None = None,
    seed: int = 0,
    limit: int | None = None,
    test: str | Path | None = None,
    real: Source | None = None,
    real_labels: bool = True,
    overwrite: bool = False,
    command: str = "",
    report: Report = _silent,
) -> weights.Weights:
    """Train a network on simulated stamps and write a weights directory.

    Parameters
    ----------
    data : str or Path
        Training set from `sersicnet.simulate`; its last tenth validates.
    output : str or Path
        Weights directory. The run is kept in ``<output>.run`` until it is done,
        and is continued from there.
    network : {"fovea", "tl", "dann"}
    recipe : Recipe, optional
        The network's own in `RECIPES` by default.
    seed : int
    limit : int, optional
        Use only this many stamps of `data`.
    test : str or Path, optional
        Another dataset, whose scores go on the card.
    real : Dataset or Arrays, optional
        Real galaxies, for the adversary of ``dann``.
    real_labels : bool
        Whether the labels of `real` train the regression too (supervised).
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
    InputError, DatasetError
        If an option or the data cannot be used; nothing is written then.
    """
    output = Path(output)
    run = _prepare(output, overwrite)
    if network not in networks.ARCHITECTURES:
        raise InputError(f"A network is one of {', '.join(networks.ARCHITECTURES)}; received {network}.")
    if (network == "dann") != (real is not None):
        raise InputError("The network dann, and only it, needs real galaxies: give --real with it.")
    recipe = recipe or RECIPES[network]
    architecture = networks.ARCHITECTURES[network]
    if test is not None:
        Dataset(test).close()
    with Dataset(data) as simulated:
        source: Source = simulated
        if limit is not None or recipe.faint_limit < simulated.mag.max():
            source = simulated.selected(recipe.faint_limit, limit)
        if real is not None:
            source = _joined(source, real, seed)
        train_rows, valid_rows = _split(len(source))
        labelled = np.ones(len(source), bool) if real_labels else ~source.is_real
        encoded = encode(source.targets) if architecture.log else source.targets
        learned = encoded[slice(*train_rows)][labelled[slice(*train_rows)]]
        mean, std = learned.mean(axis=0), learned.std(axis=0)
        keras.utils.set_random_seed(seed)
        core = architecture.build()
        standardised = ((encoded - mean) / std).astype(np.float32)
        if real is not None:
            model, arguments = _adversarial(core, source, standardised, labelled, recipe)
        else:
            model, arguments = _plain(core, standardised, architecture, recipe)
        task = _Task(source, train_rows, valid_rows, model, core, arguments, standardised, labelled)
        config = {
            "network": network,
            "recipe": asdict(recipe),
            "seed": seed,
            "data": simulated.sha256(),
            "n": len(source),
            "real": None if real is None else real.sha256(),
            "real_labels": real_labels,
            "backend": keras.backend.backend(),
        }
        state = _fit(task, recipe, seed, run, config, overwrite, report)
        scale = _error_scale(core, source, valid_rows, standardised) if architecture.spreads else None
        unit_model = networks.with_units(architecture, core, mean, std, error_scale=scale)
        card = {
            **_card_base(output.name, network, core, state, seed, command),
            "summary": f"Network `{network}` trained on simulated galaxies only."
            if real is None
            else f"Network `{network}` trained on simulated galaxies and {len(real)} real ones, "
            f"{'with' if real_labels else 'without'} their labels, against a domain classifier.",
            "errors": scale is not None,
            "calibration": None if scale is None else _calibrated(unit_model, source, valid_rows),
            "recipe": asdict(recipe),
            "label_mean": mean.tolist(),
            "label_std": std.tolist(),
            "domain": _domain(simulated, recipe.faint_limit),
            "data": _data_record(simulated, len(source)),
            "limits": list(_LIMITS),
        }
    return _finish(output, run, unit_model, card, test)


def _plain(
    core: keras.Model, standardised: np.ndarray, architecture: networks.Architecture, recipe: Recipe
) -> tuple[keras.Model, Callable[[np.ndarray, np.ndarray, float], tuple[Any, Any, Any]]]:
    optimizer = keras.optimizers.AdamW if recipe.anneal else keras.optimizers.Adam
    loss = _spread_loss if architecture.spreads else "mae"
    core.compile(optimizer(recipe.learning_rate), loss=loss, jit_compile=_jit())
    return core, lambda stamps, indices, done: (stamps, standardised[indices], None)


def _adversarial(
    core: keras.Model, source: Source, standardised: np.ndarray, labelled: np.ndarray, recipe: Recipe
) -> tuple[keras.Model, Callable[[np.ndarray, np.ndarray, float], tuple[Any, Any, Any]]]:
    """The adversary: one mask a sample, lambda ramped from 0 to 1 over the run."""
    model = networks.with_adversary(core)
    model.compile(
        keras.optimizers.Adam(recipe.learning_rate),
        loss={"means": "mse", "domain": "sparse_categorical_crossentropy"},
        loss_weights={"means": recipe.alpha, "domain": 1 - recipe.alpha},
        jit_compile=_jit(),
    )
    is_real = source.is_real

    def arguments(stamps: np.ndarray, indices: np.ndarray, done: float) -> tuple[Any, Any, Any]:
        strength = np.full((len(stamps), 1), 2 / (1 + math.exp(-10 * done)) - 1, np.float32)
        real = is_real[indices]
        return (
            [stamps, strength],
            {"means": standardised[indices], "domain": real.astype(np.int32)},
            {"means": labelled[indices].astype(np.float32), "domain": np.ones(len(stamps), np.float32)},
        )

    return model, arguments


def _joined(simulated: Source, real: Source, seed: int) -> Arrays:
    """Simulated and real galaxies in one shuffled set, held in memory."""
    order = np.random.default_rng(seed).permutation(len(simulated) + len(real))
    return Arrays(
        np.concatenate([simulated.stamps(0, len(simulated)), real.stamps(0, len(real))])[order],
        np.concatenate([simulated.targets, real.targets])[order],
        np.repeat([False, True], [len(simulated), len(real)])[order],
        np.concatenate([simulated.mag, real.mag])[order],
    )


# --- fine-tuning ----------------------------------------------------------------------------


def finetune(
    real: Arrays,
    output: str | Path,
    *,
    base: str | Path = weights.DEFAULT,
    recipe: Recipe = FINETUNE,
    seed: int = 0,
    overwrite: bool = False,
    command: str = "",
    report: Report = _silent,
) -> weights.Weights:
    """Carry weights to real galaxies by training on, every layer free.

    Parameters
    ----------
    real : Arrays
        Stamps and labels; a fifth of them, at random, validates.
    output : str or Path
        Weights directory.
    base : str or Path
        Weights to start from.
    recipe, seed, overwrite, command, report
        As for `train`.

    Returns
    -------
    Weights

    Raises
    ------
    InputError, DatasetError, WeightsError
        If something cannot be used; nothing is written then.
    """
    output = Path(output)
    run = _prepare(output, overwrite)
    start = weights.load(base)
    architecture = networks.ARCHITECTURES[start.card["network"]]
    if len(real) < 10:
        raise DatasetError(f"Fine-tuning needs at least 10 labelled galaxies; received {len(real)}.")
    keras.utils.set_random_seed(seed)
    core = start.keras_model().get_layer("core")
    mean, std = np.array(start.card["label_mean"]), np.array(start.card["label_std"])
    order = np.random.default_rng(seed).permutation(len(real))
    shuffled = real.taken(order)
    encoded = encode(shuffled.targets) if architecture.log else shuffled.targets
    standardised = ((encoded - mean) / std).astype(np.float32)
    n_train = len(real) - max(1, len(real) // 5)
    model, arguments = _plain(core, standardised, architecture, recipe)
    labelled = np.ones(len(real), bool)
    task = _Task(shuffled, (0, n_train), (n_train, len(real)), model, core, arguments, standardised, labelled)
    config = {"base": start.sha256, "recipe": asdict(recipe), "seed": seed, "data": real.sha256()}
    state = _fit(task, recipe, seed, run, config, overwrite, report)
    scale = None
    if architecture.spreads:
        scale = _error_scale(core, shuffled, (n_train, len(real)), standardised)
    unit_model = networks.with_units(architecture, core, mean, std, error_scale=scale)
    out, rows = _predict(unit_model, shuffled, n_train, len(real))
    card = {
        **start.card,
        **_card_base(output.name, start.card["network"], core, state, seed, command),
        "summary": f"`{start.name}` fine-tuned on {len(real)} labelled real galaxies.",
        "calibration": None if scale is None else _calibrated(unit_model, shuffled, (n_train, len(real))),
        "recipe": asdict(recipe),
        "base": {"name": start.name, "sha256": start.sha256},
        "data": {"n": len(real), "sha256": real.sha256(), "command": command},
        "limits": [f"Errors are calibrated on the {len(real) - n_train} galaxies that also chose the epoch."],
        "scores": {
            "test_set": f"its {len(real) - n_train} validation galaxies, which chose the epoch",
            "samples": scores(shuffled.targets[rows], out[:, :N_TARGETS], mag=shuffled.mag[rows]),
        },
    }
    return _finish(output, run, unit_model, card, None)


# --- what both share ------------------------------------------------------------------------

_LIMITS = (
    "Knows isolated galaxies of a single Sersic profile; bars, arms and neighbours were not shown to it.",
    "Errors are calibrated on simulations; real galaxies are no Sersic profiles, and there they are too small.",
    "Stars and galaxies smaller than a pixel are outside of its domain.",
)


def _prepare(output: Path, overwrite: bool) -> Path:
    weights.check_directory(output, weights.SUMS, overwrite)
    return output.with_name(output.name + ".run")


def _split(n: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Nine tenths to train, one to validate; the border on a whole block."""
    border = n * 9 // 10 // BLOCK * BLOCK
    if n < 2 * BLOCK:
        raise DatasetError(f"Training needs at least {2 * BLOCK} stamps; received {n}.")
    return (0, border), (border, n)


def _error_scale(core: keras.Model, source: Source, rows: tuple[int, int], standardised: np.ndarray) -> np.ndarray:
    """Factors on the predicted deviations that make 68.27 % of the errors fall within one."""
    out, indices = _predict(core, source, *rows)
    deviation = np.abs(out[:, :N_TARGETS] - standardised[indices]) / np.exp(out[:, N_TARGETS:])
    return np.quantile(deviation, 0.6827, axis=0)


def _calibrated(model: keras.Model, source: Source, rows: tuple[int, int]) -> dict[str, Any] | None:
    out, indices = _predict(model, source, *rows)
    return calibration(source.targets[indices], out[:, :N_TARGETS], out[:, N_TARGETS:])


def calibration(
    targets: np.ndarray, predicted: np.ndarray, errors: np.ndarray, *, least: int = 300, most: int = 12
) -> dict[str, Any] | None:
    """Factors on predicted errors, by magnitude, that make 68.27 % of the deviations fall within one.

    Split conformal prediction, for galaxies of like brightness: one factor a
    parameter in bins of the predicted relative magnitude that hold equally many.

    Parameters
    ----------
    targets, predicted, errors : ndarray, float, (N, 4)
        Of galaxies that were not trained on; the magnitude relative to the noise.
    least : int
        Galaxies that a bin needs.
    most : int
        Bins.

    Returns
    -------
    dict or None
        ``mag``, the median of each bin, and ``factors``, a list for each bin;
        None for fewer than two bins' galaxies.

    References
    ----------
    Lei et al. 2018, arXiv:1604.04173, section 5.2 (locally weighted).
    """
    bins = min(most, len(targets) // least)
    if bins < 2:
        return None
    deviation = np.abs(predicted - targets) / errors
    parts = np.array_split(np.argsort(predicted[:, 0]), bins)
    return {
        "mag": [round(float(np.median(predicted[part, 0])), 4) for part in parts],
        "factors": [np.quantile(deviation[part], 0.6827, axis=0).round(4).tolist() for part in parts],
    }


def _card_base(
    name: str, network: str, core: keras.Model, state: dict[str, Any], seed: int, command: str
) -> dict[str, Any]:
    import h5py

    return {
        "name": name,
        "network": network,
        "parameters": core.count_params(),
        "command": command,
        "seed": seed,
        "licence": "MIT",
        "training": {
            "epochs": state["epoch"],
            "best_epoch": state["best_epoch"],
            "seconds": round(state["seconds"]),
            "device": device(),
            "backend": f"keras {keras.__version__}, {keras.backend.backend()}",
        },
        "versions": {
            "sersicnet": sersicnet.__version__,
            "keras": keras.__version__,
            "numpy": np.__version__,
            "h5py": h5py.__version__,
            "python": platform.python_version(),
        },
    }


def _domain(simulated: Dataset, faint_limit: float) -> dict[str, Any]:
    instrument, prior = simulated.config["instrument"], simulated.config["prior"]
    widths = [psf["fwhm"] for psf in simulated.config.get("psfs", [])] or [simulated.config["psf_fwhm"]]
    scatter = simulated.config.get("psf_scatter", 0.0)
    ranges = {name: list(prior[name]) for name in TARGET_NAMES}
    ranges["mag"][1] = min(ranges["mag"][1], faint_limit)
    return {
        "instrument": instrument["name"],
        "pixel_scale": instrument["pixel_scale"],
        "zero_point": instrument["zero_point"],
        "psf_fwhm": simulated.config["psf_fwhm"],
        "psf_fwhm_range": [min(widths) * (1 - scatter), max(widths) * (1 + scatter)],
        "rms": [instrument["rms_low"], instrument["rms_high"]],
        "ranges": ranges,
    }


def _data_record(simulated: Dataset, n: int) -> dict[str, Any]:
    return {
        "n": n,
        "sha256": simulated.sha256(),
        "command": simulated.config["command"],
        "config": simulated.config,
        "versions": simulated.versions,
    }


def _jit() -> str | bool:
    """XLA where it helps: not for TensorFlow on a CPU, where it is a sixth slower."""
    return "auto" if _accelerators() or keras.backend.backend() != "tensorflow" else False


def _accelerators() -> list[str]:
    if keras.backend.backend() == "torch":
        import torch

        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [d for d in keras.distribution.list_devices() if not d.startswith("cpu")]


def device() -> str:
    """The device that training runs on, in words."""
    return ", ".join(_accelerators()) or f"{os.cpu_count()} CPU cores, no GPU"


def _finish(
    output: Path, run: Path, model: keras.Model, card: dict[str, Any], test: str | Path | None
) -> weights.Weights:
    if test is not None:
        with Dataset(test) as other:
            out, rows = _predict(model, other, 0, len(other))
            errors = weights.calibrated(card, out[:, 0], out[:, N_TARGETS:]) if card["errors"] else None
            card["scores"] = {
                "test_set": f"{len(other):,} stamps of `{other.config['command']}`",
                "samples": scores(other.targets[rows], out[:, :N_TARGETS], errors, other.mag[rows]),
            }
    done = weights.save(output, model, card)
    shutil.rmtree(run)
    return done
