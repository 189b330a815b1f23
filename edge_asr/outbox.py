"""The durable queue between the microphone and the broker: what it has accepted outlives SIGKILL and power loss.

Law:

- ``append`` returns after the disk commit (WAL, synchronous=FULL); the drafts of one call are committed together.
- ``seq`` grows by one per message and is never used twice, not even after the file was damaged or deleted.
- Only a broker's acknowledgement, its final refusal or ``retention`` removes a message; every drop is counted durably.
- A command's age is a difference of CLOCK_BOOTTIME readings of one boot; after a reboot its life is over.

One thread owns the one connection. SQLite 3.7.0 to 3.51.2 can lose committed writes when two connections write or
checkpoint at the same instant (sqlite.org/wal.html#walresetbug), so a second process is refused by a lock file, and
:func:`read_statistics` opens the file read-only: such a connection neither writes nor checkpoints.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import logging
import queue
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Generic, TypeVar

from edge_asr import clock, ledger, outbox_file, retention
from edge_asr.events import Category, Draft, Message, Verdict, new_id
from edge_asr.ledger import Statistics
from edge_asr.reserve import BALLAST_BYTES, SEQ_BLOCK, Ballast, Mark
from edge_asr.retention import Limits, Retention

log = logging.getLogger(__name__)

T = TypeVar("T")

UNLIMITED: Final[Mapping[Category, Limits]] = MappingProxyType({})
"""No class has limits of its own."""

_WAL_PAGES = 256
"""Checkpoint every 1 MiB: small beside the ballast, which must hold what a checkpoint adds to the file."""

_LEAST_LIFE_NS = 2 * clock.NS_PER_S
"""A command acknowledged with less life left than this may have gone out as expired already (contract.MIN_LIFE_S)."""

CLOSE_LIMIT_S: Final = 5.0
"""A stop has 15 s (TimeoutStopSec=), of which the last words may take five, and the watchdog ten."""

_BATCH = 256
"""Most jobs in one transaction; more would make the first caller wait for the last."""

_UNLIMITED_PAGES = 2**30 - 1
"""SQLite's own default of max_page_count."""

_SELECT = f"SELECT {outbox_file.COLUMNS}"
_PARK = f"INTO dead_letter ({outbox_file.COLUMNS}, reason) {_SELECT}, ? FROM message WHERE seq = ?"
_DATA_AT = 5


