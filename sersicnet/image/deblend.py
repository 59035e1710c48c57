"""Deblending: connected regions are separated into touching sources."""

from __future__ import annotations

import functools
import gc
import heapq
import inspect
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from astropy.utils.exceptions import AstropyUserWarning

from sersicnet.image.regions import Regions


@functools.cache
def photutils_segmentation() -> tuple[Any, Any]:
    """Photutils' segmentation image and deblending, which are imported when there is something to separate.

    They take a second to import, a third of which is saved without garbage collection. A process that
    exempts its modules from the collection, as the command line does, exempts these too.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        import skimage.segmentation  # noqa: F401 -- photutils imports it when it deblends
        from photutils.segmentation import SegmentationImage, deblend_sources
    finally:
        if gc.get_freeze_count():
            gc.freeze()
        if collecting:
            gc.enable()
    return SegmentationImage, deblend_sources


@dataclass(frozen=True, kw_only=True)
class Deblending:
    """Options of the deblending.

    Attributes
    ----------
    n_levels, contrast : int, float
        See `photutils.segmentation.deblend_sources`.
    prominence, relief : float
        A deblended source must peak above the saddle to its higher neighbour by `prominence` times the
        noise of the smoothed image, and by the fraction `relief` of the saddle's height. A lower peak
        is structure of its neighbour, or noise on the neighbour's wings, and is merged with it.
    """

    n_levels: int = 32
    contrast: float = 0.005
    prominence: float = 4.0
    relief: float = 0.1

    def separate(
        self, smooth: np.ndarray, labels: np.ndarray, at: np.ndarray, regions: Regions, noise: np.ndarray, n_pixels: int
    ) -> None:
        """Deblend regions, in place.

        Parameters
        ----------
        smooth : ndarray, float32, (H, W)
            The smoothed image.
        labels : ndarray, int32, (H, W)
            Labels of all regions, from 1; `regions` come first. Sources deblended from a region are
            numbered after all others.
        at : ndarray, int, (P,)
            Indices, into the flattened image, of the pixels with a label.
        regions : Regions
            The regions that may be deblended.
        noise : ndarray, float32, (H, W)
            Noise of the smoothed image.
        n_pixels : int
            Minimum number of pixels of a source.
        """
        segmentation_image, deblend_sources = photutils_segmentation()
        # photutils 3.0 shows a progress bar by default; 3.1 has threads and deprecates that option.
        options = {} if "n_threads" in inspect.signature(deblend_sources).parameters else {"progress_bar": False}
        n = int(labels.ravel()[at].max())
        stays = np.ones(n + 1, bool)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AstropyUserWarning)
            for label, part in enumerate(regions.boxes(), 1):
                inside = labels[part] == label
                if not self.separable(smooth[part], inside, noise[part], n_pixels):
                    continue
                own = deblend_sources(
                    smooth[part],
                    segmentation_image(inside.astype(np.int32)),
                    n_pixels,
                    n_levels=self.n_levels,
                    contrast=self.contrast,
                    **options,
                ).data
                own = self.prominent(smooth[part], own, noise[part])
                several = int(own.max())
                if several > 1:
                    labels[part][inside] = n + own[inside]
                    stays[label], n = False, n + several
        stays = np.concatenate([stays, np.ones(n + 1 - len(stays), bool)])
        stays[0] = False
        labels.ravel()[at] = np.cumsum(stays, dtype=np.int32)[labels.ravel()[at]]

    def separable(self, smooth: np.ndarray, inside: np.ndarray, noise: np.ndarray, n_pixels: int) -> bool:
        """Whether a region may contain several sources; a region that cannot skips the multi-level deblending."""
        if np.count_nonzero(inside) < 2 * n_pixels:
            return False
        least = self.prominence * float(noise[inside].min())
        heights = np.full((inside.shape[0] + 2, inside.shape[1] + 2), -np.inf, smooth.dtype)
        np.copyto(heights[1:-1, 1:-1], smooth, where=inside)
        highest = np.maximum(np.maximum(heights[:-2], heights[1:-1]), heights[2:])
        highest = np.maximum(np.maximum(highest[:, :-2], highest[:, 1:-1]), highest[:, 2:])
        peaks = (heights[1:-1, 1:-1] == highest) & (highest >= smooth[inside].min() + least)
        return bool(np.count_nonzero(peaks) > 1) and _may_split(heights, n_pixels, 0.999 * least, 0.999 * self.relief)

    def prominent(self, smooth: np.ndarray, labels: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Merge deblended sources without a prominent peak with their neighbours; labels from 1, int32, (H, W)."""
        n = int(labels.max())
        highest = np.full(n + 1, -np.inf, smooth.dtype)
        np.maximum.at(highest, labels, smooth)
        peaks = dict(enumerate(highest.tolist()))
        saddles = _saddles(labels, smooth, noise)
        joins: dict[int, int] = {}
        queue = [(self._rise(peaks, label, saddles), label) for label in saddles]
        heapq.heapify(queue)
        while queue:
            rise, label = heapq.heappop(queue)
            if label in joins or rise != self._rise(peaks, label, saddles):
                continue  # this entry of the queue is out of date
            if rise >= 1:
                break
            other = _higher(peaks, label, saddles)
            assert other is not None
            joins[label] = other
            for third, saddle in saddles.pop(label).items():
                del saddles[third][label]
                if third == other:
                    continue
                best = max(saddle, saddles[other].get(third, saddle))
                saddles[other][third] = saddles[third][other] = best
                heapq.heappush(queue, (self._rise(peaks, third, saddles), third))
            heapq.heappush(queue, (self._rise(peaks, other, saddles), other))
        stays = np.ones(n + 1, np.int32)
        stays[[0, *joins]] = 0
        final = np.cumsum(stays, dtype=np.int32) * stays
        for label in joins:
            other = label
            while other in joins:
                other = joins[other]
            final[label] = final[other]
        return final[labels]

    def _rise(self, peaks: dict[int, float], label: int, saddles: _Saddles) -> float:
        """Height of a peak above the saddle to a higher one, over the required height; inf for the highest peak."""
        other = _higher(peaks, label, saddles)
        if other is None:
            return np.inf
        height, noise = saddles[label][other]
        return (peaks[label] - height) / max(self.prominence * noise, self.relief * height, sys.float_info.min)


