"""Adapt weights to a user's own survey: a mosaic in, a weights directory out, no labels needed.

The PSF and the noise of the mosaic are measured, galaxies are simulated with
both, and shipped weights are trained further with them. The run is kept in
``<output>.run`` until it is done, and the same command continues it after any
interruption.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits

from sersicnet import dataset, weights
from sersicnet.cardpage import duration
from sersicnet.catalogue.scores import scores
from sersicnet.engine.noise import tap_of
from sersicnet.errors import InputError, SersicnetError, counted, warn
from sersicnet.image import detect
from sersicnet.image import header as instrument
from sersicnet.image import stars as points
from sersicnet.image.exposure import Exposure
from sersicnet.image.mosaic import Image
from sersicnet.image.psf import Psf, full_width
from sersicnet.image.psffile import read_psf
from sersicnet.output import Run, check_directory, whole_directory
from sersicnet.schema import SCALE_TOLERANCE, TARGETS
from sersicnet.simulating import population
from sersicnet.simulating.recipe import Prior, Simulation
from sersicnet.simulating.simulate import simulate
from sersicnet.simulating.stamps import draw_stamps
from sersicnet.simulating.telescopes import F160W, Instrument, training_psf
from sersicnet.training import labels
from sersicnet.training import recipe as recipes
from sersicnet.training.device import device, estimate
from sersicnet.training.loop import Progress
from sersicnet.training.losses import ALIGNMENTS
from sersicnet.training.train import train

PSF_TOLERANCE = 0.1
"""How far the width of point-like sources may be from that of the weights' PSF for it to be taken instead."""

LEAST_N = 2 * dataset.BLOCK

RARE = 0.3
"""Fraction of the galaxies of the prior candels that are drawn uniformly: large, faint ones would be unknown."""

SETTLED = 100
"""Steps after which the first, slow ones no longer count in the speed of training."""

PSF, MEASURED, MATCHED, TEST, WEIGHTS = "psf.fits", "measured", "matched.h5", "test.h5", "weights"

Tell = Callable[[str], None]
Report = Callable[[str, int, int], None]


