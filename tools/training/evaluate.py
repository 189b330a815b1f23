"""How well a model hears: the figures of its card.

Three readings of the same recordings: *greedy*, the likeliest token of each frame, as an engine without
posteriors writes it; *written*, the text of the product, with the language model; and, of orders, *constrained*, the
product's own decision on the posteriors with its thresholds. A text is an order if it is near enough to a sentence of
the grammar by edit distance. The recordings of people are those of ../shared/data, where they are, and none of them was
trained on.
"""

from __future__ import annotations

import gzip
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

import av
import numpy as np
import soxr
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein

from edge_asr import engine, grammar, inference, model_store, settings
from edge_asr.audio import from_float, read_file, to_float
from edge_asr.commands import Interpreter, load_graph
from edge_asr.evaluation import mix
from edge_asr.events import Command
from edge_asr.language_model import LanguageModel
from edge_asr.posteriors import Recognition
from edge_asr.wordgraph import Arc, WordGraph
from training import examples, texts, voices
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
        files, options = model_store.locate(f"{folder}/"), settings.Model()
        self.recognizer = inference.OnnxRecognizer(files, options)
        language_model = LanguageModel.of(files, options, len(self.recognizer.table))
        self._decoder = engine.build_decoder((), self.recognizer, language_model)
        self.cpu_s = self.heard_s = 0.0

    def text(self, audio: Wave) -> str:
        """Greedy."""
        return self.recognize(audio).transcript.text

    def written(self, recognition: Recognition) -> str:
        began = time.thread_time()
        text = (
            recognition.transcript.text if self._decoder is None else self._decoder.apply(recognition).transcript.text
        )
        self.cpu_s += time.thread_time() - began
        return text

    def recognize(self, audio: Wave) -> Recognition:
        pcm = from_float(audio)
        began = time.thread_time()
        heard = self.recognizer.recognize(pcm)
        self.cpu_s += time.thread_time() - began
        self.heard_s += audio.size / voices.SAMPLE_RATE
        return heard


def padded(audio: Wave, seconds: float = 0.3) -> Wave:
    return np.pad(audio, int(seconds * voices.SAMPLE_RATE))


def conditions(noise: Wave, snrs_db: Sequence[float]) -> Iterator[tuple[str, Callable[[Wave, str], Wave]]]:
    """(name, what it makes of a recording of that name)."""

    def noisy(audio: Wave, name: str, snr_db: float) -> Wave:
        return mix(audio, noise, snr_db, f"0:{name}:{snr_db:g}")

    def far(audio: Wave, name: str) -> Wave:
        return examples.room(audio, Random(name), np.random.default_rng(crc32(name.encode())), far=True)

    def overdriven(audio: Wave, _: str) -> Wave:
        return np.clip(audio / np.abs(audio).max() * np.float32(4), -1, 1) * np.float32(0.5)

    yield "clean", lambda audio, _: audio
    for snr_db in snrs_db:
        yield f"{snr_db:g} dB", partial(noisy, snr_db=snr_db)
    yield "telephone, 8 kHz", lambda audio, name: examples.telephone(audio, Random(name))
    yield "Opus", lambda audio, _: examples.opus(audio / np.abs(audio).max() * np.float32(0.7))
    yield "overdriven by 12 dB", overdriven
    yield "far off in a room", far
    for percent in (20, 35):
        yield f"{percent} % faster", partial(_faster, factor=1 + percent / 100)


def _faster(audio: Wave, _: str, factor: float) -> Wave:
    """Higher, too, as from a tape."""
    return np.asarray(soxr.resample(audio, voices.SAMPLE_RATE * factor, voices.SAMPLE_RATE), np.float32)


