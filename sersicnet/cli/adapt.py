"""The command `adapt`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sersicnet.cli.shared import (
    Hdu,
    Overwrite,
    PixelScale,
    Quiet,
    Seed,
    WeightsName,
    ZeroPoint,
    command_line,
    cores,
    importing,
    progress_bar,
    say,
    stages,
)
from sersicnet.training import recipe


def adapt(
    image: Annotated[Path, typer.Argument(help="FITS mosaic of your survey; MOSAIC.fits[NAME] selects an extension.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Weights directory to write.")] = Path("adapted"),
    weights: WeightsName = "fovea-sim",
    psf: Annotated[
        Path | None,
        typer.Option(
            help="File of the effective PSF; measured from the mosaic's stars by default.", show_default=False
        ),
    ] = None,
    gain: Annotated[
        float | None,
        typer.Option(help="Electrons per image unit; the gain of the training images by default.", show_default=False),
    ] = None,
    prior: Annotated[
        str,
        typer.Option(
            help="Distribution of the simulated galaxies: candels, with the shapes of CANDELS and flat in magnitude; "
            "uniform; or a table of galaxies."
        ),
    ] = "candels",
    n: Annotated[int, typer.Option("--n", help="Number of simulated galaxies.", min=1)] = recipe.SIMULATED,
    epochs: Annotated[int, typer.Option(help="Number of epochs.", min=1)] = recipe.ADAPT_EPOCHS,
    adapt: Annotated[
        str,
        typer.Option(
            help="Also align the features of real and simulated galaxies: none, dann (domain-adversarial) or daregram "
            "(inverse Gram matrices)."
        ),
    ] = recipe.ALIGNMENT,
    zero_point: ZeroPoint = None,
    pixel_scale: PixelScale = None,
    hdu: Hdu = None,
    seed: Seed = 0,
    workers: Annotated[
        int | None,
        typer.Option(help="Number of processes that simulate; all cores by default.", min=1, show_default=False),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Adapt weights to your own survey, without labels, using its PSF and noise.

    The command measures PSF and noise in the mosaic, simulates galaxies with them, and trains the weights on those.
    It prints the measurements and the scores before and after on stdout.

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
            hdu=hdu,
            seed=seed,
            workers=cores(workers),
            overwrite=overwrite,
            command=command_line(),
            tell=lambda line: say(quiet, line),
            report=stages(update),
        )
    if not quiet:
        typer.echo(adapting.as_markdown(done))
    say(quiet, f"wrote {done.path}, with the PSF in {done.path / adapting.PSF}")
