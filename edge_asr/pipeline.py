"""One utterance's way: listen -> understand -> append. Read here how a frame becomes a message.

1. A source yields frames (``sources``: its bounded buffer is the only place where audio may be lost, visibly).
2. Each source's :class:`Ear` gives the frame its speech probability and feeds the gate (``speech``).
3. A closed utterance enters its source's bounded queue of finals (``turns``); the sources take turns. A full queue
   makes the listener wait, the source's buffer fill, and at last the oldest audio go: finals are never dropped.
4. :func:`understand` recognizes one utterance at a time in the recognizer's own thread (``inference``), writes it in
   likely words and the site's own (``text_decoding``) and interprets it (``commands``); :meth:`Pipeline._append` puts
   transcript, command or rejection into the outbox in one commit (``outbox``). While there is no final, the growing
   utterance of whoever speaks is recognized: a partial. Half-way into the closing silence the utterance is what it will
   be if nobody speaks on: it is understood then, *foreseen*, so that at the gate's closing only the commit is left.
5. From there the publisher takes over; nothing here knows or waits for a broker.

Beside the sources of the settings, guests may come and go (:meth:`Pipeline.hear`); one that fails harms nobody else.

Stopping: a closed source ends its frames, the listener flushes the gate, and the last final is committed before
:meth:`Pipeline.run` returns.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

from edge_asr import clock, confirmation, contract, settings
from edge_asr.audio import Levels, measure
from edge_asr.capacity import BUSY, Capacity
from edge_asr.events import (
    FRAME_SAMPLES,
    SAMPLE_RATE,
    AudioFrame,
    Command,
    Draft,
    Json,
    Message,
    Rejection,
    Transcript,
    Utterance,
    derived_id,
)
from edge_asr.hearing import SourceMeter
from edge_asr.inference import RecognizerError
from edge_asr.outbox import OutboxError
from edge_asr.posteriors import Recognition
from edge_asr.speech import SpeechGate
from edge_asr.spool import Spool
from edge_asr.text_decoding import TextDecoder
from edge_asr.turns import Kind, Turns

log = logging.getLogger(__name__)

NO_STATION = ""
"""Source of a recording that is only looked at: it may command everything."""

DETECTOR_REST_SAMPLES = 32 * FRAME_SAMPLES
"""After so much silence below the energy gate the detector's memory is stale and is cleared."""

REMEMBERED = 32
"""Sources whose last words can be said again."""

CANCEL_AGAIN_S = 4.0
"""Longer than any task takes to say goodbye."""

STOP_LIMIT_NS = 5 * clock.NS_PER_S
"""A stopping daemon does not wait longer for a full disk: systemd would kill it before it could say what is lost."""

UNHEARD_S = 0.1
"""Between two looks whether what was said before a question's end has been heard by now."""

APPEND_RETRY_S = 2.0
"""Pause before a failed commit is tried again: a full disk may be freed by a person or by the outbox's own quota."""


class Source(Protocol):
    """Where audio comes from."""

    @property
    def name(self) -> str:
        """Unique among the sources."""

    def frames(self) -> AsyncIterator[AudioFrame]:
        """Frames in order; ends when the source does, or after :meth:`close`."""

    async def close(self) -> None:
        """End :meth:`frames` soon; what was captured is still yielded."""


class SpeechDetector(Protocol):
    """Tells speech from everything else, one source's frames in order."""

    def probability(self, pcm: bytes) -> float:
        """Probability 0..1 that the frame holds speech."""

    def reset(self) -> None:
        """Forget the past: the next frame does not follow the last."""


class Recognizer(Protocol):
    """Turns an utterance into text and posteriors; blocking, called from one thread."""

    @property
    def name(self) -> str:
        """The model's name, for the payloads."""

    def recognize(self, pcm: bytes) -> Recognition:
        """Decode 16 kHz mono int16. Raises RecognizerError."""


class Interpreter(Protocol):
    """Finds the command in an utterance."""

    def interpret(self, recognition: Recognition) -> Command | Rejection:
        """The command, or why there is none."""


class Engine(Protocol):
    """Understands one utterance at a time; blocking, called from one thread."""

    @property
    def name(self) -> str:
        """The model's name, for the payloads."""

    def understand(self, utterance: Utterance, *, final: bool) -> Understanding:
        """Recognize an utterance; a final one is interpreted too. What goes wrong with it becomes a rejection."""


