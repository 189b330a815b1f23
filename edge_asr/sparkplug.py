"""Mirrors what was delivered as Sparkplug B 3.0, for SCADA that lives on tags: a picture, never the carrier.

Law:

- Sparkplug sends DATA at QoS 0, so it may lose: only what the broker has taken by way of the publisher is mirrored, and
  whoever acts on commands takes ``evt/command``. What comes late bears ``is_historical`` and moves no tag.
- The node is the device of the settings, with one Sparkplug device, ``voice``. NBIRTH has seq 0, everything after it on
  that connection one more, modulo 256. Every CONNECT has the next bdSeq, in its will (NDEATH) and in its NBIRTH.
- The mirror has a connection of its own to the broker that the publisher uses. While it has none, the newest
  :data:`KEPT` messages wait in memory; older ones are dropped and counted.

The room needs protobuf (the extra ``sparkplug``). Its schema is the part of the specification's that is used here.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_asr import clock, contract
from edge_asr.contract import Payload
from edge_asr.events import Message
from edge_asr.link import Destination, Link, LinkError
from edge_asr.settings import Settings

if TYPE_CHECKING:
    from google.protobuf.message import Message as Protobuf

log = logging.getLogger(__name__)

Kind = Literal["NBIRTH", "NDEATH", "DBIRTH", "DDATA", "NCMD"]
Value = bool | int | float | str

NAMESPACE = "spBv1.0"
DEVICE = "voice"
REBIRTH = "Node Control/Rebirth"
KEPT = 1000
"""Messages that wait for the mirror's connection."""

_RETRY_S = 5.0
_FULL_PAUSE_S = 0.1

_INT64, _DOUBLE, _BOOLEAN, _STRING, _DATETIME = 4, 10, 11, 12, 13
"""Data types by the specification's numbers."""

_FIELDS: Mapping[int, str] = {
    _INT64: "long_value",
    _DOUBLE: "double_value",
    _BOOLEAN: "boolean_value",
    _STRING: "string_value",
    _DATETIME: "long_value",
}

METRICS: Mapping[str, tuple[str, Mapping[str, int]]] = {
    contract.TRANSCRIPT: (
        "Transcript",
        {"text": _STRING, "language": _STRING, "confidence": _DOUBLE, "source": _STRING, "id": _STRING},
    ),
    contract.COMMAND: (
        "Command",
        {
            "intent": _STRING,
            "slots": _STRING,
            "text": _STRING,
            "confidence": _DOUBLE,
            "expires_at": _STRING,
            "source": _STRING,
            "id": _STRING,
        },
    ),
    contract.EXPIRED: ("Expired", {"intent": _STRING, "slots": _STRING, "expires_at": _STRING, "id": _STRING}),
    contract.REJECTED: ("Rejected", {"reason": _STRING, "text": _STRING, "source": _STRING, "id": _STRING}),
    contract.ALARM: ("Alarm", {"kind": _STRING, "severity": _STRING, "detail": _STRING, "id": _STRING}),
}
"""Topic -> folder of its metrics, and field -> data type. Slots are JSON in a string: their names vary by intent."""


