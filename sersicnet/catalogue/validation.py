"""Truth beside measurement for galaxies that were added to a mosaic, and the factors on errors that follow.

Completeness is counted by true quantities. Bias, scatter and coverage are of bins of measured quantities, which a
catalogue has, so that they can be applied to it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from astropy.io import fits
from astropy.table import QTable, Table

from sersicnet.catalogue.columns import column, flags_of
from sersicnet.errors import InputError, first_line, printable
from sersicnet.output import whole
from sersicnet.schema import TARGET_NAMES, TARGETS, Flag, decode, encode

ONE_SIGMA = 0.6827
"""Fraction of a normal distribution within 1 sigma."""

PER_BIN, MOST_BINS = 300, 8
"""Galaxies of a bin, at least, and bins of a quantity, at most; all bins of a quantity have as many galaxies."""

LEAST = 100
"""Galaxies that must be found for factors on errors."""

FOLDS = 5
"""Parts of the galaxies: factors are tested on each part with those of the others."""

FARTHEST = 1000.0
"""Distance of the next source where there is none, in FWHM of the PSF."""

NOT_COUNTED = Flag.NO_DATA | Flag.EDGE | Flag.MASKED | Flag.SATURATED
"""Rows with one of these flags lack a part of their light, and count neither for statistics nor for factors."""

QUANTITIES = {
    "mag": "measured magnitude",
    "size": "measured effective radius in FWHM of the PSF",
    "distance": "distance of the next source in FWHM of the PSF",
}
"""What bins are of."""

_ROUNDS, _STEP = 30, 0.7


# --- functions of the three quantities -------------------------------------------------------------------------


class Curves(NamedTuple):
    """A sum of three curves for each parameter, of magnitude and of the logarithms of size and distance.

    Attributes
    ----------
    nodes : tuple of ndarray, float64, (K,)
        Of each of `QUANTITIES`, ascending. Curves are linear between nodes and constant beyond.
    values : tuple of ndarray, float64, (K, 4)
    """

    nodes: tuple[np.ndarray, ...]
    values: tuple[np.ndarray, ...]

    def at(self, quantities: np.ndarray) -> np.ndarray:
        """The sums for each of the targets, float64, (N, 4), at quantities of shape (N, 3); NaN where one is NaN."""
        out = np.zeros((len(quantities), len(TARGETS)))
        for where, nodes, values in zip(quantities.T, self.nodes, self.values, strict=True):
            for i in range(len(TARGETS)):
                out[:, i] += np.interp(where, nodes, values[:, i])
        return out

    @classmethod
    def fitted(cls, quantities: np.ndarray, values: np.ndarray, share: float, edges: tuple[np.ndarray, ...]) -> Curves:
        """The curves that a share of the values is below, in each bin of each quantity.

        Parameters
        ----------
        quantities : ndarray, float64, (N, 3)
        values : ndarray, float64, (N, 4)
        share : float
            0.5 for medians.
        edges : tuple of ndarray
            Borders of the bins of each quantity.
        """
        bins = [_bins(where, own) for where, own in zip(quantities.T, edges, strict=True)]
        nodes = tuple(
            np.array([np.median(where[own == k]) for k in range(own.max() + 1)])
            for where, own in zip(quantities.T, bins, strict=True)
        )
        out = cls(nodes, tuple(np.zeros((len(one), len(TARGETS))) for one in nodes))
        for _ in range(_ROUNDS):
            for own, curve in zip(bins, out.values, strict=True):
                rest = values - out.at(quantities)
                for k in range(len(curve)):
                    curve[k] += _STEP * np.quantile(rest[own == k], share, axis=0)
        return out


def _bins(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The bin of each value; values beyond the edges are in the first and the last bin."""
    return np.searchsorted(edges[1:-1], values, side="right")


