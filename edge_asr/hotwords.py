"""Hears a site's own words: a CTC prefix beam search in which every hotword of a list earns a bonus.

Law: a sequence of tokens scores its CTC log-probability, all alignments summed, plus the bonus of each hotword that its
text holds: once per occurrence, found leftmost first, longest first, never overlapping, and only between word
boundaries. The credit for an unfinished match is a function of where the match stands, so it is gone when the match
breaks off or the audio ends. A text without a hotword is the greedy one, to the token.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from edge_asr import settings
from edge_asr.biasing import IDLE
from edge_asr.events import Token
from edge_asr.numbers import Language, respell
from edge_asr.posteriors import BLANK, FRAME_S, WORD_START, Recognition, TokenTable

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

BEAM = 8
"""Prefixes kept per frame."""

BEST_TOKENS = 8
"""Tokens per frame that may extend any prefix: so many of all, and so many of those that begin a hotword."""

PAUSE_FRAMES = 3
"""Frames (of 60 ms) around what the free text hears in which a hotword may sound; all else is a pause."""

FLAT = math.log(0.02)
"""Log-posterior of the best token below which a frame hears nothing: it is spread over the whole vocabulary. See
tools/hotwords-benchmark for the flattest frame of real recordings: 0.11."""

MARGIN = 12.0
"""Nats that a prefix or a token may lie behind the best one before it is dropped without a look."""

MAX_WEIGHT = 20.0

_INSIDE = "\0"
"""Text before which a word has begun that is not, and will not be, part of a hotword."""

_IMPOSSIBLE = -math.inf


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
    """One phrase per line, its weight after a colon if it has its own; ``#`` begins a comment line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise HotwordError(f"{path}: cannot be read ({reason}); check hotwords.file") from None
    found, problems = {}, []
    for number, line in enumerate(lines, start=1):
        phrase, colon, own = (part.strip() for part in line.rpartition(":"))
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not colon:
            phrase = line.strip()
        elif not re.fullmatch(r"\d+(\.\d+)?", own) or float(own) > MAX_WEIGHT or not phrase:
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
        lettered = re.sub(r"\b[A-Z]{2,}\b", lambda match: " ".join(match[0]), normal)
        for spelled in (normal, lettered):
            said = [respell(spelled, language) for language in get_args(Language)] if re.search(r"\d", spelled) else []
            found.update((_canonical(form)[0].strip(), None) for form in (spelled, *said))
    return [form for form in found if form]


class _Context:
    """Finds hotwords in canonical text, also piece by piece while the text still grows.

    A state is the end of the text that may yet become a hotword: empty at a word boundary, ``_INSIDE`` within a word.
    """

    def __init__(self, bonus: Mapping[str, float]) -> None:
        self._bonus = bonus
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

    def step(self, state: str, text: str) -> tuple[str, float]:
        """Append canonical text, with a gap in front or without: the new state, and the bonus that is now certain."""
        grown = _append(state, text)
        found, after = self.occurrences(grown, ended=False)
        return after, self._worth(grown, found)

    def credit(self, state: str) -> float:
        """What a state is worth while the audio goes on."""
        return max(self._credit.get(state, 0.0), self.final(state))

    def final(self, state: str) -> float:
        """What a state is worth if the audio ends here."""
        return self._worth(state, self.occurrences(state)[0])

    def _worth(self, text: str, found: Sequence[tuple[int, int]]) -> float:
        return sum(self._bonus[text[start:end]] for start, end in found)


# ---------------------------------------------------------------- tokens


class _Vocabulary:
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

    def writing(self, before: str, text: str) -> list[int]:
        """Tokens that append ``text`` to ``before``, with a gap of no meaning in front or without."""
        gapless = not before or _is_wide(before[-1]) or _is_wide(text[0])
        return [*self._ids.get(text, ()), *(self._ids.get(" " + text, ()) if gapless else ())]


def _gapped(piece: str) -> str:
    """Canonical text of a piece; a gap in front is kept where it parts words."""
    text, _ = _canonical(piece)
    return text if piece[:1].isalnum() or (text and _is_wide(text[0])) else " " + text


class _Prefix:
    """A sequence of tokens in the beam; children know each other by their token, so equal sequences are one object."""

    __slots__ = (
        *("parent", "children", "token", "state", "gained", "secured", "credit"),
        *("blank", "label", "total", "safe", "score"),
    )

    def __init__(
        self, parent: _Prefix | None, token: int, state: str, gained: float, secured: float, credit: float
    ) -> None:
        self.parent, self.token, self.state = parent, token, state
        self.gained = gained
        """Bonus of the hotwords that are certain."""
        self.secured, self.credit = secured, credit
        """What the state is worth on top if the audio ends here, and if it goes on as one hopes."""
        self.children: dict[int, _Prefix] = {}

    def settle(self, blank: float, label: float) -> None:
        """Take over the log-probability of all alignments so far that end in a blank, and in the last token."""
        self.blank, self.label = blank, label
        self.total = _log_add(blank, label)
        self.safe = self.total + self.gained + self.secured
        self.score = self.total + self.gained + self.credit

    def grown(self, token: int) -> float:
        """Log-probability of all alignments that may go on with the token: a repeated one wants a blank before."""
        return self.blank if token == self.token else self.total

    def tokens(self) -> list[int]:
        """The sequence."""
        found: list[int] = []
        prefix = self
        while prefix.parent is not None:
            found.append(prefix.token)
            prefix = prefix.parent
        return found[::-1]