def orders(ears: Ears, folder: Path, snrs_db: Sequence[float]) -> Iterator[tuple[str, Mapping[str, float]]]:
    """(condition, acceptance of each reading) of the real coffee orders of FOLDER."""
    entries = [json.loads(line) for line in (folder / "commands.jsonl").read_text(encoding="utf-8").splitlines()]
    noise = to_float(read_file(folder / "kitchen-noise.flac"))
    graph = load_graph([GRAMMARS / "coffee.en.yaml"])
    nearest = Nearest(graph.words)
    interpreter = Interpreter(graph, ears.recognizer.table, settings.Commands())
    for condition, changed in conditions(noise, snrs_db):
        accepted = {"greedy": 0, "written": 0, "constrained": 0}
        for entry in entries:
            audio = to_float(read_file(folder / entry["audio"]))
            heard = ears.recognize(changed(audio, Path(entry["audio"]).name))
            for name, text in (("greedy", heard.transcript.text), ("written", ears.written(heard))):
                reading = nearest(text) if text else None
                accepted[name] += reading is not None and dict(reading.slots) == entry["slots"]
            decision = interpreter.interpret(heard)
            accepted["constrained"] += isinstance(decision, Command) and decision.slots == entry["slots"]
        yield condition, {name: round(count / len(entries), 3) for name, count in accepted.items()}


