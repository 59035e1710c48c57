"""The catalogue as a file: units, descriptions and UCDs on each column, and where it came from."""

from __future__ import annotations

import datetime
import gzip
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import astropy
import numpy as np
import photutils
from astropy import units
from astropy.io import ascii as text_tables
from astropy.io import fits
from astropy.io.votable import from_table
from astropy.io.votable.tree import Info, VOTableFile
from astropy.table import QTable, Table
from astropy.utils.exceptions import AstropyUserWarning, AstropyWarning

import sersicnet
from sersicnet.errors import InputError, first_line, printable
from sersicnet.image import header as instrument
from sersicnet.image import mosaic
from sersicnet.output import whole
from sersicnet.schema import COLUMN

FORMATS = {
    ".fits": "fits", ".fit": "fits", ".ecsv": "ascii.ecsv", ".csv": "ascii.csv", ".parquet": "parquet",
    ".vot": "votable", ".xml": "votable"}  # fmt: skip


def check_ending(path: Path) -> None:
    """Refuse a catalogue whose name has none of the endings of `FORMATS`."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"A catalogue ends in {', '.join(FORMATS)}; received {path.name}.")


def stem(image: Path) -> str:
    """Name of an image or a catalogue without its directory and endings."""
    return re.sub(r"(\.fits?|\.asdf)?(\.fz|\.gz)?(\[.*\])?$", "", image.name, count=1)


def read_table(path: str | Path) -> Table:
    """Read a table by its ending, see `FORMATS`.

    Returns
    -------
    Table
        Missing values are masked.

    Raises
    ------
    InputError
        If there is no such file, its ending is another one, or it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"A table is a file; there is none at {path}.")
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"A table ends in {', '.join(FORMATS)}; received {path.name}.")
    try:
        with warnings.catch_warnings():
            # What astropy says of odd units, keywords and VOTables is nothing to act on; unusable columns are refused.
            warnings.simplefilter("ignore", AstropyWarning)
            warnings.filterwarnings("error", message=".*truncated.*", category=AstropyUserWarning)
            if kind == "ascii.csv":
                # The text, not the path: the fast reader takes no encoding, and so no byte-order mark.
                return text_tables.read(path.read_text("utf-8-sig") + "\n", format="csv", guess=False)
            return Table.read(path, format=kind, **_which_hdu(path) if kind == "fits" else {})
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a {kind.removeprefix('ascii.').upper()} file in UTF-8: {error}.") from error
    except (MemoryError, NameError, AssertionError):
        raise  # none of these is a fault of the file
    except Exception as error:  # every reader has exceptions of its own
        raise InputError(f"{path} cannot be read as {kind}: {first_line(error)}") from error


def _which_hdu(path: Path) -> dict[str, str]:
    """Where the table of a FITS file is if it is not the first one: SExtractor writes one of the header before it."""
    with fits.open(path) as hdus:
        return {"hdu": "LDAC_OBJECTS"} if "LDAC_OBJECTS" in hdus else {}


def origin() -> dict[str, str]:
    """Date and versions, as FITS cards."""
    return {
        "DATE": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").removesuffix("+00:00"),
        "SNETVER": sersicnet.__version__,
        "PHOTUTIL": photutils.__version__,
        "ASTROPY": astropy.__version__,
    }


_CARD_COMMENTS = {
    "IMAGE": "image measured",
    "IMAGES": "number of images measured",
    "DATE": "UTC date of this catalogue",
    "MAGSYS": "magnitude system",
    "ZEROPT": "magnitude of one image unit",
    "ZPSOURCE": "where ZEROPT was read",
    "PIXSRC": "where PIXSCALE was read",
    "PIXSCALE": "arcsec per pixel",
    "RESAMPLE": "measured pixels per pixel of the image",
    "SKYRMS": "median noise of a blank pixel, image units",
    "NOISECOR": "noise of large apertures over white noise",
    "MAPFACT": "factor on the noise map given",
    "PSFFWHM": "full width of the PSF, pixels",
    "PSFSRC": "where PSFFWHM is from",
    "OUTSIDE": "what is outside the domain of the weights",
    "WEIGHTS": "network weights",
    "WTSHA256": "SHA-256 of the network",
    "SNETVER": "version of sersicnet",
    "PHOTUTIL": "version of photutils",
    "ASTROPY": "version of astropy",
    "STAMPSIZ": "side of a stamp in pixels",
    "COMMAND": "command line",
    "PSF": "PSF of the fits",
    "GAIN": "electrons per image unit, in the fits",
    "MODELERR": "scatter of galaxies about a profile, in fits",
    "PRIOR": "what the fits assume of galaxies",
}


