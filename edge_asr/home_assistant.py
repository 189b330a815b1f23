"""What Home Assistant must know to show the device by itself: one retained discovery message.

Pure. Device-based MQTT discovery (Home Assistant 2024.11 and newer): the entities read the topics that leave the box
anyway, so nothing is sent twice, and nothing of it can command the device.
"""

from __future__ import annotations

import json

from edge_asr import contract
from edge_asr.contract import Payload, Renderer
from edge_asr.events import Json


def discovery(renderer: Renderer, prefix: str, *, version: str, model: str) -> Payload:
    """The retained message for ``prefix`` (Home Assistant's own default is ``homeassistant``)."""
    unique = renderer.root.replace("/", "-")
    entities: dict[str, Json] = {
        name: {**entity, "unique_id": f"{unique}-{name}"} for name, entity in _entities(renderer).items()
    }
    config: dict[str, Json] = {
        "device": {
            "identifiers": [unique],
            "name": renderer.device,
            "manufacturer": "edge-asr",
            "model": model,
            "sw_version": version,
        },
        "origin": {"name": "edge-asr", "sw_version": version},
        "availability_topic": f"{renderer.root}/{contract.STATUS}",
        "availability_template": f"{{{{ 'offline' if {_field(renderer, 'state')} == 'offline' else 'online' }}}}",
        "components": entities,
        "qos": 1,
    }
    body = json.dumps(config, ensure_ascii=False, separators=(",", ":")).encode()
    return Payload(f"{prefix}/device/{unique}/config", body, "application/json")


def _entities(renderer: Renderer) -> dict[str, dict[str, Json]]:
    return {
        "status": _sensor(renderer, "Status", contract.STATUS, "state", icon="mdi:microphone-message"),
        "transcript": _sensor(renderer, "Last transcript", contract.TRANSCRIPT, "text", icon="mdi:text-recognition"),
        "command": _sensor(renderer, "Last command", contract.COMMAND, "intent", icon="mdi:console"),
        "rejected": _sensor(renderer, "Last rejection", contract.REJECTED, "reason", icon="mdi:close-octagon-outline"),
        "alarm": _sensor(renderer, "Last alarm", contract.ALARM, "kind", icon="mdi:alert"),
        "waiting": _sensor(renderer, "Waiting messages", contract.HEALTH, "outbox.waiting", icon="mdi:tray-full"),
    }


def _sensor(renderer: Renderer, name: str, topic: str, field: str, *, icon: str) -> dict[str, Json]:
    state_topic = f"{renderer.root}/{topic}"
    sensor: dict[str, Json] = {
        "platform": "sensor",
        "name": name,
        "icon": icon,
        "state_topic": state_topic,
        # A state holds 255 characters at most.
        "value_template": f"{{{{ ({_field(renderer, field)} | string)[:255] }}}}",
        "json_attributes_topic": state_topic,
    }
    if renderer.mode == "cloudevents":
        sensor["json_attributes_template"] = "{{ value_json.data | tojson }}"
    return sensor


def _field(renderer: Renderer, field: str) -> str:
    return f"value_json.data.{field}" if renderer.mode == "cloudevents" else f"value_json.{field}"
