"""A private mosquitto for trying things out: loopback only, its files in a folder of its own, gone with this process.

A site has its own broker; this one exists so that `edge-asr demo` and `edge-asr run --watch` work on a bare machine.
"""

from __future__ import annotations

import getpass
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

HOST = "127.0.0.1"
USUAL_PORT = 1883
START_LIMIT_S = 10.0

_CONFIGURATION = """\
listener {port} {host}
allow_anonymous true
user {user}
persistence true
persistence_location {folder}/
# Without these two, mosquitto loses what it has acknowledged when it is killed.
autosave_on_changes true
autosave_interval 1
log_dest file {folder}/mosquitto.log
"""


class BrokerError(Exception):
    """The private broker cannot run; the message says what to install."""


class PrivateBroker:
    """A running mosquitto; use as a context manager."""

    def __init__(self) -> None:
        self.port = _free_port()

    def __enter__(self) -> Self:
        program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
        if program is None:
            raise BrokerError("mosquitto is not installed; run `apt install mosquitto`, or set mqtt.host")
        self._folder = tempfile.TemporaryDirectory(prefix="edge-asr-broker-")
        folder = Path(self._folder.name)
        configuration = folder / "mosquitto.conf"
        configuration.write_text(
            _CONFIGURATION.format(port=self.port, host=HOST, user=getpass.getuser(), folder=folder), encoding="utf-8"
        )
        # Ends with us even when we are killed, where util-linux's setpriv is there to arrange it.
        leash = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
        # Not in our process group: Ctrl-C must stop the publisher first, then the broker.
        self._process = subprocess.Popen(
            [*leash, program, "-c", str(configuration)], start_new_session=True, stderr=subprocess.DEVNULL
        )
        try:
            self._wait_until_open(folder)
        except BrokerError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait()
        self._folder.cleanup()

    def _wait_until_open(self, folder: Path) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                socket.create_connection((HOST, self.port), timeout=1).close()
            except OSError:
                time.sleep(0.01)
            else:
                return
        last_words = folder / "mosquitto.log"
        reason = last_words.read_text(encoding="utf-8").strip() if last_words.exists() else "no answer"
        raise BrokerError(f"the private mosquitto did not start: {reason}")


def _free_port() -> int:
    """The usual port, so that `mosquitto_sub` finds it without options, else any."""
    return next(port for port in (_bindable(USUAL_PORT), _bindable(0)) if port is not None)


def _bindable(wanted: int) -> int | None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, wanted))
        except OSError:
            return None
        return int(probe.getsockname()[1])
