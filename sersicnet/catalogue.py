"""The catalogue as a file: units, descriptions and UCDs on each column, and where it came from."""

from __future__ import annotations

import datetime
import gzip
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import astropy
import numpy as np
import photutils
from astropy.io import fits
from astropy.table import QTable, Table

import sersicnet
from sersicnet import instrument, mosaic
from sersicnet.errors import InputError
from sersicnet.schema import COLUMN

FORMATS = {".fits": "fits", ".fit": "fits", ".ecsv": "ascii.ecsv", ".csv": "ascii.csv", ".parquet": "parquet"}


def read_table(path: str | Path) -> Table:
    """Read a table by its ending (.fits, .ecsv, .csv, .parquet), with clear errors."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"A table is a file; there is none at {path}.")
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"A table ends in {', '.join(FORMATS)}; received {path.name}.")
    try:
        return Table.read(path, format=kind)
    except Exception as error:  # every reader has exceptions of its own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{path} cannot be read as {kind}: {reason[0]}") from error


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
    "DATE": "UTC date of this catalogue",
    "MAGSYS": "magnitude system",
    "ZEROPT": "magnitude of one image unit",
    "ZPSOURCE": "where ZEROPT was read",
    "PIXSRC": "where PIXSCALE was read",
    "PIXSCALE": "arcsec per pixel",
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
    "STRUCTUR": "scatter of galaxies about a profile, in fits",
    "PRIOR": "what the fits assume of galaxies",
}


def write(table: QTable, path: Path) -> None:
    """Write a catalogue; it appears whole or not at all.

    FITS gets units, descriptions (``TCOMMn``) and UCDs (``TUCDn``), of which
    astropy writes only the first.
    """
    kind = FORMATS[path.suffix.lower()]
    if kind == "fits":
        _whole(path, lambda partial: _hdu(table).writeto(partial, overwrite=True, checksum=True))
    else:
        _whole(path, lambda partial: table.write(partial, format=kind, overwrite=True))


@contextmanager
def writing_image(frame: mosaic.Image, path: Path | None) -> Iterator[np.ndarray | None]:
    """An image that lies on another one, to be filled part by part; it appears whole or not at all.

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
    header["IMAGE"] = frame.name if len(frame.name) < 60 else Path(frame.name).name
    header["SNETVER"] = sersicnet.__version__
    full = fits.PrimaryHDU(header=header).header
    full["BITPIX"], full["NAXIS"] = -32, 2
    full.set("NAXIS1", frame.shape[1], after="NAXIS")
    full.set("NAXIS2", frame.shape[0], after="NAXIS1")
    start = full.tostring().encode("ascii")
    size = 4 * frame.shape[0] * frame.shape[1]
    with _partial(path) as partial:
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


def _whole(path: Path, write_to: Callable[[Path], None]) -> None:
    """Let something be written beside `path`, then rename it."""
    with _partial(path) as partial:
        write_to(partial)


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A file beside `path` that gets its name in the end."""
    suffix = "".join(path.suffixes[-2:])
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=suffix, dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path} could not be written: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)


def _hdu(table: QTable) -> fits.HDUList:
    unit = fits.BinTableHDU.from_columns(
        [
            fits.Column(
                name=name,
                format={"i4": "J", "f4": "E", "f8": "D"}[COLUMN[name].dtype],
                unit=COLUMN[name].unit or None,
                array=np.asarray(getattr(table[name], "value", table[name])),
            )
            for name in table.colnames
        ],
        name="CATALOG",
    )
    for i, name in enumerate(table.colnames, start=1):
        unit.header.set(f"TCOMM{i}", COLUMN[name].description, after=f"TFORM{i}")
        unit.header.set(f"TUCD{i}", COLUMN[name].ucd, after=f"TCOMM{i}")
    for key, value in table.meta.items():
        if isinstance(value, str):  # headers hold nothing but ASCII
            value = value.encode("ascii", "backslashreplace").decode()
        if key == "COMMAND":
            unit.header.add_history(value)
        else:
            unit.header[key] = (value, _CARD_COMMENTS[key]) if len(str(value)) < 40 else value
    return fits.HDUList([fits.PrimaryHDU(), unit])
