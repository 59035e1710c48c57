"""A finished catalogue to look at: one page that tells all of a run, and regions for ds9."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from astropy.table import QTable

import sersicnet
from sersicnet.image import mosaic
from sersicnet.image.exposure import Exposure
from sersicnet.image.pixels import Window
from sersicnet.output import whole
from sersicnet.schema import FLAG_MEANING, TARGETS, Flag

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sersicnet.catalogue.crossmatch import Comparison
    from sersicnet.image.sky import Mesh

Draw = Callable[[Window], np.ndarray]
"""All galaxies of a window as the fits see them: float32 in image units, without the sky."""


class FlagClass(NamedTuple):
    """Flags that mean much the same to who looks at a picture.

    Attributes
    ----------
    name : str
    bits : int
    colour : str
        As HTML, Matplotlib and ds9 read it; a palette that the colour-blind can tell apart.
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
"""A row belongs to the first that has one of its bits; the last is without any."""


def classes(flags: np.ndarray) -> np.ndarray:
    """Which of `CLASSES` each row belongs to, int, (N,)."""
    out = np.full(len(flags), len(CLASSES) - 1)
    for k in reversed(range(len(CLASSES) - 1)):
        out[flags & CLASSES[k].bits != 0] = k
    return out


# --- regions ---------------------------------------------------------------------------------------------------


def regions(table: QTable, path: str | Path, frame: mosaic.Image) -> None:
    """Write a catalogue as a ds9 region file, coloured by `CLASSES`, with the ids.

    Ellipses have the effective radius and the axis ratio; where the angle is not known, they
    are circles, and where there are no parameters, crosses. With a WCS they are
    in ICRS, else in pixels, which ds9 counts from 1.

    Parameters
    ----------
    table : QTable
        As `sersicnet.measuring.measure.measure` returns it.
    path : str or Path
        Region file; it appears whole or not at all.
    frame : mosaic.Image
        The image, whose WCS tells the angles on the sky.

    Raises
    ------
    InputError
        If it cannot be written.

    Notes
    -----
    In celestial coordinates ds9 (since 7.6) has the angle of an ellipse 90 degrees ahead of the
    position angle east of north, for either parity. It turns all regions
    by the north of the image's centre; right at a celestial pole, where north differs from place
    to place, it draws them turned by that difference.
    """
    x, y, r_eff, e, theta = (_column(table, name) for name in ("x", "y", "r_eff_pix", "ellipticity", "theta"))
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
    kind = classes(_flags(table))
    number = _column(table, "id")
    for i in np.flatnonzero(np.isfinite(longitude) & np.isfinite(latitude)):
        place = f"{longitude[i]:.7f},{latitude[i]:.7f}"
        look = f"color={CLASSES[kind[i]].colour} text={{{number[i]:.0f}}}"
        a, b = r_eff[i], r_eff[i] * (1 - e[i])
        if not (a > 0 and b > 0):
            lines.append(f"point({place}) # point=x {look}")
        elif np.isfinite(angle[i]):
            lines.append(f"ellipse({place},{a:.5f}{unit},{b:.5f}{unit},{angle[i] % 360:.3f}) # {look}")
        else:
            lines.append(f"circle({place},{a:.5f}{unit}) # {look}")
    with whole(Path(path)) as partial:
        partial.write_text("\n".join(lines) + "\n", "ascii")


def _legend() -> str:
    return ", ".join(f"{one.colour} {one.name}" for one in CLASSES)


def _column(table: QTable, name: str) -> np.ndarray:
    """A column as float64, (N,); all NaN where the table has none."""
    if name not in table.colnames:
        return np.full(len(table), np.nan)
    column = table[name]
    return np.ma.filled(np.ma.asarray(getattr(column, "value", column), dtype=float), np.nan)


def _flags(table: QTable) -> np.ndarray:
    if "flags" not in table.colnames:
        return np.zeros(len(table), int)
    return np.asarray(table["flags"], dtype=int)


# --- the report ------------------------------------------------------------------------------------------------

SIDE = 1200
"""Longer side of the picture of the image, pixels, at most."""

DETAIL = 600
"""Side of the part of a large image that is shown at full resolution."""

