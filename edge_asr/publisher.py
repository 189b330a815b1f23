"""Keeps a connection to the broker for ever and carries the outbox there: at least once, oldest first (``delivery``).

Law:

- Of several brokers the first in order that accepts us gets everything. While it is not the very first, the way back is
  tried; once a better connection stands, what is in flight is settled before anything goes there, so that order holds.
- A retained state is sent when the broker's receive maximum has room for it, before any message, and only its newest
  version: everything at QoS 1 counts there. Where no room comes in time the farewell goes at QoS 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Mapping, Sequence

from paho.mqtt.reasoncodes import ReasonCode

from edge_asr import contract
from edge_asr.contract import Payload, Renderer
from edge_asr.delivery import Delivery, Pace, dismiss
from edge_asr.events import Json, Message
from edge_asr.link import Destination, Link, LinkError, destinations
from edge_asr.mailbox import Mailbox
from edge_asr.outbox import Outbox, OutboxError
from edge_asr.refusals import Refusals, Trouble
from edge_asr.requests import Letter
from edge_asr.settings import Mqtt

log = logging.getLogger(__name__)

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
        self._delivery: Delivery | None = None
        self._retained: dict[str, Mapping[str, Json]] = {contract.STATUS: contract.status_data("online")}
        self._due: dict[str | Payload, None] = {}
        """Topics of retained states, and announcements, that wait for room; the oldest first."""
        self._cautious = False
        self._refusals = Refusals(mqtt.max_retry_s)
        self._refused_by: Destination | None = None
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

    @property
    def refusal(self) -> Trouble | None:
        """Why the broker takes nothing although it is there; None: it takes something, as far as we know."""
        return self._refusals.trouble

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
        """Set what the broker shows of this device; sent when there is room, and again at every connection."""
        self._retained[topic] = data
        if self._link is not None:
            self._due[topic] = None
            self._send_due(self._link)

    def _send_due(self, link: Link) -> None:
        for what in list(self._due):
            qos = _RETAINED_QOS[what] if isinstance(what, str) else 1
            if qos == 0 or not link.is_busy:
                del self._due[what]
                payload = self._renderer.state(what, self._retained[what]) if isinstance(what, str) else what
                link.publish(payload, qos=qos, retain=True)

    def _answered(self, message: Message | None, reason: ReasonCode) -> None:
        if message is None and reason.is_failure:
            log.warning("the broker refuses a retained state (%s); check its access rules", reason)
        if self._link is not None:
            self._send_due(self._link)

    def _refusal_changed(self) -> None:
        if self._refusals.trouble is not None:
            log.error("%s; %s", self._refusals.trouble.detail, self._refusals.trouble.remedy)
        else:
            log.info("the broker takes messages again")
        if self._delivery is not None:
            self._delivery.reconsider()
        self._on_change()

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
        delivery = self._delivery = self._deliver_over(link)
        search = asyncio.create_task(self._find_better(link, delivery), name="publisher-better-broker")
        search.add_done_callback(lambda done: delivery.leave() if _failed(done) else None)
        self.to, self.broker = link.to, link.to.address
        self._tell("")  # before the link is in use: what is set on hearing it goes out with the rest
        self._link = link
        self._due = dict.fromkeys([*self._retained, *self._announcements])
        try:
            self._send_due(link)
            await self._outbox.note_broker(self.broker)
            await delivery.run()
            await dismiss(search)
            if self._better is None:
                raise LinkError(f"{link.to.address}: {link.ended}")
            reason = f"publishing to {self._better.to.address} again"
            await self._farewell(link, delivery, reason, _HANDOVER_S)
        except asyncio.CancelledError:
            await self._farewell(link, delivery, "the daemon was stopped", _FAREWELL_S)
            raise
        finally:
            self._link, self._delivery, self.to, self.broker = None, None, None, ""
            self._cautious = delivery.cautious
            link.abort("the connection is no longer wanted")
            self._on_change()
            with contextlib.suppress(OutboxError):
                await self._outbox.note_broker("")
            await dismiss(search)
        better, self._better = self._better, None
        return better

    def _deliver_over(self, link: Link) -> Delivery:
        if link.to != self._refused_by:  # another broker has other rules
            self._refusals = Refusals(self._mqtt.max_retry_s, self._refusal_changed)
            self._refused_by = link.to
        pace = Pace(self._mqtt.replay_per_s)
        delivery = Delivery(link, self._outbox, self._renderer, pace, self._refusals, cautious=self._cautious)
        delivery.on_delivered, delivery.on_answer = self._on_delivered, self._answered
        return delivery

    async def _find_better(self, link: Link, delivery: Delivery) -> None:
        """Try the brokers that come before the one in use, until one accepts us; then the delivery takes its leave."""
        better = self._destinations[: self._destinations.index(link.to)]
        while better and self._better is None:
            await asyncio.sleep(pause_s(_SETTLED, self._mqtt.max_retry_s))
            with contextlib.suppress(LinkError):
                self._better = await self._open_first(better)
                delivery.leave()

    async def _farewell(self, link: Link, delivery: Delivery, reason: str, limit_s: float) -> None:
        """Say offline; the broker answers in order, so the answer also settles what was in flight."""
        self._link, unsaid = None, True  # no other state may come after this one
        gone = self._renderer.state(contract.STATUS, contract.status_data("offline", reason))

        async def settle() -> None:
            nonlocal unsaid
            await delivery.room()
            link.publish(gone, qos=1, retain=True)
            unsaid = False
            await delivery.finish()

        with contextlib.suppress(asyncio.TimeoutError, OutboxError):
            await asyncio.wait_for(settle(), limit_s)
        if unsaid:
            link.publish(gone, qos=0, retain=True)
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


def pause_s(failures: int, longest_s: float) -> float:
    """Exponential with jitter, so that a hall full of devices does not come back in the same instant."""
    pause_s = min(longest_s, _FIRST_RETRY_S * 2.0 ** min(failures, _SETTLED))
    return pause_s * random.SystemRandom().uniform(0.5, 1.0)


def _failed(task: asyncio.Task[None]) -> bool:
    return not task.cancelled() and task.exception() is not None
