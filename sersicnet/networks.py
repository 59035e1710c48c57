"""The networks: graphs only, for any Keras 3 backend.

Every network takes stamps in units of their noise, (N, 128, 128), and ends in
standardised targets; `with_units` appends the physical units. The first
four outputs are the targets of `sersicnet.schema`, in their order; ``fovea``
adds the logarithm of a standard deviation for each.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sersicnet.errors import InputError, first_line


def _start() -> None:
    """Import Keras with its backend, so that other modules import Keras from here.

    TensorFlow's fast kernels, which are off by default on AMD processors, are switched on first.
    While TensorFlow starts and looks for GPUs, its C++ writes lines to stderr that no switch
    suppresses; they are discarded. Settings of the user's ``keras.json`` that would change the
    networks (the order of axes, the precision) do not count.

    Raises
    ------
    InputError
        If Keras does not start with the settings of ``keras.json``.
    """
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    stderr = os.dup(2 if sys.stderr is not None else nowhere)  # which may have been closed
    os.dup2(nowhere, 2)
    try:
        if importlib.import_module("keras").backend.backend() == "tensorflow":
            tensorflow = importlib.import_module("tensorflow")
            tensorflow.get_logger().setLevel("ERROR")
            tensorflow.config.list_physical_devices()
    except ImportError:
        raise
    except Exception as error:  # a setting of another age: Keras raises several kinds
        home = Path(os.environ.get("KERAS_HOME") or Path("~/.keras").expanduser())
        raise InputError(
            f"Keras does not start: {first_line(error)} Its settings are in {home / 'keras.json'} and the environment "
            "variable KERAS_BACKEND: correct or remove them."
        ) from error
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


_start()

import keras

keras.config.set_image_data_format("channels_last")
keras.config.set_floatx("float32")

import numpy as np
from keras import layers, ops

from sersicnet.schema import INPUT_SHAPES, N_TARGETS, STAMP_SIZE, TARGETS, Inputs

SPREAD_LIMITS = (-8.0, 3.0)
"""Bounds of the log standard deviation, in units of the standardised targets."""


def inputs() -> Inputs:
    """A Keras input for each field of `sersicnet.schema.Inputs`, with its name; a network takes those that it needs."""
    return Inputs(*(keras.Input(shape, name=name) for name, shape in INPUT_SHAPES._asdict().items()))


def shown(model: keras.Model, given: Inputs) -> Any:
    """Those of the inputs that a model takes, by the names and in the structure of its Keras inputs."""
    return keras.tree.map_structure(lambda port: getattr(given, port.name), model.input)


def _stretched(stamps: keras.KerasTensor) -> keras.KerasTensor:
    """Asinh of the signal to noise, (N, 128, 128, 1).

    The study divides counts by 255, which has no meaning for calibrated images;
    this keeps faint wings and bright cores both.
    """
    return _asinh(ops.expand_dims(stamps, -1))


def _asinh(x: keras.KerasTensor) -> keras.KerasTensor:
    """Asinh from a logarithm, which ONNX Runtime computes several times faster than its own asinh."""
    return ops.sign(x) * ops.log(ops.abs(x) + ops.sqrt(ops.square(x) + 1))


def fovea() -> keras.Model:
    """Sersicnet's own network: sharp in the middle, coarse outside.

    A galaxy sits in the middle and is smooth outside, so three views of 32 x 32
    pixels keep what matters: the stamp binned by 4, its middle half binned by 2
    and its middle quarter as it is. Residual blocks read them together. The
    fluxes of nested squares and moments under Gaussian windows go straight to the
    head, which then learns corrections rather than sums.

    Returns
    -------
    keras.Model
        (N, 128, 128) -> (N, 8): standardised means and log standard deviations.
        68 million multiply-adds a stamp. The layer ``features`` feeds the
        deviations, and with the fluxes and moments the means.

    References
    ----------
    Residual blocks: He et al. 2016, arXiv:1512.03385.
    """
    stamps = inputs().stamps
    image = ops.expand_dims(stamps, -1)
    middle = layers.Cropping2D(32)(image)
    # A mean over b x b pixels has 1/b of their noise: back to units of noise.
    views = {
        4: 4.0 * layers.AveragePooling2D(4)(image),
        2: 2.0 * layers.AveragePooling2D(2)(middle),
        1: layers.Cropping2D(48)(image),
    }
    x = layers.Concatenate()([_asinh(view) for view in views.values()])
    x = _convolved(x, 32)
    x = _convolved(x, 64, strides=2)
    x = _residual(x, 64)
    x = _residual(x, 64)
    x = _convolved(x, 128, strides=2)
    x = _residual(x, 128)
    x = layers.Conv2D(48, 1, activation="relu")(x)
    x = layers.Flatten()(x)
    squares = [4, 8, 16, 32, 64, STAMP_SIZE]
    fluxes = [
        layers.AveragePooling2D(side)(
            layers.Cropping2D((STAMP_SIZE - side) // 2)(image) if side < STAMP_SIZE else image
        )
        * side
        for side in squares
    ]
    fluxes = _asinh(layers.Flatten()(layers.Concatenate()(fluxes)))
    moments = [_moments(views[width], width, [f * width for f in factors]) for width, factors in _WINDOWS.items()]
    sums = layers.Concatenate()([fluxes, *moments])
    x = layers.Concatenate()([x, sums])
    x = layers.Dense(256, activation="relu")(x)
    x = layers.Dense(128, activation="relu", name="features")(x)
    means = layers.Dense(N_TARGETS, name="means")(layers.Concatenate()([x, sums]))
    spreads = layers.Dense(N_TARGETS, name="log_spreads")(x)
    spreads = ops.clip(spreads, *SPREAD_LIMITS)
    return keras.Model(stamps, layers.Concatenate()([means, spreads]), name="fovea")


_WINDOWS = {1: (1.5, 3.0, 6.0), 2: (3.0, 6.0), 4: (3.0, 6.0)}
"""Gaussian windows of `_moments`: binning of a view, and the widths (sigma) in its pixels."""


def _moments(view: keras.KerasTensor, width: int, sigmas: list[float]) -> keras.KerasTensor:
    """Moments of an image under Gaussian windows, four numbers a window.

    Flux and radial second moment in units of their noise, stretched; and the
    size and the elongation of the light, which no rotation changes: the radial
    moment, and the length of the two quadrupole moments, over the flux.

    Parameters
    ----------
    view : KerasTensor, (N, S, S, 1)
        In units of the noise of its pixels.
    width : int
        Of a pixel of the view, in pixels of the stamp.
    sigmas : list of float
        Of the windows, in pixels of the stamp.
    """
    side = view.shape[1]
    x, y = np.meshgrid(*[(np.arange(side) - (side - 1) / 2) * width] * 2)
    kernels = []
    for sigma in sigmas:
        window = np.exp(-(x**2 + y**2) / (2 * sigma**2))
        for moment in (1, x**2 + y**2, x**2 - y**2, 2 * x * y):
            kernel = window * moment
            kernels.append(kernel.ravel() / np.sqrt((kernel**2).sum()))
    dense = layers.Dense(len(kernels), use_bias=False, trainable=False)
    sums = dense(layers.Flatten()(view))
    dense.set_weights([np.array(kernels, np.float32).T])
    out = []
    for i in range(0, len(kernels), 4):
        flux, radial, plus, cross = (sums[:, j : j + 1] for j in range(i, i + 4))
        scale = ops.sqrt(ops.square(flux) + 4)
        elongation = ops.sqrt(ops.square(plus) + ops.square(cross) + 1e-3)
        out += [_asinh(flux), _asinh(radial), radial / scale, elongation / scale]
    return layers.Concatenate()(out)


def _convolved(x: keras.KerasTensor, filters: int, strides: int = 1) -> keras.KerasTensor:
    x = layers.Conv2D(filters, 3, strides=strides, padding="same", use_bias=False, kernel_initializer="he_normal")(x)
    return layers.ReLU()(layers.BatchNormalization()(x))


def _residual(x: keras.KerasTensor, filters: int) -> keras.KerasTensor:
    y = _convolved(x, filters)
    y = layers.Conv2D(filters, 3, padding="same", use_bias=False, kernel_initializer="he_normal")(y)
    y = layers.BatchNormalization()(y)
    return layers.ReLU()(x + y)


def tl() -> keras.Model:
    """The study's network for transfer learning, 1.94 million weights.

    Two repairs: the last layer is linear (the printed ReLU cannot return the
    negative half of standardised labels), and pixels are stretched in units of
    their noise instead of divided by 255.

    Returns
    -------
    keras.Model
        (N, 128, 128) -> (N, 4), standardised. The layer ``features`` is the last
        hidden one.
    """
    stamps = inputs().stamps

    def convolutions(x: keras.KerasTensor, filters: int, width: int, padding: str = "same") -> keras.KerasTensor:
        for pad in (padding, "same"):
            x = layers.Conv2D(
                filters, width, padding=pad, activation="relu", kernel_regularizer=keras.regularizers.L2(1e-4)
            )(x)
        return x

    x = layers.BatchNormalization()(_stretched(stamps))
    x = convolutions(x, 16, 4, padding="valid")
    x = layers.MaxPooling2D(padding="same")(x)
    x = convolutions(x, 32, 4)
    x = layers.MaxPooling2D(padding="same")(x)
    x = layers.BatchNormalization()(x)
    x = convolutions(x, 64, 4)
    x = layers.MaxPooling2D(padding="same")(x)
    x = convolutions(x, 128, 4)
    x = layers.MaxPooling2D(padding="same")(x)
    x = convolutions(x, 256, 3)
    x = layers.MaxPooling2D(padding="same")(x)
    x = layers.Dropout(1e-4)(layers.Flatten()(x))
    x = layers.Dropout(1e-4)(layers.Dense(128, activation="relu")(x))
    x = layers.Dropout(1e-4)(layers.Dense(64, activation="relu", name="features")(x))
    x = layers.BatchNormalization()(x)
    return keras.Model(stamps, layers.Dense(N_TARGETS, name="means")(x), name="tl")


def dann() -> keras.Model:
    """The study's network for adversarial adaptation: features and regression.

    `with_adversary` adds the domain head for training.

    Returns
    -------
    keras.Model
        (N, 128, 128) -> (N, 4), standardised. The layer ``features`` feeds both
        heads.
    """
    stamps = inputs().stamps

    def convolution(x: keras.KerasTensor, filters: int, width: int) -> keras.KerasTensor:
        return layers.Conv2D(filters, width, padding="same", activation="relu", kernel_initializer="he_normal")(x)

    def pooled(x: keras.KerasTensor) -> keras.KerasTensor:
        return layers.MaxPooling2D(padding="same")(x)

    x = layers.BatchNormalization()(_stretched(stamps))
    for _ in range(2):
        x = pooled(convolution(convolution(x, 32, 4), 32, 4))
    x = pooled(convolution(x, 32, 4))
    x = layers.BatchNormalization()(x)
    for _ in range(2):
        x = pooled(convolution(convolution(x, 64, 4), 64, 4))
    x = pooled(convolution(convolution(x, 64, 3), 64, 3))
    x = pooled(convolution(convolution(x, 128, 3), 128, 3))
    x = pooled(convolution(x, 128, 3))
    x = pooled(convolution(x, 128, 3))
    x = pooled(pooled(convolution(x, 256, 3)))
    x = layers.Flatten(name="features")(x)
    x = layers.Dense(128, activation="relu")(x)
    x = layers.Dense(64, activation="relu")(x)
    return keras.Model(stamps, layers.Dense(N_TARGETS, name="means")(x), name="dann")


class Architecture(NamedTuple):
    """A network and the space in which it learns the targets.

    Attributes
    ----------
    build : callable
        Returns a new Keras model with random weights.
    log : bool
        Whether targets are encoded by `sersicnet.schema.encode` first.
    spreads : bool
        Whether the outputs hold log standard deviations after the means.
    """

    build: Callable[[], keras.Model]
    log: bool
    spreads: bool


ARCHITECTURES = {
    "fovea": Architecture(fovea, log=True, spreads=True),
    "tl": Architecture(tl, log=False, spreads=False),
    "dann": Architecture(dann, log=False, spreads=False),
}


def with_adversary(network: keras.Model) -> keras.Model:
    """Add the domain head behind a gradient reversal.

    The reversal is the identity forward and multiplies the gradient by -lambda
    backward, written without a custom gradient so that it runs on any backend:
    ``(1 + lambda) stop_gradient(x) - lambda x``. (The study's listing changes the
    sign of the forward pass, which reverses nothing.) Behind it each galaxy's features are
    brought to zero mean and unit variance: an adversary that can grow them without bound
    makes ``tl`` diverge.

    Parameters
    ----------
    network : keras.Model
        With a layer called ``features``.

    Returns
    -------
    keras.Model
        Inputs stamps (N, 128, 128) and lambda (N, 1); outputs the regression and
        the probabilities of the two domains, (N, 2).

    References
    ----------
    Ganin & Lempitsky 2015, arXiv:1409.7495.
    """
    strength = keras.Input((1,), name="lambda")
    features = network.get_layer("features").output
    x = (1 + strength) * ops.stop_gradient(features) - strength * features
    x = layers.LayerNormalization(center=False, scale=False)(x)
    x = layers.Dense(128, activation="relu")(x)
    x = layers.Dense(64, activation="relu")(x)
    domain = layers.Dense(2, activation="softmax", name="domain")(x)
    return keras.Model([network.input, strength], {"means": network.output, "domain": domain})


def freeze(core: keras.Model, *, body: bool) -> None:
    """Fix batch normalisations, which then run as in prediction; with `body` also all layers before the features."""
    features = core.layers.index(core.get_layer("features"))
    for i, layer in enumerate(core.layers):
        if isinstance(layer, keras.layers.BatchNormalization) or (body and i < features):
            layer.trainable = False


LARGE = 4096
"""Numbers that a kernel needs to be kept in half precision."""


def with_units(
    architecture: Architecture,
    network: keras.Model,
    mean: np.ndarray,
    std: np.ndarray,
    *,
    error_scale: np.ndarray | None = None,
) -> keras.Model:
    """Wrap a trained network so that it returns physical targets.

    Parameters
    ----------
    architecture : Architecture
    network : keras.Model
        Trained; a copy without its optimiser and loss, which would not load
        again, becomes the layer ``core`` of the result. Its large kernels are
        rounded to half precision: files that are half as large for a change that
        is a hundredth of the networks' own errors.
    mean, std : ndarray, float, (4,)
        Of the (encoded) training targets.
    error_scale : ndarray, float, (4,), optional
        Calibration of the standard deviations; with it the result has errors.

    Returns
    -------
    keras.Model
        (N, 128, 128) -> (N, 4) relative magnitude, effective radius [pix],
        Sersic index, ellipticity; or (N, 8), followed by their 1 sigma errors.
    """
    core = architecture.build()
    core.set_weights(network.get_weights())
    for kernel in core.trainable_weights:
        if math.prod(kernel.shape) > LARGE:
            kernel.assign(ops.convert_to_numpy(kernel).astype(np.float16).astype(np.float32))
    core.name = "core"
    given = keras.tree.map_structure(lambda port: keras.Input(port.shape[1:], name=port.name), core.input)
    out = core(given)
    means = layers.Rescaling([float(s) for s in std], [float(m) for m in mean])(out[:, :N_TARGETS])
    columns = [means[:, i : i + 1] for i in range(N_TARGETS)]
    is_log = [architecture.log and target.log for target in TARGETS]
    columns = [ops.exp(c) if logarithmic else c for c, logarithmic in zip(columns, is_log, strict=True)]
    if error_scale is not None:
        spreads = layers.Rescaling([float(v) for v in np.asarray(std) * error_scale])(ops.exp(out[:, N_TARGETS:]))
        for i, logarithmic in enumerate(is_log):
            sigma = spreads[:, i : i + 1]
            columns.append(sigma * columns[i] if logarithmic else sigma)
    return keras.Model(given, layers.Concatenate()(columns), name="sersicnet")


def multiply_adds(model: keras.Model) -> int:
    """Multiplications of a stamp's way through the convolutions and dense layers of a network."""
    total = 0
    for layer in model.layers:
        if isinstance(layer, layers.Conv2D):
            total += math.prod(layer.kernel.shape) * math.prod(layer.output.shape[1:3])
        elif isinstance(layer, layers.Dense):
            total += math.prod(layer.kernel.shape)
    return total


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
    "Functional", "InputLayer", "LayerNormalization", "MaxPooling2D", "ReLU", "Rescaling",
    # operations
    "Absolute", "Add", "Clip", "Exp", "ExpandDims", "GetItem", "Log", "Mean", "Multiply", "Sign", "Sqrt", "Square",
    "Subtract", "TrueDivide",
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


def features(model: keras.Model) -> keras.Model:
    """The part of a network that describes a galaxy, before the layers that predict the parameters.

    Parameters
    ----------
    model : keras.Model
        Of `with_units`.

    Returns
    -------
    keras.Model
        (N, 128, 128) -> (N, ...): the layer ``features`` of its core; what goes into
        the layer ``means`` where there is none.
    """
    core = model.get_layer("core")
    named = {layer.name for layer in core.layers}
    found = core.get_layer("features").output if "features" in named else core.get_layer("means").input
    return keras.Model(core.input, found)


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
