"""A station's session: its talks go to the pipeline one after the other, its results come back as numbered events.

Law: a session outlives its connection by the resume time; audio and events are both numbered, so a reconnect repeats
what was lost and nothing twice. Whatever goes wrong in a session ends that session and nothing else. At most
:data:`KEPT_EVENTS` events and :data:`MAX_TALKS` talks wait.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from edge_asr import clock
from edge_asr.events import SAMPLE_RATE, Json
from edge_asr.gateway import wire
from edge_asr.gateway.container import OPUS_RATE, Container, ContainerError
from edge_asr.gateway.talk import Talk, from_pcm16
from edge_asr.gateway.tokens import Station
from edge_asr.hearing import SourceMeter

KEPT_EVENTS = 256
"""More than any resume time can bring."""

MAX_TALKS = 8
"""Talks of one session that may wait for the one before them to be committed."""

ACK_S = 0.5

TAIL_S = 0.2
"""So much later audio by WebRTC may arrive than a message that was sent with it."""

Event = dict[str, Json]
Hear = Callable[[Talk], Awaitable[bool]]


class BusyError(Exception):
    """No room for another session now; the message is for the person who waits."""


class Outlet(Protocol):
    """What carries events to the client."""

    def send(self, event: Event) -> None:
        """Send one, now or soon; never waits."""

    def cut(self, reason: str) -> None:
        """Close the connection, for another has taken over; the session stays."""


class Session:
    """One station's conversation."""

    def __init__(self, source: str, station: Station, address: str) -> None:
        self.id = secrets.token_urlsafe(16)
        """Known to the client only: who has it and the station's token may resume."""
        self.source = source
        self.station = station
        self.address = address
        self.watchers: set[Callable[[], None]] = set()
        """Called when the session becomes attentive or stops being so, and when a talk begins or ends."""
        self.drain: Callable[[], None] = lambda: None
        """Hands over what has come by WebRTC and was not decoded yet."""
        self.stopping: Callable[[], bool] = lambda: False
        """Whether the daemon ends: what it has not acknowledged by then is for the next one."""
        self._speaking = self._letting_go = self._asked = False
        self._loop = asyncio.get_running_loop()  # kept: asking for it, with every packet, is a system call
        self.opened = self.active = self._loop.time()
        self.talk: Talk | None = None
        """The one under way, or the last."""
        self.format: wire.Format = "pcm16"
        """Of the audio of this talk."""
        self.rate = SAMPLE_RATE
        """Hz, of PCM whose start does not say it."""
        self.container: Container | None = None
        """Decodes it, where it comes as a file does."""
        self._skipping = False
        self._acked_s = 0.0
        self._uncounted: list[Talk] = []
        """Those of which there may be more than :meth:`take` has returned."""
        self.place = "", 0.0
        """The utterance that was understood last, and how many seconds into its talk it began."""
        self.meter: SourceMeter | None = None
        """Of the last talk: how loud and how clear it came."""
        self.kind = ""
        """By what way it came, for the dashboard."""
        self._talks: asyncio.Queue[Talk | None] = asyncio.Queue()
        self._events: deque[tuple[int, Event]] = deque(maxlen=KEPT_EVENTS)
        self._count = 0
        self._outlet: Outlet | None = None
        self.over = asyncio.Event()
        """Set when it ends: whoever serves its connection closes it."""
        self._settled = asyncio.Event()
        self._came_too_late = self._heard_all = False

    @property
    def attached(self) -> bool:
        """Whether a connection serves it."""
        return self._outlet is not None

    def attach(self, outlet: Outlet, have: int) -> None:
        """Send events this way from now on, those after number ``have`` at once; whoever did so before is cut off."""
        if self._outlet is not None and self._outlet is not outlet:
            self._outlet.cut("another connection has taken over")
        self._outlet = outlet
        for number, event in self._events:
            if number > have:
                outlet.send(event)

    def detach(self, outlet: Outlet) -> None:
        """The connection is gone, unless another has taken its place."""
        if self._outlet is outlet:
            self._outlet = None
        self.active = self._loop.time()

    @property
    def attentive(self) -> bool:
        """Whether what comes is read as soon as it comes: somebody speaks, or is asked, or the end is near."""
        return self._speaking or self._letting_go or self._asked

    def ask(self, *, asked: bool) -> None:
        """A question to whoever is there has been put, or none is open any more."""
        if asked is not self._asked:
            self._asked = asked
            self._notify()

    def turned(self, *, speaking: bool) -> None:
        """Somebody begins or ends to speak."""
        self._speaking = speaking
        self._notify()

    @property
    def talking(self) -> bool:
        """Whether a talk is under way, in which there may be silence."""
        return self.talk is not None and not self.talk.ended

    def _notify(self) -> None:
        for watcher in tuple(self.watchers):
            watcher()

    def tell(self, kind: str, data: Mapping[str, Json], *, keep: bool = True) -> None:
        """Send an event; ``keep``: number it and repeat it after a reconnect."""
        event: Event = {"type": kind, **data}
        if keep:
            self._count += 1
            event["n"] = self._count
            self._events.append((self._count, event))
        if self._outlet is not None:
            self._outlet.send(event)

    def complain(self, reason: str, detail: str) -> None:
        """Tell the client what is wrong; by the reason, one of docs/gateway.md, it finds words of its own."""
        self.tell("error", {"reason": reason, "detail": detail}, keep=False)

    def begin(self, start: wire.Start) -> None:
        """Start a talk, and cut one off that was not ended; a number that is known goes on with that talk.

        Raises BusyError.
        """
        if self.talk is not None and start.talk <= self.talk.number:
            self._skipping = start.talk < self.talk.number or self.talk.ended
            return
        self.finish(torn=not self._letting_go)
        if self._talks.qsize() >= MAX_TALKS:
            raise BusyError("too many talks wait to be recognized; speak again in a moment")
        self._skipping, self._acked_s = False, 0.0
        self.format = start.format
        rate = (start.rate or self.rate) if start.format == "pcm16" else OPUS_RATE
        age_ns = round(start.age_ms * 1e-3 * clock.NS_PER_S)
        self.talk = talk = Talk(self.source, start.talk, rate=rate, age_ns=age_ns)
        self.container = None
        if start.format in {"webm", "ogg"}:
            self.container = Container(start.format, talk, lambda why: self.complain("lost", why))
        self._talks.put_nowait(talk)
        self._uncounted = [*self._uncounted[-MAX_TALKS:], talk]
        self._notify()

    async def take(self, position: int, data: memoryview) -> float:
        """Audio of the talk under way, as its format has it; waits while it is not heard fast enough.

        Returns the seconds that were new since it was asked last, be it in an earlier talk: a demuxer has them when
        it likes. Raises WireError.
        """
        talk = self.talk
        if talk is None:
            raise wire.WireError("audio before the first start")
        if self._skipping or talk.ended:
            return 0.0  # resent, though it was heard to its end; or behind the end
        self.active = self._loop.time()
        if self.format == "rtp":
            self.format = "pcm16"  # the client has given WebRTC up and goes on here
            self._notify()
        try:
            if self.container is not None:
                await self.container.put(position, bytes(data))
            else:
                await talk.put(position, from_pcm16(data))
        except ValueError as error:
            raise wire.WireError(str(error)) from None
        except ContainerError as error:  # the client cannot help it: this daemon has begun after the talk
            self.complain("lost", str(error))
            self.finish(torn=True)
            self._skipping = True
        self._acknowledge()
        new_s = sum(each.count_s() for each in self._uncounted)
        self._uncounted = [each for each in self._uncounted if not each.ended]
        return new_s

    def offer(self, samples: NDArray[Any], lost: int = 0) -> None:
        """Audio of the talk under way that came by WebRTC: mono, 48 kHz, so many were lost before it; nobody waits."""
        if self.format != "rtp" or self.talk is None:
            return
        self.active = self._loop.time()
        self.talk.offer(self.talk.position + lost, samples)
        self.talk.count_s()  # a call has a pace of its own
        self._acknowledge()

    def finish_soon(self) -> None:
        """The talk under way is over as soon as the audio has come that this message has overtaken."""
        if self.format != "rtp":
            self.finish()
            return
        talk = self.talk
        self._letting_go = self.talking
        self._notify()

        def finish() -> None:
            if self.talk is talk:
                self.finish()

        self._loop.call_later(TAIL_S, finish)

    def finish(self, *, torn: bool = False) -> None:
        """The talk under way is over; ``torn``: not by its sender's own word, so that there may have been more."""
        self._end(torn=torn)
        self._acknowledge(ended=True)

    def _end(self, *, torn: bool) -> None:
        self._letting_go = False
        self.drain()
        if self.container is not None:
            self.container.end(torn=torn)
        elif self.talk is not None:
            self.talk.end(torn=torn)
        self._notify()

    @property
    def position(self) -> int:
        """How far audio of the last talk has come, in its own numbers."""
        if self.container is not None:
            return self.container.position
        return self.talk.position if self.talk is not None else 0

    def _acknowledge(self, *, ended: bool = False) -> None:
        """Tell the client what it need not keep, twice a second."""
        if self.talk is None or self.stopping():
            return
        heard_s = self.talk.position / self.talk.rate
        if ended or self.talk.ended or heard_s - self._acked_s >= ACK_S:
            self._acked_s = heard_s
            ended = ended or self.talk.ended
            self.tell("ack", {"talk": self.talk.number, "position": self.position, "ended": ended}, keep=False)

    def close(self) -> None:
        """End; what was said is still recognized and committed, and a talk under way is cut off.

        What of it was not acknowledged yet is for its client's next session.
        """
        self._end(torn=True)
        self._talks.put_nowait(None)
        self.over.set()

    async def settled(self) -> bool:
        """After :meth:`close`: wait until everything that was said is committed; whether its talk was heard to its end.

        Raises BusyError where the daemon's end was in the way of the whole talk.
        """
        await self._settled.wait()
        if self._came_too_late:
            raise BusyError("the daemon stopped before it was heard; send it again")
        return self._heard_all

    async def run(self, hear: Hear) -> None:
        """Have the talks heard until the session is closed and all that was said is committed."""
        try:
            while (talk := await self._talks.get()) is not None:
                self.tell("listening", {"talk": talk.number})
                self._heard_all = False
                if not await hear(talk):
                    self._came_too_late = True
                    return
                if self.stopping() and talk.torn:
                    return
                self._heard_all = not talk.torn
                self.turned(speaking=False)
                self.active = self._loop.time()
                self.tell("ended", {"talk": talk.number})
        finally:
            self._settled.set()
