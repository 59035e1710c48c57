"""What stands out of an image: its sky, its noise and its sources.

The sky and the noise of a whole mosaic are a mesh, estimated strip by strip;
sources are found in any window of it. What is found at a place does not depend
on the window: pixels are smoothed one like the other, connected regions are
taken whole, and each is separated into sources for itself.
"""

from __future__ import annotations

import heapq
import inspect
import itertools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from astropy.utils.exceptions import AstropyUserWarning
from photutils.segmentation import SegmentationImage, SourceCatalog, deblend_sources, detect_sources
from photutils.utils.exceptions import NoDetectionsWarning
from scipy import ndimage
from scipy.spatial import KDTree
from skimage.morphology import local_maxima

from sersicnet.errors import InputError
from sersicnet.mosaic import HUGE, Pixels, Window, grown, within

BOX = 128
"""Side of a box of the mesh in pixels, about; at least two boxes cover an image along each axis."""

STRIP = 4
"""Rows of boxes that are estimated at once."""

SAMPLES, SAMPLE = 8, 256
"""Noise is measured in this many windows along each axis of a large image, and the side of each."""

COVERED = 0.8
"""Fraction of a box without blank pixels from which on its neighbours speak for it."""

HUGE_LIMIT = 0.05
"""Fraction of pixels with absurd values from which on an image is refused."""

GROWN = 8
"""Pixels that sources grow by before the sky is estimated between them."""

CLAIMED = 2
"""Pixels around a source that belong to it, too, when its neighbours are measured."""

USUAL_GROWTH, GROWTH, MOST_GROWTH = 48, 256, 4096
"""How far a window reaches beyond a zone for the sources at its sides; and how far it grows for a source that
reaches beyond that, first and at most, pixels."""

REACH = 3
"""Lags of the noise's autocorrelation along each axis, pixels."""


class Source(Protocol):
    """An image with the maps that belong to it, read window by window."""

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""

    def read(self, window: Window) -> Pixels:
        """The pixels of a window within the image."""


class Held(NamedTuple):
    """An image that is in memory as a `Source`."""

    pixels: Pixels

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.data.shape  # type: ignore[return-value]

    def read(self, window: Window) -> Pixels:
        """Views of a window."""
        data, bad, noise = self.pixels
        return Pixels(data[window], bad[window], None if noise is None else noise[window])


@dataclass
class Sky:
    """Background and noise of an image, or of a window of one.

    Attributes
    ----------
    level : ndarray, float32, (H, W)
        The sky.
    rms : ndarray, float32, (H, W)
        Standard deviation of a blank pixel; NaN in pixels without data.
    autocorrelation : ndarray, float64, (7, 7)
        Of blank pixels, by lag along y and x; 1 in the middle.
    map_factor : float
        What the user's noise map was multiplied with to match the scatter of
        blank pixels; NaN without a map.
    """

    level: np.ndarray
    rms: np.ndarray
    autocorrelation: np.ndarray
    map_factor: float

    @property
    def correlation(self) -> float:
        """How much larger the noise of a large aperture is than that of independent pixels.

        1 for white noise, about 2 for drizzled images.
        """
        return correlation(self.autocorrelation)


def correlation(autocorrelation: np.ndarray) -> float:
    """Noise of a large aperture over that of independent pixels, from an autocorrelation."""
    return float(np.sqrt(max(autocorrelation.sum(), 1.0)))


@dataclass(frozen=True, eq=False)
class Mesh:
    """Sky and noise of a whole image.

    Attributes
    ----------
    level, rms : ndarray, float64, (h, w)
        Of boxes that cover the image evenly, smoothed by a median over 3 x 3 of them.
    shape : (int, int)
        Height and width of the image.
    autocorrelation : ndarray, float64, (7, 7)
        Of blank pixels, by lag along y and x; 1 in the middle.
    smoothed : float
        Noise of the smoothed image in units of that of its pixels.
    map_factor : float
        See `Sky`.
    """

    level: np.ndarray
    rms: np.ndarray
    shape: tuple[int, int]
    autocorrelation: np.ndarray
    smoothed: float
    map_factor: float

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it as arrays, to be kept; `of` is the inverse."""
        return {name: np.asarray(value) for name, value in vars(self).items()}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Mesh:
        """From `arrays`."""
        height, width = arrays["shape"].tolist()
        return cls(
            arrays["level"],
            arrays["rms"],
            (height, width),
            arrays["autocorrelation"],
            float(arrays["smoothed"]),
            float(arrays["map_factor"]),
        )

    def at(self, window: Window, pixels: Pixels) -> Sky:
        """Sky and noise of a window: cubic splines through the boxes, or the user's map."""
        level, rms = (np.empty(pixels.bad.shape, np.float32) for _ in range(2))
        noise = pixels.noise if np.isfinite(self.map_factor) else None
        if noise is not None:
            rms[:] = noise * self.map_factor
        coefficients = _coefficients(self.level), _coefficients(self.rms)
        least = 1e-3 * np.median(self.rms)
        # Some rows at a time: what is made on the way stays in the processor's cache.
        for first in range(window[0].start, window[0].stop, _ROWS):
            rows = slice(first, min(first + _ROWS, window[0].stop))
            part, own = (rows, window[1]), slice(rows.start - window[0].start, rows.stop - window[0].start)
            level[own] = _interpolated(coefficients[0], self.shape, part)
            if noise is None:
                rms[own] = np.maximum(_interpolated(coefficients[1], self.shape, part), least)
        rms[pixels.bad] = np.nan
        return Sky(level, rms, self.autocorrelation, self.map_factor)


