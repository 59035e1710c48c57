"""What the card of trained weights states: summary, limits, calibration, domain, origin."""

from __future__ import annotations

import math
import platform
from pathlib import Path
from typing import Any

import numpy as np

import sersicnet
from sersicnet import calibration, networks, weights
from sersicnet.calibration import WITHIN_ONE_SIGMA
from sersicnet.catalogue.scores import scores
from sersicnet.dataset import Arrays, Dataset
from sersicnet.errors import InputError
from sersicnet.networks import keras
from sersicnet.orientations import QUARTER_TURNS
from sersicnet.schema import N_TARGETS, TARGET_NAMES, TARGETS, pulls
from sersicnet.training.device import device
from sersicnet.training.joined import Examples
from sersicnet.training.loop import Task, predict
from sersicnet.training.recipe import Recipe
from sersicnet.training.sets import Sets

_SIMULATED_ERRORS = (
    "Errors are calibrated on simulations; real galaxies are no Sersic profiles, and there they are too small."
)


_LIMITS = (
    "Trained on isolated galaxies of a single Sersic profile; bars, arms and neighbours were not shown to it.",
    _SIMULATED_ERRORS,
    "Stars and galaxies smaller than a pixel are outside of its domain.",
)


_REAL_LIKE = "Its real-like galaxies were invented, by `sersicnet simulate`: no real galaxy was trained on."
_WITH_NEIGHBOURS = "Trained on galaxies of a single Sersic profile; bars and arms were not shown to it."

INVENTED = "The galaxies of the other domain were invented, by `sersicnet simulate`: no real galaxy was trained on."


def summary(
    network: str,
    examples: Examples,
    real: Dataset | Arrays | None,
    adapt: str | None,
    base: weights.Weights | None,
    on_the_fly: bool,
) -> str:
    """What the network was trained on, in a sentence or two."""
    kind = "simulated galaxies, drawn on the fly, new ones in every epoch" if on_the_fly else "simulated galaxies"
    text = f"Network `{network}` trained on {kind} only."
    if real is not None:
        labelled = examples.labelled[examples.source.is_real]
        known, simulated = int(labelled.sum()), len(examples.source) - len(labelled)
        labels = {0: "without labels", len(labelled): "with their labels"}.get(known, f"{known:,} of them with labels")
        text = (
            f"Network `{network}` trained on {simulated:,} {kind} and {len(labelled):,} {kind_of(real)} ones, "
            f"{labels}, {_BY[str(adapt)]}."
        )
    return text if base is None else f"{text} It started from `{base.path.name}`."


_BY = {"dann": "against a domain classifier", "daregram": "with aligned inverse Gram matrices (DARE-GRAM)"}


def limits(task: Task, simulated: Dataset | Sets, real: Dataset | Arrays | None, *, errors: bool) -> list[str]:
    """The limits of the weights; `errors` states whether they predict errors."""
    if real is None:
        recipe = simulated.config
        first = _WITH_NEIGHBOURS if recipe.get("neighbours") else _LIMITS[0]
        if recipe.get("galaxies", "sersic") != "sersic":
            first = _REAL_LIKE
        return [first, *(limit for limit in _LIMITS[1:] if errors or limit != _SIMULATED_ERRORS)]
    judges, kind = task.labelled[slice(*task.valid_rows)], kind_of(real)
    if task.source.is_real[slice(*task.valid_rows)][judges].any():
        chosen = chosen_by(f"the {judges.sum()} labelled {kind} galaxies", "the epoch", errors=errors)
    elif errors:
        chosen = (
            "Errors are calibrated on simulations, not on the galaxies that it was adapted to without labels; "
            "nor did these choose the epoch."
        )
    else:
        chosen = "Simulated galaxies chose the epoch, not those that it was adapted to without labels."
    return [*([] if kind == "real" else [INVENTED]), chosen, _LIMITS[-1]]


def chosen_by(galaxies: str, what: str, *, errors: bool, base: str = "") -> str:
    """The limit that errors are calibrated on galaxies that also chose something; few only correct those of `base`."""
    if errors and base:
        return f"Errors are those of {base}, times factors from {galaxies} that also chose {what}."
    if errors:
        return f"Errors are calibrated on {galaxies} that also chose {what}."
    return f"It predicts no errors; {galaxies} that validated chose {what}."


FEW = 50
"""Galaxies whose errors count as much as those of the weights that training started from."""


