"""Runs one of our modules as a process of its own, which a native library may end, and carries its answer back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE
from typing import Any


class ChildError(Exception):
    """The process ended without an answer; the message is how: a signal's name or an exit code."""


def ask(module: str, *arguments: str, limit_s: float) -> dict[str, Any]:
    """As :func:`ask_beside`, where no event loop runs."""
    return asyncio.run(ask_beside(module, *arguments, limit_s=limit_s))


async def ask_beside(module: str, *arguments: str, limit_s: float) -> dict[str, Any]:
    """Run a module; its answer is the JSON object in its last line. Cancelled, the process is killed.

    Raises ChildError, TimeoutError.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *arguments, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL
    )
    try:
        said, _ = await asyncio.wait_for(process.communicate(), limit_s)
    except asyncio.TimeoutError:  # before Python 3.11 not the same as TimeoutError
        raise TimeoutError from None
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            process.kill()
        code = await process.wait()
    try:
        answer: dict[str, Any] = json.loads(said.splitlines()[-1])
    except (ValueError, IndexError):
        raise ChildError(signal.Signals(-code).name if code < 0 else f"exit code {code}") from None
    return answer
