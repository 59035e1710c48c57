"""The catalogue as a file: units, descriptions and UCDs on each column, and where it came from."""

from __future__ import annotations

import datetime
import gzip
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import astropy
import numpy as np
from astropy import units
from astropy.io import ascii as text_tables
from astropy.io import fits
from astropy.io.votable import from_table
from astropy.io.votable.tree import Info, VOTableFile
from astropy.table import MaskedColumn, QTable, Table
from astropy.utils.exceptions import AstropyUserWarning, AstropyWarning

import sersicnet
from sersicnet.errors import InputError, first_line, printable, warn
from sersicnet.image import header as instrument
from sersicnet.image import mosaic
from sersicnet.output import whole
from sersicnet.schema import COLUMN, Column

FORMATS = {
    ".fits": "fits", ".fit": "fits", ".ecsv": "ascii.ecsv", ".csv": "ascii.csv", ".parquet": "parquet",
    ".vot": "votable", ".xml": "votable"}  # fmt: skip


def check_ending(path: Path) -> None:
    """Refuse a catalogue whose name has none of the endings of `FORMATS`."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"A catalogue ends in {', '.join(FORMATS)}; received {path.name}.")


def stem(image: Path) -> str:
    """Name of an image or a catalogue without its directory and endings."""
    return re.sub(r"(\.fits?|\.asdf)?(\.fz|\.gz|\.bz2|\.xz)?(\[.*\])?$", "", image.name, count=1)


def located(path: str | Path) -> tuple[Path, str | None]:
    """The file of a table, and the name or number of its extension, if that follows in brackets."""
    path = Path(path)
    bracketed = re.fullmatch(r"(.+)\[([^\[\]]+)\]", str(path), re.DOTALL)
    return (path, None) if bracketed is None or path.exists() else (Path(bracketed[1]), bracketed[2])


def format_of(path: Path) -> str | None:
    """The format of a table by its ending, before ``.gz`` if it has that; None if it is none of `FORMATS`."""
    packed = path.suffix.lower() == ".gz"
    kind = FORMATS.get((path.with_suffix("") if packed else path).suffix.lower())
    return None if packed and kind == "parquet" else kind


def read_table(path: str | Path) -> Table:
    """Read a table by its ending, see `FORMATS`; all but Parquet may be gzipped (``.fits.gz``).

    Parameters
    ----------
    path : str or Path
        The extension of a FITS file may follow in brackets, ``file.fits[NAME]`` or ``file.fits[2]``. By default it
        is SExtractor's ``LDAC_OBJECTS``, else the first table.

    Returns
    -------
    Table
        Missing values are masked.

    Raises
    ------
    InputError
        If there is no such file or extension, its ending is another one, or it cannot be read.

    Warns
    -----
    SersicnetWarning
        If a FITS file has several tables, and none is chosen.
    """
    path, wanted = located(path)
    if not path.is_file():
        raise InputError(f"A table is a file; there is none at {path}.")
    kind = format_of(path)
    if kind is None:
        raise InputError(f"A table ends in {', '.join(FORMATS)}; received {path.name}.")
    if wanted is not None and kind != "fits":
        raise InputError(f"Only tables in FITS files have extensions; received {path.name}[{wanted}].")
    try:
        with warnings.catch_warnings():
            # What astropy says of odd units, keywords and VOTables is nothing to act on; unusable columns are refused.
            warnings.simplefilter("ignore", AstropyWarning)
            warnings.filterwarnings("error", message=".*truncated.*", category=AstropyUserWarning)
            if kind == "ascii.csv":
                # The text, not the path: the fast reader takes no encoding, and so no byte-order mark.
                return text_tables.read(read_text(path).removeprefix("#") + "\n", format="csv", guess=False)
            if kind == "fits":
                return _read_fits(path, wanted)
            return _read_parquet(path) if kind == "parquet" else Table.read(path, format=kind)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a {kind.removeprefix('ascii.').upper()} file in UTF-8: {error}.") from error
    except (InputError, MemoryError, NameError, AssertionError):
        raise  # none of these is a fault of the file, as its reader sees it
    except Exception as error:  # every reader has exceptions of its own
        raise InputError(f"{path} cannot be read as {kind}: {first_line(error)}") from error


def read_text(path: Path) -> str:
    """A text file in UTF-8, plain or gzipped, without the byte order mark that some programs begin with."""
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix.lower() == ".gz" else content).decode("utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_parquet(path: Path) -> Table:
    """A Parquet file; of other programs than astropy, which has trouble with what it does not write: missing text."""
    import pyarrow
    import pyarrow.parquet

    kinds = pyarrow.types
    # The file, not its path: names that are no text in UTF-8 cannot be given to pyarrow.
    with path.open("rb") as opened, pyarrow.parquet.ParquetFile(opened) as file:
        schema = file.schema_arrow
        if b"table_meta_yaml" in (schema.metadata or {}):
            opened.seek(0)
            return Table.read(opened, format="parquet")
        arrow = file.read()
    found = Table()
    for name, column in zip(schema.names, arrow.columns, strict=True):
        if kinds.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if kinds.is_decimal(column.type) or kinds.is_null(column.type):
            column = column.cast(pyarrow.float64())
        missing = column.is_null().to_numpy()
        if kinds.is_floating(column.type) or kinds.is_integer(column.type):
            content = column.fill_null(0).to_numpy()
        else:
            values = column.to_pylist()
            filler = next((value for value in values if value is not None), "")
            content = np.empty(len(values), object)
            content[:] = [filler if value is None else value for value in values]
            if isinstance(filler, bool | str | bytes):
                content = np.array(content.tolist())
        found[name] = MaskedColumn(content, mask=missing) if missing.any() else content
    return found


def _read_fits(path: Path, wanted: str | None) -> Table:
    """A table of a FITS file; how its columns are to be displayed does not matter."""
    number = _which_hdu(path, wanted)
    with fits.open(path, memmap=False) as hdus:
        for keyword in list(hdus[number].header["TDISP*"]):
            del hdus[number].header[keyword]
        return Table.read(hdus[number], format="fits")


_OBJECTS = ("LDAC_OBJECTS", "OBJECTS")
"""Extensions in which SExtractor and its relatives write their sources, after a table of the image's header."""


