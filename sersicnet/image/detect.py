"""The sources of an image, found in any window of it.

There are two passes: one for what has a core, whose regions are separated into
sources, and one, in a wider filter, for faint and extended galaxies in between.
What is found at a place does not depend on the window: pixels are smoothed one
like the other, connected regions are taken whole, and each is separated into
sources for itself.
"""

from __future__ import annotations

import heapq
import inspect
import math
import sys
import warnings
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from astropy.utils.exceptions import AstropyUserWarning
from photutils.segmentation import SegmentationImage, deblend_sources
from scipy import sparse

from sersicnet.image import photometry
from sersicnet.image.mosaic import Pixels, Window, grown, within
from sersicnet.image.photometry import Moments, Photometry
from sersicnet.image.sky import Held, Mesh, Sky, Source, estimate_sky

CLAIMED = 2
"""Pixels around a source that belong to it, too, when its neighbours are measured."""

USUAL_GROWTH, GROWTH, MOST_GROWTH = 48, 256, 4096
"""How far a window reaches beyond a zone for the sources at its sides; and how far it grows for a source that
reaches beyond that, first and at most, pixels."""


@dataclass
class Detections:
    """Sources found in an image, or in a window of one, in order of label.

    Attributes
    ----------
    segmentation : ndarray, int32, (H, W)
        Labels from 1; 0 is sky.
    x, y : ndarray, float64, (N,)
        Centroids, zero-based pixels.
    a, b : ndarray, float64, (N,)
        1 sigma axes of the moments, pixels.
    theta : ndarray, float64, (N,)
        Angle of the major axis, degrees from +x towards +y.
    flux : ndarray, float64, (N,)
        Sum over the detected pixels, image units.
    area : ndarray, float64, (N,)
        Number of detected pixels.
    blended : ndarray, bool, (N,)
        Whether the source was separated from a touching one.
    parent : ndarray, int, (N,)
        Index of the brightest source of the same connected region; its own if it is alone.
    """

    segmentation: np.ndarray
    x: np.ndarray
    y: np.ndarray
    a: np.ndarray
    b: np.ndarray
    theta: np.ndarray
    flux: np.ndarray
    area: np.ndarray
    blended: np.ndarray
    parent: np.ndarray
    _scene: photometry.Scene | None = field(default=None, repr=False, compare=False)
    _moments: Moments = field(default=Moments(*np.zeros((5, 0))), repr=False, compare=False)
    _correlation: float = field(default=1.0, repr=False, compare=False)
    _claimed: np.ndarray | None = field(default=None, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.x)

    def claimed(self) -> np.ndarray:
        """The segmentation with every source grown by `CLAIMED` pixels, int32, (H, W); made once."""
        if self._claimed is None:
            self._claimed = _grown_labels(self.segmentation, CLAIMED)
        return self._claimed

    def photometry(self, which: np.ndarray) -> Photometry:
        """Measure sources in apertures; pixels of neighbours count as those opposite to them.

        Errors are those of the sky's noise, with its correlation, and not of the light itself.

        Parameters
        ----------
        which : ndarray, int, (N,)
            Indices of the sources to measure.
        """
        if self._scene is None:
            return Photometry(*np.zeros((len(Photometry._fields), 0)))
        out = photometry.photometry(self._scene, self._moments, which)
        for error in (out.kron_error, out.aperture_error):
            error *= self._correlation
        return out


