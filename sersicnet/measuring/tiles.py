"""Measure one tile of an image: detect its sources, cut their stamps, predict with the network, and fit."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.spatial import KDTree

from sersicnet import weights
from sersicnet.catalogue.parameters import possible
from sersicnet.engine import forced
from sersicnet.engine.fit import Fits, Status
from sersicnet.engine.render import parameters_of
from sersicnet.errors import InputError, WeightsError
from sersicnet.image import detect, photometry, pixels, stars
from sersicnet.image.carried import Carried
from sersicnet.image.exposure import Exposure
from sersicnet.image.pixels import Pixels, Sky, Window, grown
from sersicnet.image.psf import Psf
from sersicnet.image.resample import MISSING, Resampled
from sersicnet.image.sky import Mesh
from sersicnet.image.stamps import SIGMA, Stamps, cut
from sersicnet.image.views import psf_views
from sersicnet.measuring.fitting import Fitters, correlations_of, known_galaxies
from sersicnet.output import Report, silent
from sersicnet.schema import (
    CROWDED_LIMIT,
    EDGE_LIMIT,
    LOW_SNR_LIMIT,
    MASKED_LIMIT,
    STAMP_SIZE,
    TARGET_NAMES,
    Flag,
    Inputs,
    absolute_magnitude_of_rms,
    noise_numbers,
)

STAMPS_AT_ONCE = 512
"""Number of stamps that the network is given at once: 32 MB."""

DETECTOR = detect.Detector()
"""The detection, the same for every image that is measured; with several bands, that of the detection image."""

MOST_NEIGHBOURS = 3
"""Maximum number of overlapping neighbours that are fitted simultaneously with a galaxy; others are masked."""

NEIGHBOUR_FLUX = 0.1
"""Minimum flux of a neighbour that is fitted simultaneously, as a fraction of the galaxy's flux."""

MOST_FLUX_ERROR = 3.0
"""A fit whose flux has a larger error than this many times the flux has found nothing: it has not converged."""

MOST_FAINTER = 5.0
"""A start more than this many magnitudes fainter than the detected source at its position is not used."""

_NEIGHBOUR_REACH = round(0.7 * STAMP_SIZE) + 2
"""Maximum distance of a neighbour that is fitted simultaneously with a galaxy, pixels."""

