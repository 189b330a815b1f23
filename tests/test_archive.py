"""What may come out of an archive."""

from __future__ import annotations

import contextlib
import gzip
import io
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_asr import archive
from edge_asr.archive import ArchiveError, unpack

ROOM = 1 << 20


def tar(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo, mode: str = "w:bz2") -> Path:
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                file.addfile(info, io.BytesIO(member[1]))
    return path


def packed(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


def odd(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def refusal(path: Path, room: int = ROOM) -> str:
    target = path.parent / "target"
    target.mkdir(exist_ok=True)
    with pytest.raises(ArchiveError) as caught:
        unpack(path, target, lambda _: True, room)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2"])
def test_files_at_the_top_or_in_one_folder_come_out_and_deeper_ones_stay(tmp_path: Path, mode: str) -> None:
    files = [("m/model.onnx", b"m" * 3000), ("./m/tokens.txt", b"t"), ("m/wavs/a.wav", b"w"), ("README.md", b"r")]
    path = tar(tmp_path / "a", *files, mode=mode)
    (tmp_path / "out").mkdir()
    names = unpack(path, tmp_path / "out", lambda name: not name.startswith("READ"), ROOM)
    assert names == ["model.onnx", "tokens.txt"]
    assert {entry.name: entry.read_bytes() for entry in (tmp_path / "out").iterdir()} == {
        "model.onnx": b"m" * 3000,
        "tokens.txt": b"t",
    }


def test_a_zip_comes_out_alike(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.zip", ("m/", b""), ("m/model.onnx", b"m" * 3000), ("m/wavs/a.wav", b"w"))
    (tmp_path / "out").mkdir()
    assert unpack(path, tmp_path / "out", lambda _: True, ROOM) == ["model.onnx"]
    assert (tmp_path / "out/model.onnx").read_bytes() == b"m" * 3000


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "m/../../evil", "m\\..\\evil", ".."])
@pytest.mark.parametrize("pack", [tar, packed])
def test_a_path_that_leads_out_spoils_the_archive(tmp_path: Path, name: str, pack: Callable[..., Path]) -> None:
    message = refusal(pack(tmp_path / "a", ("fine.txt", b"x"), (name, b"x")))
    assert "points out of the archive" in message
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_spoil_the_archive(tmp_path: Path, kind: bytes) -> None:
    assert "'m/tokens.txt' is a link or a device" in refusal(tar(tmp_path / "a", odd("m/tokens.txt", kind)))


def test_a_link_in_a_zip_spoils_it_too(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("tokens.txt")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    assert "is a link or a device" in refusal(packed(tmp_path / "a.zip", (link, b"/etc/passwd")))


def test_two_files_of_one_name_spoil_the_archive(tmp_path: Path) -> None:
    assert "two files named tokens.txt" in refusal(tar(tmp_path / "a", ("m/tokens.txt", b"1"), ("n/tokens.txt", b"2")))


def test_a_bomb_goes_off_in_nobodys_hands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_TOTAL_BYTES", 5 << 20)
    monkeypatch.setattr("edge_asr.archive._Counted.__init__.__defaults__", (5 << 20,))
    zeros = bytes(6 << 20)
    for path in (
        tar(tmp_path / "deep.tar.bz2", ("m/deeper/zeros", zeros)),  # not even wanted
        packed(tmp_path / "a.zip", *((f"zeros-{i}", zeros[: 2 << 20]) for i in range(3))),
    ):
        assert "holds more than" in refusal(path, 100 << 20)


def test_no_more_is_written_than_there_is_room_for(tmp_path: Path) -> None:
    path = tar(tmp_path / "a", ("one", bytes(ROOM // 2)), ("two", bytes(ROOM)))
    assert "room are not enough" in refusal(path)
    assert sum(entry.stat().st_size for entry in (tmp_path / "target").iterdir()) <= ROOM


def test_a_header_of_any_claimed_size_takes_no_memory(tmp_path: Path) -> None:
    long = tarfile.TarInfo("././@LongLink")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 3 << 30
    (tmp_path / "a").write_bytes(gzip.compress(long.tobuf() + bytes(1 << 20)))
    assert "has a header of" in refusal(tmp_path / "a")


def test_too_many_files_are_no_model(tmp_path: Path) -> None:
    path = tar(tmp_path / "a", *((f"m/d/{i}", b"") for i in range(archive.MAX_MEMBERS + 1)))
    assert "holds more than 1000 files" in refusal(path)


def test_xz_is_refused_with_what_to_use_instead(tmp_path: Path) -> None:
    assert "pack it as .tar.gz" in refusal(tar(tmp_path / "a", ("x", b"x"), mode="w:xz"))


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.zip", ("x", b"x"))
    content = bytearray(path.read_bytes())
    for at in (content.index(b"PK\x03\x04") + 6, content.index(b"PK\x01\x02") + 8):
        content[at] |= 1
    path.write_bytes(content)
    assert "encrypted" in refusal(path)


@given(kept=st.integers(0, 2000), flipped=st.integers(0, 2000), data=st.data())
def test_a_damaged_archive_raises_its_own_error_or_gives_files_in_their_place(
    tmp_path_factory: pytest.TempPathFactory, kept: int, flipped: int, data: Any
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    pack = data.draw(st.sampled_from([tar, packed]))
    whole = bytearray(pack(folder / "a", ("m/tokens.txt", bytes(range(256)) * 20)).read_bytes())
    whole[flipped % len(whole)] ^= data.draw(st.integers(0, 255))
    (folder / "a").write_bytes(whole[: max(1, len(whole) - kept % len(whole))])
    (folder / "target").mkdir()
    with contextlib.suppress(ArchiveError):  # nothing else
        unpack(folder / "a", folder / "target", lambda _: True, ROOM)
    assert all(entry.parent == folder / "target" for entry in (folder / "target").rglob("*"))
