from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from edge_asr import settings
from edge_asr.audio import read_file
from edge_asr.engine import Engine
from edge_asr.events import Token, Transcript
from edge_asr.hotwords import Hotword, HotwordError, Hotwords, load
from edge_asr.inference import load_tokens
from edge_asr.model_store import bundled, locate
from edge_asr.posteriors import BLANK, FRAME_S, Recognition, TokenTable, greedy, log_softmax, transcribe
from edge_asr.text_decoding import TextDecoder, aligned, best_tokens
from tests.alignments import TINY, TOKENS_OF, Floats, likelihoods, posteriors_of

TABLE = TokenTable(
    (
        *("<blank>", "<unk>", "▁", "▁the", "▁b", "ear", "ing", "▁r", "s", "▁con", "vey", "or", "▁belt", "elt", "▁a"),
        *(
            "▁main",
            "▁c",
            "c",
            "b",
            "▁RC",
            "CB",
            "r",
            "号",
            "三",
            "3",
            "▁x",
            "k",
            "▁forty",
            "▁seven",
            "机",
            "er",
            "▁drum",
        ),
    )
)


def heard(*frames: str | Mapping[str, float], table: TokenTable = TABLE) -> Recognition:
    """A recognizer's view of frames with one token each, or with several and their probabilities; blanks between."""
    rows = []
    for frame in frames:
        shares = {frame: 0.98} if isinstance(frame, str) else frame
        row = np.full(len(table), 1e-9)
        for piece, share in shares.items():
            row[table.pieces.index(piece)] = share
        blank = np.full(len(table), 1e-9)
        blank[BLANK] = 0.99
        rows += [row, blank]
    log_posteriors = log_softmax(np.log(np.array(rows)).astype(np.float32))
    return Recognition(transcribe(log_posteriors, ["en", "NEUTRAL", "Speech"], table), log_posteriors)


def decoder(hotwords: Iterable[Hotword], table: TokenTable = TABLE) -> TextDecoder:
    return TextDecoder(Hotwords(hotwords, table), table)


def listed(*phrases: str, weight: float = 1.0) -> TextDecoder:
    return decoder(Hotword(phrase, weight) for phrase in phrases)


def text_of(hotwords: TextDecoder, *frames: str | Mapping[str, float]) -> str:
    return hotwords.apply(heard(*frames)).transcript.text


# ---------------------------------------------------------------- the law, against brute force

LETTERS = TokenTable(("<blank>", "▁", "a", "b", "1", "三", "号"))


def by_brute_force(
    log_posteriors: Floats, table: TokenTable, bonus: Mapping[str, float]
) -> dict[tuple[int, ...], float]:
    """Score of every token sequence: its log-likelihood and the bonus of its text."""
    longest_first = "|".join(sorted(bonus, key=lambda phrase: -len(phrase)))
    scores = {}
    for sequence, likelihood in likelihoods(log_posteriors).items():
        text = "".join(table.pieces[label] for label in sequence).replace("▁", " ")
        found = re.findall(rf"\b(?:{longest_first})\b", re.sub(" +", " ", text))
        scores[sequence] = likelihood + sum(bonus[phrase] for phrase in found)
    return scores


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    posteriors_of(TINY, 4),
    st.dictionaries(st.sampled_from(list(TOKENS_OF)), st.floats(0, 3), min_size=1),
)
def test_without_pruning_the_search_finds_the_best_of_all_token_sequences(
    log_posteriors: Floats, weights: Mapping[str, float]
) -> None:
    bonus = {phrase: weight * TOKENS_OF[phrase] for phrase, weight in weights.items()}
    scores = by_brute_force(log_posteriors, TINY, bonus)
    hotwords = Hotwords([Hotword(phrase, weight) for phrase, weight in weights.items()], TINY)
    decoder = TextDecoder(hotwords, TINY, beam=10**6, margin=math.inf)
    tokens, score = decoder.search(log_posteriors)
    assert score == pytest.approx(max(scores.values()), abs=1e-3)
    assert scores[tuple(tokens)] == pytest.approx(score, abs=1e-3)


def written_as(text: str) -> Recognition:
    """What an engine gives that keeps its posteriors to itself."""
    tokens = tuple(Token(char, 0.0) for char in text)
    return Recognition(Transcript(text.strip(), "en", "NEUTRAL", "Speech", 0.0, tokens), None)


