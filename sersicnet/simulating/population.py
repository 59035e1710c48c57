"""Which galaxies there are: joint distributions of their parameters, and counts on the sky.

A `Mixture` of normal distributions in magnitude, log radius, log index and logit of
the axis ratio describes both a catalogue, smoothed, and the survey that the
built-in numbers come from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sersicnet.errors import InputError
from sersicnet.schema import TARGET_NAMES, TARGETS

Ranges = dict[str, tuple[float, float]]

FULL_RANGES: Ranges = {target.name: (target.low, target.high) for target in TARGETS}
LEAST_ROWS = 100
"""Galaxies below which a catalogue says too little about four dimensions."""

_Q_RANGE = (0.03, 0.97)
"""Axis ratios are moved into it before the logit, which has no value at 0 and 1."""


def _transformed(values: np.ndarray) -> np.ndarray:
    """Magnitude, radius [pix], index and ellipticity to the space of the mixtures, (N, 4)."""
    mag, r_eff, n, e = values.T
    q = np.clip(1 - e, *_Q_RANGE)
    return np.column_stack([mag, np.log10(r_eff), np.log10(n), np.log(q / (1 - q))])


def _physical(values: np.ndarray) -> np.ndarray:
    mag, r_eff, n, logit = values.T
    with np.errstate(over="ignore"):
        return np.column_stack([mag, 10**r_eff, 10**n, 1 / (1 + np.exp(logit))])


def _first_within(ranges: Ranges, one: Callable[[], Sequence[float]], prior: str) -> dict[str, float]:
    """The first galaxy within the ranges; refuses ranges that have next to none."""
    for _ in range(1000):
        galaxy = dict(zip(TARGET_NAMES, one(), strict=True))
        if all(low <= galaxy[name] <= high for name, (low, high) in ranges.items()):
            return galaxy
    raise InputError(f"The prior {prior} has no galaxies within the ranges {ranges}. Widen them.")


@dataclass(frozen=True, eq=False)
class Mixture:
    """A joint distribution of the four parameters.

    A sum of normal distributions in magnitude, log10 of the radius [pix], log10
    of the index and logit of the axis ratio.

    Attributes
    ----------
    name : str
    sha256 : str
        Of the numbers, or of the table that they were made from.
    weights : ndarray, float, (K,)
        Unit sum.
    means : ndarray, float, (K, 4)
    roots : ndarray, float, (K, 4, 4) or (1, 4, 4)
        Lower Cholesky factors of the covariances; one for all, or one each.
    """

    name: str
    sha256: str
    weights: np.ndarray
    means: np.ndarray
    roots: np.ndarray

    def record(self) -> dict[str, Any]:
        """What names it in a dataset's configuration."""
        return {"name": self.name, "sha256": self.sha256}

    def draw(self, rng: np.random.Generator, ranges: Ranges) -> dict[str, float]:
        """Draw one galaxy; what lies outside of `ranges` is drawn again.

        Raises
        ------
        InputError
            If the distribution has next to nothing within the ranges.
        """

        def one() -> list[float]:
            k = min(int(np.searchsorted(np.cumsum(self.weights), rng.random())), len(self.means) - 1)
            root = self.roots[k if len(self.roots) > 1 else 0]
            values: list[float] = _physical((self.means[k] + root @ rng.standard_normal(4))[None])[0].tolist()
            return values

        return _first_within(ranges, one, self.name)

    def log_density(self, values: np.ndarray) -> np.ndarray:
        """Logarithm of the density, up to a constant.

        Parameters
        ----------
        values : ndarray, float, (N, 4)
            Magnitude, radius [pix], index and ellipticity.

        Returns
        -------
        ndarray, float64, (N,)
        """
        points = _transformed(values)
        each = np.empty((len(self.weights), len(values)))
        for k, (weight, mean) in enumerate(zip(self.weights, self.means, strict=True)):
            root = self.roots[k if len(self.roots) > 1 else 0]
            off = np.linalg.solve(root, (points - mean).T)
            each[k] = np.log(weight) - 0.5 * (off**2).sum(axis=0) - np.log(np.diag(root)).sum()
        q = np.clip(1 - values[:, 3], *_Q_RANGE)
        return np.logaddexp.reduce(each) - np.log(values[:, 1] * values[:, 2] * q * (1 - q))

    def log_counts(self, mag: np.ndarray) -> np.ndarray:
        """Logarithm of the density of magnitudes alone, up to the constant of `log_density`, float64, (N,)."""
        return np.logaddexp.reduce(self._log_counts(np.asarray(mag)[:, None]), axis=1)

    def _log_counts(self, mag: np.ndarray | float) -> np.ndarray:
        """Of each component."""
        variance = (self.roots @ self.roots.transpose(0, 2, 1))[:, 0, 0]
        return np.log(self.weights) - 0.5 * ((mag - self.means[:, 0]) ** 2 / variance + np.log(variance))

    def at_magnitude(self, mag: float, rng: np.random.Generator) -> tuple[float, float, float]:
        """Radius [pix], index and ellipticity of a galaxy of a given magnitude, moved into what can be drawn."""
        r_eff, n, e = self._shape_at(mag, rng)
        return (
            float(np.clip(r_eff, 0.3, FULL_RANGES["r_eff_pix"][1])),
            float(np.clip(n, *FULL_RANGES["sersic_n"])),
            float(np.clip(e, 0, 0.95)),
        )

    def _shape_at(self, mag: float, rng: np.random.Generator) -> tuple[float, float, float]:
        covariance = self.roots @ self.roots.transpose(0, 2, 1)
        variance = covariance[:, 0, 0]
        distance = mag - self.means[:, 0]
        log_weight = self._log_counts(mag)
        weights = np.exp(log_weight - log_weight.max())
        k = rng.choice(len(weights), p=weights / weights.sum())
        slope = covariance[k, 1:, 0] / variance[k]
        rest = covariance[k, 1:, 1:] - np.outer(slope, covariance[k, 0, 1:])
        values = self.means[k, 1:] + slope * distance[k] + np.linalg.cholesky(rest) @ rng.standard_normal(3)
        _, r_eff, n, e = _physical(np.concatenate([[mag], values])[None])[0].tolist()
        return r_eff, n, e


