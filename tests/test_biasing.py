"""The decoder against every sentence, every spelling and every alignment, counted out one by one."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_asr import audio, grammar, inference, model_store
from edge_asr.biasing import BEAM, IDLE, INSERTION, UNRANKED, GrammarDecoder, Hypothesis, combined, matched, spellings
from edge_asr.grammar import Grammar, GrammarError, Reading, compile_graph
from edge_asr.numbers import value_of
from edge_asr.posteriors import BLANK, TokenTable, log_softmax
from edge_asr.settings import Model
from edge_asr.wordgraph import Step, WordGraph
from tests.test_wordgraph import language

kaldifst: Any = importlib.import_module("kaldifst")  # no types
kaldi_decoder: Any = importlib.import_module("kaldi_decoder")

Floats = NDArray[np.float32]

PIECES = (
    "<blank>",
    "<unk>",
    "▁",
    "a",
    "b",
    "▁a",
    "▁ab",
    "ba",
    "停",
    "▁停",
    "止",
    "▁one",
    "▁two",
    "hundred",
    "▁eight",
    "y",
    "e",
)
TABLE = TokenTable(PIECES)
EXACT = 2e-4
"""Nats by which float32 sums may differ from float64 ones."""

WELL_WITHIN = float(1 - BEAM)
"""Nats; a sentence that concedes less is never lost to rounding at the edge of the beam."""


# ---------------------------------------------------------------- counted out


def segmentations(text: str) -> Iterator[tuple[int, ...]]:
    """Every way to write a text in pieces."""
    if not text:
        yield ()
    for token, piece in enumerate(PIECES):
        if token != BLANK and not piece.startswith("<") and text.startswith(piece):
            yield from ((token, *rest) for rest in segmentations(text[len(piece) :]))


@functools.cache
def written(words: tuple[str, ...]) -> frozenset[tuple[int, ...]]:
    """Every way to write a sentence; no space need stand before a character of the East."""
    if not words:
        return frozenset({()})
    first = [*segmentations("▁" + words[0]), *(segmentations(words[0]) if not words[0].isascii() else ())]
    return frozenset((*head, *tail) for head in first for tail in written(words[1:]))


def aligned(tokens: Sequence[int], rows: NDArray[np.float64]) -> float:
    """The best CTC alignment (Graves 2006, with max for sum)."""
    labels = [BLANK, *(label for token in tokens for label in (token, BLANK))]
    scores = [0.0, *([-math.inf] * (len(labels) - 1))]
    scores = [rows[0][labels[i]] if i < 2 else -math.inf for i in range(len(labels))]
    for row in rows[1:]:
        before, scores = scores, []
        for i, label in enumerate(labels):
            ways = [before[i], before[i - 1] if i else -math.inf]
            if i > 1 and label not in {BLANK, labels[i - 2]}:
                ways.append(before[i - 2])
            scores.append(max(ways) + row[label])
    return max(scores[-2:])


@dataclass(frozen=True)
class Sentence:
    """One that can be aligned with the frames."""

    score: float
    gap: float
    words: tuple[str, ...]
    reading: Reading
    numbers: tuple[str, ...]
    """Its number words, in number slots and elsewhere."""


def ids_of_letters(steps: Sequence[Step]) -> set[int]:
    """Where one or two letters stand: b anywhere, a where a value or the sentence ends."""
    ends = [*(bool(step.marks) for step in steps[1:]), True]
    kinds = "".join(
        "x" if step.word == "b" or (step.word == "a" and end) else "-" for step, end in zip(steps, ends, strict=True)
    )
    return {place for run in re.finditer("(?<!x)xx?(?!x)", kinds) for place in range(*run.span())}


def every_sentence(graph: WordGraph, rows: Floats) -> list[Sentence]:
    """All within the beam, best first."""
    relative = rows.astype(np.float64) - rows.max(axis=1, keepdims=True)
    found = []
    for steps, ending in language(graph):
        words = tuple(step.word for step in steps)
        ways = [(aligned(tokens, relative), len(tokens)) for tokens in written(words)]
        score, gap = max(((gap + float(INSERTION) * count, gap) for gap, count in ways), default=(-math.inf, -math.inf))
        ids = ids_of_letters(steps)
        numbers = tuple(
            s.word
            for place, s in enumerate(steps)
            if s.number is not None or value_of([s.word], "en") is not None or place in ids
        )
        if gap > -BEAM:
            found.append(Sentence(score, gap, words, grammar.read(steps, ending), numbers))
    return sorted(found, key=lambda each: -each.score)


def assert_sound(hypothesis: Hypothesis, sentences: list[Sentence]) -> None:
    """The hypothesis is a sentence, with its own score, and its parts add up."""
    same = [s for s in sentences if (s.words, s.reading) == (hypothesis.words, hypothesis.reading)]
    assert hypothesis.score == pytest.approx(max(s.score for s in same), abs=EXACT)
    assert hypothesis.said_numbers in {s.numbers for s in same}
    assert len(hypothesis.word_gaps) == len(hypothesis.word_tokens) == len(hypothesis.words)
    assert sum(hypothesis.word_gaps) == pytest.approx(hypothesis.gap, abs=EXACT)
    assert max(hypothesis.word_gaps) < EXACT
    assert hypothesis.tokens in {len(tokens) for tokens in written(hypothesis.words)}


def transducer(graph: WordGraph, table: TokenTable) -> Any:
    """The graph under CTC's rules as Kaldi wants it: a state for resting in each node and one for emitting each arc."""
    fst = kaldifst.StdVectorFst()
    resting: dict[object, int] = defaultdict(fst.add_state)
    fst.start = resting[0]
    entering = defaultdict(list)
    tokens = []
    for index, arc in enumerate(graph.arcs):
        places = {0: arc.source, len(arc.step.word) + 1: arc.target}
        for start, token, end in spellings(arc.step.word, table):
            emitting, (source, target) = fst.add_state(), (places.get(place, (index, place)) for place in (start, end))
            entering[resting[source]].append((token, emitting))
            tokens.append((token, emitting, resting[target]))

    def step(source: int, label: int, target: int, weight: float = 0.0) -> None:
        fst.add_arc(source, kaldifst.StdArc(ilabel=label + 1, olabel=0, weight=weight, nextstate=target))

    finals = {resting[node] for node in graph.endings}
    for node in resting.values():
        step(node, BLANK, node)
        for token, emitting in entering[node]:
            step(node, token, emitting, -float(INSERTION))
    for token, emitting, target in tokens:
        step(emitting, token, emitting)
        step(emitting, BLANK, target)
        for other, following in entering[target]:
            if other != token:
                step(emitting, other, following, -float(INSERTION))
    for state in [*finals, *(emitting for _, emitting, target in tokens if target in finals)]:
        fst.set_final(state, 0.0)
    return fst


