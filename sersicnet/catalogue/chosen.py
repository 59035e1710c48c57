"""The columns that a user wants in a catalogue."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from sersicnet.errors import InputError
from sersicnet.schema import COLUMN, COLUMNS, GROUPS, Column

ALL = "all"
"""Name of all columns that a catalogue can have."""

Wanted = tuple[str, ...]
"""Names of columns and groups: each with ``+`` before it, to be added to those by default, or none; empty for these."""


def wanted(columns: str | Sequence[str]) -> Wanted:
    """Read what the user asks for.

    Parameters
    ----------
    columns : str or sequence of str
        Names of columns of `sersicnet.schema.COLUMNS`, of groups of them (`sersicnet.schema.GROUPS`), or "all"; as
        text with commas between. With ``+`` before each, they are added to the columns by default. Nothing for these.

    Raises
    ------
    InputError
        If a name is not known, or only some have a ``+``.
    """
    if not columns:
        return ()
    names = tuple(name.strip() for name in (columns.split(",") if isinstance(columns, str) else columns))
    for name in names:
        bare = name.removeprefix("+")
        if bare not in (*COLUMN, *GROUPS, ALL):
            near = difflib.get_close_matches(bare, (*COLUMN, *GROUPS, ALL), 2)
            of_band = [known for known in COLUMN if bare.startswith(f"{known}_")]  # names are those of any band
            near = near or sorted(of_band, key=len)[-1:]
            raise InputError(
                f"`columns` lists columns of a catalogue, the groups {', '.join(GROUPS)}, or {ALL}; received {bare!r}"
                + (f". Is it {' or '.join(near)}?" if near else ".")
            )
    added = [name.startswith("+") for name in names]
    if any(added) and not all(added):
        raise InputError(
            "`columns` adds to the columns by default, with a + before each name, or replaces them, without; received "
            f"{','.join(names)}."
        )
    return names


def chosen(names: Wanted, available: Iterable[str]) -> list[str]:
    """The columns of a catalogue, in its order: those that are wanted and available.

    Parameters
    ----------
    names : tuple of str
        As `wanted` returns it.
    available : iterable of str
        Columns that the catalogue can have.
    """
    bare = {name.removeprefix("+") for name in names}
    adds = all(name.startswith("+") for name in names)
    have = set(available)
    return [
        column.name
        for column in COLUMNS
        if column.name in have
        and (bare & {column.name, column.group or column.name, ALL} or (adds and not column.group))
    ]


def check(names: Wanted, available: Iterable[str]) -> None:
    """Refuse columns that a run cannot have; of a group, some may be missing.

    Parameters
    ----------
    names, available
        As for `chosen`.

    Raises
    ------
    InputError
        Which states what the first of them needs.
    """
    have = set(available)
    for name in names:
        bare = name.removeprefix("+")
        meant = [column for column in COLUMNS if bare in (column.name, column.group)]
        if bare != ALL and not have & {column.name for column in meant}:
            raise InputError(f"`columns` lists {bare}, which needs {_need(meant[0], have)}. Leave it out.")


_NEEDS = {
    "image": "one catalogue of several images",
    "parent": "detections instead of positions",
    "mag_limit": "positions, several bands or fits",
    **dict.fromkeys(("sky", "chi2", "fit_status"), "fits"),
    **dict.fromkeys(("ra", "dec", "pa", "ra_err", "dec_err"), "a WCS"),
}


def _need(column: Column, have: set[str]) -> str:
    """What a run lacks for a column, in words."""
    if column.name in _NEEDS:
        return _NEEDS[column.name]
    if "arcsec" in column.unit and "r_eff" not in have:
        return "a pixel scale"
    correlated = column.group in ("correlations", "surface_brightness") or column.name == "theta_err"
    return f"weights that predict {'the correlations of errors' if correlated else 'errors'}, or fits"
