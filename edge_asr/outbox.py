"""The durable queue between the microphone and the broker: what it has accepted outlives SIGKILL and power loss.

Law:

- ``append`` returns after the disk commit (WAL, synchronous=FULL); the drafts of one call are committed together.
- ``seq`` grows by one per message and is never used twice, not even after the file was damaged or deleted.
- Only a broker's acknowledgement, its final refusal or the quota removes a message; every drop is counted durably.
- A command's age is a difference of CLOCK_BOOTTIME readings of one boot; after a reboot its life is over.

One thread owns the one connection. SQLite 3.7.0 to 3.51.2 can lose committed writes when two connections write or
checkpoint at the same instant (sqlite.org/wal.html#walresetbug), so a second process is refused by a lock file, and
:func:`read_statistics` opens the file read-only: such a connection neither writes nor checkpoints.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import fcntl
import importlib.resources
import json
import logging
import os
import queue
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args

from edge_asr import clock
from edge_asr.events import Category, Draft, Message, new_id

log = logging.getLogger(__name__)

T = TypeVar("T")

DEAD_LETTER: Literal["dead-letter"] = "dead-letter"

DROP_ORDER: tuple[str, ...] = (DEAD_LETTER, "transcript", "rejection", "alarm", "command")
"""When the quota is reached the oldest of the first class that has any goes first."""

_ROW_BYTES = 250
"""What a message takes in the file besides its data: ids, topic, times and index entry, rounded up."""

_SPLIT_BYTES = 3 * 4096
"""Pages that an insertion may add to tree and index by splitting them."""

BALLAST_BYTES = 4 * 1024 * 1024
"""Disk space held back for deleting: on a full disk SQLite can neither checkpoint nor delete without some."""

_WAL_PAGES = 256
"""Checkpoint every 1 MiB: small beside the ballast, which must hold what a checkpoint adds to the file."""

_BATCH = 256
"""Most jobs in one transaction; more would make the first caller wait for the last."""

_SEQ_BLOCK = 1000
"""Sequence numbers reserved at a time in the lock file, so that a lost database cannot make them start again."""

_KEPT_DAMAGED = 2
"""Damaged files kept for inspection; a dying disk must not fill itself with them."""

_SALVAGE_GIVES_UP_AFTER = 20_000
"""Sequence numbers unreadable in a row; one damaged inner page of the tree hides about 2,500."""

_UNLIMITED_PAGES = 2**30 - 1
"""SQLite's own default of max_page_count."""

_APPLICATION_ID = 0x45415352  # "EASR"

_SCHEMA_VERSION = 1
"""``schemas/outbox.N.sql`` brings a file from version N - 1 to N."""

_COLUMNS = "seq, id, boot_id, topic, category, data, created_wall_ns, created_ns, expires_ns, time_quality, crc"
_SELECT = f"SELECT {_COLUMNS}"
_INSERT = f"INTO message ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_PARK = f"INTO dead_letter ({_COLUMNS}, reason) {_SELECT}, ? FROM message WHERE seq = ?"
_OLDEST_OF = "SELECT seq FROM message WHERE category = :category ORDER BY seq LIMIT 1"
_OLDEST_DEAD_LETTER = "SELECT seq FROM dead_letter ORDER BY seq LIMIT 1"
_SEQ_AT, _CRC_AT = 0, 10

_FILE_ERRORS = (sqlite3.Error, UnicodeDecodeError)
"""What SQLite raises about a file: a spoilt name in the schema cannot even be put into a message."""

_SURROUNDINGS = ("full", "disk I/O", "unable to open", "locked", "readonly")
"""In the messages of SQLite errors that say nothing about the file's content."""


