"""The stars of an image, and the PSF that is their stack.

There is one finder of stars: `profiles` measures the bright and round sources of an image, a window
at a time, and `stellar_locus` selects the stars among them.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from sersicnet.image.detect import Detections
from sersicnet.image.pixels import Sky
from sersicnet.image.psf import Psf, Width, between, half_width, radial_profile
from sersicnet.image.stamps import Stamps, cut
from sersicnet.schema import LOW_SNR_LIMIT, MASKED_LIMIT, STAMP_SIZE

LEAST_STARS = 5
"""Stars that a stellar locus has at least, where nothing else is nearly as narrow."""

MANY_STARS = 8
"""Stars that a stellar locus has at least, where other sources are."""

FEW_STARS = 3
"""Stars that a stellar locus has at least, where nothing else is nearly as narrow and the width is known roughly."""

MOST_STARS = 200
"""Stars that are stacked at most, the brightest."""

PSF_SIDE = STAMP_SIZE - 1
"""Side of a measured PSF, pixels."""

POINT_SNR = 50.0
"""Signal to noise above which the size of a source shows whether it is a star."""

REACH = 12
"""Half the side of the square in which the profile of a source is measured, pixels."""

MOST_SOURCES = 1000
"""Detections whose profile is measured at most, those of the highest mean surface brightness."""

LEAST_PEAK = 50.0
"""Peak over noise that a profile needs: the width of a star is good to 2 % at this limit."""

ROUND = 0.1
"""Ellipticity below which the core of a source is round."""

_APERTURE = 1.5  # radius in FWHM within which light is counted
_SAME_WIDTH = 0.05  # width of the locus in log FWHM
_SAME_LIGHT = 0.04
_UNDERSAMPLED = 2.2
_PHASES = 4  # places of an undersampled star in the pixel, along an axis
_BY_PHASE = (
    0.12  # how much wider the locus is for each pixel that the FWHM is below 2.2; below 1.7, three times as much
)
_NEARBY = 0.15
_APART = 0.2
_CONTRAST = 4.0
_NARROWER = 0.25
_STEPS = 40

_SIZE_RANGE = (0.5, 6.0)
_SIZE_REACH = 20  # half the side of the square in which a size is measured, pixels
_STAR_MISFIT = 0.05  # rms of the difference of a star from the stack, in units of the star's own rms
_RING = 1.25
_SKY_OFF = 0.06  # how far the sky under a star may be off, in units of the rms of a pixel
_WING_SLOPE = 3.0
_WING_SLOPES = (2.0, 5.0)


# --- the stellar locus --------------------------------------------------------------------------------


def profiles(
    data: np.ndarray,
    bad: np.ndarray,
    sky: Sky,
    found: Detections,
    which: np.ndarray | None = None,
    origin: tuple[int, int] = (0, 0),
    ellipticity: tuple[float, float] = (0.0, ROUND),
) -> np.ndarray:
    """Measure how wide and how concentrated the bright and round sources of an image are.

    The results of several windows of an image can be joined, and given to
    `stellar_locus` together.

    Parameters
    ----------
    data : ndarray, float32, (H, W)
        An image or a window of it, sky included.
    bad : ndarray, bool, (H, W)
        Pixels without data.
    sky, found
        From a `sersicnet.image.detect.Detector`.
    which : ndarray, bool, (N,), optional
        Which detections to measure; all by default.
    origin : (int, int)
        x and y of the first pixel of the arrays, in the pixels that the positions of `found` refer to.
    ellipticity : (float, float)
        Least and largest ellipticity of the cores of the sources.

    Returns
    -------
    ndarray, float64, (M, 4)
        Full width at half maximum, in pixels and by the definition of
        `sersicnet.image.psf.full_width`; the light within 1.5 FWHM of the centre over peak
        times FWHM squared; mean surface brightness of the detection, image units per pixel; and
        its index in `found`.
    """
    rows = []
    offset_y, offset_x = np.indices((2 * REACH + 1, 2 * REACH + 1)) - REACH
    distance = np.hypot(offset_x, offset_y)
    with np.errstate(invalid="ignore", divide="ignore"):
        brightness = found.flux / found.area
    brightest = np.argsort(-brightness, kind="stable")
    if which is not None:
        brightest = brightest[which[brightest]]
    for i in brightest[:MOST_SOURCES]:
        x, y = float(found.x[i]) - origin[0], float(found.y[i]) - origin[1]
        if not (np.isfinite(x) and np.isfinite(y)):
            continue
        column, row = _peak(data, round(x), round(y))
        part = slice(row - REACH, row + REACH + 1), slice(column - REACH, column + REACH + 1)
        if min(row, column) < REACH or data[part].shape != distance.shape or bad[part].any():
            continue
        box = data[part].astype(float) - sky.level[part]
        peak = float(box[REACH, REACH])
        if not peak > LEAST_PEAK * sky.rms[row, column]:
            continue
        labels, _ = ndimage.label(box > peak / 4)
        inside = (labels == labels[REACH, REACH]) | (distance < 1.5)
        used = inside & (box > peak / 50)
        if used.sum() < 7 or used[distance > REACH - 0.5].any():
            continue
        core = _gaussian(offset_x[used], offset_y[used], box[used] / peak)
        if core is None or not ellipticity[0] <= core.ellipticity < ellipticity[1]:
            continue
        if _APERTURE * core.fwhm >= REACH - 1:
            continue
        width, light = _width_and_light(box, core)
        if width > 0 and light > 0:
            rows.append((width, light, brightness[i], i))
    return np.array(rows).reshape(-1, 4)


def stellar_locus(found: np.ndarray, least: int = LEAST_STARS) -> np.ndarray:
    """Which of the measured sources are stars.

    Stars have one width and one profile; galaxies are broader and differ: stars form a
    narrow locus at the small end of the widths. Stars agree in FWHM, within 5 %, and in
    concentration, within 4 %. Their number exceeds four times the number expected
    from the widths nearby by `MANY_STARS`, and few sources with the same concentration are
    narrower; or there are `LEAST_STARS`, and no other source is narrower or less than
    20 % wider. The FWHM of an undersampled star depends on its position in the pixel: below
    2.2 pixels the tolerances grow, by up to 4 times at 1.2 pixels.

    Parameters
    ----------
    found : ndarray, float64, (M, 4)
        See `profiles`.
    least : int
        In place of `LEAST_STARS`.

    Returns
    -------
    ndarray, int, (S,)
        Rows of `found`; none if no locus stands out.
    """
    brightest = np.argsort(-found[:, 2], kind="stable")[:MOST_SOURCES]
    order = brightest[np.argsort(found[brightest, 0], kind="stable")]
    below = np.clip(_UNDERSAMPLED - found[order, 0], 0, 0.5) + 2 * np.clip(
        _UNDERSAMPLED - 0.5 - found[order, 0], 0, 0.5
    )
    tolerance = 1 + _BY_PHASE / _SAME_WIDTH * below
    width, light = np.log(found[order, :2]).T
    ends = np.searchsorted(width, width + _SAME_WIDTH * tolerance, side="right")
    best, chosen = 0.0, np.zeros(0, int)
    for first, end in enumerate(ends):
        if end - first < least:
            continue
        span = _SAME_WIDTH * tolerance[first]
        alike = np.abs(light - np.median(light[first:end])) < _SAME_LIGHT * tolerance[first]
        n = int(alike[first:end].sum())
        near = alike & (width > width[first] - _NEARBY) & (width < width[first] + span + _NEARBY)
        expected = (near.sum() - n) * span / (2 * _NEARBY)
        alone = n >= MANY_STARS + _CONTRAST * expected and alike[:first].sum() <= _NARROWER * n
        # Few sources agree by chance among many galaxies: no source of any other kind may be as narrow.
        alone |= n == np.searchsorted(width, width[first] + span + _APART, side="right")
        if alone and n >= least and n - expected > best:
            best, chosen = n - expected, order[first:end][alike[first:end]]
    return chosen


def width_of(found: np.ndarray) -> Width:
    """Width of the PSF: the median of stars.

    The width of a star is measured as that of a PSF. Against the PSF that simulated
    fields were drawn with, the median is within 0.2 % for a FWHM of 3 to 5 pixels, and too narrow by 1 % at
    2.2, 2 % at 1.8 and 3 % at 1.4 pixels, where a star depends on its position in the pixel.

    Parameters
    ----------
    found : ndarray, float64, (S, 4)
        The `profiles` of stars.

    Returns
    -------
    Width
        NaN without stars.
    """
    chosen = found[:, 0]
    if not len(chosen):
        return Width(np.nan, np.nan, "too few stars")
    value, scatter = float(np.median(chosen)), float(np.std(chosen))
    return Width(value, 1.25 * scatter / len(chosen) ** 0.5, f"{len(chosen)} stars")


def largest_star(size: np.ndarray) -> float:
    """Size up to which a source looks like a star: nine in ten of the stars are smaller.

    Parameters
    ----------
    size : ndarray, float64, (S,)
        `sizes` of stars; NaN for those that are not known.

    Returns
    -------
    float
        NaN without stars.
    """
    known = size[np.isfinite(size)]
    return float(np.quantile(known, 0.9)) if len(known) else np.nan


def look_like_stars(size: np.ndarray, snr: np.ndarray, largest: float | np.ndarray) -> np.ndarray:
    """Which sources are not resolved: those no larger than the largest star, within twice the noise, bool, (N,).

    Parameters
    ----------
    size, snr : ndarray, float64, (N,)
        From `sizes`; a source with NaN does not look like a star.
    largest : float or ndarray, float64, (N,)
        From `largest_star` or `size_of`; with NaN no source looks like a star.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(size <= largest * (1 + 2 / snr))


