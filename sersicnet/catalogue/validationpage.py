"""The page of a validation: the selection function, errors against claimed errors, blends, and what went wrong."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sersicnet.catalogue import page
from sersicnet.catalogue.columns import column
from sersicnet.catalogue.factors import ONE_SIGMA, weighted_quantile
from sersicnet.catalogue.figures import figure_link, grey, red_and_blue
from sersicnet.catalogue.signal import Cutout, signal_of
from sersicnet.catalogue.validation import Share, Statistic, Validation, magnitude_edges, size_edges
from sersicnet.engine.render import parameters_of
from sersicnet.errors import printable
from sersicnet.image.exposure import Exposure
from sersicnet.image.injected import Galaxies
from sersicnet.image.psf import Psf
from sersicnet.image.sky import Mesh
from sersicnet.schema import TARGET_NAMES, TARGETS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORST = 12
"""Galaxies of the gallery."""

_NAMES = {"mag": "mag", "r_eff_pix": "ln R_e", "sersic_n": "ln n", "ellipticity": "ellipticity",
          "theta": "theta [deg]"}  # fmt: skip
_BLUE, _ORANGE, _GREEN, _GREY = "#0072b2", "#d55e00", "#009e73", "#888888"


def write(path: Path, found: Validation, added: Callable[[int], Exposure], mesh: Mesh, psf: Psf) -> None:
    """Write the page.

    Parameters
    ----------
    path : Path
    found : Validation
    added : callable
        Gives the mosaic with the galaxies of a pass, numbered from 1.
    mesh : Mesh
        Sky and noise of the mosaic.
    psf : Psf
        That galaxies were drawn through.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    statistics, shares = found.statistics(), found.shares()
    name = printable(str(found.rows.meta.get("IMAGE", "")))
    sections = [
        page.section("", _head(found, name, statistics)),
        page.section("The selection function", _selection(found, shares)),
        page.section("Bias and scatter", _by(statistics, "mag", "measured mag", log=False)),
        page.section("Errors and claimed errors", _errors(found, statistics)),
        page.section("What blends do", _blends(found, statistics)),
        page.section("Galaxies that went most wrong", _worst(found, added, mesh, psf)),
        page.section("Statistics", _tables(statistics, shares)),
    ]
    page.write(path, f"sersicnet validate: {name}", sections)


def _head(found: Validation, name: str, statistics: list[Statistic]) -> str:
    rows, n = found.rows, len(found.rows)
    hit, merged, passes = int(np.sum(rows["found"])), int(np.sum(rows["merged"])), int(np.max(rows["pass"]))
    lines = [
        f"<h1>{escape(Path(name).name)}</h1>",
        f"<p><b>{n:,}</b> galaxies of known parameters were added to the mosaic in {passes} pass{'es' * (passes > 1)}, "
        f"and measured. <b>{hit:,}</b> ({hit / n:.0%}) were found, {merged:,} are lost in a brighter source of the "
        f"mosaic, and {n - hit - merged:,} were not detected. Statistics are of the {int(found.counted.sum()):,} that "
        "were found and have no part masked, saturated or beyond the edge; each counts as often as the galaxies of the "
        "mosaic that it stands for.</p>",
    ]
    own = [one for one in statistics if one.by == "all"]
    if own:
        lines.append(page.table([_cells(one) for one in own], _HEAD))
    meta = rows.meta
    facts = [
        ("Weights", str(meta.get("WEIGHTS", "none"))),
        ("PSF", f"{found.fwhm:.2f} pixels wide (FWHM); from: {meta.get('PSFSRC', 'not known')}"),
        ("Command", str(meta.get("COMMAND", ""))),
        ("Made", f"{meta.get('DATE', '')} UTC, sersicnet {meta.get('SNETVER', '')}"),
    ]
    return "\n".join([*lines, page.table([fact for fact in facts if fact[1]], prose=True)])


_HEAD = ("", "N", "bias", "scatter", "within 1 sigma", "with factors", "within 2 sigma", "with factors")


def _cells(one: Statistic) -> tuple[str, ...]:
    def share(value: float, error: float) -> str:
        return f"{value:.1%} ± {error:.1%}" if np.isfinite(value) else "no errors"

    return (
        _NAMES[one.parameter], f"{one.n:,}", f"{one.bias:+.3f} ± {one.bias_err:.3f}",
        f"{one.scatter:.3f} ± {one.scatter_err:.3f}", share(one.within, one.within_err),
        share(one.after, one.within_err) if np.isfinite(one.after) else "none", _percent(one.within_two),
        _percent(one.after_two),
    )  # fmt: skip


# --- the selection function ------------------------------------------------------------------------------------


