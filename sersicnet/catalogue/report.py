"""The report of a finished run: one page of HTML that holds its pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from astropy.table import QTable

import sersicnet
from sersicnet.catalogue import page
from sersicnet.catalogue.columns import CLASSES, Draw, Measurement, classes, column
from sersicnet.catalogue.depth import depth, half_magnitudes, turnover
from sersicnet.catalogue.figures import (
    SIDE,
    ellipses,
    figure_link,
    grey,
    histogram,
    mag_and_size,
    number_counts,
    png_link,
    red_and_blue,
)
from sersicnet.catalogue.signal import Cutout, View, averaged, half_side, signal_of
from sersicnet.image.exposure import Exposure
from sersicnet.image.pixels import Window
from sersicnet.schema import FLAG_MEANING, TARGETS, Flag

if TYPE_CHECKING:
    from sersicnet.catalogue.crossmatch import Comparison
    from sersicnet.image.sky import Mesh

DETAIL = 600
"""Side of the part of a large image that is shown at full resolution."""

BRIGHTEST, RANDOM, FLAGGED = 8, 6, 2
"""Galaxies in the gallery: the brightest without flags, others without, and of each class of flags."""


def write_report(
    path: str | Path,
    table: QTable,
    exposure: Exposure,
    mesh: Mesh,
    draw: Draw | None = None,
    comparison: Comparison | None = None,
) -> None:
    """Write a report: what was read and found, with pictures, on one page of HTML.

    The page holds its pictures and needs no network. The image is read strip by strip.

    Parameters
    ----------
    path : str or Path
        Page; it appears whole or not at all.
    table : QTable
        As `sersicnet.measuring.measure.measure` returns it, with its provenance.
    exposure : Exposure
        The image that was measured.
    mesh : Mesh
        Sky and noise of the image, also if the image was resampled.
    draw : callable, optional
        Draws the model, see `sersicnet.catalogue.columns.Draw`; without it the page shows no
        models and residuals.
    comparison : Comparison, optional
        A comparison with another catalogue, which the page shows as well.

    Raises
    ------
    InputError
        If the image cannot be read.
    OutputError
        If the page cannot be written.
    """
    try:
        run = Measurement(table, exposure, mesh, draw)
        sections = _sections(run, comparison)
    finally:
        exposure.close()
    page.write(Path(path), f"sersicnet: {run.name}", sections)


def write_report_of_bands(
    path: str | Path, runs: Mapping[str, Measurement], comparisons: Mapping[str, Comparison] | None = None
) -> None:
    """Write the report of several bands: each galaxy in all bands side by side, and then the parts of each band.

    The page holds its pictures and needs no network.

    Parameters
    ----------
    path : str or Path
        Page; it appears whole or not at all.
    runs : mapping of Measurement
        Each band by its name; all have the same rows.
    comparisons : mapping of Comparison, optional
        A comparison of each band with another catalogue, which the page shows as well.

    Raises
    ------
    InputError
        If an image cannot be read.
    OutputError
        If the page cannot be written.
    """
    first, comparisons = next(iter(runs.values())), comparisons or {}
    try:
        title = escape(", ".join(runs))
        sections = [
            page.section("", f"<h1>{title}</h1>\n{_source_count(first, _all_flags(runs.values()))}"),
            page.section("Galaxies", _gallery_of_bands(runs)),
            page.section("Flags", _flag_table(runs)),
        ]
        for k, (band, run) in enumerate(runs.items()):
            sections += _sections_of(run, comparisons.get(band), band, f"band{k}")
    finally:
        for run in runs.values():
            run.exposure.close()
    page.write(Path(path), f"sersicnet: {', '.join(runs)}", sections)


def _sections(run: Measurement, comparison: Comparison | None) -> list[str]:
    view = averaged(run.exposure, run.mesh, run.exposure.image.whole, -(-max(run.exposure.shape) // SIDE))
    return [
        page.section("", _head(run, view.usable)),
        page.section("Detections", _detections(run, view)),
        page.section("Parameters", _parameters(run)),
        page.section("Counts and depth", _counts(run, view.usable)),
        page.section("Galaxies", _gallery(run)),
        page.section("Flags", _flag_table({"sources": run})),
        *([] if comparison is None else [page.section(f"Beside {comparison.other}", _compared(comparison))]),
    ]


def _sections_of(run: Measurement, comparison: Comparison | None, band: str, key: str) -> list[str]:
    """The parts of one of several bands; `key` begins the ids of its elements."""
    view = averaged(run.exposure, run.mesh, run.exposure.image.whole, -(-max(run.exposure.shape) // SIDE))
    beside = [] if comparison is None else [(f"beside {comparison.other}", _compared(comparison))]
    parts = [
        ("what was read and used", f"{_numbers(run)}\n{_used(run, view.usable)}"),
        ("sources", _detections(run, view, key)),
        ("parameters", _parameters(run)),
        ("counts and depth", _counts(run, view.usable)),
        *beside,
    ]
    return [page.section(f"{band}: {title}", content) for title, content in parts]


# --- what was read ---


def _head(run: Measurement, usable: int) -> str:
    return (
        f"<h1>{escape(Path(run.name).name)}</h1>\n{_source_count(run, run.flags)}\n"
        f"{_numbers(run)}\n<h2>What was read and used</h2>\n{_used(run, usable)}"
    )


def _source_count(run: Measurement, flags: np.ndarray) -> str:
    n, clean = len(run.table), int((flags == 0).sum())
    share = f" ({clean / n:.0%})" if n else ""
    return f"<p><b>{n:,}</b> source{'' if n == 1 else 's'}, <b>{clean:,}</b>{share} without flags.</p>"


def _used(run: Measurement, usable: int) -> str:
    height, width = run.exposure.shape
    rows = [("Image", f"{run.name}, {width} x {height} pixels, {usable / (width * height):.1%} of them with data")]
    area = run.area(usable)
    if np.isfinite(area):
        rows.append(("Area", f"{area:#.4g} arcmin²"))
    known = run.meta.get
    if "WEIGHTS" in run.meta:
        rows.append(("Weights", f"{known('WEIGHTS')} (SHA-256 {str(known('WTSHA256', 'unknown'))[:12]})"))
    else:
        rows.append(("Weights", "none: fits only"))
    rows += [
        ("Sources are of", str(known("DETECTON", ""))),
        ("Errors corrected by", str(known("VALFILE", ""))),
        ("Zero point", _read(run, "ZEROPT", "{:.4f} AB mag for one image unit", "ZPSOURCE")),
        ("Pixel scale", _read(run, "PIXSCALE", "{:.5g} arcsec", "PIXSRC")),
        ("Resampled", f"to pixels of {run.measured_scale:.5g} arcsec" if "RESAMPLE" in run.meta else ""),
        ("Width of the PSF", _read(run, "PSFFWHM", "{:.2f} pixels (FWHM)", "PSFSRC")),
        ("Noise of a blank pixel", _read(run, "SKYRMS", "{:.4g} image units (median)")),
        ("Noise of apertures", _read(run, "NOISECOR", "{:.2f} times that of independent pixels, if they are large")),
        ("Factor on the noise map", _read(run, "MAPFACT", "{:.4g}") if "MAPFACT" in run.meta else ""),
        ("Outside the domain of the weights", str(known("OUTSIDE", ""))),
        ("PSF of the fits", str(known("PSF", ""))),
        ("Gain of the fits", _read(run, "GAIN", "{:.5g} electrons per image unit") if "GAIN" in run.meta else ""),
        ("Prior of the fits", str(known("PRIOR", ""))),
        ("Model error of the fits", _read(run, "MODELERR", "{:g}") if "MODELERR" in run.meta else ""),
        ("Command", str(known("COMMAND", ""))),
        ("Made", f"{known('DATE', 'at an unknown time')} UTC, sersicnet {known('SNETVER', sersicnet.__version__)}"),
    ]
    return page.table([row for row in rows if row[1]], prose=True)


def _read(run: Measurement, key: str, form: str, source: str | None = None) -> str:
    value = run.number(key)
    text = form.format(value) if np.isfinite(value) else "not known"
    origin = run.meta.get(source) if source else None
    return f"{text}; from: {origin}" if origin else text


def _numbers(run: Measurement) -> str:
    """Medians, ranges and errors of the parameters of rows without flags."""
    rows = []
    for target in TARGETS:
        name, unit = target.name, target.unit
        if name == "r_eff_pix" and "r_eff" in run.table.colnames:
            name, unit = "r_eff", "arcsec"
        low, middle, high = (_short(value) for value in _quantiles(column(run.table, name)[run.clean]))
        error = _short(_quantiles(column(run.table, f"{name}_err")[run.clean])[1])
        rows.append((f"{name} [{unit}]" if unit else name, middle, f"{low} to {high}", error))
    return page.table(rows, ("without flags", "median", "16 to 84 %", "median error"))


def _quantiles(values: np.ndarray) -> tuple[float, float, float]:
    values = values[np.isfinite(values)]
    if not len(values):
        return np.nan, np.nan, np.nan
    low, middle, high = np.quantile(values, [0.16, 0.5, 0.84]).tolist()
    return low, middle, high


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.2f}" if np.isfinite(value) else "none"


# --- the image ---


def _detections(run: Measurement, view: View, key: str = "") -> str:
    parts = [
        "<p>The image in units of its noise, with an asinh stretch. Ellipses have the effective radius, axis ratio and "
        "angle of each source, but are not drawn smaller than can be seen; crosses have no parameters. "
        "Colours show the flags: click one to hide it.</p>",
        _overlaid(run, view, f"{key}all", "the whole image with its detections"),
    ]
    window = _busiest(run) if view.block > 1 else None
    if window is not None:
        rows, columns = window
        where = f"x {columns.start} to {columns.stop - 1}, y {rows.start} to {rows.stop - 1}"
        parts += [
            f"<h3>The busiest part</h3>\n<p>At full resolution: {where}.</p>",
            _overlaid(run, averaged(run.exposure, run.mesh, window, 1), f"{key}part", f"the image at {where}"),
        ]
    return "\n".join(parts)


def _busiest(run: Measurement) -> Window | None:
    """The window with most sources among those that tile the image; None without sources."""
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


def _overlaid(run: Measurement, view: View, key: str, what: str) -> str:
    """A picture, and over it one of the sources of each class, which can be hidden."""
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
            f'<img class="layer {name}" alt="sources: {escape(one.name)}" src="{ellipses(run, chosen, view.window)}">'
        )
    hide = "".join(f"#{key}{k}:not(:checked)~.stack .{key}{k}{{display:none}}" for k in range(len(CLASSES)))
    picture = f'<img class="pixels" alt="{escape(what)}" src="{png_link(grey(view.signal))}">'
    return (
        f'<style>{hide}</style>\n<div>{"".join(buttons)}\n<div class="stack">{picture}\n{"".join(layers)}</div>\n</div>'
    )


# --- the parameters ---


def _parameters(run: Measurement) -> str:
    size, unit = run.sizes()
    figures = [
        (histogram(run, run.mag, "mag (AB)"), "histogram of the magnitudes"),
        (histogram(run, size, f"effective radius [{unit}]", log=True), "histogram of the effective radii"),
        (histogram(run, run.n, "Sersic index", log=True), "histogram of the Sersic indices"),
        (histogram(run, run.e, "ellipticity, 1 - b/a"), "histogram of the ellipticities"),
        (mag_and_size(run, size, unit), "magnitude against effective radius"),
    ]
    return (
        "<p>Grey: all sources. Blue: those without flags.</p>\n"
        f'<div class="grid">{"".join(page.picture(link, alt) for link, alt in figures)}</div>'
    )


# --- counts and depth ---


def _counts(run: Measurement, usable: int) -> str:
    area = run.area(usable)
    deep, turn = depth(run.meta), turnover(run.mag)
    drawn = half_magnitudes(run.mag)[1].any()
    figure = number_counts(run, area, None if deep is None else deep.mag)
    lines = []
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
        lines.append("The counts do not turn over, or there are too few sources.")
    if drawn:
        lines.append("Bars are the square root of the number. Nothing is corrected for sources that were not found.")
    return f'<p>{" ".join(lines)}</p>\n<div class="grid">{page.picture(figure, "number counts")}</div>'


# --- the gallery ---


def _gallery(run: Measurement) -> str:
    panels = "image, model and residual" if run.draw is not None else "the image"
    parts = [f"<p>For each: {panels}. {_stretches(drawn=run.draw is not None)}</p>"]
    empty = True
    for title, rows in _chosen([run]):
        if len(rows):
            empty = False
            cells = "\n".join(_galaxy(run, int(row)) for row in rows)
            parts.append(f'<h3>{escape(title)}</h3>\n<div class="grid">{cells}</div>')
    return "\n".join(parts) if not empty else "<p>There are none to show.</p>"


def _stretches(*, drawn: bool) -> str:
    """What the grey levels, colours and ellipses of galaxies mean."""
    residual = "The residual is linear, from -5 (blue) to 5 (red) times the noise. " if drawn else ""
    return (
        "The image is in units of its noise, with an asinh stretch; pixels without data are pale blue. "
        f"{residual}The ellipse is that of the effective radius."
    )


def _gallery_of_bands(runs: Mapping[str, Measurement]) -> str:
    drawn = any(run.draw is not None for run in runs.values())
    panels = "image, model and residual" if drawn else "the image"
    parts = [
        f"<p>For each band: {panels}, as wide on the sky in all bands, on the pixels of the band, which may be turned. "
        f"{_stretches(drawn=drawn)} Galaxies are chosen by the flags of all bands together, and by the magnitude in "
        f"{escape(next(iter(runs)))}; a caption states the values and flags of its band.</p>"
    ]
    for title, rows in _chosen(list(runs.values())):
        if len(rows):
            parts.append(f"<h3>{escape(title)}</h3>")
            parts += [_in_bands(runs, int(row)) for row in rows]
    return "\n".join(parts) if len(parts) > 1 else "<p>There are none to show.</p>"


def _in_bands(runs: Mapping[str, Measurement], row: int) -> str:
    """A galaxy in all bands, side by side."""
    scales = np.array([run.scale for run in runs.values()])
    radii = [run.r_eff[row] * run.scale for run in runs.values()]
    finest = float(np.nanmin(scales)) if np.isfinite(scales).any() else np.nan
    largest = np.nanmax(radii) if np.isfinite(radii).any() else np.nan
    cells = []
    for band, run in runs.items():
        half = max(round(half_side(largest / finest) * finest / run.scale), 1) if run.scale > 0 else None
        cells.append(_galaxy(run, row, band, half))
    return f'<div class="grid">{"".join(cells)}</div>'


def _all_flags(runs: Iterable[Measurement]) -> np.ndarray:
    return np.bitwise_or.reduce([run.flags for run in runs])


def _chosen(runs: Sequence[Measurement]) -> Iterator[tuple[str, np.ndarray]]:
    """Rows of the gallery, each once: of all bands by their flags together, and by the magnitude of the first."""
    rng = np.random.default_rng(0)
    inside, flags, mag = np.zeros(len(runs[0].table), bool), _all_flags(runs), runs[0].mag
    for run in runs:
        height, width = run.exposure.shape
        with np.errstate(invalid="ignore"):
            inside |= (run.x > -0.5) & (run.x < width - 0.5) & (run.y > -0.5) & (run.y < height - 0.5)
    clean, kind = np.flatnonzero(inside & (flags == 0) & np.isfinite(mag)), classes(flags)
    brightest = clean[np.argsort(mag[clean], kind="stable")][:BRIGHTEST]
    yield "The brightest without flags", brightest
    others = np.setdiff1d(clean, brightest)
    yield "Others without flags, at random", rng.permutation(others)[:RANDOM]
    for k, one in enumerate(CLASSES[:-1]):
        yield f"Flags: {one.name}", rng.permutation(np.flatnonzero(inside & (kind == k)))[:FLAGGED]


def _galaxy(run: Measurement, row: int, band: str = "", half: int | None = None) -> str:
    """A galaxy; in one of several bands, with the band's name and a given half of its side in pixels."""
    x, y, r_eff, e = run.x[row], run.y[row], run.r_eff[row], run.e[row]
    name = f"{column(run.table, 'id')[row]:.0f}" + (f" {band}" if band else "")
    cutout = Cutout.of(float(x), float(y), float(r_eff), run.exposure.shape, half)
    if cutout is None:  # of several bands, one has it
        return f'<figure class="stamp"><figcaption><b>{escape(name)}</b> · outside of the image</figcaption></figure>'
    side, corner, window = cutout.side, cutout.corner, cutout.window
    signal, bad = signal_of(run.exposure, run.mesh, window)
    signal[bad] = np.nan
    planes = [grey(cutout.placed(signal))]
    if run.draw is not None:
        pixels = run.exposure.read(window)
        model = run.draw(window) / run.mesh.at(window, pixels).rms
        planes += [grey(cutout.placed(model)), red_and_blue(cutout.placed(signal - model))]
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
    text = f"source {name}: {run.mag[row]:.2f} mag"
    return page.stamp(planes, text, _caption(run, row, name, side), ellipse)


