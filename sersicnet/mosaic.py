"""From a FITS image to detections and stamps.

Pixel coordinates are zero-based everywhere; FITS's one-based values stay inside
this module.
"""

from __future__ import annotations

import inspect
import re
import warnings
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from astropy.convolution import Gaussian2DKernel
from astropy.io import fits
from astropy.nddata import overlap_slices
from astropy.stats import SigmaClip, mad_std
from astropy.utils.exceptions import AstropyUserWarning, AstropyWarning
from astropy.wcs import WCS, FITSFixedWarning
from astropy.wcs.utils import proj_plane_pixel_scales
from numpy.typing import ArrayLike
from photutils.background import Background2D, MADStdBackgroundRMS, SExtractorBackground
from photutils.segmentation import SegmentationImage, SourceCatalog, deblend_sources, detect_sources
from photutils.utils.exceptions import NoDetectionsWarning
from scipy import ndimage, signal
from skimage.segmentation import expand_labels

from sersicnet import instrument
from sersicnet.errors import InputError
from sersicnet.schema import LOW_SNR_LIMIT, MASKED_LIMIT, STAMP_SIZE

BACKGROUND_BOX = 128
"""Side of a mesh of the background in pixels; half of the image if that is smaller."""


@dataclass
class Image:
    """A two-dimensional image.

    Attributes
    ----------
    data : ndarray, float32, (H, W)
        In native byte order; NaN where the file says so.
    header : fits.Header
    wcs : WCS or None
        None where the header has no celestial coordinates.
    name : str
        File and extension, for messages.
    """

    data: np.ndarray
    header: fits.Header
    wcs: WCS | None
    name: str

    def without_data(self) -> np.ndarray:
        """Pixels that hold no data, bool, (H, W).

        Those that are not finite, and those of exactly 0 in regions that hold
        more than 5 x 5 of them: drizzled mosaics are 0 outside of their
        footprint. Single zeros are data; quantised images are full of them.
        """
        bad = ~np.isfinite(self.data)
        zero = self.data == 0
        if zero.mean() > 1e-3:
            bad |= ndimage.binary_propagation(ndimage.binary_opening(zero, np.ones((5, 5))), mask=zero)
        return bad

    @cached_property
    def scales(self) -> np.ndarray | None:
        """Size of a pixel along both axes, arcsec."""
        return None if self.wcs is None else proj_plane_pixel_scales(self.wcs) * 3600

    def sky(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Right ascension and declination (ICRS, degrees) of zero-based pixels."""
        assert self.wcs is not None
        coordinates = self.wcs.pixel_to_world(x, y).icrs
        return coordinates.ra.deg, coordinates.dec.deg

    def pixels(self, ra: ArrayLike, dec: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Zero-based pixels of ICRS coordinates in degrees."""
        from astropy.coordinates import SkyCoord

        if self.wcs is None:
            raise InputError(f"{self.name} has no celestial WCS, so ra and dec have no place in it. Give x and y.")
        ra, dec = np.asarray(ra, dtype=float), np.asarray(dec, dtype=float)
        dec = np.where(np.abs(dec) <= 90, dec, np.nan)  # such as -99 for unknown
        x, y = self.wcs.world_to_pixel(SkyCoord(ra, dec, unit="deg"))
        return np.asarray(x), np.asarray(y)


def read_image(
    path: str | Path,
    hdu: int | str | None = None,
    *,
    prefer: tuple[str, ...] = ("SCI",),
    shape: tuple[int, int] | None = None,
    least: int = 16,
) -> Image:
    """Read an image from a FITS file.

    Parameters
    ----------
    path : str or Path
        FITS file, also compressed by tiles (.fz) or whole (.gz); an extension
        may stand behind it in brackets, ``file.fits[SCI]``.
    hdu : int or str, optional
        Number or name of the extension. By default the one with a name in
        `prefer`, else the first that holds an image.
    prefer : tuple of str
        Names of extensions to look for.
    shape : (int, int), optional
        Height and width that it must have (for maps that belong to an image).
    least : int
        Pixels that it must have a side.

    Returns
    -------
    Image

    Raises
    ------
    InputError
        If there is no such file or extension, it is damaged, or it is not an
        image of two dimensions with finite pixels.
    """
    path = Path(path)
    if hdu is None and not path.exists() and (bracketed := re.fullmatch(r"(.+)\[([^\[\]]+)\]", str(path))):
        path, hdu = Path(bracketed[1]), bracketed[2]
    if path.is_dir() or not path.exists():
        what = "a directory" if path.is_dir() else "no such file"
        raise InputError(f"An image is a FITS file; {path} is {what}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AstropyWarning)
            warnings.filterwarnings("error", message=".*truncated.*", category=AstropyUserWarning)
            # Opened here, for astropy leaves a damaged file open.
            with path.open("rb") as file, fits.open(file, memmap=False) as hdus:
                chosen = _choose(hdus, hdu, prefer, path)
                name = f"{path}[{chosen}]"
                unit = hdus[chosen]
                if not unit.is_image:
                    raise InputError(f"{name} is a table, not an image. Choose another extension with --hdu.")
                header = unit.header.copy()
                for keyword in instrument.KEYWORDS:
                    if keyword in hdus[0].header:
                        header.setdefault(keyword, hdus[0].header[keyword])
                data = unit.data
    except (OSError, TypeError, ValueError, EOFError, zlib.error, AstropyUserWarning) as error:
        if isinstance(error, InputError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is not a readable FITS file, or it is cut short: {reason}") from error
    if data is None:
        raise InputError(f"{name} holds no data. Choose another extension with --hdu.")
    if data.ndim != 2:
        raise InputError(f"{name} has {data.ndim} axes {data.shape}; an image has two. Extract one plane first.")
    if min(data.shape) < least:
        raise InputError(f"{name} is {data.shape[1]} x {data.shape[0]} pixels; an image has at least {least} a side.")
    if shape is not None and data.shape != shape:
        raise InputError(
            f"{name} is {data.shape[1]} x {data.shape[0]} pixels, the image {shape[1]} x {shape[0]}: they must agree."
        )
    data = np.ascontiguousarray(data, dtype=np.float32)
    if not np.isfinite(data).any():
        raise InputError(f"{name} has no finite pixel.")
    return Image(data, header, _celestial(header), name)


def _choose(hdus: fits.HDUList, hdu: int | str | None, prefer: tuple[str, ...], path: Path) -> int:
    if hdu is not None:
        key: int | str = int(hdu) if str(hdu).lstrip("-").isdigit() else str(hdu)
        try:
            return hdus.index_of(key) if isinstance(key, str) else range(len(hdus))[key]
        except (KeyError, IndexError) as error:
            names = ", ".join(f"{i} {unit.name}".strip() for i, unit in enumerate(hdus))
            raise InputError(f"{path} has no extension {hdu}; it has {names}.") from error
    for name in prefer:
        if name in hdus:
            return int(hdus.index_of(name))
    for i, unit in enumerate(hdus):
        if unit.is_image and unit.header.get("NAXIS", 0) > 0:
            return i
    raise InputError(f"{path} holds no image, only {', '.join(type(unit).__name__ for unit in hdus)}.")


def _celestial(header: fits.Header) -> WCS | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FITSFixedWarning)
        warnings.simplefilter("ignore", AstropyWarning)
        try:
            wcs = WCS(header, naxis=2)
        except Exception:  # wcslib raises several kinds of its own; all mean: no usable WCS
            return None
    return wcs if wcs.has_celestial and wcs.pixel_n_dim == 2 else None


@dataclass
class Sky:
    """Background and noise of an image.

    Attributes
    ----------
    level : ndarray, float32, (H, W)
        The sky.
    rms : ndarray, float32, (H, W)
        Standard deviation of a blank pixel; NaN in pixels without data.
    autocorrelation : ndarray, float64, (7, 7)
        Of blank pixels, by lag along y and x; 1 in the middle.
    map_factor : float
        What the user's noise map was multiplied with to match the scatter of
        blank pixels; NaN without a map.
    """

    level: np.ndarray
    rms: np.ndarray
    autocorrelation: np.ndarray
    map_factor: float

    @property
    def correlation(self) -> float:
        """How much larger the noise of a large aperture is than that of independent pixels.

        1 for white noise, about 2 for drizzled images.
        """
        return float(np.sqrt(max(self.autocorrelation.sum(), 1.0)))


@dataclass
class Detections:
    """Sources found in an image, in order of label.

    Attributes
    ----------
    segmentation : ndarray, int32, (H, W)
        Labels from 1; 0 is sky.
    x, y : ndarray, float64, (N,)
        Centroids, zero-based pixels.
    a, b : ndarray, float64, (N,)
        1 sigma axes of the moments, pixels.
    theta : ndarray, float64, (N,)
        Angle of the major axis, degrees from +x towards +y.
    flux : ndarray, float64, (N,)
        Sum over the detected pixels, image units.
    area : ndarray, float64, (N,)
        Number of detected pixels.
    blended : ndarray, bool, (N,)
        Whether the source was separated from a touching one.
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

    def __len__(self) -> int:
        return len(self.x)

    def claimed(self) -> np.ndarray:
        """The segmentation with every source grown by two pixels, int32, (H, W)."""
        return expand_labels(self.segmentation, 2)


@dataclass(frozen=True, kw_only=True)
class Detector:
    """How sources are found.

    Attributes
    ----------
    threshold : float
        In units of the noise of the smoothed image.
    smoothing : float
        FWHM of the Gaussian that the image is smoothed with, pixels.
    n_pixels : int
        Least number of connected pixels above the threshold.
    n_levels, contrast : int, float
        Of the deblending: see `photutils.segmentation.deblend_sources`.
    """

    threshold: float = 3.0
    smoothing: float = 3.0
    n_pixels: int = 15
    n_levels: int = 32
    contrast: float = 0.005

    def __call__(
        self, data: np.ndarray, bad: np.ndarray, noise_map: np.ndarray | None = None
    ) -> tuple[Sky, Detections]:
        """Measure the sky and find the sources.

        Parameters
        ----------
        data : ndarray, float32, (H, W)
            Image, sky included; pixels of `bad` are ignored.
        bad : ndarray, bool, (H, W)
            Pixels without data.
        noise_map : ndarray, float32, (H, W), optional
            Relative noise of the pixels: its scale is fitted to the image.

        Returns
        -------
        Sky, Detections

        Raises
        ------
        InputError
            If the noise of the image is zero.
        """
        level, rms = _background(data, bad)
        sources = np.zeros(data.shape, bool)
        for _ in range(2):  # the sky again, without the sources found in the first round
            smooth, sigma = self._smoothed(data - level, rms, bad, sources)
            found = _detect(smooth, self.threshold * sigma * rms, self.n_pixels, bad)
            if found is None:
                break
            sources = expand_labels(found.data, 8) > 0
            level, rms = _background(data, bad | sources)
        clean = data - level
        factor = np.nan
        if noise_map is not None:
            blank = ~(bad | sources)
            factor = float(mad_std((clean / noise_map)[blank])) if blank.any() else 1.0
            rms = (noise_map * factor).astype(np.float32)
        smooth, sigma = self._smoothed(clean, rms, bad, sources)
        found = _detect(smooth, self.threshold * sigma * rms, self.n_pixels, bad)
        sky = Sky(level, np.where(bad, np.nan, rms), _autocorrelation(clean / rms, bad | sources), factor)
        if found is None:
            none = np.zeros(0)
            nothing = np.zeros(data.shape, np.int32)
            return sky, Detections(nothing, none, none, none, none, none, none, none, np.zeros(0, bool))
        parts = _deblend(smooth, found, self)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AstropyUserWarning)
            catalog = SourceCatalog(clean, parts, convolved_data=smooth, mask=bad)
            parents = found.data[parts.data > 0]
            first_parent = np.zeros(parts.max_label + 1, np.int64)
            first_parent[parts.data[parts.data > 0]] = parents
            parent = first_parent[parts.labels]
            siblings = np.bincount(parent, minlength=parent.max() + 1)
            detections = Detections(
                segmentation=parts.data.astype(np.int32),
                x=np.atleast_1d(catalog.x_centroid),
                y=np.atleast_1d(catalog.y_centroid),
                a=np.atleast_1d(catalog.semimajor_axis.value),
                b=np.atleast_1d(catalog.semiminor_axis.value),
                theta=(np.atleast_1d(catalog.orientation.to_value("deg")) + 90) % 180 - 90,
                flux=np.atleast_1d(catalog.segment_flux),
                area=np.atleast_1d(catalog.segment_area.value).astype(float),
                blended=siblings[parent] > 1,
            )
        return sky, detections

    def _smoothed(
        self, clean: np.ndarray, rms: np.ndarray, bad: np.ndarray, sources: np.ndarray
    ) -> tuple[np.ndarray, float]:
        """The smoothed image, and its noise in units of the pixels' rms."""
        kernel = Gaussian2DKernel(self.smoothing * 0.42466)
        kernel.normalize()
        filled = np.where(bad, 0, clean).astype(np.float32)
        smooth = signal.oaconvolve(filled, kernel.array.astype(np.float32), mode="same")
        blank = ~(bad | sources)
        if not blank.any():
            blank = ~bad
        return smooth, float(mad_std((smooth / rms)[blank]))


def _background(data: np.ndarray, ignore: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    box = min(BACKGROUND_BOX, min(data.shape) // 2)
    filled = np.where(np.isfinite(data), data, 0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AstropyUserWarning)
            found = Background2D(
                filled,
                box,
                mask=ignore,
                exclude_percentile=80,
                filter_size=3,
                sigma_clip=SigmaClip(3.0, maxiters=10),
                bkg_estimator=SExtractorBackground(),
                bkg_rms_estimator=MADStdBackgroundRMS(),
            )
            level, rms = found.background, found.background_rms
    except ValueError:  # every mesh is mostly covered: one value for the whole image
        values = data[~ignore] if not ignore.all() else data[np.isfinite(data)]
        level = np.full(data.shape, np.median(values))
        rms = np.full(data.shape, mad_std(values))
    if not np.median(rms) > 0:
        raise InputError(
            "The image has no noise: its blank pixels all have the same value, so nothing can be measured."
        )
    return level.astype(np.float32), np.maximum(rms, 1e-3 * np.median(rms)).astype(np.float32)


def _detect(smooth: np.ndarray, threshold: np.ndarray, n_pixels: int, bad: np.ndarray) -> SegmentationImage | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoDetectionsWarning)
        return detect_sources(smooth, threshold, n_pixels, mask=bad)


def _deblend(smooth: np.ndarray, found: SegmentationImage, detector: Detector) -> SegmentationImage:
    # photutils 3.0 draws a progress bar unless told not to; 3.1 has threads and deprecates the option.
    options = {} if "n_threads" in inspect.signature(deblend_sources).parameters else {"progress_bar": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AstropyUserWarning)
        return deblend_sources(
            smooth,
            found,
            detector.n_pixels,
            n_levels=detector.n_levels,
            contrast=detector.contrast,
            **options,
        )


def _autocorrelation(normalised: np.ndarray, ignore: np.ndarray, reach: int = 3, side: int = 2048) -> np.ndarray:
    """Autocorrelation of blank pixels out to `reach`; in the middle of a large image."""
    middle = tuple(slice(max(0, (n - side) // 2), max(0, (n - side) // 2) + side) for n in normalised.shape)
    values, used = normalised[middle], (~ignore & np.isfinite(normalised))[middle]
    out = np.zeros((2 * reach + 1, 2 * reach + 1))
    out[reach, reach] = 1
    if not used.any():
        return out
    values = np.where(used, np.clip(values - np.median(values[used]), -5, 5), 0)
    variance = _shifted_mean(values, 0, 0) / _shifted_mean(used.astype(np.float32), 0, 0)
    for dy in range(reach + 1):
        for dx in range(-reach, reach + 1):
            if (dy, dx) > (0, 0):
                pairs = _shifted_mean(used.astype(np.float32), dx, dy)
                value = _shifted_mean(values, dx, dy) / pairs / variance if pairs > 0 else 0.0
                out[reach + dy, reach + dx] = out[reach - dy, reach - dx] = value
    return out


def _shifted_mean(values: np.ndarray, dx: int, dy: int) -> float:
    h, w = values.shape
    a = values[max(0, dy) : h + min(0, dy), max(0, dx) : w + min(0, dx)]
    b = values[max(0, -dy) : h + min(0, -dy), max(0, -dx) : w + min(0, -dx)]
    return float(np.einsum("ij,ij->", a, b, dtype=np.float64) / a.size)


@dataclass
class Stamps:
    """Stamps of an image, cleaned for a network.

    Attributes
    ----------
    pixels : ndarray, float32, (N, 128, 128)
        Sky subtracted, in units of `rms`; neighbours and bad pixels replaced.
    replaced : ndarray, bool, (N, 128, 128)
        Which pixels were replaced.
    x, y : ndarray, float64, (N,)
        Positions of the sources in their stamps, zero-based.
    rms : ndarray, float64, (N,)
        Noise of a blank pixel around each source, image units.
    noise : ndarray, float32, (N, 128, 128)
        Noise of a blank pixel, image units; NaN without data.
    edge : ndarray, bool, (N,)
        Whether the stamp reaches beyond the image.
    unusable : ndarray, float64, (N,)
        Fraction of pixels masked, not finite or outside.
    neighbours : ndarray, float64, (N,)
        Fraction of pixels that belong to other sources.
    empty : ndarray, bool, (N,)
        Whether none of the central 5 x 5 pixels can be used.
    """

    pixels: np.ndarray
    replaced: np.ndarray
    x: np.ndarray
    y: np.ndarray
    rms: np.ndarray
    noise: np.ndarray
    edge: np.ndarray
    unusable: np.ndarray
    neighbours: np.ndarray
    empty: np.ndarray


def cut(
    data: np.ndarray,
    bad: np.ndarray,
    sky: Sky,
    x: np.ndarray,
    y: np.ndarray,
    claimed: np.ndarray | None = None,
    labels: np.ndarray | None = None,
) -> Stamps:
    """Cut stamps about positions.

    A source comes to lie in (63, 64] on both axes, as in the simulations. Pixels
    of neighbours, and pixels without data, take the value of the pixel opposite
    to them through the centre of the source, since galaxies are nearly
    symmetric; where that one cannot be used either, the sky's.

    Parameters
    ----------
    data : ndarray, float32, (H, W)
        Image, sky included.
    bad : ndarray, bool, (H, W)
    sky : Sky
    x, y : ndarray, float, (N,)
        Zero-based positions; may lie outside, or be NaN.
    claimed : ndarray, int, (H, W), optional
        Which source each pixel belongs to, see `Detections.claimed`; 0 is sky.
    labels : ndarray, int, (N,) or (N, M), optional
        The source's own label at each position, 0 for none; or several, of
        sources that stay in its stamp.

    Returns
    -------
    Stamps
    """
    n, size = len(x), STAMP_SIZE
    out = Stamps(
        np.zeros((n, size, size), np.float32),
        np.ones((n, size, size), bool),
        np.full(n, np.nan),
        np.full(n, np.nan),
        np.full(n, np.nan),
        np.full((n, size, size), np.nan, np.float32),
        np.ones(n, bool),
        np.ones(n),
        np.zeros(n),
        np.ones(n, bool),
    )
    for i in range(n):
        if not (np.isfinite(x[i]) and np.isfinite(y[i])):
            continue
        try:
            image_part, stamp_part = overlap_slices(data.shape, (size, size), (y[i], x[i]), mode="partial")
        except ValueError:  # no overlap at all
            continue
        usable = np.zeros((size, size), bool)
        usable[stamp_part] = ~bad[image_part]
        values = out.pixels[i]
        values[stamp_part] = data[image_part] - sky.level[image_part]
        other = np.zeros((size, size), bool)
        if claimed is not None:
            there = claimed[image_part]
            other[stamp_part] = there != 0
            for own in np.atleast_1d(labels[i]) if labels is not None else ():
                other[stamp_part] &= there != own
            other &= usable
        out.noise[i][stamp_part] = sky.rms[image_part]
        rms = sky.rms[image_part][usable[stamp_part]]
        out.rms[i] = np.median(rms) if len(rms) else np.nan
        out.edge[i] = values[stamp_part].size < size * size
        out.unusable[i] = 1 - usable.mean()
        out.neighbours[i] = other.mean()
        middle = slice(size // 2 - 3, size // 2 + 2)
        out.empty[i] = not usable[middle, middle].any()
        out.x[i] = x[i] - image_part[1].start + stamp_part[1].start
        out.y[i] = y[i] - image_part[0].start + stamp_part[0].start
        out.replaced[i] = ~usable | other
        _fill(values, ~out.replaced[i], (out.x[i], out.y[i]))
        values /= out.rms[i]
    return out


def _fill(values: np.ndarray, good: np.ndarray, centre: tuple[float, float]) -> None:
    """Replace pixels that are not good by their opposites through the centre, in place."""
    if good.all():
        return
    rows, cols = np.nonzero(~good)
    opposite_rows = np.rint(2 * centre[1] - rows).astype(int)
    opposite_cols = np.rint(2 * centre[0] - cols).astype(int)
    inside = (opposite_rows >= 0) & (opposite_rows < len(values))
    inside &= (opposite_cols >= 0) & (opposite_cols < len(values))
    opposite_rows, opposite_cols = np.where(inside, opposite_rows, 0), np.where(inside, opposite_cols, 0)
    usable = inside & good[opposite_rows, opposite_cols]
    values[rows, cols] = np.where(usable, values[opposite_rows, opposite_cols], 0)


# --- point sources ------------------------------------------------------------------------------------

LEAST_STARS = 5
"""Stars below which nothing can be told of the PSF: a clump of fewer sizes may be chance."""

MOST_STARS = 200

PSF_SIDE = STAMP_SIZE - 1
"""Side of a measured PSF, pixels."""

POINT_SNR = 50.0
"""Signal to noise from which on the size of a source tells whether it is a point."""

_STAR_SNR = (400.0, 200.0, 100.0)
_CLUMP = 0.06  # width of the range of log size that stars fill
_CLUMP_CONTRAST = 1.5
_STAR_SIGMA = (0.5, 6.0)
_STAR_SCATTER = 0.0125  # of the log size of stars; galaxies fill the whole range
_STAR_MISFIT = 0.05  # rms of what a star differs from the stack by, in units of its own rms
_RING = 1.25
_WING_SLOPE = 3.0
_WING_SLOPES = (2.0, 5.0)


@dataclass(frozen=True, eq=False)
class Stars:
    """The point sources of an image, and what they look like together.

    Attributes
    ----------
    psf : ndarray, float64, (127, 127) or None
        Effective PSF: unit sum, centred on the middle pixel. None if there are too
        few stars.
    used : ndarray, bool, (N,)
        Which detections it was made from.
    alike : ndarray, bool, (N,)
        Which detections look like stars: all that are no larger than those used.
    size : ndarray, float64, (N,)
        Standard deviation of the Gaussian that each detection is most like, pixels;
        NaN where there is none, or the source cannot be trusted.
    snr : ndarray, float64, (N,)
        Of the detection through that Gaussian.
    """

    psf: np.ndarray | None
    used: np.ndarray
    alike: np.ndarray
    size: np.ndarray
    snr: np.ndarray


def find_stars(data: np.ndarray, bad: np.ndarray, sky: Sky, found: Detections) -> Stars:
    """Find the point sources among detections, and stack them to a PSF.

    Stars all have the same size, and nothing is smaller: of the sizes of the
    bright, isolated, round detections, the clump at the small end is taken if it
    stands out against what is just above it. Saturated stars are larger, and
    stay outside. The stars are shifted to a common centre and averaged, weighted by
    their flux, without pixels that differ from the rest; centres and fluxes
    are then measured with the PSF so made, stars that do not look like it are
    dropped, and all is repeated. Where the noise of the stack covers the wings,
    they follow a power law that fits the rings further in.

    Parameters
    ----------
    data : ndarray, float32, (H, W)
        Image, sky included.
    bad : ndarray, bool, (H, W)
    sky, found
        From a `Detector`.

    Returns
    -------
    Stars
    """
    n = len(found)
    size, snr, round_ = np.full(n, np.nan), np.full(n, np.nan), np.zeros(n, bool)
    nobody = np.zeros(n, bool)
    claimed = found.claimed()
    for first in range(0, n, MOST_STARS):
        part = slice(first, min(first + MOST_STARS, n))
        stamps = cut(data, bad, sky, found.x[part], found.y[part], claimed, np.arange(part.start, part.stop) + 1)
        size[part], snr[part], round_[part] = _sizes(stamps)
    size[found.blended] = np.nan
    clump = _clump(np.where(round_, size, np.nan), snr)
    if clump is None:
        return Stars(None, nobody, nobody, size, snr)
    low, high, faintest = clump
    with np.errstate(invalid="ignore"):
        members = np.flatnonzero(round_ & (size >= low) & (size <= high) & (snr >= faintest))
        members = np.sort(members[np.argsort(-snr[members], kind="stable")][:MOST_STARS])
    stamps = cut(data, bad, sky, found.x[members], found.y[members], claimed, members + 1)
    psf, kept = _stacked(stamps, sky.correlation)
    sizes = size[members[kept]]
    # The size of an undersampled star depends on where in a pixel it lies.
    if psf is None or np.log(sizes).std() > _STAR_SCATTER * max(1, 1.2 / np.median(sizes)):
        return Stars(None, nobody, nobody, size, snr)
    used = nobody.copy()
    used[members[kept]] = True
    with np.errstate(invalid="ignore"):
        alike = size <= high * (1 + 2 / snr)
    return Stars(psf, used, alike, size, snr)


def size_of(psf: np.ndarray) -> float:
    """The size that `Stars.size` has for a noiseless star, pixels."""
    half = min(psf.shape[0] // 2, STAMP_SIZE // 2 - 1)
    middle = psf.shape[0] // 2
    stamp, at = np.zeros((1, STAMP_SIZE, STAMP_SIZE), np.float32), STAMP_SIZE // 2
    inner, outer = slice(middle - half, middle + half + 1), slice(at - half, at + half + 1)
    stamp[0, outer, outer] = 1e6 * psf[inner, inner]
    here, no, one = np.array([float(at)]), np.zeros(stamp.shape, bool), np.ones(1)
    star = Stamps(stamp, no, here, here, one, np.ones_like(stamp), no[:, 0, 0], 0 * one, 0 * one, no[:, 0, 0])
    return float(_sizes(star)[0][0])


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


def _sizes(stamps: Stamps, reach: int = 20, rounds: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Size and S/N of sources as Gaussians see them, and which may be stars.

    The size is that of the round Gaussian whose weight makes the second moment
    half of its own variance; it does not care for noise far out, as a plain
    second moment does.
    """
    n, middle = len(stamps.x), STAMP_SIZE // 2
    inner = slice(middle - reach, middle + reach)
    values = stamps.pixels[:, inner, inner].astype(float)
    y, x = np.indices(values.shape[1:], dtype=float)
    cx, cy = stamps.x - inner.start, stamps.y - inner.start
    sigma, total, squares = np.full(n, 1.5), np.zeros(n), np.ones(n)
    e1, e2 = np.ones(n), np.ones(n)
    good = ~stamps.empty & np.isfinite(stamps.rms)
    values[~good] = np.nan
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        for _ in range(rounds):
            dx, dy = x - cx[:, None, None], y - cy[:, None, None]
            weight = np.exp(-0.5 * (dx**2 + dy**2) / sigma[:, None, None] ** 2)
            light = weight * values
            total, squares = light.sum(axis=(1, 2)), (weight**2).sum(axis=(1, 2))
            mx, my, mxx, myy, mxy = (
                (light * moment).sum(axis=(1, 2)) / total for moment in (dx, dy, dx**2, dy**2, dx * dy)
            )
            cx, cy = cx + np.clip(2 * mx, -1, 1), cy + np.clip(2 * my, -1, 1)
            trace = mxx + myy
            e1, e2 = 2 * (mxx - myy) / trace, 4 * mxy / trace
            sigma = np.clip(np.sqrt(np.where(trace > 0, trace, np.nan)), *_STAR_SIGMA)
        snr = total / np.sqrt(squares)
        near = (x - cx[:, None, None]) ** 2 + (y - cy[:, None, None]) ** 2 < (3 * sigma[:, None, None]) ** 2
        whole = ~(stamps.replaced[:, inner, inner] & near).any(axis=(1, 2))
        inside = (sigma > _STAR_SIGMA[0]) & (sigma < _STAR_SIGMA[1])
        moved = np.hypot(cx + inner.start - stamps.x, cy + inner.start - stamps.y) > 1
        trusted = good & whole & inside & ~moved & (snr > 0)
        round_ = trusted & (np.hypot(e1, e2) < 0.25)
    return np.where(trusted, sigma, np.nan), np.where(trusted, snr, np.nan), round_


def _clump(size: np.ndarray, snr: np.ndarray) -> tuple[float, float, float] | None:
    """Smallest and largest size of the stars, and the S/N that they have at least; None without a clump."""
    best, result = _CLUMP_CONTRAST, None
    for faintest in _STAR_SNR:
        with np.errstate(invalid="ignore"):
            logs = np.sort(np.log(size[np.isfinite(size) & (snr >= faintest)]))
        below = np.arange(len(logs))
        inside = np.searchsorted(logs, logs + _CLUMP, "right") - below
        above = np.searchsorted(logs, logs + 2 * _CLUMP, "right") - below - inside
        contrast = (inside - above) / np.sqrt(inside + above + 1)
        contrast[(inside < LEAST_STARS) | (below > 2 + 0.1 * inside)] = -np.inf
        if len(logs) and contrast.max() > best:
            best, k = float(contrast.max()), int(contrast.argmax())
            result = float(np.exp(logs[k])), float(np.exp(logs[k] + _CLUMP)), faintest
    return result


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
        psf, noise = _mean_star(scaled, flux[kept])
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
    psf = _with_wings(psf, radius, noise * correlation)
    return psf / psf.sum(), kept


def _shifted(stamp: np.ndarray, by: np.ndarray) -> np.ndarray:
    """A stamp moved by a fraction of its pixels along x and y, by a phase in Fourier space."""
    fy, fx = (np.fft.fftfreq(n) for n in stamp.shape)
    phase = np.exp(-2j * np.pi * (fx[None, :] * by[0] + fy[:, None] * by[1]))
    return np.fft.ifft2(np.fft.fft2(stamp) * phase).real


def _mean_star(scaled: np.ndarray, flux: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean of stars of unit flux, weighted by their flux, without outliers; and the noise of a pixel of it."""
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
    return mean, float(np.sqrt((weight**2 / flux**2).sum()) / weight.sum())


def _with_wings(psf: np.ndarray, radius: np.ndarray, noise: float) -> np.ndarray:
    """A PSF whose pixels are replaced by means of rings where the noise covers them, and those by a power law."""
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
    known = mean > 5 * noise / np.sqrt(number)
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
