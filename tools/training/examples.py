"""What the network hears while it learns: utterances in rooms, machines and telephones, noise alone, and their labels.

Law: an example follows from the pools and its random generator. Signal to noise is counted as the ratio of the loudest
windows of 2048 samples, as the benchmark of the validation recordings does.
"""

from __future__ import annotations

import io
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import soundfile as sf
import soxr
import torch
from numpy.typing import NDArray
from scipy.signal import butter, fftconvolve, lfilter, sosfilt

from edge_asr.inference import Contract, Features
from training.network import LANGUAGE_IDS, WITH_ITN, WITHOUT_ITN
from training.noise import Noise
from training.tokens import Tokenizer
from training.voices import SAMPLE_RATE, Said

Wave = NDArray[np.float32]

WEIGHTS = {"kokoro": 6.5, "flite:rms": 1.2, "flite:slt": 1.2, "flite:awb": 1.2, "flite:kal16": 0.3, "festival:slt": 0.8}
WEIGHTS |= {"festival:kal": 0.2, "festival:ked": 0.3, "espeak": 1.3, "people": 3.0}
"""How often a voice is drawn, against the others; the neural one most often, as it is nearest to people."""

ENOUGH = 2000
"""Utterances of a voice below which it is drawn less often, so that none is heard over and over."""

KINDS = {
    "general": 0.32,
    "coffee": 0.13,
    "factory": 0.14,
    "decoy": 0.16,
    "free": 0.11,
    "digits": 0.07,
    "letters": 0.03,
    "short": 0.04,
}
"""How often a kind of sentence is drawn; what is not listed (people) is the only kind of its voice."""

LAST_KINDS = {
    "general": 0.14,
    "coffee": 0.30,
    "factory": 0.16,
    "decoy": 0.10,
    "free": 0.12,
    "digits": 0.08,
    "letters": 0.04,
    "short": 0.06,
}
LAST_PEOPLE = 8.0
"""The same in a last, short run: what the model is for, and the few recordings of people."""

NOBODY = 0.22
"""How often nobody speaks: a bark or a sneeze amid seconds of noise is like a digit there."""

FAR = 0.3
"""How often who speaks in a room is far from the microphone."""

BABBLING = 0.22
"""How often noise is people who talk in the background."""

WORD_S = 1.5
"""A recording of a person that is shorter holds a word."""

LONGEST_S = 20.0
LONGEST_BEFORE_S, LONGEST_AFTER_S = 2.5, 5.0
"""Of silence, or of noise alone, around what is said."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One utterance as the microphone has it, and what should come out."""

    audio: Wave
    text: str
    tags: tuple[str, str, str]
    """Language, emotion, event. Emotion is never trained on, and says so."""


