"""What is held back beside the outbox's file: the numbers given out, in its lock file, and space for deleting."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Final

from edge_asr import outbox_file

BALLAST_BYTES: Final = 4 * 1024 * 1024
"""Disk space held back for deleting: on a full disk SQLite can neither checkpoint nor delete without some."""

SEQ_BLOCK: Final = 1000
"""Sequence numbers reserved at a time in the lock file, so that a lost database cannot make them start again."""

_LINE_BYTES: Final = 21


class Mark:
    """The lock file: held for as long as the outbox is open.

    Its first line is the highest sequence number in reserve, its second the highest of which it is known that it was
    committed: a log that ends at a spoilt byte reads like one that was never longer, and only this tells.
    """

    def __init__(self, path: Path) -> None:
        """Raises BlockingIOError where another process has it."""
        self._file = os.open(outbox_file.beside(path, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise
        text = os.pread(self._file, 2 * _LINE_BYTES, 0)
        reserved, self.committed = (
            int(line) if line.strip().isdigit() else 0 for line in (text[:_LINE_BYTES], text[_LINE_BYTES:])
        )
        self.value = max(reserved, self.committed)
        if not text.strip():
            self._write(0)  # on a disk that fills up later, the file has its size already

    def reserve(self, seq: int) -> None:
        """Make sure that ``seq`` is remembered as used, whatever becomes of the database."""
        if seq > self.value:
            value = seq - 1 + SEQ_BLOCK
            self._write(value)
            self.value = value

    def note(self, seq: int) -> None:
        """Remember that ``seq`` is committed; not synced, so after a power cut it may be less, but never more."""
        with contextlib.suppress(OSError):  # it comes after the commit and must not look like its failure
            os.pwrite(self._file, b"%20d\n" % seq, _LINE_BYTES)
        self.committed = seq

    def _write(self, value: int) -> None:
        os.pwrite(self._file, b"%20d\n" % value, 0)
        os.fdatasync(self._file)

    def close(self) -> None:
        """Let others have it."""
        os.close(self._file)


class Ballast:
    """A file that is there to be deleted."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size
        self.missing = not path.exists()

    def release(self) -> None:
        """Give the space to whoever needs it."""
        self._path.unlink(missing_ok=True)
        self.missing = True

    def needed(self) -> bool:
        """Whether the disk is so full that this may be what SQLite complains about."""
        return not self.missing and self._free_bytes() < self._size

    def _free_bytes(self) -> int:
        space = os.statvfs(self._path.parent)
        return space.f_bavail * space.f_frsize

    def restore(self) -> bool:
        """Occupy the space again if there is plenty."""
        if not self.missing or self._free_bytes() < 2 * self._size:
            return False
        try:
            with self._path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self._size)
        except OSError:  # somebody else was quicker; there will be another time
            self._path.unlink(missing_ok=True)
            return False
        self.missing = False
        return True
