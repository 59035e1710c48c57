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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Union

import numpy as np

import sersicnet
from sersicnet import networks, weights
from sersicnet.dataset import BLOCK, Arrays, Dataset
from sersicnet.engine.noise import correlated_noise
from sersicnet.engine.render import on_host
from sersicnet.errors import DatasetError, InputError, warn
from sersicnet.evaluating.evaluate import scores
from sersicnet.networks import keras, ops
from sersicnet.output import check_directory
from sersicnet.schema import N_TARGETS, STAMP_SIZE, TARGET_NAMES, decode, encode, relative_magnitude
from sersicnet.training.on_the_fly import Fresh

Source = Union[Dataset, Arrays, "Joined"]

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
        Weight of the regression against the alignment of domains (adaptation only).
    noise : float
        Noise is added to each stored stamp, of an rms between 0 and this factor times that of the
        stamp: another one in every epoch. Its magnitude relative to the noise follows.
    keep_norms : bool
        Batch normalisations stay as they are in the weights that training begins at, moments
        and all: those of batches of two domains are of neither.
    """

    epochs: int
    batch: int
    learning_rate: float
    anneal: bool
    patience: int
    symmetries: bool
    faint_limit: float = 99.0
    alpha: float = 0.9
    noise: float = 0.0
    keep_norms: bool = False


RECIPES = {
    "fovea": Recipe(epochs=7, batch=64, learning_rate=1.5e-3, anneal=True, patience=7, symmetries=True),
    "tl": Recipe(
        epochs=100, batch=16, learning_rate=1e-4, anneal=False, patience=10, symmetries=False, faint_limit=23.0
    ),
    "dann": Recipe(epochs=300, batch=16, learning_rate=1e-4, anneal=False, patience=20, symmetries=False),
}
ADAPT = {
    "fovea": Recipe(
        epochs=30, batch=64, learning_rate=5e-4, anneal=True, patience=30, symmetries=True, keep_norms=True
    ),
    "tl": RECIPES["tl"],
    "dann": RECIPES["dann"],
}
"""For training with real galaxies; that of ``dann`` is the study's."""

FINETUNE = {
    "fovea": Recipe(epochs=15, batch=32, learning_rate=3e-4, anneal=True, patience=15, symmetries=True),
    "tl": Recipe(epochs=15, batch=8, learning_rate=1e-4, anneal=False, patience=15, symmetries=False, faint_limit=23.0),
    "dann": Recipe(epochs=15, batch=8, learning_rate=1e-4, anneal=False, patience=15, symmetries=False),
}
"""For transfer learning; those of ``tl`` and ``dann`` are the study's, with the best validation error kept."""

ALIGNMENTS = ("dann", "daregram")
LAYERS = ("auto", "all", "head-first")

JUDGES = 10
"""Labelled real galaxies of the validation set without which simulated ones choose the epoch."""


class Progress(NamedTuple):
    """Where a run stands; `record` is set at the end of an epoch, `road` where several are tried.

    `stamps_per_second` is that of the last 50 steps, or of the epoch.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    record: dict[str, float] | None
    road: str = ""
    stamps_per_second: float = math.nan


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


REGRESSION = {"fovea": _spread_loss, "tl": "mae", "dann": "mse"}
"""What the regression of each network minimises; for ``tl`` and ``dann`` as in the study."""

GRAM_SHARE = 0.99
"""Fraction of the features' power in the principal directions that `gram_distance` compares."""


def gram_distance(domain: Any, features: Any) -> Any:
    """How much the inverse Gram matrices of two domains' features differ (DARE-GRAM).

    A linear regression on features z is (Z^T Z)^-1 Z^T y: where the inverse
    Gram matrices of both domains agree, so do their regressions, wherever the
    features themselves lie. Compared are the angles between the columns of the
    pseudo-inverses, and the eigenvalues, of as many principal directions as hold
    `GRAM_SHARE` of the power in both domains.

    Two things differ from the paper. Gram matrices are means instead of sums
    over galaxies, so that domains with unlike numbers can be compared; and the
    difference of eigenvalues is relative to their sizes, for features have no
    unit. No eigenvector is differentiated, which equal eigenvalues would spoil:
    derivatives are those of a pseudo-inverse of constant rank (Golub & Pereyra
    1973), as if the directions left out had no power.

    Parameters
    ----------
    domain : tensor, float, (N, 2)
        1 for real galaxies and 0 for others; and a factor on the result.
    features : tensor, float, (N, F)

    Returns
    -------
    tensor, float, (N,)
        The same number times the factor of each galaxy.

    References
    ----------
    Nejjar, Wang & Fink 2023, CVPR, arXiv:2303.13325.
    """
    z = ops.concatenate([ops.ones_like(features[:, :1]), features], axis=1)
    grams, bases, powers = [], [], []
    for mask in (1 - domain[:, :1], domain[:, :1]):
        gram = ops.matmul(ops.transpose(z * mask), z * mask) / ops.maximum(ops.sum(mask), 1.0)
        values, vectors = ops.eigh(ops.stop_gradient(gram))
        grams.append(gram)
        powers.append(ops.maximum(ops.flip(values, axis=0), 0.0))
        bases.append(ops.stop_gradient(ops.flip(vectors, axis=1)))
    before = [(ops.cumsum(p) - p) / ops.maximum(ops.sum(p), 1e-12) for p in powers]
    principal = ops.minimum(*before) < GRAM_SHARE
    inverses, sizes = [], []
    for gram, basis, power in zip(grams, bases, powers, strict=True):
        floor = 1e-6 * power[0] + 1e-12
        kept = ops.cast(ops.logical_and(principal, power > floor), power.dtype)
        inverse = kept / ops.maximum(power, floor)
        # Zero, but it carries the derivative.
        change = ops.matmul(ops.transpose(basis), ops.matmul(gram - ops.stop_gradient(gram), basis))
        turned = ops.square(inverse)[:, None] * (1 - kept)[None, :]
        slope = turned + ops.transpose(turned) - inverse[:, None] * inverse[None, :]
        middle = ops.diag(inverse) + slope * change
        inverses.append(ops.matmul(basis, ops.matmul(middle, ops.transpose(basis))))
        sizes.append(kept * (power + ops.diagonal(change)))
    lengths = [ops.sqrt(ops.sum(ops.square(m), axis=0) + 1e-12) for m in inverses]
    cosines = (ops.sum(inverses[0] * inverses[1], axis=0) + 1e-12) / (lengths[0] * lengths[1])
    unlike = [ops.sqrt(ops.sum(ops.square(v)) + 1e-12) for v in (sizes[0] - sizes[1], sizes[0], sizes[1])]
    distance = ops.mean(ops.abs(1 - cosines)) + unlike[0] / (unlike[1] + unlike[2])
    return domain[:, 1] * distance


