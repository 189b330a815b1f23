"""Decides whether another speaker fits, from how long recognition was seen to take on this box (pure).

Law: what counts is what nobody may drop, finals and what is foreseen of them; partials give way by themselves.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from edge_asr.clock import NS_PER_S

BUSY: Final = 0.8
"""Share of the time from which on no further speaker fits: a final then waits twice its own decode on average (M/D/1),
and with little more for ever."""

WINDOW_S: Final = 30.0
"""Over which that share is taken: several sentences of everybody."""

LATE_S: Final = 2.0
"""So long a final that comes now may have to wait: behind the longest one on the slowest supported board."""

_MEMORY: Final = 0.9
"""Weight of the past when the next utterance is counted: the last ten or so."""


class Capacity:
    """What one recognizer was seen to do. Times are CLOCK_BOOTTIME."""

    def __init__(self) -> None:
        self._work_s = self._speech_s = 0.0
        self._spells: deque[tuple[int, int]] = deque()
        """(began, ended) of the decodes within the window."""

    def note(self, began_ns: int, ended_ns: int, speech_s: float) -> None:
        """Count an utterance; they come one after the other."""
        self._work_s = self._work_s * _MEMORY + (ended_ns - began_ns) / NS_PER_S
        self._speech_s = self._speech_s * _MEMORY + speech_s
        self._spells.append((began_ns, ended_ns))
        self._forget(ended_ns)

    @property
    def factor(self) -> float:
        """Seconds that a second of speech takes; 0 before anything was heard."""
        return self._work_s / self._speech_s if self._speech_s else 0.0

    def busy(self, now_ns: int) -> float:
        """Share of the window in which it was at work."""
        self._forget(now_ns)
        begin_ns = now_ns - round(WINDOW_S * NS_PER_S)
        return sum(ended - max(began, begin_ns) for began, ended in self._spells) / (WINDOW_S * NS_PER_S)

    def is_late(self, now_ns: int, waiting_s: float, since_ns: int | None) -> bool:
        """Whether a final must wait too long: behind ``waiting_s`` of speech and a decode begun at ``since_ns``."""
        if not waiting_s:
            return False
        under_way_s = 0.0 if since_ns is None else (now_ns - since_ns) / NS_PER_S
        return waiting_s * self.factor + under_way_s > LATE_S

    def _forget(self, now_ns: int) -> None:
        while self._spells and now_ns - self._spells[0][1] >= WINDOW_S * NS_PER_S:
            self._spells.popleft()
