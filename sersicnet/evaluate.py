"""Truth against measurement: scores, tables and figures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sersicnet import weights
from sersicnet.schema import TARGETS

CHUNK = 512
"""Stamps read before they go through the network: 32 MB."""

BRIGHT = 23.0
"""The study's magnitude limit."""

MAG_EDGES = (16, 18, 20, 21, 22, 23, 24, 25, 26, 27)
OUTLIER = 0.5


def r_squared(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Coefficient of determination, ``1 - sum (y - f)^2 / sum (y - mean y)^2``."""
    return float(1 - np.sum((truth - predicted) ** 2) / np.sum((truth - truth.mean()) ** 2))


def scores(
    truth: np.ndarray, predicted: np.ndarray, errors: np.ndarray | None = None, mag: np.ndarray | None = None
) -> dict[str, Any]:
    """Scores a parameter, for all galaxies and for those of mag <= 23.

    Parameters
    ----------
    truth, predicted : ndarray, float, (N, 4)
        In physical units, in the order of `sersicnet.schema.TARGETS`. Rows with
        a NaN in either are left out and counted.
    errors : ndarray, float, (N, 4), optional
        1 sigma errors of `predicted`.
    mag : ndarray, float, (N,), optional
        AB magnitudes to cut at; the first column of `truth` by default.

    Returns
    -------
    dict
        For ``all`` and ``mag <= 23``: ``n``, ``missing``, and for each
        parameter ``r2``, ``bias`` (median error), ``scatter`` (68 % of the
        deviations from it) and, with errors, ``coverage`` (within 1 sigma).
    """
    mag = truth[:, 0] if mag is None else mag
    samples = {}
    for name, chosen in (("all", np.ones(len(truth), bool)), (f"mag <= {BRIGHT:g}", mag <= BRIGHT)):
        good = chosen & np.isfinite(truth).all(axis=1) & np.isfinite(predicted).all(axis=1)
        found: dict[str, Any] = {"n": int(good.sum()), "missing": int((chosen & ~good).sum())}
        if found["n"] > 1:
            difference = predicted[good] - truth[good]
            bias = np.median(difference, axis=0)
            values = {
                "r2": [r_squared(truth[good, i], predicted[good, i]) for i in range(len(TARGETS))],
                "bias": bias,
                "scatter": np.quantile(np.abs(difference - bias), 0.6827, axis=0),
            }
            if errors is not None:
                values["coverage"] = np.mean(np.abs(difference) <= errors[good], axis=0)
            for quantity, row in values.items():
                found[quantity] = {t.name: float(v) for t, v in zip(TARGETS, row, strict=True)}
        samples[name] = found
    return samples


def by_magnitude(truth: np.ndarray, predicted: np.ndarray, errors: np.ndarray | None = None) -> list[dict[str, Any]]:
    """The statistics of the Euclid Morphology Challenge in bins of true magnitude.

    Errors are absolute in magnitude and axis ratio, relative in the radius, and
    of log10 of the index. Their median is the bias, the half-width that holds
    68 % of the deviations from it the dispersion, and outliers are off by more
    than 0.5.

    Parameters
    ----------
    truth, predicted, errors
        As for `scores`; magnitudes are AB.

    Returns
    -------
    list of dict
        For each bin with at least ten galaxies: ``range`` (of magnitude), ``n``, and a
        dict for each parameter with ``bias``, ``dispersion``, ``outliers`` and,
        with errors, ``within68`` and ``within95``: the fractions of truths within 1 and
        1.96 sigma.

    References
    ----------
    Bretonniere et al. 2023, A&A 671, A102.
    """
    rows = []
    for low, high in pairwise(MAG_EDGES):
        good = (truth[:, 0] >= low) & (truth[:, 0] < high)
        good &= np.isfinite(truth).all(axis=1) & np.isfinite(predicted).all(axis=1)
        if good.sum() < 10:
            continue
        t, p = truth[good], predicted[good]
        with np.errstate(invalid="ignore", divide="ignore"):
            off = np.column_stack(
                [p[:, 0] - t[:, 0], p[:, 1] / t[:, 1] - 1, np.log10(p[:, 2] / t[:, 2]), t[:, 3] - p[:, 3]]
            )
        row: dict[str, Any] = {"range": [low, high], "n": int(good.sum())}
        for i, target in enumerate(TARGETS):
            bias = float(np.median(off[:, i]))
            row[target.name] = {
                "bias": bias,
                "dispersion": float(np.quantile(np.abs(off[:, i] - bias), 0.6827)),
                "outliers": float((np.abs(off[:, i]) > OUTLIER).mean()),
            }
            if errors is not None:
                pull = np.abs(p[:, i] - t[:, i]) / errors[good, i]
                row[target.name]["within68"] = float((pull <= 0.9945).mean())
                row[target.name]["within95"] = float((pull <= 1.96).mean())
        rows.append(row)
    return rows


def evaluate(
    data: str | Path,
    weights_name: str | Path = weights.DEFAULT,
    output: str | Path | None = None,
    *,
    image: str | Path | None = None,
    zero_point: float | None = None,
    overwrite: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Score weights on stamps whose truth is known.

    Parameters
    ----------
    data : str or Path
        Dataset from `sersicnet simulate`, or a CSV file of labelled galaxies.
    weights_name : str or Path
        Name of shipped weights, or a weights directory.
    output : str or Path, optional
        Directory for ``scores.json``, ``scores.md`` and the two figures of the
        study: predicted against true, and both distributions.
    image, zero_point
        For a CSV file: see `sersicnet.dataset.read_labels`.
    overwrite : bool
        Whether to replace `output`.
    report : callable
        Receives how many of how many stamps are done.

    Returns
    -------
    dict
        ``weights``, ``sha256``, ``data``, ``samples`` as from `scores`, and
        ``by_magnitude``.
    """
    from sersicnet.dataset import Dataset, read_labels

    if output is not None:
        output = Path(output)
        weights.check_directory(output, "scores.json", overwrite)
    network = weights.load(weights_name)
    is_labels = Path(data).suffix.lower() == ".csv"
    with nullcontext(read_labels(data, image, zero_point)) if is_labels else Dataset(data) as source:
        truth, mag = source.targets.copy(), source.mag
        predicted, errors = np.empty_like(truth), np.empty_like(truth)
        for first in range(0, len(source), CHUNK):
            report(first, len(source))
            rows = slice(first, min(first + CHUNK, len(source)))
            predicted[rows], found = network.predict(source.stamps(rows.start, rows.stop))
            if found is not None:
                errors[rows] = found
        report(len(source), len(source))
    # Relative and AB magnitudes differ by what truth and prediction share.
    predicted[:, 0] += mag - truth[:, 0]
    truth[:, 0] = mag
    known = errors if network.card["errors"] else None
    result = {
        "weights": network.name,
        "sha256": network.sha256,
        "data": str(data),
        "samples": scores(truth, predicted, known),
        "by_magnitude": by_magnitude(truth, predicted, known),
    }
    if output is not None:
        _write_report(output, result, truth, predicted)
    return result


def _write_report(output: Path, result: dict[str, Any], truth: np.ndarray, predicted: np.ndarray) -> None:
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "scores.json").write_text(json.dumps(result, indent=1) + "\n")
    (partial / "scores.md").write_text(as_markdown(result))
    draw_comparison(truth, predicted, partial / "predicted_against_true.png")
    draw_distributions(truth, predicted, partial / "distributions.png")
    if output.exists():
        shutil.rmtree(output)
    partial.rename(output)


