"""The main job: an image and weights in, a flagged catalogue out."""

from __future__ import annotations

import datetime
import os
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import astropy
import numpy as np
import photutils
from astropy import units
from astropy.io import fits
from astropy.table import Column, QTable, Table

import sersicnet
from sersicnet import instrument, mosaic, weights
from sersicnet.errors import InputError, SersicnetWarning, check_output
from sersicnet.fit import Fitter, Noise, Status
from sersicnet.schema import (
    COLUMN,
    COLUMNS,
    CROWDED_LIMIT,
    DEPTH_TOLERANCE,
    LARGE_LIMIT,
    LOW_SNR_LIMIT,
    MASKED_LIMIT,
    SCALE_TOLERANCE,
    STAMP_SIZE,
    TARGET_NAMES,
    Flag,
    absolute_magnitude_of_rms,
)

FORMATS = {".fits": "fits", ".fit": "fits", ".ecsv": "ascii.ecsv", ".csv": "ascii.csv", ".parquet": "parquet"}
STAMPS_AT_ONCE = 512
"""Stamps cut before they go through the network: 32 MB."""

Report = Callable[[str, int, int], None]


def measure(
    image: str | Path,
    output: str | Path | None = None,
    *,
    hdu: int | str | None = None,
    zero_point: float | None = None,
    pixel_scale: float | None = None,
    rms: str | Path | None = None,
    wht: str | Path | None = None,
    mask: str | Path | None = None,
    positions: str | Path | Table | None = None,
    weights_name: str | Path = weights.DEFAULT,
    refine: bool = False,
    psf: str | Path | None = None,
    gain: float | None = None,
    overwrite: bool = False,
    command: str = "",
    report: Report = lambda stage, done, total: None,
) -> QTable:
    """Measure the galaxies of an image.

    Parameters
    ----------
    image : str or Path
        FITS image in any linear unit.
    output : str or Path, optional
        Catalogue to write: .fits, .ecsv, .csv or .parquet. None writes nothing.
    hdu : int or str, optional
        Extension of `image`; see `sersicnet.mosaic.read_image`.
    zero_point, pixel_scale : float, optional
        AB magnitude of one image unit, and arcsec per pixel; from the header
        by default.
    rms, wht : str or Path, optional
        FITS map of the noise, or of its inverse variance; only one of them. In a
        file of several extensions, RMS or ERR is taken, WHT or IVM, else the
        first image; ``file.fits[NAME]`` chooses another. Its
        scale is fitted to the scatter of blank pixels. Pixels that are not
        finite or not positive have no data.
    mask : str or Path, optional
        FITS image; pixels that are not zero are ignored.
    positions : str, Path or Table, optional
        Table with columns x and y (zero-based) or ra and dec (degrees, unless
        they have another unit): measure these and detect nothing. One row each,
        in their order. Where it has both, and the image a WCS, the sky counts.
    weights_name : str or Path
        Name of shipped weights, or a weights directory.
    refine : bool
        Whether to fit a Sersic profile to each source with snr of at least 10,
        starting from the network's answer; see `sersicnet.fit`.
    psf : str or Path, optional
        FITS image of the effective PSF for the fits, an odd number of pixels a
        side; that of the weights' domain by default.
    gain : float, optional
        Electrons per image unit, for the Poisson noise of the sources in the
        fits; as in the weights' domain by default.
    overwrite : bool
        Whether to replace `output`.
    command : str
        The command line, for the catalogue's header.
    report : callable
        Receives the stage, and how many of how many sources it has done.

    Returns
    -------
    QTable
        Columns of `sersicnet.schema.COLUMNS`, NaN for what could not be
        measured. Without a WCS there are no ``ra`` and ``dec``, and without a
        pixel scale no ``r_eff``.

    Raises
    ------
    InputError, WeightsError
        If an input cannot be used; nothing is written then.

    Warns
    -----
    SersicnetWarning
        When nothing is detected, there is no WCS, or the image is outside of
        what the weights were trained on.
    """
    if output is not None:
        output = check_output(output, overwrite)
        if output.suffix.lower() not in FORMATS:
            raise InputError(f"A catalogue ends in {', '.join(FORMATS)}; received {output.name}.")
    if gain is not None and not (np.isfinite(gain) and gain > 0):
        raise InputError(f"A gain is a positive number of electrons per image unit; received {gain}.")
    if not refine and (psf is not None or gain is not None):
        raise InputError("--psf and --gain are for fits: give --refine with them.")
    if rms is not None and wht is not None:
        raise InputError("Give either --rms or --wht; received both.")
    network = weights.load(weights_name)
    report("reading", 0, 0)
    frame = mosaic.read_image(image, hdu)
    zero = instrument.zero_point(frame.header, zero_point)
    scale = instrument.pixel_scale(frame.scales, pixel_scale)
    bad = frame.without_data()
    noise_map = None
    if rms is not None or wht is not None:
        noise_map, no_data = _noise_map(rms, wht, frame.data.shape)
        bad |= no_data
    if mask is not None:
        bad |= mosaic.read_image(mask, prefer=("MASK", "DQ"), shape=frame.data.shape).data != 0
    if bad.all():
        raise InputError(f"{image} has no pixel left that is finite, not masked and has noise.")
    given = None if positions is None else _positions(positions, frame)
    if frame.wcs is None:
        _warn(f"{frame.name} has no celestial WCS: the catalogue has pixel columns only.")
    report("detecting", 0, 0)
    sky, found = mosaic.Detector()(frame.data, bad, noise_map)
    if given is None:
        x, y, source = found.x, found.y, np.arange(len(found))
        if not len(found):
            _warn(
                f"No source was detected in {frame.name}: the catalogue has no rows. Is the image background-limited?"
            )
    else:
        x, y = given
        source = _source_at(found.segmentation, x, y)
    fitter, psf_source = _fitter(network, psf, gain, zero.value, sky) if refine else (None, "")
    values = _measured(frame, bad, sky, found, x, y, source, network, fitter, zero.value, report)
    table = _table(frame, x, y, values, network, zero, scale, refined=refine)
    table.meta.update(_provenance(frame, network, zero, scale, sky, command))
    if fitter is not None:
        table.meta["PSF"], table.meta["GAIN"] = psf_source, fitter.noise.gain
    if output is not None:
        write(table, output)
    return table


