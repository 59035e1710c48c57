"""The notebooks of the docs; the build of the docs executes them, in CI."""

import ast
import json
from pathlib import Path

import pytest

import sersicnet

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def cells(path):
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs(path):
    assert [cell["id"] for cell in cells(path) if cell["outputs"] or cell["execution_count"]] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_use_names_that_exist_and_files_of_the_repository(path):
    for cell in cells(path):
        tree = ast.parse("".join(cell["source"]))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sersicnet":
                assert node.attr in sersicnet.__all__
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("../"):
                assert (path.parent / node.value).exists()
                assert (path.parent / node.value).resolve().is_relative_to(ROOT)
            assert not (isinstance(node, ast.Constant) and "://" in str(node.value)), "notebooks need no network"


def test_the_pages_of_the_docs_show_the_notebooks():
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    assert len(NOTEBOOKS) == 2
    assert all(f"\nnotebooks/{path.stem}\n" in index for path in NOTEBOOKS)
