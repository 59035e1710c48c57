"""The command `validate`."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sersicnet.cli.measure import print_outlook
from sersicnet.cli.shared import (
    Device,
    FitPrior,
    Gain,
    Hdu,
    Json,
    Mask,
    ModelError,
    NoiseAsGiven,
    NoiseIncludes,
    Oversampling,
    Overwrite,
    PixelScale,
    PsfFile,
    PsfFwhm,
    Quiet,
    Refine,
    Resample,
    Rms,
    Robust,
    Scheduler,
    Seed,
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
    say,
    stages,
    stderr,
)
from sersicnet.errors import counted, printable
from sersicnet.output import json_text

if TYPE_CHECKING:
    from sersicnet.catalogue.validation import Validation
    from sersicnet.measuring.validate import Foresight


def validate(
    image: Annotated[Path, typer.Argument(help="FITS image of the mosaic, as for measure.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="FITS file to write: truth beside measurement, statistics, and factors for measure --validated; "
            "IMAGE_validation.fits in the current directory by default. The page of figures is beside it, .html.",
            show_default=False,
        ),
    ] = None,
    n: Annotated[int, typer.Option(help="Number of galaxies to add.", min=1)] = 2000,
    galaxies: Annotated[
        str,
        typer.Option(
            help="Galaxies to add: candels, with the radii, indices and axis ratios of CANDELS at each magnitude; or a "
            "table, such as a catalogue of the image, whose rows are drawn at random.",
        ),
    ] = "candels",
    evenly: Annotated[
        bool,
        typer.Option(
            "--evenly",
            help="Draw magnitudes, radii and indices evenly over the range of the table of --galaxies, or else of the "
            "image's own galaxies.",
        ),
    ] = False,
    mag: Annotated[
        tuple[float, float] | None,
        typer.Option(
            help="Range of the magnitudes; that of the image's own galaxies and 1 mag fainter, or of the table, by "
            "default.",
            metavar="BRIGHT FAINT",
            show_default=False,
        ),
    ] = None,
    avoid: Annotated[
        float | None,
        typer.Option(
            help="Keep the galaxies away from sources brighter than this magnitude; they are put anywhere by default.",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    weights: WeightsName = "fovea",
    zero_point: ZeroPoint = None,
    pixel_scale: PixelScale = None,
    hdu: Hdu = None,
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
    injected: Annotated[
        Path | None,
        typer.Option(
            help="FITS image to write: the mosaic with the galaxies; NAME-1.fits and so on for several passes.",
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
    """Add galaxies of known parameters to an image, measure everything, and compare.

    Give the same options as to measure. The file that is written corrects the errors of measure --validated.

    Example: sersicnet validate mosaic.fits -o validation.fits

    Example: sersicnet validate mosaic.fits --galaxies cat.fits --n 5000 --avoid 18

    Example: sersicnet validate mosaic.fits --dry-run
    """
    # long: the options.
    started = time.monotonic()
    log_to_stderr(verbose)
    with importing():
        from sersicnet.catalogue.table import stem
        from sersicnet.image.exposure import Exposure
        from sersicnet.image.psffile import read_psf
        from sersicnet.measuring.fitting import Fitting
        from sersicnet.measuring.injecting import Injection
        from sersicnet.measuring.plan import Work
        from sersicnet.measuring.validate import foresee, validate

    output = output or Path(stem(image) + "_validation.fits")
    described: dict[str, Any] = {"noise_includes": noise_includes, "noise_as_given": noise_as_given}
    opened = opening(rms, wht, var, mask=mask, hdu=hdu, zero_point=zero_point, pixel_scale=pixel_scale, **described)
    fitting = Fitting(gain=gain, prior=prior, model_error=model_error, robust=robust)
    injection = Injection(n=n, galaxies=galaxies, evenly=evenly, mag=mag, avoid=avoid, seed=seed)
    options: dict[str, Any] = {
        "injection": injection,
        "weights": weights,
        "psf": None if psf is None else read_psf(psf, psf_oversampling),
        "psf_fwhm": psf_fwhm,
        "gain": gain,
        "refine": fitting if refine else None,
        "resample": resample,
        "injected": injected,
        "overwrite": overwrite,
        "work": Work(workers=cores(workers), scheduler=scheduler, device=device),
        "command": command_line(),
    }
    if dry_run:
        _print_foresight(foresee(Exposure.open(image, **opened), output, **options), output, as_json)
        return
    with progress_bar(quiet, "reading") as update:
        found = validate(Exposure.open(image, **opened), output, report=stages(update), **options)
    _say(found, output, quiet, as_json, time.monotonic() - started)


def _print_foresight(found: Foresight, output: Path, as_json: bool) -> None:
    """Print what a run would do on stdout, since the user asked for it."""
    if as_json:
        facts = {**asdict(found.outlook), **found._asdict(), "validation": str(output)}
        typer.echo(json_text({name: value for name, value in facts.items() if name != "outlook"}))
        return
    print_outlook([found.outlook], as_json=False)
    mag = "from the image's own galaxies to 1 mag fainter" if found.mag is None else "{:g} to {:g}".format(*found.mag)
    typer.echo(f"  galaxies     {found.galaxies:,}, {printable(found.kinds)}; mag {mag}")
    typer.echo(f"  passes       at least {found.passes}, after the image and its negative")
    typer.echo(f"  time         about {max(found.seconds, 1):.0f} s without fits, for 100 sources on a million pixels")
    typer.echo(f"  output       {output} and {output.with_suffix('.html')}")


def _say(found: Validation, output: Path, quiet: bool, as_json: bool, seconds: float) -> None:
    """Print a summary: as a table on stderr, or as JSON on stdout."""
    statistics = found.statistics()
    n, hit = len(found.rows), int(found.rows["found"].sum())
    if as_json:
        facts = {
            "seconds": round(seconds, 1),
            "validation": str(output),
            "galaxies": n,
            "found": hit,
            "statistics": [one._asdict() for one in statistics],
            "shares": [
                {
                    **one._asdict(),
                    "completeness": one.completeness,
                    "purity": one.purity,
                    "clean_purity": one.clean_purity,
                }
                for one in found.shares()
            ],
        }
        typer.echo(json_text(facts))
    if quiet:
        return
    grid = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("", "N", "bias", "scatter", "within 1 sigma", "with factors", "within 2 sigma", "with factors"):
        grid.add_column(name, justify="left" if not name else "right")
    for one in statistics:
        if one.by == "all":
            shares = (one.within, one.after, one.within_two, one.after_two)
            grid.add_row(
                one.parameter, f"{one.n:,}", f"{one.bias:+.3f}", f"{one.scatter:.3f}",
                *(f"{share:.0%}" if math.isfinite(share) else "too few" for share in shares),
            )  # fmt: skip
    stderr.print(grid)
    say(quiet, f"found {hit:,} of {counted(n, 'galaxy', 'galaxies')}")
    say(quiet, f"wrote {output} and {output.with_suffix('.html')} in {seconds:.1f} s")