def kaldi_score(fst: Any, rows: Floats) -> float | None:
    """The best sentence's score by Kaldi's decoder."""
    decoder = kaldi_decoder.FasterDecoder(fst, kaldi_decoder.FasterDecoderOptions(beam=1000.0))
    decoder.decode(kaldi_decoder.DecodableCtc(np.ascontiguousarray(rows)))
    if not decoder.reached_final():
        return None
    *_, weight = kaldifst.get_linear_symbol_sequence(decoder.get_best_path()[1])
    return float(-(weight.value1 + weight.value2) - rows.max(axis=1).sum(dtype=np.float64))


# ---------------------------------------------------------------- laws

# Number words stand only where they mean something: that is when another number is another meaning.
SLOTS = {
    "n": {"range": [80, 200], "step": 40},
    "v": {"values": [{"x": ["a", "b a"]}, {"y": ["ab", "停 b"]}]},
    "w": {"values": [{"w1": "a one"}, {"w2": ["a two", "two 停"]}]},
}
WORDS = st.sampled_from(["a", "b", "ab", "bab", "停", "停止", "{v}", "{n}", "{w}"])
TEMPLATES = st.recursive(
    WORDS,
    lambda below: st.one_of(
        st.tuples(below, below).map(" ".join),
        st.tuples(below, below).map(lambda pair: f"({' | '.join(pair)})"),
        st.tuples(below, below).map(lambda pair: f"[{pair[0]}] {pair[1]}"),
    ),
    max_leaves=5,
)


