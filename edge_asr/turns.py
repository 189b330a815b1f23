"""Decides whose utterance the recognizer hears next: closed ones first, the sources in turn; then what is early.

Law: a final is never dropped. A source has at most :data:`FINALS` of them waiting; whoever adds one more waits, so the
source's own buffer fills instead. Early are partials and what is foreseen: only the newest of a source is kept, and
none while finals wait.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Collection
from typing import Literal

from edge_asr.events import Utterance

FINALS = 8
"""Utterances of one source that may wait for the recognizer; at 20 s each the memory they hold stays under 6 MB."""

Kind = Literal["partial", "foreseen", "final"]
"""What is to be understood: a growing utterance, what one will be unless somebody speaks on, one that is closed."""


class Turns:
    """What waits for the recognizer."""

    def __init__(self) -> None:
        self._finals: dict[str, deque[Utterance]] = {}
        """Source -> its finals in order; the first source is the next whose turn it is."""
        self._unsettled: Counter[str] = Counter()
        """Source -> finals that are not committed yet."""
        self._early: dict[str, tuple[Utterance, Kind]] = {}
        self.partials_dropped = 0
        self._finished = False
        self._changed = asyncio.Condition()

    async def final(self, utterance: Utterance) -> None:
        """Add a final; waits while its source's queue is full."""
        source = utterance.source
        async with self._changed:
            self._drop_early(source)
            await self._changed.wait_for(lambda: len(self._finals.get(source, ())) < FINALS)
            self._finals.setdefault(source, deque()).append(utterance)
            self._unsettled[source] += 1
            self._changed.notify_all()

    async def settle(self, utterance: Utterance) -> None:
        """Say that everything that came of a final is committed."""
        async with self._changed:
            self._unsettled[utterance.source] -= 1
            if not self._unsettled[utterance.source]:
                del self._unsettled[utterance.source]
            self._changed.notify_all()

    async def settled(self, source: str) -> None:
        """Wait until nothing that the source said is still to be committed."""
        async with self._changed:
            await self._changed.wait_for(lambda: source not in self._unsettled)

    @property
    def unsettled(self) -> Collection[str]:
        """Sources of whom something is still to be committed."""
        return self._unsettled.keys()

    @property
    def finals(self) -> int:
        """How many finals wait."""
        return sum(map(len, self._finals.values()))

    @property
    def waiting_s(self) -> float:
        """Seconds of speech in them."""
        return sum(utterance.duration_s for waiting in self._finals.values() for utterance in waiting)

    async def early(self, utterance: Utterance, kind: Kind) -> None:
        """Offer what is not final; it replaces the source's older one and is forgotten when finals wait."""
        async with self._changed:
            self._drop_early(utterance.source)
            self._early[utterance.source] = utterance, kind
            if self._finals:
                self._drop_early(utterance.source)
            self._changed.notify_all()

    def _drop_early(self, source: str) -> None:
        _, kind = self._early.pop(source, (None, None))
        self.partials_dropped += kind == "partial"

    async def finish(self) -> None:
        """Say that nothing will be added."""
        async with self._changed:
            self._finished = True
            self._changed.notify_all()

    async def take(self) -> tuple[Utterance, Kind] | None:
        """(utterance, of which kind), finals first; None when all is done."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._finals or self._early or self._finished)
            if self._finals:
                source = next(iter(self._finals))
                waiting = self._finals.pop(source)
                utterance = waiting.popleft()
                if waiting:
                    self._finals[source] = waiting  # behind all others
                self._changed.notify_all()
                return utterance, "final"
            return self._early.pop(next(iter(self._early))) if self._early else None
