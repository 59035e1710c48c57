"""A catalogue compared with another one: which sources are the same, and how far their parameters differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sersicnet.catalogue.parameters import Galaxies, possible
from sersicnet.errors import InputError, printable, warn
from sersicnet.output import whole

if TYPE_CHECKING:
    from astropy.table import Table
    from matplotlib.figure import Figure

RADIUS = {"sky": 1.0, "pixels": 3.0}
"""Largest distance of partners once the offset is taken out: arcsec on the sky, else pixels."""

OFFSET = {"sky": 0.1, "pixels": 1.0}
"""Median offset above which a warning is given: arcsec on the sky, else pixels."""

FEW = 5
"""Pairs that are needed for a median: with fewer no offset is taken out, and no bin is made."""

OUTLIER = 0.5

PARAMETERS = {"mag": "mag", "r_eff": "R_e, relative", "sersic_n": "log10 n", "ellipticity": "ellipticity"}
"""The parameters that are compared, and the kind of difference."""


# --- the parts -------------------------------------------------------------------------------------------------


def pairs(found: np.ndarray, true: np.ndarray, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of points that are each other's nearest.

    Parameters
    ----------
    found, true : ndarray, float, (N, D) and (M, D)
        Rows that are not finite have no partner.
    reach : float
        Largest distance of a pair.

    Returns
    -------
    i, j : ndarray, int, (P,)
        Rows of `found`, ascending, and of `true`.
    """
    from scipy.spatial import KDTree

    mine, theirs = (np.flatnonzero(np.isfinite(points).all(axis=1)) for points in (found, true))
    if not (len(mine) and len(theirs)):
        return np.empty(0, int), np.empty(0, int)
    distance, there = KDTree(true[theirs]).query(found[mine])
    back = KDTree(found[mine]).query(true[theirs])[1]
    both = (back[there] == np.arange(len(mine))) & (distance <= reach)
    return mine[both], theirs[there[both]]


# --- the other catalogue ---------------------------------------------------------------------------------------

_OF_MOMENTS = {"mag_auto", "flux_radius", "a_image", "alpha_j2000", "x_image"}
"""Columns of SExtractor; sersicnet writes some of them as well, beside those of the profile."""
_OF_PROFILES = {"sersic_n", "r_eff", "r_eff_pix"}


