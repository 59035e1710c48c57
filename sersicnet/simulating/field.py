"""Simulated mosaics, with a table of their galaxies."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sersicnet.engine.render import log_norm, sersic_b
from sersicnet.errors import InputError
from sersicnet.image.psf import Psf, radial_profile
from sersicnet.image.psffile import write_psf
from sersicnet.output import check_output, whole
from sersicnet.schema import STAMP_SIZE, TARGET_NAMES
from sersicnet.simulating import neighbours, observatories, population, world
from sersicnet.simulating.recipe import Prior
from sersicnet.simulating.stamps import observe_in_place
from sersicnet.simulating.telescopes import F160W, Instrument, effective_psf

if TYPE_CHECKING:
    from astropy.table import Table

_DRAWN = 2 * STAMP_SIZE
"""Pixels a side of the square that a galaxy is drawn on by default."""

_SQUARES = (neighbours.SMALL, _DRAWN, 4 * _DRAWN)
"""Those of a field of a telescope: the smallest beyond which the surface brightness is below `_FAINT`."""

_FAINT = 0.1
"""In units of the noise of a pixel."""

_SHAPE_OF_A_STAR = (population.POINT, 1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Field:
    """A piece of sky with many galaxies, like an image of a deep survey.

    By default, sizes follow CANDELS/COSMOS in F160W (van der Wel et al. 2014): log10 of radius
    [pix] and index scatter normally about a mean. The number of galaxies is that of
    COSMOS within 12 % (one in 7,900 pixels with 18 < mag < 26). Counts rise by a
    factor 10**0.4 a magnitude, those of the sky by 10**0.26 between mag 21 and 25:
    this field has too few bright galaxies and too many faint ones. The neighbours
    of single galaxies, `sersicnet.simulating.population.draw_neighbours`, have the counts of
    the sky, and so do the objects of a field with a `limit` (see `of_telescope`).

    Attributes
    ----------
    size : int
        Pixels a side.
    n : int, optional
        Number of galaxies; by default that of COSMOS to mag 26, one in 9,000 pixels.
    seed : int
    instrument : Instrument
    rms : float
        Noise of a blank pixel, image units.
    psf : Psf, optional
        That of the instrument by default.
    limit : float, optional
        AB magnitude of the faintest objects, which are then galaxies and stars with the counts of the sky.
    """

    size: int
    n: int | None = None
    seed: int = 0
    instrument: Instrument = F160W
    rms: float = 0.0035
    psf: Psf | None = None
    limit: float | None = None

    mag: tuple[float, float] = (18.0, 26.0)
    counts_slope: float = 0.4
    log_radius: tuple[float, float, float] = (0.81, -0.053, 0.30)  # at mag 22, a magnitude, scatter
    log_index: tuple[float, float] = (0.14, 0.28)
    axis_ratio: tuple[float, float] = (0.55, 0.21)

    @property
    def count(self) -> int:
        """Number of galaxies, and of stars; about that number if they have the counts of the sky."""
        if self.limit is not None:
            return max(1, population.deep_objects(self.size, self.instrument.pixel_scale, self.limit))
        return self.n if self.n is not None else max(1, self.size**2 // 9000)

    @classmethod
    def of_telescope(cls, size: int, telescope: str, seed: int = 0) -> Field:
        """A field as an image of a telescope shows it, with galaxies and stars at high galactic latitude.

        PSF, pixel scale, noise and depth are drawn from what is usual for the telescope; objects are those of
        `sersicnet.simulating.population.draw_neighbours` to a signal to noise of 3, if that is brighter than mag 30.

        Parameters
        ----------
        size : int
            Pixels a side.
        telescope : str
            As for `sersicnet.simulating.world.simulation`.
        seed : int

        Raises
        ------
        InputError
            If there is no such telescope, or it lacks the filter.
        """
        one = world.piece(telescope, seed, 0)
        flat = replace(one.instrument, name=telescope, sky_residual=world.ANY.sky_residual, sky_slope=0.0)
        return cls(size, None, seed, flat, flat.rms_low, one.psf, one.neighbour_limit)


def field_truth(sky: Field) -> Table:
    """Draw the galaxies of a field: a table of their positions in pixels and their parameters.

    A field with the counts of the sky has a column ``star``; stars have a NaN for each parameter but the magnitude.
    """
    from astropy.table import Table

    rng = np.random.default_rng([sky.seed, 0])
    if sky.limit is not None:
        objects = population.draw_neighbours(rng, sky.size, sky.instrument.pixel_scale, sky.limit, deep=True)
        truth = Table(objects, names=["x", "y", *TARGET_NAMES, "theta"])
        truth["star"] = truth["r_eff_pix"] == population.POINT
        for name in (*TARGET_NAMES[1:], "theta"):
            truth[name][truth["star"]] = np.nan
        return truth
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
    """Write a simulated mosaic, a table of its galaxies, and its PSF.

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
        The second is ``<output>_truth.ecsv``, with one row a galaxy. The effective PSF is ``<output>_psf.fits``.

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
    stem = output.name.split(".fits")[0]
    truth_path, psf_path = (output.with_name(stem + ending) for ending in ("_truth.ecsv", "_psf.fits"))
    for path in (output, truth_path, psf_path):
        check_output(path, overwrite)
    if sky.size < STAMP_SIZE:
        raise InputError(f"A mosaic is at least {STAMP_SIZE} pixels a side; received {sky.size}.")
    truth = field_truth(sky)
    canvas = np.zeros((sky.size, sky.size), np.float32)
    for done, row in enumerate(truth, start=1):
        _draw(canvas, row, sky)
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
    if sky.limit is not None:
        header.update(observatories.cards_of(sky.instrument.name))
        header["GAIN"] = (sky.instrument.exposure, "electrons per image unit, for `gain`")
    header["SEED"] = sky.seed
    if command:
        header.add_history(command)
    hdu = fits.CompImageHDU(canvas, header, name="SCI", quantize_level=16)
    truth["ra"], truth["dec"] = wcs.wcs_pix2world(truth["x"], truth["y"], 0)
    truth.meta["instrument"] = sky.instrument.name
    psf = sky.psf or Psf(f"PSF of {sky.instrument.name}", "", effective_psf(sky.instrument))
    with whole(output) as image, whole(truth_path) as table, whole(psf_path) as star:
        write_psf(star, psf, canvas.shape)
        fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(image, overwrite=True)
        truth.write(table, format="ascii.ecsv", overwrite=True)
    return output, truth_path


