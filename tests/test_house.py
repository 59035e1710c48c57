"""The layout of the package: sizes, words and what an import costs. Import rules are in ``pyproject.toml``."""

import ast
import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "sersicnet"
SOURCES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
MOST_LINES, MOST_IN_A_FUNCTION = 700, 80
HEAVY = {"tensorflow", "keras", "astropy", "galsim", "h5py", "onnxruntime", "photutils", "matplotlib", "scipy"}


def docstring(node):
    """The node of the docstring of a module, class or function."""
    first = node.body[0] if node.body else None
    text = first.value if isinstance(first, ast.Expr) else None
    return first if isinstance(text, ast.Constant) and isinstance(text.value, str) else None


def documented(tree):
    return [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]


def test_no_file_is_too_long_to_be_seen_whole():
    lines = {name: path.read_text("utf-8").count("\n") for name, path in SOURCES.items()}
    assert {name: n for name, n in lines.items() if n > MOST_LINES} == {}


def test_a_long_function_gives_its_reason():
    """A comment ``# long: ...`` inside a function says why it is not split."""
    long = {}
    for name, path in SOURCES.items():
        text = path.read_text("utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                says = docstring(node)
                n = node.end_lineno - node.lineno + 1 - (says.end_lineno - says.lineno + 1 if says else 0)
                inside = text.splitlines()[node.lineno - 1 : node.end_lineno]
                if n > MOST_IN_A_FUNCTION and not any(re.search(r"#.*\blong: \w", line) for line in inside):
                    long[f"{name}: {node.name}"] = n
    assert long == {}


def test_the_library_names_parameters_not_options():
    found = []
    for name, path in SOURCES.items():
        tree = ast.parse(path.read_text("utf-8"))
        docs = {id(node.value) for node in map(docstring, documented(tree)) if node}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                options = re.findall(r"(?<![\w`-])--[a-z][a-z0-9-]*", node.value)
                found += [f"{name}:{node.lineno} {option}" for option in options if not name.startswith("cli/")]
    assert found == []


def modules_after(statement):
    """Top-level modules that a fresh interpreter holds after a statement."""
    script = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_importing_the_package_costs_nothing_heavy():
    assert not modules_after("import sersicnet") & HEAVY


def test_measuring_loads_nothing_that_only_training_or_parquet_needs():
    only = {"tensorflow", "keras", "galsim", "h5py", "pandas", "pyarrow", "skimage", "matplotlib"}
    assert not modules_after("import sersicnet.measuring.measure") & only