class _Core(NamedTuple):
    fwhm: float
    ellipticity: float
    x: float
    y: float


def _gaussian(x: np.ndarray, y: np.ndarray, values: np.ndarray) -> _Core | None:
    """The Gaussian that fits the logarithm of some pixels, if there is one."""
    terms = np.column_stack([np.ones(len(x)), x, y, x * x, x * y, y * y])
    c = np.linalg.lstsq(terms * values[:, None], np.log(values) * values, rcond=None)[0]
    inverse = -np.array([[2 * c[3], c[4]], [c[4], 2 * c[5]]])
    curvature = np.linalg.eigvalsh(inverse)
    if not curvature[0] > 0:
        return None
    x0, y0 = np.linalg.solve(inverse, c[1:3])
    if max(abs(x0), abs(y0)) > 2:
        return None
    long, short = 1 / np.sqrt(curvature)
    fwhm = np.sqrt(8 * np.log(2) * long * short)
    return _Core(float(fwhm), float(1 - short / long), float(x0), float(y0))


def _width_and_light(box: np.ndarray, core: _Core) -> tuple[float, float]:
    """FWHM of the source in a square, and light in units of peak times FWHM squared; NaN if it is wider than its core.

    The width of the Gaussian alone would be 1 to 4 % more than that of a PSF with wings.
    """
    radii = np.linspace(0, min(2 * core.fwhm, REACH - 1), _STEPS)
    profile = radial_profile(box, (REACH + core.y, REACH + core.x), radii)
    width = 2 * half_width(radii, profile)
    if not _APERTURE * width <= radii[-1]:
        return np.nan, np.nan
    edge = np.linspace(0, _APERTURE * width, _STEPS)
    light = np.trapezoid(np.interp(edge, radii, profile) * 2 * np.pi * edge, edge)
    return width, float(light / (profile[0] * width**2))


