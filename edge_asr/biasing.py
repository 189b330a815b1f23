"""Scores a grammar against a model's posteriors: which sentence of the word graph was said, and how sure is that.

Law: everything is a CTC Viterbi score in nats, relative to the free path, which is the best alignment of anything at
all. A sentence's gap is what its best alignment, over any spelling the token table allows, concedes to the free path:
never positive. Sentences compete by their score, the gap plus :data:`INSERTION` per token. The second reading is exact
too: from the backward pass every word and every ending has the score of the best sentence through it (its
max-marginal), so the best sentence with another meaning is found, not guessed.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edge_asr.grammar import Reading, read
from edge_asr.numbers import Language, value_of
from edge_asr.posteriors import BLANK, WORD_START, TokenTable
from edge_asr.wordgraph import Step, WordGraph

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

IMPOSSIBLE = np.float32(-1e30)
"""Stands for log 0: adding to it never overflows, unlike -inf it never makes a NaN."""

BEAM = np.float32(40.0)
"""Nats a sentence may fall behind the free path and still be looked at; none that concedes so much is accepted."""

INSERTION = np.float32(0.6)
"""Nats that a token is worth by itself. Noise hides words rather than adding them, so a CTC model in noise leaves words
out ("with milk" for "with skim milk"); the field's remedy is a bonus per token. 0.4 to 0.8 measure the same."""

IDLE = -0.001
"""Log-posterior of the blank above which a frame that follows another such frame says nothing and is skipped."""

UNRANKED = 2.0
"""Nats below the last ranked sentence at which one counts that was not ranked."""

RUNNERS_UP = 24
"""Words and endings tried, best first, in search of a second meaning; beyond that the margin is wide anyway."""


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One complete sentence of the grammar, aligned with the audio."""

    reading: Reading
    words: tuple[str, ...]
    gap: float
    """What the sentence concedes to the free path, in nats; 0 if it is the free path, else negative."""
    word_gaps: tuple[float, ...]
    """The same per word, from its first frame to the next word's; they sum up to ``gap``."""
    word_tokens: tuple[int, ...]
    """Tokens per word."""
    numerals: tuple[int, ...] = ()
    """Which of the words are number words or letters of ids, also within names ("line three", "pump D")."""

    @property
    def said_numbers(self) -> tuple[str, ...]:
        """The number words and letters of ids."""
        return tuple(self.words[i] for i in self.numerals)

    @property
    def tokens(self) -> int:
        """Tokens of the sentence."""
        return sum(self.word_tokens)

    @property
    def score(self) -> float:
        """By which sentences compete, in nats."""
        return self.gap + float(INSERTION) * self.tokens


@dataclass(frozen=True, slots=True)
class GrammarMatch:
    """The best sentence, the best one with another meaning, and the best one with another meaning and number."""

    best: Hypothesis
    second: Hypothesis | None
    other_number: Hypothesis | None = None
    """None if the best sentence holds no number word, or none with another number is anywhere near."""


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
        arcs = [(0, identifier, end) for start, identifier, end in arcs if start == 1] + arcs
    forward, backward = {0}, {len(text)}
    for start, _, end in arcs:  # sorted by start
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
        self.source, self.token, self.target, self.word = np.array(arcs, np.int64).reshape(-1, 4).T.copy()
        self._by_source = np.argsort(self.source, kind="stable")
        self._bounds = np.searchsorted(self.source[self._by_source], np.arange(count + 1))

    def plausible(self, log_posteriors: Floats) -> _Lattice | None:
        """The arcs of every sentence that concedes at most :data:`BEAM` nats to the free path; None without any."""
        keep = np.flatnonzero(self._reached(log_posteriors))
        keep = keep[_connected(self.source[keep], self.target[keep], self.nodes, [0], list(self.words.endings))]
        return _Lattice(self, keep) if len(keep) else None

    def _reached(self, log_posteriors: Floats) -> NDArray[np.bool_]:
        """Which arcs a forward beam search enters.

        It overlooks the blank between equal tokens, so it reaches more than the exact passes that follow, never less.
        """
        reached = np.zeros(len(self.token), bool)
        score = np.full(len(self.token), IMPOSSIBLE, np.float32)
        rest = np.full(self.nodes, IMPOSSIBLE, np.float32)
        rest[0] = 0.0
        arcs, nodes = np.zeros(0, np.int64), np.zeros(1, np.int64)
        for frame, free in zip(log_posteriors, log_posteriors.max(axis=1), strict=True):
            entered = self.target[arcs]
            np.maximum.at(rest, entered, score[arcs])  # now: standing at the node, ready for the next token
            nodes = _united(nodes, entered)
            arcs = _united(arcs, self._leaving(nodes))
            # Scores are kept relative to the free path: 0 is its own.
            emitting = np.maximum(score[arcs], rest[self.source[arcs]]) + (frame[self.token[arcs]] - free)
            lost = emitting < -BEAM
            emitting[lost] = IMPOSSIBLE
            score[arcs], arcs = emitting, arcs[~lost]
            resting = rest[nodes] + (frame[BLANK] - free)
            lost = resting < -BEAM
            resting[lost] = IMPOSSIBLE
            rest[nodes], nodes = resting, nodes[~lost]
            reached[arcs] = True
        return reached

    def _leaving(self, nodes: Ints) -> Ints:
        """All arcs out of some nodes."""
        first, count = self._bounds[nodes], np.diff(self._bounds)[nodes]
        ends = np.cumsum(count)
        places = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - count, count) + np.repeat(first, count)
        leaving: Ints = self._by_source[places]
        return leaving


