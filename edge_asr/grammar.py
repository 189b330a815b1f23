"""The grammar language: YAML files of sentence templates become one acyclic word graph whose paths mean commands.

Law: the graph accepts exactly the sentences of its files, and a path's meaning is the sequence of its marks. The
template syntax stays close to hassil's, which integrators of voice assistants know::

    [optional]   (one|or|other)   (in;any;order)   {slot}   {slot:name}   <rule>

An upper-case word such as RCCB is also heard letter by letter.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from operator import or_
from pathlib import Path
from typing import Annotated, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from edge_asr.events import Answer, Risk, SlotValue
from edge_asr.numbers import LIMIT, MAX_DECIMALS, Language, digits_of, spoken_digits, spoken_forms, value_of
from edge_asr.phonetics import missing_package
from edge_asr.settings import explain, parse_yaml, problems
from edge_asr.wordgraph import Automaton, Mark, Meaning, Number, Sketch, Step, Value, WordGraph, minimal_trie

MAX_NUMBERS = 100_000
"""Values of one range; more would take minutes to spell out."""

_CJK = re.compile(r"[\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]")
_CAPITALS = re.compile(r"\W*[A-Z]{2,}\W*")
_PLAIN = {
    **{0xFF01 + i: chr(0x21 + i) for i in range(94)},  # full-width letters, digits and punctuation
    **dict.fromkeys(map(ord, "\u2019\u02bc"), "'"),
    **dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63"), "-"),  # a minus sign, too, is more than a dash
}
_NAME = re.compile(r"[\w-]+")
_PIECES = re.compile(r"\{[^{}]*\}|<[^<>]*>|[\[\]()|;]|[^\s\[\](){}<>|;]+")


class GrammarError(Exception):
    """A grammar cannot be used; one line per problem, naming the file, the place and the remedy. Exit code 78."""


# ---------------------------------------------------------------- the file


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Intent(_Part):
    """One thing that can be commanded."""

    sentences: Annotated[tuple[str, ...], Field(min_length=1)]
    risk: Risk = "normal"
    ttl_s: Annotated[float, Field(ge=3, le=86_400)] | None = None
    """Life of the command; None: the site's default. Brokers count its last 2 seconds too coarsely to be used."""
    min_confidence: Annotated[float, Field(ge=0, le=1)] | None = None
    """None: the site's default."""
    answer: Answer | None = None
    """What this intent says to a command that waits for confirmation; alone it is a command like any other."""
    stations: tuple[str, ...] = ()
    """Names of the sources from which it may be commanded; empty: all."""
    roles: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")], ...] = ()
    """Who must say yes to it by `req/confirm-ROLE`, whatever the risk; a voice has no role. Empty: nobody."""


class Enumeration(_Part):
    """A slot whose values are listed, each with the ways people say it."""

    values: Annotated[tuple[tuple[str, Annotated[tuple[str, ...], Field(min_length=1)]], ...], Field(min_length=1)]
    """Each value with the templates of what people say for it."""
    match: Literal["words", "sound"] = "words"
    """``sound``: the values are names, and a text that is no sentence word for word may hold one by its sound."""

    @field_validator("values", mode="before")
    @classmethod
    def _listed(cls, written: object) -> object:
        """``- oven`` is said as it is called, ``- oven: [oven, furnace]`` in words of its own."""
        if not isinstance(written, list):
            return written
        pairs = [pair for entry in written for pair in (entry.items() if isinstance(entry, dict) else [(entry, entry)])]
        return [
            (_text(value), [_text(each) for each in (said if isinstance(said, list) else [said])])
            for value, said in pairs
        ]

    def phrases(self) -> Iterator[tuple[str, str]]:
        """(value, template) for every way of saying every value."""
        for value, said in self.values:
            for template in said:
                yield value, template


def _text(written: object) -> str:
    """YAML takes `on`, `off`, `yes` and `no` for truth values; a guess at what was meant may command something else."""
    if isinstance(written, str) or (isinstance(written, int) and not isinstance(written, bool)):
        return str(written)
    raise ValueError(f"{written!r} is no text; put it in quotes")