@dataclass(frozen=True, eq=False)
class Regions:
    """Connected regions of an image.

    Attributes
    ----------
    shape : (int, int)
        Of the image.
    at : ndarray, int, (P,)
        Their pixels, as places in the flattened image.
    label : ndarray, int32, (P,)
        Number of the region that a pixel belongs to, from 1 without gaps.
    """

    shape: tuple[int, int]
    at: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return int(self.label.max(initial=0))

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the pixels, int, (P,)."""
        row = self.at // self.shape[1]
        return row, self.at - row * self.shape[1]

    def mask(self) -> np.ndarray:
        """Which pixels of the image are in a region, bool, (H, W)."""
        out = np.zeros(self.shape, bool)
        out.ravel()[self.at] = True
        return out

    def chosen(self, which: np.ndarray) -> Regions:
        """Some of them, by their number, bool, (N + 1,); the first one is ignored. They get new numbers."""
        new = np.concatenate([[0], np.cumsum(which[1:])]).astype(np.int32) * which
        label = new[self.label]
        return Regions(self.shape, self.at[label > 0], label[label > 0])

    def within(self, window: Window) -> np.ndarray:
        """Which of them have pixels in a window, by their number, bool, (N + 1,)."""
        row, column = self.places()
        inside = (row >= window[0].start) & (row < window[0].stop)
        inside &= (column >= window[1].start) & (column < window[1].stop)
        out = np.zeros(len(self) + 1, bool)
        out[self.label[inside]] = True
        return out

    def boxes(self) -> list[Window]:
        """The smallest window around each of them."""
        sides = []
        for places in self.places():
            low, high = np.full(len(self) + 1, np.iinfo(np.int64).max), np.zeros(len(self) + 1, np.int64)
            np.minimum.at(low, self.label, places)
            np.maximum.at(high, self.label, places)
            sides.append([slice(a, b + 1) for a, b in zip(low[1:].tolist(), high[1:].tolist(), strict=True)])
        return list(zip(*sides, strict=True))

    def margins(self) -> tuple[float, float, float, float]:
        """Pixels between them and the sides of the image: the lower and upper along y, then along x."""
        if not len(self.at):
            return (math.inf,) * 4
        (row, column), (height, width) = self.places(), self.shape
        return row.min(), height - 1 - row.max(), column.min(), width - 1 - column.max()

    def overlapping(self, other: Regions) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of numbers of regions that share pixels, int, (M,) each."""
        mine = np.zeros(self.shape, np.int32)
        mine.ravel()[self.at] = self.label
        both = mine.ravel()[other.at]
        shared = both > 0
        pairs = np.unique(both[shared].astype(np.int64) * (len(other) + 1) + other.label[shared])
        return pairs // (len(other) + 1), pairs % (len(other) + 1)


class Found(NamedTuple):
    """A window of an image with what was found in it.

    The segmentation of `detections` is that of the window; their x and y are pixels
    of the image, in whole millionths, so that they are the same from every window.
    """

    window: Window
    pixels: Pixels
    sky: Sky
    detections: Detections


