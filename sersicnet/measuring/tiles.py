"""Measure one tile of an image: detect its sources, cut their stamps, predict with the network, and fit."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from scipy.spatial import KDTree

from sersicnet import weights
from sersicnet.catalogue.parameters import possible
from sersicnet.engine import forced
from sersicnet.engine.fit import Fits, Status
from sersicnet.errors import InputError
from sersicnet.image import detect, stars
from sersicnet.image.pixels import Window
from sersicnet.image.stamps import cut
from sersicnet.measuring.fitting import Fitters, correlations_of, known_galaxies
from sersicnet.measuring.neighbours import REACH as NEIGHBOURS_WITHIN
from sersicnet.measuring.neighbours import filled_area, hidden_light, noise_of_star
from sersicnet.measuring.predicting import Look, add_hidden, loaded, predict
from sersicnet.measuring.scene import (
    NEIGHBOUR_REACH,
    STAMPS_AT_ONCE,
    Scene,
    Setting,
    Values,
    at_edge,
    inside,
    source_at,
    stamps_of,
)
from sersicnet.output import Report, silent
from sersicnet.schema import N_TARGETS, STAMP_SIZE, TARGET_NAMES, Flag

MOST_NEIGHBOURS = 3
"""Maximum number of overlapping neighbours that are fitted simultaneously with a galaxy; others are masked."""


NEIGHBOUR_FLUX = 0.1
"""Minimum flux of a neighbour that is fitted simultaneously, as a fraction of the galaxy's flux."""


MOST_FLUX_ERROR = 3.0
"""A fit whose flux has a larger error than this many times the flux has found nothing: it has not converged."""


MOST_FAINTER = 5.0
"""A start more than this many magnitudes fainter than the detected source at its position is not used."""


def cores(shape: tuple[int, int], tile: int) -> list[Window]:
    """Windows of the tiles of an image, row by row: about equally large, without overlap."""
    if tile < STAMP_SIZE:
        raise InputError(f"A tile has at least {STAMP_SIZE} pixels per side; received {tile}.")
    edges = [np.linspace(0, n, max(1, round(n / tile)) + 1).round().astype(int).tolist() for n in shape]
    return [(slice(*rows), slice(*columns)) for rows in pairwise(edges[0]) for columns in pairwise(edges[1])]


def measure_tile(setting: Setting, core: Window, report: Report = silent) -> dict[str, np.ndarray]:
    """Measure the positions or detected sources of a tile.

    Parameters
    ----------
    setting : Setting
    core : Window
        The tile.
    report : callable
        Receives the stage, the number of sources done and their total number.

    Returns
    -------
    dict
        The fields of `Values`, and ``profiles``, ndarray, float64, (M, 4); see `sersicnet.image.stars.profiles`.
    """
    try:
        report("detecting", 0, 0)
        scene, own = Scene.of(setting, core)
        values = Values.empty(scene, own)
        look = None
        if setting.network is not None:
            look = predict(scene, values, own, loaded(*setting.network), report)
        else:
            _start(scene, values)
        if setting.fitters is not None and setting.forced:
            _measure_fluxes(scene, values, own, setting.fitters, report)
        elif setting.fitters is not None:
            _fit(scene, values, own, setting.fitters, look, report)
        values.flags[at_edge(scene, values)] |= Flag.EDGE
        profiles = np.zeros((0, 4))
        if setting.profiles:
            mine = inside(scene.found.x, scene.found.y, core, setting.exposure.shape)
            profiles = _profiles(scene, values, mine)
        return {**{name: array[own] for name, array in values._asdict().items()}, "profiles": profiles}
    finally:
        setting.exposure.close()


