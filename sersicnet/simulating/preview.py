"""A sheet of stamps of a simulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sersicnet.errors import InputError
from sersicnet.output import check_output, whole
from sersicnet.simulating.recipe import Simulation
from sersicnet.simulating.stamps import draw_stamps

FORMATS = (".png", ".pdf")
COLUMNS, ROWS = 8, 4


def preview(path: str | Path, simulation: Simulation, *, overwrite: bool = False) -> Path:
    """Draw the first stamps of a simulation, at most 32, on one sheet.

    Stamps are shown in units of their noise with an asinh stretch. Each is labelled with its
    magnitude, effective radius [pix], index and ellipticity, in brackets if that truth
    cannot be trusted (a ``status`` other than 0).

    Parameters
    ----------
    path : str or Path
        Figure: .png or .pdf.
    simulation : Simulation
    overwrite : bool

    Returns
    -------
    Path

    Raises
    ------
    InputError
        If the output exists or is not a .png or .pdf.
    OutputError
        If the disk refuses.
    """
    from matplotlib.figure import Figure

    path = check_output(path, overwrite)
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"A preview ends in {' or '.join(FORMATS)}; received {path.name}.")
    n = min(simulation.n, COLUMNS * ROWS)
    images, truth = draw_stamps(simulation, np.arange(n))
    rows = -(-n // COLUMNS)
    figure = Figure(figsize=(1.5 * COLUMNS, 1.72 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for i, (axis, image) in enumerate(zip(axes, images, strict=False)):
        show(axis, image / truth["rms"][i])
        text = label(*(truth[name][i] for name in ("mag", "r_eff_pix", "sersic_n", "ellipticity")))
        axis.set_title(f"({text})" if truth.get("status", np.zeros(n))[i] else text, fontsize=6, pad=2)
    with whole(path) as partial:
        figure.savefig(partial, dpi=110, format=path.suffix[1:].lower())
    return path


def show(axis: object, stamp: np.ndarray) -> None:
    """Draw a stamp in units of its noise, through an asinh, in grey."""
    axis.imshow(np.arcsinh(stamp / 3), origin="lower", cmap="gray_r", vmin=-0.7, vmax=4.5)  # type: ignore[attr-defined]


def label(mag: float, r_eff: float, n: float, e: float) -> str:
    """The four parameters in a line."""
    return f"{mag:.1f} mag, {r_eff:.1f} px, n {n:.1f}, e {e:.2f}"
