"""Sets up WebRTC calls over HTTP as WHIP does (RFC 9725): POST an offer, PATCH candidates, DELETE to hang up.

A header `Session` binds the call to a session that is open already: its audio then comes by WebRTC, and the talks are
begun and ended over the session's WebSocket. Without it the call is a session of its own.
"""

from __future__ import annotations

import logging
from typing import Final

from aiohttp import ETag, hdrs, web
from aiortc import RTCIceServer

from edge_asr import settings
from edge_asr.gateway import GatewayError, dtls, ice
from edge_asr.gateway.call import MAX_SDP_BYTES, Call, OfferError, check
from edge_asr.gateway.rules import Rules
from edge_asr.gateway.session import BusyError, Session
from edge_asr.gateway.sessions import Sessions
from edge_asr.gateway.tokens import Station

log = logging.getLogger(__name__)

SDP: Final = "application/sdp"
FRAGMENT: Final = "application/trickle-ice-sdpfrag"
MAX_FRAGMENT_BYTES: Final = 8 * 1024


class Whip:
    """The calls, by the id in their address."""

    def __init__(self, options: settings.Gateway, sessions: Sessions, rules: Rules) -> None:
        self._options = options
        self._sessions = sessions
        self._rules = rules
        self._calls: dict[str, Call] = {}
        """Id of the session, which only its client knows -> its call."""

    def routes(self) -> list[web.RouteDef]:
        """Other methods are answered with 405, as the RFC wants it."""
        return [
            web.post("/whip", self._offer),
            web.options("/whip", self._describe),
            web.patch("/whip/{id}", self._trickle),
            web.delete("/whip/{id}", self._hang_up),
        ]

    def call_of(self, session: Session) -> Call | None:
        """The call that carries a session's audio."""
        call = self._calls.get(session.id)
        return call if call is not None and not call.ended.is_set() else None

    async def close(self) -> None:
        """Hang up on everybody."""
        for call in list(self._calls.values()):
            await call.close()

    async def _offer(self, request: web.Request) -> web.Response:
        station = self._rules.require(request, "talk")
        offer = await _body(request, SDP, MAX_SDP_BYTES)
        try:
            check(offer)
        except OfferError as error:
            raise _refusal(error) from None
        if dtls.wants_our_side(offer):
            raise web.HTTPUnprocessableEntity(text="the DTLS client's side must be ours: a=setup:actpass or passive")
        servers = self._ice_servers()
        self._calls = {key: call for key, call in self._calls.items() if not call.ended.is_set()}
        session, bound = self._session(request, station)
        try:
            call = Call(
                session,
                servers,
                self._options.announce,
                self._sessions.answer,
                self._sessions.rounds_of,
                owns_session=not bound,
            )
            answer = await call.answer(offer, controlled=bound)
        except OfferError as error:
            raise _refusal(error) from None
        before = self.call_of(session)
        self._calls[session.id] = call
        if before is not None:
            await before.close()
        headers = {hdrs.LOCATION: f"/whip/{session.id}", hdrs.ETAG: f'"{call.etag}"', "Accept-Patch": FRAGMENT}
        return web.Response(status=201, body=answer.encode(), content_type=SDP, headers=headers)

    def _ice_servers(self) -> list[RTCIceServer]:
        try:
            return ice.servers(self._options)
        except GatewayError as error:
            log.error("no call can be made: %s", error)  # noqa: TRY400 - no bug, no traceback
            raise BusyError("no call can be made now; the gateway's log says why") from None

    def _session(self, request: web.Request, station: Station) -> tuple[Session, bool]:
        """The session that the request names, or a new one; and whether it was named."""
        named = request.headers.get("Session")
        if named is None:
            return self._sessions.open(station, request.remote or "", "webrtc"), False
        session = self._sessions.resume(named, station)
        if session is None:
            raise web.HTTPNotFound(text="no such session is open")
        return session, True

    async def _describe(self, _request: web.Request) -> web.Response:
        return web.Response(headers={"Accept-Post": SDP, "Allow": "POST, OPTIONS"})

    async def _trickle(self, request: web.Request) -> web.Response:
        call = self._find(request)
        tags = request.if_match
        if tags is None:
            raise web.HTTPPreconditionRequired(text=f'If-Match: "{call.etag}" is wanted')
        if ETag("*") in tags:
            raise web.HTTPUnprocessableEntity(text="ICE restarts are not served; make another offer")
        if ETag(call.etag) not in tags:
            raise web.HTTPPreconditionFailed(text="these candidates belong to another ICE session")
        fragment = await _body(request, FRAGMENT, MAX_FRAGMENT_BYTES)
        try:
            await call.trickle(fragment)
        except OfferError as error:
            raise _refusal(error) from None
        return web.Response(status=204)

    async def _hang_up(self, request: web.Request) -> web.Response:
        call = self._find(request)
        del self._calls[call.session.id]
        await call.hang_up()
        return web.Response(status=200)

    def _find(self, request: web.Request) -> Call:
        call = self._calls.get(request.match_info["id"])
        if call is None or call.ended.is_set():
            raise web.HTTPNotFound(text="no such call")
        if call.session.station != self._rules.require(request, "talk"):
            raise web.HTTPForbidden(text="this call belongs to another station")
        return call


def _refusal(error: OfferError) -> web.HTTPException:
    return (web.HTTPBadRequest if error.malformed else web.HTTPNotAcceptable)(text=str(error))


async def _body(request: web.Request, content_type: str, limit: int) -> str:
    """The text of a request of the one type that is understood here."""
    if request.content_type != content_type:
        raise web.HTTPUnsupportedMediaType(text=f"expected {content_type}")
    if (request.content_length or 0) > limit:
        raise web.HTTPRequestEntityTooLarge(limit, request.content_length or 0)
    data = await request.content.read(limit + 1)
    while len(data) <= limit and not request.content.at_eof():
        data += await request.content.read(limit + 1 - len(data))
    if len(data) > limit:
        raise web.HTTPRequestEntityTooLarge(limit, len(data))
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise web.HTTPBadRequest(text="not UTF-8") from None
