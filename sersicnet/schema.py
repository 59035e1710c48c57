"""The contract between simulations, networks and catalogues.

Everything that the two halves of sersicnet must agree on is defined here and
nowhere else: the shape and centring of a stamp, the four targets with their
units and transforms, the flag bits and the columns of a catalogue.

Pixels are zero-based, with integer values at pixel centres; x runs along the
columns of an array and y along its rows.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

SCHEMA_VERSION = 1

STAMP_SIZE = 128
"""Width and height of a stamp in pixels."""

STAMP_CENTRE = (STAMP_SIZE - 1) / 2
"""Zero-based position of the centre of a stamp; the galaxy lies within 0.5 pixels of it on both axes."""


PSF_VIEWS = 4
"""Views of a PSF that a network is shown; see `sersicnet.image.views`."""

VIEW_SIZE = 32
"""Width and height of a view, in its own pixels."""

NOISE_NUMBERS = 3
"""What a network is shown of the noise; see `noise_numbers`."""


class Inputs(NamedTuple):
    """Inputs of a network, arrays of N rows; None for an input that is not known.

    To add an input, add a field here and the shape of its rows to `INPUT_SHAPES`. Datasets, batches,
    Keras and ONNX handle all fields; a network uses the fields that it names. An input whose rows
    have two dimensions or more is an image, or a stack of images along the first dimension, and is
    rotated and flipped together with the stamp.

    Attributes
    ----------
    stamps : ndarray, float32, (N, 128, 128)
        Sky-subtracted pixels in units of their noise rms. During training on a device, it is an array
        of that device's library.
    psf : ndarray, float32, (N, 4, 32, 32) or (1, 4, 32, 32), optional
        Effective PSF at each galaxy, or the one of all of them; see `sersicnet.image.views.psf_views`.
    noise : ndarray, float32, (N, 3), optional
        See `noise_numbers`.
    """

    stamps: Any
    psf: Any = None
    noise: Any = None

    @classmethod
    def empty(cls, n: int, like: Inputs | None = None) -> Inputs:
        """Uninitialised inputs of `n` galaxies: all of them, or those that `like` has."""
        shapes = (
            INPUT_SHAPES
            if like is None
            else cls(*(None if field is None else shape for field, shape in zip(like, INPUT_SHAPES, strict=True)))
        )
        return shapes.map(lambda shape: np.empty((n, *shape), np.float32))

    @classmethod
    def concatenated(cls, parts: Sequence[Inputs], concatenate: Callable[..., Any] = np.concatenate) -> Inputs:
        """Concatenate several inputs, with the function of their array library.

        An input that is not known for one part is not known for the whole.
        """
        fields = zip(*parts, strict=True)
        return cls(*(None if any(f is None for f in field) else concatenate(field) for field in fields))

    @property
    def n(self) -> int:
        """Number of galaxies."""
        return len(self[0])

    def map(self, function: Callable[[Any], Any]) -> Inputs:
        """Apply a function to each field that is known."""
        return Inputs(*(None if field is None else function(field) for field in self))

    def taken(self, rows: Any) -> Inputs:
        """Select rows by a slice, or by an array of indices or bool; one PSF of all galaxies stays."""
        n = self.n
        return self.map(lambda field: field[rows] if len(field) == n else field)

    def put(self, rows: Any, other: Inputs) -> None:
        """Replace the selected rows of the fields that both know, in place."""
        for field, values in zip(self, other, strict=True):
            if field is not None and values is not None:
                field[rows] = values

    def finite(self) -> np.ndarray:
        """Whether all values of a galaxy are finite, bool, (N,)."""
        known = [field for field in self if field is not None]
        each = [np.isfinite(field).all(axis=tuple(range(1, field.ndim))) for field in known]
        return np.logical_and.reduce([np.broadcast_to(good, (self.n,)) for good in each])


INPUT_SHAPES = Inputs((STAMP_SIZE, STAMP_SIZE), (PSF_VIEWS, VIEW_SIZE, VIEW_SIZE), (NOISE_NUMBERS,))
"""Shape of a row of each input."""


def noise_numbers(correlation: ArrayLike, electrons: ArrayLike) -> np.ndarray:
    """What a network is shown of the noise of a stamp.

    Parameters
    ----------
    correlation : array_like, float, (...)
        Noise of a large aperture over that of uncorrelated pixels with the same rms; 1 without correlation. See
        `sersicnet.image.pixels.correlation`.
    electrons : array_like, float, (...)
        Electrons of a flux equal to the rms of a pixel, which sets the photon noise of the galaxy; NaN if it is not
        known.

    Returns
    -------
    ndarray, float32, (..., 3)
        Logarithm of the correlation; common logarithm of the electrons, 0 if they are not known; and whether they
        are known, 1 or 0.
    """
    correlation, electrons = np.broadcast_arrays(np.asarray(correlation, float), np.asarray(electrons, float))
    known = np.isfinite(electrons) & (electrons > 0)
    logarithm = np.where(known, np.log10(np.where(known, electrons, 1.0)), 0.0)
    return np.stack([np.log(correlation), logarithm, known], axis=-1).astype(np.float32)


@dataclass(frozen=True)
class Target:
    """One quantity that a network predicts.

    Attributes
    ----------
    name : str
        Column name, in catalogues and datasets.
    unit : str
        Unit as FITS writes it, empty when dimensionless.
    log : bool
        Whether networks are trained on its natural logarithm.
    low, high : float
        Range of the default prior.
    description : str
        Definition in one line.
    """

    name: str
    unit: str
    log: bool
    low: float
    high: float
    description: str


TARGETS = (
    Target("mag", "mag", False, 16.0, 27.0, "total AB magnitude of the Sersic model"),
    Target(
        "r_eff_pix",
        "pix",
        True,
        1.3,
        50.2,
        "effective radius along the semi-major axis, deconvolved from the PSF",
    ),
    Target("sersic_n", "", True, 0.3, 6.2, "Sersic index"),
    Target("ellipticity", "", False, 0.0, 0.97, "1 - q, with the axis ratio q = b/a"),
)
TARGET_NAMES = tuple(target.name for target in TARGETS)
N_TARGETS = len(TARGETS)


def orientation(ellipticity: ArrayLike, theta: ArrayLike) -> np.ndarray:
    """Components of the ellipticity, which have no jump at any angle.

    Parameters
    ----------
    ellipticity : array_like, float, (N,)
    theta : array_like, float, (N,)
        Angle of the major axis from +x towards +y, degrees.

    Returns
    -------
    ndarray, float64, (N, 2)
        ``e cos(2 theta)`` and ``e sin(2 theta)``; NaN where an input is.
    """
    twice = np.radians(2 * np.asarray(theta, float))
    return np.asarray(ellipticity, float)[:, None] * np.column_stack([np.cos(twice), np.sin(twice)])


def angle(components: np.ndarray) -> np.ndarray:
    """The angle of `orientation`, degrees from -90 to 90, float64, (N,)."""
    return np.degrees(np.arctan2(components[:, 1], components[:, 0])) / 2


def relative_magnitude(mag: ArrayLike, zero_point: ArrayLike, rms: ArrayLike) -> np.ndarray:
    """Magnitude of a galaxy relative to the noise of its pixels.

    The input of a network is a stamp divided by the rms of its pixels, so a
    network can predict ``-2.5 log10(flux / rms)``, but not the AB magnitude.

    Parameters
    ----------
    mag, zero_point : array_like, float
        AB magnitude, and the magnitude of one image unit.
    rms : array_like, float
        Standard deviation of a blank pixel, in image units.

    Returns
    -------
    ndarray, float
        NaN where an input is NaN or `rms` is not positive.
    """
    return np.asarray(mag) - np.asarray(zero_point) + 2.5 * _log10(rms)


def absolute_magnitude_of_rms(zero_point: ArrayLike, rms: ArrayLike) -> np.ndarray:
    """AB magnitude of a flux equal to the noise rms: add it to a relative magnitude."""
    return np.asarray(zero_point) - 2.5 * _log10(rms)


def _log10(values: ArrayLike) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    out = np.full(values.shape, np.nan)
    return np.log10(values, where=values > 0, out=out)


def encode(targets: np.ndarray) -> np.ndarray:
    """Convert physical targets to the space in which networks are trained.

    Parameters
    ----------
    targets : ndarray, float, (..., 4)
        Relative magnitude, effective radius [pix], Sersic index, ellipticity.

    Returns
    -------
    ndarray, float, (..., 4)
        The targets, with the natural logarithm of those with `Target.log`.
    """
    out = np.array(targets, dtype=float)
    for i, target in enumerate(TARGETS):
        if target.log:
            out[..., i] = np.log(out[..., i])
    return out


def decode(encoded: np.ndarray) -> np.ndarray:
    """The inverse of `encode`; values that overflow become infinite."""
    out = np.array(encoded, dtype=float)
    with np.errstate(over="ignore"):
        for i, target in enumerate(TARGETS):
            if target.log:
                out[..., i] = np.exp(out[..., i])
    return out


def pulls(predicted: np.ndarray, errors: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Deviations from the truth in units of the errors.

    The error of a target with `Target.log` is that of the logarithm times the value, and so the deviation is that of
    the logarithm: within 1 sigma of a value v with the error s are truths from v exp(-s / v) to v exp(s / v).

    Parameters
    ----------
    predicted, errors, truth : ndarray, float, (..., 4)
        Targets, their 1 sigma errors, and the true targets.

    Returns
    -------
    ndarray, float64, (..., 4)
        Predicted minus true values over the errors; NaN where a value is.
    """
    sigma = np.array(errors, dtype=float)
    with np.errstate(invalid="ignore", divide="ignore"):
        for i, target in enumerate(TARGETS):
            if target.log:
                sigma[..., i] /= predicted[..., i]
        return np.asarray((encode(predicted) - encode(truth)) / sigma)