def adapt(
    image: str | Path,
    output: str | Path,
    *,
    base: str | Path = weights.BASE,
    how: str = recipes.ALIGNMENT,
    n: int = recipes.SIMULATED,
    epochs: int = recipes.ADAPT_EPOCHS,
    prior: str | Path = "candels",
    psf: str | Path | None = None,
    gain: float | None = None,
    zero_point: float | None = None,
    pixel_scale: float | None = None,
    hdu: int | str | None = None,
    seed: int = 0,
    workers: int = 1,
    overwrite: bool = False,
    command: str = "",
    tell: Tell = lambda line: None,
    report: Report = lambda stage, done, total: None,
) -> weights.Weights:
    """Adapt weights to the images of a survey.

    Parameters
    ----------
    image : str or Path
        FITS mosaic, optionally with an extension in brackets.
    output : str or Path
        Weights directory. The run is kept in ``<output>.run`` until it is done:
        ``psf.fits``, ``measured.json`` (the PSF's width, the noise and the counts of sources), the simulated sets and
        the state of the training. The same call continues it.
    base : str or Path
        Weights to begin from.
    how : {"none", "dann", "daregram"}
        Besides matched simulations, align the features of real and simulated
        galaxies; see `sersicnet.training.train.train`.
    n : int
        Simulated galaxies; a tenth as many more are the held-out test.
    epochs : int
    prior : str or Path
        ``candels``, for as many galaxies at every magnitude from 18 to where the mosaic ends, shaped as those of
        CANDELS; ``uniform``, or a table of galaxies, see `sersicnet.simulating.recipe.Simulation.of_options`.
    psf : str or Path, optional
        FITS image of the effective PSF; the stack of the mosaic's stars by default.
    gain : float, optional
        Electrons per image unit; by default as deep as the training images of `base`.
    zero_point, pixel_scale : float, optional
        From the header by default.
    hdu : int or str, optional
        Number or name of the extension; SCI or the first image by default.
    seed : int
    workers : int
        Number of processes that simulate.
    overwrite : bool
        Replace `output`, and drop an unfinished run with other options.
    command : str
        The command line, for the card.
    tell : callable
        Receives lines for the user: what was measured, and how long each step takes.
    report : callable
        Receives the stage, the steps of it that are done, and how many it has.

    Returns
    -------
    Weights
        With ``psf.fits`` in their directory. ``adapted`` on the card holds what was
        measured, and the scores of `base` on the held-out test.

    Raises
    ------
    InputError, DatasetError, WeightsError
        If an argument cannot be used, or the mosaic has too few stars for a PSF.

    Warns
    -----
    SersicnetWarning
        If the PSF or gain of the weights replaces that of the mosaic, or the mosaic's
        galaxies lie outside the prior.
    """
    output = Path(output)
    check_directory(output, weights.SUMS, overwrite)
    if how != "none" and how not in ALIGNMENTS:
        raise InputError(f"The alignment of features is none, {' or '.join(ALIGNMENTS)}; received {how}.")
    if n < LEAST_N:
        raise InputError(f"Adapting needs `n` of at least {LEAST_N} simulated galaxies; received {n}.")
    if gain is not None and not (np.isfinite(gain) and gain > 0):
        raise InputError(f"A gain is a positive number of electrons per image unit; received {gain}.")
    start = weights.load(base)
    start.core()  # refuses a network of another version before the simulation
    report("reading", 0, 0)
    image = image if hdu is None else f"{image}[{hdu}]"
    exposure = Exposure.open(image, zero_point=zero_point, pixel_scale=pixel_scale)
    frame, zero, scale = exposure.image, exposure.zero_point, exposure.pixel_scale
    if not np.isfinite(scale.value):
        raise InputError(f"{frame.name} has no WCS, so its pixel scale is not known: give `pixel_scale`.")
    point = None if psf is None else read_psf(psf).at_pixel_scale()
    config = {
        "image": hashlib.sha256(frame.data.tobytes()).hexdigest(),
        "zero_point": zero.value,
        "pixel_scale": scale.value,
        "base": start.sha256,
        "how": how,
        "n": n,
        "epochs": epochs,
        "prior": str(prior),
        **_table(prior, scale.value),
        "psf": None if point is None else point.sha256,
        "gain": gain,
        "seed": seed,
    }
    with Run(output.with_name(output.name + ".run"), config, overwrite) as run:
        assert run.path is not None
        try:
            found = run.read(MEASURED)
            if found is None:
                report("detecting", 0, 0)
                found = _measure(frame, zero, scale, start, point, run)
                run.keep(MEASURED, found)
            tell(_in_words(found, start))
            taken_with = _instrument(found, start, gain)
            if not all((run.path / name).exists() for name in (MATCHED, TEST)):
                _simulate(image, run.path, found, taken_with, n, prior, seed, workers, command, tell, report)
        except SersicnetError:
            if not any(run.path.glob(f"{MATCHED}*")):
                run.remove()  # nothing was simulated, and other options may mend the error
            raise
        if not (run.path / WEIGHTS).exists():
            real = None
            if how != "none":
                report("cutting galaxies", 0, 0)
                # With the PSF and noise of the simulated ones: a network could tell both apart by other numbers.
                like = read_psf(run.path / PSF).image, taken_with
                real = labels.mosaic_galaxies(image, zero.value, start.inputs, like)
            _train(run.path, start, real, how, n, epochs, seed, command, tell, report)
        report("testing", 0, 0)
        done = _finish(run.path, output, frame.name, found, start, how, n, prior)
        run.remove()
    return done


def _table(prior: str | Path, pixel_scale: float) -> dict[str, Any]:
    """What names the galaxies of a prior that is a table, for the configuration of the run."""
    if str(prior) in ("candels", "uniform"):
        return {}
    joint = Prior.of_catalogue(prior, pixel_scale).joint
    assert joint is not None
    return {"galaxies": joint.record()}


def _train(
    run: Path,
    start: weights.Weights,
    real: dataset.Arrays | None,
    how: str,
    n: int,
    epochs: int,
    seed: int,
    command: str,
    tell: Tell,
    report: Report,
) -> None:
    """Train on with the simulated galaxies of the run, and `real` ones if features are aligned."""
    network = start.card["network"]
    recipe = replace(recipes.ADAPT[network], epochs=epochs, patience=epochs)
    tell(f"training on {device()}: {counted(n, 'galaxy', 'galaxies')}, {counted(epochs, 'epoch')}")
    estimated = False

    def follow(progress: Progress) -> None:
        nonlocal estimated
        record = progress.record
        if record is None:
            stage = f"training, epoch {progress.epoch}/{progress.epochs}, loss {progress.loss:.4f}"
            report(stage, progress.step, progress.steps)
            speed = progress.stamps_per_second
            if not estimated and progress.step >= SETTLED and speed > 0:
                estimated = True
                tell(estimate(network, speed, progress.steps * recipe.batch / speed))
        else:
            tell(
                f"epoch {progress.epoch:3d}: loss {record['loss']:.4f}, validation error "
                f"{record['valid_mae']:.4f}, {record['seconds']:.0f} s"
            )

    train(
        run / MATCHED,
        run / WEIGHTS,
        network=network,
        recipe=recipe,
        seed=seed,
        start=start.path,
        test=run / TEST,
        adapt=None if how == "none" else how,
        real=real,
        command=command,
        report=follow,
    )


