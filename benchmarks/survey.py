"""Mosaics as surveys have them: how long they take, in how much memory, and what comes out.

``python benchmarks/survey.py --work FOLDER [--sizes 5000 10000 20000] [--stages 5000] [--speed 5000]
[--peers] [--peers-size 6400] [--peers-slope 0.26] [--peers-python PYTHON] [--json FILE]``

Prints Markdown. The mosaics are those of ``sersicnet simulate --mosaic``, with 64 galaxies a
million pixels; they stay in FOLDER, as plain float32, and are taken from there the next time.

- ``--sizes``: `sersicnet measure` on mosaics of so many pixels a side. The time is that of the
  whole command, its start included. The memory is the largest sum of the proportional set
  sizes (PSS) of all its processes: what they share counts once, and so do pages of files that
  they map. It is looked at five times a second. `growth` is how the time grows with the area
  from one row to the next: 1 is linear.
- ``--stages``: where the CPU time goes in a mosaic of that size. One worker, one thread; what a
  stage calls of another one counts there.
- ``--speed``: `sersicnet measure`, without and with ``--refine``, and source-extractor, on a mosaic
  of that size, where the start of a command counts for little.
- ``--peers``: completeness, purity, accuracy and speed beside source-extractor with its SPHEROID
  model, and pyimfit on our detections, on one mosaic of ``--peers-size`` pixels a side. One of
  3200 has 35 galaxies down to mag 23, of which one can decide who is better. 6400, and
  ``--peers-slope 0.26`` for as many bright ones as there are on the sky, make about 400.
  Galaxies are also compared one by one: for how many ``--refine`` is nearer to the truth, and
  its scatter as a fraction of the other's, with the limits of 95 % of the bootstrap.
  source-extractor has no threads for its models in most packages: it works on two halves of the
  mosaic in two processes, as pyimfit works on two halves of the galaxies. The PSF is known to
  all, and source-extractor takes its background in boxes of ``--peers-background`` pixels: 64 are
  its default, and 128 are better for bright galaxies and worse for faint ones.
  The peers get ``--peers-psf`` pixels a side of it, and their fluxes are divided by the
  light that these hold. pyimfit gets stamps of 128 pixels, minus our sky, with our mask of
  neighbours, and starts from the moments of our detections; it does those that we find brighter
  than ``--peers-limit``.

A source is matched with a galaxy when each is the other's nearest and they are within 5 pixels.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import peers
from astropy.io import fits
from astropy.table import Table
from scipy.spatial import KDTree

DENSITY = 64e-6
"""Simulated galaxies a pixel."""

MATCHED = 5.0
"""Most pixels between a source and its galaxy."""

PROCESSES = 2
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
TARGETS = {"mag": "mag", "r_eff_pix": "R_e", "sersic_n": "n", "ellipticity": "e"}
RANGES = ((18, 20), (20, 22), (22, 23), (23, 24), (24, 25))
"""Magnitudes in which accuracies are told."""

COMPARED = "sersicnet --refine"
"""The tool that others are compared with galaxy by galaxy."""

RESAMPLED = 1000
"""Samples of a bootstrap."""


# --- mosaics ---------------------------------------------------------------------------------------------


def mosaic_of(side, work, seed, slope=None):
    """A simulated mosaic and its truth, made where they are missing; a path and a table."""
    from sersicnet.image import mosaic
    from sersicnet.simulating.field import Field, simulate_field

    name = f"{side}-{seed}" if slope is None else f"{side}-{seed}-slope{round(100 * slope)}"
    path = work / f"mosaic-{name}.fits"
    packed = work / f"packed-{name}.fits"
    truth = work / f"packed-{name}_truth.ecsv"
    if not path.exists():
        if not packed.exists():
            counts = {} if slope is None else {"counts_slope": slope}
            field = Field(side, round(DENSITY * side**2), seed, **counts)
            simulate_field(packed, field, overwrite=True)
        image = mosaic.read_image(packed)
        header = fits.Header({"SIMPLE": True, "BITPIX": -32, "NAXIS": 2, "NAXIS1": side, "NAXIS2": side})
        header.extend(image.header.copy(strip=True), unique=True)
        partial = work / "partial.fits"
        partial.unlink(missing_ok=True)
        stream = fits.StreamingHDU(partial, header)
        for first in range(0, side, 256):
            stream.write(image.read((slice(first, min(first + 256, side)), slice(0, side))).astype(">f4"))
        stream.close()
        partial.replace(path)
    return path, Table.read(truth)


# --- time and memory -------------------------------------------------------------------------------------


class Watch(threading.Thread):
    """Looks at the memory and the CPU time of a process and all below it until it has ended."""

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.pid, self.peak, self.peak_rss, self.processes, self._cpu = pid, 0, 0, 0, {}

    @property
    def cpu(self):
        """Seconds of all of them, each as long as it was seen."""
        return sum(self._cpu.values())

    def run(self):
        while True:
            pids = family(self.pid)
            pss, rss = (sum(values) for values in zip(*map(memory_of, pids), strict=True)) if pids else (0, 0)
            if not pss:
                return
            self.peak, self.peak_rss = max(self.peak, pss), max(self.peak_rss, rss)
            self.processes = max(self.processes, len(pids))
            self._cpu.update((pid, seconds) for pid in pids if (seconds := cpu_of(pid)) is not None)
            time.sleep(0.2)


def family(pid):
    """A process and all below it."""
    try:
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(p for child in below for p in family(int(child)))]


def memory_of(pid):
    """Proportional and resident set size of a process, bytes."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0, 0
    sizes = {line.split()[0]: 1024 * int(line.split()[1]) for line in lines}
    return sizes.get("Pss:", 0), sizes.get("Rss:", 0)