class OutboxError(Exception):
    """The outbox cannot do what was asked; the message is one line that names the file and the remedy."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """What waits, how long, and what was given up."""

    waiting: Mapping[Category, int]
    """Messages not yet acknowledged by the broker."""
    dead_letters: int
    """Messages the broker refused for good; kept until the quota needs their space."""
    dropped: Mapping[str, int]
    """Messages removed undelivered by the quota since the outbox was made, per category, ``dead-letter`` included."""
    bytes: int
    """In use in the file; what was deleted is used again, so the file itself keeps its greatest size."""
    oldest_age_s: float | None
    """Age of the oldest waiting message; counted from this boot for one that is older than it. None: nothing waits."""
    last_seq: int
    damages: int
    """Times a damaged file was put aside and its readable messages rescued."""


def life_left_s(message: Message) -> float | None:
    """Seconds for which the message may still be delivered as live: None without limit, 0 when its life is over."""
    if message.expires_ns is None:
        return None
    if message.boot_id != clock.boot_id():
        return 0.0
    return max(0.0, (message.expires_ns - clock.boottime_ns()) / clock.NS_PER_S)


class Outbox:
    """The queue's asynchronous face. Open it before, close it after the event loop's work; both block briefly.

    Every request is a job for the writer thread, which runs all that wait in one transaction (group commit). The job
    queue has no bound of its own because each entry has a caller awaiting it: who appends waits.
    """

    def __init__(self, path: Path, max_bytes: int, *, ballast_bytes: int = BALLAST_BYTES) -> None:
        """Open or create ``path``. Raises OutboxError."""
        self._path = path
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._last_seq = 0
        self._waiters: list[concurrent.futures.Future[None]] = []
        opened: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(
            target=self._work, args=(path, max_bytes, ballast_bytes, opened), name="outbox-writer", daemon=True
        )
        self._thread.start()
        opened.result()

    @property
    def last_seq(self) -> int:
        """The newest committed sequence number."""
        return self._last_seq

    async def append(self, *drafts: Draft) -> tuple[Message, ...]:
        """Commit the drafts, all or none, and return them as messages. Raises OutboxError.

        Cancelling the call leaves open whether they were committed.
        """
        if not drafts:
            return ()
        texts = [_encode(draft) for draft in drafts]
        return await self._submit(lambda database: database.append(drafts, texts), durable=True)

    async def oldest(self, limit: int, after_seq: int = 0, category: Category | None = None) -> list[Message]:
        """Up to ``limit`` waiting messages beyond ``after_seq``, oldest first. Raises OutboxError."""
        return await self._submit(lambda database: database.oldest(limit, after_seq, category))

    async def acknowledge(self, seqs: Iterable[int]) -> None:
        """Forget messages that the broker has taken. Raises OutboxError.

        Not synced to the disk: a forgotten acknowledgement costs a duplicate with the same id, an fsync for each
        costs flash memory its life.
        """
        taken = tuple(seqs)
        await self._submit(lambda database: database.acknowledge(taken))

    async def refuse(self, seq: int, reason: str, limit: int) -> int:
        """Count a refusal by the broker; at the ``limit``-th the message becomes a dead letter. The count; 0: gone."""
        return await self._submit(lambda database: database.refuse(seq, reason, limit))

    async def statistics(self) -> Statistics:
        """What waits, and what was dropped."""
        return await self._submit(lambda database: _statistics(database.connection))

    async def arrival(self, after_seq: int) -> None:
        """Return once a message beyond ``after_seq`` is committed."""
        while True:
            waiter: concurrent.futures.Future[None] = concurrent.futures.Future()
            with self._lock:
                if self._last_seq > after_seq:
                    return
                if self._closed:
                    raise OutboxError(f"{self._path}: the outbox is closed")
                self._waiters.append(waiter)
            await asyncio.wrap_future(waiter)

    def close(self) -> None:
        """Finish what is queued and let go of the file; may be called from any thread, and twice."""
        with self._lock:
            first, self._closed = not self._closed, True
            if first:
                self._jobs.put(None)
        self._thread.join()
        self._wake()

    async def _submit(self, work: Callable[[_Database], T], *, durable: bool = False) -> T:
        job = _Job(work, durable=durable)
        with self._lock:
            if self._closed:
                raise OutboxError(f"{self._path}: the outbox is closed")
            self._jobs.put(job)
        return await asyncio.wrap_future(job.future)

    def _work(self, path: Path, max_bytes: int, ballast_bytes: int, opened: concurrent.futures.Future[None]) -> None:
        """The writer thread."""
        try:
            database = _Database(path, max_bytes, ballast_bytes)
        except BaseException as error:  # noqa: BLE001 - the constructor raises it to its caller
            opened.set_exception(error)
            return
        self._last_seq = database.newest
        opened.set_result(None)
        with contextlib.closing(database):
            while jobs := self._take():
                self._run(database, jobs)

    def _take(self) -> list[_Job[Any]]:
        """Wait for a job, then take all that wait with it; nothing means: stop."""
        job = self._jobs.get()
        jobs: list[_Job[Any]] = []
        while job is not None:
            if job.future.set_running_or_notify_cancel():
                jobs.append(job)
            if len(jobs) == _BATCH or (jobs and self._jobs.empty()):
                return jobs
            job = self._jobs.get()
        if jobs:
            self._jobs.put(None)  # the stop sign again, for the next time
        return jobs

    def _run(self, database: _Database, jobs: Sequence[_Job[Any]]) -> None:
        try:
            results = database.transact([job.work for job in jobs], durable=any(job.durable for job in jobs))
        except Exception as error:  # noqa: BLE001 - whatever it is, its caller gets it
            if len(jobs) > 1:  # one caller's failure is not the others'
                for job in jobs:
                    self._run(database, [job])
            else:
                jobs[0].future.set_exception(error)
            return
        if database.newest > self._last_seq:
            with self._lock:
                self._last_seq = database.newest
            self._wake()
        for job, result in zip(jobs, results, strict=True):
            job.future.set_result(result)

    def _wake(self) -> None:
        with self._lock:
            waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if waiter.set_running_or_notify_cancel():
                waiter.set_result(None)


class _Job(Generic[T]):
    def __init__(self, work: Callable[[_Database], T], *, durable: bool) -> None:
        self.work = work
        self.durable = durable
        self.future: concurrent.futures.Future[T] = concurrent.futures.Future()


class _Database:
    """The file, the lock beside it and the ballast; used by the writer thread only."""

    def __init__(self, path: Path, max_bytes: int, ballast_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._ballast = _Ballast(_beside(path, ".ballast"), ballast_bytes)
        self._connection: sqlite3.Connection | None = None
        self._synchronous = ""
        self.newest = 0
        with _told_of(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._mark = _Mark(path)
        try:
            with _told_of(path):
                self._open()
                self._ballast.restore()
        except BaseException:
            self._mark.close()
            raise

    @property
    def connection(self) -> sqlite3.Connection:
        if self._connection is None:  # the last try to mend a damaged file failed
            self._open()
        assert self._connection is not None  # noqa: S101 - for the type checker
        return self._connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._mark.close()

    def transact(self, works: Sequence[Callable[[_Database], Any]], *, durable: bool) -> list[Any]:
        """Run the works in one transaction, mending what can be mended on the way. Raises OutboxError."""
        with _told_of(self._path):
            try:
                results = self._transact(works, durable=durable)
            except _FILE_ERRORS as error:
                if _is_damage(error):
                    self._heal(str(error))
                elif "full" in str(error) or self._ballast.needed():
                    self._make_do_without_disk()
                else:
                    raise
                results = self._transact(works, durable=durable)
        if self._ballast.missing and self._ballast.restore():
            self._limit_pages(_UNLIMITED_PAGES)
        return results

    def _transact(self, works: Sequence[Callable[[_Database], Any]], *, durable: bool) -> list[Any]:
        connection, newest = self.connection, self.newest
        wanted = "FULL" if durable else "NORMAL"
        if wanted != self._synchronous:
            connection.execute(f"PRAGMA synchronous = {wanted}")
            self._synchronous = wanted
        try:
            connection.execute("BEGIN IMMEDIATE")
            results = [work(self) for work in works]
            connection.execute("COMMIT")
        except BaseException:
            self.newest = newest
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        return results

    # -- jobs, each inside a transaction

    def append(self, drafts: Sequence[Draft], texts: Sequence[str]) -> tuple[Message, ...]:
        self._make_room(sum(len(text.encode()) + _ROW_BYTES for text in texts) + _SPLIT_BYTES)
        return tuple(map(self._insert, drafts, texts))

    def _insert(self, draft: Draft, text: str) -> Message:
        new = (self.newest + 1, new_id(), clock.boot_id(), draft.topic, draft.category)
        times = (clock.wall_ns(), clock.boottime_ns(), draft.expires_ns, clock.time_quality())
        row = (*new, text, *times)
        self._mark.reserve(self.newest + 1)
        self.connection.execute(f"INSERT {_INSERT}", (*row, _checksum(row)))
        self.newest += 1
        return Message(*new, draft.data, *times)

    def oldest(self, limit: int, after_seq: int, category: str | None) -> list[Message]:
        query = f"{_SELECT} FROM message WHERE seq > ? ORDER BY seq LIMIT ?"
        values: tuple[object, ...] = (after_seq, limit)
        if category is not None:
            query = f"{_SELECT} FROM message WHERE seq > ? AND category = ? ORDER BY seq LIMIT ?"
            values = (after_seq, category, limit)
        while True:
            rows = self.connection.execute(query, values).fetchall()
            self._require_reachable([row[_SEQ_AT] for row in rows])
            spoilt = [row[_SEQ_AT] for row in rows if not _is_sound(row)]
            for seq in spoilt:
                self._park(seq, "its checksum is wrong: the disk changed it")
            if not rows or len(spoilt) < len(rows):
                return [_message(row) for row in rows if row[_SEQ_AT] not in spoilt]

    def _require_reachable(self, seqs: Sequence[int]) -> None:
        """A row that a scan finds and its number does not could never be deleted and would be sent for ever."""
        listed = ",".join(map(str, seqs))
        (found,) = self.connection.execute(f"SELECT count(*) FROM message WHERE seq IN ({listed})").fetchone()  # noqa: S608
        if found != len(seqs):
            raise sqlite3.DatabaseError("the tree of messages is out of order")

    def acknowledge(self, seqs: Sequence[int]) -> None:
        self.connection.executemany("DELETE FROM message WHERE seq = ?", ((seq,) for seq in seqs))

    def refuse(self, seq: int, reason: str, limit: int) -> int:
        self.connection.execute("UPDATE message SET refusals = refusals + 1 WHERE seq = ?", (seq,))
        counted = self.connection.execute("SELECT refusals FROM message WHERE seq = ?", (seq,)).fetchone()
        refusals = int(counted[0]) if counted else 0
        if refusals >= limit:
            self._park(seq, reason)
        return refusals

    def _park(self, seq: int, reason: str) -> None:
        self.connection.execute(f"INSERT {_PARK}", (reason, seq))
        self.connection.execute("DELETE FROM message WHERE seq = ?", (seq,))
        log.error("message %d is put aside as a dead letter: %s", seq, reason)

    def _make_room(self, needed: int) -> None:
        """Drop messages, the least valuable and oldest first, until ``needed`` bytes fit under the quota."""
        if needed > self._max_bytes // 2:
            raise OutboxError(f"{self._path}: {needed} bytes in one piece do not fit; raise outbox.max_bytes")
        while _used_bytes(self.connection) + needed > self._max_bytes and self._drop_oldest():
            pass

    def _drop_oldest(self) -> bool:
        for category in DROP_ORDER:
            query = _OLDEST_DEAD_LETTER if category == DEAD_LETTER else _OLDEST_OF
            oldest = self.connection.execute(query, {"category": category}).fetchone()
            if oldest:
                self.connection.execute("DELETE FROM message WHERE seq = ?", oldest)
                self.connection.execute("DELETE FROM dead_letter WHERE seq = ?", oldest)
                self.connection.execute("UPDATE ledger SET dropped = dropped + 1 WHERE category = ?", (category,))
                return True
        return False

    # -- trouble

    def _make_do_without_disk(self) -> None:
        """The disk is full: deletions get the ballast's space; additions may use only pages that are free in the file.

        So a checkpoint never needs the file to grow, the log is reused in place, and acknowledgements keep freeing
        pages however long the disk stays full. Nothing committed is dropped for it.
        """
        if self._ballast.missing and self._ballast.restore():
            self._limit_pages(_UNLIMITED_PAGES)
            return
        if not self._ballast.missing:
            self._ballast.release()
            log.error("%s: the disk is full; only as much is kept as the broker takes off; free some space", self._path)
        self.connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        (pages,) = self.connection.execute("PRAGMA page_count").fetchone()
        self._limit_pages(pages)

    def _limit_pages(self, pages: int) -> None:
        self.connection.execute(f"PRAGMA max_page_count = {pages}")

    def _heal(self, reason: str) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None
        if self._ballast.needed():
            self._ballast.release()
        _rescue(self._path, self._mark.value, reason)
        self._open()

    def _open(self) -> None:
        _swap_in_rescued(self._path)
        try:
            self._connection = self._connect()
        except _FILE_ERRORS as error:
            if self._ballast.needed():
                self._ballast.release()  # a full disk has no room for the log file that opening creates
            elif not _is_damage(error):
                raise
            if _is_damage(error):
                _rescue(self._path, self._mark.value, str(error))
            self._connection = self._connect()
        self._synchronous = ""
        self.newest = _last_seq(self._connection)

    def _connect(self) -> sqlite3.Connection:
        connection = _new_connection(_private(self._path))
        try:
            version = _refuse_foreign(connection, self._path, ours=self._mark.value > 0)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA wal_autocheckpoint = {_WAL_PAGES}")
            _migrate(connection, version)
            self._number_on(connection, is_new=version == 0)
        except BaseException:
            connection.close()
            raise
        return connection

    def _number_on(self, connection: sqlite3.Connection, *, is_new: bool) -> None:
        """Never use a number twice: the lock file outlives a database that was deleted, emptied or restored."""
        (newest,) = connection.execute("SELECT max(seq) FROM message").fetchone()
        known = max(_last_seq(connection), newest or 0)
        if known < self._mark.value - (0 if is_new else _SEQ_BLOCK):
            known = self._mark.value
            log.error("%s: lost or older than it was; numbering continues after %d", self._path, known)
        if known != _last_seq(connection):
            _continue_after(connection, known)


class _Mark:
    """The lock file: held for as long as the outbox is open, and its text is the highest sequence number in reserve."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(_beside(path, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise OutboxError(
                f"{path}: in use by another edge-asr; stop it, or give each its own outbox.path"
            ) from None
        text = os.pread(self._file, 32, 0).strip()
        self.value = int(text) if text.isdigit() else 0
        if not text:
            self._write(0)  # on a disk that fills up later, the file has its size already

    def reserve(self, seq: int) -> None:
        """Make sure that ``seq`` is remembered as used, whatever becomes of the database."""
        if seq > self.value:
            value = seq - 1 + _SEQ_BLOCK
            self._write(value)
            self.value = value

    def _write(self, value: int) -> None:
        os.pwrite(self._file, b"%20d\n" % value, 0)
        os.fdatasync(self._file)

    def close(self) -> None:
        os.close(self._file)


