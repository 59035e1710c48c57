"""The main job: an image and weights in, a flagged catalogue out.

`measure` asks a network, and with ``refine`` a fit that starts from the network's answer;
`fit` does without a network, as GALFIT does, starting from a table or from moments.
Both are a `sersicnet.measuring.plan.Plan` that is made and run.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from astropy.table import QTable, Table

from sersicnet import weights as trained
from sersicnet.catalogue import table as tables
from sersicnet.errors import DatasetError, InputError
from sersicnet.image.exposure import Exposure
from sersicnet.image.psf import Psf
from sersicnet.measuring.fitting import Fitting
from sersicnet.measuring.outputs import Outputs
from sersicnet.measuring.plan import Plan, Work
from sersicnet.output import Report, check_output, silent
from sersicnet.weights import Weights


def plan(
    exposure: Any,
    *,
    weights: str | Path | Weights = trained.DEFAULT,
    psf: str | Path | Psf | None = None,
    refine: Fitting | None = None,
    resample: bool = False,
    positions: str | Path | Table | None = None,
    outputs: Outputs | None = None,
    work: Work | None = None,
    command: str = "",
    report: Report = silent,
) -> Plan:
    """Check what `measure` would be given, with the same parameters, errors and warnings.

    Returns
    -------
    Plan
        Its ``outlook()`` says what would be done, and its ``run()`` does it.
    """
    outputs = outputs or Outputs()
    if refine is None and outputs.of_fits:
        raise InputError(f"`{outputs.of_fits[0]}` belongs to fits: give `refine` with it.")
    if refine is not None and resample:
        raise InputError("Fits work at any pixel scale: give `refine` without `resample`.")
    return Plan.of(
        exposure, network=weights, psf=psf, fitting=refine, resample=resample, positions=positions, outputs=outputs,
        work=work or Work(), command=command, report=report,
    )  # fmt: skip


def measure(
    exposure: Any,
    *,
    weights: str | Path | Weights = trained.DEFAULT,
    psf: str | Path | Psf | None = None,
    refine: Fitting | None = None,
    resample: bool = False,
    positions: str | Path | Table | None = None,
    outputs: Outputs | None = None,
    work: Work | None = None,
    command: str = "",
    report: Report = silent,
) -> QTable:
    """Measure the galaxies of an image.

    Parameters
    ----------
    exposure : Exposure, or what `sersicnet.image.exposure.Exposure.of` takes
        The image in any linear unit, with its maps: a path, an HDU, an NDData, an array.
    weights : str, Path or Weights
        Name of shipped weights, or a weights directory.
    psf : str, Path or Psf, optional
        The effective PSF of the image, see `sersicnet.image.psf.read_psf`. Its width
        is compared with the domain of the weights, instead of that of the image's stars;
        and the fits use it, instead of that of the weights' domain.
    refine : Fitting, optional
        Fit a Sersic profile to each source, starting from the network's answer;
        neighbours that overlap are fitted together with it. Where the fit does not converge,
        the network's values stay. A gain that is missing is that of the weights' domain.
    resample : bool
        Whether to bring the image to the pixel scale of the weights first, light kept. The
        catalogue is in pixels of the image all the same, but for the circle of ``mag_aper``.
        Not together with `refine`: fits work at any pixel scale.
    positions : str, Path or Table, optional
        Table with positions, see `sersicnet.catalogue.parameters`: measure these and detect nothing. One row
        each, in their order. Where the table has both pixels and sky, and the image a WCS, the sky counts.
    outputs : Outputs, optional
        Files to write; none by default.
    work : Work, optional
        How the work is done; by default in one process.
    command : str
        The command line, for the catalogue's header.
    report : callable
        Receives the stage, and how many of how many sources it has done.

    Returns
    -------
    QTable
        Columns of `sersicnet.schema.COLUMNS`, NaN for what could not be
        measured. Without a WCS there are no ``ra`` and ``dec``, and without a
        pixel scale no ``r_eff``.

    Raises
    ------
    InputError, WeightsError
        If an input cannot be used; nothing is written then.
    OutputError, WorkError
        If the disk refuses, or a worker was killed. What is finished is kept.

    Warns
    -----
    SersicnetWarning
        When nothing is detected, there is no WCS, the image is outside of the weights' domain,
        or a noise map is far from the scatter of its sky.
    """
    made = plan(
        exposure, weights=weights, psf=psf, refine=refine, resample=resample, positions=positions, outputs=outputs,
        work=work, command=command, report=report,
    )  # fmt: skip
    return made.run(report)


def fit(
    exposure: Any,
    *,
    psf: str | Path | Psf,
    fitting: Fitting | None = None,
    positions: str | Path | Table | None = None,
    outputs: Outputs | None = None,
    work: Work | None = None,
    command: str = "",
    report: Report = silent,
) -> QTable:
    """Fit Sersic profiles to the galaxies of an image, without a network.

    Parameters
    ----------
    exposure, outputs, work, command, report
        As for `measure`.
    psf : str, Path or Psf
        The effective PSF of the image, see `sersicnet.image.psf.read_psf`.
    fitting : Fitting, optional
        By default without a prior, since labels should not know what to expect. Without a gain galaxies have no
        Poisson noise, and the cores of bright galaxies weigh too much.
    positions : str, Path or Table, optional
        As for `measure`; fits start from its columns mag, r_eff_pix or r_eff,
        sersic_n, ellipticity or q, and theta, if it has them, and from
        the moments of the detected source for the rest. Where there is none,
        only a row with mag and a radius can be fitted.

    Returns
    -------
    QTable
        As from `measure`, with ``fit_status`` and ``chi2``; a fit that did not
        converge keeps the values where it stopped, and has a flag.

    Raises
    ------
    InputError
        If an input cannot be used; nothing is written then.
    OutputError, WorkError
        If the disk refuses, or a worker was killed. What is finished is kept.

    Warns
    -----
    SersicnetWarning
        When nothing is detected, there is no WCS or no gain, or a noise map is far
        from the scatter of the image's sky.
    """
    made = Plan.of(
        exposure, network=None, psf=psf, fitting=fitting or Fitting(prior="none"), resample=False, positions=positions,
        outputs=outputs or Outputs(), work=work or Work(), command=command, report=report,
    )  # fmt: skip
    return made.run(report)


def measure_many(
    images: Sequence[Path],
    output: Path,
    *,
    opening: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    work: Work | None = None,
    report: Report = silent,
    **options: Any,
) -> list[tuple[QTable, Path]]:
    """Measure the galaxies of many images, into one catalogue or into one for each.

    An image that cannot be used does not stop the others; finished ones are kept, and
    the same command continues. A full disk or a killed worker stops the run.

    Parameters
    ----------
    images : sequence of Path
        At least two.
    output : Path
        A directory, for one catalogue ``IMAGE_cat.fits`` a mosaic, or the name of one
        catalogue of all, which gets a column ``image``. Sources on two images have two
        rows in it.
    opening : mapping, optional
        Options of `sersicnet.image.exposure.Exposure.open` for all images.
    overwrite : bool
        Whether to replace files that exist.
    work, report, **options
        As for `measure`, but for what belongs to a single image.

    Returns
    -------
    list of (QTable, Path)
        The catalogues that were written.

    Raises
    ------
    InputError
        In the end, if an image could not be used: then there is no common catalogue.
    """
    names = [f"{tables.stem(path)}_cat.fits" for path in images]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"Each image needs a name of its own; two would be {twice}. Measure them one by one.")
    together = not output.is_dir()
    keep = output.with_name(output.name + ".run")
    work = work or Work()
    if together:
        check_output(output, overwrite)
        tables.check_ending(output)
        keep.mkdir(exist_ok=True)
    done, failed = [], []
    for number, (path, name) in enumerate(zip(images, names, strict=True), start=1):
        prefixed = functools.partial(_prefixed, report, f"{number}/{len(images)} {path.name}: ")
        to = None if together else output / name
        own = Work(
            tile=work.tile, workers=work.workers, scheduler=work.scheduler, run=keep / name if together else None
        )
        try:
            exposure = Exposure.open(path, **(opening or {}))
            outputs = Outputs(catalogue=to, overwrite=overwrite)
            table = measure(exposure, outputs=outputs, work=own, report=prefixed, **options)
        except (InputError, DatasetError) as error:
            failed.append(str(error))
            continue
        done.append((table, to or output))
    if failed:
        kept = f"What is finished is kept in {keep}: mend" if together else "The others are written. Mend"
        raise InputError(
            f"{len(failed)} of {len(images)} images could not be measured: {' '.join(failed)} {kept} or leave out "
            "these, and repeat the command."
        )
    if together:
        table = tables.joined([table for table, _ in done])
        tables.write(table, output)
        shutil.rmtree(keep)
        return [(table, output)]
    return done


def _prefixed(report: Report, prefix: str, stage: str, done: int, total: int) -> None:
    report(prefix + stage, done, total)
