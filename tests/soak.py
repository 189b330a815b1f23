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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import cycle
from pathlib import Path
from typing import Any, Literal
from urllib.request import urlopen

import soundfile

from edge_asr import clock, model_store
from edge_asr.audio import quiet, read_file
from edge_asr.events import SAMPLE_RATE
from edge_asr.process_state import resident_bytes
from tests.broker import HOST, Broker, free_port
from tests.soundcard import SoundCard, sound_card, until

FULL_SIZE = "full-size"

SHORT_BYTES = 2 * SAMPLE_RATE * 6 // 10
"""0.6 s: the shortest order."""

PAUSE = quiet(SAMPLE_RATE)
"""Between two orders: the gate closes."""

LIBPULSE = "threaded-ml"
"""The thread in which libpulse talks to the sound server; a sound card of one's own has none."""

OTHER: Literal["zh"] = "zh"
"""The site's language with a model of one's own: random weights do not say the golden text, which is English."""

LAST_LINES = 20
"""Of the log of a daemon that does not start."""

DRIFT_LIMITS_MB = {"long_speech": 8.0, "short_orders": 4.0}
"""Of each process: in 300 s without a pause, where 170 kB lost with each of 95 pieces would be 8 MB and half a MB was
seen; in 10,000 orders, where 1 kB lost with each of them is 5 MB."""


def recordings() -> list[bytes]:
    return [read_file(path) for path in sorted(model_store.bundled("recordings").glob("*.flac"))]


