"""A file of known hash comes from a mirror that breaks off, knows no ranges, lies or is away."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from edge_asr import download
from edge_asr.download import ATTEMPTS, DownloadError, fetch
from tests.broker import free_port
from tests.mirror import mirror

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_PAUSE_S", 0.001)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def get(url: str, target: Path, sha256: str = SHA256, size: int | None = len(CONTENT)) -> list[tuple[int, int | None]]:
    shown: list[tuple[int, int | None]] = []
    fetch(url, target, sha256, size, progress=lambda have, total: shown.append((have, total)))
    return shown


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_a_connection_that_breaks_off_is_continued_where_it_was(tmp_path: Path, size: int | None) -> None:
    with mirror(a_bin=CONTENT) as served:
        served.break_off_after = 300_000
        shown = get(f"{served.url}/a.bin", tmp_path / "d/a.bin", size=size)
    assert (tmp_path / "d/a.bin").read_bytes() == CONTENT
    assert [wanted for _, wanted in served.requests] == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]
    assert shown[-1] == (len(CONTENT), len(CONTENT))
    assert [have for have, _ in shown] == sorted(have for have, _ in shown)


def test_what_an_earlier_attempt_left_is_not_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:500_000])
    with mirror(a_bin=CONTENT) as served:
        get(f"{served.url}/a.bin", tmp_path / "a.bin")
        get(f"{served.url}/a.bin", tmp_path / "a.bin")  # nor is what is there
    assert served.requests == [("/a.bin", "bytes=500000-")]


def test_a_server_that_knows_no_ranges_begins_again(tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(b"x" * 500_000)
    with mirror(a_bin=CONTENT) as served:
        served.knows_ranges = False
        get(f"{served.url}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_part_that_is_longer_than_the_file_begins_again(tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(CONTENT + b"more")
    with mirror(a_bin=CONTENT) as served:
        get(f"{served.url}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_another_content_is_refused_and_not_kept(tmp_path: Path) -> None:
    with mirror(a_bin=CONTENT[::-1]) as served, pytest.raises(DownloadError, match="try another mirror"):
        get(f"{served.url}/a.bin", tmp_path / "a.bin")
    assert list(tmp_path.iterdir()) == []


def test_more_than_expected_is_refused_at_once(tmp_path: Path) -> None:
    with mirror(a_bin=CONTENT) as served, pytest.raises(DownloadError, match="more than the 1000 bytes expected"):
        get(f"{served.url}/a.bin", tmp_path / "a.bin", size=1000)


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_a_disk_is_never_filled_and_nothing_is_kept_of_what_has_no_room(tmp_path: Path, size: int | None) -> None:
    spare_bytes = shutil.disk_usage(tmp_path).free * 2
    with (
        mirror(a_bin=CONTENT) as served,
        pytest.raises(DownloadError, match="than there is room for"),
    ):
        fetch(
            f"{served.url}/a.bin", tmp_path / "a.bin", SHA256, size, progress=lambda *_: None, spare_bytes=spare_bytes
        )
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    with mirror() as served, pytest.raises(DownloadError, match="404 Not Found; check --mirror"):
        get(f"{served.url}/a.bin", tmp_path / "a.bin")
    assert len(served.requests) == 1


def test_a_server_in_trouble_is_asked_again_and_then_named(tmp_path: Path) -> None:
    with mirror(a_bin=CONTENT) as served:
        served.error = 503
        with pytest.raises(DownloadError, match="503 Service Unavailable; what was fetched is kept"):
            get(f"{served.url}/a.bin", tmp_path / "a.bin")
    assert len(served.requests) == ATTEMPTS


def test_a_server_that_is_away_is_named_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="refused"):
        get(f"http://127.0.0.1:{free_port()}/a.bin", tmp_path / "a.bin")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/a", "a.bin"])
def test_only_web_addresses_are_fetched(tmp_path: Path, url: str) -> None:
    with pytest.raises(DownloadError, match="is not an http or https address"):
        get(url, tmp_path / "a.bin")
