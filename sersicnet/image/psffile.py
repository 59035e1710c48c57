"""PSFs from files: images, PSFEx, grids of STPSF and STDPSF, stamps with positions, and Piff."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from astropy.io import fits

from sersicnet.errors import InputError, SersicnetWarning, first_line, printable, warn
from sersicnet.image import mosaic
from sersicnet.image.extensions import choose
from sersicnet.image.psf import Psf, centred, core_of, framed, full_width, resampled
from sersicnet.image.psffield import Nodes, Polynomial, terms_of_psfex
from sersicnet.output import whole

STDPSF_OVERSAMPLING = 4
"""Samples per pixel of the STDPSF files of Anderson and collaborators, which have no keyword for it."""

PIFF_GRID, PIFF_SIDE, PIFF_OVERSAMPLING = 9, 63, 2
"""A Piff PSF is drawn at so many places along each axis of its field, as an image of so many pixels, so finely."""

_LEAST_SIDE = 11
"""Least side of a PSF whose rim is looked at for a pedestal, pixels."""

_WINGS = (2.0, 3.0, 5.0)
"""Steepness of the wings of PSFs, the power of the radius that they fall with: least, typical and largest."""

_PEDESTAL = 0.02
"""Least flux of a pedestal in all pixels together, as a fraction of that of the PSF without it."""

_UNCLEAR = 0.1
"""Largest uncertainty of the same flux, from the unknown steepness of the wings, of a pedestal that is subtracted."""

_NEGATIVE, _NO_PSF = 0.05, 0.5
"""More negative light than this, as a fraction of all light, gives a warning, and is refused."""

_REACH, _BEYOND = 5.0, 0.015
"""A PSF that ends nearer to its centre than so many FWHM, with more than this part of its light just beyond, warns.

Fitted radii through files of Moffat and Airy profiles that end so are 1 to 20 % too large.
"""

_CORE = 3.0
"""A missing pixel nearer to the centre than this many FWHM is an error; farther out it becomes 0."""

_BLANK = 1e29
"""SExtractor marks missing pixels of its VIGNET by -1e30."""

_PLACES = (
    "x y", "x_center y_center", "x_centre y_centre", "xcenter ycenter", "xcentre ycentre", "x_centroid y_centroid",
    "xcentroid ycentroid", "x_pos y_pos", "xpos ypos", "x_pix y_pix", "xpix ypix", "x_0 y_0", "x0 y0", "xcen ycen",
)  # fmt: skip
_SKY = (
    "ra dec", "ra_deg dec_deg", "raj2000 dej2000", "alpha_j2000 delta_j2000", "alphawin_j2000 deltawin_j2000",
    "right_ascension declination",
)  # fmt: skip
_STAMPS = ("psf", "epsf", "image", "stamp", "data", "vignet", "psf_image", "psf_mask")

WRITTEN = 9
"""A PSF that varies is written at so many places along each axis of the image."""


def write_psf(path: str | Path, psf: Psf, shape: tuple[int, int]) -> None:
    """Write a PSF as a FITS file that `read_psf` reads.

    Parameters
    ----------
    path : str or Path
        Written whole or not at all.
    psf : Psf
        In the pixels of the image. A constant one is written as an image, a varying one as a stack of images at 9 x 9
        places with a table of them, x and y from 0.
    shape : (int, int)
        Height and width of the image.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    places = np.zeros((0, 2))
    images = psf.image
    if psf.varies:
        lines = (np.linspace(0, n - 1, WRITTEN) for n in shape)
        places = np.stack(np.meshgrid(*lines, indexing="ij"), axis=-1).reshape(-1, 2)[:, ::-1]
        images = np.array([psf.at(float(x), float(y)).image for x, y in places])
    primary = fits.PrimaryHDU(images.astype(np.float32))
    primary.header["OVERSAMP"] = (psf.oversampling, "samples per pixel of the image")
    primary.header["FWHM"] = (psf.fwhm, "pixels of the image, in its middle")
    primary.header["PSFERR"] = (psf.error, "relative error of FWHM")
    primary.header["PSFLERR"] = (psf.light_error, "relative error of the light within two FWHM")
    primary.header["SOURCE"] = (printable(psf.source)[:60], "where the PSF is from")
    hdus = fits.HDUList([primary])
    if psf.varies:
        columns = [fits.Column(name, "D", unit="pix", array=v) for name, v in zip("xy", places.T, strict=True)]
        hdus.append(fits.BinTableHDU.from_columns(columns, name="PLACES"))
    with whole(Path(path)) as partial:
        hdus.writeto(partial, overwrite=True, checksum=True)


