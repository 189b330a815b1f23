"""Keeps a record of what was said, understood, sent and done, in which every line seals the one before it.

Law: each record carries the SHA-256 of its own content and of the record before it, so that nothing can be changed,
left out or put in between without :func:`verify` finding it. Whoever can write here can also write it all anew;
therefore the newest hash leaves the box with every ``health``, and an MES's copy of one proves everything before it.

A record is written after what it tells of is committed. A crash in between leaves a gap in the sequence numbers, which
is not a break of the chain and is told by :func:`verify`; half a line at the end is cut off when the log is opened.
What a failed write leaves, where the disk does not even let it be taken back, stays behind in its file: the next record
begins another file and says where (``left``), and :func:`verify` passes it over.
Nobody waits for the log, and nothing stops because it cannot be written: that is an alarm.

Where the disk fails in the newest file (EIO), another one goes on: with the next number and the newest hash, where that
is known. Where the file cannot even be read at a start, with a number beyond all that it may hold and the hash of the
newest record that can be read; the first record names what is given up (``unreadable``), and it is an alarm.

A file is named by its first record and holds one day at most, also of a box that hears nothing, because files are
deleted whole (``file_retention``): what was said stays a day longer than it may, and not for as long as it takes to
fill a file. The hash of a file's last record is in the first of the next, so the rest still is a chain.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import hashlib
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from edge_asr import clock, events
from edge_asr.events import Draft, Json, Message
from edge_asr.outbox import UNLIMITED, Outbox
from edge_asr.retention import Limits

log = logging.getLogger(__name__)

GENESIS: Final = "0" * 64
"""What the first record of all calls its predecessor."""

FILES: Final = "audit-*.jsonl"

SEGMENT_RECORDS: Final = 10_000
"""In one file at most."""

MAX_WAITING: Final = 1000
"""Records that wait for the disk; what is beyond has none, and :func:`verify` tells of it."""

WRITE_LIMIT_S: Final = 5.0
"""A record that takes longer is told as an alarm."""

STALL_LIMIT_S: Final = 4.0
"""A disk that has written no record for so long is not waited for at a stop; a tired SD card may need 2 s for one."""

CLOSE_LIMIT_S: Final = 8.0
"""How long a stop waits for the last records of a disk that writes one after the other; with what the outbox's may take
within TimeoutStopSec=."""

_BROKEN: Final = frozenset({errno.EIO, errno.EUCLEAN, errno.EBADMSG})
"""What the disk answers where it fails in one place; in another it may be well."""

_DAY_NS: Final = 86_400 * clock.NS_PER_S

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
    left: tuple[str, ...]
    """Places where a failed write could not be taken back, as the record behind each says."""


class _LeftError(OSError):
    """A failed write that could not be taken back."""

    def __init__(self, error: OSError, end: int) -> None:
        super().__init__(error.errno, error.strerror)
        self.end = end
        """Bytes of the file before it."""


class AuditLog:
    """Appends records; used by one thread at a time. Opened by the first, for a log that cannot be must stop no box."""

    def __init__(self, folder: Path, *, texts: bool) -> None:
        self._folder = folder
        self._texts = texts
        self._lock = threading.Lock()
        self._newest: tuple[int, str] | None = None
        self._file = 0
        self._day: int | None = None
        self._left: dict[str, Json] = {}
        """What the next record has to say of the last write."""
        self.damage = ""
        """Which file was given up since the log was opened, a sentence; empty: none."""

    @property
    def newest(self) -> str | None:
        """Number and hash of the newest record; None: the log could not be opened yet."""
        return f"{self._newest[0]}:{self._newest[1]}" if self._newest else None

    @property
    def is_of_another_day(self) -> bool:
        """Whether the next record begins a file because the present one is not of today."""
        return self._day != _today()

    def attend(self) -> None:
        """Open the log unless that is done, and begin a file unless there is one of today. Raises AuditError."""
        with self._lock:
            newest = self._newest or self._open()
            if self.is_of_another_day:
                self._append(newest, {"what": "day"})

    def append(self, content: Mapping[str, Json], *, durable: bool = True) -> None:
        """Write one record. Raises AuditError."""
        with self._lock:
            self._append(self._newest or self._open(), content, durable=durable)

    def committed(self, messages: Iterable[Message]) -> None:
        """Tell of messages that are in the outbox."""
        for message in messages:
            kept = (*_KEPT, *(_TEXTS if self._texts else ()))
            about = {key: message.data[key] for key in kept if key in message.data}
            said: dict[str, Json] = {"what": message.topic.rpartition("/")[2], "seq": message.seq, "id": message.id}
            self.append({**said, **about}, durable=message.category == "command")

    def _open(self) -> tuple[int, str]:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            end = _end(self._folder)
            self._file, self._day = _begun(self._folder)
        except OSError as error:
            raise _refused(self._folder, error) from None
        if end.spoilt_lines:
            log.error("%s: its last %d lines are spoilt; going on in a new file", self._folder, end.spoilt_lines)
        if end.unreadable:
            self._give_up(f"the disk fails in {', '.join(end.unreadable)}")
        if end.spoilt_lines or end.unreadable:
            self._day = None
        opened: dict[str, Json] = {
            "boot_id": clock.boot_id(),
            "cut_bytes": end.cut_bytes,
            "spoilt_lines": end.spoilt_lines,
            "unreadable": [*end.unreadable],
        }
        return self._append((end.number, end.hash), {"what": "opened", **opened})

    def _append(self, newest: tuple[int, str], content: Mapping[str, Json], *, durable: bool = True) -> tuple[int, str]:
        number = newest[0] + 1
        begins = self.is_of_another_day or number - self._file >= SEGMENT_RECORDS
        path = self._folder / _segment(number if begins else self._file)
        told = {**content, **self._left}
        record: dict[str, Json] = {"n": number, "time": clock.iso(clock.wall_ns()), **told, "before": newest[1]}
        digest = _hash(record)
        try:
            _write(path, _line({**record, "hash": digest}), durable=durable)
            self._newest, self._left = (number, digest), {}
            if begins:
                self._file, self._day = number, _today()
        except OSError as error:
            if isinstance(error, _LeftError):
                self._left, self._day = {"left": {"file": path.name, "from_byte": error.end}}, None
            if begins or error.errno not in _BROKEN:
                raise _refused(path, error) from None
            self._give_up(f"the disk fails in {path.name} ({error.strerror})")
            self._day = None
            return self._append(newest, content, durable=durable)
        return self._newest

    def _give_up(self, reason: str) -> None:
        self.damage = f"{reason}; the audit log goes on in a new file"
        log.error("%s: %s", self._folder, self.damage)


class AuditedOutbox(Outbox):
    """An outbox that tells the audit log what it commits, and what brokers and the MES say of it.

    Nobody waits for the log: it may be on another disk, which no watchdog looks at.
    """

    def __init__(
        self, path: Path, max_bytes: int, audit: AuditLog, *, limits: Mapping[events.Category, Limits] = UNLIMITED
    ) -> None:
        super().__init__(path, max_bytes, limits=limits)
        self.audit = audit
        self._refused = ""
        """Why the last record is not written; empty: it is."""
        self._since_s: float | None = None
        """When the scribe began to write (CLOCK_MONOTONIC); None: it does not."""
        self._attempted = 0
        """Records so far, written or refused."""
        self._waiting = threading.BoundedSemaphore(MAX_WAITING)
        self._works: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._scribe = threading.Thread(target=self._scribble, name="audit", daemon=True)  # its disk may hang for ever
        self._scribe.start()
        self._write(audit.attend)

    @property
    def trouble(self) -> str:
        """Why no records are written; empty: they are."""
        since_s = self._since_s
        if since_s is not None and time.monotonic() - since_s > WRITE_LIMIT_S:
            return f"the disk of the audit log has not answered for {time.monotonic() - since_s:.0f} s"
        return self._refused

    async def append(self, *drafts: Draft) -> tuple[Message, ...]:
        """As Outbox.append."""
        messages = await super().append(*drafts)
        self._write(partial(self.audit.committed, messages))
        return messages

    async def acknowledge(self, seqs: Iterable[int]) -> None:
        """As Outbox.acknowledge."""
        taken = list(seqs)
        await super().acknowledge(taken)
        if taken:
            self._tell({"what": "delivered", "seqs": [*taken]})

    async def receive_receipt(self, command_id: str, verdict: events.Verdict, reason: str) -> bool:
        """As Outbox.receive_receipt."""
        known = await super().receive_receipt(command_id, verdict, reason)
        if known:
            self._tell({"what": "receipt", "id": command_id, "verdict": verdict, "reason": reason})
        return known

    async def drop_outdated(self) -> int:
        """As Outbox.drop_outdated; of the log, too."""
        if self._since_s is None:  # else it would be one more that waits
            self._write(self.audit.attend)
        return await super().drop_outdated()

    def note(self, content: Mapping[str, Json]) -> None:
        """Tell of what is no message."""
        self._write(partial(self.audit.append, content))

    def close(self) -> None:
        """Finish both."""
        super().close()
        self._works.put(None)
        deadline_s, attempted = time.monotonic() + CLOSE_LIMIT_S, -1
        while (left_s := deadline_s - time.monotonic()) > 0 and attempted != self._attempted:
            attempted = self._attempted
            self._scribe.join(min(STALL_LIMIT_S, left_s))
        if self._scribe.is_alive():
            log.error("the disk of the audit log is dead or too slow; the last records are not written")

    def _tell(self, content: Mapping[str, Json]) -> None:
        self._write(partial(self.audit.append, content, durable=False))

    def _write(self, work: Callable[[], None]) -> None:
        if self._waiting.acquire(blocking=False):
            self._works.put(work)
        else:
            self._refuse(f"{MAX_WAITING} wait for the disk of the audit log; see what is wrong with it")

    def _scribble(self) -> None:
        while (work := self._works.get()) is not None:
            self._attempt(work)

    def _attempt(self, work: Callable[[], None]) -> None:
        self._since_s = time.monotonic()
        try:
            work()
            self._refused = ""
        except AuditError as error:  # the message is committed and must go its way
            self._refuse(str(error))
        except Exception as error:  # or the thread would end, and nobody hear of it
            log.exception("the audit log fails")
            self._refuse(f"the audit log fails ({error!r}); the log of the service knows more")
        finally:
            self._since_s = None
            self._attempted += 1
            self._waiting.release()

    def _refuse(self, reason: str) -> None:
        if reason != self._refused:
            log.error("no audit record: %s", reason)
        self._refused = reason


def verify(folder: Path, known: str | None = None) -> Verdict:
    """Recompute every hash; ``known`` is a ``number:hash`` from outside. Raises AuditError at the first break."""
    number = first = 0
    before, seen, seqs, left = "", known is None, [], []
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
        number, first = record["n"], first or record["n"]
        seen = seen or known in {f"{number}:{digest}", f"{number - 1}:{record['before']}"}
        before = digest
        if first == number == 1 and record["before"] != GENESIS:
            raise AuditError(f"{where}: is not the first record; the log was tampered with")
        seqs += [record["seq"]] if "seq" in record else []
        left += [f"{record['left']['file']} from byte {record['left']['from_byte']} on"] if "left" in record else []
    if not number:
        raise AuditError(f"{folder}: holds no audit log; see docs/privacy.md")
    if known and not seen and known.partition(":")[0] in map(str, range(1, first - 1)):
        raise AuditError(
            f"{folder}: {known} is older than what is kept (from {first}); that much is whole, ask for a newer one"
        )
    if not seen:
        raise AuditError(f"{folder}: has no record {known}; it was written anew or cut off, or that is another box's")
    missing = sorted(set(range(min(seqs), max(seqs) + 1)) - set(seqs)) if seqs else []
    return Verdict(number - first + 1, first, f"{number}:{before}", tuple(missing), tuple(left))


def _lines(folder: Path) -> Iterator[tuple[Path, int, bytes]]:
    """Of every file, but for what a failed write left as the next file's first record says."""
    files = _segments(folder)
    for path, following in zip(files, (*files[1:], None), strict=True):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise _refused(path, error) from None
        end = _left_from(path, following) if following else None
        for line_number, line in enumerate(content[:end].splitlines(keepends=True), 1):
            yield path, line_number, line


