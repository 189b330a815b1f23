"""What the gateway costs: latency to page and broker, sessions that one core sustains, memory and CPU of the silent.

A real daemon held to one core, a real mosquitto, clients that send 20 ms of PCM every 20 ms. A latency begins when the
sample has been sent with which the gate closes: the speech detector's configured silence is no part of it. The same is
measured in a real Chromium's page (``bench_page``). Most of an utterance's work is done within that silence, so the
stages are told apart from it. On a busy machine wall times grow; CPU times and memory do not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import re
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import AudioStreamTrack

from edge_asr import model_store, settings
from edge_asr.audio import FrameCutter, quiet, read_file
from edge_asr.events import SAMPLE_RATE
from edge_asr.inference import SileroDetector
from edge_asr.pipeline import Ear
from edge_asr.process_state import cpu_s, resident_bytes
from tests.bench_page import begin_talk, page_waits
from tests.broker import Broker, arrivals, free_port
from tests.gateway import Box, Client, box, chromium, microphone_file, open_page, recording
from tests.soak import family

PIECE_S = 0.02
PIECE = round(PIECE_S * SAMPLE_RATE) * 2
NAMES = ("02-call-maintenance", "11-stop-press-two", "13-set-conveyor-speed", "20-emergency-stop")
LIMIT_S = 1.0


@dataclass
class Speech:
    """Recordings with a second of quiet behind each, and where the gate closes."""

    pcm: bytes = b""
    closings_s: list[float] = field(default_factory=list)

    def add(self, name: str) -> None:
        pcm = read_file(recording(name)) + quiet(SAMPLE_RATE)
        ear = Ear(SileroDetector(model_store.locate_vad()), settings.Vad())
        for frame in FrameCutter("bench").feed(pcm, 0):
            if ear.feed(frame):
                self.closings_s.append(len(self.pcm) / 2 / SAMPLE_RATE + frame.end / SAMPLE_RATE)
        self.pcm += pcm


def spoken(order: Sequence[str]) -> Speech:
    speech = Speech()
    for name in order:
        speech.add(name)
    return speech


@dataclass(frozen=True)
class Heard:
    """One utterance: its id, when the gate closed behind it, and when its text was there (monotonic seconds)."""

    ident: str
    closed: float
    at: float


async def stream(client: Client, speech: Speech) -> list[Heard]:
    """Speak in real time."""
    await client.until("ready")
    await client.send(type="start", talk=1)
    began = time.monotonic()
    arrived: list[tuple[str, float]] = []

    async def listen() -> None:
        while True:
            event = await client.until("transcript")
            arrived.append((event["utterance_id"], time.monotonic()))

    listening = asyncio.create_task(listen(), name="listen")
    for number, offset in enumerate(range(0, len(speech.pcm), PIECE)):
        await asyncio.sleep(max(0.0, began + (number + 1) * PIECE_S - time.monotonic()))
        await client.socket.send_bytes((offset // 2).to_bytes(4, "little") + speech.pcm[offset : offset + PIECE])
    await asyncio.sleep(3 * LIMIT_S)
    listening.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await listening
    pairs = zip(arrived, speech.closings_s, strict=False)
    return [Heard(ident, began + closed_s, at) for (ident, at), closed_s in pairs]


async def sessions(running: Box, count: int, rounds: int) -> list[Heard]:
    """So many stations speak without a pause, each another sentence first."""
    async with contextlib.AsyncExitStack() as stack:
        talks = []
        for number in range(count):
            client = await stack.enter_async_context(running.client())
            order = list(itertools.islice(itertools.cycle(NAMES), number, number + rounds))
            talks.append(stream(client, spoken(order)))
        return [heard for found in await asyncio.gather(*talks) for heard in found]


def quantiles_ms(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    p95 = ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]
    return {"p50_ms": round(1000 * statistics.median(ordered)), "p95_ms": round(1000 * p95), "count": len(ordered)}


def resident_mb(pid: int) -> float:
    return resident_bytes(pid) / 2**20


def hold(pid: int, cores: set[int]) -> None:
    """Hold a process and all that come from it to cores: the recognizer is a grandchild, a thread goes by itself."""
    for each in family(pid):
        for task in Path(f"/proc/{each}/task").iterdir():
            os.sched_setaffinity(int(task.name), cores)


async def silent(running: Box, count: int, seconds: float) -> dict[str, float]:
    """What sessions cost that are open, and that send silence."""
    pid = running.process.pid
    async with contextlib.AsyncExitStack() as stack:
        before_mb = resident_mb(pid)
        clients = [await stack.enter_async_context(running.client()) for _ in range(count)]
        reading = [asyncio.create_task(read_on(client), name="read") for client in clients]
        await asyncio.sleep(2.0)
        idle_mb = (resident_mb(pid) - before_mb) / count
        began_s, used_s = time.monotonic(), cpu_s(pid)
        await asyncio.sleep(seconds)
        idle_cpu = (cpu_s(pid) - used_s) / (time.monotonic() - began_s) / count
        speech = Speech(pcm=bytes(round(seconds * SAMPLE_RATE) * 2))
        began_s, used_s = time.monotonic(), cpu_s(pid)
        talking = [stream_silence(client, speech.pcm) for client in clients]
        await asyncio.gather(*talking)
        silent_cpu = (cpu_s(pid) - used_s) / (time.monotonic() - began_s) / count
        silent_mb = (resident_mb(pid) - before_mb) / count
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
    return {
        "sessions": count,
        "idle_mb": round(idle_mb, 2),
        "idle_cpu_percent": round(100 * idle_cpu, 3),
        "sending_silence_mb": round(silent_mb, 2),
        "sending_silence_cpu_percent": round(100 * silent_cpu, 2),
    }


async def calls(running: Box, count: int, seconds: float, alone: float) -> dict[str, float]:
    """What silent sessions by WebRTC cost beyond the daemon itself: while no talk has begun, and within one."""
    pid = running.process.pid
    before_mb = resident_mb(pid)
    bearer = {"Authorization": f"Bearer {running.token}"}
    async with running.http() as http, contextlib.AsyncExitStack() as stack:
        channels = []
        for _ in range(count):
            peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
            stack.push_async_callback(peer.close)
            peer.addTransceiver(AudioStreamTrack(), "sendonly")
            channel, opened = peer.createDataChannel("events"), asyncio.Event()
            channel.on("open", opened.set)
            await peer.setLocalDescription(await peer.createOffer())
            offer = peer.localDescription.sdp.encode()
            headers = {"Content-Type": "application/sdp", **bearer}
            answer = await http.post(f"{running.url}/whip", data=offer, headers=headers)
            await peer.setRemoteDescription(RTCSessionDescription(await answer.text(), "answer"))
            await opened.wait()
            channels.append(channel)
        await asyncio.sleep(2.0)
        open_mb = (resident_mb(pid) - before_mb) / count
        waiting = await asyncio.to_thread(cpu_share, pid, seconds) - alone
        for channel in channels:
            channel.send(json.dumps({"type": "start", "talk": 1}))
        talking = await asyncio.to_thread(cpu_share, pid, seconds) - alone
    return {
        "sessions": count,
        "mb": round(open_mb, 2),
        "cpu_percent": round(100 * waiting / count, 2),
        "talking_cpu_percent": round(100 * talking / count, 2),
    }


def silent_pages(running: Box, folder: Path, seconds: float, alone: float) -> dict[str, float]:
    """What one page of a real Chromium costs beyond the daemon itself, within a talk in which nobody speaks.

    Python's calls send a packet each 20 ms whatever the answer wishes; a browser sends what it is asked for.
    """
    pid = running.process.pid
    found = {}
    for way, name in (("auto", "webrtc"), ("pcm", "websocket")):
        with chromium(running, microphone_file(folder)) as browser:
            page, _ = open_page(browser, running, way=way, mode="toggle")
            begin_talk(page, way)
            found[f"{name}_cpu_percent"] = round(100 * (cpu_share(pid, seconds) - alone), 2)
    return found


def cpu_share(pid: int, seconds: float) -> float:
    began_s, used_s = time.monotonic(), cpu_s(pid)
    time.sleep(seconds)
    return (cpu_s(pid) - used_s) / (time.monotonic() - began_s)


def stages(port: int) -> dict[str, tuple[float, float]]:
    """Stage -> (seconds, utterances) since the daemon began."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    found = re.findall(r'^edge_asr_stage_seconds_(sum|count)\{stage="(\w+)"\} (\S+)$', text, re.MULTILINE)
    values = {(stage, kind): float(value) for kind, stage, value in found}
    return {stage: (values[stage, "sum"], values[stage, "count"]) for _, stage, _ in found}