_STAMP_REACH = STAMP_SIZE // 2 + 4
"""Margin around a position that its stamp, and the dilated sources in it, depend on, pixels."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Setting:
    """Everything besides its window that the measurement of a tile depends on.

    Attributes
    ----------
    exposure : Exposure or Resampled
    zero_point : float
    mesh : Mesh
    detector : Detector or Carried
    places : ndarray, float64, (N, 2) or None
        Positions to measure; None to measure the detected sources.
    starts : dict
        Start parameters of the fits at the positions, by name.
    fix : tuple of str
        What keeps its start values, see `sersicnet.measuring.fitting.FIXABLE`.
    forced : bool
        Whether only fluxes are measured.
    network : (Path, str, str) or None
        Weights directory, the required SHA-256 of its network, and the device; None for fits without a network.
    fitters : Fitters or None
    psf : Psf or None
        In the pixels of the exposure, for a network that is shown it.
    gain : float or None
        Electrons per image unit, for a network that is shown the photon noise.
    psf_width : float
        FWHM of the PSF, which moments are corrected for, pixels.
    profiles : bool
        Whether to collect the profiles of sources that the width of the image's PSF is measured from.
    saturation : float
        Saturation level: a pixel at or above it is saturated.
    threads : int
        Number of threads of the fits.
    """

    exposure: Exposure | Resampled
    zero_point: float
    mesh: Mesh
    detector: detect.Detector | Carried = DETECTOR
    places: np.ndarray | None
    starts: Mapping[str, np.ndarray] = field(default_factory=dict)
    fix: tuple[str, ...] = ()
    forced: bool = False
    network: tuple[Path, str, str] | None = None
    fitters: Fitters | None
    psf: Psf | None = None
    gain: float | None = None
    psf_width: float = 0.0
    profiles: bool = False
    saturation: float
    threads: int


def cores(shape: tuple[int, int], tile: int) -> list[Window]:
    """Windows of the tiles of an image, row by row: about equally large, without overlap."""
    if tile < STAMP_SIZE:
        raise InputError(f"A tile has at least {STAMP_SIZE} pixels per side; received {tile}.")
    edges = [np.linspace(0, n, max(1, round(n / tile)) + 1).round().astype(int).tolist() for n in shape]
    return [(slice(*rows), slice(*columns)) for rows in pairwise(edges[0]) for columns in pairwise(edges[1])]


def measure_tile(setting: Setting, core: Window, report: Report = silent) -> dict[str, np.ndarray]:
    """Measure the positions or detected sources of a tile.

    Parameters
    ----------
    setting : Setting
    core : Window
        The tile.
    report : callable
        Receives the stage, the number of sources done and their total number.

    Returns
    -------
    dict
        The fields of `Values`, and ``profiles``, ndarray, float64, (M, 4); see `sersicnet.image.stars.profiles`.
    """
    try:
        report("detecting", 0, 0)
        scene, own = _Scene.of(setting, core)
        values = Values.empty(scene, own)
        of_psf = np.zeros_like(values.errors)
        if setting.network is not None:
            of_psf = _predict(scene, values, _network(*setting.network), report)
        else:
            _start(scene, values)
        if setting.fitters is not None and setting.forced:
            _measure_fluxes(scene, values, own, setting.fitters, report)
        elif setting.fitters is not None:
            _fit(scene, values, own, setting.fitters, of_psf, report, keep=setting.network is None)
        values.flags[_at_edge(scene, values)] |= Flag.EDGE
        profiles = np.zeros((0, 4))
        if setting.profiles:
            mine = _inside(scene.found.x, scene.found.y, core, setting.exposure.shape)
            profiles = _profiles(scene, values, mine)
        return {**{name: array[own] for name, array in values._asdict().items()}, "profiles": profiles}
    finally:
        setting.exposure.close()


class _Scene(NamedTuple):
    """A tile with its detected sources, and the places to measure; all positions are in pixels of the image."""

    setting: Setting
    zone: Window  # within it, the detected sources do not depend on the tile
    window: Window
    pixels: Pixels
    sky: Sky
    found: detect.Detections
    x: np.ndarray
    y: np.ndarray
    source: np.ndarray  # index of the detection at each place, -1 for none
    place: np.ndarray  # index of the place among the user's positions, -1 for a detection

    @classmethod
    def of(cls, setting: Setting, core: Window) -> tuple[_Scene, np.ndarray]:
        """The scene of a tile, and whether each of its places belongs to the tile itself, bool, (N,)."""
        shape = setting.exposure.shape
        near = grown(core, 0 if setting.fitters is None else _NEIGHBOUR_REACH, shape)
        zone = grown(near, _STAMP_REACH, shape)
        if setting.places is not None:
            place = np.flatnonzero(_inside(setting.places[:, 0], setting.places[:, 1], near, shape))
            if not len(place):
                zone = slice(0, 0), slice(0, 0)
        window, pixels, sky, found = setting.detector.around(setting.exposure, setting.mesh, zone)
        if setting.places is None:
            chosen = np.flatnonzero(_inside(found.x, found.y, near, shape))
            x, y, source, place = found.x[chosen], found.y[chosen], chosen, np.full(len(chosen), -1)
        else:
            x, y = setting.places[place].T
            if isinstance(setting.detector, Carried):
                source = setting.detector.source_at(found, x, y)
            else:
                source = _source_at(found.segmentation, x - window[1].start, y - window[0].start)
        scene = cls(setting, zone, window, pixels, sky, found, x.copy(), y.copy(), source, place)
        return scene, _inside(x, y, core, shape)

    @property
    def origin(self) -> tuple[int, int]:
        """Column and row of the first pixel of the window."""
        return self.window[1].start, self.window[0].start

    def of_source(self, values: np.ndarray) -> np.ndarray:
        """Values of the detection at each place, NaN without a detection."""
        detected = self.source >= 0
        if not len(values):
            return np.full(len(self.x), np.nan)
        return np.where(detected, values[np.where(detected, self.source, 0)], np.nan)


def _inside(x: np.ndarray, y: np.ndarray, window: Window, shape: tuple[int, int]) -> np.ndarray:
    """Whether positions belong to a window, bool, (N,).

    A position outside the image belongs to the nearest window, NaN to the first window.
    """
    out = np.ones(len(x), bool)
    for values, part, n in ((x, window[1], shape[1]), (y, window[0], shape[0])):
        nearest = np.clip(np.rint(np.nan_to_num(values, nan=0.0)), 0, n - 1)
        out &= (nearest >= part.start) & (nearest < part.stop)
    return out


def _source_at(segmentation: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Index of the detection at each position, -1 for none."""
    inside = np.isfinite(x) & np.isfinite(y)
    column, row = (
        np.rint(np.clip(np.where(inside, values, -1), -1, n)).astype(int)  # absurd positions are no whole numbers
        for values, n in zip((x, y), segmentation.shape[::-1], strict=True)
    )
    inside &= (column >= 0) & (column < segmentation.shape[1]) & (row >= 0) & (row < segmentation.shape[0])
    out = np.full(len(x), -1)
    out[inside] = segmentation[row[inside], column[inside]] - 1
    return out


