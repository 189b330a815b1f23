"""ONNX files read and written without the onnx package, which is the oracle here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edge_asr import onnx_file
from edge_asr.model_store import EMBEDDED, bundled, locate
from edge_asr.onnx_file import Graph, Node, OnnxFileError

INT64 = st.integers(-(2**63), 2**63 - 1)


def test_a_model_that_was_read_and_written_is_the_same_to_the_onnx_package(tmp_path: Path) -> None:
    source = locate(EMBEDDED).model
    onnx_file.write(onnx_file.read(source), tmp_path / "again.onnx")
    theirs, ours = onnx.load(str(source)), onnx.load(str(tmp_path / "again.onnx"))
    onnx.checker.check_model(ours)
    assert {p.key: p.value for p in ours.metadata_props} == {p.key: p.value for p in theirs.metadata_props}
    assert (ours.ir_version, list(ours.opset_import)) == (theirs.ir_version, list(theirs.opset_import))
    for node in theirs.graph.node:
        node.ClearField("name")  # names of nodes are for people
    assert list(ours.graph.node) == list(theirs.graph.node)
    assert (list(ours.graph.input), list(ours.graph.output)) == (list(theirs.graph.input), list(theirs.graph.output))
    kept = {tensor.name: numpy_helper.to_array(tensor) for tensor in ours.graph.initializer}
    assert len(kept) == len(theirs.graph.initializer)
    for tensor in theirs.graph.initializer:
        expected = numpy_helper.to_array(tensor)
        assert kept[tensor.name].dtype == expected.dtype
        np.testing.assert_array_equal(kept[tensor.name], expected)


@given(number=INT64, numbers=st.lists(INT64, min_size=1), real=st.floats(width=32, allow_nan=False))
def test_attributes_are_what_the_onnx_package_makes_of_them(
    tmp_path_factory: pytest.TempPathFactory, number: int, numbers: list[int], real: float
) -> None:
    node = Node.of("Op", ["a"], ["b"], "somewhere", number=number, numbers=numbers, real=real)
    assert (node.number("number", 0), node.numbers("numbers"), node.number("real", 0)) == (number, numbers, real)
    path = tmp_path_factory.getbasetemp() / "attributes.onnx"
    onnx_file.write(Graph([node], {}, {}, [], []), path)
    (theirs,) = onnx.load(str(path)).graph.node
    assert (theirs.op_type, theirs.domain) == ("Op", "somewhere")
    found = {attribute.name: helper.get_attribute_value(attribute) for attribute in theirs.attribute}
    assert found == {"number": number, "numbers": numbers, "real": real}


def saved(folder: Path, *tensors: TensorProto) -> Path:
    graph = helper.make_graph([], "constants", [], [], list(tensors))
    onnx.save(helper.make_model(graph), str(folder / "constants.onnx"))
    return folder / "constants.onnx"


@pytest.mark.parametrize("raw", [True, False], ids=["as bytes", "as numbers"])
@pytest.mark.parametrize("kind", [np.float32, np.uint8, np.int8, np.int32, np.int64])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 2)])
def test_constants_have_their_values_however_they_are_written(
    tmp_path: Path, kind: type[np.generic], shape: tuple[int, ...], *, raw: bool
) -> None:
    array: Any = (np.arange(np.prod(shape)) - (0 if kind is np.uint8 else 1)).astype(kind).reshape(shape)
    tensor = numpy_helper.from_array(array, "it")
    if not raw:
        tensor = helper.make_tensor("it", tensor.data_type, shape, array.reshape(-1).tolist())
    found = onnx_file.read(saved(tmp_path, tensor)).constants["it"]
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_data_in_another_file_is_refused(tmp_path: Path) -> None:
    tensor = numpy_helper.from_array(np.zeros(3, np.float32), "far")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../weights")
    with pytest.raises(OnnxFileError, match="far lies in another file"):
        onnx_file.read(saved(tmp_path, tensor))


@given(place=st.floats(0, 1, exclude_max=True))
def test_a_model_cut_short_is_refused_or_whole_as_far_as_it_goes(
    tmp_path_factory: pytest.TempPathFactory, place: float
) -> None:
    whole = (bundled("models") / "silero-vad/silero_vad.onnx").read_bytes()
    path = tmp_path_factory.getbasetemp() / "cut.onnx"
    path.write_bytes(whole[: max(1, int(place * len(whole)))])
    with pytest.raises(OnnxFileError):
        onnx_file.read(path)


def test_values_that_nothing_depends_on_are_left_out() -> None:
    nodes = [Node.of("A", ["x", "one"], ["a"]), Node.of("B", ["x", "two"], ["b"]), Node.of("C", ["a"], ["out"])]
    graph = Graph(nodes, {"one": np.ones(1), "two": np.ones(1)}, {"out": b""}, [], [])
    graph.drop_unused()
    assert [node.op for node in graph.nodes] == ["A", "C"]
    assert list(graph.constants) == ["one"]
