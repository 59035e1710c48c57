r"""Fit Sersic profiles to stamps: Levenberg-Marquardt on whitened residuals.

The noise of a drizzled image is correlated: it is white noise convolved with a
kernel. Residuals are whitened in Fourier space, by division by the square root of
the noise's power spectrum, which is measured on blank sky. The sum of squares of
whitened residuals is a proper likelihood, and gives correct errors. The Poisson
noise of the source is white before the convolution with the kernel. It is computed
from the model, since a variance computed from noisy data gives too much weight to
pixels that are low by chance.

Bounded parameters are fitted through normal scores: the fraction of the range
below a value is the probability of a unit normal distribution below its score. No
step leaves the bounds, and priors that are uniform in a range or normal add
quadratic terms to the sum of squares.

Each galaxy is fitted separately, so that it does not wait for the iterations of
others, in the smallest of several windows that contains it. Threads share the
galaxies. A small window constrains the sky only weakly, so the sky in the rest of
the stamp is used as a prior.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy import linalg, special
from threadpoolctl import threadpool_limits

from sersicnet.engine.prior import N_BOUNDS, Q_BOUNDS, Prior, Scale
from sersicnet.engine.render import N_PARAMETERS, Renderer, log_norm, sersic_b
from sersicnet.engine.whitening import Cutout, Frame
from sersicnet.errors import InputError
from sersicnet.schema import STAMP_SIZE

POSITION_REACH = 12.0
"""Maximum distance of a centre from its start position along each axis, pixels."""

SKY_LEFT = 0.1
"""Default uncertainty (1 sigma) of a subtracted sky, in units of the rms of a pixel."""

MODEL_ERROR = 0.05
"""Default scatter of galaxies about a Sersic profile, as a fraction of their surface brightness.

With noise alone, every spiral arm and nucleus of a bright galaxy is significant, and a knot near the
centre of a face-on spiral can drive the index to its bound. Among 0, 0.03, 0.06, 0.12 and 0.25, the
values 0.03 and 0.06 agree best with published GALFIT fits of CANDELS galaxies.
"""

ROBUST_SCALE = 3.0
"""Residual, in sigma, at which the robust loss halves the weight of a pixel."""

WINDOWS = (32, 40, 48, 64, 80, 96)
"""Sides of the windows in which small galaxies are fitted, pixels."""

REACH = 5.0
"""A window contains a galaxy out to at most this many effective radii."""

FAINT = 0.3
"""A window contains a galaxy out to this surface brightness, in units of the rms of a pixel.

If the sky is known, fainter light adds little information: with 0.3 the median errors of faint galaxies equal those of
fits in whole stamps, and one galaxy in twenty has errors that are 4 to 8 % larger; with 0.6, 10 to 16 % larger.
"""

_MARGIN = 8.0
"""Margin of a window around a galaxy, for the PSF and for pixels that whitening loses at the edge, pixels."""

_OUTGROWN = 0.8
"""A fit is repeated in a larger window if its window is smaller than this fraction of the size its result needs."""

_DOUBT = 0.3
"""Relative uncertainty of a galaxy's light outside its window before the fit."""

_ROUNDEST = 0.9
"""Maximum axis ratio of a start: for a round galaxy the model does not depend on the angle."""

_SHORTEST_PACE = 0.25
"""Minimum length of a step, as a fraction of the step of the linear model."""


class Status(enum.IntEnum):
    """Outcome of a fit."""

    CONVERGED = 0
    NOT_CONVERGED = 1
    AT_BOUND = 2
    NO_DATA = 3
    BAD_START = 4


