"""What the rig says: its tables in Markdown, and the machine and command they belong to."""

from __future__ import annotations

import datetime as dt
import os
import platform
import shutil
import sqlite3
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.faults.books import Account

COLUMNS = ("kills", "committed", "lost", "reordered", "duplicates", "stale")
NOTED = ("expired", "foreign", "expired_at_broker", "forgotten", "unreadable", "late_from_broker")
"""Shown after the table's row where they are not 0."""

HEAD = f"| scenario | {' | '.join(COLUMNS)} | notes |\n|---|{'---:|' * len(COLUMNS)}---|"

BEGIN, END = "<!-- written by tools/faults -->", "<!-- end of what tools/faults wrote -->"


def row(account: Account) -> str:
    """One line of the table."""
    if account.skipped:
        return f"| {account.scenario} |" + " - |" * len(COLUMNS) + f" skipped: {account.skipped} |"
    numbers = account.asdict()
    notes = [f"{numbers[name]:,} {name.replace('_', ' ')}" for name in NOTED if numbers[name]]
    cells = [account.scenario, *(f"{numbers[name]:,}" for name in COLUMNS), "; ".join([*notes, *account.failures])]
    return f"| {' | '.join(cells)} |"


def total(accounts: Sequence[Account]) -> Account:
    """All of them together."""
    sums = {name: sum(getattr(account, name) for account in accounts) for name in (*COLUMNS, *NOTED)}
    return Account("all", seconds=round(sum(account.seconds for account in accounts), 1), **sums)


def circumstances(arguments: Sequence[str], load_before: float) -> str:
    """The command, the day and the machine."""
    mosquitto = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin") or ""
    told = subprocess.run([mosquitto, "-h"], check=False, capture_output=True, text=True).stdout
    day = dt.datetime.now(tz=dt.timezone.utc).date()
    command = " ".join(["tools/faults", *arguments])
    programs = [
        f"Linux {platform.release().split('-')[0]}",
        f"Python {platform.python_version()}",
        f"SQLite {sqlite3.sqlite_version}",
        told.partition(chr(10))[0].strip(),
    ]
    load = f"load average {load_before:.1f} before, {os.getloadavg()[0]:.1f} after"
    return f"`{command}` on {day}: {os.cpu_count()} {platform.machine()} cores, {', '.join(programs)}; {load}."


def put_into(document: Path, parts: Sequence[str]) -> None:
    """Replace what an earlier run wrote there. Raises ValueError where no place is marked."""
    text = document.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{document}: has no line {BEGIN!r} with {END!r} below it")
    document.write_text("\n\n".join([before + begin, *parts, end + after]), encoding="utf-8")
