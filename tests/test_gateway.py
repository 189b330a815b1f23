"""The gateway as stations know it: a real daemon, real TLS, a plain client, a real browser, a real broker."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import io
import itertools
import json
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import av
import numpy as np
import pytest
import soundfile
import soxr
from aiohttp import web
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.contrib.media import MediaPlayer
from playwright.sync_api import Page, WebSocketRoute

from edge_asr.audio import quiet, read_file
from edge_asr.events import SAMPLE_RATE
from edge_asr.gateway.call import PACKET_MS
from edge_asr.gateway.pages import Pages
from edge_asr.gateway.websocket import REPLACED
from edge_asr.settings import Commands
from tests.broker import Broker, Subscriber, wait_until
from tests.gateway import (
    OFFER,
    Box,
    box,
    browsing,
    chromium,
    faults_of,
    isolated,
    microphone_file,
    open_page,
    opened,
    recording,
    run,
    transcribed,
    wait_for_pause,
)

STOP = recording("20-emergency-stop")
PRESS = recording("11-stop-press-two")
SPEED = recording("03-set-mixer-speed")
"""Its text survives Opus: the micro model hears the other's last syllable or not by the last bit of a sample."""

CHAT = recording("15-talk-about-later")
"""Of nothing that a grammar knows."""

FRIEND = "https://mes.plant"
"""Whose pages may use the box."""


Found = Callable[[], dict[str, Any]]


@pytest.fixture(scope="module")
def cut_link() -> Iterator[Found]:
    """It waits most of its time, so it begins before everything else."""
    with isolated("tests.cut_link") as found:
        yield found


@pytest.fixture(scope="module")
def other_device() -> Iterator[Found]:
    """So does this."""
    with isolated("tests.other_device") as found:
        yield found


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory,
    cut_link: Found,  # noqa: ARG001 - it works meanwhile
    other_device: Found,  # noqa: ARG001
) -> Iterator[tuple[Box, Subscriber]]:
    """A box with its gateway, a broker, and a subscriber of everything."""
    folder = tmp_path_factory.mktemp("site")
    # One token for all tests: on a busy machine the gateway may not have noticed yet that their browsers are gone.
    room: dict[str, Any] = {"max_sessions_per_token": 64, "max_sessions_per_address": 64, "origins": [FRIEND]}
    with Broker(folder) as broker, Subscriber(broker) as subscriber, box(folder, broker, **room) as running:
        yield running, subscriber


