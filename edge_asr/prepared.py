"""Decides which graph of a model runs on this CPU: the model's own, or a faster one that was made and proven here.

Law: a prepared graph is used only if it was proven against the model's own graph on this CPU with this onnxruntime:
it hears the same in the golden recording, over the bundled recordings at least :data:`AGREEMENT` of the tokens are the
same and posteriors are at most :data:`FARTHEST` apart (the exact variant: equal in every bit), and it needs less CPU
time. Else the model's own graph runs, and the record says why. What was found is kept beside the models under a key of
model, CPU and onnxruntime, so that another processor or version asks for a new proof. A process of its own does the
work, because a native library may end it (``trial``), one graph in memory at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from rapidfuzz.distance import Levenshtein

from edge_asr import child, inference, model_store, onnx_file, optimization, settings, trial
from edge_asr.audio import read_file
from edge_asr.child import ChildError
from edge_asr.inference import OnnxRecognizer, RecognizerError
from edge_asr.installation import SPARE_BYTES, Store
from edge_asr.model_store import ModelError, ModelFiles, sha256_of
from edge_asr.onnx_file import OnnxFileError

log = logging.getLogger(__name__)

REVISION: Final = 1
"""To be raised when the passes change: what was prepared by others is then prepared anew."""

AGREEMENT: Final = 0.99
"""Share of the tokens that must be the same; two minor versions of onnxruntime differ by a word in 4 % of files."""

FARTHEST: Final = 0.02
"""Mean over frames of the total variation distance between posteriors: how much of their mass lies elsewhere. Rounding
before 8-bit quantization moves 0.003 with a model that hears; quantizing it in the first place moved far more."""

SLOWEST: Final = 0.95
"""Share of the own graph's CPU time above which a prepared one is not worth its disk space."""

ROUNDS: Final = 3
"""Decodes of each recording; the median of their CPU times counts."""

LIMIT_S: Final = 600.0
"""For all of it, on the slowest supported board."""

_RECORDINGS: Final = model_store.bundled("recordings")
FOLDER: Final = ".prepared"
_MAKING: Final = ".making-"
_RECORD: Final = "record.json"
_GRAPH: Final = "model.onnx"

_X86: Final = frozenset(
    {"avx", "avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx_vnni", "amx_int8"}
)
_ARM: Final = frozenset({"asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"})
_FEATURES: Final = _X86 | _ARM
"""What onnxruntime chooses its kernels by, as /proc/cpuinfo calls it."""

Variant = Literal["close", "exact", "own"]


class Record(BaseModel):
    """What came of preparing one model on one CPU."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    model: str
    variant: Variant
    """own: the model's graph, no other is better here."""
    sha256: str = ""
    """Of the prepared graph."""
    agreement: float = 1.0
    """Share of the tokens that are the same."""
    distance: float = 0.0
    """Mean total variation distance from the own graph's posteriors."""
    cpu_ratio: float = 1.0
    """CPU time over that of the own graph."""
    refused: tuple[str, ...] = ()
    """Why which variant is not used."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What one graph made of the recordings."""

    golden: str
    tokens: list[list[str]]
    posteriors: list[NDArray[np.float32]]
    cpu_s: float


