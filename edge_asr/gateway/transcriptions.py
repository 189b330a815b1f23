"""Speaks OpenAI's `POST /v1/audio/transcriptions`, so that its clients work here with another base address.

Law: an upload is a session like any other, so its commands reach the broker, and it counts as one before its first byte
is read; it stays in memory, is never written to disk, and may be :data:`MAX_FILE_BYTES` and :data:`MAX_FILE_S` long.
"""

from __future__ import annotations

import asyncio
import os
from typing import Final

from aiohttp import BodyPartReader, web
from aiohttp.http import HttpProcessingError

from edge_asr.audio import AudioFileError, read_stream
from edge_asr.events import BYTES_PER_SAMPLE, SAMPLE_RATE
from edge_asr.gateway import formats, wire
from edge_asr.gateway.container import ContainerError, decode
from edge_asr.gateway.rules import Rules
from edge_asr.gateway.session import BusyError, Event, Session
from edge_asr.gateway.sessions import UPLOAD, Sessions

MAX_FILE_BYTES: Final = 16 * 1024 * 1024
MAX_FILE_S: Final = 600.0
MAX_FIELDS_BYTES: Final = 16 * 1024
"""Everything beside the file, names included."""

FIELD_BYTES: Final = 64
"""Counted for every field, however empty: 16,000 of them would hold the loop, and everybody's talks, for seconds."""

PIECE_SAMPLES: Final = SAMPLE_RATE // 2
WHOLE_S: Final = 55.0
"""For everything; a little less than a request may take."""

HEARD: Final = {"X-Should-Retry": "false"}
"""Clients of this interface repeat a request that failed, unless told so; each command would come twice."""


class Transcriptions:
    """The addresses of this interface."""

    def __init__(self, sessions: Sessions, rules: Rules, model: str) -> None:
        self._sessions = sessions
        self._rules = rules
        self._model = model

    def routes(self) -> list[web.RouteDef]:
        """What its clients call."""
        return [
            web.post("/v1/audio/transcriptions", self._transcribe),
            web.get("/v1/models", self._models),
        ]

    async def _models(self, request: web.Request) -> web.Response:
        self._rules.require(request, "talk")
        model = {"id": self._model, "object": "model", "created": 0, "owned_by": "edge-asr"}
        return web.json_response({"object": "list", "data": [model]})

    async def _transcribe(self, request: web.Request) -> web.Response:
        station = self._rules.require(request, "talk")
        session = self._sessions.open(station, request.remote or "", UPLOAD)
        try:
            return await self._answer(request, session)
        finally:
            session.close()

    async def _answer(self, request: web.Request, session: Session) -> web.Response:
        heard, deadline = _Collected(), asyncio.get_running_loop().time() + WHOLE_S
        session.attach(heard, 0)
        data, fields = await _form(request)
        shape = fields.get("response_format", "json")
        if shape not in formats.KINDS:
            raise web.HTTPBadRequest(text=f"response_format {shape[:40]!r} is not one of {', '.join(formats.KINDS)}")
        try:
            pcm = await asyncio.to_thread(_pcm, data, fields["filename"])
        except (AudioFileError, ContainerError) as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        self._sessions.check_time(UPLOAD)
        if session.over.is_set():
            raise BusyError("the session ended before the whole recording had come")
        await _hear_all(session, memoryview(pcm), deadline - asyncio.get_running_loop().time())
        if fields.get("stream") == "true":
            return web.Response(text=formats.streamed(heard.segments), content_type="text/event-stream")
        whole_s = len(pcm) / BYTES_PER_SAMPLE / SAMPLE_RATE
        grains = frozenset(fields.get("timestamp_granularities[]", "segment").split())
        text, content_type = formats.written(shape, heard.segments, whole_s, grains)
        return web.Response(text=text, content_type=content_type)


