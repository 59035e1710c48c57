"""Files that a run writes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from astropy.table import QTable

from sersicnet import output
from sersicnet.catalogue import crossmatch, ds9, report
from sersicnet.catalogue import table as tables
from sersicnet.catalogue.chosen import Wanted, chosen
from sersicnet.catalogue.columns import Draw
from sersicnet.catalogue.crossmatch import Comparison, Reference
from sersicnet.errors import InputError, OutputError
from sersicnet.image.exposure import Exposure
from sersicnet.image.pixels import Source
from sersicnet.image.psf import Psf
from sersicnet.image.psffile import write_psf
from sersicnet.image.sky import Mesh, estimate_sky
from sersicnet.measuring import tiles
from sersicnet.measuring.fitting import Fitters
from sersicnet.measuring.scene import DETECTOR, Values
from sersicnet.measuring.seeing import Seeing

_IMAGES = (".fits", ".fit", ".fits.gz")
_ENDINGS = {"model": _IMAGES, "residual": _IMAGES, "regions": (".reg",), "report": (".html",), "psf_out": _IMAGES}
_KINDS = {
    "model": "An image",
    "residual": "An image",
    "regions": "A region file",
    "report": "A report",
    "psf_out": "A PSF",
}


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Files to write; a file that is None is not written.

    Attributes
    ----------
    catalogue : str or Path, optional
        Catalogue: .fits, .ecsv, .csv, .parquet or .vot.
    model, residual : str or Path, optional
        FITS images of the models of all fitted galaxies, and of the image minus sky and models.
    regions : str or Path, optional
        Region file for ds9, .reg.
    report : str or Path, optional
        Report on the run, .html; one for all bands.
    psf_out : str or Path, optional
        FITS file of the PSF that was used, which `sersicnet.image.psffile.read_psf` reads.
    match : str or Path, optional
        Another catalogue to compare with: ``NAME_match.md`` and ``.png`` are written beside the
        catalogue, and the report shows the comparison. For several bands, ``NAME_match_F125W.md`` and so on.
    overwrite : bool
        Whether to replace existing files, and to drop an unfinished run with other options.
    """

    catalogue: str | Path | None = None
    model: str | Path | None = None
    residual: str | Path | None = None
    regions: str | Path | None = None
    report: str | Path | None = None
    psf_out: str | Path | None = None
    match: str | Path | None = None
    overwrite: bool = False

    @property
    def of_fits(self) -> list[str]:
        """Names of the requested outputs that need fits."""
        return [name for name in ("model", "residual") if getattr(self, name) is not None]

    def of_band(self, band: str) -> Outputs:
        """The files that one of several bands has for itself: ``model.fits`` is ``model_F125W.fits``."""
        own: dict[str, Any] = {}
        for name, endings in _ENDINGS.items():
            given = getattr(self, name)
            if given is not None:
                path = Path(given)
                ending = max((one for one in endings if path.name.endswith(one)), key=len, default=path.suffix)
                own[name] = path.with_name(f"{path.name.removesuffix(ending)}_{band}{ending}")
        return replace(self, **{**own, "catalogue": None, "report": None, "match": None})

    def checked(self, *read: Any) -> Files:
        """Check that the files can be written.

        Parameters
        ----------
        *read : any
            Paths that are read, which no output may replace, see `sersicnet.output.check_apart`.

        Raises
        ------
        InputError
            If a file exists and `overwrite` is not set, if a file has a wrong ending or the name of
            another file, or if the catalogue to match cannot be used.
        """
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        paths = {
            name: output.check_output(path, self.overwrite)
            for name, path in given.items()
            if name not in ("match", "overwrite") and path is not None
        }
        for name, path in paths.items():
            if name == "catalogue":
                tables.check_ending(path)
            elif not path.name.endswith(_ENDINGS[name]):
                raise InputError(f"{_KINDS[name]} ends in {' or '.join(_ENDINGS[name])}; received {path.name}.")
        files = Files(**paths, reference=None if self.match is None else Reference.read(self.match))
        more = [output.check_output(path, self.overwrite) for path in files.differences]
        names = [Path(os.path.realpath(path)) for path in (*paths.values(), *more)]
        if len(set(names)) < len(names):
            raise InputError(f"Each output needs a name of its own; received {', '.join(p.name for p in names)}.")
        output.check_apart(names, self.match, *read)
        return files


