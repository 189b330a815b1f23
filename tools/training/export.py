"""From a checkpoint to the files that ship: ONNX with SenseVoice's inputs, output and metadata, quantized to 8 bits."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic

from training.network import LANGUAGE_IDS, WITH_ITN, WITHOUT_ITN, Network
from training.tokens import Tokenizer

COMMENT = "edge-asr: Whisper {size} encoder (OpenAI, MIT), fine-tuned, behind a CTC head; not SenseVoiceSmall"


def _metadata(network: Network) -> dict[str, str]:
    def listed(values: torch.Tensor) -> str:
        return ",".join(f"{value:.6f}" for value in values.tolist())

    asked = {f"lang_{name}": number for name, number in LANGUAGE_IDS.items()}
    return {
        "lfr_window_size": "7",
        "lfr_window_shift": "6",
        "normalize_samples": "0",
        "neg_mean": listed(network.front.neg_mean),
        "inv_stddev": listed(network.front.inv_stddev),
        "model_type": "sense_voice_ctc",
        "version": "2",
        "model_author": "edge-asr",
        "maintainer": "edge-asr",
        "vocab_size": str(network.shape.vocabulary),
        "comment": COMMENT.format(size=network.shape.size),
        "with_itn": str(WITH_ITN),
        "without_itn": str(WITHOUT_ITN),
        "url": "",
        **{name: str(number) for name, number in asked.items()},
    }


def _described(path: Path, network: Network) -> None:
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, _metadata(network))
    onnx.save(model, path)


def write_float(network: Network, path: Path) -> None:
    """The float32 ONNX file."""
    network.eval()
    example = (
        torch.randn(2, 60, 560),
        torch.tensor([60, 50], dtype=torch.int32),
        torch.tensor([0, 4], dtype=torch.int32),
        torch.tensor([WITH_ITN, WITHOUT_ITN], dtype=torch.int32),
    )
    names = ["x", "x_length", "language", "text_norm"]
    with warnings.catch_warnings():  # the older exporter is meant: its graph is plain, and this torch is pinned
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            example,
            str(path),
            opset_version=17,
            input_names=names,
            output_names=["logits"],
            dynamo=False,
            dynamic_axes={"x": {0: "N", 1: "T"}, "logits": {0: "N", 1: "T"}, **{name: {0: "N"} for name in names[1:]}},
        )
    _described(path, network)


def quantize(source: Path, path: Path, network: Network) -> None:
    """Weights of every MatMul to 7 bits, signed, each column its own scale; but for the map of powers.

    Its eight decades 8 bits cannot hold. Seven bits cost no accuracy here, and without VNNI x86 adds products of two
    8-bit numbers in 16 bits, where 255 * 127 * 2 is too much.
    """
    graph = onnx.load(source).graph
    shapes = {weight.name: list(weight.dims) for weight in graph.initializer}
    kept = [node.name for node in graph.node if any(shapes.get(name) == [80, 80] for name in node.input)]
    if len(kept) != 1:
        raise ValueError(f"{source}: expected one 80 x 80 map of powers, found {len(kept)}")
    quantize_dynamic(
        source,
        path,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=kept,
    )
    _described(path, network)


def export(checkpoint: Path, tokenizer: Tokenizer, out: Path) -> None:
    """Write OUT/model.int8.onnx and OUT/tokens.txt."""
    network = Network.restored(torch.load(checkpoint))
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "model.onnx"
        write_float(network, whole)
        quantize(whole, out / "model.int8.onnx", network)
    tokenizer.write(out / "tokens.txt")
