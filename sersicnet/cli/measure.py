"""The command `measure`."""

from __future__ import annotations

import glob
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sersicnet.cli.shared import (
    Device,
    FitPrior,
    Hdu,
    Json,
    Model,
    ModelError,
    NoiseAsGiven,
    NoiseIncludes,
    Oversampling,
    Overwrite,
    PixelScale,
    PsfFwhm,
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
    opening,
    progress_bar,
    refuse,
    say_catalogues,
    stages,
)
from sersicnet.errors import InputError, printable
from sersicnet.output import json_text

if TYPE_CHECKING:
    from sersicnet.image.exposure import Exposure
    from sersicnet.measuring.bands import Band
    from sersicnet.measuring.plan import Outlook

_EACH = "; repeated with --detect-on: once for each band, in their order, then for other images to detect on."

Rms = Annotated[list[Path] | None, typer.Option(help=f"FITS map of the noise (rms){_EACH}", show_default=False)]
Wht = Annotated[list[Path] | None, typer.Option(help=f"FITS map of the inverse variance{_EACH}", show_default=False)]
Var = Annotated[list[Path] | None, typer.Option(help=f"FITS map of the variance{_EACH}", show_default=False)]
Mask = Annotated[
    list[Path] | None, typer.Option(help=f"FITS image; nonzero pixels are ignored{_EACH}", show_default=False)
]
ZeroPoint = Annotated[
    list[float] | None,
    typer.Option(
        help="AB magnitude of one image unit; read from the header by default. With --detect-on, repeated like --rms.",
        show_default=False,
    ),
]

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
            help="Image to detect sources on, once for all images, which are bands: they are cut at the same places, "
            "with the same neighbours. Repeated, for several on the same grid, which are combined by their noise.",
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
    resample: Resample = False,
    refine: Refine = False,
    psf: Annotated[
        list[Path] | None,
        typer.Option(
            help="File of the PSF: an image, PSFEx, a grid of PSFs or stamps of stars with positions. By default the "
            "PSF is measured from the stars of the image; with weights of one telescope, --refine takes theirs. "
            "Repeated with --detect-on, once for each band.",
            show_default=False,
        ),
    ] = None,
    psf_oversampling: Oversampling = None,
    psf_fwhm: PsfFwhm = None,
    gain: Annotated[
        list[float] | None,
        typer.Option(
            help="Electrons per image unit, for --refine and for weights that are shown the photon noise of galaxies. "
            "Repeated with --detect-on, once for each band.",
            show_default=False,
        ),
    ] = None,
    prior: FitPrior = "candels",
    model_error: ModelError = 0.05,
    robust: Robust = False,
    validated: Annotated[
        Path | None,
        typer.Option(
            help="File of `sersicnet validate` for the same image and options, whose factors the errors get.",
            show_default=False,
        ),
    ] = None,
    debias: Annotated[
        bool, typer.Option("--debias", help="Take the biases that --validated found out of the values, too.")
    ] = False,
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

    Example: sersicnet measure f125w.fits f814w.fits --detect-on f160w.fits -o bands.fits

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
        from sersicnet.measuring import bands as planning
        from sersicnet.measuring import measure as measuring
        from sersicnet.measuring.fitting import Fitting
        from sersicnet.measuring.outputs import Outputs
        from sersicnet.measuring.plan import Work

    maps = {"rms": rms, "wht": wht, "var": var, "mask": mask}
    products = {
        "model": model, "residual": residual, "regions": regions, "report": report, "match": match, "psf_out": psf_out
    }  # fmt: skip
    described: dict[str, Any] = {"noise_includes": noise_includes, "noise_as_given": noise_as_given, "hdu": hdu}
    fitting = Fitting(prior=prior, model_error=model_error, robust=robust)
    work = Work(workers=cores(workers), scheduler=scheduler, device=device)
    if detect_on:
        refuse(
            "Several bands take no option that belongs to one image",
            positions=positions, pixel_scale=pixel_scale, resample=resample, psf_fwhm=psf_fwhm, validated=validated,
            debias=debias, **products,
        )  # fmt: skip
        bands, detected = _bands(
            paths, _images(detect_on), maps, described, zero_point, gain=gain,
            psf=[read_psf(path, psf_oversampling) for path in psf or ()],
        )  # fmt: skip
        if output is None and len(paths) > 1:
            raise InputError("Several bands need a catalogue, or a directory with one for each: give `output`.")
        with progress_bar(quiet, "reading") as update:
            plan = planning.plan_bands(
                bands, detected, weights=weights, refine=fitting if refine else None,
                output=output or Path(stem(paths[0]) + "_cat.fits"), overwrite=overwrite, work=work,
                command=command_line(), report=stages(update),
            )  # fmt: skip
            if not dry_run:
                written = [(table, path) for table, path in plan.run(stages(update)) if path is not None]
        if dry_run:
            print_outlook(plan.outlooks(), as_json)
        else:
            say_catalogues(quiet, as_json, written, time.monotonic() - started)
        return
    own_maps = {name: _single(name, values) for name, values in maps.items()}
    if len(paths) > 1:
        _check_several(output, positions=positions, validated=validated, **own_maps, **products)
    output = output or Path(stem(paths[0]) + "_cat.fits")
    opened = opening(**own_maps, **described, zero_point=_single("zero_point", zero_point), pixel_scale=pixel_scale)
    one_psf, one_gain = _single("psf", psf), _single("gain", gain)
    fitting = replace(fitting, gain=one_gain)
    options: dict[str, Any] = {
        "weights": weights,
        "psf": None if one_psf is None else read_psf(one_psf, psf_oversampling),
        "psf_fwhm": psf_fwhm,
        "gain": one_gain,
        "refine": fitting if refine else None,
        "resample": resample,
        "validated": validated,
        "debias": debias,
        "work": work,
        "command": command_line(),
    }
    outputs = Outputs(catalogue=output, overwrite=overwrite, **products)
    if dry_run:
        own: dict[str, Any] = {"outputs": outputs, "positions": positions} if len(paths) == 1 else {}
        plans = (measuring.plan(Exposure.open(path, **opened), **own, **options) for path in paths)
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


