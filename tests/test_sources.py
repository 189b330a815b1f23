"""Sources: a real sound server whose card is pulled out, frozen and killed; real files; real pipes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import itertools
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_asr import capture, devices, doctor, service, sources
from edge_asr.audio import (
    NS_PER_SAMPLE,
    SILENCE_DBFS,
    AudioFileError,
    Levels,
    Resampler,
    measure,
    quiet,
    read_file,
    to_float,
)
from edge_asr.capture import Report
from edge_asr.clock import NS_PER_S, boottime_ns
from edge_asr.devices import (
    Device,
    DeviceError,
    alsa_cards,
    choose_device,
    is_out_of_sight,
    levels,
    list_devices,
    record,
    signs,
)
from edge_asr.events import FRAME_SAMPLES, SAMPLE_RATE, AudioFrame
from edge_asr.process_state import resident_bytes
from edge_asr.settings import FilesSource, MicrophoneSource, StdinSource
from edge_asr.sources import Files, Microphone, SourceError, Stdin, Timeline, audio_files
from edge_asr.zygote import Zygote
from tests.broker import free_port
from tests.soundcard import SoundCard, sound_card, until

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T], deadline_s: float = 40) -> T:
    return asyncio.run(asyncio.wait_for(main, deadline_s))


async def eventually(condition: Callable[[], bool], failure: str, deadline_s: float = 10) -> float:
    """Seconds until the condition held."""
    return await asyncio.to_thread(until, condition, failure, deadline_s)


def pcm_of(frames: list[AudioFrame]) -> bytes:
    return b"".join(frame.pcm for frame in frames)


def jumps(frames: list[AudioFrame]) -> list[int]:
    """Lost samples before each frame; what only says that the audio broke off is none."""
    frames = [frame for frame in frames if frame.pcm]
    ends = [0, *(frame.end for frame in frames)]
    return [frame.position - end for frame, end in zip(frames, ends, strict=False)]


def babble(rate: int, seconds: float = 2.0) -> NDArray[np.float32]:
    """Noise in the band of speech, 300-3400 Hz, always the same."""
    spectrum = np.fft.rfft(np.random.default_rng(7).standard_normal(round(rate * seconds)))
    hz = np.fft.rfftfreq(round(rate * seconds), 1 / rate)
    spectrum[(hz < 300) | (hz > 3_400)] = 0
    samples = np.fft.irfft(spectrum).astype(np.float32)
    samples *= 0.5 / np.abs(samples).max()
    return samples


def recording(path: Path, samples: NDArray[Any], rate: int = SAMPLE_RATE) -> Path:
    soundfile.write(path, samples, rate, subtype="PCM_16")
    return path


def likeness(heard: bytes, played: NDArray[np.float32]) -> float:
    """Correlation of what was heard with what was played at 48 kHz, at the best alignment."""
    long = soxr.resample(to_float(heard), SAMPLE_RATE, 48_000)
    size = 1 << (len(long) + len(played)).bit_length()
    product = np.fft.irfft(np.fft.rfft(long, size) * np.fft.rfft(played, size).conj(), size)
    start = int(product[: max(1, len(long) - len(played))].argmax())
    return float(np.corrcoef(long[start : start + len(played)], played)[0, 1])


# A microphone that is there


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[SoundCard]:
    with sound_card() as card:
        for name, value in card.environment.items():
            monkeypatch.setenv(name, value)
        yield card


def apart(work: Callable[..., T], *arguments: Any) -> T:
    """The result of a fresh process: libpulse works in no process forked from one that has used it."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


@contextlib.contextmanager
def microphone(**settings: Any) -> Iterator[Microphone]:
    """One whose processes know the variables and limits of this moment."""
    with contextlib.closing(Zygote()) as zygote:
        yield Microphone(MicrophoneSource(type="microphone", **settings), zygote)


@contextlib.asynccontextmanager
async def listening(**settings: Any) -> AsyncIterator[tuple[Microphone, list[AudioFrame]]]:
    """Collects the frames; the device is closed and all have arrived when the block is left."""
    frames: list[AudioFrame] = []
    take = frames.append

    async def consume() -> None:
        async for frame in source.frames():
            take(frame)

    with microphone(**settings) as source:
        consumer = asyncio.create_task(consume())
        try:
            yield source, frames
        finally:
            await source.close()
            await consumer


def heard_while_playing(card: SoundCard, wav: Path, **settings: Any) -> list[AudioFrame]:
    async def main() -> list[AudioFrame]:
        async with listening(**settings) as (source, frames):
            await eventually(lambda: source.state == "capturing", "no capture")
            await asyncio.to_thread(card.play, wav)
            end = boottime_ns() + NS_PER_S // 2
            await eventually(lambda: frames[-1].captured_ns > end, "no tail")
        assert source.lost_samples == 0
        return frames

    return run(main())


@pytest.mark.parametrize(("rate", "played_rate"), [(None, 48_000), (16_000, 16_000), (44_100, 22_050)])
def test_what_is_played_is_what_is_heard(card: SoundCard, tmp_path: Path, rate: int | None, played_rate: int) -> None:
    wav = recording(tmp_path / "played.wav", babble(played_rate), played_rate)
    frames = heard_while_playing(card, wav, rate=rate)
    assert likeness(pcm_of(frames), soxr.resample(babble(played_rate), played_rate, 48_000)) >= 0.99


def test_frames_are_whole_gapless_and_dated(card: SoundCard) -> None:
    async def main() -> None:
        opened_ns = boottime_ns()
        async with listening(name="line-3") as (source, frames):
            states = [source.state]
            await eventually(lambda: len(frames) >= 40, "no frames")
            states.append(source.state)
        assert [*states, source.state] == ["opening", "capturing", "closed"]
        closed_ns = boottime_ns()
        assert source.device_name == "default"
        assert source.last_frame_ns == frames[-1].captured_ns
        assert not any(jumps(frames))
        assert {(frame.source, len(frame.pcm)) for frame in frames} == {("line-3", 2 * FRAME_SAMPLES)}
        assert opened_ns < frames[0].captured_ns
        assert frames[-1].captured_ns < closed_ns
        steps = [b.captured_ns - a.captured_ns for a, b in itertools.pairwise(frames[:-1])]
        assert max(abs(step - FRAME_SAMPLES * NS_PER_SAMPLE) for step in steps) < NS_PER_S // 10

    run(main())
    assert card.environment  # held until here


