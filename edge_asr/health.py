"""Measures how the box does: what each source hears, what the process uses, how warm it is, and whether it still works.

Law: a measurement that cannot be had here is None, never zero.
"""

from __future__ import annotations

import resource
import time
from collections import deque
from pathlib import Path

import numpy as np

from edge_asr import clock
from edge_asr.audio import SILENCE_DBFS
from edge_asr.contract import Health, MicrophoneHealth, OutboxHealth
from edge_asr.events import FRAME_SAMPLES, SAMPLE_RATE, AudioFrame
from edge_asr.outbox import Statistics

WINDOW_FRAMES = 30 * SAMPLE_RATE // FRAME_SAMPLES
"""Frames (30 s) over which level and noise are taken."""

ALIVE_LIMIT_S = 2.0
"""A source that delivered nothing for longer is not alive."""

DEAD_BELOW_DBFS = SILENCE_DBFS + 6
"""No microphone is so quiet: a cable is out, or it is muted."""

BUSY_LIMIT_S = 8.0
"""A decode or commit that takes longer hangs; the longest utterance needs 2 s on the slowest supported board."""

_FULL_SCALE_DBFS = -0.01


class SourceMeter:
    """Levels of one source over the last half minute, and what was lost."""

    def __init__(self) -> None:
        self._levels: deque[float] = deque(maxlen=WINDOW_FRAMES)
        self._clipped: deque[bool] = deque(maxlen=WINDOW_FRAMES)
        self._expected: int | None = None
        self.lost_samples = 0
        """Samples of audio missing between frames since the start."""
        self.last_frame_ns: int | None = None
        """CLOCK_BOOTTIME of the newest frame."""

    def feed(self, frame: AudioFrame, level_dbfs: float, peak_dbfs: float) -> None:
        """Take the next frame and its levels."""
        if self._expected is not None:
            self.lost_samples += frame.position - self._expected
        self._expected = frame.end
        self.last_frame_ns = frame.captured_ns
        self._levels.append(level_dbfs)
        self._clipped.append(peak_dbfs >= _FULL_SCALE_DBFS)

    def read(self) -> MicrophoneHealth:
        """The state of this moment."""
        age_s = (clock.boottime_ns() - self.last_frame_ns) / clock.NS_PER_S if self.last_frame_ns is not None else None
        if not self._levels or age_s is None:
            return MicrophoneHealth(alive=False, level_dbfs=None, noise_dbfs=None, snr_db=None, clipped=0.0, lost_s=0.0)
        noise, level = (float(x) for x in np.percentile(self._levels, [10, 95]))
        return MicrophoneHealth(
            alive=age_s < ALIVE_LIMIT_S and level > DEAD_BELOW_DBFS,
            level_dbfs=round(level, 1),
            noise_dbfs=round(noise, 1),
            snr_db=round(level - noise, 1),
            clipped=round(sum(self._clipped) / len(self._clipped), 4),
            lost_s=round(self.lost_samples / SAMPLE_RATE, 3),
        )


class ProcessMeter:
    """What this process uses."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._last = (self._started, time.process_time())

    def read(
        self, microphones: dict[str, MicrophoneHealth], outbox: Statistics, real_time_factor: float | None
    ) -> Health:
        """The state of this moment; the CPU load is the mean since the last call."""
        now = (time.monotonic(), time.process_time())
        cpu_load = (now[1] - self._last[1]) / max(now[0] - self._last[0], 1e-9)
        self._last = now
        return Health(
            uptime_s=round(now[0] - self._started, 1),
            microphones=microphones,
            outbox=OutboxHealth(
                waiting=sum(outbox.waiting.values()),
                dropped=sum(outbox.dropped.values()),
                dead_letters=outbox.dead_letters,
                oldest_age_s=outbox.oldest_age_s,
            ),
            real_time_factor=None if real_time_factor is None else round(real_time_factor, 4),
            cpu_load=round(cpu_load, 4),
            memory_bytes=_resident_bytes(),
            temperature_c=_temperature_c(),
        )


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def _temperature_c() -> float | None:
    """The hottest thermal zone; None on machines that show none (virtual ones)."""
    found = []
    for zone in Path("/sys/class/thermal").glob("thermal_zone*/temp"):
        try:
            found.append(int(zone.read_text(encoding="ascii")) / 1000)
        except (OSError, ValueError):  # a zone may be switched off
            continue
    return max(found, default=None)
