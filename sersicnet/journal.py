"""A dataset in the making: blocks of stamps, kept in a file that survives being killed."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import h5py
import numpy as np

from sersicnet.dataset import BLOCK, QUANTA_PER_RMS, TRUTH_COLUMNS
from sersicnet.errors import DatasetError
from sersicnet.output import Run, whole
from sersicnet.schema import INPUT_SHAPES, SCHEMA_VERSION, STAMP_SIZE

_COMPRESSION_LEVEL = 2

MOST_QUANTA = 2**31
"""What a pixel of a stamp is less than, in quanta."""


class Block(NamedTuple):
    """Up to `BLOCK` consecutive stamps, compressed, their truth, and the views of a PSF that only they have."""

    first: int
    payload: bytes
    quantum: np.ndarray
    truth: dict[str, np.ndarray]
    views: np.ndarray | None = None


def pack(first: int, stamps: np.ndarray, truth: dict[str, np.ndarray], views: np.ndarray | None = None) -> Block:
    """Quantise and compress a block of stamps; workers call this.

    Parameters
    ----------
    first : int
        Index of the first stamp, a multiple of `BLOCK`.
    stamps : ndarray, float32, (n <= BLOCK, 128, 128)
        In image units.
    truth : dict of ndarray, float, (n,)
        The columns named in `TRUTH_COLUMNS`, and further ones.
    views : ndarray, float32, (4, 32, 32), optional
        Of the PSF of the block, see `sersicnet.image.views.psf_views`.

    Raises
    ------
    DatasetError
        If a pixel is not finite, or too bright for an integer number of quanta.
    """
    with np.errstate(all="ignore"):
        quantum = (truth["rms"] / QUANTA_PER_RMS).astype(np.float32)
        quanta = np.rint(stamps / quantum[:, None, None])
        bad = ~(np.isfinite(quantum) & (np.abs(quanta).max(axis=(1, 2), initial=0) < MOST_QUANTA))
    if bad.any():
        i = int(bad.argmax())
        raise DatasetError(
            f"Stamps hold pixels up to {MOST_QUANTA / QUANTA_PER_RMS:.2g} times their noise; stamp {first + i} has "
            f"{np.abs(stamps[i]).max():.3g}, with a noise of {truth['rms'][i]:.3g}. Check the zero point, and the "
            "image that the noise is from."
        )
    integers = np.zeros((BLOCK, STAMP_SIZE, STAMP_SIZE), dtype="<i4")
    integers[: len(stamps)] = quanta
    # What HDF5's shuffle and deflate filters would do, done here to use every core.
    shuffled = np.ascontiguousarray(integers.reshape(-1).view(np.uint8).reshape(-1, 4).T)
    return Block(first, zlib.compress(shuffled.tobytes(), _COMPRESSION_LEVEL), quantum, truth, views)


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
        if block.views is not None:
            body += block.views.astype("<f4").tobytes()
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
            views = []
            for first, (start, length) in sorted(self._done.items()):
                block = _unpacked(self._verified(first, start, length), self.columns)
                stamps.id.write_direct_chunk((first, 0, 0), block.payload)
                rows = slice(first, first + len(block.quantum))
                quantum[rows] = block.quantum
                for name in self.columns:
                    truth[name][rows] = block.truth[name]
                if block.views is not None:
                    views.append(block.views)
            file["quantum"] = quantum
            for name, column in truth.items():
                file[f"truth/{name}"] = column
            if psf is not None:
                file.create_dataset("psf", data=psf, chunks=(1, *psf.shape[1:]), shuffle=True, compression="gzip")
            if views:
                file.create_dataset(
                    "psf_views", data=np.array(views), chunks=(1, *views[0].shape), shuffle=True, compression="gzip"
                )

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
    rest = np.frombuffer(body, "<f4", offset=at + size + 4 * n + 8 * n * len(names))
    views = rest.reshape(INPUT_SHAPES.psf) if len(rest) else None
    return Block(first, payload, quantum, dict(zip(names, columns, strict=True)), views)