def graph_of(*sentences: str) -> WordGraph:
    """One intent per sentence, so that each has a meaning of its own."""
    intents = {f"Intent{i}": {"sentences": [sentence]} for i, sentence in enumerate(sentences)}
    tree = {"language": "en", "intents": intents, "slots": SLOTS}
    return compile_graph({"tiny": Grammar.model_validate(tree)}).words


@st.composite
def graphs(draw: st.DrawFn) -> WordGraph:
    sentences = draw(st.lists(TEMPLATES, min_size=1, max_size=3))
    try:
        return graph_of(*sentences)
    except GrammarError:  # a slot twice
        return graph_of(*(sentence.replace("{", "").replace("}", "") for sentence in sentences))


@st.composite
def log_posteriors(draw: st.DrawFn, frames: tuple[int, int] = (1, 7)) -> Floats:
    """Noise from a seed, and a few tokens that stand out; no blank is as sure of itself as an idle frame's."""
    count = draw(st.integers(*frames))
    spread = draw(st.sampled_from([0.0, 0.5, 2.0]))
    logits = np.random.default_rng(draw(st.integers(0, 2**32))).normal(0, spread, (count, len(PIECES)))
    for row in logits:
        for token in draw(st.lists(st.integers(0, len(PIECES) - 1), max_size=2)):
            row[token] += 4
    rows = log_softmax(logits.astype(np.float32))
    return np.minimum(rows, np.float32(2 * IDLE))


@settings(max_examples=300)
@given(graphs(), log_posteriors())
def test_the_best_reading_the_second_and_the_other_number_are_exact(graph: WordGraph, rows: Floats) -> None:
    match = GrammarDecoder(graph, TABLE).match(rows)
    sentences = every_sentence(graph, rows)
    if match is None:
        assert not sentences
        return
    if not sentences or sentences[0].gap < WELL_WITHIN:
        return  # what is at the edge of the beam may be overlooked
    assert_sound(match.best, sentences)
    assert match.best.score == pytest.approx(sentences[0].score, abs=EXACT)
    others = [each for each in sentences if each.reading != match.best.reading]
    renumbered = [each for each in others if each.numbers != match.best.said_numbers]
    for found, expected in ((match.second, others), (match.other_number, renumbered if match.best.numerals else [])):
        if expected and expected[0].gap > WELL_WITHIN:
            assert found is not None
            assert_sound(found, sentences)
            assert found.score == pytest.approx(expected[0].score, abs=EXACT)
        elif found is not None:
            assert expected or found.gap < WELL_WITHIN


@settings(max_examples=150)
@given(graphs(), log_posteriors())
def test_the_best_score_is_kaldis(graph: WordGraph, rows: Floats) -> None:
    match = GrammarDecoder(graph, TABLE).match(rows)
    theirs = kaldi_score(transducer(graph, TABLE), rows)
    if match is None:
        assert theirs is None or theirs < WELL_WITHIN + 7
    elif match.best.gap > WELL_WITHIN:
        assert match.best.score == pytest.approx(theirs, abs=EXACT)


