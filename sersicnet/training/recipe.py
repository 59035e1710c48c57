"""How networks are trained: `Recipe`, and one for each network and way of training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sersicnet.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes
    ----------
    epochs : int
        At most this many.
    batch : int
    learning_rate : float
        At the start, or at its peak when annealed.
    anneal : bool
        Whether the rate warms up over 3 % of the steps and follows a cosine to zero.
    patience : int
        Epochs without improvement of the validation error before training stops.
    symmetries : bool
        Whether each stamp is shown in a random one of its eight orientations.
    faint_limit : float
        Galaxies fainter than this AB magnitude are left out.
    alpha : float
        Weight of the regression against the alignment of domains (adaptation only).
    noise : float
        Noise is added to each stored stamp, with an rms between 0 and this factor times that of the
        stamp, different in every epoch. The magnitude relative to the noise changes with it.
    keep_norms : bool
        Whether batch normalisations keep the moments and factors of the weights that training
        starts from: the moments of batches that mix two domains describe neither domain.
    bfloat16 : bool
        Whether convolutions compute in bfloat16 while the network trains; see `sersicnet.networks.in_bfloat16`.
    """

    epochs: int
    batch: int
    learning_rate: float
    anneal: bool
    patience: int
    symmetries: bool
    faint_limit: float = 99.0
    alpha: float = 0.9
    noise: float = 0.0
    keep_norms: bool = False
    bfloat16: bool = False

    def check(self) -> None:
        """Refuse a rate or a weight that training cannot use, with an `InputError`."""
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"A learning rate is positive; received {self.learning_rate}. Try 0.0005.")
        if not 0 <= self.alpha <= 1:
            raise InputError(f"The weight of the regression is from 0 to 1; received {self.alpha}. Try 0.9.")


_FOVEA = Recipe(epochs=7, batch=64, learning_rate=1.5e-3, anneal=True, patience=7, symmetries=True)

RECIPES = {
    "fovea": _FOVEA,
    "fovea-fixed": _FOVEA,
    "tl": Recipe(
        epochs=100, batch=16, learning_rate=1e-4, anneal=False, patience=10, symmetries=False, faint_limit=23.0
    ),
    "dann": Recipe(epochs=300, batch=16, learning_rate=1e-4, anneal=False, patience=20, symmetries=False),
}


_ADAPT_FOVEA = Recipe(
    epochs=30, batch=64, learning_rate=5e-4, anneal=True, patience=30, symmetries=True, keep_norms=True
)

ADAPT = {
    "fovea": _ADAPT_FOVEA,
    "fovea-fixed": _ADAPT_FOVEA,
    "tl": RECIPES["tl"],
    "dann": RECIPES["dann"],
}
"""For training with real galaxies; that of ``dann`` is the study's."""


_FINETUNE_FOVEA = Recipe(epochs=15, batch=32, learning_rate=3e-4, anneal=True, patience=15, symmetries=True)

FINETUNE = {
    "fovea": _FINETUNE_FOVEA,
    "fovea-fixed": _FINETUNE_FOVEA,
    "tl": Recipe(epochs=15, batch=8, learning_rate=1e-4, anneal=False, patience=15, symmetries=False, faint_limit=23.0),
    "dann": Recipe(epochs=15, batch=8, learning_rate=1e-4, anneal=False, patience=15, symmetries=False),
}
"""For transfer learning; those of ``tl`` and ``dann`` are the study's, with the best validation error kept."""

# Defaults of `adapt` and `finetune`, in Python and on the command line.

ALIGNMENT = "none"
"""Besides matched simulations, whether `adapt` aligns features with the mosaic's own galaxies."""

SIMULATED = 20_000
"""Galaxies that `adapt` simulates."""

ADAPT_EPOCHS = 3

SCHEDULE = "auto"
"""Layers that `finetune` trains."""

FINETUNE_EPOCHS = _FINETUNE_FOVEA.epochs
"""Those of every network in `FINETUNE`."""