STRIP = 4_000_000
"""Pixels of the image that are read at once, about."""

SHADES = 64
"""Levels of grey of a picture; more make the file large, and cannot be told apart."""

BRIGHTEST, RANDOM, FLAGGED = 8, 6, 2
"""Galaxies in the gallery: the brightest without flags, others without, and of each class of flags."""

APERTURE = 6.0
"""Diameter of the aperture of the depth where the width of the PSF is not known, pixels."""

MANY = 3000
"""Sources from which on they are drawn with thinner lines and smaller points."""

ENOUGH = 30
"""Sources from which on it is told where their counts turn over."""

EXTREME = 15.0
"""Magnitudes farther than this from the median are not counted; they are no measurements."""


def report(
    path: str | Path,
    table: QTable,
    exposure: Exposure,
    mesh: Mesh,
    draw: Draw | None = None,
    comparison: Comparison | None = None,
) -> None:
    """Write all that one wants to see of a finished run on one page of HTML.

    It holds its pictures and needs no network. The image is read strip by strip.

    Parameters
    ----------
    path : str or Path
        Page; it appears whole or not at all.
    table : QTable
        As `sersicnet.measuring.measure.measure` returns it, with its provenance.
    exposure : Exposure
        The image that was measured.
    mesh : Mesh
        Its sky and noise; where it was resampled, those of the image all the same.
    draw : callable, optional
        What draws the model, see `Draw`; without it there are no models and residuals.
    comparison : Comparison, optional
        With another catalogue, to be shown as well.

    Raises
    ------
    InputError
        If the image cannot be read, or the page not be written.
    """
    try:
        page = _page(_Run(table, exposure, mesh, draw), comparison)
    finally:
        exposure.close()
    with whole(Path(path)) as partial:
        partial.write_text(page, "utf-8")


