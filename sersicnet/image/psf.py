"""The point-spread function: its image, constant or varying over the field, its width and its light."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

from sersicnet.errors import InputError, warn
from sersicnet.image import psffigure
from sersicnet.image.psffield import Nodes, Polynomial

if TYPE_CHECKING:
    from sersicnet.image.mosaic import Image

_ANGLES, _STEPS, _SPLINE = 24, 128, 5
_POWER = 0.6
"""Pixels are interpolated in this power of their value.

A PSF is smoother in it, so a spline follows the core of an undersampled PSF better than in the values themselves.
"""

LEAST_FWHM = 0.5
"""Least full width of a PSF, pixels of the exposure; the pixel itself, which an effective PSF includes, is 1 wide."""

CELL = 512
"""Side of the cells of an image that share a PSF, pixels."""

SCALE_TOLERANCE = 0.02
"""Largest deviation of a ratio of pixel scales from a whole number, as a fraction of it."""

OFF_CENTRE = 0.005
"""Largest distance of the core of a PSF from the middle pixel that is left as it is, pixels of its image."""

UNDERSAMPLED = 1.97
"""Below this FWHM, in its own pixels, a PSF is moved by a spline in a power of its values, above it by sinc functions.

Moved by half a pixel along both axes, Gaussian, Moffat and Airy profiles with an effective FWHM of 3 pixels are off by
at most 0.2 % of the peak and in FWHM, of 2.6 pixels by 1.4 %, of 2.2 by 4 and 5 %, of 1.7 by 8 %, of 1.5 by 15 %.
"""

SAMPLED = 2.1
"""Least FWHM of a PSF with one sample a pixel; below it, fitted radii of galaxies of R_e 2 are off by more than 1 %."""

_DOUBTFUL = 2.4
"""A PSF from `SAMPLED` to this FWHM that is moved by more than `_BADLY_MOVED` gives a warning, its own pixels."""

_COARSE = 10
"""The moments of a core of fewer pixels above half of its maximum are measured between the pixels, too."""

_BADLY_MOVED = 0.1
"""Distance by which a PSF is moved, its own pixels; see `_DOUBTFUL`."""

_WHOLE = 0.3
"""Least light of a PSF within three FWHM of its centre, of all of its light; less means that the image is no PSF."""

_SECOND = 0.5
"""Brightest pixel far from the core, as a fraction of the peak, of an image that shows a single star."""

_WIDEST = 2.0
"""Largest ratio of the FWHM of a varying PSF at two places of an image."""


class Width(NamedTuple):
    """Full width at half maximum of an image's PSF.

    Attributes
    ----------
    value : float
        In pixels; NaN if it is not known.
    error : float
        1 sigma; 0 for a file.
    source : str
        Where the width was measured, or why it is not known.
    """

    value: float
    error: float
    source: str


@dataclass(frozen=True, eq=False)
class Psf:
    """An effective PSF: as stars in the image show it, the pixel included; constant, or varying over the image.

    `read_psf` makes one from a file, `of` from an array, `varying` from components or from PSFs at several places.

    Attributes
    ----------
    name : str
        Of the file, as it was given; or a few words.
    sha256 : str
        Of the pixels.
    image : ndarray, float64, (P, P)
        Unit sum, odd P, centred on the middle pixel. For a varying PSF, the one in the middle of its field.
    oversampling : int
        Pixels of `image` per pixel of the exposure, along an axis.
    source : str
        Origin in a few words, such as the name of the file without its directory.
    error, light_error : float
        Relative uncertainties of the FWHM and of the light within two FWHM, 1 sigma; 0 for a file.
    components : ndarray, float64, (K, P, P) or None
        Images whose weighted sum is the PSF at a position; None for a constant PSF.
    field : Polynomial or Nodes or None
        Weights of the components at a position.
    scale : float
        Arcsec per pixel of `image`, if the file states it instead of an oversampling; NaN otherwise. `on` compares it
        with the pixel scale of an image.
    """

    name: str
    sha256: str
    image: np.ndarray
    oversampling: int = 1
    source: str = ""
    error: float = 0.0
    components: np.ndarray | None = None
    field: Polynomial | Nodes | None = None
    scale: float = float("nan")
    light_error: float = 0.0

    def __post_init__(self) -> None:
        if not self.source:
            object.__setattr__(self, "source", Path(self.name).name)

    __repr__, _repr_png_, plot = psffigure.in_words, psffigure.png, psffigure.plot_psf

    def __getstate__(self) -> dict[str, Any]:
        # What was measured on the image is measured again by another process.
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}

    @classmethod
    def of(cls, image: np.ndarray, name: str, oversampling: int = 1, *, source: str = "", error: float = 0.0) -> Psf:
        """A constant PSF of pixels in memory.

        Parameters
        ----------
        image : ndarray, float, (H, W)
            Effective PSF on zero background, in any unit. Even sides, and a core that is not on the middle pixel, are
            corrected as `centred` does.
        name : str
        oversampling : int
            Pixels of `image` per pixel of the exposure, along an axis.
        source, error
            See the attributes.

        Raises
        ------
        InputError
            If the image is no PSF; see `centred`.
        """
        digest = hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()
        made = cls(name, digest, centred(np.asarray(image, float), name), oversampling, source, error)
        made.check_width()
        return made

    @classmethod
    def varying(
        cls,
        components: np.ndarray,
        field: Polynomial | Nodes,
        name: str,
        oversampling: int = 1,
        *,
        source: str = "",
        error: float = 0.0,
    ) -> Psf:
        """A PSF that varies over the image.

        Parameters
        ----------
        components : ndarray, float, (K, P, P)
            Images whose weighted sum is the effective PSF at a position, P odd. Their core may be a few pixels off the
            middle one; `at` centres and normalises the sum.
        field : Polynomial or Nodes
            The weights.
        name, oversampling, source, error
            As for `of`.

        Raises
        ------
        InputError
            If the sum is no PSF in the middle of the field; see `centred`.
        """
        components = np.ascontiguousarray(components, dtype=float)
        seen = hashlib.sha256(components.tobytes())
        seen.update(repr(field).encode())
        middle = np.tensordot(field.weights(*field.middle)[0], components, 1)
        image = centred(middle, name, len(middle) // 2)
        made = cls(name, seen.hexdigest(), image, oversampling, source, error, components, field)
        made.check_width()
        return made

    @property
    def varies(self) -> bool:
        """Whether the PSF depends on the position."""
        return self.field is not None

    def at(self, x: float, y: float) -> Psf:
        """The PSF at a position.

        Parameters
        ----------
        x, y : float
            Zero-based pixels of the exposure. Beyond the image that `on` received, and beyond the outermost of several
            places, the PSF is that of the nearest position inside.

        Returns
        -------
        Psf
            Constant, unit sum, centred on the middle pixel to 0.01 pixel.

        Raises
        ------
        InputError
            If the PSF depends on right ascension and declination, and `on` has not converted them; or if the weighted
            sum of the components is no PSF there.
        """
        if self.field is None or self.components is None:
            return self
        image = np.tensordot(self.field.weights(x, y)[0], self.components, 1)
        name = f"{self.name} at x = {x:.0f}, y = {y:.0f}"
        image = centred(image, name, len(self.image) // 2)
        digest = hashlib.sha256(image.tobytes()).hexdigest()
        return replace(self, sha256=digest, image=image, components=None, field=None, scale=float("nan"))

    def cells(self, x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, list[Psf]]:
        """Positions grouped by the cells of a fixed grid, and the PSF in the middle of each cell.

        The grid begins at the corner of pixel (0, 0), and its cells have a side of `CELL` pixels, so that the PSF of a
        source does not depend on the tiles of the image.

        Parameters
        ----------
        x, y : array_like, float, (N,)
            Zero-based pixels of the exposure; NaN counts as 0.

        Returns
        -------
        labels : ndarray, int, (N,)
            Number of the cell of each position in the list.
        psfs : list of Psf
            A constant PSF has one cell; a varying PSF has those that contain a position, row by row.
        """
        x, y = (_finite(v) for v in (x, y))
        if not self.varies:
            return np.zeros(x.shape, int), [self]
        cell = np.floor((np.column_stack([y, x]) + 0.5) / CELL)
        corners, labels = np.unique(cell, axis=0, return_inverse=True)
        middles = (corners + 0.5) * CELL - 0.5
        return labels.ravel(), [self.at(float(column), float(row)) for row, column in middles]

    def on(self, image: Image, pixel_scale: float = float("nan")) -> Psf:
        """The PSF in the pixels of an image, after a check that it suits the image.

        Parameters
        ----------
        image : Image
            Its WCS converts the places of a PSF that are given on the sky.
        pixel_scale : float
            Arcsec per pixel of the image; NaN if it is not known. If the file of the PSF states a pixel scale and no
            oversampling, their ratio is the oversampling.

        Returns
        -------
        Psf

        Raises
        ------
        InputError
            If the ratio of pixel scales is no whole number, the places cannot be converted, the places cover less than
            half of the image, or the PSF of some part of the image is no PSF.

        Warns
        -----
        SersicnetWarning
            If the places leave a part of the image uncovered, or reach far beyond it.
        """
        out = self.at_scale(pixel_scale)
        if out.field is None:
            return out
        height, width = image.shape
        out = replace(out, field=out.field.on(image, out.name))
        out = replace(out, image=out.at((width - 1) / 2, (height - 1) / 2).image)
        for y in np.linspace(0, height - 1, 3):
            for x in np.linspace(0, width - 1, 3):
                here = out.at(float(x), float(y)).fwhm
                if not out.fwhm / _WIDEST < here < out.fwhm * _WIDEST:
                    raise InputError(
                        f"The FWHM of a PSF varies by less than a factor of {_WIDEST:g} over an image; that of "
                        f"{out.name} is {out.fwhm:.3g} pixels in the middle, and {here:.3g} at x = "
                        f"{x:.0f}, y = {y:.0f} of {image.name}. Was it made for another image? Give a constant PSF."
                    )
        return out

    def at_scale(self, pixel_scale: float) -> Psf:
        """The PSF with the oversampling that its pixel scale states for an exposure of `pixel_scale`, arcsec per pixel.

        Raises
        ------
        InputError
            If the ratio is no whole number.
        """
        if not (np.isfinite(self.scale) and np.isfinite(pixel_scale)):
            return self
        ratio = pixel_scale / self.scale
        whole = max(round(ratio), 1)
        if abs(ratio / whole - 1) > SCALE_TOLERANCE:
            raise InputError(
                f"A pixel of the image is a whole number of pixels of its PSF; {self.name} states "
                f"{self.scale:.4g} arcsec per pixel, the image has {pixel_scale:.4g}. Resample the PSF, or give "
                "`psf_oversampling` if its header is wrong."
            )
        made = replace(self, oversampling=whole, scale=float("nan"))
        if whole > 1:
            made.check_width()
        return made

    def at_pixel_scale(self) -> Psf:
        """The constant PSF sampled once a pixel of the exposure; that in the middle of the field of a varying one."""
        if self.oversampling == 1 and not self.varies:
            return self
        part = slice(len(self.image) // 2 % self.oversampling, None, self.oversampling)
        image = self.image[part, part]
        return replace(self, image=image / image.sum(), oversampling=1, components=None, field=None, scale=float("nan"))

    @functools.cached_property
    def fwhm(self) -> float:
        """Full width at half maximum, pixels of the exposure; see `full_width`."""
        return full_width(self.image, self.oversampling)

    @property
    def width(self) -> Width:
        """The same, with its error and source."""
        return Width(self.fwhm, self.error * self.fwhm, self.source)

    @functools.cached_property
    def ellipticity(self) -> float:
        """1 - b/a of the Gaussian that matches the core; see `core_of`."""
        return core_of(self.image).ellipticity

    def encircled(self, radius: ArrayLike) -> np.ndarray:
        """Fraction of the light of the image within a radius of its middle.

        The effective PSF is integrated between its pixels, by the spline of `radial_profile`; where a circle holds
        many pixels, they are summed. Within 1 pixel of Gaussian, Moffat and Airy profiles whose FWHM before the pixel
        is 2 pixels or more, the error is at most 0.005, and at most 0.02 of an Airy profile of 1.5 pixels; with an
        oversampling of 2 it is below 0.001.

        Parameters
        ----------
        radius : array_like, float
            Pixels of the exposure.

        Returns
        -------
        ndarray, float64
            Of the shape of `radius`. 1 is all light of the image, so that the light beyond it is not counted.
        """
        wanted = np.asarray(radius, float) * self.oversampling
        half = len(self.image) // 2
        limit = min(max(8.0, 3 * self.fwhm * self.oversampling), half)
        distance = np.hypot(*np.indices(self.image.shape) - half)

        def summed(r: np.ndarray) -> np.ndarray:
            return np.array([float((self.image * np.clip(one - distance + 0.5, 0, 1)).sum()) for one in r.ravel()])

        radii = np.linspace(0, limit, max(_STEPS, 8 * int(limit)) + 1)
        rate = 2 * np.pi * radii * radial_profile(self.image, (half, half), radii)
        inside = np.concatenate([[0.0], np.cumsum((rate[1:] + rate[:-1]) / 2 * np.diff(radii))])
        inside *= summed(np.array([limit]))[0] / inside[-1]
        near = np.interp(wanted, radii, inside)
        return np.where(wanted <= limit, near, summed(wanted).reshape(wanted.shape))

    def check_width(self) -> None:
        """Refuse an oversampling that makes the PSF narrower than a pixel; warn of samples that are too coarse."""
        if self.oversampling == 1 and self.fwhm < SAMPLED:
            warn(
                f"{self.name} has one sample a pixel and a FWHM of {self.fwhm:.2g} pixels: below {SAMPLED} the samples "
                "do not determine the PSF, and fitted radii of small galaxies may be off by several per cent. Give a "
                "PSF sampled twice a pixel or finer."
            )
        if self.oversampling > 1 and self.fwhm < LEAST_FWHM:
            raise InputError(
                f"A PSF that includes the pixel is at least {LEAST_FWHM} pixels of the image wide; with an "
                f"oversampling of {self.oversampling}, that of {self.name} is {self.fwhm:.2g}. Correct "
                "`psf_oversampling`."
            )


class Core(NamedTuple):
    """The Gaussian that matches the core of a PSF.

    Attributes
    ----------
    row, column : float
        Centre, pixels of the image.
    sigma : float
        Geometric mean of the widths along its axes, pixels of the image.
    ellipticity : float
        1 - b/a.
    """

    row: float
    column: float
    sigma: float
    ellipticity: float


def core_of(image: np.ndarray) -> Core:
    """Centre, width and ellipticity of the core of a PSF, by adaptive moments.

    The moments are weighted by the Gaussian that they describe (Bernstein & Jarvis 2002, AJ 123, 583), about the
    brightest pixel of the image after a slight smoothing. The centre is within the half width of this peak.

    Parameters
    ----------
    image : ndarray, float, (H, W)

    Returns
    -------
    Core
    """
    image = np.asarray(image, float)
    peak = np.unravel_index(int(np.argmax(ndimage.gaussian_filter(image, 0.7))), image.shape)
    area = _area(image, (int(peak[0]), int(peak[1])))
    reach = int(3 * np.sqrt(area)) + 4
    low = [max(int(p) - reach, 0) for p in peak]
    part = image[low[0] : int(peak[0]) + reach + 1, low[1] : int(peak[1]) + reach + 1]
    step = 1.0 if area > _COARSE else 0.25
    y, x = (np.arange(0, n - 1 + step / 2, step) for n in part.shape)
    fine = part if step == 1 else between(part, *np.meshgrid(y, x, indexing="ij"))
    centre = np.array([peak[0] - low[0], peak[1] - low[1]], float)
    first, far = centre, 1 + np.sqrt(area / np.pi)
    start = max(area / np.pi / (2 * np.log(2)), 0.3)  # sigma squared: the area is that above half of the maximum
    moments = np.diag([start, start])
    for _ in range(60):
        dy, dx = y[:, None] - centre[0], x[None, :] - centre[1]
        (a, b), (_, c) = np.linalg.inv(moments)
        weighted = fine * np.exp(-0.5 * (a * dy**2 + 2 * b * dy * dx + c * dx**2))
        total = weighted.sum()
        if not total > 0:
            break
        shift = 2 * np.array([(weighted * dy).sum(), (weighted * dx).sum()]) / total
        new = np.empty((2, 2))
        new[0, 0], new[1, 1] = (2 * (weighted * d**2).sum() / total for d in (dy, dx))
        new[0, 1] = new[1, 0] = 2 * (weighted * dy * dx).sum() / total
        values, vectors = np.linalg.eigh(new)
        new = (vectors * np.clip(values, 0.04, (reach / 2) ** 2)) @ vectors.T
        moved = max(np.abs(shift).max(), np.abs(new - moments).max() / np.trace(new))
        centre, moments = np.clip(centre + np.clip(shift, -1, 1), first - far, first + far), new
        if moved < 1e-5:
            break
    minor, major = np.sqrt(np.linalg.eigvalsh(moments))
    return Core(
        float(centre[0] + low[0]), float(centre[1] + low[1]), float(np.sqrt(minor * major)), float(1 - minor / major)
    )


def centred(image: np.ndarray, name: str, half: int | None = None) -> np.ndarray:
    """A PSF with an odd side and unit sum, its core centred on the middle pixel.

    Rows and columns of zeros are added where the core is not in the middle; what remains, a fraction of a pixel, is
    moved by interpolation: see `UNDERSAMPLED` for its accuracy, and `_DOUBTFUL` for a warning.

    Parameters
    ----------
    image : ndarray, float64, (H, W)
        On zero background.
    name : str
        In messages.
    half : int, optional
        The side is 2 * half + 1; by default it holds all pixels of the image.

    Returns
    -------
    ndarray, float64, (P, P)

    Raises
    ------
    InputError
        If pixels are not finite, the sum is not positive, the border cuts the core off, or the image shows more than
        one star.
    """
    if not np.isfinite(image).all() or not image.sum() > 0:
        raise InputError(f"A PSF has finite pixels and a positive sum; {name} has the sum {image.sum():g}.")
    core = core_of(image)
    middle = round(core.row), round(core.column)
    room = min(*middle, image.shape[0] - 1 - middle[0], image.shape[1] - 1 - middle[1])
    width = full_width(framed(image, middle, room)) if room > 1 else 2 * np.sqrt(2 * np.log(2)) * core.sigma
    if room < width:
        raise InputError(
            f"The image of a PSF reaches at least a FWHM from its centre; {name} is {image.shape[1]} x "
            f"{image.shape[0]} pixels, its core is at x = {middle[1]}, y = {middle[0]} and {width:.2g} pixels wide. "
            "Give a larger image of a whole star."
        )
    _check_single(image, middle, width, name)
    out, place = framed(image, middle, half), np.array(middle, float)
    off = np.array([core.row, core.column]) - place
    first = float(np.abs(off).max())
    for _ in range(5):
        if np.abs(off).max() < OFF_CENTRE:
            break
        place += off
        out = _about(image, place, len(out) // 2, width)
        core = core_of(out)
        off = np.array([core.row, core.column]) - len(out) // 2
    if width < _DOUBTFUL and first > _BADLY_MOVED and full_width(out) >= SAMPLED:
        warn(
            f"{name} is {width:.2g} of its pixels wide and {first:.2g} off the middle one: when it is moved there, its "
            "width may change by 5 % and more. Give a PSF that is centred, or sampled more finely."
        )
    return out / out.sum()


def _check_single(image: np.ndarray, middle: tuple[int, int], width: float, name: str) -> None:
    """Refuse an image whose light is not that of one star."""
    row, column = np.indices(image.shape)
    radius = np.hypot(row - middle[0], column - middle[1])
    share = image[radius < 3 * width + 1].sum() / image.sum()
    far = image[radius > 2 * width + 1]
    second = float(far.max() / image[middle]) if far.size else 0.0
    if share < _WHOLE or second > _SECOND:
        raise InputError(
            f"The image of a PSF shows one star on zero background; {name} has {100 * share:.0f} % of its light within "
            f"three FWHM of its brightest core, at x = {middle[1]}, y = {middle[0]}, and elsewhere a pixel of "
            f"{100 * second:.0f} % of the peak."
        )


def framed(images: np.ndarray, middle: tuple[int, int], half: int | None = None) -> np.ndarray:
    """Images padded with zeros, and cropped, to a square about a pixel.

    Parameters
    ----------
    images : ndarray, float, (..., H, W)
    middle : (int, int)
        Row and column of the pixel that comes into the middle.
    half : int, optional
        By default the square holds all pixels.

    Returns
    -------
    ndarray, float, (..., 2 * half + 1, 2 * half + 1)
    """
    shape = images.shape[-2:]
    if half is None:
        half = max(max(m, n - 1 - m) for m, n in zip(middle, shape, strict=True))
    out = np.zeros((*images.shape[:-2], 2 * half + 1, 2 * half + 1), images.dtype)
    here, there = [], []
    for m, n in zip(middle, shape, strict=True):
        low, high = max(m - half, 0), min(m + half + 1, n)
        here.append(slice(low - m + half, high - m + half))
        there.append(slice(low, high))
    out[..., here[0], here[1]] = images[..., there[0], there[1]]
    return out


def resampled(images: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Images between their pixels, by sinc functions, which is exact for well-sampled images.

    Parameters
    ----------
    images : ndarray, float64, (..., H, W)
        Beyond their borders, they fall to zero gently.
    rows, columns : ndarray, float64, (R,) and (C,)
        Positions, pixels of the images.

    Returns
    -------
    ndarray, float64, (..., R, C)
    """
    rim = 16
    wide = np.pad(images, [(0, 0)] * (images.ndim - 2) + [(rim, rim)] * 2, mode="edge")
    fall = np.cos(np.linspace(0, np.pi / 2, rim + 2)[1:-1]) ** 2
    for axis, n in ((-1, wide.shape[-1]), (-2, wide.shape[-2])):
        taper = np.concatenate([fall[::-1], np.ones(n - 2 * rim), fall])
        wide = wide * (taper if axis == -1 else taper[:, None])
    across, along = (
        np.sinc(places[:, None] - (np.arange(n) - rim))
        for places, n in zip((rows, columns), wide.shape[-2:], strict=True)
    )
    return across @ wide @ along.T


