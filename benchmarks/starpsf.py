"""The PSF of an image from its stars: ours, that of photutils' `EPSFBuilder`, and the truth.

``python benchmarks/starpsf.py [--stars 30] [--seeds 2] [--fields] [--side 61] [--fits] [--narrow]``

Prints Markdown: the error of the FWHM, and of the light within 1, 2 and 4 FWHM as a fraction of that within 4 FWHM and
of all, in per cent of the truth. Stars have a signal to noise of 100 to 1,000, evenly in its log, at random places in
their pixels, with white noise. The claimed error of the FWHM is in brackets.

- Without ``--fields``, both get the same stamps of single stars, ``--side`` pixels a side. PSFs are normalised within
  the largest circle in a stamp. `EPSFBuilder` has its defaults, except for the oversampling, which is ours, and for the
  recentring box and the fitted box, which have three FWHM.
- With ``--fields``, `find_psf` measures 1024 x 1024 pixels with these stars (one of them saturated, one in ten a
  double), 130 galaxies and 200 hot pixels. All light is that within 64 pixels.
- ``--fits`` adds errors of fits through our PSF of two noiseless galaxies drawn through the true one: of the magnitude
  for R_e 0.4 FWHM and n 1, and of ln R_e for R_e 1 FWHM and n 4.
- ``--narrow`` draws galaxies through files of narrow PSFs with their core between four pixels instead, see `narrow`.
"""

import argparse
import time
import warnings

import galsim
import numpy as np
from astropy.table import Table

from sersicnet.engine.fit import Fitter, Noise
from sersicnet.engine.render import Renderer
from sersicnet.image.detect import Detector
from sersicnet.image.epsf import LEAST_STARS, StarStamps, measure_psf
from sersicnet.image.epsfmodel import REACH
from sersicnet.image.pixels import Held, Pixels
from sersicnet.image.psf import Psf, resampled
from sersicnet.image.sky import estimate_sky
from sersicnet.image.starpsf import find_psf
from sersicnet.simulating.telescopes import F160W

CASES = (
    ("Moffat", 1.2, 0.0),
    ("Moffat", 1.7, 0.0),
    ("Moffat", 3.0, 0.0),
    ("Moffat", 3.0, 0.15),
    ("Moffat", 5.0, 0.0),
    ("Moffat", 8.0, 0.0),
    ("Airy", 1.6, 0.0),
    ("Airy", 2.2, 0.0),
    ("Airy", 3.0, 0.0),
    ("F160W", 1.7, 0.0),
    ("F160W", 2.2, 0.0),
    ("F160W", 3.15, 0.0),
)
"""Kind of PSF, its rough FWHM with the pixel, and its shear."""

SNR = (100, 1000)


def effective(kind, fwhm, shear):
    """A PSF with the pixel, in pixels of the image."""
    if kind == "F160W":
        optics = [galsim.Airy(lam=F160W.wavelength, diam=F160W.aperture, obscuration=F160W.obscuration)]
        optics += [galsim.Pixel(side) for side in F160W.pixels] + [galsim.Gaussian(sigma=F160W.blur)]
        halo = galsim.Moffat(beta=F160W.halo_beta, scale_radius=F160W.halo_scale)
        psf = (1 - F160W.halo_fraction) * galsim.Convolve(optics) + F160W.halo_fraction * halo
        psf = psf.dilate(fwhm / 3.15 / F160W.pixel_scale)
    else:
        bare = np.sqrt(max(fwhm**2 - 0.8, 0.3))
        psf = (
            galsim.Moffat(beta=3, fwhm=bare) if kind == "Moffat" else galsim.Airy(lam_over_diam=bare, obscuration=0.33)
        )
        psf = galsim.Convolve([psf, galsim.Pixel(1)])
    return psf.shear(g1=0.8 * shear, g2=0.6 * shear)


def drawn(psf, side, x, y):
    """A PSF at a place in a square of pixels."""
    offset = x - (side - 1) / 2, y - (side - 1) / 2
    return psf.drawImage(nx=side, ny=side, scale=1, method="no_pixel", offset=offset, dtype=float).array


def truth(psf, oversampling):
    side = 2 * REACH * oversampling + 1
    image = psf.drawImage(nx=side, ny=side, scale=1 / oversampling, method="no_pixel", dtype=float).array
    return Psf.of(image / image.sum(), "truth", oversampling)


def fluxes(rng, n, fwhm):
    """Fluxes in units of the noise of a pixel, for a Gaussian of the same FWHM."""
    return 10 ** rng.uniform(*np.log10(SNR), n) * np.sqrt(4 * np.pi) * fwhm / 2.3548