def _draw(canvas: np.ndarray, row: Any, sky: Field) -> None:
    """Add an object to the noiseless image."""
    galaxy = dict(zip(row.colnames, row, strict=True))
    if galaxy.get("star"):
        galaxy.update(zip((*TARGET_NAMES[1:], "theta"), _SHAPE_OF_A_STAR, strict=True))
    values = np.array(neighbours.parameters(galaxy, sky.instrument))
    size = _DRAWN if sky.limit is None else _square(values, sky)
    neighbours.add(canvas, values, neighbours.camera(sky.psf or sky.instrument), size)


def _square(values: np.ndarray, sky: Field) -> int:
    """The side of the square that an object is drawn on, pixels."""
    _, _, flux, r_eff, n, q, _ = values
    wings = _wings(sky.psf or sky.instrument)
    for size in _SQUARES[:-1]:
        light = np.exp(log_norm(n) - sersic_b(n) * (size / 2 / r_eff) ** (1 / n)) / (q * r_eff**2)
        light += wings[size // 2] if size // 2 < len(wings) else 0.0
        if flux * light < _FAINT * sky.rms:
            return size
    return _SQUARES[-1]


@functools.lru_cache(4)
def _wings(psf: Psf | Instrument) -> np.ndarray:
    """Surface brightness of the PSF by the distance in pixels, for unit flux."""
    image = psf.at_pixel_scale().image if isinstance(psf, Psf) else effective_psf(psf)
    return radial_profile(image, (len(image) // 2,) * 2, np.arange(len(image) // 2 + 1.0))