DETECTED = ("a", "b", "area", "parent_x", "parent_y", *photometry.Photometry._fields)
"""Quantities of a detection in the catalogue; the parent is the brightest source of the same connected region."""


def _detected(scene: _Scene, own: np.ndarray) -> np.ndarray:
    """`DETECTED` of each place, float64, (N, 10); NaN without a detection and for places of other tiles.

    `Values.note` adds the flux in the circle at places without a detection.
    """
    found, source, setting = scene.found, scene.source, scene.setting
    out = np.full((len(scene.x), len(DETECTED)), np.nan)
    rows = np.flatnonzero(own & (source >= 0))
    if not len(rows):
        return out
    which, back = np.unique(source[rows], return_inverse=True)
    light = np.column_stack(found.photometry(which))
    # Photometry in an aperture that extends beyond the zone would depend on the tile: it is repeated in a larger zone.
    half = (photometry.KRON_REACH * found.a[which]).astype(int) + 2
    leaves = np.zeros(len(which), bool)
    for place, part, n in zip((found.y[which], found.x[which]), scene.zone, setting.exposure.shape, strict=True):
        leaves |= (place - half < part.start) & (part.start > 0)
        leaves |= (place + half > part.stop - 1) & (part.stop < n)
    far = ~(photometry.reach(found.a[which], light[:, 0]) < _STAMP_REACH)
    for k in np.flatnonzero(far & leaves):
        x, y = found.x[which[k]], found.y[which[k]]
        middle = slice(round(y), round(y) + 1), slice(round(x), round(x) + 1)
        around = grown(middle, int(half[k]), setting.exposure.shape)
        near = setting.detector.around(setting.exposure, setting.mesh, around).detections
        same = np.flatnonzero((near.x == x) & (near.y == y))
        light[k] = np.ravel(near.photometry(same)) if len(same) else np.nan
    parent = found.parent[which]
    shape = found.a[which], found.b[which], found.area[which], found.x[parent], found.y[parent]
    out[rows] = np.column_stack([*shape, light])[back]
    return out


