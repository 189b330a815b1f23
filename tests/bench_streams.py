"""How many microphones one core serves, SenseVoice's full graph, and how that grows with cores.

- ``silent``, ``speaking``: CPU time of a second of audio in one thread that does what the daemon does with a frame
  (level, energy gate, detector, gate) and, of what was spoken, with an utterance (features and the optimized graph).
- ``throughput``: seconds of audio that recognizers understand in a second, beside each other in processes of their own,
  and one with as many threads.
- ``speakers``: many who go on speaking in real time through the product's pipeline, worker process and outbox.

Weights are random, texts nonsense; grammar and network are apart.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import itertools
import json
import math
import multiprocessing
import operator
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np

from edge_asr import clock, model_store, prepared, settings
from edge_asr.audio import FrameCutter, quiet, read_file
from edge_asr.events import SAMPLE_RATE
from edge_asr.inference import OnnxRecognizer, SileroDetector
from edge_asr.model_store import ModelFiles
from edge_asr.outbox import Outbox
from edge_asr.pipeline import Ear
from edge_asr.settings import Settings
from edge_asr.worker import Worker
from tests.bench_engine import add_places, machine, make_model, noise
from tests.bench_pipeline import Course, Spoken, cpu_s, listening, options_of, quantiles
from tests.bench_session import anonymous_mb

SILENCE_S = 60
SILENCE_LEVEL = 3.0
"""Standard deviation in 16-bit steps: -81 dBFS, a quiet room."""

TURNS = 3
UTTERANCE_S = 3
TAKES = 8
"""Different utterances: more than the recognizer keeps features of."""

PAUSE = quiet(SAMPLE_RATE * 4 // 10)
"""Between two sentences: with the silence that an utterance keeps, a little more than what closes the gate."""


def silence(take: int) -> bytes:
    """A quiet room."""
    drawn = np.random.default_rng(take).standard_normal(SILENCE_S * SAMPLE_RATE) * SILENCE_LEVEL
    return drawn.astype("<i2").tobytes()


def speech() -> bytes:
    """Somebody who goes on speaking."""
    recordings = sorted(model_store.bundled("recordings").glob("*.flac"))
    return b"".join(read_file(path) for path in recordings)


def served(pcm: bytes, recognizer: OnnxRecognizer) -> dict[str, float]:
    """CPU time of a second of audio in ms: of the ear, and of the recognizer."""
    ear = Ear(SileroDetector(model_store.locate_vad()), settings.Vad())
    recognizing_s, began = 0.0, time.thread_time()
    for frame in FrameCutter("bench").feed(pcm, clock.boottime_ns()):
        for utterance in ear.feed(frame):
            decode = time.thread_time()
            recognizer.recognize(utterance.pcm)
            recognizing_s += time.thread_time() - decode
    whole_s = time.thread_time() - began
    per_s = 1000 * SAMPLE_RATE * 2 / len(pcm)
    return {"ear_ms": (whole_s - recognizing_s) * per_s, "recognizer_ms": recognizing_s * per_s}


def summed_up(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Medians, and how many such streams fill a core."""
    found = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    return {**{name: round(ms, 3) for name, ms in found.items()}, "per_core": round(1000 / sum(found.values()), 1)}


def recognize_for(
    seconds: float, folder: Path, graph: Path, threads: int, start: Barrier, answers: Queue[dict[str, float]]
) -> None:
    """In a process of its own: recognize utterances for so long, beginning together with the others."""
    files = model_store.locate(f"{folder}/")
    recognizer = OnnxRecognizer(files, settings.Model(language="en", threads=threads), graph)
    takes = [noise(UTTERANCE_S, take) for take in range(TAKES)]
    recognizer.recognize(takes[-1])
    ctypes.CDLL(None).malloc_trim(0)
    start.wait()
    began, used, count = time.monotonic(), time.process_time(), 0
    while (passed_s := time.monotonic() - began) < seconds:
        recognizer.recognize(takes[count % TAKES])
        count += 1
    spent_s = time.process_time() - used
    audio_s = UTTERANCE_S * count
    answers.put({"per_s": audio_s / passed_s, "cpu": spent_s / audio_s, "mb": anonymous_mb()})


def throughput(processes: int, threads: int, files: ModelFiles, graph: Path, seconds: float) -> dict[str, float]:
    """What so many recognizers of so many threads do beside each other."""
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(processes), context.Queue()
    task = (seconds, files.model.parent, graph, threads, start, answers)
    running = [context.Process(target=recognize_for, args=task, daemon=True) for _ in range(processes)]
    for process in running:
        process.start()
    found = [answers.get(timeout=seconds + 60) for _ in running]
    for process in running:
        process.join()
    return {
        "processes": processes,
        "threads": threads,
        "audio_s_per_s": round(sum(each["per_s"] for each in found), 1),
        "cpu_ms_per_audio_s": round(1000 * statistics.mean(each["cpu"] for each in found), 1),
        "anonymous_mb": round(sum(each["mb"] for each in found)),
    }


