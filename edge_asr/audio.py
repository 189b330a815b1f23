"""PCM arithmetic: audio of any rate, channel count and sample type becomes 16 kHz mono int16, cut into frames.

Law: inside, PCM is ``bytes`` (mono, signed 16 bit, little-endian, 16 kHz). :func:`to_float` and :func:`from_float` are
the product's only conversion between int16 and float; full scale is 32768, so int16 survives the round trip unchanged.
Nothing here knows a clock or a device: capture times come in with the samples.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from edge_asr.clock import NS_PER_S
from edge_asr.events import BYTES_PER_SAMPLE, FRAME_SAMPLES, SAMPLE_RATE, AudioFrame

NS_PER_SAMPLE: Final = NS_PER_S // SAMPLE_RATE
"""62,500 exactly: sample counts turn into nanoseconds without rounding."""

SILENCE_DBFS: Final = -120.0
"""The level of all-zero PCM; a single least significant bit in a frame is -117 dBFS."""

FULL_SCALE: Final = 32_768.0

_FILE_BLOCK_FRAMES: Final = 65_536
_PCM16: Final = np.dtype("<i2")
_ONES: Final = np.ones(FRAME_SAMPLES)
_UNKNOWN_WAV_LENGTH: Final = 0x7FFF_0000
"""Recorders that write to a pipe cannot know the length and put a value near 2 or 4 GiB into the header."""


class AudioFileError(Exception):
    """A file cannot be used as audio; the message names it and the remedy."""


def to_float(pcm: bytes) -> NDArray[np.float32]:
    """Samples in [-1, 1)."""
    samples: NDArray[np.float32] = np.frombuffer(pcm, dtype="<i2").astype(np.float32)
    samples *= np.float32(1 / FULL_SCALE)
    return samples


def from_float(samples: NDArray[np.floating[Any]]) -> bytes:
    """PCM, rounded to nearest and clipped at full scale; the samples must be finite."""
    scaled: NDArray[np.floating[Any]] = np.rint(samples * FULL_SCALE)
    return scaled.clip(-FULL_SCALE, FULL_SCALE - 1).astype("<i2").tobytes()


def at_speed(samples: NDArray[np.float32], speed: float) -> NDArray[np.float32]:
    """The same sound played at another speed (0.9: a tenth slower, and so much deeper)."""
    played: NDArray[np.float32] = soxr.resample(samples, SAMPLE_RATE * speed, SAMPLE_RATE)
    return played


def signal_to_noise_db(samples: NDArray[np.float32]) -> float:
    """How far the loudest frames stand above the quietest, which are the pauses around and between words."""
    frames = samples[: samples.size // FRAME_SAMPLES * FRAME_SAMPLES].reshape(-1, FRAME_SAMPLES)
    if not frames.size:
        return 0.0
    levels_db = 10 * np.log10(np.square(frames).mean(axis=1) + 1e-10)
    loud_db, quiet_db = np.percentile(levels_db, [95, 10])
    return float(loud_db - quiet_db)


def level_dbfs(pcm: bytes) -> float:
    """RMS level; 0 dBFS is a full-scale square wave, so a full-scale sine reads -3.01."""
    if not pcm:
        return SILENCE_DBFS
    samples = to_float(pcm)
    return _decibels(math.sqrt(float(samples @ samples) / len(samples)))


def peak_dbfs(pcm: bytes) -> float:
    """Level of the largest sample."""
    return _decibels(float(np.abs(to_float(pcm)).max(initial=0.0)))


@dataclass(frozen=True, slots=True)
class Levels:
    """What one piece of PCM measures like."""

    level_dbfs: float
    """RMS without the offset."""
    offset: float
    """The constant part, -1..1."""
    clipped: int
    """Samples at full scale."""


def measure(pcm: bytes) -> Levels:
    """Level, offset and clipping in one pass.

    Called for every frame, silent ones too, so with as few calls of numpy as it takes: most of a quiet day's work.
    """
    samples = np.frombuffer(pcm, _PCM16).astype(np.float64)  # exact: sums of squares stay below 2**53
    if not samples.size:
        return Levels(SILENCE_DBFS, 0.0, 0)
    ones = _ONES if samples.size == FRAME_SAMPLES else np.ones(samples.size)  # two thirds of a sum's time
    mean = float(samples.dot(ones)) / samples.size
    energy = float(samples.dot(samples))
    loudest = FULL_SCALE - 1
    clipped = int(np.count_nonzero(np.abs(samples) >= loudest)) if energy >= loudest**2 else 0
    rms = math.sqrt(max(0.0, energy / samples.size - mean * mean))
    return Levels(_decibels(rms / FULL_SCALE), mean / FULL_SCALE, clipped)


def _decibels(amplitude: float) -> float:
    return max(SILENCE_DBFS, 20 * math.log10(amplitude)) if amplitude > 0 else SILENCE_DBFS


def quiet(samples: int) -> bytes:
    """Near-silence at -98 dBFS, the same on every call: one bit of triangular dither.

    Not zeros: no microphone delivers them, and their log-mel features lie far outside of what a model has seen.
    """
    uniform = np.random.default_rng(0).random((2, samples))
    return from_float((uniform[0] - uniform[1]) / FULL_SCALE)


def _as_float32(block: NDArray[Any]) -> NDArray[np.float32]:
    if block.dtype.kind == "f":
        return block.astype(np.float32, copy=False)
    if block.dtype.kind == "i":
        scaled: NDArray[np.float32] = block.astype(np.float32)
        scaled *= np.float32(-1 / np.iinfo(block.dtype).min)  # a power of two: exact
        return scaled
    if block.dtype == np.uint8:
        return ((block.astype(np.float32) - 128) / 128).astype(np.float32)
    raise ValueError(f"samples of type {block.dtype} are not audio")


class Resampler:
    """Turns blocks of one stream into 16 kHz mono PCM; the size of the blocks does not change the result.

    ``channel`` counts from 1; None takes the mean of all channels.
    """

    def __init__(self, rate: int, channels: int = 1, channel: int | None = None) -> None:
        if rate < 1:
            raise ValueError(f"rate {rate} Hz is not positive")
        if channels < 1:
            raise ValueError(f"{channels} channels: at least one is needed")
        if channel is not None and not 1 <= channel <= channels:
            raise ValueError(f"channel {channel} is not 1..{channels}")
        self._channels = channels
        self._channel = channel
        self._stream = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, "float32", "HQ")

    @property
    def held_samples(self) -> float:
        """Output samples that went in and have not come out yet: the filter needs to see a little of the future."""
        return 0.0 if self._stream is None else float(self._stream.delay())

    def feed(self, block: NDArray[Any]) -> bytes:
        """Take the next samples, ``(n,)`` or ``(n, channels)``; integers are scaled by their type's full scale."""
        return self._resample(self._mono(block), last=False)

    def flush(self) -> bytes:
        """What the filter still holds; nothing may be fed afterwards."""
        return self._resample(np.zeros(0, np.float32), last=True)

    def _mono(self, block: NDArray[Any]) -> NDArray[np.float32]:
        if block.ndim == 1:
            block = block[:, np.newaxis]
        if block.ndim != 2 or block.shape[1] != self._channels:
            raise ValueError(f"a block of shape {block.shape} is not (n, {self._channels})")
        if self._channel is not None:
            return _as_float32(block[:, self._channel - 1])
        samples = _as_float32(block)
        return samples[:, 0] if self._channels == 1 else samples.mean(axis=1, dtype=np.float32)

    def _resample(self, mono: NDArray[np.float32], *, last: bool) -> bytes:
        if self._stream is None:
            return from_float(mono)
        return from_float(self._stream.resample_chunk(np.ascontiguousarray(mono), last=last))


