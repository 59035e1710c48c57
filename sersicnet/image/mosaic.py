"""Images in FITS files, read window by window.

Pixel coordinates are zero-based everywhere; FITS's one-based values do not leave
this module.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import re
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
from astropy.io import fits
from astropy.utils.exceptions import AstropyUserWarning, AstropyWarning
from astropy.wcs import WCS
from astropy.wcs.utils import proj_plane_pixel_scales
from numpy.typing import ArrayLike

from sersicnet.errors import InputError, first_line, printable, warn
from sersicnet.image import header as instrument
from sersicnet.image.celestial import ROUND_TRIP, SCALE_DOUBT, celestial
from sersicnet.image.extensions import NAMES, WORDS, band_of, choose
from sersicnet.image.pixels import Window, without_data

LEAST_SIDE = 16
"""Minimum width and height of an image, pixels."""

MOST_COMPRESSION = 10_000
"""Pixels of a tile-compressed image for each byte of its file; masks of one value have up to 4,000."""

DETECTED_PLANE = "MP_DETECTED"
"""Keyword of the bit in masks of Rubin and HSC that marks detected sources."""

_STEP = 2.0
"""Distance on either side of a position between which a direction is measured, pixels."""

FARTHEST = 1e9
"""Pixels that are farther from the middle of an image have no coordinates on the sky."""

_ADDRESS = re.compile("(https?|ftp):/+")  # a Path holds one of two slashes


class Image:
    """A two-dimensional image, read window by window.

    Parameters
    ----------
    name : str
        Name in messages.
    header : fits.Header
    shape : (int, int)
        Height and width.
    wcs : WCS, optional
        Celestial coordinates; by default the WCS of the header.

    Attributes
    ----------
    name : str
    header : fits.Header
    shape : (int, int)
    wcs : WCS or None
        None without usable celestial coordinates.
    scale_source : str
        Where `scales` are from.
    wcs_problem : str
        Reason why the celestial WCS of the header cannot be used; empty if it can be used, or if the header has none.
    """

    scale_source = "WCS"

    def __init__(self, name: str, header: fits.Header, shape: tuple[int, int], wcs: WCS | None = None) -> None:
        self.name, self.header, self.shape = printable(name), header, shape
        self.wcs, self.wcs_problem, self._omitted, self._doubt = celestial(header, shape, wcs)

    def check_wcs(self, pixel_scale: float | None = None) -> None:
        """Refuse a header with two pixel scales, and warn of distortion that is left out.

        Parameters
        ----------
        pixel_scale : float, optional
            The user's value, arcsec, which settles the doubt: a WCS that disagrees with it is not used.

        Raises
        ------
        InputError
            If the header contradicts itself, and `pixel_scale` is not given.

        Warns
        -----
        SersicnetWarning
            If the WCS leaves out distortion.
        """
        if self._doubt:
            if pixel_scale is None:
                raise InputError(f"{self.name} {self._doubt}. Correct the header, or give `pixel_scale`.")
            if self.scales is not None and abs(np.sqrt(np.prod(self.scales)) / pixel_scale - 1) > SCALE_DOUBT:
                self.wcs, self.wcs_problem = None, f"it {self._doubt}"
                del self.scales
        elif self._omitted and self.wcs is not None:
            warn(f"{self.name} has a WCS of which only a part is used: {self._omitted}.")

    @property
    def whole(self) -> Window:
        """The window of all pixels."""
        return slice(0, self.shape[0]), slice(0, self.shape[1])

    @property
    def path(self) -> Path | None:
        """The file that the image is read from; None for an image in memory."""
        return None

    @property
    def is_held(self) -> bool:
        """Whether all of the image is in memory."""
        return True

    def identity(self) -> list[Any]:
        """A value that changes when the pixels change; an unfinished run keeps it to recognise the image."""
        raise NotImplementedError

    def read(self, window: Window) -> np.ndarray:
        """The pixels of a window, float32 in native byte order; blank pixels are NaN."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the file; reading opens it again."""

    @functools.cached_property
    def data(self) -> np.ndarray:
        """The whole image, float32, (H, W)."""
        data = self.read(self.whole)
        self.close()
        if not np.isfinite(data).any():
            raise InputError(f"{self.name} has no finite pixel.")
        return data

    def without_data(self) -> np.ndarray:
        """Pixels of the whole image that hold no data, bool, (H, W); see `without_data`."""
        return without_data(self.data)

    @functools.cached_property
    def scales(self) -> np.ndarray | None:
        """Size of a pixel along both axes, arcsec."""
        return None if self.wcs is None else proj_plane_pixel_scales(self.wcs) * 3600

    @property
    def elongation(self) -> float:
        """Axis ratio of the ellipse on the sky that is a circle in the image: 1 for square pixels or without a WCS."""
        if self.wcs is None:
            return 1.0
        long, short = np.linalg.svd(self.wcs.celestial.pixel_scale_matrix, compute_uv=False)
        return float(long / short)

    def sky(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Right ascension and declination (ICRS, degrees) of zero-based pixels.

        They are NaN where the projection has no sky, and, with distortion, farther from the image than its
        size.
        """
        assert self.wcs is not None
        x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
        height, width = self.shape
        # A polynomial means nothing far from the image, and no projection does after so many pixels.
        reach = (1.5 * width, 1.5 * height) if self.wcs.has_distortion else (FARTHEST, FARTHEST)
        near = (np.abs(x - width / 2) < reach[0]) & (np.abs(y - height / 2) < reach[1])
        x, y = np.where(near, x, np.nan), np.where(near, y, np.nan)
        with np.errstate(all="ignore"):  # absurd positions
            coordinates = self.wcs.pixel_to_world(x, y).icrs
            return coordinates.ra.deg, coordinates.dec.deg

    def position_angle(self, x: np.ndarray, y: np.ndarray, theta: np.ndarray) -> np.ndarray:
        """Directions in the image as position angles on the sky.

        Parameters
        ----------
        x, y : ndarray, float, (N,)
            Zero-based pixels.
        theta : ndarray, float, (N,)
            Degrees from +x towards +y.

        Returns
        -------
        ndarray, float64, (N,)
            Degrees east of north (ICRS), from 0 to below 180; NaN where an input is NaN.
        """
        x, y, theta = (np.asarray(values, dtype=float) for values in (x, y, theta))
        ahead = np.cos(np.radians(theta)), np.sin(np.radians(theta))
        here, before, after = (
            np.radians(self.sky(x + step * ahead[0], y + step * ahead[1])) for step in (0.0, -0.5, 0.5)
        )
        # Differences are taken of unit vectors: right ascension is discontinuous at 0 and degenerate at the poles.
        (x0, y0, z0), (x1, y1, z1) = (
            (np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)) for ra, dec in (before, after)
        )
        dx, dy, dz = x1 - x0, y1 - y0, z1 - z0
        ra, dec = here
        east = dy * np.cos(ra) - dx * np.sin(ra)
        north = dz * np.cos(dec) - (dx * np.cos(ra) + dy * np.sin(ra)) * np.sin(dec)
        angle = np.degrees(np.arctan2(east, north)) % 180
        return np.where(angle < 180, angle, np.where(np.isnan(angle), np.nan, 0.0))

    def direction(self, x: np.ndarray, y: np.ndarray, position_angle: np.ndarray) -> np.ndarray:
        """Position angles on the sky as directions in the image, the inverse of `position_angle`.

        Parameters
        ----------
        x, y : ndarray, float, (N,)
            Zero-based pixels.
        position_angle : ndarray, float, (N,)
            Degrees east of north (ICRS).

        Returns
        -------
        ndarray, float64, (N,)
            Degrees from +x towards +y, from -90 to below 90; NaN where an input is NaN.
        """
        assert self.scales is not None
        ra, dec = np.radians(self.sky(x, y))
        angle, step = np.radians(np.asarray(position_angle, dtype=float)), np.radians(_STEP * self.scales.mean() / 3600)
        ends = []
        for ahead in (angle, angle + np.pi):  # along the great circle through the position
            there = np.arcsin(np.sin(dec) * np.cos(step) + np.cos(dec) * np.sin(step) * np.cos(ahead))
            east = np.sin(ahead) * np.sin(step) * np.cos(dec), np.cos(step) - np.sin(dec) * np.sin(there)
            ends.append(self.pixels(np.degrees(ra + np.arctan2(*east)), np.degrees(there)))
        (x1, y1), (x0, y0) = ends
        return (np.degrees(np.arctan2(y1 - y0, x1 - x0)) + 90) % 180 - 90

    def pixels(self, ra: ArrayLike, dec: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Zero-based pixels of ICRS coordinates in degrees; NaN where the WCS does not lead there and back."""
        from astropy.coordinates import SkyCoord

        if self.wcs is None:
            raise InputError(f"{self.name} has no celestial WCS to convert ra and dec to pixels with. Give x and y.")
        ra, dec = np.asarray(ra, dtype=float), np.asarray(dec, dtype=float)
        dec = np.where(np.abs(dec) <= 90, dec, np.nan)  # values such as -99 mean that dec is unknown
        ra = np.where(np.abs(ra) < 720, ra, np.nan)  # fields at 0 have values beyond 360; 999 means unknown
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore", UserWarning)  # inverting the distortion does not converge far away
            x, y = (
                np.asarray(values, dtype=float) for values in self.wcs.world_to_pixel(SkyCoord(ra, dec, unit="deg"))
            )
        if self.wcs.has_distortion and x.size and self.scales is not None:
            back = self.sky(x, y)
            apart = np.hypot((back[0] - ra + 180) % 360 - 180, back[1] - dec) * 3600
            near = apart < ROUND_TRIP * np.sqrt(np.prod(self.scales))
            x, y = np.where(near, x, np.nan), np.where(near, y, np.nan)
        return x, y


class FitsImage(Image):
    """An image in a FITS file.

    Parameters
    ----------
    path : Path
    hdu : int
        Number of the extension.
    header : fits.Header
    shape : (int, int)
        Height and width.
    held : ndarray, float32, optional
        All pixels, if the file cannot be read window by window.
    name : str, optional
        Name in messages and in the catalogue's header; the path and the extension by default.
    """

    def __init__(
        self,
        path: Path,
        hdu: int,
        header: fits.Header,
        shape: tuple[int, int],
        held: np.ndarray | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name or f"{path}[{hdu}]", header, shape)
        self._path, self.hdu, self._held = path, hdu, held
        self._open: tuple[fits.HDUList, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Another process opens the file itself.
        return {**self.__dict__, "_open": None}

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def is_held(self) -> bool:
        """Whether the whole image is in memory; true for a file that cannot be read window by window."""
        return self._held is not None

    def identity(self) -> list[Any]:
        """Size and modification time of the file."""
        about = self._path.stat()
        return [about.st_size, about.st_mtime_ns]

    def is_in(self, other: Image) -> bool:
        """Whether both images are read from the same extension of the same file."""
        return isinstance(other, FitsImage) and self.hdu == other.hdu and self._path.samefile(other._path)

    def read(self, window: Window) -> np.ndarray:
        """The pixels of a window, float32 in native byte order; blank pixels are NaN."""
        if self._held is not None:
            return self._held[window].copy()
        with readable(self._path), np.errstate(over="ignore"):  # values beyond single precision become infinite
            if self._plain is not None:
                return self._part(*self._plain, window)
            if self._open is None:
                hdus = fits.open(self._path, memmap=False)  # sections are read on demand
                weakref.finalize(self, hdus.close)
                self._open = hdus, hdus[self.hdu].section
            section = self._open[1]
            plane = (0,) * (len(section.shape) - 2)  # axes of one pixel precede those of the image
            return np.array(section[(*plane, *window)], dtype=np.float32, order="C")

    def _part(self, kind: np.dtype, start: int, window: Window) -> np.ndarray:
        """The pixels of a window of a plain image, read row by row: this takes half as long as a memory map."""
        rows, columns = (range(*part.indices(n)) for part, n in zip(window, self.shape, strict=True))
        out = np.empty((len(rows), len(columns)), kind)
        with self._path.open("rb", buffering=0) as file:
            for row, line in zip(rows, out, strict=True):
                file.seek(start + (row * self.shape[1] + columns.start) * kind.itemsize)
                if file.readinto(line) < line.nbytes:
                    raise OSError("it ends before its last pixel")
        if kind.byteorder == ">":
            out = out.byteswap(inplace=True).view(kind.newbyteorder())
        return out.astype(np.float32, copy=False)

    @functools.cached_property
    def _plain(self) -> tuple[np.dtype, int] | None:
        """Type and offset of uncompressed, unscaled pixels, or None; astropy's sections take ten times as long."""
        with self._path.open("rb") as file:
            if file.read(6) != b"SIMPLE":
                return None
        with fits.open(self._path, memmap=False) as hdus:
            unit = hdus[self.hdu]
            scaled = unit.header.get("BSCALE", 1) != 1 or unit.header.get("BZERO", 0) or "BLANK" in unit.header
            if scaled or isinstance(unit, fits.CompImageHDU):
                return None
            bits = unit.header["BITPIX"]
            kind = np.dtype(f">{'f' if bits < 0 else 'i' if bits > 8 else 'u'}{abs(bits) // 8}")
            return kind, unit.fileinfo()["datLoc"]

    def close(self) -> None:
        """Close the file; reading opens it again."""
        if self._open is not None:
            self._open[0].close()
            self._open = None


class HeldImage(Image):
    """An image in memory.

    Parameters
    ----------
    data : array_like, (H, W)
        Pixel values; masked ones become NaN.
    header : mapping, optional
    wcs : WCS, optional
        Celestial coordinates; by default the WCS of the header.
    name : str
        Name in messages.

    Raises
    ------
    InputError
        If `data` is not a two-dimensional array of numbers.
    """

    def __init__(
        self, data: ArrayLike, header: Mapping[str, Any] | None = None, wcs: WCS | None = None, name: str = "the array"
    ) -> None:
        with np.errstate(over="ignore"):  # values beyond single precision become infinite
            try:
                held = np.ma.filled(np.ma.asarray(data).astype(np.float32), np.nan)
            except (TypeError, ValueError) as error:
                raise InputError(f"An image is an array of numbers; {name} is not: {first_line(error)}.") from error
        check_shape(name, held.shape, None)
        known = header if isinstance(header, fits.Header) else _header_of(header or {})
        super().__init__(name, known, held.shape, wcs)
        self._held = np.ascontiguousarray(held)

    def identity(self) -> list[Any]:
        """SHA-256 of the pixels."""
        return [hashlib.sha256(self._held.tobytes()).hexdigest()]

    def read(self, window: Window) -> np.ndarray:
        """A copy of the pixels of a window, float32."""
        return self._held[window].copy()


class HeldFile(HeldImage):
    """An image of a file that is read as a whole.

    Without a WCS, its pixel scale is that of the pixel area in PIXAR_SR.

    Parameters
    ----------
    path : Path
    data : ndarray, float, (H, W)
    header : mapping
    name : str, optional
        Name in messages and in the catalogue's header; the path by default.
    """

    def __init__(self, path: Path, data: np.ndarray, header: Mapping[str, Any], name: str | None = None) -> None:
        super().__init__(data, header, name=name or str(path))
        self._path = path
        if self.wcs is None and self.header.get("PIXAR_SR", 0) > 0:
            self.scales = np.full(2, np.sqrt(self.header["PIXAR_SR"] * instrument.STERADIAN))
            self.scale_source = "PIXAR_SR"

    @property
    def path(self) -> Path:
        """The file."""
        return self._path


def _header_of(cards: Mapping[str, Any]) -> fits.Header:
    """A header of the entries of a mapping that fit into FITS cards."""
    out = fits.Header()
    for keyword, value in cards.items():
        if isinstance(value, str | int | float | bool | np.number) and len(keyword) <= 8:
            with suppress(ValueError):
                out[keyword] = value
    return out


@contextmanager
def readable(path: Path | str) -> Iterator[None]:
    """Turn astropy's errors about a damaged file into one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AstropyWarning)
            warnings.filterwarnings("error", message=".*truncated.*", category=AstropyUserWarning)
            yield
    except (InputError, MemoryError, NameError, AssertionError):
        raise  # these are not caused by the file
    except Exception as error:  # astropy and cfitsio raise many types of error for damaged files
        reason = first_line(error)
        reason = reason.partition(" If this is really a FITS file")[0]
        raise InputError(f"{path} is not a readable FITS file, or it is cut short: {reason}") from error


def read_image(
    path: str | Path,
    hdu: int | str | None = None,
    *,
    kind: str = "image",
    band: str = "",
    shape: tuple[int, int] | None = None,
    least: int = LEAST_SIDE,
) -> Image:
    """Read an image from a FITS file, or from an ASDF file of Roman.

    Parameters
    ----------
    path : str or Path
        FITS file, tile-compressed (.fz) and packed (.gz, .bz2, .xz) ones included, or its http, https or
        ftp address; an extension may follow in brackets, ``file.fits[SCI]``. A file at an address
        is downloaded once, into Astropy's cache; `astropy.utils.data.clear_download_cache` empties it.
    hdu : int or str, optional
        Number or name of the extension. By default it is chosen by its name, see
        `sersicnet.image.extensions.choose`.
    kind : str
        What to look for: a key of `sersicnet.image.extensions.WORDS`.
    band : str
        Band of the image that a map belongs to.
    shape : (int, int), optional
        Required height and width (for maps that belong to an image).
    least : int
        Minimum width and height, pixels.

    Returns
    -------
    Image

    Raises
    ------
    InputError
        If there is no such file or extension, it is damaged or cannot be downloaded, or it is not an
        image of two dimensions with finite pixels. Axes of one pixel before them are dropped.
    """
    path, hdu, label = located(path, hdu)
    held = None
    if label.lower().endswith(".asdf"):
        from sersicnet.image import roman

        data, header = roman.read(path, hdu, kind)
        check_shape(label, data.shape, shape, least)
        return HeldFile(path, data, header, label)
    with readable(label), path.open("rb") as file:
        unpacked = _unpacked(file.read(6))
        file.seek(0)
        # The file is opened here because astropy does not close a damaged file.
        with fits.open(file, memmap=False) as hdus:
            chosen = choose(hdus, hdu, kind, label, band, least)
            name = f"{label}[{chosen}]"
            unit = hdus[chosen]
            if not unit.is_image:
                raise InputError(f"{name} is a table, not an image. Choose another extension: give `hdu`.")
            header, found = header_of(unit, hdus[0]), plane_of(unit.shape)
            if not found:
                raise InputError(f"{name} holds no data. Choose another extension: give `hdu`.")
            check_shape(name, found, shape, least)
            size = path.stat().st_size if unpacked is None else _length(path, unpacked)
            least_size = (
                found[0] * found[1] / MOST_COMPRESSION
                if isinstance(unit, fits.CompImageHDU)
                else unit.fileinfo()["datSpan"]
            )
            if size < least_size:
                raise InputError(
                    f"{name} states {found[1]} x {found[0]} pixels, which a file of {size:,} bytes cannot hold: it is "
                    "damaged, cut short, or packed by another program than gzip, bzip2 or xz."
                )
            if unpacked is not None:
                with np.errstate(over="ignore"):
                    held = np.ascontiguousarray(unit.data, dtype=np.float32).reshape(found)
    return FitsImage(path, chosen, header, (found[0], found[1]), held, name)


def located(path: str | Path, hdu: int | str | None = None) -> tuple[Path, int | str | None, str]:
    """The file of a path or an address, the extension in brackets after it, and the name for messages.

    Raises
    ------
    InputError
        If there is no such file, or it cannot be downloaded.
    """
    path = Path(path)
    if hdu is None and not path.exists() and (bracketed := re.fullmatch(r"(.+)\[([^\[\]]+)\]", str(path))):
        path, hdu = Path(bracketed[1]), bracketed[2]
    label = str(path)
    if address := _ADDRESS.match(label):
        label = f"{address[1]}://{label[address.end() :]}"
        path = _downloaded(label)
    if path.is_dir() or not path.exists():
        what = "a directory" if path.is_dir() else "no such file"
        raise InputError(f"An image is a FITS file; {path} is {what}.")
    return path, hdu, label


def _downloaded(address: str) -> Path:
    """The file at an address, in Astropy's cache."""
    from astropy.utils.data import download_file

    try:
        return Path(download_file(address, cache=True, show_progress=False))
    except (OSError, ValueError) as error:
        if isinstance(error, HTTPError):
            error.close()
        raise InputError(
            f"An address of an image can be downloaded; {address} cannot: {first_line(error)}. Check the address, or "
            "download the file and give its path."
        ) from error


def _unpacked(start: bytes) -> Callable[[Path], Any] | None:
    """The function that opens a packed file, which can only be read as a whole, by its first bytes; None for others."""
    if start.startswith(b"\x1f\x8b"):
        return gzip.open
    # Python may be built without these modules, and few files need them.
    if start.startswith(b"BZh"):
        import bz2

        return bz2.open
    if start == b"\xfd7zXZ\x00":
        import lzma

        return lzma.open
    return None


def _length(path: Path, unpacked: Callable[[Path], Any]) -> int:
    """Length of an unpacked file, bytes; the whole file is read, because the checksum of gzip is at the end."""
    length = 0
    with unpacked(path) as whole:
        while part := whole.read(1 << 24):
            length += len(part)
    return length


def read_map(path: str | Path, kind: str, image: Image) -> Image:
    """Read a map that belongs to an image; see `read_image`.

    Parameters
    ----------
    path : str or Path
    kind : str
        One of "rms", "wht", "var" and "mask".
    image : Image
        The image that the map belongs to; both must have the same shape.

    Raises
    ------
    InputError
        As from `read_image`, and if the map is the image itself: that happens where the image's
        file is given and has no extension of that kind.
    """
    found = read_image(path, kind=kind, band=band_of(image.header), shape=image.shape)
    if isinstance(found, FitsImage) and found.is_in(image):
        raise InputError(
            f"A noise map or mask is an image of its own; received {found.name}, the image that it should belong to. "
            f"Name the extension that is {NAMES[kind]}, as in {found.path.name}[{WORDS[kind][0]}]."
        )
    if kind == "mask" and DETECTED_PLANE in found.header:
        warn(
            f"{found.name} has a bit for each of several planes, as Rubin and HSC write masks, and one of them, "
            f"{DETECTED_PLANE}, marks the sources: all pixels that are not zero are ignored, and so are the sources, "
            "unless that bit was taken out. Give a mask of the bad planes alone, such as BAD, SAT and NO_DATA."
        )
    return found


def plane_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without axes of one pixel before the last two."""
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    return shape


def check_shape(name: str, found: tuple[int, ...], shape: tuple[int, int] | None, least: int = LEAST_SIDE) -> None:
    """Refuse an array that is not two-dimensional, is too small, or has not the required shape."""
    if len(found) != 2:
        raise InputError(f"{name} has {len(found)} axes {found}; an image has two. Extract one plane first.")
    if min(found) < least:
        raise InputError(f"{name} is {found[1]} x {found[0]} pixels; an image has at least {least} per side.")
    if shape is not None and found != shape:
        raise InputError(
            f"{name} is {found[1]} x {found[0]} pixels, the image {shape[1]} x {shape[0]}: they must agree."
        )


def header_of(unit: Any, primary: Any = None) -> fits.Header:
    """The readable header of an HDU; zero-point keywords that it lacks are copied from the primary HDU."""
    header = _legible(unit.header)
    first = {} if primary is None else _legible(primary.header)
    for keyword in instrument.KEYWORDS:
        if keyword in first:
            header.setdefault(keyword, first[keyword])
    return header


def _legible(header: fits.Header) -> fits.Header:
    """A copy of a header in which each keyword that is used has one value.

    A damaged card becomes its text, and different values of a repeated keyword become
    "VALUE and VALUE"; functions that need a number refuse both.
    """
    out = header.copy()
    for keyword in (*instrument.KEYWORDS, "SATURATE"):
        values, damaged = [], False
        for i in range(header.count(keyword) if keyword in header else 0):
            try:
                values.append(header[keyword, i])
            except fits.VerifyError:
                values.append(header.cards[keyword, i].image.strip())
                damaged = True
        if damaged or len(set(values)) > 1:
            out.remove(keyword, remove_all=True)
            out[keyword] = " and ".join(dict.fromkeys(str(value) for value in values))
    return out
