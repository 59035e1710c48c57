"""Columns and header of a catalogue, from the measured values."""

from __future__ import annotations

import numpy as np
from astropy.table import QTable

from sersicnet.catalogue import derived
from sersicnet.catalogue import table as tables
from sersicnet.catalogue.factors import Factors, distances
from sersicnet.domain import Seen, WideDomain
from sersicnet.engine.fit import Status
from sersicnet.errors import warn
from sersicnet.image.exposure import Exposure
from sersicnet.image.pixels import correlation
from sersicnet.image.resample import Resampled
from sersicnet.image.sky import Mesh
from sersicnet.image.stars import look_like_stars
from sersicnet.measuring.scene import DETECTED, DETECTOR, Values
from sersicnet.schema import (
    CORRELATIONS,
    LARGE_LIMIT,
    QUANTILES,
    RANGE_FLAGS,
    STAMP_SIZE,
    TARGET_NAMES,
    Flag,
    absolute_magnitude_of_rms,
)
from sersicnet.weights import PAIRS, Weights

ZERO_POINT_OF_UJY = 23.9
"""AB magnitude of a microjansky."""

Grid = Exposure | Resampled
"""The image that is measured: the exposure, or the exposure resampled."""


def flag_large(values: Values) -> None:
    """Flag galaxies too large for a stamp, in place."""
    with np.errstate(invalid="ignore"):
        values.flags[values.targets[:, 1] > LARGE_LIMIT] |= Flag.LARGE


def flag_unanswered(values: Values, network: Weights) -> bool:
    """Flag galaxies with data for which a network returns no number as outside its range, in place.

    Returns
    -------
    bool
        Whether there are such galaxies, and no others with data.

    Warns
    -----
    SersicnetWarning
        If there are some among others.
    """
    missing = ~np.isfinite(values.targets) & (values.flags & Flag.NO_DATA == 0)[:, None]
    for flag, rows in zip(RANGE_FLAGS, missing.T, strict=True):
        values.flags[rows] |= flag
    n, with_data = int(missing.any(axis=1).sum()), int((values.flags & Flag.NO_DATA == 0).sum())
    if n and n < with_data:
        warn(
            f"The network of {network.name} returns no number for {n} of {with_data} galaxies: they are NaN, and "
            "flagged as outside its range. Its training may have failed: measure with other weights."
        )
    return n > 0 and n == with_data


def flag_domain(values: Values, network: Weights, seen: Seen, largest_star: np.ndarray) -> str:
    """Set the flags that need the whole catalogue and the domain of the weights, in place.

    Parameters
    ----------
    values : Values
    network : Weights
    seen : Seen
        What is known of the image.
    largest_star : ndarray, float64, () or (N,)
        Size of the largest star, pixels: a source of at most this size is point-like. NaN if it is not known.

    Returns
    -------
    str
        Properties of the image that are outside the domain; "nothing" if there are none.
    """
    values.flags[look_like_stars(values.size, values.size_snr, largest_star)] |= Flag.POINT_LIKE
    verdict = network.domain.compare(seen)
    values.flags[verdict.rows] |= Flag.OUT_OF_DOMAIN
    if isinstance(network.domain, WideDomain):
        targets = values.targets.copy()
        targets[:, 0] -= absolute_magnitude_of_rms(seen.zero_point.value, values.rms)
        outside = network.domain.out_of_range(targets, seen.width.value)
    else:
        outside = network.domain.out_of_range(values.targets)
    for flag, rows in zip(RANGE_FLAGS, outside.T, strict=True):
        values.flags[rows] |= flag
    return ", ".join(verdict.reasons) or "nothing"


def correct(values: Values, factors: Factors, scale: float, *, debias: bool) -> None:
    """Apply the factors of a validation to the errors of the network or the fits, in place.

    Parameters
    ----------
    values : Values
    factors : Factors
    scale : float
        Number of pixels of the grid along a pixel of the image.
    debias : bool
        Whether to take the biases out of the values, too.
    """
    unit = np.array([1.0, 1 / scale, 1.0, 1.0])
    errors = np.column_stack([values.errors * unit, values.theta_err])
    away = distances(values.x, values.y) / scale
    targets, errors = factors.applied(values.targets * unit, errors, away, debias=debias)
    values.targets[:], values.errors[:], values.theta_err[:] = targets / unit, errors[:, :-1] / unit, errors[:, -1]