def quantities_of(mag: np.ndarray, r_eff_pix: np.ndarray, distance: np.ndarray, fwhm: float) -> np.ndarray:
    """Magnitude, log of the radius and of the distance of the next source in FWHM, float64, (N, 3)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        away = np.log(np.minimum(np.maximum(distance / fwhm, 1e-3), FARTHEST))
        return np.column_stack([mag, np.log(r_eff_pix / fwhm), away])


def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance of the next source, pixels, float64, (N,); infinite where there is none."""
    from scipy.spatial import KDTree

    places = np.column_stack([x, y])
    out, good = np.full(len(places), np.inf), np.isfinite(places).all(axis=1)
    if good.sum() > 1:
        out[good] = KDTree(places[good]).query(places[good], 2)[0][:, 1]
    return out


# --- factors ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Factors:
    """What a validation found on errors and biases, to be applied to a catalogue of the same mosaic.

    Attributes
    ----------
    errors : Curves
        Logarithms of the factors on errors.
    bias : Curves
        Measured minus true magnitude, log radius, log index and ellipticity.
    errors_without_bias : Curves
        Logarithms of the factors on errors after the bias is taken out.
    fwhm : float
        Of the PSF, pixels of the image.
    options : dict
        Of the measurement, with a digest of the mosaic.
    name, sha256 : str
        Of the file.
    """

    errors: Curves
    bias: Curves
    errors_without_bias: Curves
    fwhm: float
    options: dict[str, Any]
    name: str = ""
    sha256: str = ""

    @classmethod
    def fitted(cls, found: Found, edges: tuple[np.ndarray, ...], fwhm: float, options: dict[str, Any]) -> Factors:
        """The factors that give the errors of galaxies their coverage."""
        bias = Curves.fitted(found.quantities, encode(found.predicted) - encode(found.truth), 0.5, edges)
        freed, errors = _without_bias(found.predicted, found.errors, bias.at(found.quantities))
        logs = [
            _log_pull(values, sigma, found.truth)
            for values, sigma in ((found.predicted, found.errors), (freed, errors))
        ]
        own, after = (Curves.fitted(found.quantities, one, ONE_SIGMA, edges) for one in logs)
        return cls(own, bias, after, fwhm, options)

    @classmethod
    def read(cls, path: str | Path) -> Factors:
        """Read the factors of a validation file.

        Raises
        ------
        InputError
            If it is no validation file, or too few galaxies were found for factors.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"A validation is a file that `sersicnet validate` writes; there is none at {path}.")
        try:
            with fits.open(path) as hdus:
                header = hdus[0].header
                options, fwhm = json.loads(header["OPTIONS"]), float(header["PSFFWHM"])
                table = Table(hdus["FACTORS"].data) if "FACTORS" in hdus else None
        except Exception as error:  # astropy raises many types for damaged files
            raise InputError(f"{path} is not a file that `sersicnet validate` writes: {first_line(error)}.") from error
        if table is None:
            raise InputError(
                f"{path} has no factors on errors: fewer than {LEAST} galaxies were found, or they have no errors. "
                "Validate with more galaxies."
            )
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        errors, bias, after = (_from_table(table, kind) for kind in ("errors", "bias", "after"))
        return cls(errors, bias, after, fwhm, options, printable(path.name), digest)

    def table(self) -> Table:
        """The curves as a table with a row for each node."""
        rows = []
        for kind, curves in (("errors", self.errors), ("bias", self.bias), ("after", self.errors_without_bias)):
            for quantity, nodes, values in zip(QUANTITIES, curves.nodes, curves.values, strict=True):
                rows += [(kind, quantity, node, *own) for node, own in zip(nodes, values, strict=True)]
        return Table(rows=rows, names=("curve", "quantity", "node", *TARGET_NAMES))

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse a measurement of another mosaic or with other options.

        Raises
        ------
        InputError
            Which states the first difference.
        """
        mine = json.loads(json.dumps(options))
        for name in {**self.options, **mine}:
            before, now = self.options.get(name), mine.get(name)
            if before != now:
                shown = [_shown(value) for value in (before, now)]
                what = f": {name} was {shown[0]}, and is {shown[1]} now" if max(map(len, shown)) < 60 else f": {name}"
                raise InputError(
                    f"A validation is applied to the same mosaic, measured with the same options; {self.name} is of "
                    f"{'another mosaic' if name == 'mosaic' else f'other options{what}'}. Validate this one."
                )

    def applied(
        self, predicted: np.ndarray, errors: np.ndarray, distance: np.ndarray, *, debias: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Values and errors of a catalogue with the factors applied.

        Parameters
        ----------
        predicted, errors : ndarray, float64, (N, 4)
            Radii in pixels of the image.
        distance : ndarray, float64, (N,)
            See `distances`.
        debias : bool
            Whether to take the biases out of the values, too.

        Returns
        -------
        predicted, errors : ndarray, float64, (N, 4)
            NaN where a value is.
        """
        where = quantities_of(predicted[:, 0], predicted[:, 1], distance, self.fwhm)
        if not debias:
            return predicted, errors * np.exp(self.errors.at(where))
        freed, errors = _without_bias(predicted, errors, self.bias.at(where))
        return freed, errors * np.exp(self.errors_without_bias.at(where))


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)


def _from_table(table: Table, kind: str) -> Curves:
    nodes, values = [], []
    for quantity in QUANTITIES:
        rows = table[(np.char.strip(table["curve"]) == kind) & (np.char.strip(table["quantity"]) == quantity)]
        nodes.append(np.array(rows["node"], float))
        values.append(np.column_stack([np.array(rows[name], float) for name in TARGET_NAMES]))
    return Curves(tuple(nodes), tuple(values))


def _without_bias(predicted: np.ndarray, errors: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values without a bias, within what is possible, and their errors, which are relative where targets are logs."""
    freed = decode(encode(predicted) - bias)
    freed[:, 3] = np.clip(freed[:, 3], 0, 1 - 1e-3)
    logs = np.array([target.log for target in TARGETS])
    return freed, np.where(logs, errors * freed / predicted, errors)


def _log_pull(predicted: np.ndarray, errors: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(np.abs(predicted - truth) / errors, 1e-6))


# --- the galaxies ----------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """Galaxies that were found and measured.

    Attributes
    ----------
    truth, predicted, errors : ndarray, float64, (N, 4)
        Errors are NaN where the network gives none.
    quantities : ndarray, float64, (N, 3)
        See `quantities_of`.
    """

    truth: np.ndarray
    predicted: np.ndarray
    errors: np.ndarray
    quantities: np.ndarray

    def taken(self, which: np.ndarray) -> Found:
        """Some of the galaxies."""
        return Found(*(values[which] for values in self))


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
    """

    by: str
    low: float
    high: float
    galaxies: int
    found: int
    merged: int
    detections: int
    negative: int

    @property
    def completeness(self) -> float:
        """Fraction that was found; NaN without galaxies."""
        return self.found / self.galaxies if self.galaxies else np.nan

    @property
    def purity(self) -> float:
        """1 minus the detections of the negative for each of the mosaic; NaN without any."""
        return max(1 - self.negative / self.detections, 0.0) if self.detections else np.nan


class Statistic(NamedTuple):
    """How well a parameter is measured in a bin.

    Attributes
    ----------
    by, parameter : str
        A key of `QUANTITIES`, or "all"; a target.
    low, high : float
        Of the bin; sizes and distances in FWHM.
    n : int
    bias, bias_err : float
        Median of measured minus true: magnitude, log radius, log index, ellipticity.
    scatter, scatter_err : float
        The distance from the bias that 68 % are within.
    within, within_err : float
        Fraction of the truths within 1 sigma of the claimed errors; NaN without errors.
    after : float
        The same with the factors of other galaxies; NaN without factors.
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


@dataclass(frozen=True, eq=False)
class Validation:
    """Galaxies that were added to a mosaic, with their truth, and what was measured.

    Attributes
    ----------
    rows : QTable
        A row for each galaxy: true values begin with ``true_``; the columns of the catalogue are NaN where it was
        not found.
    detections, negative : ndarray, float64, (N, 2) and (M, 2)
        Magnitude and effective radius [pix] of the detections of the mosaic, and of its negative.
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
    def found(self) -> Found:
        """The galaxies of `counted`."""
        rows = self.rows[self.counted]
        predicted = np.column_stack([column(rows, name) for name in TARGET_NAMES])
        errors = np.column_stack([column(rows, f"{name}_err") for name in TARGET_NAMES])
        where = quantities_of(predicted[:, 0], predicted[:, 1], column(rows, "distance"), self.fwhm)
        return Found(self.truth[self.counted], predicted, errors, where)

    @functools.cached_property
    def edges(self) -> tuple[np.ndarray, ...]:
        """Borders of the bins of each of `QUANTITIES`, with as many galaxies in each."""
        n = int(np.clip(len(self.found.truth) // PER_BIN, 1, MOST_BINS))
        if not len(self.found.truth):
            return (np.array([0.0, 1.0]),) * 3
        return tuple(_distinct(np.quantile(where, np.linspace(0, 1, n + 1))) for where in self.found.quantities.T)

    @functools.cached_property
    def factors(self) -> Factors | None:
        """Factors on errors; None if too few galaxies were found, or they have no errors."""
        if len(self.found.truth) < LEAST or not np.isfinite(self.found.errors).all():
            return None
        return Factors.fitted(self.found, self.edges, self.fwhm, self.options)

    @functools.cached_property
    def after(self) -> np.ndarray:
        """Errors with the factors of the other galaxies, float64, (N, 4); NaN without factors."""
        found, out = self.found, np.full(self.found.errors.shape, np.nan)
        if self.factors is None:
            return out
        part = np.random.default_rng(0).permutation(len(out)) % FOLDS
        for k in range(FOLDS):
            others = Factors.fitted(found.taken(part != k), self.edges, self.fwhm, {})
            own = found.taken(part == k)
            out[part == k] = own.errors * np.exp(others.errors.at(own.quantities))
        return out

    def statistics(self) -> list[Statistic]:
        """Bias, scatter and coverage of each parameter, of all galaxies and by bins of each of `QUANTITIES`."""
        found, out = self.found, []
        for by, low, high, chosen in self._chosen():
            t, p, sigma, after = (v[chosen] for v in (found.truth, found.predicted, found.errors, self.after))
            off = encode(p) - encode(t)
            n = int(chosen.sum())
            for i, name in enumerate(TARGET_NAMES):
                bias = float(np.median(off[:, i]))
                scatter = float(np.quantile(np.abs(off[:, i] - bias), ONE_SIGMA))
                within = _within(p[:, i] - t[:, i], sigma[:, i])
                root = np.sqrt(n)
                out.append(
                    Statistic(
                        by, name, low, high, n, bias, float(1.2533 * scatter / root), scatter,
                        float(0.96 * scatter / root), within, float(np.sqrt(within * (1 - within)) / root),
                        _within(p[:, i] - t[:, i], after[:, i]),
                    )
                )  # fmt: skip
        return out

    def _chosen(self) -> Iterator[tuple[str, float, float, np.ndarray]]:
        """The bins: what they are of, their borders, and the galaxies in them."""
        n = len(self.found.truth)
        if n < 2:
            return
        yield "all", -np.inf, np.inf, np.ones(n, bool)
        for by, where, edges in zip(QUANTITIES, self.found.quantities.T, self.edges, strict=True):
            bins = _bins(where, edges)
            borders = edges if by == "mag" else np.exp(edges)
            for k, (low, high) in enumerate(pairwise(borders.tolist())):
                if (bins == k).sum() > 1:
                    yield by, low, high, bins == k

    def shares(self) -> list[Share]:
        """Completeness and purity by magnitude and by size."""
        status = np.asarray(self.rows["found"], bool), np.asarray(self.rows["merged"], bool)
        true, out = self.truth, []
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
        return table


_COUNTS = ("n", "galaxies", "found", "merged", "detections", "negative")


def _table(kind: Any, rows: list[Any]) -> Table:
    types = {"by": "U8", "parameter": "U12", **dict.fromkeys(_COUNTS, "i4")}
    columns = {name: [getattr(row, name) for row in rows] for name in kind._fields}
    return Table({name: np.array(values, types.get(name, "f8")) for name, values in columns.items()})


def _distinct(edges: np.ndarray) -> np.ndarray:
    """Ascending borders, at least two."""
    out = np.unique(edges)
    return out if len(out) > 1 else np.array([out[0] - 0.5, out[0] + 0.5])


def _within(off: np.ndarray, errors: np.ndarray) -> float:
    return float((np.abs(off) <= errors).mean()) if np.isfinite(errors).all() else np.nan


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
