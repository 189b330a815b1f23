"""The bundled recordings are what their manifest says, and the tool that made them still makes them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sherpa_onnx
import soundfile as sf
from numpy.typing import NDArray

from edge_asr import audio, commands, grammar, model_store, trial
from edge_asr.engine import Engine
from edge_asr.events import SAMPLE_RATE, Command
from edge_asr.settings import Settings
from edge_asr.text_matching import TextMatcher

ROOT = Path(__file__).resolve().parent.parent
RECORDINGS = ROOT / "examples" / "recordings"
GRAMMAR = ROOT / "examples" / "grammars" / "factory.en.yaml"
TOOL = ROOT / "tools" / "make-recordings"

GOLDEN = "golden.flac"
PRESS = "11-stop-press-two.flac"
NOBODY = "16-nobody-speaks.flac"

LINES: list[dict[str, Any]] = [json.loads(line) for line in (RECORDINGS / "manifest.jsonl").read_text().splitlines()]
SPEAKING = [line for line in LINES if line["voice"] is not None]

LEAD = slice(0, int(0.45 * SAMPLE_RATE))
"""Before anybody speaks."""
SPEECH = slice(int(0.5 * SAMPLE_RATE), -int(0.8 * SAMPLE_RATE))

Samples = NDArray[np.float32]


def samples_of(path: Path) -> Samples:
    samples: Samples = sf.read(path, dtype="float32")[0]
    return samples


def power(samples: Samples) -> float:
    return float(np.mean(np.square(samples)))


def power_while_sounding(speech: Samples) -> float:
    powers = np.square(speech[: speech.size // 320 * 320].reshape(-1, 320)).mean(axis=1)
    return float(powers[powers > 1e-3 * powers.max()].mean())


def speech_in(samples: Samples) -> list[tuple[float, float]]:
    """(start, end) in seconds of what sherpa-onnx's own loop around silero takes for speech."""
    config = sherpa_onnx.VadModelConfig()
    config.silero_vad.model = str(model_store.locate_vad())
    config.silero_vad.min_silence_duration = 0.6
    detector = sherpa_onnx.VoiceActivityDetector(config, buffer_size_in_seconds=10)
    for start in range(0, len(samples) - 511, 512):
        detector.accept_waveform(samples[start : start + 512])
    detector.flush()
    found = []
    while not detector.empty():
        start, size = detector.front.start, len(detector.front.samples)
        found.append((start / SAMPLE_RATE, (start + size) / SAMPLE_RATE))
        detector.pop()
    return found


def text_in(path: Path) -> str:
    """What sherpa-onnx hears with the embedded model."""
    model = model_store.locate("micro-en")
    recognizer = sherpa_onnx.OfflineRecognizer.from_sense_voice(model=str(model.model), tokens=str(model.tokens))
    stream = recognizer.create_stream()
    stream.accept_waveform(SAMPLE_RATE, samples_of(path))
    recognizer.decode_stream(stream)
    return str(stream.result.text).strip()


def make(folder: Path, name: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), "--out", str(folder), name],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_manifest_lists_every_recording_but_the_golden_one() -> None:
    assert {line["audio"] for line in LINES} | {GOLDEN} == {path.name for path in RECORDINGS.glob("*.flac")}
    assert len({line["audio"] for line in LINES}) == len(LINES)


@pytest.mark.parametrize("name", [GOLDEN, *(line["audio"] for line in LINES)])
def test_a_recording_is_a_short_mono_16_bit_flac_file_at_16_khz_that_does_not_clip(name: str) -> None:
    info = sf.info(RECORDINGS / name)
    assert (info.format, info.subtype, info.samplerate, info.channels) == ("FLAC", "PCM_16", SAMPLE_RATE, 1)
    assert 1.5 <= info.duration <= 5.0
    assert 0.1 < np.abs(samples_of(RECORDINGS / name)).max() < 0.55


def test_the_recordings_are_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in RECORDINGS.iterdir()) < 1_500_000


