"""How long a real Chromium's page waits for the text of what was said into its microphone, by WebRTC and by WebSocket.

The page's own microphone is watched beside it: when the last loud sample of each sentence was captured. How long after
it the gate closes is known from the recording, so a latency begins where the clients of ``bench_gateway`` begin it,
with the sample that closes the gate, and ends when the line stands in the page's history. Accurate to a frame of the
speech detector, 32 ms.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from playwright.sync_api import Page

from edge_asr import model_store, settings
from edge_asr.audio import FrameCutter, quiet, read_file
from edge_asr.events import SAMPLE_RATE
from edge_asr.inference import SileroDetector
from edge_asr.pipeline import Ear
from tests.gateway import Box, chromium, microphone_file, open_page, recording

LOUD = 0.03
PAUSE_S = 0.8
"""Between two sentences at least, and in none of them."""

WATCHER = """
// The microphone and the history, looked at from beside.
const media = navigator.mediaDevices, open = media.getUserMedia.bind(media);
window.loud = [];   // wall clock (ms) of every block in which somebody spoke
window.told = [];   // (utterance, wall clock) of every line of the history
media.getUserMedia = async (wish) => {
  const stream = await open({ ...wish, audio: { ...wish.audio, autoGainControl: false } });
  const context = new AudioContext({ sampleRate: 48000 });
  const code = `registerProcessor("ear", class extends AudioWorkletProcessor {
    process([[samples]]) {
      if (samples && samples.some((each) => Math.abs(each) > LOUD)) this.port.postMessage(0);
      return true;
    } })`;
  await context.audioWorklet.addModule("data:text/javascript," + encodeURIComponent(code));
  const ear = new AudioWorkletNode(context, "ear", { numberOfOutputs: 0 });
  ear.port.onmessage = () => loud.push(performance.timeOrigin + performance.now());
  context.createMediaStreamSource(stream).connect(ear);
  return stream;
};
document.addEventListener("DOMContentLoaded", () => new MutationObserver((changes) => {
  for (const { addedNodes } of changes) for (const line of addedNodes) {
    const now = performance.timeOrigin + performance.now();
    if (line.tagName === "LI") queueMicrotask(() => told.push([line.event.utterance_id, now]));
  }
}).observe(document.getElementById("history"), { childList: true }));
""".replace("LOUD", str(LOUD))


def closing_after_s(name: str) -> float:
    """How long after its last loud sample the gate closes behind a recording."""
    pcm = read_file(recording(name)) + quiet(SAMPLE_RATE)
    ear = Ear(SileroDetector(model_store.locate_vad()), settings.Vad())
    closed = [frame.end for frame in FrameCutter("bench").feed(pcm, 0) if ear.feed(frame)]
    (loudest,) = np.flatnonzero(np.abs(np.frombuffer(pcm, "<i2")) > LOUD * 32768)[-1:]
    return float(closed[-1] - loudest) / SAMPLE_RATE


def last_loud_s(blocks_ms: Sequence[float]) -> list[float]:
    """The end of each sentence, on the wall clock."""
    ends = [one for one, two in zip(blocks_ms, [*blocks_ms[1:], np.inf], strict=True) if two - one > 1e3 * PAUSE_S]
    return [end / 1e3 for end in ends]


def begin_talk(page: Page, way: str) -> None:
    """Press the button (mode ``toggle``); by WebRTC the first talk, which goes by the WebSocket, is over before."""
    page.keyboard.press("Space")
    page.wait_for_selector("#talk[data-state=talking]")
    if way == "auto":
        page.wait_for_selector("#talk[data-call=connected]")
        page.keyboard.press("Space")
        page.wait_for_selector("#talk:not([data-state=talking])")
        page.keyboard.press("Space")
        page.wait_for_selector("#talk[data-state=talking]")


def page_waits(
    running: Box, folder: Path, way: str, names: Sequence[str], published: Mapping[str, float], wall_s: float
) -> tuple[list[float], list[float]]:
    """Seconds from the gate's closing to the page and to the subscriber, a pair per sentence.

    ``published``: when an utterance's transcript came from the broker, on a clock that ``wall_s`` makes the wall's.
    Raises RuntimeError where sentences were not understood one by one.
    """
    with chromium(running, microphone_file(folder, *names), bypass_csp=True) as browser:
        browser.add_init_script(WATCHER)
        page, _ = open_page(browser, running, way=way, mode="toggle")
        begin_talk(page, way)
        page.wait_for_function(f"() => told.length >= {len(names)}", timeout=20_000 + 10_000 * len(names))
        time.sleep(1.0)  # the subscriber's share
        loud, told = json.loads(page.evaluate("JSON.stringify([loud, told])"))
    ends = last_loud_s(loud)
    if not len(ends) == len(told) == len(names):
        raise RuntimeError(f"{way}: {len(names)} sentences, {len(ends)} heard in the page, {len(told)} lines")
    closed = [end + closing_after_s(name) for end, name in zip(ends, names, strict=True)]
    to_page = [at / 1e3 - then for (_, at), then in zip(told, closed, strict=True)]
    to_subscriber = [
        published[ident] + wall_s - then for (ident, _), then in zip(told, closed, strict=True) if ident in published
    ]
    return to_page, to_subscriber
