"""One page of HTML that holds its pictures and needs no network: its sections, tables and stamps."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

import numpy as np

from sersicnet.catalogue.figures import GAP, png_link
from sersicnet.output import whole


def write(path: Path, title: str, sections: Sequence[str]) -> None:
    """Write a page; it appears whole or not at all.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    template = resources.files("sersicnet.catalogue").joinpath("page.html").read_text("utf-8")
    text = Template(template).substitute(title=escape(title), body="\n".join(sections))
    with whole(path) as partial:
        partial.write_text(text, "utf-8", errors="backslashreplace")


def section(title: str, content: str) -> str:
    """A section, with a title if that is not empty."""
    head = f"<h2>{escape(title)}</h2>" if title else ""
    return f"<section>{head}\n{content}\n</section>"


def picture(link: str, alt: str) -> str:
    """A picture, of a link that holds it."""
    return f'<div><img alt="{escape(alt)}" src="{link}"></div>'


def table(rows: Sequence[Sequence[str]], head: Sequence[str] | None = None, *, prose: bool = False) -> str:
    """A table; cells with `prose` break into lines."""
    top = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return f'<div class="scroll"><table class="{"prose" if prose else "numbers"}">{top}\n{body}</table></div>'


def stamp(planes: Sequence[np.ndarray], text: str, caption: str, over: str = "") -> str:
    """Square pictures side by side, with a caption.

    Parameters
    ----------
    planes : sequence of ndarray, uint8, (side, side)
        Colours, see `sersicnet.catalogue.figures.png_link`.
    text : str
        In words.
    caption, over : str
        HTML; `over` is SVG in pixels of the first picture.
    """
    side = len(planes[0])
    gap = np.full((side, max(side // 40, 1)), GAP, np.uint8)
    strip = planes[0]
    for plane in planes[1:]:
        strip = np.concatenate([strip, gap, plane], axis=1)
    return (
        f'<figure class="stamp"><svg viewBox="0 0 {strip.shape[1]} {side}" role="img" aria-label="{escape(text)}">'
        f'<image width="{strip.shape[1]}" height="{side}" href="{png_link(strip)}"/>{over}</svg>'
        f"<figcaption>{caption}</figcaption></figure>"
    )
