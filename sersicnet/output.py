"""Output that appears whole or not at all, and what an unfinished run keeps."""

from __future__ import annotations

import datetime
import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sersicnet.errors import InputError, OutputError, first_line, warn

if TYPE_CHECKING:
    import numpy as np
    from filelock import BaseFileLock

_log = logging.getLogger(__name__)

Report = Callable[[str, int, int], None]
"""Receives the name of a stage, the steps of it that are done, and how many it has; 0 if that is not known."""


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""


def json_text(value: Any, indent: int | None = 1) -> str:
    """A value as JSON, with null in the place of NaN and infinities, which JSON does not know."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_output(path: str | Path, overwrite: bool) -> Path:
    """Refuse an output file that cannot be written, before any work is done.

    Parameters
    ----------
    path : str or Path
    overwrite : bool
        Whether the file may exist.

    Returns
    -------
    Path

    Raises
    ------
    InputError
        If the path is a directory, a pipe or a device, its name is too long, its parent
        directory does not exist or cannot be written to, or the file exists and
        `overwrite` is not set. A symbolic link counts as the file that it leads to.
    """
    path = Path(path)
    _check_length(path)
    if path.is_dir():
        raise InputError(f"The output must be a file; {path} is a directory. Add a file name.")
    target = _target(path)
    if not target.parent.is_dir():
        raise InputError(f"The output's directory {target.parent} does not exist. Create it first.")
    if path.exists() and not path.is_file():
        raise InputError(f"The output must be a file; {path} is a pipe or a device. Choose another name.")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already. Choose another name, or give `overwrite`.")
    if not os.access(target.parent, os.W_OK):
        raise InputError(f"The output's directory {target.parent} cannot be written to. Choose another one.")
    return path


def check_apart(written: Iterable[Path], *read: Any) -> None:
    """Refuse an output that would replace a file which is read.

    Parameters
    ----------
    written : iterable of Path
    *read : any
        Paths, also with an extension in brackets after them, as in ``cat.fits[CATALOG]``; and what has the name of the
        file that it was read from. Anything else does not count.

    Raises
    ------
    InputError
    """
    paths = [str(one if isinstance(one, str | Path) else getattr(one, "name", "")) for one in read]
    paths += [path.rpartition("[")[0] for path in paths if path.endswith("]")]
    inputs = {os.path.realpath(path) for path in paths if path}
    if lost := [path.name for path in written if os.path.realpath(path) in inputs]:
        raise InputError(f"No output replaces a file that is read; received {lost[0]} for both. Give another name.")


def _target(path: Path) -> Path:
    """The file or directory that a path leads to, through all symbolic links.

    Raises
    ------
    InputError
        If the links go in a circle.
    """
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise InputError(f"{path} is a symbolic link that leads back to itself. Choose another name.")
    return target


def _longest_name(directory: Path) -> int:
    """Most bytes of a name in a directory."""
    try:
        return os.pathconf(directory, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # Windows, or no such directory
        return 255


_LONGEST_PATH = 4095
_ADDED = 40
"""Bytes that names beside an output may be longer than a short name of an output."""


def _check_length(path: Path) -> None:
    """Refuse a path that is too long for the file system, or for the temporary file beside it."""
    longest, length = _longest_name(path.parent), len(os.fsencode(path.name))
    if length > longest:
        raise InputError(
            f"The output's name is at most {longest} bytes long; {path.name[:20]}...{path.name[-20:]} has {length}. "
            "Choose a shorter name."
        )
    length = len(os.fsencode(path.absolute()))
    if length + _ADDED > _LONGEST_PATH:
        raise InputError(
            f"The output's path is at most {_LONGEST_PATH - _ADDED} bytes long; ...{str(path)[-40:]} has {length}. "
            "Choose a shorter one."
        )


def check_space(path: Path, needed: float, what: str, parameter: str) -> None:
    """Refuse an output that is larger than what is free on its disk, the unfinished run of it included.

    Parameters
    ----------
    path : Path
    needed : float
        Bytes.
    what : str
        What needs them, for the message.
    parameter : str
        What to make smaller, for the message.

    Raises
    ------
    OutputError
    """
    target = _target(path)
    run = _beside(path, "", ".run")
    with suppress(OSError):
        free = shutil.disk_usage(target.absolute().parent).free
        free += sum(entry.stat().st_size for entry in run.iterdir()) if run.is_dir() else 0
        if needed > free:
            from rich.filesize import decimal

            raise OutputError(
                f"{what} need at least {decimal(int(needed))} on disk; {decimal(free)} are free for {path}. Give "
                f"a smaller {parameter}, or a name on another disk."
            )


_SHORT = 24
"""Characters of an output's name that names beside it begin with."""


