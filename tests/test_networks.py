from types import SimpleNamespace

import numpy as np
import pytest
from conftest import shown

from sersicnet import networkfile, networks
from sersicnet.networks import keras, ops
from sersicnet.schema import INPUT_SHAPES, N_TARGETS, encode
from sersicnet.training import losses
from sersicnet.training.device import jit

STAMPS = np.random.default_rng(0).normal(size=(4, 128, 128)).astype(np.float32)
EIGHT = shown(np.random.default_rng(0).normal(size=(8, 128, 128)).astype(np.float32))

MOST_STEPS = 100
"""In which a network halves its error on eight stamps."""


@pytest.mark.parametrize(("name", "millions"), [("fovea", 1.66), ("fovea-fixed", 1.41), ("tl", 1.94), ("dann", 1.22)])
def test_size_is_as_documented(name, millions):
    model = networks.ARCHITECTURES[name].build()
    assert model.count_params() / 1e6 == pytest.approx(millions, abs=0.01)


def test_fovea_takes_few_multiplications():
    assert networks.multiply_adds(networks.fovea_fixed()) / 1e6 == pytest.approx(68, abs=1)
    assert networks.multiply_adds(networks.fovea()) / 1e6 == pytest.approx(70, abs=1)


def learned_by(architecture):
    """Random standardised targets of eight galaxies."""
    width = N_TARGETS + networks.N_ORIENTATION * architecture.oriented
    return np.random.default_rng(1).normal(size=(8, width)).astype(np.float32)


@pytest.mark.parametrize("name", [name for name in networks.ARCHITECTURES if name != "fovea-fixed"])
class TestContract:
    """What holds for every architecture; a new one inherits it by its name in `ARCHITECTURES`.

    ``fovea-fixed``, which has the layers of ``fovea`` and is no longer trained, is left out: it takes 20 seconds.
    """

    @pytest.fixture
    def architecture(self, name):
        keras.utils.set_random_seed(1)
        return networks.ARCHITECTURES[name]

    @pytest.fixture
    def core(self, architecture):
        return architecture.build()

    @pytest.fixture
    def model(self, architecture, core):
        scale = np.ones(N_TARGETS) if architecture.spreads else None
        return networks.with_units(architecture, core, np.full(4, 0.5), np.full(4, 0.1), error_scale=scale)

    def test_shapes(self, architecture, core, model):
        width = 17 if architecture.oriented else N_TARGETS * (2 if architecture.spreads else 1)
        assert core.output_shape == model.output_shape == (None, width)
        assert {port.name: port.shape[1:] for port in core.inputs}.items() <= INPUT_SHAPES._asdict().items()
        assert core.get_layer("means").output.shape == (None, N_TARGETS)
        assert len(core.get_layer("features").output.shape) == 2

    def test_a_step_reaches_every_weight_and_eight_stamps_are_learned_by_heart(self, architecture, core):
        """Two tests in one: a network is compiled once, which takes most of the time."""
        targets, given, start = learned_by(architecture), networks.shown(core, EIGHT), core.get_weights()

        def error():
            out = ops.convert_to_numpy(core(given, training=True))[:, :N_TARGETS]
            return np.abs(out - targets[:, :N_TARGETS]).mean()

        before, steps = error(), 1
        core.compile(keras.optimizers.Adam(1e-3), losses.REGRESSION[core.name], jit_compile=jit())
        assert np.isfinite(core.train_on_batch(given, targets))
        trainable = {id(v) for v in core.trainable_weights}
        for variable, old in zip(core.weights, start, strict=True):
            new = ops.convert_to_numpy(variable)
            assert np.isfinite(new).all(), variable.path
            if id(variable) in trainable:
                assert (new != old).any(), variable.path
        while error() > 0.5 * before:
            assert steps < MOST_STEPS
            steps += 10
            for _ in range(10):
                core.train_on_batch(given, targets)

    def test_pixels_of_any_size_stay_finite(self, architecture, core):
        stamps = EIGHT.stamps * np.repeat([0, 1, 1e3, 1e6], 2).astype(np.float32)[:, None, None]
        assert np.isfinite(ops.convert_to_numpy(core(networks.shown(core, EIGHT._replace(stamps=stamps))))).all()

    def test_a_saved_network_answers_the_same(self, architecture, model, tmp_path):
        """In Keras exactly, and in ONNX within single precision."""
        import onnxruntime

        networkfile.save_model(model, tmp_path / "n.keras")
        networkfile.export_onnx(model, tmp_path / "n.onnx")
        assert (tmp_path / "n.onnx").stat().st_size < 3 * model.count_params()
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 12e6
        expected = ops.convert_to_numpy(model(networks.shown(model, EIGHT)))
        again = networkfile.load_model(tmp_path / "n.keras")
        np.testing.assert_array_equal(ops.convert_to_numpy(again(networks.shown(again, EIGHT))), expected)
        session = onnxruntime.InferenceSession(str(tmp_path / "n.onnx"))
        given = {port.name: getattr(EIGHT, port.name) for port in session.get_inputs()}
        (found,) = session.run(None, given)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)

    def test_the_configuration_makes_the_same_network(self, architecture, core):
        again = keras.Model.from_config(core.get_config())
        again.set_weights(core.get_weights())
        given = networks.shown(core, EIGHT)
        np.testing.assert_array_equal(ops.convert_to_numpy(again(given)), ops.convert_to_numpy(core(given)))

    def test_only_its_convolutions_train_in_bfloat16(self, core):
        copy = networks.in_bfloat16(core)
        assert copy.name == core.name
        for layer in copy.layers:
            convolves = isinstance(layer, keras.layers.Conv2D | keras.layers.MaxPooling2D)
            assert layer.compute_dtype == ("bfloat16" if convolves else "float32")
        assert {variable.dtype for variable in copy.weights} == {"float32"}
        for mine, other in zip(copy.get_weights(), core.get_weights(), strict=True):
            np.testing.assert_array_equal(mine, other)


