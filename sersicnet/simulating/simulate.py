"""Write a training set of simulated galaxies; the file does not depend on the number of workers."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import scipy

import sersicnet
from sersicnet import dataset, journal
from sersicnet.errors import InputError
from sersicnet.output import check_output, check_space
from sersicnet.simulating import world
from sersicnet.simulating.recipe import Simulation
from sersicnet.simulating.stamps import draw_stamps
from sersicnet.workers import check_main, pools

KINDS = {
    "sersic": "single Sersic galaxies",
    "real-like": "real-like galaxies",
    "both": "single Sersic and real-like galaxies",
}


def _block(first: int) -> journal.Block:
    simulation = _work[0]
    indices = np.arange(first, min(first + dataset.BLOCK, simulation.n))
    if not simulation.telescopes:
        return journal.pack(first, *draw_stamps(simulation, indices))
    number = first // dataset.BLOCK
    piece = world.piece(simulation.telescopes, simulation.seed, number)
    images, truth = draw_stamps(piece.of(simulation), indices)
    # A single profile without neighbours needs no fit and replaces no pixel.
    truth = {name: truth.get(name, np.zeros(len(indices))) for name in simulation.columns}
    for name, value in (("psf", number), ("fwhm", piece.fwhm), ("correlation", piece.correlation)):
        truth[name] = np.full(len(indices), float(value))
    truth["electrons"] = np.full(len(indices), piece.electrons)
    return journal.pack(first, images, truth, piece.views)


_work: list[Simulation] = []
"""The simulation of a worker process; it holds PSFs and sky, and is sent only once."""


def _start_work(simulation: Simulation) -> None:
    _work[:] = [simulation]


def simulate(
    output: str | Path,
    simulation: Simulation,
    *,
    workers: int = 1,
    overwrite: bool = False,
    command: str = "",
    progress: Callable[[int], None] = lambda done: None,
) -> Path:
    """Write a training set; the same call continues one that was interrupted.

    Finished stamps wait in ``<output>.run`` until all are there.

    Parameters
    ----------
    output : str or Path
        HDF5 file, laid out as in `sersicnet.dataset`.
    simulation : Simulation
    workers : int
        Number of processes; the file does not depend on it. With more than one, a
        Python script needs its calls below ``if __name__ == "__main__":``.
    overwrite : bool
        Whether to replace an existing file, and to drop an unfinished run with
        other options. One with the same options is continued in any case.
    command : str
        The command line, kept in the file.
    progress : callable
        Called with the number of stamps finished so far.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    InputError
        If the output exists or a number makes no sense.
    OutputError
        If the file cannot be written, or the disk has no room for it.
    WorkError
        If a worker process was killed.
    """
    if workers > 1:
        check_main()
    output = check_output(output, overwrite)
    if output.suffix.lower() in (".fits", ".fit", ".fz"):
        raise InputError(
            f"A training set is an HDF5 file; received {output.name}. Give a name that ends in .h5; or, for an image, "
            "`mosaic`."
        )
    if simulation.n < 1:
        raise InputError(f"A training set has at least one stamp; received n = {simulation.n}.")
    check_room(output, simulation.n)
    config = {**simulation.record(), "command": command}
    attributes = {
        "kind": KINDS[simulation.galaxies],
        "config": config,
        "versions": versions(),
        "zero_point": simulation.instrument.zero_point,
        "pixel_scale": simulation.instrument.pixel_scale,
    }
    columns = simulation.columns
    with journal.Journal(output, simulation.n, attributes, columns=columns, overwrite=overwrite) as run:
        missing = run.missing()
        done = simulation.n - sum(min(dataset.BLOCK, simulation.n - first) for first in missing)
        progress(done)
        for block in _blocks(simulation, missing, workers):
            run.add(block)
            done += len(block.quantum)
            progress(done)
        return run.finish(simulation.psf_images())


LEAST_BYTES = 24_000
"""Bytes on disk of a stamp, at least: a pixel of noise holds 6 bits, and each stamp is on disk twice at the end."""


def check_room(output: Path, n: int) -> None:
    """Refuse a training set that the disk has no room for, before any work is done.

    Raises
    ------
    OutputError
    """
    check_space(output, n * LEAST_BYTES, f"{n:,} stamps", "`n`")


def _blocks(simulation: Simulation, firsts: list[int], n: int) -> Iterator[journal.Block]:
    prepare = functools.partial(_start_work, simulation)
    n = min(n, len(firsts))
    if n <= 1:
        prepare()
    with pools(n, prepare, preload=__name__) as apply:
        for _, block in apply(_block, firsts):
            yield block


def versions() -> dict[str, str]:
    """Versions of the packages that determine the stamps."""
    return {
        "sersicnet": sersicnet.__version__,
        "galsim": metadata.version("galsim"),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "python": platform.python_version(),
    }
