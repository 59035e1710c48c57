"""Zero point and pixel scale of an image, with the header keywords that they were read from."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from astropy import units

from sersicnet.errors import InputError, warn


class Reading(NamedTuple):
    """A number, and its source: header keywords, "WCS", "the user" or "none"."""

    value: float
    source: str


ZERO_POINT_KEYWORDS = ("MAGZERO", "MAGZPT", "ZEROPNT", "ZP", "MAG_ZP", "PHOTZP")


VEGA_KEYWORDS = ("MAGSYS", "PHOTSYS", "MAGSYST", "CASUVERS")
"""Keywords that show that a zero point is in Vega magnitudes. CASUVERS marks the CASU pipeline (VISTA, WFCAM), whose
MAGZPT is in Vega magnitudes."""

SCALING_KEYWORDS = ("BSOFTEN", "BTYPE", "STRETCH", "SCALING")
"""Keywords that show that pixel values are not linear in flux: BSOFTEN (Pan-STARRS) by its presence, others by their
values."""

LEGACY_KEYWORDS = ("SURVEY", "BRICK", "IMAGETYP", "IMTYPE")
"""Keywords that mark images of the Legacy Surveys, which may lack BUNIT."""

KEYWORDS = (
    "PHOTFLAM", "PHOTPLAM", "BUNIT", "EXPTIME", "PIXAR_SR", "PIXAR_A2", "FLUXMAG0", *ZERO_POINT_KEYWORDS,
    *VEGA_KEYWORDS, *SCALING_KEYWORDS, *LEGACY_KEYWORDS,
)  # fmt: skip
"""All keywords that `zero_point` reads. A keyword that an extension lacks is read from the primary header."""

MOST_ZERO_POINT = 100
"""Zero points of users are from minus this number to this number; that of W / (m2 Hz) is -56."""

AREA_TOLERANCE = 0.1
"""Tolerance of the pixel area in a header against the area from its WCS, as a fraction: distortion changes the area
by a few per cent."""

DISAGREEMENT = 0.01
"""Zero points in a header that differ by more than this from the one that is used give a warning, mag."""

OTHER_SCALE = 0.01
"""Relative difference between the user's pixel scale and that of the WCS above which there is a warning."""

SQUARE_WARNS, SQUARE_FAILS = 0.02, 0.1
"""Elongation of pixels, as a fraction, that gives a warning, and that is refused. It distorts radii and ellipticities
by as much; ellipticities of two good fits differ by about 0.02."""

STERADIAN = (180 * 3600 / np.pi) ** 2
"""One steradian, in square arcseconds."""

_COUNT, _RATE = units.ct, units.ct / units.s
_F_LAMBDA = units.Unit("erg / (s cm2 Angstrom)")
_FLUXES = {units.Jy: 8.90, units.Unit("mgy"): 0.0}
"""AB magnitude of each unit of flux."""