@contextlib.contextmanager
def plain_pages() -> Iterator[int]:
    """The page without TLS, as a proxy may serve it; its port."""
    ready: Future[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        async def nobody(_: web.Request) -> web.StreamResponse:
            raise web.HTTPNotFound

        application = web.Application()
        application.router.add_routes(Pages(None, nobody).routes())
        runner, over = web.AppRunner(application), asyncio.Event()
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        ready.set_result((runner.addresses[0][1], asyncio.get_running_loop(), over))
        await over.wait()
        await runner.cleanup()

    with ThreadPoolExecutor(1) as elsewhere:
        served = elsewhere.submit(asyncio.run, serve())
        port, loop, over = ready.result(20)
        try:
            yield port
        finally:
            loop.call_soon_threadsafe(over.set)
            served.result(20)


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


def test_audio_of_any_rate_is_heard_as_a_file_of_that_rate_is(site: tuple[Box, Subscriber], tmp_path: Path) -> None:
    running, _ = site
    files = {rate: tmp_path / f"{rate}.wav" for rate in (8000, 44_100, 96_000)}
    for rate, path in files.items():
        samples = np.frombuffer(read_file(STOP), "<i2")
        soundfile.write(path, soxr.resample(samples, 16_000, rate), rate, subtype="PCM_16")

    async def talk() -> list[str]:
        async with running.client(rate=8000) as client:
            for number, (rate, path) in enumerate(files.items(), 1):
                pcm, other = soundfile.read(path, dtype="int16")[0].tobytes(), {"rate": rate} if rate != 8000 else {}
                await client.say(pcm, talk=number, piece=rate // 50 * 2, **other)
                await client.send(type="end")
                await client.until("ended")
            return [event["text"] for event in client.of("transcript")]

    assert run(talk) == [row["text"] for row in transcribed(*files.values())]


WATCHED = """
window.calls = [];  // by WebRTC
window.lived = [];  // everything that the page has shown large
window.loudest = 0;  // that the meter has shown
const Peer = RTCPeerConnection;
window.RTCPeerConnection = class extends Peer { constructor(...options) { super(...options); calls.push(this); } };
document.addEventListener("DOMContentLoaded", () => {
  const live = document.getElementById("live"), bar = document.querySelector("#meter i");
  new MutationObserver(() => lived.push(live.textContent)).observe(live, { childList: true });
  const look = () => (loudest = Math.max(loudest, new DOMMatrix(bar.style.transform).a));
  new MutationObserver(look).observe(bar, { attributes: true });
});
"""
REPORTED = "calls[0].getStats().then(found => [...found.values()])"


def sent(page: Page) -> tuple[int, float]:
    """Packets that the page's call has sent, and the seconds of audio that were captured until now."""
    found = {each["type"]: each for each in page.evaluate(REPORTED)}
    return found["outbound-rtp"]["packetsSent"], found["media-source"]["totalSamplesDuration"]


def talking(running: Box) -> list[dict[str, Any]]:
    """The sessions of those who are there and talk."""
    return [each for each in running.board()["sessions"] if each["talking"] and each["attached"]]


@pytest.mark.parametrize(("way", "format_"), [("auto", "rtp"), ("pcm", "pcm16"), ("opus", "webm")])
def test_someone_speaks_into_a_browser_and_page_and_broker_have_what_transcribe_makes_of_it(
    site: tuple[Box, Subscriber], tmp_path: Path, way: str, format_: str
) -> None:
    running, subscriber = site
    (expected,) = transcribed(PRESS)
    with chromium(running, microphone_file(tmp_path, "11-stop-press-two")) as browser:
        browser.add_init_script(WATCHED)
        page, complaints = open_page(browser, running, way=way)
        if way == "auto":  # the first press asks for the microphone, and calls
            page.keyboard.press("Space")
            page.wait_for_selector("#talk[data-call=connected][data-state=idle]")
            page.wait_for_function(
                f"() => {REPORTED}.then(found => found.some(each => each.type === 'remote-inbound-rtp'))"
            )
        page.keyboard.down("Space")
        page.wait_for_selector("#talk[data-state=talking]")
        before = sent(page) if way == "auto" else None
        page.wait_for_selector("#broker-state[data-state=connected]")
        wait_until(lambda: talking(running), "the talk has begun")
        (session,) = talking(running)
        page.wait_for_selector("#history li[data-kind=command]")
        page.keyboard.up("Space")
        page.wait_for_selector("#talk[data-state=idle]")
        said, command = page.inner_text("#history .said"), page.inner_text("#history .intent")
        badges, lived = page.locator("#history .badge").all_inner_texts(), page.evaluate("lived")
        loudest = page.evaluate("loudest")
        slots = page.locator("#history .slots dd").all_inner_texts()
        if before:
            packets, seconds = (now - then for now, then in zip(sent(page), before, strict=True))
            assert seconds / packets == pytest.approx(PACKET_MS / 1e3, rel=0.2)
        else:
            page.reload()  # the session goes on, and what was said in it is told again
            page.wait_for_selector("#history li[data-kind=command]")
            assert (page.inner_text("#station"), page.inner_text("#history .said")) == (session["source"], said)
    assert session["format"] == format_
    assert said == expected["text"]
    assert command == expected["command"]["intent"]
    assert {"Command", "English"} <= set(badges)
    assert slots == [str(value) for value in expected["command"]["slots"].values()]
    assert {"Listening …", said} <= set(lived)
    assert loudest > 0.3
    assert complaints == []
    told = [
        each for each in running.board()["said"] if (each["type"], each["source"]) == ("command", session["source"])
    ]
    subscriber.wait_for(
        lambda _: any(
            (m.data["utterance_id"], m.data["intent"]) == (told[-1]["utterance_id"], command)
            for m in subscriber.on("evt/command")
        ),
        f"{told[-1]}",
    )


def test_the_page_shows_what_is_being_said_and_emotion_and_event_of_it_as_badges_in_its_language(
    site: tuple[Box, Subscriber], tmp_path: Path
) -> None:
    running, _ = site

    def told_more(socket: WebSocketRoute) -> None:
        """The embedded model knows words alone: tags of a larger one, in what the gateway itself tells.

        And a partial that comes however busy the box is.
        """
        gateway = socket.connect_to_server()

        def pass_on(message: str | bytes) -> None:
            event = json.loads(message)
            if "emotion" in event:
                event |= {"emotion": "HAPPY", "event": "Laughter"}
                for so_far in ("", "stop pre"):
                    socket.send(json.dumps({"type": "transcribing", "text": so_far}))
            socket.send(json.dumps(event))

        gateway.on_message(pass_on)

    with chromium(running, microphone_file(tmp_path, "11-stop-press-two"), locale="zh-CN") as browser:
        browser.add_init_script(WATCHED)
        browser.route_web_socket(re.compile("/ws"), told_more)
        page, _ = open_page(browser, running, way="pcm")
        page.keyboard.down("Space")
        page.wait_for_selector("#history li[data-kind=command]")
        page.keyboard.up("Space")
        assert {"高兴", "笑声", "英语"} <= set(page.locator("#history .badge").all_inner_texts())
        assert {"正在识别…", "stop pre"} <= set(page.evaluate("lived"))


def test_a_page_cut_off_for_longer_than_it_remembers_says_so_and_sends_what_it_still_has(
    site: tuple[Box, Subscriber], tmp_path: Path
) -> None:
    running, _ = site
    cut = threading.Event()
    links: list[WebSocketRoute] = []

    def carried(socket: WebSocketRoute) -> None:
        if cut.is_set():
            socket.close()
            return
        links.append(socket)
        socket.connect_to_server()

    script = importlib.resources.files("edge_asr.gateway") / "page/socket.js"
    briefer = script.read_text(encoding="utf-8").replace("const KEEP_S = 30;", "const KEEP_S = 1;")
    with chromium(running, microphone_file(tmp_path, "11-stop-press-two"), again=True) as browser:
        browser.route_web_socket(re.compile("/ws"), carried)
        browser.route("**/socket.js", lambda route: route.fulfill(body=briefer, content_type="text/javascript"))
        page, _ = open_page(browser, running, way="pcm", mode="toggle")
        page.keyboard.press("Space")
        page.wait_for_selector("#talk[data-state=talking]")
        cut.set()
        links[-1].close()
        page.wait_for_selector("#gateway-state:not([data-state=on])")
        page.wait_for_selector("#notice:not([hidden])")
        page.wait_for_selector("#notice-text:has-text('oldest of your words')")
        cut.clear()
        page.wait_for_selector("#gateway-state[data-state=on]")
        page.wait_for_selector("#history li[data-kind=command]")
        page.keyboard.press("Space")
        assert "oldest of your words are lost" in page.inner_text("#notice-text")


def test_the_page_asks_back_and_a_tap_on_yes_or_no_decides(site: tuple[Box, Subscriber], tmp_path: Path) -> None:
    running, subscriber = site
    phone: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    microphone = microphone_file(tmp_path, "01-start-line-three")
    with chromium(running, microphone, again=True, locale="zh-CN", **phone) as browser:
        page, complaints = open_page(browser, running, way="pcm", mode="toggle")
        assert page.inner_text("#talk-text") == "按下说话"
        page.tap("#talk")
        page.wait_for_selector("#question")
        page.tap("#talk")
        faults = faults_of(page)
        page.emulate_media(color_scheme="dark")
        faults += faults_of(page)
        shown = "[...document.querySelectorAll('button')].filter(button => button.offsetParent)"
        targets = page.evaluate(f"{shown}.map(button => button.offsetHeight)")
        width = page.evaluate("document.documentElement.scrollWidth")
        page.tap("#confirm")
        page.wait_for_selector("#history li[data-kind=command]")
        assert page.is_hidden("#question")
        wait_for_pause(page)
        page.tap("#talk")
        page.wait_for_selector("#question")
        page.tap("#talk")
        page.tap("#cancel")
        page.wait_for_selector("#history li[data-kind=rejected]")
        badges = page.locator("#history li[data-kind=rejected] .badge").all_inner_texts()
    assert min(targets) >= 56  # gloves
    assert width <= 360
    assert faults == []
    assert complaints == []
    assert "已取消" in badges
    subscriber.wait_for(lambda m: any(x.data.get("confirmed") for x in m if x.topic.endswith("command")), "the yes")


def test_the_space_bar_that_is_held_when_the_page_asks_back_answers_nothing_and_tab_and_enter_do(
    site: tuple[Box, Subscriber], tmp_path: Path
) -> None:
    running, _ = site
    with chromium(running, microphone_file(tmp_path, "01-start-line-three"), again=True) as browser:
        page, complaints = open_page(browser, running, way="pcm")
        page.keyboard.down("Space")
        page.wait_for_selector("#question")
        page.keyboard.down("Space")  # as a key that is held repeats itself
        page.keyboard.up("Space")
        page.wait_for_selector("#talk[data-state=idle]")
        page.keyboard.press("Space")  # to say no
        page.wait_for_selector("#talk[data-state=talking]")
        page.wait_for_selector("#talk[data-state=idle]")
        assert page.is_visible("#question")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_selector("#history li[data-kind=command]")
        page.keyboard.press("Enter")  # on the talk button, as screen readers press it
        page.wait_for_selector("#talk[data-state=talking]")
        page.keyboard.press("Enter")
        page.wait_for_selector("#talk[data-state=idle]")
    assert complaints == []


def level_dbfs(pcm: bytes) -> float:
    """Of the loud moments: 5 % of the pieces of 32 ms are louder."""
    pieces = np.frombuffer(pcm, "<i2")[: len(pcm) // 1024 * 512].reshape(-1, 512) / 32768
    return float(20 * np.log10(np.percentile(pieces.std(axis=1), 95)))


def test_the_dashboard_shows_live_what_there_is_to_look_after(site: tuple[Box, Subscriber]) -> None:
    running, _ = site
    token, other, seen = running.tokens.add("crooked", "talk"), running.tokens.add("spoken", "talk"), threading.Event()
    hum = 300 * np.sin(2 * np.pi * 50 * np.arange(10 * SAMPLE_RATE) / SAMPLE_RATE)
    off_its_middle = (4000 + hum).astype("<i2").tobytes()
    heard = ("crooked", "spoken")  # one talks, the other has talked

    async def talk() -> None:
        async with running.client(token=other) as before, running.client(token=token) as client:
            await before.say(read_file(STOP))
            await before.send(type="end")
            await before.until("ended")
            await client.say(read_file(STOP) + quiet(SAMPLE_RATE) + off_its_middle)
            await client.until("command")
            await asyncio.to_thread(seen.wait, 60)

    with ThreadPoolExecutor(1) as elsewhere, chromium(running, None, locale="zh-CN") as browser:
        page, complaints = opened(browser, f"{running.url}/dashboard#token={running.watch}")
        page.wait_for_selector("#broker-state[data-state=connected]")
        talking = elsewhere.submit(run, talk)
        try:
            page.wait_for_selector("#history li[data-kind=command] .badge:text('crooked')")
            page.wait_for_selector("#sessions td:text('crooked')")
            meters = [page.wait_for_selector(f"#sources tr:has(td:text-is('{name}')) meter") for name in heard]
            levels = [meter.get_property("value").json_value() for meter in meters if meter]
            alarm = page.wait_for_selector("#alarms li:has-text('crooked')")
            assert alarm
            shown = page.evaluate(
                "Object.fromEntries([...document.querySelectorAll('#figures > div')].map(each => "
                "[each.querySelector('.name').textContent, each.querySelector('.value').textContent]))"
            )
            about = page.inner_text("#about")
            remedy = alarm.inner_text()
            faults = faults_of(page)
            page.emulate_media(color_scheme="dark")
            faults += faults_of(page)
            controls = page.locator("button:visible, input:visible, form:visible").count()
        finally:
            seen.set()
            talking.result()
    assert levels[0] > -60
    assert levels[1] == pytest.approx(level_dbfs(read_file(STOP)), abs=1)
    assert "sound card is defective" in remedy
    known = running.board()
    assert known["meta"]["model"] in about
    assert known["meta"]["model_sha256"] in about
    assert set(shown) == {"待发送", "最久等待", "已丢弃", "等待识别", "实时系数", "语句", "单核 CPU", "内存", "温度"}
    assert shown.pop("温度")[0].isdigit() is (known["temperature_c"] is not None)
    assert all(value[0].isdigit() for name, value in shown.items() if name != "最久等待")  # none may wait
    assert (faults, complaints, controls) == ([], [], 0)  # it is for looking


def test_a_page_without_permission_or_token_or_https_says_what_to_do(site: tuple[Box, Subscriber]) -> None:
    running, _ = site
    elsewhere = "--host-resolver-rules=MAP box.plant 127.0.0.1"
    with plain_pages() as port, chromium(running, None, elsewhere, asks=True) as browser:
        page = browser.pages[0]
        page.goto(f"http://box.plant:{port}/")
        page.wait_for_selector("#notice")
        assert "needs a secure connection" in page.inner_text("#notice-text")
        assert "https://" in page.inner_text("#notice-help")
        page.goto(f"{running.url}/#token=wrong")
        page.wait_for_selector("#notice")
        assert "no valid token" in page.inner_text("#notice-text")
        page.click("#notice-action")
        page.fill("#token", running.token)
        page.click("#options .go")
        page.wait_for_selector("#gateway-state[data-state=on]")
        page.click("#talk")
        page.wait_for_selector("#notice")
        assert "may not use the microphone" in page.inner_text("#notice-text")
        assert "site settings" in page.inner_text("#notice-help")


class WhipClient:
    """A WHIP client with a microphone that plays a recording once, and a data channel for events."""

    def __init__(self, running: Box, path: Path, *, channel: bool = True) -> None:
        self.running = running
        self.only = ""
        """Candidates of this type alone; empty: of every type."""
        self.more = ""
        """Further candidates to offer."""
        self.peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self.player = MediaPlayer(str(path))
        assert self.player.audio
        self.peer.addTransceiver(self.player.audio, "sendonly")
        self.events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.channel = self.peer.createDataChannel("events") if channel else None
        if self.channel:
            self.channel.on("message", lambda text: self.events.put_nowait(json.loads(text)))

    async def offer(self, http: aiohttp.ClientSession) -> aiohttp.ClientResponse:
        await self.peer.setLocalDescription(await self.peer.createOffer())
        return await http.post(
            f"{self.running.url}/whip",
            data=self.peer.localDescription.sdp.replace("a=candidate:", f"{self.more}a=candidate:", 1).encode(),
            headers={"Content-Type": "application/sdp", "Authorization": f"Bearer {self.running.token}"},
        )

    async def call(self, http: aiohttp.ClientSession) -> aiohttp.ClientResponse:
        response = await self.offer(http)
        assert response.status == 201, await response.text()
        answer = re.sub(rf"^a=candidate:.*typ (?!{self.only}).*\r?\n", "", await response.text(), flags=re.MULTILINE)
        await self.peer.setRemoteDescription(RTCSessionDescription(answer, "answer"))
        return response

    def say(self, **message: Any) -> None:
        assert self.channel
        self.channel.send(json.dumps(message))

    async def until(self, kind: str) -> dict[str, Any]:
        while (event := await asyncio.wait_for(self.events.get(), 20))["type"] != kind:
            pass
        return event


def test_a_whip_client_talks_by_webrtc_and_answers_on_its_data_channel_what_it_is_asked_there(
    site: tuple[Box, Subscriber],
) -> None:
    running, _ = site

    async def talk() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], int, int]:
        client = WhipClient(running, recording("01-start-line-three"))
        async with running.http() as http:
            response = await client.call(http)
            await client.until("ready")
            client.say(type="start", talk=1)
            asked = await client.until("pending")
            question = {"pending_id": asked["pending_id"], "confirmations_left": asked["confirmations_left"]}
            client.say(type="answer", answer="confirm", **question)
            command = await client.until("command")
            client.say(type="answer", answer="confirm", **question)
            late = await client.until("error")
            location = running.url + response.headers["Location"]
            gone = await http.delete(location, headers={"Authorization": f"Bearer {running.token}"})
            again = await http.delete(location, headers={"Authorization": f"Bearer {running.token}"})
        await client.peer.close()
        return asked, command, late, gone.status, again.status

    asked, command, late, gone, again = run(talk)
    assert (command["intent"], command["confirmed"]) == (asked["intent"], True)
    assert late["reason"] == "answered"
    assert (gone, again) == (200, 404)


def test_speech_outside_the_grammar_comes_back_as_rejected_with_the_reason_by_websocket_and_by_data_channel(
    site: tuple[Box, Subscriber],
) -> None:
    running, subscriber = site
    (expected,) = transcribed(CHAT)

    async def talk() -> list[dict[str, Any]]:
        client = WhipClient(running, CHAT)
        async with running.http() as http, running.client() as station:
            await client.call(http)
            await client.until("ready")
            client.say(type="start", talk=1)
            await station.say(read_file(CHAT))
            await station.send(type="end")
            await station.until("ended")
            while (await client.until("ack"))["position"] < 0.9 * expected["end"] * 48_000:
                pass
            client.say(type="end")
            told = [*station.of("rejected"), await client.until("rejected")]
        await client.peer.close()
        assert not station.of("command")
        return told

    by_websocket, by_channel = run(talk)
    for key in ("reason", "detail"):
        assert by_websocket[key] == expected["rejected"][key]
    assert (by_websocket["text"], by_channel["reason"]) == (expected["text"], by_websocket["reason"])
    assert by_channel["text"] in by_channel["detail"]
    known = {by_websocket["id"], by_channel["id"]}
    subscriber.wait_for(lambda _: known <= {m.data["id"] for m in subscriber.on("evt/rejected")}, "both rejections")


def test_what_is_almost_a_command_is_rejected_with_how_sure_the_box_was_and_of_what(
    site: tuple[Box, Subscriber], tmp_path: Path
) -> None:
    running, _ = site
    whole = read_file(STOP)
    pcm, path = whole[: len(whole) * 55 // 200 * 2], tmp_path / "emergency.wav"
    soundfile.write(path, np.frombuffer(pcm, "<i2"), SAMPLE_RATE)
    (expected,) = transcribed(path)

    async def talk() -> dict[str, Any]:
        async with running.client() as client:
            await client.say(pcm)
            await client.send(type="end")
            return await client.until("rejected")

    told = run(talk)
    assert told["text"] == expected["text"] == "emergency"
    assert (told["reason"], told["candidates"]) == ("not-understood", ["EmergencyStop()"])
    for confidence in (told["confidence"], expected["rejected"]["confidence"]):  # by graphs that may round differently
        assert 0 < confidence < Commands().min_confidence


def test_the_page_says_in_its_language_that_nothing_was_understood_and_why(
    site: tuple[Box, Subscriber], tmp_path: Path
) -> None:
    running, _ = site
    with chromium(running, microphone_file(tmp_path, "15-talk-about-later")) as browser:
        page, complaints = open_page(browser, running, way="pcm", mode="toggle")
        page.click("#talk")
        page.wait_for_selector("#history li[data-kind=rejected]")
        page.click("#talk")
        english, said = page.inner_text("#history li"), page.inner_text("#history .said")
        page.click("#open-options")
        page.check("input[name=language][value=zh]")
        chinese = page.inner_text("#history li")
    (told,) = [each for each in running.board()["said"] if (each["type"], each["text"]) == ("rejected", said)][-1:]
    assert "Not understood" in english
    assert told["detail"] in english
    assert "未听懂" in chinese
    assert said in chinese
    assert told["detail"] not in chinese  # the box writes English
    assert complaints == []


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


def wakes(pid: int) -> int:
    """How often a process has waited for something and was woken."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", status, re.MULTILINE)[0])


def test_silence_wakes_the_box_seldom_whether_it_comes_by_websocket_or_by_webrtc_and_all_of_it_is_heard(
    site: tuple[Box, Subscriber], tmp_path: Path
) -> None:
    running, _ = site
    pieces, piece = 100, 640
    """Of 20 ms, and as many packets by WebRTC meanwhile."""
    silence = tmp_path / "silence.wav"
    soundfile.write(silence, np.zeros(20 * SAMPLE_RATE, np.int16), SAMPLE_RATE)

    async def talk() -> tuple[int, int]:
        client = WhipClient(running, silence)
        async with running.http() as http, running.client() as station:
            await client.call(http)
            await client.until("ready")
            client.say(type="start", talk=1)
            await client.until("ack")
            await station.send(type="start", talk=1)
            before, loop = wakes(running.process.pid), asyncio.get_running_loop()
            began = loop.time()
            for number in range(pieces):
                await station.socket.send_bytes((number * piece // 2).to_bytes(4, "little") + bytes(piece))
                await asyncio.sleep(max(0.0, began + 0.02 * number - loop.time()))
            used = wakes(running.process.pid) - before
            await station.send(type="end")
            await station.until("ended")
            await client.until("ack")
        await client.peer.close()
        return used, max(event["position"] for event in station.of("ack"))

    used, heard = run(talk)
    assert heard == pieces * piece // 2
    assert used < pieces


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


def test_a_compressed_talk_whose_beginning_this_daemon_has_not_heard_ends_with_a_word_and_the_next_is_heard(
    site: tuple[Box, Subscriber],
) -> None:
    running, _ = site
    data = encoded(SPEED, "webm")

    async def talk() -> list[dict[str, Any]]:
        async with running.client() as client:
            await client.until("ready")
            await client.send(type="start", talk=1, format="webm")
            for offset in (5000, 6000):
                await client.socket.send_bytes(offset.to_bytes(4, "little") + data[offset : offset + 1000])
            await client.say(read_file(STOP), talk=2)
            await client.send(type="end")
            await client.until("command")
            return client.events

    events = run(talk)
    (error,) = [event for event in events if event["type"] == "error"]
    assert error["reason"] == "lost"
    assert any(event["type"] == "ack" and event["talk"] == 1 and event["ended"] for event in events)


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


def test_a_question_is_answered_with_a_button_and_once_only(site: tuple[Box, Subscriber]) -> None:
    running, _ = site

    async def talk() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
        async with running.client() as client:
            await client.say(read_file(recording("01-start-line-three")))
            await client.send(type="end")
            asked = await client.until("pending")
            question = {"pending_id": asked["pending_id"], "confirmations_left": asked["confirmations_left"]}
            async with running.client() as other:  # a question is its own session's
                await other.until("ready")
                await other.send(type="answer", answer="confirm", **question)
                foreign = await other.until("error")
            await client.send(type="answer", answer="confirm", **question)
            command = await client.until("command")
            await client.send(type="answer", answer="cancel", **question)
            return asked, foreign, command, await client.until("error")

    asked, foreign, command, late = run(talk)
    assert asked["read_back"] == "start line three?"
    assert foreign["detail"] == late["detail"] == "that question is not open any more"
    assert command["confirmed"] is True
    assert command["utterance_id"] == asked["utterance_id"]


async def first_half(running: Box, pcm: bytes) -> tuple[str, int, int]:
    """Speak half of a recording and lose the connection: session, last event, how far the gateway has heard."""
    async with running.client() as client:
        ready = await client.until("ready")
        await client.say(pcm[: len(pcm) // 2])
        ack = await client.until("ack")
        client.abort()
    return ready["session"], max(event.get("n", 0) for event in client.events), ack["position"]


def test_a_talk_goes_on_after_the_link_was_cut_with_nothing_lost_and_nothing_twice(
    site: tuple[Box, Subscriber],
) -> None:
    running, _ = site
    pcm = read_file(SPEED)

    async def talk() -> tuple[dict[str, Any], list[str], list[int]]:
        session, have, acked = await first_half(running, pcm)
        async with running.client(session=session, have=have) as client:
            ready = await client.until("ready")
            assert ready["position"] >= acked
            await client.say(pcm[2 * acked :], talk=1, position=acked)  # some of it is there already
            await client.send(type="end")
            await client.until("ended")
            return (
                ready,
                [event["text"] for event in client.of("transcript")],
                [e["n"] for e in client.events if "n" in e],
            )

    ready, texts, numbers = run(talk)
    assert ready["resumed"] is True
    assert texts == [row["text"] for row in transcribed(SPEED)]
    assert len(numbers) == len(set(numbers))


def test_what_was_said_reaches_a_client_that_was_away_when_it_was_understood(site: tuple[Box, Subscriber]) -> None:
    running, subscriber = site
    before = len(subscriber.on("evt/transcript"))

    async def talk() -> list[dict[str, Any]]:
        async with running.client() as client:
            session = (await client.until("ready"))["session"]
            pcm = read_file(STOP) + quiet(16_000)
            await client.say(pcm)
            while (await client.until("ack"))["position"] < len(pcm) // 2 - 10_000:
                pass
            client.abort()
        subscriber.wait_for(lambda _: len(subscriber.on("evt/transcript")) > before, "the transcript")
        async with running.client(session=session) as client:
            await client.until("command")
            return client.events

    events = run(talk)
    assert [event["text"] for event in events if event["type"] == "transcript"] == ["emergency stop"]


@pytest.mark.parametrize(
    ("age_ms", "at_s"), [(25_000, 0), (300_000, 0), (300_000, 275)], ids=["resent", "of long ago", "goes on"]
)
def test_a_command_that_waited_in_a_tablets_memory_comes_as_expired_not_as_live(
    site: tuple[Box, Subscriber], age_ms: int, at_s: int
) -> None:
    running, subscriber = site

    async def talk() -> dict[str, Any]:
        async with running.client() as client:
            await client.say(read_file(STOP), age_ms=age_ms, position=at_s * SAMPLE_RATE)
            await client.send(type="end")
            await client.until("ended")
            return {event["type"]: event for event in client.events}

    events = run(talk)
    assert "command" not in events
    ident = events["expired"]["id"]
    subscriber.wait_for(lambda m: any(x.data["id"] == ident for x in m), "it")
    (arrived,) = [message for message in subscriber.messages if message.data["id"] == ident]
    assert arrived.topic.endswith("evt/expired")


def test_the_page_says_of_a_talk_how_old_it_is(tmp_path: Path) -> None:
    with plain_pages() as port, browsing(tmp_path, None) as browser:
        page = browser.pages[0]
        page.goto(f"http://127.0.0.1:{port}/")
        age_ms = page.evaluate(
            """async () => {
              const { Socket } = await import("/socket.js");
              return new Promise((told) => {
                const socket = Object.assign(new Socket(""), { state: "on" });
                socket.socket = { send: (text) => told(JSON.parse(text).age_ms) };
                socket.start("pcm16", 16000, 300000);
              });
            }"""
        )
    assert 300_000 <= age_ms < 301_000


def test_a_session_is_taken_over_by_its_own_token_alone_and_who_had_it_is_told_not_to_come_back(
    site: tuple[Box, Subscriber],
) -> None:
    running, _ = site
    other = running.tokens.add("thief", "talk")

    async def talk() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], int | None]:
        async with running.client() as client:
            own = await client.until("ready")
            async with running.client(token=other, session=own["session"]) as thief:
                stolen = await thief.until("ready")
            async with running.client(session=own["session"]) as second:  # as a page that was opened twice
                resumed = await second.until("ready")
                while not client.socket.closed:
                    await client.socket.receive(20)
            return own, stolen, resumed, client.socket.close_code

    own, stolen, resumed, code = run(talk)
    assert (resumed["resumed"], resumed["session"], code) == (True, own["session"], REPLACED)
    assert (stolen["resumed"], stolen["source"]) == (False, "thief")
    assert stolen["session"] != own["session"]


def test_a_revoked_token_ends_its_session(site: tuple[Box, Subscriber]) -> None:
    running, _ = site
    token = running.tokens.add("retired", "talk")

    async def talk() -> tuple[dict[str, Any], int | None]:
        async with running.client(token=token) as client:
            await client.until("ready")
            running.tokens.revoke("retired")
            error = await client.until("error")
            await client.socket.receive(20)
            return error, client.socket.close_code

    error, _ = run(talk)
    assert (error["reason"], error["detail"]) == ("revoked", "its token was revoked")


def test_the_dashboard_shows_those_who_may_watch_what_is_said_and_nobody_else(site: tuple[Box, Subscriber]) -> None:
    running, _ = site
    watch = running.tokens.add("wall", "watch")

    async def look() -> tuple[list[int], dict[str, Any]]:
        async with running.client() as client, running.http() as http:
            await client.say(read_file(STOP))
            await client.send(type="end")
            await client.until("ended")
            statuses = []
            for token in ("", running.token, watch):
                response = await http.get(f"{running.url}/board", headers={"Authorization": f"Bearer {token}"})
                statuses.append(response.status)
            return statuses, await response.json()

    statuses, board = run(look)
    assert statuses == [401, 403, 200]
    assert board["broker"] == "connected"
    assert board["said"][-1]["intent"] == "EmergencyStop"
    assert any(session["source"].startswith("tablet") for session in board["sessions"])
    assert board["meta"]["model"].startswith("micro-en")


def test_a_caller_whose_certificate_is_not_the_one_of_its_offer_is_not_heard(site: tuple[Box, Subscriber]) -> None:
    running, _ = site
    token = running.tokens.add("impostor", "talk")

    async def call() -> tuple[str, int]:
        client = WhipClient(running, STOP)
        await client.peer.setLocalDescription(await client.peer.createOffer())
        own = client.peer.localDescription.sdp
        async with running.http() as http:
            headers = {"Content-Type": "application/sdp", "Authorization": f"Bearer {token}"}
            other = re.sub(r"(fingerprint:\S+ )..", r"\g<1>00", own)
            response = await http.post(f"{running.url}/whip", data=other.encode(), headers=headers)
            await client.peer.setRemoteDescription(RTCSessionDescription(await response.text(), "answer"))
            turned = own.replace("a=setup:actpass", "a=setup:active").encode()
            unserved = await http.post(f"{running.url}/whip", data=turned, headers=headers)
        await asyncio.to_thread(wait_until, lambda: "impostor: session closed" in running.log, "the end of the call")
        await client.peer.close()
        return "ready" if not client.events.empty() else "", unserved.status

    assert run(call) == ("", 422)
    assert "impostor: the call ends: failed" in running.log


@pytest.mark.parametrize(
    ("headers", "offer", "status"),
    [
        ({"Origin": "https://evil.example"}, "", 403),
        ({"Content-Type": "text/plain"}, "", 415),
        ({"Authorization": "Bearer wrong"}, "", 401),
        ({"Authorization": "Basic !"}, "", 401),
        ({}, "v=0\r\n", 400),
        ({}, OFFER.replace("m=audio", "m=video"), 406),
        ({}, OFFER + OFFER[OFFER.index("m=audio") :].replace("mid:0", "mid:1"), 406),
        ({}, OFFER.replace("opus/48000/2", "PCMU/8000"), 406),
        ({}, OFFER.replace("sendonly", "recvonly"), 406),
        ({}, OFFER.replace("setup:actpass", "setup:active"), 422),
        ({}, OFFER.replace("a=mid:0", "a=x\rm=audio 9 UDP/TLS/RTP/SAVPF 0\ra=mid:0"), 400),
        ({}, OFFER + OFFER.splitlines(keepends=True)[-1] * 64, 400),
    ],
)
def test_an_offer_that_is_not_one_is_refused_as_the_rfc_says_and_opens_no_session(
    site: tuple[Box, Subscriber], headers: dict[str, str], offer: str, status: int
) -> None:
    running, _ = site
    usual = {"Content-Type": "application/sdp", "Authorization": f"Bearer {running.token}"}
    opened_before = running.log.count("session opened by webrtc")

    async def ask() -> tuple[int, dict[str, Any], str]:
        async with running.http() as http:
            sent = {**usual, **headers}
            response = await http.post(f"{running.url}/whip", data=offer.encode(), headers=sent)
            return response.status, await response.json(), response.headers["Content-Security-Policy"]

    answered, body, policy = run(ask)
    assert answered == status
    assert body["error"]
    assert policy.startswith("default-src 'none'")
    assert running.log.count("session opened by webrtc") == opened_before


def test_pages_of_a_friendly_origin_may_ask_beforehand_and_other_methods_are_kept_for_later(
    site: tuple[Box, Subscriber],
) -> None:
    running, _ = site
    preflight = {"Access-Control-Request-Method": "PATCH", "Access-Control-Request-Headers": "authorization,if-match"}

    async def ask() -> tuple[list[int], list[int], str]:
        async with running.http() as http:
            asked = []
            for path in ("/whip", "/whip/some-call", "/v1/audio/transcriptions"):
                for origin in (FRIEND, "https://evil.example"):
                    answer = await http.options(running.url + path, headers={**preflight, "Origin": origin})
                    asked.append(answer.status)
                    if origin == FRIEND:
                        assert answer.headers["Access-Control-Allow-Origin"] == FRIEND
                        assert "PATCH" in answer.headers["Access-Control-Allow-Methods"]
                        assert "If-Match" in answer.headers["Access-Control-Allow-Headers"]
            reserved = [
                (await http.request(method, running.url + path)).status
                for method, path in itertools.product(("GET", "HEAD", "PUT"), ("/whip", "/whip/some-call"))
            ]
            described = await http.options(f"{running.url}/whip")
            return asked, reserved, described.headers["Accept-Post"]

    asked, reserved, accepts = run(ask)
    assert asked == [200, 403] * 3
    assert reserved == [405] * 6
    assert accepts == "application/sdp"


def test_candidates_are_trickled_under_their_etag_only(site: tuple[Box, Subscriber]) -> None:
    running, _ = site
    bearer = {"Authorization": f"Bearer {running.token}"}
    fragment = "a=mid:0\r\na=candidate:1 1 udp 2130706431 127.0.0.1 9 typ host\r\na=end-of-candidates\r\n"
    useless = "a=mid:0\r\na=candidate:1 1 udp 1 0b5e.local 9 typ host\r\na=candidate:2 1 tcp 1 127.0.0.1 9 typ host\r\n"

    async def ask() -> list[int]:
        client = WhipClient(running, STOP, channel=False)
        async with running.http() as http:
            response = await client.call(http)
            location, etag = running.url + response.headers["Location"], response.headers["ETag"]
            statuses = []
            other = {"Authorization": f"Bearer {running.tokens.add('stranger', 'talk')}"}
            for headers, body in (
                ({"Authorization": "Bearer wrong"}, fragment),
                (other, fragment),
                ({"If-Match": etag, "Content-Type": "application/sdp"}, fragment),
                ({"If-Match": etag}, "a=ice-options:trickle\r\n" * 400),
                ({}, fragment),
                ({"If-Match": '"other"'}, fragment),
                ({"If-Match": "*"}, fragment),
                ({"If-Match": etag}, "a=candidate:nonsense\r\n"),
                ({"If-Match": etag}, fragment),
                ({"If-Match": f'"older", {etag}'}, useless),
            ):
                sent = {"Content-Type": "application/trickle-ice-sdpfrag", **bearer, **headers}
                statuses.append((await http.patch(location, data=body, headers=sent)).status)
            statuses.append((await http.get(location, headers=bearer)).status)
            statuses.append((await http.delete(location, headers=other)).status)
            statuses.append((await http.delete(location, headers=bearer)).status)
            statuses.append((await http.patch(location, data=fragment, headers=bearer)).status)
        await client.peer.close()
        return statuses

    assert run(ask) == [401, 403, 415, 413, 428, 412, 422, 400, 204, 204, 405, 403, 200, 404]


def test_who_follows_the_documentation_talks_from_another_device_and_the_broker_has_the_command(
    other_device: Found,
) -> None:
    found = other_device()
    (expected,) = transcribed(PRESS)
    assert found == {"said": expected["text"], "intent": expected["command"]["intent"], "source": "tablet-3"}


def test_a_call_cut_in_the_middle_of_a_sentence_goes_on_over_the_websocket_and_costs_no_word_and_no_session(
    cut_link: Found,
) -> None:
    found = cut_link()
    assert found["way"] == "rtp"
    assert found["said"] == [row["text"] for row in transcribed(PRESS)]
    assert found["kinds"] in (["expired"], ["command"])
    assert found["sessions"] == 1
    assert "30 s are kept" in found["shown"]
