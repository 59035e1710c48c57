"""What weights were trained on, and whether an image is of that kind.

A network answers whatever it is shown. This module compares an image with the
card of the weights: pixel scale, width of the PSF, depth, and the ranges of what
comes out. The width of the PSF is taken from a file, or from the image's own
point sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import ndimage

from sersicnet.errors import InputError, warn
from sersicnet.image.psf import Width
from sersicnet.schema import DEPTH_TOLERANCE, PSF_TOLERANCE, SCALE_TOLERANCE, TARGET_NAMES
from sersicnet.simulating.blank_sky import full_width, read_psf

if TYPE_CHECKING:
    from pathlib import Path

    from sersicnet.image import detect
    from sersicnet.image.header import Reading
    from sersicnet.image.pixels import Sky

REMEDY = "`sersicnet adapt` makes weights for such an image"


class Verdict(NamedTuple):
    """What the comparison of an image with a card gave.

    Attributes
    ----------
    rows : ndarray, bool, (N,)
        Which galaxies lie outside of the domain.
    reasons : tuple of str
        What lies outside: "PSF", "depth"; depth if most galaxies do.
    """

    rows: np.ndarray
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Domain:
    """The domain of weights, as their card tells it.

    Attributes
    ----------
    name : str
        Of the weights.
    pixel_scale : float
        Arcsec per pixel.
    widths : (float, float)
        Least and largest full width at half maximum of the PSFs, pixels.
    zero_point : float
        Of `rms`.
    rms : (float, float)
        Least and largest noise of a blank pixel.
    low, high : ndarray, float, (4,)
        Ranges of the targets, the magnitude AB.
    """

    name: str
    pixel_scale: float
    widths: tuple[float, float]
    zero_point: float
    rms: tuple[float, float]
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, card: Mapping[str, Any]) -> Domain:
        """Read the domain of a card.

        Cards without ``psf_fwhm_range`` know one width.

        Raises
        ------
        KeyError, TypeError, ValueError
            If something is missing or makes no sense.
        """
        domain = card["domain"]
        scale = float(domain["pixel_scale"])
        fwhm = domain["psf_fwhm"]
        first, last = domain.get("psf_fwhm_range") or (fwhm, fwhm)
        faint, loud = domain["rms"]
        ranges = np.array([domain["ranges"][name] for name in TARGET_NAMES], float)
        pairs = np.array([[first, last], [faint, loud], *ranges], float)
        if ranges.shape != (len(TARGET_NAMES), 2) or not (pairs[:, 0] <= pairs[:, 1]).all():
            raise ValueError("its ranges are no pairs of a lower and an upper value")
        if not (scale > 0 and first > 0 and faint > 0):
            raise ValueError("pixel scale, PSF and noise are positive")
        widths = float(first) / scale, float(last) / scale
        noise = float(faint), float(loud)
        return cls(str(card["name"]), scale, widths, float(domain["zero_point"]), noise, *ranges.T)

    def out_of_range(self, targets: np.ndarray) -> np.ndarray:
        """Which parameters are outside of their range, bool, (N, 4); none of a galaxy with NaN.

        Parameters
        ----------
        targets : ndarray, float, (N, 4)
            With AB magnitudes.
        """
        outside = (targets < self.low) | (targets > self.high)
        return outside & np.isfinite(targets).all(axis=1, keepdims=True)

    def check_scale(self, scale: Reading) -> None:
        """Refuse an image of another pixel scale: nothing would be right, and everything look so.

        Raises
        ------
        InputError
            If the pixel scale is known and more than 5 % off.
        """
        if np.isfinite(scale.value) and abs(scale.value / self.pixel_scale - 1) > SCALE_TOLERANCE:
            raise InputError(
                f"The image has {scale.value:.4f} arcsec per pixel, {self.name} was trained at {self.pixel_scale}. "
                f"Give `resample`; or {REMEDY}."
            )

    def compare(self, zero: Reading, width: Width, rms: np.ndarray) -> Verdict:
        """Compare an image with the domain.

        Parameters
        ----------
        zero : Reading
            Zero point of the image.
        width : Width
            See `width_of_file` and `width_of_points`.
        rms : ndarray, float, (N,)
            Noise of a blank pixel around each galaxy, image units; may be NaN.

        Returns
        -------
        Verdict

        Warns
        -----
        SersicnetWarning
            For everything that lies outside. A PSF does so when it is narrower or
            wider than all that were trained on by 20 %, and by three times its error.
        """
        rows = np.zeros(len(rms), bool)
        reasons = []
        narrow, wide = self.widths[0] * (1 - PSF_TOLERANCE), self.widths[1] * (1 + PSF_TOLERANCE)
        if width.value + 3 * width.error < narrow or width.value - 3 * width.error > wide:
            reasons.append("PSF")
            rows[:] = True
            trained = " to ".join(dict.fromkeys(f"{w:.2f}" for w in self.widths))
            warn(
                f"The image's PSF has a full width of {width.value:.2f} pixels ({width.source}), {self.name} was "
                f"trained at {trained}: every row is flagged. {REMEDY}. If this width is wrong, give `psf`."
            )
        depth = rms * 10 ** (0.4 * (self.zero_point - zero.value))
        with np.errstate(invalid="ignore"):
            outside = (depth < self.rms[0] / DEPTH_TOLERANCE) | (depth > self.rms[1] * DEPTH_TOLERANCE)
        if len(outside) and outside.mean() > 0.5:
            reasons.append("depth")
            warn(
                f"The noise of the image is {np.nanmedian(depth):.2g} at zero point {self.zero_point}, "
                f"{self.name} was trained at {self.rms[0]:g} to {self.rms[1]:g}: rows are flagged. {REMEDY}."
            )
        return Verdict(rows | outside, tuple(reasons))


# --- the width of a PSF -------------------------------------------------------------------------------

REACH = 12
"""Half the side of the square in which a source is looked at, pixels."""

MOST_SOURCES = 1000
"""Detections that are looked at, those of the highest mean surface brightness."""

LEAST_SNR = 50.0
"""Peak over noise that a point source needs: its width is good to about 1 % then."""

LEAST_POINTS = 8
_ROUND = 0.1
_SAME_WIDTH = 0.05
_SAME_SHAPE = 0.04
_NEARBY = 0.15
_CONTRAST = 4.0
_NARROWER = 0.25


def width_of_file(path: str | Path, oversampling: int = 1) -> Width:
    """Width of the PSF in a FITS file; see `sersicnet.simulating.blank_sky.read_psf` for what it may be."""
    psf = read_psf(path)
    if oversampling < 1:
        raise InputError(f"A PSF is oversampled by a whole number from 1; received {oversampling}.")
    return Width(full_width(psf.image) / oversampling, 0.0, psf.name)


def width_of_points(data: np.ndarray, bad: np.ndarray, sky: Sky, found: detect.Detections) -> Width:
    """Width of the PSF, from the point sources of an image.

    Stars share one width and one profile, galaxies are broader and differ: stars
    are a narrow heap at the lower end of the widths. Each bright and round source
    gets a Gaussian through the logarithm of its pixels above a quarter of its peak,
    which is 1 to 4 % wider than the PSF (HST's, and Moffat with beta = 3, from
    2.1 to 6.3 pixels), and the light within 1.5 widths, in units of that of the
    core. At least `LEAST_POINTS` sources must agree in both, within 5 and 4 %; they
    must be more than four times as many, by `LEAST_POINTS`, as the sources of other
    widths nearby let expect; and few sources may be narrower.

    Parameters
    ----------
    data : ndarray, float32, (H, W)
        Image, sky included.
    bad : ndarray, bool, (H, W)
    sky : Sky
    found : Detections

    Returns
    -------
    Width
        NaN where there are too few point sources to tell.
    """
    looked_at = profiles(data, bad, sky, found)
    return width_of_profiles(looked_at[points_among(looked_at)])


def points_among(found: np.ndarray) -> np.ndarray:
    """Which of the `profiles` of an image are those of points: their rows, int, (M,); see `width_of_points`."""
    brightest = np.argsort(-found[:, 2], kind="stable")[:MOST_SOURCES]
    return brightest[_heap(*found[brightest, :2].T)]


def width_of_profiles(found: np.ndarray) -> Width:
    """Width of the PSF, from the `profiles` of points."""
    chosen = found[:, 0]
    if not len(chosen):
        return Width(np.nan, np.nan, "too few point sources")
    value, scatter = float(np.median(chosen)), float(np.std(chosen))
    return Width(value, 1.25 * scatter / len(chosen) ** 0.5, f"{len(chosen)} point sources")


def _heap(widths: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Which sources are points, by their widths and light: their rows, int, (M,)."""
    order = np.argsort(widths)
    width, light = np.log(widths[order]), np.log(light[order])
    ends = np.searchsorted(width, width + _SAME_WIDTH, side="right")
    best, chosen = 0.0, np.zeros(0, int)
    for first, end in enumerate(ends):
        if end - first < LEAST_POINTS:
            continue
        alike = np.abs(light - np.median(light[first:end])) < _SAME_SHAPE
        n = int(alike[first:end].sum())
        near = alike & (width > width[first] - _NEARBY) & (width < width[first] + _SAME_WIDTH + _NEARBY)
        expected = (near.sum() - n) * _SAME_WIDTH / (2 * _NEARBY)
        alone = n >= LEAST_POINTS + _CONTRAST * expected and alike[:first].sum() <= _NARROWER * n
        if alone and n - expected > best:
            best, chosen = n - expected, order[first:end][alike[first:end]]
    return chosen


