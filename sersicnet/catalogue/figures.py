"""Pictures and figures of a report, as links that hold them."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import numpy as np

from sersicnet.catalogue.columns import CLASSES, Measurement
from sersicnet.catalogue.depth import half_magnitudes
from sersicnet.image.pixels import Window

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 1200
"""Longer side of the picture of an image, pixels, at most."""

SHADES = 64
"""Levels of grey of a picture; more levels make the file larger, and the eye cannot distinguish them."""

MANY = 3000
"""Sources above which they are drawn with thinner lines and smaller points."""


def ellipses(run: Measurement, chosen: np.ndarray, window: Window) -> str:
    """Sources in a window on a transparent picture, which is laid over one of the image."""
    from matplotlib.figure import Figure

    rows, columns = window
    height, width = rows.stop - rows.start, columns.stop - columns.start
    pixel = max(height, width) / SIDE  # of the overlay, in those of the image
    figure = Figure(figsize=(width / pixel / 100, height / pixel / 100))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(columns.start - 0.5, columns.stop - 0.5)
    axes.set_ylim(rows.start - 0.5, rows.stop - 0.5)
    add_ellipses(axes, run, chosen, pixel)
    return figure_link(figure, dpi=100, transparent=True)


def add_ellipses(axes: Any, run: Measurement, chosen: np.ndarray, pixel: float) -> None:
    """Draw sources of one class into Matplotlib's axes, in pixels of the image.

    Parameters
    ----------
    axes : Axes
    run : Measurement
    chosen : ndarray, int, (N,)
        Rows; at least one.
    pixel : float
        Pixels of the image along a pixel of the picture: no ellipse is drawn smaller than can be seen.
    """
    from matplotlib.collections import EllipseCollection

    x, y, a = run.x[chosen], run.y[chosen], run.r_eff[chosen]
    b = a * (1 - run.e[chosen])
    shown = np.isfinite(x) & np.isfinite(y)
    measured = shown & (a > 0) & (b > 0) & np.isfinite(a)
    colour = CLASSES[run.kind[chosen[0]]].colour
    # A white seam keeps a line apart from a dark galaxy; where there are many it would hide them.
    lines = [("white", 2.4), (colour, 1.1)] if measured.sum() < MANY else [(colour, 0.7)]
    for line, thickness in lines:
        axes.add_collection(
            EllipseCollection(
                2 * np.maximum(a[measured], 3 * pixel),
                2 * np.maximum(b[measured], 1.5 * pixel),
                np.nan_to_num(run.theta[chosen][measured]),
                units="xy",
                offsets=np.column_stack([x[measured], y[measured]]),
                offset_transform=axes.transData,
                facecolors="none",
                edgecolors=line,
                linewidths=thickness,
            )
        )
    lost = shown & ~measured
    axes.plot(x[lost], y[lost], "x", color=colour, ms=5, mew=1)


def show_signal(axes: Any, signal: np.ndarray, extent: tuple[float, float, float, float] | None = None) -> None:
    """Draw signal to noise through an asinh into Matplotlib's axes, in the greys of `grey`."""
    axes.imshow(
        np.arcsinh(signal / 3), origin="lower", cmap="gray_r", vmin=_LOW, vmax=_HIGH, extent=extent,
        interpolation="nearest",
    )  # fmt: skip


_LOW, _HIGH = -0.7, 4.5
_NO_DATA, GAP = 2 * SHADES, 2 * SHADES + 1
"""Colours of a picture, after as many of grey and as many from blue to red."""


def grey(signal: np.ndarray) -> np.ndarray:
    """Signal to noise through an asinh as greys, dark where bright; colours of `png_link`, uint8, (H, W)."""
    return _shades((np.arcsinh(signal / 3) - _LOW) / (_HIGH - _LOW), 0)


def red_and_blue(signal: np.ndarray) -> np.ndarray:
    """Signal to noise from -5 to 5 as blue to red; colours of `png_link`, uint8, (H, W)."""
    return _shades((signal + 5) / 10, SHADES)


def _shades(level: np.ndarray, first: int) -> np.ndarray:
    shade = np.rint(np.clip(np.nan_to_num(level), 0, 1) * (SHADES - 1)).astype(np.uint8) + np.uint8(first)
    return np.where(np.isnan(level), np.uint8(_NO_DATA), shade)


def png_link(colours: np.ndarray) -> str:
    """A picture, given from its lowest row on, as a link that holds it."""
    from matplotlib import colormaps
    from PIL import Image

    greys = np.repeat(np.linspace(255, 0, SHADES)[:, None], 3, axis=1)
    from_blue = 255 * colormaps["RdBu_r"](np.linspace(0, 1, SHADES))[:, :3]
    palette = np.concatenate([greys, from_blue, [(214, 226, 240), (255, 255, 255)]])
    picture = Image.fromarray(np.ascontiguousarray(colours[::-1]))
    picture.putpalette(np.rint(palette).astype(np.uint8).tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "png", optimize=True)
    return _link(buffer.getvalue())


