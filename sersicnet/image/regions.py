"""Connected regions of pixels above a detection threshold."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse
from scipy.spatial import KDTree

from sersicnet.image.pixels import Sky, Window

BRIDGE = 32
"""A source is bridged over at most this many bad pixels along a row or a column."""


@dataclass(frozen=True, eq=False)
class Regions:
    """Connected regions of an image.

    Attributes
    ----------
    shape : (int, int)
        Height and width of the image.
    at : ndarray, int, (P,)
        Pixels of all regions, as indices into the flattened image.
    label : ndarray, int32, (P,)
        Label of the region of each pixel, from 1 without gaps.
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
        """The pixels of the image that are in a region, bool, (H, W)."""
        out = np.zeros(self.shape, bool)
        out.ravel()[self.at] = True
        return out

    def chosen(self, which: np.ndarray) -> Regions:
        """Select and relabel regions; `which`, bool, (N + 1,), is indexed by label, and index 0 is ignored."""
        new = np.concatenate([[0], np.cumsum(which[1:])]).astype(np.int32) * which
        label = new[self.label]
        return Regions(self.shape, self.at[label > 0], label[label > 0])

    def within(self, window: Window) -> np.ndarray:
        """Whether each region has a pixel in a window, bool, (N + 1,), indexed by label."""
        row, column = self.places()
        inside = (row >= window[0].start) & (row < window[0].stop)
        inside &= (column >= window[1].start) & (column < window[1].stop)
        out = np.zeros(len(self) + 1, bool)
        out[self.label[inside]] = True
        return out

    def boxes(self) -> list[Window]:
        """The bounding box of each region."""
        sides = []
        for places in self.places():
            low, high = np.full(len(self) + 1, np.iinfo(np.int64).max), np.zeros(len(self) + 1, np.int64)
            np.minimum.at(low, self.label, places)
            np.maximum.at(high, self.label, places)
            sides.append([slice(a, b + 1) for a, b in zip(low[1:].tolist(), high[1:].tolist(), strict=True)])
        return list(zip(*sides, strict=True))

    def margins(self) -> tuple[float, float, float, float]:
        """Distances of the regions from the sides of the image, pixels: lower and upper along y, then along x."""
        if not len(self.at):
            return (math.inf,) * 4
        (row, column), (height, width) = self.places(), self.shape
        return row.min(), height - 1 - row.max(), column.min(), width - 1 - column.max()

    def touch(self, bad: np.ndarray) -> bool:
        """Whether a pixel of a region is bad, or next to a bad one along a row or a column."""
        if not bad.any():
            return False
        (row, column), (height, width) = self.places(), self.shape
        return any(
            bool(bad[np.clip(row + dy, 0, height - 1), np.clip(column + dx, 0, width - 1)].any())
            for dy, dx in ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))
        )

    def overlapping(self, other: Regions) -> tuple[np.ndarray, np.ndarray]:
        """Labels of the pairs of own and other regions that share pixels, int, (M,) each."""
        mine = np.zeros(self.shape, np.int32)
        mine.ravel()[self.at] = self.label
        both = mine.ravel()[other.at]
        shared = both > 0
        pairs = np.unique(both[shared].astype(np.int64) * (len(other) + 1) + other.label[shared])
        return pairs // (len(other) + 1), pairs % (len(other) + 1)


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Filters and threshold of the two passes of the detection.

    Attributes
    ----------
    level : float
        Threshold in units of the noise of the smoothed image.
    smoothing : float
        FWHM of the Gaussian that the image is smoothed with, pixels.
    n_pixels : int
        Minimum number of connected pixels above the threshold.
    wide : float
        FWHM of the Gaussian of the second pass, pixels. Before the second pass, the smoothed image is
        clipped at the threshold of the first one, so that compact sources stay small.
    """

    level: float = 3.0
    smoothing: float = 3.0
    n_pixels: int = 15
    wide: float = 10.0

    @property
    def halo(self) -> int:
        """Margin around a window that affects the first pass in it, pixels; complete regions may need more."""
        return len(_gaussian(self.smoothing)) // 2 + 1

    @property
    def wide_halo(self) -> int:
        """The same margin for the second pass, pixels."""
        return self.halo + 2 * (len(self._wide_kernel) // 2 + 1)

    @property
    def _wide_kernel(self) -> np.ndarray:
        """The Gaussian that widens every second pixel of the smoothed image to the filter of the second pass."""
        return _gaussian(math.sqrt(self.wide**2 - self.smoothing**2) / 2)

    def binned(self, n: int) -> Threshold:
        """The threshold of the first pass for an image binned by `n`."""
        return replace(self, smoothing=self.smoothing / n, n_pixels=math.ceil(self.n_pixels / n**2))

    def smooth(self, clean: np.ndarray, bad: np.ndarray) -> np.ndarray:
        """An image smoothed for detection, float32; the value of a pixel does not depend on the window."""
        return _convolved(clean, ~bad, _gaussian(self.smoothing))

    def smooth_widely(self, smooth: np.ndarray, sky: Sky, smoothed: float) -> np.ndarray:
        """The image smoothed for the second pass at every second pixel, starting at the first one, float32."""
        limit = np.float32(self.level * smoothed) * sky.rms[::2, ::2]
        known = np.isfinite(limit)
        limit[~known] = 0
        return _convolved(np.clip(smooth[::2, ::2], -limit, limit), known, self._wide_kernel)

    def regions(self, smooth: np.ndarray, sky: Sky, smoothed: float, bad: np.ndarray | None = None) -> Regions:
        """Connected regions above the threshold, numbered in order of their first pixels.

        They equal the segments of `photutils.segmentation.detect_sources`, but only their pixels are stored.
        Bad pixels between two pixels above the threshold, at most `BRIDGE` apart along a row or a column,
        belong to the region, so that a source with a masked core or column is a single source.

        Parameters
        ----------
        smooth : ndarray, float32, (H, W)
            Image from `smooth`; bridged pixels are filled, in place, such that their values rise towards the
            middle of a masked core.
        sky : Sky
        smoothed : float
            Noise of the smoothed image over the noise of the image.
        bad : ndarray, bool, (H, W), optional
            Pixels without data.
        """
        return self._above(smooth, np.float32(self.level * smoothed) * sky.rms, bad)

    def extended(self, smooth: np.ndarray, sky: Sky, smoothed: float, widely: float, window: Window) -> Regions:
        """Connected regions of the second pass, in a window of the image.

        Parameters
        ----------
        smooth, sky, smoothed
            As for `regions`.
        widely : float
            Noise of the image smoothed for the second pass over the noise of the image.
        window : Window
            Position of `smooth` in the image: the second pass uses the even rows and columns of the image.
        """
        first = window[0].start % 2, window[1].start % 2
        own = slice(first[0], None), slice(first[1], None)
        part = Sky(sky.level[own], sky.rms[own], sky.autocorrelation, sky.map_factor)
        wide = self.smooth_widely(smooth[own], part, smoothed)
        found = self._above(wide, np.float32(self.level * widely) * part.rms[::2, ::2])
        (height, width), (row, column) = smooth.shape, found.places()
        rows = first[0] + 2 * row + np.array([[0], [0], [1], [1]])
        columns = first[1] + 2 * column + np.array([[0], [1], [0], [1]])
        inside = (rows < height) & (columns < width)
        at, labels = (rows * width + columns)[inside], np.broadcast_to(found.label, rows.shape)[inside]
        good = np.isfinite(sky.rms.ravel()[at])
        return Regions((height, width), at[good], labels[good])

    def _above(self, smooth: np.ndarray, threshold: np.ndarray, bad: np.ndarray | None = None) -> Regions:
        with np.errstate(invalid="ignore"):
            above = smooth > threshold  # false where the noise is NaN
        at = np.flatnonzero(above)
        between = _between(above, at, bad) if bad is not None and bad.any() else at[:0]
        if not len(between):
            found = Regions(above.shape, at, _connected(at, above.shape[1]))
            return found.chosen(np.bincount(found.label, minlength=1) >= self.n_pixels)
        assert bad is not None
        at = np.union1d(at, between)
        found = Regions(above.shape, at, _connected(at, above.shape[1]))
        found = found.chosen(np.bincount(found.label, ~bad.ravel()[at], minlength=1) >= self.n_pixels)
        self._fill(smooth, bad, found)
        return found

    def _fill(self, smooth: np.ndarray, bad: np.ndarray, regions: Regions) -> None:
        """Fill the bad pixels of regions in a smoothed image, in place.

        They, and the pixels of the regions near them, get the mean of the good pixels under the filter. Bad pixels
        far from good ones get the highest of these means around them, so that a masked core is one peak.
        """
        (height, width), kernel = regions.shape, _gaussian(self.smoothing)
        bridged, reach = bad.ravel()[regions.at], len(kernel) // 2
        row, column = (values[bridged] for values in regions.places())
        steps = range(-reach, reach + 1)
        around = np.concatenate(
            [
                np.clip(row + dy, 0, height - 1) * width + np.clip(column + dx, 0, width - 1)
                for dy in steps
                for dx in steps
            ]
        )
        at = np.intersect1d(regions.at, around)
        row = at // width
        column = at - row * width
        share = np.zeros(len(at))
        for dy, down in zip(steps, kernel.tolist(), strict=True):
            for dx, across in zip(steps, kernel.tolist(), strict=True):
                y, x = row + dy, column + dx
                inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
                share[inside] += down * across * ~bad[y[inside], x[inside]]
        near = share > _LEAST_SHARE
        values = smooth.ravel()[at] / np.maximum(share, _LEAST_SHARE)
        if not near.all() and near.any():
            places = np.column_stack([row, column])
            tree, deep = KDTree(places[near]), places[~near]
            close = tree.query_ball_point(deep, 1.5 * tree.query(deep)[0] + 2)
            values[~near] = [values[near][some].max() for some in close]
        smooth.ravel()[at] = values


_LEAST_SHARE = 0.1
"""A bad pixel is near good ones if at least this share of the filter is on good pixels."""


def _between(above: np.ndarray, at: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """Bad pixels between two pixels above the threshold, along a row or a column, as indices.

    Parameters
    ----------
    above : ndarray, bool, (H, W)
    at : ndarray, int, (P,)
        Indices of the pixels that are `above`.
    bad : ndarray, bool, (H, W)
    """
    found = [at[:0]]
    (height, width), row = above.shape, at // above.shape[1]
    column = at - row * width
    for step, room in ((1, width - 1 - column), (width, height - 1 - row)):
        ends = np.minimum(room, BRIDGE + 1)
        start, last = at[ends > 1], ends[ends > 1]
        for k in range(1, BRIDGE + 2):
            inside = last >= k
            start, last = start[inside], last[inside]
            here = start + k * step
            if k > 1:
                done = start[above.ravel()[here]]
                found.extend(done + i * step for i in range(1, k))
            on = bad.ravel()[here]
            start, last = start[on], last[on]
            if not len(start):
                break
    return np.unique(np.concatenate(found))


def _connected(at: np.ndarray, width: int) -> np.ndarray:
    """Label the connected regions of pixels, from 1 and in order of their first pixels.

    Adjacent pixels of a row form a run; runs of neighbouring rows that touch, diagonally included, belong
    to the same region. Few pixels of an image are in a region, so this is faster than labelling the image.

    Parameters
    ----------
    at : ndarray, int, (P,)
        Sorted indices of the pixels into the flattened image.
    width : int
        Width of the image.

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
    """A Gaussian of unit sum, truncated at 3 sigma, float32."""
    sigma = fwhm / math.sqrt(8 * math.log(2))
    reach = math.ceil(3 * sigma)
    line = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return (line / line.sum()).astype(np.float32)


_AT_ONCE = 20_000
"""Number of pixels that are smoothed at once, in whole rows, so that intermediate arrays stay in the cache."""


def _convolved(values: np.ndarray, used: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Values convolved along both axes, float32; unused pixels and pixels beyond the border count as 0."""
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
    """Sum of an odd number of arrays with symmetric weights, float32."""
    middle = len(arrays) // 2
    out = arrays[middle] * weights[middle]
    term = np.empty_like(out)
    for k in range(middle):
        np.add(arrays[k], arrays[-1 - k], out=term)
        term *= weights[k]
        out += term
    return out


def dilated(inside: np.ndarray, reach: int) -> np.ndarray:
    """A mask dilated by a disc: pixels whose distance to it is at most `reach`, bool, (H, W)."""
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


def grown_labels(labels: np.ndarray, reach: int) -> np.ndarray:
    """Labels expanded as by `skimage.segmentation.expand_labels`, fast for small distances; (H, W).

    A pixel at equal distances from two labels gets the label further left, then the upper one.
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
