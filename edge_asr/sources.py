"""Where audio comes from: a microphone that may vanish and come back, recordings, raw PCM on standard input.

Law: a source delivers whole frames with rising positions and ends when its audio ends or it was closed. Only the
microphone may lose audio, because the world does not wait; each lost sample makes the next frame's position jump and is
counted. Recordings and standard input wait for their consumer instead.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import functools
import logging
import os
import platform
import re
import select
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import numpy as np
from numpy.typing import NDArray

from edge_asr.audio import (
    NS_PER_SAMPLE,
    AudioFileError,
    FrameCutter,
    Levels,
    Resampler,
    measure,
    quiet,
    read_file,
)
from edge_asr.clock import NS_PER_S, boottime_ns
from edge_asr.events import BYTES_PER_SAMPLE, FRAME_SAMPLES, SAMPLE_RATE, AudioFrame
from edge_asr.settings import FilesSource, MicrophoneSource, StdinSource

log = logging.getLogger(__name__)

State = Literal["opening", "capturing", "lost", "closed"]
"""What a microphone is doing; lost: it is away, and looked for."""

BUFFER_S: Final = 5.0
"""Audio kept for a late consumer of the microphone; then the oldest goes."""

RETRY_S: Final = 1.0
"""Between two attempts to get a lost device back."""

STALL_S: Final = 2.0
"""A device that delivers nothing for so long is lost, whatever it says of itself: PortAudio's `active` stays true."""

_START_S: Final = 5.0
"""The first samples may take longer: Bluetooth headsets and suspended PulseAudio sources need 2 s."""

_POLL_S: Final = 0.032
"""Between two looks at the device while somebody speaks: what a look costs is added to every answer."""

_IDLE_POLL_S: Final = 0.5
"""While nobody does: most of what silence costs is waking up. A beginning is heard so much later and caught up with; an
end is not, because by then somebody speaks."""

_HOST_BUFFER_S: Final = 1.5
"""What the driver is asked to keep while the capture thread does not run: a busy interpreter may hold it up for more
than 0.2 s. Some cards have less."""

_CLOSE_S: Final = 1.0
_PR_SET_NAME: Final = 15
_GAP_S: Final = 1.0
"""Quiet between two recordings, so that the speech detector ends one before the next begins."""

ALSA_CARDS: Final = Path("/proc/asound/cards")
AUDIO_SUFFIXES: Final = (".wav", ".flac", ".ogg", ".opus", ".mp3")


class SourceError(Exception):
    """A source cannot deliver audio; the message names it and the remedy."""


@dataclass(frozen=True, slots=True)
class Device:
    """An input device as PortAudio lists it."""

    index: int
    """Its place in the list of this moment; another device's after the next plugging."""
    name: str
    alsa_id: str | None
    """``hw:CARD=Array,DEV=0``: stays the same over plugging and reboots, so it belongs into the settings."""
    channels: int
    rate: int
    """Hz, its default."""
    is_default: bool


def list_devices() -> list[Device]:
    """Every input device that is there now. Raises SourceError."""
    portaudio = _portaudio()
    with portaudio.opening():
        return portaudio.devices()