def _start(scene: Scene, values: Values) -> None:
    """Set the start parameters of the fits: from the user's table, and otherwise from moments."""
    moments = _moments(scene.found, scene.setting.psf_width)
    flux, r_eff, n, q = (scene.of_source(moments[:, k]) for k in (2, 3, 4, 5))
    with np.errstate(invalid="ignore", divide="ignore"):
        mag = scene.setting.zero_point - 2.5 * np.log10(flux)
    guesses = {"mag": mag, "r_eff_pix": r_eff, "sersic_n": n, "ellipticity": 1 - q, "theta": values.theta}
    for name, column in scene.setting.starts.items():
        given = column[scene.place]
        known = np.isfinite(given) if name == "theta" else possible(name, given)
        if name == "mag":  # a model that is invisible beside the detected source would stay so
            with np.errstate(invalid="ignore"):
                known &= ~(given > guesses[name] + MOST_FAINTER)
        guesses[name] = np.where(known, given, guesses[name])
    for name, usual in (("sersic_n", 1.5), ("ellipticity", 0.3)):
        guesses[name] = np.where(np.isfinite(guesses[name]), guesses[name], usual)
    if scene.setting.fix:
        table = known_galaxies(scene.setting.places, scene.setting.starts)[scene.place]
        kept = {"r_eff_pix": table[:, 3], "sersic_n": table[:, 4], "ellipticity": 1 - table[:, 5], "theta": table[:, 6]}
        guesses |= {name: column for name, column in kept.items() if name.removesuffix("_pix") in scene.setting.fix}
    for k, name in enumerate(TARGET_NAMES):
        values.targets[:, k] = guesses[name]
    values.theta[:] = guesses["theta"]
    for rows, stamps in stamps_of(scene, scene.source + 1):
        values.note(scene, rows, stamps)
    values.targets[values.flags & Flag.NO_DATA != 0] = np.nan


def _moments(found: detect.Detections, psf_width: float) -> np.ndarray:
    """Rough parameters of all detections, (D, 7); the width of the PSF is subtracted in quadrature."""
    a, b = (np.sqrt(np.maximum(axis**2 - (psf_width / 2.355) ** 2, 0.25)) for axis in (found.a, found.b))
    index = np.full(len(found), 1.5)
    return np.column_stack([found.x, found.y, 1.2 * found.flux, 1.2 * a, index, np.clip(b / a, 0.1, 0.95), found.theta])


def _profiles(scene: Scene, values: Values, which: np.ndarray) -> np.ndarray:
    """The `sersicnet.image.stars.profiles` of detections, with their size in place of their number."""
    (data, bad, _), found = scene.pixels, scene.found
    out = stars.profiles(data, bad, scene.sky, found, which, scene.origin)
    source = out[:, 3].astype(int)
    if scene.setting.places is None:  # the sizes of the detections are already measured
        size = np.full(len(found), np.nan)
        size[scene.source] = values.size
        out[:, 3] = size[source]
        return out
    dilated = found.dilated()
    for first in range(0, len(out), STAMPS_AT_ONCE):
        part = slice(first, first + STAMPS_AT_ONCE)
        i = source[part]
        stamps = cut(data, bad, scene.sky, found.x[i], found.y[i], dilated, i + 1, scene.origin)
        out[part, 3] = stars.sizes(stamps)[0]
    return out


def _overlapping(scene: Scene) -> list[np.ndarray]:
    """Indices of the detections that are fitted simultaneously with each place: bright, touching neighbours.

    Two sources touch if the circles with the areas of their detected pixels touch. Of the touching
    neighbours with more than a tenth of the galaxy's flux, those with the most light at the galaxy are taken.
    """
    found, none = scene.found, np.zeros(0, int)
    if not len(found):
        return [none] * len(scene.x)
    reach = np.sqrt(found.area / np.pi)
    tree = KDTree(np.column_stack([found.x, found.y]))
    out = []
    for source in scene.source:
        if source < 0:
            out.append(none)
            continue
        near = np.array(tree.query_ball_point((found.x[source], found.y[source]), 0.7 * STAMP_SIZE), int)
        near = near[near != source]
        distance = np.hypot(found.x[near] - found.x[source], found.y[near] - found.y[source])
        touching = (distance < reach[near] + reach[source] + 2) & (
            found.flux[near] > NEIGHBOUR_FLUX * found.flux[source]
        )
        near, distance = near[touching], distance[touching]
        out.append(near[np.argsort(-found.flux[near] / distance**2)][:MOST_NEIGHBOURS])
    return out


