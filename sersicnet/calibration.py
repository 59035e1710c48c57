"""Calibration of predicted errors: factors that make 68.27 % of the truths lie within one of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from sersicnet.domain import number
from sersicnet.orientations import COMPONENTS, LOG
from sersicnet.schema import INPUT_SHAPES, N_TARGETS, Inputs, pulls

WITHIN_ONE_SIGMA = 0.6827
"""Fraction of Gaussian deviations within one standard deviation."""

LEAST = 600
"""Galaxies that a calibration needs."""

N_DESCRIBED = 2 * N_TARGETS
"""Numbers that describe an answer, see `described`."""

N_CONDITIONS = {"psf": 1, "noise": INPUT_SHAPES.noise[0]}
"""Numbers that describe an image, for the inputs that show them, see `conditions`."""

LEAST_HALF = 0.05
"""Half of the width of a domain at least: numbers that differ by less have little effect."""

MOST = 10.0
"""Largest logarithm of a factor that a card may hold."""

RIDGE = 10.0
"""Weight of the squares of the coefficients, against the sum of the losses of all galaxies."""

SMOOTHINGS = (0.3, 0.1, 0.03)
"""Widths over which the corner of the loss is rounded, in turn."""


def described(out: np.ndarray) -> np.ndarray:
    """What the factors on the errors of an answer depend on.

    Parameters
    ----------
    out : ndarray, float, (N, 8) or (N, 17)
        Answers of a network that predicts errors, see `sersicnet.networks.with_units`.

    Returns
    -------
    ndarray, float, (N, 8)
        The magnitude, ln R_e, ln n and the ellipticity, and the logarithms of their predicted errors.
    """
    values, errors = np.array(out[:, :N_TARGETS], float), np.array(out[:, N_TARGETS : 2 * N_TARGETS], float)
    with np.errstate(divide="ignore", invalid="ignore"):
        errors[:, LOG] /= values[:, LOG]
        values[:, LOG] = np.log(values[:, LOG])
        return np.column_stack([values, np.log(errors)])


def conditions(inputs: Inputs, shown: Collection[str]) -> np.ndarray:
    """The PSF and the noise that a network is shown, as numbers on which the factors depend.

    Parameters
    ----------
    inputs : Inputs
        Of N galaxies.
    shown : collection of str
        The inputs that the network is shown.

    Returns
    -------
    ndarray, float, (N, 4), or fewer columns
        The logarithm of the noise-equivalent area of the PSF [pix^2], 1 / integral of PSF^2 (King 1983, PASP 95, 163),
        and `sersicnet.schema.noise_numbers`.
    """
    from sersicnet.image.views import BINNINGS

    columns = [np.empty((inputs.n, 0))]
    if inputs.psf is not None and "psf" in shown:
        finest = np.asarray(inputs.psf[:, 0], float)
        area = -np.log(np.maximum(BINNINGS[0] ** 2 * np.einsum("nij,nij->n", finest, finest), 1e-9))
        columns.append(np.broadcast_to(area[:, None], (inputs.n, 1)))
    if inputs.noise is not None and "noise" in shown:
        columns.append(np.broadcast_to(inputs.noise, (inputs.n, INPUT_SHAPES.noise[0])))
    return np.hstack(columns)


def factors(table: Mapping[str, Any] | None, out: np.ndarray, seen: np.ndarray | None = None) -> np.ndarray:
    """Factors on the predicted errors of each answer.

    Parameters
    ----------
    table : mapping or None
        The ``calibration`` of a card, of `fitted` or of earlier versions of sersicnet; all factors are 1 for None.
    out : ndarray, float, (N, 8) or (N, 17)
        Answers, see `described`.
    seen : ndarray, float, (N, M), optional
        What the network saw of the images, see `conditions`; tables of earlier versions do not depend on it.

    Returns
    -------
    ndarray, float, (N, 5)
        For the errors of the four targets and of the position angle; NaN where an answer is.
    """
    if not table:
        return np.ones((len(out), N_TARGETS + 1))
    if "mag" in table:  # of earlier weights: a table by magnitude
        rows = np.column_stack([table["factors"], table.get("orientation", np.ones(len(table["mag"])))])
        return np.column_stack([np.interp(out[:, 0], table["mag"], column) for column in rows.T])
    numbers = _numbers(out, seen)[:, : len(table["domain"][0])]
    logarithms = _terms(numbers, table["domain"]) @ np.array(table["polynomials"]).T
    return np.exp(np.clip(logarithms, *np.array(table["range"])))


def _numbers(out: np.ndarray, seen: np.ndarray | None) -> np.ndarray:
    return described(out) if seen is None else np.hstack([described(out), seen])


def _n_terms(numbers: int) -> int:
    """Terms of a polynomial of the second degree in some numbers."""
    return 1 + numbers + numbers * (numbers + 1) // 2


def _terms(numbers: np.ndarray, domain: Any) -> np.ndarray:
    """Terms of polynomials in numbers, (N, M), that are brought from a domain, (2, M), to -1 to 1 and cut there."""
    low, high = np.array(domain)
    x = np.clip(2 * (numbers - low) / (high - low) - 1, -1, 1)
    first, second = np.triu_indices(x.shape[1])
    return np.column_stack([np.ones(len(x)), x, x[:, first] * x[:, second]])


def fitted(
    out: np.ndarray, targets: np.ndarray, orientation: np.ndarray | None = None, seen: np.ndarray | None = None
) -> dict[str, Any] | None:
    """The calibration of a network from galaxies that it was not trained on.

    The logarithm of the factor on an error is a polynomial of the second degree in the answer, its errors, the width
    of the PSF and the noise: the 68.27 % quantile of the logarithm of the deviations, by quantile regression. Thus as
    many truths are within one error, see `sersicnet.schema.pulls`, for bright and faint, small and large galaxies, in
    images of different telescopes. The fewer galaxies, the nearer it is to a constant.

    Parameters
    ----------
    out : ndarray, float, (N, 8) or (N, 17)
        Answers, see `described`.
    targets : ndarray, float, (N, 4)
    orientation : ndarray, float, (N, 2), optional
        True components of the ellipticity, see `sersicnet.schema.orientation`.
    seen : ndarray, float, (N, M), optional
        What the network saw of the images, see `conditions`.

    Returns
    -------
    dict or None
        ``domain``, lowest and highest of the numbers of `described` and `conditions`; ``polynomials``, coefficients
        for the four targets and the angle; ``range``, lowest and highest of their values. None for fewer than 600
        galaxies.

    References
    ----------
    Koenker & Bassett 1978, Econometrica 46, 33; Romano et al. 2019, arXiv:1905.03222 (conformalised regression).
    """
    if len(out) < LEAST:
        return None
    columns = list(np.abs(pulls(out[:, :N_TARGETS], out[:, N_TARGETS : 2 * N_TARGETS], targets)).T)
    if orientation is not None and np.isfinite(orientation).all():
        # The angle has its error from the components across the direction that they point to.
        (x, y), (true_x, true_y) = out[:, COMPONENTS].T, orientation.T
        turned = np.abs(np.arctan2(x * true_y - y * true_x, x * true_x + y * true_y))
        columns.append(turned * np.hypot(x, y) / out[:, -1])
    numbers = _numbers(out, seen)
    domain = np.quantile(numbers, [0.01, 0.99], axis=0)
    # What is the same for all of them, such as a single PSF, is in the middle of its domain, where it has no effect.
    middle, half = domain.mean(axis=0), np.maximum(np.ptp(domain, axis=0) / 2, LEAST_HALF)
    domain = np.array([middle - half, middle + half]).round(5)
    terms = _terms(numbers, domain)
    found = np.array([_quantile(terms, np.log(np.maximum(column, 1e-9))) for column in columns])
    if len(found) == N_TARGETS:
        found = np.vstack([found, np.zeros(terms.shape[1])])
    found = found.round(5)
    limits = np.quantile(terms @ found.T, [0.005, 0.995], axis=0).round(5)
    return {"domain": domain.tolist(), "polynomials": found.tolist(), "range": limits.tolist()}


def _quantile(terms: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Coefficients of terms, (N, T), whose sum is the 68.27 % quantile of values, (N,). The first term is 1."""
    from scipy.optimize import minimize
    from scipy.special import expit

    n, over = len(values), 1 - WITHIN_ONE_SIGMA
    weight = np.full(terms.shape[1], RIDGE / n)
    weight[0] = 0

    def loss(coefficients: np.ndarray, smoothing: float) -> tuple[float, np.ndarray]:
        off = values - terms @ coefficients
        positive = smoothing * np.logaddexp(0, off / smoothing)  # of off, its corner rounded
        slope = over - expit(off / smoothing)
        ridge = weight * coefficients
        return float((positive - over * off).mean() + ridge @ coefficients), terms.T @ slope / n + 2 * ridge

    coefficients = np.zeros(terms.shape[1])
    coefficients[0] = np.quantile(values, WITHIN_ONE_SIGMA)
    for smoothing in SMOOTHINGS:
        coefficients = minimize(loss, coefficients, (smoothing,), jac=True, method="L-BFGS-B").x
    coefficients[0] += np.quantile(values - terms @ coefficients, WITHIN_ONE_SIGMA)
    return coefficients


