"""Measures on labelled recordings: which commands are accepted, what is accepted wrongly, how right the text is.

A manifest has one JSON object a line: ``{audio, text?, intent?, slots?, language?}``; ``audio`` is relative to the
manifest; without ``intent`` no command may come of it. Noise is mixed as in the public speech-to-intent benchmark.
"""

from __future__ import annotations

import hashlib
import re
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from rapidfuzz.distance import Levenshtein

from edge_asr import settings
from edge_asr.audio import from_float, read_file, to_float
from edge_asr.engine import Engine
from edge_asr.events import BYTES_PER_SAMPLE, SAMPLE_RATE, Command, Rejection, SlotValue
from edge_asr.grammar import words_of
from edge_asr.numbers import value_of
from edge_asr.pipeline import Understanding

ENERGY_FRAME = 2048
"""Samples in a frame when speech and noise are compared by their loudest frames (the benchmark's choice)."""

BANDS = 10
"""Bands of confidence in the calibration."""

PEAK = 0.5
"""Level to which a noisy mixture is normalised (the benchmark's choice)."""


class ManifestError(Exception):
    """The manifest cannot be used; the message names the line."""


class _Line(BaseModel):
    """One line of a manifest."""

    model_config = ConfigDict(frozen=True, strict=True)

    audio: str
    text: str | None = None
    intent: str | None = None
    slots: dict[str, SlotValue] | None = None
    language: str | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One labelled recording."""

    audio: Path
    text: str | None
    intent: str | None
    slots: Mapping[str, SlotValue]
    language: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one recording under one condition."""

    item: Item
    duration_s: float
    cpu_s: float
    """CPU time of gate, recognition and interpretation, in all threads that the model uses."""
    text: str
    commands: tuple[Command, ...]
    rejections: tuple[Rejection, ...]

    @property
    def accepted(self) -> bool:
        """Exactly the labelled command came, intent and every slot."""
        return len(self.commands) == 1 and self.is_right(self.commands[0])

    @property
    def wrong_numbers(self) -> int:
        """Commands that were acted on with another number than was said."""
        return sum(self._has_wrong_number(command) for command in self.commands)

    def is_right(self, command: Command) -> bool:
        """Whether it is the labelled command."""
        return command.intent == self.item.intent and dict(command.slots) == dict(self.item.slots)

    def _has_wrong_number(self, command: Command) -> bool:
        return any(
            _numbers_in(value)
            and (name not in self.item.slots or _numbers_in(self.item.slots[name]) != _numbers_in(value))
            for name, value in command.slots.items()
        )


def _numbers_in(value: SlotValue) -> tuple[float, ...]:
    """The numbers that a slot's value holds: 1200, "line-3", "eight ounce" and "三号线" each hold one."""
    if not isinstance(value, str):
        return (float(value),)
    words = re.findall(r"[0-9]+(?:\.[0-9]+)?|[a-z]+|[^\W0-9_a-z]", value.lower())
    found = (value_of([word], "en" if word.isascii() else "zh") for word in words)
    return tuple(float(number) for number in found if number is not None)


@dataclass(frozen=True, slots=True)
class Condition:
    """All outcomes at one signal-to-noise ratio."""

    snr_db: float | None
    """None: as recorded."""
    outcomes: tuple[Outcome, ...]


def read_manifest(path: Path, intents: Collection[str] | None = None) -> list[Item]:
    """Read a manifest; with ``intents`` its labels must be among these, for others never come. Raises ManifestError."""
    items = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = _Line.model_validate_json(line)
        except ValidationError as error:
            problem = error.errors()[0]
            key = f" `{problem['loc'][0]}`:" if problem["loc"] else ""
            expected = "expected a JSON object {audio, text?, intent?, slots?, language?}"
            raise ManifestError(f"{path}: line {number}:{key} {problem['msg']}; {expected}") from None
        if intents is not None and entry.intent not in {None, *intents}:
            raise ManifestError(
                f"{path}: line {number}: no grammar holds the intent {entry.intent!r}; name one that does by --grammar"
            )
        items.append(Item(path.parent / entry.audio, entry.text, entry.intent, entry.slots or {}, entry.language))
    if not items:
        raise ManifestError(f"{path}: holds no recording")
    return items


