"""Detections of one image on the pixels of another: positions, shapes and segmentation go through both WCS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.spatial import KDTree

from sersicnet.errors import InputError
from sersicnet.image import photometry
from sersicnet.image.detect import DILATION, USUAL_GROWTH, Detections, Detector, Found, without_hot_pixels
from sersicnet.image.exposure import Exposure
from sersicnet.image.mosaic import FARTHEST, Image
from sersicnet.image.pixels import Pixels, Sky, Source, Window, grown
from sersicnet.image.regions import grown_labels
from sersicnet.image.sky import Mesh

SAME_GRID = 0.05
"""Images are on the same grid if their pixels agree within this many pixels."""

_NODE = 32
"""Distance of the pixels that are converted by the WCS; the others are interpolated."""

_BORDER = 17
"""Points on each side of a window whose extent in another image is sought."""

_SAME_PLACE = 0.01
"""A position is that of a detection within this distance, pixels."""

_AT_ONCE = 256
"""Rows of a segmentation that are converted at once."""


def through(x: np.ndarray, y: np.ndarray, image: Image, other: Image) -> tuple[np.ndarray, np.ndarray]:
    """Zero-based pixels of one image as those of another, through both WCS; NaN where either has no sky."""
    if not np.size(x):
        return np.zeros(np.shape(x)), np.zeros(np.shape(x))
    return other.pixels(*image.sky(x, y))


def check_sky(image: Image) -> None:
    """Check that an image has a WCS.

    Raises
    ------
    InputError
        If it has none that can be used.
    """
    if image.wcs is None:
        problem = f" that can be used ({image.wcs_problem})" if image.wcs_problem else ""
        raise InputError(
            f"{image.name} has no celestial WCS{problem}: positions of several bands go through it. Give images with "
            "a WCS."
        )


def check_overlap(image: Image, detected: Image) -> None:
    """Check that positions can be carried from the detection image to another one.

    Raises
    ------
    InputError
        If either has no WCS, or they do not overlap.
    """
    for one in (image, detected):
        check_sky(one)
    height, width = image.shape
    y, x = (nodes.ravel() for nodes in np.meshgrid(np.linspace(0, height - 1, 33), np.linspace(0, width - 1, 33)))
    x, y = through(x, y, image, detected)
    with np.errstate(invalid="ignore"):
        inside = (x > -0.5) & (x < detected.shape[1] - 0.5) & (y > -0.5) & (y < detected.shape[0] - 0.5)
    if not inside.any():
        raise InputError(
            f"{detected.name} does not overlap {image.name} on the sky: its detections lie outside. Give a detection "
            "image of the same field, or correct the WCS."
        )


@dataclass(frozen=True, eq=False)
class Carried:
    """A detector whose sources are those of another image.

    Its `around` detects on that image, and returns what `sersicnet.image.detect.Detector.around` does: the sources
    have the positions, ellipses and pixels of the other image, and the flux and area of this one in these pixels.

    Attributes
    ----------
    exposure : Exposure
        The detection image.
    mesh : Mesh
        Its sky and noise.
    image : Image
        The image that the sources are carried to.
    detector : Detector
        Detects on the detection image.
    """

    exposure: Exposure
    mesh: Mesh
    image: Image
    detector: Detector = field(default_factory=Detector)

    def places(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Pixels of the detection image as pixels of the other one, (N, 2), rounded to six decimals."""
        return np.round(np.column_stack(through(x, y, self.exposure.image, self.image)), 6)

    def source_at(self, found: Detections, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Index of the detection that has each position, -1 for none."""
        out = np.full(len(x), -1)
        asked = np.flatnonzero(np.isfinite(x + y))
        if len(found) and len(asked):
            tree = KDTree(np.column_stack([found.x, found.y]))
            distance, nearest = tree.query(np.column_stack([x[asked], y[asked]]))
            near = distance < _SAME_PLACE
            out[asked[near]] = nearest[near]
        return out

    def around(self, source: Source, mesh: Mesh, zone: Window) -> Found:
        """Carry the sources of a zone; parameters as for `sersicnet.image.detect.Detector.around`."""
        there = self._extent(zone, self.image, self.exposure.image)
        try:
            seen = None if there is None else self.detector.around(self.exposure, self.mesh, there)
        finally:
            self.exposure.close()
        window = grown(zone, USUAL_GROWTH, source.shape)
        if seen is not None and len(seen.detections):
            region = self._extent(_extent_of(seen), self.exposure.image, self.image)
            window = window if region is None else _union(window, region)
        pixels = without_hot_pixels(source.read(window), mesh)
        sky = mesh.at(window, pixels)
        return Found(window, pixels, sky, self._detections(seen, window, pixels, sky))

    def _extent(self, window: Window, image: Image, other: Image) -> Window | None:
        """The smallest window of another image that contains a window of an image; None if there is none."""
        rows, columns = window
        if rows.stop <= rows.start or columns.stop <= columns.start:
            return None
        y, x = np.meshgrid(
            np.linspace(rows.start - 0.5, rows.stop - 0.5, _BORDER),
            np.linspace(columns.start - 0.5, columns.stop - 0.5, _BORDER),
        )
        x, y = through(x.ravel(), y.ravel(), image, other)
        x, y = x[np.isfinite(x + y)], y[np.isfinite(x + y)]
        if not len(x):
            return None
        parts = []
        for values, n in ((y, other.shape[0]), (x, other.shape[1])):
            low, high = (int(np.clip(edge, 0, n)) for edge in (np.floor(values.min()) - 1, np.ceil(values.max()) + 2))
            if low >= high:
                return None
            parts.append(slice(low, high))
        return parts[0], parts[1]

    def _detections(self, seen: Found | None, window: Window, pixels: Pixels, sky: Sky) -> Detections:
        shape = pixels.data.shape
        clean = pixels.data - sky.level
        if seen is None or not len(seen.detections):
            none, nothing = np.zeros(0), np.zeros(shape, np.int32)
            scene = photometry.Scene(clean, pixels.bad, sky.rms, nothing)
            no = none.astype(int)
            return Detections(nothing, none, none, none, none, none, none, none, no.astype(bool), no, scene)
        found, n = seen.detections, len(seen.detections)
        segmentation, dilated = self._labels(seen, window, shape)
        place = self.places(found.x, found.y)
        a, b, theta = self._ellipses(found)
        inner = photometry.Moments(place[:, 0] - window[1].start, place[:, 1] - window[0].start, a, b, theta)
        seen_pixels = np.bincount(segmentation.ravel(), minlength=n + 1)[1:]
        for k in np.flatnonzero(
            (seen_pixels == 0) & np.isfinite(inner.x + inner.y)
        ):  # smaller than a pixel of this image
            row, column = round(inner.y[k]), round(inner.x[k])
            if 0 <= row < shape[0] and 0 <= column < shape[1] and segmentation[row, column] == 0:
                segmentation[row, column] = k + 1
        # A source is dilated by as many pixels of the image with the larger ones: its PSF may be wider.
        dilated = np.where(dilated > 0, dilated, grown_labels(segmentation, DILATION))
        used = (segmentation > 0) & ~pixels.bad
        label = segmentation[used]
        area = np.bincount(label, minlength=n + 1)[1:].astype(float)
        out = Detections(
            segmentation=segmentation,
            x=np.nan_to_num(place[:, 0], nan=-FARTHEST),
            y=np.nan_to_num(place[:, 1], nan=-FARTHEST),
            a=a,
            b=b,
            theta=theta,
            flux=np.bincount(label, clean[used], n + 1)[1:],
            area=np.where(area > 0, area, np.nan),  # nothing is known of a source without pixels
            blended=found.blended,
            parent=found.parent,
            _scene=photometry.Scene(clean, pixels.bad, sky.rms, segmentation),
            _moments=inner,
            _correlation=sky.correlation,
        )
        out._dilated = dilated
        return out

    def _labels(self, seen: Found, window: Window, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """The segmentation, and that with dilated sources, at the pixels of a window: the labels at their centres."""
        rows, columns = (_nodes(part) for part in window)
        y, x = np.meshgrid(rows, columns, indexing="ij")
        nodes = [values.reshape(x.shape) for values in through(x.ravel(), y.ravel(), self.image, self.exposure.image)]
        across = _weights(columns, np.arange(window[1].start, window[1].stop))
        out = np.zeros((2, *shape), np.int32)
        maps = seen.detections.segmentation, seen.detections.dilated()
        height, width = maps[0].shape
        for first in range(0, shape[0], _AT_ONCE):
            part = slice(first, min(first + _AT_ONCE, shape[0]))
            along = _weights(rows, np.arange(window[0].start + part.start, window[0].start + part.stop))
            x, y = (along @ values @ across.T for values in nodes)
            with np.errstate(invalid="ignore"):
                column, row = (
                    np.rint(np.nan_to_num(values - start.start, nan=-1.0).clip(-1, n)).astype(int)
                    for values, start, n in ((x, seen.window[1], width), (y, seen.window[0], height))
                )
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            row, column = row[inside], column[inside]
            for values, labels in zip(out, maps, strict=True):
                values[part][inside] = labels[row, column]
        return out[0], out[1]

    def _ellipses(self, found: Detections) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Axes and angles of the sources in the other image, by the derivatives of the coordinates."""
        n, h = len(found), 0.5
        steps = np.array([[h, 0], [-h, 0], [0, h], [0, -h]])
        x, y = (np.concatenate([place + step for step in steps[:, k]]) for k, place in enumerate((found.x, found.y)))
        ends = np.stack(through(x, y, self.exposure.image, self.image)).reshape(2, 4, n)
        jacobian = np.stack([ends[:, 0] - ends[:, 1], ends[:, 2] - ends[:, 3]], axis=1) / (2 * h)  # (to, from, N)
        angle = np.radians(found.theta)
        major, minor = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
        axes = (np.einsum("ijn,jn->in", jacobian, axis * size) for axis, size in ((major, found.a), (minor, found.b)))
        (x1, y1), (x2, y2) = axes
        xx, xy, yy = x1**2 + x2**2, x1 * y1 + x2 * y2, y1**2 + y2**2
        middle, half = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
        theta = np.degrees(np.arctan2(2 * xy, xx - yy)) / 2
        return np.sqrt(middle + half), np.sqrt(np.maximum(middle - half, 0)), (theta + 90) % 180 - 90


def _extent_of(seen: Found) -> Window:
    """The window of the image that all pixels of the sources are in."""
    rows, columns = (np.flatnonzero((seen.detections.dilated() > 0).any(axis=axis)) for axis in (1, 0))
    top, left = seen.window[0].start, seen.window[1].start
    return slice(top + int(rows[0]), top + int(rows[-1]) + 1), slice(
        left + int(columns[0]), left + int(columns[-1]) + 1
    )


def _union(one: Window, other: Window) -> Window:
    rows, columns = (slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
    return rows, columns


def _nodes(part: slice) -> np.ndarray:
    """Places along an axis at which coordinates are computed, at most `_NODE` pixels apart."""
    return np.linspace(part.start, max(part.stop - 1, part.start + 1), 2 + (part.stop - part.start) // _NODE)


def _weights(nodes: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Matrix of linear interpolation from nodes to places, (places, nodes)."""
    step = nodes[1] - nodes[0]
    return np.maximum(0, 1 - np.abs(places[:, None] - nodes) / step)


class _Mean(Image):
    """The mean of images on the same grid by inverse variance, at the zero point of the first, without their skies."""

    def __init__(self, exposures: Sequence[Exposure], meshes: Sequence[Mesh], name: str, *, rms: bool) -> None:
        first = exposures[0].image
        super().__init__(name, first.header, first.shape, first.wcs)
        self.exposures, self.meshes, self.rms = list(exposures), list(meshes), rms

    @property
    def is_held(self) -> bool:
        """Whether one of the images is in memory as a whole."""
        return any(image.is_held for exposure in self.exposures for image in exposure.images)

    def identity(self) -> list[Any]:
        """What identifies the images, their maps, and how they are weighted."""
        return [
            [*(image.identity() for image in one.images), one.zero_point.value, one.noise_kind, one.noise_as_given]
            for one in self.exposures
        ]

    def read(self, window: Window) -> np.ndarray:
        """The mean of a window, or its noise; NaN where no image has data."""
        zero_point = self.exposures[0].zero_point.value
        total, weights = np.zeros((2, *(part.stop - part.start for part in window)))
        for exposure, mesh in zip(self.exposures, self.meshes, strict=True):
            pixels = exposure.read(window)
            sky = mesh.at(window, pixels)
            unit = 10 ** (-0.4 * (exposure.zero_point.value - zero_point))
            used = ~pixels.bad & (sky.rms > 0)
            weight = np.where(used, 1 / np.where(used, unit * sky.rms, 1) ** 2, 0)
            total += weight * np.where(used, unit * (pixels.data - sky.level), 0)
            weights += weight
        empty = weights == 0
        weights[empty] = np.nan
        return (1 / np.sqrt(weights) if self.rms else total / weights).astype(np.float32)

    def close(self) -> None:
        """Close all files."""
        for exposure in self.exposures:
            exposure.close()


def combined(exposures: Sequence[Exposure], meshes: Sequence[Mesh]) -> Exposure:
    """Combine images on the same grid into one for detection, weighted by their inverse variances.

    Parameters
    ----------
    exposures : sequence of Exposure
        See `check_same_grid`.
    meshes : sequence of Mesh
        Their skies, which are subtracted, and their noise.

    Returns
    -------
    Exposure
        With the zero point of the first, and a map of the noise.
    """
    name = " + ".join(exposure.name for exposure in exposures)
    mean, rms = (_Mean(exposures, meshes, name, rms=rms) for rms in (False, True))
    return Exposure(mean, exposures[0].zero_point, exposures[0].pixel_scale, noise=rms)


def check_same_grid(exposures: Sequence[Exposure]) -> None:
    """Check that images that are combined have the same pixels.

    Raises
    ------
    InputError
        If their shapes or coordinates differ.
    """
    first = exposures[0].image
    height, width = first.shape
    y, x = (nodes.ravel() for nodes in np.meshgrid(np.linspace(0, height - 1, 5), np.linspace(0, width - 1, 5)))
    for exposure in exposures[1:]:
        other = exposure.image
        apart = np.inf
        if other.shape == first.shape:
            apart = float(
                np.nanmax(np.hypot(*(a - b for a, b in zip(through(x, y, other, first), (x, y), strict=True))))
            )
        if not apart < SAME_GRID:
            raise InputError(
                f"Images that are combined for detection have the same pixels: {other.name} "
                f"({other.shape[1]} x {other.shape[0]}) and {first.name} ({width} x {height}) do not. Resample one to "
                "the other first, or detect on one of them."
            )
