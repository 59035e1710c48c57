"""Real galaxies to learn from: a table of labels, a mosaic, or a dataset.

What reads images and tables is imported where it is needed: a machine that trains on datasets
alone has no Astropy.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import h5py
import numpy as np

from sersicnet.dataset import Arrays, Dataset
from sersicnet.errors import DatasetError, InputError, counted
from sersicnet.schema import (
    LOW_SNR_LIMIT,
    STAMP_SIZE,
    TARGET_NAMES,
    Inputs,
    noise_numbers,
    orientation,
    relative_magnitude,
)

if TYPE_CHECKING:
    from sersicnet.catalogue.parameters import Galaxies
    from sersicnet.simulating.telescopes import Instrument

STAMPS: frozenset[str] = frozenset({"stamps"})
"""The inputs of a network that is shown nothing else."""

APART = 3.0
"""Median distance between the pixels and the sky positions of labels above which they are of different images."""


def real_galaxies(
    path: str | Path,
    image: str | Path | None = None,
    zero_point: float | None = None,
    inputs: frozenset[str] = STAMPS,
) -> Arrays:
    """Galaxies of another domain: a table of labels, a dataset, or a mosaic without labels.

    Parameters
    ----------
    path : str or Path
        A table for labels, see `read_labels`; a FITS image (.fits, also .fits.gz,
        .fits.fz, or with an extension in brackets) for a mosaic, see
        `mosaic_galaxies`; anything else is a dataset. A FITS file whose first data are
        a table is a table.
    image, zero_point
        As for `read_labels`; a mosaic takes the zero point alone.
    inputs : frozenset of str
        What the network is shown, see `sersicnet.weights.Weights.inputs`: with the PSF and the noise, those of the
        images are measured.

    Returns
    -------
    Arrays
        With `Arrays.is_real` set throughout. The targets of a mosaic's galaxies
        are NaN.
    """
    if not h5py.is_hdf5(path):
        from sersicnet.catalogue.parameters import holds_table

        if holds_table(path):
            return read_labels(path, image, zero_point, inputs)
        if is_mosaic(path):
            return mosaic_galaxies(path, zero_point, inputs)
        check_dataset(path)
    elif image is not None or zero_point is not None:
        raise InputError(f"`image` and `zero_point` are for tables and images; {path} is a dataset. Leave them out.")
    with Dataset(path) as data:
        galaxies = data.selected(np.inf, None)
    galaxies.is_real[:] = True
    return galaxies


def is_mosaic(path: str | Path) -> bool:
    """Whether a file is an image by its ending, and no table: its galaxies have no labels."""
    from sersicnet.catalogue.parameters import holds_table

    return _MOSAIC.search(str(path)) is not None and not holds_table(path)


def check_dataset(path: str | Path) -> None:
    """Refuse a file that is neither a dataset nor a table, where a table would do as well.

    Raises
    ------
    DatasetError
    """
    if Path(path).is_file() and not h5py.is_hdf5(path):
        from sersicnet.catalogue.table import FORMATS

        raise DatasetError(
            f"Labelled galaxies are a table ({', '.join(FORMATS)}), or a dataset of `sersicnet simulate`; {path} is "
            "none of them, or it is incomplete."
        )


_MOSAIC = re.compile(r"\.fits?(\.fz|\.gz|\.bz2|\.xz)?(\[[^\[\]]+\])?$", re.IGNORECASE)

MOST_GALAXIES = 10_000
"""Galaxies of a mosaic held in memory: 655 MB."""


def mosaic_galaxies(
    path: str | Path,
    zero_point: float | None = None,
    inputs: frozenset[str] = STAMPS,
    like: tuple[np.ndarray, Instrument] | None = None,
) -> Arrays:
    """Detect the galaxies of a mosaic and cut their stamps; nothing is known of their parameters.

    Left out are sources with a signal to noise below 10, stamps that reach beyond
    the image or lack more than a tenth of their pixels, and what looks like a star
    (see `sersicnet.image.stars.find_stars`). Of more than `MOST_GALAXIES`, as many are
    taken at random, always the same.

    Parameters
    ----------
    path : str or Path
        FITS image, optionally with an extension in brackets.
    zero_point : float, optional
        AB magnitude of one image unit; from the header by default.
    inputs : frozenset of str
        As for `real_galaxies`.
    like : (ndarray, Instrument), optional
        Effective PSF, float, (P, P), and instrument of simulated galaxies: a network is shown these beside the stamps,
        instead of what the image shows.

    Returns
    -------
    Arrays
        With `Arrays.is_real` set and targets of NaN; magnitudes are those of the
        detected pixels.

    Raises
    ------
    InputError
        If the image cannot be used, or states no zero point.
    DatasetError
        If it has no galaxy left.
    """
    from sersicnet.image import detect, header, mosaic, stars
    from sersicnet.image.stamps import cut

    frame = mosaic.read_image(path)
    zero = header.zero_point(frame.header, zero_point, frame.scales).value
    bad = frame.without_data()
    sky, found = detect.Detector()(frame.data, bad)
    good = np.flatnonzero(stars.good_galaxies(frame.data, bad, sky, found))
    if not len(good):
        raise DatasetError(
            f"{frame.name} has no galaxy with a signal to noise of {LOW_SNR_LIMIT:g} and a stamp inside of it."
        )
    if len(good) > MOST_GALAXIES:
        good = np.sort(np.random.default_rng(0).choice(good, MOST_GALAXIES, replace=False))
    stamps = cut(frame.data, bad, sky, found.x[good], found.y[good], found.dilated(), good + 1)
    mags = zero - 2.5 * np.log10(found.flux[good])
    targets = np.full((len(good), len(TARGET_NAMES)), np.nan)
    views = noise = None
    if "psf" in inputs and like is not None:
        from sersicnet.image.views import psf_views

        psf, instrument = like
        views = np.tile(psf_views(psf), (len(good), 1, 1, 1))
        noise = noise_numbers(instrument.correlation, instrument.exposure * stamps.rms)
    elif "psf" in inputs:
        from sersicnet.training.shown import Shown

        shown = Shown(path, zero)
        views = shown.views(found.x[good], found.y[good])
        noise = np.tile(shown.noise, (len(good), 1))
    return Arrays(Inputs(stamps.pixels, views, noise), targets, np.ones(len(good), bool), mags)


def read_labels(
    path: str | Path,
    image: str | Path | None = None,
    zero_point: float | None = None,
    inputs: frozenset[str] = STAMPS,
) -> Arrays:
    """Cut the stamps of labelled real galaxies.

    Parameters
    ----------
    path : str or Path
        Table with the columns ``image`` (path, relative to the table; not needed with `image`, or in a catalogue of
        fits whose header has the image), ``x, y`` (zero-based) or ``ra, dec`` (degrees), ``mag`` (AB), ``r_eff_pix`` or
        ``r_eff`` (arcsec; both along the semi-major axis), ``sersic_n``, ``ellipticity`` or ``q``,
        and if known ``snr``, ``theta`` (degrees from +x) and ``psf`` (a file of the PSF, relative to the table; by
        default it is measured from the stars of the image), in any format, units and spelling that
        `sersicnet.catalogue.parameters.Galaxies` reads. Rows whose ``fit_status``, as
        `sersicnet fit` writes it, is not 0 are left out, and so are those in such a table whose
        fit went to a place outside of the image or without data.
    image : str or Path, optional
        The one image that all rows lie in.
    zero_point : float, optional
        AB magnitude of one image unit; by default from the header of the catalogue, if it states the image, or else
        from those of the images.
    inputs : frozenset of str
        As for `real_galaxies`.

    Returns
    -------
    Arrays
        In the order of the rows.

    Raises
    ------
    DatasetError
        If a column is missing, or a row is not numbers, not physical or outside
        of its image: the line or row is named.
    InputError
        If an image cannot be used.
    """
    from sersicnet.image import detect, header, mosaic
    from sersicnet.image.stamps import cut

    path = Path(path)
    try:
        labels = _Labels.read(path, image, zero_point)
    except InputError as error:  # such as a unit that is none of a radius
        raise DatasetError(str(error)) from error
    n = len(labels.mag)
    good = np.ones(n, bool)
    stamps = np.empty((n, STAMP_SIZE, STAMP_SIZE), np.float32)
    targets = np.empty((n, len(TARGET_NAMES)))
    beside = Inputs.empty(n) if "psf" in inputs else Inputs(stamps)
    by_image: dict[Path, list[int]] = {}
    for i, file_path in enumerate(labels.images):
        by_image.setdefault(file_path, []).append(i)
    for file_path, members in by_image.items():
        frame = mosaic.read_image(file_path)
        frame.check_wcs()
        zero = header.zero_point(frame.header, labels.zero_point, frame.scales).value
        places = labels.places[members]
        x, y = np.column_stack(frame.pixels(*places.T)).T if labels.on_sky else places.T
        if labels.sky is not None and frame.wcs is not None:
            apart = np.hypot(*(np.array(frame.pixels(*labels.sky[members].T)) - places.T))
            if np.isfinite(apart).any() and np.nanmedian(apart) > APART:
                raise DatasetError(
                    f"The x, y and the ra, dec of a row should be the same place; those of {path} are "
                    f"{np.nanmedian(apart):.1f} pixels apart in {frame.name}. Leave out those of another image."
                )
        scale = header.pixel_scale(frame.scales).value if labels.unit == "arcsec" else 1.0
        if not np.isfinite(scale):
            raise DatasetError(f"{path} has r_eff in arcsec, but {frame.name} has no WCS. Give r_eff_pix.")
        bad = frame.without_data()
        sky, found = detect.Detector()(frame.data, bad)
        dilated = found.dilated()
        height, width = frame.data.shape
        for k, i in enumerate(members):
            good[i] = -0.5 <= x[k] < width - 0.5 and -0.5 <= y[k] < height - 0.5
            if not good[i] and not labels.fitted:
                raise DatasetError(
                    f"{path}, {labels.where(i)}: x = {x[k]:g}, y = {y[k]:g} is outside of {frame.name}, "
                    f"which is {width} x {height} pixels."
                )
            if not good[i]:
                continue
            own = dilated[round(y[k]), round(x[k])]
            stamp = cut(frame.data, bad, sky, x[[k]], y[[k]], dilated, np.array([own]))
            good[i] = not stamp.empty[0] and np.isfinite(stamp.pixels).all()
            if not good[i] and not labels.fitted:
                raise DatasetError(
                    f"{path}, {labels.where(i)}: {frame.name} has no data at x = {x[k]:g}, y = {y[k]:g}."
                )
            if not good[i]:
                continue
            stamps[i] = stamp.pixels[0]
            relative = relative_magnitude(labels.mag[i], zero, stamp.rms[0])
            targets[i] = relative, labels.radius[i] / scale, labels.sersic_n[i], labels.ellipticity[i]
        if beside.psf is not None and (rows := [k for k, i in enumerate(members) if good[i]]):
            from sersicnet.training.shown import Shown

            shown, which = Shown(file_path, zero), [members[k] for k in rows]
            beside.psf[which] = shown.views(x[rows], y[rows], [labels.psf[i] for i in which] if labels.psf else ())
            beside.noise[which] = shown.noise
    if not good.any():
        raise DatasetError(f"No row of {path} lies in its image. Is it a table of another one?")
    turned = None if labels.theta is None else orientation(labels.ellipticity, labels.theta)
    arrays = Arrays(
        beside._replace(stamps=stamps), targets, np.ones(n, bool), labels.mag, labels.snr, orientation=turned
    )
    return arrays if good.all() else arrays.taken(np.flatnonzero(good))


class _Labels(NamedTuple):
    """The rows of a table of labels that are used, as physical numbers, float64, (N,).

    Attributes
    ----------
    images : list of Path
    places : ndarray, float64, (N, 2)
        Pixels, or degrees if `on_sky`.
    on_sky : bool
    sky : ndarray, float64, (N, 2) or None
        Degrees, if the table has them besides the pixels that are used.
    mag, radius, sersic_n, ellipticity
    unit : str
        That of `radius`: ``pix`` or ``arcsec``.
    snr, theta : ndarray or None
    psf : list of Path or None
        File of the PSF of each row; empty if the table has none.
    fitted : bool
        Whether `sersicnet fit` wrote it.
    where : callable
        The line or row of the table, for messages.
    """

    images: list[Path]
    places: np.ndarray
    on_sky: bool
    sky: np.ndarray | None
    mag: np.ndarray
    radius: np.ndarray
    sersic_n: np.ndarray
    ellipticity: np.ndarray
    unit: str
    snr: np.ndarray | None
    theta: np.ndarray | None
    psf: list[Path | None]
    fitted: bool
    zero_point: float | None
    where: Callable[[int], str]

    @classmethod
    def read(cls, path: Path, image: str | Path | None, zero_point: float | None) -> _Labels:
        """Read and check the labels, without opening the images."""
        from sersicnet.catalogue.parameters import Galaxies

        galaxies = Galaxies.read(path)
        galaxies.require(*TARGET_NAMES)
        if image is None and not has_images(galaxies):
            raise DatasetError(
                f"{path} needs a column image, the file of each row; finetune and evaluate take one for all with "
                "`image`."
            )
        if image is None and not galaxies.has("image"):
            stated = galaxies.table.meta
            image = _stated_image(path, str(stated["IMAGE"]))
            zero_point = stated.get("ZEROPT") if zero_point is None else zero_point
        sky, pixels = galaxies.sky(), galaxies.pixels()
        places = sky if pixels is None else pixels
        if places is None:
            raise DatasetError(f"{path} needs both x and y, or both ra and dec; it has {galaxies.columns}.")
        status = galaxies.parameter("fit_status")
        rows = np.arange(len(galaxies)) if status is None else np.flatnonzero(status == 0)
        if not len(rows):
            raise DatasetError(f"{path} has no rows{'' if status is None else ' with fit_status 0'}.")

        def where(i: int) -> str:
            return galaxies.row(int(rows[i]))

        if image is None:
            names = [galaxies.text("image")[i] for i in rows]
            if "" in names:
                raise DatasetError(f"{path}, {where(names.index(''))}: image is empty.")
            images = [path.parent / name for name in names]
        else:
            images = [Path(image)] * len(rows)
        radius, unit = galaxies.radius() or (np.empty(0), "")
        columns = {
            **dict(zip(("x", "y") if places is pixels else ("ra", "dec"), places.T, strict=True)),
            "mag": galaxies.parameter("mag"),
            "r_eff_pix": radius,
            "sersic_n": galaxies.parameter("sersic_n"),
            "ellipticity": galaxies.parameter("ellipticity"),
        }
        used = {name: values[rows] for name, values in columns.items() if values is not None}
        for name, values in used.items():
            wrong = ~np.isfinite(values) | _impossible(name, values)
            if wrong.any():
                i = int(wrong.argmax())
                column, value = galaxies.given(name, int(rows[i])) if name in TARGET_NAMES else (name, values[i])
                raise DatasetError(f"{path}, {where(i)}: {_in_words(name, column, value, int(wrong.sum()) - 1)}")
        first, second, mag, radius, n, e = used.values()
        snr, theta = galaxies.parameter("snr"), galaxies.parameter("theta")
        names = [galaxies.text("psf")[i] for i in rows] if galaxies.has("psf") else []
        return cls(
            images, np.column_stack([first, second]), places is sky,
            None if sky is None or places is sky else sky[rows], mag, radius, n, e, unit,
            None if snr is None else snr[rows], None if theta is None else theta[rows],
            [path.parent / name if name else None for name in names], status is not None, zero_point, where,
        )  # fmt: skip


def _in_words(name: str, column: str, value: float, others: int) -> str:
    """What is wrong with the value of a label, and with that of some other rows."""
    more = f" {counted(others, 'other row')} cannot be used for the same reason." if others else ""
    if not np.isfinite(value):
        return f"{column} should be a number; received {value:g}.{more}"
    unknown = "; it usually means that the magnitude is unknown" if name == "mag" else ""
    return f"{column} = {value:g} is not physical{unknown}. Correct the row, or leave it out.{more}"


def has_images(galaxies: Galaxies) -> bool:
    """Whether a table of labels states its images: in a column ``image``, or a catalogue of fits in its header."""
    return galaxies.has("image") or (galaxies.has("fit_status") and "IMAGE" in galaxies.table.meta)


def _stated_image(path: Path, name: str) -> Path:
    """The image in the header of a catalogue: a path from the current directory, or from that of the catalogue."""
    from sersicnet.catalogue.table import located

    places = {(place / name).resolve() for place in (Path(), path.parent)}
    found = [place for place in places if located(place)[0].is_file()]
    if len(found) != 1:
        why = "there are two of that name, here and" if found else "there is no such file, neither here nor"
        raise DatasetError(
            f"{path} is a catalogue of {name}, and {why} beside the catalogue. Give it a column image; finetune and "
            "evaluate take one image for all rows with `image`."
        )
    return found[0]


def _impossible(name: str, values: np.ndarray) -> np.ndarray:
    """Which values of a label no galaxy has, bool, (N,)."""
    from sersicnet.catalogue.parameters import possible

    return ~possible(name, values) if name in TARGET_NAMES else np.zeros(len(values), bool)
