import hashlib
import json
import shutil
import warnings

import numpy as np
import pytest
from conftest import shown

from sersicnet import cardpage, networks, session, weights
from sersicnet.errors import InputError, SersicnetWarning, WeightsError
from sersicnet.schema import TARGETS, Inputs
from sersicnet.simulating import morphology as reallike
from sersicnet.simulating.recipe import Simulation
from sersicnet.simulating.stamps import draw_stamps
from sersicnet.simulating.telescopes import F160W, effective_psf


@pytest.fixture
def copy(tiny_weights, tmp_path):
    return shutil.copytree(tiny_weights, tmp_path / "copy")


def test_shipped_weights_are_found_by_name():
    assert weights.DEFAULT in weights.shipped()
    assert weights.load(weights.DEFAULT).name == weights.DEFAULT


@pytest.fixture(scope="module")
def stamps():
    """Sixteen stamps in units of their noise: simulated, real-like, blank, extreme."""
    plain, truth = draw_stamps(Simulation.of_options(6, seed=3), np.arange(6))
    crowded, crowded_truth = draw_stamps(Simulation.of_options(3, seed=3, neighbours=True, centring=True), np.arange(3))
    like = reallike.Painter(effective_psf(F160W), 128)
    rng = np.random.default_rng(0)
    galaxies = [reallike.invent(np.array([63.5, 63.5, flux, 9.0, 1.5, 0.6, 30.0]), rng) for flux in (30.0, 3000.0)]
    noise = rng.normal(size=(6, 128, 128))
    extreme = [
        like(galaxies[0]) / 0.003 + noise[0],
        like(galaxies[1]) / 0.003 + noise[1],
        noise[2],
        np.zeros((128, 128)),
        1e5 * plain[0] / plain[0].max() + noise[3],
        1e5 * plain[1] / plain[1].max() * np.eye(128) + noise[4],
        -100 * np.abs(noise[5]),
    ]
    simulated = [plain / truth["rms"][:, None, None], crowded / crowded_truth["rms"][:, None, None]]
    return np.concatenate([*simulated, extreme]).astype(np.float32)


@pytest.mark.parametrize("name", weights.shipped())
def test_shipped_weights_are_small_and_tell_their_story(name):
    found = weights.load(name)
    size = sum(file.stat().st_size for file in found.path.iterdir())
    assert size <= 12e6
    card, readme = found.card, (found.path / "README.md").read_text()
    assert card["name"] == name
    assert card["command"].startswith("sersicnet ")
    assert card["data"]["command"].startswith("sersicnet ")
    assert isinstance(card["seed"], int)
    assert card["limits"]
    assert card["scores"]["samples"]["all"]["n"] > 500
    assert readme == cardpage.readable(card)
    for told in (card["command"], f"seed {card['seed']}", card["data"]["command"], card["licence"], *card["limits"]):
        assert told in readme


@pytest.mark.parametrize("name", weights.shipped())
def test_keras_and_onnx_agree(name, stamps):
    found = weights.load(name)
    # Calibration by magnitude and averages over quarter turns are no part of the network.
    bare = weights.Weights(found.path, {**found.card, "calibration": None, "quarter_turns": 0.0}, found.sha256)
    model, given = found.keras_model(), shown(stamps)
    targets, errors, *_ = bare.predict(given)
    theirs = np.asarray(model(networks.shown(model, given)))
    assert np.isfinite(theirs).all()
    tolerance = np.array([1e-4 * (target.high - target.low) for target in TARGETS])
    # The stamp of negative pixels gives radii sixty times beyond the range, where single precision is coarser.
    beyond = np.where(theirs[:, :4] > [target.high for target in TARGETS], 1e-5 * np.abs(theirs[:, :4]), 0)
    assert (np.abs(targets - theirs[:, :4]) <= tolerance + beyond).all()
    if errors is not None:
        assert (np.abs(errors - theirs[:, 4:8]) <= tolerance + 1e-4 * theirs[:, 4:8]).all()


def test_weights_that_are_calibrated_again_are_others(tmp_path):
    """The network is the same, and so is its SHA-256; the errors are not."""
    found = weights.load("fovea")
    again = weights.with_card(found, tmp_path / "again", {**found.card, "name": "again", "calibration": None})
    assert again.sha256 == found.sha256
    assert again.identity != found.identity == weights.load("fovea").identity


def test_weights_of_an_earlier_version_are_trained_on():
    """Those of ``fovea-sky`` are: it summed stamps by other layers, and its learned weights are the same."""
    found = weights.load("fovea-sky")
    stored, built = found.keras_model().get_layer("core"), found.core()
    assert [v.shape for v in stored.weights] != [v.shape for v in built.weights]
    some = shown(np.random.default_rng(0).normal(1, 1, size=(4, 128, 128)).astype(np.float32))
    old, new = (np.array(core(networks.shown(core, some))) for core in (stored, built))
    np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-5)


