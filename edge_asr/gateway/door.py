"""Who may stay at the door: connections are accepted one by one, and each must bring a whole request header in time.

Law: from the first packet to the end of the header, TLS handshake included, a connection has :data:`ADMISSION_S`; an
address may have :data:`MAX_WAITING` that are not through yet, and as many in all as the settings say, a part of the
:data:`MAX_CONNECTIONS` that there may be (``addresses`` says whom that counts). Whoever holds connections open
therefore fills neither memory nor descriptors nor the door, and those who talk do not notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final

from edge_asr.gateway.addresses import counted, full

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
        """Address or network -> connections that have not brought a header yet."""
        self._deadlines: dict[asyncio.BaseProtocol, tuple[Mapping[str, int], asyncio.TimerHandle]] = {}
        self._present: dict[socket.socket, Mapping[str, int]] = {}
        """Whom connections count for. Not transports: before Python 3.11 one of TLS does not say it is closed."""
        self._arrivals: dict[asyncio.Task[None], Mapping[str, int]] = {}
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
                who = counted(str(peer[0]))
                if full(who, self._waiting, MAX_WAITING) or self._is_full(who):
                    self.turned_away += 1
                    connection.close()
                    await asyncio.sleep(0)  # where others wait, accepting gives way to nobody
                    continue
                self._waiting.update(who.keys())
                task = asyncio.create_task(self._arrive(factory, connection, who), name=f"arrival:{peer[0]}")
                self._arrivals[task] = who
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
            who, deadline = found
            deadline.cancel()
            self._leave(who)

    def _is_full(self, who: Mapping[str, int]) -> bool:
        """Whether there is no room, or none for these."""
        self._present = {each: whose for each, whose in self._present.items() if each.fileno() >= 0}
        here = [*self._present.values(), *self._arrivals.values()]
        taken = {each: sum(each in whose for whose in here) for each in who}
        return len(here) >= MAX_CONNECTIONS or full(who, taken, self._max_per_address) is not None

    async def _arrive(
        self, factory: Callable[[], asyncio.Protocol], connection: socket.socket, who: Mapping[str, int]
    ) -> None:
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
            self._leave(who)
            connection.close()
            return
        self._present[connection] = who

        def overdue() -> None:
            self.turned_away += 1
            transport.abort()
            self.admit(protocol)

        self._deadlines[protocol] = who, loop.call_at(began + ADMISSION_S, overdue)

    def _leave(self, who: Mapping[str, int]) -> None:
        for each in who:
            self._waiting[each] -= 1
            if not self._waiting[each]:
                del self._waiting[each]


def _listening(host: str, port: int) -> socket.socket:
    with contextlib.suppress(OSError, ValueError):  # the unit may forbid it, and sets its own limit then
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2 * MAX_CONNECTIONS)), hard))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = family is socket.AF_INET6 and socket.has_dualstack_ipv6()  # of `::`; another address has one kind
    listening = socket.create_server((host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=both)
    listening.setblocking(False)  # noqa: FBT003 - the library's own signature
    return listening