def cpu_of(pid):
    """CPU seconds of a process so far; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children_seconds():
    """CPU time of the processes that were started by this one and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def timed(command, **options):
    """Run a command; wall and CPU seconds, and what its `Watch` saw."""
    wall = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], **options)
    watch = Watch(process.pid)
    watch.start()
    if process.wait():
        raise SystemExit(f"{command[0]} ended with an error; see above.")
    wall = time.perf_counter() - wall
    watch.join()
    return {
        "wall": wall,
        "cpu": watch.cpu,
        "pss": watch.peak,
        "rss": watch.peak_rss,
        "processes": watch.processes,
    }


def measure(path, output, *options):
    """`sersicnet measure`, as a user calls it; what `timed` gives, and the number of rows."""
    code = "import sys; from sersicnet.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "measure", path, "-o", output, "--overwrite", "--quiet", *options]
    return {**timed(command), "rows": len(Table.read(output))}


def print_sizes(rows):
    print("\n| side | file | sources | wall | sources/s | CPU s | growth | memory, PSS | memory, RSS | processes |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    last = None
    for row in rows:
        growth = "" if last is None else f"{row['wall'] / last['wall'] / (row['side'] / last['side']) ** 2:.2f}"
        print(
            f"| {row['side']} | {row['bytes'] / 1e9:.2f} GB | {row['rows']} | {row['wall']:.1f} s "
            f"| {row['rows'] / row['wall']:.0f} | {row['cpu']:.0f} | {growth} | {row['pss'] / 1e9:.2f} GB "
            f"| {row['rss'] / 1e9:.2f} GB | {row['processes']} |"
        )
        last = row


# --- stages ----------------------------------------------------------------------------------------------


def stages(path, output):
    """CPU seconds of the stages of `sersicnet.measuring.measure.measure`, each without those that it calls; a dict."""
    from sersicnet import session, weights
    from sersicnet.catalogue import table as catalogue
    from sersicnet.image import detect
    from sersicnet.image import stars as points
    from sersicnet.image.deblend import Deblending
    from sersicnet.image.exposure import Exposure
    from sersicnet.measuring import measure as verb
    from sersicnet.measuring import plan, tiles
    from sersicnet.measuring.outputs import Outputs

    spent, running = {"other": 0.0}, ["other"]
    last = time.process_time()

    def switch():
        nonlocal last
        now = time.process_time()
        spent[running[-1]] += now - last
        last = now

    def watch(owner, name, stage):
        original = getattr(owner, name)
        spent.setdefault(stage, 0.0)

        def watched(*arguments, **options):
            switch()
            running.append(stage)
            try:
                return original(*arguments, **options)
            finally:
                switch()
                running.pop()

        setattr(owner, name, watched)

    watch(Exposure, "read", "reading")
    watch(plan, "estimate_sky", "background and noise")
    watch(detect.Detector, "around", "detection")
    watch(Deblending, "separate", "deblending")
    watch(detect.Detections, "photometry", "light in apertures")
    watch(detect.Detections, "dilated", "stamps")
    watch(tiles, "cut", "stamps")
    watch(weights.Weights, "predict", "network")
    watch(points, "sizes", "sizes and point sources")
    watch(points, "saturated", "sizes and point sources")
    watch(points, "profiles", "sizes and point sources")
    watch(catalogue, "write", "writing")
    session.use_one_thread()
    verb.measure(path, outputs=Outputs(catalogue=output, overwrite=True))
    switch()
    return spent


def stages_alone(path, output):
    """`stages` in a process of its own."""
    from sersicnet import workers as work

    with work._environment(), get_context("spawn").Pool(1) as pool:  # as workers of `measure`
        return pool.apply(stages, (path, output))


def print_stages(side, spent):
    total = sum(spent.values())
    print(
        f"\nCPU time of {side} x {side} pixels, one thread: {total:.1f} s, {1e6 * total / side**2:.2f} s a million.\n"
    )
    print("| stage | s | % |\n|---|---|---|")
    for stage, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"| {stage} | {seconds:.1f} | {100 * seconds / total:.1f} |")


