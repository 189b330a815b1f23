"""The graph a grammar becomes: words on its arcs, meaning as marks; made deterministic and minimal.

Law: a path from node 0 to an ending is a sentence, the graph is acyclic, and no two nodes have the same future, so
equal prefixes and suffixes are shared. The order of marks along a path is the order in which the template was walked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from edge_asr.numbers import Language


@dataclass(frozen=True, slots=True)
class Value:
    """Mark: from here on the slot holds the value."""

    slot: str
    value: str


@dataclass(frozen=True, slots=True)
class Meaning:
    """Mark at the end of a sentence: which intent, in which language's grammar."""

    intent: str
    language: Language


Mark = Value | Meaning


@dataclass(frozen=True, slots=True)
class Number:
    """Which number slot a spoken number word belongs to, and how to read the words."""

    slot: str
    language: Language
    kind: Literal["integer", "decimal", "digits"]
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One word on a path: the marks passed before it, and the number it is part of."""

    word: str
    number: Number | None = None
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True, slots=True)
class Arc:
    """A step between two nodes."""

    source: int
    target: int
    step: Step


@dataclass(frozen=True)
class WordGraph:
    """Acyclic, deterministic over its steps, minimal; node 0 is the start."""

    arcs: tuple[Arc, ...]
    endings: Mapping[int, tuple[tuple[Mark, ...], ...]]
    """Per node where a sentence may end: the marks of each way to end there."""

    def outgoing(self) -> dict[int, list[Arc]]:
        """Arcs by source node."""
        found: dict[int, list[Arc]] = defaultdict(list)
        for arc in self.arcs:
            found[arc.source].append(arc)
        return found

    def paths(self) -> Iterator[list[Step]]:
        """Every sentence's steps, depth first; there may be very many."""
        outgoing = self.outgoing()
        stack: list[tuple[int, list[Step]]] = [(0, [])]
        while stack:
            node, steps = stack.pop()
            if steps and node in self.endings:
                yield steps
            stack += [(arc.target, [*steps, arc.step]) for arc in reversed(outgoing.get(node, []))]

    def walk(self, random: Random) -> tuple[list[Step], tuple[Mark, ...]]:
        """A random sentence: its steps and the marks of its ending."""
        outgoing = self.outgoing()
        node, steps = 0, list[Step]()
        while True:
            ends, onward = self.endings.get(node, ()), outgoing.get(node, [])
            ways: list[Arc | tuple[Mark, ...]] = [*ends, *onward]
            chosen = random.choice(ways)
            if not isinstance(chosen, Arc):
                return steps, chosen
            steps.append(chosen.step)
            node = chosen.target


class Sketch:
    """A graph under construction (Thompson's): word arcs, and empty arcs that may carry marks."""

    def __init__(self) -> None:
        self.nodes = 1
        self.words: dict[int, list[tuple[str, Number | None, int]]] = defaultdict(list)
        self.empty: dict[int, list[tuple[tuple[Mark, ...], int]]] = defaultdict(list)

    def node(self) -> int:
        """A new node."""
        self.nodes += 1
        return self.nodes - 1

    def word(self, source: int, word: str, number: Number | None = None) -> int:
        """Append a word after ``source`` and return the new node behind it."""
        target = self.node()
        self.words[source].append((word, number, target))
        return target

    def finish(self, final: int) -> WordGraph:
        """The minimal deterministic graph of all paths from node 0 to ``final``."""
        return _minimal(*_determinized(self, final))


Automaton = tuple[tuple[tuple[int, str, int], ...], tuple[int, ...]]
"""Arcs (source, word, target) and final nodes; node 0 is the start."""