def test_sums_are_those_of_the_squares_and_windows_of_a_stamp():
    stamp = np.random.default_rng(5).normal(size=(128, 128)) + 3
    found = ops.convert_to_numpy(networks._stamp_sums(networks._views(ops.convert_to_tensor(stamp[None], "float32"))))
    squares = [stamp[64 - s // 2 : 64 + s // 2, 64 - s // 2 : 64 + s // 2].sum() / s for s in (4, 8, 16, 32, 64, 128)]
    np.testing.assert_allclose(found[0, :6], np.arcsinh(squares), rtol=1e-5)
    y, x = np.mgrid[:32, :32] - 15.5
    window = np.exp(-(x**2 + y**2) / (2 * 3.0**2))  # the second of the view that is not binned
    kernels = [window * moment for moment in (1, x**2 + y**2, x**2 - y**2, 2 * x * y)]
    flux, radial, plus, cross = ((stamp[48:80, 48:80] * k).sum() / np.sqrt((k**2).sum()) for k in kernels)
    shape = np.array([radial, np.sqrt(plus**2 + cross**2 + 1e-3)]) / np.sqrt(flux**2 + 4)
    np.testing.assert_allclose(found[0, 10:14], [*np.arcsinh([flux, radial]), *shape], rtol=1e-4)


def test_one_psf_serves_a_whole_batch():
    keras.utils.set_random_seed(1)
    core = networks.fovea()
    each = ops.convert_to_numpy(core(networks.shown(core, EIGHT)))
    once = ops.convert_to_numpy(core(networks.shown(core, EIGHT._replace(psf=EIGHT.psf[:1]))))
    np.testing.assert_allclose(once, each, rtol=1e-4, atol=1e-5)


def test_the_covariance_is_that_of_the_whitening_matrix():
    factors = np.random.default_rng(3).normal(size=(5, networks.N_FACTORS)).astype(np.float32)
    matrix = ops.convert_to_numpy(networks.whitening(factors)).astype(float)
    assert (np.triu(matrix, 1) == 0).all()
    expected = np.linalg.inv(np.swapaxes(matrix, 1, 2) @ matrix)
    sigmas, correlations = networks._covariance(ops.convert_to_tensor(factors))
    deviations = np.sqrt(np.diagonal(expected, axis1=1, axis2=2))
    np.testing.assert_allclose(ops.convert_to_numpy(sigmas), deviations, rtol=1e-4)
    upper = np.triu_indices(N_TARGETS, 1)
    wanted = (expected / deviations[:, :, None] / deviations[:, None, :])[:, upper[0], upper[1]]
    np.testing.assert_allclose(ops.convert_to_numpy(correlations), wanted, atol=1e-4)
    out = np.concatenate([np.zeros((5, 4), np.float32), factors, np.zeros((5, 3), np.float32)], axis=1)
    np.testing.assert_allclose(networks.spreads(networks.ARCHITECTURES["fovea"], out), deviations, rtol=1e-4)


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
    core.compile("adam", loss=losses.spread_loss)  # which a file could hold, and no other program could read
    networks.with_units(architecture, core, np.zeros(4), np.ones(4)).save(tmp_path / "n.keras")
    again = keras.saving.load_model(tmp_path / "n.keras", compile=True, safe_mode=True)
    assert not again.compiled
    assert not again.get_layer("core").compiled


def adversary():
    """A network whose only weights are scales of its five features, with its adversary; and eight galaxies."""
    keras.utils.set_random_seed(3)
    given = keras.Input((5,), name="given")
    scales = keras.layers.EinsumDense("nf,f->nf", output_shape=(5,), kernel_initializer="ones", name="features")
    network = keras.Model(given, keras.layers.Dense(4, name="means")(scales(given)))
    model = networks.with_adversary(network)
    return model, scales, np.random.default_rng(2).normal(size=(8, 5)).astype(np.float32), np.repeat([0, 1], 4)


def gradient_of_the_domain_loss(strength):
    """With respect to the scales of the features: the step that an optimiser takes."""
    model, scales, galaxies, domain = adversary()
    model.compile(
        keras.optimizers.SGD(1.0), {"means": "mse", "domain": "sparse_categorical_crossentropy"},
        loss_weights={"means": 0.0, "domain": 1.0}, run_eagerly=True,
    )  # fmt: skip
    answers = {"means": np.zeros((8, 4), np.float32), "domain": domain}
    model.train_on_batch([galaxies, np.full((8, 1), strength, np.float32)], answers)
    return 1 - scales.get_weights()[0]


def test_the_features_climb_the_loss_of_the_adversary():
    """Forward, lambda changes nothing; backward, it multiplies the gradient by -lambda."""
    model, scales, galaxies, domain = adversary()

    def loss(scale, strength):
        scales.set_weights([scale.astype(np.float32)])
        out = ops.convert_to_numpy(model([galaxies, np.full((8, 1), strength, np.float32)])["domain"])
        return -np.log(out[np.arange(8), domain]).mean()

    steps = 0.002 * np.eye(5)
    slope = np.array([loss(1 + step, 0.0) - loss(1 - step, 0.0) for step in steps]) / 0.004
    assert np.abs(slope).max() > 1e-3
    assert loss(np.ones(5), 0.0) == pytest.approx(loss(np.ones(5), 1.0), rel=1e-5)
    np.testing.assert_allclose(gradient_of_the_domain_loss(1.0), -slope, atol=0.1 * np.abs(slope).max())
    np.testing.assert_allclose(gradient_of_the_domain_loss(0.5), 0.5 * gradient_of_the_domain_loss(1.0), atol=1e-6)
    np.testing.assert_array_equal(gradient_of_the_domain_loss(0.0), 0)


def test_a_network_may_take_further_inputs(tmp_path):
    """By their names, in Keras and ONNX; nothing between the schema and the network lists them."""
    import onnxruntime

    def build():
        given = {name: keras.Input(shape, name=name) for name, shape in (("stamps", (128, 128)), ("psf", (5, 5)))}
        flat = [keras.layers.Flatten()(ops.mean(port, axis=1)) for port in given.values()]
        return keras.Model(given, keras.layers.Dense(4)(keras.layers.Concatenate()(flat)))

    architecture = networks.Architecture(build, log=False, spreads=False)
    model = networks.with_units(architecture, build(), np.zeros(4), np.ones(4))
    more = SimpleNamespace(stamps=EIGHT.stamps, psf=np.ones((8, 5, 5), np.float32), other=None)
    given = networks.shown(model, more)
    assert set(given) == {"stamps", "psf"}
    expected = ops.convert_to_numpy(model(given))
    networkfile.save_model(model, tmp_path / "n.keras")
    again = networkfile.load_model(tmp_path / "n.keras")
    np.testing.assert_array_equal(ops.convert_to_numpy(again(networks.shown(again, more))), expected)
    networkfile.export_onnx(model, tmp_path / "n.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "n.onnx"))
    assert {port.name for port in session.get_inputs()} == {"stamps", "psf"}
    (found,) = session.run(None, {name: getattr(more, name) for name in ("stamps", "psf")})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


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