def loudest(audio: Wave, window: int = 2048) -> float:
    """Energy of the loudest window."""
    if audio.size < window:
        return float((audio**2).sum()) + 1e-12
    return float((audio[: audio.size // window * window].reshape(-1, window) ** 2).sum(1).max()) + 1e-12


def mixed(speech: Wave, noise: Wave, snr_db: float) -> Wave:
    """Speech plus noise scaled to that ratio of loudest windows."""
    return speech + noise * np.float32(np.sqrt(loudest(speech) / loudest(noise) / 10 ** (snr_db / 10)))


def room(audio: Wave, random: Random, generator: np.random.Generator, *, far: bool) -> Wave:
    """Through a made-up room: a direct sound, early reflections, a decaying tail."""
    seconds = random.uniform(0.3, 0.9) if far else random.uniform(0.08, 0.5)
    size = int(seconds * SAMPLE_RATE)
    tail = generator.normal(size=size) * np.exp(-6.9 * np.arange(size) / size)
    tail[: random.randint(20, 200)] = 0
    direct_db = random.uniform(-6, 4) if far else random.uniform(2, 18)
    tail *= 10 ** (-direct_db / 20) / np.sqrt((tail**2).sum() + 1e-12)
    tail[0] = 1
    return np.asarray(fftconvolve(audio, tail)[: audio.size + size // 3], np.float32)


def telephone(audio: Wave, random: Random) -> Wave:
    """Over 8 kHz, sometimes in the telephone's band and through mu-law."""
    narrow = soxr.resample(audio, SAMPLE_RATE, 8000)
    if random.random() < 0.5:
        narrow = sosfilt(
            butter(4, (random.uniform(150, 350), random.uniform(3100, 3600)), "band", fs=8000, output="sos"), narrow
        )
        peak = np.abs(narrow).max() + 1e-9
        coded = np.sign(narrow) * np.log1p(255 * np.abs(narrow) / peak) / np.log(256)
        coded = np.round(coded * 127) / 127
        narrow = np.sign(coded) * (256 ** np.abs(coded) - 1) / 255 * peak
    return np.asarray(soxr.resample(narrow, 8000, SAMPLE_RATE), np.float32)


def opus(audio: Wave) -> Wave:
    """Through an Opus encoder and decoder, as from a browser."""
    file = io.BytesIO()
    sf.write(file, audio, SAMPLE_RATE, format="OGG", subtype="OPUS")
    file.seek(0)
    decoded, _ = sf.read(file, dtype="float32")
    return np.asarray(decoded, np.float32)


class Pool:
    """Everything an example is made of."""

    def __init__(self, said: Sequence[Said], noises: Sequence[Noise], seed: int, *, last: bool = False) -> None:
        """``last``: for the last run."""
        self.kinds = LAST_KINDS if last else KINDS
        worth = WEIGHTS | {"people": LAST_PEOPLE} if last else WEIGHTS
        self.random, self.generator = Random(seed), np.random.default_rng(seed)
        voices = defaultdict[str, dict[str, list[Said]]](lambda: defaultdict(list))
        for each in said:
            name = each.voice if each.voice in WEIGHTS else each.voice.partition(":")[0]
            voices[name][each.kind].append(each)
        self.voices = list(voices.values())
        self.weights = [
            worth.get(name, 0.5) * min(1.0, sum(map(len, kinds.values())) / ENOUGH) for name, kinds in voices.items()
        ]
        kinds = defaultdict[str, list[Noise]](list)
        for noise in noises:
            kinds[noise.kind].append(noise)
        self.noises = list(kinds.values())

    def voice(self) -> Mapping[str, Sequence[Said]]:
        """What one voice said, by kind of sentence."""
        return self.random.choices(self.voices, self.weights)[0]

    def utterance(self, voice: Mapping[str, Sequence[Said]]) -> Said:
        kind = self.random.choices(list(voice), [self.kinds.get(kind, 1.0) for kind in voice])[0]
        return self.random.choice(voice[kind])

    def noise(self, size: int) -> tuple[str, Wave]:
        """(event, [size] samples) of one kind, kinds equally often."""
        chosen = self.random.choice(self.random.choice(self.noises))
        start = self.random.randrange(chosen.audio.size)
        return chosen.event, np.resize(np.roll(chosen.audio, -start), size)

    def babble(self, size: int) -> Wave:
        """Up to six people talking at once."""
        talk = np.zeros(size, np.float32)
        for _ in range(self.random.randint(1, 6)):
            who = self.utterance(self.voice()).audio.astype(np.float32) / 32768
            talk += np.roll(np.resize(who, size), self.random.randrange(size)) * self.random.uniform(0.4, 1)
        return talk

    # ------------------------------------------------------------ one example

    def example(self) -> Example:
        return self._nobody() if self.random.random() < NOBODY else self._somebody()

    def _nobody(self) -> Example:
        random, size = self.random, int(self.random.uniform(0.5, 6) * SAMPLE_RATE)
        event = "Event_UNK"
        if random.random() < 0.08:
            audio = self.generator.normal(size=size) * 10 ** (random.uniform(-95, -50) / 20)
        else:
            event, audio = self.noise(size)
            if random.random() < 0.35:
                audio, event = audio + random.uniform(0.2, 1) * self.noise(size)[1], "Event_UNK"
            if random.random() < 0.2:
                audio = room(np.asarray(audio, np.float32), random, self.generator, far=random.random() < FAR)
            audio = audio / (np.abs(audio).max() + 1e-9) * 10 ** (random.uniform(-40, 0) / 20)
        return Example(np.asarray(audio, np.float32), "", ("nospeech", "EMO_UNKNOWN", event))

    def _said(self) -> tuple[Wave, str]:
        """One utterance, or some of the same voice one after the other."""
        random = self.random
        voice = self.voice()
        count = random.choices((1, 2, 3, random.randint(4, 9)), (80, 12, 4, 4))[0]
        if "people" in voice:
            one = random.choice(voice["people"])
            voice = {"people": [each for each in voice["people"] if each.voice == one.voice]}
            # single digits are joined to numbers of several, sentences stand alone
            count = random.choices((1, 2, 3, 4, 6), (3, 2, 2, 2, 1))[0] if one.audio.size < WORD_S * SAMPLE_RATE else 1
        factor = random.uniform(0.85, 1.2) if random.random() < 0.8 else 1.0
        pieces: list[Wave] = []
        words: list[str] = []
        for each in (self.utterance(voice) for _ in range(count)):
            audio = each.audio.astype(np.float32) / 32768
            if factor != 1.0:
                audio = np.asarray(soxr.resample(audio, SAMPLE_RATE, SAMPLE_RATE * factor, quality="MQ"), np.float32)
            if pieces and sum(map(len, pieces)) + audio.size > (LONGEST_S - 2) * SAMPLE_RATE:
                break
            pause = random.uniform(0.02, 0.5) * SAMPLE_RATE if pieces else 0
            pieces += [np.zeros(int(pause), np.float32), audio * np.float32(random.uniform(0.5, 1))]
            words.append(each.text)
        return np.concatenate(pieces), " ".join(words)

    def _somebody(self) -> Example:
        random, generator = self.random, self.generator
        speech, text = self._said()
        audio = np.pad(speech, (self._pause(LONGEST_BEFORE_S), self._pause(LONGEST_AFTER_S)))
        if random.random() < 0.5:
            audio = room(audio, random, generator, far=random.random() < FAR)
        if random.random() < 0.5:
            tilt = random.uniform(-0.9, 0.9)
            audio = np.asarray(lfilter([1, -tilt], [1], audio), np.float32)
        if random.random() < 0.25:
            audio = telephone(audio, random)
        if random.random() < 0.85:
            audio = self._with_noise(audio)
        if random.random() < 0.06:
            audio = opus(audio / (np.abs(audio).max() + 1e-9) * np.float32(0.7))
        audio = audio / (np.abs(audio).max() + 1e-9) * np.float32(10 ** (random.uniform(-30, 0) / 20))
        if random.random() < 0.06:
            audio = np.clip(audio * random.uniform(2, 6), -1, 1) * random.uniform(0.3, 1)
        if random.random() < 0.5:
            audio = audio + generator.normal(size=audio.size) * 10 ** (random.uniform(-95, -60) / 20)
        return Example(np.asarray(audio, np.float32), text, ("en", "EMO_UNKNOWN", "Speech"))

    def _pause(self, longest_s: float) -> int:
        """Samples until somebody speaks, or from then on.

        One in five is cut to the word, as recordings of single words and eager gates have it. One in three is long, as
        where a key was pressed too early: a network that never heard seconds of noise beside speech writes words there.
        """
        seconds = self.random.choices((0.0, self.random.uniform(0, 0.6), self.random.uniform(0, longest_s)), (3, 7, 5))
        return int(seconds[0] * SAMPLE_RATE)

    def _with_noise(self, audio: Wave) -> Wave:
        random = self.random
        babbling = random.random() < BABBLING
        noise = self.babble(audio.size) if babbling else self.noise(audio.size)[1]
        if random.random() < 0.3:
            noise = noise / np.sqrt(loudest(noise)) + self.noise(audio.size)[1] * random.uniform(0.01, 0.1)
        # who speaks to the microphone is the loudest; that others are not written is what babble teaches
        snr_db = random.triangular(3, 32, 10) if babbling else random.triangular(-3, 32, 8)
        return mixed(audio, np.asarray(noise, np.float32), snr_db)


# ---------------------------------------------------------------- batches


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Padded features and labels of some examples."""

    x: torch.Tensor
    """[N, T, 560]"""
    x_length: torch.Tensor
    language: torch.Tensor
    text_norm: torch.Tensor
    targets: torch.Tensor
    """The tokens of all texts, one after the other."""
    target_length: torch.Tensor
    tags: torch.Tensor
    """[N, 4] identifiers of language, emotion, event and ITN."""


def _batch(
    chosen: Sequence[tuple[NDArray[np.float32], list[int], Example]], tokenizer: Tokenizer, random: Random
) -> Batch:
    longest = max(len(features) for features, _, _ in chosen)
    x = np.zeros((len(chosen), longest, 560), np.float32)
    tags, itn, language = [], [], []
    for at, (features, _, example) in enumerate(chosen):
        x[at, : len(features)] = features
        itn.append(random.random() < 0.5)
        language.append(LANGUAGE_IDS[random.choice(("auto", "auto", "en", "en", "zh", "yue", "ja", "ko"))])
        names = (*example.tags, "withitn" if itn[-1] else "woitn")
        tags.append([tokenizer.ids[f"<|{name}|>"] for name in names])
    return Batch(
        torch.from_numpy(x),
        torch.tensor([len(features) for features, _, _ in chosen], dtype=torch.int32),
        torch.tensor(language, dtype=torch.int32),
        torch.tensor([WITH_ITN if each else WITHOUT_ITN for each in itn], dtype=torch.int32),
        torch.tensor([token for _, ids, _ in chosen for token in ids], dtype=torch.long),
        torch.tensor([len(ids) for _, ids, _ in chosen], dtype=torch.long),
        torch.tensor(tags, dtype=torch.long),
    )


def fits(ids: Sequence[int], frames: int) -> bool:
    """Whether CTC can spell these tokens in that many frames: one each, and a blank between equal ones."""
    return len(ids) + sum(a == b for a, b in itertools.pairwise(ids)) <= frames - 1


def batches(pool: Pool, contract: Contract, tokenizer: Tokenizer, frames: int) -> Iterator[Batch]:
    """For ever; about ``frames`` LFR frames (60 ms) in each, of examples of like length."""
    features = Features(contract)
    while True:
        drawn = []
        while len(drawn) < 120:
            example = pool.example()
            x, ids = features(example.audio), tokenizer.encode(example.text) if example.text else []
            if len(x) >= 4 and fits(ids, len(x)):
                drawn.append((x, ids, example))
        drawn.sort(key=lambda each: len(each[0]))
        groups: list[list[tuple[NDArray[np.float32], list[int], Example]]] = [[]]
        for each in drawn:
            if (len(groups[-1]) + 1) * len(each[0]) > frames and groups[-1]:
                groups.append([])
            groups[-1].append(each)
        pool.random.shuffle(groups)
        yield from (_batch(group, tokenizer, pool.random) for group in groups)
