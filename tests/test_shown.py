"""Real galaxies bring the PSF and the noise of their image."""

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table

from sersicnet.errors import DatasetError
from sersicnet.image.psf import Psf
from sersicnet.image.psffile import write_psf
from sersicnet.image.views import psf_views
from sersicnet.schema import orientation
from sersicnet.simulating.telescopes import F160W, effective_psf
from sersicnet.training.labels import STAMPS, real_galaxies

SHOWN = frozenset({"stamps", "psf", "noise"})
pytestmark = pytest.mark.filterwarnings("ignore::sersicnet.errors.SersicnetWarning")


@pytest.fixture
def labels(field, tmp_path):
    """A table of labels of the field with a column psf; its path, and the PSF."""
    psf = Psf.of(effective_psf(F160W), "f160w.fits")
    write_psf(tmp_path / "f160w.fits", psf, (512, 512))
    truth = field[1]
    inside = (np.abs(truth["x"] - 256) < 180) & (np.abs(truth["y"] - 256) < 180)
    table = truth["x", "y", "mag", "r_eff_pix", "sersic_n", "ellipticity", "theta"][inside]
    table["image"], table["psf"] = str(field[0]), "f160w.fits"
    table.write(tmp_path / "labels.csv")
    return tmp_path / "labels.csv", psf


def test_labels_may_name_the_psf(labels):
    path, psf = labels
    galaxies = real_galaxies(path, inputs=SHOWN)
    inputs = galaxies.inputs(0, len(galaxies))
    np.testing.assert_allclose(inputs.psf, np.tile(psf_views(psf.image), (len(galaxies), 1, 1, 1)), atol=1e-5)
    assert np.exp(inputs.noise[:, 0]) == pytest.approx(2.2, abs=0.5)  # the correlation of drizzled noise
    assert (inputs.noise[:, 1:] == 0).all()  # the gain is not known


def test_labels_with_an_angle_have_an_orientation(labels):
    path, _ = labels
    table, galaxies = Table.read(path), real_galaxies(path)
    np.testing.assert_allclose(galaxies.orientation, orientation(table["ellipticity"], table["theta"]), atol=1e-6)


def test_networks_that_are_shown_stamps_need_no_psf(labels):
    galaxies = real_galaxies(labels[0], inputs=STAMPS)
    assert galaxies.inputs(0, 1).psf is None


def test_an_image_without_stars_needs_a_psf(labels):
    """One of an instrument in space has its usual one."""
    path, _ = labels
    table = Table.read(path)
    table.remove_column("psf")
    table.write(path, overwrite=True)
    assert np.isfinite(real_galaxies(path, inputs=SHOWN).inputs(0, 1).psf).all()
    image = str(table["image"][0])
    plain = path.with_name("plain.fits")
    with fits.open(image) as file:
        del file[1].header["INSTRUME"]
        file.writeto(plain)
    table["image"] = plain.name
    table.write(path, overwrite=True)
    with pytest.raises(DatasetError, match=r"shows no PSF .*name a file of the PSF in a column psf"):
        real_galaxies(path, inputs=SHOWN)


def test_galaxies_of_a_mosaic_bring_the_psf_of_its_stars(tmp_path):
    """Thirty stars and a few galaxies."""
    from sersicnet.engine.render import Renderer

    rng, psf = np.random.default_rng(2), effective_psf(F160W)
    image = rng.normal(0, 1, (700, 700)).astype(np.float32)
    draw = Renderer(psf, 128)
    places = [(80 + 105 * i, 80 + 105 * j) for i in range(6) for j in range(6)]
    for number, (x, y) in enumerate(places):
        shape = [3e4, 0.02, 1.0, 1.0, 0.0] if number % 6 else [3e4, 6.0, 1.0, 0.6, 20.0]
        centre = 63.5 + rng.uniform(-0.5, 0.5, 2)
        image[y - 64 : y + 64, x - 64 : x + 64] += draw(np.array([[*centre, *shape]]))[0]
    fits.PrimaryHDU(image, fits.Header({"MAGZERO": 25.0})).writeto(tmp_path / "m.fits")
    galaxies = real_galaxies(tmp_path / "m.fits", inputs=SHOWN)
    seen = galaxies.inputs(0, len(galaxies)).psf
    np.testing.assert_allclose(seen[0], psf_views(psf), atol=0.03 * psf_views(psf).max())