def minimal_trie(phrases: Iterable[Sequence[str]]) -> Automaton:
    """The smallest acyclic automaton of a set of phrases: (arcs, final nodes), node 0 the start."""
    trie: list[dict[str, int]] = [{}]
    final: set[int] = set()
    for phrase in phrases:
        node = 0
        for word in phrase:
            following = trie[node].get(word)
            if following is None:
                trie.append({})
                following = trie[node][word] = len(trie) - 1
            node = following
        final.add(node)
    merged: dict[tuple[bool, tuple[tuple[str, int], ...]], int] = {}
    representative: dict[int, int] = {}
    for node in range(len(trie) - 1, -1, -1):  # children have larger indices than parents
        shape = tuple(sorted((word, representative[child]) for word, child in trie[node].items()))
        representative[node] = merged.setdefault((node in final, shape), node)
    kept = sorted({representative[node] for node in range(len(trie))})
    arcs = tuple((node, word, representative[child]) for node in kept for word, child in sorted(trie[node].items()))
    return arcs, tuple(node for node in kept if node in final)


_Endings = frozenset[tuple[Mark, ...]]


def _expansions(sketch: Sketch, final: int) -> Callable[[int], tuple[list[tuple[Step, int]], _Endings]]:
    """Per node: the steps that leave it over any empty arcs, and the marks with which a sentence may end there."""
    known: dict[int, tuple[list[tuple[Step, int]], _Endings]] = {}

    def expand(node: int) -> tuple[list[tuple[Step, int]], _Endings]:
        if node in known:
            return known[node]
        steps: list[tuple[Step, int]] = []
        stack: list[tuple[tuple[Mark, ...], int]] = [((), node)]
        seen: set[tuple[tuple[Mark, ...], int]] = set()
        while stack:
            marks, at = stack.pop()
            if (marks, at) not in seen:
                seen.add((marks, at))
                steps += [(Step(word, number, marks), target) for word, number, target in sketch.words[at]]
                stack += [(marks + more, target) for more, target in sketch.empty[at]]
        known[node] = steps, frozenset(marks for marks, at in seen if at == final)
        return known[node]

    return expand


def _determinized(sketch: Sketch, final: int) -> tuple[list[dict[Step, int]], list[_Endings]]:
    """Subset construction over steps; empty arcs vanish and their marks move onto the next word."""
    expand = _expansions(sketch, final)
    names: dict[frozenset[int], int] = {frozenset({0}): 0}
    queue = [frozenset({0})]
    arcs: list[dict[Step, int]] = []
    endings: list[_Endings] = []
    for subset in queue:
        targets: dict[Step, set[int]] = defaultdict(set)
        for node in subset:
            for step, target in expand(node)[0]:
                targets[step].add(target)
        arcs.append({})
        endings.append(frozenset().union(*(expand(node)[1] for node in subset)))
        for step, nodes in targets.items():
            following = frozenset(nodes)
            if following not in names:
                names[following] = len(names)
                queue.append(following)
            arcs[-1][step] = names[following]
    return arcs, endings


def _minimal(arcs: Sequence[Mapping[Step, int]], endings: Sequence[_Endings]) -> WordGraph:
    """Merge nodes with the same future, from the ends backwards, and leave out those without one."""
    merged: dict[tuple[_Endings, frozenset[tuple[Step, int]]], int] = {}
    representative: dict[int, int] = {}
    for node in _children_first(arcs):
        future = frozenset((step, representative[end]) for step, end in arcs[node].items() if end in representative)
        if future or endings[node] or node == 0:
            representative[node] = merged.setdefault((endings[node], future), node)
    names = {node: i for i, node in enumerate(sorted(set(representative.values()), key=lambda n: (n != 0, n)))}
    return WordGraph(
        arcs=tuple(
            Arc(names[node], names[representative[target]], step)
            for node in names
            for step, target in sorted(arcs[node].items(), key=lambda item: (item[1], item[0].word, repr(item[0])))
            if target in representative
        ),
        endings={names[n]: tuple(sorted(endings[n], key=repr)) for n in names if endings[n]},
    )


def _children_first(arcs: Sequence[Mapping[Step, int]]) -> list[int]:
    """A topological order, ends first; iterative, because sentences may be longer than Python's stack."""
    order: list[int] = []
    entered = {0}
    stack: list[tuple[int, Iterator[int]]] = [(0, iter(arcs[0].values()))]
    while stack:
        node, children = stack[-1]
        child = next((c for c in children if c not in entered), None)
        if child is None:
            order.append(node)
            stack.pop()
        else:
            entered.add(child)
            stack.append((child, iter(arcs[child].values())))
    return order
