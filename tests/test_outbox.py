"""Nothing that was committed is lost, nothing is sent twice under another id, and every drop is counted."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gzip
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from edge_asr import clock
from edge_asr.events import Category, Draft, Message
from edge_asr.outbox import Outbox, OutboxError, life_left_s, read_dead_letters, read_statistics
from edge_asr.retention import DROP_ORDER, ROW_BYTES, Limits

MEGABYTE = 1_000_000
CATEGORIES: tuple[Category, ...] = get_args(Category)


def draft(text: str = "stop line three", category: Category = "transcript", life_s: float | None = None) -> Draft:
    expires_ns = None if life_s is None else clock.boottime_ns() + round(life_s * clock.NS_PER_S)
    return Draft(f"evt/{category}", category, {"text": text}, expires_ns)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "outbox.db"


@contextlib.contextmanager
def opened(path: Path, max_bytes: int = 10 * MEGABYTE) -> Iterator[Outbox]:
    with closing(Outbox(path, max_bytes)) as outbox:
        yield outbox


async def waiting(outbox: Outbox) -> list[Message]:
    """Everything that waits, page by page."""
    found: list[Message] = []
    while page := await outbox.oldest(100, found[-1].seq if found else 0):
        found += page
    return found


async def filled(outbox: Outbox, count: int, text: str = "x" * 300) -> list[Message]:
    appended = await asyncio.gather(*(outbox.append(draft(f"{n} {text}")) for n in range(count)))
    return [message for (message,) in appended]


def refusal(path: Path) -> str:
    with pytest.raises(OutboxError) as caught:
        Outbox(path, MEGABYTE)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- what append promises


def test_what_was_appended_is_there_after_reopening_with_everything_it_was_appended_with(path: Path) -> None:
    async def main() -> None:
        with opened(path) as outbox:
            before = clock.boottime_ns()
            appended = await outbox.append(draft("启动 3号线 \u0000 ok"), draft("go", "command", life_s=10))
            assert before <= appended[0].created_ns <= clock.boottime_ns()
        with opened(path) as outbox:
            assert tuple(await waiting(outbox)) == appended

    asyncio.run(main())


def test_sequence_numbers_have_no_gap_and_never_start_again(path: Path) -> None:
    async def main() -> None:
        with opened(path) as outbox:
            first = await filled(outbox, 30)
            await outbox.acknowledge(message.seq for message in first)
        with opened(path) as outbox:
            assert outbox.last_seq == 30
            second = await filled(outbox, 5)
        assert [message.seq for message in first + second] == list(range(1, 36))
        assert len({message.id for message in first + second}) == 35

    asyncio.run(main())


def test_the_drafts_of_one_call_stay_together_when_many_append_at_once(path: Path) -> None:
    async def main() -> None:
        with opened(path) as outbox:
            trios = await asyncio.gather(*(outbox.append(*[draft(f"{n}")] * 3) for n in range(50)))
            for trio in trios:
                assert [message.seq for message in trio] == list(range(trio[0].seq, trio[0].seq + 3))
            assert sorted(message.seq for trio in trios for message in trio) == list(range(1, 151))

    asyncio.run(main())


def test_every_probe_reaches_the_disk(path: Path) -> None:
    async def main() -> None:
        with opened(path) as outbox:
            log = path.with_name("outbox.db-wal")
            for _ in range(3):
                before = log.read_bytes()
                await outbox.prove()
                assert log.read_bytes() != before

    asyncio.run(main())


@pytest.mark.parametrize("text", [float("nan"), "\ud800", {1, 2}])
def test_data_that_json_cannot_carry_is_the_callers_error_and_costs_no_sequence_number(path: Path, text: Any) -> None:
    async def main() -> None:
        with opened(path) as outbox:
            with pytest.raises((ValueError, TypeError)):
                await outbox.append(draft(), replace(draft(), data={"text": text}))
            (message,) = await outbox.append(draft())
            assert message.seq == 1

    asyncio.run(main())


def test_a_waiting_reader_is_woken_by_an_append(path: Path) -> None:
    async def main() -> None:
        with opened(path) as outbox:
            waiter = asyncio.create_task(outbox.arrival(0))
            await asyncio.sleep(0)
            assert not waiter.done()
            await outbox.append(draft())
            await asyncio.wait_for(waiter, 5)
            await asyncio.wait_for(outbox.arrival(0), 5)
            waiter = asyncio.create_task(outbox.arrival(1))
            await asyncio.sleep(0)
            outbox.close()
            with pytest.raises(OutboxError, match="closed"):
                await asyncio.wait_for(waiter, 5)

    asyncio.run(main())


def test_a_closed_outbox_says_so_and_closing_twice_is_fine(path: Path) -> None:
    outbox = Outbox(path, MEGABYTE)
    outbox.close()
    outbox.close()
    with pytest.raises(OutboxError, match="closed"):
        asyncio.run(outbox.append(draft()))


# -- the outbox against a model


class OutboxMachine(RuleBasedStateMachine):
    """Any sequence of operations, crashes and reopenings against a dictionary."""

    max_bytes = 200_000

    @initialize()
    def open(self) -> None:
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
        self.loop = asyncio.new_event_loop()
        self.generation = 0
        self.outbox = Outbox(self.path, self.max_bytes, ballast_bytes=4096)
        self.waiting: dict[int, Message] = {}
        self.dead: dict[int, Message] = {}
        self.refused = dict.fromkeys(DROP_ORDER, 0)
        self.dropped = dict.fromkeys(DROP_ORDER, 0)
        self.last_seq = 0

    @property
    def path(self) -> Path:
        return self.folder / f"{self.generation}" / "outbox.db"

    @rule(
        kinds=st.lists(st.tuples(st.sampled_from(CATEGORIES), st.integers(0, 9000)), min_size=1, max_size=3),
        times=st.integers(1, 12),
    )
    def append(self, kinds: list[tuple[Category, int]], times: int) -> None:
        for _ in range(times):
            drafts = [draft("x" * size, category) for category, size in kinds]
            messages = self.loop.run_until_complete(self.outbox.append(*drafts))
            assert [message.seq for message in messages] == list(
                range(self.last_seq + 1, self.last_seq + 1 + len(drafts))
            )
            assert [(m.category, m.data) for m in messages] == [(d.category, d.data) for d in drafts]
            self.last_seq += len(drafts)
            self._forget_dropped(newest=messages)
            self.waiting.update({message.seq: message for message in messages})

    def _forget_dropped(self, newest: Sequence[Message]) -> None:
        """What the quota took must be the oldest of the least valuable."""
        left = {message.seq for message in self.loop.run_until_complete(waiting(self.outbox))}
        assert left >= {message.seq for message in newest}
        dead_left = {letter.message.seq for letter in read_dead_letters(self.path)}
        gone = [self.waiting.pop(seq) for seq in sorted(self.waiting.keys() - left)]
        gone_dead = [self.dead.pop(seq) for seq in sorted(self.dead.keys() - dead_left)]
        if gone or gone_dead:
            statistics = self.loop.run_until_complete(self.outbox.statistics())
            assert statistics.bytes > self.max_bytes / 3
        kept = [*self.waiting.values(), *self.dead.values()]
        for message in [*gone_dead, *gone]:
            self.dropped[message.category] += 1
            spared = DROP_ORDER[: DROP_ORDER.index(message.category)]
            assert not any(other.category in spared for other in kept)
        for gone_of, kept_of in ((gone, self.waiting), (gone_dead, self.dead)):
            newest_gone = {message.category: message.seq for message in gone_of}
            assert not any(other.seq < newest_gone.get(other.category, 0) for other in kept_of.values())
        assert not {message.category for message in gone} & {message.category for message in self.dead.values()}

    # What is drawn never depends on what waits: the quota counts pages, whose number differs from run to run, and
    # Hypothesis takes a draw that differs for a flake.

    def _chosen(self, picks: Sequence[int]) -> list[int]:
        seqs = sorted(self.waiting)
        return list(dict.fromkeys(seqs[pick % len(seqs)] for pick in picks)) if seqs else []

    @rule(picks=st.lists(st.integers(0, 99)))
    def acknowledge(self, picks: list[int]) -> None:
        seqs = self._chosen(picks)
        self.loop.run_until_complete(self.outbox.acknowledge([*seqs, self.last_seq + 7]))
        for seq in seqs:
            del self.waiting[seq]

    @rule(pick=st.integers(0, 99))
    def put_aside(self, pick: int) -> None:
        for seq in self._chosen([pick]):
            for _ in range(2):  # what is aside already stays there
                self.loop.run_until_complete(self.outbox.put_aside(seq, "no"))
            self.dead[seq] = self.waiting.pop(seq)
            self.refused[self.dead[seq].category] += 1

    @rule(limit=st.integers(1, 5), after=st.integers(0, 60), category=st.none() | st.sampled_from(CATEGORIES))
    def oldest(self, limit: int, after: int, category: Category | None) -> None:
        found = self.loop.run_until_complete(self.outbox.oldest(limit, after, category))
        model = (m for seq, m in sorted(self.waiting.items()) if seq > after and category in {None, m.category})
        assert found == list(model)[:limit]

    @rule()
    def reopen(self) -> None:
        self.outbox.close()
        self.outbox = Outbox(self.path, self.max_bytes, ballast_bytes=4096)

    @rule()
    def crash(self) -> None:
        """Go on with a copy of the files as they are now: what a SIGKILL leaves."""
        before = self.path.parent
        self.generation += 1
        shutil.copytree(before, self.path.parent)
        self.outbox.close()
        self.outbox = Outbox(self.path, self.max_bytes, ballast_bytes=4096)

    @invariant()
    def agrees_with_the_model(self) -> None:
        assert self.loop.run_until_complete(waiting(self.outbox)) == [m for _, m in sorted(self.waiting.items())]
        statistics = self.loop.run_until_complete(self.outbox.statistics())
        assert statistics.dropped == self.dropped
        assert statistics.dead_letters == len(self.dead)
        assert statistics.refused == self.refused
        assert statistics.outdated == dict.fromkeys(DROP_ORDER, 0)
        assert statistics.class_bytes == {
            category: sum(
                ROW_BYTES + len(json.dumps(message.data, separators=(",", ":")).encode())
                for message in [*self.waiting.values(), *self.dead.values()]
                if message.category == category
            )
            for category in DROP_ORDER
        }
        assert sum(statistics.waiting.values()) == len(self.waiting)
        assert statistics.last_seq == self.outbox.last_seq == self.last_seq
        assert statistics.bytes <= self.max_bytes
        assert self.path.stat().st_size <= self.max_bytes + 4 * 4096

    def teardown(self) -> None:
        self.outbox.close()
        self.loop.close()
        shutil.rmtree(self.folder)


OutboxMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
test_the_outbox_does_what_a_model_of_it_does = OutboxMachine.TestCase


# -- killed

KILLED_WRITER = """
import asyncio, pathlib, sys
from edge_asr.events import Draft
from edge_asr.outbox import Outbox