class Flag(enum.IntFlag):
    """Bits of the ``flags`` column; 0 is a galaxy without remarks."""

    NO_DATA = 1
    EDGE = 2
    MASKED = 4
    BLENDED = 8
    CROWDED = 16
    LOW_SNR = 32
    LARGE = 64
    RANGE_MAG = 128
    RANGE_R_EFF = 256
    RANGE_N = 512
    RANGE_E = 1024
    OUT_OF_DOMAIN = 2048
    NOT_REFINED = 4096
    SATURATED = 8192
    POINT_LIKE = 16384
    PSF_ASSUMED = 32768
    OUT_OF_RANGE = RANGE_MAG | RANGE_R_EFF | RANGE_N | RANGE_E


RANGE_FLAGS = (Flag.RANGE_MAG, Flag.RANGE_R_EFF, Flag.RANGE_N, Flag.RANGE_E)
"""Flag of each target for values outside the range of the weights."""


EDGE_LIMIT = 0.02
MASKED_LIMIT = 0.1
CROWDED_LIMIT = 0.4
LOW_SNR_LIMIT = 10.0
LARGE_LIMIT = STAMP_SIZE / 4
DEPTH_TOLERANCE = 2.0
SCALE_TOLERANCE = 0.05
PSF_TOLERANCE = 0.2