def as_markdown(result: Mapping[str, Any]) -> str:
    """The result of `evaluate` as a page."""
    return (
        f"`{result['weights']}` (SHA-256 {result['sha256'][:12]}) on `{result['data']}`\n\n"
        f"{weights.scores_table(result['samples'])}\n\n"
        f"{_magnitude_table(result['by_magnitude'])}\n"
    )


def _magnitude_table(rows: list[dict[str, Any]]) -> str:
    """Bias and dispersion, outliers, and the coverage of the intervals, by magnitude."""
    names = ("mag", "R_e, relative", "log10 n", "axis ratio")
    lines = [
        "Median ± 68 %; outliers beyond 0.5; truths within the 68 and the 95 % interval.",
        "",
        "| mag | N | " + " | ".join(names) + " |",
        "|" + "---|" * (2 + len(names)),
    ]
    for row in rows:
        cells = []
        for target in TARGETS:
            found = row[target.name]
            cell = f"{found['bias']:+.3f} ± {found['dispersion']:.3f}; {found['outliers']:.1%}"
            if "within68" in found:
                cell += f"; {found['within68']:.0%}, {found['within95']:.0%}"
            cells.append(cell)
        lines.append(f"| {row['range'][0]}-{row['range'][1]} | {row['n']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _panels() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(TARGETS), 4), layout="constrained")
    return figure, figure.subplots(1, len(TARGETS))


def draw_comparison(truth: np.ndarray, predicted: np.ndarray, path: Path) -> None:
    """Draw predicted against true, one panel a parameter, with the line y = x."""
    figure, axes = _panels()
    for i, (axis, target) in enumerate(zip(axes, TARGETS, strict=True)):
        good = np.isfinite(truth[:, i]) & np.isfinite(predicted[:, i])
        t, p = truth[good, i], predicted[good, i]
        axis.scatter(t, p, s=3, c=truth[good, 0], cmap="viridis", alpha=0.5, linewidths=0, rasterized=True)
        ends = [t.min(), t.max()] if len(t) else [0, 1]
        axis.plot(ends, ends, color="black", lw=1)
        margin = 0.1 * (ends[1] - ends[0])
        axis.set_xlim(ends[0] - margin, ends[1] + margin)
        axis.set_ylim(ends[0] - margin, ends[1] + margin)
        axis.set_title(f"{target.name}: R² = {r_squared(t, p):.4f}" if len(t) > 1 else target.name)
        axis.set_xlabel("true (colour: magnitude)")
    axes[0].set_ylabel("predicted")
    figure.savefig(path, dpi=120)


def draw_distributions(truth: np.ndarray, predicted: np.ndarray, path: Path) -> None:
    """Draw the true and the predicted distribution of each parameter over each other."""
    figure, axes = _panels()
    for i, (axis, target) in enumerate(zip(axes, TARGETS, strict=True)):
        t, p = (values[np.isfinite(values[:, i]), i] for values in (truth, predicted))
        bins = np.linspace(t.min(), t.max(), 31) if len(t) > 1 else 10
        axis.hist(t, bins, histtype="stepfilled", alpha=0.4, label="true")
        axis.hist(p, bins, histtype="step", color="black", label="predicted")
        axis.set_xlabel(f"{target.name} [{target.unit}]" if target.unit else target.name)
    axes[0].legend()
    axes[0].set_ylabel("galaxies")
    figure.savefig(path, dpi=120)