@dataclass(frozen=True, eq=False)
class Reference:
    """Another catalogue, with the parameters that can be compared.

    Attributes
    ----------
    name : str
    rows : int
    sky : ndarray, float64, (N, 2) or None
        Right ascension and declination, degrees.
    pixels : ndarray, float64, (N, 2) or None
        From 0.
    parameters : dict
        float64, (N,), NaN where there is no value: ``mag``, else ``mag_auto``, ``r_eff`` (arcsec), ``r_eff_pix``,
        ``radius`` (of a unit that the table does not state), ``sersic_n``, ``ellipticity``.
    notes : tuple of str
        What a reader of the comparison should know.
    """

    name: str
    rows: int
    sky: np.ndarray | None
    pixels: np.ndarray | None
    parameters: dict[str, np.ndarray]
    notes: tuple[str, ...]

    @classmethod
    def read(cls, path: str | Path) -> Reference:
        """Read a table of sersicnet, of GALFIT's parameters (mag, re, n, q), or of SExtractor.

        Parameters
        ----------
        path : str or Path
            As `sersicnet.catalogue.parameters.Galaxies.read` takes it.

        Raises
        ------
        InputError
            If it cannot be read, or has no positions.
        """
        galaxies = Galaxies.read(path)
        sky, pixels = galaxies.sky(), galaxies.pixels()
        if sky is None and pixels is None:
            raise InputError(f"A catalogue to match has ra and dec, or x and y; {path} has {galaxies.columns}.")
        return cls._of(galaxies, sky, pixels)

    @classmethod
    def read_bands(cls, path: str | Path, bands: Sequence[str]) -> dict[str, Reference]:
        """Read a table for several bands, which are matched by the positions of their sources on the sky.

        Parameters
        ----------
        path : str or Path
            As for `read`. Of a catalogue of several bands, such as those of `sersicnet.measure_bands`, a band is
            compared with the columns that end in its name; any other table is compared with every band.
        bands : sequence of str

        Returns
        -------
        dict of Reference
            For each band; without parameters for a band that a catalogue of several bands does not have.

        Raises
        ------
        InputError
            If the table cannot be read, has no positions on the sky, or is of several bands, but none of these.
        """
        galaxies = Galaxies.read(path)
        sky = galaxies.sky()
        if sky is None:
            raise InputError(f"Several bands are matched on the sky, by ra and dec; {path} has {galaxies.columns}.")
        theirs = {band.lower() for band in galaxies.bands}
        if not theirs:
            one = cls._of(galaxies, sky, None)
            note = "Each band is compared with the same columns there: magnitudes of other bands differ by a colour."
            return dict.fromkeys(bands, replace(one, notes=(*one.notes, note)))
        if not theirs & {band.lower() for band in bands}:
            raise InputError(
                f"{path} has the bands {', '.join(galaxies.bands)}; received {', '.join(bands)}, none of them. Give a "
                "catalogue of one of these, or of one band."
            )
        none = cls(printable(str(path)), len(galaxies), sky, None, {}, ())
        return {band: cls._of(galaxies.of_band(band), sky, None) if band.lower() in theirs else none for band in bands}

    @classmethod
    def _of(cls, galaxies: Galaxies, sky: np.ndarray | None, pixels: np.ndarray | None) -> Reference:
        """The parameters of a table that can be compared."""
        found: dict[str, np.ndarray] = {}
        for name in ("mag", "mag_auto"):
            values = galaxies.parameter(name)
            if values is not None and not found:
                found[name] = values
        keys = {"pix": "r_eff_pix", "arcsec": "r_eff", "": "radius"}
        found |= {keys[unit]: values for unit, values in galaxies.radii().items()}
        notes = []
        if galaxies.has("flux_radius"):
            notes.append(
                f"{galaxies.spelled('flux_radius')} is the radius of a circle with half of the light, PSF included: "
                "it is not compared."
            )
        of_moments = any(map(galaxies.has, _OF_MOMENTS)) and not any(map(galaxies.has, _OF_PROFILES))
        for name in ("sersic_n", "ellipticity"):
            values = galaxies.parameter(name)
            if name == "ellipticity" and galaxies.has(name) and of_moments:
                notes.append(
                    f"{galaxies.spelled(name)} is that of SExtractor's moments, PSF included: it is not compared."
                )
            elif values is not None:
                found[name] = values
        for name, values in found.items():
            values[~possible(name, values)] = np.nan
        return cls(printable(galaxies.name), len(galaxies), sky, pixels, found, tuple(notes))


# --- the comparison --------------------------------------------------------------------------------------------


class Statistic(NamedTuple):
    """How far a parameter of one catalogue is from that of another.

    Attributes
    ----------
    n : int
        Pairs with a value in both.
    bias : float
        Median difference; NaN without pairs.
    error : float
        Of the bias, 1 sigma.
    scatter : float
        Half of the range that holds the differences from the 16th to the 84th percentile.
    outliers : float
        Fraction of the differences beyond 0.5.
    """

    n: int
    bias: float
    error: float
    scatter: float
    outliers: float

    @classmethod
    def of(cls, difference: np.ndarray) -> Statistic:
        """Of differences; those that are NaN do not count."""
        known = difference[np.isfinite(difference)]
        if not len(known):
            return cls(0, np.nan, np.nan, np.nan, np.nan)
        low, middle, high = np.quantile(known, [0.16, 0.5, 0.84]).tolist()
        scatter = (high - low) / 2
        error = 1.2533 * scatter / np.sqrt(len(known))  # a median's, of a Gaussian
        return cls(len(known), middle, float(error), scatter, float((np.abs(known) > OUTLIER).mean()))


