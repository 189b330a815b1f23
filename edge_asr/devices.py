"""The sound cards of this box as settings name them, and what one of them delivers; all of PortAudio is here.

Law:

- A process reads one device at a time, in one thread: opening starts PortAudio anew, because its list of devices is as
  old as its start, and that pulls every open stream from under its reader.
- Whoever opens a device may hang in its driver or die of it. The daemon therefore never does: see ``capture``.
- libpulse works in no process that was forked from one which has used it.
- PortAudio's callbacks would need memory that is both writable and executable, which the service's hardening forbids.
  What has arrived is asked for instead, so that no read blocks.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import platform
import re
import socket
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_asr.audio import Levels, Resampler, measure
from edge_asr.clock import NS_PER_S, boottime_ns
from edge_asr.events import BYTES_PER_SAMPLE, SAMPLE_RATE

STALL_S: Final = 2.0
"""A device that delivers nothing for so long is lost, whatever it says of itself: PortAudio's `active` stays true."""

_START_S: Final = 5.0
"""The first samples may take longer: Bluetooth headsets and suspended PulseAudio sources need 2 s."""

_POLL_S: Final = 0.032

_HOST_BUFFER_S: Final = 3.0
"""What the driver is asked to keep while nobody reads: a busy machine may hold the reader up. Some cards have less."""

ALSA_CARDS: Final = Path("/proc/asound/cards")
ALSA_NODES: Final = Path("/dev/snd")

_SERVERS: Final = ("PULSE_SERVER", "PIPEWIRE_REMOTE", "PIPEWIRE_RUNTIME_DIR", "XDG_RUNTIME_DIR", "ALSA_CONFIG_PATH")
"""Variables by which a program finds a sound server, or devices that are no cards."""
_SERVER_SOCKETS: Final = {"XDG_RUNTIME_DIR": ("pulse/native", "pipewire-0"), "PULSE_RUNTIME_PATH": ("native",)}
"""Where it listens, below the folder that a variable names."""
_PULSE_PORT: Final = 4713
_ANSWER_S: Final = 0.2
"""One in the same hall takes a connection in a few milliseconds."""
_BY_ADDRESS: Final = socket.AI_NUMERICHOST
_CONNECTIONS: Final = Path("/sys/class/bluetooth")
_SERVER_FILES: Final = ("/run/pulse/native", "/run/pipewire", "/etc/asound.conf")


class DeviceError(Exception):
    """A device is not there, or delivers nothing; the message names it and the remedy."""

    taken_by: int | None = None
    """The process that listens to it already, where the card serves one only."""


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
    """Every input device that is there now. Raises DeviceError."""
    with _portaudio().afresh() as devices:
        return devices


