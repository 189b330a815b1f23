"""The audit log finds every change of what was written, with a real outbox, a real daemon and real crashes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import io
import json
import os
import re
import resource
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_asr import audit, clock, settings
from edge_asr import outbox as outbox_room
from edge_asr.audit import AuditedOutbox, AuditError, AuditLog, verify
from edge_asr.daemon import kept_files, open_outbox
from edge_asr.events import Draft, Json
from edge_asr.outbox import OutboxError
from edge_asr.settings import SettingsError, load
from tests.broker import PATIENCE_S, Broker, Subscriber, wait_until
from tests.sysbox import CHECKOUT
from tests.test_cli import typed
from tests.test_daemon import COMMAND, RECORDINGS, running, write_settings

TALK = RECORDINGS / "04-talk-about-the-game.flac"


def written(folder: Path, count: int = 5, **options: object) -> AuditLog:
    log = AuditLog(folder, **{"texts": True, **options})  # type: ignore[arg-type]
    log.attend()
    for number in range(count):
        log.append({"what": "test", "value": number})
    return log


def segment(folder: Path) -> Path:
    (path,) = folder.glob("audit-*.jsonl")
    return path


def complaint(folder: Path, known: str | None = None) -> str:
    with pytest.raises(AuditError) as caught:
        verify(folder, known)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_log_that_nobody_touched_is_whole_over_openings(tmp_path: Path) -> None:
    first = written(tmp_path)
    second = written(tmp_path)
    verdict = verify(tmp_path, first.newest)
    assert (verdict.records, verdict.first, verdict.newest) == (12, 1, second.newest)


def change(line: int, old: str, new: str) -> Callable[[list[str]], None]:
    def tamper(lines: list[str]) -> None:
        assert old in lines[line]
        lines[line] = lines[line].replace(old, new)

    return tamper


def rewrite(lines: list[str]) -> None:
    """Change a record and put its hash right."""
    record = json.loads(lines[2])
    record["value"] = 99
    del record["hash"]
    content = json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":")) + "\n"
    digest = hashlib.sha256(content.encode()).hexdigest()
    lines[2] = json.dumps({**record, "hash": digest}, sort_keys=True, separators=(",", ":"))


@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (change(2, '"value":1', '"value":7'), "line 3: was changed after it was written"),
        (change(2, "T", "t"), "was changed after it was written"),
        (lambda lines: lines.pop(2), "record 3 is missing"),
        (lambda lines: lines.insert(2, lines[2]), "record 4 is missing"),
        (rewrite, "line 4: does not follow the record before it"),
        (lambda lines: lines.insert(0, "nonsense"), "is no record"),
        (lambda lines: lines.clear(), "holds no audit log"),
    ],
)
def test_whatever_is_changed_left_out_or_put_in_between_is_found(
    tmp_path: Path, tamper: Callable[[list[str]], None], words: str
) -> None:
    written(tmp_path)
    lines = segment(tmp_path).read_text(encoding="utf-8").splitlines()
    tamper(lines)
    segment(tmp_path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    assert words in complaint(tmp_path)


@given(at=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_no_changed_byte_goes_unnoticed(tmp_path_factory: pytest.TempPathFactory, at: int, flip: int) -> None:
    folder = tmp_path_factory.mktemp("audit")
    newest = written(folder).newest
    content = bytearray(segment(folder).read_bytes())
    content[at % len(content)] ^= flip
    segment(folder).write_bytes(content)
    complaint(folder, newest)


def test_a_log_cut_off_or_written_anew_is_found_with_a_hash_from_outside(tmp_path: Path) -> None:
    newest = written(tmp_path).newest
    path = segment(tmp_path)
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:-2]), encoding="utf-8")
    verify(tmp_path)  # by itself a shorter log is whole
    assert f"has no record {newest}" in complaint(tmp_path, newest)
    path.unlink()
    written(tmp_path)
    assert f"has no record {newest}" in complaint(tmp_path, newest)


def test_half_a_line_of_a_crash_is_cut_off_and_told(tmp_path: Path) -> None:
    written(tmp_path)
    with segment(tmp_path).open("ab") as file:
        file.write(b'{"n":7,"half')
    assert "is no record but half of one: it is being written, or a write was cut short" in complaint(tmp_path)
    written(tmp_path, 0)
    assert verify(tmp_path).records == 7
    assert json.loads(segment(tmp_path).read_text(encoding="utf-8").splitlines()[-1])["cut_bytes"] == 12


@pytest.mark.parametrize(
    ("spoilt", "lines"),
    [
        (b"\x00" * 9, 1),
        (b'{"n":6}', 1),
        (b'{"n":6,"x":"\\ud800"}', 1),
        (b'{"n":' + b"[" * 99_999, 1),
        (b"\x00\n\x00", 2),
    ],
    ids=["zeros", "no hash", "no text", "deep", "lines"],
)
def test_a_spoilt_end_stays_as_evidence_and_the_log_goes_on_in_a_file_of_its_own(
    tmp_path: Path, spoilt: bytes, lines: int
) -> None:
    newest = written(tmp_path, 4).newest
    before = segment(tmp_path).read_bytes().splitlines(keepends=True)
    segment(tmp_path).write_bytes(b"".join([*before[: -spoilt.count(b"\n") - 1], spoilt, b"\n"]))
    log = written(tmp_path, 1)
    assert firsts(tmp_path) == [1, 6]
    first = json.loads((tmp_path / "audit-000000000006.jsonl").read_bytes().splitlines()[0])
    assert (first["what"], first["spoilt_lines"]) == ("opened", lines)
    assert first["before"] == json.loads(before[-lines - 1])["hash"]
    assert log.newest is not None
    assert f"audit-000000000001.jsonl, line {6 - lines}" in complaint(tmp_path, newest)
    (tmp_path / "audit-000000000001.jsonl").unlink()  # when its days are over
    assert verify(tmp_path, log.newest).records == 2


def test_a_file_of_which_nothing_is_left_is_followed_by_one_with_numbers_of_its_own(tmp_path: Path) -> None:
    written(tmp_path, 4)
    segment(tmp_path).write_bytes(b"\x00\n" * 5)
    written(tmp_path, 0)
    assert sorted(path.name for path in tmp_path.glob("audit-*")) == [
        "audit-000000000001.jsonl",
        "audit-000000000006.jsonl",
    ]


def test_a_file_that_cannot_be_read_is_given_up_for_a_new_one_which_names_it_and_refers_to_the_newest_legible_record(
    tmp_path: Path, calendar: Calendar, caplog: pytest.LogCaptureFixture
) -> None:
    log = written(tmp_path, 2)
    third = str(log.newest).partition(":")[2]
    calendar.turn(1)
    log.append({"what": "test"})
    unreadable = tmp_path / "audit-000000000004.jsonl"
    unreadable.unlink()
    unreadable.symlink_to("/proc/self/mem")  # EIO, from the kernel itself
    fresh = written(tmp_path, 1)
    path = tmp_path / "audit-000000010004.jsonl"
    first = json.loads(path.read_bytes().splitlines()[0])
    assert (first["n"], first["before"], first["unreadable"]) == (10_004, third, [unreadable.name])
    assert fresh.damage == f"the disk fails in {unreadable.name}; the audit log goes on in a new file"
    assert fresh.damage in caplog.text
    assert complaint(tmp_path).endswith(f"{unreadable.name}: Input/output error; the disk fails there")
    (tmp_path / "later").mkdir()
    path.rename(tmp_path / "later" / path.name)
    assert verify(tmp_path / "later", fresh.newest).records == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_what_a_failed_write_leaves_where_it_cannot_be_taken_back_is_no_tampering(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    log = written(tmp_path, 3)
    old, end, opened = segment(tmp_path), segment(tmp_path).stat().st_size, Path.open

    class Failing(io.FileIO):
        """A file on a disk that takes 40 bytes of a record, and no order to take them back."""

        def write(self, line: Any) -> int:
            if self.tell() > end:
                raise OSError(number, os.strerror(number))
            return super().write(line[:40])

        def truncate(self, size: int | None = None) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO), size)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *a, **k: Failing(path, "a") if path == old else opened(path, *a, **k))
        with contextlib.suppress(AuditError):
            log.append({"what": "lost"})
    log.append({"what": "test"})
    log.append({"what": "test"})
    assert old.stat().st_size > end
    found = verify(tmp_path, log.newest)
    assert found.left == (f"{old.name} from byte {end} on",)
    with old.open("r+b") as file:  # what is before it still may not be touched
        file.seek(end - 10)
        file.write(b"x")
    assert "tampered" in complaint(tmp_path)


def test_a_file_in_which_the_disk_fails_is_followed_by_a_new_one_without_a_break(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def fails_once(path: Path, line: bytes, *, durable: bool) -> None:
        if path.name == "audit-000000000001.jsonl":
            fails()
        write(path, line, durable=durable)

    write = audit._write  # noqa: SLF001 - the disk
    log = written(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(audit, "_write", fails_once)
        log.append({"what": "test"})
        log.append({"what": "test"})
        patch.setattr(audit, "_write", fails)
        for _ in range(2):  # nor does it begin file after file where the whole disk fails
            with pytest.raises(AuditError, match="the disk fails there"):
                log.append({"what": "test"})
    log.append({"what": "test"})
    assert log.damage.startswith("the disk fails in audit-000000000004.jsonl (Input/output error)")
    assert firsts(tmp_path) == [1, 4, 6]
    assert verify(tmp_path, log.newest).records == 6


def test_a_hash_that_is_older_than_what_is_kept_accuses_nobody(tmp_path: Path, calendar: Calendar) -> None:
    log = written(tmp_path, 2)
    third = str(log.newest)
    calendar.turn(1)
    log.append({"what": "test"})
    segment_of_yesterday, _ = sorted(tmp_path.glob("audit-*.jsonl"))
    segment_of_yesterday.unlink()
    assert verify(tmp_path, third).first == 4
    assert "2:0f is older than what is kept (from 4)" in complaint(tmp_path, "2:0f")
    assert "was written anew or cut off" in complaint(tmp_path, "3:0f")


DAY_S = 86_400


class Calendar:
    """A wall clock that a test turns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1_800_000_000
        monkeypatch.setattr(clock, "wall_ns", lambda: self.now_s * clock.NS_PER_S)

    def turn(self, days: float) -> None:
        """Let days go by."""
        self.now_s += int(days * DAY_S)


