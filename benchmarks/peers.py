"""Fit one set of stamps with one tool: the worker of ``benchmarks/fit.py``.

``python benchmarks/peers.py TOOL INPUT.npz OUTPUT.npz``, with TOOL one of the keys
of `TOOLS`. It runs in whichever Python has the tool, needs nothing of sersicnet
but for the tool of that name, and does not look at the truth.

The input holds ``stamps`` (N, S, S); ``rms`` of a blank pixel; ``gain``, image units
to detected electrons; ``correlation``, the autocorrelation of the noise; ``psf``, an
odd square image of unit sum; and ``start`` (N, 7): x, y (zero-based pixels), flux,
effective radius along the major axis, Sersic index, axis ratio, angle in degrees from
+x towards +y; and ``ranges`` (4, 2) of flux, radius, index and ellipticity, for the
fits with a prior. There may be ``masks`` (N, S, S) of pixels that pyimfit leaves
out. The output holds ``parameters`` in the same order, NaN where a tool gave
none, ``failed`` (N,), what else the tool tells, and the seconds that it took.
"""

import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy import special

Q_LEAST = 0.02


def sersicnet(task, sky=1e-3, prior=None):
    """Ours: the noise whitened, Poisson noise from the model, the sky known to be 0 as for the others."""
    from sersicnet.engine.fit import Fitter, Noise, Status

    noise = Noise(task["correlation"], float(task["gain"]), sky)
    fitter = Fitter(task["psf"], noise, task["stamps"].shape[1], prior=prior)
    fits = fitter(task["stamps"], np.full(len(task["stamps"]), float(task["rms"])), task["start"])
    return {**fits._asdict(), "failed": fits.status != Status.CONVERGED}


def sersicnet_prior(task):
    """Ours, and the ranges known from which the galaxies were drawn."""
    from sersicnet.engine.prior import Prior

    (faint, bright), r_eff, n, e = task["ranges"]
    return sersicnet(task, prior=Prior.uniform((faint, bright), r_eff, n, (1 - e[1], 1 - e[0])))


def sersicnet_free_sky(task):
    """Ours, and nothing known of the sky."""
    return sersicnet(task, sky=np.inf)


def pyimfit(task):
    """Levenberg-Marquardt with an error map and the sky fixed at 0."""
    import pyimfit

    parameters, failed, iterations = [], [], []
    masks = task.get("masks", [None] * len(task["stamps"]))
    for stamp, sigma, start, mask in zip(task["stamps"], _sigma_maps(task), task["start"], masks, strict=True):
        x, y, flux, r_eff, n, q, theta = start
        sersic = pyimfit.make_imfit_function("Sersic")
        sersic.PA.setValue(theta - 90, [theta - 360, theta + 180])
        sersic.ell.setValue(1 - q, [0, 1 - Q_LEAST])
        sersic.n.setValue(n, [0.2, 8])
        sersic.I_e.setValue(flux / _light_per_intensity(r_eff, n, q), [0, 1e6])
        sersic.r_e.setValue(r_eff, [0.1, 300])
        model = pyimfit.SimpleModelDescription()
        model.x0.setValue(x + 1, [x - 9, x + 11])
        model.y0.setValue(y + 1, [y - 9, y + 11])
        model.addFunction(sersic)
        fit = pyimfit.Imfit(model, psf=task["psf"], maxThreads=1)
        fit.loadData(stamp.astype(float), error=sigma, mask=mask)
        fit.doFit("LM")
        x, y, angle, ell, n, intensity, r_eff = fit.getRawParameters()
        flux = intensity * _light_per_intensity(r_eff, n, 1 - ell)
        parameters.append([x - 1, y - 1, flux, r_eff, n, 1 - ell, angle + 90])
        failed.append(not fit.fitConverged)
        iterations.append(fit.nIter)
    return {"parameters": parameters, "failed": failed, "iterations": iterations}


