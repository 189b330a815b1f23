"""What becomes of a session's talks when they do not end as they should: cut off, stopped, garbled, or too fast."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from edge_asr import settings
from edge_asr.audio import read_file
from edge_asr.events import AudioFrame, Utterance
from edge_asr.gateway import wire
from edge_asr.gateway.session import Session
from edge_asr.gateway.talk import Talk, from_pcm16
from edge_asr.gateway.tokens import Station
from edge_asr.speech import SpeechGate
from tests.gateway import recording
from tests.test_gateway import encoded

STOP = recording("20-emergency-stop")


def new_session() -> Session:
    return Session("tablet", Station("tablet", "talk", "", ""), "127.0.0.1")


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