class Outbox(Protocol):
    """Keeps messages until the broker has them."""

    async def append(self, *drafts: Draft) -> tuple[Message, ...]:
        """Commit all or none; returns after the commit. Raises OutboxError."""


@dataclass(frozen=True, slots=True)
class Understanding:
    """Everything that came of one utterance."""

    utterance: Utterance
    transcript: Transcript | None
    """None where nothing was said or the recognizer failed."""
    decision: Command | Rejection | None
    """None where the site has no grammar."""
    recognized_s: float = 0.0
    """Seconds that the model and the hotwords took."""
    interpreted_s: float = 0.0
    """Seconds that the grammar took, other listenings included."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of one utterance went."""

    waited_s: float
    """From the end of speech until the recognizer took it: the queue, and closing silence where it was not foreseen."""
    understood_s: float
    """Recognizer and interpreter, the way to their process included."""
    committed_s: float
    total_s: float
    """From the end of speech to the commit."""


Live = Callable[[str, Mapping[str, Json]], None]
"""Publishes (topic suffix, payload) at once or not at all."""


async def with_company(work: Awaitable[object], *company: asyncio.Task[None]) -> None:
    """Await ``work`` beside tasks that run all along: cancelled with it, and the error of one that ends is raised."""
    main = asyncio.ensure_future(work)
    try:
        while not main.done():
            left = [task for task in company if not task.done()]
            await asyncio.wait([main, *left], return_when=asyncio.FIRST_COMPLETED)
            for task in company:
                if task.done():
                    task.result()
        await main
    finally:
        ending: set[asyncio.Future[Any]] = {main, *company}
        while ending:  # more than once, for before Python 3.12 wait_for may swallow a cancellation
            for each in ending:
                each.cancel()
            _, ending = await asyncio.wait(ending, timeout=CANCEL_AGAIN_S)
        await asyncio.gather(main, *company, return_exceptions=True)


class Ear:
    """One source's detector and gate: frames go in, utterances come out."""

    def __init__(self, detector: SpeechDetector, options: settings.Vad) -> None:
        self._detector = detector
        self._energy_gate_dbfs = options.energy_gate_dbfs
        self._gate = SpeechGate(options)
        self._quiet_samples = 0
        self._expected: int | None = None
        self.meter = SourceMeter()

    def feed(self, frame: AudioFrame) -> list[Utterance]:
        """Take the next frame; return the utterances it closed."""
        if frame.position != self._expected:
            self._detector.reset()  # audio was lost: what came before says nothing about this frame
        self._expected = frame.end
        levels = measure(frame.pcm)
        self.meter.feed(frame, levels)
        return self._gate.feed(frame, self._probability(frame, levels) if frame.pcm else 0.0)

    def flush(self) -> list[Utterance]:
        """Close what is open: no frame will follow."""
        return self._gate.flush()

    def ignore(self, frame: AudioFrame) -> list[Utterance]:
        """Take a frame while nobody may listen: only its level counts, and what was being said is forgotten."""
        self._gate.flush()
        self._expected = None
        self.meter.feed(frame, measure(frame.pcm))
        return []

    def growing(self) -> Utterance | None:
        """The open utterance so far; None while nobody speaks."""
        return self._gate.growing()

    def foreseen(self) -> Utterance | None:
        """What the open utterance will be unless somebody speaks on; given once per silence."""
        return self._gate.foreseen()

    @property
    def speaking(self) -> bool:
        """Whether an utterance is open."""
        return self._gate.speaking

    def _probability(self, frame: AudioFrame, levels: Levels) -> float:
        """The detector's answer; silence does not even reach it, unless somebody speaks."""
        if self._gate.speaking or levels.level_dbfs >= self._energy_gate_dbfs:
            self._quiet_samples = 0
            return self._detector.probability(frame.pcm)
        self._quiet_samples += FRAME_SAMPLES
        if self._quiet_samples == DETECTOR_REST_SAMPLES:
            self._detector.reset()
        return 0.0


