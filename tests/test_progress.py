import io
import sys
import types

import pytest

from sersicnet import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_a_line_that_vanishes(monkeypatch, terminal):
    shown = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    progress = Progress()
    progress("reading", 0, 0)
    progress("measuring", 5, 10)
    progress("measuring", 6, 10)  # too soon to be shown
    progress("measuring", 10, 10)
    if not terminal:
        assert shown.getvalue() == ""
        return
    first, second, third = shown.getvalue().split("\r\x1b[2K")[1:]
    assert first == "reading"
    assert second == "measuring " + "#" * 12 + "." * 12 + " 5/10"
    assert third == ""


def test_a_notebook_shows_one_line_that_changes(monkeypatch):
    pages = []
    handle = types.SimpleNamespace(update=lambda page, raw: pages.append(page))

    def display(page, raw, display_id):
        pages.append(page)
        return handle

    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=None)
    there = types.ModuleType("IPython.display")
    there.display = display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", there)
    progress = Progress()
    progress("measuring <tiles>", 1, 4)
    progress("fitting", 4, 4)
    assert [page["text/html"] for page in pages] == [
        '<div>measuring &lt;tiles&gt; <progress max="4" value="1"></progress> 1 of 4</div>',
        '<div>fitting <progress max="4" value="4"></progress> 4 of 4</div>',
    ]