@pytest.fixture
def calendar(monkeypatch: pytest.MonkeyPatch) -> Calendar:
    return Calendar(monkeypatch)


def firsts(folder: Path) -> list[int]:
    """The number in the name of every file, which is that of its first record."""
    files = sorted(folder.glob("audit-*.jsonl"))
    numbers = [int(path.stem.removeprefix("audit-")) for path in files]
    assert numbers == [json.loads(path.read_bytes().splitlines()[0])["n"] for path in files]
    return numbers


def test_a_file_holds_a_day_at_most_and_without_the_oldest_the_rest_is_still_a_chain(
    tmp_path: Path, calendar: Calendar
) -> None:
    log = written(tmp_path, 3)  # and one: opened
    for _ in range(3):
        calendar.turn(4)
        assert log.is_of_another_day
        log.append({"what": "test"})
        log.append({"what": "test"})
        assert not log.is_of_another_day
    assert firsts(tmp_path) == [1, 5, 7, 9]
    min(tmp_path.glob("audit-*")).unlink()
    verdict = verify(tmp_path, log.newest)
    assert (verdict.first, verdict.records) == (5, 6)


def test_a_start_on_the_same_day_goes_on_in_the_same_file_and_a_clock_put_back_begins_another(
    tmp_path: Path, calendar: Calendar
) -> None:
    for _ in range(3):
        written(tmp_path, 0)
    assert firsts(tmp_path) == [1]
    calendar.now_s -= 3 * DAY_S
    log = written(tmp_path, 1)
    assert firsts(tmp_path) == [1, 4]
    assert verify(tmp_path, log.newest).records == 5


