"""A wall around native code: what a dying, hanging, growing or lying recognizer costs, and what it never costs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from edge_asr import (
    audio,
    clock,
    commands,
    engine,
    grammar,
    hotwords,
    inference,
    installation,
    model_store,
    prepared,
    process_state,
    settings,
    trial,
    worker,
)
from edge_asr.audio import read_file
from edge_asr.events import SAMPLE_RATE, Command, Rejection, Utterance, new_id
from edge_asr.model_store import ModelError
from edge_asr.process_state import resident_bytes
from edge_asr.worker import Worker, WorkerError
from edge_asr.zygote import ZygoteError
from tests.soundcard import until

OPTIONS = settings.Settings(commands=settings.Commands(grammars=("factory.en",)))
RECORDINGS = model_store.bundled("recordings")


def said(recording: str) -> Utterance:
    pcm = read_file(RECORDINGS / recording)
    return Utterance(id=new_id(), source="test", start=0, pcm=pcm, ended_ns=clock.boottime_ns())


STOP = said("20-emergency-stop.flac")


def cpu_ticks(pid: int) -> int:
    """User time of a process in hundredths of a second."""
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[11])


def has_ended(pid: int) -> bool:
    """Whether a process is gone or only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def waits_in(pid: int) -> int | None:
    """Address behind the system call in which a process waits; None: it computes."""
    state = Path(f"/proc/{pid}/syscall").read_text(encoding="ascii").split()
    return None if state == ["running"] else int(state[-1], 16)


JUMP_TO_ITSELF = {"x86_64": b"\xeb\xfe", "aarch64": b"\x00\x00\x00\x14"}


SLEEP_FOR_EVER = {
    "x86_64": bytes.fromhex("b822000000 0f05 ebf7"),  # pause(2), again and again
    "aarch64": bytes.fromhex("000080d2 010080d2 020080d2 030080d2 280980d2 010000d4 faffff17"),  # ppoll(2) of nothing
}


def spin(pid: int) -> None:
    """Let a process that waits compute for ever from its next word on, outside Python, as a broken library would."""
    _break(pid, JUMP_TO_ITSELF[platform.machine()])


def doze(pid: int) -> None:
    """Let a process that waits sleep for ever from its next word on, as in a deadlock."""
    _break(pid, SLEEP_FOR_EVER[platform.machine()])


def _break(pid: int, code: bytes) -> None:
    """It waits in a system call; what it does behind it becomes something else, in this process alone."""
    until(lambda: waits_in(pid) is not None, "it does not wait")
    behind_the_call = waits_in(pid)
    assert behind_the_call is not None
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(behind_the_call)
        memory.write(code)


@pytest.fixture
def walled() -> Iterator[Worker]:
    opened = Worker(OPTIONS)
    yield opened
    opened.close()


def test_it_understands_what_an_engine_in_this_process_understands(walled: Worker) -> None:
    direct = engine.Engine.build(OPTIONS)
    assert walled.name == direct.name
    for recording in ("20-emergency-stop.flac", "07-log-scrap.flac", "16-nobody-speaks.flac"):
        utterance = said(recording)
        for final in (True, False):
            there, here = walled.understand(utterance, final=final), direct.understand(utterance, final=final)
            assert (there.utterance, there.transcript, there.decision) == (utterance, here.transcript, here.decision)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
def test_a_crash_costs_nothing_but_time(walled: Worker, number: signal.Signals) -> None:
    os.kill(walled.pid, number)
    heard = walled.understand(STOP, final=True)
    assert isinstance(heard.decision, Command)
    assert walled.replaced == 1


def test_a_crash_in_the_middle_of_an_utterance_costs_nothing_but_time(walled: Worker) -> None:
    long = dataclasses.replace(STOP, pcm=STOP.pcm * 10)
    pid, idle_ticks = walled.pid, cpu_ticks(walled.pid)

    def kill_at_work() -> None:
        until(lambda: cpu_ticks(pid) > idle_ticks + 1, "the worker does not work")
        os.kill(pid, signal.SIGSEGV)

    killer = threading.Thread(target=kill_at_work)
    killer.start()
    heard = walled.understand(long, final=True)
    killer.join()
    assert heard.transcript is not None
    assert walled.replaced == 1


