"""Keeps a record of what was said, understood, sent and done, in which every line seals the one before it.

Law: each record carries the SHA-256 of its own content and of the record before it, so that nothing can be changed,
left out or put in between without :func:`verify` finding it. Whoever can write here can also write it all anew;
therefore the newest hash leaves the box with every ``health``, and an MES's copy of one proves everything before it.

A record is written after what it tells of is committed. A crash in between leaves a gap in the sequence numbers, which
is not a break of the chain and is told by :func:`verify`; half a line at the end is cut off when the log is opened.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edge_asr import clock, events
from edge_asr.events import Draft, Json, Message
from edge_asr.outbox import UNLIMITED, Outbox
from edge_asr.retention import Limits

log = logging.getLogger(__name__)

GENESIS: Final = "0" * 64
"""What the first record of all calls its predecessor."""

SEGMENT_RECORDS: Final = 10_000
"""In one file; old files are deleted whole."""

_KEPT: Final = (
    "utterance_id",
    "source",
    "intent",
    "slots",
    "reason",
    "kind",
    "confidence",
    "risk",
    "confirmed",
    "model",
)
_TEXTS: Final = ("text", "words")


class AuditError(Exception):
    """The audit log cannot be used; the message is one line with the remedy."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a verification that found the chain whole."""

    records: int
    first: int
    """Number of the oldest record that is still there; above 1 where old files were deleted."""
    newest: str
    """``number:hash``"""
    missing: tuple[int, ...]
    """Sequence numbers of messages that no record tells of, between the first and the last that are told of."""


class AuditLog:
    """Appends records; used by one thread at a time."""

    def __init__(self, folder: Path, *, texts: bool, days: float) -> None:
        """Open or begin the log. Raises AuditError."""
        self._folder = folder
        self._texts = texts
        self._days = days
        self._lock = threading.Lock()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._number, self._hash, cut = _tail(folder)
            self._forget_old()
        except OSError as error:
            raise _refused(folder, error) from None
        self.append({"what": "opened", "boot_id": clock.boot_id(), "cut_bytes": cut})

    @property
    def newest(self) -> str:
        """Number and hash of the newest record."""
        return f"{self._number}:{self._hash}"

    def append(self, content: Mapping[str, Json], *, durable: bool = True) -> None:
        """Write one record. Raises AuditError."""
        with self._lock:
            number = self._number + 1
            record: dict[str, Json] = {"n": number, "time": clock.iso(clock.wall_ns()), **content, "before": self._hash}
            digest = _hash(record)
            path = self._folder / _segment(number)
            begins = not path.exists()
            try:
                with path.open("ab") as file:
                    file.write(_line({**record, "hash": digest}))
                    file.flush()
                    if durable:
                        os.fdatasync(file.fileno())
            except OSError as error:
                raise _refused(path, error) from None
            self._number, self._hash = number, digest
        if begins:
            self._forget_old()

    def committed(self, messages: Iterable[Message]) -> None:
        """Tell of messages that are in the outbox."""
        for message in messages:
            kept = (*_KEPT, *(_TEXTS if self._texts else ()))
            about = {key: message.data[key] for key in kept if key in message.data}
            said: dict[str, Json] = {"what": message.topic.rpartition("/")[2], "seq": message.seq, "id": message.id}
            self.append({**said, **about}, durable=message.category == "command")

    def _forget_old(self) -> None:
        """Delete whole files that are too old; their last hash is in the first record that is left."""
        limit_s = clock.wall_ns() / clock.NS_PER_S - self._days * 86_400
        for path in _segments(self._folder)[:-1]:
            if path.stat().st_mtime < limit_s:
                path.unlink()


