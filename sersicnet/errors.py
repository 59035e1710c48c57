"""The exceptions that sersicnet raises on purpose.

Each message is one line: the rule, the value received, what to do. The
command line prints it and exits with 1; anything else that escapes is a bug.
"""

from __future__ import annotations


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
