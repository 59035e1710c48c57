"""The docs and the command line say the same."""

import importlib.util
import re
from pathlib import Path

import pytest
import typer

from sersicnet import cli

DOCS = Path(__file__).parents[1] / "docs"
RECIPES = sorted((DOCS / "howto").glob("*.md"))
COMMANDS = typer.main.get_command(cli.app).commands
OPTIONS = sorted(
    {
        (*parameter.opts, *parameter.secondary_opts)
        for command in COMMANDS.values()
        for parameter in command.params
        if parameter.param_type_name == "option"
    }
)


@pytest.fixture(scope="module")
def reference():
    """The part of the reference that is made from the commands themselves."""
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    return generate.commands()


@pytest.mark.parametrize("spellings", OPTIONS, ids=[spellings[0] for spellings in OPTIONS])
def test_every_option_is_explained_in_the_docs(spellings):
    """By a page that a person wrote; the tutorial's and the benchmarks' examples do not explain."""
    written = "\n".join((DOCS / page).read_text("utf-8") for page in (*RECIPES, "reference.md"))
    assert re.search(rf"(?<![\w-])({'|'.join(spellings)})(?![\w-])", written)


def test_the_reference_lists_every_option_of_every_command(reference):
    pages = dict(re.findall(r"### `sersicnet (\w+)`\n\n```text\n(.*?)\n```", reference, re.DOTALL))
    assert list(pages) == list(COMMANDS)
    for name, command in COMMANDS.items():
        for parameter in command.params:
            for spelling in (*parameter.opts, *parameter.secondary_opts):
                if spelling.startswith("-"):
                    assert re.search(rf"(?<![\w-]){spelling}(?![\w-])", pages[name]), (name, spelling)


def test_the_docs_name_no_option_that_does_not_exist():
    """In commands, and in backticks; accuracy.md has options of the benchmarks, too."""
    command = re.compile(rf"^.*\bsersicnet (?:{'|'.join(COMMANDS)}) .*$", re.MULTILINE)
    known = {spelling for spellings in OPTIONS for spelling in spellings} | {"--help", "--version"}
    for page in (*DOCS.glob("*.md"), *RECIPES, DOCS.parent / "README.md"):
        text = page.read_text("utf-8")
        found = set() if page.name == "accuracy.md" else set(re.findall(r"`(--[a-z0-9-]+)", text))
        for line in command.findall(text):
            found |= set(re.findall(r"(?<![\w-])(--[a-z0-9-]+)", line))
        assert found <= known, page.name


def test_the_page_of_telescopes_states_the_measured_accuracy():
    """The table of the accuracy page was measured again, and the page of telescopes kept the numbers of before."""
    table = (DOCS / "accuracy.md").read_text("utf-8")
    lines = [
        line for line in (DOCS / "telescopes.md").read_text("utf-8").splitlines() if line.startswith("**Measured**")
    ]
    assert len(lines) == 12
    for line in lines:
        name = line.split(" galaxies of ")[1].split(":")[0]
        row = next(row for row in table.splitlines() if row.startswith(f"| {name} |"))
        stated = re.findall(r"[+-]\d+\.\d+ ± \d+\.\d+", line)
        assert stated == re.findall(r"[+-]\d+\.\d+ ± \d+\.\d+", row)