class AuditedOutbox(Outbox):
    """An outbox that tells the audit log what it commits, and what brokers and the MES say of it."""

    def __init__(
        self, path: Path, max_bytes: int, audit: AuditLog, *, limits: Mapping[events.Category, Limits] = UNLIMITED
    ) -> None:
        super().__init__(path, max_bytes, limits=limits)
        self.audit = audit
        self._scribe = ThreadPoolExecutor(1, thread_name_prefix="audit")

    async def append(self, *drafts: Draft) -> tuple[Message, ...]:
        """As Outbox.append."""
        messages = await super().append(*drafts)
        await self._write(self.audit.committed, messages)
        return messages

    async def acknowledge(self, seqs: Iterable[int]) -> None:
        """As Outbox.acknowledge."""
        taken = list(seqs)
        await super().acknowledge(taken)
        if taken:
            await self._write(self._tell, {"what": "delivered", "seqs": taken})

    async def receive_receipt(self, command_id: str, verdict: events.Verdict, reason: str) -> bool:
        """As Outbox.receive_receipt."""
        known = await super().receive_receipt(command_id, verdict, reason)
        if known:
            await self._write(self._tell, {"what": "receipt", "id": command_id, "verdict": verdict, "reason": reason})
        return known

    async def note(self, content: Mapping[str, Json]) -> None:
        """Tell of what is no message."""
        await self._write(self.audit.append, content)

    def close(self) -> None:
        """Finish both."""
        super().close()
        self._scribe.shutdown()

    def _tell(self, content: Mapping[str, Json]) -> None:
        self.audit.append(content, durable=False)

    async def _write(self, work: Any, content: Any) -> None:  # noqa: ANN401 - a call to be made elsewhere
        try:
            await asyncio.get_running_loop().run_in_executor(self._scribe, work, content)
        except AuditError as error:  # the message is committed and must go its way
            log.error("no audit record: %s", error)  # noqa: TRY400 - no bug, no traceback


def verify(folder: Path, known: str | None = None) -> Verdict:
    """Recompute every hash; ``known`` is a ``number:hash`` from outside. Raises AuditError at the first break."""
    number = first = 0
    before, seen, seqs = "", known is None, []
    for path, line_number, line in _lines(folder):
        where = f"{path.name}, line {line_number}"
        record = _parsed(where, line)
        digest = record.pop("hash", None)
        if number and record["n"] != number + 1:
            raise AuditError(f"{where}: record {number + 1} is missing; the log was tampered with")
        if before and record.get("before") != before:
            raise AuditError(f"{where}: does not follow the record before it; the log was tampered with")
        if digest != _hash(record):
            raise AuditError(f"{where}: was changed after it was written; the log was tampered with")
        number, before, first = record["n"], digest, first or record["n"]
        if first == number == 1 and record["before"] != GENESIS:
            raise AuditError(f"{where}: is not the first record; the log was tampered with")
        seen = seen or f"{number}:{digest}" == known
        seqs += [record["seq"]] if "seq" in record else []
    if not number:
        raise AuditError(f"{folder}: holds no audit log; see docs/privacy.md")
    if not seen:
        raise AuditError(f"{folder}: has no record {known}; it was written anew or cut off, or that is another box's")
    missing = sorted(set(range(min(seqs), max(seqs) + 1)) - set(seqs)) if seqs else []
    return Verdict(number - first + 1, first, f"{number}:{before}", tuple(missing))


def _lines(folder: Path) -> Iterator[tuple[Path, int, bytes]]:
    for path in _segments(folder):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise _refused(path, error) from None
        for line_number, line in enumerate(content.splitlines(keepends=True), 1):
            yield path, line_number, line


def _parsed(where: str, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("n"), int) or not line.endswith(b"\n"):
        raise AuditError(f"{where}: is no record; the log was tampered with, or is being written")
    return record


def _tail(folder: Path) -> tuple[int, str, int]:
    """Number and hash of the newest record, and how many bytes of half a record were cut off."""
    for path in reversed(_segments(folder)):
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            os.truncate(path, end)
        if end:
            record = _parsed(path.name, content[:end].splitlines(keepends=True)[-1])
            return record["n"], str(record.get("hash")), len(content) - end
    return 0, GENESIS, 0


def _segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("audit-*.jsonl"))


def _segment(number: int) -> str:
    return f"audit-{(number - 1) // SEGMENT_RECORDS * SEGMENT_RECORDS + 1:012d}.jsonl"


def _line(record: Mapping[str, Json]) -> bytes:
    return json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _hash(record: Mapping[str, Json]) -> str:
    return hashlib.sha256(_line(record)).hexdigest()


def _refused(path: Path, error: OSError) -> AuditError:
    return AuditError(f"{path}: {error.strerror}; check permissions and free space")
