"""Looks through a grammar for what will go wrong on the shop floor, and says in one line each what to do about it.

Four things: words that the model cannot write, sentences that can never be understood, phrases that sound alike, and
values or sentences that mean two things.

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
from edge_asr.brevity import too_short
from edge_asr.grammar import Enumeration, Grammar
from edge_asr.numbers import Language
from edge_asr.phonetics import likeness, name_of
from edge_asr.posteriors import TokenTable
from edge_asr.text_matching import NEAR, TextMatcher
from edge_asr.wordgraph import WordGraph

ALIKE = 0.8
"""Similarity of two phrases' sounds from which a noisy hall makes them one (0..1)."""

SHOWN = 12
"""Words named in one remark."""

SAMPLES = 2000
"""Random sentences that are read back in search of a second meaning."""

SAMPLES_PER_SENTENCE = 40
"""Of one template; if all of them mean two things the template is taken for unreachable."""


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
    lost = [] if table is None else _lost(graph, table)
    if lost:
        shown = f"{', '.join(lost[:SHOWN])}{' ...' if len(lost) > SHOWN else ''}"
        remark = f"{len(lost)} words are never heard, the model cannot write them: {shown}"
        yield Remark("error", f"{remark}; reword them, or activate a model for {loaded.language}")
    yield from _unreachable(loaded, graph, frozenset(lost))
    for short in () if table is None else too_short(loaded, table, min_confidence=0.0):
        yield Remark("warning", f"intents.{short.intent}: {short}; lower its min_confidence, or let more be said")
    overlaps = list(_overlaps(loaded))
    yield from overlaps
    yield from _sound_alikes(loaded)
    yield from _words_alike(loaded)
    yield from _numbers_in_a_row(graph, loaded.language)
    yield from _doubts(graph, told=bool(overlaps))
    yield from _unused(loaded)


def _lost(graph: grammar.CommandGraph, table: TokenTable) -> list[str]:
    """The words that a model cannot write."""
    return [word for word in sorted({arc.step.word for arc in graph.words.arcs}) if not spellings(word, table)]


def _unreachable(loaded: Grammar, graph: grammar.CommandGraph, lost: frozenset[str]) -> Iterator[Remark]:
    """Sentences of which no way to say them can be heard, or all mean something else as well."""
    matcher = TextMatcher(graph)
    random = Random(0)  # noqa: S311 - samples, no secrets
    graphs = {
        (intent, template): grammar.graph_of(template, loaded)
        for intent, definition in loaded.intents.items()
        for template in definition.sentences
    }
    sayable = {key for key, own in graphs.items() if _is_sayable(own, lost)}
    for (intent, template), own in graphs.items() if sayable else ():  # else the words say it: it is another language
        where = f"intents.{intent}: {template!r} is never understood:"
        if (intent, template) not in sayable:
            yield Remark("error", f"{where} the model cannot write it; reword it")
            continue
        said = {grammar.sentence(own.walk(random)[0]) for _ in range(SAMPLES_PER_SENTENCE)}
        several = {each: matcher.readings(each) for each in said}
        if all(len(readings) > 1 for readings in several.values()):
            readings = several[min(said)]
            yield Remark("error", f"{where} {min(said)!r} is {' or '.join(map(str, readings))}; reword one of them")


def _is_sayable(graph: WordGraph, lost: frozenset[str]) -> bool:
    """Whether a sentence is left without the lost words."""
    outgoing, reached = graph.outgoing(), [0]
    for node in reached:
        onward = {arc.target for arc in outgoing.get(node, []) if arc.step.word not in lost}
        reached += sorted(onward - set(reached))
    return any(node in graph.endings for node in reached)


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
                meant = " and ".join(sorted(several))
                yield Remark("error", f"slots.{name}: {phrase!r} means {meant}; leave it to one of them")


def _sound_alikes(loaded: Grammar) -> Iterator[Remark]:
    for name, phrases in _phrases(loaded):
        worst: dict[tuple[str, str], tuple[float, str, str]] = {}
        for (value, phrase), (other_value, other) in itertools.combinations(phrases, 2):
            if value == other_value or phrase == other or _differ_in_a_number(phrase, other, loaded.language):
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


