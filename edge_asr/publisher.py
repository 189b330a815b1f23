"""Carries the outbox to the broker: at least once, oldest first, and never a stale command as a live one.

Law:

- A message leaves the outbox only after a PUBACK with a reason code below 0x80. A refused one is tried again in its
  place and alone, nothing overtakes it, and after :data:`REFUSALS` refusals it is put aside as a dead letter. So is one
  over which the broker ends the connection :data:`ENDINGS` times, or it would hold up all others for ever.
- Order is the outbox's. One exception: while messages from before this connection (the backlog, ``replayed``) are being
  sent, a command committed since goes first, because its life is short.
- Before each sending a command's life is looked at. If it ends while the command is in flight, the connection is reset
  and the kernel's send buffer with it: nothing that sits on a dead link may come out later.
- Every connection is a new paho client: paho's own queue would resend a command without looking at its age.

All of paho runs on the event loop (``loop_read``, ``loop_write``, ``loop_misc``); only dialling, which may wait for a
name server, runs in a thread of its own. Limit: a broker that is frozen *after* taking our bytes may hand a command on
when it thaws; consumers compare ``expires_at``.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import random
import socket
import ssl
import struct
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags
from paho.mqtt.enums import CallbackAPIVersion, LogLevel, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edge_asr import contract
from edge_asr.contract import Payload, Renderer
from edge_asr.events import Json, Message
from edge_asr.outbox import Outbox, OutboxError, life_left_s
from edge_asr.settings import Mqtt, Tls

log = logging.getLogger(__name__)

T = TypeVar("T")

WINDOW = 16
"""Messages in flight; brokers allow 20 by default (mosquitto) and more, and a broker's own lower limit is respected."""

REFUSALS = 4
"""Error PUBACKs after which a message is put aside."""

ENDINGS = 10
"""Connections that may end over a message sent alone; more than refusals, since a broker in trouble does that too."""

_REFUSAL_PAUSE_S = 0.25
"""Before the second try; doubled each time, so a message that nobody will ever take holds up the others for 1.75 s."""

_PAGE = 64
"""Messages read from the outbox at a time."""

_FIRST_RETRY_S = 0.5
_STABLE_AFTER_S = 10.0
"""A connection that held this long starts the pauses afresh; two devices fighting for one client id do not."""

_DIAL_TIMEOUT_S = 10.0
_FAREWELL_S = 1.0
"""The longest a stop waits for the broker."""

_SIGNS_OF_THE_NETWORK = ("timed out", "nreachable", "No route")
"""In the texts of socket errors that do not come from the broker."""

_RETAINED_QOS = {contract.STATUS: 1, contract.META: 1, contract.HEALTH: 0}


class PublisherError(Exception):
    """The broker cannot be used now; the message is one line with the remedy."""