def profiles(
    data: np.ndarray,
    bad: np.ndarray,
    sky: Sky,
    found: detect.Detections,
    which: np.ndarray | None = None,
    origin: tuple[int, int] = (0, 0),
) -> np.ndarray:
    """What tells whether bright and round sources are points.

    Parameters
    ----------
    data, bad, sky, found
        As for `width_of_points`, of an image or a window of it.
    which : ndarray, bool, (N,), optional
        Which detections to look at.
    origin : (int, int)
        x and y of the first pixel of the arrays.

    Returns
    -------
    ndarray, float64, (M, 4)
        Width of the core [pix], light in units of its own, mean surface brightness, and
        the number of the detection.
    """
    rows = []
    offset_y, offset_x = np.indices((2 * REACH + 1, 2 * REACH + 1)) - REACH
    distance = np.hypot(offset_x, offset_y)
    with np.errstate(invalid="ignore", divide="ignore"):
        brightness = found.flux / found.area
    brightest = np.argsort(-brightness, kind="stable")
    if which is not None:
        brightest = brightest[which[brightest]]
    for i in brightest[:MOST_SOURCES]:
        x, y = float(found.x[i]) - origin[0], float(found.y[i]) - origin[1]
        if not (np.isfinite(x) and np.isfinite(y)):
            continue
        column, row = _peak(data, round(x), round(y))
        part = slice(row - REACH, row + REACH + 1), slice(column - REACH, column + REACH + 1)
        if min(row, column) < REACH or data[part].shape != distance.shape or bad[part].any():
            continue
        box = data[part] - sky.level[part]
        peak = float(box[REACH, REACH])
        if not peak > LEAST_SNR * sky.rms[row, column]:
            continue
        labels, _ = ndimage.label(box > peak / 4)
        inside = (labels == labels[REACH, REACH]) | (distance < 1.5)
        used = inside & (box > peak / 50)
        if used.sum() < 9 or used[distance > REACH - 0.5].any():
            continue
        core = _gaussian(offset_x[used], offset_y[used], box[used] / peak)
        if core is not None and core.ellipticity < _ROUND and 1.5 * core.fwhm < REACH - 1:
            radius = np.hypot(offset_x - core.x, offset_y - core.y) / core.fwhm
            light = float(box[radius < 1.5].sum()) / (peak * core.height * core.fwhm**2)
            if light > 0:
                rows.append((core.fwhm, light, brightness[i], i))
    return np.array(rows).reshape(-1, 4)


