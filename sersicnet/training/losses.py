"""What training minimises: the regression's loss, the alignment of two domains, and both together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from sersicnet import networks
from sersicnet.networks import keras, ops, shown
from sersicnet.schema import N_TARGETS, Inputs
from sersicnet.training.device import jit
from sersicnet.training.recipe import Recipe


def spread_loss(true: Any, out: Any) -> Any:
    """Gaussian likelihood, weighted by the predicted deviation.

    The weight keeps galaxies with large errors from being given up on
    (beta-NLL, beta = 0.5; Seitzer et al. 2022, arXiv:2203.09168).
    """
    mean, log_spread = out[:, :N_TARGETS], out[:, N_TARGETS:]
    squared = ops.square((true - mean) * ops.exp(-log_spread))
    return ops.mean(ops.stop_gradient(ops.exp(log_spread)) * (0.5 * squared + log_spread), axis=-1)


BETA = 0.25
"""Power of the errors that the likelihood is weighted by; see `covariance_loss`."""

OUTLIER = 4.0
"""Deviation, in standard deviations of all targets together, beyond which the likelihood rises linearly."""


def covariance_loss(true: Any, out: Any) -> Any:
    """Gaussian likelihood of four targets with their covariance, and of the two components of the ellipticity.

    Deviations of more than `OUTLIER` count linearly (Huber). The likelihood is weighted by a power of the mean
    predicted deviation, so that galaxies with large errors are not given up on (beta-NLL;
    Seitzer et al. 2022, arXiv:2203.09168). Components that are NaN do not count.
    """
    n, border = N_TARGETS, N_TARGETS + networks.N_FACTORS
    matrix = networks.whitening(out[:, n:border])
    logarithms = ops.clip(out[:, n : 2 * n], -networks.SPREAD_LIMITS[1], -networks.SPREAD_LIMITS[0])
    white = ops.matmul(matrix, ops.expand_dims(true[:, :n] - out[:, :n], -1))[..., 0]
    likelihood = _huber(ops.sum(ops.square(white), axis=-1)) - ops.sum(logarithms, axis=-1)
    weight = ops.stop_gradient(ops.exp(-BETA * ops.mean(logarithms, axis=-1)))
    spread = out[:, -1]
    known = ops.isfinite(true[:, n])
    apart = ops.where(known[:, None], true[:, n:], out[:, border:-1]) - out[:, border:-1]
    turned = _huber(ops.sum(ops.square(apart), axis=-1) * ops.exp(-2 * spread)) + 2 * spread
    turned = ops.where(known, ops.stop_gradient(ops.exp(BETA * spread)) * turned, 0.0)
    return weight * likelihood / n + turned / 2


def _huber(squared: Any) -> Any:
    """Half of a square up to `OUTLIER`, linear in its root beyond."""
    root = ops.sqrt(ops.maximum(squared, OUTLIER**2))
    return ops.where(squared < OUTLIER**2, 0.5 * squared, OUTLIER * (root - 0.5 * OUTLIER))


REGRESSION = {"fovea": covariance_loss, "fovea-fixed": spread_loss, "tl": "mae", "dann": "mse"}
"""What the regression of each network minimises; for ``tl`` and ``dann`` as in the study."""


GRAM_SHARE = 0.99
"""Fraction of the features' power in the principal directions that `gram_distance` compares."""


def gram_distance(domain: Any, features: Any) -> Any:
    """How much the inverse Gram matrices of two domains' features differ (DARE-GRAM).

    A linear regression on features z is (Z^T Z)^-1 Z^T y: where the inverse
    Gram matrices of both domains agree, so do their regressions, wherever the
    features themselves lie. Compared are the angles between the columns of the
    pseudo-inverses, and the eigenvalues, of as many principal directions as hold
    `GRAM_SHARE` of the power in both domains.

    Two things differ from the paper. Gram matrices are means instead of sums
    over galaxies, so that domains with unlike numbers can be compared; and the
    difference of eigenvalues is relative to their sizes, for features have no
    unit. No eigenvector is differentiated, which equal eigenvalues would spoil:
    derivatives are those of a pseudo-inverse of constant rank (Golub & Pereyra
    1973), as if the directions left out had no power.

    Parameters
    ----------
    domain : tensor, float, (N, 2)
        1 for real galaxies and 0 for others; and a factor on the result.
    features : tensor, float, (N, F)

    Returns
    -------
    tensor, float, (N,)
        The same number times the factor of each galaxy.

    References
    ----------
    Nejjar, Wang & Fink 2023, CVPR, arXiv:2303.13325.
    """
    z = ops.concatenate([ops.ones_like(features[:, :1]), features], axis=1)
    grams, bases, powers = [], [], []
    for mask in (1 - domain[:, :1], domain[:, :1]):
        gram = ops.matmul(ops.transpose(z * mask), z * mask) / ops.maximum(ops.sum(mask), 1.0)
        values, vectors = ops.eigh(ops.stop_gradient(gram))
        grams.append(gram)
        powers.append(ops.maximum(ops.flip(values, axis=0), 0.0))
        bases.append(ops.stop_gradient(ops.flip(vectors, axis=1)))
    before = [(ops.cumsum(p) - p) / ops.maximum(ops.sum(p), 1e-12) for p in powers]
    principal = ops.minimum(*before) < GRAM_SHARE
    inverses, sizes = [], []
    for gram, basis, power in zip(grams, bases, powers, strict=True):
        floor = 1e-6 * power[0] + 1e-12
        kept = ops.cast(ops.logical_and(principal, power > floor), power.dtype)
        inverse = kept / ops.maximum(power, floor)
        # Zero, but it carries the derivative.
        change = ops.matmul(ops.transpose(basis), ops.matmul(gram - ops.stop_gradient(gram), basis))
        turned = ops.square(inverse)[:, None] * (1 - kept)[None, :]
        slope = turned + ops.transpose(turned) - inverse[:, None] * inverse[None, :]
        middle = ops.diag(inverse) + slope * change
        inverses.append(ops.matmul(basis, ops.matmul(middle, ops.transpose(basis))))
        sizes.append(kept * (power + ops.diagonal(change)))
    lengths = [ops.sqrt(ops.sum(ops.square(m), axis=0) + 1e-12) for m in inverses]
    cosines = (ops.sum(inverses[0] * inverses[1], axis=0) + 1e-12) / (lengths[0] * lengths[1])
    unlike = [ops.sqrt(ops.sum(ops.square(v)) + 1e-12) for v in (sizes[0] - sizes[1], sizes[0], sizes[1])]
    distance = ops.mean(ops.abs(1 - cosines)) + unlike[0] / (unlike[1] + unlike[2])
    return domain[:, 1] * distance


