"""Proofs against others' work: the encoder against ctranslate2's, the exported model against sherpa-onnx."""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random

import numpy as np
import torch

from edge_asr import inference, model_store, settings
from edge_asr.audio import from_float
from training import voices
from training.front import whisper_power
from training.kokoro import folder
from training.whisper import PACKAGES, Encoder, weights_file

FILES, PER_SHARD = 500, 10
"""Recordings that the contract is proven on, and how many of them one shard of 100 gives."""


def encoder(size: str, clip: voices.Wave) -> float:
    """Mean absolute difference of this port's and ctranslate2's encoder outputs, over the mean magnitude of the latter.

    On 30 s windows, as Whisper was made for; ctranslate2 computes in float32 from the same float16 weights.
    """
    import ctranslate2  # noqa: PLC0415 - only this proof needs it

    log = np.log10(np.maximum(whisper_power(np.pad(clip, (0, 480_000 - clip.size))), 1e-10))
    mel = ((np.maximum(log, log.max() - 8) + 4) / 4).astype(np.float32)[:3000]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model.bin").write_bytes(weights_file(size))
        Path(folder, "config.json").write_text("{}", encoding="utf-8")
        for name in ("vocabulary.json", "vocabulary.txt"):
            if (source := _beside(size, name)) is not None:
                Path(folder, name).write_bytes(source.read_bytes())
        theirs = ctranslate2.models.Whisper(folder, device="cpu", compute_type="float32")
        other = np.array(theirs.encode(ctranslate2.StorageView.from_array(np.ascontiguousarray(mel.T[None]))))
    with torch.no_grad():
        ours = Encoder.pretrained(size).eval()(torch.from_numpy(mel[None]), torch.ones(1, 3000)).numpy()
    return float(np.abs(ours - other).mean() / np.abs(other).mean())


def _beside(size: str, name: str) -> Path | None:
    package, _, inside = PACKAGES[size][0].partition("/")
    path = folder(package) / Path(inside).parent / name
    return path if path.exists() else None


def contract(model: Path, clips: list[voices.Wave]) -> tuple[int, int]:
    """(clips whose text and tags sherpa-onnx and our engine agree on, clips)."""
    files = model_store.locate(f"{model}/")
    ours = inference.OnnxRecognizer(files, settings.Model())
    theirs = inference.SherpaRecognizer(files, settings.Model(engine="sherpa-onnx"))
    equal = 0
    for clip in clips:
        one, other = (engine.recognize(from_float(clip)).transcript for engine in (ours, theirs))
        same = (one.text, one.language, one.emotion, one.event) == (
            other.text,
            other.language,
            other.emotion,
            other.event,
        )
        equal += same
        if not same:
            print(f"differs: {one.text!r} {one.language} {one.event} | {other.text!r} {other.language} {other.event}")
    return equal, len(clips)


def everything(model: Path, work: Path, size: str) -> None:
    shards = sorted((work / "said").glob("*.npz"))
    spread = shards[:: max(1, len(shards) * PER_SHARD // FILES)]  # every synthesizer's
    clips = [
        np.pad(said.audio.astype(np.float32) / 32768 * 0.5, 4800)
        for shard in spread
        for said in voices.read_shard(shard)[:PER_SHARD]
    ]
    Random(0).shuffle(clips)
    print(f"encoder against ctranslate2: relative difference {encoder(size, clips[0]):.5f}", flush=True)
    print(
        "text and tags equal in sherpa-onnx and our engine: {} of {}".format(*contract(model, clips[:FILES])),
        flush=True,
    )