@dataclass(frozen=True, eq=False)
class Comparison:
    """A catalogue compared with another one.

    Attributes
    ----------
    other : str
        The other catalogue.
    on : str
        "sky" or "pixels": the positions that were matched.
    radius : float
        Largest distance of partners, arcsec or pixels.
    rows : (int, int)
        Of this and of the other catalogue.
    i, j : ndarray, int, (P,)
        Rows of partners.
    offset, offset_error : ndarray, float64, (2,)
        Median position here minus there, and its 1 sigma error: to the east and north in
        arcsec, or along x and y in pixels; NaN where pairs are too few. It was taken out.
    apart : ndarray, float64, (P, 2)
        Positions here minus there, before the offset was taken out.
    clean : ndarray, bool, (P,)
        Whether the row here has no flags.
    mag : ndarray, float64, (P,)
        Magnitudes there, or here if there are none.
    differences : dict
        For each of `PARAMETERS` that both have, float64, (P,): magnitudes and ellipticities here minus
        there, radii here over there minus 1, and log10 of the ratio of the indices.
    notes : tuple of str
    """

    other: str
    on: str
    radius: float
    rows: tuple[int, int]
    i: np.ndarray
    j: np.ndarray
    offset: np.ndarray
    offset_error: np.ndarray
    apart: np.ndarray
    clean: np.ndarray
    mag: np.ndarray
    differences: dict[str, np.ndarray]
    notes: tuple[str, ...]

    def _of_band(self, table: Table, other: Reference) -> Comparison:
        """The same partners, with the parameters of another table and of another reference."""
        galaxies = Galaxies(table, "the catalogue")
        return replace(self, clean=_clean(galaxies, self.i), **_compared(galaxies, other, self.i, self.j))

    @property
    def unit(self) -> str:
        """Of distances."""
        return "arcsec" if self.on == "sky" else "pixels"

    def statistics(self) -> dict[str, dict[str, Statistic]]:
        """For each parameter, the statistics of ``all`` pairs, and of those without ``flags`` here."""
        return {
            name: {"all": Statistic.of(off), "flags == 0": Statistic.of(off[self.clean])}
            for name, off in self.differences.items()
        }

    def by_magnitude(self) -> list[tuple[float, float, dict[str, Statistic]]]:
        """Statistics of the pairs without flags in bins of one magnitude, with `FEW` or more."""
        known = self.clean & np.isfinite(self.mag)
        bins = np.floor(self.mag[known]).astype(int)
        out = []
        for low in np.unique(bins).tolist():
            if (bins == low).sum() >= FEW:
                inside = known & (np.floor(self.mag) == low)
                found = {name: Statistic.of(off[inside]) for name, off in self.differences.items()}
                out.append((float(low), float(low + 1), found))
        return out

    def sentences(self) -> list[str]:
        """What was matched, and notes on it."""
        n = len(self.i)
        where = "right ascension and declination" if self.on == "sky" else "x and y"
        out = [
            f"{n} of {self.rows[0]} sources have a partner among the {self.rows[1]} of {self.other}: by {where}, each "
            f"other's nearest within {self.radius:g} {self.unit}."
        ]
        if np.isfinite(self.offset).all():
            axes = ("east", "north") if self.on == "sky" else ("x", "y")
            parts = [
                f"{value:+.3f} ± {error:.3f} {self.unit} in {axis}"
                for value, error, axis in zip(self.offset, self.offset_error, axes, strict=True)
            ]
            out.append(f"The median offset, {' and '.join(parts)} (this catalogue minus the other), was taken out.")
        elif n:
            out.append("Pairs are too few for a median offset; none was taken out.")
        return [*out, *self.notes]

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Title, head and rows of the tables of statistics; none without pairs."""
        if not len(self.i) or not self.differences:
            return []
        rows = [
            [PARAMETERS[name], sample, str(one.n), f"{one.bias:+.4f} ± {one.error:.4f}", f"{one.scatter:.4f}",
             f"{one.outliers:.1%}"]
            for name, samples in self.statistics().items()
            for sample, one in samples.items()
            if one.n
        ]  # fmt: skip
        title = (
            "This catalogue against the other. Bias: median difference; scatter: half of the range from 16 to 84 %; "
            "outliers: differences beyond 0.5. Radii are ratios minus 1, indices log10 of ratios."
        )
        out = [(title, ["", "rows", "N", "bias", "scatter", "outliers"], rows)]
        bins = [
            [f"{low:g}-{high:g}", *(_cell(found[name]) for name in self.differences)]
            for low, high, found in self.by_magnitude()
        ]
        if bins:
            head = ["mag", *(PARAMETERS[name] for name in self.differences)]
            out.append(("By magnitude, rows without flags: bias ± scatter; outliers (N).", head, bins))
        return out

    def as_markdown(self) -> str:
        """Sentences and tables as a page."""
        parts = ["\n".join(self.sentences())]
        for title, head, rows in self.tables():
            lines = [head, ["---"] * len(head), *rows]
            parts += [title, "\n".join(f"| {' | '.join(line)} |" for line in lines)]
        return "\n\n".join(parts) + "\n"

    def figure(self) -> Figure:
        """Offsets of the positions, and differences against magnitude."""
        from matplotlib.figure import Figure

        n = 1 + len(self.differences)
        figure = Figure(figsize=(4.2 * min(n, 3), 3.6 * -(-n // 3)), layout="constrained")
        panels = figure.subplots(-(-n // 3), min(n, 3), squeeze=False).ravel()
        for axes in panels[n:]:
            axes.set_axis_off()
        figure.suptitle("blue: without flags here; grey: with flags; orange: medians, and scatter in bins", fontsize=8)
        _draw_offsets(panels[0], self)
        magnitude = np.isfinite(self.mag)
        for axes, (name, off) in zip(panels[1:], self.differences.items(), strict=False):
            axes.axhline(0, color="black", lw=0.6)
            for chosen, colour in ((magnitude & ~self.clean, "#aaaaaa"), (magnitude & self.clean, "#0072b2")):
                axes.scatter(self.mag[chosen], off[chosen], s=5 if len(off) < 3000 else 1.5, c=colour, linewidths=0)
            bins = [(low + high) / 2 for low, high, _ in self.by_magnitude()]
            found = [statistics[name] for *_, statistics in self.by_magnitude()]
            axes.errorbar(
                bins,
                [one.bias for one in found],
                [one.scatter for one in found],
                fmt="o-",
                ms=4,
                lw=1.2,
                color="#d55e00",
            )
            known = np.abs(off[np.isfinite(off)])
            reach = 1.3 * float(np.quantile(known, 0.97)) if len(known) else 1.0
            axes.set_ylim(-reach or -1.0, reach or 1.0)
            axes.set_xlabel("mag")
            axes.set_title(PARAMETERS[name], fontsize=10)
        return figure

    def draw(self, path: str | Path) -> None:
        """Write `figure` as .png or .pdf; it appears whole or not at all.

        Raises
        ------
        InputError
            If it has another ending.
        OutputError
            If it cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() not in (".png", ".pdf"):
            raise InputError(f"A figure ends in .png or .pdf; received {path.name}.")
        with whole(path) as partial:
            self.figure().savefig(partial, dpi=120, format=path.suffix[1:].lower())


