"""From a FITS image to detections and stamps.

Pixel coordinates are zero-based everywhere; FITS's one-based values stay inside
this module.
"""

from __future__ import annotations

import functools
import gzip
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from astropy.io import fits
from astropy.utils.exceptions import AstropyUserWarning, AstropyWarning
from astropy.wcs import WCS, FITSFixedWarning, Sip
from astropy.wcs.utils import proj_plane_pixel_area, proj_plane_pixel_scales
from numpy.typing import ArrayLike
from scipy import ndimage

from sersicnet.errors import InputError
from sersicnet.image import header as instrument
from sersicnet.schema import STAMP_SIZE

if TYPE_CHECKING:
    from sersicnet.image.sky import Sky


Window = tuple[slice, slice]
"""Rows and columns of a part of an image; within it, and without steps."""


class Pixels(NamedTuple):
    """A window of an image.

    Attributes
    ----------
    data : ndarray, float32, (H, W)
        Sky included.
    bad : ndarray, bool, (H, W)
        Pixels without data.
    noise : ndarray, float32, (H, W) or None
        Relative noise of the pixels, where the user has a map of it; NaN in `bad` ones.
    """

    data: np.ndarray
    bad: np.ndarray
    noise: np.ndarray | None = None


def grown(window: Window, margin: int, shape: tuple[int, int]) -> Window:
    """A window with a margin around it, as far as the image reaches."""
    rows, columns = (
        slice(max(part.start - margin, 0), min(part.stop + margin, n)) for part, n in zip(window, shape, strict=True)
    )
    return rows, columns


def within(window: Window, outer: Window) -> Window:
    """A window in the pixels of another one that holds it."""
    rows, columns = (slice(part.start - o.start, part.stop - o.start) for part, o in zip(window, outer, strict=True))
    return rows, columns


HUGE = 1e18
"""Value from which on a pixel holds no data; the square of ten times as much is beyond single precision."""

LEAST_SHEAR = 0.1
"""Area of a pixel on the sky over the product of its sides; less is a line, not an area."""

ZERO_BLOCK = 5
"""Side of a block of zeros that tells that an image was not exposed there."""


