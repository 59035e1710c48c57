"""Errors of weights for any telescope, on simulated galaxies of each: bias, scatter and coverage.

Example: python benchmarks/telescopes.py --weights fovea --n 800

Each telescope's galaxies are drawn through new PSFs of its own (see `sersicnet simulate --telescopes`), every 16 of
them through another one, and the network is shown that PSF, or in half of the cases the PSF that a few stars would
give. With ``--stars 30`` it is shown the PSF that `measure_psf` finds from 30 simulated stars of S/N 100 to 1000, and
its errors include those of that PSF, as in `measure`.
With ``--width 1.05`` it is shown the true PSF made 5 % wider. Nothing is taken from a training set: the seeds differ.
Each telescope has a seed of its own, ``--seed`` plus its place in `NAMES`.
``--limits 150`` compares the errors of as many galaxies of S/N > 50 with the Cramer-Rao bound, for isolated Sersic
galaxies and the true PSF. ``--beside ./hsc`` divides the scatter by that of other weights on the same galaxies, as
of a specialist for that telescope. ``--save`` keeps the rows for `docs/draw.py`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from sersicnet import weights
from sersicnet.dataset import BLOCK
from sersicnet.engine.render import Renderer
from sersicnet.errors import InputError
from sersicnet.image.epsf import StarStamps, measure_psf
from sersicnet.image.psf import Psf
from sersicnet.image.views import psf_views
from sersicnet.measuring.predicting import through
from sersicnet.schema import STAMP_SIZE, TARGET_NAMES, Inputs, encode, noise_numbers, pulls, relative_magnitude
from sersicnet.simulating import world
from sersicnet.simulating.fisher import covariance, fisher_matrix, independent_sigma
from sersicnet.simulating.neighbours import camera
from sersicnet.simulating.stamps import draw_stamps, observe

NAMES = (
    "any", "jwst-sw/F115W", "jwst-sw/F200W", "jwst-lw/F444W", "hst-acs/F814W", "hst-ir/F160W", "euclid-vis",
    "roman/F158", "rubin/i", "hsc/i", "des/z", "kids/r", "sdss/r",
)  # fmt: skip
BINS = (5, 15, 50, 150, 3e4)
SIZES = (0, 0.5, 1.5, np.inf)
SEED = 77_000
STAR_SNR = (100, 1000)
STAR_SIDE = 81


def seen(piece: world.Piece, stars: int, rng: np.random.Generator) -> Psf | None:
    """The PSF that some stars of an image show; None if they show none."""
    rms = piece.instrument.rms_low
    snr = np.exp(rng.uniform(*np.log(STAR_SNR), stars))
    flux = snr * rms * piece.correlation * np.sqrt(4 * np.pi) * piece.fwhm / 2.355
    x, y = STAR_SIDE // 2 + rng.uniform(-0.5, 0.5, (2, stars))
    values = np.array(
        [
            observe(camera(piece.psf).render(np.array([*at, f, 0.02, 1, 1, 0]), STAR_SIDE), rms, piece.instrument, rng)
            for *at, f in zip(x, y, flux, strict=True)
        ]
    )
    rough = np.array([x, y]) + rng.uniform(-0.3, 0.3, (2, stars))
    stamps = StarStamps(values, np.full(values.shape, rms), np.zeros(values.shape, bool), *rough)
    found = measure_psf(stamps, piece.fwhm * 1.03, piece.correlation)
    if found is None:
        return None
    try:
        psf = Psf.of(found.images[0], f"{stars} stars", found.oversampling, error=found.error)
    except InputError:
        return None
    return replace(psf, light_error=found.light_error)


def galaxies(
    name: str, n: int, seed: int, *, stars: int = 0, width: float = 0.0, neighbours: bool = False, kind: str = "sersic"
) -> tuple[Inputs, np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[tuple[Psf, int]]]:
    """Inputs, targets, S/N, radius in FWHM and angle of galaxies of a telescope; then PSFs from stars.

    Each of these PSFs is followed by the number of galaxies that it is for; the views among the inputs are then those
    of the true PSF.
    """
    simulation = world.simulation(name, n, seed, centring=True, neighbours=neighbours, galaxies=kind)
    parts, psfs = [], []
    for number in range(-(-n // BLOCK)):
        piece = world.piece(name, seed, number)
        stamps, truth = draw_stamps(piece.of(simulation), np.arange(number * BLOCK, (number + 1) * BLOCK))
        shown = piece.views
        of_stars = seen(piece, stars, np.random.default_rng([seed, number, 3])) if stars else None
        if width:
            shown = psf_views(piece.psf.image, piece.psf.oversampling / width)
        good = truth.get("status", np.zeros(BLOCK)) == 0
        if (stars and of_stars is None) or not good.any():
            continue
        if of_stars is not None:
            psfs.append((of_stars, int(good.sum())))
        truth = {key: value[good] for key, value in truth.items()}
        rms = truth["rms"]
        stamps = stamps[good] / rms[:, None, None].astype(np.float32)
        mag = relative_magnitude(truth["mag"], world.ANY.zero_point, rms)
        targets = np.column_stack([mag, truth["r_eff_pix"], truth["sersic_n"], truth["ellipticity"]])
        area = 4 * np.pi * ((piece.fwhm / 2.355) ** 2 + 0.5 * (1 - targets[:, 3]) * targets[:, 1] ** 2)
        snr = 10 ** (-0.4 * mag) / (piece.correlation * np.sqrt(area))
        noise = noise_numbers(np.full(len(rms), piece.correlation), piece.electrons)
        views = np.repeat(shown[None], len(rms), axis=0)
        parts.append((Inputs(stamps, views, noise), targets, snr, targets[:, 1] / piece.fwhm, truth["theta"]))
    inputs, *rest = zip(*parts, strict=True)
    columns = [np.concatenate(part)[:n] for part in rest]
    return Inputs.concatenated(inputs).taken(slice(len(columns[0]))), *columns, psfs  # type: ignore[return-value]


def answered(network: weights.Weights, inputs: Inputs, psfs: list[tuple[Psf, int]]) -> weights.Prediction:
    """What a network answers, through the PSFs from stars if there are any, as `measure` has it answer."""
    if not psfs:
        return network.predict(inputs)
    parts, first, nowhere = [], 0, np.zeros(BLOCK)
    for psf, n in psfs:
        some = inputs.taken(slice(first, min(first + n, inputs.n)))
        place = nowhere[: some.n]
        parts.append(through(psf, some.stamps, some.noise, place, place, network)[0])
        first += n
    return weights.Prediction(*(None if one[0] is None else np.concatenate(one) for one in zip(*parts, strict=True)))


def bounds(name: str, seed: int, snr: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of some galaxies of S/N > 50, and what the noise allows for mag, ln R_e, ln n and e, (N, 4)."""
    simulation, rows, sigmas = world.simulation(name, len(snr), seed, centring=True), [], []
    bright = np.flatnonzero(snr > 50)
    chosen = bright[np.linspace(0, len(bright) - 1, min(most, len(bright))).astype(int)]
    for number in np.unique(chosen // BLOCK):
        piece = world.piece(name, seed, int(number))
        own, instrument = chosen[chosen // BLOCK == number], piece.instrument
        _, truth = draw_stamps(piece.of(simulation), own)
        taps = instrument.noise_kernel()
        render = Renderer(piece.psf.image, STAMP_SIZE, piece.psf.oversampling)
        flux = 10 ** (-0.4 * (truth["mag"] - instrument.zero_point))
        shape = (truth[key] for key in ("r_eff_pix", "sersic_n"))
        for galaxy, rms in zip(
            np.column_stack([truth["x"], truth["y"], flux, *shape, 1 - truth["ellipticity"], truth["theta"]]),
            truth["rms"], strict=True,
        ):  # fmt: skip
            sigma = independent_sigma(
                np.pad(render(galaxy)[0], len(taps) // 2), rms / (taps**2).sum(), instrument.exposure
            )
            fisher = fisher_matrix(render, galaxy, sigma, taps)
            bound = np.sqrt(np.diag(covariance(fisher[None], instrument.sky_residual * rms)[0]))
            sigmas.append(bound / np.array([1, galaxy[3], galaxy[4], 1]))
        rows.extend(own.tolist())
    return np.array(rows), np.array(sigmas)


def errors(found: weights.Prediction, targets: np.ndarray, which: np.ndarray) -> dict[str, list[float]]:
    """Median error, 68 % scatter and coverage of the four parameters of some galaxies."""
    predicted, truth, out = found.targets[which], targets[which], {}
    away = np.abs(pulls(predicted, found.errors[which], truth))
    for target, off, pull in zip(TARGET_NAMES, (encode(predicted) - encode(truth)).T, away.T, strict=True):
        scatter = np.diff(np.quantile(off, [0.1587, 0.8413]))[0] / 2
        out[target] = [float(np.median(off)), float(scatter), *(float(np.mean(pull < limit)) for limit in (1, 1.96))]
    return out


def main() -> None:
    """Print a table for each telescope."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="fovea")
    parser.add_argument("--n", type=int, default=800, help="galaxies of each telescope")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--telescopes", nargs="*", default=NAMES)
    parser.add_argument("--stars", type=int, default=0, help="stars that the PSF is found from")
    parser.add_argument("--width", type=float, default=0.0, help="factor on the width of the true PSF, as shown")
    parser.add_argument("--neighbours", action="store_true", help="a third of the images with neighbours")
    parser.add_argument("--galaxies", default="sersic", help="sersic, real-like or both")
    parser.add_argument("--limits", type=int, default=0, help="galaxies that the Cramer-Rao bound is computed for")
    parser.add_argument("--beside", help="weights whose scatter that of --weights is divided by")
    parser.add_argument("--save", type=Path, help="JSON file of the rows")
    arguments = parser.parse_args()
    if arguments.stars and arguments.width:
        parser.error("--width is for the true PSF; leave out --stars")
    network, rows, limits = weights.load(arguments.weights), [], []
    other = weights.load(arguments.beside) if arguments.beside else None
    print(f"{network.name}: median error ± 68 % scatter (within 1 and 1.96 sigma)\n")
    print("| telescope | | N | mag | ln R_e | ln n | e |\n|---|---|---|---|---|---|---|")

    def row(name: str, label: str, which: np.ndarray) -> None:
        if which.sum() < 10:
            return
        values = errors(found, targets, which)
        rows.append({"telescope": name, "bin": label, "n": int(which.sum()), **values})
        cells = " | ".join(f"{m:+.3f} ± {s:.3f} ({one:.2f} {two:.2f})" for m, s, one, two in values.values())
        print(f"| {name} | {label} | {which.sum()} | {cells} |", flush=True)
        if other is not None:
            theirs = errors(beside, targets, which)
            ratios = {key: (ours[1] / theirs[key][1], theirs[key][0]) for key, ours in values.items()}
            cells = " | ".join(f"{ratio:.2f} ({median:+.3f})" for ratio, median in ratios.values())
            print(f"| {name} | {label}: scatter over that of {other.name}, whose bias is | | {cells} |", flush=True)

    for name in arguments.telescopes:
        # Other galaxies and noise for each: what is chance for one telescope must not look like a rule for all.
        seed = arguments.seed + (NAMES.index(name) if name in NAMES else 0)
        inputs, targets, snr, size, theta, psfs = galaxies(
            name, arguments.n, seed, stars=arguments.stars, width=arguments.width,
            neighbours=arguments.neighbours, kind=arguments.galaxies,
        )  # fmt: skip
        found = answered(network, inputs, psfs)
        beside = answered(other, inputs, psfs) if other is not None else found
        for low, high in pairwise(BINS):
            row(name, f"S/N {low:g} to {high:g}", (snr >= low) & (snr < high))
        row(name, "S/N > 50", snr > 50)
        for low, high in pairwise(SIZES):
            row(name, f"S/N > 50, R_e {low:g} to {high:g} FWHM", (size >= low) & (size < high) & (snr > 50))
        if arguments.limits:
            which, least = bounds(name, seed, snr, arguments.limits)
            off = found.targets[which] - targets[which]
            off[:, 1:3] = np.log(found.targets[which, 1:3] / targets[which, 1:3])
            for low, high in pairwise((50, 150, 1000, 3e4)):
                inside = (snr[which] >= low) & (snr[which] < high)
                if inside.sum() >= 10:
                    ratio = np.quantile(np.abs(off[inside]) / least[inside], 0.6827, axis=0)
                    cells = " | ".join(f"{r:.2f}" for r in ratio)
                    label = f"scatter over bound, S/N {low:g} to {high:g}"
                    print(f"| {name} | {label} | {inside.sum()} | {cells} |", flush=True)
                    limits.append({"telescope": name, "low": low, "n": int(inside.sum()), "ratio": ratio.tolist()})
        if found.theta is not None:
            long = (targets[:, 3] > 0.2) & (snr > 15)
            off = (found.theta - theta + 90) % 180 - 90
            pull = np.abs(off[long]) / found.theta_err[long]
            print(
                f"| {name} | theta, e > 0.2, S/N > 15 | {long.sum()} | {np.median(off[long]):+.2f} ± "
                f"{np.median(np.abs(off[long])) * 1.4826:.2f} deg, within 1 sigma {np.mean(pull < 1):.2f} | | | |",
                flush=True,
            )
    if arguments.save:
        arguments.save.write_text(
            json.dumps({"weights": network.name, "stars": arguments.stars, "rows": rows, "limits": limits})
        )


if __name__ == "__main__":
    main()