def _figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (4.6, 3.4)) -> tuple[Figure, Any]:
    """A figure and its axes; the margins are fixed, which takes a third of the time of a layout engine."""
    from matplotlib.figure import Figure

    width, height = size[0] * columns, size[1] * rows
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(
        left=0.8 / width, right=1 - 0.1 / width, bottom=0.5 / height, top=1 - 0.3 / height, wspace=0.28, hspace=0.35
    )
    return figure, figure.subplots(rows, columns, squeeze=False)


def _log_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _selection(found: Validation, shares: list[Share]) -> str:
    true, hit = found.truth, np.asarray(found.rows["found"], bool)
    mag, size = true[:, 0], true[:, 1] / found.fwhm
    edges = magnitude_edges(mag), size_edges(size)
    added, seen = (np.histogram2d(mag[w], size[w], edges)[0] for w in (np.ones(len(mag), bool), hit))
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(added > 0, seen / added, np.nan)
    figure, axes = _figure(size=(6.4, 4.2))
    shown = axes[0, 0].pcolormesh(*edges, share.T, cmap="viridis", vmin=0, vmax=1)
    for i, j in zip(*np.nonzero(added), strict=True):
        middle = edges[0][i : i + 2].mean(), np.sqrt(edges[1][j] * edges[1][j + 1])
        axes[0, 0].text(
            *middle, f"{added[i, j]:.0f}", ha="center", va="center", fontsize=6,
            color="white" if share[i, j] < 0.7 else "black",
        )  # fmt: skip
    axes[0, 0].set_yscale("log")
    _log_axis(axes[0, 0].yaxis)
    axes[0, 0].set_xlabel("true mag (AB)")
    axes[0, 0].set_ylabel("true effective radius [FWHM of the PSF]")
    figure.colorbar(shown, label="fraction found")
    pictures = [page.picture(figure_link(figure), "fraction found by magnitude and radius")]
    for by, label in (("mag", "mag (AB)"), ("size", "effective radius [FWHM of the PSF]")):
        figure, axes = _figure()
        own = [one for one in shares if one.by == by]
        centres = np.array([(one.low + one.high) / 2 for one in own])
        for values, counts, colour, what in (
            ([one.completeness for one in own], [one.galaxies for one in own], _BLUE, "completeness (true)"),
            ([one.purity for one in own], [one.detections for one in own], _ORANGE, "purity (measured)"),
            (
                [one.clean_purity for one in own],
                [one.clean for one in own],
                _GREEN,
                "purity without flags (measured)",
            ),
        ):
            fraction, n = np.array(values), np.maximum(np.array(counts), 1)
            known = np.isfinite(fraction)
            error = np.sqrt(np.clip(fraction * (1 - fraction), 0.25 / n, None) / n)
            axes[0, 0].errorbar(
                centres[known], fraction[known], error[known], fmt="o-", ms=3, lw=1, color=colour, label=what
            )
        if by == "size":
            axes[0, 0].set_xscale("log")
            _log_axis(axes[0, 0].xaxis)
        axes[0, 0].set_ylim(-0.03, 1.03)
        axes[0, 0].set_xlabel(label)
        axes[0, 0].legend(fontsize=8)
        pictures.append(page.picture(figure_link(figure), f"completeness and purity by {label}"))
    return (
        "<p>Colours: the fraction of the added galaxies that was found; numbers: how many were added. A galaxy is "
        "found if a detection lies within the FWHM of the PSF, or half of its effective radius, and is not a brighter "
        "source that was there before. Purity is 1 minus the detections of the negative of the mosaic for each "
        "detection of the mosaic, for all detections and for those without flags: it counts noise, but no pieces of "
        "galaxies, cosmic rays or spikes.</p>\n"
        f'<div class="grid">{"".join(pictures)}</div>'
    )


# --- bias, scatter and errors ----------------------------------------------------------------------------------


def _by(statistics: list[Statistic], by: str, label: str, *, log: bool) -> str:
    figure, axes = _figure(1, len(TARGETS), (3.2, 3.0))
    for axis, name in zip(axes[0], TARGET_NAMES, strict=True):
        own = [one for one in statistics if (one.by, one.parameter) == (by, name)]
        middle = np.array([np.sqrt(one.low * one.high) if log else (one.low + one.high) / 2 for one in own])
        bias, scatter = (np.array([getattr(one, what) for one in own]) for what in ("bias", "scatter"))
        axis.axhline(0, color="black", lw=0.6)
        axis.errorbar(middle, bias, [one.bias_err for one in own], fmt="o-", ms=3, lw=1.2, color=_BLUE)
        axis.fill_between(middle, bias - scatter, bias + scatter, color=_BLUE, alpha=0.15, lw=0)
        if log and len(own):
            axis.set_xscale("log")
            _log_axis(axis.xaxis)
        axis.set_title(_NAMES[name], fontsize=10)
        axis.set_xlabel(label)
    axes[0, 0].set_ylabel("measured minus true")
    return (
        "<p>Points: median of measured minus true, with its error; the band holds 68 % of the galaxies.</p>\n"
        f'<div class="wide">{page.picture(figure_link(figure), f"bias and scatter by {label}")}</div>'
    )