# --- other tools -----------------------------------------------------------------------------------------


def known_psf(size):
    """The middle of the simulations' PSF, of unit sum, and the fraction of its light."""
    from sersicnet.simulating.telescopes import F160W, effective_psf

    whole = effective_psf(F160W)
    cut = (len(whole) - size) // 2
    part = whole[cut : len(whole) - cut, cut : len(whole) - cut]
    return part / part.sum(), float(part.sum())


def what_peers_know(options):
    """PSF, the fraction of light that it holds, zero point and gain."""
    from sersicnet.simulating.telescopes import F160W

    gain = F160W.exposure * F160W.autocorrelation().sum()  # of a pixel: drizzling averages noise
    return *known_psf(options.peers_psf), F160W.zero_point, gain


def ours(path, output, *options):
    """Our catalogue as columns of `compare`, and what it took."""
    took = measure(path, output, *options)
    table = Table.read(output)
    return {name: np.asarray(table[name], float) for name in ("x", "y", *TARGETS)}, took


def source_extractor(path, work, psf, held, zero_point, gain, background=64):
    """Its detections with the SPHEROID model, from two halves of the mosaic that overlap by 128 pixels."""
    data = fits.getdata(path)
    names = ["X_IMAGE", "Y_IMAGE", "MAG_SPHEROID", "SPHEROID_REFF_IMAGE", "SPHEROID_SERSICN", "SPHEROID_ASPECT_IMAGE"]
    smoothing = np.exp(-4 * np.log(2) * np.hypot(*np.mgrid[-3:4, -3:4]) ** 2 / 3.0**2)
    lines = "\n".join(" ".join(f"{value:.6f}" for value in row) for row in smoothing)
    (work / "smoothing.conv").write_text(f"CONV NORM\n{lines}\n")
    (work / "columns.param").write_text("\n".join(names) + "\n")
    peers.psfex_file(psf, 1).writeto(work / "image.psf", overwrite=True)
    half, margin = len(data) // 2, 64
    starts, commands = [], []
    for k, rows in enumerate((slice(0, half + margin), slice(half - margin, len(data)))):
        fits.writeto(work / f"half{k}.fits", data[rows], overwrite=True)
        settings = {
            "CATALOG_NAME": f"half{k}.cat",
            "CATALOG_TYPE": "ASCII",
            "PARAMETERS_NAME": "columns.param",
            "FILTER_NAME": "smoothing.conv",
            "DETECT_MINAREA": 15,
            "DETECT_THRESH": 1.5,
            "ANALYSIS_THRESH": 1.5,
            "BACK_SIZE": background,
            "GAIN": gain,
            "GAIN_KEY": "NONE",
            "SATUR_LEVEL": 1e9,
            "SATUR_KEY": "NONE",
            "MAG_ZEROPOINT": zero_point,
            "PIXEL_SCALE": 1,
            "PSF_NAME": "image.psf",
            "NTHREADS": 1,
            "VERBOSE_TYPE": "QUIET",
        }
        (work / f"half{k}.sex").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
        program = peers.source_extractor_program()
        commands.append([program, f"half{k}.fits", "-c", f"half{k}.sex"])
        starts.append(rows.start)
    took = together(commands, cwd=work)
    parts = []
    for k, start in enumerate(starts):
        found = np.loadtxt(work / f"half{k}.cat", ndmin=2)
        took["rows"] = took.get("rows", 0) + len(found)  # those in both halves are measured twice
        found[:, 1] += start
        parts.append(found[(found[:, 1] - 1 < half) == (k == 0)])
    x, y, mag, r_eff, n, aspect = np.concatenate(parts).T
    mag = np.where(mag < 90, mag + 2.5 * np.log10(held), np.nan)
    table = {"x": x - 1, "y": y - 1, "mag": mag, "r_eff_pix": r_eff, "sersic_n": n, "ellipticity": 1 - aspect}
    return table, took