def zero_point(header: Mapping, given: float | None = None, wcs_scales: np.ndarray | None = None) -> Reading:
    """AB magnitude of one image unit.

    The sources are tried in this order: the user's value; ``BUNIT`` of a flux, such as nJy,
    mJy, nanomaggy or erg/s/cm2/Hz (Rubin, SDSS), or of a flux per solid angle, such as MJy/sr, with
    ``PIXAR_SR``, ``PIXAR_A2`` (JWST) or the WCS; ``PHOTFLAM`` and ``PHOTPLAM`` (HST);
    ``FLUXMAG0`` (HSC); one of ``MAGZERO, MAGZPT, ZEROPNT, ZP, MAG_ZP, PHOTZP``; ``SURVEY`` of the
    Legacy Surveys, whose images are in nanomaggies. A unit of flux precedes PHOTFLAM, because
    PHOTFLAM is for electrons per second and often stays in the header of an image that was converted
    to another unit.

    Parameters
    ----------
    header : mapping
        FITS header of the image.
    given : float, optional
        The user's value, which overrides the header.
    wcs_scales : ndarray, float, (2,), optional
        Pixel size along both axes from the image's WCS, arcsec. The pixel area in the header is
        checked against it, and replaced by it if the header has none.

    Returns
    -------
    Reading
        The zero point and its source.

    Raises
    ------
    InputError
        If a keyword has an impossible value, if the image is in electrons instead of
        electrons per second, if it is in magnitudes or another unit that is not linear in flux, or if
        the header gives no zero point.

    Warns
    -----
    SersicnetWarning
        If the header gives different zero points, or a zero point of 0 without a unit that has it, or one that may be
        for counts or for counts per second.

    References
    ----------
    WFC3 Data Handbook, section 9.1; JWST User Documentation, "Absolute flux calibration".
    """
    _refuse_nonlinear(header)
    if given is not None:
        if not np.isfinite(given):
            raise InputError(f"A zero point is a finite AB magnitude; received {given}.")
        if abs(given) > MOST_ZERO_POINT:
            raise InputError(
                f"A zero point is the AB magnitude of one image unit, from -{MOST_ZERO_POINT} to {MOST_ZERO_POINT}; "
                f"received {given:g}. For JWST it is about 28, for HST about 26."
            )
        return Reading(float(given), "the user")
    found = _of_unit(header, wcs_scales)
    if found is None:
        found = _of_keywords(header) or _of_legacy_surveys(header)
        if found is None and not len(header):
            raise InputError(
                "An image without a header gives no zero point: give `zero_point`, the AB magnitude of one image unit."
            )
        if found is None:
            raise InputError(
                "The header gives no zero point (looked for PHOTFLAM and PHOTPLAM, FLUXMAG0, "
                f"{', '.join(ZERO_POINT_KEYWORDS)}, and BUNIT of MJy/sr or a flux; received "
                f"{header.get('BUNIT', 'no BUNIT')}). Give `zero_point`, the AB magnitude of one image unit."
            )
        if not 0 <= found.value < 60:
            received = ", ".join(f"{key} {header[key]}" for key in found.source.split(", "))
            raise InputError(
                f"The zero point should be an AB magnitude from 0 to 60; received {found.value:g} from {received}. "
                "Give `zero_point`."
            )
        if found.value == 0:
            warn(
                f"{found.source} is 0: magnitudes are AB only if the image is in maggies, which BUNIT does not state. "
                "Otherwise give `zero_point`."
            )
        elif found.source in ZERO_POINT_KEYWORDS:
            _warn_of_counts(header, found)
    _compare(header, found)
    return found


def _refuse_nonlinear(header: Mapping) -> None:
    """Refuse pixel values that are magnitudes or another function of the flux."""
    for keyword in ("BUNIT", *SCALING_KEYWORDS[1:]):
        text = str(header.get(keyword, ""))
        if _NONLINEAR.search(text):
            raise InputError(
                f"The values of an image must be linear in flux; {keyword} is {text!r}. Convert the image to a unit "
                f"of flux, and correct {keyword}."
            )
    if "BSOFTEN" in header:
        raise InputError(
            "The values of an image must be linear in flux; BSOFTEN in the header shows that they are scaled by asinh. "
            "Convert the image (Pan-STARRS: flux = BOFFSET + 2 BSOFTEN sinh(value / 1.0857)), and remove BSOFTEN."
        )


_NONLINEAR = re.compile(
    r"(?i)(?<![a-z])((ab|st|vega|m)?_?mags?(nitudes?)?_?(ab|st|vega)?|luptitudes?|(arc)?a?sinh|log(10)?|ln|dex|db|sqrt"
    r"|^(ab|st|vega)$)(?![a-z])"
)


def _compare(header: Mapping, used: Reading) -> None:
    """Warn of zero points in the header that differ from the one that is used."""
    others = [_of_photflam, _of_fluxmag0, *(_reader(keyword) for keyword in ZERO_POINT_KEYWORDS)]
    different = []
    for read in others:
        with suppress(InputError):  # it is not used
            other = read(header)
            if other is not None and other.source != used.source and not abs(other.value - used.value) < DISAGREEMENT:
                different.append(f"{other.value:.4f} from {other.source}")
    if different:
        warn(
            f"The header gives different zero points: {used.value:.4f} from {used.source} is used, not "
            f"{', '.join(different)}. Give `zero_point` to choose."
        )


