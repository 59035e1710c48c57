"""Run many jobs in worker processes, on the cores of this machine or of a cluster."""

from __future__ import annotations

import math
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import current_process, forkserver, get_context, parent_process, resource_tracker
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.synchronize import Event
from pathlib import Path
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


def cores() -> int:
    """Number of cores that this process may use: those it is bound to, within the quota of its control group."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        allowed = os.cpu_count() or 1
    quota = _quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return max(1, math.ceil(min(allowed, quota)))


def _quota(membership: Path, root: Path) -> float:
    """Cores' worth of time that the control groups of this process allow, infinite without a limit.

    A limit of any group above counts as well. Version 1 of control groups has a directory for
    each kind of limit below the root, version 2 has one for all.
    """
    found = math.inf
    with suppress(OSError):
        for line in membership.read_text().splitlines():
            _, kinds, group = line.split(":", 2)
            if kinds and "cpu" not in kinds.split(","):
                continue
            top = root / kinds if kinds else root
            inner = top / group.lstrip("/")
            for directory in (inner, *inner.parents):
                found = min(found, _limit(directory))
                if directory == top:
                    break
    return found


def _limit(directory: Path) -> float:
    """Cores' worth of time that one control group allows."""
    with suppress(OSError, ValueError):
        if (file := directory / "cpu.max").exists():
            quota, period = file.read_text().split()
            return math.inf if quota == "max" else float(quota) / float(period)
        quota = (directory / "cpu.cfs_quota_us").read_text()
        if float(quota) > 0:  # -1 is no limit
            return float(quota) / float((directory / "cpu.cfs_period_us").read_text())
    return math.inf


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
    _context(preload)


def _context(preload: str) -> ForkServerContext | SpawnContext:
    """The start method: on Linux, workers are forked from a process that has imported `preload`; elsewhere, spawned.

    They are spawned on Linux, too, if no directory for temporary files has a name that is short
    enough for a socket.
    """
    if sys.platform == "linux":
        context = get_context("forkserver")
        context.set_forkserver_preload([preload])
        with suppress(OSError), _environment(), _short_temporary_directory():
            forkserver.ensure_running()
            return context
    return get_context("spawn")


_LONGEST_SOCKET, _ADDED = 107, len("/pymp-12345678/listener-12345678")
"""Bytes of the path of a socket on Linux, and of what Python adds to the directory for temporary files."""


@contextmanager
def _short_temporary_directory() -> Iterator[None]:
    """Create temporary files in a directory that is short enough for a socket: batch systems set long ones."""
    before, given = tempfile.tempdir, tempfile.gettempdir()
    try:
        if len(os.fsencode(given)) + _ADDED > _LONGEST_SOCKET:
            short = (place for place in ("/tmp", "/var/tmp", "/dev/shm") if os.access(place, os.W_OK | os.X_OK))
            tempfile.tempdir = next(short, given)
        yield
    finally:
        tempfile.tempdir = before


@contextmanager
def _environment() -> Iterator[None]:
    """Set `_ENVIRONMENT` for the processes that are started in this context, and keep Ctrl-C from them.

    Ctrl-C reaches every process of a terminal. This process ends its workers; they would each print a traceback.
    """
    blocks = hasattr(signal, "pthread_sigmask")  # not on Windows
    if blocks:
        resource_tracker.ensure_running()  # which would lift the block when it starts
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        if blocks:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
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
    check_main()
    context = _context(preload)
    begun, stop = context.RawValue("b", 0), context.Event()
    pool = ProcessPoolExecutor(n, context, initializer=_begin, initargs=(prepare, begun, stop))

    def apply(function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        running: dict[Future[Any], int] = {}
        waiting = enumerate(jobs)
        if not begun.value and context.get_start_method() == "forkserver":
            # Modules may still be imported, and Ctrl-C shall end that wait, but not come between the starts of workers.
            first = context.Process(target=_nothing)
            first.start()
            first.join()
        try:
            while True:
                while len(running) < 2 * n and (following := next(waiting, None)) is not None:
                    with _environment():
                        running[pool.submit(function, following[1])] = following[0]
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
        except (BrokenProcessPool, EOFError, ConnectionError) as error:
            if begun.value and not isinstance(error, BrokenProcessPool):
                raise  # a job's own
            raise WorkError(_KILLED if begun.value else _NOT_BEGUN) from error
        finally:
            for future in running:
                future.cancel()

    try:
        yield apply
    except WorkError:
        raise  # the pool has ended its workers; an event waits for ever for the answer of a worker that was killed
    except BaseException:  # such as Ctrl-C, which does not reach the workers
        stop.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_KILLED = (
    "A worker process was killed, perhaps because of too little memory. Finished work is kept, and the same "
    "command continues; `workers=1` needs least memory."
)
_NOT_BEGUN = (
    "The worker processes ended before they began. A Python script with several workers needs its calls below "
    "`if __name__ == '__main__':`, since each worker imports the script; or give `workers=1`."
)


def check_main() -> None:
    """Check that worker processes can import the user's script, as each of them does before it begins.

    A worker process that is importing its script and has arrived here again ends: the script lacks the line
    ``if __name__ == "__main__":``, and the process that started the worker says so, in one line instead of a
    traceback for each worker.

    Raises
    ------
    WorkError
        If the script is no file, as one from standard input.
    """
    if getattr(current_process(), "_inheriting", False):
        os._exit(1)
    main = sys.modules["__main__"]
    file = None if getattr(main, "__spec__", None) is not None else getattr(main, "__file__", None)
    if file is not None and not Path(file).exists():
        raise WorkError(
            f"Each of several workers imports the Python script, and {file} is no file, such as one from standard "
            "input. Save the script with its calls below `if __name__ == '__main__':`, or give `workers=1`."
        )


def _nothing() -> None:
    """Show that processes can be started."""


def _begin(prepare: Callable[[], None], begun: Any, stop: Event) -> None:
    """Prepare a process of `pools`; it exits when `stop` is set, or its parent has ended."""
    parent = parent_process()
    assert parent is not None

    def follow(ended: Callable[[], Any]) -> None:
        ended()
        os._exit(1)

    for ended in (parent.join, stop.wait):
        threading.Thread(target=follow, args=(ended,), daemon=True).start()
    begun.value = 1
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
