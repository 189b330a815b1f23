"""SenseVoiceSmall as its checkpoints have it: SAN-M layers (Gao et al., 2020) under FunASR's names, in our contract.

So that a checkpoint can be exported where FunASR is not installed; ``tools/training/README.md`` says how near the two
networks are.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.network import LANGUAGE_IDS, WITHOUT_ITN

FEATURES, WIDTH, HEADS, INNER, TAPS, QUERIES = 560, 512, 4, 2048, 11, 16
LOUD, RARE = 24.0, 6.0
"""A rehearsal's tag has this logit more in its frame, and less everywhere; the loudest of the others has about 5."""


class Attention(nn.Module):
    """Self-attention, and beside it a memory: a depthwise convolution of the values over time (FSMN)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_q_k_v = nn.Linear(width, 3 * WIDTH)
        self.fsmn_block = nn.Conv1d(WIDTH, WIDTH, TAPS, padding=TAPS // 2, groups=WIDTH, bias=False)
        self.linear_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """[N, T, width], 1 or 0 [N, T] -> [N, T, WIDTH]."""
        query, key, value = self.linear_q_k_v(x).split(WIDTH, dim=-1)
        heard = value * inside[..., None]
        memory = (self.fsmn_block(heard.transpose(1, 2)).transpose(1, 2) + heard) * inside[..., None]
        query, key, value = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (query, key, value))
        scores = (query * (WIDTH // HEADS) ** -0.5) @ key.transpose(-2, -1)
        padding = inside[:, None, None, :] == 0
        weights = scores.masked_fill(padding, -torch.inf).softmax(-1).masked_fill(padding, 0.0)
        return self.linear_out((weights @ value).transpose(1, 2).flatten(2)) + memory


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(self.w_1(x).relu())


class Layer(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm1, self.self_attn = nn.LayerNorm(width), Attention(width)
        self.norm2, self.feed_forward = nn.LayerNorm(WIDTH), FeedForward()

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        heard = self.self_attn(self.norm1(x), inside)
        x = x + heard if x.shape[-1] == WIDTH else heard  # the first layer is wider below than above
        return x + self.feed_forward(self.norm2(x))


class Encoder(nn.Module):
    """Two stacks; the names are those of the checkpoints."""

    def __init__(self, layers: int, upper_layers: int) -> None:
        super().__init__()
        self.encoders0 = nn.ModuleList([Layer(FEATURES)])
        self.encoders = nn.ModuleList(Layer() for _ in range(layers - 1))
        self.after_norm = nn.LayerNorm(WIDTH)
        self.tp_encoders = nn.ModuleList(Layer() for _ in range(upper_layers))
        self.tp_norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        x = x * WIDTH**0.5 + _positions(x)
        for layer in (*self.encoders0, *self.encoders):
            x = layer(x, inside)
        x = self.after_norm(x)
        for layer in self.tp_encoders:
            x = layer(x, inside)
        return self.tp_norm(x)


def _positions(x: Tensor) -> Tensor:
    """Sines and cosines of the frame's number, which begins with 1."""
    half = FEATURES // 2
    steps = torch.exp(torch.arange(half) * (-math.log(10000.0) / (half - 1)))
    angles = torch.arange(1, x.shape[1] + 1)[None, :, None] * steps
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


@dataclass(frozen=True, slots=True)
class Shape:
    layers: int = 50
    upper_layers: int = 20
    vocabulary: int = 25055


