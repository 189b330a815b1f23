"""Packets of a call as a talk's audio: in order, whole in time, and decoded only while somebody listens."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence

import av
import numpy as np
import pytest
from aiortc.rtp import RtpPacket
from hypothesis import given
from hypothesis import strategies as st

from edge_asr.audio import read_file
from edge_asr.events import FRAME_SAMPLES, SAMPLE_RATE, AudioFrame
from edge_asr.gateway import wire
from edge_asr.gateway.call import DEAD_S
from edge_asr.gateway.rtp import BURST_S, LATE, MAX_SENDERS, OVERTAKEN, PACE, PACKET_S, Allowance, InOrder, later
from edge_asr.gateway.session import Session
from edge_asr.gateway.talk import AT_ONCE, OFFERED_S, Talk
from edge_asr.gateway.tokens import Station
from edge_asr.gateway.voice import BEFORE_S, QUIET_S, Voice
from tests.gateway import recording

RATE = 48_000
STEP = RATE // 50
"""Samples of a packet of 20 ms."""


@given(st.integers(0, 65_535), st.integers(1, 200), st.randoms(use_true_random=False))
def test_packets_that_overtake_a_few_others_come_out_in_the_order_in_which_they_were_sent(
    first: int, count: int, chance: random.Random
) -> None:
    sent = sorted(range(count), key=lambda each: each + chance.uniform(0, OVERTAKEN - 1))
    sent.remove(0)  # a call begins where its first packet says
    in_order: InOrder[int] = InOrder()
    came = [each for number in (0, *sent) for each in in_order.take((first + number) % 65_536, number)]
    assert came == list(range(count))


@given(st.integers(0, 65_535), st.lists(st.integers(-90, 200), max_size=100))
def test_whatever_is_lost_or_comes_twice_nothing_comes_out_twice_or_too_late(first: int, steps: list[int]) -> None:
    in_order: InOrder[int] = InOrder()
    numbers, at = [0], 0
    for step in steps:
        at = max(0, *(each - LATE + 10 for each in numbers), at + step)
        numbers.append(at)
    came = [each for number in numbers for each in in_order.take((first + number) % 65_536, number)]
    assert came == sorted(set(came))
    highest = np.maximum.accumulate(numbers)
    rising = [number for number, high, before in zip(numbers[1:], highest[1:], highest, strict=False) if high > before]
    assert {0, *rising[: 1 - OVERTAKEN]} <= set(came)  # no more wait than may still be overtaken


def test_a_sender_that_begins_again_elsewhere_is_followed() -> None:
    in_order: InOrder[str] = InOrder()
    assert [in_order.take(number, "old") for number in (10, 11)] == [["old"], ["old"]]
    assert [in_order.take(number, "new") for number in (40_000, 40_001)] == [["new"], ["new"]]


@given(st.lists(st.floats(0.0, 60.0), min_size=1, max_size=50), st.floats(0.0025, 0.12))
def test_who_sends_as_fast_as_one_speaks_may_do_so_for_ever_however_it_comes_together(
    pauses: list[float], packet_s: float
) -> None:
    allowance = Allowance()
    now_s = 0.0
    for pause_s in pauses:
        now_s += pause_s
        packets = int(min(pause_s, DEAD_S) / packet_s)
        assert allowance.spend(packets * (packet_s + PACKET_S), now_s)


def test_who_sends_faster_than_one_speaks_has_a_burst_and_then_no_more() -> None:
    allowance = Allowance()
    until_s = next(t for t in range(1000) if not allowance.spend(PACE + 1.0, float(t)))
    assert until_s == pytest.approx(BURST_S, abs=5)


def test_a_call_has_so_many_senders_and_those_may_go_on() -> None:
    allowance = Allowance()
    assert [allowance.admits(bytes([number])) for number in range(MAX_SENDERS + 1)] == [True] * MAX_SENDERS + [False]
    assert allowance.admits(bytes([0]))


def test_timestamps_count_in_a_circle() -> None:
    assert later(2**32 - 480, 480) == 960
    assert later(480, 2**32 - 480) == -960


def opus(pcm: bytes, first: int = 0) -> list[RtpPacket]:
    """A recording as a browser sends it; ``first``: its first timestamp."""
    spoken = av.AudioFrame.from_ndarray(np.frombuffer(pcm, "<i2").reshape(1, -1).copy(), format="s16", layout="mono")
    spoken.rate = SAMPLE_RATE
    codec = av.CodecContext.create("libopus", "w")
    codec.format, codec.layout, codec.sample_rate, codec.bit_rate = "s16", "mono", RATE, 64_000
    frames = av.AudioResampler("s16", "mono", RATE, frame_size=STEP).resample(spoken)
    payloads = [bytes(packet) for frame in frames for packet in codec.encode(frame)]
    return [
        RtpPacket(
            payload_type=111, sequence_number=number, timestamp=(first + number * STEP) % 2**32, ssrc=7, payload=payload
        )
        for number, payload in enumerate(payloads)
    ]


SAID = opus(read_file(recording("20-emergency-stop")))


def new_voice(*, controlled: bool) -> tuple[Voice, Session]:
    session = Session("tablet", Station("tablet", "talk", "", ""), "127.0.0.1")
    voice = Voice(session, lambda _audio_s: None)
    voice.controlled = controlled
    return voice, session


async def heard(talk: Talk | None) -> list[AudioFrame]:
    assert talk
    return [frame async for frame in talk.frames()]


def played(packets: Sequence[RtpPacket]) -> list[AudioFrame]:
    """The frames of a call of which these packets come."""

    async def scenario() -> list[AudioFrame]:
        voice, session = new_voice(controlled=False)
        for packet in packets:
            voice.take(packet)
        session.finish()
        return await heard(session.talk)

    return asyncio.run(scenario())


def test_lost_packets_are_filled_with_quiet_and_no_word_comes_too_early() -> None:
    whole, holed = played(SAID), played([*SAID[:40], *SAID[43:]])
    assert [frame.position for frame in holed] == [frame.position for frame in whole]
    there, gone = np.frombuffer(b"".join(frame.pcm for frame in holed), "<i2"), slice(40 * 320 + 16, 43 * 320 - 16)
    assert np.abs(there[gone]).max() < 100  # the resampler's ringing
    settled = slice(55 * 320, None)  # until then the decoder bends back into its curve
    expected = np.frombuffer(b"".join(frame.pcm for frame in whole), "<i2")[settled].astype(float)
    assert np.corrcoef(there[settled], expected)[0, 1] > 0.99


def test_a_long_gap_is_a_jump_of_the_positions() -> None:
    lost = round((QUIET_S + 0.1) * 50)
    frames = played([*SAID[:20], *SAID[20 + lost :]])
    jumps = [two.position - one.end for one, two in itertools.pairwise(frames) if two.position != one.end]
    assert len(jumps) == 1
    assert abs(jumps[0] / SAMPLE_RATE - lost / 50) < 0.04


def test_timestamps_that_wrap_and_packets_that_are_damaged_change_nothing_around_them() -> None:
    wrapping = opus(read_file(recording("20-emergency-stop")), first=2**32 - 30 * STEP)
    assert [frame.pcm for frame in played(wrapping)] == [frame.pcm for frame in played(SAID)]
    damaged = RtpPacket(payload_type=111, sequence_number=30, timestamp=30 * STEP, ssrc=7, payload=b"\xff\xff\xff")
    frames = played([*SAID[:30], damaged, *SAID[31:]])
    assert [frame.position for frame in frames] == [frame.position for frame in played(SAID)]


def test_what_waits_unread_when_a_talk_begins_is_part_of_the_time_before_it() -> None:
    async def scenario() -> int:
        voice, session = new_voice(controlled=True)
        for packet in SAID[:50]:
            voice.take(packet)
        voice._took_at -= 0.2  # noqa: SLF001 - so long ago: as many packets wait in the socket
        session.begin(wire.Start(type="start", talk=1, format="rtp"))
        voice.begin()
        for packet in SAID[50:60]:
            voice.take(packet)
            voice.begin()
        session.finish()
        return sum(len(frame.pcm) for frame in await heard(session.talk)) // 2

    samples = asyncio.run(scenario())
    assert abs(samples / SAMPLE_RATE - BEFORE_S) < 0.05


def test_audio_that_cannot_wait_is_kept_for_a_minute_while_the_recognizer_is_behind() -> None:
    async def scenario() -> None:
        talk = Talk("tablet", 1, rate=SAMPLE_RATE)
        second = np.zeros(SAMPLE_RATE, np.float32)
        for number in range(round(OFFERED_S)):
            talk.offer(number * SAMPLE_RATE, second)
        assert not talk.lost_samples
        talk.offer(round(OFFERED_S) * SAMPLE_RATE, second)
        assert 0 < talk.lost_samples <= 2 * SAMPLE_RATE

    asyncio.run(scenario())


def test_a_backlog_is_heard_in_pieces_between_which_others_have_their_turn() -> None:
    async def scenario() -> list[int]:
        talk, turns, over = Talk("tablet", 1), [0], asyncio.Event()
        talk.offer(0, np.zeros(10 * AT_ONCE * FRAME_SAMPLES, np.float32))
        talk.end()

        async def somebody_else() -> None:
            while not over.is_set():
                turns.append(0)
                await asyncio.sleep(0)

        other = asyncio.create_task(somebody_else())
        async for _ in talk.frames():
            turns[-1] += 1
        over.set()
        await other
        return turns

    turns = asyncio.run(scenario())
    assert sum(turns) >= 10 * AT_ONCE
    assert max(turns) == AT_ONCE


def test_a_talk_has_what_was_said_right_before_its_start_and_nothing_older() -> None:
    async def scenario() -> tuple[float, int]:
        voice, session = new_voice(controlled=True)
        for packet in SAID[:50]:
            voice.take(packet)
        kept_ms = voice.kept_ms
        session.begin(wire.Start(type="start", talk=1, format="rtp", age_ms=kept_ms))
        for packet in SAID[50:60]:
            voice.take(packet)
        session.finish()
        return kept_ms, sum(len(frame.pcm) for frame in await heard(session.talk)) // 2

    kept_ms, samples = asyncio.run(scenario())
    assert kept_ms == 1e3 * BEFORE_S
    assert abs(samples / SAMPLE_RATE - (BEFORE_S + 0.02 + 0.2)) < 0.04


def test_what_a_sender_skips_is_no_audio_to_slow_it_down_for() -> None:
    async def scenario() -> list[float]:
        _, session = new_voice(controlled=True)
        session.begin(wire.Start(type="start", talk=1, rate=RATE))
        piece = memoryview(bytes(2 * STEP))
        return [await session.take(position, piece) for position in (0, 290 * RATE, 290 * RATE + STEP // 2)]

    assert asyncio.run(scenario()) == [0.02, 0.02, 0.01]  # half of the last is there already


def test_the_sender_is_told_how_much_of_it_has_come() -> None:
    async def scenario() -> None:
        voice, _ = new_voice(controlled=True)
        assert voice.report() is None
        for packet in [*SAID[:10], *SAID[15:20]]:
            voice.take(packet)
        report = voice.report()
        assert report
        assert (report.ssrc, report.packets_lost, report.fraction_lost) == (7, 5, 5 * 256 // 20)
        assert report.highest_sequence == 19
        again = voice.report()
        assert again
        assert again.fraction_lost == 0

    asyncio.run(scenario())


def test_what_a_sender_sends_without_end_to_nobody_takes_no_memory() -> None:
    async def scenario() -> None:
        voice, session = new_voice(controlled=True)
        for number in range(2000):
            voice.take(RtpPacket(sequence_number=number, timestamp=5, ssrc=7, payload=b"\xfc\xff\xfe"))
        session.begin(wire.Start(type="start", talk=1, format="rtp"))
        voice.take(RtpPacket(sequence_number=2000, timestamp=5, ssrc=7, payload=b"\xfc\xff\xfe"))
        session.finish()
        assert sum(len(frame.pcm) for frame in await heard(session.talk)) / 2 / SAMPLE_RATE < 3

    asyncio.run(scenario())
