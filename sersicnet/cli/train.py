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
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="At its peak, instead of the recipe's own: lower for weights that know much.", show_default=False
        ),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh", help="Simulate new galaxies by DATA's recipe in every epoch; DATA itself only validates then."
        ),
    ] = False,
    tensorboard: TensorBoard = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Train a network on simulated stamps; the same command continues a broken run.

    Example: sersicnet train train.h5 -o my-weights --test test.h5

    Example: sersicnet train train.h5 --start fovea-sim --adapt dann --real labels.csv -o my-dann
    """
    from dataclasses import replace

    with importing():
        from sersicnet import dataset
        from sersicnet.training import train as training

    recipe = (training.RECIPES if adapt is None else training.ADAPT).get(network)
    if recipe is not None:
        given = {"epochs": epochs, "alpha": alpha, "batch": batch, "learning_rate": learning_rate}
        recipe = replace(recipe, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    with training_progress(quiet, network, tensorboard) as report:
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
            command=command_line(),
            report=report,
        )
    say(quiet, f"wrote {done.path}")