def _log_add(a: float, b: float) -> float:
    if a < b:
        a, b = b, a
    return a if b == _IMPOSSIBLE else a + math.log1p(math.exp(b - a))


def best_tokens(log_posteriors: Floats, count: int) -> Ints:
    """[frames, count] ids of the most probable tokens per frame, in no order.

    The best tokens lie in the best columns of a table of rows, so that a partition sees a fiftieth of a big vocabulary.
    """
    frames, size = log_posteriors.shape
    if size <= 16 * count:
        return np.argpartition(-log_posteriors, min(count, size) - 1, axis=1)[:, :count]
    rows = max(2, int(math.sqrt(size / count)))
    columns = size // rows
    table = log_posteriors[:, : rows * columns].reshape(frames, rows, columns)
    chosen = np.argpartition(-table.max(axis=1), count - 1, axis=1)[:, :count]
    rest = np.broadcast_to(np.arange(rows * columns, size), (frames, size - rows * columns))
    candidates = np.hstack(
        [(chosen[:, None, :] + columns * np.arange(rows)[:, None]).reshape(frames, count * rows), rest]
    )
    scores = np.take_along_axis(log_posteriors, candidates, axis=1)
    best = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    found: Ints = np.take_along_axis(candidates, best, axis=1)
    return found


def _telling(log_posteriors: Floats) -> NDArray[np.bool_]:
    """Which frames the search looks at.

    Idle ones say nothing after another idle one, and flat ones, each of which would cost more than a word, never do. In
    silence even a good model gives its favourite words a few percent: a hotword may replace what was heard there, but
    not fill a pause.
    """
    best = log_posteriors.argmax(axis=1)
    flat = log_posteriors[np.arange(len(best)), best] < FLAT
    heard = (best != BLANK) & ~flat
    near = np.convolve(heard, np.ones(2 * PAUSE_FRAMES + 1))[PAUSE_FRAMES : PAUSE_FRAMES + len(heard)] > 0
    idle = (log_posteriors[:, BLANK] > IDLE) | ~near
    telling: NDArray[np.bool_] = ~idle
    telling[0] = True
    telling[1:] |= ~idle[:-1]
    telling &= ~flat
    return telling


