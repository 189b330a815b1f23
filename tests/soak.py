"""What the box costs and whether it grows: the figures of docs/operations.md, and a short form for the tests."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

from edge_asr import clock, model_store, settings
from edge_asr.audio import FrameCutter, read_file
from edge_asr.events import SAMPLE_RATE, Utterance, new_id
from edge_asr.health import resident_bytes
from edge_asr.inference import SileroDetector
from edge_asr.pipeline import Ear
from edge_asr.worker import Worker
from tests.broker import free_port
from tests.soundcard import sound_card

SHORT_BYTES = 2 * SAMPLE_RATE * 6 // 10
"""0.6 s: the shortest order."""

LIBPULSE = "threaded-ml"
"""The thread in which libpulse talks to the sound server; a sound card of one's own has none."""

OTHER: Literal["zh"] = "zh"
"""The site's language with a model of one's own: random weights do not say the golden text, which is English."""

WARM = 50
"""Utterances after which the memory in use is the base line."""

LAST_LINES = 20
"""Of the log of a daemon that does not start."""

DRIFT_LIMITS_MB = {"long_speech": 8.0, "short_utterances": 4.0}
"""Of 300 s without a pause, where 170 kB lost with each of 95 pieces would be 8 MB and half a MB was seen; of 10,000
orders, where 1 kB lost with each of them is 5 MB."""


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


def growth(
    worker: Worker, utterances: Iterator[Utterance], warm: int = WARM, limit_s: float = math.inf
) -> dict[str, float]:
    """Megabytes of the worker after the first ``warm`` utterances, at most and at the end, and how many there were."""
    sizes, began = [], time.monotonic()
    for utterance in utterances:
        if time.monotonic() - began > limit_s:
            break
        worker.understand(utterance, final=True)
        sizes.append(resident_bytes(worker.pid) / 2**20)
    base = sizes[min(warm, len(sizes)) - 1]
    return {
        "utterances": len(sizes),
        "took_s": round(time.monotonic() - began, 1),
        "base_mb": round(base, 1),
        "most_mb": round(max(sizes), 1),
        "end_mb": round(sizes[-1], 1),
        "drift_mb": round(drift_mb(sizes), 2),
        "replaced": worker.replaced,
    }