def _united(some: Ints, more: Ints) -> Ints:
    """What is in either, sorted, each once; numpy's own takes three times as long on arrays as short as these."""
    both: Ints = np.concatenate([some, more])
    both.sort()
    first = np.ones(len(both), bool)
    np.not_equal(both[1:], both[:-1], out=first[1:])
    return both[first]


def _connected(
    source: Ints, target: Ints, nodes: int, starts: Sequence[int], finals: Sequence[int]
) -> NDArray[np.bool_]:
    """Which arcs of an acyclic graph lie on a path from a start to a final node."""

    def reached(enter: Ints, leave: Ints, seeds: Sequence[int]) -> NDArray[np.bool_]:
        found = np.zeros(nodes, bool)
        found[list(seeds)] = True
        count = 0
        while count < (count := int(found.sum())):
            found[leave[found[enter]]] = True
        return found

    return reached(source, target, starts)[source] & reached(target, source, finals)[target]


class _Lattice:
    """The part of a token graph that one utterance can be, with nodes numbered anew, in both directions of time."""

    def __init__(self, graph: TokenGraph, arcs: Ints) -> None:
        self.words = graph.words
        nodes, numbered = np.unique(np.concatenate([graph.source[arcs], graph.target[arcs]]), return_inverse=True)
        source, target = np.split(numbered, 2)
        self.token, self.word = graph.token[arcs], graph.word[arcs]
        self.begins_word = graph.source[arcs] == np.array([arc.source for arc in graph.words.arcs])[self.word]
        self.onward = _Direction(source, target, self.token, nodes == 0)
        self.backward = _Direction(target, source, self.token, np.isin(nodes, list(graph.words.endings)))


class _Direction:
    """The token arcs as walked in one direction of time, laid out so that a frame costs a handful of array operations.

    ``source`` is where an arc is entered, ``target`` where it arrives. CTC wants a blank between two equal tokens, so
    an arc may not be entered straight from an arc with the same token: those few are computed again without them.
    """

    def __init__(self, source: Ints, target: Ints, token: Ints, starts: NDArray[np.bool_]) -> None:
        self.source, self.target, self.token, self.starts = source, target, token, starts
        self._order = np.argsort(target, kind="stable")
        self._arrived, self._offsets = np.unique(target[self._order], return_index=True)
        self._bounds = np.searchsorted(target[self._order], np.arange(len(starts) + 1))
        width = int(token.max(initial=0)) + 1
        follows_itself = np.isin(source * width + token, target * width + token)
        self._repeats = np.flatnonzero(follows_itself)
        nobody = np.array([len(token)])
        others = [self.arrivals(int(source[arc]), but=int(token[arc])) for arc in self._repeats]
        others = [arcs if len(arcs) else nobody for arcs in others]
        self._others = np.concatenate(others) if others else nobody
        self._others_at = np.cumsum([0, *map(len, others[:-1])])

    def arrivals(self, node: int, but: int = -1) -> Ints:
        """Arcs into a node, except those with the token ``but``."""
        arcs: Ints = self._order[self._bounds[node] : self._bounds[node + 1]]
        kept: Ints = arcs[self.token[arcs] != but]
        return kept

    def scores(self, emitted: Floats, blank: Floats) -> tuple[Floats, Floats]:
        """Viterbi over the frames: [frames, arcs] best score that emits the arc now, [frames, nodes] that rests now."""
        emitting = np.empty_like(emitted)
        resting = np.empty((len(blank), len(self.starts)), np.float32)
        score = np.full(emitted.shape[1] + 1, IMPOSSIBLE, np.float32)  # one more: "nobody"
        rest = np.where(self.starts, np.float32(0), IMPOSSIBLE)
        for t in range(len(blank)):
            standing = rest.copy()
            best = np.maximum.reduceat(score[self._order], self._offsets)
            standing[self._arrived] = np.maximum(standing[self._arrived], best)
            entering = standing[self.source]
            if len(self._repeats):
                arriving = np.maximum.reduceat(score[self._others], self._others_at)
                entering[self._repeats] = np.maximum(arriving, rest[self.source[self._repeats]])
            np.maximum(score[:-1], entering + INSERTION, out=score[:-1])
            score[:-1] += emitted[t]
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
        """The best reading of [frames, vocabulary] log-posteriors; None if no sentence is anywhere near them."""
        return matched(self._hypotheses(log_posteriors))

    def ranking(self, log_posteriors: Floats) -> list[Hypothesis]:
        """The best sentence of each meaning, best first; only those that are best through some word."""
        best: dict[Reading, Hypothesis] = {}
        for hypothesis in self._hypotheses(log_posteriors):
            best.setdefault(hypothesis.reading, hypothesis)
        return list(best.values())

    def _hypotheses(self, log_posteriors: Floats) -> Iterator[Hypothesis]:
        blank = log_posteriors[:, BLANK] > IDLE
        log_posteriors = log_posteriors[~(blank & np.roll(blank, 1))]
        lattice = self._graph.plausible(log_posteriors) if len(log_posteriors) else None
        if lattice is not None:
            yield from _Alignment(lattice, log_posteriors).hypotheses()