CENTROID = 1.85
"""Error of the centroid of a detection, in units of that of the centroid of fixed pixels: noise moves the border of the
detected pixels, too. It was measured on galaxies with signal to noise 8 to 150, and is 1.7 for the smallest and 2.0 for
those with indices about 2."""


def catalogue(
    exposure: Exposure,
    grid: Grid,
    values: Values,
    *,
    network: Weights | None,
    fitted: bool,
    detections: bool,
    limits: bool,
) -> QTable:
    """The catalogue of an image, with units and descriptions and all columns that it can have.

    Parameters
    ----------
    exposure : Exposure
        The original image; positions and sizes are in its pixels.
    grid : Exposure or Resampled
        The image that was measured: the exposure, or the exposure resampled.
    values : Values
    network : Weights or None
    fitted : bool
        Whether profiles were fitted, or fluxes.
    detections : bool
        Whether the rows are all detections, so that each parent has a row.
    limits : bool
        Whether rows may be of places without a detection, so that upper limits are listed.
    """
    n = len(values.x)
    errors = fitted or bool(network is not None and network.card["errors"])
    correlated = fitted or bool(network is not None and network.card.get("orientation"))
    x, y = grid.from_grid(values.x), grid.from_grid(values.y)
    columns: dict[str, np.ndarray] = {"id": np.arange(1, n + 1), "x": x, "y": y}
    if exposure.wcs is not None:
        columns["ra"], columns["dec"] = exposure.image.sky(x, y) if n else (np.zeros(0), np.zeros(0))
        columns["pa"] = exposure.image.position_angle(x, y, values.theta) if n else np.zeros(0)
    columns |= _position_errors(exposure, grid, values, x, y)
    unit = np.array([1 / grid.factor if name == "r_eff_pix" else 1.0 for name in TARGET_NAMES])
    targets, sigmas = values.targets * unit, values.errors * unit
    if network is not None or fitted:
        columns |= _fluxes(exposure, values, by_network=network is not None, limits=limits)
        with np.errstate(invalid="ignore"):
            dark = columns["flux"] <= 0
        targets[dark, 0], sigmas[dark, 0] = np.nan, np.nan
    for i, name in enumerate(TARGET_NAMES):
        columns[name] = targets[:, i]
        if errors:
            columns[f"{name}_err"] = sigmas[:, i]
    with np.errstate(invalid="ignore"):
        columns["r_circ_pix"] = columns["r_eff_pix"] * np.sqrt(1 - targets[:, 3])
    if errors:
        shares = derived.quantiles(targets, sigmas)
        for i, name in enumerate(TARGET_NAMES[1:], start=1):
            columns |= {f"{name}_p{share}": shares[:, i, k] for k, share in enumerate(QUANTILES)}
    scale = exposure.pixel_scale.value
    if np.isfinite(scale):
        in_pixels = {name: radii for name, radii in columns.items() if name.startswith(("r_eff_pix", "r_circ_pix"))}
        columns |= {name.replace("_pix", "", 1): radii * scale for name, radii in in_pixels.items()}
        found = derived.mean_surface_brightness(targets, sigmas, values.correlations, scale)
        columns |= dict(zip(("mu_mean", "mu_mean_err"), found if correlated else found[:1], strict=False))
    if correlated:
        columns["theta_err"] = values.theta_err
        columns |= dict(zip(CORRELATIONS, values.correlations.T, strict=True))
    columns.update(theta=values.theta, snr=values.snr, flags=values.flags)
    columns.update(_detected(exposure, grid, values, parents=detections))
    if fitted:
        columns.update(sky=values.sky, chi2=values.chi2, fit_status=values.status)
    return tables.assembled(columns)


def no_values() -> Values:
    """The values of no places."""
    widths = {"position": 3, "targets": len(TARGET_NAMES), "errors": len(TARGET_NAMES), "correlations": len(PAIRS[0])}
    widths |= {"offset": 2, "detected": len(DETECTED)}
    shapes = {name: (0, widths[name]) if name in widths else (0,) for name in Values._fields}
    return Values(**{name: np.zeros(shape) for name, shape in shapes.items()})


