"""Decides what makes a systemd service of this installation: the unit, the drop-ins that fit the machine, the settings.

Law: what an administrator has written stays. Settings are copied only where there are none, a drop-in is only added,
and only one that is still as it was added is taken away; state (the outbox, imported models) is deleted only when that
is asked for. What is written is whole after a power cut. Nothing here runs in the daemon.
"""

from __future__ import annotations

import contextlib
import grp
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from edge_asr.settings import Settings
from edge_asr.whole_file import replace_file

UNIT: Final = "edge-asr.service"
UNITS: Final = Path("/etc/systemd/system")
SETTINGS: Final = Path("/etc/edge-asr/settings.yaml")
STATE_DIRECTORY: Final = Path("/var/lib/edge-asr")
STATE: Final = (Path("/var/lib/private/edge-asr"), STATE_DIRECTORY, SETTINGS.parent)
PACKAGED: Final = Path("/lib/systemd/system") / UNIT
"""Where the Debian package puts it."""

CREDENTIALS: Final = Path("/run/credentials") / UNIT
"""Where systemd puts what it hands over by LoadCredential=, while the service runs."""

_EXAMPLE: Final = ".conf.example"
_HIDDEN: Final = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 - ProtectHome= and PrivateTmp=
_CREDENTIAL: Final = re.compile(r"(?m)^LoadCredential(?:Encrypted)?=([^:\s]*)(?::(\S+))?")

_SHOWN: Final = (
    *("ActiveState", "SubState", "StatusText", "Result", "NRestarts", "ActiveEnterTimestamp", "UnitFileState"),
    *("MemoryCurrent", "NFileDescriptorStore", "WatchdogUSec", "FragmentPath", "DropInPaths"),
)


class ServiceError(Exception):
    """The service cannot be set up; the message says why and what to do. Exit code 69."""


@dataclass(frozen=True, slots=True)
class ServiceUser:
    """As whom the service meets files. Root may read everything, so what root sees says nothing about that."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    credentials: Mapping[str, Path]
    """Name -> the file that systemd reads, as root, to hand it over under this name."""
    writable: tuple[Path, ...]
    """Beside its state (ReadWritePaths=); everything else is read-only to it, whatever its mode."""

    def source(self, file: Path) -> Path | None:
        """The file behind one that the settings name: itself but for a credential. None: nobody hands that over."""
        return self.credentials.get(file.name) if file.parent == CREDENTIALS else file

    def may(self, how: Literal["-r", "-w"], path: Path) -> bool:
        """Whether the kernel would let it read or write; credentials are not asked for here."""
        real, state = path.resolve(), STATE_DIRECTORY.resolve()
        if any(real.is_relative_to(folder) for folder in _HIDDEN):
            return False
        # Nobody but root gets through /var/lib/private; the service has what is its own there mounted for it.
        own = real.is_relative_to(state)
        if how == "-w" and not own and not any(real.is_relative_to(folder) for folder in self.writable):
            return False
        asked = ["test", how, str(real.relative_to(state) if own else real)]
        found = subprocess.run(
            asked, check=False, cwd=state if own else "/", user=self.uid, group=self.gid, extra_groups=self.groups
        )
        return found.returncode == 0


def user_of(options: Settings) -> ServiceUser | None:
    """Who runs the service with these settings, where root asks. None: whoever asks runs them, or no service has."""
    if os.geteuid() != 0 or options.state_directory != STATE_DIRECTORY or not STATE_DIRECTORY.is_dir():
        return None
    owner = STATE_DIRECTORY.stat()  # systemd gives it to whomever the service runs as
    try:
        unit = systemctl("cat", UNIT)
    except ServiceError:
        return None
    if owner.st_uid == 0:
        return None
    known = {group.gr_name: group.gr_gid for group in grp.getgrall()}
    return ServiceUser(
        owner.st_uid,
        owner.st_gid,
        groups=tuple(known[name] for name in _words(unit, "SupplementaryGroups") if name in known),
        credentials={name: Path(path) for name, path in _CREDENTIAL.findall(unit) if path},
        writable=tuple(Path(path.lstrip("-+")) for path in _words(unit, "ReadWritePaths")),
    )


def _words(unit: str, key: str) -> list[str]:
    """Of every line of a unit and its drop-ins that sets a list."""
    return " ".join(re.findall(rf"(?m)^{key}=(.*)", unit)).split()


def shipped() -> Path:
    """The folder of the unit and its drop-ins: inside an installed wheel, else in the checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "bundled" / "systemd"
    return installed if installed.is_dir() else package.parent / "systemd"


def drop_ins() -> tuple[str, ...]:
    """Names of the drop-ins that may be asked for."""
    return tuple(sorted(path.name.removesuffix(_EXAMPLE) for path in (shipped() / f"{UNIT}.d").glob(f"*{_EXAMPLE}")))


