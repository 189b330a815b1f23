"""The clocks: time since boot for ages, wall time for people, and how far the wall clock can be trusted.

Law: an age or a deadline is a difference of two :func:`boottime_ns` readings of the same :func:`boot_id`. The wall
clock is read once per message, for display, and never compared: gateways without a battery start in 1970.
"""

from __future__ import annotations

import datetime as dt
import functools
import time
from pathlib import Path
from typing import Literal

TimeQuality = Literal["synchronized", "unsynchronized"]

NS_PER_S = 1_000_000_000

# systemd-timesyncd and chrony's systemd unit both create a flag once the clock has been set from a server.
_SYNCHRONIZED_FLAGS = (Path("/run/systemd/timesync/synchronized"), Path("/run/chrony/synchronized"))


def boottime_ns() -> int:
    """Nanoseconds since boot, suspend included (CLOCK_BOOTTIME): never stepped, never shared between boots."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


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
    """Whether a time service has set the wall clock since boot."""
    return "synchronized" if any(flag.exists() for flag in _SYNCHRONIZED_FLAGS) else "unsynchronized"
