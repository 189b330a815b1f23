"""Says by which ports and servers WebRTC may look for a way: none but those of the settings.

Law: sockets for calls are bound within ``udp_ports``; when all are in use the call is refused, not made elsewhere. A
STUN or TURN server is asked only where ``ice_servers`` names it; TURN's password is read from its file for every call,
so it may be renewed, and stands in no log.
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Callable
from typing import Any

from aiortc import RTCIceServer

from edge_asr.gateway import GatewayError
from edge_asr.settings import Gateway

Endpoint = tuple[asyncio.DatagramTransport, asyncio.DatagramProtocol]


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


def keep_within(ports: range, loop: asyncio.AbstractEventLoop) -> None:
    """From now on whatever opens a UDP socket at any port of an address gets one of these.

    aioice takes neither ports nor sockets, but it asks the event loop for them, and nobody else here does.
    """
    create: Callable[..., Any] = loop.create_datagram_endpoint

    async def create_within(
        factory: Callable[[], asyncio.DatagramProtocol], local_addr: tuple[str, int] | None = None, **more: object
    ) -> Endpoint:
        if local_addr is None or local_addr[1]:
            endpoint: Endpoint = await create(factory, local_addr, **more)
            return endpoint
        for port in random.sample(ports, len(ports)):  # so that a port rests after a call
            try:
                endpoint = await create(factory, (local_addr[0], port), **more)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return endpoint
        raise OSError(errno.EADDRINUSE, f"all UDP ports from {ports[0]} to {ports[-1]} are in use")

    loop.create_datagram_endpoint = create_within  # type: ignore[method-assign, assignment]
