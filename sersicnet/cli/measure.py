"""The command `measure`."""

from __future__ import annotations

import glob
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sersicnet.cli.shared import (
    Hdu,
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
    WeightsName,
    Wht,
    Workers,
    ZeroPoint,
    command_line,
    cores,
    importing,
    log_to_stderr,
    opening,
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
    weights: WeightsName = "fovea-sky",
    zero_point: ZeroPoint = None,
    pixel_scale: PixelScale = None,
    hdu: Hdu = None,
    positions: Annotated[
        Path | None,
        typer.Option(
            help="Table with x, y (from 0) or ra, dec of the sources to measure; all detections by default.",
            show_default=False,
        ),
    ] = None,
    rms: Rms = None,
    wht: Wht = None,
    var: Var = None,
    noise_includes: NoiseIncludes = None,
    noise_as_given: NoiseAsGiven = False,
    mask: Mask = None,
    resample: Annotated[
        bool, typer.Option("--resample", help="First resample the image to the pixel scale of the weights.")
    ] = False,
    refine: Annotated[
        bool,
        typer.Option("--refine", help="Fit a Sersic profile to each source, starting from the network's parameters."),
    ] = False,
    psf: Annotated[
        Path | None,
        typer.Option(
            help="File of the PSF: an image, PSFEx, a grid of PSFs or stamps of stars with positions. By default the "
            "PSF is measured from the stars of the image; with weights of one telescope, --refine takes theirs.",
            show_default=False,
        ),
    ] = None,
    psf_oversampling: Oversampling = None,
    psf_fwhm: Annotated[
        float | None,
        typer.Option(
            help="Full width of the PSF in pixels, if this is all that is known; by default the PSF is measured from "
            "the stars of the image. For weights that are shown the PSF.",
            show_default=False,
        ),
    ] = None,
    gain: Annotated[
        float | None,
        typer.Option(
            help="Electrons per image unit, for --refine and for weights that are shown the photon noise of galaxies.",
            show_default=False,
        ),
    ] = None,
    prior: Annotated[str, typer.Option(help="Prior of --refine: candels, none, or a table of galaxies.")] = "candels",
    model_error: ModelError = 0.05,
    robust: Robust = False,
    psf_out: Annotated[
        Path | None,
        typer.Option(help="FITS file to write with the PSF that was used, which --psf reads.", show_default=False),
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

    Example: sersicnet measure mosaic.fits --dry-run
    """
    # long: the options; what they mean together is in the functions below.
    started = time.monotonic()
    log_to_stderr(verbose)
    paths = _images(images)
    if not (dry_run or workers == 1 or scheduler is not None):
        _start_workers(paths)
    with importing():
        from sersicnet.catalogue.table import stem
        from sersicnet.image.exposure import Exposure
        from sersicnet.image.psffile import read_psf
        from sersicnet.measuring import measure as measuring
        from sersicnet.measuring.fitting import Fitting
        from sersicnet.measuring.outputs import Outputs
        from sersicnet.measuring.plan import Work

    maps = {"rms": rms, "wht": wht, "var": var, "mask": mask}
    products = {
        "model": model, "residual": residual, "regions": regions, "report": report, "match": match, "psf_out": psf_out
    }  # fmt: skip
    if len(paths) > 1:
        _check_several(output, positions=positions, **maps, **products)
    output = output or Path(stem(paths[0]) + "_cat.fits")
    described: dict[str, Any] = {"noise_includes": noise_includes, "noise_as_given": noise_as_given}
    opened = opening(**maps, **described, hdu=hdu, zero_point=zero_point, pixel_scale=pixel_scale)
    fitting = Fitting(gain=gain, prior=prior, model_error=model_error, robust=robust)
    options: dict[str, Any] = {
        "weights": weights,
        "psf": None if psf is None else read_psf(psf, psf_oversampling),
        "psf_fwhm": psf_fwhm,
        "gain": gain,
        "refine": fitting if refine else None,
        "resample": resample,
        "work": Work(workers=cores(workers), scheduler=scheduler),
        "command": command_line(),
    }
    outputs = Outputs(catalogue=output, overwrite=overwrite, **products)
    if dry_run:
        own: dict[str, Any] = {"outputs": outputs, "positions": positions} if len(paths) == 1 else {}
        plans = (measuring.plan(Exposure.open(path, **opened), **own, **options) for path in paths)
        _print_outlook([plan.outlook() for plan in plans], as_json)
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


def _images(patterns: list[str]) -> list[Path]:
    """Return the paths of images; expand the patterns that the shell did not."""
    paths = []
    for pattern in patterns:
        found = [pattern]
        if ("*" in pattern or "?" in pattern) and "://" not in pattern:
            found = sorted(glob.glob(pattern))  # noqa: PTH207 -- Path.glob takes no absolute patterns
        if not found:
            raise InputError(f"No file matches {pattern}.")
        paths += [Path(path) for path in found]
    return paths


def _start_workers(paths: list[Path]) -> None:
    """Start worker processes for large images while this process still imports."""
    if any(path.exists() and path.stat().st_size > _LARGE for path in paths):
        from sersicnet import workers

        workers.get_ready()


def _check_several(output: Path | None, **single: Path | None) -> None:
    refuse("Several images take no option that belongs to one of them", **single)
    if output is None:
        raise InputError("Several images need one catalogue, or a directory with one for each: give `output`.")


def _print_outlook(outlooks: list[Outlook], as_json: bool) -> None:
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
        typer.echo(f"  weights      {outlook.weights}{to}")
        typer.echo(
            f"  work         tiles {outlook.tiles}, processes {outlook.workers}, memory about {outlook.memory:.1f} GB"
        )
