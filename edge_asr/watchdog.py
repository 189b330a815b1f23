"""Decides whether the daemon really works; where it does not, the journal gets the cause and systemd a reason to act.

Law: WATCHDOG=1 is sent only while

- the event loop turns (it is the loop that sends it),
- the zygote answers whoever wants a process or the end of one. What hangs is replaced by ``sources`` and ``worker``; a
  process that hangs in the kernel is outlived, for a restart would not end it either,
- the outbox answers. One whose disk is slow is told at once and waited for: a restart mends no disk, and ends no thread
  that waits in the kernel. One that sleeps over a lock of ours is deadlocked. A commit that is refused, on a full disk,
  is no hang,
- the recognizer hears the golden recording as it did at first. ``worker`` replaces one that hangs or dies when it is
  asked; one that is stopped or dead while nobody speaks is noticed here, so that the next one who speaks finds another.

A hang ends the process at once instead of waiting for systemd to notice: SIGABRT through WATCHDOG=trigger, or exit 70
where no watchdog is set; both leave every thread's stack in the journal. What was being recognized is in the ``spool``.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
from typing import Final

from edge_asr import clock, systemd
from edge_asr.outbox import Outbox, OutboxError
from edge_asr.worker import Worker
from edge_asr.zygote import Zygote

log = logging.getLogger(__name__)

LOOK_S: Final = 1.0
"""Between two looks, or half of WatchdogSec= where that is less."""

COMMIT_LIMIT_S: Final = 4.5
"""An outbox that answers nobody for longer is told; a tired SD card may need 2 s."""

DISK_LIMIT_S: Final = 30.0
"""How long its disk is waited for: fsync waits for what others write, an upgrade of the system or a model's import."""

MEND_LIMIT_S: Final = 90.0
"""How long carrying a damaged file over may take; as TimeoutStartSec=, where that would be done again."""

LOCKED_LOOKS: Final = 2
"""So often in a row the outbox's thread is seen at a lock before it is deadlocked: once it may be about to answer."""

COMMIT_INTERVAL_S: Final = 4.0
"""Between two probes of a disk that nobody writes to. With the limit and the time between two looks a blocked disk
shows within WatchdogSec= at any moment; what it costs in flash and CPU time: docs/decisions.md."""

STILL_LOOKS: Final = 4
"""So often in a row a process is seen stopped before it is replaced: a debugger holds it for a moment only."""

GOLDEN_INTERVAL_S: Final = 300.0
"""Listening to two seconds of audio so often is less than 0.1 % of a core with the embedded model."""

EXIT_HUNG: Final = 70


class Watchdog:
    """Looks at the parts of a running daemon."""

    def __init__(self, zygote: Zygote, outbox: Outbox, worker: Worker) -> None:
        self._zygote = zygote
        self._outbox = outbox
        self._worker = worker
        self._locked = 0
        """Looks in a row that saw the outbox's thread at a lock over what it owes."""
        self.trouble = ""
        """What is waited for; empty: nothing."""

    async def run(self) -> None:
        """Look for ever. Raises WorkerError when no recognizer hears rightly any more."""
        await asyncio.gather(self._look(), self._probe_outbox(), self._look_at_recognizer(), self._probe_recognizer())

    def hang(self) -> str:
        """What hangs, as the beginning of a sentence; empty: nothing."""
        if self._zygote.fault:
            return f"no process can be had or ended: {self._zygote.fault}"
        stuck_s = self._outbox.unanswered_s
        if self._locked >= LOCKED_LOOKS:
            return f"the outbox has not answered for {stuck_s:.0f} s, and not because of its disk"
        if stuck_s > (MEND_LIMIT_S if self._outbox.mending else DISK_LIMIT_S):
            return f"the disk of the outbox has not answered for {stuck_s:.0f} s"
        return ""

    def look_at_outbox(self) -> None:
        """Tell when it begins to be late, and when it answers again."""
        if self._outbox.unanswered_s <= COMMIT_LIMIT_S:
            if self.trouble:
                log.info("the disk of the outbox answers again")
            self.trouble, self._locked = "", 0
            return
        if not self.trouble:
            self.trouble = f"the disk of the outbox has not answered for {COMMIT_LIMIT_S:g} s; waiting for it"
            log.warning(self.trouble)
            systemd.status(self.trouble)
        self._locked = self._locked + 1 if self._outbox.is_stuck else 0

    async def _look(self) -> None:
        pause_s = min(systemd.watchdog_interval_s() or LOOK_S, LOOK_S)
        while True:
            self.look_at_outbox()
            cause = self.hang()
            if cause:
                _give_up(cause)
            systemd.alive()
            await asyncio.sleep(clock.until_next(pause_s))

    async def _probe_outbox(self) -> None:
        while True:
            with contextlib.suppress(OutboxError):  # refused is no hang, and told by the pipeline
                await self._outbox.prove()
            await asyncio.sleep(clock.until_next(COMMIT_INTERVAL_S))

    async def _look_at_recognizer(self) -> None:
        looks = 0
        while True:
            looks = looks + 1 if self._worker.stands_still else 0
            if looks >= STILL_LOOKS:
                await asyncio.to_thread(self._worker.revive)
            await asyncio.sleep(clock.until_next(LOOK_S))

    async def _probe_recognizer(self) -> None:
        while True:
            await asyncio.sleep(GOLDEN_INTERVAL_S)
            await asyncio.to_thread(self._worker.prove)


def _give_up(cause: str) -> None:
    """End the process in a way that starts it again; does not return unless systemd is about to end it."""
    log.critical("%s; starting again", cause)
    systemd.status(f"Starting again: {cause}")
    if not systemd.trigger():
        faulthandler.dump_traceback()
        os._exit(EXIT_HUNG)  # an orderly exit would wait for the thread that hangs
