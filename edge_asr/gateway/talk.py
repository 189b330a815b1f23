"""One talk: what a station says between pressing and letting go of the button, as a source of the pipeline.

Law: what the sender numbered twice is heard once; a jump of its numbers is lost audio, made visible as a jump of the
frames' positions. Where the sender can wait (a WebSocket), :meth:`Talk.put` waits while :data:`BUFFER_S` are not heard
yet; where it cannot (WebRTC), a longer buffer bridges what the recognizer is behind (:data:`OFFERED_S`), and only
beyond it the oldest audio goes, visibly as well. A talk that does not end by its sender's own word may lack its last
words, so it ends in such a jump; one that does not begin at 0 begins with one. Audio that comes late was captured when
it was spoken: a command that waited in a tablet's memory has lived since then.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_asr.audio import NS_PER_SAMPLE, FrameCutter, Resampler
from edge_asr.clock import boottime_ns
from edge_asr.events import BYTES_PER_SAMPLE, FRAME_SAMPLES, SAMPLE_RATE, AudioFrame
from edge_asr.sources import Timeline

BUFFER_S: Final = 5.0
OFFERED_S: Final = 60.0
"""2 MB, while the recognizer is behind by more than eight utterances of this station, and at no other time."""

AT_ONCE: Final = 16
"""Frames, half a second, before others have their turn: a whole buffer is 25 ms of the speech detector's work."""

_FRAMES_PER_S: Final = SAMPLE_RATE / FRAME_SAMPLES


class Talk:
    """Audio of any rate goes in, numbered by its sender; frames of the pipeline come out."""

    def __init__(
        self, source: str, number: int, *, rate: int = SAMPLE_RATE, channels: int = 1, age_ns: int = 0
    ) -> None:
        self.name = source
        self.number = number
        """Counted by the client, from 1."""
        self.position = 0
        """Index of the sample, in the sender's rate, that is expected next."""
        self.taken = 0
        """Samples that really came and were new, in the sender's rate."""
        self._counted = 0
        """Of these, what :meth:`count_s` has returned."""
        self.lost_samples = 0
        """Samples at 16 kHz that the sender skipped or the buffer could not hold."""
        self.ended = False
        self.torn = False
        """Whether it was cut off, rather than ended by its sender."""
        self.rate = rate
        """Hz, of what is put in."""
        self._resampler = Resampler(rate, channels)
        self._cutter = FrameCutter(source)
        self._timeline = Timeline()
        self._timeline.missing(boottime_ns() - age_ns, 0)
        self._frames: deque[AudioFrame] = deque()
        self._news = asyncio.Event()
        self._room = asyncio.Event()

    async def put(self, position: int, samples: NDArray[Any]) -> None:
        """Take samples from ``position`` on, ``(n,)`` or ``(n, channels)``; waits while the buffer is full."""
        self._cut(position, samples)
        while len(self._frames) > BUFFER_S * _FRAMES_PER_S and not self.ended:
            self._room.clear()
            await self._room.wait()

    def offer(self, position: int, samples: NDArray[Any]) -> None:
        """Take samples without waiting; when the buffer is full the oldest go."""
        self._cut(position, samples)
        while len(self._frames) > OFFERED_S * _FRAMES_PER_S:
            self._frames.popleft()
            self.lost_samples += FRAME_SAMPLES

    def count_s(self) -> float:
        """Seconds that came and were new since this was asked last."""
        new, self._counted = self.taken - self._counted, self.taken
        return new / self.rate

    def end(self, *, torn: bool = False) -> None:
        """Nothing more will come; ``torn``: though more may have been said."""
        if not self.ended:
            self._deliver(self._resampler.flush())
            self._frames += self._cutter.flush(boottime_ns())
            if torn:
                self._cutter.skip(1)
                self._frames.append(self._cutter.cut_off(boottime_ns()))
            self.ended, self.torn = True, torn
        self._news.set()
        self._room.set()

    async def frames(self) -> AsyncIterator[AudioFrame]:
        """Everything that was put in, until the end; what waits is handed over in pieces, between which others work."""
        handed_over = 0
        while True:
            self._news.clear()
            if self._frames:
                frame = self._frames.popleft()
                self._room.set()
                yield frame
                handed_over += 1
                if handed_over % AT_ONCE == 0:
                    await asyncio.sleep(0)
            elif self.ended:
                return
            else:
                handed_over = 0
                await self._news.wait()

    async def close(self) -> None:
        """End early; what was put in is still delivered."""
        self.end(torn=True)

    def _cut(self, position: int, samples: NDArray[Any]) -> None:
        if self.ended:
            return
        known = self.position - position
        if known > 0:
            samples = samples[known:]
        elif known < 0:
            if not self.taken:
                self._frames.append(self._cutter.cut_off(boottime_ns()))
            lost = max(1, round(-known * SAMPLE_RATE / self.rate))
            self.lost_samples += self._cutter.skip(lost)
            self.position = position
        self.position += len(samples)
        self.taken += len(samples)
        if len(samples):
            self._deliver(self._resampler.feed(samples))

    def _deliver(self, pcm: bytes) -> None:
        """Cut into frames with the times at which they were spoken."""
        if not pcm:
            return
        end = self._cutter.end + len(pcm) // BYTES_PER_SAMPLE
        now_ns = boottime_ns()
        self._timeline.missing(now_ns - round(self._resampler.held_samples * NS_PER_SAMPLE), end)
        self._frames += self._cutter.feed(pcm, self._timeline.captured_ns(end))
        self._news.set()


def from_pcm16(data: bytes | memoryview) -> NDArray[np.int16]:
    """Signed 16-bit little-endian samples. Raises ValueError on half a sample."""
    if len(data) % BYTES_PER_SAMPLE:
        raise ValueError(f"{len(data)} bytes of 16-bit PCM end in half a sample")
    return np.frombuffer(data, dtype="<i2")