def test_closing_lets_go_of_the_process_and_the_device(card: SoundCard) -> None:
    async def main() -> None:
        async with listening() as (source, frames):
            await eventually(lambda: bool(frames), "no frames")
            assert comm(source.pid) == "capture-microph"
        assert comm(source.pid) == ""
        await source.close()

    run(main())
    until(lambda: not card.recording(), "the device is still in use")


def comm(pid: int | None) -> str:
    """Name of a process; empty: there is none."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""


def test_no_sound_driver_comes_into_the_process_that_listens(card: SoundCard) -> None:
    with capturing_process("microphone") as (process, wait_for):
        wait_for("capturing")
        loaded = Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8")
        process.communicate("\n", timeout=20)
    assert "libportaudio" not in loaded
    assert card.environment  # held until here


def test_while_nobody_speaks_it_looks_rarely_and_at_once_when_somebody_begins_and_loses_nothing(
    card: SoundCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "_IDLE_POLL_S", 3.0)
    monkeypatch.setattr(devices, "_HOST_BUFFER_S", 9.0)

    async def main() -> None:
        async with listening() as (source, frames):
            await eventually(lambda: bool(frames), "no frames")
            source.attend(speaking=False)
            await eventually(lambda: boottime_ns() - frames[-1].captured_ns > NS_PER_S, "it does not rest")
            rested = len(frames)
            source.attend(speaking=True)
            await eventually(lambda: len(frames) > rested + 25, "it was not roused", 1.5)
        assert not any(jumps(frames))
        assert source.lost_samples == 0

    run(main())
    assert card.environment  # held until here


def test_a_microphone_closed_before_it_was_read_delivers_nothing(card: SoundCard) -> None:
    async def main() -> list[AudioFrame]:
        with microphone() as source:
            await source.close()
            return [frame async for frame in source.frames()]

    assert run(main()) == []
    assert not card.recording()


def test_a_late_consumer_loses_the_oldest_and_the_loss_shows_and_is_counted(
    card: SoundCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "BUFFER_S", 0.5)

    async def main() -> tuple[list[AudioFrame], int]:
        with microphone() as source:
            stream = source.frames()
            frames = [await stream.__anext__() for _ in range(5)]
            await eventually(lambda: source.lost_samples > SAMPLE_RATE, "nothing was lost")
            frames += [await stream.__anext__() for _ in range(30)]
            await source.close()
            frames += [frame async for frame in stream]
            return frames, source.lost_samples

    frames, lost = run(main())
    assert sum(jumps(frames)) == lost
    assert [bool(jump) for jump in jumps(frames)].count(True) == 1, "one overload, one jump"
    assert jumps(frames)[5] == lost
    assert card.environment


def test_listing_shows_the_virtual_card_and_its_default(card: SoundCard) -> None:
    devices = apart(list_devices)
    assert "pulse" in {device.name for device in devices}
    assert [device.is_default for device in devices].count(True) == 1
    card.kill()
    assert "pulse" not in {device.name for device in apart(list_devices)}, "the list is not frozen"


def test_the_level_of_a_device_can_be_measured(card: SoundCard, tmp_path: Path) -> None:
    assert measure(apart(record, "pulse", 0.2)).level_dbfs == SILENCE_DBFS
    tone = 0.1 * np.sqrt(2) * np.sin(2 * np.pi * 1_000 * np.arange(30 * 48_000) / 48_000)
    wav = recording(tmp_path / "tone.wav", tone, 48_000)
    assert any(each.level_dbfs == pytest.approx(-20, abs=0.5) for each in apart(levels_while_playing, wav))
    assert card.environment  # held until here


def levels_while_playing(wav: Path) -> list[Levels]:
    """Of a second, once a recording is heard; it is cut off then."""
    with subprocess.Popen(["paplay", "--device=speaker", str(wav)]) as player:
        try:
            heard = pytest.approx(-20, abs=0.5)
            until(lambda: measure(record("default", 0.3)).level_dbfs == heard, "not -20 dBFS")
            return list(itertools.islice(levels("pulse"), 10))
        finally:
            player.kill()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"device": "no such thing"}, "no microphone is 'no such thing'; `edge-asr devices` lists what is there"),
        ({"device": "hw:CARD=Nowhere"}, "no microphone is 'hw:CARD=Nowhere'"),
        ({"device": 99}, "no microphone is 99"),
        ({"device": "pulse", "channel": 33}, "'pulse' has no channel 33, only 1..32"),
    ],
)
def test_a_wrong_device_is_one_line(card: SoundCard, settings: dict[str, Any], line: str) -> None:
    with pytest.raises(DeviceError) as caught:
        apart(functools.partial(record, **settings))
    assert str(caught.value).startswith(line)
    assert card.environment


def test_a_second_channel_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = babble(48_000)
    wav = recording(tmp_path / "stereo.wav", np.column_stack([babble(48_000)[::-1], right]), 48_000)
    with sound_card(channels=2) as stereo:
        monkeypatch.setenv("PULSE_SERVER", stereo.environment["PULSE_SERVER"])
        assert likeness(pcm_of(heard_while_playing(stereo, wav, channel=2)), right) >= 0.99


# A microphone that is not there, or not always


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("harm", [SoundCard.freeze, SoundCard.unplug])
def test_a_device_that_goes_says_so_where_its_audio_breaks_off(
    card: SoundCard, harm: Callable[[SoundCard], None]
) -> None:
    async def main() -> None:
        async with listening() as (source, frames):
            await eventually(lambda: len(frames) >= 40, "no frames")
            harm(card)
            await eventually(lambda: not frames[-1].pcm, "it does not say so")
            assert source.state == "lost"
            card.thaw()
        assert (frames[-1].position > frames[-2].end, frames[-1].captured_ns) == (True, frames[-2].captured_ns)

    run(main())


def test_without_any_microphone_the_line_names_the_remedies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PULSE_SERVER", f"unix:{tmp_path}/nobody")

    with pytest.raises(DeviceError, match=r"no microphone found; plug one in, see `edge-asr devices`, or use --demo"):
        apart(record)


def outage(
    caplog: pytest.LogCaptureFixture, down: Callable[[], None], up: Callable[[], None], away_s: float = 0.5
) -> None:
    """A microphone through an outage: one line, back within 2 s, and the position tells how long it was away."""

    async def main() -> None:
        async with listening() as (source, frames):
            await eventually(lambda: len(frames) > 10, "no frames")
            await asyncio.to_thread(down)
            await eventually(lambda: source.state == "lost", "the loss was not noticed")
            before = len(frames)
            back_ns = boottime_ns() + round(away_s * NS_PER_S)
            await eventually(lambda: boottime_ns() > back_ns, "time stands still")
            await asyncio.to_thread(up)
            took_s = await eventually(lambda: source.state == "capturing", "it did not come back")
            assert took_s < 2
            await eventually(lambda: len(frames) > before + 20, "no frames after the outage")
        gaps, heard = jumps(frames), [frame for frame in frames if frame.pcm]
        assert sum(gaps) == source.lost_samples
        (at,) = [i for i, jump in enumerate(gaps) if jump]
        away_ns = heard[at].captured_ns - heard[at - 1].captured_ns - FRAME_SAMPLES * NS_PER_SAMPLE
        assert gaps[at] * NS_PER_SAMPLE == pytest.approx(away_ns, abs=NS_PER_S // 10)
        assert gaps[at] > away_s * SAMPLE_RATE

    caplog.set_level(logging.INFO)
    run(main())
    (line,) = warnings_of(caplog)
    assert line.startswith("microphone: 'default' ")
    assert line.endswith("; looking for it")
    assert "\n" not in line
    back = [record.getMessage() for record in caplog.records if "capturing from" in record.getMessage()]
    assert len(back) == 2


def test_an_unplugged_microphone_is_back_soon_after_it_was_plugged_in_again(
    card: SoundCard, caplog: pytest.LogCaptureFixture
) -> None:
    outage(caplog, card.unplug, card.plug)


def test_a_sound_server_that_was_killed_is_found_again(card: SoundCard, caplog: pytest.LogCaptureFixture) -> None:
    def up() -> None:
        card.start()
        card.plug()

    outage(caplog, card.kill, up)


def test_a_distant_sound_server_that_comes_back_when_there_was_no_more_hope_is_found_as_soon(
    card: SoundCard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def up() -> None:
        card.start()
        card.plug()

    card.kill()
    card.port = free_port()
    up()
    monkeypatch.setenv("PULSE_SERVER", f"tcp:127.0.0.1:{card.port}")
    monkeypatch.setattr(capture, "HOPE_S", 1.0)
    monkeypatch.setattr(capture, "DIM_S", 1000.0)
    outage(caplog, card.kill, up, away_s=4.0)


def test_a_frozen_sound_server_is_a_loss_and_used_again_when_it_wakes(
    card: SoundCard, caplog: pytest.LogCaptureFixture
) -> None:
    outage(caplog, card.freeze, card.thaw)


def test_a_short_freeze_is_no_outage_and_what_was_lost_in_it_shows(
    card: SoundCard, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with listening() as (source, frames):
            await eventually(lambda: len(frames) > 10, "no frames")
            card.freeze()
            stopped, thaw_ns = len(frames), boottime_ns() + NS_PER_S
            await eventually(lambda: boottime_ns() > thaw_ns, "time stands still")
            card.thaw()
            await eventually(lambda: len(frames) > stopped + 80, "no frames after the freeze")
        assert sum(jumps(frames)) == source.lost_samples
        first, last = frames[0], frames[-2]
        elapsed_ns = last.captured_ns - first.captured_ns
        assert (last.position - first.position) * NS_PER_SAMPLE == pytest.approx(elapsed_ns, abs=NS_PER_S // 3)

    run(main())
    assert warnings_of(caplog) == []


def test_a_microphone_that_is_missing_at_first_is_waited_for(card: SoundCard, caplog: pytest.LogCaptureFixture) -> None:
    card.unplug()

    async def main() -> None:
        async with listening(device="pulse") as (source, frames):
            await eventually(lambda: source.state == "lost", "an unplugged device was opened")
            await asyncio.to_thread(card.plug)
            await eventually(lambda: len(frames) > 3, "no frames")
            assert frames[0].position == 0
            assert source.lost_samples == 0

    run(main())
    assert len(warnings_of(caplog)) == 1


# A driver that crashes or hangs


def replaced(
    caplog: pytest.LogCaptureFixture, number: signal.Signals, cause: str, *, within_s: float, away_s: float
) -> None:
    """A signal to the capture process: one line, a new process, and the position tells how long nobody listened."""

    async def main() -> None:
        async with listening() as (source, frames):
            await eventually(lambda: len(frames) > 10, "no frames")
            before, seen = source.pid, len(frames)
            assert before is not None
            os.kill(before, number)
            await eventually(lambda: source.replaced == 1, "it was not noticed")
            took_s = await eventually(lambda: source.state == "capturing", "nobody took its place")
            assert took_s < within_s
            await eventually(lambda: len(frames) > seen + 20, "no frames of the new process")
            assert (source.pid != before, source.replaced) == (True, 1)
        gaps, heard = jumps(frames), [frame for frame in frames if frame.pcm]
        assert sum(gaps) == source.lost_samples
        (at,) = [i for i, jump in enumerate(gaps) if jump]
        away_ns = heard[at].captured_ns - heard[at - 1].captured_ns - FRAME_SAMPLES * NS_PER_SAMPLE
        assert gaps[at] * NS_PER_SAMPLE == pytest.approx(away_ns, abs=NS_PER_S // 10)
        assert away_ns > away_s * NS_PER_S
        assert [frame.pcm for frame in frames].count(b"") == 1, "it does not say where it broke off"

    run(main())
    assert warnings_of(caplog) == [f"microphone: {cause}; a new process takes its place"]


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_a_crash_of_the_sound_driver_costs_a_moment(
    card: SoundCard, caplog: pytest.LogCaptureFixture, number: signal.Signals
) -> None:
    replaced(caplog, number, f"capture ended by {number.name}", within_s=2.0, away_s=0.0)
    assert card.environment  # held until here


def test_a_hang_of_the_sound_driver_ends_in_time(
    card: SoundCard, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "LIMIT_S", 3.0)
    cause = "the sound driver has not answered for 3 s"
    replaced(caplog, signal.SIGSTOP, cause, within_s=2.0, away_s=2.5)
    assert card.environment  # held until here


def test_time_in_which_everything_was_frozen_counts_against_no_sound_driver(card: SoundCard) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        time_of = loop.time
        async with listening() as (source, frames):
            for hours in range(1, 4):
                seen = len(frames)
                await eventually(lambda n=seen: len(frames) > n + 10, "no frames")  # type: ignore[misc]
                setattr(loop, "time", lambda h=hours: time_of() + 3600 * h)  # noqa: B010 - for the type checker
            seen = len(frames)
            await eventually(lambda: len(frames) > seen + 10, "no frames after it")
            assert source.replaced == 0

    asyncio.run(main())
    assert card.environment  # held until here


def test_a_driver_that_hangs_again_and_again_is_told_once(
    card: SoundCard, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "LIMIT_S", 1.5)

    async def main() -> None:
        async with listening() as (source, _):
            await eventually(lambda: source.state == "capturing", "no capture")
            card.freeze()
            await eventually(lambda: source.replaced == 3, "it was not replaced", 20)
            card.thaw()
            await eventually(lambda: source.state == "capturing", "it did not come back")

    run(main())
    lost, hung = warnings_of(caplog)
    assert lost.endswith("; looking for it")
    assert hung == "microphone: the sound driver has not answered for 1.5 s; a new process takes its place"


def test_a_driver_that_crashes_again_and_again_is_left_alone_for_longer_each_time(
    card: SoundCard, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_PAUSE_S", 3.0)

    async def main() -> None:
        async with listening() as (source, _):
            for crash in (1, 2, 3):
                await eventually(lambda: source.state == "capturing", "nobody took its place")
                os.kill(source.pid or 0, signal.SIGSEGV)
                before_ns = boottime_ns()
                await eventually(lambda n=crash: source.replaced == n, "it was not noticed")  # type: ignore[misc]
            await eventually(lambda: source.state == "capturing", "nobody took its place")
            assert boottime_ns() - before_ns > 3 * NS_PER_S

    run(main())
    assert warnings_of(caplog) == ["microphone: capture ended by SIGSEGV; a new process takes its place"]
    assert card.environment  # held until here


class Leaking(capture.RateMeter):
    """Keeps a megabyte at each look, while there is a file that says so."""

    kept: list[bytes] = []  # noqa: RUF012 - for as long as the process lives

    def feed(self, now_ns: int, samples: int) -> None:
        if Path(os.environ["LEAKS"]).exists():
            self.kept.append(os.urandom(1 << 20))
        super().feed(now_ns, samples)


def test_a_capture_process_that_leaks_is_replaced_when_nobody_speaks(
    card: SoundCard, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    leaks, weighed = tmp_path / "leaks", []

    def weigh(pid: int) -> int:
        weighed.append(resident_bytes(pid))
        return weighed[-1]

    monkeypatch.setenv("LEAKS", str(leaks))
    monkeypatch.setattr(capture, "RateMeter", Leaking)
    monkeypatch.setattr(capture, "resident_bytes", weigh)
    monkeypatch.setattr(capture, "WEIGHING_INTERVAL_S", 0.0)
    monkeypatch.setattr(capture, "GROWTH_LIMIT_BYTES", 16 << 20)

    async def main() -> None:
        async with listening() as (source, frames):
            await eventually(lambda: source.state == "capturing", "no capture")
            source.attend(speaking=False)
            await eventually(lambda: bool(weighed), "nobody looks")
            source.attend(speaking=True)
            before, first = source.pid, weighed[0]
            assert before is not None
            leaks.touch()
            await eventually(lambda: resident_bytes(before) > first + (20 << 20), "it does not leak")
            until_ns = boottime_ns() + 2 * NS_PER_S
            await eventually(lambda: frames[-1].captured_ns > until_ns, "no frames")
            assert source.replaced == 0
            leaks.unlink()
            source.attend(speaking=False)
            await eventually(lambda: source.replaced == 1, "it was not replaced")
            await eventually(lambda: source.state == "capturing", "nobody took its place")
            enough = len(weighed) + 2
            await eventually(lambda: len(weighed) >= enough, "nobody looks at the new one")
            assert (source.pid != before, source.replaced) == (True, 1)

    run(main())
    (line,) = warnings_of(caplog)
    assert re.fullmatch(r"microphone: capture has grown to \d+ MB; a new process takes its place", line)
    assert card.environment  # held until here


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\xff",
        b"[" * 50_000,
        b"7",
        b"[1, 2]",
        b'[0, "", 0, null, NaN, ""]',
        b'[0, "", 0, null, 1e999, ""]',
        b'[0, "", 0, null, -1, ""]',
        b'[0, "", 0, NaN, 0, ""]',
        b'[0, null, 0, null, 0, ""]',
        b'[999999999999999999999, "", 0, null, 0, ""]',
        b'[0, "", 0, null, 0, ""]\n\0',
    ],
)
def test_what_a_capture_process_cannot_have_heard_is_no_report(garbage: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        Report.from_bytes(garbage)


def raving(line: socket.socket) -> None:
    """A capture process whose memory is corrupted."""
    with contextlib.suppress(OSError):
        while True:
            line.send(b'[0, "x", 16000, null, NaN, ""]\n\0\0')
            time.sleep(0.01)


def test_a_capture_process_that_tells_nonsense_is_replaced(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "serve", raving)

    async def main() -> None:
        async with listening() as (source, frames):
            await eventually(lambda: source.replaced == 2, "it was not replaced")
            assert (source.state, frames) == ("lost", [])

    run(main())
    (line,) = warnings_of(caplog)
    assert line.startswith("microphone: capture tells nonsense: ")


def test_without_memory_for_a_process_it_is_tried_again(
    card: SoundCard, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork, calls = os.fork, iter(range(99))

    def full() -> int:  # the first call is the zygote's own birth
        if next(calls) in (1, 2):
            raise OSError(errno.ENOMEM, "full")
        return fork()

    monkeypatch.setattr(os, "fork", full)

    async def main() -> None:
        async with listening() as (source, _):
            await eventually(lambda: source.state == "lost", "it does not say so")
            await eventually(lambda: source.state == "capturing", "it was not tried again")

    run(main())
    (line,) = warnings_of(caplog)
    assert "no memory for a process" in line
    assert card.environment  # held until here


def test_a_process_that_hangs_in_the_kernel_is_outlived(
    card: SoundCard, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kill, unplugged = os.kill, tmp_path / "unplugged"
    monkeypatch.setattr("edge_asr.zygote.END_S", 0.2)
    monkeypatch.setattr(capture, "LIMIT_S", 4.0)
    monkeypatch.setattr(os, "kill", lambda pid, number: kill(pid, number) if unplugged.exists() else None)

    async def main() -> None:
        async with listening() as (source, _):
            monkeypatch.setattr(os, "kill", kill)  # no signal of the zygote's arrives until then
            await eventually(lambda: source.state == "capturing", "no capture")
            os.kill(source.pid or 0, signal.SIGSTOP)
            await eventually(lambda: "hangs in its driver" in source.trouble, "it does not say so")
            assert (source.state, source._zygote.fault) == ("lost", "")  # noqa: SLF001
            unplugged.touch()
            await eventually(lambda: source.state == "capturing", "nobody took its place")

    run(main())
    assert card.environment  # held until here


def test_a_driver_out_of_which_nothing_gets_its_process_is_a_hang(
    card: SoundCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_asr.zygote.LIMIT_S", 0.5)

    async def main() -> None:
        async with listening() as (source, frames):
            await eventually(lambda: bool(frames), "no frames")
            zygote = source._zygote  # noqa: SLF001
            os.kill(zygote.pid, signal.SIGSTOP)  # as if it waited for what the kernel cannot end
            os.kill(source.pid or 0, signal.SIGKILL)
            await eventually(lambda: bool(zygote.fault), "it was not noticed")
            assert zygote.fault == "the zygote was stopped for more than 0.5 s"
            await eventually(lambda: source.trouble.endswith(zygote.fault), "it does not say so")
            os.kill(zygote.pid, signal.SIGCONT)

    run(main())
    assert card.environment  # held until here


# In a process of its own, as the daemon runs it

CAPTURE = """
import asyncio, ctypes, logging, sys
from edge_asr.settings import MicrophoneSource
from edge_asr.sources import Microphone
from edge_asr.zygote import Zygote