def _caption(run: Measurement, row: int, name: str, side: int) -> str:
    size, unit = run.sizes()
    parts = [
        f"<b>{escape(name)}</b>",
        f"mag {run.mag[row]:.2f}",
        f"R<sub>e</sub> {size[row]:.3g}{'″' if unit == 'arcsec' else ' px'}",
        f"n {run.n[row]:.2f}",
        f"e {run.e[row]:.2f}",
        f"S/N {column(run.table, 'snr')[row]:.0f}",
    ]
    width = f"{side * run.scale:.1f}″ wide" if np.isfinite(run.scale) else f"{side} px wide"
    names = [flag.name or str(flag.value) for flag in FLAG_MEANING if run.flags[row] & flag]
    return " · ".join([*parts, width]) + (f"<br>{escape(', '.join(names))}" if names else "")


# --- flags and others ---


def _flag_table(runs: Mapping[str, Measurement]) -> str:
    """The number of sources with each flag, and their share; the names of the runs are the heads of their columns."""

    def row(flag: Flag | None, meaning: str) -> list[str]:
        own = ["0", ""] if flag is None else [str(flag.value), flag.name or ""]
        for run in runs.values():
            raised = run.clean if flag is None else run.flags & flag != 0
            own += [f"{int(raised.sum()):,}", f"{raised.mean():.1%}" if len(raised) else ""]
        return [*own, meaning]

    rows = [*(row(flag, meaning) for flag, meaning in FLAG_MEANING.items()), row(None, "none of them")]
    heads = [head for name in runs for head in (name, "")]
    return page.table(rows, ("bit", "flag", *heads, "meaning"), prose=True)


def _compared(comparison: Comparison) -> str:
    parts = [f"<p>{escape(line)}</p>" for line in comparison.sentences()]
    for title, head, rows in comparison.tables():
        parts.append(f"<p>{escape(title)}</p>\n{page.table(rows, head)}")
    link = figure_link(comparison.figure(), dpi=110)
    parts.append(f'<div class="wide">{page.picture(link, "differences against magnitude")}</div>')
    return "\n".join(parts)
