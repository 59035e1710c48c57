"""The command line: options, help, progress and exit codes.

Each command is a thin pair with a function of the same name elsewhere, which
returns data and never prints. Everything heavy is imported inside a command, so
that help comes at once.
"""

from __future__ import annotations

import gc
import glob
import json
import logging
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import sersicnet
from sersicnet.errors import InputError, SersicnetError, SersicnetWarning
from sersicnet.output import check_output
from sersicnet.schema import TARGET_NAMES

if TYPE_CHECKING:
    from astropy.table import QTable

    from sersicnet.measuring.measure import Outlook
    from sersicnet.training import train as training

app = typer.Typer(
    name="sersicnet",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Structural parameters of galaxies from images, by convolutional networks.

    Example: sersicnet measure mosaic.fits -o cat.fits""",
)
stderr = Console(stderr=True, highlight=False)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
ZeroPoint = Annotated[
    float | None,
    typer.Option(help="AB magnitude of one image unit; from the header by default.", show_default=False),
]
WeightsName = Annotated[str, typer.Option("--weights", "-w", help="Name of shipped weights, or a directory.")]
Seed = Annotated[int, typer.Option(help="Everything random follows from it.", min=0)]


def _command_line() -> str:
    return shlex.join(["sersicnet", *_arguments])


_arguments: list[str] = []


@contextmanager
def _importing() -> Iterator[None]:
    """Import without looking for garbage, nor among what is there ever after: a third of the time, and of the exit."""
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # once a process
            gc.freeze()
        gc.enable()


@contextmanager
def _progress(quiet: bool, description: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr; nothing when quiet or not on a terminal.

    Yields a function ``update(completed, total=None, description=None)``.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    hidden = quiet or not stderr.is_terminal
    with Progress(*columns, console=stderr, disable=hidden, transient=True) as bar:
        task = bar.add_task(description, total=total)

        def update(completed: int, total: int | None = None, description: str | None = None) -> None:
            bar.update(task, completed=completed, total=total, description=description)

        yield update


def _say(quiet: bool, text: str) -> None:
    if not quiet:
        stderr.print(text, markup=False, soft_wrap=True)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"sersicnet {sersicnet.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


Image = Annotated[Path, typer.Argument(help="FITS image, sky-subtracted or not, in any linear unit.")]
PixelScale = Annotated[
    float | None, typer.Option(help="Arcsec per pixel; from the WCS by default.", show_default=False)
]
Hdu = Annotated[
    str | None,
    typer.Option(help="Number or name of the extension; SCI or the first image by default.", show_default=False),
]
Rms = Annotated[Path | None, typer.Option(help="FITS map of the noise.", show_default=False)]
Wht = Annotated[Path | None, typer.Option(help="FITS map of the inverse variance.", show_default=False)]
Var = Annotated[Path | None, typer.Option(help="FITS map of the variance.", show_default=False)]
Mask = Annotated[
    Path | None, typer.Option(help="FITS image; pixels that are not zero are ignored.", show_default=False)
]
Oversampling = Annotated[
    int, typer.Option("--psf-oversampling", help="How many times finer the PSF's pixels are.", min=1)
]
Structure = Annotated[
    float,
    typer.Option(
        help="What galaxies scatter about a Sersic profile in fits, as a fraction of their brightness.", min=0
    ),
]
Robust = Annotated[bool, typer.Option("--robust", help="Bound the influence of pixels far from the model in fits.")]
Model = Annotated[Path | None, typer.Option(help="FITS image of the fitted galaxies to write.", show_default=False)]
Residual = Annotated[
    Path | None, typer.Option(help="FITS image to write: minus its sky and the fitted galaxies.", show_default=False)
]


Workers = Annotated[
    int | None, typer.Option(help="Processes that work; all cores by default.", min=1, show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print what was done as JSON on stdout.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Tell on stderr what is being done.")]
Scheduler = Annotated[
    str | None,
    typer.Option(help="Address of a Dask scheduler whose workers do it instead, tcp://HOST:PORT.", show_default=False),
]


@app.command()
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
    _log_to_stderr(verbose)
    paths = _images(images)
    alone = dry_run or workers == 1 or scheduler is not None
    if not alone and any(path.exists() and path.stat().st_size > _SEVERAL for path in paths):
        from sersicnet import workers as work

        work.get_ready()
    with _importing():
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
        _refuse_with("Several images take no option that belongs to one of them", own)
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
        "command": _command_line(),
    }
    with _progress(quiet, "reading") as update:
        options["report"] = lambda stage, done, total: update(done, total or None, stage)
        if len(paths) == 1:
            done = [(measuring.measure(paths[0], output, **single, **options), output)]
        else:
            done = measuring.measure_many(paths, output, **options)
    if match is not None and not as_json:
        typer.echo(output.with_name(f"{measuring.stem(output)}_match.md").read_text("utf-8"))
    _say_catalogues(quiet, as_json, done, time.monotonic() - started)


@app.command()
def fit(
    image: Image,
    psf: Annotated[Path, typer.Option(help="FITS image of the effective PSF.", show_default=False)],
    positions: Annotated[
        Path | None,
        typer.Option(
            help="Table with x, y (from 0) or ra, dec, and where known mag, r_eff, sersic_n, ellipticity, theta "
            "to start from. By default all that is detected.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Catalogue: .fits, .ecsv, .csv, .parquet or .vot. By default IMAGE_fit.fits here.",
            show_default=False,
        ),
    ] = None,
    zero_point: ZeroPoint = None,
    pixel_scale: PixelScale = None,
    hdu: Hdu = None,
    rms: Rms = None,
    wht: Wht = None,
    var: Var = None,
    mask: Mask = None,
    psf_oversampling: Oversampling = 1,
    gain: Annotated[
        float | None,
        typer.Option(help="Electrons per image unit, for the galaxies' Poisson noise.", show_default=False),
    ] = None,
    prior: Annotated[str, typer.Option(help="What to assume of galaxies: candels, none, or a table.")] = "none",
    structure: Structure = 0.05,
    robust: Robust = False,
    model: Model = None,
    residual: Residual = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    as_json: Json = False,
    overwrite: Overwrite = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Fit Sersic profiles without a network: labels for `finetune`, or a check.

    Example: sersicnet fit mosaic.fits --psf psf.fits --gain 3200 --positions targets.csv -o labels.csv
    """
    with _importing():
        from sersicnet.measuring import measure as measuring

    started = time.monotonic()
    _log_to_stderr(verbose)
    output = output or Path(measuring.stem(image) + "_fit.fits")
    with _progress(quiet, "reading") as update:
        table = measuring.fit(
            image,
            output,
            psf=psf,
            hdu=hdu,
            zero_point=zero_point,
            pixel_scale=pixel_scale,
            rms=rms,
            wht=wht,
            var=var,
            mask=mask,
            positions=positions,
            psf_oversampling=psf_oversampling,
            gain=gain,
            prior=prior,
            structure=structure,
            robust=robust,
            model=model,
            residual=residual,
            workers=workers,
            scheduler=scheduler,
            overwrite=overwrite,
            command=_command_line(),
            report=lambda stage, done, total: update(done, total or None, stage),
        )
    _say_catalogues(quiet, as_json, [(table, output)], time.monotonic() - started)


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


def _log_to_stderr(verbose: bool) -> None:
    logging.getLogger("sersicnet").setLevel(logging.INFO if verbose else logging.WARNING)
    if verbose:
        from rich.logging import RichHandler

        handler = RichHandler(console=stderr, show_path=False, show_level=False, markup=False, highlighter=None)
        logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)


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


