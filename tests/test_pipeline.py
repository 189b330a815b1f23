"""From frames to the outbox, with real detector, recognizer, grammar and outbox: order, overload, failures, stops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from edge_asr import clock, commands, contract, model_store, pipeline, settings
from edge_asr.audio import FrameCutter, read_file
from edge_asr.events import FRAME_SAMPLES, SAMPLE_RATE, AudioFrame, Command, Draft, Json, Message, Rejection, Utterance
from edge_asr.gateway.talk import Talk, from_pcm16
from edge_asr.inference import OnnxRecognizer, RecognizerError, SileroDetector
from edge_asr.outbox import Outbox, OutboxError
from edge_asr.pipeline import (
    DETECTOR_REST_SAMPLES,
    Ear,
    Interpreter,
    Pipeline,
    Recognizer,
    Source,
    Understanding,
    understand,
)
from edge_asr.posteriors import Recognition
from edge_asr.settings import FilesSource, Settings
from edge_asr.sources import Files
from edge_asr.turns import FINALS

SECOND = 2 * SAMPLE_RATE
"""Bytes of PCM."""

QUIET = bytes(SECOND)


def recording(name: str) -> bytes:
    (path,) = model_store.bundled("recordings").glob(f"{name}*.flac")
    return read_file(path)


STOP = recording("20-emergency-stop")
CALL = recording("02-call-maintenance")
START = recording("01-start-line-three")
CONFIRM = recording("01b-confirm")


@pytest.fixture(scope="module")
def recognizer() -> OnnxRecognizer:
    return OnnxRecognizer(model_store.locate("micro-en"), settings.Model())


@pytest.fixture(scope="module")
def interpreter(recognizer: OnnxRecognizer) -> commands.Interpreter:
    graph = commands.load_graph([model_store.bundled("grammars") / "factory.en.yaml"])
    return commands.Interpreter(graph, recognizer.table, settings.Commands())


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    with closing(Outbox(tmp_path / "outbox.db", 10_000_000)) as opened:
        yield opened


@dataclass
class Tape:
    """A source that plays PCM, as fast as it is taken unless paced; if ``open_end``, waits for its closing then."""

    name: str
    pcm: bytes
    open_end: bool = False
    skipped: int = 0
    """Samples lost before the first frame of the second half."""
    frame_s: float = 0.0
    """Seconds between two frames."""
    taken: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def frames(self) -> AsyncIterator[AudioFrame]:
        cutter = FrameCutter(self.name)
        for frame in cutter.feed(self.pcm, clock.boottime_ns()):
            await asyncio.sleep(self.frame_s)
            self.taken += 1
            lost = self.skipped if frame.position > len(self.pcm) // 4 else 0
            yield replace(frame, position=frame.position + lost)
        self.ended.set()
        if self.open_end:
            await self.closed.wait()

    async def close(self) -> None:
        self.closed.set()


class Held:
    """The real recognizer under load: every call waits until it may go on, and is written down."""

    def __init__(self, recognizer: OnnxRecognizer) -> None:
        self._recognizer = recognizer
        self.name = recognizer.name
        self.heard: list[bytes] = []
        self.called = threading.Event()
        self.may_go_on = threading.Event()

    def recognize(self, pcm: bytes) -> Recognition:
        self.heard.append(pcm)
        self.called.set()
        assert self.may_go_on.wait(30)
        return self._recognizer.recognize(pcm)


@dataclass
class Direct:
    """Understands in the pipeline's own thread, with parts that a test may exchange."""

    recognizer: Recognizer
    interpreter: Interpreter | None

    @property
    def name(self) -> str:
        return self.recognizer.name

    def understand(self, utterance: Utterance, *, final: bool) -> Understanding:
        return understand(utterance, self.recognizer, None, self.interpreter if final else None)


class Moody:
    """An outbox that cannot commit the first few times: a disk that is full for a while."""

    def __init__(self, outbox: Outbox, failures: int) -> None:
        self._outbox = outbox
        self.failures = failures

    async def append(self, *drafts: Draft) -> tuple[Message, ...]:
        if self.failures:
            self.failures -= 1
            raise OutboxError("outbox.db: database or disk is full; free some space")
        return await self._outbox.append(*drafts)


