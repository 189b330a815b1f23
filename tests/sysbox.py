"""A throw-away machine: real systemd as PID 1 of a container that shares at most a read-only /usr with the host.

Its root is an ordinary scratch folder, its network a loopback of its own. Systemd is never pointed at the host's root:
at boot it would empty /tmp there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
INSTALLED = "/opt/edge-asr"
"""Where systemd/edge-asr.service expects the program."""

PYTHON = f"{INSTALLED}/.venv/bin/python"

ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin", "SYSTEMD_COLORS": "0"}


@dataclass(frozen=True, slots=True)
class Sysbox:
    """A booted machine with the checkout installed under /opt/edge-asr."""

    root: Path
    """The machine's / as the host sees it; /run and /tmp are visible from inside only."""
    pid_1: int

    def run(self, *command: str, check: bool = True, limit_s: float = 60) -> str:
        """Standard output of a command run inside; its exit code must be 0 unless ``check`` is off."""
        done = subprocess.run(
            self.inside(*command), check=False, capture_output=True, text=True, env=ENVIRONMENT, timeout=limit_s
        )
        if check and done.returncode != 0:
            pytest.fail(f"{' '.join(command)} exited {done.returncode}:\n{done.stdout}{done.stderr}{self.journal()}")
        return done.stdout

    def inside(self, *command: str) -> list[str]:
        """What to start outside for a command to run inside."""
        namespaces = ("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup")
        return ["nsenter", "--target", str(self.pid_1), *namespaces, "--", *command]

    def write(self, path: str, content: str, mode: int = 0o644) -> None:
        """Make a file inside, readable by everybody."""
        file = self.root / path.lstrip("/")
        for folder in reversed(file.parents):
            folder.mkdir(mode=0o755, exist_ok=True)
        file.write_text(content, encoding="utf-8")
        file.chmod(mode)

    def start(self, unit: str, content: str) -> None:
        """Install a unit and start it; returns once systemd calls it active."""
        self.write(f"/etc/systemd/system/{unit}", content)
        self.run("systemctl", "daemon-reload")
        self.run("systemctl", "start", unit)

    def show(self, unit: str, field: str) -> str:
        """One property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={field}", unit).strip()

    def journal(self) -> str:
        """The last lines of the machine's journal."""
        return self.run("journalctl", "--no-pager", "--lines=40", "--output=short", check=False)

    def wait_for(self, what: str, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        """Return once the condition holds; it is a look into the machine, so it can only be asked for repeatedly."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"not within {timeout_s} s: {what}\n{self.journal()}")
            time.sleep(0.05)


NEWER = "EDGE_ASR_TEST_USR"
"""A folder whose files lie over /usr in the machine: the unpacked packages of a newer systemd (docs/operations.md)."""


@contextlib.contextmanager
def booted(folder: Path) -> Iterator[Sysbox]:
    """Boot a machine with the checkout and the host's /usr in ``folder`` (empty), and power it off in the end."""
    skip_where_containers_are_forbidden()
    root = folder / "root"
    _furnish(root)
    _install_program(root / INSTALLED.lstrip("/"))
    newer = os.environ.get(NEWER)
    usr = f"--overlay=/usr:{newer}:{folder}/usr:/usr" if newer else "--bind-ro=/usr"
    (folder / "usr").mkdir(mode=0o755)
    with _booted(root, [usr, *(f"--bind-ro={bind}" for bind in _program())]) as machine:
        machine.run("ldconfig")  # how Python is found by its programs, and PortAudio by Python
        yield machine


@contextlib.contextmanager
def booted_debian(root: Path) -> Iterator[Sysbox]:
    """Boot a Debian that shares nothing with the host (``mmdebstrap`` has made it), and power it off in the end."""
    _prepare_boot(root)
    with _booted(root, []) as machine:
        yield machine


@contextlib.contextmanager
def _booted(root: Path, mounts: list[str]) -> Iterator[Sysbox]:
    console = root.with_name("console.log")
    with console.open("wb") as output:
        nspawn = subprocess.Popen(
            _nspawn(root, mounts), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield Sysbox(root, _wait_until_running(nspawn, console))
    finally:
        nspawn.send_signal(signal.SIGTERM)
        try:
            nspawn.wait(15)
        except subprocess.TimeoutExpired:
            nspawn.kill()
            nspawn.wait()


def skip_where_containers_are_forbidden() -> None:
    """To be called by a test that needs root and namespaces."""
    if os.geteuid() != 0:
        pytest.skip("a system container needs root")
    namespaces = ["unshare", "--mount", "--pid", "--net", "--fork", "true"]
    refusal = subprocess.run(namespaces, check=False, capture_output=True, text=True).stderr
    if refusal:
        pytest.skip(f"this kernel or sandbox forbids containers: {refusal.strip()}")


def _furnish(root: Path) -> None:
    """What /usr does not bring: mount points and the merged-/usr links."""
    root.mkdir(mode=0o755)
    for name in ("etc", "usr", "var", "run", "proc", "sys", "dev", "tmp", "root", "opt"):
        (root / name).mkdir(mode=0o755)
    for name in ("bin", "sbin", "lib", "lib64"):
        if Path("/usr", name).exists():
            (root / name).symlink_to(f"usr/{name}")
    shutil.copy("/etc/os-release", root / "etc/os-release")
    (root / "etc/ld.so.conf").write_text(f"{_base_prefix_inside()}/lib\n", encoding="utf-8")
    (root / "etc/systemd/system").mkdir(parents=True)
    (root / "var/log").mkdir()
    _prepare_boot(root)


def _prepare_boot(root: Path) -> None:
    """A machine id (none means first boot), no graphics, a journal that is kept."""
    (root / "etc/machine-id").write_text(uuid.uuid4().hex + "\n", encoding="ascii")
    (root / "etc/systemd/system/default.target").symlink_to("/usr/lib/systemd/system/multi-user.target")
    (root / "var/log/journal").mkdir(exist_ok=True)


def _install_program(folder: Path) -> None:
    """A virtual environment whose parts are this test run's own, at places that a service's user may read."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / ".venv/lib" / version / "site-packages"
    packages.mkdir(parents=True)
    (packages / "mounted.pth").write_text(f"{INSTALLED}/packages\n{INSTALLED}/checkout\n", encoding="utf-8")
    scripts = folder / ".venv/bin"
    scripts.mkdir()
    (scripts / "python").symlink_to(f"{_base_prefix_inside()}/bin/{version}")
    (folder / ".venv/pyvenv.cfg").write_text(f"home = {_base_prefix_inside()}/bin\n", encoding="utf-8")
    command = scripts / "edge-asr"
    command.write_text(f"#!{PYTHON}\nfrom edge_asr.cli import main\n\nmain()\n", encoding="utf-8")
    command.chmod(0o755)


def _base_prefix_inside() -> str:
    return sys.base_prefix if Path(sys.base_prefix).is_relative_to("/usr") else "/opt/python"


def _program() -> list[str]:
    """What of the host a machine's program consists of."""
    binds = [f"{sysconfig.get_path('purelib')}:{INSTALLED}/packages"]
    binds += [
        f"{CHECKOUT / part}:{INSTALLED}/checkout/{part}"
        for part in ("edge_asr", "models", "systemd", "examples", "tools")
    ]
    if _base_prefix_inside() != sys.base_prefix:
        binds.append(f"{sys.base_prefix}:{_base_prefix_inside()}")
    return binds


def _nspawn(root: Path, mounts: list[str]) -> list[str]:
    return [
        # The kernel ends the machine with the test run, even when that is killed.
        *("setpriv", "--pdeathsig", "KILL"),
        *("systemd-nspawn", "--quiet", f"--directory={root}", f"--machine=sysbox-{uuid.uuid4().hex[:8]}", "--boot"),
        *("--private-network", "--register=no", "--keep-unit", "--console=pipe", "--link-journal=no"),
        *("--resolv-conf=off", "--timezone=off"),
        *mounts,
    ]


def _wait_until_running(nspawn: subprocess.Popen[bytes], console: Path) -> int:
    deadline = time.monotonic() + 30
    children = Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children")
    while time.monotonic() < deadline and nspawn.poll() is None:
        for pid in children.read_text(encoding="ascii").split():
            system = Sysbox(Path(), int(pid))
            if system.run("systemctl", "is-system-running", check=False).strip() in {"running", "degraded"}:
                return int(pid)
        time.sleep(0.05)
    pytest.fail(f"the container did not boot:\n{console.read_text(errors='replace')}")