def means_ms(before: dict[str, tuple[float, float]], after: dict[str, tuple[float, float]]) -> dict[str, float]:
    """What an utterance spent in each stage in between."""
    spent = {}
    for stage in ("wait", "recognize", "interpret", "commit"):
        (sum_0, count_0), (sum_1, count_1) = before[stage], after[stage]
        spent[stage] = round(1000 * (sum_1 - sum_0) / max(1.0, count_1 - count_0), 1)
    return spent


async def read_on(client: Client) -> None:
    """Answer pings, and forget what comes."""
    while True:
        await client.socket.receive()


async def stream_silence(client: Client, pcm: bytes) -> None:
    await client.send(type="start", talk=1)
    began = time.monotonic()
    for number, offset in enumerate(range(0, len(pcm), 2 * PIECE)):  # 40 ms
        await asyncio.sleep(max(0.0, began + (number + 1) * 2 * PIECE_S - time.monotonic()))
        await client.socket.send_bytes((offset // 2).to_bytes(4, "little") + pcm[offset : offset + 2 * PIECE])


def sustained(running: Box, most: int, rounds: int) -> dict[str, Any]:
    """The most sessions that speak without a pause with a p95 of at most a second: doubled, then halved in between."""
    steps: list[dict[str, float]] = []
    good, bad = 0, most + 1
    while bad - good > 1:
        count = min(most, max(2, 2 * good)) if bad > most else (good + bad) // 2
        heard = asyncio.run(sessions(running, count, rounds))
        steps.append({"sessions": count, **quantiles_ms([each.at - each.closed for each in heard])})
        print(steps[-1], flush=True)
        within = steps[-1]["p95_ms"] <= 1000 * LIMIT_S and steps[-1]["count"] == count * rounds
        good, bad = (count, bad) if within else (good, count)
    return {"sessions": good, "at_most_tried": most, "steps": steps}


def pages(running: Box, folder: Path, arrived: dict[str, float], rounds: int) -> dict[str, Any]:
    """The latency as a worker sees it: on the page in a real Chromium, by WebRTC and by WebSocket."""
    names = list(itertools.islice(itertools.cycle(NAMES), rounds))
    wall_s = time.time() - time.monotonic()
    found = {}
    for way, name in (("auto", "webrtc"), ("pcm", "websocket")):
        to_page, to_subscriber = page_waits(running, folder, way, names, arrived, wall_s)
        found[name] = {"to_page": quantiles_ms(to_page), "to_subscriber": quantiles_ms(to_subscriber)}
        print(name, found[name], flush=True)
    return found


def spoken_once(running: Box, arrived: dict[str, float], port: int, rounds: int) -> dict[str, Any]:
    """The latency of one session, to its client and to the subscriber, and where it comes from."""
    before = stages(port)
    heard = asyncio.run(sessions(running, 1, rounds))
    known = [arrived[each.ident] - each.closed for each in heard if each.ident in arrived]
    found = {
        "to_page": quantiles_ms([each.at - each.closed for each in heard]),
        "to_subscriber": quantiles_ms(known),
        "stages_mean_ms": means_ms(before, stages(port)),
    }
    print(found, flush=True)
    return found


def silence(running: Box, folder: Path) -> dict[str, Any]:
    """What those cost who say nothing: 32 by WebSocket, 8 by WebRTC and one, and a page alone."""
    alone = cpu_share(running.process.pid, 10.0)
    found: dict[str, Any] = {
        "daemon_alone_cpu_percent": round(100 * alone, 2),
        "one_call": asyncio.run(calls(running, 1, 8.0, alone)),
        "one_page": silent_pages(running, folder, 10.0, alone),
        "calls": asyncio.run(calls(running, 8, 8.0, alone)),
        "silent": asyncio.run(silent(running, 32, 8.0)),
    }
    print(found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/bench gateway", description=__doc__)
    parser.add_argument("--rounds", type=int, default=12, help="utterances of a session")
    parser.add_argument("--most", type=int, default=32, help="sessions to try at most")
    parser.add_argument("--silent-only", action="store_true", help="measure only what those cost who say nothing")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    limits: dict[str, Any] = {"max_sessions": 1000, "max_sessions_per_token": 1000, "max_sessions_per_address": 1000}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        port = free_port()
        with (
            Broker(folder) as broker,
            box(folder, broker, monitoring=port, **limits) as running,
            arrivals(broker) as arrived,
        ):
            # The clients get what is left, so that they are not what is measured.
            others = os.sched_getaffinity(0) - {0} or {0}
            os.sched_setaffinity(0, others)
            hold(running.process.pid, {0})
            asyncio.run(sessions(running, 1, 2))  # everything is loaded
            figures: dict[str, Any] = {
                "machine": {"load": os.getloadavg()[0], "cores": os.cpu_count(), "held_to_cores": 1}
            }
            if not arguments.silent_only:
                figures.update(spoken_once(running, arrived, port, arguments.rounds))
            figures.update(silence(running, folder))
            if not arguments.silent_only:
                figures["page"] = pages(running, folder, arrived, arguments.rounds)
                figures["sustained"] = sustained(running, arguments.most, max(4, arguments.rounds // 2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
