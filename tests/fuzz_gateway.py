"""Any bytes into every parser of the gateway, for a minute together; `tests/test_gateway_abuse.py` has it run.

By hand: pytest tests/fuzz_gateway.py
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import secrets
import struct
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from edge_asr import clock
from edge_asr.events import SAMPLE_RATE
from edge_asr.gateway import wire
from edge_asr.gateway.call import Call, OfferError, check
from edge_asr.gateway.container import Container, ContainerError, decode
from edge_asr.gateway.session import BusyError, Session
from edge_asr.gateway.talk import Talk
from edge_asr.gateway.tokens import Station
from edge_asr.gateway.vosk import _parsed, _rate
from tests.gateway import OFFER
from tests.test_gateway import STOP, encoded

WEBM = encoded(STOP, "webm")
OGG = encoded(STOP, "ogg")

FUZZ_S = 60.0
"""For all parsers together."""

PARSERS = 9


def for_a_while(test: Callable[[], None]) -> Callable[[], None]:
    """Have Hypothesis look for its share of the time, again and again from another seed."""

    def fuzz() -> None:
        deadline = time.monotonic() + FUZZ_S / PARSERS
        while time.monotonic() < deadline:
            seed(secrets.randbits(64))(test)()  # in CI Hypothesis would begin with the same one each time

    fuzz.__name__ = test.__name__
    return fuzz


@for_a_while
@given(
    st.text()
    | st.binary().map(bytes.hex)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps)
)
def test_any_text_is_a_message_or_a_wire_error(text: str) -> None:
    with contextlib.suppress(wire.WireError):
        wire.read(text)


@for_a_while
@given(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["hello", "start", "end", "answer", "ping"])},
        optional={
            name: st.none() | st.booleans() | st.integers() | st.floats() | st.text()
            for name in ("token", "talk", "rate", "age_ms", "format", "session", "have", "answer", "pending_id")
        },
    )
)
def test_any_fields_are_a_message_within_its_bounds_or_a_wire_error(fields: dict[str, Any]) -> None:
    try:
        message = wire.read(json.dumps(fields))
    except wire.WireError as error:
        assert len(str(error)) < 400  # noqa: PT017 - either outcome is right
    else:
        if isinstance(message, wire.Start):
            assert message.rate is None or 8000 <= message.rate <= 192_000
            assert 0 <= message.age_ms <= wire.MAX_AGE_MS


@for_a_while
@given(st.binary(max_size=64))
def test_any_binary_message_is_audio_or_a_wire_error(data: bytes) -> None:
    try:
        position, audio = wire.audio(data)
    except wire.WireError:
        assert len(data) <= 4
    else:
        assert data == struct.pack("<I", position) + bytes(audio)


@for_a_while
@given(st.text(max_size=60))
def test_any_order_of_a_vosk_client_is_one_or_a_wire_error(text: str) -> None:
    with contextlib.suppress(wire.WireError):
        _rate(_parsed(text).get("sample_rate", 16_000))


@for_a_while
@given(
    st.lists(st.tuples(st.integers(0, 40_000), st.integers(0, 4000)), max_size=20),
    st.sampled_from([8000, 16_000, 44_100, 48_000]),
)
def test_whatever_a_sender_repeats_or_skips_positions_only_rise_and_nothing_is_heard_twice(
    pieces: list[tuple[int, int]], rate: int
) -> None:
    async def scenario() -> None:
        talk = Talk("tablet", 1, rate=rate)
        for position, count in pieces:
            talk.offer(position, np.zeros(count, np.int16))
        talk.end()
        frames = [frame async for frame in talk.frames()]
        for one, next_ in itertools.pairwise(frames):
            assert one.end <= next_.position
        assert all(frame.captured_ns <= clock.boottime_ns() for frame in frames)
        heard_s = sum(len(frame.pcm) for frame in frames) / 2 / SAMPLE_RATE
        assert heard_s <= max((position + count for position, count in pieces), default=0) / rate + 0.033

    asyncio.run(scenario())


def damaged(data: bytes, cut: int, place: int, noise: bytes) -> bytes:
    place %= len(data)
    return (data[:place] + noise + data[place + len(noise) :])[: max(1, cut % (2 * len(data)))]


@for_a_while
@given(st.sampled_from([WEBM, OGG]), st.integers(0, 10**6), st.integers(0, 10**6), st.binary(max_size=40))
@hypothesis_settings(max_examples=25)
def test_any_damaged_stream_ends_its_talk_and_nothing_else(data: bytes, cut: int, place: int, noise: bytes) -> None:
    async def scenario() -> None:
        talk = Talk("tablet", 1, rate=48_000)
        complaints: list[str] = []
        container = Container("webm" if data is WEBM else "ogg", talk, complaints.append)
        sending = damaged(data, cut, place, noise)
        for position in range(0, len(sending), 1000):
            await container.put(position, sending[position : position + 1000])
        container.end()
        async for _ in talk.frames():
            pass
        assert talk.ended
        assert talk.position <= 10 * 48_000

    asyncio.run(asyncio.wait_for(scenario(), 20))


@for_a_while
@given(
    st.binary(max_size=200)
    | st.builds(damaged, st.just(WEBM), st.integers(0, 10**6), st.integers(0, 10**6), st.binary())
)
@hypothesis_settings(max_examples=25)
def test_any_upload_is_audio_or_a_container_error(data: bytes) -> None:
    with contextlib.suppress(ContainerError):
        assert len(decode(data, 10.0)) <= 11 * 2 * SAMPLE_RATE


def mangled(lines: list[str], place: int, other: str, end: str = "\r\n") -> str:
    return "".join(f"{other if number == place % len(lines) else line}{end}" for number, line in enumerate(lines))


async def nobody_decides(_session: Session, _answer: wire.Answer) -> None:
    """No question is open."""


SDP_LINES = OFFER.split("\r\n")[:-1]
OTHERS = st.sampled_from([*SDP_LINES, "m=audio 9 UDP/TLS/RTP/SAVPF 0", "a=candidate:1  1 udp 1 ::1 9 typ host"])
LINE_ENDS = st.sampled_from(["\r\n", "\n", "\r", "\v", "\f", "\x1c", "\x85", "\u2028"])


@for_a_while
@given(
    st.text()
    | st.builds(mangled, st.just(SDP_LINES), st.integers(0, 100), st.text(max_size=40) | OTHERS)
    | st.builds(
        mangled, st.just(SDP_LINES), st.integers(0, 100), st.builds("a=x{}{}".format, LINE_ENDS, OTHERS), LINE_ENDS
    )
    | st.integers(0, len(OFFER)).map(lambda end: OFFER[:end])
)
@hypothesis_settings(max_examples=25)
def test_any_offer_is_answered_or_refused(offer: str) -> None:
    async def scenario() -> None:
        session = Session("tablet", Station("tablet", "talk", "", ""), "127.0.0.1")
        call = Call(session, [], None, nobody_decides, lambda _session: None, owns_session=True)
        try:
            check(offer)
            answer = await call.answer(offer, controlled=False)
        except (OfferError, BusyError) as error:
            assert "\n" not in str(error).strip()  # noqa: PT017 - either outcome is right
        else:
            assert answer.count("m=audio") == 1
            assert len(call._peer.getTransceivers()) == 1  # noqa: SLF001 - each has a thread and a queue
        finally:
            await call.close()

    asyncio.run(asyncio.wait_for(scenario(), 20))


CANDIDATE = ["1", "1", "udp", "2130706431", "127.0.0.1", "9", "typ", "host"]
PARTS = st.sampled_from(
    [*CANDIDATE, "tcp", "-1", "::1", "256.1.1.1", "99999999999", "srflx", "raddr", "rport", "tcptype"]
)


@for_a_while
@given(
    st.lists(
        st.builds("a=candidate:{}".format, st.lists(PARTS | st.text(max_size=5), max_size=12).map(" ".join))
        | st.builds(lambda place, other: f"a=candidate:{mangled_words(place, other)}", st.integers(0, 7), PARTS)
        | st.sampled_from(["a=mid:0", "a=mid:1", "a=end-of-candidates", "a=ice-ufrag:x"])
        | st.text(max_size=20).filter(lambda text: ".local" not in text),
        max_size=6,
    )
)
@hypothesis_settings(max_examples=25)
def test_any_fragment_of_candidates_is_taken_or_refused(lines: list[str]) -> None:
    async def scenario() -> None:
        session = Session("tablet", Station("tablet", "talk", "", ""), "127.0.0.1")
        call = Call(session, [], None, nobody_decides, lambda _session: None, owns_session=True)
        try:
            await call.answer(OFFER, controlled=False)
            with contextlib.suppress(OfferError):
                await call.trickle("\r\n".join(lines))
        finally:
            await call.close()

    asyncio.run(asyncio.wait_for(scenario(), 20))


def mangled_words(place: int, other: str) -> str:
    return " ".join([*CANDIDATE[:place], other, *CANDIDATE[place + 1 :]])