@pytest.mark.usefixtures("calendar")
def test_a_busy_day_has_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "SEGMENT_RECORDS", 4)
    written(tmp_path, 5)
    log = written(tmp_path, 3)
    assert firsts(tmp_path) == [1, 5, 9]
    assert verify(tmp_path, log.newest).records == 10


def test_a_file_of_an_older_version_which_holds_many_days_is_gone_on_with(
    tmp_path: Path, calendar: Calendar, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as older:
        older.setattr(audit, "_today", lambda: 0)
        log = written(tmp_path, 2)
        calendar.turn(4)
        log.append({"what": "test"})
    assert firsts(tmp_path) == [1]
    log = written(tmp_path, 1)
    assert firsts(tmp_path) == [1, 5]
    assert verify(tmp_path, log.newest).records == 6


def test_what_does_not_fit_on_the_disk_leaves_no_half_record(tmp_path: Path) -> None:
    log = written(tmp_path)
    size = segment(tmp_path).stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, before[1]))
    try:
        with pytest.raises(AuditError, match=r"check permissions and free space"):
            log.append({"what": "test"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert segment(tmp_path).stat().st_size == size
    log.append({"what": "test"})
    assert verify(tmp_path, log.newest).records == 7


def test_a_box_that_hears_nothing_keeps_nothing_longer_and_neither_does_one_whose_log_was_switched_off(
    tmp_path: Path, calendar: Calendar, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "state/audit"
    monkeypatch.setattr(clock, "boottime_ns", lambda: calendar.now_s * clock.NS_PER_S)

    async def look(*, enabled: bool) -> None:
        options = settings.Settings(state_dir=tmp_path / "state", audit=settings.Audit(enabled=enabled, days=6.5))
        with closing(open_outbox(options)) as outbox:
            for _ in range(9):
                await outbox.drop_outdated()
                if isinstance(outbox, AuditedOutbox):
                    wait_until(lambda: not outbox.audit.is_of_another_day, "a record of today")
                for kept in kept_files(options):
                    kept.drop_outdated()
                calendar.turn(1)

    asyncio.run(look(enabled=True))
    assert firsts(folder) == [3, 4, 5, 6, 7, 8, 9]
    assert [json.loads(path.read_bytes())["what"] for path in sorted(folder.glob("audit-*"))] == ["day"] * 7
    asyncio.run(look(enabled=False))
    assert firsts(folder) == []


def test_what_the_outbox_commits_delivers_and_is_told_is_in_the_log(tmp_path: Path) -> None:
    heard: dict[str, Json] = {"utterance_id": "u1", "source": "m", "text": "stop the press", "tokens": []}
    drafts = [
        Draft("evt/transcript", "transcript", heard),
        Draft("evt/command", "command", {**heard, "intent": "Stop", "slots": {"machine": "press"}}),
    ]

    async def main() -> str:
        log = AuditLog(tmp_path / "audit", texts=True)
        with closing(AuditedOutbox(tmp_path / "outbox.db", 2**20, log)) as outbox:
            messages = await outbox.append(*drafts)
            await outbox.acknowledge(message.seq for message in messages)
            await outbox.receive_receipt(messages[1].id, "accepted", "done")
            await outbox.acknowledge([])
        with pytest.raises(OutboxError):
            await outbox.append(*drafts)
        return messages[1].id

    command_id = asyncio.run(main())
    records = [json.loads(line) for line in segment(tmp_path / "audit").read_text(encoding="utf-8").splitlines()]
    assert [record["what"] for record in records] == ["opened", "transcript", "command", "delivered", "receipt"]
    assert (records[2]["intent"], records[2]["text"], records[2]["utterance_id"]) == ("Stop", "stop the press", "u1")
    assert records[3]["seqs"] == [1, 2]
    assert (records[4]["id"], records[4]["verdict"]) == (command_id, "accepted")
    assert verify(tmp_path / "audit").missing == ()


def test_a_log_that_cannot_be_opened_stops_nobody_and_is_begun_as_soon_as_it_can(tmp_path: Path) -> None:
    """A full disk at the start made the box deaf."""
    folder = tmp_path / "state/audit"
    with Broker(tmp_path) as broker, Subscriber(broker) as subscriber:
        path = write_settings(tmp_path, broker.port, audit={"enabled": True})
        folder.parent.mkdir()
        folder.write_bytes(b"in the way")
        with running(path) as box:
            box.say(COMMAND)
            subscriber.wait_for(lambda m: any(x.topic.endswith("evt/command") for x in m), "a command")
            subscriber.wait_for(lambda m: any(x.data.get("kind") == "audit-failed" for x in m), "an alarm")
            folder.unlink()
            box.say(COMMAND)
            wait_until(lambda: any(folder.glob("*")), "a record")
            assert box.hang_up() == 0
    assert json.loads(segment(folder).read_bytes().splitlines()[0])["what"] == "opened"


def test_nobody_waits_for_a_log_whose_disk_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()
    write = audit._write  # noqa: SLF001 - the disk
    monkeypatch.setattr(audit, "_write", lambda *a, **k: (answers.wait(), write(*a, **k)))
    monkeypatch.setattr(audit, "MAX_WAITING", 3)
    monkeypatch.setattr(audit, "WRITE_LIMIT_S", 0.0)

    async def main() -> None:
        with closing(AuditedOutbox(tmp_path / "outbox.db", 2**20, AuditLog(tmp_path / "audit", texts=True))) as outbox:
            for _ in range(5):
                await outbox.append(Draft("evt/command", "command", {"intent": "Stop"}))
            wait_until(lambda: "has not answered" in outbox.trouble, "a trouble")
            answers.set()

    asyncio.run(main())
    assert [json.loads(line).get("seq") for line in segment(tmp_path / "audit").read_bytes().splitlines()] == [
        None,
        1,
        2,
    ]


def test_a_bug_in_the_log_is_told_and_ends_no_later_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(AuditedOutbox(tmp_path / "outbox.db", 2**20, AuditLog(tmp_path / "audit", texts=True))) as outbox:
        outbox.note({"what": "test", "value": object()})  # type: ignore[dict-item]
        wait_until(lambda: "the audit log fails" in outbox.trouble, "a trouble")
        outbox.note({"what": "test"})
        wait_until(lambda: not outbox.trouble, "the end of it")
    assert verify(tmp_path / "audit").records == 2
    assert "Traceback" in caplog.text


def test_a_copy_of_a_file_that_somebody_keeps_beside_it_is_no_part_of_the_log(tmp_path: Path) -> None:
    written(tmp_path, 2)
    for name in ("audit-bad.jsonl", "audit-000000000001_copy.jsonl"):
        (tmp_path / name).write_bytes(b"\x00\n")
    (tmp_path / "audit-000000000001.jsonl").write_bytes(b"\x00\n")
    written(tmp_path, 0)
    assert (tmp_path / "audit-000000000002.jsonl").exists()


def test_a_stop_does_not_wait_for_ever_for_a_log_whose_disk_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = threading.Event()
    monkeypatch.setattr(audit, "_write", lambda *_, **__: answers.wait())
    monkeypatch.setattr(audit, "CLOSE_LIMIT_S", 0.1)
    outbox = AuditedOutbox(tmp_path / "outbox.db", 2**20, AuditLog(tmp_path / "audit", texts=True))
    outbox.close()
    answers.set()
    assert "the last records are not written" in caplog.text


def test_a_stop_waits_for_a_slow_disk_that_writes_one_record_after_the_other_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write, slow = audit._write, threading.Event()  # noqa: SLF001 - the disk
    monkeypatch.setattr(audit, "_write", lambda *a, **k: (slow.wait(0.2), write(*a, **k)))
    monkeypatch.setattr(audit, "STALL_LIMIT_S", 1.0)

    def stopped_over(records: int) -> AuditedOutbox:
        folder = tmp_path / str(records)
        with closing(AuditedOutbox(folder / "outbox.db", 2**20, AuditLog(folder / "audit", texts=True))) as outbox:
            for _ in range(records):
                outbox.note({"what": "test"})
        return outbox

    stopped_over(8)
    assert verify(tmp_path / "8/audit").records == 9
    assert not caplog.text
    monkeypatch.setattr(audit, "CLOSE_LIMIT_S", 1.0)
    late = stopped_over(200)
    assert "too slow; the last records are not written" in caplog.text
    slow.set()
    late._scribe.join(PATIENCE_S)  # noqa: SLF001


def test_a_stop_is_over_in_the_time_that_systemd_gives_it_whatever_the_disks_do() -> None:
    unit = (CHECKOUT / "systemd/edge-asr.service").read_text(encoding="utf-8")
    (stop_s,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert int(stop_s) > outbox_room.CLOSE_LIMIT_S + audit.CLOSE_LIMIT_S


def test_without_texts_only_what_was_done_is_kept(tmp_path: Path) -> None:
    async def main() -> None:
        log = AuditLog(tmp_path / "audit", texts=False)
        with closing(AuditedOutbox(tmp_path / "outbox.db", 2**20, log)) as outbox:
            await outbox.append(
                Draft("evt/command", "command", {"text": "secret", "words": "secret", "intent": "Stop"})
            )

    asyncio.run(main())
    content = segment(tmp_path / "audit").read_text(encoding="utf-8")
    assert "Stop" in content
    assert "secret" not in content


def test_messages_without_a_record_are_told(tmp_path: Path) -> None:
    log = written(tmp_path, 0)
    for seq in (3, 4, 7):
        log.append({"what": "command", "seq": seq})
    assert verify(tmp_path).missing == (5, 6)


def test_a_daemon_keeps_a_log_that_its_health_vouches_for(tmp_path: Path) -> None:
    with Broker(tmp_path) as broker, Subscriber(broker) as subscriber:
        path = write_settings(tmp_path, broker.port, audit={"enabled": True})
        for _ in range(2):
            with running(path) as box:
                box.say(COMMAND)
                subscriber.wait_for(lambda m: any(x.topic.endswith("evt/command") for x in m), "a command")
                assert box.hang_up() == 0
        subscriber.wait_for(lambda m: any(x.data.get("audit_newest") for x in m), "a hash in health")
    known = [x.data["audit_newest"] for x in subscriber.on("health")]
    done = typed("audit", "verify", "--settings", str(path), "--known", known[-1])
    assert done.returncode == 0, done.stderr
    assert "records from number 1 on are whole" in done.stdout
    content = segment(tmp_path / "state/audit").read_text(encoding="utf-8")
    command = subscriber.on("evt/command")[0].data
    assert all(word in content for word in (command["id"], command["utterance_id"], '"what":"delivered"'))
    segment(tmp_path / "state/audit").write_text(content.replace("EmergencyStop", "StartMachine"), encoding="utf-8")
    assert typed("audit", "verify", "--settings", str(path)).returncode == 74


def test_in_private_only_commands_leave_the_box_and_no_word_is_kept(tmp_path: Path) -> None:
    with Broker(tmp_path) as broker, Subscriber(broker) as subscriber:
        more = {"privacy": {"publish": "commands"}, "audit": {"enabled": True}, "log": {"level": "debug"}}
        with running(write_settings(tmp_path, broker.port, **more)) as box:
            box.say(COMMAND)
            box.say(TALK)
            subscriber.wait_for(lambda m: any(x.topic.endswith("evt/rejected") for x in m), "a rejection")
            assert box.hang_up() == 0
            log = box.log
    assert {m.topic.rpartition("/")[2] for m in subscriber.messages} == {
        "status",
        "meta",
        "health",
        "command",
        "rejected",
    }
    (command,), (rejected,) = subscriber.on("evt/command"), subscriber.on("evt/rejected")
    assert (command.data["text"], command.data["tokens"]) == ("", [])
    assert (rejected.data["text"], rejected.data["candidates"], rejected.data["reason"]) == ("", [], "not-understood")
    everything = log + "".join(
        path.read_bytes().decode("latin-1") for path in (tmp_path / "state").rglob("*") if path.is_file()
    )
    assert "game" not in everything


def test_nothing_can_be_recorded_in_private(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("privacy: {publish: commands}\nrecorder: {public_key: k}\n", encoding="utf-8")
    with pytest.raises(SettingsError, match=r"recorder\.public_key: with privacy\.publish: commands nothing may be"):
        load(tmp_path / "s.yaml")