def cpu_features(cpuinfo: str | None = None) -> frozenset[str]:
    """Which of the instructions that matter here this CPU has."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace") if cpuinfo is None else cpuinfo
    flags = (line.partition(":")[2].split() for line in text.splitlines() if line.startswith(("flags", "Features")))
    return _FEATURES & set(next(flags, ()))


def has_vnni(features: Iterable[str]) -> bool:
    """Whether unsigned times signed bytes are multiplied and added at once, without saturating in between."""
    return not {"avx512_vnni", "avx_vnni"}.isdisjoint(features)


def key_of(files: ModelFiles, features: Iterable[str]) -> str:
    """Under which a preparation is kept."""
    parts = [files.sha256, ort.__version__, platform.machine(), *sorted(features), str(REVISION)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def is_wanted(options: settings.Model) -> bool:
    """Whether settings let a prepared graph run."""
    return options.optimized and options.provider == "cpu" and options.engine == "onnxruntime"


def find(files: ModelFiles, installed: Path, options: settings.Model) -> Path | None:
    """The prepared graph to run; None: the model's own."""
    if not is_wanted(options):
        return None
    folder = installed / FOLDER / files.sha256
    found = record_of(files, installed)
    if found is None:
        log.info("%s is not prepared for this CPU yet; a daemon does it a minute after its start", files.name)
        return None
    if found.variant == "own":
        log.info("%s runs its own graph: %s", files.name, "; ".join(found.refused))
        return None
    try:
        if sha256_of(folder / _GRAPH) == found.sha256:
            return folder / _GRAPH
        reason = "its SHA-256 is another"
    except OSError as error:
        reason = str(error.strerror)
    log.warning("%s is not used (%s); type `edge-asr models optimize`", folder / _GRAPH, reason)
    return None


def record_of(files: ModelFiles, installed: Path) -> Record | None:
    """What is known of a model on this CPU; None: nothing yet, or of another CPU or onnxruntime."""
    try:
        found = Record.model_validate_json((installed / FOLDER / files.sha256 / _RECORD).read_bytes())
    except (OSError, ValidationError):
        return None
    return found if found.key == key_of(files, cpu_features()) else None


def prepare(name_or_path: str, installed: Path) -> Record:
    """As :func:`prepare_beside`, where no event loop runs."""
    return asyncio.run(prepare_beside(name_or_path, installed))


async def prepare_beside(name_or_path: str, installed: Path) -> Record:
    """Make, prove and keep the fastest graph of a model, in a process of its own. Raises ModelError."""
    try:
        answer = await child.ask_beside("edge_asr.prepared", name_or_path, str(installed), limit_s=LIMIT_S)
    except TimeoutError:
        raise ModelError(f"{name_or_path}: is not prepared after {LIMIT_S:g} s; its own graph is used") from None
    except ChildError as error:
        raise ModelError(f"{name_or_path}: preparing it ended in {error}; its own graph is used") from None
    if "error" in answer:
        raise ModelError(answer["error"])
    return Record.model_validate(answer)


def rewrite(model: Path, to: Path, variant: Variant, features: Iterable[str]) -> None:
    """Write an equivalent graph. Raises ModelError, OSError."""
    fused = to.with_suffix(".fused")
    inference.save_fused(model, fused)
    try:
        graph = onnx_file.read(fused)
    except OnnxFileError as error:
        raise ModelError(f"{model}: {error}") from None
    finally:
        fused.unlink(missing_ok=True)
    passes = [*optimization.EXACT, *(optimization.WITH_VNNI if has_vnni(features) else ())]
    if variant == "close":
        passes += optimization.CLOSE
    for each in passes:
        each(graph)
    onnx_file.write(graph, to)


def _prepare(files: ModelFiles, installed: Path) -> Record:
    """Try the variants, the fastest first, and keep what was found."""
    store = Store(installed)
    with store.changing():
        (installed / FOLDER).mkdir(exist_ok=True)
        for left in (installed / FOLDER).glob(f"{_MAKING}*"):  # by one that was killed
            shutil.rmtree(left)
    needed = 2 * files.model.stat().st_size + SPARE_BYTES
    if shutil.disk_usage(installed).free < needed:
        raise ModelError(f"{installed}: preparing {files.name} needs {needed >> 20} MiB of room; free space first")
    made = Path(tempfile.mkdtemp(prefix=_MAKING, dir=installed / FOLDER))
    try:
        made.chmod(0o755)  # the service's user is another one
        record = _proven(files, made)
        (made / _RECORD).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
        with store.changing():
            forget(files.sha256, installed)
            made.rename(installed / FOLDER / files.sha256)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return record


def forget(sha256: str, installed: Path) -> None:
    """Delete what was prepared of a model."""
    shutil.rmtree(installed / FOLDER / sha256, ignore_errors=True)


