"""One connection to a broker, from dialling to its end: paho on the event loop, and the remedy for what goes wrong.

Law:

- A connection is used once: paho's own queue would resend a command without looking at its age.
- Nothing is queued here: what is published is on its way, and what the kernel would not take is seen in ``is_full``.
- ``abort`` resets the connection and the kernel's send buffer with it: what sits on a dead link never comes out later.

All of paho runs on the event loop (``loop_read``, ``loop_write``, ``loop_misc``); only dialling, which may wait for a
name server, runs in a thread of its own.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags
from paho.mqtt.enums import CallbackAPIVersion, LogLevel, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edge_asr import clock
from edge_asr.contract import Payload
from edge_asr.events import Message
from edge_asr.settings import Broker, Mqtt, Tls

T = TypeVar("T")

WINDOW = 16
"""Messages in flight; brokers allow 20 by default (mosquitto) and more, and a broker's own lower limit is respected."""

_DIAL_TIMEOUT_S = 10.0
"""For everything before CONNECT: name server, TCP and TLS, each of which can hang by itself."""

_CONSENT_TIMEOUT_S = 10.0
"""From CONNECT to CONNACK."""

_LIFE_ENDED = "no acknowledgement before a command's life ended"

_SIGNS_OF_THE_NETWORK = ("timed out", "nreachable", "No route")
"""In the texts of socket errors that do not come from the broker."""


class LinkError(Exception):
    """The broker cannot be used now; the message is one line with the remedy."""


@dataclass(frozen=True, slots=True)
class Destination:
    """A broker of the settings, and how we speak to it."""

    broker: Broker
    key: str
    """Where it stands in the settings; for errors."""
    keepalive_s: int

    @property
    def port(self) -> int:
        """The usual one unless set."""
        return self.broker.port or (8883 if self.broker.tls is not None else 1883)

    @property
    def address(self) -> str:
        """Host and port."""
        return f"{self.broker.host}:{self.port}"


def destinations(mqtt: Mqtt) -> tuple[Destination, ...]:
    """The brokers that are set, in order."""
    if mqtt.host is not None:
        only = Broker.model_validate({name: getattr(mqtt, name) for name in Broker.model_fields})
        return (Destination(only, "mqtt", mqtt.keepalive_s),)
    listed = enumerate(mqtt.brokers)
    return tuple(Destination(broker, f"mqtt.brokers.{number}", mqtt.keepalive_s) for number, broker in listed)


@dataclass(slots=True)
class Flight:
    """One message between its PUBLISH and its PUBACK."""

    message: Message | None
    """None: a retained state, of which only the acknowledgement is awaited."""
    deadline: asyncio.TimerHandle | None = None


class Inbox(Protocol):
    """What takes the messages that the broker sends on one connection."""

    @property
    def session(self) -> Properties:
        """What CONNECT tells the broker; with a SessionExpiryInterval the session is kept."""

    def attach(self, client: Client, send: Callable[[Payload], None]) -> None:
        """Be there before the client connects."""

    def open(self, connack: Properties) -> None:
        """Subscribe."""

    def close(self) -> None:
        """The connection has ended."""