def _cell(found: Statistic) -> str:
    return f"{found.bias:+.3f} ± {found.scatter:.3f}; {found.outliers:.0%} ({found.n})" if found.n else ""


def _draw_offsets(axes: Any, comparison: Comparison) -> None:
    apart, radius = comparison.apart, comparison.radius
    for chosen, colour in ((~comparison.clean, "#aaaaaa"), (comparison.clean, "#0072b2")):
        axes.scatter(*apart[chosen].T, s=5 if len(apart) < 3000 else 1.5, c=colour, linewidths=0)
    middle = np.nan_to_num(comparison.offset)
    axes.plot(*middle, "+", color="#d55e00", ms=12, mew=1.5)
    known = np.abs(apart - middle)
    reach = min(1.3 * float(np.quantile(known, 0.95)), radius) if len(known) else radius
    axes.set_xlim(middle[0] - (reach or radius), middle[0] + (reach or radius))
    axes.set_ylim(middle[1] - (reach or radius), middle[1] + (reach or radius))
    names = ("east", "north") if comparison.on == "sky" else ("x", "y")
    axes.set_xlabel(f"{names[0]}, here minus there [{comparison.unit}]")
    axes.set_ylabel(f"{names[1]} [{comparison.unit}]")
    axes.set_title(f"positions of {len(apart)} pairs", fontsize=10)
    axes.set_aspect("equal")


