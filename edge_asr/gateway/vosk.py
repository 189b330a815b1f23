"""Speaks vosk-server's WebSocket protocol, so that its clients work here unchanged; at `/` like there, and at `/vosk`.

Law: every piece of audio is answered by exactly one message, a partial or a finished utterance, for that protocol's
clients send the next one only then; `reset` and `eof` are answered by what was left, and `eof` ends it. The token comes
in the request's Authorization header, Basic included: `wss://anyname:TOKEN@HOST:8443/`.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from typing import Any, Final

from aiohttp import WSMsgType, web

from edge_asr.events import Json
from edge_asr.gateway import wire
from edge_asr.gateway.formats import words_of
from edge_asr.gateway.rules import Rules
from edge_asr.gateway.session import BusyError, Event, Session
from edge_asr.gateway.sessions import Sessions

MAX_MESSAGE_BYTES: Final = 256 * 1024
SILENT_S: Final = 30.0
LAST_S: Final = 30.0
"""After `reset` or `eof`, so long for what is left."""


class Vosk:
    """The address of this protocol."""

    def __init__(self, sessions: Sessions, rules: Rules) -> None:
        self._sessions = sessions
        self._rules = rules

    def routes(self) -> list[web.RouteDef]:
        """Beside `/`, where the page is as well."""
        return [web.get("/vosk", self.serve)]

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """One client from its first message to `eof`."""
        station = self._rules.require(request, "talk")
        session = self._sessions.open(station, request.remote or "", "vosk")
        socket = web.WebSocketResponse(max_msg_size=MAX_MESSAGE_BYTES, compress=False, timeout=2.0)
        conversation = _Conversation(session)
        try:
            await socket.prepare(request)
            await conversation.carry(socket)
        except (wire.WireError, BusyError) as error:
            await socket.send_str(json.dumps({"error": str(error)}))
        except (asyncio.TimeoutError, ConnectionError):
            pass
        finally:
            session.detach(conversation)
            session.close()
            if socket.prepared:
                await socket.close()
        return socket


class _Conversation:
    """Turns a session's events into answers."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._finished: deque[dict[str, Json]] = deque()
        self._partial = ""
        self._rate = 16_000
        self._talks = 0
        self._bytes = 0
        """Of the talk under way."""
        self._ended = asyncio.Event()
        """Everything of it is committed."""
        session.attach(self, 0)

    def send(self, event: Event) -> None:
        """Take an event of the session."""
        if event["type"] == "transcribing":
            self._partial = str(event["text"])
        elif event["type"] == "transcript":
            self._partial = ""
            words = words_of(event)
            self._finished.append({"text": event["text"], **({"result": words} if words else {})})
        elif event["type"] == "ended":
            self._ended.set()

    def cut(self, reason: str) -> None:
        """Nobody takes over such a session."""

    async def carry(self, socket: web.WebSocketResponse) -> None:
        """Answer until `eof`. Raises WireError, BusyError."""
        while True:
            message = await socket.receive(timeout=SILENT_S)
            if self._session.over.is_set():
                raise BusyError("the session has ended")
            if message.type is WSMsgType.BINARY:
                await self._hear(message.data)
                await socket.send_str(json.dumps(self._answer(), ensure_ascii=False))
            elif message.type is WSMsgType.TEXT:
                order = _parsed(message.data)
                if order.get("eof") or order.get("reset"):
                    await socket.send_str(json.dumps(await self._left(), ensure_ascii=False))
                if order.get("eof"):
                    return
                config = order.get("config")
                if isinstance(config, dict):
                    self._rate = _rate(config.get("sample_rate", self._rate))
            else:
                return

    async def _hear(self, data: bytes) -> None:
        if not self._session.talking:
            self._talks, self._bytes = self._talks + 1, 0
            self._session.begin(wire.Start(type="start", talk=self._talks, rate=self._rate))
        await self._session.take(self._bytes // 2, memoryview(data))
        self._bytes += len(data)

    def _answer(self) -> dict[str, Json]:
        return self._finished.popleft() if self._finished else {"partial": self._partial}

    async def _left(self) -> dict[str, Json]:
        """Everything that was not told yet, as one utterance; what comes after it begins anew. Raises BusyError."""
        if self._session.talking:
            self._ended.clear()
            self._session.finish()
            try:
                await asyncio.wait_for(self._ended.wait(), LAST_S)
            except asyncio.TimeoutError:
                raise BusyError(f"not recognized within {LAST_S:g} s; what was said is not lost") from None
        texts, words = [], list[Json]()
        while self._finished:
            each = self._finished.popleft()
            texts.append(str(each["text"]))
            result = each.get("result")
            words += result if isinstance(result, list) else []
        return {"text": " ".join(texts), **({"result": words} if words else {})}  # as there: no words, no key


def _parsed(text: str) -> dict[str, Any]:
    try:
        order = json.loads(text)
    except (ValueError, RecursionError):
        raise wire.WireError("this is no JSON") from None
    if not isinstance(order, dict):
        raise wire.WireError("expected a JSON object")
    return order


def _rate(value: object) -> int:
    if not isinstance(value, (int, float)) or not 8000 <= value <= 192_000:
        raise wire.WireError(f"sample_rate {str(value)[:40]} is not 8000..192000")
    return int(value)