@functools.cache
def payload_class() -> type[Protobuf]:
    """The specification's Payload, with the fields that are used here; others are kept unread."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # noqa: PLC0415 - an extra

    types = descriptor_pb2.FieldDescriptorProto
    numbers = {"uint64": types.TYPE_UINT64, "uint32": types.TYPE_UINT32, "bool": types.TYPE_BOOL}
    numbers |= {"string": types.TYPE_STRING, "double": types.TYPE_DOUBLE, "float": types.TYPE_FLOAT}
    file = descriptor_pb2.FileDescriptorProto(
        name="edge_asr/sparkplug.proto", package="edge_asr.sparkplug", syntax="proto2"
    )

    def add(message: descriptor_pb2.DescriptorProto, kind: str, name: str, number: int) -> None:
        message.field.add(name=name, number=number, label=types.LABEL_OPTIONAL, type=numbers[kind])

    payload = file.message_type.add(name="Payload")
    metric = payload.nested_type.add(name="Metric")
    for kind, name, number in (
        *(("string", "name", 1), ("uint64", "alias", 2), ("uint64", "timestamp", 3), ("uint32", "datatype", 4)),
        *(("bool", "is_historical", 5), ("bool", "is_transient", 6), ("bool", "is_null", 7)),
        *(("uint32", "int_value", 10), ("uint64", "long_value", 11), ("float", "float_value", 12)),
        *(("double", "double_value", 13), ("bool", "boolean_value", 14), ("string", "string_value", 15)),
    ):
        add(metric, kind, name, number)
    add(payload, "uint64", "timestamp", 1)
    payload.field.add(
        name="metrics",
        number=2,
        label=types.LABEL_REPEATED,
        type=types.TYPE_MESSAGE,
        type_name=".edge_asr.sparkplug.Payload.Metric",
    )
    add(payload, "uint64", "seq", 3)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("edge_asr.sparkplug.Payload"))


class Node:
    """What the edge node says, as payloads; it keeps bdSeq and seq. Knows no connection."""

    def __init__(self, group: str, name: str, properties: Mapping[str, str]) -> None:
        """``properties`` are shown in NBIRTH, e.g. ``{"Model": "micro-en"}``."""
        self._group = group
        self._name = name
        self._properties = properties
        self._bd_seq = -1
        self._seq = 0
        self._latest: dict[str, Value] = {}
        """Metric of the device -> its current value; a birth shows it."""

    def topic(self, kind: Kind) -> str:
        """Of a node's message, or of its one device's."""
        device = f"/{DEVICE}" if kind.startswith("D") else ""
        return f"{NAMESPACE}/{self._group}/{kind}/{self._name}{device}"

    def will(self) -> Payload:
        """The NDEATH of the next connection."""
        self._bd_seq = (self._bd_seq + 1) % 256
        return self._payload("NDEATH", [("bdSeq", _INT64, self._bd_seq)], seq=None)

    def births(self) -> list[Payload]:
        """NBIRTH and DBIRTH: everything there is, with its current value."""
        about = [(f"Properties/{name}", _STRING, value) for name, value in self._properties.items()]
        control = [("bdSeq", _INT64, self._bd_seq), (REBIRTH, _BOOLEAN, False)]
        metrics = [(name, kind, self._latest.get(name)) for name, kind in _device_metrics()]
        return [self._payload("NBIRTH", [*control, *about], seq=0), self._payload("DBIRTH", metrics, seq=1)]

    def data(self, topic: str, message: Message, *, historical: bool) -> Payload:
        """The DDATA of a delivered message; ``topic`` is what it left as. What is historical moves no tag."""
        folder, fields = METRICS[topic]
        metrics = []
        for field, kind in fields.items():
            value = message.id if field == "id" else message.data.get(field)
            shown = json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value
            metrics.append((f"{folder}/{field}", kind, shown))
        if not historical:
            self._latest.update({name: value for name, _, value in metrics if value is not None})
        return self._payload(
            "DDATA", metrics, seq=(self._seq + 1) % 256, at_ns=message.created_wall_ns, historical=historical
        )

    def _payload(
        self,
        kind: Kind,
        metrics: Iterable[tuple[str, int, Any]],
        *,
        seq: int | None,
        at_ns: int | None = None,
        historical: bool = False,
    ) -> Payload:
        now_ms = clock.wall_ns() // 1_000_000
        payload: Any = payload_class()(timestamp=now_ms)
        if seq is not None:
            payload.seq = self._seq = seq
        for name, datatype, value in metrics:
            metric = payload.metrics.add(
                name=name, datatype=datatype, timestamp=now_ms if at_ns is None else at_ns // 1_000_000
            )
            if historical:
                metric.is_historical = True
            if value is None:
                metric.is_null = True
            else:
                setattr(metric, _FIELDS[datatype], value)
        return Payload(self.topic(kind), payload.SerializeToString(), "application/x-protobuf", is_text=False)


def _device_metrics() -> Iterable[tuple[str, int]]:
    for folder, fields in METRICS.values():
        for field, kind in fields.items():
            yield f"{folder}/{field}", kind


def asks_for_rebirth(body: bytes) -> bool:
    """Whether an NCMD's payload sets the rebirth control."""
    from google.protobuf.message import DecodeError  # noqa: PLC0415 - an extra

    try:
        payload: Any = payload_class().FromString(body)
    except DecodeError:
        return False
    return any(metric.name == REBIRTH and metric.boolean_value for metric in payload.metrics)


