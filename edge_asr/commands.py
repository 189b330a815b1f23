"""Decides what an utterance commands: an intent with typed slots, a rejection with its reason, or nothing at all.

Law: nothing becomes a command unless one sentence of the grammar explains the audio almost as well as the model's free
text does (else ``not-understood``), and better than any sentence with another meaning (else ``ambiguous``). A command's
confidence is the probability of both: P(a command was said) times P(it was this one rather than the second), and only
above the intent's ``min_confidence`` it is accepted. In doubt the audio is listened to again, slower. Number words
stand apart: every listening must hear each as if no grammar had been there, the text that is published beside the
command must hold them, and no sentence with another number may come near (else ``unsafe-number``).
Without posteriors (sherpa-onnx) the words of the text must be a sentence of the grammar, see ``text_matching``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from edge_asr import grammar, settings
from edge_asr.biasing import GrammarDecoder, GrammarMatch, Hypothesis, combined, matched
from edge_asr.events import Command, Rejection
from edge_asr.grammar import CommandGraph, Expectation, Reading, words_of
from edge_asr.posteriors import Recognition, TokenTable, foreign
from edge_asr.text_matching import TextMatcher

NO_SPEECH = "nospeech"
"""The language tag of audio in which nobody speaks."""

TOO_NOISY_DB = 12.0
"""Below, it is the noise that is to blame when nothing is understood; of real commands in kitchen noise at 6 dB by the
benchmark's measure one in thirty lies below by ours. What is understood all the same is no worse for it."""

CREDIT = 0.25
"""Share of the information in its tokens that a sentence may concede to the free path: a token is one of V and worth
ln V nats, and free text pays for each, which a sentence of the grammar does not. So long sentences stand more noise."""

DOUBT = 3.0
"""Nats of that which are due in any case: the odds against a command before anything was heard."""

SLACK = 0.3
"""Nats that even the shortest sentence may concede."""

TEMPERATURE = 2.0
"""Frames of CTC are not independent, so nats overstate: dividing by this makes confidences match frequencies."""

MAX_NUMERAL_GAP = 1.0
"""Nats a number word may concede to the free path: beyond, something else was heard in its place."""

MIN_NUMBER_MARGIN = 2.0
"""Nats by which the best sentence must beat the best one with another number, at every pace: e^2 = 7 times as likely.
What still passes as wrong, 2 of 800 in noise (docs/accuracy.md), passes with 3 as well."""

PACES = (1 / 1.1, 1 / 1.2)
"""Paces at which doubtful audio is listened to again; the scores of all listenings are averaged. What noise spoils at
one pace it often spares at another: at 6 dB that mends a third of the wrong readings. And a model that is surely wrong
about a number seldom is at every pace: of 343 spoken numbers 5 passed as wrong at their own, none at all three."""

SURE = 0.98
"""A confidence above which one listening is enough, unless numbers are said."""

HOPELESS = -20.0
"""Nats of evidence below which no other listening helps."""


