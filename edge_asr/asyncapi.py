"""Describes everything that goes over the broker, from the topics and schemas in use: as AsyncAPI 3, and as tables.

`tools/make-asyncapi` writes docs/asyncapi.yaml and the tables of docs/mes.md; a test holds both to this room, so they
cannot drift.
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


# ---------------------------------------------------------------- tables for people

SHARED: Mapping[str, str] = {
    "common": "every message",
    "message": "every `evt/*`",
    "utterance": "everything that was heard: `evt/*` but alarms, `live/partial`",
    "speech": "what was understood: `evt/transcript`, `evt/command`, `evt/expired`, `evt/pending`",
}
"""Schemas that others build on, and where their fields stand."""

_BEGIN = "<!-- tables: tools/make-asyncapi -->"
_END = "<!-- end -->"

_TYPES = {"string": "text", "array": "list", "null": "null"}
_FORMATS = {"uuid": "UUID", "date-time": "ISO 8601"}


def tables() -> str:
    """Every field of every message, request and answer, in Markdown."""
    parts = [_table(f"In {where}", name) for name, where in SHARED.items()]
    parts += [_table(f"`{topic}`", name) for topic, name in contract.TOPICS.items()]
    parts += [_table(f"Request `req/{verb}`", f"request-{verb}") for verb in requests.VERBS]
    parts += [_table(f"Answer to `req/{verb}`", f"answer-{verb}") for verb in requests.VERBS]
    parts.append(_table("Every answer", "answer"))
    parts.append(_table("Every refusal", "refusal"))
    return "\n".join(part for part in parts if part) + "\n"


def with_tables(page: str) -> str:
    """A page with the tables between its two marks."""
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    return f"{before}{begin}\n{tables()}{end}{after}"


def _table(title: str, name: str) -> str:
    rows = list(_rows(_of(name), ""))
    if not rows:
        return ""
    return "\n".join([f"\n**{title}**", "", "| field | type | what |", "|---|---|---|", *rows])


def _rows(schema: Mapping[str, Any], above: str) -> Iterator[str]:
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        if name in {"verb", "outcome"} and "const" in field:
            continue
        may_be_absent = "" if name in required else " May be absent."
        yield f"| `{above}{name}` | {_type(field)} | {field.get('description', '')}{may_be_absent} |"
        of_each = field.get("additionalProperties")
        if isinstance(of_each, Mapping):
            yield from _rows(of_each, f"{above}{name}.NAME.")
        yield from _rows(field.get("items", {}), f"{above}{name}[].")
        for choice in field.get("items", {}).get("anyOf", ()):
            yield from _rows(choice, f"{above}{name}[].")
        yield from _rows(field, f"{above}{name}.")


def _type(field: Mapping[str, Any]) -> str:
    """In words for people."""
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "format" in field:
        return _FORMATS[field["format"]]
    if "const" in field:
        return f"`{str(field['const']).lower()}`"
    kinds: list[str] = field["type"] if isinstance(field["type"], list) else [field["type"]]
    return " or ".join([_TYPES.get(kind, kind) for kind in kinds])
