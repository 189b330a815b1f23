"""The language model's table, and the search under it: rows, refusals, and the law against brute force."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_asr.audio import read_file
from edge_asr.engine import Engine
from edge_asr.events import Utterance
from edge_asr.hotwords import UNDER_LANGUAGE_MODEL, Hotword, Hotwords, Vocabulary
from edge_asr.language_model import START, STEP, LanguageModel, bits
from edge_asr.model_store import EMBEDDED, ModelError, bundled, locate
from edge_asr.posteriors import BLANK, Recognition, TokenTable, log_softmax, transcribe
from edge_asr.settings import Settings
from edge_asr.text_decoding import TextDecoder
from tests.alignments import TINY, TOKENS_OF, likelihoods, posteriors_of

Arrays = Mapping[str, NDArray[Any]]
Context = tuple[int, ...]

SIZE = len(TINY)


def arrays_of(
    first: list[int], levels: Mapping[Context, tuple[int, Mapping[int, int]]], weight: float = 1.0, bonus: float = 0.0
) -> dict[str, NDArray[Any]]:
    """A table from steps: of single tokens; and per context of its backoff and of the tokens that it lists."""
    order = 1 + max(map(len, levels), default=1)
    found: dict[str, Any] = {"order": order, "vocabulary": len(first), "weight": weight, "bonus": bonus}
    found["scores_1"] = np.array(first, np.uint8)
    for n in range(2, order + 1):
        packed = {}
        for context, listed in levels.items():
            if len(context) == n - 1:
                key = 0
                for token in context:
                    key = key << bits(len(first)) | token
                packed[key] = listed
        rows = [packed[key] for key in sorted(packed)]
        found[f"contexts_{n}"] = np.array(sorted(packed), np.uint32)
        found[f"backoff_{n}"] = np.array([backoff for backoff, _ in rows], np.uint8)
        found[f"offsets_{n}"] = np.cumsum([0, *(len(listed) for _, listed in rows)]).astype(np.uint32)
        found[f"tokens_{n}"] = np.array([token for _, listed in rows for token in sorted(listed)], np.uint16)
        found[f"scores_{n}"] = np.array([listed[t] for _, listed in rows for t in sorted(listed)], np.uint8)
    return {name: np.asarray(value) for name, value in found.items()}


STEPS = st.integers(0, 60)
TOKENS = st.integers(0, SIZE - 1)
LISTED = st.tuples(STEPS, st.dictionaries(TOKENS, STEPS, min_size=1))
FIRST = st.lists(STEPS, min_size=SIZE, max_size=SIZE)
LEVELS = st.dictionaries(st.one_of(st.tuples(TOKENS), st.tuples(TOKENS, TOKENS)), LISTED, min_size=1, max_size=12)


@given(FIRST, LEVELS, st.lists(TOKENS, max_size=2))
def test_a_token_that_a_context_does_not_list_is_as_likely_as_after_the_shorter_one(
    first: list[int], levels: Mapping[Context, tuple[int, Mapping[int, int]]], wanted: list[int]
) -> None:
    model = LanguageModel(arrays_of(first, levels), SIZE)

    def steps(context: Context, token: int) -> int:
        if not context:
            return first[token]
        backoff, listed = levels.get(context, (0, {}))
        return listed[token] if token in listed else backoff + steps(context[1:], token)

    context: Context = tuple(wanted)[: model.order - 1]
    assert model.row(context) == pytest.approx([-STEP * steps(context, token) for token in range(SIZE)], abs=1e-4)


def test_a_context_is_what_the_next_token_depends_on() -> None:
    model = LanguageModel(arrays_of([9] * SIZE, {(1, 2): (0, {3: 1})}), SIZE)
    assert model.onward(START, 1) == (BLANK, 1)
    assert model.onward((BLANK, 1), 2) == (1, 2)


def whole() -> dict[str, NDArray[Any]]:
    return arrays_of([9] * SIZE, {(1,): (3, {2: 1, 3: 2}), (1, 2): (0, {3: 1})})


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"scores_3": None}, "is no table of n-grams"),
        ({"order": np.array("six")}, "is no table of n-grams"),
        ({"vocabulary": np.array(SIZE + 1)}, f"made for another model: {SIZE + 1} tokens, expected {SIZE}"),
        ({"scores_1": np.zeros(SIZE - 1, np.uint8)}, "damaged"),
        ({"offsets_2": np.array([0, 9], np.uint32)}, "damaged"),
        ({"offsets_3": np.zeros(0, np.uint32)}, "damaged"),
        ({"tokens_2": np.array([2, SIZE], np.uint16)}, "damaged"),
        ({"contexts_2": np.array([1.0])}, "damaged"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_table_that_is_none_or_of_another_model_is_refused_in_one_line(
    wrong: Mapping[str, NDArray[Any] | None], told: str, tmp_path: Path
) -> None:
    path = tmp_path / "language_model.npz"
    np.savez_compressed(path, **whole())  # type: ignore[arg-type]
    assert LanguageModel.load(path, SIZE).order == 3
    np.savez_compressed(path, **{k: v for k, v in {**whole(), **wrong}.items() if v is not None})  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=rf"^{re.escape(str(path))}: .*{re.escape(told)}.*; import the model again$"):
        LanguageModel.load(path, SIZE)


def test_contexts_that_are_too_narrow_for_their_tokens_are_refused() -> None:
    wide = arrays_of([9] * 100, {(1,): (3, {2: 1}), (1, 2): (0, {3: 1})})
    assert LanguageModel(wide, 100).order == 3
    with pytest.raises(ModelError, match="damaged"):
        LanguageModel({**wide, "contexts_3": wide["contexts_3"].astype(np.uint8)}, 100)


def test_a_file_that_is_no_archive_or_cut_off_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "language_model.npz"
    np.savez_compressed(path, **whole())  # type: ignore[arg-type]
    content = path.read_bytes()
    with io.BytesIO() as array:
        np.save(array, np.zeros(3))
        single = array.getvalue()
    for broken in (
        b"",
        b"no archive",
        single,
        content[: len(content) // 2],
        content[:200] + b"\0" * 40 + content[240:],
    ):
        path.write_bytes(broken)
        with pytest.raises(ModelError, match=r"import the model again$"):
            LanguageModel.load(path, SIZE)


# ---------------------------------------------------------------- the search under it


def by_brute_force(
    log_posteriors: NDArray[np.float32], model: LanguageModel, bonus: Mapping[str, float]
) -> dict[Context, float]:
    """Score of every token sequence: its log-likelihood, language model, and hotwords.

    The language model may help the tokens of a hotword that it has not read, but take nothing from them.
    """

    def is_unread(phrase: str) -> bool:
        return bonus[re.sub(" +", " ", phrase)] > 0 and not Vocabulary(TINY).is_read(model, re.sub(" +", " ", phrase))

    longest_first = "|".join(phrase.replace(" ", " +") for phrase in sorted(bonus, key=lambda phrase: -len(phrase)))
    scores = {}
    for sequence, likelihood in likelihoods(log_posteriors).items():
        text = "".join(TINY.pieces[label] for label in sequence).replace("▁", " ")
        found = list(re.finditer(rf"\b(?:{longest_first})\b", text)) if bonus else []
        score = likelihood + sum(bonus[re.sub(" +", " ", each[0])] for each in found)
        context, end = START, 0
        for token in sequence:
            start, end = end, end + len(TINY.pieces[token])
            given = model.weight * float(model.row(context)[token]) + model.bonus
            preferred = any(start < each.end() and each.start() < end for each in found if is_unread(each[0]))
            score += max(0.0, given) if preferred else given
            context = model.onward(context, token)
        scores[sequence] = score + model.weight * float(model.row(context)[BLANK])
    return scores


def test_a_hotword_is_read_if_each_of_its_tokens_was_read_after_the_two_before_it() -> None:
    model = LanguageModel(arrays_of([9] * SIZE, {(1,): (3, {2: 1}), (1, 2): (0, {4: 1}), (2,): (0, {1: 1})}), SIZE)
    words = Vocabulary(TINY)
    assert all(words.is_read(model, each) for each in ("a", "ab", "aba"))
    assert not any(words.is_read(model, each) for each in ("aa", "abb", "ab a", "b a"))


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    posteriors_of(TINY, 4),
    FIRST,
    LEVELS,
    st.floats(0, 2),
    st.dictionaries(st.sampled_from(list(TOKENS_OF)), st.floats(0.5, 3)),
)
def test_without_pruning_the_search_finds_the_best_of_all_token_sequences(
    log_posteriors: NDArray[np.float32],
    first: list[int],
    levels: Mapping[Context, tuple[int, Mapping[int, int]]],
    bonus: float,
    weights: Mapping[str, float],
) -> None:
    model = LanguageModel(arrays_of(first, levels, 2.0, bonus), SIZE)
    worth = {phrase: UNDER_LANGUAGE_MODEL * weight * TOKENS_OF[phrase] for phrase, weight in weights.items()}
    scores = by_brute_force(log_posteriors, model, worth)
    hotwords = Hotwords([Hotword(phrase, weight) for phrase, weight in weights.items()], TINY, model)
    decoder = TextDecoder(hotwords, TINY, model, beam=10**6, margin=math.inf)
    tokens, score = decoder.search(log_posteriors)
    assert score == pytest.approx(max(scores.values()), abs=1e-3)
    assert scores[tuple(tokens)] == pytest.approx(score, abs=1e-3)


@hypothesis_settings(max_examples=100, deadline=None)
@given(posteriors_of(TINY, 8), FIRST, LEVELS)
def test_where_the_greedy_text_is_empty_nothing_is_written(
    log_posteriors: NDArray[np.float32],
    first: list[int],
    levels: Mapping[Context, tuple[int, Mapping[int, int]]],
) -> None:
    log_posteriors[:, BLANK] = 1.0
    recognition = Recognition(transcribe(log_softmax(log_posteriors), ["en", "", ""], TINY), log_posteriors)
    model = LanguageModel(arrays_of(first, levels, 0.5, 5.0), SIZE)
    assert TextDecoder(Hotwords((), TINY), TINY, model).apply(recognition) is recognition


# ---------------------------------------------------------------- the one that ships


@pytest.fixture(scope="module")
def shipped() -> LanguageModel:
    files = locate(EMBEDDED)
    assert files.language_model is not None
    return LanguageModel.load(files.language_model, len(TokenTable.parse(files.tokens.read_text(encoding="utf-8"))))


def test_the_rows_of_the_shipped_table_are_probabilities(shipped: LanguageModel) -> None:
    rng = np.random.default_rng(0)
    context = START
    for _ in range(300):
        row = np.exp(shipped.row(context).astype(np.float64))
        assert row.sum() == pytest.approx(1.0, abs=0.05)  # each is stored to a sixteenth of a nat
        context = shipped.onward(context, int(rng.choice(len(row), p=row / row.sum())))
        context = START if context[-1] == BLANK else context


def test_the_daemon_writes_likely_words_and_can_be_told_not_to() -> None:
    options = Settings.model_validate({"commands": {"grammars": []}})
    plain = options.model_copy(update={"model": options.model.model_copy(update={"language_model": False})})
    said, as_heard = Engine.build(options), Engine.build(plain)
    assert as_heard.decoder is None
    changed = []
    for path in sorted(bundled("recordings").glob("*.flac")):
        utterance = Utterance(path.stem, "file", 0, read_file(path), 0)
        mended, heard = said.understand(utterance, final=True), as_heard.understand(utterance, final=True)
        assert (mended.transcript is None) == (heard.transcript is None)
        if (
            mended.transcript is not None
            and heard.transcript is not None
            and mended.transcript.text != heard.transcript.text
        ):
            changed.append((heard.transcript.text, mended.transcript.text))
    print(changed)
    assert changed
