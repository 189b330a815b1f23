"""The zygote: it outlives a full memory and a process that nothing ends, and no answer is taken for another's."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_asr import zygote
from edge_asr.zygote import Zygote, ZygoteError
from tests.soundcard import until


def listen(line: socket.socket) -> None:
    """A role: live until the line is closed."""
    line.recv(1)


@contextlib.contextmanager
def forked(breeder: Zygote) -> Iterator[int]:
    """Process id of one that lives until it is killed."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield breeder.fork(listen, theirs, "listener")


def test_after_an_order_without_an_answer_every_order_says_that_the_zygote_is_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(zygote, "LIMIT_S", 2.0)
    with contextlib.closing(Zygote()) as breeder, forked(breeder) as pid:
        os.kill(breeder._pid, signal.SIGSTOP)  # noqa: SLF001
        with pytest.raises(ZygoteError, match="the zygote was stopped for more than 2 s"):
            breeder.end(pid)
        os.kill(breeder._pid, signal.SIGCONT)  # noqa: SLF001 - it answers late
        for _ in range(2):
            with pytest.raises(ZygoteError, match="the zygote is dead"), forked(breeder):
                pass
        assert breeder.is_dead


def test_it_ends_none_that_it_has_not_forked() -> None:
    with contextlib.closing(Zygote()) as breeder, subprocess.Popen(["sleep", "60"]) as stranger:
        with pytest.raises(ZygoteError, match="not one of the zygote's"):
            breeder.end(stranger.pid)
        assert stranger.poll() is None
        stranger.kill()
        with forked(breeder) as child:
            assert breeder.end(child) == "SIGKILL"


def test_a_fork_that_fails_is_told_and_the_next_one_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    fork, calls = os.fork, iter(range(9))

    def full() -> int:  # the first call is the zygote's own birth
        if next(calls) == 1:
            raise OSError(errno.ENOMEM, "full")
        return fork()

    monkeypatch.setattr(os, "fork", full)
    with contextlib.closing(Zygote()) as breeder:
        with pytest.raises(ZygoteError, match=r"no memory for a process.*Cannot allocate memory"), forked(breeder):
            pass
        assert not breeder.is_dead
        with forked(breeder) as child:
            assert breeder.end(child) == "SIGKILL"


def test_a_process_that_no_signal_ends_is_left_alone_and_reaped_when_it_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kill, unplugged = os.kill, tmp_path / "unplugged"

    def stuck(pid: int, number: int) -> None:  # in the kernel, as far as the zygote can see
        if unplugged.exists():
            kill(pid, number)

    monkeypatch.setattr(zygote, "END_S", 0.2)
    monkeypatch.setattr(os, "kill", stuck)
    breeder = Zygote()
    monkeypatch.setattr(os, "kill", kill)
    with contextlib.closing(breeder), forked(breeder) as child:
        assert breeder.end(child) == ""
        with forked(breeder) as other:
            assert other != child
        unplugged.touch()
        until(lambda: breeder.end(child) == "SIGKILL", "it was not reaped")


def test_a_zygote_that_is_stopped_is_closed_all_the_same() -> None:
    breeder = Zygote()
    os.kill(breeder._pid, signal.SIGSTOP)  # noqa: SLF001
    breeder.close()
    assert breeder.is_dead
