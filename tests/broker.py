"""A real mosquitto to stop, kill, freeze and restart, and an MQTT 5 client of paho's that keeps what it is sent."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import Client, ConnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions
from typing_extensions import Self

from edge_asr import contract, settings
from tests.payloads import complaint

HOST = "127.0.0.1"
PATIENCE_S = 20.0
"""The deadline of every wait here: long for a busy machine, and never waited out when things work."""

# Without the last two mosquitto forgets on SIGKILL what it has acknowledged.
_DURABLE = """\
persistence true
persistence_location {folder}/
autosave_on_changes true
autosave_interval 1
"""


class Broker:
    """A mosquitto process that keeps its port and its persistent store across restarts; a context manager."""

    def __init__(
        self,
        folder: Path,
        *,
        extra: str = "",
        anonymous: bool = True,
        tls: Pki | None = None,
        durable: bool = True,
        host: str = HOST,
        prefix: Sequence[str] = (),
    ) -> None:
        """``extra`` is added to mosquitto.conf; with ``tls`` the broker asks clients for a certificate.

        Durable, it saves its whole store with every change: right for killing it, slow under many messages. A
        ``prefix`` such as `ip netns exec NAME` puts the process elsewhere; ``host`` is then its address there.
        """
        self.folder = folder
        self.host = host
        self._prefix = prefix
        self.port = free_port()
        lines = [f"user {getpass.getuser()}", f"log_dest file {folder}/mosquitto.log", f"listener {self.port} {host}"]
        lines += [f"allow_anonymous {str(anonymous).lower()}", "max_queued_messages 0"]
        if tls is not None:
            lines += [f"cafile {tls.ca}", f"certfile {tls.cert('server')}", f"keyfile {tls.key('server')}"]
            lines += ["require_certificate true", "use_identity_as_username true"]
        self._config = folder / "mosquitto.conf"
        self._config.write_text(
            "\n".join([*lines, _DURABLE.format(folder=folder) if durable else "", extra]), encoding="utf-8"
        )
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self.kill()

    def start(self) -> None:
        program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
        assert program, "mosquitto is not installed: tools/test installs it"
        self._process = subprocess.Popen([*self._prefix, program, "-c", str(self._config)])
        wait_until(self._listens, f"mosquitto listens ({self.folder}/mosquitto.log)")

    def stop(self) -> None:
        """End it in good order: clients are disconnected, the store is saved."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        self.kill()
        self.start()

    def reload(self) -> None:
        """Let it read its access rules again."""
        assert self._process
        self._process.send_signal(signal.SIGHUP)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """The process stands still; its kernel still accepts connections and bytes."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def mqtt(self, **more: Any) -> settings.Mqtt:
        """Settings that lead here."""
        return settings.Mqtt.model_validate({"host": self.host, "port": self.port, "max_retry_s": 1, **more})

    def _end(self, number: signal.Signals) -> None:
        assert self._process
        self._process.send_signal(number)
        self._process.wait(PATIENCE_S)
        self._process = None

    def _listens(self) -> bool:
        assert self._process
        assert self._process.poll() is None, (self.folder / "mosquitto.log").read_text(encoding="utf-8")
        with socket.socket() as probe:
            return probe.connect_ex((self.host, self.port)) == 0


@dataclass(frozen=True)
class Received:
    """One message as the broker delivered it."""

    topic: str
    payload: dict[str, Any]
    """The JSON as it came, CloudEvents envelope included."""
    retained: bool
    duplicate: bool
    """The broker itself sends it again."""
    qos: int
    properties: Mapping[str, Any]
    """MQTT 5 properties by paho's names, e.g. ``MessageExpiryInterval``."""

    @property
    def data(self) -> dict[str, Any]:
        """The flat data, in either payload mode."""
        data = self.payload.get("data", self.payload)
        assert isinstance(data, dict)
        return data


