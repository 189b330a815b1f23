"""The ears and the understanding that settings ask for, built and checked: models, hotwords, grammars.

An :class:`Engine` works in the process that built it; the daemon keeps one in a process of its own (``worker``).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from edge_asr import clock, grammar, hotwords, inference, installation, model_store, prepared, settings, trial
from edge_asr.audio import FrameCutter
from edge_asr.commands import Interpreter
from edge_asr.events import Utterance
from edge_asr.hotwords import Hotword, Hotwords
from edge_asr.inference import OnnxRecognizer, SherpaRecognizer, SileroDetector
from edge_asr.language_model import LanguageModel
from edge_asr.model_store import ModelFiles
from edge_asr.pipeline import NO_STATION, Ear, Understanding, understand
from edge_asr.settings import Settings
from edge_asr.text_decoding import TextDecoder

log = logging.getLogger(__name__)


def grammar_paths(options: settings.Commands) -> dict[str, Path]:
    """Name -> file for every grammar of the settings: a bundled name or a path. Raises GrammarError."""
    folder = model_store.bundled("grammars")
    found: dict[str, Path] = {}
    for name in options.grammars:
        shipped = folder / f"{name}.yaml"
        found[name] = shipped if shipped.exists() else Path(name)
        if not found[name].exists():
            names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
            raise grammar.GrammarError(f"commands.grammars: {name!r} is neither a file nor one of: {names}")
    return found


def read_grammars(options: settings.Commands) -> dict[str, bytes]:
    """Name -> content for every grammar of the settings. Raises GrammarError."""
    return {name: grammar.content_of(path) for name, path in grammar_paths(options).items()}


@dataclass(frozen=True)
class Vocabulary:
    """The site's words and grammars as they were when they were read: their files may be broken or gone since."""

    hotwords: tuple[Hotword, ...]
    grammars: Mapping[str, bytes]
    """Content by the name in the settings."""

    @classmethod
    def read(cls, options: Settings) -> Vocabulary:
        """From the files of the settings. Raises HotwordError, GrammarError."""
        return cls(hotwords.load(options.hotwords), read_grammars(options.commands))

    @cached_property
    def hotwords_sha256(self) -> str:
        """By which two lists can be told apart."""
        return hotwords.digest(self.hotwords)

    @cached_property
    def grammars_sha256(self) -> Mapping[str, str]:
        """Of each file by the name in the settings."""
        return {name: hashlib.sha256(content).hexdigest() for name, content in self.grammars.items()}


@dataclass(frozen=True)
class Engine:
    """The ears and the understanding that the settings ask for."""

    files: ModelFiles
    recognizer: OnnxRecognizer | SherpaRecognizer
    decoder: TextDecoder | None
    """None: what the recognizer writes by itself stands."""
    language_model: LanguageModel | None
    interpreter: Interpreter | None
    new_detector: Callable[[], SileroDetector]

    @classmethod
    def build(cls, options: Settings, vocabulary: Vocabulary | None = None) -> Engine:
        """Check and load models, hotwords and grammars; the last two from their files unless they were read before.

        Raises ModelError, HotwordError, GrammarError.
        """
        listed = vocabulary or Vocabulary.read(options)  # a wrong name is told at once, not after a model was loaded
        provider = inference.reachable(options.model)
        files = model_store.locate(installation.chosen(options), options.models_directory, provider)
        if not files.model.is_relative_to(model_store.bundled("models")):
            installation.check_signature(files.model.parent, options.model.signed_by)
        if provider != "cpu" and files.model.name == model_store.WEIGHTS["cpu"][0]:
            log.warning("%s has 8-bit weights only, slower on %s than others; see docs/jetson.md", files.name, provider)
        vad = model_store.locate_vad()
        graph = prepared.find(files, options.models_directory, options.model)
        recognizer = inference.open_recognizer(files, options.model, graph, options.models_directory)
        language_model = LanguageModel.of(files, options.model, len(recognizer.table))
        decoder = build_decoder(listed.hotwords, recognizer, language_model)
        interpreter = build_interpreter(options.commands, listed.grammars, recognizer)
        return cls(files, recognizer, decoder, language_model, interpreter, lambda: SileroDetector(vad))

    @property
    def name(self) -> str:
        """The model's name, for the payloads."""
        return self.recognizer.name

    def understand(self, utterance: Utterance, *, final: bool) -> Understanding:
        """Recognize an utterance; a final one is interpreted too. Blocking."""
        return understand(utterance, self.recognizer, self.decoder, self.interpreter if final else None)

    def under(self, options: Settings, vocabulary: Vocabulary) -> Engine:
        """The same ears with the hotwords and grammars of other settings. Raises GrammarError."""
        decoder = build_decoder(vocabulary.hotwords, self.recognizer, self.language_model)
        self.recognizer.step()
        interpreter = build_interpreter(options.commands, vocabulary.grammars, self.recognizer)
        return replace(self, decoder=decoder, interpreter=interpreter)

    def hear(self, pcm: bytes, options: settings.Vad, source: str = NO_STATION) -> Iterator[Understanding]:
        """Every utterance of a recording (16 kHz mono int16), as the daemon would hear it."""
        ear = Ear(self.new_detector(), options)
        cutter = FrameCutter(source)
        now_ns = clock.boottime_ns()
        for frame in (*cutter.feed(pcm, now_ns), *cutter.flush(now_ns)):
            for utterance in ear.feed(frame):
                yield self.understand(utterance, final=True)
        for utterance in ear.flush():
            yield self.understand(utterance, final=True)


def prepare_engine(options: Settings, vocabulary: Vocabulary) -> Engine:
    """One that has heard its golden recording rightly, else ModelError; other errors as of Engine.build."""
    engine = Engine.build(options, vocabulary)
    trial.hear_golden(engine.recognizer, engine.files)
    return engine


def build_interpreter(
    options: settings.Commands, grammars: Mapping[str, bytes], recognizer: OnnxRecognizer | SherpaRecognizer
) -> Interpreter | None:
    """The site's grammars under the model's tokens; None without grammars. Raises GrammarError."""
    if not grammars:
        return None
    graph = grammar.compile_graph({name: grammar.parse(content, name) for name, content in grammars.items()})
    recognizer.step()
    interpreter = Interpreter(graph, recognizer.table, options, recognizer.languages)
    if interpreter.unspellable:
        words = ", ".join(interpreter.unspellable)
        log.warning("the model %s cannot write, so never hear: %s; reword the grammar", recognizer.name, words)
    return interpreter


def build_decoder(
    listed: Sequence[Hotword],
    recognizer: OnnxRecognizer | SherpaRecognizer,
    language_model: LanguageModel | None = None,
) -> TextDecoder | None:
    """The site's words and the language model under the model's tokens; None without any."""
    if not listed and language_model is None:
        return None
    return TextDecoder(build_hotwords(listed, recognizer, language_model), recognizer.table, language_model)


def build_hotwords(
    listed: Sequence[Hotword],
    recognizer: OnnxRecognizer | SherpaRecognizer,
    language_model: LanguageModel | None = None,
) -> Hotwords:
    """The site's words under the model's tokens."""
    words = Hotwords(listed, recognizer.table, language_model)
    if words.unspellable:
        never = ", ".join(words.unspellable)
        log.warning("the model %s cannot write, so never hear: %s; give them `spoken`", recognizer.name, never)
    return words
