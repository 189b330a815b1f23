"""What the outbox says of itself: what waits and how long, and every message that was given up, by class and cause."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, get_args

from edge_asr import clock, outbox_file
from edge_asr.events import Category

CATEGORIES: Final[tuple[Category, ...]] = get_args(Category)


@dataclass(frozen=True, slots=True)
class Statistics:
    """What waits, how long, and what was given up. Counts run since the outbox was made."""

    waiting: Mapping[Category, int]
    """Messages not yet acknowledged by the broker."""
    dead_letters: int
    """Messages the broker refused for good that are still kept."""
    refused: Mapping[Category, int]
    """Messages that ever became dead letters."""
    dropped: Mapping[Category, int]
    """Messages removed undelivered because the outbox or their class was full, dead letters included."""
    outdated: Mapping[Category, int]
    """Messages removed undelivered because they were older than their class may be, dead letters included."""
    class_bytes: Mapping[Category, int]
    """What the messages of each class take, dead letters included."""
    bytes: int
    """In use in the file; what was deleted is used again, so the file itself keeps its greatest size."""
    oldest_age_s: float | None
    """Age of the oldest waiting message; counted from this boot for one that is older than it. None: nothing waits."""
    last_seq: int
    damages: int
    """Times a damaged file was put aside and its readable messages rescued."""
    broker: str
    """Host and port of the broker that takes the messages; empty: none does."""
    broker_since: str
    """Since when it does or none does, by the wall clock (ISO 8601); empty: none ever did."""
    refusal: str
    """Why the broker takes nothing although it is there, and the remedy; empty: nothing is known against it."""
    receipts: Mapping[str, int]
    """Commands that the MES ``accepted`` or ``rejected``, and those whose receipt was ``missing`` when it was due."""


def read(connection: sqlite3.Connection) -> Statistics:
    """The statistics of an outbox of this program's version, or, read only, of an older one."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (damages,) = connection.execute("SELECT count(*) FROM damage").fetchone()
    (dead_letters,) = connection.execute("SELECT count(*) FROM dead_letter").fetchone()
    broker, since_wall_ns = ("", 0)
    if version >= 3:
        broker, since_wall_ns = connection.execute("SELECT address, since_wall_ns FROM broker").fetchone()
    (refusal,) = connection.execute("SELECT refusal FROM broker").fetchone() if version >= 4 else ("",)
    receipts = dict.fromkeys(("accepted", "rejected", "missing"), 0)
    if version >= 2:
        receipts = dict(connection.execute("SELECT verdict, counted FROM receipt_ledger"))
    return Statistics(
        waiting=_column(connection, "waiting"),
        dead_letters=dead_letters,
        refused=_column(connection, "refused"),
        dropped=_column(connection, "dropped"),
        outdated=_column(connection, "outdated"),
        class_bytes=_column(connection, "bytes"),
        bytes=outbox_file.used_bytes(connection),
        oldest_age_s=_oldest_age_s(connection),
        last_seq=outbox_file.last_seq(connection),
        damages=damages,
        broker=broker,
        broker_since=clock.iso(since_wall_ns) if since_wall_ns else "",
        refusal=refusal,
        receipts=receipts,
    )


def _column(connection: sqlite3.Connection, name: str) -> dict[Category, int]:
    known = {row[1] for row in connection.execute("PRAGMA table_info(ledger)")}
    if name not in known:  # an older outbox, whose daemon has not been replaced yet
        return dict.fromkeys(CATEGORIES, 0)
    counted = dict(connection.execute(f"SELECT category, {name} FROM ledger"))  # noqa: S608 - ours
    return {category: counted[category] for category in CATEGORIES}


def _oldest_age_s(connection: sqlite3.Connection) -> float | None:
    oldest = connection.execute("SELECT boot_id, created_ns FROM message ORDER BY seq LIMIT 1").fetchone()
    if oldest is None:
        return None
    since_ns = oldest[1] if oldest[0] == clock.boot_id() else 0
    return (clock.boottime_ns() - since_ns) / clock.NS_PER_S
