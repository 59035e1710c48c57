"""The training loop: batches, steps, epochs, and the state of a run on disk.

A run keeps everything in a directory beside its output: its configuration, one JSON line per
epoch, the best weights, and the last state, which is at most five minutes old.
"""

from __future__ import annotations

import json
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sersicnet import weights
from sersicnet.calibration import conditions
from sersicnet.engine.render import on_host
from sersicnet.errors import DatasetError, InputError, first_line
from sersicnet.networks import keras, ops, shown
from sersicnet.orientations import average, oriented, turned
from sersicnet.output import Run, json_text
from sersicnet.schema import N_TARGETS, TARGET_NAMES, Inputs, decode, encode
from sersicnet.training.augment import deepened, noise_correlation
from sersicnet.training.joined import Source
from sersicnet.training.losses import Arguments, learning_rate
from sersicnet.training.on_the_fly import OnTheFly
from sersicnet.training.recipe import Recipe

KEEP_SECONDS = 300.0
"""Longest time between two writes of the state within an epoch."""


class Progress(NamedTuple):
    """The progress of a run; `record` is set at the end of an epoch, `schedule` if several are tried.

    `stamps_per_second` is that of the last 50 steps, or of the epoch.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    record: dict[str, float] | None
    schedule: str = ""
    stamps_per_second: float = math.nan


Report = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Tell nobody: the default `Report`."""


class Scaling(NamedTuple):
    """From physical targets to what a network learns, and back.

    Attributes
    ----------
    log : bool
        Whether targets are encoded by `sersicnet.schema.encode` first.
    mean, std : ndarray, float, (4,)
        Of the (encoded) targets.
    """

    log: bool
    mean: np.ndarray
    std: np.ndarray

    def __call__(self, targets: np.ndarray) -> np.ndarray:
        """Standardised targets, float32, of the same shape."""
        return (((encode(targets) if self.log else targets) - self.mean) / self.std).astype(np.float32)

    def back(self, standardised: np.ndarray) -> np.ndarray:
        """Physical targets, float64."""
        values = standardised.astype(float) * self.std + self.mean
        return decode(values) if self.log else values


class Task(NamedTuple):
    """A network and what it trains on; `labelled` marks the rows whose validation error chooses the epoch.

    `components` are those of the ellipticity, for networks that predict them. With `galaxies`, simulated rows of the
    training set hold new galaxies in every epoch.
    """

    source: Source
    train_rows: tuple[int, int]
    valid_rows: tuple[int, int]
    model: keras.Model
    predictor: keras.Model
    arguments: Arguments
    standardised: np.ndarray
    labelled: np.ndarray
    scaling: Scaling
    galaxies: OnTheFly | None = None
    components: np.ndarray | None = None


def prefetched(items: Iterator[Any], depth: int = 4) -> Iterator[Any]:
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


class Batch(NamedTuple):
    """Inputs, their rows, and what a network should answer.

    Galaxies that an accelerator draws are arrays of its library.
    """

    inputs: Inputs
    rows: np.ndarray
    learned: np.ndarray


