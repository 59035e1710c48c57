r"""What the noise allows: the limit that no measurement of a set of galaxies can pass.

The Fisher matrix at the truth, :math:`F = J^T C^{-1} J`, has the exact covariance C of
a stamp's pixels (independent noise with the galaxy's own Poisson noise, through the
kernel of the drizzling) and the derivatives J of `sersicnet.engine.render`; the few bits in the
variance itself are left out. Its inverse bounds every unbiased measurement.

Networks know more: the distribution that the galaxies were drawn from. No estimate has
smaller squared errors, and so a larger R², than the mean of the posterior. Its errors
are drawn here: the likelihood is taken as Gaussian in mag, log R_e, log n and e with the
covariance of the bound (Laplace's approximation, at the truth; position and angle
integrated out), its maximum is drawn about the truth, and the mean of likelihood times
prior is integrated by importance sampling, with draws from the Gaussian that the ranges
truncate. For faint galaxies the likelihood is no Gaussian, and the limit promises more
than the data hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import linalg, special
from threadpoolctl import threadpool_limits

from sersicnet.engine.render import Renderer
from sersicnet.errors import DatasetError, InputError
from sersicnet.schema import STAMP_SIZE, TARGETS

if TYPE_CHECKING:
    from sersicnet.dataset import Dataset

GALAXIES = 500
"""Galaxies of a dataset, drawn at random, that the limit is computed for."""

DRAWS = 20
"""Realisations of the noise of each of them."""

_SAMPLES = 2000
_SKY = 7
_LOG = np.array([target.log for target in TARGETS])
_POSITION_AND_ANGLE = np.array([12, 12, 0, 0, 0, 0, 12 / 180**2])
"""Inverse variances of a position within a pixel and of any angle, which leave the four targets alone."""


def independent_sigma(image: np.ndarray, white: float, exposure: float) -> np.ndarray:
    """Independent noise of each pixel before the kernel, the sky's and the source's, (H, W)."""
    return np.sqrt(white**2 + np.maximum(image.astype(float), 0) / exposure)


def covariance_bands(sigma: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """Covariance of a stamp's pixels, in the form of `scipy.linalg.cholesky_banded` (lower).

    Parameters
    ----------
    sigma : ndarray, float, (S + 2 P, S + 2 P)
        Independent noise of each pixel, with a border of P pixels.
    taps : ndarray, float, (2 P + 1,)
        Kernel along either axis that this noise went through.

    Returns
    -------
    ndarray, float64, (2 P (S + 1) + 1, S * S)
    """
    n = len(taps)
    size = len(sigma) - n + 1
    variance = sigma**2
    kernel = np.outer(taps, taps)
    bands = np.zeros(((n - 1) * (size + 1) + 1, size, size))
    for dy in range(n):
        for dx in range(1 - n, n):
            if dy == 0 and dx < 0:
                continue
            shared = np.zeros((size, size))
            for j in range(dy, n):
                for i in range(max(0, dx), min(n, n + dx)):
                    shared += kernel[j, i] * kernel[j - dy, i - dx] * variance[j : j + size, i : i + size]
            shared[size - dy :] = 0
            shared[:, size - dx if dx > 0 else size :] = 0
            shared[:, : -dx if dx < 0 else 0] = 0
            bands[dy * size + dx] += shared
    return bands.reshape(len(bands), -1)


def fisher_matrix(render: Renderer, galaxy: np.ndarray, sigma: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """Fisher matrix of x, y, mag, R_e, n, e, angle and the sky.

    Parameters
    ----------
    render : Renderer
        For stamps of S pixels a side.
    galaxy : ndarray, float, (7,)
        As for `render`; angles in degrees.
    sigma, taps
        As for `covariance_bands`.

    Returns
    -------
    ndarray, float64, (8, 8)
        The sky is the last, in units of the image.
    """
    slopes = render.with_derivatives(galaxy)[1][0].reshape(_SKY, -1).astype(float)
    slopes[2] *= -galaxy[2] * np.log(10) / 2.5
    slopes[5] *= -1
    slopes = np.concatenate([slopes, np.ones((1, slopes.shape[1]))])
    factor = linalg.cholesky_banded(covariance_bands(sigma, taps), overwrite_ab=True, lower=True, check_finite=False)
    # C = L L^T, so that J^T C^-1 J is the square of L^-1 J.
    white, _ = linalg.lapack.dtbtrs(factor, np.asfortranarray(slopes.T), uplo="L")
    return white.T @ white


def covariance(fisher: np.ndarray, sky: np.ndarray | float) -> np.ndarray:
    """Covariances of the four targets, for stamps cut to within a pixel.

    Parameters
    ----------
    fisher : ndarray, float, (N, 8, 8)
        From `fisher_matrix`.
    sky : ndarray or float, (N,)
        How well the sky is known beforehand, 1 sigma: inf for not at all, 0 (for all galaxies) for exactly.

    Returns
    -------
    ndarray, float64, (N, 4, 4)
    """
    sky = np.broadcast_to(np.asarray(sky, dtype=float), len(fisher))
    full = fisher.copy()
    full[:, :_SKY, :_SKY] += np.diag(_POSITION_AND_ANGLE)
    if not sky.any():
        return np.linalg.inv(full[:, :_SKY, :_SKY])[:, 2:6, 2:6]
    full[:, _SKY, _SKY] += sky**-2.0
    return np.linalg.inv(full)[:, 2:6, 2:6]


def posterior_means(
    truth: np.ndarray,
    covariance: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    log_prior: Callable[[np.ndarray], np.ndarray] | None,
    draws: int,
    rng: np.random.Generator,
    samples: int = _SAMPLES,
) -> np.ndarray:
    """Means of the posterior, for some realisations of the noise of each galaxy.

    Parameters
    ----------
    truth : ndarray, float, (N, 4)
        mag, R_e, n and e; R_e and n positive.
    covariance : ndarray, float, (N, 4, 4)
        Of the likelihood, at the truth.
    low, high : ndarray, float, (4,)
        Ranges of the prior.
    log_prior : callable or None
        Logarithm of the prior's density, up to a constant, at points (M, 4) within
        the ranges; None where it is uniform.
    draws : int
        Realisations of the noise.
    rng : numpy Generator
    samples : int
        Points of the integration.

    Returns
    -------
    ndarray, float64, (draws, N, 4)
    """
    low, high = (np.where(_LOG, np.log(np.where(_LOG, ends, 1)), ends) for ends in (low, high))
    means = np.empty((draws, len(truth), len(TARGETS)))
    for i, row in enumerate(truth):
        at = np.where(_LOG, np.log(np.where(_LOG, row, 1)), row)
        slope = np.where(_LOG, 1 / np.where(_LOG, row, 1), 1)
        scaled = covariance[i] * slope[:, None] * slope
        # The best-measured first: the sequence of truncations then wastes the fewest points.
        order = np.argsort(np.diag(scaled) / (high - low) ** 2)
        root = np.linalg.cholesky(scaled[np.ix_(order, order)])
        maximum = (at[order] + rng.standard_normal((draws, 4)) @ root.T)[:, :, None]
        z, log_weight = np.zeros((draws, 4, samples)), np.zeros((draws, samples))
        for j in range(len(TARGETS)):
            middle = maximum[:, j] + np.einsum("k,dks->ds", root[j, :j], z[:, :j])
            below, above = ((edge[order[j]] - middle) / root[j, j] for edge in (low, high))
            sign = np.where(below > 0, -1, 1)  # the tail that has digits to spare
            below, above = np.minimum(sign * below, sign * above), np.maximum(sign * below, sign * above)
            p_below, p_above = special.ndtr(below), special.ndtr(above)
            width = np.maximum(p_above - p_below, 1e-300)
            z[:, j] = sign * np.clip(special.ndtri(p_below + rng.random(width.shape) * width), below, above)
            log_weight += np.log(width)
        points = np.empty((draws, 4, samples))
        points[:, order] = maximum + root @ z
        points = np.clip(points, low[:, None], high[:, None])
        log_weight += points[:, _LOG].sum(axis=1)  # the prior's density is that of R_e and n, not of their logarithms
        points[:, _LOG] = np.exp(points[:, _LOG])
        if log_prior is not None:
            log_weight += log_prior(points.transpose(0, 2, 1).reshape(-1, 4)).reshape(draws, samples)
        weight = np.exp(log_weight - log_weight.max(axis=1, keepdims=True))
        means[:, i] = np.einsum("dks,ds->dk", points, weight) / weight.sum(axis=1)[:, None]
    return means


def of_dataset(
    data: Dataset,
    *,
    most: int = GALAXIES,
    draws: int = DRAWS,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Estimates as good as the noise allows, for galaxies of a dataset.

    Galaxies are taken as if they were alone in their stamps, with the dataset's own prior.

    Parameters
    ----------
    data : Dataset
        From `sersicnet simulate`, of single Sersic galaxies.
    most : int
        Galaxies beyond this number are left out, at random.
    draws : int
        Realisations of the noise of each.
    report : callable
        Receives how many of how many galaxies are done.

    Returns
    -------
    rows : ndarray, int, (n,)
        Which galaxies, sorted.
    estimates : dict of ndarray, float64, (draws, n, 4)
        AB magnitude, effective radius [pix], Sersic index and ellipticity, for what is
        known of the sky: ``sky free``, ``sky known``, and where the dataset's sky is off
        ``sky known to S rms``.

    Raises
    ------
    InputError
        If the dataset cannot be rebuilt from its configuration (it was made with PSFs,
        noise or a prior from files), or its labels are fits.
    """
    simulation, render_at = _rebuilt(data)
    instrument = simulation.instrument
    taps = instrument.noise_kernel()
    rows = np.sort(np.random.default_rng(0).permutation(len(data))[:most])
    truth = {name: column[rows] for name, column in data.truth.items()}
    flux = 10 ** (-0.4 * (truth["mag"] - instrument.zero_point))
    shape = (truth[name] for name in ("r_eff_pix", "sersic_n"))
    galaxies = np.column_stack([truth["x"], truth["y"], flux, *shape, 1 - truth["ellipticity"], truth["theta"]])
    which = truth.get("psf", truth.get("psf_stretch", np.ones(len(rows))))
    fisher = np.empty((len(rows), 8, 8))
    # Threads of BLAS do not help with bands, and wait for each other on a busy machine.
    with threadpool_limits(1, user_api="blas"):
        for i, galaxy in enumerate(galaxies):
            report(i, len(rows))
            render = render_at(float(which[i]))
            # Beyond the stamp there is noise, but no galaxy: that is how `simulate` draws it.
            image = np.pad(render(galaxy)[0], len(taps) // 2)
            sigma = independent_sigma(image, truth["rms"][i] / (taps**2).sum(), instrument.exposure)
            fisher[i] = fisher_matrix(render, galaxy, sigma, taps)
    report(len(rows), len(rows))
    known = {"sky free": np.inf, "sky known": 0.0}
    if instrument.sky_residual > 0:
        known[f"sky known to {instrument.sky_residual:g} rms"] = instrument.sky_residual * truth["rms"]
    prior = simulation.prior
    low, high = (np.array([ends[i] for ends in prior.ranges.values()]) for i in (0, 1))
    log_prior = None if prior.joint is None and not prior.log_radii else prior.log_density
    targets = np.column_stack([truth[target.name] for target in TARGETS])
    return rows, {
        name: posterior_means(targets, covariance(fisher, sky), low, high, log_prior, draws, np.random.default_rng(1))
        for name, sky in known.items()
    }


def _rebuilt(data: Dataset) -> tuple[Any, Callable[[float], Renderer]]:
    """The simulation of a dataset, and its renderer by the number or else the stretch of the PSF."""
    from sersicnet.simulating.recipe import Simulation
    from sersicnet.simulating.telescopes import effective_psf

    if data.config.get("telescopes"):
        raise InputError(
            f"The limit is computed for images of one telescope; {data.path} is of several, and does not hold their "
            "true PSFs. Leave out `limits`."
        )
    try:
        simulation = Simulation.of_record(data.config, data.psf)
    except DatasetError as error:
        raise InputError(f"The limit of {data.path} cannot be computed: {error} Leave out `limits`.") from error
    if simulation.real_like:
        raise InputError(
            f"{data.path} has labels that were fitted to the very noise of its stamps: no limit is known for "
            "real-like galaxies. Leave out `limits`."
        )
    renderers: dict[float, Renderer] = {}

    def render_at(which: float) -> Renderer:
        if which not in renderers:
            own = simulation.psfs
            psf = own[int(which)].image if own else effective_psf(simulation.instrument, stretch=which)
            renderers[which] = Renderer(psf, STAMP_SIZE)
        return renderers[which]

    return simulation, render_at
