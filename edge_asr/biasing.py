"""Scores a grammar against a model's posteriors: which sentence of the word graph was said, and how sure is that.

Law: everything is a CTC Viterbi score in natural logarithms. A sentence's score is its best alignment over any spelling
the token table allows; the free score is the best alignment of anything at all, so the gap between the two is what
saying exactly this sentence costs, and it is never positive. The second reading is exact too: from the backward pass
every word has the score of the best sentence through it (its max-marginal), so the best sentence with another meaning
is found, not guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_asr.grammar import Reading, read
from edge_asr.posteriors import BLANK, WORD_START, TokenTable
from edge_asr.wordgraph import Arc, WordGraph

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

IMPOSSIBLE = np.float32(-1e30)
"""Stands for log 0: adding to it never overflows, unlike -inf it never makes a NaN."""

RUNNERS_UP = 24
"""Words tried, best first, in search of a second meaning; beyond that the margin is wide anyway."""


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One complete sentence of the grammar, aligned with the audio."""

    reading: Reading
    words: tuple[str, ...]
    score: float
    """Log probability of the alignment, summed over all frames."""
    tokens: int
    """Tokens on the path."""


@dataclass(frozen=True, slots=True)
class GrammarMatch:
    """The best sentence, the best one with another meaning, and the free path."""

    best: Hypothesis
    second: Hypothesis | None
    free_score: float
    """Score of the greedy path, an upper bound of every sentence's."""
    frames: int


def spellings(word: str, table: TokenTable) -> list[tuple[int, int, int]]:
    """All ways to write a word in tokens, as a lattice over its characters: (from, token id, to).

    An English word carries SentencePiece's space mark in front; a CJK character may or may not. Empty if the table
    cannot spell the word. Character 0 is the first of the marked spelling, the last node is ``len(word) + 1``.
    """
    text = WORD_START + word.lower()
    ids = table.ids_by_spelling
    arcs = [
        (start, identifier, end)
        for start in range(len(text))
        for end in range(start + 1, min(len(text), start + table.longest_piece) + 1)
        for identifier in ids.get(text[start:end], ())
    ]
    if not word.isascii():
        arcs += [(0, identifier, end) for start, identifier, end in arcs if start == 1]
    forward, backward = {0}, {len(text)}
    for start, _, end in arcs:  # sorted by start, except for the CJK shortcuts, which start at 0 where all begins
        if start in forward:
            forward.add(end)
    for start, _, end in sorted(arcs, key=lambda arc: -arc[2]):
        if end in backward:
            backward.add(start)
    return [(start, identifier, end) for start, identifier, end in arcs if start in forward and end in backward]


class TokenGraph:
    """A word graph spelled in a model's tokens: token arcs between nodes, each belonging to one word arc."""

    def __init__(self, words: WordGraph, table: TokenTable) -> None:
        self.words = words
        lattices = {word: spellings(word, table) for word in sorted({arc.step.word for arc in words.arcs})}
        self.unspellable = tuple(word for word, lattice in lattices.items() if not lattice)
        count = 1 + max((max(arc.source, arc.target) for arc in words.arcs), default=0)
        arcs: list[tuple[int, int, int, int]] = []
        for index, arc in enumerate(words.arcs):
            inner = {0: arc.source, len(arc.step.word) + 1: arc.target}
            for start, token, end in lattices[arc.step.word]:
                for position in (start, end):
                    if position not in inner:
                        inner[position] = count
                        count += 1
                arcs.append((inner[start], token, inner[end], index))
        self.nodes = count
        self.source, self.token, self.target, self.word = np.array(arcs, np.int64).reshape(-1, 4).T
        first = np.zeros(count, bool)
        first[0] = True
        final = np.zeros(count, bool)
        final[list(words.endings)] = True
        self.onward = _Direction(self.source, self.target, self.token, first)
        self.backward = _Direction(self.target, self.source, self.token, final)

    def words_of(self, path: Sequence[int]) -> list[Arc]:
        """Word arcs of a path of token arcs; a word begins with the token that leaves a node of the word graph."""
        arcs = self.words.arcs
        return [arcs[self.word[a]] for a in path if self.source[a] == arcs[self.word[a]].source]


