"""What commands share: options, progress, summaries, and errors and warnings that name options."""

from __future__ import annotations

import errno
import gc
import logging
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from sersicnet.errors import InputError, SersicnetError, SersicnetWarning, counted, printable
from sersicnet.output import json_text

if TYPE_CHECKING:
    from astropy.table import QTable

    from sersicnet.training import loop


class _Stderr:
    """Standard error. What it cannot take, such as after a terminal was closed, is dropped: it must not end a run."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, what: str, *text: str) -> None:
        if sys.stderr is not None:
            try:
                getattr(sys.stderr, what)(*text)
            except OSError:
                sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  # Python flushes it when it ends


stderr = Console(file=cast("IO[str]", _Stderr()), highlight=False)
arguments: list[str] = []
"""Arguments of the running command line."""

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
ZeroPoint = Annotated[
    float | None,
    typer.Option(help="AB magnitude of one image unit; read from the header by default.", show_default=False),
]
WeightsName = Annotated[str, typer.Option("--weights", "-w", help="Name of shipped weights, or a weights directory.")]
Seed = Annotated[int, typer.Option(help="Seed of all random numbers.", min=0)]

Image = Annotated[Path, typer.Argument(help="FITS image in any linear unit, sky-subtracted or not.")]
PixelScale = Annotated[
    float | None, typer.Option(help="Arcsec per pixel; read from the WCS by default.", show_default=False)
]
Hdu = Annotated[
    str | None,
    typer.Option(help="Number or name of the extension; SCI or the first image by default.", show_default=False),
]
Rms = Annotated[Path | None, typer.Option(help="FITS map of the noise (rms).", show_default=False)]
Wht = Annotated[Path | None, typer.Option(help="FITS map of the inverse variance.", show_default=False)]
Var = Annotated[Path | None, typer.Option(help="FITS map of the variance.", show_default=False)]
NoiseIncludes = Annotated[
    str | None,
    typer.Option(
        "--noise",
        help="Content of the noise map: sky, the noise of blank pixels; or total, which includes the photon noise of "
        "sources, so that fits do not add it.",
        metavar="[sky|total]",
        show_default=False,
    ),
]
NoiseAsGiven = Annotated[
    bool,
    typer.Option(
        "--noise-as-given", help="Take the noise map as it is, instead of scaling it to the scatter of blank pixels."
    ),
]
Mask = Annotated[Path | None, typer.Option(help="FITS image; nonzero pixels are ignored.", show_default=False)]
Oversampling = Annotated[
    int | None,
    typer.Option(
        "--psf-oversampling",
        help="Number of PSF pixels along one image pixel; from the header of the PSF, or 1, by default.",
        min=1,
        show_default=False,
    ),
]
ModelError = Annotated[
    float,
    typer.Option(
        help="Deviation of galaxies from a Sersic profile, as a fraction of their surface brightness; "
        "fits count it as noise.",
        min=0,
    ),
]
Robust = Annotated[bool, typer.Option("--robust", help="Limit the influence of pixels far from the model on fits.")]
Model = Annotated[Path | None, typer.Option(help="FITS image to write: the fitted galaxies.", show_default=False)]
Residual = Annotated[
    Path | None,
    typer.Option(help="FITS image to write: the image minus its sky and the fitted galaxies.", show_default=False),
]

Resample = Annotated[
    bool, typer.Option("--resample", help="First resample the image to the pixel scale of the weights.")
]
Refine = Annotated[
    bool,
    typer.Option("--refine", help="Fit a Sersic profile to each source, starting from the network's parameters."),
]
PsfFile = Annotated[
    Path | None,
    typer.Option(
        help="File of the PSF: an image, PSFEx, a grid of PSFs or stamps of stars with positions. By default the "
        "PSF is measured from the stars of the image; with weights of one PSF, --refine takes theirs.",
        show_default=False,
    ),
]
PsfFwhm = Annotated[
    float | None,
    typer.Option(
        help="FWHM of the PSF in pixels, if only its width is known; by default the PSF is measured from the stars of "
        "the image. Only for weights that are shown the PSF.",
        show_default=False,
    ),
]
Gain = Annotated[
    float | None,
    typer.Option(
        help="Electrons per image unit, for --refine and for weights that are shown the photon noise of galaxies.",
        show_default=False,
    ),
]
Columns = Annotated[
    str,
    typer.Option(
        help="Columns of the catalogue, with commas between: names, groups of them (position_errors, "
        "surface_brightness, correlations, quantiles), or all. Names with a + are added to the default columns: "
        "+correlations,+quantiles.",
        metavar="NAME,...",
        show_default=False,
    ),
]
FitPrior = Annotated[str, typer.Option(help="Prior of --refine: candels, none, or a table of galaxies.")]

Workers = Annotated[
    int | None, typer.Option(help="Number of processes; all cores by default.", min=1, show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log each step on stderr.")]
Scheduler = Annotated[
    str | None,
    typer.Option(help="Address of a Dask scheduler, tcp://HOST:PORT, whose workers do the work.", show_default=False),
]
Device = Annotated[
    str,
    typer.Option(help="Device that runs the network: cpu, gpu, or auto, a GPU if ONNX Runtime finds a working one."),
]

TestSet = Annotated[
    Path | None, typer.Option(help="Test set; the scores on it are listed on the card.", show_default=False)
]

TensorBoard = Annotated[Path | None, typer.Option(help="Directory for TensorBoard event files.", show_default=False)]


OTHER_NAMES = {
    "base": ("weights",),
    "exposure": ("image", "images"),
    "how": ("adapt",),
    "noise": ("rms", "wht", "var"),
    "weights_names": ("weights",),
}
"""Parameters of the library, and the options that set them, where the names differ."""

_PARAMETER = re.compile(r"`(\w+)(?:=([^`]+))?`")
_QUOTES = "'\""
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)


class Command(TyperCommand):
    """A command whose errors and warnings are one line each and name its options, not the parameters of the library."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error that the user can mend exits with 1, any other is a bug and leaves a traceback."""
        show = warnings.showwarning

        def show_warning(message: Warning | str, category: type[Warning], *rest: Any) -> None:
            if issubclass(category, SersicnetWarning):
                self._print("Warning", str(message))
            else:
                show(message, category, *rest)

        with warnings.catch_warnings():
            warnings.simplefilter("always", SersicnetWarning)
            warnings.showwarning = show_warning  # type: ignore[assignment]
            try:
                return super().invoke(ctx)
            except SersicnetError as error:
                self._print("Error", str(error))
            except MemoryError:
                self._print("Error", "The memory does not suffice. Give fewer `workers`, or use a larger machine.")
            except OSError as error:
                if error.filename is None and error.errno not in _DISK_IS_FULL:
                    raise
                self._print("Error", str(error))
        raise typer.Exit(1)

    def _print(self, kind: str, message: str) -> None:
        stderr.print(printable(f"{kind}: {self.with_options(message)}"), markup=False, soft_wrap=True)

    def with_options(self, message: str) -> str:
        """Replace each parameter in backticks by the option or argument that sets it.

        ``zero_point`` becomes --zero-point, ``workers=1`` --workers 1 and
        ``real_labels=False`` --no-real-labels. Other words in backticks stay.
        """
        return _PARAMETER.sub(self._option, message)

    def _option(self, found: re.Match[str]) -> str:
        name, value = found.groups()
        own = {parameter.name: parameter for parameter in self.params}
        names = (name,) if name in own else OTHER_NAMES.get(name, ())
        options = [_spelled(own[name], value) for name in names if name in own]
        return " or ".join(options) or found[0]