def match(table: Table, other: str | Path | Reference, *, radius: float | None = None) -> Comparison:
    """Compare a catalogue with another one.

    Partners are each other's nearest within a radius, once the median offset between the
    catalogues is taken out. An offset larger than the radius is not found.

    Parameters
    ----------
    table : Table
        As `sersicnet.measuring.measure.measure` returns it.
    other : str, Path or Reference
        Anything but a `Reference` is read by `Reference.read`.
    radius : float, optional
        In arcsec where both have a sky, else in pixels; by default `RADIUS`.

    Returns
    -------
    Comparison
        Without pairs, if there are none.

    Raises
    ------
    InputError
        If the other catalogue cannot be used.

    Warns
    -----
    SersicnetWarning
        When the offset is above `OFFSET`, or nothing matches.
    """
    if radius is not None and not (radius > 0 and np.isfinite(radius)):
        raise InputError(f"A radius to match in is positive; received {radius:g}.")
    there = other if isinstance(other, Reference) else Reference.read(other)
    galaxies = Galaxies(table, "the catalogue")
    on, here, theirs = _places(galaxies, there)
    radius = RADIUS[on] if radius is None else float(radius)
    i, j, offset = _matched(on, here, theirs, radius)
    apart = _apart(on, here[i], theirs[j])
    comparison = Comparison(
        other=there.name, on=on, radius=radius, rows=(len(table), there.rows), i=i, j=j, offset=offset,
        offset_error=np.array([Statistic.of(values).error for values in apart.T]), apart=apart,
        clean=_clean(galaxies, i), **_compared(galaxies, there, i, j),
    )  # fmt: skip
    unit = comparison.unit
    if not len(i):
        warn(
            f"None of the {len(table)} sources lies within {radius:g} {unit} of one of the {there.rows} of "
            f"{there.name}. Are both of the same field?"
        )
    elif np.hypot(*offset) > OFFSET[on]:
        warn(
            f"Positions differ from those of {there.name} by {np.hypot(*offset):.3f} ± "
            f"{np.hypot(*comparison.offset_error):.3f} {unit} in the median: is the WCS of the image right?"
            if on == "sky"
            else f"Positions differ from those of {there.name} by {np.hypot(*offset):.2f} pixels in the median: "
            "does it count from 1, or is it of another image?"
        )
    return comparison


def match_bands(sources: Table, bands: Mapping[str, Table], others: Mapping[str, Reference]) -> dict[str, Comparison]:
    """Compare several bands of the same sources with another catalogue.

    Parameters
    ----------
    sources : Table
        With ra and dec, which partners are found by.
    bands : mapping of Table
        The catalogue of each band by its name, with a row for each source.
    others : mapping of Reference
        As `Reference.read_bands` returns it.

    Returns
    -------
    dict of Comparison
        For each band, with the same partners.

    Warns
    -----
    SersicnetWarning
        As `match`, once.
    """
    partners = match(sources, next(iter(others.values())))
    return {band: partners._of_band(table, others[band]) for band, table in bands.items()}


def _places(galaxies: Galaxies, other: Reference) -> tuple[str, np.ndarray, np.ndarray]:
    """Either "sky" or "pixels", whichever both have, and the positions in both, (N, 2) and (M, 2)."""
    sky, pixels = galaxies.sky(), galaxies.pixels()
    if other.sky is not None and sky is not None:
        return "sky", sky, other.sky
    if other.pixels is not None and pixels is not None:
        return "pixels", pixels, other.pixels
    raise InputError(
        f"Catalogues are matched by ra and dec, or by x and y, that both have; {other.name} has only "
        f"{'ra and dec, and the image no WCS' if other.pixels is None else 'x and y'}."
    )


