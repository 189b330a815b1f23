"""What holds for every request: whose it is, whether it may be served here, and what its response says to browsers.

Law: every response carries the security headers; a request from a page of another origin is refused, and where no token
is asked for, the host name must be this machine's own, or a page could lead its own name here. Secrets stand in no
address, so in no log.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import ipaddress
import json
import time
from collections.abc import Awaitable, Callable
from typing import Final
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from edge_asr import settings
from edge_asr.gateway.addresses import counted
from edge_asr.gateway.session import BusyError
from edge_asr.gateway.tokens import LOCAL, Role, Station, Tokens

RETRY_AFTER_S: Final = 5
REQUEST_S: Final = 60.0
"""A request that is neither a WebSocket nor done by then is given up."""

REQUESTS_PER_S: Final = 20.0
BURST: Final = 200.0
"""Requests that an address, or a token from wherever, may make at once; the page is a dozen."""

_SOCKETS: Final = frozenset({"/", "/ws", "/vosk"})

MAX_ADDRESSES: Final = 10_000

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

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def wants_socket(request: web.Request) -> bool:
    """Whether a request is the handshake of a WebSocket, at an address that has one."""
    asked = request.headers.get(hdrs.UPGRADE, "").lower() == "websocket"
    return asked and request.method == hdrs.METH_GET and request.path in _SOCKETS


class HasteError(BusyError):
    """An address or a token makes too many requests."""


class Pace:
    """How many requests an address or a token may make: a bucket that refills."""

    def __init__(self, per_s: float, burst: float) -> None:
        self._per_s = per_s
        self._burst = burst
        self._left: dict[str, tuple[float, float]] = {}
        """Address, network or name -> (what was left, when)."""

    def allows(self, who: str, now: float, share: int = 1) -> bool:
        """Take one, if there is one; who has a larger share may make so many times as many."""
        left, then = self._left.pop(who, (share * self._burst, now))
        left = min(share * self._burst, left + (now - then) * share * self._per_s)
        self._left[who] = max(0.0, left - 1), now  # the newest last
        if len(self._left) > MAX_ADDRESSES:
            del self._left[next(iter(self._left))]
        return left >= 1


class Rules:
    """The middleware of the whole gateway."""

    def __init__(
        self, options: settings.Gateway, tokens: Tokens, admitted: Callable[[asyncio.BaseProtocol | None], None]
    ) -> None:
        self._options = options
        self._tokens = tokens
        self._admitted = admitted
        """Tells the door that a connection has brought a whole header."""
        self._addresses = Pace(REQUESTS_PER_S, BURST)
        self._stations = Pace(REQUESTS_PER_S, BURST)

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse, or serve in time; every refusal is one sentence in JSON."""
        self._admitted(request.protocol)
        problem = self._foreign(request)
        if problem:
            return _refusal(403, problem)
        try:
            for who, share in counted(request.remote or "").items():
                _keep_pace(self._addresses, who, f"from {who}", share)
            if request.method == hdrs.METH_OPTIONS and request.match_info.http_exception is not None:
                return _preflight(request.match_info.http_exception)
            return await asyncio.wait_for(handler(request), None if wants_socket(request) else REQUEST_S)
        except BusyError as error:
            return _refusal(429 if isinstance(error, HasteError) else 503, str(error), RETRY_AFTER_S)
        except asyncio.TimeoutError:
            return _refusal(408, f"this took longer than {REQUEST_S:g} s")
        except web.HTTPException as error:
            if not error.empty_body:
                error.text, error.content_type = _written(error.status, error.text or ""), "application/json"
            raise

    async def secure(self, request: web.Request, response: web.StreamResponse) -> None:
        """Add what every response says to browsers."""
        response.headers.update(_SECURITY)
        response.headers.setdefault(hdrs.CACHE_CONTROL, "no-store")
        response.headers.pop(hdrs.SERVER, None)
        origin = request.headers.get(hdrs.ORIGIN)
        if origin in self._options.origins:
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin or ""
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_METHODS] = "GET, POST, PATCH, DELETE"
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = "Authorization, Content-Type, If-Match, Session"
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = "ETag, Location"
            response.headers[hdrs.VARY] = hdrs.ORIGIN

    def admit(self, request: web.Request, token: str | None = None) -> Station | None:
        """Whom the token of a request, or one sent apart, admits. Raises HasteError."""
        given = token or _authorization(request.headers.get(hdrs.AUTHORIZATION, ""))
        station = self._tokens.admit(given) if given else None
        if station is None and self._options.open:
            station = LOCAL  # whatever key it sends: some clients must send one
        if station is not None:
            _keep_pace(self._stations, station.name, "with this token")
        return station

    def require(self, request: web.Request, role: Role) -> Station:
        """The station of a request whose token has this role.

        Raises HTTPUnauthorized, HTTPForbidden, HasteError.
        """
        station = self.admit(request)
        if station is None:
            challenge = {hdrs.WWW_AUTHENTICATE: 'Bearer realm="edge-asr"'}
            raise web.HTTPUnauthorized(text="a token of this gateway is wanted", headers=challenge)
        if station.role != role and station is not LOCAL:
            raise web.HTTPForbidden(text=f"this token may {station.role}, not {role}")
        return station

    def _foreign(self, request: web.Request) -> str:
        """Why a request may not be served here; empty: it may."""
        try:
            host = urlsplit(f"//{request.host}").hostname or ""
        except ValueError:
            return "this is no host name"
        if self._options.open and not _is_loopback(host):
            return f"this gateway is open to its own machine only; {host[:100]} is not one of its names"
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is None or origin in self._options.origins:
            return ""
        schemes = ("https",) if self._options.tls else ("http", "https")  # https: a proxy before us took the TLS off
        own = {f"{scheme}://{request.host}" for scheme in schemes}
        return "" if origin in own else f"pages of {origin[:100]} may not use this gateway"


def _keep_pace(pace: Pace, who: str, whence: str, share: int = 1) -> None:
    if not pace.allows(who, time.monotonic(), share):
        raise HasteError(f"too many requests {whence}; try again in a moment")


def _preflight(missing: web.HTTPException) -> web.Response:
    """A page of another origin asks beforehand, where nobody else answers; :meth:`Rules.secure` says what it may."""
    if isinstance(missing, web.HTTPMethodNotAllowed):
        return web.Response()
    raise missing


def _refusal(status: int, reason: str, retry_after_s: int | None = None) -> web.Response:
    headers = {hdrs.RETRY_AFTER: str(retry_after_s)} if retry_after_s is not None else {}
    return web.Response(text=_written(status, reason), status=status, headers=headers, content_type="application/json")


def _written(status: int, reason: str) -> str:
    """A refusal in the form that clients of OpenAI's interface read."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return json.dumps({"error": {"message": reason, "type": kind, "param": None, "code": None}})


def _authorization(header: str) -> str | None:
    """The token of an Authorization header: Bearer, or the password of Basic, which existing clients can send."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip() or None
    if scheme.lower() == "basic":
        with contextlib.suppress(binascii.Error, UnicodeDecodeError, ValueError):
            return base64.b64decode(value, validate=True).decode().partition(":")[2] or None
    return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
