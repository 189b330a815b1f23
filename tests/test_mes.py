"""An MES developer who has docs/mes.md and nothing else: its lines run, its tables are true, its consumer works."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt import publish
from paho.mqtt.client import MQTTv5

from edge_asr import asyncapi, contract, requests
from edge_asr.outbox import read_statistics
from tests.broker import HOST, PATIENCE_S, Broker, Subscriber, wait_until
from tests.sysbox import CHECKOUT
from tests.test_attendant import START, first, question
from tests.test_daemon import COMMAND, Box, running, write_settings

PAGE = (CHECKOUT / "docs" / "mes.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
ROOT = "acme/hall-2/voice/press-07"


def test_the_tables_are_those_of_the_schemas() -> None:
    assert asyncapi.with_tables(PAGE) == PAGE, "run tools/make-asyncapi"


def test_every_request_and_every_reason_to_refuse_is_explained() -> None:
    text = PAGE.partition("## Every field")[0]
    for name in (*requests.VERBS, *contract.TOPICS):
        assert f"`{name}`" in text
    refusal = contract.schemas()[contract.schema_id("refusal")]
    for reason in refusal["properties"]["reason"]["enum"]:
        assert f"`{reason}`" in text


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    folder = tmp_path / "broker"
    folder.mkdir()
    with Broker(folder) as running_broker:
        yield running_broker


@pytest.fixture
def device(broker: Broker, tmp_path: Path) -> Iterator[Box]:
    """The device of the page."""
    site = {"enterprise": "acme", "site": "hall-2"}
    source = {"type": "stdin", "name": "microphone"}
    settings = write_settings(tmp_path, broker.port, site=site, sources=[source])
    with running(settings) as box:
        yield box


def words(line: str, broker: Broker, **replaced: str) -> list[str]:
    """A line of the page as it is typed at this broker."""
    for before, after in {"-h broker.plant": f"-h {HOST} -p {broker.port}", **replaced}.items():
        line = line.replace(before, after)
    return shlex.split(line)


def asked(line: str, broker: Broker, **replaced: str) -> dict[str, Any]:
    """The data of the answer that a line of mosquitto_rr prints."""
    done = subprocess.run(words(line, broker, **replaced), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, (line, done.stderr)
    data = json.loads(done.stdout)["data"]
    assert isinstance(data, dict)
    return data


def lines(program: str, *parts: str) -> list[str]:
    found = [line for line in LINES if line.startswith(program) and all(part in line for part in parts)]
    assert found
    return found


def test_every_request_of_the_page_is_done(broker: Broker, device: Box) -> None:
    with Subscriber(broker) as subscriber:
        device.say(COMMAND)
        first(subscriber, "evt/command")
        for line in lines("mosquitto_rr"):
            if "PENDING" not in line:
                assert asked(line, broker)["outcome"] == "ok", line
        for number, verb in enumerate(("confirm", "cancel"), start=1):
            device.say(START)
            (line,) = lines("mosquitto_rr", f"req/{verb} ")
            pending = question(subscriber, number)["pending_id"]
            assert asked(line, broker, PENDING=pending)["pending_id"] == pending
        assert first(subscriber, "evt/command", 2).data["confirmed"] is True
        (line,) = lines("mosquitto_pub")
        subprocess.run(words(line, broker), check=True, timeout=60)
        first(subscriber, "req/receipt")
        assert device.hang_up() == 0


@contextlib.contextmanager
def consumer(broker: Broker, folder: Path) -> Iterator[Path]:
    """The consumer of the page, running; the file with what it prints."""
    (line,) = lines("python3")
    printed = folder / "printed"
    typed = words(line, broker, **{"broker.plant 1883": f"{HOST} {broker.port}"})
    with printed.open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, str(CHECKOUT / typed[1]), *typed[2:]], cwd=folder, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield printed
    finally:
        process.kill()
        process.wait()


def test_the_consumer_acts_once_on_each_command_also_on_what_came_while_it_was_away(
    broker: Broker, device: Box, tmp_path: Path
) -> None:
    outbox = tmp_path / "state" / "outbox.db"

    def accepted(count: int) -> bool:
        return outbox.exists() and read_statistics(outbox).receipts["accepted"] == count

    with Subscriber(broker) as subscriber:
        with consumer(broker, tmp_path) as printed:
            wait_until((tmp_path / "done.db").exists, "the consumer has begun")
            device.say(COMMAND)
            wait_until(lambda: accepted(1), f"its receipt; it said {printed.read_text(encoding='utf-8')}")
        command = first(subscriber, "evt/command")
        device.say(COMMAND)  # nobody is there: the broker keeps it
        first(subscriber, "evt/command", 2)
        with consumer(broker, tmp_path):
            wait_until(lambda: accepted(2), "the receipt for what came meanwhile")
            publish.single(
                f"{ROOT}/evt/command", json.dumps(command.payload), 1, hostname=HOST, port=broker.port, protocol=MQTTv5
            )
            subscriber.wait_for(lambda m: sum(x.topic == f"{ROOT}/req/receipt" for x in m) == 3, "an answer once more")
        assert printed.read_text(encoding="utf-8").splitlines() == ["press-07 EmergencyStop {}"] * 2
        assert device.hang_up() == 0


def test_a_looker_on_sees_what_the_page_says(broker: Broker, device: Box) -> None:
    (line,) = lines("mosquitto_sub")
    with subprocess.Popen([*words(line, broker), "-C", "2", "-W", "20"], stdout=subprocess.PIPE, text=True) as looking:
        device.say(COMMAND)
        said, _ = looking.communicate(timeout=2 * PATIENCE_S)
    assert [each.split(" ", 1)[0] for each in said.splitlines()] == [f"{ROOT}/evt/transcript", f"{ROOT}/evt/command"]