def finished(network: str, task: Task, base: weights.Weights | None = None) -> tuple[keras.Model, dict[str, Any]]:
    """The trained network with its physical units, and its calibration.

    Parameters
    ----------
    network : str
    task : Task
    base : Weights, optional
        Weights that training started from. Fewer galaxies than a calibration needs correct its errors, with their
        calibration, by factors that are the nearer to 1 the fewer they are, see `FEW`.

    Returns
    -------
    model : keras.Model
        See `sersicnet.networks.with_units`.
    fields : dict
        What the card states of them: ``calibration``, which is None without errors, and ``quarter_turns``,
        below which error of the magnitude answers are averaged, for networks that predict the orientation.
    """
    architecture, scaling = networks.ARCHITECTURES[network], task.scaling
    scale = None
    if architecture.spreads:
        out, rows, _ = predict(task.predictor, task.source, *task.valid_rows)
        deviation = np.abs(out[:, :N_TARGETS] - task.standardised[rows]) / networks.spreads(architecture, out)
        judges = task.labelled[rows]
        if base is not None and judges.sum() < calibration.LEAST:
            return _with_errors_of(base, task)
        scale = np.quantile(deviation[judges], WITHIN_ONE_SIGMA, axis=0)
    model = networks.with_units(architecture, task.predictor, scaling.mean, scaling.std, error_scale=scale)
    if scale is None:
        return model, {"calibration": None}
    turns = QUARTER_TURNS if architecture.oriented else 0.0
    out, rows, seen = predict(model, task.source, *task.valid_rows, turns)
    counts = task.labelled[rows]
    orientation = task.source.orientation[rows[counts]] if turns else None
    table = calibration.fitted(out[counts], task.source.targets[rows[counts]], orientation, seen[counts])
    return model, {"calibration": table, **({"quarter_turns": turns} if turns else {})}


def _with_errors_of(base: weights.Weights, task: Task) -> tuple[keras.Model, dict[str, Any]]:
    """The trained network with the errors of `base`, corrected by a few galaxies."""
    architecture, scaling = networks.ARCHITECTURES[base.card["network"]], task.scaling
    source, rows = task.source, task.valid_rows
    logs = [i for i, target in enumerate(TARGETS) if target.log]
    physical, core = (predict(model, source, *rows)[0] for model in (base.keras_model(), base.core()))
    sigma = np.array(physical[:, N_TARGETS : 2 * N_TARGETS], float)
    sigma[:, logs] /= physical[:, logs]
    scale = np.median(sigma / networks.spreads(architecture, core), axis=0) / scaling.std
    turns = base.card.get("quarter_turns", 0.0)

    def model(factor: np.ndarray | float) -> keras.Model:
        error_scale = scale * factor
        return networks.with_units(architecture, task.predictor, scaling.mean, scaling.std, error_scale=error_scale)

    out, which, seen = predict(model(1.0), source, *rows, turns)
    counts = task.labelled[which]
    answers = calibration.calibrated(base.card.get("calibration"), out[counts], seen[counts])
    off = pulls(answers[:, :N_TARGETS], answers[:, N_TARGETS : 2 * N_TARGETS], source.targets[which[counts]])
    n = int(counts.sum())
    factor = np.quantile(np.abs(off), WITHIN_ONE_SIGMA, axis=0) ** (n / (n + FEW))
    kept: dict[str, Any] = {"calibration": base.card.get("calibration"), **({"quarter_turns": turns} if turns else {})}
    return model(factor), kept


def base_card(
    name: str, network: str, core: keras.Model, state: dict[str, Any], seed: int, command: str
) -> dict[str, Any]:
    """What every card states: name, command, seed, licence, how training went, and with which packages."""
    import h5py

    return {
        "name": name,
        "network": network,
        "parameters": core.count_params(),
        "command": command,
        "seed": seed,
        "licence": "MIT",
        "training": {
            "epochs": state["epoch"],
            "best_epoch": state["best_epoch"],
            "seconds": round(state["seconds"]),
            "device": device(),
            "backend": f"keras {keras.__version__}, {keras.backend.backend()}",
        },
        "versions": {
            "sersicnet": sersicnet.__version__,
            "keras": keras.__version__,
            "numpy": np.__version__,
            "h5py": h5py.__version__,
            "python": platform.python_version(),
        },
    }


def base_record(base: weights.Weights) -> dict[str, Any]:
    """What training began at, so that it can be made again: its own beginning is in there too."""
    kept = ("command", "seed", "base", "data")
    return {"name": base.path.name, "sha256": base.sha256, **{k: base.card[k] for k in kept if k in base.card}}


def domain_of(simulated: Dataset | Sets, recipe: Recipe) -> dict[str, Any]:
    """The images and galaxies that a network was trained on; see `sersicnet.domain`."""
    instrument, prior = simulated.config["instrument"], simulated.config["prior"]
    if simulated.config.get("telescopes"):
        return _of_telescopes(simulated)
    widths = [psf["fwhm"] for psf in simulated.config.get("psfs", [])] or [simulated.config["psf_fwhm"]]
    scatter = simulated.config.get("psf_scatter", 0.0)
    ranges = {name: list(prior[name]) for name in TARGET_NAMES}
    ranges["mag"][1] = min(ranges["mag"][1], recipe.faint_limit)
    return {
        "instrument": instrument["name"],
        "pixel_scale": instrument["pixel_scale"],
        "zero_point": instrument["zero_point"],
        "psf_fwhm": simulated.config["psf_fwhm"],
        "psf_fwhm_range": [min(widths) * (1 - scatter), max(widths) * (1 + scatter)],
        "rms": [instrument["rms_low"], instrument["rms_high"] * math.hypot(1, recipe.noise)],
        "ranges": ranges,
    }


