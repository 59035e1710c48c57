"""Files of networks: Keras files, read with care and written small, and ONNX files made of them."""

from __future__ import annotations

import contextlib
import io
import json
import math
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sersicnet.networks import LARGE, keras

MOST_UNPACKED = 2**28
"""Bytes of an unpacked Keras file: tens of times those of the largest network."""
MOST_PARAMETERS = 2**24
"""Numbers that a network may learn: eight times those of ``tl``."""
MOST_OUTPUTS = 2**22
"""Numbers that a layer may return of a stamp: eight times those of ``dann``."""
_MEMBERS = {"metadata.json", "config.json", "model.weights.h5"}
_CLASSES = {
    # layers
    "AveragePooling2D", "BatchNormalization", "Concatenate", "Conv2D", "Cropping2D", "Dense", "Dropout", "Flatten",
    "Functional", "InputLayer", "LayerNormalization", "MaxPooling2D", "Permute", "ReLU", "Rescaling", "Reshape",
    # operations
    "Absolute", "Add", "Clip", "Exp", "ExpandDims", "GetItem", "Log", "Matmul", "Maximum", "Mean", "Multiply", "Sign",
    "Sqrt", "Square", "Stack", "Subtract", "Take", "TrueDivide",
    # parts of layers
    "DTypePolicy", "GlorotUniform", "HeNormal", "L2", "Ones", "Zeros", "__keras_tensor__", "__slice__",
}  # fmt: skip
"""What a network in a Keras file is built of. Keras knows other classes, some of which read files or run code."""


def load_model(path: Path) -> keras.Model:
    """Load a saved model of `with_units`.

    Parameters
    ----------
    path : Path
        A Keras file.

    Returns
    -------
    keras.Model

    Raises
    ------
    ValueError
        If the file holds other parts or classes than `save_model` writes, custom code, links to
        other files, or is too large; the message says why. Keras raises other kinds.
    """
    _check_file(path)
    with _few_parameters():
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    for layer in [*model.layers, *getattr(model.get_layer("core"), "layers", [])]:
        for port in keras.tree.flatten(layer.output):
            if math.prod(port.shape[1:]) > MOST_OUTPUTS:
                raise ValueError(f"its layer {layer.name[:40]!r} returns {math.prod(port.shape[1:])} numbers")
    return model


def _check_file(path: Path) -> None:
    """Raise ValueError unless a Keras file holds what `save_model` writes, and nothing large or from elsewhere."""
    with zipfile.ZipFile(path) as packed:
        members = packed.infolist()
        if sorted(member.filename for member in members) != sorted(_MEMBERS):
            raise ValueError(f"it should hold {', '.join(sorted(_MEMBERS))}, and nothing else.")
        if (size := sum(member.file_size for member in members)) > MOST_UNPACKED:
            raise ValueError(f"unpacked it would have {size / 2**20:.0f} MiB, more than {MOST_UNPACKED / 2**20:.0f}.")
        config, stored = packed.read("config.json"), packed.read("model.weights.h5")
    for found in _classes(json.loads(config)):
        name, module = found.get("class_name"), found.get("module")
        known = module is None or str(module).partition(".")[0] == "keras"
        if name not in _CLASSES or not known:
            raise ValueError(f"it has a {str(name)[:40]!r}, which networks of sersicnet do not need.")
    _check_values(stored)


def _classes(part: Any) -> Iterator[dict[str, Any]]:
    """Every object that a configuration of Keras describes, however deep."""
    left = [part]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            if "class_name" in part:
                yield part
            left += part.values()
        elif isinstance(part, list):
            left += part


def _check_values(stored: bytes) -> None:
    """Raise ValueError unless the weights in an HDF5 file are few, numbers, and inside of it."""
    import h5py

    total, left = 0, [h5py.File(io.BytesIO(stored))]
    groups = 0
    while left:
        group = left.pop()
        groups += 1
        for name in group:
            if not isinstance(group.get(name, getlink=True), h5py.HardLink) or groups > 10_000:
                raise ValueError(f"its weights have a link {name[:40]!r}.")
            part = group[name]
            if isinstance(part, h5py.Group):
                left.append(part)
                continue
            if part.external or part.is_virtual or part.dtype.kind not in "fiu":
                raise ValueError(f"its weights {name[:40]!r} are no numbers, or are elsewhere.")
            total += part.size
            if total > MOST_PARAMETERS:
                raise ValueError(f"it has more than {MOST_PARAMETERS} weights.")


@contextlib.contextmanager
def _few_parameters() -> Iterator[None]:
    """Let Keras build no more weights than `MOST_PARAMETERS`: a file may ask for any number before it has a value."""
    add_weight, total = keras.layers.Layer.add_weight, 0

    def bounded(layer: keras.layers.Layer, shape: Any = None, *args: Any, **kwargs: Any) -> Any:
        nonlocal total
        total += math.prod(shape or ())
        if total > MOST_PARAMETERS:
            raise ValueError(f"it asks for more than {MOST_PARAMETERS} weights.")
        return add_weight(layer, shape, *args, **kwargs)

    keras.layers.Layer.add_weight = bounded
    try:
        yield
    finally:
        keras.layers.Layer.add_weight = add_weight


def save_model(model: keras.Model, path: Path) -> None:
    """Write a Keras file, compressed: of kernels in half precision a third is zeros."""
    model.save(path)
    plain = path.with_name(f"plain-{path.name}")
    path.replace(plain)
    with zipfile.ZipFile(plain) as found, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for item in found.infolist():
            packed.writestr(item.filename, found.read(item))
    plain.unlink()


def export_onnx(model: keras.Model, path: Path) -> None:
    """Write an ONNX file of the same network, with a free batch size."""
    model(keras.tree.map_structure(lambda port: np.zeros((1, *port.shape[1:]), np.float32), model.input))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.export(path, format="onnx", verbose=False)
    _pack(path)


def _pack(path: Path) -> None:
    """Keep those kernels of an ONNX file in half precision that lose nothing by it."""
    import onnx

    model = onnx.load(str(path))
    casts = []
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size <= LARGE:
            continue
        half = values.astype(np.float16)
        if (half == values).all():
            name = tensor.name
            tensor.CopyFrom(onnx.numpy_helper.from_array(half, f"{name}_half"))
            casts.append(onnx.helper.make_node("Cast", [f"{name}_half"], [name], to=onnx.TensorProto.FLOAT))
    for node in casts:
        model.graph.node.insert(0, node)
    onnx.save(model, str(path))
