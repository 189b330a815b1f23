"""Decides what may come out of an archive: plain files under plain names, no more bytes than a model can have.

Law: nothing of tarfile's or zipfile's own extraction is used, whose filters have been got around more than once
(python/cpython#135034). Every member is looked at; one that is no plain file or points out of the archive spoils the
whole of it. Bytes are counted as they come out of the decompressor, whatever the headers say.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Final, Protocol

MAX_TOTAL_BYTES: Final = 4 * 1024**3
"""Of everything in an archive, what is left out included; the largest SenseVoice (fp32) has 0.9 GB."""

MAX_MEMBERS: Final = 1000
MAX_READ_BYTES: Final = 1 << 20
"""At a time: tarfile reads a member's extended header in one piece, and its size is whatever the archive claims."""

_UNUSABLE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError)
"""What the standard library raises about a damaged archive."""


class ArchiveError(Exception):
    """An archive may not or cannot be unpacked; the message names it and why."""


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def unpack(archive: Path, target: Path, wanted: Callable[[str], bool], room_bytes: int) -> list[str]:
    """Write the files ``wanted`` by name into the folder ``target`` and return their names; raises ArchiveError.

    Names count without the folder that archives usually wrap around everything; what lies deeper is left out. No more
    than ``room_bytes`` are written.
    """
    unpacked: list[str] = []
    try:
        with _members(archive) as members:
            for path, stream in members:
                name = _name(archive, path)
                if name is None or not wanted(name):
                    continue
                if name in unpacked:
                    raise ArchiveError(f"{archive}: holds two files named {name}; pack it again")
                room_bytes -= _write(stream, target / name, room_bytes)
                unpacked.append(name)
    except _UNUSABLE as error:
        reason = getattr(error, "strerror", None) or str(error) or "it ends too early"
        raise ArchiveError(f"{archive}: cannot be unpacked ({reason}); copy it again") from None
    return unpacked


@contextlib.contextmanager
def _members(archive: Path) -> Iterator[Iterator[tuple[str, _Readable]]]:
    """(path, stream) of every plain file, folders stepped over; raises ArchiveError at anything else."""
    with archive.open("rb") as file:
        magic = file.read(4)
        file.seek(0)
        if magic == b"PK\x03\x04":
            yield _zip_members(archive, file)
        else:
            plain: IO[bytes] | gzip.GzipFile = file
            if magic[:3] == b"BZh":
                plain = bz2.BZ2File(file)
            elif magic[:2] == b"\x1f\x8b":
                plain = gzip.GzipFile(fileobj=file)
            elif magic == b"\xfd7zX":  # its decompressor takes as much memory as the archive asks for
                raise ArchiveError(f"{archive}: is packed with xz; pack it as .tar.gz, .tar.bz2 or .zip")
            yield _tar_members(archive, plain)


def _tar_members(archive: Path, plain: IO[bytes] | gzip.GzipFile) -> Iterator[tuple[str, _Readable]]:
    with tarfile.open(fileobj=_Counted(archive, plain), mode="r:") as tar:  # type: ignore[call-overload]
        for count, member in enumerate(tar, 1):
            _check_count(archive, count)
            if member.isdir():
                _parts(archive, member.name)
            elif not member.isreg() or member.issparse():
                raise ArchiveError(f"{archive}: {member.name!r} is a link or a device; models are plain files")
            else:
                stream = tar.extractfile(member)
                assert stream is not None  # noqa: S101 - it is a plain file
                yield member.name, stream


def _zip_members(archive: Path, file: IO[bytes]) -> Iterator[tuple[str, _Readable]]:
    with zipfile.ZipFile(file) as packed:
        left = MAX_TOTAL_BYTES
        for count, member in enumerate(packed.infolist(), 1):
            _check_count(archive, count)
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in {0, stat.S_IFREG, stat.S_IFDIR}:
                raise ArchiveError(f"{archive}: {member.filename!r} is a link or a device; models are plain files")
            if member.is_dir():
                _parts(archive, member.filename)
                continue
            if member.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED} or member.flag_bits & 1:
                raise ArchiveError(f"{archive}: {member.filename!r} is encrypted or packed unusually; pack it again")
            with packed.open(member) as stream:
                counted = _Counted(archive, stream, left)
                yield member.filename, counted
                left -= counted.taken


class _Counted:
    """A stream that gives out no more than an archive may hold, and no more at once than a header may claim."""

    def __init__(self, archive: Path, stream: IO[bytes] | gzip.GzipFile, limit: int = MAX_TOTAL_BYTES) -> None:
        self._archive = archive
        self._stream = stream
        self._limit = limit
        self.taken = 0

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        if not 0 <= size <= MAX_READ_BYTES:
            raise ArchiveError(f"{self._archive}: has a header of {size} bytes; it is no archive of a model")
        data = self._stream.read(size)
        self._count(len(data))
        return data

    def seek(self, position: int) -> int:
        """Go forward, as tarfile does to step over a member."""
        while self.taken < position and self.read(min(MAX_READ_BYTES, position - self.taken)):
            pass
        return self.taken

    def tell(self) -> int:
        """Bytes given out."""
        return self.taken

    def _count(self, size: int) -> None:
        self.taken += size
        if self.taken > self._limit:
            raise ArchiveError(f"{self._archive}: holds more than {MAX_TOTAL_BYTES >> 30} GiB; it is no model")


def _check_count(archive: Path, count: int) -> None:
    if count > MAX_MEMBERS:
        raise ArchiveError(f"{archive}: holds more than {MAX_MEMBERS} files; it is no archive of a model")


def _parts(archive: Path, path: str) -> list[str]:
    """A member's path in pieces; raises ArchiveError where it leads out of the archive."""
    if path.startswith("/") or "\\" in path or "\0" in path or ".." in path.split("/"):
        raise ArchiveError(f"{archive}: {path!r} points out of the archive; do not use it")
    return [part for part in path.split("/") if part not in {"", "."}]


def _name(archive: Path, path: str) -> str | None:
    """The name of a file at the top or in a folder at the top; None: deeper."""
    parts = _parts(archive, path)
    return parts[-1] if 1 <= len(parts) <= 2 else None


def _write(stream: _Readable, path: Path, room_bytes: int) -> int:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    with os.fdopen(descriptor, "wb") as file:
        while block := stream.read(MAX_READ_BYTES):
            if file.tell() + len(block) > room_bytes:
                raise ArchiveError(f"{path.name}: {room_bytes >> 20} MiB of room are not enough; free space first")
            file.write(block)
        return file.tell()
