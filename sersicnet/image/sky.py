"""The sky and the noise of a whole mosaic: a mesh, estimated strip by strip between the sources."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

from sersicnet.errors import InputError
from sersicnet.image.pixels import HUGE, Pixels, Sky, Source, Window, grown, median, within
from sersicnet.image.regions import Regions, Threshold, dilated

BOX = 128
"""Side of a box of the mesh in pixels, about; at least two boxes cover an image along each axis."""


STRIP = 4
"""Rows of boxes that are estimated at once."""


SAMPLES, SAMPLE = 6, 256
"""Noise is measured in this many windows along each axis of a large image (half as many at first), and their side."""


FIRST_ROWS, ROWS = 8, 2
"""The sky is that of every so many rows, at first, to find sources, and then. Neighbouring rows of drizzled images have
much of their noise in common: with half of them the level scatters by 0.010 of the noise of a pixel, with all by 0.008.
"""


LEAST_ROWS = 16
"""Rows of a box that are used if it has as many."""


COVERED = 0.8
"""Fraction of a box without blank pixels from which on its neighbours speak for it."""


HUGE_LIMIT = 0.05
"""Fraction of pixels with absurd values from which on an image is refused."""


GROWN, MOST_GROWN = 8, 32
"""Pixels that sources grow by before the sky is estimated between them: as many as their radius, at least and at most.

Wings count less as sky then: with 8 pixels for all, the level of boxes with bright galaxies was too high by twice as
much in the median of two simulated mosaics.
"""


BIN = 2
"""Side of the blocks of pixels in which sources are found for the sky's sake."""