async def _hear_all(session: Session, pcm: memoryview, left_s: float) -> None:
    """Have a recording heard in time. Raises BusyError, and what tells the client whether to send it again."""
    if left_s <= 0:
        raise web.HTTPRequestTimeout(text=f"the recording took longer than {WHOLE_S:g} s to come")
    try:
        heard_all = await asyncio.wait_for(_hear(session, pcm), left_s)
    except asyncio.TimeoutError:
        told = f"not recognized within {WHOLE_S:g} s; what was heard of it is not lost"
        raise web.HTTPGatewayTimeout(text=told, headers=HEARD) from None
    if not heard_all:
        told = "cut off before all of it was heard; what was heard of it is not lost"
        raise web.HTTPServiceUnavailable(text=told, headers=HEARD)


async def _hear(session: Session, pcm: memoryview) -> bool:
    """Say all of it in a session, and wait until it is committed; whether all was heard. Raises BusyError."""
    session.begin(wire.Start(type="start", talk=1))
    for position in range(0, len(pcm) // BYTES_PER_SAMPLE, PIECE_SAMPLES):
        start = position * BYTES_PER_SAMPLE
        await session.take(position, pcm[start : start + PIECE_SAMPLES * BYTES_PER_SAMPLE])
    session.finish()
    session.close()
    return await session.settled()


class _Collected:
    """What was said in an upload, utterance by utterance."""

    def __init__(self) -> None:
        self.segments: list[Event] = []

    def send(self, event: Event) -> None:
        """Keep transcripts."""
        if event["type"] == "transcript":
            self.segments.append(event)

    def cut(self, reason: str) -> None:
        """Nobody takes over such a session."""


async def _form(request: web.Request) -> tuple[bytes, dict[str, str]]:
    """The file of a multipart form, and its other fields. Raises HTTPBadRequest, HTTPRequestEntityTooLarge."""
    if not request.content_type.startswith("multipart/"):
        raise web.HTTPUnsupportedMediaType(text="expected multipart/form-data with a file")
    data, fields, used = b"", {"filename": ""}, 0
    try:
        async for part in await request.multipart():
            if not isinstance(part, BodyPartReader):
                raise web.HTTPBadRequest(text="a multipart form within a multipart form")
            name = part.name or ""
            if name == "file":
                data = await _read(part, MAX_FILE_BYTES, len(data))
                fields["filename"] = (part.filename or "upload")[:80]
            else:
                used += FIELD_BYTES + len(name)
                content = await _read(part, MAX_FIELDS_BYTES, used)
                used += len(content)
                known = fields.get(name)  # a list comes as several fields of one name
                value = content.decode(errors="replace")
                fields[name] = value if known is None else f"{known} {value}"
    except (ValueError, AssertionError, RuntimeError, HttpProcessingError) as error:
        raise web.HTTPBadRequest(text=f"this is no multipart form ({error})"[:200]) from None
    if not data:
        raise web.HTTPBadRequest(text="the form holds no `file`")
    return data, fields


async def _read(part: BodyPartReader, limit: int, used: int) -> bytes:
    """A part of a form, of whose limit so many bytes are used. Raises HTTPRequestEntityTooLarge."""
    content = bytearray()
    while used + len(content) <= limit and (chunk := await part.read_chunk()):
        content += chunk
    if used + len(content) > limit:
        raise web.HTTPRequestEntityTooLarge(limit, used + len(content))
    return bytes(content)


def _pcm(data: bytes, name: str) -> bytes:
    """16 kHz mono of a file of any usual kind. Raises AudioFileError, ContainerError."""
    if data.startswith(b"\x1aE\xdf\xa3"):  # WebM: what browsers record, and libsndfile does not know
        return decode(data, MAX_FILE_S)
    with open(os.memfd_create("upload"), "w+b") as stream:  # noqa: PTH123 - a descriptor, and memory alone
        stream.write(data)
        stream.flush()
        return read_stream(name, stream, max_s=MAX_FILE_S)
