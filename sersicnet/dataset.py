"""Training sets on disk: one HDF5 file of stamps with their truth.

Stamps are stored as integers in units of a sixteenth of their own noise, which
is a third of the size of floats once compressed, and adds a noise of 0.02 rms.

Layout of the file, schema version 1::

    stamps    int32   (N, 128, 128)  pixel = stamps * quantum, image units
    quantum   float32 (N,)
    truth/*   float64 (N,)           mag, r_eff_pix, sersic_n, ellipticity, theta, x, y, rms, ...
                                     further columns, such as status, where an option needs them
    psf       float32 (K, P, P)      effective PSFs that they were drawn with (not in older files)
    psf_views float32 (K, 4, 32, 32) or what networks are shown of many PSFs, see `sersicnet.image.views`;
                                     truth/psf is the number of the PSF of each stamp
    attributes: schema_version, kind, config (JSON), versions (JSON), zero_point, pixel_scale
"""

from __future__ import annotations

import functools
import hashlib
import json
import mmap
import zlib
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import h5py
import numpy as np

from sersicnet.errors import DatasetError, first_line
from sersicnet.schema import (
    INPUT_SHAPES,
    SCHEMA_VERSION,
    STAMP_SIZE,
    TARGET_NAMES,
    Inputs,
    noise_numbers,
    orientation,
    relative_magnitude,
)
from sersicnet.workers import cores

BLOCK = 16
"""Stamps that are compressed, and read, together."""

QUANTA_PER_RMS = 16

TRUTH_COLUMNS = (*TARGET_NAMES, "theta", "x", "y", "rms")


class _PartError(Exception):
    """A part of a dataset is missing, or is not what it should be."""


_MOST_PACKED = 1100
"""Times that a file may be smaller than what it holds: deflate reaches 1032."""


def _part(file: h5py.File, name: str, shape: tuple[int | None, ...]) -> h5py.Dataset:
    """A dataset of numbers of a file, checked before it is read."""
    try:
        part = file[name]
    except KeyError:
        raise _PartError(f"it has no {name}") from None
    wanted = " x ".join("N" if side is None else str(side) for side in shape)
    if not isinstance(part, h5py.Dataset) or part.dtype.kind not in "biuf":
        raise _PartError(f"{name} does not hold numbers")
    if len(part.shape) != len(shape) or any(
        side not in (None, found) for side, found in zip(shape, part.shape, strict=True)
    ):
        raise _PartError(f"{name} has the shape {' x '.join(map(str, part.shape)) or 'of one number'}, not {wanted}")
    if part.nbytes > _MOST_PACKED * Path(file.filename).stat().st_size:
        raise _PartError(f"{name} claims {part.nbytes / 1e9:,.0f} GB, which the file is too small to hold")
    return part


