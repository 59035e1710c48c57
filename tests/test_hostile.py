"""Weights from strangers: hostile directories are refused in one line, before they read, allocate or run anything."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import onnx
import pytest
from astropy.io import fits
from onnx import TensorProto, helper, numpy_helper

from sersicnet import cardpage, cli, graph, weights
from sersicnet.errors import WeightsError
from sersicnet.schema import INPUT_SHAPES, N_TARGETS

NAMES = ("network.keras", "network.onnx", "card.json", "README.md")
GIGABYTES = 6
"""Address space of the process that meets what asks for memory; ONNX Runtime and the rest take two."""


@pytest.fixture(scope="module")
def mosaic(tmp_path_factory):
    """A galaxy on 128 pixels of noise."""
    y, x = np.indices((128, 128))
    data = np.random.default_rng(1).normal(0, 0.004, x.shape) + np.exp(-np.hypot(x - 60, y - 68) / 5)
    path = tmp_path_factory.mktemp("mosaic") / "mosaic.fits"
    cards = {
        "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 150.1, "CRVAL2": 2.2, "CRPIX1": 64.5, "CRPIX2": 64.5,
        "CDELT1": -0.06 / 3600, "CDELT2": 0.06 / 3600, "RADESYS": "ICRS", "MAGZERO": 25.9463,
    }  # fmt: skip
    fits.writeto(path, data.astype("f4"), fits.Header(cards))
    return path


@pytest.fixture
def directory(tmp_path):
    """A copy of shipped weights."""
    return shutil.copytree(weights.shipped_directory() / "fovea-sky", tmp_path / "w")


@pytest.fixture
def run(mosaic, tmp_path, capsys):
    """Measure on the command line in this process; returns the exit code and what was said."""

    def call(directory, *options):
        arguments = ["measure", mosaic, "-o", tmp_path / "cat.ecsv", "-w", directory, "-q", "--workers", 1, *options]
        with pytest.raises(SystemExit) as done:
            cli.main(list(map(str, arguments)))
        return done.value.code or 0, capsys.readouterr().err

    return call


def sign(w):
    """Make the sums true, as a stranger would."""
    sums = [f"{hashlib.sha256((w / name).read_bytes()).hexdigest()}  {name}\n" for name in NAMES]
    (w / "SHA256SUMS").write_text("".join(sums))


def card(**changes):
    """Another value on the card, at a path of keys joined by two underscores."""

    def change(w):
        content = json.loads((w / "card.json").read_text())
        for place, value in changes.items():
            *path, last = place.split("__")
            inside = content
            for key in path:
                inside = inside[key]
            inside[last] = value
        (w / "card.json").write_text(json.dumps(content))
        sign(w)

    return change


def text(content, name="card.json"):
    """Another content of a file."""

    def change(w):
        (w / name).write_bytes(content)
        sign(w)

    return change


def sums(content):
    """Another list of sums; a function gets the true one."""

    def change(w):
        path = w / "SHA256SUMS"
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)

    return change


def instead(make, name="network.onnx"):
    """Something else in the place of a file."""

    def change(w):
        (w / name).unlink()
        make(w / name)

    return change


def large(name):
    """A file of 100 GB, which takes no room on the disk."""

    def change(w):
        with (w / name).open("r+b") as file:
            file.truncate(100 * 10**9)

    return change


def by_magnitude(**changes):
    table = {"mag": [18.0, 20.0], "factors": [[1.0] * 4] * 2}
    return card(calibration={**table, **changes})


def calibration(**changes):
    table = {"domain": [[0.0] * 8, [1.0] * 8], "polynomials": [[0.0] * 45] * 5, "range": [[0.0] * 5, [1.0] * 5]}
    return card(calibration={**table, **changes})


DIRECTORIES = {
    "sums that are not UTF-8": (sums(b"\xff\xfe\x00"), "is no list of SHA-256"),
    "sums of nothing": (sums(b""), "does not have the SHA-256"),
    "sums listed twice": (sums(lambda found: found + found.replace(b"a", b"b")), "twice"),
    "sums cut short": (sums(lambda found: found.replace(b"  ", b" ")), "does not have the SHA-256"),
    "sums of 100 GB": (large("SHA256SUMS"), "is larger than"),
    "a directory for the sums": (instead(Path.mkdir, "SHA256SUMS"), "has no SHA256SUMS"),
    "a directory for the network": (instead(Path.mkdir), "has no network.onnx"),
    "a directory for the card": (instead(Path.mkdir, "card.json"), "has no card.json"),
    "a device for the network": (instead(lambda p: p.symlink_to("/dev/zero")), "has no network.onnx"),
    "a pipe for the network": (instead(os.mkfifo), "has no network.onnx"),
    "a pipe for the sums": (instead(os.mkfifo, "SHA256SUMS"), "has no SHA256SUMS"),
    "a link to nothing": (instead(lambda p: p.symlink_to("nothing")), "has no network.onnx|export"),
    "a link to itself": (instead(lambda p: p.symlink_to(p.name), "card.json"), "has no card.json"),
    "a link to another file": (
        instead(lambda p: p.symlink_to("/etc/passwd"), "README.md"),
        "does not have the SHA-256",
    ),
    "a network of 100 GB": (large("network.onnx"), "is larger than"),
    "a Keras file of 100 GB": (large("network.keras"), "is larger than"),
    "a card of 100 GB": (large("card.json"), "is larger than"),
    "a card nested 100,000 deep": (text(b"[" * 100_000), "is no card of weights"),
    "a card of tables 100,000 deep": (text(b'{"a":' * 100_000), "is no card of weights"),
    "a card that is not UTF-8": (text(b'{"name": "\xff"}'), "is no card of weights"),
    "a card of an enormous number": (text(b"9" * 5000), "is no card of weights"),
    "a card of null": (text(b"null"), "is no card of weights"),
    "a schema of another kind": (card(schema_version=[1] * 1000), "has weights schema"),
    "no targets": (card(targets=None), "does not state"),
    "targets of numbers": (card(targets=[1, 2, 3, 4]), "does not state"),
    "targets without names": (card(targets=[{}] * 4), "no name"),
    "a name of control characters": (card(name="a\x1b[2Jb\n"), "printable"),
    "a name of another kind": (card(name=["a"]), "name is text"),
    "a name without end": (card(name="a" * 10**6), "printable"),
    "errors of text": (card(errors="false"), "errors is true or false"),
    "errors of null": (card(errors=None), "errors is true or false"),
    "a network that is no word": (card(network={"a": 1}), "network is text"),
    "weights counted in text": (card(parameters="many"), "parameters is a whole number"),
    "data of text": (card(data="mine"), "data is a table"),
    "a configuration of text": (card(data__config="mine"), "is a table"),
    "an instrument of text": (card(data__config__instrument="mine"), "is a table"),
    "an instrument of NaN": (card(data__config__instrument__exposure=float("nan")), "finite number"),
    "a domain of text": (card(domain="HST"), "does not state"),
    "a domain of numbers as text": (card(domain__rms=["0.002", "0.006"]), "finite number"),
    "a domain of NaN": (card(domain__zero_point=float("nan")), "finite number"),
    "a domain of infinity": (card(domain__pixel_scale=float("inf")), "finite number"),
    "a domain beyond all numbers": (card(domain__pixel_scale=10**400), "finite number"),
    "a domain of true": (card(domain__pixel_scale=True), "finite number"),
    "ranges of three": (card(domain__ranges__mag=[1, 2, 3]), "does not state"),
    "ranges of one": (card(domain__ranges__mag=5), "does not state"),
    "a calibration of other lengths": (by_magnitude(mag=[18.0, 19.0, 20.0]), "other lengths"),
    "a calibration of one orientation": (by_magnitude(orientation=[1.0]), "other lengths"),
    "a calibration of no orientation": (by_magnitude(orientation=[1.0, 0.0]), "positive factors"),
    "quarter turns of text": (card(quarter_turns="four"), "finite number"),
    "a calibration of three factors": (by_magnitude(factors=[[1.0] * 3] * 2), "other lengths"),
    "a calibration of nothing": (by_magnitude(mag=[], factors=[]), "other lengths"),
    "a calibration of NaN": (by_magnitude(factors=[[float("nan")] * 4] * 2), "finite number"),
    "a negative calibration": (by_magnitude(factors=[[-1.0] * 4] * 2), "positive factors"),
    "a calibration in another order": (by_magnitude(mag=[20.0, 18.0]), "increasing magnitudes"),
    "a calibration of four polynomials": (calibration(polynomials=[[0.0] * 45] * 4), "has 5 x 45 numbers"),
    "a calibration of short polynomials": (calibration(polynomials=[[0.0] * 9] * 5), "has 5 x 45 numbers"),
    "a calibration of text in polynomials": (calibration(polynomials=[["one"] * 45] * 5), "finite number"),
    "a calibration without a range": (card(calibration={"domain": [[0.0] * 8, [1.0] * 8]}), "no polynomials"),
    "a calibration of an infinite range": (calibration(range=[[0.0] * 5, [float("inf")] * 5]), "finite number"),
    "a calibration of huge factors": (calibration(range=[[0.0] * 5, [700.0] * 5]), "within 10 of 0"),
    "a calibration from high to low": (calibration(domain=[[1.0] * 8, [0.0] * 8]), "lower to higher"),
    "a calibration of no width": (calibration(domain=[[0.0] * 8] * 2), "lower to higher"),
    "a calibration of text": (card(calibration="mine"), "no table"),
    "a calibration without factors": (card(calibration={"mag": [1.0]}), "no factors"),
    "label means of another length": (card(label_mean=[1.0]), "label_mean"),
    "labels without scatter": (card(label_std=[0.0] * 4), "label_std"),
}
"""What a stranger may do to the files of a directory, apart from the network; and what is said of it."""


@pytest.mark.parametrize("kind", DIRECTORIES)
def test_a_hostile_directory_is_one_line(run, directory, kind):
    change, message = DIRECTORIES[kind]
    change(directory)
    code, err = run(directory)
    assert_one_line(code, err, message)


def assert_one_line(code, err, message):
    assert code == 1, err
    assert err.count("\n") == 1, err
    assert err.startswith("Error: ")
    assert len(err) < 1000
    assert any(part in err for part in message.split("|")), err


STAMPS = helper.make_tensor_value_info("stamps", TensorProto.FLOAT, ["N", 128, 128])


def ints(name, values):
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)


def model(nodes, constants=(), opset=13, inputs=(STAMPS,), result="y", **more):
    """A network of the right input and output that does something in between."""
    y = helper.make_tensor_value_info(result, TensorProto.FLOAT, ["N", 2 * N_TARGETS])
    mine = helper.make_graph(nodes, "g", list(inputs), [y], list(constants))
    return helper.make_model(mine, opset_imports=[helper.make_opsetid("", opset)], ir_version=8, **more)


MEAN = [helper.make_node("ReduceMean", ["stamps"], ["m"], axes=[1], keepdims=0)]
EIGHT = [
    helper.make_node("Slice", ["m", "zero", "eight", "one"], ["e"]),
]
AXES = [ints("zero", [0]), ints("eight", [8]), ints("one", [1])]


def ending(name):
    """From the first eight means of the columns to the result, by way of an array that must be made first."""
    return [*MEAN, *EIGHT, helper.make_node("Add", ["e", name], ["y"])]


def plain():
    return model([*MEAN, helper.make_node("Slice", ["m", "zero", "eight", "one"], ["y"])], AXES)


def external(location):
    b = TensorProto(name="b", data_type=TensorProto.FLOAT, dims=[8], data_location=TensorProto.EXTERNAL)
    b.external_data.add(key="location", value=location)
    return model(ending("b"), [*AXES, b])


def huge_constant():
    """A constant that says it has 80 GB, and has none."""
    return model(ending("b"), [*AXES, TensorProto(name="b", data_type=TensorProto.FLOAT, dims=[200_000, 100_000])])


def made(op, constants, **options):
    return model([helper.make_node(op, list(constants), ["big"], **options), *sum_of_big()], [
        *AXES, *(ints(name, values) for name, values in constants.items()),
    ])  # fmt: skip


def sum_of_big():
    return [helper.make_node("ReduceMean", ["big"], ["s"], keepdims=0), *ending("s")]


def outer():
    """Two columns of 200,000 whose product has 160 GB."""
    column = numpy_helper.from_array(np.zeros((200_000, 1), np.float32), "column")
    row = numpy_helper.from_array(np.zeros((1, 200_000), np.float32), "row")
    node = helper.make_node("Mul", ["column", "row"], ["big"])
    return model([node, helper.make_node("ReduceMean", ["big"], ["s"], axes=[0, 1], keepdims=0), *ending("s")], [
        *AXES, column, row,
    ])  # fmt: skip


def doubled(times=40):
    """An array joined to itself forty times."""
    nodes = [helper.make_node("Concat", ["stamps"] * 2, ["d0"], axis=1)]
    nodes += [helper.make_node("Concat", [f"d{i}"] * 2, [f"d{i + 1}"], axis=1) for i in range(times)]
    nodes += [helper.make_node("ReduceMean", [f"d{times}"], ["s"], axes=[0, 1, 2], keepdims=0)]
    return model([*nodes, *ending("s")], AXES)


def padded():
    """A convolution that pads its image to 10^5 pixels a side."""
    kernel = numpy_helper.from_array(np.zeros((1, 1, 1, 1), np.float32), "k")
    nodes = [
        helper.make_node("Unsqueeze", ["stamps", "one"], ["image"]),
        helper.make_node("Conv", ["image", "k"], ["big"], pads=[50_000] * 4),
        helper.make_node("ReduceMean", ["big"], ["s"], axes=[0, 1, 2, 3], keepdims=0),
    ]
    return model([*nodes, *ending("s")], [*AXES, kernel])


def endless():
    """A loop of 2^62 turns."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Identity", ["v"], ["u"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("d", TensorProto.BOOL, []),
            helper.make_tensor_value_info("u", TensorProto.FLOAT, None),
        ],
    )
    turns = helper.make_tensor("turns", TensorProto.INT64, [], [2**62])
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    nodes = [*MEAN, *EIGHT, helper.make_node("Loop", ["turns", "yes", "e"], ["y"], body=body)]
    return model(nodes, [*AXES, turns, yes])


