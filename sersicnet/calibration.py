"""Calibration of answers: the median of the truths, and errors that hold as many of them as Gaussian ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from sersicnet.domain import number
from sersicnet.orientations import COMPONENTS, LOG
from sersicnet.schema import INPUT_SHAPES, N_TARGETS, TARGET_NAMES, TARGETS, Inputs, decode, encode, pulls

WITHIN_ONE_SIGMA = 0.6827
"""Fraction of Gaussian deviations within one standard deviation."""

WITHIN = ((WITHIN_ONE_SIGMA, 1.0), (0.95, 1.96))
"""Fractions of Gaussian deviations within numbers of standard deviations, which errors are fitted to."""

LEAST = 600
"""Galaxies that a calibration needs."""

N_DESCRIBED = 2 * N_TARGETS
"""Numbers that describe an answer, see `described`."""

N_CONDITIONS = {"psf": 2, "noise": INPUT_SHAPES.noise[0]}
"""Numbers that describe an image, for the inputs that show them, see `conditions`."""

N_EARLIER = {"psf": 1, "noise": INPUT_SHAPES.noise[0]}
"""Those that calibrations of earlier versions depend on."""

LEAST_HALF = 0.05
"""Half of the width of a domain at least: numbers that differ by less have little effect."""

MOST = 10.0
"""Largest logarithm of a factor, and largest shift in units of the error, that a card may hold."""

RIDGE, SHIFT_RIDGE = 30.0, 300.0
"""Weights of the squares of the coefficients, against the sum of the losses of all galaxies.

Polynomials that follow the chance of a few hundred galaxies would make answers worse.
"""

FAR = 1e3
"""Deviations farther off, in errors, count as these."""

STEPS = 100
"""Steps of a fit at most; fits of 24,000 galaxies took ten."""

RANGE = (0.005, 0.995)
"""Quantiles of the values of a polynomial that it stays between."""

SMOOTHINGS = (0.3, 0.1, 0.03)
"""Widths over which the corner of the loss is rounded, in turn."""


def described(out: np.ndarray) -> np.ndarray:
    """What the calibration of an answer depends on.

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
    """The PSF and the noise that a network is shown, as numbers on which the calibration depends.

    Parameters
    ----------
    inputs : Inputs
        Of N galaxies.
    shown : collection of str
        The inputs that the network is shown.

    Returns
    -------
    ndarray, float, (N, 5), or fewer columns
        The logarithm of the noise-equivalent area of the PSF [pix^2], 1 / integral of PSF^2 (King 1983, PASP 95, 163);
        `sersicnet.schema.noise_numbers`; and the fraction of the PSF's light that is near its centre, weighted by
        exp(-r^2 / (4 area)), which is 0.96 for a Gaussian.
    """
    from sersicnet.image.views import BINNINGS

    columns, last = [np.empty((inputs.n, 0))], []
    if inputs.psf is not None and "psf" in shown:
        finest, coarse = np.asarray(inputs.psf[:, 0], float), np.asarray(inputs.psf[:, 2], float)
        area = 1 / np.maximum(BINNINGS[0] ** 2 * np.einsum("nij,nij->n", finest, finest), 1e-9)
        line = BINNINGS[2] * (np.arange(coarse.shape[-1]) - (coarse.shape[-1] - 1) / 2)
        weight = np.exp(-(line[:, None] ** 2 + line**2) / (4 * area[:, None, None]))
        whole = np.maximum(BINNINGS[3] * inputs.psf[:, 3].sum(axis=(1, 2), dtype=float), 1e-9)
        near = BINNINGS[2] * np.einsum("nij,nij->n", coarse, weight) / whole
        columns.append(np.broadcast_to(np.log(area)[:, None], (inputs.n, 1)))
        last.append(np.broadcast_to(near[:, None], (inputs.n, 1)))
    if inputs.noise is not None and "noise" in shown:
        columns.append(np.broadcast_to(inputs.noise, (inputs.n, INPUT_SHAPES.noise[0])))
    return np.hstack([*columns, *last])


def calibrated(table: Mapping[str, Any] | None, out: np.ndarray, seen: np.ndarray | None = None) -> np.ndarray:
    """The answers, moved to the median of the truths, with errors that hold as many of them as Gaussian ones would.

    Parameters
    ----------
    table : mapping or None
        The ``calibration`` of a card, of `fitted` or of earlier versions of sersicnet; None changes nothing.
    out : ndarray, float, (N, 8) or (N, 17)
        Answers, see `described`.
    seen : ndarray, float, (N, M), optional
        What the network saw of the images, see `conditions`; tables of earlier versions depend on fewer numbers.

    Returns
    -------
    ndarray, float64, (N, 8) or (N, 17)
        Where radius and index are moved, the errors of their logarithms are not. An ellipticity is moved no further
        than to 0 or 0.97. NaN where an answer is.
    """
    found = np.array(out, float)
    if not table:
        return found
    if "mag" in table:  # of earlier weights: a table by magnitude
        rows = np.column_stack([table["factors"], table.get("orientation", np.ones(len(table["mag"])))])
        return _scaled(found, np.column_stack([np.interp(out[:, 0], table["mag"], column) for column in rows.T]))
    numbers = _numbers(out, seen)[:, : len(table["domain"][0])]
    terms = _terms(numbers, table["domain"])
    if "shifts" in table:  # not of earlier versions
        found = _moved(found, terms, table["shifts"], table["shift_range"], table["domain"])
    return _scaled(found, np.exp(_values(terms, table["polynomials"], table["range"])))