def as_markdown(done: weights.Weights) -> str:
    """What `adapt` measured and gained, as Markdown.

    Parameters
    ----------
    done : Weights
        As returned by `adapt`.
    """
    adapted = done.card["adapted"]
    before, after = adapted["before"]["all"], done.card["scores"]["samples"]["all"]
    lines = [
        f"| {adapted['image']} | |",
        "|---|---|",
        f"| sources, galaxies to learn from | {adapted['sources']}, {adapted['galaxies']} |",
        f"| stars in the PSF | {adapted['stars']} |",
        f"| PSF FWHM | {adapted['psf_fwhm']:.4f} arcsec, {adapted['psf_source']} |",
        f"| pixel scale | {adapted['pixel_scale']:.4f} arcsec, from {adapted['pixel_scale_source']} |",
        f"| zero point | {adapted['zero_point']:.4f}, from {adapted['zero_point_source']} |",
        f"| rms of a blank pixel | {adapted['rms']:.4g} |",
        f"| correlation of noise | {adapted['correlation']:.2f} |",
        f"| simulated galaxies | {adapted['n']}, prior {adapted['prior']} |",
        f"| alignment with real ones | {adapted['how']} |",
        "",
        f"Scores on {done.card['scores']['test_set']}:",
        "",
        "| weights | | " + " | ".join(t.name for t in TARGETS) + " |",
        "|" + "---|" * (2 + len(TARGETS)),
    ]
    for name, found in ((adapted["base"], before), (done.name, after)):
        for quantity, label in (("r2", "R²"), ("bias", "median error"), ("scatter", "68 % scatter")):
            lines.append(
                f"| {name} | {label} | " + " | ".join(f"{found[quantity][t.name]:.4f}" for t in TARGETS) + " |"
            )
    return "\n".join(lines)


def _measure(
    frame: Image,
    zero: instrument.Reading,
    scale: instrument.Reading,
    start: weights.Weights,
    point: Psf | None,
    run: Run,
) -> dict[str, Any]:
    """Detect sources, and measure PSF and noise; the PSF is kept in the run."""
    bad = frame.without_data()
    sky, found = detect.Detector()(frame.data, bad)
    if not len(found):
        raise InputError(f"No source was detected in {frame.name}. Is it background-limited?")
    stars = points.find_stars(frame.data, bad, sky, found)
    good = points.good_galaxies(frame.data, bad, sky, found, stars)
    used = int(stars.used.sum()) if point is None else 0
    if point is not None:
        psf, source = point.image, f"from {Path(point.name).name}"
    elif stars.psf is not None:
        psf, source = stars.psf, f"the stack of {used} stars"
    else:
        psf, source = _psf_of_weights(frame, stars, scale, start)
    width = full_width(psf) * scale.value
    domain = start.card["domain"]
    alike = "pixel_scale" in domain and abs(scale.value / domain["pixel_scale"] - 1) < SCALE_TOLERANCE
    if used and alike and abs(width / domain["psf_fwhm"] - 1) > PSF_TOLERANCE:
        warn(
            f"The stars of {frame.name} have a FWHM of {width:.3f} arcsec, the PSF of {start.name} "
            f"{domain['psf_fwhm']:.3f}. If the instrument is the same, galaxies were taken for stars: give `psf`."
        )
    header = fits.Header()
    header["IMAGE"] = Path(frame.name).name[:60]
    header["FWHM"] = (width, "arcsec")
    header["PIXSCALE"] = (scale.value, "arcsec per pixel")
    header["STARS"] = (used, "in the stack")
    with run.writing(PSF) as partial:
        fits.PrimaryHDU(psf, header).writeto(partial, overwrite=True)
    flux = found.flux[good]
    middle = sky.autocorrelation.shape[0] // 2
    neighbour = (sky.autocorrelation[middle, middle + 1] + sky.autocorrelation[middle + 1, middle]) / 2
    return {
        "image": Path(frame.name).name,
        "sources": len(found),
        "galaxies": int(good.sum()),
        "stars": used,
        "psf_fwhm": width,
        "psf_source": source,
        "pixel_scale": scale.value,
        "pixel_scale_source": scale.source,
        "zero_point": zero.value,
        "zero_point_source": zero.source,
        "rms": float(np.nanmedian(sky.rms)),
        "correlation": sky.correlation,
        "next_correlation": float(neighbour),
        "mag": np.percentile(zero.value - 2.5 * np.log10(flux), [5, 50, 95]).tolist() if len(flux) else None,
    }


