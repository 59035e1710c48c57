"""Measure several bands: the same sources in each, which are detected once or listed in a table.

`measure_bands` detects sources on one image, and its sources are the places of each band: positions, ellipses and
pixels are carried over through both WCS, see `sersicnet.image.carried`. A tile detects again on the part of the
detection image that it needs, with the same result, so that no segmentation of a whole mosaic is kept. `fit_bands`
fits the galaxies of a table. Apart from that a band is measured as any image is, with its own PSF, zero point, pixel
scale and noise, in tiles that an interrupted run keeps. The catalogues are joined at the end.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from astropy.table import QTable, Table

from sersicnet import weights as trained
from sersicnet.catalogue import table as tables
from sersicnet.catalogue.chosen import Wanted, check, chosen, wanted
from sersicnet.catalogue.parameters import Galaxies
from sersicnet.errors import InputError, OutputError
from sersicnet.image.carried import Carried, check_overlap, check_same_grid, check_sky, combined
from sersicnet.image.exposure import Exposure
from sersicnet.image.mosaic import FitsImage
from sersicnet.image.psf import Psf
from sersicnet.measuring import tiles
from sersicnet.measuring.columns import no_values
from sersicnet.measuring.fitting import Fitting
from sersicnet.measuring.outputs import Files, Outputs, Result
from sersicnet.measuring.plan import Outlook, Plan, Work
from sersicnet.measuring.positions import galaxies_of, places_of
from sersicnet.output import Report, check_output, silent
from sersicnet.schema import COLUMN, STAMP_SIZE
from sersicnet.weights import Weights

DETECTION = (
    "id", "ra", "dec", "x", "y", "a_image", "b_image", "area", "parent", "kron_radius", "mag_auto", "mag_auto_err",
    "snr", "x_err", "y_err", "ra_err", "dec_err",
)  # fmt: skip
"""Columns of the detection image in a catalogue of several bands."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """A band with its own PSF, gain and name.

    Attributes
    ----------
    exposure : Exposure, or any input of `sersicnet.image.exposure.Exposure.of`
        With a WCS.
    psf : str, Path or Psf, optional
    psf_fwhm : float, optional
    gain : float, optional
        As for `sersicnet.measuring.measure.measure`; with fits, the gain is that of the fits, too.
    name : str
        Name in the columns of the catalogue; by default the filter of the header, or the name of the file.
    """

    exposure: Any
    psf: str | Path | Psf | None = None
    psf_fwhm: float | None = None
    gain: float | None = None
    name: str = ""

    def opened(self) -> Band:
        """The same band with an Exposure."""
        return replace(self, exposure=Exposure.of(self.exposure))


@dataclass(frozen=True, eq=False, kw_only=True)
class BandsPlan:
    """A measurement of several bands whose inputs are checked.

    Attributes
    ----------
    detection : list of Plan
        Plans of the images that are detected on together; empty if the sources are listed.
    listed : QTable or None
        Id, ra and dec of the sources of a table; None if they are detected.
    bands : dict of Plan
        Plans of the bands by their names, without places yet if sources are detected.
    files : dict of Files
        Files of each band besides the catalogue.
    detected : str
        The band that sources are detected on; empty if it is none of them.
    output : Path or None
        Catalogue of all bands, or a directory that gets one for each.
    keep : Path or None
        Directory of unfinished work.
    columns : tuple of str
        As `sersicnet.catalogue.chosen.wanted` returns them.
    """

    detection: list[Plan]
    listed: QTable | None = None
    bands: dict[str, Plan]
    files: dict[str, Files]
    detected: str = ""
    output: Path | None
    keep: Path | None
    columns: Wanted = ()

    def outlooks(self) -> list[Outlook]:
        """Describe the runs without measuring or writing anything: of the detection images, and of the bands."""
        return [plan.outlook() for plan in (*self.detection, *self.bands.values())]

    def run(self, report: Report = silent) -> list[tuple[QTable, Path | None]]:
        """Detect unless the sources are listed, measure all bands, and write.

        Returns
        -------
        list of (QTable, Path or None)
            The catalogue of all bands with its path, or the catalogue of each band.

        Raises
        ------
        OutputError, WorkError
            If a file cannot be written, or a worker was killed. Finished tiles are kept.
        """
        if self.keep is not None:
            self.keep.mkdir(exist_ok=True)
        try:
            return self._run(report)
        finally:
            if self.keep is not None:
                with suppress(OSError):  # what is unfinished stays
                    self.keep.rmdir()

    def _run(self, report: Report) -> list[tuple[QTable, Path | None]]:
        sources, found = self.listed, None
        if sources is None:
            inner = functools.partial(_prefixed, report, "detection: ")
            found = self._detection(inner).result(inner)
            sources = found.table[[name for name in DETECTION if name in found.table.colnames]]
        measured: dict[str, Result] = {}
        for name, plan in self.bands.items():
            if found is not None:
                carried = Carried(found.exposure, found.mesh, plan.exposure.image, tiles.DETECTOR)
                plan = replace(plan, places=carried.places(found.values.x0, found.values.y0), detector=carried)
            measured[name] = plan.result(functools.partial(_prefixed, report, f"{name}: "))
        # All files are written when all bands are measured.
        if self.output is not None and self.output.is_dir():
            paths = _paths_in(self.output, self.bands)
            done: list[tuple[QTable, Path | None]] = []
            for name, one in measured.items():
                tables.write(one.catalogue, paths[name])
                done.append((one.catalogue, paths[name]))
        else:
            each = {band: one.table for band, one in measured.items()}
            table = tables.side_by_side(sources, each, chosen(self.columns, COLUMN))
            if found is not None:
                table.meta["DETECTON"] = found.exposure.name
            if self.detected:
                table.meta["DETBAND"] = self.detected
            if self.output is not None:
                tables.write(table, self.output)
            done = [(table, self.output)]
        self._write_products(measured)
        if self.keep is not None:
            shutil.rmtree(self.keep)
        return done

    def _write_products(self, results: Mapping[str, Result]) -> None:
        failed = []
        for name, result in results.items():
            try:
                self.files[name].write_products(result)
            except (InputError, OutputError) as error:
                if self.output is None:
                    raise
                failed.append(str(error))
        if failed:
            raise OutputError(
                f"{' '.join(failed)} The catalogue is written in {self.output}; the same call with `overwrite` writes "
                "the rest."
            )

    def _detection(self, report: Report) -> Plan:
        """The plan of the image that sources are detected on: the only one, or all combined."""
        first = self.detection[0]
        if len(self.detection) == 1:
            return first
        exposure = combined([plan.exposure for plan in self.detection], [plan.sky(report) for plan in self.detection])
        return replace(first, exposure=exposure, source=exposure)


def plan_bands(
    bands: Sequence[Band],
    detect_on: Sequence[Any],
    *,
    weights: str | Path | Weights = trained.DEFAULT,
    refine: Fitting | None = None,
    columns: str | Sequence[str] = (),
    outputs: Outputs | None = None,
    work: Work | None = None,
    command: str = "",
    report: Report = silent,
) -> BandsPlan:
    """Check the parameters of `measure_bands`, with the same errors and warnings, without measuring."""
    work, outputs, listed = work or Work(), outputs or Outputs(), wanted(columns)
    if not bands or not detect_on:
        raise InputError("Several bands need at least one band and one image to detect on.")
    bands, detect_on = [band.opened() for band in bands], [Exposure.of(one) for one in detect_on]
    names = _names(bands)
    if refine is None and outputs.of_fits:
        raise InputError(f"`{outputs.of_fits[0]}` belongs to fits: give `refine` with it.")
    for exposure in detect_on:
        check_overlap(exposure.image, detect_on[0].image)
    for band in bands:
        check_overlap(band.exposure.image, detect_on[0].image)
    check_same_grid(detect_on)
    exposures = [*(band.exposure for band in bands), *detect_on]
    files, keep = _checked(outputs, names, exposures)
    if not isinstance(weights, Weights):
        weights = trained.load(weights)
    detection = [
        Plan.of(
            exposure, network=None, psf=None, fitting=None, resample=False, positions=None, outputs=_none(outputs),
            work=_own_work(work, keep, "detection"), command=command, report=report,
        )
        for exposure in detect_on
    ]  # fmt: skip
    plans = {}
    for name, band in zip(names, bands, strict=True):
        fitting = refine if refine is None or band.gain is None else replace(refine, gain=band.gain)
        tile = _tile(work.tile, band.exposure, detect_on[0])
        plan = Plan.of(
            band.exposure, network=weights, psf=band.psf, psf_fwhm=band.psf_fwhm, gain=band.gain, fitting=fitting,
            resample=False, positions=None, outputs=outputs.of_band(name), command=command, report=report,
            work=replace(_own_work(work, keep, f"band-{name}"), tile=tile),
        )  # fmt: skip
        plans[name] = replace(plan, files=Files(), columns=listed)
        _check_columns(listed, plans[name], outputs, DETECTION)
    same = [name for name, band in zip(names, bands, strict=True) if _is(band.exposure, detect_on[0])]
    return BandsPlan(
        detection=detection, bands=plans, files=files, detected=same[0] if same and len(detect_on) == 1 else "",
        output=None if outputs.catalogue is None else Path(outputs.catalogue), keep=keep, columns=listed,
    )  # fmt: skip


def measure_bands(bands: Sequence[Band], detect_on: Sequence[Any], **options: Any) -> QTable:
    """Measure several bands at the places of the sources of one image.

    Parameters
    ----------
    bands : sequence of Band
        Bands may differ in pixel scale and orientation.
    detect_on : sequence of Exposure, or of what `Band` takes
        The image that sources are detected on, with a WCS. Several images on the same grid are combined first,
        weighted by their inverse variances.
    **options
        ``weights``, ``refine``, ``columns``, ``outputs``, ``work``, ``command`` and ``report`` as for
        `sersicnet.measuring.measure.measure`. Files of `outputs` besides the catalogue are written for each band, and
        end in its name: ``model_F125W.fits``.

    Returns
    -------
    QTable
        One row for each detection. The columns of `DETECTION` are of the detection image, those of a band end in its
        name, as in ``mag_F125W``. Values of sources outside a band are NaN, and flagged. ``flags`` has the flags of
        all bands.

    Raises
    ------
    InputError
        If an input cannot be used: a band or the detection image has no WCS, or they do not overlap. Nothing is
        written.
    OutputError, WorkError
        If a file cannot be written, or a worker was killed. Finished tiles are kept.

    Warns
    -----
    SersicnetWarning
        As `sersicnet.measuring.measure.measure` for each band, and if the sources of a band are offset.
    """
    _check_file(options)
    report = options.pop("report", silent)
    return plan_bands(bands, detect_on, report=report, **options).run(report)[0][0]


def plan_fit_bands(
    bands: Sequence[Band],
    positions: str | Path | Table,
    *,
    fitting: Fitting | None = None,
    from_band: str | None = None,
    columns: str | Sequence[str] = (),
    outputs: Outputs | None = None,
    work: Work | None = None,
    command: str = "",
    report: Report = silent,
) -> BandsPlan:
    """Check the parameters of `fit_bands`, with the same errors and warnings, without fitting."""
    work, outputs, fitting = work or Work(), outputs or Outputs(), fitting or Fitting(prior="none")
    asked = wanted(columns)
    if not bands:
        raise InputError("Several bands need at least one band.")
    bands = [band.opened() for band in bands]
    names = _names(bands)
    for name, band in zip(names, bands, strict=True):
        check_sky(band.exposure.image)
        if band.psf is None:
            raise InputError(f"Fits need the PSF of each band: there is none of {name}. Give `psf`.")
    galaxies = galaxies_of(positions, from_band, shapes=True)
    sky = galaxies.sky()
    if sky is None:
        raise InputError(
            f"Several bands are fitted at positions on the sky: {galaxies.name} needs columns ra and dec; it has "
            f"{galaxies.columns}."
        )
    for band in bands:
        _check_inside(band.exposure, galaxies)
    files, keep = _checked(outputs, names, [band.exposure for band in bands])
    plans = {}
    for name, band in zip(names, bands, strict=True):
        plan = Plan.of(
            band.exposure, network=None, psf=band.psf, psf_fwhm=band.psf_fwhm,
            fitting=fitting if band.gain is None else replace(fitting, gain=band.gain),
            resample=False, positions=galaxies, outputs=outputs.of_band(name), command=command, report=report,
            work=_own_work(work, keep, f"band-{name}"),
        )  # fmt: skip
        plans[name] = replace(plan, files=Files(), columns=asked)
        _check_columns(asked, plans[name], outputs, ("id", "ra", "dec"))
    ids = galaxies.ids()
    listed = {"id": np.arange(1, len(sky) + 1) if ids is None else ids, "ra": sky[:, 0], "dec": sky[:, 1]}
    return BandsPlan(
        detection=[], listed=tables.assembled(listed), bands=plans, files=files,
        output=None if outputs.catalogue is None else Path(outputs.catalogue), keep=keep, columns=asked,
    )  # fmt: skip


def fit_bands(bands: Sequence[Band], positions: str | Path | Table, **options: Any) -> QTable:
    """Fit the galaxies of a table in several bands, without a network.

    With ``fitting=Fitting(prior="none", fix=["r_eff", "sersic_n", "ellipticity", "theta"])`` the shapes and positions
    of the table are kept, and only fluxes are measured.

    Parameters
    ----------
    bands : sequence of Band
        Each with its PSF. Bands may differ in pixel scale and orientation.
    positions : str, Path or Table
        Table of the galaxies with ra and dec, as for `sersicnet.measuring.measure.fit`, such as the catalogue of
        `measure_bands`.
    **options
        ``fitting``, ``columns``, ``outputs``, ``work``, ``command`` and ``report`` as for
        `sersicnet.measuring.measure.fit`;
        ``from_band``, the band of the table whose values are used, by default the one that sources were detected on.
        Files of `outputs` besides the catalogue are written for each band, and end in its name: ``model_F125W.fits``.

    Returns
    -------
    QTable
        One row for each row of the table, in its order and with its ids. The columns of a band end in its name, as in
        ``flux_F125W``. Values of sources outside a band are NaN, and flagged. ``flags`` has the flags of all bands.

    Raises
    ------
    InputError
        If an input cannot be used: a band has no WCS or no PSF, or contains none of the positions. Nothing is
        written.
    OutputError, WorkError
        If a file cannot be written, or a worker was killed. Finished tiles are kept.

    Warns
    -----
    SersicnetWarning
        As `sersicnet.measuring.measure.fit` for each band, and if the sources of a band are offset from positions
        that are kept.
    """
    _check_file(options)
    report = options.pop("report", silent)
    return plan_fit_bands(bands, positions, report=report, **options).run(report)[0][0]


def _check_file(options: Mapping[str, Any]) -> None:
    """Refuse a directory for the only catalogue."""
    outputs = options.get("outputs") or Outputs()
    if outputs.catalogue is not None and Path(outputs.catalogue).is_dir():
        raise InputError(
            f"The catalogue of several bands is a file; received {outputs.catalogue}, a directory. Add a name."
        )


def _check_columns(listed: Wanted, plan: Plan, outputs: Outputs, sources: Sequence[str]) -> None:
    """Refuse columns that the catalogue of a band, or the one of all bands, cannot have."""
    places = np.zeros((0, 2)) if plan.places is None else plan.places
    of_band = replace(plan, places=places).table(no_values()).colnames
    alone = outputs.catalogue is not None and Path(outputs.catalogue).is_dir()
    check(listed, of_band if alone else {*of_band, *sources})


def _checked(
    outputs: Outputs, names: Sequence[str], exposures: Sequence[Exposure]
) -> tuple[dict[str, Files], Path | None]:
    """The files of each band besides the catalogue, and the directory of unfinished work; check all that is written."""
    if outputs.match is not None:
        raise InputError("`match` compares the catalogue of one image: leave it out, or measure one band.")
    keep, catalogues = None, []
    if outputs.catalogue is not None:
        output = Path(outputs.catalogue)
        catalogues = list(_paths_in(output, names).values()) if output.is_dir() else [output]
        for path in catalogues:
            check_output(path, outputs.overwrite)
            tables.check_ending(path)
        keep = output / "bands.run" if output.is_dir() else output.with_name(output.name + ".run")
    files = {name: outputs.of_band(name).checked(None) for name in names}
    written = [Path(os.path.realpath(path)) for path in (*catalogues, *(p for f in files.values() for p in f.paths))]
    read = {
        Path(os.path.realpath(image.path))
        for exposure in exposures
        for image in exposure.images
        if image.path is not None
    }
    if lost := [path.name for path in written if path in read]:
        raise InputError(f"No output replaces an image; received {lost[0]} for both. Give another name.")
    if twice := [path.name for path in written if written.count(path) > 1]:
        raise InputError(f"Each output needs a name of its own; two would be {twice[0]}.")
    return files, keep


def _none(outputs: Outputs) -> Outputs:
    return Outputs(overwrite=outputs.overwrite)


def _own_work(work: Work, keep: Path | None, name: str) -> Work:
    return replace(work, run=None if keep is None else keep / name)


def _is(exposure: Exposure, other: Exposure) -> bool:
    """Whether both are the same image."""
    image, another = exposure.image, other.image
    return image is another or (isinstance(image, FitsImage) and image.is_in(another))


def _check_inside(exposure: Exposure, galaxies: Galaxies) -> None:
    """Refuse a band that contains none of the positions."""
    height, width = exposure.shape
    x, y = places_of(galaxies, exposure).T
    with np.errstate(invalid="ignore"):
        inside = (x > -0.5) & (x < width - 0.5) & (y > -0.5) & (y < height - 0.5)
    if len(x) and not inside.any():
        raise InputError(
            f"None of the {len(x)} positions of {galaxies.name} is inside {exposure.name}. Give an image of the same "
            "field, or correct the WCS."
        )


def _names(bands: Sequence[Band]) -> list[str]:
    """The name of each band: the user's, that of the filter if no two are alike, or that of the file."""
    for k, band in enumerate(bands):
        if any(_is(band.exposure, other.exposure) and not (band.name and other.name) for other in bands[:k]):
            raise InputError(f"Each band is given once; received {band.exposure.name} twice.")
    filters = [band.name or filter_of(band.exposure.image.header) for band in bands]
    if not all(filters) or len(set(filters)) < len(filters):
        filters = [band.name or tables.stem(Path(band.exposure.name)) for band in bands]
    names = [re.sub(r"\W+", "_", name) for name in filters]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"Each band needs a name of its own; two would be {twice}. Rename a file.")
    if taken := [f"{column}_{name}" for name in names for column in COLUMN if f"{column}_{name}" in COLUMN]:
        raise InputError(f"The name of a band makes columns of its own; it would make {taken[0]}. Rename its file.")
    return names


def filter_of(header: Mapping[str, Any]) -> str:
    """The filter that a header states, in FILTER, FILTER1, FILTER2 or BAND; empty if it states none."""
    for keyword in ("FILTER", "FILTER1", "FILTER2", "BAND"):
        found = str(header.get(keyword, "") or "").strip()
        if found and not found.upper().startswith(("CLEAR", "NONE", "N/A")):
            return found
    return ""


def _paths_in(directory: Path, names: Iterable[str]) -> dict[str, Path]:
    """The catalogue of each band in a directory."""
    return {name: directory / f"{name}_cat.fits" for name in names}


def _tile(tile: int, band: Exposure, detected: Exposure) -> int:
    """Side of the tiles of a band, so that the part of the detection image that each needs is as large as a tile."""
    ratio = detected.pixel_scale.value / band.pixel_scale.value
    return tile if not ratio < 1 else max(round(tile * ratio), STAMP_SIZE)


def _prefixed(report: Report, prefix: str, stage: str, done: int, total: int) -> None:
    report(prefix + stage, done, total)
