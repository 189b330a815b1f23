"""What delivery costs on this machine: an append, a day's backlog with a live command in it, a million rows."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from edge_asr import clock
from edge_asr.outbox import Outbox
from tests.broker import Broker
from tests.faults.books import Consumer, Delivery, Promise, promises
from tests.faults.device import Orders, transcript_draft
from tests.faults.scenarios import Devices

APPENDS, BACKLOG, ROWS = 2_000, 100_000, 1_000_000
MAX_BYTES = 4_000_000_000
COMMAND_LIFE_S = 10.0

LIMITS = {
    "append_median_ms": ("an append, median (ms)", 10.0),
    "append_p99_ms": ("an append, 99th percentile (ms)", None),
    "drain_per_s": ("messages per second of a backlog of 100,000 (at least)", -1000.0),
    "live_command_s": ("longest wait of a live command meanwhile (s)", 0.5),
    "open_s": ("opening an outbox of 1,000,000 messages (s)", 2.0),
    "memory_mb": ("memory of the process that has it open, interpreter included (MB)", 64.0),
}
"""By figure: in words, and the most it may be; negative: the least."""


def measure() -> dict[str, float]:
    """All figures; a few minutes."""
    with tempfile.TemporaryDirectory(prefix="figures-") as folder:
        place = Path(folder)
        return {**asyncio.run(_append(place)), **_drain(place), **_open(place)}


def missed(measured: dict[str, float]) -> list[str]:
    """One line for each figure beyond its limit."""
    lines = []
    for name, (words, limit) in LIMITS.items():
        if limit is not None and (measured[name] > limit if limit > 0 else measured[name] < -limit):
            lines.append(f"{words}: {measured[name]:g}, limit {abs(limit):g}")
    return lines


def table(measured: dict[str, float]) -> str:
    """In Markdown."""
    lines = ["| figure | measured | limit |", "|---|---:|---:|"]
    for name, (words, limit) in LIMITS.items():
        lines.append(f"| {words} | {measured[name]:,g} | {'' if limit is None else f'{abs(limit):,g}'} |")
    return "\n".join(lines)


async def _append(place: Path) -> dict[str, float]:
    took_ms = []
    with closing(Outbox(place / "append.db", MAX_BYTES)) as outbox:
        for _ in range(APPENDS):
            draft = transcript_draft(100)
            began = time.perf_counter()
            await outbox.append(draft)
            took_ms.append(1000 * (time.perf_counter() - began))
    cuts = statistics.quantiles(took_ms, n=100)
    return {"append_median_ms": round(cuts[49], 2), "append_p99_ms": round(cuts[98], 2)}


async def _fill(path: Path, messages: int) -> None:
    with closing(Outbox(path, MAX_BYTES)) as outbox:
        for _ in range(messages // 1000):
            await outbox.append(*[transcript_draft(100)] * 1000)


def _drain(place: Path) -> dict[str, float]:
    """A device comes back to a broker with a day's messages, and goes on speaking; a consumer takes everything.

    The broker keeps nothing on its disk. A command's wait counts from before its commit to its arrival.
    """
    outbox, journal, hush, folder = (place / name for name in ("drain.db", "journal", "hush", "broker"))
    folder.mkdir()
    asyncio.run(_fill(outbox, BACKLOG))
    with (
        Broker(folder, durable=False) as broker,
        Consumer(broker.host, broker.port) as consumer,
        Devices(place / "device.log") as devices,
    ):
        # Every fourth sentence is a command: two a second.
        orders = Orders(str(outbox), str(journal), str(hush), broker.port, speakers=1, pause_s=0.125)
        began_ns = clock.boottime_ns()
        device = devices.start(replace(orders, command_life_s=COMMAND_LIFE_S, max_bytes=MAX_BYTES))
        consumer.wait_for(BACKLOG)
        hush.touch()
        newest, end = promises(journal)[-1].id, time.monotonic() + 20
        while not consumer.has(newest) and time.monotonic() < end:
            consumer.wait(0.2)
        end_ns = clock.boottime_ns()
        devices.kill(device)
    waits_s = command_waits_s(promises(journal), consumer.deliveries, COMMAND_LIFE_S, end_ns)
    bodies = ((json.loads(delivery.body), delivery.arrived_ns) for delivery in consumer.deliveries)
    replayed_ns = [arrived_ns for body, arrived_ns in bodies if body["data"]["replayed"]]
    took_s = (replayed_ns[-1] - began_ns) / clock.NS_PER_S
    return {
        "drain_per_s": round(len(replayed_ns) / took_s),
        "live_command_s": round(max(waits_s), 3),
    }


def command_waits_s(
    promised: Sequence[Promise], delivered: Sequence[Delivery], life_s: float, end_ns: int
) -> list[float]:
    """From the beginning of each live command's life to its arrival, be it as expired; to ``end_ns`` if it never came.

    One that was committed before there was a connection belongs to the backlog and is not live.
    """
    came: dict[str, tuple[int, bool]] = {}
    for one in delivered:
        if one.topic.endswith(("/command", "/expired")):
            data = json.loads(one.body)["data"]
            came.setdefault(data["id"], (one.arrived_ns, data["replayed"]))
    commands = ((one, *came.get(one.id, (end_ns, False))) for one in promised if one.category == "command")
    return [(at_ns - one.expires_ns) / clock.NS_PER_S + life_s for one, at_ns, replayed in commands if not replayed]


_OPEN = """
import sys, time, pathlib
from edge_asr.outbox import Outbox
began = time.perf_counter()
outbox = Outbox(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
took_s = time.perf_counter() - began
peak_kb = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(outbox.last_seq, took_s, peak_kb)
outbox.close()
"""


def _open(place: Path) -> dict[str, float]:
    path = place / "million.db"
    asyncio.run(_fill(path, ROWS))
    done = subprocess.run(
        [sys.executable, "-c", _OPEN, str(path), str(MAX_BYTES)], check=True, capture_output=True, text=True
    )
    rows, took_s, peak_kb = done.stdout.split()
    assert int(rows) == ROWS
    return {"open_s": round(float(took_s), 3), "memory_mb": round(int(peak_kb) / 1000, 1)}