def short_orders() -> Iterator[bytes]:
    """Pieces of the recordings for ever, all different places and lengths; some are silence."""
    for number, pcm in enumerate(cycle(recordings())):
        start = 2 * (number * 997 % max(1, (len(pcm) - SHORT_BYTES) // 2))
        yield pcm[start : start + SHORT_BYTES + 64 * (number % 300)] + PAUSE


def long_speech(seconds: float) -> Iterator[bytes]:
    """Speech without a pause, a second at a time."""
    voices = b"".join(pcm for pcm in recordings() if len(pcm) > SHORT_BYTES)
    for second in range(math.ceil(seconds)):
        yield (2 * voices)[2 * SAMPLE_RATE * second % len(voices) :][: 2 * SAMPLE_RATE]
    yield PAUSE


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


class Listener:
    """A running daemon with a microphone before which somebody speaks now and then, and an ear for what it is fed."""

    def __init__(self, process: subprocess.Popen[bytes], monitoring: int) -> None:
        self._process, self._monitoring = process, monitoring

    def committed(self) -> int:
        """What it was fed and has understood so far."""
        return round(self._number(r'utterances_total{.*source="stdin"}'))

    def has_understood(self) -> bool:
        """Whether nothing waits for the recognizer."""
        return not self._number("finals_waiting")

    def _number(self, name: str) -> float:
        with urlopen(f"http://{HOST}:{self._monitoring}/metrics", timeout=60) as page:
            numbers = page.read().decode()
        return sum(map(float, re.findall(rf"^edge_asr_{name} (.*)$", numbers, re.MULTILINE)))

    def sizes_mb(self) -> dict[str, float]:
        """Memory of each of its processes."""
        pids = family(self._process.pid)
        names = (Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip() for pid in pids[1:])
        return {name: resident_bytes(pid) / 2**20 for name, pid in zip(("daemon", *names), pids, strict=True)}

    def growth(
        self, pieces: Iterable[bytes], look_every: int, most: float = math.inf, limit_s: float = math.inf
    ) -> dict[str, Any]:
        """How its processes grow over pieces of audio, until so many utterances or seconds have passed."""
        assert self._process.stdin is not None
        sizes: dict[str, list[float]] = {}
        before, began = self.committed(), time.monotonic()
        for number, pcm in enumerate(pieces, start=1):
            self._process.stdin.write(pcm)
            self._process.stdin.flush()
            if number % look_every == 0:
                until(self.has_understood, "it is behind", deadline_s=120)
                for name, size_mb in self.sizes_mb().items():
                    sizes.setdefault(name, []).append(size_mb)
                if self.committed() - before >= most or time.monotonic() - began > limit_s:
                    break
        return {
            "utterances": self.committed() - before,
            "took_s": round(time.monotonic() - began, 1),
            "processes": {name: drift(each) for name, each in sizes.items()},
        }


def drift(sizes_mb: list[float]) -> dict[str, float]:
    """The second quarter's median, the last quarter's, and what is left of growth once every length has been seen."""
    quarter = max(1, len(sizes_mb) // 4)
    early, late = statistics.median(sizes_mb[quarter : 2 * quarter] or sizes_mb), statistics.median(sizes_mb[-quarter:])
    found = {"from_mb": early, "to_mb": late, "most_mb": max(sizes_mb), "drift_mb": late - early}
    return {name: round(value, 2) for name, value in found.items()}


@contextmanager
def spoken_to(card: SoundCard, folder: Path) -> Iterator[None]:
    """Somebody gives an order before the microphone every few seconds."""
    order, done = folder / "order.wav", threading.Event()
    soundfile.write(order, *soundfile.read(model_store.bundled("recordings") / "20-emergency-stop.flac"))

    def talk() -> None:
        while not done.wait(5):
            card.play(order)

    talker = threading.Thread(target=talk)
    talker.start()
    try:
        yield
    finally:
        done.set()
        talker.join()


def memory_over(
    model: str | None, utterances: float, speech_s: float, limit_s: float = math.inf
) -> dict[str, dict[str, Any]]:
    """Growth of every process of a daemon over long speech and then many short orders."""
    port = free_port()
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as folder,
        Broker(Path(folder), durable=False) as broker,
        sound_card() as card,
    ):
        changes = ["sources=[{type: microphone}, {type: stdin}]", "commands.grammars=[factory.en]"]
        changes += [f"monitoring.port={port}", f"mqtt.host={HOST}", f"mqtt.port={broker.port}"]
        variables = {**os.environ, **card.environment}
        with ready(model, variables, *changes) as (process, _), spoken_to(card, Path(folder)):
            until(lambda: is_open(port), "nothing is told")
            listener = Listener(process, port)
            speech = listener.growth(long_speech(speech_s), look_every=2)
            orders = listener.growth(short_orders(), 20, utterances, limit_s)
    return {"long_speech": speech, "short_orders": orders}


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
        try:
            status = dict(line.split(":\t", 1) for line in (task / "status").read_text(encoding="utf-8").splitlines())
            spent_ns = int((task / "schedstat").read_text(encoding="ascii").split()[0])
        except (FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            continue
        so_far = found.setdefault(status["Name"], {"cpu_s": 0.0, "woken": 0.0})
        so_far["cpu_s"] += spent_ns / clock.NS_PER_S
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


@contextmanager
def ready(
    model: str | None, variables: Mapping[str, str], *changes: str
) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """A daemon under settings that differ so, once it is READY=1, and how many seconds that took."""
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
    ):
        manager.bind(f"{folder}/notify")
        every = [f"state_dir={folder}/state", "log.level=error", *changes]
        every += ["model.optimized=false"]  # else the worker makes way for a faster one while it is measured
        every += [f"model.name={model}", f"model.languages=[{OTHER}]"] if model else []
        command = [sys.executable, "-m", "edge_asr.cli", "run", *(part for each in every for part in ("--set", each))]
        began = time.monotonic()
        with started(command, {**variables, "NOTIFY_SOCKET": f"{folder}/notify"}, Path(folder) / "log") as daemon:
            await_ready(daemon, manager, Path(folder) / "log")
            ready_s = time.monotonic() - began
            threading.Thread(target=_listen, args=[manager], daemon=True).start()
            yield daemon, ready_s


@contextmanager
def in_silence(model: str | None, *, gateway: bool = False) -> Iterator[tuple[list[int], dict[str, float]]]:
    """The processes of a daemon before a silent microphone, and what its start cost up to READY=1."""
    changes = ["gateway.open=true", "gateway.tls=false", f"gateway.port={free_port()}"] if gateway else []
    changes += ["sources=[{type: microphone}]"]
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, sound_card() as card:
        variables = {**compiled(Path(folder)), **card.environment}
        with ready(model, variables, *changes) as (daemon, ready_s):
            ready_cpu_s = sum(each["cpu_s"] for each in effort(family(daemon.pid)).values())
            time.sleep(5)  # the microphone opens, the first probe is over
            yield family(daemon.pid), {"ready_s": round(ready_s, 2), "ready_cpu_s": round(ready_cpu_s, 2)}


def service(model: str | None, idle_s: float, *, gateway: bool = False) -> dict[str, float]:
    """Start to READY=1, memory and CPU of the daemon before a silent microphone."""
    with in_silence(model, gateway=gateway) as (pids, start):
        return {**start, **idle(pids, idle_s), **memory_mb(pids)}


@contextmanager
def started(command: list[str], variables: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is told to end in any case."""
    with (
        log.open("wb") as errors,
        subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, stderr=errors) as process,
    ):
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
    beyond = [
        f"{name} by {each['drift_mb']} MB in {what}"
        for what, limit_mb in DRIFT_LIMITS_MB.items()
        for name, each in found[what]["processes"].items()
        if each["drift_mb"] > limit_mb
    ]
    return f"memory grows: {', '.join(beyond)}" if beyond else ""


@contextmanager
def model_of(wanted: str | None) -> Iterator[str | None]:
    """What the settings call the model that is wanted."""
    if wanted != FULL_SIZE:
        yield wanted
        return
    from tests.bench_engine import make_model  # noqa: PLC0415 - engines that nothing else here needs

    with tempfile.TemporaryDirectory(prefix="soak-model-") as folder:
        make_model(Path(folder))
        yield f"{folder}/"


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/soak")
    parser.add_argument("--utterances", type=int, default=10_000)
    parser.add_argument("--speech-s", type=float, default=300.0)
    parser.add_argument("--idle-s", type=float, default=60.0)
    parser.add_argument("--limit-s", type=float, default=math.inf, help="of the short orders, however many")
    parser.add_argument(
        "--model", help=f"or {FULL_SIZE}: SenseVoiceSmall's graph with random weights, made on the spot"
    )
    parser.add_argument("--gateway", action="store_true", help="with an open gateway that nobody uses")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"machine": platform.machine(), "load": os.getloadavg()[0]}
    with model_of(arguments.model) as model:
        found["service"] = service(model, arguments.idle_s, gateway=arguments.gateway)
        found |= memory_over(model, arguments.utterances, arguments.speech_s, arguments.limit_s)
    print(json.dumps(found, indent=2))
    grown = grown_too_much(found)
    if grown:
        raise SystemExit(grown)


if __name__ == "__main__":
    main()
