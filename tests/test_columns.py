from types import SimpleNamespace

import numpy as np
import pytest
from conftest import turned
from test_fit import QUIET, RMS

from sersicnet.engine.fit import Status
from sersicnet.engine.render import Renderer
from sersicnet.errors import SersicnetWarning
from sersicnet.image.exposure import Exposure
from sersicnet.measuring import columns, scene
from sersicnet.measuring.outputs import Outputs
from sersicnet.measuring.plan import Plan, Work
from sersicnet.schema import Flag
from sersicnet.simulating.stamps import observe
from sersicnet.simulating.telescopes import F160W, effective_psf

ZERO = 25.0
NETWORK = SimpleNamespace(card={"errors": True, "orientation": True})


def values_of(n, **known):
    """Values of n places of which nothing is known but what is given."""
    empty = columns.no_values()._asdict()
    values = {name: np.full((n, *array.shape[1:]), np.nan) for name, array in empty.items()}
    values |= {"place": np.full(n, -1), "status": np.full(n, -1), "flags": np.zeros(n, int)}
    for name in ("x", "y", "x0", "y0"):
        values[name] = np.linspace(50, 60, n)
    detected = dict.fromkeys(scene.DETECTED, np.full(n, np.nan)) | known.pop("detected", {})
    values["detected"] = np.column_stack([detected[name] for name in scene.DETECTED])
    return scene.Values(**values | {name: np.array(array) for name, array in known.items()})


@pytest.fixture
def exposure(tmp_path):
    """Of 0.06 arcsec pixels, turned by 30 degrees, far from the equator."""
    image = turned(tmp_path, 1, 30.0, dec=62.0)
    return Exposure.open(image.path, zero_point=ZERO)


def table(exposure, values, *, network=NETWORK, fitted=False, detections=False, limits=True):
    return columns.catalogue(
        exposure, exposure, values, network=network, fitted=fitted, detections=detections, limits=limits
    )


def test_fluxes_of_a_network_are_of_its_magnitudes_and_of_the_pixels_where_nothing_is_detected(exposure):
    targets = np.tile([22.0, 5.0, 1.5, 0.3], (4, 1))
    light, noise = np.array([9.0, 2.0, -2.0, np.nan]), np.array([1.0, 1.5, 1.5, np.nan])
    known = {"aperture_flux": light, "aperture_error": noise}
    values = values_of(
        4, targets=targets, errors=0.1 * np.ones((4, 4)), snr=[20.0, 3.0, np.nan, np.nan], detected=known
    )
    found = table(exposure, values)
    flux = 10 ** (-0.4 * (22.0 - ZERO))
    np.testing.assert_allclose(found["flux"], [flux, 2.0, -2.0, np.nan], rtol=1e-6)
    np.testing.assert_allclose(found["flux_err"], [flux * 0.1 * 0.4 * np.log(10), 1.5, 1.5, np.nan], rtol=1e-6)
    np.testing.assert_allclose(
        found["flux_ujy"].value, np.array(found["flux"]) * 10 ** (-0.4 * (ZERO - 23.9)), rtol=1e-6
    )
    np.testing.assert_allclose(found["mag"].value, [22.0, 22.0, np.nan, 22.0])
    assert np.isnan(found["mag_err"][2])
    limit = ZERO - 2.5 * np.log10(3 * 1.5)
    np.testing.assert_allclose(found["mag_limit"].value, [np.nan, limit, limit, np.nan], rtol=1e-6)
    assert "mag_limit" not in table(exposure, values, limits=False).colnames
    assert values.targets[2, 0] == 22.0  # the model of the galaxy keeps it


def test_galaxies_that_a_network_has_no_number_for_are_flagged():
    targets = np.tile([22.0, 5.0, 1.5, 0.3], (4, 1))
    targets[1] = np.nan  # without data
    targets[2, 1], targets[3] = np.inf, np.nan
    values = values_of(4, targets=targets, flags=[0, Flag.NO_DATA, 0, Flag.EDGE])
    with pytest.warns(SersicnetWarning, match="no number for 2 of 3 galaxies"):
        assert not columns.flag_unanswered(values, SimpleNamespace(name="w"))
    assert values.flags.tolist() == [0, Flag.NO_DATA, Flag.RANGE_R_EFF, Flag.EDGE | Flag.OUT_OF_RANGE]
    for rows, expected in (([0, 1], False), ([1], False), ([1, 2, 3], True)):
        some = values_of(len(rows), targets=targets[rows], flags=[Flag.NO_DATA * (row == 1) for row in rows])
        assert columns.flag_unanswered(some, SimpleNamespace(name="w")) is expected


