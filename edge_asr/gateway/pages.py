"""Serves the files of the page, and the certificate that devices install to trust this box."""

from __future__ import annotations

import hashlib
import importlib.resources
from pathlib import Path
from typing import Final

from aiohttp import hdrs, web

from edge_asr.gateway.rules import Handler, wants_socket

_TYPES: Final = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
}


class Pages:
    """Files that anybody may have: they hold no secret."""

    def __init__(self, authority: Path | None, at_root: Handler) -> None:
        self._authority = authority
        """None: the certificates are not ours."""
        self._at_root = at_root
        """Serves WebSockets at `/`."""
        self._files = _files()

    def routes(self) -> list[web.RouteDef]:
        """One for each file."""
        return [web.get("/ca.crt", self._certificate), *(web.get(path, self._file) for path in self._files)]

    async def _certificate(self, _request: web.Request) -> web.Response:
        if self._authority is None or not self._authority.exists():
            raise web.HTTPNotFound(text="this gateway's certificate comes from elsewhere")
        return web.Response(
            body=self._authority.read_bytes(),
            content_type="application/x-x509-ca-cert",
            headers={hdrs.CONTENT_DISPOSITION: 'attachment; filename="edge-asr-ca.crt"'},
        )

    async def _file(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/" and wants_socket(request):
            return await self._at_root(request)
        body, content_type, tag = self._files[request.path]
        headers = {hdrs.ETAG: tag, hdrs.CACHE_CONTROL: "no-cache"}
        if request.headers.get(hdrs.IF_NONE_MATCH) == tag:
            return web.Response(status=304, headers=headers)
        return web.Response(body=body, content_type=content_type, charset="utf-8", headers=headers)


def _files() -> dict[str, tuple[bytes, str, str]]:
    """Address -> (content, type, tag)."""
    found = {}
    for file in importlib.resources.files("edge_asr.gateway").joinpath("page").iterdir():
        stem, dot, suffix = file.name.rpartition(".")
        body = file.read_bytes()
        path = f"/{file.name}" if suffix != "html" else "/" if stem == "index" else f"/{stem}"
        found[path] = body, _TYPES[dot + suffix], f'"{hashlib.sha256(body).hexdigest()[:20]}"'
    return found
