"""The notebooks of the docs.

The build of the docs executes those on simulated images, in CI. That of a real field keeps its outputs; it is executed
here where its images are: ``SERSICNET_DATA=folder pytest -m slow tests/test_notebooks.py``, see ``docs/pictures.py``.
"""

import ast
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import sersicnet

ROOT = Path(__file__).parents[1]
REAL = ROOT / "docs/notebooks/hst.ipynb"
SIMULATED = sorted(set((ROOT / "docs/notebooks").glob("*.ipynb")) - {REAL})
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[-+]\d+)?(?![\w.]*\w)")


def cells(book):
    return [cell for cell in book["cells"] if cell["cell_type"] == "code"]


def read(path):
    return json.loads(path.read_text("utf-8"))


@pytest.mark.parametrize("path", SIMULATED, ids=lambda path: path.stem)
def test_notebooks_that_the_docs_execute_are_committed_without_outputs(path):
    assert [cell["id"] for cell in cells(read(path)) if cell["outputs"] or cell["execution_count"]] == []


@pytest.mark.parametrize("path", [*SIMULATED, REAL], ids=lambda path: path.stem)
def test_notebooks_use_names_that_exist_and_files_of_the_repository(path):
    for cell in cells(read(path)):
        tree = ast.parse("".join(cell["source"]))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sersicnet":
                assert node.attr in sersicnet.__all__
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("../"):
                assert (path.parent / node.value).exists()
                assert (path.parent / node.value).resolve().is_relative_to(ROOT)
            if path != REAL:
                assert not (isinstance(node, ast.Constant) and "://" in str(node.value)), "no network"


def test_the_pages_of_the_docs_show_the_notebooks():
    index = (ROOT / "docs/index.md").read_text("utf-8")
    assert len(SIMULATED) == 2
    assert all(f"\nnotebooks/{path.stem}\n" in index for path in (*SIMULATED, REAL))


def test_the_notebook_of_a_real_field_is_stored_with_its_outputs():
    """Without errors and warnings, without paths of a machine, and not too large for a repository."""
    assert REAL.stat().st_size < 1_500_000
    outputs = [output for cell in cells(read(REAL)) for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "execute_result", "display_data"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 6
    assert not re.search(r'(?<![\w/:."])/(?:home|tmp|root|work|Users)/', "\n".join(text_of(read(REAL))))


def text_of(book):
    """What the cells print, cell by cell; warnings are not among the results."""
    out = []
    for cell in cells(book):
        parts = [
            "".join(output["text"] if output["output_type"] == "stream" else output["data"].get("text/plain", ""))
            for output in cell["outputs"]
            if output.get("name") != "stderr"
        ]
        out.append("\n".join(part for part in parts if not part.startswith("<Figure")))
    return out


@pytest.mark.slow
@pytest.mark.skipif("SERSICNET_DATA" not in os.environ, reason="SERSICNET_DATA names no folder of real images")
def test_the_stored_numbers_of_a_real_field_are_those_of_today(tmp_path, monkeypatch):
    """If you mean to change them: python docs/pictures.py $SERSICNET_DATA notebook."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    sys.modules.pop("draw", None)
    import pictures

    today = json.loads(pictures.executed(REAL, Path(os.environ["SERSICNET_DATA"]), tmp_path))
    for stored, now in zip(text_of(read(REAL)), text_of(today), strict=True):
        assert NUMBER.sub("#", stored) == NUMBER.sub("#", now)
        one, other = (np.array(NUMBER.findall(text), float) for text in (stored, now))
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=0.011)
