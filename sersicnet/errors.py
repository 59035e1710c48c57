"""The exceptions that sersicnet raises on purpose.

Each message is one line: the rule, the value received, what to do. The
command line prints it and exits with 1; anything else that escapes is a bug.
"""

from __future__ import annotations

import os
from pathlib import Path


class SersicnetError(Exception):
    """Base class of every error that a user can cause and mend."""


class InputError(SersicnetError):
    """An image, table, option or output path that cannot be used."""


class DatasetError(SersicnetError):
    """A training set or a table of labels that cannot be used."""


class WeightsError(SersicnetError):
    """A weights directory that is missing, damaged or of another kind."""


class SersicnetWarning(UserWarning):
    """Something that a user should know, though the work goes on."""


def check_output(path: str | Path, overwrite: bool) -> Path:
    """Refuse an output file that cannot be written, before any work is done.

    Raises
    ------
    InputError
        If it is a directory, has no directory to be in, or exists and
        `overwrite` is not set.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"The output must be a file; {path} is a directory. Add a file name.")
    if not path.parent.is_dir():
        raise InputError(f"The output's directory {path.parent} does not exist. Create it first.")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already. Choose another name, or give --overwrite.")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"The output's directory {path.parent} cannot be written to. Choose another one.")
    return path