def _short(path: Path) -> str:
    """The beginning of a path's name without its ending, in characters that every library takes in names of files."""
    return re.sub(r"[^\w.-]", "_", path.stem[:_SHORT])


def _beside(path: Path, before: str, after: str) -> Path:
    """A path beside another one, its name with something before and after it; shortened if it would be too long."""
    name = f"{before}{path.name}{after}"
    if len(os.fsencode(name)) > _longest_name(path.parent):
        digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]
        name = f"{before}{path.name[:_SHORT]}-{digest}{after}"
    return path.with_name(name)


def check_directory(path: Path, mark: str, overwrite: bool) -> None:
    """Refuse an output directory that exists, or that a user would not want replaced.

    Parameters
    ----------
    path : Path
    mark : str
        Name of a file that every directory made by the command holds.
    overwrite : bool
        Whether the directory may exist.

    Raises
    ------
    InputError
        If the directory exists and `overwrite` is not set, or it exists without `mark`,
        or its name is too long, or its parent directory does not exist. A symbolic link
        counts as the directory that it leads to.
    """
    _check_length(path)
    target = _target(path)
    if not target.absolute().parent.is_dir():
        raise InputError(f"The output's directory {target.parent} does not exist. Create it first.")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already. Choose another name, or give `overwrite`.")
    if not os.access(target.absolute().parent, os.W_OK):
        raise InputError(f"The output's directory {target.parent} cannot be written to. Choose another one.")
    if path.exists() and not (path / mark).is_file():
        raise InputError(f"{path} was not made by this command (it has no {mark}), so it is not overwritten.")


# --- whole or not at all ----------------------------------------------------------------------

_LONGEST_ENDING = 12
"""Characters of endings that temporary files keep, such as ``.fits.gz``."""