def _fluxes(exposure: Exposure, values: Values, *, by_network: bool, limits: bool) -> dict[str, np.ndarray]:
    """Fluxes with their sign, and upper limits.

    Those of fits are theirs. The flux that a network gives is that of its magnitude, and its error follows from the
    posterior of the magnitude, ``flux * mag_err * ln(10) / 2.5``. Below the signal to noise of a detection that
    posterior is the prior of galaxies that are there: at places where there are none, the flux is 1.4 times its error
    above 0, and a linear solve with the shapes that the network sees in the noise 0.3 times. A fit that starts there
    is never negative. For such rows, flux and error are therefore those of the pixels in the circle of ``mag_aper``;
    they are not total.
    """
    zero = exposure.zero_point.value
    if not by_network:
        flux, error, limited = values.flux, values.flux_err, values.status == Status.CONVERGED
    else:
        flux, error = derived.flux_of(values.targets[:, 0], values.errors[:, 0], zero)
        found = dict(zip(DETECTED, values.detected.T, strict=True))
        unseen = ~(values.snr >= DETECTOR.least_snr)
        flux, error = (
            np.where(unseen, circle, own)
            for circle, own in ((found["aperture_flux"], flux), (found["aperture_error"], error))
        )
        limited = unseen | np.isfinite(values.flux)
    ujy = 10 ** (-0.4 * (zero - ZERO_POINT_OF_UJY))
    out = {"flux": flux, "flux_err": error, "flux_ujy": flux * ujy, "flux_ujy_err": error * ujy}
    if limits:
        out["mag_limit"] = np.where(limited, derived.upper_limit(flux, error, zero), np.nan)
    return out


def _position_errors(
    exposure: Exposure, grid: Grid, values: Values, x: np.ndarray, y: np.ndarray
) -> dict[str, np.ndarray]:
    """Errors of positions: of fits, or of the centroids of detected pixels, from the noise of the sky.

    The centroid of the pixels of an ellipse has the error ``semi-axis / (2 snr)`` along each axis, times `CENTROID`.
    Positions of a table have none.
    """
    found = dict(zip(DETECTED, values.detected.T, strict=True))
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio, angle = found["a"] / found["b"], np.radians(values.theta)
        half = CENTROID * np.sqrt(found["area"] / np.pi) / 2 / np.where(values.snr > 0, values.snr, np.nan)
        major, minor = half**2 * ratio, half**2 / ratio
        cos, sin = np.cos(angle), np.sin(angle)
        centroid = np.column_stack(
            [major * cos**2 + minor * sin**2, major * sin**2 + minor * cos**2, (major - minor) * sin * cos]
        )
        centroid[values.place >= 0] = np.nan
        xx, yy, xy = (np.where(np.isfinite(values.position), values.position, centroid) / grid.factor**2).T
        out = {"x_err": np.sqrt(xx), "y_err": np.sqrt(yy)}
        if exposure.wcs is None:
            return out
        steps = [np.zeros((2, len(x)))] * 2 if not len(x) else [_step(exposure, x, y, *by) for by in ((1, 0), (0, 1))]
        for name, along, across in zip(("ra_err", "dec_err"), *steps, strict=True):
            out[name] = np.sqrt(along**2 * xx + 2 * along * across * xy + across**2 * yy)
    return out


def _step(exposure: Exposure, x: np.ndarray, y: np.ndarray, dx: float, dy: float) -> np.ndarray:
    """What a step in pixels is towards east and north, arcsec, float64, (2, N)."""
    ra, dec = exposure.image.sky(x - dx / 2, y - dy / 2)
    there, up = exposure.image.sky(x + dx / 2, y + dy / 2)
    east = ((there - ra + 180) % 360 - 180) * np.cos(np.radians((dec + up) / 2))
    return 3600 * np.array([east, up - dec])


