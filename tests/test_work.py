import ast
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
from pathlib import Path

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
    # In a fresh interpreter, since a process of pytest may have started workers that simulate before.
    code = (
        "from sersicnet import workers\n"
        "from test_work import frozen, nothing\n"
        "with workers.pools(2, nothing) as apply:\n"
        "    print([found for _, found in apply(frozen, range(2))])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=Path(__file__).parent
    )
    for count, enabled in ast.literal_eval(done.stdout):
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


def test_the_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    monkeypatch.setattr(work, "_quota", lambda membership, root: float("inf"))
    assert work.cores() == 3
    monkeypatch.setattr(work, "_quota", lambda membership, root: 1.5)
    assert work.cores() == 2
    monkeypatch.setattr(work, "_quota", lambda membership, root: 0.2)
    assert work.cores() == 1


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/job/step\n", {"job/cpu.max": "150000 100000", "job/step/cpu.max": "max 100000"}, 1.5),
        ("0::/job/step\n", {"job/step/cpu.max": "400000 100000", "cpu.max": "200000 100000"}, 2),
        ("0::/of/the/host\n", {"cpu.max": "50000 100000"}, 0.5),  # a container sees its own group as the root
        ("0::/\n", {}, float("inf")),
        ("4:cpu,cpuacct:/job\n0::/\n", {"cpu,cpuacct/job/cpu.cfs_quota_us": "300000",
         "cpu,cpuacct/job/cpu.cfs_period_us": "100000"}, 3),
        ("4:cpu:/job\n", {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, float("inf")),
        ("5:cpuset:/job\n", {"cpuset/job/cpu.max": "100000 100000"}, float("inf")),
        ("0::/\n", {"cpu.max": "nonsense"}, float("inf")),
        (None, {}, float("inf")),
    ],
)  # fmt: skip
def test_quotas_of_control_groups(tmp_path, membership, files, expected):
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text)
    if membership is not None:
        (tmp_path / "cgroup").write_text(membership)
    assert work._quota(tmp_path / "cgroup", tmp_path / "root") == expected


def test_the_number_of_cores_is_asked_for_in_one_place():
    sources = Path(work.__file__).parent
    assert [path.name for path in sources.rglob("*.py") if "cpu_count" in path.read_text()] == ["workers.py"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux binds processes to cores")
def test_a_job_bound_to_a_core_is_planned_with_one_process(tmp_path):
    fits.writeto(tmp_path / "m.fits", np.zeros((3072, 3072), "f4"), fits.Header({"MAGZERO": 25.0}))
    code = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}}); from sersicnet.cli import main; "
    code += f"main(['measure', {str(tmp_path / 'm.fits')!r}, '--dry-run', '-o', {str(tmp_path / 'c.fits')!r}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert "tiles 4, processes 1," in done.stdout


_TWO = """
import tempfile
from multiprocessing import get_context
from sersicnet import workers as work
def nothing():
    pass
def square(number):
    return number * number
if __name__ == "__main__":
    before = tempfile.gettempdir()
    with work.pools(2, nothing) as apply:
        print(sorted(apply(square, range(3))), tempfile.gettempdir() == before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="workers start without a socket elsewhere")
@pytest.mark.parametrize("has_short", [True, False])
def test_a_directory_for_temporary_files_may_have_a_long_name(tmp_path, has_short):
    scratch = tmp_path / ("scratch_" * 14)
    scratch.mkdir()
    script = tmp_path / "script.py"
    text = _TWO if has_short else _TWO.replace("def nothing", "import os; os.access = lambda *a: False\ndef nothing", 1)
    script.write_text(text)
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    assert done.stderr == ""
    assert done.stdout == "[(0, 0), (1, 1), (2, 4)] True\n"


_MEASURES = """
from sersicnet import Outputs, Work, measure
measure("m.fits", outputs=Outputs(catalogue="cat.ecsv"), work=Work(tile=128, workers=2))
"""


@pytest.mark.parametrize("from_stdin", [True, False])
def test_a_script_that_measures_without_a_guard_is_told(field, tmp_path, from_stdin):
    (tmp_path / "m.fits").symlink_to(field[0])
    (tmp_path / "script.py").write_text(_MEASURES)
    how = {"input": _MEASURES} if from_stdin else {}
    command = [sys.executable, "-" if from_stdin else "script.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path, **how)
    last = done.stderr.splitlines()[-1]
    assert "WorkError" in last
    assert "`if __name__ == '__main__':`" in last
    assert "memory" not in last
    assert "bootstrapping" not in done.stderr
    assert "is in use" not in done.stderr
    assert not (tmp_path / "cat.ecsv").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("when", ["starting", "working"])
def test_an_interruption_prints_no_traceback_of_workers(tmp_path, when):
    script = tmp_path / "script.py"
    script.write_text(_SLEEPERS.replace("list(apply(sleep, range(2)))", """
        print("pool", flush=True)
        try:
            list(apply(sleep, range(2)))
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            raise SystemExit(130)
"""))  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "pool\n"
    if when == "working":
        process.stdout.readline()
    else:
        time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    started = time.monotonic()
    out, err = process.communicate(timeout=50)
    assert time.monotonic() - started < 30
    assert process.returncode == 130
    assert "interrupted" in out
    assert err == ""
