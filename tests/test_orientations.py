import json
import shutil

import numpy as np

from sersicnet import weights
from sersicnet.engine.render import Renderer
from sersicnet.image.views import psf_views
from sersicnet.orientations import average, oriented, turned
from sersicnet.schema import Inputs, angle, noise_numbers, orientation
from sersicnet.simulating.telescopes import F160W, effective_psf


def test_the_eight_orientations_differ():
    stamps = np.repeat(np.arange(128 * 128, dtype=np.float32).reshape(1, 128, 128), 8, axis=0)
    views = oriented(Inputs(stamps), np.arange(8)).stamps
    assert len({tuple(stamp[[0, 0, -1, -1], [0, -1, 0, -1]]) for stamp in views}) == 8
    np.testing.assert_array_equal(views[0], stamps[0])


def test_the_angle_turns_with_the_stamp():
    ellipse = Renderer(effective_psf(F160W))(np.array([[63.5, 63.5, 1e3, 8.0, 1.0, 0.5, 30.0]]))
    which = np.arange(8)
    stamps = oriented(Inputs(np.repeat(ellipse, 8, axis=0)), which).stamps
    y, x = np.indices((128, 128)) - 63.5
    plus, cross = ((stamps * moment).sum(axis=(1, 2)) for moment in (x**2 - y**2, 2 * x * y))
    components = turned(np.repeat(orientation([0.5], [30.0]), 8, axis=0), which)
    np.testing.assert_allclose(angle(components), np.degrees(np.arctan2(cross, plus)) / 2, atol=0.1)


def test_the_views_of_a_psf_turn_with_the_stamp():
    psf = np.random.default_rng(0).random((8, 4, 32, 32)).astype(np.float32)
    inputs = oriented(Inputs(np.repeat(psf[:, 0], 4, axis=1).repeat(4, axis=2), psf), np.arange(8))
    np.testing.assert_array_equal(inputs.psf[:, 0], inputs.stamps[:, ::4, ::4])


def answers(inputs):
    """Of a network that is right on average over four turns, and wrong by the brightness of a corner."""
    corner = inputs.stamps[:, 0, 0].astype(float)
    out = np.zeros((inputs.n, 17))
    out[:, 0], out[:, 1], out[:, 2] = -8 + corner, 3 * np.exp(corner), 2 * np.exp(-corner)
    out[:, 3], out[:, 4], out[:, 5:8], out[:, 8:14], out[:, 16] = 0.4 + corner, 0.02, [0.3, 0.2, 0.1], 0.5, 0.03
    out[:, 14] = inputs.stamps[:, 64, 64]  # turns with the image
    return out


def test_an_average_over_quarter_turns_has_no_direction():
    stamps = np.zeros((2, 128, 128), np.float32)
    stamps[:, 0, 0], stamps[:, 0, -1], stamps[:, -1, 0] = 0.3, -0.2, -0.1
    inputs = Inputs(stamps, np.zeros((1, 4, 32, 32), np.float32), np.zeros((2, 3), np.float32))
    out = answers(inputs)
    out[1, 4] = 0.2
    faint = out[1].copy()
    average(answers, inputs, out, 0.05)
    np.testing.assert_allclose(out[0, :4], [-8, 3, 2, 0.4])
    relative = [np.mean(0.1 / np.exp(sign * np.array([0.3, -0.2, -0.1, 0]))) for sign in (1, -1)]
    np.testing.assert_allclose(out[0, 4:8], [0.02, 3 * relative[0], 2 * relative[1], 0.1])
    np.testing.assert_array_equal(out[1], faint)


def test_components_are_turned_back():
    components = np.array([0.3, -0.2])

    def network(inputs):
        out = np.ones((inputs.n, 17))
        quarter = inputs.stamps[:, 0, 0] + 2 * inputs.stamps[:, 0, -1] + 3 * inputs.stamps[:, -1, -1]
        out[:, 14:16], out[:, 4] = components * (1 - 2 * (quarter[:, None] % 2)), 0.01
        return out

    stamps = np.zeros((1, 128, 128), np.float32)
    stamps[0, -1, 0] = 1
    out = network(Inputs(stamps))
    average(network, Inputs(stamps), out, 0.05)
    np.testing.assert_allclose(out[0, 14:16], components)


def test_shipped_weights_answer_alike_however_a_bright_galaxy_is_turned():
    shipped, psf = weights.load("fovea"), effective_psf(F160W)
    galaxy = Renderer(psf)(np.array([[63.2, 63.9, 3e3, 6.0, 2.0, 0.6, 20.0]]))
    stamps = galaxy + np.random.default_rng(0).normal(size=galaxy.shape).astype(np.float32)
    inputs = Inputs(stamps.astype(np.float32), psf_views(psf)[None], noise_numbers([1.0], [np.nan]))
    found = [shipped.predict(oriented(inputs, np.array([turns]))) for turns in range(4)]
    for one, turns in zip(found, range(4), strict=True):
        np.testing.assert_allclose(one.targets, found[0].targets, rtol=1e-4)
        np.testing.assert_allclose(one.errors, found[0].errors, rtol=1e-3)
        off = (one.theta - found[0].theta - 90 * turns + 90) % 180 - 90
        np.testing.assert_allclose(off, 0, atol=0.01)


def test_weights_whose_card_does_not_ask_for_it_answer_once(psf_weights, tmp_path):
    rng = np.random.default_rng(1)
    stamps, views = rng.normal(size=(3, 128, 128)), rng.random((3, 4, 32, 32)) * 0.01
    inputs = Inputs(stamps.astype(np.float32), views.astype(np.float32), np.zeros((3, 3), np.float32))
    once = weights.load(psf_weights).predict(inputs)
    shutil.copytree(psf_weights, tmp_path / "w")
    card = json.loads((tmp_path / "w" / "card.json").read_text())
    weights.rewrite_card(tmp_path / "w", {**card, "quarter_turns": 1e9})
    averaged = weights.load(tmp_path / "w").predict(inputs)
    assert (np.abs(averaged.targets - once.targets) > 1e-6).any()
    four = [weights.load(psf_weights).predict(oriented(inputs, np.full(3, turns))).targets for turns in range(4)]
    np.testing.assert_allclose(averaged.targets[:, 0], np.mean(four, axis=0)[:, 0], rtol=1e-5)
