"""Parameters of galaxies from tables: the names, units and formats that every command reads.

A table is FITS, ECSV, CSV, Parquet or VOTable. Names are those of sersicnet, and where these are missing those
of SExtractor, GALFIT and VizieR, in upper or lower case. Values are converted from the unit of their column;
a column without a unit has the unit of its name: degrees for ``ra``, arcsec for ``r_eff``, pixels for ``r_eff_pix``.
"""

from __future__ import annotations

import csv
import functools
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sersicnet.errors import InputError, warn
from sersicnet.schema import TARGET_NAMES

if TYPE_CHECKING:
    from astropy.table import Table

SKY = (
    ("ra", "dec"), ("_raj2000", "_dej2000"), ("raj2000", "dej2000"), ("ra_icrs", "de_icrs"),
    ("alpha_j2000", "delta_j2000"), ("alphawin_j2000", "deltawin_j2000"),
)  # fmt: skip
"""Columns of positions on the sky. VizieR's ``_RAJ2000`` are degrees where its ``RAJ2000`` may be sexagesimal."""

PIXELS = (("x", "y", 0.0), ("x_image", "y_image", 1.0), ("xwin_image", "ywin_image", 1.0))
"""Columns of positions in an image, and the coordinate of its first pixel."""

NAMES = {
    "mag": ("mag",),
    "r_eff_pix": ("r_eff_pix", "r_eff", "re"),
    "sersic_n": ("sersic_n", "n"),
    "ellipticity": ("ellipticity", "q"),
}
"""Columns that hold a parameter; the first one that a table has is read."""

_UNITS = {
    "mag": "mag", "mag_err": "mag", "mag_auto": "mag", "theta": "deg", "theta_err": "deg", "r_eff_pix_err": "pix"
}  # fmt: skip
"""Units of parameters; all others are plain numbers."""

_RADII = {"r_eff_pix": "pix", "r_eff": "arcsec", "re": ""}
"""Columns of radii, and the unit of one that states none: ``re`` is in pixels for GALFIT, in arcsec elsewhere."""

_BY_BAND = ("r_eff", "r_eff_pix", "sersic_n", "ellipticity", "theta", "pa")
"""Columns of shapes that a catalogue of several bands has for each band, as in ``r_eff_F160W``."""

_DESCRIBED = {
    "deg": "an angle", "pix": "in pixels", "mag": "AB magnitudes", "": "numbers without a unit", "arcsec": "an angle"
}  # fmt: skip