_WHOLE = "What was there before is intact; when the disk is well again, repeat the command"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to be written, which is renamed to `path` at the end.

    Parameters
    ----------
    path : Path
        Replaced if it exists; through a symbolic link, the file that it leads to.

    Yields
    ------
    Path
        An empty file with the same ending, and the permissions of a new file.

    Raises
    ------
    OutputError
        If the disk refuses; `path` is as it was.
    """
    partial = None
    path = _target(path)
    with _explained(path, _WHOLE):
        try:
            ending = "".join(path.suffixes[-2:])
            ending = ending if len(ending) <= _LONGEST_ENDING else path.suffix[:_LONGEST_ENDING]
            new = path.with_name(f".{_short(path)}-{secrets.token_hex(4)}{ending}")
            new.touch(exist_ok=False)
            partial = new
            yield partial
            partial.replace(path)
        finally:
            if partial is not None:
                partial.unlink(missing_ok=True)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A directory beside `path` to be filled, which is renamed to `path` at the end.

    A directory that exists is renamed to ``.<name>.old`` first, and removed when the new
    one is in its place. If the process dies between the two renames, the next call
    renames it back.

    Parameters
    ----------
    path : Path
        Replaced if it exists; through a symbolic link, the directory that it leads to.

    Yields
    ------
    Path
        An empty directory.

    Raises
    ------
    OutputError
        If the disk refuses; `path` is as it was.
    """
    path = _target(path)
    old = _beside(path, ".", ".old")
    partial = None
    with _explained(path, _WHOLE):
        try:
            if old.exists() and not path.exists():
                old.rename(path)
            new = path.with_name(f".{_short(path)}-{secrets.token_hex(4)}")
            new.mkdir()
            partial = new
            yield partial
            _remove(old)
            if path.exists():
                path.rename(old)
            try:
                partial.rename(path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise
            _remove(old)
        finally:
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a file, a link or a directory, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _explained(path: Path, consolation: str) -> Iterator[None]:
    """Say that the disk refuses to hold `path`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "errno = " not in str(error):
            raise  # h5py raises either, but not only for the disk
        name = str(getattr(error, "filename", None) or path)
        if path.stem not in name and _short(path) not in name:
            raise  # another file is the matter, such as one that is read meanwhile
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else first_line(error)
        raise OutputError(f"{path} could not be written: {reason}. {consolation}.") from error


# --- unfinished runs --------------------------------------------------------------------------

CONFIG, DROPPED, LOCK, HOLDER = "config.json", "dropped.json", "lock", "holder.json"

_KEPT = "What was kept before is intact; when the disk is well again, the same command continues"


class Run:
    """All that an unfinished run keeps, in a directory; a context manager.

    Every file is written under another name and renamed, so that a run can be killed at
    any moment. The directory is locked for as long as the run is open: a second equal
    command is refused rather than let the two destroy each other's files. The operating
    system releases the lock of a process that was killed. When the run is closed before
    anything was kept, no directory is left.

    Parameters
    ----------
    path : Path or None
        The directory, usually ``<output>.run``. None keeps nothing. A name that is too
        long for the file system is shortened, always in the same way.
    config : mapping
        Options that determine the result; can be written as JSON. An unfinished run is
        continued only if they are equal.
    overwrite : bool
        Whether to drop an unfinished run with other options.

    Attributes
    ----------
    path : Path or None

    Raises
    ------
    InputError
        If there is an unfinished run with other options, another process holds the run,
        or the run is damaged.
    OutputError
        If the disk refuses.
    """

    def __init__(self, path: Path | None, config: Mapping[str, Any], overwrite: bool) -> None:
        path = None if path is None else _beside(path, "", "")
        self.path, self._made = path, False
        self._lock: BaseFileLock | None = None
        if path is None:
            return
        self._config = _text(config)
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} should be a directory for what is finished, and is a file. Move it away.")
        if not path.absolute().parent.is_dir():
            raise InputError(f"The directory {path.parent} does not exist. Create it first.")
        with _explained(path, _KEPT):
            self._made = not path.exists() or (path / LOCK).exists()
            self._take_lock(path)
        try:
            with _explained(path, _KEPT):
                if (path / DROPPED).exists():
                    self._drop(path)
            found = self.read(CONFIG.removesuffix(".json"))
            if found is not None and _text(found) != self._config:
                if not overwrite:
                    raise InputError(f"{path} holds an unfinished run {_unlike(found, config)} to start anew.")
                with _explained(path, _KEPT):
                    self._drop(path)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let others have the run; what was kept stays."""
        lock, self._lock = self._lock, None
        if lock is None or self.path is None:
            return
        with suppress(OSError):
            (self.path / HOLDER).unlink(missing_ok=True)
        with suppress(OSError):  # Windows removes no file that is open
            (self.path / LOCK).unlink(missing_ok=True)
        lock.release()
        if self._made:
            with suppress(OSError):  # not empty
                self.path.rmdir()

    @property
    def has_begun(self) -> bool:
        """Whether anything is kept."""
        return self.path is not None and (self.path / CONFIG).exists()

    def remove(self) -> None:
        """Drop all that was kept, and close the run: it is done."""
        if self.path is not None and self.has_begun:
            with _explained(self.path, "The output is complete; remove the directory by hand"):
                self._drop(self.path)
        self.close()

    def arrays(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays of ``<name>.npz``; None if they were not kept, or the file is damaged, which is logged."""
        import numpy as np  # which `sersicnet --help` need not wait for

        if self.path is None or not (file := self.path / f"{name}.npz").exists():
            return None
        try:
            with file.open("rb") as handle, np.load(handle, allow_pickle=False) as found:
                return dict(found)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            _log.warning("%s cannot be read (%s): this piece is done again", file, first_line(error))
            return None

    def keep_arrays(self, name: str, arrays: Mapping[str, Any]) -> None:
        """Keep arrays in ``<name>.npz``."""
        import numpy as np

        if self.path is not None:
            with self.writing(f"{name}.npz") as partial, partial.open("wb") as file:
                np.savez(file, **arrays)

    def read(self, name: str) -> Any:
        """The value in ``<name>.json``; None if it was not kept.

        Raises
        ------
        InputError
            If the file is damaged.
        """
        if self.path is None or not (file := self.path / f"{name}.json").exists():
            return None
        try:
            return json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise InputError(
                f"{file} cannot be read ({first_line(error)}): the run is damaged. Remove {self.path} to start anew."
            ) from error

    def keep(self, name: str, value: Any) -> None:
        """Keep a value that can be written as JSON in ``<name>.json``."""
        if self.path is not None:
            with self.writing(f"{name}.json") as partial:
                partial.write_text(json.dumps(value, indent=1))

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A file to be written, which becomes the file `name` of the run at the end.

        Raises
        ------
        OutputError
            If the disk refuses; the file that had the name before stays.
        """
        path = self._begun()
        partial = path / f"partial-{name}"
        with self.explained(name):
            try:
                yield partial
                partial.replace(path / name)
            finally:
                partial.unlink(missing_ok=True)

    def appending(self, name: str) -> FileIO:
        """The file `name` of the run, opened to be read and appended to, without a buffer."""
        path = self._begun()
        with self.explained(name):
            return (path / name).open("a+b", buffering=0)

    def explained(self, name: str) -> AbstractContextManager[None]:
        """Turn a refusal of the disk to hold the file `name` into an `OutputError`."""
        return _explained(Path(name) if self.path is None else self.path / name, _KEPT)

    def _begun(self) -> Path:
        """The directory, with the configuration in it."""
        if self.path is None:
            raise ValueError("a run without a path keeps nothing")
        if not (self.path / CONFIG).exists():
            with _explained(self.path, _KEPT):
                self.path.mkdir(exist_ok=True)
                partial = self.path / f"partial-{CONFIG}"
                partial.write_text(self._config)
                partial.replace(self.path / CONFIG)
        return self.path

    def _take_lock(self, path: Path) -> None:
        from filelock import FileLock, Timeout  # takes 0.05 s, which `sersicnet --help` need not wait for

        lock = FileLock(path / LOCK)
        for _ in range(10):
            # Another process may remove the directory, which it held, at any moment.
            with suppress(FileNotFoundError):
                path.mkdir(exist_ok=True)
                try:
                    lock.acquire(timeout=0)
                except Timeout as error:
                    raise InputError(
                        f"{path} is in use: {_held_by(path / HOLDER)}. Wait until that command is done, or stop it."
                    ) from error
                except OSError as error:
                    if error.errno not in _NO_LOCKS:
                        raise
                    warn(f"{path} is on a file system without locks: do not run a second command with this output.")
                break
        else:
            raise InputError(f"{path} was removed while this command began. Repeat the command.")
        self._lock = lock
        now = datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds").replace("+00:00", " UTC")
        # Not in the lock file, which older versions of filelock empty when another process tries to lock it.
        (path / HOLDER).write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}))

    def _drop(self, path: Path) -> None:
        """Remove all that was kept. The mark that this was begun goes last, so that a kill in between is mended."""
        if (path / CONFIG).exists():
            (path / CONFIG).replace(path / DROPPED)
        for entry in path.iterdir():
            if entry.name not in (DROPPED, LOCK, HOLDER):
                _remove(entry)
        (path / DROPPED).unlink(missing_ok=True)
        self._made = True


