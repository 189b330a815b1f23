"""A daemon with its gateway, its certificate and tokens; ways to talk to it: a plain client and a real Chromium."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hashlib
import http.client
import importlib.resources
import json
import os
import signal
import ssl
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import soundfile
import soxr
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from playwright.sync_api import BrowserContext, Page, sync_playwright

from edge_asr import model_store
from edge_asr.audio import read_file
from edge_asr.gateway import certificates
from edge_asr.gateway.tokens import Tokens
from tests.broker import PATIENCE_S, Broker, free_port, wait_until
from tests.test_cli import typed

RECORDINGS = model_store.bundled("recordings")
CHROMIUM = "/usr/bin/chromium"
AXE = importlib.resources.files("axe_playwright_python") / "axe.min.js"
OFFER = """v=0
o=- 1 1 IN IP4 0.0.0.0
s=-
t=0 0
a=group:BUNDLE 0
m=audio 9 UDP/TLS/RTP/SAVPF 111
c=IN IP4 0.0.0.0
a=mid:0
a=sendonly
a=rtcp-mux
a=ice-ufrag:abcd
a=ice-pwd:abcdefghijklmnopqrstuvwx
a=fingerprint:sha-256 {}
a=setup:actpass
a=rtpmap:111 opus/48000/2
a=candidate:1 1 udp 2130706431 127.0.0.1 9 typ host
""".format(":".join(["AB"] * 32)).replace("\n", "\r\n")
"""Of a call that nobody makes."""

START_S = 3 * PATIENCE_S
"""A whole daemon and its model are loaded, maybe beside other tests."""


def recording(name: str) -> Path:
    (path,) = RECORDINGS.glob(f"{name}*.flac")
    return path


@dataclass
class Box:
    """A running daemon whose only ears are the gateway's guests."""

    folder: Path
    address: str
    port: int
    process: subprocess.Popen[bytes]
    tokens: Tokens
    token: str
    """Of the station `tablet`."""
    watch: str
    """Of somebody who watches."""
    tls: ssl.SSLContext

    @property
    def url(self) -> str:
        return f"https://{self.address}:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(encoding="utf-8")

    def board(self) -> dict[str, Any]:
        """What the dashboard shows."""
        connection = http.client.HTTPSConnection(self.address, self.port, context=self.tls, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.request("GET", "/board", headers={"Authorization": f"Bearer {self.watch}"})
            found: dict[str, Any] = json.load(connection.getresponse())
        return found

    def http(self) -> aiohttp.ClientSession:
        """An HTTP client that trusts the box's authority."""
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=self.tls))

    @contextlib.asynccontextmanager
    async def client(self, **hello: Any) -> AsyncIterator[Client]:
        """A session of the WebSocket."""
        address = f"{self.url}/ws?resume" if "session" in hello else f"{self.url}/ws"
        async with (
            self.http() as session,
            session.ws_connect(address) as socket,
        ):
            client = Client(socket)
            await client.send(type="hello", **{"token": self.token, **hello})
            yield client


@dataclass
class Client:
    """A plain client that speaks the protocol of docs/gateway.md."""

    socket: aiohttp.ClientWebSocketResponse
    events: list[dict[str, Any]] = field(default_factory=list)

    async def send(self, **message: Any) -> None:
        await self.socket.send_str(json.dumps(message))

    async def until(self, kind: str) -> dict[str, Any]:
        """The next event of this kind; all that came before it are in ``events``."""
        while True:
            message = await self.socket.receive(PATIENCE_S)
            assert message.type is aiohttp.WSMsgType.TEXT, (message, self.events)
            event: dict[str, Any] = json.loads(message.data)
            self.events.append(event)
            if event["type"] == kind:
                return event

    async def say(self, pcm: bytes, *, talk: int = 1, position: int = 0, piece: int = 1280, **start: Any) -> None:
        """Send a talk in pieces of 40 ms, without an end."""
        await self.send(type="start", talk=talk, **start)
        for offset in range(0, len(pcm), piece):
            await self.socket.send_bytes((position + offset // 2).to_bytes(4, "little") + pcm[offset : offset + piece])

    def abort(self) -> None:
        """Lose the connection without a goodbye."""
        transport = self.socket._response.connection and self.socket._response.connection.transport  # noqa: SLF001
        assert transport
        transport.abort()

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == kind]


@contextlib.contextmanager
def box(
    folder: Path,
    broker: Broker | None = None,
    *,
    prefix: Sequence[str] = (),
    address: str = "localhost",
    monitoring: int | None = None,
    **section: Any,
) -> Iterator[Box]:
    """Start `edge-asr run` with a gateway; ready when its door is open.

    A ``prefix`` such as `ip netns exec NAME` puts it elsewhere, where ``address`` leads to it.
    """
    port = free_port()
    settings = folder / "settings.yaml"
    tree: dict[str, Any] = {
        "device": "press-07",
        "state_dir": str(folder / "state"),
        "sources": [],
        "gateway": {"port": port, **section},
        "monitoring": {"port": monitoring},
    }
    if broker is not None:
        tree["mqtt"] = {"host": broker.host, "port": broker.port, "max_retry_s": 1}
    settings.write_text(yaml.safe_dump(tree), encoding="utf-8")
    program = [sys.executable, "-m", "edge_asr.cli"]
    certificates.make(folder / "state/gateway", [address])
    tokens = Tokens(folder / "state/gateway/tokens.json")
    token, watch = tokens.add("tablet", "talk"), tokens.add("office", "watch")
    tls = ssl.create_default_context(cafile=section.get("cert_file", folder / "state/gateway/ca.crt"))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*prefix, *program, "run", "-s", str(settings)], stderr=log, stdin=subprocess.DEVNULL
        )
    running = Box(folder, address, port, process, tokens, token, watch, tls)
    try:
        opened = lambda: "gateway: http" in running.log or process.poll() is not None  # noqa: E731
        wait_until(opened, "the gateway opens", limit_s=START_S)
        assert process.poll() is None, running.log
        yield running
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        finally:
            process.kill()
            process.wait()


