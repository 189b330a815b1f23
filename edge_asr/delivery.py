"""Decides what one connection sends next, how much at a time, and what the broker's answers change in the outbox.

Law:

- A message leaves the outbox only after a PUBACK with a reason code below 0x80. A refused one is tried again in its
  place and alone, and what becomes of it is for ``refusals`` to say; of what is newer only what was in flight with it
  (a window less one), a witness and the live command of the next rule may pass it.
- Order is the outbox's. One exception: while messages from before this connection (the backlog, ``replayed``) are being
  sent, a command committed since goes first, because its life is short. So that it need not wait in a slower consumer's
  queue either, the backlog is sent at no more than ``mqtt.replay_per_s``.
- Before each sending a command's life is looked at. If it ends while the command is in flight, the connection is reset
  and the kernel's send buffer with it: nothing that sits on a dead link may come out later.

Limit: a broker that is frozen *after* taking our bytes may hand a command on when it thaws; consumers compare
``expires_at``.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from typing import Final

from paho.mqtt.reasoncodes import ReasonCode

from edge_asr.contract import Renderer
from edge_asr.events import Message
from edge_asr.link import WINDOW, Link
from edge_asr.outbox import Outbox, life_left_s
from edge_asr.refusals import Refusals

_PAGE: Final = 64
"""Messages read from the outbox at a time."""

_CANCEL_AGAIN_S: Final = 1.0
"""Before Python 3.12 wait_for may swallow a cancellation."""


class Pace:
    """So many a second, in bursts of up to a window."""

    def __init__(self, per_s: float) -> None:
        self._gap_s = 1 / per_s
        self._due_s = -math.inf

    def wait_s(self, now_s: float) -> float:
        """Seconds until the next may go; then some may, so that waiting does not cost a timer each. 0: now."""
        return 0.0 if self._due_s <= now_s else self._due_s - now_s + self._gap_s * (WINDOW // 2)

    def count(self, now_s: float) -> None:
        """One goes now."""
        self._due_s = max(self._due_s, now_s - self._gap_s * WINDOW) + self._gap_s


class Delivery:
    """What one connection takes from the outbox: which message is next, what is in flight, what came back."""

    def __init__(
        self, link: Link, outbox: Outbox, renderer: Renderer, pace: Pace, refusals: Refusals, *, cautious: bool
    ) -> None:
        self.cautious = cautious
        """One message at a time, until the broker takes one: several were in flight when it ended a connection."""
        self._link = link
        self._outbox = outbox
        self._renderer = renderer
        self._pace = pace
        self._refusals = refusals
        self._loop = asyncio.get_running_loop()
        self._stir = asyncio.Event()
        """Something happened: a PUBACK, a new message, the end of a pause or of the connection."""
        self._backlog_end = outbox.last_seq
        self._cursor = 0
        """The newest sequence number taken in order."""
        self._page: deque[Message] = deque()
        self._overtaking_cursor = self._backlog_end
        self._overtook: set[int] = set()
        """Sent ahead of the cursor."""
        self.on_delivered: Callable[[str, Message, bool], None] = lambda _topic, _message, _replayed: None
        self.on_answer: Callable[[Message | None, ReasonCode], None] = lambda _message, _reason: None
        """Called with every PUBACK, and before the room that it makes is used."""
        self._left_as: dict[int, str] = {}
        """Sequence number -> topic, of what is in flight."""
        self._taken: list[int] = []
        """Acknowledged by the broker, not yet removed from the outbox."""
        self._refused: list[tuple[Message, str, ReasonCode]] = []
        """With the topic that it left as."""
        self._state_refused = ""
        """Why the broker did not take a retained state."""
        self._leaving = False
        self._told = False
        """Whether the outbox knows what the broker refuses."""
        link.on_puback = self._puback
        link.on_end = self._stir.set

    def leave(self) -> None:
        """Send no more."""
        self._leaving = True
        self._stir.set()

    def reconsider(self) -> None:
        """What the broker is known to refuse has changed."""
        self._told = False
        self._stir.set()

    async def run(self) -> None:
        """Send and settle until the connection ends or it is time to leave."""
        watch = asyncio.create_task(self._watch(), name="publisher-outbox-watch")
        watch.add_done_callback(lambda _: self._stir.set())
        self._wake_at(self._refusals.resume_at_s)
        try:
            while not (self._link.ended or self._leaving or watch.done()):
                self._stir.clear()
                await self._settle()
                await self._send()
                await self._stir.wait()
            await self._settle()
            if self._link.ended:
                await self._blame()
        finally:
            await dismiss(watch)

    async def room(self) -> None:
        """Wait until the broker takes one more."""
        while self._link.is_busy and not self._link.ended:
            self._stir.clear()
            await self._stir.wait()

    async def finish(self) -> None:
        """Wait until nothing is in flight, and settle."""
        while self._link.in_flight and not self._link.ended:
            self._stir.clear()
            await self._stir.wait()
        await self._settle()

    async def _watch(self) -> None:
        seen = self._outbox.last_seq
        while True:
            await self._outbox.arrival(seen)
            for category in self._refusals.sheds_light():
                if await self._outbox.oldest(1, seen, category):
                    self._refusals.resume()
            seen = self._outbox.last_seq
            self._stir.set()

    async def _settle(self) -> None:
        """Remove what the broker took; go back to what it refused, or put it aside."""
        if self._taken:
            taken = tuple(self._taken)
            await self._outbox.acknowledge(taken)
            del self._taken[: len(taken)]
        while self._refused:
            message, topic, reason = self._refused[0]
            told = f"the broker refused it: {reason}"
            fate = self._refusals.refused(message, topic, str(reason), reason.value, self._loop.time())
            del self._refused[0]
            if fate == "aside":
                await self._put_aside(message, topic, told)
            else:
                self._go_back(message.seq)
                self._wake_at(self._refusals.resume_at_s)
        if not self._told:
            self._told = True
            trouble = self._refusals.trouble
            await self._outbox.note_refusal(f"{trouble.detail}; {trouble.remedy}" if trouble else "")

    async def _blame(self) -> None:
        """The connection has ended: find out whether it is always the same message over which it does."""
        flying = [flight.message for flight in self._link.in_flight.values()]
        if self._link.ended_by_peer and (flying or self._state_refused):
            suspect = flying[0] if flying else None
            if suspect is None:
                reason = self._state_refused or self._link.ended
                self._refusals.ended_over_state(reason, self._loop.time())
            elif len(flying) == 1 and self._window == 1:
                topic = self._left_as[suspect.seq]
                if self._refusals.ended(suspect, topic, self._link.ended, self._loop.time()) == "aside":
                    await self._put_aside(suspect, topic, f"whenever it is sent, {self._link.ended}")
            self.cautious = True

    async def _put_aside(self, message: Message, topic: str, reason: str) -> None:
        await self._outbox.put_aside(message.seq, reason)
        self._refusals.put_aside(message, topic)

    def _go_back(self, seq: int) -> None:
        """Let a message be the next one."""
        self._overtook.discard(seq)
        self._cursor = min(self._cursor, seq - 1)
        if seq > self._backlog_end:
            self._overtaking_cursor = min(self._overtaking_cursor, seq - 1)
        self._page.clear()

    async def _send(self) -> None:
        while self._may_send():
            accused = self._refusals.accused
            message = await (self._next() if accused is None else self._next_witness(accused))
            if message is None:
                return
            if not self._may_send():  # a refusal or the end came while the outbox was read
                self._go_back(message.seq)
                return
            life_s = life_left_s(message)
            replayed = message.seq <= self._backlog_end
            payload = self._renderer.message(message, replayed=replayed, life_left_s=life_s)
            if replayed:
                self._pace.count(self._loop.time())
            if self._link.fits(payload):
                self._left_as[message.seq] = payload.topic.removeprefix(f"{self._renderer.root}/")
                deadline_s = life_s if payload.expires_s is not None else None
                if accused is not None:
                    self._refusals.summoned(message.seq)
                    self._overtook.add(message.seq)
                self._link.publish(payload, qos=1, message=message, deadline_s=deadline_s)
            else:
                await self._outbox.put_aside(message.seq, "larger than the broker's maximum packet size")
                self._refusals.forget(message.seq)

    @property
    def _window(self) -> int:
        return 1 if self.cautious or self._refusals.wanted else self._link.window

    def _may_send(self) -> bool:
        waits = self._refused or self._loop.time() < self._refusals.resume_at_s
        return not (self._link.ended or self._leaving or waits or len(self._link.in_flight) >= self._window)

    async def _next(self) -> Message | None:
        """The message that is due; None: nothing is, yet."""
        command = await self._next_overtaking()
        if command is not None:
            return command
        if self._too_early():
            return None
        while self._page or await self._turn_page():
            message = self._page.popleft()
            self._cursor = message.seq
            if message.seq in self._overtook:
                self._overtook.discard(message.seq)
            elif message.seq not in self._handled():
                for gone in (seq for seq in self._refusals.wanted if seq < message.seq):
                    self._refusals.forget(gone)  # the quota took it, or it would have come before this one
                return message
        return None

    async def _next_witness(self, accused: Message) -> Message | None:
        """What goes before a refused message, to see whether the broker takes anything at all."""
        if self._refusals.called == 0:
            found = [each for each in await self._outbox.oldest(2) if each.seq != accused.seq]
        else:
            kinds = self._refusals.unheard
            found = [each for category in kinds for each in await self._outbox.oldest(1, 0, category)]
        if found:
            return min(found, key=lambda message: message.seq)
        self._refusals.no_witness(self._loop.time())
        self._wake_at(self._refusals.resume_at_s)
        return None

    def _too_early(self) -> bool:
        """Whether the next of the backlog has to wait for its time; it will be looked at again then."""
        wait_s = self._pace.wait_s(self._loop.time()) if self._cursor < self._backlog_end else 0.0
        if wait_s:
            self._loop.call_later(wait_s, self._stir.set)
        return wait_s > 0

    def _wake_at(self, when_s: float) -> None:
        if when_s > self._loop.time():
            self._loop.call_at(when_s, self._stir.set)

    async def _turn_page(self) -> bool:
        newest = self._outbox.last_seq
        if self._cursor >= newest:
            return False
        self._page.extend(await self._outbox.oldest(_PAGE, self._cursor))
        if not self._page:
            self._cursor = newest
        return bool(self._page)

    async def _next_overtaking(self) -> Message | None:
        """A command newer than the backlog that is being sent."""
        newest = self._outbox.last_seq
        while self._cursor < self._backlog_end and self._overtaking_cursor < newest:
            commands = await self._outbox.oldest(1, self._overtaking_cursor, "command")
            self._overtaking_cursor = commands[0].seq if commands else newest
            for command in commands:
                self._overtook.add(command.seq)
                if command.seq not in self._handled():
                    return command
        return None

    def _handled(self) -> set[int]:
        """What going back to a refused message must not send twice."""
        flying = {flight.message.seq for flight in self._link.in_flight.values() if flight.message}
        return flying.union(self._taken)

    def _puback(self, message: Message | None, reason: ReasonCode) -> None:
        self._stir.set()
        if message is not None:
            topic = self._left_as.pop(message.seq, message.topic)
            if reason.is_failure:
                self._refused.append((message, topic, reason))
            else:
                self._taken.append(message.seq)
                self._refusals.taken(message, topic)
                self.cautious = False
                self.on_delivered(topic, message, message.seq <= self._backlog_end)
        elif reason.is_failure:
            self._state_refused = str(reason)
        self.on_answer(message, reason)


async def dismiss(companion: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end; the error that had ended it before is raised."""
    while not companion.done():
        companion.cancel()
        await asyncio.wait([companion], timeout=_CANCEL_AGAIN_S)
    if not companion.cancelled():
        companion.result()
