"""Errors of a catalogue before and after a validation, against the truth, and what a validation costs.

``python benchmarks/validation.py --work FOLDER [--size 10000] [--telescope hst-ir/F160W] [--n 2000 6000]
[--large 20000] [--real NAME IMAGE RMS GAIN] [--psf FILE] [--weights NAME]``

Prints the Markdown tables of ``docs/accuracy/mosaics.md``.

- ``--size``: a simulated mosaic of so many pixels a side (``sersicnet simulate --mosaic SIZE --seed 9``) is measured,
  and validated with each number of galaxies. The factors are applied to the catalogue as ``measure --validated``
  does, without and with ``--debias``. The truth of the mosaic is another one than that of the added galaxies. A
  detection and a galaxy that are each other's nearest within 3 pixels are compared, by bins of what is measured; with
  ``--telescope``, those that ``benchmarks/mosaics.py`` compares. ``excess`` is how far the fractions of all bins are
  from 68.27 %, root mean square, without what the numbers in the bins alone do.
- ``--large``: `measure` and `validate` on a mosaic of so many pixels a side, made of copies of a smaller one in F160W:
  time on the clock, CPU time of all processes, and the largest sum of their proportional set sizes.
- ``--real``: an image from elsewhere with a map of its noise: completeness, and coverage before and after, with the
  factors of the other four fifths of the added galaxies.

What exists in FOLDER is used again.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import mosaics
import numpy as np
from astropy.io import fits
from astropy.table import Table
from scipy.spatial import KDTree
from survey import Watch

from sersicnet import schema
from sersicnet.catalogue.factors import Factors, angle_between, distances
from sersicnet.catalogue.validation import NOT_COUNTED
from sersicnet.image import mosaic
from sersicnet.schema import TARGET_NAMES
from sersicnet.simulating.field import Field

GAIN, SEED, MATCHED = 3200, 9, 3.0
BINS = {
    "measured mag": [0, 22, 23, 24, 24.5, 25, 25.5, 26, 30],
    "R_e / FWHM": [0, 0.5, 0.7, 1, 1.4, 2, 3, 1000],
    "next source / FWHM": [0, 3, 5, 8, 12, 20, 1e9],
}
LEAST = 30
"""Galaxies that a bin needs."""


def sersicnet(*arguments):
    """Run a command; its time on the clock, and its `Watch`."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "sersicnet", *map(str, arguments), "--quiet", "--overwrite"])
    watch = Watch(process.pid)
    watch.start()
    if process.wait():
        sys.exit(process.returncode)
    watch.join()
    return time.monotonic() - started, watch


def table_of(path, hdu="CATALOG"):
    """A table without units or masks."""
    with fits.open(path) as hdus:
        return Table(hdus[hdu].data)


def stacked(table, pattern):
    """Columns side by side."""
    return np.column_stack([np.asarray(table[pattern.format(name)], float) for name in TARGET_NAMES])


def pairs(catalogue, truth, _):
    """Rows of the catalogue that count, and of the truth, that are each other's nearest."""
    seen, true = (np.column_stack([table["x"], table["y"]]) for table in (catalogue, truth))
    away, there = KDTree(true).query(seen)
    back = KDTree(seen).query(true)[1]
    good = (away < MATCHED) & (back[there] == np.arange(len(seen)))
    good &= (np.asarray(catalogue["flags"], int) & int(NOT_COUNTED)) == 0
    good &= np.isfinite(stacked(catalogue, "{}")).all(axis=1)
    return np.flatnonzero(good), there[good]


def pulls(catalogue, rows, truth, true):
    """How many errors the truth is away, (N, 5)."""
    off = schema.pulls(stacked(catalogue, "{}")[rows], stacked(catalogue, "{}_err")[rows], stacked(truth, "{}")[true])
    turned = angle_between(np.asarray(catalogue["theta"], float)[rows], np.asarray(truth["theta"], float)[true])
    return np.abs(np.column_stack([off, turned / np.asarray(catalogue["theta_err"], float)[rows]]))


def shares(pull, limit):
    """Percent within a limit, for each parameter."""
    return ", ".join(f"{100 * share:.0f}" for share in (pull <= limit).mean(axis=0)) + " %"


