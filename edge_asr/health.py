"""Measures how the box does: what its processes use.

Law: a measurement that cannot be had here is None, never zero.
"""

from __future__ import annotations

import ctypes
import time
from typing import Final

from edge_asr.contract import Health, MicrophoneHealth, OutboxHealth, RequestsHealth
from edge_asr.ledger import Statistics
from edge_asr.process_state import cpu_s, resident_bytes


class ProcessMeter:
    """What this process uses, and the recognizer, which is a process of its own."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._last = (self._started, time.process_time())
        self._recognizer = (0, 0.0)
        """Its process id and CPU time at the last look."""

    def read(
        self,
        microphones: dict[str, MicrophoneHealth],
        outbox: Statistics,
        real_time_factor: float | None,
        temperature_c: float | None,
        *,
        muted: bool,
        requests: RequestsHealth,
        recognizer: int,
    ) -> Health:
        """The state of this moment; a CPU load is the mean since the last call. ``recognizer``: its process id."""
        now = (time.monotonic(), time.process_time())
        passed_s = max(now[0] - self._last[0], 1e-9)
        cpu_load = (now[1] - self._last[1]) / passed_s
        self._last = now
        recognizer_load, recognizer_bytes = self._of_recognizer(recognizer, passed_s)
        return Health(
            uptime_s=round(now[0] - self._started, 1),
            muted=muted,
            microphones=microphones,
            outbox=OutboxHealth(
                waiting=sum(outbox.waiting.values()),
                dropped=sum(outbox.dropped.values()),
                outdated=sum(outbox.outdated.values()),
                dead_letters=outbox.dead_letters,
                oldest_age_s=outbox.oldest_age_s,
                refusal=outbox.refusal,
            ),
            receipts=outbox.receipts,
            requests=requests,
            real_time_factor=None if real_time_factor is None else round(real_time_factor, 4),
            cpu_load=round(cpu_load, 4),
            broker=outbox.broker or None,
            memory_bytes=resident_bytes("self"),
            temperature_c=temperature_c,
            recognizer_cpu_load=recognizer_load,
            recognizer_memory_bytes=recognizer_bytes,
        )

    def _of_recognizer(self, pid: int, passed_s: float) -> tuple[float | None, int | None]:
        try:
            spent_s, held_bytes = cpu_s(pid), resident_bytes(pid)
        except OSError:  # it is being replaced
            return None, None
        known, before_s = self._recognizer
        self._recognizer = pid, spent_s
        return round((spent_s - (before_s if pid == known else 0.0)) / passed_s, 4), held_bytes


def give_back() -> None:
    """Return to the kernel what glibc's allocator keeps for later; a few milliseconds, elsewhere nothing."""
    if _TRIM is not None:
        _TRIM(0)


_TRIM: Final = getattr(ctypes.CDLL(None), "malloc_trim", None)
