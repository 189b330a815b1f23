"""Where audio comes from: a microphone that may vanish and come back, recordings, raw PCM on standard input.

Law: a source delivers whole frames with rising positions and ends when its audio ends or it was closed. Only the
microphone may lose audio, because the world does not wait; each lost sample makes the next frame's position jump and is
counted. Recordings and standard input wait for their consumer instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Final, Literal

import numpy as np

from edge_asr.audio import NS_PER_SAMPLE, AudioFileError, FrameCutter, Resampler, quiet, read_file
from edge_asr.capture import RETRY_S, CaptureProcess, Report
from edge_asr.clock import NS_PER_S, boottime_ns
from edge_asr.events import BYTES_PER_SAMPLE, FRAME_SAMPLES, SAMPLE_RATE, AudioFrame
from edge_asr.settings import FilesSource, MicrophoneSource, StdinSource
from edge_asr.zygote import Zygote, ZygoteError

log = logging.getLogger(__name__)

State = Literal["opening", "capturing", "lost", "closed"]
"""What a microphone is doing; lost: it is away, and looked for."""

BUFFER_S: Final = 5.0
"""Audio kept for a late consumer of the microphone; then the oldest goes."""

MAX_PAUSE_S: Final = 60.0
"""Between two processes of a driver that crashes again and again; the first is replaced at once."""

_CALM_S: Final = 60.0
"""A process that lived so long was none of those."""

_GAP_S: Final = 1.0
"""Quiet between two recordings, so that the speech detector ends one before the next begins."""

AUDIO_SUFFIXES: Final = (".wav", ".flac", ".ogg", ".opus", ".mp3")


class SourceError(Exception):
    """A source cannot deliver audio; the message names it and the remedy."""


class Timeline:
    """Ties sample positions to the clock, and so notices audio that a driver lost without a word.

    Sample ``i`` was captured at ``origin + i * NS_PER_SAMPLE``; the origin is the smallest delay seen, allowed to rise
    by 0.1 % for the drift between the card's clock and ours.
    """

    TOLERANCE_NS = NS_PER_S // 4
    PATIENCE_NS = NS_PER_S
    """A delay beyond the tolerance may be a backlog about to come in; after this long it is a loss."""

    def __init__(self) -> None:
        self._origin_ns: int | None = None
        self._seen_ns = 0
        self._behind_since_ns: int | None = None

    def captured_ns(self, position: int) -> int:
        """When the sample before ``position`` was captured."""
        if self._origin_ns is None:
            raise ValueError("nothing was heard yet")
        return self._origin_ns + position * NS_PER_SAMPLE

    def missing(self, now_ns: int, position: int, *, reopened: bool = False) -> int:
        """Samples lost before ``position``, the end of what has just arrived; after a reopening without patience."""
        delay_ns = now_ns - position * NS_PER_SAMPLE
        if self._origin_ns is None:
            self._origin_ns, self._seen_ns = delay_ns, now_ns
            return 0
        self._origin_ns = min(delay_ns, self._origin_ns + (now_ns - self._seen_ns) // 1000)
        self._seen_ns = now_ns
        behind_ns = delay_ns - self._origin_ns
        if not reopened and behind_ns < self.TOLERANCE_NS:
            self._behind_since_ns = None
            return 0
        if self._behind_since_ns is None:
            self._behind_since_ns = now_ns
        if not reopened and now_ns - self._behind_since_ns < self.PATIENCE_NS:
            return 0
        self._behind_since_ns = None
        return max(behind_ns // NS_PER_SAMPLE, 1)


class _Mailbox:
    """Frames that wait for their consumer; when it is full the oldest goes."""

    def __init__(self) -> None:
        self._frames: deque[AudioFrame] = deque()
        self._news = asyncio.Event()
        self._ended = False

    def put(self, frames: Sequence[AudioFrame]) -> int:
        """The number of samples that had to go."""
        self._frames += frames
        surplus = max(0, len(self._frames) - round(BUFFER_S * SAMPLE_RATE / FRAME_SAMPLES))
        for _ in range(surplus):
            self._frames.popleft()
        self._news.set()
        return surplus * FRAME_SAMPLES

    def end(self) -> None:
        """Nothing more will come."""
        self._ended = True
        self._news.set()

    async def get(self) -> AudioFrame | None:
        """The next frame; None after the last."""
        while not self._frames:
            if self._ended:
                return None
            self._news.clear()
            await self._news.wait()
        return self._frames.popleft()


class Microphone:
    """A sound card that may be absent, be unplugged, freeze, crash its driver, and come back.

    A process of its own listens to it (``capture``); a dead or hanging one is replaced, and positions and times go on.
    """

    def __init__(self, settings: MicrophoneSource, zygote: Zygote) -> None:
        self.name = settings.name
        self.state: State = "opening"
        self.device_name: str | None = None
        """Of the device that is or was last captured."""
        self.lost_samples = 0
        """The sum of all jumps of the position: the consumer came too late, or the device was away."""
        self.last_frame_ns: int | None = None
        """CLOCK_BOOTTIME of the newest frame's last sample."""
        self.trouble = ""
        """Why the device is away; empty while it is there."""
        self.rate_error: float | None = None
        """Measured sample rate over the nominal one, less one; None: not known yet."""
        self.replaced = 0
        """Capture processes that died, hung or grew too large."""
        self._settings = settings
        self._zygote = zygote
        self._cutter = FrameCutter(settings.name)
        self._timeline = Timeline()
        self._speaking = True
        self._crashes = 0
        """Processes that died one soon after the other."""
        self._told: set[str] = set()
        """What is not logged again before one has lived for a while."""
        self._closing = asyncio.Event()
        self._mailbox = _Mailbox()
        self._process: CaptureProcess | None = None
        self._capturing: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The process of this moment."""
        return None if self._process is None else self._process.pid

    async def frames(self) -> AsyncIterator[AudioFrame]:
        """Start capturing; ends after :meth:`close`. To be called once."""
        self._capturing = asyncio.create_task(self._keep_capturing(), name=f"capture:{self.name}")
        try:
            while (frame := await self._mailbox.get()) is not None:
                yield frame
        finally:
            self._halt()
        await self._capturing  # raises what is wrong with it

    def attend(self, *, speaking: bool) -> None:
        """Say whether somebody speaks: then what is captured is handed on at once, else in larger pieces."""
        self._speaking = speaking
        if self._process is not None:
            self._process.attend(speaking=speaking)

    async def close(self) -> None:
        """Let go of the device; the frames that wait are still delivered."""
        self._halt()
        if self._capturing is not None:
            await asyncio.wait([self._capturing])
        self.state = "closed"

    def _halt(self) -> None:
        self._closing.set()
        if self._process is not None:
            self._process.stop()

    async def _keep_capturing(self) -> None:
        """Let one process after the other listen, until closed."""
        try:
            while not self._closing.is_set():
                try:
                    await self._pause(await self._let_capture())
                except ZygoteError as error:
                    await self._do_without(error)
        finally:
            self._mailbox.end()

    async def _let_capture(self) -> float:
        """Let one process listen until it is gone; seconds to wait before the next. Raises ZygoteError."""
        self._process = process = CaptureProcess(self._zygote, self._settings, self._take)
        process.attend(speaking=self._speaking)
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        fault = await process.run()
        pause_s = RETRY_S if self.state == "lost" else 0.0
        if loop.time() - began_s >= _CALM_S:
            self._crashes, self._told = 0, set()
        if fault:
            self._fail(fault)
        how = await process.end()
        if not (fault or self._closing.is_set()):
            self._fail(process.nonsense or f"capture ended by {how or 'itself'}")
            self._crashes += 1
            if self._crashes > 1:
                pause_s = max(pause_s, min(MAX_PAUSE_S, 2.0 ** (self._crashes - 1)))
        await self._outlive(process, how)
        return pause_s

    async def _outlive(self, process: CaptureProcess, how: str) -> None:
        """Wait for the end of a process that hangs in the kernel: another would hang there beside it."""
        if how or self._closing.is_set():
            return
        self._lose(f"process {process.pid} hangs in its driver, where no signal ends it; unplug it or restart the box")
        log.error("%s: %s", self.name, self.trouble)
        while not (how or self._closing.is_set()):
            await self._pause(RETRY_S)
            how = await process.end()

    async def _do_without(self, error: ZygoteError) -> None:
        if self._closing.is_set():
            return
        trouble = f"no process can capture: {error}"
        if self._zygote.is_dead:  # the watchdog sees to it
            self._lose(trouble)
            await self._closing.wait()
            return
        if trouble not in self._told:
            self._told.add(trouble)
            log.error("%s: %s; trying again every %g s", self.name, trouble, RETRY_S)
        self._lose(trouble)
        await self._pause(RETRY_S)

    def _fail(self, cause: str) -> None:
        self.replaced += 1
        if cause not in self._told:  # once for all that end in the same way
            self._told.add(cause)
            log.error("%s: %s; a new process takes its place", self.name, cause)
        self._lose(cause)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._closing.wait(), seconds)

    def _take(self, report: Report) -> None:
        """Hear what the process says."""
        if report.trouble:
            if self.state != "lost":
                log.warning("%s: %s; looking for it", self.name, report.trouble)
            self._lose(report.trouble)
        elif report.pcm:
            self._hear(report)

    def _lose(self, trouble: str) -> None:
        if self.state == "capturing" and self.last_frame_ns is not None:  # what is being said ends here
            self.lost_samples += self._cutter.skip(1)
            self._mailbox.put([self._cutter.cut_off(self.last_frame_ns)])
        self.state, self.trouble, self.rate_error = "lost", trouble, None

    def _hear(self, report: Report) -> None:
        reopened = self.state == "lost" and self.device_name is not None
        end = self._cutter.end + len(report.pcm) // BYTES_PER_SAMPLE
        missing = self._timeline.missing(report.moment_ns, end + round(report.held_samples), reopened=reopened)
        if missing:
            self.lost_samples += self._cutter.skip(missing)
        if self.state != "capturing":
            gap_s = missing / SAMPLE_RATE
            log.info("%s: capturing from %r at %d Hz, %.1f s missed", self.name, report.device, report.rate, gap_s)
            self.device_name, self.state, self.trouble = report.device, "capturing", ""
        self.rate_error = report.rate_error
        end = self._cutter.end + len(report.pcm) // BYTES_PER_SAMPLE
        frames = self._cutter.feed(report.pcm, self._timeline.captured_ns(end))
        if frames:
            self.last_frame_ns = frames[-1].captured_ns
            self.lost_samples += self._mailbox.put(frames)


def audio_files(path: Path) -> list[Path]:
    """The file itself, or a directory's recordings in the order of their names. Raises AudioFileError."""
    if not path.is_dir():
        return [path]
    try:
        found = [entry for entry in path.iterdir() if entry.suffix.lower() in AUDIO_SUFFIXES and entry.name[0] != "."]
    except OSError as error:
        raise AudioFileError(f"{path}: cannot be listed ({error.strerror}); check its permissions") from None
    if not found:
        raise AudioFileError(f"{path}: holds no recording ({' '.join(AUDIO_SUFFIXES)}); name another directory")
    return sorted(found)


