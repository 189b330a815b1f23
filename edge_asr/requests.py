"""Decides what a request to the device says and whether it may act: read, checked, never late, never twice.

Law: pure; time comes in as CLOCK_BOOTTIME nanoseconds.

- Nothing of a request is trusted but that the broker let it through: its size, form, words and numbers are checked, an
  unknown key is an error, and an answer goes to no topic of a device, or an answer could pass for a request.
- What waited in the broker while the device was away does not act any more; only a receipt, which states a fact, does.
  A retained request would act at every connection, so it never does.
- The same correlation data from the same response topic within :data:`REMEMBERED_S` is the same request: it acts once
  and gets the same answer. Reading (ping, status) acts on nothing and is answered afresh.
- A confirmation names the question and how many confirmations were left, so one that is late, or comes twice without
  correlation data, confirms nothing that was not asked.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from edge_asr.clock import NS_PER_S
from edge_asr.events import Json, Verdict
from edge_asr.settings import Verb, explain, problems

Reason = Literal[
    "unknown-verb",
    "not-allowed",
    "malformed",
    "too-large",
    "retained",
    "stale",
    "conflict",
    "busy",
    "not-pending",
    "nothing-said",
    "unknown-command",
    "unusable",
    "unavailable",
]

VERBS: tuple[Verb, ...] = get_args(Verb)

SAFE_LATE: frozenset[Verb] = frozenset({"receipt"})
"""What may act after it waited in the broker."""

READING: frozenset[Verb] = frozenset({"ping", "status"})
"""What changes nothing."""

LARGEST_BYTES = 256 * 1024
"""Of a request's body: three times a grammar of two thousand lines. The broker is told not to send more."""

LONGEST_RESPONSE_TOPIC = 512
"""Characters."""

REMEMBERED = 256
REMEMBERED_S = 120.0
"""How many answers are kept, and how long: longer than any broker takes to deliver a duplicate."""

_AS_ROLE = "confirm-"
"""What the role's name follows: access rules of brokers know topics, not payloads."""

_LINK_BYTES = 2048
"""What an MQTT packet may add to the body: topic, properties, CloudEvents envelope."""

LARGEST_PACKET_BYTES = LARGEST_BYTES + _LINK_BYTES


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one part of a request."""

    item: str
    """The phrase, sentence or key it is about; empty: all of it."""
    problem: str


class RequestError(Exception):
    """The request does not act; the text is one sentence for the person who sent it."""

    def __init__(self, reason: Reason, detail: str, remedy: str, found: Sequence[Problem] = ()) -> None:
        super().__init__(detail)
        self.reason = reason
        self.remedy = remedy
        self.problems = tuple(found)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a request."""

    name: str
    """Of its schema."""
    data: Mapping[str, Json]


def ok(verb: Verb, **result: Json) -> Answer:
    """It was done."""
    return Answer(f"answer-{verb}", {"verb": verb, "outcome": "ok", **result})


def refusal(verb: str, error: RequestError) -> Answer:
    """It was not, and why."""
    data: dict[str, Json] = {
        "verb": _short(verb),
        "outcome": "refused",
        "reason": error.reason,
        "detail": str(error),
        "remedy": error.remedy,
        "problems": [{"item": each.item, "problem": each.problem} for each in error.problems],
    }
    return Answer("refusal", data)


def _unheard(_answer: Answer) -> None:
    """Nobody asked for an answer."""


def _nothing() -> None:
    """Nobody waits for it."""


@dataclass(frozen=True, slots=True)
class Letter:
    """A request as the broker delivered it; nothing of it has been looked at."""

    verb: str
    """The last level of its topic."""
    body: bytes
    response_topic: str = ""
    """Empty: no answer is wanted."""
    correlation: bytes | None = None
    retained: bool = False
    is_sure: bool = False
    """It came at QoS 1, of which the broker sends only so many before one was :attr:`taken`."""
    waited: bool = False
    """It was in the broker before the present connection."""
    expires_ns: int | None = None
    """CLOCK_BOOTTIME at which its MQTT message expiry is over; None: it has none."""
    answer: Callable[[Answer], None] = _unheard
    """Sends the answer to the response topic."""
    taken: Callable[[], None] = _nothing
    """Tells the broker that the letter need not be sent again; until then it counts against what may be in flight."""


# ---------------------------------------------------------------- what a request says