@functools.cache
def transcribed(*paths: Path) -> list[dict[str, Any]]:
    """What `edge-asr transcribe` makes of files, which nobody changes."""
    done = typed("transcribe", *map(str, paths), "--json")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def microphone_file(folder: Path, *names: str) -> Path:
    """What Chromium's fake microphone plays: 48 kHz, with silence in front, for it begins before the page listens."""
    samples = np.concatenate(
        [np.zeros(40_000, np.float32)]
        + [
            np.concatenate(
                [np.frombuffer(read_file(recording(name)), "<i2").astype(np.float32) / 32768, np.zeros(16_000)]
            )
            for name in names
        ]
    )
    path = folder / "microphone.wav"
    soundfile.write(path, soxr.resample(samples, 16_000, 48_000), 48_000, subtype="PCM_16")
    return path


@contextlib.contextmanager
def chromium(
    running: Box, microphone: Path | None, *more: str, asks: bool = False, again: bool = False, **context: Any
) -> Iterator[BrowserContext]:
    """A real browser that trusts the box's certificate; its microphone plays a file once, or again and again.

    Nobody is asked for the microphone; where the page asks, nobody is there to say yes.
    """
    certificate = x509.load_pem_x509_certificate((running.folder / "state/gateway/server.crt").read_bytes())
    key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    trusted = base64.b64encode(hashlib.sha256(key).digest()).decode()
    arguments = [f"--ignore-certificate-errors-spki-list={trusted}", *more]
    with browsing(running.folder, microphone, *arguments, asks=asks, again=again, **context) as browser:
        yield browser


@contextlib.contextmanager
def browsing(
    folder: Path, microphone: Path | None, *arguments: str, asks: bool = False, again: bool = False, **context: Any
) -> Iterator[BrowserContext]:
    """A real browser with a microphone, and a profile of its own in a folder."""
    once = "" if again else "%noloop"
    arguments = (
        *arguments,
        *(["--deny-permission-prompts"] if asks else ["--use-fake-ui-for-media-stream"]),
        "--use-fake-device-for-media-stream",
        *([f"--use-file-for-fake-audio-capture={microphone}{once}"] if microphone else []),
        "--disable-background-networking",
        "--no-first-run",
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            str(folder / f"profile-{os.urandom(4).hex()}"),
            executable_path=CHROMIUM,
            headless=True,
            args=list(arguments),
            chromium_sandbox=False,
            locale=context.pop("locale", "en-GB"),
            **context,
        )
        browser.set_default_timeout(PATIENCE_S * 1000)
        try:
            yield browser
        finally:
            browser.close()


def wait_for_pause(page: Page) -> None:
    """Wait until somebody has spoken into the microphone and is silent: the recording has a long pause."""
    page.wait_for_function(
        """() => {
          const bar = document.querySelector("#meter i");
          window.listening ??= setInterval(() => {
            if (new DOMMatrix(getComputedStyle(bar).transform).a > 0.3) window.loud = performance.now();
          }, 20);
          return performance.now() - window.loud > 800;
        }"""
    )


def wait_for_speech(page: Page) -> None:
    """Wait until somebody speaks into the microphone; whether the box has time for partials is another matter."""
    page.wait_for_function(
        """() => new DOMMatrix(getComputedStyle(document.querySelector("#meter i")).transform).a > 0.3"""
    )


def faults_of(page: Page) -> list[str]:
    """What axe-core finds on a page that keeps people out: screen readers, keyboards, weak eyes."""
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")
    return [f"{each['id']}: {node['html']}" for each in found["violations"] for node in each["nodes"]]


def opened(browser: BrowserContext, url: str) -> tuple[Page, list[str]]:
    """A page, and what its console complains of."""
    page, complaints = browser.pages[0], list[str]()
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in {"error", "warning"} else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(url)
    return page, complaints


def open_page(browser: BrowserContext, running: Box, **options: str) -> tuple[Page, list[str]]:
    """The station's page by its link, and what its console complains of."""
    for name, value in options.items():
        browser.add_init_script(f"localStorage.setItem('{name}', '{value}')")
    page, complaints = opened(browser, f"{running.url}/#token={running.token}")
    page.wait_for_selector("#gateway-state[data-state=on]")
    return page, complaints


@contextlib.contextmanager
def isolated(program: str) -> Iterator[Callable[[], dict[str, Any]]]:
    """A program in namespaces of its own, at work meanwhile; what it has found when it ends."""
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen([sys.executable, "-m", program], stdout=subprocess.PIPE, stderr=complaints)

        def found() -> dict[str, Any]:
            output, _ = process.communicate(timeout=100)
            complaints.seek(0)
            assert process.returncode == 0, complaints.read().decode()
            result: dict[str, Any] = json.loads(output)
            if "refused" in result:
                pytest.skip(result["refused"])
            return result

        try:
            yield found
        finally:
            process.send_signal(signal.SIGINT)  # so that what it has started ends as well
            process.communicate()


def run(scenario: Callable[[], Any]) -> Any:
    """Run an asynchronous scenario to its end."""

    async def whole() -> Any:
        try:
            return await asyncio.wait_for(scenario(), 60)
        finally:
            # aiohttp leaves a closed WebSocket's TLS waiting for the peer's goodbye, for which no loop is left.
            for transport in [*asyncio.get_running_loop()._transports.values()]:  # type: ignore[attr-defined] # noqa: SLF001
                transport.abort()
            await asyncio.sleep(0)

    return asyncio.run(whole())
