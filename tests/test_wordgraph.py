"""The word graph: the language of the sketch it was made from, deterministic, minimal, acyclic."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from edge_asr.wordgraph import Mark, Number, Sketch, Step, Value, WordGraph, minimal_trie

Sentence = tuple[tuple[Step, ...], tuple[Mark, ...]]
Edge = tuple[int, int, str | tuple[Mark, ...]]
"""From, to, and a word or the marks of an empty arc."""

NUMBER = Number("speed", "en", "integer", "rpm")
WORDS = st.sampled_from(["start", "stop", "line", "one"])
MARKS = st.lists(
    st.sampled_from([Value("machine", "press"), Value("machine", "oven"), Value("place", "hall")]), max_size=2
)


@st.composite
def sketches(draw: st.DrawFn) -> tuple[int, list[Edge]]:
    """A random acyclic sketch: its last node is the final one."""
    last = draw(st.integers(1, 6))
    places = st.tuples(st.integers(0, last), st.integers(0, last)).filter(lambda pair: pair[0] < pair[1])
    edges = draw(st.lists(st.tuples(places, WORDS | MARKS.map(tuple)), max_size=9))
    return last, [(a, b, what) for (a, b), what in edges]


def finished(last: int, edges: Sequence[Edge]) -> WordGraph:
    sketch = Sketch()
    sketch.nodes = last + 1
    for a, b, what in edges:
        if isinstance(what, str):
            sketch.words[a].append((what, NUMBER if what == "one" else None, b))
        else:
            sketch.empty[a].append((what, b))
    return sketch.finish(last)


def spelled_out(last: int, edges: Sequence[Edge]) -> set[Sentence]:
    """Every path of the sketch, the slow way."""

    def onward(node: int, steps: tuple[Step, ...], marks: tuple[Mark, ...]) -> set[Sentence]:
        found = {(steps, marks)} if node == last else set()
        for a, b, what in edges:
            if a == node and isinstance(what, str):
                found |= onward(b, (*steps, Step(what, NUMBER if what == "one" else None, marks)), ())
            elif a == node and not isinstance(what, str):
                found |= onward(b, steps, marks + what)
        return found

    return onward(0, (), ())


def language(graph: WordGraph, node: int = 0) -> frozenset[Sentence]:
    """Every sentence from a node on; ends only if the graph has no cycle."""
    outgoing = graph.outgoing()

    @functools.cache
    def from_node(at: int) -> frozenset[Sentence]:
        found: set[Sentence] = {((), ending) for ending in graph.endings.get(at, ())}
        for arc in outgoing.get(at, []):
            found |= {((arc.step, *steps), ending) for steps, ending in from_node(arc.target)}
        return frozenset(found)

    return from_node(node)


def nodes_of(graph: WordGraph) -> set[int]:
    return {0, *graph.endings, *(arc.source for arc in graph.arcs), *(arc.target for arc in graph.arcs)}


@given(sketches())
def test_the_graph_holds_the_sentences_of_its_sketch_and_no_others(sketch: tuple[int, list[Edge]]) -> None:
    assert language(finished(*sketch)) == spelled_out(*sketch)


@given(sketches())
def test_a_step_leads_to_one_node_only(sketch: tuple[int, list[Edge]]) -> None:
    for arcs in finished(*sketch).outgoing().values():
        assert len({arc.step for arc in arcs}) == len(arcs)


@given(sketches())
def test_no_two_nodes_have_the_same_future(sketch: tuple[int, list[Edge]]) -> None:
    graph = finished(*sketch)
    futures = [language(graph, node) for node in nodes_of(graph)]
    assert len(set(futures)) == len(futures)


@given(sketches())
def test_every_node_can_be_reached_and_left_for_an_ending(sketch: tuple[int, list[Edge]]) -> None:
    graph = finished(*sketch)
    nodes = nodes_of(graph)
    assert nodes == set(range(len(nodes)))
    reached = {0}
    for _ in nodes:
        reached |= {arc.target for arc in graph.arcs if arc.source in reached}
    assert reached == nodes
    assert all(language(graph, node) for node in nodes - {0})


@given(sketches())
def test_paths_are_the_sentences_that_say_something(sketch: tuple[int, list[Edge]]) -> None:
    graph = finished(*sketch)
    said = {steps for steps, _ in language(graph) if steps}
    assert sorted(map(repr, graph.paths())) == sorted(repr(list(steps)) for steps in said)


@given(sketches(), st.integers())
def test_a_random_walk_is_a_sentence(sketch: tuple[int, list[Edge]], seed: int) -> None:
    graph = finished(*sketch)
    if sentences := language(graph):
        steps, ending = graph.walk(Random(seed))  # noqa: S311 - no secrets
        assert (tuple(steps), ending) in sentences


def test_marks_of_equal_words_keep_them_apart_and_equal_ends_are_shared() -> None:
    edges: list[Edge] = [
        *((0, 1, "start"), (1, 2, "press"), (2, 3, (Value("machine", "press"),)), (3, 9, "now")),
        *((0, 4, "stop"), (4, 5, "press"), (5, 6, (Value("machine", "press"),)), (6, 9, "now")),
    ]
    graph = finished(9, edges)
    assert len(graph.arcs) == 4  # start, stop, press, now
    assert [arc.step.marks for arc in graph.arcs if arc.step.word == "now"] == [(Value("machine", "press"),)]


def test_a_sentence_of_ten_thousand_words_is_built() -> None:
    sketch = Sketch()
    node = 0
    for _ in range(10_000):
        node = sketch.word(node, "very")
    assert len(sketch.finish(node).arcs) == 10_000


# ---------------------------------------------------------------- minimal_trie

PHRASES = st.sets(st.lists(st.sampled_from("abc"), max_size=4).map(tuple), max_size=8)


@given(PHRASES)
def test_a_trie_accepts_its_phrases_and_no_others_with_the_fewest_nodes(phrases: set[tuple[str, ...]]) -> None:
    arcs, finals = minimal_trie(phrases)

    def future(node: int) -> frozenset[tuple[str, ...]]:
        onward = {(word, *rest) for a, word, b in arcs if a == node for rest in future(b)}
        return frozenset(onward | ({()} if node in finals else set()))

    assert future(0) == phrases
    nodes = {0, *finals, *itertools.chain.from_iterable((a, b) for a, _, b in arcs)}
    # Myhill and Nerode: as many nodes as the phrases' prefixes have different continuations.
    prefixes = {phrase[:length] for phrase in phrases for length in range(len(phrase) + 1)}
    continuations = {frozenset(p[len(prefix) :] for p in phrases if p[: len(prefix)] == prefix) for prefix in prefixes}
    assert len(nodes) == max(len(continuations), 1)
    assert len({(a, word) for a, word, _ in arcs}) == len(arcs)