@dataclass
class Rig:
    """A pipeline and what came out of it live."""

    pipeline: Pipeline
    live: list[tuple[str, Mapping[str, Json]]]

    async def run(self) -> None:
        await asyncio.wait_for(self.pipeline.run(), 60)


Assemble = Callable[..., Rig]


@pytest.fixture
def assemble(recognizer: OnnxRecognizer, interpreter: commands.Interpreter, outbox: Outbox) -> Assemble:
    def build(*sources: Source, options: Mapping[str, Any] | None = None, **parts: Any) -> Rig:
        live: list[tuple[str, Mapping[str, Json]]] = []
        chosen: dict[str, Any] = {
            "new_detector": lambda: SileroDetector(model_store.locate_vad()),
            "outbox": outbox,
            **parts,
        }
        heard_by = {"recognizer": recognizer, "interpreter": interpreter}
        engine = Direct(**{part: chosen.pop(part, usual) for part, usual in heard_by.items()})
        return Rig(
            Pipeline(
                Settings.model_validate(options or {}),
                sources=sources,
                engine=engine,
                live=lambda topic, data: live.append((topic, data)),
                **chosen,
            ),
            live,
        )

    return build


def ears(pcm: bytes) -> list[Utterance]:
    """What the real gate makes of a recording."""
    ear = Ear(SileroDetector(model_store.locate_vad()), settings.Vad())
    return [utterance for frame in FrameCutter("tape").feed(pcm, 0) for utterance in ear.feed(frame)]


async def committed(outbox: Outbox) -> list[Message]:
    return await outbox.oldest(1000)


def texts(messages: Sequence[Message], topic: str = contract.TRANSCRIPT) -> list[Json]:
    return [message.data["text"] for message in messages if message.topic == topic]


async def until(event: threading.Event) -> None:
    assert await asyncio.get_running_loop().run_in_executor(None, event.wait, 30)


# ---------------------------------------------------------------- what comes out


def test_recordings_become_transcripts_and_commands_in_the_order_in_which_they_were_said(
    assemble: Assemble, outbox: Outbox
) -> None:
    names = ("20-emergency-stop", "02-call-maintenance", "04-talk-about-the-game")
    paths = [next(model_store.bundled("recordings").glob(f"{name}*.flac")) for name in names]
    rig = assemble(Files(FilesSource(type="files", paths=tuple(paths), realtime=False)))

    async def play() -> list[Message]:
        await rig.run()
        return await committed(outbox)

    messages = asyncio.run(play())
    kinds = [(message.topic, message.data.get("intent") or message.data.get("reason")) for message in messages]
    assert kinds == [
        *((contract.TRANSCRIPT, None), (contract.COMMAND, "EmergencyStop")),
        *((contract.TRANSCRIPT, None), (contract.COMMAND, "CallMaintenance")),
        *((contract.TRANSCRIPT, None), (contract.REJECTED, "not-understood")),
    ]
    assert [message.seq for message in messages] == [1, 2, 3, 4, 5, 6]
    assert messages[3].data["slots"] == {"role": "maintenance", "place": "line-4"}
    for said, decided in zip(messages[::2], messages[1::2], strict=True):
        assert said.data["utterance_id"] == decided.data["utterance_id"]
    assert rig.pipeline.utterances == 3
    assert rig.pipeline.real_time_factor is not None


def test_a_commands_life_begins_when_the_speaker_ends(assemble: Assemble, outbox: Outbox) -> None:
    async def play() -> tuple[Message, int]:
        rig = assemble(Tape("tape", STOP))
        began_ns = clock.boottime_ns()
        await rig.run()
        (command,) = [message for message in await committed(outbox) if message.topic == contract.COMMAND]
        return command, began_ns

    command, began_ns = asyncio.run(play())
    ttl_ns = int(settings.Commands().ttl_s * clock.NS_PER_S)
    assert command.expires_ns is not None
    # The tape's frames were "captured" when the tape was made: its last one a moment after the test began.
    assert began_ns - 5 * clock.NS_PER_S < command.expires_ns - ttl_ns < began_ns + clock.NS_PER_S


