"""Forks the processes that native libraries run in, so that a crash, a hang or a leak there costs the daemon nothing.

Law:

- They are forked from the *zygote*: a process that has imported everything, holds no model and runs one thread. That
  shares the memory of the code, and makes a new one ready in milliseconds (docs/operations.md).
- Each has a line to whoever asked for it, and ends when that is closed. All of them die with the daemon.
- They can be replaced and the daemon cannot: when memory runs out, the kernel takes one of them.
- Neither a failing fork nor a process that no signal ends keeps the zygote from the next order.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import gc
import logging
import os
import pkgutil
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn

from edge_asr.process_state import LOOK_S, Limits, Wait

log = logging.getLogger(__name__)

LIMIT_S: Final = 4.0
"""Asleep over an order: a fork takes milliseconds, an end :data:`END_S` at most."""

READ_LIMIT_S: Final = 15.0
"""The same while it reads: a new process is wanted exactly when memory has run out, and then its own pages are gone."""

WORK_LIMIT_S: Final = 2.0
"""CPU time over an order."""

END_S: Final = 2.0
"""A killed process that is not gone by then hangs in the kernel, in a driver that no signal reaches."""

_LOOK_S: Final = 0.005

_ORDER_BYTES: Final = 256
_OOM_SCORE: Final = 500
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15

Role = Callable[[socket.socket], None]
"""What a new process does with its line: a function of a module of ours; when it returns, the process ends."""


class ZygoteError(Exception):
    """No process can be had or ended: not now, or, where the zygote :attr:`~Zygote.is_dead`, never again."""


class Zygote:
    """The other end of :func:`_breed`; any thread may call. To be made before the process has threads or models."""

    fault = ""
    """Why it can be asked no more; empty: it can, or was closed."""

    def __init__(self, private: range = range(0)) -> None:
        """``private``: descriptors that neither it nor what it forks may keep open."""
        self._turn = threading.Lock()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(LOOK_S)
        gc.collect()
        gc.freeze()  # for good, here too: what no garbage collector touches stays shared
        self._pid = os.fork()
        if self._pid == 0:
            self._control.close()
            for descriptor in private:  # not closerange: given an empty range from 0 it closes all
                with contextlib.suppress(OSError):
                    os.close(descriptor)
            _breed(theirs)
        theirs.close()

    @property
    def pid(self) -> int:
        """Its process; 0: it was closed."""
        return self._pid

    @property
    def is_dead(self) -> bool:
        """Whether only a new start of the daemon helps."""
        return self._control.fileno() < 0

    def fork(self, role: Role, line: socket.socket, name: str) -> int:
        """Process id of a new process that plays a role with one end of a line. Raises ZygoteError.

        ``name``: one word, of which `top` and core dumps show 15 letters.
        """
        pid = self._order(f"{name[:15]} {role.__module__}:{role.__qualname__}".encode(), line.fileno())
        if pid < 0:
            raise ZygoteError(f"no memory for a process, or too many of them ({os.strerror(-pid)})")
        return pid

    def end(self, pid: int) -> str:
        """Kill one of its processes unless it is dead already; how it died. Raises ZygoteError.

        Empty while it hangs in the kernel and nothing ends it: ask again, or leave it alone.
        """
        status = self._order(struct.pack("i", pid))
        if status == -errno.EBUSY:
            return ""
        if status < 0:
            raise ZygoteError(f"process {pid} is not one of the zygote's")
        code = os.waitstatus_to_exitcode(status)
        return signal.Signals(-code).name if code < 0 else f"itself, exit code {code}"

    def prove(self) -> None:
        """Let it show that it takes orders, by one that changes nothing. Raises ZygoteError."""
        self._order(struct.pack("i", 0))

    def close(self) -> None:
        """End it, and with it all that it has forked, whatever it is doing; may be called twice."""
        pid, self._pid = self._pid, 0
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        with self._turn:
            self._control.close()

    def _order(self, order: bytes, *descriptors: int) -> int:
        with self._turn:
            if self.is_dead:
                raise ZygoteError("the zygote is dead")
            try:
                wait = Wait(self._pid)
                socket.send_fds(self._control, [order], descriptors)
                answer = self._answer(wait)
            except OSError as error:
                self._give_up(f"the zygote does not answer ({error})")
            if not answer:
                self._give_up("the zygote is dead")
        return int(struct.unpack("i", answer)[0])

    def _answer(self, wait: Wait) -> bytes:
        """What it says next; nothing where it has died. Raises OSError, ZygoteError."""
        while True:
            with contextlib.suppress(TimeoutError):
                return self._control.recv(_ORDER_BYTES)
            wait.look()
            fault = wait.fault(Limits(LIMIT_S, READ_LIMIT_S, WORK_LIMIT_S))
            if fault:
                self._give_up(f"the zygote {fault}")  # a late answer would be taken for the next order's

    def _give_up(self, fault: str) -> NoReturn:
        self.fault = fault if self._pid else ""
        self._control.close()
        raise ZygoteError(fault) from None


def _breed(control: socket.socket) -> NoReturn:
    """The zygote: forks a process for every line it is handed, ends and reaps the one it is told to."""
    brood = _Brood(control)
    try:
        _settle("zygote")
        while True:
            order, lines, _, _ = socket.recv_fds(control, _ORDER_BYTES, 1)
            if not order:
                os._exit(0)
            brood.reap()
            answer = brood.fork(order, lines[0]) if lines else brood.end(struct.unpack("i", order)[0])
            control.send(struct.pack("i", answer))
    except ConnectionError:
        os._exit(0)  # given up
    except Exception:
        log.exception("the zygote fails")
    finally:
        os._exit(1)  # never back into what the parent was doing


class _Brood:
    """What the zygote has forked and nobody has asked the end of; answers below zero are error numbers."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._statuses: dict[int, int | None] = {}
        """As of waitpid; None: not dead yet."""
        self._stuck: set[int] = set()

    def fork(self, order: bytes, line: int) -> int:
        """Process id of a new process."""
        try:
            pid = os.fork()
        except OSError as error:
            os.close(line)
            return -(error.errno or errno.EAGAIN)
        if pid == 0:
            self._control.close()
            name, place = order.decode().split(" ")
            _live(name, place, socket.socket(fileno=line))
        os.close(line)
        self._statuses[pid] = None
        return pid

    def end(self, pid: int) -> int:
        """How it ended, as of waitpid; EBUSY: not yet, and only the first asker has waited for it."""
        if pid not in self._statuses:  # 0 and -1 would be all of us
            return -errno.ESRCH
        if self._statuses[pid] is None:
            os.kill(pid, signal.SIGKILL)  # ours and not reaped yet, so it is still that one
            self.reap()
        deadline = time.monotonic() + (0.0 if pid in self._stuck else END_S)
        while (status := self._statuses[pid]) is None:
            if time.monotonic() >= deadline:
                self._stuck.add(pid)
                return -errno.EBUSY
            time.sleep(_LOOK_S)
            self.reap()
        del self._statuses[pid]
        self._stuck.discard(pid)
        return status

    def reap(self) -> None:
        """Note how those have ended that are dead by now."""
        for pid, status in self._statuses.items():
            if status is None:
                ended, how = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self._statuses[pid] = how


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
