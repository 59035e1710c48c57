"""Simulated mosaics, with a table of their galaxies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sersicnet.errors import InputError
from sersicnet.output import check_output, whole
from sersicnet.schema import STAMP_SIZE
from sersicnet.simulating import neighbours
from sersicnet.simulating.recipe import Prior
from sersicnet.simulating.stamps import observe_in_place
from sersicnet.simulating.telescopes import F160W, Instrument

if TYPE_CHECKING:
    from astropy.table import Table


@dataclass(frozen=True)
class Field:
    """A piece of sky with many galaxies, like an image of a deep survey.

    Sizes follow CANDELS/COSMOS in F160W (van der Wel et al. 2014): log10 of radius
    [pix] and index scatter normally about a mean. The number of galaxies is that of
    COSMOS within 12 % (one in 7,900 pixels with 18 < mag < 26). Counts rise by a
    factor 10**0.4 a magnitude, those of the sky by 10**0.26 between mag 21 and 25:
    this field has too few bright galaxies and too many faint ones. The neighbours
    of single galaxies, `sersicnet.simulating.population.draw_neighbours`, have the counts of
    the sky.

    Attributes
    ----------
    size : int
        Pixels a side.
    n : int, optional
        Number of galaxies; by default that of COSMOS to mag 26, one in 9,000 pixels.
    seed : int
    instrument : Instrument
    rms : float
        Noise of a blank pixel, electrons/s.
    """

    size: int
    n: int | None = None
    seed: int = 0
    instrument: Instrument = F160W
    rms: float = 0.0035

    mag: tuple[float, float] = (18.0, 26.0)
    counts_slope: float = 0.4
    log_radius: tuple[float, float, float] = (0.81, -0.053, 0.30)  # at mag 22, a magnitude, scatter
    log_index: tuple[float, float] = (0.14, 0.28)
    axis_ratio: tuple[float, float] = (0.55, 0.21)

    @property
    def count(self) -> int:
        """Number of galaxies."""
        return self.n if self.n is not None else max(1, self.size**2 // 9000)


def field_truth(sky: Field) -> Table:
    """Draw the galaxies of a field: a table of their positions in pixels and their parameters."""
    from astropy.table import Table

    rng = np.random.default_rng([sky.seed, 0])
    n = sky.count
    low, high = (10 ** (sky.counts_slope * m) for m in sky.mag)
    mag = np.log10(rng.uniform(low, high, n)) / sky.counts_slope
    at22, slope, scatter = sky.log_radius
    r_eff = 10 ** (at22 + slope * (mag - 22) + scatter * rng.standard_normal(n))
    index = 10 ** (sky.log_index[0] + sky.log_index[1] * rng.standard_normal(n))
    q = sky.axis_ratio[0] + sky.axis_ratio[1] * rng.standard_normal(n)
    prior = Prior()
    return Table(
        {
            "x": rng.uniform(0, sky.size - 1, n),
            "y": rng.uniform(0, sky.size - 1, n),
            "mag": mag,
            "r_eff_pix": np.clip(r_eff, *prior.r_eff_pix),
            "sersic_n": np.clip(index, *prior.sersic_n),
            "ellipticity": 1 - np.clip(q, 0.1, 1),
            "theta": rng.uniform(-90, 90, n),
        }
    )


def simulate_field(
    output: str | Path,
    sky: Field,
    *,
    overwrite: bool = False,
    command: str = "",
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Path, Path]:
    """Write a simulated mosaic, and a table of its galaxies in another file.

    Parameters
    ----------
    output : str or Path
        FITS image, compressed by tiles, with a WCS and a zero point like HST's.
    sky : Field
    overwrite : bool
    command : str
        The command line, kept in the header.
    progress : callable
        Called with the number of galaxies drawn so far.

    Returns
    -------
    image, truth : Path
        The second is ``<output>_truth.ecsv``, with one row a galaxy.

    Raises
    ------
    InputError
        If an output exists or a number makes no sense.
    """
    from astropy.io import fits
    from astropy.wcs import WCS

    output = Path(output)
    if not output.name.endswith((".fits", ".fits.fz")):
        raise InputError(f"A mosaic ends in .fits or .fits.fz; received {output.name}.")
    truth_path = output.with_name(output.name.split(".fits")[0] + "_truth.ecsv")
    for path in (output, truth_path):
        check_output(path, overwrite)
    if sky.size < STAMP_SIZE:
        raise InputError(f"A mosaic is at least {STAMP_SIZE} pixels a side; received {sky.size}.")
    truth = field_truth(sky)
    drawn = 2 * STAMP_SIZE
    camera = neighbours.camera(sky.instrument)
    canvas = np.zeros((sky.size, sky.size), np.float32)
    for done, row in enumerate(truth, start=1):
        corner = [int(np.round(row[axis])) - drawn // 2 for axis in ("x", "y")]
        galaxy = dict(zip(row.colnames, row, strict=True))
        galaxy["x"], galaxy["y"] = row["x"] - corner[0], row["y"] - corner[1]
        stamp = camera.render(np.array(neighbours.parameters(galaxy, sky.instrument)), drawn)
        x0, y0 = (max(0, c) for c in corner)
        x1, y1 = (min(sky.size, c + drawn) for c in corner)
        canvas[y0:y1, x0:x1] += stamp[y0 - corner[1] : y1 - corner[1], x0 - corner[0] : x1 - corner[0]]
        progress(done)
    observe_in_place(canvas, sky.rms, sky.instrument, np.random.default_rng([sky.seed, 1]))
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = [150.1, 2.2]
    wcs.wcs.crpix = [sky.size / 2 + 0.5] * 2
    wcs.wcs.cdelt = [-sky.instrument.pixel_scale / 3600, sky.instrument.pixel_scale / 3600]
    header = wcs.to_header()
    header["BUNIT"] = "ELECTRONS/S"
    header["MAGZERO"] = (sky.instrument.zero_point, "AB magnitude of 1 electron/s")
    if sky.instrument == F160W:
        header["INSTRUME"], header["FILTER"] = "WFC3", "F160W"
    header["SEED"] = sky.seed
    if command:
        header.add_history(command)
    hdu = fits.CompImageHDU(canvas, header, name="SCI", quantize_level=16)
    truth["ra"], truth["dec"] = wcs.wcs_pix2world(truth["x"], truth["y"], 0)
    truth.meta["instrument"] = sky.instrument.name
    with whole(output) as image, whole(truth_path) as table:
        fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(image, overwrite=True)
        truth.write(table, format="ascii.ecsv", overwrite=True)
    return output, truth_path