class _Ballast:
    """A file that is there to be deleted."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size
        self.missing = not path.exists()

    def release(self) -> None:
        self._path.unlink(missing_ok=True)
        self.missing = True

    def needed(self) -> bool:
        """Whether the disk is so full that this may be what SQLite complains about."""
        return not self.missing and self._free_bytes() < self._size

    def _free_bytes(self) -> int:
        space = os.statvfs(self._path.parent)
        return space.f_bavail * space.f_frsize

    def restore(self) -> bool:
        """Occupy the space again if there is plenty."""
        if not self.missing or self._free_bytes() < 2 * self._size:
            return False
        try:
            with self._path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self._size)
        except OSError:  # somebody else was quicker; there will be another time
            self._path.unlink(missing_ok=True)
            return False
        self.missing = False
        return True


def read_statistics(path: Path) -> Statistics:
    """The statistics of an outbox that another process may have open. Raises OutboxError.

    Read-only, so it can neither checkpoint nor reset the log (see the law above), and brief, because a checkpoint
    cannot pass a reader. Without a log nobody has the file open, and reading it as immutable leaves no files behind.
    """
    if not path.exists():
        raise OutboxError(f"{path}: there is no outbox yet; the daemon makes it when it first runs")
    live = _beside(path, "-wal").exists()
    with _told_of(path):
        connection = _new_connection(f"{path.resolve().as_uri()}?{'mode=ro' if live else 'immutable=1'}", uri=True)
        with contextlib.closing(connection):
            connection.execute("BEGIN")
            _refuse_foreign(connection, path)
            return _statistics(connection)


def _private(path: Path) -> str:
    """The path, after making sure of a file there that is not for everybody's eyes: it holds what was said."""
    os.close(os.open(path, os.O_CREAT | os.O_CLOEXEC, 0o640))
    return str(path)