_ROWS = 64
"""Rows of a window whose sky is drawn at once."""


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
    _claimed: np.ndarray | None = field(default=None, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.x)

    def claimed(self) -> np.ndarray:
        """The segmentation with every source grown by `CLAIMED` pixels, int32, (H, W); made once."""
        if self._claimed is None:
            self._claimed = _grown_labels(self.segmentation, CLAIMED)
        return self._claimed


class Found(NamedTuple):
    """A window of an image with what was found in it.

    The segmentation of `detections` is that of the window; their x and y are pixels
    of the image, in whole millionths, so that they are the same from every window.
    """

    window: Window
    pixels: Pixels
    sky: Sky
    detections: Detections


Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""What applies a function to many things, in their order; `map`, or one that has workers."""


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
    """

    threshold: float = 3.0
    smoothing: float = 3.0
    n_pixels: int = 15
    n_levels: int = 32
    contrast: float = 0.005
    prominence: float = 4.0
    relief: float = 0.1
    least_snr: float = 5.0

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
        mesh = self.mesh(source)
        window = slice(0, data.shape[0]), slice(0, data.shape[1])
        sky = mesh.at(window, source.pixels)
        return sky, self.find(source.pixels, sky, mesh.smoothed)

    def mesh(self, source: Source, apply: Map = map) -> Mesh:
        """Estimate sky and noise of an image, strip by strip.

        First from all pixels, clipped; then from those between the sources that
        stand out of that first sky.

        Parameters
        ----------
        source : Source
        apply : callable
            Applies a function to the strips.

        Raises
        ------
        InputError
            If no pixel has data, or the noise of the image is zero.
        """
        edges = _edges(source.shape)
        strips = [(source, edges, i) for i in range(0, len(edges[0]) - 1, STRIP)]
        mesh = _assembled(apply(_first_boxes, strips), source.shape)
        smoothed = _sampled(apply, self, source, mesh, 1.0)[0]
        mesh = _assembled(apply(_boxes_between, [(*strip, self, mesh, smoothed) for strip in strips]), source.shape)
        smoothed, autocorrelation, factor = _sampled(apply, self, source, mesh, smoothed)
        return Mesh(*mesh[:3], autocorrelation, smoothed, factor)

    @property
    def halo(self) -> int:
        """Pixels beyond a window that what is found in it depends on, besides whole sources."""
        return len(self._kernel) // 2 + 1

    @property
    def _kernel(self) -> np.ndarray:
        sigma = self.smoothing / np.sqrt(8 * np.log(2))
        reach = int(np.ceil(4 * sigma))
        line = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
        return np.asarray(line / line.sum())

    def smooth(self, clean: np.ndarray, bad: np.ndarray) -> np.ndarray:
        """An image smoothed for detection, float32; each pixel alike, whatever window it is in."""
        out = np.where(bad, 0, clean).astype(np.float32)
        for axis in (0, 1):
            out = ndimage.correlate1d(out, self._kernel, axis, mode="constant")
        return out

    def regions(self, smooth: np.ndarray, sky: Sky, bad: np.ndarray, smoothed: float) -> SegmentationImage | None:
        """Connected regions above the threshold; None if there are none."""
        if bad.all():  # which photutils refuses, such as beyond the footprint of a mosaic
            return None
        with warnings.catch_warnings(), np.errstate(invalid="ignore"):
            warnings.simplefilter("ignore", NoDetectionsWarning)
            threshold = np.where(bad, np.inf, self.threshold * smoothed * sky.rms)
            return detect_sources(smooth, threshold, self.n_pixels, mask=bad)

    def find(self, pixels: Pixels, sky: Sky, smoothed: float) -> Detections:
        """Find the sources of an image in memory.

        Parameters
        ----------
        pixels : Pixels
        sky : Sky
        smoothed : float
            See `Mesh`.
        """
        smooth = self.smooth(pixels.data - sky.level, pixels.bad)
        return self._sources(pixels, sky, smooth, self.regions(smooth, sky, pixels.bad, smoothed), smoothed)

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
            reach = grown(zone, self.halo + 1, shape)
            window = (
                slice(max(reach[0].start - more[0], 0), min(reach[0].stop + more[1], shape[0])),
                slice(max(reach[1].start - more[2], 0), min(reach[1].stop + more[3], shape[1])),
            )
            pixels = source.read(window)
            sky = mesh.at(window, pixels)
            smooth = self.smooth(pixels.data - sky.level, pixels.bad)
            found = self.regions(smooth, sky, pixels.bad, mesh.smoothed)
            kept = np.zeros(0, int)
            if found is not None:
                seen = np.zeros(found.max_label + 1, bool)
                seen[found.data[within(zone, window)]] = True
                seen[0] = False
                kept = np.flatnonzero(seen)
            if not len(kept):
                return Found(window, pixels, sky, self._sources(pixels, sky, smooth, None, mesh.smoothed))
            assert found is not None
            # Near a side that is not the image's, smoothing lacks what lies beyond.
            side = self.halo
            bands = (found.data[:side], found.data[-side:], found.data[:, :side], found.data[:, -side:])
            open_sides = (
                window[0].start > 0,
                window[0].stop < shape[0],
                window[1].start > 0,
                window[1].stop < shape[1],
            )
            cut = [is_open and bool(seen[band].any()) for band, is_open in zip(bands, open_sides, strict=True)]
            if not any(cut) or max(more) >= MOST_GROWTH:
                found = SegmentationImage(np.where(seen, np.cumsum(seen), 0).astype(found.data.dtype)[found.data])
                detections = self._sources(pixels, sky, smooth, found, mesh.smoothed)
                detections.x = np.round(detections.x + window[1].start, 6)
                detections.y = np.round(detections.y + window[0].start, 6)
                return Found(window, pixels, sky, detections)
            more = [max(2 * m, GROWTH) if is_cut else m for m, is_cut in zip(more, cut, strict=True)]

    def photometry(self, pixels: Pixels, sky: Sky, found: Detections, which: np.ndarray) -> Photometry:
        """Measure sources in apertures; pixels of neighbours count as those opposite to them.

        Errors are those of the sky's noise, with its correlation, and not of the light itself.

        Parameters
        ----------
        pixels, sky
            Of a window.
        found : Detections
            In that window; their positions are not used.
        which : ndarray, int, (N,)
            Indices of the sources to measure, at least one.
        """
        clean = pixels.data - sky.level
        with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
            warnings.simplefilter("ignore", AstropyUserWarning)
            warnings.simplefilter("ignore", RuntimeWarning)
            catalog = SourceCatalog(
                clean,
                SegmentationImage(found.segmentation),
                convolved_data=self.smooth(clean, pixels.bad),
                error=sky.rms,
                mask=pixels.bad,
                aperture_mask_method="correct",
            )[which]
            aperture, aperture_error = catalog.circular_photometry(APERTURE)
            values = catalog.kron_radius.value, catalog.kron_flux, catalog.kron_flux_err, aperture, aperture_error
            out = Photometry(*(np.array(np.atleast_1d(value), dtype=float) for value in values))
            wild = ~(KRON * out.kron_radius <= KRON_REACH)
        for value in out[:3]:
            value[wild] = np.nan
        for error in (out.kron_error, out.aperture_error):
            error *= sky.correlation
        return out

    def _sources(
        self, pixels: Pixels, sky: Sky, smooth: np.ndarray, found: SegmentationImage | None, smoothed: float
    ) -> Detections:
        clean = pixels.data - sky.level
        found = self._significant(clean, sky, found)
        if found is None:
            none = np.zeros(0)
            nothing = np.zeros(clean.shape, np.int32)
            no = np.zeros(0, int)
            return Detections(nothing, none, none, none, none, none, none, none, no.astype(bool), no)
        parts = self._prominent(smooth, found, self._deblended(smooth, found), sky.rms * smoothed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AstropyUserWarning)
            catalog = SourceCatalog(clean, parts, convolved_data=smooth, mask=pixels.bad)
            first_parent = np.zeros(parts.max_label + 1, np.int64)
            first_parent[parts.data] = found.data
            parent = first_parent[parts.labels]
            siblings = np.bincount(parent, minlength=parent.max() + 1)
            flux = np.atleast_1d(catalog.segment_flux)
            faint_first = np.argsort(flux, kind="stable")
            brightest = np.zeros(len(siblings), int)
            brightest[parent[faint_first]] = faint_first  # the last one written stays
            return Detections(
                segmentation=parts.data.astype(np.int32),
                x=np.atleast_1d(catalog.x_centroid),
                y=np.atleast_1d(catalog.y_centroid),
                a=np.atleast_1d(catalog.semimajor_axis.value),
                b=np.atleast_1d(catalog.semiminor_axis.value),
                theta=(np.atleast_1d(catalog.orientation.to_value("deg")) + 90) % 180 - 90,
                flux=flux,
                area=np.atleast_1d(catalog.segment_area.value).astype(float),
                blended=siblings[parent] > 1,
                parent=brightest[parent],
            )

    def _significant(self, clean: np.ndarray, sky: Sky, found: SegmentationImage | None) -> SegmentationImage | None:
        """Regions that stand out as a whole, and not by a few pixels; None if there are none."""
        if found is None:
            return None
        flux = ndimage.sum_labels(clean, found.data, found.labels)
        variance = ndimage.sum_labels(np.square(sky.rms, dtype=float), found.data, found.labels)
        good = found.labels[flux >= self.least_snr * sky.correlation * np.sqrt(variance)]
        if not len(good):
            return None
        found = found.copy()
        found.keep_labels(good, relabel=True)
        return found

    def _deblended(self, smooth: np.ndarray, found: SegmentationImage) -> SegmentationImage:
        # photutils 3.0 draws a progress bar unless told not to; 3.1 has threads and deprecates the option.
        options = {} if "n_threads" in inspect.signature(deblend_sources).parameters else {"progress_bar": False}
        several = self._separable(smooth, found)
        if not len(several):
            return found
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AstropyUserWarning)
            return deblend_sources(
                smooth, found, self.n_pixels, labels=several, n_levels=self.n_levels, contrast=self.contrast, **options
            )

    def _separable(self, smooth: np.ndarray, found: SegmentationImage) -> np.ndarray:
        """Labels of regions that may be separated: others need not go through all levels of the deblending."""
        several = []
        for label, part in zip(found.labels.tolist(), found.slices, strict=True):
            inside = found.data[part] == label
            if np.count_nonzero(inside) < 2 * self.n_pixels:
                continue
            heights = np.full((inside.shape[0] + 2, inside.shape[1] + 2), -np.inf, smooth.dtype)
            np.copyto(heights[1:-1, 1:-1], smooth[part], where=inside)
            if ndimage.label(local_maxima(heights, connectivity=2), _AROUND)[1] > 1 and _may_part(
                heights, self.n_pixels
            ):
                several.append(label)
        return np.array(several, int)

    def _prominent(
        self, smooth: np.ndarray, found: SegmentationImage, parts: SegmentationImage, noise: np.ndarray
    ) -> SegmentationImage:
        """Let parts of regions that do not rise above their surroundings join these."""
        labels = parts.data
        joins: dict[int, int] = {}
        peaks: dict[int, float] = {}
        saddles: _Saddles = {}
        for label, part in zip(found.labels.tolist(), found.slices, strict=True):
            region = found.data[part] == label
            own = np.where(region, labels[part], 0)
            inside = own[region]
            if inside.min() == inside.max():
                continue  # only sources that were separated touch
            highest = np.full(int(inside.max()) + 1, -np.inf, smooth.dtype)
            np.maximum.at(highest, inside, smooth[part][region])
            those = np.unique(inside)
            peaks.update(zip(those.tolist(), highest[those].tolist(), strict=True))
            saddles.update(_saddles(own, smooth[part], noise[part]))
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
        if not joins:
            return parts
        stays = np.ones(parts.max_label + 1, np.int32)
        stays[[0, *joins]] = 0
        final = np.cumsum(stays, dtype=np.int32) * stays
        for label in joins:
            other = label
            while other in joins:
                other = joins[other]
            final[label] = final[other]
        return SegmentationImage(final[labels])

    def _rise(self, peaks: dict[int, float], label: int, saddles: _Saddles) -> float:
        """How far a peak rises above its saddle to a higher one, in units of what it must; infinite for the highest."""
        other = _higher(peaks, label, saddles)
        if other is None:
            return np.inf
        height, noise = saddles[label][other]
        return (peaks[label] - height) / max(self.prominence * noise, self.relief * height, sys.float_info.min)


