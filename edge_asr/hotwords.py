"""A site's own words: their list, and where they stand in a text, also in one that still grows.

Law: hotwords are found leftmost first, longest first, never overlapping, and only between word boundaries. What a text
is worth is the sum of their bonuses, once per occurrence. The credit for an unfinished match is a function of where the
match stands, so it is gone when the match breaks off or the audio ends.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from edge_asr import settings
from edge_asr.language_model import LanguageModel
from edge_asr.numbers import Language, respell
from edge_asr.posteriors import WORD_START, TokenTable

UNDER_LANGUAGE_MODEL = 0.5
"""Share of the weights that is due where a language model speaks for the likelier of the other words: with all of it
hotwords are invented (tools/hotwords-benchmark)."""

READ_AFTER = 2
"""Tokens before one, of a hotword's, after which the language model must have read it to know the hotword."""

MAX_WEIGHT = 20.0

_INSIDE = "\0"
"""Text before which a word has begun that is not, and will not be, part of a hotword."""


class HotwordError(Exception):
    """The list of hotwords cannot be used; one line per problem, each naming its file and line."""


@dataclass(frozen=True, slots=True)
class Hotword:
    """A word or phrase that the site says and the model hardly knows."""

    written: str
    """How the transcript shows it."""
    weight: float
    """Nats per token that the model needs at least to write it: how much less likely than the free text it may be and
    still be preferred. A word with a token of its own is not rare to the model. 0 only corrects the spelling."""
    spoken: tuple[str, ...] = ()
    """What the model may write instead, where it is not ``written`` in other letters: ``x k forty seven``."""


def load(options: settings.Hotwords) -> tuple[Hotword, ...]:
    """The hotwords of the settings and their file; the settings win. Raises HotwordError."""
    found = {} if options.file is None else _read(options.file, options.weight)
    for each in options.phrases:
        weight = options.weight if each.weight is None else each.weight
        found[each.phrase] = Hotword(each.phrase, weight, each.spoken)
    silent = [phrase for phrase, hotword in found.items() if not _forms(hotword)]
    if silent:
        raise HotwordError(f"hotwords: {silent[0]!r} holds no letter or digit; remove it")
    return tuple(found.values())


def digest(listed: Iterable[Hotword]) -> str:
    """SHA-256 by which two lists can be told apart."""
    rows = [[each.written, each.weight, list(each.spoken)] for each in listed]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()


