"""From a checkpoint to what ships: ONNX with SenseVoice's inputs, output and metadata, in 8 bits, and a manifest."""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import nn

from edge_asr.model_store import MANIFEST, sha256_of
from training.network import LANGUAGE_IDS, WITH_ITN, WITHOUT_ITN, Network
from training.tokens import Tokenizer

LICENCE = "MIT"
DESCRIPTION = "Small English command recognizer in SenseVoice's ONNX contract; it is not SenseVoiceSmall"
ORIGIN = (
    "Encoder of Whisper {size} (OpenAI, MIT), its upper layers fine-tuned; feature map and CTC head trained by "
    "tools/train of edge-asr on synthesized speech and the recordings named to it"
)
COMMENT = "edge-asr: Whisper {size} encoder (OpenAI, MIT), fine-tuned, behind a CTC head; not SenseVoiceSmall"


def metadata(
    neg_mean: Sequence[float], inv_stddev: Sequence[float], vocabulary: int, comment: str, author: str = "edge-asr"
) -> dict[str, str]:
    """What sherpa-onnx and edge-asr read from the file itself."""

    def listed(values: Sequence[float]) -> str:
        return ",".join(f"{value:.9g}" for value in values)

    asked = {f"lang_{name}": number for name, number in LANGUAGE_IDS.items()}
    return {
        "lfr_window_size": "7",
        "lfr_window_shift": "6",
        "normalize_samples": "0",
        "neg_mean": listed(neg_mean),
        "inv_stddev": listed(inv_stddev),
        "model_type": "sense_voice_ctc",
        "version": "2",
        "model_author": author,
        "maintainer": "edge-asr",
        "vocab_size": str(vocabulary),
        "comment": comment,
        "with_itn": str(WITH_ITN),
        "without_itn": str(WITHOUT_ITN),
        "url": "",
        **{name: str(number) for name, number in asked.items()},
    }


def _metadata(network: Network) -> dict[str, str]:
    front, shape = network.front, network.shape
    comment = COMMENT.format(size=shape.size)
    return metadata(front.neg_mean.tolist(), front.inv_stddev.tolist(), shape.vocabulary, comment)


def _described(path: Path, about: dict[str, str]) -> None:
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, about)
    onnx.save(model, path)


def write(network: nn.Module, path: Path, about: dict[str, str]) -> None:
    """The float32 ONNX file of any network behind SenseVoice's contract."""
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
    _described(path, about)


def write_float(network: Network, path: Path) -> None:
    """The float32 ONNX file."""
    write(network, path, _metadata(network))


def eight_bits(source: Path, path: Path, about: dict[str, str], kept: Sequence[str] = ()) -> None:
    """Weights of every MatMul but the ``kept`` to 7 bits, signed, each column its own scale.

    Seven bits cost no accuracy here, and without VNNI x86 adds products of two 8-bit numbers in 16 bits, where
    255 * 127 * 2 is too much.
    """
    quantize_dynamic(
        source,
        path,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=list(kept),
    )
    _described(path, about)


def quantize(source: Path, path: Path, network: Network) -> None:
    """In 8 bits, but for the map of powers: its eight decades 8 bits cannot hold."""
    graph = onnx.load(source).graph
    shapes = {weight.name: list(weight.dims) for weight in graph.initializer}
    kept = [node.name for node in graph.node if any(shapes.get(name) == [80, 80] for name in node.input)]
    if len(kept) != 1:
        raise ValueError(f"{source}: expected one 80 x 80 map of powers, found {len(kept)}")
    eight_bits(source, path, _metadata(network), kept)


def export(checkpoint: Path, tokenizer: Tokenizer, out: Path) -> None:
    """Write OUT/model.int8.onnx and OUT/tokens.txt."""
    network = Network.restored(torch.load(checkpoint))
    out.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)  # it describes what is about to be replaced
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "model.onnx"
        write_float(network, whole)
        quantize(whole, out / "model.int8.onnx", network)
    tokenizer.write(out / "tokens.txt")


def describe(out: Path, name: str, description: str, languages: Sequence[str], licence: str, origin: str) -> None:
    """Write the manifest of the model whose files lie in OUT."""
    listed = [path for path in sorted(out.iterdir()) if path.name != MANIFEST]
    files = {path.name: {"sha256": sha256_of(path), "size": path.stat().st_size} for path in listed}
    manifest = {
        "name": name,
        "version": time.strftime("%Y.%m.%d"),
        "kind": "sense-voice",
        "description": description,
        "languages": list(languages),
        "licence": licence,
        "origin": origin,
        "files": files,
    }
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
