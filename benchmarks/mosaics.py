"""Catalogues of simulated mosaics of any telescope, as `measure` makes them, beside the truth.

``python benchmarks/mosaics.py --work FOLDER [--telescopes hsc/i ...] [--size 2000] [--seeds 1 2]``

Each mosaic has galaxies and stars as numerous as in CANDELS/COSMOS (`sersicnet simulate --mosaic SIZE --telescopes
NAME`); its PSF is measured from its stars. A detection and the brightest object within 0.6 FWHM of it belong together,
unless that object has another detection there, too. Stars, and rows with one of the flags EDGE, MASKED and POINT_LIKE,
do not count. The tables list medians and 68 % scatter, and the fractions of the truths within 1 and 1.96 sigma, by
signal to noise (1.0857 / mag_err), and by the part of the image that sources cover. The last table lists how many stars
and galaxies have the flag POINT_LIKE, by the signal to noise of the catalogue. What exists in FOLDER is used again.
"""

import argparse
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.table import Table
from scipy.spatial import KDTree

from sersicnet import schema
from sersicnet.schema import TARGET_NAMES, Flag
from sersicnet.simulating.field import Field

TELESCOPES = ("hst-ir/F160W", "jwst-lw/F444W", "euclid-vis", "rubin/i", "hsc/i", "des/z", "kids/r", "sdss/r")
NOT_COUNTED = int(Flag.EDGE | Flag.MASKED | Flag.POINT_LIKE)
SNR = (5, 15, 50, 1e9)
LEAST = 30
"""Galaxies that a row of a table needs."""


def sersicnet(*arguments):
    """Run a command."""
    subprocess.run([sys.executable, "-m", "sersicnet", *map(str, arguments), "--quiet", "--overwrite"], check=True)


def brightest(catalogue, truth, fwhm):
    """The brightest object of the truth at each row of the catalogue, -1 for none."""
    seen, true = (np.column_stack([table["x"], table["y"]]) for table in (catalogue, truth))
    near = KDTree(true).query_ball_point(np.nan_to_num(seen, nan=-1e9), 0.6 * fwhm)
    mag = np.asarray(truth["mag"], float)
    return np.array([min(rows, key=lambda j: mag[j]) if rows else -1 for rows in near])


def point_like(catalogue, truth, fwhm):
    """Stars and galaxies of each range of `SNR`, and those with the flag POINT_LIKE, (3, 2, 2)."""
    own = brightest(catalogue, truth, fwhm)
    is_star = np.asarray(truth["star"], bool)[own]
    flagged = np.asarray(catalogue["flags"], int) & int(Flag.POINT_LIKE) > 0
    counts = []
    for low, high in pairwise(SNR):
        inside = (own >= 0) & (np.asarray(catalogue["snr"]) >= low) & (np.asarray(catalogue["snr"]) < high)
        counts.append([[(inside & kind).sum(), (inside & kind & flagged).sum()] for kind in (is_star, ~is_star)])
    return np.array(counts)


def matched(catalogue, truth, fwhm):
    """Rows of the catalogue that count, and of the truth, that belong together."""
    own = brightest(catalogue, truth, fwhm)
    once = np.bincount(own[own >= 0], minlength=len(truth)) == 1
    good = (own >= 0) & once[own] & ~np.asarray(truth["star"], bool)[own]
    good &= np.asarray(catalogue["flags"], int) & NOT_COUNTED == 0
    good &= np.isfinite(stacked(catalogue, "{}")).all(axis=1)
    return np.flatnonzero(good), own[good]


def stacked(table, pattern):
    """Columns of the four parameters side by side, radii in pixels."""
    names = ("mag", "r_eff_pix", *TARGET_NAMES[2:])
    return np.column_stack([np.asarray(table[pattern.format(name)], float) for name in names])


def measured(work, telescope, size, seed):
    """What a mosaic gives: deviations, pulls, signal to noise, flags, sky covered, header, and `point_like`."""
    stem = f"{telescope.replace('/', '-')}-{size}-{seed}"
    image, cat = work / f"{stem}.fits", work / f"{stem}_cat.fits"
    if not image.exists():
        sersicnet("simulate", "--mosaic", size, "--telescopes", telescope, "--seed", seed, "-o", image)
    if not cat.exists():
        sersicnet("measure", image, "--gain", Field.of_telescope(size, telescope, seed).instrument.exposure, "-o", cat)
    with fits.open(cat) as hdus:
        catalogue, header = Table(hdus["CATALOG"].data), hdus["CATALOG"].header
    truth = Table.read(work / f"{stem}_truth.ecsv")
    rows, own = matched(catalogue, truth, header["PSFFWHM"])
    found, errors, true = stacked(catalogue[rows], "{}"), stacked(catalogue[rows], "{}_err"), stacked(truth[own], "{}")
    off = schema.encode(found) - schema.encode(true)
    pull = np.abs(schema.pulls(found, errors, true))
    flags = np.asarray(catalogue["flags"], int)
    covered = float(np.nansum(np.asarray(catalogue["area"], float))) / size**2
    return off, pull, 1.0857 / errors[:, 0], flags, covered, header, point_like(catalogue, truth, header["PSFFWHM"])


def show(label, off, pull):
    """Print a row."""
    middle = np.median(off, axis=0)
    scatter = np.quantile(np.abs(off - middle), 0.6827, axis=0)
    within = zip((pull < 1).mean(axis=0), (pull < 1.96).mean(axis=0), strict=True)
    cells = [f"{m:+.3f} ± {s:.3f}; {a:.2f} {b:.2f}" for m, s, (a, b) in zip(middle, scatter, within, strict=True)]
    print(f"| {label} | {len(off)} | {' | '.join(cells)} |", flush=True)


def main():
    """Print a table of all mosaics, and one of all of them together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--telescopes", nargs="+", default=TELESCOPES)
    parser.add_argument("--size", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    given = parser.parse_args()
    given.work.mkdir(exist_ok=True, parents=True)
    print("| mosaic | S/N | N | mag | ln R_e | ln n | e |\n|---|---|---|---|---|---|---|")
    everything, points = [], {}
    for telescope in given.telescopes:
        for seed in given.seeds:
            off, pull, snr, flags, covered, header, counts = measured(given.work, telescope, given.size, seed)
            what = f"{len(flags)} sources, {(flags == 0).mean():.0%} without flags, cover {covered:.0%}"
            what += f", PSF of {header['PSFFWHM']:.2f} pixels, {header['PSFSRC']}"
            for low, high in pairwise(SNR):
                chosen = (snr >= low) & (snr < high)
                if chosen.sum() >= LEAST:
                    show(f"{telescope}, seed {seed} | {low:g} to {high:g}", off[chosen], pull[chosen])
            print(f"| | {what} | | | | | |", flush=True)
            everything.append((off, pull, snr))
            points[f"{telescope}, seed {seed}"] = counts
    off, pull, snr = (np.concatenate(parts) for parts in zip(*everything, strict=True))
    for low, high in pairwise(SNR):
        chosen = (snr >= low) & (snr < high)
        if chosen.sum() >= LEAST:
            show(f"all | {low:g} to {high:g}", off[chosen], pull[chosen])
    print("\nflagged as POINT_LIKE, of stars and of galaxies, by S/N:\n")
    print(f"| mosaic |{''.join(f' {low:g} to {high:g} |' for low, high in pairwise(SNR))}\n|---|{'---|' * 3}")
    for name, counts in points.items():
        cells = (", ".join(f"{hit} of {n}" for n, hit in both) for both in counts)
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
