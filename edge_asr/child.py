"""Runs one of our modules as a process of its own, which a native library may end, and carries its answer back."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any


class ChildError(Exception):
    """The process ended without an answer; the message is how: a signal's name or an exit code."""


def ask(module: str, *arguments: str, limit_s: float) -> dict[str, Any]:
    """Run a module; its answer is the JSON object in its last line. Raises ChildError, TimeoutError."""
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError from None
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        code = done.returncode
        raise ChildError(signal.Signals(-code).name if code < 0 else f"exit code {code}") from None
    return answer