def test_without_grammars_there_are_transcripts_alone(assemble: Assemble, outbox: Outbox) -> None:
    async def play() -> list[Message]:
        await assemble(Tape("tape", STOP), interpreter=None).run()
        return await committed(outbox)

    messages = asyncio.run(play())
    assert [message.topic for message in messages] == [contract.TRANSCRIPT]
    assert texts(messages) == ["emergency stop"]


def test_two_sources_are_heard_side_by_side_each_in_its_own_order(assemble: Assemble, outbox: Outbox) -> None:
    async def play() -> list[Message]:
        sources = Tape("left", STOP + QUIET + CALL + QUIET), Tape("right", CALL + QUIET + STOP + QUIET)
        await assemble(*sources).run()
        return await committed(outbox)

    said: dict[Json, list[Json]] = {}
    for message in asyncio.run(play()):
        if message.topic == contract.COMMAND:
            said.setdefault(message.data["source"], []).append(message.data["intent"])
    assert said == {"left": ["EmergencyStop", "CallMaintenance"], "right": ["CallMaintenance", "EmergencyStop"]}


def test_silence_and_noise_without_speech_come_to_nothing(assemble: Assemble, outbox: Outbox) -> None:
    async def play() -> list[Message]:
        await assemble(Tape("tape", QUIET * 3 + recording("16-nobody-speaks") + QUIET)).run()
        return await committed(outbox)

    assert [message.topic for message in asyncio.run(play()) if message.topic != contract.REJECTED] == []


def test_an_intent_that_only_some_stations_may_give_is_refused_from_others(assemble: Assemble, outbox: Outbox) -> None:
    class Guarded:
        def interpret(self, recognition: Recognition) -> Command | Rejection:
            assert recognition.log_posteriors is not None
            return Command("EmergencyStop", {}, 0.9, "normal", 10.0, stations=("desk",))

    async def play() -> list[Message]:
        await assemble(Tape("hall", STOP), Tape("desk", STOP), interpreter=Guarded()).run()
        return await committed(outbox)

    decided = {
        (m.data["source"], m.topic, m.data.get("reason"))
        for m in asyncio.run(play())
        if "intent" in m.data or "reason" in m.data
    }
    assert decided == {("hall", contract.REJECTED, "not-allowed"), ("desk", contract.COMMAND, None)}


# ---------------------------------------------------------------- partials


def test_partials_of_who_speaks_precede_the_transcript_and_carry_its_id(assemble: Assemble, outbox: Outbox) -> None:
    async def play() -> tuple[list[tuple[str, Mapping[str, Json]]], list[Message]]:
        # Paced, or the utterance may be over before its first partial is recognized, which is then rightly dropped.
        rig = assemble(Tape("tape", CALL + QUIET, frame_s=0.016), options={"partials": {"interval_s": 0.2}})
        await rig.run()
        return rig.live, await committed(outbox)

    live, messages = asyncio.run(play())
    transcript = next(message for message in messages if message.topic == contract.TRANSCRIPT)
    assert {topic for topic, _ in live} == {contract.PARTIAL}
    assert {data["utterance_id"] for _, data in live} == {transcript.data["utterance_id"]}
    durations = [float(str(data["duration_s"])) for _, data in live]
    assert durations == sorted(durations)
    assert durations[0] < float(str(transcript.data["duration_s"]))  # the last may hold silence that the final drops


def test_a_source_is_told_when_somebody_begins_and_ends_to_speak(assemble: Assemble) -> None:
    async def play() -> list[tuple[str, bool]]:
        rig, turns = assemble(Tape("tape", (CALL + QUIET) * 2)), list[tuple[str, bool]]()
        rig.pipeline.turned = lambda source, speaking: turns.append((source, speaking))
        await rig.run()
        return turns

    assert asyncio.run(play()) == [("tape", speaking) for speaking in (False, True, False, True, False)]


