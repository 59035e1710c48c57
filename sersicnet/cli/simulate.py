"""The command `simulate`."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from sersicnet.cli.shared import Overwrite, Quiet, Seed, command_line, cores, importing, progress_bar, refuse, say
from sersicnet.errors import counted
from sersicnet.output import check_output, check_space


def simulate(
    n: Annotated[
        int | None,
        typer.Option(
            "--n", help="Number of stamps, 20,000 by default; or of galaxies in a mosaic.", min=1, show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Dataset to write, train.h5 by default; with --mosaic a FITS image, mosaic.fits by default.",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    prior: Annotated[
        str | None,
        typer.Option(
            help="Distribution of the galaxies: candels (CANDELS/COSMOS), or a table with mag, r_eff_pix or r_eff, "
            "sersic_n, ellipticity or q, which is smoothed. Uniform in each parameter by default.",
            show_default=False,
        ),
    ] = None,
    depth: Annotated[
        float | None,
        typer.Option(
            help="For --prior candels: faintest AB magnitude of a distribution that is flat in magnitude from 18 on. "
            "By default magnitudes follow the survey's counts, to 25.",
            show_default=False,
        ),
    ] = None,
    uniform: Annotated[
        float,
        typer.Option(
            help="For --depth: fraction of galaxies that are drawn uniformly in each parameter, from mag 16 on, so "
            "that rare galaxies are represented.",
            min=0,
            max=1,
        ),
    ] = 0.0,
    log_radii: Annotated[
        float,
        typer.Option(
            help="For the uniform prior: fraction of galaxies whose radius is drawn log-uniformly.", min=0, max=1
        ),
    ] = 0.0,
    psf: Annotated[
        list[Path] | None,
        typer.Option(
            help="File of the effective PSF, HST F160W by default. Repeat it for several PSFs; each stamp is "
            "drawn with one of them.",
            show_default=False,
        ),
    ] = None,
    psf_scatter: Annotated[
        float, typer.Option(help="Largest fraction by which the default PSF is stretched or shrunk.", min=0, max=0.49)
    ] = 0.0,
    noise_from: Annotated[
        Path | None,
        typer.Option(
            help="FITS image whose blank sky is used as noise; simulated noise by default.",
            show_default=False,
        ),
    ] = None,
    zero_point: Annotated[
        float | None,
        typer.Option(
            help="AB magnitude of one unit of --noise-from; read from its header by default.", show_default=False
        ),
    ] = None,
    neighbours: Annotated[
        bool,
        typer.Option(
            "--neighbours", help="Add neighbouring galaxies and stars, which are detected and replaced as in measure."
        ),
    ] = False,
    centring: Annotated[
        bool,
        typer.Option(
            "--centring", help="Offset galaxies from the centre of the stamp by the centroid error of detections."
        ),
    ] = False,
    galaxies: Annotated[
        str,
        typer.Option(
            help="sersic, or real-like: bulges, discs, arms and clumps among neighbours, from the prior candels, "
            "labelled by fits. For --telescopes also both: a fifth of the images are real-like."
        ),
    ] = "sersic",
    noiseless_labels: Annotated[
        bool,
        typer.Option(
            "--noiseless-labels", help="Label real-like galaxies by fits to images without noise and neighbours."
        ),
    ] = False,
    telescopes: Annotated[
        str,
        typer.Option(
            help="Telescopes of the images: any; one such as hst, jwst, euclid, rubin or sdss; a filter, "
            "hst-ir/F160W; or a TOML file that describes one. Every 16 stamps are from another image, with its own "
            "PSF, noise and depth. HST F160W with one PSF by default.",
            show_default=False,
        ),
    ] = "",
    preview: Annotated[
        Path | None,
        typer.Option(
            help="Figure of 32 stamps to write, .png or .pdf; the dataset is then written only if --output is given.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Number of processes; all cores by default.", min=1, show_default=False)
    ] = None,
    mosaic: Annotated[
        int | None,
        typer.Option(
            help="Draw one mosaic with this number of pixels along each side; OUTPUT_truth.ecsv lists its galaxies, "
            "and OUTPUT_psf.fits is its PSF. With --telescopes, it is an image of that telescope, with stars.",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Simulate a dataset of galaxy stamps, or a mosaic with a table of its galaxies.

    Example: sersicnet simulate --n 150000 -o train.h5

    Example: sersicnet simulate --prior candels --psf star1.fits --psf star2.fits --noise-from mosaic.fits -o mine.h5

    Example: sersicnet simulate --n 20000 --neighbours --prior candels --preview sheet.png -o crowded.h5

    Example: sersicnet simulate --n 20000 --galaxies real-like -o real-like.h5

    Example: sersicnet simulate --n 150000 --telescopes any --centring -o any.h5

    Example: sersicnet simulate --mosaic 2000 -o mosaic.fits

    Example: sersicnet simulate --mosaic 3000 --telescopes hsc/i -o hsc.fits
    """
    # long: the options.
    with importing():
        from sersicnet.simulating import world
        from sersicnet.simulating.field import Field, simulate_field
        from sersicnet.simulating.recipe import Simulation
        from sersicnet.simulating.simulate import check_room, simulate

    if mosaic is not None:
        refuse(
            "`mosaic` takes `n` or `telescopes`, `seed` and `output`",
            prior=prior, depth=depth, uniform=uniform, log_radii=log_radii, psf=psf, psf_scatter=psf_scatter,
            noise_from=noise_from, neighbours=neighbours, centring=centring, preview=preview,
            galaxies=galaxies != "sersic", noiseless_labels=noiseless_labels, zero_point=zero_point is not None,
            n=telescopes and n,
        )  # fmt: skip
        output = output or Path("mosaic.fits")
        field = Field.of_telescope(mosaic, telescopes, seed) if telescopes else Field(mosaic, n, seed)
        # At least half a byte for a pixel of noise, and ten columns of text for a galaxy.
        check_space(
            output,
            mosaic**2 / 2 + 50 * field.count,
            f"{field.count:,} galaxies in {mosaic:,}² pixels",
            "`mosaic`" if telescopes else "`n`",
        )
        with progress_bar(quiet, "drawing", field.count) as update:
            paths = simulate_field(output, field, overwrite=overwrite, command=command_line(), progress=update)
        what = counted(field.count, "galaxy", "galaxies")
        if field.limit is not None:
            what = f"galaxies and stars to mag {field.limit:.1f}"
        say(quiet, f"{what}; wrote {paths[0]} and {paths[1]}")
        if telescopes:
            gain = field.instrument.exposure
            say(quiet, f"To measure it: sersicnet measure {shlex.quote(str(paths[0]))} --gain {gain:.4g}")
        return
    n, target = n or 20_000, output or Path("train.h5")
    started = time.monotonic()
    if preview is None or output is not None:
        check_output(target, overwrite)
        check_room(target, n)
    with progress_bar(quiet, "reading"):
        if telescopes:
            refuse(
                "`telescopes` has PSFs, noise and galaxies of its own and takes `n`, `seed`, `neighbours`, "
                "`centring`, `galaxies`",
                prior=prior, depth=depth, uniform=uniform, log_radii=log_radii, psf=psf, psf_scatter=psf_scatter,
                noise_from=noise_from, preview=preview, noiseless_labels=noiseless_labels,
                zero_point=zero_point is not None,
            )  # fmt: skip
        simulation = (
            world.simulation(telescopes, n, seed, neighbours=neighbours, centring=centring, galaxies=galaxies)
            if telescopes
            else Simulation.of_options(
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
        )
    if preview is not None:
        from sersicnet.simulating.preview import preview as draw

        with progress_bar(quiet, "drawing"):
            draw(preview, simulation, overwrite=overwrite)
        say(quiet, f"wrote {preview}")
        if output is None:
            return
    with progress_bar(quiet, "drawing", n) as update:
        simulate(
            output or "train.h5",
            simulation,
            workers=cores(workers),
            overwrite=overwrite,
            command=command_line(),
            progress=update,
        )
    say(quiet, f"{counted(n, 'stamp')} in {time.monotonic() - started:.0f} s; wrote {output or 'train.h5'}")