def _measure_fluxes(scene: Scene, values: Values, own: np.ndarray, fitters: Fitters, report: Report) -> None:
    """Measure the fluxes of the table's galaxies in the tile itself; sources that are not in the table are masked."""
    setting = scene.setting
    listed = known_galaxies(setting.places, setting.starts)
    values.targets[:, 0] = np.nan
    values.flags[own] |= Flag.NOT_REFINED
    values.status[own] = Status.NO_DATA
    mine = np.flatnonzero(own & np.isfinite(scene.x + scene.y) & (values.flags & Flag.NO_DATA == 0))
    near = forced.neighbours(listed, scene.place[mine], NEIGHBOUR_REACH)
    labels = np.zeros((len(scene.x), 1 + max((len(others) for others in near), default=0)), int)
    for i, others in zip(mine, near, strict=True):
        x, y = listed[others, :2].T
        sources = source_at(scene.found.segmentation, x - scene.origin[0], y - scene.origin[1])
        labels[i, : 1 + len(others)] = scene.source[i] + 1, *(sources + 1)
    report("measuring fluxes", 0, len(mine))
    for part, stamps in stamps_of(scene, labels, mine):
        rows = mine[part]
        to_stamp = np.zeros((len(rows), 7))
        to_stamp[:, 0], to_stamp[:, 1] = stamps.x - scene.x[rows], stamps.y - scene.y[rows]
        for group, fitter in fitters.groups(scene.x[rows], scene.y[rows]):
            here = rows[group]
            found = forced.fluxes(
                fitter,
                stamps.pixels[group] * stamps.rms[group, None, None].astype(np.float32),
                stamps.noise[group],
                listed[scene.place[here]] + to_stamp[group],
                stamps.replaced[group],
                [listed[near[part.start + k]] + to_stamp[k] for k in group],
                workers=setting.threads,
            )
            values.status[here] = found.status
            good = found.status == Status.CONVERGED
            at = here[good]
            values.flags[at] &= ~Flag.NOT_REFINED
            values.sky[at], values.chi2[at] = found.sky[good], found.chi2[good]
            # A reduced chi-square above 1 is treated as an underestimated noise: the errors are scaled up.
            flux, error = found.flux[good], found.error[good] * np.sqrt(np.maximum(found.chi2[good], 1))
            values.flux[at], values.flux_err[at] = flux, error
            positive = flux > 0
            values.targets[at, 0] = setting.zero_point - 2.5 * np.log10(np.where(positive, flux, np.nan))
            values.errors[at, 0] = np.where(positive, 2.5 / np.log(10) * error / np.where(positive, flux, 1), np.nan)
        report("measuring fluxes", part.stop, len(mine))


def _fit(scene: Scene, values: Values, own: np.ndarray, fitters: Fitters, look: Look | None, report: Report) -> None:
    """Fit Sersic profiles at the places of the tile itself; without a network, unconverged fits replace values, too."""
    zero_point = scene.setting.zero_point
    parameters = values.parameters(zero_point)
    of_psf = np.zeros((len(parameters), 2, N_TARGETS)) if look is None else look.of_psf
    first = parameters if look is None else look.galaxies
    starts = _moments(scene.found, scene.setting.psf_width)
    known = (scene.source >= 0) & np.isfinite(first).all(axis=1)
    starts[scene.source[known]] = first[known]
    neighbours = _overlapping(scene)
    labels = np.zeros((len(parameters), 1 + MOST_NEIGHBOURS), int)
    for row, source, near in zip(labels, scene.source, neighbours, strict=True):
        row[: 1 + len(near)] = source + 1, *(near + 1)
    others = _neighbours(scene, neighbours, starts, first)
    mine = np.flatnonzero(own)
    n = len(mine)
    report("fitting", 0, n)
    for part, stamps in stamps_of(scene, labels, mine):
        rows = mine[part]
        to_stamp = np.zeros((len(rows), 7))
        to_stamp[:, 0], to_stamp[:, 1] = stamps.x - scene.x[rows], stamps.y - scene.y[rows]
        stamps.replaced[stamps.empty] = True
        done = part.start
        for group, fitter in fitters.groups(scene.x[rows], scene.y[rows]):
            shifts, here = to_stamp[group], rows[group]
            fits = fitter(
                stamps.pixels[group] * stamps.rms[group, None, None].astype(np.float32),
                stamps.noise[group],
                parameters[here] + shifts,
                stamps.replaced[group],
                [others[row][0] + shift for row, shift in zip(here, shifts, strict=True)],
                [others[row][1] for row in here],
                workers=scene.setting.threads,
                report=lambda more, done=done: report("fitting", done + more, n),  # type: ignore[misc]
            )
            _take(values, here, fits, shifts, zero_point, of_psf[here], keep=look is None)
            done += len(group)
    refined = mine[values.flags[mine] & Flag.NOT_REFINED == 0]
    seen = None if look is None else look.hidden
    add_hidden(values, refined, _hidden(scene, values, refined, starts) if seen is None else seen[refined])


