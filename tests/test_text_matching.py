"""Texts as sentences of grammars: word for word first, then names by their sound, and nothing else by its sound."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_asr import model_store, settings
from edge_asr.audio import read_file
from edge_asr.engine import Engine, Vocabulary
from edge_asr.events import Command, Rejection
from edge_asr.grammar import CommandGraph, Grammar, GrammarError, compile_graph
from edge_asr.numbers import Language
from edge_asr.text_matching import BY_SOUND, NEAR, TextMatcher

FACTORY: Mapping[str, Any] = {
    "language": "en",
    "intents": {
        "Start": {"sentences": ["start [the] {machine} [now]"]},
        "Stop": {"sentences": ["stop [the] {machine} [now]"]},
        "SetSpeed": {"sentences": ["set [the] {machine} speed to {speed}"]},
        "Call": {"sentences": ["call {colleague} to [the] {machine:place}", "call {colleague}"]},
        "Gate": {"sentences": ["open gate {gate}"]},
        "Colour": {"sentences": ["paint it {colour}"]},
    },
    "slots": {
        "machine": {
            "match": "sound",
            "values": [
                *("conveyor", "palletizer", "left robot", "right robot", "RCCB", {"mixer": ["mixer", "stirrer"]}),
                *({"line-3": "line three"}, {"line-4": "line four"}, "pump b", "pump d"),
            ],
        },
        "colleague": {"match": "sound", "values": ["kowalski", "kowalska", "meyer", "papadopoulos"]},
        "colour": {"values": ["yellow", "white"]},
        "speed": {"range": [0, 400], "step": 10},
        "gate": {"digits": 1},
    },
}
PLANTS: Mapping[Language, tuple[str, list[Any]]] = {
    "zh": ("启动{name}", ["传送带", "张伟", "王芳", "三号压机", "四号压机", "加速泵", "减速泵", "上料机", "下料机"]),
    "yue": ("開{name}", ["輸送帶", "張偉", "梁朝偉", "三號壓機"]),
    "ja": ("{name}を起動", ["コンベア", "ミキサー", "サーボ", {"tanaka": ["田中", "たなか"]}, "三号機", "四号機"]),
    "ko": ("{name} 시작", ["컨베이어", "믹서", "찌개", "삼호기", "사호기"]),
}


@functools.cache
def matcher(language: Language = "en") -> TextMatcher:
    return TextMatcher(graph(language))


@functools.cache
def graph(language: Language = "en") -> CommandGraph:
    if language == "en":
        return compile_graph({"en.yaml": Grammar.model_validate(FACTORY)})
    sentence, names = PLANTS[language]
    plant = {
        "language": language,
        "intents": {"Start": {"sentences": [sentence]}},
        "slots": {"name": {"match": "sound", "values": names}},
    }
    return compile_graph({"plant.yaml": Grammar.model_validate(plant)})


def readings(text: str, language: Language = "en") -> list[str]:
    return [str(reading) for reading, _ in matcher(language).understood(text)]


@pytest.mark.parametrize(
    ("language", "text", "reading"),
    [
        *(("en", "start the conveyer now", "Start(machine=conveyor)"),),
        *(("en", "stop the pallet iser", "Stop(machine=palletizer)"),),
        *(("en", "start lion three", "Start(machine=line-3)"), ("en", "start lion 3", "Start(machine=line-3)")),
        *(("en", "start the stirer", "Start(machine=mixer)"), ("en", "stop left robbot", "Stop(machine=left robot)")),
        *(("en", "set conveyer speed to 120", "SetSpeed(machine=conveyor, speed=120)"),),
        *(("en", "call papadopulos to the conveyer", "Call(colleague=papadopoulos, place=conveyor)"),),
        *(("en", "call meier", "Call(colleague=meyer)"),),
        *(("zh", "启动章伟", "Start(name=张伟)"), ("zh", "启动船送带", "Start(name=传送带)")),
        *(("zh", "启动3号鸭机", "Start(name=三号压机)"), ("zh", "启动加速蹦", "Start(name=加速泵)")),
        *(("yue", "開章偉", "Start(name=張偉)"), ("yue", "開涼朝偉", "Start(name=梁朝偉)")),
        *(("ja", "コンベヤを起動", "Start(name=コンベア)"), ("ja", "タナカを起動", "Start(name=tanaka)")),
        *(("ja", "ミキサを起動", "Start(name=ミキサー)"),),
        *(("ko", "콘베이어 시작", "Start(name=컨베이어)"), ("ko", "찌게 시작", "Start(name=찌개)")),
    ],
)
def test_a_name_is_known_by_its_sound(language: Language, text: str, reading: str) -> None:
    assert matcher(language).readings(text) == []
    [(found, confidence)] = matcher(language).understood(text)
    assert str(found) == reading
    assert NEAR * BY_SOUND**2 <= confidence <= BY_SOUND


@pytest.mark.parametrize(
    ("language", "text"),
    [
        *(("en", "stat the conveyor"), ("en", "strat the conveyer"), ("en", "do not start the conveyer")),
        *(("en", "start not conveyer"), ("en", "start line free"), ("en", "start line for"), ("en", "start line five")),
        *(("en", "start pump v"), ("en", "start pump p"), ("en", "start light robot"), ("en", "start rcbo")),
        *(("en", "open gate tree"), ("en", "open gate for"), ("en", "paint it wite"), ("en", "paint it yello")),
        *(("en", "set conveyer speed to one twenty five"), ("en", "set conveyor speed to free hundred")),
        *(("en", "start the mixture"), ("en", "call kowalczyk"), ("en", "call"), ("en", "")),
        *(
            ("zh", "启动五号压机"),
            ("zh", "启动是号压机"),
            ("zh", "启动减塑泵"),
            ("zh", "启动下撩机吗"),
            ("zh", "停止章伟"),
        ),
        *(("zh", "启东章伟"), ("zh", "启动不传送带"), ("zh", "启动张薇"), ("yue", "開四號壓機"), ("yue", "閂章偉")),
        *(
            ("ja", "五号機を起動"),
            ("ja", "コンベヤを停止"),
            ("ja", "中田を起動"),
            ("ko", "오호기 시작"),
            ("ko", "믹써 정지"),
        ),
    ],
)
def test_verbs_numbers_ids_and_opposites_are_not(language: Language, text: str) -> None:
    assert readings(text, language) == []


def test_two_names_that_are_as_near_are_ambiguous_and_both_are_named() -> None:
    assert sorted(readings("call kowalsky")) == ["Call(colleague=kowalska)", "Call(colleague=kowalski)"]
    assert readings("call kowalski") == ["Call(colleague=kowalski)"]


def test_the_words_come_before_the_sounds() -> None:
    twins = Grammar.model_validate(
        {
            "language": "zh",
            "intents": {"Call": {"sentences": ["呼叫{who}"]}},
            "slots": {"who": {"match": "sound", "values": ["张伟", "章伟", "王芳"]}},
        }
    )
    found = TextMatcher(compile_graph({"zh.yaml": twins}))
    assert [(str(reading), sure) for reading, sure in found.understood("呼叫章伟")] == [("Call(who=章伟)", 1.0)]
    assert [str(reading) for reading, _ in found.understood("呼叫彰伟")] == ["Call(who=张伟)", "Call(who=章伟)"]


def test_a_letter_more_or_less_makes_a_name_less_sure() -> None:
    [(_, same)], [(_, near)] = (matcher().understood(f"call {heard}") for heard in ("meier", "papadopolos"))
    assert near < same < 1


@given(st.sampled_from(get_args(Language)), st.randoms(use_true_random=False))
def test_every_sentence_of_the_grammar_is_read_word_for_word(language: Language, random: Any) -> None:
    steps, _ = graph(language).words.walk(random)
    text = " ".join(step.word for step in steps)
    assert [sure for _, sure in matcher(language).understood(text)] == [1.0]


@given(st.sampled_from(get_args(Language)), st.data())
def test_no_word_outside_the_names_may_be_another(language: Language, data: st.DataObject) -> None:
    framed = graph(language).frames
    steps, _ = framed.walk(data.draw(st.randoms(use_true_random=False)))
    said = [index for index, step in enumerate(steps) if step.word not in graph(language).places]
    spoiled = data.draw(st.sampled_from(said))
    words = [
        next(iter(graph(language).places[step.word].names))[1][0] if step.word in graph(language).places else step.word
        for step in steps
    ]
    words[spoiled] = {"en": "wibble", "zh": "噢", "yue": "噢", "ja": "ぬ", "ko": "뷁"}[language]
    assert readings(" ".join(words), language) == []


@given(st.sampled_from(get_args(Language)), st.text(max_size=30))
def test_any_text_is_understood_or_not_and_surely_between_0_and_1(language: Language, text: str) -> None:
    assert all(0 < sure <= 1 for _, sure in matcher(language).understood(text))


def test_a_package_that_is_missing_is_named_with_the_file_and_the_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    graph.cache_clear()
    with pytest.raises(GrammarError, match=r"plant.yaml: .*slots.name: .*pip install 'edge-asr\[cantonese\]'"):
        graph("yue")


def test_only_slots_of_values_have_names() -> None:
    wrong = {**FACTORY, "slots": {**FACTORY["slots"], "gate": {"digits": 1, "match": "sound"}}}
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        Grammar.model_validate(wrong)


# ---------------------------------------------------------------- real audio

SITE = """\
language: en
intents:
  Start: {sentences: ["(start | switch on [the]) {machine}"]}
  Stop: {sentences: ["(stop | switch off [the]) {machine}"]}
  Speed: {sentences: ["set {machine} speed to {speed} (r p m | percent)"]}
