"""The Debian package, installed, upgraded, removed and purged by apt on a clean Debian with a systemd of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import edge_asr
from tests.sysbox import CHECKOUT, ENVIRONMENT, Sysbox, booted_debian, skip_where_containers_are_forbidden
from tests.test_systemd import speak

SETTINGS = """
device: box
sources: [{type: files, paths: [/etc/edge-asr/order.wav, /etc/edge-asr/order.wav]}, {type: microphone}]
commands: {grammars: [factory.en], min_confidence: 0.3}
mqtt: {host: 127.0.0.1}
"""

MMDEBSTRAP = (
    *("mmdebstrap", "--quiet", "--mode=root", "--variant=apt", "--include=systemd-sysv,mosquitto,mosquitto-clients"),
    # Nobody switches the machine off meanwhile; waiting for the disk at each of 6,000 files would be most of the test.
    *("--dpkgopt=force-unsafe-io", "--skip=cleanup/apt/lists"),
)
LINE = ("mosquitto_sub", "-h", "127.0.0.1", "-i", "line", "-c", "-q", "1", "-t", "voice/box/evt/+")
"""A consumer whose session the broker keeps."""


APT = ("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--quiet", "--yes", "--no-install-recommends")
INSTALL = (*APT, "install", "--allow-downgrades")

NEXT = f"{edge_asr.__version__}+next"


def build(folder: Path, *options: str) -> Path:
    """A package for Debian 12."""
    command = [str(CHECKOUT / "tools/deb"), *options, str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=500)
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
        "/usr/share/edge-asr/settings.yaml",
        "/usr/bin/edge-asr",
        "/opt/edge-asr/.venv/bin/edge-asr",
        "/usr/share/doc/edge-asr/copyright",
    ):
        assert path in held
    assert any(path.endswith("bundled/models/micro-en/model.int8.onnx") for path in held)
    assert {entry.split()[1] for entry in held.values()} == {"root/root"}
    assert [path for path, entry in held.items() if entry[0] != "l" and entry[8] == "w"] == []
    assert not [path for path in held if path.startswith("/etc/")]  # what a person changes is never asked about
    fields = subprocess.run(["dpkg-deb", "--field", package], check=True, capture_output=True, text=True).stdout
    assert f"Architecture: {arch}\n" in fields
    assert "@" not in fields.replace("maintainers@", "")


@pytest.mark.parametrize("script", ["postinst", "prerm", "postrm"])
def test_the_maintainer_scripts_are_sound_shell(script: str) -> None:
    subprocess.run(["sh", "-n", CHECKOUT / "packaging/debian" / script], check=True)


def next_version(package: Path, folder: Path) -> Path:
    """The package as a later release would be: another version number, another example of settings."""
    tree = folder / "next"
    subprocess.run(["dpkg-deb", "--raw-extract", package, tree], check=True)
    (package_init,) = tree.glob("opt/edge-asr/.venv/lib/python*/site-packages/edge_asr/__init__.py")
    for path in (tree / "DEBIAN/control", package_init):
        text = path.read_text(encoding="utf-8")
        assert edge_asr.__version__ in text
        path.write_text(text.replace(edge_asr.__version__, NEXT), encoding="utf-8")
    with (tree / "usr/share/edge-asr/settings.yaml").open("a", encoding="utf-8") as example:
        example.write("# what is new in it\n")
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", "-Znone", tree, folder / "next.deb"], check=True)
    shutil.rmtree(tree)
    return folder / "next.deb"


def one_that_fails(folder: Path) -> Path:
    """A later release that cannot be unpacked, as on a full disk."""
    control = folder / "fails/DEBIAN"
    control.mkdir(parents=True)
    fields = {
        "Package": "edge-asr",
        "Version": f"{NEXT}2",
        "Architecture": "all",
        "Maintainer": "x",
        "Description": "x",
    }
    (control / "control").write_text("".join(f"{key}: {value}\n" for key, value in fields.items()), encoding="ascii")
    (control / "preinst").write_text("#!/bin/sh\nexit 1\n", encoding="ascii")
    (control / "preinst").chmod(0o755)
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", control.parent, folder / "fails.deb"], check=True)
    return folder / "fails.deb"


def byte_code(box: Sysbox) -> int:
    """How many modules have some."""
    return len(box.run("find", "/opt/edge-asr", "-name", "*.pyc").splitlines())


@pytest.fixture(scope="module")
def arm64(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """`tools/arm --short` and what it says, under way beside other tests: a minute, most of it the emulator's."""
    skip_where_containers_are_forbidden()
    said = tmp_path_factory.mktemp("arm64") / "said"
    command = [str(CHECKOUT / "tools/arm"), "--short"]
    with (
        said.open("wb") as out,
        subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True) as running,
    ):
        yield running, said
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGTERM)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sysbox]:
    """A Debian 12 of the essential packages, systemd and a broker; nothing of it is the host's."""
    skip_where_containers_are_forbidden()
    folder = tmp_path_factory.mktemp("package")
    root = folder / "root"
    with subprocess.Popen([*MMDEBSTRAP, "bookworm", root]) as making:
        package = build(folder)
        later, broken = next_version(package, folder), one_that_fails(folder)
    assert making.returncode == 0
    for each, name in ((package, "edge-asr.deb"), (later, "next.deb"), (broken, "fails.deb")):
        shutil.move(each, root / "opt" / name)
    # The machine has no network: what the package depends on, as apt finds it, is fetched before it boots.
    subprocess.run(["chroot", root, *INSTALL, "--download-only", "/opt/edge-asr.deb"], check=True, env=ENVIRONMENT)
    with booted_debian(root) as box:
        box.run(*LINE, "-E")
        box.run("systemctl", "stop", "mosquitto")
        yield box


