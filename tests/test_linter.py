"""What the linter must find in a grammar before the shop floor does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edge_asr import inference, model_store
from edge_asr.linter import lint, sounds

TABLE = inference.load_tokens(model_store.locate("micro-en").tokens)
GOOD = """\
language: en
intents:
  Start: {sentences: ["start [the] {machine}"]}
slots:
  machine: {values: [press, mixer]}
"""


def remarks(tmp_path: Path, text: str) -> list[tuple[str, str]]:
    path = tmp_path / "g.yaml"
    path.write_text(text, encoding="utf-8")
    return [(remark.severity, remark.text) for remark in lint(path, TABLE)]


def test_a_clean_grammar_gives_no_remark(tmp_path: Path) -> None:
    assert remarks(tmp_path, GOOD) == []


@pytest.mark.parametrize(
    ("old", "new", "severity", "words"),
    [
        (
            *("press, mixer", "press, 压机", "error"),
            "2 words are never heard, the model cannot write them: 压, 机; reword them, or activate a model for en",
        ),
        (
            "press, mixer",
            "filler, chiller, cheller",
            "warning",
            "'chiller' (chiller) and 'cheller' (cheller) sound alike",
        ),
        ("press, mixer", "press, {other: [press, mixer]}", "error", "'press' means other and press; leave"),
        ("slots:", "rules: {please: please}\nslots:", "warning", "rules.please is used nowhere; remove it, or"),
        ("slots:", "slots:\n  colour: {values: [red]}", "warning", "slots.colour is used nowhere"),
        (
            *("slots:", "  Run: {sentences: ['start [the] (press | lift)']}\nslots:", "warning"),
            "has two meanings: Run() or Start(machine=press); take it out of one",
        ),
        (
            *("slots:", "  Run: {sentences: [start the press]}\nslots:", "error"),
            "Run: 'start the press' is never understood: 'start the press' is Run() or Start(machine=press); reword",
        ),
        (
            *("slots:", "  Run: {sentences: ['go [now] 压', go]}\nslots:", "error"),
            "intents.Run: 'go [now] 压' is never understood: the model cannot write it; reword it",
        ),
        (
            *("slots:", "  A: {sentences: ['raise [the] {machine}']}\n  B: {sentences: ['raze {machine}']}\nslots:"),
            *("warning", "'raise' (intents.A) and 'raze' (intents.B) sound alike in the same place; choose another"),
        ),
        (
            *(
                "slots:",
                "  Set: {sentences: ['set {a}', 'set {b}']}\nslots:\n  a: {range: [0, 9]}\n  b: {range: [9, 19]}",
            ),
            *("warning", "'set nine' has two meanings: Set(a=9) or Set(b=9); take it out of one"),
        ),
        (
            *("slots:", "  Confirm: {sentences: ['[please] confirm'], min_confidence: 0.6}\nslots:", "warning"),
            "intents.Confirm: 'confirm' is too short to be surer than about 0.54, wanted is 0.6; lower",
        ),
        ("slots:", "tests: [{say: go, intent: Start}]\nslots:", "error", "test 'go' is read as no command"),
    ],
)
def test_each_flaw_is_found_and_named(tmp_path: Path, old: str, new: str, severity: str, words: str) -> None:
    found = remarks(tmp_path, GOOD.replace(old, new))
    assert any(kind == severity and words in text for kind, text in found), found


def test_every_remark_is_one_line_with_what_to_do_and_nothing_is_said_twice(tmp_path: Path) -> None:
    several = "press, {other: [press]}, 压, chiller, cheller"
    found = remarks(tmp_path, GOOD.replace("press, mixer", several).replace("slots:", "rules: {x: x}\nslots:"))
    assert len(found) == 4
    assert all(re.fullmatch(r"[^\n]+; (reword|leave|choose|remove|take) [^\n]+", text) for _, text in found), found


@pytest.mark.parametrize("name", ["factory.en", "coffee.en", "factory.zh"])
def test_nothing_shipped_is_unreachable_or_means_two_things(name: str) -> None:
    found = list(lint(model_store.bundled("grammars") / f"{name}.yaml"))
    assert [remark for remark in found if "sound alike" not in remark.text] == []


def test_a_model_for_another_language_is_one_line_and_not_one_for_each_sentence() -> None:
    [remark] = lint(model_store.bundled("grammars") / "factory.zh.yaml", TABLE)
    assert remark.severity == "error"
    assert remark.text.endswith("; reword them, or activate a model for zh")


@pytest.mark.parametrize(
    ("sentence", "before"),
    [
        ("book {count} {line}", "{count}"),
        ("book {count} [pieces] {line}", "{count}"),
        ("book on press two {line}", "'two'"),
        ("book {machine} {line}", "'two'"),
    ],
)
def test_numbers_in_a_row_are_named_once(tmp_path: Path, sentence: str, before: str) -> None:
    numbers = "\n  count: {range: [1, 100]}\n  line: {range: [1, 9]}\n"
    text = GOOD.replace("press, mixer", "press two, mixer") + numbers.strip("\n") + "\n"
    apart = text.replace("slots:", "  Count: {sentences: ['book {count} on {line}']}\nslots:")
    assert not [each for _, each in remarks(tmp_path, apart) if "right behind" in each]
    joined = text.replace("slots:", f"  Count: {{sentences: ['{sentence}']}}\nslots:")
    [found] = [each for _, each in remarks(tmp_path, joined) if "right behind" in each]
    assert found.startswith(f"{{line}} may stand right behind another number, {before}: ")
    assert found.endswith("; put a word between them")


def test_numbered_names_are_no_sound_alikes(tmp_path: Path) -> None:
    assert remarks(tmp_path, GOOD.replace("press, mixer", "line three, line four")) == []


def test_names_that_are_matched_by_sound_are_compared_as_they_will_be(tmp_path: Path) -> None:
    by_words = GOOD.replace("press, mixer", "kovalsky, kowalski, left loader, right loader")
    found = remarks(tmp_path, by_words.replace("{values", "{match: sound, values"))
    assert [text for _, text in found if "sound alike" in text] == [
        "slots.machine: 'kovalsky' (kovalsky) and 'kowalski' (kowalski) sound alike, 0.94; choose other words for one"
    ]
    people = "language: zh\nintents: {Call: {sentences: ['呼叫{who}']}}\n"
    slots = "slots: {who: {match: sound, values: [张伟, 章伟, 王芳, 甲泵, 乙泵]}}\n"
    assert [text for _, text in remarks(tmp_path, people + slots) if "alike" in text] == [
        "slots.who: '张伟' (张伟) and '章伟' (章伟) sound alike, 1.00; choose other words for one"
    ]


def test_sound_ignores_spelling_and_keeps_tones() -> None:
    assert sounds("night", "en") == sounds("knight", "en")
    assert sounds("四号", "zh") != sounds("十号", "zh")
    assert sounds("启动", "zh") == sounds("起动", "zh")
