"""Carries the outbox to the broker: at least once, oldest first, and never a stale command as a live one.

Law:

- A message leaves the outbox only after a PUBACK with a reason code below 0x80. A refused one is tried again in its
  place and alone; of what is newer only what was in flight with it (a window less one) may pass it, and the live
  command of the next rule. After :data:`REFUSALS` refusals it is put aside as a dead letter. So is one over which the
  broker ends the connection :data:`ENDINGS` times, or it would hold up all others for ever.
- Order is the outbox's. One exception: while messages from before this connection (the backlog, ``replayed``) are being
  sent, a command committed since goes first, because its life is short. So that it need not wait in a slower consumer's
  queue either, the backlog is sent at no more than ``mqtt.replay_per_s``.
- Before each sending a command's life is looked at. If it ends while the command is in flight, the connection is reset
  and the kernel's send buffer with it: nothing that sits on a dead link may come out later.
- Of several brokers the first in order that accepts us gets everything. While it is not the very first, the way back is
  tried; once a better connection stands, what is in flight is settled before anything goes there, so that order holds.

Limit: a broker that is frozen *after* taking our bytes may hand a command on when it thaws; consumers compare
``expires_at``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence

from paho.mqtt.reasoncodes import ReasonCode

from edge_asr import contract
from edge_asr.contract import Payload, Renderer
from edge_asr.events import Json, Message
from edge_asr.link import WINDOW, Destination, Link, LinkError, destinations
from edge_asr.mailbox import Mailbox
from edge_asr.outbox import Outbox, OutboxError, life_left_s
from edge_asr.requests import Letter
from edge_asr.settings import Mqtt

log = logging.getLogger(__name__)

REFUSALS = 4
"""Error PUBACKs after which a message is put aside."""

ENDINGS = 10
"""Connections that may end over a message sent alone; more than refusals, since a broker in trouble does that too."""

_REFUSAL_PAUSE_S = 0.25
"""Before the second try; doubled each time, so a message that nobody will ever take holds up the others for 1.75 s."""

_PAGE = 64
"""Messages read from the outbox at a time."""

_FIRST_RETRY_S = 0.5
_SETTLED = 20
"""Failures after which the pause is the longest."""

_STABLE_AFTER_S = 10.0
"""A connection that held this long starts the pauses afresh; two devices fighting for one client id do not."""

_FAREWELL_S = 1.0
"""The longest a stop waits for the broker."""

_HANDOVER_S = 5.0
"""The longest that a better broker waits for what the old one has not acknowledged; then it gets that as well."""

_RETAINED_QOS = {contract.STATUS: 1, contract.META: 1, contract.HEALTH: 0}


class Publisher:
    """Keeps a connection to the broker for ever and sends through it. Everything is called on the event loop."""

    def __init__(
        self,
        mqtt: Mqtt,
        renderer: Renderer,
        outbox: Outbox,
        *,
        on_change: Callable[[], None] = lambda: None,
        on_request: Callable[[Letter], None] | None = None,
        on_delivered: Callable[[str, Message, bool], None] = lambda _topic, _message, _replayed: None,
        announcements: Sequence[Payload] = (),
    ) -> None:
        """``on_change`` is called whenever ``connected`` or ``trouble`` has changed, ``on_request`` with every request.

        Without ``on_request`` the device listens to no requests. ``on_delivered`` is called with every message that the
        broker has taken: the topic that it left as, itself, whether replayed. ``announcements`` are retained.
        """
        self._on_delivered = on_delivered
        self._announcements = announcements
        self._mqtt = mqtt
        self._destinations = destinations(mqtt)
        self._renderer = renderer
        self._outbox = outbox
        self._on_change = on_change
        self._on_request = on_request
        self._keeps_session = True
        self._link: Link | None = None
        self._better: Link | None = None
        """Stands ready while we take leave of the one in use."""
        self._retained: dict[str, Mapping[str, Json]] = {contract.STATUS: contract.status_data("online")}
        self._cautious = False
        self._endings: Counter[int] = Counter()
        """Sequence number -> connections that ended over it alone, since the daemon began."""
        self.trouble = ""
        """Why there is no connection; empty when there is one, or none was tried."""
        self.broker = ""
        """Host and port of the broker in use; empty: none is."""
        self.to: Destination | None = None
        """The same, with how to speak to it."""

    @property
    def connected(self) -> bool:
        """Whether a broker has accepted us and the connection has not been seen to end."""
        return bool(self.broker)

    async def run(self) -> None:
        """Publish until cancelled; then say offline and hang up. What is unsent stays in the outbox."""
        if not self._destinations:
            log.info("no broker is set (mqtt.host): the outbox keeps everything")
            await asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            began = loop.time()
            try:
                await self._converse()
            except (LinkError, OutboxError) as error:
                self._tell(str(error))
            finally:
                if self._better is not None:
                    self._better.abort("it is not wanted any more")
                    self._better = None
            failures = 0 if loop.time() - began > _STABLE_AFTER_S else failures + 1
            await asyncio.sleep(pause_s(failures, self._mqtt.max_retry_s))

    def publish_live(self, topic: str, data: Mapping[str, Json]) -> None:
        """Send at QoS 0 what is worth nothing later; dropped while offline or while the link is full."""
        if self._link is not None and not self._link.is_full:
            self._link.publish(self._renderer.state(topic, data), qos=0)

    def publish_retained(self, topic: str, data: Mapping[str, Json]) -> None:
        """Set what the broker shows of this device; sent now, and again at every connection."""
        self._retained[topic] = data
        if self._link is not None:
            self._send_retained(self._link, topic)

    def _send_retained(self, link: Link, topic: str) -> None:
        payload = self._renderer.state(topic, self._retained[topic])
        link.publish(payload, qos=_RETAINED_QOS[topic], retain=True)

    async def _converse(self) -> None:
        """From broker to better broker, until a connection ends. Raises LinkError with the reason."""
        link = await self._open_first(self._destinations)
        while True:
            link = await self._serve(link)

    async def _open_first(self, candidates: Sequence[Destination]) -> Link:
        """The first in order that accepts us. Raises LinkError with what is wrong with each."""
        problems = []
        for to in candidates:
            try:
                link = await self._connect(to)
            except LinkError as error:
                problems.append(str(error))
            else:
                if problems:
                    log.warning("%s is used instead of a better broker: %s", to.address, "; ".join(problems))
                return link
        raise LinkError("; ".join(problems))

    async def _connect(self, to: Destination) -> Link:
        """Raises LinkError."""
        will = self._renderer.state(contract.STATUS, contract.status_data("offline", "the connection was lost"))
        client_id = self._mqtt.client_id or f"edge-asr-{self._renderer.device}"
        if self._on_request is None:
            return await Link.open(to, client_id, will)
        mailbox = Mailbox(self._renderer, self._on_request, keep_session=self._keeps_session)
        link = await Link.open(to, client_id, will, mailbox)
        if self._keeps_session and not mailbox.tells_what_waited:
            self._keeps_session = False
            link.abort("a kept session would bring late requests")
            return await self._connect(to)
        return link

    async def _serve(self, link: Link) -> Link:
        """Deliver until a link to a better broker stands, and return that. Raises LinkError if this one ends before."""
        delivery = _Delivery(
            link,
            self._outbox,
            self._renderer,
            _Pace(self._mqtt.replay_per_s),
            self._endings,
            cautious=self._cautious,
        )
        search = asyncio.create_task(self._find_better(link, delivery), name="publisher-better-broker")
        self.to, self.broker = link.to, link.to.address
        delivery.on_delivered = self._on_delivered
        self._tell("")  # before the link is in use: what is set on hearing it goes out with the rest
        self._link = link
        try:
            for topic in self._retained:
                self._send_retained(link, topic)
            for announcement in self._announcements:
                link.publish(announcement, qos=1, retain=True)
            await self._outbox.note_broker(self.broker)
            await delivery.run()
            if self._better is None:
                raise LinkError(f"{link.to.address}: {link.ended}")
            reason = f"publishing to {self._better.to.address} again"
            await self._farewell(link, delivery, reason, _HANDOVER_S)
        except asyncio.CancelledError:
            await self._farewell(link, delivery, "the daemon was stopped", _FAREWELL_S)
            raise
        finally:
            search.cancel()
            await asyncio.gather(search, return_exceptions=True)
            self._link, self.to, self.broker = None, None, ""
            self._cautious = delivery.cautious
            link.abort("the connection is no longer wanted")
            self._on_change()
            with contextlib.suppress(OutboxError):
                await self._outbox.note_broker("")
        better, self._better = self._better, None
        return better

    async def _find_better(self, link: Link, delivery: _Delivery) -> None:
        """Try the brokers that come before the one in use, until one accepts us; then the delivery takes its leave."""
        better = self._destinations[: self._destinations.index(link.to)]
        while better and self._better is None:
            await asyncio.sleep(pause_s(_SETTLED, self._mqtt.max_retry_s))
            with contextlib.suppress(LinkError):
                self._better = await self._open_first(better)
                delivery.leave()

    async def _farewell(self, link: Link, delivery: _Delivery, reason: str, limit_s: float) -> None:
        """Say offline; the broker answers in order, so the answer also settles what was in flight."""
        gone = self._renderer.state(contract.STATUS, contract.status_data("offline", reason))
        link.publish(gone, qos=1, retain=True)
        with contextlib.suppress(asyncio.TimeoutError, OutboxError):
            await asyncio.wait_for(delivery.finish(), limit_s)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(link.hang_up(), _FAREWELL_S)

    def _tell(self, trouble: str) -> None:
        """Log a change of state once, not at every attempt."""
        if trouble and trouble != self.trouble:
            log.warning("not publishing, the outbox keeps everything: %s", trouble)
        elif not trouble:
            log.info("connected to the broker at %s", self.broker)
        self.trouble = trouble
        self._on_change()


class _Pace:
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


class _Delivery:
    """What one connection takes from the outbox: which message is next, what is in flight, what came back."""

    def __init__(
        self, link: Link, outbox: Outbox, renderer: Renderer, pace: _Pace, endings: Counter[int], *, cautious: bool
    ) -> None:
        self._endings = endings
        self.cautious = cautious
        """One message at a time, until the broker takes one: something in flight was refused or ended a connection."""
        self._link = link
        self._outbox = outbox
        self._renderer = renderer
        self._pace = pace
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
        self._left_as: dict[int, str] = {}
        """Sequence number -> topic, of what is in flight."""
        self._taken: list[int] = []
        """Acknowledged by the broker, not yet removed from the outbox."""
        self._refused: list[tuple[int, str]] = []
        self._resume_at = 0.0
        self._leaving = False
        self._wanted: set[int] = set()
        """Refused messages whose fate comes before anything else is sent."""
        link.on_puback = self._puback
        link.on_end = self._stir.set

    def leave(self) -> None:
        """Send no more."""
        self._leaving = True
        self._stir.set()

    async def run(self) -> None:
        """Send and settle until the connection ends or it is time to leave."""
        watch = asyncio.create_task(self._watch(), name="publisher-outbox-watch")
        try:
            while not (self._link.ended or self._leaving):
                self._stir.clear()
                await self._settle()
                await self._send()
                await self._stir.wait()
            await self._settle()
            if self._link.ended:
                await self._blame()
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

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
            seen = self._outbox.last_seq
            self._stir.set()

    async def _settle(self) -> None:
        """Remove what the broker took; go back to what it refused."""
        if self._taken:
            taken = tuple(self._taken)
            await self._outbox.acknowledge(taken)
            del self._taken[: len(taken)]
        while self._refused:
            seq, reason = self._refused[0]
            refusals = await self._outbox.refuse(seq, reason, REFUSALS)
            del self._refused[0]
            if not 0 < refusals < REFUSALS:
                self._wanted.discard(seq)
                self._endings.pop(seq, None)
            else:
                self._go_back(seq)
                pause_s = _REFUSAL_PAUSE_S * 2.0 ** (refusals - 1)
                self._resume_at = self._loop.time() + pause_s
                self._loop.call_later(pause_s, self._stir.set)

    async def _blame(self) -> None:
        """The connection has ended: find out whether it is always the same message over which it does."""
        flying = [flight.message for flight in self._link.in_flight.values()]
        if self._link.ended_by_peer and flying:
            (suspect, *others) = flying
            if self.cautious and suspect is not None and not others:
                self._endings[suspect.seq] += 1
                if self._endings[suspect.seq] >= ENDINGS:
                    await self._outbox.refuse(suspect.seq, f"whenever it is sent, {self._link.ended}", 1)
                    del self._endings[suspect.seq]
            self.cautious = True

    def _go_back(self, seq: int) -> None:
        """Let a message be the next one."""
        self._overtook.discard(seq)
        self._cursor = min(self._cursor, seq - 1)
        if seq > self._backlog_end:
            self._overtaking_cursor = min(self._overtaking_cursor, seq - 1)
        self._page.clear()

    async def _send(self) -> None:
        while self._may_send():
            message = await self._next()
            if message is None:
                return
            if not self._may_send():  # a refusal or the end came while the outbox was read
                self._go_back(message.seq)
                return
            life_s = life_left_s(message) if message.topic == contract.COMMAND else None
            replayed = message.seq <= self._backlog_end
            payload = self._renderer.message(message, replayed=replayed, life_left_s=life_s)
            if replayed:
                self._pace.count(self._loop.time())
            if self._link.fits(payload):
                self._left_as[message.seq] = payload.topic.removeprefix(f"{self._renderer.root}/")
                deadline_s = life_s if payload.expires_s is not None else None
                self._link.publish(payload, qos=1, message=message, deadline_s=deadline_s)
            else:
                await self._outbox.refuse(message.seq, "larger than the broker's maximum packet size", 1)

    def _may_send(self) -> bool:
        window = 1 if self.cautious else self._link.window
        waits = self._refused or self._loop.time() < self._resume_at
        return not (self._link.ended or self._leaving or waits or len(self._link.in_flight) >= window)

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
                return message
        return None

    def _too_early(self) -> bool:
        """Whether the next of the backlog has to wait for its time; it will be looked at again then."""
        wait_s = self._pace.wait_s(self._loop.time()) if self._cursor < self._backlog_end else 0.0
        if wait_s:
            self._loop.call_later(wait_s, self._stir.set)
        return wait_s > 0

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
        if message is None:
            if reason.is_failure:
                log.warning("the broker refuses a retained state (%s); check its access rules", reason)
        elif reason.is_failure:
            self._refused.append((message.seq, f"the broker refused it: {reason}"))
            self._wanted.add(message.seq)
            self.cautious = True
        else:
            self._taken.append(message.seq)
            self._wanted.discard(message.seq)
            self._endings.pop(message.seq, None)
            self.cautious = bool(self._wanted)
            topic = self._left_as.pop(message.seq, message.topic)
            self.on_delivered(topic, message, message.seq <= self._backlog_end)


def pause_s(failures: int, longest_s: float) -> float:
    """Exponential with jitter, so that a hall full of devices does not come back in the same instant."""
    pause_s = min(longest_s, _FIRST_RETRY_S * 2.0 ** min(failures, _SETTLED))
    return pause_s * random.SystemRandom().uniform(0.5, 1.0)
