"""An MES developer who has docs/mes.md and nothing else: its lines run, its tables are true, its consumer works."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import sqlite3
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
from tests.payloads import complaint
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
    with Broker(folder, extra="log_type subscribe") as running_broker:
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
def consumer(
    broker: Broker, folder: Path, *more: str, printed: Path | None = None, script: str = "consumer.py"
) -> Iterator[Path]:
    """A consumer of the page, running; the file with what it prints."""
    (line,) = lines("python3", "broker.plant 1883", script)
    printed = printed or folder / "printed"
    typed = [*words(line, broker, **{"broker.plant 1883": f"{HOST} {broker.port}"}), *more]
    with printed.open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, str(CHECKOUT / typed[1]), *typed[2:]], cwd=folder, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield printed
    finally:
        process.kill()
        process.wait()


def post(broker: Broker, payload: object) -> None:
    """Publish on the topic of the device's commands."""
    written = payload if isinstance(payload, str) else json.dumps(payload)
    where = ["-V", "5", "-h", HOST, "-p", str(broker.port), "-q", "1", "-t", f"{ROOT}/evt/command", "-s"]
    subprocess.run(["mosquitto_pub", *where], input=written, check=True, text=True)


def subscribed(broker: Broker) -> None:
    log = broker.folder / "mosquitto.log"
    wait_until(lambda: "mes 1 acme" in log.read_text(encoding="utf-8"), "the consumer to subscribe")


def known(folder: Path) -> list[str]:
    """The commands that the consumer has written down."""
    with contextlib.closing(sqlite3.connect(folder / "done.db")) as written:
        return [row[0] for row in written.execute("SELECT id FROM commands ORDER BY rowid")]


def order(command_id: str) -> dict[str, Any]:
    """As much of a command as the consumer looks at."""
    known = {"id": command_id, "device": "press-07", "time_quality": "synchronized"}
    return {**known, "intent": "Halt", "slots": {"n": command_id}, "expires_at": "2999-01-01T00:00:00.000+00:00"}


def answers(subscriber: Subscriber, count: int) -> list[tuple[str, str]]:
    """(command, verdict and reason) of the first receipts."""
    subscriber.wait_for(lambda m: sum(x.topic.endswith("/req/receipt") for x in m) >= count, "the receipts")
    data = [one.data for one in subscriber.on("/req/receipt")]
    return [(one["command_id"], f"{one['verdict']} {one['reason']}".strip()) for one in data]


def test_a_consumer_that_dies_while_it_acts_says_so_and_does_not_act_again(broker: Broker, tmp_path: Path) -> None:
    with Subscriber(broker, f"{ROOT}/req/receipt") as subscriber:
        full = Path("/dev/full")  # it cannot print: its act fails halfway
        with consumer(broker, tmp_path, printed=full):
            subscribed(broker)
            post(broker, order("c1"))
            wait_until(lambda: known(tmp_path) == ["c1"], "it to be written down")
        with consumer(broker, tmp_path) as printed:
            assert answers(subscriber, 1) == [("c1", "rejected interrupted: nobody knows whether it was done")]
        assert printed.read_text(encoding="utf-8") == ""


def test_the_consumer_passes_over_what_is_no_command_and_forgets_the_oldest(broker: Broker, tmp_path: Path) -> None:
    with (
        Subscriber(broker, f"{ROOT}/req/receipt") as subscriber,
        consumer(broker, tmp_path, "--remember", "2") as printed,
    ):
        subscribed(broker)
        half_a_pair, number = {**order("c0"), "id": "\ud800"}, {**order("c0"), "id": 1}
        rubbish: list[object] = ["not JSON", "[" * 100_000, [], {}, half_a_pair, number]
        for each in rubbish:
            post(broker, each)
        for name in ("c1", "c2", "c2", "c3"):
            post(broker, order(name))
        assert answers(subscriber, 4) == [(name, "accepted") for name in ("c1", "c2", "c2", "c3")]
        assert known(tmp_path) == ["c2", "c3"]
        said = printed.read_text(encoding="utf-8").splitlines()
    assert [line for line in said if "holds no command" not in line] == [
        f"press-07 Halt {{'n': '{name}'}}" for name in ("c1", "c2", "c3")
    ]
    assert len(said) == 3 + len(rubbish)


def test_the_consumer_does_not_act_on_what_came_too_late(broker: Broker, tmp_path: Path) -> None:
    late = {**order("c1"), "expires_at": "2026-01-01T00:00:00.000+00:00"}
    doubtful = {**late, "id": "c2", "time_quality": "unsynchronized"}
    with Subscriber(broker, f"{ROOT}/req/receipt") as subscriber, consumer(broker, tmp_path):
        subscribed(broker)
        post(broker, late)
        post(broker, doubtful)
        assert answers(subscriber, 2) == [("c1", "rejected it came too late"), ("c2", "accepted")]


@pytest.mark.parametrize("script", ["consumer.py", "minimal.py"])
def test_the_consumer_acts_once_on_each_command_also_on_what_came_while_it_was_away(
    script: str, broker: Broker, device: Box, tmp_path: Path
) -> None:
    outbox = tmp_path / "state" / "outbox.db"

    def accepted(count: int) -> bool:
        return outbox.exists() and read_statistics(outbox).receipts["accepted"] == count

    with Subscriber(broker) as subscriber:
        with consumer(broker, tmp_path, script=script) as printed:
            wait_until((tmp_path / "done.db").exists, "the consumer has begun")
            device.say(COMMAND)
            wait_until(lambda: accepted(1), f"its receipt; it said {printed.read_text(encoding='utf-8')}")
        command = first(subscriber, "evt/command")
        device.say(COMMAND)  # nobody is there: the broker keeps it
        first(subscriber, "evt/command", 2)
        with consumer(broker, tmp_path, script=script):
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
    seen = [each.split(" ", 1) for each in said.splitlines()]
    assert [topic for topic, _ in seen] == [f"{ROOT}/evt/transcript", f"{ROOT}/evt/command"]
    assert [complaint(topic, json.loads(payload)) for topic, payload in seen] == ["", ""]
