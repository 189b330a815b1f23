"""The gateway as stations know it: a real daemon, real TLS, a plain client, a real browser, a real broker."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import av
import numpy as np
import pytest
import websockets
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.contrib.media import MediaPlayer

from edge_asr.audio import read_file
from tests.broker import Broker, Subscriber
from tests.gateway import Box, box, chromium, microphone_file, open_page, recording, run, transcribed

STOP = recording("20-emergency-stop")
SPEED = recording("03-set-mixer-speed")
"""Its text survives Opus: the micro model hears the other's last syllable or not by the last bit of a sample."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Box, Subscriber]]:
    """A box with its gateway, a broker, and a subscriber of everything."""
    folder = tmp_path_factory.mktemp("site")
    with Broker(folder) as broker, Subscriber(broker) as subscriber, box(folder, broker) as running:
        yield running, subscriber


def test_a_recording_over_the_websocket_becomes_what_transcribe_makes_of_it(site: tuple[Box, Subscriber]) -> None:
    running, subscriber = site
    (expected,) = transcribed(STOP)

    async def talk() -> list[dict[str, Any]]:
        async with running.client() as client:
            assert (await client.until("ready"))["source"] == "tablet"
            await client.say(read_file(STOP))
            await client.send(type="end")
            await client.until("ended")
            return client.events

    events = run(talk)
    by_kind = {event["type"]: event for event in events}
    for key in ("text", "language", "emotion", "event", "tokens"):
        assert by_kind["transcript"][key] == expected[key]
    assert by_kind["command"]["intent"] == expected["command"]["intent"] == "EmergencyStop"
    kinds = [event["type"] for event in events]
    assert kinds.index("listening") < kinds.index("transcript") < kinds.index("command") < kinds.index("ended")
    ident = by_kind["command"]["id"]
    subscriber.wait_for(lambda m: any(x.data["id"] == ident for x in m if x.topic.endswith("command")), "the command")


def test_someone_speaks_into_a_browser_and_the_command_reaches_page_and_broker(
    site: tuple[Box, Subscriber], tmp_path: Path
) -> None:
    running, subscriber = site
    before = len(subscriber.on("evt/command"))
    with chromium(running, microphone_file(tmp_path, "20-emergency-stop")) as browser:
        page, complaints = open_page(browser, running)
        page.keyboard.down("Space")
        page.wait_for_selector("#talk[data-state=talking]")
        page.wait_for_selector("#history li[data-kind=command]")
        page.keyboard.up("Space")
        assert "EmergencyStop" in page.inner_text("#history")
        assert transcribed(STOP)[0]["text"] in page.inner_text("#history")
        assert complaints == []
    subscriber.wait_for(lambda _: len(subscriber.on("evt/command")) > before, "the command of the page")


class WhipClient:
    """A WHIP client with a microphone that plays a recording once, and a data channel for events."""

    def __init__(self, running: Box, path: Path, *, channel: bool = True) -> None:
        self.running = running
        self.peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self.player = MediaPlayer(str(path))
        assert self.player.audio
        self.peer.addTransceiver(self.player.audio, "sendonly")
        self.events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.channel = self.peer.createDataChannel("events") if channel else None
        if self.channel:
            self.channel.on("message", lambda text: self.events.put_nowait(json.loads(text)))

    async def call(self, http: aiohttp.ClientSession) -> aiohttp.ClientResponse:
        await self.peer.setLocalDescription(await self.peer.createOffer())
        response = await http.post(
            f"{self.running.url}/whip",
            data=self.peer.localDescription.sdp.encode(),
            headers={"Content-Type": "application/sdp", "Authorization": f"Bearer {self.running.token}"},
        )
        assert response.status == 201, await response.text()
        await self.peer.setRemoteDescription(RTCSessionDescription(await response.text(), "answer"))
        return response

    async def until(self, kind: str) -> dict[str, Any]:
        while (event := await asyncio.wait_for(self.events.get(), 20))["type"] != kind:
            pass
        return event


