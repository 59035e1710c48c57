"""Measure several bands: the same sources in each, which are detected once or listed in a table.

`measure_bands` detects sources on one image, and its sources are the places of each band: positions, ellipses and
pixels are carried over through both WCS, see `sersicnet.image.carried`. A tile detects again on the part of the
detection image that it needs, with the same result, so that no segmentation of a whole mosaic is kept. It also
measures the places of a table, and `fit_bands` fits the galaxies of one. Apart from that a band is measured as any
image is, with its own PSF, zero point, pixel scale and noise, in tiles that an interrupted run keeps. The catalogues
are joined at the end.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from astropy.table import QTable, Table

from sersicnet import weights as trained
from sersicnet.catalogue import crossmatch
from sersicnet.catalogue import report as pages
from sersicnet.catalogue import table as tables
from sersicnet.catalogue.chosen import Wanted, check, chosen, wanted
from sersicnet.catalogue.columns import Measurement
from sersicnet.catalogue.crossmatch import Reference
from sersicnet.catalogue.parameters import Galaxies
from sersicnet.errors import InputError
from sersicnet.image.carried import Carried, check_overlap, check_same_grid, check_sky, combined
from sersicnet.image.exposure import Exposure
from sersicnet.image.mosaic import FitsImage
from sersicnet.image.psf import Psf
from sersicnet.measuring.columns import no_values
from sersicnet.measuring.fitting import Fitting
from sersicnet.measuring.outputs import Files, Outputs, Result, differences_beside, write_comparison, write_each
from sersicnet.measuring.plan import Outlook, Plan, Work
from sersicnet.measuring.positions import galaxies_of, inside, places_of
from sersicnet.measuring.scene import DETECTOR
from sersicnet.output import Report, check_apart, check_output, silent
from sersicnet.schema import COLUMN, STAMP_SIZE
from sersicnet.weights import Weights

DETECTION = (
    "id", "ra", "dec", "x", "y", "a_image", "b_image", "area", "parent", "kron_radius", "mag_auto", "mag_auto_err",
    "snr", "x_err", "y_err", "ra_err", "dec_err",
)  # fmt: skip
"""Columns of the detection image in a catalogue of several bands."""

LISTED = ("id", "ra", "dec")
"""Columns of the sources of a table in a catalogue of several bands."""


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
    validated : str or Path, optional
        File of `sersicnet.measuring.validate.validate` for this band alone, whose factors its errors get.
    name : str
        Name in the columns of the catalogue; by default the filter of the header, or the name of the file.
    """

    exposure: Any
    psf: str | Path | Psf | None = None
    psf_fwhm: float | None = None
    gain: float | None = None
    validated: str | Path | None = None
    name: str = ""

    def opened(self) -> Band:
        """The same band with an Exposure."""
        return replace(self, exposure=Exposure.of(self.exposure))