FLAG_MEANING = {
    Flag.NO_DATA: "no usable pixel among the central 5 x 5: parameters are NaN",
    Flag.EDGE: f"the effective radius reaches the image border, or over {EDGE_LIMIT:.0%} of the light is beyond it",
    Flag.MASKED: f"more than {MASKED_LIMIT:.0%} of the light, or the peak, is in pixels that are masked or not finite",
    Flag.BLENDED: "the detection was separated from a touching neighbour",
    Flag.CROWDED: f"neighbours cover more than {CROWDED_LIMIT:.0%} of the stamp; they were replaced",
    Flag.LOW_SNR: f"snr below {LOW_SNR_LIMIT:g}, or not detected: the training prior weighs heavily",
    Flag.LARGE: f"effective radius above {LARGE_LIMIT:g} pixels: much of the light is outside the stamp",
    **{
        flag: f"{target.name} lies outside the range that the network was trained on"
        for flag, target in zip(RANGE_FLAGS, TARGETS, strict=True)
    },
    Flag.OUT_OF_DOMAIN: "the PSF, the depth or the noise correlation of the image is outside the domain of the "
    "weights; see OUTSIDE in the header",
    Flag.NOT_REFINED: "the fit did not converge, or ran into a bound: the values are the network's, "
    "or with `sersicnet fit` those where it stopped",
    Flag.SATURATED: "the peak is cut off, or reaches the header's SATURATE: too little light was counted",
    Flag.POINT_LIKE: "no larger than the stars of the image, or than its PSF: "
    "a star, a nucleus, or an unresolved galaxy",
    Flag.PSF_ASSUMED: "the PSF was assumed, from too few stars or a width alone: the errors include its uncertainty",
}
"""Meaning of each bit; the table in the documentation is generated from it."""


