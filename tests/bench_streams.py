"""How many microphones one core serves: what a second of silence and a second of speech cost, SenseVoice's full graph.

One thread does what the daemon does with a frame (level, energy gate, detector, gate) and, of what was spoken, with an
utterance (features and the optimized graph). Weights are random, texts nonsense; grammar, disk and network are apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from edge_asr import clock, model_store, prepared, settings
from edge_asr.audio import FrameCutter, read_file
from edge_asr.events import SAMPLE_RATE
from edge_asr.inference import OnnxRecognizer, SileroDetector
from edge_asr.pipeline import Ear
from tests.bench_engine import machine, make_model

SILENCE_S = 60
SILENCE_LEVEL = 3.0
"""Standard deviation in 16-bit steps: -81 dBFS, a quiet room."""


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


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/bench streams", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, help="keep the model here, or use the one that is here")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        files = make_model(arguments.model or Path(name) / "model")
        graph = Path(name) / "graph.onnx"
        prepared.rewrite(files.model, graph, "close", prepared.cpu_features())
        recognizer = OnnxRecognizer(files, settings.Model(language="en"), graph)
        figures: dict[str, Any] = {
            "machine": machine(),
            "silent": summed_up([served(silence(take), recognizer) for take in range(arguments.rounds)]),
            "speaking": summed_up([served(speech(), recognizer) for _ in range(arguments.rounds)]),
        }
    print(json.dumps(figures, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