@dataclass(frozen=True, eq=False)
class FlatInMagnitude:
    """The galaxies of a mixture, as many at every magnitude.

    Attributes
    ----------
    mixture : Mixture
    known : (float, float)
        Magnitudes that it knows: there are no brighter galaxies, and fainter ones are shaped as those at the end.
    """

    mixture: Mixture
    known: tuple[float, float]

    def record(self) -> dict[str, Any]:
        """What names it in a dataset's configuration."""
        return {"name": f"{self.mixture.name}, evenly in magnitude", "sha256": self.mixture.sha256}

    def draw(self, rng: np.random.Generator, ranges: Ranges) -> dict[str, float]:
        """Draw one galaxy, as `Mixture.draw`."""

        def one() -> tuple[float, ...]:
            mag = rng.uniform(max(ranges["mag"][0], self.known[0]), ranges["mag"][1])
            return mag, *self.mixture._shape_at(float(np.clip(mag, *self.known)), rng)

        return _first_within(ranges, one, self.mixture.name)

    def log_density(self, values: np.ndarray) -> np.ndarray:
        """Logarithm of the density of radius, index and ellipticity at a magnitude, as `Mixture.log_density`.

        It has a unit integral, but for what is drawn again.
        """
        mag = np.clip(values[:, 0], *self.known)
        shapes = self.mixture.log_density(np.column_stack([mag, values[:, 1:]])) - self.mixture.log_counts(mag)
        shapes -= 1.5 * np.log(2 * np.pi) + 2 * np.log(np.log(10))
        return np.where(values[:, 0] >= self.known[0], shapes, -np.inf)


