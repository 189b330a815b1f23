"""What becomes a command and what does not, on posteriors made to order and on plain text."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_asr import commands, inference, model_store, settings
from edge_asr.commands import Interpreter
from edge_asr.events import Command, Rejection
from edge_asr.grammar import CommandGraph, Grammar, compile_graph
from edge_asr.posteriors import BLANK, Recognition, TokenTable, log_softmax, transcribe

Floats = NDArray[np.float32]

WORDS = (
    *(
        "start",
        "stop",
        "press",
        "mixer",
        "milling",
        "line",
        "set",
        "speed",
        "to",
        "rpm",
        "now",
        "open",
        "gate",
        "the",
        "a",
        "b",
        "d",
    ),
    *("one", "two", "three", "four", "hundred", "thousand", "weather", "is", "fine", "emergency"),
)
TABLE = TokenTable(("<blank>", "<unk>", *(f"▁{word}" for word in WORDS), "启", "动", "三", "号", "线"))

SITE: Mapping[str, Any] = {
    "language": "en",
    "intents": {
        "Start": {"sentences": ["start [a|the] {machine} [now]"], "ttl_s": 5},
        "Stop": {"sentences": ["stop [the] {machine} [now]"], "min_confidence": 0.2},
        "SetSpeed": {"sentences": ["set {machine} speed to {speed} [rpm]"], "risk": "confirm"},
        "Gate": {"sentences": ["open gate {gate}"]},
        "Share": {"sentences": ["open {share} now"]},
        "Open": {"sentences": ["open gate one"]},
        "EmergencyStop": {"sentences": ["emergency stop"], "min_confidence": 0.9},
    },
    "slots": {
        "machine": {
            "values": [
                *("press", "mixer", {"mill": "milling press"}, {"line-3": "line three"}, {"line-4": "line four"}),
                *("gate a", "gate b", "gate d"),
            ]
        },
        "speed": {"range": [100, 4000], "step": 100, "unit": "rpm"},
        "gate": {"digits": 1},
        "share": {"range": [1, 400]},
    },
}


ANSWERS: Mapping[str, Any] = {
    "language": "en",
    "intents": {"No": {"sentences": ["stop now"], "answer": "cancel"}},
}


@functools.cache
def site() -> CommandGraph:
    return compile_graph({"site.yaml": Grammar.model_validate(SITE)})


def interpreter(languages: Sequence[str] = (), **options: Any) -> Interpreter:
    return Interpreter(site(), TABLE, settings.Commands(**options), languages)


def sounds(*frames: str | Mapping[str, float], rest: float = 1e-6) -> Floats:
    """A blank, then per entry a frame and another blank; an entry is a word or the chances of several ('' is blank)."""
    rows = []
    for frame in ("", *(part for each in frames for part in (each, ""))):
        chances = {frame: 0.999} if isinstance(frame, str) else frame
        row = np.full(len(TABLE), rest)
        for word, chance in chances.items():
            row[TABLE.pieces.index(f"▁{word}") if word else BLANK] = chance
        rows.append(np.log(row))
    return log_softmax(np.array(rows, np.float32))


def heard(rows: Floats, language: str = "en") -> Recognition:
    return Recognition(transcribe(rows, [language, "NEUTRAL", "Speech"], TABLE), rows)


def said(text: str, language: str = "en") -> Recognition:
    """What an engine gives that keeps its posteriors to itself."""
    return replace(
        heard(sounds(), language),
        transcript=replace(heard(sounds("stop"), language).transcript, text=text),
        log_posteriors=None,
    )


def command(decision: Command | Rejection) -> Command:
    assert isinstance(decision, Command), decision
    return decision


def rejection(decision: Command | Rejection) -> Rejection:
    assert isinstance(decision, Rejection), decision
    return decision


# ---------------------------------------------------------------- accepted


def test_a_clear_sentence_is_a_command_with_everything_its_grammar_says_of_it() -> None:
    got = command(
        interpreter(ttl_s=33).interpret(heard(sounds("set", "mixer", "speed", "to", "three", "hundred", "rpm")))
    )
    assert (got.intent, got.slots, got.units) == ("SetSpeed", {"machine": "mixer", "speed": 300}, {"speed": "rpm"})
    assert (got.risk, got.ttl_s, got.words) == ("confirm", 33, "set mixer speed to three hundred rpm")
    assert 0.8 < got.confidence <= 1


def test_an_intents_own_time_to_live_comes_before_the_sites() -> None:
    assert command(interpreter(ttl_s=33).interpret(heard(sounds("start", "press")))).ttl_s == 5


def test_what_is_certain_about_a_sentence_outweighs_one_uncertain_word() -> None:
    rows = sounds("start", {"the": 0.3, "": 0.69}, "line", "three", "now")
    assert command(interpreter().interpret(heard(rows))).slots == {"machine": "line-3"}


# ---------------------------------------------------------------- refused


def test_other_words_are_not_understood_and_quoted() -> None:
    got = rejection(interpreter().interpret(heard(sounds("the", "weather", "is", "fine"))))
    assert got.reason == "not-understood"
    assert "'the weather is fine'" in got.detail
    assert got.confidence < 0.5


def test_words_around_a_command_make_it_none() -> None:
    got = rejection(interpreter().interpret(heard(sounds("the", "weather", "is", "stop", "press"))))
    assert got.reason == "not-understood"


def test_two_machines_that_sound_alike_are_ambiguous_and_both_are_named() -> None:
    rows = sounds("start", {"press": 0.5, "mixer": 0.49})
    got = rejection(interpreter().interpret(heard(rows)))
    assert got.reason == "ambiguous"
    assert got.candidates == ("Start(machine=press)", "Start(machine=mixer)")
    assert got.detail == " or ".join(got.candidates)


@pytest.mark.parametrize(
    "chances", [{"three": 0.5, "four": 0.49}, {"three": 0.6, "four": 0.39}, {"three": 0.8, "four": 0.19}]
)
def test_a_number_with_a_rival_is_never_a_command(chances: dict[str, float]) -> None:
    got = rejection(interpreter().interpret(heard(sounds("start", "line", chances))))
    assert got.reason in {"ambiguous", "unsafe-number"}
    speed = rejection(interpreter().interpret(heard(sounds("set", "press", "speed", "to", chances, "hundred"))))
    assert speed.reason in {"ambiguous", "unsafe-number"}


@pytest.mark.parametrize("other", [0.2, 0.3, 0.49])
def test_the_letter_of_an_id_with_a_rival_is_never_a_command(other: float) -> None:
    def gate(chances: Mapping[str, float]) -> Command | Rejection:
        return interpreter(min_confidence=0.2).interpret(heard(sounds("start", "gate", chances)))

    assert rejection(gate({"b": 0.99 - other, "d": other})).reason == "unsafe-number"
    assert command(gate({"b": 0.97, "d": 0.01})).slots == {"machine": "gate b"}


@pytest.mark.parametrize("end", [(), ("now",)])
def test_an_a_that_names_something_is_held_to_it_and_an_article_is_not(end: Sequence[str]) -> None:
    def start(*frames: str | Mapping[str, float]) -> Command | Rejection:
        return interpreter(min_confidence=0.2).interpret(heard(sounds("start", *frames, *end)))

    assert rejection(start("gate", {"a": 0.7, "d": 0.29})).reason == "unsafe-number"
    assert rejection(start("gate", {"a": 0.2, "weather": 0.79})).reason == "unsafe-number"
    assert command(start("gate", {"a": 0.97, "d": 0.01})).slots == {"machine": "gate a"}
    assert command(start({"a": 0.2, "weather": 0.79}, "press")).slots == {"machine": "press"}


@pytest.mark.parametrize("chance", [0.2, 0.5, 0.75])
def test_a_number_that_might_go_on_is_never_a_command(chance: float) -> None:
    rows = sounds("open", "two", {"hundred": chance, "": 0.99 - chance}, "now")
    assert rejection(interpreter().interpret(heard(rows))).reason in {"ambiguous", "unsafe-number"}
    sure = sounds("open", "two", {"hundred": 0.97, "": 0.02}, "now")
    assert command(interpreter().interpret(heard(sure))).slots == {"share": 200}


def test_a_number_word_that_was_hardly_heard_is_unsafe_however_clear_the_rest() -> None:
    def speed(chances: Mapping[str, float]) -> Command | Rejection:
        return interpreter().interpret(heard(sounds("set", "press", "speed", "to", chances, "hundred", "rpm")))

    assert command(speed({"three": 0.6, "weather": 0.39})).slots["speed"] == 300
    assert rejection(speed({"three": 0.2, "weather": 0.79})).reason == "unsafe-number"


@pytest.mark.parametrize("reliability", [0.6, 0.96])
def test_a_number_that_another_pace_hears_otherwise_is_unsafe(reliability: float) -> None:
    def sentence(number: str | Mapping[str, float]) -> Floats:
        return sounds("set", "press", "speed", "to", number, "hundred", "rpm", rest=1e-9)

    once, lenient = heard(sentence("three")), interpreter(min_confidence=0.3)
    agreeing = replace(once, at_pace=lambda _: sentence({"three": reliability, "weather": 0.99 - reliability}))
    assert command(lenient.interpret(agreeing)).slots["speed"] == 300
    otherwise = replace(once, at_pace=lambda _: sentence({"four": reliability, "three": 0.99 - reliability}))
    assert rejection(lenient.interpret(otherwise)).reason == "unsafe-number"


@pytest.mark.parametrize(
    ("text", "is_safe"),
    [
        ("Start line three", True),
        ("start, line: Three.", True),
        ("start line", False),
        ("start line four", False),
        ("start line thirtythree", False),
        ("start Line-3", True),  # a hotword's writing
    ],
)
def test_a_number_that_the_text_beside_the_command_does_not_hold_is_unsafe(text: str, *, is_safe: bool) -> None:
    once = heard(sounds("start", "line", "three"))
    written = replace(once, transcript=replace(once.transcript, text=text))
    decision = interpreter().interpret(written)
    assert isinstance(decision, Command) == is_safe
    assert is_safe or rejection(decision).reason == "unsafe-number"


def test_the_text_must_hold_numbers_in_the_order_and_as_often_as_they_are_said() -> None:
    once = heard(sounds("set", "press", "speed", "to", "two", "thousand", "two", "hundred"))
    assert command(interpreter().interpret(once)).slots["speed"] == 2200
    for text in ("set press speed to two thousand hundred", "set press speed to two hundred two thousand"):
        written = replace(once, transcript=replace(once.transcript, text=text))
        assert rejection(interpreter().interpret(written)).reason == "unsafe-number"


def test_another_pace_settles_a_doubt_about_names() -> None:
    once = heard(sounds("start", {"press": 0.5, "mixer": 0.49}))
    settled = replace(once, at_pace=lambda _: sounds("start", "mixer"))
    assert command(interpreter().interpret(settled)).slots == {"machine": "mixer"}


def test_a_sentence_that_means_two_things_is_ambiguous() -> None:
    for recognition in (heard(sounds("open", "gate", "one")), said("open gate one")):
        got = rejection(interpreter().interpret(recognition))
        assert got.reason == "ambiguous"
        assert sorted(got.candidates) == ["Gate(gate=1)", "Open()"]


@pytest.mark.parametrize("recognition", [heard(sounds()), heard(sounds("stop", "press"), "nospeech")])
def test_where_nobody_speaks_nothing_is_commanded(recognition: Recognition) -> None:
    assert rejection(interpreter().interpret(recognition)).reason == "no-speech"


def test_a_model_that_hears_laughter_or_a_cough_is_believed_rather_than_its_words() -> None:
    laughed = heard(sounds("stop", "press"))
    laughed = replace(laughed, transcript=replace(laughed.transcript, event="Laughter"))
    got = rejection(interpreter().interpret(laughed))
    assert (got.reason, got.detail) == ("no-speech", "heard 'stop press' in what the model calls Laughter")
    assert command(interpreter(refuse_events=()).interpret(laughed)).intent == "Stop"
    with_music = replace(laughed, transcript=replace(laughed.transcript, event="BGM"))
    assert command(interpreter().interpret(with_music)).intent == "Stop"
    assert rejection(interpreter(refuse_events=["BGM"]).interpret(with_music)).reason == "no-speech"


def test_cancel_is_obeyed_whatever_else_is_heard() -> None:
    graph = compile_graph({"answers.yaml": Grammar.model_validate(ANSWERS)})
    cancelling = Interpreter(graph, TABLE, settings.Commands())
    coughed = heard(sounds("stop", "now"))
    coughed = replace(coughed, transcript=replace(coughed.transcript, event="Cough"))
    assert command(cancelling.interpret(coughed)).answer == "cancel"


def test_a_language_that_is_not_spoken_here_is_refused() -> None:
    assert rejection(interpreter(["en"]).interpret(heard(sounds("stop", "press"), "ja"))).reason == "language"
    assert command(interpreter(["en", "ja"]).interpret(heard(sounds("stop", "press"), "ja"))).intent == "Stop"
    assert rejection(interpreter(["en"]).interpret(said("启动三号线"))).reason == "language"


def test_noise_is_blamed_only_where_nothing_was_understood() -> None:
    lost = replace(heard(sounds("the", "weather")), signal_to_noise_db=3.0)
    got = rejection(interpreter().interpret(lost))
    assert (got.reason, got.detail) == (
        "too-noisy",
        "heard 'the weather', no command; the signal is 3 dB above the noise",
    )
    assert rejection(interpreter().interpret(replace(lost, signal_to_noise_db=30.0))).reason == "not-understood"
    understood = replace(heard(sounds("stop", "press")), signal_to_noise_db=3.0)
    assert command(interpreter().interpret(understood)).intent == "Stop"


def test_speech_far_from_any_sentence_is_quoted_too() -> None:
    rows = sounds(*["weather", "fine"] * 12, rest=1e-12)
    assert "'weather fine weather" in rejection(interpreter().interpret(heard(rows))).detail


# ---------------------------------------------------------------- thresholds


def test_an_intents_own_threshold_comes_before_the_sites() -> None:
    doubtful = {"press": 0.55, "mixer": 0.4}
    for word, accepted in (("start", False), ("stop", True)):  # Stop: 0.2
        decision = interpreter(min_confidence=0.8).interpret(heard(sounds(word, doubtful)))
        assert isinstance(decision, Command) == accepted
    assert isinstance(interpreter(min_confidence=0.2).interpret(heard(sounds("start", doubtful))), Command)
    unsure = heard(sounds("emergency", {"stop": 0.3, "weather": 0.69}))
    assert rejection(interpreter(min_confidence=0.1).interpret(unsure)).reason == "not-understood"  # its own: 0.9


@given(st.floats(0.3, 0.98), st.floats(0, 1))
def test_no_command_is_less_confident_than_its_threshold(chance: float, threshold: float) -> None:
    rows = sounds("start", {"press": chance, "mixer": 0.99 - chance})
    decision = interpreter(min_confidence=threshold).interpret(heard(rows))
    assert isinstance(decision, Command) == (decision.confidence >= threshold)
    assert 0 <= decision.confidence <= 1


@given(st.integers(1, 12), st.integers(0, 2**32), st.sampled_from([0.5, 2.0, 6.0]))
def test_no_posteriors_whatsoever_do_anything_but_command_or_be_refused(frames: int, seed: int, spread: float) -> None:
    noise = np.random.default_rng(seed).normal(0, spread, (frames, len(TABLE)))
    decision = interpreter().interpret(heard(log_softmax(noise.astype(np.float32))))
    assert 0 <= decision.confidence <= 1


# ---------------------------------------------------------------- text alone


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("start line three", {"machine": "line-3"}),
        ("Start the line 3, now!", {"machine": "line-3"}),
        ("STOP MILLING PRESS", {"machine": "mill"}),
        ("set press speed to 1,200", {"machine": "press", "speed": 1200}),
        ("set press speed to 1200 rpm.", {"machine": "press", "speed": 1200}),
        ("set press speed to twelve hundred rpm", {"machine": "press", "speed": 1200}),
        ("open gate 7", {"gate": "7"}),
        ("\uff33\uff54\uff41\uff52\uff54 line \uff13\uff01", {"machine": "line-3"}),  # full-width, as an IME writes
    ],
)
def test_a_text_that_is_a_sentence_is_a_command(text: str, slots: dict[str, object]) -> None:
    got = command(interpreter().interpret(said(text)))
    assert (got.slots, got.confidence) == (slots, 1.0)


@pytest.mark.parametrize(
    "text",
    [
        *("start", "start line", "start line five", "line three start", "start line three three", "do not stop press"),
        *(
            "set press speed to 1250",
            "set press speed to 4100",
            "set press speed to one two hundred",
            "open gate 10",
            "?",
        ),
    ],
)
def test_a_text_that_is_no_sentence_is_not_understood_and_quoted(text: str) -> None:
    got = rejection(interpreter().interpret(said(text)))
    assert (got.reason, got.detail) == ("not-understood", f"heard {text!r}, no command")


@pytest.mark.parametrize(
    "written",
    [
        *("1,5", "12:30", "20-25", "3/4", "1.200,5", "80%-90", "5°30"),
        *(f"{minus}18" for minus in "-\u2212\u2013\uff0d"),
    ],
)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_written_number_is_read_with_its_sign_and_whole_or_not_at_all(language: str, written: str) -> None:
    site = {
        "language": language,
        "intents": {"Set": {"sentences": ["set {value}"]}},
        "slots": {"value": {"range": [-3000, 3000]}},
    }
    interpreter = Interpreter(compile_graph({"x": Grammar.model_validate(site)}), TABLE, settings.Commands())
    got = interpreter.interpret(said(f"set {written}"))
    if written.endswith("18"):
        assert command(got).slots == {"value": -18}
    else:
        assert rejection(got).reason == "not-understood"


def test_words_that_the_model_cannot_write_are_known() -> None:
    assert {"zero", "seven", "twelve"} <= set(interpreter().unspellable)
    assert not set(WORDS) & set(interpreter().unspellable)


def test_expectations_that_do_not_hold_say_what_was_read_instead() -> None:
    tests = [
        *({"say": "start press", "intent": "Start", "slots": {"machine": "press"}}, {"say": "go home", "intent": None}),
        *({"say": "stop press", "intent": "Start", "slots": {"machine": "press"}}, {"say": "go", "intent": "Start"}),
        *({"say": "start mixer", "intent": None}, {"say": "stop mixer", "intent": "Stop"}),
        *({"say": "open gate one", "intent": None}, {"say": "open gate two", "intent": "Gate", "slots": {"gate": 2}}),
    ]
    loaded = Grammar.model_validate({**SITE, "tests": tests})
    failed = dict(commands.failed_expectations(site(), loaded.tests))
    assert sorted(failed.pop("open gate one").split(" or ")) == ["Gate(gate=1)", "Open()"]
    assert failed == {
        "stop press": "Stop(machine=press)",
        "go": "no command",
        "start mixer": "Start(machine=mixer)",
        "stop mixer": "Stop(machine=mixer)",
        "open gate two": "Gate(gate=2)",
    }


def test_two_languages_are_understood_side_by_side() -> None:
    chinese = Grammar.model_validate({"language": "zh", "intents": {"Start": {"sentences": ["启动三号线"]}}})
    both = compile_graph({"en.yaml": Grammar.model_validate(SITE), "zh.yaml": chinese})
    understood = Interpreter(both, TABLE, settings.Commands())
    rows = np.full((11, len(TABLE)), 1e-6)
    rows[::2, BLANK] = 0.99
    for place, character in enumerate("启动三号线"):
        rows[2 * place + 1, TABLE.pieces.index(character)] = 0.99
    assert command(understood.interpret(heard(log_softmax(np.log(rows).astype(np.float32)), "zh"))).words
    assert command(understood.interpret(said("启动3号线", "zh"))).intent == "Start"
    assert command(understood.interpret(said("start press"))).slots == {"machine": "press"}


def test_the_shipped_grammars_can_be_heard_by_the_shipped_model() -> None:
    table = inference.load_tokens(model_store.bundled("models") / "micro-en" / "tokens.txt")
    for path in model_store.bundled("grammars").glob("*.en.yaml"):
        assert Interpreter(commands.load_graph([path]), table, settings.Commands()).unspellable == ()
    lost = Interpreter(
        commands.load_graph([model_store.bundled("grammars") / "factory.zh.yaml"]), table, settings.Commands()
    )
    assert all(re.search("[^a-z]", word) for word in lost.unspellable)


def test_a_text_with_a_name_by_its_sound_is_a_command_that_is_less_sure() -> None:
    slots = {**SITE["slots"], "machine": {**SITE["slots"]["machine"], "match": "sound"}}
    by_sound = compile_graph({"site.yaml": Grammar.model_validate({**SITE, "slots": slots})})
    got = command(Interpreter(by_sound, TABLE, settings.Commands()).interpret(said("start the mixxer")))
    assert (got.slots, got.words) == ({"machine": "mixer"}, "start the mixxer")
    assert 0.8 < got.confidence < 1
    refused = rejection(
        Interpreter(by_sound, TABLE, settings.Commands(min_confidence=0.99)).interpret(said("start the mixxer"))
    )
    assert (refused.reason, refused.candidates) == ("not-understood", ("Start(machine=mixer)",))
    assert rejection(interpreter().interpret(said("start the mixxer"))).reason == "not-understood"