class _Found(NamedTuple):
    """What a file holds, before it is checked.

    Attributes
    ----------
    images : ndarray, float64, (H, W) or (K, H, W)
    field : Polynomial or Nodes or None
        None for one image.
    step : float
        Pixels of the exposure per pixel of the images; NaN if the file does not state it.
    scale : float
        Arcsec per pixel of the images; NaN if the file does not state it.
    header : mapping
        May state the errors of the PSF, as `write_psf` does.
    """

    images: np.ndarray
    field: Polynomial | Nodes | None
    step: float = np.nan
    scale: float = np.nan
    header: Mapping[str, Any] = MappingProxyType({})


def read_psf(path: str | Path, oversampling: int | None = None, *, pixel_scale: float | None = None) -> Psf:
    """Read an effective PSF, constant or varying over the image, from a file whose content decides its format.

    Parameters
    ----------
    path : str or Path
        A FITS image; the output of PSFEx; a grid of PSFs of STPSF (WebbPSF) or STDPSF, as photutils reads it; stamps
        with a table of their positions; or the output of Piff, which needs Piff. The images may have any sides and
        any normalisation. An extension in brackets, ``file.fits[NAME]``, is read first; then one named PSF; then the
        first image without a name of another kind.
    oversampling : int, optional
        Pixels of the file per pixel of the exposure, along an axis; by default, that of the header, and otherwise 1.
    pixel_scale : float, optional
        Arcsec per pixel of the exposure. A file whose header states a pixel scale and no oversampling has their ratio.

    Returns
    -------
    Psf

    Raises
    ------
    InputError
        If the file holds no PSF of these kinds, lacks a sampling or positions, depends on other quantities than the
        position, has missing pixels in its core, has no positive sum, does not contain a whole star, or has at its
        rim what may be a pedestal or a wing; or if `oversampling` is below 1 or too large for its width.

    Warns
    -----
    SersicnetWarning
        If a pedestal is subtracted, missing pixels are set to 0, stamps are left out, or the image is too coarse or
        too small for its PSF.
    """
    if oversampling is not None and oversampling < 1:
        raise InputError(f"The oversampling of a PSF is a whole number from 1; received {oversampling}.")
    file, hdu, label = mosaic.located(path)
    name = printable(str(path))
    found = None if label.lower().endswith(".asdf") else _model(file, hdu, label, oversampling)
    if found is None:
        found = _of_image(path)
    step = found.step if oversampling is None else 1 / oversampling
    scale = found.scale if np.isnan(step) else np.nan
    images, samples = _at_whole_samples(found.images, 1.0 if np.isnan(step) else step)
    if found.field is None:
        images = _without_pedestal(_filled(images, label), label)
        psf = Psf.of(images, name, samples)
        negative = -float(psf.image[psf.image < 0].sum())
        if negative > _NO_PSF:
            raise InputError(f"A PSF is positive; {label} is none, {100 * negative:.0f} % of its light is negative.")
        if negative > _NEGATIVE:
            warn(
                f"A PSF is positive; {100 * negative:.0f} % of the light of {label} is negative. Was too much "
                "background subtracted?"
            )
    elif isinstance(found.field, Nodes):
        psf = _of_nodes(images, found.field, name, label, samples)
    else:
        psf = _of_polynomial(images, found.field, name, samples)
    _check_reach(psf, label)
    error, light_error = (_error(found.header, key, label) for key in ("PSFERR", "PSFLERR"))
    psf = replace(psf, scale=scale, error=error, light_error=light_error)
    return psf if pixel_scale is None else psf.at_scale(pixel_scale)