def _left_from(path: Path, following: Path) -> int | None:
    """Where in a file begins what a failed write left, by the next file's first record; None: nowhere."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        left = json.loads(_first_line(following))["left"]
        if left["file"] == path.name:
            return int(left["from_byte"])
    return None


def _parsed(where: str, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not line.endswith(b"\n"):
        detail = "it is being written, or a write was cut short, which the next start mends"
        raise AuditError(f"{where}: is no record but half of one: {detail}")
    if not isinstance(record, dict) or not isinstance(record.get("n"), int):
        raise AuditError(f"{where}: is no record; the log was tampered with or is damaged")
    return record


@dataclass(frozen=True, slots=True)
class _End:
    """Where a log goes on."""

    number: int
    hash: str
    """Of the newest record that is what was written."""
    cut_bytes: int = 0
    """Half a record, which a crash left."""
    spoilt_lines: int = 0
    """Whole lines behind that record which are none any more; each keeps its number, and :func:`verify` tells of it."""
    unreadable: tuple[str, ...] = ()
    """Files behind it in which the disk fails; each keeps all numbers that it may hold."""


def _end(folder: Path) -> _End:
    """Look for it, and cut half a record off."""
    number = cut = spoilt = 0
    unreadable: list[str] = []
    for path in reversed(_segments(folder)):
        try:
            content = path.read_bytes()
            end = content.rfind(b"\n") + 1
            if end < len(content):
                os.truncate(path, end)
                cut += len(content) - end
        except OSError as error:
            if error.errno not in _BROKEN:
                raise
            unreadable.append(path.name)
            number = number or _number_of(path) + SEGMENT_RECORDS - 1
            continue
        lines = content[:end].splitlines(keepends=True)
        number = number or _number_of(path) + len(lines) - 1
        for line in reversed(lines):
            with contextlib.suppress(AuditError):
                record = _parsed(path.name, line)
                digest = record.pop("hash", None)
                if digest == _hash(record):
                    return _End(max(number, record["n"]), digest, cut, spoilt, tuple(unreadable))
            spoilt += 1
    return _End(number, GENESIS, cut, spoilt, tuple(unreadable))


def _begun(folder: Path) -> tuple[int, int | None]:
    """Number and day of the newest file's first record; no day: the next record begins another file."""
    files = _segments(folder)
    if not files:
        return 0, None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        first = json.loads(_first_line(files[-1]))
        return int(first["n"]), int(dt.datetime.fromisoformat(first["time"]).timestamp()) // 86_400
    return 0, None


