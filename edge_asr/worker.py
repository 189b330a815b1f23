"""Keeps native inference in a process of its own: a crash, a hang or a leak there costs one utterance at most.

Law:

- An utterance stays here until its understanding is back. A worker that dies of it, or hangs, is replaced by one that
  gets it once more; the second time it becomes a rejection that says why.
- One that takes another's place gets the words and grammars that were in use, not what has become of their files.
- Workers are forked from a ``zygote``, so a new one is ready as soon as its model is loaded (docs/operations.md).
- What a worker says is trusted as much as itself: it runs as the same user behind the same walls, hence pickle.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from edge_asr import inference, installation, prepared, systemd, trial
from edge_asr.engine import Engine, Vocabulary, prepare_engine
from edge_asr.events import Rejection, Utterance
from edge_asr.grammar import GrammarError
from edge_asr.health import give_back
from edge_asr.hotwords import HotwordError
from edge_asr.model_store import ModelError, ModelFiles
from edge_asr.pipeline import Understanding
from edge_asr.process_state import LOOK_S, Limits, Wait, cpu_s, resident_bytes
from edge_asr.settings import Settings
from edge_asr.zygote import Zygote, ZygoteError

log = logging.getLogger(__name__)

LIMIT_S: Final = 8.0
"""Asleep, all naps together, since it last read anything: a worker that waits for so long, be it in the middle of an
answer, waits for ever. One that could run and gets no time is only starved, one that reads has a slow card."""

STEP_BASE_S: Final = 2.0
"""CPU time that any step may take, from one run of the model to the next: more is a loop without an end. What does not
grow with the model, a search through 8,000 names, is less than a twentieth of it."""

STEP_FACTOR: Final = 5.0
"""What a second of speech may take besides, over what a second of the golden recording took on this very box, slow or
fast. Of honest steps the dearest is 30 s of speech played slower, 2.6 with the embedded model and 1.4 with 237 MB:
attention grows faster than length, and the golden recording's features were known."""

PING_LIMIT_S: Final = 4.0
"""The same over a question that needs no work: with the time between two (``watchdog``) within WatchdogSec=."""

STEPS: Final = 16
"""Runs of the model that an utterance may need: eight, with five languages and three paces."""

READ_LIMIT_S: Final = 30.0
"""Asleep between readings: a step that waits so long for its model's pages reads for ever."""

LOAD_LIMIT_S: Final = 90.0
"""The same while it hashes and loads 240 MB from a slow card; also CPU time, where nobody knows yet what that takes."""

LOAD_FACTOR: Final = 4.0
"""CPU time that loading the same once more may take, over what it took before, on a box as slow as it is now."""

RETUNE_LIMIT_S: Final = 8.0
"""CPU time that each step of taking over other words and commands may take: nothing is recognized meanwhile. The
dearest of 8,000 names takes half a second here. What comes by request was looked through before, in 15 s altogether."""

LOAD_ATTEMPTS: Final = installation.TRIALS + 1
"""The last one is without the new model that ended all before."""

SLACK_BYTES: Final = 2 << 20
"""What its allocator may keep from one utterance to the next; giving it back takes a millisecond."""

GROWTH_LIMIT_BYTES: Final = 256 << 20
"""Memory a worker may gain after loading before it is replaced between two utterances; the longest utterance needs
less than that, and it is given back when nobody speaks."""

_RETUNING: Final = "the recognizer takes over other words and commands"

_LENGTH: Final = struct.Struct("!Q")
"""Of a message, before it."""

_PIECE_BYTES: Final = 1 << 16

_GOLDEN: Final = "golden"
"""The request to hear the golden recording: by the model alone, whose text no hotword changes."""

_PING: Final = "ping"
"""The request to say anything."""

_REFUSALS: Final = (ModelError, HotwordError, GrammarError)


class WorkerError(Exception):
    """No worker can be had, or none that hears rightly; only a new start of the daemon helps."""


