"""Carries a session over a WebSocket: numbered audio in, numbered events out, resumable; see docs/gateway.md."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable
from typing import Final

from aiohttp import WSCloseCode, WSMsgType, web

from edge_asr.gateway import rounds, wire
from edge_asr.gateway.rules import Rules
from edge_asr.gateway.session import BusyError, Event, Session
from edge_asr.gateway.sessions import Sessions
from edge_asr.gateway.tokens import Station

log = logging.getLogger(__name__)

HELLO_S: Final = 10.0
"""A connection that does not say hello in this time is closed."""

CLOSE_S: Final = 2.0
PING_S: Final = 3.0
DEAD_S: Final = 9.0
"""A peer that sends nothing for so long, not even the answer to a ping, is gone: noticed within 10 s."""

MAX_OUTGOING: Final = 512
"""Events that may wait for a slow client; then the connection is cut, and the client may resume."""

AHEAD_S: Final = 45.0
"""How far audio may run ahead of the clock: the 30 s kept through a cut link, and some; beyond, it is slowed down."""

MESSAGE_S: Final = 0.005
"""What a message counts for at least, even one that brings nothing: each costs the loop some work."""

UNAUTHORIZED: Final = 4401
REPLACED: Final = 4409
"""A page that was opened twice: whoever hears this must not resume, or the two would take turns for ever."""

Admit = Callable[[str | None], Station | None]


class WebSockets:
    """The address at which sessions are carried."""

    def __init__(self, sessions: Sessions, rules: Rules) -> None:
        self._sessions = sessions
        self._rules = rules

    def routes(self) -> list[web.RouteDef]:
        """The one."""
        return [web.get("/ws", self._serve)]

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        address = request.remote or ""
        if "resume" not in request.query:  # who comes back needs no room, and says in the hello who that is
            self._sessions.check_room(address, "websocket")
        socket = web.WebSocketResponse(timeout=CLOSE_S, max_msg_size=wire.MAX_MESSAGE_BYTES, compress=False)
        await socket.prepare(request)
        connection = Connection(socket, rounds.Connection(request.transport), self._sessions, address)
        await connection.serve(lambda token: self._rules.admit(request, token))
        return socket


class Connection:
    """One WebSocket from hello to goodbye."""

    def __init__(
        self, socket: web.WebSocketResponse, intake: rounds.Connection, sessions: Sessions, address: str
    ) -> None:
        self._socket = socket
        self._intake = intake
        self._sessions = sessions
        self._address = address
        self._outgoing: asyncio.Queue[Event | None] = asyncio.Queue()
        self._severed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Fails when we are done with this client's connection."""
        self._goodbye: int = WSCloseCode.OK
        self._heard_s = 0.0
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()

    async def serve(self, admit: Admit) -> None:
        """Carry the session until either side goes."""
        session = None
        try:
            session = await asyncio.wait_for(self._greet(admit), HELLO_S)
            if session is not None:
                await self._carry(session)
        except wire.WireError as error:
            await self._refuse(WSCloseCode.UNSUPPORTED_DATA, "misunderstood", str(error))
        except BusyError as error:
            await self._refuse(WSCloseCode.TRY_AGAIN_LATER, "busy", str(error))
        except (asyncio.TimeoutError, ConnectionError) as error:
            log.info("%s: the connection is gone %s", session.source if session else self._address, error)
        finally:
            if session is not None:
                session.detach(self)
                if session.stopping():
                    self._goodbye = WSCloseCode.SERVICE_RESTART
            await self._hang_up()

    async def _hang_up(self) -> None:
        """Say goodbye; to who does not read, without waiting for it."""
        try:
            await asyncio.wait_for(self._socket.close(code=self._goodbye), 2 * CLOSE_S)
        except asyncio.TimeoutError:
            self._intake.abort()

    async def _greet(self, admit: Admit) -> Session | None:
        """The session that the first message opens or resumes."""
        message = await self._socket.receive()
        if message.type is not WSMsgType.TEXT:
            raise wire.WireError("the first message must be a hello in JSON")
        hello = wire.read(message.data)
        if not isinstance(hello, wire.Hello):
            raise wire.WireError(f"the first message must be a hello, not {hello.type}")
        station = admit(hello.token)
        if station is None or station.role != "talk":
            detail = "this token may not talk here; ask who looks after the box for one"
            await self._refuse(UNAUTHORIZED, "unauthorized", detail)
            return None
        session = self._sessions.resume(hello.session, station) if hello.session else None
        resumed = session is not None
        if session is None:
            session = self._sessions.open(station, self._address, "websocket")
        session.rate = hello.rate or session.rate
        talk = session.talk
        self.send(
            {
                "type": "ready",
                "session": session.id,
                "source": session.source,
                "resumed": resumed,
                "talk": talk.number if talk else 0,
                "position": session.position,
                "resume_s": self._sessions.options.resume_s,
            }
        )
        self.send({"type": "status", **self._sessions.status})
        session.attach(self, hello.have if resumed else 0)
        return session

    async def _carry(self, session: Session) -> None:
        """Read and write until one of them ends."""
        tasks = [
            asyncio.create_task(self._read(session), name=f"read:{session.source}"),
            asyncio.create_task(self._write(), name=f"write:{session.source}"),
            asyncio.create_task(self._leave(session), name=f"over:{session.source}"),
        ]

        def rest() -> None:
            """What the silent send may wait; who speaks or is asked is heard at once."""
            brings_audio = session.talking and session.format == "pcm16"
            self._intake.rest(self._sessions.rounds_of(session) if brings_audio else None)

        session.watchers.add(rest)
        rest()
        try:
            done, _ = await asyncio.wait([*tasks, self._severed], return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                each.result()
        finally:
            session.watchers.discard(rest)
            self._intake.rest(None)
            self._severed.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, session: Session) -> None:
        while True:
            message = await self._socket.receive(timeout=DEAD_S)
            await self._keep_pace()
            new_s = 0.0
            if message.type is WSMsgType.BINARY:
                new_s = await session.take(*wire.audio(message.data))
            elif message.type is WSMsgType.TEXT:
                await self._obey(session, wire.read(message.data))
            else:
                if message.data == WSCloseCode.OK:
                    session.close()  # goodbye; any other end may be a cut link
                return
            self._heard_s += max(MESSAGE_S, new_s)

    async def _keep_pace(self) -> None:
        """Wait while too much has come, and leave others their turn: of many in one packet none waits by itself."""
        await asyncio.sleep(max(0.0, self._heard_s - AHEAD_S - (self._loop.time() - self._began)))

    async def _obey(self, session: Session, order: wire.Message) -> None:
        if isinstance(order, wire.Start):
            session.begin(order)
        elif isinstance(order, wire.End):
            session.finish_soon()
        elif isinstance(order, wire.Answer):
            await self._sessions.answer(session, order)
        elif isinstance(order, wire.Ping):
            self.send({"type": "pong"})
        else:
            raise wire.WireError("hello was said already")

    async def _write(self) -> None:
        """Send what waits, and a ping in every silence."""
        while True:
            try:
                event = await asyncio.wait_for(self._outgoing.get(), PING_S)
            except asyncio.TimeoutError:
                await self._socket.ping()
            else:
                if event is None:
                    return
                await self._socket.send_str(json.dumps(event, ensure_ascii=False, separators=(",", ":")))

    async def _leave(self, session: Session) -> None:
        """Say goodbye when the session is over, after what was still to be told."""
        await session.over.wait()
        self._outgoing.put_nowait(None)
        await asyncio.sleep(CLOSE_S)  # who does not read in this time is not told

    def send(self, event: Event) -> None:
        """Have an event sent soon; a client that does not read is cut off."""
        if self._outgoing.qsize() < MAX_OUTGOING:
            self._outgoing.put_nowait(event)
        else:
            self._sever("the client does not read")

    def cut(self, reason: str) -> None:
        """Close the connection, for another has taken over; the session stays."""
        self._goodbye = REPLACED
        self._sever(reason)

    def _sever(self, reason: str) -> None:
        if not self._severed.done():
            self._severed.set_exception(ConnectionResetError(reason))

    async def _refuse(self, code: int, reason: str, detail: str) -> None:
        event = {"type": "error", "reason": reason, "detail": detail}

        async def tell() -> None:
            await self._socket.send_str(json.dumps(event, ensure_ascii=False))
            await self._socket.close(code=code, message=detail.encode()[:120])

        with contextlib.suppress(ConnectionError, asyncio.TimeoutError):
            await asyncio.wait_for(tell(), 2 * CLOSE_S)