def write(table: QTable, path: Path) -> None:
    """Write a catalogue; it appears whole or not at all.

    FITS holds units, descriptions (``TCOMMn``) and UCDs (``TUCDn``); astropy writes the units.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    kind = FORMATS[path.suffix.lower()]
    with whole(path) as partial:
        if kind == "fits":
            _hdu(table).writeto(partial, overwrite=True, checksum=True)
        elif kind == "votable":
            _votable(table).to_xml(str(partial))
        else:
            table.write(partial, format=kind, overwrite=True)


def assembled(columns: Mapping[str, np.ndarray]) -> QTable:
    """The given columns in the order of `sersicnet.schema.COLUMNS`, with units and descriptions."""
    table = QTable()
    for name, column in COLUMN.items():
        if name in columns:
            content = np.asarray(columns[name]).astype(column.dtype)
            table[name] = content * units.Unit(column.unit) if column.unit else content
            table[name].info.description = column.description
    return table


def joined(tables: Sequence[QTable]) -> QTable:
    """One catalogue of many images, with the column ``image``; ids count through all of them.

    Where an image lacks a column, its values are NaN, or 0 for whole numbers. Cards that differ
    between the images go into the history, one line for each image.
    """
    given = {name for table in tables for name in table.colnames}
    parts: dict[str, list[np.ndarray]] = {name: [] for name in COLUMN if name in given or name == "image"}
    before = 0
    for table in tables:
        for name, values in parts.items():
            kind = COLUMN[name].dtype
            if name == "image":
                part = np.full(len(table), str(table.meta["IMAGE"]))
            elif name in table.colnames:
                part = np.array(getattr(table[name], "value", table[name]))
            else:
                part = np.full(len(table), 0 if kind == "i4" else np.nan)
            if name in ("id", "parent"):
                part[part > 0] += before
            values.append(part)
        before += len(table)
    out = assembled({name: np.concatenate(values) for name, values in parts.items()})
    keys = dict.fromkeys(key for table in tables for key in table.meta if key != "DATE")
    shared = {key for key in keys if len({str(table.meta.get(key)) for table in tables}) == 1}
    out.meta.update({key: tables[0].meta[key] for key in keys if key in shared})
    out.meta.update(origin())
    out.meta["IMAGES"] = len(tables)
    out.meta["HISTORY"] = [
        "; ".join(f"{key} {table.meta[key]}" for key in keys if key not in shared and key in table.meta)
        for table in tables
    ]
    return out


@contextmanager
def writing_image(frame: mosaic.Image, path: Path | None) -> Iterator[np.ndarray | None]:
    """An image on the grid of another one, to be filled part by part; it appears whole or not at all.

    Yields
    ------
    ndarray, float32, (H, W) or None
        On disk; None without a path.
    """
    if path is None:
        yield None
        return
    header = fits.Header() if frame.wcs is None else frame.wcs.to_header()
    for key in ("BUNIT", *instrument.KEYWORDS):
        if key in frame.header:
            header[key] = frame.header[key]
    header["IMAGE"] = _ascii(frame.name if len(frame.name) < 60 else Path(frame.name).name)
    header["SNETVER"] = sersicnet.__version__
    full = fits.PrimaryHDU(header=header).header
    full["BITPIX"], full["NAXIS"] = -32, 2
    full.set("NAXIS1", frame.shape[1], after="NAXIS")
    full.set("NAXIS2", frame.shape[0], after="NAXIS1")
    start = full.tostring().encode("ascii")
    size = 4 * frame.shape[0] * frame.shape[1]
    with whole(path) as partial:
        with partial.open("wb") as file:
            file.write(start)
            file.truncate(len(start) + -(-size // 2880) * 2880)
        pixels = np.memmap(partial, ">f4", "r+", len(start), frame.shape)
        yield pixels
        pixels.flush()
        del pixels
        if path.suffix == ".gz":
            packed = partial.with_suffix(".packed")
            try:
                with partial.open("rb") as plain, gzip.open(packed, "wb") as file:
                    shutil.copyfileobj(plain, file)
                packed.replace(partial)
            finally:
                packed.unlink(missing_ok=True)


def _ascii(text: str) -> str:
    """Text as FITS can hold it, in printable ASCII."""
    return printable(text).encode("ascii", "backslashreplace").decode()


def _votable(table: QTable) -> VOTableFile:
    file = from_table(Table(table))
    resource = file.resources[0]
    for key, value in table.meta.items():
        resource.infos.append(Info(name=key, value=str(value)))
    for field in resource.tables[0].fields:
        field.ucd = COLUMN[field.name].ucd
    return file


def _hdu(table: QTable) -> fits.HDUList:
    bare = Table(table, copy=False)
    bare.meta = {}  # astropy writes cards without comments
    for name in table.colnames:
        if table[name].dtype.kind == "U" and not all(map(str.isascii, table[name].tolist())):
            bare[name] = [_ascii(text) for text in table[name].tolist()]
    unit = fits.table_to_hdu(bare, name="CATALOG")
    for i, name in enumerate(table.colnames, start=1):
        unit.header.set(f"TCOMM{i}", COLUMN[name].description, after=f"TFORM{i}")
        unit.header.set(f"TUCD{i}", COLUMN[name].ucd, after=f"TCOMM{i}")
    for key, value in table.meta.items():
        if key in ("COMMAND", "HISTORY"):
            for line in value if isinstance(value, list) else [value]:
                unit.header.add_history(_ascii(line))
            continue
        if isinstance(value, str):
            value = _ascii(value)
        unit.header[key] = (value, _CARD_COMMENTS[key]) if len(str(value)) < 40 else value
    return fits.HDUList([fits.PrimaryHDU(), unit])