def _spelled(parameter: Any, value: str | None) -> str:
    """Return an option with its value, or the name of an argument, as the help spells it."""
    if parameter.param_type_name == "argument":
        return parameter.metavar or parameter.name.upper()
    if value == "False" and parameter.secondary_opts:
        return parameter.secondary_opts[0]
    option = parameter.opts[0]
    return option if value is None or parameter.is_flag else f"{option} {value.strip(_QUOTES)}"


def command_line() -> str:
    """Return the running command line, quoted for a shell; outputs record it."""
    return printable(shlex.join(["sersicnet", *arguments]))


@contextmanager
def importing() -> Iterator[None]:
    """Import without garbage collection, and exempt the imported objects from it: saves a third of import and exit."""
    gc.disable()
    try:
        yield
    finally:
        _silence_astropy()
        if not gc.get_freeze_count():  # once a process
            gc.freeze()
        gc.enable()


def _silence_astropy() -> None:
    """Keep astropy's log off the screen: it prints INFO on stdout, and its warnings before our line on stderr."""
    if "astropy" in sys.modules:
        logging.getLogger("astropy").setLevel(logging.ERROR)


@contextmanager
def progress_bar(quiet: bool, description: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Show a progress bar on stderr, unless quiet or not on a terminal.

    Yields a function ``update(completed, total=None, description=None)``.
    """
    if quiet or not stderr.is_terminal:
        yield lambda *amounts, **words: None  # a disabled bar of Rich before 14.3 prints an empty line
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task(description, total=total)

        def update(completed: int, total: int | None = None, description: str | None = None) -> None:
            bar.update(task, completed=completed, total=total, description=description)

        yield update


def stages(update: Callable[..., None]) -> Callable[[str, int, int], None]:
    """Return the report of a function that works in stages, shown by a progress bar."""
    return lambda stage, done, total: update(done, total or None, stage)


def say(quiet: bool, text: str) -> None:
    """Print one line on stderr, unless quiet."""
    if not quiet:
        stderr.print(printable(text), markup=False, soft_wrap=True)


def log_to_stderr(verbose: bool) -> None:
    """Print the log of the package on stderr, if verbose."""
    logging.getLogger("sersicnet").setLevel(logging.INFO if verbose else logging.WARNING)
    if verbose:
        from rich.logging import RichHandler

        handler = RichHandler(console=stderr, show_path=False, show_level=False, markup=False, highlighter=None)
        logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)


def opening(rms: Path | None, wht: Path | None, var: Path | None, **options: Any) -> dict[str, Any]:
    """Return the options of `Exposure.open`, among them the noise map that is given."""
    maps = {kind: path for kind, path in (("rms", rms), ("wht", wht), ("var", var)) if path is not None}
    if len(maps) > 1:
        raise InputError(f"Give only one noise map; received {' and '.join(f'`{kind}`' for kind in maps)}.")
    for kind, path in maps.items():
        options |= {"noise": path, "noise_kind": kind}
    return options


def cores(workers: int | None) -> int:
    """Return the number of processes; by default one for each core that this process may use."""
    from sersicnet.workers import cores  # takes time that `sersicnet --help` need not wait for

    return workers or cores()


def refuse(rule: str, **options: Any) -> None:
    """Raise InputError if any of the options is given."""
    given = [f"`{name}`" for name, value in options.items() if value]
    if given:
        raise InputError(f"{rule}; received {', '.join(given)} with it.")


def say_catalogues(quiet: bool, as_json: bool, written: list[tuple[QTable, Path]], seconds: float) -> None:
    """Summarize catalogues: as a table on stderr, or as JSON on stdout."""
    from sersicnet.schema import Flag

    facts: list[dict[str, Any]] = []
    for table, path in written:
        fact: dict[str, Any] = {"catalogue": str(path), "sources": len(table)}
        if "flags" in table.colnames:
            flags = table["flags"]
            fact["without_flags"] = int((flags == 0).sum())
            fact["flags"] = {flag.name: int((flags & flag.value != 0).sum()) for flag in Flag if flags.size}
        fact["header"] = {key: value for key, value in table.meta.items() if key != "HISTORY"}
        facts.append(fact)
    if as_json:
        typer.echo(json_text({"seconds": round(seconds, 1), "catalogues": facts}))
    if quiet:
        return
    for fact in facts:
        grid = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        header = fact["header"]

        def source(key: str, before: str, header: dict[str, Any] = header) -> str:
            """Where a value is from; bands may have the same value from different sources."""
            return f"{before}{header[key]}" if key in header else ""

        clean = f", {fact['without_flags']:,} without flags" if "flags" in fact else ""
        grid.add_row("sources", f"{fact['sources']:,}{clean}")
        if "flags" in fact:
            raised = [f"{name} {n:,}" for name, n in fact["flags"].items() if n]
            grid.add_row("flags", ", ".join(raised) or "none")
        if "ZEROPT" in header:
            grid.add_row("zero point", f"{header['ZEROPT']:.4f} AB" + source("ZPSOURCE", ", from "))
        if "PIXSCALE" in header:
            grid.add_row("pixel scale", f"{header['PIXSCALE']:.4f} arcsec" + source("PIXSRC", ", from "))
        if header.get("DEVICE") == "gpu":
            grid.add_row("network", "ran on the GPU")
        if "PSFFWHM" in header:
            grid.add_row("PSF", psf_in_words(header))
        if "PSFDOUBT" in header:
            grid.add_row("doubtful PSF", header["PSFDOUBT"])
        if "OUTSIDE" in header:
            grid.add_row("outside the domain of the weights", header["OUTSIDE"])
        stderr.print(grid)
        say(quiet, f"wrote {fact['catalogue']}")
    rows = sum(fact["sources"] for fact in facts)
    what = counted(rows, "source")
    if len(facts) > 1:  # of the same sources, if they are those of bands
        what = f"{counted(rows, 'row')} of {counted(len(facts), 'catalogue')}"
    say(quiet, f"{what} in {seconds:.1f} s, {rows / max(seconds, 1e-9):.0f} a second")


def psf_in_words(header: Mapping[str, Any]) -> str:
    """The PSF of a catalogue, from the cards of its header: its width, how it varies, its light and its source."""
    fwhm = header["PSFFWHM"]
    words = f"FWHM {fwhm:.2f} pixels"
    if "PSFERR" in header:  # a PSF that a network is shown, in pixels of the image
        scale = f", {fwhm * header['PIXSCALE']:.3g} arcsec" if "PIXSCALE" in header else ""
        error = f" ± {header['PSFERR'] * fwhm:.2f}" if header["PSFERR"] else ""
        words = f"FWHM {fwhm:.2f}{error} pixels{scale}"
    if header.get("PSFMIN", 0) < header.get("PSFMAX", 0):
        words += f", {header['PSFMIN']:.2f} to {header['PSFMAX']:.2f} over the image"
    if "PSFLIGHT" in header:
        words += f", {header['PSFLIGHT']:.0%} of the light within two FWHM"
    return words + (f"; {header['PSFSRC']}" if "PSFSRC" in header else "")  # bands may have one width from two sources


_EPOCH_COLUMNS = (
    ("epoch", 7), ("loss", 8), ("mag", 6), ("R_e [px]", 8), ("n", 6), ("e", 6), ("rate", 7), ("stamps/s", 8), ("s", 6),
)  # fmt: skip
_SETTLED = 20
"""Number of first, slow steps that an estimate of the time leaves out."""


@contextmanager
def training_progress(
    quiet: bool, network: str, board: Path | None, epochs: int | None = None
) -> Iterator[Callable[[loop.Progress], None]]:
    """Show a bar of the steps and a table of the epochs; print the device first and an estimate of the time soon.

    With 0 epochs nothing is trained, and there is a bar only.
    """
    from sersicnet.networks import keras
    from sersicnet.training import device, loop

    if epochs != 0:
        say(quiet, f"training on {device.device()}, by Keras with {keras.backend.backend()}")
    first: list[tuple[int, float]] = []
    schedules: list[str] = []

    def estimate(progress: loop.Progress) -> None:
        if len(first) < 2:
            first.append((progress.step, time.monotonic()))
        elif len(first) == 2 and progress.step >= first[1][0] + _SETTLED:
            step, then = first[1]
            seconds = (time.monotonic() - then) / (progress.step - step) * progress.steps
            first.append((0, 0.0))
            say(quiet, device.estimate(network, progress.stamps_per_second, seconds))

    with loop.tensorboard(board) as write, progress_bar(quiet, "training") as update:

        def report(progress: loop.Progress) -> None:
            write(progress)
            if progress.epochs == 0:
                update(progress.step, progress.steps, "calibrating errors")
            elif progress.record is None:
                what = f"{progress.schedule and progress.schedule + ', '}epoch {progress.epoch}/{progress.epochs}"
                update(progress.step, progress.steps, f"{what}, loss {progress.loss:.4f}")
                estimate(progress)
            elif not quiet:
                if progress.schedule not in schedules:
                    schedules.append(progress.schedule)
                    if progress.schedule:
                        say(quiet, f"{progress.schedule}:")
                    stderr.print(_epoch_row(None))
                stderr.print(_epoch_row(progress))

        yield report


def _epoch_row(progress: loop.Progress | None) -> Table:
    """Return a row of the table of epochs, or its head; errors are medians on the validation set."""
    from sersicnet.schema import TARGET_NAMES

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
