"""From the shipped 8-bit file back to a network that can learn: what `tools/adapt` starts from.

torch's exporter names the weights of a MatMul by number, so they are found by their place: an untrained network is
exported and quantized once more, and the n-th MatMul with a weight of one graph is the n-th of the other.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from edge_asr.inference import load_tokens
from training.export import quantize, write_float
from training.network import Network, Shape, save


def _arrays(graph: onnx.GraphProto) -> dict[str, NDArray[np.generic]]:
    return {weight.name: numpy_helper.to_array(weight) for weight in graph.initializer}


def _weights(graph: onnx.GraphProto) -> list[tuple[str, NDArray[np.float32]]]:
    """(name, weight [in, out]) of every MatMul in the order of the graph, floats again where they were quantized."""
    arrays, found = _arrays(graph), []
    for node in graph.node:
        if node.op_type not in {"MatMul", "MatMulInteger"} or node.input[1] not in arrays:
            continue
        name, weight = node.input[1], arrays[node.input[1]]
        if node.op_type == "MatMulInteger":
            name = name.removesuffix("_quantized")
            zero, scale = arrays[f"{name}_zero_point"], arrays[f"{name}_scale"]
            weight = (weight.astype(np.int32) - zero.astype(np.int32)) * scale
        found.append((name, np.asarray(weight, np.float32)))
    return found


def network(model: Path, tokens: Sequence[str], size: str = "base") -> Network:
    """The network of an exported model file, its weights as precise as 8 bits left them; ``tokens`` are its table's.

    Raises ValueError.
    """
    graph = onnx.load(model).graph
    arrays = _arrays(graph)
    nospeech, speech = (tokens.index(f"<|{name}|>") for name in ("nospeech", "Speech"))
    fresh = Network(Shape(int(arrays["ctc.bias"].size), nospeech, speech, size=size, head_blocks=_blocks(arrays)))
    with tempfile.TemporaryDirectory() as folder:
        plain, small = Path(folder) / "fresh.onnx", Path(folder) / "fresh.int8.onnx"
        write_float(fresh, plain)
        quantize(plain, small, fresh)
        contents, places = _arrays(onnx.load(plain).graph), _weights(onnx.load(small).graph)
    weights = _weights(graph)
    if [place.shape for _, place in places] != [weight.shape for _, weight in weights]:
        raise ValueError(f"{model}: is not a network of tools/train on Whisper {size}")
    state = fresh.state_dict()
    by_content = {value.numpy().T.tobytes(): name for name, value in state.items() if value.ndim == 2}
    for (place, _), (_, weight) in zip(places, weights, strict=True):
        stem = place.removesuffix("_Transposed")
        name = stem if stem in state else by_content[contents[stem].tobytes()]
        state[name] = torch.from_numpy(weight.T.copy())
    for name in state:
        if name in arrays:
            state[name] = torch.from_numpy(arrays[name].astype(np.float32).reshape(state[name].shape))
    (folded,) = (array for array in arrays.values() if array.shape == (1, *state["tag_place"].shape))
    state["tag_place"] = torch.from_numpy(folded[0].astype(np.float32))  # the exporter folds its new axis
    fresh.load_state_dict(state)
    return fresh


def begin(package: Path, work: Path, checkpoint: Path) -> None:
    """Of a package of tools/train: its pieces and front into WORK, and its network as a checkpoint to start from."""
    shutil.copyfile(package / "pieces.model", work / "pieces.model")
    restored = network(package / "model.int8.onnx", load_tokens(package / "tokens.txt").pieces)
    save(restored.front.state_dict(), work / "front.pt")
    save(restored.checkpoint(), checkpoint)


def _blocks(arrays: dict[str, NDArray[np.generic]]) -> int:
    return sum(name.startswith("context.") and name.endswith(".bias") for name in arrays)
