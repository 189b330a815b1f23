"""Decides what an utterance commands: an intent with typed slots, a rejection with its reason, or nothing at all.

Law: nothing becomes a command unless one sentence of the grammar explains the audio almost as well as the model's free
text does (else ``not-understood``), and clearly better than any sentence with another meaning (else ``ambiguous``). A
command's confidence is the likelihood it concedes to the free text, per token: exp(gap / tokens).
Without posteriors (sherpa-onnx) the words of the text must be a sentence of the grammar exactly.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from edge_asr import grammar, settings
from edge_asr.biasing import GrammarDecoder
from edge_asr.events import Command, Rejection
from edge_asr.grammar import CommandGraph, Expectation, Reading, words_of
from edge_asr.numbers import respell
from edge_asr.posteriors import Recognition, TokenTable
from edge_asr.wordgraph import Arc, Mark, Step

MIN_MARGIN = 1.5
"""Nats by which the best reading must beat the second: e^1.5 = 4.5 times as likely."""


class Interpreter:
    """One site's grammars under one model's tokens."""

    def __init__(self, graph: CommandGraph, table: TokenTable, options: settings.Commands) -> None:
        self._graph = graph
        self._options = options
        self._decoder = GrammarDecoder(graph.words, table)
        self._texts = TextMatcher(graph)

    @property
    def unspellable(self) -> tuple[str, ...]:
        """Words of the grammars that the model cannot write."""
        return self._decoder.unspellable

    def interpret(self, recognition: Recognition) -> Command | Rejection:
        """The command in one utterance, or why there is none."""
        if not recognition.transcript.text:
            return Rejection("no-speech", f"the model heard no words ({recognition.transcript.event})")
        if recognition.log_posteriors is None:
            return self._from_text(recognition.transcript.text)
        match = self._decoder.match(recognition.log_posteriors)
        if match is None:
            return Rejection("not-understood", "the audio is too short for any sentence of the grammar")
        confidence = math.exp(match.best.gap / sum(match.best.word_tokens))
        if confidence < self._threshold(match.best.reading):
            heard = recognition.transcript.text
            return Rejection("not-understood", f"heard {heard!r}, no command", confidence, (str(match.best.reading),))
        if match.second is not None and match.best.gap - match.second.gap < MIN_MARGIN:
            candidates = (str(match.best.reading), str(match.second.reading))
            return Rejection("ambiguous", f"{candidates[0]} or {candidates[1]}", confidence, candidates)
        return self._command(match.best.reading, confidence, " ".join(match.best.words))

    def _from_text(self, text: str) -> Command | Rejection:
        readings = self._texts.readings(text)
        if not readings:
            return Rejection("not-understood", f"heard {text!r}, no command")
        if len(readings) > 1:
            candidates = tuple(map(str, readings))
            return Rejection("ambiguous", " or ".join(candidates), 0.0, candidates)
        return self._command(readings[0], 1.0, " ".join(words_of(text)))

    def _threshold(self, reading: Reading) -> float:
        own = self._graph.intents[reading.intent, reading.language].min_confidence
        return self._options.min_confidence if own is None else own

    def _command(self, reading: Reading, confidence: float, words: str) -> Command:
        intent = self._graph.intents[reading.intent, reading.language]
        return Command(
            intent=reading.intent,
            slots=dict(reading.slots),
            confidence=confidence,
            risk=intent.risk,
            ttl_s=self._options.ttl_s if intent.ttl_s is None else intent.ttl_s,
            units=dict(reading.units),
            words=words,
            answer=intent.answer,
        )


class TextMatcher:
    """Reads texts, word for word, as sentences of the grammars."""

    def __init__(self, graph: CommandGraph) -> None:
        self._endings = graph.words.endings
        self._next: dict[tuple[int, str], list[Arc]] = defaultdict(list)
        for arc in graph.words.arcs:
            self._next[arc.source, arc.step.word].append(arc)
        self._languages = sorted({language for _, language in graph.intents})

    def readings(self, text: str) -> list[Reading]:
        """Every meaning of a text, with digits in it read as spoken numbers; empty: it is no sentence."""
        found: dict[Reading, None] = {}
        for spelling in dict.fromkeys([text, *(respell(text, language) for language in self._languages)]):
            for steps, marks in self._paths(words_of(spelling)):
                found.setdefault(grammar.read(steps, marks))
        return list(found)

    def _paths(self, words: Sequence[str]) -> list[tuple[tuple[Step, ...], tuple[Mark, ...]]]:
        paths: list[tuple[int, tuple[Step, ...]]] = [(0, ())]
        for word in words:
            paths = [
                (arc.target, (*steps, arc.step)) for node, steps in paths for arc in self._next.get((node, word), ())
            ]
        return [(steps, ending) for node, steps in paths if steps for ending in self._endings.get(node, ())]


def load_graph(paths: Sequence[Path]) -> CommandGraph:
    """Read and compile grammar files. Raises GrammarError, one line per problem."""
    return grammar.compile_graph({str(path): grammar.load(path) for path in paths})


def failed_expectations(graph: CommandGraph, tests: Sequence[Expectation]) -> Mapping[str, str]:
    """The ``tests`` of a grammar that do not hold: sentence -> what was read instead."""
    matcher = TextMatcher(graph)
    failed: dict[str, str] = {}
    for test in tests:
        readings = matcher.readings(test.say)
        wanted = [(test.intent, dict(test.slots))] if test.intent is not None else []
        if [(r.intent, dict(r.slots)) for r in readings] != wanted:
            failed[test.say] = " or ".join(map(str, readings)) or "no command"
    return failed
