"""The table by which a model weighs words: n-grams of its own pieces, counted in text, smoothed, pruned.

Modified Kneser-Ney smoothing, interpolated (Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language
Modeling", 1999), with cut-offs: what was read too rarely to be worth its bytes is left to the shorter context. The text
is what the voices speak, but for words in no order, and the examples and definitions of WordNet. No sentence that the
model is measured by is in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_asr.language_model import STEP, bits
from edge_asr.posteriors import BLANK
from training import texts
from training.tokens import Tokenizer

Keys = NDArray[np.uint64]
Numbers = NDArray[np.float64]

ORDER = 6
"""Pieces, which are half a word or a whole one: about three words."""
LEAST: Mapping[int, int] = {3: 3, 4: 5, 5: 6, 6: 7}
"""Length of an n-gram -> how often, sentences repeated, it must have been read to be kept."""
WEIGHT, BONUS = 0.8, 2.0
"""Share of the table's log-probability, and nats per piece, that the search adds; chosen on seeds 8 and 9 of the unseen
voice, which the figures are not measured on."""

WORDNET = Path("/usr/share/wordnet")
DRAWN = 60_000
"""Sentences of grammars, the shop floor, numbers and letters."""
SITE_REPEATED = 4
"""How often each sentence of a site counts."""


def clauses(text: str) -> Iterator[str]:
    """What of a text can be said in one go: two words and more of letters alone."""
    for part in re.split(r"[.!?;:,\"()\[\]\-]+ ?", text):
        words = re.sub(r"\s+", " ", part.strip().lower())
        if re.fullmatch(r"[a-z' ]+", words) and " " in words:
            yield words.strip("' ")


def wordnet(*, examples: bool) -> Iterator[str]:
    """WordNet's example sentences, or its definitions. Raises FileNotFoundError."""
    if not (found := sorted(WORDNET.glob("data.*"))):
        raise FileNotFoundError(f"{WORDNET}: has no data.*; install Debian's wordnet-base")
    for path in found:
        for line in path.read_text(encoding="latin-1").splitlines():
            gloss = line.partition("| ")[2]
            yield from (
                (clause for said in re.findall(r'"([^"]+)"', gloss) for clause in clauses(said))
                if examples
                else clauses(re.sub(r'"[^"]*"', "", gloss))
            )


def read(unheard: frozenset[str]) -> Iterator[tuple[str, int]]:
    """(sentence, how often it counts) of all texts, without those that are to stay ``unheard``."""
    random = Random("language model")
    drawn = (texts.draw(random) for _ in range(DRAWN))
    plain = (each.text for each in drawn if each.kind not in {"general", "decoy"})
    sources = (
        (3, texts.general_sentences(held_out=False)),
        (2, plain),
        (2, wordnet(examples=True)),
        (1, wordnet(examples=False)),
    )
    for repeated, sentences in sources:
        yield from ((sentence, repeated) for sentence in sentences if sentence not in unheard)


@dataclass(frozen=True, slots=True)
class _Counted:
    """All n-grams of one length: packed, sorted, and how often each was read."""

    keys: Keys
    counts: Numbers


