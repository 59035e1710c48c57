"""Telescopes by name: the ranges of their PSFs, pixel scales, zero points, noise and depths.

Each is a few published numbers. They serve to simulate images that are typical of a telescope, and to guess the PSF of
an image without stars. What an image states about itself is better: its zero point above all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sersicnet.errors import InputError
from sersicnet.image.psf import Psf, full_width
from sersicnet.simulating.optics import Optics

Range = tuple[float, float]

_ARCSEC = 206264.806
_SPREAD = 0.5
"""A pixel of side s widens a PSF as if its FWHM were s times the root of this, in quadrature."""

_NATIVE = 0.03
_USUAL = 2.0
"""Least ratio of two pixel scales that differ; and largest ratio of an image's scale to a usual one for a guess."""


@dataclass(frozen=True)
class Telescope:
    """A camera on a telescope, and the images that are made of its exposures.

    Ranges are of images of the usual surveys; where one number is asked for, it is the middle.

    Attributes
    ----------
    title : str
    source : str
        Where the numbers are from.
    wavelengths : mapping of str to float
        Mean wavelength of each filter, nm.
    pixel_scales : tuple of float
        Of images as they are published, arcsec.
    detector : float
        Side of a pixel of the detector, arcsec.
    resampling : str
        How images of another pixel scale are made, see `sersicnet.simulating.optics.Optics`; and, on the ground, all.
    zero_points : float or mapping of str to float
        AB magnitude of one image unit, of each filter if they differ; NaN for images in MJy/sr.
    electrons : (float, float)
        Noise of a blank pixel of the sum of the exposures, electrons: the larger, the fainter the noise of the photons
        of a galaxy relative to that of the sky.
    correlation : (float, float)
        Autocorrelation of the noise of next neighbours.
    depth : (float, float)
        AB magnitude of 5 sigma in an aperture of 2 arcsec diameter.
    exposures : (int, int)
        Number of exposures in an image.
    diameter : float
        Of the aperture, m; 0 on the ground, where the seeing hides it.
    obscuration, struts, strut_width, hexagons, band
        As of `Optics`.
    wavefront : (float, float)
        Rms of the error of the wavefront, nm.
    seeing : (float, float)
        FWHM of the images, arcsec; 0 in space.
    beta : (float, float)
        Exponent of the Moffat profile of the seeing.
    ellipticity : (float, float)
    blur : (float, float)
        Standard deviation of the jitter and the diffusion of charge, arcsec.
    halo_share, halo_fwhm, halo_beta : (float, float)
        Moffat profile of the light that is scattered further: share, FWHM in arcsec, exponent.
    drop : (float, float)
        Side of a drop of drizzle, in pixels of the detector.
    """

    title: str
    source: str
    wavelengths: Mapping[str, float]
    pixel_scales: tuple[float, ...]
    detector: float
    resampling: str
    zero_points: float | Mapping[str, float]
    electrons: Range
    correlation: Range
    depth: Range
    exposures: tuple[int, int]
    diameter: float = 0.0
    obscuration: float = 0.3
    struts: int = 0
    strut_width: float = 0.02
    hexagons: bool = False
    band: float = 0.25
    wavefront: Range = (0.0, 0.0)
    seeing: Range = (0.0, 0.0)
    beta: Range = (2.0, 3.6)
    ellipticity: Range = (0.0, 0.1)
    blur: Range = (0.0, 0.0)
    halo_share: Range = (0.0, 0.05)
    halo_fwhm: Range = (0.3, 0.6)
    halo_beta: Range = (1.5, 2.5)
    drop: Range = (0.6, 1.0)

    def zero_point(self, band: str | None = None, pixel_scale: float | None = None) -> float:
        """AB magnitude of one image unit, for a filter (the first) and a pixel scale in arcsec (the first).

        Raises
        ------
        InputError
            If the telescope does not have the filter.
        """
        band, scale = self._filter(band), pixel_scale or self.pixel_scales[0]
        value = self.zero_points if isinstance(self.zero_points, float) else self.zero_points[band]
        # MJy/sr times the solid angle of a pixel, relative to 3631 Jy.
        return value if math.isfinite(value) else -2.5 * math.log10(1e6 * (scale / _ARCSEC) ** 2 / 3631)

    def rms_magnitude(self, depth: float, pixel_scale: float) -> float:
        """AB magnitude of the rms of a pixel of white noise that gives a depth as `depth` states it."""
        return depth + 2.5 * math.log10(5 * math.sqrt(math.pi) / pixel_scale)

    def draw(self, rng: np.random.Generator, band: str | None = None, pixel_scale: float | None = None) -> Optics:
        """Draw the PSF of an image of this telescope.

        Parameters
        ----------
        rng : numpy.random.Generator
        band : str, optional
            Filter; any of them by default.
        pixel_scale : float, optional
            Arcsec; any of `pixel_scales` by default.

        Returns
        -------
        Optics

        Raises
        ------
        InputError
            If the telescope does not have the filter.
        """
        band = self._filter(band) if band else str(rng.choice(list(self.wavelengths)))
        scale = pixel_scale or float(rng.choice(self.pixel_scales))
        return self._optics(band, scale, rng)

    def typical(self, band: str | None = None, pixel_scale: float | None = None) -> Optics:
        """The middle of what `draw` draws, by default of the first filter and pixel scale; aberrations are round.

        Raises
        ------
        InputError
            If the telescope does not have the filter.
        """
        return self._optics(self._filter(band), pixel_scale or self.pixel_scales[0], None)

    def extremes(self, band: str | None = None, pixel_scale: float | None = None) -> tuple[Optics, Optics]:
        """The narrowest and the widest of what `draw` draws; as for `typical`."""
        band, scale = self._filter(band), pixel_scale or self.pixel_scales[0]
        return self._optics(band, scale, None, 0.0), self._optics(band, scale, None, 1.0)

    def _filter(self, band: str | None) -> str:
        names = list(self.wavelengths)
        if band is None:
            return names[0]
        if band not in names:
            raise InputError(f"The filters of {self.title} are {', '.join(names)}; received {band!r}.")
        return band

    def _optics(self, band: str, scale: float, rng: np.random.Generator | None, place: float = 0.5) -> Optics:
        """Draw, or without a generator take a place in each range, by default its middle."""

        def pick(limits: Range) -> float:
            return float(rng.uniform(*limits)) if rng else limits[0] + place * (limits[1] - limits[0])

        resampled = self.diameter == 0 or abs(self.detector / scale - 1) > _NATIVE
        resampling = self.resampling if resampled else "none"
        share, pixel = pick(self.halo_share), self.detector / scale
        halo = (share, pick(self.halo_fwhm) / scale, pick(self.halo_beta))
        wavefront: tuple[float, ...] = ()
        diffraction = 0.0
        profiles: tuple[tuple[float, float, float], ...] = (halo,)
        if self.diameter:
            diffraction = self.wavelengths[band] * 1e-9 / self.diameter * _ARCSEC / scale
            # Astigmatism, coma and trefoil at random; without a generator, the round ones alone.
            terms = rng.normal(size=8) if rng else np.array([0.6, 0, 0, 0, 0, 0, 0, 0.8])
            rms = pick(self.wavefront) / self.wavelengths[band]
            wavefront = tuple(float(t) for t in rms * terms / np.sqrt((terms**2).sum()))
        else:
            width = math.sqrt(max((pick(self.seeing) / scale) ** 2 - _SPREAD * pixel**2, 0.25))
            turbulent = rng is not None and rng.random() < 0.3
            profiles = ((1 - share, width, 0.0 if turbulent else pick(self.beta)), halo)
        return Optics(
            diffraction=diffraction,
            band=self.band if self.diameter else 0.0,
            obscuration=self.obscuration,
            struts=self.struts,
            strut_width=self.strut_width if self.struts else 0.0,
            hexagons=self.hexagons,
            angle=float(rng.uniform(0, 360)) if rng else 45.0,
            wavefront=wavefront,
            profiles=profiles,
            ellipticity=pick(self.ellipticity) if rng else 0.0,
            position_angle=float(rng.uniform(0, 180)) if rng else 0.0,
            blur=pick(self.blur) / scale,
            pixel=pixel if resampling != "none" else 1.0,
            resampling=resampling,
            drop=pick(self.drop),
            turn=float(rng.uniform(0, 90)) if rng and resampling != "none" else 0.0,
        )