@dataclass(frozen=True)
class Result:
    """Results of a run, which its files are written from.

    Attributes
    ----------
    table : QTable
        With all columns that the run can have.
    exposure : Exposure
        The original image.
    source : Source
        The image that was measured: the exposure, or the exposure resampled.
    mesh : Mesh
        Sky and noise of `source`.
    values : Values
    fitters : Fitters or None
    psf : Psf or None
        The PSF that was used, in pixels of the exposure.
    tile : int
        Side of the tiles that images are written in, pixels.
    seen : Seeing or None
        The PSF that the network was shown.
    columns : tuple of str
        Those that are wanted, as `sersicnet.catalogue.chosen.wanted` returns them.
    """

    table: QTable
    exposure: Exposure
    source: Source
    mesh: Mesh
    values: Values
    fitters: Fitters | None
    psf: Psf | None
    tile: int
    seen: Seeing | None = None
    columns: Wanted = ()

    @property
    def catalogue(self) -> QTable:
        """The table with the columns that are wanted."""
        return self.table[chosen(self.columns, self.table.colnames)]

    @property
    def draw(self) -> Draw | None:
        """A function that draws the models of all fitted galaxies in a window; None without fits."""
        if self.fitters is None:
            return None
        parameters = self.values.parameters(self.exposure.zero_point.value)
        return functools.partial(self.fitters.drawn, parameters=parameters, x=self.values.x0, y=self.values.y0)

    def mesh_of_image(self) -> Mesh:
        """Sky and noise of the original image."""
        if self.source is self.exposure:
            return self.mesh
        return estimate_sky(self.exposure, DETECTOR.threshold)


@dataclass(frozen=True)
class Files:
    """The files of `Outputs` after its checks."""

    catalogue: Path | None = None
    model: Path | None = None
    residual: Path | None = None
    regions: Path | None = None
    report: Path | None = None
    psf_out: Path | None = None
    reference: Reference | None = None

    @property
    def differences(self) -> list[Path]:
        """Table and figure of the comparison with another catalogue, written beside the catalogue."""
        if self.reference is None or self.catalogue is None:
            return []
        return differences_beside(self.catalogue)

    @property
    def paths(self) -> list[Path]:
        """All of the files."""
        own = (getattr(self, field.name) for field in fields(self) if field.name != "reference")
        return [*(path for path in own if path is not None), *self.differences]

    def write(self, found: Result) -> None:
        """Write the catalogue first, and then the other files, so that an error in these does not lose the catalogue.

        Raises
        ------
        OutputError
            If a file cannot be written.
        """
        if self.catalogue is not None:
            table = found.catalogue
            if chosen(found.columns, ("image",)):
                table = tables.with_image(table, self.catalogue)
            tables.write(table, self.catalogue)
        self.write_products(found)

    def write_products(self, found: Result) -> None:
        """Write all files but the catalogue.

        Raises
        ------
        InputError, OutputError
            If one cannot be written; beside a catalogue, the others are written all the same.
        """
        comparison = None if self.reference is None else crossmatch.match(found.table, self.reference)
        products: list[Callable[[], None]] = [
            lambda: self._write_images(found),
            lambda: self._write_regions(found),
            lambda: self._write_psf(found),
            lambda: self._write_comparison(comparison),
            lambda: self._write_report(found, comparison),
        ]
        write_each(products, "" if self.catalogue is None else f"{self.catalogue} is written")

    def _write_images(self, found: Result) -> None:
        if found.draw is None or (self.model is None and self.residual is None):
            return
        image = found.exposure.image
        with (
            tables.writing_image(image, self.model) as model,
            tables.writing_image(image, self.residual) as residual,
        ):
            for core in tiles.cores(image.shape, found.tile):
                drawn = found.draw(core)
                if model is not None:
                    model[core] = drawn
                if residual is not None:
                    pixels = found.exposure.read(core)
                    residual[core] = pixels.data - found.mesh.at(core, pixels).level - drawn

    def _write_regions(self, found: Result) -> None:
        if self.regions is not None:
            ds9.write_regions(found.table, self.regions, found.exposure.image)

    def _write_psf(self, found: Result) -> None:
        if self.psf_out is not None and found.psf is not None:
            write_psf(self.psf_out, found.psf, found.exposure.shape)

    def _write_comparison(self, comparison: Comparison | None) -> None:
        if comparison is None or not self.differences:
            return
        write_comparison(comparison, *self.differences)

    def _write_report(self, found: Result, comparison: Comparison | None) -> None:
        if self.report is not None:
            report.write_report(self.report, found.table, found.exposure, found.mesh_of_image(), found.draw, comparison)


def differences_beside(catalogue: Path, band: str = "") -> list[Path]:
    """Table and figure of the comparison of a catalogue, or of a band in it, with another catalogue."""
    name = f"{tables.stem(catalogue)}_match{band and '_'}{band}"
    return [catalogue.with_name(name + ending) for ending in (".md", ".png")]


def write_each(products: Sequence[Callable[[], None]], written: str) -> None:
    """Write files one after the other; beside a catalogue, one that cannot be written does not stop the others.

    Parameters
    ----------
    products : sequence of callable
        Each writes a file.
    written : str
        The catalogue beside them, in words; empty without one: then the first failure ends the writing.

    Raises
    ------
    InputError, OutputError
        If one cannot be written.
    """
    failed = []
    for product in products:
        try:
            product()
        except (InputError, OutputError) as error:
            if not written:
                raise
            failed.append(str(error))
    if failed:
        raise OutputError(f"{' '.join(failed)} {written}; the same call with `overwrite` writes the rest.")


def write_comparison(comparison: Comparison, text: Path, figure: Path) -> None:
    """Write the comparison of a catalogue with another one.

    Raises
    ------
    OutputError
        If a file cannot be written.
    """
    with output.whole(text) as partial:
        partial.write_text(comparison.as_markdown(), "utf-8")
    comparison.draw(figure)
