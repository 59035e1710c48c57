"""Galaxies that are simulated while a network trains: no two epochs see the same stamp.

They follow the recipe of a dataset. On a CPU, worker processes draw them with
`sersicnet.simulating.stamps.draw_stamps`; where PyTorch or JAX has an accelerator they are drawn
on it, noise included, and stay there. The truth is drawn on the host in both cases,
by the same generators: the galaxies are the same ones, only their noise differs. Galaxies of many
telescopes, of which every 16 have another PSF, are drawn on the CPU in any case.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any

import array_api_compat
import numpy as np

from sersicnet.dataset import BLOCK, Dataset
from sersicnet.engine.render import Renderer, on_host
from sersicnet.errors import DatasetError
from sersicnet.image.views import psf_views
from sersicnet.schema import STAMP_SIZE, TARGET_NAMES, Inputs, noise_numbers, orientation, relative_magnitude
from sersicnet.simulating import neighbours as scene
from sersicnet.simulating import world
from sersicnet.simulating.recipe import Simulation
from sersicnet.simulating.stamps import draw_psf, draw_stamps, draw_truth, exposed
from sersicnet.workers import cores, in_order, pools

PORTION = 64
"""Galaxies that a worker process draws at a time."""

PRELOAD = "sersicnet.simulating.stamps"
"""Module that worker processes import."""

DEVICE_PORTION = 512
"""Galaxies that an accelerator draws at a time."""

Array = Any


class OnTheFly:
    """Galaxies without end by the recipe of a dataset; a context manager.

    Galaxy i of epoch e depends on the seed, e and i only.

    Parameters
    ----------
    data : Dataset
    seed : int
    faint_limit : float
        Galaxies fainter than this AB magnitude are not drawn.
    asarray : callable, optional
        Makes of a NumPy array one of the library, and on the device, that galaxies
        are drawn with. Without it they are drawn by processes on the CPU.
    workers : int, optional
        Processes, without `asarray`; by default half of the cores, since training
        needs the others.

    Raises
    ------
    DatasetError
        If the recipe cannot be followed: parts of it are not in the dataset, or it
        is too slow to keep a network busy.
    """

    def __init__(
        self,
        data: Dataset,
        seed: int,
        *,
        faint_limit: float = math.inf,
        asarray: Callable[[np.ndarray], Array] | None = None,
        workers: int | None = None,
    ) -> None:
        self.simulation = _recipe(data)
        slow = [what for what, there in (("neighbours", self.simulation.neighbours),
                                         ("real-like galaxies", self.simulation.real_like)) if there]  # fmt: skip
        if slow:
            raise DatasetError(
                f"{data.path} cannot be simulated while training: {slow[0]} take a tenth of a second a stamp. "
                "Train without `on_the_fly`, on more stamps."
            )
        prior = self.simulation.prior
        if prior.mag[0] >= faint_limit:
            raise DatasetError(f"{data.path} holds no galaxy brighter than mag {faint_limit:g}.")
        prior = replace(prior, mag=(prior.mag[0], min(prior.mag[1], faint_limit)))
        self.simulation = replace(self.simulation, prior=prior)
        self.seed = seed
        self._device, self._views, self._stack = None, None, ExitStack()
        if not self.simulation.telescopes:
            psf = self.simulation.psf_images() if data.psf is None else data.psf
            assert psf is not None  # only simulations of many telescopes have none
            self._views = np.array([psf_views(image) for image in psf]) if data.views is None else data.views
            if asarray is not None:
                self._device = OnDevice(psf, self._views, asarray)
        if self._device is None:
            if importlib.util.find_spec("galsim") is None:
                raise DatasetError(
                    "Galaxies are drawn with GalSim where no accelerator draws them, and it is not installed. "
                    "Run `pip install galsim`, or train without `on_the_fly`."
                )
            self._workers = workers or max(1, cores() // 2)
            self._apply = self._stack.enter_context(pools(self._workers, _undisturbed, preload=PRELOAD, apart=True))

    def __enter__(self) -> OnTheFly:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def where(self) -> str:
        """What draws the galaxies, in words."""
        return "the accelerator" if self._device is not None else f"{self._workers} processes"

    def galaxies(self, epoch: int, first: int, sizes: Iterator[int]) -> Iterator[tuple[Inputs, np.ndarray]]:
        """Galaxies of an epoch, in order.

        Parameters
        ----------
        epoch : int
        first : int
            The first of them to draw.
        sizes : iterator of int
            How many to yield at a time.

        Yields
        ------
        inputs : Inputs
            Arrays of the library that galaxies are drawn with.
        targets : ndarray, float64, (size, 6)
            Relative magnitude, effective radius [pix], Sersic index, ellipticity, and the components of
            `sersicnet.schema.orientation`.
        """
        simulation = replace(self.simulation, seed=_epoch_seed(self.seed, epoch))
        draw = self._by_processes if self._device is None else self._device.portions
        portions = draw(simulation, first)
        inputs, targets = next(portions)
        for size in sizes:
            while len(targets) < size:
                more, truth = next(portions)
                xp = array_api_compat.array_namespace(*more)
                inputs, targets = Inputs.concatenated([inputs, more], xp.concat), np.concatenate([targets, truth])
            yield inputs.taken(slice(size)), targets[:size]
            inputs, targets = inputs.taken(slice(size, None)), targets[size:]

    def _by_processes(self, simulation: Simulation, first: int) -> Iterator[tuple[Inputs, np.ndarray]]:
        """Portions without end, drawn ahead by twice the number of processes."""
        skip = first % PORTION
        draw = functools.partial(portion, simulation, self._views, size=PORTION)
        for inputs, targets in in_order(self._apply)(draw, itertools.count(first - skip, PORTION)):
            yield inputs.taken(slice(skip, None)), targets[skip:]
            skip = 0


def _epoch_seed(seed: int, epoch: int) -> int:
    """A seed of 64 bits that no user chooses by chance for a test set."""
    return int(np.random.SeedSequence([seed, epoch, 0xF2E5], spawn_key=(1,)).generate_state(1, np.uint64)[0])


def _undisturbed() -> None:
    """Leave Ctrl-C, which reaches every process, to the one that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _recipe(data: Dataset) -> Simulation:
    """The simulation that a dataset is one of."""
    if telescopes := data.config.get("telescopes"):
        options = {name: data.config.get(name, False) for name in ("neighbours", "centring")}
        galaxies = data.config.get("galaxies", "sersic")
        return world.simulation(telescopes, data.config["n"], data.config["seed"], galaxies=galaxies, **options)
    try:
        return Simulation.of_record(data.config, data.psf)
    except DatasetError as error:
        raise DatasetError(
            f"{data.path} cannot be simulated on the fly: {error} Train without `on_the_fly`."
        ) from error