def counted(sentences: Iterable[tuple[Sequence[int], int]], order: int, width: int) -> dict[int, _Counted]:
    """Length -> its n-grams; each sentence has an edge before and after it."""
    edged = [([BLANK, *tokens, BLANK], repeated) for tokens, repeated in sentences]
    lengths = np.array([len(tokens) for tokens, _ in edged])
    stream = np.concatenate([np.array(tokens, np.uint64) for tokens, _ in edged])
    place = np.arange(len(stream)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    repeated = np.repeat(np.array([each for _, each in edged], np.float64), lengths)
    found, keys = {}, stream.copy()
    for n in range(1, order + 1):
        if n > 1:
            earlier = np.concatenate([np.zeros(n - 1, np.uint64), stream[: 1 - n]])
            keys |= earlier << np.uint64(width * (n - 1))
        inside = place >= max(n - 1, 1)
        unique, where = np.unique(keys[inside], return_inverse=True)
        found[n] = _Counted(unique, np.bincount(where, repeated[inside]).astype(np.float64))
    return found


def _continued(n: int, read: _Counted, longer: _Counted, width: int) -> _Counted:
    """In how many different contexts each n-gram was read: what counts for the lower orders. One that begins a sentence
    has no other context; it counts as often as it was read."""
    suffixes, contexts = np.unique(longer.keys & np.uint64((1 << width * n) - 1), return_counts=True)
    begins = (read.keys >> np.uint64(width * (n - 1)) == BLANK) & (n > 1)
    counts = np.where(begins, read.counts, 0.0)
    at = np.searchsorted(read.keys, suffixes)
    counts[at] = np.where(begins[at], counts[at], contexts)
    return _Counted(read.keys[counts > 0], counts[counts > 0])


def discounts(counts: Numbers) -> Numbers:
    """What is taken from each count for the tokens that were never read."""
    once, twice, thrice, four = (max(1, int((np.round(counts) == times).sum())) for times in (1, 2, 3, 4))
    share = once / (once + 2 * twice)
    taken = (max(0.1, 1 - 2 * share * twice / once), max(0.3, 2 - 3 * share * thrice / twice))
    most = max(0.5, 3 - 4 * share * four / thrice)
    return np.minimum(np.select([counts < 1.5, counts < 2.5], taken, most), 0.9 * counts)


@dataclass(frozen=True, slots=True)
class _Smoothed:
    keys: Keys
    probabilities: Numbers
    contexts: Keys
    left: Numbers
    """Per context: the probability of all that is not listed, over what the shorter context gives it."""


class Smoothed:
    """Interpolated probabilities of every n-gram that is kept."""

    def __init__(self, read: Mapping[int, _Counted], vocabulary: int, least: Mapping[int, int] = LEAST) -> None:
        self.width, self.order, self.vocabulary = bits(vocabulary), max(read), vocabulary
        self.levels: dict[int, _Smoothed] = {}
        for n in range(1, self.order + 1):
            found = read[n] if n == self.order else _continued(n, read[n], read[n + 1], self.width)
            often = read[n].counts[np.searchsorted(read[n].keys, found.keys)]
            self._smooth(n, found, often >= least.get(n, 0))

    def _smooth(self, n: int, found: _Counted, kept: NDArray[np.bool_]) -> None:
        remaining = found.counts - discounts(found.counts)
        contexts, where = np.unique(found.keys >> np.uint64(self.width), return_inverse=True)
        total = np.bincount(where, found.counts)
        own = remaining / total[where]
        left = np.maximum(1 - np.bincount(where, own * kept, len(contexts)), 1e-6)
        if n == 1:
            self.first = np.full(self.vocabulary, left[0] / self.vocabulary)
            self.first[found.keys.astype(np.int64)] += own
            return
        keys = found.keys[kept]
        shorter = self.probability(n - 1, keys & np.uint64((1 << self.width * (n - 1)) - 1))
        left_kept, at = np.unique(where[kept], return_inverse=True)
        probabilities = own[kept] + left[left_kept][at] * shorter
        self.levels[n] = _Smoothed(keys, probabilities, contexts[left_kept], left[left_kept])

    def probability(self, n: int, keys: Keys) -> Numbers:
        """Of the last token of each packed n-gram after the others."""
        if n == 1:
            return self.first[keys.astype(np.int64)]
        level = self.levels[n]
        probabilities = self.probability(n - 1, keys & np.uint64((1 << self.width * (n - 1)) - 1))
        if len(level.keys):
            contexts = keys >> np.uint64(self.width)
            at = np.minimum(np.searchsorted(level.contexts, contexts), len(level.contexts) - 1)
            probabilities = probabilities * np.where(level.contexts[at] == contexts, level.left[at], 1.0)
            at = np.minimum(np.searchsorted(level.keys, keys), len(level.keys) - 1)
            probabilities = np.where(level.keys[at] == keys, level.probabilities[at], probabilities)
        return probabilities

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What :class:`edge_asr.language_model.LanguageModel` reads."""
        found: dict[str, NDArray[Any]] = {
            "order": np.array(self.order),
            "vocabulary": np.array(self.vocabulary),
            "weight": np.array(WEIGHT),
            "bonus": np.array(BONUS),
            "scores_1": _steps(self.first),
        }
        for n, level in self.levels.items():
            starts = np.searchsorted(level.keys >> np.uint64(self.width), level.contexts)
            found |= {
                f"contexts_{n}": level.contexts.astype(np.uint32 if self.width * (n - 1) <= 32 else np.uint64),
                f"backoff_{n}": _steps(level.left),
                f"offsets_{n}": np.append(starts, len(level.keys)).astype(np.uint32),
                f"tokens_{n}": (level.keys & np.uint64((1 << self.width) - 1)).astype(np.uint16),
                f"scores_{n}": _steps(level.probabilities),
            }
        return found


def _steps(probabilities: Numbers) -> NDArray[np.uint8]:
    return np.clip(np.round(-np.log(probabilities) / STEP), 0, 255).astype(np.uint8)


def write(tokenizer: Tokenizer, unheard: frozenset[str], path: Path, site: Iterable[str] = ()) -> None:
    """Read all texts, and the sentences of a site, and write the table."""
    more = ((sentence, SITE_REPEATED) for sentence in site if sentence not in unheard)
    sentences = [(tokenizer.encode(sentence), repeated) for sentence, repeated in (*read(unheard), *more)]
    smoothed = Smoothed(counted(sentences, ORDER, bits(len(tokenizer))), len(tokenizer))
    np.savez_compressed(path, **smoothed.arrays())  # type: ignore[arg-type]
    listed = len(smoothed.first) + sum(len(level.keys) for level in smoothed.levels.values())
    print(f"{path.name}: {len(sentences)} sentences, {listed} n-grams, {path.stat().st_size / 1e6:.1f} MB", flush=True)
