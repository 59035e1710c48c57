"""Sky and noise of a whole mosaic on a mesh of boxes, estimated strip by strip from the pixels between the sources."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage, special
from scipy.spatial import KDTree

from sersicnet.errors import InputError, warn
from sersicnet.image.pixels import ABSURD, Pixels, Sky, Source, Window, grown, median, within
from sersicnet.image.regions import Regions, Threshold, dilated

BOX = 128
"""Approximate side of a box of the mesh, pixels; at least two boxes cover an image along each axis."""


STRIP = 4
"""Number of rows of boxes in a strip."""


SAMPLES, SAMPLE = 6, 256
"""Number of windows along each axis of a large image in which the noise is measured (half as many in the first round),
and their side, pixels."""


FIRST_ROWS, ROWS = 8, 2
"""The sky is estimated from every eighth row for the detection of sources, and then from every second row. The noise of
neighbouring rows of drizzled images is correlated: with half of the rows the level scatters by 0.010 of the noise of a
pixel, with all rows by 0.008."""


LEAST_ROWS = 16
"""Minimum number of rows of a box that are used, if the box has as many."""


COVERED, MOST_COVERED = 0.8, 0.99
"""If more of a box than this is masked, its values are interpolated from the boxes around it; the second limit is that
of images in which all boxes are masked beyond the first one, such as an image in a wide frame without data."""


ABSURD_LIMIT = 0.05
"""An image is refused if more than this fraction of its pixels has absurd values."""


LEAST_DILATION, MOST_DILATION = 8, 32
"""Sources are dilated by their radius before the sky is estimated between them; these are the minimum and maximum
dilation, pixels.

This keeps their wings out of the sky: with a dilation of 8 pixels for all sources, the level of boxes with bright
galaxies was too high by twice as much, in the median of two simulated mosaics.
"""


BIN = 2
"""Side of the blocks of pixels in which sources are detected for the estimate of the sky."""


REACH = 3
"""Largest lag of the noise's autocorrelation along each axis, pixels."""


@dataclass(frozen=True, eq=False)
class Mesh:
    """Sky and noise of a whole image.

    Attributes
    ----------
    level, rms : ndarray, float64, (h, w)
        Level and rms of boxes that cover the image evenly, filtered by a median over 3 x 3 boxes.
    shape : (int, int)
        Height and width of the image.
    autocorrelation : ndarray, float64, (7, 7)
        Autocorrelation of blank pixels, by lag along y and x; 1 in the middle.
    smoothed : float
        Noise of the smoothed image over the noise of the image.
    widely : float
        Noise of the image smoothed for the second pass over the noise of the image.
    map_factor : float
        Factor on the user's noise map, see `Sky`.
    """

    level: np.ndarray
    rms: np.ndarray
    shape: tuple[int, int]
    autocorrelation: np.ndarray
    smoothed: float
    widely: float
    map_factor: float

    def arrays(self) -> dict[str, np.ndarray]:
        """The mesh as arrays by name, to be stored; `of` is the inverse."""
        return {name: np.asarray(value) for name, value in vars(self).items()}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Mesh:
        """Restore a mesh from its `arrays`."""
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
        """Sky and noise of a window: cubic splines through the boxes, and the scaled noise map if there is one."""
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
"""A function that applies a function to many items and yields the results in order: `map`, or one with workers."""