def test_every_text_means_to_the_factory_grammar_what_the_manifest_says() -> None:
    matcher = TextMatcher(commands.load_graph([GRAMMAR]))
    for line in LINES:
        meant = [] if line["intent"] is None else [(line["intent"], line["slots"])]
        assert [(reading.intent, dict(reading.slots)) for reading in matcher.readings(line["text"])] == meant, line


def test_every_intent_of_the_factory_grammar_is_spoken() -> None:
    assert {line["intent"] for line in LINES} - {None} == set(grammar.load(GRAMMAR).intents)


def test_the_detector_finds_one_utterance_where_somebody_speaks_and_none_in_noise() -> None:
    for line in LINES:
        found = speech_in(samples_of(RECORDINGS / line["audio"]))
        assert len(found) == (line["voice"] is not None), line
        # The first word begins at 0.5 s; a detector may notice it late, but not later than the pre-roll reaches back.
        assert all(0.35 < start < 0.5 + Settings().vad.pre_roll_s for start, _ in found), line


def test_the_noise_is_as_far_below_the_speech_as_the_manifest_says() -> None:
    steady = [line for line in SPEAKING if line["noise"] in {"conveyor hall", "switch room"}]
    assert {line["snr_db"] for line in steady} >= {10, 15, 20}
    for line in steady:
        samples = samples_of(RECORDINGS / line["audio"])
        noise = power(samples[LEAD])
        measured_db = 10 * math.log10((power_while_sounding(samples[SPEECH]) - noise) / noise)
        assert measured_db == pytest.approx(line["snr_db"], abs=3), line


def test_a_quiet_room_is_quiet() -> None:
    quiet = [line["audio"] for line in SPEAKING if line["noise"] is None]
    for name in (GOLDEN, *quiet):
        samples = samples_of(RECORDINGS / name)
        assert power_while_sounding(samples[SPEECH]) > 10_000 * power(samples[LEAD]), name


def test_the_daemon_understands_every_recording_as_the_manifest_says() -> None:
    options = Settings()
    engine = Engine.build(options)
    for line in LINES:
        heard = list(engine.hear(audio.read_file(RECORDINGS / line["audio"]), options.vad))
        assert len(heard) == (line["voice"] is not None), line
        understood = [(h.decision.intent, dict(h.decision.slots)) for h in heard if isinstance(h.decision, Command)]
        assert understood == ([] if line["intent"] is None else [(line["intent"], line["slots"])]), heard


def test_the_embedded_model_hears_the_golden_recording_to_the_letter() -> None:
    assert text_in(RECORDINGS / GOLDEN) == trial.BUNDLED_GOLDEN.text


def test_the_tool_makes_the_shipped_noise_again(tmp_path: Path) -> None:
    assert make(tmp_path, NOBODY).returncode == 0
    again, shipped = (sf.read(folder / NOBODY, dtype="int16")[0].astype(int) for folder in (tmp_path, RECORDINGS))
    assert np.abs(again - shipped).max() <= 1  # FFT libraries round differently


@pytest.mark.parametrize(("name", "text"), [(GOLDEN, "start conveyor three"), (PRESS, "stop press two")])
def test_the_tool_speaks_the_same_samples_every_time_and_they_are_understood(
    tmp_path: Path, name: str, text: str
) -> None:
    for folder in (tmp_path / "once", tmp_path / "again"):
        done = make(folder, name)
        assert (done.returncode, done.stderr) == (0, "")
        assert [path.name for path in folder.iterdir()] == [name]
    assert np.array_equal(samples_of(tmp_path / "once" / name), samples_of(tmp_path / "again" / name))
    assert text_in(tmp_path / "once" / name) == text


def test_the_tool_names_the_synthesizer_that_is_missing(tmp_path: Path) -> None:
    done = make(tmp_path, PRESS, PATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (1, f"{PRESS}: espeak-ng: not found; apt-get install espeak-ng\n")


def test_the_tool_refuses_a_name_that_the_manifest_lacks(tmp_path: Path) -> None:
    done = make(tmp_path / "new", "21-nothing.flac")
    assert done.returncode == 2
    assert "21-nothing.flac: not in" in done.stderr
    assert not (tmp_path / "new").exists()
