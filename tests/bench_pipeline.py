"""How long after the gate closes an utterance is committed, acknowledged by the broker and with a subscriber.

Recordings are played as fast as they were spoken to the product's pipeline, worker process with SenseVoiceSmall's full
graph, outbox and publisher, with a real mosquitto; the clock runs from the moment at which the frame with which the
gate closes would have been captured. The weights are random, so the optimized graph is put in place unproven, texts
are nonsense, and there is no grammar.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_asr import clock, contract, model_store, prepared, settings
from edge_asr.audio import FrameCutter, quiet, read_file
from edge_asr.contract import Renderer
from edge_asr.events import (
    BYTES_PER_SAMPLE,
    FRAME_SAMPLES,
    SAMPLE_RATE,
    AudioFrame,
    Draft,
    Message,
    Utterance,
    new_id,
)
from edge_asr.inference import OnnxRecognizer, SileroDetector
from edge_asr.model_store import ModelFiles
from edge_asr.outbox import Outbox
from edge_asr.pipeline import Pipeline, Timing, Understanding
from edge_asr.prepared import FOLDER, Record
from edge_asr.publisher import Publisher
from edge_asr.settings import Settings
from edge_asr.speech import KEEP_SILENCE_S
from edge_asr.worker import Worker
from tests.bench_engine import add_places, machine, make_model, noise
from tests.broker import Broker, arrivals, wait_until
from tests.soak import effort

NAMES = (
    *("01-start-line-three", "03-set-mixer-speed", "05-set-oven-temperature", "13-set-conveyor-speed"),
    *("07-log-scrap", "18-switch-off-coolant-pump"),
)
"""More than the recognizer keeps features of, so that each is new to it every time."""


def frames_for(seconds: float) -> int:
    """Whole frames that hold so much audio."""
    return -(-round(seconds * SAMPLE_RATE) // FRAME_SAMPLES)


@dataclass
class Spoken:
    """A source that hands frames over when they would have been captured."""

    name: str
    pcm: bytes
    captured: dict[int, float] = field(default_factory=dict)
    """End of a frame -> when that was (monotonic seconds)."""

    async def frames(self) -> AsyncIterator[AudioFrame]:
        began = time.monotonic()
        for frame in FrameCutter(self.name).feed(self.pcm, clock.boottime_ns()):
            self.captured[frame.end] = began + frame.end / SAMPLE_RATE
            await asyncio.sleep(max(0.0, self.captured[frame.end] - time.monotonic()))
            yield frame

    async def close(self) -> None:
        """Nothing is open."""


def put_in_place(files: ModelFiles, options: Settings) -> None:
    """Let the worker use the optimized graph, which nobody can prove on random weights."""
    folder = options.models_directory / FOLDER / files.sha256
    folder.mkdir(parents=True)
    features = prepared.cpu_features()
    prepared.rewrite(files.model, folder / "model.onnx", "close", features)
    sha256 = model_store.sha256_of(folder / "model.onnx")
    record = Record(key=prepared.key_of(files, features), model=files.name, variant="close", sha256=sha256)
    (folder / "record.json").write_text(record.model_dump_json(), encoding="utf-8")


@dataclass
class Course:
    """Where each utterance was when, by its id (monotonic seconds)."""

    audio_s: dict[str, float] = field(default_factory=dict)
    closed: dict[str, float] = field(default_factory=dict)
    """The gate behind it; what the end of the recording closed is left out."""
    committed: dict[str, float] = field(default_factory=dict)
    acknowledged: dict[str, float] = field(default_factory=dict)
    """Its transcript, by PUBACK."""

    def take_back(self, topic: str, message: Message, _replayed: bool) -> None:  # noqa: FBT001 - the publisher's
        """Hear of what the broker has taken."""
        if topic == contract.TRANSCRIPT:
            self.acknowledged[str(message.data["utterance_id"])] = time.monotonic()


def listening(options: Settings, worker: Worker, outbox: Outbox, sources: Sequence[Spoken], course: Course) -> Pipeline:
    """The product's pipeline, which notes the course of what is said."""
    vad = model_store.locate_vad()
    pipeline = Pipeline(
        options,
        sources=sources,
        new_detector=lambda: SileroDetector(vad),
        engine=worker,
        outbox=outbox,
        live=lambda _topic, _data: None,
    )
    rest = (frames_for(options.vad.min_silence_s) - frames_for(KEEP_SILENCE_S)) * FRAME_SAMPLES
    captured = {source.name: source.captured for source in sources}

    def note(heard: Understanding, _timing: Timing) -> None:
        committed, utterance = time.monotonic(), heard.utterance
        end = utterance.start + len(utterance.pcm) // BYTES_PER_SAMPLE + rest
        if end in captured[utterance.source]:
            course.closed[utterance.id] = captured[utterance.source][end]
            course.committed[utterance.id] = committed
            course.audio_s[utterance.id] = utterance.duration_s

    pipeline.noted = note
    return pipeline