def _warn_of_counts(header: Mapping, found: Reading) -> None:
    """Warn of a keyword's zero point that may be for counts or for counts per second: headers have both kinds."""
    with suppress(InputError):  # an EXPTIME that is no number raises no doubt
        seconds, unit = _number(header, "EXPTIME"), unit_of(header)
        if not 0 < seconds < np.inf or seconds == 1 or (unit is not None and not unit.is_equivalent(_COUNT)):
            return
        stated = f"BUNIT {header['BUNIT']!r} is no rate" if str(header.get("BUNIT", "")).strip() else "BUNIT is missing"
        warn(
            f"{found.source} {found.value:g} is taken for one image unit ({stated}, and EXPTIME is {seconds:g}). If it "
            "is for one count per second instead, divide the image by its exposure time, or give `zero_point` "
            f"{found.value + 2.5 * np.log10(seconds):.6g}."
        )


def _of_unit(header: Mapping, wcs_scales: np.ndarray | None) -> Reading | None:
    """The zero point of an image in units of flux, or of flux per solid angle; None for other units."""
    unit = unit_of(header)
    if unit is None:
        return None
    fluxes = dict(_FLUXES)
    if "PHOTPLAM" in header and (unit.is_equivalent(_F_LAMBDA) or unit.is_equivalent(_F_LAMBDA / units.sr)):
        fluxes[_F_LAMBDA] = -21.10 - 5 * float(np.log10(_positive(header, "PHOTPLAM"))) + 18.6921
    for flux, magnitude in fluxes.items():
        source = "BUNIT, PHOTPLAM" if flux is _F_LAMBDA else "BUNIT"
        if unit.is_equivalent(flux):
            return Reading(_magnitude(unit, flux, magnitude), source)
        if unit.is_equivalent(flux / units.sr):
            area, keyword = _pixel_area(header, wcs_scales)
            value = _magnitude(unit, flux / units.sr, magnitude) - 2.5 * float(np.log10(area))
            return Reading(value, f"{source}, {keyword}")
    return None


def _magnitude(unit: units.UnitBase, of: units.UnitBase, magnitude: float) -> float:
    """Magnitude of one `unit`, from that of another; rounded, so that one nJy has exactly 31.4."""
    return round(magnitude - 2.5 * float(np.log10(unit.to(of))), 10)


def _pixel_area(header: Mapping, wcs_scales: np.ndarray | None) -> Reading:
    """Area of a pixel in steradian, from PIXAR_SR, PIXAR_A2 or the WCS."""
    keyword, unit_area = ("PIXAR_A2", STERADIAN) if "PIXAR_SR" not in header else ("PIXAR_SR", 1.0)
    area = _number(header, keyword) / unit_area
    if wcs_scales is not None and not area > 0:
        return Reading(float(np.prod(wcs_scales)) / STERADIAN, "WCS")
    if not 0 < area < np.inf:
        raise InputError(
            f"An image in {header['BUNIT']} needs a WCS, a positive PIXAR_SR (pixel area in steradian) or PIXAR_A2 (in "
            f"arcsec2); received {header.get(keyword)}. Give `zero_point`."
        )
    if wcs_scales is not None and not abs(area * STERADIAN / np.prod(wcs_scales) - 1) < AREA_TOLERANCE:
        raise InputError(
            f"{keyword} must agree with the WCS; received pixels of {area * STERADIAN:.4g} and "
            f"{np.prod(wcs_scales):.4g} arcsec2. Was the image resampled? Correct {keyword}, "
            "or give `zero_point`."
        )
    return Reading(area, keyword)


