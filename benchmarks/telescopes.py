"""Errors of weights that know any telescope, on simulated galaxies of each: bias, scatter and coverage.

Example: python benchmarks/telescopes.py --weights fovea --n 800

Each telescope's galaxies are drawn through new PSFs of its own (see `sersicnet simulate --telescopes`), every 16 of
them through another one, and the network is shown that PSF, or in half of the cases the PSF that a few stars would
give. Nothing is taken from a training set: the seeds differ.
"""

from __future__ import annotations

import argparse
from itertools import pairwise

import numpy as np

from sersicnet import weights
from sersicnet.dataset import BLOCK
from sersicnet.schema import Inputs, noise_numbers, relative_magnitude
from sersicnet.simulating import world
from sersicnet.simulating.stamps import draw_stamps

NAMES = (
    "any", "jwst-sw/F115W", "jwst-sw/F200W", "jwst-lw/F444W", "hst-acs/F814W", "hst-ir/F160W", "euclid-vis",
    "roman/F158", "rubin/i", "hsc/i", "des/z", "kids/r", "sdss/r",
)  # fmt: skip
BINS = (5, 15, 50, 150, 3e4)
SIZES = (0, 0.5, 1.5, np.inf)
SEED = 77_000


def galaxies(name: str, n: int, seed: int) -> tuple[Inputs, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, targets, S/N, radius in FWHM and angle of galaxies of a telescope."""
    simulation, parts = world.simulation(name, n, seed, centring=True), []
    for number in range(-(-n // BLOCK)):
        piece = world.piece(name, seed, number)
        stamps, truth = draw_stamps(piece.of(simulation), np.arange(number * BLOCK, (number + 1) * BLOCK))
        rms = truth["rms"]
        stamps /= rms[:, None, None].astype(np.float32)
        mag = relative_magnitude(truth["mag"], world.ANY.zero_point, rms)
        targets = np.column_stack([mag, truth["r_eff_pix"], truth["sersic_n"], truth["ellipticity"]])
        area = 4 * np.pi * ((piece.fwhm / 2.355) ** 2 + 0.5 * (1 - targets[:, 3]) * targets[:, 1] ** 2)
        snr = 10 ** (-0.4 * mag) / (piece.correlation * np.sqrt(area))
        noise = noise_numbers(np.full(BLOCK, piece.correlation), piece.electrons)
        views = np.repeat(piece.views[None], BLOCK, axis=0)
        parts.append((Inputs(stamps, views, noise), targets, snr, targets[:, 1] / piece.fwhm, truth["theta"]))
    inputs, *rest = zip(*parts, strict=True)
    return (Inputs.concatenated(inputs), *(np.concatenate(part)[:n] for part in rest))  # type: ignore[return-value]


def row(found: weights.Prediction, targets: np.ndarray, which: np.ndarray) -> str:
    """Median error, 68 % scatter and coverage of the four parameters of some galaxies."""
    predicted, errors = found.targets[which], found.errors[which]
    truth, out = targets[which], []
    for i, logarithm in enumerate((False, True, True, False)):
        off = np.log(predicted[:, i] / truth[:, i]) if logarithm else predicted[:, i] - truth[:, i]
        sigma = errors[:, i] / predicted[:, i] if logarithm else errors[:, i]
        scatter = np.diff(np.quantile(off, [0.1587, 0.8413]))[0] / 2
        inside = [np.mean(np.abs(off) < factor * sigma) for factor in (1, 1.96)]
        out.append(f"{np.median(off):+.3f} ± {scatter:.3f} ({inside[0]:.2f} {inside[1]:.2f})")
    return " | ".join(out)


def main() -> None:
    """Print a table for each telescope."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="fovea")
    parser.add_argument("--n", type=int, default=800, help="galaxies of each telescope")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--telescopes", nargs="*", default=NAMES)
    arguments = parser.parse_args()
    network = weights.load(arguments.weights)
    print(f"{network.name}: median error ± 68 % scatter (within 1 and 1.96 sigma)\n")
    print("| telescope | | N | mag | ln R_e | ln n | e |\n|---|---|---|---|---|---|---|")
    for name in arguments.telescopes:
        inputs, targets, snr, size, theta = galaxies(name, arguments.n, arguments.seed)
        inputs = inputs.taken(slice(len(targets)))
        found = network.predict(inputs)
        for low, high in pairwise(BINS):
            which = (snr >= low) & (snr < high)
            print(f"| {name} | S/N {low:g} to {high:g} | {which.sum()} | {row(found, targets, which)} |")
        for low, high in pairwise(SIZES):
            which = (size >= low) & (size < high) & (snr > 50)
            print(f"| {name} | S/N > 50, R_e {low:g} to {high:g} FWHM | {which.sum()} | {row(found, targets, which)} |")
        if found.theta is not None:
            long = (targets[:, 3] > 0.2) & (snr > 15)
            off = (found.theta - theta + 90) % 180 - 90
            pull = np.abs(off[long]) / found.theta_err[long]
            print(
                f"| {name} | theta, e > 0.2, S/N > 15 | {long.sum()} | {np.median(off[long]):+.2f} ± "
                f"{np.median(np.abs(off[long])) * 1.4826:.2f} deg, within 1 sigma {np.mean(pull < 1):.2f} | | | |"
            )


if __name__ == "__main__":
    main()
