"""Draw a catalogue over its image: ``python docs/draw.py IMAGE CATALOGUE FIGURE``.

An ellipse has the measured effective radius and ellipticity, and the angle of
the moments; it is blue without flags and orange with one. A cross is a source
of low signal to noise.
"""

import sys

import matplotlib as mpl

mpl.use("Agg")
import numpy as np
from astropy.table import QTable
from matplotlib import pyplot as plt
from matplotlib.patches import Ellipse

from sersicnet import mosaic
from sersicnet.schema import Flag


def draw(image, catalogue, figure):
    """Write the figure."""
    data = mosaic.read_image(image).data
    sky, _ = mosaic.Detector()(data, ~np.isfinite(data))
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


if __name__ == "__main__":
    draw(*sys.argv[1:])
