"""Answers who watches the box, on the loopback unless told otherwise: /metrics, /livez, /readyz.

A hundred lines of HTTP instead of a framework: it answers GET of three paths and closes. It runs on the daemon's own
event loop, so an answer is itself a sign of life. Law: a request that takes longer than :data:`REQUEST_LIMIT_S` or is
larger than :data:`MAX_REQUEST_BYTES` is hung up on, and so is whoever comes while :data:`MAX_CLIENTS` are being served.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

log = logging.getLogger(__name__)

REQUEST_LIMIT_S: Final = 5.0
MAX_REQUEST_BYTES: Final = 8192
MAX_CLIENTS: Final = 16


@dataclass(frozen=True, slots=True)
class Page:
    """An answer."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK


Pages = Mapping[str, Callable[[], Awaitable[Page]]]


def verdict(complaints: list[str]) -> Page:
    """200 where nothing is to be complained about, else 503 with one complaint a line."""
    if not complaints:
        return Page(b"ok\n")
    return Page(("\n".join(complaints) + "\n").encode(), status=HTTPStatus.SERVICE_UNAVAILABLE)


class Monitor:
    """Serves pages until it is cancelled."""

    def __init__(self, host: str, port: int, pages: Pages) -> None:
        self._host, self._port, self._pages = host, port, pages
        self._clients = 0

    async def run(self) -> None:
        """Listen for ever. A port that is taken is one warning: a box that cannot be watched still works."""
        try:
            server = await asyncio.start_server(self._serve, self._host, self._port, limit=MAX_REQUEST_BYTES)
        except OSError as error:
            reason = error.strerror or error
            log.warning("monitoring: %s:%d cannot be used (%s); set monitoring.port", self._host, self._port, reason)
            await asyncio.get_running_loop().create_future()
            return
        async with server:
            await server.serve_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients += 1
        try:
            if self._clients <= MAX_CLIENTS:
                await asyncio.wait_for(self._answer(reader, writer), REQUEST_LIMIT_S)
        except (asyncio.TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            pass  # whoever asks so is not answered
        finally:
            self._clients -= 1
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = (await reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")[0].decode("latin-1").split(" ")
        method, target = request[0], request[1].partition("?")[0] if len(request) > 1 else ""
        if method not in {"GET", "HEAD"}:
            page = Page(b"only GET\n", status=HTTPStatus.METHOD_NOT_ALLOWED)
        elif target not in self._pages:
            page = Page(f"there is {', '.join(self._pages)}\n".encode(), status=HTTPStatus.NOT_FOUND)
        else:
            page = await self._pages[target]()
        head = (
            f"HTTP/1.1 {page.status.value} {page.status.phrase}\r\nContent-Type: {page.content_type}\r\n"
            f"Content-Length: {len(page.body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + (b"" if method == "HEAD" else page.body))
        await writer.drain()
