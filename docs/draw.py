"""Draw the figures of the documentation.

``python docs/draw.py IMAGE CATALOGUE FIGURE`` draws a catalogue over its image. An
ellipse has the measured effective radius and ellipticity, and the angle of the
moments; it is blue without flags and orange with one. A cross is a source of low
signal to noise.

``python docs/draw.py DATA FIGURE`` compares real galaxies with simulated ones of the
same parameters, and prints how far each kind is from its Sersic fit. DATA holds
``candels/labels.csv`` with its images, and ``psf/hst-f160w.fits``.

``python docs/draw.py ROWS.json FIGURE`` draws the errors of many telescopes that `benchmarks/telescopes.py` saved, and
prints the tables of the accuracy pages.

``python docs/draw.py bands CATALOGUE FIGURE`` draws radii and indices of two bands of a catalogue beside each other.
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import numpy as np
from astropy.table import QTable
from matplotlib import pyplot as plt
from matplotlib.patches import Ellipse
from scipy import ndimage

from sersicnet.engine.fit import Fitter, Noise, Status
from sersicnet.engine.noise import correlated_noise
from sersicnet.image import detect, mosaic
from sersicnet.image.psffile import read_psf
from sersicnet.image.stamps import cut
from sersicnet.schema import STAMP_SIZE, Flag
from sersicnet.simulating import morphology as reallike
from sersicnet.simulating import neighbours as scene
from sersicnet.simulating import preview
from sersicnet.simulating.stamps import observe
from sersicnet.simulating.telescopes import F160W


def draw(image, catalogue, figure):
    """Write the figure of a catalogue over its image."""
    data = mosaic.read_image(image).data
    sky, _ = detect.Detector()(data, ~np.isfinite(data))
    sources = QTable.read(catalogue)
    height, width = data.shape
    fig = plt.figure(figsize=(8, 8 * height / width))
    axes = fig.add_axes((0, 0, 1, 1))
    axes.imshow(np.arcsinh((data - sky.level) / sky.rms / 3), origin="lower", cmap="gray_r", vmin=-0.7, vmax=4.5)
    axes.autoscale(False)
    faint = (sources["flags"] & Flag.LOW_SNR) != 0
    axes.plot(sources["x"][faint].value, sources["y"][faint].value, "x", color="tab:orange", ms=4, mew=0.8)
    for row in sources[np.isfinite(sources["mag"]) & ~faint]:
        semi_major = row["r_eff_pix"].value
        axes.add_patch(
            Ellipse(
                (row["x"].value, row["y"].value),
                2 * semi_major,
                2 * semi_major * (1 - row["ellipticity"]),
                angle=np.nan_to_num(row["theta"].value),
                fill=False,
                lw=1.2,
                color="tab:orange" if row["flags"] else "tab:blue",
            )
        )
    axes.set_axis_off()
    fig.savefig(figure, dpi=80)


DRAWS = 6
SHOWN_DRAWS = 2


def compare(data, figure):
    """Write the figure of real, real-like and Sersic galaxies, and print their departures from a fit."""
    data = Path(data)
    camera = scene.Camera(read_psf(data / "psf" / "hst-f160w.fits").image)
    fitter = Fitter(camera.psf, Noise(F160W.autocorrelation(), F160W.exposure), STAMP_SIZE)
    real = real_galaxies(data / "candels")
    departures = {"real": [], "real-like": [], "Sersic": []}
    fig, axes = plt.subplots(2 + SHOWN_DRAWS, len(real), figsize=(0.95 * len(real), 0.97 * (2 + SHOWN_DRAWS)))
    for column, (image, replaced, rms, galaxy) in enumerate(real):
        nothing = np.zeros(image.shape, bool)
        stamps = [("real", image, replaced)]
        moved = galaxy + np.array([scene.MARGIN] * 2 + [0] * 5)
        inner = slice(scene.MARGIN, scene.MARGIN + STAMP_SIZE)
        for k in range(DRAWS):
            rng = np.random.default_rng([column, k])
            model = camera.paint(reallike.invent(moved, rng), k % reallike.PSF_VARIANTS, scene.SIZE)
            stamps.append(("real-like", observe(model[inner, inner], rms, F160W, rng), nothing))
        rng = np.random.default_rng([column, DRAWS])
        stamps.append(("Sersic", observe(camera.render(galaxy, STAMP_SIZE), rms, F160W, rng), nothing))
        for kind, stamp, mask in stamps:
            fits = fitter(stamp[None], np.array([rms]), galaxy[None], mask[None])
            if fits.status[0] == Status.CONVERGED:
                model = fitter.draw(fits.parameters[0], STAMP_SIZE)
                found = departure(stamp - fits.sky[0], model, mask, rms, fits.parameters[0])
                departures[kind].append((*found, fits.chi2[0]))
        for axis, k in zip(axes[:, column], (0, *range(1, 1 + SHOWN_DRAWS), len(stamps) - 1), strict=True):
            preview.show(axis, stamps[k][1] / rms)
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, title in zip(axes[:, 0], ("real", *["real-like"] * SHOWN_DRAWS, "Sérsic"), strict=True):
        axis.set_ylabel(title, fontsize=8)
    fig.subplots_adjust(0.025, 0.005, 0.998, 0.995, 0.03, 0.03)
    fig.savefig(figure, dpi=100, pil_kwargs={"optimize": True})
    for kind, rows in departures.items():
        low, median, high = np.percentile(np.array(rows), [16, 50, 84], axis=0)
        names = ("residual flux", "asymmetry", "chi2")
        text = ", ".join(
            f"{n} {m:.3f} ({a:.3f} to {b:.3f})" for n, a, m, b in zip(names, low, median, high, strict=True)
        )
        print(f"{kind}, {len(rows)} fits: {text}")


def real_galaxies(folder, faintest=23.4):
    """Stamps of real galaxies in image units, what was replaced in them, noise, and GALFIT's parameters."""
    with (folder / "labels.csv").open() as file:
        labels = [row for row in csv.DictReader(file) if row["use"] == "1" and float(row["mag"]) < faintest]
    out = []
    for row in labels:
        frame = mosaic.read_image(folder / row["image"])
        bad = frame.without_data()
        sky, found = detect.Detector()(frame.data, bad)
        x, y, mag, r_eff, n, e, angle = (
            float(row[name]) for name in ("x", "y", "mag", "r_eff_pix", "sersic_n", "ellipticity", "pa_deg")
        )
        dilated = found.dilated()
        own = np.array([dilated[round(y), round(x)]])
        stamp = cut(frame.data, bad, sky, np.array([x]), np.array([y]), dilated, own)
        rms = stamp.rms[0]
        noise = rms * correlated_noise(np.random.default_rng(len(out)), STAMP_SIZE, sky.autocorrelation)
        image = np.where(stamp.replaced[0] & (stamp.pixels[0] == 0), noise, stamp.pixels[0] * rms)
        flux = 10 ** (-0.4 * (mag - F160W.zero_point))
        out.append(
            (image, stamp.replaced[0], rms, np.array([stamp.x[0], stamp.y[0], flux, r_eff, n, 1 - e, angle + 90]))
        )
    return out