class Values(NamedTuple):
    """Measured values of each place; magnitudes are AB."""

    place: np.ndarray  # index of the place among the user's positions, -1 for a detection
    x0: np.ndarray  # position of the detection or the place, which a fit does not change
    y0: np.ndarray
    x: np.ndarray  # position of the detection or the place, or the fitted one
    y: np.ndarray
    position: np.ndarray  # covariance of a fitted x and y, (N, 3): xx, yy and xy; NaN without a fit
    targets: np.ndarray
    errors: np.ndarray
    flux: np.ndarray  # fitted, image units; NaN without a fit
    flux_err: np.ndarray
    correlations: np.ndarray  # of the errors, (N, 6), as in `sersicnet.weights.Prediction`
    theta: np.ndarray
    theta_err: np.ndarray
    sky: np.ndarray
    chi2: np.ndarray
    status: np.ndarray
    rms: np.ndarray
    snr: np.ndarray
    size: np.ndarray  # sigma of the best Gaussian match, pixels; NaN if it is unreliable
    size_snr: np.ndarray
    flags: np.ndarray
    offset: np.ndarray  # of the light from a position of another image, x and y; NaN otherwise
    detected: np.ndarray  # the quantities of `DETECTED`

    @classmethod
    def empty(cls, scene: _Scene, own: np.ndarray) -> Values:
        """Values from the detections; aperture photometry is measured only for the places of the tile itself."""
        n = len(scene.x)
        signal = scene.of_source(scene.found.flux) / np.sqrt(scene.of_source(scene.found.area))
        unknown = ("flux", "flux_err", "theta_err", "sky", "chi2", "rms", "size", "size_snr")
        tables = {"targets": len(TARGET_NAMES), "errors": len(TARGET_NAMES), "correlations": len(weights.PAIRS[0])}
        tables |= {"position": 3, "offset": 2}
        out = cls(
            place=scene.place,
            x0=scene.x.copy(),
            y0=scene.y.copy(),
            x=scene.x.copy(),
            y=scene.y.copy(),
            theta=scene.of_source(scene.found.theta),
            status=np.full(n, -1),
            snr=signal / scene.sky.correlation,
            flags=np.zeros(n, int),
            detected=_detected(scene, own),
            **{name: np.full(n, np.nan) for name in unknown},
            **{name: np.full((n, width), np.nan) for name, width in tables.items()},
        )
        out.flags[scene.of_source(scene.found.blended.astype(float)) == 1] |= Flag.BLENDED
        return out

    def note(self, scene: _Scene, rows: slice, stamps: Stamps) -> None:
        """Set the noise, sizes, S/N and flags that are measured on stamps, in place."""
        flags = self.flags[rows]
        self.rms[rows] = stamps.rms
        self.size[rows], self.size_snr[rows], _ = stars.sizes(stamps)
        flags |= Flag.SATURATED * stars.saturated(stamps, scene.setting.saturation)
        self.snr[rows] /= stamps.rms
        if isinstance(scene.setting.detector, Carried) or "position" in scene.setting.fix:
            self.offset[rows] = stamps.offsets()
        flags |= Flag.NO_DATA * stamps.empty
        if stamps.unusable.any():
            found = scene.found
            a, b, theta = (scene.of_source(axis)[rows] for axis in (found.a, found.b, found.theta))
            unknown = ~np.isfinite(a + b + theta)
            a[unknown], b[unknown], theta[unknown] = photometry.APERTURE, photometry.APERTURE, 0
            flags |= Flag.MASKED * (stamps.masked_light(a, b, theta) > MASKED_LIMIT)
        unseen = np.flatnonzero(scene.source[rows] < 0)
        self.detected[rows.start + unseen, -2:] = stamps.aperture(unseen) * [1, scene.sky.correlation]
        flags |= Flag.CROWDED * (stamps.neighbours > CROWDED_LIMIT)
        with np.errstate(invalid="ignore"):
            flags |= Flag.LOW_SNR * ~(self.snr[rows] >= LOW_SNR_LIMIT)

    def parameters(self, zero_point: float) -> np.ndarray:
        """Parameters of `sersicnet.engine.render.Renderer`, in pixels of the image, (N, 7)."""
        columns = {"x": self.x, "y": self.y, "theta": self.theta}
        out = parameters_of(columns | dict(zip(TARGET_NAMES, self.targets.T, strict=True)), zero_point)
        out[:, 2] = np.where(np.isfinite(self.flux), self.flux, out[:, 2])  # a negative one has no magnitude
        return out


def _at_edge(scene: _Scene, values: Values) -> np.ndarray:
    """Places that lose light at the border of the image, bool, (N,).

    The ellipse of the effective radius reaches the border (without a detection, also the aperture), or the
    detected pixels do and the light beyond them, estimated from the row or column of pixels along the border
    and the scale length of an exponential disc, is more than `EDGE_LIMIT` of the source's.
    """
    exposure, segmentation = scene.setting.exposure, scene.found.segmentation
    image = exposure.exposure if isinstance(exposure, Resampled) else exposure
    shape = [int(n * exposure.factor + MISSING) for n in image.shape]  # the last pixel of a finer grid may be a part
    beyond, found = np.zeros(len(scene.found) + 1), scene.found
    for axis, (part, n) in enumerate(zip(scene.window, shape, strict=True)):
        for outer in (slice(0, 1 - part.start), slice(n - 1 - part.start, None)):
            if outer.stop is not None and outer.stop <= 0:
                continue
            label, data, level = (
                np.moveaxis(values, axis, 0)[outer] for values in (segmentation, scene.pixels.data, scene.sky.level)
            )
            there = (label > 0) & np.isfinite(data)
            beyond += np.bincount(label[there], (data - level)[there], len(beyond))
    lost = beyond[1:] * found.a / SIGMA
    out = scene.of_source((lost > EDGE_LIMIT * (found.flux + lost)).astype(float)) == 1
    radius = np.fmax(values.targets[:, 1], np.where(scene.source >= 0, 0, photometry.APERTURE))
    q = np.where(scene.source >= 0, 1 - values.targets[:, 3], 1.0)
    angle = np.radians(np.where(scene.source >= 0, values.theta, 0.0))
    with np.errstate(invalid="ignore"):
        reach = (
            radius * np.hypot(q * np.cos(angle), np.sin(angle)),
            radius * np.hypot(np.cos(angle), q * np.sin(angle)),
        )
        for place, far, n in zip((values.y, values.x), reach, shape, strict=True):
            far = np.nan_to_num(far, nan=0.0)
            out |= (place - far < -0.5) | (place + far > n - 0.5)
    return out


