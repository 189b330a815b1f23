"""How far the wall clock can be trusted, by the kernel and its own header; who wakes together."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_asr import clock

ORACLE = r"""
#include <stddef.h>
#include <stdio.h>
#include <sys/timex.h>
int main(void) {
  struct timex now = {0};
  int state = adjtimex(&now);
  int trusted = state != -1 && !(now.status & STA_UNSYNC);
  printf("%zu %zu %d %d\n", offsetof(struct timex, status), sizeof now, STA_UNSYNC, trusted);
}
"""


class Kernel:
    """Answers adjtimex in the kernel's place."""

    def __init__(self, status: int, answer: int) -> None:
        self._status, self._answer = status, answer

    def adjtimex(self, asked: ctypes.c_void_p) -> int:
        state = ctypes.cast(asked, ctypes.POINTER(clock.Timex)).contents
        assert state.modes == 0, "something would be changed"
        state.status = self._status
        return self._answer


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int, int], None]:
    monkeypatch.setattr(clock, "SET_BY_TIMESYNCD", tmp_path / "synchronized")

    def answers(status: int, answer: int) -> None:
        monkeypatch.setattr(clock, "_libc", lambda: Kernel(status, answer))

    return answers


def test_the_kernels_answer_is_read_where_its_own_header_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "SET_BY_TIMESYNCD", tmp_path / "synchronized")
    (tmp_path / "oracle.c").write_text(ORACLE, encoding="ascii")
    subprocess.run(["cc", "-o", tmp_path / "oracle", tmp_path / "oracle.c"], check=True)
    told = subprocess.run([tmp_path / "oracle"], check=True, capture_output=True, text=True).stdout
    offset, size, unsync, trusted = map(int, told.split())
    assert clock.Timex.status.offset == offset
    assert ctypes.sizeof(clock.Timex) >= size
    assert unsync == clock.STA_UNSYNC
    assert clock.time_quality() == ("synchronized" if trusted else "unsynchronized")


@pytest.mark.parametrize(
    ("status", "answer", "quality"),
    [
        (0x0001, 0, "synchronized"),
        (0x2001, 0, "synchronized"),
        (0x0041, 5, "unsynchronized"),
        (0x0001, -1, "unsynchronized"),  # the sandbox forbids the question
    ],
)
def test_a_clock_is_synchronized_when_the_kernel_was_told_so(
    kernel: Callable[[int, int], None], status: int, answer: int, quality: str
) -> None:
    kernel(status, answer)
    assert clock.time_quality() == quality


def test_where_the_kernel_may_not_be_asked_timesyncds_file_counts(
    kernel: Callable[[int, int], None], tmp_path: Path
) -> None:
    kernel(0, -1)
    (tmp_path / "synchronized").touch()
    assert clock.time_quality() == "synchronized"


@given(now_s=st.floats(0, 1e8), period_s=st.sampled_from([1.0, 4.0, 5.0]))
def test_who_sleeps_to_the_next_multiple_wakes_with_all_others_and_never_later(now_s: float, period_s: float) -> None:
    with mock.patch.object(clock, "time", SimpleNamespace(monotonic=lambda: now_s)):
        pause_s = clock.until_next(period_s)
    assert 0 < pause_s <= period_s
    assert (now_s + pause_s) / period_s == pytest.approx(round((now_s + pause_s) / period_s), abs=1e-6)