class Galaxies:
    """A table of galaxies.

    Parameters
    ----------
    table : Table
        Columns may be masked, have units, and hold numbers as text.
    name : str
        The name of the table in messages, such as its path.

    Notes
    -----
    All arrays are float64, one value a row, NaN where the table has no value.

    Attributes
    ----------
    band : str
        The band that `of_band` chose; empty for other tables.
    """

    def __init__(self, table: Table, name: str = "the table") -> None:
        self.table, self.name = table, name
        self._path: Path | None = None
        self.band = ""
        # A name in lower case goes before the same one in another case, and the first of those before others.
        self._spelling = {column.lower(): column for column in reversed(table.colnames)}
        self._spelling |= {column: column for column in table.colnames}

    @classmethod
    def read(cls, path: str | Path) -> Galaxies:
        """Read a file, as `sersicnet.catalogue.table.read_table` does.

        Raises
        ------
        InputError
            If it cannot be read.
        """
        from sersicnet.catalogue.table import located, read_table

        out = cls(read_table(path), str(path))
        out._path = located(path)[0]
        return out

    def __len__(self) -> int:
        return len(self.table)

    def has(self, *names: str) -> bool:
        """Whether the table has all of these columns, in upper or lower case."""
        return all(name in self._spelling for name in names)

    def spelled(self, name: str) -> str:
        """The name of a column as the table writes it."""
        return self._spelling[name]

    @property
    def columns(self) -> str:
        """The names of all columns, as text for messages."""
        return ", ".join(self.table.colnames) or "none"

    def row(self, i: int) -> str:
        """Where row `i` is, for messages: ``line 3`` of a CSV file, ``row 2`` of others, from 1."""
        from sersicnet.catalogue.table import format_of, read_text

        if self._path is None or format_of(self._path) != "ascii.csv":
            return f"row {i + 1}"
        reader = csv.reader(io.StringIO(read_text(self._path)))
        filled = (reader.line_num for cells in reader if len(cells) > 1 or "".join(cells).strip())
        return f"line {next(line for k, line in enumerate(filled) if k == i + 1)}"

    # --- bands ---

    @property
    def bands(self) -> list[str]:
        """The bands that the columns of a catalogue of several bands are of, as in ``mag_F125W``; none for others."""
        if any(map(self.has, _BY_BAND)):
            return []
        stated = [band for band in str(self.table.meta.get("BANDS", "")).split(",") if band]
        stated = [band for band in stated if any(self.has(f"{name}_{band}".lower()) for name in _BY_BAND)]
        if stated:
            return stated
        ends = [name[len("sersic_n_") :] for name in self.table.colnames if name.lower().startswith("sersic_n_")]
        found = [end for end in ends if self.has(f"r_eff_{end}".lower()) or self.has(f"r_eff_pix_{end}".lower())]
        # These are names, such as F160W, and those of other quantities of the same band, such as err_F160W.
        return [end for end in found if end != "err" and not any(end.endswith(f"_{other}") for other in found)]

    def of_band(self, band: str | None = None) -> Galaxies:
        """The columns of one band under their own names, as if the catalogue was of this band alone.

        Columns of the sources, such as ``id``, stay, unless the band has its own.

        Parameters
        ----------
        band : str, optional
            In upper or lower case; the band that sources were detected on by default. A table that is not by band
            stays as it is without it.

        Raises
        ------
        InputError
            If the table has no such band, or none is given and sources were detected on none of the bands.
        """
        bands = self.bands
        if not bands:
            if band is None:
                return self
            raise InputError(
                f"`from_band` is for a catalogue of several bands, with columns such as r_eff_{band}; {self.name} has "
                f"{_few(self.table.colnames)}."
            )
        if band is None:
            band = str(self.table.meta.get("DETBAND", bands[0] if len(bands) == 1 else ""))
        chosen = next((one for one in bands if one.lower() == band.lower()), None)
        if chosen is None:
            what = f"none is {band}" if band else "it was detected on none of them"
            raise InputError(f"{self.name} has the bands {', '.join(bands)}, and {what}: give one as `from_band`.")
        ends = {one: f"_{one}".lower() for one in bands}
        own = {name: name[: -len(ends[chosen])] for name in self.table.colnames if name.lower().endswith(ends[chosen])}
        kept = [
            name for name in self.table.colnames
            if name in own or not (name.lower() in own.values() or name.lower().endswith(tuple(ends.values())))
        ]  # fmt: skip
        table = self.table[kept]
        table.rename_columns(list(own), list(own.values()))
        out = Galaxies(table, self.name)
        out._path, out.band = self._path, chosen
        return out

    def ids(self) -> np.ndarray | None:
        """The ids of the rows, int, (N,); None if the table has none that are whole, positive and distinct.

        Warns
        -----
        SersicnetWarning
            The first time that the table has others, whose place the numbers of the rows take.
        """
        return self._ids

    @functools.cached_property
    def _ids(self) -> np.ndarray | None:
        if not self.has("id"):
            return None
        if _bare(self.table[self.spelled("id")])[0].dtype.kind in "iu":
            values = self.column("id")
            good = np.isfinite(values) & (values > 0) & (values < 2**31)
            if good.all() and len(np.unique(values)) == len(values):
                return values.astype(int)
        warn(
            f"The ids of {self.name} are not kept, and rows are numbered from 1: ids are distinct whole numbers from 1 "
            f"to {2**31 - 1}."
        )
        return None

    # --- columns ---

    def column(self, name: str, unit: str = "") -> np.ndarray:
        """A column as float64, (N,), in `unit`; NaN where masked or blank.

        Parameters
        ----------
        name : str
        unit : str
            ``deg``, ``arcsec``, ``pix``, ``mag``, or nothing for plain numbers. A column without a unit is
            taken to have it.

        Raises
        ------
        InputError
            If the column does not hold numbers, or its unit cannot be converted.
        """
        column = self.table[self.spelled(name)]
        return self._converted(name, self._numbers(column), getattr(column, "unit", None), unit)

    def text(self, name: str) -> list[str]:
        """A column as text, without blanks at its ends; empty where masked."""
        values, missing = _bare(self.table[self.spelled(name)])
        return ["" if none else _as_text(value) for value, none in zip(values.tolist(), missing.tolist(), strict=True)]

    def _numbers(self, column: Any) -> np.ndarray:
        values, missing = _bare(column)
        if values.ndim == 2 and values.shape[1] == 1:  # vectors of one element are numbers
            values, missing = values[:, 0], missing[:, 0]
        if values.ndim != 1 or any(np.ndim(each) for each in values if values.dtype.kind == "O"):
            raise InputError(f"Column {column.info.name} of {self.name} must hold one number a row; it holds several.")
        if values.dtype.kind in "USO":
            return self._from_text(column.info.name, values, missing)
        if values.dtype.kind not in "biuf":
            raise InputError(f"Column {column.info.name} of {self.name} must hold numbers; it holds {values.dtype}.")
        numbers = values.astype(float)
        numbers[missing] = np.nan
        return numbers

    def _from_text(self, name: str, values: np.ndarray, missing: np.ndarray) -> np.ndarray:
        numbers = np.full(len(values), np.nan)
        for i in np.flatnonzero(~missing).tolist():
            text = _as_text(values[i])
            if not text:
                continue
            try:
                numbers[i] = float(text)
            except ValueError:
                raise InputError(
                    f"Column {name} of {self.name} must hold numbers; {self.row(i)} has {text[:_LONGEST]!r}."
                ) from None
        return numbers

    def _converted(self, name: str, values: np.ndarray, given: Any, wanted: str) -> np.ndarray:
        from astropy import units

        unit = _unit(given)
        if unit is None:
            return values
        try:
            if wanted == "mag" and isinstance(unit, units.MagUnit):
                if unit.physical_unit == units.dimensionless_unscaled:
                    return values
                return units.Magnitude(values, unit).to_value(units.ABmag)
            if wanted != "mag" or unit == units.mag:
                return np.asarray(unit.to(wanted, values))
        except (TypeError, ValueError, units.UnitsError):
            pass
        raise InputError(
            f"Column {self.spelled(name)} of {self.name} must be {_DESCRIBED[wanted]}; received the unit {given}."
        )

    # --- positions ---

    def sky(self) -> np.ndarray | None:
        """Right ascension and declination, degrees, (N, 2); None if the table has none.

        Declinations beyond 90 degrees, such as -99 for unknown, are NaN.
        """
        for names in SKY:
            if self.has(*names):
                places = np.column_stack([self.column(name, "deg") for name in names])
                places[~(np.abs(places[:, 1]) <= 90) | ~np.isfinite(places[:, 0])] = np.nan
                return places
        return None

    def pixels(self) -> np.ndarray | None:
        """Positions x and y in pixels from 0, (N, 2); None if the table has none."""
        for x, y, first in PIXELS:
            if self.has(x, y):
                return np.column_stack([self.column(x, "pix"), self.column(y, "pix")]) - first
        return None

    # --- parameters ---

    def require(self, *parameters: str) -> None:
        """Refuse a table that lacks one of the parameters of `NAMES`.

        Raises
        ------
        InputError
            Which names all that are missing.
        """
        missing = [NAMES[name] for name in parameters if not any(map(self.has, NAMES[name]))]
        if not missing:
            return
        if len(missing) == 1:
            needed = f"a column {' or '.join(missing[0][:2])}"
        else:
            others = [f" (or {names[1]})" if len(names) > 1 else "" for names in missing]
            needed = "columns " + ", ".join(names[0] + other for names, other in zip(missing, others, strict=True))
        if self.bands:
            raise InputError(
                f"{self.name} needs {needed}; it has them for each of {', '.join(self.bands)}. Give the catalogue of "
                "one band."
            )
        raise InputError(f"{self.name} needs {needed}; it has {self.columns}.")

    def parameter(self, name: str) -> np.ndarray | None:
        """A parameter other than the radius, (N,); None if the table does not have it.

        Parameters
        ----------
        name : str
            ``mag`` and ``mag_auto`` (AB), ``sersic_n``, ``ellipticity``, ``theta`` (degrees), their errors, such as
            ``mag_err``, ``snr``, ``flags`` or ``fit_status``.

        Raises
        ------
        InputError
            If its column does not hold numbers, or those of another unit.
        """
        for column in NAMES.get(name, (name,)):
            if self.has(column):
                values = self.column(column, _UNITS.get(name, ""))
                return 1 - values if column == "q" else values
        return None

    def given(self, name: str, i: int) -> tuple[str, float]:
        """The column that a parameter of `NAMES` is read from, and what it holds in row `i`, for messages."""
        column = next(column for column in NAMES[name] if self.has(column))
        return self.spelled(column), float(self._numbers(self.table[self.spelled(column)])[i])

    def radii(self) -> dict[str, np.ndarray]:
        """Effective radii along the semi-major axis by their unit: ``pix``, ``arcsec``, or nothing if not stated.

        A column's own unit counts, else that of its name: pixels for ``r_eff_pix``, arcsec for ``r_eff``, and
        none for ``re``.

        Raises
        ------
        InputError
            If the only radii are neither angles nor pixels.
        """
        found: dict[str, np.ndarray] = {}
        refused = None
        for name, usual in _RADII.items():
            if self.has(name):
                try:
                    unit = self._unit_of_radius(name, usual)
                except InputError as error:
                    refused = refused or error
                    continue
                if unit not in found:
                    found[unit] = self.column(name, unit)
        if refused is not None and not found:
            raise refused
        return found

    def _unit_of_radius(self, name: str, usual: str) -> str:
        given = getattr(self.table[self.spelled(name)], "unit", None)
        own = _unit(given)
        if own is None:
            return usual
        for unit in ("arcsec", "pix"):
            if own.is_equivalent(unit):
                return unit
        raise InputError(
            f"Column {self.spelled(name)} of {self.name} must be an angle or in pixels; received the unit {given}."
        )

    def radius(self) -> tuple[np.ndarray, str] | None:
        """The radii of `radii` in pixels, else those in arcsec, with their unit; None if the table has none.

        Raises
        ------
        InputError
            If they are of a unit that is not stated.
        """
        found = self.radii()
        for unit in ("pix", "arcsec"):
            if unit in found:
                return found[unit], unit
        if not found:
            return None
        raise InputError(
            f"Column {self.spelled('re')} of {self.name} has no unit. Call it r_eff_pix if it is in pixels, r_eff if "
            "it is in arcsec."
        )

    def radius_in_pixels(self, pixel_scale: float, advice: str) -> np.ndarray | None:
        """Effective radii along the semi-major axis in pixels, (N,); None if the table has none.

        Parameters
        ----------
        pixel_scale : float
            Arcsec per pixel, NaN if not known.
        advice : str
            How to give a pixel scale, for the message that there is none.

        Raises
        ------
        InputError
            If radii are angles and there is no pixel scale, or of a unit that is not stated.
        """
        found = self.radius()
        if found is None or found[1] == "pix":
            return None if found is None else found[0]
        if not np.isfinite(pixel_scale):
            raise InputError(f"Radii of {self.name} are angles, and the pixel scale is not known: {advice}")
        return found[0] / pixel_scale

    def targets(
        self, pixel_scale: float, advice: str = "give r_eff_pix.", *, of_other_images: bool = False
    ) -> np.ndarray:
        """Magnitude, radius [pix], Sersic index and ellipticity, float64, (N, 4).

        Parameters
        ----------
        pixel_scale, advice
            As for `radius_in_pixels`.
        of_other_images : bool
            Whether radii in arcsec, if the table has them, go before those in pixels, which may be of other images.

        Raises
        ------
        InputError
            If the table lacks one of them, or it cannot be used.
        """
        self.require(*TARGET_NAMES)
        angles = self.radii().get("arcsec") if of_other_images and np.isfinite(pixel_scale) else None
        radii = self.radius_in_pixels(pixel_scale, advice) if angles is None else angles / pixel_scale
        columns = [radii if name == "r_eff_pix" else self.parameter(name) for name in TARGET_NAMES]
        return np.column_stack([column for column in columns if column is not None])


