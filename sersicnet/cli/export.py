"""The command `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sersicnet.cli.shared import Quiet, say


def export(
    weights: Annotated[Path, typer.Argument(help="Weights directory without network.onnx.")],
    quiet: Quiet = False,
) -> None:
    """Write the network.onnx that `measure` needs, for weights trained on a machine without TensorFlow.

    Example: sersicnet export my-weights
    """
    from sersicnet.weights import ONNX
    from sersicnet.weights import export as run

    done = run(weights)
    say(quiet, f"wrote {done.path / ONNX}")
