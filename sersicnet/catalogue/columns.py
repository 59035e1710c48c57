"""A finished catalogue as plain arrays, and its rows by what their flags mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sersicnet.errors import printable
from sersicnet.image.exposure import Exposure
from sersicnet.image.pixels import Window
from sersicnet.schema import TARGETS, Flag

if TYPE_CHECKING:
    from astropy.table import QTable

    from sersicnet.image.sky import Mesh

Draw = Callable[[Window], np.ndarray]
"""The model of all galaxies in a window: float32 in image units, without the sky."""


class FlagClass(NamedTuple):
    """Flags that mean much the same in a picture.

    Attributes
    ----------
    name : str
    bits : int
    colour : str
        As HTML, Matplotlib and ds9 read it; the palette of Okabe & Ito, which colour-blind readers can distinguish.
    """

    name: str
    bits: int
    colour: str


CLASSES = (
    FlagClass("no data", Flag.NO_DATA, "#000000"),
    FlagClass("point-like or saturated", Flag.POINT_LIKE | Flag.SATURATED, "#cc79a7"),
    FlagClass("low signal to noise", Flag.LOW_SNR, "#009e73"),
    FlagClass("values in doubt", Flag.OUT_OF_RANGE | Flag.LARGE | Flag.NOT_REFINED, "#d55e00"),
    FlagClass("crowded, masked or at an edge", Flag.CROWDED | Flag.BLENDED | Flag.MASKED | Flag.EDGE, "#e69f00"),
    FlagClass("other flags", -1, "#56b4e9"),
    FlagClass("no flags", 0, "#0072b2"),
)
"""A row belongs to the first class that has one of its bits, and to the last one if it has none."""


def classes(flags: np.ndarray) -> np.ndarray:
    """The class of each row, an index of `CLASSES`, int, (N,)."""
    out = np.full(len(flags), len(CLASSES) - 1)
    for k in reversed(range(len(CLASSES) - 1)):
        out[flags & CLASSES[k].bits != 0] = k
    return out


def column(table: QTable, name: str) -> np.ndarray:
    """A column as float64, (N,); all NaN if the table does not have it."""
    if name not in table.colnames:
        return np.full(len(table), np.nan)
    column = table[name]
    return np.ma.filled(np.ma.asarray(getattr(column, "value", column), dtype=float), np.nan)


def flags_of(table: QTable) -> np.ndarray:
    """The column of flags, int, (N,); all 0 if the table has none."""
    if "flags" not in table.colnames:
        return np.zeros(len(table), int)
    return np.asarray(table["flags"], dtype=int)


class Measurement:
    """A catalogue with the image that was measured, and its columns as plain arrays.

    Parameters
    ----------
    table : QTable
        As `sersicnet.measuring.measure.measure` returns it, with its provenance.
    exposure : Exposure
    mesh : Mesh
    draw : callable or None
        See `Draw`.

    Attributes
    ----------
    kind : ndarray, int, (N,)
        The class of each row in `CLASSES`.
    clean : ndarray, bool, (N,)
        Whether the row has no flags.
    x, y, theta, mag, r_eff, n, e : ndarray, float64, (N,)
        NaN where the table has no value; `r_eff` in pixels.
    """

    def __init__(self, table: QTable, exposure: Exposure, mesh: Mesh, draw: Draw | None) -> None:
        self.table, self.exposure, self.mesh, self.draw = table, exposure, mesh, draw
        self.meta: Mapping[str, Any] = table.meta
        self.name = printable(str(self.meta.get("IMAGE", exposure.image.name)))
        self.flags = flags_of(table)
        self.kind = classes(self.flags)
        self.clean = self.flags == 0
        self.x, self.y, self.theta = (column(table, name) for name in ("x", "y", "theta"))
        self.mag, self.r_eff, self.n, self.e = (column(table, target.name) for target in TARGETS)

    @property
    def scale(self) -> float:
        """Arcsec per pixel, NaN if not known."""
        return self.number("PIXSCALE")

    @property
    def measured_scale(self) -> float:
        """Arcsec per pixel of the grid that was measured, which SKYRMS and PSFFWHM refer to."""
        factor = self.number("RESAMPLE")
        return self.scale / factor if factor > 0 else self.scale

    def number(self, key: str) -> float:
        """A number of the provenance; NaN if it is not there."""
        try:
            return float(self.meta.get(key, np.nan))
        except (TypeError, ValueError):
            return np.nan

    def area(self, usable: int) -> float:
        """Area of as many pixels, arcmin²; NaN without a pixel scale."""
        return usable * self.scale**2 / 3600

    def sizes(self) -> tuple[np.ndarray, str]:
        """Effective radii, and their unit: arcsec, or pixels without a pixel scale."""
        if np.isfinite(self.scale):
            return self.r_eff * self.scale, "arcsec"
        return self.r_eff, "pixels"