def test_partials_can_be_turned_off(assemble: Assemble) -> None:
    async def play() -> Rig:
        rig = assemble(Tape("tape", CALL + QUIET), options={"partials": {"enabled": False}})
        await rig.run()
        return rig

    assert asyncio.run(play()).live == []


def test_a_partial_that_comes_after_its_final_was_closed_is_never_published(
    assemble: Assemble, outbox: Outbox, recognizer: OnnxRecognizer
) -> None:
    async def play() -> tuple[Rig, Held, list[Message]]:
        held, tape = Held(recognizer), Tape("tape", CALL + QUIET, open_end=True)
        rig = assemble(tape, recognizer=held, options={"partials": {"interval_s": 0.2}})
        running = asyncio.create_task(rig.run(), name="pipeline")
        await until(held.called)  # a partial is being recognized ...
        await asyncio.wait_for(tape.ended.wait(), 30)  # ... while its utterance is closed
        held.may_go_on.set()
        await tape.close()
        await running
        return rig, held, await committed(outbox)

    rig, held, messages = asyncio.run(play())
    assert len(held.heard[0]) < len(held.heard[-1])
    assert rig.live == []
    assert len(texts(messages)) == 1


# ---------------------------------------------------------------- foresight


class Noted:
    """The real recognizer, which writes down what it was asked and whether the tape had gone on by then."""

    def __init__(self, recognizer: OnnxRecognizer) -> None:
        self._recognizer = recognizer
        self.name = recognizer.name
        self.heard: list[bytes] = []

    def recognize(self, pcm: bytes) -> Recognition:
        self.heard.append(pcm)
        return self._recognizer.recognize(pcm)


def test_who_has_stopped_speaking_is_understood_while_the_gate_still_waits_and_once_only(
    assemble: Assemble, outbox: Outbox, recognizer: OnnxRecognizer
) -> None:
    async def play() -> tuple[Noted, Rig, list[Message], list[pipeline.Timing]]:
        noted, timings = Noted(recognizer), list[pipeline.Timing]()
        tape = Tape("tape", STOP + QUIET, frame_s=0.032)  # as it was spoken, so that there is time to foresee
        rig = assemble(tape, recognizer=noted, options={"partials": {"enabled": False}})
        rig.pipeline.noted = lambda _heard, timing: timings.append(timing)
        await rig.run()
        return noted, rig, await committed(outbox), timings

    noted, rig, messages, (timing,) = asyncio.run(play())
    assert len(noted.heard) == 1
    assert texts(messages) == ["emergency stop"]
    assert [message.topic for message in messages] == [contract.TRANSCRIPT, contract.COMMAND]
    assert timing.waited_s + timing.understood_s < timing.total_s - timing.committed_s
    assert rig.pipeline.real_time_factor == pytest.approx(timing.understood_s * SECOND / len(noted.heard[0]))


