"""The command `train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sersicnet.cli.shared import (
    Overwrite,
    Quiet,
    Seed,
    TensorBoard,
    TestSet,
    command_line,
    importing,
    say,
    training_progress,
)
from sersicnet.errors import InputError
from sersicnet.output import check_directory


def train(
    data: Annotated[
        list[Path], typer.Argument(help="Training set from `sersicnet simulate`, or several, which are used together.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Weights directory to write.")] = Path("weights-new"),
    network: Annotated[
        str | None,
        typer.Option(
            help="Architecture: fovea, which is shown the PSF, fovea-fixed, tl or dann. That of --start by default, or "
            "else fovea.",
            show_default=False,
        ),
    ] = None,
    test: TestSet = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="Weights of the same architecture to start from: a shipped name or a directory.", show_default=False
        ),
    ] = None,
    adapt: Annotated[
        str | None,
        typer.Option(
            help="Align the features of real and simulated galaxies: dann (domain-adversarial) or daregram (inverse "
            "Gram matrices).",
            show_default=False,
        ),
    ] = None,
    real: Annotated[
        Path | None,
        typer.Option(
            help="Real galaxies for --adapt: a table of labels, a dataset, or a FITS mosaic.", show_default=False
        ),
    ] = None,
    real_labels: Annotated[
        bool, typer.Option(help="Whether the labels of the real galaxies train the regression, too.")
    ] = True,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="For --adapt: weight of the regression against the alignment, from 0 to 1; 0.9, as in the study, by "
            "default.",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    epochs: Annotated[
        int | None,
        typer.Option(
            help="Largest number of epochs; that of the network's recipe by default. With 0, --start is only "
            "calibrated, on all stamps of DATA.",
            min=0,
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Number of stamps of DATA to use; all by default.", min=1, show_default=False)
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            help="Stamps per step; that of the network's recipe by default. Larger batches use a GPU better and need a "
            "higher --learning-rate.",
            min=2,
            show_default=False,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate; that of the network's recipe by default. Lower rates suit weights that are "
            "trained already.",
            show_default=False,
        ),
    ] = None,
    anneal: Annotated[
        bool | None,
        typer.Option(
            "--anneal/--no-anneal",
            help="Lower the learning rate to zero along a cosine; as in the network's recipe by default (fovea does).",
            show_default=False,
        ),
    ] = None,
    symmetries: Annotated[
        bool | None,
        typer.Option(
            "--symmetries/--no-symmetries",
            help="Show each stamp in a random one of its eight orientations; as in the network's recipe by default "
            "(fovea does).",
            show_default=False,
        ),
    ] = None,
    bfloat16: Annotated[
        bool,
        typer.Option(
            "--bfloat16",
            help="Compute convolutions in bfloat16 while training: 1.3 times (fovea) to 3.7 times (dann) as fast on a "
            "CPU with AMX; refused on a CPU without bfloat16.",
        ),
    ] = False,
    on_the_fly: Annotated[
        bool,
        typer.Option(
            "--on-the-fly",
            help="Simulate new galaxies like those of DATA in every epoch; DATA is then used for validation only.",
        ),
    ] = False,
    tensorboard: TensorBoard = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Train a network on simulated stamps; the same command continues an interrupted run.

    Example: sersicnet train train.h5 -o my-weights --test test.h5

    Example: sersicnet train train.h5 --start fovea-sim --adapt dann --real labels.csv -o my-dann
    """
    # long: the options.
    from dataclasses import replace

    with importing():
        from sersicnet.training import train as training
        from sersicnet.training.labels import real_galaxies
        from sersicnet.training.recipe import ADAPT, RECIPES
        from sersicnet.weights import SUMS

    without = {"real": real is not None, "alpha": alpha is not None, "real_labels=False": not real_labels}
    if adapt is None and any(without.values()):
        received = " and ".join(f"`{name}`" for name, given in without.items() if given)
        raise InputError(f"Real galaxies, and how they train, are for `adapt`; received {received} without it.")
    given = {"epochs": epochs, "alpha": alpha, "batch": batch, "learning_rate": learning_rate}
    given |= {"anneal": anneal, "symmetries": symmetries, "bfloat16": bfloat16 or None}
    how = [f"`{name}=False`" if value is False else f"`{name}`" for name, value in given.items() if value is not None]
    if epochs == 0 and how[1:]:
        raise InputError(f"With 0 epochs nothing is trained: leave out {' and '.join(how[1:])}.")
    if on_the_fly and symmetries is not None and real is None:
        raise InputError("Galaxies that are drawn `on_the_fly` have random directions: leave out `symmetries`.")
    check_directory(output, SUMS, overwrite)  # before images are read
    network = network or training.network_of(start)
    recipe = (RECIPES if adapt is None else ADAPT).get(network)
    if recipe is not None:
        recipe = replace(recipe, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    with training_progress(quiet, network, tensorboard, epochs) as report:
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
            real=None if real is None else real_galaxies(real, inputs=training.inputs_of(network)),
            real_labels=real_labels,
            on_the_fly=on_the_fly,
            overwrite=overwrite,
            command=command_line(),
            report=report,
        )
    say(quiet, f"wrote {done.path}")