def _moved(out: np.ndarray, terms: np.ndarray, shifts: Any, limits: Any, domain: Any) -> np.ndarray:
    """The answers minus shifts, in units of their errors; errors above the domain count as its highest."""
    values, errors = out[:, :N_TARGETS].copy(), out[:, N_TARGETS : 2 * N_TARGETS].copy()
    with np.errstate(invalid="ignore", divide="ignore"):
        errors[:, LOG] /= values[:, LOG]
        highest = np.exp(np.array(domain[1][N_TARGETS : 2 * N_TARGETS]))
        off = _values(terms, shifts, limits) * np.minimum(errors, highest)
        moved = decode(encode(values) - off)
    for column, target in enumerate(TARGETS):
        if target.name == "ellipticity":
            low, high = np.minimum(values[:, column], target.low), np.maximum(values[:, column], target.high)
            moved[:, column] = np.clip(moved[:, column], low, high)
    with np.errstate(invalid="ignore"):
        errors[:, LOG] *= moved[:, LOG]
    return np.hstack([moved, errors, out[:, 2 * N_TARGETS :]])


def _values(terms: np.ndarray, polynomials: Any, limits: Any) -> np.ndarray:
    """Values of polynomials within their limits; those of a galaxy do not depend on the others of its batch."""
    return np.clip(np.einsum("nt,kt->nk", terms, np.array(polynomials)), *np.array(limits))


