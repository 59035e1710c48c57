"""How faint the sources of a catalogue are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

APERTURE = 6.0
"""Diameter of the aperture in pixels if the width of the PSF is not known."""

ENOUGH = 30
"""Sources that are needed to find where the counts turn over."""

EXTREME = 15.0
"""Magnitudes farther than this from the median are no measurements, and are not counted."""


class Depth(NamedTuple):
    """How faint a source may be.

    Attributes
    ----------
    mag : float
        AB magnitude of five times the noise of an aperture; the light outside of it is not added.
    diameter : float
        Diameter of the aperture, pixels.
    """

    mag: float
    diameter: float


def depth(meta: Mapping[str, Any]) -> Depth | None:
    """The 5 sigma depth by the header of a catalogue; None if it lacks a number.

    The aperture is twice as wide as the PSF, or `APERTURE` pixels wide if that is not known. Its
    noise is that of a blank pixel, SKYRMS, times the root of its area and NOISECOR, the factor of
    large apertures, which overestimates the noise of a small one.
    """
    try:
        zero, rms, factor = (float(meta[key]) for key in ("ZEROPT", "SKYRMS", "NOISECOR"))
        width = float(meta.get("PSFFWHM", np.nan))
    except (KeyError, TypeError, ValueError):
        return None
    diameter = 2 * width if width > 0 else APERTURE
    noise = rms * factor * np.sqrt(np.pi / 4) * diameter
    if not (noise > 0 and np.isfinite(noise) and np.isfinite(zero)):
        return None
    return Depth(float(zero - 2.5 * np.log10(5 * noise)), diameter)


def turnover(mag: np.ndarray) -> tuple[float, float] | None:
    """The half magnitude that holds most sources; None if there are fewer than `ENOUGH`, or none is fainter."""
    edges, counts = half_magnitudes(mag)
    if counts.sum() < ENOUGH or not counts[counts.argmax() + 1 :].any():
        return None
    return float(edges[counts.argmax()]), float(edges[counts.argmax() + 1])


def half_magnitudes(mag: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges of bins of half a magnitude, and the number of sources in each."""
    mag = mag[np.isfinite(mag)]
    if len(mag):
        mag = mag[np.abs(mag - np.median(mag)) <= EXTREME]
    if not len(mag):
        return np.array([20.0, 20.5]), np.zeros(1, int)
    edges = np.arange(np.floor(2 * mag.min()), np.floor(2 * mag.max()) + 2) / 2
    return edges, np.histogram(mag, edges)[0]
