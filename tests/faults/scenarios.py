"""The faults of a factory, one function each: what happens to a device that keeps speaking, and the account of it."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from typing_extensions import Self

from edge_asr import clock
from edge_asr.outbox import OutboxError, read_statistics
from tests.broker import Broker
from tests.faults.books import Account, Consumer, promises, settle
from tests.faults.device import UNUSABLE, Orders
from tests.faults.link import Link, Weather
from tests.faults.wire import MoodyBroker, Tap

PATIENCE_S = 60.0
"""For something to happen: for the outbox to become emptier, once the fault is over."""

COMMAND_LIFE_S = 4.0
OUTAGE_S = 4.5
"""Longer than a command lives."""

YEAR_S = 365 * 86_400

REPOSITORY = Path(__file__).resolve().parents[2]


class Devices:
    """Starts devices and kills them, for any thread; a context manager."""

    def __init__(self, log: Path, prefix: Sequence[str] = (), variables: Mapping[str, str] | None = None) -> None:
        self._asking = threading.Lock()
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "tests.faults.device"],
                cwd=REPOSITORY,
                env={**os.environ, **(variables or {})},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def start(self, orders: Orders) -> int:
        """Let a device live; its process."""
        return self._ask(json.dumps(asdict(orders)))

    def kill(self, pid: int) -> int:
        """SIGKILL; the device's exit status, which is its own if it had ended before."""
        return self._ask(f"kill {pid}")

    def _ask(self, line: str) -> int:
        assert self._process.stdin
        with self._asking:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
            return int(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the device's process ended; see device.log")
        return line.strip()


class Stage:
    """What every scenario needs: a folder, luck, a device's orders and the account to fill in."""

    def __init__(
        self, number: int, name: str, folder: Path, devices: Devices, *, short: bool, kills: int, seed: str
    ) -> None:
        self.folder = folder
        self.devices = devices
        self.host = f"127.0.0.{10 + number}"
        """An address of its own: no other scenario's connection can take the port of a broker that is down."""
        self.short = short
        self.kills = kills
        self.luck = random.Random(f"{seed} {name}")  # noqa: S311 - repeatable
        self.account = Account(name)
        self.tap: Tap | None = None
        outbox, journal, hush = (str(folder / file) for file in ("outbox.db", "journal", "hush"))
        pause_s = 0.03 if short else 0.01  # the short form runs several scenarios at once
        self.orders = Orders(outbox, journal, hush, port=0, command_life_s=COMMAND_LIFE_S, pause_s=pause_s)
        self._device = 0

    def broker(self, *, durable: bool = True, host: str = "") -> Broker:
        """A mosquitto of its own, running."""
        folder = self.folder / "broker"
        folder.mkdir()
        return Broker(folder, durable=durable, host=host or self.host)

    def launch(self) -> None:
        """A device begins to live."""
        self._device = self.devices.start(self.orders)

    def start(self) -> None:
        """A device lives, and has promised something new."""
        before = len(promises(self._journal))
        self.launch()
        end = time.monotonic() + PATIENCE_S
        while len(promises(self._journal)) == before:
            if time.monotonic() > end:
                raise TimeoutError("the device says nothing; see device.log")
            time.sleep(0.02)

    def work(self, most: int) -> None:
        """Let the device promise so many messages or fewer, however busy the machine is."""
        wanted, journal = self.luck.randint(0, most), self._journal
        begin = journal.stat().st_size if journal.exists() else 0
        end = time.monotonic() + PATIENCE_S
        while wanted and time.monotonic() < end:
            time.sleep(0.002)
            if journal.exists():
                with journal.open("rb") as file:
                    file.seek(begin)
                    if file.read().count(b"\n") >= wanted:
                        return

    def speak(self, least_s: float, most_s: float = 0.0) -> None:
        """Let time pass; this is the load, not a synchronization."""
        time.sleep(self.luck.uniform(least_s, max(least_s, most_s)))

    def finish(self, consumer: Consumer) -> None:
        """Silence; then everything that was promised has its time to arrive."""
        Path(self.orders.hush).touch()
        self.wait_until_empty()
        newest = promises(self._journal)[-1].id
        end = time.monotonic() + 20
        while not consumer.has(newest) and time.monotonic() < end:
            consumer.wait(0.2)
        self.expect_killed()

    def wait_until_empty(self) -> None:
        """The outbox has its time to give everything away: as long as a slow machine needs, if only it goes on."""
        end, least = time.monotonic() + PATIENCE_S, self._waiting()
        while least and time.monotonic() < end:
            time.sleep(0.05)
            waiting = self._waiting()
            if 0 <= waiting < least or least < 0:
                end, least = time.monotonic() + PATIENCE_S, waiting
        if least:
            self.account.failures.append(f"{least} messages still wait, and for {PATIENCE_S:.0f} s none has gone")

    def kill(self) -> int:
        """SIGKILL; the device's exit status, which is its own if it had ended before."""
        return self.devices.kill(self._device)

    def expect_killed(self) -> None:
        """Kill the device; it must not have ended by itself."""
        status = self.kill()
        if status != -9:
            self.account.failures.append(f"the device ended by itself with {status}")

    def settled(
        self,
        consumer: Consumer,
        *,
        broker_kills_ns: Sequence[int] = (),
        broker_frozen: bool = False,
        damaged: Collection[str] = (),
    ) -> Account:
        """The account, closed."""
        return settle(
            self.account,
            promises(self._journal),
            consumer.deliveries,
            acknowledged_ns=self.tap.acknowledged_ns if self.tap else {},
            presence_ns=consumer.presence_ns,
            broker_kills_ns=broker_kills_ns,
            broker_frozen=broker_frozen,
            damaged=damaged,
        )

    @property
    def _journal(self) -> Path:
        return Path(self.orders.journal)

    def _waiting(self) -> int:
        try:
            return sum(read_statistics(Path(self.orders.outbox)).waiting.values())
        except OutboxError:  # a rescue is exchanging the files
            return -1


@contextmanager
def connected(stage: Stage, *, durable: bool = True) -> Iterator[tuple[Broker, Consumer]]:
    """A broker with the consumer on it, and the device's orders lead there."""
    with stage.broker(durable=durable) as broker, Consumer(broker.host, broker.port) as consumer:
        stage.orders = replace(stage.orders, host=broker.host, port=broker.port)
        yield broker, consumer


@contextmanager
def tapped(stage: Stage) -> Iterator[tuple[Broker, Consumer]]:
    """The same with a tap in between, for brokers that will end: what had they acknowledged?"""
    with connected(stage) as (broker, consumer), Tap(broker.host, broker.port) as stage.tap:
        stage.orders = replace(stage.orders, host="127.0.0.1", port=stage.tap.port)
        yield broker, consumer


# -- the process and the broker


def sigkill(stage: Stage) -> Account:
    """SIGKILL at random moments under load."""
    with connected(stage, durable=False) as (_, consumer):
        for _ in range(stage.kills):
            stage.launch()
            stage.work(200)
            stage.speak(0.0, 0.02)  # not always right after a commit
            stage.expect_killed()
            stage.account.kills += 1
        stage.start()
        stage.finish(consumer)
        account = stage.settled(consumer)
    if account.duplicates > 0.1 * account.committed:
        account.failures.append("duplicates are more than 10 %")
    return account


def broker_stop(stage: Stage) -> Account:
    """The broker is stopped and started again."""
    with tapped(stage) as (broker, consumer):
        stage.start()
        for _ in range(1 if stage.short else 5):
            stage.speak(0.5, 1.0)
            broker.stop()
            stage.speak(0.5, OUTAGE_S)
            broker.start()
        stage.speak(0.5)
        stage.finish(consumer)
        return stage.settled(consumer)


def broker_kill(stage: Stage) -> Account:
    """SIGKILL of the broker; what it had acknowledged is its own loss, as the tap in between knows."""
    kills_ns = []
    with tapped(stage) as (broker, consumer):
        stage.start()
        for _ in range(1 if stage.short else 6):
            stage.speak(0.5, 1.5)
            broker.kill()
            kills_ns.append(clock.boottime_ns())
            stage.speak(0.2, 1.0)
            broker.start()
        stage.speak(0.5)
        stage.finish(consumer)
        return stage.settled(consumer, broker_kills_ns=kills_ns)


def broker_freeze(stage: Stage) -> Account:
    """SIGSTOP and SIGCONT of the broker."""
    with connected(stage) as (broker, consumer):
        stage.start()
        for _ in range(1 if stage.short else 4):
            stage.speak(0.5, 1.0)
            with broker.frozen():
                stage.speak(OUTAGE_S, OUTAGE_S + 1)
        stage.speak(0.5)
        stage.finish(consumer)
        return stage.settled(consumer, broker_frozen=True)


def moody_broker(stage: Stage) -> Account:
    """Late and error PUBACKs, hang-ups, one message that is never taken, and a spell in which none is."""
    with MoodyBroker(stage.luck) as broker:
        stage.orders = replace(stage.orders, port=broker.port, pause_s=0.05)
        stage.start()
        stage.speak(2 if stage.short else 15)
        Path(stage.orders.hush).touch()
        stage.wait_until_empty()
        stage.expect_killed()
        promised = promises(Path(stage.orders.journal))
        account = settle(stage.account, promised, broker.accepted, in_flight_with=broker.in_flight_with)
    never = [promise.id for promise in promised if promise.seq == MoodyBroker.NEVER_TAKEN]
    untaken = [promise.id for promise in promised if promise.id not in broker.acknowledged]
    account.lost = len(untaken) - len(never)
    if read_statistics(Path(stage.orders.outbox)).dead_letters != len(never):
        account.failures.append("the message that is never taken is not the only dead letter")
    if not broker.spell_is_over:
        account.failures.append("the broker never refused everything for a while")
    return account


# -- the link


def on_link(stage: Stage, weathers: Sequence[Weather]) -> Account:
    """Fair weather between each of these."""
    with ExitStack() as stack:
        link = stack.enter_context(Link(stage.luck))
        broker = stack.enter_context(stage.broker(host=link.broker_side))
        consumer = stack.enter_context(Consumer(broker.host, broker.port))
        stage.devices = stack.enter_context(Devices(stage.folder / "device.log", link.prefix))
        stage.orders = replace(stage.orders, host=broker.host, port=broker.port)
        stage.start()
        for weather in weathers:
            stage.speak(1.0)
            link.weather = weather
            stage.speak(OUTAGE_S, OUTAGE_S + 1)
            link.weather = Weather()
        stage.speak(1.0)
        stage.finish(consumer)
        return stage.settled(consumer)


def cut_link(stage: Stage) -> Account:
    """Nothing passes."""
    return on_link(stage, [Weather(there=False, back=False)] * (1 if stage.short else 3))


def half_open_link(stage: Stage) -> Account:
    """One direction passes, then the other."""
    return on_link(stage, [Weather(back=False), Weather(there=False)] * (1 if stage.short else 2))


def bad_link(stage: Stage) -> Account:
    """Slow, then lossy, then both; in short both."""
    slow, lossy = Weather(delay_s=0.2, jitter_s=0.05), Weather(loss=0.1)
    both = Weather(delay_s=0.1, jitter_s=0.05, loss=0.05)
    return on_link(stage, [both] if stage.short else [slow, lossy, both])


# -- the disk


@contextmanager
def tiny_disk(stage: Stage, megabytes: int) -> Iterator[Path]:
    """A tmpfs, seen by the rig's own mount namespace only."""
    disk = stage.folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "faults", disk], check=True)
    stage.orders = replace(stage.orders, outbox=str(disk / "outbox.db"))
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def full_disk(stage: Stage) -> Account:
    """The disk fills while the broker is away; a kill on the full disk; the broker comes back before there is space."""
    stage.orders = replace(stage.orders, text_bytes=1000)
    with tiny_disk(stage, 8) as disk, tapped(stage) as (broker, consumer):
        stage.start()
        stage.speak(0.5)
        broker.stop()
        stage.speak(0.5)
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        stage.speak(1.5)
        if Path(f"{stage.orders.outbox}.ballast").exists():
            stage.account.failures.append("the disk was never full")
        stage.expect_killed()
        stage.account.kills += 1
        stage.launch()
        stage.speak(0.5)
        broker.start()
        stage.speak(2.0)
        filler.unlink()
        stage.speak(0.5)
        stage.finish(consumer)
        return stage.settled(consumer)


