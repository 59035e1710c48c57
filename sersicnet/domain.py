"""What weights were trained on, and whether an image is of that kind.

A network gives an answer for any image. This module compares an image with the
card of the weights: for weights of one telescope pixel scale, width of the PSF and depth; for weights of
any telescope the shape of the PSF and the correlation of the noise; and the ranges of the results.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sersicnet.errors import InputError, warn
from sersicnet.image.psf import Width
from sersicnet.schema import DEPTH_TOLERANCE, PSF_TOLERANCE, SCALE_TOLERANCE, TARGET_NAMES

if TYPE_CHECKING:
    from sersicnet.image.header import Reading

REMEDY = "`sersicnet adapt` makes weights for such an image"


def number(value: Any) -> float:
    """A number of a card.

    Raises
    ------
    ValueError
        If it is none: text, true or false, NaN, infinite, or beyond 1e30.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
        raise ValueError(f"a finite number is wanted; received {str(value)[:40]!r}")
    return float(value)


class Seen(NamedTuple):
    """What is known of an image, to be compared with a card.

    Attributes
    ----------
    zero_point : Reading
    width : Width
        Of the PSF: of a file (`sersicnet.image.psf.Psf.width`) or of stars (`sersicnet.image.stars.width_of`).
    rms : ndarray, float, (N,)
        Noise of a blank pixel around each galaxy, image units; may be NaN.
    correlation : float
        Noise of a large aperture over that of uncorrelated pixels; see `sersicnet.image.pixels.correlation`.
    shape : ndarray, float, (3,), optional
        Of the PSF, see `sersicnet.image.views.shape_of`.
    """

    zero_point: Reading
    width: Width
    rms: np.ndarray
    correlation: float = 1.0
    shape: np.ndarray | None = None


