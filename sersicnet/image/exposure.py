"""An image with its maps, zero point, pixel scale and saturation level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS
from numpy.typing import ArrayLike

from sersicnet.errors import InputError, warn
from sersicnet.image import header as headers
from sersicnet.image.extensions import choose
from sersicnet.image.header import Reading
from sersicnet.image.mosaic import HeldImage, Image, header_of, plane_of, read_image, read_map
from sersicnet.image.pixels import ABSURD, ZERO_REACH, Pixels, Window, grown, within, without_data

NOISE_KINDS = ("rms", "wht", "var")
"""Kinds of noise map: the rms noise, the inverse variance, the variance."""

NOISE_INCLUDES = ("sky", "total")
"""What a noise map includes: the noise of blank pixels, or the photon noise of the sources, too."""

_UNKNOWN = Reading(float("nan"), "none")

_UNCERTAINTIES = {"std": "rms", "var": "var", "ivar": "wht"}
"""Kind of noise map for each type of uncertainty of astropy's NDData."""


@dataclass(frozen=True, eq=False)
class Exposure:
    """An image with its maps, its zero point and its pixel scale, read window by window.

    Use `open`, `of_arrays` or `of` to make one.

    Attributes
    ----------
    image : Image
    zero_point : Reading
        AB magnitude of one image unit, and its source.
    pixel_scale : Reading
        Arcsec per pixel, and its source; NaN if it is not known.
    noise : Image or None
        Noise map of the same shape, in any unit: it is scaled to the scatter of blank pixels, unless
        `noise_as_given`.
        Pixels that are not finite or not positive have no data.
    noise_kind : {"rms", "wht", "var"}
        Kind of `noise`: the rms noise, the inverse variance, or the variance.
    mask : Image or None
        Mask of the same shape; pixels that are not zero are ignored.
    saturation : float
        Saturation level, image units: a pixel at or above it is saturated. Infinite if it is not known.
    noise_includes : {"sky", "total"} or None
        What `noise` includes: the noise of blank pixels ("sky"), or the photon noise of sources, too
        ("total"), which fits then do not add. None if the user has not stated it: as for "sky".
    noise_as_given : bool
        Whether `noise` is in image units and is not scaled.
    """

    image: Image
    zero_point: Reading = _UNKNOWN
    pixel_scale: Reading = _UNKNOWN
    noise: Image | None = None
    noise_kind: str = "rms"
    mask: Image | None = None
    saturation: float = np.inf
    noise_includes: str | None = None
    noise_as_given: bool = False

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        hdu: int | str | None = None,
        noise: str | Path | None = None,
        noise_kind: str = "rms",
        noise_includes: str | None = None,
        noise_as_given: bool = False,
        mask: str | Path | None = None,
        zero_point: float | None = None,
        pixel_scale: float | None = None,
    ) -> Exposure:
        """Open an image in a FITS file, or in an ASDF file of Roman; pixels are read on demand.

        Parameters
        ----------
        path : str or Path
            FITS file or its http, https or ftp address, see `sersicnet.image.mosaic.read_image`; an extension may
            follow in brackets.
        hdu : int or str, optional
            Number or name of the extension; SCI, or else the first image that no name makes a map, by default.
        noise : str or Path, optional
            FITS file of the noise map. If it has several extensions, EXTNAME or IMAGETYP chooses the map: RMS or ERR
            for an rms map, WHT, IVM or INVVAR for an inverse-variance map, VAR for a variance map, in the BAND of the
            image; otherwise it is the first image without such a name. ``file.fits[NAME]`` chooses another.
        noise_kind : {"rms", "wht", "var"}
            Kind of noise map.
        noise_includes : {"sky", "total"}, optional
            What the noise map includes: the noise of blank pixels, or the photon noise of sources, too.
        noise_as_given : bool
            Whether to take the noise map as it is, instead of scaling it to the scatter of blank pixels.
        mask : str or Path, optional
            FITS file of the mask; the default extension is MASK or DQ, chosen like a noise map.
        zero_point, pixel_scale : float, optional
            AB magnitude of one image unit, and arcsec per pixel; from the header by default.

        Raises
        ------
        InputError
            If a file cannot be used, or the zero point is not known.
        """
        _check_kind(noise_kind)
        _check_maps(noise, mask, in_memory=False)
        image = read_image(path, hdu)
        return cls._assembled(
            image,
            None if noise is None else read_map(noise, noise_kind, image),
            noise_kind,
            None if mask is None else read_map(mask, "mask", image),
            zero_point,
            pixel_scale,
            noise_includes,
            noise_as_given,
        )

    @classmethod
    def of_arrays(
        cls,
        data: ArrayLike,
        *,
        noise: ArrayLike | None = None,
        noise_kind: str = "rms",
        noise_includes: str | None = None,
        noise_as_given: bool = False,
        mask: ArrayLike | None = None,
        wcs: WCS | None = None,
        header: Mapping[str, Any] | None = None,
        zero_point: float | None = None,
        pixel_scale: float | None = None,
        name: str = "the array",
    ) -> Exposure:
        """Make an exposure from arrays in memory.

        Parameters
        ----------
        data : array_like, float, (H, W)
            Image, sky-subtracted or not, in any linear unit; masked pixels have no data.
        noise : array_like, float, (H, W), optional
            Noise map, in any unit.
        noise_kind : {"rms", "wht", "var"}
            Kind of noise map.
        noise_includes, noise_as_given
            As for `open`.
        mask : array_like, (H, W), optional
            Pixels that are not zero are ignored.
        wcs : WCS, optional
            Celestial coordinates; by default the WCS of `header`.
        header : mapping, optional
            FITS header, or a mapping of its keywords; the zero point may be read from it.
        zero_point, pixel_scale : float, optional
            AB magnitude of one image unit, and arcsec per pixel; from header and WCS by default.
        name : str
            Name in messages and in the catalogue's header.

        Raises
        ------
        InputError
            If an array cannot be used, or the zero point is not known.
        """
        _check_maps(noise, mask, in_memory=True)
        image = HeldImage(data, header, wcs, name)
        maps = []
        for values, what in ((noise, "the noise map"), (mask, "the mask")):
            one = None if values is None else HeldImage(values, name=what)
            if one is not None and one.shape != image.shape:
                raise InputError(f"{what} has the shape {one.shape}, the image {image.shape}: they must agree.")
            maps.append(one)
        return cls._assembled(
            image, maps[0], noise_kind, maps[1], zero_point, pixel_scale, noise_includes, noise_as_given
        )

    @classmethod
    def of(cls, source: Any, **options: Any) -> Exposure:
        """Make an exposure from a path, an HDU, an NDData or an array.

        Parameters
        ----------
        source : Exposure, str, Path, HDUList, HDU, NDData, CCDData or array_like
            The mask, uncertainty, WCS and header of an NDData are used unless `options` replace them.
        **options
            Options of `open` if `source` is a path, otherwise of `of_arrays`; ``hdu`` chooses an HDU of an HDUList.
        """
        if isinstance(source, cls):
            if options:
                raise InputError(f"An exposure is complete; received {', '.join(options)} with it.")
            return source
        if isinstance(source, str | Path):
            return cls.open(source, **options)
        if isinstance(source, fits.HDUList):
            name = source.filename() or "the HDU list"
            number = choose(source, options.pop("hdu", None), "image", name)
            options = {"header": header_of(source[number], source[0]), "name": f"{name}[{number}]", **options}
            return cls.of_arrays(_pixels(source[number], options["name"]), **options)
        if hasattr(source, "header") and hasattr(source, "is_image"):
            options = {"header": header_of(source), "name": source.name or "the HDU", **options}
            return cls.of_arrays(_pixels(source, options["name"]), **options)
        from astropy.nddata import NDData  # this import takes 0.1 s, and files do not need it

        if isinstance(source, NDData):
            return cls.of_arrays(source.data, **{**_of_nddata(source), **options})
        return cls.of_arrays(source, **options)

    @classmethod
    def _assembled(
        cls,
        image: Image,
        noise: Image | None,
        noise_kind: str,
        mask: Image | None,
        zero_point: float | None,
        pixel_scale: float | None,
        noise_includes: str | None,
        noise_as_given: bool,
    ) -> Exposure:
        _check_kind(noise_kind)
        image.check_wcs(pixel_scale)
        if noise_includes is not None and noise_includes not in NOISE_INCLUDES:
            raise InputError(f"`noise_includes` is one of {', '.join(NOISE_INCLUDES)}; received {noise_includes}.")
        if noise is None and (noise_includes is not None or noise_as_given):
            stated = "noise_as_given" if noise_includes is None else "noise_includes"
            raise InputError(f"`{stated}` describes a noise map: give `noise` with it.")
        zero = headers.zero_point(image.header, zero_point, image.scales)
        scale = headers.pixel_scale(image.scales, pixel_scale, image.elongation)
        if scale.source == "WCS":
            scale = scale._replace(source=image.scale_source)
        return cls(
            image, zero, scale, noise, noise_kind, mask, _saturation(image), noise_includes, bool(noise_as_given)
        )

    def __repr__(self) -> str:
        height, width = self.shape
        maps = [f"noise={self.noise_kind}"] * (self.noise is not None) + ["mask"] * (self.mask is not None)
        facts = [
            f"{self.name}: {width} x {height} pixels",
            f"zero point {self.zero_point.value:.4f} ({self.zero_point.source})",
            f"{self.pixel_scale.value:.4g} arcsec per pixel ({self.pixel_scale.source})",
            *maps,
        ]
        return f"<Exposure {', '.join(facts)}>"

    @property
    def name(self) -> str:
        """File and extension, or the name of an image in memory."""
        return self.image.name

    @property
    def wcs(self) -> WCS | None:
        """Celestial coordinates; None where there are none."""
        return self.image.wcs

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.shape

    @property
    def images(self) -> list[Image]:
        """The image and its maps, if there are any."""
        return [image for image in (self.image, self.noise, self.mask) if image is not None]

    def read(self, window: Window) -> Pixels:
        """The pixels of a window. Pixels that are not finite, unexposed, masked or without a noise are bad."""
        wide = grown(window, ZERO_REACH, self.shape)
        inner = within(window, wide)
        data = self.image.read(wide)
        bad = without_data(data)[inner]
        data = np.ascontiguousarray(data[inner])
        np.copyto(data, np.nan, where=np.isnan(data))  # random bytes may be signalling NaN, of which NumPy warns
        noise = None
        if self.noise is not None:
            noise = self.noise.read(window)
            with np.errstate(all="ignore"):
                noise = {"rms": noise, "var": np.sqrt(noise), "wht": 1 / np.sqrt(noise)}[self.noise_kind]
                good = (noise > 1 / ABSURD) & (noise < ABSURD)
                bad |= ~good
            noise = np.where(good, noise, np.nan).astype(np.float32)
        if self.mask is not None:
            bad |= self.mask.read(window) != 0
        return Pixels(data, bad, noise)

    @property
    def factor(self) -> float:
        """Number of pixels of the measured grid along a pixel of the image: 1, because the image itself is measured."""
        return 1.0

    def to_grid(self, pixels: np.ndarray) -> np.ndarray:
        """Convert zero-based pixels of the image to pixels of the measured grid, which are the same."""
        return pixels

    def from_grid(self, pixels: np.ndarray) -> np.ndarray:
        """Convert zero-based pixels of the measured grid to pixels of the image, which are the same."""
        return pixels

    def close(self) -> None:
        """Close all files."""
        for image in self.images:
            image.close()


