"""Decides what the outbox gives up: when it is full, when a class of messages is, and when one is older than it may be.

Law:

- When the outbox is full the oldest transcripts go first, then rejections, then alarms, and commands last; of a class
  its dead letters before what the broker may still take. A class that is full by its own limit loses only of its own.
- Nothing goes early: an age is what the box was seen to run since the commit. Within a boot that is a difference of
  CLOCK_BOOTTIME readings; boots are added up as far as they were seen, and the time between them counts as nothing. The
  wall clock is not asked: a step of it, or one that was never set, neither deletes nor keeps a message.
- Every message that goes is counted under its class and the cause.

All of it happens inside a transaction of the outbox's.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from edge_asr import clock, outbox_file
from edge_asr.events import Category

DROP_ORDER: Final[tuple[Category, ...]] = ("transcript", "rejection", "alarm", "command")

ROW_BYTES: Final = 250
"""What a message takes in the file besides its data: ids, topic, times and index entry, rounded up."""

_SPLIT_BYTES: Final = 3 * 4096
"""Pages that an insertion may add to tree and index by splitting them."""

_TABLES: Final = ("dead_letter", "message")

_AT_ONCE: Final = 1000
"""Most messages that one look takes for their age, so that nobody waits long for the outbox."""

_BOOTS_KEPT: Final = 1000


@dataclass(frozen=True, slots=True)
class Limits:
    """What one class may be; None: whatever fits under the outbox's own limit."""

    max_bytes: int | None = None
    max_age_s: float | None = None


class Retention:
    """The limits of one outbox."""

    def __init__(self, max_bytes: int, limits: Mapping[Category, Limits]) -> None:
        self._max_bytes = max_bytes
        self._limits = limits

    def make_room(self, connection: sqlite3.Connection, needed: Mapping[Category, int]) -> None:
        """Drop messages until so many bytes of each class fit, :data:`ROW_BYTES` of each row included.

        Raises ValueError where they could not, nothing having been dropped.
        """
        total = sum(needed.values()) + _SPLIT_BYTES
        if total > self._max_bytes // 2:
            raise ValueError(f"{total} bytes in one piece do not fit")
        for category, size in needed.items():
            limit = self._limits.get(category, Limits()).max_bytes
            while limit is not None and _bytes_of(connection, category) + size > limit:
                if not _drop_oldest(connection, category):
                    break
        while outbox_file.used_bytes(connection) + total > self._max_bytes:
            if not any(_drop_oldest(connection, category) for category in DROP_ORDER):
                break

    def drop_outdated(self, connection: sqlite3.Connection) -> int:
        """Note that this boot lasts, then drop what is too old, a thousand at most; how many went."""
        now_ns = clock.boottime_ns()
        note_running(connection, now_ns)
        reached_ns = dict(_reached_ns(connection, now_ns))
        dropped = 0
        for category, limits in self._limits.items():
            for table in _TABLES if limits.max_age_s is not None else ():
                oldest = _oldest(connection, table, category, reached_ns, _AT_ONCE - dropped)
                limit_ns = round((limits.max_age_s or 0) * clock.NS_PER_S)
                for seq in [seq for seq, age_ns in oldest if age_ns > limit_ns]:
                    _drop(connection, table, category, seq, "outdated")
                    dropped += 1
        return dropped


def _oldest(
    connection: sqlite3.Connection, table: str, category: str, reached_ns: Mapping[str, int], most: int
) -> list[tuple[int, int]]:
    """Sequence numbers and ages, the oldest first."""
    # Of a boot that nobody knows any more only what came after it is sure.
    known_ns = max(reached_ns.values(), default=0)
    query = f"SELECT seq, boot_id, created_ns FROM {table} WHERE category = ? ORDER BY seq LIMIT ?"  # noqa: S608 - ours
    rows = connection.execute(query, (category, most)).fetchall()
    return [(seq, reached_ns.get(boot_id, known_ns + created_ns) - created_ns) for seq, boot_id, created_ns in rows]


def note_boot(connection: sqlite3.Connection) -> None:
    """Let this boot be the newest of those whose time counts."""
    row = (clock.boot_id(), clock.boottime_ns())
    connection.execute("INSERT OR IGNORE INTO boot (boot_id, seen_ns) VALUES (?, ?)", row)
    connection.execute("DELETE FROM boot WHERE number <= (SELECT max(number) FROM boot) - ?", (_BOOTS_KEPT,))


def note_running(connection: sqlite3.Connection, now_ns: int) -> None:
    """Let this boot count up to now."""
    connection.execute("UPDATE boot SET seen_ns = ? WHERE boot_id = ?", (now_ns, clock.boot_id()))


def _reached_ns(connection: sqlite3.Connection, now_ns: int) -> Iterator[tuple[str, int]]:
    """For each known boot what its clock would show now, had it gone on whenever the box was seen to run."""
    since_ns = 0
    for boot_id, seen_ns in connection.execute("SELECT boot_id, seen_ns FROM boot ORDER BY number DESC").fetchall():
        lasted_ns = now_ns if boot_id == clock.boot_id() else seen_ns
        since_ns += lasted_ns
        yield boot_id, since_ns


def _bytes_of(connection: sqlite3.Connection, category: str) -> int:
    (found,) = connection.execute("SELECT bytes FROM ledger WHERE category = ?", (category,)).fetchone()
    return int(found)


def _drop_oldest(connection: sqlite3.Connection, category: str) -> bool:
    for table in _TABLES:
        query = f"SELECT seq FROM {table} WHERE category = ? ORDER BY seq LIMIT 1"  # noqa: S608 - ours
        oldest = connection.execute(query, (category,)).fetchone()
        if oldest:
            _drop(connection, table, category, oldest[0], "dropped")
            return True
    return False


def _drop(connection: sqlite3.Connection, table: str, category: str, seq: int, cause: str) -> None:
    connection.execute(f"DELETE FROM {table} WHERE seq = ?", (seq,))  # noqa: S608 - ours
    connection.execute(f"UPDATE ledger SET {cause} = {cause} + 1 WHERE category = ?", (category,))  # noqa: S608 - ours