def drift_mb(sizes: list[float]) -> float:
    """The last quarter's median over the second quarter's: what is left of growth once every size has been seen."""
    quarter = max(1, len(sizes) // 4)
    return statistics.median(sizes[-quarter:]) - statistics.median(sizes[quarter : 2 * quarter] or sizes)


def memory_mb(pids: list[int]) -> dict[str, float]:
    """Memory of processes that were forked from one another, in two ways and for the largest of them alone.

    ``memory_mb`` is what they would cost alone on a box: what is anonymous, shared pages divided among those who share
    them, and of each mapped file the pages that the one of them has that uses most of it. ``memory_mb_proportional`` is
    the kernel's PSS, which is less where others (we, for one) use the same libraries.
    """
    anonymous, proportional, largest, files = 0, 0, 0, Counter[str]()
    for pid in pids:
        rollup = _kilobytes(Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8"))
        anonymous += rollup["Pss_Anon"]
        proportional += rollup["Pss"]
        largest = max(largest, rollup["Rss"])
        for name, kilobytes in _of_files(Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8")).items():
            files[name] = max(files[name], kilobytes)
    found = {
        "memory_mb": anonymous + files.total(),
        "memory_mb_proportional": proportional,
        "memory_mb_largest_process": largest,
    }
    return {name: round(kilobytes / 1024, 1) for name, kilobytes in found.items()}


def _kilobytes(lines: str) -> dict[str, int]:
    fields = (line.split() for line in lines.splitlines())
    return {parts[0].rstrip(":"): int(parts[1]) for parts in fields if parts[-1] == "kB"}


def _of_files(smaps: str) -> Counter[str]:
    """File -> kilobytes of it in memory, pages that were changed left out."""
    found: Counter[str] = Counter()
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", smaps, flags=re.MULTILINE)[1:]:
        head, _, rest = mapping.partition("\n")
        name, sizes = head.partition("/")[2], _kilobytes(rest)
        if name:
            found[name] += sizes["Rss"] - sizes["Anonymous"]
    return found


def family(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    return [pid, *(each for child in children for each in family(int(child)))]


def effort(pids: list[int]) -> dict[str, dict[str, float]]:
    """CPU time and times woken so far of each thread, those of one name together."""
    found: dict[str, dict[str, float]] = {}
    for task in (each for pid in pids for each in Path(f"/proc/{pid}/task").iterdir()):
        status = dict(line.split(":\t", 1) for line in (task / "status").read_text(encoding="utf-8").splitlines())
        so_far = found.setdefault(status["Name"], {"cpu_s": 0.0, "woken": 0.0})
        so_far["cpu_s"] += int((task / "schedstat").read_text(encoding="ascii").split()[0]) / clock.NS_PER_S
        so_far["woken"] += int(status["voluntary_ctxt_switches"])
    return found


def idle(pids: list[int], seconds: float) -> dict[str, float]:
    """What processes cost while nothing happens, by thread name."""
    before, since = effort(pids), time.monotonic()
    time.sleep(seconds)
    after, took_s = effort(pids), time.monotonic() - since
    spent_s = {name: each["cpu_s"] - before.get(name, each)["cpu_s"] for name, each in after.items()}
    woken = sum(each["woken"] - before.get(name, each)["woken"] for name, each in after.items() if name != LIBPULSE)
    return {
        "idle_cpu_percent": round(100 * sum(spent_s.values()) / took_s, 2),
        "idle_cpu_percent_of_libpulse": round(100 * spent_s.get(LIBPULSE, 0.0) / took_s, 2),
        "idle_wakeups_per_s": round(woken / took_s, 1),
    }


def compiled(folder: Path) -> dict[str, str]:
    """Variables under which Python finds its byte code, as it does where the package's installation has compiled it.

    Without it every start compiles 800 modules, which takes four times as long and leaves its holes in the heap.
    """
    variables = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder / "byte-code")}
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    subprocess.run(
        [sys.executable, "-c", "import edge_asr.cli, edge_asr.daemon, sounddevice"], env=variables, check=True
    )
    return variables


def service(model: str | None, idle_s: float, *, gateway: bool = False) -> dict[str, float]:
    """Start to READY=1, memory and CPU of the daemon before a silent microphone."""
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as folder,
        sound_card() as card,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
    ):
        manager.bind(f"{folder}/notify")
        changes = [f"state_dir={folder}/state", "sources=[{type: microphone}]", "log.level=error"]
        changes += ["model.optimized=false"]  # else the worker makes way for a faster one while it is measured
        changes += [f"model.name={model}", f"model.languages=[{OTHER}]"] if model else []
        changes += ["gateway.open=true", "gateway.tls=false", f"gateway.port={free_port()}"] if gateway else []
        command = [sys.executable, "-m", "edge_asr.cli", "run", *(part for each in changes for part in ("--set", each))]
        variables = {**compiled(Path(folder)), **card.environment, "NOTIFY_SOCKET": f"{folder}/notify"}
        began = time.monotonic()
        with started(command, variables, Path(folder) / "log") as daemon:
            await_ready(daemon, manager, Path(folder) / "log")
            ready_s = time.monotonic() - began
            ready_cpu_s = sum(each["cpu_s"] for each in effort(family(daemon.pid)).values())
            threading.Thread(target=_listen, args=[manager], daemon=True).start()
            time.sleep(5)  # the microphone opens, the first probe is over
            pids = family(daemon.pid)
            quiet = idle(pids, idle_s)
            memory = memory_mb(pids)
        ready = {"ready_s": round(ready_s, 2), "ready_cpu_s": round(ready_cpu_s, 2)}
        return {**ready, **memory, **quiet}


@contextmanager
def started(command: list[str], variables: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is told to end in any case."""
    with log.open("wb") as errors, subprocess.Popen(command, env=variables, stderr=errors) as process:
        try:
            yield process
        finally:
            process.terminate()


def await_ready(daemon: subprocess.Popen[bytes], manager: socket.socket, log: Path, limit_s: float = 60.0) -> None:
    """Return when the daemon says READY=1; one that ends or takes too long is an error with its last lines."""
    manager.settimeout(0.1)
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and daemon.poll() is None:
        with suppress(TimeoutError):
            if b"READY=1" in manager.recv(4096):
                return
    how = f"is not ready after {limit_s:g} s" if daemon.poll() is None else f"ended with {daemon.poll()}"
    last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
    raise SystemExit("\n".join([f"edge-asr run {how}", *last]))


def _listen(manager: socket.socket) -> None:
    """Take what a manager is told, or the daemon would complain in the log."""
    with suppress(OSError):
        while True:
            manager.settimeout(None)
            manager.recv(4096)


def grown_too_much(found: dict[str, Any]) -> str:
    """What makes a run fail; empty: nothing."""
    grown = {what: found[what]["drift_mb"] for what in DRIFT_LIMITS_MB}
    beyond = [f"{grown[what]} MB in {what}" for what, limit_mb in DRIFT_LIMITS_MB.items() if grown[what] > limit_mb]
    return f"the recognizer grows: {', '.join(beyond)}" if beyond else ""


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/soak")
    parser.add_argument("--utterances", type=int, default=10_000)
    parser.add_argument("--speech-s", type=float, default=300.0)
    parser.add_argument("--idle-s", type=float, default=60.0)
    parser.add_argument("--limit-s", type=float, default=math.inf, help="of the short utterances, however many")
    parser.add_argument("--model")
    parser.add_argument("--gateway", action="store_true", help="with an open gateway that nobody uses")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"machine": platform.machine(), "load": os.getloadavg()[0]}
    found["service"] = service(arguments.model, arguments.idle_s, gateway=arguments.gateway)
    options = settings.Settings(
        model=settings.Model(name=arguments.model, languages=(OTHER,) if arguments.model else ())
    )
    with closing(Worker(options)) as worker:
        found["model"] = worker.name
        found["long_speech"] = growth(worker, long_speech(arguments.speech_s), warm=2)
        found["short_utterances"] = growth(worker, short_utterances(arguments.utterances), limit_s=arguments.limit_s)
    print(json.dumps(found, indent=2))
    grown = grown_too_much(found)
    if grown:
        raise SystemExit(grown)


if __name__ == "__main__":
    main()
