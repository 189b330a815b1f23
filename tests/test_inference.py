"""The neural networks: the same text, tags and times as sherpa-onnx, and one line for every file that is no model."""

from __future__ import annotations

import functools
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import sherpa_onnx
from hypothesis import given
from hypothesis import settings as settings_of
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edge_asr import audio, inference, model_store, settings
from edge_asr.commands import Interpreter
from edge_asr.engine import Engine
from edge_asr.events import FRAME_SAMPLES, SAMPLE_RATE, Rejection
from edge_asr.grammar import Grammar, compile_graph
from edge_asr.inference import (
    Contract,
    Features,
    OnnxRecognizer,
    RecognizerError,
    SherpaRecognizer,
    SileroDetector,
    open_recognizer,
    reachable,
)
from edge_asr.model_store import ModelError, ModelFiles, Provider
from edge_asr.posteriors import FRAME_S, TAG_FRAMES, Recognition, foreign

MICRO = model_store.bundled("models") / "micro-en"
VOCABULARY = 526
"""Of the embedded model."""
RECORDINGS = sorted(model_store.bundled("recordings").glob("*.flac"))
SHARED = Path(__file__).parents[2] / "shared" / "data"
COMMON = [
    *sorted((SHARED / "spoken-commands" / "audio").glob("*.flac"))[::8],
    *sorted((SHARED / "spoken-digits" / "audio").glob("*.*"))[::40],
    *sorted((SHARED / "noise").glob("*/*.*"))[::40],
]
"""Real people and real noise, where they are at hand."""

SAME_KERNELS = onnxruntime.__version__.startswith("1.28.")
"""As inside sherpa-onnx 2.0.1; another minor version of onnxruntime (Python 3.10 has none newer than 1.23) rounds int8
sums otherwise, which changes a word in one file of twenty."""


@functools.cache
def onnx_recognizer(**options: Any) -> OnnxRecognizer:
    return OnnxRecognizer(model_store.locate("micro-en"), settings.Model(**options))


@functools.cache
def sherpa_recognizer(**options: Any) -> SherpaRecognizer:
    return SherpaRecognizer(model_store.locate("micro-en"), settings.Model(engine="sherpa-onnx", **options))


@functools.cache
def pcm_of(path: Path) -> bytes:
    return audio.read_file(path)[: 15 * SAMPLE_RATE * 2]


def what_was_heard(recognition: Recognition) -> Mapping[str, object]:
    heard = recognition.transcript
    return {"text": heard.text, "tags": (heard.language, heard.emotion, heard.event), "tokens": heard.tokens}


# ---------------------------------------------------------------- the recognizers


def test_both_engines_hear_the_same_text_tags_and_token_times() -> None:
    files = [*RECORDINGS, *COMMON]
    pairs = [
        [what_was_heard(r.recognize(pcm_of(path))) for r in (onnx_recognizer(), sherpa_recognizer())] for path in files
    ]
    if SAME_KERNELS:
        assert [ours for ours, _ in pairs] == [theirs for _, theirs in pairs]
    else:
        same_text = sum(ours["text"] == theirs["text"] for ours, theirs in pairs)
        assert same_text >= 0.9 * len(files)


def test_the_language_and_number_options_reach_both_engines_alike() -> None:
    pcm = pcm_of(RECORDINGS[0])
    for options in ({"language": "en"}, {"use_itn": True}, {"language": "zh", "use_itn": True}):
        ours = what_was_heard(onnx_recognizer(**options).recognize(pcm))
        assert ours == what_was_heard(sherpa_recognizer(**options).recognize(pcm))


def test_a_recognition_is_complete() -> None:
    pcm = pcm_of(model_store.bundled("recordings") / "20-emergency-stop.flac")
    heard = onnx_recognizer().recognize(pcm)
    assert heard.transcript.text == "emergency stop"
    assert (heard.transcript.language, heard.transcript.event) == ("en", "Speech")
    assert 0.8 < heard.transcript.confidence <= 1
    assert heard.log_posteriors is not None
    frames, vocabulary = heard.log_posteriors.shape
    assert vocabulary == len(onnx_recognizer().table) == VOCABULARY
    assert frames == pytest.approx(len(pcm) / 2 / SAMPLE_RATE / FRAME_S, abs=TAG_FRAMES)
    assert "".join(token.text for token in heard.transcript.tokens).strip() == "emergency stop"
    starts = [token.start_s for token in heard.transcript.tokens]
    assert starts == sorted(starts)
    assert all(0 <= start < frames * FRAME_S for start in starts)
    assert heard.signal_to_noise_db is not None


