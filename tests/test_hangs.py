"""Parts of a real daemon that stand still or hear wrongly while nobody speaks: noticed, told, and put right in time."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

from edge_asr import model_store
from edge_asr.watchdog import EXIT_HUNG
from tests.broker import PATIENCE_S, Broker, Subscriber, free_port, wait_until
from tests.soundcard import sound_card
from tests.test_daemon import (
    COMMAND,
    Box,
    capture_of,
    captures,
    recognizer_of,
    running,
    write_settings,
    zygote_of,
)
from tests.test_monitoring import get
from tests.test_worker import spin

SOONER = """
from edge_asr import capture, cli, watchdog, zygote
capture.LIMIT_S = zygote.LIMIT_S = 2.0
watchdog.GOLDEN_INTERVAL_S = 0.5
cli.main()
"""
"""A daemon that waits for seconds where the product waits for up to five minutes."""


def test_what_is_stopped_or_dies_while_nobody_speaks_is_noticed_before_anybody_does(
    tmp_path: Path, broker: Broker
) -> None:
    port = free_port()
    path = write_settings(tmp_path, broker.port, monitoring={"port": port})
    with Subscriber(broker) as subscriber, running(path) as box:
        box.wait_for_log("listening to")
        for number, cause in ((signal.SIGSTOP, "was stopped"), (signal.SIGKILL, "ended by SIGKILL")):
            os.kill(recognizer_of(box), number)
            box.wait_for_log(f"the recognizer {cause}; a new one takes its place")
            wait_until(lambda: get(port, "/readyz")[0] == 200, "it hears")
        box.say(COMMAND)
        subscriber.wait_for(lambda m: any(x.topic.endswith("evt/command") for x in m), "the command")
        assert box.log.count("a new one takes its place") == 2
        os.kill(zygote_of(box), signal.SIGSTOP)  # for which only a restart is a cure
        assert box.process.wait(PATIENCE_S) == EXIT_HUNG == 70
        assert "no recognizer: the zygote was stopped or killed" in box.log


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


def hang(box: Box) -> None:
    """Let a sound driver hang in the kernel, and with it whoever has to wait for its end."""
    wait_until(functools.partial(captures, box, 1), "the microphone is open")
    spin(zygote_of(box))
    os.kill(capture_of(box), signal.SIGSTOP)


CAUSE = "no process can be had or ended: the zygote does not answer (timed out)"


def test_a_hang_that_no_systemd_watches_ends_with_exit_code_70_and_every_threads_stack(tmp_path: Path) -> None:
    with sound_card() as card:
        path = write_settings(tmp_path, free_port(), sources=[{"type": "microphone"}])
        nobody = {"NOTIFY_SOCKET": "", "WATCHDOG_USEC": ""}
        with running(path, program=("-c", SOONER), **nobody, **card.environment) as box:
            hang(box)
            assert box.process.wait(3 * PATIENCE_S) == EXIT_HUNG
    assert CAUSE in box.log
    assert "(most recent call first)" in box.log


def test_a_hang_that_systemd_watches_is_triggered_and_told_to_whoever_asks_until_systemd_acts(tmp_path: Path) -> None:
    port, said = free_port(), b""
    with sound_card() as card, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(3 * PATIENCE_S)
        path = write_settings(tmp_path, free_port(), sources=[{"type": "microphone"}], monitoring={"port": port})
        watched = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "10000000"}
        with running(path, program=("-c", SOONER), **watched, **card.environment) as box:
            box.wait_for_log("capturing from")
            assert get(port, "/livez") == (200, "ok\n")
            hang(box)
            while b"WATCHDOG=trigger" not in said:
                said += manager.recv(4096) + b"\n"
            assert get(port, "/livez") == (503, f"{CAUSE}\n")
            assert f"STATUS=Starting again: {CAUSE}".encode() in said
            assert box.process.poll() is None  # it is systemd that ends it