def read_only_disk(stage: Stage) -> Account:
    """The disk comes back read-only: the device says so and ends; made writable again, it goes on."""
    with tiny_disk(stage, 32) as disk, tapped(stage) as (broker, consumer):
        stage.start()
        stage.speak(0.5)
        broker.stop()
        stage.speak(0.5)
        stage.expect_killed()
        stage.account.kills += 1
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        stage.launch()
        stage.speak(1.0)
        status = stage.kill()
        if status != UNUSABLE:
            stage.account.failures.append(f"on a read-only disk the device ended with {status} instead of saying so")
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        broker.start()
        stage.start()
        stage.finish(consumer)
        return stage.settled(consumer)


def damaged_pages(stage: Stage) -> Account:
    """Some pages of the file become noise; only what stood on them may be missing."""
    damaged: set[str] = set()
    with tapped(stage) as (broker, consumer):
        for _ in range(1 if stage.short else 3):
            broker.stop()
            stage.start()
            stage.speak(2.0)
            stage.expect_killed()
            stage.account.kills += 1
            damaged |= _make_noise(stage)
            broker.start()
            stage.start()
            stage.speak(2.0)
            stage.expect_killed()
        stage.start()
        stage.finish(consumer)
        if not read_statistics(Path(stage.orders.outbox)).damages:
            stage.account.failures.append("the damage was not noticed")
        return stage.settled(consumer, damaged=damaged)


