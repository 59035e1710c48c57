"""Columns and header of a catalogue, from the measured values."""

from __future__ import annotations

import numpy as np
from astropy.table import QTable

from sersicnet.catalogue import table as tables
from sersicnet.catalogue.factors import Factors, distances
from sersicnet.domain import Seen, WideDomain
from sersicnet.errors import warn
from sersicnet.image.exposure import Exposure
from sersicnet.image.pixels import correlation
from sersicnet.image.resample import Resampled
from sersicnet.image.sky import Mesh
from sersicnet.image.stars import look_like_stars
from sersicnet.measuring import tiles
from sersicnet.schema import (
    LARGE_LIMIT,
    RANGE_FLAGS,
    STAMP_SIZE,
    TARGET_NAMES,
    Flag,
    absolute_magnitude_of_rms,
)
from sersicnet.weights import Weights

ZERO_POINT_OF_UJY = 23.9
"""AB magnitude of a microjansky."""

Grid = Exposure | Resampled
"""The image that is measured: the exposure, or the exposure resampled."""


def flag_large(values: tiles.Values) -> None:
    """Flag galaxies too large for a stamp, in place."""
    with np.errstate(invalid="ignore"):
        values.flags[values.targets[:, 1] > LARGE_LIMIT] |= Flag.LARGE


def flag_domain(values: tiles.Values, network: Weights, seen: Seen, largest_star: float) -> str:
    """Set the flags that need the whole catalogue and the domain of the weights, in place.

    Parameters
    ----------
    values : Values
    network : Weights
    seen : Seen
        What is known of the image.
    largest_star : float
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


def correct(values: tiles.Values, factors: Factors, scale: float, *, debias: bool) -> None:
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


def catalogue(
    exposure: Exposure,
    grid: Grid,
    values: tiles.Values,
    *,
    errors: bool,
    fitted: bool,
    angles: bool,
    fluxes: bool,
    parents: bool,
) -> QTable:
    """The catalogue of an image, with units and descriptions.

    Parameters
    ----------
    exposure : Exposure
        The original image; positions and sizes are in its pixels.
    grid : Exposure or Resampled
        The image that was measured: the exposure, or the exposure resampled.
    values : Values
    errors : bool
        Whether the parameters have errors.
    fitted : bool
        Whether profiles were fitted.
    angles : bool
        Whether the angle has an error.
    fluxes : bool
        Whether fluxes are listed beside magnitudes.
    parents : bool
        Whether the rows are all detections, so that each parent has a row.
    """
    n, targets = len(values.x), values.targets
    x, y = grid.from_grid(values.x), grid.from_grid(values.y)
    columns: dict[str, np.ndarray] = {"id": np.arange(1, n + 1), "x": x, "y": y}
    if exposure.wcs is not None:
        columns["ra"], columns["dec"] = exposure.image.sky(x, y) if n else (np.zeros(0), np.zeros(0))
        columns["pa"] = exposure.image.position_angle(x, y, values.theta) if n else np.zeros(0)
    for i, name in enumerate(TARGET_NAMES):
        unit = 1 / grid.factor if name == "r_eff_pix" else 1.0
        columns[name] = targets[:, i] * unit
        if errors:
            columns[f"{name}_err"] = values.errors[:, i] * unit
    with np.errstate(invalid="ignore"):
        columns["r_circ_pix"] = columns["r_eff_pix"] * np.sqrt(1 - targets[:, 3])
    if np.isfinite(exposure.pixel_scale.value):
        for name in ("r_eff", "r_eff_err", "r_circ"):
            pixels = columns.get(name.replace("r_eff", "r_eff_pix").replace("r_circ", "r_circ_pix"))
            if pixels is not None:
                columns[name] = pixels * exposure.pixel_scale.value
    if fluxes:
        ujy = 10 ** (-0.4 * (exposure.zero_point.value - ZERO_POINT_OF_UJY))
        columns.update(flux=values.flux, flux_err=values.flux_err)
        columns.update(flux_ujy=values.flux * ujy, flux_ujy_err=values.flux_err * ujy)
    if angles:
        columns["theta_err"] = values.theta_err
    columns.update(theta=values.theta, snr=values.snr, flags=values.flags)
    columns.update(_detected(exposure, grid, values, parents=parents))
    if fitted:
        columns.update(sky=values.sky, chi2=values.chi2, fit_status=values.status)
    return tables.assembled(columns)


def _detected(exposure: Exposure, grid: Grid, values: tiles.Values, *, parents: bool) -> dict[str, np.ndarray]:
    """Columns that are measured by the detection, without a network or a fit."""
    found = dict(zip(tiles.DETECTED, values.detected.T, strict=True))
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


def offset(name: str, detected: str, values: tiles.Values) -> dict[str, str | float]:
    """The offset of an image from the positions of the image that was detected on, as FITS cards.

    It is the median over bright sources, and is not corrected.

    Warns
    -----
    SersicnetWarning
        If it is large enough to matter.
    """
    out: dict[str, str | float] = {"DETECTON": detected}
    good = (values.snr >= OFFSET_SNR) & (values.flags & NO_CENTROID == 0) & np.isfinite(values.offset).all(axis=1)
    n = int(np.count_nonzero(good))
    if n < LEAST_OFFSETS:
        return out
    away = values.offset[good]
    middle = np.median(away, axis=0)
    error = 1.2533 * 1.4826 * np.median(np.abs(away - middle), axis=0) / np.sqrt(n)
    x, y = middle.tolist()
    out |= {"XOFFSET": x, "YOFFSET": y, "OFFSETER": float(error.max()), "OFFSETN": n}
    if np.hypot(x, y) > max(OFFSET_LIMIT, 3 * float(np.hypot(*error))):
        warn(
            f"{n} bright sources of {name} lie ({x:.2f}, {y:.2f}) pixels, +- {error.max():.2f}, from where the WCS of "
            f"{detected} puts them, and are cut there all the same. Correct one WCS: add the offset to CRPIX of {name}."
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