def stars(psf, fwhm, n, side, seed):
    rng = np.random.default_rng(seed)
    centres = side // 2 + rng.uniform(-0.5, 0.5, (n, 2))
    values = np.array([f * drawn(psf, side, *c) for f, c in zip(fluxes(rng, n, fwhm), centres, strict=True)])
    rough = centres + rng.uniform(-0.3, 0.3, centres.shape)
    return values + rng.normal(0, 1, values.shape), rough


def of_photutils(values, rough, fwhm, oversampling):
    from astropy.nddata import NDData
    from photutils.psf import EPSFBuilder, EPSFStars, extract_stars

    box = 2 * int(1.5 * fwhm + 1) + 1
    side = values.shape[1]
    cut = [
        extract_stars(NDData(one), Table({"x": [x], "y": [y]}), size=side - 2).all_stars[0]
        for one, (x, y) in zip(values, rough, strict=True)
    ]
    builder = EPSFBuilder(
        oversampling=oversampling, recentering_boxsize=box, fit_shape=box, maxiters=10, progress_bar=False
    )
    image = np.asarray(builder(EPSFStars(cut))[0].data)
    return Psf.of(image / image.sum(), "photutils", oversampling)


def field(psf, fwhm, n, seed, size=1024):
    rng = np.random.default_rng(seed)
    image = rng.normal(0, 1, (size, size)).astype(np.float32)

    def add(stamp, x, y):
        half = len(stamp) // 2
        rows, columns = (slice(max(c - half, 0), min(c + half + 1, size)) for c in (y, x))
        there = (
            slice(rows.start - y + half, rows.stop - y + half),
            slice(columns.start - x + half, columns.stop - x + half),
        )
        image[rows, columns] += stamp[there]

    for k, flux in enumerate(fluxes(rng, n, fwhm)):
        (x, y), (dx, dy) = rng.integers(10, size - 10, 2), rng.uniform(-0.5, 0.5, 2)
        add((1e6 if k == 0 else flux) * drawn(psf, 161, 80 + dx, 80 + dy), x, y)
        if k % 10 == 5:
            add(0.4 * flux * drawn(psf, 161, 80 + dx + fwhm / 2, 80 + dy), x, y)
    for _ in range(130):
        radius, q = max(0.3 * fwhm, 10 ** rng.normal(0.6, 0.25)), rng.uniform(0.3, 1)
        galaxy = galsim.Sersic(n=np.clip(10 ** rng.normal(0.15, 0.25), 0.5, 5.5), half_light_radius=radius)
        galaxy = galsim.Convolve([galaxy.shear(q=q, beta=rng.uniform(0, 180) * galsim.degrees), psf])
        flux = 10 ** rng.uniform(2.5, 5) * np.sqrt(max(radius, fwhm) / 3)
        add(flux * drawn(galaxy, 161, *(80 + rng.uniform(-0.5, 0.5, 2))), *rng.integers(0, size, 2))
    image[tuple(rng.integers(0, size, (2, 200)))] += 10 ** rng.uniform(1, 3, 200)
    return np.minimum(image, 3e4)


def line(name, case, found, true, reach, extra=""):
    """A row of the table."""
    inner, outer = true.fwhm * np.array([1, 2, 1, 2, 4]), np.array([4 * true.fwhm] * 2 + [reach] * 3)
    light = [psf.encircled(inner) / psf.encircled(outer) for psf in (found, true)]
    errors = " | ".join(f"{100 * value:.2f}" for value in (found.fwhm / true.fwhm - 1, *(light[0] / light[1] - 1)))
    shape = f"{case[0]} {true.fwhm:.2f}, e {true.ellipticity:.2f}"
    print(f"| {shape} | {name} | {errors} | {found.ellipticity:.3f} | {extra} |", flush=True)


def fits(found, true):
    """Errors of the magnitude and of ln R_e of two galaxies that are drawn through one PSF and fitted with another."""
    side, w = 101, true.fwhm
    rows = np.array([[50.2, 49.8, 1e5, 0.4 * w, 1.0, 0.8, 30.0], [50.2, 49.8, 1e5, w, 4.0, 0.8, 30.0]])
    stamps = Renderer(true.image, side, true.oversampling)(rows)
    fitter = Fitter(found.image, Noise(np.ones((1, 1))), side, psf_oversampling=found.oversampling)
    got = fitter(stamps, np.ones(2), rows * [1, 1, 0.95, 1.1, 0.9, 1, 1]).parameters
    return -2.5 * np.log10(got[0, 2] / rows[0, 2]), np.log(got[1, 3] / rows[1, 3])


