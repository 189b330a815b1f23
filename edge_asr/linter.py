"""Looks through a grammar for what will go wrong on the shop floor: words never heard, sound-alikes, double meanings.

Sound is compared by Metaphone for English, by pinyin with tones for Chinese characters (an approximation for
Cantonese), by jamo for Korean, and by the written characters for Japanese; slots with ``match: sound`` as ``phonetics``
compares them.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

import jellyfish
import pypinyin
from rapidfuzz.distance import Levenshtein

from edge_asr import commands, grammar
from edge_asr.biasing import spellings
from edge_asr.grammar import Enumeration, Grammar
from edge_asr.numbers import Language
from edge_asr.phonetics import likeness, name_of
from edge_asr.posteriors import TokenTable
from edge_asr.text_matching import NEAR, TextMatcher

ALIKE = 0.8
"""Similarity of two phrases' sounds from which a noisy hall makes them one (0..1)."""

SHOWN = 12
"""Words named in one remark."""

SAMPLES = 2000
"""Random sentences that are read back in search of a second meaning."""


@dataclass(frozen=True, slots=True)
class Remark:
    """One thing to look at."""

    severity: Literal["error", "warning"]
    text: str


def lint(path: Path, table: TokenTable | None = None) -> Iterator[Remark]:
    """Everything remarkable about one grammar file; ``table``: the model that will hear it. Raises GrammarError."""
    loaded = grammar.load(path)
    graph = commands.load_graph([path])
    for sentence, reading in commands.failed_expectations(graph, loaded.tests).items():
        yield Remark("error", f"test {sentence!r} is read as {reading}")
    if table is not None:
        lost = [word for word in sorted({arc.step.word for arc in graph.words.arcs}) if not spellings(word, table)]
        if lost:
            shown = f"{', '.join(lost[:SHOWN])}{' ...' if len(lost) > SHOWN else ''}"
            yield Remark("error", f"{len(lost)} words are never heard, the model cannot write them: {shown}")
    yield from _overlaps(loaded)
    yield from _sound_alikes(loaded)
    yield from _doubts(graph)
    yield from _unused(loaded)


def sounds(phrase: str, language: Language) -> str:
    """How a phrase sounds, as a string to compare; spaces do not count."""
    words = grammar.words_of(phrase)
    if language == "en":
        return "".join(jellyfish.metaphone(word) for word in words).replace(" ", "")
    if language in {"zh", "yue"}:
        return " ".join(pypinyin.lazy_pinyin("".join(words), style=pypinyin.Style.TONE3))
    return unicodedata.normalize("NFD", "".join(words))


def _phrases(loaded: Grammar) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Per enumerated slot its (value, spoken phrase) pairs."""
    for name, slot in loaded.slots.items():
        if isinstance(slot, Enumeration):
            yield (
                name,
                [
                    (value, phrase)
                    for value, template in slot.phrases()
                    for phrase in grammar.expansions(template, loaded)
                ],
            )


def _overlaps(loaded: Grammar) -> Iterator[Remark]:
    for name, phrases in _phrases(loaded):
        values: dict[str, set[str]] = {}
        for value, phrase in phrases:
            values.setdefault(phrase, set()).add(value)
        for phrase, several in values.items():
            if len(several) > 1:
                yield Remark("error", f"slots.{name}: {phrase!r} means {' and '.join(sorted(several))}")


def _sound_alikes(loaded: Grammar) -> Iterator[Remark]:
    for name, phrases in _phrases(loaded):
        worst: dict[tuple[str, str], tuple[float, str, str]] = {}
        for (value, phrase), (other_value, other) in itertools.combinations(phrases, 2):
            if value == other_value or _differ_in_a_number(phrase, other, loaded.language):
                continue
            alike = _alike(phrase, other, loaded, name)
            if alike and alike > worst.get((value, other_value), (0.0, "", ""))[0]:
                worst[value, other_value] = alike, phrase, other
        for (value, other_value), (alike, phrase, other) in worst.items():
            remark = f"slots.{name}: {phrase!r} ({value}) and {other!r} ({other_value}) sound alike, {alike:.2f}"
            yield Remark("warning", f"{remark}; choose other words for one")


def _alike(phrase: str, other: str, loaded: Grammar, slot: str) -> float:
    """How alike two phrases sound; 0 where they can be told apart. Names by sound as they will be matched."""
    definition = loaded.slots[slot]
    if isinstance(definition, Enumeration) and definition.match == "sound":
        ids = grammar.ids_of(loaded)
        here, there = (name_of(grammar.words_of(each), loaded.language, ids) for each in (phrase, other))
        alike = likeness(here, there)
        return alike if alike >= NEAR else 0.0
    alike = Levenshtein.normalized_similarity(sounds(phrase, loaded.language), sounds(other, loaded.language))
    return alike if alike >= ALIKE else 0.0


def _differ_in_a_number(phrase: str, other: str, language: Language) -> bool:
    """``line three`` and ``line four`` differ by design; their digits are matched exactly."""
    differing = [(a, b) for a, b in zip(grammar.words_of(phrase), grammar.words_of(other), strict=False) if a != b]
    return bool(differing) and all(grammar.is_number_word(word, language) for pair in differing for word in pair)


def _doubts(graph: grammar.CommandGraph) -> Iterator[Remark]:
    matcher = TextMatcher(graph)
    random = Random(0)  # noqa: S311 - samples, no secrets
    seen: set[frozenset[str]] = set()
    for _ in range(SAMPLES):
        steps, _ending = graph.words.walk(random)
        sentence = grammar.sentence(steps)
        readings = matcher.readings(sentence)
        intents = frozenset(reading.intent for reading in readings)
        if len(readings) > 1 and intents not in seen:
            seen.add(intents)
            yield Remark("warning", f"{sentence!r} has two meanings: {' or '.join(map(str, readings))}")


def _unused(loaded: Grammar) -> Iterator[Remark]:
    sentences = [sentence for intent in loaded.intents.values() for sentence in intent.sentences]
    written = "\n".join([*sentences, *loaded.rules.values(), *_templates(loaded)])
    for rule in loaded.rules:
        if f"<{rule}>" not in written.replace(" ", ""):
            yield Remark("warning", f"rules.{rule} is used nowhere")
    for slot in loaded.slots:
        if f"{{{slot}}}" not in written.replace(" ", "") and f"{{{slot}:" not in written.replace(" ", ""):
            yield Remark("warning", f"slots.{slot} is used nowhere")


def _templates(loaded: Grammar) -> Sequence[str]:
    return [t for slot in loaded.slots.values() if isinstance(slot, Enumeration) for _, t in slot.phrases()]
