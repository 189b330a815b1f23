"""Who is put aside and who waits, played through with every kind of broker: one message at a time, as the law says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_asr import clock
from edge_asr.events import Category, Message
from edge_asr.refusals import ENDINGS, HUNG_UP, REFUSALS, Refusals

CATEGORIES: tuple[Category, ...] = get_args(Category)
QUOTA_EXCEEDED = 0x97

queues = st.lists(st.sampled_from(CATEGORIES), min_size=1, max_size=30)
ways = st.sampled_from([QUOTA_EXCEEDED, HUNG_UP])


def message(seq: int, category: Category) -> Message:
    return Message(seq, "id", clock.boot_id(), f"evt/{category}", category, {}, 0, 0, None, "unsynchronized")


class Play:
    """A queue, a broker that takes or refuses, and what came of it."""

    def __init__(self, queue: Sequence[Category], takes: Callable[[Message], bool], code: int) -> None:
        self.waiting = [message(seq, category) for seq, category in enumerate(queue, 1)]
        self.taken: list[int] = []
        self.aside: list[int] = []
        self.troubles = self.pauses = 0
        self.now_s = 0.0
        self._takes, self._code = takes, code
        self.refusals = Refusals(30.0, self._changed)

    def _changed(self) -> None:
        self.troubles += self.refusals.trouble is not None

    def step(self) -> None:
        """One message goes, or a pause is waited out."""
        self.pauses += self.refusals.resume_at_s > self.now_s + 0.01
        self.now_s = max(self.now_s + 0.01, self.refusals.resume_at_s)
        accused = self.refusals.accused
        if accused is None:
            self._send(self.waiting[0])
            return
        others = [each for each in self.waiting if each.seq != accused.seq]
        if self.refusals.called:
            others = [each for each in others if each.category in self.refusals.unheard]
        if others:
            self.refusals.summoned(others[0].seq)
            self._send(others[0])
        else:
            self.refusals.no_witness(self.now_s)

    def _send(self, sent: Message) -> None:
        if self._takes(sent):
            self.refusals.taken(sent, sent.topic)
            self.taken.append(sent.seq)
            self.waiting.remove(sent)
            return
        if self._code == HUNG_UP:
            fate = self.refusals.ended(sent, sent.topic, "it hung up", self.now_s)
        else:
            fate = self.refusals.refused(sent, sent.topic, "no", self._code, self.now_s)
        if fate == "aside":
            self.refusals.put_aside(sent, sent.topic)
            self.aside.append(sent.seq)
            self.waiting.remove(sent)


@given(queue=queues, code=ways, deaf_for=st.integers(0, 30))
def test_a_broker_that_takes_nothing_for_a_while_gets_everything_in_order_and_nothing_is_put_aside(
    queue: Sequence[Category], code: int, deaf_for: int
) -> None:
    """It changes its mind in a pause; between a message and its witness, a moment, the witness would come first."""
    play = Play(queue, lambda _: play.pauses >= deaf_for, code)
    while play.waiting and play.now_s < 10_000:
        play.step()
    assert play.aside == []
    assert play.refusals.trouble is None
    assert play.taken == sorted(play.taken)


@given(queue=queues, forbidden=st.sets(st.sampled_from(CATEGORIES), min_size=1, max_size=3), code=ways)
def test_forbidden_kinds_are_put_aside_as_soon_as_anything_else_was_taken_and_that_loses_nothing(
    queue: Sequence[Category], forbidden: set[Category], code: int
) -> None:
    play = Play([*queue, *CATEGORIES], lambda sent: sent.category not in forbidden, code)
    while play.waiting and play.now_s < 10_000:
        play.step()
    kinds = dict(enumerate([*queue, *CATEGORIES], 1))
    assert sorted(play.taken) == [seq for seq, kind in kinds.items() if kind not in forbidden]
    left = [each.seq for each in play.waiting]
    assert sorted([*play.aside, *left]) == [seq for seq, kind in kinds.items() if kind in forbidden]
    # What stays had no witness: nothing else came after it.
    assert not left or max(play.taken) < max(left)


@pytest.mark.parametrize("code", [QUOTA_EXCEEDED, HUNG_UP])
def test_nothing_is_put_aside_before_its_tries(code: int) -> None:
    tries: list[int] = []

    def takes(sent: Message) -> bool:
        tries.append(sent.seq)
        return sent.seq != 1

    play = Play(["transcript"] * 3, takes, code)
    while play.waiting and play.now_s < 10_000:
        play.step()
    assert (play.aside, play.troubles) == ([1], 0)
    assert tries.count(1) == (ENDINGS if code == HUNG_UP else REFUSALS) + 1


def test_the_pauses_of_a_queue_that_is_refused_altogether_grow_to_the_longest() -> None:
    play, pauses = Play(CATEGORIES, lambda _: False, QUOTA_EXCEEDED), []
    while play.now_s < 300:
        before_s = play.refusals.resume_at_s
        play.step()
        if play.refusals.trouble is not None and play.refusals.resume_at_s > max(before_s, play.now_s):
            pauses.append(round(play.refusals.resume_at_s - play.now_s, 1))
    grown = [pause for pause in pauses if pause >= 2]
    assert grown[:4] == [2.0, 4.0, 8.0, 16.0]
    assert set(grown[4:]) == {30.0}
