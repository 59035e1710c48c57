"""A tile of an image with its detected sources, the places to measure in it, and what is measured of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.spatial import KDTree

from sersicnet import weights
from sersicnet.engine.render import parameters_of
from sersicnet.image import detect, photometry, stars
from sersicnet.image.carried import Carried
from sersicnet.image.exposure import Exposure
from sersicnet.image.pixels import Pixels, Sky, Window, grown
from sersicnet.image.psf import Psf
from sersicnet.image.resample import MISSING, Resampled
from sersicnet.image.sky import Mesh
from sersicnet.image.stamps import SIGMA, Stamps, cut
from sersicnet.measuring import neighbours
from sersicnet.measuring.fitting import Fitters
from sersicnet.schema import (
    CROWDED_LIMIT,
    EDGE_LIMIT,
    LOW_SNR_LIMIT,
    MASKED_LIMIT,
    STAMP_SIZE,
    TARGET_NAMES,
    Flag,
)

STAMPS_AT_ONCE = 512
"""Number of stamps that the network is given at once: 32 MB."""


DETECTOR = detect.Detector()
"""The detection, the same for every image that is measured; with several bands, that of the detection image."""


NEIGHBOUR_REACH = round(0.7 * STAMP_SIZE) + 2
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

    @property
    def second_look(self) -> bool:
        """Whether galaxies are measured again without the light of their neighbours, which needs the PSF."""
        return self.network is not None and self.psf is not None

    @property
    def reach(self) -> int:
        """Distance from the tile within which sources are measured for the sake of those in it, pixels."""
        if self.fitters is not None:
            return NEIGHBOUR_REACH
        return neighbours.REACH if self.second_look else 0


class Scene(NamedTuple):
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
    def of(cls, setting: Setting, core: Window) -> tuple[Scene, np.ndarray]:
        """The scene of a tile, and whether each of its places belongs to the tile itself, bool, (N,)."""
        shape = setting.exposure.shape
        near = grown(core, setting.reach, shape)
        zone = grown(near, _STAMP_REACH, shape)
        x, y, source, place = np.zeros(0), np.zeros(0), np.zeros(0, int), np.zeros(0, int)
        if setting.places is not None:
            place = np.flatnonzero(inside(setting.places[:, 0], setting.places[:, 1], near, shape))
            x, y = setting.places[place].T
            if not len(place):
                zone = slice(0, 0), slice(0, 0)
        window, pixels, sky, found = setting.detector.around(setting.exposure, setting.mesh, zone)
        chosen = np.flatnonzero(inside(found.x, found.y, near, shape))
        if setting.places is not None:
            if isinstance(setting.detector, Carried):
                source = setting.detector.source_at(found, x, y)
            else:
                source = source_at(found.segmentation, x - window[1].start, y - window[0].start)
            chosen = chosen[setting.second_look & _neighbouring(found.x[chosen], found.y[chosen], x, y)]
            chosen = np.setdiff1d(chosen, source)
        own = inside(np.append(x, found.x[chosen]), np.append(y, found.y[chosen]), core, shape)
        own[len(place) :] &= setting.places is None
        x, y = np.append(x, found.x[chosen]), np.append(y, found.y[chosen])
        source, place = np.append(source, chosen), np.append(place, np.full(len(chosen), -1))
        return cls(setting, zone, window, pixels, sky, found, x, y, source, place), own

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


def _neighbouring(x: np.ndarray, y: np.ndarray, of_x: np.ndarray, of_y: np.ndarray) -> np.ndarray:
    """Whether positions are near enough to others, which may be NaN, to be their neighbours, bool, (N,)."""
    known = np.isfinite(of_x) & np.isfinite(of_y)
    if not known.any():
        return np.zeros(len(x), bool)
    tree = KDTree(np.column_stack([of_x[known], of_y[known]]))
    return np.asarray(tree.query(np.column_stack([x, y]), p=np.inf)[0] <= neighbours.REACH)


def inside(x: np.ndarray, y: np.ndarray, window: Window, shape: tuple[int, int]) -> np.ndarray:
    """Whether positions belong to a window, bool, (N,).

    A position outside the image belongs to the nearest window, NaN to the first window.
    """
    out = np.ones(len(x), bool)
    for values, part, n in ((x, window[1], shape[1]), (y, window[0], shape[0])):
        nearest = np.clip(np.rint(np.nan_to_num(values, nan=0.0)), 0, n - 1)
        out &= (nearest >= part.start) & (nearest < part.stop)
    return out


def source_at(segmentation: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
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


def _detected(scene: Scene, own: np.ndarray) -> np.ndarray:
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
    def empty(cls, scene: Scene, own: np.ndarray) -> Values:
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

    def note(self, scene: Scene, rows: slice, stamps: Stamps) -> None:
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


def at_edge(scene: Scene, values: Values) -> np.ndarray:
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


def stamps_of(scene: Scene, labels: np.ndarray, which: np.ndarray | None = None) -> Iterator[tuple[slice, Stamps]]:
    """Stamps of all places or of `which`, in batches; `labels` as for `sersicnet.image.stamps.cut`."""
    which = np.arange(len(scene.x)) if which is None else which
    dilated, n = scene.found.dilated(), len(which)
    for first in range(0, n, STAMPS_AT_ONCE):
        rows = slice(first, min(first + STAMPS_AT_ONCE, n))
        x, y = scene.x[which[rows]], scene.y[which[rows]]
        data, bad, _ = scene.pixels
        yield rows, cut(data, bad, scene.sky, x, y, dilated, labels[which[rows]], scene.origin)
