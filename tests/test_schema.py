import numpy as np
from astropy import units
from astropy.io.votable.ucd import check_ucd

from sersicnet import schema
from sersicnet.schema import INPUT_SHAPES, Inputs


def test_relative_magnitude_comes_back():
    relative = schema.relative_magnitude(22.5, 25.9463, 0.003)
    assert np.isclose(relative + schema.absolute_magnitude_of_rms(25.9463, 0.003), 22.5)


def test_relative_magnitude_does_not_depend_on_units():
    here = schema.relative_magnitude(22.5, 25.0, 0.003)
    assert np.isclose(schema.relative_magnitude(22.5, 27.5, 0.03), here)


def test_relative_magnitude_without_noise_is_nan():
    assert np.isnan(schema.relative_magnitude(22.5, 25.0, 0.0))
    assert np.isnan(schema.relative_magnitude(22.5, 25.0, np.nan))


def test_encode_takes_logarithms_where_targets_say_so():
    encoded = schema.encode(np.array([[-10.0, np.e, np.e**2, 0.3]]))
    np.testing.assert_allclose(encoded, [[-10, 1, 2, 0.3]])


def test_deviations_of_radius_and_index_are_those_of_logarithms():
    value, error = np.array([-10.0, 5.0, 2.0, 0.3]), np.array([0.1, 1.0, 0.5, 0.02])
    truth = np.array([-10.2, 5 * np.exp(-0.2), 2 * np.exp(0.5), 0.27])
    np.testing.assert_allclose(schema.pulls(value, error, truth), [2, 1, -2, 1.5])
    assert np.isnan(schema.pulls(np.full(4, np.nan), error, truth)).all()


def test_flags_are_single_bits_with_a_meaning():
    values = [flag.value for flag in schema.Flag]
    assert values == [1 << i for i in range(len(values))]
    assert set(schema.FLAG_MEANING) == set(schema.Flag)


def test_columns_have_valid_units_and_ucds():
    for column in schema.COLUMNS:
        units.Unit(column.unit)
        assert check_ucd(column.ucd, check_controlled_vocabulary=True), column
        assert column.description.isascii()
        assert len(column.description) < 68


def test_every_target_is_a_column():
    assert set(schema.TARGET_NAMES) <= set(schema.COLUMN)


def test_inputs_are_handled_row_by_row():
    stamps = np.arange(3 * 128 * 128, dtype=np.float32).reshape(3, 128, 128)
    inputs = Inputs(stamps=stamps.copy())
    assert inputs.n == 3
    np.testing.assert_array_equal(inputs.taken(np.array([2, 0])).stamps, stamps[[2, 0]])
    np.testing.assert_array_equal(Inputs.concatenated([inputs, inputs.taken(slice(1))]).stamps, stamps[[0, 1, 2, 0]])
    inputs.put(np.array([1]), inputs.taken(slice(1)))
    np.testing.assert_array_equal(inputs.stamps[1], stamps[0])
    inputs.stamps[2, 5, 5] = np.inf
    assert inputs.finite().tolist() == [True, True, False]
    assert Inputs.empty(0).finite().shape == (0,)
    assert {name: field.shape[1:] for name, field in Inputs.empty(2)._asdict().items()} == INPUT_SHAPES._asdict()