def _stamps(scene: _Scene, labels: np.ndarray, which: np.ndarray | None = None) -> Iterator[tuple[slice, Stamps]]:
    """Stamps of all places or of `which`, in batches; `labels` as for `sersicnet.image.stamps.cut`."""
    which = np.arange(len(scene.x)) if which is None else which
    dilated, n = scene.found.dilated(), len(which)
    for first in range(0, n, STAMPS_AT_ONCE):
        rows = slice(first, min(first + STAMPS_AT_ONCE, n))
        x, y = scene.x[which[rows]], scene.y[which[rows]]
        data, bad, _ = scene.pixels
        yield rows, cut(data, bad, scene.sky, x, y, dilated, labels[which[rows]], scene.origin)


def _predict(scene: _Scene, values: Values, network: weights.Weights, report: Report) -> np.ndarray:
    """Cut the stamps, and predict the targets with the network; returns what the PSF adds to the errors, (N, 4)."""
    n = len(scene.x)
    of_psf = np.zeros_like(values.errors)
    report("measuring", 0, n)
    for rows, stamps in _stamps(scene, scene.source + 1):
        stamps.pixels[stamps.empty] = np.nan
        found, of_psf[rows] = _predicted(scene, stamps, scene.x[rows], scene.y[rows], network)
        values.targets[rows] = found.targets
        if found.errors is not None:
            values.errors[rows] = found.errors
        if found.correlations is not None:
            values.correlations[rows] = found.correlations
        if found.theta is not None:
            values.theta[rows], values.theta_err[rows] = found.theta, found.theta_err
        values.note(scene, rows, stamps)
        values.targets[rows, 0] += absolute_magnitude_of_rms(scene.setting.zero_point, stamps.rms)
        report("measuring", rows.stop, n)
    return of_psf


LEAST_PSF_ERROR = 0.01
"""A PSF whose FWHM is known better than this counts as known."""


def _predicted(
    scene: _Scene, stamps: Stamps, x: np.ndarray, y: np.ndarray, network: weights.Weights
) -> tuple[weights.Prediction, np.ndarray | float]:
    """What the network answers, and the part of its errors that is due to the PSF, (N, 4) or 0.

    That part is from answers through a narrower and a wider PSF.
    """
    setting, psf = scene.setting, scene.setting.psf
    if psf is None:
        return network.predict(Inputs(stamps.pixels)), 0.0
    correlation = pixels.correlation(setting.mesh.autocorrelation)
    noise = noise_numbers(correlation, (np.nan if setting.gain is None else setting.gain) * stamps.rms)
    labels, psfs = psf.cells(x, y)

    def answer(stretch: float) -> weights.Prediction:
        views = np.array([_views(one, stretch) for one in psfs])
        # One for all is looked at once; of a varying PSF, the last bits must not depend on the cells of a tile.
        return network.predict(Inputs(stamps.pixels, views[labels] if psf.varies else views, noise))

    found = answer(1.0)
    if psf.error < LEAST_PSF_ERROR or found.errors is None:
        return found, 0.0
    narrower, wider = (answer(1 + sign * psf.error).targets for sign in (-1, 1))
    of_psf = (wider - narrower) / 2
    return found.with_error(of_psf), of_psf


@functools.lru_cache(256)
def _views(psf: Psf, stretch: float) -> np.ndarray:
    """What a network is shown of a constant PSF, made wider by a factor."""
    return psf_views(psf.image, psf.oversampling / stretch)


