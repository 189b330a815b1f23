"""SenseVoiceSmall's graph of any size with random weights, as torch exports it and onnxruntime quantizes it.

Full size (50 + 20 blocks, 25,055 tokens) it has the released model's 234 M parameters and costs what that costs; it
hears nothing. Written from the model's architecture: SAN-M attention with an FSMN memory, two stacks, a CTC head.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

WIDTH, HEADS, HEAD, INNER, TAPS, FEATURES = 512, 4, 128, 2048, 11, 560
LANGUAGES = {"auto": 0, "zh": 3, "en": 4, "yue": 7, "ja": 11, "ko": 12, "nospeech": 13}


@dataclass
class SenseVoice:
    """Builds one graph, node by node."""

    blocks: int = 50
    more_blocks: int = 20
    """Of the second stack ("tp")."""
    vocabulary: int = 25055
    quantized: bool = True
    """Weights as unsigned bytes, one scale per tensor, like the released model; else floats."""
    lengths: bool = False
    """Whether the number of output frames is an output, too, as FunASR's own exports have it."""
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def save(self, path: Path) -> Path:
        """Write the model."""
        onnx.save(self._model(), str(path))
        return path

    def _model(self) -> onnx.ModelProto:
        x, inside = self._front()
        for index in range(self.blocks):
            x = self._block(x, f"encoders.{index}", inside, first=index == 0)
        x = self._normalized(x, "after_norm", WIDTH)
        for index in range(self.more_blocks):
            x = self._block(x, f"tp_encoders.{index}", inside)
        x = self._normalized(x, "tp_norm", WIDTH)
        x = self._linear(x, "ctc", WIDTH, self.vocabulary, spread=0.1)
        self.nodes.append(helper.make_node("Identity", [x], ["logits"]))
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", "T", FEATURES])]
        inputs += [
            helper.make_tensor_value_info(name, TensorProto.INT32, ["N"])
            for name in ("x_length", "language", "text_norm")
        ]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", "T4", self.vocabulary])]
        if self.lengths:
            self.nodes.append(helper.make_node("Add", ["x_length", "four"], ["encoder_out_lens"]))
            outputs.append(helper.make_tensor_value_info("encoder_out_lens", TensorProto.INT32, ["N"]))
        graph = helper.make_graph(self.nodes, "sense_voice", inputs, outputs, list(self.constants.values()))
        opset = [helper.make_opsetid("", 13)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=8)
        helper.set_model_props(model, {name: str(value) for name, value in self._metadata().items()})
        return model

    def _metadata(self) -> dict[str, object]:
        cmvn = {"neg_mean": ",".join(["-8.0"] * FEATURES), "inv_stddev": ",".join(["0.2"] * FEATURES)}
        about = {"model_type": "sense_voice_ctc", "comment": "random weights", "normalize_samples": 0, "version": 2}
        sizes = {"vocab_size": self.vocabulary, "lfr_window_size": 7, "lfr_window_shift": 6}
        tags = {"with_itn": 14, "without_itn": 15, **{f"lang_{name}": i for name, i in LANGUAGES.items()}}
        return {**about, **sizes, **tags, **cmvn}

    def _op(self, op: str, *inputs: str, **attributes: Any) -> str:
        return self._ops(op, inputs, 1, **attributes)[0]

    def _ops(self, op: str, inputs: Sequence[str], outputs: int, **attributes: Any) -> list[str]:
        name = f"{op}_{len(self.nodes)}"
        made = [f"{name}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), made, name, **attributes))
        return made

    def _constant(self, name: str, array: NDArray[Any] | np.generic) -> str:
        self.constants.setdefault(name, numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def _numbers(self, *values: int) -> str:
        return self._constant("numbers_" + "_".join(map(str, values)), np.array(values, np.int64))

    def _number(self, value: int) -> str:
        return self._constant(f"number_{value}", np.int64(value))

    def _random(self, name: str, *shape: int, spread: float, around: float = 0.0) -> NDArray[np.float32]:
        drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
        drawn *= np.float32(spread)
        drawn += np.float32(around)
        return drawn

    def _front(self) -> tuple[str, str]:
        """Tags in front of the features, and positions; and which frames lie inside (1) and which are padding (0)."""
        table = self._constant("embed", self._random("embed", 16, FEATURES, spread=1.0))
        language, norm = (
            self._op("Unsqueeze", self._op("Gather", table, name), self._numbers(1))
            for name in ("language", "text_norm")
        )
        count = self._op("Unsqueeze", self._op("Gather", self._op("Shape", "x"), self._number(0)), self._numbers(0))
        two = self._op("Gather", table, self._constant("event_emotion", np.array([[1, 2]], np.int64)))
        repeats = self._op("Concat", count, self._numbers(1), self._numbers(1), axis=0)
        x = self._op("Concat", language, self._op("Tile", two, repeats), norm, "x", axis=1)
        length = self._op(
            "Cast", self._op("Add", "x_length", self._constant("four", np.int32(4))), to=TensorProto.INT64
        )
        frames = self._op("Gather", self._op("Shape", x), self._number(1))
        places = self._op("Range", self._number(0), frames, self._number(1))
        less = self._op(
            "Less",
            self._op("Unsqueeze", places, self._numbers(0)),
            self._op("Unsqueeze", length, self._numbers(1)),
        )
        inside = self._op("Cast", less, to=TensorProto.FLOAT)
        x = self._op("Mul", x, self._constant("root", np.float32(WIDTH**0.5)))
        steps = np.exp(np.arange(FEATURES // 2) * -(np.log(10000.0) / (FEATURES / 2 - 1))).astype(np.float32)
        numbered = self._op("Cast", self._op("Add", places, self._number(1)), to=TensorProto.FLOAT)
        angles = self._op(
            "Mul",
            self._op("Reshape", numbered, self._numbers(1, -1, 1)),
            self._constant("steps", steps[None, None]),
        )
        waves = self._op("Concat", self._op("Sin", angles), self._op("Cos", angles), axis=2)
        return self._op("Add", x, waves), inside

    def _linear(self, x: str, name: str, width: int, to: int, spread: float | None = None) -> str:
        weight = self._random(f"{name}.weight", width, to, spread=spread or width**-0.5)
        bias = self._constant(f"{name}.bias", self._random(f"{name}.bias", to, spread=0.02))
        if not self.quantized:
            return self._op("Add", self._op("MatMul", x, self._constant(f"{name}.weight", weight)), bias)
        low, high = min(float(weight.min()), 0.0), max(float(weight.max()), 0.0)
        scale = np.float32((high - low) / 255)
        zero = np.uint8(round(-low / float(scale)))
        weight /= scale
        np.rint(weight, out=weight)
        weight += np.float32(zero)
        np.clip(weight, 0, 255, out=weight)
        codes = self._constant(f"{name}.weight", weight.astype(np.uint8))
        q, q_scale, q_zero = self._ops("DynamicQuantizeLinear", [x], 3)
        y = self._op("MatMulInteger", q, codes, q_zero, self._constant(f"{name}.zero", zero))
        y = self._op("Cast", y, to=TensorProto.FLOAT)
        factor = self._op("Mul", q_scale, self._constant(f"{name}.scale", scale))
        return self._op("Add", self._op("Mul", y, factor), bias)

    def _normalized(self, x: str, name: str, width: int) -> str:
        """LayerNormalization as opset 13 writes it."""
        gain = self._constant(f"{name}.gain", self._random(f"{name}.gain", width, spread=0.02, around=1.0))
        bias = self._constant(f"{name}.bias", self._random(f"{name}.bias", width, spread=0.02))
        centred = self._op("Sub", x, self._op("ReduceMean", x, axes=[-1], keepdims=1))
        square = self._op("Pow", centred, self._constant("two", np.float32(2)))
        variance = self._op("ReduceMean", square, axes=[-1], keepdims=1)
        deviation = self._op("Sqrt", self._op("Add", variance, self._constant("tiny", np.float32(1e-5))))
        return self._op("Add", self._op("Mul", self._op("Div", centred, deviation), gain), bias)

    def _block(self, x: str, name: str, inside: str, *, first: bool = False) -> str:
        width = FEATURES if first else WIDTH
        y = self._attention(self._normalized(x, f"{name}.norm1", width), name, inside, width)
        x = y if first else self._op("Add", x, y)
        y = self._linear(self._normalized(x, f"{name}.norm2", WIDTH), f"{name}.w_1", WIDTH, INNER)
        return self._op("Add", x, self._linear(self._op("Relu", y), f"{name}.w_2", INNER, WIDTH))

    def _attention(self, y: str, name: str, inside: str, width: int) -> str:
        joint = self._linear(y, f"{name}.linear_q_k_v", width, 3 * WIDTH)
        query, key, value = self._ops("Split", [joint, self._numbers(WIDTH, WIDTH, WIDTH)], 3, axis=-1)
        shape = self._op("Shape", y)
        batch, frames = (
            self._op("Unsqueeze", self._op("Gather", shape, self._number(axis)), self._numbers(0)) for axis in (0, 1)
        )
        split = self._op("Concat", batch, frames, self._numbers(HEADS), self._numbers(HEAD), axis=0)
        memory = self._memory(value, name, self._op("Unsqueeze", inside, self._numbers(2)))
        query = self._op("Transpose", self._op("Reshape", query, split), perm=[0, 2, 1, 3])
        query = self._op("Mul", query, self._constant("scale", np.float32(HEAD**-0.5)))
        key = self._op("Transpose", self._op("Reshape", key, split), perm=[0, 2, 3, 1])
        value = self._op("Transpose", self._op("Reshape", value, split), perm=[0, 2, 1, 3])
        outside = self._op(
            "Equal",
            self._op("Unsqueeze", inside, self._numbers(1, 2)),
            self._constant("zero", np.float32(0)),
        )
        scores = self._op("MatMul", query, key)
        scores = self._op("Where", outside, self._constant("never", np.float32(-np.inf)), scores)
        weights = self._op("Where", outside, "zero", self._op("Softmax", scores, axis=-1))
        mixed = self._op("Transpose", self._op("MatMul", weights, value), perm=[0, 2, 1, 3])
        joined = self._op("Concat", batch, self._numbers(-1), self._numbers(WIDTH), axis=0)
        out = self._linear(self._op("Reshape", mixed, joined), f"{name}.linear_out", WIDTH, WIDTH)
        return self._op("Add", out, memory)

    def _memory(self, value: str, name: str, inside: str) -> str:
        """The FSMN: a depthwise convolution over time beside attention."""
        value = self._op("Mul", value, inside)
        taps = self._constant(f"{name}.fsmn", self._random(f"{name}.fsmn", WIDTH, 1, TAPS, spread=0.05))
        margins = self._numbers(0, 0, TAPS // 2, 0, 0, TAPS // 2)
        padded = self._op(
            "Pad", self._op("Transpose", value, perm=[0, 2, 1]), margins, self._constant("zero", np.float32(0))
        )
        memory = self._op("Transpose", self._op("Conv", padded, taps, group=WIDTH, kernel_shape=[TAPS]), perm=[0, 2, 1])
        return self._op("Mul", self._op("Add", memory, value), inside)
