"""The short form of tools/soak: silence costs little, and neither orders nor long speech make any process grow."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from tests.soak import await_ready, grown_too_much, idle, in_silence, memory_mb, memory_over, started

PERIOD_S = 4.0
"""In which the disk is probed once. A thread that waits for Python's lock, whose holder waits for a processor, wakes
every 5 ms, one that waits for a disk at each of its answers; a busy machine only adds, so the quietest one counts."""

TOLERANCE_MB = 24
"""One utterance's working memory, more or less returned at the moment of looking."""


def test_neither_long_speech_nor_many_orders_make_any_process_grow() -> None:
    found = memory_over(None, 40, 30)
    speech, orders = found["long_speech"], found["short_orders"]
    assert speech["utterances"] >= 2  # no piece is longer than 20 s
    assert orders["utterances"] >= 40
    for part in (speech, orders):
        assert set(part["processes"]) == {"daemon", "zygote", "recognizer", "capture-microph"}
        for each in part["processes"].values():
            assert each["most_mb"] < each["from_mb"] + TOLERANCE_MB


def test_a_box_before_a_silent_microphone_sleeps() -> None:
    with in_silence(None) as (pids, start):
        assert start["ready_cpu_s"] < 3
        assert memory_mb(pids)["memory_mb"] < 200
        periods = [idle(pids, PERIOD_S)]
        while periods[-1]["idle_wakeups_per_s"] >= 10 and len(periods) < 5:
            periods.append(idle(pids, PERIOD_S))
    quietest = min(periods, key=lambda each: each["idle_wakeups_per_s"])
    assert quietest["idle_wakeups_per_s"] < 10, f"each wakes 50 times a second while somebody speaks: {periods}"
    assert quietest["idle_cpu_percent"] < 1, "half of that on a quiet machine: see docs/operations.md"


@pytest.mark.parametrize(
    ("speech_mb", "orders_mb", "told"),
    [(0.5, 1.1, ""), (9.0, 1.1, "zygote by 9.0 MB in long_speech"), (0.5, 5.0, "zygote by 5.0 MB in short_orders")],
)
def test_any_process_that_grows_in_either_way_fails_the_run(speech_mb: float, orders_mb: float, told: str) -> None:
    found = {
        what: {"processes": {"daemon": {"drift_mb": -9.0}, "zygote": {"drift_mb": drift_mb}}}
        for what, drift_mb in (("long_speech", speech_mb), ("short_orders", orders_mb))
    }
    assert grown_too_much(found) == (told and f"memory grows: {told}")


def test_a_service_that_does_not_start_is_told_at_once_with_its_last_lines(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edge_asr.cli", "run", "--set", "mqtt.port=99999"]
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        started(command, dict(os.environ), tmp_path / "log") as daemon,
        pytest.raises(SystemExit, match=r"ended with 78\nedge-asr: --set: mqtt.port: 99999 is not 1..65535"),
    ):
        await_ready(daemon, manager, tmp_path / "log")