def _errors(found: Validation, statistics: list[Statistic]) -> str:
    own = found.found
    if not len(own.errors) or not np.isfinite(own.errors).all():
        return "<p>These weights predict no errors.</p>"
    figure, axes = _figure(2, len(TARGETS), (3.2, 3.0))
    off = np.abs(own.predicted - own.truth)
    for i, name in enumerate(TARGET_NAMES):
        axis = axes[0, i]
        for claimed, colour, what in (
            (own.errors[:, i], _BLUE, "claimed"),
            (found.after[:, i], _ORANGE, "with factors"),
        ):
            if not np.isfinite(claimed).all():
                continue
            edges = np.quantile(claimed, np.linspace(0, 1, min(9, 2 + len(claimed) // 50)))
            bins = np.searchsorted(edges[1:-1], claimed, side="right")
            middle = [np.median(claimed[bins == k]) for k in np.unique(bins)]
            parts = [bins == k for k in np.unique(bins)]
            real = [weighted_quantile(off[part, i], own.weights[part], ONE_SIGMA) for part in parts]
            axis.plot(middle, real, "o-", ms=3, lw=1, color=colour, label=what)
        axis.set_xscale("log")
        axis.set_yscale("log")
        _log_axis(axis.xaxis)
        _log_axis(axis.yaxis)
        usual = float(np.median(own.errors[:, i]))
        axis.axline((usual, usual), (2 * usual, 2 * usual), color="black", lw=0.6)
        axis.set_title(TARGETS[i].name, fontsize=10)
        axis.set_xlabel("error")
        axis = axes[1, i]
        rows = [one for one in statistics if (one.by, one.parameter) == ("mag", name)]
        middle = [(one.low + one.high) / 2 for one in rows]
        axis.axhspan(0.6627, 0.7027, color=_GREY, alpha=0.25, lw=0)
        axis.errorbar(middle, [r.within for r in rows], [r.within_err for r in rows], fmt="o-", ms=3, lw=1, color=_BLUE)
        axis.errorbar(
            middle, [r.after for r in rows], [r.within_err for r in rows], fmt="s-", ms=3, lw=1, color=_ORANGE
        )
        axis.set_ylim(0.3, 1.0)
        axis.set_xlabel("measured mag")
    axes[0, 0].set_ylabel("68 % of the galaxies are within")
    axes[0, 0].legend(fontsize=8)
    axes[1, 0].set_ylabel("fraction within 1 sigma")
    return (
        "<p>Above: the actual error that holds 68 % of the galaxies, against the claimed error; on the line, errors "
        "are right. Below: the fraction within 1 sigma; the grey band is 68 ± 2 %. Orange: with the factors from the "
        "other four fifths of the galaxies.</p>\n"
        f'<div class="wide">{page.picture(figure_link(figure), "errors against claimed errors")}</div>'
    )


def _blends(found: Validation, statistics: list[Statistic]) -> str:
    away = column(found.rows, "neighbour_distance") / found.fwhm
    hit, merged = (np.asarray(found.rows[name], bool) for name in ("found", "merged"))
    figure, axes = _figure()
    known = np.isfinite(away) & (away > 0)
    if known.sum() > 10:
        edges = np.quantile(away[known], np.linspace(0, 1, int(np.clip(known.sum() // 50, 2, 12)) + 1))
        bins = np.searchsorted(edges[1:-1], away, side="right")
        parts = [known & (bins == k) for k in range(len(edges) - 1) if (known & (bins == k)).any()]
        middle = [np.median(away[part]) for part in parts]
        for values, colour, what in ((hit, _BLUE, "found"), (merged, _ORANGE, "lost in a brighter source")):
            share = np.array([values[part].mean() for part in parts])
            error = np.sqrt(share * (1 - share) / np.array([part.sum() for part in parts]))
            axes[0, 0].errorbar(middle, share, error, fmt="o-", ms=3, lw=1, color=colour, label=what)
        axes[0, 0].set_xscale("log")
        _log_axis(axes[0, 0].xaxis)
        axes[0, 0].legend(fontsize=8)
    axes[0, 0].set_ylim(-0.03, 1.03)
    axes[0, 0].set_xlabel("distance of the next source of the mosaic [FWHM]")
    axes[0, 0].set_ylabel("fraction")
    return (
        f'<div class="grid">{page.picture(figure_link(figure), "fractions by distance of the next source")}</div>\n'
        + _by(statistics, "distance", "distance of the next source [FWHM]", log=True)
    )


# --- what went wrong -------------------------------------------------------------------------------------------


def _worst(found: Validation, added: Callable[[int], Exposure], mesh: Mesh, psf: Psf) -> str:
    own = found.found
    if not len(own.truth):
        return "<p>There are none to show.</p>"
    if np.isfinite(own.errors).all():
        wrong = own.pulls(own.errors)[:, : len(TARGETS)]
    else:
        off = np.abs(own.predicted - own.truth)
        wrong = off / np.quantile(off, ONE_SIGMA, axis=0)
    worst = np.argsort(-wrong.max(axis=1), kind="stable")[:WORST]
    rows = np.flatnonzero(found.counted)[worst]
    cells = []
    for row, pull in zip(rows.tolist(), wrong[worst], strict=True):
        exposure = added(int(found.rows["pass"][row]))
        cells.append(_galaxy(found, row, pull, exposure, mesh, psf))
        exposure.close()
    return (
        "<p>For each: the mosaic with the galaxy in units of its noise, with an asinh stretch; the measured model; and "
        "the residual, linear, from -5 (blue) to 5 (red) times the noise. The caption names the parameter with the "
        f'largest error in units of its claimed error.</p>\n<div class="grid">{"".join(cells)}</div>'
    )


def _galaxy(found: Validation, row: int, pull: np.ndarray, exposure: Exposure, mesh: Mesh, psf: Psf) -> str:
    names = ("x", "y", *TARGET_NAMES, "theta")
    value, true = (
        {name: float(column(found.rows[row : row + 1], f"{before}{name}")[0]) for name in names}
        for before in ("", "true_")
    )
    radius = max(value["r_eff_pix"], true["r_eff_pix"])
    cutout = Cutout.of(true["x"], true["y"], radius, exposure.shape)
    assert cutout is not None  # galaxies are added inside the image
    window = cutout.window
    signal, bad = signal_of(exposure, mesh, window)
    signal[bad] = np.nan
    rms = mesh.at(window, exposure.read(window)).rms
    measured = Galaxies(
        parameters=parameters_of({name: [v] for name, v in value.items()}, exposure.zero_point.value),
        numbers=np.zeros(1, int), seed=0, psf=psf, gain=np.inf, tap=0.0, rms=float(np.median(mesh.rms)),
    )  # fmt: skip
    model = np.zeros(signal.shape, np.float32)
    for there, part, _ in measured.drawn_in(window):
        model[there] += part
    model /= rms
    planes = [grey(cutout.placed(signal)), grey(cutout.placed(model)), red_and_blue(cutout.placed(signal - model))]
    k = int(np.argmax(pull))
    pairs = " · ".join(
        f"{label} {value[name]:.2f} ({true[name]:.2f})"
        for name, label in (("mag", "mag"), ("r_eff_pix", "R<sub>e</sub>"), ("sersic_n", "n"), ("ellipticity", "e"))
    )
    number = int(found.rows["id"][row])
    caption = f"<b>{number}</b> · {pairs}, measured (true)<br>{escape(TARGET_NAMES[k])}: {pull[k]:.1f} errors"
    return page.stamp(planes, f"galaxy {number}", caption)


# --- tables ----------------------------------------------------------------------------------------------------


def _tables(statistics: list[Statistic], shares: list[Share]) -> str:
    parts = []
    titles = {"mag": "measured mag", "size": "measured R_e / FWHM", "distance": "distance / FWHM"}
    for by, title in titles.items():
        rows = [(f"{one.low:.3g} to {one.high:.3g}", *_cells(one)) for one in statistics if one.by == by]
        parts.append(f"<h3>By {escape(title)}</h3>\n{page.table(rows, (title, 'parameter', *_HEAD[1:]))}")
    for by, title in (("mag", "mag"), ("size", "R_e / FWHM")):
        rows = [
            (
                f"{one.low:.3g} to {one.high:.3g}", f"{one.galaxies}", f"{one.found}", f"{one.merged}",
                _percent(one.completeness), f"{one.detections}", f"{one.negative}", _percent(one.purity),
                f"{one.clean}", f"{one.clean_negative}", _percent(one.clean_purity),
            )
            for one in shares
            if one.by == by
        ]  # fmt: skip
        head = (title, "added", "found", "lost in a brighter source", "completeness", "detections of the mosaic",
                "of its negative", "purity", "detections without flags", "of the negative", "purity")  # fmt: skip
        parts.append(f"<h3>Completeness and purity by {escape(title)}</h3>\n{page.table(rows, head)}")
    return "\n".join(parts)


def _percent(value: float) -> str:
    return f"{value:.0%}" if np.isfinite(value) else ""
