"""What each setting of onnxruntime brings that the product changes: SenseVoiceSmall's optimized full graph.

Each way has a process of its own, and they take turns. CPU time is that of all threads until the next utterance comes,
a tenth of a second later, so that threads which spin while they wait are seen. All ways give the same result, equal in
every bit, or the run ends.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import operator
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_asr import prepared
from tests.bench_engine import add_places, machine, make_model

AS_THE_PRODUCT = "edge-asr"
LONG_S = 20
FRAMES_PER_S = 100 / 6
APART_S = 0.1
"""Between two utterances: longer than anything spins."""


@dataclass(frozen=True)
class Way:
    """How a session is opened and run, less what the product does."""

    threads: int = 1
    spins: bool = False
    has_arena: bool = True
    shrinks: bool = False
    """After every run, not in silence."""
    is_ort_format: bool = False


WAYS: Mapping[str, Way] = {
    AS_THE_PRODUCT: Way(),
    "two threads": Way(threads=2),
    "two threads that spin": Way(threads=2, spins=True),
    "no arena": Way(has_arena=False),
    "arena shrunk after every utterance": Way(shrinks=True),
    "ORT format": Way(is_ort_format=True),
}


def opened(way: Way, path: Path, save_to: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = way.threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(way.spins)))
    options.enable_cpu_mem_arena = way.has_arena
    options.log_severity_level = 3
    if save_to is not None:
        options.optimized_model_filepath = str(save_to)
        options.add_session_config_entry("session.save_model_format", "ORT")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feed(seconds: float) -> dict[str, NDArray[Any]]:
    """Features that cost what speech costs."""
    frames = round(seconds * FRAMES_PER_S)
    drawn = np.random.default_rng(frames).standard_normal((1, frames, 560), dtype=np.float32)
    return {"x": drawn, **{name: np.array([0], np.int32) for name in ("language", "text_norm")},
            "x_length": np.array([frames], np.int32)}  # fmt: skip


def anonymous_mb() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")) // 1024


def shrinking() -> ort.RunOptions:
    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def serve(way: Way, path: Path, line: Connection) -> None:
    """Load, then one decode after the other; at last what a long one leaves."""
    used = time.process_time()
    session = opened(way, path)
    facts = {"load_cpu_s": round(time.process_time() - used, 2), "loaded_mb": anonymous_mb()}
    ctypes.CDLL(None).malloc_trim(0)
    facts["trimmed_mb"] = anonymous_mb()
    line.send(facts)
    each_time = shrinking() if way.shrinks else None
    while seconds := line.recv():
        feeds = feed(seconds)
        began, used = time.perf_counter(), time.process_time()
        scores = session.run(None, feeds, each_time)[0]
        took_s = time.perf_counter() - began
        time.sleep(APART_S)
        line.send((time.process_time() - used, took_s, scores.tobytes() if seconds != LONG_S else b""))
    after = {"after_long_mb": anonymous_mb()}
    if way.has_arena:
        session.run(None, feed(0.5), shrinking())
    ctypes.CDLL(None).malloc_trim(0)
    line.send({**after, "given_back_mb": anonymous_mb()})


class Contender:
    """One way, in its process."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.line, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(WAYS[name], path, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.facts: dict[str, Any] = self.line.recv()
        self.cpu_s: list[float] = []
        self.clock_s: list[float] = []

    def decode(self, seconds: int) -> tuple[float, float, bytes]:
        """CPU time, time on the clock, and the scores."""
        self.line.send(seconds)
        answer: tuple[float, float, bytes] = self.line.recv()
        return answer

    def end(self) -> None:
        """After one long utterance; what that leaves becomes a fact."""
        self.decode(LONG_S)
        self.line.send(0)
        self.facts |= self.line.recv()
        self._process.join()


def measured(taking_part: Sequence[Contender], seconds: int, rounds: int) -> list[dict[str, Any]]:
    """Medians, and ratios to the product in the same round."""
    for number in range(rounds + 1):
        answers = [each.decode(seconds) for each in taking_part]
        assert len({scores for _, _, scores in answers}) == 1, "the ways do not give the same result"
        for each, (cpu_s, clock_s, _) in zip(taking_part, answers, strict=True):
            if number:  # the first one warms up
                each.cpu_s.append(cpu_s)
                each.clock_s.append(clock_s)
    for each in taking_part:
        each.end()
    first = taking_part[0]
    return [
        {
            "name": each.name,
            "cpu_ms": round(1000 * statistics.median(each.cpu_s), 1),
            "ratio": round(statistics.median(map(operator.truediv, each.cpu_s, first.cpu_s)), 3),
            "clock_ms": round(1000 * statistics.median(each.clock_s), 1),
            **each.facts,
        }
        for each in taking_part
    ]


def table(rows: Sequence[Mapping[str, Any]], seconds: int) -> str:
    """Markdown: a line per way."""
    heads: dict[str, Callable[[Mapping[str, Any]], str]] = {
        f"{seconds} s of audio": lambda row: str(row["name"]),
        "CPU ms (ratio)": lambda row: f"{row['cpu_ms']:.0f} ({row['ratio']:.2f})",
        "clock ms": lambda row: f"{row['clock_ms']:.0f}",
        "load CPU s": lambda row: f"{row['load_cpu_s']:.1f}",
        "MB loaded": lambda row: str(row["loaded_mb"]),
        "trimmed": lambda row: str(row["trimmed_mb"]),
        f"after {LONG_S} s": lambda row: str(row["after_long_mb"]),
        "given back": lambda row: str(row["given_back_mb"]),
    }
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cell(row) for cell in heads.values()) + " |" for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/bench session", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=int, default=3, help="of audio in an utterance")
    add_places(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        files = make_model(arguments.model or folder / "model")
        graph, other = folder / "graph.onnx", folder / "graph.ort"
        prepared.rewrite(files.model, graph, "close", prepared.cpu_features())
        opened(Way(), graph, save_to=other)
        taking_part = [Contender(name, other if way.is_ort_format else graph) for name, way in WAYS.items()]
        rows = measured(taking_part, arguments.seconds, arguments.rounds)
    print(table(rows, arguments.seconds))
    if arguments.json:
        figures = {"machine": machine(), "audio_s": arguments.seconds, "session": rows}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