@dataclass(frozen=True)
class Column:
    """One column of the catalogue.

    Attributes
    ----------
    name : str
        In every format.
    dtype, unit, ucd, description : str
        As FITS writes them; the unit is empty for plain numbers.
    group : str
        Name of the columns that are listed together on request; empty for a column that is listed by default.
    """

    name: str
    dtype: str
    unit: str
    ucd: str
    description: str
    group: str = ""


def _quantiles(name: str, unit: str, ucd: str) -> list[Column]:
    return [
        Column(f"{name}_p{share}", "f4", unit, ucd, f"{share} % quantile of {name}", "quantiles") for share in QUANTILES
    ]


def _correlations() -> list[Column]:
    short = {"r_eff_pix": "r_eff"}
    ucds = ("phot.mag", "phys.angSize.smajAxis", "src.morph.param", "src.ellipticity")
    known = [(short.get(target.name, target.name), ucd) for target, ucd in zip(TARGETS, ucds, strict=True)]
    return [
        Column(
            f"corr_{one}_{other}", "f4", "", f"stat.correlation;{ucd};{other_ucd}",
            f"correlation of the errors of {one} and {other}", "correlations",
        )
        for (one, ucd), (other, other_ucd) in itertools.combinations(known, 2)
    ]  # fmt: skip


QUANTILES = (16, 50, 84)
"""Shares of a posterior below the quantiles that a catalogue lists, per cent."""


