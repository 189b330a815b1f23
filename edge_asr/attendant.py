"""Carries out requests on the running box: one after the other, answered when done, never at the cost of speech.

Law:

- What is quick is done in the order of arrival. Reload, hotwords and grammar build for seconds: one at a time beside
  everything else, in threads; a second one is refused as ``busy``.
- A grammar from the network is looked through by a process of its own with limits on memory and time, so that no
  grammar, however made, can stop or kill the daemon.
- New words and grammars are looked through, kept on the disk, then used; if one fails, all is as it was.
- Requests beyond :data:`PER_S` wait; at QoS 1 in the broker, at QoS 0 they are dropped and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

import edge_asr
from edge_asr import clock, contract, hotwords, inference, requests, settings
from edge_asr.confirmation import ConfirmationError
from edge_asr.engine import Vocabulary
from edge_asr.events import Json
from edge_asr.grammar import GrammarError
from edge_asr.hotwords import HotwordError
from edge_asr.model_store import ModelError, ModelFiles
from edge_asr.outbox import Outbox, OutboxError
from edge_asr.pipeline import Pipeline
from edge_asr.requests import Answer, Letter, Problem, Request, RequestError
from edge_asr.settings import Settings, SettingsError, Verb
from edge_asr.standing import StandingOrders, Undo
from edge_asr.worker import WorkerError

log = logging.getLogger(__name__)

PER_S = 50.0
"""Requests dealt with in the long run; a hall's MES sends a few a minute."""

BURST = 50
WAITING = 16
"""Letters that may wait before one at QoS 0 is dropped."""

MOST_WAITING = 4 * WAITING
"""What comes at QoS 1 is held back by the broker; this is for many short connections in a row."""

LOOK_LIMIT_S = 15
"""Of processor time, 3 s of which are imports: what takes longer would hold up the recognizer as long."""

LOOK_LIMIT_BYTES = 2 << 30
"""Of address space, most of which the libraries only reserve."""

_SLOW: frozenset[Verb] = frozenset({"reload", "hotwords", "grammar"})
EXIT_CONFIG = 78
"""How `edge-asr grammar lint` says that a grammar cannot be read at all."""

_LISTED = 100
"""Problems named in one answer."""

Result = Mapping[str, Json]


class Box(Protocol):
    """What requests act upon."""

    options: Settings
    """As the settings file has them, without standing orders."""
    vocabulary: Vocabulary
    """The words and grammars in use."""
    outbox: Outbox
    standing: StandingOrders
    pipeline: Pipeline

    @property
    def model(self) -> ModelFiles:
        """The model in use."""

    def live(self, topic: str, data: Mapping[str, Json]) -> None:
        """Publish what is worth nothing later."""

    def status(self) -> contract.Data:
        """What ``status`` says of the device."""

    async def note(self, verb: str, role: str) -> None:
        """Keep a record of a request that has changed something."""

    def show(self) -> None:
        """Publish status and meta again: something has changed."""

    async def refit(self, order: Callable[[], Undo]) -> None:
        """Give a standing order and hear under it. Raises HotwordError, GrammarError, OSError: all is as it was."""

    async def reload(self) -> list[str]:
        """Read the settings again; the sections that need a restart.

        Raises SettingsError, ModelError, HotwordError, GrammarError; then nothing has changed.
        """


