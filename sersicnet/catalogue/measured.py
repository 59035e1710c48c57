"""A catalogue with the image that it was measured on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from astropy.table import QTable, Table

from sersicnet.catalogue.columns import CLASSES, Measurement, column, flags_of
from sersicnet.catalogue.figures import SIDE, add_ellipses, show_signal
from sersicnet.catalogue.galaxy import Galaxy, Picture
from sersicnet.catalogue.signal import averaged
from sersicnet.errors import InputError, counted, printable
from sersicnet.image.exposure import Exposure
from sersicnet.image.psf import Psf
from sersicnet.image.psffile import read_psf
from sersicnet.schema import Flag

if TYPE_CHECKING:
    from sersicnet.image.pixels import Window

FEW = 40
"""Most sources whose ids are written beside them without being asked for."""

SAME_ZERO_POINT = 1e-3
"""Largest difference of the zero points of a catalogue and its image, mag."""


class Catalogue(QTable):
    """A QTable with its image: `plot` draws it with its sources, and `galaxy` shows one of them.

    `sersicnet.measure` and `sersicnet.fit` return it, and `of` joins a table from a file with its image again. It is
    sliced, written, copied and pickled as any QTable; slices and copies keep the image, while tables that are
    stacked or joined, and those read from a file, have none. The image stays on disk, and its pixels are read when
    they are shown.
    """

    _picture: Picture | None = None

    def __init__(self, data: Any = None, *args: Any, **options: Any) -> None:
        super().__init__(data, *args, **options)
        if isinstance(data, Catalogue):
            self._picture = data._picture

    @classmethod
    def of(
        cls,
        table: Table,
        exposure: Any,
        *,
        psf: str | Path | Psf | None = None,
        **options: Any,
    ) -> Catalogue:
        """Join a catalogue with the image that it was measured on.

        Parameters
        ----------
        table : Table
            As `measure` or `fit` wrote it.
        exposure : Exposure, or any input of `sersicnet.Exposure.of`
            A path, an HDU, an NDData, an array.
        psf : str, Path or Psf, optional
            The PSF of the image; without it there are no models.
        **options
            Options of `sersicnet.Exposure.of`, such as ``zero_point``.

        Returns
        -------
        Catalogue
            It shares no columns with `table`. The covariance of its galaxies is known if the table has the columns of
            the correlations.

        Raises
        ------
        InputError
            If the table has no id, x and y, a position far outside of the image, or another zero point.
        """
        missing = [name for name in ("id", "x", "y") if name not in table.colnames]
        if missing:
            raise InputError(
                f"A catalogue of sersicnet has the columns id, x and y; this one has no {', '.join(missing)}."
            )
        image = Exposure.of(exposure, **options)
        stated = table.meta.get("ZEROPT", image.zero_point.value)
        if not abs(stated - image.zero_point.value) < SAME_ZERO_POINT:
            raise InputError(
                f"A catalogue and its image have the same zero point; that of the catalogue is {stated:g}, of "
                f"{image.name} {image.zero_point.value:g} ({image.zero_point.source}). Give `zero_point`."
            )
        _check_inside(table, image)
        if psf is not None:
            psf = psf if isinstance(psf, Psf) else read_psf(psf)
            psf = psf.on(image.image, image.pixel_scale.value)
        return cls._with(table, Picture(image, psf))

    @classmethod
    def _with(cls, table: Table, picture: Picture) -> Catalogue:
        out = cls(table)
        out._picture = picture
        return out

    # --- as any table, with the image ---

    def __getitem__(self, item: Any) -> Any:
        out = super().__getitem__(item)
        if isinstance(out, Catalogue):
            out._picture = self._picture
        return out

    def __getstate__(self) -> tuple[Any, Picture | None]:
        return super().__getstate__(), self._picture

    def __setstate__(self, state: tuple[Any, Picture | None]) -> None:
        table, self._picture = state
        super().__setstate__(table)

    # --- in a notebook ---

    def summary(self) -> str:
        """How many sources there are, how they were measured, and how many have which flags, in a sentence."""
        flags, known = flags_of(self), self.meta.get
        clean = f": {int((flags == 0).sum()):,} without flags" if "flags" in self.colnames else ""
        image = f" of {Path(printable(str(known('IMAGE')))).name}" if "IMAGE" in self.meta else ""
        counts = [(int((flags & flag != 0).sum()), flag.name or str(flag.value)) for flag in Flag]
        shown = ", ".join(f"{n:,} {name}" for n, name in sorted(counts, reverse=True) if n)
        by = f"weights {known('WEIGHTS')}" if "WEIGHTS" in self.meta else "fits"
        source = known("PSFSRC", "of unknown origin")
        psf = f", PSF of {known('PSFFWHM'):.2f} pixels ({source})" if "PSFFWHM" in self.meta else ""
        return f"{counted(len(self), 'source')}{image} by {by}{psf}{clean}{f'; {shown}' if shown else ''}."

    def __repr__(self) -> str:
        with _rounded(self):
            return str(super().__repr__())

    def __str__(self) -> str:
        with _rounded(self):
            return str(super().__str__())

    def _repr_html_(self) -> str:
        """The table, after a summary."""
        with _rounded(self):
            page = str(super()._repr_html_())
        if self._picture is None or "flags" not in self.colnames:
            return page
        return f"<p>{escape(self.summary())}</p>\n{page}"

    # --- the image ---

    @property
    def picture(self) -> Picture:
        """The image behind the catalogue, its sky, noise and PSF.

        Raises
        ------
        InputError
            If the table has no image: it was read from a file, or stacked or joined from others.
        """
        if self._picture is None:
            raise InputError("This catalogue has no image: join them by `sersicnet.Catalogue.of(table, image)`.")
        return self._picture

    @property
    def exposure(self) -> Exposure:
        """The image that was measured."""
        return self.picture.exposure

    @property
    def psf(self) -> Psf | None:
        """The PSF that was used or given, in the pixels of the image; None if it is not known."""
        return self.picture.psf

    def galaxy(self, number: int) -> Galaxy:
        """The galaxy with an id, with its stamp, model and residual.

        Parameters
        ----------
        number : int
            Its value in the column ``id``, from 1. Slices keep the ids.

        Raises
        ------
        InputError
            If no row has this id, the table has no image, or lacks one of the columns id, x and y.
        """
        picture = self.picture
        if missing := [name for name in ("id", "x", "y") if name not in self.colnames]:
            raise InputError(
                f"A galaxy is found by its id and shown at its x and y; this table has no {', '.join(missing)}."
            )
        rows = np.flatnonzero(column(self, "id") == number)
        if not len(rows):
            ids = column(self, "id")
            have = f"{len(self)} rows with ids from {ids.min():.0f} to {ids.max():.0f}" if len(self) else "no rows"
            raise InputError(f"A galaxy is found by its id; received {number}, and the catalogue has {have}.")
        return Galaxy(self[rows[:1]], picture)

    def plot(self, ax: Any = None, *, window: Window | None = None, ids: bool | None = None) -> Any:
        """Draw the image with an ellipse for each row, in the colour of its flags.

        The image is in units of its noise, through an asinh; a large one is averaged to 1200 pixels. Ellipses have
        the effective radius, axis ratio and angle of each source, but are not drawn smaller than can be seen.
        Crosses have no parameters.

        Parameters
        ----------
        ax : Axes, optional
            Axes of Matplotlib; by default those of a new figure.
        window : (slice, slice), optional
            Rows and columns of the image to show; all by default.
        ids : bool, optional
            Whether to write the ids beside the sources; by default if there are at most 40 in the window.

        Returns
        -------
        Axes

        Raises
        ------
        InputError
            If the table has no image or lacks x or y, the window is not within the image, or it cannot be read.
        """
        picture, exposure = self.picture, self.exposure
        if missing := [name for name in ("x", "y") if name not in self.colnames]:
            raise InputError(f"Sources are drawn at their x and y; this table has no {', '.join(missing)}.")
        rows, columns = window = _window(window, exposure.shape)
        block = -(-max(rows.stop - rows.start, columns.stop - columns.start) // SIDE)
        mesh = picture.mesh
        try:
            signal = averaged(exposure, mesh, window, block).signal
        finally:
            exposure.close()
        if ax is None:
            from matplotlib import pyplot as plt

            height, width = rows.stop - rows.start, columns.stop - columns.start
            ax = plt.figure(
                figsize=(7, 0.6 + 7 * float(np.clip(height / width, 0.3, 2))), layout="constrained"
            ).subplots()
        left, bottom = columns.start - 0.5, rows.start - 0.5
        show_signal(ax, signal, (left, left + block * signal.shape[1], bottom, bottom + block * signal.shape[0]))
        ax.set_xlim(left, columns.stop - 0.5)
        ax.set_ylim(bottom, rows.stop - 0.5)
        self._overlay(ax, Measurement(self, exposure, mesh, None), window, ids)
        ax.set_xlabel("x [pixels]")
        ax.set_ylabel("y [pixels]")
        return ax

    def _overlay(self, ax: Any, run: Measurement, window: Window, ids: bool | None) -> None:
        from matplotlib.patheffects import withStroke

        rows, columns = window
        with np.errstate(invalid="ignore"):
            inside = (run.x > columns.start - 0.5) & (run.x < columns.stop - 0.5)
            inside &= (run.y > rows.start - 0.5) & (run.y < rows.stop - 0.5)
        pixel = max(rows.stop - rows.start, columns.stop - columns.start) / SIDE
        for k, one in enumerate(CLASSES):
            chosen = np.flatnonzero(inside & (run.kind == k))
            if len(chosen):
                add_ellipses(ax, run, chosen, pixel)
                ax.plot([], [], "o", mfc="none", color=one.colour, label=f"{one.name} ({len(chosen):,})")
        if inside.any() and "flags" in self.colnames:
            ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.08), ncols=3, frameon=False)
        if "id" in self.colnames and (ids if ids is not None else inside.sum() <= FEW):
            for row in np.flatnonzero(inside):
                beside = 0.7 * max(float(np.nan_to_num(run.r_eff[row])), 3 * pixel)
                ax.annotate(
                    f"{column(self, 'id')[row]:.0f}", (run.x[row] + beside, run.y[row] + beside), xytext=(2, 2),
                    textcoords="offset points", fontsize=8, color=CLASSES[run.kind[row]].colour, annotation_clip=True,
                    path_effects=[withStroke(linewidth=2, foreground="white")],  # on a dark galaxy
                )  # fmt: skip


DIGITS = {"ra": ".6f", "dec": ".6f", "x": ".2f", "y": ".2f"}
"""How floats are shown whose size does not tell how many of their digits matter; magnitudes have three decimals."""


@contextmanager
def _rounded(table: Table) -> Iterator[None]:
    """Show floats with four digits that matter, unless the user has chosen another format; the values stay."""
    floats = [table[name] for name in table.colnames]
    floats = [one for one in floats if getattr(getattr(one, "dtype", None), "kind", "") == "f" and not one.info.format]
    for one in floats:
        one.info.format = ".3f" if one.info.name.startswith("mag") else DIGITS.get(one.info.name, ".4g")
    try:
        yield
    finally:
        for one in floats:
            one.info.format = None


def _check_inside(table: Table, image: Exposure) -> None:
    """Refuse a table most of whose positions are outside of an image: it belongs to another one."""
    x, y = column(table, "x"), column(table, "y")
    height, width = image.shape
    known = np.isfinite(x) & np.isfinite(y)
    inside = (x > -0.5) & (x < width - 0.5) & (y > -0.5) & (y < height - 0.5)
    if known.any() and inside.sum() < known.sum() / 2:
        raise InputError(
            f"{image.name} is {width} x {height} pixels, and {(known & ~inside).sum()} of {known.sum()} positions are "
            "outside of it: the catalogue belongs to another image."
        )


def _window(window: Window | None, shape: tuple[int, int]) -> Window:
    """A window of an image, checked; its slices may be open."""
    if window is None:
        return slice(0, shape[0]), slice(0, shape[1])
    out = tuple(slice(*part.indices(n)) for part, n in zip(window, shape, strict=True))
    if any(part.step != 1 or part.stop <= part.start for part in out):
        raise InputError(
            f"A window is two slices, of rows and of columns, within {shape[0]} x {shape[1]} pixels; received {window}."
        )
    return out[0], out[1]
