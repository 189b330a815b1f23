"""The short form of tools/soak: silence costs little, and neither orders nor long speech make the recognizer grow."""

from __future__ import annotations

from contextlib import closing

from edge_asr import settings
from edge_asr.worker import Worker
from tests.soak import growth, long_speech, service, short_utterances

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
    assert silence["idle_wakeups_per_s"] < 10, "each wakes 50 times a second while somebody speaks"
    assert silence["memory_mb"] < 230, "under 200 with the wheels and plug-ins of docs/operations.md"
    assert silence["idle_cpu_percent"] < 2, "a quarter of that and less on a quiet machine: see docs/operations.md"