class _EndedError(Exception):
    """The worker is no more; the message says how it went, as the end of a sentence."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a worker says of itself once its model is loaded."""

    files: ModelFiles
    graph: prepared.Record | None
    """What was known of a faster graph when it was loaded."""
    provider: str
    """The execution provider really in use, named as in the settings."""
    golden: str
    """What it hears in the golden recording; right, where it is known what is right (``engine``)."""
    golden_s: float
    """How long that is."""
    golden_cpu_s: float
    """CPU time that hearing it took."""
    load_cpu_s: float
    """CPU time that it took to get so far."""
    vocabulary: Vocabulary
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What a worker is to hear with."""

    options: Settings
    vocabulary: Vocabulary | None = None
    """None: as the files have it; then the answer holds it."""

    def read(self) -> Vocabulary:
        """Raises HotwordError, GrammarError."""
        return self.vocabulary or Vocabulary.read(self.options)


@dataclass(frozen=True, slots=True)
class Golden:
    """The golden recording, heard once."""

    text: str
    cpu_s: float


class Worker:
    """An :class:`Engine` behind a wall. Blocking; any thread may call, they take turns."""

    def __init__(self, options: Settings, zygote: Zygote | None = None) -> None:
        """Fork, load and listen once; from a zygote of its own unless it is given one to share.

        Raises ModelError, HotwordError, GrammarError, WorkerError.
        """
        self._options = options
        self._chosen = installation.chosen(options)
        self._turn = threading.Lock()
        self._looks: dict[int, float] = {}
        """When each thread that waits for an answer last looked whether one comes (monotonic)."""
        self._zygote = zygote or Zygote()
        self._shares_zygote = zygote is not None
        self.replaced = 0
        """Workers that died, hung, grew too large or heard wrongly."""
        self.trouble = ""
        """Why a newly activated model had to make way; to be cleared by whoever tells it."""
        self.pause = ""
        """Why nothing is recognized for a moment; empty: it is."""
        self.on_change: Callable[[], None] = lambda: None
        """Called, from any thread, when that has changed."""
        try:
            self._process = self._begin(Plan(options))
        except BaseException:
            self._leave_zygote()
            raise

    @property
    def facts(self) -> Facts:
        """What the worker of this moment said of itself."""
        return self._process.facts

    @property
    def vocabulary(self) -> Vocabulary:
        """The words and grammars in use, whatever has become of their files."""
        return self.facts.vocabulary

    @property
    def name(self) -> str:
        """The model's name, for the payloads."""
        return self.facts.files.name

    @property
    def pid(self) -> int:
        """The process of this moment."""
        return self._process.pid

    @property
    def unlooked_s(self) -> float:
        """For how long a thread that waits for an answer has not looked for it; one that works does so every LOOK_S."""
        now_s = time.monotonic()
        return max((now_s - looked_s for looked_s in list(self._looks.values())), default=0.0)

    def understand(self, utterance: Utterance, *, final: bool) -> Understanding:
        """As :meth:`Engine.understand`. Raises WorkerError."""
        return self._understand(utterance, final=final, attempts=2 if final else 1)  # nobody misses a partial

    def _understand(self, utterance: Utterance, *, final: bool, attempts: int) -> Understanding:
        trouble = ""
        with self._turn:
            for _ in range(attempts):
                try:
                    heard, resident_bytes = self._process.hear((utterance, final), utterance.duration_s)
                except _EndedError as error:
                    trouble = str(error)
                    self._replace(trouble)
                    continue
                if resident_bytes > self.facts.resident_bytes + GROWTH_LIMIT_BYTES:
                    self._replace(f"has grown to {resident_bytes >> 20} MB")
                assert isinstance(heard, Understanding)  # noqa: S101 - what `serve` answers to this
                return heard
        detail = f"{attempts} times the recognizer {trouble}"
        return Understanding(utterance, None, Rejection("recognizer-failed", detail))

    def reload(self, options: Settings) -> None:
        """Take over model, hotwords and commands of other settings between two utterances.

        Another model, or another graph of it, is loaded beside the old one, which goes on working until then. Raises
        ModelError, HotwordError, GrammarError (then nothing has changed), WorkerError.
        """
        chosen = installation.chosen(options)
        graph = prepared.record_of(self.facts.files, options.models_directory)
        if options.model != self._options.model or chosen != self._chosen or graph != self.facts.graph:
            fresh = self._begin(Plan(options))
            with self._turn:
                old, self._process = self._process, fresh
            old.end()
            self._chosen = installation.chosen(options)  # it may have made way
        else:
            self._retune(options)
        self._options = options

    def _retune(self, options: Settings) -> None:
        def tell() -> None:
            if not self.pause:
                self._tell(_RETUNING)

        with self._turn:
            try:
                self._process.retune(Plan(options), tell)
            except _EndedError as error:
                self._replace(str(error))
                raise WorkerError(f"over the new settings the recognizer {error}") from None
            finally:
                if self.pause == _RETUNING:
                    self._tell("")

    def prove(self) -> None:
        """Listen to the golden recording; one that hears something else is replaced. Raises WorkerError.

        How long that takes is the pace of the box as it is now: a hot one has slowed down, and is no loop.
        """
        with self._turn:
            try:
                heard = self._process.hear_golden()
            except _EndedError as error:
                self._replace(str(error))  # the new one has proven itself by being there
            else:
                if heard != self.facts.golden:
                    self._replace("does not hear the golden recording rightly any more")

    def ping(self) -> None:
        """Ask a worker that has nothing to do whether it is there; one that is not is replaced. Raises WorkerError."""
        if not self._turn.acquire(blocking=False):
            return  # somebody is asking it
        try:
            if not self._process.is_over:
                self._process.ping()
        except _EndedError as error:
            self._replace(str(error))
        finally:
            self._turn.release()

    def close(self) -> None:
        """End the worker."""
        with contextlib.suppress(WorkerError), self._turn:
            self._process.end()
        self._leave_zygote()

    def _leave_zygote(self) -> None:
        if not self._shares_zygote:
            self._zygote.close()

    def _replace(self, trouble: str) -> None:
        """Put a new worker in the place of one that is of no use. Raises WorkerError."""
        self.replaced += 1
        self._tell(f"the recognizer {trouble}; a new one takes its place")
        log.error(self.pause)
        old = self._process
        old.end()
        try:
            plan = Plan(self._options, old.facts.vocabulary)
            self._process = self._begin(plan, None if self._another_is_chosen else old.load_cpu_s * old.slowdown)
        except _REFUSALS as error:
            raise WorkerError(f"no new recognizer: {error}") from None
        self._tell("")
        same_ears = (self.facts.files.sha256, self.facts.graph) == (old.facts.files.sha256, old.facts.graph)
        if same_ears and self.facts.golden != old.facts.golden:
            raise WorkerError(f"a new recognizer hears {self.facts.golden!r} in the golden recording")

    @property
    def _another_is_chosen(self) -> bool:
        """Whether another model than was loaded is to be loaded now."""
        try:
            return installation.chosen(self._options) != self._chosen
        except ModelError:  # whoever loads it says so
            return True

    def _tell(self, pause: str) -> None:
        self.pause = pause
        self.on_change()

    def _begin(self, plan: Plan, before_s: float | None = None) -> _Process:
        """A worker that has loaded its model. ``before_s``: CPU time that it took before; None: nobody knows.

        A new model that is refused, or ends it too often, makes way for the one before it (``installation``).
        """
        probation, trouble = installation.Probation(plan.options), ""
        for _ in range(LOAD_ATTEMPTS):
            process = _Process(self._zygote, self._looks)
            try:
                probation.begin()
                facts, _ = process.load(plan, before_s)
            except _EndedError as error:
                trouble = str(error)
                log.error("while loading the model the recognizer %s", trouble)  # noqa: TRY400 - no bug, no traceback
                continue
            except ModelError:
                process.end()
                raise
            if isinstance(facts, _REFUSALS):
                process.end()
                if isinstance(facts, ModelError) and probation.fail(str(facts)):
                    continue
                raise facts
            assert isinstance(facts, Facts)  # noqa: S101 - what `serve` answers first
            process.facts, process.load_cpu_s = facts, facts.load_cpu_s
            probation.succeed()
            self.trouble = probation.trouble
            if not facts.golden:
                log.warning("%s hears nothing in the golden recording; is it the right model?", facts.files.name)
            return process
        raise WorkerError(f"{LOAD_ATTEMPTS} times, while loading the model, the recognizer {trouble}")


