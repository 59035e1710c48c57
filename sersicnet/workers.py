"""Work on many pieces: on the cores of this machine, and kept until all of it is done."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver, get_context, parent_process
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np

from sersicnet.errors import InputError

Apply = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[tuple[int, Any]]]
"""Applies a function to jobs; yields their numbers and results, in the order in which they are done."""

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # Memory of arrays that went is for those that come, where the C library is GNU's: to get it
    # from the system anew each time takes a fourteenth of all CPU time.
    "MALLOC_MMAP_THRESHOLD_": str(2**28),
    "MALLOC_TRIM_THRESHOLD_": str(2**28),
}
"""Of processes that are started here: they use one thread each."""


def in_order(apply: Apply) -> Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]:
    """What applies functions like `map`, by means of `apply`."""

    def ordered(function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        early: dict[int, Any] = {}
        expected = 0
        for number, result in apply(function, jobs):
            early[number] = result
            while expected in early:
                yield early.pop(expected)
                expected += 1

    return ordered


def here(function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Apply a function in this process."""
    for number, job in enumerate(jobs):
        yield number, function(job)


def get_ready() -> None:
    """Begin to start `workers`: what they import is imported while this process goes on."""
    with _environment():
        _context()
        if sys.platform == "linux":
            forkserver.ensure_running()


def _context() -> BaseContext:
    """How processes are started: where it is well tried, by a copy of one that has imported all that they need."""
    if sys.platform != "linux":
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["sersicnet.measuring.preload"])
    return context


@contextmanager
def _environment() -> Iterator[None]:
    """Give `_ENVIRONMENT` to processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def workers(n: int, prepare: Callable[[], None]) -> Iterator[Apply]:
    """Processes that do jobs, each with one thread.

    Parameters
    ----------
    n : int
        How many; with 1, this process does them itself.
    prepare : callable
        What each of the processes does first.

    Yields
    ------
    Apply

    Raises
    ------
    InputError
        When a process was killed from outside.
    """
    if n <= 1:
        yield here
        return
    pool = ProcessPoolExecutor(n, _context(), initializer=_begin, initargs=(prepare,))

    def apply(function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        running: dict[Future[Any], int] = {}
        waiting = enumerate(jobs)
        try:
            while True:
                while len(running) < 2 * n and (following := next(waiting, None)) is not None:
                    running[pool.submit(function, following[1])] = following[0]
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            raise InputError(
                "A worker process was killed; perhaps there was too little memory. What was finished is kept, and "
                "the same command continues; --workers 1 needs least memory."
            ) from error

    with _environment():
        try:
            yield apply
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin(prepare: Callable[[], None]) -> None:
    """What a process of `workers` does first: end with the one that started it, however that ends."""
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    prepare()


@contextmanager
def cluster(address: str) -> Iterator[Apply]:
    """The workers of a Dask cluster; a job whose worker dies is given to another one.

    Parameters
    ----------
    address : str
        Of the scheduler, such as ``tcp://10.0.0.5:8786``. Its workers need
        sersicnet, and the image under the same path.

    Raises
    ------
    InputError
        If the package is not installed, nobody answers, or a job's workers die again
        and again.
    """
    try:
        from distributed import Client, KilledWorker, as_completed
    except ImportError as error:
        raise InputError(
            f"--scheduler needs the package distributed ({error}): `pip install 'sersicnet[cluster]'`."
        ) from error
    try:
        client = Client(address, timeout="5s", set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise InputError(f"No scheduler answers at {address}: {error}. Check the address, or leave it out.") from error

    def apply(function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        numbers = {client.submit(function, job, pure=False): number for number, job in enumerate(jobs)}
        try:
            for future in as_completed(list(numbers), loop=client.loop):
                yield numbers.pop(future), future.result()
                future.release()
        except KilledWorker as error:
            raise InputError(
                f"Workers of {address} died again and again at the same piece; perhaps they have too little memory. "
                "What was finished is kept, and the same command continues."
            ) from error

    with client:
        yield apply


class Kept:
    """A directory beside an output that holds the finished pieces of a run.

    Every piece is written beside its name and renamed, so that a run can be killed
    at any moment. The directory is made with the first one: an input that cannot be
    used leaves none.

    Parameters
    ----------
    path : Path or None
        None keeps nothing.
    config : dict
        Options that another run in the same place must share.
    overwrite : bool
        Whether to drop a run with other options.

    Raises
    ------
    InputError
        If there is a run with other options, or the directory cannot be used.
    """

    def __init__(self, path: Path | None, config: Mapping[str, Any], overwrite: bool) -> None:
        self.path = path
        if path is None:
            return
        self._config = text = json.dumps(config, indent=1, sort_keys=True)
        file = path / "config.json"
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} should be a directory for what is finished, and is a file. Move it away.")
        try:
            if file.exists() and file.read_text() != text:
                if not overwrite:
                    raise InputError(
                        f"{path} holds an unfinished run with other options or another image. Repeat its command, or "
                        "give --overwrite to start anew."
                    )
                shutil.rmtree(path)
        except OSError as error:
            raise InputError(f"{path} cannot keep what is finished: {error}.") from error

    def get(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays of a finished piece; None if it is not finished."""
        if self.path is None or not (file := self.path / f"{name}.npz").exists():
            return None
        try:
            with file.open("rb") as handle, np.load(handle, allow_pickle=False) as found:
                return dict(found)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return None  # damaged by the file system: it is done again

    def put(self, name: str, arrays: Mapping[str, Any]) -> None:
        """Keep a finished piece."""
        if self.path is None:
            return
        config, partial = self.path / "config.json", self.path / f"partial-{name}.npz"
        try:
            self.path.mkdir(exist_ok=True)
            if not config.exists():
                partial_config = self.path / "partial-config.json"
                partial_config.write_text(self._config)
                partial_config.replace(config)
            with partial.open("wb") as file:
                np.savez(file, **arrays)
            partial.replace(self.path / f"{name}.npz")
        except OSError as error:
            raise InputError(
                f"{self.path} cannot keep what is finished: {error}. What was kept before is intact; when the disk is "
                "well again, the same command continues."
            ) from error

    def remove(self) -> None:
        """Drop all of it: the run is done."""
        if self.path is not None and self.path.exists():
            shutil.rmtree(self.path)