class NumberRange(_Part):
    """A slot that holds a number; integer when bounds and step are."""

    range: tuple[Decimal, Decimal]
    step: Annotated[Decimal, Field(gt=0)] = Decimal(1)
    unit: str = ""

    @model_validator(mode="after")
    def _sane(self) -> NumberRange:
        low, high = self.range
        if not -LIMIT < low <= high < LIMIT:
            raise ValueError(f"range: {low}..{high} is not two numbers below {LIMIT}, the lower one first")
        if any(-int(x.as_tuple().exponent) > MAX_DECIMALS for x in (low, self.step)):
            raise ValueError(f"range: nobody says more than {MAX_DECIMALS} decimals")
        if (high - low) / self.step >= MAX_NUMBERS:
            raise ValueError(f"range: {low}..{high} by {self.step} has more than {MAX_NUMBERS} values; widen the step")
        return self

    def values(self) -> Iterator[Decimal]:
        """Every value from the lower to the upper bound."""
        low, high = self.range
        for index in range(int((high - low) / self.step) + 1):
            yield low + index * self.step

    @property
    def is_integer(self) -> bool:
        """Whether payloads carry an int."""
        return all(x == x.to_integral_value() for x in (*self.range, self.step))


class Digits(_Part):
    """A slot that holds an id said digit by digit; a string, so leading zeros stay."""

    digits: Annotated[int, Field(ge=1, le=4)]


class Expectation(_Part):
    """A sentence and what it must mean; `edge-asr grammar test` checks them."""

    say: str
    intent: str | None
    slots: dict[str, SlotValue] = {}


class Grammar(_Part):
    """One grammar file."""

    language: Language
    intents: Annotated[dict[str, Intent], Field(min_length=1)]
    slots: dict[str, Enumeration | NumberRange | Digits] = {}
    rules: dict[str, str] = {}
    tests: tuple[Expectation, ...] = ()


def load(path: Path) -> Grammar:
    """Read and check one grammar file. Raises GrammarError."""
    return parse(content_of(path), str(path))


