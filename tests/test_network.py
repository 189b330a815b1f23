"""Nothing goes to the network but where it was told to: every verb is typed while the kernel's view of it is kept."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edge_asr.command_line import EXIT_FOUND, EXIT_INTERRUPTED, EXIT_UNAVAILABLE
from tests.broker import Broker
from tests.every_verb import INTERRUPTED_AFTER_S, verbs
from tests.test_cli import ALL_VERBS

WATCHED = (
    "strace",
    "-f",
    "-qq",
    "--seccomp-bpf",
    "-e",
    "trace=connect,sendto,sendmsg,sendmmsg",
    "-e",
    "signal=none",
    "-o",
)

NOT_TYPED = {
    "models pull",  # the one that may
    "service install",  # of the machine itself; they call systemctl and nothing else
    "service uninstall",
}

MAY_END_WITH = {
    "devices": {EXIT_UNAVAILABLE},  # there is no microphone
    "service status": {EXIT_UNAVAILABLE, 0},  # nor a service
    "outbox requeue": {EXIT_FOUND},  # nor a dead letter
    "outbox discard": {EXIT_FOUND},
    **{key: {EXIT_INTERRUPTED, EXIT_FOUND} for key in INTERRUPTED_AFTER_S},
}


def contacted(log: Path) -> set[str]:
    """The addresses to which anything was sent or connected."""
    text = log.read_text(encoding="utf-8", errors="replace")
    return set(re.findall(r'inet_addr\("([^"]+)"\)', text)) | set(re.findall(r'AF_INET6[^}]*?"([^"]+)"', text))


@pytest.mark.timeout(600)  # 16 s of CPU time
def test_no_verb_but_pull_reaches_for_anything_outside_this_machine(tmp_path: Path) -> None:
    assert set(verbs(tmp_path)) | NOT_TYPED == {" ".join(path) for path, _ in ALL_VERBS}
    (tmp_path / "typed").mkdir()
    environment = {**os.environ, "PULSE_SERVER": f"unix:{tmp_path}/nothing", "HOME": str(tmp_path)}
    with Broker(tmp_path) as broker:
        program = [sys.executable, "-m", "tests.every_verb", str(tmp_path / "typed"), str(broker.port)]
        done = subprocess.run(
            [*WATCHED, str(tmp_path / "strace"), *program],
            check=False,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    assert {verb: code for verb, code in codes.items() if code not in MAY_END_WITH.get(verb, {0})} == {}, done.stderr
    reached = contacted(tmp_path / "strace")
    assert "127.0.0.1" in reached  # the broker, so somebody watched
    assert {address for address in reached if not ipaddress.ip_address(address).is_loopback} == set()