def _may_part(heights: np.ndarray, n_pixels: int) -> bool:
    """Whether a region has, at some height, two parts of `n_pixels` or more that stand apart.

    From its highest pixel down, parts grow and meet each other.

    Parameters
    ----------
    heights : ndarray, float, (H, W)
        Minus infinity around the region, and at all sides.
    n_pixels : int
    """
    flat, width = heights.ravel(), heights.shape[1]
    places = np.flatnonzero(np.isfinite(flat))
    if len(places) > _MOST_PIXELS:
        return True
    head = [-1] * len(flat)  # the first pixel of the part that a pixel belongs to, or one on the way there
    size = [0] * len(flat)
    steps = (-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1)
    for place in places[np.argsort(-flat[places])].tolist():
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
                return True
            if size[other] > size[mine]:
                mine, other = other, mine
            head[other] = mine
            size[mine] += size[other]
        if mine < 0:
            mine = place
        head[place] = mine
        size[mine] += 1
    return False


_MOST_PIXELS = 5000
"""Pixels of a region from which on it is deblended without a look at it before."""

_AROUND = np.ones((3, 3), bool)
"""A pixel with its eight neighbours."""

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


# --- light in apertures ---------------------------------------------------------------------------------

APERTURE = 5.0
"""Radius of the fixed circular aperture, pixels."""


