"""Zero point and pixel scale of an image, with the header keywords that they were read from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from sersicnet.errors import InputError


class Reading(NamedTuple):
    """A number, and its source: header keywords, "WCS", "the user" or "none"."""

    value: float
    source: str


ZERO_POINT_KEYWORDS = ("MAGZERO", "MAGZPT", "ZEROPNT", "ZP", "MAG_ZP", "PHOTZP")


VEGA_KEYWORDS = ("MAGSYS", "PHOTSYS", "MAGSYST", "CASUVERS")
"""Keywords that show that a zero point is in Vega magnitudes. CASUVERS marks the CASU pipeline (VISTA, WFCAM), whose
MAGZPT is in Vega magnitudes."""


FLUX_UNITS = {
    "jy": 8.9,
    "jansky": 8.9,
    "ujy": 23.9,
    "microjansky": 23.9,
    "njy": 31.4,
    "nanojansky": 31.4,
    "nanomaggy": 22.5,
    "nanomaggies": 22.5,
    "nmgy": 22.5,
}
"""AB magnitude of each unit of flux, in lower case."""

COUNTS = ("electrons", "electron", "e-", "e", "counts", "count", "adu", "dn")
"""Units that are counts, not count rates."""

KEYWORDS = (
    "PHOTFLAM", "PHOTPLAM", "BUNIT", "EXPTIME", "PIXAR_SR", "PIXAR_A2", "FLUXMAG0", *ZERO_POINT_KEYWORDS,
    *VEGA_KEYWORDS,
)  # fmt: skip
"""All keywords that `zero_point` reads. A keyword that an extension lacks is read from the primary header."""

AREA_TOLERANCE = 0.1
"""Tolerance of the pixel area in a header against the area from its WCS, as a fraction: distortion changes the area
by a few per cent."""

STERADIAN = (180 * 3600 / np.pi) ** 2
"""One steradian, in square arcseconds."""


def zero_point(header: Mapping, given: float | None = None, wcs_scales: np.ndarray | None = None) -> Reading:
    """AB magnitude of one image unit.

    The sources are tried in this order: the user's value; ``BUNIT`` of MJy/sr with
    ``PIXAR_SR`` or ``PIXAR_A2`` (JWST), or of a flux such as nJy, uJy or nanomaggy
    (Rubin, SDSS); ``PHOTFLAM`` and ``PHOTPLAM`` (HST); ``FLUXMAG0`` (HSC); one of
    ``MAGZERO, MAGZPT, ZEROPNT, ZP, MAG_ZP, PHOTZP``. A unit of flux precedes
    PHOTFLAM, because PHOTFLAM is for electrons and often stays in the header of an
    image that was converted to another unit.

    Parameters
    ----------
    header : mapping
        FITS header of the image.
    given : float, optional
        The user's value, which overrides the header.
    wcs_scales : ndarray, float, (2,), optional
        Pixel size along both axes from the image's WCS, arcsec. The pixel area in the header is
        checked against it.

    Returns
    -------
    Reading
        The zero point and its source.

    Raises
    ------
    InputError
        If a keyword has an impossible value, if the image is in electrons instead of
        electrons per second, or if the header gives no zero point.

    References
    ----------
    WFC3 Data Handbook, section 9.1; JWST User Documentation, "Absolute flux calibration".
    """
    if given is not None:
        if not np.isfinite(given):
            raise InputError(f"A zero point is a finite AB magnitude; received {given}.")
        return Reading(float(given), "the user")
    found = _of_unit(header, wcs_scales) or _of_keywords(header)
    if not 0 < found.value < 60:
        received = ", ".join(f"{key} {header[key]}" for key in found.source.split(", "))
        raise InputError(
            f"The zero point should be an AB magnitude from 0 to 60; received {found.value:g} from {received}. "
            "Give `zero_point`."
        )
    return found


def _of_unit(header: Mapping, wcs_scales: np.ndarray | None) -> Reading | None:
    """The zero point of an image in units of flux, or of flux per solid angle; None for other units."""
    unit = _unit(header)
    if unit in ("MJy/sr", "MJysr-1", "MJy.sr-1", "MJY/SR"):  # the case matters: mJy/sr is another unit
        keyword, unit_area = ("PIXAR_A2", STERADIAN) if "PIXAR_SR" not in header else ("PIXAR_SR", 1.0)
        area = _number(header, keyword) / unit_area
        if not area > 0:
            raise InputError(
                "An image in MJy/sr needs a positive PIXAR_SR (pixel area in steradian) or PIXAR_A2 (in arcsec2) in "
                f"its header; received {header.get(keyword)}. Give `zero_point`."
            )
        if wcs_scales is not None and not abs(area * STERADIAN / np.prod(wcs_scales) - 1) < AREA_TOLERANCE:
            raise InputError(
                f"{keyword} must agree with the WCS; received pixels of {area * STERADIAN:.4g} and "
                f"{np.prod(wcs_scales):.4g} arcsec2. Was the image resampled? Correct {keyword}, "
                "or give `zero_point`."
            )
        return Reading(-6.10 - 2.5 * float(np.log10(area)), f"BUNIT, {keyword}")
    parts = re.fullmatch(r"(?:(\d+(?:\.\d*)?(?:e[+-]?\d+)?)\*?)?([a-z]+)(?:/pix(?:el)?)?", unit.lower())
    if parts and parts[2] in FLUX_UNITS and float(parts[1] or 1) > 0:
        return Reading(FLUX_UNITS[parts[2]] - 2.5 * float(np.log10(float(parts[1] or 1))), "BUNIT")
    return None


def _of_keywords(header: Mapping) -> Reading:
    """The zero point from PHOTFLAM and PHOTPLAM, FLUXMAG0, or a keyword of `ZERO_POINT_KEYWORDS`."""
    unit = _unit(header).lower()
    is_flux = re.search("jy|jansky|maggy|maggies|erg|/sr|arcsec", unit) is not None
    if "PHOTFLAM" in header and not is_flux:
        photflam, photplam = _number(header, "PHOTFLAM"), _number(header, "PHOTPLAM")
        if not (photflam > 0 and photplam > 0):
            raise InputError(
                f"PHOTFLAM and PHOTPLAM must be positive; received {photflam:g} and {photplam:g}. Give `zero_point`."
            )
        exposure = _number(header, "EXPTIME") if "EXPTIME" in header else np.nan
        if unit in COUNTS and exposure != 1:
            raise InputError(
                f"PHOTFLAM is for electrons per second, but BUNIT is {header['BUNIT']!r} and EXPTIME {exposure:g}. "
                "Divide the image by its exposure time, or give the `zero_point` of its own unit."
            )
        value = -2.5 * np.log10(photflam) - 21.10 - 5 * np.log10(photplam) + 18.6921
        return Reading(float(value), "PHOTFLAM, PHOTPLAM")
    if "FLUXMAG0" in header:
        flux = _number(header, "FLUXMAG0")
        if not flux > 0:
            raise InputError(
                f"FLUXMAG0, the flux of magnitude 0, must be positive; received {header['FLUXMAG0']}. "
                "Give `zero_point`."
            )
        return Reading(2.5 * float(np.log10(flux)), "FLUXMAG0")
    for keyword in ZERO_POINT_KEYWORDS:
        if keyword in header:
            _refuse_vega(header, keyword)
            return Reading(_number(header, keyword), keyword)
    raise InputError(
        "The header gives no zero point (looked for PHOTFLAM and PHOTPLAM, FLUXMAG0, "
        f"{', '.join(ZERO_POINT_KEYWORDS)}, and BUNIT of MJy/sr or a flux; received "
        f"{header.get('BUNIT', 'no BUNIT')}). Give `zero_point`, the AB magnitude of one image unit."
    )


def _refuse_vega(header: Mapping, keyword: str) -> None:
    """Refuse a zero point in Vega magnitudes: AB magnitudes from it would be wrong by up to two, and look plausible."""
    found = [key for key in VEGA_KEYWORDS[:-1] if str(header.get(key, "")).strip().lower().startswith("vega")]
    if found or (keyword == "MAGZPT" and "CASUVERS" in header):
        raise InputError(
            f"{keyword} must be an AB magnitude; {found[0] if found else 'CASUVERS'} in the header shows that it is in "
            "the Vega system. Add the filter's offset from Vega to AB, and give the sum as `zero_point`."
        )


def _unit(header: Mapping) -> str:
    return str(header.get("BUNIT", "")).replace(" ", "")


def pixel_scale(wcs_scales: np.ndarray | None, given: float | None = None) -> Reading:
    """Arcseconds per pixel.

    Parameters
    ----------
    wcs_scales : ndarray, float, (2,) or None
        Pixel size along both axes from the image's WCS, arcsec; None if the image has no WCS.
    given : float, optional
        The user's value, which overrides the WCS.

    Returns
    -------
    Reading
        The geometric mean of both axes; NaN if there is neither a value nor a WCS.

    Raises
    ------
    InputError
        If the value is not a positive number.
    """
    if given is not None:
        value, source = float(given), "the user"
    elif wcs_scales is not None:
        value, source = float(np.sqrt(np.prod(wcs_scales))), "WCS"
    else:
        return Reading(float("nan"), "none")
    if not (np.isfinite(value) and value > 0):
        raise InputError(f"A pixel scale is a positive number of arcsec; received {value:g} from {source}.")
    return Reading(value, source)


def _number(header: Mapping, keyword: str) -> float:
    try:
        return float(header[keyword])
    except KeyError:
        return float("nan")
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{keyword} in the header should be a number; received {header[keyword]!r}. Give `zero_point`."
        ) from error
