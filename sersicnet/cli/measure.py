"""The command `measure`."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sersicnet.cli.bands import (
    Gain,
    Hdu,
    Mask,
    NoiseIncludes,
    Oversampling,
    PerImage,
    PixelScale,
    PsfFile,
    PsfFwhm,
    Rms,
    Validated,
    Var,
    Wht,
    ZeroPoint,
    expanded,
    psf_of,
)
from sersicnet.cli.shared import (
    Columns,
    Device,
    FitPrior,
    Json,
    Model,
    ModelError,
    NoiseAsGiven,
    Overwrite,
    Quiet,
    Refine,
    Resample,
    Residual,
    Robust,
    Scheduler,
    Verbose,
    WeightsName,
    Workers,
    command_line,
    cores,
    importing,
    log_to_stderr,
    progress_bar,
    refuse,
    say_catalogues,
    stages,
)
from sersicnet.errors import InputError, printable
from sersicnet.output import json_text

if TYPE_CHECKING:
    from sersicnet.measuring.plan import Outlook

_LARGE = 2**25
"""Images with more bytes than this are measured by several processes."""


def measure(
    images: Annotated[
        list[str],
        typer.Argument(
            help="FITS image in any linear unit, or its https address; or several images, also as a pattern.",
            metavar="IMAGE",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Catalogue to write: .fits, .ecsv, .csv, .parquet or .vot; IMAGE_cat.fits in the current directory "
            "by default. For several images, one catalogue, or a directory that gets one for each.",
            show_default=False,
        ),
    ] = None,
    detect_on: Annotated[
        list[str] | None,
        typer.Option(
            "--detect-on",
            help="Image to detect the sources on. The other images are then bands of the same sky, measured at the "
            "same positions; repeat the options of an image in their order, with none for a band without one. Repeat "
            "--detect-on for several images on the same grid, which are combined by their noise.",
            metavar="IMAGE",
            show_default=False,
        ),
    ] = None,
    weights: WeightsName = "fovea",
    zero_point: ZeroPoint = None,
    pixel_scale: PixelScale = None,
    hdu: Hdu = None,
    positions: Annotated[
        Path | None,
        typer.Option(
            help="Table with x, y (from 0) or ra, dec of the sources to measure; all detections by default. Several "
            "images are then bands, which need ra, dec.",
            show_default=False,
        ),
    ] = None,
    rms: Rms = None,
    wht: Wht = None,
    var: Var = None,
    noise_includes: NoiseIncludes = None,
    noise_as_given: NoiseAsGiven = False,
    mask: Mask = None,
    resample: Resample = False,
    refine: Refine = False,
    psf: PsfFile = None,
    psf_oversampling: Oversampling = None,
    psf_fwhm: PsfFwhm = None,
    gain: Gain = None,
    prior: FitPrior = "candels",
    model_error: ModelError = 0.05,
    robust: Robust = False,
    validated: Validated = None,
    debias: Annotated[
        bool, typer.Option("--debias", help="Also subtract the biases in --validated from the values.")
    ] = False,
    columns: Columns = "",
    psf_out: Annotated[
        Path | None,
        typer.Option(help="FITS file to write: the PSF that was used, which --psf can read.", show_default=False),
    ] = None,
    model: Model = None,
    residual: Residual = None,
    regions: Annotated[Path | None, typer.Option(help="ds9 region file to write, .reg.", show_default=False)] = None,
    report: Annotated[
        Path | None, typer.Option(help="Report on the catalogue to write, .html.", show_default=False)
    ] = None,
    match: Annotated[
        Path | None,
        typer.Option(
            help="Catalogue to compare with; the comparison is printed on stdout and drawn as a figure.",
            show_default=False,
        ),
    ] = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    device: Device = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the inputs and print what would be done, without doing it.")
    ] = False,
    as_json: Json = False,
    overwrite: Overwrite = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Measure the galaxies in images and write a catalogue.

    Example: sersicnet measure mosaic.fits -o cat.fits

    Example: sersicnet measure 'field-*.fits' -o all.fits

    Example: sersicnet measure mosaic.fits --device gpu -o cat.fits

    Example: sersicnet measure mosaic.fits --columns +quantiles,+correlations -o cat.fits

    Example: sersicnet measure f125w.fits f814w.fits --detect-on f160w.fits -o bands.fits

    Example: sersicnet measure f125w.fits f814w.fits --positions targets.csv -o bands.fits

    Example: sersicnet measure mosaic.fits --dry-run
    """
    # long: the options; what they mean together is in the functions below.
    started = time.monotonic()
    log_to_stderr(verbose)
    paths = expanded(images)
    if not (dry_run or workers == 1 or scheduler is not None):
        _start_workers(paths)
    with importing():
        from sersicnet.catalogue.table import stem
        from sersicnet.image.exposure import Exposure
        from sersicnet.measuring import bands as planning
        from sersicnet.measuring import measure as measuring
        from sersicnet.measuring.fitting import Fitting
        from sersicnet.measuring.outputs import Outputs
        from sersicnet.measuring.plan import Work

    own = PerImage(
        {
            "zero_point": zero_point, "pixel_scale": pixel_scale, "hdu": hdu, "rms": rms, "wht": wht, "var": var,
            "mask": mask, "noise_includes": noise_includes, "psf": psf, "psf_oversampling": psf_oversampling,
            "psf_fwhm": psf_fwhm, "gain": gain, "validated": validated,
        },
        noise_as_given=noise_as_given,
    )  # fmt: skip
    products = {"model": model, "residual": residual, "regions": regions, "report": report, "psf_out": psf_out}
    fitting = Fitting(prior=prior, model_error=model_error, robust=robust)
    work = Work(workers=cores(workers), scheduler=scheduler, device=device)
    if detect_on or (positions is not None and len(paths) > 1):
        refuse("Several bands take no option that belongs to one image", resample=resample)
        if output is None and len(paths) > 1:
            raise InputError("Several bands need a catalogue, or a directory with one for each: give `output`.")
        bands, detected = own.bands(paths, expanded(detect_on or []))
        output = output or Path(stem(paths[0]) + "_cat.fits")
        with progress_bar(quiet, "reading") as update:
            plan = planning.plan_bands(
                bands, detected, positions=positions, weights=weights, refine=fitting if refine else None,
                debias=debias, columns=columns, work=work, command=command_line(), report=stages(update),
                outputs=Outputs(catalogue=output, overwrite=overwrite, match=match, **products),
            )  # fmt: skip
            if not dry_run:
                written = [(table, path) for table, path in plan.run(stages(update)) if path is not None]
        if dry_run:
            print_outlook(plan.outlooks(), as_json)
            return
        for band, (text, _) in plan.files.differences.items():
            if not as_json:
                typer.echo(f"## {band}\n\n{text.read_text('utf-8')}")
        say_catalogues(quiet, as_json, written, time.monotonic() - started)
        return
    single = own.single()
    if len(paths) > 1:
        own_maps = {name: single[name] for name in ("rms", "wht", "var", "mask")}
        _check_several(output, validated=single["validated"], match=match, **own_maps, **products)
    output = output or Path(stem(paths[0]) + "_cat.fits")
    opened = own.opening(single)
    options: dict[str, Any] = {
        "weights": weights,
        "psf": psf_of(single),
        "psf_fwhm": single["psf_fwhm"],
        "gain": single["gain"],
        "refine": replace(fitting, gain=single["gain"]) if refine else None,
        "resample": resample,
        "validated": single["validated"],
        "debias": debias,
        "columns": columns,
        "work": work,
        "command": command_line(),
    }
    outputs = Outputs(catalogue=output, overwrite=overwrite, match=match, **products)
    if dry_run:
        alone: dict[str, Any] = {"outputs": outputs, "positions": positions} if len(paths) == 1 else {}
        plans = (measuring.plan(Exposure.open(path, **opened), **alone, **options) for path in paths)
        print_outlook([plan.outlook() for plan in plans], as_json)
        return
    with progress_bar(quiet, "reading") as update:
        options["report"] = stages(update)
        if len(paths) == 1:
            exposure = Exposure.open(paths[0], **opened)
            done = [(measuring.measure(exposure, positions=positions, outputs=outputs, **options), output)]
        else:
            done = measuring.measure_many(paths, output, opening=opened, overwrite=overwrite, **options)
    if match is not None and not as_json:
        typer.echo(output.with_name(f"{stem(output)}_match.md").read_text("utf-8"))
    say_catalogues(quiet, as_json, done, time.monotonic() - started)


