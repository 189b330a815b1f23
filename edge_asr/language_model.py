"""How likely a token follows others: an n-gram table that comes with a model, over that model's own tokens.

Law: rows are natural logarithms of probabilities over the whole vocabulary and sum to one. The blank, which no text
holds, stands for the edge of a sentence: before its first token and after its last.

The table holds interpolated probabilities and, per context, the factor for everything that it does not list, as ARPA
files do; here in arrays, because a table of a million entries must cost megabytes and milliseconds on a gateway.
``tools/training/language_model.py`` writes it.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_asr import settings
from edge_asr.model_store import ModelError, ModelFiles
from edge_asr.posteriors import BLANK

Floats = NDArray[np.float32]

START: tuple[int, ...] = (BLANK,)
"""The context of a sentence's first token."""

STEP = 1 / 16
"""Nats between two stored log-probabilities, which lie between 0 and -255 steps."""

_SCALE = np.float32(-STEP)

_ROWS = 1 << 19
"""Numbers kept in rows that were computed before: 2 MB."""


@dataclass(frozen=True, slots=True)
class _Level:
    """All n-grams of one length, by their context: every token but the last."""

    contexts: NDArray[np.unsignedinteger]
    """Sorted; tokens packed into :func:`bits` each, the latest lowest."""
    backoff: NDArray[np.uint8]
    """Per context: log-factor of the shorter context's row for tokens that are not listed, in steps below 0."""
    offsets: NDArray[np.uint32]
    """Where a context's tokens begin; one more for the end of the last."""
    tokens: NDArray[np.uint16]
    scores: NDArray[np.uint8]
    """Log-probability per token, in steps below 0."""


def bits(vocabulary: int) -> int:
    """Bits that a token takes in a packed context."""
    return max(1, (vocabulary - 1).bit_length())


class LanguageModel:
    """Weighs what may be said next."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]], vocabulary: int) -> None:
        """Take the arrays of a table that was made for a vocabulary of this size. Raises ModelError."""
        try:
            self.order, made_for = int(arrays["order"]), int(arrays["vocabulary"])
            self.weight, self.bonus = float(arrays["weight"]), float(arrays["bonus"])
            self._first: Floats = _SCALE * arrays["scores_1"]
            self._levels = [
                _Level(*(arrays[f"{what}_{n}"] for what in ("contexts", "backoff", "offsets", "tokens", "scores")))
                for n in range(2, self.order + 1)
            ]
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"is no table of n-grams ({error})") from None
        if (
            made_for != vocabulary
            or len(self._first) != vocabulary
            or not all(_whole(level, vocabulary, length) for length, level in enumerate(self._levels, start=1))
        ):
            raise ModelError(f"is damaged, or made for another model: {made_for} tokens, expected {vocabulary}")
        self._bits = bits(vocabulary)
        self.row = lru_cache(maxsize=max(64, _ROWS // vocabulary))(self._row)
        """[vocabulary] log-probability of each token after a context of at most ``order`` - 1 tokens."""

    @classmethod
    def load(cls, path: Path, vocabulary: int) -> LanguageModel:
        """Read a table. Raises ModelError, its one line naming the file."""
        try:
            with path.open("rb") as file:
                return cls(np.load(file, allow_pickle=False), vocabulary)
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, ModelError) as error:
            raise ModelError(f"{path}: {error}; import the model again") from None

    @classmethod
    def of(cls, files: ModelFiles, options: settings.Model, vocabulary: int) -> LanguageModel | None:
        """What a model brings; None: nothing, or the settings or their engine do without. Raises ModelError."""
        if files.language_model is None or not options.language_model or options.engine == "sherpa-onnx":
            return None
        return cls.load(files.language_model, vocabulary)

    def onward(self, context: tuple[int, ...], token: int) -> tuple[int, ...]:
        """What the token after this one depends on."""
        return (*context, token)[1 - self.order :]

    def lists(self, context: tuple[int, ...], token: int) -> bool:
        """Whether a token was read often enough after a context of at least one token."""
        level, at = self._found(context)
        if at is None:
            return False
        return token in level.tokens[level.offsets[at] : level.offsets[at + 1]]

    def _row(self, context: tuple[int, ...]) -> Floats:
        if not context:
            return self._first
        shorter = self.row(context[1:])
        level, at = self._found(context)
        if at is None:
            return shorter
        listed = slice(int(level.offsets[at]), int(level.offsets[at + 1]))
        row: Floats = shorter + _SCALE * level.backoff[at]
        row[level.tokens[listed]] = _SCALE * level.scores[listed]
        return row

    def _found(self, context: tuple[int, ...]) -> tuple[_Level, int | None]:
        """Where a context of at least one token stands; None: nowhere."""
        level, packed = self._levels[len(context) - 1], 0
        for token in context:
            packed = packed << self._bits | token
        at = int(np.searchsorted(level.contexts, level.contexts.dtype.type(packed)))
        return level, at if at < len(level.contexts) and int(level.contexts[at]) == packed else None


def _whole(level: _Level, vocabulary: int, length: int) -> bool:
    """Whether the arrays of a level, with contexts of ``length`` tokens, belong together and to a vocabulary."""
    arrays = (level.contexts, level.backoff, level.offsets, level.tokens, level.scores)
    return (
        all(array.dtype.kind == "u" for array in arrays)
        and 8 * level.contexts.dtype.itemsize >= length * bits(vocabulary)
        and len(level.contexts) == len(level.backoff) == len(level.offsets) - 1
        and len(level.tokens) == len(level.scores) == int(level.offsets[-1])
        and int(level.tokens.max(initial=0)) < vocabulary
    )
