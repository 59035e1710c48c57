"""Where the biases of the galaxies of a mosaic come from: one ingredient after another is replaced by the truth.

``python benchmarks/bias.py --work FOLDER [--seeds 9 11 12 13] [--size 2000] [--weights NAME]``

Prints the Markdown tables of the section on faint radii of ``docs/accuracy/mosaics.md``.

- **Mosaics**: fields as of ``sersicnet simulate --mosaic SIZE --seed N``, but with a sky of exactly 0. They are
  detected and measured as the first look of `measure` does it, and again with the true PSF; without the light of
  neighbours, as the second look does it; with larger masks on the other sources; with the true sky; and with stamps
  that hold this galaxy and the noise of the same place, and no other galaxy. A detection and a galaxy that are each
  other's nearest within 3 pixels are compared, by magnitude.
- **The network's own galaxies**: isolated galaxies of the prior that the network is trained on, through the same PSF,
  with the signal to noise of mag 24.5 to 25.5; all of them, and weighted to have the radii, indices and ellipticities
  of the mosaic or of CANDELS. The densities are those of kernels over draws.
- **Another prior**: the network's answer is a normal distribution of magnitude, log radius, log index and ellipticity.
  Samples of it are weighted by the density of the mosaic's galaxies over that of the network's prior.

What exists in FOLDER is used again.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from astropy.io import fits
from scipy.spatial import KDTree
from scipy.stats import gaussian_kde

from sersicnet import session, weights
from sersicnet.image.detect import Detector
from sersicnet.image.pixels import Held, Pixels, Sky
from sersicnet.image.psf import Psf
from sersicnet.image.regions import grown_labels
from sersicnet.image.sky import estimate_sky
from sersicnet.image.stamps import cut
from sersicnet.image.views import psf_views
from sersicnet.measuring.neighbours import Neighbours
from sersicnet.schema import (
    STAMP_SIZE,
    TARGET_NAMES,
    TARGETS,
    Inputs,
    absolute_magnitude_of_rms,
    encode,
    noise_numbers,
)
from sersicnet.simulating import neighbours, observatories, population, world
from sersicnet.simulating.field import Field, field_truth
from sersicnet.simulating.stamps import observe, observe_in_place
from sersicnet.simulating.telescopes import F160W, effective_psf

CAMERA = replace(F160W, sky_residual=0.0)
HALF, EDGE, MATCHED = STAMP_SIZE, STAMP_SIZE // 2, 3.0
FAINT, BRIGHT_SNR, NEAR = (24.5, 25.5), 100.0, 12.0
MAGS = (24.0, 26.0)
"""Faint galaxies that are measured: bins of the measured magnitude hold some that are not of the bin."""
LIKE_FAINT = (15.0, 50.0)
"""Signal to noise of most galaxies of `FAINT`."""
DRAWN, KERNELS, SAMPLES, MOST_WEIGHT = 900, 1500, 30, 5.0
IMPOSSIBLE = -1e3
"""Logarithm of a density of 0."""
TRUE = effective_psf(F160W)
FWHM = Psf("", "", TRUE).fwhm


# --- the network ---------------------------------------------------------------------------------------------------


def views(known):
    """What a network is shown of the true PSF, or of the one that is assumed for F160W."""
    if known:
        return psf_views(TRUE)[None]
    psf, _ = observatories.usual_psf(fits.Header({"TELESCOP": "HST", "INSTRUME": "WFC3", "FILTER": "F160W"}), 0.06)
    return psf_views(psf.image, psf.oversampling)[None]


def answers(network, pixels, rms, correlation, known_psf=True):
    """Targets, their errors and correlations, (N, 14)."""
    seen = Inputs(pixels, views(known_psf), noise_numbers(correlation, F160W.exposure * rms))
    found = network.predict(seen)
    found.targets[:, 0] += absolute_magnitude_of_rms(F160W.zero_point, rms)
    return np.column_stack([found.targets, found.errors, found.correlations])


# --- mosaics -------------------------------------------------------------------------------------------------------


def drawn(field, truth):
    """The mosaic without noise, and each galaxy alone, (N, 2 HALF, 2 HALF), about its pixel."""
    camera, size = neighbours.camera(CAMERA), field.size
    canvas, alone = np.zeros((size, size), np.float32), np.empty((len(truth), 2 * HALF, 2 * HALF), np.float32)
    for image, row in zip(alone, truth, strict=True):
        corner = np.array([round(row["x"]), round(row["y"])]) - HALF
        galaxy = dict(zip(row.colnames, row, strict=True)) | {"x": row["x"] - corner[0], "y": row["y"] - corner[1]}
        image[:] = camera.render(np.array(neighbours.parameters(galaxy, CAMERA)), 2 * HALF)
        low, high = np.maximum(corner, 0), np.minimum(corner + 2 * HALF, size)
        inner, outer = low - corner, high - corner
        canvas[low[1] : high[1], low[0] : high[0]] += image[inner[1] : outer[1], inner[0] : outer[0]]
    return canvas, alone


def with_own(stamps, x, y, truth, alone):
    """Add each galaxy to its stamp of noise, in place; NaN where its image does not reach."""
    corners = [np.ceil(place - STAMP_SIZE / 2) - np.round(truth[axis]) + HALF for place, axis in ((x, "x"), (y, "y"))]
    for pixels, rms, image, *first in zip(stamps.pixels, stamps.rms, alone, *np.array(corners, int), strict=True):
        if min(first) < 0 or max(first) > 2 * HALF - STAMP_SIZE:
            pixels[:] = np.nan
            continue
        pixels += image[first[1] : first[1] + STAMP_SIZE, first[0] : first[0] + STAMP_SIZE] / rms
    return stamps


def without_neighbours(network, image, bad, sky, found, rows):
    """Stamps of some detections, without the light of their neighbours, as `measure` subtracts it."""
    masks, labels = found.dilated(), np.arange(len(found)) + 1
    stamps = cut(image, bad, sky, found.x, found.y, masks, labels)
    seen = Inputs(stamps.pixels, views(True), noise_numbers(sky.correlation, F160W.exposure * stamps.rms))
    first = network.predict(seen)
    mag, r_eff, index, e = first.targets.T
    flux = 10 ** (-0.4 * (mag + absolute_magnitude_of_rms(F160W.zero_point, stamps.rms) - F160W.zero_point))
    galaxies = np.column_stack([found.x, found.y, flux, r_eff, index, 1 - e, first.theta])
    near = Neighbours(galaxies, Psf("", "", TRUE), stamps.rms, sky.correlation)
    out = cut(image, bad, sky, found.x[rows], found.y[rows], masks, labels[rows])
    again = near.of(rows)
    stamps = cut(image, bad, sky, found.x[again], found.y[again], masks, labels[again])
    stamps.subtract(near.light(again, stamps))
    out.pixels[np.isin(rows, again)] = stamps.pixels
    return out


def measured(network, seed, size):
    """Truth, distance of the next detection in FWHM, error of the sky in rms, and the answers, by name."""
    field = Field(size, seed=seed, instrument=CAMERA)
    truth = field_truth(field)
    canvas, alone = drawn(field, truth)
    image = canvas.copy()
    observe_in_place(image, field.rms, CAMERA, np.random.default_rng([seed, 1]))
    noise, bad = image - canvas, np.zeros(image.shape, bool)
    source, detector = Held(Pixels(image, bad, None)), Detector()
    mesh = estimate_sky(source, detector.threshold)
    sky = mesh.at((slice(0, size), slice(0, size)), source.pixels)
    found = detector.find(source.pixels, sky, mesh)
    seen, true = np.column_stack([found.x, found.y]), np.column_stack([truth["x"], truth["y"]])
    away, there = KDTree(true).query(seen)
    back, next_source = KDTree(seen).query(true)[1], KDTree(seen).query(seen, 2)[0][:, 1] / FWHM
    good = (away < MATCHED) & (back[there] == np.arange(len(seen)))
    good &= ((seen > EDGE) & (seen < size - 1 - EDGE)).all(axis=1)
    mag, snr = truth["mag"][there], signal(np.column_stack([truth[name] for name in TARGET_NAMES]))[there]
    rows = np.flatnonzero(good & (((mag > MAGS[0]) & (mag < MAGS[1])) | (snr > BRIGHT_SNR)))
    own, (x, y), (true_x, true_y) = there[rows], seen[rows].T, true[there[rows]].T
    zero = Sky(np.zeros_like(image), sky.rms, sky.autocorrelation, np.nan)
    exact = Sky(zero.level, np.full_like(image, field.rms), CAMERA.autocorrelation(), np.nan)
    masks, labels = found.dilated(), rows + 1

    def isolated(level, x=x, y=y):
        return with_own(cut(noise, bad, level, x, y), x, y, truth[own], alone[own])

    stamps = {
        "as measured, PSF assumed": cut(image, bad, sky, x, y, masks, labels),
        "true PSF": cut(image, bad, sky, x, y, masks, labels),
        "true PSF, second look": without_neighbours(network, image, bad, sky, found, rows),
        "true PSF and sky": cut(image, bad, zero, x, y, masks, labels),
        "true PSF, masks of 8 pixels": cut(image, bad, sky, x, y, grown_labels(found.segmentation, 8), labels),
        "true PSF, no other galaxies": isolated(sky),
        "true PSF and sky, no others": isolated(zero),
        "all true: centre and noise, too": isolated(exact, true_x, true_y),
    }
    out = {}
    for name, one in stamps.items():
        correlation = CAMERA.correlation if name.startswith("all true") else sky.correlation
        out[name] = answers(network, one.pixels, one.rms, correlation, not name.endswith("assumed"))
    at = np.rint(y).astype(int), np.rint(x).astype(int)
    targets = np.column_stack([truth[name][own] for name in TARGET_NAMES])
    noises = np.array([np.median(sky.rms) / field.rms, sky.correlation / CAMERA.correlation])
    return {"truth": targets, "next": next_source[rows], "sky": sky.level[at] / field.rms, "noise": noises, **out}


# --- priors --------------------------------------------------------------------------------------------------------


def signal(targets):
    """Signal to noise as in `sersicnet.simulating.world.Galaxies`, float64, (N,)."""
    mag, r_eff, _, e = targets.T
    area = 4 * np.pi * ((FWHM / 2.355) ** 2 + 0.5 * (1 - e) * r_eff**2)
    return 10 ** (-0.4 * (mag - F160W.zero_point)) / (Field(STAMP_SIZE).rms * F160W.correlation * np.sqrt(area))


def own_galaxies(network):
    """Draws of the network's prior; those of `LIKE_FAINT`, and the answers to them."""
    rng, rms = np.random.default_rng(5), Field(STAMP_SIZE).rms
    prior = world.Galaxies(FWHM, F160W.zero_point, rms, F160W.correlation)
    ranges = {target.name: (target.low, target.high) for target in TARGETS}
    draws, chosen = [], np.zeros(0)
    while len(chosen) < DRAWN:
        draws += [list(prior.draw(rng, ranges).values()) for _ in range(500)]
        values = np.array(draws)
        chosen = np.flatnonzero((signal(values) > LIKE_FAINT[0]) & (signal(values) < LIKE_FAINT[1]))
    truth, camera = values[chosen], neighbours.camera(F160W)
    pixels = np.empty((len(truth), STAMP_SIZE, STAMP_SIZE), np.float32)
    for image, row in zip(pixels, truth, strict=True):
        x, y = (STAMP_SIZE - 1) / 2 + rng.uniform(-0.5, 0.5, 2)
        galaxy = {**dict(zip(TARGET_NAMES, row, strict=True)), "x": x, "y": y, "theta": rng.uniform(-90, 90)}
        model = camera.render(np.array(neighbours.parameters(galaxy, F160W)), STAMP_SIZE)
        image[:] = observe(model, rms, F160W, rng) / rms
    return {
        "draws": values[:KERNELS],
        "truth": truth,
        "answers": answers(network, pixels, np.full(len(truth), rms), F160W.correlation),
    }


