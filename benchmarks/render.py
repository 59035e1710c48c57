"""The renderer: its speed beside GalSim's, the accuracy of both, and where its time goes.

``python benchmarks/render.py [N]`` draws N galaxies of the default prior with both,
on one core, and measures both against a brute-force quadrature (tests/quadrature.py).

``python benchmarks/render.py --search [MINUTES] [SEED]`` looks for the galaxy, anywhere
in the prior and up to 4 pixels off the middle, that is drawn worst: so many minutes of CPU time,
three quarters by differential evolution, the rest by Nelder-Mead from the worst found.
"""

import sys
import time
from functools import partial
from pathlib import Path

import galsim
import numpy as np
from scipy import fft, optimize

from sersicnet.engine.render import Renderer, _hankel_table
from sersicnet.schema import TARGETS
from sersicnet.simulating.neighbours import parameters
from sersicnet.simulating.recipe import Simulation
from sersicnet.simulating.stamps import draw_truth
from sersicnet.simulating.telescopes import F160W, effective_psf

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import quadrature

N_CHECKED = 12  # galaxies that are drawn by quadrature as well: seconds each


def effective_psf_of_galsim():
    """The PSF as one GalSim object, without its halo, and in pixels."""
    pixels = [galsim.Pixel(side / F160W.pixel_scale) for side in F160W.pixels]
    lam_over_diam = 206265 * F160W.wavelength * 1e-9 / F160W.aperture / F160W.pixel_scale
    return galsim.Convolve([galsim.Airy(lam_over_diam=lam_over_diam, obscuration=F160W.obscuration), *pixels])


def differences(stamps, references):
    """Largest difference of a pixel from the peak, and of the flux in the stamp."""
    peak = max(np.abs(a - b).max() / b.max() for a, b in zip(stamps, references, strict=True))
    return peak, max(abs(a.sum() / b.sum() - 1) for a, b in zip(stamps, references, strict=True))


def galsim_stamps(rows, psf):
    settings = galsim.GSParams(maximum_fft_size=16384)
    for x, y, flux, r_eff, n, q, theta in rows:
        galaxy = galsim.Sersic(n=n, half_light_radius=r_eff * np.sqrt(q), flux=flux, gsparams=settings)
        seen = galsim.Convolve([galaxy.shear(q=q, beta=theta * galsim.degrees), psf], gsparams=settings)
        yield seen.drawImage(nx=128, ny=128, scale=1.0, offset=(x - 63.5, y - 63.5), method="no_pixel").array


