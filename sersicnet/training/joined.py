"""Simulated and real galaxies as one source of training batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, Union

import numpy as np

from sersicnet.dataset import Arrays, Dataset
from sersicnet.errors import DatasetError
from sersicnet.schema import Inputs
from sersicnet.training.sets import Sets

Source = Union[Dataset, Sets, Arrays, "Joined"]


JUDGES = 10
"""Fewest labelled real galaxies in the validation set that choose the epoch; with fewer, simulated galaxies do."""


class Examples(NamedTuple):
    """The galaxies of a run: those that train, those that validate, and whose labels count."""

    source: Source
    train_rows: tuple[int, int]
    valid_rows: tuple[int, int]
    labelled: np.ndarray


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
    simulated : Dataset, Sets or Arrays
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
        self, simulated: Dataset | Sets | Arrays, real: Dataset | Arrays, border: int, use_labels: bool, seed: int
    ) -> None:
        if len(real) < JUDGES:
            raise DatasetError(f"Adaptation needs at least {JUDGES} real galaxies; received {len(real)}.")
        order = np.random.default_rng(seed).permutation(len(real))
        shuffled = in_memory(real).taken(order)
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
        self.orientation = np.concatenate([source.orientation[low:high] for source, low, high in self._pieces])
        self.mag = np.concatenate([source.mag[low:high] for source, low, high in self._pieces])
        self.rows = np.concatenate([source.rows[low:high] for source, low, high in self._pieces])
        self.labelled = np.isfinite(self.targets).all(axis=1) & (use_labels | ~self.is_real)

    def __len__(self) -> int:
        return len(self.targets)

    def batches(
        self, size: int, start: int, stop: int, rng: np.random.Generator | None = None
    ) -> Iterator[tuple[Inputs, np.ndarray]]:
        """Batches of the rows from `start` to `stop`: all in order, or with `rng` at random, half of them real.

        Random ones are of the training set, and all of `size`.
        """
        if rng is None:
            first = 0
            for source, low, high in self._pieces:
                begin, end = max(start, first), min(stop, first + high - low)
                if begin < end:
                    for inputs, rows in source.batches(size, begin - first + low, end - first + low):
                        yield inputs, rows - low + first
                first += high - low
            return
        simulated, real = self._pieces[:2]
        seeds = rng.integers(2**63, size=2)
        halves = [
            _endless(*simulated, size - size // 2, np.random.default_rng(seeds[0])),
            _endless(*real, size // 2, np.random.default_rng(seeds[1])),
        ]
        for _ in range(math.ceil((stop - start) / size)):
            (inputs, rows), (real_inputs, real_rows) = (next(half) for half in halves)
            yield Inputs.concatenated([inputs, real_inputs]), np.concatenate([rows, real_rows + simulated[2]])


def _endless(
    source: Dataset | Sets | Arrays, low: int, high: int, size: int, rng: np.random.Generator
) -> Iterator[tuple[Inputs, np.ndarray]]:
    """Shuffled batches of equal size, pass after pass; a pass leaves out what does not fill a batch."""
    while True:
        for inputs, rows in source.batches(size, low, high, rng):
            if len(rows) == size:
                yield inputs, rows
            elif high - low < size:
                again = np.resize(np.arange(len(rows)), size)
                yield inputs.taken(again), rows[again]


def bright(real: Dataset | Arrays, faint_limit: float) -> Dataset | Arrays:
    """Without the galaxies that are known to be fainter than a recipe takes."""
    faint = real.mag > faint_limit
    if not faint.any():
        return real
    return in_memory(real).taken(np.flatnonzero(~faint))


def in_memory(real: Dataset | Arrays) -> Arrays:
    """All galaxies of a dataset, in memory."""
    if isinstance(real, Arrays):
        return real
    return Arrays(
        real.inputs(0, len(real)), real.targets, real.is_real, real.mag,
        rows=real.rows, recipe=real.config, orientation=real.orientation,
    )  # fmt: skip


def judging_rows(labelled: np.ndarray, is_real: np.ndarray, valid_rows: tuple[int, int]) -> np.ndarray:
    """The rows whose validation error chooses the epoch, and which calibrate errors.

    Labelled real galaxies if there are enough: the weights will be used on real galaxies, and
    only their labels show whether an alignment hurts. Simulated galaxies otherwise.
    """
    real = labelled & is_real
    return real if real[slice(*valid_rows)].sum() >= JUDGES else labelled & ~is_real
