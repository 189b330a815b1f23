"""The outbox's SQLite file: its schema, how damage shows, and how the readable part of a damaged one is rescued.

Law:

- Every row carries a checksum over its columns; a row whose checksum fails is not a message.
- A damaged file is never repaired in place: what is readable goes into a new one, then the two change places.
- A kill at any moment leaves the old file or the complete new one under the outbox's name.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import logging
import os
import shutil
import sqlite3
import time
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from edge_asr import clock
from edge_asr.whole_file import sync

log = logging.getLogger(__name__)

APPLICATION_ID = 0x45415352  # "EASR"

SCHEMA_VERSION = 4
"""``schemas/outbox.N.sql`` brings a file from version N - 1 to N."""

COLUMNS = "seq, id, boot_id, topic, category, data, created_wall_ns, created_ns, expires_ns, time_quality, crc"

INSERT = f"INTO message ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"

SEQ_AT, CRC_AT = 0, 10

FILE_ERRORS = (sqlite3.Error, UnicodeDecodeError)
"""What SQLite raises about a file: a spoilt name in the schema cannot even be put into a message."""

_SURROUNDINGS = ("full", "disk I/O", "unable to open", "locked", "readonly")
"""In the messages of SQLite errors that say nothing about the file's content."""

_KEPT_DAMAGED = 2
"""Damaged files kept for inspection; a dying disk must not fill itself with them."""

_SALVAGE_GIVES_UP_AFTER = 20_000
"""Sequence numbers unreadable in a row; one damaged inner page of the tree hides about 2,500."""


LOCK_S: Final = 2.0
"""How long another process's lock on the file is waited for; a batch that meets it is tried once as a whole and then
job by job, and the first of them must be answered before it looks like a disk that does not answer (``watchdog``)."""

WRITE_LOCK: Final = 120
"""Its byte in the file ``-shm`` (sqlite.org/walformat.html)."""


def private(path: Path) -> str:
    """The path, after making sure of a file there that is not for everybody's eyes: it holds what was said."""
    os.close(os.open(path, os.O_CREAT | os.O_CLOEXEC, 0o640))
    return str(path)


def connect(database: str, *, uri: bool = False) -> sqlite3.Connection:
    """Open a path, or a URI with options."""
    connection = sqlite3.connect(database, isolation_level=None, uri=uri, timeout=LOCK_S)
    # A flipped bit must end at the checksum, not as an exception in the middle of a query.
    connection.text_factory = lambda text: text.decode(errors="replace")
    return connection


def migrate(connection: sqlite3.Connection, found: int) -> None:
    """Bring the file from the version that was found to this program's."""
    for version in range(found + 1, SCHEMA_VERSION + 1):
        script = importlib.resources.files("edge_asr").joinpath(f"schemas/outbox.{version}.sql").read_text("utf-8")
        connection.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {version}; COMMIT;")


def last_seq(connection: sqlite3.Connection) -> int:
    """The highest number ever given to a message, by what the file remembers."""
    row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'message'").fetchone()
    return int(row[0]) if row else 0