def batches(
    task: Task, recipe: Recipe, seed: int, epoch: int, first: int, correlations: Mapping[bool, np.ndarray]
) -> Iterator[Batch]:
    """The batches of an epoch from the step `first`; each depends on seed, epoch and step only."""
    low, high = task.train_rows
    is_real = task.source.is_real
    if task.galaxies is not None and not is_real[low:high].any():
        sizes = [min(recipe.batch, high - row) for row in range(low, high, recipe.batch)]
        made = task.galaxies.galaxies(epoch, first * recipe.batch, iter(sizes[first:]))
        for step, (inputs, targets) in enumerate(made, start=first):
            start = low + step * recipe.batch
            learned = _with_components(task.scaling(targets[:, :N_TARGETS]), task, targets[:, N_TARGETS:])
            yield Batch(inputs, np.arange(start, start + len(targets)), learned)
        return
    order = np.random.default_rng([seed, epoch, 0])
    wanted, used, drawn = deque[int](), 0, None
    for step, (inputs, rows) in enumerate(task.source.batches(recipe.batch, low, high, order)):
        simulated = np.flatnonzero(~is_real[rows])
        if step < first:  # done before the interruption
            used += len(simulated)
            continue
        inputs, learned = finite(task.source, inputs, rows), task.standardised[rows]
        components = None if task.components is None else task.components[rows]
        if task.galaxies is not None:
            drawn = drawn or task.galaxies.galaxies(epoch, used, iter(wanted.popleft, None))
            wanted.append(len(simulated))
            new, targets = next(drawn)
            inputs.put(simulated, new.map(on_host))
            learned[simulated] = task.scaling(targets[:, :N_TARGETS])
            if components is not None:
                components[simulated] = targets[:, N_TARGETS:]
        rng = np.random.default_rng([seed, epoch, 1, step])
        if recipe.symmetries:
            which = rng.integers(8, size=inputs.n)
            inputs = oriented(inputs, which)
            components = None if components is None else turned(components, which)
        for kind, correlation in correlations.items():
            chosen = np.flatnonzero(is_real[rows] == kind)
            factors = rng.uniform(0, recipe.noise, len(chosen))
            deeper, fainter = deepened(inputs.taken(chosen), factors, correlation, rng)
            inputs.put(chosen, deeper)
            learned[chosen, 0] += fainter / task.scaling.std[0]
        yield Batch(inputs, rows, _with_components(learned, task, components))


def _with_components(learned: np.ndarray, task: Task, components: np.ndarray | None) -> np.ndarray:
    """Standardised targets, followed by the components of the ellipticity if the network learns them."""
    if task.components is None or components is None:
        return learned
    return np.concatenate([learned, components], axis=1, dtype=np.float32)


class RunState:
    """The state of a run, and the files that keep it.

    Parameters
    ----------
    run : Run
        With a path.
    schedule : str
        Name of the schedule, where the run follows several: its files begin with it.

    Attributes
    ----------
    state : dict
        Finished epochs and the best of them; the steps of the epoch under way, the sum of
        their losses and the seconds they took; and the weights file that belongs to the state.
    """

    def __init__(self, run: Run, schedule: str = "") -> None:
        assert run.path is not None
        self.run, self.path, self.schedule = run, run.path, schedule
        self._prefix = f"{schedule}." if schedule else ""
        self.state: dict[str, Any] = {"epoch": 0, "best": math.inf, "best_epoch": 0, "seconds": 0.0}
        self.state |= {"step": 0, "loss": 0.0, "spent": 0.0}

    def resume(self, model: keras.Model) -> None:
        """Restore the state that was kept last, if any."""
        found = self.run.read(f"{self._prefix}state")
        if found is not None:
            self.state |= found
            self.load(model, found["last"])

    def load(self, model: keras.Model, name: str) -> None:
        """Load weights that were kept."""
        file = self.path / f"{self._prefix}{name}"
        try:
            model.load_weights(file)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{file} cannot be read ({first_line(error)}): the run is damaged. Remove {self.path} to start anew."
            ) from error

    def keep(self, model: keras.Model) -> None:
        """Keep the state, and the weights and optimiser that belong to it."""
        # The state names its weights file, so that a kill between the two writes is harmless.
        name = f"{self.state['epoch']}-{self.state['step']}-last.weights.h5"
        self.save(model, name)
        self.state["last"] = name
        self.run.keep(f"{self._prefix}state", self.state)
        for other in self.path.glob(f"{self._prefix}*-last.weights.h5"):
            if other.name != f"{self._prefix}{name}":
                other.unlink()

    def save(self, model: keras.Model, name: str) -> None:
        """Keep weights under a name that ends in .weights.h5."""
        with self.run.writing(f"{self._prefix}{name}") as partial:
            model.save_weights(partial)

    def log(self, record: Mapping[str, Any]) -> None:
        """Add the line of an epoch to ``log.jsonl``, once."""
        file = self.path / f"{self._prefix}log.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        lines = [line for line in lines if json.loads(line)["epoch"] < record["epoch"]]
        with self.run.writing(file.name) as partial:
            partial.write_text("".join(line + "\n" for line in [*lines, json_text(record, indent=None)]))


