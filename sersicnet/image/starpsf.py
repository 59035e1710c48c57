"""The PSF of an image from its own stars: where they are looked for, which are taken, and how the PSF varies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from sersicnet.errors import InputError, counted
from sersicnet.image import psffigure
from sersicnet.image.detect import DILATION, Detections, Detector
from sersicnet.image.epsf import LEAST_STARS, EffectivePsf, StarStamps, measure_psf, powers, terms
from sersicnet.image.pixels import Pixels, Sky, Source, Window, correlation
from sersicnet.image.psf import Psf
from sersicnet.image.psffield import Polynomial
from sersicnet.image.regions import grown_labels
from sersicnet.image.sky import Map, Mesh
from sersicnet.image.stamps import cut
from sersicnet.image.stars import FEW_STARS, ROUND, profiles, saturated, sizes, stellar_locus

WINDOW = 1024
"""Side of the windows in which stars are looked for, pixels."""

WINDOWS, MORE_WINDOWS = 16, 9
"""Windows of a large image, and windows between them that are searched if the first ones have few stars. An image with
no more pixels than all of them is searched completely."""

ENOUGH = 60
"""Stars in the first windows that make more windows unnecessary."""

MOST_STARS = 200
"""Stars that a PSF is measured from at most."""

MOST_IN_A_WINDOW = 128
"""Sources of a window whose stamps are kept at most, those of the highest surface brightness."""

BROAD = 4.0
"""FWHM from which stars are looked for in blocks of 2 x 2 pixels, too. In single pixels the search ends at 7 pixels."""

_ELONGATED = 0.4  # largest ellipticity of stars
_GROWN = DILATION + 3  # pixels by which sources are dilated before they are masked in the stamps of stars
_COSMIC_RAY = 1.3  # FWHM of the narrowest source that is no cosmic ray, pixels
_BINNED = 2.0  # how much the square of a width is larger in binned pixels, pixels^2
_PARTS = (2, 3)  # parts along an axis of an image in which a stellar locus is looked for
_WIDEST = 1.4  # largest ratio of the FWHM in two parts
_LOCAL = 30  # stars from which the locus may vary over the image
_SAME_WIDTH, _SAME_LIGHT = 0.03, 0.04  # of stars about the local locus, in the log
_FEW_SINGLE = 10  # stars that are not blended, from which blended ones are not needed


@dataclass(frozen=True, eq=False)
class ImagePsf:
    """The PSF of an image, or the reason why its stars do not give one.

    Attributes
    ----------
    psf : Psf or None
        Effective PSF, constant or varying over the image.
    reason : str
        Why there is none, in words; empty if there is one.
    x, y : ndarray, float64, (S,)
        Stars that the PSF was measured from, zero-based pixels of the image.
    scatter : float
        Relative scatter of the FWHM of the stars about the PSF at their place, beyond their noise; NaN without a PSF.
    misfit : float
        Median of the rms of the difference of a star from the PSF, over the rms of the star, see
        `sersicnet.image.epsf.EffectivePsf`.
    narrowest, widest : float
        FWHM of the PSF over the image, pixels.
    ellipticity : float
        Largest ellipticity of the PSF over the image.
    shape : (int, int)
        Height and width of the image; (0, 0) if it is not known.
    few : StarStamps or None
        Without a PSF, stamps of the stars at x and y, which may serve where the width of the PSF is known roughly, see
        `sersicnet.image.fewstars.confirmed`.
    few_correlation : float
        Correlation of the noise of these stamps.
    narrow : float
        Without a PSF, the FWHM of the narrowest of the bright sources, pixels; NaN without any. It was 0.97 to 1.14
        times that of the PSF in nine of ten simulated cut-outs of 300 and 600 pixels from eight telescopes.
    bright : int
        Without a PSF, the number of bright sources.
    """

    psf: Psf | None
    reason: str = ""
    x: np.ndarray = field(default_factory=lambda: np.zeros(0))
    y: np.ndarray = field(default_factory=lambda: np.zeros(0))
    scatter: float = float("nan")
    misfit: float = float("nan")
    narrowest: float = float("nan")
    widest: float = float("nan")
    ellipticity: float = float("nan")
    shape: tuple[int, int] = (0, 0)
    few: StarStamps | None = field(default=None, repr=False)
    few_correlation: float = 1.0
    narrow: float = float("nan")
    bright: int = 0

    def __repr__(self) -> str:
        if self.psf is None:
            return f"<ImagePsf none: {self.reason}>"
        widths = f", {self.narrowest:.3f} to {self.widest:.3f} over the image" if self.psf.varies else ""
        return (
            f"<ImagePsf of {len(self.x)} stars: FWHM {self.psf.fwhm:.3f} pixels{widths}, ellipticity at most "
            f"{self.ellipticity:.2f}>"
        )

    def plot(self, axes: Sequence[Any] | None = None) -> list[Any]:
        """Draw the PSF in the middle of the image, its light within a radius, and where its stars are.

        Parameters
        ----------
        axes : sequence of Axes, optional
            Three axes of Matplotlib; by default those of a new figure.

        Returns
        -------
        list of Axes

        Raises
        ------
        InputError
            If the image shows no PSF, or there are not three axes.
        """
        if self.psf is None:
            raise InputError(f"The image shows no PSF ({self.reason}): there is none to plot.")
        axes = psffigure.axes_for(3, axes)
        psffigure.plot_psf(self.psf, axes[:2])
        psffigure.draw_stars(axes[2], self.x, self.y, self.shape)
        return axes

    def _repr_png_(self) -> bytes | None:
        return None if self.psf is None else psffigure.png_of(3, self.plot)


def find_psf(
    source: Source,
    mesh: Mesh,
    detector: Detector | None = None,
    saturation: float = np.inf,
    apply: Map = map,
) -> ImagePsf:
    """Measure the PSF of an image from its stars.

    Stars are looked for in windows of the image, and selected together by their widths and profiles, see
    `sersicnet.image.stars.stellar_locus`. Where there are enough, the locus follows the PSF over the image. The
    brightest single and unsaturated ones are taken, evenly from all windows, and `sersicnet.image.epsf.measure_psf`
    measures the PSF. The result does not depend on the number of workers.

    Parameters
    ----------
    source : Source
        The image.
    mesh : Mesh
        Its sky and noise.
    detector : Detector, optional
    saturation : float
        Saturation level, image units, sky included; infinite if it is not known. A level that blank sky exceeds is
        ignored.
    apply : callable
        Applies a function to the windows, as `map` does.

    Returns
    -------
    ImagePsf
        Without a PSF if fewer than `sersicnet.image.epsf.LEAST_STARS` stars are usable; its `few` has these.
    """
    if not saturation > np.median(mesh.level) + 5 * np.median(mesh.rms):
        saturation = np.inf
    search = partial(_search, source, mesh, detector or Detector(), saturation)
    found: list[_Candidates] = []
    before: list[Window] = []
    for windows in _windows(source.shape):
        found += apply(search, [(window, [*before, *windows[:i]]) for i, window in enumerate(windows)])
        before += windows
        candidates = _joined(found)
        fwhm, chosen = _stars(candidates, source.shape)
        if len(chosen) >= ENOUGH:
            break
    factor = correlation(mesh.autocorrelation)
    if not len(chosen):
        n = max(len(candidates.fine) + len(candidates.elongated), len(candidates.coarse))
        locus = candidates.fine[stellar_locus(candidates.fine, FEW_STARS), 3].astype(int)
        few = locus[locus >= 0]
        few = few[~candidates.clipped[few]]
        return _too_few(candidates, few, factor, f"no stellar locus among {n} bright sources")
    usable = chosen[~candidates.clipped[chosen]]
    if len(usable) < LEAST_STARS:
        clipped = len(chosen) - len(usable)
        which = "all saturated" if not len(usable) else f"{clipped} of them saturated"
        return _too_few(
            candidates, usable, factor, f"{counted(len(chosen), 'star')}, {which}; {LEAST_STARS} others are needed"
        )
    single = usable[~candidates.blended[usable]]
    usable = _best(candidates, single if len(single) >= _FEW_SINGLE else usable)
    place = _normalised(candidates.x[usable], candidates.y[usable], source.shape)
    measured = measure_psf(_stamps(candidates, usable), fwhm, factor, place)
    if measured is None:
        reason = f"{len(usable)} stars, of which fewer than {LEAST_STARS} agree on a PSF"
        return _too_few(candidates, usable, factor, reason)
    try:
        return _result(measured, candidates.x[usable], candidates.y[usable], source.shape)
    except InputError as error:
        return ImagePsf(None, f"{len(usable)} stars, whose stack is no PSF: {error}")


def _stamps(candidates: _Candidates, which: np.ndarray) -> StarStamps:
    """Stamps of some candidates, in units of their noise."""
    values = candidates.values[which]
    noise = np.broadcast_to(np.float32(1), values.shape)
    return StarStamps(values, noise, np.isnan(values), *candidates.in_stamp[which].T)


def _too_few(candidates: _Candidates, which: np.ndarray, factor: float, reason: str) -> ImagePsf:
    """No PSF, but a few stars, if there are any; many that do not agree are none."""
    few = _stamps(candidates, which) if 0 < len(which) <= _FEW_SINGLE else None
    x, y = candidates.x[which], candidates.y[which]
    narrow, bright = _narrowest(candidates)
    return ImagePsf(None, reason, x, y, few=few, few_correlation=factor, narrow=narrow, bright=bright)


def _narrowest(candidates: _Candidates) -> tuple[float, int]:
    """FWHM of the narrowest candidate that is no cosmic ray, pixels, and the number of such candidates."""
    coarse = np.sqrt(np.maximum(candidates.coarse[:, 0] ** 2 - _BINNED, 0))
    for widths in (candidates.fine[:, 0], coarse):
        if (usable := widths > _COSMIC_RAY).any():
            return float(widths[usable].min()), int(usable.sum())
    return math.nan, 0


# --- candidates ---------------------------------------------------------------------------------------


class _Candidates(NamedTuple):
    """Sources that may be stars."""

    fine: np.ndarray  # `profiles` of round sources, whose last column is the row in the other arrays, -1 for none
    elongated: np.ndarray  # the same of elongated sources
    coarse: np.ndarray  # the same two in blocks of 2 x 2 pixels, with widths in pixels
    coarse_elongated: np.ndarray
    x: np.ndarray  # in the image
    y: np.ndarray
    in_stamp: np.ndarray  # x and y in the stamp, (C, 2)
    brightness: (
        np.ndarray
    )  # signal to noise; of undersampled stars, for which it is not known, in proportion to the peak
    clipped: np.ndarray
    blended: np.ndarray
    values: np.ndarray  # stamps in units of the noise, NaN in pixels that are not usable, float32, (C, 128, 128)
    window: np.ndarray  # number of the window


def _windows(shape: tuple[int, int]) -> Iterator[list[Window]]:
    """Windows in which stars are looked for, one round after another."""
    whole = [-(-n // WINDOW) for n in shape]
    if whole[0] * whole[1] <= WINDOWS + MORE_WINDOWS:
        edges = [np.linspace(0, n, k + 1).round().astype(int).tolist() for n, k in zip(shape, whole, strict=True)]
        yield [
            (slice(*rows), slice(*columns))
            for rows in zip(edges[0], edges[0][1:], strict=False)
            for columns in zip(edges[1], edges[1][1:], strict=False)
        ]
        return
    across = min(max(round(math.sqrt(WINDOWS * shape[1] / shape[0])), 2), WINDOWS // 2)
    starts = [
        np.linspace(0, max(n - WINDOW, 0), min(k, most))
        for n, k, most in zip(shape, (WINDOWS // across, across), whole, strict=True)
    ]
    yield _at(starts, shape)
    between = [(line[1:] + line[:-1]) / 2 if len(line) > 1 else line for line in starts]
    yield _at(between, shape)


def _at(starts: list[np.ndarray], shape: tuple[int, int]) -> list[Window]:
    rows, columns = (
        [slice(int(first), min(int(first) + WINDOW, n)) for first in line]
        for line, n in zip(starts, shape, strict=True)
    )
    return [(row, column) for row in rows for column in columns]


def _search(
    source: Source, mesh: Mesh, detector: Detector, saturation: float, place: tuple[Window, list[Window]]
) -> _Candidates:
    """The sources of a window that may be stars, without those in windows before it, which may overlap it."""
    window, before = place
    whole, pixels, sky, found = detector.around(source, mesh, window)
    origin = whole[1].start, whole[0].start
    own = _inside(found, window)
    for other in before:
        own &= ~_inside(found, other)
    data, bad, level, blocks = _in_blocks(pixels, sky, found, origin)
    tables = []
    for within in ((0.0, ROUND), (ROUND, _ELONGATED)):
        tables.append(profiles(pixels.data, pixels.bad, sky, found, own, origin, within))
        tables.append(profiles(data, bad, level, blocks, own, ellipticity=within))
        tables[-1][:, 0] *= 2
    fine, coarse, elongated, coarse_elongated = tables
    both = np.unique(np.concatenate([table[:, 3] for table in tables]).astype(int))
    brightness = found.flux[both] / found.area[both]
    taken = np.sort(both[np.argsort(-brightness, kind="stable")[:MOST_IN_A_WINDOW]])
    row = np.full(len(found) + 1, -1)
    row[taken] = np.arange(len(taken))
    for rows in tables:
        rows[:, 3] = row[rows[:, 3].astype(int)]
    x, y = found.x[taken], found.y[taken]
    labels = grown_labels(found.segmentation, _GROWN)
    stamps = cut(pixels.data, pixels.bad, sky, x, y, labels, taken + 1, origin)
    snr, clipped = (sizes(stamps)[1], saturated(stamps, saturation)) if len(taken) else (np.zeros(0), np.zeros(0, bool))
    values = np.where(stamps.replaced | stamps.empty[:, None, None], np.float32(np.nan), stamps.pixels)
    places = np.column_stack([stamps.x, stamps.y])
    return _Candidates(
        fine=fine,
        elongated=elongated,
        coarse=coarse,
        coarse_elongated=coarse_elongated,
        x=x,
        y=y,
        in_stamp=places,
        brightness=np.where(snr > 0, snr, 0)
        + 1e-3 * np.nan_to_num(np.nanmax(values[:, 61:67, 61:67], (1, 2), initial=0)),
        clipped=clipped,
        blended=found.blended[taken],
        values=values,
        window=np.zeros(len(x), int),
    )


def _inside(found: Detections, window: Window) -> np.ndarray:
    """Which detections lie in a window, bool, (N,)."""
    x, y = np.rint(found.x), np.rint(found.y)
    rows, columns = window
    return np.asarray((y >= rows.start) & (y < rows.stop) & (x >= columns.start) & (x < columns.stop))


def _in_blocks(
    pixels: Pixels, sky: Sky, found: Detections, origin: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, Sky, Detections]:
    """Image, mask, sky and detections in blocks of 2 x 2 pixels; positions are in blocks of the window."""

    def mean(values: np.ndarray) -> np.ndarray:
        height, width = (n // 2 * 2 for n in values.shape)
        blocks = values[:height, :width].reshape(height // 2, 2, width // 2, 2)
        return np.asarray(blocks.mean(axis=(1, 3), dtype=np.float32))

    bad = mean(pixels.bad) > 0
    middle = sky.autocorrelation.shape[0] // 2
    near = sky.autocorrelation[middle : middle + 2, middle : middle + 2]
    noise = float(np.sqrt(max(1 + near[0, 1] + near[1, 0] + near[1, 1], 1))) / 2
    level = Sky(mean(sky.level), mean(sky.rms) * np.float32(noise), sky.autocorrelation, sky.map_factor)
    x, y = ((values - first - 0.5) / 2 for values, first in zip((found.x, found.y), origin, strict=True))
    return mean(np.where(pixels.bad, sky.level, pixels.data)), bad, level, replace(found, x=x, y=y)


def _joined(parts: list[_Candidates]) -> _Candidates:
    """The candidates of several windows."""
    firsts = np.cumsum([0, *(len(part.x) for part in parts)])
    shifted = []
    for number, (part, first) in enumerate(zip(parts, firsts, strict=False)):
        tables = {
            name: getattr(part, name) + np.where(getattr(part, name)[:, 3:] >= 0, [0, 0, 0, first], 0)
            for name in ("fine", "elongated", "coarse", "coarse_elongated")
        }
        shifted.append(part._replace(**tables, window=np.full(len(part.x), number)))
    return _Candidates(*(np.concatenate(arrays) for arrays in zip(*shifted, strict=True)))


def _stars(candidates: _Candidates, shape: tuple[int, int]) -> tuple[float, np.ndarray]:
    """Rough FWHM and the numbers of the candidates that are stars; none if there is no stellar locus."""
    every = [
        (np.concatenate([round_, elongated]), least, len(round_))
        for round_, elongated, least in (
            (candidates.fine, candidates.elongated, 0.0),
            (candidates.coarse, candidates.coarse_elongated, BROAD),
        )
    ]
    fwhm, chosen = math.nan, np.zeros(0, int)
    for only_round in (True, False):
        for table, least, n in every:
            locus = _locus(table[:n] if only_round else table, candidates, shape)
            width = float(np.median(table[locus, 0])) if len(locus) else math.nan
            if len(locus) > len(chosen) and width >= least:
                grown = _local_locus(table, locus, candidates, shape)
                fwhm, chosen = width, table[grown, 3].astype(int)
        if len(chosen):
            break
    return fwhm, np.unique(chosen[chosen >= 0])


def _locus(table: np.ndarray, candidates: _Candidates, shape: tuple[int, int]) -> np.ndarray:
    """Rows of the stellar locus of an image; where the PSF varies too much for one, of the loci of its parts."""
    whole = stellar_locus(table)
    row = table[:, 3].astype(int)
    if len(whole) or not (row >= 0).any():
        return whole
    place = _normalised(candidates.x[row], candidates.y[row], shape)
    for parts in _PARTS:
        cell = np.clip(((place + 1) / 2 * parts).astype(int), 0, parts - 1) @ [1, parts]
        cell[row < 0] = -1
        found = []
        for number in range(parts**2):
            inside = np.flatnonzero(cell == number)
            found.append(inside[stellar_locus(table[inside])])
        widths = [float(np.median(table[locus, 0])) for locus in found if len(locus)]
        if len(widths) > parts**2 / 2 and max(widths) < _WIDEST * min(widths):
            return np.sort(np.concatenate(found))
    return whole


def _local_locus(table: np.ndarray, locus: np.ndarray, candidates: _Candidates, shape: tuple[int, int]) -> np.ndarray:
    """The stellar locus where the width of the PSF varies over the image: it grows from the stars that are alike."""
    row = table[:, 3].astype(int)
    if len(locus) < _LOCAL:
        return locus
    place = _normalised(candidates.x[row], candidates.y[row], shape)
    width, light = np.log(table[:, :2]).T
    known = row >= 0
    chosen = locus[known[locus]]
    for degree in (1, 1, 2, 2, 2):
        if len(chosen) < _LOCAL:
            return locus
        every = terms(place[:, 0], place[:, 1], degree)
        fitted = every @ np.linalg.lstsq(every[chosen], width[chosen], rcond=None)[0]
        alike = np.abs(width - fitted) < _SAME_WIDTH
        alike &= np.abs(light - np.median(light[chosen])) < _SAME_LIGHT
        chosen = np.flatnonzero(alike & known)
    return np.union1d(chosen, locus)


def _best(candidates: _Candidates, which: np.ndarray) -> np.ndarray:
    """The brightest stars, evenly from all windows."""
    snr = candidates.brightness[which]
    rank = np.zeros(len(which), int)
    for number in np.unique(candidates.window[which]):
        inside = np.flatnonzero(candidates.window[which] == number)
        rank[inside[np.argsort(-snr[inside], kind="stable")]] = np.arange(len(inside))
    return np.sort(which[np.lexsort((-snr, rank))[:MOST_STARS]])


# --- the result ---------------------------------------------------------------------------------------


def _normalised(x: np.ndarray, y: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Positions from -1 to 1 over the image, float64, (N, 2)."""
    return np.column_stack([2 * (values + 0.5) / n - 1 for values, n in zip((x, y), shape[::-1], strict=True)])


