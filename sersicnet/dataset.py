"""Training sets on disk: one HDF5 file of stamps with their truth.

Stamps are stored as integers in units of a sixteenth of their own noise, which
is a third of the size of floats once compressed, and adds a noise of 0.02 rms.

Layout of the file, schema version 1::

    stamps    int32   (N, 128, 128)  pixel = stamps * quantum, image units
    quantum   float32 (N,)
    truth/*   float64 (N,)           mag, r_eff_pix, sersic_n, ellipticity, theta, x, y, rms, ...
                                     further columns, such as status, where an option needs them
    psf       float32 (K, P, P)      effective PSFs that they were drawn with (not in older files)
    attributes: schema_version, kind, config (JSON), versions (JSON), zero_point, pixel_scale
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import h5py
import numpy as np

from sersicnet.errors import DatasetError, first_line
from sersicnet.output import Run, whole
from sersicnet.schema import SCHEMA_VERSION, STAMP_SIZE, TARGET_NAMES, Inputs, relative_magnitude
from sersicnet.workers import cores

BLOCK = 16
"""Stamps that are compressed, and read, together."""

QUANTA_PER_RMS = 16

TRUTH_COLUMNS = (*TARGET_NAMES, "theta", "x", "y", "rms")
_COMPRESSION_LEVEL = 2


class Block(NamedTuple):
    """Up to `BLOCK` consecutive stamps, compressed, and their truth."""

    first: int
    payload: bytes
    quantum: np.ndarray
    truth: dict[str, np.ndarray]


def pack(first: int, stamps: np.ndarray, truth: dict[str, np.ndarray]) -> Block:
    """Quantise and compress a block of stamps; workers call this.

    Parameters
    ----------
    first : int
        Index of the first stamp, a multiple of `BLOCK`.
    stamps : ndarray, float32, (n <= BLOCK, 128, 128)
        In image units; all finite.
    truth : dict of ndarray, float, (n,)
        The columns named in `TRUTH_COLUMNS`, and further ones.
    """
    quantum = (truth["rms"] / QUANTA_PER_RMS).astype(np.float32)
    integers = np.zeros((BLOCK, STAMP_SIZE, STAMP_SIZE), dtype="<i4")
    integers[: len(stamps)] = np.rint(stamps / quantum[:, None, None])
    # What HDF5's shuffle and deflate filters would do, done here to use every core.
    shuffled = np.ascontiguousarray(integers.reshape(-1).view(np.uint8).reshape(-1, 4).T)
    return Block(first, zlib.compress(shuffled.tobytes(), _COMPRESSION_LEVEL), quantum, truth)


class Journal:
    """A dataset in the making, which survives being killed at any moment.

    Finished blocks are appended to a file in ``<path>.run``, each with its length
    and checksum, so that an incomplete last one is recognised and dropped. When
    all blocks are there, `finish` writes them into the HDF5 file. An HDF5 file
    itself cannot be trusted after its writer was killed.

    Parameters
    ----------
    path : Path
        The dataset to come.
    n : int
        Number of its stamps.
    attributes : mapping
        Attributes of the file: everything that determines the stamps, and under
        ``config`` the command, which may differ when a run is continued.
    columns : tuple of str
        Names of the truth columns.
    overwrite : bool
        Whether to drop an unfinished run with other attributes.

    Raises
    ------
    InputError
        If an unfinished run has other attributes, or another process holds it.
    OutputError
        If the disk refuses.
    """

    def __init__(
        self,
        path: Path,
        n: int,
        attributes: Mapping[str, Any],
        *,
        columns: tuple[str, ...] = TRUTH_COLUMNS,
        overwrite: bool = False,
    ) -> None:
        self.path, self.n, self.attributes, self.columns = path, n, attributes, columns
        self._done: dict[int, tuple[int, int]] = {}
        recipe = {**attributes["config"], **attributes, "n": n}
        for name in ("config", "command"):
            recipe.pop(name, None)
        if columns != TRUTH_COLUMNS:
            recipe["columns"] = list(columns)
        self._handle: FileIO | None = None
        self._run = Run(path.with_name(path.name + ".run"), recipe, overwrite)
        assert self._run.path is not None
        self.file = self._run.path / _JOURNAL
        if self.file.exists():
            self._open()

    def _open(self) -> FileIO:
        """Open the journal at the end of its last complete record."""
        self._handle = handle = self._run.appending(_JOURNAL)
        with self._run.explained(_JOURNAL):
            end = 0
            for end, body in self._records(handle):
                self._done[_unpacked(body, self.columns).first] = (end - len(body), len(body))
            handle.truncate(end)
        return handle

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        self._run.close()

    def _close(self) -> None:
        if self._handle is not None:
            self._handle.close()

    def missing(self) -> list[int]:
        """First indices of the blocks that are still to be added."""
        return [first for first in range(0, self.n, BLOCK) if first not in self._done]

    def add(self, block: Block) -> None:
        """Keep a finished block."""
        body = _BLOCK.pack(block.first, len(block.quantum), len(block.payload))
        body += block.payload + block.quantum.astype("<f4").tobytes()
        body += b"".join(block.truth[name].astype("<f8").tobytes() for name in self.columns)
        handle = self._handle or self._open()
        with self._run.explained(_JOURNAL):
            left = memoryview(_HEAD.pack(len(body), zlib.crc32(body)) + body)
            while left:
                left = left[handle.write(left) :]
            self._done[block.first] = (handle.tell() - len(body), len(body))

    def finish(self, psf: np.ndarray | None = None) -> Path:
        """Write the HDF5 file beside its final name, rename it, and drop the journal.

        Parameters
        ----------
        psf : ndarray, float32, (K, P, P), optional
            The effective PSFs that the stamps were drawn with.

        Raises
        ------
        DatasetError
            If a block does not have its checksum any more.
        OutputError
            If the disk refuses.
        """
        with whole(self.path) as partial:
            self._write_hdf5(partial, psf)
        self._close()
        self._run.remove()
        return self.path

    def _write_hdf5(self, partial: Path, psf: np.ndarray | None) -> None:
        with h5py.File(partial, "w") as file:
            file.attrs["schema_version"] = SCHEMA_VERSION
            for name, value in self.attributes.items():
                file.attrs[name] = json.dumps(value) if isinstance(value, dict) else value
            stamps = file.create_dataset(
                "stamps",
                (self.n, STAMP_SIZE, STAMP_SIZE),
                "<i4",
                # HDF5 wants room for a whole chunk, which fewer stamps do not fill.
                maxshape=(max(self.n, BLOCK), STAMP_SIZE, STAMP_SIZE),
                chunks=(BLOCK, STAMP_SIZE, STAMP_SIZE),
                shuffle=True,
                compression="gzip",
                compression_opts=_COMPRESSION_LEVEL,
            )
            quantum = np.empty(self.n, "<f4")
            truth = {name: np.empty(self.n, "<f8") for name in self.columns}
            for first, (start, length) in sorted(self._done.items()):
                block = _unpacked(self._verified(first, start, length), self.columns)
                stamps.id.write_direct_chunk((first, 0, 0), block.payload)
                rows = slice(first, first + len(block.quantum))
                quantum[rows] = block.quantum
                for name in self.columns:
                    truth[name][rows] = block.truth[name]
            file["quantum"] = quantum
            for name, column in truth.items():
                file[f"truth/{name}"] = column
            if psf is not None:
                file.create_dataset("psf", data=psf, chunks=(1, *psf.shape[1:]), shuffle=True, compression="gzip")

    def _verified(self, first: int, start: int, length: int) -> bytes:
        """The body of a record, whose checksum is verified again: days may lie between writing and reading."""
        assert self._handle is not None
        self._handle.seek(start - _HEAD.size)
        record = self._handle.read(_HEAD.size + length)
        body = record[_HEAD.size :]
        if record[: _HEAD.size] != _HEAD.pack(length, zlib.crc32(body)):
            raise DatasetError(
                f"{self.file} is damaged: the stamps from row {first} do not have their checksum any more. "
                "Repeat the command; it draws them again."
            )
        return body

    def _records(self, handle: FileIO) -> Iterator[tuple[int, bytes]]:
        """Bodies of the complete records from the start, and where each ends."""
        handle.seek(0)
        while len(head := handle.read(_HEAD.size)) == _HEAD.size:
            length, checksum = _HEAD.unpack(head)
            left = self.file.stat().st_size - handle.tell()
            body = handle.read(length) if 0 < length <= left else b""
            if not body or zlib.crc32(body) != checksum:
                return
            yield handle.tell(), body


_JOURNAL = "stamps.journal"
_HEAD = struct.Struct("<QI")  # length and CRC-32 of the body
_BLOCK = struct.Struct("<QII")  # first index, stamps, bytes of the payload


def _unpacked(body: bytes, names: tuple[str, ...]) -> Block:
    first, n, size = _BLOCK.unpack_from(body)
    at = _BLOCK.size
    payload = body[at : at + size]
    quantum = np.frombuffer(body, "<f4", n, at + size)
    columns = np.frombuffer(body, "<f8", n * len(names), at + size + 4 * n).reshape(-1, n)
    return Block(first, payload, quantum, dict(zip(names, columns, strict=True)))


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
        """What networks are shown of the galaxies from `start` to `stop`. Threads may share it."""
        return Inputs(stamps=self.stamps(start, stop))

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
        """Stream inputs; see `_batches`."""
        return _batches(self, size, start, stop, rng)

    def selected(self, faint_limit: float, limit: int | None) -> Arrays:
        """The first `limit` galaxies brighter than `faint_limit`, in memory."""
        rows = np.flatnonzero(self.truth["mag"] <= faint_limit)[:limit]
        if not len(rows):
            raise DatasetError(f"{self.path} holds no galaxy brighter than mag {faint_limit:g}.")
        inputs = Inputs.empty(len(rows))
        with _threads() as threads:
            blocks = [(first, min(first + BLOCK, len(self))) for first in range(0, int(rows[-1]) + 1, BLOCK)]
            places = np.searchsorted(rows, blocks)
            wanted = [rows[low:high] - first for (low, high), (first, _) in zip(places, blocks, strict=True)]
            _fill(threads, self, blocks, inputs, wanted)
        return Arrays(
            inputs,
            self.targets[rows],
            np.zeros(len(rows), bool),
            self.truth["mag"][rows],
            rows=self.rows[rows],
            recipe=self.config,
        )

    def sha256(self) -> str:
        """Hash of truth and quanta, which name the stamps: same recipe, same hash."""
        digest = hashlib.sha256(self._quantum.tobytes())
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
    ) -> None:
        self.targets, self.is_real, self.mag, self.snr, self.recipe = targets, is_real, mag, snr, recipe
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
        )

    def batches(
        self, size: int, start: int, stop: int, rng: np.random.Generator | None = None
    ) -> Iterator[tuple[Inputs, np.ndarray]]:
        """Stream inputs; see `_batches`."""
        return _batches(self, size, start, stop, rng)

    def sha256(self) -> str:
        """Hash of inputs and targets."""
        digest = hashlib.sha256()
        for values in (*self._inputs, self.targets):
            digest.update(values.tobytes())
        return digest.hexdigest()


def _batches(
    source: Dataset | Arrays,
    size: int,
    start: int,
    stop: int,
    rng: np.random.Generator | None,
    pool_blocks: int = 64,
) -> Iterator[tuple[Inputs, np.ndarray]]:
    """Stream inputs and their indices without holding the source in memory.

    Parameters
    ----------
    source : Dataset or Arrays
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
    buffer = Inputs.empty(max(0, room))
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


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, cores()))


def _fill(
    threads: ThreadPoolExecutor,
    source: Dataset | Arrays,
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
