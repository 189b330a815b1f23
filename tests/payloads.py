"""Holds payloads to the shipped JSON Schemas with somebody else's validator."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from referencing import Registry, Resource

from edge_asr import contract

REGISTRY: Registry[Any] = Registry().with_resources(
    (name, Resource.from_contents(schema)) for name, schema in contract.schemas().items()
)


@functools.cache
def validator(name: str) -> Draft202012Validator:
    """Stricter than what ships: a consumer must ignore unknown fields, but we must not send undescribed ones."""
    strict = {"$ref": contract.schema_id(name), "unevaluatedProperties": False}
    return Draft202012Validator(strict, registry=REGISTRY, format_checker=Draft202012Validator.FORMAT_CHECKER)


def check(topic: str, payload: Mapping[str, Any]) -> Mapping[str, Any]:
    """Validate one received payload, CloudEvents or plain, and return its data."""
    suffix = contract.kind_of(topic)
    name = contract.TOPICS[suffix]
    data: Mapping[str, Any] = payload
    if "specversion" in payload:
        data = payload["data"]
        assert payload["type"] == f"edge-asr.{name}"
        assert payload["dataschema"] == contract.schema_id(name)
        assert (payload["id"], payload["time"]) == (data["id"], data["time"])
        assert topic == f"{payload['source']}/{suffix}"
    validator(name).validate(data)
    return data


def check_answer(payload: Mapping[str, Any]) -> Mapping[str, Any]:
    """Validate an answer to a request, CloudEvents or plain, and return its data; its topic is its reader's own."""
    data: Mapping[str, Any] = payload.get("data", payload)
    name = "refusal" if data["outcome"] == "refused" else f"answer-{data['verb']}"
    if "specversion" in payload:
        assert payload["type"] == f"edge-asr.{name}"
        assert payload["dataschema"] == contract.schema_id(name)
        assert (payload["id"], payload["time"]) == (data["id"], data["time"])
    validator(name).validate(data)
    return data


def complaint(topic: str, payload: Mapping[str, Any]) -> str:
    """What is wrong with a payload of ours; empty: nothing, or it is not ours (a request may be rubbish)."""
    kind = contract.kind_of(topic)
    if kind.startswith(contract.REQUESTS):
        return ""
    try:
        if kind:
            check(topic, payload)
        elif "outcome" in payload.get("data", payload):
            check_answer(payload)
    except (ValidationError, AssertionError) as error:
        return f"{topic}: {error}"
    return ""
