"""The celestial WCS of an image: whether it can be used, and which parts of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning
from astropy.wcs import WCS
from astropy.wcs.utils import proj_plane_pixel_area, proj_plane_pixel_scales

from sersicnet.errors import first_line

LEAST_SHEAR = 0.1
"""Minimum area of a pixel on the sky over the product of its sides; a smaller ratio means that the axes of the WCS are
nearly parallel."""

SCALE_DOUBT = 0.02
"""Largest relative difference between two pixel scales in a header that counts as none."""

ROUND_TRIP = 0.1
"""Largest error of a conversion from pixels to the sky and back, pixels."""

WCS_CARD = re.compile(r"(CTYPE|CRVAL|CRPIX|CDELT|CUNIT|CROTA)\d|(CD|PC)\d_\d|LONPOLE|LATPOLE|RADESYS|EQUINOX")
_WCS_NUMBER = re.compile(r"(CRVAL|CRPIX|CDELT|CROTA)\d|(CD|PC)\d_\d|LONPOLE|LATPOLE")
_SIP_CARD = re.compile(r"[AB]P?_(\d+_\d+|ORDER|DMAX)")
_LOOKUP_CARD = re.compile(r"(CPDIS|CQDIS|CPERR|CQERR|DP|DQ|D2IMDIS|D2IMERR|D2IM)\d(\..*)?|D2IM(ARR|EXT)|AXISCORR")


class Celestial(NamedTuple):
    """The celestial WCS of an image.

    Attributes
    ----------
    wcs : WCS or None
        None if there is none that can be used.
    problem : str
        Reason why the WCS cannot be used; empty if it can, or if the header has none.
    omitted : str
        Which distortion in the header `wcs` leaves out, and why; empty if none.
    doubt : str
        Contradiction between two pixel scales in the header; empty if there is none.
    """

    wcs: WCS | None
    problem: str = ""
    omitted: str = ""
    doubt: str = ""


def celestial(header: fits.Header, shape: tuple[int, int], given: WCS | None = None) -> Celestial:
    """The celestial WCS of an image if it maps pixels to the sky and back.

    Distortion by a look-up table is left out, and so are SIP terms that ``CTYPE`` does not announce or
    that cannot be inverted: the plain part of the WCS is then used.

    Parameters
    ----------
    header : fits.Header
    shape : (int, int)
        Height and width.
    given : WCS, optional
        A WCS that overrides the header.
    """
    if given is not None:
        return _tested(lambda: given.celestial, shape)
    cards = {}
    for keyword in filter(WCS_CARD.fullmatch, header):
        try:
            cards[keyword] = header[keyword]
        except fits.VerifyError:
            return Celestial(None, f"its card {keyword} is damaged")
    # wcslib replaces values that it cannot read by plausible defaults.
    for keyword, value in cards.items():
        is_number = isinstance(value, int | float) and np.isfinite(value)
        if _WCS_NUMBER.fullmatch(keyword) and not is_number:
            return Celestial(None, f"{keyword} is {value}, not a number")
    plain, omitted = _without(header, _LOOKUP_CARD), []
    if any(re.fullmatch(r"(CPDIS|CQDIS|D2IMDIS)\d|D2IM(ARR|EXT)", keyword) for keyword in header):
        omitted.append("its distortion by a look-up table is left out")
    announced = [str(cards.get(f"CTYPE{axis}", "")).strip().endswith("-SIP") for axis in (1, 2)]
    has_terms = any(_SIP_CARD.fullmatch(keyword) for keyword in plain)
    if all(announced) and has_terms:
        found = _tested(lambda: WCS(plain, naxis=2), shape, corners=True)
        if found.wcs is None:
            reason = found.problem
            found = _tested(lambda: WCS(_without_sip(plain), naxis=2), shape)
            if found.wcs is not None:
                omitted.append(f"its SIP distortion cannot be used ({reason}) and is left out")
    else:
        if has_terms:
            omitted.append("its SIP distortion is left out, because CTYPE does not end in -SIP")
        found = _tested(lambda: WCS(_without_sip(plain), naxis=2), shape)
    if found.wcs is None:
        return found
    return found._replace(omitted=", and ".join(omitted), doubt=_contradiction(cards))


def _tested(make: Any, shape: tuple[int, int], *, corners: bool = False) -> Celestial:
    """A WCS if it maps the middle of the image, and with `corners` its corners too, to the sky and back."""
    middle = (shape[1] - 1) / 2, (shape[0] - 1) / 2
    right, top = shape[1] - 1.0, shape[0] - 1.0
    places = np.array([middle, *([(0.0, 0.0), (right, 0.0), (0.0, top), (right, top)] if corners else [])]).T
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", AstropyWarning)
        warnings.simplefilter("ignore", UserWarning)
        try:
            wcs = make()
            if not (wcs.has_celestial and wcs.pixel_n_dim == 2):
                return Celestial(None)
            if np.abs(wcs.wcs.crval).max() > 360:
                return Celestial(None, f"its reference value is {wcs.wcs.crval.tolist()} degrees")
            there_and_back = wcs.world_to_pixel(wcs.pixel_to_world(*places).icrs)
            shear = proj_plane_pixel_area(wcs) / np.prod(proj_plane_pixel_scales(wcs))
        except MemoryError:
            raise
        except Exception as error:  # wcslib raises several types of error; all mean that the WCS cannot be used
            return Celestial(None, first_line(error))
    off = np.hypot(*np.subtract(there_and_back, places))
    if not off[0] < ROUND_TRIP:
        return Celestial(None, "it does not lead from the middle of the image to the sky and back")
    if not (off < ROUND_TRIP).all():
        return Celestial(None, "it does not lead from the corners of the image to the sky and back")
    if not shear > LEAST_SHEAR:
        return Celestial(None, "its axes are nearly parallel on the sky")
    return Celestial(wcs)


def _without(header: fits.Header, cards: re.Pattern[str]) -> fits.Header:
    unwanted = {keyword for keyword in header if cards.fullmatch(keyword)}
    if not unwanted:
        return header
    out = header.copy()
    for keyword in unwanted:
        out.remove(keyword, ignore_missing=True, remove_all=True)
    return out


def _without_sip(header: fits.Header) -> fits.Header:
    out = _without(header, _SIP_CARD)
    for keyword in ("CTYPE1", "CTYPE2"):
        if str(out.get(keyword, "")).strip().endswith("-SIP"):
            out = out.copy()
            out[keyword] = str(out[keyword]).strip().removesuffix("-SIP")
    return out


def _contradiction(cards: Mapping[str, Any]) -> str:
    """A contradiction between the pixel scales of CDELT, the PC matrix and the CD matrix; empty if there is none.

    A PC matrix turns and skews the axes, and CDELT holds the size of a pixel; where CDELT is 1, PC is used like CD.
    """

    def matrix(name: str, default: np.ndarray) -> np.ndarray | None:
        keys = [f"{name}{i}_{j}" for i in (1, 2) for j in (1, 2)]
        if not any(key in cards for key in keys):
            return None
        return np.array([cards.get(key, value) for key, value in zip(keys, default.flat, strict=True)]).reshape(2, 2)

    def side(matrix: np.ndarray) -> float:
        return float(np.sqrt(abs(np.linalg.det(matrix))))

    pc, cd = matrix("PC", np.eye(2)), matrix("CD", np.zeros((2, 2)))
    if pc is None:
        return ""
    steps = np.array([cards.get("CDELT1", 1.0), cards.get("CDELT2", 1.0)], float)
    size = float(np.sqrt(np.abs(np.prod(steps))))
    if cd is not None and abs(size * side(pc) / side(cd) - 1) > SCALE_DOUBT:
        return (
            f"holds both a PC and a CD matrix; pixels are {3600 * size * side(pc):.4g} arcsec by PC and CDELT, "
            f"{3600 * side(cd):.4g} by CD"
        )
    if cd is None and (np.abs(steps) != 1).any() and abs(side(pc) - 1) > SCALE_DOUBT:
        return (
            f"has a PC matrix that is no rotation: pixels are {3600 * size:.4g} arcsec by CDELT, "
            f"{3600 * size * side(pc):.4g} by CDELT and PC"
        )
    return ""
