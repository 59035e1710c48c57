"""Our fitter against what a user would pick instead, in one run on one machine.

``python benchmarks/fit.py --set SET.npz [--peers-python PYTHON] [--json FILE] [--only TOOL ...] [--first N]``

Prints Markdown: the speed of each tool (two processes, one thread each); its accuracy
beside the Cramer-Rao bound; how often our error bars hold the truth; and each bright
galaxy that we get wrong. The set is drawn once and kept in SET.npz (ten minutes on two
cores, from --seed). It takes the tools that it finds: source-extractor on the PATH, and
pyimfit and petrofit in the Python given by --peers-python (by default this one). Petrofit
0.5 needs an environment of its own: ``pip install pyimfit petrofit "astropy<6" "numpy<2"
"photutils<2" "scipy<1.14" matplotlib``.

The galaxies are single Sersic profiles, drawn by GalSim, alone in stamps of 128 pixels,
uniform in the `RANGES` below, with the PSF, depth and noise of drizzled HST images in
F160W. The sky is 0, and all know it; ours is run again with a free sky, and with a prior
that knows the ranges. The peers get a map of the noise of each pixel with the Poisson
noise of the source, taken from the data.

- PSF: ours gets 255 pixels, which cost it nothing; the peers --peers-psf, which would cost
  them more time. A PSF that ends is normalised to 1, so fluxes come out too small by the
  light outside of it (0.5 % for 255 pixels, 1.8 % for 65): all are divided by what it holds.
- Starting values, the same for all (source-extractor finds its own): see `moments`.
- Failed: no result, or its own word that it did not converge (for ours also a parameter at
  a bound). A result that there is counts in the accuracy all the same.
- The Cramer-Rao bound: the inverse of J^T C^-1 J at the truth, with the exact covariance C
  of the stamp's pixels (independent noise, Poisson from the true model, through the kernel)
  and J from `sersicnet.engine.render`, as in `sersicnet.simulating.fisher`. The few bits in the variance
  itself are left out.
- The bound with the prior: what the mean of the posterior can reach when the ranges are
  known, see `sersicnet.simulating.fisher`; x, y and angle are integrated out, with Gaussians of their
  ranges' variances. Beside it, the simple
  (F + 12 / width^2)^-1, which takes the uniform ranges as Gaussians.

Bounds go through the same table as the tools: their rows are errors drawn from them.
"""

import argparse
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import galsim
import numpy as np
import peers
from scipy import ndimage

from sersicnet.engine.render import Renderer
from sersicnet.simulating import fisher as limits

SIZE, CENTRE = 128, 63.5
PIXEL_SCALE, ZERO_POINT, EXPOSURE, DEPTH = 0.06, 25.946, 3200.0, 27.0
TAPS = np.array([0.29, 1, 0.29]) / 1.58
RANGES = {"mag": (16, 25), "R_e": (1.5, 31.6), "n": (0.3, 6.2), "e": (0, 0.9)}
PSF_SIZE = 255
PROCESSES = 2
BINS = {"mag <= 23": (16, 23), "23 < mag <= 25": (23, 25)}
OURS = "sersicnet"
TARGETS = tuple(RANGES)
DRAWS = 100
"""Realisations of the noise for the rows of the bounds."""


# --- the set ---------------------------------------------------------------------------------------------


def galsim_psf(settings):
    """The effective PSF: the telescope's, and the boxes of detector pixel, drop and output pixel."""
    telescope = galsim.Airy(lam=1540, diam=2.4, obscuration=0.33, gsparams=settings)
    boxes = [galsim.Pixel(side, gsparams=settings) for side in (0.128, 0.1024, PIXEL_SCALE)]
    return galsim.Convolve([telescope, *boxes], gsparams=settings)


@functools.cache
def psf_image(size):
    """The PSF, and the fraction of its light that the image holds; ((size, size), float)."""
    psf = galsim_psf(galsim.GSParams(folding_threshold=1e-3, maximum_fft_size=16384))
    image = psf.drawImage(nx=size, ny=size, scale=PIXEL_SCALE, method="no_pixel", dtype=float).array
    return image / image.sum(), float(image.sum())