def check(table: Any, shown: Collection[str]) -> None:
    """Raise ValueError unless the ``calibration`` of a card can be used; None can.

    Parameters
    ----------
    table : object
        What a file holds.
    shown : collection of str
        The inputs that the network is shown.
    """
    if not table:
        return
    if not isinstance(table, dict):
        raise ValueError("its calibration is no table")
    if "mag" in table:
        _check_by_magnitude(table)
        return
    numbers = N_DESCRIBED
    if any(len(row) != N_DESCRIBED for row in table["domain"]):  # those of earlier versions depend on no more
        numbers += sum(n for name, n in N_CONDITIONS.items() if name in shown)
    sizes = {"domain": (2, numbers), "polynomials": (N_TARGETS + 1, _n_terms(numbers)), "range": (2, N_TARGETS + 1)}
    for key, (rows, columns) in sizes.items():
        values = [[number(value) for value in row] for row in table[key]]
        if len(values) != rows or any(len(row) != columns for row in values):
            raise ValueError(f"the {key} of its calibration has {rows} x {columns} numbers; received others")
        if key == "domain" and any(low >= high for low, high in zip(*values, strict=True)):
            raise ValueError("the domain of its calibration is from lower to higher numbers")
        if key == "range" and np.abs(values).max() > MOST:
            raise ValueError(f"the range of its calibration is within {MOST:g} of 0; received {np.abs(values).max():g}")


def _check_by_magnitude(table: Mapping[str, Any]) -> None:
    mag = [number(value) for value in table["mag"]]
    rows = [[number(value) for value in row] for row in table["factors"]]
    if not mag or len(rows) != len(mag) or any(len(row) != N_TARGETS for row in rows):
        raise ValueError(f"its calibration has {N_TARGETS} factors for each magnitude; received other lengths")
    of_orientation = [number(value) for value in table.get("orientation", [1.0] * len(mag))]
    if len(of_orientation) != len(mag):
        raise ValueError("its calibration has a factor of the orientation for each magnitude; received other lengths")
    if mag != sorted(set(mag)) or min(map(min, [*rows, of_orientation])) <= 0:
        raise ValueError("its calibration has increasing magnitudes and positive factors")
