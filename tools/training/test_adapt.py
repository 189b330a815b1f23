"""Run with the training environment: .venv-training/bin/python -m pytest tools/training"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest
import soundfile as sf
import torch

from edge_asr.installation import Store
from training import __main__ as steps
from training import adapt, export, fit, people, prove, restore, texts, voices
from training.texts import Sentence
from training.voices import SHARD, Said

HOTWORDS = "bosch rexroth\nkuka\nfesto\nbeckhoff\n"


@pytest.fixture
def mute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Voices that say every sentence alike and at once."""

    def speak(sentences: Sequence[Sentence], _: Random) -> list[tuple[str, voices.Wave | None]]:
        return [("espeak:en-us", np.full(4800, 0.5, np.float32)) for _ in sentences]

    for name in ("espeak", "flite", "festival", "kokoro"):
        monkeypatch.setitem(voices.SPEAKERS, name, lambda: speak)


def _options(work: Path, hotwords: str) -> argparse.Namespace:
    (path := work / "hotwords.txt").write_text(hotwords)
    return argparse.Namespace(work=work, manifest=[], grammar=[], hotwords=path, sentences=400)


@pytest.mark.usefixtures("mute")
def test_no_sentence_of_the_site_is_measured_that_was_heard_or_is_read_that_is_measured(tmp_path: Path) -> None:
    material = adapt.Material.gathered(_options(tmp_path, HOTWORDS))
    heard, measured = ({each.text for each in said} for said in (material.site, material.site_held))
    assert not heard & measured
    assert len(measured) == pytest.approx(len(heard | measured) / adapt.HELD_OUT_EVERY, abs=1)
    assert material.unheard == measured
    assert len(set(material.read) - material.unheard) > len(measured)  # the others it reads


@pytest.mark.usefixtures("mute")
def test_a_work_folder_that_is_used_again_says_the_new_words_of_a_list(tmp_path: Path) -> None:
    def said(hotwords: str) -> str:
        material = adapt.Material.gathered(_options(tmp_path, hotwords))
        return " ".join(each.text for each in (*material.site, *material.site_held))

    assert "beckhoff" in said(HOTWORDS)
    again = said("turck\npilz\n")
    assert "turck" in again
    assert "beckhoff" not in again


@pytest.mark.usefixtures("mute")
def test_a_synthesis_that_was_interrupted_says_what_one_without_a_break_does(tmp_path: Path) -> None:
    draw = adapt.site_sentences([], _options(tmp_path, HOTWORDS).hotwords)
    whole = [each.text for each in adapt.spoken(tmp_path / "whole", 4 * SHARD, draw)]
    adapt.spoken(tmp_path / "broken", 4 * SHARD, draw)
    for path in (tmp_path / "broken").glob("*-0001.npz"):
        path.unlink()
    again = adapt.site_sentences([], tmp_path / "hotwords.txt")
    assert [each.text for each in adapt.spoken(tmp_path / "broken", 4 * SHARD, again)] == whole


def test_one_sentence_is_too_few(tmp_path: Path) -> None:
    sf.write(tmp_path / "a.wav", np.full(8000, 0.1), 16_000)
    (tmp_path / "site.jsonl").write_text(json.dumps({"audio": "a.wav", "text": "stop"}) + "\n")
    options = _options(tmp_path, "")
    options.manifest, options.hotwords = [tmp_path / "site.jsonl"], None
    with pytest.raises(adapt.AdaptError, match="too few"):
        adapt.Material.gathered(options)


def test_the_abbreviations_of_a_sites_grammar_are_labelled_by_the_letters_that_are_said() -> None:
    draw = adapt.site_sentences([texts.GRAMMARS / "factory.en.yaml"], None)
    said = [draw(Random(seed)) for seed in range(1500)]
    assert any("R C C B" in each.say and "r c c b" in each.text for each in said)
    assert not any("rccb" in each.text.split() for each in said)


@pytest.mark.parametrize(
    ("written", "label"),
    [
        ("Start line 3", "start line three"),
        ("set speed to 3.5", "set speed to three point five"),
        ("1,200 parts, 2 boxes.", "one thousand two hundred parts two boxes"),
    ],
)
def test_digits_of_a_sites_labels_are_words_in_what_is_learned(tmp_path: Path, written: str, label: str) -> None:
    sf.write(tmp_path / "a.wav", np.full(8000, 0.1), 16_000)
    (tmp_path / "site.jsonl").write_text(json.dumps({"audio": "a.wav", "text": written}) + "\n")
    (said,) = people.utterances(tmp_path / "site.jsonl")
    assert said.text == label


