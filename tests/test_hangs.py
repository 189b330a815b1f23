"""Parts of a real daemon that stand still or hear wrongly while nobody speaks: noticed, told, and put right in time."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_asr import model_store
from edge_asr.watchdog import EXIT_HUNG
from tests.broker import PATIENCE_S, Broker, Subscriber, free_port, wait_until
from tests.test_daemon import (
    COMMAND,
    recognizer_of,
    running,
    write_settings,
    zygote_of,
)
from tests.test_monitoring import get
from tests.test_worker import cpu_ticks, doze, spin

SOONER = """
from edge_asr import cli, watchdog
watchdog.GOLDEN_INTERVAL_S = 0.5
cli.main()
"""
"""A daemon that proves its recognizer all the time, where the product waits for five minutes."""

OFTEN_ASKED = SOONER.replace("GOLDEN_INTERVAL_S", "PING_INTERVAL_S")
"""One that asks it whether it is there all the time, where the product waits for four seconds."""


def signalled(number: signal.Signals) -> Callable[[int], None]:
    return lambda pid: os.kill(pid, number)


IN_SILENCE = (
    (doze, "hung for more than 4 s"),  # from its next word on: until somebody asks, it looks as if it waited
    (spin, "computed without an end for more than 2 s"),
    (signalled(signal.SIGSTOP), "was stopped for more than 4 s"),
    (signalled(signal.SIGKILL), "ended by SIGKILL"),
)


def test_what_hangs_stands_still_or_dies_while_nobody_speaks_is_noticed_before_anybody_does(
    tmp_path: Path, broker: Broker
) -> None:
    port = free_port()
    path = write_settings(tmp_path, broker.port, monitoring={"port": port})
    with Subscriber(broker) as subscriber, running(path, program=("-c", OFTEN_ASKED)) as box:
        box.wait_for_log("listening to")
        for harm, cause in IN_SILENCE:
            harm(recognizer_of(box))
            box.wait_for_log(f"the recognizer {cause}; a new one takes its place")
            wait_until(lambda: get(port, "/readyz")[0] == 200, "it hears")
        box.say(COMMAND)
        subscriber.wait_for(lambda m: any(x.topic.endswith("evt/command") for x in m), "the command")
        assert box.log.count("a new one takes its place") == len(IN_SILENCE)
        os.kill(zygote_of(box), signal.SIGSTOP)  # for which only a restart is a cure
        assert box.process.wait(PATIENCE_S) == EXIT_HUNG == 70
        assert "no process can be had or ended: the zygote was stopped for more than 4 s" in box.log


def writable(pid: int) -> Iterator[range]:
    """Where a process may write."""
    for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines():
        place, rights = line.split()[:2]
        if rights.startswith("rw"):
            yield range(*(int(end, 16) for end in place.split("-")))


def damage(pid: int, word: str, other: str) -> None:
    """Let a process find another word wherever its memory holds this one, as a broken chip would."""
    right, wrong = (each.encode("utf-16-le") for each in (word, other))  # as Python keeps what is beyond Latin-1
    assert len(right) == len(wrong)
    found = 0
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        for area in writable(pid):
            memory.seek(area.start)
            for match in re.finditer(re.escape(right), memory.read(len(area))):
                memory.seek(area.start + match.start())
                memory.write(wrong)
                found += 1
    assert found


def test_a_recognizer_whose_memory_goes_bad_is_replaced_and_one_whose_disk_is_bad_too_ends_the_daemon(
    tmp_path: Path, broker: Broker
) -> None:
    folder = Path(shutil.copytree(model_store.bundled("models") / model_store.EMBEDDED, tmp_path / "model"))
    port = free_port()
    path = write_settings(tmp_path, broker.port, model={"name": str(folder)}, monitoring={"port": port})
    with Subscriber(broker) as subscriber, running(path, program=("-c", SOONER)) as box:
        box.wait_for_log("listening to")
        damage(recognizer_of(box), "\u2581three", "\u2581seven")
        box.wait_for_log("does not hear the golden recording rightly any more; a new one takes its place")
        wait_until(lambda: get(port, "/readyz")[0] == 200, "it hears")
        box.say(COMMAND.with_name("01-start-line-three.flac"))
        subscriber.wait_for(lambda m: any(x.topic.endswith("evt/pending") for x in m), "the command")
        assert "three" in subscriber.on("evt/transcript")[0].data["text"]
        with (folder / "tokens.txt").open("ab") as file:
            file.write(b"what a bad card has made of it")
        damage(recognizer_of(box), "\u2581three", "\u2581seven")
        assert box.process.wait(PATIENCE_S) == EXIT_HUNG
        assert box.log.count("does not hear the golden recording rightly any more") == 2
        assert re.search("no new recognizer: .*tokens.txt", box.log)


@contextlib.contextmanager
def freezer() -> Iterator[Path]:
    """A control group of our own, which the kernel freezes as `docker pause` lets it."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    group = next((Path(mount[1], f"frozen-{os.getpid()}") for mount in mounts if mount[2] == "cgroup2"), None)
    try:
        assert group is not None
        group.mkdir()
    except (AssertionError, OSError) as error:
        pytest.skip(f"this kernel or sandbox lets nobody make a control group: {error}")
    try:
        yield group
    finally:
        (group / "cgroup.kill").write_text("1", encoding="ascii")
        wait_until(lambda: "populated 0" in (group / "cgroup.events").read_text(encoding="ascii"), "they are gone")
        group.rmdir()


