"""What a request may say: what the schemas promise is what is taken, nothing late acts, nothing acts twice."""

from __future__ import annotations

import contextlib
import json
import uuid
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_asr import requests
from edge_asr.clock import NS_PER_S
from edge_asr.contract import Renderer
from edge_asr.requests import (
    LARGEST_BYTES,
    REMEMBERED,
    REMEMBERED_S,
    VERBS,
    Answer,
    Letter,
    Pace,
    Register,
    Request,
    RequestError,
    read,
    refusal,
    takes_answers,
)
from edge_asr.settings import Verb
from tests.payloads import check_answer, validator

NOW_NS = 1000 * NS_PER_S


def refused(letter: Letter, allowed: tuple[Verb, ...] = VERBS) -> RequestError:
    with pytest.raises(RequestError) as caught:
        read(letter, allowed, NOW_NS)
    answer = Renderer("voice/edge01", "edge01").answer("refusal", refusal(letter.verb, caught.value).data, "mes", None)
    check_answer(json.loads(answer.body))
    assert "\n" not in str(caught.value)
    return caught.value


def asked(verb: str, body: object) -> Request:
    return read(Letter(verb, json.dumps(body).encode()), VERBS, NOW_NS)


# -- form

# No line break at the end: `$` of Python's patterns, unlike that of JSON Schema's, would let it pass.
lines = st.one_of(st.just(""), st.text(st.sampled_from("ab é机\n\t\x00\x85\u2028#"), max_size=6).map("{}.".format))
ids = st.sampled_from([str(uuid.UUID(int=5)), str(uuid.UUID(int=2**127)), "", "x", str(uuid.UUID(int=5)) + "\n"])
hotword: st.SearchStrategy[Any] = st.one_of(
    lines,
    st.fixed_dictionaries(
        {},
        optional={
            "phrase": lines,
            "weight": st.one_of(st.none(), st.integers(-1, 21), st.floats(0, 20.5), st.just("2")),
            "spoken": st.lists(lines, max_size=2),
            "wieght": st.just(1),
        },
    ),
    st.sampled_from([None, 7, []]),
)
fields: dict[str, st.SearchStrategy[Any]] = {
    "pending_id": ids,
    "command_id": ids,
    "confirmations_left": st.sampled_from([0, 1, 2, 3, True, "1", 1.5, None]),
    "verdict": st.sampled_from(["accepted", "rejected", "lost", "", None]),
    "reason": st.one_of(lines, st.just("x" * 201), st.none()),
    "source": st.one_of(st.none(), lines, st.just(3)),
    "phrases": st.one_of(st.none(), st.lists(hotword, max_size=3), st.just("RCCB")),
    "restore": st.sampled_from([True, False, None, 1]),
    "grammar": st.one_of(st.none(), st.just(""), lines, st.just(4)),
    "name": st.one_of(st.none(), lines),
    "unknown": st.just(1),
}
KEYS: dict[Verb, tuple[str, ...]] = {
    "confirm": ("pending_id", "confirmations_left"),
    "cancel": ("pending_id",),
    "say-again": ("source",),
    "hotwords": ("phrases", "restore"),
    "grammar": ("grammar", "name", "restore"),
    "receipt": ("command_id", "verdict", "reason"),
}


@st.composite
def bodies(draw: st.DrawFn) -> tuple[Verb, dict[str, Any]]:
    """A verb and something that is nearly right for it."""
    verb = draw(st.sampled_from(VERBS))
    keys = KEYS.get(verb, ())
    likely = draw(st.lists(st.sampled_from(keys), unique=True)) if keys else []
    stray = draw(st.lists(st.sampled_from(sorted(fields)), max_size=1)) if draw(st.booleans()) else []
    return verb, {key: draw(fields[key]) for key in dict.fromkeys([*likely, *stray])}