def _check_reach(psf: Psf, label: str) -> None:
    """Warn of a PSF whose image ends where it is still bright."""
    image, middle = psf.image, len(psf.image) // 2
    lit = [np.flatnonzero((image != 0).any(axis)) for axis in (0, 1)]
    half = min(min(middle - line[0], line[-1] - middle) for line in lit)
    if half < 1 or half >= _REACH * psf.fwhm * psf.oversampling:
        return
    radius = np.hypot(*np.indices(image.shape) - middle) / half
    rim = (radius > 0.85) & (radius <= 1)
    # The light from the border to twice its distance, of wings with the typical steepness.
    beyond = np.pi * half**2 * float((image * radius ** _WINGS[1])[rim].mean())
    if beyond > _BEYOND:
        warn(
            f"{label} ends {half / psf.fwhm / psf.oversampling:.1f} FWHM from the centre of the PSF, where about "
            f"{100 * beyond:.0f} % of its light is just beyond: radii may be off by more than that. Give a larger "
            "image of the PSF."
        )


# --- formats ---


def _model(file: Path, hdu: int | str | None, label: str, oversampling: int | None) -> _Found | None:
    """The content of a file that is more than an image; None for an image."""
    with _opened(file, label) as hdus:
        tables = [unit for unit in hdus if isinstance(unit, fits.BinTableHDU) and not unit.is_image]
        if hdu is not None:
            number = choose(hdus, hdu, "psf", label)
            if hdus[number].is_image and len(mosaic.plane_of(hdus[number].shape)) < 3:
                return None
            tables = [unit for unit in tables if hdus[number].is_image or unit is hdus[number]]
        for unit in tables:
            if "PSF_MASK" in unit.columns.names and "POLNAXIS" in unit.header:
                return _of_psfex(unit, label, oversampling is not None)
        if any(unit.name in ("PSF", "PSF_DATA") and "piff_version" in unit.columns.names for unit in tables) or (
            "PSF_WCS" in hdus and "PSF_STARS" in hdus
        ):
            return _of_piff(file, label)
        pictures = [unit for unit in hdus if unit.is_image and (hdu is None or unit is hdus[number])]
        cubes = [unit for unit in pictures if len(mosaic.plane_of(unit.shape)) == 3]
        planes = [unit for unit in pictures if len(mosaic.plane_of(unit.shape)) == 2]
        for unit in cubes:
            if "NXPSFS" in unit.header and "NYPSFS" in unit.header:
                return _of_stdpsf(unit, label)
            if any(key.startswith("DET_YX") for key in unit.header):
                return _of_stpsf_grid(unit, label)
        tiled = [unit for unit in planes if "STMPSIZE" in unit.header]
        if tiled and tables:
            return _of_tiled(tiled[0], tables, label)
        with_stamps = [unit for unit in tables if _stamp_columns(unit)]
        if (cubes or with_stamps) and not planes:
            return _of_stamps(cubes, with_stamps, tables, label)
        return None


@contextmanager
def _opened(file: Path, label: str) -> Iterator[fits.HDUList]:
    with file.open("rb") as stream:
        with mosaic.readable(label):
            hdus = fits.open(stream, memmap=False)
            len(hdus)  # the headers are read
        with hdus:
            yield hdus


def _pixels(unit: Any, label: str) -> np.ndarray:
    """The images of an HDU, float64; axes of one pixel before the last three are dropped."""
    with mosaic.readable(label):
        data = np.asarray(unit.data, float)
    return data.reshape(mosaic.plane_of(data.shape))


def _of_image(path: str | Path) -> _Found:
    """One image; of the extensions of STPSF, the one with distortion and charge diffusion is preferred."""
    frame = mosaic.read_image(path, kind="psf", least=1)
    header, image = frame.header, np.array(frame.data, float)
    step, scale = _sampling(header, frame.name), _scale(header, frame.name)
    stated = str(header.get("EXTNAME", "")).strip().upper()
    if stated.startswith("OVER") and "DET_SAMP" in header and "PIXELSCL" in header:
        samples = round(1 / step)
        warn(
            f"{frame.name} is a PSF of STPSF, sampled {samples} times a pixel, which does not include the pixel: it is "
            "convolved with it."
        )
        kernel = np.ones(samples) if samples % 2 else np.array([0.5, *np.ones(samples - 1), 0.5])
        for axis in (0, 1):
            image = np.apply_along_axis(np.convolve, axis, image, kernel / samples)
    return _Found(image, None, step, scale, header)