def _proven(files: ModelFiles, made: Path) -> Record:
    """The first variant that holds, its graph in the folder; else the model's own."""
    features = cpu_features()
    key, refused, own = key_of(files, features), list[str](), _listen(files, None)
    variants: tuple[Variant, ...] = ("close", "exact")
    for variant in variants:
        graph = made / _GRAPH
        try:
            rewrite(files.model, graph, variant, features)
            heard = _listen(files, graph)
        except (ModelError, RecognizerError) as error:
            refused.append(f"{variant}: {error}")
            continue
        distance, ratio = _distance(own, heard), heard.cpu_s / own.cpu_s
        reason = objection(variant, own, heard)
        if not reason:
            return Record(
                key=key,
                model=files.name,
                variant=variant,
                sha256=sha256_of(graph),
                agreement=round(_agreement(own, heard), 4),
                distance=round(distance, 5),
                cpu_ratio=round(ratio, 3),
                refused=tuple(refused),
            )
        refused.append(f"{variant}: {reason}")
    (made / _GRAPH).unlink(missing_ok=True)
    return Record(key=key, model=files.name, variant="own", refused=tuple(refused))


def _listen(files: ModelFiles, graph: Path | None) -> Heard:
    """Let one graph hear the bundled recordings."""
    recognizer = OnnxRecognizer(files, settings.Model(), graph)
    known = trial.golden_of(files) or (_RECORDINGS / trial.BUNDLED_GOLDEN.audio, "")
    tokens, posteriors, cpu_s = [], [], 0.0
    for recording in dict.fromkeys([known[0], *sorted(_RECORDINGS.glob("*.flac"))]):
        pcm, times = read_file(recording), []
        for _ in range(ROUNDS):
            began = time.thread_time()
            heard = recognizer.recognize(pcm)
            times.append(time.thread_time() - began)
        assert heard.log_posteriors is not None  # noqa: S101 - onnxruntime's always are
        tokens.append([token.text for token in heard.transcript.tokens])
        posteriors.append(heard.log_posteriors)
        cpu_s += statistics.median(times)
    return Heard("".join(tokens[0]), tokens, posteriors, cpu_s)


def _distance(own: Heard, other: Heard) -> float:
    distances = [
        np.abs(np.exp(a) - np.exp(b)).sum(axis=1) / 2 for a, b in zip(own.posteriors, other.posteriors, strict=True)
    ]
    return float(np.concatenate(distances).mean())


def _agreement(own: Heard, other: Heard) -> float:
    """Share of the own graph's tokens that the other writes, too."""
    wrong = sum(Levenshtein.distance(a, b) for a, b in zip(own.tokens, other.tokens, strict=True))
    return 1 - wrong / max(1, sum(map(len, own.tokens)))


def objection(variant: Variant, own: Heard, heard: Heard) -> str:
    """Why a graph must not take the place of the model's own; empty: it may."""
    if heard.golden != own.golden:
        return f"hears {heard.golden!r} in the golden recording, where its own graph hears {own.golden!r}"
    agreement = _agreement(own, heard)
    if not agreement >= AGREEMENT:
        return f"{agreement:.1%} of the tokens are the same, less than {AGREEMENT:.0%}"
    if variant == "exact" and not all(map(np.array_equal, own.posteriors, heard.posteriors)):
        return "is not the same in every bit"
    distance = _distance(own, heard)
    if not distance <= FARTHEST:
        return f"posteriors differ by {distance:.3f}, more than {FARTHEST:g}"
    if heard.cpu_s > SLOWEST * own.cpu_s:
        return f"needs {heard.cpu_s / own.cpu_s:.2f} of the CPU time"
    return ""


def _child(name_or_path: str, installed: str) -> str:
    with contextlib.suppress(OSError):  # whatever walls it works behind
        os.nice(10)  # beside a daemon that listens
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")  # before it, too
    try:
        return _prepare(model_store.locate(name_or_path, Path(installed)), Path(installed)).model_dump_json()
    except (ModelError, OSError) as error:
        return json.dumps({"error": str(error)})


if __name__ == "__main__":
    print(_child(*sys.argv[1:]))