def slow():
    """Matrices of 4096 numbers a side, multiplied a hundred times."""
    square = numpy_helper.from_array(np.zeros((1, 4096), np.float32), "row")
    column = numpy_helper.from_array(np.zeros((4096, 1), np.float32), "column")
    nodes = [helper.make_node("Mul", ["column", "row"], ["p0"])]
    nodes += [helper.make_node("MatMul", [f"p{i}", f"p{i}"], [f"p{i + 1}"]) for i in range(100)]
    nodes += [helper.make_node("ReduceMean", ["p100"], ["s"], axes=[0, 1], keepdims=0)]
    return model([*nodes, *ending("s")], [*AXES, square, column])


def other_domain():
    found = plain()
    found.graph.node[0].domain = "com.microsoft"
    return found


def with_function():
    found = plain()
    found.functions.add(name="f", domain="mine")
    return found


def with_subgraph():
    found = plain()
    found.graph.node[0].attribute.append(helper.make_attribute("extra", found.graph))
    return found


def with_sparse():
    found = plain()
    found.graph.sparse_initializer.add(dims=[10**6, 10**6])
    return found


def with_metadata():
    found = plain()
    found.metadata_props.add(key="ort_config", value="{}")
    return found


def given(shape):
    return helper.make_tensor_value_info("stamps", TensorProto.FLOAT, shape)