@dataclass(frozen=True, eq=False, kw_only=True)
class BandsFiles:
    """The files of several bands after their checks.

    Attributes
    ----------
    catalogue : Path or None
        Catalogue of all bands, or a directory that gets one for each.
    each : dict of Files
        Files that each band has for itself, besides its catalogue.
    report : Path or None
        Page of all bands.
    references : dict of Reference
        Another catalogue to compare each band with; empty without one.
    """

    catalogue: Path | None
    each: dict[str, Files]
    report: Path | None
    references: dict[str, Reference]

    @classmethod
    def checked(cls, outputs: Outputs, bands: Sequence[str], exposures: Sequence[Exposure], *read: Any) -> BandsFiles:
        """Check all that is written, which replaces nothing that is read, and the catalogue to compare with."""
        files = cls(
            catalogue=None if outputs.catalogue is None else Path(outputs.catalogue),
            each={band: outputs.of_band(band).checked(None) for band in bands},
            report=Outputs(report=outputs.report, overwrite=outputs.overwrite).checked(None).report,
            references={} if outputs.match is None else Reference.read_bands(outputs.match, bands),
        )
        for path in files._catalogues:
            check_output(path, outputs.overwrite)
            tables.check_ending(path)
        for two in files.differences.values():
            for path in two:
                check_output(path, outputs.overwrite)
        written = [Path(os.path.realpath(path)) for path in files._paths]
        check_apart(written, *(image.path for exposure in exposures for image in exposure.images), *read)
        if twice := [path.name for path in written if written.count(path) > 1]:
            raise InputError(f"Each output needs a name of its own; two would be {twice[0]}.")
        return files

    @property
    def of_bands(self) -> dict[str, Path]:
        """The catalogue of each band; empty if there is one catalogue, or none."""
        if self.catalogue is None or not self.catalogue.is_dir():
            return {}
        return {band: self.catalogue / f"{band}_cat.fits" for band in self.each}

    @property
    def differences(self) -> dict[str, list[Path]]:
        """Table and figure of the comparison of each band, beside its catalogue."""
        if self.catalogue is None:
            return {}
        alone = self.of_bands
        return {
            band: differences_beside(alone[band]) if alone else differences_beside(self.catalogue, band)
            for band in self.references
        }

    @property
    def keep(self) -> Path | None:
        """Directory of unfinished work."""
        if self.catalogue is None or not self.catalogue.is_dir():
            return None if self.catalogue is None else self.catalogue.with_name(self.catalogue.name + ".run")
        return self.catalogue / "bands.run"

    @property
    def _catalogues(self) -> list[Path]:
        return list(self.of_bands.values()) or ([] if self.catalogue is None else [self.catalogue])

    @property
    def _paths(self) -> list[Path]:
        page = [] if self.report is None else [self.report]
        own = [path for files in self.each.values() for path in files.paths]
        return [*self._catalogues, *page, *own, *(path for both in self.differences.values() for path in both)]

    def write_products(self, results: Mapping[str, Result], sources: QTable) -> None:
        """Write all files but the catalogues; one that cannot be written does not stop the others.

        Raises
        ------
        InputError, OutputError
            If one cannot be written.
        """
        comparisons = {}
        if self.references:
            catalogues = {band: one.table for band, one in results.items()}
            comparisons = crossmatch.match_bands(sources, catalogues, self.references)
        products: list[Callable[[], None]] = [
            *(functools.partial(self.each[band].write_products, one) for band, one in results.items()),
            *(functools.partial(write_comparison, comparisons[band], *two) for band, two in self.differences.items()),
            lambda: self._write_report(results, comparisons),
        ]
        write_each(products, "" if self.catalogue is None else f"The catalogue is written in {self.catalogue}")

    def _write_report(self, results: Mapping[str, Result], comparisons: Mapping[str, crossmatch.Comparison]) -> None:
        if self.report is not None:
            runs = {
                band: Measurement(one.table, one.exposure, one.mesh_of_image(), one.draw)
                for band, one in results.items()
            }
            pages.write_report_of_bands(self.report, runs, comparisons)


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
    files : BandsFiles
    detected : str
        The band that sources are detected on; empty if it is none of them.
    columns : tuple of str
        As `sersicnet.catalogue.chosen.wanted` returns them.
    """

    detection: list[Plan]
    listed: QTable | None = None
    bands: dict[str, Plan]
    files: BandsFiles
    detected: str = ""
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
        keep = self.files.keep
        if keep is not None:
            keep.mkdir(exist_ok=True)
        try:
            return self._run(report)
        finally:
            if keep is not None:
                with suppress(OSError):  # what is unfinished stays
                    keep.rmdir()

    def _run(self, report: Report) -> list[tuple[QTable, Path | None]]:
        sources, found = self.listed, None
        if sources is None:
            inner = functools.partial(_prefixed, report, "detection: ")
            found = self._detection(inner).result(inner)
            sources = found.table[[name for name in DETECTION if name in found.table.colnames]]
        measured: dict[str, Result] = {}
        for name, plan in self.bands.items():
            if found is not None:
                carried = Carried(found.exposure, found.mesh, plan.exposure.image, DETECTOR)
                plan = replace(plan, places=carried.places(found.values.x0, found.values.y0), detector=carried)
            measured[name] = plan.result(functools.partial(_prefixed, report, f"{name}: "))
        # All files are written when all bands are measured.
        if paths := self.files.of_bands:
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
            if self.files.catalogue is not None:
                tables.write(table, self.files.catalogue)
            done = [(table, self.files.catalogue)]
        self.files.write_products(measured, sources)
        if self.files.keep is not None:
            shutil.rmtree(self.files.keep)
        return done

    def _detection(self, report: Report) -> Plan:
        """The plan of the image that sources are detected on: the only one, or all combined."""
        first = self.detection[0]
        if len(self.detection) == 1:
            return first
        exposure = combined([plan.exposure for plan in self.detection], [plan.sky(report) for plan in self.detection])
        return replace(first, exposure=exposure, source=exposure)


def plan_bands(
    bands: Sequence[Band],
    detect_on: Sequence[Any] = (),
    *,
    positions: str | Path | Table | None = None,
    weights: str | Path | Weights = trained.DEFAULT,
    refine: Fitting | None = None,
    debias: bool = False,
    columns: str | Sequence[str] = (),
    outputs: Outputs | None = None,
    work: Work | None = None,
    command: str = "",
    report: Report = silent,
) -> BandsPlan:
    """Check the parameters of `measure_bands`, with the same errors and warnings, without measuring."""
    work, outputs, asked = work or Work(), outputs or Outputs(), wanted(columns)
    if not bands or bool(detect_on) == (positions is not None):
        raise InputError(
            "Several bands are measured at the sources of an image or at the places of a table: give at least one "
            "band, and either `detect_on` or `positions`."
        )
    if debias and all(band.validated is None for band in bands):
        raise InputError("`debias` takes out the biases that a validation found: give `validated` with it.")
    bands, detect_on = [band.opened() for band in bands], [Exposure.of(one) for one in detect_on]
    names = _names(bands)
    if refine is None and outputs.of_fits:
        raise InputError(f"`{outputs.of_fits[0]}` belongs to fits: give `refine` with it.")
    galaxies = None if positions is None else _on_sky(positions, None, bands, shapes=False)
    exposures = [*(band.exposure for band in bands), *detect_on]
    if galaxies is None:
        for exposure in reversed(exposures):
            check_overlap(exposure.image, detect_on[0].image)
        check_same_grid(detect_on)
    given = [value for band in bands for value in (band.psf, band.validated)]
    files = BandsFiles.checked(outputs, names, exposures, positions, *given, refine and refine.prior)
    if not isinstance(weights, Weights):
        weights = trained.load(weights)
    detection = [
        Plan.of(
            exposure, network=None, psf=None, fitting=None, resample=False, positions=None, outputs=_none(outputs),
            work=_own_work(work, files.keep, "detection"), command=command, report=report,
        )
        for exposure in detect_on
    ]  # fmt: skip
    plans = {}
    for name, band in zip(names, bands, strict=True):
        fitting = refine if refine is None or band.gain is None else replace(refine, gain=band.gain)
        own = _own_work(work, files.keep, f"band-{name}")
        plan = Plan.of(
            band.exposure, network=weights, psf=band.psf, psf_fwhm=band.psf_fwhm, gain=band.gain, fitting=fitting,
            resample=False, positions=galaxies, outputs=outputs.of_band(name), command=command, report=report,
            validated=band.validated, debias=debias and band.validated is not None,
            work=own if galaxies is not None else replace(own, tile=_tile(work.tile, band.exposure, detect_on[0])),
        )  # fmt: skip
        plans[name] = replace(plan, files=Files(), columns=asked)
        _check_columns(asked, plans[name], outputs, DETECTION if galaxies is None else LISTED)
    only = detect_on[0] if len(detect_on) == 1 else None
    same = [name for name, band in zip(names, bands, strict=True) if only is not None and _is(band.exposure, only)]
    return BandsPlan(
        detection=detection, listed=None if galaxies is None else _listed(galaxies), bands=plans, files=files,
        detected=same[0] if same else "", columns=asked,
    )  # fmt: skip


def measure_bands(bands: Sequence[Band], detect_on: Sequence[Any] = (), **options: Any) -> QTable:
    """Measure several bands at the places of the sources of one image, or of a table.

    Parameters
    ----------
    bands : sequence of Band
        Bands may differ in pixel scale and orientation.
    detect_on : sequence of Exposure, or of what `Band` takes
        The image that sources are detected on, with a WCS. Several images on the same grid are combined first,
        weighted by their inverse variances. Not with positions.
    **options
        ``positions``, in place of `detect_on`: a table with ra and dec, as for `sersicnet.measuring.measure.measure`,
        which is measured in every band. ``weights``, ``refine``, ``debias``, ``columns``, ``outputs``, ``work``,
        ``command`` and ``report`` as there; biases are taken out of bands with a validation. Files of `outputs` are
        written for each band, and end in its name: ``model_F125W.fits``; the catalogue and the report are of all bands.

    Returns
    -------
    QTable
        One row for each detection, or for each row of the table, in its order and with its ids. The columns of
        `DETECTION` are of the detection image, those of a band end in its name, as in ``mag_F125W``. Values of sources
        outside a band are NaN, and flagged. ``flags`` has the flags of all bands.

    Raises
    ------
    InputError
        If an input cannot be used: a band or the detection image has no WCS, they do not overlap, or a band contains
        none of the positions. Nothing is written.
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
        if band.psf is None:
            raise InputError(f"Fits need the PSF of each band: there is none of {name}. Give `psf`.")
    galaxies = _on_sky(positions, from_band, bands, shapes=True)
    exposures = [band.exposure for band in bands]
    files = BandsFiles.checked(outputs, names, exposures, positions, fitting.prior, *(band.psf for band in bands))
    plans = {}
    for name, band in zip(names, bands, strict=True):
        plan = Plan.of(
            band.exposure, network=None, psf=band.psf, psf_fwhm=band.psf_fwhm,
            fitting=fitting if band.gain is None else replace(fitting, gain=band.gain),
            resample=False, positions=galaxies, outputs=outputs.of_band(name), command=command, report=report,
            work=_own_work(work, files.keep, f"band-{name}"), validated=band.validated,
        )  # fmt: skip
        plans[name] = replace(plan, files=Files(), columns=asked)
        _check_columns(asked, plans[name], outputs, LISTED)
    return BandsPlan(detection=[], listed=_listed(galaxies), bands=plans, files=files, columns=asked)


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
        Files of `outputs` are written for each band, and end in its name: ``model_F125W.fits``; the catalogue and the
        report are of all bands.

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