def _psf_of_weights(
    frame: Image, stars: points.Stars, scale: instrument.Reading, start: weights.Weights
) -> tuple[np.ndarray, str]:
    """The PSF of the weights' training images, if the narrowest sources of the mosaic agree with it."""
    few = f"{frame.name} has fewer than {points.LEAST_STARS} stars that agree on a PSF"
    config = start.card["data"].get("config") or {}
    trained_on = config.get("instrument")
    if (
        trained_on is None
        or config.get("telescopes")
        or config.get("psfs")
        or abs(trained_on["pixel_scale"] / scale.value - 1) > SCALE_TOLERANCE
    ):
        raise InputError(f"{few}: give `psf`.")
    psf = training_psf(trained_on)
    with np.errstate(invalid="ignore"):
        narrow = np.where(stars.snr > points.POINT_SNR, stars.size, np.nan)
    size = points.size_of(Psf.of(psf, start.name))
    if not np.isfinite(narrow).any() or not abs(np.nanmin(narrow) / size - 1) < PSF_TOLERANCE:
        smallest = (
            "none is bright" if not np.isfinite(narrow).any() else f"{np.nanmin(narrow) / size:.2f} times as wide"
        )
        raise InputError(
            f"{few}, and no source that looks like the PSF of {start.name} (the narrowest: {smallest}): give `psf`."
        )
    width = full_width(psf) * scale.value
    warn(
        f"{few}; the PSF of {start.name} is taken, with a FWHM of {width:.3f} arcsec, and the narrowest source "
        f"agrees with it within {PSF_TOLERANCE:.0%}. Give `psf` if you have a better one."
    )
    return psf, f"that of {start.name}, for want of stars"


def _instrument(found: dict[str, Any], start: weights.Weights, gain: float | None) -> Instrument:
    """The instrument that simulations assume; noise and PSF come from the mosaic."""
    if gain is None:
        config = start.card["data"].get("config") or {}
        trained_on = config.get("instrument")
        if trained_on is None or config.get("telescopes"):
            raise InputError(f"The card of {start.name} states no exposure: give `gain`.")
        gain = trained_on["exposure"] * 10 ** (-0.4 * (found["zero_point"] - trained_on["zero_point"]))
        warn(
            f"No `gain` was given: the galaxies' own Poisson noise is that of the training images of {start.name}, "
            f"{gain:.4g} electrons per image unit."
        )
    return replace(
        F160W,
        name=found["image"],
        pixel_scale=found["pixel_scale"],
        zero_point=found["zero_point"],
        exposure=gain,
        rms_low=found["rms"],
        rms_high=found["rms"],
        noise_tap=tap_of(found["next_correlation"]),
    )


