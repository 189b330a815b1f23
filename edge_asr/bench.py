"""Measures what hearing costs on this machine: each stage in thread CPU time per second of audio, interleaved, medians.

Wall time says little on a shared machine; thread CPU time and the ratio of two engines in one run do.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnxruntime

from edge_asr import model_store
from edge_asr.audio import read_file
from edge_asr.engine import Engine
from edge_asr.events import BYTES_PER_SAMPLE, FRAME_SAMPLES, SAMPLE_RATE
from edge_asr.inference import SherpaRecognizer
from edge_asr.settings import Settings
from edge_asr.sources import audio_files

ROUNDS = 5

_FRAME_BYTES = FRAME_SAMPLES * BYTES_PER_SAMPLE


@dataclass(frozen=True, slots=True)
class Stage:
    """One thing that is done to every recording."""

    name: str
    work: Callable[[int], object]
    """Does it to the recording with this index."""


def run(options: Settings, rounds: int = ROUNDS) -> dict[str, Any]:
    """Measure every stage on the bundled recordings. Raises ModelError."""
    began = time.perf_counter()
    engine = Engine.build(options)
    ready_s = time.perf_counter() - began
    pcm = [read_file(file) for file in audio_files(model_store.bundled("recordings"))]
    audio_s = sum(map(len, pcm)) / BYTES_PER_SAMPLE / SAMPLE_RATE
    costs = _measured(_stages(engine, options, pcm), len(pcm), rounds)
    return {
        "machine": _machine(),
        "model": engine.recognizer.name,
        "ready_s": round(ready_s, 2),
        "resident_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "audio_s": round(audio_s, 1),
        "stages": [
            {"name": name, "cpu_ms_per_audio_s": round(1000 * cpu_s / audio_s, 3)} for name, cpu_s in costs.items()
        ],
    }


def _stages(engine: Engine, options: Settings, pcm: Sequence[bytes]) -> list[Stage]:
    detector = engine.new_detector()
    sherpa = SherpaRecognizer(engine.files, options.model)
    heard = [engine.recognizer.recognize(audio) for audio in pcm]

    def detect(index: int) -> None:
        audio = pcm[index]
        for start in range(0, len(audio) - _FRAME_BYTES, _FRAME_BYTES):
            detector.probability(audio[start : start + _FRAME_BYTES])

    stages = [
        Stage("speech detector", detect),
        Stage("recognizer, onnxruntime", lambda index: engine.recognizer.recognize(pcm[index])),
        Stage("recognizer, sherpa-onnx", lambda index: sherpa.recognize(pcm[index])),
    ]
    decoder, interpreter = engine.decoder, engine.interpreter
    if decoder is not None:
        stages.append(Stage("language model, hotwords", lambda index: decoder.apply(heard[index])))
    if interpreter is not None:
        stages.append(Stage("command grammar", lambda index: interpreter.interpret(heard[index])))
    stages.append(Stage("everything, as the daemon", lambda index: list(engine.hear(pcm[index], options.vad))))
    return stages


def _measured(stages: Sequence[Stage], recordings: int, rounds: int) -> dict[str, float]:
    """Seconds of thread CPU per stage for all recordings: the median over rounds, stages taking turns."""
    costs: dict[str, list[float]] = {stage.name: [] for stage in stages}
    for _ in range(rounds):
        for stage in stages:
            began = time.thread_time()
            for index in range(recordings):
                stage.work(index)
            costs[stage.name].append(time.thread_time() - began)
    return {name: statistics.median(values) for name, values in costs.items()}


def _machine() -> dict[str, Any]:
    return {
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
    }
