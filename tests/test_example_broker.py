"""The broker of examples/mosquitto, as it is shipped: who may do what under mutual TLS, and what outlives kill -9."""

from __future__ import annotations

import asyncio
import json
import queue
import re
import shlex
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from typing_extensions import Self

from edge_asr.contract import Renderer
from edge_asr.outbox import Outbox
from edge_asr.requests import VERBS
from tests.broker import HOST, PATIENCE_S, Broker, Pki, wait_until
from tests.sysbox import CHECKOUT
from tests.test_publisher import emptied, new_folder, publishing, run, tls, transcript, until

SITE = "acme/hall-2"
EXAMPLE = CHECKOUT / "examples" / "mosquitto"


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"), "press-07", "press-08", "mes", "panel", "supervisor", "dashboard")


@pytest.fixture
def broker(tmp_path: Path, pki: Pki) -> Iterator[Broker]:
    """The shipped files; only folders, the port and the user are those of the test."""
    broker = Broker(new_folder(tmp_path, "broker"), tls=pki)
    rules = broker.folder / "acl"
    rules.write_bytes((EXAMPLE / "acl").read_bytes())
    rules.chmod(0o600)
    config = (EXAMPLE / "mosquitto.conf").read_text(encoding="utf-8")
    for shipped, here in {
        "listener 8883": f"listener {broker.port} {HOST}\nuser root",
        "/etc/mosquitto/certs": str(pki.ca.parent),
        "/etc/mosquitto/acl": str(rules),
        "/var/lib/mosquitto": str(broker.folder),
        "log_dest syslog": f"log_dest file {broker.folder}/mosquitto.log",
    }.items():
        assert shipped in config
        config = config.replace(shipped, here)
    (broker.folder / "mosquitto.conf").write_text(config, encoding="utf-8")
    with broker:
        yield broker


