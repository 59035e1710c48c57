"""Weights directories: save, verify, load, predict.

A directory holds the network twice, ``network.keras`` for training on and
``network.onnx`` for measuring, with ``card.json``, a ``README.md`` made from it
and ``SHA256SUMS``. Nothing in it is unpickled and no code is loaded from it.

``network.onnx`` is made by TensorFlow. Weights that were trained on a machine
without it lack the file; `export` adds it elsewhere.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sersicnet import calibration, cardpage, graph
from sersicnet import domain as domains
from sersicnet import session as sessions
from sersicnet.domain import Domain, WideDomain, number
from sersicnet.errors import InputError, WeightsError, first_line, warn
from sersicnet.orientations import average
from sersicnet.output import whole_directory
from sersicnet.schema import INPUT_SHAPES, N_TARGETS, SCHEMA_VERSION, TARGET_NAMES, TARGETS, Inputs, angle

if TYPE_CHECKING:
    import keras

DEFAULT, BASE = "fovea", "fovea-sim"
"""The weights that measure by default, whose errors hold on mosaics; and those that training starts from."""

KERAS, ONNX, CARD, README, SUMS = "network.keras", "network.onnx", "card.json", "README.md", "SHA256SUMS"
MOST_BYTES = {KERAS: 2**28, ONNX: 2**28, CARD: 2**22, README: 2**22, SUMS: 2**16}
"""Size up to which a file is read: tens of times that of the shipped ones."""
BATCH = 64
"""Stamps a call of ONNX Runtime: larger is no faster on a CPU, and takes memory."""

PART = 8
"""A CPU computes fewer stamps in a multiple of this many: other sizes would change the last bits of results."""


def shipped_directory() -> Path:
    """Where the shipped weights are: in the wheel, or at the top of a checkout."""
    package = Path(__file__).parent
    inside = package / "weights"
    return inside if inside.is_dir() else package.parent / "weights"


def shipped() -> list[str]:
    """Names of the shipped weights, sorted."""
    return sorted(card.parent.name for card in shipped_directory().glob(f"*/{CARD}"))


class Prediction(NamedTuple):
    """What a network answers for N galaxies.

    Attributes
    ----------
    targets : ndarray, float64, (N, 4)
        Relative magnitude, effective radius [pix], Sersic index, ellipticity. NaN where an input of a
        galaxy is not finite.
    errors : ndarray, float64, (N, 4) or None
        Their 1 sigma errors; None for networks that predict none.
    correlations : ndarray, float64, (N, 6) or None
        Of the errors: of the magnitude with radius, index and ellipticity, of the radius with index and ellipticity,
        of the index with the ellipticity. None for networks that predict none.
    theta, theta_err : ndarray, float64, (N,) or None
        Angle of the major axis from +x towards +y, and its 1 sigma error, degrees; the error is at most that of an
        unknown angle, 180 / sqrt(12).
    """

    targets: np.ndarray
    errors: np.ndarray | None = None
    correlations: np.ndarray | None = None
    theta: np.ndarray | None = None
    theta_err: np.ndarray | None = None

    @classmethod
    def of(cls, card: Mapping[str, Any], out: np.ndarray, seen: np.ndarray) -> Prediction:
        """The answer in the columns of a network's output, with the calibration of its card for what it saw."""
        if not card["errors"]:
            return cls(out[:, :N_TARGETS])
        out = calibration.calibrated(card.get("calibration"), out, seen)
        targets, errors = out[:, :N_TARGETS], out[:, N_TARGETS : 2 * N_TARGETS]
        if not card.get("orientation"):
            return cls(targets, errors)
        correlations, components, spread = out[:, 8:14], out[:, 14:16], out[:, 16]
        length = np.hypot(*components.T)
        with np.errstate(divide="ignore", invalid="ignore"):
            theta_err = np.fmin(np.degrees(0.5 * spread / length), UNKNOWN_ANGLE)
        theta_err[np.isnan(length)] = np.nan
        return cls(targets, errors, correlations, angle(components), theta_err)

    def with_error(self, shift: np.ndarray, turn: np.ndarray | None = None) -> Prediction:
        """The same answer with one more error, which moves the targets of a galaxy together.

        Parameters
        ----------
        shift : ndarray, float64, (N, 4)
            By how much.
        turn : ndarray, float64, (N,), optional
            By how much it turns the galaxy, degrees.
        """
        assert self.errors is not None
        errors = np.hypot(self.errors, shift)
        if self.correlations is None:
            return self._replace(errors=errors)
        if turn is not None and self.theta_err is not None:
            theta_err = np.fmin(np.hypot(self.theta_err, turn), UNKNOWN_ANGLE)
            theta_err[np.isnan(self.theta_err)] = np.nan  # of galaxies that cannot be measured
            return self._replace(theta_err=theta_err).with_error(shift)
        first, second = PAIRS
        own = self.correlations * self.errors[:, first] * self.errors[:, second]
        both = (own + shift[:, first] * shift[:, second]) / (errors[:, first] * errors[:, second])
        return self._replace(errors=errors, correlations=both)