def _of_psfex(unit: fits.BinTableHDU, label: str, sampled: bool) -> _Found:
    """Coefficients of a polynomial of the position, as PSFEx writes them (PSFEx manual; SExtractor's ``poly.c``)."""
    header = unit.header
    with mosaic.readable(label):
        images = np.array(unit.data["PSF_MASK"][0], float)
    images = images[None] if images.ndim == 2 else images
    if images.ndim != 3:
        raise InputError(f"PSF_MASK of PSFEx has three axes; that of {label} has {images.ndim}. Write it again.")
    step = _number(header, "PSF_SAMP", label)
    if not step > 0 and not sampled:
        raise InputError(
            f"PSFEx states the sampling of a PSF in PSF_SAMP; {label} lacks it. Add it, or give `psf_oversampling`."
        )
    axes = int(_number(header, "POLNAXIS", label))
    terms: list[tuple[int, int]] = [(0, 0)]
    centre, span = [0.0, 0.0], [1.0, 1.0]
    if axes > 0:
        which, groups = [], []
        for n in range(1, axes + 1):
            quantity = str(header.get(f"POLNAME{n}", "")).strip().upper()
            match = re.fullmatch(r"([XY])\w*_IMAGE(_DBL)?", quantity)
            if match is None or "XY".index(match[1]) in which:
                raise InputError(
                    f"The polynomial of a PSF is one of X_IMAGE and Y_IMAGE; {label} has one of "
                    f"{quantity or 'nothing'}. Make it with PSFVAR_KEYS X_IMAGE,Y_IMAGE."
                )
            axis = "XY".index(match[1])
            which.append(axis)
            groups.append(int(_number(header, f"POLGRP{n}", label, 1)))
            centre[axis] = _number(header, f"POLZERO{n}", label, 0) - 1  # pixels of SExtractor count from 1
            span[axis] = _number(header, f"POLSCAL{n}", label, 1) or 1.0
        degrees = [int(_number(header, f"POLDEG{group}", label)) for group in groups]
        terms = terms_of_psfex(which, groups, degrees)
    if len(terms) != len(images):
        raise InputError(
            f"A polynomial has an image for each of its terms; {label} states {len(terms)} terms and has {len(images)} "
            "images: it is damaged."
        )
    if len(terms) == 1:
        return _Found(images[0], None, step)
    # Coordinates of PSFEx are -0.5 to 0.5 over the extent of its stars.
    images = images * np.array([0.5 ** (i + j) for i, j in terms])[:, None, None]
    return _Found(images, Polynomial((centre[0], centre[1]), (span[0] / 2, span[1] / 2), tuple(terms)), step)


def _of_stdpsf(unit: Any, label: str) -> _Found:
    """A grid of the STDPSF format (Anderson 2016, WFC3 ISR 2016-12), whose positions count from 1."""
    header, lines = unit.header, []
    for count, key, wide in (("NXPSFS", "IPSFX", "IPSFXABCD"), ("NYPSFS", "JPSFY", "JPSFYAB")):
        number = int(_number(header, count, label))
        if f"{key}01" in header:
            line = [_number(header, f"{key}{i:02d}", label) for i in range(1, number + 1)]
        else:  # grids of several detectors list several positions in each keyword
            line = [float(v) for letter in wide[5:] for v in str(header.get(f"{key}{letter}5", "")).split()]
        if len(line) != number or not np.isfinite(line).all():
            raise InputError(
                f"A grid of STDPSF states {number} positions in {key}01 and so on; {label} has {len(line)}: it is "
                "damaged."
            )
        # The line of ACS at the gap is listed twice, for the detectors on both sides.
        at_gap = np.append(False, np.diff(line) == 0)
        lines.append(np.array(line) - 1 + at_gap)
    return _of_grid(_pixels(unit, label), lines, label, 1 / STDPSF_OVERSAMPLING)


def _of_grid(images: np.ndarray, lines: Sequence[np.ndarray], label: str, step: float) -> _Found:
    y, x = (v.ravel() for v in np.meshgrid(lines[1], lines[0], indexing="ij"))
    if len(images) != len(x):
        raise InputError(f"A grid has a PSF at each position; {label} has {len(images)} PSFs and {len(x)} positions.")
    return _Found(images, Nodes(x, y), step)


