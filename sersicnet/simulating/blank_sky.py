"""Blank sky of real images, as the noise of simulations."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sersicnet.engine.noise import correlated_noise
from sersicnet.errors import InputError, warn
from sersicnet.schema import SCALE_TOLERANCE
from sersicnet.simulating.telescopes import Instrument

PATCH = 224
"""Side of a patch of blank sky: a scene with neighbours, and 32 pixels to move it by."""

MOST_PATCHES = 256
LEAST_PATCHES = 8
_WINDOW = 1024
_COVERED_LIMIT = 0.15
_GROWN = 4


@dataclass(frozen=True, eq=False)
class BlankSky:
    """The noise of a real image: patches of it, or its power spectrum.

    Attributes
    ----------
    name : str
    sha256 : str
        Of patches, noise and autocorrelation.
    patches : ndarray, float32, (P, 224, 224)
        Blank sky, its level subtracted; P = 0 if the image has too little of it.
    rms : ndarray, float64, (P,) or (2,)
        Noise of a blank pixel in each patch; without patches, the lowest and
        the highest of the image.
    autocorrelation : ndarray, float64, (7, 7)
        See `sersicnet.image.pixels.Sky`.
    """

    name: str
    sha256: str
    patches: np.ndarray
    rms: np.ndarray
    autocorrelation: np.ndarray

    def draw(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, float]:
        """A piece of noise and the rms of its pixels.

        A patch at random, cut at a random place, in one of its eight
        orientations; without patches, normal noise with the power spectrum.

        Returns
        -------
        noise : ndarray, float32, (size, size)
        rms : float
        """
        if not len(self.patches):
            rms = float(np.exp(rng.uniform(*np.log(self.rms))))
            return rms * correlated_noise(rng, size, self.autocorrelation), rms
        k = int(rng.integers(len(self.patches)))
        y, x = rng.integers(PATCH - size + 1, size=2)
        piece = np.rot90(self.patches[k, y : y + size, x : x + size], int(rng.integers(4)))
        return (piece.T if rng.random() < 0.5 else piece).copy(), float(self.rms[k])

    def applied(self, instrument: Instrument) -> Instrument:
        """The instrument, with the noise range of this sky."""
        return replace(instrument, rms_low=float(self.rms.min()), rms_high=float(self.rms.max()))

    def record(self) -> dict[str, Any]:
        """What names it in a dataset's configuration."""
        return {"name": self.name, "sha256": self.sha256, "patches": len(self.patches)}


def blank_sky(path: str | Path, instrument: Instrument, zero_point: float | None = None) -> BlankSky:
    """Find blank sky in an image.

    The image is searched in windows of 1024 pixels in random order (always the
    same; they overlap where they do not fit), with the default
    `sersicnet.image.detect.Detector`. A patch is blank if it has
    data everywhere and sources, grown by four pixels, cover at most 15 % of it.
    Their pixels are replaced by normal noise with the power spectrum of the
    window's sky and the rms of the place. Neighbouring patches overlap by half.

    Parameters
    ----------
    path : str or Path
        FITS image; an extension may be given in brackets.
    instrument : Instrument
        Of the simulation: the noise is brought to its zero point.
    zero_point : float, optional
        AB magnitude of one unit of the image; from its header by default.

    Returns
    -------
    BlankSky
        At most 256 patches; none if fewer than 8 were found.

    Raises
    ------
    InputError
        If the image cannot be read, states no zero point, or has no noise.

    Warns
    -----
    SersicnetWarning
        If there are too few blank patches, or the pixel scale is another one.
    """
    from skimage.segmentation import expand_labels

    # Training on datasets, which needs no Astropy, imports this module too.
    from sersicnet.image import detect, mosaic
    from sersicnet.image import header as instruments

    frame = mosaic.read_image(path)
    zero = instruments.zero_point(frame.header, zero_point, frame.scales).value
    scale = instruments.pixel_scale(frame.scales).value
    if abs(scale / instrument.pixel_scale - 1) > SCALE_TOLERANCE:
        warn(
            f"{frame.name} has {scale:.3g} arcsec per pixel, the simulation {instrument.pixel_scale:g}: "
            "its noise is used as it is, pixel by pixel."
        )
    factor = 10 ** (0.4 * (instrument.zero_point - zero))
    bad = frame.without_data()
    rng = np.random.default_rng(0)
    patches: list[np.ndarray] = []
    rms: list[float] = []
    levels: list[np.ndarray] = []
    autocorrelations, weights = [], []
    for window in _windows(frame.data.shape, rng):
        if bad[window].mean() > 0.5:
            continue
        sky, found = detect.Detector()(frame.data[window], bad[window])
        covered = expand_labels(found.segmentation, _GROWN) > 0
        autocorrelations.append(sky.autocorrelation)
        weights.append((~(covered | bad[window])).sum())
        levels.append(np.nanpercentile(sky.rms, [5, 95]) * factor)
        clean = frame.data[window] - sky.level
        side = max(clean.shape)
        filled = np.where(
            covered,
            correlated_noise(rng, side, sky.autocorrelation)[: clean.shape[0], : clean.shape[1]] * sky.rms,
            clean,
        )
        for part in _patches(covered, bad[window]):
            with np.errstate(over="ignore"):  # by a wrong zero point: what stamps cannot hold is refused
                patches.append((filled[part] * factor).astype(np.float32))
            rms.append(float(np.median(sky.rms[part])) * factor)
        if len(patches) >= MOST_PATCHES:
            break
    if not autocorrelations:
        raise InputError(f"{frame.name} has no region with data to take noise from. Choose another image.")
    autocorrelation = np.average(autocorrelations, axis=0, weights=np.maximum(weights, 1))
    autocorrelation[tuple(n // 2 for n in autocorrelation.shape)] = 1
    if len(patches) >= LEAST_PATCHES:
        kept, noise = np.array(patches[:MOST_PATCHES]), np.array(rms[:MOST_PATCHES])
    else:
        warn(
            f"{frame.name} has {len(patches)} blank patches of {PATCH} x {PATCH} pixels, {LEAST_PATCHES} are needed: "
            "the noise is drawn with its power spectrum instead."
        )
        kept = np.zeros((0, PATCH, PATCH), np.float32)
        noise = np.array([np.min(levels), np.max(levels)])
    digest = hashlib.sha256(kept.tobytes() + noise.tobytes() + autocorrelation.tobytes())
    return BlankSky(Path(path).name, digest.hexdigest(), kept, noise, autocorrelation)


def _windows(shape: tuple[int, ...], rng: np.random.Generator) -> Iterator[tuple[slice, slice]]:
    rows, columns = (np.linspace(0, max(n - _WINDOW, 0), max(1, -(-n // _WINDOW))).round().astype(int) for n in shape)
    corners = [(y, x) for y in rows for x in columns]
    for i in rng.permutation(len(corners)):
        y, x = corners[i]
        yield slice(y, y + _WINDOW), slice(x, x + _WINDOW)


def _patches(covered: np.ndarray, bad: np.ndarray) -> Iterator[tuple[slice, slice]]:
    height, width = covered.shape
    for y in range(0, height - PATCH + 1, PATCH // 2):
        for x in range(0, width - PATCH + 1, PATCH // 2):
            part = slice(y, y + PATCH), slice(x, x + PATCH)
            if not bad[part].any() and covered[part].mean() <= _COVERED_LIMIT:
                yield part