PAIRS = tuple(np.triu_indices(N_TARGETS, 1))
"""First and second target of each of the six correlations."""

UNKNOWN_ANGLE = 180 / 12**0.5
"""Standard deviation of an angle of which nothing is known, degrees."""


@dataclass(frozen=True)
class Weights:
    """A verified weights directory.

    Attributes
    ----------
    path : Path
    card : dict
        The content of ``card.json``.
    sha256 : str
        Of ``network.onnx``: it names the weights in a catalogue. Without that file, of
        ``network.keras``.
    device : str
        Where it predicts, one of `sersicnet.session.DEVICES`; see `on`.
    """

    path: Path
    card: dict[str, Any]
    sha256: str
    device: str = "auto"

    def __repr__(self) -> str:
        return f"<Weights {self.name}: {self.card['domain']['instrument']}, {self.path}>"

    @property
    def name(self) -> str:
        """Name on the card."""
        return str(self.card["name"])

    @functools.cached_property
    def domain(self) -> Domain | WideDomain:
        """What the weights were trained on."""
        return domains.read(self.card)

    @property
    def inputs(self) -> frozenset[str]:
        """Which of the `sersicnet.schema.Inputs` the network is shown."""
        return frozenset(self.card.get("inputs", ("stamps",)))

    def on(self, device: str) -> Weights:
        """The same weights on a device: ``cpu``, ``gpu``, or with ``auto`` a GPU that works, else the CPU.

        Raises
        ------
        InputError
            If there is no such device here; a GPU is tried.
        """
        if device not in sessions.DEVICES:
            raise InputError(f"`device` is one of {', '.join(sessions.DEVICES)}; received {device}.")
        if device == "auto" and sessions.providers() == [sessions.ON_CPU]:
            device = sessions.CPU
        found = replace(self, device=device)
        return replace(found, device=sessions.CPU if found.provider == sessions.ON_CPU else sessions.GPU)

    @property
    def provider(self) -> str:
        """The provider of ONNX Runtime that the network runs on, such as CUDAExecutionProvider."""
        return sessions.ON_CPU if self.device == sessions.CPU else str(self._session.get_providers()[0])

    @property
    def _width(self) -> int:
        """How many values the network returns for a stamp."""
        more = 6 + 2 + 1 if self.card.get("orientation") else 0
        return N_TARGETS * (2 if self.card["errors"] else 1) + more

    @functools.cached_property
    def _session(self) -> Any:
        path, known = self.path / ONNX, INPUT_SHAPES._asdict()
        content = _content(path)
        try:
            shape = graph.result(content, known, BATCH)
        except ValueError as error:
            raise WeightsError(
                f"{path} is no network that this version of sersicnet measures with: {first_line(error)}. "
                "Install or train the weights again."
            ) from error
        if shape != (BATCH, self._width):
            raise WeightsError(
                f"{path} returns values of shape {list(shape[1:])}, by its card {[self._width]}: "
                "it belongs to other weights."
            )
        try:
            session = sessions.opened(content, self.device)
        except InputError:
            raise
        except Exception as error:  # ONNX Runtime raises several kinds of its own
            raise WeightsError(
                f"{path} cannot be opened by ONNX Runtime: {first_line(error)} Install or train the weights again."
            ) from error
        taken = {port.name: tuple(port.shape[1:]) for port in session.get_inputs()}
        if not taken.items() <= known.items():
            raise WeightsError(
                f"{path} takes inputs of shapes {taken}, this version has {known}: it belongs to other "
                "weights, or to another version of sersicnet."
            )
        if taken.keys() != self.inputs:
            raise WeightsError(
                f"{path} is shown {', '.join(sorted(taken))}, by its card {', '.join(sorted(self.inputs))}: it belongs "
                "to other weights."
            )
        return session

    def predict(self, inputs: Inputs) -> Prediction:
        """Run the network.

        Parameters
        ----------
        inputs : Inputs
            What the network is shown of N galaxies; see `sersicnet.schema.Inputs`.

        Returns
        -------
        Prediction

        Raises
        ------
        InputError, WeightsError
            See `answers`.
        """
        return Prediction.of(self.card, self.answers(inputs), calibration.conditions(inputs, self.inputs))

    def answers(self, inputs: Inputs) -> np.ndarray:
        """What the network returns for N galaxies, before it is calibrated.

        Parameters
        ----------
        inputs : Inputs
            See `predict`.

        Returns
        -------
        ndarray, float64, (N, 4), (N, 8) or (N, 17)
            See `sersicnet.networks.with_units`; NaN where an input is not finite. Those of small errors are averages
            over four orientations if the card says so, see `sersicnet.orientations.average`.

        Raises
        ------
        InputError
            If an input that the network needs is not known, or has another shape.
        WeightsError
            If ``network.onnx`` is no network of the card's kind, could not have been written by
            sersicnet (see `sersicnet.graph`), or fails when it runs.
        """
        names = [port.name for port in self._session.get_inputs()]
        for name in names:
            field, shape = getattr(inputs, name), getattr(INPUT_SHAPES, name)
            if field is None:
                raise InputError(f"The network of {self.name} is shown the {name} of galaxies: give {name}.")
            if field.shape not in {(inputs.n, *shape), *([(1, *shape)] if name == "psf" else [])}:
                raise InputError(f"The {name} of {inputs.n} galaxies have shape {shape} each; received {field.shape}.")
        inputs = Inputs(*(field if name in names else None for name, field in inputs._asdict().items()))
        out = self._turned(inputs, names)
        if self.card.get("quarter_turns"):
            average(lambda turned: self._turned(turned, names), inputs, out, self.card["quarter_turns"])
        return out

    def _turned(self, inputs: Inputs, names: list[str]) -> np.ndarray:
        """What the network returns for N galaxies, float64, (N, K); NaN where an input is not finite."""
        out = np.full((inputs.n, self._width), np.nan)
        # A GPU prepares itself for each size of a batch, and gets one.
        threads, least = (sessions.threads(), PART) if self.provider == sessions.ON_CPU else (1, BATCH)
        size = min(BATCH, max(1, -(-inputs.n // (threads * least))) * least)

        def answer(first: int) -> None:
            part = inputs.taken(slice(first, first + size))
            good = np.flatnonzero(part.finite())
            if not len(good):
                return
            part = part.taken(np.resize(good, -(-len(good) // least) * least))
            if inputs.psf is not None and len(inputs.psf) == 1:  # a single PSF is looked at once in a batch
                part = part._replace(psf=inputs.psf)
            given = {name: np.ascontiguousarray(getattr(part, name), np.float32) for name in names}
            out[first + good] = self._run(given)[: len(good)]

        parts = range(0, inputs.n, size)
        if threads == 1 or len(parts) == 1:
            for first in parts:
                answer(first)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(answer, parts))
        return out

    def _run(self, given: Mapping[str, np.ndarray]) -> Any:
        session = self._session
        try:
            return session.run(None, given)[0]
        except Exception as error:  # ONNX Runtime raises several kinds of its own
            raise WeightsError(
                f"{self.path / ONNX} fails when it runs: {first_line(error)} Install or train the weights again."
            ) from error

    @functools.cached_property
    def identity(self) -> str:
        """SHA-256 of all that values and errors depend on: the network, and what its card states of them."""
        keys = ("errors", "orientation", "inputs", "calibration", "quarter_turns", "domain")
        stated = json.dumps({key: self.card.get(key) for key in keys}, sort_keys=True)
        return hashlib.sha256(f"{self.sha256} {stated}".encode()).hexdigest()

    def keras_model(self) -> keras.Model:
        """The same network as a Keras model, for training on; its layer ``core`` is the network.

        Raises
        ------
        WeightsError
            If this version does not know the network, or the file holds another one.
        """
        from sersicnet.networkfile import load_model
        from sersicnet.networks import ARCHITECTURES

        network, path = self.card["network"], self.path / KERAS
        if network not in ARCHITECTURES:
            raise WeightsError(
                f"{self.path} holds a network {network}; this version knows {', '.join(ARCHITECTURES)}: "
                "it can measure, but not be trained on."
            )
        try:
            model = load_model(path)
            parameters = model.get_layer("core").count_params()
        except Exception as error:  # Keras raises several kinds
            raise WeightsError(
                f"{path} cannot be read as a network of sersicnet: {first_line(error).rstrip('.')}. "
                "Install or train the weights again."
            ) from error
        if model.output_shape[1:] != (self._width,) or parameters != self.card["parameters"]:
            raise WeightsError(
                f"{path} has {parameters} weights and returns {model.output_shape[1]} values, its card says "
                f"{self.card['parameters']} and {self._width}: it belongs to other weights."
            )
        return model

    def core(self) -> keras.Model:
        """The network without its physical units, built anew: layers in older files have other names and fixed sums.

        Raises
        ------
        WeightsError
            If this version does not know the network, or the file holds another one.
        """
        from sersicnet.networks import ARCHITECTURES, learned

        network = self.card["network"]
        stored = learned(self.keras_model().get_layer("core"))  # which refuses networks that are not known
        core = ARCHITECTURES[network].build()
        variables = learned(core)
        if [v.shape for v in stored] != [v.shape for v in variables]:
            raise WeightsError(
                f"{self.path} holds a {network} of another version of sersicnet "
                f"({self.card['versions']['sersicnet']}). Train it again."
            )
        for variable, value in zip(variables, stored, strict=True):
            variable.assign(value)
        return core


def load(name_or_path: str | Path, *, to_train: bool = False) -> Weights:
    """Verify and open weights.

    Parameters
    ----------
    name_or_path : str or Path
        Name of shipped weights, or the path of a weights directory.
    to_train : bool
        Whether ``network.onnx``, which measures, may be missing.

    Returns
    -------
    Weights

    Raises
    ------
    WeightsError
        If there is no such directory, a file's SHA-256 differs from the one
        listed, or the card is of another schema, of other targets, or states no
        domain. Other files in the directory are not read.
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
    sums = _sums(path / SUMS)
    for name in (KERAS, ONNX, CARD, README):
        if name == ONNX and not (path / name).exists():
            if to_train:
                continue
            why = "" if name in sums else " yet, since it was trained without TensorFlow"
            raise WeightsError(
                f"{path} has no {ONNX}{why}. Where TensorFlow is installed, `sersicnet export {path}` makes it."
            )
        if not (path / name).is_file():
            raise WeightsError(f"{path} has no {name}. Install or train the weights again.")
        if hashlib.sha256(_content(path / name)).hexdigest() != sums.get(name):
            raise WeightsError(
                f"{path / name} does not have the SHA-256 that {SUMS} lists: it was changed or damaged. "
                "Install or train the weights again."
            )
    return Weights(path, _card(path), sums.get(ONNX, sums[KERAS]))


def _content(path: Path) -> bytes:
    """A file of a weights directory, unless it is too large or cannot be read."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES[path.name] + 1)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}.") from error
    if len(content) > MOST_BYTES[path.name]:
        raise WeightsError(
            f"{path} is larger than {MOST_BYTES[path.name] / 2**20:g} MiB, the most that {path.name} may have: "
            "it holds no weights of sersicnet."
        )
    return content


def _sums(path: Path) -> dict[str, str]:
    """SHA-256 of the files, by their names."""
    try:
        lines = str(_content(path), "utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise WeightsError(f"{path} is no list of SHA-256: {error}. Install or train the weights again.") from error
    sums: dict[str, str] = {}
    for line in lines:
        digest, _, name = line.partition("  ")
        if name and sums.setdefault(name, digest) != digest:
            raise WeightsError(f"{path} lists {name[:40]!r} twice. Install or train the weights again.")
    return sums


def _card(path: Path) -> dict[str, Any]:
    """The card of a weights directory, checked."""
    try:
        card = json.loads(str(_content(path / CARD), "utf-8"))
        version = card.get("schema_version")
    except (ValueError, AttributeError, RecursionError) as error:
        raise WeightsError(
            f"{path / CARD} is no card of weights: {first_line(error)}. Train the weights again."
        ) from error
    if version != SCHEMA_VERSION:
        raise WeightsError(f"{path} has weights schema {str(version)[:40]}, this version reads {SCHEMA_VERSION}.")
    try:
        names = tuple(target["name"] for target in card["targets"])
        if names != TARGET_NAMES:
            received = ", ".join(map(str, names))[:200]
            raise WeightsError(f"{path} predicts {received}; this version reads {', '.join(TARGET_NAMES)}.")
        _check_kinds(card)
        number(card.get("quarter_turns", 0.0))
        calibration.check(card.get("calibration"), card.get("inputs", ()))
        domains.read(card)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"no {error.args[0]}" if isinstance(error, KeyError) else first_line(error)
        raise WeightsError(
            f"{path / CARD} does not state what the weights are and where they hold: {reason}. Train the weights again."
        ) from error
    return card


_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "name": (str, "text"),
    "network": (str, "text"),
    "parameters": (int, "a whole number"),
    "errors": (bool, "true or false"),
    "data": (dict, "a table"),
}
"""What a card must state, and in which type."""


def _check_kinds(card: Mapping[str, Any]) -> None:
    """Raise KeyError or ValueError unless what every card states is there and of the right type."""
    for key, (kind, words) in _KINDS.items():
        if not isinstance(card[key], kind) or (kind is int and isinstance(card[key], bool)):
            raise ValueError(f"{key} is {words}; received {str(card[key])[:40]!r}")
    for key in ("name", "network"):
        if not (card[key].isprintable() and 0 < len(card[key]) <= 200):
            raise ValueError(f"{key} is a word of printable letters; received {card[key][:40]!r}")
    shown = card.get("inputs", ["stamps"])
    if not isinstance(shown, list) or not all(name in Inputs._fields for name in shown) or "stamps" not in shown:
        raise ValueError(f"inputs lists stamps, and any of psf and noise; received {str(shown)[:40]!r}")
    config = card["data"].get("config") or {}  # none for weights that are fine-tuned with a table of labels
    if not isinstance(config, dict) or not isinstance(config.get("instrument") or {}, dict):
        raise ValueError("the configuration of its data is a table")
    if instrument := config.get("instrument"):
        if not isinstance(instrument["name"], str):
            raise ValueError("the name of its instrument is text")
        for key in ("pixel_scale", "exposure", "zero_point"):
            if number(instrument[key]) <= 0 and key != "zero_point":
                raise ValueError(f"{key} of its instrument is positive")
    for key in ("label_mean", "label_std"):
        values = [number(value) for value in card[key]]
        if len(values) != N_TARGETS or (key == "label_std" and min(values) <= 0):
            raise ValueError(f"{key} has {N_TARGETS} numbers, those of label_std positive; received {values}")


def save(path: Path, model: keras.Model, card: Mapping[str, Any]) -> Weights:
    """Write a weights directory.

    It is written beside its final name and renamed when complete. Where there is no
    TensorFlow, ``network.onnx`` is left out; see `export`.

    Parameters
    ----------
    path : Path
        Output directory; replaced if it exists.
    model : keras.Model
        As returned by `sersicnet.networks.with_units`.
    card : mapping
        All that is known about the weights; can be written as JSON.

    Returns
    -------
    Weights
        The directory, read back.
    """
    from sersicnet import networkfile

    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_directory(path) as partial:
        networkfile.save_model(model, partial / KERAS)
        problem = _export(partial, model)
        full = {
            "schema_version": SCHEMA_VERSION,
            **card,
            "targets": [{"name": t.name, "unit": t.unit, "description": t.description} for t in TARGETS],
        }
        rewrite_card(partial, full)
    if problem:
        warn(f"{path} has no {ONNX}: {problem}. To measure with it, run `sersicnet export {path}` elsewhere.")
    return load(path, to_train=True)


def export(path: str | Path) -> Weights:
    """Make ``network.onnx`` of weights that were trained without TensorFlow.

    Parameters
    ----------
    path : str or Path
        A weights directory without that file; it is added.

    Returns
    -------
    Weights

    Raises
    ------
    WeightsError
        If the directory has the file already, or TensorFlow cannot make it.
    """
    found = load(path, to_train=True)
    if (found.path / ONNX).exists():
        raise WeightsError(f"{path} has its {ONNX} already: measure with it.")
    problem = _export(found.path, found.keras_model())
    if problem:
        raise WeightsError(f"{found.path / ONNX} could not be made: {problem}.")
    rewrite_card(found.path, found.card)
    return load(path)


_EXPORT = """
import sys
from sersicnet.networkfile import export_onnx, load_model
export_onnx(load_model(sys.argv[1]), sys.argv[2])
"""


def _export(path: Path, model: keras.Model | None = None) -> str:
    """Make ``network.onnx`` beside ``network.keras``; what is in the way, if anything.

    By TensorFlow in a process of its own if that is not the backend here, so that the file
    is the same whatever the network was trained with.
    """
    missing = [name for name in ("tensorflow", "tf2onnx") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} must be installed"
    partial = path / f"partial-{ONNX}"
    try:
        from sersicnet import networkfile, networks

        if networks.keras.backend.backend() == "tensorflow":
            networkfile.export_onnx(model or networkfile.load_model(path / KERAS), partial)
        else:
            here = {"KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
            arguments = [sys.executable, "-c", _EXPORT, str(path / KERAS), str(partial)]
            done = subprocess.run(arguments, env=os.environ | here, capture_output=True, text=True)
            if done.returncode:
                return f"TensorFlow failed with {(done.stderr.strip().splitlines() or ['no message'])[-1]!r}"
        partial.replace(path / ONNX)
    finally:
        partial.unlink(missing_ok=True)
    return ""


def with_card(base: Weights, path: Path, card: Mapping[str, Any]) -> Weights:
    """Write a weights directory that holds the same network under another card, and return it."""
    with whole_directory(path) as partial:
        for name in (KERAS, ONNX):
            if (base.path / name).exists():
                shutil.copyfile(base.path / name, partial / name)
        rewrite_card(partial, card)
    return load(path, to_train=True)


def rewrite_card(path: Path, card: Mapping[str, Any]) -> None:
    """Replace the card of a weights directory, and all that is made from it."""
    (path / CARD).write_text(json.dumps(card, indent=1) + "\n")
    (path / README).write_text(cardpage.readable(card))
    names = [name for name in (KERAS, ONNX, CARD, README) if name != ONNX or (path / name).exists()]
    sums = [f"{sha256(path / name)}  {name}\n" for name in names]
    (path / SUMS).write_text("".join(sums))


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
