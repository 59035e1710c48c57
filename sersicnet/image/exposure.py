"""An image with the maps that belong to it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sersicnet.image.mosaic import Image
from sersicnet.image.pixels import ZERO_REACH, Pixels, Window, grown, within, without_data


class Exposure(NamedTuple):
    """An image with the maps that belong to it, read window by window.

    Attributes
    ----------
    image : Image
    noise : Image or None
        Of the same shape.
    kind : str
        What `noise` holds: "rms", "var" (variance) or "wht" (inverse variance), in any
        unit.
    mask : Image or None
        Of the same shape; pixels that are not zero are ignored.
    """

    image: Image
    noise: Image | None = None
    kind: str = "rms"
    mask: Image | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.shape

    @property
    def images(self) -> list[Image]:
        """The image and its maps, as far as there are any."""
        return [image for image in (self.image, self.noise, self.mask) if image is not None]

    def read(self, window: Window) -> Pixels:
        """The pixels of a window. What is not finite, unexposed, masked, or has no noise, is bad."""
        wide = grown(window, ZERO_REACH, self.shape)
        inner = within(window, wide)
        data = self.image.read(wide)
        bad = without_data(data)[inner]
        data = np.ascontiguousarray(data[inner])
        noise = None
        if self.noise is not None:
            noise = self.noise.read(window)
            with np.errstate(invalid="ignore", divide="ignore"):
                good = np.isfinite(noise) & (noise > 0)
                bad |= ~good
                noise = {"rms": noise, "var": np.sqrt(noise), "wht": 1 / np.sqrt(noise)}[self.kind]
            noise = np.where(good, noise, np.nan).astype(np.float32)
        if self.mask is not None:
            bad |= self.mask.read(window) != 0
        return Pixels(data, bad, noise)

    def close(self) -> None:
        """Close all files."""
        for image in self.images:
            image.close()