def levels(device: str | int = "default", channel: int = 1) -> Iterator[Levels]:
    """Listen to a device and yield its levels ten times a second, for ever; as in the settings. Raises DeviceError."""
    for pcm in _pieces(device, channel, SAMPLE_RATE // 10):
        yield measure(pcm)


def record(device: str | int = "default", seconds: float = 1.0, channel: int = 1) -> bytes:
    """What a device hears in a moment, 16 kHz mono; named as in the settings. Raises DeviceError."""
    pieces = _pieces(device, channel, round(seconds * SAMPLE_RATE))
    with contextlib.closing(pieces):
        return next(pieces)


def _pieces(device: str | int, channel: int, samples: int) -> Generator[bytes, None, None]:
    try:
        opened = Stream(device, channel, None)
    except DeviceError as error:
        raise _with_listener(error, device) from None
    with contextlib.closing(opened) as stream:
        resampler, pcm = Resampler(stream.rate), b""
        while True:
            pcm += resampler.feed(stream.read())
            while len(pcm) >= samples * BYTES_PER_SAMPLE:
                piece, pcm = pcm[: samples * BYTES_PER_SAMPLE], pcm[samples * BYTES_PER_SAMPLE :]
                yield piece
            time.sleep(_POLL_S)


def _with_listener(error: DeviceError, device: str | int) -> DeviceError:
    """The same error, or that somebody else has the device."""
    pid = listener(device)
    if pid is None:
        return error
    name = _text_of(Path(f"/proc/{pid}/comm")).strip() or "?"
    taken = DeviceError(f"{device!r} is in use by process {pid} ({name}); stop that for as long as you listen")
    taken.taken_by = pid
    return taken


def choose_device(wanted: str | int, devices: Sequence[Device]) -> Device:
    """The device that a setting means: ``default``, an index, an ALSA id, or part of a name. Raises DeviceError."""
    if not devices:
        raise DeviceError("no microphone found; plug one in, see `edge-asr devices`, or use --demo")
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
        raise DeviceError(f"no microphone is {wanted!r}; `edge-asr devices` lists what is there")
    if len(found) > 1:
        names = ", ".join(repr(device.name) for device in found)
        raise DeviceError(f"{wanted!r} fits several microphones ({names}); use an id that `edge-asr devices` lists")
    return found[0]


def is_out_of_sight(wanted: str | int) -> bool:
    """Whether the kernel has no card that could be a device of the settings; false where a sound server may have one.

    Costs a hundredth of starting PortAudio to see.
    """
    files = [*map(Path, _SERVER_FILES), Path(os.environ.get("HOME", "/"), ".asoundrc")]
    if any(name in os.environ for name in _SERVERS) or any(map(_is_readable, files)):
        return False
    recording = {node.name.split("D")[0] for node in ALSA_NODES.glob("pcmC*D*c")}
    card = re.search("CARD=([^,]+)", str(wanted))
    cards = alsa_cards(_cards_listing())
    return not any(card is None or cards.get(int(each.removeprefix("pcmC"))) == card[1] for each in recording)


def signs() -> tuple[object, ...]:
    """What shows, without PortAudio, that a device has come or was let go of: another answer is a reason to try.

    Not seen is only what a sound server that is there learns by itself: in another container, from the network, or from
    whoever configures it.
    """
    folders = [(os.environ[name], paths) for name, paths in _SERVER_SOCKETS.items() if name in os.environ]
    sockets = [Path(folder, path) for folder, paths in folders for path in paths]
    named = re.findall(r"(?:unix:)?(/[^\s}]*)", os.environ.get("PULSE_SERVER", ""))
    nodes = [*ALSA_NODES.glob("pcmC*D*c"), *_CONNECTIONS.glob("*"), *sockets, *map(Path, (*named, *_SERVER_FILES))]
    changed = [(str(node), _changed_ns(node)) for node in nodes]
    return _cards_listing(), [*_owners("card*/pcm*c")], changed, [_answers(*server) for server in _distant_servers()]


def _distant_servers() -> list[tuple[str, int]]:
    """Where sound servers of the environment listen on a network."""
    servers = re.findall(r"tcp[46]?:(?:\[([^]\s]+)\]|([^:\s]+))(?::(\d+))?", os.environ.get("PULSE_SERVER", ""))
    return [(six or host, int(port or _PULSE_PORT)) for six, host, port in servers]


def _answers(host: str, port: int) -> bool:
    """Whether somebody takes connections; of a host by its address only, for looking up a name may take long."""
    try:
        ((family, _, _, _, address), *_) = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=_BY_ADDRESS)
        with socket.socket(family) as probe:
            probe.settimeout(_ANSWER_S)
            return probe.connect_ex(address) == 0
    except OSError:
        return False


def _changed_ns(path: Path) -> int | None:
    """When it was made, or its rights were changed: udev gives them a moment later."""
    try:
        return path.stat().st_ctime_ns
    except OSError:
        return None


def _is_readable(path: Path) -> bool:
    return os.access(path, os.R_OK)  # unlike Path.exists, no error behind walls


def listener(wanted: str | int) -> int | None:
    """The process to which the kernel has given a card of the settings; of any card where they name none.

    PortAudio does not list a card that is taken, or says that it is unavailable.
    """
    named = re.search(r"CARD=(\w+)(?:,DEV=(\d+))?", str(wanted))
    card, number = (named[1], named[2] or "*") if named else ("card*", "*")
    return next(_owners(f"{card}/pcm{number}c"), None)


def _owners(devices: str) -> Iterator[int]:
    for path in ALSA_CARDS.parent.glob(f"{devices}/sub*/status"):
        yield from map(int, re.findall(r"owner_pid\s*: (\d+)", _text_of(path)))


def alsa_cards(listing: str) -> dict[int, str]:
    """Card ids by card number, out of the text of /proc/asound/cards."""
    return {int(number): card for number, card in re.findall(r"^ *(\d+) \[(\S+) *\]:", listing, re.MULTILINE)}


class _Quiet:
    """Sends what C libraries print to nowhere while entered: PortAudio and alsa-lib write a screenful per failure.

    Only glibc's variable ``stderr`` is exchanged; Python's standard error and file descriptor 2 are not touched.
    """

    def __init__(self) -> None:
        self._stderr: ctypes.c_void_p | None = None
        if platform.libc_ver()[0] == "glibc":  # elsewhere the variable is constant
            libc = ctypes.CDLL(None)
            libc.fopen.restype = ctypes.c_void_p
            self._stderr = ctypes.c_void_p.in_dll(libc, "stderr")
            self._real, self._null = self._stderr.value, libc.fopen(b"/dev/null", b"w")

    def __enter__(self) -> None:
        if self._stderr is not None:
            self._stderr.value = self._null

    def __exit__(self, *_: object) -> None:
        if self._stderr is not None:
            self._stderr.value = self._real