@settings(max_examples=150)
@given(graphs(), log_posteriors(), st.data())
def test_skipping_idle_frames_changes_nothing_for_whoever_says_nothing_in_them(
    graph: WordGraph, rows: Floats, data: st.DataObject
) -> None:
    idle = log_softmax(np.where(np.arange(len(PIECES)) == BLANK, np.float32(12), np.float32(0))[None])
    runs = data.draw(st.lists(st.integers(0, 3), min_size=len(rows) + 1, max_size=len(rows) + 1))
    pieces = [*itertools.chain(*([idle] * n + [row[None]] for n, row in zip(runs, rows, strict=False)))]
    padded = np.concatenate([*pieces, *[idle] * runs[-1]])
    match = GrammarDecoder(graph, TABLE).match(padded)
    theirs = kaldi_score(transducer(graph, TABLE), padded)
    if match is None or match.best.gap < -9:  # a token in an idle frame concedes 12
        assert theirs is None or theirs < -9 + float(INSERTION) * 12
    else:
        assert match.best.score == pytest.approx(theirs, abs=1e-3 * len(padded))


@given(st.text(alphabet="ab停止", min_size=1, max_size=5))
def test_spellings_are_all_segmentations_of_a_word_and_dead_ends_none(word: str) -> None:
    following = defaultdict(list)
    for start, token, end in spellings(word, TABLE):
        following[start].append((token, end))

    def paths(place: int) -> Iterator[tuple[int, ...]]:
        if place == len(word) + 1:
            yield ()
        for token, end in following[place]:
            ways = [(token, *rest) for rest in paths(end)]
            assert ways
            yield from ways

    found = list(paths(0))
    assert len(set(found)) == len(found)
    assert frozenset(found) == written((word,))


# ---------------------------------------------------------------- examples


def said(*tokens: int, certainty: float = 9.0) -> Floats:
    """One frame per token, all but certain."""
    logits = np.zeros((len(tokens), len(PIECES)), np.float32)
    logits[np.arange(len(tokens)), list(tokens)] = certainty
    return np.minimum(log_softmax(logits), np.float32(2 * IDLE))


def test_a_beginning_of_the_best_sentence_is_its_rival() -> None:
    rows = said(PIECES.index("▁a"), PIECES.index("▁"), PIECES.index("b"))
    rows[1:] = log_softmax(np.zeros((2, len(PIECES)), np.float32))  # "b", or a cough
    match = GrammarDecoder(graph_of("a", "a b"), TABLE).match(rows)
    assert match is not None
    assert match.second is not None
    assert (match.best.words, match.second.words) == (("a", "b"), ("a",))
    assert match.best.score - match.second.score == pytest.approx(2 * INSERTION, abs=EXACT)


def test_equal_tokens_in_a_row_need_a_blank_between_them() -> None:
    a = PIECES.index("▁a")
    decoder = GrammarDecoder(graph_of("a a"), TABLE)
    without, between = decoder.match(said(a, a)), decoder.match(said(a, BLANK, a))
    assert between is not None
    assert between.best.gap == pytest.approx(0, abs=1e-2)
    assert without is None or without.best.gap < -8


def test_one_token_through_all_frames_is_a_word() -> None:
    b = PIECES.index("b")
    match = GrammarDecoder(graph_of("b"), TABLE).match(said(PIECES.index("▁"), b, b))
    assert match is not None
    alone = GrammarDecoder(graph_of("a"), TABLE).match(said(*[PIECES.index("▁a")] * 3))
    assert alone is not None
    assert (alone.best.words, alone.best.word_tokens, alone.second) == (("a",), (1,), None)


def test_words_that_the_table_cannot_write_are_named_and_their_sentences_never_heard() -> None:
    decoder = GrammarDecoder(graph_of("quit", "a", "a Zebra"), TABLE)
    assert decoder.unspellable == ("quit", "zebra")
    match = decoder.match(said(PIECES.index("▁a")))
    assert match is not None
    assert match.best.words == ("a",)
    assert GrammarDecoder(graph_of("quit"), TABLE).match(said(3)) is None


def test_a_word_with_an_accent_in_it_needs_all_its_letters() -> None:
    table = TokenTable(("<blank>", "caf", "é"))
    assert spellings("café", table) == [(0, 1, 4), (4, 2, 5)]
    assert spellings("caffè", table) == []


