"""Every trouble of a source is seen, named with its remedy, and over when it is over: measured on real PCM."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_asr import audio, clock, hearing, model_store
from edge_asr.alarms import QUIET_S, AlarmBoard, Condition, earlier, losses
from edge_asr.audio import FULL_SCALE, from_float, level_dbfs, measure, quiet
from edge_asr.capture import RateMeter
from edge_asr.clock import NS_PER_S
from edge_asr.events import FRAME_SAMPLES, SAMPLE_RATE, AudioFrame, Category, Draft, Json
from edge_asr.hearing import Capture, HearingJudge, SourceMeter
from edge_asr.outbox import Outbox, read_statistics
from edge_asr.retention import Limits

RECORDINGS = model_store.bundled("recordings")
MAX_NOISE_DBFS = -18.0
RNG = np.random.default_rng(5)
SECONDS = 12


def noise(level_db: float, seconds: float = SECONDS) -> bytes:
    return from_float(RNG.normal(0, 10 ** (level_db / 20), int(seconds * SAMPLE_RATE)))


def fed(pcm: bytes, meter: SourceMeter | None = None, *, jump: int = 0) -> SourceMeter:
    """A meter that has heard the audio, the first frame ``jump`` samples late."""
    meter = meter or SourceMeter()
    at = jump + (0 if meter.last_frame_ns is None else meter.last_frame_ns * SAMPLE_RATE // NS_PER_S)
    for start in range(0, len(pcm) - 2 * FRAME_SAMPLES + 1, 2 * FRAME_SAMPLES):
        at += FRAME_SAMPLES
        piece = pcm[start : start + 2 * FRAME_SAMPLES]
        meter.feed(AudioFrame("m", at - FRAME_SAMPLES, piece, at * NS_PER_S // SAMPLE_RATE), measure(piece))
    return meter


def kinds(meter: SourceMeter, capture: Capture | None = None) -> list[str]:
    return [each.kind for each in HearingJudge("m").look(meter, capture, MAX_NOISE_DBFS)]


@given(levels_db=st.lists(st.floats(-119, 0), min_size=1, max_size=80))
def test_noise_and_level_are_the_percentiles_of_a_statistics_library(levels_db: list[float]) -> None:
    meter = SourceMeter()
    for at, level_db in enumerate(levels_db):
        meter.feed(AudioFrame("m", at * FRAME_SAMPLES, bytes(2), at), audio.Levels(level_db, 0.0, 0))
    noise_db, level_db = np.percentile(levels_db, [10, 95])
    health = meter.read()
    assert (health.noise_dbfs, health.level_dbfs) == pytest.approx((noise_db, level_db), abs=0.051)


def test_a_healthy_microphone_raises_nothing_even_while_somebody_speaks() -> None:
    everybody = b"".join(audio.read_file(file) for file in sorted(RECORDINGS.glob("*.flac")))
    assert kinds(fed(everybody)) == []
    assert kinds(fed(quiet(SECONDS * SAMPLE_RATE))) == []
    assert kinds(fed(bytes(SAMPLE_RATE))) == []  # a second of silence is no judgement


@pytest.mark.parametrize(
    ("pcm", "kind"),
    [
        (bytes(2 * SECONDS * SAMPLE_RATE), "microphone-silent"),
        (from_float(np.clip(RNG.normal(0, 0.4, SECONDS * SAMPLE_RATE), -1, 1)), "microphone-clipping"),
        (from_float(RNG.normal(0.2, 0.01, SECONDS * SAMPLE_RATE)), "microphone-offset"),
        (noise(-15), "too-noisy"),
    ],
)
def test_what_the_audio_shows_is_named_with_a_remedy_and_is_over_afterwards(pcm: bytes, kind: str) -> None:
    judge, meter = HearingJudge("m"), fed(pcm)
    found = {each.kind: each for each in judge.look(meter, None, MAX_NOISE_DBFS)}
    assert kind in found
    assert found[kind].source == "m"
    assert found[kind].remedy
    fed(noise(-60), meter)
    assert judge.look(meter, None, MAX_NOISE_DBFS) == []


def test_an_offset_alone_is_no_noise() -> None:
    assert kinds(
        fed(from_float(np.full(SECONDS * SAMPLE_RATE, 0.5) + RNG.normal(0, 0.001, SECONDS * SAMPLE_RATE)))
    ) == ["microphone-offset"]


def test_a_loud_sentence_over_quiet_surroundings_is_no_noise() -> None:
    pcm = b"".join(noise(-14, 0.8) + noise(-60, 0.2) for _ in range(SECONDS))
    assert kinds(fed(pcm)) == []


def test_what_became_too_noisy_must_become_clearly_quieter() -> None:
    judge, meter = HearingJudge("m"), fed(noise(-17))
    for level_db, noisy in ((-17, True), (-19, True), (-22, False), (-19, False), (-17, True)):
        found = judge.look(fed(noise(level_db), meter), None, MAX_NOISE_DBFS)
        assert (hearing.TOO_NOISY in [each.kind for each in found]) is noisy, level_db


def test_a_lost_device_is_one_trouble_with_its_reason() -> None:
    capture = Capture(is_lost=True, trouble="no such device", rate_error=None)
    (gone,) = HearingJudge("m").look(fed(bytes(2 * SECONDS * SAMPLE_RATE)), capture, MAX_NOISE_DBFS)
    assert (gone.kind, gone.detail) == ("microphone-gone", "m: no such device")


def test_a_guest_may_be_muted_and_its_network_may_have_gaps_but_not_be_too_noisy() -> None:
    guest = HearingJudge("g", guest=True)
    assert guest.look(fed(bytes(2 * SECONDS * SAMPLE_RATE)), None, MAX_NOISE_DBFS) == []
    assert guest.look(fed(noise(-60, 2), fed(noise(-60)), jump=SAMPLE_RATE), None, MAX_NOISE_DBFS) == []
    assert [each.kind for each in guest.look(fed(noise(-15)), None, MAX_NOISE_DBFS)] == [hearing.TOO_NOISY]


def test_lost_audio_is_an_overrun_for_a_minute() -> None:
    meter = fed(noise(-60, 2), fed(noise(-60)), jump=SAMPLE_RATE)
    assert kinds(meter) == ["microphone-overrun"]
    assert meter.read().lost_s == 1.0
    assert kinds(fed(noise(-60, 61), meter)) == []


def test_a_device_that_was_away_is_lost_audio_but_no_overrun() -> None:
    meter = fed(noise(-60))
    assert meter.last_frame_ns is not None
    at = meter.last_frame_ns * SAMPLE_RATE // NS_PER_S
    meter.feed(AudioFrame("m", at, b"", meter.last_frame_ns), measure(b""))
    fed(noise(-60, 2), meter, jump=30 * SAMPLE_RATE)
    assert kinds(meter) == []
    assert meter.read().lost_s == 30.0
    assert audio.SILENCE_DBFS not in [each.level_dbfs for each in meter.judged()]
    assert kinds(fed(noise(-60, 2), meter, jump=SAMPLE_RATE)) == ["microphone-overrun"]


@pytest.mark.parametrize(("really", "named"), [(44_100, True), (48_000, False), (47_500, False), (96_000, True)])
def test_a_device_that_lies_about_its_rate_is_found_out(really: int, *, named: bool) -> None:
    meter = RateMeter(48_000)
    for i in range(1, 2000):
        stalled = 700 < i < 800  # a second and a half in which nothing came in, and then all of it
        samples = 0 if stalled else really // 64 * (100 if i == 800 else 1)
        meter.feed(i * NS_PER_S // 64, samples)
    error = meter.error
    assert error == pytest.approx(really / 48_000 - 1, abs=0.01)
    capture = Capture(is_lost=False, trouble="", rate_error=error)
    assert kinds(fed(noise(-60)), capture) == (["microphone-rate"] if named else [])


def test_a_rate_is_not_judged_before_it_was_measured() -> None:
    meter = RateMeter(48_000)
    for i in range(10):
        meter.feed(i * NS_PER_S, 48_000)
    assert meter.error is None


@given(st.floats(-0.5, 0.5), st.floats(0.001, 0.4))
def test_offset_and_level_are_told_apart(offset: float, amplitude: float) -> None:
    tone = amplitude * np.sin(np.arange(FRAME_SAMPLES) * 2 * np.pi * 8 / FRAME_SAMPLES)
    levels = measure(from_float(tone + offset))
    assert levels.offset == pytest.approx(offset, abs=1 / FULL_SCALE)
    assert levels.level_dbfs == pytest.approx(20 * np.log10(amplitude / 2**0.5), abs=0.2)


def test_a_level_without_offset_is_the_one_of_old() -> None:
    pcm = noise(-30)
    assert measure(pcm).level_dbfs == pytest.approx(level_dbfs(pcm), abs=0.01)
    assert measure(b"").level_dbfs == audio.SILENCE_DBFS


def test_only_full_scale_is_clipping() -> None:
    assert measure(from_float(np.array([0.99, -0.99, 0.5]))).clipped == 0
    assert measure(from_float(np.array([1.0, -1.0, 0.5]))).clipped == 2


CONDITION = Condition("microphone-silent", "m", "critical", "m: silence", "unmute it")


def states(board: AlarmBoard, conditions: list[Condition], at_s: float) -> Iterator[tuple[object, object]]:
    return ((draft.data["kind"], draft.data["state"]) for draft in board.update(conditions, round(at_s * NS_PER_S)))


def test_an_alarm_is_told_when_it_begins_and_when_it_has_been_over_for_a_while() -> None:
    board = AlarmBoard()
    assert list(states(board, [CONDITION], 0)) == [("microphone-silent", "raised")]
    for at_s in (1, 2, 8, 9 + QUIET_S - 1):  # a loose plug: never away for long
        assert list(states(board, [CONDITION] if at_s != 2 else [], at_s)) == []
    assert board.raised == [CONDITION]
    assert list(states(board, [], 8 + 2 * QUIET_S + 1)) == [("microphone-silent", "over")]
    assert board.raised == []
    assert list(states(board, [CONDITION], 100)) == [("microphone-silent", "raised")]


def test_the_same_trouble_of_two_sources_is_two_alarms() -> None:
    other = Condition("microphone-silent", "n", "critical", "n: silence", "unmute it")
    assert len(AlarmBoard().update([CONDITION, other], clock.boottime_ns())) == 2


def lost_by(path: Path, work: Callable[[Outbox], Awaitable[object]], max_bytes: int = 2**20) -> list[Json]:
    """Kinds of the alarms after something was done to a real outbox."""
    is_new = not path.exists()

    async def main() -> list[Json]:
        before = earlier(path)
        with closing(Outbox(path, max_bytes)) as outbox:
            before = await outbox.statistics() if is_new else before
            await work(outbox)
            return [draft.data["kind"] for draft in losses(before, await outbox.statistics(), path)]

    return asyncio.run(main())


def test_messages_that_are_dropped_refused_or_damaged_are_alarms(tmp_path: Path) -> None:
    big = Draft("evt/transcript", "transcript", {"text": "x" * 100_000})

    async def fill(outbox: Outbox) -> None:
        for _ in range(15):
            await outbox.append(big)

    async def refuse(outbox: Outbox) -> None:
        (message,) = await outbox.append(big)
        await outbox.put_aside(message.seq, "not authorized")

    async def nothing(_: Outbox) -> None:
        pass

    assert lost_by(tmp_path / "a.db", fill) == ["outbox-dropped"]
    assert lost_by(tmp_path / "b.db", refuse) == ["outbox-refused"]
    assert lost_by(tmp_path / "c.db", nothing) == []
    with (tmp_path / "c.db").open("r+b") as file:
        file.write(bytes(4096))
    assert lost_by(tmp_path / "c.db", nothing) == ["outbox-damaged"]
    assert lost_by(tmp_path / "c.db", nothing) == []

    async def refuse_and_forget(outbox: Outbox) -> None:
        await outbox.discard([1])
        await refuse(outbox)

    assert read_statistics(tmp_path / "b.db").dead_letters == 1
    assert lost_by(tmp_path / "b.db", refuse_and_forget) == ["outbox-refused"]


def test_messages_that_waited_too_long_are_a_warning_that_says_how_many_of_which_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        limits: dict[Category, Limits] = {"transcript": Limits(max_age_s=60.0), "rejection": Limits(max_age_s=60.0)}
        with closing(Outbox(tmp_path / "a.db", 2**20, limits=limits)) as outbox:
            before = await outbox.statistics()
            drafts = (Draft("evt/transcript", "transcript", {}), Draft("evt/rejected", "rejection", {}))
            await outbox.append(*drafts, *drafts)
            now_ns = clock.boottime_ns()
            monkeypatch.setattr(clock, "boottime_ns", lambda: now_ns + 61 * clock.NS_PER_S)
            await outbox.drop_outdated()
            (alarm,) = losses(before, await outbox.statistics(), tmp_path)
        assert (alarm.data["kind"], alarm.data["severity"]) == ("outbox-outdated", "warning")
        assert "2 transcript, 2 rejection" in str(alarm.data["detail"])

    asyncio.run(main())


def test_every_alarm_that_the_code_can_raise_stands_in_the_docs_with_its_severity() -> None:
    package = Path(hearing.__file__).parent
    page = (package.parent / "docs/monitoring.md").read_text(encoding="utf-8")
    raised = set()
    for room in ("alarms", "caretaker", "daemon", "hearing", "thermal"):
        source = (package / f"{room}.py").read_text(encoding="utf-8")
        raised |= set(re.findall(r'(?:alarm_draft|Condition|_Trouble|append\(\()\(?\s*"([a-z]+-[a-z-]+)"', source))
    raised.add(hearing.TOO_NOISY)
    documented = set(re.findall(r"^\| `([a-z-]+)` \| (?:warning|critical) \|", page, re.MULTILINE))
    assert documented == raised