def _may_split(heights: np.ndarray, n_pixels: int, least: float, relief: float) -> bool:
    """Whether some threshold splits a region into two large, prominent parts.

    The pixels are added from the brightest to the faintest, so that parts grow around each peak
    until they meet at a saddle.

    Parameters
    ----------
    heights : ndarray, float, (H, W)
        Smoothed image; minus infinity outside the region and along the border of the array.
    n_pixels : int
        Minimum number of pixels of both parts.
    least, relief : float
        Minimum height of both peaks above the saddle: absolute, and as a fraction of the saddle's height.
    """
    flat, width = heights.ravel(), heights.shape[1]
    places = np.flatnonzero(np.isfinite(flat))
    if len(places) > _MOST_PIXELS:
        return True
    places = places[np.argsort(-flat[places])]
    head = [-1] * len(flat)  # union-find: a chain of pixels from each pixel to the first pixel of its part
    size = [0] * len(flat)
    peak = [0.0] * len(flat)
    steps = (-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1)
    for place, height in zip(places.tolist(), flat[places].tolist(), strict=True):
        mine = -1
        for step in steps:
            other = head[place + step]
            if other < 0:
                continue
            while head[other] != other:
                other = head[other]
            if mine < 0 or other == mine:
                mine = other
                continue
            if size[other] >= n_pixels and size[mine] >= n_pixels:
                rise = min(peak[other], peak[mine]) - height
                if rise >= least and rise >= relief * height:
                    return True
            if size[other] > size[mine]:
                mine, other = other, mine
            head[other] = mine
            size[mine] += size[other]
            peak[mine] = max(peak[mine], peak[other])
        if mine < 0:
            mine, peak[place] = place, height
        head[place] = mine
        size[mine] += 1
    return False


_MOST_PIXELS = 5000
"""A region of more pixels than this is always deblended, without the test of `_may_split`."""


_Saddles = dict[int, dict[int, tuple[float, float]]]
"""Height of the saddle between two touching sources, and the noise there, under their labels in both orders."""


def _higher(peaks: dict[int, float], label: int, saddles: _Saddles) -> int | None:
    """The neighbour with a higher peak behind the highest saddle; of equal peaks, the smaller label is higher."""
    own = peaks[label], -label
    higher = [(saddle, other) for other, saddle in saddles[label].items() if (peaks[other], -other) > own]
    return max(higher)[1] if higher else None


def _saddles(labels: np.ndarray, smooth: np.ndarray, noise: np.ndarray) -> _Saddles:
    """Highest saddle between each pair of sources that touch, diagonals included."""
    out: _Saddles = {}
    h, w = labels.shape
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        here = slice(0, h - dy), slice(max(0, -dx), w - max(0, dx))
        there = slice(dy, h), slice(max(0, dx), w + min(0, dx))
        a, b = labels[here], labels[there]
        touching = (a != b) & (a > 0) & (b > 0)
        heights = np.minimum(smooth[here], smooth[there])[touching]
        for one, two, height, sigma in zip(
            a[touching].tolist(), b[touching].tolist(), heights.tolist(), noise[here][touching].tolist(), strict=True
        ):
            found = max((height, sigma), out.get(one, {}).get(two, (-np.inf, 0.0)))
            out.setdefault(one, {})[two] = out.setdefault(two, {})[one] = found
    return out
