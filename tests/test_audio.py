"""Audio: the oracles are libsoxr's one-shot conversion, libsndfile's own encoders and sines of known frequency."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_asr.audio import (
    NS_PER_SAMPLE,
    SILENCE_DBFS,
    AudioFileError,
    FrameCutter,
    Resampler,
    from_float,
    level_dbfs,
    peak_dbfs,
    quiet,
    read_file,
    to_float,
)
from edge_asr.events import FRAME_SAMPLES, SAMPLE_RATE

RATES = (8_000, 11_025, 22_050, 32_000, 44_100, 48_000, 96_000, 192_000)


def sine(hz: float, rate: int, seconds: float = 1.0, amplitude: float = 0.5) -> NDArray[np.float32]:
    return (amplitude * np.sin(2 * np.pi * hz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def blocks(samples: NDArray[Any], sizes: list[int]) -> Iterator[NDArray[Any]]:
    """The samples in pieces of the given sizes, over and over."""
    start = 0
    while start < len(samples):
        for size in sizes:
            yield samples[start : start + size]
            start += size


def resampled(samples: NDArray[Any], rate: int, sizes: list[int], channel: int | None = None) -> bytes:
    resampler = Resampler(rate, 1 if samples.ndim == 1 else samples.shape[1], channel)
    return b"".join([*(resampler.feed(block) for block in blocks(samples, sizes)), resampler.flush()])


def loudest_hz(pcm: bytes) -> float:
    samples = to_float(pcm)
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(spectrum.argmax() * SAMPLE_RATE / len(samples))


def write(path: Path, samples: NDArray[Any], rate: int, subtype: str) -> Path:
    soundfile.write(path, samples, rate, subtype=subtype)
    return path


# int16 and float


def test_every_int16_value_survives_the_round_trip_through_float() -> None:
    every = np.arange(-32_768, 32_768).astype("<i2").tobytes()
    assert from_float(to_float(every)) == every
    assert to_float(every).min() == -1.0
    assert to_float(every).max() < 1.0


def test_from_float_rounds_to_nearest_and_clips_at_full_scale() -> None:
    pcm = from_float(np.array([0.6 / 32_768, -0.6 / 32_768, 1.0, 7.5, -1.0, -7.5]))
    assert np.frombuffer(pcm, "<i2").tolist() == [1, -1, 32_767, 32_767, -32_768, -32_768]


# Levels


def test_a_full_scale_sine_is_3_db_below_a_full_scale_square_wave() -> None:
    assert level_dbfs(from_float(sine(1_000, SAMPLE_RATE, amplitude=1.0))) == pytest.approx(-3.01, abs=0.01)
    assert level_dbfs(from_float(np.full(512, -1.0))) == 0.0


def test_halving_the_amplitude_lowers_both_levels_by_6_db() -> None:
    loud, soft = (from_float(sine(440, SAMPLE_RATE, amplitude=amplitude)) for amplitude in (0.5, 0.25))
    assert level_dbfs(loud) - level_dbfs(soft) == pytest.approx(6.02, abs=0.01)
    assert peak_dbfs(loud) == pytest.approx(-6.02, abs=0.01)
    assert peak_dbfs(soft) == pytest.approx(-12.04, abs=0.01)


def test_zeros_and_no_samples_at_all_are_silence_and_one_bit_is_not() -> None:
    assert level_dbfs(b"") == level_dbfs(bytes(1024)) == peak_dbfs(b"") == peak_dbfs(bytes(1024)) == SILENCE_DBFS
    assert level_dbfs(b"\1" + bytes(1023)) > SILENCE_DBFS


def test_quiet_is_below_any_energy_gate_and_yet_not_zeros() -> None:
    pcm = quiet(SAMPLE_RATE)
    assert len(pcm) == 2 * SAMPLE_RATE
    assert -101 < level_dbfs(pcm) < -90
    assert np.abs(np.frombuffer(pcm, "<i2")).max() == 1
    assert quiet(SAMPLE_RATE) == pcm


# Resampling


@pytest.mark.parametrize("rate", RATES)
def test_streaming_equals_soxr_in_one_piece(rate: int) -> None:
    noise = (np.random.default_rng(rate).standard_normal(rate) * 0.2).astype(np.float32)
    assert resampled(noise, rate, [rate // 50]) == from_float(soxr.resample(noise, rate, SAMPLE_RATE, "HQ"))


@given(
    rate=st.sampled_from(RATES),
    sizes=st.lists(st.integers(1, 3_000), min_size=1, max_size=6),
    seconds=st.floats(0.01, 0.2),
)
def test_the_size_of_the_blocks_does_not_change_the_result(rate: int, sizes: list[int], seconds: float) -> None:
    noise = np.random.default_rng(1).integers(-20_000, 20_000, round(rate * seconds)).astype(np.int16)
    assert resampled(noise, rate, sizes) == resampled(noise, rate, [len(noise)])


@pytest.mark.parametrize("rate", RATES)
def test_a_tone_keeps_its_frequency_its_level_and_its_place_in_time(rate: int) -> None:
    pcm = resampled(sine(1_000, rate), rate, [rate // 50])
    assert loudest_hz(pcm) == pytest.approx(1_000, abs=1)
    middle = to_float(pcm)[2_000:14_000]
    assert np.abs(middle - sine(1_000, SAMPLE_RATE)[2_000:14_000]).max() < 2e-3


@pytest.mark.parametrize("rate", [44_100, 48_000, 96_000])
def test_a_tone_above_8_khz_does_not_fold_back(rate: int) -> None:
    for hz in (9_000, 12_000, 15_500, 20_000):
        middle = resampled(sine(hz, rate), rate, [rate // 50])[4_000:-4_000]
        assert level_dbfs(middle) < -90, f"{hz} Hz came through"


def test_16_khz_mono_int16_passes_unchanged_and_at_once() -> None:
    samples = np.random.default_rng(2).integers(-32_768, 32_768, 5_000).astype(np.int16)
    resampler = Resampler(SAMPLE_RATE)
    assert resampler.feed(samples) == samples.astype("<i2").tobytes()
    assert resampler.held_samples == 0
    assert resampler.flush() == b""


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64])
def test_the_sample_type_does_not_matter(dtype: type) -> None:
    tone = sine(500, 48_000)
    scale = 1 if np.issubdtype(dtype, np.floating) else -float(np.iinfo(dtype).min)
    difference = to_float(resampled((tone * scale).astype(dtype), 48_000, [960])) - to_float(
        resampled(tone, 48_000, [960])
    )
    assert np.abs(difference).max() <= 2 / 32_768


def test_unsigned_8_bit_has_its_middle_at_128() -> None:
    pcm = Resampler(SAMPLE_RATE).feed(np.array([0, 128, 255], np.uint8))
    assert np.frombuffer(pcm, "<i2").tolist() == [-32_768, 0, 32_512]


def test_a_channel_can_be_chosen_and_otherwise_all_are_averaged() -> None:
    left, right = sine(400, 48_000), sine(1_500, 48_000, amplitude=0.25)
    both = np.column_stack([left, right])
    assert resampled(both, 48_000, [960], channel=1) == resampled(left, 48_000, [960])
    assert resampled(both, 48_000, [960], channel=2) == resampled(right, 48_000, [960])
    assert resampled(both, 48_000, [960]) == resampled((left + right) / 2, 48_000, [960])


def test_what_the_resampler_holds_is_what_is_still_missing_at_its_output() -> None:
    resampler = Resampler(48_000)
    out = sum(len(resampler.feed(block)) // 2 for block in blocks(sine(300, 48_000), [960]))
    assert resampler.held_samples == pytest.approx(SAMPLE_RATE - out, abs=1)
    assert 0 < resampler.held_samples < 0.025 * SAMPLE_RATE


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [((0,), "rate 0"), ((16_000, 0), "0 channels"), ((16_000, 2, 3), "channel 3"), ((16_000, 2, 0), "channel 0")],
)
def test_a_resampler_that_cannot_be_is_refused(arguments: tuple[int, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Resampler(*arguments)


@pytest.mark.parametrize("block", [np.zeros((4, 3), np.float32), np.zeros(4, np.complex64)])
def test_a_block_of_the_wrong_shape_or_type_is_refused(block: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match=r"is not|are not"):
        Resampler(48_000).feed(block)


# Frames


@given(sizes=st.lists(st.integers(0, 2_000), max_size=20))
def test_frames_are_the_stream_again_whatever_the_block_sizes(sizes: list[int]) -> None:
    pcm = np.random.default_rng(3).integers(-32_768, 32_768, sum(sizes)).astype("<i2").tobytes()
    cutter, frames, start = FrameCutter("s"), [], 0
    for size in sizes:
        frames += cutter.feed(pcm[start : start + 2 * size], 0)
        start += 2 * size
    frames += cutter.flush(0)
    assert b"".join(frame.pcm for frame in frames)[: len(pcm)] == pcm
    assert not any(b"".join(frame.pcm for frame in frames)[len(pcm) :])
    assert [frame.position for frame in frames] == [i * FRAME_SAMPLES for i in range(-(-sum(sizes) // FRAME_SAMPLES))]
    assert all(len(frame.pcm) == 2 * FRAME_SAMPLES for frame in frames)


@given(sizes=st.lists(st.integers(1, 4_000), min_size=1, max_size=10))
def test_a_frames_time_is_its_last_samples_time_whatever_the_block_sizes(sizes: list[int]) -> None:
    opened_ns = 1_000_000_000_000
    cutter, frames = FrameCutter("s"), []
    for size in sizes:
        frames += cutter.feed(bytes(2 * size), opened_ns + (cutter.end + size) * NS_PER_SAMPLE)
    assert [frame.captured_ns for frame in frames] == [opened_ns + frame.end * NS_PER_SAMPLE for frame in frames]


@given(before=st.integers(0, 2_000), lost=st.integers(1, 10**9), after=st.integers(FRAME_SAMPLES, 2_000))
def test_lost_samples_are_a_jump_of_the_position_by_the_number_reported(before: int, lost: int, after: int) -> None:
    cutter = FrameCutter("s")
    frames = cutter.feed(bytes(2 * before), 0)
    end = frames[-1].end if frames else 0
    reported = cutter.skip(lost)
    assert reported == lost + before % FRAME_SAMPLES
    following = cutter.feed(bytes(2 * after), 0)
    assert following[0].position == end + reported == before + lost


def test_no_frame_joins_audio_from_both_sides_of_a_gap() -> None:
    cutter = FrameCutter("s")
    cutter.feed(b"\1\0" * 100, 0)
    cutter.skip(5)
    (frame,) = cutter.feed(b"\2\0" * FRAME_SAMPLES, 0)
    assert frame.pcm == b"\2\0" * FRAME_SAMPLES


def test_half_a_sample_and_a_skip_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="half a sample"):
        FrameCutter("s").feed(b"123", 0)
    with pytest.raises(ValueError, match="cannot skip 0"):
        FrameCutter("s").skip(0)


# Files


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 96_000])
@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize(
    ("name", "subtype"),
    [
        ("a.wav", "PCM_U8"),
        ("a.wav", "PCM_16"),
        ("a.wav", "PCM_24"),
        ("a.wav", "PCM_32"),
        ("a.wav", "FLOAT"),
        ("a.wav", "DOUBLE"),
        ("a.flac", "PCM_16"),
        ("a.flac", "PCM_24"),
    ],
)
def test_lossless_files_of_any_rate_width_and_channel_count_come_out_alike(
    tmp_path: Path, name: str, subtype: str, channels: int, rate: int
) -> None:
    tone = sine(700, rate, seconds=0.5)
    path = write(tmp_path / name, np.repeat(tone[:, np.newaxis], channels, axis=1), rate, subtype)
    got, expected = to_float(read_file(path)), soxr.resample(tone, rate, SAMPLE_RATE, "HQ")
    assert len(got) == SAMPLE_RATE // 2
    assert np.abs(got - expected).max() <= (1.5 / 128 if subtype == "PCM_U8" else 2 / 32_768)


@pytest.mark.parametrize(("name", "subtype"), [("a.ogg", "VORBIS"), ("a.opus", "OPUS"), ("a.mp3", "MPEG_LAYER_III")])
def test_lossy_files_come_out_as_the_same_tone(tmp_path: Path, name: str, subtype: str) -> None:
    path = tmp_path / name
    soundfile.write(path, sine(700, 48_000), 48_000, subtype=subtype, format="MP3" if name == "a.mp3" else "OGG")
    pcm = read_file(path)
    assert len(pcm) // 2 == pytest.approx(SAMPLE_RATE, rel=0.1)
    assert loudest_hz(pcm) == pytest.approx(700, abs=2)
    assert level_dbfs(pcm) == pytest.approx(-9, abs=1)


def test_16_khz_mono_16_bit_is_read_bit_for_bit(tmp_path: Path) -> None:
    samples = np.random.default_rng(4).integers(-32_768, 32_768, 200_000).astype(np.int16)
    assert read_file(write(tmp_path / "a.wav", samples, SAMPLE_RATE, "PCM_16")) == samples.astype("<i2").tobytes()


def test_one_channel_of_a_file_can_be_chosen(tmp_path: Path) -> None:
    both = np.column_stack([sine(400, SAMPLE_RATE), sine(1_500, SAMPLE_RATE)])
    path = write(tmp_path / "a.flac", both, SAMPLE_RATE, "PCM_16")
    assert loudest_hz(read_file(path, channel=2)) == pytest.approx(1_500, abs=1)
    with pytest.raises(AudioFileError, match=r"a\.flac: has 2 channels, there is no channel 3"):
        read_file(path, channel=3)


def test_float_samples_beyond_full_scale_are_clipped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", np.full(100, 1.5, np.float32), SAMPLE_RATE, "FLOAT")
    assert set(np.frombuffer(read_file(path), "<i2")) == {32_767}


@pytest.mark.parametrize("length", [0xFFFF_FFFF, 0x7FFF_F000])
def test_a_wav_that_was_written_to_a_pipe_is_read_to_its_end(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "a.wav", sine(700, SAMPLE_RATE), SAMPLE_RATE, "PCM_16")
    whole, patched = read_file(path), bytearray(path.read_bytes())
    patched[4:8] = patched[40:44] = struct.pack("<I", length)
    path.write_bytes(patched)
    assert read_file(path) == whole


def test_a_wav_with_a_chunk_before_the_audio_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", sine(700, SAMPLE_RATE), SAMPLE_RATE, "PCM_16")
    whole, data = read_file(path), path.read_bytes()
    odd = b"LIST" + struct.pack("<I", 5) + b"INFO!" + b"\0"
    path.write_bytes(data[:4] + struct.pack("<I", len(data) + len(odd) - 8) + data[8:36] + odd + data[36:])
    assert read_file(path) == whole


def refusal(path: Path) -> str:
    with pytest.raises(AudioFileError) as caught:
        read_file(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: "), "the line names the file"
    assert "\n" not in line
    assert "; " in line, "the line names a remedy"
    return line


@pytest.mark.parametrize("fraction", [0.2, 0.6, 0.99])
@pytest.mark.parametrize(("name", "subtype"), [("a.wav", "PCM_16"), ("a.wav", "PCM_24"), ("a.flac", "PCM_16")])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str, subtype: str, fraction: float) -> None:
    noise = np.random.default_rng(5).uniform(-0.5, 0.5, 3 * 48_000)
    path = write(tmp_path / name, noise, 48_000, subtype)
    data = path.read_bytes()
    path.write_bytes(data[: round(len(data) * fraction)])
    assert "cut off" in refusal(path) or "copy it again" in refusal(path)


def test_missing_empty_and_sampleless_files_and_folders_are_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.wav")
    (tmp_path / "empty.wav").touch()
    assert "is empty" in refusal(tmp_path / "empty.wav")
    assert "no samples" in refusal(write(tmp_path / "zero.wav", np.zeros(0), 44_100, "PCM_16"))
    assert "directory" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"this is no audio at all\n" * 400,
        np.random.default_rng(6).bytes(9_000),
        b"RIFF\x24\0\0\0WAVE",
        b"RIFF",
        b"fLaC" + bytes(100),
        b"OggS" + bytes(100),
    ],
)
def test_what_is_not_audio_is_refused_whatever_it_is_called(tmp_path: Path, content: bytes) -> None:
    for name in ("a.wav", "a.flac", "a.mp3", "a.ogg"):
        path = tmp_path / name
        path.write_bytes(content)
        assert "is not readable audio" in refusal(path)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_nan_and_infinity_are_refused(tmp_path: Path, poison: float) -> None:
    samples = sine(300, SAMPLE_RATE)
    samples[12_345] = poison
    assert "NaN" in refusal(write(tmp_path / "a.wav", samples, SAMPLE_RATE, "FLOAT"))


@given(garbage=st.binary(max_size=300), kind=st.sampled_from([b"", b"RIFF....WAVEfmt ", b"fLaC", b"OggS\0", b"ID3"]))
def test_no_content_whatever_ends_in_another_exception(
    tmp_path_factory: pytest.TempPathFactory, garbage: bytes, kind: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage.wav"
    path.write_bytes(kind + garbage)
    refusal(path)
