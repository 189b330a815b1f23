"""Who may stay at the door: no address fills it, whatever it does with its connections."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_asr.gateway import addresses, certificates, door
from edge_asr.gateway.addresses import NETWORK_SHARE, counted, plain
from edge_asr.gateway.door import MAX_WAITING, Door
from tests.broker import PATIENCE_S

MANY = 1100
MAX_PER_ADDRESS = 100


class Host(asyncio.Protocol):
    """Lets in who says something, and answers."""

    def __init__(self, at: Door) -> None:
        self._door = at
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        assert self.transport
        self._door.admit(self)
        self.transport.write(data)


@contextlib.asynccontextmanager
async def opened(
    tls: ssl.SSLContext | None = None, most: int = MAX_PER_ADDRESS, where: str = "127.0.0.1"
) -> AsyncIterator[Door]:
    at = Door(where, 0, tls, most)
    hosts: list[Host] = []

    def host() -> Host:
        hosts.append(Host(at))
        return hosts[-1]

    task = asyncio.create_task(at.run(host))
    try:
        yield at
    finally:
        for each in hosts:
            if each.transport:
                each.transport.abort()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def came(at: Door, address: str, stack: contextlib.ExitStack, word: bytes) -> bool:
    """Whether somebody from an address, who says a word or nothing, is still there after it; it stays."""
    here, family = ("::1", socket.AF_INET6) if ":" in address else ("127.0.0.1", socket.AF_INET)
    loop, client = asyncio.get_running_loop(), stack.enter_context(socket.socket(family))
    client.setblocking(False)  # noqa: FBT003 - the library's own signature
    client.bind((address, 0))
    await loop.sock_connect(client, (here, at.port))
    if not word:
        return True
    with contextlib.suppress(ConnectionError):
        await loop.sock_sendall(client, word)
        return await asyncio.wait_for(loop.sock_recv(client, 10), PATIENCE_S) == word
    return False


@pytest.mark.parametrize(("word", "most"), [(b"", MAX_WAITING), (b"GET", MAX_PER_ADDRESS)])
def test_a_thousand_connections_of_one_address_half_open_or_idle_keep_nobody_else_out(word: bytes, most: int) -> None:
    async def crowd() -> None:
        async with opened() as at:
            with contextlib.ExitStack() as stack:
                stayed = [await came(at, "127.0.0.2", stack, word) for _ in range(MANY)]
                assert await came(at, "127.0.0.1", stack, b"hello")
                assert at.turned_away == MANY - most
                if word:
                    assert sum(stayed) == most
                    assert not await came(at, "127.0.0.2", stack, word)

    asyncio.run(crowd())


def test_the_door_of_all_addresses_is_open_to_ipv4_and_to_ipv6_and_counts_each_as_what_it_is() -> None:
    async def crowd() -> None:
        async with opened(where="::") as at:
            with contextlib.ExitStack() as stack:
                for address in ("::1", "127.0.0.1", "127.0.0.2"):
                    stayed = [await came(at, address, stack, b"GET") for _ in range(MAX_PER_ADDRESS + 1)]
                    assert sum(stayed) == MAX_PER_ADDRESS

    asyncio.run(crowd())


@pytest.mark.parametrize(("word", "most"), [(b"", MAX_WAITING // 2), (b"GET", MAX_PER_ADDRESS // 2)])
def test_an_ipv6_network_has_its_limit_beside_those_of_its_addresses(
    word: bytes, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses, "NETWORK_SHARE", 0.5)  # so that it counts before that of the one address here

    async def crowd() -> None:
        async with opened(where="::") as at:
            with contextlib.ExitStack() as stack:
                for _ in range(MAX_PER_ADDRESS):
                    await came(at, "::1", stack, word)
                assert await came(at, "127.0.0.1", stack, b"hello")
                assert at.turned_away == MAX_PER_ADDRESS - most

    asyncio.run(crowd())


@given(st.ip_addresses(v=6), st.integers(0, 2**64 - 1))
def test_whatever_addresses_a_device_takes_of_its_network_the_network_is_counted_with_each(
    one: ipaddress.IPv6Address, suffix: int
) -> None:
    other = ipaddress.IPv6Address(int(one) >> 64 << 64 | suffix)
    if one.ipv4_mapped or other.ipv4_mapped:
        return
    (first, of_first), (second, of_second) = (list(counted(str(each)).items()) for each in (one, other))
    assert (first, second) == ((str(one), 1), (str(other), 1))
    assert of_first == of_second
    network, share = of_first
    assert one in ipaddress.ip_network(network)
    assert share > 1


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_counts_as_itself_over_either_kind_of_socket(address: ipaddress.IPv4Address) -> None:
    assert counted(f"::ffff:{address}") == counted(str(address)) == {str(address): 1}
    assert plain(f"::ffff:{address}") == plain(str(address)) == str(address)


def test_an_address_of_one_cable_is_counted_with_the_others_there() -> None:
    assert counted("fe80::1%eth0") == {"fe80::1%eth0": 1, "fe80::/64": NETWORK_SHARE}


def test_who_leaves_makes_room_for_the_next_of_the_same_address() -> None:
    async def crowd() -> None:
        async with opened() as at:
            for _ in range(4):
                with contextlib.ExitStack() as stack:
                    assert all([await came(at, "127.0.0.2", stack, b"GET") for _ in range(MAX_PER_ADDRESS // 2)])

    asyncio.run(crowd())


def test_who_leaves_after_a_handshake_of_tls_makes_room_as_well(tmp_path: Path) -> None:
    certificates.make(tmp_path, ["127.0.0.1"])
    files = certificates.Files(tmp_path)
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(files.server, files.server_key)
    theirs = ssl.create_default_context(cafile=files.authority)

    async def one_after_the_other() -> None:
        async with opened(ours, most=8) as at:
            for _ in range(12):
                reader, writer = await asyncio.open_connection("127.0.0.1", at.port, ssl=theirs)
                writer.write(b"GET")
                assert await asyncio.wait_for(reader.read(3), PATIENCE_S) == b"GET"
                writer.close()
                await writer.wait_closed()
            assert at.turned_away == 0

    asyncio.run(one_after_the_other())


def test_all_addresses_together_have_an_end_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    async def crowd() -> None:
        async with opened() as at:
            monkeypatch.setattr(door, "MAX_CONNECTIONS", 150)
            with contextlib.ExitStack() as stack:
                stayed = [await came(at, f"127.0.0.{2 + number % 10}", stack, b"GET") for number in range(200)]
                assert sum(stayed) == 150

    asyncio.run(crowd())