def test_a_card_tells_a_short_training_in_seconds():
    card = weights.load(weights.DEFAULT).card
    for seconds, words in ((51, "epochs, 51 s on"), (222, "epochs, 4 minutes on")):
        told = {**card, "training": {**card["training"], "seconds": seconds}}
        assert words in cardpage.readable(told)


def test_a_card_is_read_without_the_rounding_errors_of_its_numbers():
    card = weights.load("fovea-sky").card
    told = cardpage.readable({
        **card, "training": {**card["training"], "epochs": 1},
        "domain": {**card["domain"], "pixel_scale": 0.0600000000000012, "zero_point": 25.946300000000001},
    })  # fmt: skip
    assert "; 0.06 arcsec/pixel, " in told
    assert "zero point 25.9463 (AB)" in told
    assert "- training: 1 epoch, " in told


@pytest.mark.parametrize("name", ["network.keras", "network.onnx", "card.json", "README.md"])
def test_a_changed_byte_is_noticed(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(WeightsError, match=f"{name} does not have the SHA-256"):
        weights.load(copy)


@pytest.mark.parametrize("name", ["network.keras", "network.onnx", "card.json", "README.md"])
def test_a_missing_file_is_noticed(copy, name):
    (copy / name).unlink()
    with pytest.raises(WeightsError, match=f"has no {name}"):
        weights.load(copy)


def test_what_is_no_weights_directory(tmp_path):
    with pytest.raises(WeightsError, match=r"a shipped name \(.*fovea-sim.*\) or a directory; received nothing"):
        weights.load("nothing")
    with pytest.raises(WeightsError, match="it has no SHA256SUMS"):
        weights.load(tmp_path)


def test_another_schema_is_refused(copy):
    card = json.loads((copy / "card.json").read_text())
    weights.rewrite_card(copy, {**card, "schema_version": 99})
    with pytest.raises(WeightsError, match="schema 99, this version reads 1"):
        weights.load(copy)


def changed(copy, **changes):
    """Put other values into the card; None takes one out."""
    card = {**json.loads((copy / "card.json").read_text()), **changes}
    write_card(copy, {key: value for key, value in card.items() if value is not None})
    return copy


def write_card(copy, card):
    (copy / "card.json").write_text(json.dumps(card) if isinstance(card, dict) else card)
    sign(copy)


def sign(copy):
    """Make the sums true again."""
    names = ("network.keras", "network.onnx", "card.json", "README.md")
    sums = [f"{hashlib.sha256((copy / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (copy / "SHA256SUMS").write_text("".join(sums))


def test_targets_in_another_order_are_refused(copy):
    targets = json.loads((copy / "card.json").read_text())["targets"]
    with pytest.raises(WeightsError, match=r"predicts ellipticity, sersic_n, .*; this version reads mag, r_eff_pix"):
        weights.load(changed(copy, targets=targets[::-1]))


@pytest.mark.parametrize("key", ["domain", "targets", "errors", "network", "name", "data", "label_mean"])
def test_a_card_without_what_is_needed_is_refused(copy, key):
    with pytest.raises(WeightsError, match=rf"does not state .*: no {key}\. Train"):
        weights.load(changed(copy, **{key: None}))


@pytest.mark.parametrize(
    "inputs", ["psf noise stamps", 5, True, [["psf"]], [{"a": 1}], ["stamps", "gain"], ["psf"], []]
)
def test_a_card_whose_inputs_are_no_inputs_is_refused(copy, inputs):
    with pytest.raises(WeightsError, match="inputs lists stamps, and any of psf and noise"):
        weights.load(changed(copy, inputs=inputs))


def test_a_network_that_is_shown_other_inputs_than_its_card_states_is_refused(copy):
    found = weights.load(changed(copy, inputs=["noise", "psf", "stamps"]))
    with pytest.raises(WeightsError, match="is shown stamps, by its card noise, psf, stamps: it belongs to other"):
        found.predict(shown(np.zeros((1, 128, 128), np.float32)))


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null"])
def test_a_card_that_is_no_card_is_refused(copy, text):
    write_card(copy, text)
    with pytest.raises(WeightsError, match="is no card of weights"):
        weights.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranges": {"mag": [16, 27]}}, "no r_eff_pix"),
        ({"pixel_scale": 0}, "are positive"),
        ({"rms": [0.006, 0.002]}, "no pairs"),
        ({"psf_fwhm": "wide"}, "a finite number is wanted; received 'wide'"),
        ({"zero_point": float("nan")}, "a finite number is wanted; received 'nan'"),
        ({"pixel_scale": "0.06"}, "a finite number is wanted; received '0.06'"),
    ],
)
def test_a_domain_that_makes_no_sense_is_refused(copy, change, message):
    domain = json.loads((copy / "card.json").read_text())["domain"]
    domain.pop("psf_fwhm_range", None)
    with pytest.raises(WeightsError, match=message):
        weights.load(changed(copy, domain={**domain, **change}))


