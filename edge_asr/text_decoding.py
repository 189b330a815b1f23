"""Writes what was said: a CTC prefix beam search under a language model and the site's hotwords.

Law: a sequence of tokens scores its CTC log-probability, all alignments summed; its log-probability in the language
model, weighed, and a bonus for each token; and the bonus of each hotword that its text holds. What the language model
took from the tokens of a hotword that it has never read is given back with its bonus.
Without a language model, a text that holds no hotword is the greedy one, to the token; and with it, too, nothing is
written where the greedy text is empty.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from edge_asr.biasing import IDLE
from edge_asr.events import Token
from edge_asr.hotwords import Context, Hotwords, Vocabulary
from edge_asr.language_model import START, LanguageModel
from edge_asr.posteriors import BLANK, FRAME_S, WORD_START, Recognition, TokenTable

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

BEAM = 8
"""Prefixes kept per frame."""

WIDE_BEAM = 12
"""With a language model, which often comes to prefer late what the first frames did not."""

BEST_TOKENS = 8
"""Tokens per frame that may extend any prefix: so many of all, and so many of those that begin a hotword."""

PAUSE_FRAMES = 3
"""Frames (of 60 ms) around what the free text hears in which a hotword may sound; all else is a pause."""

FLAT = math.log(0.02)
"""Log-posterior of the best token below which a frame hears nothing: it is spread over the whole vocabulary. See
tools/hotwords-benchmark for the flattest frame of real recordings: 0.11."""

MARGIN = 12.0
"""Nats that a prefix or a token may lie behind the best one before it is dropped without a look."""

_IMPOSSIBLE = -math.inf


class _Prefix:
    """A sequence of tokens in the beam; children know each other by their token, so equal sequences are one object."""

    __slots__ = (
        *("parent", "children", "token", "state", "gained", "secured", "credit"),
        *("context", "weighed", "taken", "secured_back", "credited_back"),
        *("blank", "label", "total", "safe", "score"),
    )

    def __init__(self, parent: _Prefix | None, token: int, state: str, secured: float, credit: float) -> None:
        self.parent, self.token, self.state = parent, token, state
        self.gained = 0.0
        """Bonus of the hotwords that are certain, and what was given back for them."""
        self.secured, self.credit = secured, credit
        """What the state is worth on top if the audio ends here, and if it goes on as one hopes."""
        self.context: tuple[int, ...] = ()
        """What the language model knows of the sequence."""
        self.weighed = 0.0
        """What the language model gave the tokens, hotwords or not."""
        self.taken = 0.0
        """What it took for the last token; never negative."""
        self.secured_back = self.credited_back = 0.0
        """What would be given back with ``secured`` and ``credit``."""
        self.children: dict[int, _Prefix] = {}

    def settle(self, blank: float, label: float) -> None:
        """Take over the log-probability of all alignments so far that end in a blank, and in the last token."""
        self.blank, self.label = blank, label
        self.total = _log_add(blank, label)
        certain = self.total + self.weighed + self.gained
        self.safe = certain + self.secured + self.secured_back
        self.score = certain + self.credit + self.credited_back

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
    """Prefix beam search (Hannun et al. 2014) that ranks prefixes by probability, language model, bonus and credit."""

    def __init__(
        self,
        context: Context,
        vocabulary: Vocabulary,
        language_model: LanguageModel | None,
        *,
        beam: int,
        margin: float,
    ) -> None:
        self._context, self._vocabulary, self._language_model = context, vocabulary, language_model
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
        root = _Prefix(None, -1, "", 0.0, 0.0)
        root.context = START
        root.settle(0.0, _IMPOSSIBLE)
        beam = [root]
        for row, shared in zip(log_posteriors, self._shared(log_posteriors), strict=True):
            beam = self._advance(beam, row, shared)
        best = max(beam, key=self._whole)
        return best.tokens(), self._whole(best)

    def _whole(self, prefix: _Prefix) -> float:
        """The score of a sequence after which nothing is said."""
        model = self._language_model
        return prefix.safe + (0.0 if model is None else model.weight * float(model.row(prefix.context)[BLANK]))

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
        for bound, reached, weighed, prefix, token in grown:
            if bound <= worst:
                break
            child = prefix.children.get(token) or self._new(prefix, token, weighed)
            child.settle(_IMPOSSIBLE, reached)
            kept.append(child)
            if len(kept) >= 2 * self._beam:
                kept = self._best_of(kept)
                worst = kept[-1].score
        return self._best_of(kept)

    def _best_of(self, prefixes: list[_Prefix]) -> list[_Prefix]:
        """The prefixes that remain, best first.

        Where two have the same state, last token and context, the future treats both alike: the worse one gives way.
        One place is kept for the best of the others without credit: hopes shall not displace what they may come to.
        """
        prefixes.sort(key=lambda prefix: -prefix.score)
        floor = max(prefix.safe for prefix in prefixes) - self._margin
        if len(prefixes) > self._beam:
            fronts: dict[tuple[str, int, tuple[int, ...]], _Prefix] = {}
            rest = [e for e in prefixes if fronts.setdefault((e.state, e.token, e.context), e) is not e]
            ranked = [*fronts.values(), *rest]
            safest = max(ranked[self._beam - 1 :], key=lambda prefix: prefix.safe)
            prefixes = sorted([*ranked[: self._beam - 1], safest], key=lambda prefix: -prefix.score)
        return [prefix for prefix in prefixes if prefix.score >= floor]

    def _grown(
        self, beam: Sequence[_Prefix], row: Floats, shared: Mapping[int, float]
    ) -> list[tuple[float, float, float, _Prefix, int]]:
        """All children outside the beam, best first.

        (upper bound of the score, log-probability, what the language model gives the token, prefix, token)
        """
        near = float(row.max()) - self._margin
        floor = max(prefix.safe for prefix in beam) + near
        inside = set(beam)
        grown = []
        for prefix in beam:
            leading, promises = self._leading(prefix.state)
            tokens = {**shared, **_above(near, row, leading)} if prefix.state and len(leading) else shared
            certain = prefix.weighed + prefix.gained
            for (token, value), weighed in zip(tokens.items(), self._weighed(prefix, tokens), strict=True):
                reached = prefix.grown(token) + value
                promise = promises.get(token)
                if promise is None:
                    promise = prefix.secured + self._starting.get(token, 0.0)
                bound = reached + certain + weighed + promise
                if promise:
                    bound += prefix.credited_back + max(0.0, -weighed)
                if bound >= floor and prefix.children.get(token) not in inside:
                    grown.append((bound, reached, weighed, prefix, token))
        grown.sort(key=lambda each: -each[0])
        return grown

    def _weighed(self, prefix: _Prefix, tokens: Mapping[int, float]) -> Sequence[float]:
        """What the language model gives each of the tokens after a prefix."""
        model = self._language_model
        if model is None:
            return (0.0,) * len(tokens)
        found: list[float] = (model.weight * model.row(prefix.context)[list(tokens)] + model.bonus).tolist()
        return found

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
        return leading, {token: gained.bonus + self._credit(after) for token, (after, gained) in steps.items()}

    def _new(self, prefix: _Prefix, token: int, weighed: float) -> _Prefix:
        state, gained = self._step(prefix.state, token)
        secured = self._final(state)
        child = _Prefix(prefix, token, state, secured.bonus, self._credit(state))
        child.gained = prefix.gained + gained.bonus
        if self._language_model is not None:
            child.context = self._language_model.onward(prefix.context, token)
            child.weighed, child.taken = prefix.weighed + weighed, max(0.0, -weighed)
            child.gained += self._given_back(child, gained.length, gained.unread)
            child.secured_back = self._given_back(child, secured.length, secured.unread)
            if self._context.begins_unread(state):
                child.credited_back = self._given_back(child, len(state), [(0, len(state))])
        prefix.children[token] = child
        return child

    def _given_back(self, last: _Prefix, end: int, hotwords: Sequence[tuple[int, int]]) -> float:
        """What the language model took for the tokens of hotwords in a prefix's last ``end`` letters."""
        back, prefix = 0.0, last
        texts = self._vocabulary.texts
        while hotwords and end > 0 and prefix.parent is not None:
            gaps = texts[prefix.token][:1] == " " == texts[prefix.parent.token][-1:]  # two of them are one
            start = end - len(texts[prefix.token]) + gaps
            if any(start < stop and begin < end for begin, stop in hotwords):
                back += prefix.taken
            end, prefix = start, prefix.parent
        return back


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