class Publisher:
    """Keeps a connection to the broker for ever and sends through it. Everything is called on the event loop."""

    def __init__(
        self,
        mqtt: Mqtt,
        renderer: Renderer,
        outbox: Outbox,
        *,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_change`` is called whenever ``connected`` or ``trouble`` has changed."""
        self._mqtt = mqtt
        self._renderer = renderer
        self._outbox = outbox
        self._on_change = on_change
        self._link: _Link | None = None
        self._retained: dict[str, Mapping[str, Json]] = {contract.STATUS: contract.status_data("online")}
        self._cautious = False
        self.trouble = ""
        """Why there is no connection; empty when there is one, or none was tried."""

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted us and the connection has not been seen to end."""
        return self._link is not None

    async def run(self) -> None:
        """Publish until cancelled; then say offline and hang up. What is unsent stays in the outbox."""
        if self._mqtt.host is None:
            log.info("no broker is set (mqtt.host): the outbox keeps everything")
            await asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            began = loop.time()
            try:
                await self._converse()
            except (PublisherError, OutboxError) as error:
                self._tell(str(error))
            failures = 0 if loop.time() - began > _STABLE_AFTER_S else failures + 1
            await asyncio.sleep(pause_s(failures, self._mqtt.max_retry_s))

    def publish_live(self, topic: str, data: Mapping[str, Json]) -> None:
        """Send at QoS 0 what is worth nothing later; dropped while offline or while the link is full."""
        if self._link is not None and not self._link.is_full:
            self._link.publish(self._renderer.state(topic, data), qos=0)

    def publish_retained(self, topic: str, data: Mapping[str, Json]) -> None:
        """Set what the broker shows of this device; sent now, and again at every connection."""
        self._retained[topic] = data
        if self._link is not None:
            self._send_retained(self._link, topic)

    def _send_retained(self, link: _Link, topic: str) -> None:
        payload = self._renderer.state(topic, self._retained[topic])
        link.publish(payload, qos=_RETAINED_QOS[topic], retain=True)

    async def _converse(self) -> None:
        """One connection, from dialling to its end. Raises PublisherError with the reason why it ended."""
        will = self._renderer.state(contract.STATUS, contract.status_data("offline", "the connection was lost"))
        link = await _Link.open(self._mqtt, self._mqtt.client_id or f"edge-asr-{self._renderer.device}", will)
        delivery = _Delivery(link, self._outbox, self._renderer, cautious=self._cautious)
        self._link = link
        self._tell("")
        try:
            for topic in self._retained:
                self._send_retained(link, topic)
            await delivery.run()
        except asyncio.CancelledError:
            await self._farewell(link, delivery)
            raise
        finally:
            self._link = None
            self._cautious = delivery.cautious
            link.abort("the connection is no longer wanted")
            self._on_change()
        raise PublisherError(f"{_address(self._mqtt)}: {link.ended}")

    async def _farewell(self, link: _Link, delivery: _Delivery) -> None:
        """Say offline; the broker answers in order, so the answer also settles what was in flight."""
        gone = self._renderer.state(contract.STATUS, contract.status_data("offline", "the daemon was stopped"))
        link.publish(gone, qos=1, retain=True)
        with contextlib.suppress(asyncio.TimeoutError, OutboxError):
            await asyncio.wait_for(delivery.finish(), _FAREWELL_S)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(link.hang_up(), _FAREWELL_S)

    def _tell(self, trouble: str) -> None:
        """Log a change of state once, not at every attempt."""
        if trouble and trouble != self.trouble:
            log.warning("not publishing, the outbox keeps everything: %s", trouble)
        elif not trouble:
            log.info("connected to the broker at %s", _address(self._mqtt))
        self.trouble = trouble
        self._on_change()


@dataclass(slots=True)
class _Flight:
    """One message between its PUBLISH and its PUBACK."""

    message: Message | None
    """None: a retained state, of which only the acknowledgement is awaited."""
    deadline: asyncio.TimerHandle | None = None


class _Delivery:
    """What one connection takes from the outbox: which message is next, what is in flight, what came back."""

    def __init__(self, link: _Link, outbox: Outbox, renderer: Renderer, *, cautious: bool) -> None:
        self.cautious = cautious
        """One message at a time, until the broker takes one: something in flight was refused or ended a connection."""
        self._link = link
        self._outbox = outbox
        self._renderer = renderer
        self._loop = asyncio.get_running_loop()
        self._stir = asyncio.Event()
        """Something happened: a PUBACK, a new message, the end of a pause or of the connection."""
        self._backlog_end = outbox.last_seq
        self._cursor = 0
        """The newest sequence number taken in order."""
        self._page: deque[Message] = deque()
        self._overtaking_cursor = self._backlog_end
        self._overtook: set[int] = set()
        """Sent ahead of the cursor."""
        self._taken: list[int] = []
        """Acknowledged by the broker, not yet removed from the outbox."""
        self._refused: list[tuple[int, str]] = []
        self._resume_at = 0.0
        self._wanted: set[int] = set()
        """Refused messages whose fate comes before anything else is sent."""
        link.on_puback = self._puback
        link.on_end = self._stir.set

    async def run(self) -> None:
        """Send and settle until the connection ends."""
        watch = asyncio.create_task(self._watch(), name="publisher-outbox-watch")
        try:
            while not self._link.ended:
                self._stir.clear()
                await self._settle()
                await self._send()
                await self._stir.wait()
            await self._settle()
            await self._blame()
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    async def finish(self) -> None:
        """Wait until nothing is in flight, and settle."""
        while self._link.in_flight and not self._link.ended:
            self._stir.clear()
            await self._stir.wait()
        await self._settle()

    async def _watch(self) -> None:
        seen = self._outbox.last_seq
        while True:
            await self._outbox.arrival(seen)
            seen = self._outbox.last_seq
            self._stir.set()

    async def _settle(self) -> None:
        """Remove what the broker took; go back to what it refused."""
        if self._taken:
            taken = tuple(self._taken)
            await self._outbox.acknowledge(taken)
            del self._taken[: len(taken)]
        while self._refused:
            seq, reason = self._refused[0]
            refusals = await self._outbox.refuse(seq, reason, REFUSALS)
            del self._refused[0]
            if not 0 < refusals < REFUSALS:
                self._wanted.discard(seq)
            else:
                self._go_back(seq)
                pause_s = _REFUSAL_PAUSE_S * 2.0 ** (refusals - 1)
                self._resume_at = self._loop.time() + pause_s
                self._loop.call_later(pause_s, self._stir.set)

    async def _blame(self) -> None:
        """The connection has ended: find out whether it is always the same message over which it does."""
        flying = [flight.message for flight in self._link.in_flight.values()]
        if self._link.ended_by_peer and flying:
            (suspect, *others) = flying
            if self.cautious and suspect is not None and not others:
                await self._outbox.refuse(suspect.seq, f"whenever it is sent, {self._link.ended}", ENDINGS)
            self.cautious = True

    def _go_back(self, seq: int) -> None:
        """Let a message be the next one."""
        self._overtook.discard(seq)
        self._cursor = min(self._cursor, seq - 1)
        self._page.clear()

    async def _send(self) -> None:
        while self._may_send():
            message = await self._next()
            if message is None:
                return
            if not self._may_send():  # a refusal or the end came while the outbox was read
                self._go_back(message.seq)
                return
            life_s = life_left_s(message) if message.topic == contract.COMMAND else None
            replayed = message.seq <= self._backlog_end
            payload = self._renderer.message(message, replayed=replayed, life_left_s=life_s)
            if self._link.fits(payload):
                deadline_s = life_s if payload.expires_s is not None else None
                self._link.publish(payload, qos=1, message=message, deadline_s=deadline_s)
            else:
                await self._outbox.refuse(message.seq, "larger than the broker's maximum packet size", 1)

    def _may_send(self) -> bool:
        window = 1 if self.cautious else self._link.window
        waits = self._refused or self._loop.time() < self._resume_at
        return not (self._link.ended or waits or len(self._link.in_flight) >= window)

    async def _next(self) -> Message | None:
        """The message that is due; None: all that there is has been sent."""
        command = await self._next_overtaking()
        if command is not None:
            return command
        while self._page or await self._turn_page():
            message = self._page.popleft()
            self._cursor = message.seq
            if message.seq in self._overtook:
                self._overtook.discard(message.seq)
            elif message.seq not in self._handled():
                return message
        return None

    async def _turn_page(self) -> bool:
        newest = self._outbox.last_seq
        if self._cursor >= newest:
            return False
        self._page.extend(await self._outbox.oldest(_PAGE, self._cursor))
        if not self._page:
            self._cursor = newest
        return bool(self._page)

    async def _next_overtaking(self) -> Message | None:
        """A command newer than the backlog that is being sent."""
        newest = self._outbox.last_seq
        if self._cursor >= self._backlog_end or self._overtaking_cursor >= newest:
            return None
        commands = await self._outbox.oldest(1, self._overtaking_cursor, "command")
        self._overtaking_cursor = commands[0].seq if commands else newest
        self._overtook.update(command.seq for command in commands)
        return commands[0] if commands else None

    def _handled(self) -> set[int]:
        """What going back to a refused message must not send twice."""
        flying = {flight.message.seq for flight in self._link.in_flight.values() if flight.message}
        return flying.union(self._taken)

    def _puback(self, message: Message | None, reason: ReasonCode) -> None:
        self._stir.set()
        if message is None:
            if reason.is_failure:
                log.warning("the broker refuses a retained state (%s); check its access rules", reason)
        elif reason.is_failure:
            self._refused.append((message.seq, f"the broker refused it: {reason}"))
            self._wanted.add(message.seq)
            self.cautious = True
        else:
            self._taken.append(message.seq)
            self._wanted.discard(message.seq)
            self.cautious = bool(self._wanted)


class _Link:
    """One connection, from CONNECT to its end; nothing of it is used again."""

    def __init__(self, client: Client, *, encrypted: bool) -> None:
        self._client = client
        self._encrypted = encrypted
        client.on_log = self._logged
        self._loop = asyncio.get_running_loop()
        self._consent: asyncio.Future[Properties | str] = self._loop.create_future()
        """What CONNACK carries, or why there is none."""
        self._complaint = ""
        self._socket: socket.socket | ssl.SSLSocket | None = None
        self._tick: asyncio.TimerHandle | None = None
        self._maximum_packet_bytes = 268_435_455
        self.in_flight: dict[int, _Flight] = {}
        """By packet identifier."""
        self.window = WINDOW
        self.ended = ""
        """Why the connection ended; empty while it stands."""
        self.ended_by_peer = False
        """The other side closed it, neither we nor the network on the way."""
        self.on_puback: Callable[[Message | None, ReasonCode], None] = lambda _message, _reason: None
        self.on_end: Callable[[], object] = lambda: None

    @classmethod
    async def open(cls, mqtt: Mqtt, client_id: str, will: Payload) -> _Link:
        """Dial and wait for the broker's consent. Raises PublisherError."""
        client = Client(CallbackAPIVersion.VERSION2, client_id, protocol=MQTTProtocolVersion.MQTTv5)
        client.will_set(
            will.topic, will.body, qos=1, retain=True, properties=_content_properties(PacketTypes.WILLMESSAGE, will)
        )
        client.max_inflight_messages = 0  # the window is kept here, so that paho never queues
        link = cls(client, encrypted=mqtt.tls is not None)
        try:
            await _in_disposable_thread(lambda: dial(client, mqtt), "mqtt-dial")
            link._attach(mqtt.keepalive_s)
            connack = await asyncio.wait_for(link._consent, _DIAL_TIMEOUT_S)
        except asyncio.TimeoutError:
            connack = "no answer to CONNECT; is that an MQTT 5 broker's port?"
        except BaseException:
            link.abort("the dialling was given up")
            raise
        if isinstance(connack, str):
            link.abort(connack)
            raise PublisherError(f"{_address(mqtt)}: {connack}")
        link.window = min(WINDOW, getattr(connack, "ReceiveMaximum", WINDOW))
        link._maximum_packet_bytes = getattr(connack, "MaximumPacketSize", link._maximum_packet_bytes)
        return link

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
                reason = "no acknowledgement before a command's life ended"
                deadline = self._loop.call_later(deadline_s, self.abort, reason)
            self.in_flight[sent.mid] = _Flight(message, deadline)

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

    def _end(self, reason: str) -> None:
        if self.ended:
            return
        self.ended = reason
        for flight in self.in_flight.values():
            if flight.deadline is not None:
                flight.deadline.cancel()
        if not self._consent.done():
            hint = "does it accept mqtt.tls.cert_file?" if self._encrypted else "does it want TLS there (mqtt.tls)?"
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
            remedy = _REFUSALS_OF_CONNECT.get(reason.value, "see the broker's log")
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


def dial(client: Client, mqtt: Mqtt) -> None:
    """Connect and send CONNECT. Files are read anew each time: certificates and passwords are renewed while we run."""
    if mqtt.username is not None:
        client.username_pw_set(mqtt.username, _password(mqtt.password_file))
    if mqtt.tls is not None:
        client.tls_set_context(_tls_context(mqtt.tls))
    try:
        client.connect(mqtt.host or "", _port(mqtt), mqtt.keepalive_s)
    except (OSError, ValueError) as error:
        raise PublisherError(f"{_address(mqtt)}: {_remedy(error)}") from None


def _password(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, UnicodeDecodeError) as error:
        raise PublisherError(f"mqtt.password_file: {file} cannot be read ({_short(error)})") from None


class _TidySocket(ssl.SSLSocket):
    """Closes itself when the handshake fails; paho forgets to, at every attempt."""

    def do_handshake(self, block: bool = False) -> None:  # noqa: FBT001, FBT002 - the base class's signature
        """Shake hands or close."""
        try:
            super().do_handshake(block)
        except OSError:
            self.close()
            raise


def _tls_context(tls: Tls) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=tls.ca_file)
    except OSError as error:
        raise PublisherError(f"mqtt.tls.ca_file: {tls.ca_file} cannot be used ({_short(error)})") from None
    context.sslsocket_class = _TidySocket
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if tls.cert_file is not None:
        try:
            context.load_cert_chain(tls.cert_file, tls.key_file)
        except OSError as error:
            files = f"{tls.cert_file} with {tls.key_file}"
            raise PublisherError(f"mqtt.tls.cert_file: {files} cannot be used ({_short(error)})") from None
    return context


