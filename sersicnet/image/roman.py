"""Images of the Roman Space Telescope, in ASDF files."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sersicnet.errors import InputError, first_line

_ARRAYS = {"image": ("data",), "rms": ("err",), "wht": ("weight",), "var": ("var",), "mask": ("dq",), "psf": ("psf",)}
"""Names of the arrays of each kind, see `sersicnet.image.extensions.WORDS`."""

_POWERS = {"image": 1, "rms": 1, "var": 2, "wht": -2}
"""Powers of the image unit that the kinds are in."""


def read(path: Path, name: int | str | None, kind: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Read an array below ``roman`` in an ASDF file.

    An image in DN/s is converted to MJy/sr by ``meta.photometry``; a mosaic, which has a ``weight``, is in MJy/sr.

    Parameters
    ----------
    path : Path
    name : int or str or None
        Name of the array; by default the one of `kind`.
    kind : str
        A key of `sersicnet.image.extensions.WORDS`.

    Returns
    -------
    data : ndarray, float32, (H, W)
    header : dict
        BUNIT and PIXAR_SR, and the WCS of a mosaic, as FITS keywords.

    Raises
    ------
    InputError
        If the package asdf is missing, or the file holds no such array.
    """
    try:
        import asdf
    except ImportError as error:
        raise InputError(f"Reading {path} needs the package asdf: pip install 'sersicnet[roman]'.") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tags of packages that are not installed
            with asdf.open(path, memmap=False, lazy_load=False) as file:
                tree = file.tree.get("roman")
                if not isinstance(tree, Mapping):
                    raise InputError(f"{path} holds no image of Roman: it has no entry roman.")
                known = [key for key in tree if getattr(_plain(tree[key]), "ndim", 0) == 2]
                wanted = _ARRAYS.get(kind, ()) if name is None else (str(name),)
                found = next((key for key in wanted if key in known), None)
                if found is None:
                    raise InputError(
                        f"{path} holds no array {' or '.join(wanted) or kind}; it has {', '.join(known) or 'none'}."
                    )
                data, unit = np.array(_plain(tree[found]), dtype=np.float32), _unit(tree["data"])
                meta = tree.get("meta") or {}
                is_mosaic = "weight" in tree
    except (InputError, MemoryError):
        raise
    except Exception as error:  # the packages below asdf raise many types of error for damaged files
        raise InputError(f"{path} is not a readable ASDF file: {first_line(error)}") from error
    photometry = meta.get("photometry") or {}
    factor, area = (
        _number(photometry, *names) for names in (("conversion_megajanskys",), ("pixel_area", "pixelarea_steradians"))
    )
    header: dict[str, Any] = _wcs(meta.get("wcsinfo") or {})
    if area > 0:
        header["PIXAR_SR"] = area
    if "MJy" in unit or (not unit and is_mosaic):
        header["BUNIT"] = "MJy/sr"
    elif factor > 0:
        header["BUNIT"] = "MJy/sr"
        if kind in _POWERS:
            data *= np.float32(factor ** _POWERS[kind])
    return data, header


def _plain(value: Any) -> Any:
    """The array of a quantity, in whichever form asdf gives it without the packages of its tags."""
    if isinstance(value, Mapping) and "value" in value:
        return value["value"]
    return getattr(value, "value", value)


def _unit(value: Any) -> str:
    unit = value.get("unit", "") if isinstance(value, Mapping) else getattr(value, "unit", "")
    return str(unit)


def _number(values: Mapping[str, Any], *names: str) -> float:
    for name in names:
        value = _plain(values.get(name))
        if value is not None:
            return float(value)
    return float("nan")


def _wcs(info: Mapping[str, Any]) -> dict[str, Any]:
    """The WCS of a mosaic, a gnomonic projection, as FITS keywords; empty for other images."""
    try:
        scale = float(info["pixel_scale"]) / 3600
        matrix = np.array(info["rotation_matrix"], float).reshape(2, 2)
        out = {
            "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN",
            "CRVAL1": float(info["ra_ref"]), "CRVAL2": float(info["dec_ref"]),
            "CRPIX1": float(info["x_ref"]) + 1, "CRPIX2": float(info["y_ref"]) + 1, "CDELT1": scale, "CDELT2": scale,
        }  # fmt: skip
    except (KeyError, TypeError, ValueError):
        return {}
    return out | {f"PC{i + 1}_{j + 1}": float(matrix[i, j]) for i in range(2) for j in range(2)}
