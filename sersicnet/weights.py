"""Weights directories: save, verify, load, predict.

A directory holds the network twice, ``network.keras`` for training on and
``network.onnx`` for measuring, with ``card.json``, a ``README.md`` made from it
and ``SHA256SUMS``. Nothing in it is unpickled and no code is loaded from it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sersicnet.errors import InputError, WeightsError
from sersicnet.schema import N_TARGETS, SCHEMA_VERSION, STAMP_SIZE, TARGETS

if TYPE_CHECKING:
    import keras

DEFAULT = "fovea-sim"
KERAS, ONNX, CARD, README, SUMS = "network.keras", "network.onnx", "card.json", "README.md", "SHA256SUMS"
BATCH = 64
"""Stamps a call of ONNX Runtime: larger is no faster on a CPU, and takes memory."""


def providers() -> list[str]:
    """What ONNX Runtime may compute with on this machine, fastest first."""
    import onnxruntime

    return [name for name in onnxruntime.get_available_providers() if not name.startswith("Azure")]


def shipped_directory() -> Path:
    """Where the shipped weights are: in the wheel, or at the top of a checkout."""
    package = Path(__file__).parent
    inside = package / "weights"
    return inside if inside.is_dir() else package.parent / "weights"


def shipped() -> list[str]:
    """Names of the shipped weights, sorted."""
    return sorted(card.parent.name for card in shipped_directory().glob(f"*/{CARD}"))


@dataclass(frozen=True)
class Weights:
    """A verified weights directory.

    Attributes
    ----------
    path : Path
    card : dict
        The content of ``card.json``.
    sha256 : str
        Of ``network.onnx``: it names the weights in a catalogue.
    """

    path: Path
    card: dict[str, Any]
    sha256: str

    @property
    def name(self) -> str:
        """Name on the card."""
        return str(self.card["name"])

    @functools.cached_property
    def _session(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(str(self.path / ONNX), options, providers=providers())

    def predict(self, stamps: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Run the network.

        Parameters
        ----------
        stamps : ndarray, float32, (N, 128, 128)
            In units of the noise rms of their pixels, sky subtracted.

        Returns
        -------
        targets : ndarray, float64, (N, 4)
            Relative magnitude, effective radius [pix], Sersic index,
            ellipticity. NaN where a stamp holds a pixel that is not finite.
        errors : ndarray, float64, (N, 4) or None
            Their 1 sigma errors, for networks that predict them.
        """
        if stamps.shape[1:] != (STAMP_SIZE, STAMP_SIZE):
            raise InputError(f"Stamps are {STAMP_SIZE} x {STAMP_SIZE} pixels; received shape {stamps.shape}.")
        width = N_TARGETS * (2 if self.card["errors"] else 1)
        out = np.full((len(stamps), width), np.nan)
        name = self._session.get_inputs()[0].name
        for first in range(0, len(stamps), BATCH):
            batch = np.ascontiguousarray(stamps[first : first + BATCH], dtype=np.float32)
            good = np.isfinite(batch).all(axis=(1, 2))
            if good.any():
                out[first : first + BATCH][good] = self._session.run(None, {name: batch[good]})[0]
        errors = calibrated(self.card, out[:, 0], out[:, N_TARGETS:]) if self.card["errors"] else None
        return out[:, :N_TARGETS], errors

    def keras_model(self) -> keras.Model:
        """The same network as a Keras model, for training on; its layer ``core`` is the network."""
        from sersicnet.networks import load_model

        return load_model(self.path / KERAS)


