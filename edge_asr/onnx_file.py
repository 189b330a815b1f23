"""Carries an ONNX graph between a file and the code that rewrites it: nodes and constants, and bytes as they were.

Law: weights are views of the mapped file until somebody changes them, so a model larger than the free memory can be
rewritten; every field that is not named here is written back as it was read. Shapes of inner values are left out,
because a rewritten graph no longer has them. Only what onnxruntime writes is read: no data outside the file.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Buffer: TypeAlias = bytes | memoryview
Attribute: TypeAlias = int | float | Sequence[int]

CONTRIB = "com.microsoft"
"""The domain of the operators that only onnxruntime has."""

# Field numbers of onnx.proto.
_MODEL_GRAPH = 7
_NODE, _CONSTANT, _OUTPUT, _INNER_SHAPE = 1, 5, 12, 13
_NODE_INPUT, _NODE_OUTPUT, _NODE_OP, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 2, 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_FLOAT, _ATTRIBUTE_INT, _ATTRIBUTE_INTS, _ATTRIBUTE_TYPE = 1, 2, 3, 8, 20
_TYPE_FLOAT, _TYPE_INT, _TYPE_INTS = 1, 2, 7
_DIMS, _DATA_TYPE, _FLOATS, _INT32S, _INT64S, _TENSOR_NAME, _RAW, _EXTERNAL = 1, 2, 4, 5, 7, 8, 9, 13
_VALUE_NAME = 1

_DATA_TYPES: dict[int, type[np.generic]] = {
    1: np.float32,
    2: np.uint8,
    3: np.int8,
    6: np.int32,
    7: np.int64,
    9: np.bool_,
    10: np.float16,
    11: np.float64,
}
_NUMBERS = {np.dtype(kind): number for number, kind in _DATA_TYPES.items()}


class OnnxFileError(Exception):
    """A file is not an ONNX graph that can be rewritten; the message is the end of a sentence about it."""


@dataclass(eq=False)
class Node:
    """One operation."""

    op: str
    inputs: list[str]
    outputs: list[str]
    domain: str = ""
    attributes: dict[str, Buffer] = field(default_factory=dict)
    """Name -> AttributeProto."""

    @classmethod
    def of(
        cls, op: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: Attribute
    ) -> Node:
        """Make a node; attributes are given as numbers."""
        return cls(op, list(inputs), list(outputs), domain, {k: _attribute(k, v) for k, v in attributes.items()})

    def number(self, name: str, default: float) -> float:
        """An attribute that is one number."""
        for number, value in _fields(self.attributes.get(name, b"")):
            if number == _ATTRIBUTE_FLOAT:
                return float(struct.unpack("<f", value)[0])
            if number == _ATTRIBUTE_INT:
                return _signed(value)
        return default

    def numbers(self, name: str) -> list[int]:
        """An attribute that is a list of integers; empty: it is not there."""
        return [
            each
            for number, value in _fields(self.attributes.get(name, b""))
            if number == _ATTRIBUTE_INTS
            for each in _integers(value)
        ]


@dataclass
class Graph:
    """A model: its nodes in an order in which they can run, and its constants; the rest as it was read."""

    nodes: list[Node]
    constants: dict[str, NDArray[Any]]
    outputs: dict[str, Buffer]
    """Name -> ValueInfoProto without the name."""
    around: list[Buffer]
    """ModelProto without the graph, field by field."""
    inside: list[Buffer]
    """The other fields of GraphProto."""

    @property
    def producers(self) -> dict[str, Node]:
        """Value -> the node that makes it."""
        return {output: node for node in self.nodes for output in node.outputs if output}

    @property
    def consumers(self) -> dict[str, list[Node]]:
        """Value -> the nodes that take it; the graph's outputs are not among them."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                found.setdefault(name, []).append(node)
        return found

    def rename(self, old: str, new: str) -> None:
        """Let whatever takes one value take another."""
        for node in self.nodes:
            node.inputs = [new if name == old else name for name in node.inputs]

    def drop_unused(self) -> None:
        """Leave out every node and constant that no output depends on."""
        producers = self.producers
        wanted, used = list(self.outputs), set(self.outputs)
        while wanted:
            node = producers.get(wanted.pop())
            for name in node.inputs if node is not None else ():
                if name not in used:
                    used.add(name)
                    wanted.append(name)
        self.nodes = [node for node in self.nodes if used.intersection(node.outputs)]
        self.constants = {name: array for name, array in self.constants.items() if name in used}


def read(path: Path) -> Graph:
    """Map a file and find its graph. Raises OnnxFileError."""
    with path.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        return _graph(data)
    except (IndexError, KeyError, ValueError, struct.error) as error:
        raise OnnxFileError(f"is no ONNX graph that can be rewritten ({error!r})") from None


def write(graph: Graph, path: Path) -> None:
    """Write a model. Raises OSError."""
    parts = list(_written(graph))
    with path.open("wb") as file:
        for part in [*graph.around, *_enclosed(_MODEL_GRAPH, parts)]:
            file.write(part)


def _graph(data: memoryview) -> Graph:
    graph = Graph([], {}, {}, [], [])
    found = False
    for number, value, field_bytes in _raw_fields(data):
        if number == _MODEL_GRAPH:
            found = True
            for inner, content, inner_bytes in _raw_fields(value):
                if inner == _NODE:
                    graph.nodes.append(_node(content))
                elif inner == _CONSTANT:
                    name, array = _constant(content)
                    graph.constants[name] = array
                elif inner == _OUTPUT:
                    name, rest = _named(content)
                    graph.outputs[name] = rest
                elif inner != _INNER_SHAPE:
                    graph.inside.append(inner_bytes)
        else:
            graph.around.append(field_bytes)
    if not found:
        raise ValueError("no graph")
    return graph


