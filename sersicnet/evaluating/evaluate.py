"""Truth against measurement: scores, tables and figures.

Of weights on stamps whose truth is known, and of a catalogue beside a table of truth.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sersicnet import weights
from sersicnet.catalogue.crossmatch import on_sphere, pairs
from sersicnet.catalogue.parameters import Galaxies, holds_table
from sersicnet.errors import InputError
from sersicnet.output import check_directory, whole_directory
from sersicnet.schema import N_TARGETS, TARGET_NAMES, TARGETS, encode

if TYPE_CHECKING:
    from sersicnet.dataset import Arrays, Dataset

CHUNK = 512
"""Stamps read before they go through the network: 32 MB."""

BRIGHT = 23.0
"""The study's magnitude limit."""

MAG_EDGES = (16, 18, 20, 21, 22, 23, 24, 25, 26, 27)
SNR_EDGES = (0, 1, 3, 10, 30, 100, 300, 1000, np.inf)
OUTLIER = 0.5

TOLERANCE = {"sky": 0.3, "pixels": 5.0}
"""How far a source of a catalogue may lie from its true place: arcsec on the sky, else pixels."""

DOMAIN_STAMPS = 1000
"""Galaxies of each domain that the classifier sees, at most."""

_FOLDS = 5
_RIDGE = 0.01

Report = Callable[[str, int, int], None]
"""Receives what is done, and how many of how many are; of 0 where nothing is counted."""


class Measured(NamedTuple):
    """What weights, or a catalogue, say of the galaxies.

    Attributes
    ----------
    predicted : ndarray, float64, (N, 4)
        In the order of `sersicnet.schema.TARGETS`, magnitudes AB.
    errors : ndarray, float64, (N, 4) or None
        Their 1 sigma errors.
    sha256 : str
        Of the network, or of the catalogue.
    """

    predicted: np.ndarray
    errors: np.ndarray | None
    sha256: str