if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):  # PR_SET_MDWE: what MemoryDenyWriteExecute= is made of since Linux 6.3
    print("no-mdwe", flush=True)
logging.basicConfig(level=logging.INFO, format="OURS %(message)s")

async def consume(source):
    async for _ in source.frames():
        pass

zygote = Zygote()

async def main():
    sources = [Microphone(MicrophoneSource(type="microphone", name=name), zygote) for name in sys.argv[1:]]
    consumers = [asyncio.create_task(consume(source)) for source in sources]
    stdin = asyncio.create_task(asyncio.to_thread(sys.stdin.readline))
    said = None
    while not stdin.done():
        states = {source.state for source in sources}
        if len(states) == 1 and states != said:
            said = states
            print(*states, flush=True)
        await asyncio.sleep(0.01)
    await asyncio.gather(*(source.close() for source in sources), *consumers)

asyncio.run(main())
print("ended", flush=True)
"""


@contextlib.contextmanager
def capturing_process(*names: str) -> Iterator[tuple[subprocess.Popen[str], Callable[[str], None]]]:
    """A process with microphones of these names, and a function that waits until it says that all are in a state."""
    process = subprocess.Popen(
        [sys.executable, "-c", CAPTURE, *names],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )

    def wait_for(word: str) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == word:
                return
        raise AssertionError(f"the process ended without saying {word!r}: {process.communicate()[1]}")

    try:
        with process:
            yield process, wait_for
    finally:
        process.kill()


def test_without_executable_memory_it_works_and_c_libraries_keep_quiet(card: SoundCard) -> None:
    card.unplug()
    with capturing_process("microphone") as (process, wait_for):
        wait_for("lost")
        card.plug()
        wait_for("capturing")
        card.unplug()
        wait_for("lost")
        card.plug()
        wait_for("capturing")
        out, err = process.communicate("\n", timeout=20)
    assert process.returncode == 0
    assert out.endswith("ended\n")
    assert [line for line in err.splitlines() if not line.startswith("OURS ")] == []
    assert len(err.splitlines()) == 4


@pytest.mark.parametrize("names", [["one"], ["one", "two"]])
def test_a_process_ends_in_time_although_its_sound_server_is_frozen(card: SoundCard, names: list[str]) -> None:
    with capturing_process(*names) as (process, wait_for):
        wait_for("capturing")
        card.freeze()
        wait_for("lost")
        out, _ = process.communicate("\n", timeout=10)
    assert process.returncode == 0
    assert out.endswith("ended\n")


def test_a_process_ends_in_time_although_its_sound_server_froze_before_it_was_opened(card: SoundCard) -> None:
    with capturing_process("microphone") as (process, wait_for):
        wait_for("capturing")
        card.kill()
        wait_for("lost")
        card.start()
        card.freeze()
        retried_ns = boottime_ns() + 2 * NS_PER_S
        until(lambda: boottime_ns() > retried_ns, "time stands still")
        out, _ = process.communicate("\n", timeout=10)
    assert process.returncode == 0
    assert out.endswith("ended\n")


def test_a_microphone_is_let_go_of_however_the_process_that_listens_ends(card: SoundCard) -> None:
    with capturing_process("microphone") as (process, wait_for):
        wait_for("capturing")
        assert card.recording()
        process.kill()
    until(lambda: not card.recording(), "the device is still in use")


def test_a_missing_portaudio_is_one_line_with_the_package_to_install() -> None:
    script = """