# Weight; means; standard deviations; correlations (12, 13, 14, 23, 24, 34).
_CANDELS = (
    (0.269, (24.564, 0.612, 0.137, -0.086), (0.413, 0.227, 0.278, 0.807), (-0.16, -0.16, -0.14, -0.15, -0.29, -0.05)),
    (0.177, (22.867, 0.878, 0.025, 0.013), (0.999, 0.171, 0.225, 0.840), (-0.45, 0.00, 0.22, 0.10, -0.44, 0.03)),
    (0.168, (22.610, 0.661, 0.225, 1.189), (1.352, 0.266, 0.264, 1.050), (-0.42, -0.32, 0.33, -0.21, -0.13, -0.13)),
    (0.167, (23.780, 0.614, 0.039, -0.349), (0.730, 0.201, 0.255, 0.622), (-0.19, -0.36, -0.14, -0.49, -0.62, 0.45)),
    (0.149, (25.232, 0.555, 0.107, -0.109), (0.167, 0.208, 0.308, 0.957), (-0.05, -0.02, -0.11, -0.03, -0.33, -0.12)),
    (0.070, (24.619, 1.062, 0.554, -0.045), (0.554, 0.279, 0.147, 1.247), (-0.43, 0.11, -0.09, 0.06, -0.28, -0.03)),
)
CANDELS_MAG = (18.0, 25.0)
CANDELS_SCALE = 0.06
"""Arcsec per pixel of `candels_mixture`'s radii."""

CANDELS_RANGES: Ranges = {**FULL_RANGES, "mag": (18.0, 25.5)}
"""Where `candels_mixture` has galaxies."""


def candels_mixture(pixel_scale: float = CANDELS_SCALE) -> Mixture:
    """The galaxies of CANDELS/COSMOS in F160W, with radii in pixels of a given size.

    Six normal distributions, fitted by expectation maximisation to the 13,860
    galaxies of van der Wel et al. (2014, ApJ 788, 28; 3D-HST v4.1, GALFIT's
    flag 0) with 17 < mag < 25.5 and parameters within `sersicnet.schema.TARGETS`.
    Use it between the magnitudes of `CANDELS_MAG`. Flag 0 leaves out most
    galaxies brighter than mag 20.

    Parameters
    ----------
    pixel_scale : float
        Arcsec per pixel.

    Returns
    -------
    Mixture
    """
    weights, means, sigmas, correlations = (np.array(column) for column in zip(*_CANDELS, strict=True))
    covariance = np.tile(np.eye(4), (len(weights), 1, 1))
    upper = np.triu_indices(4, 1)
    covariance[:, upper[0], upper[1]] = covariance[:, upper[1], upper[0]] = correlations
    covariance *= sigmas[:, :, None] * sigmas[:, None, :]
    means[:, 1] += np.log10(CANDELS_SCALE / pixel_scale)
    digest = hashlib.sha256(repr(_CANDELS).encode()).hexdigest()
    return Mixture("candels", digest, weights / weights.sum(), means, np.linalg.cholesky(covariance))


def candels_evenly(pixel_scale: float = CANDELS_SCALE) -> FlatInMagnitude:
    """The galaxies of `candels_mixture`, as many at every magnitude."""
    return FlatInMagnitude(candels_mixture(pixel_scale), CANDELS_RANGES["mag"])


