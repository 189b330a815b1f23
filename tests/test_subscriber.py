"""What `edge-asr listen` shows people of commands, receipts and what is said again."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edge_asr import contract
from edge_asr.link import destinations
from edge_asr.subscriber import Delivery, Screen, Subscriber
from tests.broker import HOST, PATIENCE_S, Broker, wait_until

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


@pytest.mark.parametrize("kind", [contract.STATUS, contract.COMMAND, contract.TRANSCRIPT, contract.META])
def test_what_lacks_its_fields_or_has_others_is_one_line(kind: str) -> None:
    rubbish: list[dict[str, Any]] = [{}, {"id": [], "slots": 1, "intent": {}, "languages": 3, "time": None}]
    said = f"✗ not what {kind} says of itself: {ROOT}/{kind}"
    assert shown(*((kind, data) for data in rubbish)) == [said, said]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    with Broker(tmp_path, durable=False) as running:
        yield running


def post(broker: Broker, *messages: tuple[str, str], retain: bool = False) -> None:
    """Publish (topic below the root, payload) in order."""
    for kind, payload in messages:
        where = ["-V", "5", "-h", broker.host, "-p", str(broker.port), "-t", f"{ROOT}/{kind}"]
        more = ["-q", "1", "-s", *(["-r"] if retain else [])]
        subprocess.run(["mosquitto_pub", *where, *more], input=payload, check=True, text=True)


def test_listen_shows_receipts_takes_no_request_for_a_status_and_lives_through_rubbish(broker: Broker) -> None:
    post(broker, ("status", json.dumps({"state": "online", "device": "press-07", "reason": ""})), retain=True)
    verb = ["listen", "--topic", "#", "--set", f"mqtt.host={HOST}", "--set", f"mqtt.port={broker.port}"]
    arguments = [sys.executable, "-u", "-m", "edge_asr.cli", *verb]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as listening:
        assert listening.stdout
        lines = iter(listening.stdout)
        try:
            assert "● online" in next(lines)  # it has subscribed
            post(
                broker,
                ("req/status", "{}"),
                ("status", "{}"),
                ("evt/command", "not JSON"),
                ("evt/command", "[" * 100_000),
                ("evt/alarm", '{"kind": "\\ud800", "detail": ""}'),
                ("evt/command", json.dumps(COMMAND)),
                ("req/receipt", json.dumps({"command_id": "c1", "verdict": "accepted"})),
            )
            said = [next(lines).strip().partition("   ")[0] for _ in range(3)]
        finally:
            listening.kill()
    about = "SetSpeed(speed=1200 rpm)"
    assert said == [
        f"✗ not what status says of itself: {ROOT}/status",
        f"► {about}",
        f"✓ accepted by the MES: {about}",
    ]


def test_a_slow_reader_gets_the_newest_and_knows_how_many_it_missed(broker: Broker) -> None:
    async def main() -> list[str]:
        async with Subscriber(destinations(broker.mqtt()), f"{ROOT}/#", waiting_limit=3) as subscriber:
            await asyncio.to_thread(post, broker, *((f"evt/{n}", "{}") for n in range(10)))
            await asyncio.to_thread(wait_until, lambda: subscriber.dropped == 7, "seven to be dropped")
            deliveries = subscriber.__aiter__()
            return [(await asyncio.wait_for(deliveries.__anext__(), PATIENCE_S)).topic[-1] for _ in range(3)]

    assert asyncio.run(main()) == ["7", "8", "9"]
