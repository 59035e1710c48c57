"""Which PSF a measurement uses: the user's, that of the image's stars, or one that is assumed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from sersicnet.errors import InputError, warn
from sersicnet.image import starpsf
from sersicnet.image.exposure import Exposure
from sersicnet.image.fewstars import confirmed
from sersicnet.image.psf import Psf, Width
from sersicnet.image.sky import Map, Mesh, estimate_sky
from sersicnet.image.starpsf import ImagePsf
from sersicnet.image.stars import size_of
from sersicnet.image.views import psf_views, shape_of
from sersicnet.measuring.scene import DETECTOR
from sersicnet.simulating import observatories

GIVEN_ERROR, NARROW_ERROR, LONE_ERROR, GUESSED_ERROR = 0.02, 0.15, 0.3, 0.4
"""Relative 1 sigma error of the FWHM of a PSF that is assumed: one of a given width, that of the narrowest source, of
several or of fewer than `SEVERAL`, and a guess: images of telescopes have 1.3 to 8 pixels."""

SEVERAL = 3
"""With at least so many bright sources, the narrowest is probably a star, or nearly as narrow as one."""

LIKE_USUAL = 1.5
"""How many times narrower or wider than the usual PSF of its instrument on the ground the narrowest source may be."""

SPACE_MARGIN, GROUND_MARGIN = 1.3, 1.6
"""How many times narrower or wider than those of an instrument a PSF may be before it is doubted. The seeing of single
exposures varies more than that of surveys."""

OTHER_WIDTH = 1.3
"""How many times narrower or wider than the stars of the image a PSF may be before it is doubted."""

STAR_MARGIN, GIVEN_MARGIN = 0.02, 0.05
"""How much larger than a PSF from stars, or than one that was given, a source may be that looks like a star. Above a
signal to noise of 50, 95 % of the stars are within 1.5 %, and the smallest galaxies are 6 % larger."""

GUESS = 3.0
"""FWHM of the PSF that is assumed if nothing at all is known, pixels."""

WIDTHS = (1.0, 16.0)
"""Smallest and largest FWHM, in pixels, of a PSF if only its width is known."""

BETA, BETA_GUESSED = 3.0, 2.25
"""Exponents of the Moffat profile of a PSF if only its width is known: as from the ground, and for any telescope.

