"""Sockets of the silent are read in rounds: nothing before its round, nothing is lost, and haste is heeded at once."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator

import aioice.stun
import pytest

from edge_asr.gateway.ice import Datagrams
from edge_asr.gateway.rounds import ROUND_BYTES, Connection, Rounds
from tests.broker import PATIENCE_S


class Ear(asyncio.Protocol, asyncio.DatagramProtocol):
    """Notes what comes, piece by piece."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.errors: list[Exception] = []
        self.transport: asyncio.BaseTransport | None = None
        self.news = asyncio.Event()
        self.gone = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.news.set()

    def data_received(self, data: bytes) -> None:
        self.heard.append(data)
        self.news.set()

    def datagram_received(self, data: bytes, addr: object) -> None:  # noqa: ARG002 - the library's signature
        self.data_received(data)

    def error_received(self, exc: Exception) -> None:
        self.errors.append(exc)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the library's signature
        self.gone.set()

    async def more(self) -> bytes:
        """All that has come, once there is more."""
        await asyncio.wait_for(self.news.wait(), PATIENCE_S)
        self.news.clear()
        return b"".join(self.heard)


async def other_things() -> None:
    """Turns of the event loop in which it looks at its sockets."""
    one, other = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=one)
    for _ in range(5):
        other.send(b"!")
        await reader.readexactly(1)
    writer.close()
    other.close()


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[tuple[Ear, socket.socket, Connection]]:
    ear, loop = Ear(), asyncio.get_running_loop()
    server = await loop.create_server(lambda: ear, "127.0.0.1", 0)
    with socket.create_connection(server.sockets[0].getsockname()) as client:
        await ear.more()
        yield ear, client, Connection(ear.transport)
    await asyncio.wait_for(ear.gone.wait(), PATIENCE_S)
    server.close()


def test_a_resting_connection_is_read_when_its_round_comes_or_much_has_come_or_it_rests_no_more() -> None:
    async def scenario() -> None:
        async with connected() as (ear, client, connection):
            connection.rest(Rounds(3600))
            for piece in (b"one ", b"two "):
                client.send(piece)
                await other_things()
            assert not ear.heard
            connection.look()
            assert await ear.more() == b"one two "
            client.send(b"three ")
            await other_things()
            assert ear.heard == [b"one two "]
            connection.rest(None)
            assert await ear.more() == b"one two three "
            client.send(b"four ")
            assert await ear.more() == b"one two three four "
            ear.heard.clear()
            connection.rest(Rounds(3600))
            client.sendall(bytes(2 * ROUND_BYTES))
            while len(b"".join(ear.heard)) < ROUND_BYTES:
                await ear.more()
        connection.look()  # of one that is closed

    asyncio.run(scenario())


def test_a_round_comes_by_itself_while_somebody_rests() -> None:
    async def scenario() -> None:
        async with connected() as (ear, client, connection):
            connection.rest(Rounds(0.01))
            for piece in (b"one ", b"two "):
                client.send(piece)
                assert (await ear.more()).endswith(piece)
            connection.rest(None)

    asyncio.run(scenario())


def test_between_two_of_those_who_rest_the_loop_looks_at_everybody_else() -> None:
    async def scenario() -> list[str]:
        loop, said, rounds = asyncio.get_running_loop(), list[str](), Rounds(0.01)
        speaker, other = socket.socketpair()
        over = asyncio.Event()

        class Silent:
            def look(self) -> None:
                said.append("silent")
                if len(said) == 1:
                    other.send(b"!")

        def listen() -> None:
            speaker.recv(1)
            said.append("speaks")
            over.set()

        loop.add_reader(speaker, listen)
        silent = [Silent() for _ in range(10)]
        for each in silent:
            rounds.include(each)
        await asyncio.wait_for(over.wait(), PATIENCE_S)
        loop.remove_reader(speaker)
        for each in silent:
            rounds.exclude(each)
        speaker.close()
        other.close()
        return said

    assert asyncio.run(scenario()).index("speaks") <= 3


def test_a_datagram_that_its_protocol_stumbles_over_ends_neither_the_socket_nor_the_rounds_of_all() -> None:
    class Stumbling(Ear):
        def datagram_received(self, data: bytes, addr: object) -> None:
            if data == bytes.fromhex("000100042112a44200000000000000000000000000240000"):
                aioice.stun.parse_message(data)  # a PRIORITY of no length
            super().datagram_received(data, addr)

    async def scenario() -> None:
        rounds = Rounds(0.01)
        ears, bounds = (Stumbling(), Stumbling()), []
        for ear in ears:
            bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            bound.bind(("127.0.0.1", 0))
            bound.setblocking(False)  # noqa: FBT003 - the library's own signature
            Datagrams(bound, ear).rest(rounds)
            bounds.append(bound)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            for bound in bounds:
                client.sendto(bytes.fromhex("000100042112a44200000000000000000000000000240000"), bound.getsockname())
            for bound, ear in zip(bounds, ears, strict=True):
                client.sendto(b"later", bound.getsockname())
                ear.news.clear()
                assert await ear.more() == b"later"
        for ear in ears:
            assert ear.transport
            ear.transport.close()

    with pytest.raises(struct.error):
        aioice.stun.parse_message(bytes.fromhex("000100042112a44200000000000000000000000000240000"))
    asyncio.run(scenario())


def test_a_resting_udp_socket_is_read_until_it_is_empty_when_its_round_comes_or_it_rests_no_more() -> None:
    async def scenario() -> None:
        bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        bound.bind(("127.0.0.1", 0))
        bound.setblocking(False)  # noqa: FBT003 - the library's own signature
        ear = Ear()
        datagrams = Datagrams(bound, ear)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.connect(bound.getsockname())
            client.send(b"one ")
            assert await ear.more() == b"one "
            datagrams.rest(Rounds(3600))
            for piece in (b"two ", b"three "):
                client.send(piece)
                await other_things()
            assert ear.heard == [b"one "]
            datagrams.look()
            assert ear.heard == [b"one ", b"two ", b"three "]
            client.send(b"four ")
            datagrams.rest(None)
            ear.news.clear()
            assert (await ear.more()).endswith(b"four ")
            datagrams.sendto(b"back", client.getsockname())
            assert client.recv(10) == b"back"
            datagrams.rest(Rounds(3600))
        datagrams.close()
        datagrams.abort()
        await asyncio.wait_for(ear.gone.wait(), PATIENCE_S)
        assert datagrams.is_closing()
        assert not ear.errors

    asyncio.run(scenario())
