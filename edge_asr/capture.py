"""Listens to one microphone in a process of its own: sound drivers hang and crash, and the daemon must not.

Law: the process says something at each look, even if nothing has arrived; one that is silent for :data:`LIMIT_S` hangs.
It knows no positions: those are counted where it can be replaced without a gap in the count (``sources``).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import select
import socket
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from edge_asr.audio import Resampler
from edge_asr.clock import NS_PER_S, boottime_ns, until_next
from edge_asr.devices import DeviceError, Stream, is_out_of_sight, signs
from edge_asr.events import BYTES_PER_SAMPLE, SAMPLE_RATE
from edge_asr.process_state import resident_bytes
from edge_asr.settings import MicrophoneSource
from edge_asr.zygote import Zygote, ZygoteError

LIMIT_S: Final = 6.0
"""Opening a suspended or Bluetooth source may take 5 s, and something is said before and after it. A frozen sound
server is noticed by its silence after 2 s and costs 8 s."""

WEIGHING_INTERVAL_S: Final = 300.0
"""Between two looks at its memory."""

GROWTH_LIMIT_BYTES: Final = 64 << 20
"""Memory it may gain since it was first looked at before it is replaced in silence. It keeps no audio: a sound library
leaks, and at MemoryMax= it would be the kernel that picks the moment."""

RETRY_S: Final = 1.0
"""Between two looks for a lost device, and between two attempts to get it back while there is hope."""

HOPE_S: Final = 30.0
"""So long after the loss, and after each sign of a device: a sound server takes its time to find what is there."""

DIM_S: Final = 5.0
"""Between two attempts without a sign, for what only a sound server knows: each starts PortAudio, 30 ms of CPU time."""

BLIND_S: Final = 30.0
"""Between two attempts while the kernel has no such card; for who knows every driver."""

_LOOK_S: Final = 1.0
"""Between two looks at how long it has said nothing."""

_POLL_S: Final = 0.032
"""Between two looks at the device while somebody speaks: what a look costs is added to every answer."""

_IDLE_POLL_S: Final = 1.0
"""While nobody does: most of what silence costs is waking up. A beginning is heard so much later and caught up with; an
end is not, because by then somebody speaks: an utterance is a word and the gate's closing silence, 0.6 s. With 0.1 s
(`vad.min_silence_s`) a short one may be over before it is looked at, and is answered up to 1 s late."""

_PIECE_BYTES: Final = SAMPLE_RATE * BYTES_PER_SAMPLE
"""A socket takes no message of any size; after a pause there may be more."""

_MESSAGE_BYTES: Final = 2 * _PIECE_BYTES

_HELD_SAMPLES: Final = 60 * SAMPLE_RATE
"""No driver keeps more."""

_SPEAKING, _SILENT = b"\1", b"\0"


@dataclass(frozen=True, slots=True)
class Report:
    """What the process says at a look."""

    moment_ns: int
    """CLOCK_BOOTTIME of the look."""
    device: str = ""
    """Name of what is captured from."""
    rate: int = 0
    """Hz at which it is."""
    rate_error: float | None = None
    """Measured sample rate over the nominal one, less one; None: not known yet."""
    held_samples: float = 0.0
    """16 kHz samples that had arrived by then and come with later reports."""
    trouble: str = ""
    """Why the device is away; it is looked for."""
    pcm: bytes = b""
    """16 kHz mono."""

    def to_bytes(self) -> bytes:
        """As a message: a line of JSON, then the PCM. Not a pickle, for the sender may have corrupted memory."""
        head = [self.moment_ns, self.device, self.rate, self.rate_error, self.held_samples, self.trouble]
        return json.dumps(head).encode() + b"\n" + self.pcm

    @classmethod
    def from_bytes(cls, message: bytes) -> Report:
        """The other way. Raises ValueError for what cannot be."""
        head, _, pcm = message.partition(b"\n")
        try:
            moment_ns, device, rate, rate_error, held_samples, trouble = json.loads(head)
        except (TypeError, RecursionError) as error:
            raise ValueError(f"no report ({error})") from None
        if not (_is_whole(moment_ns) and 0 <= moment_ns <= boottime_ns()):
            raise ValueError("a moment that was not yet")
        if not (isinstance(device, str) and _is_whole(rate) and rate >= 0 and isinstance(trouble, str)):
            raise ValueError("a device that cannot be")
        if rate_error is not None and not (isinstance(rate_error, float) and math.isfinite(rate_error)):
            raise ValueError("a rate that cannot be")
        if not (isinstance(held_samples, (int, float)) and 0 <= held_samples <= _HELD_SAMPLES):  # nor NaN
            raise ValueError("more audio held back than a driver keeps")
        if len(pcm) % BYTES_PER_SAMPLE:
            raise ValueError("half a sample")
        return cls(moment_ns, device, rate, rate_error, held_samples, trouble, pcm)


def _is_whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


class RateMeter:
    """Measures how many samples a second a device really delivers; one that lies makes every voice a squeak or a growl.

    The median over pieces of two seconds: what a device holds back for a moment, or loses, changes only one of them.
    """

    PIECE_NS = 2 * NS_PER_S
    PIECES = 9

    def __init__(self, nominal: int) -> None:
        self._nominal = nominal
        self._began_ns: int | None = None
        self._samples = 0
        self._rates: deque[float] = deque(maxlen=self.PIECES)

    def feed(self, now_ns: int, samples: int) -> None:
        """Take what has just arrived."""
        if self._began_ns is None:  # what had waited in the driver says nothing
            self._began_ns = now_ns
            return
        self._samples += samples
        if now_ns - self._began_ns >= self.PIECE_NS:
            self._rates.append(self._samples * NS_PER_S / (now_ns - self._began_ns))
            self._began_ns, self._samples = now_ns, 0

    @property
    def error(self) -> float | None:
        """Measured over nominal rate, less one; None until that can be said."""
        if len(self._rates) < self.PIECES:
            return None
        return statistics.median(self._rates) / self._nominal - 1  # not numpy's, which loads masked arrays for it


class CaptureProcess:
    """One such process, as the daemon's event loop sees it."""

    def __init__(self, zygote: Zygote, options: MicrophoneSource, take: Callable[[Report], None]) -> None:
        self.pid: int | None = None
        self._zygote = zygote
        self._options = options
        self._take = take
        self._line: socket.socket | None = None
        self._speaking = True
        self._silent_s = 0.0
        """For how long it has said nothing while somebody looked: a box that is suspended or frozen hangs nowhere."""
        self._looked_s = 0.0
        """Up to when, in the event loop's time."""
        self._weighing_s = 0.0
        """When its memory is looked at next, in the same time."""
        self._first_bytes = 0
        """What it held when it was first looked at; 0: it was not yet."""
        self.nonsense = ""
        """What it said that cannot be, for which it is to be ended."""
        self._over = asyncio.Event()

    async def run(self) -> str:
        """From its fork until it is dead, is to end, hangs or grows: then the cause, a sentence. Raises ZygoteError."""
        loop = asyncio.get_running_loop()
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise ZygoteError(f"no line to a process ({error.strerror})") from None
        ours.setblocking(False)  # noqa: FBT003 - the standard library's
        with ours:
            with theirs:
                name = f"capture-{self._options.name}"
                self.pid = await asyncio.to_thread(self._zygote.fork, serve, theirs, name)
            self._line = ours
            self._tell(self._options.model_dump_json().encode())
            self.attend(speaking=self._speaking)
            loop.add_reader(ours, self._read)
            try:
                return await self._until_over()
            finally:
                loop.remove_reader(ours)
                self._line = None

    def attend(self, *, speaking: bool) -> None:
        """Say whether somebody speaks: then what is captured comes at once, else in larger pieces."""
        self._speaking = speaking
        self._tell(_SPEAKING if speaking else _SILENT)

    def stop(self) -> None:
        """Let :meth:`run` return."""
        self._over.set()

    async def end(self) -> str:
        """Make sure that it is gone; how it went, empty while it hangs in the kernel. Raises ZygoteError."""
        assert self.pid is not None  # noqa: S101 - run has forked it
        return await asyncio.to_thread(self._zygote.end, self.pid)

    def _tell(self, message: bytes) -> None:
        if self._line is not None:
            with contextlib.suppress(OSError):  # it is dead, or hangs: that is noticed elsewhere
                self._line.send(message)

    def _read(self) -> None:
        if self._line is None:
            return
        try:
            message = self._line.recv(_MESSAGE_BYTES)
        except OSError:
            message = b""
        loop = asyncio.get_running_loop()
        if message:
            try:
                self._take(Report.from_bytes(message))
            except (ValueError, TypeError) as error:
                self.nonsense = f"capture tells nonsense: {error}"
            else:
                self._silent_s, self._looked_s = 0.0, loop.time()
                return
        loop.remove_reader(self._line)
        self.stop()

    async def _until_over(self) -> str:
        """Return when it is dead or to be ended, or with what is wrong."""
        loop = asyncio.get_running_loop()
        self._silent_s, self._looked_s = 0.0, loop.time()
        self._weighing_s = self._looked_s + WEIGHING_INTERVAL_S
        while self._silent_s < LIMIT_S:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._over.wait(), min(until_next(_LOOK_S), LIMIT_S - self._silent_s))
                return ""
            now_s = loop.time()
            self._silent_s += min(now_s - self._looked_s, 2 * _LOOK_S)  # more: both of us were frozen or starved
            self._looked_s = now_s
            if now_s >= self._weighing_s and not self._speaking:
                self._weighing_s = now_s + WEIGHING_INTERVAL_S
                if too_much := self._weigh():
                    return too_much
        return f"the sound driver has not answered for {LIMIT_S:g} s"

    def _weigh(self) -> str:
        """That it has grown too large; empty: it has not."""
        assert self.pid is not None  # noqa: S101 - run has forked it
        with contextlib.suppress(OSError):  # it has just died
            held_bytes = resident_bytes(self.pid)
            self._first_bytes = self._first_bytes or held_bytes
            if held_bytes > self._first_bytes + GROWTH_LIMIT_BYTES:
                return f"capture has grown to {held_bytes >> 20} MB"
        return ""


