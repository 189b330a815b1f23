"""Carries requests from the broker and answers back to it, on one connection, and tells which requests had waited.

Our session outlives the connection by :data:`SESSION_S`, so that the broker keeps a receipt while we are away. What
else it kept must not act late, and MQTT alone does not tell: so every connection subscribes under a new subscription
identifier, and a request that comes under another one reached the broker before. A broker without subscription
identifiers gets no session from us.

Answers go at QoS 0: one that a cut link swallows is got by asking again with the same correlation data, and answers in
flight would use up the broker's window for messages.

The broker may have :data:`IN_FLIGHT` requests on the way; more wait there until one has been dealt with.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_asr import clock, contract
from edge_asr.contract import Payload, Renderer
from edge_asr.requests import LARGEST_PACKET_BYTES, Answer, Letter, takes_answers

log = logging.getLogger(__name__)

SESSION_S = 3600
"""A receipt follows its command within seconds; an hour spans the outages in which one is worth waiting for."""

IN_FLIGHT = 16

_LARGEST_IDENTIFIER = 268_435_455
_DO_NOT_SEND_RETAINED = 2


class Mailbox:
    """The requests of one connection. Everything is called on the event loop."""

    def __init__(self, renderer: Renderer, deliver: Callable[[Letter], None], *, keep_session: bool) -> None:
        self._renderer = renderer
        self._deliver = deliver
        self._keep_session = keep_session
        self._identifier = random.SystemRandom().randint(1, _LARGEST_IDENTIFIER)
        self._topic = f"{renderer.root}/{contract.REQUESTS}"
        self._closed = False
        self.tells_what_waited = True
        """Whether the broker knows subscription identifiers."""

    @property
    def session(self) -> Properties:
        """What CONNECT tells the broker."""
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.ReceiveMaximum = IN_FLIGHT
        properties.MaximumPacketSize = LARGEST_PACKET_BYTES
        if self._keep_session:
            properties.SessionExpiryInterval = SESSION_S
        return properties

    def attach(self, client: Client, send: Callable[[Payload], None]) -> None:
        """Be there before the client connects: what had waited comes right behind CONNACK."""
        self._client = client
        self._send = send
        client.manual_ack_set(on=True)
        client.on_message = self._arrived
        client.on_subscribe = self._subscribed

    def open(self, connack: Properties) -> None:
        """Ask for requests."""
        self.tells_what_waited = bool(getattr(connack, "SubscriptionIdentifierAvailable", True))
        properties = Properties(PacketTypes.SUBSCRIBE)  # type: ignore[no-untyped-call]
        if self.tells_what_waited:
            properties.SubscriptionIdentifier = self._identifier
        else:
            self._identifier = 0
        # As published: a retained request must be told from others even when it comes live.
        options = SubscribeOptions(qos=1, retainAsPublished=True, retainHandling=_DO_NOT_SEND_RETAINED)
        self._client.subscribe(f"{self._topic}+", options=options, properties=properties)

    def close(self) -> None:
        """The connection has ended: nothing more can be said on it."""
        self._closed = True

    def _arrived(self, _client: Client, _userdata: object, message: MQTTMessage) -> None:
        properties = message.properties
        of_subscription = getattr(properties, "SubscriptionIdentifier", [0])
        life_s = getattr(properties, "MessageExpiryInterval", None)
        response_topic = getattr(properties, "ResponseTopic", "")
        correlation = getattr(properties, "CorrelationData", None)
        self._deliver(
            Letter(
                verb=message.topic.removeprefix(self._topic),
                body=bytes(message.payload),
                response_topic=response_topic,
                correlation=correlation,
                retained=message.retain,
                is_sure=message.qos > 0,
                waited=self._identifier not in of_subscription,
                expires_ns=None if life_s is None else clock.boottime_ns() + life_s * clock.NS_PER_S,
                answer=lambda answer: self._answer(answer, response_topic, correlation),
                taken=lambda: self._taken(message.mid, message.qos),
            )
        )

    def _answer(self, answer: Answer, topic: str, correlation: bytes | None) -> None:
        if not topic or self._closed:
            return
        if not takes_answers(topic):
            log.warning("no answer to a request whose response topic is %r: a device's own, or none at all", topic)
            return
        self._send(self._renderer.answer(answer.name, answer.data, topic, correlation))

    def _taken(self, packet_id: int, qos: int) -> None:
        if not self._closed:
            self._client.ack(packet_id, qos)

    def _subscribed(
        self, _client: Client, _userdata: object, _packet_id: int, reasons: Sequence[ReasonCode], _properties: object
    ) -> None:
        if any(reason.is_failure for reason in reasons):
            log.warning("the broker refuses the subscription to %s+: no requests; check its access rules", self._topic)
