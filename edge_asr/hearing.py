"""Decides whether a source can be trusted: what its audio measures like, and which trouble that is.

Law: a measurement that cannot be had is None, never zero. Levels are without the constant part of the signal, which is
measured by itself (an offset is a defect of the electronics, not noise).
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

from edge_asr import clock
from edge_asr.alarms import Condition
from edge_asr.audio import SILENCE_DBFS, Levels
from edge_asr.contract import MicrophoneHealth, Severity
from edge_asr.events import FRAME_SAMPLES, SAMPLE_RATE, AudioFrame

_FRAMES_PER_S: Final = SAMPLE_RATE / FRAME_SAMPLES

WINDOW_FRAMES: Final = round(30 * _FRAMES_PER_S)
"""Over which levels are shown."""

JUDGED_FRAMES: Final = round(10 * _FRAMES_PER_S)
"""The newest of them, over which troubles are judged: longer than a sentence, short beside a broken shift."""

ALIVE_LIMIT_S: Final = 2.0
"""A source that delivered nothing for longer is not alive."""

DEAD_BELOW_DBFS: Final = SILENCE_DBFS + 6
"""No microphone is so quiet: a cable is out, or it is muted."""

MAX_CLIPPED: Final = 0.02
"""Share of frames with samples at full scale; a dropped tool makes one or two of 312."""

MAX_OFFSET: Final = 0.05
"""Of full scale; cheap sound cards have up to 0.01, and from here on it eats headroom and hides a defect."""

MAX_RATE_ERROR: Final = 0.04
"""44.1 kHz taken for 48 kHz is 0.08; crystals are exact to 0.0001, the measurement to 0.01."""

MAX_LOST_S: Final = 0.5
"""Audio lost within the last minute while the device was there."""

CALMER_DB: Final = 3.0
"""What was too noisy must become so much quieter before it is trusted again."""

_LOSS_WINDOW_NS: Final = 60 * clock.NS_PER_S


@dataclass(frozen=True, slots=True)
class Capture:
    """What a microphone knows of itself."""

    is_lost: bool
    trouble: str
    """Why the device is away."""
    rate_error: float | None
    """Measured sample rate over the nominal one, less one."""


class SourceMeter:
    """Levels of one source over the last half minute, and what was lost."""

    def __init__(self) -> None:
        self._levels: deque[Levels] = deque(maxlen=WINDOW_FRAMES)
        self._expected: int | None = None
        self._losses: deque[tuple[int, int]] = deque()
        """(CLOCK_BOOTTIME, samples) of every loss of the last minute while the device was there."""
        self._broke_off = False
        self.lost_samples = 0
        """Samples of audio missing between frames since the start."""
        self.last_frame_ns: int | None = None
        """CLOCK_BOOTTIME of the newest frame."""

    def feed(self, frame: AudioFrame, levels: Levels) -> None:
        """Take the next frame and its levels; one without audio says that the device is away."""
        lost = 0 if self._expected is None else frame.position - self._expected
        self.lost_samples += lost
        was_there, self._broke_off = not self._broke_off and bool(frame.pcm), not frame.pcm
        if lost and was_there:
            self._losses.append((frame.captured_ns, lost))
        while self._losses and frame.captured_ns - self._losses[0][0] > _LOSS_WINDOW_NS:
            self._losses.popleft()
        self._expected = frame.end
        self.last_frame_ns = frame.captured_ns
        if frame.pcm:
            self._levels.append(levels)

    def judged(self) -> list[Levels]:
        """The frames over which troubles are judged; empty until there are enough."""
        older = len(self._levels) - JUDGED_FRAMES
        return [] if older < 0 else list(islice(self._levels, older, None))

    @property
    def recently_lost_s(self) -> float:
        """Seconds of audio lost within the last minute."""
        return sum(samples for _, samples in self._losses) / SAMPLE_RATE

    def read(self) -> MicrophoneHealth:
        """The state of this moment."""
        lost_s = round(self.lost_samples / SAMPLE_RATE, 3)
        if not self._levels or self.last_frame_ns is None:
            return MicrophoneHealth(alive=False, level_dbfs=None, noise_dbfs=None, snr_db=None, clipped=0.0, lost_s=0.0)
        age_s = (clock.boottime_ns() - self.last_frame_ns) / clock.NS_PER_S
        ranked = sorted(each.level_dbfs for each in self._levels)
        noise, level = _percentile(ranked, 10), _percentile(ranked, 95)
        return MicrophoneHealth(
            alive=age_s < ALIVE_LIMIT_S and level > DEAD_BELOW_DBFS,
            level_dbfs=round(level, 1),
            noise_dbfs=round(noise, 1),
            snr_db=round(level - noise, 1),
            clipped=round(_clipped(self._levels), 4),
            lost_s=lost_s,
            offset=round(_offset(self._levels), 4),
        )


@dataclass(frozen=True, slots=True)
class _Trouble:
    """A kind of alarm."""

    kind: str
    severity: Severity
    remedy: str


TOO_NOISY: Final = "too-noisy"

_GONE: Final = _Trouble("microphone-gone", "critical", "plug it in; `edge-asr devices` lists what is there")
_SILENT: Final = _Trouble(
    "microphone-silent", "critical", "unmute it (`alsamixer`), check its cable and sources.channel"
)
_CLIPPING: Final = _Trouble("microphone-clipping", "warning", "lower its gain (`alsamixer`) or move it away")
_OFFSET: Final = _Trouble(
    "microphone-offset", "warning", "the sound card is defective or its input is wired wrongly; try another"
)
_RATE: Final = _Trouble(
    "microphone-rate", "critical", "set sources.rate to what the device really does, or use another device"
)
_OVERRUN: Final = _Trouble(
    "microphone-overrun", "warning", "the box is overloaded: fewer sources, partials off, a smaller model"
)
_TOO_NOISY: Final = _Trouble(
    TOO_NOISY, "critical", "use a close-talking microphone or lower its gain; see commands.max_noise_dbfs"
)

_NOT_OF_GUESTS: Final = {_SILENT.kind, _OVERRUN.kind}


class HearingJudge:
    """One source's troubles, look by look."""

    def __init__(self, source: str, *, guest: bool = False) -> None:
        """A ``guest`` comes over the network: its silence is a muted browser, its gaps are the network's."""
        self._source = source
        self._guest = guest
        self._too_noisy = False

    def look(self, meter: SourceMeter, capture: Capture | None, max_noise_dbfs: float) -> list[Condition]:
        """Everything that is wrong now; without ``capture`` (recordings, a pipe) only what the audio itself shows."""
        if capture is not None and capture.is_lost:
            self._too_noisy = False
            return [self._condition(_GONE, capture.trouble or "no audio arrives")]
        found = [*self._of_capture(meter, capture), *self._of_audio(meter.judged(), max_noise_dbfs)]
        return [each for each in found if not self._guest or each.kind not in _NOT_OF_GUESTS]

    def _of_capture(self, meter: SourceMeter, capture: Capture | None) -> Iterator[Condition]:
        error = None if capture is None else capture.rate_error
        if error is not None and abs(error) > MAX_RATE_ERROR:
            found = (
                f"the device delivers {100 * abs(error):.0f} % {'more' if error > 0 else 'fewer'} samples than it says"
            )
            yield self._condition(_RATE, found)
        if meter.recently_lost_s > MAX_LOST_S:
            yield self._condition(_OVERRUN, f"{meter.recently_lost_s:.1f} s of audio were lost within a minute")

    def _of_audio(self, frames: list[Levels], max_noise_dbfs: float) -> Iterator[Condition]:
        if not frames:
            return
        ranked = sorted([frame.level_dbfs for frame in frames])
        if ranked[-1] <= DEAD_BELOW_DBFS:
            self._too_noisy = False
            yield self._condition(_SILENT, "only digital silence arrives")
            return
        if _clipped(frames) > MAX_CLIPPED:
            yield self._condition(_CLIPPING, f"{100 * _clipped(frames):.0f} % of the audio is at full scale")
        if abs(_offset(frames)) > MAX_OFFSET:
            yield self._condition(
                _OFFSET, f"the signal is off its middle by {100 * _offset(frames):.0f} % of full scale"
            )
        noise_dbfs = _percentile(ranked, 10)
        self._too_noisy = noise_dbfs > max_noise_dbfs - (CALMER_DB if self._too_noisy else 0.0)
        if self._too_noisy:
            found = f"the noise is at {noise_dbfs:.0f} dBFS, as loud as speech: commands are blocked"
            yield self._condition(_TOO_NOISY, found)

    def _condition(self, trouble: _Trouble, detail: str) -> Condition:
        return Condition(trouble.kind, self._source, trouble.severity, f"{self._source}: {detail}", trouble.remedy)


def _percentile(ranked: list[float], percent: int) -> float:
    """Between the two neighbours, as numpy has it, which takes four times as long for so few."""
    place, rest = divmod((len(ranked) - 1) * percent, 100)
    low, high = ranked[place], ranked[min(place + 1, len(ranked) - 1)]
    return low + (high - low) * rest / 100


def _clipped(frames: deque[Levels] | list[Levels]) -> float:
    return sum([frame.clipped > 0 for frame in frames]) / len(frames)


def _offset(frames: deque[Levels] | list[Levels]) -> float:
    return statistics.median([frame.offset for frame in frames])