def cost(work, repeats=20):
    """CPU seconds of a call, the least of a few."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def unavoidable(render, period, *, derivatives):
    """CPU seconds of FFTs, logarithms, phases and table look-ups of one galaxy, alone."""
    grid = render._grid(period)
    rows, columns = grid.psf.shape
    k2 = np.linspace(1, 2, rows * columns, dtype=np.float32).reshape(1, rows, columns)
    spectrum, half = k2 + 0j, np.ones((1, render.size, columns), np.complex64)
    table = _hankel_table().transforms[0, 0]
    index = (k2.ravel() * len(table) / 3).astype(int)
    first, second, tables = (6, 7, 3) if derivatives else (1, 1, 1)
    ffts = first * cost(lambda: fft.ifft(spectrum, axis=1)) + second * cost(lambda: fft.irfft(half, period, axis=2))
    phases = cost(lambda: [np.exp(-1j * grid.kx_host), np.exp(-1j * grid.ky_host)])
    return ffts, cost(lambda: np.log(k2)) + phases, 2 * tables * cost(lambda: np.take(table, index))


def shares(render, rows, total, *, derivatives):
    batches = list(render._batches(rows, 1))
    by_period = {p: unavoidable(render, p, derivatives=derivatives) for p in {batch.period for batch in batches}}
    parts = np.sum([by_period[batch.period] for batch in batches], axis=0) / len(rows)
    wings = sum(cost(partial(render._wrapped, b, derivatives=derivatives), 3) for b in batches if b.nodes)
    names = ("FFTs", "logarithms and phases", "look-ups in the table", "wings of periodic images")
    return ", ".join(
        f"{name} {part / total:.0%}" for name, part in zip(names, [*parts, wings / len(rows)], strict=True)
    )


def speed(n):
    psf = effective_psf_of_galsim()
    image = psf.drawImage(nx=255, ny=255, scale=1.0, method="no_pixel", dtype=float).array
    rows = np.array([parameters(draw_truth(Simulation(1, seed=0), i)[0], F160W) for i in range(n)])
    render = Renderer(image)
    render.with_derivatives(rows[:20])
    plain = np.mean([cost(partial(render, row), 3) for row in rows])
    full = np.mean([cost(partial(render.with_derivatives, row), 3) for row in rows])

    started = time.process_time()
    theirs = np.array(list(galsim_stamps(rows, psf)))
    galsim_time = (time.process_time() - started) / n

    few = rows[:N_CHECKED]
    references = [quadrature.stamp(image, row) for row in few]
    ours, his = differences(render(few), references), differences(theirs[:N_CHECKED] / image.sum(), references)
    print(f"ours    {1e3 * plain:7.2f} ms a stamp, {1 / plain:6.0f} a second a core; {1e3 * full:.2f} with derivatives")
    print(f"GalSim  {1e3 * galsim_time:7.2f} ms a stamp, {1 / galsim_time:6.1f} a second (default accuracy)")
    print(f"ratio   {galsim_time / plain:7.0f}")
    print(f"largest difference from quadrature, {len(few)} stamps: of the peak, of the flux in the stamp")
    print(f"ours    {ours[0]:.1e} {ours[1]:.1e}")
    print(f"GalSim  {his[0]:.1e} {his[1]:.1e}")
    print("share of our time:", shares(render, rows, plain, derivatives=False))
    print("with derivatives: ", shares(render, rows, full, derivatives=True))
    for size in (64, 96):
        smaller = Renderer(effective_psf(F160W), size)
        small = rows[rows[:, 3] < size / 8] - [64 - size / 2, 64 - size / 2, 0, 0, 0, 0, 0]
        smaller.with_derivatives(small)
        draw = [1e3 * np.mean([cost(partial(f, row), 3) for row in small]) for f in (smaller, smaller.with_derivatives)]
        print(f"size {size}, R_e < {size / 8:.0f} px: {draw[0]:.2f} ms a stamp, {draw[1]:.2f} with derivatives")


def search(minutes, seed):
    """The worst galaxy, in units of what is allowed: 0.2 % of the peak, 0.1 % of the flux."""
    psf = effective_psf(F160W)
    render, start, seen = Renderer(psf), time.process_time(), []
    (_, r_eff, n, ellipticity) = TARGETS
    bounds = [
        np.log([r_eff.low, r_eff.high]),
        (n.low, n.high),
        (np.log(1 - ellipticity.high), 0),
        (-4, 4),
        (-4, 4),
        (0, 180),
    ]

    def goodness(free):
        log_r, index, log_q, dx, dy, theta = np.clip(free, *np.transpose(bounds))
        row = np.array([63.5 + dx, 63.5 + dy, 1.0, np.exp(log_r), index, np.exp(log_q), theta])
        peak, flux = differences(render(row), [quadrature.stamp(psf, row)])
        seen.append((peak, flux, row, free))
        return -max(peak / 2e-3, flux / 1e-3)

    def stop_after(share):
        def callback(*_args, **_kwargs):
            if time.process_time() > start + 60 * minutes * share:
                raise StopIteration

        return callback

    optimize.differential_evolution(
        goodness, bounds, popsize=6, maxiter=1000, init="sobol", polish=False, rng=seed, callback=stop_after(0.75)
    )
    worst = min(seen, key=lambda s: -max(s[0] / 2e-3, s[1] / 1e-3))
    optimize.minimize(goodness, worst[3], method="Nelder-Mead", callback=stop_after(1))
    print(f"{len(seen)} galaxies; parameters are x, y, flux, R_e, n, q, angle")
    for which, name in enumerate(("peak", "flux in the stamp")):
        worst = max(seen, key=lambda s: s[which])
        print(f"worst: {worst[which]:.1e} of the {name}, at {np.round(worst[2], 4).tolist()}")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["--search"]:
        search(float(arguments[1]) if len(arguments) > 1 else 10, int(arguments[2]) if len(arguments) > 2 else 0)
    else:
        speed(int(arguments[0]) if arguments else 200)