def _hubble(title: str, **fields: Any) -> Telescope:
    """A camera of HST: 2.4 m, obscured by 0.33, four struts."""
    shared: dict[str, Any] = {
        "resampling": "drizzle",
        "diameter": 2.4,
        "obscuration": 0.33,
        "struts": 4,
        "strut_width": 0.022,
    }
    return Telescope(title, **{**shared, "wavefront": (0.0, 25.0), "ellipticity": (0.0, 0.2), **fields})


def _webb(title: str, **fields: Any) -> Telescope:
    """A channel of NIRCam of JWST: 18 hexagons in a circle of 6.6 m, three struts, wavefront of 30 to 90 nm."""
    shared: dict[str, Any] = {
        "source": "JWST User Documentation (NIRCam); wavefront: Rigby et al. (2023). Blur, halo and wavefront were "
        "fitted to PSFs of mosaics in F150W and F200W.",
        "resampling": "drizzle",
        "zero_points": math.nan,
        "diameter": 6.6,
        "struts": 3,
        "hexagons": True,
        "wavefront": (30.0, 90.0),
        "ellipticity": (0.0, 0.2),
        "blur": (0.0, 0.01),
        "halo_share": (0.04, 0.14),
        "halo_beta": (1.8, 2.2),
        "correlation": (0.1, 0.7),
        "depth": (25.5, 28.0),
        "electrons": (10.0, 100.0),
        "exposures": (4, 40),
    }
    return Telescope(title, **{**shared, **fields})


