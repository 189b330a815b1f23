"""What a model takes for a command that nobody gave, found by asking it; the next run should hear more of that.

Hard negatives (Sung and Poggio, 1998): sentences near those of the grammars, and commands with numbers, are said by the
quick synthesizers and heard by the model; what it reads otherwise than it was said, surely enough, is written down.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from random import Random

from edge_asr import settings
from edge_asr.commands import Interpreter, load_graph
from edge_asr.events import Command, Rejection
from edge_asr.text_matching import TextMatcher
from training import texts, voices
from training.evaluate import Ears, padded, unheard
from training.texts import GRAMMARS, Sentence

MISREAD = "misread.jsonl"
"""The file in WORK that holds what was found."""

NAMES = ("coffee.en", "factory.en")
SPEAKERS = ("flite", "espeak")
"""Those that need a twentieth of a second for a sentence."""

PER_TURN = 50
"""Sentences that one speaker says in a row."""

NEAR = 0.3
"""Confidence from which a misreading counts: below the .5 of a command, for noise and other voices move it."""


def candidate(random: Random, name: str) -> Sentence:
    """Mostly what is no command, else a command, for the number in it."""
    if random.random() < 0.75:
        return texts.decoy(random, name)
    return texts.of_grammar(random, name)


class Listener:
    """One model and what one grammar makes of what it hears."""

    def __init__(self, ears: Ears, name: str) -> None:
        graph = load_graph([GRAMMARS / f"{name}.yaml"])
        self._ears, self._matcher = ears, TextMatcher(graph)
        self._interpreter = Interpreter(graph, ears.recognizer.table, settings.Commands())

    def misreads(self, each: Sentence, audio: voices.Wave) -> bool:
        """Whether the sentence is read as a command that it is not."""
        if any(len(word) == 1 and word.isupper() for word in each.say.split()):
            return False  # the label holds the letters of an abbreviation, the grammar the abbreviation
        meant = self._matcher.readings(each.text)
        decision = self._interpreter.interpret(self._ears.recognize(padded(audio)))
        if isinstance(decision, Command):
            return all((decision.intent, dict(decision.slots)) != (it.intent, dict(it.slots)) for it in meant)
        return _is_near(decision) and decision.candidates[0] not in map(str, meant)


def _is_near(decision: Rejection) -> bool:
    return bool(decision.candidates) and decision.confidence >= NEAR


def misread(model: Path, seed: int) -> Iterator[Sentence | None]:
    """What one model misreads, without end; None for each sentence that it does not."""
    ears = Ears(model)
    listeners = {name: Listener(ears, name) for name in NAMES}
    random = Random(seed)
    for turn in count():
        name, speaker = NAMES[turn % len(NAMES)], SPEAKERS[turn // len(NAMES) % len(SPEAKERS)]
        sentences = [candidate(random, name) for _ in range(PER_TURN)]
        said = voices.SPEAKERS[speaker]()(sentences, random)
        for each, (_, audio) in zip(sentences, said, strict=True):
            yield each if audio is not None and listeners[name].misreads(each, audio) else None


def mine(model: Path, out: Path, sentences: int) -> None:
    """Say and hear so many sentences, and append what is misread to OUT, a JSON object a line."""
    kept, measured_by = read(out), unheard()
    for at, each in enumerate(islice(misread(model, len(kept)), sentences), start=1):
        if each is not None and each not in kept and each.text not in measured_by:
            kept.append(each)
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": each.kind, "text": each.text, "say": each.say}) + "\n")
        if at % 500 == 0:
            print(f"{at} heard, {len(kept)} of them misread", flush=True)


def read(path: Path) -> list[Sentence]:
    """What was written down; nothing where the file is not there."""
    if not path.exists():
        return []
    return [Sentence(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def seed_of(path: Path) -> int:
    """Of the utterances of what was written down: another one when more was found."""
    return zlib.crc32(path.read_bytes()) if path.exists() else 0