def draw_galaxy(row):
    """Noiseless image, with a border of one pixel from which noise is correlated into the stamp."""
    x, y, flux, r_eff, n, q, theta = row
    settings = galsim.GSParams(
        folding_threshold=1e-3, maxk_threshold=1e-3, kvalue_accuracy=1e-6, maximum_fft_size=16384
    )
    galaxy = galsim.Sersic(n=n, half_light_radius=r_eff * PIXEL_SCALE * np.sqrt(q), flux=flux, gsparams=settings)
    seen = galsim.Convolve([galaxy.shear(q=q, beta=theta * galsim.degrees), galsim_psf(settings)], gsparams=settings)
    offset = (x - CENTRE, y - CENTRE)
    return seen.drawImage(nx=SIZE + 2, ny=SIZE + 2, scale=PIXEL_SCALE, offset=offset, method="no_pixel").array


def autocorrelation(taps):
    """Of white noise through a separable kernel."""
    along = np.convolve(taps, taps)
    return np.outer(along, along) / along[len(taps) - 1] ** 2


def blank_rms():
    """Noise of a blank pixel at which a point source of magnitude `DEPTH` has a signal to noise of 5.

    That of the best measurement of its flux, with the noise's correlation known.
    """
    transfer = 1.0
    for axis in (0, 1):
        k = 2 * np.pi * np.fft.fftfreq(PSF_SIZE)
        along = TAPS[1] + 2 * TAPS[0] * np.cos(k)
        transfer = transfer * (along[:, None] if axis == 0 else along)
    psf, held = psf_image(PSF_SIZE)
    snr_of_unit = np.sqrt((np.abs(np.fft.fft2(psf * held) / transfer) ** 2).mean())  # over unit white noise
    white = 10 ** (-0.4 * (DEPTH - ZERO_POINT)) * snr_of_unit / 5
    return white * (TAPS**2).sum()


def draw_truth(n, seed):
    """Parameters of `n` galaxies, as for `Renderer`: (n, 7)."""
    rng = np.random.default_rng([seed, 0])
    mag, r_eff, index, e = (rng.uniform(*RANGES[name], n) for name in TARGETS)
    x, y = CENTRE + rng.uniform(-0.5, 0.5, (2, n))
    flux = 10 ** (-0.4 * (mag - ZERO_POINT))
    return np.stack([x, y, flux, r_eff, index, 1 - e, rng.uniform(-90, 90, n)], axis=1)


def observe(image, taps, white, rng):
    """A stamp with noise, float32, from an image with a border of one pixel."""
    noise = rng.standard_normal(image.shape) * limits.independent_sigma(image, white, EXPOSURE)
    for axis in (0, 1):
        noise = ndimage.convolve1d(noise, taps, axis)
    return (image + noise)[1:-1, 1:-1].astype(np.float32)


def noises():
    """Kernel and independent noise of the two kinds of noise."""
    rms = blank_rms()
    return {"correlated": (TAPS, rms / (TAPS**2).sum()), "white": (np.array([0.0, 1, 0]), rms)}


def _make_one(row, seed, index):
    image = draw_galaxy(row)
    psf, held = psf_image(PSF_SIZE)
    render = Renderer(psf, SIZE)
    out = {"image": image}
    for which, (kind, (taps, white)) in enumerate(noises().items()):
        rng = np.random.default_rng([seed, 1 + which, index])
        out[kind] = observe(image, taps, white, rng)
        seen = np.concatenate([row[:2], [row[2] * held], row[3:]])
        sigma = limits.independent_sigma(image, white, EXPOSURE)
        out[f"fisher_{kind}"] = limits.fisher_matrix(render, seen, sigma, taps)
    return out


def make_set(n, seed):
    """Truth, stamps with both kinds of noise, and the Fisher matrices of both; a dict of arrays."""
    truth = draw_truth(n, seed)
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        made = list(pool.map(_make_one, truth, [seed] * n, range(n)))
    out = {key: np.array([one[key] for one in made]) for key in made[0]}
    for kind, (taps, white) in noises().items():
        blank = observe(np.zeros((514, 514)), taps, white, np.random.default_rng([seed, 9]))
        threshold = 1.5 * ndimage.gaussian_filter(blank, 2).std()
        out[f"start_{kind}"] = np.array([moments(stamp, threshold) for stamp in out[kind]])
    return {**out, "truth": truth, "seed": np.array(seed), "rms": np.array(blank_rms())}


