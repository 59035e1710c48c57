"""Truth beside measurement for galaxies that were added to a mosaic, and the factors on errors that follow.

Completeness is counted by true quantities. Bias, scatter and coverage are of bins of measured quantities, which a
catalogue has, so that they can be applied to it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from astropy.io import fits
from astropy.table import QTable, Table

from sersicnet.catalogue.columns import column, flags_of
from sersicnet.catalogue.factors import (
    FOLDS,
    LEAST,
    ONE_SIGMA,
    PARAMETERS,
    Factors,
    Found,
    angle_between,
    factors_on,
    quantities_of,
    weighted_quantile,
)
from sersicnet.catalogue.weighting import weights_of
from sersicnet.errors import printable
from sersicnet.output import whole
from sersicnet.schema import TARGET_NAMES, TARGETS, Flag, encode
from sersicnet.weights import UNKNOWN_ANGLE

PER_BIN, MOST_BINS = 300, 8
"""Galaxies of a bin, at least, and bins of a quantity, at most; all bins of a quantity have as many galaxies."""

NOT_COUNTED = Flag.NO_DATA | Flag.EDGE | Flag.MASKED | Flag.SATURATED
"""Rows with one of these flags lack a part of their light, and count neither for statistics nor for factors."""

BINS = {
    "mag": "measured magnitude",
    "size": "measured effective radius in FWHM of the PSF",
    "distance": "distance of the next source in FWHM of the PSF",
}
"""What bins are of: the first of `sersicnet.catalogue.factors.QUANTITIES`."""


# --- the galaxies ----------------------------------------------------------------------------------------------


class Share(NamedTuple):
    """Completeness and purity in a bin of a magnitude or a size.

    Attributes
    ----------
    by : str
        "mag" or "size" (effective radius in FWHM of the PSF).
    low, high : float
    galaxies, found, merged : int
        Galaxies that were added, those that were found, and those in whose place there is a brighter source, by their
        true quantities.
    detections, negative : int
        Detections of the mosaic and of its negative, by their measured quantities.
    clean, clean_negative : int
        Those of them without flags.
    """

    by: str
    low: float
    high: float
    galaxies: int
    found: int
    merged: int
    detections: int
    negative: int
    clean: int
    clean_negative: int

    @property
    def completeness(self) -> float:
        """Fraction that was found; NaN without galaxies."""
        return self.found / self.galaxies if self.galaxies else np.nan

    @property
    def purity(self) -> float:
        """1 minus the detections of the negative for each of the mosaic; NaN without any."""
        return max(1 - self.negative / self.detections, 0.0) if self.detections else np.nan

    @property
    def clean_purity(self) -> float:
        """The purity of detections without flags; NaN without any."""
        return max(1 - self.clean_negative / self.clean, 0.0) if self.clean else np.nan


class Statistic(NamedTuple):
    """How well a parameter is measured in a bin.

    Attributes
    ----------
    by, parameter : str
        A key of `BINS`, or "all"; one of `sersicnet.catalogue.factors.PARAMETERS`.
    low, high : float
        Of the bin; sizes and distances in FWHM.
    n : int
    bias, bias_err : float
        Median of measured minus true: magnitude, log radius, log index, ellipticity, position angle [deg].
    scatter, scatter_err : float
        The distance from the bias that 68 % are within.
    within, within_err : float
        Fraction of the truths within 1 sigma of the claimed errors; NaN without errors.
    after : float
        The same with the factors of other galaxies; NaN without factors.
    within_two, after_two : float
        The same within 2 sigma.
    """

    by: str
    parameter: str
    low: float
    high: float
    n: int
    bias: float
    bias_err: float
    scatter: float
    scatter_err: float
    within: float
    within_err: float
    after: float
    within_two: float
    after_two: float


@dataclass(frozen=True, eq=False)
class Validation:
    """Galaxies that were added to a mosaic, with their truth, and what was measured.

    Attributes
    ----------
    rows : QTable
        A row for each galaxy: true values begin with ``true_``; the columns of the catalogue are NaN where it was
        not found.
    detections, negative : ndarray, float64, (N, 5) and (M, 5)
        Targets and flags of the detections of the mosaic, and of its negative.
    fwhm : float
        Of the PSF, pixels.
    options : dict
        Of the measurement, with a digest of the mosaic.
    """

    rows: QTable
    detections: np.ndarray
    negative: np.ndarray
    fwhm: float
    options: dict[str, Any]

    def __repr__(self) -> str:
        n, hit = len(self.rows), int(np.sum(self.rows["found"]))
        lines = [f"<Validation of {self.rows.meta.get('IMAGE', 'an image')}: {n:,} galaxies added, {hit:,} found"]
        logs = {target.name for target in TARGETS if target.log}
        for one in self.statistics():
            if one.by == "all":
                within = f"{one.within:.0%} ± {one.within_err:.0%}" if np.isfinite(one.within) else "not known"
                lines.append(
                    f"{'ln ' * (one.parameter in logs)}{one.parameter}: bias {one.bias:+.3f} ± {one.bias_err:.3f}, "
                    f"scatter {one.scatter:.3f}, within 1 sigma {within}"
                )
        return "\n  ".join(lines) + ">"

    @property
    def truth(self) -> np.ndarray:
        """True values of all galaxies, float64, (N, 4)."""
        return np.column_stack([column(self.rows, f"true_{name}") for name in TARGET_NAMES])

    @functools.cached_property
    def counted(self) -> np.ndarray:
        """Galaxies that count for statistics: found, with all values, and none of the flags `NOT_COUNTED`."""
        predicted = np.column_stack([column(self.rows, name) for name in TARGET_NAMES])
        good = np.asarray(self.rows["found"], bool) & (flags_of(self.rows) & NOT_COUNTED == 0)
        return good & np.isfinite(predicted).all(axis=1)

    @functools.cached_property
    def stands_for(self) -> np.ndarray:
        """Galaxies of the mosaic that each added galaxy stands for, float64, (N,); see `weights_of`."""
        measured = np.column_stack([column(self.rows, name) for name in TARGET_NAMES])
        own, negative = (
            rows[rows[:, -1].astype(int) & (NOT_COUNTED | Flag.POINT_LIKE) == 0, :-1]
            for rows in (self.detections, self.negative)
        )
        return weights_of(self.truth, np.where(self.counted[:, None], measured, np.nan), own, negative)

    @functools.cached_property
    def found(self) -> Found:
        """The galaxies of `counted`."""
        rows = self.rows[self.counted]
        predicted = np.column_stack([column(rows, name) for name in TARGET_NAMES])
        names = [name for name in PARAMETERS if name != "theta" or "theta_err" in rows.colnames]
        errors = np.column_stack([column(rows, f"{name}_err") for name in names])
        if np.isnan(errors[:, -1]).any():
            errors = errors[:, : len(TARGET_NAMES)]
        return Found(
            truth=self.truth[self.counted],
            predicted=predicted,
            turned=angle_between(column(rows, "theta"), column(rows, "true_theta")),
            errors=errors,
            quantities=quantities_of(predicted, errors, column(rows, "distance"), self.fwhm),
            weights=self.stands_for[self.counted],
        )

    @functools.cached_property
    def edges(self) -> tuple[np.ndarray, ...]:
        """Borders of the bins of each of `BINS`, with as many galaxies in each."""
        n = int(np.clip(len(self.found.truth) // PER_BIN, 1, MOST_BINS))
        if not len(self.found.truth):
            return (np.array([0.0, 1.0]),) * 3
        return tuple(_distinct(np.quantile(where, np.linspace(0, 1, n + 1))) for where in self._binned())

    def _binned(self) -> np.ndarray:
        """What bins are of, float64, (3, N)."""
        return self.found.quantities[:, 0, : len(BINS)].T

    @functools.cached_property
    def factors(self) -> Factors | None:
        """Factors on errors; None if too few galaxies were found, or they have no errors."""
        if len(self.found.truth) < LEAST or not np.isfinite(self.found.errors).all():
            return None
        return Factors.fitted(self.found, self.fwhm, self.options)

    @functools.cached_property
    def after(self) -> np.ndarray:
        """Errors with the factors of the other galaxies, float64, (N, P); NaN without factors."""
        found, out = self.found, np.full(self.found.errors.shape, np.nan)
        if self.factors is None:
            return out
        part = np.random.default_rng(0).permutation(len(out)) % FOLDS
        for k in range(FOLDS):
            own = found.taken(part == k)
            out[part == k] = own.errors * np.exp(factors_on(found.taken(part != k)).at(own.quantities))
        out[:, len(TARGET_NAMES) :] = np.minimum(out[:, len(TARGET_NAMES) :], UNKNOWN_ANGLE)
        return out

    def statistics(self) -> list[Statistic]:
        """Bias, scatter and coverage of each parameter, of all galaxies and by bins of each of `BINS`.

        Each galaxy counts as often as the mosaic's own galaxies that it stands for.
        """
        found, out = self.found, []
        off = np.column_stack([encode(found.predicted) - encode(found.truth), found.turned])
        claimed, corrected = found.pulls(found.errors), found.pulls(self.after)
        for by, low, high, chosen in self._chosen():
            n, weights = int(chosen.sum()), found.weights[chosen]
            root = weights.sum() / np.sqrt((weights**2).sum())
            for i, name in enumerate(PARAMETERS[: found.errors.shape[1]]):
                own, before, after = (v[chosen, i] for v in (off, claimed, corrected))
                bias = weighted_quantile(own, weights, 0.5)
                scatter = weighted_quantile(np.abs(own - bias), weights, ONE_SIGMA)
                within = _within(before, 1, weights)
                out.append(
                    Statistic(
                        by, name, low, high, n, bias, float(1.2533 * scatter / root), scatter,
                        float(0.96 * scatter / root), within, float(np.sqrt(within * (1 - within)) / root),
                        _within(after, 1, weights), _within(before, 2, weights), _within(after, 2, weights),
                    )
                )  # fmt: skip
        return out

    def _chosen(self) -> Iterator[tuple[str, float, float, np.ndarray]]:
        """The bins: what they are of, their borders, and the galaxies in them."""
        n = len(self.found.truth)
        if n < 2:
            return
        yield "all", -np.inf, np.inf, np.ones(n, bool)
        for by, where, edges in zip(BINS, self._binned(), self.edges, strict=True):
            bins = np.searchsorted(edges[1:-1], where, side="right")
            borders = edges if by == "mag" else np.exp(edges)
            for k, (low, high) in enumerate(pairwise(borders.tolist())):
                if (bins == k).sum() > 1:
                    yield by, low, high, bins == k

    def shares(self) -> list[Share]:
        """Completeness and purity by magnitude and by size."""
        status = np.asarray(self.rows["found"], bool), np.asarray(self.rows["merged"], bool)
        true, out = self.truth, []
        clean = self.detections[:, -1] == 0, self.negative[:, -1] == 0
        for by, i, unit in (("mag", 0, 1.0), ("size", 1, self.fwhm)):
            values, own, negative = true[:, i] / unit, self.detections[:, i] / unit, self.negative[:, i] / unit
            edges = magnitude_edges(values) if by == "mag" else size_edges(values)
            for low, high in pairwise(edges.tolist()):
                inside, mine, theirs = ((v >= low) & (v < high) for v in (values, own, negative))
                counts = (
                    inside.sum(),
                    (inside & status[0]).sum(),
                    (inside & status[1]).sum(),
                    mine.sum(),
                    theirs.sum(),
                    (mine & clean[0]).sum(),
                    (theirs & clean[1]).sum(),
                )
                out.append(Share(by, low, high, *(int(count) for count in counts)))
        return out

    def write(self, path: Path) -> None:
        """Write the table of galaxies, the statistics and the factors as a FITS file.

        Raises
        ------
        OutputError
            If it cannot be written.
        """
        hdus = fits.HDUList([fits.PrimaryHDU()])
        header = hdus[0].header
        for key, value in self.rows.meta.items():
            if isinstance(value, str | int | float) and len(key) <= 8:
                header[key] = (
                    printable(value).encode("ascii", "backslashreplace").decode() if isinstance(value, str) else value
                )
        header["PSFFWHM"] = (self.fwhm, "full width of the PSF, pixels")
        header["OPTIONS"] = json.dumps(self.options)
        plain = self.rows.copy()
        plain.meta.clear()
        plain["stands_for"] = self.stands_for
        parts = {"GALAXIES": plain, "STATISTICS": _table(Statistic, self.statistics()), "SHARES": self._shares_table()}
        if self.factors is not None:
            parts["FACTORS"] = self.factors.table()
        for name, table in parts.items():
            hdu = fits.table_to_hdu(table)
            hdu.name = name
            hdus.append(hdu)
        with whole(path) as partial:
            hdus.writeto(partial, overwrite=True, checksum=True)

    def _shares_table(self) -> Table:
        rows = self.shares()
        table = _table(Share, rows)
        table["completeness"] = [row.completeness for row in rows]
        table["purity"] = [row.purity for row in rows]
        table["clean_purity"] = [row.clean_purity for row in rows]
        return table


_COUNTS = ("n", "galaxies", "found", "merged", "detections", "negative", "clean", "clean_negative")


def _table(kind: Any, rows: list[Any]) -> Table:
    types = {"by": "U8", "parameter": "U12", **dict.fromkeys(_COUNTS, "i4")}
    columns = {name: [getattr(row, name) for row in rows] for name in kind._fields}
    return Table({name: np.array(values, types.get(name, "f8")) for name, values in columns.items()})


def _distinct(edges: np.ndarray) -> np.ndarray:
    """Ascending borders, at least two."""
    out = np.unique(edges)
    return out if len(out) > 1 else np.array([out[0] - 0.5, out[0] + 0.5])


def _within(pulls: np.ndarray, limit: float, weights: np.ndarray) -> float:
    return float(np.average(pulls <= limit, weights=weights)) if np.isfinite(pulls).all() else np.nan


def magnitude_edges(mag: np.ndarray) -> np.ndarray:
    """Borders of bins of half a magnitude that hold all values."""
    known = mag[np.isfinite(mag)]
    if not len(known):
        return np.array([0.0, 1.0])
    low, high = np.floor(2 * known.min()) / 2, np.floor(2 * known.max()) / 2 + 0.5
    return np.linspace(low, high, round(2 * (high - low)) + 1)


def size_edges(size: np.ndarray) -> np.ndarray:
    """Borders of bins of a factor of the square root of two in size."""
    known = size[np.isfinite(size) & (size > 0)]
    if not len(known):
        return np.array([0.0, 1.0])
    low, high = np.floor(2 * np.log2(known.min())), np.floor(2 * np.log2(known.max())) + 1
    return 2 ** (np.linspace(low, high, round(high - low) + 1) / 2)