def petrofit(task):
    """Astropy's Sersic2D, convolved with the PSF; the sky fixed at 0; centre oversampled as its guide does."""
    import petrofit
    from astropy.modeling.models import Sersic2D

    parameters, failed = [], []
    for stamp, sigma, start in zip(task["stamps"], _sigma_maps(task), task["start"], strict=True):
        x, y, flux, r_eff, n, q, theta = start
        bounds = petrofit.get_default_sersic_bounds({"x_0": (x - 10, x + 10), "y_0": (y - 10, y + 10)})
        bounds.update(n=(0.2, 8), r_eff=(0.1, 300), ellip=(0, 1 - Q_LEAST))
        sersic = Sersic2D(
            flux / _light_per_intensity(r_eff, n, q), r_eff, n, x, y, 1 - q, np.radians(theta), bounds=bounds
        )
        model = petrofit.PSFConvolvedModel2D(sersic, psf=task["psf"], oversample=("x_0", "y_0", 20, 5))
        model.fixed["psf_pa"] = True
        try:
            fitted, _ = petrofit.fit_model(stamp.astype(float), model, weights=1 / sigma)
        except ValueError:
            parameters.append([np.nan] * 7)
        else:
            intensity, r_eff, n, x, y, ell, theta = fitted.parameters[:7]
            flux = intensity * _light_per_intensity(r_eff, n, 1 - ell)
            parameters.append([x, y, flux, r_eff, n, 1 - ell, np.degrees(theta)])
        failed.append(not np.isfinite(parameters[-1]).all())
    return {"parameters": parameters, "failed": failed}


def source_extractor(task):
    """Its SPHEROID model on its own detection next to the centre; background 0; Poisson noise by its gain.

    All stamps are extensions of one file, so that it starts once. It finds its own
    starting values.
    """
    from astropy.io import fits

    stamps = task["stamps"].astype(np.float32)
    columns = ["EXT_NUMBER", "X_IMAGE", "Y_IMAGE", "XMODEL_IMAGE", "YMODEL_IMAGE", "FLUX_SPHEROID"]
    columns += ["SPHEROID_" + name for name in ("REFF_IMAGE", "SERSICN", "ASPECT_IMAGE", "THETA_IMAGE")]
    columns += ["NITER_MODEL", "FLAGS_MODEL"]
    smoothing = np.exp(-(np.hypot(*np.mgrid[-2:3, -2:3]) ** 2) / (2 * 1.27**2))
    settings = {
        "CATALOG_NAME": "out.cat",
        "CATALOG_TYPE": "ASCII",
        "PARAMETERS_NAME": "columns.param",
        "FILTER_NAME": "smoothing.conv",
        "DEBLEND_MINCONT": 1,
        "CLEAN": "N",
        "WEIGHT_TYPE": "MAP_RMS",
        "WEIGHT_IMAGE": "rms.fits",
        "WEIGHT_GAIN": "N",
        "GAIN": _pixel_gain(task),
        "GAIN_KEY": "NONE",
        "SATUR_LEVEL": 1e9,
        "SATUR_KEY": "NONE",
        "MAG_ZEROPOINT": 0,
        "PIXEL_SCALE": 1,
        "BACK_TYPE": "MANUAL",
        "BACK_VALUE": 0,
        "PSF_NAME": "image.psf",
        "NTHREADS": 1,
        "VERBOSE_TYPE": "QUIET",
    }
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, images in (("image", stamps), ("rms", np.full_like(stamps, task["rms"]))):
            fits.HDUList([fits.PrimaryHDU(), *map(fits.ImageHDU, images)]).writeto(folder / f"{name}.fits")
        psfex_file(task["psf"], len(stamps)).writeto(folder / "image.psf")
        (folder / "columns.param").write_text("\n".join(columns) + "\n")
        rows = "\n".join(" ".join(f"{value:.6f}" for value in row) for row in smoothing)
        (folder / "smoothing.conv").write_text(f"CONV NORM\n{rows}\n")
        (folder / "settings.sex").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
        subprocess.run([source_extractor_program(), "image.fits", "-c", "settings.sex"], cwd=folder, check=True)
        table = np.loadtxt(folder / "out.cat", ndmin=2)
    table = {name: table[:, i] for i, name in enumerate(columns)}
    centre = (stamps.shape[1] - 1) / 2
    distance = np.hypot(table["X_IMAGE"] - 1 - centre, table["Y_IMAGE"] - 1 - centre)
    parameters = np.full((len(stamps), 7), np.nan)
    iterations, flags = np.zeros(len(stamps), int), np.full(len(stamps), -1)
    for i in range(len(stamps)):
        mine = np.flatnonzero(table["EXT_NUMBER"] == i + 1)
        if not len(mine) or distance[mine].min() > 10:
            continue
        row = mine[distance[mine].argmin()]
        parameters[i] = [table[name][row] for name in columns[3:10]]
        parameters[i, :2] -= 1
        iterations[i], flags[i] = table["NITER_MODEL"][row], table["FLAGS_MODEL"][row]
    return {"parameters": parameters, "failed": flags < 0, "iterations": iterations, "flags": flags}