def _which_hdu(path: Path, wanted: str | None) -> int:
    """The number of the extension that is read from a FITS file."""
    with fits.open(path) as hdus:
        names = [hdu.name for hdu in hdus]
        tables = [i for i, hdu in enumerate(hdus) if is_table(hdu)]
    listed = ", ".join(names[i] or str(i) for i in tables)
    if wanted is not None:
        matching = [i for i, name in enumerate(names) if wanted.upper() == name.upper() or wanted == str(i)]
        if not set(matching) & set(tables):
            what = "is an image" if matching else "is none of its extensions"
            raise InputError(f"{path} has {f'the tables {listed}' if tables else 'no table'}; {wanted} {what}.")
        return next(i for i in matching if i in tables)
    if not tables:
        raise InputError(f"{path} has no table.")
    objects = [i for i in tables if names[i] in _OBJECTS]
    chosen, *others = objects or tables
    if others:
        warn(
            f"{path} has the tables {listed}: {names[chosen] or chosen}, number {chosen}, is read. Another one is "
            f"chosen by its name or number in brackets, as in {path.name}[{others[0]}]."
        )
    return chosen


def is_table(hdu: object) -> bool:
    """Whether an extension of a FITS file is a table, and not a compressed image, which is stored as one."""
    return isinstance(hdu, fits.BinTableHDU | fits.TableHDU) and not isinstance(hdu, fits.CompImageHDU)


