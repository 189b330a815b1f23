"""What the box costs and whether it grows: the figures of docs/operations.md, and a short form for the tests."""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from edge_asr import clock, model_store, settings
from edge_asr.audio import FrameCutter, read_file
from edge_asr.events import SAMPLE_RATE, Utterance, new_id
from edge_asr.health import resident_bytes
from edge_asr.inference import SileroDetector
from edge_asr.pipeline import Ear
from edge_asr.worker import Worker
from tests.soundcard import sound_card

SHORT_BYTES = 2 * SAMPLE_RATE * 6 // 10
"""0.6 s: the shortest order."""

WARM = 50
"""Utterances after which the memory in use is the base line."""


def recordings() -> list[bytes]:
    return [read_file(path) for path in sorted(model_store.bundled("recordings").glob("*.flac"))]


def short_utterances(count: int) -> Iterator[Utterance]:
    """Pieces of the recordings, all different places and lengths."""
    for number, pcm in enumerate(islice(cycle(recordings()), count)):
        start = 2 * (number * 997 % max(1, (len(pcm) - SHORT_BYTES) // 2))
        piece = pcm[start : start + SHORT_BYTES + 64 * (number % 300)]
        yield Utterance(id=new_id(), source="soak", start=0, pcm=piece, ended_ns=clock.boottime_ns())


def long_speech(seconds: float) -> Iterator[Utterance]:
    """Speech without a pause, as the gate cuts it."""
    ear, cutter = Ear(SileroDetector(model_store.locate_vad()), settings.Vad()), FrameCutter("soak")
    voices = b"".join(pcm for pcm in recordings() if len(pcm) > SHORT_BYTES)
    pcm = (voices * (1 + int(2 * SAMPLE_RATE * seconds) // len(voices)))[: int(2 * SAMPLE_RATE * seconds)]
    for frame in cutter.feed(pcm, clock.boottime_ns()):
        yield from ear.feed(replace(frame, captured_ns=clock.boottime_ns()))
    yield from ear.flush()


def growth(worker: Worker, utterances: Iterator[Utterance], warm: int = WARM) -> dict[str, float]:
    """Megabytes of the worker after the first ``warm`` utterances, at most and at the end, and how many there were."""
    sizes = []
    for utterance in utterances:
        worker.understand(utterance, final=True)
        sizes.append(resident_bytes(worker.pid) / 2**20)
    base = sizes[min(warm, len(sizes)) - 1]
    return {
        "utterances": len(sizes),
        "base_mb": round(base, 1),
        "most_mb": round(max(sizes), 1),
        "end_mb": round(sizes[-1], 1),
        "replaced": worker.replaced,
    }


def proportional_mb(pid: int) -> float:
    """Memory of a process, shared pages divided among those who share them."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) / 1024


def family(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    return [pid, *(each for child in children for each in family(int(child)))]


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def service(model: str | None, idle_s: float) -> dict[str, float]:
    """Start to READY=1, memory and CPU of the daemon before a silent microphone."""
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as folder,
        sound_card() as card,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
    ):
        manager.bind(f"{folder}/notify")
        manager.settimeout(60)
        changes = [f"state_dir={folder}/state", "sources=[{type: microphone}]", "log.level=error"]
        changes += [f"model.name={model}"] if model else []
        command = [sys.executable, "-m", "edge_asr.cli", "run", *(part for each in changes for part in ("--set", each))]
        variables = {**os.environ, **card.environment, "NOTIFY_SOCKET": f"{folder}/notify"}
        began = time.monotonic()
        with subprocess.Popen(command, env=variables) as daemon:
            while b"READY=1" not in manager.recv(4096):
                pass
            ready_s = time.monotonic() - began
            manager.close()
            time.sleep(5)  # the microphone opens, the first probe is over
            pids = family(daemon.pid)
            before, since = sum(map(cpu_s, pids)), time.monotonic()
            time.sleep(idle_s)
            idle = (sum(map(cpu_s, pids)) - before) / (time.monotonic() - since)
            memory = sum(map(proportional_mb, pids))
            daemon.terminate()
        return {"ready_s": round(ready_s, 2), "memory_mb": round(memory), "idle_cpu_percent": round(100 * idle, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/soak")
    parser.add_argument("--utterances", type=int, default=10_000)
    parser.add_argument("--speech-s", type=float, default=300.0)
    parser.add_argument("--idle-s", type=float, default=60.0)
    parser.add_argument("--model")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"machine": platform.machine(), "service": service(arguments.model, arguments.idle_s)}
    options = settings.Settings(model=settings.Model(name=arguments.model))
    with closing(Worker(options)) as worker:
        found["model"] = worker.name
        found["long_speech"] = growth(worker, long_speech(arguments.speech_s), warm=2)
        found["short_utterances"] = growth(worker, short_utterances(arguments.utterances))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