def _new_connection(database: str, *, uri: bool = False) -> sqlite3.Connection:
    connection = sqlite3.connect(database, isolation_level=None, uri=uri, timeout=5.0)
    # A flipped bit must end at the checksum, not as an exception in the middle of a query.
    connection.text_factory = lambda text: text.decode(errors="replace")
    return connection


def _refuse_foreign(connection: sqlite3.Connection, path: Path, *, ours: bool = False) -> int:
    """The schema version. Raises OutboxError for another program's database or a newer program's outbox.

    Where the lock file says that the database is ``ours``, a wrong header is damage.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application != _APPLICATION_ID and (tables or version):
        if ours:
            raise sqlite3.DatabaseError("its header is spoilt")
        raise OutboxError(f"{path}: a database, but not an outbox; choose another outbox.path")
    if version > _SCHEMA_VERSION:
        raise OutboxError(
            f"{path}: written by a newer edge-asr (schema {version}, this one knows {_SCHEMA_VERSION}); "
            "install that one again or move the file away"
        )
    return int(version)


def _migrate(connection: sqlite3.Connection, found: int) -> None:
    """Bring the file from the version that was found to this program's."""
    for version in range(found + 1, _SCHEMA_VERSION + 1):
        script = importlib.resources.files("edge_asr").joinpath(f"schemas/outbox.{version}.sql").read_text("utf-8")
        connection.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {version}; COMMIT;")