def of_mosaic(values):
    """Logarithm of the density of log radius, log index and ellipticity of a `Field` at a magnitude."""
    field = Field(STAMP_SIZE)
    mag, r_eff, index, e = np.moveaxis(values, -1, 0)
    ten, (at22, slope, scatter) = np.log(10), field.log_radius
    out = ((r_eff / ten - at22 - slope * (mag - 22)) / scatter) ** 2
    out = out + ((index / ten - field.log_index[0]) / field.log_index[1]) ** 2
    out += ((1 - e - field.axis_ratio[0]) / field.axis_ratio[1]) ** 2
    possible = (e >= 0) & (e <= 0.9) & (index >= np.log(TARGETS[2].low)) & (index <= np.log(TARGETS[2].high))
    return np.where(possible, -out / 2, IMPOSSIBLE)


def with_prior(found, own, counts):
    """Answers with the prior of the mosaic in place of the network's: means of weighted samples, (N, 4), encoded."""
    rng, mean, sigma = np.random.default_rng(1), encode(found[:, :4]), found[:, 4:8].copy()
    sigma[:, 1:3] /= found[:, 1:3]
    matrix = np.tile(np.eye(4), (len(found), 1, 1))
    for k, (i, j) in enumerate(zip(*weights.PAIRS, strict=True)):
        matrix[:, i, j] = matrix[:, j, i] = found[:, 8 + k]
    root = np.linalg.cholesky(matrix * sigma[:, :, None] * sigma[:, None, :] + 1e-9 * np.eye(4))
    values = mean[:, None] + np.einsum("nij,nkj->nki", root, rng.standard_normal((len(found), SAMPLES, 4)))
    density = gaussian_kde(encode(own["draws"])[:, 1:].T)(values.reshape(-1, 4)[:, 1:].T).reshape(values.shape[:2])
    logs = of_mosaic(values) - np.log(density + 1e-12)
    if counts:
        field = Field(STAMP_SIZE)
        bright = values[..., 0] < field.mag[1]
        logs += np.where(bright, np.log(10) * field.counts_slope * values[..., 0], IMPOSSIBLE)
    weight = np.exp(logs - logs.max(axis=1, keepdims=True))
    weight = np.minimum(weight, MOST_WEIGHT * weight.mean(axis=1, keepdims=True))
    return np.einsum("nk,nki->ni", weight, values) / weight.sum(axis=1)[:, None]