def peek_last_seq(path: Path) -> int:
    """The same of a file that nobody has open; unlike one that may write, this look leaves a damaged log in place."""
    with contextlib.closing(connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
        return last_seq(connection)


def continue_after(connection: sqlite3.Connection, seq: int) -> None:
    """Give the next message the number after ``seq``."""
    connection.execute("DELETE FROM sqlite_sequence WHERE name = 'message'")
    connection.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('message', ?)", (seq,))


def used_bytes(connection: sqlite3.Connection) -> int:
    """What of the file is in use."""
    pages, free, size = (
        connection.execute(f"PRAGMA {what}").fetchone()[0] for what in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)


def checksum(row: Sequence[object]) -> int:
    """Over every column before the checksum itself."""
    return zlib.crc32("\x1f".join(map(str, row[:CRC_AT])).encode(errors="replace"))


def is_sound(row: Sequence[Any]) -> bool:
    """Whether the row is as it was written."""
    return bool(checksum(row) == row[CRC_AT])


def is_damage(error: Exception) -> bool:
    """Whether the file is at fault, not its surroundings: our SQL is fixed, so it fails only where the file does."""
    if isinstance(error, sqlite3.OperationalError):
        return not any(surroundings in str(error) for surroundings in _SURROUNDINGS)
    # SQLITE_CORRUPT and SQLITE_NOTADB come as DatabaseError itself, what a bug of ours raises as its subclasses.
    return type(error) in {sqlite3.DatabaseError, sqlite3.IntegrityError, sqlite3.DataError, UnicodeDecodeError}


def holder(file: Path, byte: int = 0) -> str:
    """Who has locked a byte of a file, as the beginning of a sentence."""
    try:
        inode = file.stat().st_ino  # SQLite's, opened here and closed again, would take its own locks along
        locks = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        locks = []
    for how, pid, place, first, last in (line.split()[3:] for line in locks if "->" not in line):
        covers = int(first) <= byte and (last == "EOF" or int(last) >= byte)
        if how == "WRITE" and covers and place.endswith(f":{inode}") and int(pid) > 0:
            with contextlib.suppress(OSError):  # it is gone, or hidden from us
                return f"process {pid} ({Path(f'/proc/{pid}/comm').read_text(errors='replace').strip()})"
            return f"process {pid}"
    return "another process"


def beside(path: Path, ending: str) -> Path:
    """A file that belongs to the outbox: same folder, same name, and an ending."""
    return path.with_name(path.name + ending)


_KEPT_COUNTS = (
    ("SELECT dropped, category FROM ledger", "UPDATE ledger SET dropped = ? WHERE category = ?"),
    (
        "SELECT refused, outdated, category FROM ledger",  # since version 4
        "UPDATE ledger SET refused = ?, outdated = ? WHERE category = ?",
    ),
    ("SELECT * FROM boot", "INSERT INTO boot VALUES (?, ?, ?)"),
    ("SELECT * FROM damage", "INSERT INTO damage VALUES (?, ?, ?)"),
    ("SELECT * FROM receipt", "INSERT OR REPLACE INTO receipt VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"),
    ("SELECT counted, verdict FROM receipt_ledger", "UPDATE receipt_ledger SET counted = ? WHERE verdict = ?"),
)
"""What a rescue takes along besides messages: how to read it, how to write it."""


def rescue(path: Path, highest_seq: int, reason: str) -> None:
    """Put a damaged file aside and continue with its readable messages in a new one.

    A kill in the middle loses nothing: the new file counts only once it is complete and named ``.rescued``, and from
    then on opening finishes the exchange.
    """
    kept_as = _free_name(path)
    unfinished = beside(path, ".unfinished")
    unfinished.unlink(missing_ok=True)
    with contextlib.closing(connect(private(unfinished))) as target:
        migrate(target, 0)
        roots = {root for (root,) in target.execute("SELECT rootpage FROM sqlite_master")}
        with _readable_schema(path, unfinished.read_bytes(), roots) as readable:
            target.execute("BEGIN")
            rescued = _copy_readable(readable, target, highest_seq)
        continue_after(target, highest_seq)
        target.execute("INSERT INTO damage VALUES (?, ?, ?)", (clock.wall_ns(), rescued, kept_as.name))
        target.execute("COMMIT")
    unfinished.rename(beside(path, ".rescued"))
    swap_in_rescued(path, kept_as)
    log.error(
        "%s was damaged (%s): %d messages rescued, numbering continues after %d, the damaged file is kept as %s",
        *(path, reason, rescued, highest_seq, kept_as.name),
    )


def _free_name(path: Path) -> Path:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    name, n = beside(path, f".damaged-{stamp}"), 1
    while name.exists():
        n += 1
        name = beside(path, f".damaged-{stamp}-{n}")
    return name


def swap_in_rescued(path: Path, aside: Path | None = None) -> None:
    """Finish an exchange: the damaged file out of the way, its log first (it must never meet the new file)."""
    rescued = beside(path, ".rescued")
    if not rescued.exists():
        return
    aside = aside or _free_name(path)
    for ending in ("-wal", "-shm", ""):
        with contextlib.suppress(FileNotFoundError):
            beside(path, ending).rename(beside(aside, ending))
    rescued.rename(path)
    sync(path.parent)
    for old in _damaged_files(path)[:-_KEPT_DAMAGED]:
        for ending in ("-wal", "-shm", ""):
            beside(old, ending).unlink(missing_ok=True)


def _damaged_files(path: Path) -> list[Path]:
    """Oldest first."""
    found = (file for file in path.parent.glob(f"{path.name}.damaged-*") if not file.name.endswith(("-wal", "-shm")))
    return sorted(found, key=lambda file: file.stat().st_mtime_ns)


_PAGE_BYTES, _HEADER_BYTES = 4096, 100


@contextlib.contextmanager
def _readable_schema(path: Path, fresh: bytes, roots: Collection[int]) -> Iterator[Path]:
    """The damaged file, or a copy in which the pages that name its tables are those of a new file.

    ``roots``: the pages of the new file that hold the tables themselves.

    Without these pages, beyond the first, SQLite finds no table at all. A file that this version made has them where a
    new one has them, and the same first page but for the header; of any other file nothing is replaced.
    """
    with contextlib.closing(connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as source:
        try:
            source.execute("SELECT sql FROM sqlite_master").fetchall()
            sound = True
        except FILE_ERRORS:
            sound = False
    with path.open("rb") as file:
        same = file.read(_PAGE_BYTES)[_HEADER_BYTES:] == fresh[_HEADER_BYTES:_PAGE_BYTES]
    if sound or not same:
        yield path
        return
    copy = beside(path, ".readable")
    try:
        for ending in ("", "-wal"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(beside(path, ending), private(beside(copy, ending)))
        with copy.open("r+b") as file:
            for page in set(range(2, len(fresh) // _PAGE_BYTES + 1)).difference(roots):
                start = (page - 1) * _PAGE_BYTES
                file.seek(start)
                file.write(fresh[start : start + _PAGE_BYTES])
        yield copy
    finally:
        for ending in ("", "-wal", "-shm"):
            beside(copy, ending).unlink(missing_ok=True)


def _copy_readable(path: Path, target: sqlite3.Connection, highest_seq: int) -> int:
    """Copy what the damaged file still gives; the number of waiting messages that it gave."""
    insert_dead = "INSERT OR IGNORE INTO dead_letter VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
    rescued = 0
    with contextlib.closing(connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as source:
        source.execute("PRAGMA writable_schema = ON")  # else SQLite refuses a file that was cut off altogether
        for row in _readable_rows(source, "message", COLUMNS, highest_seq):
            target.execute(f"INSERT OR IGNORE {INSERT}", row)
            rescued += 1
        for row in _readable_rows(source, "dead_letter", f"{COLUMNS}, reason", highest_seq):
            target.execute(insert_dead, row)
        for query, change in _KEPT_COUNTS:
            with contextlib.suppress(*FILE_ERRORS):
                target.executemany(change, source.execute(query).fetchall())
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
            with contextlib.suppress(*FILE_ERRORS):
                for row in source.execute(query, (due,)):
                    if row[SEQ_AT] >= due:  # a damaged tree may run in circles
                        due, failures = row[SEQ_AT] + 1, 0
                        if is_sound(row):
                            yield row
                if query == scan:
                    return
        due = max(due, began_at + 1)
