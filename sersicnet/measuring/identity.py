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
    refine = None if fitting is None else asdict(fitting)
    if refine is not None and Path(refine["prior"]).is_file():
        refine["prior"] = hashlib.sha256(Path(refine["prior"]).read_bytes()).hexdigest()
    out: dict[str, Any] = {
        "mosaic": _digest(exposure.image),
        "noise map": None if exposure.noise is None else _digest(exposure.noise),
        "mask": None if exposure.mask is None else _digest(exposure.mask),
        **described,
        "saturation": exposure.saturation,
        "instrument": " ".join(filter(None, observatories.camera_of(exposure.image.header))),
        "positions": positions,
        "refine": refine,
    }
    exposure.close()
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in out.items()}


def _digest(image: Image) -> str:
    """SHA-256 of the shape and of some rows of an image, which a copy of the file has, too."""
    seen = hashlib.sha256(repr(image.shape).encode())
    for row in np.unique(np.linspace(0, image.shape[0] - 1, _ROWS).astype(int)).tolist():
        seen.update(np.ascontiguousarray(image.read((slice(row, row + 1), slice(0, image.shape[1])))).tobytes())
    return seen.hexdigest()