def group_of(options: Settings) -> str:
    """The group id: the setting, else the site's levels."""
    levels = options.topic_root.split("/")[:-1]
    return options.sparkplug.group or "-".join(levels)


class _Commands:
    """NCMD of one connection; the session ends with it, as the specification wants."""

    def __init__(self, topic: str, on_rebirth: Callable[[], None]) -> None:
        self._topic = topic
        self._on_rebirth = on_rebirth
        self.session = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]

    def attach(self, client: Client, send: Callable[[Payload], None]) -> None:  # noqa: ARG002 - an Inbox's
        self._client = client
        client.on_message = self._arrived

    def open(self, connack: Properties) -> None:  # noqa: ARG002 - an Inbox's
        self._client.subscribe(self._topic, qos=1)

    def close(self) -> None:
        """Nothing is left to be done: it answers nothing."""

    def _arrived(self, _client: Client, _userdata: object, message: MQTTMessage) -> None:
        if asks_for_rebirth(bytes(message.payload)):
            self._on_rebirth()


class Mirror:
    """Keeps the node alive beside the publisher. Everything is called on the event loop."""

    def __init__(self, node: Node, client_id: str) -> None:
        self._node = node
        self._client_id = client_id
        self._to: Destination | None = None
        self._link: Link | None = None
        self._stir = asyncio.Event()
        """The publisher has moved, the link has ended, or messages wait."""
        self._waiting: deque[tuple[str, Message, bool]] = deque(maxlen=KEPT)
        self.dropped = 0
        """Messages that no connection came in time for."""

    def follow(self, to: Destination | None) -> None:
        """Be where the publisher is; None: nowhere."""
        self._to = to
        self._stir.set()

    def show(self, topic: str, message: Message, replayed: bool) -> None:  # noqa: FBT001 - what Publisher calls back
        """Mirror a message that the broker has taken; ``topic`` is what it left as."""
        if topic in METRICS:
            self.dropped += len(self._waiting) == KEPT
            self._waiting.append((topic, message, replayed or self._link is None))
            self._stir.set()

    async def run(self) -> None:
        """Mirror until cancelled."""
        while True:
            self._stir.clear()
            if self._to is None:
                await self._stir.wait()
                continue
            try:
                await self._live(self._to)
            except LinkError as error:
                log.warning("no Sparkplug mirror: %s", error)
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._stir.wait(), _RETRY_S)

    async def _live(self, to: Destination) -> None:
        """One connection, until it ends or the publisher moves. Without DISCONNECT, so that the broker sends NDEATH."""
        commands = _Commands(self._node.topic("NCMD"), self._bear)
        link = await Link.open(to, self._client_id, self._node.will(), commands, retain_will=False)
        link.on_end = self._stir.set
        self._link = link
        if self.dropped:
            log.warning("the Sparkplug mirror has missed %d messages since the start", self.dropped)
        try:
            self._bear()
            while not link.ended and self._to == to:
                self._stir.clear()
                while self._waiting and not link.is_full:
                    topic, message, historical = self._waiting.popleft()
                    link.publish(self._node.data(topic, message, historical=historical), qos=0)
                # A full link gives no notice when it has room again.
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._stir.wait(), _FULL_PAUSE_S if self._waiting else None)
        finally:
            self._link = None
            link.abort("the mirror moves")
        if self._to == to:
            raise LinkError(f"{to.address}: {link.ended}")

    def _bear(self) -> None:
        if self._link is not None:
            for birth in self._node.births():
                self._link.publish(birth, qos=0)
