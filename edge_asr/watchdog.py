"""Decides whether the daemon really works; where it does not, the journal gets the cause and systemd a reason to act.

Law: WATCHDOG=1 is sent only while

- the event loop turns (it is the loop that sends it),
- no microphone is stuck in a driver out of which the kernel cannot end its process (``sources`` replaces all others),
- no commit to the outbox hangs: one that is refused, on a full disk, is known trouble and no hang,
- the recognizer hears the golden recording as it did at first (``worker`` replaces one that hangs or dies by itself).

A hang ends the process at once instead of waiting for systemd to notice: SIGABRT through WATCHDOG=trigger, or exit 70
where no watchdog is set; both leave every thread's stack in the journal. What was being recognized is in the ``spool``.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Final

from edge_asr import clock, systemd
from edge_asr.outbox import Outbox, OutboxError
from edge_asr.pipeline import Pipeline
from edge_asr.sources import Microphone
from edge_asr.worker import Worker

log = logging.getLogger(__name__)

LOOK_S: Final = 1.0
"""Between two looks, or half of WatchdogSec= where that is less."""

COMMIT_LIMIT_S: Final = 4.5
"""A commit that takes longer hangs; a tired SD card may need 2 s."""

COMMIT_INTERVAL_S: Final = 4.0
"""Between two probes of a disk that nobody writes to. With the limit and the time between two looks a blocked disk
shows within WatchdogSec= at any moment; what it costs in flash and CPU time: docs/decisions.md."""

GOLDEN_INTERVAL_S: Final = 300.0
"""Listening to two seconds of audio so often is less than 0.1 % of a core with the embedded model."""

EXIT_HUNG: Final = 70


class Watchdog:
    """Looks at the parts of a running daemon."""

    def __init__(self, microphones: Sequence[Microphone], pipeline: Pipeline, outbox: Outbox, worker: Worker) -> None:
        self._microphones = microphones
        self._pipeline = pipeline
        self._outbox = outbox
        self._worker = worker
        self._probing_since_ns: int | None = None

    async def run(self) -> None:
        """Look for ever. Raises WorkerError when no recognizer hears rightly any more."""
        await asyncio.gather(self._look(), self._probe_outbox(), self._probe_recognizer())

    def hang(self) -> str:
        """What hangs, as the beginning of a sentence; empty: nothing."""
        for microphone in self._microphones:
            if microphone.hang:
                return f"{microphone.name}: {microphone.hang}"
        stuck_s = max(_seconds_since(self._pipeline.busy_since_ns), _seconds_since(self._probing_since_ns))
        if stuck_s > COMMIT_LIMIT_S:
            return f"the disk of the outbox has not answered for {stuck_s:.0f} s"
        return ""

    async def _look(self) -> None:
        pause_s = min(systemd.watchdog_interval_s() or LOOK_S, LOOK_S)
        while True:
            cause = self.hang()
            if cause:
                _give_up(cause)
            systemd.alive()
            await asyncio.sleep(clock.until_next(pause_s))

    async def _probe_outbox(self) -> None:
        while True:
            with self._probing(), contextlib.suppress(OutboxError):  # refused is no hang, and told by the pipeline
                await self._outbox.prove()
            await asyncio.sleep(clock.until_next(COMMIT_INTERVAL_S))

    async def _probe_recognizer(self) -> None:
        while True:
            await asyncio.sleep(GOLDEN_INTERVAL_S)
            await asyncio.to_thread(self._worker.prove)

    @contextlib.contextmanager
    def _probing(self) -> Iterator[None]:
        self._probing_since_ns = clock.boottime_ns()
        try:
            yield
        finally:
            self._probing_since_ns = None


def _seconds_since(moment_ns: int | None) -> float:
    return 0.0 if moment_ns is None else (clock.boottime_ns() - moment_ns) / clock.NS_PER_S


def _give_up(cause: str) -> None:
    """End the process in a way that starts it again; does not return unless systemd is about to end it."""
    log.critical("%s; starting again", cause)
    systemd.status(f"Starting again: {cause}")
    if not systemd.trigger():
        faulthandler.dump_traceback()
        os._exit(EXIT_HUNG)  # an orderly exit would wait for the thread that hangs