@pytest.mark.parametrize("keep", [0, 1000, -1000])
def test_a_network_cut_short_is_refused_even_with_true_sums(copy, keep):
    content = (copy / "network.onnx").read_bytes()
    (copy / "network.onnx").write_bytes(content[:keep])
    sign(copy)
    with pytest.raises(WeightsError, match=r"network.onnx is no network that this version of sersicnet measures with"):
        weights.load(copy).predict(Inputs(np.zeros((1, 128, 128), np.float32)))


def test_a_network_of_other_weights_is_refused(copy):
    found = weights.load(changed(copy, errors=False))
    with pytest.raises(WeightsError, match=r"network.onnx returns values of shape .* belongs to other weights"):
        found.predict(Inputs(np.zeros((1, 128, 128), np.float32)))
    with pytest.raises(WeightsError, match=r"network.keras has .* belongs to other weights"):
        found.keras_model()


def test_a_network_that_cannot_be_trained_on_is_refused(copy):
    found = weights.load(changed(copy, network="later"))
    assert np.isfinite(found.predict(Inputs(np.zeros((1, 128, 128), np.float32)))[0]).all()
    with pytest.raises(WeightsError, match="holds a network later; this version knows fovea"):
        found.keras_model()
    (copy / "network.keras").write_bytes(b"PK nothing")
    sign(copy)
    with pytest.raises(WeightsError, match=r"network.keras cannot be read as a network"):
        weights.load(changed(copy, network="fovea")).keras_model()


def test_a_keras_file_cut_short_is_not_exported(copy):
    (copy / "network.keras").write_bytes((copy / "network.keras").read_bytes()[:2000])
    sign(copy)
    (copy / "network.onnx").unlink()
    sums = (copy / "SHA256SUMS").read_text().splitlines(keepends=True)
    (copy / "SHA256SUMS").write_text("".join(line for line in sums if "onnx" not in line))
    with pytest.raises(WeightsError, match=r"cannot be read as a network of sersicnet: .*[^.]\. Install"):
        weights.export(copy)
    assert not (copy / "network.onnx").exists()