def _on_sky(positions: Any, from_band: str | None, bands: Sequence[Band], *, shapes: bool) -> Galaxies:
    """The galaxies of a table, checked: with positions on the sky, of which every band contains some."""
    for band in bands:
        check_sky(band.exposure.image)
    galaxies = galaxies_of(positions, from_band, shapes=shapes)
    if galaxies.sky() is None:
        raise InputError(
            f"Several bands have the same positions on the sky: {galaxies.name} needs columns ra and dec; it has "
            f"{galaxies.columns}."
        )
    for band in bands:
        _check_inside(band.exposure, galaxies)
    return galaxies


def _listed(galaxies: Galaxies) -> QTable:
    """The columns `LISTED` of the galaxies of a table."""
    sky, ids = galaxies.sky(), galaxies.ids()
    assert sky is not None
    known = {"id": np.arange(1, len(sky) + 1) if ids is None else ids, "ra": sky[:, 0], "dec": sky[:, 1]}
    return tables.assembled(known)


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
    places = places_of(galaxies, exposure)
    if len(places) and not inside(places, exposure).any():
        raise InputError(
            f"None of the {len(places)} positions of {galaxies.name} is inside {exposure.name}. Give an image of the "
            "same field, or correct the WCS."
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


def _tile(tile: int, band: Exposure, detected: Exposure) -> int:
    """Side of the tiles of a band, so that the part of the detection image that each needs is as large as a tile."""
    ratio = detected.pixel_scale.value / band.pixel_scale.value
    return tile if not ratio < 1 else max(round(tile * ratio), STAMP_SIZE)


def _prefixed(report: Report, prefix: str, stage: str, done: int, total: int) -> None:
    report(prefix + stage, done, total)
