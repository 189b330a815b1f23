"""A real web server on the loopback with files to download: it knows ranges, and can break off, lie or be away."""

from __future__ import annotations

import contextlib
import http.server
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Mirror:
    """What it serves and how; ``requests`` is what it was asked for: (path, Range header)."""

    files: dict[str, bytes]
    break_off_after: int | None = None
    """Bytes of each answer after which the connection ends."""
    knows_ranges: bool = True
    error: int | None = None
    half_is_seen: threading.Event | None = None
    """What each answer waits for in its middle."""
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""


@contextlib.contextmanager
def mirror(**files: bytes) -> Iterator[Mirror]:
    """Serve for the length of a ``with`` block; the first underscore of a name becomes a dot."""
    served = Mirror({"/" + name.replace("_", ".", 1): content for name, content in files.items()})

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers["Range"]
            served.requests.append((self.path, wanted))
            content = served.files.get(self.path)
            if content is None or served.error:
                self.send_error(served.error or 404)
                return
            first = 0
            if wanted and served.knows_ranges:
                found = re.fullmatch(r"bytes=(\d+)-", wanted)
                assert found
                first = int(found[1])
                if first >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            rest = content[first:]
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            rest = rest[: served.break_off_after]
            if served.half_is_seen is not None:
                self.wfile.write(rest[: len(rest) // 2])
                served.half_is_seen.wait()
                rest = rest[len(rest) // 2 :]
            self.wfile.write(rest)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        served.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()
