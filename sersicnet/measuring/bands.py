"""Measure several bands: sources are detected once, and every band is cut at the same places with the same neighbours.

The sources of the detection image are the places of each band, and their positions, ellipses and pixels are carried
over through both WCS, see `sersicnet.image.carried`. Apart from that a band is measured as any image is, with its own
PSF, zero point, pixel scale and noise, in tiles that an interrupted run keeps. A tile detects again on the part of the
detection image that it needs, with the same result, so that no segmentation of a whole mosaic is kept. The catalogues
are joined at the end.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from astropy.table import QTable

from sersicnet import weights as trained
from sersicnet.catalogue import table as tables
from sersicnet.catalogue.chosen import Wanted, check, chosen, wanted
from sersicnet.errors import InputError
from sersicnet.image.carried import Carried, check_overlap, check_same_grid, combined
from sersicnet.image.exposure import Exposure
from sersicnet.image.psf import Psf
from sersicnet.measuring import tiles
from sersicnet.measuring.columns import no_values
from sersicnet.measuring.fitting import Fitting
from sersicnet.measuring.outputs import Outputs, Result
from sersicnet.measuring.plan import Outlook, Plan, Work
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
    """A band with what belongs to it alone.

    Attributes
    ----------
    exposure : Exposure
        With a WCS.
    psf : str, Path or Psf, optional
    psf_fwhm : float, optional
    gain : float, optional
        As for `sersicnet.measuring.measure.measure`; with `refine`, the gain is that of the fits, too.
    name : str
        Name in the columns of the catalogue; by default the filter of the header, or the name of the file.
    """

    exposure: Exposure
    psf: str | Path | Psf | None = None
    psf_fwhm: float | None = None
    gain: float | None = None
    name: str = ""


@dataclass(frozen=True, eq=False, kw_only=True)
class BandsPlan:
    """A measurement of several bands whose inputs are checked.

    Attributes
    ----------
    detection : list of Plan
        Plans of the images that are detected on together.
    bands : dict of Plan
        Plans of the bands by their names, without places yet.
    output : Path or None
        Catalogue of all bands, or a directory that gets one for each.
    keep : Path or None
        Directory of unfinished work.
    columns : tuple of str
        As `sersicnet.catalogue.chosen.wanted` returns them.
    """

    detection: list[Plan]
    bands: dict[str, Plan]
    output: Path | None
    keep: Path | None
    columns: Wanted = ()

    def outlooks(self) -> list[Outlook]:
        """Describe the runs without measuring or writing anything: of the detection images, and of the bands."""
        return [plan.outlook() for plan in (*self.detection, *self.bands.values())]

    def run(self, report: Report = silent) -> list[tuple[QTable, Path | None]]:
        """Detect, measure all bands, and write.

        Returns
        -------
        list of (QTable, Path or None)
            The catalogue of all bands with its path, or the catalogue of each band.
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
        inner = functools.partial(_prefixed, report, "detection: ")
        found = self._detection(inner).result(inner)
        x, y = found.values.x0, found.values.y0
        measured: dict[str, Result] = {}
        for name, plan in self.bands.items():
            carried = Carried(found.exposure, found.mesh, plan.exposure.image, tiles.DETECTOR)
            own = replace(plan, places=carried.places(x, y), detector=carried)
            measured[name] = own.result(functools.partial(_prefixed, report, f"{name}: "))
        # The catalogues are written when all bands are measured.
        if self.output is not None and self.output.is_dir():
            paths = _paths_in(self.output, self.bands)
            done: list[tuple[QTable, Path | None]] = []
            for name, one in measured.items():
                tables.write(one.catalogue, paths[name])
                done.append((one.catalogue, paths[name]))
        else:
            names = chosen(self.columns, COLUMN)
            detections = found.table[[c for c in DETECTION if c in names and c in found.table.colnames]]
            each = {band: one.table[[c for c in one.table.colnames if c in names]] for band, one in measured.items()}
            table = tables.side_by_side(detections, each)
            table.meta["DETECTON"] = found.exposure.name
            if self.output is not None:
                tables.write(table, self.output)
            done = [(table, self.output)]
        if self.keep is not None:
            shutil.rmtree(self.keep)
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
    detect_on: Sequence[Exposure],
    *,
    weights: str | Path | Weights = trained.DEFAULT,
    refine: Fitting | None = None,
    columns: str | Sequence[str] = (),
    output: Path | None = None,
    overwrite: bool = False,
    work: Work | None = None,
    command: str = "",
    report: Report = silent,
) -> BandsPlan:
    """Check the parameters of `measure_bands`, with the same errors and warnings, without measuring."""
    work, listed = work or Work(), wanted(columns)
    if not bands or not detect_on:
        raise InputError("Several bands need at least one band and one image to detect on.")
    names = _names(bands)
    for exposure in detect_on:
        check_overlap(exposure.image, detect_on[0].image)
    for band in bands:
        check_overlap(band.exposure.image, detect_on[0].image)
    check_same_grid(detect_on)
    keep = None
    if output is not None and output.is_dir():
        for path in _paths_in(output, names).values():
            check_output(path, overwrite)
        keep = output / "bands.run"
    elif output is not None:
        check_output(output, overwrite)
        tables.check_ending(output)
        keep = output.with_name(output.name + ".run")
    if not isinstance(weights, Weights):
        weights = trained.load(weights)

    def own_work(name: str, tile: int) -> Work:
        return replace(work, tile=tile, run=None if keep is None else keep / name)

    outputs = Outputs(overwrite=overwrite)
    detection = [
        Plan.of(
            exposure, network=None, psf=None, fitting=None, resample=False, positions=None, outputs=outputs,
            work=own_work("detection", work.tile), command=command, report=report,
        )
        for exposure in detect_on
    ]  # fmt: skip
    plans = {}
    for name, band in zip(names, bands, strict=True):
        fitting = refine if refine is None or band.gain is None else replace(refine, gain=band.gain)
        plan = Plan.of(
            band.exposure, network=weights, psf=band.psf, psf_fwhm=band.psf_fwhm, gain=band.gain, fitting=fitting,
            resample=False, positions=None, outputs=outputs, command=command, report=report,
            work=own_work(f"band-{name}", _tile(work.tile, band.exposure, detect_on[0])),
        )  # fmt: skip
        plans[name] = replace(plan, columns=listed)
        of_band = replace(plan, places=np.zeros((0, 2))).table(no_values()).colnames
        check(listed, of_band if output is not None and output.is_dir() else {*of_band, *DETECTION})
    return BandsPlan(detection=detection, bands=plans, output=output, keep=keep, columns=listed)


def measure_bands(bands: Sequence[Band], detect_on: Sequence[Exposure], **options: Any) -> QTable:
    """Measure several bands at the places of the sources of one image.

    Parameters
    ----------
    bands : sequence of Band
        Bands may differ in pixel scale and orientation.
    detect_on : sequence of Exposure
        The image that sources are detected on, with a WCS. Several images on the same grid are combined first,
        weighted by their inverse variances.
    **options
        ``weights``, ``refine``, ``columns``, ``work``, ``command`` and ``report`` as for
        `sersicnet.measuring.measure.measure`; ``output``, the path of the catalogue, and ``overwrite``.

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
    output = options.get("output")
    if output is not None and Path(output).is_dir():
        raise InputError(f"The catalogue of several bands is a file; received {output}, a directory. Add a name.")
    report = options.pop("report", silent)
    return plan_bands(bands, detect_on, report=report, **options).run(report)[0][0]


def _names(bands: Sequence[Band]) -> list[str]:
    """The name of each band: the user's, that of the filter if no two are alike, or that of the file."""
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
