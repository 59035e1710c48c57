"""Work on many pieces, on the cores of this machine or of a cluster."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver, get_context, parent_process
from multiprocessing.context import BaseContext
from typing import Any

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
