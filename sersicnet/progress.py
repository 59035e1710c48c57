"""The progress of a measurement, shown in a notebook or in a terminal."""

from __future__ import annotations

import sys
import time
from html import escape
from typing import Any

INTERVAL = 0.1
"""Least time between two pictures of the same stage, seconds."""

WIDTH = 24
"""Characters of the bar in a terminal."""


class Progress:
    """Shows the stage of a measurement, and how much of it is done: give it to `sersicnet.measure` as ``report``.

    In a notebook it is one line under the cell, which needs no widgets. In a terminal it is a line on stderr, which
    vanishes at the end of each stage. Elsewhere, as in a batch job, nothing is shown.

    Examples
    --------
    >>> catalogue = sersicnet.measure("mosaic.fits", report=sersicnet.Progress())  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self._stage, self._shown = "", -INTERVAL
        self._handle: Any = None
        self._in_notebook = _in_notebook()

    def __repr__(self) -> str:
        return f"<Progress {self._stage or 'not begun'}>"

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show a stage, the steps of it that are done, and how many it has; 0 if that is not known."""
        now = time.monotonic()
        if stage == self._stage and done < total and now - self._shown < INTERVAL:
            return
        self._stage, self._shown = stage, now
        if self._in_notebook:
            self._show_in_notebook(stage, done, total)
        elif sys.stderr is not None and sys.stderr.isatty():
            ends = total > 0 and done >= total
            sys.stderr.write("\r\x1b[2K" + ("" if ends else _line(stage, done, total)))
            sys.stderr.flush()

    def _show_in_notebook(self, stage: str, done: int, total: int) -> None:
        from IPython.display import display

        bar = f'<progress max="{total}" value="{done}"></progress> {done:,} of {total:,}' if total else ""
        page = {"text/html": f"<div>{escape(stage)} {bar}</div>", "text/plain": _line(stage, done, total)}
        if self._handle is None:
            self._handle = display(page, raw=True, display_id=True)
        else:
            self._handle.update(page, raw=True)


def _line(stage: str, done: int, total: int) -> str:
    if not total:
        return stage
    full = WIDTH * done // total
    return f"{stage} {'#' * full}{'.' * (WIDTH - full)} {done:,}/{total:,}"


def _in_notebook() -> bool:
    """Whether the code runs in a kernel of Jupyter, which shows pages of HTML; IPython is not imported for that."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return hasattr(shell, "kernel")
