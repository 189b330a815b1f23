"""Forks the processes that native libraries run in, so that a crash, a hang or a leak there costs the daemon nothing.

Law:

- They are forked from the *zygote*: a process that has imported everything, holds no model and runs one thread. That
  shares the memory of the code, and makes a new one ready in milliseconds (docs/operations.md).
- Each has a line to whoever asked for it, and ends when that is closed. All of them die with the daemon.
- They can be replaced and the daemon cannot: when memory runs out, the kernel takes one of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
import pkgutil
import signal
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn

log = logging.getLogger(__name__)

LIMIT_S: Final = 5.0
"""A fork or the end of a process takes milliseconds; a process that no signal ends (a driver hangs) is given up."""

_ORDER_BYTES: Final = 256
_OOM_SCORE: Final = 500
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15

Role = Callable[[socket.socket], None]
"""What a new process does with its line: a function of a module of ours; when it returns, the process ends."""


class ZygoteError(Exception):
    """No process can be had or ended; only a new start of the daemon helps."""


class Zygote:
    """The other end of :func:`_breed`; any thread may call. To be made before the process has threads or models."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(LIMIT_S)
        gc.collect()
        gc.freeze()  # for good, here too: what no garbage collector touches stays shared
        self._pid = os.fork()
        if self._pid == 0:
            self._control.close()
            _breed(theirs)
        theirs.close()

    def fork(self, role: Role, line: socket.socket, name: str) -> int:
        """Process id of a new process that plays a role with one end of a line. Raises ZygoteError.

        ``name``: one word, of which `top` and core dumps show 15 letters.
        """
        answer = self._order(f"{name[:15]} {role.__module__}:{role.__qualname__}".encode(), line.fileno())
        return int(struct.unpack("i", answer)[0])

    def end(self, pid: int) -> str:
        """Kill one of its processes unless it is dead already; how it died. Raises ZygoteError."""
        code = os.waitstatus_to_exitcode(struct.unpack("i", self._order(struct.pack("i", pid)))[0])
        return signal.Signals(-code).name if code < 0 else f"itself, exit code {code}"

    def close(self) -> None:
        """End it, and with it all that it has forked."""
        self._control.close()
        os.waitpid(self._pid, 0)

    def _order(self, order: bytes, *descriptors: int) -> bytes:
        try:
            with self._turn:
                socket.send_fds(self._control, [order], descriptors)
                answer = self._control.recv(_ORDER_BYTES)
        except OSError as error:
            raise ZygoteError(f"the zygote does not answer ({error})") from None
        if not answer:
            raise ZygoteError("the zygote is dead")
        return answer


def _breed(control: socket.socket) -> NoReturn:
    """The zygote: forks a process for every line it is handed, ends and reaps the one it is told to."""
    try:
        _settle("zygote")
        while True:
            order, lines, _, _ = socket.recv_fds(control, _ORDER_BYTES, 1)
            if not order:
                os._exit(0)
            if lines:
                pid = os.fork()
                if pid == 0:
                    control.close()
                    name, place = order.decode().split(" ")
                    _live(name, place, socket.socket(fileno=lines[0]))
                os.close(lines[0])
                control.send(struct.pack("i", pid))
            else:
                pid = struct.unpack("i", order)[0]
                os.kill(pid, signal.SIGKILL)  # ours and not reaped yet, so it is still that one
                control.send(struct.pack("i", os.waitpid(pid, 0)[1]))
    finally:
        os._exit(1)  # never back into what the parent was doing


def _live(name: str, place: str, line: socket.socket) -> NoReturn:
    """A new process."""
    code = 1
    try:
        _settle(name)
        faulthandler.enable()
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE), encoding="ascii")
        role: Role = pkgutil.resolve_name(place)
        role(line)
        code = 0
    except Exception:
        log.exception("%s fails", name)
    finally:
        os._exit(code)


def _settle(name: str) -> None:
    """Die with the parent, and leave it to the parent to stop: the terminal's Ctrl-C goes to all."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(_PR_SET_NAME, name.encode())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