_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def _held_by(file: Path) -> str:
    """Who holds a run, in words."""
    try:
        holder = json.loads(file.read_text())
        return f"process {holder['pid']} on {holder['host']} has held it since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process holds it"


def _text(config: Any) -> str:
    return json.dumps(config, indent=1, sort_keys=True)


_OF_VERSION = ("version", "versions", "method", "values of a source")
"""What a configuration holds of the version that began the run; a user cannot repeat it."""

_MOST_TOLD = 6
"""Number of options that a message about other options names."""


def _unlike(found: Any, config: Mapping[str, Any]) -> str:
    """How an unfinished run differs, with both values of each option if these are short, and what to do."""
    before, now = _flat(found if isinstance(found, dict) else {}), _flat(json.loads(json.dumps(config)))
    names = [name for name in {**now, **before} if _text(before.get(name)) != _text(now.get(name))]
    # Another version may know an option that is not set here: then no value differs.
    of_version = [name for name in names if name.partition(".")[0] in _OF_VERSION]
    told, names = [], of_version or names
    for name in names[:_MOST_TOLD]:
        values = [_shown(options.get(name)) for options in (before, now)]
        told.append(f"{name}: {values[0]}, now {values[1]}" if max(map(len, values)) < 40 else name)
    if len(names) > _MOST_TOLD:
        told.append(f"{len(names) - _MOST_TOLD} more")
    details = f" ({'; '.join(told)})" if told else ""
    if of_version or not names:
        return f"of another version of sersicnet or its libraries{details}, which cannot be continued. Give `overwrite`"
    return f"with other options{details}. Repeat its command, or give `overwrite`"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.8g}"
    return value if isinstance(value, str) else json.dumps(value)


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a configuration, those of nested ones under names with dots."""
    out: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            out |= {f"{name}.{inner}": each for inner, each in _flat(value).items()}
        else:
            out[name] = value
    return out