def _scaled(out: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Answers with errors that are larger by factors, (N, 5): those of the targets and that of the components."""
    out[:, N_TARGETS : 2 * N_TARGETS] *= factors[:, :N_TARGETS]
    if out.shape[1] > 2 * N_TARGETS:
        out[:, -1] *= factors[:, N_TARGETS]
    return out


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

    Polynomials of the second degree, in units of the errors, are subtracted from the answers, such that half of the
    truths are above them: the median of the deviations, by quantile regression. The logarithm of the factor on an error
    is another polynomial. It minimises the sum of two quantile losses: of ln |deviation| at 68.27 %, and of
    ln(|deviation| / 1.96) at 95 %, see `sersicnet.schema.pulls`; for ellipticity and angle, the first alone. Thus
    errors hold as many truths for bright and faint, small and large galaxies, in images of different telescopes; where
    deviations have long tails, a factor is between those of the two levels. The variables are the answer, its errors,
    the width of the PSF, its light near the centre and the noise. The fewer galaxies, the nearer both polynomials are
    to a constant.

    Parameters
    ----------
    out : ndarray, float, (N, 8) or (N, 17)
        Answers, see `described`.
    targets : ndarray, float, (N, 4)
        True values. Galaxies with a value that is not finite, or with an error of 0, do not count.
    orientation : ndarray, float, (N, 2), optional
        True components of the ellipticity, see `sersicnet.schema.orientation`.
    seen : ndarray, float, (N, M), optional
        What the network saw of the images, see `conditions`.

    Returns
    -------
    dict or None
        ``domain``, lowest and highest of the numbers of `described` and `conditions`; ``shifts``, coefficients for the
        four targets; ``polynomials``, those of the factors, for the four targets and the angle; ``shift_range`` and
        ``range``, lowest and highest of their values. None for fewer than 600 galaxies.

    References
    ----------
    Koenker & Bassett 1978, Econometrica 46, 33; Romano et al. 2019, arXiv:1905.03222 (conformalised regression).
    """
    numbers = _numbers(out, seen)
    good = np.isfinite(np.hstack([numbers, out, encode(targets)])).all(axis=1) & (out[:, -1] > 0)
    out, targets, numbers = np.array(out[good], float), targets[good], numbers[good]
    if len(out) < LEAST:
        return None
    domain = np.quantile(numbers, [0.01, 0.99], axis=0)
    # What is the same for all of them, such as a single PSF, is in the middle of its domain, where it has no effect.
    middle, half = domain.mean(axis=0), np.maximum(np.ptp(domain, axis=0) / 2, LEAST_HALF)
    domain = np.array([middle - half, middle + half]).round(5)
    terms = _terms(numbers, domain)
    off = pulls(out[:, :N_TARGETS], out[:, N_TARGETS : 2 * N_TARGETS], targets)
    shifts = np.array([_quantile(terms, column, [(0.5, 0.0)], SHIFT_RIDGE) for column in off.T]).round(5)
    shift_range = _range(terms, shifts)
    moved = _moved(out, terms, shifts, shift_range, domain)
    columns = list(np.abs(pulls(moved[:, :N_TARGETS], moved[:, N_TARGETS : 2 * N_TARGETS], targets)).T)
    if orientation is not None and np.isfinite(orientation := orientation[good]).all():
        # The angle has its error from the components across the direction that they point to.
        (x, y), (true_x, true_y) = out[:, COMPONENTS].T, orientation.T
        turned = np.abs(np.arctan2(x * true_y - y * true_x, x * true_x + y * true_y))
        columns.append(turned * np.hypot(x, y) / out[:, -1])
    levels = [(level, np.log(within)) for level, within in WITHIN]
    # Ellipticities and angles have limits: where errors are large, more than 95 % are within 1.96 of the right ones.
    each = [levels[: 1 if k >= TARGET_NAMES.index("ellipticity") else None] for k in range(len(columns))]
    logarithms = [np.log(np.maximum(column, 1 / FAR)) for column in columns]
    found = np.array([_quantile(terms, *one, RIDGE) for one in zip(logarithms, each, strict=True)])
    if len(found) == N_TARGETS:
        found = np.vstack([found, np.zeros(terms.shape[1])])
    found = found.round(5)
    return {
        "domain": domain.tolist(),
        "shifts": shifts.tolist(),
        "shift_range": shift_range.tolist(),
        "polynomials": found.tolist(),
        "range": _range(terms, found).tolist(),
    }


def _range(terms: np.ndarray, polynomials: np.ndarray) -> np.ndarray:
    """Between which values polynomials stay."""
    return np.clip(np.quantile(terms @ polynomials.T, RANGE, axis=0), -MOST, MOST).round(5)


def _quantile(terms: np.ndarray, values: np.ndarray, levels: Sequence[tuple[float, float]], ridge: float) -> np.ndarray:
    """Coefficients of terms, (N, T), whose sum is a quantile of values, (N,), or lies between several.

    The first term is 1. A level is a fraction, and how far above the sum its quantile is.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    n, values = len(values), np.clip(values, -FAR, FAR)
    weight = np.full(terms.shape[1], ridge / n)
    weight[0] = 0

    def loss(coefficients: np.ndarray, smoothing: float) -> tuple[float, np.ndarray]:
        total, slope, rest = 0.0, np.zeros(n), values - terms @ coefficients
        for level, above in levels:
            off = rest - above
            positive = smoothing * np.logaddexp(0, off / smoothing)  # of off, its corner rounded
            total += (positive - (1 - level) * off).mean()
            slope += 1 - level - expit(off / smoothing)
        pull = weight * coefficients
        return float(total + pull @ coefficients), terms.T @ slope / n + 2 * pull

    def curvature(coefficients: np.ndarray, smoothing: float) -> np.ndarray:
        rest = values - terms @ coefficients
        rows = sum(expit(off) * expit(-off) for off in ((rest - above) / smoothing for _, above in levels))
        return np.asarray(terms.T @ (terms * (rows / (n * smoothing))[:, None]) + np.diag(2 * weight))

    coefficients = np.zeros(terms.shape[1])
    coefficients[0] = np.quantile(values, levels[0][0])
    for smoothing in SMOOTHINGS:
        options = {"maxiter": STEPS}
        found = minimize(loss, coefficients, (smoothing,), "trust-exact", True, hess=curvature, options=options)
        coefficients = found.x
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
    if any(len(row) != N_DESCRIBED for row in table["domain"]):  # those of the first versions depend on no more
        of_image = N_CONDITIONS if "shifts" in table else N_EARLIER
        numbers += sum(n for name, n in of_image.items() if name in shown)
    sizes = {"domain": (2, numbers), "polynomials": (N_TARGETS + 1, _n_terms(numbers)), "range": (2, N_TARGETS + 1)}
    if "shifts" in table:
        sizes |= {"shifts": (N_TARGETS, _n_terms(numbers)), "shift_range": (2, N_TARGETS)}
    for key, (rows, columns) in sizes.items():
        values = [[number(value) for value in row] for row in table[key]]
        if len(values) != rows or any(len(row) != columns for row in values):
            raise ValueError(f"the {key} of its calibration has {rows} x {columns} numbers; received others")
        if key == "domain" and any(low >= high for low, high in zip(*values, strict=True)):
            raise ValueError("the domain of its calibration is from lower to higher numbers")
        if key.endswith("range") and any(low > high for low, high in zip(*values, strict=True)):
            raise ValueError(f"the {key} of its calibration is from lower to higher numbers")
        if key.endswith("range") and np.abs(values).max() > MOST:
            raise ValueError(f"the {key} of its calibration is within {MOST:g} of 0; received {np.abs(values).max():g}")


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
