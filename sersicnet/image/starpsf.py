"""The PSF of an image from its own stars: where they are looked for, which are taken, and how the PSF varies over the image."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from sersicnet.image.detect import Detections, Detector
from sersicnet.image.epsf import LEAST_STARS, EffectivePsf, StarStamps, measure_psf
from sersicnet.image.pixels import Pixels, Sky, Source, Window
from sersicnet.image.psf import full_width
from sersicnet.image.sky import Map, Mesh
from sersicnet.image.stamps import cut
from sersicnet.image.stars import profiles, saturated, sizes, stellar_locus

WINDOW = 1024
"""Side of the windows in which stars are looked for, pixels."""

WINDOWS = 4
"""Windows along an axis of a large image, in one round; every pixel of a smaller image is searched."""

ROUNDS = 2
"""Rounds of windows in which stars are looked for, the second one between the windows of the first."""

ENOUGH = 60
"""Stars that make a second round of windows unnecessary."""

MOST_STARS = 200
"""Stars that a PSF is measured from at most."""

MOST_IN_A_WINDOW = 128
"""Sources of a window whose stamps are kept at most, those of the highest surface brightness."""

BROAD = 4.0
"""FWHM above which stars are looked for in blocks of 2 x 2 pixels, too: the search in single pixels ends at 7 pixels."""

GROWN = 3
"""Pixels by which the masks of neighbours are dilated once more."""

_SAME_WIDTH = 0.05
_LEAST_SNR = 50.0


class _Candidates(NamedTuple):
    """Sources of a window that may be stars."""

    fine: np.ndarray  # `profiles` whose last column is the row of the stamp, -1 for none
    coarse: np.ndarray  # the same in blocks of 2 x 2 pixels
    x: np.ndarray
    y: np.ndarray
    snr: np.ndarray
    clipped: np.ndarray
    single: np.ndarray
    stamps: StarStamps
    data: float  # fraction of the window with data
    correlation: float


def _blocks(pixels: Pixels, sky: Sky, found: Detections) -> tuple[np.ndarray, np.ndarray, Sky, Detections]:
    """Image, mask, sky and detections in blocks of 2 x 2 pixels."""

    def mean(values: np.ndarray) -> np.ndarray:
        height, width = (n // 2 * 2 for n in values.shape)
        return values[:height, :width].reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3), dtype=np.float32)

    bad = mean(pixels.bad) > 0
    data = mean(np.where(pixels.bad, sky.level, pixels.data))
    noise = mean(sky.rms) * np.float32(min(sky.correlation, 2) / 2)
    level = Sky(mean(sky.level), noise, sky.autocorrelation, sky.map_factor)
    return data, bad, level, replace(found, area=found.area / 4)