def _of_keywords(header: Mapping) -> Reading | None:
    """The zero point from PHOTFLAM and PHOTPLAM, FLUXMAG0, or a keyword of `ZERO_POINT_KEYWORDS`."""
    text, unit = str(header.get("BUNIT", "")).strip(), unit_of(header)
    is_flux = re.search(r"(?i)jy|jansky|maggy|maggies|erg|watt|sr\b|arcsec", text) is not None
    if "PHOTFLAM" in header and not is_flux:
        found = _of_photflam(header)
        assert found is not None
        exposure = _number(header, "EXPTIME") if "EXPTIME" in header else np.nan
        if unit is not None and unit.is_equivalent(_RATE):
            return found._replace(value=found.value - 2.5 * float(np.log10(unit.to(_RATE))))
        if not text and exposure != 1 and np.isfinite(exposure):
            warn(
                f"The header states no BUNIT, and EXPTIME is {exposure:g}: the image is taken to be in electrons per "
                "second, for which PHOTFLAM is. Otherwise give `zero_point`."
            )
        elif text and exposure != 1:
            raise InputError(
                f"PHOTFLAM is for electrons per second, but BUNIT is {header['BUNIT']!r} and EXPTIME {exposure:g}. "
                "Divide the image by its exposure time, or give the `zero_point` of its own unit."
            )
        return found
    for read in (_of_fluxmag0, *(_reader(keyword) for keyword in ZERO_POINT_KEYWORDS)):
        if (found := read(header)) is not None:
            return found
    return None


def _of_photflam(header: Mapping) -> Reading | None:
    """The zero point of electrons per second."""
    if "PHOTFLAM" not in header:
        return None
    photflam, photplam = _number(header, "PHOTFLAM"), _number(header, "PHOTPLAM")
    if not (photflam > 0 and photplam > 0):
        raise InputError(
            f"PHOTFLAM and PHOTPLAM must be positive; received {photflam:g} and {photplam:g}. Give `zero_point`."
        )
    value = -2.5 * np.log10(photflam) - 21.10 - 5 * np.log10(photplam) + 18.6921
    return Reading(float(value), "PHOTFLAM, PHOTPLAM")


def _of_fluxmag0(header: Mapping) -> Reading | None:
    if "FLUXMAG0" not in header:
        return None
    return Reading(2.5 * float(np.log10(_positive(header, "FLUXMAG0"))), "FLUXMAG0")


def _reader(keyword: str) -> Callable[[Mapping], Reading | None]:
    """A function that reads an AB magnitude from a keyword; None without the keyword."""

    def read(header: Mapping) -> Reading | None:
        if keyword not in header:
            return None
        _refuse_vega(header, keyword)
        return Reading(_number(header, keyword), keyword)

    return read


def _of_legacy_surveys(header: Mapping) -> Reading | None:
    """The zero point of nanomaggies, if the image is one of the Legacy Surveys and states no unit."""
    is_survey = re.search(r"(?i)legacy|decals|mzls|bass\b", str(header.get("SURVEY", ""))) is not None
    kinds = {str(header[key]).strip().lower() for key in LEGACY_KEYWORDS[2:] if key in header}
    if not is_survey or kinds - {"image"} or str(header.get("BUNIT", "")).strip():
        return None
    return Reading(22.5, ", ".join(key for key in LEGACY_KEYWORDS if key in header))


def _refuse_vega(header: Mapping, keyword: str) -> None:
    """Refuse a zero point in Vega magnitudes: AB magnitudes from it would be wrong by up to two, and look plausible."""
    found = [key for key in VEGA_KEYWORDS[:-1] if str(header.get(key, "")).strip().lower().startswith("vega")]
    if found or (keyword == "MAGZPT" and "CASUVERS" in header):
        raise InputError(
            f"{keyword} must be an AB magnitude; {found[0] if found else 'CASUVERS'} in the header shows that it is in "
            "the Vega system. Add the filter's offset from Vega to AB, and give the sum as `zero_point`."
        )


# --- units ---

