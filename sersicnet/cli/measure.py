"""The command `measure`."""

from __future__ import annotations

import glob
import json
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
    Oversampling,
    Overwrite,
    PixelScale,
    Quiet,
    Residual,
    Rms,
    Robust,
    Scheduler,
    Structure,
    Var,
    Verbose,
    WeightsName,
    Wht,
    Workers,
    ZeroPoint,
    command_line,
    importing,
    log_to_stderr,
    progress_bar,
    refuse_with,
    say_catalogues,
)
from sersicnet.errors import InputError

if TYPE_CHECKING:
    from sersicnet.measuring.measure import Outlook

_SEVERAL = 2**25
"""Bytes of an image from which on several processes will work on it."""


def measure(
    images: Annotated[
        list[str],
        typer.Argument(
            help="FITS image, sky-subtracted or not, in any linear unit; or several, also as a pattern.",
            metavar="IMAGE...",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Catalogue: .fits, .ecsv, .csv, .parquet or .vot. By default IMAGE_cat.fits here. Of several images, "
            "one catalogue, or one each in a directory.",
            show_default=False,
        ),
    ] = None,
    weights: WeightsName = "fovea-sky",
    zero_point: ZeroPoint = None,
    pixel_scale: PixelScale = None,
    hdu: Hdu = None,
    positions: Annotated[
        Path | None,
        typer.Option(help="Table with x, y (from 0) or ra, dec: measure these, detect nothing.", show_default=False),
    ] = None,
    rms: Rms = None,
    wht: Wht = None,
    var: Var = None,
    mask: Mask = None,
    resample: Annotated[
        bool, typer.Option("--resample", help="Bring the image to the pixel scale of the weights first.")
    ] = False,
    refine: Annotated[
        bool, typer.Option("--refine", help="Fit each source with a Sersic profile, from the network's answer on.")
    ] = False,
    psf: Annotated[
        Path | None,
        typer.Option(
            help="FITS image of the PSF: for the check of the weights' domain, and for --refine, which takes that of "
            "the weights by default.",
            show_default=False,
        ),
    ] = None,
    psf_oversampling: Oversampling = 1,
    gain: Annotated[
        float | None,
        typer.Option(
            help="Electrons per image unit for --refine; as deep as the training images by default.",
            show_default=False,
        ),
    ] = None,
    prior: Annotated[
        str, typer.Option(help="What --refine assumes of galaxies: candels, none, or a table of galaxies.")
    ] = "candels",
    structure: Structure = 0.05,
    robust: Robust = False,
    model: Model = None,
    residual: Residual = None,
    regions: Annotated[
        Path | None, typer.Option(help="Region file for ds9 to write, .reg.", show_default=False)
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Page about the run to write, .html.", show_default=False)] = None,
    match: Annotated[
        Path | None,
        typer.Option(help="Another catalogue to compare with, on stdout and in a figure.", show_default=False),
    ] = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check the inputs, and tell what would be done.")
    ] = False,
    as_json: Json = False,
    overwrite: Overwrite = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Measure the galaxies of images and write a catalogue.

    Example: sersicnet measure mosaic.fits -o cat.fits

    Example: sersicnet measure 'field-*.fits' -o all.fits

    Example: sersicnet measure mosaic.fits --dry-run
    """
    started = time.monotonic()
    log_to_stderr(verbose)
    paths = _images(images)
    alone = dry_run or workers == 1 or scheduler is not None
    if not alone and any(path.exists() and path.stat().st_size > _SEVERAL for path in paths):
        from sersicnet import workers as work

        work.get_ready()
    with importing():
        from sersicnet.measuring import measure as measuring

    single: dict[str, Any] = {
        "positions": positions,
        "rms": rms,
        "wht": wht,
        "var": var,
        "mask": mask,
        "model": model,
        "residual": residual,
        "regions": regions,
        "page": report,
        "match": match,
    }
    if len(paths) > 1:
        own = {f"--{name}": value for name, value in single.items() if name != "page"} | {"--report": report}
        refuse_with("Several images take no option that belongs to one of them", own)
        if output is None:
            raise InputError("Several images need a name for their catalogue, or a directory for one each: give -o.")
    output = output or Path(measuring.stem(paths[0]) + "_cat.fits")
    shared: dict[str, Any] = {
        "hdu": hdu,
        "zero_point": zero_point,
        "pixel_scale": pixel_scale,
        "weights_name": weights,
        "resample": resample,
        "workers": workers,
        "overwrite": overwrite,
    }
    if dry_run:
        maps = {name: single[name] for name in ("positions", "rms", "wht", "var", "mask")}
        to = output if len(paths) == 1 else None
        _say_outlook([measuring.foresee(path, to, **maps, **shared) for path in paths], as_json)
        return
    options: dict[str, Any] = {
        **shared,
        "refine": refine,
        "psf": psf,
        "psf_oversampling": psf_oversampling,
        "gain": gain,
        "prior": prior,
        "structure": structure,
        "robust": robust,
        "scheduler": scheduler,
        "command": command_line(),
    }
    with progress_bar(quiet, "reading") as update:
        options["report"] = lambda stage, done, total: update(done, total or None, stage)
        if len(paths) == 1:
            done = [(measuring.measure(paths[0], output, **single, **options), output)]
        else:
            done = measuring.measure_many(paths, output, **options)
    if match is not None and not as_json:
        typer.echo(output.with_name(f"{measuring.stem(output)}_match.md").read_text("utf-8"))
    say_catalogues(quiet, as_json, done, time.monotonic() - started)


def _images(patterns: list[str]) -> list[Path]:
    """Paths of images; a pattern that the shell left alone is looked up here."""
    paths = []
    for pattern in patterns:
        found = [pattern]
        if "*" in pattern or "?" in pattern:
            found = sorted(glob.glob(pattern))  # noqa: PTH207 -- Path.glob takes no absolute patterns
        if not found:
            raise InputError(f"No file matches {pattern}.")
        paths += [Path(path) for path in found]
    return paths


def _say_outlook(outlooks: list[Outlook], as_json: bool) -> None:
    """What a run would do: on stdout, for that is what was asked for."""
    if as_json:
        typer.echo(json.dumps([asdict(outlook) for outlook in outlooks], indent=1))
        return
    for outlook in outlooks:
        height, width = outlook.shape
        typer.echo(f"{outlook.image}: {width} x {height} pixels")
        typer.echo(f"  zero point   {outlook.zero_point.value:.4f} AB, from {outlook.zero_point.source}")
        typer.echo(f"  pixel scale  {outlook.pixel_scale.value:.4f} arcsec, from {outlook.pixel_scale.source}")
        to = f", resampled to {outlook.factor:.4f} pixels for each" if outlook.factor != 1 else ""
        typer.echo(f"  weights      {outlook.weights}{to}")
        typer.echo(
            f"  work         tiles {outlook.tiles}, processes {outlook.workers}, memory about {outlook.memory:.1f} GB"
        )
