"""Lets a person listen to exported recordings and say what was said, in a browser on this machine.

Law: it listens on the loopback, serves one folder under an address that only the person who started it knows, and takes
labels only from its own page. Every label is in the manifest, on the disk, before the page says so.
"""

from __future__ import annotations

import http.server
import json
import secrets
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from edge_asr.evaluation import ManifestError

MAX_LABEL_BYTES: Final = 65_536
_LABELS: Final = ("text", "intent", "slots")

_PAGE: Final = """<!doctype html><html lang="en"><meta charset="utf-8"><title>edge-asr: what was said?</title>
<style>
body{font:16px/1.4 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}
li{margin:1rem 0;padding:1rem;border:1px solid #bbb;border-radius:6px;list-style:none}
li.labelled{border-color:#2a7}ul{padding:0}input{font:inherit;width:100%;box-sizing:border-box}
small{color:#555}label{display:block;margin:.4rem 0}button{font:inherit}
</style><h1>What was said?</h1>
<p>Listen, correct the text, and name the command if it was one. Without an intent no command may come of it.</p>
<ul id="list"></ul>
<script>
const list = document.getElementById("list");
function field(row, caption, value) {
  const label = document.createElement("label"), input = document.createElement("input");
  label.append(caption, input); input.value = value ?? ""; row.append(label); return input;
}
function show(entry) {
  const row = document.createElement("li"), about = document.createElement("small");
  const audio = document.createElement("audio"), save = document.createElement("button");
  row.classList.toggle("labelled", entry.labelled);
  const heard = entry.heard ?? {};
  about.textContent = [heard.time, heard.source, heard.intent ?? heard.reason].filter(Boolean).join(" \\u00b7 ");
  audio.controls = true; audio.preload = "none"; audio.src = "audio/" + encodeURIComponent(entry.audio);
  row.append(about, document.createElement("br"), audio);
  const text = field(row, "text", entry.labelled ? entry.text : heard.text);
  const intent = field(row, "intent", entry.labelled ? entry.intent : heard.intent);
  const slots = field(row, "slots, e.g. {\\"machine\\": \\"mixer\\"}", JSON.stringify((entry.labelled ? entry.slots : heard.slots) ?? {}));
  save.textContent = "save"; row.append(save); list.append(row);
  save.onclick = async () => {
    let body;
    try { body = JSON.stringify({audio: entry.audio, text: text.value, intent: intent.value, slots: JSON.parse(slots.value || "{}")}); }
    catch (error) { save.textContent = "the slots are no JSON"; return; }
    const answer = await fetch("label", {method: "POST", headers: {"Content-Type": "application/json"}, body});
    save.textContent = answer.ok ? "saved" : await answer.text();
    row.classList.toggle("labelled", answer.ok);
  };
}
fetch("manifest").then(answer => answer.json()).then(entries => entries.forEach(show));
</script></html>
"""  # noqa: E501 - a page


class LabelServer(http.server.ThreadingHTTPServer):
    """Serves one exported folder; ``address`` is where."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        """Raises ManifestError, OSError."""
        self.entries = _entries(folder)
        self.secret = secrets.token_urlsafe(16)
        super().__init__(("127.0.0.1", port), partial(_Handler, folder))

    @property
    def address(self) -> str:
        """To be opened in a browser."""
        return f"http://127.0.0.1:{self.server_port}/{self.secret}/"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: LabelServer

    def __init__(self, folder: Path, *arguments: Any) -> None:  # noqa: ANN401 - socketserver's
        self._folder = folder
        super().__init__(*arguments)

    def do_GET(self) -> None:
        what = self._asked_for()
        if what == "":
            self._answer(_PAGE.encode(), "text/html; charset=utf-8")
        elif what == "manifest":
            self._answer(json.dumps(list(self.server.entries.values())).encode(), "application/json")
        elif what is not None and what.removeprefix("audio/") in self.server.entries:
            self._answer((self._folder / what.removeprefix("audio/")).read_bytes(), "audio/wav")
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self._asked_for() != "label" or self.headers.get_content_type() != "application/json":
            self.send_error(HTTPStatus.NOT_FOUND)
        elif not length.isdigit() or int(length) > MAX_LABEL_BYTES:
            self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        else:
            complaint = self._label(self.rfile.read(int(length)))
            status = HTTPStatus.BAD_REQUEST if complaint else HTTPStatus.OK
            self._answer(complaint.encode(), "text/plain; charset=utf-8", status)

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""

    def _asked_for(self) -> str | None:
        """The path below the secret; None: this is somebody else's page asking."""
        prefix = f"/{self.server.secret}/"
        own = f"127.0.0.1:{self.server.server_port}"
        ours = self.path.startswith(prefix) and self.headers["Host"] == own
        return self.path.removeprefix(prefix) if ours else None

    def _label(self, body: bytes) -> str:
        """Take one label; why not, or nothing."""
        try:
            label = json.loads(body)
            entry = self.server.entries[label["audio"]]
            text, intent, slots = (label[key] for key in _LABELS)
        except (ValueError, KeyError, TypeError):
            return "expected audio, text, intent, slots"
        if not (isinstance(text, str) and isinstance(intent, str) and isinstance(slots, dict)):
            return "expected two texts and an object of slots"
        entry.update(text=text, intent=intent or None, slots=slots if intent else {}, labelled=True)
        _write(self._folder, self.server.entries)
        return ""

    def _answer(self, body: bytes, content_type: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        self.wfile.write(body)


def _entries(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "manifest.jsonl"
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        entries = {entry["audio"]: entry for entry in found}
    except (OSError, ValueError, KeyError, TypeError):
        raise ManifestError(f"{path}: is no manifest; make one with `edge-asr recordings export`") from None
    outside = [name for name in entries if Path(name).name != name]
    if outside:
        raise ManifestError(f"{path}: {outside[0]!r} is not in this folder; label exported recordings only")
    return entries


def _write(folder: Path, entries: dict[str, dict[str, Any]]) -> None:
    fresh = folder / ".manifest.jsonl"
    lines = (json.dumps(entry, ensure_ascii=False) for entry in entries.values())
    fresh.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    fresh.replace(folder / "manifest.jsonl")
