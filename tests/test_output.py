import errno
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from sersicnet import output
from sersicnet.errors import InputError, OutputError, SersicnetWarning, first_line, printable, warn
from sersicnet.output import (
    Run,
    check_directory,
    check_output,
    check_space,
    json_text,
    whole,
    whole_directory,
)


def names(path):
    return sorted(entry.name for entry in path.iterdir())


# --- errors and warnings ----------------------------------------------------------------------


def test_a_warning_names_the_line_that_called_sersicnet():
    with pytest.warns(SersicnetWarning, match="hello") as caught:
        warn("hello")
    assert caught[0].filename == __file__


def test_a_warning_from_within_sersicnet_names_the_line_outside(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # A context manager of the standard library lies between.
        code = compile("import contextlib\n@contextlib.contextmanager\ndef f(w):\n    w('deep')\n    yield\n",
                       str(Path(output.__file__).with_name("made.py")), "exec")  # fmt: skip
        made = {}
        exec(code, made)
        with made["f"](warn):
            pass
    assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize(("error", "text"), [
    (ValueError("one\ntwo"), "one"), (ValueError("\n  late\n"), "late"), (MemoryError(), "MemoryError"),
    (ValueError(" \n"), "ValueError"),
])  # fmt: skip
def test_the_first_line_of_an_error_is_never_empty(error, text):
    assert first_line(error) == text


# --- output that can be written ---------------------------------------------------------------


def test_an_output_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "there").write_text("")
    with pytest.raises(InputError, match=r"exists already\. Choose another name, or give `overwrite`\."):
        check_output(tmp_path / "there", False)
    assert check_output(str(tmp_path / "there"), True) == tmp_path / "there"
    with pytest.raises(InputError, match="is a directory"):
        check_output(tmp_path, True)
    with pytest.raises(InputError, match="does not exist"):
        check_output(tmp_path / "no" / "file", False)


def test_a_directory_that_is_not_ours_is_not_overwritten(tmp_path):
    check_directory(tmp_path / "new", "mark", False)
    (tmp_path / "old").mkdir()
    with pytest.raises(InputError, match="exists already"):
        check_directory(tmp_path / "old", "mark", False)
    with pytest.raises(InputError, match="has no mark"):
        check_directory(tmp_path / "old", "mark", True)
    (tmp_path / "old" / "mark").write_text("")
    check_directory(tmp_path / "old", "mark", True)


# --- whole or not at all ----------------------------------------------------------------------


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "cat.fits.gz"
    path.write_text("old")

    def fail():
        with whole(path) as partial:
            assert partial.name.endswith(".fits.gz")
            partial.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_text() == "old"
    with whole(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o644
    assert names(tmp_path) == ["cat.fits.gz"]


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "a long story of a library")


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "cat.fits"
    path.write_text("old")
    with pytest.raises(OutputError, match=r"cat.fits could not be written: No space left on device\. .* intact"):  # noqa: SIM117
        with whole(path):
            full_disk()
    with pytest.raises(OutputError, match="No space left"), whole(path):
        raise RuntimeError("Can't decrement id (unable to write: errno = 28, message = 'No space left on device')")
    with pytest.raises(RuntimeError, match="other"), whole(path):
        raise RuntimeError("other")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["cat.fits"]


def test_trouble_with_another_file_is_not_that_of_the_output(tmp_path):
    with pytest.raises(FileNotFoundError), whole(tmp_path / "cat.fits"):
        (tmp_path / "image.fits").read_bytes()
    assert names(tmp_path) == []


def test_a_missing_directory_is_told(tmp_path):
    with pytest.raises(OutputError, match="No such file"), whole(tmp_path / "no" / "cat.fits"):
        pass
    with pytest.raises(OutputError, match="No such file"), whole_directory(tmp_path / "no" / "weights"):
        pass


def fill(path, text):
    with whole_directory(path) as partial:
        (partial / "file").write_text(text)


def test_a_directory_is_replaced_whole(tmp_path):
    path = tmp_path / "weights"
    for text in ("old", "new"):
        fill(path, text)
        assert (path / "file").read_text() == text
    with pytest.raises(OutputError), whole_directory(path):
        full_disk()
    assert (path / "file").read_text() == "new"
    assert names(tmp_path) == ["weights"]


def test_a_link_to_a_directory_is_written_through(tmp_path):
    fill(tmp_path / "target", "old")
    (tmp_path / "weights").symlink_to(tmp_path / "target")
    fill(tmp_path / "weights", "new")
    assert (tmp_path / "weights").is_symlink()
    assert (tmp_path / "target" / "file").read_text() == "new"
    assert names(tmp_path) == ["target", "weights"]


