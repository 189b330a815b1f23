"""Decides whether the daemon really works; where it does not, the journal gets the cause and systemd a reason to act.

Law: WATCHDOG=1 is sent only while

- the event loop turns (it is the loop that sends it),
- the zygote takes orders: it is asked every few seconds. What hangs is replaced by ``sources`` and ``worker``; a
  process that hangs in the kernel is outlived, for a restart would not end it either. Nor would one plug a microphone
  in: audio is not asked for, its absence is an alarm and `degraded`,
- the outbox answers. One whose disk is slow is told at once and waited for: a restart mends no disk, and ends no thread
  that waits in the kernel. One that sleeps over a lock of ours is deadlocked. A commit that is refused, on a full disk,
  is no hang,
- the recognizer answers: it is asked as often while nobody speaks, so that the next one who does finds one that hears;
  and whichever of our threads waits for its answer looks at it all the time, else it is deadlocked itself,
- the recognizer hears the golden recording as it did at first.

A hang ends the process at once instead of waiting for systemd to notice: SIGABRT through WATCHDOG=trigger, or exit 70
where no watchdog is set; both leave every thread's stack in the journal. What was being recognized is in the ``spool``.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
import time
from typing import Final

from edge_asr import clock, systemd
from edge_asr.outbox import Outbox, OutboxError
from edge_asr.worker import Worker
from edge_asr.zygote import Zygote, ZygoteError

log = logging.getLogger(__name__)

LOOK_S: Final = 1.0
"""Between two looks, or half of WatchdogSec= where that is less."""

COMMIT_LIMIT_S: Final = 4.5
"""An outbox that answers nobody for longer is told; a tired SD card may need 2 s."""

DISK_LIMIT_S: Final = 30.0
"""How long its disk is waited for: fsync waits for what others write, an upgrade of the system or a model's import."""

MEND_LIMIT_S: Final = 90.0
"""How long carrying a damaged file over may take; as TimeoutStartSec=, where that would be done again."""

STILL_LIMIT_S: Final = 8.0
"""A thread that waits for the recognizer and does not look at it for so long looks no more: within WatchdogSec=."""

LOCKED_LOOKS: Final = 2
"""So often in a row the outbox's thread is seen at a lock before it is deadlocked: once it may be about to answer."""

COMMIT_INTERVAL_S: Final = 4.0
"""Between two probes of a disk that nobody writes to. With the limit and the time between two looks a blocked disk
shows within WatchdogSec= at any moment; what it costs in flash and CPU time: docs/decisions.md."""

PING_INTERVAL_S: Final = 4.0
"""Between two questions to a zygote and a recognizer of whom nobody wants anything."""

GOLDEN_INTERVAL_S: Final = 300.0
"""Listening to two seconds of audio so often is less than 0.1 % of a core with the embedded model."""

EXIT_HUNG: Final = 70


class _Standstill:
    """For how long something has not moved while somebody looked: a box that is frozen hangs nowhere."""

    def __init__(self) -> None:
        self.lasts_s = 0.0
        self._looked_s = time.monotonic()

    def look(self, unmoved_s: float) -> None:
        """``unmoved_s``: for how long it has not, by the clock."""
        now_s = time.monotonic()
        passed_s, self._looked_s = min(now_s - self._looked_s, 2 * LOOK_S), now_s
        self.lasts_s = min(unmoved_s, self.lasts_s + passed_s)


class Watchdog:
    """Looks at the parts of a running daemon."""

    def __init__(self, zygote: Zygote, outbox: Outbox, worker: Worker) -> None:
        self._zygote = zygote
        self._outbox = outbox
        self._worker = worker
        self._waiting = _Standstill()
        """Of a thread that waits for the recognizer."""
        self._stuck = _Standstill()
        """Of an outbox that owes answers."""
        self._locked = 0
        """Looks in a row that saw the outbox's thread at a lock over what it owes."""
        self._late = ""
        """That the outbox has not answered for a while; empty: it does."""
        self._refused = ""
        """Why it could not commit when it was last asked; empty: it could."""

    @property
    def trouble(self) -> str:
        """What is waited for; empty: nothing."""
        return self._late or self._refused

    async def run(self) -> None:
        """Look for ever. Raises WorkerError when no recognizer hears rightly any more."""
        await asyncio.gather(self._look(), self._probe_outbox(), self._probe_processes(), self._probe_hearing())

    def hang(self) -> str:
        """What hangs, as the beginning of a sentence; empty: nothing."""
        if self._zygote.fault:
            return f"no process can be had or ended: {self._zygote.fault}"
        if self._waiting.lasts_s > STILL_LIMIT_S:
            return f"the thread that waits for the recognizer has stood still for {self._waiting.lasts_s:.0f} s"
        if self._locked >= LOCKED_LOOKS:
            return f"the outbox has not answered for {self._stuck.lasts_s:.0f} s, and not because of its disk"
        if self._stuck.lasts_s > (MEND_LIMIT_S if self._outbox.mending else DISK_LIMIT_S):
            return f"the disk of the outbox has not answered for {self._stuck.lasts_s:.0f} s"
        return ""

    def look_at_worker(self) -> None:
        """See whether whoever waits for it still looks at it."""
        self._waiting.look(self._worker.unlooked_s)

    def look_at_outbox(self) -> None:
        """Tell when it begins to be late, and when it answers again."""
        self._stuck.look(self._outbox.unanswered_s)
        if self._stuck.lasts_s <= COMMIT_LIMIT_S:
            if self._late:
                log.info("the disk of the outbox answers again")
            self._late, self._locked = "", 0
            return
        if not self._late:
            self._late = f"the disk of the outbox has not answered for {COMMIT_LIMIT_S:g} s; waiting for it"
            log.warning(self._late)
            systemd.status(self._late)
        self._locked = self._locked + 1 if self._outbox.is_stuck else 0

    async def _look(self) -> None:
        pause_s = min(systemd.watchdog_interval_s() or LOOK_S, LOOK_S)
        while True:
            self.look_at_outbox()
            self.look_at_worker()
            cause = self.hang()
            if cause:
                _give_up(cause)
            systemd.alive()
            await asyncio.sleep(clock.until_next(pause_s))

    async def _probe_outbox(self) -> None:
        while True:
            try:
                await self._outbox.prove()
            except OutboxError as error:  # no hang
                self._note_refusal(str(error))
            else:
                self._note_refusal("")
            await asyncio.sleep(clock.until_next(COMMIT_INTERVAL_S))

    def _note_refusal(self, reason: str) -> None:
        """Tell when it begins, though nobody speaks, and when it is over."""
        if reason and reason != self._refused:
            log.warning("nothing could be committed: %s", reason)
        if self._refused and not reason:
            log.info("the outbox commits again")
        self._refused = reason

    async def _probe_processes(self) -> None:
        while True:
            await asyncio.to_thread(self._ping)
            await asyncio.sleep(clock.until_next(PING_INTERVAL_S))

    def _ping(self) -> None:
        with contextlib.suppress(ZygoteError):  # hang tells why
            self._zygote.prove()
            self._worker.ping()

    async def _probe_hearing(self) -> None:
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