def _read(path: Path, weight: float) -> dict[str, Hotword]:
    """One phrase per line, its weight after a colon if it has its own; ``#`` begins a comment line.

    A colon right behind a digit may be either and is refused: "12:05" would be 12 of weight 5.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise HotwordError(f"{path}: cannot be read ({reason}); check hotwords.file") from None
    found, problems = {}, []
    for number, line in enumerate(lines, start=1):
        before, colon, after = line.replace("\uff1a", ":").rpartition(":")
        phrase, own = before.strip(), after.strip()
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not colon:
            phrase = line.strip()
        elif not re.fullmatch(r"\d+(\.\d+)?", own) or float(own) > MAX_WEIGHT or not phrase or before[-1:].isdigit():
            problems.append(f"{path}: line {number}: {line.strip()!r} is not `phrase` or `phrase :0..{MAX_WEIGHT:g}`")
            continue
        found[phrase] = Hotword(phrase, float(own) if colon else weight)
    if problems:
        raise HotwordError("\n".join(problems))
    return found


# ---------------------------------------------------------------- text


def _is_wide(char: str) -> bool:
    """Whether hotwords may begin and end at the character, whatever its neighbours are: Han, kana, Hangul."""
    return unicodedata.east_asian_width(char) in "WF"


def _joined(left: str, right: str) -> bool:
    """Whether no word boundary lies between two characters of canonical text."""
    return " " not in (left, right) and not _is_wide(left) and not _is_wide(right)


def _canonical(text: str) -> tuple[str, list[int]]:
    """Lower case, everything but letters and digits a gap, gaps only where they part two words; and each one's place.

    Appending to canonical text and making that canonical again is the same as making it all canonical at once.
    """
    kept: list[str] = []
    places: list[int] = []
    for place, char in enumerate(text):
        lower = char.lower() if len(char.lower()) == 1 else char
        now = lower if lower.isalnum() or lower == _INSIDE else " "
        last = kept[-1] if kept else " "
        if now == " " and (last == " " or _is_wide(last)):
            continue
        if last == " " and kept and _is_wide(now):
            kept.pop()
            places.pop()
        kept.append(now)
        places.append(place)
    return "".join(kept), places


def _append(text: str, more: str) -> str:
    """Canonical text, grown by canonical text that may have a gap in front."""
    if more[:1] == " " and (not text or text[-1] == " " or _is_wide(text[-1])):
        return text + more[1:]
    if more and text[-1:] == " " and _is_wide(more[0]):
        return text[:-1] + more
    return text + more


def _forms(hotword: Hotword) -> list[str]:
    """The canonical texts in which a model may write a hotword: capitals letter by letter, digits as number words."""
    found: dict[str, None] = {}
    for text in (hotword.written, *hotword.spoken):
        normal = unicodedata.normalize("NFKC", text)
        lettered = re.sub(r"(?<![A-Za-z])[A-Z]{2,}(?![A-Za-z])", lambda match: " ".join(match[0]), normal)
        for spelled in (normal, lettered):
            said = [respell(spelled, language) for language in get_args(Language)] if re.search(r"\d", spelled) else []
            found.update((_canonical(form)[0].strip(), None) for form in (spelled, *said))
    return [form for form in found if form]


@dataclass(frozen=True, slots=True)
class Worth:
    """What a text is worth."""

    bonus: float
    unread: Sequence[tuple[int, int]] = ()
    """(start, end) of each hotword in it that the language model has never read."""
    length: int = 0
    """Of the text."""


class Context:
    """Finds hotwords in canonical text, also piece by piece while the text still grows.

    A state is the end of the text that may yet become a hotword: empty at a word boundary, ``_INSIDE`` within a word.
    """

    def __init__(self, bonus: Mapping[str, float], unread: frozenset[str] = frozenset()) -> None:
        """``unread``: those of the hotwords that the language model has never read."""
        self._bonus, self._unread = bonus, unread
        self._unread_beginnings = {form[:end] for form in unread for end in range(1, len(form) + 1)}
        self._credit: dict[str, float] = {}
        """Every beginning of a hotword -> the share of the bonus that leads the beam."""
        for form, worth in bonus.items():
            for end in range(1, len(form) + 1):
                share = worth * math.sqrt(end / len(form))  # most doubt is about its first token
                self._add(form[:end], share)
                if end < len(form) and _is_wide(form[end]):
                    self._add(form[:end] + " ", share)  # a gap that the next character will close

    def _add(self, beginning: str, share: float) -> None:
        self._credit[beginning] = max(share, self._credit.get(beginning, 0.0))

    @property
    def beginnings(self) -> Iterable[str]:
        """All texts that a hotword begins with."""
        return self._credit

    def begins_unread(self, state: str) -> bool:
        """Whether a state may become a hotword that the language model has never read."""
        return state in self._unread_beginnings

    def occurrences(self, text: str, *, ended: bool = True) -> tuple[list[tuple[int, int]], str]:
        """(start, end) of each hotword in canonical text, and the state after it."""
        found: list[tuple[int, int]] = []
        at = 0
        while at < len(text):
            if at and _joined(text[at - 1], text[at]):
                at += 1
                continue
            end, whole = at, 0
            while end < len(text) and text[at : end + 1] in self._credit:
                end += 1
                if text[at:end] in self._bonus and not (end < len(text) and _joined(text[end - 1], text[end])):
                    whole = end
            if end == len(text) and not ended:
                return found, text[at:]
            if whole:
                found.append((at, whole))
            at = whole or at + 1
        return found, _INSIDE if text and _joined(text[-1], text[-1]) else ""

    def step(self, state: str, text: str) -> tuple[str, Worth]:
        """Append canonical text, with a gap in front or without: the new state, and what is now certain."""
        grown = _append(state, text)
        found, after = self.occurrences(grown, ended=False)
        return after, self._worth(grown, found)

    def credit(self, state: str) -> float:
        """What a state is worth while the audio goes on."""
        return max(self._credit.get(state, 0.0), self.final(state).bonus)

    def final(self, state: str) -> Worth:
        """What a state is worth if the audio ends here."""
        return self._worth(state, self.occurrences(state)[0])

    def _worth(self, text: str, found: Sequence[tuple[int, int]]) -> Worth:
        unread = [(start, end) for start, end in found if text[start:end] in self._unread]
        return Worth(sum(self._bonus[text[start:end]] for start, end in found), unread, len(text))


# ---------------------------------------------------------------- tokens


class Vocabulary:
    """What each token of a table adds to canonical text."""

    def __init__(self, table: TokenTable) -> None:
        self.texts = [_gapped(piece.replace(WORD_START, " ")) for piece in table.pieces]
        """Per token; a gap in front is kept."""
        self.longest = table.longest_piece
        self._ids: dict[str, list[int]] = defaultdict(list)
        for identifiers in table.ids_by_spelling.values():
            for identifier in identifiers:
                self._ids[self.texts[identifier]].append(identifier)

    def fewest(self, form: str) -> int | None:
        """How many tokens it takes at least to write the canonical text; None if it cannot be written."""
        counts = {0: 0}
        for start in range(len(form)):
            if start in counts:
                for end in range(start + 1, min(len(form), start + self.longest) + 1):
                    if self.writing(form[:start], form[start:end]):
                        counts[end] = min(counts[start] + 1, counts.get(end, end))
        return counts.get(len(form))

    def is_read(self, model: LanguageModel, form: str) -> bool:
        """Whether the language model has read a spelling of canonical text: each token after those before it."""
        known = min(READ_AFTER, model.order - 1)
        reached: dict[int, set[tuple[int, ...]]] = {0: {()}}
        for start in range(len(form)):
            for before in reached.get(start, ()):
                for end in range(start + 1, min(len(form), start + self.longest) + 1):
                    following = self.writing(form[:start], form[start:end]) if start else self._first(form[:end])
                    read = (token for token in following if not before or model.lists(before, token))
                    reached.setdefault(end, set()).update((*before, token)[-known:] for token in read)
        return bool(reached.get(len(form)))

    def _first(self, text: str) -> Sequence[int]:
        """Tokens that begin a text, and a word where there are words."""
        return self.writing("", text) if _is_wide(text[0]) else self._ids.get(" " + text, ())

    def writing(self, before: str, text: str) -> list[int]:
        """Tokens that append ``text`` to ``before``, with a gap of no meaning in front or without."""
        gapless = not before or _is_wide(before[-1]) or _is_wide(text[0])
        return [*self._ids.get(text, ()), *(self._ids.get(" " + text, ()) if gapless else ())]


def _gapped(piece: str) -> str:
    """Canonical text of a piece; a gap in front is kept where it parts words."""
    text, _ = _canonical(piece)
    return text if piece[:1].isalnum() or (text and _is_wide(text[0])) else " " + text


# ---------------------------------------------------------------- product


class Hotwords:
    """A list of hotwords under one model's tokens."""

    def __init__(
        self, hotwords: Iterable[Hotword], table: TokenTable, language_model: LanguageModel | None = None
    ) -> None:
        share = 1.0 if language_model is None else UNDER_LANGUAGE_MODEL
        self._written: dict[str, str] = {}
        bonus: dict[str, float] = {}
        self.vocabulary = Vocabulary(table)
        lost: list[str] = []
        for hotword in hotwords:
            is_hearable = False
            for form in _forms(hotword):
                tokens = self.vocabulary.fewest(form)
                if tokens is not None:
                    is_hearable = True
                    self._written[form], bonus[form] = hotword.written, share * hotword.weight * tokens
            if not is_hearable:
                lost.append(hotword.written)
        self.unspellable = tuple(lost)
        """Hotwords that no tokens of the model write; they are never heard."""

        def is_unread(form: str) -> bool:
            return language_model is not None and not self.vocabulary.is_read(language_model, form)

        self.context = Context(bonus, frozenset(form for form, worth in bonus.items() if worth and is_unread(form)))

    def __len__(self) -> int:
        """How many there are."""
        return len(set(self._written.values()))

    def found(self, text: str) -> list[tuple[int, int, str]]:
        """(start, end, written form) of the hotwords in a text."""
        canonical, places = _canonical(text)
        return [
            (places[start], places[end - 1] + 1, self._written[canonical[start:end]])
            for start, end in self.context.occurrences(canonical)[0]
        ]