def _check_kind(noise_kind: str) -> None:
    if noise_kind not in NOISE_KINDS:
        raise InputError(f"A noise map holds one of {', '.join(NOISE_KINDS)}; received {noise_kind}.")


def _check_maps(noise: Any, mask: Any, *, in_memory: bool) -> None:
    """Refuse a map in memory of an image in a file, and the other way round."""
    for name, given in (("noise", noise), ("mask", mask)):
        if given is not None and isinstance(given, str | Path) is in_memory:
            where, kind = ("memory", "an array") if in_memory else ("a file", "a path")
            advice = (
                "Read the map into an array" if in_memory else "Write the map to a file, or give the image as an array"
            )
            raise InputError(f"`{name}` of an image in {where} is {kind}; received {type(given).__name__}. {advice}.")


def _saturation(image: Image) -> float:
    """The value of SATURATE in the header; infinite if it is missing or not positive, which means that it is not known.

    A value that is no number is ignored with a warning.
    """
    found = image.header.get("SATURATE")
    if found is None or isinstance(found, fits.card.Undefined):
        return np.inf
    try:
        level = float("" if isinstance(found, bool | np.bool_) else found)
    except (TypeError, ValueError):
        warn(f"SATURATE in the header of {image.name} should be a number; received {found!r}: it is ignored.")
        return np.inf
    return level if level > 0 else np.inf


def _pixels(unit: Any, name: str) -> np.ndarray:
    if not unit.is_image or unit.data is None:
        raise InputError(f"{name} holds no image. Choose another extension: give `hdu`.")
    return np.asarray(unit.data).reshape(plane_of(unit.data.shape))


def _of_nddata(source: Any) -> dict[str, Any]:
    """Header, unit, WCS, mask and uncertainty of an NDData as options of `Exposure.of_arrays`."""
    out: dict[str, Any] = {"header": dict(source.meta), "name": f"the {type(source).__name__}"}
    if source.unit is not None:
        out["header"].setdefault("BUNIT", source.unit.to_string())
    if isinstance(source.wcs, WCS):
        out["wcs"] = source.wcs
    if source.mask is not None:
        out["mask"] = np.broadcast_to(np.asarray(source.mask, dtype=np.uint8), source.data.shape)
    kind = _UNCERTAINTIES.get(getattr(source.uncertainty, "uncertainty_type", ""))
    if kind is not None:
        out.update(noise=source.uncertainty.array, noise_kind=kind)
    return out