def _matched(on: str, here: np.ndarray, there: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of partners, and the median offset, NaN if pairs are too few."""
    reach = 2 * np.sin(np.radians(radius / 3600) / 2) if on == "sky" else radius
    offset = np.full(2, np.nan)
    i, j = np.empty(0, int), np.empty(0, int)
    for _ in range(10):
        moved = _moved(on, there, np.nan_to_num(offset))
        partners = pairs(_points(on, here), _points(on, moved), reach)
        if np.array_equal(partners, (i, j)):
            break
        i, j = partners
        if len(i) < FEW:
            offset = np.full(2, np.nan)
            break
        offset = np.median(_apart(on, here[i], there[j]), axis=0)
    return i, j, offset


def _points(on: str, places: np.ndarray) -> np.ndarray:
    """Points whose distances are meaningful: on the unit sphere, or pixels."""
    return places if on == "pixels" else on_sphere(places)


def on_sphere(places: np.ndarray) -> np.ndarray:
    """Points of the unit sphere, float64, (N, 3), at right ascensions and declinations in degrees, (N, 2)."""
    ra, dec = np.radians(places).T
    return np.column_stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)])


def _apart(on: str, here: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Positions here minus there, (N, 2), arcsec to the east and north, or pixels."""
    apart = here - there
    if on == "sky":
        apart[:, 0] = ((apart[:, 0] + 180) % 360 - 180) * np.cos(np.radians(here[:, 1]))
        apart *= 3600
    return apart


def _moved(on: str, places: np.ndarray, offset: np.ndarray) -> np.ndarray:
    if on == "pixels":
        return places + offset
    with np.errstate(divide="ignore", invalid="ignore"):
        east = offset[0] / 3600 / np.cos(np.radians(places[:, 1]))
    return np.column_stack([places[:, 0] + east, np.clip(places[:, 1] + offset[1] / 3600, -90, 90)])


def _clean(galaxies: Galaxies, rows: np.ndarray) -> np.ndarray:
    """Which rows have no flags, bool, (P,); all of a table without flags."""
    return galaxies.column("flags")[rows] == 0 if galaxies.has("flags") else np.ones(len(rows), bool)


def _compared(galaxies: Galaxies, other: Reference, i: np.ndarray, j: np.ndarray) -> dict[str, Any]:
    """The magnitudes, differences and notes of a comparison."""
    theirs = {name: values[j] for name, values in other.parameters.items()}
    mine: dict[str, np.ndarray] = {}
    own_radii, units = galaxies.radii(), {"r_eff": "arcsec", "r_eff_pix": "pix"}
    for name in ("mag", "mag_auto", "r_eff", "r_eff_pix", "sersic_n", "ellipticity"):
        values = own_radii.get(units[name]) if name in units else galaxies.parameter(name)
        mine[name] = np.full(len(i), np.nan) if values is None else values[i]
        mine[name][~possible(name, mine[name])] = np.nan
    notes = list(other.notes)
    differences = {}
    if "mag" in theirs:
        differences["mag"] = mine["mag"] - theirs["mag"]
    elif "mag_auto" in theirs and galaxies.has("mag_auto"):
        differences["mag"] = mine["mag_auto"] - theirs["mag_auto"]
        notes.append("Magnitudes are those of Kron ellipses in both, mag_auto here.")
    elif "mag_auto" in theirs:
        differences["mag"] = mine["mag"] - theirs["mag_auto"]
        notes.append("Magnitudes there are of an aperture, MAG_AUTO, not of all of a profile: expect them fainter.")
    radii = _radii(mine, theirs, notes)
    if radii is not None:
        differences["r_eff"] = radii[0] / radii[1] - 1
    if "sersic_n" in theirs:
        differences["sersic_n"] = np.log10(mine["sersic_n"] / theirs["sersic_n"])
    if "ellipticity" in theirs:
        differences["ellipticity"] = mine["ellipticity"] - theirs["ellipticity"]
    missing = [PARAMETERS[name].split(",")[0] for name in PARAMETERS if name not in differences]
    if missing:
        notes.append(f"Not compared: {', '.join(missing)}.")
    return {
        "mag": theirs.get("mag", theirs.get("mag_auto", mine["mag"])),
        "differences": differences,
        "notes": tuple(notes),
    }


def _radii(
    mine: dict[str, np.ndarray], theirs: dict[str, np.ndarray], notes: list[str]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Radii of both in the same unit; None if the units are not known."""
    if "r_eff" in theirs and np.isfinite(mine["r_eff"]).any():
        return mine["r_eff"], theirs["r_eff"]
    if "r_eff_pix" in theirs:
        notes.append("Radii are compared in pixels, taken to be of the same size in both.")
        return mine["r_eff_pix"], theirs["r_eff_pix"]
    if "r_eff" in theirs:
        notes.append("The other catalogue has radii in arcsec, and the pixel scale here is not known.")
    if "radius" in theirs:
        return _radii_of_unknown_unit(mine, theirs["radius"], notes)
    return None


def _radii_of_unknown_unit(
    mine: dict[str, np.ndarray], radius: np.ndarray, notes: list[str]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Radii beside a column ``re`` without a unit, which is in arcsec in some catalogues and in pixels in others."""
    ratios = {}
    for name, unit in (("r_eff", "arcsec"), ("r_eff_pix", "pixels")):
        ratio = mine[name] / radius
        if np.isfinite(ratio).any():
            ratios[name] = unit, float(np.nanmedian(ratio))
    near = [name for name, (_, ratio) in ratios.items() if 0.5 < ratio < 2]
    if len(near) != 1:
        notes.append("re has no unit, and its values do not tell whether it is arcsec or pixels: it is not compared.")
        return None
    unit, ratio = ratios[near[0]]
    notes.append(f"re has no unit; it is taken for {unit}, for the median of the ratio is {ratio:.2f} then.")
    return mine[near[0]], radius
