"""Scores of weights on stamps with known parameters, and of a catalogue against a table of true parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sersicnet import weights
from sersicnet.cardpage import scores_table
from sersicnet.catalogue.crossmatch import on_sphere, pairs
from sersicnet.catalogue.parameters import Galaxies, holds_table, possible
from sersicnet.catalogue.scores import MAG_EDGES, SNR_EDGES, binned, by_magnitude, scores
from sersicnet.catalogue.table import located
from sersicnet.errors import InputError, counted, warn
from sersicnet.evaluating import domains as domain_tests
from sersicnet.evaluating import figures
from sersicnet.output import Report, check_directory, json_text, silent, whole_directory
from sersicnet.schema import N_TARGETS, TARGET_NAMES, TARGETS

if TYPE_CHECKING:
    from sersicnet.dataset import Arrays, Dataset

CHUNK = 512
"""Stamps read before they go through the network: 32 MB."""

FEW_MATCHES = 0.1
"""Fewer matches than this, as a fraction of the smaller table, may be chance."""

TOLERANCE = {"sky": 0.3, "pixels": 5.0}
"""Largest distance of a source from its true position: arcsec on the sky, else pixels."""


class Measured(NamedTuple):
    """Parameters of galaxies as weights, or a catalogue, have them.

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
        NaN where a set of many telescopes does not hold the gain, which a network is not always shown.
    """
    from sersicnet.simulating.telescopes import Instrument

    truth = data.truth
    if data.config.get("telescopes"):
        width, correlated = truth["fwhm"] / 2, truth["correlation"] ** 2
        exposure = truth["electrons"] / truth["rms"]
    else:
        preset = data.config["instrument"]
        taken_with = Instrument(**{**preset, "pixels": tuple(preset["pixels"])})
        width = data.config["psf_fwhm"] / data.pixel_scale / 2 * truth.get("psf_stretch", 1.0)
        correlated, exposure = taken_with.autocorrelation().sum(), taken_with.exposure
    half = 0.5 * 10 ** (-0.4 * (truth["mag"] - data.zero_point))
    r_eff, q = truth["r_eff_pix"], 1 - truth["ellipticity"]
    area = np.pi * np.hypot(r_eff, width) * np.hypot(q * r_eff, width)
    return half / np.sqrt(truth["rms"] ** 2 * correlated * area + half / exposure)


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
    report: Report = silent,
) -> dict[str, Any]:
    """Score weights on stamps whose truth is known.

    Parameters
    ----------
    data : str or Path
        Dataset from `sersicnet simulate`, or a table of labelled galaxies.
    weights_names : str or Path, or a sequence of them
        Names of shipped weights, or weights directories.
    output : str or Path, optional
        Directory for ``scores.json``, ``scores.md`` and three figures: predicted
        against true, both distributions, and errors by magnitude.
    image, zero_point
        For tables of labels, see `sersicnet.training.labels.read_labels`.
    limits : bool
        Whether to say what the noise allows, see `sersicnet.simulating.fisher`, for at most
        `sersicnet.simulating.fisher.GALAXIES` of a dataset. It takes 0.15 s a galaxy.
    domains : str or Path, optional
        Stamps of another domain, a dataset or a table of labels: whether a linear classifier
        can tell the domains apart by the networks' features, see `sersicnet.evaluating.domains.domain_accuracy`.
        It needs Keras.
    overwrite : bool
        Whether to replace `output`.
    report : callable
        See `sersicnet.output.Report`.

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
    from sersicnet.dataset import Dataset, check_shown

    output = _checked(output, overwrite)
    names = [weights_names] if isinstance(weights_names, str | Path) else list(weights_names)
    networks = _labelled(names)
    result: dict[str, Any] = {"data": str(data)}
    inputs = frozenset[str]().union(*(network.inputs for network in networks.values()))
    with _opened(data, image, zero_point, inputs) as source:
        simulated = source if isinstance(source, Dataset) else None
        if simulated is not None and domains is None and (image is not None or zero_point is not None):
            raise InputError(f"`image` and `zero_point` are for tables of labels; {data} is a dataset. Leave them out.")
        for label, network in networks.items():
            check_shown(source, network.inputs, label)
        if limits and simulated is None:
            raise InputError(
                f"The limit is computed for datasets of `sersicnet simulate`; received {data} with `limits`."
            )
        # Relative and AB magnitudes differ by what truth and prediction share.
        truth, shift = source.targets.copy(), source.mag - source.targets[:, 0]
        truth[:, 0] = source.mag
        snr = signal_to_noise(source) if isinstance(source, Dataset) else source.snr
        bounds = None if simulated is None or not limits else _estimates(simulated, report)
        if domains is not None:
            with _opened(domains, image, zero_point, inputs) as other:
                for label, network in networks.items():
                    check_shown(other, network.inputs, label)
                result["domains"] = {"data": str(domains), **domain_tests.accuracies(source, other, networks, report)}
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
        raise InputError(f"Each set of weights is scored once; received {', '.join(map(str, names))}.")
    return dict(zip(labels, loaded, strict=True))


