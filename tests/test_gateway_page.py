"""What happens to the page's microphone and link: two presses at once, a link that is down, an unplugged headset."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator

import pytest
from playwright.sync_api import BrowserContext, Page, WebSocketRoute

from tests.gateway import Box, box, chromium, microphone_file, recording, transcribed, wait_for_pause, wait_for_speech

WATCHED = """
window.calls = [];  // by WebRTC
window.contexts = [];
window.microphones = 0;  // that pieces come from
window.streams = [];
window.sockets = 0;
window.starts = 0;  // of talks
window.pieces = 0;
window.order = [];  // of what is sent, runs of pieces as one
window.blobs = Promise.resolve();  // before which nothing of a recorder can be read
window.gate = Promise.resolve();  // before which nobody gets a microphone
const watch = (name, note) => {
  window[name] = class extends window[name] { constructor(...given) { super(...given); note(this); } };
};
watch("RTCPeerConnection", (peer) => calls.push(peer));
watch("AudioContext", (context) => contexts.push(context));
watch("WebSocket", () => sockets++);
const send = WebSocket.prototype.send;
WebSocket.prototype.send = function (message) {
  const type = typeof message === "string" ? JSON.parse(message).type : "piece";
  if (type === "piece") pieces++;
  if (type === "start") starts++;
  if (["start", "piece", "end"].includes(type) && order.at(-1) !== type) order.push(type);
  send.call(this, message);
};
const read = Blob.prototype.arrayBuffer;
Blob.prototype.arrayBuffer = async function () {
  await blobs;
  return read.call(this);
};
const listen = AudioContext.prototype.createMediaStreamSource;
AudioContext.prototype.createMediaStreamSource = function (stream) {
  microphones++;
  return listen.call(this, stream);
};
const media = navigator.mediaDevices, ask = media.getUserMedia.bind(media);
media.getUserMedia = async (wanted) => {
  await gate;
  const stream = await ask(wanted);
  streams.push(stream);
  return stream;
};
window.down = false;  // the link
const add = AudioWorklet.prototype.addModule;
AudioWorklet.prototype.addModule = function (address) {
  return down ? Promise.reject(new DOMException("", "AbortError")) : add.call(this, address);
};
window.unplug = () => {
  const [track] = streams.at(-1).getTracks();
  track.stop();
  track.dispatchEvent(new Event("ended"));
};
"""
IDLE, TALKING = "#talk[data-state=idle]", "#talk[data-state=talking]"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    with box(tmp_path_factory.mktemp("page"), max_sessions_per_token=64, max_sessions_per_address=64) as started:
        yield started


@pytest.fixture(scope="module")
def browser(running: Box) -> Iterator[BrowserContext]:
    with chromium(running, microphone_file(running.folder, "11-stop-press-two"), again=True) as started:
        started.add_init_script(WATCHED)
        yield started


def new_page(browser: BrowserContext, running: Box, way: str, first: str = "") -> Page:
    """A page by one way of audio, in which a script has run first."""
    page = browser.new_page()
    page.add_init_script(first)
    page.goto(running.url)
    page.evaluate("([token, way]) => Object.assign(localStorage, { token, way })", [running.token, way])
    page.reload()
    page.wait_for_selector("#gateway-state[data-state=on]")
    return page


def test_two_presses_before_the_browser_gave_the_microphone_are_one_talk_and_every_piece_comes_once(
    browser: BrowserContext, running: Box
) -> None:
    page = new_page(browser, running, "pcm")
    page.evaluate("() => { window.gate = new Promise((resolve) => (window.give = resolve)); }")
    page.keyboard.press("Space")
    page.keyboard.down("Space")
    page.evaluate("give()")
    page.wait_for_selector(TALKING)
    page.wait_for_function("() => pieces > 5")
    assert page.evaluate("[microphones, streams.length, starts]") == [1, 1, 1]
    page.close()


def test_a_press_wakes_a_microphone_that_a_locked_screen_has_put_to_sleep(
    browser: BrowserContext, running: Box
) -> None:
    page = new_page(browser, running, "pcm")
    page.keyboard.down("Space")
    page.wait_for_selector(TALKING)
    page.keyboard.up("Space")
    page.wait_for_selector(IDLE)
    page.evaluate("(window.heard = contexts.find((context) => context.state === 'running')).suspend()")
    page.keyboard.down("Space")
    page.wait_for_function("() => heard.state === 'running'")
    page.wait_for_selector(TALKING)
    page.close()


def test_who_presses_first_in_a_page_while_the_link_is_down_is_heard_when_it_is_back(
    browser: BrowserContext, running: Box
) -> None:
    cut = threading.Event()

    def carried(socket: WebSocketRoute) -> None:
        if cut.is_set():
            socket.close()
        else:
            socket.connect_to_server()

    (expected,) = transcribed(recording("11-stop-press-two"))
    page = new_page(browser, running, "pcm")
    page.keyboard.down("Space")
    page.wait_for_selector(TALKING)
    page.keyboard.up("Space")
    page.wait_for_selector(IDLE)
    page.route_web_socket(re.compile("/ws"), carried)
    cut.set()
    page.reload()  # it does not know that there was a talk in its session
    page.evaluate("down = true")
    page.keyboard.down("Space")
    page.wait_for_selector(TALKING)
    assert "30 s are kept" in page.inner_text("#live")
    wait_for_speech(page)
    wait_for_pause(page)
    page.keyboard.up("Space")
    page.wait_for_selector(IDLE)
    cut.clear()
    page.evaluate("dispatchEvent(new Event('online'))")
    page.wait_for_selector(f"#history .said:text-is('{expected['text']}')")
    page.close()


def test_who_has_never_had_what_listens_is_told_so_and_heard_when_the_link_is_back(
    browser: BrowserContext, running: Box
) -> None:
    page = new_page(browser, running, "pcm", "window.down = true")
    page.keyboard.press("Space")
    page.wait_for_selector("#notice-text:has-text('No connection')")
    assert page.is_visible(IDLE)
    assert page.evaluate("streams.some((stream) => stream.active)") is False
    page.evaluate("down = false")
    page.keyboard.down("Space")
    page.wait_for_function("() => pieces > 5")
    assert page.is_hidden("#notice")
    assert page.evaluate("microphones") == 1
    page.close()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "NotReadableError",
            [("en", "Another program holds", "Close it"), ("zh", "另一个程序正在使用麦克风", "请关闭它")],
        ),
        (
            "NotFoundError",
            [("en", "No microphone was found", "Connect a headset"), ("zh", "没有找到麦克风", "请连接耳机")],
        ),
    ],
)
def test_a_microphone_that_another_program_holds_or_that_is_not_there_is_explained_until_it_can_be_had(
    browser: BrowserContext, running: Box, name: str, words: list[tuple[str, str, str]]
) -> None:
    page = new_page(browser, running, "pcm")
    page.evaluate("name => { window.gate = Promise.reject(new DOMException('', name)); }", name)
    page.keyboard.press("Space")
    page.wait_for_selector("#notice:not([hidden])")
    for language, problem, remedy in words:
        page.evaluate("language => document.querySelector(`input[name=language][value=${language}]`).click()", language)
        assert problem in page.inner_text("#notice-text")
        assert remedy in page.inner_text("#notice-help")
    page.evaluate("localStorage.removeItem('language')")
    assert page.is_visible(IDLE)
    page.evaluate("window.gate = Promise.resolve()")
    page.keyboard.down("Space")
    page.wait_for_selector(TALKING)
    assert page.is_hidden("#notice")
    page.close()


def test_a_headset_that_is_unplugged_in_a_talk_is_missed_and_plugged_in_again_goes_on_in_the_same_call(
    browser: BrowserContext, running: Box
) -> None:
    page = new_page(browser, running, "auto")
    page.keyboard.press("Space")
    page.wait_for_selector("#talk[data-call=connected][data-state=idle]")
    page.keyboard.down("Space")
    page.wait_for_selector(TALKING)
    page.evaluate("unplug()")
    page.wait_for_selector("#notice-text:has-text('No microphone')")
    page.wait_for_selector(IDLE)
    page.keyboard.up("Space")
    page.keyboard.down("Space")
    page.wait_for_selector(TALKING)
    page.wait_for_function("() => calls[0].getSenders()[0].track === streams.at(-1).getTracks()[0]")
    assert page.evaluate("[streams.length, streams.at(-1).active, calls.length]") == [2, True, 1]
    assert page.evaluate("contexts.filter((context) => context.state === 'running').length") == 1
    assert page.is_hidden("#notice")
    page.close()


def test_a_headset_that_is_unplugged_in_a_compressed_talk_ends_it(browser: BrowserContext, running: Box) -> None:
    page = new_page(browser, running, "opus")
    page.keyboard.down("Space")
    page.wait_for_function("() => pieces > 3")
    page.evaluate("unplug()")
    page.wait_for_selector("#notice-text:has-text('No microphone')")
    page.wait_for_function("() => order.at(-1) === 'end'")
    page.close()


def test_a_press_while_a_recorder_still_owes_the_last_of_a_talk_begins_the_next_behind_it(
    browser: BrowserContext, running: Box
) -> None:
    page = new_page(browser, running, "opus")
    page.keyboard.down("Space")
    page.wait_for_function("() => pieces > 3")
    page.evaluate("() => { window.blobs = new Promise((resolve) => (window.give = resolve)); }")
    page.keyboard.up("Space")
    page.wait_for_selector(IDLE)
    page.keyboard.down("Space")
    page.evaluate("() => new Promise(requestAnimationFrame).then(give)")
    page.wait_for_function("() => starts === 2")
    assert page.evaluate("order.slice(0, 4)") == ["start", "piece", "end", "start"]
    page.close()


def test_a_word_has_its_whole_tail_after_a_button_that_was_let_go_twice(browser: BrowserContext, running: Box) -> None:
    page = new_page(browser, running, "pcm")
    page.clock.install()
    page.keyboard.down("Space")
    page.wait_for_selector(TALKING)
    page.clock.pause_at(page.evaluate("Date.now() + 1000"))
    page.keyboard.up("Space")
    page.clock.run_for(100)
    page.keyboard.down("Space")
    page.keyboard.up("Space")
    page.clock.run_for(200)  # 300 ms after the first time, 200 ms after the second
    assert page.query_selector(TALKING)
    page.clock.run_for(100)
    page.wait_for_selector(IDLE)
    page.close()


def test_a_page_that_has_another_token_comes_back_with_that_one_alone(browser: BrowserContext, running: Box) -> None:
    page = new_page(browser, running, "pcm")
    page.click("#open-options")
    page.fill("#token", running.tokens.add("scanner", "talk"))
    page.click("#options .go")
    page.wait_for_selector("#station:has-text('scanner')")
    before = page.evaluate("sockets")
    assert page.evaluate("dispatchEvent(new Event('online')), sockets") == before
    page.close()