def _start(scene: _Scene, values: Values) -> None:
    """Set the start parameters of the fits: from the user's table, and otherwise from moments."""
    moments = _moments(scene.found, scene.setting.psf_width)
    flux, r_eff, n, q = (scene.of_source(moments[:, k]) for k in (2, 3, 4, 5))
    with np.errstate(invalid="ignore", divide="ignore"):
        mag = scene.setting.zero_point - 2.5 * np.log10(flux)
    guesses = {"mag": mag, "r_eff_pix": r_eff, "sersic_n": n, "ellipticity": 1 - q, "theta": values.theta}
    for name, column in scene.setting.starts.items():
        given = column[scene.place]
        known = np.isfinite(given) if name == "theta" else possible(name, given)
        if name == "mag":  # a model that is invisible beside the detected source would stay so
            with np.errstate(invalid="ignore"):
                known &= ~(given > guesses[name] + MOST_FAINTER)
        guesses[name] = np.where(known, given, guesses[name])
    for name, usual in (("sersic_n", 1.5), ("ellipticity", 0.3)):
        guesses[name] = np.where(np.isfinite(guesses[name]), guesses[name], usual)
    if scene.setting.fix:
        table = known_galaxies(scene.setting.places, scene.setting.starts)[scene.place]
        kept = {"r_eff_pix": table[:, 3], "sersic_n": table[:, 4], "ellipticity": 1 - table[:, 5], "theta": table[:, 6]}
        guesses |= {name: column for name, column in kept.items() if name.removesuffix("_pix") in scene.setting.fix}
    for k, name in enumerate(TARGET_NAMES):
        values.targets[:, k] = guesses[name]
    values.theta[:] = guesses["theta"]
    for rows, stamps in _stamps(scene, scene.source + 1):
        values.note(scene, rows, stamps)
    values.targets[values.flags & Flag.NO_DATA != 0] = np.nan


def _moments(found: detect.Detections, psf_width: float) -> np.ndarray:
    """Rough parameters of all detections, (D, 7); the width of the PSF is subtracted in quadrature."""
    a, b = (np.sqrt(np.maximum(axis**2 - (psf_width / 2.355) ** 2, 0.25)) for axis in (found.a, found.b))
    index = np.full(len(found), 1.5)
    return np.column_stack([found.x, found.y, 1.2 * found.flux, 1.2 * a, index, np.clip(b / a, 0.1, 0.95), found.theta])


def _profiles(scene: _Scene, values: Values, which: np.ndarray) -> np.ndarray:
    """The `sersicnet.image.stars.profiles` of detections, with their size in place of their number."""
    (data, bad, _), found = scene.pixels, scene.found
    out = stars.profiles(data, bad, scene.sky, found, which, scene.origin)
    source = out[:, 3].astype(int)
    if scene.setting.places is None:  # the sizes of the detections are already measured
        size = np.full(len(found), np.nan)
        size[scene.source] = values.size
        out[:, 3] = size[source]
        return out
    dilated = found.dilated()
    for first in range(0, len(out), STAMPS_AT_ONCE):
        part = slice(first, first + STAMPS_AT_ONCE)
        i = source[part]
        stamps = cut(data, bad, scene.sky, found.x[i], found.y[i], dilated, i + 1, scene.origin)
        out[part, 3] = stars.sizes(stamps)[0]
    return out


@functools.lru_cache(1)
def _network(path: Path, sha256: str, device: str) -> weights.Weights:
    """The network, loaded once per process; weights that were trained again have another SHA-256."""
    network = weights.load(path)
    if network.sha256 != sha256:
        raise WeightsError(f"{path} was replaced during the run. Repeat the command.")
    return replace(network, device=device)


def _overlapping(scene: _Scene) -> list[np.ndarray]:
    """Indices of the detections that are fitted simultaneously with each place: bright, touching neighbours.

    Two sources touch if the circles with the areas of their detected pixels touch. Of the touching
    neighbours with more than a tenth of the galaxy's flux, those with the most light at the galaxy are taken.
    """
    found, none = scene.found, np.zeros(0, int)
    if not len(found):
        return [none] * len(scene.x)
    reach = np.sqrt(found.area / np.pi)
    tree = KDTree(np.column_stack([found.x, found.y]))
    out = []
    for source in scene.source:
        if source < 0:
            out.append(none)
            continue
        near = np.array(tree.query_ball_point((found.x[source], found.y[source]), 0.7 * STAMP_SIZE), int)
        near = near[near != source]
        distance = np.hypot(found.x[near] - found.x[source], found.y[near] - found.y[source])
        touching = (distance < reach[near] + reach[source] + 2) & (
            found.flux[near] > NEIGHBOUR_FLUX * found.flux[source]
        )
        near, distance = near[touching], distance[touching]
        out.append(near[np.argsort(-found.flux[near] / distance**2)][:MOST_NEIGHBOURS])
    return out