def moments(stamp, threshold):
    """Parameters to start from, (7,).

    The stamp is smoothed by a Gaussian of 2 pixels; the pixels above `threshold` that hang
    together with the brightest within 8 pixels of the centre (those within 4 pixels of it,
    if it is fainter) give centre, axis ratio and angle by their moments. The flux is that
    of the ellipse of 2.5 first moments of the radius (Kron 1980), the effective radius
    holds half of it, and the index is 2.
    """
    smooth = ndimage.gaussian_filter(stamp.astype(float), 2)
    y, x = np.indices(stamp.shape, float)
    peak = np.argmax(np.where(np.hypot(x - CENTRE, y - CENTRE) < 8, smooth, -np.inf))
    peak_y, peak_x = np.unravel_index(peak, stamp.shape)
    labels, _ = ndimage.label(smooth > threshold)
    segment = labels == labels[peak_y, peak_x]
    if not labels[peak_y, peak_x]:
        segment = np.hypot(x - peak_x, y - peak_y) < 4
    weight = np.where(segment, np.maximum(smooth, 0), 0)
    weight /= weight.sum()
    x_mean, y_mean = (weight * x).sum(), (weight * y).sum()
    dx, dy = x - x_mean, y - y_mean
    xx, yy, xy = (weight * dx * dx).sum(), (weight * dy * dy).sum(), (weight * dx * dy).sum()
    theta = 0.5 * np.arctan2(2 * xy, xx - yy)
    half, difference = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    q = float(np.clip(np.sqrt(max(half - difference, 0) / (half + difference)), 0.15, 0.95))
    radius = np.hypot(dx * np.cos(theta) + dy * np.sin(theta), (dy * np.cos(theta) - dx * np.sin(theta)) / q)
    kron = 2.5 * (weight * radius).sum()
    order = np.argsort(radius, axis=None)
    order = order[radius.ravel()[order] < max(kron, 4)]
    growth = np.cumsum(stamp.ravel()[order].astype(float))
    flux = max(growth[-1], 10 * threshold)
    r_eff = max(1.0, radius.ravel()[order[np.argmax(growth > flux / 2)]])
    return np.array([x_mean, y_mean, flux, r_eff, 2.0, q, np.degrees(theta)])


# --- the bounds ------------------------------------------------------------------------------------------

_OF_TARGETS = [2, 3, 4, 5]
_SKY = 7
_POSITION_AND_ANGLE = np.array([12, 12, 0, 0, 0, 0, 12 / 180**2])
"""Inverse variances of the ranges of x, y and angle, which leave the four targets alone."""


def cramer_rao(fisher, *, sky):
    """Covariances of the four targets, (N, 4, 4), with the sky free or known."""
    kept = np.arange(8 if sky else _SKY)
    return np.linalg.inv(fisher[:, kept[:, None], kept])[:, 2:6, 2:6]


def with_gaussian_prior(fisher):
    """(F + 12 / width^2)^-1 of the four targets, (N, 4, 4), the sky known."""
    prior = _POSITION_AND_ANGLE.copy()
    prior[_OF_TARGETS] = [12 / (high - low) ** 2 for low, high in RANGES.values()]
    return np.linalg.inv(fisher[:, :_SKY, :_SKY] + np.diag(prior))[:, 2:6, 2:6]


# --- the tools -------------------------------------------------------------------------------------------