@dataclass(frozen=True, kw_only=True)
class Detector:
    """How sources are found.

    Attributes
    ----------
    threshold : float
        In units of the noise of the smoothed image.
    smoothing : float
        FWHM of the Gaussian that the image is smoothed with, pixels.
    n_pixels : int
        Least number of connected pixels above the threshold.
    n_levels, contrast : int, float
        Of the deblending: see `photutils.segmentation.deblend_sources`.
    prominence, relief : float
        What the peak of a deblended source must rise by above the saddle to a higher
        one: in units of the noise of the smoothed image, and as a fraction of the
        saddle's height. Others are structure, or noise on its wings, and join it.
    least_snr : float
        Signal to noise in its area that a connected region needs.
    wide : float
        FWHM of the Gaussian of the second pass, pixels. Before it, the smoothed image is
        clipped at the threshold of the first one, so that compact sources stay small.
    pieces : float
        Regions of the first pass that hold less than this of the light of one of the
        second pass, around them, are pieces of it.
    """

    threshold: float = 3.0
    smoothing: float = 3.0
    n_pixels: int = 15
    n_levels: int = 32
    contrast: float = 0.005
    prominence: float = 4.0
    relief: float = 0.1
    least_snr: float = 5.0
    wide: float = 10.0
    pieces: float = 0.4

    def __call__(
        self, data: np.ndarray, bad: np.ndarray, noise_map: np.ndarray | None = None
    ) -> tuple[Sky, Detections]:
        """Measure the sky and find the sources of an image in memory.

        Parameters
        ----------
        data : ndarray, float32, (H, W)
            Image, sky included; pixels of `bad` are ignored.
        bad : ndarray, bool, (H, W)
            Pixels without data.
        noise_map : ndarray, float32, (H, W), optional
            Relative noise of the pixels: its scale is fitted to the image.

        Returns
        -------
        Sky, Detections

        Raises
        ------
        InputError
            If the noise of the image is zero.
        """
        source = Held(Pixels(data, bad, noise_map))
        mesh = estimate_sky(source, self)
        window = slice(0, data.shape[0]), slice(0, data.shape[1])
        sky = mesh.at(window, source.pixels)
        return sky, self.find(source.pixels, sky, mesh)

    @property
    def halo(self) -> int:
        """Pixels beyond a window that the first pass in it depends on, besides whole sources."""
        return len(_gaussian(self.smoothing)) // 2 + 1

    @property
    def _wide_halo(self) -> int:
        return self.halo + 2 * (len(self._wide_kernel) // 2 + 1)

    @property
    def _wide_kernel(self) -> np.ndarray:
        """What makes the smoothed image as wide as the second pass has it, every second pixel."""
        return _gaussian(math.sqrt(self.wide**2 - self.smoothing**2) / 2)

    def smooth(self, clean: np.ndarray, bad: np.ndarray) -> np.ndarray:
        """An image smoothed for detection, float32; each pixel alike, whatever window it is in."""
        return _convolved(clean, ~bad, _gaussian(self.smoothing))

    def smooth_widely(self, smooth: np.ndarray, sky: Sky, smoothed: float) -> np.ndarray:
        """The smoothed image for the second pass, of every second pixel, float32; `smooth` begins with one of them."""
        limit = np.float32(self.threshold * smoothed) * sky.rms[::2, ::2]
        known = np.isfinite(limit)
        limit[~known] = 0
        return _convolved(np.clip(smooth[::2, ::2], -limit, limit), known, self._wide_kernel)

    def regions(self, smooth: np.ndarray, sky: Sky, smoothed: float) -> Regions:
        """Connected regions above the threshold, numbered in order of their first pixels.

        Those of `photutils.segmentation.detect_sources`, kept as their pixels alone.
        """
        return self._regions(smooth, np.float32(self.threshold * smoothed) * sky.rms)

    def _regions(self, smooth: np.ndarray, threshold: np.ndarray) -> Regions:
        with np.errstate(invalid="ignore"):
            above = smooth > threshold  # never where the noise is NaN
        at = np.flatnonzero(above)
        found = Regions(above.shape, at, _connected(at, above.shape[1]))
        return found.chosen(np.bincount(found.label, minlength=1) >= self.n_pixels)

    def _extended(self, smooth: np.ndarray, sky: Sky, mesh: Mesh, window: Window) -> Regions:
        """Connected regions of the second pass, in a window of the image."""
        first = window[0].start % 2, window[1].start % 2
        own = slice(first[0], None), slice(first[1], None)
        part = Sky(sky.level[own], sky.rms[own], sky.autocorrelation, sky.map_factor)
        wide = self.smooth_widely(smooth[own], part, mesh.smoothed)
        found = self._regions(wide, np.float32(self.threshold * mesh.widely) * part.rms[::2, ::2])
        (height, width), (row, column) = smooth.shape, found.places()
        rows = first[0] + 2 * row + np.array([[0], [0], [1], [1]])
        columns = first[1] + 2 * column + np.array([[0], [1], [0], [1]])
        inside = (rows < height) & (columns < width)
        at, labels = (rows * width + columns)[inside], np.broadcast_to(found.label, rows.shape)[inside]
        good = np.isfinite(sky.rms.ravel()[at])
        return Regions((height, width), at[good], labels[good])

    def find(self, pixels: Pixels, sky: Sky, mesh: Mesh) -> Detections:
        """Find the sources of an image in memory.

        Parameters
        ----------
        pixels : Pixels
        sky : Sky
        mesh : Mesh
            Tells the noise of the smoothed images.
        """
        clean = pixels.data - sky.level
        smooth = self.smooth(clean, pixels.bad)
        window = slice(0, smooth.shape[0]), slice(0, smooth.shape[1])
        regions, extended = self.regions(smooth, sky, mesh.smoothed), self._extended(smooth, sky, mesh, window)
        return self._sources(clean, pixels.bad, sky, smooth, regions, extended, mesh.smoothed)

    def around(self, source: Source, mesh: Mesh, zone: Window) -> Found:
        """Find the sources of a zone of an image, whole.

        The window that is read reaches beyond the zone, and grows until it holds
        all of each connected region that has a pixel in the zone; other regions are
        left out. What is found of a region is then the same for every zone.

        Parameters
        ----------
        source : Source
        mesh : Mesh
            Of the image.
        zone : Window

        Returns
        -------
        Found
        """
        shape, more = source.shape, [USUAL_GROWTH] * 4
        while True:
            reach = grown(zone, self._wide_halo + 1, shape)
            window = (
                slice(max(reach[0].start - more[0], 0), min(reach[0].stop + more[1], shape[0])),
                slice(max(reach[1].start - more[2], 0), min(reach[1].stop + more[3], shape[1])),
            )
            pixels = source.read(window)
            sky = mesh.at(window, pixels)
            clean = pixels.data - sky.level
            smooth = self.smooth(clean, pixels.bad)
            extended = self._extended(smooth, sky, mesh, window)
            regions = self.regions(smooth, sky, mesh.smoothed)
            inner = within(zone, window)
            # Regions of one pass may do away with those of the other that they overlap.
            seen = regions.within(inner)
            piece, whole = regions.overlapping(extended)
            seen_whole = extended.within(inner)
            seen_whole[whole[seen[piece]]] = True
            seen[piece[seen_whole[whole]]] = True
            regions, extended = regions.chosen(seen), extended.chosen(seen_whole)
            # Near a side that is not the image's, smoothing lacks what lies beyond.
            open_sides = (
                window[0].start > 0,
                window[0].stop < shape[0],
                window[1].start > 0,
                window[1].stop < shape[1],
            )
            sides = zip(open_sides, regions.margins(), extended.margins(), strict=True)
            cut = [is_open and (near < self.halo or far < self._wide_halo) for is_open, near, far in sides]
            if not any(cut) or max(more) >= MOST_GROWTH:
                detections = self._sources(clean, pixels.bad, sky, smooth, regions, extended, mesh.smoothed)
                detections.x = np.round(detections.x + window[1].start, 6)
                detections.y = np.round(detections.y + window[0].start, 6)
                return Found(window, pixels, sky, detections)
            more = [max(2 * m, GROWTH) if is_cut else m for m, is_cut in zip(more, cut, strict=True)]

    def _sources(
        self,
        clean: np.ndarray,
        bad: np.ndarray,
        sky: Sky,
        smooth: np.ndarray,
        regions: Regions,
        extended: Regions,
        smoothed: float,
    ) -> Detections:
        regions, extended = self._significant(clean, sky, regions, extended)
        if not len(regions) + len(extended):
            none, no = np.zeros(0), np.zeros(0, int)
            nothing = np.zeros(clean.shape, np.int32)
            return Detections(nothing, none, none, none, none, none, none, none, no.astype(bool), no)
        # Where they still overlap, a region of the first pass is on top.
        parts = np.zeros(clean.shape, np.int32)
        parts.ravel()[extended.at] = extended.label + len(regions)
        parts.ravel()[regions.at] = regions.label
        at = np.unique(np.concatenate([regions.at, extended.at]))
        region = parts.ravel()[at]
        self._deblend(smooth, parts, at, regions, sky.rms * np.float32(smoothed))
        label = parts.ravel()[at]
        n = int(label.max())
        first_parent = np.zeros(n + 1, np.int64)
        first_parent[label] = region
        parent = first_parent[1:]
        row = at // clean.shape[1]
        found = photometry.moments(smooth.ravel()[at], row, at - row * clean.shape[1], label, n)
        flux, area = np.bincount(label, clean.ravel()[at], n + 1)[1:], np.bincount(label, minlength=n + 1)[1:]
        siblings = np.bincount(parent, minlength=parent.max() + 1)
        faint_first = np.argsort(flux, kind="stable")
        brightest = np.zeros(len(siblings), int)
        brightest[parent[faint_first]] = faint_first  # the last one written stays
        return Detections(
            segmentation=parts,
            **found._asdict(),
            flux=flux,
            area=area.astype(float),
            blended=siblings[parent] > 1,
            parent=brightest[parent],
            _scene=photometry.Scene(clean, bad, sky.rms, parts),
            _moments=found,
            _correlation=sky.correlation,
        )

    def _significant(self, clean: np.ndarray, sky: Sky, regions: Regions, extended: Regions) -> tuple[Regions, Regions]:
        """Regions of both passes that stand out as a whole, and not by a few pixels.

        One of the second pass that overlaps others of the first takes their place if
        these are `pieces` of it, and none stands out more; else it is left out.
        """
        (flux, signal), (wide_flux, wide_signal) = (self._light(clean, sky, some) for some in (regions, extended))
        good, wide_good = signal >= self.least_snr, wide_signal >= self.least_snr
        piece, whole = regions.overlapping(extended)
        piece, whole = piece[good[piece]], whole[good[piece]]
        wide_good &= np.bincount(whole, flux[piece], len(wide_flux)) < self.pieces * wide_flux
        wide_good[whole[signal[piece] > wide_signal[whole]]] = False
        good[piece[wide_good[whole]]] = False
        return regions.chosen(good), extended.chosen(wide_good)

    def _light(self, clean: np.ndarray, sky: Sky, regions: Regions) -> tuple[np.ndarray, np.ndarray]:
        """Flux and signal to noise of regions by their numbers, the first of which is 0; float64, (N + 1,)."""
        flux = np.bincount(regions.label, clean.ravel()[regions.at], len(regions) + 1)
        variance = np.bincount(regions.label, sky.rms.ravel()[regions.at].astype(float) ** 2, len(regions) + 1)
        return flux, flux / np.sqrt(np.maximum(variance, sys.float_info.min)) / sky.correlation

    def _deblend(
        self, smooth: np.ndarray, labels: np.ndarray, at: np.ndarray, regions: Regions, noise: np.ndarray
    ) -> None:
        """Separate the regions of the first pass into sources, which come last, in place; `at` is where labels are."""
        # photutils 3.0 draws a progress bar unless told not to; 3.1 has threads and deprecates the option.
        options = {} if "n_threads" in inspect.signature(deblend_sources).parameters else {"progress_bar": False}
        n = int(labels.ravel()[at].max())
        stays = np.ones(n + 1, bool)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AstropyUserWarning)
            for label, part in enumerate(regions.boxes(), 1):
                inside = labels[part] == label
                if not self._separable(smooth[part], inside, noise[part]):
                    continue
                own = deblend_sources(
                    smooth[part],
                    SegmentationImage(inside.astype(np.int32)),
                    self.n_pixels,
                    n_levels=self.n_levels,
                    contrast=self.contrast,
                    **options,
                ).data
                own = self._prominent(smooth[part], own, noise[part])
                several = int(own.max())
                if several > 1:
                    labels[part][inside] = n + own[inside]
                    stays[label], n = False, n + several
        stays = np.concatenate([stays, np.ones(n + 1 - len(stays), bool)])
        stays[0] = False
        labels.ravel()[at] = np.cumsum(stays, dtype=np.int32)[labels.ravel()[at]]

    def _separable(self, smooth: np.ndarray, inside: np.ndarray, noise: np.ndarray) -> bool:
        """Whether a region may be separated: others need not go through all levels of the deblending."""
        if np.count_nonzero(inside) < 2 * self.n_pixels:
            return False
        least = self.prominence * float(noise[inside].min())
        heights = np.full((inside.shape[0] + 2, inside.shape[1] + 2), -np.inf, smooth.dtype)
        np.copyto(heights[1:-1, 1:-1], smooth, where=inside)
        highest = np.maximum(np.maximum(heights[:-2], heights[1:-1]), heights[2:])
        highest = np.maximum(np.maximum(highest[:, :-2], highest[:, 1:-1]), highest[:, 2:])
        peaks = (heights[1:-1, 1:-1] == highest) & (highest >= smooth[inside].min() + least)
        return bool(np.count_nonzero(peaks) > 1) and _may_part(
            heights, self.n_pixels, 0.999 * least, 0.999 * self.relief
        )

    def _prominent(self, smooth: np.ndarray, labels: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Let parts of a region that do not rise above their surroundings join these; int32, (H, W), from 1."""
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
                continue  # out of date
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
        """How far a peak rises above its saddle to a higher one, in units of what it must; infinite for the highest."""
        other = _higher(peaks, label, saddles)
        if other is None:
            return np.inf
        height, noise = saddles[label][other]
        return (peaks[label] - height) / max(self.prominence * noise, self.relief * height, sys.float_info.min)


def _connected(at: np.ndarray, width: int) -> np.ndarray:
    """Number the connected regions of pixels, from 1 and in order of their first pixels.

    Pixels in a row make a run; runs of two rows that touch, over corners too, are of one
    region. Few pixels of an image are in a region, so this is faster than to go through all.

    Parameters
    ----------
    at : ndarray, int, (P,)
        The pixels, as places in the flattened image, in order.
    width : int
        Of the image.

    Returns
    -------
    ndarray, int32, (P,)
    """
    if not len(at):
        return np.zeros(0, np.int32)
    begins = np.ones(len(at), bool)
    begins[1:] = (np.diff(at) > 1) | (at[1:] % width == 0)
    starts = np.flatnonzero(begins)
    first, last = at[starts], at[np.append(starts[1:], len(at)) - 1]
    below = (first // width + 1) * width
    low = np.searchsorted(last, np.maximum(first + width - 1, below))
    high = np.searchsorted(first, np.minimum(last + width + 1, below + width - 1), "right")
    touching = high - low
    one = np.repeat(np.arange(len(first)), touching)
    other = np.arange(len(one)) + np.repeat(low - np.cumsum(touching) + touching, touching)
    links = sparse.coo_array((np.ones(len(one), bool), (one, other)), shape=(len(first),) * 2)
    number = sparse.csgraph.connected_components(links, directed=False)[1] + 1
    return number.astype(np.int32)[np.cumsum(begins) - 1]


def _gaussian(fwhm: float) -> np.ndarray:
    """A Gaussian of unit sum out to three of its sigmas, float32."""
    sigma = fwhm / math.sqrt(8 * math.log(2))
    reach = math.ceil(3 * sigma)
    line = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return (line / line.sum()).astype(np.float32)


_AT_ONCE = 20_000
"""Pixels that are smoothed at once, in whole rows: what is made on the way stays in the processor's cache."""


def _convolved(values: np.ndarray, used: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Values where they are used, else 0, and beyond; smoothed along both axes; float32."""
    height, width = values.shape
    reach = len(kernel) // 2
    padded = np.zeros((height + 2 * reach, width + 2 * reach), np.float32)
    np.copyto(padded[reach:-reach, reach:-reach], values, where=True if used.all() else used)
    out = np.empty((height, width), np.float32)
    rows = max(_AT_ONCE // width, 1)
    for first in range(0, height, rows):
        n = min(rows, height - first)
        down = _summed(kernel, [padded[first + k : first + k + n] for k in range(2 * reach + 1)])
        out[first : first + n] = _summed(kernel, [down[:, k : k + width] for k in range(2 * reach + 1)])
    return out


def _summed(weights: np.ndarray, arrays: list[np.ndarray]) -> np.ndarray:
    """Sum of arrays with symmetric weights, float32; of an odd number."""
    middle = len(arrays) // 2
    out = arrays[middle] * weights[middle]
    term = np.empty_like(out)
    for k in range(middle):
        np.add(arrays[k], arrays[-1 - k], out=term)
        term *= weights[k]
        out += term
    return out


def _may_part(heights: np.ndarray, n_pixels: int, least: float, relief: float) -> bool:
    """Whether a region has, at some height, two parts of `n_pixels` or more that stand apart, and rise above that.

    From its highest pixel down, parts grow and meet each other.

    Parameters
    ----------
    heights : ndarray, float, (H, W)
        Minus infinity around the region, and at all sides.
    n_pixels : int
    least, relief : float
        What both must rise by above the height where they meet: at least, and as a fraction of it.
    """
    flat, width = heights.ravel(), heights.shape[1]
    places = np.flatnonzero(np.isfinite(flat))
    if len(places) > _MOST_PIXELS:
        return True
    places = places[np.argsort(-flat[places])]
    head = [-1] * len(flat)  # the first pixel of the part that a pixel belongs to, or one on the way there
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
"""Pixels of a region from which on it is deblended without a look at it before."""

_Saddles = dict[int, dict[int, tuple[float, float]]]
"""Height of the saddle between touching sources and the noise there, by their labels, both ways."""


def _higher(peaks: dict[int, float], label: int, saddles: _Saddles) -> int | None:
    """The higher neighbour beyond the highest saddle; of equal peaks, that with the smaller label is higher."""
    own = peaks[label], -label
    higher = [(saddle, other) for other, saddle in saddles[label].items() if (peaks[other], -other) > own]
    return max(higher)[1] if higher else None


def _saddles(labels: np.ndarray, smooth: np.ndarray, noise: np.ndarray) -> _Saddles:
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


def _grown_labels(labels: np.ndarray, reach: int) -> np.ndarray:
    """What `skimage.segmentation.expand_labels` makes of labels, for small distances; (H, W).

    Of labels that are equally near, the one further left counts, then the upper one.
    """
    sides = range(-reach, reach + 1)
    steps = [(dy, dx) for dx in sides for dy in sides if 0 < dx**2 + dy**2 <= reach**2]
    steps.sort(key=lambda step: step[0] ** 2 + step[1] ** 2)
    out = np.pad(labels, reach)
    flat, width = out.ravel(), out.shape[1]
    free = flat == 0
    place = np.flatnonzero(~free)
    own = flat[place]
    for dy, dx in reversed(steps):
        there = place - dy * width - dx
        given = free[there]
        flat[there[given]] = own[given]
    return np.ascontiguousarray(out[reach:-reach, reach:-reach])
