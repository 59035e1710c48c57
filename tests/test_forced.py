from dataclasses import replace

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table, vstack
from astropy.wcs import WCS
from conftest import flat, turned
from test_fit import PSF, QUIET, RMS, drizzled, galaxy, poor, stamp_of

from sersicnet.engine.fit import Fitter, Noise, Status
from sersicnet.engine.forced import fluxes
from sersicnet.engine.render import Renderer
from sersicnet.errors import InputError
from sersicnet.measuring.fitting import Fitting
from sersicnet.measuring.measure import fit, measure
from sersicnet.simulating.stamps import observe
from sersicnet.simulating.telescopes import F160W

FORCED = ["r_eff", "sersic_n", "ellipticity", "theta"]


def of_flux(flux, **where):
    row = galaxy(x=63.6, y=63.3, r_eff=4.0) if not where else galaxy(**where)
    row[2] = flux
    return row


def solved(rows, n, gain=F160W.exposure, seed=1):
    """Fluxes of the first galaxy in `n` stamps of the same galaxies."""
    rng, model = np.random.default_rng(seed), Renderer(PSF, 128)(np.array(rows)).sum(axis=0)
    camera = replace(QUIET, exposure=gain)
    stamps = np.array([observe(model, RMS, camera, rng) for _ in range(n)])
    fitter = Fitter(PSF, Noise(drizzled(), gain, 0.1), 128)
    many = [np.tile(rows[0], (n, 1)), np.zeros(stamps.shape, bool), [np.array(rows[1:]).reshape(-1, 7)] * n]
    return fluxes(fitter, stamps, np.full(n, RMS), *many)


@pytest.mark.parametrize(
    "rows", [[of_flux(0.0)], [of_flux(0.3), of_flux(3.0, x=66.4, y=64.3, r_eff=3.0, q=0.8, theta=-60)], [of_flux(30.0)]]
)
def test_fluxes_are_unbiased_within_their_errors(rows):
    """Without light, of a faint galaxy 3 pixels from a bright one, and with much photon noise."""
    n = 120
    found = solved(rows, n, gain=100.0)
    pull = (found.flux - rows[0][2]) / found.error
    assert (found.status == Status.CONVERGED).all()
    assert abs(pull.mean()) < 3 / np.sqrt(n)
    assert pull.var() == pytest.approx(1, abs=3 * np.sqrt(2 / n))
    assert found.chi2.mean() == pytest.approx(1, abs=0.01)


def test_equal_galaxies_have_no_fluxes_of_their_own():
    found = solved([of_flux(1.0), of_flux(1.0)], 1)
    assert found.status[0] == Status.NOT_CONVERGED
    assert np.isnan(found.flux[0])


def test_what_is_fixed_stays_and_the_rest_is_fitted():
    row = galaxy()
    start = poor(row)
    start[4:] = row[4:]
    start[4], start[5] = 0.3, 1.0  # at bounds, which bind free parameters only
    model = Renderer(PSF, 64)(start * np.array([1, 1, 1, 1 / 1.3, 1, 1, 1]))
    found = Fitter(PSF, Noise(drizzled()), 64, fixed=[0, 1, 4, 5])(model, np.array([RMS]), start[None])
    np.testing.assert_array_equal(found.parameters[0, [0, 1, 4, 5]], start[[0, 1, 4, 5]])
    assert found.parameters[0, 3] == pytest.approx(start[3] / 1.3, rel=1e-3)
    assert found.status[0] == Status.CONVERGED
    errors = np.diagonal(found.covariance[0])
    assert (errors[[0, 1, 4, 5]] == 0).all()
    assert (errors[[2, 3]] > 0).all()


def test_a_fixed_neighbour_gives_smaller_errors():
    row, other = galaxy(22.5), galaxy(22.0, x=38.0, y=35.0)
    stamp = stamp_of(row) + Renderer(PSF, 64)(other)[0]
    free, held = (
        Fitter(PSF, Noise(drizzled()), 64, fixed=[3, 4, 5, 6])(
            stamp[None], np.array([RMS]), row[None], None, [other[None]], [np.array([listed])]
        )
        for listed in (False, True)
    )
    assert held.covariance[0, 2, 2] < free.covariance[0, 2, 2]


