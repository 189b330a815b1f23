"""The Node-RED flow of examples/node-red, looked at without Node-RED; ``tools/try-node-red`` runs it in a real one."""

from __future__ import annotations

import json
from typing import Any

from paho.mqtt.client import topic_matches_sub

from edge_asr import contract
from tests.sysbox import CHECKOUT
from tests.test_publisher import ROOT

FLOW: list[dict[str, Any]] = json.loads((CHECKOUT / "examples" / "node-red" / "flows.json").read_text(encoding="utf-8"))
BY_ID = {node["id"]: node for node in FLOW}
OF_NODE_RED_ITSELF = {"tab", "mqtt-broker", "mqtt in", "mqtt out", "function", "switch"}


def of_type(kind: str) -> dict[str, Any]:
    (node,) = [node for node in FLOW if node["type"] == kind]
    return node


def test_it_needs_no_node_that_must_be_installed_and_every_wire_ends_at_one() -> None:
    assert {node["type"] for node in FLOW} <= OF_NODE_RED_ITSELF
    assert len(BY_ID) == len(FLOW)
    for node in FLOW:
        assert all(end in BY_ID for output in node.get("wires", []) for end in output)
        assert "outputs" not in node or len(node["wires"]) == node["outputs"]
        assert node.get("broker") in {None, "edgeasr.broker", "127.0.0.1"}


def test_it_listens_to_commands_only_at_least_once_and_in_a_session_that_outlives_a_restart() -> None:
    listening, broker = of_type("mqtt in"), of_type("mqtt-broker")
    heard = [topic for topic in contract.TOPICS if topic_matches_sub(listening["topic"], f"{ROOT}/{topic}")]
    assert heard == [contract.COMMAND]
    assert (listening["qos"], listening["datatype"]) == ("1", "json")
    assert (broker["protocolVersion"], broker["cleansession"]) == ("5", False)
    assert int(broker["sessionExpiry"]) > 0


def test_its_receipts_have_the_fields_of_the_schema() -> None:
    functions = "".join(node["func"] for node in FLOW if node["type"] == "function")
    schema = contract.schemas()[contract.schema_id("request-receipt")]
    for name in schema["required"]:
        assert f"{name}:" in functions or f".{name} =" in functions
    assert all(f"'{verdict}'" in functions for verdict in schema["properties"]["verdict"]["enum"])
    assert "req/receipt" in functions
    assert of_type("mqtt out")["qos"] == "1"


def test_it_says_accepted_only_behind_the_machine_that_acts() -> None:
    (saying,) = [node for node in FLOW if "'accepted'" in node.get("func", "")]
    before = {node["id"] for node in FLOW for output in node.get("wires", []) if saying["id"] in output}
    assert before == {"edgeasr.act"}
    assert saying["wires"] == [["edgeasr.receipt"]]