def outbox(box: Sysbox) -> dict[str, Any]:
    status = box.run("env", "STATE_DIRECTORY=/var/lib/edge-asr", "edge-asr", "outbox", "status", "--json")
    found: dict[str, Any] = json.loads(status)
    return found


def doctor(box: Sysbox) -> list[dict[str, str]]:
    """What `edge-asr check` finds; exit code 1 where something is not well."""
    said = box.run("edge-asr", "check", "--settings", "/etc/edge-asr/settings.yaml", "--json", check=False)
    return [json.loads(line) for line in said.splitlines()]


OUTBOX = "/var/lib/private/edge-asr/outbox.db"


def schema(box: Sysbox, version: int) -> int:
    """Let another version of the program have written the outbox; the version that it was."""
    change = "import sqlite3, sys; box = sqlite3.connect(sys.argv[1]); print(*box.execute('PRAGMA user_version')); "
    change += f"box.execute('PRAGMA user_version = {version}'); box.close()"
    return int(re.sub(r"\D", "", box.run("/opt/edge-asr/.venv/bin/python", "-c", change, OUTBOX)))


def take_back(machine: Sysbox, sent: int) -> None:
    """Install the older one again: it goes on with the outbox, unless that is of a schema that it does not know."""
    machine.run(*INSTALL, "/opt/edge-asr.deb", limit_s=300)
    assert machine.run("edge-asr", "--version") == f"edge-asr, version {edge_asr.__version__}\n"
    assert machine.show("edge-asr", "ActiveState") == "active"
    assert machine.run("cat", "/etc/edge-asr/settings.yaml") == SETTINGS
    assert outbox(machine)["last_seq"] >= sent
    machine.run("systemctl", "stop", "edge-asr")
    known = schema(machine, 99)
    before = machine.run("sha256sum", OUTBOX)
    machine.run("systemctl", "start", "--no-block", "edge-asr")
    refusal = "written by a newer edge-asr (schema 99, this one knows"
    machine.wait_for("the refusal", lambda: refusal in machine.run("journalctl", "--output=cat", "-u", "edge-asr"), 60)
    machine.wait_for("its exit code", lambda: machine.show("edge-asr", "ExecMainStatus") == "74")
    machine.run("systemctl", "stop", "edge-asr")
    assert machine.run("sha256sum", OUTBOX) == before
    assert schema(machine, known) == 99
    machine.run("systemctl", "start", "edge-asr")
    assert outbox(machine)["last_seq"] >= sent


