"""Files go when the box has run for their days since they were written, whatever the wall clock shows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_asr import clock, file_retention
from edge_asr.file_retention import AGES, FileRetention, Tidier
from tests.broker import wait_until

DAY_S = 86_400


class Box:
    """A box whose time a test lets go by."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.boots, self.up_s = 0, 0.0
        patch.setattr(clock, "boot_id", lambda: f"boot-{self.boots}")
        patch.setattr(clock, "boottime_ns", lambda: round(self.up_s * clock.NS_PER_S))

    def boot(self) -> None:
        self.boots, self.up_s = self.boots + 1, 0.0

    def run(self, days: float) -> None:
        self.up_s += days * DAY_S


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch) -> Box:
    return Box(monkeypatch)


def made(folder: Path, *names: str, days: float = 10) -> FileRetention:
    for name in names:
        (folder / name).write_bytes(b"x")
    return FileRetention(folder, "*.log", days)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.log"))


@pytest.mark.parametrize("written_s", [0, 2_100_000_000], ids=["1970", "2036"])
def test_what_the_wall_clock_gave_a_file_neither_deletes_nor_keeps_it(tmp_path: Path, box: Box, written_s: int) -> None:
    """No clock of its own, and NTP steps it in the middle of a shift: that deleted the shift's evidence."""
    kept = made(tmp_path, "a.log")
    os.utime(tmp_path / "a.log", (written_s, written_s))
    assert kept.drop_outdated() == 0
    box.run(9.9)
    assert kept.drop_outdated() == 0
    box.run(0.2)
    assert kept.drop_outdated() == 1
    assert left(tmp_path) == []


def test_boots_add_up_as_far_as_the_box_was_seen_to_run(tmp_path: Path, box: Box) -> None:
    kept = made(tmp_path, "a.log", days=2)
    for _ in range(4):
        kept.drop_outdated()
        box.run(0.4)
        assert kept.drop_outdated() == 0
        box.boot()
    assert left(tmp_path) == ["a.log"]
    box.run(0.5)
    assert kept.drop_outdated() == 1


def test_the_days_of_a_file_begin_when_it_was_last_written_to(tmp_path: Path, box: Box) -> None:
    kept = made(tmp_path, "a.log", "b.log")
    for _ in range(3):
        kept.drop_outdated()
        with (tmp_path / "b.log").open("ab") as file:
            file.write(b"x")
        box.run(5.5)
    kept.drop_outdated()
    assert left(tmp_path) == ["b.log"]


def test_the_newest_stays_where_somebody_goes_on_with_it(tmp_path: Path, box: Box) -> None:
    made(tmp_path, "a.log", "b.log")
    kept = FileRetention(tmp_path, "*.log", 1, spare_newest=True)
    kept.drop_outdated()
    box.run(2)
    assert kept.drop_outdated() == 1
    assert left(tmp_path) == ["b.log"]


@pytest.mark.parametrize("spoilt", [b"", b"null", b'{"boot_id": 1}', b"\xff", b'{"files": {"a.log": 3}}'])
def test_days_begin_again_where_nobody_knows_any_more_what_was_seen(tmp_path: Path, box: Box, spoilt: bytes) -> None:
    kept = made(tmp_path, "a.log")
    kept.drop_outdated()
    (tmp_path / AGES).write_bytes(spoilt)
    box.run(11)
    assert kept.drop_outdated() == 0
    box.run(11)
    assert kept.drop_outdated() == 1


def test_where_nothing_was_ever_kept_nothing_is_written(tmp_path: Path) -> None:
    assert FileRetention(tmp_path / "none", "*.log", 1).drop_outdated() == 0
    assert FileRetention(tmp_path, "*.log", 1).drop_outdated() == 0
    assert list(tmp_path.iterdir()) == []


@given(steps=st.lists(st.one_of(st.floats(0, 3), st.none()), max_size=30))
def test_nothing_goes_before_the_box_has_run_for_its_days(
    tmp_path_factory: pytest.TempPathFactory, steps: list[float | None]
) -> None:
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        box, ran = Box(patch), 0.0
        kept = made(folder, "a.log", days=5)
        kept.drop_outdated()
        for step in steps:
            if step is None:
                box.boot()
            else:
                box.run(step)
                ran += step
            if kept.drop_outdated():
                assert ran >= 5
                return
        assert ran <= 5 + 1e-2  # whole seconds are kept


def test_it_is_looked_again_and_again_and_a_disk_in_trouble_is_told_once(
    tmp_path: Path, box: Box, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(file_retention, "LOOK_S", 0.01)
    (tmp_path / "spoilt").mkdir()
    (tmp_path / "spoilt" / AGES).mkdir()
    troubled = made(tmp_path / "spoilt", "a.log")
    kept = made(tmp_path, "a.log")
    tidier = Tidier([troubled, kept])
    wait_until((tmp_path / AGES).exists, "the first look")
    box.run(11)
    wait_until(lambda: not left(tmp_path), "a later look")
    tidier.close()
    assert caplog.text.count("what is too old cannot be deleted") == 1
