"""`edge-asr outbox` as people type it, on real outboxes, with and without a daemon beside it."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edge_asr import cli, service
from edge_asr.outbox import Outbox, read_dead_letters, read_statistics
from edge_asr.retention import Limits
from tests.broker import Broker, Subscriber
from tests.test_publisher import emptied, events, publishing, received, run, seqs, transcript, until

REASON = "the broker refused it: Not authorized"


def edge_asr(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli.main, ["outbox", *arguments, "--set", f"outbox.path={path}"], prog_name="edge-asr")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Five messages; 2 and 4 are dead letters."""
    path = tmp_path / "outbox.db"

    async def fill(outbox: Outbox) -> None:
        await outbox.append(*(transcript(f"number {n}") for n in range(1, 6)))
        for seq in (2, 4):
            await outbox.put_aside(seq, REASON)

    with closing(Outbox(path, 50_000_000)) as outbox:
        asyncio.run(fill(outbox))
    return path


@pytest.mark.parametrize("verb", [["status"], ["dead-letters"], ["requeue", "--all"], ["discard", "1"]])
def test_without_an_outbox_every_verb_says_so_with_an_exit_code_of_its_own_and_makes_none(
    tmp_path: Path, verb: list[str]
) -> None:
    done = edge_asr(tmp_path / "none.db", *verb)
    assert done.exit_code == 66
    assert done.output == f"edge-asr: {tmp_path}/none.db: no outbox yet; the daemon makes it when it first runs\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("user", "code"), [(0, 0), (1000, 66)])
def test_root_sees_the_services_outbox_and_others_their_own(
    path: Path, user: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "STATE_DIRECTORY", path.parent)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(path.parent / "home"))
    done = CliRunner().invoke(cli.main, ["outbox", "status"], prog_name="edge-asr")
    assert done.exit_code == code
    assert (str(path) in done.output) == (user == 0)


def test_status_counts_what_waits_and_what_was_refused(path: Path) -> None:
    done = edge_asr(path, "status")
    assert done.exit_code == 0
    assert "waiting        command 0, transcript 3, rejection 0, alarm 0" in done.output
    assert "dead letters   2" in done.output
    assert "broker         none" in done.output
    assert json.loads(edge_asr(path, "status", "--json").output)["dead_letters"] == 2


def test_status_says_what_was_given_up_why_and_what_the_broker_refuses(path: Path) -> None:
    with closing(Outbox(path, 10_000_000, limits={"transcript": Limits(max_bytes=100_000)})) as outbox:
        asyncio.run(outbox.append(*[transcript("x" * 1000)] * 200))
        asyncio.run(outbox.append(transcript("one more")))
        asyncio.run(outbox.note_refusal("the broker refuses everything, evt/transcript: Quota exceeded; raise it"))
    shown = edge_asr(path, "status").output
    assert "refused        command 0, transcript 2, rejection 0, alarm 0" in shown
    assert "outdated       command 0, transcript 0, rejection 0, alarm 0" in shown
    assert "refusal        the broker refuses everything, evt/transcript: Quota exceeded; raise it" in shown
    numbers = json.loads(edge_asr(path, "status", "--json").output)
    assert numbers["dropped"]["transcript"] > 0
    assert numbers["class_bytes"]["transcript"] > 0


def test_dead_letters_are_listed_with_their_reason_while_a_daemon_has_the_outbox_open(path: Path) -> None:
    with closing(Outbox(path, 50_000_000)):
        lines = edge_asr(path, "dead-letters").output.splitlines()
        rows = [json.loads(line) for line in edge_asr(path, "dead-letters", "--json").output.splitlines()]
    assert [line.split()[0] for line in lines] == ["2", "4"]
    assert all(line.endswith(f"evt/transcript: {REASON}") for line in lines)
    assert [(row["seq"], row["data"]["text"], row["reason"]) for row in rows] == [
        (2, "number 2", REASON),
        (4, "number 4", REASON),
    ]


def test_requeued_messages_arrive_under_their_old_number_and_id(path: Path, broker: Broker) -> None:
    ids = [letter.message.id for letter in read_dead_letters(path)]
    done = edge_asr(path, "requeue", "--all")
    assert (done.exit_code, done.output) == (0, "requeued: 2, 4\n")
    assert edge_asr(path, "dead-letters").output == "no dead letters\n"

    async def deliver(subscriber: Subscriber) -> None:
        with closing(Outbox(path, 50_000_000)) as outbox:
            async with publishing(broker.mqtt(), outbox):
                await until(lambda: emptied(outbox), "an empty outbox")
                await received(subscriber, lambda got: len(events(got)) >= 5, "all five")
        assert seqs(events(subscriber.messages)) == [1, 2, 3, 4, 5]
        assert [events(subscriber.messages)[at].data["id"] for at in (1, 3)] == ids

    with Subscriber(broker) as subscriber:
        run(deliver(subscriber))


def test_discarded_dead_letters_are_gone_and_the_others_stay(path: Path) -> None:
    done = edge_asr(path, "discard", "4")
    assert (done.exit_code, done.output) == (0, "discarded: 4\n")
    assert [letter.message.seq for letter in read_dead_letters(path)] == [2]
    assert read_statistics(path).waiting["transcript"] == 3


def test_what_is_no_dead_letter_is_named_and_the_others_are_dealt_with(path: Path) -> None:
    done = edge_asr(path, "requeue", "2", "3", "99")
    assert done.exit_code == 1
    assert done.output == (
        "requeued: 2\nedge-asr: not a sound dead letter: 3, 99; see `edge-asr outbox dead-letters`\n"
    )


def test_a_dead_letter_that_the_disk_has_changed_can_only_be_discarded(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE dead_letter SET data = substr(data, 1, 20) WHERE seq = 4")
        connection.commit()
    assert json.loads(edge_asr(path, "dead-letters", "--json").output.splitlines()[1])["data"] == {}
    assert "not a sound dead letter: 4" in edge_asr(path, "requeue", "4").output
    assert edge_asr(path, "discard", "4").output == "discarded: 4\n"


@pytest.mark.parametrize("verb", ["requeue", "discard"])
def test_beside_a_running_daemon_nothing_is_changed_and_the_remedy_is_named(path: Path, verb: str) -> None:
    with closing(Outbox(path, 50_000_000)):
        done = edge_asr(path, verb, "--all")
    assert done.exit_code == 74
    assert f"in use by process {os.getpid()} (" in done.output
    assert read_statistics(path).dead_letters == 2


@pytest.mark.parametrize("arguments", [[], ["2", "--all"]])
def test_numbers_or_all_of_them_one_of_the_two(path: Path, arguments: list[str]) -> None:
    done = edge_asr(path, "requeue", *arguments)
    assert done.exit_code == 2
    assert "name the numbers of dead letters, or --all" in done.output