class Image:
    """A two-dimensional image in a FITS file, read part by part.

    Parameters
    ----------
    path : Path
    hdu : int
        Number of the extension.
    header : fits.Header
    shape : (int, int)
        Height and width.
    held : ndarray, float32, optional
        All pixels, where the file cannot be read in parts.

    Attributes
    ----------
    header : fits.Header
    shape : (int, int)
    wcs : WCS or None
        None where the header has no celestial coordinates.
    name : str
        File and extension, for messages.
    """

    def __init__(
        self, path: Path, hdu: int, header: fits.Header, shape: tuple[int, int], held: np.ndarray | None = None
    ) -> None:
        self.path, self.hdu, self.header, self.shape = path, hdu, header, shape
        self.name = f"{path}[{hdu}]"
        self.wcs = _celestial(header, shape)
        self._held = held
        self._open: tuple[fits.HDUList, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Another process opens the file itself.
        return {**self.__dict__, "_open": None}

    @property
    def whole(self) -> Window:
        """The window of all pixels."""
        return slice(0, self.shape[0]), slice(0, self.shape[1])

    @property
    def is_held(self) -> bool:
        """Whether all of it is in memory, since its file cannot be read in parts."""
        return self._held is not None

    def read(self, window: Window) -> np.ndarray:
        """A part of the image, float32 in native byte order; NaN where the file says so."""
        if self._held is not None:
            return self._held[window].copy()
        with _readable(self.path), np.errstate(over="ignore"):  # beyond single precision is infinite
            if self._plain is not None:
                return self._part(*self._plain, window)
            if self._open is None:
                hdus = fits.open(self.path, memmap=False)  # its sections are read when asked for
                self._open = hdus, hdus[self.hdu].section
            return np.array(self._open[1][window], dtype=np.float32, order="C")

    def _part(self, kind: np.dtype, start: int, window: Window) -> np.ndarray:
        """A part of plain pixels, row by row: half of the time that a map of the file takes."""
        rows, columns = (range(*part.indices(n)) for part, n in zip(window, self.shape, strict=True))
        out = np.empty((len(rows), len(columns)), kind)
        with self.path.open("rb", buffering=0) as file:
            for row, line in zip(rows, out, strict=True):
                file.seek(start + (row * self.shape[1] + columns.start) * kind.itemsize)
                if file.readinto(line) < line.nbytes:
                    raise OSError("it ends before its last pixel")
        if kind.byteorder == ">":
            out = out.byteswap(inplace=True).view(kind.newbyteorder())
        return out.astype(np.float32, copy=False)

    @functools.cached_property
    def _plain(self) -> tuple[np.dtype, int] | None:
        """Type and offset of pixels that can be read as they are: a section of astropy costs ten times as much."""
        with self.path.open("rb") as file:
            if file.read(6) != b"SIMPLE":
                return None
        with fits.open(self.path, memmap=False) as hdus:
            unit = hdus[self.hdu]
            scaled = unit.header.get("BSCALE", 1) != 1 or unit.header.get("BZERO", 0) or "BLANK" in unit.header
            if scaled or isinstance(unit, fits.CompImageHDU):
                return None
            bits = unit.header["BITPIX"]
            kind = np.dtype(f">{'f' if bits < 0 else 'i' if bits > 8 else 'u'}{abs(bits) // 8}")
            return kind, unit.fileinfo()["datLoc"]

    def close(self) -> None:
        """Close the file; it is opened again when something is read."""
        if self._open is not None:
            self._open[0].close()
            self._open = None

    @functools.cached_property
    def data(self) -> np.ndarray:
        """All of the image, float32, (H, W)."""
        data = self.read(self.whole)
        self.close()
        if not np.isfinite(data).any():
            raise InputError(f"{self.name} has no finite pixel.")
        return data

    def without_data(self) -> np.ndarray:
        """Pixels of all of the image that hold no data, bool, (H, W); see `without_data`."""
        return without_data(self.data)

    @functools.cached_property
    def scales(self) -> np.ndarray | None:
        """Size of a pixel along both axes, arcsec."""
        return None if self.wcs is None else proj_plane_pixel_scales(self.wcs) * 3600

    def sky(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Right ascension and declination (ICRS, degrees) of zero-based pixels."""
        assert self.wcs is not None
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
            Degrees east of north (ICRS) there, from 0 to below 180; NaN where an input is.
        """
        x, y, theta = (np.asarray(values, dtype=float) for values in (x, y, theta))
        ahead = np.cos(np.radians(theta)), np.sin(np.radians(theta))
        here, before, after = (
            np.radians(self.sky(x + step * ahead[0], y + step * ahead[1])) for step in (0.0, -0.5, 0.5)
        )
        # As vectors, for right ascensions jump at 0 and crowd at the poles.
        (x0, y0, z0), (x1, y1, z1) = (
            (np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)) for ra, dec in (before, after)
        )
        dx, dy, dz = x1 - x0, y1 - y0, z1 - z0
        ra, dec = here
        east = dy * np.cos(ra) - dx * np.sin(ra)
        north = dz * np.cos(dec) - (dx * np.cos(ra) + dy * np.sin(ra)) * np.sin(dec)
        angle = np.degrees(np.arctan2(east, north)) % 180
        return np.where(angle < 180, angle, np.where(np.isnan(angle), np.nan, 0.0))

    def pixels(self, ra: ArrayLike, dec: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Zero-based pixels of ICRS coordinates in degrees."""
        from astropy.coordinates import SkyCoord

        if self.wcs is None:
            raise InputError(f"{self.name} has no celestial WCS, so ra and dec have no place in it. Give x and y.")
        ra, dec = np.asarray(ra, dtype=float), np.asarray(dec, dtype=float)
        dec = np.where(np.abs(dec) <= 90, dec, np.nan)  # such as -99 for unknown
        x, y = self.wcs.world_to_pixel(SkyCoord(ra, dec, unit="deg"))
        return np.asarray(x), np.asarray(y)


def without_data(data: np.ndarray) -> np.ndarray:
    """Pixels that hold no data, bool, (H, W).

    Those that are not finite or beyond `HUGE`, and zeros of blocks of 5 x 5, with
    the zeros within five pixels of them: drizzled mosaics are 0 outside of their
    footprint. Other zeros are data; quantised images are full of them. Whether a
    pixel holds data depends on nothing that is farther than 10 pixels away.
    """
    if data.size and data.min() > -HUGE and data.max() < HUGE:  # not so with a NaN; two looks, and no copy
        bad = np.zeros(data.shape, bool)
    else:
        bad = ~(np.abs(data) < HUGE)
    zero = data == 0
    if _has_block(zero):
        blocks = ndimage.binary_opening(zero, np.ones((ZERO_BLOCK, ZERO_BLOCK)))
        bad |= ndimage.binary_dilation(blocks, np.ones((3, 3)), ZERO_BLOCK, mask=zero)
    return bad


def _has_block(zero: np.ndarray) -> bool:
    """Whether there is any block of 5 x 5; most images have none, and to look for them takes longer than this."""
    if not zero[::ZERO_BLOCK, ::ZERO_BLOCK].any():  # each block has one of these
        return False
    for axis in (0, 1):
        parts = np.moveaxis(zero, axis, 0)
        n = len(parts) - ZERO_BLOCK + 1
        if n < 1 or not zero.any():
            return False
        zero = np.moveaxis(functools.reduce(np.logical_and, (parts[k : k + n] for k in range(ZERO_BLOCK))), 0, axis)
    return bool(zero.any())


ZERO_REACH = 2 * ZERO_BLOCK
"""Pixels around a pixel that tell whether it holds data."""


class Exposure(NamedTuple):
    """An image with the maps that belong to it, read window by window.

    Attributes
    ----------
    image : Image
    noise : Image or None
        Of the same shape.
    kind : str
        What `noise` holds: "rms", "var" (variance) or "wht" (inverse variance), in any
        unit.
    mask : Image or None
        Of the same shape; pixels that are not zero are ignored.
    """

    image: Image
    noise: Image | None = None
    kind: str = "rms"
    mask: Image | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.shape

    @property
    def images(self) -> list[Image]:
        """The image and its maps, as far as there are any."""
        return [image for image in (self.image, self.noise, self.mask) if image is not None]

    def read(self, window: Window) -> Pixels:
        """The pixels of a window. What is not finite, unexposed, masked, or has no noise, is bad."""
        wide = grown(window, ZERO_REACH, self.shape)
        inner = within(window, wide)
        data = self.image.read(wide)
        bad = without_data(data)[inner]
        data = np.ascontiguousarray(data[inner])
        noise = None
        if self.noise is not None:
            noise = self.noise.read(window)
            with np.errstate(invalid="ignore", divide="ignore"):
                good = np.isfinite(noise) & (noise > 0)
                bad |= ~good
                noise = {"rms": noise, "var": np.sqrt(noise), "wht": 1 / np.sqrt(noise)}[self.kind]
            noise = np.where(good, noise, np.nan).astype(np.float32)
        if self.mask is not None:
            bad |= self.mask.read(window) != 0
        return Pixels(data, bad, noise)

    def close(self) -> None:
        """Close all files."""
        for image in self.images:
            image.close()


MOST_RESAMPLING = 10.0
"""Largest change of the pixel scale, up or down."""

MISSING = 1e-3
"""Fraction of a resampled pixel's area without data from which on it has none. What is missing is missing light, of the
sky too, and this much is far below the noise; the overlaps' rounding errors are farther below."""


@dataclass(frozen=True)
class Resampled:
    """An exposure on a grid of another pixel scale, read window by window.

    The first corner and the axes stay. A pixel of the image is a box of even
    brightness, and each new pixel sums the boxes by the area that it shares with them.
    Light is kept, so that one unit of a new pixel is the same flux as one unit of an old
    one: the zero point of the image holds. This is also so for an image in surface
    brightness, whose values are taken as flux in units of MJy/sr times the area of an
    old pixel.

    Both boxes widen what is in the image: in old pixels, the variance of a PSF along
    each axis grows by (1 + 1 / factor**2) / 12, and by |1 - 1 / factor**2| / 12 where one
    pixel scale is a multiple of the other. The noise of neighbouring pixels becomes
    correlated, or more so.

    Attributes
    ----------
    exposure : Exposure
    factor : float
        Old pixel scale over the new one: new pixels along an old one.

    Raises
    ------
    InputError
        If the factor is not from 0.1 to 10.
    """

    exposure: Exposure
    factor: float

    def __post_init__(self) -> None:
        if not 1 / MOST_RESAMPLING <= self.factor <= MOST_RESAMPLING:
            raise InputError(
                f"Resampling changes a pixel scale by a factor of up to {MOST_RESAMPLING:g}; received {self.factor:g}. "
                "Bin or interpolate the image by other means first."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width; the last row and column may reach beyond the image."""
        height, width = (int(np.ceil(n * self.factor - MISSING)) for n in self.exposure.shape)
        return height, width

    def to_grid(self, old: ArrayLike) -> np.ndarray:
        """Zero-based pixels of the grid along either axis, of those of the image."""
        return (np.asarray(old) + 0.5) * self.factor - 0.5

    def from_grid(self, new: ArrayLike) -> np.ndarray:
        """Zero-based pixels of the image along either axis, of those of the grid."""
        return (np.asarray(new) + 0.5) / self.factor - 0.5

    @property
    def wcs(self) -> WCS | None:
        """Celestial coordinates of the grid; None where the image has none."""
        if self.exposure.image.wcs is None:
            return None
        out = self.exposure.image.wcs.deepcopy()
        out.wcs.crpix = self.to_grid(out.wcs.crpix - 1) + 1
        if out.wcs.has_cd():
            out.wcs.cd = out.wcs.cd / self.factor
        else:
            out.wcs.cdelt = out.wcs.cdelt / self.factor
        if out.sip is not None:
            sip = out.sip
            planes = [None if plane is None else self._sip(plane) for plane in (sip.a, sip.b, sip.ap, sip.bp)]
            out.sip = Sip(*planes, self.to_grid(sip.crpix - 1) + 1)
        out.pixel_shape = self.shape[::-1]
        out.wcs.set()
        return out

    def _sip(self, coefficients: np.ndarray) -> np.ndarray:
        """Coefficients of a distortion, by powers of offsets in pixels of the grid."""
        powers = np.add.outer(*[np.arange(n) for n in coefficients.shape])
        return coefficients * self.factor ** (1.0 - powers)

    @property
    def header(self) -> fits.Header:
        """The image's header with the grid's WCS, and values per pixel as they are on the grid.

        In place of a surface brightness stands the zero point of the flux in an old pixel.
        """
        header = self.exposure.image.header.copy()
        for keyword in list(header):
            if _WCS_CARD.fullmatch(keyword) or re.fullmatch(r"[AB]P?_(\d_\d|ORDER|DMAX)", keyword):
                header.remove(keyword, ignore_missing=True, remove_all=True)
        if self.wcs is not None:
            header.update(self.wcs.to_header(relax=True))
        if isinstance(header.get("SATURATE"), float | int):
            header["SATURATE"] /= self.factor**2
        if "/sr" in str(header.get("BUNIT", "")).lower():
            with suppress(InputError):  # the user knows it then
                header["MAGZERO"] = instrument.zero_point(self.exposure.image.header).value
            for keyword in ("BUNIT", "PHOTFLAM", "PHOTPLAM", "FLUXMAG0"):
                header.remove(keyword, ignore_missing=True)
        return header

    def read(self, window: Window) -> Pixels:
        """The pixels of a window, the same whatever the window; those without data are NaN.

        The noise of old pixels counts as independent.
        """
        taps = [self._taps(part, n) for part, n in zip(window, self.exposure.shape, strict=True)]
        rows, columns = (slice(int(index.min()), int(index.max()) + 1) for index, _ in taps)
        data, bad, noise = self.exposure.read((rows, columns))
        inner = [(index - part.start, weight) for (index, weight), part in zip(taps, (rows, columns), strict=True)]
        missing = 1 - _summed(~bad, inner, 1) * self.factor**2
        gone = missing > MISSING
        out = np.where(gone, np.nan, _summed(np.where(bad, 0, data), inner, 1)).astype(np.float32)
        if noise is None:
            return Pixels(out, gone)
        # A variance may be beyond single precision where its root is not.
        variance = _summed(np.where(bad, 0, noise).astype(float) ** 2, inner, 2)
        return Pixels(out, gone, np.where(gone, np.nan, np.sqrt(variance)).astype(np.float32))

    def _taps(self, part: slice, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The old pixels along an axis that new ones overlap, and the shares of them that they get, (K, N)."""
        new = np.arange(part.start, part.stop)
        low, high = new / self.factor, (new + 1) / self.factor
        old = np.floor(low).astype(int) + np.arange(int(np.ceil(1 / self.factor)) + 1)[:, None]
        share = np.maximum(np.minimum(high, old + 1) - np.maximum(low, old), 0)
        return np.minimum(old, n - 1), np.where(old < n, share, 0.0)

    def close(self) -> None:
        """Close all files."""
        self.exposure.close()


def _summed(values: np.ndarray, taps: list[tuple[np.ndarray, np.ndarray]], power: int) -> np.ndarray:
    """Sums of pixels by their shares to a power along y and x, float64, term by term: the same in every window."""
    for axis, (indices, shares) in enumerate(taps):
        form = (-1, 1) if axis == 0 else (1, -1)
        total = np.zeros(1)
        for index, share in zip(indices, shares, strict=True):
            total = total + (share**power).reshape(form) * np.take(values, index, axis)
        values = total
    return values


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what astropy says of a damaged file into one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AstropyWarning)
            warnings.filterwarnings("error", message=".*truncated.*", category=AstropyUserWarning)
            yield
    except InputError:
        raise
    except Exception as error:  # astropy and cfitsio raise nearly anything on damage
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = reason.partition(" If this is really a FITS file")[0]
        raise InputError(f"{path} is not a readable FITS file, or it is cut short: {reason}") from error


def read_image(
    path: str | Path,
    hdu: int | str | None = None,
    *,
    prefer: tuple[str, ...] = ("SCI",),
    shape: tuple[int, int] | None = None,
    least: int = 16,
) -> Image:
    """Read an image from a FITS file.

    Parameters
    ----------
    path : str or Path
        FITS file, also compressed by tiles (.fz) or whole (.gz); an extension
        may stand behind it in brackets, ``file.fits[SCI]``.
    hdu : int or str, optional
        Number or name of the extension. By default the one with a name in
        `prefer`, else the first that holds an image.
    prefer : tuple of str
        Names of extensions to look for.
    shape : (int, int), optional
        Height and width that it must have (for maps that belong to an image).
    least : int
        Pixels that it must have a side.

    Returns
    -------
    Image

    Raises
    ------
    InputError
        If there is no such file or extension, it is damaged, or it is not an
        image of two dimensions with finite pixels.
    """
    path = Path(path)
    if hdu is None and not path.exists() and (bracketed := re.fullmatch(r"(.+)\[([^\[\]]+)\]", str(path))):
        path, hdu = Path(bracketed[1]), bracketed[2]
    if path.is_dir() or not path.exists():
        what = "a directory" if path.is_dir() else "no such file"
        raise InputError(f"An image is a FITS file; {path} is {what}.")
    held = None
    with _readable(path), path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        # Opened here, for astropy leaves a damaged file open.
        with fits.open(file, memmap=False) as hdus:
            chosen = _choose(hdus, hdu, prefer, path)
            name = f"{path}[{chosen}]"
            unit = hdus[chosen]
            if not unit.is_image:
                raise InputError(f"{name} is a table, not an image. Choose another extension with --hdu.")
            header, primary = _legible(unit.header), _legible(hdus[0].header)
            for keyword in instrument.KEYWORDS:
                if keyword in primary:
                    header.setdefault(keyword, primary[keyword])
            found = unit.shape
            if not found:
                raise InputError(f"{name} holds no data. Choose another extension with --hdu.")
            if len(found) != 2:
                raise InputError(f"{name} has {len(found)} axes {found}; an image has two. Extract one plane first.")
            if min(found) < least:
                raise InputError(f"{name} is {found[1]} x {found[0]} pixels; an image has at least {least} a side.")
            if shape is not None and found != shape:
                raise InputError(
                    f"{name} is {found[1]} x {found[0]} pixels, the image {shape[1]} x {shape[0]}: they must agree."
                )
            if compressed:
                with np.errstate(over="ignore"):
                    held = np.ascontiguousarray(unit.data, dtype=np.float32)
                with gzip.open(path) as whole:
                    while whole.read(1 << 24):
                        pass  # the checksum stands at the end
    return Image(path, chosen, header, found, held)


MAPS = {
    "rms": ("RMS", "ERR"),
    "wht": ("WHT", "IVM"),
    "var": ("VAR", "VARIANCE"),
    "mask": ("MASK", "DQ"),
}
"""Extensions that hold each kind of map, where a file has several."""


def read_map(path: str | Path, kind: str, image: Image) -> Image:
    """Read a map that belongs to an image; see `read_image`.

    Parameters
    ----------
    path : str or Path
    kind : str
        One of `MAPS`.
    image : Image
        What it belongs to, of the same shape.

    Raises
    ------
    InputError
        As from `read_image`, and if it is the image itself, which is what a file without
        an extension of that kind begins with.
    """
    found = read_image(path, prefer=MAPS[kind], shape=image.shape)
    if found.hdu == image.hdu and found.path.samefile(image.path):
        raise InputError(
            f"--{kind} needs a map of its own; received {found.name}, the image itself. "
            f"Name the extension of the map, as in {found.path.name}[{MAPS[kind][0]}]."
        )
    return found


def _choose(hdus: fits.HDUList, hdu: int | str | None, prefer: tuple[str, ...], path: Path) -> int:
    if hdu is not None:
        key: int | str = int(hdu) if str(hdu).lstrip("-").isdigit() else str(hdu)
        try:
            return hdus.index_of(key) if isinstance(key, str) else range(len(hdus))[key]
        except (KeyError, IndexError) as error:
            names = ", ".join(f"{i} {unit.name}".strip() for i, unit in enumerate(hdus))
            raise InputError(f"{path} has no extension {hdu}; it has {names}.") from error
    for name in prefer:
        if name in hdus:
            return int(hdus.index_of(name))
    for i, unit in enumerate(hdus):
        if unit.is_image and unit.header.get("NAXIS", 0) > 0:
            return i
    raise InputError(f"{path} holds no image, only {', '.join(type(unit).__name__ for unit in hdus)}.")


def _legible(header: fits.Header) -> fits.Header:
    """A copy of a header in which all that is read of it has one value.

    What is damaged, or stands there twice with different values, becomes a text that
    tells so; whoever needs a number then refuses it.
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


_WCS_CARD = re.compile(r"(CTYPE|CRVAL|CRPIX|CDELT|CUNIT|CROTA)\d|(CD|PC)\d_\d|LONPOLE|LATPOLE|RADESYS|EQUINOX")
_WCS_NUMBER = re.compile(r"(CRVAL|CRPIX|CDELT|CROTA)\d|(CD|PC)\d_\d|LONPOLE|LATPOLE")


def _celestial(header: fits.Header, shape: tuple[int, int]) -> WCS | None:
    """The celestial WCS of a header; None where there is none, or it does not lead from pixels to the sky and back."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", FITSFixedWarning)
        warnings.simplefilter("ignore", AstropyWarning)
        try:
            # wcslib takes its defaults for what it cannot read, and those look right.
            cards = {keyword: header[keyword] for keyword in header if _WCS_CARD.fullmatch(keyword)}
            numbers = [value for keyword, value in cards.items() if _WCS_NUMBER.fullmatch(keyword)]
            if not np.isfinite(numbers).all():
                return None
            wcs = WCS(header, naxis=2)
            if not (wcs.has_celestial and wcs.pixel_n_dim == 2) or np.abs(wcs.wcs.crval).max() > 360:
                return None
            middle = (shape[1] - 1) / 2, (shape[0] - 1) / 2
            there_and_back = wcs.world_to_pixel(wcs.pixel_to_world(*middle).icrs)
            shear = proj_plane_pixel_area(wcs) / np.prod(proj_plane_pixel_scales(wcs))
        except Exception:  # wcslib raises several kinds of its own; all mean: no usable WCS
            return None
    return wcs if np.hypot(*np.subtract(there_and_back, middle)) < 0.1 and shear > LEAST_SHEAR else None


def median(values: np.ndarray) -> np.floating:
    """`numpy.median` of finite values, in a fifth of the time: one partition is much faster than those about two."""
    half = len(values) // 2
    ordered = np.partition(values, half)
    middle = ordered[half : half + 1]
    if len(values) % 2 == 0:
        middle = np.append(ordered[:half].max(), middle)
    return middle.mean()


@dataclass
class Stamps:
    """Stamps of an image, cleaned for a network.

    Attributes
    ----------
    pixels : ndarray, float32, (N, 128, 128)
        Sky subtracted, in units of `rms`; neighbours and bad pixels replaced.
    replaced : ndarray, bool, (N, 128, 128)
        Which pixels were replaced.
    x, y : ndarray, float64, (N,)
        Positions of the sources in their stamps, zero-based.
    rms : ndarray, float64, (N,)
        Noise of a blank pixel around each source, image units.
    noise : ndarray, float32, (N, 128, 128)
        Noise of a blank pixel, image units; NaN without data.
    edge : ndarray, bool, (N,)
        Whether the stamp reaches beyond the image.
    unusable : ndarray, float64, (N,)
        Fraction of pixels masked, not finite or outside.
    neighbours : ndarray, float64, (N,)
        Fraction of pixels that belong to other sources.
    empty : ndarray, bool, (N,)
        Whether none of the central 5 x 5 pixels can be used.
    """

    pixels: np.ndarray
    replaced: np.ndarray
    x: np.ndarray
    y: np.ndarray
    rms: np.ndarray
    noise: np.ndarray
    edge: np.ndarray
    unusable: np.ndarray
    neighbours: np.ndarray
    empty: np.ndarray


def cut(
    data: np.ndarray,
    bad: np.ndarray,
    sky: Sky,
    x: np.ndarray,
    y: np.ndarray,
    claimed: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    origin: tuple[int, int] = (0, 0),
) -> Stamps:
    """Cut stamps about positions.

    A source comes to lie in (63, 64] on both axes, as in the simulations. Pixels
    of neighbours, and pixels without data, take the value of the pixel opposite
    to them through the centre of the source, since galaxies are nearly
    symmetric; where that one cannot be used either, the sky's.

    Parameters
    ----------
    data : ndarray, float32, (H, W)
        Image, sky included.
    bad : ndarray, bool, (H, W)
    sky : Sky
    x, y : ndarray, float, (N,)
        Zero-based positions; may lie outside, or be NaN.
    claimed : ndarray, int, (H, W), optional
        Which source each pixel belongs to, see `Detections.claimed`; 0 is sky.
    labels : ndarray, int, (N,) or (N, M), optional
        The source's own label at each position, 0 for none; or several, of
        sources that stay in its stamp.
    origin : (int, int)
        x and y of the first pixel of the arrays, where they are a window of the image
        that positions refer to.

    Returns
    -------
    Stamps
    """
    n, size = len(x), STAMP_SIZE
    out = Stamps(
        np.zeros((n, size, size), np.float32),
        np.ones((n, size, size), bool),
        np.full(n, np.nan),
        np.full(n, np.nan),
        np.full(n, np.nan),
        np.full((n, size, size), np.nan, np.float32),
        np.ones(n, bool),
        np.ones(n),
        np.zeros(n),
        np.ones(n, bool),
    )
    middle = slice(size // 2 - 3, size // 2 + 2)
    for i in range(n):
        if not (np.isfinite(x[i]) and np.isfinite(y[i])):
            continue
        corner = math.ceil(y[i] - origin[1] - size / 2), math.ceil(x[i] - origin[0] - size / 2)
        image_part, stamp_part = _overlap(corner, data.shape)
        if image_part[0].start >= image_part[0].stop or image_part[1].start >= image_part[1].stop:
            continue
        values, noise = out.pixels[i], sky.rms[image_part]
        np.subtract(data[image_part], sky.level[image_part], out=values[stamp_part])
        replaced = bad[image_part].copy()
        lost = np.count_nonzero(replaced)
        if claimed is not None:
            there = claimed[image_part]
            other = there != 0
            for own in np.atleast_1d(labels[i]) if labels is not None else ():
                other &= there != own
            replaced |= other
        out.replaced[i][stamp_part] = replaced
        out.noise[i][stamp_part] = noise
        some = noise[::_NOISE_STEP, ::_NOISE_STEP]
        some = some[np.isfinite(some)]
        if not len(some):
            some = noise[np.isfinite(noise)]
        out.rms[i] = median(some) if len(some) else np.nan
        out.edge[i] = noise.size < size * size
        out.unusable[i] = 1 - (noise.size - lost) / size**2
        out.neighbours[i] = (np.count_nonzero(replaced) - lost) / size**2
        usable = np.zeros((size, size), bool)
        usable[stamp_part] = ~bad[image_part]
        out.empty[i] = not usable[middle, middle].any()
        out.x[i] = x[i] - (origin[0] + corner[1])
        out.y[i] = y[i] - (origin[1] + corner[0])
        _fill(values, out.replaced[i], (out.x[i], out.y[i]))
        values /= out.rms[i]
    return out


_NOISE_STEP = 4
"""The noise of a stamp is the median of that of every so many rows and columns."""


def _overlap(corner: tuple[int, int], shape: tuple[int, int]) -> tuple[Window, Window]:
    """Where a stamp with that first pixel lies in an image, and that part in the stamp; empty where they are apart."""
    image, stamp = [], []
    for first, n in zip(corner, shape, strict=True):
        low, high = min(max(first, 0), n), max(min(first + STAMP_SIZE, n), 0)
        image.append(slice(low, high))
        stamp.append(slice(low - first, high - first))
    return (image[0], image[1]), (stamp[0], stamp[1])


def _fill(values: np.ndarray, replaced: np.ndarray, centre: tuple[float, float]) -> None:
    """Replace pixels by their opposites through the centre, in place."""
    if not replaced.any():
        return
    rows, cols = np.nonzero(replaced)
    opposite_rows = np.rint(2 * centre[1] - rows).astype(int)
    opposite_cols = np.rint(2 * centre[0] - cols).astype(int)
    inside = (opposite_rows >= 0) & (opposite_rows < len(values))
    inside &= (opposite_cols >= 0) & (opposite_cols < len(values))
    opposite_rows, opposite_cols = np.where(inside, opposite_rows, 0), np.where(inside, opposite_cols, 0)
    usable = inside & ~replaced[opposite_rows, opposite_cols]
    values[rows, cols] = np.where(usable, values[opposite_rows, opposite_cols], 0)