def test_fluxes_of_fits_are_theirs(exposure):
    flux, error = [10.0, -1.0, 2.0], [1.0, 0.5, 1.0]
    status = [Status.CONVERGED, Status.CONVERGED, Status.NOT_CONVERGED]
    values = values_of(3, flux=flux, flux_err=error, status=status, snr=[1.0, np.nan, 2.0])
    found = table(exposure, values, network=None, fitted=True)
    np.testing.assert_array_equal(found["flux"], flux)
    np.testing.assert_array_equal(found["flux_err"], error)
    np.testing.assert_allclose(found["mag_limit"].value, [np.nan, ZERO - 2.5 * np.log10(1.5), np.nan], rtol=1e-6)


def test_a_fit_that_began_at_a_network_has_the_flux_of_its_magnitude(exposure):
    targets, errors = np.array([[24.0, 5.0, 1.5, 0.3]]), np.array([[0.4, 1, 1, 0.1]])
    known = {"aperture_flux": [-1.0], "aperture_error": [0.5]}
    fit = {"targets": targets, "errors": errors, "flux": [2.5], "flux_err": [0.1], "status": [0], "detected": known}
    found = table(exposure, values_of(1, snr=[8.0], **fit), fitted=True)
    assert found["flux"][0] == pytest.approx(10 ** (-0.4 * (24.0 - ZERO)))
    assert found["flux_err"][0] == pytest.approx(found["flux"][0] * 0.4 * 0.4 * np.log(10))  # the PSF's included
    assert found["mag_limit"][0].value == pytest.approx(ZERO - 2.5 * np.log10(3 * found["flux_err"][0]))
    found = table(exposure, values_of(1, snr=[3.0], **fit), fitted=True)
    assert (found["flux"][0], found["flux_err"][0]) == (-1, 0.5)  # a fit is never negative


def test_errors_of_a_fitted_position_go_through_the_wcs(exposure):
    xx, yy, xy = 0.04, 0.01, 0.005
    found = table(exposure, values_of(1, position=[[xx, yy, xy]], place=[0]), network=None, fitted=True)
    np.testing.assert_allclose([found["x_err"][0].value, found["y_err"][0].value], np.sqrt([xx, yy]), rtol=1e-6)
    cos, sin = np.cos(np.radians(30)), np.sin(np.radians(30))
    east = cos**2 * xx + sin**2 * yy + 2 * sin * cos * xy
    north = sin**2 * xx + cos**2 * yy - 2 * sin * cos * xy
    np.testing.assert_allclose(found["ra_err"][0].value, 0.06 * np.sqrt(east), rtol=1e-4)
    np.testing.assert_allclose(found["dec_err"][0].value, 0.06 * np.sqrt(north), rtol=1e-4)


def test_a_position_of_a_table_has_no_error(exposure):
    known = dict(zip(("a", "b", "area"), ([2.0], [1.0], [40.0]), strict=True))
    for place, has in ((-1, True), (0, False)):
        found = table(exposure, values_of(1, place=[place], snr=[10.0], theta=[0.0], detected=known))
        assert np.isfinite(found["x_err"][0].value) == has
        assert np.isfinite(found["ra_err"][0].value) == has
    assert found["y_err"].unit == "pix"


def test_columns_of_no_places_are_those_of_some(exposure):
    none, some = table(exposure, columns.no_values()), table(exposure, values_of(2, flags=[0, Flag.EDGE]))
    assert none.colnames == some.colnames
    assert len(none) == 0
    assert "corr_mag_r_eff" in some.colnames
    plain = table(exposure, columns.no_values(), network=SimpleNamespace(card={"errors": False}))
    assert not {"mag_err", "r_eff_p16", "corr_mag_r_eff", "mu_mean_err", "theta_err"} & set(plain.colnames)
    assert {"mu_mean", "flux_err"} <= set(plain.colnames)


def test_errors_of_centroids_are_their_scatter():
    side, n, psf = 72, 100, effective_psf(F160W, 41)
    rng, draw = np.random.default_rng(3), Renderer(psf, side)
    middle = side / 2 - 0.5 + rng.uniform(-0.5, 0.5, (n, 2))
    cells = np.array([draw(np.array([x, y, 1.2, 3.5, 1.2, 0.7, 30.0]))[0] for x, y in middle])
    image = cells.reshape(10, 10, side, side).swapaxes(1, 2).reshape(10 * side, 10 * side)
    noisy = observe(image, RMS, QUIET, rng)
    exposure = Exposure.of_arrays(noisy, zero_point=ZERO)
    with pytest.warns(match="no celestial WCS"):
        plan = Plan.of(
            exposure, network=None, psf=None, fitting=None, resample=False, positions=None, outputs=Outputs(),
            work=Work(), command="",
        )  # fmt: skip
    found = plan.result().table
    truth = middle + side * np.column_stack([np.arange(n) % 10, np.arange(n) // 10])
    for k, name in enumerate("xy"):
        nearest = np.hypot(found["x"].value - truth[:, :1], found["y"].value - truth[:, 1:]).argmin(axis=1)
        one = found[nearest]
        pull = (one[name].value - truth[:, k]) / one[f"{name}_err"].value
        assert np.quantile(np.abs(pull), 0.683) == pytest.approx(1, abs=0.25)
