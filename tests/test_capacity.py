"""Whether another speaker fits, on boxes of any speed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_asr.capacity import BUSY, LATE_S, WINDOW_S, Capacity
from edge_asr.clock import NS_PER_S

SENTENCE_S, PERIOD_S = 2.0, 6.0
"""Everybody says a sentence of so long every so often."""


def ns(seconds: float) -> int:
    return round(seconds * NS_PER_S)


def spoken(speakers: int, factor: float) -> tuple[Capacity, float, float]:
    """Speakers who take turns for two minutes at one recognizer: what was seen, the end, and the longest wait."""
    capacity, free_s, longest_s = Capacity(), 0.0, 0.0
    for number in range(round(120 / PERIOD_S) * speakers):
        said_s = number * PERIOD_S / speakers
        began_s = max(said_s, free_s)
        free_s = began_s + factor * SENTENCE_S
        longest_s = max(longest_s, began_s - said_s)
        capacity.note(ns(began_s), ns(free_s), SENTENCE_S)
    return capacity, free_s, longest_s


@given(st.floats(0.01, 1.0))
def test_speakers_are_let_in_until_most_of_the_capacity_is_used_and_nobody_waits(factor: float) -> None:
    speakers = 1
    while True:
        capacity, end_s, longest_s = spoken(speakers, factor)
        if capacity.busy(ns(end_s)) >= BUSY:
            break
        assert longest_s < 1e-6
        speakers += 1
    used = speakers * factor * SENTENCE_S / PERIOD_S
    assert used > 0.9 * BUSY
    assert used - factor * SENTENCE_S / PERIOD_S < 1


@given(st.floats(0.01, 2.0))
def test_it_learns_how_long_speech_takes(factor: float) -> None:
    assert spoken(1, factor)[0].factor == pytest.approx(factor, rel=1e-6)


def test_a_box_that_has_heard_nothing_is_neither_busy_nor_late() -> None:
    assert Capacity().busy(ns(100)) == 0
    assert not Capacity().is_late(ns(100), 60.0, None)


def test_what_waits_counts_by_what_it_will_take() -> None:
    capacity = Capacity()
    capacity.note(0, ns(0.5), 1.0)
    assert not capacity.is_late(ns(1), 2 * LATE_S - 0.1, None)
    assert capacity.is_late(ns(1), 2 * LATE_S + 0.1, None)


def test_a_decode_that_takes_long_is_late_only_for_who_waits() -> None:
    assert not Capacity().is_late(ns(2 * LATE_S), 0.0, 0)
    assert Capacity().is_late(ns(2 * LATE_S), 1.0, 0)


def test_what_was_long_ago_is_forgotten() -> None:
    capacity = Capacity()
    capacity.note(0, ns(WINDOW_S), 1.0)
    assert capacity.busy(ns(WINDOW_S)) == 1
    assert capacity.busy(ns(1.5 * WINDOW_S)) == pytest.approx(0.5)
    assert capacity.busy(ns(2 * WINDOW_S)) == 0