def _opened(
    data: str | Path, image: str | Path | None, zero_point: float | None, inputs: frozenset[str]
) -> AbstractContextManager[Dataset | Arrays]:
    from sersicnet.dataset import Dataset
    from sersicnet.training.labels import check_dataset, read_labels

    if holds_table(data):
        return nullcontext(read_labels(data, image, zero_point, inputs))
    check_dataset(data)
    return Dataset(data)


def lacks_images(data: str | Path) -> bool:
    """Whether data are a table that does not have the images of its rows, such as a catalogue of a network."""
    from sersicnet.training.labels import has_images

    return holds_table(data) and not has_images(Galaxies.read(data))


def _estimates(source: Dataset, report: Report) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    from sersicnet.simulating import fisher as limits

    return limits.of_dataset(
        source, most=limits.GALAXIES, report=lambda done, total: report("computing the limit", done, total)
    )


def _of_draws(truth: np.ndarray, means: np.ndarray) -> dict[str, Any]:
    """The scores of several estimates of each galaxy, (draws, N, 4)."""
    repeated, flat = np.tile(truth, (len(means), 1)), means.reshape(-1, N_TARGETS)
    samples, rows = scores(repeated, flat), by_magnitude(repeated, flat)
    for scored in (*samples.values(), *rows):
        scored["n"] //= len(means)
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
            predicted, errors, *_ = network.predict(inputs)
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
    """Score a catalogue against a table of true parameters.

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
    values, true = (_possible(table, scale) for table in (found, known))
    on, positions = _positions(found, known)
    tolerance = TOLERANCE[on] if tolerance is None else tolerance
    reach = 2 * np.sin(np.radians(tolerance / 3600) / 2) if on == "sky" else tolerance
    i, j = pairs(*positions, reach)
    unit = "arcsec" if on == "sky" else "pixels"
    if not len(i):
        raise InputError(
            f"None of the {len(found)} sources of {catalogue} lies within {tolerance:g} {unit} of one of the "
            f"{len(known)} of {truth}. Are both of the same image? If so, give a larger `tolerance`."
        )
    if len(i) < FEW_MATCHES * min(len(found), len(known)):
        warn(
            f"Only {len(i)} of the {len(found)} sources of {catalogue} lie within {tolerance:g} {unit} of one of the "
            f"{len(known)} of {truth}, perhaps by chance. Are both of the same image?"
        )
    given = [found.parameter(f"{name}_err") for name in TARGET_NAMES]
    errors = [values[i] for values in given if values is not None]
    sigma = np.column_stack(errors) if len(errors) == N_TARGETS else None
    digest = weights.sha256(located(catalogue)[0])
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


def _possible(table: Galaxies, scale: float) -> np.ndarray:
    """The parameters of a table, float64, (N, 4), with NaN for what no galaxy has, such as -99 for unknown."""
    values = table.targets(scale, "give r_eff_pix, or a catalogue with PIXSCALE in its header.")
    for name, column in zip(TARGET_NAMES, values.T, strict=True):
        wrong = ~possible(name, column) & ~np.isnan(column)
        if wrong.any():
            such = f"such as {name} = {column[wrong][0]:g}"
            warn(f"{table.name} has impossible values, {such}: these rows do not count ({wrong.sum()}).")
            column[wrong] = np.nan
    return values


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


# --- the report ----------------------------------------------------------------------------------------------


def _write_report(output: Path, result: dict[str, Any], truth: np.ndarray, measured: Mapping[str, Measured]) -> None:
    predicted = {label: found.predicted for label, found in measured.items()}
    with whole_directory(output) as partial:
        (partial / "scores.json").write_text(json_text(result) + "\n")
        (partial / "scores.md").write_text(as_markdown(result))
        figures.draw_comparison(truth, predicted, partial / "predicted_against_true.png")
        figures.draw_distributions(truth, predicted, partial / "distributions.png")
        figures.draw_by_magnitude(result, partial / "by_magnitude.png")


def as_markdown(result: Mapping[str, Any]) -> str:
    """The result of `evaluate` or `evaluate_catalogue` as a page."""
    found = result["scores"]
    samples = {label: one["samples"] for label, one in found.items()}
    if "matching" in result:
        parts = [_matching(result)]
    else:
        names = ", ".join(f"`{label}` (SHA-256 {one['sha256'][:12]})" for label, one in found.items())
        parts = [f"{names} on `{result['data']}`"]
    parts.append(scores_table(next(iter(samples.values()))) if len(samples) == 1 else _side_by_side(samples))
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
        f"{counted(found['catalogue'] - found['matched'], 'source')} and "
        f"{counted(found['true'] - found['matched'], 'true galaxy', 'true galaxies')} have no match.",
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