def pattern_of(phrase: str) -> tuple[int, str]:
    """Length and regular expression: gaps part words, and may but need not stand beside an East Asian character."""
    units = re.findall(r"[三号]|[ab1]+", phrase)
    wide = [left in "三号" or right in "三号" for left, right in itertools.pairwise(units)]
    inner = units[0] + "".join(
        (r"[ '-]*" if free else r"[ '-]+") + unit for free, unit in zip(wide, units[1:], strict=True)
    )
    before = "" if units[0] in "三号" else r"(?<![ab1])"
    after = "" if units[-1] in "三号" else r"(?![ab1])"
    return sum(map(len, units)) + wide.count(False), before + inner + after


@hypothesis_settings(max_examples=300)
@given(
    st.text("ab1B -'三号", max_size=14),
    st.sets(st.text("ab1三号 ", min_size=1, max_size=4).filter(str.strip), min_size=1, max_size=4),
)
def test_hotwords_are_found_leftmost_longest_and_between_word_boundaries(text: str, phrases: set[str]) -> None:
    longest_first = "|".join(pattern for _, pattern in sorted(map(pattern_of, phrases), reverse=True))
    hotwords = decoder([Hotword("@", 1.0, (phrase,)) for phrase in phrases], LETTERS)
    expected = re.sub(longest_first, "@", text, flags=re.IGNORECASE)
    assert hotwords.apply(written_as(text)).transcript.text == expected.strip()


@hypothesis_settings(max_examples=100, deadline=None)
@given(posteriors_of(TINY, 8))
def test_where_no_hotword_is_heard_the_greedy_result_stays_to_the_token(log_posteriors: Floats) -> None:
    recognition = Recognition(transcribe(log_posteriors, ["en", "", ""], TINY), log_posteriors)
    for hotwords in (decoder([], TINY), decoder([Hotword("b b b b b b b", 1.0)], TINY)):
        assert hotwords.apply(recognition) is recognition


# ---------------------------------------------------------------- what others got wrong

DOUBTFUL_ELT = {"elt": 0.1, "s": 0.85}


def test_a_hotword_is_preferred_to_a_likelier_text() -> None:
    frames = ("▁the", "▁con", "vey", "or", "▁b", DOUBTFUL_ELT)
    assert heard(*frames).transcript.text == "the conveyor bs"
    assert text_of(listed("conveyor belt"), *frames) == "the conveyor belt"


def test_a_hotword_does_not_fill_a_pause() -> None:
    pause = [{"<blank>": 0.6, "▁belt": 0.4}] * 3
    silence: list[str | dict[str, float]] = ["<blank>"] * 3
    text = text_of(listed("belt", weight=20.0), "▁the", "▁drum", *silence, *pause, *silence, "s")
    assert text == "the drums"
    assert text_of(listed("belt", weight=20.0), "▁the", "▁drum", *pause) == "the drum belt"


@pytest.mark.parametrize("spread", [0.1, 1.5])
def test_frames_spread_over_the_whole_vocabulary_hear_nothing_and_hide_nothing(spread: float) -> None:
    table = TokenTable((*TABLE.pieces, *(f"filler{i}" for i in range(20_000))))
    logits = np.random.default_rng(0).normal(0, spread, (40, len(table)))
    noise = log_softmax(logits.astype(np.float32))
    assert noise.max() < math.log(0.02)
    eager = decoder([Hotword("belt", 20.0)], table)
    alone = Recognition(transcribe(noise, ["en", "", ""], table), noise)
    assert eager.apply(alone) is alone
    speech = heard("▁the", "▁drum", "▁b", DOUBTFUL_ELT, table=table).log_posteriors
    assert speech is not None
    between = np.concatenate([noise, speech, noise])
    found = eager.apply(Recognition(transcribe(between, ["en", "", ""], table), between))
    assert found.transcript.text.endswith("the drum belt")


def test_weight_zero_corrects_the_spelling_and_nothing_else() -> None:
    hotwords = listed("Conveyor Belt", weight=0.0)
    assert text_of(hotwords, "▁con", "vey", "or", "▁b", DOUBTFUL_ELT) == "conveyor bs"
    assert text_of(hotwords, "▁con", "vey", "or", "▁belt") == "Conveyor Belt"