def accuracy(work, size, telescope, numbers, options):
    """Print the tables of a simulated mosaic."""
    image, truth_path = work / f"m{size}.fits", work / f"m{size}_truth.ecsv"
    if not image.exists():
        of = ["--telescopes", telescope] if telescope else []
        sersicnet("simulate", "--mosaic", size, "--seed", SEED, *of, "-o", image)
    gain = Field.of_telescope(size, telescope, SEED).instrument.exposure if telescope else GAIN
    truth, plain = Table.read(truth_path), work / "plain.fits"
    took, watch = sersicnet("measure", image, "--gain", gain, *options, "-o", plain)
    costs, catalogue = [("measure", took, watch)], table_of(plain)
    made = {"claimed": catalogue}
    for n in numbers:
        path = work / f"validation-{n}.fits"
        took, watch = sersicnet("validate", image, "--gain", gain, *options, "--n", n, "-o", path)
        costs.append((f"validate --n {n}", took, watch))
        factors = Factors.read(path)
        made |= {f"{n}": applied(factors, catalogue, False), f"{n}, debias": applied(factors, catalogue, True)}
    compare(made, truth, fits.getheader(plain, 1)["PSFFWHM"])
    cost(costs)


def applied(factors, catalogue, debias):
    """A catalogue with the factors of a validation, as ``measure --validated`` applies them."""
    errors = np.column_stack([stacked(catalogue, "{}_err"), np.asarray(catalogue["theta_err"], float)])
    away = distances(np.asarray(catalogue["x"], float), np.asarray(catalogue["y"], float))
    values, errors = factors.applied(stacked(catalogue, "{}"), errors, away, debias=debias)
    out = catalogue.copy()
    for name, value, error in zip(TARGET_NAMES, values.T, errors.T, strict=False):
        out[name], out[f"{name}_err"] = value, error
    out["theta_err"] = errors[:, -1]
    return out


def compare(catalogues, truth, fwhm):
    """Print coverage by bins of what is measured; the first of the catalogues has the claimed errors."""
    rows, true = (mosaics.matched if "star" in truth.colnames else pairs)(catalogues["claimed"], truth, fwhm)
    found = {name: pulls(one, rows, truth, true) for name, one in catalogues.items()}
    one = catalogues["claimed"]
    away = distances(np.asarray(one["x"], float), np.asarray(one["y"], float))
    measured = (one["mag"][rows], one["r_eff_pix"][rows] / fwhm, away[rows] / fwhm)
    off = [one["mag"][rows] - truth["mag"][true], one["r_eff_pix"][rows] / truth["r_eff_pix"][true] - 1]
    print(f"\n{len(rows)} galaxies; within 1 sigma: mag, R_e, n, e, theta\n")
    print(f"| | N | mag | R_e | {' | '.join(found)} |\n|---{'|---' * (len(found) + 3)}|")
    excess = {name: [] for name in found}
    for (title, edges), values in zip(BINS.items(), measured, strict=True):
        bins = np.searchsorted(edges[1:-1], np.asarray(values, float), side="right")
        for k in range(len(edges) - 1):
            chosen = bins == k
            n = int(chosen.sum())
            if n < LEAST:
                continue
            cells = [f"{title} {edges[k]:g}-{edges[k + 1]:g}", f"{n}"]
            cells += [f"{np.median(off[0][chosen]):+.3f}", f"{100 * np.median(off[1][chosen]):+.1f} %"]
            cells += [shares(pull[chosen], 1) for pull in found.values()]
            print(f"| {' | '.join(cells)} |")
            for name, pull in found.items():
                excess[name].append(((pull[chosen] <= 1).mean(axis=0) - 0.6827) ** 2 - 0.6827 * 0.3173 / n)
    cells = ["all", f"{len(rows)}", f"{np.median(off[0]):+.3f}", f"{100 * np.median(off[1]):+.1f} %"]
    print(f"| {' | '.join([*cells, *(shares(pull, 1) for pull in found.values())])} |")
    print(f"| {' | '.join(['all, within 2 sigma', '', '', '', *(shares(pull, 2) for pull in found.values())])} |")
    rms = {name: np.sqrt(np.maximum(np.mean(values, axis=0), 0)) for name, values in excess.items()}
    parts = (", ".join(f"{100 * value:.1f}" for value in values) + " %" for values in rms.values())
    print(f"| {' | '.join(['excess', '', '', '', *parts])} |")