def _ground(
    title: str, source: str, bands: str, scales: tuple[float, ...], detector: float, zero_point: float, **fields: Any
) -> Telescope:
    """A telescope on the ground; the wavelengths of its filters are those of Sloan, 355 to 1000 nm."""
    sloan = {"u": 355.0, "g": 475.0, "r": 625.0, "i": 770.0, "z": 900.0, "y": 1000.0}
    shared: dict[str, Any] = {
        "resampling": "lanczos3",
        "halo_fwhm": (3.0, 6.0),
        "halo_share": (0.0, 0.04),
        "correlation": (0.0, 0.15),
    }
    named = {band: sloan[band] for band in bands}
    return Telescope(title, source, named, scales, detector, zero_points=zero_point, **{**shared, **fields})


_SPACE = {
    "hst-acs": _hubble(
        "HST ACS/WFC",
        source="ACS Instrument Handbook; zero points of GOODS and COSMOS mosaics. Blur and halo were fitted to a PSF "
        "of F606W and to stars of F814W at 0.06 arcsec.",
        wavelengths={"F606W": 592.0, "F814W": 806.0, "F435W": 433.0, "F475W": 475.0, "F775W": 769.0, "F850LP": 906.0},
        zero_points={
            "F606W": 26.49,
            "F814W": 25.94,
            "F435W": 25.67,
            "F475W": 26.06,
            "F775W": 25.66,
            "F850LP": 24.85,
        },
        pixel_scales=(0.03, 0.05, 0.06),
        detector=0.05,
        blur=(0.012, 0.038),
        halo_share=(0.02, 0.2),
        halo_fwhm=(0.15, 0.3),
        halo_beta=(1.6, 2.0),
        electrons=(5.0, 60.0),
        correlation=(0.0, 0.6),
        depth=(25.5, 28.5),
        exposures=(3, 30),
    ),
    "hst-uvis": _hubble(
        "HST WFC3/UVIS",
        source="WFC3 Instrument Handbook and its zero points of 2012; blur and halo as of ACS.",
        wavelengths={"F606W": 589.0, "F814W": 803.0, "F275W": 271.0, "F336W": 335.0, "F438W": 433.0, "F475W": 477.0},
        zero_points={
            "F606W": 26.07,
            "F814W": 25.10,
            "F275W": 24.13,
            "F336W": 24.67,
            "F438W": 24.82,
            "F475W": 25.68,
        },
        pixel_scales=(0.03, 0.04, 0.06),
        detector=0.0396,
        blur=(0.01, 0.03),
        halo_share=(0.02, 0.2),
        halo_fwhm=(0.15, 0.3),
        halo_beta=(1.6, 2.0),
        electrons=(4.0, 30.0),
        correlation=(0.0, 0.6),
        depth=(24.5, 27.0),
        exposures=(3, 12),
    ),
    "hst-ir": _hubble(
        "HST WFC3/IR",
        source="WFC3 Instrument Handbook and its zero points of 2012; noise of CANDELS and the XDF. Blur and halo were "
        "fitted to the CANDELS hybrid PSF of F160W (van der Wel et al. 2012) and to a star in F105W.",
        wavelengths={"F160W": 1537.0, "F105W": 1055.0, "F110W": 1153.0, "F125W": 1249.0, "F140W": 1392.0},
        zero_points={"F160W": 25.9463, "F105W": 26.2687, "F110W": 26.8223, "F125W": 26.2303, "F140W": 26.4524},
        pixel_scales=(0.06, 0.08, 0.128),
        detector=0.128,
        drop=(0.5, 0.9),
        blur=(0.01, 0.035),
        halo_share=(0.2, 0.34),
        halo_fwhm=(0.2, 0.38),
        halo_beta=(1.5, 1.7),
        electrons=(5.0, 100.0),
        correlation=(0.0, 0.6),
        depth=(25.3, 28.3),
        exposures=(4, 60),
    ),
    "jwst-sw": _webb(
        "JWST NIRCam, short wavelengths",
        wavelengths={"F200W": 1989.0, "F090W": 903.0, "F115W": 1154.0, "F150W": 1501.0},
        pixel_scales=(0.02, 0.03, 0.04, 0.06),
        detector=0.031,
        halo_fwhm=(0.3, 0.6),
    ),
    "jwst-lw": _webb(
        "JWST NIRCam, long wavelengths",
        wavelengths={"F444W": 4404.0, "F277W": 2762.0, "F356W": 3568.0, "F410M": 4082.0},
        pixel_scales=(0.02, 0.03, 0.04, 0.06),
        detector=0.063,
        halo_fwhm=(0.5, 1.2),
    ),
    "euclid-vis": Telescope(
        "Euclid VIS",
        source="Euclid Collaboration: McCracken et al. (2025) for an FWHM of 0.16 arcsec and the depth; catalogues are "
        "in microjansky.",
        wavelengths={"VIS": 715.0},
        zero_points=23.9,
        pixel_scales=(0.1,),
        detector=0.1,
        resampling="lanczos3",
        diameter=1.2,
        obscuration=0.33,
        struts=3,
        strut_width=0.01,
        band=0.45,
        wavefront=(10.0, 40.0),
        blur=(0.025, 0.05),
        ellipticity=(0.0, 0.2),
        halo_share=(0.0, 0.1),
        electrons=(15.0, 60.0),
        correlation=(0.0, 0.3),
        depth=(25.4, 27.5),
        exposures=(3, 40),
    ),
    "euclid-nisp": Telescope(
        "Euclid NISP",
        source="Euclid Collaboration: Jahnke et al. (2025); catalogues are in microjansky, mosaics have pixels of VIS.",
        wavelengths={"H": 1771.0, "Y": 1081.0, "J": 1368.0},
        zero_points=23.9,
        pixel_scales=(0.3, 0.1),
        detector=0.3,
        resampling="lanczos3",
        diameter=1.2,
        obscuration=0.33,
        struts=3,
        strut_width=0.01,
        wavefront=(20.0, 60.0),
        blur=(0.02, 0.08),
        ellipticity=(0.0, 0.2),
        halo_share=(0.0, 0.1),
        halo_fwhm=(0.8, 1.5),
        electrons=(15.0, 60.0),
        correlation=(0.0, 0.8),
        depth=(23.0, 25.5),
        exposures=(3, 40),
    ),
    "roman": Telescope(
        "Roman WFI",
        source="Roman Wide Field Instrument reference information, NASA; images are in MJy/sr.",
        wavelengths={"F158": 1577.0, "F062": 620.0, "F087": 869.0, "F106": 1060.0, "F129": 1293.0, "F184": 1842.0},
        zero_points=math.nan,
        pixel_scales=(0.11, 0.055),
        detector=0.11,
        resampling="drizzle",
        diameter=2.36,
        obscuration=0.31,
        struts=6,
        strut_width=0.03,
        wavefront=(30.0, 90.0),
        blur=(0.01, 0.03),
        ellipticity=(0.0, 0.2),
        halo_share=(0.0, 0.1),
        electrons=(8.0, 60.0),
        correlation=(0.0, 0.6),
        depth=(24.5, 27.0),
        exposures=(3, 20),
    ),
}

