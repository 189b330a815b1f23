"""The token table: a blank, unigram pieces of at most six letters, and SenseVoice's tags."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

import sentencepiece

from training import texts

_LANGUAGES = ("zh", "en", "yue", "ja", "ko", "nospeech")
_EMOTIONS = ("HAPPY", "SAD", "ANGRY", "NEUTRAL", "FEARFUL", "DISGUSTED", "SURPRISED", "EMO_UNKNOWN")
_EVENTS = ("Speech", "BGM", "Applause", "Laughter", "Cry", "Sneeze", "Breath", "Cough", "Event_UNK")
TAGS = tuple(f"<|{name}|>" for name in (*_LANGUAGES, *_EMOTIONS, *_EVENTS, "withitn", "woitn"))
BLANK = 0


class Tokenizer:
    """Text <-> identifiers of the network's vocabulary."""

    def __init__(self, model: Path) -> None:
        self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
        count = self._pieces.vocab_size()
        self.pieces = ["<blank>", *(self._pieces.id_to_piece(at) for at in range(count)), *TAGS]
        self.ids = {piece: at for at, piece in enumerate(self.pieces)}

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        return [piece + 1 for piece in self._pieces.encode(text)]

    def sample(self, text: str) -> list[int]:
        """One of the spellings of the text, the likelier the more often: a word may be heard in other pieces too."""
        return [piece + 1 for piece in self._pieces.encode(text, enable_sampling=True, alpha=0.3, nbest_size=-1)]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces[each] for each in ids).replace("▁", " ").strip()

    def write(self, path: Path) -> None:
        """tokens.txt as sherpa-onnx reads it."""
        path.write_text("".join(f"{piece} {at}\n" for at, piece in enumerate(self.pieces)), encoding="utf-8")


def train(path: Path, size: int = 500, seed: int = 1) -> None:
    """Make the pieces from the training texts alone."""
    random = Random(seed)
    lines = [texts.draw(random).text for _ in range(80_000)] + list(texts.general_sentences(held_out=False))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(path.with_suffix("")),
        vocab_size=size,
        model_type="unigram",
        character_coverage=1.0,
        add_dummy_prefix=True,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        unk_id=0,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
        max_sentencepiece_length=6,
    )