def failing_rename(monkeypatch, error):
    """Let the second of the two renames fail."""
    rename = Path.rename

    def rename_or_fail(self, target):
        if self.name.startswith(".weights-"):
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_or_fail)


def test_a_directory_is_put_back_if_the_second_rename_fails(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    fill(path, "old")
    with monkeypatch.context() as patch:
        failing_rename(patch, OSError(errno.EACCES, "no"))
        with pytest.raises(OutputError, match="Permission denied"):
            fill(path, "new")
    assert (path / "file").read_text() == "old"
    assert names(tmp_path) == ["weights"]


def test_a_process_that_dies_between_the_two_renames_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    fill(path, "old")
    with monkeypatch.context() as patch:
        failing_rename(patch, SystemExit)
        with pytest.raises(SystemExit):
            fill(path, "new")
    assert not path.exists()
    with pytest.raises(KeyError), whole_directory(path):
        raise KeyError
    assert (path / "file").read_text() == "old"
    fill(path, "new")
    assert (path / "file").read_text() == "new"
    assert names(tmp_path) == ["weights"]


def test_what_the_first_rename_left_behind_is_tidied_up(tmp_path):
    path = tmp_path / "weights"
    fill(path, "newer")
    fill(tmp_path / ".weights.old", "old")  # as a process leaves it that dies while it removes this
    fill(path, "newest")
    assert (path / "file").read_text() == "newest"
    assert names(tmp_path) == ["weights"]


def die(path):
    raise SystemExit


# --- unfinished runs --------------------------------------------------------------------------


def test_what_is_kept_is_found_again(tmp_path):
    path = tmp_path / "cat.run"
    with Run(path, {"a": 1, "scale": np.nan}, False) as run:
        assert run.arrays("tile") is None
        assert run.read("state") is None
        run.keep_arrays("tile", {"x": np.arange(3)})
        run.keep("state", {"epoch": 2})
        with run.writing("weights.h5") as partial:
            partial.write_text("weights")
        with run.appending("journal") as file:
            file.write(b"one")
    assert names(path) == ["config.json", "journal", "state.json", "tile.npz", "weights.h5"]
    with Run(path, {"scale": np.nan, "a": 1}, False) as run:
        np.testing.assert_array_equal(run.arrays("tile")["x"], [0, 1, 2])
        assert run.read("state") == {"epoch": 2}
        with run.appending("journal") as file:
            file.write(b"two")
            file.seek(0)
            assert file.read() == b"onetwo"
        run.remove()
    assert names(tmp_path) == []


def test_without_a_path_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Run(None, {}, False) as run:
        run.keep_arrays("tile", {"x": np.arange(3)})
        run.keep("state", 1)
        assert run.arrays("tile") is None
        assert run.read("state") is None
        run.remove()
    assert names(tmp_path) == []


def test_a_run_that_keeps_nothing_leaves_no_directory(tmp_path):
    with Run(tmp_path / "cat.run", {}, False):
        pass
    with pytest.raises(KeyError), Run(tmp_path / "cat.run", {}, False):
        raise KeyError
    assert names(tmp_path) == []
    with pytest.raises(InputError, match="does not exist"):
        Run(tmp_path / "no" / "cat.run", {}, False)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        Run(tmp_path / "file", {}, False)


def test_a_run_with_other_options_is_dropped_only_on_demand(tmp_path):
    path = tmp_path / "cat.run"
    old = {"seed": 1, "recipe": {"epochs": 2, "batch": 3}, "images": ["x" * 100], "gone": True}
    new = {"seed": 1, "recipe": {"epochs": 5, "batch": 3}, "images": ["y" * 100], "come": "HST"}
    with Run(path, old, False) as run:
        run.keep_arrays("tile", {"x": np.arange(3)})
    for _ in range(2):
        with pytest.raises(InputError) as error:
            Run(path, new, False)
        assert str(error.value) == (
            f"{path} holds an unfinished run with other options (recipe.epochs: 2, now 5; images; come: null, "
            "now HST; gone: true, now null). Repeat its command, or give `overwrite` to start anew."
        )
    with pytest.raises(InputError, match=r"\(images\)"):
        Run(path, {**old, "images": new["images"]}, False)
    with pytest.raises(InputError, match=r"\(seed: 1, now 0\.33333333; a: null, now 1; .*; 3 more\)"):
        Run(path, {"seed": 1 / 3} | dict.fromkeys("abcd", 1), False)
    for known, told in (({"come": None}, ""), ({"version": "2"}, " (version: null, now 2)")):
        with pytest.raises(InputError) as error:
            Run(path, {**old, **known}, False)
        assert str(error.value) == (
            f"{path} holds an unfinished run of another version of sersicnet or its libraries{told}, which cannot be "
            "continued. Give `overwrite` to start anew."
        )
    with Run(path, old, False) as run:
        assert run.arrays("tile") is not None
    with Run(path, new, True) as run:
        assert run.arrays("tile") is None
        assert not path.joinpath("config.json").exists()
        run.keep("state", 1)
    with Run(path, new, False) as run:
        assert run.read("state") == 1


def test_a_damaged_piece_is_done_again_and_a_damaged_state_is_told(tmp_path, caplog):
    path = tmp_path / "cat.run"
    with Run(path, {}, False) as run:
        run.keep_arrays("tile", {"x": np.arange(3)})
        file = path / "tile.npz"
        file.write_bytes(file.read_bytes()[:50])
        assert run.arrays("tile") is None
        assert "tile.npz cannot be read" in caplog.text
        run.keep("state", {})
        (path / "state.json").write_text("{")
        with pytest.raises(InputError, match=r"state.json cannot be read .*: the run is damaged. Remove .*cat.run to"):
            run.read("state")
    (path / "config.json").write_text("")
    with pytest.raises(InputError, match=r"config.json cannot be read .*: the run is damaged"):
        Run(path, {}, True)
    assert names(path) == ["config.json", "state.json", "tile.npz"]


def test_a_drop_that_was_interrupted_is_completed(tmp_path, monkeypatch):
    path = tmp_path / "cat.run"
    with Run(path, {"a": 1}, False) as run:
        run.keep_arrays("tile", {"x": np.arange(3)})
        run.keep("state", 1)
    with monkeypatch.context() as patch:
        patch.setattr(output, "_remove", die)
        with pytest.raises(SystemExit):
            Run(path, {"a": 2}, True)
    with Run(path, {"a": 1}, False) as run:
        assert run.arrays("tile") is None
        assert run.read("state") is None
    assert names(tmp_path) == []


def test_a_full_disk_leaves_what_was_kept(tmp_path, monkeypatch):
    path = tmp_path / "cat.run"
    with Run(path, {}, False) as run:
        run.keep("state", 1)
        with monkeypatch.context() as patch:
            patch.setattr(np, "savez", full_disk)
            patch.setattr(Path, "write_text", full_disk)
            for keep in (lambda: run.keep("state", 2), lambda: run.keep_arrays("tile", {"x": np.arange(3)})):
                with pytest.raises(OutputError) as error:
                    keep()
                assert "could not be written: No space left on device. What was kept before is intact; when the " in (
                    str(error.value)
                )
        assert run.read("state") == 1
    assert names(path) == ["config.json", "state.json"]


_HOLD = """
import sys, time
from pathlib import Path
from sersicnet.output import Run
with Run(Path(sys.argv[1]), {}, False) as run:
    if sys.argv[2] == "keep":
        run.keep("state", 1)
    print("held", flush=True)
    sys.stdin.read()
"""


def held(path, what="keep"):
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, path, what], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("what", ["keep", "nothing"])
def test_of_two_equal_commands_at_once_the_second_is_refused(tmp_path, what):
    path = tmp_path / "cat.run"
    with held(path, what) as first:
        before = {name: (path / name).read_bytes() for name in names(path)}
        for overwrite in (False, True, False):
            for config in ({}, {"other": 1}):
                with pytest.raises(InputError) as error:
                    Run(path, config, overwrite)
                assert re.fullmatch(
                    rf"{re.escape(str(path))} is in use: process {first.pid} on \S+ has held it since "
                    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC\. Wait until that command is done, or stop it\.",
                    str(error.value),
                )
        assert {name: (path / name).read_bytes() for name in names(path)} == before
        first.communicate("")
        assert first.returncode == 0
    with Run(path, {}, False) as run:
        assert run.read("state") == (1 if what == "keep" else None)
        run.remove()
    assert names(tmp_path) == []


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with pytest.warns(SersicnetWarning, match="a file system without locks"), Run(tmp_path / "a.run", {}, False) as run:
        run.keep("state", 1)
    assert names(tmp_path / "a.run") == ["config.json", "state.json"]