class Someone:
    """A client that shows a certificate; a context manager."""

    def __init__(self, broker: Broker, pki: Pki, name: str, topics: str = "") -> None:
        self.inbox: queue.Queue[MQTTMessage] = queue.Queue()
        self._verdicts: queue.Queue[ReasonCode] = queue.Queue()
        self._ready: queue.Queue[ReasonCode] = queue.Queue()
        self._client = Client(CallbackAPIVersion.VERSION2, name, protocol=MQTTProtocolVersion.MQTTv5)
        self._client.tls_set_context(pki.client_context(name))
        self._client.on_connect = lambda client, _data, _flags, reason, _more: (
            client.subscribe(topics, qos=1) if topics else self._ready.put(reason)
        )
        self._client.on_subscribe = lambda _client, _data, _mid, reasons, _more: self._ready.put(reasons[0])
        self._client.on_publish = lambda _client, _data, _mid, reason, _more: self._verdicts.put(reason)
        self._client.on_message = lambda _client, _data, message: self.inbox.put(message)
        session = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        session.SessionExpiryInterval = 3600
        self._client.connect(broker.host, broker.port, clean_start=False, properties=session)

    def __enter__(self) -> Self:
        self._client.loop_start()
        self.admitted = self._ready.get(timeout=PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def may_publish(self, topic: str, payload: str = "{}") -> bool:
        self._client.publish(topic, payload, qos=1)
        return not self._verdicts.get(timeout=PATIENCE_S).is_failure

    def next_topic(self) -> str:
        return self.inbox.get(timeout=PATIENCE_S).topic


def test_a_device_gets_its_messages_through_and_hears_its_requests(broker: Broker, pki: Pki, tmp_path: Path) -> None:
    letters: queue.Queue[str] = queue.Queue()

    async def main(mes: Someone) -> None:
        renderer = Renderer(f"{SITE}/voice/press-07", "press-07")
        with closing(Outbox(tmp_path / "outbox.db", 50_000_000)) as outbox:
            mqtt = broker.mqtt(tls=tls(pki, "press-07"))
            async with publishing(mqtt, outbox, renderer, on_request=lambda one: letters.put(one.verb)) as running:
                await until(lambda: running.connected, "a connection")
                await outbox.append(transcript("hello"))
                await until(lambda: emptied(outbox), "the broker to take it")
                assert await asyncio.to_thread(mes.may_publish, f"{SITE}/voice/press-07/req/ping")
                await until(lambda: not letters.empty(), "the request")
            assert (await outbox.statistics()).dead_letters == 0

    with Someone(broker, pki, "mes", f"{SITE}/voice/+/evt/#") as mes:
        run(main(mes))
        message = mes.inbox.get(timeout=PATIENCE_S)
        assert message.topic == f"{SITE}/voice/press-07/evt/transcript"
        assert json.loads(message.payload)["data"]["text"] == "hello"
        assert letters.get(timeout=PATIENCE_S) == "ping"


@pytest.mark.parametrize(
    ("name", "topic", "allowed"),
    [
        ("press-07", "voice/press-07/evt/command", True),
        ("press-07", "voice/press-08/evt/command", False),
        ("press-07", "voice/press-08/status", False),
        ("press-07", "voice/press-08/req/mute", False),
        ("press-07", "answers/press-07/17", True),
        ("press-07", "answers/press-08/17", False),
        ("mes", "voice/press-07/req/receipt", True),
        ("mes", "voice/press-07/evt/command", False),
        ("mes", "voice/mes/evt/command", False),
        ("mes", "voice/press-07/req/confirm", False),
        ("mes", "voice/press-07/req/confirm-supervisor", False),
        ("panel", "voice/press-07/req/confirm", True),
        ("panel", "voice/press-07/req/confirm-supervisor", False),
        ("panel", "voice/press-07/req/mute", False),
        ("supervisor", "voice/press-07/req/confirm-supervisor", True),
        ("supervisor", "voice/press-07/req/receipt", False),
        ("dashboard", "voice/press-07/req/mute", False),
        ("dashboard", "voice/press-07/evt/command", False),
    ],
)
def test_who_may_publish_what(broker: Broker, pki: Pki, name: str, topic: str, *, allowed: bool) -> None:
    with Someone(broker, pki, name) as someone:
        assert someone.may_publish(f"{SITE}/{topic}") is allowed


def test_every_verb_is_allowed_to_somebody() -> None:
    written = (EXAMPLE / "acl").read_text(encoding="utf-8")
    assert set(re.findall(r"^topic write .*/req/(\S+)$", written, re.MULTILINE)) == {*VERBS, "confirm-supervisor"}


def test_the_consumer_of_the_page_for_an_mes_acts_and_answers_under_mutual_tls(
    broker: Broker, pki: Pki, tmp_path: Path
) -> None:
    page = (CHECKOUT / "docs" / "mes.md").read_text(encoding="utf-8")
    (line,) = [line for line in page.splitlines() if line.startswith("python3") and "--ca" in line]
    typed = line.replace("broker.plant 8883", f"localhost {broker.port}")
    typed = re.sub(r"(\S+)\.(crt|key)", lambda found: str(pki.ca.parent / found.group()), typed)
    program = [sys.executable, str(CHECKOUT / typed.split()[1]), *shlex.split(typed)[2:]]
    known = {"id": "c1", "device": "press-07", "time_quality": "unsynchronized"}
    order = json.dumps({**known, "intent": "Halt", "slots": {}, "expires_at": "2026-11-22T07:02:26.123+01:00"})
    with (
        Someone(broker, pki, "press-07", f"{SITE}/voice/press-07/req/+") as device,
        subprocess.Popen(program, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as consumer,
    ):
        try:
            while device.inbox.empty():  # until it has subscribed; the same command is done once
                device.may_publish(f"{SITE}/voice/press-07/evt/command", order)
            assert device.next_topic() == f"{SITE}/voice/press-07/req/receipt"
            assert consumer.stdout
            assert consumer.stdout.readline() == "press-07 Halt {}\n"
        finally:
            consumer.kill()


def test_a_device_does_not_hear_what_others_say_or_are_asked(broker: Broker, pki: Pki) -> None:
    with (
        Someone(broker, pki, "press-07", f"{SITE}/#") as curious,
        Someone(broker, pki, "press-08") as other,
        Someone(broker, pki, "mes") as mes,
    ):
        assert other.may_publish(f"{SITE}/voice/press-08/evt/transcript")
        assert mes.may_publish(f"{SITE}/voice/press-08/req/mute")
        assert mes.may_publish(f"{SITE}/voice/press-07/req/mute")
        assert curious.next_topic() == f"{SITE}/voice/press-07/req/mute"


def test_nobody_comes_in_without_a_certificate_of_the_plant(broker: Broker, pki: Pki, tmp_path: Path) -> None:
    stranger = Pki(new_folder(tmp_path, "stranger"), "press-07")
    nameless, foreign = ssl.create_default_context(cafile=pki.ca), ssl.create_default_context(cafile=pki.ca)
    foreign.load_cert_chain(stranger.cert("press-07"), stranger.key("press-07"))
    for context in (nameless, foreign):
        client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        client.tls_set_context(context)
        admitted: list[object] = []
        client.on_connect = lambda *_, admitted=admitted: admitted.append(1)
        with pytest.raises((ssl.SSLError, ConnectionError)):  # noqa: PT012 - TLS 1.3 tells only when something is read
            client.connect(broker.host, broker.port)
            while True:
                client.loop(0.1)
                if client.socket() is None:
                    raise ConnectionResetError
        assert admitted == []


def test_what_is_written_down_outlives_kill_9_for_a_consumer_that_was_away(broker: Broker, pki: Pki) -> None:
    topics = f"{SITE}/voice/+/evt/#"
    with Someone(broker, pki, "mes", topics):
        pass  # its session stays and collects
    with Someone(broker, pki, "press-07") as device:
        for n in range(100):
            assert device.may_publish(f"{SITE}/voice/press-07/evt/n{n}")
    last = f"{SITE}/voice/press-07/evt/n99".encode()
    wait_until(lambda: last in (broker.folder / "mosquitto.db").read_bytes(), "the broker to write it down")
    broker.restart()  # kill -9
    with Someone(broker, pki, "press-07") as device:
        assert device.may_publish(f"{SITE}/voice/press-07/evt/after"), (
            "a consumer that is still away misses nothing new"
        )
    with Someone(broker, pki, "mes", topics) as mes:
        got = [mes.next_topic().rpartition("/")[2] for _ in range(101)]
    assert got == [*(f"n{n}" for n in range(100)), "after"]
