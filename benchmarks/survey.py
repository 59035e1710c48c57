"""Mosaics as surveys have them: how long they take, in how much memory, and what comes out.

``python benchmarks/survey.py --work FOLDER [--sizes 5000 10000 20000] [--stages 5000] [--peers]
[--peers-python PYTHON] [--json FILE]``

Prints Markdown. The mosaics are those of ``sersicnet simulate --mosaic``, with 64 galaxies a
million pixels; they stay in FOLDER, as plain float32, and are taken from there the next time.

- ``--sizes``: `sersicnet measure` on mosaics of so many pixels a side. The time is that of the
  whole command, its start included. The memory is the largest sum of the proportional set
  sizes (PSS) of all its processes: what they share counts once, and so do pages of files that
  they map. It is looked at five times a second. `growth` is how the time grows with the area
  from one row to the next: 1 is linear.
- ``--stages``: where the CPU time goes in a mosaic of that size. One worker, one thread; what a
  stage calls of another one counts there.
- ``--peers``: completeness, purity, accuracy and speed beside source-extractor with its SPHEROID
  model, and pyimfit on our detections, on one mosaic of ``--peers-size`` pixels a side.
  source-extractor has no threads for its models in most packages: it works on two halves of the
  mosaic in two processes, as pyimfit works on two halves of the galaxies. The PSF is known to
  all; the peers get ``--peers-psf`` pixels a side of it, and their fluxes are divided by the
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
import tempfile
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
RANGES = ((18, 23), (23, 24), (24, 25))
"""Magnitudes in which accuracies are told."""


# --- mosaics ---------------------------------------------------------------------------------------------


def mosaic_of(side, work, seed):
    """A simulated mosaic and its truth, made where they are missing; a path and a table."""
    from sersicnet import mosaic, simulate

    path = work / f"mosaic-{side}-{seed}.fits"
    packed = work / f"packed-{side}-{seed}.fits"
    truth = work / f"packed-{side}-{seed}_truth.ecsv"
    if not path.exists():
        if not packed.exists():
            simulate.simulate_field(packed, simulate.Field(side, round(DENSITY * side**2), seed), overwrite=True)
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


class Memory(threading.Thread):
    """Looks at the memory of a process and all below it until it has ended."""

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.pid, self.peak, self.peak_rss, self.processes = pid, 0, 0, 0

    def run(self):
        while True:
            pids = family(self.pid)
            pss, rss = (sum(values) for values in zip(*map(memory_of, pids), strict=True)) if pids else (0, 0)
            if not pss:
                return
            self.peak, self.peak_rss = max(self.peak, pss), max(self.peak_rss, rss)
            self.processes = max(self.processes, len(pids))
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


def children_seconds():
    """CPU time of the processes that were started and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def timed(command, **options):
    """Run a command; wall and CPU seconds, and the `Memory` of it."""
    cpu, wall = children_seconds(), time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], **options)
    memory = Memory(process.pid)
    memory.start()
    if process.wait():
        raise SystemExit(f"{command[0]} ended with an error; see above.")
    wall = time.perf_counter() - wall
    memory.join()
    return {
        "wall": wall,
        "cpu": children_seconds() - cpu,
        "pss": memory.peak,
        "rss": memory.peak_rss,
        "processes": memory.processes,
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
    """CPU seconds of the stages of `sersicnet.measure.measure`, each without those that it calls; a dict."""
    from sersicnet import catalogue, detect, domain, mosaic, points, weights
    from sersicnet import measure as verb

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

    watch(mosaic.Exposure, "read", "reading")
    watch(detect.Detector, "mesh", "background and noise")
    watch(detect.Detector, "around", "detection")
    watch(detect.Detector, "_deblended", "deblending")
    watch(detect.Detector, "_prominent", "deblending")
    watch(detect.Detections, "claimed", "stamps")
    watch(mosaic, "cut", "stamps")
    watch(weights.Weights, "predict", "network")
    watch(points, "sizes", "sizes and point sources")
    watch(points, "saturated", "sizes and point sources")
    watch(domain, "profiles", "sizes and point sources")
    watch(catalogue, "write", "writing")
    weights.use_one_thread()
    verb.measure(path, output, workers=1, overwrite=True)
    switch()
    return spent


def stages_alone(path, output):
    """`stages` in a process of its own."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    with get_context("spawn").Pool(1) as pool:
        found = pool.apply(stages, (path, output))
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    return found


def print_stages(side, spent):
    total = sum(spent.values())
    print(
        f"\nCPU time of {side} x {side} pixels, one thread: {total:.1f} s, {1e6 * total / side**2:.2f} s a million.\n"
    )
    print("| stage | s | % |\n|---|---|---|")
    for stage, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"| {stage} | {seconds:.1f} | {100 * seconds / total:.1f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the mosaics")
    parser.add_argument("--sizes", type=int, nargs="*", default=[], help="pixels a side")
    parser.add_argument("--stages", type=int, help="pixels a side")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--peers-size", type=int, default=3000)
    parser.add_argument("--peers-python", default=sys.executable, help="a Python that has pyimfit")
    parser.add_argument("--peers-psf", type=int, default=65)
    parser.add_argument("--peers-limit", type=float, default=25.0)
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
    if options.peers:
        report["peers"] = compare(options)
        print_peers(report["peers"])
    if options.json:
        options.json.write_text(json.dumps(report, indent=1, default=float))


if __name__ == "__main__":
    main()
