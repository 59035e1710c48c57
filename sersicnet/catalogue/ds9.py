"""A catalogue as a region file for ds9."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import sersicnet
from sersicnet.catalogue.columns import CLASSES, classes, column, flags_of
from sersicnet.image import mosaic
from sersicnet.output import whole

if TYPE_CHECKING:
    from astropy.table import QTable


def write_regions(table: QTable, path: str | Path, frame: mosaic.Image) -> None:
    """Write a catalogue as a ds9 region file, coloured by `CLASSES`, with the ids.

    A source is an ellipse at its effective radius; a circle if its angle is not known, and a
    cross if it has no parameters. Coordinates are ICRS if the image has a WCS, else pixels,
    which ds9 counts from 1.

    Parameters
    ----------
    table : QTable
        As `sersicnet.measuring.measure.measure` returns it.
    path : str or Path
        Region file; it appears whole or not at all.
    frame : mosaic.Image
        The image; its WCS gives the angles on the sky.

    Raises
    ------
    OutputError
        If it cannot be written.

    Notes
    -----
    In celestial coordinates ds9 (since 7.6) has the angle of an ellipse 90 degrees ahead of the
    position angle east of north, for either parity. It turns all regions
    by the north of the image's centre; right at a celestial pole, where north differs from place
    to place, it draws them turned by that difference.
    """
    x, y, r_eff, e, theta = (column(table, name) for name in ("x", "y", "r_eff_pix", "ellipticity", "theta"))
    if frame.wcs is None:
        system, unit, longitude, latitude, angle = "image", "", x + 1, y + 1, theta
    else:
        assert frame.scales is not None
        system, unit = "icrs", '"'
        longitude, latitude = frame.sky(x, y) if len(table) else (x, y)
        angle = frame.position_angle(x, y, theta) + 90 if len(table) else theta
        r_eff = r_eff * float(np.sqrt(np.prod(frame.scales)))
    lines = [
        "# Region file format: DS9 version 4.1",
        f"# sersicnet {sersicnet.__version__}: ellipses at the effective radius; {_legend()}",
        'global font="helvetica 9 normal roman" width=1',
        system,
    ]
    kind = classes(flags_of(table))
    number = column(table, "id")
    for i in np.flatnonzero(np.isfinite(longitude) & np.isfinite(latitude)):
        place = f"{longitude[i]:.7f},{latitude[i]:.7f}"
        style = f"color={CLASSES[kind[i]].colour} text={{{number[i]:.0f}}}"
        a, b = r_eff[i], r_eff[i] * (1 - e[i])
        if not (a > 0 and b > 0):
            lines.append(f"point({place}) # point=x {style}")
        elif np.isfinite(angle[i]):
            lines.append(f"ellipse({place},{a:.5f}{unit},{b:.5f}{unit},{angle[i] % 360:.3f}) # {style}")
        else:
            lines.append(f"circle({place},{a:.5f}{unit}) # {style}")
    with whole(Path(path)) as partial:
        partial.write_text("\n".join(lines) + "\n", "ascii")


def _legend() -> str:
    return ", ".join(f"{one.colour} {one.name}" for one in CLASSES)
