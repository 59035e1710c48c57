"""Options of an image that are repeated for each of several bands, in the order of the images."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sersicnet.cli.shared import opening
from sersicnet.errors import InputError

if TYPE_CHECKING:
    from sersicnet.image.exposure import Exposure
    from sersicnet.measuring.bands import Band

NONE = "none"
"""Value for an image without the option, as in GALFIT's input files."""


def _number(text: str) -> float | None:
    if text.strip().lower() == NONE:
        return None
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number nor {NONE}.") from None


def _whole(text: str) -> int | None:
    if text.strip().lower() == NONE:
        return None
    if not text.strip().isdigit() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is neither a whole number from 1 nor {NONE}.")
    return int(text)


def _repeated(text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=f"{text} Repeat it for several bands.", show_default=False, **more)


Rms = Annotated[list[str] | None, _repeated("FITS map of the noise (rms).", metavar="PATH")]
Wht = Annotated[list[str] | None, _repeated("FITS map of the inverse variance.", metavar="PATH")]
Var = Annotated[list[str] | None, _repeated("FITS map of the variance.", metavar="PATH")]
Mask = Annotated[list[str] | None, _repeated("FITS image; nonzero pixels are ignored.", metavar="PATH")]
ZeroPoint = Annotated[
    list[float] | None,
    _repeated("AB magnitude of one image unit; read from the header by default.", parser=_number, metavar="FLOAT"),
]
PixelScale = Annotated[
    list[float] | None, _repeated("Arcsec per pixel; read from the WCS by default.", parser=_number, metavar="FLOAT")
]
Hdu = Annotated[
    list[str] | None,
    _repeated("Number or name of the extension; SCI or the first image by default.", metavar="TEXT"),
]
NoiseIncludes = Annotated[
    list[str] | None,
    _repeated(
        "Content of the noise map: sky, the noise of blank pixels; or total, which includes the photon noise of "
        "sources, so that fits do not add it.",
        "--noise",
        metavar="[sky|total]",
    ),
]
Oversampling = Annotated[
    list[int] | None,
    _repeated(
        "Number of PSF pixels along one image pixel; from the header of the PSF, or 1, by default.",
        "--psf-oversampling",
        parser=_whole,
        metavar="INTEGER",
    ),
]
PsfFile = Annotated[
    list[str] | None,
    _repeated(
        "File of the PSF: an image, PSFEx, a grid of PSFs or stamps of stars with positions. By default the PSF is "
        "measured from the stars of the image; with weights of one PSF, --refine takes theirs.",
        metavar="PATH",
    ),
]
PsfFwhm = Annotated[
    list[float] | None,
    _repeated(
        "FWHM of the PSF in pixels, if only its width is known; by default the PSF is measured from the stars of the "
        "image. Only for weights that are shown the PSF.",
        parser=_number,
        metavar="FLOAT",
    ),
]
Gain = Annotated[
    list[float] | None,
    _repeated(
        "Electrons per image unit, for fits and for weights that are shown the photon noise of galaxies.",
        parser=_number,
        metavar="FLOAT",
    ),
]
Validated = Annotated[
    list[str] | None,
    _repeated(
        "File of `sersicnet validate` for the same image and options, whose factors the errors get.", metavar="PATH"
    ),
]

OF_EXPOSURE = ("zero_point", "pixel_scale", "hdu", "rms", "wht", "var", "mask", "noise_includes")
"""Options that images to detect on have, too."""

FOR_ALL = ("hdu", "noise_includes", "psf_oversampling")
"""Options that are given for all images at once, or for each."""


class PerImage:
    """The options of one or several images.

    Parameters
    ----------
    options : mapping
        A list of the values for each option, or None, by name: those of `OF_EXPOSURE`, ``psf``, ``psf_oversampling``,
        ``gain`` and others that belong to a band.
    shared : mapping
        Options of `Exposure.open` that all images have in common.
    """

    def __init__(self, options: Mapping[str, list[Any] | None], **shared: Any) -> None:
        self.given = {name: [None if one == NONE else one for one in values or ()] for name, values in options.items()}
        self._shared = shared

    def single(self) -> dict[str, Any]:
        """The value of each option of the only image, or of all images that are measured one by one."""
        for name, values in self.given.items():
            if len(values) > 1:
                raise InputError(f"`{name}` is given once, or for each of several bands; received {len(values)}.")
        return {name: values[0] if values else None for name, values in self.given.items()}

    def opening(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of `Exposure.open` among those of one image."""
        own = {name: options[name] for name in OF_EXPOSURE}
        own |= {name: Path(own[name]) for name in ("rms", "wht", "var", "mask") if own[name] is not None}
        return opening(**own, **self._shared)

    def of_each(self, bands: int, others: int = 0) -> list[dict[str, Any]]:
        """The options of each band, and of other images, which have those of `OF_EXPOSURE` only."""
        each: list[dict[str, Any]] = [{} for _ in range(bands + others)]
        for name, values in self.given.items():
            most = bands + others if name in OF_EXPOSURE else bands
            if len(values) == 1 and name in FOR_ALL:
                values = values * most
            if len(values) not in (0, bands, most):
                more = f", or {most} with those of other images to detect on" if most > bands else ""
                raise InputError(
                    f"`{name}` is given once for each band, {bands} in all{more}, in their order, and is {NONE} for a "
                    f"band without it; received {len(values)}."
                )
            for k, options in enumerate(each):
                options[name] = values[k] if k < len(values) else None
        return each

    def bands(self, images: list[Path], detect_on: list[Path] | None = None) -> tuple[list[Band], list[Exposure]]:
        """The bands, and the images to detect on, with their options."""
        from sersicnet.image.exposure import Exposure
        from sersicnet.measuring.bands import Band

        if twice := [path.name for path in images if images.count(path) > 1]:
            raise InputError(f"Each band is given once; received {twice[0]} twice.")
        detect_on = detect_on or []
        paths = list(dict.fromkeys([*images, *detect_on]))
        each = self.of_each(len(images), len(paths) - len(images))
        exposures = {
            path: Exposure.open(path, **self.opening(options)) for path, options in zip(paths, each, strict=True)
        }
        bands = [
            Band(
                exposure=exposures[path],
                psf=psf_of(options),
                gain=options["gain"],
                psf_fwhm=options.get("psf_fwhm"),
                validated=options.get("validated"),
            )
            for path, options in zip(images, each, strict=False)
        ]
        return bands, [exposures[path] for path in detect_on]


def psf_of(options: Mapping[str, Any]) -> Any:
    """The PSF of an image from its options; None if no file is given."""
    from sersicnet.image.psffile import read_psf

    return None if options["psf"] is None else read_psf(Path(options["psf"]), options["psf_oversampling"])


def expanded(patterns: Iterable[str]) -> list[Path]:
    """The paths of images; patterns that the shell did not expand are expanded.

    Raises
    ------
    InputError
        If no file matches a pattern.
    """
    paths = []
    for pattern in patterns:
        found = [pattern]
        if ("*" in pattern or "?" in pattern) and "://" not in pattern:
            found = sorted(glob.glob(pattern))  # noqa: PTH207 -- Path.glob takes no absolute patterns
        if not found:
            raise InputError(f"No file matches {pattern}.")
        paths += [Path(path) for path in found]
    return paths
