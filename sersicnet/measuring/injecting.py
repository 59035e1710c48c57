"""Which galaxies a validation adds to a mosaic, and where."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from astropy.table import QTable

from sersicnet.catalogue.columns import column, flags_of
from sersicnet.catalogue.parameters import Galaxies, possible
from sersicnet.engine.render import N_RANGE
from sersicnet.errors import InputError
from sersicnet.image.exposure import Exposure
from sersicnet.schema import STAMP_SIZE, TARGET_NAMES, TARGETS, Flag
from sersicnet.simulating import population
from sersicnet.simulating.population import Mixture, Ranges

CELL, GAP = 128, 88
"""Side of the cells of a mosaic that get one galaxy in a pass at most, and least distance of galaxies in neighbouring
cells, pixels. A stamp has 128 pixels, so that no galaxy is in the middle of another one's stamp."""

APART = 4.0
"""Least distance of two galaxies in a pass, in units of the sum of their effective radii."""

AVOIDED = 5.0
"""Distance from avoided sources, in units of ``a_image``."""

FAINTER = 1.0
"""The range of magnitudes ends this much fainter than the mosaic's own galaxies, so that completeness falls in it."""

LEAST_RADIUS = 0.3
"""Least effective radius of galaxies that are drawn evenly, pixels."""

LEAST_OWN = 20
"""Galaxies of the mosaic that are needed for a range."""

_IN_DOUBT = Flag.NO_DATA | Flag.EDGE | Flag.MASKED | Flag.SATURATED | Flag.POINT_LIKE | Flag.LOW_SNR | Flag.OUT_OF_RANGE