# --- the loop -------------------------------------------------------------------------------


Arguments = Callable[[Any, np.ndarray, np.ndarray, float], tuple[Any, Any, Any]]
"""Stamps, their standardised targets, their rows and the fraction of the run that is done -> x, y and weights.

What `train_on_batch` takes.
"""


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


class _Task(NamedTuple):
    """What a run trains on; `labelled` marks the rows whose validation error chooses the epoch.

    With `galaxies`, simulated rows of the training set are filled afresh in every epoch.
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
    galaxies: Fresh | None = None


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


AUTOCORRELATION_STAMPS = 256
"""Stamps that the correlation of the noise is measured on."""

NOISE_FIELD = 512
"""Side of the piece of noise that a batch takes its noise from, in pixels."""


def noise_correlation(source: Source, is_real: bool) -> np.ndarray:
    """Autocorrelation of the noise of the simulated, or the real, stamps of a source.

    The median over the corners, 32 pixels wide, of the faintest stamps.

    Parameters
    ----------
    source : Dataset, Arrays or Joined
    is_real : bool
        Which stamps.

    Returns
    -------
    ndarray, float64, (7, 7)
        1 in the middle; lags along y and x up to three pixels.
    """
    rows = np.flatnonzero(source.is_real == is_real)
    faintest = np.argsort(np.nan_to_num(source.targets[rows, 0], nan=-np.inf), kind="stable")[-AUTOCORRELATION_STAMPS:]
    side, last = STAMP_SIZE // 4, STAMP_SIZE - STAMP_SIZE // 4
    corners = []
    for row in np.sort(rows[faintest]).tolist():
        ((stamp, _),) = source.batches(1, row, row + 1)
        corners += [stamp[0, y : y + side, x : x + side] for y in (0, last) for x in (0, last)]
    pieces = np.array(corners, float)
    pieces -= pieces.mean(axis=(1, 2), keepdims=True)
    found = np.empty((len(pieces), 7, 7))
    for dy in range(4):
        for dx in range(-3, 4):
            left, right = max(0, -dx), side - max(0, dx)
            product = pieces[:, dy:, left + dx : right + dx] * pieces[:, : side - dy, left:right]
            found[:, 3 + dy, 3 + dx] = found[:, 3 - dy, 3 - dx] = product.mean(axis=(1, 2))
    found /= found[:, 3:4, 3:4]
    return np.median(found, axis=0)


def deepened(
    stamps: np.ndarray, factors: np.ndarray, correlation: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Stamps with more noise, as a shallower image shows them.

    In units of the new noise they are ``(stamp + f noise) / sqrt(1 + f^2)``.

    Parameters
    ----------
    stamps : ndarray, float32, (N, 128, 128)
        In units of their noise.
    factors : ndarray, float, (N,)
        f, the rms of the noise that is added over that of the noise there is.
    correlation : ndarray, float, (7, 7)
        Autocorrelation of the noise.
    rng : numpy Generator

    Returns
    -------
    stamps : ndarray, float32, (N, 128, 128)
    fainter : ndarray, float64, (N,)
        What is to be added to relative magnitudes.
    """
    noise = correlated_noise(rng, NOISE_FIELD, correlation)
    noise /= noise.std()
    corners = rng.integers(NOISE_FIELD - STAMP_SIZE + 1, size=(len(stamps), 2))
    total = np.sqrt(1 + np.square(factors))
    out = stamps / total.astype(np.float32)[:, None, None]
    for stamp, share, (y, x) in zip(out, factors / total, corners, strict=True):
        stamp += np.float32(share) * noise[y : y + STAMP_SIZE, x : x + STAMP_SIZE]
    return out, 2.5 * np.log10(total)


class _Batch(NamedTuple):
    """Stamps, of NumPy or of the library that draws them, their rows and what a network should say of them."""

    stamps: Any
    rows: np.ndarray
    learned: np.ndarray


def _batches(
    task: _Task, recipe: Recipe, seed: int, epoch: int, first: int, correlations: Mapping[bool, np.ndarray]
) -> Iterator[_Batch]:
    """The batches of an epoch from a step on, each of which depends on seed, epoch and step only."""
    low, high = task.train_rows
    is_real = task.source.is_real
    if task.galaxies is not None and not is_real[low:high].any():
        sizes = [min(recipe.batch, high - row) for row in range(low, high, recipe.batch)]
        drawn = task.galaxies.galaxies(epoch, first * recipe.batch, iter(sizes[first:]))
        for step, (stamps, targets) in enumerate(drawn, start=first):
            start = low + step * recipe.batch
            yield _Batch(stamps, np.arange(start, start + len(targets)), task.scaling(targets))
        return
    order = np.random.default_rng([seed, epoch, 0])
    wanted, used, fresh = deque[int](), 0, None
    for step, (stamps, rows) in enumerate(task.source.batches(recipe.batch, low, high, order)):
        simulated = np.flatnonzero(~is_real[rows])
        if step < first:  # done before the interruption
            used += len(simulated)
            continue
        stamps, learned = _finite(task.source, stamps, rows), task.standardised[rows]
        if task.galaxies is not None:
            fresh = fresh or task.galaxies.galaxies(epoch, used, iter(wanted.popleft, None))
            wanted.append(len(simulated))
            drawn_now, targets = next(fresh)
            stamps[simulated], learned[simulated] = on_host(drawn_now), task.scaling(targets)
        rng = np.random.default_rng([seed, epoch, 1, step])
        if recipe.symmetries:
            stamps = _oriented(stamps, rng.integers(8, size=len(stamps)))
        for kind, correlation in correlations.items():
            chosen = np.flatnonzero(is_real[rows] == kind)
            factors = rng.uniform(0, recipe.noise, len(chosen))
            stamps[chosen], fainter = deepened(stamps[chosen], factors, correlation, rng)
            learned[chosen, 0] += fainter / task.scaling.std[0]
        yield _Batch(stamps, rows, learned)