def _peak(data: np.ndarray, column: int, row: int) -> tuple[int, int]:
    """The brightest pixel within two of a place; the place itself at an edge."""
    if row < 2 or column < 2:
        return column, row
    near = data[row - 2 : row + 3, column - 2 : column + 3]
    if near.shape != (5, 5):
        return column, row
    up, right = np.unravel_index(np.argmax(near), near.shape)
    return column + int(right) - 2, row + int(up) - 2


# --- stars and their PSF ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Stars:
    """The stars of an image, and their stack.

    Attributes
    ----------
    psf : ndarray, float64, (127, 127) or None
        Effective PSF: unit sum, centred on the middle pixel. None if there are too
        few stars.
    used : ndarray, bool, (N,)
        Which detections are in the stack.
    alike : ndarray, bool, (N,)
        Which detections look like stars, see `look_like_stars`.
    size : ndarray, float64, (N,)
        Standard deviation of each detection, pixels, see `sizes`; NaN if it is not known, or
        the source is blended.
    snr : ndarray, float64, (N,)
        Of the detection through the Gaussian of that size.
    """

    psf: np.ndarray | None
    used: np.ndarray
    alike: np.ndarray
    size: np.ndarray
    snr: np.ndarray


def find_stars(data: np.ndarray, bad: np.ndarray, sky: Sky, found: Detections) -> Stars:
    """Find the stars among detections, and stack them to a PSF.

    The stars of the `stellar_locus` that are not blended are shifted to a common
    centre and averaged, weighted by their flux, without pixels that differ from the rest.
    Centres and fluxes are then measured with that PSF, stars that do not fit it are
    dropped, and all is repeated. Where the noise of the stack covers the wings,
    the wings follow a power law that fits the rings further in.

    Parameters
    ----------
    data : ndarray, float32, (H, W)
        Image, sky included.
    bad : ndarray, bool, (H, W)
        Pixels without data.
    sky, found
        From a `sersicnet.image.detect.Detector`.

    Returns
    -------
    Stars
    """
    n = len(found)
    size, snr, round_ = np.full(n, np.nan), np.full(n, np.nan), np.zeros(n, bool)
    dilated = found.dilated()
    for first in range(0, n, MOST_STARS):
        part = slice(first, min(first + MOST_STARS, n))
        stamps = cut(data, bad, sky, found.x[part], found.y[part], dilated, np.arange(part.start, part.stop) + 1)
        size[part], snr[part], round_[part] = sizes(stamps)
    size[found.blended] = np.nan
    measured = profiles(data, bad, sky, found)
    stars = measured[stellar_locus(measured), 3].astype(int)
    alike, used = look_like_stars(size, snr, largest_star(size[stars])), np.zeros(n, bool)
    single = stars[round_[stars] & np.isfinite(size[stars])]
    single = np.sort(single[np.argsort(-snr[single], kind="stable")][:MOST_STARS])
    if len(single) < LEAST_STARS:
        return Stars(None, used, alike, size, snr)
    psf, kept = _stacked(cut(data, bad, sky, found.x[single], found.y[single], dilated, single + 1), sky.correlation)
    if psf is not None:
        used[single[kept]] = True
    return Stars(psf, used, alike, size, snr)


