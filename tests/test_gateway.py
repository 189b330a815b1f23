"""The gateway as stations know it: a real daemon, real TLS, a plain client, a real browser, a real broker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_asr.audio import read_file
from tests.broker import Broker, Subscriber
from tests.gateway import Box, box, chromium, microphone_file, open_page, recording, run, transcribed

STOP = recording("20-emergency-stop")


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