def pyimfit(path, work, psf, held, zero_point, gain, known, limit, python):
    """Its fits of our detections that are brighter than a magnitude of ours."""
    from sersicnet.image import detect, mosaic
    from sersicnet.image.stamps import cut

    image = mosaic.read_image(path)
    bad = image.without_data()
    sky, found = detect.Detector()(image.data, bad)
    distance, row = KDTree(np.column_stack([known["x"], known["y"]])).query(np.column_stack([found.x, found.y]))
    bright = np.flatnonzero((distance < 0.01) & (known["mag"][row] < limit))
    stamps = cut(image.data, bad, sky, found.x[bright], found.y[bright], found.dilated(), bright + 1)
    q = np.clip(found.b / found.a, 0.15, 0.95)[bright]
    radius = np.maximum(1.2 * found.a[bright], 1)
    theta, index = found.theta[bright], np.full(len(bright), 2.0)
    task = {
        "stamps": stamps.pixels * stamps.rms[:, None, None].astype(np.float32),
        "masks": stamps.replaced,
        "start": np.column_stack([stamps.x, stamps.y, 1.2 * found.flux[bright], radius, index, q, theta]),
        "rms": np.median(stamps.rms),
        "gain": np.array(gain),
        "correlation": np.ones((1, 1)),
        "psf": psf,
    }
    commands = []
    for k in range(PROCESSES):
        names = [work / f"pyimfit{k}_{name}.npz" for name in ("in", "out")]
        part = {key: a[k::PROCESSES] if np.shape(a)[:1] == (len(bright),) else a for key, a in task.items()}
        np.savez(names[0], **part)
        commands.append([python, "-W", "ignore", peers.__file__, "pyimfit", *names])
    together(commands)
    parameters = np.empty((len(bright), 7))
    took = {"rows": len(bright), "wall": 0.0, "cpu": 0.0}
    for k in range(PROCESSES):
        out = np.load(work / f"pyimfit{k}_out.npz")
        parameters[k::PROCESSES] = out["parameters"].reshape(-1, 7)
        took["wall"] = max(took["wall"], float(out["wall"]))  # without its start, and without ours
        took["cpu"] += float(out["cpu"])
    _, _, flux, r_eff, n, q, _ = parameters.T
    with np.errstate(invalid="ignore", divide="ignore"):
        mag = zero_point - 2.5 * np.log10(flux / held)
    table = {"x": found.x[bright], "y": found.y[bright], "mag": mag, "r_eff_pix": r_eff, "sersic_n": n}
    return {**table, "ellipticity": 1 - q}, took


def together(commands, **options):
    """Run commands at the same time, each with one thread; wall and CPU seconds."""
    cpu, wall = children_seconds(), time.perf_counter()
    running = [
        subprocess.Popen([str(part) for part in command], env={**os.environ, **ONE_THREAD}, **options)
        for command in commands
    ]
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit(f"{commands[0][0]} ended with an error; see above.")
    return {"wall": time.perf_counter() - wall, "cpu": children_seconds() - cpu}


def matches(table, truth):
    """For each galaxy, the row of its source, -1 for none: the other's nearest, both ways, within `MATCHED`."""
    sources, galaxies = (np.column_stack([t["x"], t["y"]]) for t in (table, truth))
    distance, row = KDTree(sources).query(galaxies)
    back = KDTree(galaxies).query(sources)[1]
    return np.where((distance < MATCHED) & (back[row] == np.arange(len(galaxies))), row, -1)


