"""What keeps the daemon honest: no task dies in silence, the watchdog is answered, a full disk costs nothing."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import functools
import itertools
import os
import subprocess
import sys
import threading
import time
import types
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import pytest

from edge_asr import clock, contract, model_store, outbox, outbox_file, pipeline, settings, watchdog
from edge_asr.audio import FrameCutter, quiet, read_file
from edge_asr.engine import Engine
from edge_asr.events import SAMPLE_RATE, AudioFrame, Command, Draft, Message, Rejection, Utterance
from edge_asr.gateway import wire
from edge_asr.gateway.session import BusyError
from edge_asr.gateway.sessions import UPLOAD, Sessions
from edge_asr.gateway.tokens import Tokens
from edge_asr.outbox import Outbox, OutboxError
from edge_asr.pipeline import Pipeline, with_company
from edge_asr.spool import Spool
from edge_asr.watchdog import Watchdog
from edge_asr.worker import Worker
from edge_asr.zygote import Zygote
from tests.broker import wait_until

RECORDINGS = model_store.bundled("recordings")
OPTIONS = settings.Settings(
    sources=(settings.StdinSource(type="stdin"),), commands=settings.Commands(confirm_within_s=4.0)
)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.build(OPTIONS)


class Speaker:
    """A microphone before which recordings are played, then silence until it is closed."""

    name = "stdin"

    def __init__(self, *recordings: str, breaks_off: bool = False) -> None:
        self._pcm = b"".join(read_file(RECORDINGS / name) + quiet(SAMPLE_RATE) for name in recordings)
        self._breaks_off = breaks_off
        self._closed = asyncio.Event()

    async def frames(self) -> AsyncIterator[AudioFrame]:
        cutter = FrameCutter(self.name)
        for frame in cutter.feed(self._pcm, clock.boottime_ns()):
            await asyncio.sleep(0)
            yield dataclasses.replace(frame, captured_ns=clock.boottime_ns())
            if self._breaks_off and frame.position > len(self._pcm) // 4:  # half-way
                yield AudioFrame(self.name, frame.end + 1, b"", clock.boottime_ns())
                break
        await self._closed.wait()

    async def close(self) -> None:
        self._closed.set()


class Shelf:
    """An outbox on a disk that is full for the first so many commits."""

    def __init__(self, full_for: int = 0) -> None:
        self.drafts: list[Draft] = []
        self.changed = asyncio.Condition()
        self.refused = asyncio.Event()
        self._full_for = full_for

    async def append(self, *drafts: Draft) -> tuple[Message, ...]:
        if self._full_for:
            self._full_for -= 1
            self.refused.set()
            raise OutboxError("outbox.db: the disk is full; free some space")
        async with self.changed:
            self.drafts += drafts
            self.changed.notify_all()
        return ()

    async def wait_for(self, topics: Sequence[str]) -> None:
        async with self.changed:
            await asyncio.wait_for(self.changed.wait_for(lambda: [d.topic for d in self.drafts] == list(topics)), 20)


def pipe(engine: Engine, source: Speaker, shelf: Shelf | Outbox, spool: Spool | None = None) -> Pipeline:
    return Pipeline(
        OPTIONS,
        sources=[source],
        new_detector=engine.new_detector,
        engine=engine,
        outbox=shelf,
        live=lambda _topic, _data: None,
        spool=spool,
    )


def test_a_companion_that_dies_ends_the_work_with_its_error() -> None:
    async def dies() -> None:
        raise RuntimeError("a bug")

    async def scenario() -> None:
        work = asyncio.get_running_loop().create_future()
        with pytest.raises(RuntimeError, match="a bug"):
            await with_company(work, asyncio.create_task(dies()))
        assert work.cancelled()

    asyncio.run(scenario())


def test_a_companion_that_ends_well_hides_no_error_of_another() -> None:
    async def scenario() -> None:
        over = asyncio.Event()

        async def ends() -> None:
            over.set()

        async def dies_later() -> None:
            await over.wait()
            await asyncio.sleep(0)
            raise RuntimeError("a bug")

        work = asyncio.get_running_loop().create_future()
        with pytest.raises(RuntimeError, match="a bug"):
            await with_company(work, asyncio.create_task(ends()), asyncio.create_task(dies_later()))

    asyncio.run(scenario())


def test_companions_end_with_the_work() -> None:
    async def scenario() -> None:
        companion = asyncio.create_task(asyncio.sleep(3600))
        await with_company(asyncio.sleep(0), companion)
        assert companion.cancelled()

    asyncio.run(scenario())


def test_an_unanswered_question_is_cancelled_in_silence(engine: Engine) -> None:
    async def scenario() -> None:
        speaker, shelf = Speaker("01-start-line-three.flac"), Shelf()
        line = pipe(engine, speaker, shelf)
        running = asyncio.create_task(line.run())
        await shelf.wait_for([contract.TRANSCRIPT, contract.PENDING, contract.REJECTED])
        await asyncio.sleep(0)
        assert shelf.drafts[-1].data["reason"] == "not-confirmed"
        await speaker.close()
        await running

    asyncio.run(scenario())


def test_what_was_said_before_a_microphone_went_away_is_understood_at_once(engine: Engine) -> None:
    async def scenario() -> None:
        speaker, shelf = Speaker("05-set-oven-temperature.flac", breaks_off=True), Shelf()
        running = asyncio.create_task(pipe(engine, speaker, shelf).run())
        await shelf.wait_for([contract.TRANSCRIPT, contract.REJECTED])
        assert "set the oven" in str(shelf.drafts[0].data["text"])
        assert "degrees" not in str(shelf.drafts[0].data["text"])
        await speaker.close()
        await running

    asyncio.run(scenario())


@pytest.mark.parametrize(("recording", "passes"), [("20-emergency-stop.flac", False), ("05b-cancel.flac", True)])
def test_a_command_that_may_lack_words_is_refused_and_only_cancel_passes(
    engine: Engine, recording: str, *, passes: bool
) -> None:
    whole = Utterance("a", "stdin", 0, read_file(RECORDINGS / recording), clock.boottime_ns())
    assert isinstance(engine.understand(whole, final=True).decision, Command)
    decision = engine.understand(dataclasses.replace(whole, torn=True), final=True).decision
    assert isinstance(decision, Command) == passes
    if not passes:
        assert isinstance(decision, Rejection)
        assert decision.reason == "cut-off"
        assert "'emergency stop'" in decision.detail


def test_a_confirmed_command_is_told_with_what_was_said_to_confirm_it(engine: Engine) -> None:
    async def scenario() -> None:
        speaker, shelf = Speaker("01-start-line-three.flac", "01b-confirm.flac"), Shelf()
        running = asyncio.create_task(pipe(engine, speaker, shelf).run())
        await shelf.wait_for([contract.TRANSCRIPT, contract.PENDING, contract.TRANSCRIPT, contract.COMMAND])
        asked, answered = shelf.drafts[1].data, shelf.drafts[3].data
        assert answered["utterance_id"] == asked["utterance_id"]
        assert answered["confirmed"] is True
        await speaker.close()
        await running

    asyncio.run(scenario())


def test_a_full_disk_delays_a_message_and_loses_none(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "APPEND_RETRY_S", 0.01)

    async def scenario() -> None:
        speaker, shelf = Speaker("20-emergency-stop.flac"), Shelf(full_for=3)
        line = pipe(engine, speaker, shelf)
        running = asyncio.create_task(line.run())
        await shelf.wait_for([contract.TRANSCRIPT, contract.COMMAND])
        await speaker.close()
        await running
        assert line.trouble == ""

    asyncio.run(scenario())


def test_a_stop_on_a_full_disk_ends_in_time_and_says_what_is_lost(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "APPEND_RETRY_S", 0.01)
    monkeypatch.setattr(pipeline, "STOP_LIMIT_NS", 0)

    async def scenario() -> None:
        speaker, shelf = Speaker("20-emergency-stop.flac"), Shelf(full_for=10**9)
        line = pipe(engine, speaker, shelf)
        running = asyncio.create_task(line.run())
        await asyncio.wait_for(shelf.refused.wait(), 20)
        await line.close()
        with pytest.raises(OutboxError, match="2 messages of this stop are lost: outbox"):
            await running

    asyncio.run(scenario())


def test_a_recognizer_without_time_for_another_speaker_still_takes_recordings(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = Sessions(settings.Gateway(), Tokens(tmp_path / "tokens.json"), pipe(engine, Speaker(), Shelf()))
    sessions.check_room("10.0.0.1", "websocket")
    monkeypatch.setattr(pipeline, "BUSY", 0.0)
    with pytest.raises(BusyError, match="no time left for another speaker"):
        sessions.check_room("10.0.0.1", "websocket")
    sessions.check_room("10.0.0.1", UPLOAD)


def test_while_a_question_is_open_its_session_is_read_at_once_and_when_it_is_answered_in_rounds_again(
    engine: Engine, tmp_path: Path
) -> None:
    tokens = Tokens(tmp_path / "tokens.json")
    tokens.add("tablet", "talk")
    said = read_file(RECORDINGS / "01-start-line-three.flac") + quiet(SAMPLE_RATE)

    async def scenario(kept: Outbox) -> None:
        speaker = Speaker()
        line = pipe(engine, speaker, kept)
        sessions = Sessions(settings.Gateway(), tokens, line)
        line.turned = lambda source, speaking: sessions.turned(source, speaking=speaking)
        line.told = lambda message: sessions.told(contract.TOPICS[message.topic], message.data)
        running = asyncio.create_task(line.run())
        session = sessions.open(tokens.stations()[0], "10.0.0.1", "websocket")
        news = asyncio.Event()
        session.watchers.add(news.set)

        async def until(condition: Callable[[], bool]) -> None:
            while not condition():
                await asyncio.wait_for(news.wait(), 20)
                news.clear()

        session.begin(wire.Start(type="start", talk=1))
        await session.take(0, memoryview(said))
        await until(lambda: bool(line.pending) and sessions.rounds_of(session) is None)
        await line.cancel(line.pending[0].id)
        assert sessions.rounds_of(session) is not None
        await sessions.close()
        await speaker.close()
        await running

    with contextlib.closing(Outbox(tmp_path / "outbox.db", 10_000_000)) as kept:
        asyncio.run(asyncio.wait_for(scenario(kept), 60))


def test_no_station_speaks_under_the_name_of_another_station_or_of_a_microphone(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("edge_asr.gateway.sessions.SWEEP_S", 0.01)
    tokens = Tokens(tmp_path / "tokens.json")

    async def scenario() -> tuple[list[str], list[str]]:
        sessions = Sessions(settings.Gateway(), tokens, pipe(engine, Speaker(), Shelf()))

        def sources(*names: str) -> list[str]:
            stations = {station.name: station for station in tokens.stations()}
            return [sessions.open(stations[name], "10.0.0.1", "websocket").source for name in names]

        for name in ("press", "press_2", Speaker.name):
            tokens.add(name, "talk")
        found = sources("press", "press", "press_2", "press_2", Speaker.name)
        tokens.add("press_3", "talk")
        sweeping = asyncio.create_task(sessions.sweep())
        await next(session for session in sessions if session.source == "press_3").settled()
        sweeping.cancel()
        left = [session.source for session in sessions]
        found += sources("press_3")
        await sessions.close()
        return found, left

    found, left = asyncio.run(asyncio.wait_for(scenario(), 20))
    assert found == ["press", "press_3", "press_2", "press_2_2", "stdin_2", "press_3"]
    assert left == ["press", "press_2", "press_2_2", "stdin_2"]
    assert "stdin: a source or a token has this name already; this session is called stdin_2" in caplog.text


def test_what_is_understood_counts_against_the_capacity(engine: Engine) -> None:
    async def scenario() -> None:
        speaker, shelf = Speaker("01-start-line-three.flac"), Shelf()
        line = pipe(engine, speaker, shelf)
        assert line.busy == 0
        running = asyncio.create_task(line.run())
        await shelf.wait_for([contract.TRANSCRIPT, contract.PENDING])
        assert 0 < line.busy < 1
        await speaker.close()
        await running

    asyncio.run(scenario())


def wait_in_the_kernel(fifo: Path) -> None:
    """Stand as under a disk that does not answer (state D), until somebody writes to a FIFO: a vfork's parent does."""
    libc = ctypes.CDLL(None)
    actions = ctypes.create_string_buffer(256)
    libc.posix_spawn_file_actions_init(actions)
    libc.posix_spawn_file_actions_addopen(actions, 9, os.fsencode(fifo), os.O_RDONLY, 0)
    pid, arguments = ctypes.c_int(), (ctypes.c_char_p * 2)(b"true", None)
    assert libc.posix_spawnp(ctypes.byref(pid), b"true", actions, None, arguments, None) == 0
    os.waitpid(pid.value, 0)


