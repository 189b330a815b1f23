"""Reads the sockets of those who are silent in rounds, all of them together, instead of packet by packet.

What silence costs is waking up for it: a processor that slept spends more on that, 25 to 50 times a second, than on all
that is done with a packet. Law: while somebody speaks a socket is read as soon as something has come; otherwise
:data:`ROUND_S` later at most. So the beginning of speech is caught up with, and its end is not late. Between two of
those who are silent the loop looks at everybody else: whoever speaks waits for one of them, not for all.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Final, Protocol

ROUND_S: Final = 0.32
"""Between two rounds within a talk: shorter than the shortest word and the silence after which it is understood."""

WAITING_ROUND_S: Final = 0.16
"""The same of a call while no talk has begun: so much more than intended a talk may have of the time before it."""

ROUND_BYTES: Final = 48 * 1024
"""A connection is read before its round when so much has come: somebody sends faster than speech."""


class Resting(Protocol):
    """A socket at which the event loop does not look by itself."""

    def look(self) -> None:
        """Have what has come read now."""


class Rounds:
    """All that rest for so long at a time."""

    def __init__(self, period_s: float = ROUND_S) -> None:
        self._period_s = period_s
        self._resting: set[Resting] = set()
        self._next: asyncio.TimerHandle | None = None
        """The round to come or, until it has come to its end, the one under way."""

    def include(self, each: Resting) -> None:
        """It rests from now on."""
        self._resting.add(each)
        if self._next is None:
            self._next = asyncio.get_running_loop().call_later(self._period_s, self._go_round)

    def exclude(self, each: Resting) -> None:
        """It does not, or is closed."""
        self._resting.discard(each)

    def _go_round(self) -> None:
        self._look(iter([*self._resting]), asyncio.get_running_loop().time() + self._period_s)

    def _look(self, left: Iterator[Resting], again_at: float) -> None:
        """Look at the next one and, in another turn of the loop, at those behind it."""
        loop = asyncio.get_running_loop()
        each = next((each for each in left if each in self._resting), None)
        if each is not None:
            loop.call_soon(self._look, left, again_at)  # first: whatever becomes of one is nothing to the others
            each.look()
        else:
            self._next = loop.call_at(again_at, self._go_round) if self._resting else None


class Connection:
    """A TCP connection, which the kernel does not report as readable while it rests and little has come."""

    def __init__(self, transport: asyncio.BaseTransport | None) -> None:
        self._transport = transport
        found = transport.get_extra_info("socket") if transport is not None else None
        self._socket: socket.socket | None = found
        self._rounds: Rounds | None = None

    def rest(self, rounds: Rounds | None) -> None:
        """Be read in these rounds; None: as soon as something comes."""
        if rounds is self._rounds:
            return
        if self._rounds is not None:
            self._rounds.exclude(self)
        self._rounds = rounds
        if rounds is not None:
            rounds.include(self)
        self._settle()

    def abort(self) -> None:
        """Close it at once, whatever was still to be sent."""
        if isinstance(self._transport, asyncio.WriteTransport):
            self._transport.abort()

    def look(self) -> None:
        """Have it reported as readable, in the loop's next turn: what comes after that has time again."""
        self._report_from(1)
        asyncio.get_running_loop().call_soon(self._settle)

    def _settle(self) -> None:
        self._report_from(1 if self._rounds is None else ROUND_BYTES)

    def _report_from(self, size: int) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it is closed, or the kernel knows better
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)
