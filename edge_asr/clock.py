"""The clocks: time since boot for ages, wall time for people, and how far the wall clock can be trusted.

Law: an age or a deadline is a difference of two :func:`boottime_ns` readings of the same :func:`boot_id`. The wall
clock is read once per message, for display, and never compared: gateways without a battery start in 1970.
"""

from __future__ import annotations

import ctypes
import datetime as dt
import functools
import time
from pathlib import Path
from typing import Literal

TimeQuality = Literal["synchronized", "unsynchronized"]

NS_PER_S = 1_000_000_000

SET_BY_TIMESYNCD = Path("/run/systemd/timesync/synchronized")
"""Made by systemd-timesyncd at its first success since boot. It is all that the service's sandbox lets us see."""

STA_UNSYNC = 0x40
"""In the kernel's ``timex.status``: no time service has set the clock, or none for hours."""


def boottime_ns() -> int:
    """Nanoseconds since boot, suspend included (CLOCK_BOOTTIME): never stepped, never shared between boots."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def until_next(period_s: float) -> float:
    """Seconds until the next multiple of a period on the monotonic clock.

    Who sleeps so wakes together with all others: on a quiet box waking is most of what anything costs.
    """
    return period_s - time.monotonic() % period_s


def wall_ns() -> int:
    """Nanoseconds since 1970 as the wall clock shows them now; may be wrong by years."""
    return time.time_ns()


def iso(wall_time_ns: int) -> str:
    """ISO 8601 with the local offset and milliseconds, e.g. ``2026-11-22T07:02:26.123+01:00``."""
    moment = dt.datetime.fromtimestamp(wall_time_ns / NS_PER_S, tz=dt.timezone.utc)
    return moment.astimezone().isoformat(timespec="milliseconds")


@functools.lru_cache(maxsize=1)
def boot_id() -> str:
    """The kernel's random id of this boot; readings of :func:`boottime_ns` compare only under the same id."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def time_quality() -> TimeQuality:
    """Whether a time service has set the wall clock since boot.

    Every time service (chrony, ntpd, timesyncd, PTP) tells the kernel, which tells us unless the sandbox forbids the
    question: systemd's ProtectClock= does, see systemd/edge-asr.service.d/chrony.conf.example.
    """
    return "synchronized" if _kernel_trusts_it() or SET_BY_TIMESYNCD.exists() else "unsynchronized"


class Timex(ctypes.Structure):
    """``struct timex`` up to what is read here; the rest is room for the kernel to write into."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_long * 40),
    )


def _kernel_trusts_it() -> bool:
    state = Timex(modes=0)  # changes nothing
    return _libc().adjtimex(ctypes.byref(state)) != -1 and not state.status & STA_UNSYNC


@functools.lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
