"""Risky commands wait for a yes from the same source, in time, with nothing said in between."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_asr.clock import NS_PER_S
from edge_asr.confirmation import Cancelled, ConfirmationDesk, Confirmed, Immediate, Outcome, Pending
from edge_asr.events import Command, Rejection, Risk, Transcript, Utterance, new_id

WINDOW_S = 10.0
SAID = Transcript("words", "en", "EMO_UNKNOWN", "Speech", 1.0, ())


def utterance(at_s: float, source: str = "mic") -> Utterance:
    return Utterance(new_id(), source, 0, b"", round(at_s * NS_PER_S))


def command(risk: Risk = "normal") -> Command:
    return Command("SetPoint", {"temperature": 180}, 0.9, risk, 10.0, words="set it to one hundred eighty")


YES = Command("Confirm", {}, 0.9, "normal", 10.0, answer="confirm")
NO = Command("Cancel", {}, 0.9, "normal", 10.0, answer="cancel")
TALK = Rejection("not-understood", "heard 'hello', no command")
NOISE = Rejection("no-speech", "no words")


def kinds(outcomes: Sequence[Outcome]) -> list[type[Outcome]]:
    return [type(outcome) for outcome in outcomes]


def test_a_command_without_risk_needs_nobodys_yes() -> None:
    desk = ConfirmationDesk(WINDOW_S)
    assert kinds(desk.judge(utterance(1), SAID, command())) == [Immediate]
    assert desk.next_expiry_ns() is None


def test_a_risky_command_becomes_one_when_confirmed_and_lives_from_then() -> None:
    desk = ConfirmationDesk(WINDOW_S)
    (pending,) = desk.judge(utterance(1), SAID, command("confirm"))
    assert isinstance(pending, Pending)
    assert pending.until_ns == 11 * NS_PER_S
    yes = utterance(5)
    said, confirmed = desk.judge(yes, SAID, YES)
    assert said == Immediate(yes, SAID, None)
    assert confirmed == Confirmed(pending, 5 * NS_PER_S, "voice")
    assert kinds(desk.judge(utterance(6), SAID, YES)) == [Immediate]


def test_two_steps_want_two_confirmations() -> None:
    desk = ConfirmationDesk(WINDOW_S)
    desk.judge(utterance(1), SAID, command("two-step"))
    _, again = desk.judge(utterance(5), SAID, YES)
    assert isinstance(again, Pending)
    assert again.asked_again
    assert (again.steps_left, again.until_ns) == (1, 15 * NS_PER_S)
    assert kinds(desk.judge(utterance(14), SAID, YES)) == [Immediate, Confirmed]


@pytest.mark.parametrize("said", [TALK, command(), command("confirm")], ids=["talk", "command", "another risky one"])
def test_anything_else_cancels_it_and_is_judged_itself(said: Command | Rejection) -> None:
    desk = ConfirmationDesk(WINDOW_S)
    desk.judge(utterance(1), SAID, command("confirm"))
    first, second = desk.judge(utterance(3), SAID, said)
    assert isinstance(first, Cancelled)
    assert first.rejection.reason == "not-confirmed"
    assert isinstance(second, Pending if said == command("confirm") else Immediate)


def test_a_no_cancels_it_and_noise_does_not() -> None:
    desk = ConfirmationDesk(WINDOW_S)
    desk.judge(utterance(1), SAID, command("confirm"))
    assert kinds(desk.judge(utterance(2), None, NOISE)) == [Immediate]
    _, cancelled = desk.judge(utterance(3), SAID, NO)
    assert isinstance(cancelled, Cancelled)
    assert cancelled.rejection.reason == "cancelled"


def test_a_yes_that_comes_too_late_or_from_elsewhere_confirms_nothing() -> None:
    desk = ConfirmationDesk(WINDOW_S)
    desk.judge(utterance(1, "mic"), SAID, command("confirm"))
    assert kinds(desk.judge(utterance(2, "tablet"), SAID, YES)) == [Immediate]
    assert kinds(desk.judge(utterance(11.5, "mic"), SAID, YES)) == [Cancelled, Immediate]


def test_an_order_that_is_understood_again_after_a_crash_asks_the_same_question() -> None:
    said = utterance(1)
    (before,), (after,) = (ConfirmationDesk(WINDOW_S).judge(said, SAID, command("confirm")) for _ in range(2))
    (other,) = ConfirmationDesk(WINDOW_S).judge(utterance(1), SAID, command("confirm"))
    assert before == after != other
    assert isinstance(after, Pending)
    assert after.id != said.id


def test_stopping_cancels_what_is_pending() -> None:
    desk = ConfirmationDesk(WINDOW_S)
    desk.judge(utterance(1), SAID, command("confirm"))
    assert kinds(desk.close("the device stopped")) == [Cancelled]
    assert desk.close("the device stopped") == []


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["mic", "tablet"]),
            st.floats(0.1, 8),
            st.sampled_from([command(), command("confirm"), command("two-step"), YES, NO, TALK, NOISE]),
        ),
        max_size=30,
    )
)
def test_every_risky_command_ends_exactly_once(said: list[tuple[str, float, Command | Rejection]]) -> None:
    desk = ConfirmationDesk(WINDOW_S)
    now, outcomes = 0.0, list[Outcome]()
    for source, pause, decision in said:
        now += pause
        outcomes += desk.judge(utterance(now, source), SAID, decision)
    outcomes += desk.expire(round((now + WINDOW_S) * NS_PER_S))
    begun = [
        o.id for o in outcomes if isinstance(o, Pending) and o.steps_left == (1 if o.command.risk == "confirm" else 2)
    ]
    ended = [o.pending.id for o in outcomes if isinstance(o, (Confirmed, Cancelled))]
    assert sorted(begun) == sorted(ended)
    assert desk.next_expiry_ns() is None