def test_a_whip_client_talks_by_webrtc_and_hears_on_its_data_channel_what_came_of_it(
    site: tuple[Box, Subscriber],
) -> None:
    running, _ = site

    async def talk() -> tuple[dict[str, Any], dict[str, Any], int, int]:
        client = WhipClient(running, STOP)
        async with running.http() as http:
            response = await client.call(http)
            await client.until("ready")
            assert client.channel
            client.channel.send(json.dumps({"type": "start", "talk": 1}))
            said, command = await client.until("transcript"), await client.until("command")
            location = running.url + response.headers["Location"]
            gone = await http.delete(location, headers={"Authorization": f"Bearer {running.token}"})
            again = await http.delete(location, headers={"Authorization": f"Bearer {running.token}"})
        await client.peer.close()
        return said, command, gone.status, again.status

    said, command, gone, again = run(talk)
    assert said["text"] == transcribed(STOP)[0]["text"]
    assert command["intent"] == "EmergencyStop"
    assert (gone, again) == (200, 404)


def encoded(path: Path, kind: str) -> bytes:
    """A recording as MediaRecorder would send it."""
    pcm = np.frombuffer(read_file(path), "<i2").reshape(1, -1)
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream = container.add_stream("libopus", rate=48_000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(pcm.copy(), format="s16", layout="mono")
        frame.rate = 16_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["webm", "ogg"])
def test_a_stream_of_opus_in_small_pieces_gives_the_text_of_the_file(
    site: tuple[Box, Subscriber], tmp_path: Path, kind: str
) -> None:
    running, _ = site
    data = encoded(SPEED, kind)

    async def talk() -> list[str]:
        async with running.client() as client:
            await client.send(type="start", talk=1, format=kind)
            for offset in range(0, len(data), 700):
                await client.socket.send_bytes(offset.to_bytes(4, "little") + data[offset : offset + 700])
            await client.send(type="end")
            await client.until("ended")
            return [event["text"] for event in client.of("transcript")]

    same = tmp_path / "same.ogg"  # which libsndfile reads; it does not know WebM
    same.write_bytes(encoded(SPEED, "ogg"))
    assert run(talk) == [row["text"] for row in transcribed(same)]


def test_a_client_of_vosk_server_works_unchanged(site: tuple[Box, Subscriber]) -> None:
    running, _ = site
    pcm = read_file(STOP)
    address = running.url.replace("https://", f"wss://station:{running.token}@")

    async def talk() -> list[dict[str, Any]]:
        answers = []
        async with websockets.connect(address, ssl=running.tls) as socket:
            await socket.send('{ "config" : { "sample_rate" : 16000 } }')
            for offset in range(0, len(pcm), 6400):
                await socket.send(pcm[offset : offset + 6400])
                answers.append(json.loads(await socket.recv()))
            await socket.send('{"eof" : 1}')
            answers.append(json.loads(await socket.recv()))
        return answers

    answers = run(talk)
    assert all(("partial" in answer) != ("text" in answer) for answer in answers)
    text = " ".join(answer["text"] for answer in answers if answer.get("text"))
    assert text == transcribed(STOP)[0]["text"]
    words = [word["word"] for answer in answers for word in answer.get("result", ())]
    assert words == text.split()


@pytest.mark.parametrize("kind", ["flac", "webm"])
def test_a_client_of_openais_interface_works_with_another_base_address(
    site: tuple[Box, Subscriber], tmp_path: Path, kind: str
) -> None:
    running, _ = site
    path = tmp_path / f"stop.{kind}"
    path.write_bytes(SPEED.read_bytes() if kind == "flac" else encoded(SPEED, "webm"))
    curl = ["curl", "--silent", "--show-error", "--cacert", str(running.folder / "state/gateway/ca.crt")]
    curl += ["-H", f"Authorization: Bearer {running.token}", "-F", f"file=@{path}", "-F", "model=whisper-1"]
    done = subprocess.run([*curl, f"{running.url}/v1/audio/transcriptions"], check=True, capture_output=True)
    assert json.loads(done.stdout) == {"text": transcribed(SPEED)[0]["text"]}