def _result(measured: EffectivePsf, x: np.ndarray, y: np.ndarray, shape: tuple[int, int]) -> ImagePsf:
    """What a catalogue needs of a measured PSF."""
    n = int(measured.used.sum())
    name, source = "the stars of the image", f"{n} stars"
    height, width = shape
    if measured.degree:
        polynomial = Polynomial(
            ((width - 1) / 2, (height - 1) / 2), (width / 2, height / 2), powers(measured.degree), shape
        )
        psf = Psf.varying(measured.images, polynomial, name, measured.oversampling, source=source, error=measured.error)
    else:
        psf = Psf.of(measured.images[0], name, measured.oversampling, source=source, error=measured.error)
    psf = replace(psf, light_error=measured.light_error)
    places = np.linspace(-0.9, 0.9, 5) if measured.degree else np.zeros(1)
    here = [psf.at((1 + u) * width / 2 - 0.5, (1 + v) * height / 2 - 0.5) for v in places for u in places]
    widths = [one.fwhm for one in here]
    return ImagePsf(
        psf,
        x=x[measured.used],
        y=y[measured.used],
        scatter=measured.scatter,
        misfit=measured.misfit,
        narrowest=min(widths),
        widest=max(widths),
        ellipticity=max(one.ellipticity for one in here),
        shape=shape,
    )
