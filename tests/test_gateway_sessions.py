"""What becomes of a session's talks when they do not end as they should: cut off, stopped, garbled, or too fast."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import FormData, WSMessage, WSMsgType, web
from aiohttp.test_utils import TestClient, TestServer

from edge_asr import settings
from edge_asr.audio import read_file
from edge_asr.events import SAMPLE_RATE, AudioFrame, Utterance
from edge_asr.gateway import rounds, transcriptions, websocket, wire
from edge_asr.gateway.rules import Rules
from edge_asr.gateway.session import Event, Session
from edge_asr.gateway.sessions import Sessions
from edge_asr.gateway.talk import Talk, from_pcm16
from edge_asr.gateway.tokens import Station, Tokens
from edge_asr.speech import SpeechGate
from tests.gateway import recording
from tests.test_gateway import encoded

STOP = recording("20-emergency-stop")


def new_session() -> Session:
    return Session("tablet", Station("tablet", "talk", "", ""), "127.0.0.1")


class Told:
    """Whoever is told of a session."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def send(self, event: Event) -> None:
        self.events.append(event)

    def cut(self, reason: str) -> None:
        raise AssertionError(reason)


async def utterances(talk: Talk | None) -> list[Utterance]:
    """What a gate makes of a talk in which somebody speaks all along."""
    assert talk
    gate, closed = SpeechGate(settings.Vad()), list[Utterance]()

    def feed(frame: AudioFrame) -> list[Utterance]:
        return gate.feed(frame, 1.0 if frame.pcm else 0.0)

    async for frame in talk.frames():
        closed += feed(frame)
    return closed + gate.flush()


def leave(session: Session) -> None:
    session.close()


def say_something_else(session: Session) -> None:
    session.begin(wire.Start(type="start", talk=2))


def lose_a_piece(session: Session) -> None:
    session.finish(torn=True)


def end(session: Session) -> None:
    session.finish_soon()


def end_and_leave(session: Session) -> None:
    session.finish_soon()
    session.close()


@pytest.mark.parametrize(
    ("how", "torn"),
    [(leave, [True]), (say_something_else, [True]), (lose_a_piece, [True]), (end, [False]), (end_and_leave, [False])],
)
@pytest.mark.parametrize("form", ["pcm16", "webm"])
def test_only_what_its_speaker_has_ended_is_whole(
    how: Callable[[Session], None], torn: list[bool], form: wire.Format
) -> None:
    data = read_file(STOP) if form == "pcm16" else encoded(STOP, "webm")

    async def scenario() -> list[bool]:
        session = new_session()
        session.begin(wire.Start(type="start", talk=1, format=form))
        talk = session.talk
        await session.take(0, memoryview(data))
        how(session)
        return [utterance.torn for utterance in await utterances(talk)]

    assert asyncio.run(scenario()) == torn


def test_a_talk_that_the_daemon_closes_is_cut_off() -> None:
    async def scenario() -> list[bool]:
        talk = Talk("tablet", 1)
        talk.offer(0, from_pcm16(read_file(STOP)))
        await talk.close()
        return [utterance.torn for utterance in await utterances(talk)]

    assert asyncio.run(scenario()) == [True]


def test_what_goes_on_from_another_session_lacks_its_beginning() -> None:
    async def scenario() -> list[bool]:
        talk = Talk("tablet", 1)
        talk.offer(16_000, from_pcm16(read_file(STOP)))
        talk.end()
        return [utterance.torn for utterance in await utterances(talk)]

    assert asyncio.run(scenario()) == [True]


def test_bytes_that_nobody_will_decode_are_not_kept() -> None:
    async def scenario() -> tuple[int, float]:
        session = new_session()
        session.begin(wire.Start(type="start", talk=1, format="webm"))
        talk, container, piece = session.talk, session.container, bytes([255]) * 65_532
        assert talk
        assert container
        for number in range(16):
            await session.take(number * len(piece), memoryview(piece))
        async for _ in talk.frames():
            pass  # until the demuxer has given up
        await container.put(container.position, piece)
        return container.waiting_bytes, await session.take(container.position, memoryview(piece))

    assert asyncio.run(asyncio.wait_for(scenario(), 30)) == (0, 0.0)


def test_a_daemon_that_stops_acknowledges_nothing_more_so_that_the_next_one_is_sent_it() -> None:
    async def scenario() -> tuple[list[Event], int]:
        session, heard = new_session(), Told()
        stops = asyncio.Event()
        session.attach(heard, 0)
        session.stopping = stops.is_set

        async def hear(talk: Talk) -> bool:
            await utterances(talk)
            return True

        running = asyncio.create_task(session.run(hear), name="session")
        second = memoryview(bytes(32_000))
        session.begin(wire.Start(type="start", talk=1))
        await session.take(0, second)
        session.finish()
        session.begin(wire.Start(type="start", talk=2))
        await session.take(0, second)
        assert session.talk
        before = len(heard.events)
        stops.set()  # as a pipeline does it that closes
        await session.talk.close()
        await session.take(16_000, second)
        session.finish()
        await asyncio.wait_for(running, 30)
        return heard.events, before

    events, before = asyncio.run(scenario())
    assert [(event["type"], event["talk"]) for event in events[before:]] == [
        ("listening", 1),
        ("ended", 1),
        ("listening", 2),
    ]


