"""The command `adapt`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sersicnet.cli.shared import (
    Overwrite,
    PixelScale,
    Quiet,
    Seed,
    WeightsName,
    ZeroPoint,
    command_line,
    importing,
    progress_bar,
    say,
)


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
    with progress_bar(quiet, "reading") as update:
        with importing():
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
            command=command_line(),
            tell=lambda line: say(quiet, line),
            report=lambda stage, done, total: update(done, total or None, stage),
        )
    if not quiet:
        typer.echo(adapting.as_markdown(done))
    say(quiet, f"wrote {done.path}, with the PSF in {done.path / adapting.PSF}")