LESS_PATIENT = """
from edge_asr import cli, worker
worker.LIMIT_S, worker.STEP_BASE_S = 3.0, 0.5
cli.main()
"""


def test_a_container_that_was_paused_in_mid_sentence_has_hung_nowhere(tmp_path: Path, broker: Broker) -> None:
    path = write_settings(tmp_path, broker.port)
    with Subscriber(broker) as subscriber, freezer() as group, running(path, program=("-c", LESS_PATIENT)) as box:
        box.wait_for_log("listening to")
        busy = recognizer_of(box)
        for pid in (box.process.pid, zygote_of(box), busy):
            (group / "cgroup.procs").write_text(str(pid), encoding="ascii")
        spin(busy)
        idle_ticks = cpu_ticks(busy)
        box.say(COMMAND)
        wait_until(lambda: cpu_ticks(busy) > idle_ticks + 10, "it computes")
        (group / "cgroup.freeze").write_text("1", encoding="ascii")
        frozen_s = time.monotonic()
        wait_until(lambda: time.monotonic() > frozen_s + 4.5, "more than anybody waits")
        (group / "cgroup.freeze").write_text("0", encoding="ascii")
        subscriber.wait_for(lambda m: any(x.topic.endswith("evt/transcript") for x in m), "what was said")
        assert re.findall("the recognizer (.*) for more than .*; a new one takes its place", box.log) == [
            "computed without an end"
        ]
        assert box.process.poll() is None


def test_a_hang_that_no_systemd_watches_ends_with_exit_code_70_and_every_threads_stack(tmp_path: Path) -> None:
    path = write_settings(tmp_path, free_port())
    with running(path, NOTIFY_SOCKET="", WATCHDOG_USEC="") as box:
        box.wait_for_log("listening to")
        doze(zygote_of(box))  # of which nobody wants anything
        assert box.process.wait(3 * PATIENCE_S) == EXIT_HUNG
    assert "no process can be had or ended: the zygote hung for more than 4 s" in box.log
    assert "(most recent call first)" in box.log


DEADLOCKED = """
import os, threading
from edge_asr import cli, process_state, watchdog, worker
watchdog.STILL_LIMIT_S, watchdog.PING_INTERVAL_S = 2.0, 0.5
def deadlock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
class Wait(process_state.Wait):
    def look(self):
        if os.path.exists({flag!r}):
            deadlock()
        super().look()
worker.Wait = Wait
cli.main()
"""
"""A daemon whose threads deadlock when they next look at the recognizer, once there is a file that says so."""


def test_a_thread_that_waits_for_the_recognizer_and_deadlocks_ends_the_daemon_with_its_stack(tmp_path: Path) -> None:
    flag, path = tmp_path / "deadlock", write_settings(tmp_path, free_port())
    with running(path, program=("-c", DEADLOCKED.format(flag=str(flag))), NOTIFY_SOCKET="", WATCHDOG_USEC="") as box:
        box.wait_for_log("listening to")
        flag.touch()
        os.kill(recognizer_of(box), signal.SIGSTOP)  # so that whoever asks has to look
        assert box.process.wait(PATIENCE_S) == EXIT_HUNG
    assert re.search(r"the thread that waits for the recognizer has stood still for \d s; starting again", box.log)
    assert re.search(r'line \d+ in deadlock\n.* in look\n.*worker.py"', box.log)


def lives(port: int) -> bool:
    """Whether the daemon says so of itself."""
    with contextlib.suppress(ConnectionRefusedError):
        return get(port, "/livez") == (200, "ok\n")
    return False


def test_a_hang_that_systemd_watches_is_triggered_and_told_to_whoever_asks_until_systemd_acts(tmp_path: Path) -> None:
    port, said = free_port(), b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(3 * PATIENCE_S)
        path = write_settings(tmp_path, free_port(), monitoring={"port": port})
        watched = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "10000000"}
        with running(path, **watched) as box:
            box.wait_for_log("listening to")
            wait_until(lambda: lives(port), "it answers")
            spin(zygote_of(box))
            while b"WATCHDOG=trigger" not in said:
                said += manager.recv(4096) + b"\n"
            cause = "no process can be had or ended: the zygote computed without an end for more than 2 s"
            assert get(port, "/livez") == (503, f"{cause}\n")
            assert f"STATUS=Starting again: {cause}".encode() in said
            assert box.process.poll() is None  # it is systemd that ends it