class _PortAudio:
    """The process's one PortAudio."""

    def __init__(self) -> None:
        self.quiet = _Quiet()
        try:
            with self.quiet:
                import sounddevice  # noqa: PLC0415 - loads the system's library, which may be missing
        except OSError:
            raise DeviceError("PortAudio is not installed; `apt install libportaudio2`") from None
        self.sounddevice = sounddevice

    @contextlib.contextmanager
    def afresh(self) -> Iterator[list[Device]]:
        """Start it anew, for the input devices of this moment; one may be opened while entered. Raises DeviceError."""
        with self.quiet:
            self._restart()
            try:
                yield self._devices()
            finally:
                _forget()

    def _restart(self) -> None:
        # Not sounddevice's own functions: they send the whole process's standard error to nowhere meanwhile.
        library = self.sounddevice._lib  # noqa: SLF001
        library.Pa_Terminate()
        try:
            self.sounddevice._check(library.Pa_Initialize())  # noqa: SLF001
        except self.sounddevice.PortAudioError as error:
            raise DeviceError(f"PortAudio does not start ({_reason(error)}); check the sound driver") from None

    def _devices(self) -> list[Device]:
        cards = alsa_cards(_cards_listing())
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


@functools.cache
def _portaudio() -> _PortAudio:
    return _PortAudio()


def _forget() -> None:
    """Let alsa-lib drop the plug-ins that only listing has loaded: Debian's are 12 MB of video codecs."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libasound.so.2").snd_config_update_free_global()


def _cards_listing() -> str:
    return _text_of(ALSA_CARDS)


def _text_of(path: Path) -> str:
    """What the kernel says there; nothing where there is no sound card at all, or no such process any more."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _alsa_id(name: str, cards: dict[int, str]) -> str | None:
    place = re.search(r"\(hw:(\d+),(\d+)\)", name)
    card = cards.get(int(place[1])) if place else None
    return f"hw:CARD={card},DEV={place[2]}" if place and card else None


class Stream:
    """One open input stream. Reading asks first what has arrived, so it never blocks."""

    def __init__(
        self, device: str | int, channel: int, rate: int | None, step: Callable[[], None] = lambda: None
    ) -> None:
        """Named as in the settings; ``step`` is called after each thing that may take long. Raises DeviceError."""
        self._portaudio = _portaudio()
        with self._portaudio.afresh() as devices:
            step()
            self.device = choose_device(device, devices)
            if channel > self.device.channels:
                raise DeviceError(f"{self.device.name!r} has no channel {channel}, only 1..{self.device.channels}")
            self._channel = channel
            self.rate = rate or self._native_rate()
            step()
            self._raw = self._open(step)
        self._heard_ns = boottime_ns() + round((_START_S - STALL_S) * NS_PER_S)

    def close(self) -> None:
        """Let go of the device; hangs as long as a frozen sound server does."""
        with self._portaudio.quiet:
            self._raw.close()

    def read(self) -> NDArray[np.int16]:
        """What the chosen channel has delivered since; may be empty. Raises DeviceError when the device is gone."""
        try:
            with self._portaudio.quiet:
                ready = self._raw.read_available
                data = self._raw.read(ready)[0] if ready else b""
        except self._portaudio.sounddevice.PortAudioError as error:
            raise DeviceError(f"{self.device.name!r} is gone ({_reason(error)})") from None
        now_ns = boottime_ns()
        if data:
            self._heard_ns = now_ns
        elif now_ns - self._heard_ns > STALL_S * NS_PER_S:
            raise DeviceError(f"{self.device.name!r} delivers nothing any more")
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

    def _open(self, step: Callable[[], None]) -> Any:  # noqa: ANN401 - sounddevice has no types
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
            raise DeviceError(f"{self.device.name!r} cannot be opened at {self.rate} Hz ({_reason(error)})") from None
        step()
        try:
            raw.start()
        except sounddevice.PortAudioError as error:
            raw.close()
            raise DeviceError(f"{self.device.name!r} cannot be started ({_reason(error)})") from None
        return raw


def _reason(error: Exception) -> str:
    """The host's own words where PortAudio knows them, e.g. ``No such device``."""
    text, _, host = (*error.args, None, None)[:3]
    return str(host[2]) if host and host[2] else str(text).rpartition(": ")[2]


def main() -> None:
    """Answer ``child.ask`` with what is there."""
    print(json.dumps({"devices": [device.name for device in list_devices()]}))


if __name__ == "__main__":
    main()