class Attendant:
    """Takes letters from the publisher, answers them, and remembers what was answered."""

    def __init__(self, box: Box) -> None:
        self._box = box
        self._allowed = box.options.requests.allow
        self._letters: asyncio.Queue[Letter] = asyncio.Queue(MOST_WAITING)
        self._register = requests.Register()
        self._pace = requests.Pace(PER_S, BURST)
        self._slow: asyncio.Task[None] | None = None
        self.ok = self.refused = self.dropped = 0
        """Requests so far."""
        self._verbs: Mapping[Verb, Callable[[Any], Awaitable[Result]]] = {
            "ping": self._ping,
            "status": self._status,
            "say-again": self._say_again,
            "confirm": self._confirm,
            "cancel": self._cancel,
            "reload": self._reload,
            "hotwords": self._hotwords,
            "grammar": self._grammar,
            "mute": self._mute,
            "unmute": self._unmute,
            "receipt": self._receipt,
        }

    def take(self, letter: Letter) -> None:
        """The publisher's hook."""
        if self._letters.qsize() < (MOST_WAITING if letter.is_sure else WAITING):
            self._letters.put_nowait(letter)
        else:
            self.dropped += 1
            letter.taken()

    async def run(self) -> None:
        """Attend to letters until cancelled."""
        try:
            while True:
                letter = await self._letters.get()
                await asyncio.sleep(self._pace.wait_ns(clock.boottime_ns()) / clock.NS_PER_S)
                await self._attend(letter)
        finally:
            if self._slow is not None:
                self._slow.cancel()
                await asyncio.gather(self._slow, return_exceptions=True)

    async def _attend(self, letter: Letter) -> None:
        before = self._register.enter(letter, clock.boottime_ns())
        if isinstance(before, Answer):
            letter.answer(before)
        elif before == "conflict":
            detail, remedy = "its correlation data came with another request", "use new correlation data for each"
            letter.answer(requests.refusal(letter.verb, RequestError("conflict", detail, remedy)))
        elif before == "new":
            await self._begin(letter)
        letter.taken()

    async def _begin(self, letter: Letter) -> None:
        try:
            request = requests.read(letter, self._allowed, clock.boottime_ns())
        except RequestError as error:
            self._refuse(letter, error)
            return
        if request.verb not in _SLOW:
            await self._finish(letter, request)
        elif self._slow is None or self._slow.done():
            self._slow = asyncio.create_task(self._finish(letter, request), name=f"request:{request.verb}")
        else:
            detail = "another list or grammar is being built"
            self._refuse(letter, RequestError("busy", detail, "send it again in a few seconds"))

    async def _finish(self, letter: Letter, request: Request) -> None:
        """Do it, and answer."""
        try:
            result = await self._do(request)
        except RequestError as error:
            self._refuse(letter, error)
            return
        self.ok += 1
        if request.verb not in requests.READING:
            log.info("request: %s", request.verb)
            await self._box.note(request.verb, request.role)
        answer = requests.ok(request.verb, **result)
        self._register.answered(letter, answer, clock.boottime_ns())
        letter.answer(answer)

    async def _do(self, request: Request) -> Result:
        try:
            return await self._verbs[request.verb](request)
        except ConfirmationError as error:
            raise RequestError(error.reason, str(error), "see evt/pending for what is open") from None
        except (SettingsError, ModelError, GrammarError, HotwordError) as error:
            found = [Problem("", line) for line in str(error).splitlines()[:_LISTED]]
            raise RequestError("unusable", found[0].problem, "mend it and send it again", found) from None
        except WorkerError as error:
            raise RequestError("unusable", str(error), "leave out what you changed last") from None
        except (OutboxError, OSError) as error:
            raise RequestError("unavailable", str(error), "free the disk, then send it again") from None
        except RequestError:
            raise
        except Exception:
            log.exception("request: %s failed; this is a bug", request.verb)
            raise RequestError("unavailable", "an error inside the device", "see its journal") from None

    def _refuse(self, letter: Letter, error: RequestError) -> None:
        self._register.forget(letter)
        self.refused += 1
        log.info("request: %r refused: %s", letter.verb[:40], error.reason)
        letter.answer(requests.refusal(letter.verb, error))

    # -- the verbs

    async def _ping(self, _request: Request) -> Result:
        return {"version": edge_asr.__version__}

    async def _status(self, _request: Request) -> Result:
        statistics = await self._box.outbox.statistics()
        questions: list[Json] = [contract.question_data(pending) for pending in self._box.pipeline.pending]
        return {**self._box.status(), "waiting": sum(statistics.waiting.values()), "pending": questions}

    async def _say_again(self, request: Request) -> Result:
        body = _expect(request, requests.SayAgain)
        said = self._box.pipeline.last(body.source)
        if said is None:
            who = "" if body.source is None else f" by {body.source!r}"
            raise RequestError("nothing-said", f"nothing has been said{who}", "speak first")
        data = contract.again_data(said)
        self._box.live(contract.AGAIN, data)
        return data

    async def _confirm(self, request: Request) -> Result:
        body = _expect(request, requests.Confirm)
        self._refuse_in_trouble()
        left = await self._box.pipeline.confirm(body.pending_id, body.confirmations_left, request.role)
        return {"pending_id": body.pending_id, "confirmations_left": left.steps_left if left is not None else 0}

    async def _cancel(self, request: Request) -> Result:
        body = _expect(request, requests.Cancel)
        self._refuse_in_trouble()
        await self._box.pipeline.cancel(body.pending_id)
        return {"pending_id": body.pending_id}

    def _refuse_in_trouble(self) -> None:
        """While nothing can be committed, an answer would hold up all other requests; the question ends by itself."""
        if self._box.pipeline.trouble:
            raise RequestError("unavailable", self._box.pipeline.trouble, "mend that first")

    async def _mute(self, _request: Request) -> Result:
        await self._box.pipeline.mute()
        self._box.show()
        try:
            await asyncio.to_thread(self._box.standing.keep_muted)
        except OSError as error:
            log.warning("muted, but only until the next restart: %s", error)
            return {"muted": True, "outlives_restart": False}
        self._box.show()
        return {"muted": True, "outlives_restart": True}

    async def _unmute(self, _request: Request) -> Result:
        await asyncio.to_thread(self._box.standing.forget_muted)
        self._box.pipeline.unmute()
        self._box.show()
        return {"muted": False}

    async def _receipt(self, request: Request) -> Result:
        body = _expect(request, requests.Receipt)
        if not await self._box.outbox.receive_receipt(body.command_id, body.verdict, body.reason):
            detail = f"{body.command_id} is none of the last thousand commands"
            raise RequestError("unknown-command", detail, "use the id of the evt/command")
        return {"command_id": body.command_id, "verdict": body.verdict}

    async def _reload(self, _request: Request) -> Result:
        return {"restart_needed": list[Json](await self._box.reload())}

    async def _hotwords(self, request: Request) -> Result:
        body = _expect(request, requests.Hotwords)
        standing, options = self._box.standing, self._box.options
        if body.phrases is None:
            await self._box.refit(standing.forget_hotwords)
        else:
            phrases = tuple(settings.Hotword(**phrase.model_dump()) for phrase in body.phrases)
            listed = options.hotwords.model_copy(update={"phrases": phrases, "file": None})
            found = await asyncio.to_thread(_unusable, listed, self._box.model.tokens)
            if found:
                detail = f"{len(found)} of {len(phrases)} phrases cannot be used"
                raise RequestError("unusable", detail, "mend or remove them", found[:_LISTED])
            await self._box.refit(lambda: standing.keep_hotwords(phrases))
        in_use = self._box.vocabulary
        return {"hotwords": len(in_use.hotwords), "hotwords_sha256": in_use.hotwords_sha256}

    async def _grammar(self, request: Request) -> Result:
        body = _expect(request, requests.Grammar)
        standing = self._box.standing
        name = _grammar_name(body.name, self._box.options.commands.grammars)
        text = body.grammar
        if text is None:
            await self._box.refit(lambda: standing.forget_grammar(name))
            return {"name": name, "warnings": []}
        _refuse_aliases(text)
        draft = await asyncio.to_thread(standing.draft_grammar, name, text)
        try:
            warnings = await look_through(draft, name, self._box.model.model.parent)
        finally:
            draft.unlink(missing_ok=True)
        await self._box.refit(lambda: standing.keep_grammar(name, text))
        return {"name": name, "warnings": list[Json](warnings[:_LISTED])}