class TextDecoder:
    """Writes utterances under one model's tokens, its language model and the site's hotwords."""

    def __init__(
        self,
        hotwords: Hotwords,
        table: TokenTable,
        language_model: LanguageModel | None = None,
        *,
        beam: int | None = None,
        margin: float = MARGIN,
    ) -> None:
        self._table, self._hotwords, self._language_model = table, hotwords, language_model
        width = beam or (BEAM if language_model is None else WIDE_BEAM)
        self._search = _Search(hotwords.context, hotwords.vocabulary, language_model, beam=width, margin=margin)

    def apply(self, recognition: Recognition) -> Recognition:
        """The utterance in the likeliest words, with its hotwords heard and written as the list writes them."""
        transcript, log_posteriors = recognition.transcript, recognition.log_posteriors
        tokens, confidence = transcript.tokens, transcript.confidence
        if tokens and log_posteriors is not None:
            labels, _ = self.search(log_posteriors[_telling(log_posteriors)])
            if labels and (self._language_model is not None or self._found(map(self._print, labels))):
                runs = aligned(log_posteriors, labels)
                tokens = tuple(
                    Token(self._print(label), round(s * FRAME_S, 3)) for label, (s, _) in zip(labels, runs, strict=True)
                )
                heard = [log_posteriors[s:e, label].max() for label, (s, e) in zip(labels, runs, strict=True)]
                confidence = float(np.exp(np.mean(heard)))
        found = self._found(token.text for token in tokens)
        if found:
            tokens = _rewritten(tokens, found)
        if tokens == transcript.tokens:
            return recognition
        text = "".join(token.text for token in tokens).strip()
        return replace(recognition, transcript=replace(transcript, text=text, tokens=tokens, confidence=confidence))

    def search(self, log_posteriors: Floats) -> tuple[list[int], float]:
        """The tokens with the highest score, and the score."""
        return self._search.best(log_posteriors)

    def _print(self, label: int) -> str:
        return self._table.pieces[label].replace(WORD_START, " ")

    def _found(self, texts: Iterable[str]) -> list[tuple[int, int, str]]:
        return self._hotwords.found("".join(texts))


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