import ctypes.util
ctypes.util.find_library = lambda name: None
from edge_asr.devices import DeviceError, list_devices
try:
    list_devices()
except DeviceError as error:
    print(error)
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert process.stdout == "PortAudio is not installed; `apt install libportaudio2`\n"


# Which device

CARDS = """\
 0 [PCH            ]: HDA-Intel - HDA Intel PCH
                      HDA Intel PCH at 0xdf240000 irq 129
 1 [Array          ]: USB-Audio - ReSpeaker 4 Mic Array (UAC1.0)
                      SEEED ReSpeaker 4 Mic Array at usb-0000:00:14.0-1, high speed
12 [Array_1        ]: USB-Audio - ReSpeaker 4 Mic Array (UAC1.0)
                      SEEED ReSpeaker 4 Mic Array at usb-0000:00:14.0-2, high speed
"""
PCH = Device(0, "HDA Intel PCH: ALC269 (hw:0,0)", "hw:CARD=PCH,DEV=0", 2, 44_100, is_default=False)
ARRAY = Device(3, "ReSpeaker 4 Mic Array: USB Audio (hw:1,0)", "hw:CARD=Array,DEV=0", 6, 16_000, is_default=False)
ARRAY_2ND = Device(4, "ReSpeaker 4 Mic Array: USB Audio (hw:1,1)", "hw:CARD=Array,DEV=1", 2, 16_000, is_default=False)
OTHER = Device(5, "ReSpeaker 4 Mic Array: USB Audio (hw:12,0)", "hw:CARD=Array_1,DEV=0", 6, 16_000, is_default=False)
DEFAULT = Device(7, "default", None, 32, 44_100, is_default=True)
DEFAULTS = Device(8, "default plus", None, 32, 44_100, is_default=False)
DEVICES = [PCH, ARRAY, ARRAY_2ND, OTHER, DEFAULT, DEFAULTS]


