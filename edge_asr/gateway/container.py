"""Decodes a live WebM or Ogg stream of Opus, as browsers' MediaRecorder sends it, into a talk.

Law: only the first bytes of such a stream carry its header, so one talk has one demuxer, and its bytes come without a
gap. libavformat reads when it likes, therefore it runs in a thread of its own between two bounds: what waits to be
read, and the talk's buffer. It may open Opus in these two containers and nothing else.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import io
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, Literal

import av
import numpy as np
from av.container import InputContainer
from numpy.typing import NDArray

from edge_asr.audio import Resampler
from edge_asr.events import BYTES_PER_SAMPLE, SAMPLE_RATE
from edge_asr.gateway.talk import Talk

OPUS_RATE: Final = 48_000
"""Opus decodes to it, whatever the microphone had."""

MAX_WAITING_BYTES: Final = 256 * 1024
"""About a minute of Opus as browsers encode it."""

_OPTIONS: Final = {
    "codec_whitelist": "opus,libopus",
    "format_whitelist": "matroska,webm,ogg",
    "probesize": "2048",
    "analyzeduration": "0",
}


class ContainerError(Exception):
    """The stream cannot be decoded."""


class Container:
    """The bytes of one talk go in; its samples go to the talk."""

    def __init__(self, kind: Literal["webm", "ogg"], talk: Talk, failed: Callable[[str], None]) -> None:
        self.position = 0
        """Index of the byte that is expected next."""
        self._talk = talk
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._bytes: deque[bytes] = deque()
        self.waiting_bytes = 0
        """Not read by libavformat yet."""
        self._ended = self._torn = False
        self._changed = threading.Condition()
        self._room = asyncio.Event()
        self._thread = threading.Thread(target=self._decode, args=[kind], name=f"demux-{talk.name}", daemon=True)
        self._thread.start()

    async def put(self, position: int, data: bytes) -> None:
        """Take bytes from ``position`` on; waits while too many wait. Raises ContainerError on a gap.

        What comes after the end, or after a thread that has given up, nobody would ever read.
        """
        known = self.position - position
        if known < 0:
            raise ContainerError(f"bytes {self.position} to {position} are missing; start another talk")
        fresh = data[known:]
        self.position += len(fresh)
        with self._changed:
            if self._ended:
                return
            self._bytes.append(fresh)
            self.waiting_bytes += len(fresh)
            self._changed.notify()
        while self.waiting_bytes > MAX_WAITING_BYTES:
            self._room.clear()
            await self._room.wait()

    def end(self, *, torn: bool = False) -> None:
        """The stream is over, or torn off: what is in it is still decoded, then the talk ends."""
        with self._changed:
            if not self._ended:
                self._ended, self._torn = True, torn
            self._changed.notify()

    def read(self, size: int) -> bytes:
        """For libavformat, in the thread: the next bytes; none at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._bytes or self._ended)
            if not self._bytes:
                return b""
            piece = self._bytes.popleft()
            if len(piece) > size:
                self._bytes.appendleft(piece[size:])
            self.waiting_bytes -= len(piece[:size])
        self._call(self._room.set)
        return piece[:size]

    def _decode(self, kind: str) -> None:
        """Body of the thread."""
        position = 0
        torn = True
        try:
            with av.open(self, "r", format=kind, options=_OPTIONS, buffer_size=1024) as stream:
                for samples in _decoded(stream):
                    self._deliver(position, samples)
                    position += len(samples)
            torn = self._torn
        except (av.FFmpegError, ContainerError, ValueError, IndexError) as error:  # IndexError: there is no audio
            if self.position:
                self._call(self._failed, f"this is no {kind} stream of Opus ({error})"[:200])
        finally:
            with self._changed:
                self._ended = True
                self._bytes.clear()
                self.waiting_bytes = 0
            self._call(functools.partial(self._talk.end, torn=torn))
            self._call(self._room.set)

    def _deliver(self, position: int, samples: NDArray[np.float32]) -> None:
        """Hand samples to the talk, and wait while it is full."""
        if self._talk.ended:
            raise ContainerError("the talk is over")
        putting = self._talk.put(position, samples)
        try:
            asyncio.run_coroutine_threadsafe(putting, self._loop).result()
        except (RuntimeError, concurrent.futures.CancelledError):  # the loop is closed, or about to be
            putting.close()
            raise ContainerError("the gateway is closing") from None

    def _call(self, work: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(work, *arguments)


def decode(data: bytes, max_s: float) -> bytes:
    """16 kHz mono of a whole WebM file of Opus. Raises ContainerError."""
    resampler, pcm = Resampler(OPUS_RATE), bytearray()
    try:
        with av.open(io.BytesIO(data), "r", format="webm", options=_OPTIONS) as stream:
            for samples in _decoded(stream):
                pcm += resampler.feed(samples)
                if len(pcm) > max_s * SAMPLE_RATE * BYTES_PER_SAMPLE:
                    raise ContainerError(f"this is longer than {max_s:g} s; cut it into pieces")
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise ContainerError(f"this is no WebM file of Opus ({error})"[:200]) from None
    return bytes(pcm + resampler.flush())


def opus_decoder(header: bytes | None) -> av.AudioCodecContext:
    """A decoder of floats at 48 kHz; mono unless the stream's header says otherwise."""
    codec: av.AudioCodecContext = av.CodecContext.create("libopus", "r")
    if header is not None:
        codec.extradata = header
    else:
        codec.layout = "mono"
    codec.options = {"request_sample_fmt": "flt"}
    return codec


def _decoded(stream: InputContainer) -> Iterator[NDArray[np.float32]]:
    """Mono samples at 48 kHz, by libopus in floats: to 1e-7 what libsndfile makes of the same packets."""
    audio = stream.streams.audio[0]
    if audio.codec_context is None:  # FFmpeg has no decoder for the codec it names
        raise ValueError("its codec is unknown")
    codec = opus_decoder(audio.codec_context.extradata)
    for packet in stream.demux(audio):
        for frame in codec.decode(packet if packet.size else None):
            samples = frame.to_ndarray().reshape(-1, len(frame.layout.channels))
            yield samples.mean(axis=1, dtype=np.float32)