_SEVERAL = 2**25
"""Bytes of an image from which on several processes will work on it."""


def _say_catalogues(quiet: bool, as_json: bool, written: list[tuple[QTable, Path]], seconds: float) -> None:
    """A summary of catalogues: a table for people on stderr, or JSON on stdout."""
    from sersicnet.schema import Flag

    facts: list[dict[str, Any]] = []
    for table, path in written:
        flags = table["flags"]
        facts.append(
            {
                "catalogue": str(path),
                "sources": len(table),
                "without_flags": int((flags == 0).sum()),
                "flags": {flag.name: int((flags & flag.value != 0).sum()) for flag in Flag if flags.size},
                "header": {key: value for key, value in table.meta.items() if key != "HISTORY"},
            }
        )
    if as_json:
        typer.echo(json.dumps({"seconds": round(seconds, 1), "catalogues": facts}, indent=1))
    if quiet:
        return
    for fact in facts:
        grid = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        header = fact["header"]
        grid.add_row("sources", f"{fact['sources']:,}, {fact['without_flags']:,} without flags")
        raised = [f"{name} {n:,}" for name, n in fact["flags"].items() if n]
        grid.add_row("flags", ", ".join(raised) or "none")
        if "ZEROPT" in header:
            grid.add_row("zero point", f"{header['ZEROPT']:.4f} AB, from {header['ZPSOURCE']}")
        if "PIXSCALE" in header:
            grid.add_row("pixel scale", f"{header['PIXSCALE']:.4f} arcsec, from {header['PIXSRC']}")
        if "PSFFWHM" in header:
            grid.add_row("PSF", f"{header['PSFFWHM']:.2f} pixels wide, {header['PSFSRC']}")
        if "OUTSIDE" in header:
            grid.add_row("outside of the weights' domain", header["OUTSIDE"])
        stderr.print(grid)
        _say(quiet, f"wrote {fact['catalogue']}")
    rows = sum(fact["sources"] for fact in facts)
    _say(quiet, f"{rows:,} sources in {seconds:.1f} s, {rows / max(seconds, 1e-9):.0f} a second")