async def main():
    outbox = Outbox(pathlib.Path(sys.argv[1]), 50_000_000)
    async def write(writer):
        while True:
            messages = await outbox.append(*[Draft("evt/transcript", "transcript", {"text": writer * 200})] * 2)
            print(*(f"{m.seq} {m.id}" for m in messages), flush=True)
            if messages[0].seq % 3 == 0:
                print("-", messages[0].seq, flush=True)
                await outbox.acknowledge([messages[0].seq])
    await asyncio.gather(write("a"), write("b"), write("c"))

asyncio.run(main())
"""


def test_ten_kills_at_random_moments_lose_nothing_that_append_had_returned(path: Path) -> None:
    luck = random.Random(4)  # noqa: S311 - repeatable
    committed: dict[int, str] = {}
    acknowledged: set[int] = set()
    for _ in range(10):
        writer = subprocess.Popen([sys.executable, "-c", KILLED_WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout
        lines = [writer.stdout.readline() for _ in range(luck.randrange(1, 60))]
        writer.kill()
        lines += writer.stdout.read().splitlines()
        writer.stdout.close()
        assert writer.wait() == -signal.SIGKILL
        for words in (line.split() for line in lines):
            if words[:1] == ["-"] and len(words) == 2:
                acknowledged.add(int(words[1]))
            elif len(words) == 4 and len(words[3]) == 36:
                committed |= {int(words[0]): words[1], int(words[2]): words[3]}

    with opened(path) as outbox:
        left = asyncio.run(waiting(outbox))
    seqs = [message.seq for message in left]
    assert seqs == sorted(seqs)
    assert committed.keys() - set(seqs) <= acknowledged
    assert {message.seq: message.id for message in left if message.seq in committed}.items() <= committed.items()
    known = acknowledged.union(seqs)
    assert all({seq - (seq + 1) % 2, seq + seq % 2} <= known for seq in seqs), "half an append was committed"
    assert len(committed) > 100


# -- time


def test_a_commands_life_runs_by_the_clock_since_boot_and_ends_with_the_boot(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> tuple[Message, ...]:
        with opened(path) as outbox:
            return await outbox.append(draft("go", "command", life_s=10), draft("said"))

    command, transcript = asyncio.run(main())
    left = life_left_s(command)
    assert left is not None
    assert 9 < left <= 10
    year_ns = 365 * 86_400 * clock.NS_PER_S
    for step_ns in (-year_ns, year_ns):
        monkeypatch.setattr(clock, "wall_ns", lambda step_ns=step_ns: command.created_wall_ns + step_ns)
        assert life_left_s(command) == pytest.approx(left, abs=5)
    now_ns = clock.boottime_ns()
    monkeypatch.setattr(clock, "boottime_ns", lambda: now_ns + 11 * clock.NS_PER_S)
    assert life_left_s(command) == 0
    monkeypatch.setattr(clock, "boottime_ns", lambda: 5)
    assert life_left_s(replace(command, boot_id="another")) == 0
    assert life_left_s(transcript) is None


# -- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """16 MiB of real file system."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill_up(folder: Path) -> Path:
    """Somebody else's file takes all that is left."""
    filler = folder / "filler"
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        for size in (65_536, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    return filler


async def append_until_refused(outbox: Outbox) -> tuple[list[Message], str]:
    appended: list[Message] = []
    while True:
        try:
            appended += await outbox.append(draft("x" * 2000))
        except OutboxError as error:
            return appended, str(error)


def test_on_a_full_disk_nothing_committed_is_dropped_and_the_broker_can_still_take_messages_off(
    small_disk: Path,
) -> None:
    path = small_disk / "outbox.db"

    async def main() -> None:
        with opened(path, 100 * MEGABYTE) as outbox:
            committed = await filled(outbox, 500, "x" * 2000)
            filler = fill_up(small_disk)
            for _ in range(20):
                appended, problem = await append_until_refused(outbox)
                assert "\n" not in problem
                assert problem.startswith(str(path))
                assert "full" in problem
                committed += appended
                assert await waiting(outbox) == committed
                await outbox.acknowledge([message.seq for message in committed[:40]])
                committed = committed[40:]
                fill_up(small_disk)
            assert [message.seq for message in committed] == list(range(801, committed[-1].seq + 1))
            assert committed[-1].seq > 500 + 10 * 30, "what was taken off made no room"
            assert (await outbox.statistics()).dropped == dict.fromkeys(DROP_ORDER, 0)
            filler.unlink()
            await filled(outbox, 500, "x" * 2000)

    asyncio.run(main())


def test_an_outbox_opens_on_a_full_disk(small_disk: Path) -> None:
    path = small_disk / "outbox.db"

    async def main() -> None:
        with opened(path) as outbox:
            committed = await filled(outbox, 20)
        fill_up(small_disk)
        with opened(path) as outbox:
            assert await waiting(outbox) == committed
            await outbox.acknowledge([1])
            assert await waiting(outbox) == committed[1:]

    asyncio.run(main())


def test_when_the_ballast_cannot_be_looked_after_what_is_committed_stays_so_and_is_committed_once(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> os.statvfs_result:
        raise OSError(errno.EIO, "Input/output error")

    async def main() -> None:
        with closing(Outbox(path, 10 * MEGABYTE, ballast_bytes=1 << 60)) as outbox:  # no disk has room for that
            monkeypatch.setattr(os, "statvfs", fail)
            appended = await asyncio.gather(*(outbox.append(draft(str(n))) for n in range(20)))
            assert [one.id for (one,) in appended] == [one.id for one in await waiting(outbox)]

    asyncio.run(main())
    assert "Input/output error" in caplog.text


def test_damage_on_a_full_disk_is_mended_when_there_is_space_and_nothing_is_lost_meanwhile(small_disk: Path) -> None:
    path = small_disk / "outbox.db"

    async def commit() -> list[Message]:
        with opened(path, 100 * MEGABYTE) as outbox:
            return await filled(outbox, 3000, "x" * 1800)

    async def mend(committed: list[Message], make_space: Callable[[], None]) -> None:
        with opened(path, 100 * MEGABYTE) as outbox:
            for _ in range(3):
                with pytest.raises(OutboxError, match="full"):
                    await waiting(outbox)
            make_space()
            rescued = await waiting(outbox)
            assert len(rescued) >= 2990
            assert set(seqs_of(rescued)) < set(seqs_of(committed))
            await outbox.append(draft())

    committed = asyncio.run(commit())
    zero_a_page_in_the_middle(path)
    asyncio.run(mend(committed, fill_up(small_disk).unlink))


def seqs_of(messages: Sequence[Message]) -> list[int]:
    return [message.seq for message in messages]


def test_more_than_the_quota_in_one_piece_is_refused_and_drops_nothing(path: Path) -> None:
    async def main() -> None:
        with opened(path, MEGABYTE) as outbox:
            kept = await filled(outbox, 100)
            with pytest.raises(OutboxError, match=r"outbox\.max_bytes"):
                await outbox.append(draft("x" * MEGABYTE))
            assert await waiting(outbox) == kept

    asyncio.run(main())


# -- what is given up


def test_a_class_that_is_full_loses_its_own_oldest_and_no_other_class_anything(path: Path) -> None:
    async def main() -> None:
        limits: dict[Category, Limits] = {"transcript": Limits(100_000), "alarm": Limits(100_000)}
        with closing(Outbox(path, 10 * MEGABYTE, limits=limits)) as outbox:
            await outbox.append(*(draft("x" * 1000, category) for category in CATEGORIES))
            await outbox.put_aside(1, "no")
            for _ in range(200):
                await outbox.append(draft("x" * 1000), draft("x" * 1000, "rejection"))
            statistics = await outbox.statistics()
            kept = [message.seq for message in await waiting(outbox) if message.category == "transcript"]
            assert 50 < len(kept) < 100
            assert kept == list(range(kept[0], outbox.last_seq, 2))
            assert statistics.class_bytes["transcript"] <= 100_000
            assert statistics.dropped == {"command": 0, "transcript": 201 - len(kept), "rejection": 0, "alarm": 0}
            assert statistics.waiting["rejection"] == 201

    asyncio.run(main())


def test_a_refused_command_is_kept_longer_than_any_transcript(path: Path) -> None:
    async def main() -> None:
        with opened(path, MEGABYTE) as outbox:
            await outbox.append(draft("stop", "command"), draft("go", "command"), draft("heard"))
            for seq in (1, 3):
                await outbox.put_aside(seq, "not authorized")
            await filled(outbox, 3000, "x" * 1000)
            statistics = await outbox.statistics()
            assert [letter.message.seq for letter in read_dead_letters(path)] == [1]
            assert (statistics.dropped["command"], statistics.waiting["command"]) == (0, 1)
            assert statistics.dropped["transcript"] == 3001 - statistics.waiting["transcript"] > 1000

    asyncio.run(main())


DAY_NS = 86_400 * clock.NS_PER_S


class Box:
    """A box whose time since boot, boots and wall clock a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        self.now_ns, self.boot, self.wall_ns = DAY_NS, "boot 1", clock.wall_ns()
        self._path = path
        monkeypatch.setattr(clock, "boottime_ns", lambda: self.now_ns)
        monkeypatch.setattr(clock, "wall_ns", lambda: self.wall_ns)
        monkeypatch.setattr(clock, "boot_id", lambda: self.boot)

    def open(self) -> Outbox:
        limits: dict[Category, Limits] = {"transcript": Limits(max_age_s=7 * 86_400.0)}
        return Outbox(self._path, 10 * MEGABYTE, limits=limits)

    def reboot(self, after_days: float) -> None:
        self.boot, self.now_ns = f"boot after {self.boot}", 20 * clock.NS_PER_S
        self.wall_ns += round(after_days * DAY_NS)


def test_what_is_too_old_goes_by_the_clock_since_boot_whatever_the_wall_clock_shows(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(monkeypatch, path)

    async def main() -> None:
        with closing(box.open()) as outbox:
            await outbox.append(draft("dead"), draft("old"), draft("go", "command"), draft("said", "rejection"))
            await outbox.put_aside(1, "no")
            box.now_ns += DAY_NS
            await outbox.append(draft("young"))
            for years in (1, -2, 60):
                box.wall_ns += years * 365 * DAY_NS
                assert await outbox.drop_outdated() == 0
            box.now_ns += 6 * DAY_NS
            assert await outbox.drop_outdated() == 0
            box.now_ns += 1
            assert await outbox.drop_outdated() == 2
            assert [message.data["text"] for message in await waiting(outbox)] == ["go", "said", "young"]
            statistics = await outbox.statistics()
            assert statistics.outdated == {"transcript": 2, "command": 0, "rejection": 0, "alarm": 0}
            assert sum(statistics.dropped.values()) == statistics.dead_letters == 0
        assert read_statistics(path).outdated["transcript"] == 2

    asyncio.run(main())


def test_over_boots_the_time_counts_that_the_box_was_seen_to_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Box(monkeypatch, path)

    async def one_boot(days: float) -> int:
        with closing(box.open()) as outbox:
            box.now_ns += round(days * DAY_NS)
            return await outbox.drop_outdated()

    async def main() -> None:
        with closing(box.open()) as outbox:
            await outbox.append(draft("friday"))
        assert await one_boot(2) == 0
        box.reboot(after_days=365)
        assert await one_boot(2) == 0
        box.reboot(after_days=-900)
        assert await one_boot(2.9) == 0
        assert await one_boot(0.2) == 1

    asyncio.run(main())


def test_messages_of_a_boot_that_is_not_known_wait_as_long_as_may_be(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(monkeypatch, path)

    async def main() -> None:
        with closing(box.open()) as outbox:
            box.now_ns += 100 * DAY_NS
            await outbox.append(draft())
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("DELETE FROM boot")
            connection.commit()
        box.reboot(after_days=1)
        with closing(box.open()) as outbox:
            box.now_ns = 7 * DAY_NS
            assert await outbox.drop_outdated() == 0
            box.now_ns += 1
            assert await outbox.drop_outdated() == 1

    asyncio.run(main())


def test_a_rescue_keeps_the_counts_of_what_was_given_up_and_the_boots(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(monkeypatch, path)

    async def main() -> None:
        with closing(box.open()) as outbox:
            await filled(outbox, 400)
            await outbox.put_aside(400, "no")
            box.now_ns += 6 * DAY_NS
            await outbox.drop_outdated()
        zero_a_page_in_the_middle(path)
        box.reboot(after_days=1)
        with closing(box.open()) as outbox:
            left = len(await waiting(outbox))
            box.now_ns = 2 * DAY_NS
            assert await outbox.drop_outdated() == left + 1
        statistics = read_statistics(path)
        assert statistics.damages == 1
        assert (statistics.refused["transcript"], statistics.outdated["transcript"]) == (1, left + 1)

    asyncio.run(main())


# -- receipts


async def delivered(outbox: Outbox, life_s: float = 10.0) -> Message:
    """A command that the broker has taken."""
    (message,) = await outbox.append(draft("stop", "command", life_s))
    await outbox.acknowledge([message.seq])
    return message


def test_a_receipt_is_kept_with_its_command_after_delivery_and_the_last_word_counts(path: Path) -> None:
    async def main() -> None:
        with opened(path) as outbox:
            first, second = [await delivered(outbox) for _ in range(2)]
            assert await outbox.receive_receipt(first.id, "accepted", "")
            assert await outbox.receive_receipt(second.id, "accepted", "")
        with opened(path) as outbox:
            assert await outbox.receive_receipt(second.id, "rejected", "press is locked")
            assert not await outbox.receive_receipt(str(uuid.uuid4()), "accepted", "")
            assert (await outbox.statistics()).receipts == {"accepted": 1, "rejected": 1, "missing": 0}
        assert read_statistics(path).receipts["rejected"] == 1

    asyncio.run(main())


def test_a_missing_receipt_is_told_once_and_only_of_a_command_that_was_delivered_alive(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        with opened(path) as outbox:
            missed, answered = [await delivered(outbox) for _ in range(2)]
            await delivered(outbox, life_s=1.9)  # went out as evt/expired
            await outbox.append(draft("still waiting", "command", 10.0), draft("a transcript"))
            await outbox.receive_receipt(answered.id, "accepted", "")
            assert await outbox.miss_receipts(60) == []
            now_ns = clock.boottime_ns()
            monkeypatch.setattr(clock, "boottime_ns", lambda: now_ns + 61 * clock.NS_PER_S)
            assert await outbox.miss_receipts(60) == [missed.id]
            assert await outbox.miss_receipts(60) == []
            await outbox.receive_receipt(missed.id, "accepted", "late")
            assert (await outbox.statistics()).receipts == {"accepted": 2, "rejected": 0, "missing": 1}

    asyncio.run(main())


def test_after_a_reboot_a_receipt_is_waited_for_anew(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        with opened(path) as outbox:
            command = await delivered(outbox)
        monkeypatch.setattr(clock, "boot_id", lambda: "another boot")
        monkeypatch.setattr(clock, "boottime_ns", lambda: 30 * clock.NS_PER_S)
        with opened(path) as outbox:
            assert await outbox.miss_receipts(60) == []
            monkeypatch.setattr(clock, "boottime_ns", lambda: 61 * clock.NS_PER_S)
            assert await outbox.miss_receipts(60) == [command.id]

    asyncio.run(main())


def test_only_the_last_thousand_commands_wait_for_receipts(path: Path) -> None:
    async def main() -> None:
        with opened(path) as outbox:
            first = await delivered(outbox)
            rest = await outbox.append(*(draft("stop", "command", 10.0) for _ in range(1000)))
            assert not await outbox.receive_receipt(first.id, "accepted", "")
            assert await outbox.receive_receipt(rest[0].id, "accepted", "")

    asyncio.run(main())


def test_an_outbox_of_the_first_version_is_taken_over_with_all_it_holds(path: Path) -> None:
    """The file was written by the program before receipts were known."""
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.decompress((Path(__file__).parent / "data/outbox.1.db.gz").read_bytes()))
    assert read_statistics(path).receipts == {"accepted": 0, "rejected": 0, "missing": 0}

    async def main() -> None:
        with opened(path) as outbox:
            kept = await waiting(outbox)
            assert [message.seq for message in kept] == [4, 5, 6, 7, 8]
            assert kept[3].data == {"intent": "Stop", "slots": {}}
            statistics = await outbox.statistics()
            assert statistics.dead_letters == sum(statistics.refused.values()) == 1
            assert min(statistics.class_bytes[each] for each in ("command", "transcript", "alarm")) > ROW_BYTES
            assert statistics.waiting == {"command": 1, "transcript": 3, "rejection": 0, "alarm": 1}
            command = await delivered(outbox)
            assert command.seq == 9
            assert await outbox.receive_receipt(command.id, "accepted", "")

    asyncio.run(main())


def test_receipts_outlive_damage_elsewhere_in_the_file(path: Path) -> None:
    async def main() -> None:
        with opened(path) as outbox:
            command = await delivered(outbox)
            await outbox.receive_receipt(command.id, "accepted", "")
            await filled(outbox, 400)
        zero_a_page_in_the_middle(path)
        with opened(path) as outbox:
            await waiting(outbox)
            statistics = await outbox.statistics()
            assert statistics.damages == 1
            assert statistics.receipts["accepted"] == 1
            assert await outbox.receive_receipt(command.id, "rejected", "")

    asyncio.run(main())


# -- a damaged file


def committed_file(path: Path, count: int = 400) -> list[Message]:
    async def main() -> list[Message]:
        with opened(path) as outbox:
            return await filled(outbox, count)

    return asyncio.run(main())


def zero_a_page_in_the_middle(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(20 * 4096)
        file.write(bytes(4096))


def zero_the_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(4096))


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 8192 * 4096)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def delete(path: Path) -> None:
    path.unlink()


def write_text(path: Path) -> None:
    path.write_text("this is not a database\n" * 1000, encoding="ascii")


@pytest.mark.parametrize(
    ("damage", "least_rescued"),
    [
        (zero_a_page_in_the_middle, 380),
        (cut_in_half, 120),
        (zero_the_header, 0),
        (empty, 0),
        (delete, 0),
        (write_text, 0),
    ],
)
def test_after_damage_it_goes_on_with_what_is_readable_and_with_fresh_numbers(
    path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], least_rescued: int
) -> None:
    originals = committed_file(path)
    damage(path)

    async def main() -> None:
        with opened(path) as outbox:
            rescued = await waiting(outbox)
            assert len(rescued) >= least_rescued
            assert [message for message in originals if message in rescued] == rescued
            (fresh,) = await outbox.append(draft("goes on"))
            assert fresh.seq > originals[-1].seq
            statistics = await outbox.statistics()
        with opened(path) as outbox:
            assert await waiting(outbox) == [*rescued, fresh]
        kept = [file for file in path.parent.glob("outbox.db.damaged-*") if file.name[-4] != "-"]
        assert statistics.damages == 1
        assert len(kept) == (0 if damage in {empty, delete} else 1)

    asyncio.run(main())
    assert any(record.levelname == "ERROR" and str(path) in record.getMessage() for record in caplog.records)


def test_a_log_that_is_damaged_after_a_kill_is_noticed_kept_and_its_numbers_are_not_used_again(
    path: Path, tmp_path: Path
) -> None:
    async def main() -> None:
        with opened(path) as outbox:
            for _ in range(20):
                await outbox.append(draft())
            killed = tmp_path / "killed" / path.name
            shutil.copytree(path.parent, killed.parent)
        journal = killed.with_name("outbox.db-wal")
        content = bytearray(journal.read_bytes())
        content[len(content) // 2] ^= 1
        journal.write_bytes(content)
        with opened(killed) as outbox:
            assert 0 < len(await waiting(outbox)) < 20
            assert (await outbox.statistics()).damages == 1
            (fresh,) = await outbox.append(draft("goes on"))
            assert fresh.seq > 20
        (kept,) = killed.parent.glob("outbox.db.damaged-*-wal")
        assert kept.read_bytes() == content
        with opened(killed) as outbox:
            assert fresh in await waiting(outbox)
            assert (await outbox.statistics()).damages == 1

    asyncio.run(main())


def test_a_damaged_page_takes_no_message_along_that_stands_on_another(path: Path) -> None:
    """Neither the one before it, which Python holds while it steps ahead, nor the one after it."""
    originals = committed_file(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    page = path.read_bytes()[20 * 4096 : 21 * 4096]
    assert page[0] == 0x0D, "a leaf"
    hidden = [message for message in originals if message.id.encode() in page]
    assert len(hidden) == int.from_bytes(page[3:5], "big")
    zero_a_page_in_the_middle(path)

    async def main() -> None:
        with opened(path) as outbox:
            assert await waiting(outbox) == [message for message in originals if message not in hidden]

    asyncio.run(main())


def test_no_damaged_leaf_takes_more_along_than_stood_on_it_whatever_it_held(path: Path, tmp_path: Path) -> None:
    """One after the other: messages, counters, and the pages that name the tables."""
    originals = committed_file(path, 100)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = path.read_bytes()
    leaves = [at for at in range(4096, len(content), 4096) if content[at] == 0x0D]
    assert len(leaves) > 20

    async def left(damaged: Path) -> list[Message]:
        with opened(damaged) as outbox:
            return await waiting(outbox)

    for at in leaves:
        damaged = tmp_path / str(at) / path.name
        shutil.copytree(path.parent, damaged.parent)
        damaged.write_bytes(content[:at] + random.Random(at).randbytes(4096) + content[at + 4096 :])  # noqa: S311
        hidden = [message for message in originals if message.id.encode() in content[at : at + 4096]]
        assert asyncio.run(left(damaged)) == [message for message in originals if message not in hidden], at


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), spots=st.integers(1, 6), length=st.sampled_from([1, 30, 600]))
def test_whatever_bytes_change_no_message_is_delivered_that_was_not_written(
    tmp_path_factory: pytest.TempPathFactory, seed: int, spots: int, length: int
) -> None:
    path = tmp_path_factory.mktemp("outbox") / "outbox.db"
    originals = {message.seq: message for message in committed_file(path, 120)}
    luck = random.Random(seed)  # noqa: S311 - repeatable
    size = path.stat().st_size
    with path.open("r+b") as file:
        for _ in range(spots):
            file.seek(luck.randrange(100, size - length))  # past the header, which has a test of its own
            file.write(luck.randbytes(length))

    async def main() -> None:
        with opened(path) as outbox:
            found = await waiting(outbox)
            assert all(originals[message.seq] == message for message in found)
            (fresh,) = await outbox.append(draft("goes on"))
            assert fresh.seq > 120
            # A tree that is out of order may hide a row from its deletion; once that is seen, the next one holds.
            for _ in range(2):
                await outbox.acknowledge(seq for seq in originals)
                left = await waiting(outbox)
                assert fresh in left
            assert left == [fresh]

    asyncio.run(main())


def test_a_flipped_letter_in_a_command_is_found_and_never_delivered(path: Path) -> None:
    with opened(path) as outbox:
        asyncio.run(outbox.append(draft("scrap count fifteen", "command"), draft("after")))
    content = path.read_bytes()
    assert content.count(b"fifteen") == 1
    path.write_bytes(content.replace(b"fifteen", b"fiftees"))
    with opened(path) as outbox:
        assert [message.data["text"] for message in asyncio.run(waiting(outbox))] == ["after"]
        assert asyncio.run(outbox.statistics()).dead_letters == 1


def test_a_rescue_that_is_killed_half_way_starts_over_or_is_finished(path: Path) -> None:
    committed_file(path)
    zero_a_page_in_the_middle(path)
    pristine = path.parent.with_name("pristine")
    shutil.copytree(path.parent, pristine)
    with opened(path) as outbox:
        rescued = asyncio.run(waiting(outbox))
    for complete in (False, True):
        shutil.rmtree(path.parent)
        shutil.copytree(pristine, path.parent)
        if complete:  # killed between the new file's completion and the exchange
            with opened(path) as outbox:
                assert asyncio.run(waiting(outbox)) == rescued
            path.rename(path.with_name("outbox.db.rescued"))
            shutil.copy(pristine / "outbox.db", path)
        else:  # killed while copying
            path.with_name("outbox.db.unfinished").write_bytes(path.read_bytes()[:50_000])
        with opened(path) as outbox:
            assert asyncio.run(waiting(outbox)) == rescued


# -- who else has the file


def test_a_second_daemon_on_the_same_outbox_is_told_so(path: Path) -> None:
    with opened(path):
        assert f"in use by process {os.getpid()} (" in refusal(path)
    with opened(path):
        pass


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "browser.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE history (url TEXT)")
    content = path.read_bytes()
    assert "not an outbox" in refusal(path)
    assert path.read_bytes() == content


def test_a_newer_programs_outbox_is_left_alone(path: Path) -> None:
    committed_file(path, 1)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    assert "newer edge-asr" in refusal(path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "outbox.db"
    assert str(path) in refusal(path)


def test_others_may_not_read_what_was_said(path: Path) -> None:
    with opened(path) as outbox:
        asyncio.run(outbox.append(draft()))
        files = [
            file for file in path.parent.iterdir() if file.name.startswith("outbox.db") and file.suffix != ".ballast"
        ]
        assert len(files) >= 4
        assert all(file.stat().st_mode & 0o007 == 0 for file in files)


READER = "import pathlib, sys; from edge_asr.outbox import *; print(read_statistics(pathlib.Path(sys.argv[1])))"


def test_another_process_reads_the_statistics_while_the_outbox_is_being_written(path: Path) -> None:
    async def main() -> None:
        with opened(path) as outbox:
            await filled(outbox, 10)
            reader = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", READER, str(path)), stdout=asyncio.subprocess.PIPE
            )
            answer = asyncio.create_task(reader.communicate())
            while not answer.done():
                await outbox.append(draft())
            assert b"Statistics(waiting={'command': 0, 'transcript': " in answer.result()[0]
            assert (await outbox.statistics()).waiting == read_statistics(path).waiting

    asyncio.run(main())


def test_reading_the_statistics_of_a_resting_outbox_leaves_no_trace(path: Path) -> None:
    committed_file(path, 3)
    before = {file: file.stat().st_mtime_ns for file in path.parent.iterdir()}
    statistics = read_statistics(path)
    assert statistics.waiting["transcript"] == statistics.last_seq == 3
    assert {file: file.stat().st_mtime_ns for file in path.parent.iterdir()} == before


def test_the_statistics_of_a_killed_daemons_outbox_can_be_read(path: Path, tmp_path: Path) -> None:
    with opened(path) as outbox:
        asyncio.run(outbox.append(draft(), draft("go", "command")))
        left = tmp_path / "left"
        shutil.copytree(path.parent, left)
    assert (left / "outbox.db-wal").stat().st_size > 0
    assert read_statistics(left / "outbox.db").last_seq == 2


def test_statistics_without_an_outbox_say_that_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(OutboxError, match="no outbox yet"):
        read_statistics(tmp_path / "outbox.db")


def test_the_age_of_the_oldest_message_is_counted_from_this_boot_at_most(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        with opened(path) as outbox:
            assert (await outbox.statistics()).oldest_age_s is None
            await outbox.append(draft())
            age_s = (await outbox.statistics()).oldest_age_s
            assert age_s is not None
            assert 0 < age_s < 5
            monkeypatch.setattr(clock, "boot_id", lambda: "next")
            monkeypatch.setattr(clock, "boottime_ns", lambda: 90 * clock.NS_PER_S)
            assert (await outbox.statistics()).oldest_age_s == 90

    asyncio.run(main())
