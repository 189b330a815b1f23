"""Types verb after verb in one process, which somebody else watches.

    python -m tests.every_verb FOLDER BROKER-PORT

Prints a JSON object: verb -> exit code.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from edge_asr import cli
from edge_asr.model_store import EMBEDDED, bundled

RECORDING = bundled("recordings") / "20-emergency-stop.flac"

INTERRUPTED_AFTER_S = {"demo": 3.0, "bench": 2.0, "listen": 1.0, "recordings label": 0.5}
"""Verbs that go on until Ctrl-C, or for long."""


def verbs(folder: Path) -> dict[str, tuple[str, ...]]:
    """Verb -> its arguments, in an order in which each finds what it wants; no native library is there at the first."""
    return {
        "run": (),
        "demo": (),
        "audit verify": (),
        "bench": (),
        "check": (),
        "devices": (),
        "eval": (f"{folder}/site.jsonl",),
        "gateway cert": (),
        "gateway token add": ("tablet",),
        "gateway token list": (),
        "gateway token revoke": ("tablet",),
        "grammar lint": ("coffee.en",),
        "grammar list": (),
        "grammar parse": ("factory.en", "stop line two"),
        "grammar say": ("factory.en",),
        "grammar test": ("factory.en",),
        "listen": (),
        "models import": (f"{folder}/mine",),
        "models list": (),
        "models activate": ("mine", "--set", "model.optimized=false"),
        "models verify": ("mine",),
        "models optimize": ("mine",),
        "models rollback": (),
        "models remove": ("mine",),
        "outbox status": (),
        "outbox dead-letters": (),
        "outbox requeue": ("1",),
        "outbox discard": ("1",),
        "recordings status": (),
        "recordings export": (f"{folder}/labels", "--key", f"{folder}/recorder.pem"),
        "recordings label": (f"{folder}/labels",),
        "recordings clear": (),
        "service status": (),
        "settings example": (),
        "settings schema": (),
        "settings show": (),
        "transcribe": (str(RECORDING),),
    }


WITHOUT_SETTINGS = ("devices", "grammar", "recordings label", "service", "settings example", "settings schema")


def prepare(folder: Path, port: int) -> Path:
    """Settings under which there is something to do for everybody."""
    made = Path(shutil.copytree(bundled("models") / EMBEDDED, folder / "mine"))
    manifest = json.loads((made / "manifest.json").read_bytes())
    (made / "manifest.json").write_text(json.dumps({**manifest, "name": "mine"}), encoding="utf-8")
    (folder / "site.jsonl").write_text(
        json.dumps({"audio": str(RECORDING), "text": "emergency stop"}), encoding="utf-8"
    )
    key = ("genpkey", "-algorithm", "X25519", "-out", folder / "recorder.pem")
    subprocess.run(["openssl", *key], check=True, capture_output=True)
    public = ("pkey", "-in", folder / "recorder.pem", "-pubout", "-out", folder / "recorder.pub")
    subprocess.run(["openssl", *public], check=True, capture_output=True)
    settings = {
        "state_dir": str(folder / "state"),
        "sources": [{"type": "files", "paths": [str(RECORDING)], "realtime": False}],
        "mqtt": {"host": "localhost", "port": port},
        "monitoring": {"port": None},
        "audit": {"enabled": True},
        "recorder": {"public_key": str(folder / "recorder.pub"), "below": 1},
    }
    (folder / "s.yaml").write_text(json.dumps(settings), encoding="utf-8")
    return folder / "s.yaml"


def typed(verb: str, arguments: tuple[str, ...]) -> int:
    """The exit code."""
    signal.setitimer(signal.ITIMER_REAL, INTERRUPTED_AFTER_S.get(verb, 0))
    try:
        cli.main([*verb.split(), *arguments], prog_name="edge-asr")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    raise AssertionError(verb)


def main(folder: Path, port: int) -> None:
    settings = str(prepare(folder, port))
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    codes = {}
    for verb, arguments in verbs(folder).items():
        own = () if verb.startswith(WITHOUT_SETTINGS) else ("--settings", settings)
        with contextlib.redirect_stdout(sys.stderr):
            codes[verb] = typed(verb, (*arguments, *own))
    print(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