def test_recognizing_again_gives_the_same_to_the_bit() -> None:
    pcm = pcm_of(RECORDINGS[1])
    once, again = (onnx_recognizer().recognize(pcm).log_posteriors for _ in range(2))
    assert once is not None
    np.testing.assert_array_equal(once, again)


TAKES = [audio.to_float(audio.read_file(path)) for path in RECORDINGS[:2]]
CONTRACT = Contract(7, 6, 32768.0, np.zeros(560, np.float32), np.ones(560, np.float32), {}, 14, 15, 100)


@settings_of(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from([0, 1]), st.integers(1, 40_000)), min_size=1, max_size=8))
def test_features_of_what_grows_are_those_of_the_whole_in_every_bit(
    growing: list[tuple[int, int]],
) -> None:
    features = Features(CONTRACT)
    for which, length in growing:
        samples = TAKES[which][:length]
        assert np.array_equal(features.grown(samples), Features(CONTRACT)(samples))


def test_of_what_has_grown_only_the_new_frames_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    compute, asked = Features.fbank, list[int]()

    def counted(features: Features, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        asked.append(len(samples))
        return compute(features, samples)

    monkeypatch.setattr(Features, "fbank", counted)
    features = Features(CONTRACT)
    features.grown(TAKES[0][:16_000])
    features.grown(TAKES[0][: 16_000 + Features.HOP])
    assert asked[0] == 16_000
    assert asked[1] < Features.FRAME + Features.HOP


def test_another_pace_has_more_frames_and_the_own_pace_hears_the_same() -> None:
    heard = onnx_recognizer().recognize(pcm_of(model_store.bundled("recordings") / "20-emergency-stop.flac"))
    assert heard.log_posteriors is not None
    assert heard.at_pace is not None
    assert len(heard.at_pace(1 / 1.2)) == pytest.approx(1.2 * len(heard.log_posteriors), abs=2)
    np.testing.assert_array_equal(heard.at_pace(1.0), heard.log_posteriors)


@pytest.mark.parametrize("engine", ["onnxruntime", "sherpa-onnx"])
@pytest.mark.parametrize("samples", [0, 1, inference.MIN_SAMPLES - 1, int(inference.MAX_UTTERANCE_S * SAMPLE_RATE) + 1])
def test_too_little_and_too_much_audio_cost_one_utterance_and_name_its_length(engine: str, samples: int) -> None:
    recognizer = onnx_recognizer() if engine == "onnxruntime" else sherpa_recognizer()
    with pytest.raises(RecognizerError, match=rf"^{samples / SAMPLE_RATE:.3f} s of audio, expected 0\.025\.\.31 s$"):
        recognizer.recognize(bytes(2 * samples))


@pytest.mark.parametrize("engine", ["onnxruntime", "sherpa-onnx"])
@pytest.mark.parametrize("seconds", [0.025, 0.1, 5.0, 30.1])
def test_silence_of_any_length_is_no_failure(engine: str, seconds: float) -> None:
    recognizer = onnx_recognizer() if engine == "onnxruntime" else sherpa_recognizer()
    recognizer.recognize(bytes(2 * int(seconds * SAMPLE_RATE)))


def test_noise_at_full_scale_is_no_failure() -> None:
    noise = np.random.default_rng(0).integers(-32768, 32768, 2 * SAMPLE_RATE).astype("<i2").tobytes()
    assert 0 <= onnx_recognizer().recognize(noise).transcript.confidence <= 1


ACCELERATORS: Mapping[Provider, str] = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


@pytest.mark.parametrize("provider", ACCELERATORS)
@pytest.mark.parametrize("engine", ["onnxruntime", "sherpa-onnx"])
def test_a_provider_that_is_not_there_is_told_and_the_one_in_use_is_named(
    engine: str, provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    if ACCELERATORS[provider] in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has {provider}")
    options = settings.Model.model_validate({"engine": engine, "provider": provider})
    with caplog.at_level(logging.WARNING):
        recognizer = open_recognizer(model_store.locate("micro-en"), options)
    assert recognizer.provider == "cpu"
    assert [record.getMessage() for record in caplog.records] == [
        f"{engine} has no {provider} here: the model runs on the CPU; install a matching wheel"
    ]
    assert recognizer.recognize(pcm_of(RECORDINGS[0])).transcript.text


@pytest.mark.parametrize("provider", ACCELERATORS)
def test_weights_follow_the_provider_that_can_be_had(
    provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded = model_store.locate(model_store.EMBEDDED).model.parent
    folder = Path(shutil.copytree(embedded, tmp_path / "both", ignore=shutil.ignore_patterns("manifest.json")))
    shutil.copy(folder / "model.int8.onnx", folder / "model.onnx")
    wanted = settings.Settings(model=settings.Model(name=str(folder), provider=provider))
    assert Engine.build(wanted).files.model.name == "model.int8.onnx", f"there is no {provider} here"
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "get_available_providers", lambda: [ACCELERATORS[provider], "CPUExecutionProvider"])
        assert reachable(wanted.model) == provider
        assert reachable(settings.Model()) == "cpu"
    assert model_store.locate(str(folder), provider=provider).model.name == "model.onnx"
    assert model_store.locate(str(folder), provider="cpu").model.name == "model.int8.onnx"
    files = {"model.int8.onnx", "model.onnx", "tokens.txt", "language_model.npz"}
    assert set(model_store.locate(str(folder)).manifest.files) == files
    (folder / "model.int8.onnx").unlink()
    assert model_store.locate(str(folder), provider="cpu").model.name == "model.onnx"


def test_tensorrt_builds_one_engine_for_speech_of_any_length_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is asked for; there is none here."""
    open_session = onnxruntime.InferenceSession
    asked: list[Any] = []

    def open_on_the_cpu(path: str, options: onnxruntime.SessionOptions, providers: list[Any]) -> object:
        asked[:] = providers
        return open_session(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_on_the_cpu)
    there = [*ACCELERATORS.values(), "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: there)
    options = settings.Model(provider="tensorrt")
    recognizer = open_recognizer(model_store.locate("micro-en"), options, installed=tmp_path / "models")
    assert isinstance(recognizer, OnnxRecognizer)
    (name, kept), *others = asked
    assert (name, others) == ("TensorrtExecutionProvider", ["CUDAExecutionProvider", "CPUExecutionProvider"])
    (engines,) = (tmp_path / "models").iterdir()
    assert kept["trt_engine_cache_path"] == kept["trt_timing_cache_path"] == str(engines)
    assert kept["trt_engine_cache_enable"] == kept["trt_timing_cache_enable"] == "True"
    changing = {each.name: len(each.shape) for each in recognizer._session.get_inputs() if "N" in each.shape}  # noqa: SLF001
    for which in ("min", "opt", "max"):
        shapes = dict(each.split(":") for each in kept[f"trt_profile_{which}_shapes"].split(","))
        assert {name: len(shape.split("x")) for name, shape in shapes.items()} == changing
    assert "x:1x1033x560," in kept["trt_profile_max_shapes"]  # 62 s
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError()))
    open_recognizer(model_store.locate("micro-en"), options, installed=tmp_path / "elsewhere")
    assert "trt_engine_cache_enable" not in asked[0][1]


def test_the_cpu_needs_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert OnnxRecognizer(model_store.locate("micro-en"), settings.Model()).provider == "cpu"
    assert caplog.records == []


# ---------------------------------------------------------------- the language guard

KOREAN, ENGLISH, CHINESE, TOO_SURE, SILENT = "멈춰", "\u2581stop", "停", "멈", ""
SPOKEN = ["<blank>", *(f"<|{tag}|>" for tag in ("ko", "en", "zh", "NEUTRAL", "Speech", "woitn")), ENGLISH, *"停멈춰"]


def bilingual(folder: Path, **heard: tuple[str, float]) -> ModelFiles:
    """A model in SenseVoice's contract that hears, in each language it is told, one text this surely (in nats)."""
    table = np.zeros((16, TAG_FRAMES + 4, len(SPOKEN)), np.float32)
    for name, (text, nats) in heard.items():
        tag = {KOREAN: "ko", TOO_SURE: "ko", ENGLISH: "en", CHINESE: "zh", SILENT: "ko"}[text]
        pieces = [text] if text in SPOKEN else list(text)
        written = [f"<|{tag}|>", "<|NEUTRAL|>", "<|Speech|>", "<|woitn|>", *pieces]
        ids = [SPOKEN.index(piece) for piece in written]
        row = table[int(metadata()[f"lang_{name}"])]
        row[np.arange(len(row)), np.pad(ids, (0, len(row) - len(ids)))] = nats
    types = {"x": TensorProto.FLOAT}
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "language"], ["logits"], axis=0)],
        "bilingual",
        [
            helper.make_tensor_value_info(name, types.get(name, TensorProto.INT32), shape)
            for name, shape in OURS.items()
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", "T", len(SPOKEN)])],
        [onnx.numpy_helper.from_array(table, "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, {**metadata(), "vocab_size": str(len(SPOKEN))})
    onnx.save(model, folder / "model.int8.onnx")
    (folder / "tokens.txt").write_text("".join(f"{piece} {index}\n" for index, piece in enumerate(SPOKEN)), "utf-8")
    return files_in(folder)


@pytest.mark.parametrize(
    ("heard", "text", "decision"),
    [
        ({"auto": (KOREAN, 9), "zh": (CHINESE, 5), "en": (ENGLISH, 9)}, "stop", "Stop"),
        ({"auto": (KOREAN, 9), "zh": (CHINESE, 9), "en": (ENGLISH, 5)}, "停", "Stop"),
        ({"auto": (KOREAN, 9), "zh": (KOREAN, 9), "en": (ENGLISH, 6)}, "stop", "Stop"),  # never the surer foreign one
        ({"auto": (KOREAN, 9), "zh": (SILENT, 9), "en": (TOO_SURE, 9)}, "멈", "language"),
        ({"auto": (KOREAN, 9), "zh": (KOREAN, 9), "en": (KOREAN, 9)}, "멈춰", "language"),
        ({"auto": (ENGLISH, 9), "zh": (CHINESE, 9), "en": (KOREAN, 9)}, "stop", "Stop"),  # nothing to doubt
    ],
)
def test_what_is_not_spoken_here_is_decoded_again_for_what_is_and_otherwise_rejected(
    heard: Mapping[str, tuple[str, float]], text: str, decision: str, tmp_path: Path
) -> None:
    site = {"language": "en", "intents": {"Stop": {"sentences": ["(stop | 停)"]}}}
    graph = compile_graph({"site": Grammar.model_validate(site)})
    recognizer = OnnxRecognizer(bilingual(tmp_path, **heard), settings.Model(languages=("zh", "en")))
    interpreter = Interpreter(graph, recognizer.table, settings.Commands(), recognizer.languages)
    recognition = recognizer.recognize(bytes(2 * SAMPLE_RATE))
    assert recognition.transcript.text == text
    decided = interpreter.interpret(recognition)
    assert (decided.reason if isinstance(decided, Rejection) else decided.intent) == decision


def test_a_fixed_language_is_decoded_once_and_another_script_is_rejected(tmp_path: Path) -> None:
    files = bilingual(tmp_path, auto=(ENGLISH, 9), zh=(CHINESE, 9), en=(KOREAN, 9))
    recognizer = OnnxRecognizer(files, settings.Model(language="en"))
    assert recognizer.languages == ("en",)
    assert foreign(recognizer.recognize(bytes(2 * SAMPLE_RATE)).transcript, recognizer.languages)


# ---------------------------------------------------------------- the speech detector


def frames_of(pcm: bytes) -> Iterator[bytes]:
    size = 2 * FRAME_SAMPLES
    return (pcm[start : start + size] for start in range(0, len(pcm) - size + 1, size))


@pytest.mark.parametrize("path", [RECORDINGS[0], *COMMON[:1], *COMMON[-1:]], ids=lambda path: path.stem)
def test_the_detector_opens_and_closes_where_sherpas_does(path: Path) -> None:
    config = sherpa_onnx.VadModelConfig()
    config.silero_vad.model = str(model_store.locate_vad())
    config.silero_vad.threshold = 0.5
    config.silero_vad.min_silence_duration = 0.1
    config.silero_vad.min_speech_duration = 0.05
    config.sample_rate = SAMPLE_RATE
    theirs = sherpa_onnx.VoiceActivityDetector(config, buffer_size_in_seconds=60)
    ours = SileroDetector(model_store.locate_vad())
    speaking: list[tuple[bool, bool]] = []
    for frame in frames_of(pcm_of(path)):
        theirs.accept_waveform(audio.to_float(frame))
        speaking.append((ours.probability(frame) > 0.5, theirs.is_speech_detected()))
    assert sum(mine == other for mine, other in speaking) / len(speaking) > 0.85  # least durations make the rest
    first = [next((place for place, each in enumerate(speaking) if each[whose]), -1) for whose in (0, 1)]
    assert abs(first[0] - first[1]) <= 3


def test_the_detector_is_the_network_with_64_samples_of_context_and_its_state() -> None:
    session = onnxruntime.InferenceSession(model_store.locate_vad())
    samples = np.frombuffer(pcm_of(RECORDINGS[0]), "<i2").astype(np.float32) / 32768
    padded = np.concatenate([np.zeros(64, np.float32), samples])
    state = np.zeros((2, 1, 128), np.float32)
    detector = SileroDetector(model_store.locate_vad())
    for start, frame in zip(range(0, len(samples), FRAME_SAMPLES), frames_of(pcm_of(RECORDINGS[0])), strict=False):
        window = padded[start : start + 64 + FRAME_SAMPLES][None]
        expected, state = session.run(None, {"input": window, "state": state, "sr": np.array(16000)})
        assert detector.probability(frame) == pytest.approx(expected.item(), abs=1e-5)


def test_a_detector_that_was_reset_hears_as_if_for_the_first_time() -> None:
    frames = list(frames_of(pcm_of(RECORDINGS[0])))
    detector = SileroDetector(model_store.locate_vad())
    first = [detector.probability(frame) for frame in frames[:40]]
    detector.reset()
    assert [detector.probability(frame) for frame in frames[:40]] == first


def test_a_recording_without_a_speaker_and_one_with() -> None:
    def loudest(name: str) -> float:
        detector = SileroDetector(model_store.locate_vad())
        frames = frames_of(pcm_of(model_store.bundled("recordings") / f"{name}.flac"))
        return max(detector.probability(frame) for frame in frames)

    assert loudest("20-emergency-stop") > 0.9
    assert loudest("16-nobody-speaks") < 0.5


def test_a_frame_of_another_length_is_a_wrong_argument() -> None:
    with pytest.raises(ValueError, match="shape"):
        SileroDetector(model_store.locate_vad()).probability(bytes(100))


# ---------------------------------------------------------------- what is no model


@functools.cache
def micro() -> onnx.ModelProto:
    return onnx.load(MICRO / "model.int8.onnx")


def metadata() -> dict[str, str]:
    return {each.key: each.value for each in micro().metadata_props}


def with_metadata(**changes: str | None) -> onnx.ModelProto:
    """The bundled model with other metadata; None: without."""
    model = onnx.ModelProto()
    model.CopyFrom(micro())
    del model.metadata_props[:]
    changed = {key: value for key, value in {**metadata(), **changes}.items() if value is not None}
    helper.set_model_props(model, changed)
    return model


def tiny(
    inputs: Mapping[str, list[Any]], output: tuple[str, list[Any]], types: int = TensorProto.INT32
) -> onnx.ModelProto:
    """A model that only has the outward shape of something."""
    name, shape = output
    graph = helper.make_graph(
        [helper.make_node("Constant", [], [name], value=helper.make_tensor("c", TensorProto.FLOAT, [1, 1, 1], [0.0]))],
        "tiny",
        [helper.make_tensor_value_info(i, TensorProto.FLOAT if i == "x" else types, s) for i, s in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, metadata())
    return model


OURS: dict[str, list[Any]] = {"x": ["N", "T", 560], "x_length": ["N"], "language": ["N"], "text_norm": ["N"]}
LOGITS = ("logits", ["N", "T", VOCABULARY])
NOT_A_NUMBER = ",".join(["nan"] * 560)

FOREIGN: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "another network's inputs": (lambda: tiny({"x": ["N", 80]}, LOGITS), "this is not a SenseVoice model"),
    "the silero detector": (lambda: onnx.load(model_store.locate_vad()), "this is not a SenseVoice model"),
    "64-bit lengths": (lambda: tiny(OURS, LOGITS, TensorProto.INT64), "inputs are"),
    "flat features": (lambda: tiny({**OURS, "x": ["N", 560]}, LOGITS), "CMVN has 560 values for"),
    "other features": (lambda: tiny({**OURS, "x": ["N", "T", 80]}, LOGITS), "CMVN has 560 values for"),
    "another output": (lambda: tiny(OURS, ("probs", ["N", "T", VOCABULARY])), "has no output logits"),
    "a flat output": (lambda: tiny(OURS, ("logits", ["N", VOCABULARY])), "has no output logits"),
    "another vocabulary": (lambda: tiny(OURS, ("logits", ["N", "T", 5])), "has no output logits [.., .., 526]"),
    "no CMVN": (lambda: with_metadata(neg_mean=None), "metadata 'neg_mean' is missing"),
    "no languages": (lambda: with_metadata(lang_yue=None), "metadata 'lang_yue' is missing"),
    "a window that is no number": (lambda: with_metadata(lfr_window_size="seven"), "metadata is damaged"),
    "no step forward": (lambda: with_metadata(lfr_window_shift="0"), "metadata is damaged"),
    "a step backward": (lambda: with_metadata(lfr_window_shift="-6"), "metadata is damaged"),
    "CMVN that is no number": (lambda: with_metadata(inv_stddev=NOT_A_NUMBER), "metadata is damaged"),
    "another vocabulary in the metadata": (lambda: with_metadata(vocab_size="427"), "no output logits [.., .., 427]"),
}  # fmt: skip


def files_in(folder: Path) -> ModelFiles:
    """As they come when nobody vouches for them."""
    return ModelFiles(folder / "model.int8.onnx", folder / "tokens.txt", model_store.locate("micro-en").manifest, "")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(MICRO / "tokens.txt", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("engine", ["onnxruntime", "sherpa-onnx"])
def test_a_foreign_model_is_one_line_and_never_reaches_sherpa(name: str, engine: str, folder: Path) -> None:
    make, complaint = FOREIGN[name]
    onnx.save(make(), folder / "model.int8.onnx")
    with pytest.raises(ModelError) as caught:  # sherpa-onnx would end this very process
        open_recognizer(files_in(folder), settings.Model.model_validate({"engine": engine}))
    message = str(caught.value)
    assert message.startswith(f"{folder / 'model.int8.onnx'}: ")
    assert complaint in message
    assert "\n" not in message


@pytest.mark.parametrize("engine", ["onnxruntime", "sherpa-onnx"])
@pytest.mark.parametrize("content", ["empty", "truncated", "text", "zeros"])
def test_a_broken_model_is_one_line(engine: str, content: str, folder: Path) -> None:
    whole = (MICRO / "model.int8.onnx").read_bytes()
    broken = {"empty": b"", "truncated": whole[: len(whole) // 2], "text": b"<html>\n404", "zeros": bytes(5000)}
    (folder / "model.int8.onnx").write_bytes(broken[content])
    with pytest.raises(ModelError, match=r"^\S+model\.int8\.onnx: .*import the model again$"):
        open_recognizer(files_in(folder), settings.Model.model_validate({"engine": engine}))


def test_a_missing_model_is_one_line(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.int8\.onnx: onnxruntime cannot load it"):
        open_recognizer(files_in(folder), settings.Model())


@pytest.mark.parametrize("engine", ["onnxruntime", "sherpa-onnx"])
@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "not a tokens file"),
        (b"", "0 tokens for a model of 526"),
        (b"<blank> 0\n<unk> 1\n", "2 tokens for a model of 526; take tokens.txt of the same release"),
        (b"\xff\xfe\x00", "not a tokens file"),
        (b"<blank>\t0.0\n", "line 1: '<blank>\\t0.0' is not `piece 0`"),
    ],
)
def test_broken_tokens_are_one_line(engine: str, content: bytes | None, complaint: str, folder: Path) -> None:
    shutil.copy(MICRO / "model.int8.onnx", folder)
    tokens = folder / "tokens.txt"
    tokens.unlink()
    if content is not None:
        tokens.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        open_recognizer(files_in(folder), settings.Model.model_validate({"engine": engine}))
    message = str(caught.value)
    assert message.startswith(f"{tokens}: ")
    assert complaint in message
    assert "\n" not in message


def test_a_comment_that_sherpa_dies_of_is_refused_for_sherpa_only(folder: Path) -> None:
    onnx.save(with_metadata(comment="FunASR-Nano"), folder / "model.int8.onnx")
    assert open_recognizer(files_in(folder), settings.Model()).recognize(pcm_of(RECORDINGS[0])).transcript.text
    with pytest.raises(ModelError, match="use engine onnxruntime"):
        open_recognizer(files_in(folder), settings.Model(engine="sherpa-onnx"))


def test_a_detector_that_is_none_is_one_line() -> None:
    with pytest.raises(ModelError, match=r"model\.int8\.onnx: is not a silero VAD model; import it again"):
        SileroDetector(MICRO / "model.int8.onnx")


def test_sherpa_is_loaded_only_by_who_asks_for_it() -> None:
    code = "import sys, edge_asr.daemon; sys.exit('sherpa_onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