# --- tables --------------------------------------------------------------------------------------------------------


def median(off, weight=None):
    """Median errors of mag, ln R_e, ln n and e, and their own errors from 200 bootstrap samples, in words."""
    rng, weight = np.random.default_rng(0), np.ones(len(off)) if weight is None else weight
    order = np.argsort(off, axis=0)

    def at(weight):
        mass = np.cumsum(weight[order], axis=0)
        return off[order, np.arange(4)][(mass < mass[-1] / 2).sum(axis=0), np.arange(4)]

    draws = [at(weight * rng.multinomial(len(off), np.full(len(off), 1 / len(off)))) for _ in range(200)]
    return " | ".join(f"{m:+.3f} ± {s:.3f}" for m, s in zip(at(weight), np.std(draws, axis=0), strict=True))


def row(*cells):
    print(f"| {' | '.join(cells)} |")


def heading(title):
    print(f"\n| {title} | N | mag | ln R_e | ln n | e |\n|---|---|---|---|---|---|")


def main(given):
    session.use_one_thread()
    network, parts = weights.load(given.weights), []
    jobs = [(f"bias-{seed}-{given.size}.npz", measured, (network, seed, given.size)) for seed in given.seeds]
    for name, job, arguments in [("own.npz", own_galaxies, (network,)), *jobs]:
        path = given.work / name
        if not path.exists():
            np.savez(path, **job(*arguments))
        parts.append(dict(np.load(path)))
    own, *fields = parts
    all_of = {name: np.concatenate([field[name] for field in fields]) for name in fields[0]}
    truth, apart = all_of.pop("truth"), all_of.pop("next")
    sky, noise = all_of.pop("sky"), all_of.pop("noise").reshape(-1, 2).mean(axis=0)
    true = encode(truth)
    faint = (truth[:, 0] > FAINT[0]) & (truth[:, 0] < FAINT[1])
    known = np.all([np.isfinite(found).all(axis=1) for found in all_of.values()], axis=0)
    samples = {
        "true mag 24.5-25.5": faint,
        f"those with the next source beyond {NEAR:g} FWHM": faint & (apart > NEAR),
        "those with a nearer one": faint & (apart <= NEAR),
        f"S/N > {BRIGHT_SNR:g}, next source beyond {NEAR:g} FWHM": (signal(truth) > BRIGHT_SNR) & (apart > NEAR),
    }
    for title, chosen in samples.items():
        heading(title)
        for name, found in all_of.items():
            row(name, str((chosen & known).sum()), median((encode(found[:, :4]) - true)[chosen & known]))
    heading("prior")
    for name in ("true PSF", "all true: centre and noise, too"):
        found, inside = all_of[name][known], true[known]
        kinds = {"the network's": encode(found[:, :4])}
        kinds["the mosaic's, even in magnitude"] = with_prior(found, own, False)
        kinds["the mosaic's"] = with_prior(found, own, True)
        for kind, values in kinds.items():
            for by, mag in (("true", inside[:, 0]), ("measured", values[:, 0])):
                chosen = (mag > FAINT[0]) & (mag < FAINT[1])
                row(f"{name}; prior {kind}; by {by} mag", str(chosen.sum()), median((values - inside)[chosen]))
    heading("the network's own galaxies")
    off, inside = encode(own["answers"][:, :4]) - encode(own["truth"]), encode(own["truth"])
    density, at25 = gaussian_kde(encode(own["draws"])[:, 1:].T), np.mean(FAINT)
    rng, real = np.random.default_rng(2), population.candels_evenly().mixture
    shapes = np.array([(at25, *real.at_magnitude(at25, rng)) for _ in range(KERNELS)])
    of_candels = gaussian_kde(encode(shapes)[:, 1:].T)(inside[:, 1:].T)
    inside[:, 0] = at25
    kinds = {"all": np.ones(len(off)), "weighted as the mosaic": np.exp(of_mosaic(inside)) / density(inside[:, 1:].T)}
    kinds["weighted as CANDELS at mag 25"] = of_candels / density(inside[:, 1:].T)
    for name, weight in kinds.items():
        row(name, f"{weight.sum() ** 2 / (weight**2).sum():.0f}", median(off, weight))
    print(f"\nsky - true, rms: {np.median(sky[faint]):+.4f} ± {sky[faint].std():.4f};", end=" ")
    print(f"rms and correlation over the true ones: {noise[0]:.3f}, {noise[1]:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[9, 11, 12, 13])
    parser.add_argument("--size", type=int, default=2000)
    parser.add_argument("--weights", default="fovea")
    chosen = parser.parse_args()
    chosen.work.mkdir(exist_ok=True, parents=True)
    main(chosen)
