"""What a restart finds again: descriptors that go to a service manager's socket and come back as it hands them over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_asr import clock, contract, systemd
from edge_asr.audio import read_file
from edge_asr.engine import Engine
from edge_asr.events import Utterance, derived_id, new_id
from edge_asr.spool import Spool
from edge_asr.zygote import Zygote
from tests.broker import wait_until
from tests.test_supervision import OPTIONS, RECORDINGS, Shelf, Speaker, pipe


def utterance(pcm: bytes = b"\1\2\n\0", ended_ns: int = 7) -> Utterance:
    return Utterance(id=new_id(), source="microphone", start=3, pcm=pcm, ended_ns=ended_ns)


FIRST_DESCRIPTOR = 200
"""Higher than any that the test run has open."""


class Manager:
    """The part of systemd that keeps descriptors, as sd_pid_notify_with_fds(3) and sd_listen_fds(3) describe it."""

    def __init__(self, receiver: socket.socket) -> None:
        self._receiver = receiver
        self.kept: dict[str, int] = {}

    def listen(self) -> None:
        """Do what the notifications that wait say."""
        while True:
            try:
                text, descriptors, _, _ = socket.recv_fds(self._receiver, 4096, 4)
            except BlockingIOError:
                return
            fields = dict(line.split("=", 1) for line in text.decode().split("\n"))
            if "FDSTORE" in fields:
                (self.kept[fields["FDNAME"]],) = descriptors
            elif "FDSTOREREMOVE" in fields:
                os.close(self.kept.pop(fields["FDNAME"]))

    def start_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Hand everything over to the next process; in the test it is the same one, so the numbers are others."""
        self.listen()
        for number, descriptor in enumerate(self.kept.values(), FIRST_DESCRIPTOR):
            os.dup2(descriptor, number)
        monkeypatch.setattr(systemd, "_FIRST_DESCRIPTOR", FIRST_DESCRIPTOR)
        for name, value in (("PID", os.getpid()), ("FDS", len(self.kept)), ("FDNAMES", ":".join(self.kept))):
            monkeypatch.setenv(f"LISTEN_{name}", str(value))


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.setblocking(False)  # noqa: FBT003
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        manager = Manager(receiver)
        yield manager
        for descriptor in manager.kept.values():
            os.close(descriptor)


def test_what_was_not_settled_comes_back_to_the_bit_oldest_first(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, settled, early = utterance(ended_ns=9), utterance(), utterance(bytes(range(256)), ended_ns=5)
    before = Spool()
    for each in (late, settled, early):
        before.keep(each)
    before.settle(settled)
    manager.start_again(monkeypatch)
    after = Spool()
    assert after.recovered == (early, late)
    for each in after.recovered:
        after.settle(each)
    manager.listen()
    assert manager.kept == {}
    assert Spool().recovered == ()


def test_what_ends_the_process_every_time_is_not_begun_a_third_time(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool()
    spool.keep(utterance())
    begun = []
    for _ in range(3):
        manager.start_again(monkeypatch)
        spool = Spool()
        (poison,) = spool.recovered
        begun.append(spool.begin(poison))
    assert begun == [True, True, False]


def test_what_was_understood_each_time_may_begin_for_ever(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    Spool().keep(utterance())
    for _ in range(5):
        manager.start_again(monkeypatch)
        spool = Spool()
        (waits,) = spool.recovered
        assert spool.begin(waits)
        spool.forgive(waits)


def test_an_order_that_waits_for_its_disk_through_any_number_of_restarts_is_obeyed(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.build(OPTIONS)
    pcm = read_file(RECORDINGS / "20-emergency-stop.flac")
    Spool().keep(Utterance(new_id(), "stdin", 0, pcm, clock.boottime_ns()))

    async def start_and_be_killed() -> None:
        manager.start_again(monkeypatch)
        shelf = Shelf(full_for=10**9)
        running = asyncio.create_task(pipe(engine, Speaker(), shelf, Spool()).run())
        await asyncio.wait_for(shelf.refused.wait(), 20)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    async def start_with_a_disk_that_works() -> None:
        manager.start_again(monkeypatch)
        speaker, shelf = Speaker(), Shelf()
        running = asyncio.create_task(pipe(engine, speaker, shelf, Spool()).run())
        await shelf.wait_for([contract.TRANSCRIPT, contract.COMMAND])
        await speaker.close()
        await running

    for _ in range(3):
        asyncio.run(start_and_be_killed())
    asyncio.run(start_with_a_disk_that_works())
    manager.listen()
    assert manager.kept == {}


def test_what_another_version_has_kept_is_said_to_be_lost(
    manager: Manager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = os.memfd_create("other")
    os.write(file, b"\0{}\nabc")
    systemd.store("utterance-x", file)
    os.close(file)
    manager.start_again(monkeypatch)
    assert Spool().recovered == ()
    assert "cannot be read and is lost" in caplog.text
    manager.listen()
    assert manager.kept == {}


def test_without_a_service_manager_nothing_is_kept_and_everything_may_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    spool, heard = Spool(), utterance()
    spool.keep(heard)
    assert [spool.begin(heard) for _ in range(3)] == [True, True, True]
    spool.settle(heard)


@given(st.integers(0, 50), st.integers(0, 50))
def test_ids_that_come_of_an_utterance_are_always_the_same_and_sort_with_it(one: int, other: int) -> None:
    parent = new_id()
    ids = [derived_id(parent, one), derived_id(parent, other)]
    assert (ids[0] == ids[1]) == (one == other)
    assert {(each[:13], each[14]) for each in ids} == {(parent[:13], "7")}
    assert all(each[19] in "89ab" for each in ids)


def test_what_is_handed_over_stays_out_of_the_processes_that_are_forked_before_it_is_read(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    Spool().keep(utterance())
    manager.start_again(monkeypatch)
    with contextlib.closing(Zygote(systemd.handed_over())) as zygote:
        kept_open = Path(f"/proc/{zygote._pid}/fd/{FIRST_DESCRIPTOR}")  # noqa: SLF001
        wait_until(lambda: not os.path.lexists(kept_open), "it is closed there")
    assert len(Spool().recovered) == 1
