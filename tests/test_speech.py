"""The gate's laws on run-length inputs: nothing said is lost or said twice, and every utterance has its place."""

from __future__ import annotations

import array
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from edge_asr.events import FRAME_SAMPLES, SAMPLE_RATE, AudioFrame, Utterance
from edge_asr.settings import Vad
from edge_asr.speech import CLOSE_BELOW, SpeechGate

SPEECH, DOUBT, SILENCE = 0.9, 0.4, 0.1
"""Probabilities above the threshold, between it and the closing one, and below both."""

KEPT_FRAMES = 10
"""0.3 s of closing silence, rounded up to whole frames."""

FRAME_S = FRAME_SAMPLES / SAMPLE_RATE


def frames_in(seconds: float) -> int:
    return int(seconds / FRAME_S)


@dataclass(frozen=True)
class Heard:
    """What a microphone delivered, and what the gate made of it; positions in frames."""

    frames: Sequence[AudioFrame]
    probabilities: Sequence[float]
    utterances: Sequence[Utterance]

    def spans(self) -> list[tuple[int, int]]:
        found = []
        for utterance in self.utterances:
            first, rest = divmod(utterance.start, FRAME_SAMPLES)
            count, half = divmod(len(utterance.pcm), FRAME_SAMPLES * 2)
            assert (rest, half) == (0, 0)
            found.append((first, first + count))
        return found