_WORDS = {
    "ct": "ct cts cnt cnts count counts adu adus dn dns e el els elec electron electrons ph phot photon photons "
    "photoelectron photoelectrons",
    "s": "s sec secs second seconds",
    "min": "min minute minutes",
    "h": "h hr hour hours",
    "sr": "sr str ster sterad steradian steradians",
    "arcsec": "arcsec arcsecs arcsecond arcseconds asec",
    "deg": "deg degree degrees",
    "pix": "pix px pixel pixels",
    "Hz": "hz hertz",
    "Angstrom": "angstrom angstroms ang a aa",
    "um": "um micron microns",
    "nm": "nm",
    "erg": "erg ergs",
    "W": "w watt watts",
    "cm": "cm",
    "m": "m",
}
"""Units of image values for astropy, with their spellings in lower case; a count is alike to the PHOTFLAM of any
detector."""

_SPELLINGS = {spelling: unit for unit, spellings in _WORDS.items() for spelling in spellings.split()}

_PREFIXES = {"nano": "n", "micro": "u", "milli": "m", "kilo": "k", "mega": "M", "pico": "p", "femto": "f"}

_FLUX_WORD = re.compile(
    r"(?i)(nano|micro|milli|kilo|mega|pico|femto|[numkpf])?(?:(jy|jansky|janskys|janskies)|mgy|maggy|maggie|maggies)"
)


_LONGEST_UNIT = 68
"""Length of the text that fits in a card."""

_ENDLESS = re.compile(r"(\*\*|\^|[A-Za-z)]|\b10(?=[+-]))\s*\(?\s*[+-]?\d{3,}|(\*\*|\^)[^A-Za-z]*(\*\*|\^)")
"""Powers whose integers astropy would compute for hours."""


def unit_of(header: Mapping) -> units.UnitBase | None:
    """The unit that BUNIT states, with counts of all kinds as ct; None if it states none that is known.

    Units per pixel are taken without the pixel, since an image value is one of a pixel.
    """
    stated = text = str(header.get("BUNIT", "")).strip().strip("[]").strip()
    if not text or len(text) > _LONGEST_UNIT or _ENDLESS.search(text):
        return None
    text = re.sub(r"(?i)(?<![a-z0-9])e[-_](?![0-9])", "electron ", text)
    text = re.sub(r"(?i)\bcps\b", "ct/s", re.sub(r"(?i)\bper\b", "/", text))
    text = re.sub(r"(?i)\b(sq(uare)?\.?[ _-]*arcsec(ond)?s?|arcsec[ _]*sq)\b", "arcsec2", text)
    text = re.sub(r"(?i)(photo|nano|micro|milli|mega)-(?=[a-z])", r"\1", text).replace("{", "(").replace("}", ")")
    text = re.sub(r"(?i)(jy|jansky)(?=sr\b|sr-1)", r"\1 ", text)
    words: list[str | None] = []

    def known(found: re.Match[str]) -> str:
        words.append(_word(found[0]))
        return words[-1] or ""

    # The exponents of numbers, as in 1e-9, are no words.
    text = re.sub(r"(?<![\d.])[A-Za-z]+|(?<=[\d.])(?![eE][+-]?\d)[A-Za-z]+", known, text)
    if None in words:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", units.UnitsWarning)
        try:
            unit = units.Unit(text)
        except (ValueError, TypeError, ArithmeticError):
            return None
    if not isinstance(unit, units.UnitBase):  # a comma makes a structure
        return None
    # MJY and mjy are ambiguous by a factor of 1e9: only the usual meaning, MJy/sr or mJy, is read.
    if not 0 < unit.scale < np.inf or re.search(r"\bmjy" if is_surface_brightness(unit) else r"\bMJY", stated):
        return None
    for base, power in zip(unit.bases, unit.powers, strict=True):
        if base == units.pix and power == -1 and not is_surface_brightness(unit * base):
            unit = unit * base
    return unit  # type: ignore[no-any-return]