class Body(BaseModel):
    """What a request carries beyond its verb."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _matching(pattern: str, expected: str) -> AfterValidator:
    compiled = re.compile(pattern)

    def check(text: str) -> str:
        if not compiled.fullmatch(text):
            raise ValueError(expected)
        return text

    return AfterValidator(check)


_ONE_LINE = _matching(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]*", "holds a line break or a control character")
Id = Annotated[str, _matching(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "is not the id of a message or question")]
Line = Annotated[str, Field(max_length=200), _ONE_LINE]
Phrase = Annotated[str, Field(min_length=1, max_length=100), _ONE_LINE]


class Nothing(Body):
    """The verb says it all."""


class SayAgain(Body):
    """What was said last, or is being asked."""

    source: Line | None = None
    """None: the source that spoke last."""


class Confirm(Body):
    """A yes to one question."""

    pending_id: Id
    confirmations_left: Annotated[int, Field(ge=1, le=2)]
    """As evt/pending said: a yes that comes twice is one yes."""


class Cancel(Body):
    """A no to one question."""

    pending_id: Id


class Hotword(Body):
    """A word or phrase of the site; see ``settings.Hotword``."""

    phrase: Phrase
    weight: Annotated[float, Field(ge=0, le=20)] | None = None
    spoken: Annotated[tuple[Phrase, ...], Field(max_length=16, strict=False)] = ()

    @model_validator(mode="before")
    @classmethod
    def _phrase_alone(cls, given: object) -> object:
        if not isinstance(given, (str, dict)):
            raise ValueError("is neither a text nor an object with a `phrase`")  # noqa: TRY004 - for pydantic
        return {"phrase": given} if isinstance(given, str) else given


class Hotwords(Body):
    """The site's list, whole."""

    phrases: Annotated[tuple[Hotword, ...], Field(max_length=2000, strict=False)] | None = None
    """Empty: none."""
    restore: bool = False
    """Back to the list of the settings."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Hotwords:
        if (self.phrases is not None) == self.restore:
            raise ValueError("expected either `phrases` or `restore: true`")
        return self


class Grammar(Body):
    """One grammar file, whole."""

    grammar: Annotated[str, Field(min_length=1, max_length=200_000)] | None = None
    """YAML."""
    name: Line | None = None
    """Which of the settings' grammars it replaces; None: the only one."""
    restore: bool = False
    """Back to the grammar of the settings."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Grammar:
        if (self.grammar is not None) == self.restore:
            raise ValueError("expected either `grammar` or `restore: true`")
        return self


class Receipt(Body):
    """What the MES did with a command."""

    command_id: Id
    verdict: Verdict
    reason: Line = ""


BODIES: Mapping[Verb, type[Body]] = {
    "ping": Nothing,
    "status": Nothing,
    "say-again": SayAgain,
    "confirm": Confirm,
    "cancel": Cancel,
    "reload": Nothing,
    "hotwords": Hotwords,
    "grammar": Grammar,
    "mute": Nothing,
    "unmute": Nothing,
    "receipt": Receipt,
}


B = TypeVar("B", bound=Body)


@dataclass(frozen=True, slots=True)
class Request:
    """A letter that was read and may act."""

    verb: Verb
    body: Body
    role: str = ""
    """As whom its sender may confirm: the broker let a letter to ``confirm-ROLE`` through."""


def read(letter: Letter, allowed: Sequence[Verb], now_ns: int) -> Request:
    """What a letter asks for. Raises RequestError."""
    named, _, role = letter.verb.partition("-") if letter.verb.startswith(_AS_ROLE) else (letter.verb, "", "")
    verb = next((verb for verb in VERBS if verb == named), None)
    if verb is None:
        raise RequestError("unknown-verb", f"there is no request {_shown(letter.verb)}", f"use {', '.join(VERBS)}")
    if verb not in allowed:
        raise RequestError("not-allowed", f"this device takes no {verb}", "see requests.allow in its settings")
    if letter.retained:
        raise RequestError("retained", "a retained request would act at every connection", "send it without retain")
    late = letter.expires_ns is not None and letter.expires_ns <= now_ns
    if late or (letter.waited and verb not in SAFE_LATE):
        raise RequestError("stale", "it waited too long on its way", "send it again if it is still wanted")
    if len(letter.body) > LARGEST_BYTES:
        limit = f"{LARGEST_BYTES} bytes is the limit"
        raise RequestError("too-large", f"{len(letter.body)} bytes are too many", limit)
    return Request(verb, _body(letter.body, BODIES[verb]), role)


def _body(written: bytes, kind: type[Body]) -> Body:
    remedy = "see the schema in docs/asyncapi.yaml"
    try:
        tree = json.loads(written, parse_constant=_no_number, object_pairs_hook=_no_twins) if written.strip() else {}
        json.dumps(tree, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except RecursionError:
        raise RequestError("malformed", "it is nested too deeply", remedy) from None
    except ValueError as error:
        raise RequestError("malformed", f"it is not JSON: {_shown(str(error))}", "send one JSON object") from None
    if isinstance(tree, dict) and "specversion" in tree:
        tree = tree.get("data", {})
    if not isinstance(tree, dict):
        raise RequestError("malformed", "it is not a JSON object", "send one, or nothing where nothing is to be said")
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        found = [Problem(_item(each["loc"], tree), _short(explain(each, kind), 300)) for each in problems(error)[:100]]
        raise RequestError("malformed", found[0].problem, remedy, found) from None


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return tree


def _item(location: Sequence[int | str], tree: Mapping[str, Any]) -> str:
    """The phrase that a problem is about, or the key."""
    match location:
        case ("phrases", int(index), *_):
            listed = tree["phrases"][index]
            phrase = listed.get("phrase", "") if isinstance(listed, dict) else listed
            return _short(str(phrase))
        case (key, *_):
            return _short(str(key))
    return ""


def _short(text: str, limit: int = 100) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _shown(text: str) -> str:
    return repr(_short(text))


def takes_answers(topic: str) -> bool:
    """Whether an answer may be sent to a response topic: no wildcard, no broker's own, nothing of any device."""
    if not 0 < len(topic) <= LONGEST_RESPONSE_TOPIC or topic.startswith("$"):
        return False
    return not set(topic) & set("+#\0") and "voice" not in topic.split("/")