def compare(options):
    """Speed, completeness, purity and accuracy of all tools; a dict."""
    work = options.work
    path, truth = mosaic_of(options.peers_size, work, options.seed, options.peers_slope)
    truth = {name: np.asarray(truth[name], float) for name in ("x", "y", *TARGETS)}
    given = what_peers_know(options)
    tables, took = {}, {}
    tables["sersicnet"], took["sersicnet"] = ours(path, work / "ours.fits")
    tables["sersicnet --refine"], took["sersicnet --refine"] = ours(path, work / "refined.fits", "--refine")
    if peers.source_extractor_program():
        found = source_extractor(path, work, *given, options.peers_background)
        tables["source-extractor"], took["source-extractor"] = found
    if subprocess.run([options.peers_python, "-c", "import pyimfit"], capture_output=True, check=False).returncode == 0:
        known, limit = tables["sersicnet"], options.peers_limit
        found = pyimfit(path, work, *given, known, limit, options.peers_python)
        tables["pyimfit"], took["pyimfit"] = found
    rows = {tool: matches(table, truth) for tool, table in tables.items()}
    edges = np.arange(18, 26.01, 0.5)
    report = {"tools": {}, "galaxies": len(truth["mag"]), "limit": options.peers_limit, "edges": edges.tolist()}
    values = {}
    for tool, table in tables.items():
        values[tool] = {name: np.where(rows[tool] >= 0, table[name][rows[tool]], np.nan) for name in TARGETS}
    chosen = {}  # the galaxies of a range of magnitudes that all tools have which did that range
    for low, high in RANGES:
        those = [tool for tool in tables if tool != "pyimfit" or high <= options.peers_limit]
        have = np.all([np.isfinite(column) for tool in those for column in values[tool].values()], axis=0)
        chosen[f"{low}-{high}"] = those, have & (truth["mag"] >= low) & (truth["mag"] < high)
    for tool, table in tables.items():
        measured = [(part, have) for part, (those, have) in chosen.items() if tool in those]
        real = np.isin(np.arange(len(table["mag"])), rows[tool])
        report["tools"][tool] = {
            **took[tool],
            "completeness": share(truth["mag"], rows[tool] >= 0, edges),
            "purity": share(table["mag"], real, edges),
            "accuracy": {part: accuracy(values[tool], truth, have) for part, have in measured},
            "paired": {part: paired(values[COMPARED], values[tool], truth, have) for part, have in measured},
        }
    return report


def share(mag, good, edges):
    """Fraction of those in bins of magnitude that are good; NaN for empty bins."""
    total, those = (np.histogram(part, edges)[0] for part in (mag, mag[good]))
    return [float(a / b) if b else float("nan") for a, b in zip(those, total, strict=True)]


def errors(values, truth, chosen, name):
    """Measured minus true; of R_e and n relative to what is true."""
    error = (values[name] - truth[name])[chosen]
    return error / truth[name][chosen] if name in ("r_eff_pix", "sersic_n") else error


def scatter(error):
    """Half of the range from 16 to 84 %, along the last axis."""
    low, high = np.quantile(error, [0.16, 0.84], axis=-1) if error.shape[-1] else (np.nan, np.nan)
    return (high - low) / 2


def r_squared(error, truth):
    """1 minus the squares of errors over those of the truth about its mean; NaN where that has one value or none."""
    spread = np.square(truth - truth.mean()).sum() if len(truth) else 0.0
    return 1 - np.square(error).sum() / spread if spread else np.nan


def accuracy(values, truth, chosen):
    """R2, R2 without the worst 2 %, bias and `scatter` of the `errors`."""
    out = {"n": int(chosen.sum())}
    for name in TARGETS:
        t, error = truth[name][chosen], (values[name] - truth[name])[chosen]
        best = np.argsort(np.abs(error))[: int(0.98 * len(error))]
        relative = errors(values, truth, chosen, name)
        out[name] = {
            "r2": r_squared(error, t),
            "r2_98": r_squared(error[best], t[best]),
            "bias": np.median(relative) if len(relative) else np.nan,
            "scatter": scatter(relative),
        }
    return out


def paired(first, second, truth, chosen):
    """In how many galaxies the first is nearer to the truth, and its scatter over the second's with 95 % limits."""
    out = {}
    for name in TARGETS:
        ours, theirs = (errors(values, truth, chosen, name) for values in (first, second))
        n = len(ours)
        again = np.random.default_rng(0).integers(0, max(n, 1), (RESAMPLED, n))
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio, ratios = (scatter(a) / scatter(b) for a, b in ((ours, theirs), (ours[again], theirs[again])))
        out[name] = {
            "nearer": int((np.abs(ours) < np.abs(theirs)).sum()),
            "ratio": ratio,
            "limits": np.nanquantile(ratios, [0.025, 0.975]).tolist() if n else [np.nan] * 2,
        }
    return out