def r_squared(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Coefficient of determination, ``1 - sum (y - f)^2 / sum (y - mean y)^2``."""
    return float(1 - np.sum((truth - predicted) ** 2) / np.sum((truth - truth.mean()) ** 2))


def scores(
    truth: np.ndarray, predicted: np.ndarray, errors: np.ndarray | None = None, mag: np.ndarray | None = None
) -> dict[str, Any]:
    """Scores a parameter, for all galaxies and for those of mag <= 23.

    Parameters
    ----------
    truth, predicted : ndarray, float, (N, 4)
        In physical units, in the order of `sersicnet.schema.TARGETS`. Rows with
        a NaN in either are left out and counted.
    errors : ndarray, float, (N, 4), optional
        1 sigma errors of `predicted`.
    mag : ndarray, float, (N,), optional
        True AB magnitudes, where those of `truth` and `predicted` are relative to the noise:
        what is scored is apparent.

    Returns
    -------
    dict
        For ``all`` and ``mag <= 23``: ``n``, ``missing``, and for each
        parameter ``r2``, ``bias`` (median error), ``scatter`` (68 % of the
        deviations from it) and, with errors, ``coverage`` (within 1 sigma).
    """
    if mag is not None:
        shift = np.zeros((len(truth), len(TARGETS)))
        shift[:, 0] = mag - truth[:, 0]
        truth, predicted = truth + shift, predicted + shift
    mag = truth[:, 0]
    samples = {}
    for name, chosen in (("all", np.ones(len(truth), bool)), (f"mag <= {BRIGHT:g}", mag <= BRIGHT)):
        good = chosen & np.isfinite(truth).all(axis=1) & np.isfinite(predicted).all(axis=1)
        found: dict[str, Any] = {"n": int(good.sum()), "missing": int((chosen & ~good).sum())}
        if found["n"] > 1:
            difference = predicted[good] - truth[good]
            bias = np.median(difference, axis=0)
            values = {
                "r2": [r_squared(truth[good, i], predicted[good, i]) for i in range(len(TARGETS))],
                "bias": bias,
                "scatter": np.quantile(np.abs(difference - bias), 0.6827, axis=0),
            }
            if errors is not None:
                values["coverage"] = np.mean(np.abs(difference) <= errors[good], axis=0)
            for quantity, row in values.items():
                found[quantity] = {t.name: float(v) for t, v in zip(TARGETS, row, strict=True)}
        samples[name] = found
    return samples


def by_magnitude(truth: np.ndarray, predicted: np.ndarray, errors: np.ndarray | None = None) -> list[dict[str, Any]]:
    """The statistics of `binned` in bins of true AB magnitude."""
    return binned(truth[:, 0], MAG_EDGES, truth, predicted, errors)


def binned(
    values: np.ndarray,
    edges: Sequence[float],
    truth: np.ndarray,
    predicted: np.ndarray,
    errors: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """The statistics of the Euclid Morphology Challenge in bins of something.

    Errors are absolute in magnitude and axis ratio, relative in the radius, and
    of log10 of the index. Their median is the bias, the half-width that holds
    68 % of the deviations from it the dispersion, and outliers are off by more
    than 0.5.

    Parameters
    ----------
    values : ndarray, float, (N,)
        What the bins are of, such as magnitudes; NaN is in none.
    edges : sequence of float
        Borders of the bins, ascending.
    truth, predicted, errors
        As for `scores`; magnitudes are AB.

    Returns
    -------
    list of dict
        For each bin with at least ten galaxies: ``range``, with None for no upper end, ``n``, and a
        dict for each parameter with ``bias``, ``dispersion``, ``outliers`` and,
        with errors, ``within68`` and ``within95``: the fractions of truths within 1 and
        1.96 sigma.

    References
    ----------
    Bretonniere et al. 2023, A&A 671, A102.
    """
    rows = []
    for low, high in pairwise(edges):
        good = (values >= low) & (values < high)
        good &= np.isfinite(truth).all(axis=1) & np.isfinite(predicted).all(axis=1)
        if good.sum() < 10:
            continue
        t, p = truth[good], predicted[good]
        with np.errstate(invalid="ignore", divide="ignore"):
            off = np.column_stack(
                [p[:, 0] - t[:, 0], p[:, 1] / t[:, 1] - 1, np.log10(p[:, 2] / t[:, 2]), t[:, 3] - p[:, 3]]
            )
        row: dict[str, Any] = {"range": [low, high if np.isfinite(high) else None], "n": int(good.sum())}
        for i, target in enumerate(TARGETS):
            bias = float(np.median(off[:, i]))
            row[target.name] = {
                "bias": bias,
                "dispersion": float(np.quantile(np.abs(off[:, i] - bias), 0.6827)),
                "outliers": float((np.abs(off[:, i]) > OUTLIER).mean()),
            }
            if errors is not None:
                pull = np.abs(p[:, i] - t[:, i]) / errors[good, i]
                row[target.name]["within68"] = float((pull <= 0.9945).mean())
                row[target.name]["within95"] = float((pull <= 1.96).mean())
        rows.append(row)
    return rows


def signal_to_noise(data: Dataset) -> np.ndarray:
    """Signal to noise of simulated galaxies: of half of their light, over the noise of the ellipse that holds it.

    The ellipse is that of R_e, widened by the PSF: its semi-axes are ``hypot(R_e, w)``
    and ``hypot(q R_e, w)``, with w half of the PSF's full width at half maximum. The
    noise is that of an area so large, which correlation makes larger than that of
    independent pixels (2.2 times for drizzled F160W images), with the Poisson
    noise of the galaxy. For galaxies of the uniform prior it is 0.7 to 0.9 times that
    of a matched filter (medians; 0.52 to 1.3 for 90 % of them).

    Parameters
    ----------
    data : Dataset

    Returns
    -------
    ndarray, float64, (N,)
    """
    from sersicnet.simulating.telescopes import Instrument

    preset = data.config["instrument"]
    taken_with = Instrument(**{**preset, "pixels": tuple(preset["pixels"])})
    truth = data.truth
    half = 0.5 * 10 ** (-0.4 * (truth["mag"] - data.zero_point))
    width = data.config["psf_fwhm"] / data.pixel_scale / 2 * truth.get("psf_stretch", 1.0)
    r_eff, q = truth["r_eff_pix"], 1 - truth["ellipticity"]
    area = np.pi * np.hypot(r_eff, width) * np.hypot(q * r_eff, width)
    variance = truth["rms"] ** 2 * taken_with.autocorrelation().sum() * area
    return half / np.sqrt(variance + half / taken_with.exposure)


def evaluate(
    data: str | Path,
    weights_names: str | Path | Sequence[str | Path] = weights.DEFAULT,
    output: str | Path | None = None,
    *,
    image: str | Path | None = None,
    zero_point: float | None = None,
    limits: bool = False,
    domains: str | Path | None = None,
    overwrite: bool = False,
    report: Report = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Score weights on stamps whose truth is known.

    Parameters
    ----------
    data : str or Path
        Dataset from `sersicnet simulate`, or a CSV file of labelled galaxies.
    weights_names : str or Path, or a sequence of them
        Names of shipped weights, or weights directories.
    output : str or Path, optional
        Directory for ``scores.json``, ``scores.md`` and three figures: predicted
        against true, both distributions, and errors by magnitude.
    image, zero_point
        For CSV files: see `sersicnet.training.labels.read_labels`.
    limits : bool
        Whether to say what the noise allows, see `sersicnet.simulating.fisher`, for at most
        `sersicnet.simulating.fisher.GALAXIES` of a dataset. It takes 0.15 s a galaxy.
    domains : str or Path, optional
        Stamps of another domain, a dataset or a CSV file: whether a linear classifier
        can tell the domains apart by the networks' features, see `domain_accuracy`.
        It needs Keras.
    overwrite : bool
        Whether to replace `output`.
    report : callable
        See `Report`.

    Returns
    -------
    dict
        ``data``; ``scores``, for each weights by name ``sha256``, ``samples`` as from
        `scores`, ``by_magnitude`` and, where it is known, ``by_snr``. With `limits`
        ``limits``: ``n``, ``estimates`` by what is known of the sky, and ``weights`` on
        the same galaxies, all with ``samples``. With `domains` ``domains``: ``data``, the numbers
        ``n``, and for each weights ``accuracy`` and its ``error``.

    Raises
    ------
    SersicnetError
        If the data, weights or the output cannot be used.
    """
    from sersicnet.dataset import Dataset

    output = _checked(output, overwrite)
    names = [weights_names] if isinstance(weights_names, str | Path) else list(weights_names)
    networks = _labelled(names)
    result: dict[str, Any] = {"data": str(data)}
    with _opened(data, image, zero_point) as source:
        simulated = source if isinstance(source, Dataset) else None
        if limits and simulated is None:
            raise InputError(
                f"The limit is computed for datasets of `sersicnet simulate`; received {data} with --limits."
            )
        # Relative and AB magnitudes differ by what truth and prediction share.
        truth, shift = source.targets.copy(), source.mag - source.targets[:, 0]
        truth[:, 0] = source.mag
        snr = signal_to_noise(source) if isinstance(source, Dataset) else source.snr
        bounds = None if simulated is None or not limits else _estimates(simulated, report)
        if domains is not None:
            with _opened(domains, image, zero_point) as other:
                result["domains"] = {"data": str(domains), **_domains(source, other, networks, report)}
        measured = _measured(source, networks, shift, report)
    result["scores"] = {label: _scored(truth, found, snr) for label, found in measured.items()}
    if bounds is not None:
        rows, estimates = bounds
        result["limits"] = {
            "n": len(rows),
            "estimates": {name: _of_draws(truth[rows], means) for name, means in estimates.items()},
            "weights": {
                label: {"samples": scores(truth[rows], found.predicted[rows])} for label, found in measured.items()
            },
        }
    if output is not None:
        _write_report(output, result, truth, measured)
    return result


def _checked(output: str | Path | None, overwrite: bool) -> Path | None:
    if output is None:
        return None
    check_directory(Path(output), "scores.json", overwrite)
    return Path(output)


def _labelled(names: Sequence[str | Path]) -> dict[str, weights.Weights]:
    """Weights by the name on their card, or as they were given if cards share names."""
    loaded = [weights.load(name) for name in names]
    cards = [network.name for network in loaded]
    labels = [card if cards.count(card) == 1 else str(name) for card, name in zip(cards, names, strict=True)]
    if len(set(labels)) < len(labels):
        raise InputError(f"Each weights are scored once; received {', '.join(map(str, names))}.")
    return dict(zip(labels, loaded, strict=True))


def _opened(
    data: str | Path, image: str | Path | None, zero_point: float | None
) -> AbstractContextManager[Dataset | Arrays]:
    from sersicnet.dataset import Dataset
    from sersicnet.training.labels import read_labels

    if holds_table(data):
        return nullcontext(read_labels(data, image, zero_point))
    return Dataset(data)


def _estimates(source: Dataset, report: Report) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    from sersicnet.simulating import fisher as limits

    return limits.of_dataset(
        source, most=limits.GALAXIES, report=lambda done, total: report("computing the limit", done, total)
    )


def _of_draws(truth: np.ndarray, means: np.ndarray) -> dict[str, Any]:
    """The scores of several estimates of each galaxy, (draws, N, 4)."""
    repeated, flat = np.tile(truth, (len(means), 1)), means.reshape(-1, N_TARGETS)
    samples, rows = scores(repeated, flat), by_magnitude(repeated, flat)
    for counted in (*samples.values(), *rows):
        counted["n"] //= len(means)
    return {"samples": samples, "by_magnitude": rows}


def _measured(
    source: Dataset | Arrays, networks: Mapping[str, weights.Weights], shift: np.ndarray, report: Report
) -> dict[str, Measured]:
    """Predictions and errors of each of the networks, for all stamps."""
    shape = (len(source), N_TARGETS)
    out = {
        label: Measured(np.empty(shape), np.empty(shape) if network.card["errors"] else None, network.sha256)
        for label, network in networks.items()
    }
    for first in range(0, len(source), CHUNK):
        report("measuring", first, len(source))
        rows = slice(first, min(first + CHUNK, len(source)))
        inputs = source.inputs(rows.start, rows.stop)
        for label, network in networks.items():
            predicted, errors = network.predict(inputs)
            out[label].predicted[rows] = predicted
            held = out[label].errors
            if held is not None:
                held[rows] = errors
    report("measuring", len(source), len(source))
    for found in out.values():
        found.predicted[:, 0] += shift
    return out


def _scored(truth: np.ndarray, found: Measured, snr: np.ndarray | None) -> dict[str, Any]:
    out = {
        "sha256": found.sha256,
        "samples": scores(truth, found.predicted, found.errors),
        "by_magnitude": by_magnitude(truth, found.predicted, found.errors),
    }
    if snr is not None:
        out["by_snr"] = binned(snr, SNR_EDGES, truth, found.predicted, found.errors)
    return out


# --- a catalogue ---------------------------------------------------------------------------------------------


def evaluate_catalogue(
    catalogue: str | Path,
    truth: str | Path,
    output: str | Path | None = None,
    *,
    tolerance: float | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Score a catalogue beside a table of what is true.

    Sources are matched on the sky where both tables have ``ra`` and ``dec``, else in
    pixels (``x`` and ``y``, from 0): each with the nearest true galaxy, if it is the nearest
    source of that galaxy too.

    Parameters
    ----------
    catalogue : str or Path
        As `sersicnet measure` and `sersicnet fit` write it.
    truth : str or Path
        Table with ``mag`` (AB), ``r_eff_pix`` or ``r_eff`` (arcsec; both along the
        semi-major axis), ``sersic_n``, ``ellipticity`` or ``q``, and positions, such as
        `sersicnet simulate --mosaic` writes.
    output : str or Path, optional
        As for `evaluate`.
    tolerance : float, optional
        Greatest distance, in arcsec on the sky and else in pixels; by default `TOLERANCE`.
    overwrite : bool

    Returns
    -------
    dict
        ``data``, ``truth``; ``scores`` as of `evaluate`, for the catalogue and, where it has flags,
        for its rows without any; ``matching``: ``on``, ``tolerance``, the numbers
        ``catalogue``, ``true`` and ``matched``, and ``by_magnitude``, where ``true`` and ``found``
        count true galaxies by their magnitude, ``measured`` and ``not_true`` sources by theirs.

    Raises
    ------
    InputError
        If a table lacks a column, nothing matches, or the output cannot be used.
    """
    output = _checked(output, overwrite)
    if tolerance is not None and not tolerance > 0:
        raise InputError(f"A tolerance is positive; received {tolerance:g}.")
    found, known = Galaxies.read(catalogue), Galaxies.read(truth)
    scale = _pixel_scale(found)
    values, true = (
        table.targets(scale, "give r_eff_pix, or a catalogue with PIXSCALE in its header.") for table in (found, known)
    )
    on, positions = _positions(found, known)
    tolerance = TOLERANCE[on] if tolerance is None else tolerance
    reach = 2 * np.sin(np.radians(tolerance / 3600) / 2) if on == "sky" else tolerance
    i, j = pairs(*positions, reach)
    unit = "arcsec" if on == "sky" else "pixels"
    if not len(i):
        raise InputError(
            f"None of the {len(found)} sources of {catalogue} lies within {tolerance:g} {unit} of one of the "
            f"{len(known)} of {truth}. Do both speak of the same image? Else give a larger --tolerance."
        )
    given = [found.parameter(f"{name}_err") for name in TARGET_NAMES]
    errors = [values[i] for values in given if values is not None]
    sigma = np.column_stack(errors) if len(errors) == N_TARGETS else None
    digest = weights.sha256(Path(catalogue))
    measured = {Path(catalogue).name: Measured(values[i], sigma, digest)}
    flags = found.parameter("flags")
    if flags is not None:
        clean = flags[i] == 0
        if not clean.all():
            unflagged = np.where(clean[:, None], values[i], np.nan)
            measured["flags == 0"] = Measured(unflagged, sigma, digest)
    snr = found.parameter("snr")
    result = {
        "data": str(catalogue),
        "truth": str(truth),
        "matching": {
            "on": on,
            "tolerance": tolerance,
            "catalogue": len(found),
            "true": len(known),
            "matched": len(i),
            "by_magnitude": _completeness(true[:, 0], values[:, 0], i, j),
        },
        "scores": {label: _scored(true[j], one, None if snr is None else snr[i]) for label, one in measured.items()},
    }
    if output is not None:
        _write_report(output, result, true[j], measured)
    return result


def _pixel_scale(catalogue: Galaxies) -> float:
    """Arcsec per pixel in the header of a catalogue; NaN where it has none."""
    header = {key.upper(): value for key, value in catalogue.table.meta.items()}
    try:
        return float(header.get("PIXSCALE", np.nan))
    except (TypeError, ValueError):
        return np.nan


def _positions(found: Galaxies, known: Galaxies) -> tuple[str, tuple[np.ndarray, np.ndarray]]:
    """What two tables are matched on, and their places: points of the unit sphere, or pixels."""
    sky = [table.sky() for table in (found, known)]
    points = [on_sphere(places) for places in sky if places is not None]
    if len(points) == 2 and all(np.isfinite(one).all(axis=1).any() for one in points):
        return "sky", (points[0], points[1])
    for table in (found, known):
        if table.pixels() is None:
            raise InputError(
                f"Tables are matched by ra and dec, or by x and y, that both have; {table.name} has {table.columns}."
            )
    pixels = [places for places in (found.pixels(), known.pixels()) if places is not None]
    return "pixels", (pixels[0], pixels[1])


def _completeness(true_mag: np.ndarray, mag: np.ndarray, i: np.ndarray, j: np.ndarray) -> list[dict[str, Any]]:
    rows = []
    for low, high in pairwise(MAG_EDGES):
        of_truth, of_catalogue = ((m >= low) & (m < high) for m in (true_mag, mag))
        if of_truth.any() or of_catalogue.any():
            rows.append(
                {
                    "range": [low, high],
                    "true": int(of_truth.sum()),
                    "found": int(of_truth[j].sum()),
                    "measured": int(of_catalogue.sum()),
                    "not_true": int(of_catalogue.sum() - of_catalogue[i].sum()),
                }
            )
    return rows


# --- domains -------------------------------------------------------------------------------------------------


def _domains(
    source: Dataset | Arrays, other: Dataset | Arrays, networks: Mapping[str, weights.Weights], report: Report
) -> dict[str, Any]:
    """Accuracy of a classifier of the domains, for each of the networks and for the true parameters.

    The latter, with the products of each two, tell how far the domains hold other galaxies.
    """
    from sersicnet.networks import features, shown

    counts = [min(len(one), DOMAIN_STAMPS) for one in (source, other)]
    known = encode(np.concatenate([one.targets[:n] for one, n in zip((source, other), counts, strict=True)]))
    known -= known.mean(axis=0)
    first, second = np.triu_indices(N_TARGETS)
    known = np.column_stack([known, known[:, first] * known[:, second]])
    accuracy = {"the true parameters": domain_accuracy(known[: counts[0]], known[counts[0] :])}
    inputs = [one.inputs(0, n) for one, n in zip((source, other), counts, strict=True)]
    for done, (label, network) in enumerate(networks.items()):
        report("telling domains apart", done, len(networks))
        model = features(network.keras_model())
        found = [np.asarray(model.predict(shown(model, one), verbose=0)).reshape(one.n, -1) for one in inputs]
        accuracy[label] = domain_accuracy(found[0], found[1])
    return {"n": counts, "accuracy": accuracy}


def domain_accuracy(first: np.ndarray, second: np.ndarray, seed: int = 0) -> dict[str, float]:
    """How well a linear classifier tells two samples apart.

    Logistic regression on standardised features, with both samples at equal weight
    and a small ridge, fitted to four fifths and asked of the last, five times.

    Parameters
    ----------
    first, second : ndarray, float, (N, F) and (M, F)
        Features; rows with a value that is not finite are left out.
    seed : int
        Of the division into fifths.

    Returns
    -------
    dict
        ``accuracy``, the mean of the fractions of either sample that were told right: 0.5
        where they cannot be told apart; and its ``error`` from counting, 1 sigma.

    Raises
    ------
    InputError
        If a sample has fewer than ten rows.
    """
    samples = [rows[np.isfinite(rows).all(axis=1)] for rows in (first, second)]
    if min(map(len, samples)) < 2 * _FOLDS:
        raise InputError(
            f"Domains are told apart with at least {2 * _FOLDS} galaxies of each; "
            f"received {len(samples[0])} and {len(samples[1])}."
        )
    rng = np.random.default_rng(seed)
    values = np.concatenate(samples).astype(float)
    is_second = np.repeat([False, True], [len(rows) for rows in samples])
    fold = np.concatenate([rng.permutation(np.arange(len(rows)) % _FOLDS) for rows in samples])
    right = np.empty(len(values), bool)
    for k in range(_FOLDS):
        slopes, offset = _logistic(values[fold != k], is_second[fold != k])
        right[fold == k] = (values[fold == k] @ slopes + offset > 0) == is_second[fold == k]
    parts = [right[~is_second].mean(), right[is_second].mean()]
    error = 0.5 * np.sqrt(sum(part * (1 - part) / len(rows) for part, rows in zip(parts, samples, strict=True)))
    return {"accuracy": float(np.mean(parts)), "error": float(error)}


def _logistic(values: np.ndarray, is_second: np.ndarray) -> tuple[np.ndarray, float]:
    """Slopes and offset of a logistic regression, both classes at equal weight."""
    from scipy import optimize, special

    weight = np.where(is_second, 0.5 / is_second.sum(), 0.5 / (~is_second).sum())
    mean = weight @ values
    std = np.sqrt(weight @ (values - mean) ** 2)
    scale = np.where(std > 1e-6 * std.max(initial=1e-300), std, np.inf)
    scaled = (values - mean) / scale
    sign = np.where(is_second, 1.0, -1.0)

    def loss(free: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (scaled @ free[:-1] + free[-1])
        slope = -weight * sign * special.expit(-margin)
        gradient = np.append(slope @ scaled + _RIDGE * free[:-1], slope.sum())
        return float(weight @ np.logaddexp(0, -margin) + 0.5 * _RIDGE * free[:-1] @ free[:-1]), gradient

    best = optimize.minimize(loss, np.zeros(values.shape[1] + 1), jac=True, method="L-BFGS-B").x
    slopes = best[:-1] / scale
    return slopes, float(best[-1] - mean @ slopes)


# --- the report ----------------------------------------------------------------------------------------------


def _write_report(output: Path, result: dict[str, Any], truth: np.ndarray, measured: Mapping[str, Measured]) -> None:
    predicted = {label: found.predicted for label, found in measured.items()}
    with whole_directory(output) as partial:
        (partial / "scores.json").write_text(json.dumps(result, indent=1) + "\n")
        (partial / "scores.md").write_text(as_markdown(result))
        draw_comparison(truth, predicted, partial / "predicted_against_true.png")
        draw_distributions(truth, predicted, partial / "distributions.png")
        draw_by_magnitude(result, partial / "by_magnitude.png")


def as_markdown(result: Mapping[str, Any]) -> str:
    """The result of `evaluate` or `evaluate_catalogue` as a page."""
    found = result["scores"]
    samples = {label: one["samples"] for label, one in found.items()}
    if "matching" in result:
        parts = [_matching(result)]
    else:
        names = ", ".join(f"`{label}` (SHA-256 {one['sha256'][:12]})" for label, one in found.items())
        parts = [f"{names} on `{result['data']}`"]
    parts.append(weights.scores_table(next(iter(samples.values()))) if len(samples) == 1 else _side_by_side(samples))
    if "limits" in result:
        parts += ["## The statistical limit", _limits_page(result["limits"])]
    if "domains" in result:
        parts += ["## Domains", _domains_page(result)]
    for key, title, head in (("by_magnitude", "By magnitude", "mag"), ("by_snr", "By signal to noise", "S/N")):
        if not any(one.get(key) for one in found.values()):
            continue  # such as too few galaxies for any bin
        parts += [f"## {title}", _EXPLAINED]
        for label, one in found.items():
            parts += [f"`{label}`:", _binned_table(one[key], head)]
    return "\n\n".join(parts) + "\n"


_EXPLAINED = "Median ± 68 %; outliers beyond 0.5; truths within the 68 and the 95 % interval, where there are errors."
_QUANTITIES = {"r2": "R²", "bias": "median error", "scatter": "68 % scatter", "coverage": "within 1 sigma"}


def _side_by_side(samples: Mapping[str, Mapping[str, Any]], quantities: Sequence[str] = tuple(_QUANTITIES)) -> str:
    """Scores of several weights, row by row."""
    lines = ["| sample | | | N | " + " | ".join(TARGET_NAMES) + " |", "|" + "---|" * (4 + N_TARGETS)]
    for sample in next(iter(samples.values())):
        for quantity in quantities:
            for label, found in samples.items():
                row = found[sample]
                if quantity in row:
                    cells = " | ".join(f"{row[quantity][name]:.4f}" for name in TARGET_NAMES)
                    lines.append(f"| {sample} | {_QUANTITIES[quantity]} | {label} | {row['n']} | {cells} |")
    return "\n".join(lines)


def _limits_page(limits: Mapping[str, Any]) -> str:
    rows = {f"limit, {name}": one["samples"] for name, one in limits["estimates"].items()}
    rows |= {label: one["samples"] for label, one in limits["weights"].items()}
    return (
        f"What the noise allows when the distribution of the galaxies is known (Fisher matrix and prior), on "
        f"{limits['n']} galaxies drawn at random, and the weights on the same ones.\n\n"
        f"{_side_by_side(rows, ('r2', 'scatter'))}"
    )


def _domains_page(result: Mapping[str, Any]) -> str:
    domains = result["domains"]
    lines = [
        f"How often a linear classifier tells {domains['n'][0]} galaxies of `{result['data']}` from "
        f"{domains['n'][1]} of `{domains['data']}`, held out, both domains at equal weight; 50 % where they "
        "cannot be told apart.",
        "",
        "| by | accuracy |",
        "|---|---|",
    ]
    for label, found in domains["accuracy"].items():
        name = label if label == "the true parameters" else f"features of `{label}`"
        lines.append(f"| {name} | {found['accuracy']:.1%} ± {found['error']:.1%} |")
    return "\n".join(lines)


def _matching(result: Mapping[str, Any]) -> str:
    found = result["matching"]
    unit = "arcsec" if found["on"] == "sky" else "pixels"
    lines = [
        f"`{result['data']}` beside `{result['truth']}`: {found['matched']} of {found['catalogue']} sources lie within "
        f"{found['tolerance']:g} {unit} of one of the {found['true']} true galaxies; "
        f"{found['catalogue'] - found['matched']} match none, "
        f"{found['true'] - found['matched']} galaxies were not found.",
        "",
        "| mag | true | found | | measured | not in the truth |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["by_magnitude"]:
        share = f"{row['found'] / row['true']:.0%}" if row["true"] else ""
        low, high = row["range"]
        lines.append(
            f"| {low}-{high} | {row['true']} | {row['found']} | {share} | {row['measured']} | {row['not_true']} |"
        )
    return "\n".join(lines)


def _binned_table(rows: list[dict[str, Any]], head: str) -> str:
    """Bias and dispersion, outliers, and the coverage of the intervals, by bins."""
    names = ("mag", "R_e, relative", "log10 n", "axis ratio")
    lines = [f"| {head} | N | " + " | ".join(names) + " |", "|" + "---|" * (2 + len(names))]
    for row in rows:
        cells = []
        for target in TARGETS:
            found = row[target.name]
            cell = f"{found['bias']:+.3f} ± {found['dispersion']:.3f}; {found['outliers']:.1%}"
            if "within68" in found:
                cell += f"; {found['within68']:.0%}, {found['within95']:.0%}"
            cells.append(cell)
        low, high = row["range"]
        bin_name = f"{low}-{high}" if high is not None else f"{low} and more"
        lines.append(f"| {bin_name} | {row['n']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _panels(rows: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * N_TARGETS, 4 * rows), layout="constrained")
    return figure, figure.subplots(rows, N_TARGETS, squeeze=False)


def draw_comparison(truth: np.ndarray, predicted: Mapping[str, np.ndarray], path: Path) -> None:
    """Draw predicted against true, one panel a parameter and a row for each weights, with the line y = x."""
    figure, axes = _panels(len(predicted))
    for row, (label, values) in zip(axes, predicted.items(), strict=True):
        for i, (axis, target) in enumerate(zip(row, TARGETS, strict=True)):
            good = np.isfinite(truth[:, i]) & np.isfinite(values[:, i])
            t, p = truth[good, i], values[good, i]
            axis.scatter(t, p, s=3, c=truth[good, 0], cmap="viridis", alpha=0.5, linewidths=0, rasterized=True)
            ends = [t.min(), t.max()] if len(t) else [0, 1]
            axis.plot(ends, ends, color="black", lw=1)
            margin = 0.1 * (ends[1] - ends[0]) or 0.1
            axis.set_xlim(ends[0] - margin, ends[1] + margin)
            axis.set_ylim(ends[0] - margin, ends[1] + margin)
            axis.set_title(f"{target.name}: R² = {r_squared(t, p):.4f}" if len(t) > 1 else target.name)
            axis.set_xlabel("true (colour: magnitude)")
        row[0].set_ylabel(f"predicted by {label}")
    figure.savefig(path, dpi=120)


def draw_distributions(truth: np.ndarray, predicted: Mapping[str, np.ndarray], path: Path) -> None:
    """Draw the true and the predicted distributions of each parameter over each other."""
    figure, axes = _panels(1)
    for i, (axis, target) in enumerate(zip(axes[0], TARGETS, strict=True)):
        t = truth[np.isfinite(truth[:, i]), i]
        bins = np.linspace(t.min(), t.max(), 31) if len(t) > 1 else 10
        axis.hist(t, bins, histtype="stepfilled", alpha=0.4, color="grey", label="true")
        for label, values in predicted.items():
            axis.hist(values[np.isfinite(values[:, i]), i], bins, histtype="step", label=label)
        axis.set_xlabel(f"{target.name} [{target.unit}]" if target.unit else target.name)
    axes[0, 0].legend()
    axes[0, 0].set_ylabel("galaxies")
    figure.savefig(path, dpi=120)


def draw_by_magnitude(result: Mapping[str, Any], path: Path) -> None:
    """Draw bias and dispersion of each parameter by magnitude, with the statistical limit where it is known."""
    figure, axes = _panels(2)
    curves = {label: found["by_magnitude"] for label, found in result["scores"].items()}
    for name, found in result.get("limits", {}).get("estimates", {}).items():
        curves[f"limit, {name}"] = found["by_magnitude"]
    for label, rows in curves.items():
        middle = [sum(row["range"]) / 2 for row in rows]
        style = {"ls": ":"} if label.startswith("limit, ") else {"marker": "o", "ms": 4}
        for i, target in enumerate(TARGETS):
            for axis, quantity in zip(axes[:, i], ("bias", "dispersion"), strict=True):
                axis.plot(middle, [row[target.name][quantity] for row in rows], label=label, **style)
    for i, name in enumerate(("mag", "R_e, relative", "log10 n", "axis ratio")):
        axes[0, i].axhline(0, color="black", lw=0.5)
        axes[0, i].set_title(name)
        axes[1, i].set_yscale("log")
        axes[1, i].set_xlabel("true magnitude")
    axes[0, 0].set_ylabel("bias")
    axes[1, 0].set_ylabel("dispersion")
    axes[1, 0].legend()
    figure.savefig(path, dpi=120)