@given(bodies())
@example(("confirm", {"pending_id": str(uuid.UUID(int=5)), "confirmations_left": 1}))
@example(("hotwords", {"phrases": ["RCCB", {"phrase": "X", "weight": 2, "spoken": ["ex"]}], "restore": False}))
@example(("grammar", {"grammar": "language: en", "name": "factory.en"}))
@example(("receipt", {"command_id": str(uuid.UUID(int=5)), "verdict": "rejected", "reason": "locked"}))
def test_what_the_schema_of_a_request_allows_is_what_is_taken(made: tuple[Verb, dict[str, Any]]) -> None:
    verb, body = made
    if validator(f"request-{verb}").is_valid(body):
        assert asked(verb, body).verb == verb
    else:
        error = refused(Letter(verb, json.dumps(body).encode()))
        assert error.reason == "malformed"
        assert error.problems


@given(st.sampled_from(VERBS), st.binary(max_size=200))
@example("ping", b"\xff\xfe")
@example("ping", b'{"a": 1, "a": 2}')
@example("ping", b"[" * 100_000)
@example("say-again", b'{"source": "\\ud800"}')
@example("say-again", b'{"source": NaN}')
@example("ping", b"7" * 5000)
def test_whatever_bytes_come_they_are_read_or_refused(verb: Verb, body: bytes) -> None:
    with contextlib.suppress(RequestError):
        read(Letter(verb, body), VERBS, NOW_NS)
        return
    assert len(str(refused(Letter(verb, body)))) < 500


def test_a_cloudevents_envelope_is_opened() -> None:
    envelope = {"specversion": "1.0", "id": "1", "source": "mes", "type": "x", "data": {"source": "mic"}}
    assert asked("say-again", envelope).body == requests.SayAgain(source="mic")


def test_what_is_wrong_with_each_phrase_is_named() -> None:
    error = refused(Letter("hotwords", json.dumps({"phrases": ["RCCB", 7, {"phrase": "x", "wieght": 2}]}).encode()))
    assert [(each.item, each.problem) for each in error.problems] == [
        ("7", "phrases.1: 7 is neither a text nor an object with a `phrase`"),
        ("x", "phrases.2.wieght: unknown key; did you mean `weight`?"),
    ]


def test_an_unknown_verb_a_forbidden_one_and_too_much_are_refused() -> None:
    assert refused(Letter("open-the-door\n" * 99, b"")).reason == "unknown-verb"
    assert refused(Letter("mute", b""), ("ping",)).reason == "not-allowed"
    assert refused(Letter("grammar", b" " * (LARGEST_BYTES + 1))).reason == "too-large"


def test_a_confirmation_names_the_role_in_its_topic() -> None:
    body = json.dumps({"pending_id": str(uuid.UUID(int=5)), "confirmations_left": 1}).encode()
    assert read(Letter("confirm-supervisor", body), VERBS, NOW_NS).role == "supervisor"
    assert read(Letter("confirm", body), VERBS, NOW_NS).role == ""
    assert refused(Letter("cancel-supervisor", body)).reason == "unknown-verb"


# -- never late


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "receipt"])
def test_what_waited_in_the_broker_does_not_act(verb: Verb) -> None:
    assert refused(Letter(verb, b"", waited=True)).reason == "stale"


def test_a_receipt_may_be_late_but_not_beyond_the_expiry_its_sender_gave_it() -> None:
    body = json.dumps({"command_id": str(uuid.UUID(int=5)), "verdict": "accepted"}).encode()
    assert read(Letter("receipt", body, waited=True), VERBS, NOW_NS).verb == "receipt"
    assert read(Letter("receipt", body, expires_ns=NOW_NS + 1), VERBS, NOW_NS).verb == "receipt"
    assert refused(Letter("receipt", body, expires_ns=NOW_NS)).reason == "stale"


@pytest.mark.parametrize("verb", VERBS)
def test_a_retained_request_never_acts(verb: Verb) -> None:
    assert refused(Letter(verb, b"", retained=True)).reason == "retained"


