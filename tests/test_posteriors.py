"""What a CTC model's output means: the token table, log-softmax, greedy collapse, transcripts with confidence."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_asr.events import Token
from edge_asr.model_store import bundled
from edge_asr.posteriors import BLANK, TokenTable, greedy, log_softmax, transcribe

SHARED = Path(__file__).parents[2] / "shared" / "data"

TABLE = TokenTable.parse("<blank> 0\n<unk> 1\n\u2581 2\n\u2581go 3\nGO 4\n<|en|> 5\n停 6\n< 7\n")


# ---------------------------------------------------------------- the token table


def test_a_table_keeps_spaces_inside_pieces_and_any_script() -> None:
    assert TokenTable.parse("<blank> 0\na b 1\n 2\n停 3").pieces == ("<blank>", "a b", "", "停")


def test_a_table_reads_lines_of_windows_too() -> None:
    assert TokenTable.parse("<blank> 0\r\na 1\r\n").pieces == ("<blank>", "a")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("<blank> 0\na 2\n", "line 2: 'a 2' is not `piece 1`"),
        ("<blank> 0\na 0\n", "line 2: 'a 0' is not `piece 1`"),
        ("<blank> 0\n\nb 1\n", "line 2: '' is not `piece 1`"),
        ("<blank> 0\na\t-1.5\n", "line 2: 'a\\t-1.5' is not `piece 1`"),
        ("<blank> 0\na ¹\n", "line 2: 'a ¹' is not `piece 1`"),
        ("<blank> 0\na 1 \n", "line 2: 'a 1 ' is not `piece 1`"),
        ("1 <blank>\n", "line 1: '1 <blank>' is not `piece 0`"),
        ("x" * 500, f"line 1: '{'x' * 40}' is not `piece 0`"),
        ("<blank> 0\na " + "1" * 5000, "line 2"),
    ],
)
def test_the_first_bad_line_is_named(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match="line") as caught:
        TokenTable.parse(text)
    assert complaint in str(caught.value)


@given(st.text())
def test_no_text_whatsoever_does_anything_but_parse_or_name_a_line(text: str) -> None:
    try:
        table = TokenTable.parse(text)
    except ValueError as error:
        assert str(error).startswith("line ")  # noqa: PT017 - most texts are no table, a few are
    else:
        assert "".join(f"{piece} {i}\n" for i, piece in enumerate(table.pieces)).split() == text.split()


def test_what_prints_nothing_spells_nothing() -> None:
    assert TABLE.ids_by_spelling == {"\u2581": (2,), "\u2581go": (3,), "go": (4,), "停": (6,), "<": (7,)}
    assert TABLE.longest_piece == 3


def test_spellings_ignore_case_and_text_does_not() -> None:
    assert TokenTable.parse("<blank> 0\nA 1\na 2").ids_by_spelling == {"a": (1, 2)}
    assert TABLE.text([3, 4, 2, 6]) == "goGO 停"


def test_only_tags_are_tags() -> None:
    assert [TABLE.tag(i) for i in range(len(TABLE))] == ["", "", "", "", "", "en", "", ""]


@pytest.mark.parametrize(
    "path", [bundled("models") / "micro-en", SHARED / "sensevoice-vocabulary"], ids=lambda p: p.name
)
def test_real_vocabularies_are_read(path: Path) -> None:
    if not path.is_dir():
        pytest.skip("not on this machine")
    text = (path / "tokens.txt").read_text(encoding="utf-8")
    table = TokenTable.parse(text)
    assert len(table) == text.count("\n")
    assert {table.tag(i) for i in range(len(table))} >= {"en", "zh", "nospeech", "withitn", "HAPPY", "BGM"}


# ---------------------------------------------------------------- the rows

LOGITS = hnp.arrays(
    np.float32, st.tuples(st.integers(0, 6), st.integers(2, 5)), elements=st.floats(-300, 300, width=32)
)


@given(LOGITS)
def test_log_softmax_makes_every_row_a_distribution_and_keeps_its_ratios(logits: np.ndarray[tuple[int, int]]) -> None:
    before = logits.copy()
    rows = log_softmax(logits)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(logits, before)
    np.testing.assert_allclose(np.exp(rows.astype(np.float64)).sum(axis=1), 1, rtol=1e-4)
    np.testing.assert_allclose(rows - rows[:, :1], logits - logits[:, :1], atol=1e-3)


@given(LOGITS)
def test_log_softmax_of_log_posteriors_changes_nothing(logits: np.ndarray[tuple[int, int]]) -> None:
    once = log_softmax(logits)
    np.testing.assert_allclose(log_softmax(once), once, atol=1e-4)


# ---------------------------------------------------------------- greedy collapse


@given(st.lists(st.integers(0, 3), max_size=30))
def test_greedy_is_merge_repeats_then_drop_blanks(best: list[int]) -> None:
    groups = [(token, list(group)) for token, group in itertools.groupby(enumerate(best), key=lambda pair: pair[1])]
    expected = [(token, group[0][0], group[-1][0] + 1) for token, group in groups if token != BLANK]
    assert greedy(np.array(best, np.int64)) == expected


def posteriors(rows: list[dict[int, float]]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Rows of token -> probability; what is left is spread over the rest."""
    made = np.full((len(rows), len(TABLE)), 1e-6, np.float32)
    for row, chances in zip(made, rows, strict=True):
        for token, chance in chances.items():
            row[token] = chance
    return np.log(made)


def test_a_transcript_has_text_tags_times_and_the_geometric_mean_of_each_tokens_best_posterior() -> None:
    rows = [{0: 0.9}, {3: 0.5, 0: 0.4}, {3: 0.8, 0: 0.1}, {0: 0.9}, {6: 0.6, 0: 0.3}]
    heard = transcribe(posteriors(rows), ["zh", "HAPPY", "Speech"], TABLE)
    assert (heard.text, heard.language, heard.emotion, heard.event) == ("go停", "zh", "HAPPY", "Speech")
    assert heard.tokens == (Token(" go", 0.06), Token("停", 0.24))
    assert heard.confidence == pytest.approx(math.sqrt(0.8 * 0.6), rel=1e-5)


def test_a_token_said_twice_needs_a_blank_between() -> None:
    assert transcribe(posteriors([{6: 0.9}, {6: 0.9}]), ["", "", ""], TABLE).text == "停"
    assert transcribe(posteriors([{6: 0.9}, {0: 0.9}, {6: 0.9}]), ["", "", ""], TABLE).text == "停停"


@pytest.mark.parametrize("rows", [[], [{0: 0.9}] * 3])
def test_where_nothing_is_emitted_there_is_no_text_and_no_confidence(rows: list[dict[int, float]]) -> None:
    heard = transcribe(posteriors(rows), ["nospeech", "EMO_UNKNOWN", "BGM"], TABLE)
    assert (heard.text, heard.tokens, heard.confidence) == ("", (), 0.0)