class SenseVoice(nn.Module):
    """``x`` [N, T, 560], ``x_length``, ``language``, ``text_norm`` [N] -> logits [N, T + 4, V]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(QUERIES, FEATURES)
        self.encoder = Encoder(shape.layers, shape.upper_layers)
        self.ctc = nn.ModuleDict({"ctc_lo": nn.Linear(WIDTH, shape.vocabulary)})

    def forward(self, x: Tensor, x_length: Tensor, language: Tensor, text_norm: Tensor) -> Tensor:
        return self.ctc["ctc_lo"](self.encoded(x, x_length, language, text_norm))

    def encoded(self, x: Tensor, x_length: Tensor, language: Tensor, text_norm: Tensor) -> Tensor:
        """What the head makes tokens of: [N, T + 4, WIDTH]."""
        event_emotion = self.embed(torch.tensor([[1, 2]])).expand(x.shape[0], -1, -1)
        x = torch.cat([self.embed(language)[:, None], event_emotion, self.embed(text_norm)[:, None], x], dim=1)
        inside = (torch.arange(x.shape[1])[None, :] < (x_length + 4)[:, None]).to(x.dtype)
        return self.encoder(x, inside)


def rehearsal(shape: Shape, tags: Sequence[Sequence[int]] = ((), (), (), ()), seed: int = 0) -> SenseVoice:
    """Random weights, wide enough apart that the text changes with the audio: for everything but hearing.

    The first four frames give one of their ``tags``, as a trained network's do: sherpa-onnx takes whatever stands there
    for a tag.
    """
    network, generator = SenseVoice(shape).eval(), torch.Generator().manual_seed(seed)
    asked = torch.tensor([40]), torch.tensor([LANGUAGE_IDS["auto"]]), torch.tensor([WITHOUT_ITN])
    deep = (2 * (shape.layers + shape.upper_layers)) ** -0.5  # what layers add to their input must not drown it
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim > 1:
                added = "encoders0" not in name and re.search(r"\.(linear_out|fsmn_block|w_2)\.", name)
                spread = 1.0 if name == "embed.weight" else weight[0].numel() ** -0.5
                weight.normal_(0.0, spread * deep if added else spread, generator=generator)
        head = network.ctc["ctc_lo"]
        (frames,) = network.encoded(torch.randn(1, 40, FEATURES, generator=generator), *asked)
        middle = frames[len(tags) :].mean(0)
        towards = torch.linalg.pinv(frames[: len(tags)] - middle).T  # each sees its own frame alone
        for toward, ids in zip(towards, tags, strict=True):
            for token in ids:
                head.weight[token] = head.weight[token] / 4 + LOUD * toward
                head.bias[token] = -LOUD * toward @ middle - RARE
    return network


def restored(checkpoint: Path) -> SenseVoice:
    """The network of FunASR's ``model.pt``, as released or as fine-tuning leaves it. Raises ValueError."""
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)  # runs no code of the file
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(
            f"{checkpoint}: is no plain checkpoint of torch ({str(error).splitlines()[0]}); name model.pt.avg10"
        ) from None
    state = saved.get("state_dict", saved) if isinstance(saved, dict) else {}
    state = {name.removeprefix("module."): value for name, value in state.items()}  # torch's name when on several GPUs
    if "ctc.ctc_lo.weight" not in state:
        raise ValueError(f"{checkpoint}: has no ctc.ctc_lo.weight, so it is not SenseVoiceSmall's")
    shape = Shape(1 + _count(state, "encoders"), _count(state, "tp_encoders"), len(state["ctc.ctc_lo.weight"]))
    network = SenseVoice(shape)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:160]
        raise ValueError(f"{checkpoint}: is not SenseVoiceSmall's ({reason})") from None
    return network.eval()


def _count(state: dict[str, Tensor], stack: str) -> int:
    found = (re.match(rf"encoder\.{stack}\.(\d+)\.", name) for name in state)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def normalization(path: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(minus the mean, one over the deviation) of every feature, from the release's am.mvn. Raises ValueError."""
    rows = re.findall(r"<LearnRateCoef>\s+0\s+\[([^\]]*)\]", path.read_text(encoding="utf-8"))
    found = [np.array(row.split(), np.float32) for row in rows]
    if [row.size for row in found] != [FEATURES, FEATURES]:
        raise ValueError(f"{path}: expected two rows of {FEATURES} numbers; take am.mvn of SenseVoiceSmall")
    return found[0], found[1]
