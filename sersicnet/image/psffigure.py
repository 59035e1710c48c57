"""Figures of a PSF; Matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sersicnet.errors import InputError

SHOWN, LEAST_SHOWN = 4.0, 8.0
"""Half of the side of the part of a PSF that is shown: in FWHM, and at least, pixels."""

FAINTEST = 1e-4
"""Faintest pixel that is shown, as a fraction of the peak."""


def draw_psf(axes: Any, psf: Any) -> None:
    """Draw a constant PSF into Matplotlib's axes through a logarithm, in pixels of the exposure.

    Parameters
    ----------
    axes : Axes
    psf : Psf
    """
    middle, k = len(psf.image) // 2, psf.oversampling
    half = min(int(np.ceil(k * max(SHOWN * psf.fwhm, LEAST_SHOWN))), middle)
    part = slice(middle - half, middle + half + 1)
    light = np.log10(np.maximum(psf.image[part, part] / psf.image.max(), FAINTEST))
    edge = (half + 0.5) / k
    axes.imshow(
        light, origin="lower", cmap="gray_r", vmin=np.log10(FAINTEST), vmax=0, extent=(-edge, edge, -edge, edge),
        interpolation="nearest",
    )  # fmt: skip
    axes.set_title(f"PSF, FWHM {psf.fwhm:.2f} pixels", fontsize=9)


def draw_light(axes: Any, psf: Any) -> None:
    """Draw the light of a constant PSF within a radius into Matplotlib's axes.

    Parameters
    ----------
    axes : Axes
    psf : Psf
    """
    radius = np.linspace(0, min(max(SHOWN * psf.fwhm, LEAST_SHOWN), len(psf.image) // 2 / psf.oversampling), 60)
    axes.plot(radius, psf.encircled(radius), color="#0072b2")
    axes.axvline(psf.fwhm / 2, color="black", lw=0.8, ls="--", label="half of the FWHM")
    axes.set_xlim(0, radius[-1])
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("radius [pixels]", fontsize=9)
    axes.set_title("light within the radius", fontsize=9)
    axes.legend(fontsize=8, loc="lower right")


def axes_for(panels: int, axes: Sequence[Any] | None = None, side: float = 3.0) -> list[Any]:
    """Axes of Matplotlib for a number of panels: the given ones, or those of a new figure, which a notebook shows.

    Raises
    ------
    InputError
        If the number of given axes is another one.
    """
    if axes is not None:
        given = list(np.ravel(np.asarray(axes, dtype=object)))
        if len(given) != panels:
            raise InputError(f"The figure has {panels} panels, each of which needs axes; received {len(given)}.")
        return given
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(side * panels, side * 1.1), layout="constrained")
    return list(figure.subplots(1, panels, squeeze=False)[0])