def hear(runs: Iterable[tuple[int, float] | tuple[int, float, int]], **options: Any) -> Heard:
    """Play runs of (frames, probability, amplitude); a negative count is lost audio."""
    gate = SpeechGate(Vad(**options))
    frames, probabilities, utterances, place = [], [], [], 0
    for count, probability, *rest in runs:
        for _ in range(count):
            pcm = array.array("h", [rest[0] if rest else 1000, place % 3000] * (FRAME_SAMPLES // 2)).tobytes()
            frame = AudioFrame("microphone", place * FRAME_SAMPLES, pcm, (place + 1) * 32_000_000)
            utterances += gate.feed(frame, probability)
            frames.append(frame)
            probabilities.append(probability)
            place += 1
        place += max(-count, 0)
    utterances += gate.flush()
    assert not gate.speaking
    return Heard(frames, probabilities, utterances)


# ---------------------------------------------------------------- examples


def test_an_utterance_brings_its_pre_roll_and_a_little_of_the_silence_behind_it() -> None:
    heard = hear([(50, SILENCE), (20, SPEECH), (50, SILENCE)], pre_roll_s=0.4)
    assert heard.spans() == [(50 - frames_in(0.4), 70 + KEPT_FRAMES)]


def test_start_end_source_and_id_are_those_of_the_audio() -> None:
    heard = hear([(50, SILENCE), (20, SPEECH), (50, SILENCE), (20, SPEECH)], pre_roll_s=0.32)
    first, second = heard.utterances
    assert (first.start, first.ended_ns, first.source) == (40 * FRAME_SAMPLES, 80 * 32_000_000, "microphone")
    assert (second.start, second.ended_ns) == (110 * FRAME_SAMPLES, 140 * 32_000_000)
    assert first.id != second.id
    assert first.pcm == b"".join(frame.pcm for frame in heard.frames[40:80])


def test_speech_at_the_very_start_needs_no_pre_roll() -> None:
    assert hear([(20, SPEECH), (50, SILENCE)]).spans() == [(0, 20 + KEPT_FRAMES)]


def test_a_short_pause_does_not_end_an_utterance_and_a_long_one_does() -> None:
    pause = frames_in(0.6)
    assert len(hear([(20, SPEECH), (pause, SILENCE), (20, SPEECH)], min_silence_s=0.6).utterances) == 1
    assert len(hear([(20, SPEECH), (pause + 1, SILENCE), (20, SPEECH)], min_silence_s=0.6).utterances) == 2


def test_doubtful_frames_keep_an_utterance_open_but_open_none() -> None:
    assert hear([(100, DOUBT)]).utterances == []
    assert hear([(10, SPEECH), (100, DOUBT), (50, SILENCE)]).spans() == [(0, 110 + KEPT_FRAMES)]


def test_a_burst_shorter_than_the_least_speech_is_dropped() -> None:
    least = frames_in(0.2) + 1
    assert hear([(20, SILENCE), (least - 1, SPEECH), (50, SILENCE)], min_speech_s=0.2).utterances == []
    assert len(hear([(20, SILENCE), (least, SPEECH), (50, SILENCE)], min_speech_s=0.2).utterances) == 1


def test_a_dropped_burst_costs_the_next_utterance_nothing() -> None:
    heard = hear([(5, SPEECH), (40, SILENCE), (20, SPEECH), (50, SILENCE)], pre_roll_s=0.4)
    assert heard.spans() == [(45 - frames_in(0.4), 65 + KEPT_FRAMES)]


def test_lost_audio_closes_the_utterance_at_the_jump_and_no_pre_roll_reaches_across() -> None:
    heard = hear([(20, SPEECH), (-7, 0), (2, SILENCE), (20, SPEECH), (50, SILENCE)])
    assert heard.spans() == [(0, 20), (27, 49 + KEPT_FRAMES)]


@pytest.mark.parametrize(
    ("runs", "torn"),
    [
        ([(20, SPEECH), (-7, 0), (2, SILENCE), (20, SPEECH), (50, SILENCE)], [True, True]),
        ([(20, SPEECH), (KEPT_FRAMES, SILENCE), (-7, 0), (KEPT_FRAMES, SILENCE), (20, SPEECH)], [False, False]),
        ([(20, SPEECH), (-7, 0), (50, SILENCE), (20, SPEECH), (50, SILENCE)], [True, False]),
        ([(50, SILENCE), (-7, 0), (20, SPEECH), (50, SILENCE), (20, SPEECH)], [True, False]),
        ([(5, SILENCE), (-1, 0), (500, SPEECH)], [True, False]),
    ],
    ids=["both-sides", "in-a-pause", "end", "beginning", "only-the-first-piece-of-long-speech"],
)
def test_what_is_said_right_before_or_after_lost_audio_is_torn(runs: list[tuple[int, float]], torn: list[bool]) -> None:
    assert [utterance.torn for utterance in hear(runs, max_utterance_s=10.0).utterances] == torn


def test_the_end_of_the_source_closes_what_is_open() -> None:
    assert hear([(20, SPEECH)]).spans() == [(0, 20)]
    assert hear([(20, SPEECH), (15, SILENCE)]).spans() == [(0, 20 + KEPT_FRAMES)]


def test_endless_speech_is_cut_at_the_quietest_frame_of_its_last_three_seconds() -> None:
    heard = hear([(300, SPEECH, 9000), (1, SPEECH, 5), (200, SPEECH, 9000)], max_utterance_s=10.0)
    assert heard.spans() == [(0, 300), (300, 501)]
    early = hear([(100, SPEECH, 9000), (1, SPEECH, 5), (400, SPEECH, 9000)], max_utterance_s=10.0)
    assert early.spans()[0][1] > 200


def test_a_machine_that_sounds_like_speech_is_cut_into_few_long_pieces() -> None:
    heard = hear([(20, SILENCE), (1000, SPEECH)], max_utterance_s=2.0)
    assert all(end - start >= frames_in(1.0) for start, end in heard.spans()[:-1])


def test_silence_behind_a_cut_is_no_utterance() -> None:
    assert hear([(50, SPEECH), (40, SILENCE, 3)], max_utterance_s=2.0, pre_roll_s=0).spans() == [(0, 50)]


def test_a_last_syllable_behind_a_cut_is_not_dropped() -> None:
    heard = hear([(61, SPEECH), (1, SPEECH, 3), (2, SPEECH), (50, SILENCE)], max_utterance_s=2.0, min_speech_s=0.2)
    assert heard.spans() == [(0, 61), (61, 64 + KEPT_FRAMES)]


def test_a_pre_roll_longer_than_the_pause_does_not_repeat_the_words_before_it() -> None:
    heard = hear([(20, SPEECH), (8, SILENCE), (20, SPEECH)], min_silence_s=0.25, pre_roll_s=1.0)
    assert heard.spans() == [(0, 28), (20, 48)]


def test_a_very_low_threshold_still_closes() -> None:
    assert len(hear([(20, 0.12), (50, 0.0), (20, 0.12), (50, 0.0)], threshold=0.1).utterances) == 2


def test_the_growing_utterance_becomes_the_closed_one() -> None:
    gate = SpeechGate(Vad())
    growing = None
    assert gate.growing() is None
    for frame, probability in zip(*played([(30, SILENCE), (20, SPEECH)]), strict=True):
        assert gate.feed(frame, probability) == []
        if gate.speaking:
            growing = gate.growing()
    (closed,) = gate.flush()
    assert growing == closed


def test_what_is_foreseen_in_the_closing_silence_is_what_is_closed_unless_somebody_speaks_on() -> None:
    gate = SpeechGate(Vad(min_silence_s=0.6))
    found: list[tuple[int, Utterance]] = []
    closed: list[Utterance] = []
    runs = [(30, SILENCE), (20, SPEECH), (15, SILENCE), (20, SPEECH), (40, SILENCE)]
    for place, (frame, probability) in enumerate(zip(*played(runs), strict=True)):
        closed += gate.feed(frame, probability)
        utterance = gate.foreseen()
        if utterance is not None:
            found.append((place, utterance))
    assert [place for place, _ in found] == [50 + KEPT_FRAMES - 1, 85 + KEPT_FRAMES - 1]
    assert [utterance for _, utterance in found][1:] == closed


def played(runs: Iterable[tuple[int, float]]) -> tuple[Sequence[AudioFrame], Sequence[float]]:
    heard = hear(runs)
    return heard.frames, heard.probabilities


def test_limits_under_which_no_speech_is_long_enough_are_refused() -> None:
    with pytest.raises(ValidationError, match="no speech is long enough"):
        Vad(max_utterance_s=2.0, min_speech_s=2.0)


# ---------------------------------------------------------------- laws

RUNS = st.lists(
    st.tuples(st.integers(-3, 90), st.sampled_from([SPEECH, DOUBT, SILENCE]), st.sampled_from([0, 30, 3000])),
    max_size=14,
)
OPTIONS = st.fixed_dictionaries(
    {
        "pre_roll_s": st.sampled_from([0, 0.1, 0.4, 1.0, 1.8]),
        "min_speech_s": st.sampled_from([0.03, 0.1, 0.2]),
        "min_silence_s": st.sampled_from([0.1, 0.3, 0.6, 2.0]),
        "max_utterance_s": st.sampled_from([2.1, 4.0, 7.0, 30.0]),
    }
)


def expected_spans(heard: Heard, options: Vad) -> list[tuple[int, int]]:
    """The utterances by looking at all frames at once, where none is too long."""
    places = [frame.position // FRAME_SAMPLES for frame in heard.frames]
    loud = {p for p, probability in zip(places, heard.probabilities, strict=True) if probability >= options.threshold}
    voiced = {p for p, probability in zip(places, heard.probabilities, strict=True) if probability > SILENCE}
    there = set(places)
    spans: list[tuple[int, int]] = []
    place, barrier = 0, 0
    while loud and place <= max(loud):
        barrier = barrier if place in there else place + 1
        if place not in loud:
            place += 1
            continue
        first = last = place
        while place in there and (place - last) * FRAME_S < options.min_silence_s:
            place += 1
            last = place if place in voiced else last
        start = max(first - frames_in(options.pre_roll_s), barrier)
        if sum(p in voiced for p in range(first, last + 1)) * FRAME_S >= options.min_speech_s:
            closed = place + (place in there)  # by silence, else at a jump or the end
            spans.append((start, min(last + 1 + KEPT_FRAMES, closed)))
        barrier = last + 1
        place += place in there
    return spans


@given(RUNS, OPTIONS)
def test_short_utterances_are_what_a_look_at_all_frames_at_once_finds(runs: list[Any], options: dict[str, Any]) -> None:
    options = {**options, "max_utterance_s": 30.0}
    heard = hear([(count % 40, *rest) for count, *rest in runs], **options)
    assert heard.spans() == expected_spans(heard, Vad(**options))


@given(RUNS, OPTIONS)
@example([(90, SPEECH, 3000), (90, SPEECH, 3000)], {"pre_roll_s": 1.8, "max_utterance_s": 2.1})
def test_every_utterance_is_one_unbroken_stretch_of_its_source(runs: list[Any], options: dict[str, Any]) -> None:
    heard = hear(runs, **options)
    timeline = {frame.position // FRAME_SAMPLES: frame for frame in heard.frames}
    for (start, end), utterance in zip(heard.spans(), heard.utterances, strict=True):
        assert utterance.pcm == b"".join(timeline[place].pcm for place in range(start, end))
        assert utterance.ended_ns == timeline[end - 1].captured_ns
    assert len({utterance.id for utterance in heard.utterances}) == len(heard.utterances)


@given(RUNS, OPTIONS)
def test_no_utterance_is_longer_than_the_limit_by_more_than_a_frame(runs: list[Any], options: dict[str, Any]) -> None:
    limit = options["max_utterance_s"] + FRAME_S
    assert all(utterance.duration_s <= limit for utterance in hear(runs, **options).utterances)


@given(RUNS, OPTIONS)
def test_no_frame_of_speech_stands_in_two_utterances(runs: list[Any], options: dict[str, Any]) -> None:
    heard = hear(runs, **options)
    for (_, end), (start, _) in itertools.pairwise(heard.spans()):
        for frame, probability in zip(heard.frames, heard.probabilities, strict=True):
            assert probability < SPEECH or not start <= frame.position // FRAME_SAMPLES < end


@given(RUNS, OPTIONS)
def test_speech_that_goes_on_long_enough_is_never_lost(runs: list[Any], options: dict[str, Any]) -> None:
    heard = hear(runs, **options)
    covered = {place for start, end in heard.spans() for place in range(start, end)}
    stretch: list[int] = []
    for frame, probability in zip(heard.frames, heard.probabilities, strict=True):
        place = frame.position // FRAME_SAMPLES
        follows = bool(stretch) and stretch[-1] == place - 1 and probability == SPEECH
        stretch = [*stretch, place] if follows else [place] * (probability == SPEECH)
        if len(stretch) * FRAME_S >= options.get("min_speech_s", 0.2):
            assert covered.issuperset(stretch)


@given(RUNS, OPTIONS)
def test_every_utterance_holds_speech(runs: list[Any], options: dict[str, Any]) -> None:
    heard = hear(runs, **options)
    voiced = {
        f.position // FRAME_SAMPLES for f, p in zip(heard.frames, heard.probabilities, strict=True) if p > SILENCE
    }
    assert all(voiced.intersection(range(start, end)) for start, end in heard.spans())


@given(RUNS, OPTIONS)
def test_whatever_was_foreseen_last_is_what_is_closed_where_nobody_speaks_on(
    runs: list[Any], options: dict[str, Any]
) -> None:
    options = {**options, "max_utterance_s": 30.0}  # a cut comes unforeseen
    gate, foreseen = SpeechGate(Vad(**options)), None
    heard = hear([(count % 40, *rest) for count, *rest in runs], **options)
    threshold = Vad().threshold - CLOSE_BELOW
    for frame, probability in zip(heard.frames, heard.probabilities, strict=True):
        for utterance in gate.feed(frame, probability):
            assert foreseen in {None, utterance}
        if probability >= threshold or not gate.speaking:
            foreseen = None
        foreseen = gate.foreseen() or foreseen