def _node(data: memoryview) -> Node:
    node = Node("", [], [])
    for number, value in _fields(data):
        if number == _NODE_INPUT:
            node.inputs.append(_text(value))
        elif number == _NODE_OUTPUT:
            node.outputs.append(_text(value))
        elif number == _NODE_OP:
            node.op = _text(value)
        elif number == _NODE_DOMAIN:
            node.domain = _text(value)
        elif number == _NODE_ATTRIBUTE:
            name = next(_text(inner) for each, inner in _fields(value) if each == _ATTRIBUTE_NAME)
            node.attributes[name] = value
    return node


def _constant(data: memoryview) -> tuple[str, NDArray[Any]]:
    name, dims, raw = "", list[int](), memoryview(b"")
    kind: np.dtype[Any] = np.dtype(np.float32)
    values: list[NDArray[Any]] = []
    for number, value in _fields(data):
        if number == _TENSOR_NAME:
            name = _text(value)
        elif number == _DIMS:
            dims += _integers(value)
        elif number == _DATA_TYPE:
            kind = np.dtype(_DATA_TYPES[value])
        elif number == _RAW:
            raw = value
        elif number == _FLOATS:
            values.append(np.frombuffer(value, "<f4"))
        elif number in {_INT32S, _INT64S}:
            values.append(np.array(_integers(value)))
        elif number == _EXTERNAL:
            raise ValueError(f"{name} lies in another file")
    array = np.concatenate(values).astype(kind) if values else np.frombuffer(raw, kind.newbyteorder("<"))
    return name, array.reshape(dims)


def _named(data: memoryview) -> tuple[str, bytes]:
    """The name of a ValueInfoProto, and the rest of it."""
    name = next(_text(value) for number, value in _fields(data) if number == _VALUE_NAME)
    return name, b"".join(raw for number, _, raw in _raw_fields(data) if number != _VALUE_NAME)


def _written(graph: Graph) -> Iterator[Buffer]:
    """GraphProto's fields."""
    for node in graph.nodes:
        parts: list[Buffer] = []
        for number, texts in (
            (_NODE_INPUT, node.inputs),
            (_NODE_OUTPUT, node.outputs),
            (_NODE_OP, [node.op]),
            (_NODE_DOMAIN, [node.domain] if node.domain else []),
        ):
            for text in texts:
                parts += _enclosed(number, [text.encode()])
        for attribute in node.attributes.values():
            parts += _enclosed(_NODE_ATTRIBUTE, [attribute])
        yield from _enclosed(_NODE, parts)
    yield from graph.inside
    for name, array in graph.constants.items():
        kind = array.dtype.newbyteorder("=")
        parts = [_tag(_DIMS, 0) + _varint(length) for length in array.shape]
        parts += [_tag(_DATA_TYPE, 0), _varint(_NUMBERS[kind]), *_enclosed(_TENSOR_NAME, [name.encode()])]
        little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
        parts += _enclosed(_RAW, [little.reshape(-1).view(np.uint8).data if little.size else b""])
        yield from _enclosed(_CONSTANT, parts)
    for name, rest in graph.outputs.items():
        yield from _enclosed(_OUTPUT, [*_enclosed(_VALUE_NAME, [name.encode()]), rest])


def _attribute(name: str, value: Attribute) -> bytes:
    parts: list[Buffer] = _enclosed(_ATTRIBUTE_NAME, [name.encode()])
    if isinstance(value, float):
        parts += [bytes([_ATTRIBUTE_FLOAT << 3 | 5]), struct.pack("<f", value)]
        kind = _TYPE_FLOAT
    elif isinstance(value, int):
        parts += [_tag(_ATTRIBUTE_INT, 0), _varint(value)]
        kind = _TYPE_INT
    else:
        for each in value:
            parts += [_tag(_ATTRIBUTE_INTS, 0), _varint(each)]
        kind = _TYPE_INTS
    return b"".join([*parts, _tag(_ATTRIBUTE_TYPE, 0), _varint(kind)])


def _fields(data: Buffer) -> Iterator[tuple[int, Any]]:
    for number, value, _ in _raw_fields(memoryview(data)):
        yield number, value


def _raw_fields(data: memoryview) -> Iterator[tuple[int, Any, memoryview]]:
    """Each field of a protobuf message: its number, its value, and all of its bytes."""
    at = 0
    value: Any
    while at < len(data):
        began = at
        key, at = _read_varint(data, at)
        number, wire = divmod(key, 8)
        if wire == 0:
            value, at = _read_varint(data, at)
        else:
            length = {1: 8, 5: 4}.get(wire, -1)
            if wire == 2:
                length, at = _read_varint(data, at)
            if length < 0 or at + length > len(data):
                raise ValueError(f"field {number} is damaged")
            value, at = data[at : at + length], at + length
        yield number, value, data[began:at]


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _integers(value: int | memoryview) -> list[int]:
    """A repeated integer's one field: a single number, or many packed."""
    if isinstance(value, int):
        return [_signed(value)]
    numbers, at = [], 0
    while at < len(value):
        number, at = _read_varint(value, at)
        numbers.append(_signed(number))
    return numbers


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _tag(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def _enclosed(number: int, parts: Iterable[Buffer]) -> list[Buffer]:
    """A field that holds bytes, its content left in pieces."""
    parts = list(parts)
    return [_tag(number, 2), _varint(sum(map(len, parts))), *parts]


def _text(value: memoryview) -> str:
    return str(value, "utf-8")