def calibrated(card: Mapping[str, Any], mag: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Errors as the network predicts them, times the factors that its card lists by magnitude.

    Parameters
    ----------
    card : mapping
    mag : ndarray, float, (N,)
        Predicted magnitude, relative to the noise.
    errors : ndarray, float, (N, 4)
    """
    table = card.get("calibration")
    if not table:
        return errors
    factors = np.array(table["factors"])
    return errors * np.column_stack([np.interp(mag, table["mag"], column) for column in factors.T])


def load(name_or_path: str | Path) -> Weights:
    """Verify and open weights.

    Parameters
    ----------
    name_or_path : str or Path
        Name of shipped weights, or the path of a weights directory.

    Returns
    -------
    Weights

    Raises
    ------
    WeightsError
        If there is no such directory, a file's SHA-256 differs from the one
        listed, or the card is of another schema.
    """
    path = Path(name_or_path)
    if not path.is_dir() and path.name == str(name_or_path):
        path = shipped_directory() / path.name
    if not path.is_dir():
        raise WeightsError(
            f"Weights are a shipped name ({', '.join(shipped()) or 'none here'}) or a directory; "
            f"received {name_or_path}."
        )
    if not (path / SUMS).is_file():
        raise WeightsError(f"{path} is not a weights directory: it has no {SUMS}.")
    sums = {}
    for line in (path / SUMS).read_text().splitlines():
        digest, _, name = line.partition("  ")
        sums[name] = digest
    for name in (KERAS, ONNX, CARD, README):
        if not (path / name).is_file():
            raise WeightsError(f"{path} has no {name}. Install or train the weights again.")
        if sha256(path / name) != sums.get(name):
            raise WeightsError(
                f"{path / name} does not have the SHA-256 that {SUMS} lists: it was changed or damaged. "
                "Install or train the weights again."
            )
    card = json.loads((path / CARD).read_text())
    if card.get("schema_version") != SCHEMA_VERSION:
        raise WeightsError(
            f"{path} has weights schema {card.get('schema_version')}, this version reads {SCHEMA_VERSION}."
        )
    return Weights(path, card, sums[ONNX])


def save(path: Path, model: keras.Model, card: Mapping[str, Any]) -> Weights:
    """Write a weights directory.

    It is written beside its final name and renamed when complete.

    Parameters
    ----------
    path : Path
        Output directory; replaced if it exists.
    model : keras.Model
        As returned by `sersicnet.networks.with_units`.
    card : mapping
        Everything to tell about the weights; can be written as JSON.

    Returns
    -------
    Weights
        The directory, read back.
    """
    from sersicnet.networks import export_onnx

    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save(partial / KERAS)
    export_onnx(model, partial / ONNX)
    full = {
        "schema_version": SCHEMA_VERSION,
        **card,
        "targets": [{"name": t.name, "unit": t.unit, "description": t.description} for t in TARGETS],
    }
    (partial / CARD).write_text(json.dumps(full, indent=1) + "\n")
    (partial / README).write_text(readable(full))
    sums = [f"{sha256(partial / name)}  {name}\n" for name in (KERAS, ONNX, CARD, README)]
    (partial / SUMS).write_text("".join(sums))
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)
    return load(path)


def check_directory(path: Path, mark: str, overwrite: bool) -> None:
    """Refuse an output directory that exists, or that a user would not want replaced.

    Parameters
    ----------
    path : Path
    mark : str
        Name of a file that tells that the directory is one of ours.
    overwrite : bool

    Raises
    ------
    InputError
        If it exists and `overwrite` is not set, or it exists without `mark`, or
        there is no directory to put it into.
    """
    if not path.absolute().parent.is_dir():
        raise InputError(f"The output's directory {path.parent} does not exist. Create it first.")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already. Choose another name, or give --overwrite.")
    if path.exists() and not (path / mark).is_file():
        raise InputError(f"{path} was not made by this command (it has no {mark}), so it is not overwritten.")


def rewrite_card(path: Path, card: Mapping[str, Any]) -> None:
    """Replace the card of a weights directory, and all that is made from it."""
    (path / CARD).write_text(json.dumps(card, indent=1) + "\n")
    (path / README).write_text(readable(card))
    sums = [f"{sha256(path / name)}  {name}\n" for name in (KERAS, ONNX, CARD, README)]
    (path / SUMS).write_text("".join(sums))


def readable(card: Mapping[str, Any]) -> str:
    """The card as a Markdown page."""
    domain = card["domain"]
    ranges = ", ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in domain["ranges"].items())
    lines = [
        f"# {card['name']}",
        "",
        card["summary"],
        "",
        f"- network: `{card['network']}`, {card['parameters']:,} weights; licence {card['licence']}",
        f"- images: {domain['instrument']}; {domain['pixel_scale']} arcsec/pixel, "
        f"PSF FWHM {domain['psf_fwhm']:.3f} arcsec, pixel rms {domain['rms'][0]:g} to {domain['rms'][1]:g} "
        f"at zero point {domain['zero_point']} (AB)",
        f"- trained on: {ranges}",
        f"- data: {card['data']['n']:,} stamps, `{card['data']['command']}`",
        f"- command: `{card['command']}`, seed {card['seed']}",
        f"- training: {card['training']['epochs']} epochs, {card['training']['seconds'] / 60:.0f} minutes "
        f"on {card['training']['device']} ({card['training']['backend']})",
        "",
    ]
    if card.get("scores"):
        lines += [f"Scores on {card['scores']['test_set']}:", "", scores_table(card["scores"]["samples"]), ""]
    lines += ["## Limits", ""]
    lines += [f"- {limit}" for limit in card["limits"]]
    return "\n".join(lines) + "\n"


def scores_table(samples: Mapping[str, Any]) -> str:
    """Scores of `sersicnet.evaluate.scores`, a Markdown table."""
    lines = ["| sample | N | | " + " | ".join(t.name for t in TARGETS) + " |", "|" + "---|" * (3 + N_TARGETS)]
    for sample, found in samples.items():
        for quantity, label in (
            ("r2", "R²"),
            ("bias", "median error"),
            ("scatter", "68 % scatter"),
            ("coverage", "within 1 sigma"),
        ):
            if quantity in found:
                values = " | ".join(f"{found[quantity][t.name]:.4f}" for t in TARGETS)
                lines.append(f"| {sample} | {found['n']} | {label} | {values} |")
    return "\n".join(lines)


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
