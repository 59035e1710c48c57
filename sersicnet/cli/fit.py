"""The command `fit`."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sersicnet.cli.bands import (
    Gain,
    Hdu,
    Mask,
    NoiseIncludes,
    Oversampling,
    PerImage,
    PixelScale,
    Rms,
    Var,
    Wht,
    ZeroPoint,
    expanded,
    psf_of,
)
from sersicnet.cli.shared import (
    Columns,
    Json,
    Model,
    ModelError,
    NoiseAsGiven,
    Overwrite,
    Quiet,
    Residual,
    Robust,
    Scheduler,
    Verbose,
    Workers,
    command_line,
    cores,
    importing,
    log_to_stderr,
    progress_bar,
    say_catalogues,
    stages,
)
from sersicnet.errors import InputError


def fit(
    images: Annotated[
        list[str],
        typer.Argument(
            help="FITS image in any linear unit, sky-subtracted or not; or several, which are bands of the same sky.",
            metavar="IMAGE",
        ),
    ],
    psf: Annotated[
        list[str],
        typer.Option(
            help="File of the effective PSF (an image, PSFEx, ...). Repeat it for several bands.",
            metavar="PATH",
            show_default=False,
        ),
    ],
    positions: Annotated[
        Path | None,
        typer.Option(
            help="Table with x, y (from 0) or ra, dec of the galaxies to fit, and initial mag, r_eff, sersic_n, "
            "ellipticity, theta where known; all detections by default. Several bands need it, with ra, dec.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Catalogue to write: .fits, .ecsv, .csv, .parquet or .vot; IMAGE_fit.fits in the current directory "
            "by default. For several bands, one catalogue, or a directory that gets one for each.",
            show_default=False,
        ),
    ] = None,
    from_band: Annotated[
        str | None,
        typer.Option(
            help="Band whose values are taken from --positions, if that is a catalogue of several bands, such as F160W "
            "for r_eff_F160W; the band that sources were detected on by default.",
            metavar="NAME",
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
    gain: Gain = None,
    prior: Annotated[str, typer.Option(help="Prior of the fits: candels, none, or a table of galaxies.")] = "none",
    model_error: ModelError = 0.05,
    robust: Robust = False,
    fix: Annotated[
        str | None,
        typer.Option(
            help="Parameters that keep the values of --positions: position, r_eff, sersic_n, ellipticity, theta, with "
            "commas between. The last four together also fix the position: forced photometry.",
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

    Example: sersicnet fit f125w.fits f814w.fits --psf f125w_psf.fits --psf f814w_psf.fits --positions bands.fits
    --from-band F125W --fix r_eff,sersic_n,ellipticity,theta -o fluxes.fits
    """
    # long: the options.
    with importing():
        from sersicnet.catalogue.table import stem
        from sersicnet.image.exposure import Exposure
        from sersicnet.measuring import bands as planning
        from sersicnet.measuring import measure as measuring
        from sersicnet.measuring.fitting import Fitting
        from sersicnet.measuring.outputs import Outputs
        from sersicnet.measuring.plan import Work

    started = time.monotonic()
    log_to_stderr(verbose)
    paths = expanded(images)
    own = PerImage(
        {
            "zero_point": zero_point, "pixel_scale": pixel_scale, "hdu": hdu, "rms": rms, "wht": wht, "var": var,
            "mask": mask, "noise_includes": noise_includes, "psf": psf, "psf_oversampling": psf_oversampling,
            "gain": gain,
        },
        noise_as_given=noise_as_given,
    )  # fmt: skip
    names = () if fix is None else tuple(name.strip() for name in fix.split(","))
    fitting = Fitting(prior=prior, model_error=model_error, robust=robust, fix=names)
    options: dict[str, Any] = {
        "from_band": from_band,
        "columns": columns,
        "work": Work(workers=cores(workers), scheduler=scheduler),
        "command": command_line(),
    }
    products: dict[str, Any] = {"model": model, "residual": residual, "overwrite": overwrite}
    if len(paths) > 1:
        if positions is None:
            raise InputError("Several bands are fitted at the places of one table: give `positions`.")
        if output is None:
            raise InputError("Several bands need a catalogue, or a directory with one for each: give `output`.")
        bands, _ = own.bands(paths)
        with progress_bar(quiet, "reading") as update:
            options |= {"outputs": Outputs(catalogue=output, **products), "report": stages(update)}
            plan = planning.plan_fit_bands(bands, positions, fitting=fitting, **options)
            done = [(table, path) for table, path in plan.run(stages(update)) if path is not None]
    else:
        single, output = own.single(), output or Path(stem(paths[0]) + "_fit.fits")
        with progress_bar(quiet, "reading") as update:
            table = measuring.fit(
                Exposure.open(paths[0], **own.opening(single)),
                psf=psf_of(single),
                fitting=replace(fitting, gain=single["gain"]),
                positions=positions,
                outputs=Outputs(catalogue=output, **products),
                report=stages(update),
                **options,
            )
        done = [(table, output)]
    say_catalogues(quiet, as_json, done, time.monotonic() - started)