def _today() -> int:
    return clock.wall_ns() // _DAY_NS


def _write(path: Path, line: bytes, *, durable: bool) -> None:
    """Append a record; of one that does not fit on the disk nothing stays."""
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            while line:
                line = line[file.write(line) :]
            if durable:
                os.fdatasync(file.fileno())
        except OSError as error:
            try:
                file.truncate(end)
            except OSError:
                raise _LeftError(error, end) from None
            raise


def _segments(folder: Path) -> list[Path]:
    """Its files, oldest first; a copy that somebody keeps beside them is none."""
    return sorted(path for path in folder.glob(FILES) if path.stem.removeprefix("audit-").isdecimal())


def _first_line(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.readline()


def _number_of(path: Path) -> int:
    """Of its first record."""
    return int(path.stem.removeprefix("audit-"))


def _segment(number: int) -> str:
    return f"audit-{number:012d}.jsonl"


def _line(record: Mapping[str, Json]) -> bytes:
    text = json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return text.encode(errors="surrogatepass") + b"\n"


def _hash(record: Mapping[str, Json]) -> str:
    return hashlib.sha256(_line(record)).hexdigest()


def _refused(path: Path, error: OSError) -> AuditError:
    remedy = "the disk fails there" if error.errno in _BROKEN else "check permissions and free space"
    return AuditError(f"{path}: {error.strerror}; {remedy}")
