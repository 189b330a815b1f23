"""What a CTC model's output means: tokens, the blank, the four tag frames, greedy collapse and confidence.

Law: log-posteriors are natural logarithms, float32, shape [frames, vocabulary]; each row's exponentials sum to one. One
frame is :data:`FRAME_S` of audio. Nothing here knows which model or engine made them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from edge_asr.events import Token, Transcript

FRAME_S = 0.06
"""Seconds per output frame: six 10 ms feature frames (LFR shift)."""

TAG_FRAMES = 4
"""SenseVoice's first frames are no speech: language, emotion, audio event, inverse text normalisation."""

BLANK = 0

WORD_START = "\u2581"
"""SentencePiece's mark for a space before the piece."""

_TAG = re.compile(r"<\|(.*)\|>")


@dataclass(frozen=True)
class TokenTable:
    """The model's vocabulary: ``pieces[id]``; id 0 is the CTC blank."""

    pieces: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> TokenTable:
        """Read ``piece id`` lines (sherpa-onnx's tokens.txt). Raises ValueError naming the first bad line."""
        pieces: list[str] = []
        for number, line in enumerate(text.splitlines(), start=1):
            piece, _, identifier = line.rpartition(" ")
            if identifier != str(len(pieces)):
                raise ValueError(f"line {number}: {line[:40]!r} is not `piece {len(pieces)}`")
            pieces.append(piece)
        return cls(tuple(pieces))

    def __len__(self) -> int:
        return len(self.pieces)

    @cached_property
    def ids_by_spelling(self) -> dict[str, tuple[int, ...]]:
        """Lower-cased piece -> ids that print it; tags and the blank are left out."""
        found: dict[str, list[int]] = {}
        for identifier, piece in enumerate(self.pieces):
            if identifier != BLANK and piece and not (piece.startswith("<") and piece.endswith(">")):
                found.setdefault(piece.lower(), []).append(identifier)
        return {piece: tuple(ids) for piece, ids in found.items()}

    @cached_property
    def longest_piece(self) -> int:
        """Characters in the longest spelling."""
        return max(map(len, self.ids_by_spelling), default=0)

    def tag(self, identifier: int) -> str:
        """``en`` for the piece ``<|en|>``; empty for a piece that is no tag."""
        match = _TAG.fullmatch(self.pieces[identifier])
        return match[1] if match else ""

    def text(self, identifiers: Sequence[int]) -> str:
        """The pieces as text, without leading or trailing space."""
        return "".join(self.pieces[i] for i in identifiers).replace(WORD_START, " ").strip()


@dataclass(frozen=True, slots=True, eq=False)
class Recognition:
    """What a recognizer heard in one utterance."""

    transcript: Transcript
    log_posteriors: NDArray[np.float32] | None
    """[frames, vocabulary] without the tag frames; None where the engine keeps them to itself."""
    signal_to_noise_db: float | None = None
    """Of the audio, see ``audio``; None where nobody measured."""
    at_pace: Callable[[float], NDArray[np.float32]] | None = None
    """Listens again: the log-posteriors of the same audio played at another pace (0.9: a tenth slower)."""


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Normalise [frames, vocabulary] logits (or posteriors of any scale) row by row, in place where possible."""
    shifted: NDArray[np.float32] = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def greedy(best: NDArray[np.integer]) -> list[tuple[int, int, int]]:
    """Collapse the best token per frame: (token, first frame, frame after the last), repeats merged, blanks dropped."""
    if best.size == 0:
        return []
    edges = np.flatnonzero(np.diff(best)) + 1
    starts = [0, *edges.tolist()]
    ends = [*edges.tolist(), int(best.size)]
    return [(int(best[s]), s, e) for s, e in zip(starts, ends, strict=True) if best[s] != BLANK]


def transcribe(log_posteriors: NDArray[np.float32], tags: Sequence[str], table: TokenTable) -> Transcript:
    """The greedy transcript of one utterance; ``tags`` are language, emotion and event."""
    runs = greedy(log_posteriors.argmax(axis=1))
    heard = [log_posteriors[s:e, token].max() for token, s, e in runs]
    return Transcript(
        text=table.text([token for token, _, _ in runs]),
        language=tags[0],
        emotion=tags[1],
        event=tags[2],
        confidence=float(np.exp(np.mean(heard))) if heard else 0.0,
        tokens=tuple(
            Token(table.pieces[token].replace(WORD_START, " "), round(s * FRAME_S, 3)) for token, s, _ in runs
        ),
    )


_SCRIPTS = {
    re.compile(r"[\u3040-\u30ff]"): {"ja"},
    re.compile(r"[\uac00-\ud7af]"): {"ko"},
    re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]"): {"zh", "yue", "ja"},
}
"""Characters that only some languages write; Latin letters stand in the texts of all."""

_TAGGED_LANGUAGES = {"zh", "en", "yue", "ja", "ko"}


def foreign(transcript: Transcript, languages: Sequence[str]) -> bool:
    """Whether the language tag or the script is none of ``languages``; never, where these are empty."""
    allowed = set(languages)
    if not allowed or not transcript.text:
        return False
    if transcript.language in _TAGGED_LANGUAGES - allowed:
        return True
    return any(pattern.search(transcript.text) and not allowed & written for pattern, written in _SCRIPTS.items())