def _words_alike(loaded: Grammar) -> Iterator[Remark]:
    """Sentences of two intents that differ in one word, which sounds the same; slots stand as words of their own."""
    opaque = {name: Enumeration.model_validate({"values": [f"0x{i}"]}) for i, name in enumerate(loaded.slots)}
    skeleton = loaded.model_copy(update={"slots": opaque})
    alike: dict[tuple[tuple[str, ...], tuple[str, ...]], list[tuple[str, str]]] = {}
    for intent, definition in loaded.intents.items():
        for template in definition.sentences:
            for said in grammar.expansions(template, skeleton):
                words = tuple(grammar.words_of(said))
                for at, word in enumerate(words):
                    alike.setdefault((words[:at], words[at + 1 :]), []).append((intent, word))
    seen: set[frozenset[str]] = set()
    for said_by in alike.values():
        for (intent, word), (other_intent, other) in itertools.combinations(said_by, 2):
            pair = frozenset((word, other))
            if intent == other_intent or len(pair) == 1 or pair in seen or _is_apart(word, other, loaded.language):
                continue
            seen.add(pair)
            remark = f"{word!r} (intents.{intent}) and {other!r} (intents.{other_intent}) sound alike"
            yield Remark("warning", f"{remark} in the same place; choose another word for one")


def _is_apart(word: str, other: str, language: Language) -> bool:
    """Whether ears can tell two words apart, or numbers and slots do."""
    if any(each.startswith("0x") or grammar.is_number_word(each, language) for each in (word, other)):
        return True
    return Levenshtein.normalized_similarity(sounds(word, language), sounds(other, language)) < ALIKE


def _numbers_in_a_row(graph: grammar.CommandGraph, language: Language) -> Iterator[Remark]:
    """Number slots right behind another number, whose words may fall to either."""
    outgoing = graph.words.outgoing()
    seen: set[str] = set()
    for arc in graph.words.arcs:
        if arc.step.number is None and not grammar.is_number_word(arc.step.word, language):
            continue
        before = f"{{{arc.step.number.slot}}}" if arc.step.number is not None else repr(arc.step.word)
        for onward in outgoing.get(arc.target, []):
            number = onward.step.number
            if number is None or number == arc.step.number or number.slot in seen:
                continue
            seen.add(number.slot)
            remark = f"{{{number.slot}}} may stand right behind another number, {before}: words may fall to either"
            yield Remark("warning", f"{remark}; put a word between them")


def _doubts(graph: grammar.CommandGraph, *, told: bool) -> Iterator[Remark]:
    """Sentences with two meanings, one of a kind; ``told``: values with one phrase were named already."""
    matcher = TextMatcher(graph)
    random = Random(0)  # noqa: S311 - samples, no secrets
    seen: set[frozenset[object]] = set()
    for _ in range(SAMPLES):
        steps, _ending = graph.words.walk(random)
        sentence = grammar.sentence(steps)
        readings = matcher.readings(sentence)
        kinds = frozenset[object]((r.intent, tuple(name for name, _ in r.slots)) for r in readings)
        if len(readings) > 1 and kinds not in seen and not (told and len(kinds) == 1):
            seen.add(kinds)
            meant = " or ".join(map(str, readings))
            yield Remark("warning", f"{sentence!r} has two meanings: {meant}; take it out of one")


def _unused(loaded: Grammar) -> Iterator[Remark]:
    sentences = [sentence for intent in loaded.intents.values() for sentence in intent.sentences]
    written = grammar.plain("\n".join([*sentences, *loaded.rules.values(), *_templates(loaded)]))
    for rule in loaded.rules:
        if f"<{rule}>" not in written.replace(" ", ""):
            yield Remark("warning", f"rules.{rule} is used nowhere; remove it, or use <{rule}> in a sentence")
    for slot in loaded.slots:
        if f"{{{slot}}}" not in written.replace(" ", "") and f"{{{slot}:" not in written.replace(" ", ""):
            yield Remark("warning", f"slots.{slot} is used nowhere; remove it, or use {{{slot}}} in a sentence")


def _templates(loaded: Grammar) -> Sequence[str]:
    return [t for slot in loaded.slots.values() if isinstance(slot, Enumeration) for _, t in slot.phrases()]
