"""What is heard besides the speaker: real recordings named on the command line, and made-up machines, bells and music.

Law: a made-up noise follows from its random generator; every noise is 16 kHz mono float32 of peak 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr
from numpy.random import Generator
from numpy.typing import NDArray

SAMPLE_RATE = 16_000
MADE_S = 10
Wave = NDArray[np.float32]

EVENTS = {"baby-cry": "Cry", "crying": "Cry", "person-sneeze": "Sneeze", "sneezing": "Sneeze", "laughing": "Laughter"}
EVENTS |= {"clapping": "Applause", "coughing": "Cough", "breathing": "Breath", "music": "BGM"}
"""Folder of recordings, or kind made here -> SenseVoice's event; every other noise is Event_UNK."""


@dataclass(frozen=True, slots=True, eq=False)
class Noise:
    """One recording or one made-up noise."""

    kind: str
    audio: Wave

    @property
    def event(self) -> str:
        return EVENTS.get(self.kind, "Event_UNK")


def recordings(folder: Path, folds: str) -> list[Noise]:
    """Every recording below FOLDER whose name starts with one of ``folds`` (ESC's fold); its folder is its kind."""
    found = []
    for path in sorted(folder.rglob("*.*")):
        if path.suffix.lower() not in {".ogg", ".wav", ".flac"} or path.name[0] not in folds:
            continue
        audio, rate = sf.read(path, dtype="float32", always_2d=True)
        mono = np.asarray(soxr.resample(audio.mean(1), rate, SAMPLE_RATE), np.float32)
        peak = np.abs(mono).max()
        if peak > 1e-4:
            found.append(Noise(path.parent.name, mono / peak))
    return found


def _coloured(random: Generator, size: int, slope: float) -> NDArray[np.float64]:
    frequency = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    frequency[0] = frequency[1]
    magnitude = (frequency / 1000) ** (-slope / 2)
    magnitude[frequency < 30] *= 0.1
    for _ in range(random.integers(0, 5)):  # resonances
        centre, width = random.uniform(80, 6000), random.uniform(0.03, 0.5)
        magnitude *= 1 + random.uniform(0, 8) * np.exp(-0.5 * (np.log(frequency / centre) / width) ** 2)
    spectrum = magnitude * (random.normal(size=frequency.size) + 1j * random.normal(size=frequency.size))
    noise = np.fft.irfft(spectrum, size)
    return noise / noise.std()


def _stationary(random: Generator, size: int) -> NDArray[np.float64]:
    return _coloured(random, size, random.uniform(-0.5, 2.5))


def _fluctuating(random: Generator, size: int) -> NDArray[np.float64]:
    points = max(4, int(size / SAMPLE_RATE * random.uniform(0.5, 6)) + 3)
    level = np.interp(np.linspace(0, points - 1, size), np.arange(points), random.normal(size=points))
    return _stationary(random, size) * 10 ** (random.uniform(3, 9) * level / 20)


def _machine(random: Generator, size: int) -> NDArray[np.float64]:
    time = np.arange(size) / SAMPLE_RATE
    beat = (time * random.uniform(1, 25)) % 1
    noise = _coloured(random, size, random.uniform(0, 2)) * (0.3 + np.exp(-beat * random.uniform(3, 25)))
    hum = random.choice([50, 60, random.uniform(30, 400)])
    for harmonic in range(1, 12):
        tone = np.sin(2 * np.pi * hum * harmonic * time + random.uniform(0, 6))
        noise += random.uniform(0, 1.5) / harmonic * tone
    return noise


def _clatter(random: Generator, size: int) -> NDArray[np.float64]:
    noise = 0.15 * _coloured(random, size, random.uniform(0, 2))
    for _ in range(random.integers(5, 60)):
        start = random.integers(0, size - 100)
        count = min(size - start, int(random.integers(400, 12_000)))
        time = np.arange(count) / SAMPLE_RATE
        ring = sum(
            random.uniform(0.2, 1) * np.sin(2 * np.pi * random.uniform(300, 7500) * time + random.uniform(0, 6))
            for _ in range(random.integers(1, 7))
        )
        knock = random.normal(size=count) * random.uniform(0, 2) * np.exp(-time * random.uniform(50, 400))
        noise[start : start + count] += (ring + knock) * np.exp(-time * random.uniform(8, 120)) * random.uniform(0.2, 4)
    return noise


def _alarm(random: Generator, size: int) -> NDArray[np.float64]:
    time = np.arange(size) / SAMPLE_RATE
    tone, period, share = random.uniform(300, 4000), random.uniform(0.15, 1.5), random.uniform(0.2, 0.9)
    second = 1 + random.uniform(0, 0.3) * ((time / period / 2) % 1 > 0.5)
    beep = ((time / period) % 1 < share) * np.sin(2 * np.pi * tone * second * time)
    return beep + 0.05 * _coloured(random, size, 1)


def _music(random: Generator, size: int) -> NDArray[np.float64]:
    noise = 0.02 * _coloured(random, size, 1)
    step, root = random.uniform(0.12, 0.6), random.uniform(90, 260)
    harmonics, decay = int(random.integers(3, 12)), random.uniform(1, 9)
    for beat in range(int(size / SAMPLE_RATE / step)):
        start = int(beat * step * SAMPLE_RATE)
        count = min(size - start, int(step * SAMPLE_RATE * random.uniform(1, 3)))
        time = np.arange(count) / SAMPLE_RATE
        for _ in range(random.integers(1, 4)):
            note = root * 2 ** ((random.choice([0, 2, 4, 5, 7, 9, 11]) + 12 * random.integers(0, 3)) / 12)
            tone = sum(np.sin(2 * np.pi * note * k * time) / k ** random.uniform(0.8, 2) for k in range(1, harmonics))
            noise[start : start + count] += tone * np.exp(-time * decay)
        if random.random() < 0.5:
            count = min(size - start, 2400)
            drum = random.normal(size=count) * np.exp(-np.arange(count) / random.uniform(100, 800))
            noise[start : start + count] += drum * random.uniform(0.3, 3)
    return noise


_MAKERS = {
    "stationary": (0.25, _stationary),
    "fluctuating": (0.20, _fluctuating),
    "machine": (0.17, _machine),
    "clatter": (0.20, _clatter),
    "alarm": (0.06, _alarm),
    "music": (0.12, _music),
}


def made(random: Generator, count: int) -> list[Noise]:
    """Noises of :data:`MADE_S` seconds."""
    kinds, shares = list(_MAKERS), [share for share, _ in _MAKERS.values()]
    found = []
    for kind in random.choice(kinds, count, p=shares):
        audio = _MAKERS[kind][1](random, MADE_S * SAMPLE_RATE)
        found.append(Noise(kind, np.asarray(audio / np.abs(audio).max(), np.float32)))
    return found
