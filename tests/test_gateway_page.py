"""What happens to the page's microphone and link: two presses at once, a link that is down, an unplugged headset."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import BrowserContext, Page

from tests.gateway import Box, box, chromium, microphone_file

WATCHED = """
window.calls = [];  // by WebRTC
window.contexts = [];
window.captures = 0;
window.streams = [];
window.sockets = 0;
window.starts = 0;  // of talks
window.pieces = 0;
window.gate = Promise.resolve();  // before which nobody gets a microphone
const watch = (name, note) => {
  window[name] = class extends window[name] { constructor(...given) { super(...given); note(this); } };
};
watch("RTCPeerConnection", (peer) => calls.push(peer));
watch("AudioContext", (context) => contexts.push(context));
watch("AudioWorkletNode", () => captures++);
watch("WebSocket", () => sockets++);
const send = WebSocket.prototype.send;
WebSocket.prototype.send = function (message) {
  if (typeof message !== "string") pieces++;
  else if (JSON.parse(message).type === "start") starts++;
  send.call(this, message);
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


def new_page(browser: BrowserContext, running: Box, way: str) -> Page:
    page = browser.new_page()
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
    assert page.evaluate("[captures, streams.length, starts]") == [1, 1, 1]
    page.close()


def test_a_press_wakes_a_microphone_that_a_locked_screen_has_put_to_sleep(
    browser: BrowserContext, running: Box
) -> None:
    page = new_page(browser, running, "pcm")
    page.keyboard.down("Space")
    page.wait_for_selector(TALKING)
    page.keyboard.up("Space")
    page.wait_for_selector(IDLE)
    page.evaluate("contexts[0].suspend()")
    page.keyboard.down("Space")
    page.wait_for_function("() => contexts[0].state === 'running'")
    page.wait_for_selector(TALKING)
    page.close()


def test_who_presses_first_while_the_link_is_down_is_told_so_and_heard_when_it_is_back(
    browser: BrowserContext, running: Box
) -> None:
    page = new_page(browser, running, "pcm")
    page.evaluate("down = true")
    page.keyboard.press("Space")
    page.wait_for_selector("#notice-text:has-text('No connection')")
    assert page.is_visible(IDLE)
    assert page.evaluate("streams.some((stream) => stream.active)") is False
    page.evaluate("down = false")
    page.keyboard.down("Space")
    page.wait_for_function("() => pieces > 5")
    assert page.is_hidden("#notice")
    assert page.evaluate("captures") == 1
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
    assert page.evaluate("contexts.map((context) => context.state)") == ["closed", "running"]
    assert page.is_hidden("#notice")
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