def _last_seq(connection: sqlite3.Connection) -> int:
    row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'message'").fetchone()
    return int(row[0]) if row else 0


def _continue_after(connection: sqlite3.Connection, seq: int) -> None:
    connection.execute("DELETE FROM sqlite_sequence WHERE name = 'message'")
    connection.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('message', ?)", (seq,))


def _used_bytes(connection: sqlite3.Connection) -> int:
    pages, free, size = (
        connection.execute(f"PRAGMA {what}").fetchone()[0] for what in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)


def _statistics(connection: sqlite3.Connection) -> Statistics:
    ledger = {row[0]: row[1:] for row in connection.execute("SELECT category, waiting, dropped FROM ledger")}
    (damages,) = connection.execute("SELECT count(*) FROM damage").fetchone()
    oldest = connection.execute("SELECT boot_id, created_ns FROM message ORDER BY seq LIMIT 1").fetchone()
    age_s = None
    if oldest is not None:
        since_ns = oldest[1] if oldest[0] == clock.boot_id() else 0
        age_s = (clock.boottime_ns() - since_ns) / clock.NS_PER_S
    return Statistics(
        waiting={category: ledger[category][0] for category in get_args(Category)},
        dead_letters=ledger[DEAD_LETTER][0],
        dropped={group: ledger[group][1] for group in DROP_ORDER},
        bytes=_used_bytes(connection),
        oldest_age_s=age_s,
        last_seq=_last_seq(connection),
        damages=damages,
    )