def twice(name):
    """The bytes of two networks joined: protocol buffers merge them."""
    return plain().SerializeToString() + external(name).SerializeToString()


NETWORKS = {
    "values in another file": (lambda: external("other.bin"), "external data"),
    "values one directory up": (lambda: external("../other.bin"), "external data"),
    "values anywhere": (lambda: external("/etc/passwd"), "external data"),
    "values in memory": (lambda: external("*/_ORT_MEM_ADDR_/*"), "external data"),
    "two networks in a file": (lambda: twice("/etc/passwd"), "two fields"),
    "a constant of 80 GB": (huge_constant, "numbers"),
    "ConstantOfShape": (lambda: made("ConstantOfShape", {"shape": [200_000, 100_000]}), "'ConstantOfShape'"),
    "Expand": (lambda: made("Expand", {"one_": [1], "shape": [10**9, 100]}), "'Expand'"),
    "Tile": (lambda: made("Tile", {"one_": [1], "repeats": [10**11]}), "'Tile'"),
    "Range": (lambda: made("Range", {"a": [0], "b": [10**12], "c": [1]}), "'Range'"),
    "Loop": (endless, "'Loop'"),
    "RandomNormal": (lambda: made("RandomNormal", {}, shape=[10**5, 10**6]), "'RandomNormal'"),
    "an outer product": (outer, "numbers"),
    "an array doubled": (doubled, "numbers"),
    "a padded convolution": (padded, "makes no sense"),
    "hours of work": (slow, "more memory or time"),
    "operators of others": (other_domain, "'ReduceMean', which networks"),
    "functions": (with_function, "field 25"),
    "a subgraph": (with_subgraph, "field 6"),
    "sparse values": (with_sparse, "field 15"),
    "settings of ONNX Runtime": (with_metadata, "field 14"),
    "operators of another age": (lambda: model(plain().graph.node, AXES, opset=7), "version 7"),
    "no network": (lambda: b"\x08\x08", "no network"),
    "bytes": (lambda: b"\xff" * 1000, "is no network"),
    "an unknown input": (
        lambda: model(plain().graph.node, AXES, inputs=[STAMPS, helper.make_tensor_value_info("weather", 1, [9])]),
        "input 'weather'",
    ),
    "stamps of another shape": (lambda: model(plain().graph.node, AXES, inputs=[given(["N", 64, 64])]), "takes inputs"),
    "stamps of another type": (
        lambda: model(plain().graph.node, AXES, inputs=[helper.make_tensor_value_info("stamps", 7, ["N", 128, 128])]),
        "cannot be opened|fails when it runs",
    ),
    "four results": (lambda: model(plain().graph.node, [AXES[0], ints("eight", [4]), AXES[2]]), "by its card [8]"),
    "an array that nothing makes": (lambda: model(plain().graph.node, AXES, result="z"), "is damaged"),
    "a circle": (lambda: model([helper.make_node("Relu", ["y"], ["y"])]), "nothing makes"),
}
"""Networks that a stranger may write, and what is said of each."""

