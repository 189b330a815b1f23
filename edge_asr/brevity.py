"""Which sentences are too short: the fewer tokens, the less sure a command can be, however clearly it is said."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from edge_asr import grammar
from edge_asr.biasing import spellings
from edge_asr.commands import surest
from edge_asr.grammar import Grammar
from edge_asr.posteriors import TokenTable
from edge_asr.wordgraph import Step, WordGraph


@dataclass(frozen=True, slots=True)
class TooShort:
    """The shortest sentence of an intent that cannot be as sure as its commands have to be."""

    intent: str
    said: str
    surest: float
    wanted: float

    def __str__(self) -> str:
        return f"{self.said!r} is too short to be surer than about {self.surest:.2f}, wanted is {self.wanted:g}"


def too_short(loaded: Grammar, table: TokenTable, min_confidence: float) -> Iterator[TooShort]:
    """One of each intent that has any; ``min_confidence``: the site's, for intents without their own."""
    for intent, definition in loaded.intents.items():
        wanted = min_confidence if definition.min_confidence is None else definition.min_confidence
        shortest = (_shortest(grammar.graph_of(template, loaded), table) for template in definition.sentences)
        tokens, said = min((each for each in shortest if each is not None), default=(0, ""))
        sure = surest(tokens, len(table))
        if tokens and sure < wanted:
            yield TooShort(intent, said, sure, wanted)


def _shortest(graph: WordGraph, table: TokenTable) -> tuple[int, str] | None:
    """(tokens, sentence) of what takes the fewest tokens to write; None if nothing can be written (Dijkstra)."""
    costs = {word: _fewest(word, table) for word in {arc.step.word for arc in graph.arcs}}
    outgoing = graph.outgoing()
    order = itertools.count()
    waiting: list[tuple[int, int, int, tuple[Step, ...]]] = [(0, next(order), 0, ())]
    done: set[int] = set()
    while waiting:
        tokens, _, node, steps = heapq.heappop(waiting)
        if node in graph.endings:
            return tokens, grammar.sentence(steps)
        if node not in done:
            done.add(node)
            for arc in outgoing.get(node, []):
                cost = costs[arc.step.word]
                if cost is not None:
                    heapq.heappush(waiting, (tokens + cost, next(order), arc.target, (*steps, arc.step)))
    return None


def _fewest(word: str, table: TokenTable) -> int | None:
    """Tokens that it takes at least to write a word; None if it cannot be written."""
    counts = {0: 0}
    for start, _, end in spellings(word, table):  # sorted by start
        counts[end] = min(counts[start] + 1, counts.get(end, len(word) + 2))
    return counts.get(len(word) + 1)