def digits(ears: Ears, folder: Path) -> Mapping[str, tuple[float, float]]:
    """Speaker -> share of single spoken digits whose text is the digit, greedy and written."""
    right: dict[str, list[tuple[bool, bool]]] = {}
    for line in (folder / "digits.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        audio = to_float(read_file(folder / entry["audio"]))
        heard = ears.recognize(padded(audio / np.abs(audio).max() * 0.5))
        texts_ = heard.transcript.text, ears.written(heard)
        right.setdefault(entry["speaker"], []).append((texts_[0] == entry["text"], texts_[1] == entry["text"]))
    return {
        speaker: (round(float(greedy), 3), round(float(written), 3))
        for speaker, each in right.items()
        for greedy, written in [np.mean(each, axis=0)]
    }


def noise_alone(ears: Ears, folder: Path, folds: str) -> tuple[int, int]:
    """(clips that gave text, clips) of recordings of noise."""
    clips = recordings(folder, folds)
    return sum(bool(ears.text(clip.audio * np.float32(0.3))) for clip in clips), len(clips)


def spoken(shard: Path) -> Iterator[tuple[str, Wave]]:
    """(text, audio) of a shard, in a silence that is no digital zero."""
    for said in voices.read_shard(shard):
        audio = padded(said.audio.astype(np.float32) / 32768 * 0.5)
        yield said.text, audio + np.random.default_rng(0).normal(0, 1e-4, audio.size).astype(np.float32)


def joined(said: Iterable[tuple[str, Wave]], least_s: float = 15.0) -> Iterator[tuple[str, Wave]]:
    """Sentences one after the other until they are so long."""
    texts_, pieces = list[str](), list[Wave]()
    for text, audio in said:
        texts_.append(text)
        pieces.append(audio)
        if sum(map(len, pieces)) > least_s * voices.SAMPLE_RATE:
            yield " ".join(texts_), np.concatenate(pieces)
            texts_, pieces = [], []


def word_errors(ears: Ears, said: Iterable[tuple[str, Wave]]) -> Mapping[str, float]:
    """Word error rate of both readings of (text, audio)."""
    wrong, words = {"greedy": 0, "written": 0}, 0
    for expected, audio in said:
        heard = ears.recognize(audio)
        for name, text in (("greedy", heard.transcript.text), ("written", ears.written(heard))):
            wrong[name] += Levenshtein.distance(expected.split(), text.split())
        words += len(expected.split())
    return {name: round(count / words, 3) for name, count in wrong.items()}


PROMPTS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
PROMPTS_TEXTS = Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
"""Debian's asterisk-core-sounds-en-g722 and asterisk-core-sounds-en: a real woman, who speaks for telephone systems."""


def prompts() -> Iterator[tuple[str, Wave]]:
    """(text, 16 kHz audio) of her sentences of two words and more, without digits and remarks."""
    for line in gzip.decompress(PROMPTS_TEXTS.read_bytes()).decode("utf-8", "ignore").splitlines():
        name, _, said = line.partition(":")
        path, text = PROMPTS / f"{name.strip()}.g722", " ".join(re.findall(r"[a-z']+", said.lower()))
        if line.startswith(";") or " " not in text or re.search(r"[\d\[(<]", said) or not path.exists():
            continue
        with av.open(str(path), format="g722") as stream:
            pcm = np.concatenate([frame.to_ndarray().reshape(-1) for frame in stream.decode(audio=0)])
        if 0.25 < pcm.size / voices.SAMPLE_RATE < voices.LONGEST_S:
            yield text, to_float(pcm.tobytes()) / np.abs(to_float(pcm.tobytes())).max() * np.float32(0.5)


ACCURACY = Path(__file__).resolve().parents[1] / "accuracy"
"""What must not be accepted, written down; see tools/make-accuracy-sets."""

SEED, SEEDS_TO_CHOOSE_BY = 7, (8, 9)
"""Of the unseen voice's sentences: those of the figures, and those that choices may be made by."""

UNSEEN: Mapping[str, Callable[[Random], texts.Sentence]] = {
    "general": lambda random: texts.sentence("general", random.choice(texts.general_sentences(held_out=True))),
    "factory": lambda random: texts.of_grammar(random, "factory.en") if random.random() < 0.6 else texts.free(random),
}
"""General sentences never trained on, and sentences of the shop floor."""


def unseen(out: Path, seed: int = SEED) -> tuple[Path, Path]:
    """A shard of each in the unseen voice."""
    for name, make in UNSEEN.items():
        voices.synthesize(out / name, "piper", voices.SHARD, seed, make)
    general, factory = (next((out / name).glob(f"piper-{seed}-*.npz")) for name in UNSEEN)
    return general, factory


def unheard() -> frozenset[str]:
    """The sentences of the unseen voice and of docs/accuracy.md's sets: no language model may have read them."""
    drawn = (
        voices.drawn("piper", seed, 0, voices.SHARD, make)[0]
        for seed in (SEED, *SEEDS_TO_CHOOSE_BY)
        for make in UNSEEN.values()
    )
    listed = (path.read_text(encoding="utf-8").splitlines() for path in ACCURACY.glob("*.txt"))
    return frozenset(
        chain((each.text for each in chain.from_iterable(drawn)), map(texts.normal, chain.from_iterable(listed)))
    )


def everything(model: Path, work: Path, shared: Path, noise_folds: str) -> dict[str, Any]:
    """Every figure that the recordings at hand allow; prints each as it is known. ``noise_folds`` were left out."""
    ears, figures = Ears(model), dict[str, Any]()

    def known(name: str, value: object) -> None:
        figures[name] = value
        print(f"{name:32s} {value}", flush=True)

    general, factory = unseen(work / "unseen")
    known("WER general, unseen voice", word_errors(ears, spoken(general)))
    known("WER factory, unseen voice", word_errors(ears, spoken(factory)))
    known("the same, 15 to 20 s at a time", word_errors(ears, joined(spoken(factory))))
    if PROMPTS_TEXTS.exists() and PROMPTS.exists():
        known("WER prompts, a real woman", word_errors(ears, ((text, padded(audio)) for text, audio in prompts())))
    if (shared / "spoken-digits").exists():
        known("digits greedy, written", digits(ears, shared / "spoken-digits"))
    if noise_folds and (shared / "noise").exists():
        known("noise that gave text", "{} of {}".format(*noise_alone(ears, shared / "noise", noise_folds)))
    if (shared / "spoken-commands").exists():
        for name, accepted in orders(ears, shared / "spoken-commands", (15, 12, 9, 6)):
            known(f"orders {name}", accepted)
    known("real-time factor", round(ears.cpu_s / ears.heard_s, 4))
    known("megabytes", round(sum(path.stat().st_size for path in model.iterdir()) / 1e6, 1))
    return figures