@pytest.mark.parametrize("rest", [(), ({"▁drum": 0.5, "▁main": 0.5},), ("s",)], ids=["end", "break", "longer word"])
def test_a_match_that_is_not_completed_is_worth_nothing(rest: tuple[str | dict[str, float], ...]) -> None:
    frames = ("▁the", {"▁con": 0.4, "▁c": 0.6}, "vey", "or", *rest)
    assert text_of(listed("conveyor belt", weight=3.0), *frames) == heard(*frames).transcript.text


def test_a_hotword_that_begins_a_longer_one_works_beside_it() -> None:
    hotwords = listed("Conveyor", "Conveyor Belt Drum")
    assert text_of(hotwords, "▁con", "vey", "or") == "Conveyor"
    assert text_of(hotwords, "▁con", "vey", "or", "▁belt") == "Conveyor belt"
    assert text_of(hotwords, "▁con", "vey", "or", "▁belt", "▁drum") == "Conveyor Belt Drum"
    assert text_of(hotwords, "▁con", "vey", "or", "▁belt", "▁drum", "s") == "Conveyor belt drums"


def test_a_hotword_does_not_fire_inside_another_word() -> None:
    frames = ("▁b", "ear", {"ing": 0.5, "s": 0.49})
    assert text_of(listed("EAR"), *frames) == "bearing"
    assert text_of(listed("Bear", "Ing", weight=2.0), *frames) == "bearing"


def test_each_occurrence_earns_its_bonus_once_however_long_it_sounds() -> None:
    hotwords = listed("belt", weight=4.0)
    once, twice = [heard(*frames).log_posteriors for frames in (("▁belt",), ("▁belt", "▁belt"))]
    held = heard("▁belt").log_posteriors
    assert once is not None
    assert twice is not None
    assert held is not None
    held = held[[0, 0, 0, 1]]
    plain = listed("belt", weight=0.0)
    for log_posteriors, count in ((once, 1), (twice, 2), (held, 1)):
        gained = hotwords.search(log_posteriors)[1] - plain.search(log_posteriors)[1]
        assert gained == pytest.approx(4.0 * count, abs=1e-3)


@pytest.mark.parametrize(
    "frames",
    [
        ("3", "号", "▁RC", "CB"),
        ("3", "号", "▁", "r", "c", "c", "b"),
        ("三", "号", "▁r", "▁c", "▁c", "▁b"),
        ("三", "号", "r", "c", "c", "b"),
        ("▁", "3", "▁", "号", "▁r", "c", "c", "b"),
    ],
    ids=" ".join,
)
def test_mixed_scripts_digits_and_capitals_are_heard_in_every_spelling(frames: tuple[str, ...]) -> None:
    assert text_of(listed("3号 RCCB"), *frames, "机") == "3号 RCCB机"
    assert text_of(listed("3号RCCB"), *frames, "机") == "3号RCCB机"


def test_a_product_code_is_heard_as_it_is_said() -> None:
    assert text_of(listed("XK-47"), "▁the", "▁x", "k", "▁forty", "▁seven", "▁drum") == "the XK-47 drum"
    assert text_of(listed("XK-47"), "▁the", "▁x", "▁", "k", "▁forty", "▁seven") == "the XK-47"
    assert text_of(listed("XK47"), "▁the", "▁x", "▁", "k", "▁forty", "▁seven") == "the XK47"


def test_what_the_model_writes_instead_can_be_listed() -> None:
    hotwords = decoder([Hotword("Kerr", 1.0, ("c er",))])
    assert text_of(hotwords, "▁the", "▁c", "▁", "er") == "the Kerr"


# ---------------------------------------------------------------- the transcript


def test_a_hotword_is_one_token_that_starts_when_it_is_said() -> None:
    transcript = listed("RCCB").apply(heard("▁the", "▁r", "c", {"c": 0.2, "s": 0.8}, "b", "▁drum")).transcript
    assert transcript.text == "the RCCB drum"
    assert transcript.tokens == (
        Token(" the", 0.0),
        Token(" RCCB", round(2 * FRAME_S, 3)),
        Token(" drum", round(10 * FRAME_S, 3)),
    )
    expected = math.exp(np.mean(np.log([1, 1, 1, 0.2, 1, 1])))
    assert transcript.confidence == pytest.approx(expected, rel=1e-3)


