"""Run many jobs in worker processes, on the cores of this machine or of a cluster."""

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

from sersicnet.errors import InputError, WorkError

Apply = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[tuple[int, Any]]]
"""A function that applies a function to jobs, and yields their numbers and results in the order of completion."""

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # With these limits, glibc reuses the memory of freed arrays; requests to the system for every
    # array would take a fourteenth of all CPU time.
    "MALLOC_MMAP_THRESHOLD_": str(2**28),
    "MALLOC_TRIM_THRESHOLD_": str(2**28),
}
"""Environment of the worker processes, which use one thread each."""

MEASURING = "sersicnet.measuring.preload"
"""Module that imports everything that a process needs to measure tiles."""


def in_order(apply: Apply) -> Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]:
    """Turn `apply` into a function that yields the results in the order of the jobs, like `map`."""

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


def get_ready(preload: str = MEASURING) -> None:
    """Import the modules for `pools` in the background, while this process continues."""
    with _environment():
        _context(preload)
        if sys.platform == "linux":
            forkserver.ensure_running()


def _context(preload: str) -> BaseContext:
    """The start method: on Linux, workers are forked from a process that has imported `preload`; elsewhere, spawned."""
    if sys.platform != "linux":
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([preload])
    return context


@contextmanager
def _environment() -> Iterator[None]:
    """Set `_ENVIRONMENT` for the processes that are started in this context."""
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
def pools(n: int, prepare: Callable[[], None], *, preload: str = MEASURING, apart: bool = False) -> Iterator[Apply]:
    """Run jobs in processes, each with one thread.

    A job is submitted only while fewer than ``2 * n`` jobs are pending, so that jobs may be an
    infinite iterator.

    Parameters
    ----------
    n : int
        Number of processes. With 1, the jobs run in this process.
    prepare : callable
        Called once in each of the processes before its first job.
    preload : str
        Module that imports everything that the processes need.
    apart : bool
        Whether jobs run in a separate process even with ``n=1``.

    Yields
    ------
    Apply

    Raises
    ------
    WorkError
        If a process was killed.
    """
    if n <= 1 and not apart:
        yield here
        return
    pool = ProcessPoolExecutor(n, _context(preload), initializer=_begin, initargs=(prepare,))
    any_done = False

    def apply(function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        nonlocal any_done
        running: dict[Future[Any], int] = {}
        waiting = enumerate(jobs)
        try:
            while True:
                while len(running) < 2 * n and (following := next(waiting, None)) is not None:
                    with _environment():
                        running[pool.submit(function, following[1])] = following[0]
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    result = future.result()
                    any_done = True
                    yield running.pop(future), result
        except BrokenProcessPool as error:
            raise WorkError(_KILLED if any_done else _KILLED_AT_ONCE) from error
        finally:
            for future in running:
                future.cancel()

    try:
        yield apply
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_KILLED = (
    "A worker process was killed, perhaps because of too little memory. Finished work is kept, and the same "
    "command continues; `workers=1` needs least memory."
)
_KILLED_AT_ONCE = _KILLED + " A Python script with several workers needs its calls below `if __name__ == '__main__':`."


def _begin(prepare: Callable[[], None]) -> None:
    """Prepare a process of `pools`, and make it exit when the process that started it ends for any reason."""
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    prepare()


@contextmanager
def cluster(address: str) -> Iterator[Apply]:
    """Run jobs on the workers of a Dask cluster; a job whose worker dies is given to another worker.

    Parameters
    ----------
    address : str
        Address of the scheduler, such as ``tcp://10.0.0.5:8786``. Its workers need
        sersicnet, and the image under the same path.

    Yields
    ------
    Apply

    Raises
    ------
    InputError
        If the package distributed is not installed, or the address is invalid.
    WorkError
        If no scheduler answers, or the workers of a job die repeatedly.
    """
    try:
        from distributed import Client, KilledWorker, as_completed
    except ImportError as error:
        raise InputError(
            f"`scheduler` needs the package distributed ({error}): `pip install 'sersicnet[cluster]'`."
        ) from error
    try:
        client = Client(address, timeout="5s", set_as_default=False)
    except ValueError as error:
        raise InputError(f"A scheduler's address is like tcp://10.0.0.5:8786; received {address} ({error}).") from error
    except (OSError, TimeoutError) as error:
        raise WorkError(f"No scheduler answers at {address}: {error}. Check the address, or leave it out.") from error

    def apply(function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        numbers = {client.submit(function, job, pure=False): number for number, job in enumerate(jobs)}
        try:
            for future in as_completed(list(numbers), loop=client.loop):
                yield numbers.pop(future), future.result()
                future.release()
        except KilledWorker as error:
            raise WorkError(
                f"Workers of {address} died repeatedly in the same job, perhaps because of too little memory. "
                "Finished work is kept, and the same command continues."
            ) from error

    with client:
        yield apply
