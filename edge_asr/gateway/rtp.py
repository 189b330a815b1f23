"""Puts packets of RTP into the order in which they were sent, and gives up those that do not come. Pure.

Law: a packet that comes in order waits for nothing. One that has overtaken others waits until they have come, or until
:data:`OVERTAKEN` later ones are there: then what is missing is lost. What comes twice or after that is dropped.
"""

from __future__ import annotations

from typing import Final, Generic, TypeVar

OVERTAKEN: Final = 3
"""Packets of a local network overtake each other by one or two, if at all; each waits for 20 to 60 ms."""

LATE: Final = 100
"""A number that lies further back than this is no latecomer: its sender has begun again."""

AHEAD: Final = 3000
"""Nor is one that lies further ahead one of a gap: no connection lives through a minute without packets."""

_NUMBERS: Final = 1 << 16

Packet = TypeVar("Packet")


class InOrder(Generic[Packet]):
    """Packets with their sequence numbers (RFC 3550, 16 bit) go in as they come."""

    def __init__(self) -> None:
        self._next: int | None = None
        """The number whose turn it is."""
        self._early: dict[int, Packet] = {}

    def take(self, number: int, packet: Packet) -> list[Packet]:
        """Take one; returns those whose turn has come."""
        ahead = 0 if self._next is None else (number - self._next) % _NUMBERS
        if self._next is None or AHEAD < ahead < _NUMBERS - LATE:
            self._next = number
            self._early.clear()
        elif ahead > AHEAD:
            return []
        self._early[number] = packet
        if len(self._early) >= OVERTAKEN and self._next not in self._early:
            turn = self._next
            self._next = min(self._early, key=lambda each: (each - turn) % _NUMBERS)
        return self._in_turn()

    def _in_turn(self) -> list[Packet]:
        found = []
        while self._next in self._early:
            found.append(self._early.pop(self._next))
            self._next = (self._next + 1) % _NUMBERS
        return found


def later(timestamp: int, other: int) -> int:
    """Samples from one timestamp to another, which count modulo 2**32; negative where the other is the earlier one."""
    return (other - timestamp + (1 << 31)) % (1 << 32) - (1 << 31)
