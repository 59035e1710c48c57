"""Measure the galaxies of an image: the input is an image, the result a catalogue with flags.

`measure` predicts parameters with a network; with ``refine`` it also fits Sersic profiles, starting
from the network's predictions. `fit` uses no network, as GALFIT does: its fits start from a table or
from moments. Both make and run a `sersicnet.measuring.plan.Plan`.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from astropy.table import QTable, Table

from sersicnet import weights as trained
from sersicnet.catalogue import chosen
from sersicnet.catalogue import table as tables
from sersicnet.catalogue.measured import Catalogue
from sersicnet.errors import DatasetError, InputError
from sersicnet.image.exposure import Exposure
from sersicnet.image.psf import Psf
from sersicnet.measuring.fitting import Fitting
from sersicnet.measuring.outputs import Outputs
from sersicnet.measuring.plan import Plan, Work
from sersicnet.output import Report, check_apart, check_output, silent
from sersicnet.weights import Weights


def plan(
    exposure: Any,
    *,
    weights: str | Path | Weights = trained.DEFAULT,
    psf: str | Path | Psf | None = None,
    psf_fwhm: float | None = None,
    gain: float | None = None,
    refine: Fitting | None = None,
    resample: bool = False,
    positions: str | Path | Table | None = None,
    validated: str | Path | None = None,
    debias: bool = False,
    columns: str | Sequence[str] = (),
    outputs: Outputs | None = None,
    work: Work | None = None,
    command: str = "",
    report: Report = silent,
    **options: Any,
) -> Plan:
    """Check the parameters of `measure`, with the same errors and warnings, without measuring.

    Returns
    -------
    Plan
        Its ``outlook()`` describes the run, and its ``run()`` starts it.
    """
    exposure = _opened(exposure, options, report)
    outputs = outputs or Outputs()
    if refine is None and outputs.of_fits:
        raise InputError(f"`{outputs.of_fits[0]}` belongs to fits: give `refine` with it.")
    if refine is not None and resample:
        raise InputError(
            "Fits are of the image itself: give `resample` without `refine`; or fit by `sersicnet fit`, which needs no "
            "network and works at any pixel scale."
        )
    return Plan.of(
        exposure, network=weights, psf=psf, psf_fwhm=psf_fwhm, gain=gain, fitting=refine, resample=resample,
        positions=positions, validated=validated, debias=debias, wanted=columns, outputs=outputs,
        work=work or Work(), command=command, report=report,
    )  # fmt: skip


def measure(
    exposure: Any,
    *,
    weights: str | Path | Weights = trained.DEFAULT,
    psf: str | Path | Psf | None = None,
    psf_fwhm: float | None = None,
    gain: float | None = None,
    refine: Fitting | None = None,
    resample: bool = False,
    positions: str | Path | Table | None = None,
    validated: str | Path | None = None,
    debias: bool = False,
    columns: str | Sequence[str] = (),
    outputs: Outputs | None = None,
    work: Work | None = None,
    command: str = "",
    report: Report = silent,
    **options: Any,
) -> Catalogue:
    """Measure the galaxies of an image.

    Parameters
    ----------
    exposure : Exposure, or any input of `sersicnet.image.exposure.Exposure.of`
        The image in any linear unit, with its maps: a path, an HDU, an NDData, an array.
    weights : str, Path or Weights
        Name of shipped weights, or a weights directory.
    psf : str, Path or Psf, optional
        The effective PSF of the image, see `sersicnet.image.psffile.read_psf`. Networks for any telescope are
        shown it, and the fits use it; by default it is measured from the stars of the image. With weights of one
        telescope, its width is compared with their domain, and the fits use the PSF of that domain by default.
    psf_fwhm : float, optional
        FWHM of the PSF in pixels, if only its width is known, for networks that are shown the PSF.
    gain : float, optional
        Electrons per image unit, for networks that are shown the photon noise of galaxies. That of the fits is an
        option of `refine`.
    refine : Fitting, optional
        Fit a Sersic profile to each source, starting from the network's predictions;
        overlapping neighbours are fitted simultaneously. If a fit does not converge, the catalogue
        keeps the network's values. The default gain is the one of the weights' domain.
    resample : bool
        Whether to resample the image to the pixel scale of the weights, conserving flux. The
        catalogue is still in pixels of the original image, except for the circle of ``mag_aper``.
        It excludes `refine`: fits work at any pixel scale.
    positions : str, Path or Table, optional
        Table with positions, see `sersicnet.catalogue.parameters`: these are measured instead of detected
        sources, one row each, in the order of the table and with its ids. If the table has both pixel and sky
        positions, the sky positions are used, provided that the image has a WCS.
    validated : str or Path, optional
        File of `sersicnet.measuring.validate.validate` for the same mosaic and options: its factors are applied to
        the errors.
    debias : bool
        Whether to subtract the biases that the validation found, too.
    columns : str or sequence of str
        Columns of the catalogue, in its own order: names of `sersicnet.schema.COLUMNS`, or of their groups
        ``position_errors``, ``surface_brightness``, ``correlations`` and ``quantiles``, or "all"; as text with commas
        between. Names with ``+`` are added to the default columns, as in ``"+correlations,+quantiles"``.
    outputs : Outputs, optional
        Files to write; none by default.
    work : Work, optional
        Tiles and processes; one process by default.
    command : str
        The command line, for the catalogue's header.
    report : callable
        Receives the stage, the number of sources done and their total number; `sersicnet.Progress` shows them.
    **options
        Options of `sersicnet.image.exposure.Exposure.of`, unless the image is an exposure already: ``zero_point``,
        ``pixel_scale``, ``noise``, ``noise_kind``, ``mask``, ``wcs``, ``hdu`` and others. An array needs its
        ``zero_point``.

    Returns
    -------
    Catalogue
        A QTable with its image. Columns of `sersicnet.schema.COLUMNS`; values that could not be measured are NaN.
        Without a WCS there are no ``ra`` and ``dec``, and without a pixel scale no ``r_eff``.

    Raises
    ------
    InputError, WeightsError
        If an input cannot be used; nothing is written.
    OutputError, WorkError
        If a file cannot be written, or a worker was killed. Finished tiles are kept.

    Warns
    -----
    SersicnetWarning
        When nothing is detected, there is no WCS, the image is outside the weights' domain,
        or the scale of a noise map disagrees with the scatter of the sky.
    """
    made = plan(
        exposure, weights=weights, psf=psf, psf_fwhm=psf_fwhm, gain=gain, refine=refine, resample=resample,
        positions=positions, validated=validated, debias=debias, columns=columns, outputs=outputs,
        work=work, command=command, report=report, **options,
    )  # fmt: skip
    return made.run(report)


def fit(
    exposure: Any,
    *,
    psf: str | Path | Psf,
    fitting: Fitting | None = None,
    positions: str | Path | Table | None = None,
    columns: str | Sequence[str] = (),
    from_band: str | None = None,
    outputs: Outputs | None = None,
    work: Work | None = None,
    command: str = "",
    report: Report = silent,
    **options: Any,
) -> Catalogue:
    """Fit Sersic profiles to the galaxies of an image, without a network.

    Parameters
    ----------
    exposure, columns, outputs, work, command, report, **options
        As for `measure`.
    psf : str, Path or Psf
        The effective PSF of the image, see `sersicnet.image.psffile.read_psf`.
    fitting : Fitting, optional
        Options of the fits. The default has no prior, so that the results can serve as training labels.
        Without a gain, galaxies have no Poisson noise, and the cores of bright galaxies get too much weight.
    positions : str, Path or Table, optional
        As for `measure`. Fits start from its columns mag, r_eff_pix or r_eff,
        sersic_n, ellipticity or q, and theta, if it has them; other start values
        are from the moments of the source detected at the position. A row without a
        detected source can only be fitted if it has a mag and a radius. The rows keep their ids.
    from_band : str, optional
        The band of `positions` whose values are used, if it is a catalogue of several bands; by default the band
        that sources were detected on.

    Returns
    -------
    Catalogue
        As from `measure`, with ``fit_status`` and ``chi2``. A fit that did not converge
        keeps the values of its last step, and has a flag.

    Raises
    ------
    InputError
        If an input cannot be used; nothing is written.
    OutputError, WorkError
        If a file cannot be written, or a worker was killed. Finished tiles are kept.

    Warns
    -----
    SersicnetWarning
        When nothing is detected, there is no WCS or no gain, or the scale of a noise map
        disagrees with the scatter of the sky.
    """
    made = Plan.of(
        _opened(exposure, options, report), network=None, psf=psf, fitting=fitting or Fitting(prior="none"),
        resample=False, positions=positions, from_band=from_band, wanted=columns, outputs=outputs or Outputs(),
        work=work or Work(),
        command=command, report=report,
    )  # fmt: skip
    return made.run(report)


def _opened(exposure: Any, options: dict[str, Any], report: Report) -> Any:
    """The exposure of an image with options; without them, the image as it is."""
    if not options:
        return exposure
    report("reading", 0, 0)
    return Exposure.of(exposure, **options)


def measure_many(
    images: Sequence[Path],
    output: Path,
    *,
    opening: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    columns: str | Sequence[str] = (),
    work: Work | None = None,
    report: Report = silent,
    **options: Any,
) -> list[tuple[QTable, Path]]:
    """Measure the galaxies of many images, into a common catalogue or one catalogue per image.

    An image that cannot be used does not stop the others. A full disk or a killed worker stops the run. Finished tiles
    are kept, and the same command continues the run; with a common catalogue finished images are kept, too.

    Parameters
    ----------
    images : sequence of Path
        At least two images.
    output : Path
        A directory, for one catalogue ``IMAGE_cat.fits`` per image, or the name of a common
        catalogue, which gets a column ``image``. A source on two images has two rows in it.
    opening : mapping, optional
        Options of `sersicnet.image.exposure.Exposure.open` for all images.
    overwrite : bool
        Whether to replace existing files.
    columns, work, report, **options
        As for `measure`, without the parameters that describe a single image. A common catalogue always has the
        column ``image``.

    Returns
    -------
    list of (QTable, Path)
        The catalogues that were written.

    Raises
    ------
    InputError
        Before the run, if a catalogue exists already; at its end, if an image could not be used. There is no common
        catalogue in this case.
    """
    names = [f"{tables.stem(path)}_cat.fits" for path in images]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"Each catalogue needs a name of its own; two would be {twice}. Measure them one by one.")
    together = not output.is_dir()
    written = [output] if together else [output / name for name in names]
    fitting = options.get("refine") or options.get("fitting")
    check_apart(
        written, *images, *(options.get(name) for name in ("psf", "positions", "validated")), fitting and fitting.prior
    )
    asked = chosen.wanted(columns)
    listed = [name for name in asked if not together or name.removeprefix("+") != "image"]
    if asked == ("image",) and together:
        listed = ["id"]  # nothing would mean the columns by default
    keep = output.with_name(output.name + ".run")
    work = work or Work()
    if together:
        check_output(output, overwrite)
        tables.check_ending(output)
        keep.mkdir(exist_ok=True)
    elif not overwrite and (there := [name for name in names if (output / name).exists()]):
        raise InputError(
            f"{output} holds {len(there)} of the {len(names)} catalogues already, such as {there[0]}. Give the images "
            "that are missing, or `overwrite`."
        )
    done, failed = [], []
    try:
        for number, (path, name) in enumerate(zip(images, names, strict=True), start=1):
            prefixed = functools.partial(_prefixed, report, f"{number}/{len(images)} {path.name}: ")
            to = None if together else output / name
            own = replace(work, run=keep / name if together else None)
            try:
                exposure = Exposure.open(path, **(opening or {}))
                outputs = Outputs(catalogue=to, overwrite=overwrite)
                table = measure(exposure, columns=listed, outputs=outputs, work=own, report=prefixed, **options)
            except (InputError, DatasetError) as error:
                failed.append(str(error))
                continue
            done.append((table, to or output))
    finally:
        with suppress(OSError):  # what is finished stays
            keep.rmdir()
    if failed:
        kept = f" The finished images are kept in {keep}." if together else " The other catalogues are written."
        again = (
            "or leave out these images, and repeat the command" if together else "these images, and measure them alone"
        )
        raise InputError(
            f"{len(failed)} of {len(images)} images could not be measured: {' '.join(failed)}{kept if done else ''} "
            f"Repair {again}."
        )
    if together:
        table = tables.joined([table for table, _ in done])
        tables.write(table, output)
        shutil.rmtree(keep)
        return [(table, output)]
    return done


def _prefixed(report: Report, prefix: str, stage: str, done: int, total: int) -> None:
    report(prefix + stage, done, total)
