"""The command `fit`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sersicnet.cli.shared import (
    Columns,
    Hdu,
    Image,
    Json,
    Mask,
    Model,
    ModelError,
    NoiseAsGiven,
    NoiseIncludes,
    Oversampling,
    Overwrite,
    PixelScale,
    Quiet,
    Residual,
    Rms,
    Robust,
    Scheduler,
    Var,
    Verbose,
    Wht,
    Workers,
    ZeroPoint,
    command_line,
    cores,
    importing,
    log_to_stderr,
    opening,
    progress_bar,
    say_catalogues,
    stages,
)


def fit(
    image: Image,
    psf: Annotated[Path, typer.Option(help="File of the effective PSF (an image, PSFEx, ...).", show_default=False)],
    positions: Annotated[
        Path | None,
        typer.Option(
            help="Table with x, y (from 0) or ra, dec of the galaxies to fit, and initial mag, r_eff, sersic_n, "
            "ellipticity, theta where known; all detections by default.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Catalogue to write: .fits, .ecsv, .csv, .parquet or .vot; IMAGE_fit.fits in the current directory "
            "by default.",
            show_default=False,
        ),
    ] = None,
    zero_point: ZeroPoint = None,
    pixel_scale: PixelScale = None,
    hdu: Hdu = None,
    rms: Rms = None,
    wht: Wht = None,
    var: Var = None,
    noise_includes: NoiseIncludes = None,
    noise_as_given: NoiseAsGiven = False,
    mask: Mask = None,
    psf_oversampling: Oversampling = None,
    gain: Annotated[
        float | None,
        typer.Option(help="Electrons per image unit, for the Poisson noise of the galaxies.", show_default=False),
    ] = None,
    prior: Annotated[str, typer.Option(help="Prior of the fits: candels, none, or a table of galaxies.")] = "none",
    model_error: ModelError = 0.05,
    robust: Robust = False,
    fix: Annotated[
        str | None,
        typer.Option(
            help="What keeps the values of --positions: position, r_eff, sersic_n, ellipticity, theta, with commas "
            "between. The last four together fix the position, too: forced photometry, fluxes with their sign.",
            metavar="NAME,...",
            show_default=False,
        ),
    ] = None,
    columns: Columns = "",
    model: Model = None,
    residual: Residual = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    as_json: Json = False,
    overwrite: Overwrite = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Fit Sersic profiles without a network, as labels for `finetune` or as a check.

    Example: sersicnet fit mosaic.fits --psf psf.fits --gain 3200 --positions targets.csv -o labels.csv

    Example: sersicnet fit f814w.fits --psf f814w_psf.fits --positions f160w_cat.fits
    --fix r_eff,sersic_n,ellipticity,theta -o f814w_fluxes.fits
    """
    # long: the options.
    with importing():
        from sersicnet.catalogue.table import stem
        from sersicnet.image.exposure import Exposure
        from sersicnet.image.psffile import read_psf
        from sersicnet.measuring import measure as measuring
        from sersicnet.measuring.fitting import Fitting
        from sersicnet.measuring.outputs import Outputs
        from sersicnet.measuring.plan import Work

    started = time.monotonic()
    log_to_stderr(verbose)
    output = output or Path(stem(image) + "_fit.fits")
    names = () if fix is None else tuple(name.strip() for name in fix.split(","))
    described: dict[str, Any] = {"noise_includes": noise_includes, "noise_as_given": noise_as_given}
    opened = opening(rms, wht, var, mask=mask, hdu=hdu, zero_point=zero_point, pixel_scale=pixel_scale, **described)
    with progress_bar(quiet, "reading") as update:
        table = measuring.fit(
            Exposure.open(image, **opened),
            psf=read_psf(psf, psf_oversampling),
            fitting=Fitting(gain=gain, prior=prior, model_error=model_error, robust=robust, fix=names),
            positions=positions,
            columns=columns,
            outputs=Outputs(catalogue=output, model=model, residual=residual, overwrite=overwrite),
            work=Work(workers=cores(workers), scheduler=scheduler),
            command=command_line(),
            report=stages(update),
        )
    say_catalogues(quiet, as_json, [(table, output)], time.monotonic() - started)