def portion(simulation: Simulation, views: np.ndarray | None, first: int, size: int) -> tuple[Inputs, np.ndarray]:
    """What a network is shown of some galaxies, and their targets; workers call this.

    Parameters
    ----------
    simulation : Simulation
    views : ndarray, float32, (K, 4, 32, 32), or None
        Of the PSFs; not needed for many telescopes.
    first, size : int
        The galaxies; whole blocks, for many telescopes.
    """
    if simulation.telescopes:
        numbers = range(first // BLOCK, -(-(first + size) // BLOCK))
        inputs, targets = zip(*[_of_piece(simulation, number) for number in numbers], strict=True)
        return Inputs.concatenated(inputs), np.concatenate(targets)
    assert views is not None
    images, truth = draw_stamps(simulation, np.arange(first, first + size))
    images /= truth["rms"].astype(np.float32)[:, None, None]
    return Inputs(images, *_beside(simulation, views, truth)), _targets(simulation, truth)


def _of_piece(simulation: Simulation, number: int) -> tuple[Inputs, np.ndarray]:
    """Galaxies of a block through one PSF of many telescopes."""
    piece = world.piece(simulation.telescopes, simulation.seed, number)
    images, truth = draw_stamps(piece.of(simulation), np.arange(number * BLOCK, (number + 1) * BLOCK))
    images /= truth["rms"].astype(np.float32)[:, None, None]
    noise = noise_numbers(np.full(len(images), piece.correlation), np.full(len(images), piece.electrons))
    return Inputs(images, np.repeat(piece.views[None], len(images), axis=0), noise), _targets(simulation, truth)


def _beside(simulation: Simulation, views: np.ndarray, truth: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The PSF and the noise of galaxies, as a network is shown them beside the stamps."""
    instrument = simulation.instrument
    noise = noise_numbers(instrument.correlation, instrument.exposure * truth["rms"])
    return views[simulation.psf_numbers(truth)], noise


def _targets(simulation: Simulation, truth: dict[str, np.ndarray]) -> np.ndarray:
    targets = np.stack([truth[name] for name in TARGET_NAMES], axis=1)
    targets[:, 0] = relative_magnitude(truth["mag"], simulation.instrument.zero_point, truth["rms"])
    return np.concatenate([targets, orientation(truth["ellipticity"], truth["theta"])], axis=1)


class OnDevice:
    """Draws isolated Sersic galaxies with the array library, and on the device, of its PSFs.

    Parameters
    ----------
    psfs : ndarray, float, (K, P, P)
        See `sersicnet.simulating.recipe.Simulation.psf_images`.
    views : ndarray, float32, (K, 4, 32, 32)
        What networks are shown of them.
    asarray : callable
        As for `OnTheFly`.
    """

    def __init__(self, psfs: np.ndarray, views: np.ndarray, asarray: Callable[[np.ndarray], Array]) -> None:
        self._asarray, self._views = asarray, views
        self._renderers = [Renderer(asarray(psf.astype(np.float32)), STAMP_SIZE) for psf in psfs]
        example = asarray(psfs[0])
        self._xp = array_api_compat.array_namespace(example)
        self._like = example

    def portions(self, simulation: Simulation, first: int) -> Iterator[tuple[Inputs, np.ndarray]]:
        """Portions without end, from a galaxy on."""
        skip, at = first % DEVICE_PORTION, first - first % DEVICE_PORTION
        while True:
            models, truth = self.models(simulation, np.arange(at, at + DEVICE_PORTION))
            images = self.observed(models, truth["rms"], simulation, at)
            beside = (self._asarray(values) for values in _beside(simulation, self._views, truth))
            yield Inputs(images, *beside).taken(slice(skip, None)), _targets(simulation, truth)[skip:]
            skip, at = 0, at + DEVICE_PORTION

    def models(self, simulation: Simulation, indices: np.ndarray) -> tuple[Array, dict[str, np.ndarray]]:
        """Noiseless stamps [electrons/s], (N, 128, 128), and their truth: the galaxies of `draw_stamps`."""
        truths, numbers, generators = [], [], []
        for index in indices.tolist():
            truth, _, more = draw_truth(simulation, index)
            numbers.append(draw_psf(simulation, truth, more))
            truths.append(truth)
            generators.append(more)
        which = np.array(numbers)
        rows = np.array([scene.parameters(truth, simulation.instrument) for truth in truths])
        rms = np.array([truth["rms"] for truth in truths])
        models = self._drawn(rows, which)
        if simulation.centring:
            scales = self._centring_errors(models, rms)
            steps = [scene.centring_step(s, more) for s, more in zip(scales.tolist(), generators, strict=True)]
            rows[:, :2] += steps
            models = self._drawn(rows, which)
        columns = {name: np.array([t[name] for t in truths], float) for name in simulation.columns}
        columns["x"], columns["y"] = rows[:, 0], rows[:, 1]
        return models, columns

    def observed(self, models: Array, rms: np.ndarray, simulation: Simulation, seed: int) -> Array:
        """Stamps with noise, in units of it: what `observe` does, on the device."""
        n, height, width = models.shape
        level = self._asarray(rms.astype(np.float32))[:, None, None]
        rng = np.random.default_rng([simulation.seed, seed, 1, 1])
        sky = simulation.instrument.sky_residual * rms * rng.standard_normal(n)
        border = 2 * simulation.instrument.noise_passes
        white = self._normal(int(rng.integers(2**62)), (n, height + border, width + border))
        sky = self._asarray(sky.astype(np.float32))[:, None, None]
        return exposed(models, level, simulation.instrument, white, sky) / level

    def _drawn(self, rows: np.ndarray, which: np.ndarray) -> Array:
        parts = [np.flatnonzero(which == number) for number in range(len(self._renderers))]
        drawn = [render(rows[part]) for render, part in zip(self._renderers, parts, strict=True) if len(part)]
        order = np.argsort(np.concatenate(parts))
        return self._xp.take(self._xp.concat(drawn), self._asarray(order), axis=0)

    def _centring_errors(self, models: Array, rms: np.ndarray) -> np.ndarray:
        """`scene.centring_error` of each."""
        xp = self._xp
        inside = models > self._asarray((1.5 * rms).astype(np.float32))[:, None, None]
        light = xp.sum(xp.where(inside, models, xp.zeros_like(models)), axis=(1, 2))
        pixels = xp.clip(xp.sum(xp.astype(inside, models.dtype), axis=(1, 2)), 1, None)
        return scene.centring_scale(on_host(light / pixels), rms)

    def _normal(self, seed: int, shape: tuple[int, ...]) -> Array:
        if array_api_compat.is_torch_array(self._like):
            import torch

            device = self._like.device
            return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)
        if array_api_compat.is_jax_array(self._like):
            import jax

            with jax.default_device(next(iter(self._like.devices()))):
                return jax.random.normal(jax.random.key(seed % 2**31), shape, dtype="float32")
        return self._asarray(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))