def size_of(psf: Psf) -> float:
    """The size that `Stars.size` has for a noiseless star, pixels; NaN if it has none.

    An undersampled star is narrower in the middle of a pixel than at its corner: at three quarters of the places in a
    pixel, it is no larger than that.

    Parameters
    ----------
    psf : Psf
        In pixels of the image; of a varying one that in the middle of the field.
    """
    image, k = psf.image, psf.oversampling
    middle, reach = len(image) // 2, min(len(image) // 2, k * (_SIZE_REACH + 2))
    image = image[middle - reach : middle + reach + 1, middle - reach : middle + reach + 1]
    if psf.fwhm < _UNDERSAMPLED and k % 2:  # so that a star may be at the corner of a pixel
        finer = np.arange(2 * len(image) - 1) / 2
        image, k = between(image, *np.meshgrid(finer, finer, indexing="ij")), 2 * k
    steps = np.unique(np.linspace(0, k, _PHASES, endpoint=False).astype(int)) if psf.fwhm < _UNDERSAMPLED else [0]
    off = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    half, first, at, n = STAMP_SIZE // 2 - 1, len(image) // 2 + k, STAMP_SIZE // 2, len(off)
    wide = np.pad(image, k * half + k)
    stamp = np.zeros((n, STAMP_SIZE, STAMP_SIZE), np.float32)
    for part, (x, y) in zip(stamp, off, strict=True):
        part[1:, 1:] = 1e6 * wide[first + y :: k, first + x :: k][: 2 * half + 1, : 2 * half + 1]
    no, one, inside = np.zeros(stamp.shape, bool), np.ones(n), np.tile([0, STAMP_SIZE, 0, STAMP_SIZE], (n, 1))
    x, y = at - off.T / k
    stars = Stamps(stamp, no, x, y, one, np.ones_like(stamp), inside, 0 * one, 0 * one, no[:, 0, 0], 0 * one)
    found = sizes(stars)[0]
    return float(np.nanquantile(found, 0.75)) if np.isfinite(found).any() else np.nan