def _measure_fluxes(scene: _Scene, values: Values, own: np.ndarray, fitters: Fitters, report: Report) -> None:
    """Measure the fluxes of the table's galaxies in the tile itself; sources that are not in the table are masked."""
    setting = scene.setting
    listed = known_galaxies(setting.places, setting.starts)
    values.targets[:, 0] = np.nan
    values.flags[own] |= Flag.NOT_REFINED
    values.status[own] = Status.NO_DATA
    mine = np.flatnonzero(own & np.isfinite(scene.x + scene.y) & (values.flags & Flag.NO_DATA == 0))
    near = forced.neighbours(listed, scene.place[mine], _NEIGHBOUR_REACH)
    labels = np.zeros((len(scene.x), 1 + max((len(others) for others in near), default=0)), int)
    for i, others in zip(mine, near, strict=True):
        x, y = listed[others, :2].T
        sources = _source_at(scene.found.segmentation, x - scene.origin[0], y - scene.origin[1])
        labels[i, : 1 + len(others)] = scene.source[i] + 1, *(sources + 1)
    report("measuring fluxes", 0, len(mine))
    for part, stamps in _stamps(scene, labels, mine):
        rows = mine[part]
        to_stamp = np.zeros((len(rows), 7))
        to_stamp[:, 0], to_stamp[:, 1] = stamps.x - scene.x[rows], stamps.y - scene.y[rows]
        for group, fitter in fitters.groups(scene.x[rows], scene.y[rows]):
            here = rows[group]
            found = forced.fluxes(
                fitter,
                stamps.pixels[group] * stamps.rms[group, None, None].astype(np.float32),
                stamps.noise[group],
                listed[scene.place[here]] + to_stamp[group],
                stamps.replaced[group],
                [listed[near[part.start + k]] + to_stamp[k] for k in group],
                workers=setting.threads,
            )
            values.status[here] = found.status
            good = found.status == Status.CONVERGED
            at = here[good]
            values.flags[at] &= ~Flag.NOT_REFINED
            values.sky[at], values.chi2[at] = found.sky[good], found.chi2[good]
            # A reduced chi-square above 1 is treated as an underestimated noise: the errors are scaled up.
            flux, error = found.flux[good], found.error[good] * np.sqrt(np.maximum(found.chi2[good], 1))
            values.flux[at], values.flux_err[at] = flux, error
            positive = flux > 0
            values.targets[at, 0] = setting.zero_point - 2.5 * np.log10(np.where(positive, flux, np.nan))
            values.errors[at, 0] = np.where(positive, 2.5 / np.log(10) * error / np.where(positive, flux, 1), np.nan)
        report("measuring fluxes", part.stop, len(mine))


def _fit(
    scene: _Scene, values: Values, own: np.ndarray, fitters: Fitters, of_psf: np.ndarray, report: Report, *, keep: bool
) -> None:
    """Fit Sersic profiles at the places of the tile itself; `keep` decides whether unconverged fits replace values.

    `of_psf` is what the PSF adds to the errors of each place, as the network has it.
    """
    zero_point = scene.setting.zero_point
    parameters = values.parameters(zero_point)
    starts = _moments(scene.found, scene.setting.psf_width)
    known = (scene.source >= 0) & np.isfinite(parameters).all(axis=1)
    starts[scene.source[known]] = parameters[known]
    neighbours = _overlapping(scene)
    labels = np.zeros((len(parameters), 1 + MOST_NEIGHBOURS), int)
    for row, source, near in zip(labels, scene.source, neighbours, strict=True):
        row[: 1 + len(near)] = source + 1, *(near + 1)
    others = _neighbours(scene, neighbours, starts, parameters)
    mine = np.flatnonzero(own)
    n = len(mine)
    report("fitting", 0, n)
    for part, stamps in _stamps(scene, labels, mine):
        rows = mine[part]
        to_stamp = np.zeros((len(rows), 7))
        to_stamp[:, 0], to_stamp[:, 1] = stamps.x - scene.x[rows], stamps.y - scene.y[rows]
        stamps.replaced[stamps.empty] = True
        first = part.start
        for group, fitter in fitters.groups(scene.x[rows], scene.y[rows]):
            shifts, here = to_stamp[group], rows[group]
            fits = fitter(
                stamps.pixels[group] * stamps.rms[group, None, None].astype(np.float32),
                stamps.noise[group],
                parameters[here] + shifts,
                stamps.replaced[group],
                [others[row][0] + shift for row, shift in zip(here, shifts, strict=True)],
                [others[row][1] for row in here],
                workers=scene.setting.threads,
                report=lambda done, first=first: report("fitting", first + done, n),  # type: ignore[misc]
            )
            _take(values, here, fits, shifts, zero_point, of_psf[here], keep=keep)
            first += len(group)


