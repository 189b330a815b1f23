"""The Debian package, installed, upgraded, removed and purged by dpkg on a machine with a systemd of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sysbox import CHECKOUT, Sysbox, booted
from tests.test_systemd import speak

SETTINGS = """
device: box
sources: [{type: files, paths: [/etc/edge-asr/order.wav]}, {type: microphone}]
commands: {grammars: [factory.en], min_confidence: 0.3}
"""


def build(folder: Path, *options: str) -> Path:
    """A package for this very distribution."""
    ask = ["/usr/bin/python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    version = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    done = subprocess.run(
        [CHECKOUT / "tools/deb", *options, folder],
        check=False,
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "PYTHON_VERSION": version},
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def contents(package: Path) -> dict[str, str]:
    """Path -> mode and owner."""
    listing = subprocess.run(["dpkg-deb", "--contents", package], check=True, capture_output=True, text=True).stdout
    lines = [line.split(maxsplit=5) for line in listing.splitlines()]
    return {line[5].split(" -> ")[0][1:]: f"{line[0]} {line[1]}" for line in lines}


@pytest.mark.parametrize("arch", ["amd64", "arm64"])
def test_a_package_holds_what_it_must_and_nothing_that_anybody_may_change(arch: str, tmp_path: Path) -> None:
    package = build(tmp_path, "--arch", arch, "--without-wheels")
    held = contents(package)
    assert package.name.endswith(f"_{arch}.deb")
    for path in (
        "/lib/systemd/system/edge-asr.service",
        "/etc/edge-asr/settings.yaml",
        "/usr/bin/edge-asr",
        "/opt/edge-asr/.venv/bin/edge-asr",
        "/usr/share/doc/edge-asr/copyright",
    ):
        assert path in held
    assert any(path.endswith("bundled/models/micro-en/model.int8.onnx") for path in held)
    assert {entry.split()[1] for entry in held.values()} == {"root/root"}
    assert [path for path, entry in held.items() if entry[0] != "l" and entry[8] == "w"] == []
    fields = subprocess.run(["dpkg-deb", "--field", package], check=True, capture_output=True, text=True).stdout
    assert f"Architecture: {arch}\n" in fields
    assert "@" not in fields.replace("maintainers@", "")


@pytest.mark.parametrize("script", ["postinst", "prerm", "postrm"])
def test_the_maintainer_scripts_are_sound_shell(script: str) -> None:
    subprocess.run(["sh", "-n", CHECKOUT / "packaging/debian" / script], check=True)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sysbox]:
    folder = tmp_path_factory.mktemp("package")
    package = build(folder)
    with contextlib.ExitStack() as stack:
        (folder / "machine").mkdir()
        box = stack.enter_context(booted(folder / "machine", bare=True))
        shutil.copy(package, box.root / "opt/edge-asr.deb")
        yield box


def commands_waiting(box: Sysbox) -> int:
    status = box.run("env", "STATE_DIRECTORY=/var/lib/edge-asr", "edge-asr", "outbox", "status", "--json")
    return int(json.loads(status)["waiting"].get("command", 0))


@pytest.mark.timeout(300)  # builds and installs 360 MB
def test_installed_it_runs_upgraded_it_keeps_the_outbox_purged_it_leaves_nothing(machine: Sysbox) -> None:
    machine.run("rm", "-f", "/usr/sbin/policy-rc.d")  # the host's: it lets no package start anything
    machine.run("dpkg", "--install", "/opt/edge-asr.deb")
    assert machine.show("edge-asr", "ActiveState") == "active"
    assert machine.run("systemctl", "is-enabled", "edge-asr").strip() == "enabled"
    assert machine.run("edge-asr", "--version").startswith("edge-asr")

    machine.write("/etc/edge-asr/settings.yaml", SETTINGS)
    speak("stop line two", machine.root / "etc/edge-asr/order.wav")
    machine.run("systemctl", "restart", "edge-asr")
    machine.wait_for("a command in the outbox", lambda: commands_waiting(machine) == 1)

    before = machine.show("edge-asr", "MainPID")
    machine.run("systemctl", "disable", "edge-asr")
    machine.run("rm", "/etc/edge-asr/order.wav")
    machine.run("dpkg", "--install", "/opt/edge-asr.deb")  # the same version again takes an upgrade's way
    assert machine.show("edge-asr", "ActiveState") == "active"
    assert machine.show("edge-asr", "MainPID") != before
    assert machine.run("systemctl", "is-enabled", "edge-asr", check=False).strip() == "disabled"
    assert "device: box" in machine.run("cat", "/etc/edge-asr/settings.yaml")
    assert commands_waiting(machine) == 1

    machine.run("dpkg", "--remove", "edge-asr")
    assert machine.show("edge-asr", "ActiveState") == "inactive"
    assert machine.run("ls", "/var/lib/private/edge-asr/outbox.db")
    machine.run("dpkg", "--purge", "edge-asr")
    for path in ("/var/lib/private/edge-asr", "/etc/edge-asr", "/opt/edge-asr", "/lib/systemd/system/edge-asr.service"):
        assert not machine.run("sh", "-c", f"ls -d {path} 2>/dev/null || true").strip()