class Verdict(NamedTuple):
    """The result of comparing an image with a card.

    Attributes
    ----------
    rows : ndarray, bool, (N,)
        Which galaxies lie outside of the domain.
    reasons : tuple of str
        What lies outside: "PSF", "depth", "noise correlation"; depth if most galaxies do.
    """

    rows: np.ndarray
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Domain:
    """The domain of weights, as their card states it.

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
        scale, fwhm, zero = (number(domain[key]) for key in ("pixel_scale", "psf_fwhm", "zero_point"))
        given = [domain.get("psf_fwhm_range") or (fwhm, fwhm), domain["rms"]]
        given += [domain["ranges"][name] for name in TARGET_NAMES]
        pairs = np.array([[number(value) for value in pair] for pair in given])
        if pairs.shape != (2 + len(TARGET_NAMES), 2) or not (pairs[:, 0] <= pairs[:, 1]).all():
            raise ValueError("its ranges are no pairs of a lower and an upper value")
        (first, last), (faint, loud), *ranges = pairs
        if not (scale > 0 and fwhm > 0 and first > 0 and faint > 0):
            raise ValueError("pixel scale, PSF and noise are positive")
        widths = float(first) / scale, float(last) / scale
        noise = float(faint), float(loud)
        return cls(str(card["name"]), scale, widths, zero, noise, *np.array(ranges).T)

    def out_of_range(self, targets: np.ndarray) -> np.ndarray:
        """Which parameters are outside of their range, bool, (N, 4); none of a galaxy with NaN.

        Parameters
        ----------
        targets : ndarray, float, (N, 4)
            With AB magnitudes.
        """
        outside = (targets < self.low) | (targets > self.high)
        return outside & np.isfinite(targets).all(axis=1, keepdims=True)

    def check_scale(self, scale: Reading, *, refine: bool = False) -> None:
        """Refuse an image of another pixel scale: its results would look right and be wrong.

        Parameters
        ----------
        scale : Reading
        refine : bool
            Whether fits follow, which exclude resampling.

        Raises
        ------
        InputError
            If the pixel scale is known and more than 5 % off.
        """
        if np.isfinite(scale.value) and abs(scale.value / self.pixel_scale - 1) > SCALE_TOLERANCE:
            way = "Fits need no network, and work at any pixel scale: `sersicnet fit`" if refine else "Give `resample`"
            raise InputError(
                f"The image has {scale.value:.4f} arcsec per pixel, {self.name} was trained at {self.pixel_scale:.6g}. "
                f"{way}; or {REMEDY}."
            )

    def compare(self, seen: Seen) -> Verdict:
        """Compare an image with the domain.

        Parameters
        ----------
        seen : Seen

        Returns
        -------
        Verdict

        Warns
        -----
        SersicnetWarning
            For everything that lies outside. A PSF lies outside if it is more than 20 %
            narrower or wider than all training PSFs, and by more than three times its error.
        """
        zero, width, rms = seen.zero_point, seen.width, seen.rms
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
                f"The noise of the image is {np.nanmedian(depth):.2g} at zero point {self.zero_point:.6g}, "
                f"{self.name} was trained at {self.rms[0]:g} to {self.rms[1]:g}: rows are flagged. {REMEDY}."
            )
        return Verdict(rows | outside, tuple(reasons))


SHAPE_TOLERANCE = 0.1
"""How far a PSF may be beyond the range of those trained on, as a fraction of the width of the range."""

WIDTH_TOLERANCE = 0.05
"""At least so much for its width, as a fraction of the smallest: those of one telescope are nearly alike."""

CORRELATION_TOLERANCE = 0.2
"""The same for the correlation of the noise, as a fraction of it."""

_WORDS = {
    "fwhm": "a full width of {} pixels",
    "light_1": "{} of its light within one full width of the centre",
    "light_2": "{} of its light within two full widths of the centre",
    "ellipticity": "an ellipticity of {}",
}


@dataclass(frozen=True)
class WideDomain:
    """The domain of weights for any telescope: shapes of PSFs, noise and galaxies, in pixels and units of the noise.

    Attributes
    ----------
    name : str
        Of the weights.
    psf : dict of (float, float)
        Ranges of the FWHM in pixels, of the light within one and two FWHM, and of the ellipticity.
    correlation : (float, float)
        Range of the noise of a large aperture over that of uncorrelated pixels.
    low, high : ndarray, float, (4,)
        Ranges of the targets, the magnitude relative to the noise.
    sizes : (float, float)
        Range of the effective radius over the FWHM of the PSF.
    """

    name: str
    psf: dict[str, tuple[float, float]]
    correlation: tuple[float, float]
    low: np.ndarray
    high: np.ndarray
    sizes: tuple[float, float] = (0.0, np.inf)

    @classmethod
    def of(cls, card: Mapping[str, Any]) -> WideDomain:
        """Read the domain of a card; the errors are those of `Domain.of`."""
        domain = card["domain"]
        given = [domain["psf"][name] for name in _WORDS] + [domain["correlation"]]
        given += [domain["ranges"][name] for name in TARGET_NAMES] + [domain.get("radius_over_fwhm", (0, 1e9))]
        pairs = np.array([[number(value) for value in pair] for pair in given])
        if pairs.shape != (len(given), 2) or not (pairs[:, 0] <= pairs[:, 1]).all():
            raise ValueError("its ranges are no pairs of a lower and an upper value")
        n = len(_WORDS)
        ranges = [(float(low), float(high)) for low, high in pairs[: n + 1]]
        low, high = pairs[n + 1 : -1].T
        sizes = float(pairs[-1, 0]), float(pairs[-1, 1])
        return cls(str(card["name"]), dict(zip(_WORDS, ranges, strict=False)), ranges[n], low, high, sizes)

    def out_of_range(self, targets: np.ndarray, fwhm: float = np.nan) -> np.ndarray:
        """Which parameters are outside of their range, bool, (N, 4); none of a galaxy with NaN.

        Parameters
        ----------
        targets : ndarray, float, (N, 4)
            With magnitudes relative to the noise.
        fwhm : float
            Of the PSF, pixels: radii are also compared in units of it, unless it is NaN.
        """
        outside = (targets < self.low) | (targets > self.high)
        outside[:, 1] |= (targets[:, 1] < self.sizes[0] * fwhm) | (targets[:, 1] > self.sizes[1] * fwhm)
        return outside & np.isfinite(targets).all(axis=1, keepdims=True)

    def compare(self, seen: Seen) -> Verdict:
        """Compare an image with the domain; see `Domain.compare`."""
        outside, reasons = [], []
        values = [seen.width.value, *(np.full(3, np.nan) if seen.shape is None else seen.shape)]
        for (name, words), value in zip(_WORDS.items(), values, strict=True):
            low, high = self.psf[name]
            margin = max(SHAPE_TOLERANCE * (high - low), WIDTH_TOLERANCE * low if name == "fwhm" else 0)
            if value < low - margin or value > high + margin:
                outside.append(f"{words.format(f'{value:.3g}')}, {self.name} is for {low:.3g} to {high:.3g}")
        if outside:
            reasons.append("PSF")
            warn(f"The image's PSF ({seen.width.source}) has {'; and '.join(outside)}: every row is flagged.")
        low, high = self.correlation
        if not low * (1 - CORRELATION_TOLERANCE) <= seen.correlation <= high * (1 + CORRELATION_TOLERANCE):
            reasons.append("noise correlation")
            warn(
                f"The noise of a large aperture is {seen.correlation:.2f} times that of independent pixels, "
                f"{self.name} is for {low:.2f} to {high:.2f}: every row is flagged."
            )
        return Verdict(np.full(len(seen.rms), bool(reasons)), tuple(reasons))


def read(card: Mapping[str, Any]) -> Domain | WideDomain:
    """The domain of a card; the errors are those of `Domain.of`."""
    return WideDomain.of(card) if card["domain"].get("telescopes") else Domain.of(card)