def serve(line: socket.socket) -> None:
    """The process: captures from the microphone it is told, until the line is closed."""
    options = MicrophoneSource.model_validate_json(line.recv(_MESSAGE_BYTES))
    with contextlib.suppress(ConnectionError):
        _Listener(options, line).run()


class _Listener:
    """One microphone that may be absent, be unplugged, freeze, and come back."""

    def __init__(self, options: MicrophoneSource, line: socket.socket) -> None:
        self._options = options
        self._line = line
        self._words = select.poll()
        self._words.register(line, select.POLLIN)
        self._speaking = True
        self._retry_s = 0.0
        """Monotonic time at which a lost device is looked for again."""
        self._opened_s = -math.inf
        """Monotonic time of the last attempt to open it."""
        self._trouble = ""
        self._signs: tuple[object, ...] = ()
        self._hopes_until_s = 0.0
        """Monotonic time up to which it is tried at each look."""

    def run(self) -> None:
        """Capture until the line is closed."""
        while self._attempt() and self._rest(max(0.0, self._retry_s - time.monotonic())):
            pass

    def _attempt(self) -> bool:
        """Capture until the device is lost; false: until the line was closed."""
        wanted, now_s = self._options, time.monotonic()
        if self._trouble and self._is_vain(now_s):
            return self._lose(self._trouble)
        self._opened_s = now_s
        self._say(Report(boottime_ns()))
        try:
            stream = Stream(wanted.device, wanted.channel, wanted.rate, lambda: self._say(Report(boottime_ns())))
        except DeviceError as error:
            return self._lose(str(error))
        with contextlib.closing(stream):
            try:
                self._capture(stream)
            except DeviceError as error:
                self._hopes_until_s = time.monotonic() + HOPE_S
                return self._lose(str(error))  # before closing, which may hang
        return False

    def _is_vain(self, now_s: float) -> bool:
        """Whether another attempt would end as the last one did, as far as can be seen."""
        known, self._signs = self._signs, signs()
        if self._signs != known:
            self._hopes_until_s = now_s + HOPE_S
        if is_out_of_sight(self._options.device):
            return now_s < self._opened_s + BLIND_S
        return self._hopes_until_s <= now_s < self._opened_s + DIM_S

    def _lose(self, trouble: str) -> bool:
        self._trouble = trouble
        self._say(Report(boottime_ns(), trouble=trouble))
        self._retry_s = time.monotonic() + RETRY_S
        return True

    def _capture(self, stream: Stream) -> None:
        """Read until the line is closed. Raises DeviceError when the device is lost."""
        resampler, meter = Resampler(stream.rate), RateMeter(stream.rate)
        idle_s = min(_IDLE_POLL_S, max(_POLL_S, stream.patience_s))
        while self._rest(_POLL_S if self._speaking else until_next(idle_s)):
            block = stream.read()
            moment_ns, pcm = boottime_ns(), b""
            if len(block):
                meter.feed(moment_ns, len(block))
                pcm = resampler.feed(block)
            for start in range(0, max(1, len(pcm)), _PIECE_BYTES):
                piece, later = pcm[start : start + _PIECE_BYTES], len(pcm) - start - _PIECE_BYTES
                held = resampler.held_samples + max(0, later) // BYTES_PER_SAMPLE
                self._say(Report(moment_ns, stream.device.name, stream.rate, meter.error, held, pcm=piece))

    def _rest(self, seconds: float) -> bool:
        """Let some audio gather, unless there is a word from the daemon; false: the line is closed."""
        if self._words.poll(1000 * seconds):
            word = self._line.recv(1)
            self._speaking = word == _SPEAKING
            return bool(word)
        return True

    def _say(self, report: Report) -> None:
        self._line.sendall(report.to_bytes())