@pytest.fixture(scope="module")
def band(tmp_path_factory):
    """A band of 14 galaxies, four of them in pairs three pixels apart and some without light: image, PSF and table."""
    path = tmp_path_factory.mktemp("band")
    rng = np.random.default_rng(3)
    n, size = 14, 420
    x, y = 60 + 100 * (np.arange(n) % 4), 60 + 100 * (np.arange(n) // 4)
    x[12:], y[12:] = x[:2] + 3, y[:2]
    flux = np.array([5.0, 2.0, *np.tile([0.0, 0.2, 4.0], 4)[:10], 2.0, -0.5])
    e, theta = rng.uniform(0, 0.7, n), rng.uniform(-90, 90, n)
    rows = np.column_stack([x, y, flux, rng.uniform(2, 5, n), rng.uniform(0.7, 3, n), 1 - e, theta])
    model = np.zeros((size, size), np.float32)
    render = Renderer(PSF, size)
    for row in rows:
        model += render(row)[0]
    image = model + rng.normal(0, RMS, model.shape)
    header = WCS(naxis=2)
    header.wcs.ctype, header.wcs.crval, header.wcs.crpix = ["RA---TAN", "DEC--TAN"], [150, 2], [200, 200]
    header.wcs.cdelt = [-0.06 / 3600, 0.06 / 3600]
    cards = header.to_header()
    cards["MAGZERO"] = 25.0
    fits.PrimaryHDU(image.astype(np.float32), cards).writeto(path / "band.fits")
    fits.PrimaryHDU(PSF.astype(np.float32)).writeto(path / "psf.fits")
    names = ("x", "y", "true", "r_eff_pix", "sersic_n", "ellipticity", "theta")
    table = Table(list((rows * [1, 1, 1, 1, 1, -1, 1] + [0, 0, 0, 0, 0, 1, 0]).T), names=names)
    return path / "band.fits", path / "psf.fits", table


@pytest.mark.filterwarnings("ignore::sersicnet.errors.SersicnetWarning")
def test_a_galaxy_that_is_listed_twice_has_the_flux_of_one(band):
    """Two fluxes of one model have no solution: neither entry had a flux, nor had the galaxy beside them."""
    image, psf, table = band
    options = {"psf": psf, "fix": FORCED, "model_error": 0.0}
    once, twice = (flat(fit, image, positions=one, **options) for one in (table, vstack([table, table[[0]]])))
    assert np.isfinite(once["flux"]).all()
    np.testing.assert_allclose(twice["flux"], np.append(once["flux"], once["flux"][0]), rtol=1e-6)


@pytest.mark.filterwarnings("ignore::sersicnet.errors.SersicnetWarning")
def test_a_galaxy_that_is_listed_twice_is_fitted_as_one_if_something_is_fixed(band):
    """The flux was split between the entries, without a flag."""
    image, psf, table = band
    bright = table[[0, 4, 12]]
    options = {"psf": psf, "fix": ["position"], "model_error": 0.0, "prior": "none"}
    once, twice = (flat(fit, image, positions=one, **options) for one in (bright, vstack([bright, bright[[2]]])))
    for name in ("flux", "flux_err", "r_eff_pix"):
        expected = np.append(once[name], once[name][2])
        np.testing.assert_allclose(np.asarray(twice[name]), np.asarray(expected), rtol=1e-4, err_msg=name)


@pytest.mark.filterwarnings("ignore::sersicnet.errors.SersicnetWarning")
def test_fluxes_of_a_band_have_their_sign(band, tmp_path):
    image, psf, table = band
    options = {"psf": psf, "positions": table, "fix": FORCED, "model_error": 0.0, "model": tmp_path / "m.fits"}
    found = flat(fit, image, tmp_path / "f.fits", **options)
    flux, error = np.array(found["flux"]), np.array(found["flux_err"])
    pull = (flux - table["true"]) / error
    assert np.abs(pull).max() < 3.5
    assert (error < 0.3).all()
    assert flux[13] < 0
    assert np.isnan(found["mag"][13])
    bright = flux > 5 * error
    np.testing.assert_allclose(found["mag"].value[bright], 25 - 2.5 * np.log10(flux[bright]), rtol=1e-6)
    np.testing.assert_allclose(found["flux_ujy"].value, flux * 10 ** (-0.4 * (25 - 23.9)), rtol=1e-5)
    np.testing.assert_allclose(found["r_eff_pix"].value, table["r_eff_pix"], rtol=1e-6)
    assert np.isnan(found["r_eff_pix_err"].value).all()
    assert found.meta["FIXED"] == "r_eff,sersic_n,ellipticity,theta"
    assert fits.getdata(tmp_path / "m.fits").sum() == pytest.approx(flux.sum(), rel=0.05)
    tiled = flat(fit, image, tile=200, **{**options, "model": None})
    np.testing.assert_allclose(tiled["flux"], flux, rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore::sersicnet.errors.SersicnetWarning")
def test_a_fit_that_keeps_the_shapes_moves_the_rest(band):
    image, psf, table = band
    table = table[(np.asarray(table["true"]) > 1) & (np.arange(len(table)) != 1)]  # beside the negative one
    table["mag"] = 25 - 2.5 * np.log10(table["true"])
    kept = ["position", "sersic_n", "ellipticity", "theta"]
    found = flat(fit, image, psf=psf, positions=table, fix=kept, model_error=0.0)
    for name in ("x", "y", *kept[1:]):
        np.testing.assert_allclose(found[name].value if name in "xytheta" else found[name], table[name], rtol=1e-6)
    for name, true in (("flux", table["true"]), ("r_eff_pix", table["r_eff_pix"])):  # of pairs 3 pixels apart, too
        error = np.array(found[f"{name}_err"])
        assert np.abs((np.array(found[name]) - true) / error).max() < 4
        assert (error < 0.5 * true).all()


@pytest.mark.filterwarnings("ignore::sersicnet.errors.SersicnetWarning")
def test_shapes_of_another_band_go_through_both_wcs(band):
    """A table with ra, dec, arcsec and position angles beside the pixels of a coarser, mirrored image."""
    image, psf, table = band
    wcs = WCS(fits.getheader(image))
    other = table.copy()
    other["ra"], other["dec"] = wcs.pixel_to_world_values(table["x"], table["y"])
    other["r_eff"], other["r_eff_pix"] = 0.06 * other["r_eff_pix"], 99.0
    other["pa"], other["theta"] = other["theta"] - 90, 12.0  # +x is west and +y is north
    other["x"], other["y"] = 1.0, 1.0
    found = flat(fit, image, psf=psf, positions=other, fix=FORCED, model_error=0.0)
    pull = (np.array(found["flux"]) - other["true"]) / found["flux_err"]
    assert np.abs(pull).max() < 3.5


@pytest.mark.parametrize(("parity", "angle"), [(1, 25.0), (-1, 160.0)])
def test_a_direction_is_the_inverse_of_a_position_angle(tmp_path, parity, angle):
    image = turned(tmp_path, parity, angle, dec=62.0)
    x, y, theta = np.array([10.0, 180.0, 90.0]), np.array([20.0, 15.0, 170.0]), np.array([-80.0, 3.0, 60.0])
    np.testing.assert_allclose(image.direction(x, y, image.position_angle(x, y, theta)), theta, atol=1e-4)
    assert np.isnan(image.direction(x, y, np.full(3, np.nan))).all()


def test_what_cannot_be_fixed_is_refused(band):
    image, psf, table = band
    with pytest.raises(InputError, match=r"`fix` names some of position, r_eff, .*; received 'radius'"):
        Fitting(fix=["radius"])
    with pytest.raises(InputError, match="`fix` keeps values of a table"):
        flat(fit, image, psf=psf, fix=FORCED)
    with pytest.raises(InputError, match="`fix` keeps values of a table"):
        flat(measure, image, psf=psf, positions=table, refine=True, fix=FORCED)
    bare = table["x", "y", "r_eff_pix"]
    with pytest.raises(InputError, match="it has no sersic_n, ellipticity, theta"):
        flat(fit, image, psf=psf, positions=bare, fix=FORCED)