def test_other_files_in_the_directory_are_not_read(copy):
    (copy / "notes.txt").write_text("mine")
    (copy / "network.pkl").write_bytes(b"never opened")
    assert np.isfinite(weights.load(copy).predict(Inputs(np.zeros((1, 128, 128), np.float32)))[0]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_batch_of_nothing_but_nan_is_nan(psf_weights, value):
    found = weights.load(psf_weights).predict(shown(np.full((2, 128, 128), value, np.float32)))
    assert all(np.isnan(values).all() for values in found)


def test_a_stamp_with_nan_is_nan_and_alone(tiny_weights):
    stamps = np.zeros((3, 128, 128), np.float32)
    stamps[1, 5, 5] = np.nan
    targets, errors, *_ = weights.load(tiny_weights).predict(Inputs(stamps))
    assert list(np.isnan(targets).all(axis=1)) == [False, True, False]
    assert list(np.isnan(errors).all(axis=1)) == [False, True, False]


def test_predictions_do_not_depend_on_the_batch(tiny_weights):
    stamps = np.random.default_rng(0).normal(size=(weights.BATCH + 3, 128, 128)).astype(np.float32)
    found = weights.load(tiny_weights)
    together = found.predict(Inputs(stamps))
    alone = found.predict(Inputs(stamps[-1:]))
    np.testing.assert_allclose(together.targets[-1:], alone.targets, rtol=1e-4)


@pytest.mark.parametrize(
    ("n", "threads", "sizes"),
    [(1, 1, [8]), (67, 1, [64, 8]), (129, 1, [64, 64, 8]), (1, 4, [8]), (67, 4, [24, 24, 24]), (129, 2, [64, 64, 8])],
)
def test_few_stamps_are_not_filled_up_to_a_whole_batch(tiny_weights, monkeypatch, n, threads, sizes):
    seen, run = [], weights.Weights._run
    monkeypatch.setattr(session, "threads", lambda: threads)
    monkeypatch.setattr(
        weights.Weights, "_run", lambda self, given: seen.append(len(given["stamps"])) or run(self, given)
    )
    stamps = np.random.default_rng(0).normal(size=(n, 128, 128)).astype(np.float32)
    assert np.isfinite(weights.load(tiny_weights).predict(Inputs(stamps)).targets).all()
    assert sorted(seen, reverse=True) == sizes


def test_predictions_do_not_depend_on_the_threads(monkeypatch):
    """Nor on the sizes of batches that go with them: catalogues must not depend on the number of cores."""
    given, answers = shown(np.random.default_rng(0).normal(size=(70, 128, 128)).astype(np.float32)), []
    for threads in (1, 3):
        monkeypatch.setattr(session, "threads", lambda threads=threads: threads)
        answers.append(weights.load("fovea").answers(given))
    np.testing.assert_allclose(*answers, rtol=1e-6)


def test_no_stamps_give_no_rows(tiny_weights):
    targets, errors, *_ = weights.load(tiny_weights).predict(Inputs(np.zeros((0, 128, 128), np.float32)))
    assert targets.shape == errors.shape == (0, 4)


def test_stamps_of_another_size_are_refused(tiny_weights):
    with pytest.raises(InputError, match=r"stamps of 1 galaxies have shape \(128, 128\) each; received \(1, 64, 64\)"):
        weights.load(tiny_weights).predict(Inputs(np.zeros((1, 64, 64), np.float32)))


def test_weights_without_tensorflow_are_exported_elsewhere(copy, monkeypatch):
    found = weights.load(copy)
    model = found.keras_model()
    find_spec = weights.importlib.util.find_spec
    monkeypatch.setattr(
        weights.importlib.util, "find_spec", lambda name: None if name == "tensorflow" else find_spec(name)
    )
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", SersicnetWarning)
        weights.save(copy, model, {k: v for k, v in found.card.items() if k not in ("schema_version", "targets")})
    (told,) = [str(w.message) for w in seen if w.category is SersicnetWarning]
    assert "has no network.onnx: tensorflow must be installed. To measure with it, run `sersicnet export" in told
    with pytest.raises(WeightsError, match=f"trained without TensorFlow.*sersicnet export {copy}"):
        weights.load(copy)
    assert weights.load(copy, to_train=True).card == found.card
    with pytest.raises(WeightsError, match=r"network\.onnx could not be made: tensorflow must be installed"):
        weights.export(copy)
    monkeypatch.undo()
    stamps = np.random.default_rng(0).normal(size=(2, 128, 128)).astype(np.float32)
    np.testing.assert_allclose(
        weights.export(copy).predict(Inputs(stamps))[0], found.predict(Inputs(stamps))[0], rtol=1e-5
    )
    assert {file.name for file in copy.iterdir()} == {file.name for file in found.path.iterdir()}
    with pytest.raises(WeightsError, match="already"):
        weights.export(copy)


class Gpu:
    """Stands for ONNX Runtime with CUDA: lists a GPU, which works or does not, and computes on the CPU."""

    def __init__(self, monkeypatch, works=True):
        import onnxruntime

        self.asked, real = [], onnxruntime.InferenceSession

        def opened(content, options, providers, **kwargs):
            self.asked.append(providers)
            names = [name for name, _ in providers]
            if works is None and len(names) > 1:
                raise RuntimeError("CUDA failure 100: no CUDA-capable device")
            session = real(content, options, providers=["CPUExecutionProvider"], **kwargs)
            session.get_providers = lambda: names if works else names[-1:]
            return session

        listed = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
        monkeypatch.setattr(onnxruntime, "InferenceSession", opened)


def test_a_gpu_is_used_by_default_in_single_precision(tiny_weights, monkeypatch):
    gpu = Gpu(monkeypatch)
    found = weights.load(tiny_weights).on("auto")
    assert (found.device, found.provider) == ("gpu", "CUDAExecutionProvider")
    assert gpu.asked[0] == [("CUDAExecutionProvider", {"use_tf32": "0"}), ("CPUExecutionProvider", {})]


def test_a_gpu_is_left_alone_if_told_so(tiny_weights, monkeypatch):
    gpu = Gpu(monkeypatch)
    found = weights.load(tiny_weights).on("cpu")
    assert np.isfinite(found.predict(shown(np.zeros((1, 128, 128), np.float32))).targets).all()
    assert gpu.asked == [[("CPUExecutionProvider", {})]]


def test_without_a_gpu_the_cpu_is_used_or_the_command_says_what_to_install(tiny_weights):
    found = weights.load(tiny_weights)
    assert found.on("auto").device == "cpu"
    with pytest.raises(InputError, match="pip install onnxruntime-gpu"):
        found.on("gpu")
    with pytest.raises(InputError, match="auto, cpu, gpu; received cuda"):
        found.on("cuda")


@pytest.mark.parametrize(("works", "reason"), [(False, ""), (None, r" \(CUDA failure 100: no CUDA-capable device\)")])
def test_a_gpu_that_does_not_start_is_no_gpu(tiny_weights, monkeypatch, works, reason):
    Gpu(monkeypatch, works)
    assert weights.load(tiny_weights).on("auto").device == "cpu"
    with pytest.raises(InputError, match=f"CUDAExecutionProvider of ONNX Runtime does not start here{reason}: check"):
        weights.load(tiny_weights).on("gpu")
