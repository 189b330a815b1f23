"""The main job in a terminal: the daemon, a private broker where none is set, and a subscriber's view of it all.

Everything is the product itself: what is shown has been through the outbox and a real MQTT broker.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from rich.console import Console

from edge_asr import contract, model_store
from edge_asr.broker import HOST, PrivateBroker
from edge_asr.daemon import Daemon
from edge_asr.link import destinations
from edge_asr.settings import FilesSource, Monitoring, Mqtt, Settings
from edge_asr.subscriber import Delivery, Screen, Subscriber

ARRIVAL_LIMIT_S = 10.0
"""The subscriber is given so long for what the broker has already acknowledged."""


async def watch(options: Settings, console: Console) -> None:
    """Run the daemon and show what a subscriber sees, until Ctrl-C or the end of the sources."""
    with contextlib.ExitStack() as stack:
        options = _with_broker(options, stack, console)
        daemon = Daemon(options)
        async with _shown(options, console):
            await daemon.run()


async def play(options: Settings, console: Console) -> bool | None:
    """Play the bundled recordings in real time; whether everything published arrived, None if it was interrupted."""
    with contextlib.ExitStack() as stack:
        state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edge-asr-demo-")))
        recordings = model_store.bundled("recordings")
        source = FilesSource(type="files", name="demo", paths=_recordings(recordings))
        unwatched = Monitoring(port=None)  # the service may be running beside
        options = options.model_copy(update={"state_dir": state, "sources": (source,), "monitoring": unwatched})
        options = _with_broker(options, stack, console)
        daemon = Daemon(options)
        async with _shown(options, console) as received:
            await daemon.run()
            if daemon.stopped:
                console.print("\nStopped before the end.")
                return None
            published = daemon.outbox.last_seq
            arrived = await _arrival(received, published)
    commands = sum(delivery.kind == contract.COMMAND for delivery in received)
    console.print(
        f"\n{arrived} of {published} published messages arrived at the subscriber: "
        f"{len(source.paths)} recordings, {commands} commands.",
        soft_wrap=True,
    )
    return arrived == published > 0


def _with_broker(options: Settings, stack: contextlib.ExitStack, console: Console) -> Settings:
    """The settings with a broker in them."""
    if not destinations(options.mqtt):
        broker = stack.enter_context(PrivateBroker())
        mqtt = Mqtt(host=HOST, port=broker.port, payload=options.mqtt.payload)
        options = options.model_copy(update={"mqtt": mqtt})
    to = destinations(options.mqtt)[0]
    port = "" if to.port == 1883 else f" -p {to.port}"
    command = f"mosquitto_sub -h {to.broker.host}{port} -t '{options.topic_root}/#' -v"
    console.print(f"Subscribe from another terminal:  {command}\n", style="dim", highlight=False, soft_wrap=True)
    return options


@contextlib.asynccontextmanager
async def _shown(options: Settings, console: Console) -> AsyncIterator[list[Delivery]]:
    """Subscribe and print; yields the list of deliveries as it grows."""
    received: list[Delivery] = []
    screen = Screen(console)

    async def show(subscriber: Subscriber) -> None:
        async for delivery in subscriber:
            received.append(delivery)
            screen.show(delivery)

    async with Subscriber(destinations(options.mqtt), f"{options.topic_root}/#") as subscriber:
        shower = asyncio.create_task(show(subscriber), name="screen")
        try:
            yield received
        finally:
            shower.cancel()
            await asyncio.gather(shower, return_exceptions=True)


async def _arrival(received: list[Delivery], published: int) -> int:
    """How many of the sequence numbers 1..published have arrived, after waiting for them."""
    deadline = asyncio.get_running_loop().time() + ARRIVAL_LIMIT_S
    while True:
        arrived = len({delivery.data["seq"] for delivery in received if "seq" in delivery.data})
        if arrived >= published or asyncio.get_running_loop().time() > deadline:
            return arrived
        await asyncio.sleep(0.02)


def _recordings(folder: Path) -> tuple[Path, ...]:
    """The recordings in the order of their manifest."""
    lines = (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(folder / json.loads(line)["audio"] for line in lines if line)