def _columns(file: h5py.File) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The truth and the quanta of a file, all for as many galaxies as it has stamps."""
    n = len(_part(file, "stamps", (None, STAMP_SIZE, STAMP_SIZE)))
    if not isinstance(file.get("truth"), h5py.Group):
        raise _PartError("it has no truth")
    names = dict.fromkeys((*TRUTH_COLUMNS, *file["truth"]))
    truth = {name: _part(file, f"truth/{name}", (n,))[:] for name in names}
    if n == 0:
        raise _PartError("it has no stamps")
    if "psf" in file:
        _part(file, "psf", (None, None, None))
    if "psf_views" in file:
        _part(file, "psf_views", (None, *INPUT_SHAPES.psf))
    return {name: truth[name] for name in file["truth"]}, _part(file, "quantum", (n,))[:]


class _Described(dict[str, Any]):
    """Names and values of an attribute; one that is missing is an error of the dataset."""

    def __missing__(self, key: str) -> Any:
        raise DatasetError(f"The dataset does not describe how it was made: it has no {key}. Simulate it again.")


def _described(file: h5py.File, name: str) -> _Described:
    """An attribute that holds names and values as JSON."""
    try:
        found = json.loads(file.attrs[name], object_hook=_Described)
    except KeyError:
        raise _PartError(f"it has no attribute {name}") from None
    except (TypeError, ValueError):
        found = None
    if not isinstance(found, _Described):
        raise _PartError(f"its attribute {name} is not what a simulation writes")
    return found


def _number(file: h5py.File, name: str) -> float:
    """An attribute that is a number."""
    try:
        return float(file.attrs[name])
    except KeyError:
        raise _PartError(f"it has no attribute {name}") from None
    except (TypeError, ValueError):
        raise _PartError(f"its attribute {name} is not a number") from None


class Dataset:
    """A training set opened for reading; a context manager.

    Parameters
    ----------
    path : str or Path
        File made by `sersicnet simulate`.
    every : bool
        Whether to keep galaxies whose truth is not to be trusted: those with
        a ``status`` other than 0, where the file has that column. They are left
        out by default, and rows are counted without them.

    Attributes
    ----------
    truth : dict of ndarray, float64, (N,)
        Every truth column.
    targets : ndarray, float64, (N, 4)
        Relative magnitude, effective radius [pix], Sersic index, ellipticity.
    orientation : ndarray, float64, (N, 2)
        Components of the ellipticity, see `sersicnet.schema.orientation`.
    mag : ndarray, float64, (N,)
        AB magnitudes.
    is_real : ndarray, bool, (N,)
        False throughout.
    rows : ndarray, int, (N,)
        Row numbers in the file.
    config, versions : dict
        How the stamps were made, and with which packages.

    Raises
    ------
    DatasetError
        If the file is missing, not HDF5, of another schema, lacks a part, or is without
        a galaxy to be trusted.
    """

    def __init__(self, path: str | Path, *, every: bool = False) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DatasetError(f"A dataset is a file made by `sersicnet simulate`; there is none at {path}.")
        if not h5py.is_hdf5(self.path):
            raise DatasetError(
                f"{path} is not a complete HDF5 file, as `sersicnet simulate` writes. Give such a file, or simulate it "
                "again."
            )
        try:
            self._file = h5py.File(self.path, "r")
        except OSError as error:
            raise DatasetError(f"{path} is not a complete HDF5 file ({error}). Simulate it again.") from error
        found = self._file.attrs.get("schema_version")
        if not np.array_equal(found, SCHEMA_VERSION):
            self._file.close()
            raise DatasetError(
                f"{path} has dataset schema {found}, this version reads {SCHEMA_VERSION}. Simulate it again."
            )
        try:
            self.truth, self._quantum = _columns(self._file)
            self.config, self.versions = (_described(self._file, name) for name in ("config", "versions"))
            self.zero_point, self.pixel_scale = (_number(self._file, name) for name in ("zero_point", "pixel_scale"))
            self._blocks = self._find_blocks()
        except (_PartError, OSError, KeyError, RuntimeError) as error:
            self._file.close()
            raise DatasetError(
                f"{path} is not a complete dataset: {first_line(error)}. Simulate it again, or copy it whole."
            ) from error
        with self.path.open("rb") as file:
            self._bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self._rows: np.ndarray | None = None
        if not every and "status" in self.truth and self.truth["status"].any():
            self._rows = np.flatnonzero(self.truth["status"] == 0)
            if not len(self._rows):
                self._file.close()
                raise DatasetError(f"{path} has no galaxy with status 0: none of its labels can be trusted.")
            self._quantum = self._quantum[self._rows]
            self.truth = {name: column[self._rows] for name, column in self.truth.items()}
        self.rows = np.arange(len(self._quantum)) if self._rows is None else self._rows
        scale = self._quantum / self.truth["rms"]
        bad = np.flatnonzero(~(np.isfinite(scale) & (scale > 0)))
        if len(bad):
            self._file.close()
            raise DatasetError(
                f"{path}, row {self.rows[bad[0]]}: quantum {self._quantum[bad[0]]:g} and rms "
                f"{self.truth['rms'][bad[0]]:g} make no finite stamp, and {len(bad) - 1} other rows "
                "are like it. Simulate it again."
            )
        self.mag = self.truth["mag"]
        self.is_real = np.zeros(len(self._quantum), bool)
        self.targets = np.stack([self.truth[name] for name in TARGET_NAMES], axis=1)
        self.targets[:, 0] = relative_magnitude(self.truth["mag"], self.zero_point, self.truth["rms"])
        self.orientation = orientation(self.truth["ellipticity"], self.truth["theta"])

    def __repr__(self) -> str:
        return f"<Dataset {self.path}: {len(self.mag):,} galaxies>"

    def __len__(self) -> int:
        return len(self._quantum)

    def __enter__(self) -> Dataset:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._bytes = memoryview(b"")

    def stamps(self, start: int, stop: int) -> np.ndarray:
        """Stamps in units of their noise rms, float32, (stop - start, 128, 128). Threads may share it."""
        rows = slice(start, stop)
        if self._rows is None:
            stamps = self._stored(*rows.indices(len(self))[:2]).astype(np.float32)
        else:
            inside = self._rows[rows]
            first = int(inside[0]) if len(inside) else 0
            last = int(inside[-1]) + 1 if len(inside) else 0
            stamps = self._stored(first, last)[inside - first].astype(np.float32)
        stamps *= (self._quantum[rows] / self.truth["rms"][rows]).astype(np.float32)[:, None, None]
        return stamps

    def inputs(self, start: int, stop: int) -> Inputs:
        """What networks are shown of the galaxies from `start` to `stop`. Threads may share it.

        Older files, which hold no PSF, have stamps alone.
        """
        rows = slice(start, stop)
        psf = None if self.views is None else self.views[self._psf_numbers[rows]]
        return Inputs(self.stamps(start, stop), psf, None if self._noise is None else self._noise[rows])

    @functools.cached_property
    def views(self) -> np.ndarray | None:
        """Views of all PSFs, float32, (K, 4, 32, 32)."""
        if "psf_views" in self._file:
            return np.asarray(self._file["psf_views"])
        if (images := self.psf) is None:
            return None
        from sersicnet.image.views import psf_views

        return np.array([psf_views(image) for image in images])

    @functools.cached_property
    def _psf_numbers(self) -> np.ndarray:
        """Which PSF each stamp was drawn with, int, (N,)."""
        if "psf" in self.truth:
            return self.truth["psf"].astype(int)
        if "psf_stretch" in self.truth and self.views is not None and len(self.views) > 1:
            most, n = self.config["psf_scatter"], len(self.views) - 1
            return np.rint((self.truth["psf_stretch"] - 1 + most) / (2 * most) * n).astype(int)
        return np.zeros(len(self), int)

    @functools.cached_property
    def _noise(self) -> np.ndarray | None:
        """What networks are shown of the noise, float32, (N, 3)."""
        if "electrons" in self.truth:
            return noise_numbers(self.truth["correlation"], self.truth["electrons"])
        instrument = self.config.get("instrument") or {}
        if not {"exposure", "noise_tap"} <= instrument.keys():
            return None
        tap, passes = instrument["noise_tap"], instrument.get("noise_passes", 1)
        kernel = functools.reduce(np.convolve, [np.array([tap, 1.0, tap]) / (1 + 2 * tap)] * passes)
        return noise_numbers(1 / (kernel**2).sum(), instrument["exposure"] * self.truth["rms"])

    def _stored(self, first: int, last: int) -> np.ndarray:
        """Rows of the file, int32, (last - first, 128, 128).

        What HDF5's deflate and shuffle filters would undo is undone here: in less than half of
        the time, and on as many cores as ask. The bytes are read past HDF5, which is not safe
        among threads.
        """
        if self._blocks is None:
            return np.asarray(self._file["stamps"][first:last])
        out = np.empty((max(0, last - first), STAMP_SIZE, STAMP_SIZE), dtype="<i4")
        by_byte = out.view(np.uint8).reshape(*out.shape, 4)
        for block in range(first // BLOCK * BLOCK, last, BLOCK):
            start, size = self._blocks[block // BLOCK].tolist()
            try:
                bytes_ = zlib.decompress(self._bytes[start : start + size])
                planes = np.frombuffer(bytes_, np.uint8).reshape(4, BLOCK, STAMP_SIZE, STAMP_SIZE)
            except (ValueError, zlib.error) as error:
                raise DatasetError(
                    f"{self.path} is damaged: the stamps from row {block} cannot be read ({error}). Simulate it again."
                ) from error
            low, high = max(first, block), min(last, block + BLOCK)
            for i, plane in enumerate(planes):
                by_byte[low - first : high - first, ..., i] = plane[low - block : high - block]
        return out

    def _find_blocks(self) -> np.ndarray | None:
        """Where the compressed blocks lie in the file, and their sizes, (blocks, 2); None if it has others."""
        stored = self._file["stamps"]
        kind = stored.chunks, stored.shuffle, stored.compression, stored.dtype.str
        if kind != ((BLOCK, STAMP_SIZE, STAMP_SIZE), True, "gzip", "<i4"):
            return None
        blocks = np.zeros((-(-len(stored) // BLOCK), 2), int)

        def note(block: Any) -> None:
            blocks[block.chunk_offset[0] // BLOCK] = block.byte_offset, block.size

        stored.id.chunk_iter(note)
        return blocks

    @property
    def psf(self) -> np.ndarray | None:
        """The effective PSFs that stamps were drawn with, float32, (K, P, P); None for older files."""
        return self._file["psf"][:] if "psf" in self._file else None

    def batches(
        self, size: int, start: int, stop: int, rng: np.random.Generator | None = None
    ) -> Iterator[tuple[Inputs, np.ndarray]]:
        """Stream inputs; see `streamed`."""
        return streamed(self, size, start, stop, rng)

    def selected(self, faint_limit: float, limit: int | None) -> Arrays:
        """The first `limit` galaxies brighter than `faint_limit`, in memory."""
        rows = np.flatnonzero(self.truth["mag"] <= faint_limit)[:limit]
        if not len(rows):
            raise DatasetError(f"{self.path} holds no galaxy brighter than mag {faint_limit:g}.")
        return Arrays(
            gathered(self, rows),
            self.targets[rows],
            np.zeros(len(rows), bool),
            self.truth["mag"][rows],
            rows=self.rows[rows],
            recipe=self.config,
            orientation=self.orientation[rows],
        )

    def sha256(self) -> str:
        """Hash of recipe, truth and quanta, which name the stamps: same recipe, same hash."""
        recipe = {name: value for name, value in self.config.items() if name != "command"}
        digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
        digest.update(self._quantum.tobytes())
        for name in TRUTH_COLUMNS:
            digest.update(self.truth[name].tobytes())
        return digest.hexdigest()


class Arrays:
    """Inputs and targets held in memory: real galaxies, or a selection.

    Parameters
    ----------
    inputs : Inputs
    targets : ndarray, float64, (N, 4)
        Relative magnitude, effective radius [pix], Sersic index, ellipticity.
    is_real : ndarray, bool, (N,)
    mag : ndarray, float, (N,)
        AB magnitudes.
    snr : ndarray, float, (N,), optional
        Signal to noise, if the table of labels has it.
    rows : ndarray, int, (N,), optional
        Where they stood in the set that they were taken from.
    recipe : dict, optional
        `Dataset.config` of the set that they are from; None for those of an image.
    orientation : ndarray, float, (N, 2), optional
        Components of the ellipticity, see `sersicnet.schema.orientation`; NaN, the default, where they are not known.
    """

    def __init__(
        self,
        inputs: Inputs,
        targets: np.ndarray,
        is_real: np.ndarray,
        mag: np.ndarray,
        snr: np.ndarray | None = None,
        rows: np.ndarray | None = None,
        recipe: dict[str, Any] | None = None,
        orientation: np.ndarray | None = None,
    ) -> None:
        self.targets, self.is_real, self.mag, self.snr, self.recipe = targets, is_real, mag, snr, recipe
        self.orientation = np.full((inputs.n, 2), np.nan) if orientation is None else orientation
        self.rows = np.arange(inputs.n) if rows is None else rows
        self._inputs = inputs

    def __len__(self) -> int:
        return self._inputs.n

    def inputs(self, start: int, stop: int) -> Inputs:
        """What networks are shown of the galaxies from `start` to `stop`."""
        return self._inputs.taken(slice(start, stop))

    def taken(self, rows: np.ndarray) -> Arrays:
        """Some rows, in the order given."""
        snr = None if self.snr is None else self.snr[rows]
        return Arrays(
            self._inputs.taken(rows),
            self.targets[rows],
            self.is_real[rows],
            self.mag[rows],
            snr,
            self.rows[rows],
            self.recipe,
            self.orientation[rows],
        )

    def batches(
        self, size: int, start: int, stop: int, rng: np.random.Generator | None = None
    ) -> Iterator[tuple[Inputs, np.ndarray]]:
        """Stream inputs; see `streamed`."""
        return streamed(self, size, start, stop, rng)

    def sha256(self) -> str:
        """Hash of inputs and targets."""
        digest = hashlib.sha256()
        for values in (*self._inputs, self.targets):
            if values is not None:
                digest.update(values.tobytes())
        return digest.hexdigest()


class Readable(Protocol):
    """What `streamed` reads: a training set, several, or arrays."""

    def inputs(self, start: int, stop: int) -> Inputs:
        """What networks are shown of the galaxies from `start` to `stop`; threads share it."""
        ...


def check_shown(galaxies: Readable, wanted: Collection[str], network: str) -> None:
    """Refuse galaxies without an input that a network is shown, such as those of sets that hold no PSF.

    Parameters
    ----------
    galaxies : Readable
    wanted : collection of str
        Fields of `Inputs`.
    network : str
        Its name, for the message.

    Raises
    ------
    DatasetError
    """
    known = galaxies.inputs(0, 0)
    missing = [name for name in sorted(wanted) if getattr(known, name) is None]
    if missing:
        kinds = "the real galaxies" if isinstance(galaxies, Arrays) else "the training sets"
        what = f"those of {galaxies.path}" if isinstance(galaxies, Dataset) else kinds
        raise DatasetError(
            f"The network {network} is shown the {' and '.join(missing)} of galaxies, which {what} do not hold. "
            "Simulate them again, or choose a network that is shown stamps alone."
        )


def streamed(
    source: Readable,
    size: int,
    start: int,
    stop: int,
    rng: np.random.Generator | None,
    pool_blocks: int = 64,
) -> Iterator[tuple[Inputs, np.ndarray]]:
    """Stream inputs and their indices without holding the source in memory.

    Parameters
    ----------
    source : Readable
    size : int
        Stamps a batch; the last may be smaller.
    start, stop : int
        Rows to take; `start` on the border of a block of a dataset.
    rng : numpy Generator, optional
        Shuffles the blocks, and the stamps within every `pool_blocks` of them.
        Without it the order is that of the file.
    pool_blocks : int
        Blocks in memory at a time.

    Yields
    ------
    inputs : Inputs
        Of `size` galaxies.
    indices : ndarray, int, (size,)
    """
    firsts = np.arange(start, stop, BLOCK)
    if rng is not None:
        rng.shuffle(firsts)
    # One buffer throughout: pages that are new take longer to get than to fill.
    room = min(stop - start, pool_blocks * BLOCK + size)
    buffer = Inputs.empty(max(0, room), like=source.inputs(0, 0))
    left = np.empty(0, int)
    with _threads() as threads:
        for pool_start in range(0, len(firsts), pool_blocks):
            pool = [(int(f), min(int(f) + BLOCK, stop)) for f in firsts[pool_start : pool_start + pool_blocks]]
            indices = np.concatenate([left, *(np.arange(*rows) for rows in pool)])
            _fill(threads, source, pool, buffer.taken(slice(len(left), len(indices))))
            order = np.arange(len(indices)) if rng is None else rng.permutation(len(indices))
            last_pool = pool_start + pool_blocks >= len(firsts)
            whole = len(indices) if last_pool else len(indices) // size * size
            for i in range(0, whole, size):
                pick = order[i : min(i + size, whole)]
                yield buffer.taken(pick), indices[pick]
            rest = order[whole:]
            left = indices[rest]
            buffer.put(slice(0, len(rest)), buffer.taken(rest))


def gathered(source: Readable, rows: np.ndarray) -> Inputs:
    """Inputs of some rows of a source, sorted, int, (N,) with N > 0, in memory; each block is read once."""
    inputs = Inputs.empty(len(rows), like=source.inputs(0, 0))
    end = int(rows[-1]) + 1
    blocks = [(first, min(first + BLOCK, end)) for first in range(0, end, BLOCK)]
    places = np.searchsorted(rows, blocks)
    wanted = [rows[low:high] - first for (low, high), (first, _) in zip(places, blocks, strict=True)]
    with _threads() as threads:
        _fill(threads, source, blocks, inputs, wanted)
    return inputs


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, cores()))


def _fill(
    threads: ThreadPoolExecutor,
    source: Readable,
    blocks: Sequence[tuple[int, int]],
    out: Inputs,
    wanted: Sequence[np.ndarray] | None = None,
) -> None:
    """Read blocks of rows, one behind the other, into `out`; of each the rows that are wanted, from 0."""
    lengths = [high - low for low, high in blocks] if wanted is None else [len(rows) for rows in wanted]
    ends = np.cumsum(lengths)

    def read(i: int) -> None:
        if lengths[i]:
            inputs = source.inputs(*blocks[i])
            out.put(slice(ends[i] - lengths[i], ends[i]), inputs if wanted is None else inputs.taken(wanted[i]))

    list(threads.map(read, range(len(blocks))))
