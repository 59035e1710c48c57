"""The exceptions and warnings of sersicnet.

Each message is one line: the rule, the value received, what to do. Parameters are named
in backticks, and the command line replaces them by its options. It prints the message and
exits with 1; any other exception is a bug.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path


class SersicnetError(Exception):
    """Base class of every error that a user can cause or mend."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the message, which says what to do, without a traceback."""
        return [f"{type(self).__name__}: {self}"]


class InputError(SersicnetError):
    """An image, table, option or output path that cannot be used."""


class DatasetError(SersicnetError):
    """A training set or a table of labels that cannot be used."""


class WeightsError(SersicnetError):
    """A weights directory that is missing, damaged or of another kind."""


class OutputError(SersicnetError):
    """The disk refuses to be written to: it is full, or permission is missing."""


class WorkError(SersicnetError):
    """Work could not be done: a worker process was killed, or no scheduler answers."""


class SersicnetWarning(UserWarning):
    """Something that a user should know, though the work goes on."""


_NOT_CALLERS = (str(Path(__file__).parent) + os.sep, contextlib.__file__)


def warn(message: str) -> None:
    """Issue a `SersicnetWarning` at the line outside of sersicnet that called it."""
    level = 2
    while _is_inside(level) and _is_inside(level + 1) is not None:
        level += 1
    warnings.warn(message, SersicnetWarning, stacklevel=level)


def _is_inside(level: int) -> bool | None:
    """Whether the frame that many levels above this function's caller is sersicnet's; None if there is none."""
    try:
        frame = sys._getframe(level)
    except ValueError:
        return None
    return frame.f_code.co_filename.startswith(_NOT_CALLERS)


def printable(text: str) -> str:
    r"""Text on one line: control characters, and bytes of a file's name that are no text, as escapes like ``\x07``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def counted(n: int, one: str, several: str = "") -> str:
    """A number and what it counts, such as ``1 source``, ``1,200 sources`` or ``2 galaxies``."""
    return f"{n:,} {one if n == 1 else several or one + 's'}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
