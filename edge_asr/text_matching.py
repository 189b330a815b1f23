"""Decides which sentences of the grammars a text is: word for word, or else with a name that sounds as a listed one.

Law: sound counts for names alone, the values of slots with ``match: sound``, and only where no sentence is the text
word for word. Every other word of the sentence must be there as written; and the words in the name's place must hold
none of those, no number, id, opposite or no that the listed name does not hold at the same point. The name must be
alike enough and ahead of every other meaning by a margin, else all that are as near are named; it is never as sure as
one that was read word for word.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from edge_asr.grammar import CommandGraph, NamePlace, Reading, plain, read, words_of
from edge_asr.numbers import is_clear, respell
from edge_asr.phonetics import Name, likeness, name_of
from edge_asr.wordgraph import Arc, Mark, Step, Value, WordGraph

NEAR = 0.85
"""Likeness from which a name may be the one that was said: of two syllables, one half of one sound may differ."""

MARGIN = 0.1
"""Likeness by which it must be ahead of every other meaning: in a name of two syllables, half of one sound is .08."""

BY_SOUND = 0.95
"""Confidence of a name that sounds the same and is written otherwise."""

SPLIT = 2
"""Words more than the longest listed name has that may stand in its place: "pallet iser" for palletizer."""

_Path = tuple[int, tuple[Step, ...], float]
"""Node, steps so far, and the product of the names' likenesses."""


@dataclass(frozen=True, slots=True)
class _Listed:
    """The names that may stand in one place."""

    place: NamePlace
    sounds: tuple[Name, ...]
    """Of each listed name."""
    fixed: frozenset[str]
    """Words that a name must have as well, if they are heard in its place."""
    longest: int
    """Words that may stand there at most."""


class TextMatcher:
    """Reads texts as sentences of the grammars."""

    def __init__(self, graph: CommandGraph) -> None:
        self._exact, self._frames = _Walk(graph.words), _Walk(graph.frames)
        self._languages = sorted({language for _, language in graph.intents})
        self._said = frozenset(arc.step.word for arc in graph.frames.arcs)
        self._places = graph.places
        self._listed = lru_cache(maxsize=None)(lambda word: _listed(graph.places[word], self._said))
        self._alike = lru_cache(maxsize=1 << 10)(self._named)

    def readings(self, text: str) -> list[Reading]:
        """Every meaning of a text word for word, with digits in it read as spoken numbers; empty: it is no sentence."""
        found: dict[Reading, None] = {}
        for words in self._spellings(text):
            for steps, marks in self._exact.paths(words):
                found.setdefault(read(steps, marks))
        return list(found)

    def understood(self, text: str) -> list[tuple[Reading, float]]:
        """What a text may mean, and how sure that is, best first; empty: no command, several: it is ambiguous."""
        exact = self.readings(text)
        return [(reading, 1.0) for reading in exact] if exact or not self._places else self._by_sound(text)

    def _by_sound(self, text: str) -> list[tuple[Reading, float]]:
        found: dict[Reading, float] = {}
        for words in self._spellings(text):
            for steps, marks, alike in self._framed(words):
                reading = read(steps, marks)
                found[reading] = max(alike, found.get(reading, 0.0))
        ranked = sorted(found.items(), key=lambda item: -item[1])
        if not ranked or ranked[0][1] < NEAR:
            return []
        best = ranked[0][1]
        return [(reading, BY_SOUND * alike) for reading, alike in ranked if alike > best - MARGIN]

    def _spellings(self, text: str) -> Iterator[list[str]]:
        text = plain(text)
        spoken = [respell(text, language) for language in self._languages] if is_clear(text) else []
        for spelling in dict.fromkeys([text, *spoken]):
            yield words_of(spelling)

    def _framed(self, words: Sequence[str]) -> Iterator[tuple[tuple[Step, ...], tuple[Mark, ...], float]]:
        """Every way in which the words are a sentence, with names that sound alike."""
        paths: dict[int, list[_Path]] = defaultdict(list, {0: [(0, (), 1.0)]})
        for at in range(len(words)):
            for node, steps, alike in paths.pop(at, ()):
                for arc in self._frames.onward(node, words[at]):
                    paths[at + 1].append((arc.target, (*steps, arc.step), alike))
                for end, target, step, near in self._names_at(node, at, words):
                    paths[end].append((target, (*steps, step), alike * near))
        for node, steps, alike in paths[len(words)]:
            for ending in self._frames.endings.get(node, ()):
                yield steps, ending, alike

    def _names_at(self, node: int, at: int, words: Sequence[str]) -> Iterator[tuple[int, int, Step, float]]:
        """(where it ends, node behind it, step with its value, likeness) of names that may begin at a word."""
        for word, place in self._places.items():
            for arc in self._frames.onward(node, word):
                for end in range(at + 1, min(len(words), at + self._listed(word).longest) + 1):
                    for value, alike in self._alike(word, tuple(words[at:end])):
                        step = replace(arc.step, marks=(*arc.step.marks, Value(place.slot, value)))
                        yield end, arc.target, step, alike

    def _named(self, word: str, heard: tuple[str, ...]) -> list[tuple[str, float]]:
        """The values whose names sound like some words, with their likeness; those that cannot matter are left out."""
        listed = self._listed(word)
        sound = name_of(heard, listed.place.language, listed.fixed)
        found: dict[str, float] = {}
        for (value, _), name in zip(listed.place.names, listed.sounds, strict=True):
            alike = likeness(sound, name)
            if alike >= NEAR - MARGIN:
                found[value] = max(alike, found.get(value, 0.0))
        return list(found.items())


class _Walk:
    """A word graph by the words that lead on."""

    def __init__(self, graph: WordGraph) -> None:
        self.endings = graph.endings
        self._next: dict[tuple[int, str], list[Arc]] = defaultdict(list)
        for arc in graph.arcs:
            self._next[arc.source, arc.step.word].append(arc)

    def onward(self, node: int, word: str) -> Sequence[Arc]:
        return self._next.get((node, word), ())

    def paths(self, words: Sequence[str]) -> list[tuple[tuple[Step, ...], tuple[Mark, ...]]]:
        paths: list[tuple[int, tuple[Step, ...]]] = [(0, ())]
        for word in words:
            paths = [(arc.target, (*steps, arc.step)) for node, steps in paths for arc in self.onward(node, word)]
        return [(steps, ending) for node, steps in paths if steps for ending in self.endings.get(node, ())]


def _listed(place: NamePlace, said: frozenset[str]) -> _Listed:
    fixed = said | place.ids
    return _Listed(
        place,
        tuple(name_of(words, place.language, fixed) for _, words in place.names),
        fixed,
        max(len(words) for _, words in place.names) + SPLIT,
    )