def print_speed(tools):
    first = tools["sersicnet"]
    print("\n| tool | sources | wall | sources/s | CPU ms a source | time a source over ours, wall | CPU |")
    print("|---|---|---|---|---|---|---|")
    for tool, row in tools.items():
        wall, cpu = ((row[kind] / row["rows"]) / (first[kind] / first["rows"]) for kind in ("wall", "cpu"))
        print(
            f"| {tool} | {row['rows']} | {row['wall']:.1f} s | {row['rows'] / row['wall']:.1f} "
            f"| {1e3 * row['cpu'] / row['rows']:.1f} | {wall:.2f} | {cpu:.2f} |"
        )


def print_peers(report):
    tools = report["tools"]
    first = tools["sersicnet"]
    print_speed(tools)
    whole = [tool for tool in tools if tool != "pyimfit"]  # which does not look for sources itself
    print("\nCompleteness / purity, by true / measured magnitude:\n")
    print("| mag | " + " | ".join(whole) + " |\n|---|" + "---|" * len(whole))
    for k, (low, high) in enumerate(zip(report["edges"], report["edges"][1:], strict=False)):
        cells = [f"{tools[tool]['completeness'][k]:.2f} / {tools[tool]['purity'][k]:.2f}" for tool in whole]
        print(f"| {low}-{high} | " + " | ".join(cells) + " |")
    for part, found in first["accuracy"].items():
        print(f"\nmag {part}, {found['n']} galaxies that all have: R2 / R2 without the worst 2 % / scatter (bias)\n")
        print("| tool | " + " | ".join(TARGETS.values()) + " |\n|---|" + "---|" * len(TARGETS))
        for tool, row in tools.items():
            if part not in row["accuracy"]:
                continue
            cells = [
                f"{s['r2']:.3f} / {s['r2_98']:.3f} / {s['scatter']:.3f} ({s['bias']:+.3f})"
                for s in (row["accuracy"][part][name] for name in TARGETS)
            ]
            print(f"| {tool} | " + " | ".join(cells) + " |")
        print(f"\n{COMPARED} nearer to the truth; its scatter over the other's (95 % of the bootstrap)\n")
        print("| beside | " + " | ".join(TARGETS.values()) + " |\n|---|" + "---|" * len(TARGETS))
        for tool, row in tools.items():
            if part not in row["paired"] or tool == COMPARED:
                continue
            pairs = (row["paired"][part][name] for name in TARGETS)
            cells = [f"{p['nearer']}; {p['ratio']:.2f} ({p['limits'][0]:.2f} to {p['limits'][1]:.2f})" for p in pairs]
            print(f"| {tool} | " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the mosaics")
    parser.add_argument("--sizes", type=int, nargs="*", default=[], help="pixels a side")
    parser.add_argument("--stages", type=int, help="pixels a side")
    parser.add_argument("--speed", type=int, help="pixels a side")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--peers-size", type=int, default=3200)
    parser.add_argument("--peers-python", default=sys.executable, help="a Python that has pyimfit")
    parser.add_argument("--peers-psf", type=int, default=65)
    parser.add_argument("--peers-slope", type=float, help="of the counts of galaxies; the sky's is 0.26")
    parser.add_argument("--peers-background", type=int, default=64, help="BACK_SIZE of source-extractor, pixels")
    parser.add_argument("--peers-limit", type=float, default=23.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for all numbers")
    options = parser.parse_args()
    options.work.mkdir(exist_ok=True)
    report = {}
    if options.sizes:
        report["sizes"] = []
        for side in options.sizes:
            path, _ = mosaic_of(side, options.work, options.seed)
            found = measure(path, options.work / f"catalogue-{side}.fits")
            report["sizes"].append({"side": side, "bytes": path.stat().st_size, **found})
        print_sizes(report["sizes"])
    if options.stages:
        path, _ = mosaic_of(options.stages, options.work, options.seed)
        report["stages"] = stages_alone(path, options.work / f"stages-{options.stages}.fits")
        print_stages(options.stages, report["stages"])
    if options.speed:
        path, _ = mosaic_of(options.speed, options.work, options.seed)
        report["speed"] = {}
        for tool, more in (("sersicnet", []), ("sersicnet --refine", ["--refine"])):
            report["speed"][tool] = measure(path, options.work / "speed.fits", *more)
        if peers.source_extractor_program():
            report["speed"]["source-extractor"] = source_extractor(path, options.work, *what_peers_know(options))[1]
        print(f"\n{options.speed} x {options.speed} pixels:")
        print_speed(report["speed"])
    if options.peers:
        report["peers"] = compare(options)
        print_peers(report["peers"])
    if options.json:
        options.json.write_text(json.dumps(report, indent=1, default=float))


if __name__ == "__main__":
    main()