_GROUND = {
    "rubin": _ground(
        "Rubin LSSTCam",
        "Ivezic et al. (2019); images are in nanojansky.",
        "rugizy",
        (0.2,),
        0.2,
        31.4,
        seeing=(0.6, 1.0),
        electrons=(25.0, 500.0),
        depth=(23.5, 27.0),
        exposures=(1, 200),
    ),
    "hsc": _ground(
        "Subaru Hyper Suprime-Cam",
        "Aihara et al. (2018, 2022): seeing, and depths in apertures of 2 arcsec.",
        "rgizy",
        (0.168,),
        0.168,
        27.0,
        seeing=(0.45, 0.8),
        electrons=(80.0, 800.0),
        depth=(24.5, 27.5),
        exposures=(4, 100),
    ),
    "des": _ground(
        "DECam (DES)",
        "Abbott et al. (2018, 2021): seeing and depths.",
        "rgizy",
        (0.263,),
        0.263,
        30.0,
        seeing=(0.8, 1.3),
        electrons=(40.0, 250.0),
        depth=(23.0, 25.5),
        exposures=(3, 10),
    ),
    "kids": _ground(
        "VST OmegaCAM (KiDS)",
        "Kuijken et al. (2019): seeing, and depths in apertures of 2 arcsec; a unit of coadds has AB magnitude 0.",
        "rugi",
        (0.2, 0.214),
        0.214,
        0.0,
        seeing=(0.55, 0.9),
        electrons=(30.0, 110.0),
        depth=(23.5, 25.3),
        exposures=(4, 5),
    ),
    "sdss": _ground(
        "SDSS",
        "Abazajian et al. (2009): seeing and depths; images are in nanomaggies.",
        "rugiz",
        (0.396,),
        0.396,
        22.5,
        resampling="none",
        seeing=(0.95, 1.6),
        ellipticity=(0.0, 0.18),
        electrons=(15.0, 50.0),
        correlation=(0.0, 0.02),
        depth=(20.5, 23.0),
        exposures=(1, 1),
    ),
    "legacy": _ground(
        "DESI Legacy Imaging Surveys",
        "Dey et al. (2019): seeing and depths; images are in nanomaggies.",
        "rgz",
        (0.262,),
        0.262,
        22.5,
        seeing=(0.9, 1.6),
        electrons=(25.0, 150.0),
        depth=(22.3, 24.5),
        exposures=(2, 10),
    ),
}