class _Direction:
    """The token arcs as walked in one direction of time, laid out so that a frame costs a handful of array operations.

    ``source`` is where an arc is entered, ``target`` where it arrives. CTC wants a blank between two equal tokens, so
    an arc may not be entered straight from an arc with the same token: those few are computed again without them.
    """

    def __init__(self, source: Ints, target: Ints, token: Ints, starts: NDArray[np.bool_]) -> None:
        self.source, self.token, self.starts = source, token, starts
        self.nodes = len(starts)
        self._order = np.argsort(target, kind="stable")
        self._arrived, self._offsets = np.unique(target[self._order], return_index=True)
        self.arrivals: dict[int, NDArray[np.int64]] = dict(
            zip(self._arrived.tolist(), np.split(self._order, self._offsets[1:]), strict=True)
        )
        self._repeats: list[int] = []
        others: list[NDArray[np.int64]] = []
        nobody = np.array([len(token)])
        for arc, node in enumerate(source.tolist()):
            before = self.arrivals.get(node, nobody[:0])
            different = before[token[before] != token[arc]]
            if different.size < before.size:
                self._repeats.append(arc)
                others.append(different if different.size else nobody)
        self._others = np.concatenate(others) if others else nobody[:0]
        self._others_at = np.cumsum([0, *(len(o) for o in others[:-1])]) if others else nobody[:0]

    def into_nodes(self, per_arc: Floats) -> Floats:
        """[arcs] -> [nodes]: the best arc into each node."""
        best = np.full(self.nodes, IMPOSSIBLE, np.float32)
        if len(per_arc):
            best[self._arrived] = np.maximum.reduceat(per_arc[self._order], self._offsets)
        return best

    def scores(self, emitted: Floats, blank: Floats) -> tuple[Floats, Floats]:
        """Viterbi over the frames: [frames, arcs] best score that emits the arc now, [frames, nodes] that rests now."""
        emitting = np.empty_like(emitted)
        resting = np.empty((len(blank), self.nodes), np.float32)
        score = np.full(emitted.shape[1] + 1, IMPOSSIBLE, np.float32)  # one more: "nobody"
        rest = np.where(self.starts, np.float32(0), IMPOSSIBLE)
        for t in range(len(blank)):
            standing = np.maximum(rest, self.into_nodes(score[:-1]))
            entering = standing[self.source]
            if self._repeats:
                arriving = np.maximum.reduceat(score[self._others], self._others_at)
                entering[self._repeats] = np.maximum(arriving, rest[self.source[self._repeats]])
            score[:-1] = np.maximum(score[:-1], entering) + emitted[t]
            rest = standing + blank[t]
            emitting[t], resting[t] = score[:-1], rest
        return emitting, resting


class GrammarDecoder:
    """Finds the best sentences of one grammar under one model's tokens."""

    def __init__(self, words: WordGraph, table: TokenTable) -> None:
        self._graph = TokenGraph(words, table)

    @property
    def unspellable(self) -> tuple[str, ...]:
        """Words of the grammar that the token table cannot write; sentences with them can never be heard."""
        return self._graph.unspellable

    def match(self, log_posteriors: Floats) -> GrammarMatch | None:
        """The best reading of [frames, vocabulary] log-posteriors; None if no sentence fits into the frames."""
        graph = self._graph
        if not len(log_posteriors) or not len(graph.token):
            return None
        emitted = np.ascontiguousarray(log_posteriors[:, graph.token])
        alignment = _Alignment(graph, emitted, np.ascontiguousarray(log_posteriors[:, BLANK]))
        best = next(alignment.hypotheses(), None)
        if best is None:
            return None
        second = next((h for h in alignment.hypotheses() if h.reading != best.reading), None)
        return GrammarMatch(best, second, float(log_posteriors.max(axis=1).sum()), len(log_posteriors))


class _Alignment:
    """Forward and backward Viterbi scores of one utterance, and the sentences they hold."""

    def __init__(self, graph: TokenGraph, emitted: Floats, blank: Floats) -> None:
        self._graph = graph
        self._last = len(blank) - 1
        self._before = graph.onward.scores(emitted, blank)
        self._after = graph.backward.scores(emitted[::-1], blank[::-1])
        through = self._before[0] + self._after[0][::-1] - emitted
        self._frame = through.argmax(axis=0)
        self._through = through[self._frame, np.arange(through.shape[1])]

    def hypotheses(self) -> Iterator[Hypothesis]:
        """Sentences from best to worse: the best one through each word, at most :data:`RUNNERS_UP` of them."""
        graph = self._graph
        by_word: dict[int, int] = {}
        for arc in np.argsort(-self._through, kind="stable").tolist():
            if self._through[arc] < IMPOSSIBLE / 2 or len(by_word) > RUNNERS_UP:
                return
            if int(graph.word[arc]) in by_word:
                continue
            t = int(self._frame[arc])
            path = self._trace(graph.onward, self._before, t, arc)[::-1]
            path += self._trace(graph.backward, self._after, self._last - t, arc)[1:]
            words = graph.words_of(path)
            by_word.update((int(graph.word[a]), a) for a in path)
            steps = [word.step for word in words]
            for ending in graph.words.endings[words[-1].target]:
                spoken = tuple(step.word for step in steps)
                yield Hypothesis(read(steps, ending), spoken, float(self._through[arc]), len(path))

    @staticmethod
    def _trace(direction: _Direction, scores: tuple[Floats, Floats], t: int, arc: int) -> list[int]:
        """Token arcs of the best path that emits ``arc`` at frame t, latest first."""
        emitting, resting = scores
        nobody = np.zeros(0, np.int64)
        path = [arc]
        node: int | None = None  # set while the path rests in a blank
        for before in range(t - 1, -1, -1):
            at = int(direction.source[arc]) if node is None else node
            candidates = direction.arrivals.get(at, nobody)
            if node is None:
                candidates = candidates[direction.token[candidates] != direction.token[arc]]
            arrived = emitting[before, candidates].max(initial=IMPOSSIBLE)
            rested = resting[before, at]
            stayed = emitting[before, arc] if node is None else IMPOSSIBLE
            if stayed >= max(arrived, rested):
                continue
            if rested >= arrived:
                node = at
                continue
            arc = int(candidates[emitting[before, candidates].argmax()])
            node = None
            path.append(arc)
        return path