KRON, KRON_MEASURED, KRON_REACH = 2.5, 6.0, 10.0
"""In units of the semi-major axis: the ellipse per Kron radius, the one in which that is measured, and the largest."""


def reach(a: np.ndarray, kron_radius: np.ndarray) -> np.ndarray:
    """Pixels that the apertures of sources reach; NaN where the Kron radius is."""
    return np.maximum(KRON_MEASURED, KRON * kron_radius) * a + 2


class Photometry(NamedTuple):
    """Light of sources in apertures, float64, (N,); NaN where it cannot be measured.

    Attributes
    ----------
    kron_radius : ndarray
        Kron's first moment in units of the 1 sigma axes: the ellipse is 2.5 times as large
        (Kron 1980; as SExtractor's AUTO). NaN, with its flux, where that would be more than
        10 times the axes: noise, then.
    kron_flux, kron_error : ndarray
        In that ellipse, image units.
    aperture_flux, aperture_error : ndarray
        In a circle of `APERTURE`, image units.
    """

    kron_radius: np.ndarray
    kron_flux: np.ndarray
    kron_error: np.ndarray
    aperture_flux: np.ndarray
    aperture_error: np.ndarray


# --- the mesh -----------------------------------------------------------------------------------------


class _Boxes(NamedTuple):
    """Level and rms of boxes, NaN where there are too few blank pixels; shape of the image; numbers of pixels."""

    level: np.ndarray
    rms: np.ndarray
    shape: tuple[int, int]
    usable: int
    huge: int