def _check(task: Task) -> None:
    """Refuse targets that are not finite, before they spoil the weights."""
    bad = ~np.isfinite(task.standardised).all(axis=1)
    if bad.any():
        # One of them spoils the mean, and with it all the others.
        own = np.flatnonzero(bad & ~np.isfinite(task.source.targets).all(axis=1))
        row = own[0] if len(own) else int(np.argmax(bad))
        raise DatasetError(
            f"Every galaxy to learn from needs finite targets that are not all the same; {_named(task.source, row)} "
            f"has {task.source.targets[row]}, and {max(0, len(own) - 1)} others are not finite either. Leave them out."
        )


def finite(source: Source, inputs: Inputs, rows: np.ndarray) -> Inputs:
    """The inputs; refused if any value is not finite."""
    good = inputs.finite()
    if not good.all():
        row = int(rows[np.argmin(good)])
        raise DatasetError(f"Every stamp needs finite pixels; {_named(source, row)} has others. Leave it out.")
    return inputs


def _named(source: Source, row: int) -> str:
    return f"row {source.rows[row]} of the {'real' if source.is_real[row] else 'simulated'} galaxies (from 0)"


def fit(task: Task, recipe: Recipe, seed: int, run: Run, report: Report, schedule: str = "") -> dict[str, Any]:
    """Train until the recipe is done; return the state of the run.

    The best weights are loaded afterwards.
    """
    _check(task)
    files = RunState(run, schedule)
    model, state = task.model, files.state
    model.optimizer.build(model.trainable_variables)
    files.resume(model)
    correlations = {}
    if recipe.noise:
        correlations = {bool(kind): noise_correlation(task.source, kind) for kind in np.unique(task.source.is_real)}
    while state["epoch"] < recipe.epochs and state["epoch"] - state["best_epoch"] < recipe.patience:
        record = _epoch(task, recipe, seed, files, correlations, report)
        state |= {"epoch": record["epoch"], "step": 0, "loss": 0.0, "spent": 0.0}
        state["seconds"] += record["seconds"]
        if record["valid_mae"] < state["best"]:
            state["best"], state["best_epoch"] = record["valid_mae"], record["epoch"]
            files.save(model, "best.weights.h5")
        files.log(record)
        files.keep(model)
        steps, speed = _steps(task, recipe), record["stamps_per_second"]
        report(Progress(record["epoch"], recipe.epochs, steps, steps, record["loss"], record, schedule, speed))
    files.load(model, "best.weights.h5")
    return state


def _steps(task: Task, recipe: Recipe) -> int:
    """Steps of an epoch."""
    return math.ceil((task.train_rows[1] - task.train_rows[0]) / recipe.batch)


def _epoch(
    task: Task,
    recipe: Recipe,
    seed: int,
    files: RunState,
    correlations: Mapping[bool, np.ndarray],
    report: Report,
) -> dict[str, Any]:
    """Train for the rest of an epoch and validate; return the record of the epoch."""
    model, state, steps = task.model, files.state, _steps(task, recipe)
    epoch, first = state["epoch"], state["step"]
    started = kept = time.monotonic()
    seen = 0
    rate = partial(learning_rate, recipe, recipe.epochs * steps)
    recent, clock = deque[float](maxlen=50), deque[tuple[float, int]](maxlen=50)
    for step, batch in enumerate(prefetched(batches(task, recipe, seed, epoch, first, correlations)), start=first):
        done = (epoch + step / steps) / recipe.epochs
        x, y, sample_weight = task.arguments(batch.inputs, batch.learned, batch.rows, done)
        model.reset_metrics()
        logs = model.train_on_batch(x, y, sample_weight=sample_weight, return_dict=True)
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise DatasetError(
                f"The loss became {loss} at epoch {epoch + 1}, step {step + 1}, on finite stamps and targets: "
                f"training diverged. Lower the learning rate, {rate(epoch * steps + step):.3g} there."
            )
        recent.append(loss)
        clock.append((time.monotonic(), len(batch.rows)))
        seen += len(batch.rows)
        state["step"], state["loss"] = step + 1, state["loss"] + loss
        mean = float(np.mean(recent))
        report(Progress(epoch + 1, recipe.epochs, step + 1, steps, mean, None, files.schedule, _speed(clock)))
        if time.monotonic() - kept > KEEP_SECONDS:
            state["spent"] += time.monotonic() - kept
            files.keep(model)
            kept = time.monotonic()
    trained = time.monotonic() - started
    return {
        "epoch": epoch + 1,
        "loss": state["loss"] / steps,
        **_validated(task),
        "learning_rate": rate((epoch + 1) * steps - 1),
        "stamps_per_second": round(seen / trained, 1),
        "seconds": round(state["spent"] + time.monotonic() - kept, 1),
    }