class _Run:
    """What a run keeps on disk. Everything is written beside its final name and renamed.

    Parameters
    ----------
    path : Path
        The directory of the run.
    config : dict
        Options that another run in the same place must share.
    overwrite : bool
        Whether to drop a run with other options.

    Attributes
    ----------
    state : dict
        Where the run stands: finished epochs and the best of them; the steps of the
        epoch under way, the sum of their losses and the seconds they took; and the
        name of the weights file that belongs to it.
    """

    def __init__(self, path: Path, config: dict[str, Any], overwrite: bool) -> None:
        self.path = path
        config = json.loads(json.dumps(config))
        file = path / "config.json"
        found = self._read(file)
        if found is not None and found != config:
            if not overwrite:
                raise InputError(
                    f"{path} holds an unfinished run with other options{_unlike(found, config)}. "
                    "Repeat its command, or give --overwrite to start anew."
                )
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            with self._writing(file.name) as partial:
                partial.write_text(json.dumps(config, indent=1))
        self.state: dict[str, Any] = {"epoch": 0, "best": math.inf, "best_epoch": 0, "seconds": 0.0}
        self.state |= {"step": 0, "loss": 0.0, "spent": 0.0}

    def resume(self, model: keras.Model) -> None:
        """Take up the state that was kept last, if any."""
        file = self.path / "state.json"
        if file.exists():
            self.state |= self._read(file) or {}
            self.load(model, self.state.get("last", "its weights"))

    def load(self, model: keras.Model, name: str) -> None:
        """Load weights that were kept."""
        try:
            model.load_weights(self.path / name)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{self.path / name} cannot be read ({_first_line(error)}): the run is damaged. "
                "Give --overwrite to start anew."
            ) from error

    def keep(self, model: keras.Model) -> None:
        """Keep the state and the weights and optimiser that belong to it."""
        # The state names its weights file, so that a kill between the two writes is harmless.
        name = f"{self.state['epoch']}-{self.state['step']}-last.weights.h5"
        self.save(model, name)
        with self._writing("state.json") as partial:
            partial.write_text(json.dumps({**self.state, "last": name}))
        self.state["last"] = name
        for other in self.path.glob("*-last.weights.h5"):
            if other.name != name:
                other.unlink()

    def save(self, model: keras.Model, name: str) -> None:
        """Keep weights under a name that ends in .weights.h5."""
        with self._writing(name) as partial:
            model.save_weights(partial)

    def log(self, record: Mapping[str, Any]) -> None:
        """Add the line of an epoch, once."""
        file = self.path / "log.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        lines = [line for line in lines if json.loads(line)["epoch"] < record["epoch"]]
        with self._writing(file.name) as partial:
            partial.write_text("".join(line + "\n" for line in [*lines, json.dumps(record)]))

    def _read(self, file: Path) -> Any:
        try:
            return json.loads(file.read_text()) if file.exists() else None
        except (OSError, ValueError) as error:
            raise InputError(
                f"{file} cannot be read ({_first_line(error)}): the run is damaged. Remove {self.path} to start anew."
            ) from error

    @contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        partial = self.path / f"partial-{name}"
        try:
            yield partial
            partial.replace(self.path / name)
        except (OSError, RuntimeError) as error:  # h5py raises either
            raise InputError(
                f"{self.path / name} could not be written: {_first_line(error)}. What was kept before is intact; "
                "when the disk is well again, the same command continues."
            ) from error
        finally:
            partial.unlink(missing_ok=True)


def _unlike(found: Any, config: dict[str, Any]) -> str:
    """What differs, in brackets."""
    if not isinstance(found, dict):
        return ""
    names = [name for name in config if found.get(name) != config[name]]
    told = [
        f"{name} {found.get(name)}, now {config[name]}"
        for name in names
        if all(
            isinstance(value, str | int | None) and len(str(value)) < 40 for value in (found.get(name), config[name])
        )
    ]
    return f" ({', '.join(told or names)})" if names else ""


def _first_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno:  # h5py tells a long story
        return os.strerror(error.errno)
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _check(task: _Task) -> None:
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


