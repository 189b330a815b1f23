"""A WHIP client that is none of ours: FFmpeg's muxer, fed with a recording in real time; a program of its own.

    python -m tests.whip_by_ffmpeg URL TOKEN RECORDING CERTIFICATE KEY

The certificate is for DTLS, on P-256: the one that FFmpeg makes by itself with GnuTLS is refused by OpenSSL.
"""

from __future__ import annotations

import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from edge_asr.audio import quiet, read_file

PIECE = 960
"""20 ms at 48 kHz."""


def main(url: str, token: str, recording: str, certificate: str, key: str) -> None:
    pcm = np.frombuffer(quiet(8000) + read_file(Path(recording)) + quiet(24_000), "<i2").reshape(1, -1).copy()
    spoken = av.AudioFrame.from_ndarray(pcm, format="s16", layout="mono")
    spoken.rate = 16_000
    resampler = av.AudioResampler("s16", "stereo", 48_000, frame_size=PIECE)
    options = {"authorization": token, "cert_file": certificate, "key_file": key}
    with av.open(url, "w", format="whip", options=options) as call:
        stream = call.add_stream("libopus", rate=48_000)
        stream.layout, stream.bit_rate = "stereo", 96_000
        began = time.monotonic()
        for number, frame in enumerate([*resampler.resample(spoken), *resampler.resample(None)], 1):
            frame.pts, frame.time_base = (number - 1) * PIECE, Fraction(1, 48_000)
            time.sleep(max(0.0, began + number * PIECE / 48_000 - time.monotonic()))
            call.mux(stream.encode(frame))
        call.mux(stream.encode(None))


if __name__ == "__main__":
    main(*sys.argv[1:])
