"""The AsyncAPI document is what the program says today, is AsyncAPI 3, and its schemas judge as the shipped ones do."""

from __future__ import annotations

import copy
import importlib
import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator
from pydantic import BaseModel, ValidationError

from edge_asr import asyncapi, contract, requests
from edge_asr.contract import Renderer
from edge_asr.requests import RequestError, refusal
from tests.sysbox import CHECKOUT

FILE = CHECKOUT / "docs" / "asyncapi.yaml"
DOCUMENT: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model() -> type[BaseModel]:
    """Somebody else's object model of AsyncAPI 3, which shadows names of pydantic's and is warned for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found: type[BaseModel] = importlib.import_module("asyncapi3.models").AsyncAPI3
        return found


def test_the_document_is_what_the_program_says_today() -> None:
    assert FILE.read_text(encoding="utf-8") == asyncapi.text(), "run tools/make-asyncapi"


def test_it_is_asyncapi_3(model: type[BaseModel]) -> None:
    model.model_validate(DOCUMENT)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d["channels"]["command"].update(adress="x"),
        lambda d: d["operations"]["send-command"].update(action="shout"),
        lambda d: d["operations"]["send-command"].pop("channel"),
    ],
    ids=["a misspelt key", "an unknown action", "no channel"],
)
def test_what_is_not_asyncapi_3_would_be_noticed(model: type[BaseModel], spoil: Callable[[Any], object]) -> None:
    spoilt = copy.deepcopy(DOCUMENT)
    spoil(spoilt)
    with pytest.raises(ValidationError):
        model.model_validate(spoilt)


def test_every_topic_and_every_request_has_its_channel_operation_and_answer() -> None:
    addresses = {channel["address"] for channel in DOCUMENT["channels"].values()}
    assert addresses >= {f"{{root}}/{topic}" for topic in contract.TOPICS}
    assert addresses >= {f"{{root}}/req/{verb}" for verb in requests.VERBS}
    assert DOCUMENT["operations"].keys() == {f"send-{name}" for name in contract.TOPICS.values()} | {
        f"receive-{verb}" for verb in requests.VERBS
    }


def test_every_reference_leads_somewhere() -> None:
    def references(tree: Any) -> list[str]:
        if isinstance(tree, list):
            return [found for each in tree for found in references(each)]
        if not isinstance(tree, dict):
            return []
        own = [tree["$ref"]] if isinstance(tree.get("$ref"), str) else []
        return own + [found for each in tree.values() for found in references(each)]

    for reference in references(DOCUMENT):
        at: Any = DOCUMENT
        for key in reference.removeprefix("#/").split("/"):
            assert key in at, reference
            at = at[key]


@pytest.mark.parametrize("mode", ["cloudevents", "plain"])
def test_a_payload_is_judged_as_by_the_shipped_schemas(mode: contract.PayloadMode) -> None:
    renderer = Renderer("acme/voice/edge01", "edge01", mode)
    refused = refusal("mute", RequestError("stale", "too late", "send it again"))
    payloads = {
        "status": renderer.state(contract.STATUS, contract.status_data("online")),
        "refusal": renderer.answer("refusal", refused.data, "mes", None),
    }
    for name, payload in payloads.items():
        schema = {**DOCUMENT["components"]["messages"][name]["payload"], "components": DOCUMENT["components"]}
        body = json.loads(payload.body)
        Draft7Validator(schema).validate(body)
        body.get("data", body).pop("boot_id")
        assert not Draft7Validator(schema).is_valid(body)