class OutboxError(Exception):
    """The outbox cannot do what was asked; the message is one line that names the file and the remedy."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that the broker refused for good, or that the disk has changed."""

    message: Message
    reason: str


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

    def __init__(
        self,
        path: Path,
        max_bytes: int,
        *,
        limits: Mapping[Category, Limits] = UNLIMITED,
        ballast_bytes: int = BALLAST_BYTES,
    ) -> None:
        """Open or create ``path``. Raises OutboxError."""
        self._path = path
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._last_seq = 0
        self._waiters: list[concurrent.futures.Future[None]] = []
        self._owed: set[concurrent.futures.Future[Any]] = set()
        self._since_ns = 0
        self._database: _Database | None = None
        opened: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(
            target=self._work,
            args=(path, Retention(max_bytes, limits), ballast_bytes, opened),
            name="outbox-writer",
            daemon=True,
        )
        self._thread.start()
        opened.result()

    @property
    def last_seq(self) -> int:
        """The newest committed sequence number."""
        return self._last_seq

    @property
    def unanswered_s(self) -> float:
        """For how long the writer thread has answered nobody of those who wait for it; a suspend does not count."""
        return (time.monotonic_ns() - self._since_ns) / clock.NS_PER_S if self._owed else 0.0

    @property
    def is_stuck(self) -> bool:
        """Whether the writer thread is dead, held by a debugger or asleep over a lock of this process.

        What else it may wait for comes to an end, or no restart ends it: a disk, a file system in user space, or
        another process's lock on the file, for which SQLite sleeps and looks again.
        """
        if not self._thread.is_alive():
            return True
        try:
            waits_in = Path(f"/proc/self/task/{self._thread.native_id}/wchan").read_text(encoding="ascii")
        except OSError:  # a kernel that does not tell; no memory, no descriptor
            return False
        return waits_in.startswith(("futex", "ptrace_stop"))

    @property
    def mending(self) -> bool:
        """Whether it carries what is readable over from a damaged file, which takes as long as the file is large."""
        return self._database is not None and self._database.mending

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

    async def put_aside(self, seq: int, reason: str) -> None:
        """Make a dead letter of a message that still waits. Raises OutboxError."""
        await self._submit(lambda database: database.put_aside(seq, reason))

    async def receive_receipt(self, command_id: str, verdict: Verdict, reason: str) -> bool:
        """Keep with a command what the MES did with it; False: it is none of the last thousand. Raises OutboxError."""
        return await self._submit(lambda database: database.receive_receipt(command_id, verdict, reason), durable=True)

    async def miss_receipts(self, within_s: float) -> list[str]:
        """The ids of commands delivered so long ago without a receipt, each once. Raises OutboxError."""
        return await self._submit(lambda database: database.miss_receipts(within_s))

    async def drop_outdated(self) -> int:
        """Drop what is older than its class may be; to be called now and then. How many went. Raises OutboxError."""
        return await self._submit(lambda database: database.drop_outdated())

    async def note_broker(self, address: str) -> None:
        """Remember which broker takes the messages, for whoever asks; empty: none. Raises OutboxError."""
        await self._submit(lambda database: database.note_broker(address))

    async def note_refusal(self, reason: str) -> None:
        """Remember why the broker takes nothing, for whoever asks; empty: it takes something. Raises OutboxError."""
        await self._submit(lambda database: database.note_refusal(reason))

    async def requeue(self, seqs: Sequence[int]) -> list[int]:
        """Let dead letters wait for the broker again under their old number and id, before the publisher begins.

        Which of them do; the others are no dead letters, or their checksum is wrong. Raises OutboxError.
        """
        return await self._submit(lambda database: database.requeue(seqs), durable=True)

    async def discard(self, seqs: Sequence[int]) -> list[int]:
        """Forget dead letters; which of them there were. Raises OutboxError."""
        return await self._submit(lambda database: database.discard(seqs), durable=True)

    async def prove(self) -> None:
        """Commit how long the box has run, so that a disk which does not answer shows. Raises OutboxError."""
        await self._submit(lambda database: database.prove(), durable=True)

    async def statistics(self) -> Statistics:
        """What waits, and what was dropped."""
        return await self._submit(lambda database: ledger.read(database.connection))

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
        """Finish what is queued and let go of the file; may be called from any thread, and twice.

        A disk that does not answer is left alone: what was committed is safe, and nobody waits for the rest.
        """
        with self._lock:
            first, self._closed = not self._closed, True
            if first:
                self._jobs.put(None)
        self._thread.join(CLOSE_LIMIT_S)
        if self._thread.is_alive():
            log.error("%s: its disk does not answer; nobody waits for it any more", self._path)
        self._wake()

    async def _submit(self, work: Callable[[_Database], T], *, durable: bool = False) -> T:
        job = _Job(work, durable=durable)
        with self._lock:
            if self._closed:
                raise OutboxError(f"{self._path}: the outbox is closed")
            if not self._owed:
                self._since_ns = time.monotonic_ns()
            self._owed.add(job.future)
            job.future.add_done_callback(self._settle)
            self._jobs.put(job)
        return await asyncio.wrap_future(job.future)

    def _settle(self, future: concurrent.futures.Future[Any]) -> None:
        self._owed.discard(future)
        if not future.cancelled():
            self._since_ns = time.monotonic_ns()

    def _work(self, path: Path, kept: Retention, ballast_bytes: int, opened: concurrent.futures.Future[None]) -> None:
        """The writer thread."""
        try:
            database = _Database(path, kept, ballast_bytes)
        except BaseException as error:  # noqa: BLE001 - the constructor raises it to its caller
            opened.set_exception(error)
            return
        self._database, self._last_seq = database, database.newest
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
            database.note_newest()
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

    def __init__(self, path: Path, kept: Retention, ballast_bytes: int) -> None:
        self._path = path
        self._kept = kept
        self._ballast = Ballast(outbox_file.beside(path, ".ballast"), ballast_bytes)
        self._connection: sqlite3.Connection | None = None
        self._synchronous = ""
        self.mending = False
        self.newest = 0
        with _told_of(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._mark = Mark(path)
            except BlockingIOError:
                user = outbox_file.holder(outbox_file.beside(path, ".lock"))
                raise OutboxError(f"{path}: in use by {user}; stop it, or give each its own outbox.path") from None
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

    def note_newest(self) -> None:
        """Remember outside the file how far it goes."""
        self._mark.note(self.newest)

    def transact(self, works: Sequence[Callable[[_Database], Any]], *, durable: bool) -> list[Any]:
        """Run the works in one transaction, mending what can be mended on the way. Raises OutboxError."""
        with _told_of(self._path):
            try:
                results = self._transact(works, durable=durable)
            except outbox_file.FILE_ERRORS as error:
                if outbox_file.is_damage(error):
                    self.mending = True
                    try:
                        self._heal(str(error))
                    finally:
                        self.mending = False
                elif "full" in str(error) or self._ballast.needed():
                    self._make_do_without_disk()
                else:
                    raise
                results = self._transact(works, durable=durable)
        self._restore_ballast()
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
        needed: Counter[Category] = Counter()
        for draft, text in zip(drafts, texts, strict=True):
            needed[draft.category] += len(text.encode()) + retention.ROW_BYTES
        try:
            self._kept.make_room(self.connection, needed)
        except ValueError as error:
            raise OutboxError(f"{self._path}: {error}; raise outbox.max_bytes") from None
        return tuple(map(self._insert, drafts, texts))

    def _insert(self, draft: Draft, text: str) -> Message:
        new = (self.newest + 1, draft.id or new_id(), clock.boot_id(), draft.topic, draft.category)
        times = (clock.wall_ns(), clock.boottime_ns(), draft.expires_ns, clock.time_quality())
        row = (*new, text, *times)
        self._mark.reserve(self.newest + 1)
        self.connection.execute(f"INSERT {outbox_file.INSERT}", (*row, outbox_file.checksum(row)))
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
            self._require_reachable([row[outbox_file.SEQ_AT] for row in rows])
            spoilt = [row[outbox_file.SEQ_AT] for row in rows if not outbox_file.is_sound(row)]
            for seq in spoilt:
                self.put_aside(seq, "its checksum is wrong: the disk changed it")
            if not rows or len(spoilt) < len(rows):
                return [_message(row) for row in rows if row[outbox_file.SEQ_AT] not in spoilt]

    def _require_reachable(self, seqs: Sequence[int]) -> None:
        """A row that a scan finds and its number does not could never be deleted and would be sent for ever."""
        listed = ",".join(map(str, seqs))
        (found,) = self.connection.execute(f"SELECT count(*) FROM message WHERE seq IN ({listed})").fetchone()  # noqa: S608
        if found != len(seqs):
            raise sqlite3.DatabaseError("the tree of messages is out of order")

    def acknowledge(self, seqs: Sequence[int]) -> None:
        self.connection.executemany("DELETE FROM message WHERE seq = ?", ((seq,) for seq in seqs))
        now_ns = clock.boottime_ns()
        live = (now_ns + _LEAST_LIFE_NS, clock.boot_id())
        self.connection.executemany(
            "UPDATE receipt SET delivered_ns = ? WHERE seq = ? AND expires_ns > ? AND boot_id = ?",
            ((now_ns, seq, *live) for seq in seqs),
        )

    def receive_receipt(self, command_id: str, verdict: str, reason: str) -> bool:
        change = "UPDATE receipt SET verdict = ?, reason = ?, at_wall_ns = ? WHERE id = ?"
        return self.connection.execute(change, (verdict, reason, clock.wall_ns(), command_id)).rowcount == 1

    def miss_receipts(self, within_s: float) -> list[str]:
        waiting = "delivered_ns IS NOT NULL AND verdict IS NULL AND NOT missed"
        # What another boot delivered has waited for at least as long as this boot lasts.
        overdue = f"{waiting} AND (CASE boot_id WHEN ? THEN delivered_ns ELSE 0 END) <= ?"
        values = (clock.boot_id(), clock.boottime_ns() - round(within_s * clock.NS_PER_S))
        found = self.connection.execute(f"SELECT id FROM receipt WHERE {overdue}", values).fetchall()  # noqa: S608
        self.connection.execute(f"UPDATE receipt SET missed = 1 WHERE {overdue}", values)  # noqa: S608
        return [row[0] for row in found]

    def prove(self) -> None:
        retention.note_running(self.connection, clock.boottime_ns())  # SQLite writes nothing where nothing changes

    def put_aside(self, seq: int, reason: str) -> None:
        if self.connection.execute(f"INSERT {_PARK}", (reason, seq)).rowcount:
            category = "(SELECT category FROM message WHERE seq = ?)"
            self.connection.execute(f"UPDATE ledger SET refused = refused + 1 WHERE category = {category}", (seq,))  # noqa: S608
            self.connection.execute("DELETE FROM message WHERE seq = ?", (seq,))
            log.error("message %d is put aside as a dead letter: %s", seq, reason)

    def requeue(self, seqs: Sequence[int]) -> list[int]:
        sound = []
        for seq in seqs:
            row = self.connection.execute(f"{_SELECT} FROM dead_letter WHERE seq = ?", (seq,)).fetchone()
            if row is not None and outbox_file.is_sound(row):
                self.connection.execute(f"INSERT {outbox_file.INSERT}", row)
                sound.append(seq)
        return self.discard(sound)

    def discard(self, seqs: Sequence[int]) -> list[int]:
        forget = "DELETE FROM dead_letter WHERE seq = ?"
        return [seq for seq in seqs if self.connection.execute(forget, (seq,)).rowcount]

    def drop_outdated(self) -> int:
        return self._kept.drop_outdated(self.connection)

    def note_broker(self, address: str) -> None:
        change = "UPDATE broker SET address = ?, since_wall_ns = ? WHERE address != ?"
        self.connection.execute(change, (address, clock.wall_ns(), address))

    def note_refusal(self, reason: str) -> None:
        self.connection.execute("UPDATE broker SET refusal = ? WHERE refusal != ?", (reason, reason))

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

    def _restore_ballast(self) -> None:
        """What fails here comes after a commit and must not look like its failure; after the next it is tried again."""
        try:
            if self._ballast.missing and self._ballast.restore():
                self._limit_pages(_UNLIMITED_PAGES)
        except (*outbox_file.FILE_ERRORS, OSError) as error:
            self._ballast.missing = True
            log.warning("%s: the space held back cannot be restored yet: %s", self._path, error)

    def _limit_pages(self, pages: int) -> None:
        self.connection.execute(f"PRAGMA max_page_count = {pages}")

    def _heal(self, reason: str) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None
        if self._ballast.needed():
            self._ballast.release()
        outbox_file.rescue(self._path, self._mark.value, reason)
        self._open()

    def _open(self) -> None:
        outbox_file.swap_in_rescued(self._path)
        try:
            self._require_all()
            self._connection = self._connect()
        except outbox_file.FILE_ERRORS as error:
            if self._ballast.needed():
                self._ballast.release()  # a full disk has no room for the log file that opening creates
            elif not outbox_file.is_damage(error):
                raise
            if outbox_file.is_damage(error):
                outbox_file.rescue(self._path, self._mark.value, str(error))
            self._connection = self._connect()
        self._synchronous = ""
        self.newest = outbox_file.last_seq(self._connection)

    def _require_all(self) -> None:
        """SQLite takes a log up to its first spoilt byte and drops the commits behind it without a word."""
        if self._mark.committed and self._path.exists() and self._path.stat().st_size:
            found = outbox_file.peek_last_seq(self._path)
            if found < self._mark.committed:
                raise sqlite3.DatabaseError(f"it ends at {found}, and {self._mark.committed} was committed")

    def _connect(self) -> sqlite3.Connection:
        connection = outbox_file.connect(outbox_file.private(self._path))
        try:
            version = _refuse_foreign(connection, self._path, ours=self._mark.value > 0)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA wal_autocheckpoint = {_WAL_PAGES}")
            outbox_file.migrate(connection, version)
            self._number_on(connection, is_new=version == 0)
            retention.note_boot(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _number_on(self, connection: sqlite3.Connection, *, is_new: bool) -> None:
        """Never use a number twice: the lock file outlives a database that was deleted, emptied or restored."""
        (newest,) = connection.execute("SELECT max(seq) FROM message").fetchone()
        known = max(outbox_file.last_seq(connection), newest or 0)
        if known < self._mark.value - (0 if is_new else SEQ_BLOCK):
            known = self._mark.value
            log.error("%s: lost or older than it was; numbering continues after %d", self._path, known)
            connection.execute("INSERT INTO damage VALUES (?, 0, '')", (clock.wall_ns(),))
        if known != outbox_file.last_seq(connection):
            outbox_file.continue_after(connection, known)


def read_statistics(path: Path) -> Statistics:
    """The statistics of an outbox that another process may have open. Raises OutboxError."""
    with _reading(path) as connection:
        return ledger.read(connection)


def read_dead_letters(path: Path) -> list[DeadLetter]:
    """The dead letters, oldest first, of an outbox that another process may have open. Raises OutboxError."""
    with _reading(path) as connection:
        rows = connection.execute(f"{_SELECT}, reason FROM dead_letter ORDER BY seq").fetchall()
    # What the disk has changed may be no JSON any more.
    legible = (row if outbox_file.is_sound(row) else (*row[:_DATA_AT], "{}", *row[_DATA_AT + 1 :]) for row in rows)
    return [DeadLetter(_message(row[:-1]), row[-1]) for row in legible]


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A read transaction.

    Read-only, so it can neither checkpoint nor reset the log (see the law above), and brief, because a checkpoint
    cannot pass a reader. Without a log nobody has the file open, and reading it as immutable leaves no files behind.
    """
    if not path.exists():
        raise OutboxError(f"{path}: there is no outbox yet; the daemon makes it when it first runs")
    live = outbox_file.beside(path, "-wal").exists()
    with _told_of(path):
        connection = outbox_file.connect(f"{path.resolve().as_uri()}?{'mode=ro' if live else 'immutable=1'}", uri=True)
        with contextlib.closing(connection):
            connection.execute("BEGIN")
            _refuse_foreign(connection, path)
            yield connection


def _refuse_foreign(connection: sqlite3.Connection, path: Path, *, ours: bool = False) -> int:
    """The schema version. Raises OutboxError for another program's database or a newer program's outbox.

    Where the lock file says that the database is ``ours``, a wrong header is damage.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application != outbox_file.APPLICATION_ID and (tables or version):
        if ours:
            raise sqlite3.DatabaseError("its header is spoilt")
        raise OutboxError(f"{path}: a database, but not an outbox; choose another outbox.path")
    if version > outbox_file.SCHEMA_VERSION:
        raise OutboxError(
            f"{path}: written by a newer edge-asr (schema {version}, this one knows {outbox_file.SCHEMA_VERSION}); "
            "install that one again or move the file away"
        )
    return int(version)


def _encode(draft: Draft) -> str:
    """The draft's data as JSON. Raises ValueError for what JSON or UTF-8 cannot carry."""
    text = json.dumps(draft.data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text.encode()
    return text


def _message(row: Sequence[Any]) -> Message:
    seq, message_id, boot_id, topic, category, data, *times = row[: outbox_file.CRC_AT]
    return Message(seq, message_id, boot_id, topic, category, json.loads(data), *times)


@contextlib.contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """Turn what SQLite and the file system raise into one clear line."""
    try:
        yield
    except (*outbox_file.FILE_ERRORS, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        remedy = "check the folder's permissions and free space"
        if "locked" in reason:
            user = outbox_file.holder(outbox_file.beside(path, "-shm"), outbox_file.WRITE_LOCK)
            reason, remedy = f"{user} holds its file", "let that finish, or stop it"
        raise OutboxError(f"{path}: the outbox cannot be used ({reason}); {remedy}") from None