def narrow(fwhm=1.4, side=41):
    """Galaxies through files of narrow PSFs: centred; between four pixels, and centred by us; and by sinc functions.

    Prints the largest error of a pixel, in per cent of the galaxy's peak.
    """
    print("| PSF | galaxy | centred | moved | by sinc functions |\n|---|---|---|---|---|")
    middle = np.arange(side) + 0.0
    for name, bare in (
        ("Moffat", lambda w: galsim.Moffat(beta=2.5, fwhm=w)),
        ("Gaussian", lambda w: galsim.Gaussian(fwhm=w)),
        ("Airy", lambda w: galsim.Airy(lam_over_diam=w / 1.029, obscuration=0.33)),
    ):
        low, high = 0.2, fwhm
        while high - low > 1e-3:
            psf = galsim.Convolve(bare((low + high) / 2), galsim.Pixel(1))
            low, high = ((low + high) / 2, high) if truth(psf, 4).fwhm < fwhm else (low, (low + high) / 2)
        centred, off = drawn(psf, side, side // 2, side // 2), drawn(psf, side, side // 2 + 0.5, side // 2 + 0.5)
        images = centred, Psf.of(off, name).image * off.sum(), resampled(off, middle + 0.5, middle + 0.5)
        for radius, n in ((1, 1), (3, 1), (3, 4)):
            galaxy = galsim.Sersic(n, half_light_radius=radius * np.sqrt(0.6)).shear(q=0.6, beta=0 * galsim.degrees)
            true = drawn(galsim.Convolve(galaxy, psf), 64, 31.8, 31.6)
            errors = []
            for image in images:
                ours = image.sum() * Renderer(image, 64)(np.array([[31.8, 31.6, 1, radius, n, 0.6, 0.0]]))[0]
                errors.append(f"{100 * np.abs(ours - true).max() / true.max():.1f}")
            print(f"| {name} | R_e {radius}, n {n} | {' | '.join(errors)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--stars", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--side", type=int, default=61)
    parser.add_argument("--fields", action="store_true")
    parser.add_argument("--cases", type=int, nargs="*", help="numbers of cases, from 0")
    parser.add_argument("--fits", action="store_true")
    parser.add_argument("--narrow", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.narrow:
        narrow()
        return
    more = options.fields and options.fits
    print(
        "| PSF | | FWHM, % | light within 1 FWHM, of 4 FWHM, % | 2 of 4 | 1 of all | 2 of all | 4 of all | e | |"
        f"{' mag | ln R_e |' * more}\n|{'---|' * (10 + 2 * more)}"
    )
    for number, case in enumerate(CASES):
        if options.cases is not None and number not in options.cases:
            continue
        psf = effective(*case)
        fwhm = truth(psf, 4).fwhm
        for seed in range(options.seeds):
            if options.fields:
                image = field(psf, fwhm, options.stars, seed)
                source = Held(Pixels(image, np.zeros(image.shape, bool)))
                mesh = estimate_sky(source, Detector().threshold)
                started = time.process_time()
                found = find_psf(source, mesh)
                took = f"{time.process_time() - started:.1f} s"
                if found.psf is None:
                    print(f"| {case[0]} {fwhm:.2f} | sersicnet | {found.reason} | | | | | {took} |", flush=True)
                    continue
                true = truth(psf, found.psf.oversampling)
                took = f"{found.psf.source} ({100 * found.psf.error:.1f} %), {took}"
                if options.fits:
                    took += " | {:+.3f} | {:+.3f}".format(*fits(found.psf, true))
                line("sersicnet", case, found.psf, true, REACH, took)
                continue
            values, rough = stars(psf, fwhm, options.stars, options.side, seed)
            reach = options.side // 2 - 2
            stamps = StarStamps(values, np.ones_like(values), np.zeros(values.shape, bool), *rough.T)
            started = time.process_time()
            ours = measure_psf(stamps, 1.03 * fwhm, least=min(options.stars, LEAST_STARS))
            took = time.process_time() - started
            if ours is None:
                print(f"| {case[0]} {fwhm:.2f} | sersicnet | no PSF | | | | | |", flush=True)
                continue
            true = truth(psf, ours.oversampling)
            found = Psf.of(ours.images[0], "sersicnet", ours.oversampling)
            line(
                "sersicnet",
                case,
                found,
                true,
                reach,
                f"{ours.used.sum()} stars ({100 * ours.error:.1f} %), {took:.1f} s",
            )
            started = time.process_time()
            try:
                theirs = of_photutils(values, rough, fwhm, ours.oversampling)
            except Exception as error:  # whatever a peer raises is its result
                print(
                    f"| {case[0]} {fwhm:.2f} | photutils | {type(error).__name__}: {str(error)[:60]} | | | | | |",
                    flush=True,
                )
                continue
            line("photutils", case, theirs, true, reach, f"{time.process_time() - started:.1f} s")


if __name__ == "__main__":
    main()
