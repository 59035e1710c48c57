"""The networks: graphs only, for any Keras 3 backend.

Every network takes stamps in units of their noise, (N, 128, 128), and ends in
standardised targets; `with_units` appends the physical units. The first
four outputs are the targets of `sersicnet.schema`, in their order; ``fovea``
adds the logarithm of a standard deviation for each.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping
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
    except Exception as error:  # a setting of another age, or no such backend here: Keras raises several kinds
        if isinstance(error, ImportError) and error.name == "keras":
            raise
        home = Path(os.environ.get("KERAS_HOME") or Path("~/.keras").expanduser())
        raise InputError(
            f"Keras does not start: {first_line(error).removesuffix('.')}. Its settings are in {home / 'keras.json'} "
            "and the environment variable KERAS_BACKEND: correct or remove them."
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

from sersicnet.image.views import BINNINGS
from sersicnet.schema import INPUT_SHAPES, N_TARGETS, TARGETS, VIEW_SIZE, Inputs

SPREAD_LIMITS = (-8.0, 3.0)
"""Bounds of the log standard deviation, in units of the standardised targets."""


def inputs() -> Inputs:
    """A Keras input for each field of `sersicnet.schema.Inputs`, with its name; a network takes those that it needs."""
    return Inputs(*(keras.Input(shape, name=name) for name, shape in INPUT_SHAPES._asdict().items()))


def seed_keras(seed: int) -> None:
    """Seed the random numbers of Keras, which takes 32 bits: of a larger seed, the lowest count."""
    keras.utils.set_random_seed(seed % 2**32)


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


N_FACTORS = N_TARGETS * (N_TARGETS + 1) // 2
"""Numbers of a triangular matrix of the targets."""

N_ORIENTATION = 2
"""Components of the ellipticity that a network predicts besides the targets, see `sersicnet.schema.orientation`."""

STAR = 1e4
"""Flux of the star that a network is shown as the PSF, in units of the noise."""


def fovea() -> keras.Model:
    """Sersicnet's own network: sharp in the middle, coarse outside, and aware of the PSF.

    A galaxy sits in the middle and is smooth outside, so three views of 32 x 32
    pixels keep what matters: the stamp binned by 4, its middle half binned by 2
    and its middle quarter as it is. Residual blocks read them together. The
    fluxes of nested squares and moments under Gaussian windows go straight to the
    head, which then learns corrections rather than sums.

    The PSF goes through the same views, and a finer one, and the same moments. From them and from what
    is known of the noise comes a code, which enters the first convolution, scales and shifts the channels
    of the residual blocks, and joins the head. If a batch has one PSF, it is looked at once.
    Lengths are in pixels and fluxes in units of the noise: no telescope is known.

    Returns
    -------
    keras.Model
        Stamps (N, 128, 128), PSF (N or 1, 4, 32, 32) and noise (N, 3) -> (N, 17): four standardised
        means; ten numbers of the triangular matrix that whitens their errors, see `whitening`; and
        two components of the ellipticity with the logarithm of their standard deviation.
        The layer ``features`` feeds the deviations, and with the fluxes and moments the means.

    References
    ----------
    Residual blocks: He et al. 2016, arXiv:1512.03385. Scales and shifts: Perez et al. 2018, arXiv:1709.07871.
    """
    given = inputs()
    views = _views(given.stamps)
    stamp_sums = _stamp_sums(views)
    psf, first, psf_sums = _seen_psf(given.psf)
    code = layers.Dense(128)(layers.Concatenate()([psf, psf_sums]))
    code = ops.maximum(code + layers.Dense(128, use_bias=False)(given.noise), 0.0)
    code = layers.Dense(128, activation="relu", name="code")(code)
    x = layers.Conv2D(32, 3, padding="same", use_bias=False, kernel_initializer="he_normal")(_shown_together(views))
    x = layers.ReLU()(layers.BatchNormalization()(x) + first)
    x = _convolved(x, 64, strides=2)
    x = _residual(x, 64, code)
    x = _residual(x, 64, code)
    x = _convolved(x, 128, strides=2)
    x = _residual(x, 128, code)
    x = layers.Conv2D(48, 1, activation="relu")(x)
    x = layers.Concatenate()([layers.Flatten()(x), stamp_sums])
    x = ops.maximum(layers.Dense(256)(x) + layers.Dense(256, use_bias=False)(code), 0.0)
    x = layers.Dense(128, activation="relu", name="features")(x)
    means = layers.Dense(N_TARGETS, name="means")(layers.Concatenate()([x, stamp_sums]))
    factors = ops.clip(layers.Dense(N_FACTORS, name="factors")(x), *FACTOR_LIMITS)
    components = layers.Dense(N_ORIENTATION, name="components")(layers.Concatenate()([x, stamp_sums]))
    spread = ops.clip(layers.Dense(1, name="log_spread")(x), *SPREAD_LIMITS)
    outputs = layers.Concatenate()([means, factors, components, spread])
    return keras.Model({port.name: port for port in given}, outputs, name="fovea")


FACTOR_LIMITS = (-50.0, 50.0)
"""Bounds of the numbers of a whitening matrix; its diagonal is the exponential of the first ones."""


def whitening(factors: Any) -> Any:
    """The matrix that turns errors of the targets into independent errors of unit variance.

    Parameters
    ----------
    factors : tensor, float, (N, 10)
        Logarithms of the diagonal, then the elements below it, row by row.

    Returns
    -------
    tensor, float, (N, 4, 4)
        Lower triangular L, with which the inverse of the covariance is ``L^T L``.
    """
    diagonal = ops.exp(ops.clip(factors[:, :N_TARGETS], -SPREAD_LIMITS[1], -SPREAD_LIMITS[0]))
    rows, k = [], N_TARGETS
    for i in range(N_TARGETS):
        row = [factors[:, k : k + i], diagonal[:, i : i + 1], ops.zeros_like(diagonal[:, i + 1 :])]
        rows.append(ops.concatenate([part for part in row if part.shape[1]], axis=1))
        k += i
    return ops.stack(rows, axis=1)


def spreads(architecture: Architecture, out: np.ndarray) -> np.ndarray:
    """Standard deviations of standardised targets, float64, (N, 4), of the outputs of a network that predicts them."""
    if not architecture.oriented:
        return np.exp(out[:, N_TARGETS:].astype(float))
    matrix = ops.convert_to_numpy(whitening(out[:, N_TARGETS : N_TARGETS + N_FACTORS])).astype(float)
    return np.sqrt(np.square(np.linalg.inv(matrix)).sum(axis=2))


def _views(stamps: keras.KerasTensor) -> dict[float, keras.KerasTensor]:
    """Three views of a stamp, (N, 32, 32, 1) in units of their noise, by the binning."""
    image = ops.expand_dims(stamps, -1)
    # A mean over b x b pixels has 1/b of their noise.
    halved = 2.0 * layers.AveragePooling2D(2)(image)
    return {
        4: 2.0 * layers.AveragePooling2D(2)(halved),
        2: layers.Cropping2D(16)(halved),
        1: layers.Cropping2D(48)(image),
    }


def _shown_together(views: dict[float, keras.KerasTensor]) -> keras.KerasTensor:
    """Views of a stamp as channels, stretched."""
    return _asinh(layers.Concatenate()(list(views.values())))


def _stamp_sums(views: dict[float, keras.KerasTensor]) -> keras.KerasTensor:
    """Fluxes of nested squares, in units of their noise and stretched, and moments, of a stamp."""
    sides: dict[float, tuple[int, ...]] = {1: (4, 8, 16, 32), 2: (32,), 4: (32,)}
    squares = {width: [_square(side) / side for side in sides[width]] for width in sides}
    fluxes, moments = _sums(views, squares)
    return layers.Concatenate()([_asinh(fluxes), moments])


def _seen_psf(psf: keras.KerasTensor) -> tuple[keras.KerasTensor, keras.KerasTensor, keras.KerasTensor]:
    """What is made of the views of a PSF: features, what is added to the first convolution, and sums and moments."""
    star = STAR * layers.Permute((2, 3, 1))(psf)
    x = _asinh(star)
    first = layers.Conv2D(32, 3, padding="same", use_bias=False, kernel_initializer="he_normal")(x)
    first = layers.BatchNormalization()(first)
    y = layers.Conv2D(24, 3, strides=2, padding="same", activation="relu")(x)
    y = layers.Conv2D(32, 3, strides=2, padding="same", activation="relu")(y)
    y = layers.Conv2D(32, 3, strides=2, padding="same", activation="relu")(y)
    views = {width: star[:, :, :, i : i + 1] for i, width in enumerate(BINNINGS)}
    sides = {0.5: (2, 4, 8, 16), 1: (4, 8, 16, 32), 2: (16, 32), 4: (16, 32)}
    # The values of the finest view are at half pixels: there, a pixel of the view is a quarter of one of the stamp.
    light = {0.5: 0.25, 1: 1.0, 2: 2.0, 4: 4.0}
    squares = {width: [_square(side) * light[width] / STAR for side in sides[width]] for width in sides}
    return layers.Flatten()(y), first, layers.Concatenate()(list(_sums(views, squares)))


def _square(side: int) -> np.ndarray:
    """The square of pixels in the middle of a view, 1 inside and 0 outside, (32, 32)."""
    inside = np.abs(np.arange(VIEW_SIZE) - (VIEW_SIZE - 1) / 2) < side / 2
    return np.outer(inside, inside).astype(float)


def fovea_fixed() -> keras.Model:
    """The network of `fovea` before it was shown the PSF: it measures images through the PSF of its training alone.

    Returns
    -------
    keras.Model
        (N, 128, 128) -> (N, 8): standardised means and log standard deviations.
        68 million multiply-adds a stamp. The layer ``features`` feeds the
        deviations, and with the fluxes and moments the means.
    """
    stamps = inputs().stamps
    views = _views(stamps)
    x = _convolved(_shown_together(views), 32)
    x = _convolved(x, 64, strides=2)
    x = _residual(x, 64)
    x = _residual(x, 64)
    x = _convolved(x, 128, strides=2)
    x = _residual(x, 128)
    x = layers.Conv2D(48, 1, activation="relu")(x)
    x = layers.Flatten()(x)
    sums = _stamp_sums(views)
    x = layers.Concatenate()([x, sums])
    x = layers.Dense(256, activation="relu")(x)
    x = layers.Dense(128, activation="relu", name="features")(x)
    means = layers.Dense(N_TARGETS, name="means")(layers.Concatenate()([x, sums]))
    spreads = layers.Dense(N_TARGETS, name="log_spreads")(x)
    spreads = ops.clip(spreads, *SPREAD_LIMITS)
    return keras.Model(stamps, layers.Concatenate()([means, spreads]), name="fovea-fixed")


_WINDOWS: dict[float, tuple[float, ...]] = {1: (1.5, 3.0, 6.0), 2: (3.0, 6.0), 4: (3.0, 6.0)}
"""Gaussian windows of `_sums`: binning of a view, and the widths (sigma) in its pixels."""


def _sums(
    views: Mapping[float, keras.KerasTensor], squares: Mapping[float, list[np.ndarray]]
) -> tuple[keras.KerasTensor, keras.KerasTensor]:
    """Sums over squares, and moments under Gaussian windows, of the views of an image.

    All sums over a view are one product with a fixed matrix, and all windows go through the same steps
    together: small steps cost ONNX Runtime more than their arithmetic.

    Parameters
    ----------
    views : mapping of KerasTensor, (N, 32, 32, 1)
        By the binning; in units of the noise of their pixels.
    squares : mapping of lists of ndarray, (32, 32)
        For each view, images that it is multiplied by and summed.

    Returns
    -------
    squares : KerasTensor, (N, squares of all views)
    moments : KerasTensor, (N, 28)
        Four numbers a window. Flux and radial second moment in units of their noise, stretched; and the
        size and the elongation of the light, which no rotation changes: the radial moment, and the length
        of the two quadrupole moments, over the flux.
    """
    over_squares, under_windows = [], []
    for width, images in squares.items():
        sums = _products(views[width], [*images, *_window_kernels(width)])
        over_squares.append(sums[:, : len(images)])
        if width in _WINDOWS:
            under_windows.append(sums[:, len(images) :])
    windows = layers.Reshape((-1, 4))(layers.Concatenate()(under_windows))
    flux, radial, plus, cross = (windows[:, :, i : i + 1] for i in range(4))
    scale = ops.sqrt(ops.square(flux) + 4)
    elongation = ops.sqrt(ops.square(plus) + ops.square(cross) + 1e-3)
    moments = layers.Concatenate()([_asinh(windows[:, :, :2]), radial / scale, elongation / scale])
    return layers.Concatenate()(over_squares), layers.Flatten()(moments)


def _products(view: keras.KerasTensor, images: list[np.ndarray]) -> keras.KerasTensor:
    """Sums of the products of a view, (N, 32, 32, 1), with each of some fixed images, (32, 32): (N, images)."""
    dense = layers.Dense(len(images), use_bias=False, trainable=False)
    dense.build((None, VIEW_SIZE**2))
    dense.set_weights([np.array([image.ravel() for image in images], np.float32).T])
    return dense(layers.Flatten()(view))


def _window_kernels(width: float) -> list[np.ndarray]:
    """Kernels of the moments under the Gaussian windows of a view, four a window, (32, 32); of unit noise."""
    x, y = np.meshgrid(*[(np.arange(VIEW_SIZE) - (VIEW_SIZE - 1) / 2) * width] * 2)
    kernels = []
    for sigma in _WINDOWS.get(width, ()):
        window = np.exp(-(x**2 + y**2) / (2 * (sigma * width) ** 2))
        for moment in (1, x**2 + y**2, x**2 - y**2, 2 * x * y):
            kernel = window * moment
            kernels.append(kernel / np.sqrt((kernel**2).sum()))
    return kernels


def _convolved(x: keras.KerasTensor, filters: int, strides: int = 1) -> keras.KerasTensor:
    x = layers.Conv2D(filters, 3, strides=strides, padding="same", use_bias=False, kernel_initializer="he_normal")(x)
    return layers.ReLU()(layers.BatchNormalization()(x))


def _residual(x: keras.KerasTensor, filters: int, code: keras.KerasTensor | None = None) -> keras.KerasTensor:
    """A residual block, whose second half is scaled and shifted by what follows from a code, if there is one."""
    y = _convolved(x, filters)
    y = layers.Conv2D(filters, 3, padding="same", use_bias=False, kernel_initializer="he_normal")(y)
    y = layers.BatchNormalization()(y)
    if code is not None:
        scale, shift = (layers.Reshape((1, 1, filters))(layers.Dense(filters)(code)) for _ in range(2))
        y = y * (1 + scale) + shift
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
        Whether the outputs hold errors after the means: log standard deviations, or with `oriented`
        a whitening matrix.
    oriented : bool
        Whether the covariance of the errors and the components of the ellipticity are predicted, too.
    inputs : frozenset of str
        Which of `sersicnet.schema.Inputs` it is shown.
    """

    build: Callable[[], keras.Model]
    log: bool
    spreads: bool
    oriented: bool = False
    inputs: frozenset[str] = frozenset({"stamps"})