@dataclass(frozen=True, kw_only=True)
class Injection:
    """The galaxies that a validation adds to a mosaic.

    Attributes
    ----------
    n : int
        Number of galaxies.
    galaxies : str or Path
        "candels": radii, indices and axis ratios are those of CANDELS at each magnitude, and magnitudes are even over
        the range of the mosaic's own galaxies and 1 mag fainter. Or a table of galaxies, see
        `sersicnet.catalogue.parameters.Galaxies`: each galaxy has the parameters of a row drawn at random.
    evenly : bool
        Whether magnitude, log radius and log index are even over the range of the table or, without a table, of the
        mosaic's own galaxies and 1 mag fainter.
    mag : (float, float), optional
        Range of the magnitudes (AB).
    avoid : float, optional
        Keep away from sources brighter than this magnitude; by default, galaxies are put anywhere.
    seed : int

    Raises
    ------
    InputError
        If a number is out of range.
    """

    n: int = 2000
    galaxies: str | Path = "candels"
    evenly: bool = False
    mag: tuple[float, float] | None = None
    avoid: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError(f"A validation adds at least one galaxy; received `n` {self.n}.")
        if self.mag is not None and not (np.isfinite(self.mag).all() and self.mag[0] < self.mag[1]):
            raise InputError(f"A range of magnitudes is from bright to faint; received `mag` {self.mag}.")
        if self.avoid is not None and not np.isfinite(self.avoid):
            raise InputError(f"A magnitude is a number; received `avoid` {self.avoid}.")

    @property
    def kinds(self) -> str:
        """Which galaxies, in words."""
        if str(self.galaxies) == "candels":
            return "spread evenly over the range of the image's own galaxies" if self.evenly else "those of CANDELS"
        return f"spread evenly over the range of {self.galaxies}" if self.evenly else f"rows of {self.galaxies}"

    def config(self) -> dict[str, Any]:
        """All that the galaxies depend on, beside the mosaic; can be written as JSON."""
        is_table = str(self.galaxies) != "candels"
        table = hashlib.sha256(Path(self.galaxies).read_bytes()).hexdigest() if is_table else "candels"
        return {
            "n": self.n, "galaxies": table, "evenly": self.evenly, "mag": self.mag and list(self.mag),
            "avoid": self.avoid, "seed": self.seed,
        }  # fmt: skip

    def known(self, pixel_scale: float) -> np.ndarray | Mixture | None:
        """The distribution of the galaxies, as far as it does not depend on the mosaic.

        Returns
        -------
        ndarray, float64, (K, 4), or Mixture or None
            The targets of the table's rows; or the galaxies of CANDELS; or None for the range of the mosaic's own.

        Raises
        ------
        InputError
            If the table cannot be used, or radii of CANDELS need a pixel scale.
        """
        if str(self.galaxies) != "candels":
            return self._rows(pixel_scale)
        if self.evenly:
            return None
        if not np.isfinite(pixel_scale):
            raise InputError(
                "The image has no pixel scale, which the radii of CANDELS need: give `pixel_scale`, a table of "
                "`galaxies`, or `evenly`."
            )
        return population.candels_mixture(pixel_scale)

    def _rows(self, pixel_scale: float) -> np.ndarray:
        """The targets of the rows that can be drawn, and are in the range of magnitudes."""
        galaxies = Galaxies.read(self.galaxies)
        values = galaxies.targets(pixel_scale, "give `pixel_scale`, or r_eff_pix.")
        mag, r_eff, n, e = values.T
        bright, faint = self.mag or (-np.inf, np.inf)
        with np.errstate(invalid="ignore"):
            each = np.column_stack([
                possible("mag", mag) & (mag >= bright) & (mag <= faint), (r_eff > 0) & (r_eff <= STAMP_SIZE),
                (n >= N_RANGE[0]) & (n <= N_RANGE[1]), possible("ellipticity", e),
            ])  # fmt: skip
        good = np.asarray(each.all(axis=1))
        if not good.any():
            told = ""
            if len(each):
                column, value = galaxies.given(TARGET_NAMES[int(each[0].argmin())], 0)
                told = f": {galaxies.row(0)} has {column} = {value:g}"
            raise InputError(
                f"A table of galaxies has rows that can be drawn, with a radius above 0 and up to {STAMP_SIZE} pixels, "
                f"an index from {N_RANGE[0]:g} to {N_RANGE[1]:g}, an ellipticity from 0 to below 1, and a magnitude "
                f"within `mag`; none of the {len(values)} of {self.galaxies} is one{told}."
            )
        return values[good]

    def drawn(self, known: np.ndarray | Mixture | None, catalogue: QTable) -> dict[str, np.ndarray]:
        """Draw the galaxies: the targets and ``theta`` by name, float64, (N,).

        Parameters
        ----------
        known : ndarray or Mixture or None
            See `known`.
        catalogue : QTable
            Of the mosaic without added galaxies.

        Raises
        ------
        InputError
            If the mosaic has too few galaxies for a range.
        """
        table = known if isinstance(known, np.ndarray) else None
        ranges: Ranges = {}
        if self.evenly or (table is None and self.mag is None):
            ranges = _ranges(catalogue) if table is None else _limits(table)
        if self.mag is not None:
            ranges["mag"] = self.mag
        rows = []
        for k in range(self.n):
            rng = np.random.default_rng([self.seed, k, 0])
            if self.evenly:
                shape = [_even(rng, *ranges[target.name], log=target.log) for target in TARGETS]
            elif table is not None:
                shape = table[rng.integers(len(table))].tolist()
            else:
                assert isinstance(known, Mixture)
                mag = float(rng.uniform(*ranges["mag"]))
                shape = [mag, *known.at_magnitude(float(np.clip(mag, *population.CANDELS_MAG)), rng)]
            rows.append([*shape, rng.uniform(-90, 90)])
        return dict(zip((*TARGET_NAMES, "theta"), np.array(rows).T, strict=True))


def _even(rng: np.random.Generator, low: float, high: float, *, log: bool) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))) if log else rng.uniform(low, high))


