"""Detection of sources in an image, window by window.

The first pass detects sources with a core, and deblends its regions. The second pass uses a wider
filter and detects faint, extended galaxies between them. The result at a position does not depend
on the window: all pixels are smoothed with the same sums, connected regions are always complete,
and each region is deblended independently of the others.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from sersicnet.image import photometry
from sersicnet.image.deblend import Deblending
from sersicnet.image.photometry import Moments, Photometry
from sersicnet.image.pixels import Held, Pixels, Sky, Source, Window, grown, within
from sersicnet.image.regions import BRIDGE, Regions, Threshold, grown_labels
from sersicnet.image.sky import Mesh, estimate_sky

DILATION = 2
"""Width of the border, in pixels, by which a source is dilated before it is masked in the stamps of its neighbours."""

USUAL_GROWTH, GROWTH, MOST_GROWTH = 48, 256, 4096
"""Margins of a window around a zone, pixels: the initial one, the first enlarged one where a source crosses the
border of the window, and the largest one."""


HOT, HOT_SHARE = 1e3, 0.01
"""A pixel of at least this many times the noise is hot, and ignored, if at most one of its eight neighbours has more
than this share of its value: no PSF is so narrow."""


@dataclass
class Detections:
    """Sources detected in an image, or in a window of an image, in order of label.

    Attributes
    ----------
    segmentation : ndarray, int32, (H, W)
        Labels from 1; 0 is sky.
    x, y : ndarray, float64, (N,)
        Centroids, zero-based pixels.
    a, b : ndarray, float64, (N,)
        Semi-major and semi-minor axes (1 sigma) from the second moments, pixels.
    theta : ndarray, float64, (N,)
        Angle of the major axis, degrees from +x towards +y.
    flux : ndarray, float64, (N,)
        Sum over the detected pixels, image units.
    area : ndarray, float64, (N,)
        Number of detected pixels.
    blended : ndarray, bool, (N,)
        Whether the source was deblended from a touching one.
    parent : ndarray, int, (N,)
        Index of the brightest source in the same connected region; the source's own index if it is alone.
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
    _dilated: np.ndarray | None = field(default=None, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.x)

    def dilated(self) -> np.ndarray:
        """The segmentation with every source dilated by `DILATION` pixels, int32, (H, W); cached."""
        if self._dilated is None:
            self._dilated = grown_labels(self.segmentation, DILATION)
        return self._dilated

    def photometry(self, which: np.ndarray) -> Photometry:
        """Measure the aperture photometry of sources.

        The pixels of neighbours are replaced by their point reflections about the source. Errors are those of
        the correlated noise of the sky, without the Poisson noise of the source.

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


class Found(NamedTuple):
    """A window of an image, and the sources detected in it.

    The segmentation of `detections` has the shape of the window. Their x and y are in pixels of the
    image, rounded to six decimals so that they are the same from every window.
    """

    window: Window
    pixels: Pixels
    sky: Sky
    detections: Detections


@dataclass(frozen=True, kw_only=True)
class Detector:
    """Options of the detection; call it to detect the sources of an image.

    Attributes
    ----------
    threshold : Threshold
    deblending : Deblending
    least_snr : float
        Minimum signal to noise of a connected region, in its area.
    pieces : float
        Regions of the first pass inside a region of the second pass are pieces of it if their fluxes
        sum to less than this fraction of its flux.
    """

    threshold: Threshold = field(default_factory=Threshold)
    deblending: Deblending = field(default_factory=Deblending)
    least_snr: float = 5.0
    pieces: float = 0.4

    def __call__(
        self, data: np.ndarray, bad: np.ndarray, noise_map: np.ndarray | None = None
    ) -> tuple[Sky, Detections]:
        """Measure the sky and detect the sources of an image in memory.

        Parameters
        ----------
        data : ndarray, float32, (H, W)
            Image, sky included; pixels of `bad` are ignored.
        bad : ndarray, bool, (H, W)
            Pixels without data.
        noise_map : ndarray, float32, (H, W), optional
            Relative noise of the pixels; it is scaled to the scatter of blank pixels.

        Returns
        -------
        Sky, Detections

        Raises
        ------
        InputError
            If the noise of the image is zero.
        """
        source = Held(Pixels(data, bad, noise_map))
        mesh = estimate_sky(source, self.threshold)
        source = Held(without_hot_pixels(source.pixels, mesh))
        window = slice(0, data.shape[0]), slice(0, data.shape[1])
        sky = mesh.at(window, source.pixels)
        return sky, self.find(source.pixels, sky, mesh)

    def find(self, pixels: Pixels, sky: Sky, mesh: Mesh) -> Detections:
        """Detect the sources of an image in memory.

        Parameters
        ----------
        pixels : Pixels
        sky : Sky
        mesh : Mesh
            Gives the noise of the smoothed images.
        """
        clean = pixels.data - sky.level
        smooth = self.threshold.smooth(clean, pixels.bad)
        window = slice(0, smooth.shape[0]), slice(0, smooth.shape[1])
        regions, extended = self._passes(smooth, pixels.bad, sky, mesh, window)
        return self._sources(clean, pixels.bad, sky, smooth, regions, extended, mesh.smoothed)

    def _passes(
        self, smooth: np.ndarray, bad: np.ndarray, sky: Sky, mesh: Mesh, window: Window
    ) -> tuple[Regions, Regions]:
        """Connected regions of the first and of the second pass in a window of the image.

        The pixels of `smooth` that bridge bad pixels of a source are filled, in place.
        """
        regions = self.threshold.regions(smooth, sky, mesh.smoothed, bad)
        return regions, self.threshold.extended(smooth, sky, mesh.smoothed, mesh.widely, window)

    def around(self, source: Source, mesh: Mesh, zone: Window) -> Found:
        """Detect the sources of a zone of an image.

        The window that is read has a margin around the zone, and is enlarged until it contains every
        connected region with a pixel in the zone completely; other regions are discarded. A region
        therefore gives the same sources from every zone.

        Parameters
        ----------
        source : Source
        mesh : Mesh
            Sky and noise of the whole image.
        zone : Window

        Returns
        -------
        Found
        """
        shape, more, threshold = source.shape, [USUAL_GROWTH] * 4, self.threshold
        while True:
            reach = grown(zone, threshold.wide_halo + 1, shape)
            window = (
                slice(max(reach[0].start - more[0], 0), min(reach[0].stop + more[1], shape[0])),
                slice(max(reach[1].start - more[2], 0), min(reach[1].stop + more[3], shape[1])),
            )
            pixels = without_hot_pixels(source.read(window), mesh)
            sky = mesh.at(window, pixels)
            clean = pixels.data - sky.level
            smooth = threshold.smooth(clean, pixels.bad)
            regions, extended = self._passes(smooth, pixels.bad, sky, mesh, window)
            inner = within(zone, window)
            # A region of one pass may remove regions of the other pass that overlap it.
            seen = regions.within(inner)
            piece, whole = regions.overlapping(extended)
            seen_whole = extended.within(inner)
            seen_whole[whole[seen[piece]]] = True
            seen[piece[seen_whole[whole]]] = True
            regions, extended = regions.chosen(seen), extended.chosen(seen_whole)
            # Smoothing is incomplete near a side of the window that is not a side of the image.
            open_sides = (
                window[0].start > 0,
                window[0].stop < shape[0],
                window[1].start > 0,
                window[1].stop < shape[1],
            )
            sides = zip(open_sides, regions.margins(), extended.margins(), strict=True)
            halo = threshold.halo + (BRIDGE if regions.touch(pixels.bad) else 0)
            cut = [is_open and (near < halo or far < threshold.wide_halo) for is_open, near, far in sides]
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
        regions, extended = self._significant(clean, bad, sky, regions, extended)
        if not len(regions) + len(extended):
            none, no = np.zeros(0), np.zeros(0, int)
            nothing = np.zeros(clean.shape, np.int32)
            return Detections(nothing, none, none, none, none, none, none, none, no.astype(bool), no)
        # Pixels in regions of both passes belong to the region of the first pass.
        parts = np.zeros(clean.shape, np.int32)
        parts.ravel()[extended.at] = extended.label + len(regions)
        parts.ravel()[regions.at] = regions.label
        at = np.unique(np.concatenate([regions.at, extended.at]))
        region = parts.ravel()[at]
        used = ~bad.ravel()[at]
        noise = sky.rms * np.float32(smoothed)
        if not used.all():
            noise.ravel()[at[~used]] = _means(noise.ravel()[at[used]], region[used])[region[~used]]
        self.deblending.separate(smooth, parts, at, regions, noise, self.threshold.n_pixels)
        label = parts.ravel()[at]
        if not used.all():  # bridged pixels alone are no source
            n = int(label.max())
            stays = np.bincount(label[used], minlength=n + 1) >= self.threshold.n_pixels
            stays |= np.bincount(label[~used], minlength=n + 1) == 0
            stays[0] = False
            parts.ravel()[at] = (np.cumsum(stays, dtype=np.int32) * stays)[label]
            at, region, used = (values[stays[label]] for values in (at, region, used))
            label = parts.ravel()[at]
        n = int(label.max())
        first_parent = np.zeros(n + 1, np.int64)
        first_parent[label] = region
        parent = first_parent[1:]
        row = at // clean.shape[1]
        found = photometry.moments(smooth.ravel()[at], row, at - row * clean.shape[1], label, n)
        light = clean.ravel()[at]
        if used.all():
            flux, area = np.bincount(label, light, n + 1)[1:], np.bincount(label, minlength=n + 1)[1:]
        else:  # bridged pixels belong to a source, but its light in them is not known
            flux, area = np.bincount(label[used], light[used], n + 1)[1:], np.bincount(label[used], minlength=n + 1)[1:]
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

    def _significant(
        self, clean: np.ndarray, bad: np.ndarray, sky: Sky, regions: Regions, extended: Regions
    ) -> tuple[Regions, Regions]:
        """Regions of both passes whose total flux is significant.

        A region of the second pass that overlaps regions of the first pass replaces them if they are
        `pieces` of it and none of them has a higher signal to noise; otherwise it is discarded.
        """
        (flux, signal), (wide_flux, wide_signal) = (self._light(clean, bad, sky, some) for some in (regions, extended))
        good, wide_good = signal >= self.least_snr, wide_signal >= self.least_snr
        piece, whole = regions.overlapping(extended)
        piece, whole = piece[good[piece]], whole[good[piece]]
        wide_good &= np.bincount(whole, flux[piece], len(wide_flux)) < self.pieces * wide_flux
        wide_good[whole[signal[piece] > wide_signal[whole]]] = False
        good[piece[wide_good[whole]]] = False
        return regions.chosen(good), extended.chosen(wide_good)

    def _light(self, clean: np.ndarray, bad: np.ndarray, sky: Sky, regions: Regions) -> tuple[np.ndarray, np.ndarray]:
        """Flux and signal to noise of regions, float64, (N + 1,), indexed by label; index 0 is unused."""
        at, label, n = regions.at, regions.label, len(regions)
        used = ~bad.ravel()[at]
        if not used.all():
            at, label = at[used], label[used]
        flux = np.bincount(label, clean.ravel()[at], n + 1)
        variance = np.bincount(label, sky.rms.ravel()[at].astype(float) ** 2, n + 1)
        return flux, flux / np.sqrt(np.maximum(variance, sys.float_info.min)) / sky.correlation


def without_hot_pixels(pixels: Pixels, mesh: Mesh) -> Pixels:
    """The pixels of a window, with hot and dead ones added to `bad`."""
    data, (height, width) = pixels.data, pixels.data.shape
    level, limit = float(np.median(mesh.level)), HOT * float(np.median(mesh.rms))
    with np.errstate(invalid="ignore"):
        row, column = np.nonzero((data > level + limit) | (data < level - limit))
    if not len(row):
        return pixels
    around = np.full((8, len(row)), -np.inf)
    steps = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    for values, (dy, dx) in zip(around, steps, strict=True):
        inside = (row + dy >= 0) & (row + dy < height) & (column + dx >= 0) & (column + dx < width)
        there = row[inside] + dy, column[inside] + dx
        values[inside] = np.where(pixels.bad[there], -np.inf, np.abs(data[there].astype(float) - level))
    hot = np.sort(around, axis=0)[-2] < HOT_SHARE * np.abs(data[row, column].astype(float) - level)
    if not hot.any():
        return pixels
    bad = pixels.bad.copy()
    bad[row[hot], column[hot]] = True
    noise = None if pixels.noise is None else np.where(bad, np.float32(np.nan), pixels.noise)
    return Pixels(data, bad, noise)


def _means(values: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Mean value of each label, float64; the index is the label."""
    return np.bincount(label, values) / np.maximum(np.bincount(label), 1)
