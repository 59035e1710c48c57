"""Pages made from the code itself: commands, columns, flags, targets."""

from pathlib import Path

from typer.core import TyperCommand
from typer.main import get_command

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
    return "\n\n".join(
        f"### `sersicnet {name}`\n\n```text\n{_help(name, command)}\n```"
        for name, command in get_command(app).commands.items()
    )


def _help(name: str, command: TyperCommand) -> str:
    command.rich_markup_mode = None  # no boxes
    context = command.context_class(
        command, info_name=f"sersicnet {name}", terminal_width=WIDTH, help_option_names=["-h", "--help"]
    )
    return "\n".join(line.rstrip() for line in command.get_help(context).strip().splitlines())


def columns() -> str:
    """The columns of a catalogue."""
    rows = [
        (f"`{c.name}`", c.unit, f"`{c.ucd}`", c.description, f"`+{c.group}`" if c.group else "by default")
        for c in COLUMNS
    ]
    return _table(("name", "unit", "UCD", "description", "`--columns`"), rows)


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
