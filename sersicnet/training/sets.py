"""Several training sets as one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from sersicnet.dataset import BLOCK, Arrays, Dataset, gathered, streamed
from sersicnet.errors import DatasetError
from sersicnet.schema import Inputs


class Sets:
    """Training sets of one kind, opened for reading as one; a context manager.

    Rows are numbered: the first nine tenths of each set, which train, then the last tenth of each, which validates.

    Parameters
    ----------
    paths : sequence of str or Path
        Files made by `sersicnet simulate`.

    Attributes
    ----------
    truth, targets, orientation, mag, is_real, rows
        As those of `sersicnet.dataset.Dataset`; `rows` are those of the files, and `truth` has the columns that all
        of them have.
    config, versions : dict
        Of the first set, with the commands of all.
    border : int
        The first row that validates.

    Raises
    ------
    DatasetError
        If a file is no training set or is given twice, or they are of different kinds: of one telescope and of many,
        or with other pixels, zero points or PSFs.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        files = [Path(path).resolve() for path in paths]
        if again := [file.name for file in files if files.count(file) > 1]:
            raise DatasetError(f"Each training set is given once; received {again[0]} twice. Leave one out.")
        self._sets: list[Dataset] = []
        try:
            for path in paths:
                self._sets.append(Dataset(path))
                _check_alike(self._sets[0], self._sets[-1])
        except BaseException:
            self.close()
            raise
        borders = [border(len(one)) for one in self._sets]
        self._pieces = [(one, 0, middle) for one, middle in zip(self._sets, borders, strict=True)]
        self.border = sum(borders)
        self._pieces += [(one, middle, len(one)) for one, middle in zip(self._sets, borders, strict=True)]
        self._firsts = np.cumsum([0, *(high - low for _, low, high in self._pieces)])
        first = self._sets[0]
        self.zero_point, self.pixel_scale, self.versions = first.zero_point, first.pixel_scale, first.versions
        commands = "` and `".join(one.config["command"] for one in self._sets)
        self.config = {**first.config, "command": commands}
        self.config["neighbours"] = any(one.config.get("neighbours") for one in self._sets)
        kinds = {one.config.get("galaxies", "sersic") for one in self._sets}
        self.config["galaxies"] = kinds.pop() if len(kinds) == 1 else "both"
        names = [name for name in first.truth if all(name in one.truth for one in self._sets)]
        self.truth = {name: self._of_all([one.truth[name] for one in self._sets]) for name in names}
        self.views = None
        if first.views is not None:
            every = [one.views for one in self._sets if one.views is not None]
            self.views = np.concatenate(every)
            if "psf" in self.truth:
                before = np.cumsum([0, *(len(views) for views in every)])
                self.truth["psf"] = self._of_all(
                    [one.truth["psf"] + k for one, k in zip(self._sets, before, strict=False)]
                )
        self.mag = self.truth["mag"]
        self.is_real = np.zeros(len(self.mag), bool)
        self.rows = self._of_all([one.rows for one in self._sets])
        self.targets = self._of_all([one.targets for one in self._sets])
        self.orientation = self._of_all([one.orientation for one in self._sets])

    def _of_all(self, values: list[np.ndarray]) -> np.ndarray:
        """Values of the sets, in the order of the rows."""
        own = {id(one): value for one, value in zip(self._sets, values, strict=True)}
        return np.concatenate([own[id(one)][low:high] for one, low, high in self._pieces])

    def __repr__(self) -> str:
        return f"<Sets {', '.join(str(one.path) for one in self._sets)}: {len(self):,} galaxies>"

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __enter__(self) -> Sets:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for one in self._sets:
            one.close()

    def inputs(self, start: int, stop: int) -> Inputs:
        """What networks are shown of the galaxies from `start` to `stop`. Threads may share it."""
        parts = [
            one.inputs(low + max(start - first, 0), low + min(stop - first, high - low))
            for (one, low, high), first in zip(self._pieces, self._firsts[:-1].tolist(), strict=True)
            if start < first + high - low and first < stop
        ]
        return Inputs.concatenated(parts) if parts else self._sets[0].inputs(0, 0)

    def batches(
        self, size: int, start: int, stop: int, rng: np.random.Generator | None = None
    ) -> Iterator[tuple[Inputs, np.ndarray]]:
        """Stream inputs; see `sersicnet.dataset.streamed`."""
        return streamed(self, size, start, stop, rng)

    def selected(self, faint_limit: float, limit: int | None) -> Arrays:
        """Galaxies brighter than `faint_limit`, at most `limit`, evenly from all sets, in memory."""
        rows = np.flatnonzero(self.mag <= faint_limit)
        if not len(rows):
            raise DatasetError(f"{self!r} hold no galaxy brighter than mag {faint_limit:g}.")
        if limit is not None and limit < len(rows):
            rows = rows[np.linspace(0, len(rows) - 1, limit).astype(int)]
        return Arrays(
            gathered(self, rows), self.targets[rows], np.zeros(len(rows), bool), self.mag[rows],
            rows=self.rows[rows], recipe=self.config, orientation=self.orientation[rows],
        )  # fmt: skip

    def sha256(self) -> str:
        """Hash of the hashes of all sets, in their order."""
        return hashlib.sha256("".join(one.sha256() for one in self._sets).encode()).hexdigest()


def border(n: int) -> int:
    """The first of `n` rows that validates: nine tenths train; on the border of a whole block.

    Raises
    ------
    DatasetError
        If there are too few rows.
    """
    if n < 2 * BLOCK:
        raise DatasetError(f"Training needs at least {2 * BLOCK} stamps; received {n}.")
    return n * 9 // 10 // BLOCK * BLOCK


def _check_alike(first: Dataset, other: Dataset) -> None:
    """Refuse a set of another kind than the first."""

    def kind(one: Dataset) -> dict[str, Any]:
        views = None if one.views is None or one.config.get("telescopes") else one.views.tobytes()
        return {
            "telescopes": bool(one.config.get("telescopes")),
            "pixel scales": one.pixel_scale,
            "zero points": one.zero_point,
            "PSFs": views,
        }

    mine, theirs = kind(first), kind(other)
    differ = [name for name in mine if mine[name] != theirs[name]]
    if differ:
        raise DatasetError(
            f"Training sets that are used together are of one kind; {first.path} and {other.path} have different "
            f"{' and '.join(differ)}. Train on them one after the other, with `start`."
        )
