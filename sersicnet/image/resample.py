"""An exposure on a grid of another pixel scale."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS, Sip
from numpy.typing import ArrayLike

from sersicnet.errors import InputError
from sersicnet.image import header as headers
from sersicnet.image.celestial import WCS_CARD
from sersicnet.image.exposure import Exposure
from sersicnet.image.pixels import Pixels, Window

MOST_RESAMPLING = 10.0
"""Largest change of the pixel scale, up or down."""


MISSING = 1e-3
"""A resampled pixel has no data if more than this fraction of its area has none. A smaller missing fraction changes its
flux, of the sky too, by far less than the noise, and is far above the rounding errors of the overlaps."""


@dataclass(frozen=True)
class Resampled:
    """An exposure on a grid of another pixel scale, read window by window.

    The first corner and the axes are kept. A pixel of the image is a box of uniform
    brightness, and each new pixel sums the boxes by the area that it shares with them.
    Flux is conserved, so that one unit of a new pixel is the same flux as one unit of an
    old pixel, and the zero point of the image still applies. An image in surface
    brightness is treated alike: its values are fluxes in units of MJy/sr times the area
    of an old pixel.

    Both boxes broaden the image: in old pixels, the variance of a PSF along each axis
    grows by (1 + 1 / factor**2) / 12, or by |1 - 1 / factor**2| / 12 if one pixel scale is
    a multiple of the other. The noise of neighbouring pixels becomes correlated, or more
    correlated.

    Attributes
    ----------
    exposure : Exposure
    factor : float
        Old pixel scale over the new one, which is the number of new pixels along an old pixel.

    Raises
    ------
    InputError
        If the factor is not from 0.1 to 10.
    """

    exposure: Exposure
    factor: float

    def __post_init__(self) -> None:
        if not 1 / MOST_RESAMPLING <= self.factor <= MOST_RESAMPLING:
            raise InputError(
                f"Resampling changes a pixel scale by a factor of up to {MOST_RESAMPLING:g}; received {self.factor:g}. "
                "Bin or interpolate the image by other means first."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width; the last row and column may extend beyond the image."""
        height, width = (int(np.ceil(n * self.factor - MISSING)) for n in self.exposure.shape)
        return height, width

    @property
    def saturation(self) -> float:
        """Value at and above which a pixel is saturated; infinite if it is not known."""
        return self.exposure.saturation / self.factor**2

    def to_grid(self, old: ArrayLike) -> np.ndarray:
        """Convert zero-based pixels of the image to pixels of the grid, along either axis."""
        return (np.asarray(old) + 0.5) * self.factor - 0.5

    def from_grid(self, new: ArrayLike) -> np.ndarray:
        """Convert zero-based pixels of the grid to pixels of the image, along either axis."""
        return (np.asarray(new) + 0.5) / self.factor - 0.5

    @property
    def wcs(self) -> WCS | None:
        """Celestial coordinates of the grid; None if the image has none."""
        if self.exposure.image.wcs is None:
            return None
        out = self.exposure.image.wcs.deepcopy()
        out.wcs.crpix = self.to_grid(out.wcs.crpix - 1) + 1
        if out.wcs.has_cd():
            out.wcs.cd = out.wcs.cd / self.factor
        else:
            out.wcs.cdelt = out.wcs.cdelt / self.factor
        if out.sip is not None:
            sip = out.sip
            planes = [None if plane is None else self._sip(plane) for plane in (sip.a, sip.b, sip.ap, sip.bp)]
            out.sip = Sip(*planes, self.to_grid(sip.crpix - 1) + 1)
        out.pixel_shape = self.shape[::-1]
        out.wcs.set()
        return out

    def _sip(self, coefficients: np.ndarray) -> np.ndarray:
        """SIP distortion coefficients for offsets in pixels of the grid."""
        powers = np.add.outer(*[np.arange(n) for n in coefficients.shape])
        return coefficients * self.factor ** (1.0 - powers)

    @property
    def header(self) -> fits.Header:
        """The image's header with the WCS of the grid and the saturation level of its pixels.

        A unit of surface brightness is replaced by the zero point of the flux in an old pixel.
        """
        header = self.exposure.image.header.copy()
        for keyword in list(header):
            if WCS_CARD.fullmatch(keyword) or re.fullmatch(r"[AB]P?_(\d_\d|ORDER|DMAX)", keyword):
                header.remove(keyword, ignore_missing=True, remove_all=True)
        if self.wcs is not None:
            header.update(self.wcs.to_header(relax=True))
        if isinstance(header.get("SATURATE"), float | int):
            header["SATURATE"] /= self.factor**2
        if headers.is_surface_brightness(headers.unit_of(header)):
            known = self.exposure.zero_point.value
            with suppress(InputError):  # the user then gives the zero point
                old = self.exposure.image
                header["MAGZERO"] = (
                    known if np.isfinite(known) else headers.zero_point(old.header, None, old.scales).value
                )
            for keyword in ("BUNIT", "PHOTFLAM", "PHOTPLAM", "FLUXMAG0"):
                header.remove(keyword, ignore_missing=True)
        return header

    def read(self, window: Window) -> Pixels:
        """The pixels of a window; pixels without data are NaN.

        Values do not depend on the window. The noise of old pixels is taken to be uncorrelated.
        """
        taps = [self._taps(part, n) for part, n in zip(window, self.exposure.shape, strict=True)]
        rows, columns = (slice(int(index.min()), int(index.max()) + 1) for index, _ in taps)
        data, bad, noise = self.exposure.read((rows, columns))
        inner = [(index - part.start, weight) for (index, weight), part in zip(taps, (rows, columns), strict=True)]
        missing = 1 - _summed(~bad, inner, 1) * self.factor**2
        without = missing > MISSING
        out = np.where(without, np.nan, _summed(np.where(bad, 0, data), inner, 1)).astype(np.float32)
        if noise is None:
            return Pixels(out, without)
        # A variance may overflow single precision where its square root does not.
        variance = _summed(np.where(bad, 0, noise).astype(float) ** 2, inner, 2)
        return Pixels(out, without, np.where(without, np.nan, np.sqrt(variance)).astype(np.float32))

    def _taps(self, part: slice, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the old pixels along an axis that each new pixel overlaps, and the overlaps, (K, N)."""
        new = np.arange(part.start, part.stop)
        low, high = new / self.factor, (new + 1) / self.factor
        old = np.floor(low).astype(int) + np.arange(int(np.ceil(1 / self.factor)) + 1)[:, None]
        share = np.maximum(np.minimum(high, old + 1) - np.maximum(low, old), 0)
        return np.minimum(old, n - 1), np.where(old < n, share, 0.0)

    def close(self) -> None:
        """Close all files."""
        self.exposure.close()


def _summed(values: np.ndarray, taps: list[tuple[np.ndarray, np.ndarray]], power: int) -> np.ndarray:
    """Sums of pixels weighted by a power of their overlaps along y and x, float64.

    The terms are added in a fixed order, so that the sums are the same in every window.
    """
    for axis, (indices, shares) in enumerate(taps):
        form = (-1, 1) if axis == 0 else (1, -1)
        total = np.zeros(1)
        for index, share in zip(indices, shares, strict=True):
            total = total + (share**power).reshape(form) * np.take(values, index, axis)
        values = total
    return values