def levels(device: str | int = "default", channel: int = 1) -> Iterator[Levels]:
    """Listen to a device and yield its levels ten times a second, for ever; as in the settings. Raises SourceError."""
    for pcm in _pieces(device, channel, SAMPLE_RATE // 10):
        yield measure(pcm)


def record(device: str | int = "default", seconds: float = 1.0, channel: int = 1) -> bytes:
    """What a device hears in a moment, 16 kHz mono; named as in the settings. Raises SourceError."""
    pieces = _pieces(device, channel, round(seconds * SAMPLE_RATE))
    with contextlib.closing(pieces):
        return next(pieces)


def _pieces(device: str | int, channel: int, samples: int) -> Generator[bytes, None, None]:
    with contextlib.closing(_Stream(device, channel, None)) as stream:
        resampler, pcm = Resampler(stream.rate), b""
        while True:
            pcm += resampler.feed(stream.read())
            while len(pcm) >= samples * BYTES_PER_SAMPLE:
                piece, pcm = pcm[: samples * BYTES_PER_SAMPLE], pcm[samples * BYTES_PER_SAMPLE :]
                yield piece
            time.sleep(_POLL_S)


def choose_device(wanted: str | int, devices: Sequence[Device]) -> Device:
    """The device that a setting means: ``default``, an index, an ALSA id, or part of a name. Raises SourceError."""
    if not devices:
        raise SourceError("no microphone found; plug one in, see `edge-asr devices`, or use --demo")
    if isinstance(wanted, int):
        found = [device for device in devices if device.index == wanted]
    elif wanted == "default":
        found = [device for device in devices if device.is_default]
    elif "CARD=" in wanted:
        alsa_id = wanted.removeprefix("plug")
        found = [d for d in devices if d.alsa_id is not None and f"{d.alsa_id},".startswith(f"{alsa_id},")][:1]
    else:
        found = [device for device in devices if wanted.lower() in device.name.lower()]
        found = [device for device in found if device.name.lower() == wanted.lower()] or found
    if not found:
        raise SourceError(f"no microphone is {wanted!r}; `edge-asr devices` lists what is there")
    if len(found) > 1:
        names = ", ".join(repr(device.name) for device in found)
        raise SourceError(f"{wanted!r} fits several microphones ({names}); use an id that `edge-asr devices` lists")
    return found[0]


def alsa_cards(listing: str) -> dict[int, str]:
    """Card ids by card number, out of the text of /proc/asound/cards."""
    return {int(number): card for number, card in re.findall(r"^ *(\d+) \[(\S+) *\]:", listing, re.MULTILINE)}


class _Quiet:
    """Sends what C libraries print to nowhere while entered: PortAudio and alsa-lib write a screenful per failure.

    Only glibc's variable ``stderr`` is exchanged; Python's standard error and file descriptor 2 are not touched.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entered = 0
        self._stderr: ctypes.c_void_p | None = None
        if platform.libc_ver()[0] == "glibc":  # elsewhere the variable is constant
            libc = ctypes.CDLL(None)
            libc.fopen.restype = ctypes.c_void_p
            self._stderr = ctypes.c_void_p.in_dll(libc, "stderr")
            self._real, self._null = self._stderr.value, libc.fopen(b"/dev/null", b"w")

    def __enter__(self) -> None:
        self._count(+1)

    def __exit__(self, *_: object) -> None:
        self._count(-1)

    def _count(self, step: int) -> None:
        with self._lock:
            self._entered += step
            if self._stderr is not None:
                self._stderr.value = self._null if self._entered else self._real


class _PortAudio:
    """The process's one PortAudio: its device list is frozen when it starts, and it is not made for threads.

    Opening, closing and listing take turns. Starting it anew is what shows new devices, but pulls every open stream
    from under its reader, so that happens only while none is open; when a card has come or gone, ``stale`` asks the
    readers to step aside for a moment.
    """

    def __init__(self) -> None:
        self.quiet = _Quiet()
        try:
            with self.quiet:
                import sounddevice  # noqa: PLC0415 - loads the system's library, which may be missing
        except OSError:
            raise SourceError("PortAudio is not installed; `apt install libportaudio2`") from None
        self.sounddevice = sounddevice
        self.streams = 0
        self.stale = False
        self._turn = threading.Condition()
        self._cards = _cards_listing()

    @contextlib.contextmanager
    def opening(self) -> Iterator[None]:
        """Hold the library alone, with a device list as fresh as can be."""
        with self._turn, self.quiet:
            if self.streams and _cards_listing() != self._cards:
                self.stale = True
                self._turn.wait_for(lambda: self.streams == 0 or not self.stale, timeout=_CLOSE_S)
            if self.streams == 0:
                self._restart()
            try:
                yield
            finally:
                self._forget()

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Hold the library alone to close a stream."""
        with self._turn, self.quiet:
            yield
            self.streams -= 1
            self._turn.notify_all()

    def _forget(self) -> None:
        """Let alsa-lib drop the plug-ins that only listing has loaded: Debian's are 12 MB of video codecs."""
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libasound.so.2").snd_config_update_free_global()

    def _restart(self) -> None:
        cards = _cards_listing()
        # Not sounddevice's own functions: they send the whole process's standard error to nowhere meanwhile.
        library = self.sounddevice._lib  # noqa: SLF001
        library.Pa_Terminate()
        try:
            self.sounddevice._check(library.Pa_Initialize())  # noqa: SLF001
        except self.sounddevice.PortAudioError as error:
            raise SourceError(f"PortAudio does not start ({_reason(error)}); check the sound driver") from None
        self._cards, self.stale = cards, False

    def devices(self) -> list[Device]:
        """Input devices; only while held."""
        cards = alsa_cards(self._cards)
        try:
            default = self.sounddevice.query_devices(kind="input")["index"]
        except self.sounddevice.PortAudioError:
            default = -1
        return [
            Device(
                info["index"],
                info["name"],
                _alsa_id(info["name"], cards),
                info["max_input_channels"],
                round(info["default_samplerate"]),
                info["index"] == default,
            )
            for info in self.sounddevice.query_devices()
            if info["max_input_channels"] > 0
        ]


_loading = threading.Lock()


def _portaudio() -> _PortAudio:
    with _loading:  # a cache alone would let two threads make two
        return _load_portaudio()


@functools.cache
def _load_portaudio() -> _PortAudio:
    return _PortAudio()


def _abandon() -> None:
    """Leave PortAudio as it is at exit: a thread hangs inside, and sounddevice would wait for it or crash."""
    if "sounddevice" in sys.modules:
        atexit.unregister(sys.modules["sounddevice"]._exit_handler)  # noqa: SLF001


def _cards_listing() -> str:
    try:
        return ALSA_CARDS.read_text(encoding="utf-8", errors="replace")
    except OSError:  # no sound card at all
        return ""


def _alsa_id(name: str, cards: dict[int, str]) -> str | None:
    place = re.search(r"\(hw:(\d+),(\d+)\)", name)
    card = cards.get(int(place[1])) if place else None
    return f"hw:CARD={card},DEV={place[2]}" if place and card else None


class _Stream:
    """One open input stream. It belongs to the thread that opened it: closing under another's read corrupts memory.

    Reading asks first what has arrived, so it never blocks; a read of a frozen sound server would not come back.
    """

    def __init__(self, device: str | int, channel: int, rate: int | None) -> None:
        self._portaudio = _portaudio()
        with self._portaudio.opening():
            self.device = choose_device(device, self._portaudio.devices())
            if channel > self.device.channels:
                raise SourceError(f"{self.device.name!r} has no channel {channel}, only 1..{self.device.channels}")
            self._channel = channel
            self.rate = rate or self._native_rate()
            self._raw = self._open()
            self._portaudio.streams += 1
        self._heard_ns = boottime_ns() + round((_START_S - STALL_S) * NS_PER_S)

    def close(self) -> None:
        """Let go of the device; hangs as long as a frozen sound server does."""
        with self._portaudio.closing():
            self._raw.close()

    @property
    def stale(self) -> bool:
        """Whether another reader waits for the device list to be renewed."""
        return self._portaudio.stale

    def read(self) -> NDArray[np.int16]:
        """What the chosen channel has delivered since; may be empty. Raises SourceError when the device is gone."""
        try:
            with self._portaudio.quiet:
                ready = self._raw.read_available
                data = self._raw.read(ready)[0] if ready else b""
        except self._portaudio.sounddevice.PortAudioError as error:
            raise SourceError(f"{self.device.name!r} is gone ({_reason(error)})") from None
        now_ns = boottime_ns()
        if data:
            self._heard_ns = now_ns
        elif now_ns - self._heard_ns > STALL_S * NS_PER_S:
            raise SourceError(f"{self.device.name!r} delivers nothing any more")
        return np.frombuffer(data, dtype=np.int16).reshape(-1, self._channel)[:, -1]

    @property
    def patience_s(self) -> float:
        """How long it may be left alone: a third of what the driver really keeps."""
        return float(self._raw.latency) / 3

    def _native_rate(self) -> int:
        """48 kHz where it is to be had, a multiple of ours; PortAudio's own choice is 44.1 kHz wherever possible."""
        sounddevice = self._portaudio.sounddevice
        try:
            sounddevice.check_input_settings(self.device.index, self._channel, "int16", samplerate=48_000)
        except sounddevice.PortAudioError:
            return self.device.rate
        return 48_000

    def _open(self) -> Any:  # noqa: ANN401 - sounddevice has no types
        """Open as many channels as needed to reach the chosen one; PortAudio opens the rest of an array itself."""
        sounddevice = self._portaudio.sounddevice
        try:
            raw = sounddevice.RawInputStream(
                samplerate=self.rate,
                blocksize=self.rate // 50,
                device=self.device.index,
                channels=self._channel,
                dtype="int16",
                latency=_HOST_BUFFER_S,
            )
        except sounddevice.PortAudioError as error:
            raise SourceError(f"{self.device.name!r} cannot be opened at {self.rate} Hz ({_reason(error)})") from None
        try:
            raw.start()
        except sounddevice.PortAudioError as error:
            raw.close()
            raise SourceError(f"{self.device.name!r} cannot be started ({_reason(error)})") from None
        return raw


def _reason(error: Exception) -> str:
    """The host's own words where PortAudio knows them, e.g. ``No such device``."""
    text, _, host = (*error.args, None, None)[:3]
    return str(host[2]) if host and host[2] else str(text).rpartition(": ")[2]


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


class _Mailbox:
    """Frames on their way from the capture thread to the event loop; when it is full the oldest goes."""

    def __init__(self) -> None:
        self._frames: deque[AudioFrame] = deque()
        self._lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._ended = False

    def put(self, frames: Sequence[AudioFrame]) -> int:
        """From any thread; returns the number of samples that had to go."""
        with self._lock:
            self._frames += frames
            surplus = max(0, len(self._frames) - round(BUFFER_S * SAMPLE_RATE / FRAME_SAMPLES))
            for _ in range(surplus):
                self._frames.popleft()
        self._wake()
        return surplus * FRAME_SAMPLES

    def end(self) -> None:
        """From any thread: nothing more will come."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._news.set)

    async def get(self) -> AudioFrame | None:
        """The next frame; None after the last."""
        while True:
            self._news.clear()
            ended = self._ended  # read before the frames: what was put before the end is still delivered
            with self._lock:
                if self._frames:
                    return self._frames.popleft()
            if ended:
                return None
            await self._news.wait()


class Microphone:
    """A sound card that may be absent, be unplugged, freeze, and come back; one named thread reads it.

    With ``wait`` a missing device is waited for, otherwise ``frames`` raises SourceError. PortAudio's callbacks would
    need memory that is both writable and executable, which the service's hardening forbids, hence the thread.
    """

    def __init__(self, settings: MicrophoneSource, *, wait: bool = True) -> None:
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
        self.turned_ns: int | None = None
        """CLOCK_BOOTTIME at which the capture thread last came out of the driver; None: it does not run."""
        self._settings = settings
        self._wait = wait
        self._cutter = FrameCutter(settings.name)
        self._timeline = Timeline()
        self._stop = threading.Event()
        self._attentive = True
        self._roused = threading.Event()
        """Set, the capture thread looks at once: somebody speaks, or it is to end."""
        self._thread: threading.Thread | None = None
        self._mailbox: _Mailbox | None = None
        self._failure: BaseException | None = None

    async def frames(self) -> AsyncIterator[AudioFrame]:
        """Start capturing; ends after :meth:`close`. To be called once."""
        self._mailbox = _Mailbox()
        self._thread = threading.Thread(
            target=self._run, args=[self._mailbox], name=f"capture-{self.name}", daemon=True
        )  # a daemon, since a frozen sound server would not let it end
        self._thread.start()
        try:
            while (frame := await self._mailbox.get()) is not None:
                yield frame
        finally:
            self._halt()
        if self._failure is not None:
            raise self._failure

    def attend(self, *, speaking: bool) -> None:
        """Say whether somebody speaks: then what is captured is handed on at once, else in larger pieces."""
        self._attentive = speaking
        if speaking:
            self._roused.set()

    async def close(self) -> None:
        """Let go of the device; the frames that wait are still delivered. Returns within about a second."""
        self._halt()
        await asyncio.to_thread(self._leave)
        atexit.unregister(self._leave)
        self.state = "closed"

    def _halt(self) -> None:
        self._stop.set()
        self._roused.set()

    def _leave(self) -> None:
        self._halt()
        if self._thread is None or self._mailbox is None:
            return
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            log.warning("%s: %r hangs and is abandoned; restart the sound server", self.name, self._settings.device)
            _abandon()
            self._mailbox.end()

    def _run(self, mailbox: _Mailbox) -> None:
        """Body of the capture thread, which `top -H` and a core dump call by its name."""
        ctypes.CDLL(None).prctl(_PR_SET_NAME, threading.current_thread().name.encode())
        try:
            _portaudio()  # a missing library does not appear by waiting
            atexit.register(self._leave)  # after sounddevice's own hook, so before it at exit: it must meet no reader
            while not self._stop.is_set():
                self.turned_ns = boottime_ns()
                self._attempt(mailbox)
        except BaseException as error:  # noqa: BLE001 - raised again where the frames are consumed
            self._failure = error
        finally:
            self.turned_ns = None
            mailbox.end()

    def _attempt(self, mailbox: _Mailbox) -> None:
        """Capture until closed, or until the device was lost and a new attempt may be made."""
        wanted = self._settings
        try:
            stream = _Stream(wanted.device, wanted.channel, wanted.rate)
        except SourceError as error:
            self._lose(error, mailbox)
        else:
            with contextlib.closing(stream):
                try:
                    self._capture(stream, mailbox)
                except SourceError as error:
                    self._lose(error, mailbox)  # before closing, which may hang
        if self.state == "lost":
            self._stop.wait(RETRY_S)

    def _lose(self, error: SourceError, mailbox: _Mailbox) -> None:
        if self._stop.is_set():
            return
        if self.state == "opening" and not self._wait:
            raise error
        if self.state != "lost":
            log.warning("%s: %s; looking for it every %g s", self.name, error, RETRY_S)
        if self.state == "capturing" and self.last_frame_ns is not None:  # what is being said ends here
            self.lost_samples += self._cutter.skip(1)
            mailbox.put([AudioFrame(self.name, self._cutter.end, b"", self.last_frame_ns)])
        self.state, self.trouble, self.rate_error = "lost", str(error), None

    def _capture(self, stream: _Stream, mailbox: _Mailbox) -> None:
        """Read until closed or asked to step aside. Raises SourceError when the device is lost."""
        resampler = Resampler(stream.rate)
        reopened = self.device_name is not None
        rate = RateMeter(stream.rate)
        while self._keep_on(stream):
            self.turned_ns = boottime_ns()
            block = stream.read()
            if not len(block):
                continue
            rate.feed(boottime_ns(), len(block))
            self.rate_error = rate.error
            pcm = resampler.feed(block)
            arrived = self._cutter.end + len(pcm) // BYTES_PER_SAMPLE + round(resampler.held_samples)
            missing = self._timeline.missing(boottime_ns(), arrived, reopened=reopened)
            reopened = False
            if missing:
                self.lost_samples += self._cutter.skip(missing)
            if self.state != "capturing":
                gap_s = missing / SAMPLE_RATE
                log.info(
                    "%s: capturing from %r at %d Hz, %.1f s missed", self.name, stream.device.name, stream.rate, gap_s
                )
                self.device_name, self.state, self.trouble = stream.device.name, "capturing", ""
            end = self._cutter.end + len(pcm) // BYTES_PER_SAMPLE
            self._hand_over(self._cutter.feed(pcm, self._timeline.captured_ns(end)), mailbox)

    def _keep_on(self, stream: _Stream) -> bool:
        """Let some audio gather; False: to be closed, or to step aside."""
        self._roused.clear()
        if not self._stop.is_set():
            idle_s = min(_IDLE_POLL_S, max(_POLL_S, stream.patience_s))
            self._roused.wait(_POLL_S if self._attentive else idle_s)
        return not (self._stop.is_set() or stream.stale)

    def _hand_over(self, frames: list[AudioFrame], mailbox: _Mailbox) -> None:
        if frames:
            self.last_frame_ns = frames[-1].captured_ns
            self.lost_samples += mailbox.put(frames)


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