Edges = tuple[list[int], list[int]]
_Strip = tuple[Source, Edges, int]
"""An image, the edges of its boxes, and the first row of boxes of a strip."""


def _edges(shape: tuple[int, int]) -> Edges:
    rows, columns = (np.linspace(0, n, max(2, round(n / BOX)) + 1).round().astype(int).tolist() for n in shape)
    return rows, columns


def _rows_of(edges: Edges, first: int) -> tuple[list[int], slice]:
    """The edges of a strip's boxes along y, and its rows."""
    own = edges[0][first : first + STRIP + 1]
    return own, slice(own[0], own[-1])


def _first_boxes(strip: _Strip) -> _Boxes:
    source, edges, first = strip
    own, rows = _rows_of(edges, first)
    data, bad, _ = source.read((rows, slice(0, source.shape[1])))
    return _boxes(data, bad, bad, (own, edges[1]), source.shape)


def _boxes_between(strip: tuple[Source, Edges, int, Detector, _Boxes, float]) -> _Boxes:
    source, edges, first, detector, mesh, smoothed = strip
    own, rows = _rows_of(edges, first)
    strip_window = rows, slice(0, source.shape[1])
    window = grown(strip_window, GROWN + detector.halo, source.shape)
    pixels = source.read(window)
    sources = _covered(detector, pixels, _flat_sky(pixels, window, mesh, smoothed), smoothed)
    inner = within(strip_window, window)
    bad = pixels.bad[inner]
    return _boxes(pixels.data[inner], bad, bad | sources[inner], (own, edges[1]), source.shape)