def departure(stamp, model, mask, rms, galaxy):
    """Residual flux fraction within 2 R_e (Hoyos et al. 2011), and asymmetry within 1.5 R_e, both less noise."""
    x, y, _, r_eff, _, q, theta = galaxy
    rows, columns = np.indices(stamp.shape)
    cos, sin = np.cos(np.radians(theta)), np.sin(np.radians(theta))
    u, v = (columns - x) * cos + (rows - y) * sin, (rows - y) * cos - (columns - x) * sin
    white = F160W.exposure * F160W.autocorrelation().sum()
    sigma = np.sqrt(rms**2 + np.maximum(model, 0) / white)
    inside = (np.hypot(u, v / q) < max(2 * r_eff, 4)) & ~mask
    residual = (np.abs(stamp - model)[inside].sum() - 0.798 * sigma[inside].sum()) / model[inside].sum()
    best = np.inf
    for dx in (-0.5, 0, 0.5):
        for dy in (-0.5, 0, 0.5):
            opposite = [2 * (y + dy) - rows, 2 * (x + dx) - columns]
            turned = ndimage.map_coordinates(stamp, opposite, order=3, mode="nearest")
            hidden = ndimage.map_coordinates(mask.astype(float), opposite, order=1, mode="nearest") > 0
            used = (np.hypot(columns - x, rows - y) < max(1.5 * r_eff, 4)) & ~mask & ~hidden
            if used.sum() > 20:
                noise = 1.128 * sigma[used].sum()
                best = min(best, (np.abs(stamp - turned)[used].sum() - noise) / np.abs(stamp[used]).sum())
    return residual, best


