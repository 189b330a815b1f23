"""Every pass leaves the model what it was, on a small SenseVoice under the real onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from edge_asr import inference, onnx_file, optimization, prepared
from edge_asr.onnx_file import Graph, Node
from edge_asr.optimization import LOG_POSTERIORS, LOGITS, Pass
from tests.sense_voice import SenseVoice

BLOCKS, MORE_BLOCKS = 2, 1
FRAMES = (1, 2, 5, 21, 60)
FOUND: dict[Pass, int] = {
    optimization.sign_weights: 2 * (4 * (BLOCKS + MORE_BLOCKS) + 1),
    optimization.fuse_normalization: 2 * (BLOCKS + MORE_BLOCKS) + 1,  # all but one: the second stack begins with it
    optimization.widen_memory: BLOCKS + MORE_BLOCKS,
    optimization.thin_attention: BLOCKS + MORE_BLOCKS,
    optimization.end_in_log_posteriors: 1,
}
"""Pass -> places it must find."""


@pytest.fixture(scope="module", params=[True, False], ids=["quantized", "floats"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SenseVoice."""
    built = SenseVoice(BLOCKS, MORE_BLOCKS, 50, quantized=request.param)
    return built.save(tmp_path_factory.mktemp("model") / ("quantized.onnx" if request.param else "floats.onnx"))


@pytest.fixture
def graph(model: Path, tmp_path: Path) -> Graph:
    """It as onnxruntime has fused it."""
    inference.save_fused(model, tmp_path / "fused.onnx")
    return onnx_file.read(tmp_path / "fused.onnx")


def outputs(path: Path) -> list[NDArray[np.float32]]:
    """What a model says to random features of several lengths."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(7)
    one = {"language": np.array([4], np.int32), "text_norm": np.array([15], np.int32)}
    said = []
    for frames in FRAMES:
        x = random.standard_normal((1, frames, 560), dtype=np.float32)
        said.append(session.run(None, {"x": x, "x_length": np.array([frames], np.int32), **one})[0])
    return said


def rewritten(graph: Graph, path: Path) -> list[NDArray[np.float32]]:
    onnx_file.write(graph, path)
    return outputs(path)


def test_without_its_mask_a_model_gives_the_same_in_every_bit(model: Path, graph: Graph, tmp_path: Path) -> None:
    assert optimization.drop_mask(graph) == 4 * (BLOCKS + MORE_BLOCKS)
    assert not {"Where", "Equal", "Less"}.intersection(node.op for node in graph.nodes)
    for ours, theirs in zip(rewritten(graph, tmp_path / "it.onnx"), outputs(model), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("model", [True], ids=["quantized"], indirect=True)
def test_signed_weights_are_the_same_integers(graph: Graph) -> None:
    before = dict(graph.constants)
    assert optimization.sign_weights(graph) == FOUND[optimization.sign_weights]
    flipped = {name for name, array in before.items() if array.dtype == np.uint8}
    assert len(flipped) == FOUND[optimization.sign_weights]
    for name in flipped:
        assert graph.constants[name].dtype == np.int8
        np.testing.assert_array_equal(graph.constants[name].astype(int) + 128, before[name].astype(int))


@pytest.mark.parametrize("model", [True], ids=["quantized"], indirect=True)
def test_where_the_cpu_has_vnni_signed_weights_give_the_same_in_every_bit(
    model: Path, graph: Graph, tmp_path: Path
) -> None:
    vnni = prepared.has_vnni(prepared.cpu_features())
    optimization.sign_weights(graph)
    for ours, theirs in zip(rewritten(graph, tmp_path / "it.onnx"), outputs(model), strict=True):
        # Elsewhere the kernel may saturate, so `prepared` leaves such weights alone there.
        np.testing.assert_array_equal(ours, theirs) if vnni else np.testing.assert_allclose(ours, theirs, atol=1.0)


@pytest.mark.parametrize("model", [False], ids=["floats"], indirect=True)
@pytest.mark.parametrize("each", optimization.CLOSE)
def test_the_other_passes_only_round_differently(model: Path, graph: Graph, tmp_path: Path, each: Pass) -> None:
    optimization.drop_mask(graph)
    assert each(graph) == FOUND[each]
    for ours, theirs in zip(rewritten(graph, tmp_path / "it.onnx"), outputs(model), strict=True):
        expected = theirs
        if each is optimization.end_in_log_posteriors:
            expected = theirs - np.log(np.exp(theirs.astype(np.float64)).sum(axis=-1, keepdims=True))
        np.testing.assert_allclose(ours, expected, atol=2e-4)


@pytest.mark.parametrize("model", [True], ids=["quantized"], indirect=True)
def test_all_passes_together_find_their_places(graph: Graph, tmp_path: Path) -> None:
    before = len(graph.nodes)
    for each in (*optimization.EXACT, *optimization.WITH_VNNI, *optimization.CLOSE):
        assert each(graph) >= FOUND.get(each, 1)
    assert len(graph.nodes) < 0.7 * before
    assert list(graph.outputs) == [LOG_POSTERIORS]
    for said in rewritten(graph, tmp_path / "it.onnx"):
        np.testing.assert_allclose(np.exp(said).sum(axis=-1), 1, atol=1e-4)


def test_what_fits_no_pattern_stays_as_it_is() -> None:
    weight = np.ones((4, 2, 11), np.float32)
    nodes = [
        Node.of("Add", ["x", "bias"], ["a"]),  # a constant is no residual
        Node.of("LayerNormalization", ["a", "gain", "bias"], ["b"], axis=-1),
        Node.of("Transpose", ["b"], ["c"], perm=(0, 2, 1)),
        Node.of("Conv", ["c", "weight"], ["d"], group=2, pads=(5, 5)),  # not depthwise
        Node.of("Transpose", ["d"], ["e"], perm=(0, 2, 1)),
        Node.of("Less", ["x", "limit"], ["f"]),  # compares with no x_length
        Node.of("Where", ["f", "e", "x"], ["g"]),
        Node.of("Softmax", ["g"], [LOGITS]),
    ]
    constants = {"bias": np.ones(4, np.float32), "gain": np.ones(4, np.float32), "weight": weight}
    graph = Graph(nodes, {**constants, "limit": np.ones((), np.float32)}, {LOGITS: b""}, [], [])
    before = list(graph.nodes)
    for each in (optimization.drop_mask, optimization.sign_weights, *optimization.CLOSE[:-1]):
        assert each(graph) == 0
    assert graph.nodes == before
