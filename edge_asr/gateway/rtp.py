"""Puts packets of RTP into the order in which they were sent, and gives up those that do not come; says how many. Pure.

Law: a packet that comes in order waits for nothing. One that has overtaken others waits until they have come, or until
:data:`OVERTAKEN` later ones are there: then what is missing is lost. What comes twice or after that is dropped. One
call speaks from a few senders, and not much faster than time goes by; whoever does otherwise does not speak.
"""

from __future__ import annotations

from typing import Final, Generic, TypeVar

OVERTAKEN: Final = 3
"""Packets of a local network overtake each other by one or two, if at all; each waits for 20 to 60 ms."""

LATE: Final = 100
"""A number that lies further back than this is no latecomer: its sender has begun again."""

AHEAD: Final = 3000
"""Nor is one that lies further ahead one of a gap: no connection lives through a minute without packets."""

MAX_SENDERS: Final = 8
"""SSRCs of one call, each of which SRTP remembers: one speaks, one reports; a few more where a sender begins again."""

PACE: Final = 4.0
"""Seconds of audio in one of the clock."""

BURST_S: Final = 20.0
"""So much may come together: longer than a connection lives without packets."""

PACKET_S: Final = 0.0025
"""What a packet costs beside its audio, whatever is in it: so long are Opus' shortest."""

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


class Allowance:
    """What one call may still send."""

    def __init__(self) -> None:
        self._senders: set[bytes] = set()
        self._left_s = BURST_S
        self._spent_at: float | None = None

    def admits(self, sender: bytes) -> bool:
        """Whether there may be a packet of this SSRC."""
        if len(self._senders) < MAX_SENDERS:
            self._senders.add(sender)
        return sender in self._senders

    def spend(self, audio_s: float, now_s: float) -> bool:
        """Whether so much audio may come now."""
        passed_s = 0.0 if self._spent_at is None else now_s - self._spent_at
        self._spent_at = now_s
        self._left_s = min(BURST_S, self._left_s + PACE * passed_s) - audio_s
        return self._left_s >= 0


def later(timestamp: int, other: int) -> int:
    """Samples from one timestamp to another, which count modulo 2**32; negative where the other is the earlier one."""
    return (other - timestamp + (1 << 31)) % (1 << 32) - (1 << 31)