def targets_of(parameters, held=1.0):
    """mag, R_e, n and e of parameters as `Renderer` has them: (N, 4)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        mag = ZERO_POINT - 2.5 * np.log10(parameters[:, 2] / held)
    return np.stack([mag, parameters[:, 3], parameters[:, 4], 1 - parameters[:, 5]], axis=1)


def python_of(tool, peers_python):
    """The Python that has a tool; None where it is missing."""
    if tool in peers.OURS:
        return sys.executable
    if tool == "source-extractor":
        return sys.executable if peers.source_extractor_program() else None
    if Path(peers_python) == Path(sys.executable):
        return peers_python if importlib.util.find_spec(tool) else None
    found = subprocess.run([peers_python, "-c", f"import {tool}"], capture_output=True, check=False)
    return peers_python if found.returncode == 0 else None


def run(tool, python, task):
    """Fit all stamps of a task in `PROCESSES` processes; a dict of arrays, with the seconds as `wall` and `cpu`."""
    n = len(task["stamps"])
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for k in range(PROCESSES):
            source, target = (Path(folder) / f"{k}_{name}.npz" for name in ("in", "out"))
            np.savez(source, **{key: a[k::PROCESSES] if np.shape(a)[:1] == (n,) else a for key, a in task.items()})
            command = [python, "-W", "ignore", peers.__file__, tool, source, target]
            workers.append((subprocess.Popen(command, env={**os.environ, **one_thread}), target))
        if any(process.wait() for process, _ in workers):
            raise SystemExit(f"{tool} ended with an error; see above.")
        parts = [dict(np.load(target)) for _, target in workers]
    out = {"wall": max(float(part.pop("wall")) for part in parts), "cpu": sum(float(part.pop("cpu")) for part in parts)}
    for key, first in parts[0].items():
        out[key] = np.empty((n, *first.shape[1:]), first.dtype)
        for k, part in enumerate(parts):
            out[key][k::PROCESSES] = part[key]
    return out


def task_of(data, kind, psf):
    """What a tool may know."""
    return {
        "stamps": data[kind],
        "start": data[f"start_{kind}"],
        "rms": data["rms"],
        "gain": np.array(EXPOSURE),
        "correlation": autocorrelation(noises()[kind][0]) if kind == "correlated" else np.ones((1, 1)),
        "psf": psf,
        "ranges": np.array([10 ** (-0.4 * (np.array(RANGES["mag"][::-1]) - ZERO_POINT)), *list(RANGES.values())[1:]]),
    }


# --- scores ----------------------------------------------------------------------------------------------


def scores(values, truth, known, free):
    """Scores of each target; `known` and `free` are the Cramer-Rao sigmas, all (N, 4), NaN where no result."""
    out = {}
    for j, name in enumerate(TARGETS):
        have = np.isfinite(values[:, j])
        t, error = truth[have, j], values[have, j] - truth[have, j]
        around = (t - t.mean()) ** 2
        kept = np.argsort(np.abs(error))[: int(np.floor(0.98 * len(error)))]
        relative = error / t if name in ("R_e", "n") else error
        low, high = np.quantile(relative, [0.16, 0.84])
        out[name] = {
            "n": int(have.sum()),
            "r2": 1 - (error**2).sum() / around.sum(),
            "r2_98": 1 - (error[kept] ** 2).sum() / ((t[kept] - t[kept].mean()) ** 2).sum(),
            "bias": np.median(relative),
            "bias_in_sigma": np.median(error / known[have, j]),
            "scatter": (high - low) / 2,
            "nmad": 1.4826 * np.median(np.abs(relative - np.median(relative))),
            "over_crb_known": np.quantile(np.abs(error) / known[have, j], 0.68),
            "over_crb_free": np.quantile(np.abs(error) / free[have, j], 0.68),
        }
    return out


def coverage(fits, truth, held):
    """Shares of truths within our 68 and 95 % intervals: of each target, and of all."""
    sigma = np.sqrt(np.diagonal(fits["covariance"], axis1=1, axis2=2))[:, 2:6].copy()
    sigma[:, 0] *= 2.5 / np.log(10) / fits["parameters"][:, 2]
    pull = np.abs(targets_of(fits["parameters"], held) - truth) / sigma
    inside = {}
    for name, column in (*zip(TARGETS, pull.T, strict=True), ("pooled", pull.ravel())):
        column = column[np.isfinite(column)]
        inside[name] = [float((column < z).mean()) for z in (0.9945, 1.9600)]
    return inside


def outliers(data, fits, psf, held):
    """Our bright galaxies that are more than 5 sigma off, or did not converge; each fitted again from the truth."""
    truth = targets_of(data["truth"])
    sigma = np.sqrt(np.diagonal(cramer_rao(data["fisher_correlated"], sky=True), axis1=1, axis2=2))
    pull = (targets_of(fits["parameters"], held) - truth) / sigma
    bad = (truth[:, 0] <= 23) & ((np.abs(pull).max(axis=1) > 5) | fits["failed"] | ~np.isfinite(pull).all(axis=1))
    which = np.flatnonzero(bad)
    if not len(which):
        return []
    task = task_of(data, "correlated", psf)
    task["stamps"], task["start"] = task["stamps"][which], data["truth"][which]
    again = peers.sersicnet(task)
    rows = []
    for k, i in enumerate(which):
        rows.append(
            {
                "galaxy": int(i),
                "truth": truth[i].round(3).tolist(),
                "start": targets_of(data["start_correlated"][i : i + 1])[0].round(3).tolist(),
                "fit": targets_of(fits["parameters"][i : i + 1], held)[0].round(3).tolist(),
                "pulls": pull[i].round(1).tolist(),
                "sky_in_rms": float(fits["sky"][i] / data["rms"]),
                "chi2": float(fits["chi2"][i]),
                "status": int(fits["status"][i]),
                "iterations": int(fits["iterations"][i]),
                "from_truth": targets_of(again["parameters"][k : k + 1], held)[0].round(3).tolist(),
                "chi2_from_truth": float(again["chi2"][k]),
                "status_from_truth": int(again["status"][k]),
            }
        )
    return rows


# --- the report ------------------------------------------------------------------------------------------


def print_table(header, rows):
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def print_report(report):
    print(f"# {report['n']} galaxies, blank pixel rms {report['rms']:.5f} electrons/s, seed {report['seed']}\n")
    if report["missing"]:
        print(f"Not found, and left out: {', '.join(report['missing'])}.\n")
    print("## Speed\n")
    ours = report["tools"].get(OURS)
    rows = []
    for name, tool in report["tools"].items():
        row = [name, f"{tool['per_second']:.2f}", f"{tool['cpu_ms']:.0f}", str(tool["failed"])]
        if ours:
            row += [f"{ours['per_second'] / tool['per_second']:.1f}", f"{tool['cpu_ms'] / ours['cpu_ms']:.1f}"]
        rows.append(row)
    header = ["tool", "galaxies/s, 2 processes", "CPU ms a galaxy", "failed"]
    print_table(header + (["ours faster by, wall", "CPU"] if ours else []), rows)
    header = ["", "", "N", "R²", "R² without worst 2 %", "bias", "bias/σ_CR", "scatter", "NMAD"]
    header += ["68 % of errors within, σ_CR (sky known)", "σ_CR (sky free)"]
    for label in BINS:
        print(f"## Accuracy, {label} (bias, scatter and NMAD of R_e and n are relative)\n")
        rows = []
        for target in TARGETS:
            for name, result in {**report["tools"], **report["bounds"]}.items():
                s = result["scores"][label][target]
                row = [f"{s[key]:.4f}" for key in ("r2", "r2_98")] + [f"{s['bias']:+.4f}", f"{s['bias_in_sigma']:+.2f}"]
                row += [f"{s['scatter']:.4f}", f"{s['nmad']:.4f}"]
                row += [f"{s[key]:.2f}" for key in ("over_crb_known", "over_crb_free")]
                rows.append([target, name, str(s["n"]), *row])
        print_table(header, rows)
    for kind, ours in report["ours"].items():
        print(f"## {kind} noise\n")
        print(f"Status counts: {ours['status']}; iterations: median {ours['iterations'][0]:.0f}, ", end="")
        print(f"90 % {ours['iterations'][1]:.0f}, most {ours['iterations'][2]:.0f}.\n")
        rows = []
        for label, inside in ours["coverage"].items():
            rows.append([label] + [f"{low:.3f} / {high:.3f}" for low, high in inside.values()])
        print_table(["truth within 68 % / 95 %", *TARGETS, "pooled"], rows)
    if "outliers" in report:
        print("## Ours: mag <= 23 and more than 5 σ_CR off (sky free), or not converged\n")
        print("mag, R_e, n, e; `from_truth` is the same stamp, fitted from the true parameters.\n")
        fields = ("truth", "start", "fit", "pulls", "sky_in_rms", "chi2", "status", "iterations")
        fields += ("from_truth", "chi2_from_truth", "status_from_truth")
        rows = []
        for one in report["outliers"]:
            texts = (
                " ".join(f"{v:g}" for v in value) if isinstance(value, list) else f"{value:.5g}"
                for value in (one[field] for field in fields)
            )
            rows.append([str(one["galaxy"]), *texts])
        print_table(["galaxy", *fields], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", type=Path, required=True, help="file of the galaxies; made where there is none")
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--peers-python", default=sys.executable, help="a Python that has pyimfit and petrofit")
    parser.add_argument("--peers-psf", type=int, default=65, help="pixels a side of the PSF that peers get")
    parser.add_argument("--first", type=int, help="look at the first galaxies of the set only")
    parser.add_argument("--only", nargs="*", choices=peers.TOOLS, default=list(peers.TOOLS))
    parser.add_argument("--json", type=Path, help="file for all numbers")
    options = parser.parse_args()

    if not options.set.exists():
        np.savez(options.set, **make_set(options.n, options.seed))
    data = dict(np.load(options.set))
    if (len(data["truth"]), int(data["seed"])) != (options.n, options.seed):
        raise SystemExit(
            f"{options.set} holds {len(data['truth'])} galaxies of seed {data['seed']}; give another file."
        )
    data = {key: value[: options.first] if np.ndim(value) else value for key, value in data.items()}
    truth, fisher = targets_of(data["truth"]), data["fisher_correlated"]
    known, free = (np.sqrt(np.diagonal(cramer_rao(fisher, sky=sky), axis1=1, axis2=2)) for sky in (False, True))

    def scores_of(values, repeats=1):
        t, k, f = (np.tile(a, (repeats, 1)) for a in (truth, known, free))
        within = {label: (t[:, 0] > low) & (t[:, 0] <= high) for label, (low, high) in BINS.items()}
        return {label: scores(values[use], t[use], k[use], f[use]) for label, use in within.items()}

    report = {
        "n": len(truth),
        "seed": options.seed,
        "rms": float(data["rms"]),
        "missing": [],
        "tools": {},
        "bounds": {},
    }
    our_fits = {}
    for tool in options.only:
        python = python_of(tool, options.peers_python)
        if python is None:
            report["missing"].append(tool)
            continue
        psf, held = psf_image(PSF_SIZE if tool in peers.OURS else options.peers_psf)
        print(f"{tool} ...", file=sys.stderr)
        fits = run(tool, python, task_of(data, "correlated", psf))
        report["tools"][tool] = {
            "per_second": len(truth) / fits["wall"],
            "cpu_ms": 1e3 * fits["cpu"] / len(truth),
            "failed": int(fits["failed"].sum()),
            "scores": scores_of(targets_of(fits["parameters"], held)),
            "values": targets_of(fits["parameters"], held).tolist(),
        }
        if tool in peers.OURS:
            white = run(tool, python, task_of(data, "white", psf))
            our_fits[f"{tool}: correlated"], our_fits[f"{tool}: white"] = fits, white
        if tool == OURS:
            report["outliers"] = outliers(data, fits, psf, held)

    rng = np.random.default_rng([options.seed, 10])
    covariances = {
        "Cramer-Rao, sky free": cramer_rao(fisher, sky=True),
        "Cramer-Rao, sky known": cramer_rao(fisher, sky=False),
        "(F + 12/width²)⁻¹": with_gaussian_prior(fisher),
    }
    drawn = {
        name: truth + np.einsum("nij,knj->kni", np.linalg.cholesky(c), rng.standard_normal((DRAWS, *truth.shape)))
        for name, c in covariances.items()
    }
    ends = np.array(list(RANGES.values()), float)
    drawn["with the prior"] = limits.posterior_means(
        truth, limits.covariance(fisher, 0), ends[:, 0], ends[:, 1], None, DRAWS, rng, samples=4000
    )
    report["bounds"] = {name: {"scores": scores_of(v.reshape(-1, 4), DRAWS)} for name, v in drawn.items()}

    report["ours"] = {}
    for kind, fits in our_fits.items():
        held = psf_image(PSF_SIZE)[1]
        status, counts = np.unique(fits["status"], return_counts=True)
        report["ours"][kind] = {
            "status": dict(zip(status.tolist(), counts.tolist(), strict=True)),
            "iterations": np.quantile(fits["iterations"], [0.5, 0.9, 1]).tolist(),
            "coverage": {},
        }
        for label, (low, high) in BINS.items():
            use = (truth[:, 0] > low) & (truth[:, 0] <= high)
            part = {key: value[use] for key, value in fits.items() if np.shape(value)[:1] == (len(use),)}
            report["ours"][kind]["coverage"][label] = coverage(part, truth[use], held)
    print_report(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1, default=float))


if __name__ == "__main__":
    main()
