"""The service as systemd sees it: the notification protocol, the unit's hardening, and the real daemon under PID 1."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_asr import systemd
from tests.sysbox import CHECKOUT, PYTHON, Sysbox, booted

UNIT = CHECKOUT / "systemd/edge-asr.service"


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The receiving end of the protocol, on a socket file or on an abstract address."""
    address = str(tmp_path / "notify") if request.param == "path" else f"@edge-asr-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(address.replace("@", "\0"))
        receiver.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        yield receiver


def test_each_state_is_one_datagram_of_assignments(manager: socket.socket) -> None:
    assert systemd.ready("listening")
    assert manager.recv(4096) == b"READY=1\nSTATUS=listening"
    assert systemd.status("2 waiting")
    assert manager.recv(4096) == b"STATUS=2 waiting"
    assert systemd.alive()
    assert manager.recv(4096) == b"WATCHDOG=1"
    assert systemd.stopping("bye")
    assert manager.recv(4096) == b"STOPPING=1\nSTATUS=bye"


def test_a_reload_carries_the_monotonic_time_in_microseconds(manager: socket.socket) -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    assert systemd.reloading()
    state, stamp = manager.recv(4096).decode().split("\n")
    assert state == "RELOADING=1"
    name, microseconds = stamp.split("=")
    assert name == "MONOTONIC_USEC"
    assert before // 1000 <= int(microseconds) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_a_status_of_several_lines_cannot_smuggle_in_an_assignment(manager: socket.socket) -> None:
    assert systemd.status("device gone\nREADY=1")
    assert manager.recv(4096) == b"STATUS=device gone READY=1"


def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not systemd.ready("listening")


def test_a_service_manager_that_went_away_is_logged_and_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    with caplog.at_level(logging.WARNING):
        assert not systemd.alive()
    assert "systemd did not take WATCHDOG=1" in caplog.text


@pytest.mark.parametrize(
    ("variables", "interval_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "10000000"}, 5.0),
        ({"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": str(os.getpid())}, 5.0),
        ({"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_fed_at_half_its_time_out_by_the_watched_process_only(
    variables: dict[str, str], interval_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert systemd.watchdog_interval_s() == interval_s


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sysbox]:
    with booted(tmp_path_factory.mktemp("sysbox")) as machine:
        yield machine


# A daemon reduced to its notifications; a file tells it to fall silent.
NOTIFIER = """
import signal, sys, time
from pathlib import Path
sys.path.insert(0, "/opt/edge-asr/checkout")
from edge_asr import systemd

def reload(*_):
    systemd.reloading()
    systemd.ready("reloaded")

signal.signal(signal.SIGHUP, reload)
interval = systemd.watchdog_interval_s()
assert interval == 0.25, interval
systemd.ready("started")
while not Path("/etc/silence").exists():
    systemd.alive()
    time.sleep(interval)
systemd.status("silent")
signal.pause()
"""


def test_systemd_understands_every_state(box: Sysbox) -> None:
    box.write("/opt/notifier.py", NOTIFIER)
    service = f"Type=notify\nWatchdogSec=0.5\nExecStart={PYTHON} /opt/notifier.py\nExecReload=kill -HUP $MAINPID\n"
    box.start("notifier.service", f"[Service]\n{service}")
    assert box.show("notifier", "StatusText") == "started"
    box.run("systemctl", "reload", "notifier")
    box.wait_for("the reload's status", lambda: box.show("notifier", "StatusText") == "reloaded")
    assert box.show("notifier", "ActiveState") == "active"
    box.write("/etc/silence", "")
    box.wait_for("the watchdog", lambda: box.show("notifier", "Result") == "watchdog")


def test_the_exposure_that_systemd_computes_is_at_most_1_5() -> None:
    score = ["systemd-analyze", "security", "--offline=yes", "--threshold=15", "--no-pager", str(UNIT)]
    done = subprocess.run(score, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_systemd_finds_nothing_to_complain_about_in_the_unit(box: Sysbox) -> None:
    box.write("/etc/systemd/system/edge-asr.service", UNIT.read_text(encoding="utf-8"))
    for example in sorted((UNIT.parent / "edge-asr.service.d").glob("*.conf.example")):
        if example.name != "notify-reload.conf.example":  # for systemd 253 and newer
            name = f"/etc/systemd/system/edge-asr.service.d/{example.stem}"
            box.write(name, example.read_text(encoding="utf-8"))
    box.run("systemd-analyze", "verify", "--recursive-errors=yes", "edge-asr.service")
