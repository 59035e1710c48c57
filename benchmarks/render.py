"""Stamps a second: our renderer against GalSim, on the default prior, in one run.

``python benchmarks/render.py [N]`` draws N galaxies both ways, one process each,
prints the ratio of the times, the largest differences, and which share of our
time goes into FFTs and transcendental functions that cannot be avoided.
"""

import sys
import time

import galsim
import numpy as np
from scipy import fft

from sersicnet.instrument import F160W
from sersicnet.render import Renderer
from sersicnet.simulate import Simulation, _draw_truth, _parameters


def effective_psf_of_galsim():
    """The PSF as one GalSim object, without its halo, and in pixels."""
    pixels = [galsim.Pixel(side / F160W.pixel_scale) for side in F160W.pixels]
    lam_over_diam = 206265 * F160W.wavelength * 1e-9 / F160W.aperture / F160W.pixel_scale
    return galsim.Convolve([galsim.Airy(lam_over_diam=lam_over_diam, obscuration=F160W.obscuration), *pixels])


def main(n):
    psf = effective_psf_of_galsim()
    image = psf.drawImage(nx=255, ny=255, scale=1.0, method="no_pixel", dtype=float).array
    rows = np.array([_parameters(_draw_truth(Simulation(1, seed=0), i)[0], F160W) for i in range(n)])
    render = Renderer(image)
    render(rows[:2])
    started = time.perf_counter()
    ours = render(rows)
    our_time = (time.perf_counter() - started) / n

    settings = galsim.GSParams(maximum_fft_size=20000)
    times, peaks, fluxes = [], [], []
    for row, stamp in zip(rows, ours, strict=True):
        x, y, flux, r_eff, index, q, theta = row
        started = time.perf_counter()
        galaxy = galsim.Sersic(n=index, half_light_radius=r_eff * np.sqrt(q), flux=flux, gsparams=settings)
        seen = galsim.Convolve([galaxy.shear(q=q, beta=theta * galsim.degrees), psf], gsparams=settings)
        theirs = seen.drawImage(nx=128, ny=128, scale=1.0, offset=(x - 63.5, y - 63.5), method="no_pixel").array
        times.append(time.perf_counter() - started)
        peaks.append(np.abs(stamp * image.sum() - theirs).max() / theirs.max())
        fluxes.append(abs(stamp.sum() * image.sum() / theirs.sum() - 1))

    period = render._period
    spectrum = np.ones((period, period // 2 + 1), np.complex64)
    wave_numbers = np.ones(len(render._rows), np.float32)
    started = time.perf_counter()
    for _ in range(50):
        fft.irfft2(spectrum, (period, period))
    fft_time = (time.perf_counter() - started) / 50
    started = time.perf_counter()
    for _ in range(50):
        np.log(wave_numbers)
    log_time = (time.perf_counter() - started) / 50

    print(f"ours    {1e3 * our_time:7.2f} ms a stamp, {1 / our_time:6.0f} a second")
    print(f"GalSim  {1e3 * np.mean(times):7.2f} ms a stamp, {1 / np.mean(times):6.1f} a second (default accuracy)")
    print(f"ratio   {np.mean(times) / our_time:7.0f}")
    print(f"largest difference: {max(peaks):.1e} of the peak, {max(fluxes):.1e} of the flux in the stamp")
    print(f"one FFT is {fft_time / our_time:.0%} of our time, the logarithms {log_time / our_time:.0%}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
