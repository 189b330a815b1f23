"""The gateway's web server: opens the door, puts the rooms of this package together, and closes them in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections import deque
from collections.abc import Mapping
from typing import Final

from aiohttp import web
from aiohttp.http import HttpProcessingError

from edge_asr import clock, contract, settings
from edge_asr.events import Json, Message, Utterance
from edge_asr.gateway import GatewayError, ice
from edge_asr.gateway.box import Box
from edge_asr.gateway.certificates import Files
from edge_asr.gateway.dashboard import KEPT, Dashboard, shortened
from edge_asr.gateway.door import Door
from edge_asr.gateway.pages import Pages
from edge_asr.gateway.rules import Rules
from edge_asr.gateway.session import Event
from edge_asr.gateway.sessions import Sessions
from edge_asr.gateway.tokens import Tokens
from edge_asr.gateway.transcriptions import Transcriptions
from edge_asr.gateway.vosk import Vosk
from edge_asr.gateway.websocket import WebSockets
from edge_asr.gateway.whip import Whip

log = logging.getLogger(__name__)

KEEP_ALIVE_S: Final = 15.0
MAX_HEADER_BYTES: Final = 8190
MAX_BODY_BYTES: Final = 64 * 1024
GOODBYE_S: Final = 2.0
CERTIFICATE_S: Final = 60.0
"""Between two looks whether the certificate was renewed."""


class Gateway:
    """Serves sessions until it is cancelled. Construction checks the certificate. Raises SettingsError."""

    def __init__(self, options: settings.Settings) -> None:
        assert options.gateway is not None  # noqa: S101 - the daemon asks before
        self._options = options.gateway
        files = Files(options.gateway_directory)
        self._cert = self._options.cert_file or files.server
        self._key = self._options.key_file or files.server_key
        self._authority = files.authority if self._options.cert_file is None else None
        self._model = options.model.name or "edge-asr"
        self._tokens = Tokens(options.gateway_directory / "tokens.json")
        self._renderer = contract.Renderer(options.topic_root, options.device, "plain")
        self._tls: ssl.SSLContext | None = None
        if self._options.tls:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.minimum_version = ssl.TLSVersion.TLSv1_2
            self._tls.set_alpn_protocols(["http/1.1"])
            self._load_certificate(self._tls)
        self._sessions: Sessions | None = None
        self._said: deque[Event] = deque(maxlen=KEPT)

    def understood(self, utterance: Utterance) -> None:
        """What comes of it is told next."""
        if self._sessions is not None:
            self._sessions.understood(utterance)

    def told(self, message: Message) -> None:
        """A message was committed."""
        expires_ns = message.expires_ns
        left_s = None if expires_ns is None else (expires_ns - clock.boottime_ns()) / clock.NS_PER_S
        topic, data = self._renderer.flat(message, replayed=False, life_left_s=left_s)
        kind = contract.TOPICS[topic]
        self._said.append(shortened(kind, data))
        if self._sessions is not None:
            self._sessions.told(kind, data)

    def live(self, topic: str, data: Mapping[str, Json]) -> None:
        """Somebody speaks."""
        if self._sessions is not None:
            self._sessions.live(topic, data)

    def turned(self, source: str, *, speaking: bool) -> None:
        """Somebody begins or ends to speak."""
        if self._sessions is not None:
            self._sessions.turned(source, speaking=speaking)

    async def run(self, box: Box) -> None:
        """Let stations in until cancelled. Raises GatewayError."""
        door = self._open_door()
        sessions = Sessions(self._options, self._tokens, box.pipeline)
        first_and_last = self._options.udp_ports
        ports = None if first_and_last is None else range(first_and_last[0], first_and_last[1] + 1)
        ice.provide(ports)
        rules = Rules(self._options, self._tokens, door.admit)
        whip = Whip(self._options, sessions, rules)
        vosk = Vosk(sessions, rules)
        runner = web.AppRunner(
            _application(
                rules,
                WebSockets(sessions, rules),
                whip,
                vosk,
                Transcriptions(sessions, rules, self._model),
                Dashboard(box, sessions, rules, self._said),
                Pages(self._authority, vosk.serve),
            ),
            access_log=None,
            logger=_http_log(),
            handle_signals=False,
            keepalive_timeout=KEEP_ALIVE_S,
            max_line_size=MAX_HEADER_BYTES,
            max_field_size=MAX_HEADER_BYTES,
            shutdown_timeout=GOODBYE_S,
        )
        await runner.setup()
        assert runner.server is not None  # noqa: S101 - there is one after setup
        log.info("gateway: %s://%s:%d/", "https" if self._tls else "http", _bracketed(self._options.host), door.port)
        self._sessions = sessions
        try:
            await asyncio.gather(door.run(runner.server), sessions.sweep(), sessions.report(box.broker), self._renew())
        finally:
            door.close()
            await whip.close()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(sessions.close(), GOODBYE_S)
            await runner.cleanup()

    def _open_door(self) -> Door:
        options = self._options
        try:
            return Door(options.host, options.port, self._tls, options.max_connections_per_address)
        except OSError as error:
            where = f"{_bracketed(options.host)}:{options.port}"
            raise GatewayError(f"gateway: {where}: {error.strerror}; choose another gateway.port or host") from None

    def _load_certificate(self, context: ssl.SSLContext) -> None:
        try:
            context.load_cert_chain(self._cert, self._key)
        except FileNotFoundError:
            missing = self._cert if not self._cert.exists() else self._key
            remedy = "make it with `edge-asr gateway cert`"
            raise settings.SettingsError(f"gateway: {missing} is not there; {remedy}") from None
        except (OSError, ssl.SSLError) as error:
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            files = f"{self._cert} with {self._key}"
            raise settings.SettingsError(f"gateway: {files} cannot be used ({reason}); renew them") from None

    async def _renew(self) -> None:
        """Take over a renewed certificate for the connections to come; never returns."""
        seen = self._cert.stat().st_mtime_ns if self._tls else 0
        while True:
            await asyncio.sleep(CERTIFICATE_S)
            if self._tls is None:
                continue
            try:
                fresh = self._cert.stat().st_mtime_ns
                if fresh != seen:
                    self._load_certificate(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))  # one without its key spoils ours
                    self._load_certificate(self._tls)
                    log.info("gateway: the certificate was renewed")
                    seen = fresh
            except (OSError, settings.SettingsError) as error:
                log.warning("gateway: the old certificate stays: %s", error)


def _bracketed(host: str) -> str:
    """As an address stands before a port."""
    return f"[{host}]" if ":" in host else host


def _http_log() -> logging.Logger:
    """What aiohttp has to say, except of requests that are none: it would quote them, and they may hold a token."""

    def is_ours(record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))

    quiet = logging.getLogger(f"{__name__}.http")
    quiet.addFilter(is_ours)
    return quiet


def _application(
    rules: Rules, *rooms: WebSockets | Whip | Vosk | Transcriptions | Dashboard | Pages
) -> web.Application:
    application = web.Application(middlewares=[rules.guard], client_max_size=MAX_BODY_BYTES)
    application.on_response_prepare.append(rules.secure)
    for room in rooms:
        application.router.add_routes(room.routes())
    return application