def understand(
    utterance: Utterance, recognizer: Recognizer, decoder: TextDecoder | None, interpreter: Interpreter | None
) -> Understanding:
    """Recognize and interpret one utterance; blocking."""
    began = time.perf_counter()
    try:
        recognition = recognizer.recognize(utterance.pcm)
        if decoder is not None:
            recognition = decoder.apply(recognition)
        recognized = time.perf_counter()
        decision = interpreter.interpret(recognition) if interpreter is not None else None  # it may listen again
    except RecognizerError as error:
        return Understanding(utterance, None, Rejection("recognizer-failed", str(error)))
    recognized_s, interpreted_s = recognized - began, time.perf_counter() - recognized
    transcript = recognition.transcript
    if isinstance(decision, Command) and decision.stations and utterance.source not in {NO_STATION, *decision.stations}:
        stations = ", ".join(decision.stations)
        decision = Rejection("not-allowed", f"{decision.intent} may come from {stations} only", decision.confidence)
    if utterance.torn and isinstance(decision, Command) and not decision.cancels:
        detail = f"audio was lost while {decision.words!r} was said, there may have been more; say it again"
        decision = Rejection("cut-off", detail, decision.confidence)
    return Understanding(utterance, transcript if transcript.text else None, decision, recognized_s, interpreted_s)


@dataclass(frozen=True, slots=True)
class _Heard:
    """An understanding and when it was come to (CLOCK_BOOTTIME)."""

    what: Understanding
    began_ns: int
    ended_ns: int


