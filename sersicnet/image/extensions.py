"""Which extension of a FITS file holds the image, the noise map, the mask or the PSF, by their names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from astropy.io import fits

from sersicnet.errors import InputError, warn

WORDS = {
    "image": ("SCI", "SCIENCE", "IMAGE", "DATA"),
    "rms": ("RMS", "ERR", "ERROR", "SIGMA", "STD", "STDDEV", "UNCERT"),
    "wht": ("WHT", "IVM", "IVAR", "INVVAR", "WEIGHT", "WEIGHTS", "WGT"),
    "var": ("VAR", "VARIANCE"),
    "mask": ("MASK", "DQ", "MSK", "BPM", "FLAGS"),
    "psf": ("PSF", "EPSF", "OVERDIST"),
    "fit": ("MODEL", "RESID", "RESIDUAL", "RESIDUALS"),
    "depth": ("CON", "CTX", "CONTEXT", "AREA", "NEXP", "COVERAGE", "TIME"),
}
"""Words in EXTNAME or IMAGETYP that name the content of an extension."""

NAMES = {
    "image": "an image",
    "rms": "an rms map",
    "wht": "an inverse-variance map",
    "var": "a variance map",
    "mask": "a mask",
    "psf": "a PSF",
    "fit": "a model or residual",
    "depth": "a map of the exposure",
}
"""The kinds of `WORDS` in prose."""

_UNCERTAINTIES = {"VarianceUncertainty": "var", "InverseVariance": "wht"}
"""Kinds of the extension UNCERT that astropy's CCDData writes, by their UTYPE."""


def choose(
    hdus: fits.HDUList, hdu: int | str | None, kind: str, path: Path | str, band: str = "", least: int = 16
) -> int:
    """Number of the requested HDU; without a request, of the one whose name says that it holds this kind.

    For an image, the extension SCI precedes the first one that is named an image or has no telling name.
    For a map or a PSF, an extension of that kind in the band of the image precedes others of that kind, and then
    comes the first one without a telling name.

    Parameters
    ----------
    hdus : HDUList
    hdu : int or str or None
    kind : str
        One of `WORDS`.
    path : Path or str
        Name of the file in messages.
    band : str
        Band of the image that a map belongs to; see `band_of`.
    least : int
        Minimum width and height; smaller images are taken only if there is no other.

    Raises
    ------
    InputError
        If there is none, or several PSFs or maps suit equally.
    """
    if hdu is not None:
        text = str(hdu)
        version = re.fullmatch(r"(.+),\s*(\d+)", text)
        try:
            if re.fullmatch(r"-?\d+", text):
                return range(len(hdus))[int(text)]
            return int(hdus.index_of((version[1], int(version[2])) if version else text))
        except (KeyError, IndexError) as error:
            raise InputError(f"{path} has no extension {hdu}; it has {_listed(hdus)}.") from error
    held = [i for i, unit in enumerate(hdus) if unit.is_image and len(unit.shape) > 1]
    held = [i for i in held if min(hdus[i].shape) > 0] or held
    if not held:
        what = ", ".join(type(unit).__name__ for unit in hdus)
        raise InputError(f"{path} holds no image, only {what}.")
    held = [i for i in held if _is_plane(hdus[i].shape, least)] or held
    galfit = any("CONVBOX" in unit.header and "FITSECT" in unit.header for unit in hdus)
    kinds = {i: _kind_of(hdus[i].header, hdus[i].name, galfit) for i in held}
    untold = [i for i in held if kinds[i] is None]
    if kind == "image":
        return _image(hdus, kinds, path, galfit)
    suited = [i for i in held if kinds[i] == kind]
    suited = [i for i in suited if band and band_of(hdus[i].header) == band] or suited
    exact = [i for i in suited if hdus[i].name in WORDS[kind]]
    if len(exact or suited) > 1 and len({hdus[i].name + band_of(hdus[i].header) for i in exact or suited}) > 1:
        raise InputError(
            f"{path} holds more than one extension that is named {NAMES[kind]}: {_listed(hdus, exact or suited)}. "
            f"Choose one, as in {Path(path).name}[{(exact or suited)[0]}]."
        )
    if suited or untold:
        return (exact or suited or untold)[0]
    other = kinds[held[0]]
    if other == "image" and (len(held) == 1 or kind == "psf"):  # a name that was copied with the header
        return held[0]
    raise InputError(
        f"{path} holds no extension that is named {NAMES[kind]}; it has {_listed(hdus)}. If one is, choose it by its "
        f"number or name, as in {Path(path).name}[{held[0]}]."
    )


def band_of(header: Mapping[str, Any]) -> str:
    """Band of an extension: its BAND or FILTER, or what EXTNAME holds besides its kind; empty if there is none."""
    for keyword in ("BAND", "FILTER"):
        if found := _text(header, keyword):
            return found.lower()
    words = _split(_text(header, "EXTNAME"))
    known = {word for names in WORDS.values() for word in names}
    return "_".join(word for word in words if word not in known).lower() if known & set(words) else ""


def _image(hdus: fits.HDUList, kinds: Mapping[int, str | None], path: Path | str, galfit: bool) -> int:
    named = [i for i, kind in kinds.items() if kind == "image"]
    science = [i for i in named if hdus[i].name == "SCI"]
    free = science or [i for i, kind in kinds.items() if kind in ("image", None)]
    if not free:
        raise InputError(
            f"{path} holds no extension that is an image by its name; it has {_listed(hdus)}. "
            "If one is, choose it: give `hdu`."
        )
    if galfit:
        warn(f"{path} was written by GALFIT: extension {free[0]}, its input, is used, not its model or residual.")
    elif len(science or named) > 1:
        warn(
            f"{path} holds several images: {_listed(hdus, science or named)}. Extension {free[0]} is used; `hdu` "
            "chooses another."
        )
    return free[0]


def _is_plane(shape: tuple[int, ...], least: int) -> bool:
    return len(shape) >= 2 and all(n == 1 for n in shape[:-2]) and min(shape[-2:]) >= least


def _kind_of(header: fits.Header, name: str, galfit: bool) -> str | None:
    """The kind of an extension by its EXTNAME, IMAGETYP or, in GALFIT's files, OBJECT; None if they do not say."""
    texts = ["" if name in ("PRIMARY", "COMPRESSED_IMAGE") else name, _text(header, "IMAGETYP")]
    if galfit:
        texts.append(_text(header, "OBJECT"))
    for text in texts:
        words = _split(text)
        found = [kind for kind in (*list(WORDS)[1:], "image") if set(WORDS[kind]) & set(words)]
        if found:
            return _UNCERTAINTIES.get(_text(header, "UTYPE"), "rms") if "UNCERT" in words else found[0]
    return None


def _text(header: Mapping[str, Any], keyword: str) -> str:
    """Value of a keyword as text; empty if it is missing or damaged."""
    try:
        return str(header.get(keyword, "")).strip()
    except fits.VerifyError:
        return ""


def _split(text: Any) -> list[str]:
    return re.findall("[A-Z]+", str(text).upper())


def _listed(hdus: fits.HDUList, numbers: list[int] | None = None) -> str:
    numbers = list(range(len(hdus))) if numbers is None else numbers
    return ", ".join(" ".join(filter(None, (str(i), hdus[i].name, _tag(hdus[i].header)))) for i in numbers)


def _tag(header: fits.Header) -> str:
    """IMAGETYP and BAND of an extension in parentheses, for a list of extensions."""
    texts = [text for text in (_text(header, "IMAGETYP"), _text(header, "BAND")) if text]
    return f"({', '.join(texts)})" if texts else ""