class Ready:
    """A WebSocket whose messages have all come already, so that receiving one never waits."""

    def __init__(self, messages: Sequence[WSMessage]) -> None:
        self.left = [*reversed(messages)]

    async def receive(self, timeout: float) -> WSMessage:
        assert timeout
        return self.left.pop() if self.left else WSMessage(WSMsgType.CLOSED, None, None)


@pytest.mark.parametrize(
    "message",
    [
        WSMessage(WSMsgType.BINARY, bytes(6), None),  # a sample that is known from the second time on
        WSMessage(WSMsgType.TEXT, '{"type":"start","talk":1}', None),
    ],
    ids=["audio", "start"],
)
def test_messages_that_bring_nothing_leave_others_their_turns_and_have_a_pace(
    message: WSMessage, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, most = 200, 20

    async def scenario() -> tuple[int, float]:
        turns, session, loop = 0, new_session(), asyncio.get_running_loop()
        session.begin(wire.Start(type="start", talk=1))
        ready: Any = Ready([message] * count)
        nobody: Any = None
        reading = asyncio.create_task(websocket.Connection(ready, nobody, nobody, "")._read(session), name="read")  # noqa: SLF001
        began = loop.time()
        while not reading.done():
            await asyncio.sleep(0)
            turns += 1
        await reading
        return turns, loop.time() - began

    turns, _ = asyncio.run(scenario())
    assert turns >= count
    monkeypatch.setattr(websocket, "AHEAD_S", most * websocket.MESSAGE_S)
    _, lasted_s = asyncio.run(scenario())
    assert lasted_s >= 0.9 * (count - most) * websocket.MESSAGE_S


def test_a_session_that_fails_leaves_no_demuxer_behind(tmp_path: Path) -> None:
    class Failing:
        """A pipeline that cannot hear."""

        is_late = is_busy = closing = False
        ears: tuple[str, ...] = ()

        async def hear(self, _: Talk) -> bool:
            raise OSError("no detector")

    async def scenario() -> None:
        pipeline: Any = Failing()
        sessions = Sessions(settings.Gateway(), Tokens(tmp_path / "tokens.json"), pipeline)
        session = sessions.open(Station("broken", "talk", "", ""), "127.0.0.1", "websocket")
        session.begin(wire.Start(type="start", talk=1, format="webm"))
        await session.over.wait()
        await asyncio.sleep(0)  # whoever waited for it comes first

    asyncio.run(scenario())
    for each in threading.enumerate():
        if each.name == "demux-broken":
            each.join(30)
            assert not each.is_alive()


def test_a_demuxer_that_waits_for_a_full_talk_ends_quietly_with_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        waits = asyncio.Event()

        async def put(*_: object) -> None:
            waits.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(Talk, "put", put)
        session = new_session()
        session.begin(wire.Start(type="start", talk=1, format="webm"))
        await session.take(0, memoryview(encoded(STOP, "webm")))
        await waits.wait()

    asyncio.run(scenario())  # whose end cancels what the thread waits for
    for each in threading.enumerate():
        if each.name == "demux-tablet":
            each.join(30)
            assert not each.is_alive()


async def stands_still(_: Talk) -> bool:
    return await asyncio.Event().wait()


async def is_cut_off(talk: Talk) -> bool:
    talk.end(torn=True)
    return True


async def fails(_: Talk) -> bool:
    raise OSError("no detector")


async def comes_too_late(_: Talk) -> bool:
    return False


@pytest.mark.parametrize(
    ("hear", "closing", "answer"),
    [
        (stands_still, False, (504, "false", False)),
        (is_cut_off, False, (503, "false", False)),  # its token was revoked
        (is_cut_off, True, (503, "false", False)),
        (fails, False, (503, "false", False)),
        (comes_too_late, True, (503, None, True)),  # nothing was heard: the client may repeat it
    ],
)
def test_only_an_upload_of_which_nothing_was_heard_is_to_be_sent_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hear: Callable[[Talk], Awaitable[bool]],
    answer: tuple[int, str | None, bool],
    *,
    closing: bool,
) -> None:
    monkeypatch.setattr(transcriptions, "WHOLE_S", 2.0)
    monkeypatch.setattr("edge_asr.gateway.talk.BUFFER_S", 0.2)  # of which most is still to come
    assert asyncio.run(asyncio.wait_for(uploaded(tmp_path, hear, closing=closing), 30)) == answer