def test_within_a_process_as_well(tmp_path):
    with Run(tmp_path / "cat.run", {}, False), pytest.raises(InputError, match=f"process {os.getpid()} on"):
        Run(tmp_path / "cat.run", {}, False)
    Run(tmp_path / "cat.run", {}, False).close()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("what", ["keep", "nothing"])
def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path, what):
    path = tmp_path / "cat.run"
    with held(path, what) as first:
        first.send_signal(signal.SIGKILL)
        first.wait()
        first.stdin.close()
    with Run(path, {}, False) as run:
        assert run.read("state") == (1 if what == "keep" else None)
        assert json.loads((path / "holder.json").read_text())["pid"] == os.getpid()
    assert names(tmp_path) == (["cat.run"] if what == "keep" else [])


# --- names, links, permissions, what is no file ------------------------------------------------


@pytest.mark.parametrize(
    "name", ["x" * 245 + ".fits", "x" * 251 + ".csv", "é" * 125 + ".h5", "a." + "y" * 250, "x" * 255]
)
def test_names_as_long_as_the_file_system_allows_are_written(tmp_path, name):
    path = check_output(tmp_path / name, False)
    with whole(path) as partial:
        assert path.suffix not in (".fits", ".csv", ".h5") or partial.suffix == path.suffix
        partial.write_text("done")
    assert names(tmp_path) == [name]
    with Run(path.with_name(name + ".run"), {"a": 1}, False) as run:
        run.keep("b", 2)
    with Run(path.with_name(name + ".run"), {"a": 1}, False) as run:
        assert run.read("b") == 2
        run.remove()
    path.unlink()
    check_directory(path, "file", False)
    for text in ("old", "new"):
        fill(path, text)
    assert (path / "file").read_text() == "new"
    assert names(tmp_path) == [name]