def _simulate(
    image: str | Path,
    run: Path,
    found: dict[str, Any],
    taken_with: Instrument,
    n: int,
    prior: str | Path,
    seed: int,
    workers: int,
    command: str,
    tell: Tell,
    report: Report,
) -> None:
    report("looking for blank sky", 0, 0)
    matched = Simulation.of_options(
        n,
        seed,
        psf=[run / PSF],
        noise_from=image,
        zero_point=found["zero_point"],
        neighbours=True,
        instrument=taken_with,
    )
    matched = replace(matched, prior=_detectable(prior, found))
    sets = ((MATCHED, matched), (TEST, replace(matched, n=max(n // 10, dataset.BLOCK), seed=seed + 1)))
    missing = [(name, simulation) for name, simulation in sets if not (run / name).exists()]
    tell(_simulation_time([simulation for _, simulation in missing], run, workers))
    for name, simulation in missing:
        simulate(
            run / name,
            simulation,
            workers=workers,
            command=command,
            progress=lambda done, total=simulation.n: report("simulating", done, total),  # type: ignore[misc]
        )


def _detectable(prior: str | Path, found: dict[str, Any]) -> Prior:
    """The prior up to the depth of the mosaic; warns if it does not reach the mosaic's galaxies."""
    # Point sources at 5 sigma within a circle of one FWHM; a galaxy is fainter still to see.
    pixels = np.sqrt(np.pi) * found["psf_fwhm"] / found["pixel_scale"]
    limit = float(found["zero_point"] - 2.5 * np.log10(5 * found["rms"] * found["correlation"] * pixels))
    if str(prior) == "candels":
        chosen = Prior.candels(found["pixel_scale"], limit, RARE)
    elif str(prior) == "uniform":
        chosen = Prior()
    else:
        chosen = Prior.of_catalogue(prior, found["pixel_scale"])
    low, high = chosen.mag
    begins = population.CANDELS_MAG[0] if str(prior) == "candels" else low
    if limit < begins + 1:
        raise InputError(
            f"{found['image']} reaches magnitude {limit:.1f}, the prior begins at {begins:g}: give `prior` a table of "
            "brighter galaxies, and check `zero_point`."
        )
    high = min(high, limit)
    if found["mag"] is not None:
        bright, median, faint = found["mag"]
        if bright < low - 0.5 or faint > high + 0.5:
            warn(
                f"The galaxies of {found['image']} have magnitudes {bright:.1f} to {faint:.1f} (median {median:.1f}), "
                f"the prior {low:g} to {high:.4g}. Outside of it the weights are not trained: give `prior` a table."
            )
    return replace(chosen, mag=(low, high))


def _in_words(found: dict[str, Any], start: weights.Weights) -> str:
    domain = start.card["domain"]
    own = f"{domain['psf_fwhm']:.3f}" if "psf_fwhm" in domain else "any telescope"
    return (
        f"{found['image']}: {counted(found['sources'], 'source')}, "
        f"{counted(found['galaxies'], 'galaxy', 'galaxies')}, {counted(found['stars'], 'star')} in the PSF; "
        f"FWHM {found['psf_fwhm']:.3f} arcsec ({start.name}: {own}), {found['psf_source']}; "
        f"rms {found['rms']:.3g} at zero point {found['zero_point']:.3f}; noise of large apertures "
        f"{found['correlation']:.2f} times that of independent pixels"
    )


def _simulation_time(missing: list[Simulation], run: Path, workers: int) -> str:
    """How long the missing stamps take to simulate, estimated from a few."""
    simulation = missing[0]
    draw_stamps(simulation, np.arange(1))  # tables and caches
    started = time.perf_counter()
    few = min(4, simulation.n)
    draw_stamps(simulation, np.arange(few))
    each = (time.perf_counter() - started) / few / workers
    total = sum(s.n for s in missing)
    begun = ", less what is done already" if list(run.glob("*.h5.run")) else ""
    return f"simulating {total} galaxies: about {duration(total * each)}{begun}"


def _finish(
    run: Path,
    output: Path,
    name: str,
    found: dict[str, Any],
    start: weights.Weights,
    how: str,
    n: int,
    prior: str | Path,
) -> weights.Weights:
    """Complete the card, and give the directory its name."""
    done = weights.load(run / WEIGHTS)
    with dataset.Dataset(run / TEST) as test:
        parts = [
            start.predict(test.inputs(first, min(first + dataset.BLOCK, len(test))))
            for first in range(0, len(test), dataset.BLOCK)
        ]
        predicted = np.concatenate([part.targets for part in parts])
        before = scores(test.targets, predicted, mag=test.mag)
        size = len(test)
    image = Path(name).name
    own = f"Knows galaxies of a single Sersic profile among neighbours, through the one PSF of {image}."
    card = {
        **done.card,
        "name": output.name,
        "summary": f"`{start.name}` adapted to {image}: trained on with {n:,} galaxies simulated with its PSF and noise"
        + ("." if how == "none" else f", and with {found['galaxies']} real ones without labels ({how})."),
        "limits": [own, *(limit for limit in done.card["limits"] if not limit.startswith("Trained on"))],
        "scores": {**done.card["scores"], "test_set": f"{size:,} other galaxies simulated for {image}"},
        "adapted": {**found, "how": how, "n": n, "prior": str(prior), "base": start.name, "before": before},
    }
    with whole_directory(output) as partial:
        shutil.copytree(done.path, partial, dirs_exist_ok=True)
        shutil.copyfile(run / PSF, partial / PSF)
        weights.rewrite_card(partial, card)
    return weights.load(output)
