"""Writes down what the settings can be, from the settings themselves: a commented example file, a JSON Schema.

The words are the docstrings below the fields in ``settings``, so there is one place to change them.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from edge_asr import settings
from edge_asr.settings import Settings

WIDTH: Final = 120

HEAD: Final = """\
# edge-asr settings. Every key is optional. A line that begins with # and no space is a key with its default, or, where
# there is none, an example: remove the # to change it. Written by `edge-asr settings example`.
# Check a changed file with `edge-asr check --settings FILE`; for your editor there is `edge-asr settings schema`.
# Any key can be overridden by a variable, EDGE_ASR__MQTT__HOST=broker, or where you type, --set mqtt.host=broker."""

EXAMPLES: Final[Mapping[str, object]] = {
    "site.enterprise": "acme",
    "site.site": "hall-2",
    "site.area": "assembly",
    "site.line": "line-3",
    "site.cell": "press-07",
    "state_dir": "/var/lib/edge-asr",
    "model.name": "sherpa-onnx-sense-voice-zh-en-ja-ko-yue-int8-2024-07-17",
    "model.signed_by": "/etc/edge-asr/models.pub",
    "model.languages": ["zh", "en"],
    "sources.microphone.rate": 48_000,
    "sources.files.paths": ["/var/lib/recordings"],
    "hotwords.phrases": ["RCCB", "palletizer", {"phrase": "Weidmüller", "spoken": ["veedmuller"]}],
    "hotwords.file": "/etc/edge-asr/hotwords.txt",
    "outbox.path": "/var/lib/edge-asr/outbox.db",
    "outbox.limits.command.max_bytes": 67_108_864,
    "outbox.limits.command.days": 30.0,
    "outbox.limits.transcript.max_bytes": 134_217_728,
    "outbox.limits.transcript.days": 7.0,
    "outbox.limits.rejection.max_bytes": 33_554_432,
    "outbox.limits.rejection.days": 7.0,
    "outbox.limits.alarm.max_bytes": 16_777_216,
    "outbox.limits.alarm.days": 30.0,
    "mqtt.host": "broker.plant.example",
    "mqtt.port": 8883,
    "mqtt.username": "press-07",
    "mqtt.password_file": "/run/credentials/edge-asr.service/mqtt-password",
    "mqtt.client_id": "edge-asr-press-07",
    "mqtt.tls": {
        "ca_file": "/etc/edge-asr/ca.crt",
        "cert_file": "/etc/edge-asr/press-07.crt",
        "key_file": "/run/credentials/edge-asr.service/client.key",
    },
    "mqtt.brokers": [
        {
            "host": "broker.plant.example",
            "username": "press-07",
            "password_file": "/run/credentials/edge-asr.service/mqtt-password",
        },
        {"host": "backup.hall-2.example"},
    ],
    "tracing.endpoint": "http://127.0.0.1:4318/v1/traces",
    "sparkplug.group": "acme-hall-2",
    "requests.receipt_within_s": 30.0,
    "recorder.public_key": "/etc/edge-asr/recorder.pub",
    "privacy.transcript_days": 7.0,
    "gateway.cert_file": "/etc/edge-asr/gateway.crt",
    "gateway.key_file": "/run/credentials/edge-asr.service/gateway.key",
    "gateway.announce": "192.0.2.7",
    "gateway.ice_servers": ["stun:192.0.2.1"],
    "gateway.origins": ["https://mes.plant.example"],
}
"""For keys whose default is nothing."""


def example() -> str:
    """The whole example file."""
    return "\n".join([HEAD, *_section(Settings, "", "")]) + "\n"


def schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the settings file, with the docstrings as descriptions."""
    tree = Settings.model_json_schema()
    for name, part in (("Settings", tree), *tree["$defs"].items()):
        words = _docs().get(name, {})
        for key, field in part.get("properties", {}).items():
            field["description"] = _plain(words.get(key, ""))
            if "$ref" in field:  # `mqtt:` with everything below it commented out
                part["properties"][key] = {"anyOf": [{"$ref": field.pop("$ref")}, {"type": "null"}], **field}
    hotword = tree["$defs"].pop("Hotword")
    tree["$defs"]["Hotword"] = {"anyOf": [{"type": "string", "minLength": 1}, hotword]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree, "title": "edge-asr settings"}


def _section(model: type[BaseModel], path: str, indent: str) -> Iterator[str]:
    """Every key of a section."""
    for key, field in model.model_fields.items():
        place = f"{path}.{key}".lstrip(".")
        nested = section_of(field)
        yield ""
        if place == "sources":
            yield from _sources()
        elif nested is not None and place not in EXAMPLES:
            words = _said(model, key).replace("None: ", "Default: ")
            yield from _comment(f"{_docs()[nested.__name__]['']} {words}", indent)
            off = "#" if field.default is None else ""
            yield f"{indent}{off}{key}:"
            yield from _lines(_section(nested, place, f"{indent}  "))
        else:
            yield from _key(model, key, place, indent)


def _lines(lines: Iterator[str]) -> Iterator[str]:
    """Within a section keys stand close together."""
    return (line for line in lines if line)


def _key(model: type[BaseModel], key: str, place: str, indent: str) -> Iterator[str]:
    field = model.model_fields[key]
    words = _said(model, key)
    if field.default is None:
        words = re.sub(r"\bNone: ", "default: ", re.sub(r"^None: |(?<=\. )None: ", "Default: ", words))
    yield from _comment(f"{words} {_choices(field)} {_range(place)}", indent)
    value = EXAMPLES.get(place, field.default)
    text = yaml.safe_dump(_jsonable(value), default_flow_style=True, allow_unicode=True, width=10_000).split("\n")[0]
    yield f"{indent}#{key}: {text}"


def _sources() -> Iterator[str]:
    """One source of each kind; the microphone is there without a word."""
    yield from _comment(_said(Settings, "sources") or "What is listened to.", "")
    yield "sources:"
    for kind in get_args(get_args(settings.SourceSettings)[0]):
        name = get_args(kind.model_fields["type"].annotation)[0]
        off = "" if name == "microphone" else "#"
        yield from _comment(_docs()[kind.__name__][""], "  ")
        yield f"  {off}- type: {name}"
        for key in kind.model_fields:
            if key != "type":
                yield from _key(kind, key, f"sources.{name}.{key}", "    ")


def _comment(text: str, indent: str) -> Iterator[str]:
    plain = _plain(text)
    return (f"{indent}# {line}" for line in textwrap.wrap(plain, WIDTH - len(indent) - 2))


def _plain(text: str) -> str:
    """A docstring in the words of a settings file."""
    return " ".join(text.split()).replace("``", "`").replace("None: ", "null: ")


def _choices(field: FieldInfo) -> str:
    if get_origin(field.annotation) is not Literal:
        return ""
    return f"One of {', '.join(map(str, get_args(field.annotation)))}."


def _range(place: str) -> str:
    if place.startswith("sources."):
        return ""
    found = settings.limits(list(place.split(".")), Settings)
    return f"({found})" if found else ""


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a key holds; None: a value."""
    for part in (field.annotation, *get_args(field.annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _jsonable(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _said(model: type[BaseModel], key: str) -> str:
    """What stands below a field, in its class or the one it comes from."""
    found = (_docs().get(each.__name__, {}).get(key) for each in model.__mro__)
    return next((words for words in found if words), "")


@functools.cache
def _docs() -> dict[str, dict[str, str]]:
    """Class -> field -> docstring below it; under "" the class's own."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(settings)).body:
        if isinstance(node, ast.ClassDef):
            words = {"": ast.get_docstring(node) or ""}
            for field, below in zip(node.body, node.body[1:], strict=False):
                is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
                    assert isinstance(below, ast.Expr)  # noqa: S101 - see above
                    assert isinstance(below.value, ast.Constant)  # noqa: S101 - see above
                    words[field.target.id] = str(below.value.value)
            found[node.name] = words
    return found