def _hidden(scene: Scene, values: Values, rows: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """Scatter of the light that is hidden in fitted galaxies, see `hidden_light`; `sources` are all detections.

    Saturated ones do not count, as in the second look: what they would be is not known.
    """
    if not len(rows):
        return np.zeros(0)
    width, galaxies = scene.setting.psf_width, values.parameters(scene.setting.zero_point)[rows]
    usable = sources[:, 2] > 0
    usable[scene.source[(values.flags & Flag.SATURATED != 0) & (scene.source >= 0)]] = False
    near = KDTree(sources[:, :2]).query_ball_point(galaxies[:, :2], NEIGHBOURS_WITHIN, p=np.inf)
    of = np.repeat(np.arange(len(rows)), [len(some) for some in near])
    others = np.concatenate([np.array(some, int) for some in near])
    counts = (others != scene.source[rows][of]) & usable[others]
    noise = noise_of_star(values.rms[rows], scene.sky.correlation, width)
    return hidden_light(of[counts], sources[others[counts], 2], galaxies[:, 2], filled_area(galaxies, width), noise)


def _neighbours(
    scene: Scene, near: list[np.ndarray], starts: np.ndarray, parameters: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Start parameters of the neighbours of each place, and whether they are of the user's table.

    Where something is fixed, each galaxy of the table on a neighbour, or on the same detection, is a neighbour of its
    own; otherwise a neighbour is a detection.
    """
    if not scene.setting.fix:
        return [(starts[found], np.zeros(len(found), bool)) for found in near]
    usable = np.isfinite(parameters).all(axis=1)
    _, first, same = np.unique(parameters, axis=0, return_index=True, return_inverse=True)
    same = first[same.ravel()]  # a galaxy that is listed twice is one
    once = usable & (same == np.arange(len(same)))
    places = [np.flatnonzero(once & (scene.source == k)) for k in range(len(scene.found))]
    out = []
    for row, found in enumerate(near):
        own = [] if scene.source[row] < 0 else [scene.source[row]]
        listed = [k for source in (*own, *found) for k in places[source] if k != same[row]]
        rest = [source for source in found if not len(places[source])]
        rows = np.vstack([parameters[listed].reshape(-1, 7), starts[rest].reshape(-1, 7)])
        out.append((rows, np.arange(len(rows)) < len(listed)))
    return out


def _take(
    values: Values, rows: np.ndarray, fits: Fits, to_stamp: np.ndarray, zero: float, of_psf: np.ndarray, *, keep: bool
) -> None:
    """Write the results of fits into their rows of `values`; `of_psf` is what the PSF adds to their errors.

    Errors of fixed parameters are NaN.
    """
    # A reduced chi-square above 1 is treated as an underestimated noise: the errors are scaled up.
    worse = np.sqrt(np.maximum(fits.chi2, 1))[:, None]
    with np.errstate(invalid="ignore"):
        errors = np.sqrt(np.diagonal(fits.covariance, axis1=1, axis2=2)) * worse
        seen = errors[:, 2] < MOST_FLUX_ERROR * fits.parameters[:, 2]
    good = (fits.status == Status.CONVERGED) & np.isfinite(errors).all(axis=1) & seen
    values.status[rows] = np.where(good | (fits.status != Status.CONVERGED), fits.status, Status.NOT_CONVERGED)
    values.flags[rows[~good]] |= Flag.NOT_REFINED
    taken = np.isfinite(fits.parameters).all(axis=1) if keep else good
    if keep:
        values.targets[rows[~taken]] = np.nan
    at = rows[taken]
    x, y, flux, r_eff, n, q, theta = (fits.parameters - to_stamp)[taken].T
    errors = errors[taken]
    errors[errors == 0] = np.nan
    values.flux[at], values.flux_err[at] = flux, errors[:, 2]
    place = (fits.covariance * worse[:, :, None] ** 2)[taken][:, [0, 1, 0], [0, 1, 1]]
    values.position[at] = np.where(errors[:, [0, 1, 0]] > 0, place, np.nan)
    values.x[at], values.y[at], values.theta[at] = x, y, theta
    values.targets[at] = np.column_stack([zero - 2.5 * np.log10(flux), r_eff, n, 1 - q])
    of_noise = np.column_stack([2.5 / np.log(10) * errors[:, 2] / flux, *errors[:, 3:6].T])
    found = weights.Prediction(values.targets[at], of_noise, correlations_of(fits.covariance[taken, 2:6, 2:6]))
    with np.errstate(invalid="ignore"):  # errors of a failed fit may be infinite
        for shift in of_psf[taken].swapaxes(0, 1):
            found = found.with_error(shift)
    values.errors[at], values.correlations[at] = found.errors, found.correlations
    values.theta_err[at] = np.minimum(errors[:, 6], weights.UNKNOWN_ANGLE)
    values.sky[at], values.chi2[at] = fits.sky[taken], fits.chi2[taken]
