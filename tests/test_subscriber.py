"""What `edge-asr listen` shows people of commands, receipts and what is said again."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from edge_asr import contract
from edge_asr.subscriber import Delivery, Screen

ROOT = "acme/voice/press-07"
COMMAND = {
    "id": "c1",
    "intent": "SetSpeed",
    "slots": {"speed": 1200},
    "units": {"speed": "rpm"},
    "risk": "normal",
    "confidence": 0.9,
    "expires_at": "2026-11-22T07:02:36.123+01:00",
    "latency_ms": 80.0,
}


def shown(*deliveries: tuple[str, dict[str, Any]]) -> list[str]:
    """The lines on a terminal without colours."""
    console = Console(file=io.StringIO(), width=200)
    screen = Screen(console)
    for kind, data in deliveries:
        screen.show(Delivery(f"{ROOT}/{kind}", kind, data))
    assert isinstance(console.file, io.StringIO)
    return [line.strip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("receipt", "line"),
    [
        ({"command_id": "c1", "verdict": "accepted"}, "✓ accepted by the MES: SetSpeed(speed=1200 rpm)"),
        (
            {"command_id": "c1", "verdict": "rejected", "reason": "it is locked"},
            "✗ rejected by the MES: SetSpeed(speed=1200 rpm)   it is locked",
        ),
        ({"command_id": "c2", "verdict": "accepted"}, "✓ accepted by the MES: command c2"),
        ({}, "✗  by the MES: command"),
    ],
    ids=["accepted", "rejected", "of a command from before", "rubbish"],
)
def test_a_receipt_is_shown_with_what_was_commanded(receipt: dict[str, Any], line: str) -> None:
    assert shown((contract.COMMAND, COMMAND), (contract.RECEIPT, receipt))[1] == line


def test_what_is_said_again_does_not_look_like_a_command() -> None:
    (line,) = shown((contract.AGAIN, {"text": "start line three?", "said": "pending"}))
    assert line == "↻ “start line three?”   the pending again"


@pytest.mark.parametrize(
    ("topic", "kind"),
    [
        (f"{ROOT}/evt/command", "evt/command"),
        (f"{ROOT}/status", "status"),
        (f"{ROOT}/req/status", "req/status"),
        (f"{ROOT}/req/receipt", contract.RECEIPT),
        ("somebody/else", ""),
    ],
)
def test_a_topic_is_told_by_its_end_and_a_request_for_status_from_a_status(topic: str, kind: str) -> None:
    assert contract.kind_of(topic) == kind