class Interpreter:
    """One site's grammars under one model's tokens."""

    def __init__(
        self, graph: CommandGraph, table: TokenTable, options: settings.Commands, languages: Sequence[str] = ()
    ) -> None:
        """``languages`` are those spoken at the site; empty: all."""
        self._languages = languages
        self._graph = graph
        self._options = options
        self._decoder = GrammarDecoder(graph.words, table)
        self._texts = TextMatcher(graph)
        self._vocabulary = len(table)

    @property
    def unspellable(self) -> tuple[str, ...]:
        """Words of the grammars that the model cannot write."""
        return self._decoder.unspellable

    def interpret(self, recognition: Recognition) -> Command | Rejection:
        """The command in one utterance, or why there is none."""
        transcript = recognition.transcript
        if not transcript.text or transcript.language == NO_SPEECH:
            return Rejection("no-speech", f"the model heard no words ({transcript.event})")
        if foreign(transcript, self._languages):
            return Rejection("language", f"heard {transcript.text!r} in {transcript.language!r}, not spoken here")
        decision = self._understood(recognition)
        cancels = isinstance(decision, Command) and decision.cancels
        if transcript.event in self._options.refuse_events and not cancels:
            return Rejection("no-speech", f"heard {transcript.text!r} in what the model calls {transcript.event}")
        snr_db = recognition.signal_to_noise_db
        if isinstance(decision, Command) or decision.reason != "not-understood":
            return decision
        if snr_db is None or snr_db >= TOO_NOISY_DB:
            return decision
        detail = f"{decision.detail}; the signal is {snr_db:.0f} dB above the noise"
        return replace(decision, reason="too-noisy", detail=detail)

    def _understood(self, recognition: Recognition) -> Command | Rejection:
        if recognition.log_posteriors is None:
            return self._from_text(recognition.transcript.text)
        match = self._decoder.match(recognition.log_posteriors)
        if match is None:
            return Rejection("not-understood", f"heard {recognition.transcript.text!r}, no command")
        again: Sequence[GrammarMatch | None] = ()
        if recognition.at_pace is not None and self._is_worth_listening_again(match):
            heard = [recognition.log_posteriors, *map(recognition.at_pace, PACES)]
            rankings = [self._decoder.ranking(log_posteriors) for log_posteriors in heard]
            match = matched(combined(rankings)) or match
            again = [matched(ranking) for ranking in rankings]
        return self._decide(match, again, recognition.transcript.text)

    def _decide(self, match: GrammarMatch, again: Sequence[GrammarMatch | None], heard: str) -> Command | Rejection:
        best = match.best
        is_command = _probability(self._evidence(best))
        confidence = is_command * _probability(_margin(match))
        candidates = tuple(str(h.reading) for h in (best, match.second) if h is not None)
        if is_command < self._threshold(best.reading):
            return Rejection("not-understood", f"heard {heard!r}, no command", confidence, candidates[:1])
        if confidence < self._threshold(best.reading):
            return Rejection("ambiguous", " or ".join(candidates), confidence, candidates)
        if not (_stand_in(heard, best) and all(_is_sure_of_numbers(best, each) for each in (match, *again))):
            return Rejection("unsafe-number", f"heard {heard!r}, no clear number", confidence, candidates)
        return self._command(best.reading, confidence, " ".join(best.words))

    def _evidence(self, best: Hypothesis) -> float:
        """Nats for a command having been said at all."""
        return best.gap + _leave(best.tokens, self._vocabulary)

    def _is_worth_listening_again(self, match: GrammarMatch) -> bool:
        evidence = self._evidence(match.best)
        if evidence < HOPELESS:
            return False
        return bool(match.best.numerals) or _probability(evidence) * _probability(_margin(match)) < SURE

    def _from_text(self, text: str) -> Command | Rejection:
        understood = self._texts.understood(text)
        if not understood:
            return Rejection("not-understood", f"heard {text!r}, no command")
        candidates = tuple(str(reading) for reading, _ in understood)
        if len(understood) > 1:
            return Rejection("ambiguous", " or ".join(candidates), 0.0, candidates)
        [(reading, confidence)] = understood
        if confidence < self._threshold(reading):
            return Rejection("not-understood", f"heard {text!r}, no command", confidence, candidates)
        return self._command(reading, confidence, " ".join(words_of(text)))

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
            stations=intent.stations,
            roles=intent.roles,
        )


def surest(tokens: int, vocabulary: int) -> float:
    """The confidence of a sentence of so many tokens that is heard as clearly as can be."""
    return _probability(_leave(tokens, vocabulary))


def _leave(tokens: int, vocabulary: int) -> float:
    """Nats that a sentence may concede to the free path before it is as likely none."""
    return max(CREDIT * math.log(vocabulary) * tokens - DOUBT, SLACK)


def _margin(match: GrammarMatch) -> float:
    """Nats between the best sentence and the best one with another meaning."""
    return math.inf if match.second is None else match.best.score - match.second.score


def _is_sure_of_numbers(said: Hypothesis, heard: GrammarMatch | None) -> bool:
    """Whether one listening heard the number words that were said, each clearly, and no other number near."""
    if not said.numerals:
        return True
    if heard is None or heard.best.said_numbers != said.said_numbers:
        return False
    if any(heard.best.word_gaps[i] < -MAX_NUMERAL_GAP for i in heard.best.numerals):
        return False
    return heard.other_number is None or heard.best.score - heard.other_number.score >= MIN_NUMBER_MARGIN


def _stand_in(text: str, said: Hypothesis) -> bool:
    """Whether a text holds the number words of a sentence, in their order.

    Letters of ids it may write as part of a word. A text with digits, by inverse text normalisation or by hotwords, is
    not compared.
    """
    if re.search(r"\d", text):
        return True
    words = iter(words_of(text))
    numbers = (word for word in said.said_numbers if not re.fullmatch("[a-z]", word))
    return all(number in words for number in numbers)


def _probability(nats: float) -> float:
    """The logistic function of tempered log odds."""
    return 1 / (1 + math.exp(min(-nats / TEMPERATURE, 700.0)))


def load_graph(paths: Sequence[Path]) -> CommandGraph:
    """Read and compile grammar files. Raises GrammarError, one line per problem."""
    return grammar.compile_graph({str(path): grammar.load(path) for path in paths})


def failed_expectations(graph: CommandGraph, tests: Sequence[Expectation]) -> Mapping[str, str]:
    """The ``tests`` of a grammar that do not hold: sentence -> what was read instead."""
    matcher = TextMatcher(graph)
    failed: dict[str, str] = {}
    for test in tests:
        readings = [reading for reading, _ in matcher.understood(test.say)]
        wanted = [(test.intent, dict(test.slots))] if test.intent is not None else []
        if [(r.intent, dict(r.slots)) for r in readings] != wanted:
            failed[test.say] = " or ".join(map(str, readings)) or "no command"
    return failed
