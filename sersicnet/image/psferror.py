"""A PSF as it may be within its errors: of another width, or with other wings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sersicnet.image.psf import Psf, between

_WINGS, _SLOPE = 3.0, 3.0
"""Radius near which wings that are added are brightest, FWHM, and the power of the radius that they fall with."""

_LEAST_REACH = 4.0
"""A PSF that ends nearer to its centre than so many FWHM has no wings that could differ."""


def stretched(psf: Psf, by: float) -> Psf:
    """A constant PSF made wider by a factor."""
    if by == 1:
        return psf
    middle = len(psf.image) // 2
    places = middle + (np.arange(len(psf.image)) - middle) / by
    image = between(psf.image, *np.meshgrid(places, places, indexing="ij"))
    outside = (places < 0) | (places > len(psf.image) - 1)
    image[outside] = image[:, outside] = 0
    return replace(psf, sha256=f"{psf.sha256} x {by}", image=image / image.sum())


def with_light(psf: Psf, by: float) -> Psf:
    """A constant PSF whose share of light within two FWHM is `by` times that of another; its wings make up for it.

    The PSF is a mixture of the other one and of wings, so that a change is linear in `by`: with more than 1, wings are
    subtracted, and may become negative. A PSF that ends within `_LEAST_REACH` stays as it is.
    """
    offsets = (np.arange(len(psf.image)) - len(psf.image) // 2) / (psf.oversampling * psf.fwhm)
    if by == 1 or offsets[-1] < _LEAST_REACH:
        return psf
    square = offsets[:, None] ** 2 + offsets**2
    wings = square / (square + _WINGS**2) ** (1 + _SLOPE / 2)
    wings /= wings.sum()
    near = square < 2**2
    light, of_wings = psf.image[near].sum() / psf.image.sum(), wings[near].sum()
    part = (1 - by) * light / (light - of_wings)
    image = (1 - part) * psf.image / psf.image.sum() + part * wings
    return replace(psf, sha256=f"{psf.sha256} with {by} of its light", image=image)