def _expect(request: Request, kind: type[requests.B]) -> requests.B:
    assert isinstance(request.body, kind)  # noqa: S101 - requests.BODIES says so
    return request.body


def _unusable(listed: settings.Hotwords, tokens: Path) -> list[Problem]:
    """What is wrong with each phrase by itself, under a model's tokens."""
    found = []
    for phrase in listed.phrases:
        try:
            hotwords.load(listed.model_copy(update={"phrases": (phrase,)}))
        except HotwordError:
            found.append(Problem(phrase.phrase, "holds no letter or digit"))
    if not found:
        never = hotwords.Hotwords(hotwords.load(listed), inference.load_tokens(tokens)).unspellable
        found = [Problem(phrase, "the model cannot write it; give it `spoken`") for phrase in never]
    times = Counter(phrase.phrase for phrase in listed.phrases)
    return found + [Problem(phrase, "stands in the list twice") for phrase, count in times.items() if count > 1]


def _grammar_name(wanted: str | None, names: Sequence[str]) -> str:
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted is not None and wanted in names:
        return wanted
    detail = "several grammars are in use" if wanted is None else f"{wanted!r} is no grammar of this device"
    raise RequestError(
        "unusable", detail, f"name one of {', '.join(names)}" if names else "set commands.grammars first"
    )


def _refuse_aliases(text: str) -> None:
    """A few lines of YAML can stand for gigabytes by naming each other."""
    with contextlib.suppress(yaml.YAMLError):  # grammar.load says it better
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise RequestError("unusable", "the grammar holds a YAML alias (*name)", "write it out")


async def look_through(draft: Path, name: str, model: Path) -> list[str]:
    """Lint a grammar and run its own tests in a process of its own; the warnings. Raises RequestError."""
    command = (sys.executable, "-m", "edge_asr.cli", "grammar", "lint", str(draft), "--model", str(model))
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    resource.prlimit(process.pid, resource.RLIMIT_AS, (LOOK_LIMIT_BYTES, LOOK_LIMIT_BYTES))
    resource.prlimit(process.pid, resource.RLIMIT_CPU, (LOOK_LIMIT_S, LOOK_LIMIT_S))
    said = b""
    try:
        with contextlib.suppress(asyncio.TimeoutError):
            said, _ = await asyncio.wait_for(process.communicate(), 6 * LOOK_LIMIT_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return _judged(process.returncode, said.decode(errors="replace").replace(str(draft), name).splitlines(), name)


def _judged(exit_code: int | None, said: Sequence[str], name: str) -> list[str]:
    """The warnings among what the linter said. Raises RequestError for all else."""
    remarks = [line.removeprefix(f"{name}: ") for line in said]
    if exit_code == 0:
        return [remark.removeprefix("warning: ") for remark in remarks if remark.startswith("warning: ")]
    wrong = [remark.removeprefix("error: ") for remark in remarks if remark.startswith("error: ")]
    if exit_code == EXIT_CONFIG:
        wrong = [line.removeprefix("edge-asr: ") for line in said]
    if not wrong:
        limits = f"{LOOK_LIMIT_S} s and {LOOK_LIMIT_BYTES >> 20} MiB are not enough to look it through"
        raise RequestError("unusable", limits, "leave out alternatives and wide ranges")
    raise RequestError("unusable", wrong[0], "mend it, send it again", [Problem("", each) for each in wrong[:_LISTED]])