def content_of(path: Path) -> bytes:
    """A grammar file's content, unchecked. Raises GrammarError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise GrammarError(f"{path}: cannot be read ({error.strerror})") from None


def parse(content: bytes, path: str) -> Grammar:
    """Check what was read from a grammar file. Raises GrammarError."""
    try:
        tree = parse_yaml(content.decode())
    except UnicodeDecodeError:
        raise GrammarError(f"{path}: cannot be read (not UTF-8 text)") from None
    except ValueError as error:
        raise GrammarError(f"{path}: {error}; mend the YAML there") from None
    if isinstance(tree, dict) and isinstance(tree.get("slots"), dict):
        wrong = list(_slot_problems(path, tree["slots"]))
        if wrong:
            raise GrammarError("\n".join(wrong))
    try:
        return Grammar.model_validate(tree)
    except ValidationError as error:
        raise GrammarError("\n".join(f"{path}: {explain(problem, Grammar)}" for problem in problems(error))) from None


def _slot_problems(path: str, slots: Mapping[str, object]) -> Iterator[str]:
    """Said before pydantic tries every kind of slot in turn and reports three times as much."""
    kinds: dict[str, type[_Part]] = {"values": Enumeration, "range": NumberRange, "digits": Digits}
    for name, body in slots.items():
        if not _NAME.fullmatch(str(name)):
            yield f"{path}: slots.{name}: a name holds letters, digits, _ and -; it becomes a key of the payload"
            continue
        kind = next((k for k in kinds if isinstance(body, dict) and k in body), None)
        if kind is None:
            yield f"{path}: slots.{name}: expected `values: [...]`, `range: [low, high]` or `digits: n`"
            continue
        try:
            kinds[kind].model_validate(body)
        except ValidationError as error:
            yield from (f"{path}: slots.{name}.{explain(problem, kinds[kind])}" for problem in problems(error))


@dataclass(frozen=True, slots=True)
class Reading:
    """What a complete path means."""

    intent: str
    language: Language
    slots: tuple[tuple[str, SlotValue], ...]
    """Sorted by name, so that two paths with one meaning compare equal."""
    units: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        """``SetSpeed(machine=press, speed=1200 rpm)``."""
        units = dict(self.units)
        inside = ", ".join(f"{k}={v} {units[k]}" if k in units else f"{k}={v}" for k, v in self.slots)
        return f"{self.intent}({inside})"


def read(steps: Sequence[Step], ending: Sequence[Mark]) -> Reading:
    """The meaning of a path: its marks in order, its spoken numbers as values."""
    slots: dict[str, SlotValue] = {}
    units: dict[str, str] = {}
    for number, group in itertools.groupby(steps, key=lambda step: step.number):
        if number is None:
            continue
        slots[number.slot] = _number([step.word for step in group], number)
        if number.unit:
            units[number.slot] = number.unit
    for mark in itertools.chain(*(step.marks for step in steps), ending):
        if isinstance(mark, Value):
            slots[mark.slot] = mark.value
    meaning = next(mark for mark in ending if isinstance(mark, Meaning))
    return Reading(meaning.intent, meaning.language, tuple(sorted(slots.items())), tuple(sorted(units.items())))


def sentence(steps: Sequence[Step]) -> str:
    """The words of a path as people write them."""
    text = " ".join(step.word for step in steps)
    return re.sub(f"(?<={_CJK.pattern}) | (?={_CJK.pattern})", "", text)


def _number(words: Sequence[str], number: Number) -> SlotValue:
    value = (digits_of if number.kind == "digits" else value_of)(words, number.language)
    if value is None:
        raise ValueError(f"{' '.join(words)!r} stands in the graph for {number.slot} and is no number")
    if isinstance(value, str):
        return value
    return int(value) if number.kind == "integer" else float(value)


# ---------------------------------------------------------------- templates


@dataclass(frozen=True, slots=True)
class _Text:
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Sequence:
    parts: tuple[_Template, ...]


@dataclass(frozen=True, slots=True)
class _Choice:
    parts: tuple[_Template, ...]


@dataclass(frozen=True, slots=True)
class _AnyOrder:
    parts: tuple[_Template, ...]


@dataclass(frozen=True, slots=True)
class _Slot:
    kind: str
    name: str


_Template = Union[_Text, _Sequence, _Choice, _AnyOrder, _Slot]  # noqa: UP007 - names itself


class _TemplateParser:
    """Recursive descent over one template; ``where`` prefixes every error, ``inside`` are the rules being read."""

    def __init__(self, grammar: Grammar, where: str, inside: tuple[str, ...] = ()) -> None:
        self._grammar, self._where, self._inside = grammar, where, inside

    def sentence(self, template: str) -> _Template:
        """Parse what is said as a whole: not in silence, and filling no slot twice."""
        parsed = self.parse(template)
        if _is_optional(parsed):
            raise GrammarError(f"{self._where}: {template!r} can be said without a word; something must stay")
        twice = [name for name, count in Counter(_filled(parsed)).items() if count > 1]
        if twice:
            raise GrammarError(f"{self._where}: {template!r} can fill {twice[0]} twice; call one {{...:other}}")
        return parsed

    def phrase(self, template: str) -> _Template:
        """Parse what is said for a slot's value: a sentence without slots of its own."""
        parsed = self.sentence(template)
        if inner := _filled(parsed):
            raise GrammarError(f"{self._where}: {template!r}: a slot's value cannot hold the slot {{{inner[0]}}}")
        return parsed

    def parse(self, template: str) -> _Template:
        template = plain(template)
        stripped = _PIECES.sub("", template).strip()
        if stripped:
            raise GrammarError(f"{self._where}: {template!r}: unpaired {stripped[0]!r}")
        self._template = template
        self._pieces = _PIECES.findall(template)
        self._at = 0
        try:
            return self._group("")
        except RecursionError:
            raise GrammarError(f"{self._where}: {template[:40]!r}...: nested too deeply") from None

    def _group(self, closing: str) -> _Template:
        branches: list[list[_Template]] = [[]]
        separators: set[str] = set()
        while True:
            if self._at == len(self._pieces):
                if closing:
                    raise GrammarError(f"{self._where}: {self._template!r}: `{closing}` is missing")
                break
            piece = self._pieces[self._at]
            self._at += 1
            if piece == closing:
                break
            if piece in {"|", ";"}:
                separators.add(piece)
                branches.append([])
            else:
                branches[-1].append(self._one(piece))
        if len(separators) > 1:
            raise GrammarError(f"{self._where}: {self._template!r}: `|` and `;` in one bracket; add brackets")
        parts = tuple(branch[0] if len(branch) == 1 else _Sequence(tuple(branch)) for branch in branches)
        if ";" in separators:
            if len(parts) > 5:
                raise GrammarError(f"{self._where}: {self._template!r}: at most 5 parts in any order")
            return _AnyOrder(parts)
        return _Choice(parts) if separators else parts[0]

    def _one(self, piece: str) -> _Template:
        if piece == "[":
            return _Choice((self._group("]"), _Sequence(())))
        if piece == "(":
            return self._group(")")
        if piece.startswith("{"):
            kind, colon, name = piece[1:-1].strip().partition(":")
            if kind not in self._grammar.slots:
                raise GrammarError(f"{self._where}: {piece}: no such slot; define slots.{kind}")
            if colon and not _NAME.fullmatch(name):
                raise GrammarError(f"{self._where}: {piece}: a name holds letters, digits, _ and -")
            return _Slot(kind, name or kind)
        if piece.startswith("<"):
            rule = piece[1:-1].strip()
            if rule in self._inside:
                raise GrammarError(f"{self._where}: <{rule}> contains itself; rules must end")
            if rule not in self._grammar.rules:
                raise GrammarError(f"{self._where}: <{rule}>: no such rule; define rules.{rule}")
            return _TemplateParser(self._grammar, f"{self._where}: <{rule}>", (*self._inside, rule)).parse(
                self._grammar.rules[rule]
            )
        if piece in {"]", ")", "}", ">"}:
            raise GrammarError(f"{self._where}: {self._template!r}: unpaired {piece!r}")
        return _spelled(piece)