REACH = 3
"""Lags of the noise's autocorrelation along each axis, pixels."""


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
    widely : float
        The same of the image that is smoothed for the second pass.
    map_factor : float
        See `Sky`.
    """

    level: np.ndarray
    rms: np.ndarray
    shape: tuple[int, int]
    autocorrelation: np.ndarray
    smoothed: float
    widely: float
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
            float(arrays["widely"]),
            float(arrays["map_factor"]),
        )

    def at(self, window: Window, pixels: Pixels) -> Sky:
        """Sky and noise of a window: cubic splines through the boxes, or the user's map."""
        level, rms = (np.empty(pixels.bad.shape, np.float32) for _ in range(2))
        noise = pixels.noise if np.isfinite(self.map_factor) else None
        if noise is not None:
            rms[:] = noise * self.map_factor
        _interpolate(self.level, self.shape, window, level)
        if noise is None:
            _interpolate(self.rms, self.shape, window, rms)
            np.maximum(rms, np.float32(1e-3 * np.median(self.rms)), out=rms)
        rms[pixels.bad] = np.nan
        return Sky(level, rms, self.autocorrelation, self.map_factor)


Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""What applies a function to many things, in their order; `map`, or one that has workers."""


def estimate_sky(source: Source, threshold: Threshold, apply: Map = map) -> Mesh:
    """Estimate sky and noise of an image, strip by strip.

    First from all pixels, clipped; then from those between the sources that
    stand out of that first sky.

    Parameters
    ----------
    source : Source
    threshold : Threshold
        What finds the sources.
    apply : callable
        Applies a function to the strips.

    Raises
    ------
    InputError
        If no pixel has data, or the noise of the image is zero.
    """
    edges = _edges(source.shape)
    strips = [(source, edges, i) for i in range(0, len(edges[0]) - 1, STRIP)]
    blocks = threshold.binned(BIN)
    mesh = _assembled(apply(_first_boxes, strips), source.shape)
    few = [(source, window, blocks, mesh, 1.0) for window in _windows(source.shape, SAMPLES // 2)]
    known = [noise for noise in apply(_smoothed_noise, few) if np.isfinite(noise)]
    smoothed = float(np.median(known)) if known else 1.0
    for most in (MOST_GROWN, GROWN):  # where large sources leave no sky, closer to them
        between = list(apply(_boxes_between, [(*strip, blocks, mesh, smoothed, most) for strip in strips]))
        if any(np.isfinite(part.level).any() for part in between):
            break
    mesh = _assembled(between, source.shape)
    jobs = [(threshold, source, window, blocks, mesh, smoothed, most) for window in _windows(source.shape, SAMPLES)]
    return Mesh(mesh.level, mesh.rms, mesh.shape, *_joint(apply(_noise, jobs)))


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
    return _boxes(data, bad, bad, (own, edges[1]), source.shape, every=FIRST_ROWS)


def _boxes_between(strip: tuple[Source, Edges, int, Threshold, _Boxes, float, int]) -> _Boxes:
    source, edges, first, blocks, mesh, smoothed, most = strip
    own, rows = _rows_of(edges, first)
    strip_window = rows, slice(0, source.shape[1])
    window = _aligned(grown(strip_window, MOST_GROWN + BIN * blocks.halo, source.shape))
    pixels = source.read(window)
    inner = within(strip_window, window)
    bad = pixels.bad[inner]
    covered = _covered(pixels, window, blocks, mesh, smoothed, most)[inner]
    return _boxes(pixels.data[inner], bad, bad | covered, (own, edges[1]), source.shape, every=ROWS)


def _aligned(window: Window) -> Window:
    """A window that begins with a whole block of `BIN` x `BIN` pixels of the image."""
    rows, columns = (slice(part.start - part.start % BIN, part.stop) for part in window)
    return rows, columns


_Sample = tuple[Source, Window, Threshold, _Boxes, float]
"""An image, a window of it, a threshold for blocks, the mesh so far, and the noise of smoothed blocks."""


def _smoothed_noise(sample: _Sample) -> float:
    """Noise of the smoothed blocks of a window where no source is; NaN if it has no such place."""
    source, window, blocks, mesh, smoothed = sample
    near, smooth, rms = _near_sources(source.read(window), window, blocks, mesh, smoothed, MOST_GROWN)
    blank = ~near & np.isfinite(rms)
    return _mad_std((smooth / rms)[blank]) if blank.any() else np.nan


def _covered(
    pixels: Pixels, window: Window, threshold: Threshold, mesh: _Boxes, smoothed: float, most: int
) -> np.ndarray:
    """Pixels of sources and what is near them, bool, (H, W); arguments as for `_near_sources`."""
    height, width = pixels.bad.shape
    near = _near_sources(pixels, window, threshold, mesh, smoothed, most)[0]
    return np.repeat(np.repeat(near, BIN, axis=0), BIN, axis=1)[:height, :width]


def _near_sources(
    pixels: Pixels, window: Window, threshold: Threshold, mesh: _Boxes, smoothed: float, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocks of pixels of sources and what is near them: enough to tell where the sky is.

    Parameters
    ----------
    pixels : Pixels
    window : Window
        Where they are in the image, `_aligned`.
    threshold : Threshold
        For blocks.
    mesh : _Boxes
    smoothed : float
        Noise of the smoothed blocks in units of that of pixels.
    most : int
        Pixels that sources grow by at most.

    Returns
    -------
    near : ndarray, bool, (h, w)
    smooth, rms : ndarray, float32, (h, w)
        The smoothed blocks, and the noise of a pixel there: NaN in blocks without data.
    """
    light, bad = _binned(pixels)
    level, rms = (np.empty(light.shape, np.float32) for _ in range(2))
    first = window[0].start // BIN, window[1].start // BIN
    place = slice(first[0], first[0] + light.shape[0]), slice(first[1], first[1] + light.shape[1])
    for values, out in ((mesh.level, level), (mesh.rms, rms)):
        _interpolate(values, (mesh.shape[0] / BIN, mesh.shape[1] / BIN), place, out)
    np.maximum(rms, np.float32(1e-3 * np.median(mesh.rms)), out=rms)
    rms[bad] = np.nan
    smooth = threshold.smooth(np.subtract(light, level, out=light), bad)
    sky = Sky(level, rms, np.ones((1, 1)), np.nan)
    return _with_surroundings(threshold.regions(smooth, sky, smoothed), most), smooth, rms


