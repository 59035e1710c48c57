"""The command `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sersicnet.cli.shared import Overwrite, Quiet, ZeroPoint, importing, progress_bar, refuse, stages
from sersicnet.errors import InputError


def evaluate(
    data: Annotated[
        Path,
        typer.Argument(
            help="Dataset from `sersicnet simulate`, table of labelled galaxies, or with --truth a catalogue."
        ),
    ],
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weights",
            "-w",
            help="Name of shipped weights, or a weights directory; fovea by default. Repeat it to compare several.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Directory to write scores and figures to.", show_default=False),
    ] = None,
    limits: Annotated[
        bool,
        typer.Option(
            "--limits",
            help="Also compute the best scores that the noise allows, for 500 galaxies at 0.15 s each.",
        ),
    ] = False,
    domains: Annotated[
        Path | None,
        typer.Option(
            help="Dataset or table of another domain; a classifier tries to separate it from DATA by the features of "
            "the network.",
            show_default=False,
        ),
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(help="Table of the true galaxies, which is matched with the catalogue DATA.", show_default=False),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="For --truth: largest distance of a match, 0.3 arcsec on the sky or 5 pixels by default.",
            show_default=False,
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            help="For tables of labels: FITS image of all galaxies, instead of the column image.", show_default=False
        ),
    ] = None,
    zero_point: ZeroPoint = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Score weights, or a catalogue, on galaxies with known parameters, and print the scores on stdout.

    Example: sersicnet evaluate test.h5 --weights fovea-sim --weights ./my-weights -o scores

    Example: sersicnet evaluate test.h5 --limits

    Example: sersicnet evaluate test.h5 --domains labels.csv

    Example: sersicnet evaluate cat.fits --truth mosaic_truth.ecsv
    """
    # long: the options.
    with importing():
        from sersicnet.evaluating import evaluate as evaluation

    if truth is not None:
        refuse(
            "`truth` compares a catalogue and takes `tolerance` and `output`",
            weights=weights, limits=limits, domains=domains, image=image, zero_point=zero_point is not None,
        )  # fmt: skip
        with progress_bar(quiet, "matching"):
            result = evaluation.evaluate_catalogue(data, truth, output, tolerance=tolerance, overwrite=overwrite)
    else:
        if tolerance is not None:
            raise InputError(
                "`tolerance` is the largest distance of a match with `truth`; received `tolerance` without it. Give "
                "`truth`, or leave out `tolerance`."
            )
        if image is None and evaluation.lacks_images(data):
            raise InputError(
                f"A catalogue is scored with the table of its true galaxies: give `truth` for {data}; or `image`, if "
                "it is a table of labels without a column image."
            )
        with progress_bar(quiet, "reading") as update:
            result = evaluation.evaluate(
                data,
                weights or ["fovea"],
                output,
                image=image,
                zero_point=zero_point,
                limits=limits,
                domains=domains,
                overwrite=overwrite,
                report=stages(update),
            )
    typer.echo(evaluation.as_markdown(result))
