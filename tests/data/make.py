"""Make the image and the pinned values of ``tests/test_pinned.py``: ``python tests/data/make.py``.

``real-like.fits`` is a field of nine real-like galaxies, with their noise; it is only made where it is missing.
The values are those of the present code: run this only if a change of the results is meant, and say so in CHANGELOG.md.
"""

from pathlib import Path

import numpy as np
from astropy.io import fits

import sersicnet
from sersicnet.simulating.stamps import draw_stamps

HERE = Path(__file__).parent
COLUMNS = (
    "x", "y", "mag", "mag_err", "r_eff", "r_eff_err", "sersic_n", "sersic_n_err", "ellipticity", "ellipticity_err",
    "theta", "snr", "mag_auto", "flags",
)  # fmt: skip


def draw(path):
    """A square of three by three stamps of real-like galaxies, as HST sees them."""
    simulation = sersicnet.Simulation(9, seed=7, prior=sersicnet.Prior.candels(), galaxies="real-like")
    stamps, _ = draw_stamps(simulation, np.arange(9))
    image = stamps.reshape(3, 3, 128, 128).swapaxes(1, 2).reshape(384, 384)
    cards = {
        "MAGZERO": simulation.instrument.zero_point, "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRPIX1": 192.5,
        "CRPIX2": 192.5, "CRVAL1": 150.1, "CRVAL2": 2.2, "CDELT1": -0.06 / 3600, "CDELT2": 0.06 / 3600,
        "INSTRUME": "WFC3", "FILTER": "F160W",
    }  # fmt: skip
    unit = fits.CompImageHDU(image, fits.Header(cards), name="SCI", quantize_level=16)
    fits.HDUList([fits.PrimaryHDU(), unit]).writeto(path)


def measured(path):
    """The columns of a catalogue that are pinned."""
    return sersicnet.measure(path)[COLUMNS]


if __name__ == "__main__":
    if not (HERE / "real-like.fits").exists():
        draw(HERE / "real-like.fits")
    for image in (HERE / "real-like.fits", HERE.parents[1] / "docs" / "example" / "mosaic.fits"):
        table = measured(image)
        table.meta.clear()
        name = "example" if image.stem == "mosaic" else image.stem
        table.write(HERE / f"{name}.ecsv", overwrite=True)
