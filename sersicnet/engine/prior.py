"""Priors of fitted galaxies, and the scales in which bounded parameters are fitted."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

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
    """The scale of a bounded parameter: it is fitted through the normal score of its position in a range.

    Arrays as attributes describe several parameters, element by element.

    Attributes
    ----------
    log : bool
        Whether the range is linear in the logarithm of the parameter.
    low, high : float
        Bounds; 0 and inf with `log` for an unbounded parameter, whose logarithm is fitted directly.
    """

    log: bool | np.ndarray
    low: float | np.ndarray
    high: float | np.ndarray

    @functools.cached_property
    def _bounded(self) -> np.ndarray:
        return np.isfinite(self.high)

    @functools.cached_property
    def _ends(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower end and length of the range, of the logarithm if `log` is set; 0 and 1 without bounds."""
        low, high = np.where(self._bounded, self.low, 1.0), np.where(self._bounded, self.high, np.exp(1))
        low, high = (np.where(self.log, np.log(np.where(self.log, end, 1.0)), end) for end in (low, high))
        return low, high - low

    def to_free(self, values: ArrayLike) -> np.ndarray:
        """Convert values to normal scores; values outside the bounds are moved just inside."""
        values = np.asarray(values, dtype=float)
        inner = np.where(self.log, np.log(np.maximum(values, 1e-300)), values)
        low, length = self._ends
        scores = special.ndtri(np.clip((inner - low) / length, _EDGE, 1 - _EDGE))
        return np.where(self._bounded, scores, inner)

    def from_free(self, free: ArrayLike) -> np.ndarray:
        """Convert normal scores to values."""
        low, length = self._ends
        inner = np.where(self._bounded, low + length * special.ndtr(free), np.minimum(np.maximum(free, -80), 80))
        values = np.where(self.log, np.exp(np.where(self.log, inner, 0.0)), inner)
        return np.minimum(np.maximum(values, self.low), self.high)

    def slope(self, free: ArrayLike) -> np.ndarray:
        """Derivative of the value with respect to the normal score."""
        bell = np.exp(-0.5 * np.square(free)) / np.sqrt(2 * np.pi)
        return np.where(self._bounded, self._ends[1] * bell, 1.0) * np.where(self.log, self.from_free(free), 1.0)

    def at_bound(self, free: ArrayLike) -> np.ndarray:
        """Whether the value of a normal score has reached a bound."""
        return self._bounded & (special.ndtr(-np.abs(free)) < _EDGE)


@dataclass(frozen=True)
class Prior:
    """Prior of the parameters of a galaxy: a multivariate normal distribution of their normal scores.

    Attributes
    ----------
    scales : tuple of Scale
        Scales of flux, effective radius, Sersic index and axis ratio.
    mean : ndarray, float, (4,)
        Mean of the normal scores.
    precision : ndarray, float, (4, 4)
        Inverse covariance of the normal scores; zero without prior information.
    """

    scales: tuple[Scale, Scale, Scale, Scale]
    mean: np.ndarray
    precision: np.ndarray

    @classmethod
    def none(cls) -> Prior:
        """A flat prior within the bounds, for fits by least squares."""
        return cls(_WIDE, np.zeros(4), np.zeros((4, 4)))

    def in_units(self, unit: float) -> Prior:
        """The same prior for fluxes in another unit, which is given in the old one."""
        flux = self.scales[0]
        # The logarithm of an unbounded flux is fitted; a bounded flux is fitted relative to its range.
        shift = np.array([0.0 if np.isfinite(flux.high) else -np.log(unit), 0, 0, 0])
        scaled = replace(flux, low=flux.low / unit, high=flux.high / unit)
        return replace(self, scales=(scaled, *self.scales[1:]), mean=self.mean + shift)

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
        """Independent, uniform priors in the given ranges; uniform in the logarithm where `log` is set."""
        scales = tuple(Scale(flag, *ends) for flag, ends in zip(log, (flux, r_eff, n, q), strict=True))
        return cls(scales, np.zeros(4), np.eye(4))  # type: ignore[arg-type]

    @classmethod
    def of(cls, galaxies: np.ndarray) -> Prior:
        """The distribution of radius, index and axis ratio at a given flux, from a sample of galaxies.

        The prior of the flux itself is flat, so that magnitudes are not biased towards the faint
        galaxies, which are the most numerous.

        Parameters
        ----------
        galaxies : ndarray, float, (N, 4)
            Flux, effective radius, Sersic index, axis ratio, in the units of
            the stamps that are fitted. Rows that are not finite, or without positive flux and
            radius, are ignored.

        Raises
        ------
        InputError
            If there are fewer than 20 galaxies, or their parameters do not vary.
        """
        galaxies = np.asarray(galaxies, dtype=float)
        galaxies = galaxies[np.isfinite(galaxies).all(axis=1) & (galaxies[:, :2] > 0).all(axis=1)]
        if len(galaxies) < 20:
            raise InputError(f"A prior is made from at least 20 galaxies; received {len(galaxies)}.")
        free = np.stack([scale.to_free(column) for scale, column in zip(_WIDE, galaxies.T, strict=True)])
        mean, covariance = free.mean(axis=1), np.cov(free)
        if not np.linalg.cond(covariance) < 1e10:
            raise InputError(
                "The galaxies of a prior must differ independently in flux, radius, index and axis ratio; received "
                f"{len(galaxies)} that do not. Give other galaxies."
            )
        slope = covariance[1:, 0] / covariance[0, 0]
        left = covariance[1:, 1:] - np.outer(slope, covariance[0, 1:])
        from_flux = np.column_stack([-slope, np.eye(3)])
        return cls(_WIDE, mean, from_flux.T @ np.linalg.inv(left) @ from_flux)


_WIDE = (Scale(True, 0.0, np.inf), Scale(True, *R_BOUNDS), Scale(True, *N_BOUNDS), Scale(False, *Q_BOUNDS))