def _neighbours(
    scene: _Scene, near: list[np.ndarray], starts: np.ndarray, parameters: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Start parameters of the neighbours of each place, and whether they are of the user's table.

    Where something is fixed, each place of the table on a neighbour, or on the same detection, is a neighbour of its
    own; otherwise a neighbour is a detection.
    """
    if not scene.setting.fix:
        return [(starts[found], np.zeros(len(found), bool)) for found in near]
    usable = np.isfinite(parameters).all(axis=1)
    places = [np.flatnonzero(usable & (scene.source == k)) for k in range(len(scene.found))]
    out = []
    for row, found in enumerate(near):
        own = [] if scene.source[row] < 0 else [scene.source[row]]
        listed = [k for source in (*own, *found) for k in places[source] if k != row]
        rest = [source for source in found if not len(places[source])]
        rows = np.vstack([parameters[listed].reshape(-1, 7), starts[rest].reshape(-1, 7)])
        out.append((rows, np.arange(len(rows)) < len(listed)))
    return out


def _take(
    values: Values, rows: np.ndarray, fits: Fits, to_stamp: np.ndarray, zero: float, of_psf: np.ndarray, *, keep: bool
) -> None:
    """Write the results of fits into their rows of `values`; `of_psf` is what the PSF adds to their errors.

    Errors of fixed parameters are NaN.
    """
    # A reduced chi-square above 1 is treated as an underestimated noise: the errors are scaled up.
    worse = np.sqrt(np.maximum(fits.chi2, 1))[:, None]
    with np.errstate(invalid="ignore"):
        errors = np.sqrt(np.diagonal(fits.covariance, axis1=1, axis2=2)) * worse
        seen = errors[:, 2] < MOST_FLUX_ERROR * fits.parameters[:, 2]
    good = (fits.status == Status.CONVERGED) & np.isfinite(errors).all(axis=1) & seen
    values.status[rows] = np.where(good | (fits.status != Status.CONVERGED), fits.status, Status.NOT_CONVERGED)
    values.flags[rows[~good]] |= Flag.NOT_REFINED
    taken = np.isfinite(fits.parameters).all(axis=1) if keep else good
    if keep:
        values.targets[rows[~taken]] = np.nan
    at = rows[taken]
    x, y, flux, r_eff, n, q, theta = (fits.parameters - to_stamp)[taken].T
    errors = errors[taken]
    errors[errors == 0] = np.nan
    values.flux[at], values.flux_err[at] = flux, errors[:, 2]
    place = (fits.covariance * worse[:, :, None] ** 2)[taken][:, [0, 1, 0], [0, 1, 1]]
    values.position[at] = np.where(errors[:, [0, 1, 0]] > 0, place, np.nan)
    values.x[at], values.y[at], values.theta[at] = x, y, theta
    values.targets[at] = np.column_stack([zero - 2.5 * np.log10(flux), r_eff, n, 1 - q])
    of_noise = np.column_stack([2.5 / np.log(10) * errors[:, 2] / flux, *errors[:, 3:6].T])
    found = weights.Prediction(values.targets[at], of_noise, correlations_of(fits.covariance[taken, 2:6, 2:6]))
    with np.errstate(invalid="ignore"):  # errors of a failed fit may be infinite
        found = found.with_error(of_psf[taken])
    values.errors[at], values.correlations[at] = found.errors, found.correlations
    values.theta_err[at] = np.minimum(errors[:, 6], weights.UNKNOWN_ANGLE)
    values.sky[at], values.chi2[at] = fits.sky[taken], fits.chi2[taken]
