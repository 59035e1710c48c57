"""Figures of a PSF; Matplotlib is imported when one is drawn."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sersicnet.errors import InputError

SHOWN, LEAST_SHOWN = 4.0, 8.0
"""Half of the side of the part of a PSF that is shown: in FWHM, and at least, pixels."""

FAINTEST = 1e-4
"""Faintest pixel that is shown, as a fraction of the peak."""

SIDE = 3.0
"""Side of a panel, inches."""


def in_words(psf: Any) -> str:
    """A PSF, which is a `sersicnet.Psf` in all of these functions, in a line."""
    size = f"{psf.image.shape[1]} x {psf.image.shape[0]} pixels"
    if psf.oversampling > 1:
        size += f" of 1/{psf.oversampling} of a pixel of the image"
    error = f" known to {psf.error:.1%}" if psf.error > 0 else ""
    return f"<Psf {psf.source}: FWHM {psf.fwhm:.3f} pixels{error}, {size}{', varies over the image' * psf.varies}>"


def plot_psf(psf: Any, axes: Sequence[Any] | None = None) -> list[Any]:
    """Draw the PSF, and its light within a radius; of a PSF that varies, the one in the middle of the image.

    The picture is logarithmic, down to a ten-thousandth of the peak.

    Parameters
    ----------
    axes : sequence of Axes, optional
        Two axes of Matplotlib; by default those of a new figure.

    Returns
    -------
    list of Axes

    Raises
    ------
    InputError
        If there are not two axes.
    """
    axes = axes_for(2, axes)
    draw_psf(axes[0], psf)
    draw_light(axes[1], psf)
    return axes


def png(psf: Any) -> bytes:
    """The same figure as a PNG, which a notebook shows for the last line of a cell."""
    return png_of(2, lambda axes: plot_psf(psf, axes))


def png_of(panels: int, draw: Callable[[list[Any]], Any]) -> bytes:
    """A figure of a number of panels, which `draw` draws into, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIDE * panels, 1.1 * SIDE), layout="constrained")
    draw(list(figure.subplots(1, panels, squeeze=False)[0]))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()


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


def draw_stars(axes: Any, x: np.ndarray, y: np.ndarray, shape: tuple[int, int]) -> None:
    """Draw where the stars of a PSF are in the image into Matplotlib's axes.

    Parameters
    ----------
    axes : Axes
    x, y : ndarray, float64, (S,)
        Zero-based pixels.
    shape : (int, int)
        Height and width of the image; (0, 0) if it is not known.
    """
    axes.plot(x, y, "*", color="#d55e00", ms=8)
    if min(shape) > 0:
        axes.set_xlim(-0.5, shape[1] - 0.5)
        axes.set_ylim(-0.5, shape[0] - 0.5)
    axes.set_aspect("equal")
    axes.set_xlabel("x [pixels]", fontsize=9)
    axes.set_title(f"{len(x)} stars", fontsize=9)


def axes_for(panels: int, axes: Sequence[Any] | None = None, side: float = SIDE) -> list[Any]:
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