def _is_optional(template: _Template) -> bool:
    """Whether the template can be said without a word."""
    if isinstance(template, _Text):
        return not template.words
    if isinstance(template, _Slot):
        return False
    return (any if isinstance(template, _Choice) else all)(map(_is_optional, template.parts))


def _filled(template: _Template) -> list[str]:
    """Names of the slots that one sentence can fill; those of alternatives count once."""
    if isinstance(template, _Text):
        return []
    if isinstance(template, _Slot):
        return [template.name]
    below = [_filled(part) for part in template.parts]
    if isinstance(template, _Choice):
        return list(functools.reduce(or_, map(Counter, below), Counter[str]()).elements())
    return list(itertools.chain.from_iterable(below))


def _kinds(template: _Template) -> Iterator[str]:
    """The slots of a template by the names of their definitions."""
    if isinstance(template, _Slot):
        yield template.kind
    elif not isinstance(template, _Text):
        for part in template.parts:
            yield from _kinds(part)


def _spelled(piece: str) -> _Template:
    """What stands between two spaces as the words of the graph."""
    parts = tuple(_spelled_word(part) for part in _apart(piece).split())
    return parts[0] if len(parts) == 1 else _Sequence(parts)


def _spelled_word(part: str) -> _Template:
    words = tuple(words_of(part))
    if _CAPITALS.fullmatch(part):
        return _Choice((_Text(words), _Text(tuple("".join(words)))))
    return _Text(words)


def plain(text: str) -> str:
    """The text with ASCII letters, digits, apostrophes and minus signs, whichever keyboard it was written on."""
    return text.translate(_PLAIN)


