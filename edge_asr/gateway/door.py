"""Who may stay at the door: connections are accepted one by one, and each must bring a whole request header in time.

Law: from the first packet to the end of the header, TLS handshake included, a connection has :data:`ADMISSION_S`; an
address may have :data:`MAX_WAITING` that are not through yet, and as many in all as the settings say, a part of the
:data:`MAX_CONNECTIONS` that there may be. Whoever holds connections open therefore fills neither memory nor
descriptors nor the door, and those who talk do not notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

ADMISSION_S: Final = 10.0
MAX_WAITING: Final = 64
"""Of one address; a browser opens 6."""

MAX_CONNECTIONS: Final = 2048
_BACKLOG: Final = 128
_PAUSE_S: Final = 0.1
"""After the machine had no descriptor left."""


class Door:
    """One listening socket. Raises OSError."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None, max_per_address: int) -> None:
        self._socket = _listening(host, port)
        self._tls = tls
        self._max_per_address = max_per_address
        self._waiting: Counter[str] = Counter()
        """Address -> connections that have not brought a header yet."""
        self._deadlines: dict[asyncio.BaseProtocol, tuple[str, asyncio.TimerHandle]] = {}
        self._present: dict[socket.socket, str] = {}
        """Connection -> its address. Not its transport: before Python 3.11 one of TLS does not say it is closed."""
        self._arrivals: dict[asyncio.Task[None], str] = {}
        """The same, of those who shake hands."""
        self.turned_away = 0
        """Connections closed before they had said anything useful."""

    @property
    def port(self) -> int:
        """The one really in use."""
        return int(self._socket.getsockname()[1])

    async def run(self, factory: Callable[[], asyncio.Protocol]) -> None:
        """Accept until cancelled; each connection is served by a protocol of its own."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    connection, peer = await loop.sock_accept(self._socket)
                except OSError as error:
                    log.warning("no connection can be accepted: %s", error)
                    await asyncio.sleep(_PAUSE_S)
                    continue
                address = str(peer[0])
                if self._waiting[address] >= MAX_WAITING or self._is_full(address):
                    self.turned_away += 1
                    connection.close()
                    await asyncio.sleep(0)  # where others wait, accepting gives way to nobody
                    continue
                self._waiting[address] += 1
                task = asyncio.create_task(self._arrive(factory, connection, address), name=f"arrival:{address}")
                self._arrivals[task] = address
                task.add_done_callback(self._arrivals.pop)
        finally:
            self.close()

    def close(self) -> None:
        """Accept no more."""
        self._socket.close()
        for task in self._arrivals:
            task.cancel()

    def admit(self, protocol: asyncio.BaseProtocol | None) -> None:
        """A whole header has come over this connection."""
        found = self._deadlines.pop(protocol, None) if protocol is not None else None
        if found is not None:
            address, deadline = found
            deadline.cancel()
            self._leave(address)

    def _is_full(self, address: str) -> bool:
        """Whether there is no room, or none for this address."""
        self._present = {each: where for each, where in self._present.items() if each.fileno() >= 0}
        here = [*self._present.values(), *self._arrivals.values()]
        return len(here) >= MAX_CONNECTIONS or here.count(address) >= self._max_per_address

    async def _arrive(self, factory: Callable[[], asyncio.Protocol], connection: socket.socket, address: str) -> None:
        """Shake hands and start the clock."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        handshake_s = None if self._tls is None else ADMISSION_S
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            transport, protocol = await loop.connect_accepted_socket(
                factory, connection, ssl=self._tls, ssl_handshake_timeout=handshake_s
            )
        except (OSError, ssl.SSLError, asyncio.CancelledError):
            self.turned_away += 1
            self._leave(address)
            connection.close()
            return
        self._present[connection] = address

        def overdue() -> None:
            self.turned_away += 1
            transport.abort()
            self.admit(protocol)

        self._deadlines[protocol] = address, loop.call_at(began + ADMISSION_S, overdue)

    def _leave(self, address: str) -> None:
        self._waiting[address] -= 1
        if not self._waiting[address]:
            del self._waiting[address]


def _listening(host: str, port: int) -> socket.socket:
    with contextlib.suppress(OSError, ValueError):  # the unit may forbid it, and sets its own limit then
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2 * MAX_CONNECTIONS)), hard))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    listening.setblocking(False)  # noqa: FBT003 - the library's own signature
    return listening