def _finite(source: Source, stamps: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The stamps; refused if any pixel is not finite."""
    if not np.isfinite(stamps).all():
        row = int(rows[np.argmin(np.isfinite(stamps).all(axis=(1, 2)))])
        raise DatasetError(f"Every stamp needs finite pixels; {_named(source, row)} has others. Leave it out.")
    return stamps


def _named(source: Source, row: int) -> str:
    return f"row {source.rows[row]} of the {'real' if source.is_real[row] else 'simulated'} galaxies (from 0)"


def _fit(
    task: _Task, recipe: Recipe, seed: int, run: Path, config: dict[str, Any], overwrite: bool, report: Report
) -> dict[str, Any]:
    """Train until the recipe is done; return the record of the run.

    The best weights are loaded afterwards.
    """
    _check(task)
    files = _Run(run, config, overwrite)
    model, state = task.model, files.state
    model.optimizer.build(model.trainable_variables)
    files.resume(model)
    correlations = {}
    if recipe.noise:
        correlations = {bool(kind): noise_correlation(task.source, kind) for kind in np.unique(task.source.is_real)}
    low, high = task.train_rows
    steps = math.ceil((high - low) / recipe.batch)
    while state["epoch"] < recipe.epochs and state["epoch"] - state["best_epoch"] < recipe.patience:
        epoch, first = state["epoch"], state["step"]
        started = kept = time.monotonic()
        recent, clock = deque[float](maxlen=50), deque[tuple[float, int]](maxlen=50)
        learning_rate = recipe.learning_rate
        batches = _prefetched(_batches(task, recipe, seed, epoch, first, correlations))
        for step, batch in enumerate(batches, start=first):
            done = (epoch + step / steps) / recipe.epochs
            if recipe.anneal:
                warm = min(1.0, done / 0.03 + 1e-3)
                learning_rate = recipe.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * done))
                model.optimizer.learning_rate = learning_rate
            x, y, sample_weight = task.arguments(batch.stamps, batch.learned, batch.rows, done)
            model.reset_metrics()
            logs = model.train_on_batch(x, y, sample_weight=sample_weight, return_dict=True)
            loss = float(logs["loss"])
            if not math.isfinite(loss):
                raise DatasetError(
                    f"The loss became {loss} at epoch {epoch + 1}, step {step + 1}, on finite stamps and targets: "
                    f"training diverged. Lower the learning rate, {learning_rate:.3g} there."
                )
            recent.append(loss)
            clock.append((time.monotonic(), len(batch.rows)))
            state["step"], state["loss"] = step + 1, state["loss"] + loss
            mean = float(np.mean(recent))
            report(Progress(epoch + 1, recipe.epochs, step + 1, steps, mean, None, stamps_per_second=_rate(clock)))
            if time.monotonic() - kept > KEEP_SECONDS:
                state["spent"] += time.monotonic() - kept
                files.keep(model)
                kept = time.monotonic()
        trained = time.monotonic() - started
        record = {
            "epoch": epoch + 1,
            "loss": state["loss"] / steps,
            **_validated(task),
            "learning_rate": learning_rate,
            "stamps_per_second": round((min(steps * recipe.batch, high - low) - first * recipe.batch) / trained, 1),
            "seconds": round(state["spent"] + time.monotonic() - kept, 1),
        }
        state |= {"epoch": epoch + 1, "step": 0, "loss": 0.0, "spent": 0.0}
        state["seconds"] += record["seconds"]
        if record["valid_mae"] < state["best"]:
            state["best"], state["best_epoch"] = record["valid_mae"], epoch + 1
            files.save(model, "best.weights.h5")
        files.log(record)
        files.keep(model)
        report(
            Progress(
                epoch + 1, recipe.epochs, steps, steps, record["loss"], record,
                stamps_per_second=record["stamps_per_second"],
            )
        )  # fmt: skip
    files.load(model, "best.weights.h5")
    return state


def _rate(clock: deque[tuple[float, int]]) -> float:
    """Stamps a second since the oldest entry; NaN for a single one."""
    (start, _), (end, _) = clock[0], clock[-1]
    return sum(n for _, n in list(clock)[1:]) / (end - start) if end > start else math.nan


def _validated(task: _Task) -> dict[str, float]:
    """Errors on the validation set: standardised means, which choose the epoch, and physical medians."""
    out, rows = _predict(task.predictor, task.source, *task.valid_rows)
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


def _predict(model: keras.Model, source: Source, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Outputs of a model for rows of a source, and the rows in the same order."""
    out, rows = [], []
    for stamps, indices in source.batches(weights.BATCH, start, stop):
        out.append(ops.convert_to_numpy(model.predict_on_batch(_finite(source, stamps, indices))))
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
    start: str | Path | None = None,
    test: str | Path | None = None,
    adapt: str | None = None,
    real: Dataset | Arrays | None = None,
    real_labels: bool = True,
    fresh: bool = False,
    overwrite: bool = False,
    command: str = "",
    report: Report = _silent,
) -> weights.Weights:
    """Train a network on simulated stamps, and on real ones if asked, and write a weights directory.

    Parameters
    ----------
    data : str or Path
        Training set from `sersicnet.simulating.simulate`; its last tenth validates.
    output : str or Path
        Weights directory. The run is kept in ``<output>.run`` until it is done,
        and is continued from there.
    network : {"fovea", "tl", "dann"}
    recipe : Recipe, optional
        The network's own in `RECIPES` by default, or in `ADAPT` with `adapt`.
    seed : int
    limit : int, optional
        Use only this many stamps of `data`.
    start : str or Path, optional
        Weights of the same network to begin from, instead of random ones. Labels
        keep the mean and standard deviation of these weights.
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
        Whether to use the labels of `real` (supervised). Without, nothing
        depends on them.
    fresh : bool
        Draw the simulated galaxies that train anew in every epoch, by the recipe of
        `data`, whose own stamps then only validate; see `sersicnet.training.on_the_fly`.
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
        If an option or the data cannot be used; nothing is written then.
    """
    output = Path(output)
    run = _prepare(output, overwrite)
    if network not in networks.ARCHITECTURES:
        raise InputError(f"A network is one of {', '.join(networks.ARCHITECTURES)}; received {network}.")
    if adapt is not None and adapt not in ALIGNMENTS:
        raise InputError(f"Adaptation is one of {', '.join(ALIGNMENTS)}; received {adapt}.")
    if (adapt is None) != (real is None):
        raise InputError(
            "Adaptation needs real galaxies, and they are for nothing else: give both --adapt and --real, or neither."
        )
    recipe = recipe or (RECIPES if adapt is None else ADAPT)[network]
    if not 0 < recipe.learning_rate < math.inf:
        raise InputError(f"A learning rate is positive; received {recipe.learning_rate}. Try 0.0005.")
    if not 0 <= recipe.alpha <= 1:
        raise InputError(f"The weight of the regression is from 0 to 1; received {recipe.alpha}. Try 0.9.")
    architecture = networks.ARCHITECTURES[network]
    base = None if start is None else weights.load(start, to_train=True)
    if base is not None and base.card["network"] != network:
        raise InputError(f"{start} is a network {base.card['network']}: give --network {base.card['network']}.")
    if test is not None:
        Dataset(test).close()
    with Dataset(data) as simulated:
        chosen: Dataset | Arrays = simulated
        if limit is not None or recipe.faint_limit < simulated.mag.max():
            chosen = simulated.selected(recipe.faint_limit, limit)
        used = len(chosen)
        train_rows, valid_rows = _split(used)
        source: Source = chosen
        labelled = np.ones(used, bool)
        if real is not None:
            source = Joined(chosen, _bright(real, recipe.faint_limit), train_rows[1], real_labels, seed)
            train_rows, valid_rows, labelled = source.train_rows, source.valid_rows, source.labelled
        encoded = np.where(labelled[:, None], source.targets, 1.0)
        encoded = encode(encoded) if architecture.log else encoded
        if base is None:
            learned = encoded[slice(*train_rows)][labelled[slice(*train_rows)]]
            mean, std = learned.mean(axis=0), learned.std(axis=0)
        else:
            mean, std = np.array(base.card["label_mean"]), np.array(base.card["label_std"])
        keras.utils.set_random_seed(seed)
        core = _core(base) if base is not None else architecture.build()
        if base is not None and recipe.keep_norms:
            _freeze(core, body=False)
        # Unlabelled galaxies weigh nothing, but a NaN would still be one.
        scaling = Scaling(architecture.log, mean, std)
        standardised = np.where(labelled[:, None], scaling(np.where(labelled[:, None], source.targets, 1.0)), 0)
        if adapt is not None:
            model, arguments = _adapting(core, adapt, source.is_real, labelled, recipe)
        else:
            model, arguments = _plain(core, recipe)
        judging = _judging(labelled, source.is_real, valid_rows)
        galaxies = Fresh(simulated, seed, faint_limit=recipe.faint_limit, asarray=_on_accelerator()) if fresh else None
        task = _Task(source, train_rows, valid_rows, model, core, arguments, standardised, judging, scaling, galaxies)
        config = {
            "network": network,
            "recipe": asdict(recipe),
            "seed": seed,
            "data": simulated.sha256(),
            "n": len(source),
            "start": None if base is None else base.sha256,
            "adapt": adapt,
            "real": None if real is None else real.sha256(),
            "real_labels": real_labels,
            "fresh": fresh,
            "backend": keras.backend.backend(),
        }
        with galaxies or nullcontext():
            state = _fit(task, recipe, seed, run, config, overwrite, report)
        scale = _error_scale(core, task) if architecture.spreads else None
        unit_model = networks.with_units(architecture, core, mean, std, error_scale=scale)
        card = {
            **_card_base(output.name, network, core, state, seed, command),
            "summary": _summary(network, used, labelled[source.is_real], real, adapt, base, fresh),
            "errors": scale is not None,
            "calibration": None if scale is None else _calibrated(unit_model, task),
            "recipe": asdict(recipe),
            "label_mean": mean.tolist(),
            "label_std": std.tolist(),
            "domain": _domain(simulated, recipe),
            "data": _data_record(simulated, len(source)),
            "limits": _limits(task, real, errors=scale is not None),
        }
        if base is not None:
            card["base"] = _base_record(base)
        if real is not None:
            card["adaptation"] = {
                "method": adapt,
                "labelled": int(labelled[source.is_real].sum()),
                "data": _real_record(real, len(source) - used, command),
            }
    return _finish(output, run, unit_model, card, test)


