"""The command `simulate`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sersicnet.cli.shared import Overwrite, Quiet, Seed, command_line, importing, progress_bar, refuse_with, say
from sersicnet.output import check_output


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
    with importing():
        from sersicnet.simulating import simulate as simulations

    if mosaic is not None:
        _refuse_with_mosaic(
            prior=prior, depth=depth, uniform=uniform, log_radii=log_radii, psf=psf, psf_scatter=psf_scatter,
            noise_from=noise_from, neighbours=neighbours, centring=centring, preview=preview,
            galaxies=galaxies if galaxies != "sersic" else None, noiseless_labels=noiseless_labels,
        )  # fmt: skip
        output = output or Path("mosaic.fits")
        field = simulations.Field(mosaic, n, seed)
        with progress_bar(quiet, "drawing", field.count) as update:
            paths = simulations.simulate_field(
                output, field, overwrite=overwrite, command=command_line(), progress=update
            )
        say(quiet, f"{field.count} galaxies; wrote {paths[0]} and {paths[1]}")
        return
    n, target = n or 20_000, output or Path("train.h5")
    started = time.monotonic()
    if preview is None or output is not None:
        check_output(target, overwrite)
    with progress_bar(quiet, "reading"):
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

        with progress_bar(quiet, "drawing"):
            draw(preview, simulation, overwrite=overwrite)
        say(quiet, f"wrote {preview}")
        if output is None:
            return
    with progress_bar(quiet, "drawing", n) as update:
        simulations.simulate(
            output or "train.h5",
            simulation,
            workers=workers,
            overwrite=overwrite,
            command=command_line(),
            progress=update,
        )
    say(quiet, f"{n} stamps in {time.monotonic() - started:.0f} s; wrote {output or 'train.h5'}")


def _refuse_with_mosaic(**options: Any) -> None:
    named = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    refuse_with("--mosaic takes --n, --seed and --output", named)
