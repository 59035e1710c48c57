"""The table of positions: where its galaxies are in an image, and what it says of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from astropy.table import QTable, Table

from sersicnet.catalogue.parameters import Galaxies
from sersicnet.errors import InputError, warn
from sersicnet.image.exposure import Exposure
from sersicnet.schema import TARGET_NAMES

Positions: TypeAlias = str | Path | Table | Galaxies
"""A table of positions, as users and other modules give it."""


@dataclass(frozen=True, eq=False)
class Listed:
    """What the catalogue of an image takes from the table of positions.

    Attributes
    ----------
    name : str
        Name of the table, for messages.
    ids : ndarray, int, (N,) or None
        Ids of its rows; None if it has none, and rows are counted from 1.
    band : str
        The band whose columns are used, of a table of several bands; empty for others.
    """

    name: str
    ids: np.ndarray | None
    band: str

    def mark(self, table: QTable) -> dict[str, str]:
        """Give the rows of a catalogue their ids, in place; returns cards for its header."""
        if self.ids is not None:
            table["id"][:] = self.ids
        return {"FROMBAND": self.band} if self.band else {}


def inside(places: np.ndarray, exposure: Exposure) -> np.ndarray:
    """Which places, (N, 2), are on the image, bool, (N,)."""
    with np.errstate(invalid="ignore"):
        return np.asarray(((places > -0.5) & (places < np.array(exposure.shape[::-1]) - 0.5)).all(axis=1))


def _warn_of_none(galaxies: Galaxies, places: np.ndarray, exposure: Exposure) -> None:
    if not len(places):
        warn(f"{galaxies.name} has no rows, and neither has the catalogue.")
    elif not inside(places, exposure).any():
        warn(
            f"None of the {len(places)} positions of {galaxies.name} is inside {exposure.name}: all rows are NaN, with "
            "the flag NO_DATA. Are both of the same field?"
        )


def read_positions(
    positions: Positions | None,
    exposure: Exposure,
    from_band: str | None = None,
    fix: Sequence[str] = (),
    *,
    with_network: bool,
) -> tuple[Listed | None, np.ndarray | None, dict[str, np.ndarray]]:
    """The user's table, its places in an image, and the values that fits start from or keep.

    Parameters
    ----------
    positions : str, Path, Table or Galaxies, optional
    exposure : Exposure
    from_band : str, optional
        See `galaxies_of`.
    fix : sequence of str
        What fits keep of the table.
    with_network : bool
        Whether a network measures at the positions, which nothing else of the table is used for.

    Returns
    -------
    Listed or None
        None without a table.
    ndarray, float64, (N, 2) or None
        Zero-based x and y, see `places_of`.
    dict
        See `starts_of`.

    Raises
    ------
    InputError
        If it cannot be read, has no such band, or lacks what is to be kept.
    """
    if fix and (positions is None or with_network):
        raise InputError(
            "`fix` keeps values of a table in fits without a network: give `positions` to `sersicnet fit`."
        )
    if positions is None:
        if from_band is not None:
            raise InputError(f"`from_band` chooses a band of a table: give `positions` with it; received {from_band}.")
        return None, None, {}
    galaxies = galaxies_of(positions, from_band, shapes=not with_network)
    places = places_of(galaxies, exposure)
    _warn_of_none(galaxies, places, exposure)
    starts = {} if with_network else starts_of(galaxies, exposure, places)
    names = {"r_eff": "r_eff_pix"}
    missing = [name for name in fix if name != "position" and names.get(name, name) not in starts]
    if missing:
        raise InputError(
            f"`fix` keeps columns of {galaxies.name}: it has no {', '.join(missing)}. It has {galaxies.columns}."
        )
    return Listed(galaxies.name, galaxies.ids(), galaxies.band), places, starts


def galaxies_of(positions: Positions, from_band: str | None, *, shapes: bool) -> Galaxies:
    """The user's table; one of several bands is read for one of them if more than positions is used (`shapes`).

    Raises
    ------
    InputError
        If it cannot be read, or `from_band` is none of its bands; see
        `sersicnet.catalogue.parameters.Galaxies.of_band`.
    """
    if isinstance(positions, Galaxies):
        return positions
    galaxies = Galaxies(positions, "`positions`") if isinstance(positions, Table) else Galaxies.read(positions)
    return galaxies.of_band(from_band) if shapes else galaxies


def places_of(galaxies: Galaxies, exposure: Exposure) -> np.ndarray:
    """The x and y of galaxies in pixels of an image, float64, (N, 2).

    Positions on the sky are preferred, unless the image has no WCS.

    Raises
    ------
    InputError
        If the table has neither kind of positions, or none that can be used.
    """
    sky, pixels = galaxies.sky(), galaxies.pixels()
    if sky is not None and (exposure.wcs is not None or pixels is None):
        return np.column_stack(exposure.image.pixels(*sky.T))
    if pixels is not None:
        return pixels
    raise InputError(f"A table of positions has columns x and y, or ra and dec; received {galaxies.columns}.")


def starts_of(galaxies: Galaxies, exposure: Exposure, places: np.ndarray | None) -> dict[str, np.ndarray]:
    """Targets and theta of galaxies, from the columns that their table has.

    With positions on the sky, radii in arcsec and position angles come first: the table may be of another image.
    A radius in an unknown unit is not used.
    """
    found = {name: galaxies.parameter(name) for name in (*TARGET_NAMES, "theta") if name != "r_eff_pix"}
    scale, radii = exposure.pixel_scale.value, galaxies.radii()
    on_sky = exposure.wcs is not None and galaxies.sky() is not None
    if on_sky and "arcsec" in radii and np.isfinite(scale):
        found["r_eff_pix"] = radii["arcsec"] / scale
    elif radii.keys() & {"pix", "arcsec"}:
        found["r_eff_pix"] = galaxies.radius_in_pixels(scale, "give `pixel_scale`, or r_eff_pix.")
    if on_sky and places is not None and galaxies.has("pa"):
        found["theta"] = exposure.image.direction(places[:, 0], places[:, 1], galaxies.column("pa", "deg"))
    return {name: values for name, values in found.items() if values is not None}


def digest(places: np.ndarray | None, starts: Mapping[str, np.ndarray]) -> str | None:
    """SHA-256 of positions and of the values that fits start from or keep; None without positions."""
    if places is None:
        return None
    seen = hashlib.sha256(places.tobytes())
    for name in sorted(starts):
        seen.update(name.encode() + starts[name].tobytes())
    return seen.hexdigest()