class _Process:
    """One worker and the line to it."""

    facts: Facts
    """Set when it has loaded its model."""
    newest_golden_cpu_s = 0.0
    """CPU time that hearing the golden recording took when it was last proven."""
    load_cpu_s: float
    """CPU time that another one would need to get where this one is."""

    def __init__(self, zygote: Zygote, looks: dict[int, float]) -> None:
        """``looks``: where each thread that waits notes when it last looked. Raises WorkerError."""
        self._zygote = zygote
        self._looks = looks
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            remedy = "if this comes again, raise LimitNOFILE= or allow fewer sessions"
            raise WorkerError(f"no recognizer: no line to its process ({error.strerror}); {remedy}") from None
        self._line = _Line(ours)
        with theirs, _of_the_recognizer():
            self.pid = zygote.fork(serve, theirs, "recognizer")
        self._how_it_ended = ""

    @property
    def is_over(self) -> bool:
        """Whether it was ended on purpose."""
        return bool(self._how_it_ended)

    @property
    def slowdown(self) -> float:
        """How many times as long as at its start everything takes by now, at least one."""
        return max(1.0, self.newest_golden_cpu_s / max(self.facts.golden_cpu_s, 0.01))

    def hear(self, request: object, speech_s: float) -> tuple[object, int]:
        """As :meth:`ask` about so much speech, in the time that each step may take on this box."""
        golden_cpu_s = max(self.facts.golden_cpu_s, self.newest_golden_cpu_s)
        step_s = step_limit_s(speech_s, golden_cpu_s / self.facts.golden_s)
        return self.ask(request, Limits(LIMIT_S, READ_LIMIT_S, step_s))

    def hear_golden(self) -> str:
        """What it hears in the golden recording now. Raises _EndedError, WorkerError."""
        answer, _ = self.hear(_GOLDEN, self.facts.golden_s)
        assert isinstance(answer, Golden)  # noqa: S101 - what `serve` answers to this
        self.newest_golden_cpu_s = answer.cpu_s
        return answer.text

    def retune(self, plan: Plan, looked: Callable[[], object]) -> None:
        """Hear with other hotwords and commands, which may take longer to build than those that were loaded.

        ``looked`` is called twice a second meanwhile. Raises HotwordError, GrammarError (then nothing has changed),
        _EndedError, WorkerError.
        """
        before_s = self._spent_s()
        answer, _ = self.ask(plan, Limits(LIMIT_S, LOAD_LIMIT_S, RETUNE_LIMIT_S), looked)
        if isinstance(answer, _REFUSALS):
            raise answer
        assert isinstance(answer, Vocabulary)  # noqa: S101 - what `serve` answers to this
        self.load_cpu_s = self.facts.load_cpu_s + self._spent_s() - before_s
        self.facts = replace(self.facts, vocabulary=answer)

    def _spent_s(self) -> float:
        """CPU time so far. Raises _EndedError, WorkerError."""
        try:
            return cpu_s(self.pid)
        except OSError:  # dead, and reaped with another's end
            raise _EndedError(f"ended by {self.end()}") from None

    def load(self, plan: Plan, before_s: float | None) -> tuple[object, int]:
        """As :meth:`ask`, in the time for loading a model. Raises _EndedError, WorkerError."""
        if before_s is not None:
            return self.ask(plan, Limits(LIMIT_S, LOAD_LIMIT_S, load_limit_s(before_s)))
        if inference.reachable(plan.options.model) != "tensorrt":
            return self.ask(plan, Limits(LIMIT_S, LOAD_LIMIT_S, LOAD_LIMIT_S))
        most_s = inference.BUILD_LIMIT_S
        return self.ask(plan, Limits(most_s, most_s, most_s), systemd.still_starting)

    def ping(self) -> None:
        """Let it show that it takes requests. Raises _EndedError, WorkerError."""
        self.ask(_PING, Limits(PING_LIMIT_S, READ_LIMIT_S, STEP_BASE_S))

    def ask(self, request: object, limits: Limits, looked: Callable[[], object] = lambda: None) -> tuple[object, int]:
        """One question, one answer and the memory in use after it.

        The limits hold for each step; ``looked`` is called at each look at what takes longer than one. Raises
        _EndedError, WorkerError.
        """
        look = self._watch(limits, looked)
        try:
            self._line.send(request, look)
            for _ in range(STEPS):
                answer: tuple[object, int] | None = self._line.receive(look)
                if answer is not None:
                    return answer
                look = self._watch(limits, looked)
        except (EOFError, OSError):
            raise _EndedError(f"ended by {self.end()}") from None
        finally:
            self._looks.pop(threading.get_ident(), None)
        self.end()
        raise _EndedError(f"took more than {STEPS} steps")

    def _watch(self, limits: Limits, looked: Callable[[], object]) -> Callable[[], None]:
        """What looks at it while it says nothing, up to its next word; that raises _EndedError, WorkerError."""
        wait, thread = Wait(self.pid), threading.get_ident()
        self._looks[thread] = time.monotonic()

        def look() -> None:
            self._looks[thread] = time.monotonic()
            looked()
            wait.look()
            fault = wait.fault(limits)
            if fault:
                self.end()
                raise _EndedError(fault)

        return look

    def end(self) -> str:
        """Make sure that it is gone; how it went. Raises WorkerError."""
        if not self._how_it_ended:
            self._looks.pop(threading.get_ident(), None)  # from here on it waits for the zygote, which has its own time
            self._line.close()
            with _of_the_recognizer():
                self._how_it_ended = self._zygote.end(self.pid)
            if not self._how_it_ended:
                self._how_it_ended = f"itself, but process {self.pid} hangs in the kernel and may still hold memory"
                log.error("the recognizer's process %d hangs in the kernel and may still hold its memory", self.pid)
        return self._how_it_ended


