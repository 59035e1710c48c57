"""Telescopes by name, or described by a file of the user's."""

from __future__ import annotations

import functools
import math
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

from sersicnet.errors import InputError, first_line
from sersicnet.simulating.observatories import Telescope, telescopes
from sersicnet.simulating.optics import RESAMPLINGS


def cameras(name: str) -> tuple[tuple[Telescope, ...], str]:
    """The cameras of a name such as ``hst``, ``hst-ir/F160W`` or ``mine.toml``, and the filter, or an empty string.

    Raises
    ------
    InputError
        If there is none, see `telescopes` and `read_telescope`.
    """
    path, described, band = name.partition(".toml")
    if described:
        return (read_telescope(Path(path + described)),), band.lstrip("/")
    name, _, band = name.partition("/")
    return telescopes(name), band


_OPTIONAL = {"title": "", "source": "", "resampling": "none", "correlation": (0.0, 0.1), "exposures": (1, 1)}
_ONE_OF = "wavelengths", "pixel_scales", "electrons", "depth"
_NUMBERS = "detector", "diameter", "obscuration", "struts", "strut_width", "band"


@functools.lru_cache(8)
def read_telescope(path: Path) -> Telescope:
    """The telescope that a TOML file describes.

    Parameters
    ----------
    path : Path
        Its keys are the attributes of `Telescope`. It needs ``wavelengths`` (a table of filters), ``pixel_scales``,
        ``electrons`` and ``depth``, and ``diameter`` (in space) or ``seeing`` (on the ground). A range is a number or
        two.

    Raises
    ------
    InputError
        If the file cannot be read, or does not describe a telescope.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(
            f"A telescope is described by a TOML file; {path} cannot be read: {first_line(error)}."
        ) from None
    known = {field.name for field in fields(Telescope)}
    unknown, missing = sorted(set(found) - known), [name for name in _ONE_OF if name not in found]
    if unknown:
        raise InputError(
            f"{path} has the key {unknown[0]}, which no telescope has. The keys are {', '.join(sorted(known))}."
        )
    if missing:
        raise InputError(f"A telescope needs {', '.join(_ONE_OF)}; {path} lacks {missing[0]}.")
    values: dict[str, Any] = {"zero_points": math.nan, **_OPTIONAL, "title": path.stem, **found}
    if values["resampling"] not in RESAMPLINGS:
        raise InputError(f"The resampling is one of {', '.join(RESAMPLINGS)}; {path} has {values['resampling']!r}.")
    for name in sorted(set(found) - {"title", "source", "resampling", "hexagons"}):
        values[name] = _numbers(found[name], name, path)
    values["detector"] = values.get("detector", values["pixel_scales"][0])
    telescope = Telescope(**values)
    if not (telescope.diameter > 0 or telescope.seeing[0] > 0):
        raise InputError(f"A telescope has a diameter (in space) or a seeing (on the ground); {path} has neither.")
    return telescope


def _numbers(value: Any, name: str, path: Path) -> Any:
    """A value of a description: a number, a range, one or more pixel scales, or numbers by filter."""
    by_filter = isinstance(value, dict) and name in ("wavelengths", "zero_points")
    listed = list(value.values()) if by_filter else value if isinstance(value, list) else [value]
    good = listed and all(isinstance(v, int | float) and not isinstance(v, bool) for v in listed)
    good = good and all(math.isfinite(v) and (v >= 0 or name in ("zero_points", "depth")) for v in listed)
    single = name in _NUMBERS or name == "zero_points"
    if by_filter:
        good = good and (name != "wavelengths" or min(listed) > 0)
    elif name == "wavelengths" or (single and isinstance(value, list)):
        good = False
    elif not single and name != "pixel_scales":
        good = good and len(listed) <= 2 and listed[0] <= listed[-1]
    elif name in ("pixel_scales", "detector"):
        good = good and min(listed) > 0
    if not good:
        raise InputError(
            "A telescope has positive wavelengths by filter, positive pixel_scales, and one number or a range "
            f"from low to high of the others; {path} has {name} = {value!r}."
        )
    if by_filter:
        return {band: float(v) for band, v in value.items()}
    if single:
        return int(value) if name == "struts" else float(value)
    return tuple(listed) if name == "pixel_scales" else (listed[0], listed[-1])
