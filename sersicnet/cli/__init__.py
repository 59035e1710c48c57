"""The command line: a file a command, and what several share.

Each command is a thin pair with a function of the same name elsewhere, which
returns data and never prints. Everything heavy is imported inside a command, so
that help comes at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any

import typer

import sersicnet
from sersicnet.cli import adapt, evaluate, export, finetune, fit, info, measure, shared, simulate, train, validate

app = typer.Typer(
    name="sersicnet",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Structural parameters of galaxies from images, by convolutional networks.

    Example: sersicnet measure mosaic.fits -o cat.fits""",
)
for _command in (
    measure.measure,
    fit.fit,
    validate.validate,
    simulate.simulate,
    train.train,
    finetune.finetune,
    export.export,
    adapt.adapt,
    evaluate.evaluate,
    info.info,
):
    app.command(cls=shared.Command)(_command)


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


@cache
def _built() -> Any:
    """The commands, which Typer would build anew in every call of `app`."""
    return typer.main.get_command(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits 0 when done, 1 for an error, 2 for wrong usage, 130 if interrupted."""
    shared.arguments[:] = sys.argv[1:] if arguments is None else arguments
    try:
        _built()(args=shared.arguments)
    except KeyboardInterrupt:  # before the command begins; later ones are caught inside
        sys.exit(130)