def _start_workers(paths: list[Path]) -> None:
    """Start worker processes for large images while this process still imports."""
    if any(path.exists() and path.stat().st_size > _LARGE for path in paths):
        from sersicnet import workers

        workers.get_ready()


def _check_several(output: Path | None, **single: Path | None) -> None:
    refuse("Several images take no option that belongs to one of them", **single)
    if output is None:
        raise InputError("Several images need one catalogue, or a directory with one for each: give `output`.")


def print_outlook(outlooks: list[Outlook], as_json: bool) -> None:
    """Print what a run would do on stdout, since the user asked for it."""
    if as_json:
        typer.echo(json_text([asdict(outlook) for outlook in outlooks]))
        return
    for outlook in outlooks:
        height, width = outlook.shape
        typer.echo(f"{printable(outlook.image)}: {width} x {height} pixels")
        typer.echo(f"  zero point   {outlook.zero_point.value:.4f} AB, from {outlook.zero_point.source}")
        scale = f"{outlook.pixel_scale.value:.4f} arcsec, from {outlook.pixel_scale.source}"
        if not math.isfinite(outlook.pixel_scale.value):
            scale = "not known, so sizes will be in pixels alone; give --pixel-scale"
        typer.echo(f"  pixel scale  {scale}")
        to = f", resampled to {outlook.factor:.4f} pixels for each" if outlook.factor != 1 else ""
        typer.echo(f"  weights      {outlook.weights}{to}, on the {outlook.device.upper()}")
        typer.echo(
            f"  work         tiles {outlook.tiles}, processes {outlook.workers}, memory about {outlook.memory:.1f} GB"
        )