@pytest.mark.parametrize(
    ("wanted", "device"),
    [
        ("default", DEFAULT),
        (3, ARRAY),
        ("alc269", PCH),
        ("HDA Intel PCH: ALC269 (hw:0,0)", PCH),
        ("hw:1,1", ARRAY_2ND),
        ("hw:CARD=Array", ARRAY),
        ("hw:CARD=Array,DEV=1", ARRAY_2ND),
        ("plughw:CARD=Array_1", OTHER),
        ("default plus", DEFAULTS),
    ],
)
def test_a_device_is_found_by_default_index_alsa_id_or_part_of_its_name(wanted: str | int, device: Device) -> None:
    assert choose_device(wanted, DEVICES) == device


def test_a_name_that_fits_exactly_beats_longer_ones() -> None:
    short = Device(9, "Default Plus", None, 1, 48_000, is_default=False)
    longer = Device(10, "default plus ultra", None, 1, 48_000, is_default=False)
    assert choose_device("default plus", [longer, short]) == short


def test_a_name_that_fits_two_devices_is_refused_with_both() -> None:
    with pytest.raises(DeviceError, match=r"fits several microphones \(.*hw:1,0.*hw:1,1.*hw:12,0"):
        choose_device("respeaker", DEVICES)


@pytest.mark.parametrize("wanted", ["nothing", 6, "hw:CARD=Arra", "hw:CARD=Array,DEV=2"])
def test_a_device_that_is_not_there_is_refused(wanted: str | int) -> None:
    with pytest.raises(DeviceError, match="`edge-asr devices` lists what is there"):
        choose_device(wanted, DEVICES)