def _of_stpsf_grid(unit: Any, label: str) -> _Found:
    """A grid of STPSF (WebbPSF), effective PSFs with their positions (y, x) in DET_YX0 and so on, from 0."""
    images, places = _pixels(unit, label), []
    for i in range(len(images)):
        text = str(unit.header.get(f"DET_YX{i}", ""))
        numbers = re.findall(r"[-+]?\d+\.?\d*(?:[eE][-+]?\d+)?", text)
        if len(numbers) != 2:
            raise InputError(
                f"A grid of STPSF states the position of each PSF; DET_YX{i} of {label} is {text or 'missing'}."
            )
        places.append([float(v) for v in numbers])
    y, x = np.array(places).T
    step = _sampling(unit.header, label)
    if np.isnan(step):
        raise InputError(f"A grid of STPSF states OVERSAMP; {label} lacks it. Add it, or give `psf_oversampling`.")
    return _Found(images, Nodes(x, y), step)


def _of_tiled(unit: Any, tables: Sequence[fits.BinTableHDU], label: str) -> _Found:
    """Stamps side by side in one image, with a table of their centres in it and on the sky, as of Euclid's MER."""
    image, side = _pixels(unit, label), int(_number(unit.header, "STMPSIZE", label))
    for table in tables:
        names = {column.lower(): column for column in table.columns.names}
        if not {"x_center", "y_center", "ra", "dec"} <= names.keys():
            continue
        with mosaic.readable(label):
            column, row, ra, dec = (
                np.array(table.data[names[k]], float) for k in ("x_center", "y_center", "ra", "dec")
            )
        half = (side - 1) / 2
        stamps = []
        for x, y in zip(column - 1 - half, row - 1 - half, strict=True):  # centres count from 1
            i, j = round(y), round(x)
            part = image[max(i, 0) : i + side, max(j, 0) : j + side]
            if part.shape != (side, side):
                raise InputError(
                    f"Stamps lie inside of their image; that at x_center = {x + 1 + half:g}, y_center = "
                    f"{y + 1 + half:g} of {label} does not."
                )
            stamps.append(part)
        nothing = np.full(len(ra), np.nan)
        return _Found(
            np.array(stamps), Nodes(nothing, nothing, np.column_stack([ra, dec])), _sampling(unit.header, label)
        )
    raise InputError(f"Stamps side by side need a table with x_center, y_center, RA and Dec; {label} has none.")


def _of_stamps(
    cubes: Sequence[Any], with_stamps: Sequence[fits.BinTableHDU], tables: Sequence[fits.BinTableHDU], label: str
) -> _Found:
    """A stack of images with a table of positions, or a table with a column of images."""
    if cubes:
        header, images = cubes[0].header, _pixels(cubes[0], label)
        candidates = [table for table in tables if len(table.data) == len(images)]
        if not candidates:
            raise InputError(
                f"{label} has a stack of {len(images)} images and no table of {len(images)} positions beside it. Give "
                "one image, or add a table with columns x, y (from 0) or ra, dec."
            )
    else:
        table = with_stamps[0]
        columns = _stamp_columns(table)
        chosen = [c for c in columns if c.lower() in _STAMPS] or columns
        if len(chosen) > 1:
            raise InputError(f"A table of PSFs has one column of images; {label} has {', '.join(chosen)}.")
        with mosaic.readable(label):
            images = np.array(table.data[chosen[0]], float)
        header, candidates = table.header, [table]
    images = np.where(np.abs(images) > _BLANK, np.nan, images)
    for table in candidates:
        nodes = _nodes(table, label)
        if nodes is not None:
            return _Found(images, nodes, _sampling(header, label), _scale(header, label), header)
    raise InputError(
        f"Stamps have positions in columns x, y (from 0), X_IMAGE, Y_IMAGE (from 1) or ra, dec; the table of {label} "
        f"has {', '.join(candidates[0].columns.names)}. Rename the columns."
    )