class Link:
    """One connection, from CONNECT to its end; nothing of it is used again."""

    def __init__(self, client: Client, to: Destination) -> None:
        self.to = to
        self._client = client
        client.on_log = self._logged
        self._loop = asyncio.get_running_loop()
        self._consent: asyncio.Future[Properties | str] = self._loop.create_future()
        """What CONNACK carries, or why there is none."""
        self._complaint = ""
        self._socket: socket.socket | ssl.SSLSocket | None = None
        self._tick: asyncio.TimerHandle | None = None
        self._maximum_packet_bytes = 268_435_455
        self.in_flight: dict[int, Flight] = {}
        """By packet identifier."""
        self.window = WINDOW
        self.ended = ""
        """Why the connection ended; empty while it stands."""
        self.ended_by_peer = False
        """The other side closed it, neither we nor the network on the way."""
        self.on_puback: Callable[[Message | None, ReasonCode], None] = lambda _message, _reason: None
        self.on_end: Callable[[], object] = lambda: None
        self._inbox: Inbox | None = None

    @classmethod
    async def open(
        cls, to: Destination, client_id: str, will: Payload, inbox: Inbox | None = None, *, retain_will: bool = True
    ) -> Link:
        """Dial and wait for the broker's consent; ``inbox`` takes what it sends. Raises LinkError."""
        client = Client(CallbackAPIVersion.VERSION2, client_id, protocol=MQTTProtocolVersion.MQTTv5)
        about_will = _content_properties(PacketTypes.WILLMESSAGE, will)
        client.will_set(will.topic, will.body, qos=1, retain=retain_will, properties=about_will)
        client.max_inflight_messages = 0  # the window is kept here, so that paho never queues
        link = cls(client, to)
        if inbox is not None:
            link._inbox = inbox
            inbox.attach(client, lambda payload: link.publish(payload, qos=0))
        session = inbox.session if inbox is not None else None
        try:
            await _dial_in_time(client, to, session)
            link._attach(to.keepalive_s)
            connack = await asyncio.wait_for(link._consent, _CONSENT_TIMEOUT_S)
        except asyncio.TimeoutError:
            connack = "no answer to CONNECT; is that an MQTT 5 broker's port?"
        except BaseException:
            link.abort("the dialling was given up")
            raise
        if isinstance(connack, str):
            link.abort(connack)
            raise LinkError(f"{to.address}: {connack}")
        link.window = min(WINDOW, getattr(connack, "ReceiveMaximum", WINDOW))
        link._maximum_packet_bytes = getattr(connack, "MaximumPacketSize", link._maximum_packet_bytes)
        if inbox is not None and not link.ended:
            inbox.open(connack)
        return link

    @property
    def is_busy(self) -> bool:
        """Whether the broker's receive maximum, or our window, has no room for another PUBLISH at QoS 1."""
        return len(self.in_flight) >= self.window

    @property
    def is_full(self) -> bool:
        """Whether bytes wait that the kernel would not take."""
        return self._client.want_write()

    def fits(self, payload: Payload) -> bool:
        """Whether the broker takes packets of this size; it would end the connection over a larger one."""
        header = 64 + len(payload.topic.encode()) + len(payload.content_type)
        header += sum(5 + len(key) + len(value) for key, value in payload.user_properties)
        return header + len(payload.body) <= self._maximum_packet_bytes

    def publish(
        self,
        payload: Payload,
        *,
        qos: int,
        retain: bool = False,
        message: Message | None = None,
        deadline_s: float | None = None,
    ) -> None:
        """Send; at QoS 1 ``on_puback`` follows. With a deadline the connection is reset if none has come by then."""
        if self.ended:
            return
        properties = _publish_properties(payload)
        sent = self._client.publish(payload.topic, payload.body, qos=qos, retain=retain, properties=properties)
        if sent.rc is not MQTTErrorCode.MQTT_ERR_SUCCESS:
            self.abort(f"sending failed ({sent.rc.name})")
        elif qos:
            deadline = None
            if deadline_s is not None:
                deadline = self._loop.call_later(deadline_s, self.abort, _LIFE_ENDED)
            self.in_flight[sent.mid] = Flight(message, deadline)

    async def hang_up(self) -> None:
        """Disconnect in good order; the last will is then not sent."""
        ended = asyncio.Event()
        self.on_end = ended.set
        if not self.ended:
            self._client.disconnect()
            await ended.wait()

    def abort(self, reason: str) -> None:
        """End the connection now; what the kernel has not sent yet is thrown away (RST)."""
        opened = self._socket
        if opened is not None:
            with contextlib.suppress(OSError):
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._detach()
            opened.close()
        self._end(reason)

    def _attach(self, keepalive_s: int) -> None:
        """Let the event loop drive the client."""
        opened = self._client.socket()
        if not isinstance(opened, socket.socket):  # it broke while CONNECT was sent
            self._end(f"the connection was lost{self._because()}")
            return
        self._socket = opened
        # Without this a vanished peer is noticed only by the keepalive, up to two intervals later.
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, keepalive_s * 1000)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._client.on_connect = self._connected
        self._client.on_disconnect = self._disconnected
        self._client.on_publish = self._published
        self._client.on_socket_close = lambda *_: self._detach()
        self._client.on_socket_register_write = lambda *_: self._loop.add_writer(opened, self._client.loop_write)
        self._client.on_socket_unregister_write = lambda *_: self._stop_writing(opened)
        self._loop.add_reader(opened, self._read)
        self._read()  # TLS may have read ahead already
        self._keep_alive()

    def _stop_writing(self, opened: socket.socket) -> None:
        self._loop.remove_writer(opened)

    def _detach(self) -> None:
        """Take the socket from the event loop, for good: paho's destructor still calls back."""
        if self._tick is not None:
            self._tick.cancel()
        opened, self._socket = self._socket, None
        if opened is not None:
            self._client.on_socket_close = None
            self._client.on_socket_register_write = None
            self._client.on_socket_unregister_write = None
            self._loop.remove_reader(opened)
            self._loop.remove_writer(opened)

    def _read(self) -> None:
        """Read what is there; TLS may hold decrypted bytes that the loop's selector cannot see."""
        while self._client.loop_read() is MQTTErrorCode.MQTT_ERR_SUCCESS:
            if not (isinstance(self._socket, ssl.SSLSocket) and self._socket.pending()):
                return

    def _keep_alive(self) -> None:
        self._tick = self._loop.call_later(1.0, self._keep_alive)
        self._client.loop_misc()
        self._look_at_lives()

    def _look_at_lives(self) -> None:
        """While the box is suspended lives go on, and the loop's timers do not."""
        now_ns = clock.boottime_ns()
        limited = (flight.message for flight in self.in_flight.values() if flight.deadline is not None)
        if any(message and message.expires_ns and message.expires_ns <= now_ns for message in limited):
            self.abort(_LIFE_ENDED)

    def _end(self, reason: str) -> None:
        if self.ended:
            return
        self.ended = reason
        if self._inbox is not None:
            self._inbox.close()
        for flight in self.in_flight.values():
            if flight.deadline is not None:
                flight.deadline.cancel()
        if not self._consent.done():
            tls = f"{self.to.key}.tls"
            hint = f"does it want TLS there ({tls})?"
            if self.to.broker.tls is not None:
                hint = f"does it accept {tls}.cert_file?"
            self._consent.set_result(f"{reason} before the broker answered; {hint}")
        self.on_end()

    # -- paho's callbacks, all on the event loop once attached

    def _connected(
        self,
        _client: Client,
        _userdata: object,
        _flags: ConnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if self._consent.done():
            return
        if reason.is_failure or properties is None:
            remedy = _REFUSALS_OF_CONNECT.get(reason.value, "see the broker's log").format(key=self.to.key)
            self._consent.set_result(f"the broker refuses: {reason}; {remedy}")
        else:
            self._consent.set_result(properties)

    def _disconnected(
        self, _client: Client, _userdata: object, flags: DisconnectFlags, reason: ReasonCode, _properties: object
    ) -> None:
        if not any(sign in self._complaint for sign in _SIGNS_OF_THE_NETWORK):
            self.ended_by_peer = reason.getName() != "Keep alive timeout"
        if flags.is_disconnect_packet_from_server:
            self._end(f"the broker ended the connection: {reason}")
        else:
            self._end(f"the connection was lost{self._because()}")

    def _published(
        self, _client: Client, _userdata: object, packet_id: int, reason: ReasonCode, _properties: object
    ) -> None:
        flight = self.in_flight.pop(packet_id, None)
        if flight is None:  # QoS 0
            return
        if flight.deadline is not None:
            flight.deadline.cancel()
        self.on_puback(flight.message, reason)

    def _because(self) -> str:
        return f" ({self._complaint})" if self._complaint else ""

    def _logged(self, _client: Client, _userdata: object, level: int, text: str) -> None:
        """Keep what paho tells of an error: with TLS 1.3 a refused certificate shows up only here."""
        if level == LogLevel.MQTT_LOG_ERR:
            self._complaint = text.removeprefix("failed to receive on socket: ")


async def _in_disposable_thread(function: Callable[[], T], name: str) -> T:
    """Run a blocking call that a stop must not wait for; an executor's threads would be joined at exit."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def work() -> None:
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001 - raised where it is awaited
                future.set_exception(error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return await asyncio.wrap_future(future)


async def _dial_in_time(client: Client, to: Destination, session: Properties | None) -> None:
    """Raises LinkError. What has not come about by the limit never becomes a connection."""
    given_up = threading.Event()

    def refuse_if_late(*_: object) -> None:  # called between the handshake and CONNECT
        if given_up.is_set():
            raise TimeoutError

    client.on_socket_open = refuse_if_late
    dialling = _in_disposable_thread(lambda: dial(client, to, session), "mqtt-dial")
    try:
        await asyncio.wait_for(dialling, _DIAL_TIMEOUT_S)
    except asyncio.TimeoutError:
        remedy = "check the name server, the network and firewalls on the way"
        raise LinkError(f"{to.address}: no connection within {_DIAL_TIMEOUT_S:g} s; {remedy}") from None
    finally:
        given_up.set()


def dial(client: Client, to: Destination, session: Properties | None = None) -> None:
    """Connect and send CONNECT. Files are read anew each time: certificates and passwords are renewed while we run."""
    broker = to.broker
    if broker.username is not None:
        client.username_pw_set(broker.username, _password(broker.password_file, to.key))
    if broker.tls is not None:
        client.tls_set_context(_tls_context(broker.tls, to.key))
    try:
        kept = hasattr(session, "SessionExpiryInterval")
        client.connect(broker.host, to.port, to.keepalive_s, clean_start=not kept, properties=session)
    except (OSError, ValueError) as error:
        opened = client.socket()
        if isinstance(opened, socket.socket):
            opened.close()
        raise LinkError(f"{to.address}: {_remedy(error, to.key)}") from None


def _password(file: Path | None, key: str) -> str | None:
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, UnicodeDecodeError) as error:
        raise LinkError(f"{key}.password_file: {file} cannot be read ({_short(error)})") from None


class _TidySocket(ssl.SSLSocket):
    """Closes itself when the handshake fails; paho forgets to, at every attempt."""

    def do_handshake(self, block: bool = False) -> None:  # noqa: FBT001, FBT002 - the base class's signature
        """Shake hands or close."""
        try:
            super().do_handshake(block)
        except OSError:
            self.close()
            raise


def _tls_context(tls: Tls, key: str) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=tls.ca_file)
    except OSError as error:
        raise LinkError(f"{key}.tls.ca_file: {tls.ca_file} cannot be used ({_short(error)})") from None
    context.sslsocket_class = _TidySocket
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if tls.cert_file is not None:
        try:
            context.load_cert_chain(tls.cert_file, tls.key_file)
        except OSError as error:
            files = f"{tls.cert_file} with {tls.key_file}"
            raise LinkError(f"{key}.tls.cert_file: {files} cannot be used ({_short(error)})") from None
    return context


_REFUSALS_OF_CONNECT = {
    0x84: "it speaks no MQTT 5",
    0x85: "check mqtt.client_id",
    0x86: "check {key}.username and {key}.password_file",
    0x87: "check {key}.username, the certificate and the broker's access rules",
    0x8C: "check how the broker authenticates",
    0x9A: "it keeps no retained messages, which status needs",
}
"""By CONNACK reason code."""


def _remedy(error: Exception, key: str) -> str:
    """What went wrong while dialling and what to do, in one line."""
    reason = _short(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        names = f"check {key}.tls.ca_file and {key}.host"
        return f"the broker's certificate is not trusted ({error.verify_message}); {names}"
    if isinstance(error, (ssl.SSLError, ConnectionResetError, BrokenPipeError)):
        return f"the handshake failed ({reason}); check {key}.port and the certificates in {key}.tls"
    if isinstance(error, (socket.gaierror, ValueError)):
        return f"the name is unknown ({reason}); check {key}.host and the name server"
    if isinstance(error, ConnectionRefusedError):
        return f"nothing listens there; check {key}.host and {key}.port, and that the broker runs"
    if isinstance(error, TimeoutError):
        return "no answer; check the network and firewalls on the way"
    return f"no connection ({reason})"


def _short(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)


def _publish_properties(payload: Payload) -> Properties:
    properties = _content_properties(PacketTypes.PUBLISH, payload)
    if payload.user_properties:
        properties.UserProperty = list(payload.user_properties)
    if payload.expires_s is not None:
        properties.MessageExpiryInterval = payload.expires_s
    if payload.correlation is not None:
        properties.CorrelationData = payload.correlation
    return properties


def _content_properties(packet_type: int, payload: Payload) -> Properties:
    properties = Properties(packet_type)  # type: ignore[no-untyped-call]
    properties.PayloadFormatIndicator = int(payload.is_text)
    properties.ContentType = payload.content_type
    return properties
