"""Figures of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sersicnet.catalogue.scores import r_squared
from sersicnet.schema import N_TARGETS, TARGETS


def _panels(rows: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * N_TARGETS, 4 * rows), layout="constrained")
    return figure, figure.subplots(rows, N_TARGETS, squeeze=False)


def draw_comparison(truth: np.ndarray, predicted: Mapping[str, np.ndarray], path: Path) -> None:
    """Draw predicted against true, one panel a parameter and a row for each weights, with the line y = x."""
    figure, axes = _panels(len(predicted))
    for row, (label, values) in zip(axes, predicted.items(), strict=True):
        for i, (axis, target) in enumerate(zip(row, TARGETS, strict=True)):
            good = np.isfinite(truth[:, i]) & np.isfinite(values[:, i])
            t, p = truth[good, i], values[good, i]
            axis.scatter(t, p, s=3, c=truth[good, 0], cmap="viridis", alpha=0.5, linewidths=0, rasterized=True)
            ends = [t.min(), t.max()] if len(t) else [0, 1]
            axis.plot(ends, ends, color="black", lw=1)
            margin = 0.1 * (ends[1] - ends[0]) or 0.1
            axis.set_xlim(ends[0] - margin, ends[1] + margin)
            axis.set_ylim(ends[0] - margin, ends[1] + margin)
            axis.set_title(f"{target.name}: R² = {r_squared(t, p):.4f}" if len(t) > 1 else target.name)
            axis.set_xlabel("true (colour: magnitude)")
        row[0].set_ylabel(f"predicted by {label}")
    figure.savefig(path, dpi=120)


def draw_distributions(truth: np.ndarray, predicted: Mapping[str, np.ndarray], path: Path) -> None:
    """Draw the true and the predicted distributions of each parameter over each other."""
    figure, axes = _panels(1)
    for i, (axis, target) in enumerate(zip(axes[0], TARGETS, strict=True)):
        t = truth[np.isfinite(truth[:, i]), i]
        bins = np.linspace(t.min(), t.max(), 31) if len(t) > 1 else 10
        axis.hist(t, bins, histtype="stepfilled", alpha=0.4, color="grey", label="true")
        for label, values in predicted.items():
            axis.hist(values[np.isfinite(values[:, i]), i], bins, histtype="step", label=label)
        axis.set_xlabel(f"{target.name} [{target.unit}]" if target.unit else target.name)
    axes[0, 0].legend()
    axes[0, 0].set_ylabel("galaxies")
    figure.savefig(path, dpi=120)


def draw_by_magnitude(result: Mapping[str, Any], path: Path) -> None:
    """Draw bias and dispersion of each parameter by magnitude, with the statistical limit where it is known."""
    figure, axes = _panels(2)
    curves = {label: found["by_magnitude"] for label, found in result["scores"].items()}
    for name, found in result.get("limits", {}).get("estimates", {}).items():
        curves[f"limit, {name}"] = found["by_magnitude"]
    for label, rows in curves.items():
        middle = [sum(row["range"]) / 2 for row in rows]
        style = {"ls": ":"} if label.startswith("limit, ") else {"marker": "o", "ms": 4}
        for i, target in enumerate(TARGETS):
            for axis, quantity in zip(axes[:, i], ("bias", "dispersion"), strict=True):
                axis.plot(middle, [row[target.name][quantity] for row in rows], label=label, **style)
    for i, name in enumerate(("mag", "R_e, relative", "log10 n", "axis ratio")):
        axes[0, i].axhline(0, color="black", lw=0.5)
        axes[0, i].set_title(name)
        axes[1, i].set_yscale("log")
        axes[1, i].set_xlabel("true magnitude")
    axes[0, 0].set_ylabel("bias")
    axes[1, 0].set_ylabel("dispersion")
    axes[1, 0].legend()
    figure.savefig(path, dpi=120)