def figure_link(figure: Figure, dpi: int = 130, transparent: bool = False) -> str:
    """A Matplotlib figure as a link that holds it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, transparent=transparent)
    return _link(buffer.getvalue())


def _link(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _axes(x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.4))
    axes = figure.add_axes((0.15, 0.14, 0.82, 0.83))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _plain_ticks(axis: Any, values: np.ndarray) -> None:
    """Label a logarithmic axis with plain numbers, few enough to be read."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    wide = len(values) and values.max() > 200 * values.min()
    axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def histogram(run: Measurement, values: np.ndarray, label: str, *, log: bool = False) -> str:
    """A histogram of a parameter, of all sources and of those without flags."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes(label, "sources")
    good = np.isfinite(values) & (values > 0) if log else np.isfinite(values)
    if good.any():
        # A few values far away should not squeeze all others into one bin.
        low, high = np.quantile(values[good], [0.001, 0.999])
        if log:
            low, high = low / 1.05, high * 1.05
            edges = np.geomspace(low, high, 31)
            axes.set_xscale("log")
            _plain_ticks(axes.xaxis, np.array([low, high]))
        else:
            margin = max(0.02 * (high - low), 1e-3 * max(abs(low), abs(high)), 1e-6)
            edges = np.linspace(low - margin, high + margin, 31)
        axes.hist(values[good], edges, color="#bbbbbb")
        axes.hist(values[good & run.clean], edges, histtype="step", color=CLASSES[-1].colour, lw=1.5)
        axes.set_xlim(edges[0], edges[-1])
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    else:
        _no_values(axes)
    return figure_link(figure)


def _no_values(axes: Any) -> None:
    axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", va="center", color="#777777")
    axes.set_xticks([])
    axes.set_yticks([])


def mag_and_size(run: Measurement, size: np.ndarray, unit: str) -> str:
    """Magnitudes and effective radii of all sources, with the half width of the PSF."""
    figure, axes = _axes("mag (AB)", f"effective radius [{unit}]")
    good = np.isfinite(run.mag) & np.isfinite(size) & (size > 0)
    if good.any():
        point = 5 if good.sum() < MANY else 1.5
        for chosen, colour in ((good & ~run.clean, "#aaaaaa"), (good & run.clean, CLASSES[-1].colour)):
            axes.scatter(run.mag[chosen], size[chosen], s=point, c=colour, linewidths=0)
        axes.set_yscale("log")
        for limits, values in ((axes.set_xlim, run.mag[good]), (axes.set_ylim, np.log(size[good]))):
            low, high = np.quantile(values, [0.001, 0.999])
            margin = 0.06 * (high - low) or 0.5
            ends = np.array([low - margin, high + margin])
            limits(*(ends if limits == axes.set_xlim else np.exp(ends)))
        _plain_ticks(axes.yaxis, np.array(axes.get_ylim()))
        width = run.number("PSFFWHM") / 2 * (run.measured_scale if unit == "arcsec" else 1)
        if np.isfinite(width):
            axes.axhline(width, color="black", lw=0.8, ls="--")
            axes.annotate(
                "half of the PSF's FWHM", (0.02, width), xycoords=("axes fraction", "data"), fontsize=7, va="bottom",
                annotation_clip=True,
            )  # fmt: skip
    else:
        _no_values(axes)
    return figure_link(figure)


def number_counts(run: Measurement, area: float, limit: float | None) -> str:
    """Sources per half magnitude, and per arcmin² if the area is known; a line at the magnitude `limit`."""
    per = area if area > 0 else 1.0
    figure, axes = _axes("mag (AB)", f"sources per 0.5 mag{' and arcmin²' if area > 0 else ''}")
    edges, found = half_magnitudes(run.mag)
    middle = (edges[1:] + edges[:-1]) / 2
    for chosen, colour, name in (
        (np.ones(len(run.mag), bool), "#888888", "all"),
        (run.clean, CLASSES[-1].colour, "without flags"),
    ):
        counts = np.histogram(run.mag[chosen & np.isfinite(run.mag)], edges)[0]
        full = counts > 0
        if full.any():
            n = counts[full]
            error = np.array([np.minimum(np.sqrt(n), 0.9 * n), np.sqrt(n)]) / per  # to zero is too far for a logarithm
            axes.errorbar(middle[full], n / per, error, fmt="o-", ms=3, lw=1, color=colour, label=name)
    if not found.any():
        _no_values(axes)
    else:
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5 / per)
        _plain_ticks(axes.yaxis, np.array(axes.get_ylim()))
        if limit is not None:
            axes.axvline(limit, color="black", lw=0.8, ls="--", label="5 sigma")
        axes.legend(fontsize=8)
    return figure_link(figure)