@pytest.mark.usefixtures("arm64")  # which goes on meanwhile
@pytest.mark.timeout(600)  # builds 360 MB, installs them three times
def test_installed_it_runs_upgraded_and_taken_back_it_keeps_settings_and_outbox_purged_it_leaves_nothing(
    machine: Sysbox,
) -> None:
    assert "python" not in machine.run("dpkg-query", "--show")
    machine.run(*INSTALL, "/opt/edge-asr.deb", limit_s=300)
    assert machine.show("edge-asr", "ActiveState") == "active"
    assert machine.run("systemctl", "is-enabled", "edge-asr").strip() == "enabled"
    assert machine.run("edge-asr", "--version") == f"edge-asr, version {edge_asr.__version__}\n"
    example = (CHECKOUT / "examples/settings.yaml").read_text(encoding="utf-8")
    assert machine.run("cat", "/etc/edge-asr/settings.yaml") == example

    compiled, running = byte_code(machine), machine.show("edge-asr", "MainPID")
    assert "new edge-asr package pre-installation script" in machine.run(
        "sh", "-c", "dpkg --install /opt/fails.deb 2>&1 || true"
    )
    assert compiled > 1000
    assert (byte_code(machine), machine.show("edge-asr", "MainPID")) == (compiled, running)
    machine.run("/var/lib/dpkg/info/edge-asr.prerm", "remove")
    assert machine.show("edge-asr", "ActiveState") == "inactive", machine.journal()
    machine.run("/var/lib/dpkg/info/edge-asr.postinst", "abort-remove")  # as dpkg does where a removal cannot go on
    assert machine.show("edge-asr", "ActiveState") == "active"
    assert byte_code(machine) == compiled

    machine.write("/etc/edge-asr/settings.yaml", SETTINGS)
    speak("stop line two", machine.root / "etc/edge-asr/order.wav")
    machine.run("systemctl", "restart", "edge-asr")
    machine.wait_for("two commands in the outbox", lambda: outbox(machine)["waiting"]["command"] == 2)

    before = machine.show("edge-asr", "MainPID")
    machine.run("systemctl", "disable", "edge-asr")
    machine.run("rm", "/etc/edge-asr/order.wav")
    waiting = outbox(machine)["last_seq"]
    machine.run(*INSTALL, "/opt/next.deb", limit_s=300)
    assert machine.run("edge-asr", "--version") == f"edge-asr, version {NEXT}\n"
    assert machine.show("edge-asr", "ActiveState") == "active"
    assert machine.show("edge-asr", "MainPID") != before
    assert machine.run("systemctl", "is-enabled", "edge-asr", check=False).strip() == "disabled"
    assert machine.run("cat", "/etc/edge-asr/settings.yaml") == SETTINGS

    assert sum(outbox(machine)["waiting"].values()) >= waiting
    machine.run("systemctl", "start", "mosquitto")
    assert {each["subject"]: each["found"] for each in doctor(machine) if each["state"] == "failed"} == {
        "files": "/etc/edge-asr/order.wav is not there",
        "source microphone": "no microphone found; plug one in, see `edge-asr devices`, or use --demo",
    }
    machine.wait_for("an empty outbox", lambda: sum(outbox(machine)["waiting"].values()) == 0, 60)
    sent = outbox(machine)["last_seq"]
    delivered = machine.run(*LINE, "-C", str(sent), "-W", "30").splitlines()
    seqs = [json.loads(payload)["data"]["seq"] for payload in delivered]
    assert [seq for seq in seqs if seq <= waiting] == list(range(1, waiting + 1))
    assert len(set(seqs)) == sent

    take_back(machine, sent)

    machine.run(*APT, "remove", "edge-asr")
    assert machine.show("edge-asr", "ActiveState") == "inactive"
    assert machine.run("ls", "/var/lib/private/edge-asr/outbox.db")
    machine.run(*APT, "purge", "edge-asr")
    for path in ("/var/lib/private/edge-asr", "/etc/edge-asr", "/opt/edge-asr", "/lib/systemd/system/edge-asr.service"):
        assert not machine.run("sh", "-c", f"ls -d {path} 2>/dev/null || true").strip()


@pytest.mark.timeout(1200)
def test_the_arm64_package_installs_where_only_its_dependencies_are_and_hears_what_this_machine_hears(
    arm64: tuple[subprocess.Popen[bytes], Path],
) -> None:
    running, file = arm64
    failed, said = running.wait(), file.read_text(encoding="utf-8")
    if "starts no arm64 programs" in said:
        pytest.skip(said.splitlines()[-1])  # a kernel before 6.7, where nobody has told it how
    assert not failed, said
    assert f"edge-asr {edge_asr.__version__} arm64: install ok installed\n" in said
    assert "1 and 1 utterances, 0 different" in said