class _Search:
    """Prefix beam search (Hannun et al. 2014) that ranks prefixes by probability, bonus and credit."""

    def __init__(self, context: _Context, vocabulary: _Vocabulary, *, beam: int, margin: float) -> None:
        self._vocabulary = vocabulary
        self._beam, self._margin = beam, margin
        self._onward: dict[str, list[str]] = defaultdict(list)
        for beginning in context.beginnings:
            self._onward[beginning[:-1]].append(beginning)
        texts = vocabulary.texts
        self._step = lru_cache(maxsize=1 << 16)(lambda state, token: context.step(state, texts[token]))
        self._credit = lru_cache(maxsize=1 << 14)(context.credit)
        self._final = lru_cache(maxsize=1 << 14)(context.final)
        self._leading = lru_cache(maxsize=1 << 12)(self._led)
        self._starters, self._starting = self._led("")

    def best(self, log_posteriors: Floats) -> tuple[list[int], float]:
        """The sequence of tokens with the highest score, and the score."""
        root = _Prefix(None, -1, "", 0.0, 0.0, 0.0)
        root.settle(0.0, _IMPOSSIBLE)
        beam = [root]
        for row, shared in zip(log_posteriors, self._shared(log_posteriors), strict=True):
            beam = self._advance(beam, row, shared)
        best = max(beam, key=lambda prefix: prefix.safe)
        return best.tokens(), best.safe

    def _shared(self, log_posteriors: Floats) -> Iterator[dict[int, float]]:
        """Per frame the tokens that may extend any prefix, with their log-posteriors."""
        chosen = best_tokens(log_posteriors, BEST_TOKENS)
        if len(self._starters):
            begin = log_posteriors[:, self._starters]
            chosen = np.hstack([chosen, self._starters[best_tokens(begin, BEST_TOKENS)]])
        scores = np.take_along_axis(log_posteriors, chosen, axis=1)
        floors = log_posteriors.max(axis=1) - self._margin
        for tokens, values, floor in zip(chosen.tolist(), scores.tolist(), floors.tolist(), strict=True):
            yield {t: v for t, v in zip(tokens, values, strict=True) if t != BLANK and v >= floor}

    def _advance(self, beam: list[_Prefix], row: Floats, shared: Mapping[int, float]) -> list[_Prefix]:
        """One frame: every prefix stays or grows by a token; the best ones remain."""
        grown = self._grown(beam, row, shared)
        _stay(beam, row)
        kept, worst = list(beam), _IMPOSSIBLE
        for bound, reached, prefix, token in grown:
            if bound <= worst:
                break
            child = prefix.children.get(token) or self._new(prefix, token)
            child.settle(_IMPOSSIBLE, reached)
            kept.append(child)
            if len(kept) >= 2 * self._beam:
                kept = self._best_of(kept)
                worst = kept[-1].score
        return self._best_of(kept)

    def _best_of(self, prefixes: list[_Prefix]) -> list[_Prefix]:
        """The prefixes that remain, best first.

        Where two have the same state and last token, the future treats both alike: the worse one gives way. One
        place is kept for the best of the others without credit, so that hopes do not displace what they may come to.
        """
        prefixes.sort(key=lambda prefix: -prefix.score)
        floor = max(prefix.safe for prefix in prefixes) - self._margin
        if len(prefixes) > self._beam:
            fronts: dict[tuple[str, int], _Prefix] = {}
            rest = [each for each in prefixes if fronts.setdefault((each.state, each.token), each) is not each]
            ranked = [*fronts.values(), *rest]
            safest = max(ranked[self._beam - 1 :], key=lambda prefix: prefix.safe)
            prefixes = sorted([*ranked[: self._beam - 1], safest], key=lambda prefix: -prefix.score)
        return [prefix for prefix in prefixes if prefix.score >= floor]

    def _grown(
        self, beam: Sequence[_Prefix], row: Floats, shared: Mapping[int, float]
    ) -> list[tuple[float, float, _Prefix, int]]:
        """(upper bound of the score, log-probability, prefix, token) of all children outside the beam, best first."""
        near = float(row.max()) - self._margin
        floor = max(prefix.safe for prefix in beam) + near
        inside = set(beam)
        grown = []
        for prefix in beam:
            leading, promises = self._leading(prefix.state)
            tokens = {**shared, **_above(near, row, leading)} if prefix.state and len(leading) else shared
            for token, value in tokens.items():
                reached = prefix.grown(token) + value
                promise = promises.get(token)
                if promise is None:
                    promise = prefix.secured + self._starting.get(token, 0.0)
                bound = reached + prefix.gained + promise
                if bound >= floor and prefix.children.get(token) not in inside:
                    grown.append((bound, reached, prefix, token))
        grown.sort(key=lambda each: -each[0])
        return grown

    def _led(self, state: str) -> tuple[Ints, dict[int, float]]:
        """The tokens that lead from a state towards a hotword, and what each one earns and promises."""
        found: set[int] = set()
        beginnings = [state]
        for beginning in beginnings:
            for further in self._onward.get(beginning, ()):
                if len(further) - len(state) <= self._vocabulary.longest:
                    beginnings.append(further)
                    found.update(self._vocabulary.writing(state, further[len(state) :]))
        leading = np.array(sorted(found), np.int64)
        steps = {token: self._step(state, token) for token in leading.tolist()}
        return leading, {token: gained + self._credit(after) for token, (after, gained) in steps.items()}

    def _new(self, prefix: _Prefix, token: int) -> _Prefix:
        state, gained = self._step(prefix.state, token)
        child = _Prefix(prefix, token, state, prefix.gained + gained, self._final(state), self._credit(state))
        prefix.children[token] = child
        return child


def _above(floor: float, row: Floats, tokens: Ints) -> dict[int, float]:
    """Those tokens whose log-posterior is not below the floor."""
    values = row[tokens]
    near = values >= floor
    return dict(zip(tokens[near].tolist(), values[near].tolist(), strict=True))


def _stay(beam: Sequence[_Prefix], row: Floats) -> None:
    """One frame in which the prefixes of the beam get no longer; some are also reached from a parent in the beam."""
    inside = set(beam)
    blank = float(row[BLANK])
    settled = []
    for prefix in beam:
        label = _IMPOSSIBLE
        if prefix.parent is not None:
            entering = prefix.parent.grown(prefix.token) if prefix.parent in inside else _IMPOSSIBLE
            label = _log_add(prefix.label, entering) + float(row[prefix.token])
        settled.append((prefix, prefix.total + blank, label))
    for prefix, resting, label in settled:
        prefix.settle(resting, label)