def _about(image: np.ndarray, place: np.ndarray, half: int, width: float) -> np.ndarray:
    """A square about a position between pixels, zero beyond the image; `width` is the FWHM, see `UNDERSAMPLED`."""
    steps = np.arange(-half, half + 1)
    inside = [(p + steps >= -0.5) & (p + steps <= n - 0.5) for p, n in zip(place, image.shape, strict=True)]
    rows, columns = (p + steps[there] for p, there in zip(place, inside, strict=True))
    out = np.zeros((2 * half + 1, 2 * half + 1))
    if width >= UNDERSAMPLED:
        out[np.ix_(*inside)] = resampled(image, rows, columns)
    else:
        out[np.ix_(*inside)] = between(image, *np.meshgrid(rows, columns, indexing="ij"))
    return out


def between(image: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Values between pixels, of a spline through the pixels in a power of their value."""
    powers = np.sign(image) * np.abs(image) ** _POWER
    values = ndimage.map_coordinates(powers, [rows, columns], order=_SPLINE, mode="mirror")
    return np.sign(values) * np.abs(values) ** (1 / _POWER)


def _finite(values: ArrayLike) -> np.ndarray:
    """Positions as float64; NaN is 0, and those very far away are a billion pixels away."""
    return np.clip(np.nan_to_num(np.asarray(values, float), nan=0.0), -1e9, 1e9)


def _area(image: np.ndarray, peak: tuple[int, int]) -> int:
    """Number of pixels above half of a peak that are connected with it."""
    above, _ = ndimage.label(image > image[peak] / 2)
    return int(np.count_nonzero(above == above[peak])) if above[peak] else 1


def full_width(image: np.ndarray, oversampling: int = 1) -> float:
    """Full width at half maximum of a PSF, pixels of the exposure.

    The width is that of the azimuthal mean about the peak, of a quintic spline through the pixels (raised to the power
    0.6, with their sign). For PSFs that are integrated over the pixel, it is within 1 % of the width of the continuous
    profile: Gaussian and Moffat profiles whose FWHM before the integration is 1.2 to 8 pixels, and Airy profiles from
    1.7 pixels. A narrower Airy profile comes out up to 3 % too narrow: the pixels no longer hold its shape.

    Parameters
    ----------
    image : ndarray, float, (H, W)
        Peaks within a pixel of the middle.
    oversampling : int
        Pixels of `image` per pixel of the exposure, along an axis.

    Returns
    -------
    float
        The width of the image where the profile does not fall to half its maximum.
    """
    image = np.asarray(image, float)
    middle = image.shape[0] // 2, image.shape[1] // 2
    near = image[max(middle[0] - 1, 0) : middle[0] + 2, max(middle[1] - 1, 0) : middle[1] + 2]
    up, right = np.unravel_index(np.argmax(near), near.shape)
    row, column = max(middle[0] - 1, 0) + int(up), max(middle[1] - 1, 0) + int(right)
    centre = row + _vertex(image[:, column], row), column + _vertex(image[row], column)
    # The area above half maximum, in whole pixels, says how far to look.
    guess = np.sqrt((image > image[row, column] / 2).sum() / np.pi) + 1
    while True:
        radii = np.linspace(0, min(2 * guess, min(middle)), _STEPS)
        width = half_width(radii, radial_profile(image, centre, radii))
        if np.isfinite(width):
            return 2 * width / oversampling
        if radii[-1] >= min(middle):
            return 2 * float(radii[-1]) / oversampling
        guess *= 2


def radial_profile(image: np.ndarray, centre: tuple[float, float], radii: np.ndarray) -> np.ndarray:
    """Azimuthal mean of an image, between its pixels; see `full_width`.

    Parameters
    ----------
    image : ndarray, float64, (H, W)
    centre : (float, float)
        Row and column.
    radii : ndarray, float64, (R,)
        Pixels.

    Returns
    -------
    ndarray, float64, (R,)
    """
    angles = np.arange(_ANGLES) * 2 * np.pi / _ANGLES
    rows, columns = (
        c + radii[:, None] * turn for c, turn in zip(centre, (np.sin(angles), np.cos(angles)), strict=True)
    )
    return between(image, rows, columns).mean(axis=1)


def half_width(radii: np.ndarray, profile: np.ndarray) -> float:
    """Radius at which a radial profile first falls below half its maximum; NaN if it never does."""
    top = int(np.argmax(profile))
    below = np.flatnonzero(profile[top:] < profile[top] / 2)
    if not len(below):
        return np.nan
    part = slice(top + below[0] - 1, top + below[0] + 1)
    return float(np.interp(-profile[top] / 2, -profile[part], radii[part]))


def _vertex(values: np.ndarray, k: int) -> float:
    """How far from pixel k, the highest of its neighbours, the Gaussian through the three has its peak."""
    if not 0 < k < len(values) - 1 or not (values[k - 1 : k + 2] > 0).all():
        return 0.0
    left, middle, right = np.log(values[k - 1 : k + 2])
    bend = left - 2 * middle + right
    return float(np.clip((left - right) / (2 * bend), -0.5, 0.5)) if bend < 0 else 0.0