def _core(base: weights.Weights) -> keras.Model:
    """The network of some weights, built anew: layers of older files have other names."""
    core = networks.ARCHITECTURES[base.card["network"]].build()
    values = base.keras_model().get_layer("core").get_weights()
    if [v.shape for v in values] != [v.shape for v in core.get_weights()]:
        raise InputError(
            f"{base.path} holds a {base.card['network']} of another version of sersicnet "
            f"({base.card['versions']['sersicnet']}). Train it again."
        )
    core.set_weights(values)
    return core


def _optimizer(recipe: Recipe) -> keras.optimizers.Optimizer:
    return (keras.optimizers.AdamW if recipe.anneal else keras.optimizers.Adam)(recipe.learning_rate)


def _plain(core: keras.Model, recipe: Recipe) -> tuple[keras.Model, Arguments]:
    core.compile(_optimizer(recipe), loss=REGRESSION[core.name], jit_compile=_jit())
    return core, lambda stamps, learned, rows, done: (stamps, learned, None)


def _adapting(
    core: keras.Model,
    adapt: str,
    is_real: np.ndarray,
    labelled: np.ndarray,
    recipe: Recipe,
) -> tuple[keras.Model, Arguments]:
    """Regression and alignment together, as ``alpha * regression + (1 - alpha) * alignment``.

    The regression is a mean over the labelled galaxies of the batch, whatever
    their fraction, so that alpha keeps its meaning. The strength of the
    alignment rises from 0 to 1 over the run (Ganin & Lempitsky 2015): features
    that mean nothing yet are not worth aligning.
    """
    loss: Any = "sparse_categorical_crossentropy"
    if adapt == "dann":
        model, second = networks.with_adversary(core), "domain"
    else:
        outputs = {"means": core.output, "features": core.get_layer("features").output}
        model, second, loss = keras.Model(core.input, outputs), "features", gram_distance
    model.compile(
        _optimizer(recipe),
        loss={"means": REGRESSION[core.name], second: loss},
        loss_weights={"means": recipe.alpha, second: 1 - recipe.alpha},
        jit_compile=_jit(),
    )

    def arguments(stamps: Any, learned: np.ndarray, rows: np.ndarray, done: float) -> tuple[Any, Any, Any]:
        n = len(rows)
        strength = np.full((n, 1), 2 / (1 + math.exp(-10 * done)) - 1, np.float32)
        real = is_real[rows]
        known = labelled[rows].astype(np.float32)
        weight = {"means": known * (n / max(1.0, known.sum())), second: np.ones(n, np.float32)}
        if adapt == "dann":
            return [stamps, strength], {"means": learned, second: real.astype(np.int32)}, weight
        domain = np.column_stack([real.astype(np.float32), strength])
        return stamps, {"means": learned, second: domain}, weight

    return model, arguments