def _peak(data: np.ndarray, column: int, row: int) -> tuple[int, int]:
    """The brightest pixel within two of a place; the place itself at an edge."""
    if row < 2 or column < 2:
        return column, row
    near = data[row - 2 : row + 3, column - 2 : column + 3]
    if near.shape != (5, 5):
        return column, row
    up, right = np.unravel_index(np.argmax(near), near.shape)
    return column + int(right) - 2, row + int(up) - 2


class _Core(NamedTuple):
    fwhm: float
    ellipticity: float
    x: float
    y: float
    height: float


def _gaussian(x: np.ndarray, y: np.ndarray, values: np.ndarray) -> _Core | None:
    """The Gaussian through some pixels, if there is one."""
    terms = np.column_stack([np.ones(len(x)), x, y, x * x, x * y, y * y])
    c = np.linalg.lstsq(terms * values[:, None], np.log(values) * values, rcond=None)[0]
    inverse = -np.array([[2 * c[3], c[4]], [c[4], 2 * c[5]]])
    curvature = np.linalg.eigvalsh(inverse)
    if not curvature[0] > 0:
        return None
    x0, y0 = np.linalg.solve(inverse, c[1:3])
    long, short = 1 / np.sqrt(curvature)
    height = np.exp(c[0] + (c[1] * x0 + c[2] * y0) / 2)
    fwhm = np.sqrt(8 * np.log(2) * long * short)
    return _Core(float(fwhm), float(1 - short / long), float(x0), float(y0), float(height))