class FrameCutter:
    """Cuts one source's PCM into frames of :data:`FRAME_SAMPLES` and counts their positions.

    Every ``captured_ns`` handed in is the CLOCK_BOOTTIME of the last sample; a frame's own is counted back from it.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._position = 0
        self._pending = bytearray()

    @property
    def end(self) -> int:
        """Index of the sample after the last one handed in."""
        return self._position + len(self._pending) // BYTES_PER_SAMPLE

    def feed(self, pcm: bytes, captured_ns: int) -> list[AudioFrame]:
        """Take the next samples; return the frames that became whole."""
        if len(pcm) % BYTES_PER_SAMPLE:
            raise ValueError(f"{len(pcm)} bytes of PCM end in half a sample")
        self._pending += pcm
        frame_bytes = FRAME_SAMPLES * BYTES_PER_SAMPLE
        whole = len(self._pending) // frame_bytes * frame_bytes
        end = self.end
        frames = []
        for offset in range(0, whole, frame_bytes):
            position = self._position + offset // BYTES_PER_SAMPLE
            newer = end - position - FRAME_SAMPLES
            piece = bytes(self._pending[offset : offset + frame_bytes])
            frames.append(AudioFrame(self._source, position, piece, captured_ns - newer * NS_PER_SAMPLE))
        del self._pending[:whole]
        self._position += whole // BYTES_PER_SAMPLE
        return frames

    def skip(self, samples: int) -> int:
        """Leave out lost samples: the next frame's position jumps.

        A begun frame is given up as well, since no frame may join audio from both sides of a gap. Returns how many
        samples are lost by this altogether.
        """
        if samples < 1:
            raise ValueError(f"cannot skip {samples} samples")
        lost = samples + len(self._pending) // BYTES_PER_SAMPLE
        self._pending.clear()
        self._position += lost
        return lost

    def cut_off(self, captured_ns: int) -> AudioFrame:
        """A frame without audio, beside which the positions jump: what is said across it is cut off."""
        return AudioFrame(self._source, self.end, b"", captured_ns)

    def flush(self, captured_ns: int) -> list[AudioFrame]:
        """The begun frame, filled up with zeros; empty if there is none."""
        if not self._pending:
            return []
        padded = bytes(self._pending.ljust(FRAME_SAMPLES * BYTES_PER_SAMPLE, b"\0"))
        frame = AudioFrame(self._source, self._position, padded, captured_ns)
        self._position += FRAME_SAMPLES
        self._pending.clear()
        return [frame]


def read_file(path: Path, channel: int | None = None) -> bytes:
    """PCM of a WAV, FLAC, Ogg or MP3 file of any rate and sample type.

    ``channel`` counts from 1; None takes the mean of all channels. Raises AudioFileError.
    """
    try:
        with path.open("rb") as stream:
            return read_stream(path, stream, channel)
    except OSError as error:
        raise AudioFileError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None


def read_stream(name: object, stream: BinaryIO, channel: int | None = None, *, max_s: float = math.inf) -> bytes:
    """The same of an open file with a descriptor, called ``name`` in errors, that may not be longer than ``max_s``."""
    _refuse_cut_wav(name, stream)
    pcm = bytearray()
    for piece in _decode(name, stream, channel):
        pcm += piece
        if len(pcm) > max_s * SAMPLE_RATE * BYTES_PER_SAMPLE:
            raise AudioFileError(f"{name}: is longer than {max_s:g} s; cut it into pieces")
    if not pcm:
        raise AudioFileError(f"{name}: holds no samples; record or copy it again")
    return bytes(pcm)


def _decode(path: object, stream: BinaryIO, channel: int | None) -> Iterator[bytes]:
    seconds = 0.0
    try:
        # By its descriptor: reading through a Python object takes callbacks, so memory that is writable and executable.
        os.lseek(stream.fileno(), 0, os.SEEK_SET)
        with soundfile.SoundFile(stream.fileno(), closefd=False) as file:
            if channel is not None and not 1 <= channel <= file.channels:
                raise AudioFileError(f"{path}: has {file.channels} channels, there is no channel {channel}")
            resampler = Resampler(file.samplerate, file.channels, channel)
            for block in file.blocks(_FILE_BLOCK_FRAMES, dtype="float32", always_2d=True):
                if not np.isfinite(block).all():
                    raise AudioFileError(f"{path}: holds NaN or infinite samples; export it again as 16-bit PCM")
                seconds += len(block) / file.samplerate
                yield resampler.feed(block)
            yield resampler.flush()
    except soundfile.SoundFileError as error:
        if seconds:
            raise AudioFileError(f"{path}: is damaged or cut off after {seconds:.2f} s; copy it again") from None
        reason = str(getattr(error, "error_string", error)).rstrip(".")
        raise AudioFileError(f"{path}: is not readable audio ({reason}); copy it again or convert it to WAV") from None


def _refuse_cut_wav(path: object, stream: BinaryIO) -> None:
    """Compare the length in a WAV header with the file: libsndfile plays what is there and says nothing."""
    size = stream.seek(0, 2)
    if size == 0:
        raise AudioFileError(f"{path}: is empty (0 bytes); record or copy it again")
    stream.seek(0)
    if stream.read(4) != b"RIFF":
        return
    stream.seek(12)
    while len(header := stream.read(8)) == 8:
        name, length = struct.unpack("<4sI", header)
        start = stream.tell()
        if name == b"data":
            if size - start < length < _UNKNOWN_WAV_LENGTH:
                raise AudioFileError(
                    f"{path}: is cut off, {size - start} of {length} bytes of audio are there; copy it again"
                )
            return
        stream.seek(start + length + length % 2)