def matched(hypotheses: Iterable[Hypothesis]) -> GrammarMatch | None:
    """Sort out hypotheses that come best first; takes no more of them than it needs."""
    ordered = iter(hypotheses)
    best = next(ordered, None)
    if best is None:
        return None
    others = (h for h in ordered if h.reading != best.reading)
    second = next(others, None)
    if second is None or not best.numerals:
        return GrammarMatch(best, second)
    renumbered = (h for h in itertools.chain([second], others) if h.said_numbers != best.said_numbers)
    return GrammarMatch(best, second, next(renumbered, None))


def combined(rankings: Sequence[Sequence[Hypothesis]]) -> list[Hypothesis]:
    """One ranking of several listenings to the same audio: gaps are averaged, the rest is as first heard.

    A meaning that one listening does not rank counts there as :data:`UNRANKED` below its last.
    """
    first: dict[Reading, Hypothesis] = {}
    total: dict[Reading, float] = defaultdict(float)
    for hypothesis in itertools.chain(*rankings):
        first.setdefault(hypothesis.reading, hypothesis)
    for ranking in filter(None, rankings):
        heard = {h.reading: h.gap for h in ranking}
        floor = min(h.score for h in ranking) - UNRANKED
        for reading, hypothesis in first.items():
            total[reading] += heard.get(reading, floor - float(INSERTION) * hypothesis.tokens)
    count = sum(map(bool, rankings))
    averaged = [replace(hypothesis, gap=total[reading] / count) for reading, hypothesis in first.items()]
    return sorted(averaged, key=lambda hypothesis: -hypothesis.score)