def test_names_that_are_too_long_are_refused_before_the_work(tmp_path):
    for check in (lambda path: check_output(path, True), lambda path: check_directory(path, "mark", True)):
        with pytest.raises(
            InputError, match=r"at most 255 bytes long; x+\.\.\.x+\.fits has 261\. Choose a shorter name"
        ):
            check(tmp_path / ("x" * 256 + ".fits"))
        with pytest.raises(InputError, match=r"at most 255 bytes long; .* has 261"):
            check(tmp_path / ("é" * 128 + ".fits"))
        with pytest.raises(InputError, match="path is at most 4055 bytes long"):
            check(Path("/", *(["y" * 200] * 21), "cat.fits"))


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
@pytest.mark.parametrize(
    ("umask", "file", "directory"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)]
)
def test_new_files_have_the_permissions_of_the_umask(tmp_path, umask, file, directory):
    before = os.umask(umask)
    try:
        with whole(tmp_path / "cat.csv") as partial:
            partial.write_text("x")
        fill(tmp_path / "weights", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "cat.csv").stat().st_mode & 0o777 == file
    assert (tmp_path / "weights").stat().st_mode & 0o777 == directory


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "target.csv"
    (tmp_path / "b.csv").symlink_to(target)
    (tmp_path / "a.csv").symlink_to("b.csv")
    for text in ("first", "second"):  # at first the links lead nowhere
        path = check_output(tmp_path / "a.csv", True)
        with whole(path) as partial:
            assert partial.parent == target.parent
            partial.write_text(text)
        assert target.read_text() == text
    assert path.is_symlink()
    assert names(tmp_path / "elsewhere") == ["target.csv"]
    with pytest.raises(InputError, match="exists already"):
        check_output(path, False)


def test_links_that_lead_nowhere_are_refused(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "c").symlink_to(tmp_path / "missing" / "file")
    with pytest.raises(InputError, match="a symbolic link that leads back to itself"):
        check_output(tmp_path / "a", True)
    with pytest.raises(InputError, match=r"directory .*missing does not exist"):
        check_output(tmp_path / "c", True)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX files")
def test_pipes_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "link.csv").symlink_to("/dev/null")
    for path in (tmp_path / "pipe.csv", tmp_path / "link.csv", Path("/dev/null")):
        for overwrite in (False, True):
            with pytest.raises(InputError, match="is a pipe or a device"):
                check_output(path, overwrite)


def test_what_cannot_be_printed_is_escaped():
    assert printable("fjöld 星.fits") == "fjöld 星.fits"
    assert printable("a\tb\x1b[31m\n\udcff") == r"a\tb\x1b[31m\n\udcff"


def test_json_has_null_where_there_is_no_number():
    value = {"a": [float("nan"), 1.5, (float("inf"), np.float64("nan"))], "b": {"c": -float("inf")}, "d": "NaN"}
    assert json.loads(json_text(value), parse_constant=pytest.fail) == {
        "a": [None, 1.5, [None, None]], "b": {"c": None}, "d": "NaN",
    }  # fmt: skip


def test_an_output_larger_than_the_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: Mock(free=1000))
    check_space(tmp_path / "a", 1000, "They", "`n`")
    with pytest.raises(
        OutputError, match=r"They need at least 5\.0 GB on disk; 1\.0 kB are free for .*a\. Give a smaller `n`"
    ):
        check_space(tmp_path / "a", 5e9, "They", "`n`")
    with Run(tmp_path / "a.run", {}, False) as run:
        run.keep("what is done", "x" * 5000)
    check_space(tmp_path / "a", 5000, "They", "`n`")