def test_a_recording_that_came_too_slowly_is_not_said_to_have_been_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transcriptions, "WHOLE_S", 0.0)
    assert asyncio.run(uploaded(tmp_path, fails)) == (408, None, False)


async def uploaded(
    folder: Path, hear: Callable[[Talk], Awaitable[bool]], *, closing: bool = False
) -> tuple[int, str | None, bool]:
    """(status, X-Should-Retry, whether there is a Retry-After) of a recording that a pipeline hears so."""
    pipeline: Any = SimpleNamespace(is_late=False, is_busy=False, closing=closing, ears=(), hear=hear)
    options = settings.Gateway(open=True, tls=False)
    sessions = Sessions(options, Tokens(folder / "tokens.json"), pipeline)
    rules = Rules(options, sessions.tokens, lambda _: None)
    application = web.Application(middlewares=[rules.guard])
    application.add_routes(transcriptions.Transcriptions(sessions, rules, "any").routes())
    form = FormData()
    form.add_field("file", STOP.read_bytes(), filename="stop.flac")
    async with TestClient(TestServer(application)) as client:
        answer = await client.post("/v1/audio/transcriptions", data=form)
        return answer.status, answer.headers.get("X-Should-Retry"), "Retry-After" in answer.headers


def test_what_a_demuxer_has_made_in_the_meantime_counts_against_the_pace() -> None:
    data = memoryview(encoded(STOP, "webm"))
    half = len(data) // 2  # without the rest the demuxer cannot be done yet

    async def scenario() -> tuple[float, float]:
        session = new_session()
        session.begin(wire.Start(type="start", talk=1, format="webm"))
        talk = session.talk
        assert talk
        counted_s = await session.take(0, data[:half])
        async for frame in talk.frames():
            if frame.end > SAMPLE_RATE // 2:
                break
        counted_s += await session.take(half, data[half:])
        return counted_s, talk.taken / talk.rate

    counted_s, taken_s = asyncio.run(scenario())
    assert taken_s > 0.5
    assert counted_s == pytest.approx(taken_s)


def test_what_a_demuxer_makes_of_a_talk_that_is_over_counts_in_the_next_one() -> None:
    data = memoryview(encoded(STOP, "webm"))

    async def scenario() -> tuple[float, float]:
        session = new_session()
        session.begin(wire.Start(type="start", talk=1, format="webm"))
        first = session.talk
        assert first
        counted_s = await session.take(0, data)
        session.begin(wire.Start(type="start", talk=2))
        async for _ in first.frames():
            pass  # until all of it is decoded
        counted_s += await session.take(0, memoryview(bytes(32_000)))
        return counted_s, first.taken / first.rate

    counted_s, first_s = asyncio.run(scenario())
    assert first_s > 0.5
    assert counted_s == pytest.approx(first_s + 1)


class Deaf:
    """A WebSocket whose client reads nothing, so that sending never ends, and says nothing either."""

    async def receive(self, timeout: float | None = None) -> WSMessage:
        await asyncio.Event().wait()
        raise AssertionError(timeout)

    async def send_str(self, _: str) -> None:
        await asyncio.Event().wait()

    async def close(self, code: int) -> None:
        await asyncio.Event().wait()
        raise AssertionError(code)


async def deaf() -> tuple[websocket.Connection, socket.socket]:
    """A connection to such a client, and the client's end of it."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)  # noqa: FBT003
    transport, _ = await asyncio.get_running_loop().connect_accepted_socket(asyncio.Protocol, ours)
    silent: Any = Deaf()
    nobody: Any = None
    return websocket.Connection(silent, rounds.Connection(transport), nobody, ""), theirs


async def closed(theirs: socket.socket) -> bool:
    with theirs:
        return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(theirs, 1), 30) == b""


def test_who_says_no_hello_and_reads_nothing_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "HELLO_S", 0.05)
    monkeypatch.setattr(websocket, "CLOSE_S", 0.01)

    async def scenario() -> bool:
        connection, theirs = await deaf()
        await connection.serve(lambda _: None)
        return await closed(theirs)

    assert asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_session_that_is_over_leaves_a_client_that_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "CLOSE_S", 0.01)

    async def scenario() -> None:
        connection, theirs = await deaf()
        session = new_session()
        session.attach(connection, 0)
        session.tell("status", {})
        with theirs:
            carrying = asyncio.create_task(connection._carry(session), name="carry")  # noqa: SLF001
            await asyncio.sleep(0)
            session.close()
            await carrying
            connection._intake.abort()  # noqa: SLF001

    asyncio.run(asyncio.wait_for(scenario(), 30))