async def delivered(
    options: Settings, worker: Worker, outbox: Outbox, rounds: int, arrived: Mapping[str, float]
) -> list[dict[str, float]]:
    """Every utterance: its length, and from the gate's closing to commit, PUBACK and subscriber."""
    recordings = [next(model_store.bundled("recordings").glob(f"{name}*")) for name in NAMES] * rounds
    source = Spoken("bench", b"".join(read_file(path) + quiet(SAMPLE_RATE) for path in recordings))
    course = Course()
    renderer = Renderer(options.topic_root, options.device)
    publisher = Publisher(options.mqtt, renderer, outbox, on_delivered=course.take_back)
    publishing = asyncio.create_task(publisher.run(), name="publisher")
    await listening(options, worker, outbox, [source], course).run()

    def has_all(moments: Mapping[str, float]) -> bool:
        return course.closed.keys() <= moments.keys()

    await asyncio.to_thread(wait_until, lambda: has_all(course.acknowledged) and has_all(arrived), "all is delivered")
    publishing.cancel()
    await asyncio.wait([publishing])
    ways = {"to_commit_ms": course.committed, "to_puback_ms": course.acknowledged, "to_subscriber_ms": arrived}
    return [
        {
            "audio_s": round(course.audio_s[ident], 2),
            **{name: round(1000 * (moments[ident] - closed), 1) for name, moments in ways.items()},
        }
        for ident, closed in course.closed.items()
    ]


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile, in the values' own unit."""
    ordered = sorted(values)
    return {"p50": round(statistics.median(ordered), 1), "p95": ordered[int(0.95 * (len(ordered) - 1))]}


def cpu_s(pid: int) -> float:
    """What all threads of a process have used so far, to the nanosecond."""
    return sum(each["cpu_s"] for each in effort([pid]).values())


async def overhead(
    worker: Worker, outbox: Outbox, files: ModelFiles, options: Settings, rounds: int
) -> dict[str, float]:
    """CPU time of an utterance of 3 s by way of the worker into the outbox, over that of the bare decode, by turns."""
    bare = OnnxRecognizer(files, options.model, prepared.find(files, options.models_directory, options.model))
    decodes_s, ways_s = [], []
    for number in range(rounds + 1):
        began_s = time.thread_time()
        bare.recognize(noise(3, 2 * number))
        decodes_s.append(time.thread_time() - began_s)
        pcm = noise(3, 2 * number + 1)  # new to both, so that its features are new
        began_s = cpu_s(worker.pid) + time.process_time()  # to look at another process takes time of ours
        utterance = Utterance(new_id(), "bench", 0, pcm, clock.boottime_ns())
        heard = await asyncio.to_thread(worker.understand, utterance, final=True)
        assert heard.transcript is not None
        await outbox.append(Draft("evt/transcript", "transcript", {"text": heard.transcript.text}))
        ended_s = time.process_time()
        ways_s.append(ended_s + cpu_s(worker.pid) - began_s)
    pairs = list(zip(decodes_s, ways_s, strict=True))[1:]  # the first one warms up
    return {
        "decode_ms": round(1000 * statistics.median(decode for decode, _ in pairs), 1),
        "way_ms": round(1000 * statistics.median(way for _, way in pairs), 1),
        "overhead": round(statistics.median(way / decode for decode, way in pairs) - 1, 3),
    }


def options_of(files: ModelFiles, folder: Path, **more: object) -> Settings:
    """Settings for the full graph, optimized, in a state of their own."""
    model = settings.Model(name=f"{files.model.parent}/", language="zh")  # nothing golden is known in it
    tree = {"state_dir": folder / "state", "model": model.model_dump(), "commands": {"grammars": []}, **more}
    options = Settings.model_validate(tree)
    put_in_place(files, options)
    return options


def measured(files: ModelFiles, folder: Path, rounds: int) -> dict[str, Any]:
    """All figures, and each utterance's."""
    with Broker(folder, durable=False) as broker:
        options = options_of(files, folder, mqtt=broker.mqtt().model_dump())
        began = time.monotonic()
        worker = Worker(options)  # before anything has threads: it forks
        ready_s = time.monotonic() - began
        try:
            with closing(Outbox(folder / "outbox.db", 100_000_000)) as outbox, arrivals(broker) as arrived:
                found = asyncio.run(delivered(options, worker, outbox, rounds, arrived))
                extra = asyncio.run(overhead(worker, outbox, files, options, 5 * rounds))
        finally:
            worker.close()
    return {
        "worker_ready_s": round(ready_s, 2),
        "utterances": len(found),
        "audio_s": round(statistics.median(each["audio_s"] for each in found), 2),
        **{name: quantiles([each[name] for each in found]) for name in found[0] if name != "audio_s"},
        "overhead": extra,
        "load_after": round(os.getloadavg()[0], 1),
        "each": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/bench pipeline", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="times each recording is played")
    add_places(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        files = make_model(arguments.model or folder / "model")
        figures = {"machine": machine(), **measured(files, folder, arguments.rounds)}
    print(json.dumps({name: value for name, value in figures.items() if name != "each"}, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