def over_cores(files: ModelFiles, graph: Path, seconds: float) -> list[dict[str, float]]:
    """One recognizer, then as many as two, three ... CPUs, each time also as threads of one.

    They take turns, and the best of three counts: other work of the machine only takes away.
    """
    more = range(2, (os.cpu_count() or 1) + 1)
    kinds = [(1, 1), *itertools.chain.from_iterable(((count, 1), (1, count)) for count in more)]
    rounds = [[throughput(*kind, files, graph, seconds / TURNS) for kind in kinds] for _ in range(TURNS)]
    return [max(found, key=operator.itemgetter("audio_s_per_s")) for found in zip(*rounds, strict=True)]


def voices(count: int, seconds: float) -> Iterator[Spoken]:
    """Speakers who pause only between two sentences, each beginning at another place."""
    recordings = sorted(model_store.bundled("recordings").glob("*.flac"))
    ear = Ear(SileroDetector(model_store.locate_vad()), settings.Vad())
    apart = b"".join(read_file(path) + quiet(SAMPLE_RATE) for path in recordings)
    sentences = itertools.chain.from_iterable(map(ear.feed, FrameCutter("bench").feed(apart, 0)))
    whole = b"".join(sentence.pcm + PAUSE for sentence in sentences)
    length = 2 * round(seconds * SAMPLE_RATE)
    endless = whole * (1 + math.ceil(length / len(whole)))
    for number in range(count):
        start = 2 * (len(whole) // 2 * number // count)
        yield Spoken(f"speaker{number + 1}", endless[start : start + length])


def speakers(options: Settings, worker: Worker, outbox: Outbox, count: int, seconds: float) -> dict[str, Any]:
    """So many speak at once: from the gate's closing to the commit, and the CPU time of all processes."""
    course = Course()
    pipeline = listening(options, worker, outbox, list(voices(count, seconds)), course)
    began, used_s, recognizing_s = time.monotonic(), time.process_time(), cpu_s(worker.pid)
    asyncio.run(pipeline.run())
    passed_s = time.monotonic() - began
    waits = [course.committed[ident] - closed for ident, closed in course.closed.items()]
    return {
        "speakers": count,
        "partials": options.partials.enabled,
        "clock_s": round(passed_s, 1),
        "utterances": len(waits),
        "spoken_s_per_s": round(sum(course.audio_s.values()) / passed_s, 1),
        "to_commit_ms": quantiles([round(1000 * wait_s, 1) for wait_s in waits]),
        "listening_cpu_s_per_s": round((time.process_time() - used_s) / passed_s, 3),
        "recognizer_cpu_s_per_s": round((cpu_s(worker.pid) - recognizing_s) / passed_s, 3),
    }


def end_to_end(files: ModelFiles, folder: Path, count: int, seconds: float) -> list[dict[str, Any]]:
    """With the partials that the product makes of what time is left, and without."""
    options = options_of(files, folder)
    alone = options.model_copy(update={"partials": settings.Partials(enabled=False)})
    worker = Worker(options)
    try:
        with closing(Outbox(folder / "outbox.db", 100_000_000)) as outbox:
            return [speakers(each, worker, outbox, count, seconds) for each in (alone, options)]
    finally:
        worker.close()


def measured(files: ModelFiles, folder: Path, rounds: int, count: int, seconds: float) -> dict[str, Any]:
    """All of it; ``count`` speakers for so many seconds."""
    graph = folder / "graph.onnx"
    prepared.rewrite(files.model, graph, "close", prepared.cpu_features())
    recognizer = OnnxRecognizer(files, settings.Model(language="en"), graph)
    return {
        "machine": machine(),
        "silent": summed_up([served(silence(take), recognizer) for take in range(rounds)]),
        "speaking": summed_up([served(speech(), recognizer) for _ in range(rounds)]),
        "throughput": over_cores(files, graph, seconds / 4),
        "speakers": end_to_end(files, folder, count, seconds),
        "load_after": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/bench streams", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--speakers", type=int, default=12, metavar="N", help="who speak at once, end to end")
    parser.add_argument("--seconds", type=float, default=40, help="that they speak; a quarter of it for a throughput")
    add_places(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        files = make_model(arguments.model or folder / "model")
        figures = measured(files, folder, arguments.rounds, arguments.speakers, arguments.seconds)
    print(json.dumps(figures, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
