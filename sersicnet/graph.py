"""What a network asks of ONNX Runtime, read from its file before ONNX Runtime opens it.

An ONNX file is a program: it may read other files, loop, or ask for any amount of memory.
`check` lets only those files pass that sersicnet itself could have written: with all their values
inside, of few operators, and small. The shapes of all arrays are followed through the network for
one batch of stamps, so that their sizes are known.

The file is a protocol buffer; this is a reader of its own for the parts that such a network has,
because importing the package ``onnx`` takes thirty times as long.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

MOST_VALUES = 2**26
"""Numbers in an array of a batch, or in the patches of a convolution: twice what ``dann`` needs, 256 MB."""
MOST_WORK = 2**37
"""Multiply-adds of a batch: four times what ``dann`` needs, some seconds of a core."""
MOST_TOTAL = 2**29
"""Numbers in all arrays of a batch together: twice what ``dann`` needs."""
MOST_KNOWN = 1000
"""Numbers of an array whose values are followed, too: shapes and axes."""
OPSETS = range(13, 19)
"""Versions of the operators whose shapes are known here; the export writes 15."""
INT32, INT64 = 6, 7
TYPES = {1: np.float32, 6: np.int32, 7: np.int64, 9: np.bool_, 10: np.float16, 11: np.float64}
"""Types of arrays, by their number in ONNX."""

# Fields of the messages, as in onnx.proto: number, name, and kind (i: integer, f: float, b: bytes, capitals: several).
# What is not listed has no place in a network of sersicnet: functions, subgraphs, sparse or external values.
_MODEL = {
    1: ("ir_version", "i"), 2: ("producer_name", "b"), 3: ("producer_version", "b"), 4: ("domain", "b"),
    5: ("model_version", "i"), 6: ("doc_string", "b"), 7: ("graph", "b"), 8: ("opset_import", "B"),
}  # fmt: skip
_OPSET = {1: ("domain", "b"), 2: ("version", "i")}
_GRAPH = {
    1: ("node", "B"), 2: ("name", "b"), 5: ("initializer", "B"), 10: ("doc_string", "b"), 11: ("input", "B"),
    12: ("output", "B"),
}  # fmt: skip
_PORT = {1: ("name", "b"), 2: ("type", "b"), 3: ("doc_string", "b")}
_NODE = {
    1: ("input", "B"), 2: ("output", "B"), 3: ("name", "b"), 4: ("op_type", "b"), 5: ("attribute", "B"),
    6: ("doc_string", "b"), 7: ("domain", "b"),
}  # fmt: skip
_ATTRIBUTE = {
    1: ("name", "b"), 2: ("f", "f"), 3: ("i", "i"), 4: ("s", "b"), 7: ("floats", "F"), 8: ("ints", "I"),
    13: ("doc_string", "b"), 20: ("type", "i"),
}  # fmt: skip
_TENSOR = {
    1: ("dims", "I"), 2: ("data_type", "i"), 4: ("float_data", "F"), 5: ("int32_data", "I"), 7: ("int64_data", "I"),
    8: ("name", "b"), 9: ("raw_data", "b"), 12: ("doc_string", "b"), 14: ("data_location", "i"),
}  # fmt: skip
_EXTERNAL_DATA = 13


def _varint(buffer: memoryview, at: int) -> tuple[int, int]:
    """An integer of seven bits a byte, and where it ends."""
    value = shift = 0
    while True:
        byte = buffer[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (2**64 - 1), at
        shift += 7
        if shift > 63:
            raise ValueError("an integer of more than 64 bits")


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _raw(buffer: memoryview) -> Iterator[tuple[int, int, Any]]:
    """The fields of a message: number, wire type, content."""
    at, end = 0, len(buffer)
    while at < end:
        tag, at = _varint(buffer, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(buffer, at)
            yield number, wire, _signed(value)
            continue
        if wire == 2:
            size, at = _varint(buffer, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"a field of wire type {wire}")
        if size > end - at:
            raise ValueError("it is cut short")
        yield number, wire, buffer[at : at + size]
        at += size


def _packed(value: memoryview) -> Iterator[int]:
    at = 0
    while at < len(value):
        number, at = _varint(value, at)
        yield _signed(number)


def _message(buffer: memoryview, known: Mapping[int, tuple[str, str]], what: str) -> dict[str, Any]:
    """The fields of a message by name; those that may be there several times as lists."""
    out: dict[str, Any] = {name: [] for name, kind in known.values() if kind.isupper()}
    for number, wire, value in _raw(buffer):
        if number not in known:
            if known is _TENSOR and number == _EXTERNAL_DATA:
                raise ValueError("it has values in other files (external data), which are not listed in SHA256SUMS")
            raise ValueError(f"a {what} has a field {number}, which sersicnet does not write")
        name, kind = known[number]
        if kind == "I":
            out[name].extend([value] if wire == 0 else _packed(_bytes(value, wire)))
        elif kind == "F":
            data = bytes(value) if wire in (2, 5) else b""
            out[name].extend(struct.unpack(f"<{len(data) // 4}f", data))
        elif kind == "B":
            out[name].append(_bytes(value, wire))
        elif name in out:
            raise ValueError(f"a {what} has two fields {name}")
        elif {"i": 0, "b": 2, "f": 5}[kind] != wire:
            raise ValueError(f"the {name} of a {what} has another type")
        else:
            out[name] = value
    return out


def _bytes(value: memoryview, wire: int) -> memoryview:
    if wire != 2:
        raise ValueError("a field has another type")
    return value


def _text(value: memoryview) -> str:
    return str(value, "utf-8")


class Array(NamedTuple):
    """What is known of an array before the network runs.

    Attributes
    ----------
    shape : tuple of int
    values : ndarray or None
        Of short arrays that do not depend on the stamps: shapes and axes.
    """

    shape: tuple[int, ...]
    values: np.ndarray | None = None

    def integers(self) -> list[int]:
        """The values, of a shape or of axes."""
        if self.values is None or self.values.dtype.kind != "i":
            raise ValueError("a shape depends on the stamps")
        return [int(value) for value in self.values.ravel()]


@dataclass(frozen=True)
class Node:
    """A step of a network.

    Attributes
    ----------
    op : str
        Name of the operator.
    inputs : list of Array or None
        None for those left out.
    options : dict
        Attributes of the node, by name.
    """

    op: str
    inputs: list[Array | None]
    options: dict[str, Any]

    def __getitem__(self, i: int) -> Array:
        found = self.inputs[i]
        if found is None:
            raise ValueError(f"{self.op} lacks an input")
        return found

    def optional(self, i: int) -> Array | None:
        """An input that may be left out."""
        return self.inputs[i] if i < len(self.inputs) else None


def _axes(axes: list[int], rank: int) -> list[int]:
    """Axes counted from the first, each at most once."""
    out = [axis + rank if axis < 0 else axis for axis in axes]
    if len(set(out)) != len(out) or not all(0 <= axis < rank for axis in out):
        raise ValueError(f"axes {axes} of {rank}")
    return out


def _like(node: Node) -> Array:
    return Array(node[0].shape)


def _cast(node: Node) -> Array:
    kind, values = TYPES[node.options["to"]], node[0].values
    integers = values is not None and np.dtype(kind).kind == "i"
    return Array(node[0].shape, values.astype(kind) if values is not None and integers else None)


def _broadcast(node: Node) -> Array:
    return Array(np.broadcast_shapes(*(node[i].shape for i in range(len(node.inputs)))))


def _shape(node: Node) -> Array:
    shape = np.array(node[0].shape, np.int64)
    return Array(shape.shape, shape)


def _reshape(node: Node) -> Array:
    data, wanted = node[0], node[1].integers()
    shape = [data.shape[i] if side == 0 else side for i, side in enumerate(wanted)]
    if shape.count(-1) == 1:
        rest = -math.prod(shape)
        shape[shape.index(-1)] = math.prod(data.shape) // rest if rest else 0
    if min(shape, default=1) < 0 or math.prod(shape) != math.prod(data.shape):
        raise ValueError(f"{data.shape} cannot be reshaped to {wanted}")
    return Array(tuple(shape), None if data.values is None else data.values.reshape(shape))


def _unsqueeze(node: Node) -> Array:
    axes = node[1].integers()
    axes = _axes(axes, len(node[0].shape) + len(axes))
    shape = list(node[0].shape)
    for axis in sorted(axes):
        shape.insert(axis, 1)
    return Array(tuple(shape), None if node[0].values is None else node[0].values.reshape(shape))


def _squeeze(node: Node) -> Array:
    data = node[0]
    gone = _axes(node[1].integers(), len(data.shape))
    if any(data.shape[axis] != 1 for axis in gone):
        raise ValueError(f"{data.shape} cannot lose the axes {gone}")
    shape = tuple(side for axis, side in enumerate(data.shape) if axis not in gone)
    return Array(shape, None if data.values is None else data.values.reshape(shape))


def _concat(node: Node) -> Array:
    parts = [node[i] for i in range(len(node.inputs))]
    (axis,) = _axes([node.options["axis"]], len(parts[0].shape))
    if len({part.shape[:axis] + part.shape[axis + 1 :] for part in parts}) != 1:
        raise ValueError(f"arrays of shapes {[part.shape for part in parts]} cannot be joined")
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    values = [part.values for part in parts if part.values is not None]
    return Array(tuple(shape), np.concatenate(values, axis) if len(values) == len(parts) else None)


def _gather(node: Node) -> Array:
    data, at = node[0], node[1]
    (axis,) = _axes([node.options.get("axis", 0)], len(data.shape))
    values = None
    if data.values is not None and at.values is not None:
        values = np.take(data.values, at.values, axis)
    return Array(data.shape[:axis] + at.shape + data.shape[axis + 1 :], values)


def _slice(node: Node) -> Array:
    data, starts, ends = node[0], node[1].integers(), node[2].integers()
    axes = found.integers() if (found := node.optional(3)) else list(range(len(starts)))
    steps = found.integers() if (found := node.optional(4)) else [1] * len(starts)
    axes = _axes(axes, len(data.shape))
    taken = [slice(None)] * len(data.shape)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        taken[axis] = slice(start, end, step)
    shape = tuple(len(range(*part.indices(side))) for part, side in zip(taken, data.shape, strict=True))
    return Array(shape, None if data.values is None else data.values[tuple(taken)])


def _transpose(node: Node) -> Array:
    order = node.options["perm"]
    if _axes(order, len(node[0].shape)) != order or len(order) != len(node[0].shape):
        raise ValueError(f"axes {order} of {len(node[0].shape)}")
    return Array(tuple(node[0].shape[axis] for axis in order))


def _matmul(node: Node) -> Array:
    first, second = node[0].shape, node[1].shape
    if len(first) < 2 or len(second) < 2 or first[-1] != second[-2]:
        raise ValueError(f"matrices of shapes {first} and {second} cannot be multiplied")
    return Array((*np.broadcast_shapes(first[:-2], second[:-2]), first[-2], second[-1]))


def _reduce(node: Node) -> Array:
    shape = node[0].shape
    given = node.optional(1)
    axes = _axes(given.integers() if given else node.options["axes"], len(shape))
    keep = node.options.get("keepdims", 1)
    return Array(tuple(1 if i in axes else side for i, side in enumerate(shape) if keep or i not in axes))


def _window(node: Node, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """The positions of a window on an image."""
    sides, n = node[0].shape[2:], len(kernel)
    strides, spread = (node.options.get(name, [1] * n) for name in ("strides", "dilations"))
    pads = node.options.get("pads", [0] * (2 * n))
    out = []
    for side, width, stride, step, before, after in zip(
        sides, kernel, strides, spread, pads[:n], pads[n:], strict=True
    ):
        reach = step * (width - 1)
        if min(width, stride, step) < 1 or not (0 <= before <= reach and 0 <= after <= reach):
            raise ValueError(f"{node.op} has a window that makes no sense")
        out.append((side + before + after - reach - 1) // stride + 1)
    if min(out, default=0) < 1:
        raise ValueError(f"{node.op} has a window larger than its image")
    return tuple(out)


def _convolution(node: Node) -> Array:
    data, kernel = node[0].shape, node[1].shape
    if node.options.get("kernel_shape", list(kernel[2:])) != list(kernel[2:]):
        raise ValueError("Conv has two sizes of its kernel")
    if data[1] != kernel[1] * node.options.get("group", 1):
        raise ValueError(f"Conv of {data[1]} channels by a kernel of {kernel[1]}")
    return Array((data[0], kernel[0], *_window(node, kernel[2:])))


def _pool(node: Node) -> Array:
    return Array((*node[0].shape[:2], *_window(node, tuple(node.options["kernel_shape"]))))


_WINDOW = {"kernel_shape": "ints", "strides": "ints", "dilations": "ints", "pads": "ints"}
_REDUCE = {"axes": "ints", "keepdims": "i"}
OPERATORS: dict[str, tuple[Callable[[Node], Array], dict[str, str]]] = {
    **dict.fromkeys(("Abs", "Clip", "Exp", "Identity", "Log", "Neg", "Relu", "Sigmoid"), (_like, {})),
    **dict.fromkeys(("Reciprocal", "Sign", "Sqrt", "Tanh"), (_like, {})),
    **dict.fromkeys(("Add", "Div", "Max", "Min", "Mul", "Pow", "Sub"), (_broadcast, {})),
    **dict.fromkeys(("AveragePool", "MaxPool"), (_pool, _WINDOW)),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceSum"), (_reduce, _REDUCE)),
    "Cast": (_cast, {"to": "i"}),
    "Concat": (_concat, {"axis": "i"}),
    "Conv": (_convolution, {**_WINDOW, "group": "i"}),
    "Gather": (_gather, {"axis": "i"}),
    "MatMul": (_matmul, {}),
    "Reshape": (_reshape, {}),
    "Shape": (_shape, {}),
    "Slice": (_slice, {}),
    "Squeeze": (_squeeze, {}),
    "Transpose": (_transpose, {"perm": "ints"}),
    "Unsqueeze": (_unsqueeze, {}),
}
"""The operators that the export of sersicnet's networks writes: what their results' shapes are, and their options."""

_ATTRIBUTE_TYPES = {"f": 1, "i": 2, "s": 3, "floats": 6, "ints": 7}


def _initial(buffer: memoryview) -> tuple[str, Array]:
    """A weight or constant: its name, and its shape or short values."""
    found = _message(buffer, _TENSOR, "weight")
    shape, kind = tuple(found["dims"]), found.get("data_type", 0)
    if found.get("data_location", 0):
        raise ValueError("it has values in other files (external data), which are not listed in SHA256SUMS")
    if kind not in TYPES:
        raise ValueError(f"a weight has the type {kind}")
    if min(shape, default=1) < 0:
        raise ValueError(f"a weight has the shape {shape}")
    size, width = math.prod(shape), np.dtype(TYPES[kind]).itemsize
    given: list[Any] = [found[name] for name in ("float_data", "int32_data", "int64_data") if found[name]]
    if "raw_data" in found:
        given.append(found["raw_data"])
        size *= width
    if len(given) > 1 or sum(map(len, given)) != size:
        raise ValueError(f"a weight of shape {shape} has {sum(map(len, given))} numbers or bytes of {size}")
    values = None
    if kind in (INT32, INT64) and math.prod(shape) <= MOST_KNOWN:
        own = np.dtype(TYPES[kind])
        if "raw_data" in found:
            values = np.frombuffer(found["raw_data"], own.newbyteorder("<")).astype(own).reshape(shape)
        else:
            values = np.array(given[0] if given else [], own).reshape(shape)
    return _text(found.get("name", memoryview(b""))), Array(shape, values)


def _node(buffer: memoryview, arrays: Mapping[str, Array]) -> tuple[str, Node]:
    """A step of the network: the name of its result, and what makes it."""
    found = _message(buffer, _NODE, "node")
    op = _text(found.get("op_type", memoryview(b"")))
    if op not in OPERATORS or bytes(found.get("domain", b"")) not in (b"", b"ai.onnx"):
        raise ValueError(f"it has the operator {op[:40]!r}, which networks of sersicnet do not need")
    if len(found["output"]) != 1:
        raise ValueError(f"{op} has {len(found['output'])} results")
    names = [_text(name) for name in found["input"]]
    if unknown := [name for name in names if name and name not in arrays]:
        raise ValueError(f"{op} takes {unknown[0][:40]!r}, which nothing makes")
    options = {}
    for part in found["attribute"]:
        attribute = _message(part, _ATTRIBUTE, "option")
        name = _text(attribute["name"])
        kind = OPERATORS[op][1].get(name, "")
        if not kind or name in options or attribute.get("type") != _ATTRIBUTE_TYPES[kind]:
            raise ValueError(f"{op} has an option {name[:40]!r}, which sersicnet does not write")
        options[name] = attribute.get(kind, 0)
    return _text(found["output"][0]), Node(op, [arrays[name] if name else None for name in names], options)


def _work(node: Node, made: Array) -> int:
    """Multiply-adds of a step; those of a convolution's patches are checked, too."""
    each = 1
    if node.op == "MatMul":
        each = node[0].shape[-1]
    elif node.op == "Conv":
        each = math.prod(node[1].shape[1:])
        if each * math.prod(made.shape[2:]) > MOST_VALUES:
            raise ValueError("Conv needs more memory than any network of sersicnet")
    elif "kernel_shape" in node.options:
        each = math.prod(node.options["kernel_shape"])
    elif node.op.startswith("Reduce"):
        return math.prod(node[0].shape)
    return each * math.prod(made.shape)