@dataclass(frozen=True)
class Noise:
    """The noise of an image.

    Attributes
    ----------
    correlation : ndarray, float, (2r + 1, 2r + 1)
        Autocorrelation of blank pixels, 1 in the middle; ``[[1]]`` for white noise.
    gain : float
        Detected electrons per image unit, for the Poisson noise of the sources
        (the exposure time, if the unit is electron/s); inf for no Poisson noise.
    sky : float
        Uncertainty (1 sigma) of the subtracted sky, in units of the rms of a blank
        pixel; inf for a sky that is not known.
    model_error : float
        Scatter of galaxies about a Sersic profile, as a fraction of their surface
        brightness, from spiral arms, bars and star-forming regions.
    """

    correlation: np.ndarray
    gain: float = np.inf
    sky: float = np.inf
    model_error: float = 0.0

    def __repr__(self) -> str:
        return (
            f"Noise(correlation of {self.correlation.shape[0]} x {self.correlation.shape[1]} lags, gain={self.gain:g}, "
            f"sky={self.sky:g}, model_error={self.model_error:g})"
        )


class Fits(NamedTuple):
    """Results of `Fitter`, one row per galaxy.

    Attributes
    ----------
    parameters : ndarray, float64, (N, 7)
        As for `sersicnet.engine.render.Renderer`: x, y, flux, effective radius, index,
        axis ratio, angle. NaN for galaxies that were not fitted.
    sky : ndarray, float64, (N,)
        Sky level under the galaxy, image units.
    covariance : ndarray, float64, (N, 8, 8)
        Covariance of the seven parameters and the sky; NaN where it is not defined.
    chi2 : ndarray, float64, (N,)
        Reduced chi-square of the whitened residuals.
    iterations : ndarray, int, (N,)
        Number of iterations, in all windows together.
    status : ndarray, int, (N,)
        Values of `Status`.
    """

    parameters: np.ndarray
    sky: np.ndarray
    covariance: np.ndarray
    chi2: np.ndarray
    iterations: np.ndarray
    status: np.ndarray


