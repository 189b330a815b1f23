"""Every part of tools/bench with its defaults, and two more, in one JSON object; half an hour.

``hearing``: what each stage costs with the model in use, hotwords and grammar included (`edge-asr bench`). ``service``:
start, memory and idle cost (`tools/soak`, short). The full-size model is written once for all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench_engine import machine, machine_table

FULL_SIZE = ("engine", "session", "streams", "pipeline")
"""Parts that measure SenseVoiceSmall's full graph."""

PARTS = (*FULL_SIZE, "gateway", "peers")
EDGE_ASR = Path(sys.executable).with_name("edge-asr")
BESIDE: Mapping[str, Sequence[str]] = {
    "hearing": (
        str(EDGE_ASR),
        "bench",
        "--json",
        "--set",
        "hotwords.phrases=[RCCB, spindle]",
    ),
    "service": (sys.executable, "-m", "tests.soak", "--utterances", "200", "--speech-s", "60", "--idle-s", "45"),
}
"""What prints its figures."""


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="tools/bench all", description=__doc__)
    found.add_argument("--json", type=Path, required=True, help="write the figures there")
    found.add_argument("--funasr", nargs=2, metavar=("PYTHON", "BPE_MODEL"), help="as of tools/bench engine")
    found.add_argument("--whisper", metavar="PYTHON", help="as of tools/bench peers")
    found.add_argument("--chart", type=Path, help="as of tools/bench engine")
    found.add_argument("--model", type=Path, help="keep the full-size model here, or use the one that is here")
    names = (*BESIDE, *PARTS)
    found.add_argument("--only", nargs="+", default=names, choices=names, metavar="PART", help="do not run the others")
    return found


def commands(arguments: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """What to run for each part; each gets the options that it knows."""
    more: dict[str, list[str]] = {part: [] for part in PARTS}
    if arguments.funasr:
        more["engine"] += ["--funasr", *arguments.funasr]
    if arguments.chart:
        more["engine"] += ["--chart", str(arguments.chart)]
    if arguments.whisper:
        more["peers"] += ["--whisper", arguments.whisper]
    for part in FULL_SIZE:
        more[part] += ["--model", str(arguments.model or folder / "model")]
    found = {name: list(command) for name, command in BESIDE.items()}
    for part in PARTS:
        found[part] = [sys.executable, "-m", f"tests.bench_{part}", "--json", str(folder / f"{part}.json"), *more[part]]
    return {name: command for name, command in found.items() if name in arguments.only}


def figures(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run them one after the other."""
    found: dict[str, Any] = {}
    for name, command in commands(arguments, folder).items():
        prints = subprocess.PIPE if name in BESIDE else None
        done = subprocess.run(command, check=True, stdout=prints, text=True)
        text = done.stdout if name in BESIDE else (folder / f"{name}.json").read_text(encoding="utf-8")
        found |= flattened(name, json.loads(text))
    return found


def flattened(name: str, part: dict[str, Any]) -> dict[str, Any]:
    """The rows of a part under its name, where it has rows of that name, and what is known of them beside."""
    rows = part.pop(name, None)
    return {name: part} if rows is None else {name: rows, f"{name}_run": part}


def main() -> None:
    arguments = parser().parse_args()
    known = machine()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        found = figures(arguments, Path(name))
    known["load_after"] = round(os.getloadavg()[0], 1)
    arguments.json.write_text(json.dumps({"machine": known, **found}, indent=1) + "\n", encoding="utf-8")
    print(machine_table(known))


if __name__ == "__main__":
    main()
