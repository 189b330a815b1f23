"""The short form of tools/soak: silence costs little, and neither orders nor long speech make the recognizer grow."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import closing
from pathlib import Path

import pytest

from edge_asr import settings
from edge_asr.worker import Worker
from tests.soak import await_ready, grown_too_much, growth, long_speech, service, short_utterances, started

TOLERANCE_MB = 24
"""One utterance's working memory, more or less returned at the moment of looking."""


def test_neither_long_speech_nor_many_utterances_make_the_recognizer_grow() -> None:
    with closing(Worker(settings.Settings())) as worker:
        speech = growth(worker, long_speech(45), warm=1)
        assert speech["utterances"] >= 2  # no piece is longer than 20 s
        orders = growth(worker, short_utterances(120))
    assert speech["end_mb"] < speech["base_mb"] + TOLERANCE_MB
    assert orders["end_mb"] < orders["base_mb"] + TOLERANCE_MB
    assert worker.replaced == 0


def test_a_box_before_a_silent_microphone_sleeps() -> None:
    silence = service(None, 4)
    assert silence["ready_cpu_s"] < 3
    assert silence["idle_wakeups_per_s"] < 10, "each wakes 50 times a second while somebody speaks"
    assert silence["memory_mb"] < 200
    assert silence["idle_cpu_percent"] < 1, "half of that on a quiet machine: see docs/operations.md"


@pytest.mark.parametrize(
    ("speech_mb", "orders_mb", "told"),
    [(0.5, 1.1, ""), (9.0, 1.1, "9.0 MB in long_speech"), (0.5, 5.0, "5.0 MB in short_utterances")],
)
def test_a_recognizer_that_grows_in_either_way_fails_the_run(speech_mb: float, orders_mb: float, told: str) -> None:
    found = {"long_speech": {"drift_mb": speech_mb}, "short_utterances": {"drift_mb": orders_mb}}
    assert grown_too_much(found) == (told and f"the recognizer grows: {told}")


def test_a_service_that_does_not_start_is_told_at_once_with_its_last_lines(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edge_asr.cli", "run", "--set", "mqtt.port=99999"]
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        started(command, dict(os.environ), tmp_path / "log") as daemon,
        pytest.raises(SystemExit, match=r"ended with 78\nedge-asr: --set: mqtt.port: 99999 is not 1..65535"),
    ):
        await_ready(daemon, manager, tmp_path / "log")
