"""Keeps doubtful utterances for people to label, so that a box hears better next year: sealed, few, and not for long.

Law: nothing is kept unless the site has set a public key. Each recording is sealed to that key (HPKE, RFC 9180: X25519,
HKDF-SHA256, AES-256-GCM) before it reaches the disk, and the box cannot open what it has kept. The quota is kept to at
every recording, the days by ``file_retention``. A recorder in trouble never disturbs the hearing: what it cannot keep
is counted and gone.
"""

from __future__ import annotations

import io
import json
import logging
import queue
import threading
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from edge_asr import clock
from edge_asr.events import BYTES_PER_SAMPLE, SAMPLE_RATE, Command, Rejection
from edge_asr.file_retention import SEALED
from edge_asr.pipeline import Understanding
from edge_asr.settings import Recorder as RecorderSettings
from edge_asr.settings import SettingsError

log = logging.getLogger(__name__)

WAITING: Final = 8
"""Utterances on their way to the disk; 20 s each is 5 MB."""

_SUITE: Final = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_INFO: Final = b"edge-asr recording 1"
_UNLABELLED: Final = frozenset({"cancelled", "not-confirmed", "not-allowed", "cut-off", "recognizer-failed"})
"""Rejections that say nothing about the hearing."""


class RecorderError(Exception):
    """Recordings cannot be used; the message is one line with the remedy."""


@dataclass(frozen=True, slots=True)
class Recording:
    """One utterance as it was kept."""

    about: dict[str, Any]
    """What the box made of it: ``utterance_id``, ``source``, ``time``, ``text``, ``intent`` or ``reason`` ..."""
    wav: bytes


def is_doubtful(heard: Understanding, below: float) -> bool:
    """Whether a person should listen: rejected for what was heard, or a command that was not quite clear.

    Where the site has no grammar the transcript is judged; that of an engine which tells no confidence (0) is not.
    """
    decision = heard.decision
    if isinstance(decision, Rejection):
        return decision.reason not in _UNLABELLED
    if decision is None:
        return heard.transcript is not None and 0 < heard.transcript.confidence < below
    return decision.confidence < below


class Recorder:
    """Seals and writes in a thread of its own; without a key it keeps nothing."""

    def __init__(self, options: RecorderSettings, folder: Path) -> None:
        """Raises SettingsError where the key cannot be used."""
        self._options = options
        self._folder = folder
        self._key = _public_key(options.public_key) if options.public_key is not None else None
        self._jobs: queue.Queue[Recording | None] = queue.Queue(WAITING)
        self.kept = 0
        self.failed = 0
        """Recordings that the disk did not take, or for which it was too slow."""
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._thread.start()

    def offer(self, heard: Understanding) -> None:
        """Keep an utterance if it is doubtful; never blocks."""
        if self._key is not None and is_doubtful(heard, self._options.below):
            try:
                self._jobs.put_nowait(Recording(_about(heard), _wav(heard.utterance.pcm)))
            except queue.Full:
                self.failed += 1

    def close(self) -> None:
        """Write what waits."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (recording := self._jobs.get()) is not None:
            self._attempt(partial(self._keep, recording))

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            if not self.failed:
                log.warning("%s: recordings cannot be kept (%s); check the disk", self._folder, error.strerror)
            self.failed += 1

    def _keep(self, recording: Recording) -> None:
        assert self._key is not None  # noqa: S101 - without it nothing is offered
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        sealed = _SUITE.encrypt(_packed(recording), self._key, _INFO)
        name = f"{recording.about['utterance_id']}{SEALED}"
        unfinished = self._folder / f".{name}"
        unfinished.write_bytes(sealed)
        unfinished.rename(self._folder / name)
        tidy(self._folder, self._options.max_bytes)
        self.kept += 1


def tidy(folder: Path, max_bytes: int) -> int:
    """Delete the oldest beyond the quota; how many. Names sort by time (UUIDv7)."""
    sizes = {path: path.stat().st_size for path in sorted(folder.glob(f"*{SEALED}"))}
    over = sum(sizes.values()) - max_bytes
    gone = 0
    for path, size in sizes.items():
        if over <= 0:
            break
        path.unlink(missing_ok=True)
        over, gone = over - size, gone + 1
    return gone


def opened(folder: Path, private_key: Path) -> Iterator[Recording]:
    """Every recording, oldest first, to whoever has the private key. Raises RecorderError."""
    try:
        key = load_pem_private_key(private_key.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or "no private key in PEM without a password"
        raise RecorderError(f"{private_key}: cannot be used ({reason})") from None
    if not isinstance(key, X25519PrivateKey):
        raise RecorderError(f"{private_key}: is not an X25519 key")
    for path in sorted(folder.glob(f"*{SEALED}")):
        try:
            yield _unpacked(_SUITE.decrypt(path.read_bytes(), key, _INFO))
        except (InvalidTag, ValueError, OSError):
            raise RecorderError(f"{path}: does not open with {private_key}; damaged, or another key's") from None


def export(folder: Path, private_key: Path, target: Path) -> int:
    """Write recordings and a manifest for `edge-asr eval` into a folder; how many. Raises RecorderError."""
    lines = []
    try:
        target.mkdir(parents=True, exist_ok=True)
        for recording in opened(folder, private_key):
            name = f"{recording.about['utterance_id']}.wav"
            (target / name).write_bytes(recording.wav)
            lines.append(json.dumps({"audio": name, "labelled": False, "heard": recording.about}, ensure_ascii=False))
        (target / "manifest.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise RecorderError(f"{error.filename}: {error.strerror}; check permissions and free space") from None
    return len(lines)


def _public_key(path: Path) -> X25519PublicKey:
    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no public key in PEM"
        raise SettingsError(f"recorder.public_key: {path} cannot be used ({reason}); see docs/privacy.md") from None
    if not isinstance(key, X25519PublicKey):
        raise SettingsError(f"recorder.public_key: {path} is not an X25519 key; see docs/privacy.md")
    return key


def _about(heard: Understanding) -> dict[str, Any]:
    decision = heard.decision
    about: dict[str, Any] = {
        "utterance_id": heard.utterance.id,
        "source": heard.utterance.source,
        "time": clock.iso(clock.wall_ns()),
        "text": heard.transcript.text if heard.transcript is not None else "",
    }
    if isinstance(decision, Command):
        return {**about, "intent": decision.intent, "slots": dict(decision.slots), "confidence": decision.confidence}
    if isinstance(decision, Rejection):
        return {**about, "reason": decision.reason, "candidates": list(decision.candidates)}
    return about


def _wav(pcm: bytes) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(BYTES_PER_SAMPLE)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(pcm)
    return buffer.getvalue()


def _packed(recording: Recording) -> bytes:
    about = json.dumps(recording.about, ensure_ascii=False).encode()
    return len(about).to_bytes(4, "big") + about + recording.wav


def _unpacked(content: bytes) -> Recording:
    end = 4 + int.from_bytes(content[:4], "big")
    return Recording(json.loads(content[4:end]), content[end:])