LABELS = {
    "any": "any telescope", "jwst-sw/F115W": "JWST F115W", "jwst-sw/F200W": "JWST F200W",
    "jwst-lw/F444W": "JWST F444W", "hst-acs/F814W": "HST ACS F814W", "hst-ir/F160W": "HST F160W",
    "euclid-vis": "Euclid VIS", "roman/F158": "Roman F158", "rubin/i": "Rubin i", "hsc/i": "HSC i", "des/z": "DES z",
    "kids/r": "KiDS r", "sdss/r": "SDSS r",
}  # fmt: skip
SHOWN = (("S/N 15 to 50", "tab:orange"), ("S/N 50 to 150", "tab:green"), ("S/N 150 to 30000", "tab:blue"))
PANELS = (("mag", "magnitude", 0.32), ("r_eff_pix", "ln R$_e$", 0.42), ("sersic_n", "ln n", 0.55),
          ("ellipticity", "ellipticity", 0.16))  # fmt: skip


def telescopes(rows, figure):
    """Write the figure of bias, scatter and coverage by telescope and signal to noise."""
    rows = json.loads(Path(rows).read_text())["rows"]
    names = [name for name in LABELS if any(row["telescope"] == name for row in rows)]
    fig, axes = plt.subplots(1, 5, figsize=(11, 4.6), sharey=True, width_ratios=[1, 1, 1, 1, 0.8])
    for axis, (target, title, limit) in zip(axes, PANELS, strict=False):
        for k, (label, colour) in enumerate(SHOWN):
            for y, name in enumerate(names):
                row = next(r for r in rows if r["telescope"] == name and r["bin"] == label)
                middle, scatter = row[target][:2]
                at = y + 0.26 * (k - 1)
                axis.plot([middle - scatter, middle + scatter], [at, at], color=colour, lw=2.2)
                axis.plot(middle, at, "o", color=colour, ms=3.4, mec="white", mew=0.4)
                axes[4].plot(100 * row[target][2], at, "|", color=colour, ms=6, mew=1.3)
        axis.axvline(0, color="0.3", lw=0.6)
        axis.set_xlim(-limit, limit)
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", color="0.9", lw=0.5)
    axes[4].axvspan(64, 72, color="0.9")
    axes[4].set_xlim(45, 90)
    axes[4].set_title("within 1 sigma, %", fontsize=10)
    axes[0].set_yticks(range(len(names)), [LABELS[name] for name in names])
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    for label, colour in SHOWN:
        axes[0].plot([], [], color=colour, lw=2.2, label=label.replace("150 to 30000", "above 150"))
    fig.legend(loc="lower center", ncols=3, frameon=False, fontsize=9)
    for axis in axes:
        axis.tick_params(labelsize=8, length=2)
    fig.subplots_adjust(0.1, 0.12, 0.99, 0.93, 0.08)
    fig.savefig(figure, dpi=90, pil_kwargs={"optimize": True})
    print_tables(rows, names)