class _Line:
    """Messages both ways. A process may stop in the middle of one: long speech is more than a socket holds."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, message: object, look: Callable[[], None] | None = None) -> None:
        """Where ``look`` is given, it is called when nothing has moved for LOOK_S, and may raise. Raises OSError."""
        self._socket.settimeout(LOOK_S if look else None)
        content = pickle.dumps(message)
        rest = memoryview(_LENGTH.pack(len(content)) + content)
        while rest:
            try:
                rest = rest[self._socket.send(rest) :]
            except TimeoutError:
                assert look is not None  # noqa: S101 - else there is no time-out
                look()

    def receive(self, look: Callable[[], None] | None = None) -> Any:  # noqa: ANN401 - whatever was sent
        """The other way, as :meth:`send`. Raises OSError, and EOFError where the other end is closed."""
        self._socket.settimeout(LOOK_S if look else None)
        (length,) = _LENGTH.unpack(self._take(_LENGTH.size, look))
        return pickle.loads(self._take(length, look))  # noqa: S301 - see the law

    def close(self) -> None:
        """Let the other end know that nothing more comes."""
        self._socket.close()

    def _take(self, size: int, look: Callable[[], None] | None) -> bytearray:
        taken = bytearray()
        while len(taken) < size:
            try:
                piece = self._socket.recv(min(size - len(taken), _PIECE_BYTES))
            except TimeoutError:
                assert look is not None  # noqa: S101 - else there is no time-out
                look()
                continue
            if not piece:
                raise EOFError
            taken += piece
        return taken


def step_limit_s(speech_s: float, pace: float) -> float:
    """CPU time that a step of so much speech may take; ``pace``: what a second of it took on this box."""
    return STEP_BASE_S + STEP_FACTOR * pace * speech_s


def load_limit_s(before_s: float) -> float:
    """CPU time that loading once more may take what took so much of it before."""
    return STEP_BASE_S + LOAD_FACTOR * before_s


@contextlib.contextmanager
def _of_the_recognizer() -> Iterator[None]:
    try:
        yield
    except ZygoteError as error:
        raise WorkerError(f"no recognizer: {error}") from None


def serve(line: socket.socket) -> None:
    """A worker: answers each request with its result and the memory in use.

    It says None before each run of the model, and between the steps of other work that may take long.
    """
    connection, engine = _Line(line), None
    has_heard, tidy_bytes = False, 0
    with contextlib.suppress(EOFError):
        while True:
            request = connection.receive()
            if request == _PING:  # nobody speaks
                connection.send((None, 0))
                if engine is not None and has_heard:
                    engine.recognizer.give_back()
                    give_back()
                    has_heard, tidy_bytes = False, resident_bytes("self")
                continue
            try:
                engine, answer = _answered(engine, request, step=lambda: connection.send(None))
            except _REFUSALS as error:
                vars(error)["errno"] = getattr(error.__context__, "errno", None)  # a context does not come along
                answer = error
            has_heard, held_bytes = True, resident_bytes("self")
            if held_bytes > tidy_bytes + SLACK_BYTES:
                give_back()
                held_bytes = tidy_bytes = resident_bytes("self")
            connection.send((answer, held_bytes))


def _answered(
    engine: Engine | None, request: Plan | tuple[Utterance, bool] | str, step: Callable[[], None]
) -> tuple[Engine, object]:
    """The engine to go on with, and the answer. Raises ModelError, HotwordError, GrammarError."""
    if engine is None:
        assert isinstance(request, Plan)  # noqa: S101 - a worker's first request
        options, vocabulary = request.options, request.read()
        engine = prepare_engine(options, vocabulary)
        engine.recognizer.step = step
        graph = prepared.record_of(engine.files, options.models_directory)
        golden = _hear_golden(engine)
        facts = Facts(
            files=engine.files,
            graph=graph,
            provider=engine.recognizer.provider,
            golden=golden.text,
            golden_s=trial.golden_s(engine.files),
            golden_cpu_s=golden.cpu_s,
            load_cpu_s=time.process_time(),
            vocabulary=vocabulary,
            resident_bytes=resident_bytes("self"),
        )
        return engine, facts
    if isinstance(request, Plan):
        vocabulary = request.read()
        step()
        return engine.under(request.options, vocabulary), vocabulary
    if isinstance(request, str):
        return engine, _hear_golden(engine)
    utterance, final = request
    return engine, engine.understand(utterance, final=final)


def _hear_golden(engine: Engine) -> Golden:
    began_s = time.process_time()
    text = trial.listen(engine.recognizer, engine.files)
    return Golden(text, time.process_time() - began_s)