MOST = (0.5, 99.5)
"""Percentiles between which values are inside of the domain of weights for any telescope."""


def _of_telescopes(simulated: Dataset | Sets) -> dict[str, Any]:
    """The domain of images of many telescopes: their PSFs, noise and galaxies, in pixels and units of the noise."""
    from sersicnet.image.views import shape_of

    truth, views = simulated.truth, simulated.views
    assert views is not None
    numbers, first = np.unique(truth["psf"].astype(int), return_index=True)
    fwhm = truth["fwhm"][first]
    shapes = np.array([shape_of(views[number], width) for number, width in zip(numbers, fwhm, strict=True)])
    psf = {"fwhm": fwhm, "light_1": shapes[:, 0], "light_2": shapes[:, 1], "ellipticity": shapes[:, 2]}
    between = {name: np.percentile(values, MOST).round(4).tolist() for name, values in psf.items()}
    # The widest and the narrowest are what a user asks for first; light and ellipticity have outliers.
    between["fwhm"] = [round(float(fwhm.min()), 2), round(float(fwhm.max()), 2)]
    ranges = np.percentile(simulated.targets, MOST, axis=0).T
    targets = simulated.targets
    ranges[2:, 0], ranges[2:, 1] = targets[:, 2:].min(axis=0), targets[:, 2:].max(axis=0)
    return {
        "instrument": simulated.config["instrument"]["name"],
        "telescopes": simulated.config["telescopes"],
        "psf": between,
        "correlation": [float(truth["correlation"].min()), float(truth["correlation"].max())],
        "radius_over_fwhm": np.percentile(truth["r_eff_pix"] / truth["fwhm"], MOST).round(4).tolist(),
        "ranges": {name: pair.round(4).tolist() for name, pair in zip(TARGET_NAMES, ranges, strict=True)},
    }


def calibrated_domain(base: weights.Weights, simulated: Dataset | Sets, n: int) -> dict[str, Any]:
    """The domain of weights that are calibrated again on the first `n` galaxies of a set.

    For weights for any telescope, the ranges of the width of the PSF and of the correlation of the noise shrink to
    those of these galaxies, because a calibration depends on both and is not tested outside of them. The other ranges
    remain those of `base`.

    Raises
    ------
    InputError
        If no width of the PSF, or no correlation of the noise, is both in the domain of `base` and in the set.
    """
    domain = dict(base.card["domain"])
    if not domain.get("telescopes") or not simulated.config.get("telescopes"):
        return domain

    def common(what: str, of_base: list[float], column: str) -> list[float]:
        values = simulated.truth[column][:n]
        low, high = max(of_base[0], float(values.min())), min(of_base[1], float(values.max()))
        if low > high:
            raise InputError(
                f"A calibration is for images that {base.name} is for, with {what} of "
                f"{of_base[0]:.2f} to {of_base[1]:.2f}; received {values.min():.2f} to {values.max():.2f}. "
                "Train on such images instead."
            )
        return [low, high]

    width = common("a width of the PSF", domain["psf"]["fwhm"], "fwhm")
    domain["psf"] = domain["psf"] | {"fwhm": [round(value, 2) for value in width]}
    domain["correlation"] = common("a correlation of the noise", domain["correlation"], "correlation")
    return domain


def data_record(simulated: Dataset | Sets, n: int) -> dict[str, Any]:
    """The simulated training set of `n` galaxies."""
    return {
        "n": n,
        "sha256": simulated.sha256(),
        "command": simulated.config["command"],
        "config": simulated.config,
        "versions": simulated.versions,
    }


def kind_of(real: Dataset | Arrays) -> str:
    """What the galaxies of the other domain are, for the card: only those of an image are real."""
    recipe = real.config if isinstance(real, Dataset) else real.recipe
    if recipe is None:
        return "real"
    return "real-like" if recipe.get("galaxies") == "real-like" else "simulated"


def real_record(real: Dataset | Arrays, n: int, command: str) -> dict[str, Any]:
    """The `n` galaxies of the other domain."""
    recipe = real.config if isinstance(real, Dataset) else real.recipe
    return {"n": n, "sha256": real.sha256(), "command": recipe["command"] if recipe else command, "config": recipe}


def saved(output: Path, model: keras.Model, card: dict[str, Any], test: str | Path | None) -> weights.Weights:
    """Write the weights, with their scores on the dataset `test` if one is given."""
    if test is not None:
        with Dataset(test) as other:
            answers = predict(model, other, 0, len(other), card.get("quarter_turns", 0.0))
            card["scores"] = scores_on(other, card, *answers)
    return weights.save(output, model, card)


def scores_on(
    test: Dataset, card: dict[str, Any], out: np.ndarray, rows: np.ndarray, seen: np.ndarray
) -> dict[str, Any]:
    """The scores of a card from the answers for rows of a dataset, and what the network saw of their images."""
    found = weights.Prediction.of(card, out, seen)
    return {
        "test_set": f"{len(test):,} stamps of `{test.config['command']}`",
        "samples": scores(test.targets[rows], found.targets, found.errors, test.mag[rows]),
    }