# -- never twice

DONE = Answer("answer-mute", {"verb": "mute"})


def letter(verb: str = "mute", correlation: bytes | None = b"1", response_topic: str = "mes/answers") -> Letter:
    return Letter(verb, b"", response_topic, correlation)


def test_a_request_that_comes_again_gets_the_answer_it_got() -> None:
    register = Register()
    assert register.enter(letter(), NOW_NS) == "new"
    assert register.enter(letter(), NOW_NS) == "under way"
    register.answered(letter(), DONE, NOW_NS)
    assert register.enter(letter(), NOW_NS + NS_PER_S) == DONE


@pytest.mark.parametrize(
    "other",
    [letter(correlation=b"2"), letter(correlation=None), letter(response_topic="other/answers")],
    ids=["other data", "no data", "another client"],
)
def test_another_request_is_not_taken_for_it(other: Letter) -> None:
    register = Register()
    register.enter(letter(), NOW_NS)
    register.answered(letter(), DONE, NOW_NS)
    assert register.enter(other, NOW_NS) == "new"


def test_correlation_data_used_for_something_else_is_a_conflict_and_reading_is_always_fresh() -> None:
    register = Register()
    register.enter(letter("mute"), NOW_NS)
    register.answered(letter("mute"), DONE, NOW_NS)
    assert register.enter(letter("unmute"), NOW_NS) == "conflict"
    assert [register.enter(letter("status"), NOW_NS) for _ in range(2)] == ["new", "new"]


def test_what_was_refused_may_come_again_and_answers_are_not_kept_for_ever() -> None:
    register = Register()
    register.enter(letter(), NOW_NS)
    register.forget(letter())
    assert register.enter(letter(), NOW_NS) == "new"
    register.answered(letter(), DONE, NOW_NS)
    assert register.enter(letter(), NOW_NS + round(REMEMBERED_S * NS_PER_S)) == "new"


def test_a_flood_of_requests_does_not_fill_the_memory() -> None:
    register = Register()
    for n in range(3 * REMEMBERED):
        register.enter(letter(correlation=str(n).encode()), NOW_NS)
    register.answered(letter(correlation=b"last"), DONE, NOW_NS)
    assert register.enter(letter(correlation=b"0"), NOW_NS) == "new"
    assert register.enter(letter(correlation=b"last"), NOW_NS) == DONE


# -- not too fast, and answered where it is harmless


@given(st.lists(st.integers(0, NS_PER_S), max_size=60), st.integers(1, 10))
def test_in_no_stretch_of_time_more_is_let_through_than_rate_and_burst_allow(pauses: list[int], burst: int) -> None:
    pace, now_ns, let_through = Pace(10, burst), 0, list[int]()
    for pause_ns in pauses:
        now_ns += pause_ns
        now_ns += pace.wait_ns(now_ns)
        let_through.append(now_ns)
    for i, first in enumerate(let_through):
        for j, last in enumerate(let_through[i:], start=i):
            assert j - i + 1 <= burst + 1 + (last - first) * 10 / NS_PER_S


def test_who_waits_is_not_slowed_down() -> None:
    pace = Pace(10, 1)
    assert [pace.wait_ns(n * NS_PER_S) for n in range(5)] == [0] * 5


@pytest.mark.parametrize(
    ("topic", "taken"),
    [
        *(("mes/answers", True), ("a/reply/press-07", True), ("voices/of/the/hall", True)),
        *(("", False), ("a/+/b", False), ("a/#", False), ("$SYS/broker", False), ("a\0b", False), ("x" * 513, False)),
        *(("acme/voice/edge01/req/mute", False), ("voice/edge02/evt/command", False)),
    ],
)
def test_answers_go_to_no_topic_of_a_device_and_to_no_pattern(topic: str, *, taken: bool) -> None:
    assert takes_answers(topic) is taken
