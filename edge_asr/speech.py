"""Decides when someone speaks: frames and their speech probabilities go in, utterances come out.

Law: pure; no clock, no I/O, no logger. Every utterance is one unbroken stretch of its source's samples: pre-roll,
speech, and the part of the closing silence that the recognizer needs. A jump in the frames' positions (lost audio)
closes the utterance at the jump; what was said right before or after it is marked as torn. No utterance is longer than
``max_utterance_s``: continuous speech, or a machine that sounds like it, is cut at the quietest moment of the last
seconds, and the rest goes on as the next utterance. Two utterances may share silence, never a frame of speech.
"""

from __future__ import annotations

import array
import itertools
import sys
from collections import deque
from dataclasses import dataclass, field

from edge_asr import settings
from edge_asr.events import BYTES_PER_SAMPLE, SAMPLE_RATE, AudioFrame, Utterance, new_id

CLOSE_BELOW = 0.15
"""How much lower than the threshold the probability must fall to count as silence (silero's own hysteresis)."""

SILENT = 0.01
"""A lower probability is silence whatever the threshold (silero's own floor), else a low one never closes."""

KEEP_SILENCE_S = 0.3
"""Closing silence that stays in the utterance: word endings are quieter than the detector thinks."""

CUT_WINDOW_S = 3.0
"""An overlong utterance is cut at the quietest frame among its last seconds, though never in its first half."""


@dataclass(slots=True)
class _Open:
    """An utterance while it grows."""

    frames: list[AudioFrame]
    voiced: list[bool]
    """Per frame: whether it is speech."""
    needed_samples: float
    """With less speech than this it is dropped."""
    id: str = field(default_factory=new_id)
    torn: bool = False

    @property
    def speech_samples(self) -> int:
        return sum(_samples(frame) for frame, voiced in zip(self.frames, self.voiced, strict=True) if voiced)

    @property
    def closing_silence(self) -> list[AudioFrame]:
        """The frames since the last one of speech."""
        silent = itertools.takewhile(lambda voiced: not voiced, reversed(self.voiced))
        return self.frames[len(self.frames) - sum(1 for _ in silent) :]


class SpeechGate:
    """Turns one source's frames into utterances."""

    def __init__(self, options: settings.Vad) -> None:
        self._options = options
        self._pre_roll: deque[AudioFrame] = deque()
        self._open: _Open | None = None
        self._expected: int | None = None
        self._resumed: int | None = None
        """Position at which audio went on after a loss; None: somebody has spoken since."""

    @property
    def speaking(self) -> bool:
        """Whether an utterance is open."""
        return self._open is not None

    def feed(self, frame: AudioFrame, probability: float) -> list[Utterance]:
        """Take the next frame with its speech probability; return the utterances that it closed."""
        closed = []
        if self._expected not in {None, frame.position}:
            if self._open is not None and _length(self._open.closing_silence) < KEEP_SILENCE_S * SAMPLE_RATE:
                self._open.torn = True
            closed, self._resumed = self.flush(), frame.position
        self._expected = frame.end
        if self._open is None:
            self._wait(frame, probability)
            return closed
        return closed + self._grow(self._open, frame, probability)

    def flush(self) -> list[Utterance]:
        """Close what is open: the source ended, or its next frame does not follow."""
        utterance, self._open = self._open, None
        self._pre_roll.clear()
        return self._closed(utterance) if utterance is not None else []

    def growing(self) -> Utterance | None:
        """The open utterance as far as it has come, for a partial result."""
        return None if self._open is None else _joined(self._open, self._open.frames)

    def foreseen(self) -> Utterance | None:
        """What the open utterance will be unless somebody speaks on.

        To be asked after every frame, and given once per silence: with the frame from which on silence changes nothing.
        """
        if self._open is None:
            return None
        silence = self._open.closing_silence
        if not _length(silence[:-1]) < KEEP_SILENCE_S * SAMPLE_RATE <= _length(silence):
            return None
        return next(iter(self._closed(self._open)), None)

    def _wait(self, frame: AudioFrame, probability: float) -> None:
        self._pre_roll.append(frame)
        if probability >= self._options.threshold:
            voiced = [False] * (len(self._pre_roll) - 1) + [True]
            self._open = _Open(list(self._pre_roll), voiced, self._options.min_speech_s * SAMPLE_RATE)
            if self._resumed is not None:
                self._open.torn = frame.position - self._resumed < KEEP_SILENCE_S * SAMPLE_RATE
                self._resumed = None
            self._pre_roll.clear()
            return
        while self._pre_roll and frame.end - self._pre_roll[0].position > self._options.pre_roll_s * SAMPLE_RATE:
            self._pre_roll.popleft()

    def _grow(self, utterance: _Open, frame: AudioFrame, probability: float) -> list[Utterance]:
        utterance.frames.append(frame)
        utterance.voiced.append(probability >= max(self._options.threshold - CLOSE_BELOW, SILENT))
        silence = utterance.closing_silence
        if _length(silence) >= self._options.min_silence_s * SAMPLE_RATE:
            self._open = None
            self._pre_roll.extend(_tail(silence, self._options.pre_roll_s))
            return self._closed(utterance)
        if frame.end - utterance.frames[0].position >= self._options.max_utterance_s * SAMPLE_RATE:
            return self._cut(utterance)
        return []

    def _cut(self, utterance: _Open) -> list[Utterance]:
        """Close an overlong utterance at its quietest late frame; the rest stays open.

        What was enough speech before the cut stays enough: a word's last syllable behind it is not dropped.
        """
        frames, voiced = utterance.frames, utterance.voiced
        window = min(CUT_WINDOW_S, self._options.max_utterance_s / 2) * SAMPLE_RATE
        late = [i for i in range(1, len(frames)) if frames[-1].end - frames[i].position <= window]
        quietest = min(late, key=lambda i: _energy(frames[i]))
        needed = 1 if utterance.speech_samples >= utterance.needed_samples else utterance.needed_samples
        self._open = _Open(frames[quietest:], voiced[quietest:], needed)
        return self._closed(_Open(frames[:quietest], voiced[:quietest], needed, utterance.id, utterance.torn))

    def _closed(self, utterance: _Open) -> list[Utterance]:
        if utterance.speech_samples < utterance.needed_samples:
            return []
        frames = utterance.frames.copy()
        surplus = _length(utterance.closing_silence) - KEEP_SILENCE_S * SAMPLE_RATE
        while surplus >= _samples(frames[-1]):
            surplus -= _samples(frames.pop())
        return [_joined(utterance, frames)]


def _samples(frame: AudioFrame) -> int:
    return len(frame.pcm) // BYTES_PER_SAMPLE


def _length(frames: list[AudioFrame]) -> int:
    return sum(map(_samples, frames))


def _energy(frame: AudioFrame) -> int:
    samples = array.array("h", frame.pcm)
    if sys.byteorder == "big":
        samples.byteswap()
    return sum(sample * sample for sample in samples)


def _tail(frames: list[AudioFrame], seconds: float) -> list[AudioFrame]:
    return [frame for frame in frames if frames[-1].end - frame.position <= seconds * SAMPLE_RATE]


def _joined(utterance: _Open, frames: list[AudioFrame]) -> Utterance:
    return Utterance(
        id=utterance.id,
        source=frames[0].source,
        start=frames[0].position,
        pcm=b"".join(frame.pcm for frame in frames),
        ended_ns=frames[-1].captured_ns,
        torn=utterance.torn,
    )