def _apart(text: str) -> str:
    """The text with spaces around every CJK character."""
    return _CJK.sub(lambda match: f" {match[0]} ", text)


def words_of(text: str) -> list[str]:
    """A text as the graph's words: lower case, punctuation dropped, every CJK character a word of its own."""
    kept = re.sub(r"[^\w' ]|_", " ", _apart(plain(text).lower()))
    return [word for word in (part.strip("'") for part in kept.split()) if word]


# ---------------------------------------------------------------- templates -> graph


class _Compiler:
    """Appends templates to a sketch of the graph."""

    def __init__(
        self, sketch: Sketch, grammar: Grammar, where: str, places: dict[str, NamePlace] | None = None
    ) -> None:
        """With ``places``, slots with ``match: sound`` become single words, which are explained there."""
        self._sketch, self._grammar, self._where, self._places = sketch, grammar, where, places

    def add(self, template: _Template, source: int) -> int:
        """Append a template after ``source`` and return the node where it ends."""
        if isinstance(template, _Text):
            for word in template.words:
                source = self._sketch.word(source, word)
            return source
        if isinstance(template, _Sequence):
            for part in template.parts:
                source = self.add(part, source)
            return source
        if isinstance(template, _Choice):
            end = self._sketch.node()
            for part in template.parts:
                self._sketch.empty[self.add(part, source)].append(((), end))
            return end
        if isinstance(template, _AnyOrder):
            return self._any_order(template, source)
        return self._slot(template, source)

    def _any_order(self, template: _AnyOrder, source: int) -> int:
        """One node per set of parts already said: 2^n nodes instead of n! orders."""
        every = frozenset(range(len(template.parts)))
        said = {frozenset[int](): source}
        for size in range(len(every)):
            for subset in map(frozenset, itertools.combinations(sorted(every), size)):
                for part in sorted(every - subset):
                    grown = subset | {part}
                    end = self.add(template.parts[part], said[subset])
                    said.setdefault(grown, self._sketch.node())
                    self._sketch.empty[end].append(((), said[grown]))
        return said[every]

    def _slot(self, slot: _Slot, source: int) -> int:
        definition = self._grammar.slots[slot.kind]
        if self._places is not None and _is_by_sound(definition):
            return self._sketch.word(source, self._place(slot, self._places))
        end = self._sketch.node()
        if isinstance(definition, Enumeration):
            parser = _TemplateParser(self._grammar, f"{self._where}: slots.{slot.kind}")
            for value, template in definition.phrases():
                last = self.add(parser.phrase(template), source)
                self._sketch.empty[last].append(((Value(slot.name, value),), end))
            return end
        if isinstance(definition, Digits):
            number = Number(slot.name, self._grammar.language, "digits")
            arcs, finals = _digit_graph(definition.digits, self._grammar.language)
        else:
            kind: Literal["integer", "decimal"] = "integer" if definition.is_integer else "decimal"
            number = Number(slot.name, self._grammar.language, kind, definition.unit)
            arcs, finals = _number_graph(tuple(definition.values()), self._grammar.language)
        own: dict[int, int] = {0: source}
        for a, word, b in arcs:
            for node in (a, b):
                if node not in own:
                    own[node] = self._sketch.node()
            self._sketch.words[own[a]].append((word, number, own[b]))
        for final in finals:
            self._sketch.empty[own[final]].append(((), end))
        return end

    def _place(self, slot: _Slot, places: dict[str, NamePlace]) -> str:
        """A word that nobody says, for all names of a slot."""
        if package := missing_package(self._grammar.language):
            where = f"{self._where}: slots.{slot.kind}"
            raise GrammarError(f"{where}: `match: sound` needs a package; pip install '{package}'")
        place = NamePlace(
            slot.name,
            self._grammar.language,
            tuple(
                (value, tuple(words_of(phrase)))
                for value, template in _enumerated(self._grammar, slot.kind)
                for phrase in expansions(template, self._grammar)
            ),
            ids_of(self._grammar),
        )
        word = next((known for known, other in places.items() if other == place), f"{{{len(places)}}}")
        places[word] = place
        return word


