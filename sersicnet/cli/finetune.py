"""The command `finetune`."""

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
    WeightsName,
    ZeroPoint,
    command_line,
    importing,
    say,
    training_progress,
)


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

    with importing():
        from sersicnet import dataset
        from sersicnet.training import train as training
    from sersicnet.weights import load as loaded

    galaxies = dataset.real_galaxies(real, image, zero_point)
    network = loaded(weights, to_train=True).card["network"]
    recipe = training.FINETUNE[network]
    with training_progress(quiet, network, tensorboard) as report:
        done = training.finetune(
            galaxies,
            output,
            base=weights,
            layers=layers,
            recipe=replace(recipe, epochs=epochs),
            seed=seed,
            test=test,
            overwrite=overwrite,
            command=command_line(),
            report=report,
        )
    say(quiet, f"wrote {done.path}")
