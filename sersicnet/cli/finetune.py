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
from sersicnet.errors import InputError
from sersicnet.output import check_directory
from sersicnet.training import recipe as defaults


def finetune(
    real: Annotated[
        Path,
        typer.Option(
            help="Table of labelled galaxies with image, x, y (or ra, dec), mag, r_eff_pix (or r_eff in arcsec), "
            "sersic_n, ellipticity (or q); or a dataset.",
            show_default=False,
        ),
    ],
    image: Annotated[
        Path | None, typer.Option(help="FITS image of all galaxies, instead of the column image.", show_default=False)
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Weights directory to write.")] = Path("finetuned"),
    weights: WeightsName = "fovea-sim",
    zero_point: ZeroPoint = None,
    layers: Annotated[
        str,
        typer.Option(
            help="Layers to train: all; head-first, first those after the features and then all; or auto, which tries "
            "both and keeps the better weights."
        ),
    ] = defaults.SCHEDULE,
    epochs: Annotated[
        int, typer.Option(help="Number of epochs; the weights with the lowest validation error are kept.", min=1)
    ] = defaults.FINETUNE_EPOCHS,
    test: TestSet = None,
    seed: Seed = 0,
    tensorboard: TensorBoard = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune weights on your own labelled galaxies (transfer learning).

    Example: sersicnet finetune --real labels.csv -o my-weights
    """
    from dataclasses import replace

    with importing():
        from sersicnet.training import finetune as finetuning
        from sersicnet.training.labels import is_mosaic, real_galaxies
        from sersicnet.training.recipe import FINETUNE
    from sersicnet.weights import SUMS
    from sersicnet.weights import load as loaded

    check_directory(output, SUMS, overwrite)  # before images are read
    if real.is_file() and is_mosaic(real):
        raise InputError(
            f"Fine-tuning learns from labels; {real} is an image. `sersicnet adapt` takes an image without labels."
        )
    base = loaded(weights, to_train=True)
    galaxies, network = real_galaxies(real, image, zero_point, base.inputs), base.card["network"]
    recipe = FINETUNE[network]
    with training_progress(quiet, network, tensorboard) as report:
        done = finetuning.finetune(
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
