"""Describes everything that goes over the broker as one AsyncAPI 3 document, from the topics and schemas in use.

`tools/make-asyncapi` writes it to docs/asyncapi.yaml; a test holds the file to this room, so it cannot drift.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

import edge_asr
from edge_asr import contract, requests

Tree = dict[str, Any]

QOS: Mapping[str, int] = {contract.HEALTH: 0, contract.PARTIAL: 0, contract.AGAIN: 0}
"""Where it is not 1."""

RETAINED = {contract.STATUS, contract.META, contract.HEALTH}

ANSWERS = ("refusal", *(f"answer-{verb}" for verb in requests.VERBS))
"""Names of the schemas of what is said on response topics."""

_ROOT = "{root}"
_PREFIX, _SUFFIX = contract.schema_id("|").split("|")
_MQTT = "0.2.0"
"""Version of the MQTT binding."""


def text() -> str:
    """The document as it is written to docs/asyncapi.yaml."""
    return yaml.safe_dump(document(edge_asr.__version__), sort_keys=False, allow_unicode=True, width=120)


def document(version: str) -> Tree:
    """The whole document; ``version`` is the product's."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "edge-asr",
            "version": version,
            "description": "Transcripts and voice commands of one device, and what may be asked of it, over MQTT 5. "
            "docs/mes.md says how to use it.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/cloudevents+json",
        "channels": dict(_channels()),
        "operations": dict(_operations()),
        "components": {
            "messages": dict(_messages()),
            "schemas": dict(_schemas()),
            "parameters": {
                "root": {
                    "description": "enterprise/site/area/line/cell/voice/DEVICE; levels that are not set are left out."
                }
            },
        },
    }


def _channels() -> Iterator[tuple[str, Tree]]:
    for topic, name in contract.TOPICS.items():
        yield name, _channel(f"{_ROOT}/{topic}", [name], _of(name)["description"])
    for verb in requests.VERBS:
        yield f"request-{verb}", _channel(f"{_ROOT}/{contract.REQUESTS}{verb}", [f"request-{verb}"])
    about = "The response topic that the request named, with its correlation data."
    yield "answers", _channel(None, ANSWERS, about)


def _channel(address: str | None, names: Sequence[str], about: str = "") -> Tree:
    channel: Tree = {
        "address": address,
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in names},
    }
    if address is not None:
        channel["parameters"] = {"root": {"$ref": "#/components/parameters/root"}}
    return {**channel, **({"description": about} if about else {})}


def _operations() -> Iterator[tuple[str, Tree]]:
    for topic, name in contract.TOPICS.items():
        binding = {"qos": QOS.get(topic, 1), "retain": topic in RETAINED, "bindingVersion": _MQTT}
        yield f"send-{name}", {**_operation("send", name), "bindings": {"mqtt": binding}}
    for verb in requests.VERBS:
        reply = {
            "channel": {"$ref": "#/channels/answers"},
            "messages": [{"$ref": f"#/channels/answers/messages/{name}"} for name in (f"answer-{verb}", "refusal")],
        }
        binding = {"qos": 1, "retain": False, "bindingVersion": _MQTT}
        yield (
            f"receive-{verb}",
            {**_operation("receive", f"request-{verb}"), "reply": reply, "bindings": {"mqtt": binding}},
        )


def _operation(action: str, name: str) -> Tree:
    return {
        "action": action,
        "channel": {"$ref": f"#/channels/{name}"},
        "messages": [{"$ref": f"#/channels/{name}/messages/{name}"}],
    }


def _messages() -> Iterator[tuple[str, Tree]]:
    for name in [*contract.TOPICS.values(), *ANSWERS]:
        schema = _of(name)
        modes = [{"$ref": f"#/components/schemas/{name}-event"}, {"$ref": f"#/components/schemas/{name}"}]
        yield (
            name,
            {
                "title": schema["title"],
                "summary": schema["description"],
                "contentType": "application/cloudevents+json",
                "payload": {"oneOf": modes},
            },
        )
    for verb in requests.VERBS:
        schema = _of(f"request-{verb}")
        yield (
            f"request-{verb}",
            {
                "title": schema["title"],
                "summary": schema["description"],
                "contentType": "application/json",
                "payload": {"$ref": f"#/components/schemas/request-{verb}"},
            },
        )


def _schemas() -> Iterator[tuple[str, Tree]]:
    for identifier, schema in sorted(contract.schemas().items()):
        name = identifier.removeprefix(_PREFIX).removesuffix(_SUFFIX)
        yield name, {key: _local(value) for key, value in schema.items() if key not in {"$schema", "$id"}}
    for name in [*contract.TOPICS.values(), *ANSWERS]:
        yield f"{name}-event", _event(name)


def _event(name: str) -> Tree:
    """The CloudEvents envelope of a payload."""
    text = {"type": "string"}
    properties = {
        "specversion": {"const": "1.0"},
        "id": {**text, "description": "The data's `id`."},
        "source": {**text, "description": "The device's topic root."},
        "type": {"const": f"edge-asr.{name}"},
        "time": {**text, "format": "date-time", "description": "The data's `time`."},
        "datacontenttype": {"const": "application/json"},
        "dataschema": {"const": contract.schema_id(name)},
        "data": {"$ref": f"#/components/schemas/{name}"},
    }
    return {"type": "object", "required": list(properties), "properties": properties}


def _of(name: str) -> Mapping[str, Any]:
    return contract.schemas()[contract.schema_id(name)]


def _local(value: Any) -> Any:  # noqa: ANN401 - walks any JSON
    """A schema with its references into this document."""
    if isinstance(value, Mapping):
        return {key: _local(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_local(each) for each in value]
    if isinstance(value, str) and value.startswith(_PREFIX):
        return f"#/components/schemas/{value.removeprefix(_PREFIX).removesuffix(_SUFFIX)}"
    return value