class Fitter:
    """Fits Sersic profiles to stamps with a common PSF and noise.

    Parameters
    ----------
    psf : ndarray, float, (P, P)
        Effective PSF; see `sersicnet.engine.render.Renderer`.
    noise : Noise
    size : int
        Width and height of the stamps in pixels.
    prior : Prior, optional
        With a prior, the fit maximises the posterior instead of the likelihood, which
        keeps the parameters of faint galaxies in a plausible range.
    robust : bool
        Whether to limit the influence of single pixels, such as light that is neither
        masked nor in the model, by a Cauchy loss; errors are still formal ones.
    psf_oversampling : int
        Number of pixels of `psf` along a pixel of the image.
    fixed : sequence of int
        Indices of the parameters that keep their start values exactly; not the flux. Their variances are 0.
    max_iterations : int
        Maximum number of iterations in a window.
    tolerance : float
        Change of chi-square below which a fit has converged.
    unit : float
        Unit of the arithmetic, in image units. If the noise of an image is far from 1, as in maggies, a
        unit like it keeps squares in the range of single precision.

    Raises
    ------
    InputError
        If the PSF or the noise cannot be used.
    """

    def __init__(
        self,
        psf: np.ndarray,
        noise: Noise,
        size: int = STAMP_SIZE,
        *,
        prior: Prior | None = None,
        robust: bool = False,
        psf_oversampling: int = 1,
        fixed: Sequence[int] = (),
        max_iterations: int = 60,
        tolerance: float = 2e-2,
        unit: float = 1.0,
    ) -> None:
        correlation = np.asarray(noise.correlation, dtype=float)
        middle = correlation.shape[0] // 2
        if correlation.ndim != 2 or correlation.shape != (2 * middle + 1,) * 2 or correlation[middle, middle] != 1:
            raise InputError(
                "An autocorrelation is a square array of odd size with 1 in the middle; "
                f"received shape {correlation.shape}."
            )
        for name, value in (("gain", noise.gain), ("standard deviation of the sky", noise.sky)):
            if not value > 0:
                raise InputError(f"A {name} is positive; received {value}.")
        self._psf, self._oversampling = psf, psf_oversampling
        self._drawers: dict[int, Renderer] = {}
        self.noise, self.size, self.prior, self.robust = noise, size, prior or Prior.none(), robust
        self.unit = unit
        if unit != 1:
            self.noise, self.prior = replace(noise, gain=noise.gain * unit), self.prior.in_units(unit)
        self.fixed, self.max_iterations, self.tolerance = list(fixed), max_iterations, tolerance
        self.frames = [
            Frame(psf, correlation, side, psf_oversampling) for side in (*(w for w in WINDOWS if w < size), size)
        ]

    def __repr__(self) -> str:
        return f"<Fitter of stamps of {self.size} x {self.size} pixels, {self.noise!r}{', robust' * self.robust}>"

    def draw(self, parameters: np.ndarray, size: int) -> np.ndarray:
        """Draw the model of one galaxy, (7,), convolved with the PSF: float32, (size, size)."""
        if size not in self._drawers:
            self._drawers[size] = Renderer(self._psf, size, self._oversampling)
        return self._drawers[size](parameters)[0]

    def __call__(
        self,
        stamps: np.ndarray,
        rms: np.ndarray,
        start: np.ndarray,
        masks: np.ndarray | None = None,
        neighbours: Sequence[np.ndarray] | None = None,
        listed: Sequence[np.ndarray] | None = None,
        *,
        workers: int = 1,
        report: Callable[[int], None] = lambda done: None,
    ) -> Fits:
        """Fit galaxies.

        Parameters
        ----------
        stamps : ndarray, float, (N, size, size)
            Approximately sky-subtracted stamps, image units. Pixels that are not finite
            are masked.
        rms : ndarray, float, (N,) or (N, size, size)
            Noise of a blank pixel around each galaxy, image units: one number per
            galaxy, or a map; pixels of a map that are not finite and positive are masked.
        start : ndarray, float, (N, 7)
            Start parameters.
        masks : ndarray, bool, (N, size, size), optional
            Pixels to ignore.
        neighbours : sequence of ndarray, float, (M, 7), optional
            Start parameters of the neighbours of each galaxy. Neighbours are fitted
            simultaneously with the galaxy, and their results are discarded.
        listed : sequence of ndarray, bool, (M,), optional
            Neighbours whose parameters `fixed` are fixed, too; none by default.
        workers : int
            Number of threads. Threads are efficient here because Fourier transforms and
            array arithmetic release the interpreter lock.
        report : callable
            Receives the number of galaxies done.

        Returns
        -------
        Fits
        """
        n = len(stamps)
        out = Fits(
            np.full((n, N_PARAMETERS), np.nan),
            np.full(n, np.nan),
            np.full((n, N_PARAMETERS + 1, N_PARAMETERS + 1), np.nan),
            np.full(n, np.nan),
            np.zeros(n, int),
            np.full(n, int(Status.NO_DATA)),
        )

        def fit(i: int) -> None:
            near = start[i : i + 1] if neighbours is None else np.vstack([start[i : i + 1], neighbours[i]])
            fixed = np.zeros(near.shape, bool)
            fixed[0, self.fixed] = True
            if listed is not None:
                fixed[1:, self.fixed] = listed[i][:, None]
            sensible = [True, *(_sensible(row) for row in near[1:])]
            data, noise, used = self.prepared(stamps[i], rms[i], None if masks is None else masks[i])
            near = near[sensible] / np.array([1, 1, self.unit, 1, 1, 1, 1])
            with np.errstate(
                over="ignore", invalid="ignore"
            ):  # steps that overflow are rejected by their sum of squares
                self._fit(out, i, data, noise, used, near, fixed[sensible])

        # BLAS uses one thread in each of the threads: more would only wait for each other.
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(max(1, workers)) as pool:
            for done, _ in enumerate(pool.map(fit, range(n)), start=1):
                report(done)
        if self.unit != 1:
            units = np.array([1, 1, self.unit, 1, 1, 1, 1, self.unit])
            out.parameters[:] *= units[:-1]
            out.sky[:] *= self.unit
            out.covariance[:] *= np.outer(units, units)
        return out

    def prepared(
        self, stamp: np.ndarray, rms: np.ndarray, mask: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pixels and noise of a stamp in `unit`, with 0 and 1 where they are not used, and the pixels that are."""
        noise = np.broadcast_to(np.asarray(rms, dtype=float), stamp.shape)
        used = np.isfinite(stamp) & np.isfinite(noise) & (noise > 0)
        if mask is not None:
            used &= ~mask
        data, noise = np.where(used, stamp, 0), np.where(used, noise, 1)
        if self.unit != 1:
            data, noise = data / self.unit, np.where(used, noise / self.unit, 1)
        return data, noise, used

    def _fit(
        self,
        out: Fits,
        i: int,
        data: np.ndarray,
        rms: np.ndarray,
        used: np.ndarray,
        start: np.ndarray,
        fixed: np.ndarray,
    ) -> None:
        """Fit a galaxy in the smallest window that contains it, and write the result into row `i`."""
        if not used.any():
            return
        unit = float(np.median(rms[used]))
        needed = self._needed(start, unit)
        for window in self.frames:
            last = window is self.frames[-1]
            if window.size < needed and not last:
                continue
            inner = slice((self.size - window.size) // 2, (self.size + window.size) // 2)
            here = used[inner, inner]
            if here.sum() < 10 * (start.size + 1):
                continue
            if not _sensible(start[0]):
                out.status[i] = Status.BAD_START
                return
            moved = start - np.array([inner.start, inner.start, 0, 0, 0, 0, 0])
            inside = (moved[:, :2] > -POSITION_REACH) & (moved[:, :2] < window.size - 1 + POSITION_REACH)
            near = [True, *inside[1:].all(axis=1)]
            galaxy = Cutout.of(data[inner, inner], rms[inner, inner], here, unit, self.noise.correlation.size > 1)
            sky = self._sky(inner, data, rms, used, start, unit)
            fit = _Fit(self, window, galaxy, moved[near], fixed[near], sky)
            if not fit.run():
                out.status[i] = Status.BAD_START
                return
            fit.put(out, i)
            out.parameters[i, :2] += inner.start
            start = np.vstack([out.parameters[i], start[1:]])
            needed = self._needed(start, unit)
            if window.size >= _OUTGROWN * needed:
                return

    def _needed(self, galaxies: np.ndarray, unit: float) -> float:
        """Side of a window, centred on the stamp, that contains the first galaxy and the centres of the others."""
        from_middle = np.abs(galaxies[:, :2] - (self.size - 1) / 2).max(axis=1)
        others = from_middle[1:][from_middle[1:] < self.size / 2]
        return 2 * float(max(from_middle[0] + _MARGIN + _reach(galaxies[0], FAINT * unit), *others, 0)) + 1

    def _sky(
        self, inner: slice, data: np.ndarray, rms: np.ndarray, used: np.ndarray, start: np.ndarray, unit: float
    ) -> tuple[float, float]:
        """Prior of the sky for a fit in a window: mean and inverse variance, in units of the rms of a pixel.

        It combines the uncertainty of the subtracted sky with the level of the stamp outside the
        window, from which the start models of the galaxies are subtracted.
        """
        precision = self.noise.sky**-2
        weight = np.where(used, (unit / rms) ** 2, 0)
        weight[inner, inner] = 0
        total = float(weight.sum())
        if not total > 0:
            return 0.0, precision
        weight /= total * unit
        light = np.nansum(self.frames[-1].render(start), axis=0, dtype=float)
        level, doubt = float(np.sum(weight * (data - light))), _DOUBT * float(np.sum(weight * light))
        seen = 1 / (float(np.sum(self.noise.correlation)) / total + doubt**2)
        return level * seen / (precision + seen), precision + seen


def _reach(galaxy: np.ndarray, level: float) -> float:
    """Semi-major axis of the isophote of a galaxy at a surface brightness, pixels; at most `REACH` effective radii."""
    _, _, flux, r_eff, n, q, _ = galaxy
    n, q = np.clip(n, *N_BOUNDS), np.clip(q, *Q_BOUNDS)
    fall = np.log(flux / (q * r_eff**2 * level)) + log_norm(n)  # log of the central surface brightness over the level
    return float(r_eff * min(REACH, (max(fall, 0.0) / sersic_b(n)) ** n))


def _sensible(start: np.ndarray) -> bool:
    return bool(np.isfinite(start).all() and start[2] > 0 and start[3] > 0)


class _Fit:
    """A fit of a galaxy and its neighbours in one window."""

    def __init__(
        self,
        fitter: Fitter,
        window: Frame,
        galaxy: Cutout,
        start: np.ndarray,
        fixed: np.ndarray,
        sky: tuple[float, float],
    ) -> None:
        self.fitter, self.window, self.galaxy, self.sky = fitter, window, galaxy, sky
        self.count, self.start, self.fixed = len(start), start, fixed.copy()
        self.fixed[:, 6] |= fixed[:, 5] & (start[:, 5] >= 1)  # a round galaxy has no angle
        self.held = np.append(self.fixed.ravel(), False)
        self.scales = self._scales(start)
        self.free = np.zeros(N_PARAMETERS * self.count + 1)
        rows = self._rows(self.free)
        rows[:, :6], rows[:, 6] = self.scales.to_free(start[:, :6]), start[:, 6]
        rows[:, 5] = np.minimum(rows[:, 5], fitter.prior.scales[3].to_free(_ROUNDEST))
        self.status, self.iterations = Status.NOT_CONVERGED, 0
        self.white_variance = np.float32(np.sum(fitter.noise.correlation)) * galaxy.rms**2  # before the kernel
        self.white_sky = galaxy.whitened(window, np.full((1, window.size, window.size), galaxy.unit, np.float32))[0]

    def _scales(self, start: np.ndarray) -> Scale:
        """Scales of the first six parameters of each galaxy, (M, 6)."""
        shape = self.fitter.prior.scales
        log, low, high = (
            np.tile(np.array([0.0, 0.0, *(getattr(scale, name) for scale in shape)]), (len(start), 1))
            for name in ("log", "low", "high")
        )
        low[:, :2], high[:, :2] = start[:, :2] - POSITION_REACH, start[:, :2] + POSITION_REACH
        return Scale(log.astype(bool), low, high)

    def _rows(self, free: np.ndarray) -> np.ndarray:
        return free[:-1].reshape(self.count, N_PARAMETERS)

    def parameters(self, free: np.ndarray) -> np.ndarray:
        """Parameters for the renderer, (M, 7)."""
        out = self._rows(free).copy()
        out[:, :6] = self.scales.from_free(out[:, :6])
        return np.where(self.fixed, self.start, out)

    def slopes(self, free: np.ndarray) -> np.ndarray:
        """Derivatives of parameters and sky with respect to the fitted variables, (7 M + 1,)."""
        out = np.ones(len(free))
        self._rows(out)[:, :6] = self.scales.slope(self._rows(free)[:, :6])
        out[-1] = self.galaxy.unit
        return out

    def longest_step(self, here: _Evaluation) -> np.ndarray:
        """Maximum step of one iteration, within which the model is nearly linear."""
        size = here.parameters[:, :6].copy()
        size[:, :2], size[:, 5] = 3.0, 0.4
        out = np.empty(len(here.free))
        rows = self._rows(out)
        rows[:, :6] = np.minimum(1.0, size / np.maximum(self._rows(here.slopes)[:, :6], 1e-9))
        rows[:, 6] = 30.0
        out[-1] = 5.0
        return out

    def prior_terms(self, free: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Terms of the priors in the sum of squares, in half its gradient and in half its Hessian."""
        prior = self.fitter.prior
        slope, curvature = np.zeros(len(free)), np.zeros((len(free), len(free)))
        total = 0.0
        for m, row in enumerate(self._rows(free)):
            which = slice(N_PARAMETERS * m + 2, N_PARAMETERS * m + 6)
            off = row[2:6] - prior.mean
            slope[which] = prior.precision @ off
            curvature[which, which] = prior.precision
            total += float(off @ slope[which])
        level, precision = self.sky
        slope[-1], curvature[-1, -1] = precision * (free[-1] - level), precision
        return total + precision * (free[-1] - level) ** 2, slope, curvature

    def run(self) -> bool:
        """Iterate until the sum of squares converges.

        Returns
        -------
        bool
            False if the start parameters cannot be drawn; nothing is fitted then.
        """
        damping, pace = 1e-3, 1.0
        here = self._evaluated(self.free)
        residual, jacobian = here.residual / here.noise, here.jacobian / here.noise
        if not (np.isfinite(residual).all() and np.isfinite(_products(jacobian, None)).all()):
            return False
        while self.iterations < self.fitter.max_iterations and self.status is Status.NOT_CONVERGED:
            self.iterations += 1
            cost, weight = self._loss(residual)
            penalty, slope, curvature = self.prior_terms(here.free)
            normal = self._varied(_products(jacobian, weight) + curvature)
            scale = np.sqrt(np.maximum(np.diag(normal), 1e-30))
            damped = normal / scale / scale[:, None]
            damped[np.diag_indices_from(damped)] += damping
            downhill = jacobian @ (residual if weight is None else weight * residual).astype(np.float32) - slope
            downhill[self.held] = 0
            step = linalg.lstsq(damped, downhill / scale, check_finite=False)[0] / scale
            longest = self.longest_step(here)
            move = pace * np.minimum(np.maximum(step, -longest), longest)
            trial = here.free + move
            if damping <= 1e-3 and float(step @ downhill) < self.fitter.tolerance:
                self.free, self.status = trial, Status.CONVERGED  # the step is too short to evaluate the model again
                break
            # Most steps are accepted, so the derivatives are computed with the model, for the next step.
            there = self._evaluated(trial)
            # Both sums of squares use the noise of the last accepted model, so that they can be compared.
            tried = self._loss(there.residual / here.noise)[0] + self.prior_terms(trial)[0]
            gained, descent = cost + penalty - tried, 2 * float(move @ downhill)
            # Where the model is not linear, successive steps tend to be too long, or too short, by similar factors.
            lowest = _parabola_minimum(descent, gained)
            pace = min(max(pace * lowest, _SHORTEST_PACE), 1.0)
            if gained >= 0:
                self.free, here, damping = trial, there, max(damping / 10, 1e-7)
                residual, jacobian = here.residual / here.noise, here.jacobian / here.noise
                if max(gained, descent * lowest / 2) < self.fitter.tolerance:
                    self.status = Status.CONVERGED
            else:
                damping *= 10
                if damping > 1e8:
                    self.status = Status.CONVERGED
        self.residual, self.jacobian = residual, jacobian
        return True

    def put(self, out: Fits, i: int) -> None:
        """Write parameters, errors and status into row `i`."""
        if self.status is Status.CONVERGED and self._at_bound():
            self.status = Status.AT_BOUND
        out.parameters[i], out.sky[i] = self.parameters(self.free)[0], self.free[-1] * self.galaxy.unit
        out.parameters[i, 6] = (out.parameters[i, 6] + 90) % 180 - 90
        pixels = float(self.galaxy.counted.sum())
        out.chi2[i] = float(self.residual @ self.residual) / max(1.0, pixels - np.count_nonzero(~self.held))
        out.iterations[i] += self.iterations
        out.status[i] = self.status
        normal = _products(self.jacobian.astype(float), self._loss(self.residual)[1]) + self.prior_terms(self.free)[2]
        normal = self._varied(normal)
        scale = np.sqrt(np.maximum(np.diag(normal), 1e-30))
        normal /= scale * scale[:, None]
        if np.linalg.cond(normal) < 1e12:
            mine = [*range(N_PARAMETERS), len(self.free) - 1]
            slopes = np.where(self.held, 0, self.slopes(self.free) / scale)[mine]
            out.covariance[i] = linalg.inv(normal)[np.ix_(mine, mine)] * slopes[:, None] * slopes
            if self.fitter.prior.precision[3, 3] > 0 and not self.fixed[0, 5]:
                out.parameters[i, 5] = self._without_angle(out.parameters[i, 5], np.sqrt(out.covariance[i, 5, 5]))

    def _varied(self, normal: np.ndarray) -> np.ndarray:
        """Normal equations in which fixed parameters do not move, nor bind the others; in place."""
        normal[self.held], normal[:, self.held] = 0, 0
        normal[self.held, self.held] = 1
        return normal

    def _without_angle(self, q: float, error: float) -> float:
        """The most probable axis ratio after marginalising over the angle.

        Noise makes round galaxies appear elongated in a random direction, so the
        ellipticity at the best angle is biased high. Marginalised over the angle,
        the likelihood of an ellipticity e gets a factor I0(e e' / s^2), where e' is
        the best ellipticity and s its error, as for the length of any noisy vector
        (Rice 1944).
        """
        scale = self.fitter.prior.scales[3]
        width = error / max(float(scale.slope(scale.to_free(q))), 1e-9)
        free = scale.to_free(q) + np.linspace(-4, 4, 161) * width
        e = 1 - scale.from_free(free)
        log_probability = -8 * np.linspace(-1, 1, 161) ** 2 + np.log(special.ive(0, e * (1 - q) / error**2))
        return float(1 - e[np.argmax(log_probability)])

    def _at_bound(self) -> bool:
        """Whether a position, radius, index or the lower axis ratio reached its bound; q = 1 is a valid result."""
        row = self._rows(self.free)[0, :6]
        x, y, _, r_eff, n, q = self.scales.at_bound(row[None])[0] & ~self.fixed[0, :6]
        return bool(x or y or r_eff or n or (q and row[5] < 0))

    def _loss(self, residual: np.ndarray) -> tuple[float, np.ndarray | None]:
        """Sum of the loss, and the weight of each pixel in the normal equations; None for 1."""
        if not self.fitter.robust:
            return float(residual @ residual), None
        square = (residual / ROBUST_SCALE) ** 2
        return ROBUST_SCALE**2 * float(np.log1p(square).sum()), (1 / (1 + square)).astype(np.float32)

    def _evaluated(self, free: np.ndarray) -> _Evaluation:
        """Evaluate the model, its residuals and its derivatives."""
        galaxy, size = self.galaxy, self.window.size
        parameters, slopes = self.parameters(free), self.slopes(free)
        models, derivatives = self.window.render.with_derivatives(parameters)
        model = models.sum(axis=0)
        images = np.concatenate([(galaxy.data - model)[None], derivatives.reshape(-1, size, size)])
        white = galaxy.whitened(self.window, images)
        noise, light = self.fitter.noise, np.maximum(model, 0)
        added = light * (np.float32(1 / noise.gain) + np.float32(noise.model_error**2) * light) / self.white_variance
        residual = white[0].astype(float) - free[-1] * self.white_sky
        jacobian = np.concatenate([white[1:] * slopes[:-1, None].astype(np.float32), self.white_sky[None]])
        return _Evaluation(free, parameters, slopes, residual, jacobian, np.sqrt(1 + added).ravel())


def _products(jacobian: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
    """Products of all pairs of derivatives, summed over pixels with their weights."""
    return (jacobian if weight is None else jacobian * weight) @ jacobian.T


def _parabola_minimum(descent: float, gained: float) -> float:
    """Minimum, from 0.1 to 2 steps, of a parabola with a given initial slope and a given decrease after one step."""
    if not (descent > 0 and np.isfinite(gained)):
        return 0.1
    return max(0.1, descent / (2 * max(descent - gained, descent / 4)))


class _Evaluation(NamedTuple):
    """Parameters, and the model's residuals and derivatives there.

    Residuals and derivatives are whitened and in units of the sky's noise; `noise` is the noise of
    sky and model together, in the same units.
    """

    free: np.ndarray  # (7 M + 1,)
    parameters: np.ndarray  # (M, 7)
    slopes: np.ndarray  # (7 M + 1,)
    residual: np.ndarray  # (P,)
    jacobian: np.ndarray  # (7 M + 1, P)
    noise: np.ndarray  # (P,)
