"""Fixtures that several modules use."""

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table

from sersicnet.image import mosaic
from sersicnet.image.pixels import Held, Pixels
from sersicnet.image.regions import Threshold
from sersicnet.image.sky import estimate_sky
from sersicnet.simulating.field import Field, simulate_field
from sersicnet.simulating.recipe import Simulation
from sersicnet.simulating.simulate import simulate


@pytest.fixture(scope="session")
def field(tmp_path_factory):
    """A small simulated mosaic of bright galaxies: its path and its truth."""
    path = tmp_path_factory.mktemp("field") / "field.fits"
    sky = Field(512, n=14, seed=11, mag=(18.0, 22.0))
    image, truth = simulate_field(path, sky)
    return image, Table.read(truth)


@pytest.fixture(scope="session")
def held(field):
    """The field in memory."""
    image = mosaic.read_image(field[0])
    return Held(Pixels(image.data, image.without_data()))


@pytest.fixture(scope="session")
def mesh(held):
    """Sky and noise of the field."""
    return estimate_sky(held, Threshold())


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory):
    """A dataset of 64 stamps."""
    path = tmp_path_factory.mktemp("data") / "small.h5"
    return simulate(path, Simulation(64, seed=5), workers=1, command="simulate")


@pytest.fixture
def blank(tmp_path):
    """Write a FITS image of white noise; returns a function of (name, header cards, data)."""

    def write(name="blank.fits", cards=None, data=None):
        if data is None:
            data = np.random.default_rng(0).normal(0, 1, (200, 220)).astype(np.float32)
        path = tmp_path / name
        fits.PrimaryHDU(data, fits.Header({"MAGZERO": 25.0} if cards is None else cards)).writeto(path)
        return path

    return write


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory, small_dataset):
    """Weights of one epoch on 64 stamps, which are shown no PSF: they work, and know nothing."""
    from sersicnet.training.train import train

    path, recipe = tmp_path_factory.mktemp("weights") / "tiny", tiny_recipe()
    train(small_dataset, path, network="fovea-fixed", recipe=recipe, seed=1, test=small_dataset, command="train")
    return path


def tiny_recipe(**changes):
    from dataclasses import replace

    from sersicnet.training.recipe import RECIPES

    return replace(RECIPES["fovea"], **{"epochs": 1, "batch": 16, **changes})


def shown(stamps):
    """What networks are shown of stamps: through the PSF of F160W, and with its noise."""
    from sersicnet.image.views import psf_views
    from sersicnet.schema import Inputs, noise_numbers
    from sersicnet.simulating.telescopes import F160W, effective_psf

    n = len(stamps)
    views = np.repeat(psf_views(effective_psf(F160W))[None], n, axis=0)
    return Inputs(stamps, views, noise_numbers(np.full(n, 2.2), np.full(n, 10.0)))


def turned(tmp_path, parity, angle, dec=2.0, name="turned.fits"):
    """An image whose +y is at `angle` east of north, and whose pixels are 0.06 arcsec; its Image."""
    a, scale = np.radians(angle), 0.06 / 3600
    matrix = scale * np.array([[parity * np.cos(a), np.sin(a)], [-parity * np.sin(a), np.cos(a)]])
    cards = {
        "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 0.0, "CRVAL2": dec, "CRPIX1": 100.0, "CRPIX2": 100.0,
        "CD1_1": matrix[0, 0], "CD1_2": matrix[0, 1], "CD2_1": matrix[1, 0], "CD2_2": matrix[1, 1],
    }  # fmt: skip
    fits.PrimaryHDU(np.zeros((200, 200), np.float32), fits.Header(cards)).writeto(tmp_path / name)
    return mosaic.read_image(tmp_path / name)


def tiny_core():
    """A network of a thousandth of the work."""
    from sersicnet import networks
    from sersicnet.networks import keras, ops

    stamps = networks.inputs().stamps
    x = keras.layers.Dense(5, activation="tanh", name="features")(ops.mean(stamps, axis=1))
    return keras.Model(stamps, keras.layers.Dense(4)(x), name="dann")


@pytest.fixture
def tiny_network(monkeypatch):
    """Put `tiny_core` in the place of ``dann``; returns its name."""
    from sersicnet import networks

    monkeypatch.setitem(networks.ARCHITECTURES, "dann", networks.Architecture(tiny_core, log=False, spreads=False))
    return "dann"


def flat(verb, image, catalogue=None, *, refine=False, **options):
    """Call `measure`, `plan` or `fit` with the options of an exposure, of fits, outputs and work side by side."""
    from dataclasses import fields

    from sersicnet.image.exposure import Exposure
    from sersicnet.measuring.fitting import Fitting
    from sersicnet.measuring.measure import fit
    from sersicnet.measuring.outputs import Outputs
    from sersicnet.measuring.plan import Work

    def taken(names):
        return {name: options.pop(name) for name in names if name in options}

    exposure = taken(
        ("hdu", "noise", "noise_kind", "noise_includes", "noise_as_given", "mask", "zero_point", "pixel_scale")
    )
    own = {kind: taken({field.name for field in fields(kind)} - {"report"}) for kind in (Fitting, Outputs, Work)}
    if "page" in options:  # `report` is what receives the progress
        own[Outputs]["report"] = options.pop("page")
    if catalogue is not None:
        own[Outputs]["catalogue"] = catalogue
    if verb is fit:
        options["fitting"] = Fitting(**{"prior": "none", **own[Fitting]})
    elif refine:
        options["refine"] = Fitting(**own[Fitting])
    image = Exposure.open(image, **exposure)
    return verb(image, outputs=Outputs(**own[Outputs]), work=Work(**own[Work]), **options)


@pytest.fixture(scope="session")
def psf_weights(tmp_path_factory, tiny_weights):
    """Weights of any telescope that are shown PSF and noise, of random numbers: they work, and know nothing."""
    from sersicnet import networks, weights
    from sersicnet.networks import keras, ops

    def build():
        given, dense = networks.inputs(), keras.layers.Dense
        sums = dense(17)(0.01 * ops.mean(given.stamps, axis=1)) + dense(17)(10.0 * keras.layers.Flatten()(given.psf))
        return keras.Model({port.name: port for port in given}, sums + 0.01 * dense(17)(given.noise), name="fovea")

    keras.utils.set_random_seed(5)
    known = networks.ARCHITECTURES["fovea"]
    architecture, core = known._replace(build=build), build()
    model = networks.with_units(architecture, core, np.array([-8, 1.5, 0.5, 0.3]), np.ones(4), error_scale=np.ones(4))
    card = weights.load(tiny_weights).card
    ranges = {"mag": [-20, 0], "r_eff_pix": [0.1, 64], "sersic_n": [0.3, 6.2], "ellipticity": [0, 0.97]}
    psf = {"fwhm": [1.0, 8.0], "light_1": [0.5, 1.0], "light_2": [0.6, 1.0], "ellipticity": [0.0, 0.3]}
    own = {
        "name": "any", "network": "fovea", "parameters": core.count_params(), "errors": True, "orientation": True,
        "inputs": sorted(known.inputs), "calibration": None,
        "domain": {
            "instrument": "any telescope", "telescopes": "any", "psf": psf, "correlation": [1.0, 2.9], "ranges": ranges
        },
    }  # fmt: skip
    return weights.save(tmp_path_factory.mktemp("psf_weights") / "any", model, {**card, **own}).path