@hypothesis_settings(max_examples=100, deadline=None)
@given(posteriors_of(TINY, 8))
def test_the_alignment_of_the_greedy_tokens_is_the_greedy_path(log_posteriors: Floats) -> None:
    log_posteriors = log_posteriors + np.random.default_rng(0).uniform(0, 1e-2, log_posteriors.shape).astype(np.float32)
    runs = greedy(log_posteriors.argmax(axis=1))
    assert aligned(log_posteriors, [token for token, _, _ in runs]) == [(start, end) for _, start, end in runs]


@pytest.mark.parametrize("size", [5, 100, 300, 5011])
def test_the_best_tokens_of_a_frame_are_found(size: int) -> None:
    log_posteriors = np.random.default_rng(size).standard_normal((7, size), dtype=np.float32)
    found = np.take_along_axis(log_posteriors, best_tokens(log_posteriors, 4), axis=1)
    assert np.array_equal(np.sort(found), np.sort(log_posteriors)[:, -4:])


# ---------------------------------------------------------------- lists


def test_a_list_is_read_with_its_own_weights_and_the_settings_win(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text(
        "\ufeff# line three\nRCCB\n\nconveyor belt :2.5\n输送带:0\n轴承\uff1a3\n12:05 :4\n", encoding="utf-8"
    )
    options = settings.Hotwords.model_validate(
        {"file": file, "weight": 1.5, "phrases": [{"phrase": "RCCB", "weight": 4, "spoken": ["our ccb"]}, "MCB"]}
    )
    assert load(options) == (
        Hotword("RCCB", 4.0, ("our ccb",)),
        Hotword("conveyor belt", 2.5),
        Hotword("输送带", 0.0),
        Hotword("轴承", 3.0),
        Hotword("12:05", 4.0),
        Hotword("MCB", 1.5),
    )


def test_every_bad_line_of_a_list_is_named(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("RCCB :heavy\nMCB\n:3\nbelt:21\n12:05\n", encoding="utf-8")
    with pytest.raises(HotwordError) as raised:
        load(settings.Hotwords(file=file))
    assert [line.split(" is not ")[0] for line in str(raised.value).splitlines()] == [
        f"{file}: line 1: 'RCCB :heavy'",
        f"{file}: line 3: ':3'",
        f"{file}: line 4: 'belt:21'",
        f"{file}: line 5: '12:05'",
    ]


def test_a_list_that_is_not_there_and_a_word_without_letters_are_errors(tmp_path: Path) -> None:
    with pytest.raises(HotwordError, match=r"none\.txt: cannot be read \(No such file"):
        load(settings.Hotwords(file=tmp_path / "none.txt"))
    with pytest.raises(HotwordError, match="'!!' holds no letter or digit"):
        load(settings.Hotwords.model_validate({"phrases": ["!!"]}))


def test_hotwords_that_the_model_cannot_write_are_reported() -> None:
    listed = [Hotword(phrase, 1.0) for phrase in ("RCCB", "Zylinder", "3号", "4号")]
    assert Hotwords(listed, TABLE).unspellable == ("Zylinder", "4号")


def test_a_hotword_that_stands_twice_in_other_letters_is_no_word_that_cannot_be_written() -> None:
    twice = Hotwords([Hotword("Belt", 1.0), Hotword("belt", 2.0)], TABLE)
    assert twice.unspellable == ()
    assert twice.found("the BELT") == [(4, 8, "belt")], "the later one counts"


# ---------------------------------------------------------------- the product


def test_a_bundled_recording_is_transcribed_in_the_spelling_of_the_site() -> None:
    recording = next(bundled("recordings").glob("*rccb*"))
    options = settings.Settings.model_validate({"hotwords": {"phrases": ["RCCB"]}})
    (with_list,) = Engine.build(options).hear(read_file(recording), options.vad)
    (without,) = Engine.build(settings.Settings()).hear(read_file(recording), options.vad)
    assert with_list.transcript is not None
    assert without.transcript is not None
    assert "RCCB" in with_list.transcript.text.split()
    assert "RCCB" not in without.transcript.text.split()
    assert with_list.decision == without.decision


def test_the_embedded_model_spells_words_it_was_never_taught() -> None:
    files = locate("micro-en")
    table = load_tokens(files.tokens)
    assert Hotwords([Hotword(word, 1.0) for word in ("Kowalski", "XK-47", "flux capacitor")], table).unspellable == ()