def print_tables(rows, names):
    """Print a short table, and one of all bins."""
    found = {(row["telescope"], row["bin"]): row for row in rows}
    faint, middle, bright = (label for label, _ in SHOWN)
    print("| images of | R_e, S/N 15 to 50 | 50 to 150 | above 150 | n, above 150 | e, above 150 | mag, above 150 |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        cells = [percent(found[name, label]["r_eff_pix"]) for label in (faint, middle, bright)]
        row = found[name, bright]
        cells += [percent(row["sersic_n"]), *(f"{row[t][0]:+.3f} ± {row[t][1]:.3f}" for t in ("ellipticity", "mag"))]
        print(f"| {LABELS[name]} | {' | '.join(cells)} |")
    print("\n| images of | | N | mag | ln R_e | ln n | e |\n|---|---|---|---|---|---|---|")
    for name in names:
        for row in (r for r in rows if r["telescope"] == name):
            cells = (row[target] for target, _, _ in PANELS)
            text = " | ".join(f"{m:+.3f} ± {s:.3f}; {one:.2f} {two:.2f}" for m, s, one, two in cells)
            label = row["bin"].replace("150 to 30000", "above 150").replace("1.5 to inf FWHM", "above 1.5 FWHM")
            print(f"| {LABELS[name]} | {label} | {row['n']} | {text} |")


def percent(value):
    """Bias and scatter of a logarithm in per cent."""
    return f"{100 * value[0]:+.1f} ± {100 * value[1]:.1f} %"


def bands(catalogue, figure):
    """Write the figure of radii, indices and colours of two bands: rows without flags, and in grey other good fits."""
    table = QTable.read(catalogue)
    one, other = table.meta["BANDS"].split(",")[:2]

    def column(name, band):
        return np.array(getattr(table[f"{name}_{band}"], "value", table[f"{name}_{band}"]))

    doubt = Flag.EDGE | Flag.LARGE | Flag.SATURATED | Flag.POINT_LIKE
    flags = column("flags", one) | column("flags", other)
    fitted = (column("fit_status", one) == 0) & (column("fit_status", other) == 0)
    good = fitted & (flags & doubt == 0) & (column("snr", one) > 10) & (column("snr", other) > 10)
    clean = fitted & (flags == 0)
    panel, axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained")
    names = {"r_eff": "effective radius [arcsec]", "sersic_n": "Sérsic index"}
    for axis, (name, label) in zip(axes, names.items(), strict=False):
        x, y = column(name, one), column(name, other)
        errors = {"xerr": column(f"{name}_err", one)[clean], "yerr": column(f"{name}_err", other)[clean]}
        axis.scatter(x[good & ~clean], y[good & ~clean], c="0.75", s=10)
        axis.errorbar(x[clean], y[clean], **errors, fmt="none", ecolor="0.6", lw=0.8)
        axis.scatter(x[clean], y[clean], c=column("mag", one)[clean], cmap="viridis_r", s=22, zorder=2)
        both = np.concatenate([x[good | clean], y[good | clean]])
        ends = [0.8 * both.min(), 1.25 * both.max()]
        axis.plot(ends, ends, color="0.4", lw=0.8)
        axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, title=label, xlabel=one, ylabel=other)
        axis.minorticks_off()
        ticks = [tick for tick in (0.05, 0.1, 0.2, 0.5, 1, 2, 4, 8) if ends[0] < tick < ends[1]]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        for which, rows in (("without flags", clean), ("other good fits", good & ~clean)):
            ratio = np.log(y[rows] / x[rows])
            median = np.exp(np.median(ratio))
            error = median * 1.2533 * spread(ratio) / np.sqrt(len(ratio))
            relative = np.hypot(
                *(column(f"{name}_err", band)[rows] / column(name, band)[rows] for band in (one, other))
            )
            print(
                f"{label}, {other}/{one}, {len(ratio)} {which}: median {median:.2f} ± {error:.2f}, "
                f"scatter of ln {spread(ratio):.2f}, median error of ln {np.median(relative):.2f}"
            )
    mag, colour = column("mag", one), column("mag", other) - column("mag", one)
    axes[2].scatter(mag[good & ~clean], colour[good & ~clean], c="0.75", s=10)
    points = axes[2].scatter(mag[clean], colour[clean], c=mag[clean], cmap="viridis_r", s=22)
    axes[2].set(title="colour", xlabel=f"mag, {one}", ylabel=f"mag, {other} - {one}")
    panel.colorbar(points, label=f"mag, {one}")
    panel.savefig(figure, dpi=100)
    print(f"{clean.sum()} without flags and {(good & ~clean).sum()} other good fits of {len(table)} sources")


def spread(values):
    """Scatter about the median, from the median absolute deviation."""
    return 1.4826 * np.median(np.abs(values - np.median(values)))


if __name__ == "__main__":
    if sys.argv[1] == "bands":
        bands(*sys.argv[2:])
    elif sys.argv[1].endswith(".json"):
        telescopes(*sys.argv[1:])
    else:
        (compare if len(sys.argv) == 3 else draw)(*sys.argv[1:])