TELESCOPES: dict[str, Telescope] = {**_SPACE, **_GROUND}
"""Cameras by name; `telescopes` finds all of a telescope."""

_INSTRUMENTS = {
    "ACS": ("hst-acs",),
    "WFC3": ("hst-ir", "hst-uvis"),
    "NIRCAM": ("jwst-sw", "jwst-lw"),
    "NISP": ("euclid-nisp",),
    "VIS": ("euclid-vis",),
    "WFI": ("roman",),
    "LSST": ("rubin",),
    "HSC": ("hsc",),
    "HYPER": ("hsc",),
    "DECAM": ("des",),
    "OMEGACAM": ("kids",),
    "SDSS": ("sdss",),
    "90PRIME": ("legacy",),
    "MOSAIC": ("legacy",),
}
"""How INSTRUME begins."""


def telescopes(name: str) -> tuple[Telescope, ...]:
    """The cameras of a telescope: "hst" has three, "hst-ir" is one.

    Raises
    ------
    InputError
        If there is none of this name.
    """
    found = tuple(t for key, t in TELESCOPES.items() if key == name or key.startswith(f"{name}-"))
    if not found:
        known = sorted({key.split("-")[0] for key in TELESCOPES} | set(TELESCOPES))
        raise InputError(f"A telescope is one of {', '.join(known)}; received {name!r}.")
    return found


def cards_of(name: str) -> dict[str, str]:
    """INSTRUME and FILTER of a filter of a camera, ``hst-ir/F160W``, or of a camera with a single one; else empty."""
    key, _, band = name.partition("/")
    instrument = next((beginning for beginning, keys in _INSTRUMENTS.items() if key in keys), "")
    if not instrument:
        return {}
    bands = list(TELESCOPES[key].wavelengths)
    band = band or (bands[0] if len(bands) == 1 else "")
    return {"INSTRUME": instrument, "FILTER": band} if band in bands else {}


