import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import tiny_recipe

from sersicnet.dataset import Dataset
from sersicnet.errors import DatasetError, InputError
from sersicnet.simulating import world
from sersicnet.simulating.simulate import simulate
from sersicnet.training import card, train
from sersicnet.training.recipe import RECIPES
from sersicnet.training.sets import Sets, border

RECIPE = replace(RECIPES["dann"], epochs=1)


@pytest.fixture(scope="module")
def world_dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("world") / "world.h5"
    return simulate(path, world.simulation("any", 48, seed=6), workers=1, command="simulate --telescopes any")


def twice(path, tmp_path):
    """A set, and a copy of it."""
    return [path, shutil.copy(path, tmp_path / "copy.h5")]


def test_rows_train_first_and_validate_last(small_dataset, tmp_path):
    with Dataset(small_dataset) as one, Sets(twice(small_dataset, tmp_path)) as both:
        n, middle = len(one), border(len(one))
        expected = np.concatenate([np.arange(middle)] * 2 + [np.arange(middle, n)] * 2)
        assert (len(both), both.border) == (2 * n, 2 * middle)
        np.testing.assert_array_equal(both.targets, one.targets[expected])
        np.testing.assert_array_equal(both.rows, expected)
        whole, part = both.inputs(0, 2 * n), both.inputs(middle - 8, middle + 24)
        np.testing.assert_array_equal(whole.stamps, one.inputs(0, n).stamps[expected])
        np.testing.assert_array_equal(part.stamps, whole.stamps[middle - 8 : middle + 24])
        assert both.inputs(0, 0).n == 0
        rows = np.concatenate([rows for _, rows in both.batches(16, 0, both.border, np.random.default_rng(0))])
        np.testing.assert_array_equal(np.sort(rows), np.arange(both.border))


def test_a_selection_is_even_and_holds_the_inputs_of_its_rows(small_dataset, tmp_path):
    with Sets(twice(small_dataset, tmp_path)) as both:
        faint = float(np.median(both.mag))
        some = both.selected(faint, 10)
        rows = np.flatnonzero(both.mag <= faint)[np.linspace(0, (both.mag <= faint).sum() - 1, 10).astype(int)]
        np.testing.assert_array_equal(some.targets, both.targets[rows])
        np.testing.assert_array_equal(some.inputs(3, 4).stamps, both.inputs(int(rows[3]), int(rows[3]) + 1).stamps)
        with pytest.raises(DatasetError, match="no galaxy brighter than mag 1"):
            both.selected(1.0, None)


def test_psfs_of_many_telescopes_stay_those_of_their_stamps(world_dataset, tmp_path):
    with Dataset(world_dataset) as one, Sets(twice(world_dataset, tmp_path)) as both:
        numbers = both.truth["psf"].astype(int)
        np.testing.assert_array_equal(both.views[numbers], both.inputs(0, len(both)).psf)
        assert numbers.max() == 2 * len(one.views) - 1
        doubled, once = (card.domain_of(data, tiny_recipe())["psf"] for data in (both, one))
        for name, between in once.items():
            np.testing.assert_allclose(doubled[name], between, atol=1e-3)


def test_sets_of_other_kinds_are_refused(small_dataset, world_dataset, tmp_path):
    with pytest.raises(DatasetError, match=r"of one kind; .* different telescopes and pixel scales"):
        Sets([small_dataset, world_dataset])
    with pytest.raises(DatasetError, match="there is none"):
        train.train([small_dataset, tmp_path / "none.h5"], tmp_path / "w", network="dann", recipe=RECIPE)
    with pytest.raises(InputError, match="like those of one training set; received 2"):
        train.train([small_dataset] * 2, tmp_path / "w", network="dann", recipe=RECIPE, on_the_fly=True)
    assert not list(tmp_path.iterdir())


def test_a_set_is_given_once(small_dataset, tmp_path):
    (tmp_path / "link.h5").symlink_to(small_dataset)
    for again in (small_dataset, str(small_dataset), tmp_path / "link.h5"):
        with pytest.raises(DatasetError, match=f"is given once; received {small_dataset.name} twice"):
            Sets([small_dataset, again])


def test_the_card_has_the_commands_of_all_sets(small_dataset, tmp_path, tiny_network):
    done = train.train(twice(small_dataset, tmp_path), tmp_path / "w", network=tiny_network, recipe=RECIPE)
    assert done.card["data"]["n"] == 128
    assert done.card["data"]["command"] == "simulate` and `simulate"
    assert "`simulate` and `simulate`" in (tmp_path / "w" / "README.md").read_text()