@app.command()
def simulate(
    n: Annotated[
        int | None,
        typer.Option("--n", help="Stamps (20,000 by default), or galaxies of a mosaic.", min=1, show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="train.h5 by default, or mosaic.fits with --mosaic.", show_default=False),
    ] = None,
    seed: Seed = 0,
    prior: Annotated[
        str | None,
        typer.Option(
            help="Table of galaxies to draw from (mag, r_eff_pix or r_eff, sersic_n, ellipticity or q), smoothed; or "
            "candels, for those of CANDELS/COSMOS. Uniform by default.",
            show_default=False,
        ),
    ] = None,
    depth: Annotated[
        float | None,
        typer.Option(
            help="With the prior candels: as many galaxies at every AB magnitude, from 18 to this one; the survey's "
            "counts to 25 by default.",
            show_default=False,
        ),
    ] = None,
    uniform: Annotated[
        float,
        typer.Option(
            help="With --depth: fraction of the galaxies drawn uniformly instead, from mag 16 on, so that rare ones "
            "are known, too.",
            min=0,
            max=1,
        ),
    ] = 0.0,
    log_radii: Annotated[
        float, typer.Option(help="Fraction of the radii drawn log-uniformly, of the uniform prior.", min=0, max=1)
    ] = 0.0,
    psf: Annotated[
        list[Path] | None,
        typer.Option(
            help="FITS image of the effective PSF; repeat it for several, of which each stamp gets one. That of HST "
            "F160W by default.",
            show_default=False,
        ),
    ] = None,
    psf_scatter: Annotated[
        float, typer.Option(help="Stretch the default PSF by up to this fraction, narrower or wider.", min=0, max=0.49)
    ] = 0.0,
    noise_from: Annotated[
        Path | None,
        typer.Option(help="FITS image whose blank sky is the noise; drawn by default.", show_default=False),
    ] = None,
    zero_point: Annotated[
        float | None,
        typer.Option(help="AB magnitude of one unit of --noise-from; from its header by default.", show_default=False),
    ] = None,
    neighbours: Annotated[
        bool,
        typer.Option("--neighbours", help="Other galaxies and stars around, found and replaced as measure does it."),
    ] = False,
    centring: Annotated[
        bool, typer.Option("--centring", help="Centres off by as much as those of detections.")
    ] = False,
    galaxies: Annotated[
        str,
        typer.Option(
            help="sersic; or real-like: bulges, discs, arms, clumps among neighbours, labelled by a fit. Prior candels."
        ),
    ] = "sersic",
    noiseless_labels: Annotated[
        bool,
        typer.Option("--noiseless-labels", help="Fits that label real-like galaxies see neither noise nor neighbours."),
    ] = False,
    preview: Annotated[
        Path | None,
        typer.Option(
            help="Draw 32 stamps on a sheet, .png or .pdf; the set is then written only with --output.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes; all cores by default.", min=1, show_default=False)
    ] = None,
    mosaic: Annotated[
        int | None,
        typer.Option(
            help="Draw one mosaic of this many pixels a side, with OUTPUT_truth.ecsv beside it.", show_default=False
        ),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Simulate a training set of single galaxies, or a mosaic with its truth.

    Example: sersicnet simulate --n 150000 -o train.h5

    Example: sersicnet simulate --prior candels --psf star1.fits --psf star2.fits --noise-from mosaic.fits -o mine.h5

    Example: sersicnet simulate --n 20000 --neighbours --prior candels --preview sheet.png -o crowded.h5

    Example: sersicnet simulate --n 20000 --galaxies real-like -o real-like.h5

    Example: sersicnet simulate --mosaic 2000 -o mosaic.fits
    """
    with _importing():
        from sersicnet.simulating import simulate as simulations

    if mosaic is not None:
        _refuse_with_mosaic(
            prior=prior, depth=depth, uniform=uniform, log_radii=log_radii, psf=psf, psf_scatter=psf_scatter,
            noise_from=noise_from, neighbours=neighbours, centring=centring, preview=preview,
            galaxies=galaxies if galaxies != "sersic" else None, noiseless_labels=noiseless_labels,
        )  # fmt: skip
        output = output or Path("mosaic.fits")
        field = simulations.Field(mosaic, n, seed)
        with _progress(quiet, "drawing", field.count) as update:
            paths = simulations.simulate_field(
                output, field, overwrite=overwrite, command=_command_line(), progress=update
            )
        _say(quiet, f"{field.count} galaxies; wrote {paths[0]} and {paths[1]}")
        return
    n, target = n or 20_000, output or Path("train.h5")
    started = time.monotonic()
    if preview is None or output is not None:
        check_output(target, overwrite)
    with _progress(quiet, "reading"):
        simulation = simulations.plan(
            n,
            seed,
            prior=prior,
            depth=depth,
            uniform=uniform,
            log_radii=log_radii,
            psf=psf or (),
            psf_scatter=psf_scatter,
            noise_from=noise_from,
            zero_point=zero_point,
            neighbours=neighbours,
            centring=centring,
            galaxies=galaxies,
            noiseless_labels=noiseless_labels,
        )
    if preview is not None:
        from sersicnet.simulating.preview import preview as draw

        with _progress(quiet, "drawing"):
            draw(preview, simulation, overwrite=overwrite)
        _say(quiet, f"wrote {preview}")
        if output is None:
            return
    with _progress(quiet, "drawing", n) as update:
        simulations.simulate(
            output or "train.h5",
            simulation,
            workers=workers,
            overwrite=overwrite,
            command=_command_line(),
            progress=update,
        )
    _say(quiet, f"{n} stamps in {time.monotonic() - started:.0f} s; wrote {output or 'train.h5'}")


def _refuse_with_mosaic(**options: Any) -> None:
    named = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    _refuse_with("--mosaic takes --n, --seed and --output", named)


def _refuse_with(rule: str, options: Mapping[str, Any]) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        raise InputError(f"{rule}; received {', '.join(given)} with it.")


_EPOCH_COLUMNS = (
    ("epoch", 7), ("loss", 8), ("mag", 6), ("R_e [px]", 8), ("n", 6), ("e", 6), ("rate", 7), ("stamps/s", 8), ("s", 6),
)  # fmt: skip
_SETTLED = 20
"""Steps after which the first, slow ones are over."""


@contextmanager
def _training_progress(quiet: bool, network: str, board: Path | None) -> Iterator[Callable[[training.Progress], None]]:
    """A bar for the steps and a table of the epochs; says first what it runs on, and soon how long it will take."""
    from sersicnet.training import train as training

    _say(quiet, f"training on {training.device()}, by Keras with {training.keras.backend.backend()}")
    first: list[tuple[int, float]] = []
    roads: list[str] = []

    def estimate(progress: training.Progress) -> None:
        if len(first) < 2:
            first.append((progress.step, time.monotonic()))
        elif len(first) == 2 and progress.step >= first[1][0] + _SETTLED:
            step, then = first[1]
            seconds = (time.monotonic() - then) / (progress.step - step) * progress.steps
            first.append((0, 0.0))
            _say(quiet, training.estimate(network, progress.stamps_per_second, seconds))

    with training.tensorboard(board) as write, _progress(quiet, "training") as update:

        def report(progress: training.Progress) -> None:
            write(progress)
            if progress.record is None:
                what = f"{progress.road and progress.road + ', '}epoch {progress.epoch}/{progress.epochs}"
                update(progress.step, progress.steps, f"{what}, loss {progress.loss:.4f}")
                estimate(progress)
            elif not quiet:
                if progress.road not in roads:
                    roads.append(progress.road)
                    if progress.road:
                        _say(quiet, f"{progress.road}:")
                    stderr.print(_epoch_row(None))
                stderr.print(_epoch_row(progress))

        yield report


def _epoch_row(progress: training.Progress | None) -> Table:
    """A row of the table of epochs, or its head; the errors are medians on the validation set."""
    row = Table.grid(padding=(0, 1))
    for _, width in _EPOCH_COLUMNS:
        row.add_column(justify="right", width=width, no_wrap=True)
    if progress is None or progress.record is None:
        row.add_row(*(Text(name) for name, _ in _EPOCH_COLUMNS), style="bold")
        return row
    record = progress.record
    errors = (f"{record[f'error_{name}']:.3g}" for name in TARGET_NAMES)
    row.add_row(
        f"{progress.epoch}/{progress.epochs}",
        f"{record['loss']:.4f}",
        *errors,
        f"{record['learning_rate']:.1e}",
        f"{record['stamps_per_second']:.0f}",
        f"{record['seconds']:.0f}",
    )
    return row


TestSet = Annotated[Path | None, typer.Option(help="Another dataset, whose scores go on the card.", show_default=False)]
LearningRate = Annotated[
    float | None,
    typer.Option(
        help="At its peak, instead of the recipe's own: lower for weights that know much.", show_default=False
    ),
]
Fresh = Annotated[
    bool,
    typer.Option(
        "--fresh", help="Simulate new galaxies by DATA's recipe in every epoch; DATA itself only validates then."
    ),
]
TensorBoard = Annotated[Path | None, typer.Option(help="Directory for event files of TensorBoard.", show_default=False)]


@app.command()
def train(
    data: Annotated[Path, typer.Argument(help="Training set from `sersicnet simulate`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Weights directory to write.")] = Path("weights-new"),
    network: Annotated[str, typer.Option(help="fovea, tl or dann.")] = "fovea",
    test: TestSet = None,
    start: Annotated[
        str | None,
        typer.Option(help="Weights of the same network to begin from: a name or a directory.", show_default=False),
    ] = None,
    adapt: Annotated[
        str | None,
        typer.Option(
            help="Make the features of real and simulated galaxies alike: dann (an adversary) or daregram (inverse "
            "Gram matrices).",
            show_default=False,
        ),
    ] = None,
    real: Annotated[
        Path | None,
        typer.Option(
            help="Real galaxies for --adapt: a CSV of labels, a dataset, or a FITS mosaic.", show_default=False
        ),
    ] = None,
    real_labels: Annotated[
        bool, typer.Option(help="Whether labels of the real galaxies train the regression too.")
    ] = True,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="For --adapt: weight of the regression against the alignment, from 0 to 1; 0.9 as in the study.",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    epochs: Annotated[
        int | None, typer.Option(help="At most this many; the recipe's own by default.", min=1, show_default=False)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Use only so many stamps of DATA.", min=1, show_default=False)
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            help="Stamps a step; the recipe's own by default. A GPU is busier with more, at a higher learning rate.",
            min=2,
            show_default=False,
        ),
    ] = None,
    learning_rate: LearningRate = None,
    fresh: Fresh = False,
    tensorboard: TensorBoard = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Train a network on simulated stamps; the same command continues a broken run.

    Example: sersicnet train train.h5 -o my-weights --test test.h5

    Example: sersicnet train train.h5 --start fovea-sim --adapt dann --real labels.csv -o my-dann
    """
    from dataclasses import replace

    with _importing():
        from sersicnet import dataset
        from sersicnet.training import train as training

    recipe = (training.RECIPES if adapt is None else training.ADAPT).get(network)
    if recipe is not None:
        given = {"epochs": epochs, "alpha": alpha, "batch": batch, "learning_rate": learning_rate}
        recipe = replace(recipe, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    with _training_progress(quiet, network, tensorboard) as report:
        done = training.train(
            data,
            output,
            network=network,
            recipe=recipe,
            seed=seed,
            limit=limit,
            start=start,
            test=test,
            adapt=adapt,
            real=None if real is None else dataset.real_galaxies(real),
            real_labels=real_labels,
            fresh=fresh,
            overwrite=overwrite,
            command=_command_line(),
            report=report,
        )
    _say(quiet, f"wrote {done.path}")


@app.command()
def finetune(
    real: Annotated[
        Path,
        typer.Option(
            help="CSV of labelled galaxies: image, x, y (or ra, dec), mag, r_eff_pix (or r_eff, arcsec), "
            "sersic_n, ellipticity (or q); or a dataset.",
            show_default=False,
        ),
    ],
    image: Annotated[
        Path | None, typer.Option(help="The one image of all rows, instead of the column.", show_default=False)
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Weights directory to write.")] = Path("finetuned"),
    weights: WeightsName = "fovea-sim",
    zero_point: ZeroPoint = None,
    layers: Annotated[
        str,
        typer.Option(
            help="all at once; head-first: those behind the features, then all; auto: both, the better one is kept."
        ),
    ] = "auto",
    epochs: Annotated[int, typer.Option(help="Epochs; the best validation error is kept.", min=1)] = 15,
    test: TestSet = None,
    seed: Seed = 0,
    tensorboard: TensorBoard = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Carry weights to real galaxies with your own labels (transfer learning).

    Example: sersicnet finetune --real labels.csv -o my-weights
    """
    from dataclasses import replace

    with _importing():
        from sersicnet import dataset
        from sersicnet.training import train as training
    from sersicnet.weights import load as loaded

    galaxies = dataset.real_galaxies(real, image, zero_point)
    network = loaded(weights, to_train=True).card["network"]
    recipe = training.FINETUNE[network]
    with _training_progress(quiet, network, tensorboard) as report:
        done = training.finetune(
            galaxies,
            output,
            base=weights,
            layers=layers,
            recipe=replace(recipe, epochs=epochs),
            seed=seed,
            test=test,
            overwrite=overwrite,
            command=_command_line(),
            report=report,
        )
    _say(quiet, f"wrote {done.path}")


@app.command()
def export(
    weights: Annotated[Path, typer.Argument(help="Weights directory without network.onnx.")],
    quiet: Quiet = False,
) -> None:
    """Make the file that measures, of weights that were trained on a machine without TensorFlow.

    Example: sersicnet export my-weights
    """
    from sersicnet.weights import ONNX
    from sersicnet.weights import export as run

    done = run(weights)
    _say(quiet, f"wrote {done.path / ONNX}")


@app.command()
def adapt(
    image: Annotated[Path, typer.Argument(help="FITS mosaic of your survey; an extension may stand in brackets.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Weights directory to write.")] = Path("adapted"),
    weights: WeightsName = "fovea-sim",
    psf: Annotated[
        Path | None,
        typer.Option(help="FITS image of the effective PSF; the mosaic's stars by default.", show_default=False),
    ] = None,
    gain: Annotated[
        float | None,
        typer.Option(help="Electrons per image unit; as deep as the training images by default.", show_default=False),
    ] = None,
    prior: Annotated[
        str,
        typer.Option(
            help="Which galaxies to simulate: candels, for shapes as there and as many at every magnitude; uniform; or "
            "a table of galaxies."
        ),
    ] = "candels",
    n: Annotated[int, typer.Option("--n", help="Simulated galaxies.", min=1)] = 20_000,
    epochs: Annotated[int, typer.Option(help="Epochs of training.", min=1)] = 3,
    adapt: Annotated[
        str,
        typer.Option(
            help="Besides, make the features of real and simulated galaxies alike: none, dann (an adversary) or "
            "daregram (inverse Gram matrices)."
        ),
    ] = "none",
    zero_point: ZeroPoint = None,
    pixel_scale: PixelScale = None,
    seed: Seed = 0,
    workers: Annotated[
        int | None, typer.Option(help="Processes that simulate; all cores by default.", min=1, show_default=False)
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Adapt weights to your own survey, without labels: PSF and noise are measured in the mosaic.

    Galaxies are simulated with them, and the weights trained on. What was measured and gained goes to stdout.

    Example: sersicnet adapt mosaic.fits -o my-weights

    Example: sersicnet adapt mosaic.fits --psf psf.fits --gain 3200 --prior galaxies.csv -o my-weights
    """
    with _progress(quiet, "reading") as update:
        with _importing():
            from sersicnet.training import adapt as adapting

        done = adapting.adapt(
            image,
            output,
            base=weights,
            how=adapt,
            n=n,
            epochs=epochs,
            prior=prior,
            psf=psf,
            gain=gain,
            zero_point=zero_point,
            pixel_scale=pixel_scale,
            seed=seed,
            workers=workers,
            overwrite=overwrite,
            command=_command_line(),
            tell=lambda line: _say(quiet, line),
            report=lambda stage, done, total: update(done, total or None, stage),
        )
    if not quiet:
        typer.echo(adapting.as_markdown(done))
    _say(quiet, f"wrote {done.path}, with the PSF in {done.path / adapting.PSF}")


@app.command()
def evaluate(
    data: Annotated[
        Path,
        typer.Argument(
            help="Dataset from `sersicnet simulate`, a CSV of labelled galaxies, or a catalogue with --truth."
        ),
    ],
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weights",
            "-w",
            help="Name of shipped weights, or a directory; repeat it to compare several. fovea-sky by default.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Directory for scores and figures.", show_default=False),
    ] = None,
    limits: Annotated[
        bool, typer.Option("--limits", help="What the noise allows, beside each R²: 0.15 s a galaxy, for 500 of them.")
    ] = False,
    domains: Annotated[
        Path | None,
        typer.Option(
            help="Dataset or CSV of another domain: can a classifier tell it from DATA by the network's features?",
            show_default=False,
        ),
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(help="Table of the true galaxies; DATA is then a catalogue, matched with it.", show_default=False),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="For --truth: greatest distance of a match. 0.3 arcsec on the sky, or 5 pixels, by default.",
            show_default=False,
        ),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="For CSVs: the one image of all rows.", show_default=False)] = None,
    zero_point: ZeroPoint = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Score weights, or a catalogue, on galaxies whose truth is known; the tables go to stdout.

    Example: sersicnet evaluate test.h5 --weights fovea-sim --weights ./my-weights -o scores

    Example: sersicnet evaluate test.h5 --limits

    Example: sersicnet evaluate test.h5 --domains labels.csv

    Example: sersicnet evaluate cat.fits --truth mosaic_truth.ecsv
    """
    with _importing():
        from sersicnet.evaluating import evaluate as evaluation

    if truth is not None:
        _refuse_with("--truth compares a catalogue and takes --tolerance and --output", {
            "--weights": weights, "--limits": limits, "--domains": domains, "--image": image,
            "--zero-point": zero_point is not None,
        })  # fmt: skip
        with _progress(quiet, "matching"):
            result = evaluation.evaluate_catalogue(data, truth, output, tolerance=tolerance, overwrite=overwrite)
    else:
        if tolerance is not None or data.suffix.lower() in (".fits", ".ecsv", ".parquet"):
            raise InputError(f"A catalogue is scored with the table of its true galaxies: give --truth for {data}.")
        with _progress(quiet, "reading") as update:
            result = evaluation.evaluate(
                data,
                weights or ["fovea-sky"],
                output,
                image=image,
                zero_point=zero_point,
                limits=limits,
                domains=domains,
                overwrite=overwrite,
                report=lambda stage, done, total: update(done, total or None, stage),
            )
    typer.echo(evaluation.as_markdown(result))


@app.command()
def info() -> None:
    """Print versions, devices and weights, as Markdown for a bug report.

    Example: sersicnet info
    """
    from sersicnet.cli.info import info as describe

    with _progress(False, "looking"):
        text = describe()
    typer.echo(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits 0 when done, 1 for an error, 2 for wrong usage, 130 if interrupted."""
    _arguments[:] = sys.argv[1:] if arguments is None else arguments
    show = warnings.showwarning

    def show_warning(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if issubclass(category, SersicnetWarning):
            stderr.print(f"Warning: {message}", markup=False, soft_wrap=True)
        else:
            show(message, category, *rest)

    with warnings.catch_warnings():
        warnings.simplefilter("always", SersicnetWarning)
        warnings.showwarning = show_warning  # type: ignore[assignment]
        try:
            app(args=_arguments)
        except (SersicnetError, OSError) as error:
            stderr.print(f"Error: {error}", markup=False, soft_wrap=True)
            sys.exit(1)
        except KeyboardInterrupt:
            sys.exit(130)
