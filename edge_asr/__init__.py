"""edge-asr: speech in, transcripts and voice commands out over MQTT, on the device and offline-first.

Read the rooms in the order of ``tests/test_architecture.py``: a room imports only rooms above it.
One frame's way from the microphone to the broker is told in ``pipeline``.
"""

import os

# One utterance's matrices are small: a pool of threads costs more than it brings, and must not be forked (``worker``).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

__version__ = "0.1.0"