def shapes(content: bytes, ports: Mapping[str, tuple[int, ...]], batch: int) -> dict[str, tuple[int, ...]]:
    """Follow the shapes through a network.

    Parameters
    ----------
    content : bytes
        Of an ONNX file.
    ports : mapping
        Shapes of the inputs that this version offers, by name, without the axis of the batch.
    batch : int
        How many stamps it is shown together.

    Returns
    -------
    dict
        Shapes of all arrays by name; the last one is what the network returns.

    Raises
    ------
    ValueError
        If the file is not one that sersicnet can have written, or asks for too much; the message says why.
    """
    try:
        return _shapes(content, ports, batch)
    except ValueError:
        raise
    except Exception as error:  # damage shows in many ways: an index, a type, a missing field
        raise ValueError(f"it is damaged ({type(error).__name__}: {error})") from error


def result(content: bytes, ports: Mapping[str, tuple[int, ...]], batch: int) -> tuple[int, ...]:
    """Shape of what a network returns; see `shapes`."""
    return list(shapes(content, ports, batch).values())[-1]


def _shapes(content: bytes, ports: Mapping[str, tuple[int, ...]], batch: int) -> dict[str, tuple[int, ...]]:
    model = _message(memoryview(content), _MODEL, "file")
    if "graph" not in model:
        raise ValueError("it holds no network")
    for part in model["opset_import"]:
        opset = _message(part, _OPSET, "version")
        if bytes(opset.get("domain", b"")) in (b"", b"ai.onnx") and opset.get("version") not in OPSETS:
            raise ValueError(f"its operators have version {opset.get('version')}")
    graph = _message(model["graph"], _GRAPH, "network")
    arrays: dict[str, Array] = {}
    for part in graph["input"]:
        name = _text(_message(part, _PORT, "input")["name"])
        if name not in ports:
            raise ValueError(f"it takes an input {name[:40]!r}, this version has {', '.join(ports)}")
        _add(arrays, name, Array((batch, *ports[name])))
    for part in graph["initializer"]:
        _add(arrays, *_initial(part))
    total = work = 0
    for part in graph["node"]:
        name, node = _node(part, arrays)
        made = OPERATORS[node.op][0](node)
        _add(arrays, name, made)
        total += math.prod(made.shape)
        work += _work(node, made)
        if total > MOST_TOTAL or work > MOST_WORK:
            raise ValueError("it needs more memory or time than any network of sersicnet")
    outputs = [_text(_message(part, _PORT, "output")["name"]) for part in graph["output"]]
    if len(outputs) != 1:
        raise ValueError(f"it has {len(outputs)} results")
    last = arrays.pop(outputs[0])
    return {**{name: array.shape for name, array in arrays.items()}, outputs[0]: last.shape}


def _add(arrays: dict[str, Array], name: str, array: Array) -> None:
    if name in arrays:
        raise ValueError(f"two arrays are called {name[:40]!r}")
    if math.prod(array.shape) > MOST_VALUES:
        raise ValueError(
            f"it has an array of {math.prod(array.shape):.2g} numbers, more than any network of sersicnet needs"
        )
    if array.values is not None and array.values.size > MOST_KNOWN:
        array = Array(array.shape)
    arrays[name] = array