OURS = {
    "sersicnet": sersicnet,
    "sersicnet, prior": sersicnet_prior,
    "sersicnet, sky free": sersicnet_free_sky,
}
TOOLS = {**OURS, "pyimfit": pyimfit, "petrofit": petrofit, "source-extractor": source_extractor}


def source_extractor_program():
    """Debian's name of the program, or its older ones; None where there is none."""
    return next(filter(None, map(shutil.which, ("source-extractor", "sex", "sextractor"))), None)


def _pixel_gain(task):
    """Gain that gives the variance of a pixel; the kernel that correlates the noise lowers it."""
    return float(task["gain"] * task["correlation"].sum())


def _sigma_maps(task):
    """Noise of each pixel, (N, S, S), with the Poisson noise as one can know it: from the data."""
    return np.sqrt(task["rms"] ** 2 + np.maximum(task["stamps"], 0).astype(float) / _pixel_gain(task))


def _light_per_intensity(r_eff, n, q):
    """Total flux of a Sersic profile of unit surface brightness at its effective radius."""
    b = special.gammaincinv(2 * n, 0.5)
    return 2 * np.pi * n * q * r_eff**2 * np.exp(b - 2 * n * np.log(b) + special.gammaln(2 * n))


def psfex_file(psf, extensions):
    """The PSF as PSFEx writes it for each extension: constant over the field, one sample a pixel."""
    from astropy.io import fits

    side = len(psf)
    column = fits.Column("PSF_MASK", f"{side * side}E", dim=f"({side},{side},1)", array=psf[None, None])
    table = fits.BinTableHDU.from_columns([column], name="PSF_DATA")
    half_maximum = 2 * np.sqrt((psf > psf.max() / 2).sum() / np.pi)
    table.header.update(
        LOADED=1, ACCEPTED=1, CHI2=1.0, POLNAXIS=0, POLNGRP=0, PSF_FWHM=half_maximum, PSF_SAMP=1.0, PSFNAXIS=3
    )
    table.header.update(PSFAXIS1=side, PSFAXIS2=side, PSFAXIS3=1)
    return fits.HDUList([fits.PrimaryHDU(), *(table.copy() for _ in range(extensions))])


def cpu_seconds():
    """Of this process and of those that it started and that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main(tool, source, target):
    task = dict(np.load(source))
    # Imports, and tables made once, are not the cost of a galaxy.
    TOOLS[tool]({**task, **{name: task[name][:1] for name in ("stamps", "start", "masks") if name in task}})
    wall, cpu = time.perf_counter(), cpu_seconds()
    result = TOOLS[tool](task)
    np.savez(target, **result, wall=time.perf_counter() - wall, cpu=cpu_seconds() - cpu)


if __name__ == "__main__":
    main(*sys.argv[1:])