def _page(run: _Run, comparison: Comparison | None) -> str:
    view = _averaged(run.exposure, run.mesh, run.exposure.image.whole, -(-max(run.exposure.shape) // SIDE))
    sections = [
        ("", _head(run, view.usable)),
        ("Detections", _detections(run, view)),
        ("Parameters", _parameters(run)),
        ("Counts and depth", _counts(run, view.usable)),
        ("Galaxies", _gallery(run)),
        ("Flags", _flag_table(run)),
    ]
    if comparison is not None:
        sections.append((f"Beside {comparison.other}", _compared(comparison)))
    title = f"sersicnet: {run.name}"
    body = "\n".join(
        f"<section>{f'<h2>{escape(head)}</h2>' if head else ''}\n{content}\n</section>" for head, content in sections
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


class _Run:
    """A catalogue with its image, and its columns as plain arrays."""

    def __init__(self, table: QTable, exposure: Exposure, mesh: Mesh, draw: Draw | None) -> None:
        self.table, self.exposure, self.mesh, self.draw = table, exposure, mesh, draw
        self.meta: Mapping[str, Any] = table.meta
        self.name = str(self.meta.get("IMAGE", exposure.image.name))
        self.flags = _flags(table)
        self.kind = classes(self.flags)
        self.clean = self.flags == 0
        self.x, self.y, self.theta = (_column(table, name) for name in ("x", "y", "theta"))
        self.mag, self.r_eff, self.n, self.e = (_column(table, target.name) for target in TARGETS)

    @property
    def scale(self) -> float:
        """Arcsec per pixel, NaN if not known."""
        return self.number("PIXSCALE")

    @property
    def measured_scale(self) -> float:
        """Arcsec of a pixel that was measured: after resampling another one, which SKYRMS and PSFFWHM are of."""
        factor = self.number("RESAMPLE")
        return self.scale / factor if factor > 0 else self.scale

    def number(self, key: str) -> float:
        """A number of the provenance; NaN if it is not there."""
        try:
            return float(self.meta.get(key, np.nan))
        except (TypeError, ValueError):
            return np.nan


# --- what was read ---


def _head(run: _Run, usable: int) -> str:
    height, width = run.exposure.shape
    rows = [("Image", f"{run.name}, {width} x {height} pixels, {usable / (width * height):.1%} of them with data")]
    area = _area(run, usable)
    if np.isfinite(area):
        rows.append(("Area", f"{area:#.4g} arcmin²"))
    known = run.meta.get
    if "WEIGHTS" in run.meta:
        rows.append(("Weights", f"{known('WEIGHTS')} (SHA-256 {str(known('WTSHA256', 'unknown'))[:12]})"))
    else:
        rows.append(("Weights", "none: fits only"))
    rows += [
        ("Zero point", _read(run, "ZEROPT", "{:.4f} AB mag for one image unit", "ZPSOURCE")),
        ("Pixel scale", _read(run, "PIXSCALE", "{:.5g} arcsec", "PIXSRC")),
        ("Resampled", f"to pixels of {run.measured_scale:.5g} arcsec" if "RESAMPLE" in run.meta else ""),
        ("Width of the PSF", _read(run, "PSFFWHM", "{:.2f} pixels (FWHM)", "PSFSRC")),
        ("Noise of a blank pixel", _read(run, "SKYRMS", "{:.4g} image units (median)")),
        ("Noise of apertures", _read(run, "NOISECOR", "{:.2f} times that of independent pixels, if they are large")),
        ("Factor on the noise map", _read(run, "MAPFACT", "{:.4g}") if "MAPFACT" in run.meta else ""),
        ("Outside of the weights' domain", str(known("OUTSIDE", ""))),
        ("PSF of the fits", str(known("PSF", ""))),
        ("Gain of the fits", _read(run, "GAIN", "{:.5g} electrons per image unit") if "GAIN" in run.meta else ""),
        ("Prior of the fits", str(known("PRIOR", ""))),
        ("Model error of the fits", _read(run, "MODELERR", "{:g}") if "MODELERR" in run.meta else ""),
        ("Command", str(known("COMMAND", ""))),
        ("Made", f"{known('DATE', 'at an unknown time')} UTC, sersicnet {known('SNETVER', sersicnet.__version__)}"),
    ]
    n, clean = len(run.table), int(run.clean.sum())
    share = f" ({clean / n:.0%})" if n else ""
    return (
        f"<h1>{escape(Path(run.name).name)}</h1>\n"
        f"<p><b>{n:,}</b> source{'' if n == 1 else 's'}, <b>{clean:,}</b>{share} without flags.</p>\n"
        f"{_numbers(run)}\n<h2>What was read and used</h2>\n{_table([row for row in rows if row[1]], prose=True)}"
    )


def _read(run: _Run, key: str, form: str, source: str | None = None) -> str:
    value = run.number(key)
    text = form.format(value) if np.isfinite(value) else "not known"
    origin = run.meta.get(source) if source else None
    return f"{text}; from: {origin}" if origin else text


def _numbers(run: _Run) -> str:
    """Medians, ranges and errors of the parameters of rows without flags."""
    rows = []
    for target in TARGETS:
        name, unit = target.name, target.unit
        if name == "r_eff_pix" and "r_eff" in run.table.colnames:
            name, unit = "r_eff", "arcsec"
        low, middle, high = (_short(value) for value in _quantiles(_column(run.table, name)[run.clean]))
        error = _short(_quantiles(_column(run.table, f"{name}_err")[run.clean])[1])
        rows.append((f"{name} [{unit}]" if unit else name, middle, f"{low} to {high}", error))
    return _table(rows, ("without flags", "median", "16 to 84 %", "median error"))


def _quantiles(values: np.ndarray) -> tuple[float, float, float]:
    values = values[np.isfinite(values)]
    if not len(values):
        return np.nan, np.nan, np.nan
    low, middle, high = np.quantile(values, [0.16, 0.5, 0.84]).tolist()
    return low, middle, high


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.2f}" if np.isfinite(value) else "none"


def _area(run: _Run, usable: int) -> float:
    """Of the pixels with data, arcmin²; NaN without a pixel scale."""
    return usable * run.scale**2 / 3600


# --- the image ---


class _View(NamedTuple):
    """A window of the image, averaged.

    Attributes
    ----------
    window : Window
    signal : ndarray, float32, (h, w)
        Means of blocks, in units of their noise; NaN without data.
    block : int
        Side of a block, pixels of the image.
    usable : int
        Pixels of the window that have data.
    """

    window: Window
    signal: np.ndarray
    block: int
    usable: int


def _averaged(exposure: Exposure, mesh: Mesh, window: Window, block: int) -> _View:
    rows, columns = window
    step = block * max(1, STRIP // (block * (columns.stop - columns.start)))
    sums, counts = [], []
    for top in range(rows.start, rows.stop, step):
        signal, bad = _signal(exposure, mesh, (slice(top, min(top + step, rows.stop)), columns))
        sums.append(_blocks(signal, block))
        counts.append(_blocks((~bad).astype(np.float32), block))
    total, count = np.concatenate(sums), np.concatenate(counts)
    mean = np.divide(total, count, out=np.full(total.shape, np.nan, np.float32), where=count > 0)
    if block > 1:
        # Measured, for the noise of pixels is correlated, and faint sources add to it.
        values = mean[np.isfinite(mean)]
        noise = 1.4826 * float(np.median(np.abs(values - np.median(values)))) if len(values) else 0.0
        mean /= noise or 1.0
    return _View(window, mean, block, int(count.sum(dtype=float)))


def _signal(exposure: Exposure, mesh: Mesh, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """A window without its sky in units of its noise, 0 where it has no data; and where that is."""
    pixels = exposure.read(window)
    sky = mesh.at(window, pixels)
    with np.errstate(invalid="ignore"):
        signal = (pixels.data - sky.level) / sky.rms
    bad = ~np.isfinite(signal)
    signal[bad] = 0
    return signal, bad


def _blocks(values: np.ndarray, block: int) -> np.ndarray:
    """Sums over blocks; those at the upper and right end may be smaller."""
    for axis in (0, 1):
        values = np.add.reduceat(values, np.arange(0, values.shape[axis], block), axis)
    return values


def _detections(run: _Run, view: _View) -> str:
    parts = [
        "<p>The image in units of its noise, through an asinh. Ellipses have the effective radius, axis ratio and "
        "angle of each source, but are not drawn smaller than can be seen; crosses have no parameters. "
        "Colours tell the flags: click one to hide it.</p>",
        _overlaid(run, view, "all", "the whole image with its detections"),
    ]
    window = _busiest(run) if view.block > 1 else None
    if window is not None:
        rows, columns = window
        where = f"x {columns.start} to {columns.stop - 1}, y {rows.start} to {rows.stop - 1}"
        parts += [
            f"<h3>The busiest part</h3>\n<p>At full resolution: {where}.</p>",
            _overlaid(run, _averaged(run.exposure, run.mesh, window, 1), "part", f"the part of the image at {where}"),
        ]
    return "\n".join(parts)


def _busiest(run: _Run) -> Window | None:
    """The window with most sources, of those that tile the image; None without sources."""
    good = np.isfinite(run.x) & np.isfinite(run.y)
    corners = [np.arange(0, max(n - DETAIL, 0) + 1, DETAIL) for n in run.exposure.shape]
    edges = [np.append(corner, corner[-1] + DETAIL) - 0.5 for corner in corners]
    found = np.histogram2d(run.y[good], run.x[good], bins=edges)[0]
    if not found.any():
        return None
    row, column = np.unravel_index(found.argmax(), found.shape)
    y, x = int(corners[0][row]), int(corners[1][column])
    height, width = run.exposure.shape
    return slice(y, min(y + DETAIL, height)), slice(x, min(x + DETAIL, width))


def _overlaid(run: _Run, view: _View, key: str, what: str) -> str:
    """A picture, and one of the sources of each class above it that can be hidden."""
    buttons, layers = [], []
    for k in reversed(range(len(CLASSES))):
        chosen = np.flatnonzero(run.kind == k)
        if not len(chosen):
            continue
        one, name = CLASSES[k], f"{key}{k}"
        buttons.append(
            f'<input type="checkbox" id="{name}" checked><label for="{name}">'
            f'<i style="background:{one.colour}"></i>{escape(one.name)} ({len(chosen):,})</label>'
        )
        layers.append(
            f'<img class="layer {name}" alt="sources: {escape(one.name)}" src="{_ellipses(run, chosen, view)}">'
        )
    hide = "".join(f"#{key}{k}:not(:checked)~.stack .{key}{k}{{display:none}}" for k in range(len(CLASSES)))
    picture = f'<img class="pixels" alt="{escape(what)}" src="{_png(_grey(view.signal))}">'
    return (
        f'<style>{hide}</style>\n<div>{"".join(buttons)}\n<div class="stack">{picture}\n{"".join(layers)}</div>\n</div>'
    )


def _ellipses(run: _Run, chosen: np.ndarray, view: _View) -> str:
    """Sources on nothing, to lie on a picture."""
    from matplotlib.collections import EllipseCollection
    from matplotlib.figure import Figure

    rows, columns = view.window
    height, width = rows.stop - rows.start, columns.stop - columns.start
    pixel = max(height, width) / SIDE  # of the overlay, in those of the image
    figure = Figure(figsize=(width / pixel / 100, height / pixel / 100))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(columns.start - 0.5, columns.stop - 0.5)
    axes.set_ylim(rows.start - 0.5, rows.stop - 0.5)
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
    return _figure(figure, dpi=100, transparent=True)


_LOW, _HIGH = -0.7, 4.5
_NO_DATA, _GAP = 2 * SHADES, 2 * SHADES + 1
"""Colours of a picture, after as many of grey and as many from blue to red."""


def _grey(signal: np.ndarray) -> np.ndarray:
    """Signal to noise through an asinh as greys, dark where bright; colours of `_png`, uint8, (H, W)."""
    return _shades((np.arcsinh(signal / 3) - _LOW) / (_HIGH - _LOW), 0)


def _red_and_blue(signal: np.ndarray) -> np.ndarray:
    """Signal to noise from -5 to 5 as blue to red; colours of `_png`, uint8, (H, W)."""
    return _shades((signal + 5) / 10, SHADES)


def _shades(level: np.ndarray, first: int) -> np.ndarray:
    shade = np.rint(np.clip(np.nan_to_num(level), 0, 1) * (SHADES - 1)).astype(np.uint8) + np.uint8(first)
    return np.where(np.isnan(level), np.uint8(_NO_DATA), shade)


def _png(colours: np.ndarray) -> str:
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


def _figure(figure: Figure, dpi: int = 130, transparent: bool = False) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, transparent=transparent)
    return _link(buffer.getvalue())


def _link(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


# --- the parameters ---


def _parameters(run: _Run) -> str:
    size, unit = _sizes(run)
    figures = [
        (_histogram(run, run.mag, "mag (AB)"), "histogram of the magnitudes"),
        (_histogram(run, size, f"effective radius [{unit}]", log=True), "histogram of the effective radii"),
        (_histogram(run, run.n, "Sersic index", log=True), "histogram of the Sersic indices"),
        (_histogram(run, run.e, "ellipticity, 1 - b/a"), "histogram of the ellipticities"),
        (_mag_and_size(run, size, unit), "magnitude against effective radius"),
    ]
    return (
        "<p>Grey: all sources. Blue: those without flags.</p>\n"
        f'<div class="grid">{"".join(_picture(link, alt) for link, alt in figures)}</div>'
    )


def _sizes(run: _Run) -> tuple[np.ndarray, str]:
    if np.isfinite(run.scale):
        return run.r_eff * run.scale, "arcsec"
    return run.r_eff, "pixels"


def _axes(x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.4))
    axes = figure.add_axes((0.15, 0.14, 0.82, 0.83))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _plain_ticks(axis: Any, values: np.ndarray) -> None:
    """Ticks of a logarithmic axis as people write numbers, few enough to be read."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    wide = len(values) and values.max() > 200 * values.min()
    axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _histogram(run: _Run, values: np.ndarray, label: str, *, log: bool = False) -> str:
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
        _nothing(axes)
    return _figure(figure)


def _nothing(axes: Any) -> None:
    axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", va="center", color="#777777")
    axes.set_xticks([])
    axes.set_yticks([])


def _mag_and_size(run: _Run, size: np.ndarray, unit: str) -> str:
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
        _nothing(axes)
    return _figure(figure)


# --- counts and depth ---


class Depth(NamedTuple):
    """How faint a source can be.

    Attributes
    ----------
    mag : float
        AB magnitude of five times the noise of an aperture; the light outside of it is not added.
    diameter : float
        Of the aperture, pixels.
    """

    mag: float
    diameter: float


def depth(meta: Mapping[str, Any]) -> Depth | None:
    """The 5 sigma depth that the header of a catalogue tells; None where it does not.

    The aperture is twice as wide as the PSF, or `APERTURE` pixels where that is not known. Its noise is that of
    a blank pixel, SKYRMS, times the root of its area and NOISECOR, the factor of
    large apertures; so it is rather too large for a small one.
    """
    try:
        zero, rms, factor = (float(meta[key]) for key in ("ZEROPT", "SKYRMS", "NOISECOR"))
        width = float(meta.get("PSFFWHM", np.nan))
    except (KeyError, TypeError, ValueError):
        return None
    diameter = 2 * width if width > 0 else APERTURE
    noise = rms * factor * np.sqrt(np.pi / 4) * diameter
    if not (noise > 0 and np.isfinite(noise) and np.isfinite(zero)):
        return None
    return Depth(float(zero - 2.5 * np.log10(5 * noise)), diameter)


def turnover(mag: np.ndarray) -> tuple[float, float] | None:
    """The half magnitude that holds most sources; None if they are few, or none is fainter."""
    edges, counts = _half_magnitudes(mag)
    if counts.sum() < ENOUGH or not counts[counts.argmax() + 1 :].any():
        return None
    return float(edges[counts.argmax()]), float(edges[counts.argmax() + 1])


def _half_magnitudes(mag: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges of half magnitudes, and how many sources each holds."""
    mag = mag[np.isfinite(mag)]
    if len(mag):
        mag = mag[np.abs(mag - np.median(mag)) <= EXTREME]
    if not len(mag):
        return np.array([20.0, 20.5]), np.zeros(1, int)
    edges = np.arange(np.floor(2 * mag.min()), np.floor(2 * mag.max()) + 2) / 2
    return edges, np.histogram(mag, edges)[0]


def _counts(run: _Run, usable: int) -> str:
    area = _area(run, usable)
    per = area if area > 0 else 1.0
    figure, axes = _axes("mag (AB)", f"sources per 0.5 mag{' and arcmin²' if area > 0 else ''}")
    edges, _ = _half_magnitudes(run.mag)
    middle = (edges[1:] + edges[:-1]) / 2
    drawn = False
    for chosen, colour, name in (
        (np.ones(len(run.mag), bool), "#888888", "all"),
        (run.clean, CLASSES[-1].colour, "without flags"),
    ):
        counts = np.histogram(run.mag[chosen & np.isfinite(run.mag)], edges)[0]
        full = counts > 0
        if full.any():
            drawn = True
            n = counts[full]
            error = np.array([np.minimum(np.sqrt(n), 0.9 * n), np.sqrt(n)]) / per  # to zero is too far for a logarithm
            axes.errorbar(middle[full], n / per, error, fmt="o-", ms=3, lw=1, color=colour, label=name)
    deep, turn = depth(run.meta), turnover(run.mag)
    lines = []
    if not drawn:
        _nothing(axes)
    else:
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5 / per)
        _plain_ticks(axes.yaxis, np.array(axes.get_ylim()))
        if deep is not None:
            axes.axvline(deep.mag, color="black", lw=0.8, ls="--", label="5 sigma")
        axes.legend(fontsize=8)
    if deep is not None:
        size = f"{deep.diameter:.1f} pixels"
        if np.isfinite(run.scale):
            size += f" ({deep.diameter * run.measured_scale:.2f} arcsec)"
        why = "twice the width of the PSF" if run.number("PSFFWHM") > 0 else "the width of the PSF is not known"
        lines.append(
            f"<b>{deep.mag:.2f}</b> mag is five times the noise in an aperture of {size} diameter ({why}), from "
            "the noise of a blank pixel and the factor of correlated noise in large apertures; light outside of "
            "the aperture is not added."
        )
    if turn is not None:
        lines.append(
            f"Counts turn over at <b>{turn[0]:.1f} to {turn[1]:.1f}</b> mag: "
            "fainter sources are missing, unless there are none."
        )
    elif drawn:
        lines.append("The counts do not turn over, or sources are too few to tell.")
    if drawn:
        lines.append("Bars are the square root of the number. Nothing is corrected for sources that were not found.")
    return f'<p>{" ".join(lines)}</p>\n<div class="grid">{_picture(_figure(figure), "number counts")}</div>'


# --- the gallery ---


def _gallery(run: _Run) -> str:
    panels = "image, model, and what is left" if run.draw is not None else "the image"
    parts = [
        f"<p>For each: {panels}. The image is in units of its noise, through an asinh; "
        + ("what is left is linear, from -5 (blue) to 5 (red) times the noise. " if run.draw is not None else "")
        + "The ellipse is that of the effective radius.</p>"
    ]
    empty = True
    for title, rows in _chosen(run):
        if len(rows):
            empty = False
            cells = "\n".join(_galaxy(run, int(row)) for row in rows)
            parts.append(f'<h3>{escape(title)}</h3>\n<div class="grid">{cells}</div>')
    return "\n".join(parts) if not empty else "<p>There are none to show.</p>"


def _chosen(run: _Run) -> Iterator[tuple[str, np.ndarray]]:
    """Rows of the gallery, each once."""
    rng = np.random.default_rng(0)
    height, width = run.exposure.shape
    with np.errstate(invalid="ignore"):
        inside = (run.x > -0.5) & (run.x < width - 0.5) & (run.y > -0.5) & (run.y < height - 0.5)
    clean = np.flatnonzero(inside & run.clean & np.isfinite(run.mag))
    brightest = clean[np.argsort(run.mag[clean], kind="stable")][:BRIGHTEST]
    yield "The brightest without flags", brightest
    others = np.setdiff1d(clean, brightest)
    yield "Others without flags, at random", rng.permutation(others)[:RANDOM]
    for k, one in enumerate(CLASSES[:-1]):
        yield f"Flags: {one.name}", rng.permutation(np.flatnonzero(inside & (run.kind == k)))[:FLAGGED]


def _galaxy(run: _Run, row: int) -> str:
    x, y, r_eff, e = run.x[row], run.y[row], run.r_eff[row], run.e[row]
    half = int(np.clip(np.ceil(4 * r_eff), 24, 100)) if np.isfinite(r_eff) else 32
    side = 2 * half + 1
    corner = round(float(x)) - half, round(float(y)) - half
    height, width = run.exposure.shape
    window = (
        slice(max(corner[1], 0), min(corner[1] + side, height)),
        slice(max(corner[0], 0), min(corner[0] + side, width)),
    )
    inner = (
        slice(window[0].start - corner[1], window[0].stop - corner[1]),
        slice(window[1].start - corner[0], window[1].stop - corner[0]),
    )
    signal, bad = _signal(run.exposure, run.mesh, window)
    signal[bad] = np.nan
    planes = [_grey(_placed(signal, inner, side))]
    if run.draw is not None:
        pixels = run.exposure.read(window)
        model = run.draw(window) / run.mesh.at(window, pixels).rms
        planes += [_grey(_placed(model, inner, side)), _red_and_blue(_placed(signal - model, inner, side))]
    gap = np.full((side, max(side // 40, 1)), _GAP, np.uint8)
    strip = planes[0]
    for plane in planes[1:]:
        strip = np.concatenate([strip, gap, plane], axis=1)
    name = _column(run.table, "id")[row]
    ellipse = ""
    if 0 < r_eff < np.inf and 1 - e > 0:
        at = x - corner[0] + 0.5, side - (y - corner[1] + 0.5)
        turn = -float(np.nan_to_num(run.theta[row]))
        colour = CLASSES[run.kind[row]].colour
        ellipse = (
            f'<svg width="{side}" height="{side}"><ellipse fill="none" stroke="{colour}" '
            f'rx="{r_eff:.2f}" ry="{r_eff * (1 - e):.2f}" '
            f'transform="translate({at[0]:.2f} {at[1]:.2f}) rotate({turn:.1f})"/></svg>'
        )
    text = f"source {name:.0f}: {run.mag[row]:.2f} mag"
    return (
        f'<figure class="stamp"><svg viewBox="0 0 {strip.shape[1]} {side}" role="img" aria-label="{escape(text)}">'
        f'<image width="{strip.shape[1]}" height="{side}" href="{_png(strip)}"/>{ellipse}</svg>'
        f"<figcaption>{_caption(run, row, side)}</figcaption></figure>"
    )


def _placed(values: np.ndarray, inner: Window, side: int) -> np.ndarray:
    out = np.full((side, side), np.nan, np.float32)
    out[inner] = values
    return out


def _caption(run: _Run, row: int, side: int) -> str:
    size, unit = _sizes(run)
    parts = [
        f"<b>{_column(run.table, 'id')[row]:.0f}</b>",
        f"mag {run.mag[row]:.2f}",
        f"R<sub>e</sub> {size[row]:.3g} {'″' if unit == 'arcsec' else 'px'}",
        f"n {run.n[row]:.2f}",
        f"e {run.e[row]:.2f}",
        f"S/N {_column(run.table, 'snr')[row]:.0f}",
    ]
    width = f"{side * run.scale:.1f}″ wide" if np.isfinite(run.scale) else f"{side} px wide"
    names = [flag.name or str(flag.value) for flag in FLAG_MEANING if run.flags[row] & flag]
    return " · ".join([*parts, width]) + (f"<br>{escape(', '.join(names))}" if names else "")


# --- flags and others ---


def _flag_table(run: _Run) -> str:
    n = len(run.table)
    rows = []
    for flag, meaning in FLAG_MEANING.items():
        count = int((run.flags & flag != 0).sum())
        share = f"{count / n:.1%}" if n else ""
        rows.append((str(flag.value), flag.name or "", f"{count:,}", share, meaning))
    rows.append(("0", "", f"{int(run.clean.sum()):,}", f"{run.clean.mean():.1%}" if n else "", "none of them"))
    return _table(rows, ("bit", "flag", "sources", "", "meaning"), prose=True)


def _compared(comparison: Comparison) -> str:
    parts = [f"<p>{escape(line)}</p>" for line in comparison.sentences()]
    for title, head, rows in comparison.tables():
        parts.append(f"<p>{escape(title)}</p>\n{_table(rows, head)}")
    link = _figure(comparison.figure(), dpi=110)
    parts.append(f'<div class="wide">{_picture(link, "differences against magnitude")}</div>')
    return "\n".join(parts)


def _picture(link: str, alt: str) -> str:
    return f'<div><img alt="{escape(alt)}" src="{link}"></div>'


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] | None = None, *, prose: bool = False) -> str:
    """A table; cells with `prose` break into lines."""
    top = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return f'<div class="scroll"><table class="{"prose" if prose else "numbers"}">{top}\n{body}</table></div>'


_STYLE = """
body{margin:0 auto;max-width:1200px;padding:0 1rem 3rem;background:#fff;color:#111;
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:1.5rem;margin:1.2rem 0 .3rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2rem 0 .5rem;border-bottom:1px solid #ccc}
h3{font-size:1rem;margin:1.2rem 0 .4rem}
p{max-width:48rem;margin:.5rem 0;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem}
th,td{text-align:left;vertical-align:top;padding:.2rem .9rem .2rem 0;border-bottom:1px solid #e5e5e5}
td{overflow-wrap:break-word}
.numbers td,.numbers th{white-space:nowrap}
.prose td:last-child{min-width:13rem}
img{max-width:100%;height:auto;display:block}
label{display:inline-block;margin:0 1rem .3rem .2rem;font-size:.9rem;cursor:pointer}
label i{display:inline-block;width:.8em;height:.8em;margin-right:.35em;border-radius:50%}
.stack{position:relative}
.pixels{width:100%;image-rendering:pixelated}
.layer{position:absolute;left:0;top:0;width:100%}
.grid{display:flex;flex-wrap:wrap;gap:1rem}
.grid>*{flex:1 1 18rem;max-width:24rem}
.wide{overflow-x:auto}
.wide img{min-width:50rem}
.stamp{margin:0}
.stamp>svg{width:100%;height:auto;display:block;border:1px solid #ddd}
.stamp image{image-rendering:pixelated}
.stamp ellipse{stroke-width:1.3px;vector-effect:non-scaling-stroke}
figcaption{font-size:.8rem;color:#333}
@media print{section{break-inside:avoid}}
"""
