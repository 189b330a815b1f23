"""The Sparkplug B mirror on a real broker, held to the specification's own assertions about edge nodes.

A test's ids (tck-id-...) are those of the Sparkplug 3.0 specification.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from typing_extensions import Self

from edge_asr import clock, contract, sparkplug
from edge_asr.events import Message, new_id
from edge_asr.link import Link, destinations
from edge_asr.outbox import Outbox
from edge_asr.publisher import Publisher
from edge_asr.sparkplug import DEVICE, REBIRTH, Mirror, Node, asks_for_rebirth, payload_class
from tests.broker import PATIENCE_S, Broker
from tests.test_publisher import RENDERER, command, run, transcript

GROUP, NODE = "acme-hall-2", "edge01"
CLIENT_ID = "edge01-sparkplug"
INT64, BOOLEAN, STRING = 4, 11, 12
NODE_TOPICS = {kind: f"spBv1.0/{GROUP}/{kind}/{NODE}" for kind in ("NBIRTH", "NDEATH", "NCMD")}
DEVICE_TOPICS = {kind: f"spBv1.0/{GROUP}/{kind}/{NODE}/{DEVICE}" for kind in ("DBIRTH", "DDATA")}


@dataclass(frozen=True)
class Seen:
    """One message as a host gets it."""

    topic: str
    qos: int
    retained: bool
    payload: Any

    @property
    def kind(self) -> str:
        return self.topic.split("/")[2]

    def value(self, name: str) -> Any:
        """Exactly one of the value fields is set, or the metric is null."""
        (metric,) = [metric for metric in self.payload.metrics if metric.name == name]
        fields = ("int_value", "long_value", "float_value", "double_value", "boolean_value", "string_value")
        values = [getattr(metric, field) for field in fields if metric.HasField(field)]
        assert len(values) == (not metric.is_null)
        return values[0] if values else None


class Host:
    """A host application: sees everything of the namespace, and asks for a rebirth."""

    def __init__(self, broker: Broker) -> None:
        self._inbox: queue.Queue[Seen] = queue.Queue()
        self._subscribed: queue.Queue[int] = queue.Queue()
        self._client = Client(CallbackAPIVersion.VERSION2, "host", protocol=MQTTProtocolVersion.MQTTv5)
        self._client.on_connect = lambda client, *_: client.subscribe("spBv1.0/#", qos=1)
        self._client.on_subscribe = lambda *_: self._subscribed.put(1)
        self._client.on_message = self._arrived
        self._client.connect(broker.host, broker.port)

    def __enter__(self) -> Self:
        self._client.loop_start()
        self._subscribed.get(timeout=PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _arrived(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        payload = payload_class().FromString(bytes(message.payload))
        self._inbox.put(Seen(message.topic, message.qos, message.retain, payload))

    async def next(self, *kinds: str) -> Seen:
        """The next message; with kinds, the next of them."""
        while True:
            seen = await asyncio.to_thread(self._inbox.get, timeout=PATIENCE_S)
            if not kinds or seen.kind in kinds:
                return seen

    def ask_for_rebirth(self) -> None:
        payload: Any = payload_class()(timestamp=1)
        payload.metrics.add(name=REBIRTH, datatype=BOOLEAN, boolean_value=True)
        self._client.publish(NODE_TOPICS["NCMD"], payload.SerializeToString(), qos=0)


@contextlib.asynccontextmanager
async def mirrored(broker: Broker, outbox: Outbox) -> AsyncIterator[Mirror]:
    """A publisher with the mirror beside it, as the daemon wires them."""
    mirror = Mirror(Node(GROUP, NODE, {"Model": "micro-en"}), CLIENT_ID)
    publisher = Publisher(
        broker.mqtt(), RENDERER, outbox, on_change=lambda: mirror.follow(publisher.to), on_delivered=mirror.show
    )
    tasks = [asyncio.create_task(publisher.run()), asyncio.create_task(mirror.run())]
    try:
        yield mirror
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def message(text: str) -> Message:
    return Message(1, new_id(), "boot", contract.TRANSCRIPT, "transcript", {"text": text}, 0, 0, None, "synchronized")


def test_birth_then_data_as_the_specification_wants_them(broker: Broker, outbox: Outbox) -> None:
    """tck-id-topic-structure, -namespace-a, -namespace-device-id-associated-message-types,
    -namespace-device-id-non-associated-message-types; tck-id-topics-nbirth-mqtt, -nbirth-seq-num, -nbirth-timestamp,
    -nbirth-metrics, -nbirth-bdseq-included, -nbirth-bdseq-increment, -nbirth-rebirth-metric;
    tck-id-payloads-nbirth-qos, -nbirth-retain; tck-id-payloads-dbirth-timestamp, -dbirth-seq, -dbirth-seq-inc,
    -dbirth-order, -dbirth-qos, -dbirth-retain; tck-id-payloads-ddata-timestamp, -ddata-seq, -ddata-seq-inc,
    -ddata-order, -ddata-qos, -ddata-retain.
    """

    async def main(host: Host) -> None:
        before_ms = clock.wall_ns() // 1_000_000
        async with mirrored(broker, outbox):
            node_birth, device_birth = await host.next(), await host.next()
            (sent,) = await outbox.append(command())
            data = await host.next()
        assert [one.topic for one in (node_birth, device_birth, data)] == [
            NODE_TOPICS["NBIRTH"],
            DEVICE_TOPICS["DBIRTH"],
            DEVICE_TOPICS["DDATA"],
        ]
        for number, one in enumerate((node_birth, device_birth, data)):
            assert (one.qos, one.retained) == (0, False)
            assert one.payload.seq == number
            assert before_ms <= one.payload.timestamp <= clock.wall_ns() // 1_000_000
            assert all(metric.datatype and metric.timestamp for metric in one.payload.metrics)
        assert node_birth.value("bdSeq") == 0
        assert node_birth.value(REBIRTH) is False
        assert {m.name: m.datatype for m in node_birth.payload.metrics} == {
            "bdSeq": INT64,
            REBIRTH: BOOLEAN,
            "Properties/Model": STRING,
        }
        born = {metric.name: metric.datatype for metric in device_birth.payload.metrics}
        assert born.items() >= {metric.name: metric.datatype for metric in data.payload.metrics}.items()
        assert data.value("Command/intent") == "stop"
        assert data.value("Command/slots") == '{"line": 3}'
        assert data.value("Command/id") == sent.id
        assert not any(metric.is_historical for metric in data.payload.metrics)

    with Host(broker) as host:
        run(main(host))


def test_a_lost_connection_is_an_ndeath_that_belongs_to_its_birth_and_the_next_counts_on(
    broker: Broker, outbox: Outbox
) -> None:
    """tck-id-topics-ndeath-payload, -ndeath-seq; tck-id-topics-nbirth-bdseq-matching, -nbirth-bdseq-increment;
    tck-id-message-flow-edge-node-birth-publish-will-message-topic, -will-message-payload-bdSeq, -will-message-qos,
    -will-message-will-retained; tck-id-operational_behavior_edge_node_intentional_disconnect.
    """

    async def main(host: Host) -> None:
        for bd_seq in (0, 1):
            birth = await host.next("NBIRTH")
            assert birth.value("bdSeq") == bd_seq
            for link in links:
                link.abort("as a cut would")
            links.clear()
            death = await host.next("NDEATH")
            assert death.topic == NODE_TOPICS["NDEATH"]
            assert (death.qos, death.retained) == (1, False)
            assert [metric.name for metric in death.payload.metrics] == ["bdSeq"]
            assert death.value("bdSeq") == bd_seq
            assert not death.payload.HasField("seq")

    async def around(host: Host) -> None:
        async with mirrored(broker, outbox):
            await main(host)
            assert (await host.next("NBIRTH")).value("bdSeq") == 2
        # stopping it: no DISCONNECT, so the broker says NDEATH
        assert (await host.next("NDEATH")).value("bdSeq") == 2

    links: list[Any] = []
    original = Link.open

    async def noted(*arguments: Any, **more: Any) -> Any:
        opened = await original(*arguments, **more)
        if arguments[1] == CLIENT_ID:  # not the publisher's
            links.append(opened)
        return opened

    with Host(broker) as host, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Link, "open", noted)
        patch.setattr(sparkplug, "_RETRY_S", 0.05)
        run(around(host))


def test_a_rebirth_repeats_the_births_with_the_current_values_and_the_same_bd_seq(
    broker: Broker, outbox: Outbox
) -> None:
    """tck-id-operational-behavior-data-commands-rebirth-name, -rebirth-action-1, -rebirth-action-2, -rebirth-action-3;
    tck-id-message-flow-edge-node-ncmd-subscribe.
    """

    async def main(host: Host) -> None:
        async with mirrored(broker, outbox):
            await host.next("DBIRTH")
            await outbox.append(transcript("stop line three"))
            await host.next("DDATA")
            host.ask_for_rebirth()
            again, device = await host.next("NBIRTH"), await host.next()
        assert (again.value("bdSeq"), again.payload.seq) == (0, 0)
        assert (device.kind, device.payload.seq) == ("DBIRTH", 1)
        assert device.value("Transcript/text") == "stop line three"
        assert device.value("Command/intent") is None

    with Host(broker) as host:
        run(main(host))


def test_what_waited_is_historical_and_moves_no_tag(broker: Broker, outbox: Outbox) -> None:
    """The flag is what tells a host not to show an old value as the present one."""

    async def main(host: Host) -> None:
        await outbox.append(transcript("yesterday"), command(10, ended_s_ago=9.5))
        async with mirrored(broker, outbox):
            late = [await host.next("DDATA"), await host.next("DDATA")]
            await outbox.append(transcript("now"))
            live = await host.next("DDATA")
            host.ask_for_rebirth()
            reborn = await host.next("DBIRTH")
            while reborn.payload.seq != 1 or reborn.value("Transcript/text") is None:
                reborn = await host.next("DBIRTH")
        assert [one.payload.metrics[0].name for one in late] == ["Transcript/text", "Expired/intent"]
        assert all(metric.is_historical for one in late for metric in one.payload.metrics)
        assert not any(metric.is_historical for metric in live.payload.metrics)
        assert reborn.value("Transcript/text") == "now"
        assert reborn.value("Expired/intent") is None

    with Host(broker) as host:
        run(main(host))


def test_seq_runs_from_0_to_255_and_again() -> None:
    """tck-id-payloads-ddata-seq-inc, tck-id-topics-nbirth-seq-num."""
    node = Node(GROUP, NODE, {})
    node.will()
    payloads = [*node.births(), *(node.data(contract.TRANSCRIPT, message("x"), historical=False) for _ in range(600))]
    seqs = [payload_class().FromString(payload.body).seq for payload in payloads]  # type: ignore[attr-defined]
    assert seqs == [number % 256 for number in range(602)]


def test_bd_seq_runs_from_0_to_255_and_again_with_every_connect() -> None:
    """tck-id-topics-nbirth-bdseq-increment, tck-id-topics-nbirth-bdseq-matching."""
    node = Node(GROUP, NODE, {})
    for number in range(600):
        will, (birth, _) = node.will(), node.births()
        for payload in (will, birth):
            parsed: Any = payload_class().FromString(payload.body)
            assert parsed.metrics[0].long_value == number % 256


@pytest.mark.parametrize("body", [b"", b"\xff\xff", b"no protobuf at all", b'{"metrics": []}'])
def test_a_command_that_is_none_is_ignored(body: bytes) -> None:
    assert not asks_for_rebirth(body)


def test_while_it_has_no_connection_the_newest_wait_and_the_rest_is_counted(broker: Broker) -> None:
    async def main(host: Host) -> None:
        mirror = Mirror(Node(GROUP, NODE, {}), CLIENT_ID)
        for number in range(sparkplug.KEPT + 3):
            mirror.show(contract.TRANSCRIPT, message(f"number {number}"), False)  # noqa: FBT003 - as Publisher calls it
        assert mirror.dropped == 3
        task = asyncio.create_task(mirror.run())
        mirror.follow(destinations(broker.mqtt())[0])
        first = await host.next("DDATA")
        assert first.value("Transcript/text") == "number 3"
        assert all(metric.is_historical for metric in first.payload.metrics)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    with Host(broker) as host:
        run(main(host))
