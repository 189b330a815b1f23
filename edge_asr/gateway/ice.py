"""Says by which ports and servers WebRTC may look for a way, none but those of the settings, and reads its sockets.

Law: sockets for calls are bound within ``udp_ports``; when all are in use the call is refused, not made elsewhere. A
STUN or TURN server is asked only where ``ice_servers`` names it; TURN's password is read from its file for every call,
so it may be renewed, and stands in no log.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import socket
from collections.abc import Callable
from typing import Any, Final

from aiortc import RTCIceServer

from edge_asr.gateway import GatewayError
from edge_asr.gateway.rounds import Rounds
from edge_asr.settings import Gateway

log = logging.getLogger(__name__)

MAX_DATAGRAM_BYTES: Final = 4096
"""Nothing of WebRTC is longer than an Ethernet frame."""

MAX_AT_ONCE: Final = 64
"""Datagrams of one peer before the others have their turn."""


def servers(options: Gateway) -> list[RTCIceServer]:
    """Those of the settings, with what TURN wants to know. Raises GatewayError."""
    password = None
    if options.ice_password_file is not None:
        try:
            password = options.ice_password_file.read_text(encoding="utf-8").partition("\n")[0]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise GatewayError(f"gateway.ice_password_file: {options.ice_password_file}: {reason}") from None
    return [
        RTCIceServer(url, options.ice_username, password) if url.startswith("turn") else RTCIceServer(url)
        for url in options.ice_servers
    ]


class Datagrams(asyncio.DatagramTransport):
    """A UDP socket that is read until it is empty: whenever something has come or, while it rests, in rounds.

    asyncio's own reads one datagram in a turn of the loop, and cannot be told to wait.
    """

    def __init__(self, bound: socket.socket, protocol: asyncio.DatagramProtocol) -> None:
        super().__init__({"socket": bound, "sockname": bound.getsockname()})
        self._socket = bound
        self._protocol = protocol
        self._rounds: Rounds | None = None
        self._loop = asyncio.get_running_loop()
        self._closed = False
        protocol.connection_made(self)
        self._loop.add_reader(bound, self.look)

    def rest(self, rounds: Rounds | None) -> None:
        """Be read now, and then in these rounds; None: as soon as something comes."""
        if rounds is self._rounds or self._closed:
            return
        if self._rounds is None:
            self._loop.remove_reader(self._socket)
        else:
            self._rounds.exclude(self)
        self._rounds = rounds
        if rounds is None:
            self._loop.add_reader(self._socket, self.look)
        else:
            rounds.include(self)
            self.look()

    def look(self) -> None:
        """Take what has come."""
        for _ in range(MAX_AT_ONCE):
            if self._closed:
                return
            try:
                data, address = self._socket.recvfrom(MAX_DATAGRAM_BYTES)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:  # of what was sent before: nobody was there
                self._protocol.error_received(error)
                return
            try:
                self._protocol.datagram_received(data, address)
            except Exception as error:  # noqa: BLE001 - aioice's parser raises what it stumbles over; anybody may send
                log.debug("a datagram from %s is none of ours: %r", address[0], error)
        if self._rounds is not None:
            self._loop.call_soon(self.look)  # there may be more than a round's share

    def sendto(self, data: bytes | bytearray | memoryview, addr: Any = None) -> None:  # noqa: ANN401 - as the base class has it
        """Send now or never: a datagram may be lost."""
        try:
            self._socket.sendto(data, addr)
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self._protocol.error_received(error)

    def is_closing(self) -> bool:
        """Whether it is closed; nothing is ever left to be sent."""
        return self._closed

    def close(self) -> None:
        """Let go of the port."""
        if self._closed:
            return
        if self._rounds is None:
            self._loop.remove_reader(self._socket)
        else:
            self._rounds.exclude(self)
        self._closed = True
        self._socket.close()
        self._loop.call_soon(self._protocol.connection_lost, None)

    def abort(self) -> None:
        """The same."""
        self.close()


def provide(ports: range | None) -> None:
    """From now on whatever opens a UDP socket at any port of an address gets one of these, which may rest.

    aioice takes neither ports nor sockets, but it asks the event loop for them, and nobody else here does.
    """
    loop = asyncio.get_running_loop()
    create: Callable[..., Any] = loop.create_datagram_endpoint

    async def provided(
        factory: Callable[[], asyncio.DatagramProtocol], local_addr: tuple[str, int] | None = None, **more: object
    ) -> tuple[asyncio.DatagramTransport, asyncio.DatagramProtocol]:
        if local_addr is None or local_addr[1]:
            endpoint: tuple[asyncio.DatagramTransport, asyncio.DatagramProtocol]
            endpoint = await create(factory, local_addr, **more)
            return endpoint
        bound, protocol = _bound(local_addr[0], ports), factory()
        return Datagrams(bound, protocol), protocol

    loop.create_datagram_endpoint = provided  # type: ignore[method-assign, assignment]


def _bound(address: str, ports: range | None) -> socket.socket:
    """A UDP socket at any port of these. Raises OSError."""
    (family, *_, where), *_ = socket.getaddrinfo(address, 0, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)
    for port in [0] if ports is None else random.sample(ports, len(ports)):  # so that a port rests after a call
        bound = socket.socket(family, socket.SOCK_DGRAM)
        bound.setblocking(False)  # noqa: FBT003 - the library's own signature
        try:
            bound.bind((where[0], port, *where[2:]))
        except OSError as error:
            bound.close()
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return bound
    assert ports is not None  # noqa: S101 - port 0 is never in use
    raise OSError(errno.EADDRINUSE, f"all UDP ports from {ports[0]} to {ports[-1]} are in use")