def test_a_number_that_nobody_says_is_refused_with_its_line(tmp_path: Path) -> None:
    sf.write(tmp_path / "a.wav", np.full(8000, 0.1), 16_000)
    (tmp_path / "site.jsonl").write_text(json.dumps({"audio": "a.wav", "text": "order 123456789012"}) + "\n")
    with pytest.raises(ValueError, match=r"site\.jsonl: line 1: 123456789012"):
        people.utterances(tmp_path / "site.jsonl")


def test_noise_is_measured_on_what_was_not_trained_on() -> None:
    assert set(steps.left_out("12")) == set("03456789")
    assert not steps.left_out(steps.FOLDS)


@pytest.mark.usefixtures("mute")
def test_an_interrupted_synthesis_leaves_some_of_every_synthesizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = voices.write_shard

    def until_full(path: Path, said: Sequence[Said]) -> None:
        if len(list((tmp_path / "said").glob("*.npz"))) == sum(steps.SAID.values()) // SHARD // steps.TURNS:
            raise KeyboardInterrupt
        write(path, said)

    monkeypatch.setattr(texts, "draw", lambda _: Sentence("short", "yes", "yes"))
    monkeypatch.setattr(voices, "write_shard", until_full)
    with pytest.raises(KeyboardInterrupt):
        steps.synthesize(tmp_path)
    for speaker, count in steps.SAID.items():
        assert len(list((tmp_path / "said").glob(f"{speaker}-*.npz"))) == count // SHARD // steps.TURNS


def test_the_contract_is_proven_on_every_synthesizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for speaker, level in (("espeak", 1000), ("festival", 2000), ("kokoro", 3000)):
        for shard in range(60):
            said = [Said(speaker, "short", "yes", np.full(400, level, np.int16))] * prove.PER_SHARD
            (tmp_path / "said").mkdir(exist_ok=True)
            voices.write_shard(tmp_path / f"said/{speaker}-1-{shard:04d}.npz", said)
    heard: list[voices.Wave] = []

    def contract(_: Path, clips: list[voices.Wave]) -> tuple[int, int]:
        heard.extend(clips)
        return len(clips), len(clips)

    monkeypatch.setattr(prove, "contract", contract)
    monkeypatch.setattr(prove, "encoder", lambda _, __: 0.0)
    prove.everything(tmp_path, tmp_path, "base")
    levels = [round(float(clip.max()) * 2 * 32768) for clip in heard]
    assert len(levels) == prove.FILES
    assert min(levels.count(level) for level in (1000, 2000, 3000)) > 100


def test_a_front_that_a_checkpoint_does_not_know_is_refused(tmp_path: Path) -> None:
    restore.begin(texts.GRAMMARS.parents[1] / "models/micro-en", tmp_path, tmp_path / "start.pt")
    front = torch.load(tmp_path / "front.pt")
    torch.save(front | {"neg_mean": front["neg_mean"] + 0.1}, tmp_path / "front.pt")
    with pytest.raises(ValueError, match=r"start\.pt: was made with another front"):
        fit.Run(tmp_path, "more", fit.Plan(1.0), tmp_path / "start.pt")


def test_what_training_depends_on_is_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "front.pt").write_bytes(b"fitted")
    steps.prepare(tmp_path)
    assert "kept" in capsys.readouterr().out
    assert not (tmp_path / "pieces.model").exists()


def test_what_tools_train_describes_is_what_a_store_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "models/own"
    model.mkdir(parents=True)
    for name in ("model.int8.onnx", "tokens.txt", "language_model.npz"):
        shutil.copy(texts.GRAMMARS.parents[1] / "models/micro-en" / name, model)
    monkeypatch.setattr(sys, "argv", ["tools/train", "describe", str(tmp_path), "--name", "own"])
    for _ in range(2):  # a manifest does not list itself
        steps.main()
    manifest = Store(tmp_path / "store").add(model)
    assert (manifest.name, manifest.licence, manifest.languages) == ("own", export.LICENCE, ("en",))
    assert set(manifest.files) == {"model.int8.onnx", "tokens.txt", "language_model.npz"}
