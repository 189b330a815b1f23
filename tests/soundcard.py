"""A sound card without hardware: a private PulseAudio whose microphone hears what is played, and can be pulled out.

What `play` plays into the virtual loudspeaker comes in at the virtual microphone, ALSA's devices `default` and `pulse`
(Debian: `pulseaudio pulseaudio-utils libasound2-plugins libportaudio2`). Never install `pipewire-alsa` beside it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class SoundCard:
    """A running sound server with or without its card."""

    folder: Path
    channels: int = 1
    port: int = 0
    """Where the server listens on the network, too; 0: nowhere."""
    _server: subprocess.Popen[bytes] | None = None
    _modules: list[str] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """Variables that lead a program's default microphone here; to be set before it opens one."""
        return {"PULSE_SERVER": f"unix:{self.folder}/native"}

    def start(self) -> None:
        """Start the server without a card."""
        script = f"load-module module-native-protocol-unix auth-anonymous=1 socket={self.folder}/native\n"
        if self.port:
            script += f"load-module module-native-protocol-tcp auth-anonymous=1 listen=127.0.0.1 port={self.port}\n"
        (self.folder / "default.pa").write_text(script, encoding="utf-8")
        home = {"HOME": str(self.folder), "XDG_RUNTIME_DIR": str(self.folder), "PULSE_RUNTIME_PATH": str(self.folder)}
        options = ["--daemonize=no", "--exit-idle-time=-1", "--use-pid-file=no", "--disable-shm=yes"]
        options += ["--realtime=no", "--high-priority=no", "--log-target=stderr"]
        with (self.folder / "log").open("ab") as log:
            self._server = subprocess.Popen(
                ["pulseaudio", "-n", "-F", str(self.folder / "default.pa"), *options],
                env={**os.environ, **home},
                stderr=log,
            )
        until(lambda: self._pactl("info", check=False).returncode == 0, "the sound server did not start")

    def plug(self) -> None:
        """Put the card in; without `norewinds` it would work in steps of 2 s, which no real card does."""
        for arguments in (
            ["module-null-sink", "sink_name=speaker", "rate=48000", f"channels={self.channels}", "norewinds=1"],
            ["module-remap-source", "source_name=microphone", "master=speaker.monitor"],
        ):
            self._modules.append(self._pactl("load-module", *arguments).stdout.decode().strip())
        self._pactl("set-default-sink", "speaker")
        self._pactl("set-default-source", "microphone")

    def plug_pipe(self, path: Path, rate: int) -> None:
        """Put in a microphone that names this rate and delivers what is written into a pipe when it is written."""
        pipe = (f"file={path}", "format=s16le", f"rate={rate}", "channels=1")
        self._modules.append(
            self._pactl("load-module", "module-pipe-source", "source_name=pipe", *pipe).stdout.decode()
        )
        self._pactl("set-default-source", "pipe")

    def unplug(self) -> None:
        """Pull the card out; the server stays."""
        while self._modules:
            self._pactl("unload-module", self._modules.pop())

    def freeze(self) -> None:
        """Stop the server as a hung driver would: connections stay open and nothing answers."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End the server at once; the card goes with it."""
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            self._server = None
        self._modules.clear()

    def play(self, wav: Path) -> None:
        """Play a recording into the microphone, and return when it was heard to its end."""
        subprocess.run(
            ["paplay", "--device=speaker", str(wav)], env={**os.environ, **self.environment}, check=True, timeout=120
        )

    def recording(self) -> bool:
        """Whether any program holds the microphone open."""
        outputs = self._pactl("list", "short", "source-outputs").stdout.decode().splitlines()
        return any(output.split("\t")[2] != "-" for output in outputs)  # the server's own streams have no client

    def _pactl(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        environment = {**os.environ, **self.environment}
        return subprocess.run(["pactl", *arguments], env=environment, check=check, capture_output=True, timeout=20)

    def _signal(self, number: signal.Signals) -> None:
        if self._server is not None:
            self._server.send_signal(number)


@contextlib.contextmanager
def sound_card(channels: int = 1) -> Iterator[SoundCard]:
    """A plugged-in card of 48 kHz for the length of a ``with`` block."""
    with tempfile.TemporaryDirectory(prefix="pulse-") as folder:  # short: a socket's path has 108 bytes
        card = SoundCard(Path(folder), channels)
        try:
            card.start()
            card.plug()
            yield card
        finally:
            card.thaw()
            card.kill()


def until(condition: Callable[[], bool], failure: str, deadline_s: float = 10.0) -> float:
    """Wait for a condition of another process; returns the seconds it took."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > deadline_s:
            raise AssertionError(f"{failure} within {deadline_s:g} s")
        time.sleep(0.01)
    return time.monotonic() - started