def _stamp_columns(table: fits.BinTableHDU) -> list[str]:
    """Names of the columns of a table that hold images."""
    kinds = table.columns.dtype
    return [name for name in table.columns.names if len(kinds[name].shape) == 2]


def _nodes(table: fits.BinTableHDU, label: str) -> Nodes | None:
    """The positions in a table, from 0; None if it has none."""
    names = {column.lower(): column for column in table.columns.names}
    pairs = [pair.split() for pair in _PLACES]
    pairs += [[n, "y" + n[1:]] for n in names if re.fullmatch(r"x\w*_image(_dbl)?", n)]
    pixels = next((pair for pair in pairs if set(pair) <= names.keys()), None)
    sky = next((pair.split() for pair in _SKY if set(pair.split()) <= names.keys()), None)
    if pixels is None and sky is None:
        return None

    def columns(pair: list[str]) -> list[np.ndarray]:
        with mosaic.readable(label):
            return [np.array(table.data[names[n]], float) for n in pair]

    n = len(table.data)
    x, y = columns(pixels) if pixels is not None else [np.full(n, np.nan)] * 2
    if pixels is not None and "_image" in pixels[0]:
        x, y = x - 1, y - 1
    places = None
    if sky is not None:
        for one in sky:
            unit = str(table.columns[names[one]].unit or "deg").lower()
            if not unit.startswith("deg"):
                raise InputError(f"Right ascension and declination of stamps are in degrees; {label} has {unit}.")
        places = np.column_stack(columns(sky))
    return Nodes(x, y, places)