def _binned(pixels: Pixels) -> tuple[np.ndarray, np.ndarray]:
    """Means of the usable pixels of blocks, and where there are none: float32 and bool, (h, w)."""
    blocks = [-(-n // BIN) for n in pixels.bad.shape]
    whole = all(n % BIN == 0 for n in pixels.bad.shape)

    def summed(values: np.ndarray) -> np.ndarray:
        rows = functools.reduce(np.add, (values[i::BIN] for i in range(BIN)))
        return np.asarray(functools.reduce(np.add, (rows[:, i::BIN] for i in range(BIN))))

    if whole and not pixels.bad.any():
        return summed(pixels.data) * np.float32(1 / BIN**2), np.zeros(blocks, bool)
    inside = tuple(slice(0, n) for n in pixels.bad.shape)
    padded, used = (np.zeros([BIN * n for n in blocks], kind) for kind in (np.float32, np.int8))
    np.copyto(padded[inside], pixels.data, where=~pixels.bad)
    np.logical_not(pixels.bad, out=used[inside].view(bool))
    number = summed(used)
    return summed(padded) / np.maximum(number, 1), number == 0


def _with_surroundings(regions: Regions, most: int) -> np.ndarray:
    """Blocks of regions and around them, as far as their radius but within `GROWN` and `most` pixels, bool, (H, W)."""
    least, most = GROWN // BIN, most // BIN
    out = dilated(regions.mask(), least)
    large = regions.chosen(np.bincount(regions.label, minlength=len(regions) + 1) > np.pi * (least + 1) ** 2)
    row, column = large.places()
    order, areas = np.argsort(large.label, kind="stable"), np.bincount(large.label, minlength=1)[1:]
    for own, (rows, columns) in zip(np.split(order, np.cumsum(areas)), large.boxes(), strict=False):
        reach = min(int(math.sqrt(len(own) / np.pi)), most)
        first = max(rows.start - reach, 0), max(columns.start - reach, 0)
        part = out[first[0] : rows.stop + reach, first[1] : columns.stop + reach]
        inside = np.zeros(part.shape, bool)
        inside[row[own] - first[0], column[own] - first[1]] = True
        part |= dilated(inside, reach)
    return out


def _boxes(
    data: np.ndarray, bad: np.ndarray, ignore: np.ndarray, edges: Edges, shape: tuple[int, int], every: int = 1
) -> _Boxes:
    """Sigma-clipped sky and noise of the boxes of a strip, whose first row is that of the first edge."""
    rows, columns = ([slice(a, b) for a, b in itertools.pairwise(line)] for line in edges)
    first = rows[0].start
    level, rms = (np.full((len(rows), len(columns)), np.nan) for _ in range(2))
    for i, y in enumerate(rows):
        step = min(every, max((y.stop - y.start) // LEAST_ROWS, 1))
        for j, x in enumerate(columns):
            part = slice(y.start - first, y.stop - first, step), x
            ignored = ignore[part]
            values = data[part][~ignored] if ignored.any() else data[part].ravel()
            if len(values) > (1 - COVERED) * ignored.size:
                level[i, j], rms[i, j] = _sky_of(values)
    blank = data[bad]
    huge = np.isfinite(blank) & (np.abs(blank) >= HUGE)
    return _Boxes(level, rms, shape, bad.size - len(blank), int(huge.sum()))


def _sky_of(values: np.ndarray) -> tuple[float, float]:
    """Level and rms of a box, of what is not clipped.

    SExtractor's estimate of the mode, 2.5 times the median less 1.5 times the mean, with the mean
    of the middle two fifths of the values for the median: it scatters less, and the median of a quantised
    image is off by up to half a step, which would be multiplied by 2.5. The rms is from the median absolute
    deviation, as photutils' `MADStdBackgroundRMS`.

    Parameters
    ----------
    values : ndarray, float32, (N,)
        Finite.
    """
    kept, mean, std = _clipped(values)
    end = len(kept) * 3 // 10
    middle = float(np.add.reduce(kept[end : len(kept) - end], dtype=float)) / (len(kept) - 2 * end)
    level = middle if std > 0 and abs(mean - middle) >= 0.3 * std else 2.5 * middle - 1.5 * mean
    return level, _sorted_mad(kept) * _RMS_OF_MAD


def _clipped(values: np.ndarray, sigma: float = 3.0, rounds: int = 10) -> tuple[np.ndarray, float, float]:
    """Values without outliers, sorted, as from `astropy.stats.SigmaClip` about the median; their mean and deviation.

    What is left after a round is a part of the sorted values, and its sums are
    those before without the two ends.
    """
    values = np.sort(values)
    middle = float(values[len(values) // 2])
    shifted = values.astype(float)
    shifted -= middle
    first, last, total, square = 0, len(values), float(np.add.reduce(shifted)), _product(shifted, shifted)
    for _ in range(rounds):
        n = last - first
        deviation = sigma * math.sqrt(max(square / n - (total / n) ** 2, 0.0))
        left = values[first:last]
        half = _middle(left)
        start = first + int(left.searchsorted(values.dtype.type(half - deviation), "left"))
        stop = first + int(left.searchsorted(values.dtype.type(half + deviation), "right"))
        if stop - start == n:
            break
        for end in (shifted[first:start], shifted[stop:last]):
            total, square = total - float(np.add.reduce(end)), square - _product(end, end)
        first, last = start, stop
    n = last - first
    return values[first:last], middle + total / n, math.sqrt(max(square / n - (total / n) ** 2, 0.0))


def _product(a: np.ndarray, b: np.ndarray) -> float:
    """Sum of products; not by BLAS, whose last bits depend on the number of its threads."""
    return float(np.einsum("i,i->", a, b))


def _middle(ordered: np.ndarray) -> float:
    """The median of sorted values, in their precision."""
    n = len(ordered)
    return float((ordered[(n - 1) // 2] + ordered[n // 2]) / ordered.dtype.type(2))


def _sorted_mad(ordered: np.ndarray) -> float:
    """Median absolute deviation of sorted values, in their precision.

    The k + 1 values nearest to the median follow each other, so that the deviation of rank k is
    the least reach of so many in a row to both sides: no second sorting.
    """
    n = len(ordered)
    above = ordered - ordered.dtype.type(_middle(ordered))
    below = -above
    ranks = [(n - 1) // 2, n // 2] if n % 2 == 0 else [n // 2]
    reaches = [np.maximum(below[: n - k], above[k:]).min() for k in ranks]
    return float(sum(reaches) / ordered.dtype.type(len(ranks)))


_RMS_OF_MAD = 1.482602218505602


def _mad_std(values: np.ndarray) -> float:
    """`astropy.stats.mad_std` of finite values."""
    return float(median(np.abs(values - median(values))) * _RMS_OF_MAD)


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


def _interpolate(mesh: np.ndarray, shape: tuple[float, float], window: Window, out: np.ndarray) -> None:
    """Fill an array with a mesh at the pixels of a window: cubic splines, straight on beyond the outermost centres.

    Along y the spline is drawn at every so many rows of the image, eight to a box, and
    straight between them, which is at most 0.2 % of how much neighbouring steps of the mesh
    differ off. Summed term by term, so that a pixel has the same value in every window.
    """
    values = np.pad(mesh, _PAD, mode="reflect", reflect_type="odd")
    values = ndimage.spline_filter(values, order=3, mode="mirror")
    start, stop, step = window[0].start, window[0].stop, max(int(shape[0] / mesh.shape[0]) // 8, 1)
    rows = np.arange(start // step, (stop - 1) // step + 2) * step
    first, weights = _weights(rows, shape[0], mesh.shape[0])
    values = values[first[0] : first[-1] + 4]  # those that the window needs
    first -= first[0]
    columns, across = _weights(np.arange(window[1].start, window[1].stop), shape[1], mesh.shape[1])
    values = np.einsum("hkx,kx->hx", values[:, columns + np.arange(4)[:, None]], across).astype(out.dtype)
    weights = weights.astype(out.dtype)[:, :, None]
    lines = weights[0] * values[first]
    for k in (1, 2, 3):
        lines += weights[k] * values[first + k]
    for row, line, following in zip(rows.tolist(), lines, lines[1:], strict=False):
        low, high = max(row, start), min(row + step, stop)
        part = out[low - start : high - start]
        share = ((np.arange(low, high) - row) / step).astype(out.dtype)[:, None]
        np.multiply(following - line, share, out=part)
        part += line


def _weights(places: np.ndarray, pixels: float, boxes: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the cubic spline at pixels along an axis: the first of four boxes, int, (N,), and their weights, (4, N)."""
    place = (places + 0.5) * boxes / pixels - 0.5 + _PAD
    first = np.floor(place).astype(int)
    t = place - first
    weights = np.array([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6
    return first - 1, weights


def _windows(shape: tuple[int, int], samples: int) -> Iterator[Window]:
    """Windows that noise is measured in: all of a small image, small ones spread over a large one."""
    if max(shape) <= SAMPLES * SAMPLE:
        yield slice(0, shape[0]), slice(0, shape[1])
        return
    starts = [np.linspace(0, max(n - SAMPLE, 0), min(samples, -(-n // SAMPLE))).astype(int) for n in shape]
    for y in starts[0].tolist():
        for x in starts[1].tolist():
            yield _aligned((slice(y, min(y + SAMPLE, shape[0])), slice(x, min(x + SAMPLE, shape[1]))))


class _Noise(NamedTuple):
    """Noise of both smoothed images, `_products`, and the factor on a noise map."""

    smoothed: float
    widely: float
    products: np.ndarray
    factor: float


def _joint(samples: Iterable[_Noise | None]) -> tuple[np.ndarray, float, float, float]:
    """Autocorrelation, noise of the smoothed images and the factor on a noise map, from those of windows."""
    found = [one for one in samples if one is not None]
    if not found:
        return np.pad(np.ones((1, 1)), REACH), 1.0, 1.0, 1.0
    smoothed, widely, factor = (float(np.median([one[k] for one in found])) for k in (0, 1, 3))
    products = np.sum([one.products for one in found], axis=0)
    means = products[0] / np.maximum(products[1], 1e-30)
    autocorrelation = means / means[REACH, REACH] if means[REACH, REACH] > 0 else np.pad(np.ones((1, 1)), REACH)
    return autocorrelation, smoothed, widely, factor


def _noise(job: tuple[Threshold, Source, Window, Threshold, _Boxes, float, int]) -> _Noise | None:
    """The noise in the blank pixels of a window."""
    threshold, source, window, blocks, mesh, smoothed, most = job
    pixels = source.read(window)
    sky = Mesh(*mesh[:3], np.ones((1, 1)), np.nan, np.nan, np.nan).at(window, pixels)
    blank = ~(pixels.bad | _covered(pixels, window, blocks, mesh, smoothed, most))
    if not blank[::2, ::2].any():
        blank = ~pixels.bad  # one source covers all of it
        if not blank[::2, ::2].any():
            return None
    factor = np.nan
    clean = pixels.data - sky.level
    if pixels.noise is not None:
        factor = _mad_std((clean / pixels.noise)[blank])
        sky = Sky(sky.level, pixels.noise * factor, sky.autocorrelation, factor)
    smooth = threshold.smooth(clean, pixels.bad)
    ratio = _mad_std((smooth / sky.rms)[blank])
    wide = threshold.smooth_widely(smooth, sky, ratio) / sky.rms[::2, ::2]
    return _Noise(ratio, _mad_std(wide[blank[::2, ::2]]), _products(clean / sky.rms, blank), factor)


def _products(normalised: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Sums of products of blank pixels by lag, and how many there are, float64, (2, 7, 7)."""
    out = np.zeros((2, 2 * REACH + 1, 2 * REACH + 1))
    if not used.any():
        return out
    values = np.where(used, np.clip(normalised - median(normalised[used]), -5, 5), 0)
    # Rows one behind the other, with zeros between: a shift is then one of a line of numbers.
    width = values.shape[1] + REACH
    for plane, array in zip(out, (values, used), strict=True):
        line = np.pad(array.astype(float), ((0, 0), (0, REACH))).ravel()
        for dy in range(REACH + 1):
            for dx in range(-REACH, REACH + 1):
                if (lag := dy * width + dx) >= 0:
                    total = _product(line[lag:], line[: line.size - lag])
                    plane[REACH + dy, REACH + dx] = plane[REACH - dy, REACH - dx] = total
    return out
