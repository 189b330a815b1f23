"""How well a model hears: the figures of its card.

Two readings of the same recordings: *greedy*, the plain text held against the grammar by edit distance, which is what
an engine without posteriors can do; and *constrained*, the product's own decision on the posteriors with its
thresholds. The recordings of people are those of ../shared/data, where they are, and none of them was trained on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein

from edge_asr import grammar, inference, model_store, settings
from edge_asr.audio import from_float, read_file, to_float
from edge_asr.commands import Interpreter, load_graph
from edge_asr.evaluation import mix
from edge_asr.events import Command
from edge_asr.wordgraph import Arc, WordGraph
from training import texts, voices
from training.noise import recordings
from training.texts import GRAMMARS

Wave = NDArray[np.float32]

TOLERANCE = 0.35
"""Edited letters per letter of a text beyond which it is no sentence of the grammar."""


class Nearest:
    """The sentence of a grammar that a text is nearest to, in letters changed."""

    def __init__(self, graph: WordGraph) -> None:
        self.endings, self.outgoing = graph.endings, graph.outgoing()
        self.order = self._topological()

    def _topological(self) -> list[int]:
        order: list[int] = []
        seen = set[int]()
        stack = [(0, False)]
        while stack:
            node, done = stack.pop()
            if done:
                order.append(node)
            elif node not in seen:
                seen.add(node)
                stack += [(node, True), *((arc.target, False) for arc in self.outgoing.get(node, []))]
        return order[::-1]

    def __call__(self, text: str) -> grammar.Reading | None:
        words = text.split()
        best: dict[int, tuple[float, tuple[Arc, ...]]] = {0: (0.0, ())}
        for word in [*words, None]:
            for node in self.order:  # words of the sentence that were not heard
                if node in best:
                    for arc in self.outgoing.get(node, []):
                        self._offer(best, arc.target, best[node][0] + len(arc.step.word), (*best[node][1], arc))
            if word is None:
                break
            after = {node: (cost + 0.9 * len(word) + 0.3, path) for node, (cost, path) in best.items()}
            for node, (cost, path) in best.items():
                for arc in self.outgoing.get(node, []):
                    self._offer(after, arc.target, cost + _distance(word, arc.step.word), (*path, arc))
            best = after
        ends = [(cost, path, node) for node, (cost, path) in best.items() if node in self.endings]
        cost, path, node = min(ends, key=lambda end: end[0])
        if cost > TOLERANCE * max(1, len(text.replace(" ", ""))):
            return None
        return grammar.read([arc.step for arc in path], self.endings[node][0])

    @staticmethod
    def _offer(best: dict[int, tuple[float, tuple[Arc, ...]]], node: int, cost: float, path: tuple[Arc, ...]) -> None:
        if node not in best or cost < best[node][0]:
            best[node] = (cost, path)


@cache
def _distance(one: str, other: str) -> int:
    return Levenshtein.distance(one, other)


class Ears:
    """One model and what the product would make of its posteriors."""

    def __init__(self, folder: Path) -> None:
        self.recognizer = inference.OnnxRecognizer(model_store.locate(f"{folder}/"), settings.Model())
        self.cpu_s = self.heard_s = 0.0

    def text(self, audio: Wave) -> str:
        return self.recognize(audio).transcript.text

    def recognize(self, audio: Wave) -> inference.Recognition:
        pcm = from_float(audio)
        began = time.thread_time()
        heard = self.recognizer.recognize(pcm)
        self.cpu_s += time.thread_time() - began
        self.heard_s += audio.size / voices.SAMPLE_RATE
        return heard


def padded(audio: Wave, seconds: float = 0.3) -> Wave:
    return np.pad(audio, int(seconds * voices.SAMPLE_RATE))


def orders(ears: Ears, folder: Path, snrs_db: Sequence[float | None]) -> Iterator[tuple[str, float, float]]:
    """(condition, greedy acceptance, constrained acceptance) of the real coffee orders of FOLDER."""
    entries = [json.loads(line) for line in (folder / "commands.jsonl").read_text(encoding="utf-8").splitlines()]
    noise = to_float(read_file(folder / "kitchen-noise.flac"))
    graph = load_graph([GRAMMARS / "coffee.en.yaml"])
    nearest = Nearest(graph.words)
    interpreter = Interpreter(graph, ears.recognizer.table, settings.Commands())
    for snr_db in snrs_db:
        greedy = constrained = 0
        for entry in entries:
            audio = to_float(read_file(folder / entry["audio"]))
            if snr_db is not None:
                audio = mix(audio, noise, snr_db, f"0:{Path(entry['audio']).name}:{snr_db:g}")
            heard = ears.recognize(audio)
            reading = nearest(heard.transcript.text) if heard.transcript.text else None
            greedy += reading is not None and dict(reading.slots) == entry["slots"]
            decision = interpreter.interpret(heard)
            constrained += isinstance(decision, Command) and decision.slots == entry["slots"]
        name = "clean" if snr_db is None else f"{snr_db:g} dB"
        yield name, greedy / len(entries), constrained / len(entries)


def digits(ears: Ears, folder: Path) -> Mapping[str, float]:
    """Speaker -> share of single spoken digits whose text is the digit."""
    right: dict[str, list[bool]] = {}
    for line in (folder / "digits.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        audio = to_float(read_file(folder / entry["audio"]))
        text = ears.text(padded(audio / np.abs(audio).max() * 0.5))
        right.setdefault(entry["speaker"], []).append(text == entry["text"])
    return {speaker: float(np.mean(each)) for speaker, each in right.items()}


def noise_alone(ears: Ears, folder: Path, folds: str) -> tuple[int, int]:
    """(clips that gave text, clips) of recordings of noise."""
    clips = recordings(folder, folds)
    return sum(bool(ears.text(clip.audio * np.float32(0.3))) for clip in clips), len(clips)


def word_errors(ears: Ears, shards: Sequence[Path]) -> float:
    """Word error rate on what somebody said."""
    wrong = words = 0
    for shard in shards:
        for said in voices.read_shard(shard):
            audio = padded(said.audio.astype(np.float32) / 32768 * 0.5)
            audio += np.random.default_rng(0).normal(0, 1e-4, audio.size).astype(np.float32)
            wrong += Levenshtein.distance(said.text.split(), ears.text(audio).split())
            words += len(said.text.split())
    return wrong / words


def unseen(out: Path, count: int = 200) -> tuple[Path, Path]:
    """Two shards in the unseen voice: general sentences never trained on, and sentences of the shop floor."""
    general = texts.general_sentences(held_out=True)
    makers = {
        "general": lambda random: texts.sentence("general", random.choice(general)),
        "factory": lambda random: (
            texts.of_grammar(random, "factory.en") if random.random() < 0.6 else texts.free(random)
        ),
    }
    for name, make in makers.items():
        voices.synthesize(out / name, "piper", min(count, voices.SHARD), 7, make)
    return next((out / "general").glob("*.npz")), next((out / "factory").glob("*.npz"))


def everything(model: Path, work: Path, shared: Path, noise_folds: str) -> dict[str, Any]:
    """Every figure that the recordings at hand allow; prints each as it is known."""
    ears, figures = Ears(model), dict[str, Any]()

    def known(name: str, value: object) -> None:
        figures[name] = value
        print(f"{name:32s} {value}", flush=True)

    general, factory = unseen(work / "unseen")
    known("WER general, unseen voice", round(word_errors(ears, [general]), 3))
    known("WER factory, unseen voice", round(word_errors(ears, [factory]), 3))
    if (shared / "spoken-digits").exists():
        known("digits greedy", {who: round(share, 3) for who, share in digits(ears, shared / "spoken-digits").items()})
    if (shared / "noise").exists():
        known("noise that gave text", "{} of {}".format(*noise_alone(ears, shared / "noise", noise_folds)))
    if (shared / "spoken-commands").exists():
        for name, greedy, constrained in orders(ears, shared / "spoken-commands", (None, 15, 12, 9, 6)):
            known(f"orders {name}", {"greedy": round(greedy, 3), "constrained": round(constrained, 3)})
    known("real-time factor", round(ears.cpu_s / ears.heard_s, 4))
    known("megabytes", round(sum(path.stat().st_size for path in model.iterdir()) / 1e6, 1))
    return figures
