"""Measures whether the board is too warm or short of power, where its kernel tells: any Linux, Raspberry Pi, Jetson.

Law: what cannot be read is left out, never zero; zones may be switched off, virtual machines show none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_asr.alarms import Condition

SYSFS: Final = Path("/sys")

NEAR_CRITICAL_C: Final = 5.0
"""Below the temperature at which the kernel switches the board off."""

_THROTTLING: Final = ("cpufreq", "devfreq", "Processor", "throttle", "intel_powerclamp")
"""In the types of cooling devices that cool by working less; fans are no throttling. Jetson's: `cpu-throttle-alert`."""

_RASPBERRY_PI: Final = "devices/platform/soc/soc:firmware/get_throttled"
_RASPBERRY_PI_BITS: Final = {0: "under-voltage", 1: "frequency-capped", 2: "throttled", 3: "soft-temperature-limit"}
"""Of the firmware's word; the same bits 16 higher say what has been since boot."""


@dataclass(frozen=True, slots=True)
class Thermals:
    """What the board tells of this moment."""

    temperatures_c: dict[str, float]
    """By the zone's type, e.g. ``cpu-thermal``, ``GPU-therm``; the hottest of zones of one type."""
    critical_c: float | None
    """The lowest temperature at which a zone switches the board off."""
    throttled: tuple[str, ...]
    """Why it works slower than it could, now."""

    @property
    def hottest_c(self) -> float | None:
        """Of all zones."""
        return max(self.temperatures_c.values(), default=None)


NOTHING: Final = Thermals({}, None, ())
"""Of a board that does not tell."""


def read(sysfs: Path = SYSFS) -> Thermals:
    """Look at every zone and cooling device there is."""
    temperatures: dict[str, float] = {}
    limits = []
    for zone in sorted(sysfs.glob("class/thermal/thermal_zone*")):
        kind, degrees = _text(zone / "type") or zone.name, _number(zone / "temp")
        if degrees is not None:
            temperatures[kind] = max(degrees / 1000, temperatures.get(kind, -273.0))
        critical = (trip for trip in zone.glob("trip_point_*_type") if _text(trip) == "critical")
        found = (_number(trip.with_name(trip.name.replace("_type", "_temp"))) for trip in critical)
        limits += [degrees / 1000 for degrees in found if degrees]
    return Thermals(temperatures, min(limits, default=None), tuple(_throttled(sysfs)))


def conditions(thermals: Thermals) -> Iterator[Condition]:
    """What is worth an alarm."""
    hottest, critical = thermals.hottest_c, thermals.critical_c
    if hottest is not None and critical is not None and hottest > critical - NEAR_CRITICAL_C:
        detail = f"the board is at {hottest:.0f} °C and switches itself off at {critical:.0f} °C"
        yield Condition("board-hot", None, "critical", detail, "clean its fan and air vents, or cool the cabinet")
    if thermals.throttled:
        detail = f"the board works slower than it could: {', '.join(thermals.throttled)}"
        yield Condition("board-throttled", None, "warning", detail, "check its power supply and cooling")


def _throttled(sysfs: Path) -> Iterator[str]:
    word = _text(sysfs / _RASPBERRY_PI)
    if word is not None:
        with contextlib.suppress(ValueError):
            bits = int(word, 16)
            yield from (cause for bit, cause in _RASPBERRY_PI_BITS.items() if bits >> bit & 1)
    for device in sorted(sysfs.glob("class/thermal/cooling_device*")):
        kind = _text(device / "type") or ""
        if any(word in kind for word in _THROTTLING) and (_number(device / "cur_state") or 0) > 0:
            yield kind


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _number(path: Path) -> int | None:
    try:
        return int(_text(path) or "")
    except ValueError:
        return None
