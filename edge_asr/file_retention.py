"""Deletes files of what was said when their days are over: recordings, and the audit log's.

Law: nothing goes early. An age is, as in ``retention``, for how long the box was seen to run since it last saw the file
change: boots are added up, the time between them counts as nothing. The wall clock is not asked, nor are the times that
it gave the files: a step of it, or one that was never set, neither deletes nor keeps a file.

What was seen is kept beside the files. If that is lost their days begin again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_asr import clock
from edge_asr.whole_file import replace_file

log = logging.getLogger(__name__)

LOOK_S: Final = 3600.0
"""Between two looks: so much longer than its days a file may stay."""

AGES: Final = ".ages.json"

SEALED: Final = ".sealed"
"""What ``recorder`` calls its files; it is 9 MB of cryptography, entered by nobody who only counts their days."""

_DAY_S: Final = 86_400


@dataclass(frozen=True, slots=True)
class _Seen:
    """A file at the last look."""

    size: int
    age_s: float


@dataclass(frozen=True, slots=True)
class FileRetention:
    """What one folder may keep."""

    folder: Path
    pattern: str
    days: float
    spare_newest: bool = False
    """The last by name stays: somebody goes on with it."""

    def drop_outdated(self) -> int:
        """Note that the box runs, then delete what is too old; how many. Raises OSError."""
        files = sorted(self.folder.glob(self.pattern))
        if not files:
            return 0
        since_s, known = self._read()
        seen = {}
        for path in files:
            size, before = path.stat().st_size, known.get(path.name)
            seen[path.name] = _Seen(size, before.age_s + since_s if before and before.size == size else 0.0)
        old = [
            path for path in files[: -1 if self.spare_newest else None] if seen[path.name].age_s > self.days * _DAY_S
        ]
        for path in old:
            path.unlink(missing_ok=True)
            del seen[path.name]
        self._write(seen)
        return len(old)

    def _read(self) -> tuple[float, dict[str, _Seen]]:
        """For how long the box ran since the last look, as far as that is known, and what it saw."""
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            kept = json.loads((self.folder / AGES).read_bytes())
            files = {name: _Seen(int(size), float(age_s)) for name, (size, age_s) in kept["files"].items()}
            same_boot = kept["boot_id"] == clock.boot_id()
            return (clock.boottime_ns() - int(kept["at_ns"] if same_boot else 0)) / clock.NS_PER_S, files
        return 0.0, {}

    def _write(self, seen: dict[str, _Seen]) -> None:
        files = {name: (each.size, int(each.age_s)) for name, each in seen.items()}
        kept = {"boot_id": clock.boot_id(), "at_ns": clock.boottime_ns(), "files": files}
        replace_file(self.folder / AGES, json.dumps(kept))


class Tidier:
    """Looks at the start and every hour, in a thread of its own: nobody waits for a disk that does not answer."""

    def __init__(self, kept: Sequence[FileRetention]) -> None:
        self._kept = kept
        self._closed = threading.Event()
        threading.Thread(target=self._work, name="tidier", daemon=True).start()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def _work(self) -> None:
        told = ""
        while True:
            for each in self._kept:
                try:
                    each.drop_outdated()
                except OSError as error:
                    trouble = f"{each.folder}: what is too old cannot be deleted ({error.strerror}); check the disk"
                    if trouble != told:
                        log.warning(trouble)
                    told = trouble
            if self._closed.wait(LOOK_S):
                return