_WAITING = re.compile(rb"([0-9a-f-]{36})[0-9a-f-]{36}evt/")
"""Id, boot id and topic, as they follow each other in the row of a message and of nothing else."""


def _make_noise(stage: Stage, pages: int = 3, page_bytes: int = 4096) -> set[str]:
    """Overwrite some leaf pages; the ids of the messages that stood on them."""
    path = Path(stage.orders.outbox)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = path.read_bytes()
    leaves = [at for at in range(page_bytes, len(content), page_bytes) if content[at] == 0x0D]
    chosen = stage.luck.sample(leaves, min(pages, len(leaves)))
    with path.open("r+b") as file:
        for at in chosen:
            file.seek(at)
            file.write(stage.luck.randbytes(page_bytes))
    return {found.decode() for at in chosen for found in _WAITING.findall(content[at : at + page_bytes])}


# -- the clock


def clock_steps(stage: Stage) -> Account:
    """The wall clock jumps by a year, forth and back, while all is well, while the broker is away and over a kill."""
    library, shift = stage.folder / "wallshift.so", stage.folder / "shift"
    source = Path(__file__).with_name("wallshift.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    variables = {"LD_PRELOAD": str(library), "WALLSHIFT": str(shift)}
    with (
        tapped(stage) as (broker, consumer),
        Devices(stage.folder / "device.log", variables=variables) as stage.devices,
    ):
        stage.start()
        for years in (1,) if stage.short else (1, -1, 1, -1):
            stage.speak(0.5)
            shift.write_text(str(years * YEAR_S), encoding="ascii")
            stage.speak(0.5)
            broker.stop()
            stage.speak(OUTAGE_S)
            shift.write_text(str(-years * YEAR_S), encoding="ascii")
            stage.expect_killed()
            stage.account.kills += 1
            stage.start()
            broker.start()
            stage.speak(1.0)
        stage.finish(consumer)
        account = stage.settled(consumer)
    this_year = dt.datetime.now(tz=dt.timezone.utc).year
    for year in (this_year - 1, this_year + 1):
        if not any(b'"time":"%d-' % year in delivery.body for delivery in consumer.deliveries):
            account.failures.append(f"no message bears the year {year}: the clock was not stepped")
    return account


# -- the programme

SCENARIOS: Mapping[str, Callable[[Stage], Account]] = {
    "SIGKILL of the device": sigkill,
    "broker stopped": broker_stop,
    "broker killed": broker_kill,
    "broker frozen": broker_freeze,
    "late and error PUBACKs": moody_broker,
    "link cut": cut_link,
    "link half open": half_open_link,
    "link slow and lossy": bad_link,
    "disk full": full_disk,
    "disk read-only": read_only_disk,
    "pages damaged": damaged_pages,
    "clock steps of a year": clock_steps,
}

PRIVILEGED = {cut_link, half_open_link, bad_link, full_disk, read_only_disk}


def obstacle(scenario: Callable[[Stage], Account], not_isolated: str) -> str:
    """Why a scenario cannot be run here, or nothing."""
    if scenario in PRIVILEGED and not_isolated:
        return not_isolated
    if scenario is clock_steps and shutil.which("cc") is None:
        return "needs a C compiler (cc)"
    return ""
