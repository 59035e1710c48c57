"""One galaxy of a catalogue: its numbers in words, its stamp, its model and what is left."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from astropy.table import QTable, Row

from sersicnet.catalogue.columns import Measurement, column, flags_of
from sersicnet.catalogue.figures import add_ellipses, figure_link, show_signal
from sersicnet.catalogue.signal import Cutout
from sersicnet.engine.render import Renderer, parameters_of
from sersicnet.errors import InputError, printable
from sersicnet.image.detect import Detector
from sersicnet.image.psffigure import axes_for, draw_psf
from sersicnet.image.sky import Mesh, estimate_sky
from sersicnet.schema import COLUMN, CORRELATIONS, FLAG_MEANING, TARGET_NAMES, Flag
from sersicnet.weights import PAIRS

if TYPE_CHECKING:
    from sersicnet.image.exposure import Exposure
    from sersicnet.image.psf import Psf


class Correlations(NamedTuple):
    """Correlations of the errors of a run.

    Attributes
    ----------
    id : ndarray, int, (N,)
        The column of the catalogue.
    x : ndarray, float64, (N,)
        The column of the catalogue as it was measured: a row whose id belongs to another x is not of this run.
    values : ndarray, float32, (N, 6)
        As in `sersicnet.weights.Prediction`; NaN where they are not known.
    """

    id: np.ndarray
    x: np.ndarray
    values: np.ndarray


class Picture:
    """The image behind a catalogue; its pixels are read when they are shown.

    Parameters
    ----------
    exposure : Exposure
    psf : Psf or None
        In the pixels of the exposure; None if it is not known.
    mesh : Mesh, optional
        Sky and noise of the exposure; measured when they are needed by default.
    correlations : Correlations, optional
    """

    def __init__(
        self,
        exposure: Exposure,
        psf: Psf | None,
        mesh: Mesh | None = None,
        correlations: Correlations | None = None,
    ) -> None:
        self.exposure, self.psf, self.correlations = exposure, psf, correlations
        self._mesh = mesh

    def __repr__(self) -> str:
        return f"<Picture {self.exposure!r}, {'no PSF' if self.psf is None else repr(self.psf)}>"

    @property
    def mesh(self) -> Mesh:
        """Sky and noise of the exposure."""
        if self._mesh is None:
            self._mesh = estimate_sky(self.exposure, Detector().threshold)
            self.exposure.close()
        return self._mesh


SHOWN = ("mag", "r_eff", "r_eff_pix", "sersic_n", "ellipticity", "theta", "pa", "mag_auto", "chi2")
"""Columns that are listed for a galaxy, if the catalogue has them."""

BRIEF = ("mag", "r_eff", "sersic_n", "ellipticity")
"""Columns in a line of text; the radius is in pixels if it is not known in arcsec."""


class Galaxy:
    """A row of a catalogue with its part of the image; `sersicnet.Catalogue.galaxy` makes it.

    Attributes
    ----------
    id : int
    x, y : float
        Zero-based pixels of the image.
    """

    def __init__(self, table: QTable, picture: Picture) -> None:
        self._table, self._picture = table, picture
        self.id = int(column(table, "id")[0])
        self.x, self.y = (float(column(table, name)[0]) for name in ("x", "y"))
        r_eff = float(column(table, "r_eff_pix")[0])
        self._cutout = Cutout.of(self.x, self.y, r_eff, picture.exposure.shape)

    def __getitem__(self, name: str) -> Any:
        return self.row[name]

    @property
    def row(self) -> Row:
        """The row of the catalogue, with units."""
        return self._table[0]

    # --- numbers ---

    @property
    def flags(self) -> Flag:
        """Bits of the column ``flags``.

        Raises
        ------
        InputError
            If the catalogue does not have it: a galaxy whose flags are not known is not one without flags.
        """
        if not self._has_flags:
            raise InputError(
                "The catalogue has no column flags, so that the flags of its galaxies are not known: add flags to its "
                "columns."
            )
        return Flag(int(flags_of(self._table)[0]))

    @property
    def _has_flags(self) -> bool:
        return "flags" in self._table.colnames

    @property
    def meanings(self) -> list[str]:
        """The flags in words; none for a galaxy without remarks. Raises `InputError` as `flags` does."""
        return [meaning for _, meaning in self._raised]

    @property
    def _raised(self) -> list[tuple[str, str]]:
        """Name and meaning of each flag."""
        flags = self.flags
        return [(flag.name or str(flag.value), meaning) for flag, meaning in FLAG_MEANING.items() if flags & flag]

    @property
    def _snr(self) -> str:
        """The signal to noise as text, after a semicolon; empty if it is not known."""
        snr = float(column(self._table, "snr")[0])
        return f"; S/N {snr:.0f}" if np.isfinite(snr) else ""

    @property
    def covariance(self) -> np.ndarray | None:
        """Covariance of the errors of magnitude, effective radius [pix], Sersic index and ellipticity.

        Returns
        -------
        ndarray, float64, (4, 4), or None
            None if it is not known: weights without correlations, a galaxy that was not measured, or a catalogue
            that was read from a file without the columns of the correlations.
        """
        correlations = self._correlations()
        if correlations is None:
            return None
        errors = np.array([column(self._table, f"{name}_err")[0] for name in TARGET_NAMES])
        out = np.eye(len(errors))
        out[PAIRS] = out.T[PAIRS] = correlations
        out *= np.outer(errors, errors)
        return out if np.isfinite(out).all() else None

    def _correlations(self) -> np.ndarray | None:
        """Correlations of the errors, (6,), from the columns of the catalogue or from its run."""
        if set(CORRELATIONS) <= set(self._table.colnames):
            return np.array([column(self._table, name)[0] for name in CORRELATIONS])
        known = self._picture.correlations
        if known is None:
            return None
        rows = np.flatnonzero((known.id == self.id) & (known.x == self.x))
        return known.values[rows[0]] if len(rows) else None

    def numbers(self) -> list[tuple[str, str, str]]:
        """Name, value with its error, and unit of what was measured, as text."""
        out = []
        for name in SHOWN:
            if name in self._table.colnames:
                of_error = "theta_err" if name == "pa" else f"{name}_err"
                value, error = (float(column(self._table, each)[0]) for each in (name, of_error))
                out.append((name, _with_error(value, error), COLUMN[name].unit))
        return out

    def __repr__(self) -> str:
        brief = [name if name in self._table.colnames else f"{name}_pix" for name in BRIEF]
        parts = [
            f"{name} {value} {'' if name == 'mag' else unit}".rstrip()
            for name, value, unit in self.numbers()
            if name in brief
        ]
        flags = f"; {', '.join(name for name, _ in self._raised) or 'no flags'}" if self._has_flags else ""
        return f"<Galaxy {self.id}: {', '.join(parts)}{self._snr}{flags}>"

    # --- pixels ---

    @functools.cached_property
    def _pixels(self) -> tuple[np.ndarray, np.ndarray]:
        """The stamp and its noise."""
        if self._cutout is None:
            raise InputError(f"Galaxy {self.id} is at x = {self.x:.1f}, y = {self.y:.1f}, outside of the image.")
        exposure, window = self._picture.exposure, self._cutout.window
        mesh = self._picture.mesh
        try:
            pixels = exposure.read(window)
        finally:
            exposure.close()
        sky = mesh.at(window, pixels)
        data = np.where(pixels.bad, np.float32(np.nan), pixels.data - sky.level)
        return self._cutout.placed(data), self._cutout.placed(sky.rms)

    @property
    def stamp(self) -> np.ndarray:
        """The image around the galaxy, without the sky: float32, (S, S), image units; NaN without data."""
        return self._pixels[0]

    @property
    def noise(self) -> np.ndarray:
        """Noise of a blank pixel: float32, (S, S), image units."""
        return self._pixels[1]

    @property
    def psf(self) -> Psf | None:
        """The PSF at the galaxy; None if it is not known."""
        psf = self._picture.psf
        return None if psf is None else psf.at(self.x, self.y)

    @functools.cached_property
    def model(self) -> np.ndarray | None:
        """The Sersic profile of the catalogue's row through the PSF: float32, (S, S), image units.

        It is the galaxy alone, without neighbours. None if the PSF or one of the parameters is not known.
        """
        psf = self.psf
        if psf is None or self._cutout is None:
            return None
        galaxy = {name: column(self._table, name) for name in ("x", "y", "theta", *TARGET_NAMES)}
        parameters = parameters_of(galaxy, self._picture.exposure.zero_point.value)
        if not np.isfinite(parameters).all():
            return None
        parameters[:, :2] -= self._cutout.corner
        return np.asarray(Renderer(psf.image, self._cutout.side, psf.oversampling)(parameters)[0], np.float32)

    @property
    def residual(self) -> np.ndarray | None:
        """The stamp minus the model: float32, (S, S), image units; None without a model."""
        return None if self.model is None else self.stamp - self.model

    # --- pictures ---

    @property
    def panels(self) -> list[str]:
        """What `plot` shows: the image, and the model, the residual and the PSF, if they are known."""
        more = ["model", "residual"] if self.model is not None else []
        return ["image", *more, *(["PSF"] if self.psf is not None else [])]

    def plot(self, axes: Sequence[Any] | None = None) -> list[Any]:
        """Draw the image, the model, the residual and the PSF.

        Image and model are in units of the noise, through an asinh, and the residual is linear, from -5 to 5 times the
        noise. The ellipse is that of the effective radius, in the colour of the flags. The PSF is logarithmic, down to
        a ten-thousandth of its peak.

        Parameters
        ----------
        axes : sequence of Axes, optional
            Axes of Matplotlib, one for each of `panels`; by default those of a new figure.

        Returns
        -------
        list of Axes

        Raises
        ------
        InputError
            If the galaxy is outside of the image, the image cannot be read, or the number of axes is another one.
        """
        signal = self.stamp / self.noise  # before a figure is made that would stay empty
        axes = axes_for(len(self.panels), axes)
        self._draw(axes, signal)
        return axes

    def _draw(self, axes: Sequence[Any], signal: np.ndarray) -> None:
        assert self._cutout is not None
        (left, bottom), side = self._cutout.corner, self._cutout.side
        extent = left - 0.5, left + side - 0.5, bottom - 0.5, bottom + side - 0.5
        run = Measurement(self._table, self._picture.exposure, self._picture.mesh, None)
        scale = run.scale
        width = f"{side * scale:.1f} arcsec wide" if np.isfinite(scale) else f"{side} pixels wide"
        for axis, panel in zip(axes, self.panels, strict=True):
            if panel == "PSF":
                draw_psf(axis, self.psf)
            elif panel == "residual":
                axis.imshow(
                    self.residual / self.noise, origin="lower", cmap="RdBu_r", vmin=-5, vmax=5, extent=extent,
                    interpolation="nearest",
                )  # fmt: skip
            else:
                show_signal(axis, signal if panel == "image" else self.model / self.noise, extent)
            if panel != "PSF":
                axis.set_title(f"galaxy {self.id}, {width}" if panel == "image" else panel, fontsize=9)
                axis.autoscale(False)
            if panel == "image":
                add_ellipses(axis, run, np.zeros(1, int), side / 300)
            axis.set_xticks([])
            axis.set_yticks([])

    def _repr_html_(self) -> str:
        """The galaxy on a page that holds its picture and needs no network."""
        from matplotlib.figure import Figure

        try:
            signal = self.stamp / self.noise
            figure = Figure(figsize=(2.4 * len(self.panels), 2.6), layout="constrained")
            self._draw(figure.subplots(1, len(self.panels), squeeze=False)[0], signal)
            picture = f'<img alt="galaxy {self.id}: {", ".join(self.panels)}" src="{figure_link(figure, dpi=90)}">'
        except InputError as error:
            picture = f"<p>{escape(printable(str(error)))}</p>"
        rows = "".join(
            f"<tr><th>{name}</th><td>{value}</td><td>{unit}</td></tr>" for name, value, unit in self.numbers()
        )
        flags = ""
        if self._has_flags:
            raised = "".join(f"<li>{escape(name)}: {escape(meaning)}</li>" for name, meaning in self._raised)
            flags = f"<ul>{raised}</ul>" if raised else "<p>No flags.</p>"
        return (
            f"<div><p><b>Galaxy {self.id}</b> at x = {self.x:.1f}, y = {self.y:.1f}{self._snr}</p>\n{picture}\n"
            f"<table>{rows}</table>\n{flags}\n</div>"
        )


def _with_error(value: float, error: float) -> str:
    """A number with as many digits as its error allows."""
    if not np.isfinite(value):
        return "not measured"
    if not (np.isfinite(error) and error > 0):
        return f"{value:.4g}"
    digits = int(np.clip(1 - np.floor(np.log10(error)), 0, 6))
    return f"{value:.{digits}f} ± {error:.{digits}f}"
