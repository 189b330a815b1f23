"""A browser talks by WebRTC over a link that is cut in the middle of a sentence, and comes back without UDP.

A program of its own, for it isolates itself: the gateway is at the far end of a tunnel in network namespaces that
vanish with the process. Prints what came of it.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

from tests.faults.link import Link, isolated
from tests.gateway import box, chromium, microphone_file, open_page, wait_for_pause, wait_for_speech

CUT_S = 12.0
"""Longer than either side waits for a peer that says nothing: both must notice, and meet again."""


def scenario(folder: Path) -> object:
    with (
        Link(random.Random(1)) as link,  # noqa: S311
        box(folder, prefix=link.prefix, address=link.device_side, host="0.0.0.0") as running,  # noqa: S104
    ):
        with chromium(running, microphone_file(folder, "11-stop-press-two"), again=True) as browser:
            page, _ = open_page(browser, running, way="auto")
            page.keyboard.press("Space")  # asks for the microphone, and calls
            page.wait_for_selector("#talk[data-call=connected][data-state=idle]")
            wait_for_pause(page)
            page.keyboard.down("Space")
            wait_for_speech(page)
            (session,) = running.board()["sessions"]
            link.weather.there = link.weather.back = link.weather.udp = False
            wait_for_pause(page)
            page.keyboard.up("Space")
            page.wait_for_selector("#gateway-state:not([data-state=on])", timeout=60_000)
            shown = page.inner_text("#live")
            time.sleep(CUT_S / 4)
            link.weather.there = link.weather.back = True
            page.wait_for_selector("#history li:not([data-kind=transcript])", timeout=60_000)
            said = page.locator("#history .said").all_inner_texts()
            kinds = page.evaluate("[...document.querySelectorAll('#history li')].map(line => line.dataset.kind)")
        log = running.log
    sessions = log.count("session opened")
    return {"said": said, "kinds": kinds, "shown": shown, "way": session["format"], "sessions": sessions}


if __name__ == "__main__":
    isolated(scenario)
