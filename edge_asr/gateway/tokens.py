"""Who may come in: bearer tokens per station, kept as SHA-256 in one file, made and revoked by the command line.

Law: a token is 256 random bits, so its plain hash tells nothing and needs no salt; the token itself is shown once, when
it is made, and never stored or logged. The file is read again whenever it changes: a revocation holds at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from edge_asr import clock
from edge_asr.gateway import GatewayError

Role = Literal["talk", "watch"]
"""talk: open sessions and see their own results; watch: see the dashboard, texts of all stations included."""

ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Station:
    """Whom a token admits."""

    name: str
    """Becomes the source in every payload."""
    role: Role
    sha256: str
    created: str


LOCAL = Station("local", "talk", "", "")
"""Whoever is on this machine, where the gateway is open to it without a token."""


class Tokens:
    """The file of tokens."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int] | None = None
        self._stations: dict[str, Station] = {}

    def admit(self, token: str) -> Station | None:
        """The station that a token names; None: there is none."""
        self._refresh()
        return self._stations.get(_digest(token))

    def holds(self, station: Station) -> bool:
        """Whether a station that was admitted before still is one."""
        self._refresh()
        return station.sha256 in self._stations

    def names_of_others(self, station: Station) -> set[str]:
        """Names that belong to tokens other than this station's."""
        self._refresh()
        return {each.name for each in self._stations.values() if each.sha256 != station.sha256}

    def stations(self) -> list[Station]:
        """All of them in the order of their making. Raises GatewayError."""
        return list(self._read().values())

    def add(self, name: str, role: Role) -> str:
        """Make a station's token and return it. Raises GatewayError, and ValueError on a name no topic could carry."""
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
            raise ValueError(f"{name!r} may hold only A-Z a-z 0-9 _ - (at most 64): it becomes a source's name")
        stations = self._read()
        if any(station.name == name for station in stations.values()):
            raise GatewayError(f"{name} has a token already; revoke it first, or choose another name")
        token = secrets.token_urlsafe(32)
        station = Station(name, role, _digest(token), clock.iso(clock.wall_ns()))
        self._write([*stations.values(), station])
        return token

    def revoke(self, name: str) -> None:
        """Forget a station. Raises GatewayError."""
        stations = self.stations()
        kept = [station for station in stations if station.name != name]
        if len(kept) == len(stations):
            known = ", ".join(station.name for station in stations) or "none"
            raise GatewayError(f"{name} has no token; there are: {known}")
        self._write(kept)

    def _refresh(self) -> None:
        try:
            status = self.path.stat()
        except OSError:
            self._seen, self._stations = None, {}
            return
        if self._seen != (status.st_mtime_ns, status.st_ino):
            try:
                self._stations = self._read()
            except GatewayError:
                self._stations = {}  # nobody comes in by a file that cannot be read
            self._seen = (status.st_mtime_ns, status.st_ino)

    def _read(self) -> dict[str, Station]:
        """SHA-256 -> station."""
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8"))
            stations = [Station(**entry) for entry in entries]
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise GatewayError(f"{self.path}: cannot be read ({error.strerror}); check its permissions") from None
        except (ValueError, TypeError):
            raise GatewayError(f"{self.path}: is damaged; remove it and make the tokens again") from None
        return {station.sha256: station for station in stations}

    def _write(self, stations: list[Station]) -> None:
        entries = [dataclasses.asdict(station) for station in stations]
        try:
            write_private(self.path, json.dumps(entries, indent=1) + "\n")
        except OSError as error:
            raise GatewayError(
                f"{self.path}: cannot be written ({error.strerror}); run as the service's user"
            ) from None


def write_private(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace a file in one step; it belongs to whom its folder belongs to, for root may write it for the service."""
    path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    owner = path.parent.parent.stat() if path.parent.stat().st_uid == 0 else path.parent.stat()
    fresh = path.with_name(f".{path.name}.new")
    with contextlib.suppress(FileNotFoundError):
        fresh.unlink()
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    if os.geteuid() == 0:
        os.chown(path.parent, owner.st_uid, owner.st_gid)
        os.chown(fresh, owner.st_uid, owner.st_gid)
    fresh.replace(path)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()
