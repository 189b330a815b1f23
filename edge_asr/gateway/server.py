"""The gateway's web server: which address leads where, under which rules of security; owns everything of the package.

Law: every response carries the security headers; a request from a page of another origin is refused, and where no token
is asked for, the host name must be this machine's own, or a page could lead its own name here. Secrets stand in no
address, so in no log. A request has a deadline and a size.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import importlib.resources
import ipaddress
import json
import logging
import ssl
from collections.abc import Awaitable, Callable, Mapping
from typing import Final
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from edge_asr import contract, settings
from edge_asr.events import Json, Message
from edge_asr.gateway import GatewayError, wire
from edge_asr.gateway.certificates import Files
from edge_asr.gateway.door import Door
from edge_asr.gateway.session import LOCAL, BusyError, Sessions
from edge_asr.gateway.tokens import Station, Tokens
from edge_asr.gateway.websocket import Connection
from edge_asr.pipeline import Pipeline

log = logging.getLogger(__name__)

RETRY_AFTER_S: Final = 5
KEEP_ALIVE_S: Final = 15.0
MAX_HEADER_BYTES: Final = 8190
MAX_BODY_BYTES: Final = 64 * 1024
GOODBYE_S: Final = 2.0

OVERLOAD_FINALS: Final = 8
"""So many utterances before the recognizer, and nobody new is let in."""

_SECURITY: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "media-src 'self' blob:; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_TYPES: Final = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Gateway:
    """Serves sessions until it is cancelled. Construction checks the certificate. Raises SettingsError."""

    def __init__(self, options: settings.Settings) -> None:
        assert options.gateway is not None  # noqa: S101 - the daemon asks before
        self._options = options.gateway
        self._files = Files(options.gateway_directory)
        self._tokens = Tokens(options.gateway_directory / "tokens.json")
        self._renderer = contract.Renderer(options.topic_root, options.device, "plain")
        self._tls = self._context() if self._options.tls else None
        self._page = _page()
        self._sessions: Sessions | None = None
        self._door: Door | None = None

    def told(self, message: Message) -> None:
        """A message was committed."""
        if self._sessions is not None:
            self._sessions.told(message)

    def live(self, topic: str, data: Mapping[str, Json]) -> None:
        """Somebody speaks."""
        if self._sessions is not None:
            self._sessions.live(topic, data)

    async def run(self, pipeline: Pipeline) -> None:
        """Let stations in until cancelled. Raises GatewayError."""
        sessions = self._sessions = Sessions(
            self._options,
            self._tokens,
            self._renderer,
            pipeline.hear,
            lambda: pipeline.finals_waiting >= OVERLOAD_FINALS,
        )
        runner = web.AppRunner(
            self._application(),
            access_log=None,
            handle_signals=False,
            keepalive_timeout=KEEP_ALIVE_S,
            max_line_size=MAX_HEADER_BYTES,
            max_field_size=MAX_HEADER_BYTES,
            shutdown_timeout=GOODBYE_S,
        )
        await runner.setup()
        server = runner.server
        assert server is not None  # noqa: S101 - there is one after setup
        try:
            door = self._door = Door(self._options.host, self._options.port, server, self._tls)
        except OSError as error:
            await runner.cleanup()
            where = f"{self._options.host}:{self._options.port}"
            raise GatewayError(f"gateway: {where}: {error.strerror}; choose another gateway.port or host") from None
        log.info("gateway: %s://%s:%d/", "https" if self._tls else "http", self._options.host, door.port)
        try:
            await asyncio.gather(door.run(), sessions.sweep())
        finally:
            door.close()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(sessions.close(), GOODBYE_S)
            await runner.cleanup()

    def _context(self) -> ssl.SSLContext:
        cert = self._options.cert_file or self._files.server
        key = self._options.key_file or self._files.server_key
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(cert, key)
        except FileNotFoundError:
            missing = cert if not cert.exists() else key
            raise settings.SettingsError(
                f"gateway: {missing} is not there; make it with `edge-asr gateway cert`"
            ) from None
        except (OSError, ssl.SSLError) as error:
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            raise settings.SettingsError(f"gateway: {cert} with {key} cannot be used ({reason})") from None
        return context

    def _application(self) -> web.Application:
        application = web.Application(middlewares=[self._guard], client_max_size=MAX_BODY_BYTES)
        application.on_response_prepare.append(_secure)
        application.router.add_get("/ws", self._websocket)
        application.router.add_get("/ca.crt", self._authority)
        for path in self._page:
            application.router.add_get(path, self._static)
        return application

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """What holds for every request."""
        if self._door is not None:
            self._door.admit(request.protocol)
        problem = self._foreign(request)
        if problem:
            return web.json_response({"error": problem}, status=403)
        try:
            return await handler(request)
        except BusyError as error:
            return web.json_response({"error": str(error)}, status=503, headers={hdrs.RETRY_AFTER: str(RETRY_AFTER_S)})
        except web.HTTPException as error:
            if not error.empty_body:
                error.text, error.content_type = json.dumps({"error": error.reason}), "application/json"
            raise

    def _foreign(self, request: web.Request) -> str:
        """Why a request may not be served here; empty: it may."""
        host = urlsplit(f"//{request.host}").hostname or ""
        if self._options.open and not _is_loopback(host):
            return f"this gateway is open to its own machine only; {host} is not one of its names"
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is None or origin in self._options.origins:
            return ""
        scheme = "https" if self._tls is not None else request.headers.get("X-Forwarded-Proto", "http")
        return "" if origin == f"{scheme}://{request.host}" else f"pages of {origin[:100]} may not use this gateway"

    def _admit(self, request: web.Request, token: str | None = None) -> Station | None:
        """Whom the token of a request, or one sent apart, admits."""
        given = token or _authorization(request.headers.get(hdrs.AUTHORIZATION, ""))
        if given:
            return self._tokens.admit(given)
        return LOCAL if self._options.open else None

    async def _websocket(self, request: web.Request) -> web.StreamResponse:
        assert self._sessions is not None  # noqa: S101 - requests come while it runs
        address = request.remote or ""
        self._sessions.check_room(address)
        socket = web.WebSocketResponse(timeout=GOODBYE_S, max_msg_size=wire.MAX_MESSAGE_BYTES, compress=False)
        await socket.prepare(request)
        await Connection(socket, self._sessions, address).serve(lambda token: self._admit(request, token))
        return socket

    async def _authority(self, _request: web.Request) -> web.StreamResponse:
        """The certificate that devices install to trust this box."""
        if self._options.cert_file is not None or not self._files.authority.exists():
            raise web.HTTPNotFound
        return web.Response(
            body=self._files.authority.read_bytes(),
            content_type="application/x-x509-ca-cert",
            headers={"Content-Disposition": 'attachment; filename="edge-asr-ca.crt"'},
        )

    async def _static(self, request: web.Request) -> web.StreamResponse:
        body, content_type, tag = self._page[request.path]
        headers = {hdrs.ETAG: tag, hdrs.CACHE_CONTROL: "no-cache"}
        if request.headers.get(hdrs.IF_NONE_MATCH) == tag:
            return web.Response(status=304, headers=headers)
        return web.Response(body=body, content_type=content_type, charset="utf-8", headers=headers)


async def _secure(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_SECURITY)
    response.headers.setdefault(hdrs.CACHE_CONTROL, "no-store")
    response.headers.pop(hdrs.SERVER, None)


def _page() -> dict[str, tuple[bytes, str, str]]:
    """Address -> (content, type, tag) of every file of the page."""
    found = {}
    for file in importlib.resources.files("edge_asr.gateway").joinpath("page").iterdir():
        name, body = file.name, file.read_bytes()
        path = "/" + name.removesuffix(".html").replace("index", "") if name.endswith(".html") else f"/{name}"
        tag = f'"{hashlib.sha256(body).hexdigest()[:20]}"'
        found[path] = body, _TYPES[name[name.rindex(".") :]], tag
    return found


def _authorization(header: str) -> str | None:
    """The token of an Authorization header: Bearer, or the password of Basic, which existing clients can send."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip() or None
    if scheme.lower() == "basic":
        with contextlib.suppress(binascii.Error, UnicodeDecodeError):
            return base64.b64decode(value, validate=True).decode().partition(":")[2] or None
    return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