def from_catalogue(path: str | Path, pixel_scale: float) -> tuple[Mixture, Ranges]:
    """A catalogue of real galaxies, smoothed.

    Each galaxy becomes a normal distribution with the covariance of all, h^2
    times, where h is Silverman's (4 / (d + 2))^(1 / (d + 4)) N^(-1 / (d + 4)) in
    d = 4 dimensions: 0.3 for 9,000 galaxies. The galaxies are moved towards
    their mean by sqrt(1 - h^2), so that the whole is as wide as the catalogue.

    Parameters
    ----------
    path : str or Path
        Table with columns ``mag`` (AB), ``r_eff_pix`` or ``r_eff`` (arcsec; both along the
        semi-major axis), ``sersic_n``, and ``ellipticity`` or ``q``, in any format, units and
        spelling that `sersicnet.catalogue.parameters.Galaxies` reads. Rows with a value missing,
        or outside of `sersicnet.schema.TARGETS`, are left out.
    pixel_scale : float
        Arcsec per pixel, for ``r_eff``.

    Returns
    -------
    mixture : Mixture
    ranges : dict
        For each parameter, from the smallest to the largest value used.

    Raises
    ------
    InputError
        If a column is missing, or fewer than `LEAST_ROWS` galaxies are left.
    """
    path = Path(path)
    values = galaxies_of(path, pixel_scale, FULL_RANGES)
    points = _transformed(values)
    mean, covariance = points.mean(axis=0), np.cov(points.T)
    scatter = np.sqrt(np.diag(covariance))
    if (scatter < 1e-6).any():
        same = ", ".join(name for name, s in zip(TARGET_NAMES, scatter, strict=True) if s < 1e-6)
        raise InputError(f"A prior needs galaxies that differ; in {path} all have the same {same}.")
    d = len(TARGETS)
    h = (4 / (d + 2)) ** (1 / (d + 4)) * len(points) ** (-1 / (d + 4))
    root = np.linalg.cholesky(h**2 * (covariance + 1e-9 * np.diag(np.diag(covariance))))
    mixture = Mixture(
        path.name,
        hashlib.sha256(path.read_bytes()).hexdigest(),
        np.full(len(points), 1 / len(points)),
        mean + np.sqrt(1 - h**2) * (points - mean),
        root[None],
    )
    ranges = {name: (float(v.min()), float(v.max())) for name, v in zip(TARGET_NAMES, values.T, strict=True)}
    return mixture, ranges


def galaxies_of(path: str | Path, pixel_scale: float, ranges: Ranges) -> np.ndarray:
    """The galaxies of a table that are within ranges: magnitude, radius [pix], index, ellipticity, float64, (N, 4).

    Parameters
    ----------
    path, pixel_scale
        As for `from_catalogue`. Radii in arcsec go before those in pixels, which may be of another image.
    ranges : dict
        Of the four parameters, radii in pixels of `pixel_scale`.

    Raises
    ------
    InputError
        As `from_catalogue`.
    """
    from sersicnet.catalogue.parameters import Galaxies

    values = Galaxies.read(Path(path)).targets(pixel_scale, of_other_images=True)
    low, high = np.array([ranges[name] for name in TARGET_NAMES]).T
    with np.errstate(invalid="ignore"):
        values = values[((values >= low) & (values <= high)).all(axis=1)]
    if len(values) < LEAST_ROWS:
        raise InputError(
            f"A prior needs at least {LEAST_ROWS} galaxies with finite values within its ranges (radii from "
            f"{low[1]:g} to {high[1]:g} pixels); {path} has {len(values)}."
        )
    return values


# --- counts on the sky --------------------------------------------------------------------------------

_COUNT_MAG = np.arange(16.5, 27)
_LOG_GALAXIES = np.log10([0.08, 0.26, 0.55, 1.24, 3.0, 5.9, 11.3, 21.0, 36.0, 48.0, 60.0])
_LOG_STARS = np.log10([0.14, 0.21, 0.28, 0.31, 0.38, 0.58, 0.60, 0.80, 0.80, 0.80, 0.80])
_COUNT_EDGES = (16.0, 26.5)
_DEEPEST, _DEEP_SLOPE = 30.0, 0.14
POINT = 0.02
"""Radius of a star in pixels."""


