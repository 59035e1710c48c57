"""The public API is the one that ``tests/api.txt`` states; ``python tests/test_api.py`` writes that file anew."""

import inspect
import re
from pathlib import Path

import sersicnet

SNAPSHOT = Path(__file__).with_name("api.txt")


def public(obj, name):
    """Lines that state a function, or a class with its public methods, properties and fields."""
    if not callable(obj):
        return [f"{name}: {type(obj).__name__}"]
    if not inspect.isclass(obj):
        return [f"{name}{inspect.signature(obj)}"]
    parents = ", ".join(base.__name__ for base in obj.__bases__ if base is not object)
    lines = [f"class {name}({parents})" if parents else f"class {name}"]
    if not issubclass(obj, BaseException):
        lines.append(f"    {inspect.signature(obj)}")
    for member, value in sorted(vars(obj).items()):
        if member.startswith("_"):
            continue
        if isinstance(value, (classmethod, staticmethod)):
            value = getattr(obj, member)
        if inspect.isfunction(value) or inspect.ismethod(value):
            lines.append(f"    .{member}{inspect.signature(value)}")
        else:
            lines.append(f"    .{member}")
    return lines


def api():
    lines = [line for name in sorted(sersicnet.__all__) for line in public(getattr(sersicnet, name), name)]
    return re.sub(r" at 0x[0-9a-f]+", "", "\n".join(lines)) + "\n"


def test_the_public_api_is_the_one_that_the_snapshot_states():
    assert api() == SNAPSHOT.read_text("utf-8"), "if you mean it: python tests/test_api.py, and a line in CHANGELOG.md"


def test_dir_lists_what_can_be_imported():
    assert set(sersicnet.__all__) <= set(dir(sersicnet))


if __name__ == "__main__":
    SNAPSHOT.write_text(api(), "utf-8")
