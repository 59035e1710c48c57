"""Priors of fitted galaxies, and the scales in which bounded parameters are fitted."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from sersicnet.errors import InputError

N_BOUNDS = (0.3, 8.0)
"""Range of Sersic indices."""

Q_BOUNDS = (0.02, 1.0)
"""Range of axis ratios."""

R_BOUNDS = (0.05, 1000.0)
"""Range of effective radii, pixels."""

_EDGE = 1e-3
"""Minimum distance of a start value or a result from a bound, as a fraction of the range."""


@dataclass(frozen=True)
class Scale:
    """How a bounded parameter is fitted: by the normal score of its place in a range.

    Attributes
    ----------
    log : bool
        Whether the range is one of the logarithm.
    low, high : float
        Bounds; 0 and inf with `log` for none: the logarithm itself is fitted then.

    Arrays in their places are the scales of several parameters, element by element.
    """

    log: bool | np.ndarray
    low: float | np.ndarray
    high: float | np.ndarray

    @functools.cached_property
    def _bounded(self) -> np.ndarray:
        return np.isfinite(self.high)

    @functools.cached_property
    def _ends(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the range of what is scored begins, and how long it is; 0 and 1 without bounds."""
        low, high = np.where(self._bounded, self.low, 1.0), np.where(self._bounded, self.high, np.exp(1))
        low, high = (np.where(self.log, np.log(np.where(self.log, end, 1.0)), end) for end in (low, high))
        return low, high - low

    def to_free(self, values: ArrayLike) -> np.ndarray:
        """Normal scores of values; those outside of the bounds are brought just inside."""
        values = np.asarray(values, dtype=float)
        inner = np.where(self.log, np.log(np.maximum(values, 1e-300)), values)
        low, length = self._ends
        scores = special.ndtri(np.clip((inner - low) / length, _EDGE, 1 - _EDGE))
        return np.where(self._bounded, scores, inner)

    def from_free(self, free: ArrayLike) -> np.ndarray:
        """Values of normal scores."""
        low, length = self._ends
        inner = np.where(self._bounded, low + length * special.ndtr(free), np.minimum(np.maximum(free, -80), 80))
        values = np.where(self.log, np.exp(np.where(self.log, inner, 0.0)), inner)
        return np.minimum(np.maximum(values, self.low), self.high)

    def slope(self, free: ArrayLike) -> np.ndarray:
        """Derivative of the value with respect to what is fitted."""
        bell = np.exp(-0.5 * np.square(free)) / np.sqrt(2 * np.pi)
        return np.where(self._bounded, self._ends[1] * bell, 1.0) * np.where(self.log, self.from_free(free), 1.0)

    def at_bound(self, free: ArrayLike) -> np.ndarray:
        """Whether a normal score says that the value ran into a bound."""
        return self._bounded & (special.ndtr(-np.abs(free)) < _EDGE)


@dataclass(frozen=True)
class Prior:
    """What is known of galaxies before looking at one: normal, in the scales' normal scores.

    Attributes
    ----------
    scales : tuple of Scale
        For flux, effective radius, Sersic index and axis ratio.
    mean : ndarray, float, (4,)
        Normal scores of the most probable galaxy.
    precision : ndarray, float, (4, 4)
        Inverse of their covariance; zero where nothing is known.
    """

    scales: tuple[Scale, Scale, Scale, Scale]
    mean: np.ndarray
    precision: np.ndarray

    @classmethod
    def none(cls) -> Prior:
        """Nothing but the bounds: a fit by least squares."""
        return cls(_WIDE, np.zeros(4), np.zeros((4, 4)))

    @classmethod
    def uniform(
        cls,
        flux: tuple[float, float],
        r_eff: tuple[float, float],
        n: tuple[float, float],
        q: tuple[float, float],
        *,
        log: tuple[bool, bool, bool, bool] = (True, False, False, False),
    ) -> Prior:
        """Independent and uniform in ranges, of the logarithm where `log` says so."""
        scales = tuple(Scale(flag, *ends) for flag, ends in zip(log, (flux, r_eff, n, q), strict=True))
        return cls(scales, np.zeros(4), np.eye(4))  # type: ignore[arg-type]

    @classmethod
    def of(cls, galaxies: np.ndarray) -> Prior:
        """What a sample tells of radius, index and axis ratio at a given flux.

        Nothing is assumed of the flux itself, so that no magnitude is drawn
        towards the most numerous, faintest ones.

        Parameters
        ----------
        galaxies : ndarray, float, (N, 4)
            Flux, effective radius, Sersic index, axis ratio, in the units of
            the stamps to be fitted.

        Raises
        ------
        InputError
            If there are fewer than 20 galaxies, or they do not vary.
        """
        galaxies = np.asarray(galaxies, dtype=float)
        galaxies = galaxies[np.isfinite(galaxies).all(axis=1) & (galaxies[:, :2] > 0).all(axis=1)]
        if len(galaxies) < 20:
            raise InputError(f"A prior is made from at least 20 galaxies; received {len(galaxies)}.")
        free = np.stack([scale.to_free(column) for scale, column in zip(_WIDE, galaxies.T, strict=True)])
        mean, covariance = free.mean(axis=1), np.cov(free)
        if not np.linalg.cond(covariance) < 1e10:
            raise InputError("The galaxies of a prior differ from each other in flux, radius, index and axis ratio.")
        slope = covariance[1:, 0] / covariance[0, 0]
        left = covariance[1:, 1:] - np.outer(slope, covariance[0, 1:])
        from_flux = np.column_stack([-slope, np.eye(3)])
        return cls(_WIDE, mean, from_flux.T @ np.linalg.inv(left) @ from_flux)


_WIDE = (Scale(True, 0.0, np.inf), Scale(True, *R_BOUNDS), Scale(True, *N_BOUNDS), Scale(False, *Q_BOUNDS))