def mix(speech: NDArray[np.float32], noise: NDArray[np.float32], snr_db: float, seed: str) -> NDArray[np.float32]:
    """Add a random stretch of noise so that the loudest frames of speech and noise differ by ``snr_db``."""
    if len(noise) <= len(speech):
        noise = np.tile(noise, 2 + len(speech) // len(noise))
    offset = int(hashlib.sha256(seed.encode()).hexdigest(), 16) % (len(noise) - len(speech))
    stretch = noise[offset : offset + len(speech)]
    ratio = _loudest(speech) / max(_loudest(stretch), 1e-12)
    mixed: NDArray[np.float32] = speech + np.float32(np.sqrt(ratio / 10 ** (snr_db / 10))) * stretch
    return (mixed / max(float(np.abs(mixed).max()), 1e-9) * PEAK).astype(np.float32)


def _loudest(samples: NDArray[np.float32]) -> float:
    count = len(samples) // ENERGY_FRAME
    if count == 0:
        return float(np.square(samples).sum())
    return float(np.square(samples[: count * ENERGY_FRAME]).reshape(count, ENERGY_FRAME).sum(axis=1).max())


def measure(
    engine: Engine,
    items: Sequence[Item],
    vad: settings.Vad,
    *,
    noise: NDArray[np.float32] | None = None,
    snr_db: float | None = None,
    seed: int = 0,
) -> Condition:
    """Hear every recording as the daemon would, clean or in noise. Raises AudioFileError."""
    outcomes = []
    for item in items:
        pcm = read_file(item.audio)
        if noise is not None and snr_db is not None:
            pcm = from_float(mix(to_float(pcm), noise, snr_db, f"{seed}:{item.audio.name}:{snr_db:g}"))
        began = time.process_time()
        heard = list(engine.hear(pcm, vad))
        outcomes.append(_outcome(item, heard, len(pcm) / BYTES_PER_SAMPLE / SAMPLE_RATE, time.process_time() - began))
    return Condition(snr_db, tuple(outcomes))


def _outcome(item: Item, heard: Sequence[Understanding], duration_s: float, cpu_s: float) -> Outcome:
    return Outcome(
        item=item,
        duration_s=duration_s,
        cpu_s=cpu_s,
        text=" ".join(h.transcript.text for h in heard if h.transcript is not None),
        commands=tuple(h.decision for h in heard if isinstance(h.decision, Command)),
        rejections=tuple(h.decision for h in heard if isinstance(h.decision, Rejection)),
    )


def summarize(condition: Condition) -> dict[str, Any]:
    """The figures of one condition."""
    outcomes = condition.outcomes
    with_intent = [o for o in outcomes if o.item.intent is not None]
    without = [o for o in outcomes if o.item.intent is None]
    accepted = sum(o.accepted for o in with_intent)
    false_accepts = sum(len(o.commands) for o in without)
    hours = sum(o.duration_s for o in without) / 3600
    audio_s = sum(o.duration_s for o in outcomes)
    spoken = {o.item.language for o in outcomes if o.item.language is not None and o.item.text is not None}
    return {
        "snr": condition.snr_db,
        "n": len(outcomes),
        "accepted": accepted,
        "acceptance": round(accepted / len(with_intent), 4) if with_intent else None,
        "wrong_commands": sum(len(o.commands) - o.accepted for o in with_intent),
        "wrong_numbers": sum(o.wrong_numbers for o in outcomes),
        "false_accepts": false_accepts,
        "false_accepts_per_hour": round(false_accepts / hours, 3) if without else None,
        "hours_without_command": round(hours, 3),
        "wer": _word_error_rate(outcomes),
        "wer_by_language": {
            language: _word_error_rate([o for o in outcomes if o.item.language == language])
            for language in sorted(spoken)
        },
        "rtf": round(sum(o.cpu_s for o in outcomes) / audio_s, 4),
        "rejections": dict(Counter(r.reason for o in outcomes for r in o.rejections).most_common()),
        "calibration": _calibration(outcomes),
    }


def _calibration(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Per band of confidence: how many commands came with it, their mean confidence and how many were right."""
    bands: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    for outcome in outcomes:
        for command in outcome.commands:
            right = outcome.is_right(command)
            bands[min(int(command.confidence * BANDS), BANDS - 1)].append((command.confidence, right))
    return [
        {
            "from": band / BANDS,
            "to": (band + 1) / BANDS,
            "n": len(pairs),
            "confidence": round(sum(confidence for confidence, _ in pairs) / len(pairs), 3),
            "right": sum(right for _, right in pairs),
        }
        for band, pairs in sorted(bands.items())
    ]


def _word_error_rate(outcomes: Sequence[Outcome]) -> float | None:
    """(substitutions + insertions + deletions) / words of the references; CJK counts characters. None without any."""
    errors = words = 0
    for outcome in outcomes:
        if outcome.item.text is not None:
            reference = _plain_words(outcome.item.text)
            errors += Levenshtein.distance(reference, _plain_words(outcome.text))
            words += len(reference)
    return round(errors / words, 4) if words else None


def _plain_words(text: str) -> list[str]:
    """Words to compare; ligatures and compatibility characters are the plain ones."""
    return words_of(unicodedata.normalize("NFKC", text))