def aligned(log_posteriors: Floats, tokens: Sequence[int]) -> list[tuple[int, int]]:
    """(first frame, frame after the last) of each token on the best path that writes exactly these tokens."""
    labels = np.zeros(2 * len(tokens) + 1, np.int64)
    labels[1::2] = tokens
    emitted = log_posteriors[:, labels]
    skips = np.zeros(len(labels), bool)
    skips[3::2] = labels[3::2] != labels[1:-2:2]
    frames = len(emitted)
    back = np.zeros((frames, len(labels)), np.int64)
    score = np.full(len(labels), -np.inf, np.float32)
    score[:2] = emitted[0, :2]
    for t in range(1, frames):
        came = np.full((3, len(labels)), -np.inf, np.float32)
        came[0], came[1, 1:] = score, score[:-1]
        came[2, 2:] = np.where(skips[2:], score[:-2], -np.inf)
        back[t] = came.argmax(axis=0)
        score = came.max(axis=0) + emitted[t]
    at = len(labels) - 1 if len(labels) == 1 or score[-1] > score[-2] else len(labels) - 2
    path = [at]
    for t in range(frames - 1, 0, -1):
        at -= int(back[t, at])
        path.append(at)
    where = np.array(path[::-1])
    runs = [np.flatnonzero(where == 2 * i + 1) for i in range(len(tokens))]
    return [(int(run[0]), int(run[-1]) + 1) for run in runs]


# ---------------------------------------------------------------- product


class Hotwords:
    """A list of hotwords under one model's tokens."""

    def __init__(
        self, hotwords: Iterable[Hotword], table: TokenTable, *, beam: int = BEAM, margin: float = MARGIN
    ) -> None:
        self._table = table
        self._written: dict[str, str] = {}
        bonus: dict[str, float] = {}
        vocabulary = _Vocabulary(table)
        listed = list(hotwords)
        for hotword in listed:
            for form in _forms(hotword):
                tokens = vocabulary.fewest(form)
                if tokens is not None:
                    self._written[form], bonus[form] = hotword.written, hotword.weight * tokens
        hearable = set(self._written.values())
        self.unspellable = tuple(each.written for each in listed if each.written not in hearable)
        """Hotwords that no tokens of the model write; they are never heard."""
        self._context = _Context(bonus)
        self._search = _Search(self._context, vocabulary, beam=beam, margin=margin)

    def __len__(self) -> int:
        """How many there are."""
        return len(set(self._written.values()))

    def apply(self, recognition: Recognition) -> Recognition:
        """The utterance with its hotwords heard, and written as the list writes them."""
        if not self._written:
            return recognition
        transcript, log_posteriors = recognition.transcript, recognition.log_posteriors
        tokens, confidence = transcript.tokens, transcript.confidence
        if log_posteriors is not None and len(log_posteriors):
            labels, _ = self.search(log_posteriors[_telling(log_posteriors)])
            if self._heard("".join(self._print(label) for label in labels)):
                runs = aligned(log_posteriors, labels)
                tokens = tuple(
                    Token(self._print(label), round(s * FRAME_S, 3)) for label, (s, _) in zip(labels, runs, strict=True)
                )
                heard = [log_posteriors[s:e, label].max() for label, (s, e) in zip(labels, runs, strict=True)]
                confidence = float(np.exp(np.mean(heard)))
        found = self._heard("".join(token.text for token in tokens))
        if not found:
            return recognition
        tokens = _rewritten(tokens, found)
        text = "".join(token.text for token in tokens).strip()
        return replace(recognition, transcript=replace(transcript, text=text, tokens=tokens, confidence=confidence))

    def search(self, log_posteriors: Floats) -> tuple[list[int], float]:
        """The tokens with the highest score, and the score."""
        return self._search.best(log_posteriors)

    def _print(self, label: int) -> str:
        return self._table.pieces[label].replace(WORD_START, " ")

    def _heard(self, text: str) -> list[tuple[int, int, str]]:
        """(start, end, written form) of the hotwords in a text."""
        canonical, places = _canonical(text)
        return [
            (places[start], places[end - 1] + 1, self._written[canonical[start:end]])
            for start, end in self._context.occurrences(canonical)[0]
        ]


def _rewritten(tokens: Sequence[Token], found: Sequence[tuple[int, int, str]]) -> tuple[Token, ...]:
    """The tokens with hotwords in their written form; tokens that share a hotword become one."""
    text = "".join(token.text for token in tokens)
    rewritten: list[Token] = []
    began, first, end = 0, 0, 0
    for index, token in enumerate(tokens):
        end += len(token.text)
        if any(start < end < stop for start, stop, _ in found):
            continue
        shown = text[began:end]
        for start, stop, written in reversed(found):
            if began <= start < end:
                shown = shown[: start - began] + written + shown[stop - began :]
        rewritten.append(Token(shown, tokens[first].start_s))
        began, first = end, index + 1
    return tuple(rewritten)