def _detected(exposure: Exposure, grid: Grid, values: Values, *, parents: bool) -> dict[str, np.ndarray]:
    """Columns that are measured by the detection, without a network or a fit."""
    found = dict(zip(DETECTED, values.detected.T, strict=True))
    out = {"a_image": found["a"] / grid.factor, "b_image": found["b"] / grid.factor}
    out["kron_radius"] = found["kron_radius"]
    for name, kind in (("auto", "kron"), ("aper", "aperture")):
        flux = np.where(found[f"{kind}_flux"] > 0, found[f"{kind}_flux"], np.nan)
        out[f"mag_{name}"] = exposure.zero_point.value - 2.5 * np.log10(flux)
        out[f"mag_{name}_err"] = 2.5 / np.log(10) * found[f"{kind}_error"] / flux
    out["area"] = np.rint(np.nan_to_num(found["area"]) / grid.factor**2)
    if parents:
        row = {place: i for i, place in enumerate(zip(values.x0.tolist(), values.y0.tolist(), strict=True), start=1)}
        brightest = zip(found["parent_x"].tolist(), found["parent_y"].tolist(), strict=True)
        out["parent"] = np.array([row.get(place, 0) for place in brightest], int)
    return out


OFFSET_SNR, LEAST_OFFSETS, OFFSET_LIMIT = 20.0, 5, 0.2
"""Signal to noise of the sources that an offset between images is measured on, their minimum number, and the offset in
pixels that a warning is issued for if it is above three times its error."""

NO_CENTROID = Flag.NO_DATA | Flag.EDGE | Flag.MASKED | Flag.SATURATED


def offset(name: str, origin: str, values: Values) -> dict[str, str | float]:
    """The offset of an image from positions of another image, as FITS cards.

    It is the median over bright sources, and is not corrected.

    Parameters
    ----------
    name : str
        The image.
    origin : str
        Where sources should be, for the warning.
    values : Values

    Warns
    -----
    SersicnetWarning
        If it is large enough to matter.
    """
    good = (values.snr >= OFFSET_SNR) & (values.flags & NO_CENTROID == 0) & np.isfinite(values.offset).all(axis=1)
    n = int(np.count_nonzero(good))
    if n < LEAST_OFFSETS:
        return {}
    away = values.offset[good]
    middle = np.median(away, axis=0)
    error = 1.2533 * 1.4826 * np.median(np.abs(away - middle), axis=0) / np.sqrt(n)
    x, y = middle.tolist()
    out: dict[str, str | float] = {"XOFFSET": x, "YOFFSET": y, "OFFSETER": float(error.max()), "OFFSETN": n}
    if np.hypot(x, y) > max(OFFSET_LIMIT, 3 * float(np.hypot(*error))):
        warn(
            f"{n} bright sources of {name} lie ({x:.2f}, {y:.2f}) pixels, +- {error.max():.2f}, from {origin}, and "
            f"are measured there all the same. Correct the positions or a WCS: add the offset to CRPIX of {name}."
        )
    return out


def provenance(
    exposure: Exposure, grid: Grid, mesh: Mesh, network: Weights | None, command: str
) -> dict[str, str | float]:
    """Origin of the catalogue, as FITS cards with keywords of at most eight characters."""
    meta: dict[str, str | float] = {
        "IMAGE": exposure.name,
        "MAGSYS": "AB",
        "ZEROPT": exposure.zero_point.value,
        "ZPSOURCE": exposure.zero_point.source,
        "PIXSRC": exposure.pixel_scale.source,
        "SKYRMS": float(np.median(mesh.rms)),
        "NOISECOR": correlation(mesh.autocorrelation),
        "STAMPSIZ": STAMP_SIZE,
        **tables.origin(),
    }
    if network is not None:
        meta.update(WEIGHTS=network.name, WTSHA256=network.sha256, DEVICE=network.device)
    if np.isfinite(exposure.pixel_scale.value):
        meta["PIXSCALE"] = exposure.pixel_scale.value
    if grid.factor != 1:
        meta["RESAMPLE"] = grid.factor
    if np.isfinite(mesh.map_factor):
        meta["MAPFACT"] = mesh.map_factor
    if exposure.noise_includes is not None:
        meta["NOISEHAS"] = exposure.noise_includes
    if command:
        meta["COMMAND"] = command
    return meta