def _noise_map(rms: str | Path | None, wht: str | Path | None, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    if rms is not None:
        values = mosaic.read_image(rms, prefer=("RMS", "ERR"), shape=shape).data
    elif wht is not None:
        values = mosaic.read_image(wht, prefer=("WHT", "IVM"), shape=shape).data
    no_data = ~(np.isfinite(values) & (values > 0))
    if no_data.all():
        raise InputError(f"{rms or wht} has no positive pixel. A noise map is positive where there is data.")
    values = np.where(no_data, np.median(values[~no_data]), values)
    return (values if rms is not None else 1 / np.sqrt(values)), no_data


def _positions(positions: str | Path | Table, frame: mosaic.Image) -> tuple[np.ndarray, np.ndarray]:
    table = positions if isinstance(positions, Table) else read_table(positions)
    names = set(table.colnames)
    if {"ra", "dec"} <= names and (frame.wcs is not None or not {"x", "y"} <= names):
        return frame.pixels(_coordinate(table["ra"], "deg"), _coordinate(table["dec"], "deg"))
    if {"x", "y"} <= names:
        return _coordinate(table["x"]), _coordinate(table["y"])
    raise InputError(
        f"A table of positions has columns x and y, or ra and dec; received {', '.join(table.colnames) or 'none'}."
    )


def _coordinate(column: Column, unit: str | None = None) -> np.ndarray:
    """Values of a column, in `unit` if it has another one; NaN where masked."""
    try:
        if unit is not None and column.unit is not None:
            column = units.Quantity(column).to(unit)
        values: np.ma.MaskedArray = np.ma.asarray(getattr(column, "value", column), dtype=float)
    except (TypeError, ValueError, units.UnitConversionError) as error:
        raise InputError(f"Column {column.name} of --positions must hold numbers: {error}.") from error
    return np.ma.filled(values, np.nan)


def read_table(path: str | Path) -> Table:
    """Read a table by its ending (.fits, .ecsv, .csv, .parquet), with clear errors."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"A table is a file; there is none at {path}.")
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"A table ends in {', '.join(FORMATS)}; received {path.name}.")
    try:
        return Table.read(path, format=kind)
    except Exception as error:  # every reader has exceptions of its own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{path} cannot be read as {kind}: {reason[0]}") from error


def _source_at(segmentation: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Index of the detection under each position, -1 for none."""
    inside = np.isfinite(x) & np.isfinite(y)
    column, row = np.rint(np.where(inside, x, -1)).astype(int), np.rint(np.where(inside, y, -1)).astype(int)
    inside &= (column >= 0) & (column < segmentation.shape[1]) & (row >= 0) & (row < segmentation.shape[0])
    out = np.full(len(x), -1)
    out[inside] = segmentation[row[inside], column[inside]] - 1
    return out


class _Measured(NamedTuple):
    """What stamps have told, one row a source; magnitudes are AB."""

    targets: np.ndarray
    errors: np.ndarray
    theta: np.ndarray
    chi2: np.ndarray
    rms: np.ndarray
    snr: np.ndarray
    flags: np.ndarray


def _measured(
    frame: mosaic.Image,
    bad: np.ndarray,
    sky: mosaic.Sky,
    found: mosaic.Detections,
    x: np.ndarray,
    y: np.ndarray,
    source: np.ndarray,
    network: weights.Weights,
    fitter: Fitter | None,
    zero_point: float,
    report: Report,
) -> _Measured:
    """Cut the stamps, run the network, and the fits where they are asked for."""
    n = len(x)
    detected = source >= 0

    def of_source(values: np.ndarray) -> np.ndarray:
        return np.where(detected, values[np.where(detected, source, 0)], np.nan) if len(values) else np.full(n, np.nan)

    out = _Measured(
        np.full((n, len(TARGET_NAMES)), np.nan),
        np.full((n, len(TARGET_NAMES)), np.nan),
        of_source(found.theta),
        np.full(n, np.nan),
        np.full(n, np.nan),
        of_source(found.flux) / (sky.correlation * np.sqrt(of_source(found.area))),
        np.zeros(n, int),
    )
    out.flags[of_source(found.blended.astype(float)) == 1] |= Flag.BLENDED
    claimed = found.claimed()
    for first in range(0, n, STAMPS_AT_ONCE):
        report("measuring", first, n)
        rows = slice(first, min(first + STAMPS_AT_ONCE, n))
        labels = np.where(detected[rows], source[rows] + 1, 0)
        stamps = mosaic.cut(frame.data, bad, sky, x[rows], y[rows], claimed, labels)
        stamps.pixels[stamps.empty] = np.nan
        out.targets[rows], errors = network.predict(stamps.pixels)
        if errors is not None:
            out.errors[rows] = errors
        out.rms[rows] = stamps.rms
        out.snr[rows] /= stamps.rms
        out.targets[rows, 0] += absolute_magnitude_of_rms(zero_point, stamps.rms)
        out.flags[rows] |= Flag.NO_DATA * stamps.empty
        out.flags[rows] |= Flag.EDGE * stamps.edge
        out.flags[rows] |= Flag.MASKED * (stamps.unusable > MASKED_LIMIT)
        out.flags[rows] |= Flag.CROWDED * (stamps.neighbours > CROWDED_LIMIT)
        with np.errstate(invalid="ignore"):
            out.flags[rows] |= Flag.LOW_SNR * ~(out.snr[rows] >= LOW_SNR_LIMIT)
        if fitter is not None:
            # Threads, for the fits spend their time in FFTs and array arithmetic.
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                fits = pool.map(partial(_refine, out, fitter, stamps, first, zero_point), range(len(stamps.pixels)))
                for done, _ in enumerate(fits, start=first + 1):
                    report("refining", done, n)
    report("measuring", n, n)
    with np.errstate(invalid="ignore"):
        out.flags[out.targets[:, 1] > LARGE_LIMIT] |= Flag.LARGE
    return out


def _refine(out: _Measured, fitter: Fitter, stamps: mosaic.Stamps, first: int, zero_point: float, i: int) -> None:
    """Replace the network's answer for a stamp by that of a fit that starts there, if it converges."""
    row = first + i
    mag, r_eff, n, e = out.targets[row]
    if out.flags[row] & Flag.LOW_SNR or not np.isfinite(mag):
        return
    flux = 10 ** (-0.4 * (mag - zero_point))
    start = np.array([stamps.x[i], stamps.y[i], flux, r_eff, n, 1 - e, np.nan_to_num(out.theta[row])])
    rms = stamps.rms[i : i + 1]
    fits = fitter(stamps.pixels[i : i + 1] * np.float32(rms[0]), rms, start[None], stamps.replaced[i : i + 1])
    errors = np.sqrt(np.diagonal(fits.covariance[0]))
    if fits.status[0] != Status.CONVERGED or not np.isfinite(errors).all():
        out.flags[row] |= Flag.NOT_REFINED
        return
    _, _, flux, r_eff, n, q, theta = fits.parameters[0]
    out.targets[row] = zero_point - 2.5 * np.log10(flux), r_eff, n, 1 - q
    out.errors[row] = 2.5 / np.log(10) * errors[2] / flux, errors[3], errors[4], errors[5]
    out.theta[row], out.chi2[row] = theta, fits.chi2[0]


def _fitter(
    network: weights.Weights, psf: str | Path | None, gain: float | None, zero_point: float, sky: mosaic.Sky
) -> tuple[Fitter, str]:
    """The fitter for an image, and where its PSF came from."""
    trained_on = network.card["data"].get("config", {}).get("instrument")
    if trained_on is None and (psf is None or gain is None):
        raise InputError(
            f"The card of {network.name} tells no PSF and no exposure: give --psf and --gain with --refine."
        )
    if gain is None:
        # As deep as the training images: their electrons a second, in units of this image.
        gain = trained_on["exposure"] * 10 ** (-0.4 * (zero_point - trained_on["zero_point"]))
    if psf is not None:
        image, source = mosaic.read_image(psf, prefer=("PSF",), least=1).data, str(psf)
    else:
        from sersicnet.simulate import effective_psf

        image = effective_psf(instrument.Instrument(**{**trained_on, "pixels": tuple(trained_on["pixels"])}))
        source = f"of the weights: {trained_on['name']}"
        _warn(f"No --psf was given: fits use that of the weights' domain, {trained_on['name']}.")
    return Fitter(image, Noise(sky.autocorrelation, gain), STAMP_SIZE), source


def _table(
    frame: mosaic.Image,
    x: np.ndarray,
    y: np.ndarray,
    values: _Measured,
    network: weights.Weights,
    zero: instrument.Reading,
    scale: instrument.Reading,
    *,
    refined: bool,
) -> QTable:
    """Columns with units and descriptions, and the flags that need the whole catalogue."""
    n = len(x)
    targets, flags = values.targets, values.flags
    ranges = network.card["domain"]["ranges"]
    low, high = (np.array([ranges[name][i] for name in TARGET_NAMES]) for i in (0, 1))
    outside = np.isfinite(targets).all(axis=1) & ((targets < low) | (targets > high)).any(axis=1)
    flags[outside] |= Flag.OUT_OF_RANGE
    flags[_outside_domain(network, zero, scale, values.rms)] |= Flag.OUT_OF_DOMAIN
    columns: dict[str, np.ndarray] = {"id": np.arange(1, n + 1), "x": x, "y": y}
    if frame.wcs is not None:
        columns["ra"], columns["dec"] = frame.sky(x, y) if n else (np.zeros(0), np.zeros(0))
    for i, name in enumerate(TARGET_NAMES):
        columns[name] = targets[:, i]
        if network.card["errors"] or refined:
            columns[f"{name}_err"] = values.errors[:, i]
    if np.isfinite(scale.value):
        for name in ("r_eff", "r_eff_err"):
            pixels = columns.get(name.replace("r_eff", "r_eff_pix"))
            if pixels is not None:
                columns[name] = pixels * scale.value
    columns.update(theta=values.theta, snr=values.snr, flags=flags)
    if refined:
        columns["chi2"] = values.chi2
    table = QTable()
    for column in COLUMNS:
        if column.name in columns:
            content = np.asarray(columns[column.name]).astype(column.dtype)
            table[column.name] = content * units.Unit(column.unit) if column.unit else content
            table[column.name].info.description = column.description
    return table


def _outside_domain(
    network: weights.Weights, zero: instrument.Reading, scale: instrument.Reading, rms: np.ndarray
) -> np.ndarray:
    """Which galaxies lie outside of the weights' domain; warns when all do."""
    domain = network.card["domain"]
    trained_scale = domain["pixel_scale"]
    if np.isfinite(scale.value) and abs(scale.value / trained_scale - 1) > SCALE_TOLERANCE:
        _warn(
            f"The image has {scale.value:.4f} arcsec per pixel, {network.name} was trained at {trained_scale}: "
            "every row is flagged."
        )
        return np.ones(len(rms), bool)
    depth = rms * 10 ** (0.4 * (domain["zero_point"] - zero.value))
    with np.errstate(invalid="ignore"):
        outside = (depth < domain["rms"][0] / DEPTH_TOLERANCE) | (depth > domain["rms"][1] * DEPTH_TOLERANCE)
    if len(outside) and outside.mean() > 0.5:
        _warn(
            f"The noise of the image is {np.nanmedian(depth):.2g} at zero point {domain['zero_point']}, "
            f"{network.name} was trained at {domain['rms'][0]:g} to {domain['rms'][1]:g}: rows are flagged."
        )
    return outside


def _provenance(
    frame: mosaic.Image,
    network: weights.Weights,
    zero: instrument.Reading,
    scale: instrument.Reading,
    sky: mosaic.Sky,
    command: str,
) -> dict[str, str | float]:
    """What the catalogue was made from, as FITS cards of at most eight characters."""
    meta: dict[str, str | float] = {
        "IMAGE": frame.name,
        "DATE": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").removesuffix("+00:00"),
        "MAGSYS": "AB",
        "ZEROPT": zero.value,
        "ZPSOURCE": zero.source,
        "PIXSRC": scale.source,
        "SKYRMS": float(np.nanmedian(sky.rms)),
        "NOISECOR": sky.correlation,
        "WEIGHTS": network.name,
        "WTSHA256": network.sha256,
        "STAMPSIZ": STAMP_SIZE,
        "SNETVER": sersicnet.__version__,
        "PHOTUTIL": photutils.__version__,
        "ASTROPY": astropy.__version__,
    }
    if np.isfinite(scale.value):
        meta["PIXSCALE"] = scale.value
    if np.isfinite(sky.map_factor):
        meta["MAPFACT"] = sky.map_factor
    if command:
        meta["COMMAND"] = command
    return meta


_CARD_COMMENTS = {
    "IMAGE": "image measured",
    "DATE": "UTC date of this catalogue",
    "MAGSYS": "magnitude system",
    "ZEROPT": "magnitude of one image unit",
    "ZPSOURCE": "where ZEROPT was read",
    "PIXSRC": "where PIXSCALE was read",
    "PIXSCALE": "arcsec per pixel",
    "SKYRMS": "median noise of a blank pixel, image units",
    "NOISECOR": "noise of large apertures over white noise",
    "MAPFACT": "factor on the noise map given",
    "WEIGHTS": "network weights",
    "WTSHA256": "SHA-256 of the network",
    "SNETVER": "version of sersicnet",
    "PHOTUTIL": "version of photutils",
    "ASTROPY": "version of astropy",
    "STAMPSIZ": "side of a stamp in pixels",
    "COMMAND": "command line",
    "PSF": "PSF of the fits",
    "GAIN": "electrons per image unit, in the fits",
}


def write(table: QTable, path: Path) -> None:
    """Write a catalogue; it appears whole or not at all.

    FITS gets units, descriptions (``TCOMMn``) and UCDs (``TUCDn``), of which
    astropy writes only the first.
    """
    kind = FORMATS[path.suffix.lower()]
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        if kind == "fits":
            _hdu(table).writeto(partial, overwrite=True, checksum=True)
        else:
            table.write(partial, format=kind, overwrite=True)
        partial.chmod(0o644)
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path} could not be written: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)


def _hdu(table: QTable) -> fits.HDUList:
    unit = fits.BinTableHDU.from_columns(
        [
            fits.Column(
                name=name,
                format={"i4": "J", "f4": "E", "f8": "D"}[COLUMN[name].dtype],
                unit=COLUMN[name].unit or None,
                array=np.asarray(getattr(table[name], "value", table[name])),
            )
            for name in table.colnames
        ],
        name="CATALOG",
    )
    for i, name in enumerate(table.colnames, start=1):
        unit.header.set(f"TCOMM{i}", COLUMN[name].description, after=f"TFORM{i}")
        unit.header.set(f"TUCD{i}", COLUMN[name].ucd, after=f"TCOMM{i}")
    for key, value in table.meta.items():
        if isinstance(value, str):  # headers hold nothing but ASCII
            value = value.encode("ascii", "backslashreplace").decode()
        if key == "COMMAND":
            unit.header.add_history(value)
        else:
            unit.header[key] = (value, _CARD_COMMENTS[key]) if len(str(value)) < 40 else value
    return fits.HDUList([fits.PrimaryHDU(), unit])


def _warn(message: str) -> None:
    warnings.warn(message, SersicnetWarning, stacklevel=3)