@contextlib.contextmanager
def standing_still(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *, deadlocked: bool
) -> Iterator[tuple[Outbox, Watchdog, Callable[[], None]]]:
    """An outbox whose thread stands still in the next probe, what watches it and what lets it go on."""
    fifo, release = folder / "fifo", threading.Event()
    os.mkfifo(fifo)
    stand = release.wait if deadlocked else functools.partial(wait_in_the_kernel, fifo)
    monkeypatch.setattr(outbox._Database, "prove", lambda _database: stand())  # noqa: SLF001
    monkeypatch.setattr(watchdog, "COMMIT_LIMIT_S", 0.2)

    def let_go() -> None:
        if deadlocked:
            release.set()
        else:
            fifo.write_bytes(b"")

    with contextlib.closing(Outbox(folder / "outbox.db", 2**20)) as kept:
        yield kept, Watchdog(Zygote.__new__(Zygote), kept, Worker.__new__(Worker)), let_go


def test_a_slow_disk_is_told_and_waited_for_and_only_one_that_never_answers_is_a_hang(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    async def scenario() -> None:
        with standing_still(monkeypatch, tmp_path, deadlocked=False) as (kept, dog, let_go):
            probing = asyncio.create_task(kept.prove())
            await asyncio.to_thread(wait_until, lambda: kept.unanswered_s > 0.2 and not kept.is_stuck, "the disk")
            for _ in range(5):
                dog.look_at_outbox()
            assert dog.trouble == "the disk of the outbox has not answered for 0.2 s; waiting for it"
            assert dog.hang() == ""
            with monkeypatch.context() as patch:
                patch.setattr(watchdog, "DISK_LIMIT_S", 0.2)
                assert dog.hang().startswith("the disk of the outbox has not answered for")
            await asyncio.to_thread(let_go)
            await probing
            dog.look_at_outbox()
            assert (dog.trouble, dog.hang()) == ("", "")

    asyncio.run(scenario())
    assert [record.levelname for record in caplog.records if "disk of the outbox" in record.message] == [
        "WARNING",
        "INFO",
    ]


def test_time_in_which_everything_was_frozen_counts_against_no_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scenario() -> None:
        with standing_still(monkeypatch, tmp_path, deadlocked=False) as (kept, dog, let_go):
            monkeypatch.setattr(watchdog, "COMMIT_LIMIT_S", 30.0)
            probing = asyncio.create_task(kept.prove())
            await asyncio.to_thread(wait_until, lambda: kept.unanswered_s > 0.0, "the disk")
            kept._since_ns -= 3600 * clock.NS_PER_S  # noqa: SLF001 - as after an hour
            dog.look_at_outbox()
            assert (dog.trouble, dog.hang()) == ("", "")
            await asyncio.to_thread(let_go)
            await probing

    asyncio.run(scenario())


def test_time_in_which_everything_was_frozen_counts_against_no_thread_that_waits_for_the_recognizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "STILL_LIMIT_S", 2.5 * watchdog.LOOK_S)
    hour_ago_s = time.monotonic() - 3600
    asked, clock_s = Worker.__new__(Worker), itertools.count(time.monotonic() + 3600, 3600)
    asked._looks = {1: hour_ago_s}  # noqa: SLF001 - what a question under way leaves
    with contextlib.closing(Outbox(tmp_path / "outbox.db", 2**20)) as kept:
        dog = Watchdog(Zygote.__new__(Zygote), kept, asked)
        monkeypatch.setattr(watchdog, "time", types.SimpleNamespace(monotonic=lambda: next(clock_s)))
        dog.look_at_worker()
        assert dog.hang() == ""
        dog.look_at_worker()
        assert dog.hang() == "the thread that waits for the recognizer has stood still for 4 s"
        asked._looks.clear()  # noqa: SLF001
        dog.look_at_worker()
        assert dog.hang() == ""


HOLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held_by_another(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes to an outbox for as long as its input is open."""
    command, pipe = [sys.executable, "-c", HOLDER, str(path)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        yield holder


def test_another_process_that_holds_the_outboxs_file_is_named_and_waited_for_and_no_disk_is_blamed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(outbox_file, "LOCK_S", 0.2)
    monkeypatch.setattr(watchdog, "COMMIT_INTERVAL_S", 0.1)
    path = tmp_path / "outbox.db"

    async def scenario() -> None:
        with contextlib.closing(Outbox(path, 2**20)) as kept:
            with held_by_another(path) as holder:
                dog = Watchdog(Zygote.__new__(Zygote), kept, Worker.__new__(Worker))
                probing = asyncio.create_task(dog._probe_outbox())  # noqa: SLF001
                await asyncio.to_thread(wait_until, lambda: bool(dog.trouble), "the lock")
                assert f"(process {holder.pid} (python" in dog.trouble
                assert dog.trouble.endswith(") holds its file); let that finish, or stop it")
                assert dog.hang() == ""
                assert holder.stdin is not None
                holder.stdin.close()
            await asyncio.to_thread(wait_until, lambda: not dog.trouble, "its end")
            probing.cancel()

    asyncio.run(scenario())
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "nothing could be committed",
        "the outbox commits again",
    ]


def test_a_stop_does_not_wait_for_ever_for_a_disk_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outbox, "CLOSE_LIMIT_S", 0.1)

    async def scenario() -> None:
        with standing_still(monkeypatch, tmp_path, deadlocked=False) as (kept, _, let_go):
            probing = asyncio.create_task(kept.prove())
            await asyncio.to_thread(wait_until, lambda: kept.unanswered_s > 0.2, "the disk")
            await asyncio.to_thread(kept.close)
            await asyncio.to_thread(let_go)
            await probing

    asyncio.run(scenario())
    assert "outbox.db: its disk does not answer; nobody waits for it any more" in caplog.text


def test_an_outbox_whose_thread_sleeps_over_its_work_is_a_hang_at_the_second_look(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scenario() -> None:
        with standing_still(monkeypatch, tmp_path, deadlocked=True) as (kept, dog, let_go):
            probing = asyncio.create_task(kept.prove())
            await asyncio.to_thread(wait_until, lambda: kept.unanswered_s > 0.2 and kept.is_stuck, "the lock")
            dog.look_at_outbox()
            assert dog.hang() == ""
            dog.look_at_outbox()
            assert dog.hang().endswith("and not because of its disk")
            let_go()
            await probing
            dog.look_at_outbox()
            assert dog.hang() == ""

    asyncio.run(scenario())