def _flat_sky(pixels: Pixels, window: Window, mesh: _Boxes, smoothed: float) -> Sky:
    """The sky of a window before anything is known of the correlation of its noise, or of a noise map."""
    return Mesh(*mesh[:3], np.ones((1, 1)), smoothed, np.nan).at(window, pixels)


def _covered(detector: Detector, pixels: Pixels, sky: Sky, smoothed: float) -> np.ndarray:
    """Pixels of sources and what is near them, bool, (H, W)."""
    smooth = detector.smooth(pixels.data - sky.level, pixels.bad)
    found = detector.regions(smooth, sky, pixels.bad, smoothed)
    if found is None:
        return np.zeros(pixels.bad.shape, bool)
    return _dilated(found.data > 0, GROWN)


def _grown_labels(labels: np.ndarray, reach: int) -> np.ndarray:
    """What `skimage.segmentation.expand_labels` makes of labels, for small distances; (H, W).

    Of labels that are equally near, the one further left counts, then the upper one.
    """
    sides = range(-reach, reach + 1)
    steps = [(dy, dx) for dx in sides for dy in sides if 0 < dx**2 + dy**2 <= reach**2]
    steps.sort(key=lambda step: step[0] ** 2 + step[1] ** 2)
    out = np.pad(labels, reach)
    flat = out.ravel()
    near = np.pad(_dilated(labels > 0, reach) & (labels == 0), reach)
    place = np.flatnonzero(near)
    new = np.zeros(len(place), labels.dtype)
    for dy, dx in reversed(steps):
        there = flat[place + dy * out.shape[1] + dx]
        np.copyto(new, there, where=there > 0)
    flat[place] = new
    return np.ascontiguousarray(out[reach:-reach, reach:-reach])


def _dilated(inside: np.ndarray, reach: int) -> np.ndarray:
    """A mask grown by a disc: pixels whose distance to it is at most `reach`, bool, (H, W)."""
    out, wide = inside.copy(), inside.copy()
    width = 0
    for dy in range(reach, -1, -1):  # from the shortest chord of the disc to the longest
        while (width + 1) ** 2 + dy**2 <= reach**2:
            width += 1
            wide[:, width:] |= inside[:, :-width]
            wide[:, :-width] |= inside[:, width:]
        if dy:
            out[dy:] |= wide[:-dy]
            out[:-dy] |= wide[dy:]
        else:
            out |= wide
    return out


def _boxes(data: np.ndarray, bad: np.ndarray, ignore: np.ndarray, edges: Edges, shape: tuple[int, int]) -> _Boxes:
    """Sigma-clipped sky and noise of the boxes of a strip, whose first row is that of the first edge."""
    rows, columns = ([slice(a, b) for a, b in itertools.pairwise(line)] for line in edges)
    first = rows[0].start
    values = np.where(ignore, np.nan, data).astype(np.float32)
    parts = [values[y.start - first : y.stop - first, x].ravel() for y in rows for x in columns]
    level, rms = np.full(len(parts), np.nan), np.full(len(parts), np.nan)
    padded = np.full((len(parts), max(len(part) for part in parts)), np.nan, np.float32)
    for row, part in zip(padded, parts, strict=True):
        row[: len(part)] = part
    enough = np.isfinite(padded).mean(axis=1) > 1 - COVERED
    if enough.any():
        level[enough], rms[enough] = _sky_of(_clipped(padded[enough]))
    form = len(rows), len(columns)
    huge = np.isfinite(data) & (np.abs(data) >= HUGE)
    return _Boxes(level.reshape(form), rms.reshape(form), shape, int((~bad).sum()), int(huge.sum()))