class Files:
    """Recordings, played one after the other with a quiet second between them; nothing is ever lost.

    A file that cannot be played is one warning and the next one's turn; with ``strict`` it raises AudioFileError.
    """

    def __init__(self, settings: FilesSource, *, strict: bool = False) -> None:
        self.name = settings.name
        self.played = 0
        """Recordings played or begun."""
        self.unplayable = 0
        self._settings = settings
        self._strict = strict
        self._closed = False
        self._start_ns: int | None = None

    async def frames(self) -> AsyncIterator[AudioFrame]:
        """Deliver each frame when its last sample would have been captured, or as fast as they are taken."""
        cutter = FrameCutter(self.name)
        async for pcm in self._recordings():
            for start in range(0, len(pcm), FRAME_SAMPLES * BYTES_PER_SAMPLE):
                piece = pcm[start : start + FRAME_SAMPLES * BYTES_PER_SAMPLE]
                captured_ns = await self._moment(cutter.end + len(piece) // BYTES_PER_SAMPLE)
                if self._closed:
                    return
                for frame in cutter.feed(piece, captured_ns):
                    yield frame
        for frame in cutter.flush(boottime_ns()):
            yield frame

    async def close(self) -> None:
        """End at the next frame."""
        self._closed = True

    async def _moment(self, position: int) -> int:
        """Wait for the moment in which the sample before ``position`` is due; deadlines from the start do not drift."""
        now_ns = boottime_ns()
        if not self._settings.realtime:
            await asyncio.sleep(0)
            return now_ns
        if self._start_ns is None:
            self._start_ns = now_ns
        due_ns = self._start_ns + position * NS_PER_SAMPLE
        await asyncio.sleep(max(0, due_ns - now_ns) / NS_PER_S)
        return due_ns

    async def _recordings(self) -> AsyncIterator[bytes]:
        for path in self._settings.paths:
            try:
                files = audio_files(path)
            except AudioFileError as error:
                self._refuse(error)
                continue
            for file in files:
                try:
                    pcm = await asyncio.to_thread(read_file, file)
                except AudioFileError as error:
                    self._refuse(error)
                    continue
                if self.played:
                    yield quiet(round(_GAP_S * SAMPLE_RATE))
                self.played += 1
                yield pcm

    def _refuse(self, error: AudioFileError) -> None:
        if self._strict:
            raise error
        self.unplayable += 1
        log.warning("%s: %s", self.name, error)


class Stdin:
    """Raw mono PCM from standard input or another binary stream with a file descriptor, e.g. a pipe of ``arecord``."""

    def __init__(self, settings: StdinSource, stream: BinaryIO | None = None) -> None:
        self.name = settings.name
        self._rate = settings.rate
        self._stream = stream
        self._closed = threading.Event()

    async def frames(self) -> AsyncIterator[AudioFrame]:
        """Everything until the end of the stream. A slow consumer makes the writer wait. Raises SourceError."""
        stream = self._stream or sys.stdin
        if stream is None:
            raise SourceError(f"{self.name}: standard input is closed; pipe raw 16-bit PCM into it")
        resampler, cutter, half = Resampler(self._rate), FrameCutter(self.name), b""
        reader = ThreadPoolExecutor(1, thread_name_prefix=f"stdin-{self.name}")
        try:
            while data := await asyncio.get_running_loop().run_in_executor(reader, self._read, stream.fileno()):
                if cutter.end == 0 and data.startswith(b"RIFF"):
                    convert = f"sox FILE -r {self._rate} -c 1 -b 16 -e signed -t raw -"
                    raise SourceError(f"{self.name}: gets a WAV file; convert it to raw PCM: `{convert}`")
                whole = (len(half) + len(data)) // BYTES_PER_SAMPLE * BYTES_PER_SAMPLE
                data, half = (half + data)[:whole], (half + data)[whole:]
                pcm = resampler.feed(np.frombuffer(data, dtype="<i2"))
                for frame in cutter.feed(pcm, boottime_ns() - round(resampler.held_samples * NS_PER_SAMPLE)):
                    yield frame
        finally:
            self._closed.set()
            reader.shutdown(wait=False)
        if half:
            log.warning("%s: the stream ended in half a sample, which is left out; is it 16-bit PCM?", self.name)
        now_ns = boottime_ns()
        for frame in (*cutter.feed(resampler.flush(), now_ns), *cutter.flush(now_ns)):
            yield frame

    async def close(self) -> None:
        """End as if the stream had ended; what was read is still delivered."""
        self._closed.set()

    def _read(self, descriptor: int) -> bytes:
        """The next bytes; none at the end or after closing. Never blocks for long, so that closing is heard."""
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while not self._closed.is_set():
            if poll.poll(100):
                return os.read(descriptor, 8192)
        return b""