def test_card_ids_are_read_from_the_kernels_listing() -> None:
    assert alsa_cards(CARDS) == {0: "PCH", 1: "Array", 12: "Array_1"}
    assert alsa_cards("--- no soundcards ---\n") == {}


@pytest.mark.parametrize(
    ("nodes", "wanted", "is_there"),
    [
        ((), "default", False),
        (("controlC0", "pcmC0D0p", "timer"), "default", False),
        (("pcmC0D0p", "pcmC1D0c"), "default", True),
        (("pcmC0D0p", "pcmC1D0c"), 3, True),
        (("pcmC0D0p", "pcmC1D0c"), "plughw:CARD=Array,DEV=0", True),
        (("pcmC0D0p", "pcmC12D0c"), "hw:CARD=Array,DEV=0", False),
        (("pcmC0D0p", "pcmC12D0c"), "hw:CARD=Array_1,DEV=0", True),
    ],
)
def test_the_kernel_tells_whether_a_microphone_can_be_there_at_all_unless_a_sound_server_may_have_one(
    nodes: tuple[str, ...], wanted: str | int, *, is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cards").write_text(CARDS, encoding="ascii")
    for node in nodes:
        (tmp_path / node).touch()
    monkeypatch.setattr(devices, "ALSA_CARDS", tmp_path / "cards")
    monkeypatch.setattr(devices, "ALSA_NODES", tmp_path)
    monkeypatch.setattr(devices, "_SERVER_FILES", ())
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in devices._SERVERS:  # noqa: SLF001
        monkeypatch.delenv(name, raising=False)
    assert is_out_of_sight(wanted) != is_there
    monkeypatch.setenv("PULSE_SERVER", "unix:/nowhere")
    assert not is_out_of_sight(wanted)


@pytest.mark.parametrize("device", ["hw:CARD=Array,DEV=0", "plughw:CARD=Array", "default"])
def test_a_card_that_another_process_has_is_said_to_be_in_use_and_by_the_service_it_is_well(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PortAudio does not list it, or calls it unavailable; the kernel knows who has it."""
    status = tmp_path / "card1/pcm0c/sub0/status"
    status.parent.mkdir(parents=True)
    (tmp_path / "Array").symlink_to("card1")
    monkeypatch.setattr(devices, "ALSA_CARDS", tmp_path / "cards")
    monkeypatch.setenv("PULSE_SERVER", "unix:/nowhere")
    source = MicrophoneSource(type="microphone", device=device)

    def found() -> tuple[str, str, str]:
        finding = doctor._microphone(source, 0.0)  # noqa: SLF001 - beside it everything else is looked at
        return finding.state, finding.found, finding.remedy

    status.write_text("closed\n", encoding="ascii")
    assert found()[2] == "is the user in the group audio?"
    status.write_text(f"state: RUNNING\nowner_pid   : {os.getpid()}\ntrigger_time: 1.5\n", encoding="ascii")
    state, said, _ = found()
    assert state == "failed"
    assert f"is in use by process {os.getpid()} (" in said
    with pytest.raises(DeviceError, match="is in use by process"):
        next(levels(device))
    monkeypatch.setattr(service, "runs", lambda pid: pid == os.getpid())
    assert found()[:2] == ("ok", "in use by the service, whose health and alarms tell how it hears")


def mark(path: Path) -> None:
    """Count in a file what another process does."""
    with path.open("a") as file:
        file.write(".")


def marks(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_portaudio_is_not_started_for_a_card_that_the_kernel_does_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, tried, plugged = tmp_path / "looked", tmp_path / "tried", tmp_path / "plugged"

    def look(_wanted: str | int) -> bool:
        mark(looked)
        return not plugged.exists()

    def start(*_: object) -> None:
        mark(tried)
        raise DeviceError("no microphone found")

    monkeypatch.setattr(capture, "is_out_of_sight", look)
    monkeypatch.setattr(capture, "Stream", start)
    monkeypatch.setattr(capture, "RETRY_S", 0.02)

    async def main() -> None:
        async with listening() as (source, _):
            await eventually(lambda: marks(looked) > 5, "it does not look")
            assert (source.state, source.trouble) == ("lost", "no microphone found")
            assert marks(tried) == 1
            plugged.touch()
            await eventually(lambda: marks(tried) > 1, "it is not tried again")

    run(main())


def test_where_a_sound_server_may_have_it_a_lost_device_is_tried_rarely_until_something_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, tried, there = tmp_path / "looked", tmp_path / "tried", tmp_path / "snd"
    there.mkdir()

    def look() -> tuple[object, ...]:
        mark(looked)
        return signs()

    def start(*_: object) -> None:
        mark(tried)
        raise DeviceError("no microphone found")

    distant = socket.socket()
    distant.bind(("127.0.0.1", 0))
    address = "tcp:{}:{}".format(*distant.getsockname())
    monkeypatch.setenv("PULSE_SERVER", f"{{an-id}}unix:{tmp_path}/native {address} tcp6:[::1]:1 tcp:no-such-name")
    monkeypatch.setattr(devices, "ALSA_NODES", there)
    monkeypatch.setattr(capture, "signs", look)
    monkeypatch.setattr(capture, "Stream", start)
    monkeypatch.setattr(capture, "RETRY_S", 0.02)
    monkeypatch.setattr(capture, "HOPE_S", 0.05)
    monkeypatch.setattr(capture, "DIM_S", 1000.0)

    async def has_given_up() -> None:
        idle = marks(looked) - marks(tried)
        await eventually(lambda: marks(looked) - marks(tried) > idle + 5, "it is tried at every look")

    async def main() -> None:
        async with listening():
            await eventually(lambda: marks(looked) > 0, "it does not look")
            await has_given_up()
            for change in (
                (there / "pcmC1D0c").touch,
                functools.partial((there / "pcmC1D0c").chmod, 0o660),
                (there / "pcmC1D0c").unlink,
                (tmp_path / "native").touch,
                distant.listen,
                distant.close,
            ):
                before = marks(tried)
                change()
                await eventually(lambda: marks(tried) > before, "it is not tried again")  # noqa: B023 - awaited here
                await has_given_up()

    with distant:
        run(main())


# The timeline


def replay(deliveries: list[tuple[float, int]]) -> list[int]:
    """Losses found in deliveries of (seconds since the start, samples)."""
    timeline, position, losses = Timeline(), 0, []
    for seconds, samples in deliveries:
        position += samples
        lost = timeline.missing(round(seconds * NS_PER_S), position)
        position += lost
        losses.append(lost)
    return losses


@given(
    drift_ppm=st.integers(-500, 500),
    jitter=st.lists(st.floats(0, 0.2), min_size=5, max_size=5),
    hours=st.sampled_from([0.01, 1]),
)
def test_a_cards_clock_may_drift_and_its_deliveries_be_late_without_a_loss(
    drift_ppm: int, jitter: list[float], hours: float
) -> None:
    step = 0.5
    late = itertools.cycle(jitter)
    card_rate = SAMPLE_RATE * (1 + drift_ppm / 1e6)
    deliveries = [(i * step + next(late), round(step * card_rate)) for i in range(1, int(hours * 3600 / step))]
    assert not any(replay(deliveries))


@given(lost_s=st.floats(0.3, 3600), at=st.integers(5, 100))
def test_audio_lost_without_a_word_is_noticed_once_and_measured(lost_s: float, at: int) -> None:
    step = 0.032
    deliveries = [(i * step + (lost_s if i > at else 0), 512) for i in range(1, at + 100)]
    losses = replay(deliveries)
    assert [loss > 0 for loss in losses].count(True) == 1
    assert sum(losses) / SAMPLE_RATE == pytest.approx(lost_s, rel=0.002, abs=0.01)


@given(late_s=st.floats(0, 0.9), at=st.integers(5, 50))
def test_backlogs_that_come_in_after_all_are_no_loss(late_s: float, at: int) -> None:
    step = 0.032
    due_s = [i * step for i in range(1, 200)]
    freezes = [due_s[at], due_s[at + 100]]
    held_back = [max([due, *(start + late_s for start in freezes if start <= due < start + late_s)]) for due in due_s]
    assert not any(replay([(seconds, 512) for seconds in held_back]))


# Recordings


def heard_from(source: Files | Stdin) -> list[AudioFrame]:
    async def main() -> list[AudioFrame]:
        return [frame async for frame in source.frames()]

    return run(main())


def files(*paths: Path, realtime: bool = False, strict: bool = False) -> Files:
    return Files(FilesSource(type="files", paths=paths, realtime=realtime), strict=strict)


def test_recordings_are_played_in_order_with_a_quiet_second_between_them(tmp_path: Path) -> None:
    one = recording(tmp_path / "one.wav", babble(SAMPLE_RATE, 0.7))
    two = recording(tmp_path / "two.flac", babble(48_000, 0.3), 48_000)
    source = files(two, one)
    frames = heard_from(source)
    whole = read_file(two) + quiet(SAMPLE_RATE) + read_file(one)
    assert pcm_of(frames)[: len(whole)] == whole
    assert not any(pcm_of(frames)[len(whole) :]), "the last frame is filled up with zeros"
    assert not any(jumps(frames))
    assert {(frame.source, len(frame.pcm)) for frame in frames} == {("files", 2 * FRAME_SAMPLES)}
    assert (source.played, source.unplayable) == (2, 0)


def test_a_directory_is_its_recordings_in_the_order_of_their_names(tmp_path: Path) -> None:
    names = [f"{letter}.{suffix}" for letter, suffix in zip("hdbfacge", ["wav", "FLAC", "ogg", "mp3"] * 2, strict=True)]
    for name in [*names, "notes.txt", ".hidden.wav"]:
        (tmp_path / name).touch()
    assert [path.name for path in audio_files(tmp_path)] == sorted(names)
    assert audio_files(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]


def test_a_file_that_cannot_be_played_is_one_warning_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.wav").write_bytes(b"this is no audio")
    good = recording(tmp_path / "b.wav", babble(SAMPLE_RATE, 0.2))
    (tmp_path / "empty").mkdir()
    source = files(tmp_path / "missing.wav", tmp_path / "empty", tmp_path)
    assert pcm_of(heard_from(source)).startswith(read_file(good))
    assert (source.played, source.unplayable) == (1, 3)
    missing, empty, bad = warnings_of(caplog)
    assert missing.startswith(f"files: {tmp_path}/missing.wav: ")
    assert empty.startswith(f"files: {tmp_path}/empty: holds no recording")
    assert bad.startswith(f"files: {tmp_path}/a.wav: is not readable audio")


def test_a_strict_run_ends_at_the_first_file_that_cannot_be_played(tmp_path: Path) -> None:
    with pytest.raises(AudioFileError, match=r"missing\.wav: cannot be read \(No such file or directory\)"):
        heard_from(files(tmp_path / "missing.wav", strict=True))


def test_in_real_time_no_frame_comes_before_its_moment_and_a_slow_consumer_does_not_shift_them(tmp_path: Path) -> None:
    wav = recording(tmp_path / "a.wav", babble(SAMPLE_RATE, 0.64))

    async def main() -> list[tuple[AudioFrame, int]]:
        heard = []
        async for frame in files(wav, realtime=True).frames():
            heard.append((frame, boottime_ns()))
            await asyncio.sleep(0.02)  # a consumer at work
        return heard

    started_ns = boottime_ns()
    heard = run(main())
    assert len(heard) == 20
    assert all(now_ns >= frame.captured_ns - NS_PER_S // 1000 for frame, now_ns in heard)
    origin_ns = heard[0][0].captured_ns - heard[0][0].end * NS_PER_SAMPLE
    assert origin_ns >= started_ns
    assert all(frame.captured_ns == origin_ns + frame.end * NS_PER_SAMPLE for frame, _ in heard)


def test_as_fast_as_possible_frames_are_dated_now(tmp_path: Path) -> None:
    wav = recording(tmp_path / "a.wav", babble(SAMPLE_RATE, 60.0))
    started_ns = boottime_ns()
    frames = heard_from(files(wav))
    assert started_ns < frames[0].captured_ns < frames[-1].captured_ns < boottime_ns() < started_ns + 30 * NS_PER_S


def test_a_closed_replay_ends_at_once(tmp_path: Path) -> None:
    wav = recording(tmp_path / "a.wav", babble(SAMPLE_RATE, 30.0))

    async def main() -> int:
        source, count = files(wav, realtime=True), 0
        async for _ in source.frames():
            count += 1
            if count == 3:
                await source.close()
        return count

    assert run(main()) == 3


# Standard input


@contextlib.contextmanager
def pipe_with(*writes: bytes, stay_open: bool = False) -> Iterator[Any]:
    """The reading end of a real pipe into which a thread writes."""
    reading, writing = os.pipe()
    done = threading.Event()

    def write() -> None:
        with os.fdopen(writing, "wb", buffering=0) as stream:
            for piece in writes:
                stream.write(piece)
            if stay_open:
                done.wait()

    writer = threading.Thread(target=write)
    writer.start()
    with os.fdopen(reading, "rb") as stream:
        yield stream
        done.set()
        writer.join()


def stdin(stream: Any, rate: int = SAMPLE_RATE) -> Stdin:
    return Stdin(StdinSource(type="stdin", rate=rate), stream)


def test_what_is_piped_in_comes_out_whatever_the_writes(caplog: pytest.LogCaptureFixture) -> None:
    pcm = np.random.default_rng(8).integers(-32_768, 32_768, 100_000).astype("<i2").tobytes()
    with pipe_with(pcm[:1], pcm[1:4_444], pcm[4_444:]) as stream:
        frames = heard_from(stdin(stream))
    assert pcm_of(frames)[: len(pcm)] == pcm
    assert not any(pcm_of(frames)[len(pcm) :])
    assert not any(jumps(frames))
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_other_rates_are_resampled_to_the_last_sample(rate: int) -> None:
    samples = (babble(rate, 0.5) * 32_767).astype("<i2")
    resampler = Resampler(rate)
    expected = resampler.feed(samples) + resampler.flush()
    with pipe_with(samples.tobytes()) as stream:
        assert pcm_of(heard_from(stdin(stream, rate)))[: len(expected)] == expected


def test_half_a_sample_at_the_end_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with pipe_with(b"\1\0\2\0\3") as stream:
        (frame,) = heard_from(stdin(stream))
    assert frame.pcm == b"\1\0\2\0" + bytes(2 * FRAME_SAMPLES - 4)
    (line,) = warnings_of(caplog)
    assert "half a sample" in line


def test_an_empty_stream_is_no_frame() -> None:
    with pipe_with() as stream:
        assert heard_from(stdin(stream)) == []


def test_a_wav_file_on_standard_input_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with (
        recording(tmp_path / "a.wav", babble(SAMPLE_RATE, 0.1)).open("rb") as stream,
        pytest.raises(SourceError, match=r"stdin: gets a WAV file; convert it to raw PCM"),
    ):
        heard_from(stdin(stream))


def test_a_closed_standard_input_ends_although_its_writer_is_silent() -> None:
    async def main(source: Stdin) -> int:
        count = 0
        async for _ in source.frames():
            count += 1
            await source.close()
        return count

    with pipe_with(bytes(2 * FRAME_SAMPLES), stay_open=True) as stream:
        assert run(main(stdin(stream))) == 1


def test_the_real_standard_input_is_read_when_no_other_is_given() -> None:
    script = """
import asyncio
from edge_asr.settings import StdinSource
from edge_asr.sources import Stdin

async def main():
    return [frame async for frame in Stdin(StdinSource(type="stdin")).frames()]

print(len(asyncio.run(main())))
"""
    process = subprocess.run(
        [sys.executable, "-c", script], input=bytes(2 * FRAME_SAMPLES * 500), capture_output=True, check=True
    )
    assert process.stdout == b"500\n"
    assert process.stderr == b""
