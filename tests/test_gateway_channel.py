"""What a client that was let in may not do in its own call: leave messages unfinished, speak with many voices."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiortc import AudioStreamTrack, RTCPeerConnection, RTCSessionDescription
from aiortc.rtcsctptransport import SCTP_DATA_FIRST_FRAG, DataChunk, RTCSctpTransport
from aiortc.rtp import RtpPacket

from edge_asr.gateway import rtp, wire
from edge_asr.gateway.call import Call
from edge_asr.gateway.rtp import MAX_SENDERS
from edge_asr.gateway.sctp import MAX_PIECES, WINDOW_BYTES
from edge_asr.gateway.session import Session
from edge_asr.gateway.tokens import Station
from tests.broker import PATIENCE_S
from tests.fuzz_gateway import nobody_decides
from tests.gateway import OFFER, run


class Client:
    """Somebody who calls, with a data channel."""

    def __init__(self) -> None:
        self.peer = RTCPeerConnection()
        self.peer.addTransceiver(AudioStreamTrack(), "sendonly")
        self.channel = self.peer.createDataChannel("events")
        self.events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.channel.on("message", lambda text: self.events.put_nowait(json.loads(text)))


@contextlib.asynccontextmanager
async def called() -> AsyncIterator[tuple[Call, Client]]:
    """A call whose data channel is open, and who made it."""
    session = Session("tablet", Station("tablet", "talk", "", ""), "127.0.0.1")
    call = Call(session, [], None, nobody_decides, lambda _session: None, owns_session=True)
    client = Client()
    peer = client.peer
    try:
        await peer.setLocalDescription(await peer.createOffer())
        answer = await call.answer(peer.localDescription.sdp, controlled=False)
        await peer.setRemoteDescription(RTCSessionDescription(answer, "answer"))
        assert (await asyncio.wait_for(client.events.get(), PATIENCE_S))["type"] == "ready"
        yield call, client
    finally:
        await call.close()
        await peer.close()


async def send_pieces(transport: RTCSctpTransport, count: int, length: int, step: int = 1) -> None:
    """Pieces of a message that never ends, as a client's own SCTP would not send them."""
    flags = SCTP_DATA_FIRST_FRAG
    for place in range(count):
        piece = DataChunk(flags)
        piece.stream_id, piece.stream_seq, piece.protocol = 1, 0, 51
        piece.tsn = (transport._local_tsn + place * step) % (1 << 32)  # noqa: SLF001
        piece.user_data = bytes(length)
        await transport._send_chunk(piece)  # noqa: SLF001
        flags = 0


@pytest.mark.parametrize(
    ("count", "length", "step"),
    [
        (WINDOW_BYTES // 1000 + 1, 1000, 1),
        (MAX_PIECES + 1, 1, 1),
        (MAX_PIECES + 1, 1, 2),
    ],
)
def test_who_sends_a_message_without_end_is_hung_up_on(count: int, length: int, step: int) -> None:
    async def scenario() -> None:
        async with called() as (call, client):
            assert client.peer.sctp
            await send_pieces(client.peer.sctp, count, length, step)
            await asyncio.wait_for(call.ended.wait(), PATIENCE_S)

    run(scenario)


def test_who_opens_a_second_data_channel_is_hung_up_on() -> None:
    async def scenario() -> None:
        async with called() as (call, client):
            client.peer.createDataChannel("more")
            await asyncio.wait_for(call.ended.wait(), PATIENCE_S)

    run(scenario)


def test_a_session_whose_call_has_no_channel_is_not_one_that_its_client_has_left() -> None:
    async def scenario() -> None:
        session = Session("tablet", Station("tablet", "talk", "", ""), "127.0.0.1")
        call = Call(session, [], None, nobody_decides, lambda _session: None, owns_session=True)
        await call.answer(OFFER, controlled=False)
        session.tell("listening", {"talk": 1})  # to nobody
        assert session.attached
        await call.close()
        assert not session.attached

    run(scenario)


def test_what_a_session_tells_to_a_call_with_a_channel_comes_on_it() -> None:
    async def scenario() -> None:
        async with called() as (call, client):
            call.session.tell("listening", {"talk": 1})
            assert (await asyncio.wait_for(client.events.get(), PATIENCE_S))["type"] == "listening"
            assert not call.ended.is_set()

    run(scenario)


def test_a_message_of_the_greatest_length_is_taken_again_and_again() -> None:
    async def scenario() -> None:
        async with called() as (call, client):
            for _ in range(3):
                client.channel.send('{"type":"ping"}'.ljust(wire.MAX_MESSAGE_BYTES))
                assert (await asyncio.wait_for(client.events.get(), PATIENCE_S))["type"] == "pong"
            assert not call.ended.is_set()

    run(scenario)


async def send_packets(client: Client, count: int, payload_type: int, ssrc_of: Callable[[int], int]) -> None:
    """Packets as a client's own sender would not send them."""
    (sender,) = client.peer.getSenders()
    for number in range(count):
        packet = RtpPacket(payload_type=payload_type, sequence_number=number, ssrc=ssrc_of(number), payload=b"\xfc")
        await sender.transport._send_rtp(packet.serialize())  # noqa: SLF001


@pytest.mark.parametrize("payload_type", [111, 5])
def test_who_speaks_as_ever_another_sender_is_hung_up_on_before_srtp_remembers_many(payload_type: int) -> None:
    async def scenario() -> None:
        async with called() as (call, client):
            await send_packets(client, 2 * MAX_SENDERS, payload_type, lambda number: 1000 + number)
            await asyncio.wait_for(call.ended.wait(), PATIENCE_S)

    run(scenario)


def test_who_sends_more_packets_than_it_may_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtp, "BURST_S", 0.1)
    monkeypatch.setattr(rtp, "PACE", 0.0)

    async def scenario() -> None:
        async with called() as (call, client):
            await send_packets(client, 50, 5, lambda _number: 1000)
            await asyncio.wait_for(call.ended.wait(), PATIENCE_S)

    run(scenario)
