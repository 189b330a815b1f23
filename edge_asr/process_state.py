"""What another process does, as the kernel tells it, and whether it hangs.

Law: a hang is told by time that was the process's own, never by the clock alone. What could run and gets no time is
starved, what reads or waits for a disk has a slow card, and time in which whoever waits was frozen too counts for
nothing. So the limits hold on any box, however busy, and end no honest work.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

LOOK_S: Final = 0.5
"""Between two looks of whoever waits."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a process may leave whoever waits for its next word without one."""

    sleep_s: float
    """Asleep without reading anything."""
    wait_s: float
    """Asleep in all."""
    work_s: float
    """CPU time."""


class Wait:
    """How a process spends the time in which somebody waits for its next word.

    What cannot be seen, for want of memory or a descriptor or because it has ended, is held against nobody.
    """

    def __init__(self, process: int) -> None:
        self._process = process
        self._looked_s = time.monotonic()
        self._before_s: float | None = None
        """CPU time when the wait began; None: not known yet."""
        self._read = bytes_read(process)
        with contextlib.suppress(OSError):
            self._before_s = cpu_s(process)
        self.asleep_s = 0.0
        """Of the clock, all naps together, since it last read anything: no thread could run, or waited for a disk."""
        self.waited_s = 0.0
        """The same in all."""
        self.worked_s = 0.0
        """CPU time."""
        self._is_stopped = False

    def look(self) -> None:
        """To be called at least every second."""
        now_s, read, states = time.monotonic(), bytes_read(self._process), thread_states(self._process)
        passed_s = 0.0 if "R" in states else min(now_s - self._looked_s, 2 * LOOK_S)
        self.waited_s += passed_s
        if read != self._read:
            self.asleep_s = 0.0
        elif "D" not in states:
            self.asleep_s += passed_s
        self._looked_s, self._read, self._is_stopped = now_s, read, bool(states) and states <= {"T", "t"}
        with contextlib.suppress(OSError):
            spent_s = cpu_s(self._process)
            self._before_s = spent_s if self._before_s is None else self._before_s
            self.worked_s = spent_s - self._before_s

    def fault(self, limits: Limits) -> str:
        """What is wrong, as the end of a sentence, where it took more than it may; empty: nothing.

        Of what computes and sleeps by turns both together take no longer than the larger limit.
        """
        stood = "was stopped" if self._is_stopped else "hung"
        for taken_s, allowed_s, what in (
            (self.asleep_s, limits.sleep_s, stood),
            (self.waited_s, limits.wait_s, stood),
            (self.worked_s, limits.work_s, "computed without an end"),
            (self.asleep_s + self.worked_s, max(limits.sleep_s, limits.work_s), stood),
        ):
            if taken_s > allowed_s:
                return f"{what} for more than {allowed_s:.2g} s"
        return ""


def resident_bytes(process: int | Literal["self"]) -> int:
    """Memory of a process that is in RAM. Raises OSError where there is none."""
    pages = int(_text(f"/proc/{process}/statm").split()[1])
    return pages * resource.getpagesize()


def cpu_s(process: int) -> float:
    """CPU time of a process so far. Raises OSError where there is none."""
    fields = _stat(process)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def thread_states(process: int) -> set[str]:
    """The letters of proc(5) of its threads: R computes or waits for its turn to, D waits for a disk, as a rule.

    A process that cannot be looked at now is held to compute.
    """
    try:
        return {_stat(process, thread.name)[0] for thread in Path(f"/proc/{process}/task").iterdir()}
    except OSError:  # a thread that has just ended, no memory, no descriptor
        return {"R"}


def _stat(process: int, thread: str = "") -> list[str]:
    """What is behind its name, which may hold anything, in /proc/PID/stat. Raises OSError where there is none."""
    place = f"task/{thread}/stat" if thread else "stat"
    return _text(f"/proc/{process}/{place}").rpartition(")")[2].split()


def _text(path: str) -> str:
    """Of a small file of proc(5), which comes in one piece; four are read for every utterance. Raises OSError."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(file, 4096).decode("ascii", errors="replace")
    finally:
        os.close(file)


def bytes_read(process: int) -> int | None:
    """What a process has read so far, from files, pipes and by faults of mapped pages; None: nobody may know."""
    try:
        lines = _text(f"/proc/{process}/io").splitlines()
    except OSError:
        return None
    counts = dict(line.split(": ") for line in lines)
    return int(counts["rchar"]) + int(counts["read_bytes"])
