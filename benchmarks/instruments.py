"""Our measurements of real galaxies of many telescopes beside published ones and an independent fitter's.

``python benchmarks/instruments.py FOLDER --weights fovea``

FOLDER holds images, their PSFs, noise maps and masks, with a ``labels.csv``: image, psf, rms, mask, pixel_scale,
zero_point, gain, x, y, and the parameters of a label; those of the fitter have names that end in 2. Printed are the
differences, ours minus the fitter's, of each galaxy, their median and 68 % scatter, and those of the published labels
from the fitter's, which nobody can be expected to improve on. ``--figure`` draws each galaxy beside the model of the
measured parameters and what the model leaves.
"""

import argparse
import warnings
from pathlib import Path

import numpy as np
from astropy.table import Table

from sersicnet.errors import SersicnetError, SersicnetWarning
from sersicnet.image.exposure import Exposure
from sersicnet.measuring.measure import measure
from sersicnet.schema import TARGET_NAMES, Flag


def given(row, name):
    """A value of a row, None if it is masked or empty."""
    value = row[name]
    return None if np.ma.is_masked(value) or value == "" else value


def differences(ours, theirs):
    """Of mag, ln R_e, ln n and ellipticity."""
    a, b = (np.asarray(values, float) for values in (ours, theirs))
    return np.array([a[0] - b[0], np.log(a[1] / b[1]), np.log(a[2] / b[2]), a[3] - b[3]])


def measured(folder, row, weights, own_stars):
    """Catalogue of one galaxy."""
    maps = {"mask": given(row, "mask")}
    if given(row, "rms"):
        maps |= {"noise": given(row, "rms"), "noise_kind": "rms"}
    maps = {name: value if name == "noise_kind" or value is None else folder / value for name, value in maps.items()}
    exposure = Exposure.open(
        folder / row["image"], zero_point=float(row["zero_point"]), pixel_scale=float(row["pixel_scale"]), **maps
    )
    gain = given(row, "gain")
    return measure(
        exposure, weights=weights, positions=Table({"x": [row["x"]], "y": [row["y"]]}),
        psf=None if own_stars else folder / row["psf"], gain=None if gain is None else float(gain),
    )  # fmt: skip


def drawn(figure, galaxies):
    """Write a picture of stamps, models and residuals, three galaxies a row."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from PIL import Image

    height = -(-len(galaxies) // 3)
    fig, axes = plt.subplots(height, 9, figsize=(13, 1.55 * height), layout="constrained")
    for ax in axes.ravel():
        ax.set_axis_off()
    for i, (name, galaxy) in enumerate(galaxies):
        three = axes[i // 3, 3 * (i % 3) :]
        known = galaxy.noise[np.isfinite(galaxy.noise) & (galaxy.noise > 0)]
        noise = np.median(known)
        for ax, image in zip(three, (galaxy.stamp, galaxy.model, galaxy.residual), strict=False):
            ax.imshow(np.arcsinh(image / noise / 3), origin="lower", cmap="gray_r", vmin=-1.5, vmax=4.5)
        three[0].set_title(name, fontsize=7, loc="left", pad=2)
    fig.savefig(figure, dpi=90)
    with Image.open(figure) as picture:
        picture.convert("L").quantize(32).save(figure, optimize=True)  # noise does not compress


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", default="fovea")
    parser.add_argument("--stars", action="store_true", help="find the PSF from the stars of the cut-out")
    parser.add_argument("--figure", type=Path, help="picture of images, models and residuals to write")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", SersicnetWarning)
    labels = Table.read(arguments.folder / "labels.csv")
    rows, published, galaxies = [], [], []
    print("| galaxy | mag | ln R_e | ln n | e | flags |\n|---|---|---|---|---|---|")
    for row in labels:
        fitter = [row[f"{name}2"] for name in TARGET_NAMES]
        try:
            catalogue = measured(arguments.folder, row, arguments.weights, arguments.stars)
        except SersicnetError as error:
            print(f"| {row['id']} | {error} |")
            continue
        found = catalogue[0]
        if np.isfinite(found["mag"]):
            galaxies.append((row["id"], catalogue.galaxy(int(found["id"]))))
        ours = [getattr(found[name], "value", found[name]) for name in TARGET_NAMES]
        rows.append(differences(ours, fitter))
        if given(row, "tier") == 1:
            published.append(differences([row[name] for name in TARGET_NAMES], fitter))
        cells = " | ".join(f"{value:+.3f}" for value in rows[-1])
        print(f"| {row['id']} | {cells} | {Flag(int(found['flags'])).name} |")
    for name, values in (("ours", rows), ("published", published)):
        middle = np.nanmedian(values, axis=0)
        scatter = np.nanquantile(np.abs(values - middle), 0.68, axis=0)
        print(
            f"| {name} ({len(values)}) | "
            + " | ".join(f"{m:+.3f} ± {s:.3f}" for m, s in zip(middle, scatter, strict=True))
        )
    if arguments.figure:
        drawn(arguments.figure, galaxies)


if __name__ == "__main__":
    main()