def _few(names: list[str]) -> str:
    return ", ".join(names[:12]) + ("" if len(names) <= 12 else f" and {len(names) - 12} more columns")


_LONGEST = 40
"""Characters of a value that messages show."""


def _bare(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """The values of a column without its unit and mask, and where they are masked, bool."""
    masked = np.ma.getmaskarray(column) if isinstance(column, np.ma.MaskedArray) else getattr(column, "mask", False)
    values = getattr(column, "unmasked", column)
    values = np.asarray(getattr(values, "value", values))
    return values, np.broadcast_to(masked, values.shape)


_SPELLINGS = {"decimal degrees": "deg", **dict.fromkeys(("abmag", "ab mag", "mag ab", "mag_ab", "mag(ab)"), "mag(AB)")}
"""Units in lower case that astropy spells in another way."""


def _unit(given: Any) -> Any:
    """The unit of a column; None if it has none.

    What the standard of a file does not know, such as hours in FITS, plurals and capitals, is tried as astropy
    writes it.
    """
    from astropy import units

    if given is None or given == units.dimensionless_unscaled:
        return None
    plain = str(given).lower().strip(" .'\"")
    unit = units.Unit(_SPELLINGS.get(plain, given), parse_strict="silent")
    for name in (str(given), plain):
        for spelling in (name, name.removesuffix("s")):
            if isinstance(unit, units.UnrecognizedUnit):
                unit = units.Unit(spelling, parse_strict="silent")
    return unit


def _as_text(value: Any) -> str:
    return value.decode("utf-8", "replace").strip() if isinstance(value, bytes) else str(value).strip()


def holds_table(path: str | Path) -> bool:
    """Whether a file is a table: by its ending, and of FITS files by whether the first data are a table.

    Of a FITS file with an extension in brackets, that extension counts.
    """
    from astropy.io import fits

    from sersicnet.catalogue.table import format_of, is_table, located

    file, wanted = located(path)
    kind = format_of(file)
    if kind != "fits":
        return kind is not None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with fits.open(file) as hdus:
                if wanted is not None:
                    return is_table(hdus[int(wanted) if wanted.isdigit() else wanted])
                return is_table(next((hdu for hdu in hdus if hdu.header.get("NAXIS", 0) > 0), None))
    except (MemoryError, NameError, AssertionError):
        raise  # none of these is a fault of the file
    except Exception:  # the reader of images says what is wrong with the file
        return False


def possible(name: str, values: np.ndarray) -> np.ndarray:
    """Which values are possible; catalogues have numbers such as -99 for unknown values."""
    with np.errstate(invalid="ignore"):
        if name in ("mag", "mag_auto"):
            return np.abs(values) < 50
        if name == "ellipticity":
            return (values >= 0) & (values < 1)
        return (values > 0) & np.isfinite(values)