def test_who_speaks_on_after_a_pause_is_understood_as_a_whole(
    assemble: Assemble, outbox: Outbox, recognizer: OnnxRecognizer
) -> None:
    (utterance,) = ears(STOP + QUIET)
    begun = utterance.pcm[: -SECOND * 3 // 10]  # without the silence behind it
    pause = bytes(SECOND * 4 // 10)  # longer than what is foreseen after, too short for the gate
    said = begun + pause + begun[SECOND * 4 // 10 :]

    async def play() -> tuple[Noted, list[Message]]:
        noted = Noted(recognizer)
        rig = assemble(
            Tape("tape", said + QUIET, frame_s=0.016), recognizer=noted, options={"partials": {"enabled": False}}
        )
        await rig.run()
        return noted, await committed(outbox)

    noted, messages = asyncio.run(play())
    first, whole = noted.heard
    assert len(first) < len(begun + pause) < len(whole)
    assert texts(messages) == [recognizer.recognize(whole).transcript.text]


# ---------------------------------------------------------------- questions


@dataclass
class Halting(Tape):
    """Stands still at its first frame from ``at`` (bytes) on until it may go on."""

    at: int = 0
    halted: asyncio.Event = field(default_factory=asyncio.Event)
    may_go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def frames(self) -> AsyncIterator[AudioFrame]:
        async for frame in super().frames():
            if 2 * frame.position >= self.at:
                self.halted.set()
                await self.may_go_on.wait()
            yield frame


CONFIRMED = [contract.TRANSCRIPT, contract.PENDING, contract.TRANSCRIPT, contract.COMMAND]
WINDOW = {"commands": {"confirm_within_s": 3}}
"""A tape is stamped as if it had just been played, so with four seconds behind the order its question is over."""


def test_a_yes_that_waits_for_the_recognizer_when_the_question_ends_was_said_in_time(
    assemble: Assemble, outbox: Outbox, recognizer: OnnxRecognizer
) -> None:
    async def play() -> list[Message]:
        held, tape = Held(recognizer), Tape("tape", START + QUIET + CONFIRM + 3 * QUIET)
        rig = assemble(tape, recognizer=held, options=WINDOW | {"partials": {"enabled": False}})
        running = asyncio.create_task(rig.run())
        await tape.ended.wait()
        held.may_go_on.set()
        await running
        return await committed(outbox)

    messages = asyncio.run(play())
    assert [message.topic for message in messages] == CONFIRMED
    assert messages[-1].data["confirmed_by"] == "voice"


def test_a_yes_that_is_being_said_when_the_question_ends_is_waited_for(assemble: Assemble, outbox: Outbox) -> None:
    async def play() -> list[Message]:
        begun = START + QUIET + CONFIRM[: len(CONFIRM) * 6 // 10]
        tape = Halting("tape", START + QUIET + CONFIRM + 3 * QUIET, at=len(begun))
        rig = assemble(tape, options=WINDOW)
        asked = asyncio.Event()
        rig.pipeline.told = lambda message: asked.set() if message.topic == contract.PENDING else None
        running = asyncio.create_task(rig.run())
        await tape.halted.wait()
        await asked.wait()
        assert rig.pipeline.ears["tape"].speaking
        assert not rig.pipeline.pending  # its time is over
        tape.may_go_on.set()
        await running
        return await committed(outbox)

    assert [message.topic for message in asyncio.run(play())] == CONFIRMED


def test_a_question_ends_in_time_while_nobody_speaks(assemble: Assemble, outbox: Outbox) -> None:
    async def play() -> list[Message]:
        tape = Tape("tape", START + 5 * QUIET, open_end=True)
        rig = assemble(tape, options=WINDOW)
        cancelled = asyncio.Event()
        rig.pipeline.told = lambda message: cancelled.set() if message.topic == contract.REJECTED else None
        running = asyncio.create_task(rig.run())
        await asyncio.wait_for(cancelled.wait(), 10)
        await rig.pipeline.close()
        await running
        return await committed(outbox)

    *_, last = asyncio.run(play())
    assert last.data["reason"] == "not-confirmed"
    assert "no answer in 3 s" in str(last.data["detail"])


# ---------------------------------------------------------------- overload


def test_under_overload_partials_are_dropped_and_finals_never(
    assemble: Assemble, outbox: Outbox, recognizer: OnnxRecognizer
) -> None:
    async def play() -> tuple[Held, Rig, list[Message]]:
        held, tape = Held(recognizer), Tape("tape", (STOP + QUIET) * 5, open_end=True)
        rig = assemble(tape, recognizer=held, options={"partials": {"interval_s": 0.2}})
        running = asyncio.create_task(rig.run(), name="pipeline")
        await asyncio.wait_for(tape.ended.wait(), 30)
        held.may_go_on.set()
        await tape.close()
        await running
        return held, rig, await committed(outbox)

    held, rig, messages = asyncio.run(play())
    assert [str(text).split()[0] for text in texts(messages)] == ["emergency"] * 5
    assert len(held.heard) == 6  # the partial that was under way, then finals alone
    assert rig.live == []


def test_a_full_queue_makes_the_source_wait_and_loses_nothing(
    assemble: Assemble, outbox: Outbox, recognizer: OnnxRecognizer
) -> None:
    count = FINALS + 4

    async def play() -> tuple[Tape, list[Message]]:
        held, tape = Held(recognizer), Tape("tape", (STOP + QUIET) * count)
        rig = assemble(tape, recognizer=held, options={"partials": {"enabled": False}})
        running = asyncio.create_task(rig.run(), name="pipeline")
        taken = -1
        while taken != tape.taken:  # until the tape stands still
            taken = tape.taken
            await asyncio.sleep(0.25)
        assert 0 < taken < len(tape.pcm) // (2 * FRAME_SAMPLES)
        held.may_go_on.set()
        await running
        return tape, await committed(outbox)

    tape, messages = asyncio.run(play())
    assert tape.ended.is_set()
    assert [str(text).split()[0] for text in texts(messages)] == ["emergency"] * count


# ---------------------------------------------------------------- stopping and failing


def test_closing_commits_what_was_heard_so_far(assemble: Assemble, outbox: Outbox) -> None:
    async def play() -> list[Message]:
        spoken = STOP[: len(STOP) - SECOND // 2]  # no silence behind it that would end the utterance
        tape = Tape("tape", spoken, open_end=True)
        rig = assemble(tape, options={"vad": {"min_silence_s": 5}})
        running = asyncio.create_task(rig.run(), name="pipeline")
        await asyncio.wait_for(tape.ended.wait(), 30)
        assert await committed(outbox) == []
        assert rig.pipeline.ears["tape"].speaking
        await rig.pipeline.close()
        await running
        return await committed(outbox)

    assert texts(asyncio.run(play())) == ["emergency stop"]


def test_an_utterance_that_cannot_be_recognized_is_rejected_and_the_next_is_heard(
    assemble: Assemble, outbox: Outbox, recognizer: OnnxRecognizer
) -> None:
    class Stumbling:
        name = recognizer.name
        calls = 0

        def recognize(self, pcm: bytes) -> Recognition:
            self.calls += 1
            return recognizer.recognize(pcm if self.calls > 1 else pcm[:100])

    async def play() -> list[Message]:
        rig = assemble(
            Tape("tape", (STOP + QUIET) * 2), recognizer=Stumbling(), options={"partials": {"enabled": False}}
        )
        await rig.run()
        return await committed(outbox)

    rejected, transcript, command = asyncio.run(play())
    assert (rejected.topic, rejected.data["reason"]) == (contract.REJECTED, "recognizer-failed")
    assert rejected.data["detail"] == "0.003 s of audio, expected 0.025..31 s"
    assert transcript.data["text"] == "emergency stop"
    assert command.data["intent"] == "EmergencyStop"


def test_listening_again_may_fail_like_listening_once(assemble: Assemble, outbox: Outbox) -> None:
    class Rehearing:
        def interpret(self, recognition: Recognition) -> Command | Rejection:
            raise RecognizerError(f"onnxruntime failed on {recognition.transcript.text!r} at another pace")

    async def play() -> list[Message]:
        await assemble(Tape("tape", STOP), interpreter=Rehearing()).run()
        return await committed(outbox)

    (rejected,) = asyncio.run(play())
    assert rejected.data["reason"] == "recognizer-failed"
    assert "at another pace" in str(rejected.data["detail"])


def test_an_outbox_that_cannot_commit_is_asked_again_and_nothing_is_lost(
    assemble: Assemble, outbox: Outbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pipeline, "APPEND_RETRY_S", 0.01)
    caplog.set_level("INFO", logger="edge_asr.pipeline")

    async def play() -> tuple[Rig, list[Message]]:
        rig = assemble(Tape("tape", (STOP + QUIET) * 2), outbox=Moody(outbox, failures=2))
        await rig.run()
        return rig, await committed(outbox)

    rig, messages = asyncio.run(play())
    assert [message.topic for message in messages] == [contract.TRANSCRIPT, contract.COMMAND] * 2
    assert rig.pipeline.trouble == ""
    told = [record.getMessage() for record in caplog.records if "commit" in record.getMessage()]
    assert len(told) == 2
    assert "disk is full" in told[0]
    assert told[1] == "committing again"


def test_a_disk_that_stays_full_delays_a_stop_only_so_long_and_says_what_is_lost(
    assemble: Assemble, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "APPEND_RETRY_S", 0.01)
    monkeypatch.setattr(pipeline, "STOP_LIMIT_NS", clock.NS_PER_S // 10)

    async def play() -> None:
        tape = Tape("tape", STOP + QUIET, open_end=True)
        rig = assemble(tape, outbox=Moody(outbox, failures=10**9))
        running = asyncio.create_task(rig.run(), name="pipeline")
        await asyncio.wait_for(tape.ended.wait(), 30)
        await rig.pipeline.close()
        await running

    with pytest.raises(OutboxError, match=r"2 messages of this stop are lost: outbox\.db: database or disk is full"):
        asyncio.run(play())


# ---------------------------------------------------------------- the ear


class Counted(SileroDetector):
    """The real detector, counting."""

    asked = 0
    resets = -1  # the constructor's own

    def probability(self, pcm: bytes) -> float:
        self.asked += 1
        return super().probability(pcm)

    def reset(self) -> None:
        self.resets += 1
        super().reset()


def frames_of(pcm: bytes, first: int = 0) -> list[AudioFrame]:
    cutter = FrameCutter("tape")
    return [replace(frame, position=frame.position + first) for frame in cutter.feed(pcm, 0)]


def test_silence_does_not_reach_the_detector_and_clears_its_memory_once() -> None:
    detector = Counted(model_store.locate_vad())
    ear = Ear(detector, settings.Vad())
    for frame in frames_of(QUIET * 3):
        ear.feed(frame)
    assert 3 * SAMPLE_RATE > DETECTOR_REST_SAMPLES
    assert (detector.asked, detector.resets) == (0, 2)  # when it began, and when it had lasted


def test_lost_audio_clears_the_detectors_memory_and_ends_the_utterance() -> None:
    detector = Counted(model_store.locate_vad())
    ear = Ear(detector, settings.Vad())
    frames = frames_of(STOP)
    speaking = next(place for place, frame in enumerate(frames) if ear.feed(frame) == [] and ear.speaking)
    for frame in frames[speaking + 1 : speaking + 20]:
        ear.feed(frame)
    resets = detector.resets
    jumped = replace(frames[speaking + 20], position=frames[speaking + 20].position + 5000)
    (closed,) = ear.feed(jumped)
    assert detector.resets == resets + 1
    assert closed.start + len(closed.pcm) // 2 == frames[speaking + 20].position
    assert ear.meter.lost_samples == 5000


def test_lost_audio_makes_two_utterances_of_one(assemble: Assemble, outbox: Outbox) -> None:
    async def play() -> list[Message]:
        await assemble(Tape("tape", CALL, skipped=8000), interpreter=None).run()
        return await committed(outbox)

    assert len(texts(asyncio.run(play()))) == 2


# ---------------------------------------------------------------- guests


@dataclass
class Visit:
    """A pipeline that guests may come to."""

    rig: Rig
    running: asyncio.Task[None]
    told: list[Message]

    async def end(self) -> None:
        await self.rig.pipeline.close()
        await asyncio.wait_for(self.running, 30)


def visit(assemble: Assemble, *sources: Source, **parts: Any) -> Visit:
    told: list[Message] = []
    rig = assemble(*sources, **parts)
    rig.pipeline.told, rig.pipeline.awaits_guests = told.append, True
    return Visit(rig, asyncio.create_task(rig.run(), name="pipeline"), told)


def test_a_guest_is_heard_like_any_source_and_hears_what_was_committed_before_it_leaves(assemble: Assemble) -> None:
    async def play() -> tuple[list[Message], set[str]]:
        house = visit(assemble)
        await house.rig.pipeline.hear(Tape("guest", STOP + QUIET))
        told, ears = house.told.copy(), set(house.rig.pipeline.ears)
        await house.rig.pipeline.hear(Tape("guest", CALL))  # the same one comes again
        await house.end()
        return told + house.told[len(told) :], ears

    messages, ears = asyncio.run(play())
    assert ears == set()
    assert [message.data["intent"] for message in messages if message.topic == contract.COMMAND] == [
        "EmergencyStop",
        "CallMaintenance",
    ]


def test_a_guest_that_fails_harms_nobody_else(assemble: Assemble) -> None:
    class Broken(Tape):
        async def frames(self) -> AsyncIterator[AudioFrame]:
            yield FrameCutter(self.name).feed(self.pcm, clock.boottime_ns())[0]
            raise ConnectionError("the tablet fell down")

    async def play() -> list[Message]:
        house = visit(assemble, Tape("own", STOP, frame_s=0.001))
        with pytest.raises(ConnectionError):
            await house.rig.pipeline.hear(Broken("guest", CALL))
        assert set(house.rig.pipeline.ears) == {"own"}
        await house.rig.pipeline.hear(Tape("guest", CALL))
        await house.end()
        return house.told

    said = {(m.data["source"], m.data["text"]) for m in asyncio.run(play()) if m.topic == contract.TRANSCRIPT}
    assert {source for source, _ in said} == {"own", "guest"}


def test_two_of_one_name_are_not_heard_at_once(assemble: Assemble) -> None:
    async def play() -> None:
        house = visit(assemble, Tape("own", STOP, open_end=True))
        with pytest.raises(ValueError, match="own is being heard already"):
            await house.rig.pipeline.hear(Tape("own", CALL))
        await house.end()

    asyncio.run(play())


def test_closing_commits_what_a_guest_is_saying_and_lets_nobody_in_any_more(assemble: Assemble) -> None:
    async def play() -> list[Message]:
        spoken = STOP[: len(STOP) - SECOND // 2]
        house = visit(assemble, options={"vad": {"min_silence_s": 5}})
        tape = Tape("guest", spoken, open_end=True)
        heard = asyncio.create_task(house.rig.pipeline.hear(tape), name="guest")
        await asyncio.wait_for(tape.ended.wait(), 30)
        await house.end()
        assert await heard
        assert not await house.rig.pipeline.hear(Tape("late", CALL))
        return house.told

    assert texts(asyncio.run(play())) == ["emergency stop"]


def test_a_guest_whose_turn_comes_while_the_pipeline_closes_is_heard_with_what_it_holds(assemble: Assemble) -> None:
    async def play() -> list[Message]:
        house = visit(assemble)
        first, waiting = Tape("first", STOP, open_end=True), Talk("waiting", 1)
        waiting.offer(0, from_pcm16(CALL + QUIET))

        async def come() -> bool:
            await house.rig.pipeline.hear(first)
            return await house.rig.pipeline.hear(waiting)

        coming = asyncio.create_task(come(), name="guests")
        await asyncio.wait_for(first.ended.wait(), 30)
        await house.end()
        assert await coming
        assert (waiting.ended, waiting.torn) == (True, True)
        return house.told

    assert [m.data["intent"] for m in asyncio.run(play()) if m.topic == contract.COMMAND][-1] == "CallMaintenance"


def test_sources_take_turns_so_that_none_waits_for_all_of_anothers(
    assemble: Assemble, recognizer: OnnxRecognizer
) -> None:
    async def play() -> list[Message]:
        held = Held(recognizer)
        house = visit(assemble, recognizer=held, options={"partials": {"enabled": False}})
        first, second = Tape("long-winded", (STOP + QUIET) * 4), Tape("brief", CALL)
        visits = [asyncio.create_task(house.rig.pipeline.hear(first), name="first")]
        await asyncio.wait_for(first.ended.wait(), 30)
        visits.append(asyncio.create_task(house.rig.pipeline.hear(second), name="second"))
        await asyncio.wait_for(second.ended.wait(), 30)
        assert house.rig.pipeline.finals_waiting in {4, 5}  # the first of five is being recognized, maybe foreseen
        held.may_go_on.set()
        await asyncio.gather(*visits)
        await house.end()
        return house.told

    order = [m.data["source"] for m in asyncio.run(play()) if m.topic == contract.TRANSCRIPT]
    assert (order.count("brief"), order.count("long-winded")) == (1, 4)
    assert order.index("brief") <= 2