class Pipeline:
    """Connects the sources to the outbox."""

    def __init__(
        self,
        options: settings.Settings,
        *,
        sources: Sequence[Source],
        new_detector: Callable[[], SpeechDetector],
        engine: Engine,
        outbox: Outbox,
        live: Live,
        spool: Spool | None = None,
    ) -> None:
        self._options = options
        self._sources = sources
        self._new_detector = new_detector
        self.ears = {source.name: Ear(new_detector(), options.vad) for source in sources}
        """Source -> its ear, whose meter tells the source's health."""
        self._engine = engine
        self._outbox = outbox
        self._live = live
        self.told: Callable[[Message], None] = lambda _message: None
        """Hears of every message right after its commit."""
        self.turned: Callable[[str, bool], None] = lambda _source, _speaking: None
        """Hears of a source when it is first listened to, and when somebody begins to speak there (true) or ends."""
        self.understood: Callable[[Utterance], None] = lambda _utterance: None
        """Hears of every final right before the commit of what came of it."""
        self.noted: Callable[[Understanding, Timing], None] = lambda _heard, _timing: None
        """Hears of every final right after its commit."""
        self.awaits_guests = False
        """Whether :meth:`run` goes on until :meth:`close`, for guests may come when the named sources have ended."""
        self._guests: dict[str, Source] = {}
        self._guest_left = asyncio.Event()
        self._closing = asyncio.Event()
        self._heard_all = False
        """Whether the last source has ended: nothing can be recognized after that."""
        self.distrusted: Mapping[str, str] = {}
        """Source -> why none of its commands may pass now; see ``hearing``."""
        self._desk = confirmation.ConfirmationDesk(options.commands.confirm_within_s)
        self._confirming = asyncio.Event()
        """Set whenever what is pending may have changed."""
        self._turns = Turns()
        self._capacity = Capacity()
        self._decoding_since_ns: int | None = None
        """CLOCK_BOOTTIME at which the decode under way began."""
        self._spool = spool or Spool()
        self._growing: dict[str, str] = {}
        """Source -> id of its open utterance; a partial that comes after its final is dropped."""
        self._foreseen: dict[str, _Heard] = {}
        """Source -> what its open utterance was understood to be, unless somebody speaks on."""
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="recognizer")
        self._closed_ns: int | None = None
        self._last: dict[str, Message] = {}
        """Source -> what it said last, the newest last; of the last :data:`REMEMBERED` sources."""
        self.muted = False
        """Whether the ears are closed; see :meth:`mute`."""
        self.trouble = ""
        """Why nothing can be committed; empty when all is well."""
        self.utterances = 0
        """Finals committed since start."""
        self.real_time_factor: float | None = None
        """Recognition time of the last final over its duration."""

    async def run(self) -> None:
        """Listen to all sources until all have ended, guests included, and everything heard is committed."""
        try:
            await with_company(
                asyncio.gather(self._listen_to_all(), self._understand()),
                asyncio.create_task(self._cancel_unconfirmed(), name="confirmation"),
            )
        finally:
            self._executor.shutdown(wait=False)
        await self._commit(self._desk.close("the device stopped"))

    async def close(self) -> None:
        """Close the sources; :meth:`run` then ends by itself."""
        self._closed_ns = clock.boottime_ns()
        self._closing.set()
        for source in (*self._sources, *self._guests.values()):
            await source.close()

    @property
    def finals_waiting(self) -> int:
        """How many utterances wait for the recognizer: the measure of overload."""
        return self._turns.finals

    @property
    def is_late(self) -> bool:
        """Whether a final that is said now would have to wait too long for the recognizer."""
        return self._capacity.is_late(clock.boottime_ns(), self._turns.waiting_s, self._decoding_since_ns)

    @property
    def busy(self) -> float:
        """Share of the last half minute in which the recognizer did what nobody may drop."""
        return self._capacity.busy(clock.boottime_ns())

    @property
    def is_busy(self) -> bool:
        """Whether the recognizer has no time left for another speaker."""
        return self.busy >= BUSY

    @property
    def partials_dropped(self) -> int:
        """How many partials gave way to something newer."""
        return self._turns.partials_dropped

    @property
    def pending(self) -> tuple[confirmation.Pending, ...]:
        """The questions that are open now, the oldest first."""
        now_ns = clock.boottime_ns()
        return tuple(pending for pending in self._desk.pending if now_ns < pending.until_ns)

    async def confirm(self, pending_id: str, confirmations_left: int, role: str) -> confirmation.Pending | None:
        """Say yes to a question; the question that is left, None: it is a command now. Raises ConfirmationError."""
        outcome = self._desk.confirm(pending_id, confirmations_left, role, clock.boottime_ns())
        self._confirming.set()
        await self._commit([outcome])
        return outcome if isinstance(outcome, confirmation.Pending) else None

    async def cancel(self, pending_id: str) -> None:
        """Say no to a question. Raises ConfirmationError."""
        outcome = self._desk.cancel(pending_id, clock.boottime_ns())
        self._confirming.set()
        await self._commit([outcome])

    async def mute(self) -> None:
        """Close the ears: what is being said is forgotten, what was said is still understood, open questions end."""
        self.muted = True
        self._growing.clear()
        self._foreseen.clear()
        await self._commit(self._desk.close("the ear was closed"))
        self._confirming.set()

    def unmute(self) -> None:
        """Open the ears."""
        self.muted = False

    def last(self, source: str | None) -> confirmation.Pending | Message | None:
        """The open question of a source, else what it said last; None as the source: the one that spoke last."""
        pending = [each for each in self.pending if source in {None, each.utterance.source}]
        if pending:
            return pending[-1]
        return self._last.get(source or next(reversed(self._last), ""))

    @property
    def closing(self) -> bool:
        """Whether what is said from now on is not heard any more."""
        return self._closing.is_set()

    async def hear(self, guest: Source) -> bool:
        """Listen to one more source until it ends and everything it said is committed; close it to end this early.

        While the pipeline closes, what the guest holds already; false: it came too late for that, and was not heard.
        Raises ValueError where a source of this name is being heard, and whatever the guest's frames raise.
        """
        if guest.name in self.ears:
            raise ValueError(f"{guest.name} is being heard already")
        if self._heard_all:
            return False
        if self.closing:
            await guest.close()
        self.ears[guest.name] = Ear(self._new_detector(), self._options.vad)
        self._guests[guest.name] = guest
        try:
            await self._listen(guest)
            await self._turns.settled(guest.name)
        finally:
            del self._guests[guest.name], self.ears[guest.name]
            self._growing.pop(guest.name, None)
            self._foreseen.pop(guest.name, None)
            self._guest_left.set()
        return True

    async def _listen_to_all(self) -> None:
        for utterance in self._spool.recovered:
            await self._turns.final(utterance)
        await asyncio.gather(*(self._listen(source) for source in self._sources))
        if self.awaits_guests:
            await self._closing.wait()
        while self._guests:
            self._guest_left.clear()
            await self._guest_left.wait()
        self._heard_all = True
        await self._turns.finish()

    async def _listen(self, source: Source) -> None:
        """Gate one source's frames into finals, and offer what is early while somebody speaks."""
        ear = self.ears[source.name]
        interval = round(self._options.partials.interval_s * SAMPLE_RATE)
        partials = self._options.partials.enabled and self._options.privacy.publish == "everything"
        next_partial, spoke = 0, False
        self.turned(source.name, spoke)
        async for frame in source.frames():
            closed = ear.ignore(frame) if self.muted else ear.feed(frame)
            if ear.speaking != spoke:
                spoke = ear.speaking
                self.turned(source.name, spoke)
            for utterance in closed:
                await self._close(utterance)
            kind: Kind = "foreseen"
            early = ear.foreseen()
            if early is None and partials and frame.end >= next_partial:
                kind, early = "partial", ear.growing()
            if early is not None:
                if partials:
                    self._growing[source.name] = early.id
                await self._turns.early(early, kind)
            if early is not None or not ear.speaking:
                next_partial = frame.end + interval
        for utterance in [] if self.muted else ear.flush():
            await self._close(utterance)

    async def _close(self, utterance: Utterance) -> None:
        self._growing.pop(utterance.source, None)
        self._spool.keep(utterance)
        await self._turns.final(utterance)

    async def _understand(self) -> None:
        """Recognize what waits, one at a time, until nothing will come."""
        while (waiting := await self._turns.take()) is not None:
            utterance, kind = waiting
            if kind == "final":
                await self._conclude(utterance)
                continue
            heard = await self._ask_engine(utterance, final=kind == "foreseen")
            if kind == "foreseen" and utterance.source in self.ears and not self.muted:
                self._foreseen[utterance.source] = heard
            if heard.what.transcript is not None and self._growing.get(utterance.source) == utterance.id:
                self._live(contract.PARTIAL, contract.partial_data(utterance, heard.what.transcript))

    async def _ask_engine(self, utterance: Utterance, *, final: bool) -> _Heard:
        began_ns = clock.boottime_ns()
        self._decoding_since_ns = began_ns
        work = functools.partial(self._engine.understand, utterance, final=final)
        what = await asyncio.get_running_loop().run_in_executor(self._executor, work)
        heard = _Heard(what, began_ns, clock.boottime_ns())
        self._decoding_since_ns = None
        if final:
            self._capacity.note(began_ns, heard.ended_ns, utterance.duration_s)
        return heard

    async def _conclude(self, utterance: Utterance) -> None:
        """Understand a final, unless that was done with foresight, and commit what comes of it."""
        heard = self._foreseen.pop(utterance.source, None)
        if heard is None or heard.what.utterance != utterance:
            if self._spool.begin(utterance):
                heard = await self._ask_engine(utterance, final=True)
            else:
                detail = "the daemon was ended every time it recognized this"
                what = Understanding(utterance, None, Rejection("recognizer-failed", detail))
                heard = _Heard(what, clock.boottime_ns(), clock.boottime_ns())
        self.real_time_factor = (heard.ended_ns - heard.began_ns) / clock.NS_PER_S / utterance.duration_s
        began_ns = clock.boottime_ns()
        self.understood(utterance)
        committed = await self._append(heard.what)
        self._spool.settle(utterance)
        await self._turns.settle(utterance)
        self.noted(committed, _timing(heard, began_ns, clock.boottime_ns()))

    async def _append(self, heard: Understanding) -> Understanding:
        """Commit everything that came of an utterance; returns what was committed."""
        distrust = self.distrusted.get(heard.utterance.source)
        if distrust and isinstance(heard.decision, Command) and not heard.decision.cancels:
            heard = replace(heard, decision=Rejection("too-noisy", distrust, heard.decision.confidence))
        outcomes = self._desk.judge(heard.utterance, heard.transcript, heard.decision)
        self._spool.forgive(heard.utterance)
        await self._commit(outcomes, heard.utterance.id)
        self._confirming.set()
        self.utterances += 1
        _tell(heard, texts=self._options.privacy.publish == "everything")
        return heard

    async def _commit(self, outcomes: Sequence[confirmation.Outcome], utterance_id: str | None = None) -> None:
        """Commit; a full disk delays it and loses nothing, unless the disk stays full when the daemon must stop.

        What comes of an utterance gets ids from its id, so that a restart in the wrong moment makes no other messages.
        """
        drafts = [draft for outcome in outcomes for draft in self._drafts(outcome)]
        if self._options.privacy.publish == "commands":
            drafts = [left for draft in drafts if (left := contract.discreet(draft)) is not None]
        if utterance_id is not None:
            drafts = [replace(draft, id=derived_id(utterance_id, index)) for index, draft in enumerate(drafts)]
        while drafts:
            try:
                messages = await self._outbox.append(*drafts)
            except OutboxError as error:
                if str(error) != self.trouble:
                    log.warning("nothing can be committed, trying again every %g s: %s", APPEND_RETRY_S, error)
                    self.trouble = str(error)
                if self._closed_ns is not None and clock.boottime_ns() - self._closed_ns > STOP_LIMIT_NS:
                    raise OutboxError(f"{len(drafts)} messages of this stop are lost: {error}") from None
                await asyncio.sleep(APPEND_RETRY_S)  # waiting, not hanging: a restart would lose the utterance
            else:
                if self.trouble:
                    log.info("committing again")
                    self.trouble = ""
                for message in messages:
                    self._remember(message)
                    self.told(message)
                return

    def _remember(self, message: Message) -> None:
        """Keep what a source said last."""
        source = str(message.data["source"])
        self._last.pop(source, None)
        self._last[source] = message
        if len(self._last) > REMEMBERED:
            del self._last[next(iter(self._last))]

    def _drafts(self, outcome: confirmation.Outcome) -> list[Draft]:
        model = self._engine.name
        if isinstance(outcome, confirmation.Confirmed):
            held = outcome.pending
            return [
                contract.command_draft(
                    *(held.utterance, held.transcript, held.command),
                    model=model,
                    confirmed_ns=outcome.at_ns,
                    confirmed_by=outcome.by,
                )
            ]
        if isinstance(outcome, confirmation.Cancelled):
            held = outcome.pending
            return [contract.rejection_draft(held.utterance, outcome.rejection, held.transcript, model=model)]
        utterance, transcript = outcome.utterance, outcome.transcript
        drafts = []
        if transcript is not None and not (isinstance(outcome, confirmation.Pending) and outcome.asked_again):
            drafts.append(contract.transcript_draft(utterance, transcript, model=model))
        if isinstance(outcome, confirmation.Pending):
            drafts.append(contract.pending_draft(outcome, model=model))
        elif isinstance(outcome.decision, Rejection):
            drafts.append(contract.rejection_draft(utterance, outcome.decision, transcript, model=model))
        elif outcome.decision is not None and transcript is not None:
            drafts.append(contract.command_draft(utterance, transcript, outcome.decision, model=model))
        return drafts

    async def _cancel_unconfirmed(self) -> None:
        """Cancel what nobody confirms in time; sleeps while nothing is pending.

        A yes may be said in time and come late: the gate closes after it, and others wait for the recognizer, too.
        """
        while True:
            expiry_ns = self._desk.next_expiry_ns()
            left_s = None if expiry_ns is None else max(UNHEARD_S, (expiry_ns - clock.boottime_ns()) / clock.NS_PER_S)
            self._confirming.clear()
            change = asyncio.ensure_future(self._confirming.wait())
            try:
                await asyncio.wait({change}, timeout=left_s)  # not wait_for: before 3.12 it may swallow a cancellation
            finally:
                change.cancel()
            speaking = {source for source, ear in self.ears.items() if ear.speaking}
            await self._commit(self._desk.expire(clock.boottime_ns(), {*speaking, *self._turns.unsettled}))