def is_surface_brightness(unit: units.UnitBase | None) -> bool:
    """Whether a unit is a flux per solid angle."""
    return unit is not None and any(unit.is_equivalent(flux / units.sr) for flux in (*_FLUXES, _F_LAMBDA))


def _word(word: str) -> str | None:
    """The name of a unit of astropy, from one of its spellings; None for an unknown word."""
    if (flux := _FLUX_WORD.fullmatch(word)) is not None:
        prefix, jansky = flux[1] or "", flux[2]
        letter = "M" if prefix == "M" else _PREFIXES.get(prefix.lower(), prefix.lower())
        return f"{letter}Jy" if jansky else {"": "mgy", "n": "nmgy"}.get(letter)
    return _SPELLINGS.get(word.lower())


# --- pixel scale ---


def pixel_scale(wcs_scales: np.ndarray | None, given: float | None = None, elongation: float = 1.0) -> Reading:
    """Arcseconds per pixel.

    Parameters
    ----------
    wcs_scales : ndarray, float, (2,) or None
        Pixel size along both axes from the image's WCS, arcsec; None if the image has no WCS.
    given : float, optional
        The user's value, which overrides the WCS.
    elongation : float
        Axis ratio, at least 1, of the ellipse on the sky that is a circle in the image, if it is known.

    Returns
    -------
    Reading
        The user's value, or the geometric mean of both axes; NaN if there is neither a value nor a WCS. If the user's
        value contradicts the WCS, its source states the value of the WCS.

    Raises
    ------
    InputError
        If the value is not a positive number, or pixels are not square by more than 10 per cent.

    Warns
    -----
    SersicnetWarning
        If pixels are not square by more than 2 per cent: radii and ellipticities are wrong by as much; or if the user's
        value differs from the WCS by more than 1 per cent.
    """
    stated = None if wcs_scales is None else float(np.sqrt(np.prod(wcs_scales)))
    if given is not None:
        value, source = float(given), "the user"
    elif stated is not None:
        value, source = stated, "WCS"
    else:
        return Reading(float("nan"), "none")
    if not (np.isfinite(value) and value > 0):
        raise InputError(f"A pixel scale is a positive number of arcsec; received {value:g} from {source}.")
    if wcs_scales is not None:
        _check_square(wcs_scales, elongation, given)
    if stated is not None and abs(value - stated) > OTHER_SCALE * stated:
        warn(
            f"`pixel_scale` should agree with the WCS: {value:.4g} arcsec, as given, is used, and the WCS states "
            f"{stated:.4g}. Leave it out if the WCS is right."
        )
        source = f"{source} (the WCS states {stated:.4g})"
    return Reading(value, source)


def _check_square(wcs_scales: np.ndarray, elongation: float, given: float | None) -> None:
    """Refuse pixels that are far from square, because radii and ellipticities are those of an image of squares."""
    elongation = max(elongation, float(np.max(wcs_scales) / np.min(wcs_scales)))
    if elongation < 1 + SQUARE_WARNS:
        return
    received = f"{wcs_scales[0]:.4g} x {wcs_scales[1]:.4g} arcsec, elongated by {elongation - 1:.1%}, from the WCS"
    if given is None and elongation > 1 + SQUARE_FAILS:
        raise InputError(
            f"Pixels must be square; received {received}. Resample the image to square pixels by other means first; "
            "or give `pixel_scale` if the WCS is wrong."
        )
    warn(
        f"Pixels should be square; received {received}. They are taken for squares: radii, ellipticities and angles "
        "are distorted by as much."
    )


def _positive(header: Mapping, keyword: str) -> float:
    value = _number(header, keyword)
    if not value > 0:
        what = "FLUXMAG0, the flux of magnitude 0," if keyword == "FLUXMAG0" else keyword
        raise InputError(f"{what} must be positive; received {header[keyword]}. Give `zero_point`.")
    return value


def _number(header: Mapping, keyword: str) -> float:
    try:
        return float(header[keyword])
    except KeyError:
        return float("nan")
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{keyword} in the header should be a number; received {header[keyword]!r}. Give `zero_point`."
        ) from error