@pytest.mark.parametrize("times", [1, 10])
def test_a_hang_ends_in_time_and_costs_nothing_else(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "LIMIT_S", 3.0)
    speech = dataclasses.replace(STOP, pcm=STOP.pcm * times)  # ten times: more than a socket holds
    with closing(Worker(OPTIONS)) as walled:
        os.kill(walled.pid, signal.SIGSTOP)
        assert walled.understand(speech, final=True).transcript is not None
        assert walled.replaced == 1


_SERVE = worker.serve


def stop_in_the_middle(line: socket.socket) -> None:
    """A worker that writes the first bytes of its next long answer and stops, once there is a file that says so."""
    ours, theirs = socket.socketpair()

    def forward() -> None:
        while request := line.recv(1 << 16):
            ours.sendall(request)
        os._exit(0)

    threading.Thread(target=forward, daemon=True).start()
    threading.Thread(target=_SERVE, args=(theirs,), daemon=True).start()
    while answer := ours.recv(1 << 16):
        if len(answer) > 10_000 and (order := Path(os.environ["STOP_AT"])).exists():
            order.unlink()
            line.sendall(answer[:5_000])
            os.kill(os.getpid(), signal.SIGSTOP)
        line.sendall(answer)


def test_one_that_stops_in_the_middle_of_its_answer_is_replaced_in_time_and_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker, "LIMIT_S", 2.0)
    monkeypatch.setattr(worker, "serve", stop_in_the_middle)
    monkeypatch.setenv("STOP_AT", str(tmp_path / "now"))
    with closing(Worker(OPTIONS)) as walled:
        (tmp_path / "now").touch()
        assert isinstance(walled.understand(STOP, final=True).decision, Command)
        assert walled.replaced == 1
        assert not (tmp_path / "now").exists()
    assert "the recognizer was stopped for more than 2 s; a new one takes its place" in caplog.text