def _timing(heard: _Heard, committing_ns: int, committed_ns: int) -> Timing:
    def seconds(since_ns: int, until_ns: int) -> float:
        return max(0, until_ns - since_ns) / clock.NS_PER_S  # recordings may be played faster than they were spoken

    ended_ns = heard.what.utterance.ended_ns
    return Timing(
        waited_s=seconds(ended_ns, heard.began_ns),
        understood_s=seconds(heard.began_ns, heard.ended_ns),
        committed_s=seconds(committing_ns, committed_ns),
        total_s=seconds(ended_ns, committed_ns),
    )


def _tell(heard: Understanding, *, texts: bool) -> None:
    """One log line per utterance, findable by its id in the journal. Texts are personal: debug level only."""
    decision = heard.decision
    if isinstance(decision, Command):
        outcome = f"command {decision.intent}, confidence {decision.confidence:.2f}"
    elif decision is not None:
        outcome = f"rejected: {decision.reason}"
    else:
        outcome = "transcript"
    log.info(
        "%s: %.1f s of speech: %s",
        heard.utterance.source,
        heard.utterance.duration_s,
        outcome,
        extra={"utterance_id": heard.utterance.id, "source": heard.utterance.source},
    )
    if texts and heard.transcript is not None:
        log.debug("heard %r", heard.transcript.text, extra={"utterance_id": heard.utterance.id})