PLATEAU, PLATEAU_CONTRAST, PLATEAU_REACH = 4, 2, 20
"""A centre is cut off if at least this many pixels have the same highest value, and this many times more than have
another value of the source, within this distance: where an image was interpolated to finer pixels, or has coarse steps,
many pixels have the same value at any height."""


SAME, SAME_NOISE = 1e-4, 0.02
"""Two values are the same if they differ by less than this fraction, or this fraction of the noise: the sky that was
subtracted may slope."""


def saturated(stamps: Stamps, level: float = np.inf) -> np.ndarray:
    """Which sources are saturated in their centre, bool, (N,).

    Those with a pixel of `level` or more among the central 9 x 9, and those with a
    plateau there, see `PLATEAU`.

    Parameters
    ----------
    stamps : Stamps
    level : float
        Image units, sky included.
    """
    middle = slice(STAMP_SIZE // 2 - 5, STAMP_SIZE // 2 + 4)
    centre = np.where(stamps.replaced[:, middle, middle], -np.inf, stamps.pixels[:, middle, middle])
    centre = centre.reshape(len(centre), (middle.stop - middle.start) ** 2)
    highest = centre.max(axis=1, initial=-np.inf, keepdims=True)
    with np.errstate(invalid="ignore"):
        reached = highest[:, 0] * stamps.rms + stamps.sky >= (1 - SAME) * level
        flat = np.isclose(centre, highest, rtol=SAME, atol=SAME_NOISE).sum(axis=1) >= PLATEAU
    flat &= highest[:, 0] > LOW_SNR_LIMIT
    around = slice(STAMP_SIZE // 2 - PLATEAU_REACH, STAMP_SIZE // 2 + PLATEAU_REACH)
    for i in np.flatnonzero(flat):
        values = stamps.pixels[i, around, around][~stamps.replaced[i, around, around]]
        flat[i] = _is_cut_off(np.sort(values), float(highest[i, 0]))
    return reached | flat


def _is_cut_off(ordered: np.ndarray, highest: float) -> bool:
    """Whether more of the sorted values equal the highest one of a source than any other value above a tenth of it."""
    width = 2 * (SAME_NOISE + SAME * highest)
    first, top = ordered.searchsorted([0.1 * highest, highest - width / 2])
    same = ordered.searchsorted(highest + width / 2, "right") - top
    others = ordered[first:top]
    most = int((others.searchsorted(others + width, "right") - np.arange(len(others))).max(initial=0))
    return bool(same >= PLATEAU_CONTRAST * most)


def good_galaxies(
    data: np.ndarray, bad: np.ndarray, sky: Sky, found: Detections, stars: Stars | None = None
) -> np.ndarray:
    """Which detections a network can learn from, bool, (N,).

    Those with a signal to noise of `sersicnet.schema.LOW_SNR_LIMIT`, whose stamp
    lies inside the image and has nearly all of its pixels, and that do not look
    like a star.

    Parameters
    ----------
    data, bad, sky, found
        As for `find_stars`.
    stars : Stars, optional
        Found already.
    """
    stars = stars or find_stars(data, bad, sky, found)
    half = STAMP_SIZE // 2
    good = ~stars.alike & (found.flux > 0) & np.isfinite(found.x) & np.isfinite(found.y)
    for i in np.flatnonzero(good):
        x, y = round(found.x[i]) - half, round(found.y[i]) - half
        good[i] = 0 < x < data.shape[1] - STAMP_SIZE and 0 < y < data.shape[0] - STAMP_SIZE
        if good[i]:
            window = slice(y, y + STAMP_SIZE), slice(x, x + STAMP_SIZE)
            snr = found.flux[i] / (np.sqrt(found.area[i]) * np.nanmedian(sky.rms[window]) * sky.correlation)
            good[i] = snr >= LOW_SNR_LIMIT and bad[window].mean() <= MASKED_LIMIT
    return good


def sizes(stamps: Stamps, reach: int = _SIZE_REACH, rounds: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Size [pix] and S/N of sources as Gaussians see them, float64, (N,), and which may be stars, bool, (N,).

    The size is that of the round Gaussian whose weight makes the second moment
    half of its own variance; it does not care for noise far out, as a plain
    second moment does.
    """
    n, middle = len(stamps.x), STAMP_SIZE // 2
    inner = slice(middle - reach, middle + reach)
    values = stamps.pixels[:, inner, inner].astype(float)
    along = np.arange(2.0 * reach)
    cx, cy = stamps.x - inner.start, stamps.y - inner.start
    sigma, total, squares = np.full(n, 1.5), np.zeros(n), np.ones(n)
    e1, e2 = np.ones(n), np.ones(n)
    good = ~stamps.empty & np.isfinite(stamps.rms)
    values[~good] = np.nan
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        for _ in range(rounds):
            # Weight and moments are products of factors along x and y.
            to_x, to_y = (along - centre[:, None] for centre in (cx, cy))
            in_x, in_y = (np.exp(-0.5 * (to / sigma[:, None]) ** 2) for to in (to_x, to_y))
            by_x, by_y = (
                np.stack([weight, weight * to, weight * to**2], axis=-1) for weight, to in ((in_x, to_x), (in_y, to_y))
            )
            moments = by_y.transpose(0, 2, 1) @ (values @ by_x)
            total, squares = moments[:, 0, 0], (in_x**2).sum(axis=1) * (in_y**2).sum(axis=1)
            mx, my, mxx, myy, mxy = (moments[:, j, i] / total for j, i in ((0, 1), (1, 0), (0, 2), (2, 0), (1, 1)))
            cx, cy = cx + np.clip(2 * mx, -1, 1), cy + np.clip(2 * my, -1, 1)
            trace = mxx + myy
            e1, e2 = 2 * (mxx - myy) / trace, 4 * mxy / trace
            sigma = np.clip(np.sqrt(np.where(trace > 0, trace, np.nan)), *_SIZE_RANGE)
        snr = total / np.sqrt(squares)
        square_x, square_y = ((along - centre[:, None]) ** 2 for centre in (cx, cy))
        near = square_y[:, :, None] + square_x[:, None, :] < (3 * sigma[:, None, None]) ** 2
        whole = ~(stamps.replaced[:, inner, inner] & near).any(axis=(1, 2))
        inside = sigma < _SIZE_RANGE[1]  # a star in the middle of a large pixel may have the smallest size
        moved = np.hypot(cx + inner.start - stamps.x, cy + inner.start - stamps.y) > 1
        trusted = good & whole & inside & ~moved & (snr > 0)
        round_ = trusted & (np.hypot(e1, e2) < 0.25)
    return np.where(trusted, sigma, np.nan), np.where(trusted, snr, np.nan), round_


def _stacked(stamps: Stamps, correlation: float, rounds: int = 4) -> tuple[np.ndarray | None, np.ndarray]:
    """Stack the stamps of stars; the PSF, and which stars it was made from."""
    middle, n = PSF_SIDE // 2, len(stamps.x)
    y, x = np.indices((PSF_SIDE, PSF_SIDE)) - middle
    radius = np.hypot(x, y)
    core = radius < 8
    noise_of_mean = 1 + 2 * correlation * np.sqrt(2 / core.sum())  # two sigma above the mean square of correlated noise
    shift = np.column_stack([stamps.x, stamps.y]) - middle
    flux = np.array([p[:-1, :-1][core].sum() for p in stamps.pixels])
    kept = flux > 0
    psf = np.zeros((PSF_SIDE, PSF_SIDE))
    for turn in range(rounds):
        if kept.sum() < LEAST_STARS:
            return None, kept
        centred = np.array([_shifted(p, -d)[:-1, :-1] for p, d in zip(stamps.pixels[kept], shift[kept], strict=True)])
        missing = np.array([ndimage.binary_dilation(m, np.ones((3, 3)))[:-1, :-1] for m in stamps.replaced[kept]])
        scaled = np.where(missing, np.nan, centred / flux[kept, None, None])
        psf, noise, sky = _mean_star(scaled, flux[kept])
        psf /= psf[core].sum()
        dy, dx = np.gradient(psf)
        misfit = np.zeros(n)
        basis = np.column_stack([psf[core], -dx[core], -dy[core]])
        for k, star in zip(np.flatnonzero(kept), centred, strict=True):
            (amount, ax, ay), *_ = np.linalg.lstsq(basis, star[core], rcond=None)
            flux[k] = amount
            shift[k] += np.clip([ax / amount, ay / amount], -0.5, 0.5)
            left = star[core] - basis @ (amount, ax, ay)
            excess = max(float((left**2).mean()) - noise_of_mean, 0)
            misfit[k] = np.sqrt(excess / (star[core] ** 2).mean())
        if turn > 0:
            kept &= (misfit < _STAR_MISFIT) & (flux > 0)
    if kept.sum() < LEAST_STARS:
        return None, kept
    psf = _with_wings(psf, radius, noise * correlation, sky * _SKY_OFF)
    return psf / psf.sum(), kept


def _shifted(stamp: np.ndarray, by: np.ndarray) -> np.ndarray:
    """A stamp moved by a fraction of its pixels along x and y, by a phase in Fourier space."""
    fy, fx = (np.fft.fftfreq(n) for n in stamp.shape)
    phase = np.exp(-2j * np.pi * (fx[None, :] * by[0] + fy[:, None] * by[1]))
    return np.fft.ifft2(np.fft.fft2(stamp) * phase).real


def _mean_star(scaled: np.ndarray, flux: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Mean of stars of unit flux, weighted by their flux, without outliers; the noise of a pixel of it, and of its sky.

    The latter is what a sky that is off by the rms of a pixel makes of it.
    """
    weight = np.minimum(flux, 4 * np.median(flux)) ** 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # pixels that no star has
        typical = np.nan_to_num(np.nanmedian(scaled, axis=0))
    tolerance = 4 * np.hypot(1 / flux[:, None, None], 0.05 * typical + 0.1 * typical.max() * (typical > 0.2))
    with np.errstate(invalid="ignore"):
        good = np.abs(scaled - typical) < tolerance
    weights = np.where(good, weight[:, None, None], 0)
    total = weights.sum(axis=0)
    mean = np.where(good, scaled, 0)
    mean = np.where(total > 0, (weights * mean).sum(axis=0) / np.maximum(total, 1e-30), typical)
    return mean, float(np.sqrt((weight**2 / flux**2).sum()) / weight.sum()), float((weight / flux).sum() / weight.sum())


def _with_wings(psf: np.ndarray, radius: np.ndarray, noise: float, sky: float) -> np.ndarray:
    """A PSF whose pixels are replaced by means of rings where the noise covers them, and those by a power law.

    `noise` is that of a pixel, `sky` what all of them may be off by together.
    """
    ring = np.rint(radius).astype(int)
    inside = ring <= PSF_SIDE // 2
    profile = np.bincount(ring[inside], psf[inside]) / np.bincount(ring[inside])
    half = int(np.argmax(profile < profile[0] / 2))
    noisy = profile < 3 * noise
    first = max(int(np.argmax(noisy)), 2 * half) if noisy.any() else len(profile)
    if first >= PSF_SIDE // 2:
        return psf
    # Rings as wide as a quarter of their radius, from well inside of where they are needed.
    steps = max(2, round(np.log(PSF_SIDE / 2 / (first / 1.5)) / np.log(_RING)))
    edges = np.geomspace(first / 1.5, PSF_SIDE / 2, steps + 1)
    which = np.digitize(radius, edges) - 1
    there = (which >= 0) & (which < steps)
    number = np.bincount(which[there], minlength=steps)
    mean = np.bincount(which[there], psf[there], minlength=steps) / number
    at = np.bincount(which[there], radius[there], minlength=steps) / number
    known = mean > np.hypot(5 * noise / np.sqrt(number), 3 * sky)
    last = int(np.argmin(known)) if not known.all() else steps  # rings known without a gap
    slope = _WING_SLOPE
    if last >= 3:
        slope = float(np.clip(-np.polyfit(np.log(at[:last][-4:]), np.log(mean[:last][-4:]), 1)[0], *_WING_SLOPES))
    if last == 0:
        at, mean, last = np.array([first - 1.0]), np.array([max(profile[first - 1], 0)]), 1
    distance = np.maximum(radius, 1)
    within = np.exp(np.interp(np.log(distance), np.log(at[:last]), np.log(np.maximum(mean[:last], 1e-30))))
    beyond = mean[last - 1] * (at[last - 1] / distance) ** slope
    return np.where(radius < first, psf, np.where(radius < at[last - 1], within, beyond))
