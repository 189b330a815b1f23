"""Whose utterance the recognizer hears next: finals before all else and in turn, nothing final ever lost."""

from __future__ import annotations

import asyncio
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from edge_asr.events import Utterance
from edge_asr.turns import FINALS, Turns

SOURCES = st.sampled_from(["dock", "press", "robot"])


def said(source: str, number: int) -> Utterance:
    return Utterance(f"{source}-{number}", source, number, b"", 0)


async def let_run() -> None:
    """Let every task that can go on do so."""
    for _ in range(5):
        await asyncio.sleep(0)


async def everything(turns: Turns) -> list[tuple[Utterance, str]]:
    await turns.finish()
    taken: list[tuple[Utterance, str]] = []
    while (work := await turns.take()) is not None:
        taken.append(work)
    return taken


@given(st.lists(SOURCES, max_size=FINALS))
def test_finals_come_out_whole_each_sources_in_order_and_no_source_waits_for_two_of_another(order: list[str]) -> None:
    async def run() -> list[str]:
        turns = Turns()
        for number, source in enumerate(order):
            await turns.final(said(source, number))
        taken = await everything(turns)
        assert sorted(u.start for u, _ in taken) == list(range(len(order)))
        for source in set(order):
            starts = [u.start for u, _ in taken if u.source == source]
            assert starts == sorted(starts)
        return [utterance.source for utterance, _ in taken]

    taken, left = asyncio.run(run()), Counter(order)
    while taken:  # in every round each source that still has one gets exactly one
        several = len(+left)
        this_round, taken = taken[:several], taken[several:]
        assert set(this_round) == set(+left)
        left.subtract(this_round)


@given(st.lists(st.tuples(SOURCES, st.sampled_from(["partial", "foreseen"])), max_size=12), st.sets(SOURCES))
def test_early_work_is_only_each_sources_newest_and_none_while_finals_wait(
    offers: list[tuple[str, str]], closing: set[str]
) -> None:
    async def run() -> None:
        turns = Turns()
        newest: dict[str, tuple[int, str]] = {}
        for number, (source, kind) in enumerate(offers):
            await turns.early(said(source, number), "partial" if kind == "partial" else "foreseen")
            newest[source] = number, kind
        for source in sorted(closing):
            await turns.final(said(source, 99))
            newest.pop(source, None)
        if closing:
            await turns.early(said("late", 0), "partial")
        taken = await everything(turns)
        assert [kind for _, kind in taken[: len(closing)]] == ["final"] * len(closing)
        assert {u.source: (u.start, kind) for u, kind in taken[len(closing) :]} == newest
        partials = sum(kind == "partial" for _, kind in offers) + bool(closing)
        assert turns.partials_dropped == partials - sum(kind == "partial" for _, kind in newest.values())

    asyncio.run(run())


def test_whoever_adds_one_final_too_many_waits_and_others_do_not() -> None:
    async def run() -> None:
        turns = Turns()
        for number in range(FINALS):
            await turns.final(said("dock", number))
        waiting = asyncio.create_task(turns.final(said("dock", FINALS)))
        await let_run()
        await turns.final(said("press", 0))
        assert not waiting.done()
        assert turns.finals == FINALS + 1
        await turns.take()
        await waiting

    asyncio.run(run())


def test_a_source_is_settled_when_all_it_said_is_committed() -> None:
    async def run() -> None:
        turns = Turns()
        utterances = [said("dock", number) for number in range(2)]
        for utterance in utterances:
            await turns.final(utterance)
        settled = asyncio.create_task(turns.settled("dock"))
        await turns.settle(utterances[0])
        await let_run()
        assert not settled.done()
        await turns.settled("press")
        await turns.settle(utterances[1])
        await settled

    asyncio.run(run())
