"""Our measurements of real CANDELS galaxies beside GALFIT's published ones.

``python benchmarks/candels.py FOLDER PSF [--weights NAME] [--weights NAME] [--figure FIGURE]``

FOLDER holds F160W cut-outs with a ``labels.csv``: image, x, y, mag, r_eff_pix,
sersic_n, ellipticity, and ``use`` (1 for fits of GALFIT that are unflagged, inside
and off their bounds; van der Wel et al. 2012, ApJS 203, 24). PSF is the CANDELS
hybrid PSF. Each galaxy is measured three ways: by each network, by the first network
and a fit, and by a fit from moments alone (no prior). Printed are all galaxies,
and median and 68 % scatter of the differences, ours minus GALFIT's.

With ``--figure``, three galaxies are drawn: the image, GALFIT's residual where the
file holds one, and ours, on one scale in units of the noise.
"""

import argparse
import warnings
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import numpy as np
from astropy.io import fits
from astropy.table import Table, vstack
from matplotlib import pyplot as plt

from sersicnet import weights
from sersicnet.errors import SersicnetWarning
from sersicnet.image import detect, mosaic
from sersicnet.image.exposure import Exposure
from sersicnet.measuring.fitting import Fitting
from sersicnet.measuring.measure import fit, measure
from sersicnet.measuring.outputs import Outputs
from sersicnet.schema import TARGET_NAMES, Flag

ZERO_POINT = 25.9463
GAIN = 3200.0
DRAWN = 3


def compared(ours, theirs):
    """Differences in mag, relative in radius and index, and in ellipticity: (N, 4)."""
    a, b = (np.column_stack([np.asarray(t[name], float) for name in TARGET_NAMES]) for t in (ours, theirs))
    return np.column_stack([a[:, 0] - b[:, 0], a[:, 1] / b[:, 1] - 1, a[:, 2] / b[:, 2] - 1, a[:, 3] - b[:, 3]])


def summary(name, difference):
    """One row of Markdown: median and 68 % scatter."""
    middle = np.nanmedian(difference, axis=0)
    scatter = np.nanquantile(np.abs(difference - middle), 0.68, axis=0)
    cells = [f"{m:+.3f} ± {s:.3f}" for m, s in zip(middle, scatter, strict=True)]
    return f"| {name} | {np.isfinite(difference).all(axis=1).sum()} | " + " | ".join(cells) + " |"


def by_network(name, psf):
    """What measures by a network, which is shown the PSF and the gain if it takes them."""
    network = weights.load(name)
    shown = {"psf": psf, "gain": GAIN} if "psf" in network.inputs else {}
    return lambda exposure, rows: measure(exposure, weights=network, positions=rows, **shown)


def everything(folder, psf, names):
    """Labels, and the catalogues beside them, row by row."""
    labels = Table.read(folder / "labels.csv")
    labels = labels[labels["use"] == 1]
    ways = {name: by_network(name, psf) for name in names}
    ways |= {
        "network and fit": lambda exposure, rows: measure(
            exposure, weights=names[0], positions=rows, refine=Fitting(gain=GAIN), psf=psf
        ),
        "fit from moments": lambda exposure, rows: fit(
            exposure, positions=rows["x", "y"], psf=psf, fitting=Fitting(gain=GAIN, prior="none")
        ),
        "the same, without model error": lambda exposure, rows: fit(
            exposure, positions=rows["x", "y"], psf=psf, fitting=Fitting(gain=GAIN, prior="none", model_error=0.0)
        ),
    }
    images = list(dict.fromkeys(labels["image"]))
    labels = vstack([labels[labels["image"] == name] for name in images])
    catalogues = {}
    for way, run in ways.items():
        tables = [
            Table(run(Exposure.open(folder / name, zero_point=ZERO_POINT), labels[labels["image"] == name]))
            for name in images
        ]
        for table in tables:
            table.meta.clear()
        catalogues[way] = vstack(tables)
    return labels, catalogues


def draw(folder, psf, labels, catalogue, figure):
    """The bright galaxies whose radius and index differ most, and their residuals."""
    difference = np.abs(compared(catalogue, labels)[:, 1:3]).max(axis=1)
    worst = np.argsort(-difference * (np.asarray(labels["mag"]) < 22))[:DRAWN]
    figure_, axes = plt.subplots(DRAWN, 3, figsize=(7.5, 2.6 * DRAWN), squeeze=False)
    for row, i in zip(axes, worst, strict=True):
        path = folder / labels["image"][i]
        residual = Path(figure).with_suffix(".residual.fits")
        fit(
            Exposure.open(path, zero_point=ZERO_POINT),
            positions=labels[labels["image"] == labels["image"][i]]["x", "y"],
            psf=psf,
            fitting=Fitting(gain=GAIN, prior="none"),
            outputs=Outputs(residual=residual, overwrite=True),
        )
        frame = mosaic.read_image(path)
        sky, _ = detect.Detector()(frame.data, frame.without_data())
        ours = fits.getdata(residual)
        residual.unlink()
        with fits.open(path) as file:
            theirs = file["RESID"].data if "RESID" in file else np.full_like(ours, np.nan)
        x, y = int(labels["x"][i]), int(labels["y"][i])
        part = (slice(max(0, y - 60), y + 61), slice(max(0, x - 60), x + 61))
        titles = [f"mag {labels['mag'][i]:.1f}"]
        for who, table in (("GALFIT", labels), ("sersicnet", catalogue)):
            titles.append(f"{who}: R = {table['r_eff_pix'][i]:.1f}, n = {table['sersic_n'][i]:.2f}")
        for axis, image, title in zip(row, (frame.data - sky.level, theirs, ours), titles, strict=True):
            scaled = np.arcsinh(image[part] / np.nanmedian(sky.rms) / 3)
            axis.imshow(scaled, origin="lower", cmap="gray_r", vmin=-2, vmax=4)
            axis.set_title(title, fontsize=9)
            axis.set_axis_off()
    figure_.tight_layout()
    figure_.savefig(figure, dpi=75)


def main():
    """Print the tables, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("psf", type=Path)
    parser.add_argument("--weights", action="append", help="the default ones, if none are given")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore", SersicnetWarning)
    names = options.weights or [weights.DEFAULT]
    labels, catalogues = everything(options.folder, options.psf, names)
    isolated = (np.asarray(catalogues[names[0]]["flags"]) & (Flag.BLENDED | Flag.CROWDED)) == 0
    print("| way | N | mag | R_e (relative) | n (relative) | ellipticity |\n|---|---|---|---|---|---|")
    for way, catalogue in catalogues.items():
        difference = compared(catalogue, labels)
        print(summary(way, difference))
        print(summary(f"{way}, isolated", difference[isolated]))
    chosen = catalogues["fit from moments"]
    print("\n| galaxy | isolated | " + " | ".join(TARGET_NAMES) + " | chi2 | status |")
    print("|" + "---|" * (4 + len(TARGET_NAMES)))
    for label, ours, alone in zip(labels, chosen, isolated, strict=True):
        cells = [f"{label[n]:.2f}, {ours[n]:.2f} ± {ours[n + '_err']:.2f}" for n in TARGET_NAMES]
        tail = f"| {ours['chi2']:.2f} | {ours['fit_status']} |"
        print(f"| {label['image']} | {'yes' if alone else 'no'} | " + " | ".join(cells) + " " + tail)
    if options.figure:
        draw(options.folder, options.psf, labels, chosen, options.figure)


if __name__ == "__main__":
    main()