USUAL_ERROR, SEEING_ERROR = 0.05, 0.2
"""Relative 1 sigma error of the FWHM of the usual PSF of an instrument, at least in space, and on the ground."""


def camera_of(header: Mapping[str, Any]) -> tuple[str, str]:
    """Instrument and filter of a header; ACS has two wheels, one of which is clear."""
    camera, *wheels = (str(header.get(key, "")).strip() for key in ("INSTRUME", "FILTER", "FILTER1", "FILTER2"))
    return camera, next((band for band in wheels if band and not band.upper().startswith("CLEAR")), "")


def usual_psf(header: Mapping[str, Any], pixel_scale: float) -> tuple[Psf | None, bool]:
    """The usual PSF of the instrument and the filter that a header states, and whether they are in space.

    Parameters
    ----------
    header : mapping
        With INSTRUME and FILTER, or FILTER1 and FILTER2.
    pixel_scale : float
        Arcsec; NaN if it is not known.

    Returns
    -------
    psf : Psf or None
        None if there is no such instrument or filter, see `known_psf`, or if the pixel scale is not known.
    in_space : bool
    """
    camera, band = camera_of(header)
    optics = known_psf(camera, band, pixel_scale) if camera and math.isfinite(pixel_scale) else None
    if optics is None:
        return None, False
    in_space, error = optics.diffraction > 0, SEEING_ERROR
    widths = known_widths(camera, band, pixel_scale)
    if in_space and widths is not None:
        error = max(USUAL_ERROR, float(np.log(widths.largest / widths.least) / np.sqrt(12)))
    source = f"the usual PSF of {camera} {band}"
    return Psf.of(optics.image(2), source, 2, source=source, error=error), in_space


def known_psf(instrument: str, filter: str, pixel_scale: float) -> Optics | None:  # noqa: A002 - as the keyword
    """The best guess of the PSF of an image without stars: see `Telescope.typical`.

    From the ground, the seeing may be far from the middle of its range.

    Parameters
    ----------
    instrument, filter : str
        As the header has them in INSTRUME (or SDSS, which has no such card) and FILTER.
    pixel_scale : float
        Arcsec.

    Returns
    -------
    Optics or None
        None if the instrument or the filter is not known, or the pixel scale is not within a factor of 2 of a usual
        one.
    """
    found = _camera(instrument, filter, pixel_scale)
    return found[0].typical(found[1], pixel_scale) if found else None


class Widths(NamedTuple):
    """FWHM of the PSFs of an instrument, pixels of an image.

    Attributes
    ----------
    least, largest : float
        In the usual images, see `Telescope.extremes`.
    seeing : bool
        Whether they are those of the seeing, which varies more from image to image.
    """

    least: float
    largest: float
    seeing: bool


def known_widths(instrument: str, filter: str, pixel_scale: float) -> Widths | None:  # noqa: A002
    """The widths of the PSFs of an instrument; parameters as for `known_psf`, and None as there."""
    found = _camera(instrument, filter, pixel_scale)
    if found is None:
        return None
    telescope, band = found
    least, largest = (full_width(optics.image(2), 2) for optics in telescope.extremes(band, pixel_scale))
    return Widths(least, largest, telescope.diameter == 0)


def _camera(instrument: str, filter: str, pixel_scale: float) -> tuple[Telescope, str] | None:  # noqa: A002
    """The camera and the filter that a header names."""
    name = instrument.strip().upper()
    words = re.split(r"[-_.\s]+", filter.upper())
    words += [word.rstrip("2") for word in words]  # the second filters of HSC
    for beginning, keys in _INSTRUMENTS.items():
        if not name.startswith(beginning):
            continue
        for telescope in (TELESCOPES[key] for key in keys):
            usual = any(1 / _USUAL <= pixel_scale / scale <= _USUAL for scale in telescope.pixel_scales)
            by_name = {band.upper(): band for band in telescope.wavelengths}
            bands = [by_name[word] for word in words if word in by_name]
            if len(telescope.wavelengths) == 1:
                bands = list(telescope.wavelengths)
            if usual and bands:
                return telescope, bands[0]
    return None
