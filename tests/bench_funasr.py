"""Decodes with funasr-onnx for tools/bench engine, in an interpreter that has it: audio in, CPU seconds out."""

from __future__ import annotations

import sys
import time

import numpy as np
from funasr_onnx import SenseVoiceSmall


def main() -> None:
    recognizer = SenseVoiceSmall(sys.argv[1], quantize=True, intra_op_num_threads=1)
    print("ready", flush=True)
    for line in sys.stdin:
        samples = np.frombuffer(bytes.fromhex(line), "<i2").astype(np.float32) / 32768
        began = time.thread_time()
        recognizer(samples, language="en", textnorm="woitn")
        print(time.thread_time() - began, flush=True)


if __name__ == "__main__":
    main()
