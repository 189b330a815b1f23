"""The device under test: a real outbox and publisher under load, writing down what ``append`` returned.

    python -m tests.faults.device < orders     # one JSON object a line: start and print its pid
                                               # ``kill PID``: end it and print its exit status

One process that has imported everything forks a fresh device for every order, so that lives can be short and many.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from edge_asr import clock, contract
from edge_asr.contract import Renderer
from edge_asr.events import Command, Draft, Message, Token, Transcript, Utterance, new_id
from edge_asr.outbox import Outbox, OutboxError
from edge_asr.publisher import Publisher
from edge_asr.reserve import BALLAST_BYTES
from edge_asr.settings import Mqtt

ROOT = "acme/hall-2/voice/edge01"
HEARD = Transcript("stop line three", "en", "NEUTRAL", "Speech", 0.9, (Token("stop", 0.4),))

UNUSABLE = 3
"""Exit status after an OutboxError on opening."""


@dataclass(frozen=True)
class Orders:
    """What a device is to do."""

    outbox: str
    journal: str
    """Gets a line ``seq id category expires_ns`` after every commit."""
    hush: str
    """The device speaks until a file of this name exists."""
    port: int
    host: str = "127.0.0.1"
    speakers: int = 4
    pause_s: float = 0.01
    """Between two sentences of one speaker."""
    command_life_s: float = 4.0
    text_bytes: int = 100
    max_bytes: int = 200_000_000
    ballast_bytes: int = BALLAST_BYTES


def spoken() -> Utterance:
    """An utterance that ends now."""
    return Utterance(new_id(), "microphone", 0, bytes(32_000), clock.boottime_ns())


def transcript_draft(text_bytes: int) -> Draft:
    """What is most of the load."""
    heard = Transcript("x" * text_bytes, "en", "NEUTRAL", "Speech", 0.9, (Token("x", 0.4),))
    return contract.transcript_draft(spoken(), heard, model="micro-en")


def command_draft(life_s: float) -> Draft:
    """What must not come late."""
    said = Command("stop", {"line": 3}, 0.93, "normal", life_s)
    return contract.command_draft(spoken(), HEARD, said, model="micro-en")


def _note(journal: int, messages: tuple[Message, ...]) -> None:
    """One write, which SIGKILL cannot divide."""
    lines = (f"{m.seq} {m.id} {m.category} {m.expires_ns or 0}\n" for m in messages)
    os.write(journal, "".join(lines).encode())


async def _speak(orders: Orders, outbox: Outbox, journal: int) -> None:
    said = 0
    hush = Path(orders.hush)
    while not hush.exists():  # noqa: ASYNC240 - a name looked up, nothing read
        said += 1
        drafts = [transcript_draft(orders.text_bytes)]
        if said % 4 == 0:
            drafts.append(command_draft(orders.command_life_s))
        with contextlib.suppress(OutboxError):  # a full disk; what was refused was not promised
            _note(journal, await outbox.append(*drafts))
        await asyncio.sleep(orders.pause_s)


async def _live(orders: Orders) -> None:
    journal = os.open(orders.journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    mqtt = Mqtt.model_validate({"host": orders.host, "port": orders.port, "max_retry_s": 1, "keepalive_s": 5})
    with closing(Outbox(Path(orders.outbox), orders.max_bytes, ballast_bytes=orders.ballast_bytes)) as outbox:
        speakers = (_speak(orders, outbox, journal) for _ in range(orders.speakers))
        await asyncio.gather(Publisher(mqtt, Renderer(ROOT, "edge01"), outbox).run(), *speakers)


def _fork(orders: Orders) -> int:
    pid = os.fork()
    if pid:
        return pid
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.close(sys.stdin.fileno())
    try:
        asyncio.run(_live(orders))
    except OutboxError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(UNUSABLE)
    except BaseException as error:  # noqa: BLE001 - whatever it is, this process ends here and says why
        print(repr(error), file=sys.stderr, flush=True)
    os._exit(1)


def _kill(pid: int) -> int:
    """Its exit status, negative for a signal; one that had ended by itself keeps its own."""
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> None:
    """Serve orders until standard input ends; living devices end with it."""
    pids: set[int] = set()

    def leave(_signal: int, _frame: FrameType | None) -> NoReturn:
        sys.exit()

    signal.signal(signal.SIGTERM, leave)
    print("ready", flush=True)
    try:
        while line := sys.stdin.readline():
            if line.startswith("kill "):
                pid = int(line.split()[1])
                pids.remove(pid)
                print(_kill(pid), flush=True)
            else:
                pid = _fork(Orders(**json.loads(line)))
                pids.add(pid)
                print(pid, flush=True)
    finally:
        for pid in pids:
            _kill(pid)


if __name__ == "__main__":
    main()