slots:
  machine: {match: sound, values: [NAMES]}
  speed: {range: [0, 1500], step: 10}
"""
NAMES = "Mixxer, Konveyer, Kompressor, kuhlant pumpe, lyne three, lyne four, {press: Pres two}"
"""As a plant may spell what the model writes in its own way."""


@functools.cache
def sherpa() -> Engine:
    return Engine.build(settings.Settings.model_validate({"model": {"engine": "sherpa-onnx"}}))


def heard_at(site: Path, recording: str, names: str) -> Command | Rejection:
    site.write_text(SITE.replace("NAMES", names), encoding="utf-8")
    options = settings.Settings.model_validate({"commands": {"grammars": [str(site)]}})
    pcm = read_file(model_store.bundled("recordings") / f"{recording}.flac")
    [heard] = sherpa().under(options, Vocabulary.read(options)).hear(pcm, options.vad)
    assert heard.decision is not None
    return heard.decision


@pytest.mark.parametrize(
    ("recording", "intent", "slots"),
    [
        ("01-start-line-three", "Start", {"machine": "lyne three"}),
        ("19-stop-line-four", "Stop", {"machine": "lyne four"}),
        ("11-stop-press-two", "Stop", {"machine": "press"}),
        ("14-switch-on-compressor", "Start", {"machine": "Kompressor"}),
        ("18-switch-off-coolant-pump", "Stop", {"machine": "kuhlant pumpe"}),
        ("03-set-mixer-speed", "Speed", {"machine": "Mixxer", "speed": 1200}),
        ("13-set-conveyor-speed", "Speed", {"machine": "Konveyer", "speed": 80}),
    ],
)
def test_spoken_names_are_known_by_their_sound_where_the_engine_gives_text_alone(
    recording: str, intent: str, slots: Mapping[str, object], tmp_path: Path
) -> None:
    decision = heard_at(tmp_path / "site.yaml", recording, NAMES)
    assert isinstance(decision, Command), decision
    assert (decision.intent, dict(decision.slots)) == (intent, slots)
    assert NEAR * BY_SOUND <= decision.confidence <= BY_SOUND


@pytest.mark.parametrize(
    ("recording", "names", "reason", "candidates"),
    [
        ("14-switch-on-compressor", "Kompressor, Compresser", "ambiguous", {"Kompressor", "Compresser"}),
        ("14-switch-on-compressor", "Kompressor, Konveyer", "command", {"Kompressor"}),
        ("01-start-line-three", "lyne four, lyne free", "not-understood", set()),
        ("11-stop-press-two", "Pres to, Pres too, Pres ten", "not-understood", set()),
        ("18-switch-off-coolant-pump", "{other: kuhlant pumpe on}", "not-understood", set()),
    ],
)
def test_a_spoken_name_needs_a_margin_and_its_number_exactly(
    recording: str, names: str, reason: str, candidates: set[str], tmp_path: Path
) -> None:
    decision = heard_at(tmp_path / "site.yaml", recording, names)
    if isinstance(decision, Command):
        assert (reason, {decision.slots["machine"]}) == ("command", candidates)
    else:
        assert decision.reason == reason
        assert {each.partition("machine=")[2].rstrip(")") for each in decision.candidates} == candidates
