"""What a network is shown beside the stamps of real galaxies: the PSF and the noise of their image."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sersicnet.errors import DatasetError
from sersicnet.image import detect
from sersicnet.image.exposure import Exposure
from sersicnet.image.fewstars import confirmed
from sersicnet.image.pixels import correlation
from sersicnet.image.psf import Psf
from sersicnet.image.psffile import read_psf
from sersicnet.image.sky import estimate_sky
from sersicnet.image.starpsf import find_psf
from sersicnet.image.views import psf_views
from sersicnet.schema import noise_numbers
from sersicnet.simulating.observatories import usual_psf


class Shown:
    """PSF and noise of one image.

    Parameters
    ----------
    path : str or Path
        The image.
    zero_point : float
        AB magnitude of one image unit.

    Attributes
    ----------
    noise : ndarray, float32, (3,)
        See `sersicnet.schema.noise_numbers`; the photon noise of galaxies is not known.
    """

    def __init__(self, path: str | Path, zero_point: float) -> None:
        self.exposure = Exposure.open(path, zero_point=zero_point)
        self._detector = detect.Detector()
        self._mesh = estimate_sky(self.exposure, self._detector.threshold)
        self.noise = noise_numbers(correlation(self._mesh.autocorrelation), np.nan)

    @functools.cached_property
    def _stars(self) -> Psf:
        found = find_psf(self.exposure, self._mesh, self._detector, self.exposure.saturation)
        if found.psf is None:
            usual, in_space = usual_psf(self.exposure.image.header, self.exposure.pixel_scale.value)
            if usual is not None:
                found = confirmed(found, usual)
            if found.psf is None and usual is not None and in_space:
                return usual
        if found.psf is None:
            raise DatasetError(
                f"{self.exposure.name} shows no PSF ({found.reason}), which the network is shown: name a file of the "
                "PSF in a column psf of the labels."
            )
        return found.psf

    def views(self, x: np.ndarray, y: np.ndarray, files: Sequence[Path | None] = ()) -> np.ndarray:
        """What the network is shown of the PSF at some positions.

        Parameters
        ----------
        x, y : ndarray, float, (N,)
            Zero-based pixels.
        files : sequence of Path or None
            A file of the PSF for each of them; without one, the PSF is that of the image's stars, or of the
            instrument in space that the header states.

        Returns
        -------
        ndarray, float32, (N, 4, 32, 32)

        Raises
        ------
        DatasetError
            If there is no file, the image shows too few stars, and the header states no such instrument.
        InputError
            If a file is no PSF of the image.
        """
        own: dict[Path | None, list[int]] = {}
        for i in range(len(x)):
            own.setdefault(files[i] if len(files) else None, []).append(i)
        out = np.empty((len(x), *psf_views(np.ones((3, 3))).shape), np.float32)
        for file, rows in own.items():
            scale = self.exposure.pixel_scale.value
            psf = self._stars if file is None else read_psf(file).on(self.exposure.image, scale)
            labels, psfs = psf.cells(x[rows], y[rows])
            out[rows] = np.array([psf_views(one.image, one.oversampling) for one in psfs])[labels]
        return out
