"""Home Assistant discovery: retained on a real broker, and its templates find what the device really publishes."""

from __future__ import annotations

import json
import queue
import re
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from edge_asr import contract
from edge_asr.contract import PayloadMode, Renderer
from edge_asr.home_assistant import discovery
from edge_asr.outbox import Outbox
from tests.broker import PATIENCE_S, Broker
from tests.test_publisher import ROOT, command, emptied, publishing, run, transcript, until

UNIQUE = "acme-hall-2-voice-edge01"


def rendered(template: str, payload: Mapping[str, Any]) -> str:
    """As much of Jinja as these templates use: a path below ``value_json``."""
    found: Any = payload
    (path,) = re.findall(r"value_json((?:\.\w+)+)", template)
    for name in path[1:].split("."):
        found = found[name]
    return str(found)


@pytest.mark.parametrize("mode", ["cloudevents", "plain"])
def test_the_discovery_is_retained_and_its_templates_find_their_fields(
    broker: Broker, tmp_path: Path, mode: PayloadMode
) -> None:
    inbox: queue.Queue[tuple[str, bool, Mapping[str, Any]]] = queue.Queue()
    renderer = Renderer(ROOT, "edge01", mode)
    announced = discovery(renderer, "homeassistant", version="1.2.3", model="micro-en")

    async def main() -> None:
        with closing(Outbox(tmp_path / "outbox.db", 50_000_000)) as outbox:
            async with publishing(broker.mqtt(), outbox, renderer, announcements=[announced]) as running:
                running.publish_retained(contract.HEALTH, {"outbox": {"waiting": 3}})
                await outbox.append(transcript("stop line three"), command())
                await until(lambda: emptied(outbox), "an empty outbox")

    client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
    client.on_connect = lambda client, *_: client.subscribe("#", qos=1)
    client.on_message = lambda _client, _data, message: inbox.put(
        (message.topic, message.retain, json.loads(message.payload))
    )
    subscribed: queue.Queue[int] = queue.Queue()
    client.on_subscribe = lambda *_: subscribed.put(1)
    client.connect(broker.host, broker.port)
    client.loop_start()
    subscribed.get(timeout=PATIENCE_S)
    run(main())
    published: dict[str, Mapping[str, Any]] = {}
    while f"{ROOT}/evt/command" not in published:
        topic, _, payload = inbox.get(timeout=PATIENCE_S)
        published[topic] = payload
    config = published[f"homeassistant/device/{UNIQUE}/config"]
    assert config["device"] == {
        "identifiers": [UNIQUE],
        "name": "edge01",
        "manufacturer": "edge-asr",
        "model": "micro-en",
        "sw_version": "1.2.3",
    }
    states = {
        name: rendered(entity["value_template"], published[entity["state_topic"]])
        for name, entity in config["components"].items()
        if entity["state_topic"] in published
    }
    assert states == {"status": "online", "transcript": "stop line three", "command": "stop", "waiting": "3"}
    assert rendered(config["availability_template"], published[config["availability_topic"]]) == "online"
    uniques = [entity["unique_id"] for entity in config["components"].values()]
    assert len(set(uniques)) == len(uniques)
    client.unsubscribe("#")
    client.subscribe(f"homeassistant/device/{UNIQUE}/config")
    while True:
        topic, retained, again = inbox.get(timeout=PATIENCE_S)
        if retained and topic.startswith("homeassistant"):
            break
    assert again == config
    client.disconnect()
    client.loop_stop()


def test_nothing_of_it_can_command_the_device() -> None:
    config = json.loads(discovery(Renderer(ROOT, "edge01"), "homeassistant", version="1", model="m").body)
    assert {entity["platform"] for entity in config["components"].values()} == {"sensor"}
    assert "command_topic" not in json.dumps(config)