def _counts(log_density: np.ndarray, deep_slope: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes, and how many objects an arcmin^2 are brighter; with a slope, they go on from the last magnitude."""
    bright, faint = _COUNT_EDGES if deep_slope is None else (_COUNT_EDGES[0], _DEEPEST)
    mag = np.linspace(bright, faint, round(20 * (faint - bright)) + 1)
    beyond = np.maximum(mag - _COUNT_MAG[-1], 0) * (deep_slope or 0.0)
    density = 10 ** (np.interp(mag, _COUNT_MAG, log_density) + beyond)
    steps = (density[1:] + density[:-1]) / 2 * np.diff(mag)
    return mag, np.concatenate([[0.0], np.cumsum(steps)])


_GALAXIES, _STARS = _counts(_LOG_GALAXIES), _counts(_LOG_STARS)
_DEEP_GALAXIES, _DEEP_STARS = _counts(_LOG_GALAXIES, _DEEP_SLOPE), _counts(_LOG_STARS, 0.0)
_CANDELS_MIXTURE = candels_mixture()


def deep_objects(size: int, pixel_scale: float, limit: float) -> int:
    """Mean number of objects that `draw_neighbours` draws of a deep sky, rounded."""
    brighter = sum(float(np.interp(limit, mag, number)) for mag, number in (_DEEP_GALAXIES, _DEEP_STARS))
    return round(brighter * (size * pixel_scale / 60) ** 2)


def draw_neighbours(
    rng: np.random.Generator, size: int, pixel_scale: float, limit: float = np.inf, *, deep: bool = False
) -> list[dict[str, float]]:
    """Draw the other objects of a piece of sky at high galactic latitude.

    Galaxies and stars have the counts of the 210 arcmin^2 of CANDELS/COSMOS in
    F160W to mag 26.5 (3D-HST v4.1; van der Wel et al. 2014): 0.55 galaxies an
    arcmin^2 and magnitude at mag 18.5, 3.0 at 20.5, 11.3 at 22.5, 36 at 24.5, and
    0.3 to 0.8 stars (what GALFIT found with no size at all). The last magnitude
    is extrapolated, since the catalogue is not complete there. Sizes and shapes
    of the galaxies are those of `candels_mixture` at their magnitude; positions are
    uniform, without clustering.

    Parameters
    ----------
    rng : numpy Generator
    size : int
        Pixels a side.
    pixel_scale : float
        Arcsec per pixel.
    limit : float
        Objects fainter than this AB magnitude are left out.
    deep : bool
        Whether counts go on to `limit`, at most mag 30: those of galaxies rise by a factor 10**0.14 a magnitude beyond
        mag 26.5, as in deep fields; their shapes remain those of the faintest ones.

    Returns
    -------
    list of dict
        With ``mag, r_eff_pix, sersic_n, ellipticity, theta, x, y``; stars are
        much smaller than a pixel.
    """
    area = (size * pixel_scale / 60) ** 2
    objects = []
    counts = (_DEEP_GALAXIES, _DEEP_STARS) if deep else (_GALAXIES, _STARS)
    for (mag, number), is_star in zip(counts, (False, True), strict=True):
        for brighter in rng.uniform(0, number[-1], rng.poisson(number[-1] * area)):
            m = float(np.interp(brighter, number, mag))
            if m > limit:
                continue
            shape = (POINT, 1.0, 0.0)
            if not is_star:
                r_eff, n, e = _CANDELS_MIXTURE.at_magnitude(float(np.clip(m, *CANDELS_RANGES["mag"])), rng)
                shape = (r_eff * CANDELS_SCALE / pixel_scale, n, e)
            objects.append(
                {
                    "mag": m,
                    **dict(zip(TARGET_NAMES[1:], shape, strict=True)),
                    "theta": rng.uniform(-90, 90),
                    "x": rng.uniform(-0.5, size - 0.5),
                    "y": rng.uniform(-0.5, size - 0.5),
                }
            )
    return objects