def install(wanted: Sequence[str]) -> list[Path]:
    """Write unit, drop-ins and settings, enable and start; the files that were written. Raises ServiceError."""
    command = Path(sys.executable).absolute().with_name("edge-asr")
    _refuse(command)
    unit = (shipped() / UNIT).read_text(encoding="utf-8")
    unit = re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={command}", unit)
    files = {UNITS / UNIT: unit}
    for name in sorted({*wanted, *_fitting()}):
        path = UNITS / f"{UNIT}.d" / f"{name}.conf"
        if not path.exists():
            files[path] = _drop_in(name)
    if not SETTINGS.exists():
        files[SETTINGS] = (
            "# Defaults; every key is in examples/settings.yaml. `edge-asr check --settings` looks through it.\n{}\n"
        )
    os.umask(0o022)  # an administrator's own may be stricter, and the service is another user
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text)
    systemctl("daemon-reload")
    systemctl("enable", "--quiet", UNIT)
    systemctl("restart", UNIT)
    return list(files)


def uninstall(*, purge: bool) -> list[Path]:
    """Stop and remove what :func:`install` wrote; with ``purge`` settings and state too. Raises ServiceError.

    Where the Debian package came later its unit was in the shadow of ours; that one, its drop-ins and the state stay.
    """
    packaged = PACKAGED.exists()
    if packaged and (purge or not (UNITS / UNIT).exists()):
        _refuse_packaged()
    with contextlib.suppress(ServiceError):  # it may be half there
        systemctl("disable", "--quiet", "--now", UNIT)
    unchanged = [] if packaged else _unchanged_drop_ins()
    gone = [path for path in (UNITS / UNIT, *unchanged, *(STATE if purge else ())) if path.exists()]
    for path in gone:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    with contextlib.suppress(OSError):  # an administrator's are in it, or it is not there
        (UNITS / f"{UNIT}.d").rmdir()
    systemctl("daemon-reload")
    if packaged:
        systemctl("enable", "--quiet", "--now", UNIT)
    return gone


def _unchanged_drop_ins() -> list[Path]:
    """Those that are as :func:`install` writes them."""
    places = {name: UNITS / f"{UNIT}.d" / f"{name}.conf" for name in drop_ins()}
    return [path for name, path in places.items() if path.is_file() and path.read_bytes() == _drop_in(name).encode()]


def _drop_in(name: str) -> str:
    return (shipped() / f"{UNIT}.d" / f"{name}{_EXAMPLE}").read_text(encoding="utf-8")


def status() -> dict[str, str]:
    """What systemd knows of the service, and how exposed it is. Raises ServiceError."""
    lines = systemctl("show", UNIT, f"--property=LoadState,{','.join(_SHOWN)}").splitlines()
    found = dict(line.partition("=")[::2] for line in lines)
    if found.get("LoadState") == "not-found" or not found.get("FragmentPath"):
        raise ServiceError(f"{UNIT} is not installed; `edge-asr service install` does it")
    exposure = subprocess.run(
        ["systemd-analyze", "security", "--no-pager", UNIT], check=False, capture_output=True, text=True
    ).stdout
    score = re.search(r"exposure level for .*?: ([0-9.]+)", exposure)
    return {**{name: found.get(name, "") for name in _SHOWN}, "Exposure": score[1] if score else ""}


def seen_by_administrator(options: Settings) -> Settings:
    """The settings as whoever looks at the box means them: root, who names no state, means the service's."""
    if options.state_dir is not None or "STATE_DIRECTORY" in os.environ or os.geteuid() != 0:
        return options
    return options.model_copy(update={"state_dir": STATE_DIRECTORY}) if STATE_DIRECTORY.is_dir() else options


def is_elsewhere(state: Path) -> bool:
    """Whether there is a service's state, and this is another."""
    return os.path.lexists(STATE_DIRECTORY) and state.absolute() != STATE_DIRECTORY


def runs(pid: int) -> bool:
    """Whether a process is the service's, as the kernel groups them."""
    try:
        return any(UNIT in line.split("/") for line in Path(f"/proc/{pid}/cgroup").read_text("ascii").splitlines())
    except OSError:
        return False


def systemctl(*arguments: str) -> str:
    """What systemctl prints. Raises ServiceError with what it complains of."""
    if not Path("/run/systemd/system").is_dir():
        raise ServiceError("this machine was not started by systemd; see docs/operations.md for containers")
    done = subprocess.run(["systemctl", *arguments], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise ServiceError(f"systemctl {arguments[0]}: {reason[0]}; see `journalctl -u {UNIT}`")
    return done.stdout


def _refuse(command: Path) -> None:
    """Whatever would make a service that cannot start."""
    if os.geteuid() != 0:
        raise ServiceError("only root may install a service; type `sudo edge-asr service install`")
    _refuse_packaged()
    for folder in _HIDDEN:
        if command.is_relative_to(folder) or command.resolve().is_relative_to(folder):
            raise ServiceError(f"{command}: the service's user cannot see {folder}; install edge-asr under /opt")
    if not command.exists():
        raise ServiceError(f"{command}: is not there; install edge-asr with pip or the Debian package")


def _refuse_packaged() -> None:
    if PACKAGED.exists():
        raise ServiceError("the Debian package has made the service; use apt and `systemctl edit edge-asr`")


def _fitting() -> list[str]:
    """Drop-ins that this machine wants by itself."""
    version = re.match(r"systemd (\d+)", systemctl("--version"))
    return ["notify-reload"] if version and int(version[1]) >= 253 else []