def large(work, size, copied, options):
    """Print what `measure` and `validate` cost on a large mosaic."""
    path, one = work / f"large-{size}.fits", work / f"f160w-{copied}.fits"
    if not path.exists():
        if not one.exists():
            sersicnet("simulate", "--mosaic", copied, "--seed", SEED, "-o", one)
        tile(one, path, size // copied)
    costs = []
    for verb, name in (("measure", "large-cat.fits"), ("validate", "large-val.fits")):
        took, watch = sersicnet(verb, path, "--gain", GAIN, *options, "-o", work / name)
        costs.append((verb, took, watch))
    cost(costs)


def tile(image, path, times):
    """Copies of a mosaic, side by side, as plain float32."""
    one = mosaic.read_image(image)
    n = one.shape[0]
    header = fits.Header({"SIMPLE": True, "BITPIX": -32, "NAXIS": 2, "NAXIS1": times * n, "NAXIS2": times * n})
    cards = one.header.copy(strip=True)
    header.extend((card for card in cards.cards if card.keyword not in header), unique=True)
    stream = fits.StreamingHDU(path, header)
    for _ in range(times):
        for first in range(0, n, 256):
            rows = one.read((slice(first, min(first + 256, n)), slice(0, n))).astype(">f4")
            stream.write(np.tile(rows, times))
    stream.close()


def cost(costs):
    """Print a table of times and memory."""
    print("\n| | time | CPU time | of `measure` | memory |\n|---|---|---|---|---|")
    for name, took, watch in costs:
        times = f"{watch.cpu / costs[0][2].cpu:.1f}"
        print(f"| `{name}` | {took:.0f} s | {watch.cpu:.0f} s | {times} | {watch.peak / 1e9:.1f} GB |")


def real(work, name, image, rms, gain, n, options):
    """Print completeness and coverage of an image from elsewhere."""
    path = work / f"{name}.fits"
    if not path.exists():
        sersicnet("validate", image, "--rms", rms, "--gain", gain, "--n", n, *options, "-o", path)
    header, added = fits.getheader(path), table_of(path, "GALAXIES")
    print(
        f"\n{name}: {len(added)} galaxies, {np.sum(added['found'])} found, {np.sum(added['merged'])} merged; ", end=""
    )
    print(f"PSF {header['PSFFWHM']:.2f} pixels from {header['PSFSRC']}\n")
    print("| true mag | added | found | lost in a brighter source | complete | pure |\n|---|---|---|---|---|---|")
    for row in table_of(path, "SHARES"):
        if row["by"].strip() == "mag":
            cells = (row["galaxies"], row["found"], row["merged"])
            parts = (f"{100 * row[kind]:.0f} %" if row[kind] >= 0 else "" for kind in ("completeness", "purity"))
            print(f"| {row['low']:g}-{row['high']:g} | {' | '.join(map(str, cells))} | {' | '.join(parts)} |")
    statistics = table_of(path, "STATISTICS")
    print(
        "\n| | N | mag | R_e | within 1 sigma | with factors | within 2 sigma | with factors |\n|---" + "|---" * 7 + "|"
    )
    bins = list(dict.fromkeys(zip(statistics["by"], statistics["low"], statistics["high"], strict=True)))
    for by, low, high in bins:
        own = statistics[(statistics["by"] == by) & (statistics["low"] == low)]
        cells = [by.strip() if by.strip() == "all" else f"{by.strip()} {low:.4g}-{high:.4g}", str(own["n"][0])]
        cells += [f"{own['bias'][0]:+.3f}", f"{100 * np.expm1(own['bias'][1]):+.1f} %"]
        for kind in ("within", "after", "within_two", "after_two"):
            cells.append(", ".join(f"{100 * value:.0f}" for value in own[kind]) + " %")
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", type=int)
    parser.add_argument("--n", type=int, nargs="+", default=[2000])
    parser.add_argument("--telescope", help="as for `simulate --telescopes`")
    parser.add_argument("--large", type=int)
    parser.add_argument("--copied", type=int, default=10000)
    parser.add_argument("--real", nargs=4, action="append", default=[], metavar=("NAME", "IMAGE", "RMS", "GAIN"))
    parser.add_argument("--psf", help="the PSF of the mosaic of --size and --large; found or assumed by default")
    parser.add_argument("--weights", default="fovea")
    given = parser.parse_args()
    given.work.mkdir(exist_ok=True, parents=True)
    options = ["--weights", given.weights, *(["--psf", given.psf] if given.psf else [])]
    if given.size:
        accuracy(given.work, given.size, given.telescope, given.n, options)
    if given.large:
        large(given.work, given.large, given.copied, options)
    for one in given.real:
        real(given.work, *one, given.n[0], options[:2])
