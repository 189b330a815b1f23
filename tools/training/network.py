"""The network behind SenseVoice's ONNX contract: features -> Whisper's log-mel -> its encoder -> CTC head and tags.

Inputs and output are SenseVoice's: ``x`` [N, T, 560] (80 kaldi fbank bins, LFR 7/6, CMVN), ``x_length`` [N],
``language`` [N], ``text_norm`` [N] -> logits [N, T + 4, V], whose first four frames are language, emotion, event and
ITN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.whisper import Block, Encoder

LANGUAGE_IDS = {"auto": 0, "zh": 3, "en": 4, "yue": 7, "ja": 11, "ko": 12, "nospeech": 13}
WITH_ITN, WITHOUT_ITN = 14, 15
LFR_SHIFT = 6
"""Kaldi frames (10 ms) per LFR frame; the seventh of a window is the next one's first and is dropped."""
POSITIONS = LFR_SHIFT // 2
"""Encoder positions (20 ms) per LFR frame."""


class Front(nn.Module):
    """CMVN'ed LFR features of kaldi filters -> log-mel of Whisper's filters, by a non-negative map of powers.

    Both are sums of the same power spectrum under other triangles, so the map is linear in power; see
    :func:`training.front.fit` for where it comes from.
    """

    LOG_FULL_SCALE = 2 * math.log(32768.0)
    """SenseVoice's features are of 16-bit samples, Whisper's of samples in [-1, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("neg_mean", torch.zeros(560))
        self.register_buffer("inv_stddev", torch.ones(560))
        self.register_buffer("power_map", torch.eye(80))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[N, T, 560], [N, 6 T] -> [N, 6 T, 80], normalised to the utterance's loudest bin as Whisper does."""
        n, t = x.shape[0], x.shape[1]
        fbank = (x / self.inv_stddev - self.neg_mean)[:, :, :480].reshape(n, t * LFR_SHIFT, 80)
        power = torch.exp(torch.clamp(fbank - self.LOG_FULL_SCALE, -30.0, 14.0))
        log = torch.log(torch.clamp(power @ self.power_map, min=1e-10)) * (1 / math.log(10))
        loudest = (log - (1.0 - mask)[:, :, None] * 1e4).amax(dim=(1, 2), keepdim=True)
        return (torch.maximum(log, loudest - 8.0) + 4.0) / 4.0


@dataclass(frozen=True, slots=True)
class Shape:
    """What a checkpoint needs to be built again."""

    vocabulary: int
    nospeech: int
    speech: int
    """Identifiers of two tags."""
    size: str = "base"
    """Of the Whisper encoder."""
    head_blocks: int = 1
    dropout: float = 0.1
    tag_width: int = 128


class Network(nn.Module):
    """The whole model."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.front, self.encoder = Front(), Encoder.pretrained(shape.size)
        width = self.encoder.width
        self.project, self.project_norm = nn.Linear(POSITIONS * width, width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, width // 64, shape.dropout) for _ in range(shape.head_blocks))
        self.context = nn.ModuleList(
            nn.Conv1d(width, width, 7, padding=3, groups=width) for _ in range(shape.head_blocks)
        )
        self.norm, self.ctc = nn.LayerNorm(width), nn.Linear(width, shape.vocabulary)
        self.dropout = nn.Dropout(shape.dropout)
        self.asked = nn.Embedding(16, shape.tag_width)
        self.pooled, self.tag_place = (
            nn.Linear(2 * width, shape.tag_width),
            nn.Parameter(torch.randn(4, shape.tag_width) * 0.1),
        )
        self.tag_hidden, self.tag = (
            nn.Linear(shape.tag_width, shape.tag_width),
            nn.Linear(shape.tag_width, shape.vocabulary),
        )

    def head(self, h: Tensor, mask: Tensor) -> Tensor:
        """[N, 3 T, width] and [N, T] -> [N, T, width]: three positions of 20 ms joined to a frame, then context."""
        n, t = mask.shape
        y = self.project_norm(functional.gelu(self.project(self.dropout(h.reshape(n, t, -1)))))
        bias = (1.0 - mask)[:, None, None, :] * -1e4
        for block, context in zip(self.blocks, self.context, strict=True):
            y = y + context((y * mask[:, :, None]).transpose(1, 2)).transpose(1, 2)
            y = block(y, bias)
        return self.norm(y)

    def tags(self, y: Tensor, mask: Tensor, language: Tensor, text_norm: Tensor) -> Tensor:
        """[N, T, width] -> [N, 4, V], from the mean and the maximum over time and from what was asked for."""
        weight = mask[:, :, None]
        mean, most = (y * weight).sum(1) / weight.sum(1), (y - (1 - weight) * 1e4).amax(1)
        z = self.pooled(torch.cat([mean, most], -1))[:, None] + self.tag_place[None]
        nothing = torch.zeros_like(z[:, 0])
        asked = [self.asked(language.long()), nothing, nothing, self.asked(text_norm.long())]
        return self.tag(functional.gelu(self.tag_hidden(functional.gelu(z + torch.stack(asked, 1)))))

    def forward(self, x: Tensor, x_length: Tensor, language: Tensor, text_norm: Tensor) -> Tensor:
        n, t = x.shape[0], x.shape[1]
        mask = (torch.arange(t, device=x.device)[None] < x_length.long()[:, None]).to(x.dtype)
        fine = mask[:, :, None].expand(-1, -1, LFR_SHIFT).reshape(n, t * LFR_SHIFT)
        y = self.head(self.encoder(self.front(x, fine), fine), mask)
        logits, tags = self.ctc(self.dropout(y)), self.tags(y, mask, language, text_norm)
        return torch.cat([tags if self.training else self.consistent(tags, logits, mask), logits], 1)

    def consistent(self, tags: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
        """The tags, with ``nospeech`` where and only where no frame writes a token, and ``Speech`` where one does.

        Left to itself the tag head, which heard synthesizers and noises, takes one real voice in four for a noise.
        """
        best = logits[:, :, 1:].amax(-1) - logits[:, :, 0]
        written = (best - (1.0 - mask) * 1e4).amax(1)[:, None]
        speech, nospeech = self.shape.speech, self.shape.nospeech

        def held_to(tag: Tensor, column: int, ahead: Tensor) -> Tensor:
            before, after = tag[:, :column], tag[:, column + 1 :]
            others = torch.cat([before, after], 1).amax(1, keepdim=True)
            return torch.cat([before, others + ahead, after], 1)

        language, event = held_to(tags[:, 0], nospeech, -written), held_to(tags[:, 2], speech, written)
        return torch.stack([language, tags[:, 1], event, tags[:, 3]], 1)

    def checkpoint(self) -> dict[str, Any]:
        return {"shape": asdict(self.shape), "model": self.state_dict()}

    @classmethod
    def restored(cls, checkpoint: dict[str, Any]) -> Network:
        network = cls(Shape(**checkpoint["shape"]))
        network.load_state_dict(checkpoint["model"])
        return network


def save(state: Mapping[str, Any], path: Path) -> None:
    """For `torch.load`; whole or not there."""
    part = path.with_suffix(".part")
    torch.save(dict(state), part)
    part.replace(path)
