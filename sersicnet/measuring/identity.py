"""All that a measurement depends on, as a validation keeps it: what `measure --validated` compares."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sersicnet.image.exposure import Exposure
from sersicnet.image.mosaic import Image
from sersicnet.measuring.fitting import Fitting
from sersicnet.simulating import observatories

METHOD = 7
"""Version of the measurement: it rises when the same image, weights and options give other values or errors, or the
factors of a validation another meaning. 2: galaxies are measured again without their neighbours. 3: errors of radius
and index are calibrated, and counted, as those of logarithms. 4: the wings of a PSF from stars. 5: errors
include how well the light of a PSF from stars is known. 6: errors include sources that are hidden in a galaxy. 7: so
do those of fits; the error of the light of a PSF and galaxies listed twice count once; POINT_LIKE is by the PSF."""

_ROWS = 64
"""Rows of an image that tell it from another one."""


def identity(
    exposure: Exposure, described: dict[str, Any], *, positions: bool, fitting: Fitting | None
) -> dict[str, Any]:
    """Options of a measurement, with digests of the image and its maps; can be written as JSON.

    Parameters
    ----------
    exposure : Exposure
    described : dict
        What else the values of a catalogue depend on; numbers that are not finite become None.
    positions : bool
        Whether positions are measured instead of detected sources.
    fitting : Fitting, optional
        Options of the fits. A table that is the prior is known by its content.
    """
    out: dict[str, Any] = {
        "mosaic": _digest(exposure.image),
        "noise map": None if exposure.noise is None else _digest(exposure.noise),
        "mask": None if exposure.mask is None else _digest(exposure.mask),
        **described,
        "instrument": " ".join(filter(None, observatories.camera_of(exposure.image.header))),
        "positions": positions,
        "refine": options_of(fitting),
    }
    exposure.close()
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in out.items()}


def options_of(fitting: Fitting | None) -> dict[str, Any] | None:
    """Options of fits, as a run and a validation keep them; a table that is the prior is known by its content."""
    if fitting is None:
        return None
    prior = Path(fitting.prior)
    known = hashlib.sha256(prior.read_bytes()).hexdigest() if prior.is_file() else str(prior)
    return {**asdict(fitting), "prior": known, "fix": sorted(fitting.fix)}


def _digest(image: Image) -> str:
    """SHA-256 of the shape and of some rows of an image, which a copy of the file has, too."""
    seen = hashlib.sha256(repr(image.shape).encode())
    for row in np.unique(np.linspace(0, image.shape[0] - 1, _ROWS).astype(int)).tolist():
        seen.update(np.ascontiguousarray(image.read((slice(row, row + 1), slice(0, image.shape[1])))).tobytes())
    return seen.hexdigest()