def _speed(clock: deque[tuple[float, int]]) -> float:
    """Stamps a second since the oldest entry; NaN for a single one."""
    (start, _), (end, _) = clock[0], clock[-1]
    return sum(n for _, n in list(clock)[1:]) / (end - start) if end > start else math.nan


def _validated(task: Task) -> dict[str, float]:
    """Errors on the validation set: standardised means, which choose the epoch, and physical medians."""
    out, rows, _ = predict(task.predictor, task.source, *task.valid_rows)
    out, rows = out[task.labelled[rows], :N_TARGETS], rows[task.labelled[rows]]
    errors = np.abs(out - task.standardised[rows])
    physical = np.median(np.abs(task.scaling.back(out) - task.source.targets[rows]), axis=0)
    if not np.isfinite(errors).all():
        raise DatasetError("The network answers with numbers that are not finite: training diverged.")
    return {
        "valid_mae": float(errors.mean()),
        **{f"valid_mae_{n}": float(e) for n, e in zip(TARGET_NAMES, errors.mean(axis=0), strict=True)},
        **{f"error_{n}": float(e) for n, e in zip(TARGET_NAMES, physical, strict=True)},
    }


def predict(
    model: keras.Model, source: Source, start: int, stop: int, quarter_turns: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outputs of a model for rows of a source, the rows in the same order, and what it saw of their images.

    The latter is that of `sersicnet.calibration.conditions`. With `quarter_turns`, answers of small errors are
    averaged, see `sersicnet.orientations.average`.
    """
    out, rows, seen = [], [], []
    names = frozenset(port.name for port in model.inputs)

    def answer(some: Inputs) -> np.ndarray:
        # Batches of one size: TensorFlow compiles the model for each size.
        whole = some if some.n in (0, weights.BATCH) else some.taken(np.arange(weights.BATCH) % some.n)
        return np.asarray(ops.convert_to_numpy(model.predict_on_batch(shown(model, whole))))[: some.n]

    for inputs, indices in source.batches(weights.BATCH, start, stop):
        out.append(answer(finite(source, inputs, indices)).copy())
        if quarter_turns:
            average(answer, inputs, out[-1], quarter_turns)
        rows.append(indices)
        seen.append(conditions(inputs, names))
    return np.concatenate(out), np.concatenate(rows), np.concatenate(seen)


@contextmanager
def tensorboard(directory: str | Path | None) -> Iterator[Report]:
    """A `Report` that writes the record of each epoch for TensorBoard; nothing for None.

    ``keras.callbacks.TensorBoard`` is not used: it writes through TensorFlow, which training with
    JAX or PyTorch does without.

    Raises
    ------
    InputError
        If the package is not installed, or the directory cannot be written.
    """
    if directory is None:
        yield silent
        return
    try:
        from tensorboard.summary import Writer
    except ImportError as error:
        raise InputError(
            f"`tensorboard` needs the package tensorboard ({error}). Run `pip install tensorboard`; "
            "log.jsonl in the run's directory holds the same numbers."
        ) from error
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{directory} cannot hold TensorBoard's files: {error}.") from error
    writers: dict[str, Any] = {}

    def write(progress: Progress) -> None:
        if progress.record is None:
            return
        if progress.schedule not in writers:
            writers[progress.schedule] = Writer(str(Path(directory) / progress.schedule))
        writer = writers[progress.schedule]
        for tag, value in progress.record.items():
            if tag != "epoch":
                writer.add_scalar(tag, value, progress.epoch)
        writer.flush()

    try:
        yield write
    finally:
        for writer in writers.values():
            writer.close()