def _of_piff(file: Path, label: str) -> _Found:
    """A PSF of Piff, drawn at the places of a grid over the field of its stars.

    Finer samples are those of the same place at fractions of a pixel, so that the PSF is Piff's own at each of them.
    """
    try:
        import piff
    except ImportError as error:
        raise InputError(
            f"{label} is a PSF of Piff, which is not installed: pip install 'sersicnet[piff]' ({first_line(error)})."
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = piff.read(str(file))
    except Exception as error:  # Piff raises many types of error
        raise InputError(f"Piff cannot read {label}: {first_line(error)}.") from error
    depends = set(model.interp_property_names) - {"x", "y", "u", "v"}
    if depends:
        raise InputError(f"A PSF depends on the position only; that of {label} also on {', '.join(sorted(depends))}.")
    if len(model.wcs) != 1:
        raise InputError(f"A PSF is that of one image; {label} holds {len(model.wcs)} chips. Write them one by one.")
    stars = np.array([(star.image_pos.x, star.image_pos.y) for star in model.stars or ()])
    if not len(stars):
        raise InputError(f"The field of a PSF of Piff is that of its stars; {label} lists none. Write them, too.")
    lines = [np.linspace(stars[:, i].min(), stars[:, i].max(), PIFF_GRID) for i in (0, 1)]
    k, images = PIFF_OVERSAMPLING, []
    for y in lines[1]:
        for x in lines[0]:
            fine = np.empty((PIFF_SIDE * k, PIFF_SIDE * k))
            for i, j in np.ndindex(k, k):
                offset = (k // 2 - j) / k, (k // 2 - i) / k  # the sample lies at minus that from the centre
                fine[i::k, j::k] = model.draw(x=x, y=y, center=True, offset=offset, stamp_size=PIFF_SIDE).array
            images.append(fine)
    return _of_grid(np.array(images), [line - 1 for line in lines], label, 1 / k)  # pixels of Piff count from 1


# --- keywords ---


def _number(header: Mapping[str, Any], keyword: str, label: str, default: float = np.nan) -> float:
    """A number of a header; `default` if the keyword is missing."""
    value = header.get(keyword, default)
    if isinstance(value, bool | str) or not isinstance(value, int | float | np.number):
        raise InputError(f"{keyword} in the header of {label} is a number; received {value!r}. Correct it.")
    return float(value)


def _error(header: Mapping[str, Any], keyword: str, label: str) -> float:
    """A relative error, which `write_psf` states; 0 if the keyword is missing."""
    error = _number(header, keyword, label, 0.0)
    if not 0 <= error < 1:
        raise InputError(f"{keyword} in the header of {label} is from 0 to 1; received {error:g}. Correct it.")
    return error


def _sampling(header: Mapping[str, Any], label: str) -> float:
    """Pixels of the exposure per pixel of a PSF, from the keywords of PSFEx, STPSF and others; NaN without any."""
    if str(header.get("EXTNAME", "")).strip().upper() in ("DET_SAMP", "DET_DIST"):
        return 1.0  # STPSF: binned to the pixels of the detector, whatever the keywords say
    step = _number(header, "PSF_SAMP", label)
    if step > 0:
        if step > 1:
            raise InputError(
                f"PSF_SAMP is the number of pixels of the exposure per pixel of the PSF, as in PSFEx, and at most 1; "
                f"that of {label} is {step:g}. Correct it, or give `psf_oversampling`."
            )
        return step
    for keyword in ("DET_SAMP", "OVERSAMP", "OVERSAMPLING", "SAMPLING"):
        found = _number(header, keyword, label)
        if np.isnan(found):
            continue
        if keyword == "SAMPLING" and 0 < found < 1:
            return found
        if not found >= 1:
            raise InputError(
                f"{keyword} is the number of pixels of the PSF per pixel of the exposure, from 1; that of {label} is "
                f"{found:g}. Correct it, or give `psf_oversampling`."
            )
        return 1 / found
    return np.nan


def _scale(header: Mapping[str, Any], label: str) -> float:
    """Arcsec per pixel of a PSF, by PIXELSCL or PIXSCALE; NaN without them."""
    for keyword in ("PIXELSCL", "PIXSCALE"):
        if keyword in header and (found := _number(header, keyword, label)) > 0:
            return found
    return np.nan


# --- images ---


def _at_whole_samples(images: np.ndarray, step: float) -> tuple[np.ndarray, int]:
    """Images with a whole number of samples per pixel of the exposure, and this number.

    A step that is not the inverse of a whole number, as PSFEx may choose it, is made finer; a step above 1 becomes 1.
    """
    samples = max(round(1 / step), 1)
    if abs(1 / step / samples - 1) < 1e-3:
        return images, samples
    samples = max(int(np.ceil(1 / step)), 1)
    places = []
    for n in images.shape[-2:]:
        half = int((n - 1) / 2 * step * samples)
        places.append((n - 1) / 2 + np.arange(-half, half + 1) / (samples * step))
    return resampled(np.nan_to_num(images), *places), samples


def _filled(image: np.ndarray, name: str) -> np.ndarray:
    """An image whose missing pixels are 0, if its core has none."""
    bad = ~np.isfinite(image)
    if not bad.any():
        return image
    if bad.all():
        raise InputError(f"{name} has no finite pixel.")
    out = np.where(bad, 0, image)
    core = core_of(out)
    middle = round(core.row), round(core.column)
    row, column = np.indices(out.shape)
    radius = np.hypot(row - middle[0], column - middle[1])
    if (radius[bad] <= _CORE * full_width(framed(out, middle))).any():
        raise InputError(
            f"A PSF has finite pixels; {bad.sum()} of {name} are not, and some of these are within {_CORE:g} FWHM of "
            "its centre. Interpolate them."
        )
    warn(f"{bad.sum()} of {bad.size} pixels of {name} are not finite: they are set to 0.")
    return out


def _of_nodes(images: np.ndarray, field: Nodes, name: str, label: str, samples: int) -> Psf:
    """The PSF of several places: each is checked, centred and normalised; those that are no PSF are left out."""
    kept, good, problems = [], [], []
    half = max(images.shape[-2:]) // 2
    messages: list[str] = []
    known = np.isfinite(field.x + field.y) if field.sky is None else np.isfinite(field.sky).all(axis=1)
    for k, image in enumerate(images):
        here = f"image {k} of {label}"
        try:
            if not known[k]:
                raise InputError(f"{here} has no position")
            with warnings.catch_warnings(record=True) as raised:
                warnings.simplefilter("always", SersicnetWarning)
                kept.append(centred(_without_pedestal(_filled(image, here), here), here, half))
            messages += [str(warning.message) for warning in raised]
            good.append(k)
        except InputError as error:
            problems.append(str(error))
    if not good:
        raise InputError(f"None of the {len(images)} images of {label} is a PSF: {problems[0]}")
    if problems:
        warn(f"{len(problems)} of {len(images)} images of {label} are left out: {problems[0]}")
    if messages:
        more = f" So it is with {len(messages) - 1} other images of the file." if messages[1:] else ""
        warn(messages[0] + more)
    if len(good) == 1:
        return Psf.of(kept[0], name, samples)
    sky = None if field.sky is None else field.sky[good]
    return Psf.varying(np.array(kept), Nodes(field.x[good], field.y[good], sky), name, samples)


def _of_polynomial(images: np.ndarray, field: Polynomial, name: str, samples: int) -> Psf:
    """The PSF of the coefficients of a polynomial, with an odd side about the core in the middle of the field."""
    if not np.isfinite(images).all():
        raise InputError(f"A PSF has finite pixels; {name} has {(~np.isfinite(images)).sum()} that are not.")
    core = core_of(np.tensordot(field.weights(*field.middle)[0], images, 1))
    return Psf.varying(framed(images, (round(core.row), round(core.column))), field, name, samples)


def _lowest_ring(image: np.ndarray) -> float:
    """The least median of the pixels of a ring about the middle of a square image, and two of its errors."""
    half = len(image) // 2
    ring = np.rint(np.hypot(*np.indices(image.shape) - half)).astype(int)
    values = [image[ring == radius] for radius in range(1, half + 1)]
    middle = [float(np.median(one)) for one in values]
    errors = [
        1.858 * float(np.median(np.abs(one - m))) / np.sqrt(len(one)) for one, m in zip(values, middle, strict=True)
    ]
    return min(m + 2 * error for m, error in zip(middle, errors, strict=True))


def _without_pedestal(image: np.ndarray, name: str) -> np.ndarray:
    """The PSF without a constant that was added to all of its pixels, which its rim shows.

    Raises
    ------
    InputError
        If it is not clear whether the level at the rim is a pedestal or a wing of the PSF, or nothing is left.
    """
    if not image.sum() > 0:
        return image
    whole, core = image, core_of(image)
    middle = round(core.row), round(core.column)
    half = min(*middle, image.shape[0] - 1 - middle[0], image.shape[1] - 1 - middle[1])
    if 2 * half + 1 < _LEAST_SIDE:
        return image
    image = framed(image, middle, half)
    radius = np.hypot(*np.indices(image.shape) - half) / half
    inner, outer = ((radius >= low) & (radius < low + 0.15) for low in (0.65, 0.85))
    level, step = (float(np.median(image[ring])) for ring in (outer, inner))
    step -= level
    # Where the rings hold a pedestal and a wing, their difference is the wing's, whose steepness gives its level.
    rise = [float(np.median(radius[outer]) / np.median(radius[inner])) ** power - 1 for power in _WINGS]
    least, typical, most = (level - step / more for more in rise)
    lowest = _lowest_ring(image)
    if 0 < lowest < typical:  # bright and dark rings of diffraction: the level of the dark ones is the most
        least, typical, most = min(least, 2 * lowest - typical), lowest, lowest
    spread = float(np.median(np.abs(image[outer] - level)))
    error = 1.858 * spread / np.sqrt(np.count_nonzero(outer))  # of a median: 1.4826 by 1.2533
    rest = image.sum() - typical * image.size
    shares = np.array([least, typical, most]) * image.size / (rest if rest > 0 else image.sum())
    certain = min(abs(shares[0]), abs(shares[2])) if shares[0] * shares[2] > 0 else 0.0
    # A rim above zero is no negative pedestal: wings that are steeper than those of `_WINGS` look like one.
    if certain < _PEDESTAL or abs(level) < 5 * error or typical < 0 <= level:
        return whole
    what = f"{typical:.3g} in all of its pixels, {100 * shares[1]:.0f} % of the flux of the rest"
    if not rest > 0 or abs(shares[2] - shares[0]) > _UNCLEAR:
        raise InputError(
            f"A PSF falls to zero; {name} has a pedestal of about {what}, which cannot be told from the wings of the "
            "PSF. Subtract its background, or give an image that reaches farther out."
        )
    warn(f"A PSF falls to zero; {name} has a pedestal of {what}, which is subtracted.")
    return whole - typical