def _port(mqtt: Mqtt) -> int:
    return mqtt.port or (8883 if mqtt.tls is not None else 1883)


def _address(mqtt: Mqtt) -> str:
    return f"{mqtt.host}:{_port(mqtt)}"


_REFUSALS_OF_CONNECT = {
    0x84: "it speaks no MQTT 5",
    0x85: "check mqtt.client_id",
    0x86: "check mqtt.username and mqtt.password_file",
    0x87: "check mqtt.username, the certificate and the broker's access rules",
    0x8C: "check how the broker authenticates",
    0x9A: "it keeps no retained messages, which status needs",
}
"""By CONNACK reason code."""


def _remedy(error: Exception) -> str:
    """What went wrong while dialling and what to do, in one line."""
    reason = _short(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the broker's certificate is not trusted ({error.verify_message}); check mqtt.tls.ca_file and mqtt.host"
    if isinstance(error, (ssl.SSLError, ConnectionResetError, BrokenPipeError)):
        return f"the handshake failed ({reason}); check mqtt.port and the certificates in mqtt.tls"
    if isinstance(error, (socket.gaierror, ValueError)):
        return f"the name is unknown ({reason}); check mqtt.host and the name server"
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there; check mqtt.host and mqtt.port, and that the broker runs"
    if isinstance(error, TimeoutError):
        return "no answer; check the network and firewalls on the way"
    return f"no connection ({reason})"


def _short(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)


def pause_s(failures: int, longest_s: float) -> float:
    """Exponential with jitter, so that a hall full of devices does not come back in the same instant."""
    pause_s = min(longest_s, _FIRST_RETRY_S * 2.0 ** min(failures, 20))
    return pause_s * random.SystemRandom().uniform(0.5, 1.0)


def _publish_properties(payload: Payload) -> Properties:
    properties = _content_properties(PacketTypes.PUBLISH, payload)
    if payload.user_properties:
        properties.UserProperty = list(payload.user_properties)
    if payload.expires_s is not None:
        properties.MessageExpiryInterval = payload.expires_s
    return properties


def _content_properties(packet_type: int, payload: Payload) -> Properties:
    properties = Properties(packet_type)  # type: ignore[no-untyped-call]
    properties.PayloadFormatIndicator = 1  # UTF-8
    properties.ContentType = payload.content_type
    return properties