def origin() -> dict[str, str]:
    """Date and versions, as FITS cards."""
    return {
        "DATE": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").removesuffix("+00:00"),
        "SNETVER": sersicnet.__version__,
        "PHOTUTIL": metadata.version("photutils"),
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
    "PSFERR": "relative error of PSFFWHM",
    "PSFLIGHT": "light of the PSF within two FWHM",
    "PSFLERR": "relative error of PSFLIGHT",
    "PSFELLIP": "ellipticity of the PSF",
    "PSFDOUBT": "why the PSF may be of another image",
    "PSFSTARS": "stars that the PSF is from",
    "PSFMIN": "least FWHM of the PSF over the image, pixels",
    "PSFMAX": "largest FWHM of the PSF over the image, pixels",
    "OUTSIDE": "what is outside the domain of the weights",
    "WEIGHTS": "network weights",
    "WTSHA256": "SHA-256 of the network",
    "DEVICE": "where the network ran, cpu or gpu",
    "SNETVER": "version of sersicnet",
    "PHOTUTIL": "version of photutils",
    "ASTROPY": "version of astropy",
    "STAMPSIZ": "side of a stamp in pixels",
    "COMMAND": "command line",
    "PSF": "PSF of the fits",
    "GAIN": "electrons per image unit, in the fits",
    "MODELERR": "scatter of galaxies about a profile, in fits",
    "PRIOR": "what the fits assume of galaxies",
    "VALFILE": "validation whose factors the errors have",
    "VALSHA": "SHA-256 of VALFILE",
    "VALBIAS": "whether its biases were taken out, too",
    "DETECTON": "image that the sources are from",
    "BANDS": "bands of the columns",
    "DETBAND": "band that sources were detected on",
    "FROMBAND": "band of the table whose shapes are used",
    "XOFFSET": "median offset along x, pixels",
    "YOFFSET": "median offset along y, pixels",
    "OFFSETER": "error of the offset, pixels",
    "OFFSETN": "sources that the offset is from",
    "FIXED": "fixed in the fits",
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
    table = _printable(table)
    with whole(path) as partial:
        if kind == "fits":
            _hdu(table).writeto(partial, overwrite=True, checksum=True)
        elif kind == "votable":
            _votable(table).to_xml(str(partial))
        else:
            table.write(partial, format=kind, overwrite=True)


def with_image(table: QTable, path: Path) -> QTable:
    """Add the column ``image`` to a catalogue of fits in CSV or VOTable, whose headers are not read back.

    Parameters
    ----------
    table : QTable
        Of one image.
    path : Path
        The file to write. The path of the image is relative to its directory if the image is below it, else absolute.

    Returns
    -------
    QTable
        The table itself if the file has another format, the image is not a file, or nothing was fitted: parameters of
        a network alone are no labels.
    """
    image = str(table.meta.get("IMAGE", ""))
    labels = FORMATS[path.suffix.lower()] in ("ascii.csv", "votable") and "fit_status" in table.colnames
    if not labels or "image" in table.colnames or not located(image)[0].is_file():
        return table
    file, directory = Path(image).resolve(), path.resolve().parent
    stated = str(file.relative_to(directory) if file.is_relative_to(directory) else file)
    out = table.copy(copy_data=False)
    out.add_column(np.full(len(table), stated), index=0, name="image")
    return out


def assembled(columns: Mapping[str, np.ndarray]) -> QTable:
    """The given columns in the order of `sersicnet.schema.COLUMNS`, with units and descriptions.

    What single precision cannot hold becomes infinite.
    """
    table = QTable()
    for name, column in COLUMN.items():
        if name in columns:
            with np.errstate(over="ignore"):
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


def side_by_side(detections: QTable, bands: Mapping[str, QTable], names: Collection[str]) -> QTable:
    """One catalogue of several bands with the same rows.

    Parameters
    ----------
    detections : QTable
        Columns of the sources, under their own names.
    bands : mapping of QTable
        The catalogue of each band by its name, which is added to the names of its columns, as in ``mag_F125W``.
    names : collection of str
        The columns that are wanted, of sources and bands.

    Returns
    -------
    QTable
        ``flags`` are the flags of all bands together, if they have that column. Cards that differ between the bands go
        into the history, one line for each band.
    """
    out = QTable({name: detections[name] for name in detections.colnames if name in names})
    flags = [table["flags"] for table in bands.values() if "flags" in table.colnames and "flags" in names]
    if flags:
        out["flags"] = np.bitwise_or.reduce(flags).astype(COLUMN["flags"].dtype)
        out["flags"].info.description = COLUMN["flags"].description + "; of all bands"
    for band, table in bands.items():
        moved = _OF_POSITION if "fit_status" in table.colnames else ()  # a fit has a position of its own
        for name in table.colnames:
            if name not in names or (name in _OF_SOURCE and name in detections.colnames and name not in moved):
                continue
            own = f"{name}_{band}"
            out[own] = table[name]
            out[own].info.description = f"{COLUMN[name].description}; {band}"
    keys = dict.fromkeys(key for table in bands.values() for key in table.meta if key not in ("DATE", "COMMAND"))
    shared = {key for key in keys if len({str(table.meta.get(key)) for table in bands.values()}) == 1}
    first = next(iter(bands.values()))
    if not {"XOFFSET", "YOFFSET"} <= shared:
        shared.discard("OFFSETN")  # the number of sources goes with the offset
    out.meta.update({key: first.meta[key] for key in keys if key in shared})
    out.meta.update(origin())
    out.meta["BANDS"] = ",".join(bands)
    if "COMMAND" in first.meta:
        out.meta["COMMAND"] = first.meta["COMMAND"]
    out.meta["HISTORY"] = [
        f"{band}: " + "; ".join(f"{key} {table.meta[key]}" for key in keys if key not in shared and key in table.meta)
        for band, table in bands.items()
    ]
    return out


_OF_POSITION = ("ra", "dec", "ra_err", "dec_err")
_OF_SOURCE = ("id", *_OF_POSITION, "a_image", "b_image", "parent")
"""Columns of a band that are those of the sources, if these have them."""


def _column(name: str) -> Column:
    """What a column holds; one of a band, such as ``mag_err_F125W``, holds what the same without its name does."""
    if name in COLUMN:
        return COLUMN[name]
    base = max((known for known in COLUMN if name.startswith(f"{known}_")), key=len)
    return replace(COLUMN[base], ucd=COLUMN[base].ucd.removesuffix(";meta.main"))


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
    """Text as FITS can hold it, in ASCII that can be printed."""
    return printable(text).encode("ascii", "backslashreplace").decode()


def _printable(table: QTable) -> QTable:
    """The same catalogue, with names of files as every format can hold them: FITS in ASCII, others in UTF-8."""
    out = table.copy(copy_data=False)
    for key, value in table.meta.items():
        if isinstance(value, str):
            out.meta[key] = printable(value)
        elif isinstance(value, list):
            out.meta[key] = [printable(text) for text in value]
    for name in table.colnames:
        if table[name].dtype.kind == "U" and not all(map(str.isprintable, table[name].tolist())):
            out[name] = [printable(text) for text in table[name].tolist()]
            out[name].info.description = table[name].info.description
    return out


def _votable(table: QTable) -> VOTableFile:
    file = from_table(Table(table))
    resource = file.resources[0]
    for key, value in table.meta.items():
        resource.infos.append(Info(name=key, value=str(value)))
    for field in resource.tables[0].fields:
        field.ucd = _column(field.name).ucd
    return file


def _hdu(table: QTable) -> fits.HDUList:
    bare = Table(table, copy=False)
    bare.meta = {}  # astropy writes cards without comments
    for name in table.colnames:
        if table[name].dtype.kind == "U" and not all(map(str.isascii, table[name].tolist())):
            bare[name] = [_ascii(text) for text in table[name].tolist()]
    unit = fits.table_to_hdu(bare)
    unit.name = "CATALOG"
    for i, name in enumerate(table.colnames, start=1):
        unit.header.set(f"TCOMM{i}", table[name].info.description or _column(name).description, after=f"TFORM{i}")
        unit.header.set(f"TUCD{i}", _column(name).ucd, after=f"TCOMM{i}")
    for key, value in table.meta.items():
        if key in ("COMMAND", "HISTORY"):
            for line in value if isinstance(value, list) else [value]:
                unit.header.add_history(_ascii(line))
            continue
        if isinstance(value, str):
            value = _ascii(value)
        room = 80 - len("KEYWORD = '' / ") - len(str(value).replace("'", "''"))
        comment = _CARD_COMMENTS.get(key, "")
        unit.header[key] = (value, comment) if len(comment) <= min(room, 47) else value
    return fits.HDUList([fits.PrimaryHDU(), unit])
