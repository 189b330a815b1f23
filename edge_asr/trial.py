"""Decides whether a model is fit to be activated: in a process of its own, which a native library may end.

The child loads the model with the engine of the settings and hears its golden recording. sherpa-onnx and onnxruntime
end the process on some files that are no model of theirs; the parent then says so in one line and lives on. The daemon
asks the same of its model at every start (``engine``): a sound file is not yet a sound model.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rapidfuzz.distance import Levenshtein

from edge_asr import child, inference, model_store, settings
from edge_asr.audio import AudioFileError, read_file
from edge_asr.child import ChildError
from edge_asr.events import BYTES_PER_SAMPLE, SAMPLE_RATE
from edge_asr.inference import RecognizerError
from edge_asr.language_model import LanguageModel
from edge_asr.model_store import Golden, ModelError, ModelFiles

LIMIT_S: Final = 120.0
"""A model that takes longer to load and to hear three words is of no use on this box."""

BUNDLED_GOLDEN: Final = Golden(audio="golden.flac", text="start conveyor three")
"""For recognizers of English that bring none."""

WRONG_WORDS: Final = 1
"""A small model may mishear one word of the bundled recording; spoilt weights or a foreign vocabulary hear none."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a trial that was passed."""

    heard: str | None
    """The golden recording's text; None: there is none in the site's language, only the contract was tried."""


def golden_of(files: ModelFiles) -> tuple[Path, str] | None:
    """(recording, what it says) for a model; None: nothing is known that it must hear."""
    own = files.manifest.golden
    if own is not None:
        return files.model.parent / own.audio, own.text
    if "en" not in files.manifest.languages:
        return None
    return model_store.bundled("recordings") / BUNDLED_GOLDEN.audio, BUNDLED_GOLDEN.text


def hears_right(heard: str, said: str, *, exactly: bool) -> bool:
    """Whether a golden recording was understood; punctuation and capitals do not count."""
    words = [["".join(filter(str.isalnum, word)) for word in text.casefold().split()] for text in (heard, said)]
    return Levenshtein.distance(*words) <= (0 if exactly else WRONG_WORDS)


def listen(recognizer: inference.OnnxRecognizer | inference.SherpaRecognizer, files: ModelFiles) -> str:
    """What a loaded model hears in its golden recording, or in the bundled one whatever its language."""
    try:
        return recognizer.recognize(read_file(_recording(files))).transcript.text
    except (RecognizerError, AudioFileError) as error:
        raise ModelError(f"{files.name}: fails on its golden recording ({error}); import the model again") from None


def golden_s(files: ModelFiles) -> float:
    """Seconds of audio that :func:`listen` hears."""
    return len(read_file(_recording(files))) / BYTES_PER_SAMPLE / SAMPLE_RATE


def _recording(files: ModelFiles) -> Path:
    known = golden_of(files)
    return known[0] if known else model_store.bundled("recordings") / BUNDLED_GOLDEN.audio


def hear_golden(recognizer: inference.OnnxRecognizer | inference.SherpaRecognizer, files: ModelFiles) -> Verdict:
    """Hold what a loaded model hears against what its golden recording is known to say. Raises ModelError."""
    golden = golden_of(files)
    spoken = recognizer.languages
    if golden is None or (files.manifest.golden is None and spoken and "en" not in spoken):
        return Verdict(None)
    heard, said = listen(recognizer, files), golden[1]
    if not hears_right(heard, said, exactly=files.manifest.golden is not None):
        remedy = "import the model again, or one of the language in model.languages"
        raise ModelError(f"{files.name}: hears {heard!r} where {said!r} is said; {remedy}")
    return Verdict(heard)


def run(name_or_path: str, installed: Path, options: settings.Model) -> Verdict:
    """Try a model in a process of its own. Raises ModelError with what it does wrong."""
    chosen = options.model_copy(update={"name": name_or_path, "signed_by": None})
    try:
        limit_s = inference.BUILD_LIMIT_S if inference.reachable(chosen) == "tensorrt" else LIMIT_S
        answer = child.ask("edge_asr.trial", str(installed), chosen.model_dump_json(), limit_s=limit_s)
    except TimeoutError:
        raise ModelError(f"{name_or_path}: is not ready after {limit_s:g} s; choose a smaller model") from None
    except ChildError as error:
        remedy = f"it is no model for {options.engine}"
        raise ModelError(f"{name_or_path}: ends the process that loads it ({error}); {remedy}") from None
    if answer["error"]:
        raise ModelError(answer["error"])
    return Verdict(answer["heard"])


def _child(installed: str, options: str) -> dict[str, str | None]:
    wanted = settings.Model.model_validate_json(options)
    assert wanted.name is not None  # noqa: S101 - see run
    try:
        files = model_store.locate(wanted.name, Path(installed), inference.reachable(wanted))
        recognizer = inference.open_recognizer(files, wanted, installed=Path(installed))
        LanguageModel.of(files, wanted, len(recognizer.table))
        return {"heard": hear_golden(recognizer, files).heard, "error": None}
    except ModelError as error:
        return {"heard": None, "error": str(error)}


if __name__ == "__main__":
    print(json.dumps(_child(*sys.argv[1:])))
