import functools
import gc
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from astropy.io import fits

from sersicnet import workers as work
from sersicnet.errors import SersicnetWarning, WorkError
from sersicnet.measuring import measure as measuring
from sersicnet.measuring.measure import measure
from sersicnet.measuring.plan import Work


def square(number):
    return number * number


def die(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def nothing():
    pass


def test_jobs_are_done_once_on_every_kind_of_worker():
    for n in (1, 2):
        with work.pools(n, nothing) as apply:
            assert sorted(apply(square, range(7))) == [(i, i * i) for i in range(7)]
            assert list(work.in_order(apply)(square, range(7))) == [i * i for i in range(7)]


def frozen(number):
    return gc.get_freeze_count(), gc.isenabled()


@pytest.mark.skipif(sys.platform != "linux", reason="workers start afresh elsewhere")
def test_workers_do_not_search_what_they_were_born_with_for_garbage():
    with work.pools(2, nothing) as apply:
        for _, (count, enabled) in apply(frozen, range(2)):
            assert count > 50_000
            assert enabled


def test_a_single_worker_may_be_a_process_of_its_own():
    with work.pools(1, nothing, apart=True) as apply:
        (pid,) = {pid for _, pid in apply(process_id, range(3))}
    assert pid != os.getpid()
    with work.pools(1, nothing) as apply:
        assert {pid for _, pid in apply(process_id, range(3))} == {os.getpid()}


def process_id(number):
    return os.getpid()


def test_endless_jobs_are_begun_only_a_little_ahead():
    begun = []

    def endless():
        for number in itertools.count():
            begun.append(number)
            yield number

    with work.pools(2, nothing) as apply:
        results = work.in_order(apply)(square, endless())
        assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
        results.close()
        assert len(begun) <= 20
        assert list(work.in_order(apply)(square, range(3))) == [0, 1, 4]


def test_the_environment_is_left_as_it_was(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    with work.pools(2, nothing) as apply:
        for _ in apply(square, range(3)):
            assert os.environ["OMP_NUM_THREADS"] == "3"
            assert "MKL_NUM_THREADS" not in os.environ


_UNGUARDED = """
import sys
from pathlib import Path
from sersicnet import workers as work
from sersicnet.errors import WorkError
def nothing():
    pass
def square(number):
    return number * number
with Path(sys.argv[1]).open("a") as file:
    file.write("begun\\n")
try:
    with work.pools(2, nothing) as apply:
        list(apply(square, range(3)))
except WorkError as error:
    print(error)
"""


def test_a_script_without_a_guard_is_told_and_starts_no_others(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_UNGUARDED)
    done = subprocess.run([sys.executable, script, tmp_path / "begun"], capture_output=True, text=True, timeout=100)
    assert "needs its calls below `if __name__ == '__main__':`" in done.stdout.splitlines()[-1]
    assert (tmp_path / "begun").read_text().count("begun") <= 6


def test_a_worker_that_was_killed_is_told():
    with work.pools(2, nothing) as apply, pytest.raises(WorkError, match=r"A worker process was killed, .* is kept"):
        list(apply(die, range(7)))


_SLEEPERS = """
import os, time
from sersicnet import workers as work
def nothing():
    pass
def sleep(number):
    print(os.getpid(), flush=True)
    time.sleep(60)
if __name__ == "__main__":
    with work.pools(2, nothing) as apply:
        list(apply(sleep, range(2)))
"""


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_workers_end_with_what_started_them(tmp_path):
    script = tmp_path / "sleepers.py"
    script.write_text(_SLEEPERS)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        pids = [int(process.stdout.readline()) for _ in range(2)]
        process.kill()
    deadline = time.monotonic() + 20
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_list_of_images_stops_when_a_worker_was_killed(field, tmp_path, monkeypatch):
    paths, begun = [tmp_path / "a.fits", tmp_path / "b.fits"], []
    for path in paths:
        shutil.copy(field[0], path)

    def killed(*arguments, **options):
        begun.append(arguments)
        raise WorkError("A worker process was killed.")

    monkeypatch.setattr(measuring, "measure", killed)
    with pytest.raises(WorkError, match="was killed"):
        measuring.measure_many(paths, tmp_path)
    assert len(begun) == 1


def test_no_scheduler_is_told():
    with (
        pytest.raises(WorkError, match="No scheduler answers at"),
        work.cluster("tcp://127.0.0.1:1"),
    ):
        pass


@pytest.mark.filterwarnings("ignore::Warning:distributed")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.slow
def test_a_cluster_that_loses_a_worker_gives_the_same_catalogue(field, tiny_weights, tmp_path):
    from distributed import LocalCluster

    run = functools.partial(measure, field[0], weights=tiny_weights)
    killed = []
    with (
        warnings.catch_warnings(),
        LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None) as cluster,
    ):
        warnings.simplefilter("ignore", SersicnetWarning)

        def kill(stage, done, total):
            if stage.startswith("measuring tiles") and done == 2 and not killed:
                killed.append(next(iter(cluster.workers.values())).process.pid)
                os.kill(killed[0], signal.SIGKILL)
                time.sleep(0.5)

        on_cluster = run(work=Work(tile=128, scheduler=cluster.scheduler_address), report=kill)
        alone = run(work=Work(tile=128))
    assert len(killed) == 1
    for name in alone.colnames:
        np.testing.assert_array_equal(on_cluster[name], alone[name])


_MEASURE = """
import sys, warnings
from sersicnet.measuring.measure import measure
from sersicnet.measuring.outputs import Outputs
from sersicnet.measuring.plan import Work
if __name__ == "__main__":
    warnings.simplefilter("ignore")
    outputs = Outputs(catalogue=sys.argv[3])
    measure(sys.argv[1], weights=sys.argv[2], outputs=outputs, work=Work(tile=128, workers=2))
"""


@pytest.mark.slow
def test_a_run_killed_at_twenty_moments_gives_the_same_catalogue(field, tiny_weights, tmp_path):
    script, whole, cat = tmp_path / "run.py", tmp_path / "whole.fits", tmp_path / "cat.fits"
    script.write_text(_MEASURE)
    command = [sys.executable, script, field[0], tiny_weights]
    started = time.monotonic()
    subprocess.run([*command, whole], check=True)
    length = time.monotonic() - started
    rng = np.random.default_rng(0)

    def finished():
        same = [fits.getdata(path).tobytes() for path in (cat, whole)]
        cat.unlink()
        return same[0] == same[1]

    killed, completed = 0, 0
    while killed < 20 or not completed:
        process = subprocess.Popen([*command, cat])
        try:
            assert process.wait(rng.uniform(0.1, 0.9) * length) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
        if cat.exists():  # killed while it tidied up, or not at all
            assert finished()
            completed += 1
    assert completed