def _single(name: str, values: list[Any] | None) -> Any:
    """Return the value of an option that is given at most once without --detect-on."""
    if values and len(values) > 1:
        raise InputError(f"`{name}` is given once, or once for each band with `detect_on`; received {len(values)}.")
    return values[0] if values else None


def _bands(
    paths: list[Path],
    detect_on: list[Path],
    maps: dict[str, list[Path] | None],
    described: dict[str, Any],
    zero_points: list[float] | None,
    **own: list[Any] | None,
) -> tuple[list[Band], list[Exposure]]:
    """Return the bands, and the images to detect on, with the options that belong to each."""
    from sersicnet.image.exposure import Exposure
    from sersicnet.measuring.bands import Band

    images = list(dict.fromkeys([*paths, *detect_on]))
    if len(set(paths)) < len(paths):
        raise InputError("Each band is given once.")
    given = {**maps, "zero_point": zero_points}
    each = {name: _each(name, values, len(paths), len(images)) for name, values in given.items()}
    exposures = {}
    for k, path in enumerate(images):
        options = {name: values[k] for name, values in each.items()}
        exposures[path] = Exposure.open(path, **opening(**options, **described))
    of_band = {name: _each(name, values, len(paths), len(paths)) for name, values in own.items()}
    bands = [
        Band(exposure=exposures[path], **{name: values[k] for name, values in of_band.items()})
        for k, path in enumerate(paths)
    ]
    return bands, [exposures[path] for path in detect_on]


def _each(name: str, values: list[Any] | None, bands: int, images: int) -> list[Any]:
    """Return the value of an option for each image; it is given for none, for each band, or for each image."""
    values = list(values or ())
    if len(values) not in (0, bands, images):
        more = f", or {images} with those of other images to detect on" if images > bands else ""
        raise InputError(f"`{name}` is given once for each band, {bands} in all{more}; received {len(values)}.")
    return values + [None] * (images - len(values))


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