def _ranges(catalogue: QTable) -> Ranges:
    """From the 1st to the 99th percentile of the mosaic's own galaxies, and fainter magnitudes."""
    good = flags_of(catalogue) & _IN_DOUBT == 0
    values = np.column_stack([column(catalogue, name) for name in TARGET_NAMES])[good]
    values = values[np.isfinite(values).all(axis=1)]
    if len(values) < LEAST_OWN:
        raise InputError(
            f"The range of the added galaxies is that of the mosaic's own, of which at least {LEAST_OWN} are needed; "
            f"{len(values)} were found. Give `mag`, and a table of `galaxies` with `evenly`."
        )
    ranges = _limits(values)
    ranges["mag"] = ranges["mag"][0], ranges["mag"][1] + FAINTER
    return ranges


def _limits(values: np.ndarray) -> Ranges:
    """From the 1st to the 99th percentile of targets, within what can be drawn."""
    low, high = np.quantile(values, [0.01, 0.99], axis=0)
    low = np.maximum(low, [-np.inf, LEAST_RADIUS, N_RANGE[0], 0])
    high = np.maximum(np.minimum(high, [np.inf, TARGETS[1].high, N_RANGE[1], 0.95]), low)
    return {name: (float(a), float(b)) for name, a, b in zip(TARGET_NAMES, low, high, strict=True)}


class Places(NamedTuple):
    """Where galaxies are put in one pass.

    Attributes
    ----------
    numbers : ndarray, int, (K,)
        Of the galaxies.
    x, y : ndarray, float64, (K,)
        Zero-based pixels.
    """

    numbers: np.ndarray
    x: np.ndarray
    y: np.ndarray


def places(
    exposure: Exposure, r_eff: np.ndarray, seed: int, is_free: Callable[[float, float], bool] = lambda x, y: True
) -> list[Places]:
    """Places for galaxies in as few passes as the cells of the image allow.

    Parameters
    ----------
    exposure : Exposure
    r_eff : ndarray, float64, (N,)
        Effective radii, pixels.
    seed : int
    is_free : callable
        Whether a galaxy may be at x and y.

    Raises
    ------
    InputError
        If there is no place.
    """
    centres, halves = zip(*(_cells(n) for n in exposure.shape), strict=True)
    cells = np.stack(np.meshgrid(*centres, indexing="ij"), -1).reshape(-1, 2)
    # Large galaxies first: a late one finds no place between the others.
    waiting, out = np.argsort(-r_eff, kind="stable").tolist(), list[Places]()
    while waiting:
        rng = np.random.default_rng([seed, len(out), 1])
        here: list[int] = []
        at = np.empty((0, 2))
        for cell in rng.permutation(len(cells)).tolist():
            if not waiting:
                break
            y, x = cells[cell] + rng.uniform(-1, 1, 2) * halves
            next_one = waiting[0]
            if len(here) and (np.hypot(*(at - (x, y)).T) < APART * (r_eff[here] + r_eff[next_one])).any():
                continue
            row, column = round(y), round(x)
            if exposure.read((slice(row, row + 1), slice(column, column + 1))).bad.any() or not is_free(x, y):
                continue
            here.append(waiting.pop(0))
            at = np.vstack([at, (x, y)])
        if not here:
            raise InputError(
                f"{exposure.name} has no place for a galaxy: its pixels have no data, or are too near to sources that "
                "`avoid` names. Give a brighter `avoid`."
            )
        out.append(Places(np.array(here), *at.T))
    exposure.close()
    return out


def least_passes(shape: tuple[int, int], n: int) -> int:
    """Passes that so many galaxies need at least on an image of this shape."""
    rows, columns = (max(1, round(side / CELL)) for side in shape)
    return -(-n // (rows * columns))


def _cells(n: int) -> tuple[np.ndarray, float]:
    """Centres of the cells along an axis, and how far from them a galaxy is put at most."""
    count = max(1, round(n / CELL))
    side = n / count
    return (np.arange(count) + 0.5) * side - 0.5, max((side - GAP) / 2, 0.0)