class Joined:
    """Simulated and real galaxies as one source, streamed; half of each training batch is real.

    With equal halves the domain classifier cannot gain by naming the larger
    domain, and there are always enough galaxies of both for a Gram matrix. An
    epoch has as many stamps as both have together; the smaller domain comes
    round more often.

    Rows are numbered: simulated galaxies that train, real ones that train,
    simulated ones that validate, real ones that validate.

    Parameters
    ----------
    simulated : Dataset or Arrays
    real : Dataset or Arrays
    border : int
        First simulated row that validates.
    use_labels : bool
        Whether the labels of `real` count.
    seed : int
        Chooses the real galaxies that validate: a fifth, or none if none is
        labelled, for then they would judge nothing.
    """

    def __init__(
        self, simulated: Dataset | Arrays, real: Dataset | Arrays, border: int, use_labels: bool, seed: int
    ) -> None:
        if len(real) < JUDGES:
            raise DatasetError(f"Adaptation needs at least {JUDGES} real galaxies; received {len(real)}.")
        order = np.random.default_rng(seed).permutation(len(real))
        shuffled = _in_memory(real).taken(order)
        known = np.isfinite(shuffled.targets).all(axis=1) & use_labels
        second = len(real) - (len(real) // 5 if known.any() else 0)
        n = len(simulated)
        self._pieces = [
            (simulated, 0, border),
            (shuffled, 0, second),
            (simulated, border, n),
            (shuffled, second, len(real)),
        ]
        self.train_rows, self.valid_rows = (0, border + second), (border + second, n + len(real))
        self.is_real = np.repeat([False, True, False, True], [high - low for _, low, high in self._pieces])
        self.targets = np.concatenate([source.targets[low:high] for source, low, high in self._pieces])
        self.mag = np.concatenate([source.mag[low:high] for source, low, high in self._pieces])
        self.rows = np.concatenate([source.rows[low:high] for source, low, high in self._pieces])
        self.labelled = np.isfinite(self.targets).all(axis=1) & (use_labels | ~self.is_real)

    def __len__(self) -> int:
        return len(self.targets)

    def batches(
        self, size: int, start: int, stop: int, rng: np.random.Generator | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches of the rows from `start` to `stop`: all in order, or with `rng` at random, half of them real.

        Random ones are of the training set, and all of `size`.
        """
        if rng is None:
            first = 0
            for source, low, high in self._pieces:
                begin, end = max(start, first), min(stop, first + high - low)
                if begin < end:
                    for stamps, rows in source.batches(size, begin - first + low, end - first + low):
                        yield stamps, rows - low + first
                first += high - low
            return
        simulated, real = self._pieces[:2]
        seeds = rng.integers(2**63, size=2)
        halves = [
            _endless(*simulated, size - size // 2, np.random.default_rng(seeds[0])),
            _endless(*real, size // 2, np.random.default_rng(seeds[1])),
        ]
        for _ in range(math.ceil((stop - start) / size)):
            (stamps, rows), (real_stamps, real_rows) = (next(half) for half in halves)
            yield np.concatenate([stamps, real_stamps]), np.concatenate([rows, real_rows + simulated[2]])


def _endless(
    source: Dataset | Arrays, low: int, high: int, size: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Shuffled batches of equal size, pass after pass; a pass leaves out what does not fill a batch."""
    while True:
        for stamps, rows in source.batches(size, low, high, rng):
            if len(rows) == size:
                yield stamps, rows
            elif high - low < size:
                again = np.resize(np.arange(len(rows)), size)
                yield stamps[again], rows[again]


def _bright(real: Dataset | Arrays, faint_limit: float) -> Dataset | Arrays:
    """Without the galaxies that are known to be fainter than a recipe takes."""
    faint = real.mag > faint_limit
    if not faint.any():
        return real
    return _in_memory(real).taken(np.flatnonzero(~faint))


def _in_memory(real: Dataset | Arrays) -> Arrays:
    if isinstance(real, Arrays):
        return real
    return Arrays(real.stamps(0, len(real)), real.targets, real.is_real, real.mag, rows=real.rows, recipe=real.config)


def _kind(real: Dataset | Arrays) -> str:
    """What the galaxies of the other domain are, for the card: only those of an image are real."""
    recipe = real.config if isinstance(real, Dataset) else real.recipe
    if recipe is None:
        return "real"
    return "real-like" if recipe.get("galaxies") == "real-like" else "simulated"


def _real_record(real: Dataset | Arrays, n: int, command: str) -> dict[str, Any]:
    recipe = real.config if isinstance(real, Dataset) else real.recipe
    return {"n": n, "sha256": real.sha256(), "command": recipe["command"] if recipe else command, "config": recipe}


def _judging(labelled: np.ndarray, is_real: np.ndarray, valid_rows: tuple[int, int]) -> np.ndarray:
    """The rows whose validation error chooses the epoch, and which calibrate errors.

    Labelled real ones where there are enough: it is there that the weights are
    to be used, and where an alignment that hurts is seen. Else simulated ones.
    """
    real = labelled & is_real
    return real if real[slice(*valid_rows)].sum() >= JUDGES else labelled & ~is_real


# --- fine-tuning ----------------------------------------------------------------------------


def finetune(
    real: Arrays,
    output: str | Path,
    *,
    base: str | Path = weights.BASE,
    layers: str = "auto",
    recipe: Recipe | None = None,
    seed: int = 0,
    test: str | Path | None = None,
    overwrite: bool = False,
    command: str = "",
    report: Report = _silent,
) -> weights.Weights:
    """Carry weights to real galaxies by training on with their labels.

    Two roads are tried, and the weights with the best validation error are kept:
    ``all`` frees every layer at once; ``head-first`` trains what follows the
    features for a third of the epochs, and then frees every layer at a third of
    the learning rate. What the head alone reached is kept if the rest does not
    improve on it.

    Batch normalisations stay as they are, moments and all: a batch of 8 tells
    too little about them.

    Parameters
    ----------
    real : Arrays
        Stamps and labels; a fifth of them, at random, validates. Galaxies
        without labels (targets that are not finite) are left out, and so, with a
        warning, are those outside of the ranges of `base`.
    output : str or Path
        Weights directory.
    base : str or Path
        Weights to start from.
    layers : {"auto", "all", "head-first"}
        One of the roads, or both.
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
        If something cannot be used; nothing is written then.
    """
    output = Path(output)
    run = _prepare(output, overwrite)
    if layers not in LAYERS:
        raise InputError(f"Layers to train are one of {', '.join(LAYERS)}; received {layers}.")
    if test is not None:
        Dataset(test).close()
    start = weights.load(base, to_train=True)
    network = start.card["network"]
    architecture, recipe = networks.ARCHITECTURES[network], recipe or FINETUNE[network]
    usable = np.isfinite(real.targets).all(axis=1) & ~(real.mag > recipe.faint_limit)
    usable[usable] = _within(start, real.targets[usable])
    n = int(usable.sum())
    if n < 10:
        raise DatasetError(f"Fine-tuning needs at least 10 labelled galaxies; received {n}.")
    mean, std = np.array(start.card["label_mean"]), np.array(start.card["label_std"])
    shuffled = real.taken(np.random.default_rng(seed).permutation(np.flatnonzero(usable)))
    scaling = Scaling(architecture.log, mean, std)
    standardised = scaling(shuffled.targets)
    train_rows, valid_rows = (0, n - n // 5), (n - n // 5, n)
    given = _core(start).get_weights()
    found: dict[str, tuple[dict[str, Any], list[np.ndarray]]] = {}

    def road(name: str, origin: list[np.ndarray], recipe: Recipe, *, body: bool) -> None:
        keras.utils.set_random_seed(seed)
        core = architecture.build()
        core.set_weights(origin)
        _freeze(core, body=not body)
        model, arguments = _plain(core, recipe)
        task = _Task(shuffled, train_rows, valid_rows, model, core, arguments, standardised, np.ones(n, bool), scaling)
        config = {"base": start.sha256, "recipe": asdict(recipe), "seed": seed, "data": real.sha256(), "road": name}
        state = _fit(
            task, recipe, seed, run / name, config, overwrite, lambda progress: report(progress._replace(road=name))
        )
        found[name] = state, core.get_weights()

    if layers in ("auto", "all"):
        road("all", given, recipe, body=True)
    if layers in ("auto", "head-first"):
        road("head", given, replace(recipe, epochs=math.ceil(recipe.epochs / 3)), body=False)
        road("head-first", found["head"][1], replace(recipe, learning_rate=recipe.learning_rate / 3), body=True)
    best = min(found, key=lambda name: found[name][0]["best"])
    state, values = found[best]
    core = architecture.build()
    core.set_weights(values)
    task = _Task(
        shuffled, train_rows, valid_rows, core, core, lambda *_: (None, None, None), standardised, np.ones(n, bool),
        scaling,
    )  # fmt: skip
    scale = _error_scale(core, task) if architecture.spreads else None
    unit_model = networks.with_units(architecture, core, mean, std, error_scale=scale)
    out, rows = _predict(unit_model, shuffled, *valid_rows)
    seconds = sum(state["seconds"] for state, _ in found.values())
    card = {
        **start.card,
        **_card_base(output.name, network, core, {**state, "seconds": seconds}, seed, command),
        "summary": f"`{start.name}` fine-tuned on {n:,} labelled {_kind(real)} galaxies ({_ROADS[best]}).",
        "calibration": None if scale is None else _calibrated(unit_model, task),
        "recipe": asdict(recipe),
        "base": _base_record(start),
        "fine_tuning": {"layers": best, "valid_mae": {name: state["best"] for name, (state, _) in found.items()}},
        "data": _real_record(real, n, command),
        "limits": [
            *([_INVENTED] if real.recipe else []),
            _chosen_by(f"the {n // 5} galaxies", "the epoch and the layers", errors=scale is not None),
        ],
        "scores": {
            "test_set": f"its {n // 5} validation galaxies, which chose the epoch",
            "samples": scores(shuffled.targets[rows], out[:, :N_TARGETS], mag=shuffled.mag[rows]),
        },
    }
    return _finish(output, run, unit_model, card, test)


def _within(base: weights.Weights, targets: np.ndarray) -> np.ndarray:
    """Which targets lie within the ranges of weights, bool, (N,); a warning tells of others."""
    domain = base.card["domain"]
    ranges = np.array([domain["ranges"][name] for name in TARGET_NAMES], float)
    ranges[0] = relative_magnitude(ranges[0], domain["zero_point"], domain["rms"])
    good = (targets >= ranges[:, 0]) & (targets <= ranges[:, 1])
    inside = np.asarray(good.all(axis=1))
    if not inside.all():
        row = int(np.flatnonzero(~inside)[0])
        which = int(np.flatnonzero(~good[row])[0])
        value, (low, high) = targets[row, which], ranges[which]
        warn(
            f"{(~inside).sum()} of {len(targets)} labelled galaxies are left out, since {base.name} does not know such "
            f"ones: the first has {'relative ' * (which == 0)}{TARGET_NAMES[which]} = {value:.4g}, beyond {low:.4g} to "
            f"{high:.4g}."
        )
    return inside


_ROADS = {
    "all": "every layer from the start",
    "head": "the layers behind the features alone",
    "head-first": "the layers behind the features first, then every layer",
}


def _freeze(core: keras.Model, *, body: bool) -> None:
    """Fix batch normalisations, which then run as in prediction; with `body` also all layers before the features."""
    features = core.layers.index(core.get_layer("features"))
    for i, layer in enumerate(core.layers):
        if isinstance(layer, keras.layers.BatchNormalization) or (body and i < features):
            layer.trainable = False


# --- what both share ------------------------------------------------------------------------

_SIMULATED_ERRORS = (
    "Errors are calibrated on simulations; real galaxies are no Sersic profiles, and there they are too small."
)
_LIMITS = (
    "Knows isolated galaxies of a single Sersic profile; bars, arms and neighbours were not shown to it.",
    _SIMULATED_ERRORS,
    "Stars and galaxies smaller than a pixel are outside of its domain.",
)
_INVENTED = "The galaxies of the other domain were invented, by `sersicnet simulate`: no real galaxy was trained on."


def _prepare(output: Path, overwrite: bool) -> Path:
    check_directory(output, weights.SUMS, overwrite)
    return output.with_name(output.name + ".run")


def _split(n: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Nine tenths to train, one to validate; the border on a whole block."""
    border = n * 9 // 10 // BLOCK * BLOCK
    if n < 2 * BLOCK:
        raise DatasetError(f"Training needs at least {2 * BLOCK} stamps; received {n}.")
    return (0, border), (border, n)


def _summary(
    network: str,
    simulated: int,
    labelled: np.ndarray,
    real: Dataset | Arrays | None,
    adapt: str | None,
    base: weights.Weights | None,
    fresh: bool,
) -> str:
    """In a sentence or two; `labelled` marks the galaxies of the other domain whose labels counted."""
    kind = "simulated galaxies, drawn afresh in every epoch" if fresh else "simulated galaxies"
    text = f"Network `{network}` trained on {kind} only."
    if real is not None:
        known = int(labelled.sum())
        labels = {0: "without labels", len(labelled): "with their labels"}.get(known, f"{known:,} of them with labels")
        text = (
            f"Network `{network}` trained on {simulated:,} {kind} and {len(labelled):,} {_kind(real)} ones, {labels}, "
            + {"dann": "against a domain classifier.", "daregram": "with aligned inverse Gram matrices (DARE-GRAM)."}[
                str(adapt)
            ]
        )
    return text if base is None else f"{text} It started from `{base.path.name}`."


def _limits(task: _Task, real: Dataset | Arrays | None, *, errors: bool) -> list[str]:
    """What to know of weights; `errors` tells whether they predict any."""
    if real is None:
        return [limit for limit in _LIMITS if errors or limit != _SIMULATED_ERRORS]
    judges, kind = task.labelled[slice(*task.valid_rows)], _kind(real)
    if task.source.is_real[slice(*task.valid_rows)][judges].any():
        chosen = _chosen_by(f"the {judges.sum()} labelled {kind} galaxies", "the epoch", errors=errors)
    elif errors:
        chosen = (
            "Errors are calibrated on simulations, not on the galaxies that it was adapted to without labels; "
            "nor did these choose the epoch."
        )
    else:
        chosen = "Simulated galaxies chose the epoch, not those that it was adapted to without labels."
    return [*([] if kind == "real" else [_INVENTED]), chosen, _LIMITS[-1]]


def _chosen_by(galaxies: str, what: str, *, errors: bool) -> str:
    if errors:
        return f"Errors are calibrated on {galaxies} that also chose {what}."
    return f"It predicts no errors; {galaxies} that validated chose {what}."


def _error_scale(core: keras.Model, task: _Task) -> np.ndarray:
    """Factors on the predicted deviations that make 68.27 % of the errors fall within one."""
    out, rows = _judged(core, task)
    deviation = np.abs(out[:, :N_TARGETS] - task.standardised[rows]) / np.exp(out[:, N_TARGETS:])
    return np.quantile(deviation, 0.6827, axis=0)


def _calibrated(model: keras.Model, task: _Task) -> dict[str, Any] | None:
    out, rows = _judged(model, task)
    return calibration(task.source.targets[rows], out[:, :N_TARGETS], out[:, N_TARGETS:])


def _judged(model: keras.Model, task: _Task) -> tuple[np.ndarray, np.ndarray]:
    """Outputs of a model for the validation galaxies that count, and their rows."""
    out, rows = _predict(model, task.source, *task.valid_rows)
    return out[task.labelled[rows]], rows[task.labelled[rows]]


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


def _base_record(base: weights.Weights) -> dict[str, Any]:
    """What training began at, so that it can be made again: its own beginning is in there too."""
    kept = ("command", "seed", "base", "data")
    return {"name": base.path.name, "sha256": base.sha256, **{k: base.card[k] for k in kept if k in base.card}}


def _domain(simulated: Dataset, recipe: Recipe) -> dict[str, Any]:
    instrument, prior = simulated.config["instrument"], simulated.config["prior"]
    widths = [psf["fwhm"] for psf in simulated.config.get("psfs", [])] or [simulated.config["psf_fwhm"]]
    scatter = simulated.config.get("psf_scatter", 0.0)
    ranges = {name: list(prior[name]) for name in TARGET_NAMES}
    ranges["mag"][1] = min(ranges["mag"][1], recipe.faint_limit)
    return {
        "instrument": instrument["name"],
        "pixel_scale": instrument["pixel_scale"],
        "zero_point": instrument["zero_point"],
        "psf_fwhm": simulated.config["psf_fwhm"],
        "psf_fwhm_range": [min(widths) * (1 - scatter), max(widths) * (1 + scatter)],
        "rms": [instrument["rms_low"], instrument["rms_high"] * math.hypot(1, recipe.noise)],
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
    """Their names, such as the model of a GPU where the backend tells it."""
    if keras.backend.backend() == "torch":
        import torch

        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if keras.backend.backend() == "jax":
        import jax

        return [device.device_kind for device in jax.devices() if device.platform != "cpu"]
    return [d for d in keras.distribution.list_devices() if not d.startswith("cpu")]


def _on_accelerator() -> Callable[[np.ndarray], Any] | None:
    """What moves arrays to the accelerator that the backend trains on; None without one, or with TensorFlow."""
    if not _accelerators() or keras.backend.backend() == "tensorflow":
        return None
    if keras.backend.backend() == "torch":
        import torch

        return lambda values: torch.asarray(values, device="cuda")
    import jax.numpy

    return jax.numpy.asarray


def device() -> str:
    """The device that training runs on, in words."""
    return ", ".join(_accelerators()) or f"{os.cpu_count()} CPU cores, no GPU"


def estimate(network: str, stamps_per_second: float, seconds: float) -> str:
    """How long an epoch takes, and by arithmetic on a GPU if there is none, in words."""
    operations = 6 * networks.multiply_adds(networks.ARCHITECTURES[network].build())  # there, and twice back
    speed = stamps_per_second * operations
    text = f"about {seconds:.0f} s an epoch ({stamps_per_second:.0f} stamps/s, {speed / 1e9:.0f} GFLOP/s)"
    if _accelerators() or not speed < 1e12:
        return text
    return f"{text}; a GPU that does 1 TFLOP/s on this network would take {seconds * speed / 1e12:.0f} s (not measured)"


@contextmanager
def tensorboard(directory: str | Path | None) -> Iterator[Report]:
    """What writes the record of each epoch for TensorBoard; nothing for None.

    Raises
    ------
    InputError
        If the package is not installed, or the directory cannot be written.
    """
    if directory is None:
        yield _silent
        return
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise InputError(
            f"--tensorboard needs the package tensorboard ({error}). Run `pip install tensorboard`; "
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
        if progress.road not in writers:
            writers[progress.road] = EventFileWriter(str(Path(directory) / progress.road))
        values = [
            Summary.Value(tag=tag, simple_value=value) for tag, value in progress.record.items() if tag != "epoch"
        ]
        event = Event(step=progress.epoch, wall_time=time.time(), summary=Summary(value=values))
        writers[progress.road].add_event(event)
        writers[progress.road].flush()

    try:
        yield write
    finally:
        for writer in writers.values():
            writer.close()


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
