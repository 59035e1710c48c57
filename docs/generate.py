"""Pages made from the code itself: commands, columns, flags, targets."""

from pathlib import Path

from typer.testing import CliRunner

from sersicnet.cli import app
from sersicnet.schema import COLUMNS, FLAG_MEANING, TARGETS, Flag

WIDTH = 100


def write(directory: Path) -> None:
    """Write the four pages into `directory`."""
    directory.mkdir(exist_ok=True)
    pages = {"cli": commands(), "columns": columns(), "flags": flags(), "targets": targets()}
    for name, text in pages.items():
        (directory / f"{name}.md").write_text(text + "\n", encoding="utf-8")


def commands() -> str:
    """The help of each command, as `--help` gives it, in plain text."""
    app.rich_markup_mode = None  # no boxes
    names = [command.name or command.callback.__name__ for command in app.registered_commands]
    return "\n\n".join(f"### `sersicnet {name}`\n\n```text\n{_help(name)}\n```" for name in names)


def _help(name: str) -> str:
    result = CliRunner().invoke(app, [name, "--help"], prog_name="sersicnet", terminal_width=WIDTH)
    if result.exit_code != 0:
        raise RuntimeError(f"sersicnet {name} --help exits with {result.exit_code}: {result.output}")
    return "\n".join(line.rstrip() for line in result.output.strip().splitlines())


def columns() -> str:
    """The columns of a catalogue."""
    rows = [(f"`{c.name}`", c.unit, f"`{c.ucd}`", c.description) for c in COLUMNS]
    return _table(("name", "unit", "UCD", "description"), rows)


def flags() -> str:
    """The bits of the column ``flags``."""
    return _table(("bit", "name", "meaning"), [(str(f.value), f"`{f.name}`", FLAG_MEANING[f]) for f in Flag])


def targets() -> str:
    """What networks predict, in their order."""
    rows = [
        (f"`{t.name}`", t.unit, f"{t.low:g} to {t.high:g}", "logarithm" if t.log else "value", t.description)
        for t in TARGETS
    ]
    return _table(("name", "unit", "range of the default prior", "`fovea` learns its", "description"), rows)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