def _is_by_sound(definition: Enumeration | NumberRange | Digits) -> bool:
    return isinstance(definition, Enumeration) and definition.match == "sound"


def _enumerated(grammar: Grammar, kind: str) -> Iterator[tuple[str, str]]:
    definition = grammar.slots[kind]
    if isinstance(definition, Enumeration):
        yield from definition.phrases()


def ids_of(grammar: Grammar) -> frozenset[str]:
    """Words that the names and rules of a file write in capitals, and their letters."""
    templates = [template for kind in grammar.slots for _, template in _enumerated(grammar, kind)]
    written = " ".join([*templates, *grammar.rules.values()])
    return frozenset(word.lower() for word in re.findall(r"\b[A-Z][A-Z0-9]*\b", written))


@functools.lru_cache(maxsize=64)
def _number_graph(values: tuple[Decimal, ...], language: Language) -> Automaton:
    forms = (form for value in values for form in spoken_forms(value, language))
    return minimal_trie(forms)


@functools.lru_cache(maxsize=8)
def _digit_graph(count: int, language: Language) -> Automaton:
    return minimal_trie(f for n in range(10**count) for f in spoken_digits(f"{n:0{count}d}", language))


@dataclass(frozen=True, slots=True)
class NamePlace:
    """Where a name stands that may be known by its sound: a slot with ``match: sound`` in one file's sentences."""

    slot: str
    language: Language
    names: tuple[tuple[str, tuple[str, ...]], ...]
    """Each value with the words of one way to say it."""
    ids: frozenset[str]
    """Words that the file writes in capitals; they stand for themselves, not for a sound."""


@dataclass(frozen=True)
class CommandGraph:
    """Every sentence of every grammar file, and what is known of its intents."""

    words: WordGraph
    intents: Mapping[tuple[str, Language], Intent]
    frames: WordGraph
    """The sentences that hold a name of a slot with ``match: sound``, with a word of :attr:`places` in its stead."""
    places: Mapping[str, NamePlace]


def expansions(template: str, grammar: Grammar, limit: int = 64) -> list[str]:
    """The first sentences of one template, as people write them."""
    return [sentence(steps) for steps in itertools.islice(graph_of(template, grammar).paths(), limit)]


def graph_of(template: str, grammar: Grammar) -> WordGraph:
    """All sentences of one template, without a meaning."""
    sketch = Sketch()
    compiler = _Compiler(sketch, grammar, "template")
    return sketch.finish(compiler.add(_TemplateParser(grammar, "template").parse(template), 0))


def is_number_word(word: str, language: Language) -> bool:
    """Whether a word says a number by itself."""
    return value_of([word], language) is not None


def compile_graph(grammars: Mapping[str, Grammar]) -> CommandGraph:
    """All sentences of all files (name -> grammar) as one graph. Raises GrammarError."""
    sketch, frames = Sketch(), Sketch()
    final, framed = sketch.node(), frames.node()
    intents: dict[tuple[str, Language], Intent] = {}
    places: dict[str, NamePlace] = {}
    for name, grammar in grammars.items():
        for intent_name, intent in grammar.intents.items():
            key = (intent_name, grammar.language)
            if key in intents:
                raise GrammarError(f"{name}: intents.{intent_name}: defined twice for language {grammar.language}")
            intents[key] = intent
            where = f"{name}: intents.{intent_name}"
            compiler, framer = _Compiler(sketch, grammar, where), _Compiler(frames, grammar, where, places)
            meaning = (Meaning(intent_name, grammar.language),)
            for sentence in intent.sentences:
                template = _TemplateParser(grammar, where).sentence(sentence)
                sketch.empty[compiler.add(template, 0)].append((meaning, final))
                if any(_is_by_sound(grammar.slots[kind]) for kind in _kinds(template)):
                    frames.empty[framer.add(template, 0)].append((meaning, framed))
    return CommandGraph(sketch.finish(final), intents, frames.finish(framed), places)
