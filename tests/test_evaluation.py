"""What `edge-asr eval` counts, how it mixes noise, and what it writes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from edge_asr import cli, commands, settings
from edge_asr.audio import quiet, read_file, signal_to_noise_db
from edge_asr.engine import Engine, grammar_paths
from edge_asr.evaluation import (
    Condition,
    Item,
    ManifestError,
    Outcome,
    mix,
    read_manifest,
    summarize,
)
from edge_asr.events import Command, Rejection, SlotValue, Transcript
from edge_asr.posteriors import Recognition, TokenTable, foreign, log_softmax

RECORDINGS = Path(__file__).parent.parent / "examples" / "recordings"


def outcome(intent: str | None, slots: Mapping[str, SlotValue], *came: Command | Rejection, text: str = "") -> Outcome:
    return Outcome(
        item=Item(Path("x.flac"), text or None, intent, slots),
        duration_s=36.0,
        cpu_s=0.36,
        text=text,
        commands=tuple(c for c in came if isinstance(c, Command)),
        rejections=tuple(r for r in came if isinstance(r, Rejection)),
    )


def command(intent: str, slots: Mapping[str, SlotValue], confidence: float = 0.9) -> Command:
    return Command(intent, slots, confidence, "normal", 10.0)


# ---------------------------------------------------------------- manifests


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"audio": "a.wav"}\nnonsense', "line 2: Invalid JSON"),
        ('{"text": "no audio"}', "line 1: `audio`: Field required"),
        ("[]", "line 1: "),
        ('{"audio": 5}', "line 1: `audio`: Input should be a valid string; expected a JSON object {audio, text?"),
        ('{"audio": "a.wav", "slots": ["line-3"]}', "line 1: `slots`: "),
        ('{"audio": "a.wav", "intent": "A"}\n{"audio": "a.wav", "intent": "orderTea"}', "line 2: no grammar holds"),
        ("\n\n", "holds no recording"),
    ],
)
def test_a_broken_manifest_is_one_line_that_names_the_place(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(content)
    with pytest.raises(ManifestError, match=re.escape(complaint)) as caught:
        read_manifest(path, {"A"})
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_audio_is_found_beside_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"audio": "folder/a.wav", "intent": "Stop"}\n')
    assert read_manifest(tmp_path / "m.jsonl") == [Item(tmp_path / "folder/a.wav", None, "Stop", {})]


# ---------------------------------------------------------------- noise


def largest_frame_energy(samples: np.ndarray) -> float:
    """As the speech-to-intent benchmark writes it."""
    frames = np.array_split(samples[: samples.size // 2048 * 2048], samples.size // 2048)
    return max(float(np.sum(frame.astype(np.float64) ** 2)) for frame in frames)


@given(seed=st.text(max_size=8), snr_db=st.floats(-5, 40), noise_length=st.integers(3000, 60_000))
def test_noise_is_mixed_at_the_ratio_of_the_loudest_frames(seed: str, snr_db: float, noise_length: int) -> None:
    random = np.random.default_rng(7)
    speech = (random.standard_normal(20_480) * np.linspace(0, 0.3, 20_480)).astype(np.float32)
    noise = (random.standard_normal(noise_length) * 0.1).astype(np.float32)
    mixed = mix(speech, noise, snr_db, seed)
    assert np.abs(mixed).max() == pytest.approx(0.5, rel=1e-5)
    assert np.array_equal(mixed, mix(speech, noise, snr_db, seed)), "a seed gives one mixture"
    added = residual(mixed, speech)
    assert 10 * np.log10(largest_frame_energy(speech) / largest_frame_energy(added)) == pytest.approx(snr_db, abs=1.0)


def residual(mixed: np.ndarray, speech: np.ndarray) -> np.ndarray:
    """What was added to the speech before both were scaled: the part of the mixture that does not correlate with it."""
    gain = float(mixed.astype(np.float64) @ speech / (speech.astype(np.float64) @ speech))
    return np.asarray(mixed / gain - speech)


# ---------------------------------------------------------------- figures


def test_only_exactly_the_labelled_command_is_accepted() -> None:
    slots: dict[str, SlotValue] = {"machine": "mixer", "speed": 120}
    right = command("SetSpeed", slots)
    assert outcome("SetSpeed", slots, right).accepted
    assert not outcome("SetSpeed", slots).accepted
    assert not outcome("SetSpeed", slots, command("SetSpeed", {"machine": "mixer"})).accepted
    assert not outcome("SetSpeed", slots, right, command("Cancel", {})).accepted, "a second command is one too many"


@pytest.mark.parametrize(
    ("labels", "slots", "wrong"),
    [
        ({"speed": 120}, {"speed": 120}, 0),
        ({"speed": 120}, {"speed": 20}, 1),
        ({}, {"speed": 20}, 1),
        ({"machine": "line-3"}, {"machine": "line-4"}, 1),
        ({"machine": "line-3"}, {"machine": "mixer"}, 0),
        ({"size": "eight ounce"}, {"size": "twelve ounce"}, 1),
        ({"size": "eight ounce"}, {"size": "large"}, 0),
        ({"machine": "三号压机"}, {"machine": "四号压机"}, 1),
        ({"machine": "三号压机"}, {"machine": "搅拌机"}, 0),
        ({"machine": "三号压机"}, {"machine": "三号线"}, 0),
        ({"size": "2.5 mm"}, {"size": "25 mm"}, 1),
    ],
)
def test_a_wrong_number_is_counted_in_numbers_and_in_names(
    labels: Mapping[str, SlotValue], slots: Mapping[str, SlotValue], wrong: int
) -> None:
    assert outcome("I", labels, command("I", slots)).wrong_numbers == wrong


def test_the_summary_counts_what_came_of_each_recording() -> None:
    outcomes = (
        outcome("A", {}, command("A", {}, 0.95), text="do it"),
        outcome("A", {}, command("B", {}, 0.55)),
        outcome("A", {}, Rejection("ambiguous", "")),
        outcome(None, {}, command("A", {}, 0.62)),
        outcome(None, {}, Rejection("no-speech", ""), Rejection("ambiguous", "")),
    )
    assert summarize(Condition(6.0, outcomes)) == {
        "snr": 6.0,
        "n": 5,
        "accepted": 1,
        "acceptance": 0.3333,
        "wrong_commands": 1,
        "wrong_numbers": 0,
        "false_accepts": 1,
        "false_accepts_per_hour": 50.0,
        "hours_without_command": 0.02,
        "wer": 0.0,
        "wer_by_language": {},
        "rtf": 0.01,
        "rejections": {"ambiguous": 2, "no-speech": 1},
        "calibration": [
            {"from": 0.5, "to": 0.6, "n": 1, "confidence": 0.55, "right": 0},
            {"from": 0.6, "to": 0.7, "n": 1, "confidence": 0.62, "right": 0},
            {"from": 0.9, "to": 1.0, "n": 1, "confidence": 0.95, "right": 1},
        ],
    }


def test_words_are_compared_without_case_and_punctuation_and_chinese_by_character() -> None:
    english = replace(outcome(None, {}, text="Stop, line three!"), text="stop line tree")
    chinese = replace(outcome(None, {}, text="启动三号线。"), text="启动四号线")
    assert summarize(Condition(None, (english,)))["wer"] == pytest.approx(1 / 3, abs=1e-3)
    assert summarize(Condition(None, (chinese,)))["wer"] == pytest.approx(1 / 5, abs=1e-3)


def test_languages_are_counted_apart_for_words_and_characters_do_not_add_up() -> None:
    said = outcome("A", {}, text="I\u2019d like line \uff13")
    english = replace(said, item=replace(said.item, language="en"), text="i'd like line 3")
    chinese = replace(said, item=replace(said.item, text="启动四号", language="zh"), text="启动三号")
    unlabelled = replace(said, item=replace(said.item, text="stop"), text="stop")
    summary = summarize(Condition(None, (english, chinese, unlabelled)))
    assert summary["wer_by_language"] == {"en": 0.0, "zh": 0.25}
    assert summary["wer"] == pytest.approx(1 / 9, abs=1e-4)


# ---------------------------------------------------------------- the command


def evaluate(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.main, ["eval", *arguments])
    return result.exit_code, result.output


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href"}]


def test_the_bundled_recordings_are_measured_clean_and_in_noise(tmp_path: Path) -> None:
    names = ["01-start-line-three", "04-talk-about-the-game", "05-set-oven-temperature"]
    lines = [json.loads(line) for line in (RECORDINGS / "manifest.jsonl").read_text().splitlines()]
    chosen = [{**line, "audio": str(RECORDINGS / line["audio"])} for line in lines if Path(line["audio"]).stem in names]
    chosen[0]["slots"] = {"machine": "line-4"}  # a label that cannot come true, so that something is to be shown
    named = tmp_path / "press #1, 50% full?.flac"
    named.symlink_to(chosen[0]["audio"])
    chosen[0]["audio"] = named.name
    manifest = tmp_path / "some.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in chosen))
    noise = RECORDINGS / "16-nobody-speaks.flac"
    figures, page = tmp_path / "figures.json", tmp_path / "page.html"
    code, output = evaluate(
        *(str(manifest), "--noise", str(noise), "--snr", "20,30", "--json", str(figures), "--html", str(page))
    )
    assert code == 0, output
    result = json.loads(figures.read_text())
    assert result["model"].startswith("micro-en")
    assert result["grammar"] == "factory.en"
    stated = ["snr", "n", "accepted", "acceptance", "wrong_numbers", "false_accepts_per_hour", "wer", "rtf"]
    assert all(set(stated) <= set(condition) for condition in result["conditions"])
    assert [condition["snr"] for condition in result["conditions"]] == [None, 20.0, 30.0]
    clean = result["conditions"][0]
    assert (clean["n"], clean["accepted"], clean["false_accepts"], clean["wrong_numbers"]) == (3, 1, 0, 1)
    assert "clean" in output
    shown = _Page(page.read_text(encoding="utf-8"))
    assert {"svg", "audio", "table"} <= shown.tags
    assert shown.links
    paths = [unquote(urlsplit(link).path) for link in shown.links]
    assert all((tmp_path / path).is_file() for path in paths), "every link is a file beside the page"


def test_a_grammar_may_be_named_in_place_of_the_settings(tmp_path: Path) -> None:
    label = {"audio": str(RECORDINGS / "20-emergency-stop.flac"), "intent": "EmergencyStop"}
    manifest, figures = tmp_path / "one.jsonl", tmp_path / "figures.json"
    manifest.write_text(json.dumps(label))
    code, output = evaluate(str(manifest), "--grammar", "coffee.en")
    assert (code, "line 1: no grammar holds the intent 'EmergencyStop'; name one that does by --grammar" in output) == (
        66,
        True,
    )
    both = ("--grammar", "coffee.en", "--grammar", "factory.en")
    code, output = evaluate(str(manifest), *both, "--json", str(figures))
    assert code == 0, output
    result = json.loads(figures.read_text())
    assert (result["grammar"], result["conditions"][0]["accepted"]) == ("coffee.en, factory.en", 1)


def test_a_recording_comes_from_no_station_and_may_command_what_only_some_may(tmp_path: Path) -> None:
    recording = RECORDINGS / "20-emergency-stop.flac"
    manifest, grammar = tmp_path / "one.jsonl", tmp_path / "press.yaml"
    manifest.write_text(json.dumps({"audio": str(recording), "intent": "Stop"}))
    grammar.write_text("language: en\nintents: {Stop: {sentences: [emergency stop], stations: [press-mic]}}\n")
    figures = tmp_path / "figures.json"
    code, output = evaluate(str(manifest), "--grammar", str(grammar), "--json", str(figures))
    assert code == 0, output
    assert json.loads(figures.read_text())["conditions"][0]["accepted"] == 1
    engine = Engine.build(settings.Settings.model_validate({"commands": {"grammars": [str(grammar)]}}))
    for station, came in (("press-mic", Command), ("oven-mic", Rejection)):
        [heard] = engine.hear(read_file(recording), settings.Vad(), station)
        assert isinstance(heard.decision, came)


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (("nowhere.jsonl",), 66, "nowhere.jsonl: cannot be read"),
        ((str(RECORDINGS / "manifest.jsonl"), "--snr", "6"), 2, "--noise and --snr belong together"),
        ((str(RECORDINGS / "manifest.jsonl"), "--noise", "x.wav", "--snr", "6,many"), 2, "'6,many' is not numbers"),
        ((str(RECORDINGS / "manifest.jsonl"), "--noise", "x.wav", "--snr", "nan"), 2, "'nan' is not finite"),
        ((str(RECORDINGS / "manifest.jsonl"), "--noise", "x.wav", "--snr", "6"), 66, "x.wav"),
    ],
)
def test_wrong_arguments_are_one_line_and_a_documented_exit_code(
    arguments: tuple[str, ...], code: int, complaint: str
) -> None:
    found, output = evaluate(*arguments)
    assert (found, complaint in output) == (code, True), output


# ---------------------------------------------------------------- gates before the grammar


def heard(text: str, language: str, snr_db: float | None = None) -> Recognition:
    """A recognition whose posteriors say nothing but blanks."""
    posteriors = log_softmax(np.eye(4, dtype=np.float32)[[0, 0, 0, 1, 0, 0]] * 30)
    return Recognition(Transcript(text, language, "NEUTRAL", "Speech", 0.9, ()), posteriors, snr_db)


@pytest.fixture(scope="module")
def interpreter() -> commands.Interpreter:
    table = TokenTable(("<blank>", "\u2581zzz", "\u2581cancel", "\u2581abort"))
    paths = grammar_paths(settings.Commands(grammars=("factory.en",)))
    return commands.Interpreter(commands.load_graph(list(paths.values())), table, settings.Commands(), ("en", "ja"))


@pytest.mark.parametrize(
    ("recognition", "reason"),
    [
        (heard("", "en"), "no-speech"),
        (heard("zzz", "nospeech"), "no-speech"),
        (heard("停止", "en"), "not-understood"),  # Japanese is written so too
        (heard("멈춰", "en"), "language"),
        (heard("ting zhi", "zh"), "language"),
        (heard("zzz", "en", 25.0), "not-understood"),
        (heard("zzz", "en", 3.0), "too-noisy"),
    ],
)
def test_what_is_no_command_is_rejected_for_the_right_reason(
    interpreter: commands.Interpreter, recognition: Recognition, reason: str
) -> None:
    decision = interpreter.interpret(recognition)
    assert isinstance(decision, Rejection)
    assert decision.reason == reason


def test_no_language_is_foreign_where_all_are_welcome() -> None:
    assert not foreign(Transcript("멈춰", "ko", "", "", 0.9, ()), ())


@given(level=st.floats(0.01, 0.5), snr_db=st.floats(5, 50))
def test_the_signal_to_noise_ratio_of_bursts_in_noise_is_found(level: float, snr_db: float) -> None:
    random = np.random.default_rng(3)
    noise = random.standard_normal(64_000) * level * 10 ** (-snr_db / 20)
    noise[16_000:48_000] = random.standard_normal(32_000) * level
    assert signal_to_noise_db(noise.astype(np.float32)) == pytest.approx(snr_db, abs=2.5)


def test_silence_has_no_signal() -> None:
    assert signal_to_noise_db(np.frombuffer(quiet(100), np.int16).astype(np.float32)) == 0.0
