"""The values that flow from the microphone to the broker. All frozen; audio is bytes, never an array.

Law: inside, time is a sample index at 16 kHz (``position``, ``start``) or CLOCK_BOOTTIME nanoseconds (``*_ns``);
seconds and ISO 8601 appear only in what leaves the box.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Union

SAMPLE_RATE = 16_000
"""Hz; the only rate inside. Everything is resampled at the edge (see ``audio``)."""

FRAME_SAMPLES = 512
"""Samples in one frame (32 ms): the window the silero speech detector was trained on."""

BYTES_PER_SAMPLE = 2

Json = Union[None, bool, int, float, str, "list[Json]", "dict[str, Json]"]

Risk = Literal["normal", "confirm", "two-step"]
"""How much harm a wrongly heard command does: run it, ask once, or ask twice."""

Answer = Literal["confirm", "cancel"]
"""What an intent may say to a command that waits for confirmation."""

Confirmer = Literal["voice", "request"]
"""Where a yes came from."""

Category = Literal["command", "transcript", "rejection", "alarm"]
"""Message classes of the outbox; when space runs out transcripts go first and commands last."""

Verdict = Literal["accepted", "rejected"]
"""What the MES did with a command."""

RejectionReason = Literal[
    "not-understood",
    "ambiguous",
    "no-speech",
    "language",
    "unsafe-number",
    "too-noisy",
    "recognizer-failed",
    "not-confirmed",
    "cancelled",
    "not-allowed",
    "cut-off",
]


def new_id() -> str:
    """A UUIDv7 (RFC 9562 5.7): 48 bits of Unix milliseconds, then random bits, so ids sort by time of birth."""
    value = (time.time_ns() // 1_000_000 & (1 << 48) - 1) << 80 | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return str(uuid.UUID(int=value))


def derived_id(parent: str, index: int) -> str:
    """The ``index``-th id that comes of another, always the same: its time of birth, its random bits hashed."""
    value, digest = uuid.UUID(parent).int, hashlib.sha256(f"{parent} {index}".encode()).digest()
    kept = (0xFFFFFFFFFFFFF << 76) | (0x3 << 62)  # time, version, variant
    return str(uuid.UUID(int=value & kept | int.from_bytes(digest[:16], "big") & ~kept))


@dataclass(frozen=True, slots=True)
class AudioFrame:
    """A piece of one source's audio, usually :data:`FRAME_SAMPLES` long."""

    source: str
    """Name of the source, unique in the settings."""
    position: int
    """Index of the first sample since the source was opened; a jump between frames is lost audio, made visible."""
    pcm: bytes
    """Mono signed 16-bit little-endian samples at 16 kHz. None at all: the audio broke off, and may go on later."""
    captured_ns: int
    """CLOCK_BOOTTIME at which the last sample was captured."""

    @property
    def end(self) -> int:
        """Index of the sample after the last one."""
        return self.position + len(self.pcm) // BYTES_PER_SAMPLE


@dataclass(frozen=True, slots=True)
class Utterance:
    """What the gate let through: one stretch of speech with its pre-roll."""

    id: str
    source: str
    start: int
    """Index of the first sample since the source was opened."""
    pcm: bytes
    """Mono signed 16-bit little-endian samples at 16 kHz."""
    ended_ns: int
    """CLOCK_BOOTTIME of the last sample in ``pcm``; a command's life starts here."""
    torn: bool = False
    """Audio was lost right before its first or after its last word: more may have been said."""

    @property
    def duration_s(self) -> float:
        """Seconds of audio."""
        return len(self.pcm) / BYTES_PER_SAMPLE / SAMPLE_RATE


@dataclass(frozen=True, slots=True)
class Token:
    """One emitted piece of text."""

    text: str
    start_s: float
    """Seconds from the start of the utterance to the frame in which the model emitted the token."""


@dataclass(frozen=True, slots=True)
class Transcript:
    """What was said, as the model heard it."""

    text: str
    language: str
    """``zh``, ``en``, ``yue``, ``ja``, ``ko`` or ``nospeech``."""
    emotion: str
    """``HAPPY`` ... or ``EMO_UNKNOWN``, SenseVoice's own names."""
    event: str
    """``Speech``, ``BGM``, ``Laughter`` ..., SenseVoice's own names."""
    confidence: float
    """0..1: the geometric mean posterior of the emitted tokens; 0: nothing was emitted, or the engine
    keeps its posteriors to itself."""
    tokens: tuple[Token, ...]


SlotValue = str | int | float


@dataclass(frozen=True, slots=True)
class Command:
    """An intent with its typed slots, safe to act upon until it expires."""

    intent: str
    slots: Mapping[str, SlotValue]
    confidence: float
    """0..1, see ``commands`` for what it is made of."""
    risk: Risk
    ttl_s: float
    """Seconds from the end of speech during which the command may be delivered as live."""
    units: Mapping[str, str] = field(default_factory=dict)
    """Unit per numeric slot that has one, e.g. ``{"speed": "rpm"}``."""
    words: str = ""
    """The sentence of the grammar that was matched."""
    answer: Answer | None = None
    """Set where the intent answers a pending command."""
    stations: tuple[str, ...] = ()
    """Sources that may give this command; empty: all."""
    roles: tuple[str, ...] = ()
    """Who must confirm it by request; empty: nobody."""

    @property
    def cancels(self) -> bool:
        """Whether it is the one command that can do no harm, and passes where others are refused."""
        return self.answer == "cancel"


@dataclass(frozen=True, slots=True)
class Rejection:
    """Speech that was heard and not acted upon."""

    reason: RejectionReason
    detail: str
    """One sentence for the person who looks after the box."""
    confidence: float = 0.0
    candidates: tuple[str, ...] = ()
    """Readings that were too close or too weak, best first."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A message before it is committed: the outbox adds id, sequence number and times."""

    topic: str
    """Below the device's root, e.g. ``evt/command``."""
    category: Category
    data: Mapping[str, Json]
    """The flat payload without the fields the outbox and the publisher add."""
    expires_ns: int | None = None
    """CLOCK_BOOTTIME after which the message may not be delivered as live; None: never."""
    id: str | None = None
    """The message's id where it must be the same if it is committed twice; None: a new one."""


@dataclass(frozen=True, slots=True)
class Message:
    """A committed message; it survives SIGKILL and power loss until the broker has acknowledged it."""

    seq: int
    """Gap-free per device, starting at 1."""
    id: str
    """UUIDv7; a duplicate delivery carries the same one."""
    boot_id: str
    """The boot in which it was committed; ``expires_ns`` and ``created_ns`` compare only under the same boot."""
    topic: str
    category: Category
    data: Mapping[str, Json]
    created_wall_ns: int
    created_ns: int
    """CLOCK_BOOTTIME of the commit."""
    expires_ns: int | None
    time_quality: str