They put 0.96 and 0.91 of the light within two FWHM. PSFs of telescopes in space have 0.78 to 0.87 of it there, and
those from the ground 0.93 to 0.97.
"""

LIGHT_ERROR, LIGHT_GUESSED_ERROR = 0.04, 0.06
"""Relative 1 sigma errors of that light."""

SIDE = 257
"""Side of the image of an assumed PSF, pixels; it is sampled twice a pixel."""


class Seeing(NamedTuple):
    """The PSF of a measurement.

    Attributes
    ----------
    psf : Psf
        In the pixels of the exposure; its ``source`` states where it is from, its ``error`` how well it is known.
    assumed : bool
        Whether it is neither a file, nor of stars, nor that of an instrument in space, which hardly changes.
    stars : ImagePsf or None
        What is known of the stars that it is from.
    """

    psf: Psf
    assumed: bool = False
    stars: ImagePsf | None = None

    @property
    def shape(self) -> np.ndarray:
        """Light within one and two FWHM, and the ellipticity; see `sersicnet.image.views.shape_of`."""
        return shape_of(psf_views(self.psf.image, self.psf.oversampling), self.psf.fwhm)

    def meta(self) -> dict[str, str | float]:
        """Cards for the header of the catalogue."""
        _, light, ellipticity = self.shape
        out: dict[str, str | float] = {
            "PSFSRC": self.psf.source,
            "PSFFWHM": self.psf.fwhm,
            "PSFERR": self.psf.error,
            "PSFLERR": self.psf.light_error,
            "PSFLIGHT": float(light),
            "PSFELLIP": float(ellipticity),
        }
        if self.stars is not None:
            out.update(PSFSTARS=len(self.stars.x), PSFMIN=self.stars.narrowest, PSFMAX=self.stars.widest)
        return out


def largest_stars(given: Psf | None, seen: Seeing | None, x: np.ndarray, y: np.ndarray) -> np.ndarray | None:
    """Sizes up to which sources look like stars at some places, float64, (N,): a little more than that of the PSF.

    Parameters
    ----------
    given : Psf or None
        That of the user.
    seen : Seeing or None
        That of the measurement.
    x, y : ndarray, float64, (N,)
        Zero-based pixels of the exposure.

    Returns
    -------
    ndarray or None
        As of `sersicnet.image.stars.sizes`, pixels; None if the PSF is assumed, or there is none.
    """
    psf, margin = given, GIVEN_MARGIN
    if psf is None and seen is not None and not seen.assumed:
        psf, margin = seen.psf, max(STAR_MARGIN, seen.psf.error)
    if psf is None:
        return None
    labels, psfs = psf.cells(x, y)
    return (1 + margin) * np.array([size_of(one) for one in psfs])[labels]


def seeing(
    exposure: Exposure, mesh: Mesh, psf: Psf | None, fwhm: float | None, saturation: float = np.inf, apply: Map = map
) -> Seeing:
    """The PSF of an exposure: the given one, that of its stars, or an assumed one.

    Parameters
    ----------
    exposure : Exposure
    mesh : Mesh
        Its sky and noise.
    psf : Psf, optional
        The user's.
    fwhm : float, optional
        Width in pixels, if this is all that the user has.
    saturation : float
        Saturation level, image units; infinite if it is not known.
    apply : callable
        Applies a function to windows of the image, as `map` does.

    Returns
    -------
    Seeing

    Warns
    -----
    SersicnetWarning
        If a PSF is assumed that may be far from the true one.
    """
    if psf is not None:
        return Seeing(psf)
    if fwhm is not None:
        return Seeing(moffat(fwhm, f"a width of {fwhm:g} pixels", GIVEN_ERROR), assumed=True)
    stars = starpsf.find_psf(exposure, mesh, DETECTOR, saturation, apply)
    if stars.psf is not None:
        return Seeing(stars.psf, stars=stars)
    assumed, in_space = observatories.usual_psf(exposure.image.header, exposure.pixel_scale.value)
    if assumed is not None:
        stars = confirmed(stars, assumed)
        if stars.psf is not None:
            return Seeing(stars.psf, assumed=not in_space, stars=stars)
        if in_space:
            return Seeing(assumed)
    width = float(np.clip(stars.narrow, *WIDTHS))
    like_usual = assumed is None or 1 / LIKE_USUAL < width / assumed.fwhm < LIKE_USUAL
    if np.isfinite(width) and like_usual:
        error = NARROW_ERROR if stars.bright >= SEVERAL else LONE_ERROR
        if assumed is None or error < assumed.error:
            assumed = moffat(width, "the width of the narrowest source", error, guessed=assumed is None)
    assumed = assumed or moffat(GUESS, f"a guess of {GUESS:g} pixels", GUESSED_ERROR, guessed=True)
    warn(
        f"{exposure.name} shows no PSF ({stars.reason}): {assumed.source} is assumed, with a FWHM of "
        f"{assumed.fwhm:.2f} pixels known to {assumed.error:.0%}. Errors include that, and all rows are flagged. Give "
        "`psf` or `psf_fwhm`."
    )
    return Seeing(assumed, assumed=True)


def find_psf(image: Any, **options: Any) -> ImagePsf:
    """Measure the PSF of an image from its stars, as `sersicnet.measure` does by default.

    Parameters
    ----------
    image : Exposure, or any input of `sersicnet.Exposure.of`
        A path, an HDU, an NDData, an array. No zero point is needed.
    **options
        Options of `sersicnet.Exposure.of`, such as ``noise``, ``mask`` and ``hdu``.

    Returns
    -------
    ImagePsf
        Its ``psf`` is None if the stars do not suffice; ``reason`` states why. A PSF of 3 or 4 stars is
        taken if it is about as wide as that of the instrument that the header states.

    Raises
    ------
    InputError
        If the image cannot be used.
    """
    exposure = Exposure.of(image, **options if isinstance(image, Exposure) else {"zero_point": 0.0, **options})
    try:
        mesh = estimate_sky(exposure, DETECTOR.threshold)
        found = starpsf.find_psf(exposure, mesh, DETECTOR, exposure.saturation)
        usual, _ = observatories.usual_psf(exposure.image.header, exposure.pixel_scale.value)
        if usual is not None:
            found = confirmed(found, usual)
    finally:
        exposure.close()
    return found


def moffat(fwhm: float, source: str, error: float, *, guessed: bool = False) -> Psf:
    """A round PSF of which only the width is known.

    Parameters
    ----------
    fwhm : float
        Full width at half maximum, pixels; the pixel is included.
    source : str
        Where the width is from.
    error : float
        Relative 1 sigma error of the width.
    guessed : bool
        Whether it may be of a telescope in space as well as of one on the ground.

    Raises
    ------
    InputError
        If the width is not from 1 to 16 pixels.
    """
    if not WIDTHS[0] <= fwhm <= WIDTHS[1]:
        raise InputError(
            f"The FWHM of a PSF is from {WIDTHS[0]:g} to {WIDTHS[1]:g} pixels, the pixel included; received {fwhm:g}."
        )
    line = (np.arange(SIDE) - SIDE // 2) / 2
    beta, light_error = (BETA_GUESSED, LIGHT_GUESSED_ERROR) if guessed else (BETA, LIGHT_ERROR)
    scale = fwhm / 2 / np.sqrt(2 ** (1 / beta) - 1)
    image = (1 + (line[:, None] ** 2 + line**2) / scale**2) ** -beta
    return replace(Psf.of(image / image.sum(), source, 2, source=source, error=error), light_error=light_error)


def doubts(exposure: Exposure, psf: Psf, stars: Width | None = None) -> str:
    """Why a PSF may not be that of an exposure, in words; empty if nothing speaks against it.

    Its width is compared with those of the instrument and the filter of the header, and with that of the stars.

    Parameters
    ----------
    exposure : Exposure
    psf : Psf
        In the pixels of the exposure.
    stars : Width, optional
        Width of the stars of the exposure; NaN if there are too few.

    Warns
    -----
    SersicnetWarning
        If there is a reason.
    """
    reasons, used = [], f"{psf.fwhm:.2f} pixels wide ({psf.source})"
    (camera, band), scale = observatories.camera_of(exposure.image.header), exposure.pixel_scale.value
    known = observatories.known_widths(camera, band, scale) if camera and np.isfinite(scale) else None
    if known is not None:
        margin = GROUND_MARGIN if known.seeing else SPACE_MARGIN
        if not known.least / margin < psf.fwhm < known.largest * margin:
            reasons.append(f"those of {camera} {band} have {known.least:.2f} to {known.largest:.2f}")
    if stars is not None and np.isfinite(stars.value):
        off = abs(np.log(psf.fwhm / stars.value))
        if off > np.log(OTHER_WIDTH) and off > 3 * stars.error / stars.value:
            reasons.append(f"stars of the image have {stars.value:.2f}")
    if not reasons:
        return ""
    found = " and ".join(reasons)
    warn(f"The PSF used for {exposure.name} is {used}, but {found}. Is it of another image, or the pixel scale wrong?")
    return found
