"""Structural parameters of galaxies from images, by convolutional networks.

The verbs are functions, and what they take and return are plain objects::

    import sersicnet

    exposure = sersicnet.Exposure.of_arrays(data, zero_point=25.9463, pixel_scale=0.06)
    catalogue = sersicnet.measure(exposure)

A name is imported when it is first used: ``import sersicnet`` itself takes no time.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    # verbs
    "measure": "measuring.measure",
    "fit": "measuring.measure",
    "plan": "measuring.measure",
    "validate": "measuring.validate",
    "measure_bands": "measuring.bands",
    "fit_bands": "measuring.bands",
    "find_psf": "measuring.seeing",
    "simulate": "simulating.simulate",
    "simulate_field": "simulating.field",
    "train": "training.train",
    "finetune": "training.finetune",
    "adapt": "training.adapt",
    "evaluate": "evaluating.evaluate",
    "evaluate_catalogue": "evaluating.evaluate",
    # what they take and return
    "Catalogue": "catalogue.measured",
    "Exposure": "image.exposure",
    "Psf": "image.psf",
    "read_psf": "image.psffile",
    "Progress": "progress",
    "Fitting": "measuring.fitting",
    "Band": "measuring.bands",
    "Outputs": "measuring.outputs",
    "Work": "measuring.plan",
    "Injection": "measuring.injecting",
    "Validation": "catalogue.validation",
    "Weights": "weights",
    "Dataset": "dataset",
    "Simulation": "simulating.recipe",
    "Prior": "simulating.recipe",
    "Field": "simulating.field",
    "Recipe": "training.recipe",
    "real_galaxies": "training.labels",
    # the engine
    "Renderer": "engine.render",
    "parameters_of": "engine.render",
    "Fitter": "engine.fit",
    "Noise": "engine.fit",
    # errors and warnings
    "SersicnetError": "errors",
    "InputError": "errors",
    "DatasetError": "errors",
    "WeightsError": "errors",
    "OutputError": "errors",
    "WorkError": "errors",
    "SersicnetWarning": "errors",
}
"""The module of each public name."""

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