def _clipped(boxes: np.ndarray, sigma: float = 3.0, rounds: int = 10) -> np.ndarray:
    """Boxes with NaN in place of outliers, as from `astropy.stats.SigmaClip` about the median; float32, (N, P).

    The values are sorted once; what is left after a round is a part of them, and its
    moments are differences of sums.
    """
    out = boxes.copy()
    for row in out:
        values = np.sort(row[np.isfinite(row)]).astype(float)
        shifted = values - values[len(values) // 2]
        sums, squares = (np.concatenate([[0.0], np.cumsum(power)]) for power in (shifted, shifted**2))
        first, last, low, high = 0, len(values), -np.inf, np.inf
        for _ in range(rounds):
            n = last - first
            mean = (sums[last] - sums[first]) / n
            deviation = sigma * np.sqrt(max((squares[last] - squares[first]) / n - mean**2, 0.0))
            median = (values[first + (n - 1) // 2] + values[first + n // 2]) / 2
            low, high = median - deviation, median + deviation
            before = n
            first, last = (
                first + int(np.searchsorted(values[first:last], low, "left")),
                first + int(np.searchsorted(values[first:last], high, "right")),
            )
            if last - first == before:
                break
        row[~((row >= np.float32(low)) & (row <= np.float32(high)))] = np.nan
    return out


def _sky_of(clipped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Level and rms of boxes, as photutils' `SExtractorBackground` and `MADStdBackgroundRMS` have them, (N,)."""
    rows = [row[np.isfinite(row)] for row in clipped]
    median = np.array([_median(row) for row in rows])
    spread = np.array([_median(np.abs(row - middle)) for row, middle in zip(rows, median, strict=True)])
    mean, std = np.nanmean(clipped, axis=1), np.nanstd(clipped, axis=1)
    level = 2.5 * median - 1.5 * mean
    flat = std == 0
    level[flat] = mean[flat]
    with np.errstate(invalid="ignore", divide="ignore"):
        skewed = ~flat & (np.abs(mean - median) / std >= 0.3)
    level[skewed] = median[skewed]
    return level, spread * _RMS_OF_MAD


_RMS_OF_MAD = 1.482602218505602


def _median(values: np.ndarray) -> np.floating:
    """`numpy.median` of finite values, in a fifth of the time: one partition is much faster than those about two."""
    half = len(values) // 2
    ordered = np.partition(values, half)
    middle = ordered[half : half + 1]
    if len(values) % 2 == 0:
        middle = np.append(ordered[:half].max(), middle)
    return middle.mean()


def _mad_std(values: np.ndarray) -> float:
    """`astropy.stats.mad_std` of finite values."""
    return float(_median(np.abs(values - _median(values))) * _RMS_OF_MAD)


def _assembled(strips: Iterable[_Boxes], shape: tuple[int, int]) -> _Boxes:
    """The mesh of all strips: gaps filled from around, and outliers taken out."""
    parts = list(strips)
    level, rms = (np.concatenate(maps) for maps in ([p.level for p in parts], [p.rms for p in parts]))
    known, usable, huge = np.isfinite(level), sum(p.usable for p in parts), sum(p.huge for p in parts)
    if huge > HUGE_LIMIT * np.prod(shape):
        raise InputError(
            f"{huge / np.prod(shape):.0%} of the image's pixels have values beyond {HUGE:g}. "
            "Are its bytes in the wrong order (FITS has the most significant one first), or is its unit too small?"
        )
    if not usable:
        raise InputError(
            "The image has no pixel left that is finite, exposed, not masked and has a positive noise. "
            "Check the image and its maps."
        )
    if not known.any():
        raise InputError(
            "The image has no sky to speak of: every part is covered by sources, or has no data. Give a larger image."
        )
    if not np.median(rms[known]) > 0:
        raise InputError(
            "The image has no noise: its blank pixels all have the same value, so nothing can be measured."
        )
    if not known.all():
        distance, near = KDTree(np.argwhere(known)).query(np.argwhere(~known), k=min(10, int(known.sum())))
        distance, near = distance.reshape(len(near), -1), near.reshape(len(near), -1)
        weight = 1 / distance
        for values in (level, rms):
            values[~known] = (values[known][near] * weight).sum(axis=1) / weight.sum(axis=1)
    level, rms = (ndimage.median_filter(values, 3, mode="nearest") for values in (level, rms))
    return _Boxes(level, rms, shape, usable, huge)


_PAD = 3
"""Boxes that a mesh is continued by, straight on."""


def _coefficients(mesh: np.ndarray) -> np.ndarray:
    """Of the cubic spline through the boxes of a mesh, float64, (h + 6, w + 6)."""
    values = np.pad(mesh, _PAD, mode="reflect", reflect_type="odd")
    return np.asarray(ndimage.spline_filter(values, order=3, mode="mirror"))


def _interpolated(coefficients: np.ndarray, shape: tuple[int, int], window: Window) -> np.ndarray:
    """A mesh at the pixels of a window: cubic splines, straight on beyond the outermost centres, float64.

    Summed term by term, so that a pixel has the same value in every window.
    """
    values = coefficients
    for axis, part in enumerate(window):
        boxes = coefficients.shape[axis] - 2 * _PAD
        place = (np.arange(part.start, part.stop) + 0.5) * boxes / shape[axis] - 0.5 + _PAD
        first = np.floor(place).astype(int)
        t = place - first
        weights = np.array([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6
        values = _weighted(values, first - 1, weights, axis)
    return values


def _weighted(values: np.ndarray, first: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
    """Sums of four rows, or columns, in turn, from number `first` on, with weights (4, N); float64."""
    out = np.empty((len(first), values.shape[1]) if axis == 0 else (len(values), len(first)))
    parts = np.moveaxis(out, axis, -1)
    lines = np.moveaxis(values, axis, 0)[..., None]
    ends = np.flatnonzero(np.diff(first, append=-1)) + 1
    for start, end in itertools.pairwise([0, *ends.tolist()]):
        part, begin = parts[:, start:end], int(first[start])
        np.multiply(lines[begin], weights[0, start:end], out=part)
        for k in (1, 2, 3):
            part += lines[begin + k] * weights[k, start:end]
    return out


# --- the noise ----------------------------------------------------------------------------------------


def _windows(shape: tuple[int, int]) -> Iterator[Window]:
    """Windows that noise is measured in: all of a small image, many small ones spread over a large one."""
    if max(shape) <= SAMPLES * SAMPLE:
        yield slice(0, shape[0]), slice(0, shape[1])
        return
    starts = [np.linspace(0, max(n - SAMPLE, 0), min(SAMPLES, -(-n // SAMPLE))).astype(int) for n in shape]
    for y in starts[0].tolist():
        for x in starts[1].tolist():
            yield slice(y, min(y + SAMPLE, shape[0])), slice(x, min(x + SAMPLE, shape[1]))


def _sampled(
    apply: Map, detector: Detector, source: Source, mesh: _Boxes, smoothed: float
) -> tuple[float, np.ndarray, float]:
    """Noise of the smoothed image, autocorrelation, and the factor on a noise map, from blank pixels."""
    found = list(apply(_noise, [(detector, source, window, mesh, smoothed) for window in _windows(source.shape)]))
    weight = np.array([n for n, *_ in found], float)
    known = weight > 0
    if not known.any():
        return 1.0, np.pad(np.ones((1, 1)), REACH), 1.0
    ratios, factors = (np.array([row[k] for row in found])[known] for k in (1, 3))
    products = sum(row[2] for row in found)
    lags = products[0] / np.maximum(products[1], 1e-30)
    autocorrelation = lags / lags[REACH, REACH] if lags[REACH, REACH] > 0 else np.pad(np.ones((1, 1)), REACH)
    return float(np.median(ratios)), autocorrelation, float(np.median(factors))


def _noise(
    job: tuple[Detector, Source, Window, _Boxes, float],
) -> tuple[int, float, np.ndarray, float]:
    """Blank pixels of a window, the noise of its smoothed image, `_products`, and the factor on a noise map."""
    detector, source, window, mesh, smoothed = job
    pixels = source.read(window)
    sky = _flat_sky(pixels, window, mesh, smoothed)
    ignore = pixels.bad | _covered(detector, pixels, sky, smoothed)
    blank = ~ignore
    nothing = np.zeros((2, 2 * REACH + 1, 2 * REACH + 1))
    if not blank.any():
        blank = ~pixels.bad  # one source covers all of it
        if not blank.any():
            return 0, np.nan, nothing, np.nan
    factor = np.nan
    clean = pixels.data - sky.level
    if pixels.noise is not None:
        factor = _mad_std((clean / pixels.noise)[blank])
        sky = Sky(sky.level, pixels.noise * factor, sky.autocorrelation, factor)
    smooth = detector.smooth(clean, pixels.bad)
    ratio = _mad_std((smooth / sky.rms)[blank])
    return int(blank.sum()), ratio, _products(clean / sky.rms, blank), factor


def _products(normalised: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Sums of products of blank pixels by lag, and how many there are, float64, (2, 7, 7)."""
    out = np.zeros((2, 2 * REACH + 1, 2 * REACH + 1))
    if not used.any():
        return out
    values = np.where(used, np.clip(normalised - np.median(normalised[used]), -5, 5), 0).astype(np.float32)
    inside = used.astype(np.float32)
    for dy in range(REACH + 1):
        for dx in range(-REACH, REACH + 1):
            if (dy, dx) >= (0, 0):
                for plane, array in zip(out, (values, inside), strict=True):
                    plane[REACH + dy, REACH + dx] = plane[REACH - dy, REACH - dx] = _shifted_sum(array, dx, dy)
    return out


def _shifted_sum(values: np.ndarray, dx: int, dy: int) -> float:
    h, w = values.shape
    a = values[max(0, dy) : h + min(0, dy), max(0, dx) : w + min(0, dx)]
    b = values[max(0, -dy) : h + min(0, -dy), max(0, -dx) : w + min(0, -dx)]
    return float(np.einsum("ij,ij->", a, b, dtype=np.float64))
