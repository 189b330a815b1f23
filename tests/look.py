"""Pictures of page and dashboard for people to look at: phone and desktop, light and dark, English and Chinese.

A real gateway, and a real Chromium whose microphone plays two commands, one of which is asked back.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from playwright.sync_api import Page

from edge_asr.audio import quiet, read_file
from edge_asr.events import SAMPLE_RATE
from tests.broker import Broker
from tests.gateway import Box, box, chromium, microphone_file, open_page, recording, run

DEVICES: Final[Mapping[str, dict[str, Any]]] = {
    "phone": {
        "viewport": {"width": 360, "height": 740},
        "has_touch": True,
        "is_mobile": True,
        "device_scale_factor": 2,
    },
    "desktop": {"viewport": {"width": 1280, "height": 800}},
}
LOCALES: Final = ("en-GB", "zh-CN")


def pictures(page: Page, path: Path, *, whole: bool = False) -> None:
    """Two of what is shown now, in light and in dark."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.screenshot(path=path.with_name(f"{path.name}-{scheme}.png"), full_page=whole)


def talking(running: Box, microphone: Path, to: str, context: Mapping[str, Any]) -> None:
    """The page from its opening to the history, and its options."""
    with chromium(running, microphone, again=True, **context) as browser:
        page, _ = open_page(browser, running, mode="toggle")
        pictures(page, Path(f"{to}-1-open"))
        page.click("#talk")
        page.wait_for_selector("#live.partial")
        pictures(page, Path(f"{to}-2-talking"))
        page.wait_for_selector("#question")
        pictures(page, Path(f"{to}-3-question"))
        page.click("#talk")
        page.click("#cancel")
        page.wait_for_selector("#history li[data-kind=rejected]")
        pictures(page, Path(f"{to}-4-history"))
        page.click("#open-options")
        pictures(page, Path(f"{to}-5-options"))


def denied_and_dashboard(running: Box, to: str, context: Mapping[str, Any]) -> None:
    """A page that may not use the microphone; the dashboard while somebody else talks."""
    seen = threading.Event()

    async def talk() -> None:
        async with running.client() as client:
            await client.say(read_file(recording("20-emergency-stop")) + quiet(SAMPLE_RATE))
            await client.until("command")
            await asyncio.to_thread(seen.wait, 60)

    with chromium(running, None, asks=True, **context) as browser:
        page, _ = open_page(browser, running, mode="toggle")
        page.click("#talk")
        page.wait_for_selector("#notice")
        pictures(page, Path(f"{to}-6-denied"))
        with ThreadPoolExecutor(1) as elsewhere:
            talked = elsewhere.submit(run, talk)
            page.goto(f"{running.url}/dashboard#token={running.watch}")
            page.reload()
            page.wait_for_selector("#history li")
            pictures(page, Path(f"{to}-7-dashboard"), whole=True)
            seen.set()
            talked.result()


def cut_off(running: Box, microphone: Path, to: str, context: Mapping[str, Any]) -> None:
    """A page whose box does not answer any more."""
    with chromium(running, microphone, again=True, **context) as browser:
        page, _ = open_page(browser, running, mode="toggle", way="pcm")
        page.click("#talk")
        page.wait_for_selector("#talk[data-state=talking]")
        running.process.send_signal(signal.SIGSTOP)
        try:
            page.wait_for_selector("#gateway-state:not([data-state=on])")
            pictures(page, Path(f"{to}-8-cut-off"))
        finally:
            running.process.send_signal(signal.SIGCONT)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/look", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    room: dict[str, Any] = {"max_sessions_per_token": 64, "max_sessions_per_address": 64}
    with (
        tempfile.TemporaryDirectory(prefix="look-") as name,
        Broker(Path(name)) as broker,
        box(Path(name), broker, **room) as running,
    ):
        microphone = microphone_file(Path(name), "11-stop-press-two", "01-start-line-three")
        for device, shape in DEVICES.items():
            for locale in LOCALES:
                to, context = str(folder / f"{device}-{locale[:2]}"), {**shape, "locale": locale}
                talking(running, microphone, to, context)
                denied_and_dashboard(running, to, context)
                cut_off(running, microphone, to, context)
                print(f"{to}-*.png", flush=True)


if __name__ == "__main__":
    main()