def _encode(draft: Draft) -> str:
    """The draft's data as JSON. Raises ValueError for what JSON or UTF-8 cannot carry."""
    text = json.dumps(draft.data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text.encode()
    return text


def _checksum(row: Sequence[object]) -> int:
    """Over every column before the checksum itself."""
    return zlib.crc32("\x1f".join(map(str, row[:_CRC_AT])).encode(errors="replace"))


def _is_sound(row: Sequence[Any]) -> bool:
    return bool(_checksum(row) == row[_CRC_AT])


def _message(row: Sequence[Any]) -> Message:
    seq, message_id, boot_id, topic, category, data, *times = row[:_CRC_AT]
    return Message(seq, message_id, boot_id, topic, category, json.loads(data), *times)


def _is_damage(error: Exception) -> bool:
    """Whether the file is at fault, not its surroundings: our SQL is fixed, so it fails only where the file does."""
    if isinstance(error, sqlite3.OperationalError):
        return not any(surroundings in str(error) for surroundings in _SURROUNDINGS)
    # SQLITE_CORRUPT and SQLITE_NOTADB come as DatabaseError itself, what a bug of ours raises as its subclasses.
    return type(error) in {sqlite3.DatabaseError, sqlite3.IntegrityError, sqlite3.DataError, UnicodeDecodeError}


@contextlib.contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """Turn what SQLite and the file system raise into one clear line."""
    try:
        yield
    except (*_FILE_ERRORS, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        remedy = "check the folder's permissions and free space"
        raise OutboxError(f"{path}: the outbox cannot be used ({reason}); {remedy}") from None


# -- a damaged file: read what can be read into a new one, then exchange them


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _rescue(path: Path, highest_seq: int, reason: str) -> None:
    """Put a damaged file aside and continue with its readable messages in a new one.

    A kill in the middle loses nothing: the new file counts only once it is complete and named ``.rescued``, and from
    then on opening finishes the exchange.
    """
    kept_as = _free_name(path)
    unfinished = _beside(path, ".unfinished")
    unfinished.unlink(missing_ok=True)
    with contextlib.closing(_new_connection(_private(unfinished))) as target:
        _migrate(target, 0)
        target.execute("BEGIN")
        rescued = _copy_readable(path, target, highest_seq)
        _continue_after(target, highest_seq)
        target.execute("INSERT INTO damage VALUES (?, ?, ?)", (clock.wall_ns(), rescued, kept_as.name))
        target.execute("COMMIT")
    unfinished.rename(_beside(path, ".rescued"))
    _swap_in_rescued(path, kept_as)
    log.error(
        "%s was damaged (%s): %d messages rescued, numbering continues after %d, the damaged file is kept as %s",
        *(path, reason, rescued, highest_seq, kept_as.name),
    )


def _free_name(path: Path) -> Path:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    name, n = _beside(path, f".damaged-{stamp}"), 1
    while name.exists():
        n += 1
        name = _beside(path, f".damaged-{stamp}-{n}")
    return name


def _swap_in_rescued(path: Path, aside: Path | None = None) -> None:
    """Finish an exchange: the damaged file out of the way, its log first (it must never meet the new file)."""
    rescued = _beside(path, ".rescued")
    if not rescued.exists():
        return
    aside = aside or _free_name(path)
    for ending in ("-wal", "-shm", ""):
        with contextlib.suppress(FileNotFoundError):
            _beside(path, ending).rename(_beside(aside, ending))
    rescued.rename(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    for old in _damaged_files(path)[:-_KEPT_DAMAGED]:
        for ending in ("-wal", "-shm", ""):
            _beside(old, ending).unlink(missing_ok=True)


def _damaged_files(path: Path) -> list[Path]:
    """Oldest first."""
    found = (file for file in path.parent.glob(f"{path.name}.damaged-*") if not file.name.endswith(("-wal", "-shm")))
    return sorted(found, key=lambda file: file.stat().st_mtime_ns)


def _copy_readable(path: Path, target: sqlite3.Connection, highest_seq: int) -> int:
    """Copy what the damaged file still gives; the number of waiting messages that it gave."""
    insert_dead = "INSERT OR IGNORE INTO dead_letter VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
    rescued = 0
    with contextlib.closing(_new_connection(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as source:
        source.execute("PRAGMA writable_schema = ON")  # else SQLite refuses a file that was cut off altogether
        for row in _readable_rows(source, "message", _COLUMNS, highest_seq):
            target.execute(f"INSERT OR IGNORE {_INSERT}", row)
            rescued += 1
        for row in _readable_rows(source, "dead_letter", f"{_COLUMNS}, reason", highest_seq):
            target.execute(insert_dead, row)
        with contextlib.suppress(*_FILE_ERRORS):
            counted = source.execute("SELECT dropped, category FROM ledger").fetchall()
            target.executemany("UPDATE ledger SET dropped = ? WHERE category = ?", counted)
        with contextlib.suppress(*_FILE_ERRORS):
            target.executemany("INSERT INTO damage VALUES (?, ?, ?)", source.execute("SELECT * FROM damage").fetchall())
    return rescued


def _readable_rows(source: sqlite3.Connection, table: str, columns: str, highest_seq: int) -> Iterator[tuple[Any, ...]]:
    """Every row that can be read and whose checksum holds; what cannot be read is stepped over, number by number.

    Each number is also asked for by itself: Python steps ahead, so a scan that fails takes the row before it along.
    """
    scan = f"SELECT {columns} FROM {table} WHERE seq >= ? ORDER BY seq"  # noqa: S608 - our constants
    single = f"SELECT {columns} FROM {table} WHERE seq = ?"  # noqa: S608 - our constants
    due, failures = 1, 0
    while due <= highest_seq and failures < _SALVAGE_GIVES_UP_AFTER:
        began_at, failures = due, failures + 1
        for query in (scan, single):
            with contextlib.suppress(*_FILE_ERRORS):
                for row in source.execute(query, (due,)):
                    if row[_SEQ_AT] >= due:  # a damaged tree may run in circles
                        due, failures = row[_SEQ_AT] + 1, 0
                        if _is_sound(row):
                            yield row
                if query == scan:
                    return
        due = max(due, began_at + 1)