class Subscriber:
    """Collects what the broker sends, in order, and validates it; reconnects by itself and keeps its session meanwhile.

    A later Subscriber of the same client id continues the session: the broker collects in between.
    """

    def __init__(
        self, broker: Broker, topics: str = "#", *, client_id: str = "subscriber", tls: Pki | None = None
    ) -> None:
        self._topics = topics
        self._messages: list[Received] = []
        self._invalid: list[str] = []
        self._changed = threading.Condition()
        self._subscribed = threading.Event()
        self._client = Client(CallbackAPIVersion.VERSION2, client_id, protocol=MQTTProtocolVersion.MQTTv5)
        if tls is not None:
            self._client.tls_set_context(tls.client_context(client_id))
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = self._on_message
        session = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        session.SessionExpiryInterval = 3600
        self._client.connect(broker.host, broker.port, keepalive=5, clean_start=False, properties=session)

    def __enter__(self) -> Self:
        self._client.loop_start()
        assert self._subscribed.wait(PATIENCE_S), "the broker granted no subscription"
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    @property
    def messages(self) -> list[Received]:
        with self._changed:
            assert self._invalid == [], self._invalid
            return list(self._messages)

    def on(self, suffix: str) -> list[Received]:
        """What came on topics that end so."""
        return [message for message in self.messages if message.topic.endswith(suffix)]

    def wait_for(self, condition: Callable[[list[Received]], object], what: str, limit_s: float = PATIENCE_S) -> None:
        """Return once the condition holds for the messages so far; fail with ``what`` after the limit."""
        with self._changed:
            fulfilled = self._changed.wait_for(lambda: self._invalid or condition(self._messages), limit_s)
            assert self._invalid == [], self._invalid
            if not fulfilled:
                pytest.fail(f"waited {limit_s} s in vain: {what}; {len(self._messages)} messages came")

    def _on_connect(
        self, client: Client, _data: object, _flags: ConnectFlags, reason: ReasonCode, _properties: object
    ) -> None:
        if not reason.is_failure:
            client.subscribe(self._topics, options=SubscribeOptions(qos=1, retainAsPublished=True))

    def _on_message(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        payload = _parsed(message)
        properties = vars(message.properties) if message.properties else {}
        received = Received(message.topic, payload, message.retain, message.dup, message.qos, properties)
        problem = complaint(message.topic, payload)
        with self._changed:
            self._messages.append(received)
            self._invalid += [problem] if problem else []
            self._changed.notify_all()


@contextlib.contextmanager
def arrivals(broker: Broker) -> Iterator[dict[str, float]]:
    """Utterance -> when its transcript came from the broker (monotonic seconds)."""
    at: dict[str, float] = {}
    granted = threading.Event()

    def note(_client: object, _data: object, message: MQTTMessage) -> None:
        arrived = time.monotonic()
        at[json.loads(message.payload)["data"]["utterance_id"]] = arrived

    client = Client(CallbackAPIVersion.VERSION2)
    client.on_message = note
    client.on_subscribe = lambda *_: granted.set()
    client.connect(broker.host, broker.port)
    client.subscribe("voice/+/evt/transcript", qos=1)
    client.loop_start()
    try:
        assert granted.wait(PATIENCE_S), "the broker granted no subscription"
        yield at
    finally:
        client.disconnect()
        client.loop_stop()


def _parsed(message: MQTTMessage) -> dict[str, Any]:
    """The JSON; of a request whatever it is, for some are rubbish on purpose."""
    try:
        payload = json.loads(message.payload)
    except ValueError:
        assert f"/{contract.REQUESTS}" in message.topic
        payload = {}
    return payload if isinstance(payload, dict) else {}


class Requester:
    """Sends requests to one device and waits for the answers, each held to its schema."""

    def __init__(self, broker: Broker, root: str, *, client_id: str = "mes", answers: str = "mes/answers") -> None:
        self._root, self._answers = root, answers
        self.sent = 0
        """Requests so far."""
        self._received: list[tuple[bytes | None, dict[str, Any]]] = []
        self._changed = threading.Condition()
        self._subscribed = threading.Event()
        self._client = Client(CallbackAPIVersion.VERSION2, client_id, protocol=MQTTProtocolVersion.MQTTv5)
        self._client.on_connect = lambda client, *_: client.subscribe(answers, qos=1)
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = self._on_message
        self._client.connect(broker.host, broker.port, keepalive=5)

    def __enter__(self) -> Self:
        self._client.loop_start()
        assert self._subscribed.wait(PATIENCE_S), "the broker granted no subscription"
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def ask(self, verb: str, body: Mapping[str, Any] | bytes = b"", **how: Any) -> dict[str, Any]:
        """Send a request and return the data of its answer."""
        correlation = self.send(verb, body, **how)
        return self.answers(correlation)[0]

    def send(
        self,
        verb: str,
        body: Mapping[str, Any] | bytes = b"",
        *,
        correlation: bytes | None = None,
        qos: int = 1,
        retain: bool = False,
        answers: str | None = None,
        expires_s: int | None = None,
    ) -> bytes:
        """Send a request; its correlation data."""
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.ResponseTopic = self._answers if answers is None else answers
        mark = correlation or os.urandom(8)
        properties.CorrelationData = mark
        if expires_s is not None:
            properties.MessageExpiryInterval = expires_s
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = self._client.publish(f"{self._root}/req/{verb}", payload, qos, retain, properties)
        sent.wait_for_publish(PATIENCE_S)
        self.sent += 1
        return mark

    def answers(self, correlation: bytes, count: int = 1, limit_s: float = PATIENCE_S) -> list[dict[str, Any]]:
        """The data of the answers to one request, once there are ``count``."""

        def found() -> list[dict[str, Any]]:
            return [data for mark, data in self._received if mark == correlation]

        with self._changed:
            if not self._changed.wait_for(lambda: len(found()) >= count, limit_s):
                pytest.fail(f"no answer came within {limit_s} s")
            answers = found()
        assert not [answer["invalid"] for answer in answers if "invalid" in answer]
        return answers

    def _on_message(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        payload = json.loads(message.payload)
        problem = complaint(message.topic, payload)
        data = {**payload.get("data", payload), **({"invalid": problem} if problem else {})}
        with self._changed:
            self._received.append((getattr(message.properties, "CorrelationData", None), data))
            self._changed.notify_all()


class Pki:
    """A throw-away certificate authority with a server's and some clients' certificates, made by openssl."""

    def __init__(self, folder: Path, *clients: str) -> None:
        self._folder = folder
        self._openssl(*f"ecparam -genkey -name prime256v1 -noout -out {self.key('ca')}".split())
        self._openssl(
            *f"req -x509 -new -key {self.key('ca')} -days 2 -subj /CN=test-ca -out {self.ca}".split(),
            *("-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign"),
        )
        self._issue("server", "DNS:localhost,IP:127.0.0.1")
        for client in clients:
            self._issue(client, f"DNS:{client}")

    @property
    def ca(self) -> Path:
        return self.cert("ca")

    def cert(self, name: str) -> Path:
        return self._folder / f"{name}.crt"

    def key(self, name: str) -> Path:
        return self._folder / f"{name}.key"

    def client_context(self, name: str) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.ca)
        context.load_cert_chain(self.cert(name), self.key(name))
        return context

    def _issue(self, name: str, subject_alternative_name: str) -> None:
        request, extensions = self._folder / f"{name}.csr", self._folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={subject_alternative_name}\n", encoding="ascii")
        self._openssl(*f"ecparam -genkey -name prime256v1 -noout -out {self.key(name)}".split())
        self._openssl(*f"req -new -key {self.key(name)} -subj /CN={name} -out {request}".split())
        self._openssl(
            *f"x509 -req -in {request} -CA {self.ca} -CAkey {self.key('ca')} -CAcreateserial -days 2".split(),
            *f"-extfile {extensions} -out {self.cert(name)}".split(),
        )

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=self._folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
        assert isinstance(port, int)
        return port


def wait_until(condition: Callable[[], object], what: str, limit_s: float = PATIENCE_S) -> None:
    """For what gives no notice: look every few milliseconds."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"waited {limit_s} s in vain: {what}")
        time.sleep(0.005)