def test_a_loop_without_an_end_is_noticed_in_time_and_costs_nothing_else(
    walled: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    pid = walled.pid
    spin(pid)
    assert isinstance(walled.understand(STOP, final=True).decision, Command)
    assert walled.pid != pid
    assert "the recognizer computed without an end for more than 2" in caplog.text


def test_a_loop_in_a_late_step_is_noticed_within_the_limit_of_that_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def for_ever_at_the_last_pace(samples: NDArray[np.float32], speed: float) -> NDArray[np.float32]:
        while speed == commands.PACES[-1]:
            pass
        return audio.at_speed(samples, speed)

    monkeypatch.setattr("edge_asr.inference.at_speed", for_ever_at_the_last_pace)
    monkeypatch.setattr(worker, "STEP_BASE_S", 0.3)
    with closing(Worker(OPTIONS)) as walled:
        heard = walled.understand(said("07-log-scrap.flac"), final=True)
    assert isinstance(heard.decision, Rejection)
    assert heard.decision.detail.startswith("2 times the recognizer computed without an end for more than 0.")


def test_what_sleeps_and_computes_by_turns_and_never_answers_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def for_ever_in_naps(samples: NDArray[np.float32], speed: float) -> NDArray[np.float32]:
        while speed == commands.PACES[-1]:
            time.sleep(0.05)
        return audio.at_speed(samples, speed)

    monkeypatch.setattr("edge_asr.inference.at_speed", for_ever_in_naps)
    monkeypatch.setattr(worker, "LIMIT_S", 2.0)
    with closing(Worker(OPTIONS)) as walled:
        heard = walled.understand(said("07-log-scrap.flac"), final=True)
    assert heard.decision == Rejection("recognizer-failed", "2 times the recognizer hung for more than 2 s")


def test_no_step_of_the_longest_utterance_takes_half_of_what_it_may() -> None:
    options = OPTIONS.model_copy(update={"model": settings.Model(languages=("en", "zh"))})
    direct = engine.Engine.build(options)
    ticks: list[float] = []
    direct.recognizer.step = lambda: ticks.append(time.process_time())
    trial.listen(direct.recognizer, direct.files)
    trial.listen(direct.recognizer, direct.files)
    pace = (time.process_time() - ticks[-1]) / trial.golden_s(direct.files)
    ticks.clear()
    speech = b"".join(read_file(path) for path in sorted(RECORDINGS.glob("[0-9]*.flac")))
    recognition = direct.recognizer.recognize(speech[: round(inference.MAX_UTTERANCE_S) * 32_000])
    assert direct.interpreter is not None
    direct.interpreter.interpret(recognition)
    assert recognition.at_pace is not None
    for pace_ in commands.PACES:
        recognition.at_pace(pace_)
    ticks.append(time.process_time())
    dearest_s = max(after - before for before, after in itertools.pairwise(ticks))
    assert len(ticks) >= 4
    assert dearest_s < worker.step_limit_s(inference.MAX_UTTERANCE_S, pace) / 2


@pytest.mark.parametrize("pace", [0.01, 0.1, 1.0])
def test_however_slow_the_box_a_step_has_a_reserve_of_nearly_two(pace: float) -> None:
    dearest_s = 2.6 * pace * 30  # measured: 30 s of speech, played slower, embedded model (docs/decisions.md)
    assert worker.step_limit_s(30, pace) > 1.9 * dearest_s


def wait_for_work(pid: int, done: threading.Event) -> None:
    enough = cpu_ticks(pid) + 1
    until(lambda: done.is_set() or cpu_ticks(pid) >= enough, "it gets nothing")


def test_a_recognizer_that_gets_a_tenth_of_a_core_is_starved_and_no_loop(
    walled: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "STEP_BASE_S", 0.5)
    monkeypatch.setattr(worker, "STEP_FACTOR", 0.0)
    pid, done = walled.pid, threading.Event()

    def starve() -> None:
        while not done.wait(0.1):
            os.kill(pid, signal.SIGCONT)
            wait_for_work(pid, done)
            os.kill(pid, signal.SIGSTOP)
        os.kill(pid, signal.SIGCONT)

    os.kill(pid, signal.SIGSTOP)
    hunger = threading.Thread(target=starve)
    hunger.start()
    began = time.monotonic()
    heard = walled.understand(dataclasses.replace(STOP, pcm=STOP.pcm * 5), final=True)
    took_s = time.monotonic() - began
    done.set()
    hunger.join()
    assert heard.transcript is not None
    assert took_s > 0.5
    assert walled.replaced == 0


def test_a_box_that_has_become_slow_gets_the_time_that_it_needs_now(
    walled: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    hear = worker._Process.ask  # noqa: SLF001

    def ask(process: worker._Process, request: object, limits: process_state.Limits) -> tuple[object, int]:
        asked.append(limits.work_s)
        return hear(process, request, limits)

    monkeypatch.setattr(worker._Process, "ask", ask)  # noqa: SLF001
    first = walled.facts.golden_cpu_s
    walled._process.facts = dataclasses.replace(walled.facts, golden_cpu_s=first / 1000)  # noqa: SLF001
    walled.prove()
    walled.understand(STOP, final=True)
    assert asked[1] - worker.STEP_BASE_S > 10 * (asked[0] - worker.STEP_BASE_S)


def test_time_in_which_everything_was_frozen_counts_against_no_recognizer(
    walled: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = itertools.count()

    def monotonic() -> float:
        return time.monotonic() + (1000 if next(looks) else 0)

    monkeypatch.setattr(worker, "LOOK_S", 0.001)
    monkeypatch.setattr(process_state, "time", types.SimpleNamespace(monotonic=monotonic))
    monkeypatch.setattr(process_state, "thread_states", lambda _pid: {"S"})
    assert walled.understand(STOP, final=True).transcript is not None
    assert next(looks) > 1
    assert walled.replaced == 0


def test_a_wait_for_a_disk_is_told_from_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, states = itertools.count(step=0.5), {"D", "S"}
    monkeypatch.setattr(process_state, "time", types.SimpleNamespace(monotonic=lambda: next(looks)))
    monkeypatch.setattr(process_state, "thread_states", lambda _pid: states)
    monkeypatch.setattr(process_state, "bytes_read", lambda _pid: 0)
    wait = process_state.Wait(os.getpid())
    for _ in range(10):
        wait.look()
    assert (wait.asleep_s, wait.waited_s) == (0.0, 5.0)
    states.remove("D")
    wait.look()
    assert (wait.asleep_s, wait.waited_s) == (0.5, 5.5)


def test_a_replacement_has_the_time_of_another_model_where_another_was_activated_meanwhile(
    walled: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "LOOK_S", 0.001)
    monkeypatch.setattr(worker, "load_limit_s", lambda _: -1.0)
    monkeypatch.setattr(installation, "chosen", lambda _: "another")
    os.kill(walled.pid, signal.SIGKILL)
    assert walled.understand(STOP, final=True).transcript is not None


def test_a_model_that_tensorrt_meets_for_the_first_time_has_the_time_for_its_engine_and_systemd_is_asked_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(inference, "reachable", lambda _: "tensorrt")
    monkeypatch.setattr(worker, "LIMIT_S", 0.0)
    monkeypatch.setattr(worker, "LOAD_LIMIT_S", 0.0)
    monkeypatch.setattr(worker, "LOOK_S", 0.01)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with closing(Worker(OPTIONS)) as works:
            assert works.replaced == 0
        assert manager.recv(100) == b"EXTEND_TIMEOUT_USEC=30000000"


def test_an_utterance_that_nothing_survives_is_rejected_and_the_next_one_heard(
    walled: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(worker, "LOOK_S", 0.001)
        patch.setattr(worker, "step_limit_s", lambda *_: -1.0)
        heard = walled.understand(STOP, final=True)
    assert heard.decision == Rejection(
        "recognizer-failed", "2 times the recognizer computed without an end for more than -1 s"
    )
    assert heard.utterance is STOP
    assert isinstance(walled.understand(STOP, final=True).decision, Command)


def test_a_worker_that_has_grown_is_replaced_between_two_utterances(
    walled: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "GROWTH_LIMIT_BYTES", -(1 << 40))
    before = walled.pid
    assert isinstance(walled.understand(STOP, final=True).decision, Command)
    assert walled.pid != before


def test_what_a_long_utterance_took_is_given_back_when_nobody_speaks(walled: Worker) -> None:
    murmur = np.random.default_rng(0).normal(0, 1000, 20 * SAMPLE_RATE).astype("<i2").tobytes()
    assert isinstance(walled.understand(STOP, final=True).decision, Command)
    before = resident_bytes(walled.pid)
    walled.understand(Utterance(new_id(), "microphone", 0, murmur, clock.boottime_ns()), final=True)
    assert resident_bytes(walled.pid) > before + (40 << 20)
    walled.ping()
    until(lambda: resident_bytes(walled.pid) < before + (12 << 20), "what it took is not given back")
    assert isinstance(walled.understand(STOP, final=True).decision, Command)


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that whoever loads a model reads: made a pipe, it holds them up, as a dead card would."""
    file = tmp_path / "on-the-card"
    file.touch()

    def read_and_prepare(options: settings.Settings, vocabulary: engine.Vocabulary) -> engine.Engine:
        file.read_bytes()
        return engine.prepare_engine(options, vocabulary)

    monkeypatch.setattr(worker, "prepare_engine", read_and_prepare)
    return file


def make_pipe(path: Path) -> Path:
    path.unlink()
    os.mkfifo(path)
    return path


def test_one_that_hangs_while_it_loads_is_ended_in_time_and_says_so_meanwhile(
    card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker, "LIMIT_S", 2.0)
    with closing(Worker(OPTIONS)) as walled:
        make_pipe(card)
        said_meanwhile = []

        def mend() -> None:
            ended = "while loading the model the recognizer hung for more than 2 s"
            until(lambda: ended in caplog.text, "no end", deadline_s=60)
            said_meanwhile.append(walled.pause)
            (tmp_path / "new").touch()
            (tmp_path / "new").replace(card)

        mender = threading.Thread(target=mend)
        mender.start()
        os.kill(walled.pid, signal.SIGKILL)
        assert walled.understand(STOP, final=True).transcript is not None
        mender.join()
        assert said_meanwhile == ["the recognizer ended by SIGKILL; a new one takes its place"]
        assert walled.pause == ""


def test_one_that_loads_from_a_slow_card_is_waited_for(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "LIMIT_S", 1.2)
    with closing(Worker(OPTIONS)) as walled:
        pipe = make_pipe(card)

        def drip() -> None:
            with pipe.open("w", encoding="utf-8") as slow:
                for _ in range(6):
                    print(file=slow, flush=True)
                    time.sleep(0.3)

        dripper = threading.Thread(target=drip)
        dripper.start()
        os.kill(walled.pid, signal.SIGKILL)
        assert walled.understand(STOP, final=True).transcript is not None
        dripper.join()
        assert walled.replaced == 1


def test_one_that_computes_without_an_end_while_it_loads_is_ended_by_what_loading_took_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def prepare_unless_spoilt(options: settings.Settings, vocabulary: engine.Vocabulary) -> engine.Engine:
        while (tmp_path / "spoilt").exists():
            pass
        return engine.prepare_engine(options, vocabulary)

    monkeypatch.setattr(worker, "prepare_engine", prepare_unless_spoilt)
    monkeypatch.setattr(worker, "STEP_BASE_S", 0.2)
    monkeypatch.setattr(worker, "LOAD_FACTOR", 3.0)
    with closing(Worker(OPTIONS)) as walled:
        (tmp_path / "spoilt").touch()

        def mend() -> None:
            ended = "while loading the model the recognizer computed without an end"
            until(lambda: ended in caplog.text, "no end", deadline_s=60)
            (tmp_path / "spoilt").unlink()

        mender = threading.Thread(target=mend)
        mender.start()
        os.kill(walled.pid, signal.SIGKILL)
        assert walled.understand(STOP, final=True).transcript is not None
        mender.join()


def test_words_over_which_it_computes_without_an_end_are_refused_in_time_and_the_old_ones_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load_unless_endless(options: settings.Hotwords) -> tuple[hotwords.Hotword, ...]:
        while any(each.phrase == "endless" for each in options.phrases):
            pass
        return load(options)

    load = hotwords.load
    monkeypatch.setattr(hotwords, "load", load_unless_endless)
    monkeypatch.setattr(worker, "RETUNE_LIMIT_S", 0.3)
    with closing(Worker(OPTIONS)) as walled:
        endless = OPTIONS.model_copy(update={"hotwords": settings.Hotwords.model_validate({"phrases": ["endless"]})})
        told: list[str] = []
        walled.on_change = lambda: told.append(walled.pause)
        with pytest.raises(WorkerError, match=r"over the new settings the recognizer computed without an end for more"):
            walled.reload(endless)
        assert told[0] == "the recognizer takes over other words and commands"
        assert (told[-1], walled.pause) == ("", "")
        assert walled.understand(STOP, final=True).transcript is not None
        assert walled.replaced == 1


def test_words_and_grammars_that_were_broken_or_lost_since_they_were_read_cost_a_crash_nothing(tmp_path: Path) -> None:
    words, commanded = tmp_path / "words.txt", tmp_path / "site.yaml"
    words.write_text("RCCB\n", encoding="utf-8")
    shutil.copy(model_store.bundled("grammars") / "factory.en.yaml", commanded)
    options = settings.Settings(
        hotwords=settings.Hotwords(file=words), commands=settings.Commands(grammars=(str(commanded),))
    )
    with closing(Worker(options)) as walled:
        before = walled.vocabulary
        words.write_text("RCCB : many\n", encoding="utf-8")
        with pytest.raises(hotwords.HotwordError, match=r"words.txt: line 1"):
            walled.reload(options)
        commanded.unlink()
        os.kill(walled.pid, signal.SIGKILL)
        assert isinstance(walled.understand(STOP, final=True).decision, Command)
        assert walled.vocabulary == before
        assert [each.written for each in before.hotwords] == ["RCCB"]


def test_new_words_for_a_recognizer_that_died_and_was_reaped_are_refused_and_another_is_there(walled: Worker) -> None:
    os.kill(walled.pid, signal.SIGKILL)
    until(lambda: has_ended(walled.pid), "it lives")
    with pytest.raises(ZygoteError):
        walled._zygote.end(0)  # noqa: SLF001 - with any order it reaps what is dead
    with pytest.raises(WorkerError, match="over the new settings the recognizer ended by SIGKILL"):
        walled.reload(OPTIONS)
    assert isinstance(walled.understand(STOP, final=True).decision, Command)


def test_the_golden_recording_is_heard_alike_by_every_worker(walled: Worker) -> None:
    assert walled.facts.golden == "start conveyor three"
    walled.prove()
    os.kill(walled.pid, signal.SIGKILL)
    walled.prove()
    assert walled.replaced == 1


def test_a_model_of_damaged_weights_is_refused_at_the_start_though_its_files_are_as_listed(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_store.bundled("models") / model_store.EMBEDDED, tmp_path / "spoilt"))
    manifest = json.loads((folder / "manifest.json").read_bytes())
    file = folder / model_store.read_manifest(folder / "manifest.json").model_file
    loaded = onnx.load(file)
    for weights in sorted(loaded.graph.initializer, key=lambda each: len(each.raw_data))[-6:]:
        weights.raw_data = weights.raw_data[::-1]
    onnx.save(loaded, file)
    manifest["files"][file.name] = {"sha256": model_store.sha256_of(file), "size": file.stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ModelError, match=r"hears '.*' where 'start conveyor three' is said; import the model again"):
        Worker(settings.Settings(model=settings.Model(name=str(folder))))


def test_a_hotword_in_the_golden_recording_makes_no_recognizer_distrusted(walled: Worker) -> None:
    words = settings.Hotwords.model_validate({"phrases": ["CONVEYOR Three"]})
    walled.reload(OPTIONS.model_copy(update={"hotwords": words}))
    heard = walled.understand(said("golden.flac"), final=False)
    assert heard.transcript is not None
    assert heard.transcript.text == "start CONVEYOR Three"
    walled.prove()
    assert walled.replaced == 0


def test_a_recognizer_that_goes_on_hearing_wrongly_is_no_longer_trusted(walled: Worker) -> None:
    walled._process.facts = dataclasses.replace(walled.facts, golden="stop conveyor three")  # noqa: SLF001
    with pytest.raises(WorkerError, match="hears 'start conveyor three' in the golden recording"):
        walled.prove()


def test_no_descriptor_for_a_new_recognizer_is_one_line_with_its_remedy(walled: Worker) -> None:
    os.kill(walled.pid, signal.SIGKILL)
    until(lambda: has_ended(walled.pid), "it lives")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(WorkerError, match=r"no line to its process \(Too many open files\).* raise LimitNOFILE="):
            walled.understand(STOP, final=True)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_dead_zygote_is_told_instead_of_waited_for(walled: Worker) -> None:
    worker_pid = walled.pid
    os.kill(walled._zygote._pid, signal.SIGKILL)  # noqa: SLF001
    until(lambda: has_ended(worker_pid), "the worker did not die with its zygote")
    with pytest.raises(WorkerError, match="zygote"):
        walled.understand(STOP, final=True)


def test_a_model_that_cannot_be_used_is_refused_here_as_there() -> None:
    with pytest.raises(ModelError, match="micro-fr: no such model"):
        Worker(settings.Settings(model=settings.Model(name="micro-fr")))


def test_other_grammars_are_taken_over_and_broken_ones_change_nothing(walled: Worker, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("language: en\n", encoding="utf-8")
    broken = settings.Settings(commands=settings.Commands(grammars=(str(tmp_path / "broken.yaml"),)))
    with pytest.raises(grammar.GrammarError, match="broken"):
        walled.reload(broken)
    assert isinstance(walled.understand(STOP, final=True).decision, Command)
    walled.reload(settings.Settings(commands=settings.Commands(grammars=())))
    assert walled.understand(STOP, final=True).decision is None
    os.kill(walled.pid, signal.SIGKILL)
    assert walled.understand(STOP, final=True).decision is None  # the next one knows it too


PARENT = """
import os, time
from edge_asr import cli, settings
from edge_asr.worker import Worker
threads = len(os.listdir("/proc/self/task"))
worker = Worker(settings.Settings())
print(threads, worker._zygote._pid, worker.pid, flush=True)
time.sleep(600)
"""


def test_it_is_forked_from_a_process_of_one_thread_and_dies_with_it() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        threads, *family = map(int, parent.stdout.readline().split())
        parent.kill()
    assert threads == 1
    until(lambda: not any(map(alive, family)), "the family is still alive")


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_graph_that_was_optimized_meanwhile_is_used_from_the_next_reload_on(tmp_path: Path) -> None:
    options = OPTIONS.model_copy(update={"state_dir": tmp_path})
    walled = Worker(options)
    try:
        before, facts = walled.pid, walled.facts
        assert facts.graph is None
        record = prepared.prepare(walled.name, options.models_directory)
        walled.reload(options)
        assert walled.pid != before
        assert walled.facts.graph == record
        assert isinstance(walled.understand(STOP, final=True).decision, Command)
        before = walled.pid
        walled.reload(options)
        assert walled.pid == before
    finally:
        walled.close()