def test_audio_in_which_nothing_happens_is_no_sentence() -> None:
    decoder = GrammarDecoder(graph_of("a", "b"), TABLE)
    assert decoder.match(np.zeros((0, len(PIECES)), np.float32)) is None
    silence = log_softmax(np.where(np.arange(len(PIECES)) == BLANK, np.float32(20), np.float32(0))[None].repeat(50, 0))
    assert decoder.match(silence) is None


def test_a_sentence_that_concedes_more_than_the_beam_is_not_looked_at() -> None:
    decoder = GrammarDecoder(graph_of("a b"), TABLE)
    assert decoder.match(said(*[PIECES.index("停")] * 12, certainty=20.0)) is None


def test_equal_sentences_with_two_meanings_rival_each_other_at_no_distance() -> None:
    match = GrammarDecoder(graph_of("a b", "[b] a b"), TABLE).match(said(PIECES.index("▁a"), 2, PIECES.index("b")))
    assert match is not None
    assert match.second is not None
    assert match.second.score == match.best.score
    assert {match.best.reading.intent, match.second.reading.intent} == {"Intent0", "Intent1"}


def test_a_real_grammar_on_real_recordings_scores_as_kaldi_does() -> None:
    recognizer = inference.OnnxRecognizer(model_store.locate("micro-en"), Model())
    factory = grammar.load(model_store.bundled("grammars") / "factory.en.yaml")
    few = {name: factory.intents[name] for name in ("StartMachine", "StopMachine", "EmergencyStop", "CallMaintenance")}
    graph = compile_graph({"factory": factory.model_copy(update={"intents": few})}).words
    decoder, fst = GrammarDecoder(graph, recognizer.table), transducer(graph, recognizer.table)
    for name in ("01-start-line-three", "02-call-maintenance", "20-emergency-stop"):
        heard = recognizer.recognize(audio.read_file(model_store.bundled("recordings") / f"{name}.flac"))
        assert heard.log_posteriors is not None
        match = decoder.match(heard.log_posteriors)
        assert match is not None
        assert match.best.score == pytest.approx(kaldi_score(fst, heard.log_posteriors), abs=0.02)


# ---------------------------------------------------------------- several listenings


@given(graphs(), log_posteriors())
def test_a_ranking_holds_every_meaning_once_and_begins_with_the_match(graph: WordGraph, rows: Floats) -> None:
    decoder = GrammarDecoder(graph, TABLE)
    match, ranking = decoder.match(rows), decoder.ranking(rows)
    assert len({hypothesis.reading for hypothesis in ranking}) == len(ranking)
    assert (matched(ranking) is None) == (match is None)
    if match is not None:
        assert ranking[0] == match.best
        assert (ranking[1] if len(ranking) > 1 else None) == match.second
        assert combined([ranking]) == sorted(ranking, key=lambda hypothesis: -hypothesis.score)


@given(graphs(), log_posteriors(), log_posteriors())
def test_listening_twice_averages_what_each_meaning_concedes(graph: WordGraph, once: Floats, again: Floats) -> None:
    decoder = GrammarDecoder(graph, TABLE)
    rankings = [decoder.ranking(once), decoder.ranking(again)]
    gaps = [{hypothesis.reading: hypothesis.gap for hypothesis in ranking} for ranking in rankings]
    together = combined(rankings)
    assert {hypothesis.reading for hypothesis in together} == {*gaps[0], *gaps[1]}
    assert [h.score for h in together] == sorted((h.score for h in together), reverse=True)
    for hypothesis in together:
        if all(hypothesis.reading in each for each in gaps):
            assert hypothesis.gap == pytest.approx(sum(each[hypothesis.reading] for each in gaps) / 2)
        elif all(gaps):
            worst = [min(h.score for h in ranking) - UNRANKED for ranking in rankings]
            lone = next(i for i, each in enumerate(gaps) if hypothesis.reading in each)
            expected = gaps[lone][hypothesis.reading] + worst[1 - lone] - float(INSERTION) * hypothesis.tokens
            assert hypothesis.gap == pytest.approx(expected / 2)