ARCHITECTURES = {
    "fovea": Architecture(fovea, log=True, spreads=True, oriented=True, inputs=frozenset({"stamps", "psf", "noise"})),
    "fovea-fixed": Architecture(fovea_fixed, log=True, spreads=True),
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


def learned(core: keras.Model) -> list[keras.Variable]:
    """The variables of a new network, or of one in a file, in a fixed order; without the fixed images of `_products`.

    Versions of sersicnet that differ only in how they sum a stamp have the same ones.
    """
    fixed = {id(v) for layer in core.layers if isinstance(layer, layers.Dense) for v in layer.non_trainable_weights}
    return [variable for variable in core.weights if id(variable) not in fixed]


def freeze(core: keras.Model, *, body: bool) -> None:
    """Fix batch normalisations, which then run as in prediction; with `body` also all layers before the features."""
    features = core.layers.index(core.get_layer("features"))
    for i, layer in enumerate(core.layers):
        if isinstance(layer, keras.layers.BatchNormalization) or (body and i < features):
            layer.trainable = False


def in_bfloat16(core: keras.Model) -> keras.Model:
    """Return the same network with its convolutions in bfloat16, for training.

    Convolutions and the pooling behind them compute and return bfloat16, with sums in float32; CPUs with AMX do these
    several times as fast. Weights, normalisations, moments, dense layers and outputs stay float32.

    Parameters
    ----------
    core : keras.Model

    Returns
    -------
    keras.Model
        With weights of its own, which have the values and the order of those of `core`.

    References
    ----------
    Kalamkar et al. 2019, arXiv:1905.12322.
    """

    def copied(layer: keras.Layer) -> keras.Layer:
        config = layer.get_config()
        if isinstance(layer, layers.Conv2D | layers.MaxPooling2D):
            config["dtype"] = "mixed_bfloat16"
        return type(layer).from_config(config)

    copy = keras.models.clone_model(core, clone_function=copied)
    copy.set_weights(core.get_weights())
    return copy


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
        Sersic index, ellipticity; or (N, 8), followed by their 1 sigma errors; or (N, 17), followed by
        the six correlations of the errors (those of the first target with the second, third and fourth, and so on),
        the two components of the ellipticity, and the 1 sigma error of each of them.
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
        spread, more = ops.exp(out[:, N_TARGETS : 2 * N_TARGETS]), []
        if architecture.oriented:
            factors, components = out[:, N_TARGETS : N_TARGETS + N_FACTORS], out[:, N_TARGETS + N_FACTORS :]
            spread, correlations = _covariance(factors)
            more = [correlations, components[:, :N_ORIENTATION], ops.exp(components[:, N_ORIENTATION:])]
        spreads = layers.Rescaling([float(v) for v in np.asarray(std) * error_scale])(spread)
        for i, logarithmic in enumerate(is_log):
            sigma = spreads[:, i : i + 1]
            columns.append(sigma * columns[i] if logarithmic else sigma)
        columns += more
    return keras.Model(given, layers.Concatenate()(columns), name="sersicnet")


def _covariance(factors: keras.KerasTensor) -> tuple[keras.KerasTensor, keras.KerasTensor]:
    """Standard deviations, (N, 4), and six correlations, (N, 6), of errors that `whitening` makes independent."""
    n, k = N_TARGETS, N_TARGETS
    pivots = ops.exp(ops.clip(-1.0 * factors[:, :n], *SPREAD_LIMITS))
    rows: list[keras.KerasTensor] = []  # of the inverse matrix, by forward substitution
    for i, unit in enumerate(np.eye(n).tolist()):
        row, pivot = layers.Rescaling(unit)(pivots), pivots[:, i : i + 1]
        for known in rows:
            row = row - factors[:, k : k + 1] * pivot * known
            k += 1
        rows.append(row)
    inverse = ops.stack(rows, axis=1)
    covariance = layers.Flatten()(ops.matmul(inverse, layers.Permute((2, 1))(inverse)))
    sigmas = ops.sqrt(ops.take(covariance, [i * n + i for i in range(n)], axis=1))
    first, second = zip(*[(i, j) for i in range(n) for j in range(i + 1, n)], strict=True)
    pairs = ops.take(covariance, [i * n + j for i, j in zip(first, second, strict=True)], axis=1)
    return sigmas, pairs / (ops.take(sigmas, list(first), axis=1) * ops.take(sigmas, list(second), axis=1))


def multiply_adds(model: keras.Model) -> int:
    """Multiplications of a stamp's way through the convolutions and dense layers of a network."""
    total = 0
    for layer in model.layers:
        if isinstance(layer, layers.Conv2D):
            total += math.prod(layer.kernel.shape) * math.prod(layer.output.shape[1:3])
        elif isinstance(layer, layers.Dense):
            total += math.prod(layer.kernel.shape)
    return total


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