def estimate_sky(source: Source, threshold: Threshold, apply: Map = map) -> Mesh:
    """Estimate sky and noise of an image, strip by strip.

    The first estimate uses all pixels, sigma-clipped. The second uses the pixels between the
    sources that are detected with the first.

    Parameters
    ----------
    source : Source
    threshold : Threshold
        Threshold of the detection.
    apply : callable
        Applies a function to the strips, as `map` does.

    Raises
    ------
    InputError
        If no pixel has data, or the noise of the image is zero.
    """
    edges = _edges(source.shape)
    blocks = threshold.binned(BIN)
    for covered in (COVERED, MOST_COVERED):
        strips = [(source, edges, i, covered) for i in range(0, len(edges[0]) - 1, STRIP)]
        parts = list(apply(_first_background, strips))
        if any(np.isfinite(part.level).any() for part in parts):
            break
    mesh = _assembled(parts, source.shape)
    few = [(source, window, blocks, mesh, 1.0) for window in _windows(source.shape, SAMPLES // 2)]
    known = [noise for noise in apply(_smoothed_noise, few) if np.isfinite(noise)]
    smoothed = float(np.median(known)) if known else 1.0
    # If large sources leave no sky, a smaller dilation is tried, and then the few pixels between undilated sources.
    for most, limit in ((MOST_DILATION, covered), (LEAST_DILATION, covered), (0, MOST_COVERED)):
        jobs = [(*strip[:3], limit, blocks, mesh, smoothed, most) for strip in strips]
        between = list(apply(_background_between_sources, jobs))
        if any(np.isfinite(part.level).any() for part in between):
            mesh = _assembled(between, source.shape)
            break
    else:
        warn(
            "The image has no blank sky: detected structure covers it. Its sky and noise are those of all pixels "
            "without outliers. Is the noise correlated over many pixels, or full of cosmic rays?"
        )
    windows = [(threshold, source, window, blocks, mesh, smoothed, most) for window in _windows(source.shape, SAMPLES)]
    return Mesh(mesh.level, mesh.rms, mesh.shape, *_joint(apply(_noise, windows)))


class _Background(NamedTuple):
    """Level and rms of boxes, NaN with too few blank pixels; shape of the image; numbers of good and absurd pixels."""

    level: np.ndarray
    rms: np.ndarray
    shape: tuple[int, int]
    usable: int
    absurd: int


Edges = tuple[list[int], list[int]]


_Strip = tuple[Source, Edges, int, float]
"""An image, the edges of its boxes, the first row of boxes of a strip, and how much of a box may be covered."""


def _edges(shape: tuple[int, int]) -> Edges:
    rows, columns = (np.linspace(0, n, max(2, round(n / BOX)) + 1).round().astype(int).tolist() for n in shape)
    return rows, columns


def _rows_of(edges: Edges, first: int) -> tuple[list[int], slice]:
    """The edges of a strip's boxes along y, and the rows of the strip."""
    own = edges[0][first : first + STRIP + 1]
    return own, slice(own[0], own[-1])


def _first_background(strip: _Strip) -> _Background:
    source, edges, first, limit = strip
    own, rows = _rows_of(edges, first)
    data, bad, _ = source.read((rows, slice(0, source.shape[1])))
    return _background(data, bad, bad, (own, edges[1]), source.shape, limit, every=FIRST_ROWS)


def _background_between_sources(
    strip: tuple[Source, Edges, int, float, Threshold, _Background, float, int],
) -> _Background:
    source, edges, first, limit, blocks, mesh, smoothed, most = strip
    own, rows = _rows_of(edges, first)
    strip_window = rows, slice(0, source.shape[1])
    window = _aligned(grown(strip_window, MOST_DILATION + BIN * blocks.halo, source.shape))
    pixels = source.read(window)
    inner = within(strip_window, window)
    bad = pixels.bad[inner]
    covered = _covered(pixels, window, blocks, mesh, smoothed, most)[inner]
    return _background(pixels.data[inner], bad, bad | covered, (own, edges[1]), source.shape, limit, every=ROWS)


def _aligned(window: Window) -> Window:
    """A window extended to begin with a complete block of `BIN` x `BIN` pixels of the image."""
    rows, columns = (slice(part.start - part.start % BIN, part.stop) for part in window)
    return rows, columns


_Sample = tuple[Source, Window, Threshold, _Background, float]
"""An image, a window of it, a threshold for blocks, the first mesh, and the noise of smoothed blocks."""


def _smoothed_noise(sample: _Sample) -> float:
    """Noise of the smoothed blocks of a window between the sources; NaN if sources cover it."""
    source, window, blocks, mesh, smoothed = sample
    near, smooth, rms = _near_sources(source.read(window), window, blocks, mesh, smoothed, MOST_DILATION)
    blank = ~near & np.isfinite(rms)
    return _mad_std((smooth / rms)[blank]) if blank.any() else np.nan


def _covered(
    pixels: Pixels, window: Window, threshold: Threshold, mesh: _Background, smoothed: float, most: int
) -> np.ndarray:
    """Pixels of dilated sources, bool, (H, W); arguments as for `_near_sources`."""
    height, width = pixels.bad.shape
    near = _near_sources(pixels, window, threshold, mesh, smoothed, most)[0]
    return np.repeat(np.repeat(near, BIN, axis=0), BIN, axis=1)[:height, :width]


def _near_sources(
    pixels: Pixels, window: Window, threshold: Threshold, mesh: _Background, smoothed: float, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Detect sources in blocks of pixels, and dilate them.

    Parameters
    ----------
    pixels : Pixels
    window : Window
        Position of `pixels` in the image, `_aligned`.
    threshold : Threshold
        Threshold for blocks.
    mesh : _Background
        First estimate of sky and noise.
    smoothed : float
        Noise of the smoothed blocks over the noise of a pixel.
    most : int
        Maximum dilation of a source, pixels.

    Returns
    -------
    near : ndarray, bool, (h, w)
        Blocks of dilated sources.
    smooth, rms : ndarray, float32, (h, w)
        The smoothed blocks, and the noise of a pixel in them; NaN in blocks without data.
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
    """Means of the usable pixels of blocks, float32, (h, w), and blocks without usable pixels, bool, (h, w)."""
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
    """Blocks of regions, dilated by their radii, from `LEAST_DILATION` to `most` pixels, bool, (H, W)."""
    least, most = min(LEAST_DILATION, most) // BIN, most // BIN
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


def _background(
    data: np.ndarray,
    bad: np.ndarray,
    ignore: np.ndarray,
    edges: Edges,
    shape: tuple[int, int],
    limit: float,
    every: int,
) -> _Background:
    """Sigma-clipped sky and noise of the boxes of a strip; `data` starts at the first of the `edges` along y.

    Boxes of which more than `limit` is ignored are NaN.
    """
    rows, columns = ([slice(a, b) for a, b in itertools.pairwise(line)] for line in edges)
    first = rows[0].start
    level, rms = (np.full((len(rows), len(columns)), np.nan) for _ in range(2))
    for i, y in enumerate(rows):
        step = min(every, max((y.stop - y.start) // LEAST_ROWS, 1)) if limit == COVERED else 1
        for j, x in enumerate(columns):
            part = slice(y.start - first, y.stop - first, step), x
            ignored = ignore[part]
            values = data[part][~ignored] if ignored.any() else data[part].ravel()
            if len(values) > (1 - limit) * ignored.size:
                level[i, j], rms[i, j] = _sky_of(values)
    blank = data[bad]
    absurd = np.isfinite(blank) & (np.abs(blank) >= ABSURD)
    return _Background(level, rms, shape, bad.size - len(blank), int(absurd.sum()))


def _sky_of(values: np.ndarray) -> tuple[float, float]:
    """Sigma-clipped level and rms of a box.

    The level is SExtractor's estimate of the mode, 2.5 times the median minus 1.5 times the mean. The median
    is replaced by the mean of the middle two fifths of the values, which scatters less. The rms is from the
    median absolute deviation, as photutils' `MADStdBackgroundRMS`. Both are interpolated between the values
    of a quantised image, see `_quantised_sky`.

    Parameters
    ----------
    values : ndarray, float32, (N,)
        Finite pixel values.
    """
    kept, mean, std = _clipped(values)
    if _is_quantised(kept):
        middle, rms = _quantised_sky(kept, std)
    else:
        end = len(kept) * 3 // 10
        middle = float(np.add.reduce(kept[end : len(kept) - end], dtype=float)) / (len(kept) - 2 * end)
        rms = _sorted_mad(kept) * _RMS_OF_MAD
    level = middle if std > 0 and abs(mean - middle) >= 0.3 * std else 2.5 * middle - 1.5 * mean
    return level, rms


def _is_quantised(ordered: np.ndarray) -> bool:
    """Whether more than one in 400 of sorted values equal the quartiles: quantiles are then wrong by half a step.

    The rows of a compressed image have steps of their own, and only their zeros are equal.
    """
    n = len(ordered)
    if not n:
        return False
    quartiles = ordered[[n // 4, n * 3 // 4]]
    equal = ordered.searchsorted(quartiles, "right") - ordered.searchsorted(quartiles, "left")
    return bool(equal.min() > max(n / 400, 4))


def _quantised_sky(ordered: np.ndarray, std: float) -> tuple[float, float]:
    """Median and rms of sorted, quantised values.

    A median absolute deviation of quantised values is a multiple of their step. But the fraction of values below
    each border between two neighbouring values is exact: a line is fitted to these borders as a function of the
    quantiles of a Gaussian. The rms includes the noise of the quantisation.

    Parameters
    ----------
    ordered : ndarray, float32, (N,)
    std : float
        Standard deviation of the values, which is used for steps of more than three times the noise.
    """
    last = np.flatnonzero(ordered[1:] != ordered[:-1])
    if len(last) < 2:
        return float(np.add.reduce(ordered, dtype=float)) / len(ordered), std
    low, high = ordered[last].astype(float), ordered[last + 1].astype(float)
    quantiles = special.ndtri((last + 1) / len(ordered))
    # Steps of rounded or scaled values differ in the last digit: borders between two clumps of values count.
    weight = (high - low) * np.exp(-(quantiles**2))
    weight /= weight.sum()
    step, border, quantile = (float(weight @ values) for values in (high - low, (low + high) / 2, quantiles))
    off = weight * (quantiles - quantile)
    rms = float(off @ (low + high)) / 2 / float(off @ quantiles)
    middle = border - rms * quantile
    return middle, math.hypot(rms, step / math.sqrt(12)) if step <= 3 * rms else std


def _clipped(values: np.ndarray, sigma: float = 3.0, rounds: int = 10) -> tuple[np.ndarray, float, float]:
    """Sorted values without outliers, as from `astropy.stats.SigmaClip` about the median; their mean and deviation.

    The values left after a round are a slice of the sorted values, so the sums are updated by
    subtracting the two clipped ends.
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
        before = square
        for end in (shifted[first:start], shifted[stop:last]):
            total, square = total - float(np.add.reduce(end)), square - _product(end, end)
        first, last = start, stop
        if square < _ROUNDING * before:  # values so far out that the differences are rounding errors
            left = shifted[first:last]
            total, square = float(np.add.reduce(left)), _product(left, left)
    n = last - first
    return values[first:last], middle + total / n, math.sqrt(max(square / n - (total / n) ** 2, 0.0))


_ROUNDING = 1e-8
"""Sums of squares that shrink below this fraction in a round of clipping are computed anew."""


def _product(a: np.ndarray, b: np.ndarray) -> float:
    """Sum of products, without BLAS, because its last bits depend on the number of threads."""
    return float(np.einsum("i,i->", a, b))


def _middle(ordered: np.ndarray) -> float:
    """The median of sorted values, in their precision."""
    n = len(ordered)
    return float((ordered[(n - 1) // 2] + ordered[n // 2]) / ordered.dtype.type(2))


def _sorted_mad(ordered: np.ndarray) -> float:
    """Median absolute deviation of sorted values, in their precision.

    The k + 1 values nearest to the median are consecutive, so the deviation of rank k is the smallest
    maximum deviation of k + 1 consecutive values. This needs no second sorting.
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


def _assembled(strips: Iterable[_Background], shape: tuple[int, int]) -> _Background:
    """The mesh of all strips, with gaps interpolated and outliers removed by a median filter."""
    parts = list(strips)
    level, rms = (np.concatenate(maps) for maps in ([p.level for p in parts], [p.rms for p in parts]))
    known, usable, absurd = np.isfinite(level), sum(p.usable for p in parts), sum(p.absurd for p in parts)
    if absurd > ABSURD_LIMIT * np.prod(shape):
        raise InputError(
            f"{absurd / np.prod(shape):.0%} of the image's pixels have values beyond {ABSURD:g}. "
            "Are its bytes in the wrong order (FITS has the most significant one first), or is its unit too small?"
        )
    if not usable:
        raise InputError(
            "The image has no pixel left that is finite, exposed, not masked and has a positive noise. "
            "Check the image and its maps."
        )
    if not known.any():
        raise InputError(
            "The image has no blank sky: every part is covered by sources, or has no data. Give a larger image."
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
    return _Background(level, rms, shape, usable, absurd)


_PAD = 3
"""Number of boxes by which a mesh is extrapolated linearly on each side."""


def _interpolate(mesh: np.ndarray, shape: tuple[float, float], window: Window, out: np.ndarray) -> None:
    """Interpolate a mesh at the pixels of a window, into `out`, by cubic splines.

    The splines are extrapolated linearly beyond the outermost box centres. Along y the spline is
    evaluated at eight rows per box and interpolated linearly between them; the error is at most 0.2 % of the
    difference between neighbouring steps of the mesh. Terms are added in a fixed order, so that a pixel has the
    same value in every window.
    """
    values = np.pad(mesh, _PAD, mode="reflect", reflect_type="odd")
    values = ndimage.spline_filter(values, order=3, mode="mirror")
    start, stop, step = window[0].start, window[0].stop, max(int(shape[0] / mesh.shape[0]) // 8, 1)
    rows = np.arange(start // step, (stop - 1) // step + 2) * step
    first, weights = _weights(rows, shape[0], mesh.shape[0])
    values = values[first[0] : first[-1] + 4]  # the rows that the window needs
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
    """The first of the four boxes that a cubic spline uses at each pixel, int, (N,), and their weights, (4, N)."""
    place = (places + 0.5) * boxes / pixels - 0.5 + _PAD
    first = np.floor(place).astype(int)
    t = place - first
    weights = np.array([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6
    return first - 1, weights


def _windows(shape: tuple[int, int], samples: int) -> Iterator[Window]:
    """Windows in which the noise is measured: all of a small image, or small windows spread over a large one."""
    if max(shape) <= SAMPLES * SAMPLE:
        yield slice(0, shape[0]), slice(0, shape[1])
        return
    starts = [np.linspace(0, max(n - SAMPLE, 0), min(samples, -(-n // SAMPLE))).astype(int) for n in shape]
    for y in starts[0].tolist():
        for x in starts[1].tolist():
            yield _aligned((slice(y, min(y + SAMPLE, shape[0])), slice(x, min(x + SAMPLE, shape[1]))))


class _Noise(NamedTuple):
    """Relative noise of both smoothed images, the `_products`, and the factor on a noise map."""

    smoothed: float
    widely: float
    products: np.ndarray
    factor: float


def _joint(samples: Iterable[_Noise | None]) -> tuple[np.ndarray, float, float, float]:
    """Autocorrelation, noise of both smoothed images and factor on a noise map, combined from all windows."""
    found = [one for one in samples if one is not None]
    if not found:
        return np.pad(np.ones((1, 1)), REACH), 1.0, 1.0, 1.0
    smoothed, widely, factor = (float(np.median([one[k] for one in found])) for k in (0, 1, 3))
    products = np.sum([one.products for one in found], axis=0)
    means = products[0] / np.maximum(products[1], 1e-30)
    autocorrelation = means / means[REACH, REACH] if means[REACH, REACH] > 0 else np.pad(np.ones((1, 1)), REACH)
    return autocorrelation, smoothed, widely, factor


@np.errstate(over="ignore")  # bad pixels may hold anything
def _noise(job: tuple[Threshold, Source, Window, Threshold, _Background, float, int]) -> _Noise | None:
    """The noise in the blank pixels of a window; None if the window has no data."""
    threshold, source, window, blocks, mesh, smoothed, most = job
    pixels = source.read(window)
    sky = Mesh(*mesh[:3], np.ones((1, 1)), np.nan, np.nan, np.nan).at(window, pixels)
    blank = ~(pixels.bad | _covered(pixels, window, blocks, mesh, smoothed, most))
    if not blank[::2, ::2].any():
        blank = ~pixels.bad  # sources cover the whole window
        if not blank[::2, ::2].any():
            return None
    factor = np.nan
    clean = pixels.data - sky.level
    quantised = _is_quantised(np.sort(pixels.data[::_NOISE_ROWS][blank[::_NOISE_ROWS]]))
    if pixels.noise is not None:
        relative = (clean / pixels.noise)[blank]
        factor = _clipped(relative)[2] / _CLIPPED_STD if quantised else _mad_std(relative)
        sky = Sky(sky.level, pixels.noise * factor, sky.autocorrelation, factor)
    smooth = threshold.smooth(clean, pixels.bad)
    ratio = _mad_std((smooth / sky.rms)[blank])
    wide = threshold.smooth_widely(smooth, sky, ratio) / sky.rms[::2, ::2]
    return _Noise(ratio, _mad_std(wide[blank[::2, ::2]]), _products(clean / sky.rms, blank, quantised), factor)


_NOISE_ROWS = 16
"""Every sixteenth row of a window shows whether its values are quantised."""


_CLIPPED_STD = 0.98658
"""Standard deviation of a Gaussian of unit width that is clipped at 3 sigma."""


def _products(normalised: np.ndarray, used: np.ndarray, quantised: bool = False) -> np.ndarray:
    """Sums of products of blank pixels, and the numbers of products, by lag, float64, (2, 7, 7).

    The products are those of differences from the median; if the values are `quantised`, from their clipped mean.
    """
    out = np.zeros((2, 2 * REACH + 1, 2 * REACH + 1))
    if not used.any():
        return out
    middle = np.float32(_clipped(normalised[used])[1]) if quantised else median(normalised[used])
    values = np.where(used, np.clip(normalised - middle, -5, 5), 0)
    # The rows are concatenated with zeros between them, so that a lag in two dimensions is a shift in one.
    width = values.shape[1] + REACH
    for plane, array in zip(out, (values, used), strict=True):
        line = np.pad(array.astype(float), ((0, 0), (0, REACH))).ravel()
        for dy in range(REACH + 1):
            for dx in range(-REACH, REACH + 1):
                if (lag := dy * width + dx) >= 0:
                    total = _product(line[lag:], line[: line.size - lag])
                    plane[REACH + dy, REACH + dx] = plane[REACH - dy, REACH - dx] = total
    return out
