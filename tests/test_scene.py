from types import SimpleNamespace

import numpy as np
import pytest

from sersicnet.image import detect
from sersicnet.simulating import neighbours as scene
from sersicnet.simulating.neighbours import Camera
from sersicnet.simulating.stamps import observe
from sersicnet.simulating.telescopes import F160W, effective_psf


@pytest.fixture(scope="module")
def camera():
    return Camera(effective_psf(F160W, 101))


@pytest.mark.parametrize("radius", [3.0, 12.0])
@pytest.mark.parametrize("at", [(90.4, 100.2), (2.3, 189.6), (-20.0, 50.0)])
def test_a_neighbour_lies_where_it_should(camera, radius, at):
    other = np.array([*at, 20.0, radius, 1.0, 0.7, 30.0])
    added = np.zeros((scene.SIZE, scene.SIZE), np.float32)
    scene._add(added, other, camera, 1000.0)
    whole = camera.render(other, scene.SIZE)
    y, x = np.indices(added.shape)
    near = np.maximum(abs(x - at[0]), abs(y - at[1])) < 30
    np.testing.assert_allclose(added[near], whole[near], atol=2e-3 * max(whole.max(), 0.01))


def cut(camera, monkeypatch, others, galaxy=None, seed=0, centring=False):
    """Cut a galaxy in the middle of a scene with given neighbours."""
    galaxy = np.array([96.2, 95.9, 15.0, 5.0, 1.0, 0.7, 30.0]) if galaxy is None else galaxy
    drawn = iter(others)
    monkeypatch.setattr(scene, "draw_neighbours", lambda *arguments: next(drawn))
    rng = np.random.default_rng(seed)
    model = camera.render(galaxy, scene.SIZE)
    return scene.cut_among_neighbours(
        model, galaxy, camera, F160W, lambda m: observe(m, 0.003, F160W, rng), rng, centring
    )


def neighbour(x, y, mag, radius=4.0):
    """A neighbour at a place of the scene."""
    place = {"x": x + scene.MARGIN, "y": y + scene.MARGIN, "theta": 0.0}
    return {"mag": mag, "r_eff_pix": radius, "sersic_n": 1.0, "ellipticity": 0.1, **place}


def test_the_galaxy_is_cut_about_its_detection(camera, monkeypatch):
    stamp = cut(camera, monkeypatch, [[]])
    assert 62.5 < stamp.x[0] < 64.5
    peak = np.unravel_index(np.argmax(stamp.pixels[0]), (128, 128))
    assert abs(peak[1] - stamp.x[0]) <= 1.5
    assert abs(peak[0] - stamp.y[0]) <= 1.5


def test_a_neighbour_that_is_found_is_replaced(camera, monkeypatch):
    alone = cut(camera, monkeypatch, [[]])
    among = cut(camera, monkeypatch, [[neighbour(130.0, 96.0, 22.0)]])
    assert among.neighbours[0] > alone.neighbours[0] + 0.01
    assert among.replaced[0][60:68, 95:100].all()
    assert np.abs(among.pixels[0][60:68, 95:100]).max() < 0.02


def test_a_galaxy_that_is_swallowed_has_other_neighbours(camera, monkeypatch):
    faint = np.array([96.2, 95.9, 3.0, 4.0, 1.0, 0.7, 30.0])
    swallowed, free = [neighbour(99.0, 96.0, 19.0, 8.0)], []
    stamp = cut(camera, monkeypatch, [swallowed, swallowed, free], faint)
    assert stamp.pixels[0].max() < 0.2
    stamp = cut(camera, monkeypatch, [swallowed] * scene._MOST_ATTEMPTS, faint)
    assert stamp.pixels[0].max() < 0.2


def test_an_undetected_galaxy_is_cut_about_its_own_centre(camera, monkeypatch):
    faint = np.array([96.2, 95.9, 1e-3, 4.0, 1.0, 0.7, 30.0])
    stamp = cut(camera, monkeypatch, [[]], faint)
    assert (stamp.x[0], stamp.y[0]) == pytest.approx((63.2, 63.9))
    scattered = cut(camera, monkeypatch, [[]], faint, centring=True)
    assert abs(scattered.x[0] - 63.5) + abs(scattered.y[0] - 63.5) > 0.3


def test_detections_scatter_as_the_description_says(camera):
    """The compact description of `centring_error` against the detector itself."""
    rng = np.random.default_rng(1)
    galaxy = np.array([96.2, 95.9, 4.0, 5.0, 1.0, 0.7, 30.0])
    model = camera.render(galaxy, scene.SIZE)
    offsets = []
    for _ in range(12):
        observed = observe(model, 0.003, F160W, rng)
        _, found = detect.Detector()(observed, np.zeros(observed.shape, bool))
        label = found.segmentation[96, 96] - 1
        offsets += [found.x[label] - galaxy[0], found.y[label] - galaxy[1]]
    expected = scene.centring_error(model, 0.003)
    assert 0.4 * expected < 1.48 * np.median(np.abs(offsets)) < 2.5 * expected


def test_a_detection_that_is_farther_off_than_the_margin_is_not_the_galaxys():
    """A stamp centred on it would leave the scene: `simulate` ended with an error there, once in 180,000 stamps."""
    middle = (scene.SIZE - 1) / 2
    galaxy = np.array([middle, middle, 1e4, 64.0, 4.0, 0.9, 0.0])
    everywhere = np.ones((scene.SIZE, scene.SIZE), int)
    for off, label in ((30.0, 1), (33.0, -1)):
        found = SimpleNamespace(segmentation=everywhere, x=np.array([middle + off]), y=np.array([middle]))
        assert scene._own_label(found, galaxy, []) == label