class _Alignment:
    """Forward and backward Viterbi scores of one utterance, and the sentences they hold."""

    def __init__(self, lattice: _Lattice, log_posteriors: Floats) -> None:
        self._lattice = lattice
        free = log_posteriors.max(axis=1)
        # Relative to the free path: what a frame of a sentence concedes, never positive. Behind the last frame stands
        # a silent one that costs nothing, so that every sentence ends at rest.
        self._emitted = np.vstack(
            [
                log_posteriors[:, lattice.token] - free[:, None],
                np.full((1, len(lattice.token)), IMPOSSIBLE),
            ]
        )
        self._blank = np.append(log_posteriors[:, BLANK] - free, np.float32(0))
        self._last = len(free)
        self._before = lattice.onward.scores(self._emitted, self._blank)
        self._after = lattice.backward.scores(self._emitted[::-1], self._blank[::-1])
        through = self._before[0] + self._after[0][::-1] - self._emitted - INSERTION  # both directions counted the arc
        self._frame = through.argmax(axis=0)
        self._endings = np.flatnonzero(lattice.backward.starts)
        self._through = np.append(through.max(axis=0), self._before[1][-1, self._endings])

    def hypotheses(self) -> Iterator[Hypothesis]:
        """Sentences from best to worse: the best one through each word and ending, the :data:`RUNNERS_UP` best."""
        lattice = self._lattice
        seen: set[tuple[str, int]] = set()
        sentences = 0
        for place in np.argsort(-self._through, kind="stable").tolist():
            if self._through[place] < IMPOSSIBLE / 2 or sentences > RUNNERS_UP:
                return
            ending = None if place < len(lattice.word) else int(self._endings[place - len(lattice.word)])
            if (("word", int(lattice.word[place])) if ending is None else ("ending", ending)) in seen:
                continue
            sentences += 1
            frames = self._frames_through(place) if ending is None else self._frames_to(ending)
            emitted = frames[frames >= 0]
            seen.update(("word", word) for word in lattice.word[emitted].tolist())
            seen.add(("ending", int(lattice.onward.target[emitted[-1]])))
            yield from self._sentences(frames)

    def _frames_through(self, arc: int) -> Ints:
        """The best complete path through an arc: per frame the arc it emits, -1 for a blank."""
        t = int(self._frame[arc])
        before = _trace(self._lattice.onward, self._before, t, arc=arc)
        after = _trace(self._lattice.backward, self._after, self._last - t, arc=arc)
        return np.array(before[::-1] + after[1:])

    def _frames_to(self, ending: int) -> Ints:
        """The best complete path to an ending."""
        return np.array(_trace(self._lattice.onward, self._before, self._last, node=ending)[::-1])

    def _sentences(self, frames: Ints) -> Iterator[Hypothesis]:
        """A path as a sentence; more than one where equal words mean different things."""
        lattice = self._lattice
        conceded = np.where(frames < 0, self._blank, self._emitted[np.arange(len(frames)), frames])
        starts = np.flatnonzero((frames >= 0) & (np.diff(frames, prepend=-1) != 0))
        path = frames[starts]
        begins = lattice.begins_word[path]
        words = [lattice.words.arcs[index] for index in lattice.word[path[begins]]]
        word_frames = np.concatenate([[0], starts[begins][1:]])
        gaps = np.add.reduceat(conceded, word_frames)
        tokens = np.add.reduceat(np.ones(len(path), np.int64), np.flatnonzero(begins))
        steps = [arc.step for arc in words]
        for ending in lattice.words.endings[words[-1].target]:
            reading = read(steps, ending)
            yield Hypothesis(
                reading=reading,
                words=tuple(step.word for step in steps),
                gap=float(conceded.sum()),
                word_gaps=tuple(gaps.tolist()),
                word_tokens=tuple(tokens.tolist()),
                numerals=tuple(_exact(steps, reading.language)),
            )


WORDS_OF_ONE_LETTER = frozenset("aio")
"""Letters that are words as well, unless they end what is said or a slot's value: no article does ("pump A")."""


def _exact(steps: Sequence[Step], language: Language) -> Iterator[int]:
    """Which words must be heard as such: number words, and one or two letters that name something ("pump D").

    Three letters and more are an abbreviation ("R C C B"): together they tell themselves from others as a word does.
    """
    for is_letter, run in itertools.groupby(range(len(steps)), lambda place: _is_letter(steps, place)):
        places = list(run)
        if is_letter and len(places) <= 2:
            yield from places
        else:
            yield from (place for place in places if _is_numeral(steps[place], language))


def _is_letter(steps: Sequence[Step], place: int) -> bool:
    word = steps[place].word
    if not (len(word) == 1 and word.isascii() and word.isalpha()):
        return False
    return word not in WORDS_OF_ONE_LETTER or place == len(steps) - 1 or bool(steps[place + 1].marks)


@functools.lru_cache(maxsize=4096)
def _is_numeral(step: Step, language: Language) -> bool:
    return step.number is not None or value_of([step.word], language) is not None


def _trace(
    direction: _Direction, scores: tuple[Floats, Floats], t: int, *, arc: int = -1, node: int | None = None
) -> list[int]:
    """The best path that emits ``arc``, or rests in ``node``, at frame t: the arc emitted at t, t-1, ... 0 or -1."""
    emitting, resting = scores
    path = [arc]
    for before in range(t - 1, -1, -1):
        at = int(direction.source[arc]) if node is None else node
        candidates = direction.arrivals(at, but=int(direction.token[arc]) if node is None else -1)
        arrived = emitting[before, candidates].max(initial=IMPOSSIBLE)
        rested = resting[before, at]
        stayed = emitting[before, arc]
        if node is None and stayed >= max(arrived, rested) + INSERTION:
            path.append(arc)
        elif rested >= arrived:
            node = at
            path.append(-1)
        else:
            arc = int(candidates[emitting[before, candidates].argmax()])
            node = None
            path.append(arc)
    return path