# ---------------------------------------------------------------- once, and not too fast


class Register:
    """Which requests have been answered lately, so that one that comes twice acts once."""

    def __init__(self) -> None:
        self._answers: OrderedDict[tuple[str, bytes], tuple[int, bytes, Answer | None]] = OrderedDict()

    def enter(self, letter: Letter, now_ns: int) -> Answer | Literal["new", "under way", "conflict"]:
        """The answer that was given before, or why there is none; conflict: it was another request before."""
        if letter.correlation is None or letter.verb in READING:
            return "new"
        self._forget_old(now_ns)
        key, content = (letter.response_topic, letter.correlation), _content(letter)
        if key not in self._answers:
            self._answers[key] = now_ns, content, None
            return "new"
        _, before, answer = self._answers[key]
        if before != content:
            return "conflict"
        return answer or "under way"

    def answered(self, letter: Letter, answer: Answer, now_ns: int) -> None:
        """Keep the answer for when the request comes again."""
        if letter.correlation is not None and letter.verb not in READING:
            self._answers[letter.response_topic, letter.correlation] = now_ns, _content(letter), answer

    def forget(self, letter: Letter) -> None:
        """It did not act: it may come again."""
        if letter.correlation is not None:
            self._answers.pop((letter.response_topic, letter.correlation), None)

    def _forget_old(self, now_ns: int) -> None:
        while self._answers:
            key, (at_ns, _, _) = next(iter(self._answers.items()))
            if len(self._answers) < REMEMBERED and now_ns - at_ns < REMEMBERED_S * NS_PER_S:
                return
            del self._answers[key]


def _content(letter: Letter) -> bytes:
    return hashlib.sha256(letter.verb.encode() + b"\0" + letter.body).digest()


class Pace:
    """A token bucket: how long the next request must wait so that requests cannot crowd out speech."""

    def __init__(self, per_s: float, burst: int) -> None:
        self._interval_ns = round(NS_PER_S / per_s)
        self._burst = burst
        self._full_at_ns = 0
        """When the bucket would be full again."""

    def wait_ns(self, now_ns: int) -> int:
        """Take one token; nanoseconds until it is there."""
        self._full_at_ns = max(self._full_at_ns, now_ns) + self._interval_ns
        return max(0, self._full_at_ns - now_ns - self._burst * self._interval_ns)
