"""The command `info`: versions, devices and weights, as Markdown for a bug report."""

from __future__ import annotations

import platform

import typer

import sersicnet
from sersicnet.cli.shared import progress_bar
from sersicnet.errors import SersicnetError

PACKAGES = (
    "numpy",
    "scipy",
    "astropy",
    "photutils",
    "scikit-image",
    "galsim",
    "h5py",
    "onnxruntime",
    "keras",
    "tensorflow",
    "jax",
    "torch",
)


def info() -> None:
    """Print versions, devices and weights, as Markdown for a bug report.

    Example: sersicnet info
    """
    with progress_bar(False, "looking"):
        text = describe()
    typer.echo(text)


def describe() -> str:
    """Describe this installation.

    Returns
    -------
    str
        Markdown: versions, the devices of inference and of training, and the
        shipped weights with their domains and scores.
    """
    from sersicnet import cardpage, session, weights, workers

    lines = [f"## sersicnet {sersicnet.__version__}", ""]
    lines += [f"- Python {platform.python_version()} on {platform.platform()}, {workers.cores()} cores"]
    lines += [f"- {package} {version}" for package in PACKAGES if (version := _version(package))]
    lines += [f"- measuring runs on: {', '.join(session.providers())}"]
    lines += [f"- training runs on: {_training_device()}", "", "## Weights", ""]
    for name in weights.shipped():
        try:
            found = weights.load(name)
            page = cardpage.readable(found.card)
        except SersicnetError as error:
            lines += [f"`{name}`: {error}", ""]
            continue
        lines += [page.replace("\n## ", "\n### ").replace("# ", "### ", 1)]
    if not weights.shipped():
        lines += [f"none in {weights.shipped_directory()}"]
    return "\n".join(lines).rstrip()


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _training_device() -> str:
    try:
        from sersicnet.training.device import device
    except (ImportError, SersicnetError) as error:
        return f"nothing: {error}"
    return device()