COLUMNS = (
    Column("image", "U", "", "meta.id;meta.dataset", "image of the row, if several were measured"),
    Column("id", "i4", "", "meta.id;meta.main", "number of the row from 1, or id in the table of positions"),
    Column("ra", "f8", "deg", "pos.eq.ra;meta.main", "right ascension, ICRS"),
    Column("dec", "f8", "deg", "pos.eq.dec;meta.main", "declination, ICRS"),
    Column("x", "f8", "pix", "pos.cartesian.x;instr.det", "column of the centroid or fit, 0 = centre of first"),
    Column("y", "f8", "pix", "pos.cartesian.y;instr.det", "row of the centroid or fit, 0 = centre of first"),
    Column("mag", "f4", "mag", "phot.mag", "total AB magnitude of the Sersic model"),
    Column("mag_err", "f4", "mag", "stat.error;phot.mag", "1 sigma error of mag"),
    Column("flux", "f4", "", "phot.flux", "flux with sign, image units: total, or of mag_aper if undetected"),
    Column("flux_err", "f4", "", "stat.error;phot.flux", "1 sigma error of flux"),
    Column("flux_ujy", "f4", "uJy", "phot.flux.density", "the same flux, by the zero point"),
    Column("flux_ujy_err", "f4", "uJy", "stat.error;phot.flux.density", "1 sigma error of flux_ujy"),
    Column("mag_limit", "f4", "mag", "phot.mag;stat.max", "3 sigma upper limit where flux is below 3 flux_err"),
    Column("r_eff", "f4", "arcsec", "phys.angSize.smajAxis", "effective radius, semi-major axis"),
    Column("r_eff_err", "f4", "arcsec", "stat.error;phys.angSize.smajAxis", "1 sigma error of r_eff"),
    Column("r_eff_pix", "f4", "pix", "phys.angSize.smajAxis", "effective radius, semi-major axis"),
    Column(
        "r_eff_pix_err",
        "f4",
        "pix",
        "stat.error;phys.angSize.smajAxis",
        "1 sigma error of r_eff_pix",
    ),
    Column("sersic_n", "f4", "", "src.morph.param", "Sersic index"),
    Column("sersic_n_err", "f4", "", "stat.error;src.morph.param", "1 sigma error of sersic_n"),
    Column("ellipticity", "f4", "", "src.ellipticity", "1 - q, with the axis ratio q = b/a"),
    Column("ellipticity_err", "f4", "", "stat.error;src.ellipticity", "1 sigma error of ellipticity"),
    Column("theta", "f4", "deg", "pos.posAng", "angle of the major axis from +x to +y: network, fit or moments"),
    Column("theta_err", "f4", "deg", "stat.error;pos.posAng", "1 sigma error of theta and pa; at most 52"),
    Column("pa", "f4", "deg", "pos.posAng;pos.eq", "position angle of the major axis, east of north, ICRS"),
    Column("r_circ", "f4", "arcsec", "phys.angSize", "circularised effective radius, r_eff sqrt(1 - ellipticity)"),
    Column("r_circ_pix", "f4", "pix", "phys.angSize", "circularised effective radius"),
    Column("snr", "f4", "", "stat.snr", "signal to noise in the detected area"),
    Column("mag_auto", "f4", "mag", "phot.mag", "AB magnitude in the Kron ellipse, 2.5 Kron radii"),
    Column("mag_auto_err", "f4", "mag", "stat.error;phot.mag", "its error from the noise of the sky"),
    Column("kron_radius", "f4", "", "phys.size", "Kron radius in units of a_image"),
    Column("mag_aper", "f4", "mag", "phot.mag", "AB magnitude in a circle of 10 pixels diameter"),
    Column("mag_aper_err", "f4", "mag", "stat.error;phot.mag", "its error from the noise of the sky"),
    Column("a_image", "f4", "pix", "phys.angSize.smajAxis", "1 sigma of the moments along the major axis, as observed"),
    Column("b_image", "f4", "pix", "phys.angSize.sminAxis", "1 sigma of the moments along the minor axis, as observed"),
    Column("area", "i4", "", "phys.angArea", "number of detected pixels; 0 if not detected"),
    Column("parent", "i4", "", "meta.id.parent", "id of the brightest touching source, or its own id if none"),
    Column("sky", "f4", "", "instr.background", "fitted residual level under the galaxy, image units"),
    Column("chi2", "f4", "", "stat.fit.chi2", "reduced chi-square of the fit"),
    Column(
        "fit_status",
        "i4",
        "",
        "meta.code",
        "0 converged, 1 not, 2 at a bound, 3 no data, 4 no start, -1 no fit",
    ),
    Column("flags", "i4", "", "meta.code.qual", "sum of bits, 0 = good; see the documentation"),
    Column("x_err", "f4", "pix", "stat.error;pos.cartesian.x;instr.det", "1 sigma error of x", "position_errors"),
    Column("y_err", "f4", "pix", "stat.error;pos.cartesian.y;instr.det", "1 sigma error of y", "position_errors"),
    Column("ra_err", "f4", "arcsec", "stat.error;pos.eq.ra", "1 sigma error of ra times cos(dec)", "position_errors"),
    Column("dec_err", "f4", "arcsec", "stat.error;pos.eq.dec", "1 sigma error of dec", "position_errors"),
    Column(
        "mu_mean", "f4", "mag arcsec-2", "phot.mag.sb", "mean surface brightness in the ellipse of r_eff",
        "surface_brightness",
    ),
    Column(
        "mu_mean_err", "f4", "mag arcsec-2", "stat.error;phot.mag.sb", "1 sigma error of mu_mean",
        "surface_brightness",
    ),
    *_correlations(),
    *_quantiles("r_eff", "arcsec", "phys.angSize.smajAxis"),
    *_quantiles("r_eff_pix", "pix", "phys.angSize.smajAxis"),
    *_quantiles("sersic_n", "", "src.morph.param"),
    *_quantiles("ellipticity", "", "src.ellipticity"),
)  # fmt: skip
COLUMN = {column.name: column for column in COLUMNS}

GROUPS = tuple(dict.fromkeys(column.group for column in COLUMNS if column.group))
"""Names of the groups of columns that are listed on request."""

CORRELATIONS = tuple(column.name for column in COLUMNS if column.group == "correlations")
"""Columns of the six correlations, in the order of `sersicnet.weights.PAIRS`."""