ALIGNMENTS = ("dann", "daregram")


WARM_UP = 0.03
"""Fraction of the steps over which an annealed learning rate rises."""


class WarmCosine(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that warms up over 3 % of the steps and follows a cosine to zero.

    The cosine spans the whole run and the warm-up multiplies it. Keras's own ``CosineDecay``
    begins its cosine after the warm-up, which is another rate than that of the shipped weights.

    Parameters
    ----------
    peak : float
    steps : int
        Of the whole run.
    """

    def __init__(self, peak: float, steps: int) -> None:
        self.peak, self.steps = peak, steps

    def __call__(self, step: Any) -> Any:
        """The rate of a step, counted from 0."""
        done = ops.cast(step, "float32") / self.steps
        warm = ops.minimum(1.0, done / WARM_UP + 1e-3)
        # The square of a cosine is (1 + cos(pi done)) / 2, and keeps its digits near the end.
        return self.peak * warm * ops.square(ops.cos(0.5 * math.pi * done))

    def get_config(self) -> dict[str, Any]:
        """The arguments, as Keras asks for them."""
        return {"peak": self.peak, "steps": self.steps}


def optimizer(recipe: Recipe, steps: int) -> keras.optimizers.Optimizer:
    """The optimiser of a run of so many steps."""
    if recipe.anneal:
        return keras.optimizers.AdamW(WarmCosine(recipe.learning_rate, steps))
    return keras.optimizers.Adam(recipe.learning_rate)


def learning_rate(recipe: Recipe, steps: int, step: int) -> float:
    """The learning rate of a step, counted from 0, of a run of so many steps."""
    if not recipe.anneal:
        return recipe.learning_rate
    return float(ops.convert_to_numpy(WarmCosine(recipe.learning_rate, steps)(step)))


Arguments = Callable[[Inputs, np.ndarray, np.ndarray, float], tuple[Any, Any, Any]]
"""Inputs, their standardised targets, their rows and the fraction of the run that is done -> x, y and weights.

What `train_on_batch` takes.
"""


def regression(core: keras.Model, recipe: Recipe, steps: int) -> tuple[keras.Model, Arguments]:
    """A network compiled for the regression alone, and what a step passes to it."""
    core.compile(optimizer(recipe, steps), loss=REGRESSION[core.name], jit_compile=jit())
    return core, lambda inputs, learned, rows, done: (shown(core, inputs), learned, None)


def aligned(
    core: keras.Model,
    adapt: str,
    is_real: np.ndarray,
    labelled: np.ndarray,
    recipe: Recipe,
    steps: int,
) -> tuple[keras.Model, Arguments]:
    """Regression and alignment together, as ``alpha * regression + (1 - alpha) * alignment``.

    The regression is a mean over the labelled galaxies of the batch, whatever
    their fraction, so that alpha keeps its meaning. The strength of the
    alignment rises from 0 to 1 over the run (Ganin & Lempitsky 2015): features
    that mean nothing yet are not worth aligning.
    """
    loss: Any = "sparse_categorical_crossentropy"
    if adapt == "dann":
        model, second = networks.with_adversary(core), "domain"
    else:
        outputs = {"means": core.output, "features": core.get_layer("features").output}
        model, second, loss = keras.Model(core.input, outputs), "features", gram_distance
    model.compile(
        optimizer(recipe, steps),
        loss={"means": REGRESSION[core.name], second: loss},
        loss_weights={"means": recipe.alpha, second: 1 - recipe.alpha},
        jit_compile=jit(),
    )

    def arguments(inputs: Inputs, learned: np.ndarray, rows: np.ndarray, done: float) -> tuple[Any, Any, Any]:
        n, given = len(rows), shown(core, inputs)
        strength = np.full((n, 1), 2 / (1 + math.exp(-10 * done)) - 1, np.float32)
        real = is_real[rows]
        known = labelled[rows].astype(np.float32)
        weight = {"means": known * (n / max(1.0, known.sum())), second: np.ones(n, np.float32)}
        if adapt == "dann":
            return [given, strength], {"means": learned, second: real.astype(np.int32)}, weight
        domain = np.column_stack([real.astype(np.float32), strength])
        return given, {"means": learned, second: domain}, weight

    return model, arguments
