import numpy as np
import pytest

from sersicnet import networks
from sersicnet.networks import keras, ops
from sersicnet.schema import encode
from sersicnet.training import losses
from sersicnet.training.device import jit

STAMPS = np.random.default_rng(0).normal(size=(4, 128, 128)).astype(np.float32)


@pytest.mark.parametrize(("name", "millions"), [("fovea", 1.40), ("tl", 1.94), ("dann", 1.22)])
def test_size_is_as_documented(name, millions):
    model = networks.ARCHITECTURES[name].build()
    assert model.count_params() / 1e6 == pytest.approx(millions, abs=0.01)


def test_fovea_takes_few_multiplications():
    assert networks.multiply_adds(networks.fovea()) / 1e6 == pytest.approx(68, abs=1)


@pytest.mark.parametrize("name", networks.ARCHITECTURES)
def test_a_few_steps_learn_a_few_stamps(name):
    keras.utils.set_random_seed(1)
    model = networks.ARCHITECTURES[name].build()
    width = model.output_shape[1]
    target = np.random.default_rng(1).normal(size=(4, width)).astype(np.float32)
    model.compile(keras.optimizers.Adam(1e-3), "mse", jit_compile=jit())
    losses = [float(model.train_on_batch(STAMPS, target)) for _ in range(12)]
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.7 * losses[0]


def test_extreme_pixels_stay_finite():
    stamps = STAMPS * np.array([0, 1, 1e3, 1e6], np.float32)[:, None, None]
    for architecture in networks.ARCHITECTURES.values():
        assert np.isfinite(ops.convert_to_numpy(architecture.build()(stamps))).all()


def flat_core():
    stamps = keras.Input((128, 128))
    return keras.Model(stamps, keras.layers.Dense(8, use_bias=False)(ops.mean(stamps, axis=1)))


def test_units_undo_the_standardisation():
    physical = np.array([[-9.0, 7.0, 2.5, 0.3]])
    encoded = encode(physical)[0]
    mean, std, scale = np.array([-8, 1, 0.5, 0.5]), np.array([3, 1, 0.8, 0.25]), np.array([1, 2, 3, 4.0])
    kernel = np.zeros((128, 8), np.float32)
    kernel[0] = [*(encoded - mean) / std, *np.log([0.1, 0.2, 0.3, 0.4])]
    core = flat_core()
    core.set_weights([kernel])
    one = np.zeros((1, 128, 128), np.float32)
    one[:, :, 0] = 1
    architecture = networks.Architecture(flat_core, log=True, spreads=True)
    model = networks.with_units(architecture, core, mean, std, error_scale=scale)
    out = ops.convert_to_numpy(model(one))[0]
    np.testing.assert_allclose(out[:4], physical[0], rtol=1e-5)
    sigma = np.array([0.1, 0.2, 0.3, 0.4]) * std * scale
    np.testing.assert_allclose(out[4:], sigma * [1, 7.0, 2.5, 1], rtol=1e-5)


def test_a_trained_network_loads_again_without_its_loss(tmp_path):
    architecture = networks.Architecture(flat_core, log=True, spreads=True)
    core = flat_core()
    core.compile("adam", loss=losses.spread_loss)
    networks.with_units(architecture, core, np.zeros(4), np.ones(4)).save(tmp_path / "n.keras")
    assert not networks.load_model(tmp_path / "n.keras").get_layer("core").compiled


def test_the_reversal_is_identity_forward_and_minus_lambda_backward():
    """The gradient is found by finite differences of what each head sees."""
    x, strength = keras.Input((3,)), keras.Input((1,))
    reversed_x = (1 + strength) * ops.stop_gradient(x) - strength * x
    model = keras.Model([x, strength], reversed_x)
    values, strengths = np.ones((2, 3), np.float32), np.array([[0.0], [0.7]], np.float32)
    np.testing.assert_allclose(ops.convert_to_numpy(model([values, strengths])), values, rtol=1e-6)

    kernel = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    inner = keras.Input((1,))
    out = kernel(inner)
    lam = keras.Input((1,))
    trained = keras.Model([inner, lam], (1 + lam) * ops.stop_gradient(out) - lam * out)
    trained.compile(keras.optimizers.SGD(1.0), loss=lambda true, predicted: ops.mean(predicted))
    trained.train_on_batch([np.ones((1, 1)), np.full((1, 1), 0.7)], np.zeros((1, 1)))
    assert float(kernel.get_weights()[0][0, 0]) == pytest.approx(1 + 0.7, rel=1e-5)


def test_the_adversary_shares_the_features():
    network = networks.dann()
    model = networks.with_adversary(network)
    out = model([STAMPS, np.ones((4, 1), np.float32)])
    np.testing.assert_allclose(ops.convert_to_numpy(out["domain"]).sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(
        ops.convert_to_numpy(out["means"]), ops.convert_to_numpy(network(STAMPS)), rtol=1e-4, atol=1e-5
    )


def test_the_adversary_cannot_gain_by_the_size_of_features():
    stamps = keras.Input((128, 128))
    features = keras.layers.Dense(8, use_bias=False, name="features")
    network = keras.Model(stamps, features(keras.layers.Flatten()(stamps)))
    model = networks.with_adversary(network)
    inputs = [STAMPS, np.ones((4, 1), np.float32)]
    before = ops.convert_to_numpy(model(inputs)["domain"])
    features.set_weights([1e3 * features.get_weights()[0]])
    np.testing.assert_allclose(ops.convert_to_numpy(model(inputs)["domain"]), before, rtol=0.02)


def test_files_of_a_network_are_compressed_without_loss(tmp_path):
    import onnxruntime

    keras.utils.set_random_seed(1)
    model = networks.with_units(networks.ARCHITECTURES["tl"], networks.tl(), np.zeros(4), np.ones(4))
    networks.save_model(model, tmp_path / "tl.keras")
    networks.export_onnx(model, tmp_path / "tl.onnx")
    assert (tmp_path / "tl.onnx").stat().st_size < 2.1 * model.count_params()
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 12e6
    expected = ops.convert_to_numpy(model(STAMPS))
    np.testing.assert_array_equal(ops.convert_to_numpy(networks.load_model(tmp_path / "tl.keras")(STAMPS)), expected)
    session = onnxruntime.InferenceSession(str(tmp_path / "tl.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: STAMPS})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