IN_ONE_PROCESS = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]), -1))
import contextlib, io
from sersicnet import cli
out = {}
for name in json.load(sys.stdin):
    said, code = io.StringIO(), None
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            cli.main(["measure", sys.argv[2], "-o", name + ".ecsv", "-w", name, "-q", "--workers", "1"])
        except SystemExit as done:
            code = done.code or 0
        except BaseException as error:
            said.write(f"{type(error).__name__}: {error}")
    out[name] = code, said.getvalue()
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def refused(tmp_path_factory, mosaic):
    """What is said of all networks, by a process that may not take more memory than it should."""
    folder = tmp_path_factory.mktemp("networks")
    names = {}
    for i, (kind, (make, _)) in enumerate(NETWORKS.items()):
        w = shutil.copytree(weights.shipped_directory() / "fovea-sky", folder / f"w{i}")
        found = make()
        (w / "network.onnx").write_bytes(found if isinstance(found, bytes) else found.SerializeToString())
        np.full(8, 7.0, "f4").tofile(w / "other.bin")
        sign(w)
        names[kind] = str(w)
    done = subprocess.run(
        [sys.executable, "-c", IN_ONE_PROCESS, str(GIGABYTES * 2**30), str(mosaic)],
        input=json.dumps(list(names.values())), capture_output=True, text=True, cwd=folder, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # nor does ONNX Runtime write lines of its own
    found = json.loads(done.stdout)
    assert not list(folder.glob("*.ecsv"))
    return {kind: found[name] for kind, name in names.items()}


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_hostile_network_is_one_line(refused, kind):
    assert_one_line(*refused[kind], NETWORKS[kind][1])


def test_the_plain_network_of_these_tests_measures(run, directory):
    """What they change is what is refused."""
    (directory / "network.onnx").write_bytes(plain().SerializeToString())
    sign(directory)
    assert run(directory) == (0, "")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_network_that_returns_no_number_is_one_line(run, directory, tmp_path, value):
    b = numpy_helper.from_array(np.full(8, value, np.float32), "b")
    (directory / "network.onnx").write_bytes(model(ending("b"), [*AXES, b]).SerializeToString())
    sign(directory)
    assert_one_line(*run(directory), "returns no number for any galaxy")
    assert not (tmp_path / "cat.ecsv").exists()


@pytest.mark.parametrize("name", weights.shipped())
def test_shipped_networks_ask_for_little(name):
    content = (weights.shipped_directory() / name / "network.onnx").read_bytes()
    card = weights.load(name).card
    width = 17 if card.get("orientation") else N_TARGETS * (2 if card["errors"] else 1)
    assert graph.result(content, INPUT_SHAPES._asdict(), weights.BATCH) == (weights.BATCH, width)


def test_shapes_are_those_of_onnx():
    """The shapes that are followed through a shipped network are those that its authors' package infers."""
    path = weights.shipped_directory() / "fovea-sky" / "network.onnx"
    found = onnx.load(path)
    found.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 64
    inferred = onnx.shape_inference.infer_shapes(found, data_prop=True)
    theirs = {
        value.name: tuple(side.dim_value for side in value.type.tensor_type.shape.dim)
        for value in inferred.graph.value_info
    }
    ours = graph.shapes(path.read_bytes(), INPUT_SHAPES._asdict(), 64)
    known = {name: shape for name, shape in theirs.items() if all(shape)}
    assert len(known) > 200
    assert {name: ours[name] for name in known} == known


def test_damaged_networks_are_refused_or_open(directory):
    """Two thousand changes of a byte or a cut: a ValueError or a shape, never anything else."""
    content = plain().SerializeToString()
    rng = np.random.default_rng(3)
    for _ in range(2000):
        changed = bytearray(content[: rng.integers(len(content))] if rng.random() < 0.2 else content)
        for at in rng.integers(len(changed), size=rng.integers(1, 4)) if changed else ():
            changed[at] = rng.integers(256)
        with contextlib.suppress(ValueError):
            assert len(graph.result(bytes(changed), INPUT_SHAPES._asdict(), 64)) <= 3


INSTRUMENTS = {
    "no instrument": (card(data__config__instrument={"name": "x"}), "no pixel_scale"),
    "no exposure": (card(data__config__instrument__exposure=0), "exposure of its instrument is positive"),
    "fields of another age": (card(data__config__instrument__seeing=1.0), "has no PSF"),
    "a mirror of text": (card(data__config__instrument__aperture="large"), "has no PSF"),
    "a mirror of a nanometre": (card(data__config__instrument__aperture=1e-9), "has no PSF"),
    "pixels of text": (card(data__config__instrument__pixels=["a"]), "has no PSF"),
    "a blur of 1e20 arcsec": (card(data__config__instrument__blur=1e20), "has no PSF"),
}
"""Instruments on a card, from which fits without a PSF take theirs."""


@pytest.mark.parametrize("kind", INSTRUMENTS)
def test_a_hostile_instrument_is_one_line(run, directory, kind):
    change, message = INSTRUMENTS[kind]
    change(directory)
    code, err = run(directory, "--refine")
    assert code == 1, err
    assert message in err.splitlines()[-1]
    assert all(line.startswith("Warning: ") for line in err.splitlines()[:-1])


def linked(w):
    """Links to the files of another directory, as the caches of some tools have them."""
    store = shutil.copytree(w, w.with_name("store"))
    for name in (*NAMES, "SHA256SUMS"):
        (w / name).unlink()
        (w / name).symlink_to(store / name)


HARMLESS = {
    "links to files with true sums": linked,
    "another file": lambda w: (w / "sitecustomize.py").write_text("raise SystemExit(7)"),
    "pickles": lambda w: (w / "network.pkl").write_bytes(b"cos\nsystem\n(S'exit 7'\ntR."),
    "more on the card": card(mine=[None, {"a": "b"}]),
    "sums of other files": sums(lambda found: found + b"0" * 64 + b"  ../../etc/passwd\n"),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_does_no_harm_measures(run, directory, kind):
    HARMLESS[kind](directory)
    assert run(directory) == (0, "")


def keras_file(w, **members):
    """Change members of the Keras file; None removes one."""
    with zipfile.ZipFile(w / "network.keras") as packed:
        found = {name: packed.read(name) for name in packed.namelist()}
    for name, content in members.items():
        place = {"config": "config.json", "values": "model.weights.h5"}.get(name, name)
        found[place] = content(found.get(place, b"")) if callable(content) else content
    with zipfile.ZipFile(w / "network.keras", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        for name, content in found.items():
            if content is not None:
                packed.writestr(name, content)
    sign(w)


def configured(change):
    """Change the configuration of the Keras file: of its core, a table of its layers by number."""

    def edit(content):
        config = json.loads(content)
        core = next(layer for layer in config["config"]["layers"] if layer["class_name"] == "Functional")
        change(core["config"]["layers"])
        return json.dumps(config).encode()

    return lambda w: keras_file(w, config=edit)


def replaced(name, module="keras.layers", **options):
    def change(layers):
        layers[1].update({"class_name": name, "module": module, "config": {"name": "mine", **options}})

    return configured(change)


def widened(layers):
    dense = next(layer for layer in layers if layer["class_name"] == "Dense")
    dense["config"]["units"] = 10**9


def values(change):
    """Change the HDF5 file of the weights."""

    def edit(content):
        buffer = io.BytesIO(content)
        with h5py.File(buffer, "r+") as file:
            change(file)
        return buffer.getvalue()

    return lambda w: keras_file(w, values=edit)


def far(file):
    del file["layers"]
    file["layers"] = h5py.ExternalLink("/etc/passwd", "/")


def outside(file):
    file.create_dataset("mine", (16,), "u1", external=[("/etc/hostname", 0, 16)])


KERAS_FILES = {
    "a bomb": (lambda w: keras_file(w, config=bytes(300 * 2**20)), "unpacked it would have"),
    "another member": (lambda w: keras_file(w, **{"../../evil.py": b"x"}), "and nothing else"),
    "assets": (lambda w: keras_file(w, **{"assets/a.txt": b"x"}), "and nothing else"),
    "no configuration": (lambda w: keras_file(w, config=None), "and nothing else"),
    "a configuration 100,000 deep": (lambda w: keras_file(w, config=b"[" * 100_000), "cannot be read"),
    "a configuration of another age": (
        lambda w: keras_file(w, config=b'{"class_name": "Model", "keras_version": "1.0.3", "config": []}'),
        "'Model', which networks",
    ),
    "Lambda": (replaced("Lambda", function={"class_name": "__lambda__", "config": {"code": "4wA="}}), "'Lambda'"),
    "a layer of PyTorch": (replaced("TorchModuleWrapper"), "'TorchModuleWrapper'"),
    "a saved model": (replaced("TFSMLayer", filepath="/tmp"), "'TFSMLayer'"),
    "a function of Keras": (replaced("get_file", "keras.utils", fname="a", origin="file:///etc/passwd"), "'get_file'"),
    "code of others": (replaced("Dense", "os"), "'Dense', which networks"),
    "a layer of a billion": (configured(widened), "more than 16777216 weights"),
    "weights in another file": (values(far), "a link 'layers'"),
    "weights elsewhere": (values(outside), "are elsewhere"),
    "weights of 8 TB": (
        values(lambda file: file.create_dataset("mine", (10**6, 10**6), "f8", chunks=(100, 100))),
        "more than 16777216 weights",
    ),
    "weights of text": (values(lambda file: file.create_dataset("mine", data=[b"a", b"b"])), "are no numbers"),
    "no weights": (lambda w: keras_file(w, values=b""), "cannot be read"),
}
"""What a stranger may put into the file that training goes on from."""


@pytest.mark.parametrize("kind", KERAS_FILES)
def test_a_hostile_keras_file_is_one_line(directory, kind):
    change, message = KERAS_FILES[kind]
    change(directory)
    with pytest.raises(WeightsError) as said:
        weights.load(directory).keras_model()
    assert "\n" not in str(said.value)
    assert message in str(said.value)


SETTINGS = {
    "a backend of another age": ('{"backend": "theano", "image_dim_ordering": "th", "epsilon": 1e-07}', "theano"),
    "a precision of another age": ('{"floatx": "float8"}', "float8"),
    "a list": ("[1, 2]", "list"),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_of_keras_that_do_not_serve_are_one_line(directory, tmp_path, kind):
    content, message = SETTINGS[kind]
    without_onnx(directory)
    done = with_settings(tmp_path, content, f"from sersicnet import cli; cli.main(['export', '{directory}'])")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: Keras does not start: ")
    assert message in done.stderr
    assert str(tmp_path / "keras.json") in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_backend_of_keras_that_is_not_installed_is_one_line(directory, tmp_path):
    without_onnx(directory)
    script = f"import sys; sys.modules['torch'] = None; from sersicnet import cli; cli.main(['export', '{directory}'])"
    done = with_settings(tmp_path, '{"backend": "torch"}', script)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: Keras does not start: ")
    assert "torch" in done.stderr
    assert done.stderr.count("\n") == 1


def test_settings_of_keras_do_not_change_networks(tmp_path):
    script = (
        "from sersicnet import networks as n; m = n.tl(); print(m.count_params(), m.dtype, n.keras.config.floatx())"
    )
    settings = '{"image_data_format": "channels_first", "floatx": "float16"}'
    done = with_settings(tmp_path, settings, script)
    assert done.stdout.split() == [str(1_939_496), "float32", "float32"], done.stderr


def without_onnx(w):
    (w / "network.onnx").unlink()
    path = w / "SHA256SUMS"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "onnx" not in line))


def with_settings(home, content, script):
    (home / "keras.json").write_text(content)
    environment = {**os.environ, "KERAS_HOME": str(home)}
    environment.pop("KERAS_BACKEND", None)
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)


def test_a_file_that_cannot_be_read_is_one_line(directory, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(WeightsError, match="SHA256SUMS cannot be read: Permission denied"):
        weights.load(directory)


def test_a_card_that_cannot_be_shown_is_one_line(directory):
    card(summary=None, training="long")(directory)
    with pytest.raises(WeightsError, match=r"The card of fovea-sky cannot be shown: TypeError"):
        cardpage.readable(weights.load(directory).card)
