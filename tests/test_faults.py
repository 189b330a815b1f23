"""The rig itself: the short form keeps every promise, and its books would find one that was broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from edge_asr import clock, contract
from edge_asr.contract import Renderer
from edge_asr.events import Message, new_id
from tests.faults import figures, report
from tests.faults.books import Account, Delivery, Promise, settle
from tests.faults.device import ROOT, command_draft, transcript_draft
from tests.sysbox import CHECKOUT

LIFE_S = 2.0
RENDERER = Renderer(ROOT, "edge01")


@pytest.mark.timeout(220)  # 40 s where nothing else runs
def test_the_short_form_breaks_no_promise(tmp_path: Path) -> None:
    out = tmp_path / "faults.json"
    done = subprocess.run(
        [CHECKOUT / "tools" / "faults", "--short", "--json", out],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "VIRTUAL_ENV": sys.prefix},
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [result[broken] for broken in ("lost", "reordered", "stale", "foreign")] == [0, 0, 0, 0]
    assert result["kills"] >= 10
    assert result["committed"] > 1000
    assert result["expired"] > 0, "no command ever came too late: nothing was tested"
    skipped = [scenario["scenario"] for scenario in result["scenarios"] if scenario["skipped"]]
    assert os.geteuid() != 0 or not skipped
    for scenario in result["scenarios"]:
        assert scenario["skipped"] or scenario["scenario"] in done.stdout


def message(seq: int, kind: str = "transcript") -> Message:
    draft = command_draft(LIFE_S) if kind == "command" else transcript_draft(10)
    now_ns = clock.boottime_ns()
    return Message(
        seq,
        new_id(),
        clock.boot_id(),
        draft.topic,
        draft.category,
        draft.data,
        0,
        now_ns,
        draft.expires_ns,
        "unsynchronized",
    )


def delivery(sent: Message, *, replayed: bool = False, after_s: float = 0.0) -> Delivery:
    payload = RENDERER.message(sent, replayed=replayed, life_left_s=LIFE_S if sent.expires_ns else None)
    return Delivery(payload.topic, payload.body, sent.created_ns + round(after_s * clock.NS_PER_S))


def account(sent: Sequence[Message], delivered: Sequence[Delivery]) -> Account:
    promised = [Promise(one.seq, one.id, one.category, one.expires_ns or 0) for one in sent]
    return settle(Account("books"), promised, delivered)


def test_books_in_order_hold_nothing_against_anyone() -> None:
    sent = [message(1), message(2, "command"), message(3)]
    found = account(sent, [delivery(one) for one in sent])
    assert not found.violated
    assert (found.committed, found.duplicates) == (3, 0)


def test_a_message_that_never_came_is_lost() -> None:
    sent = [message(1), message(2)]
    assert account(sent, [delivery(sent[1])]).lost == 1


SECOND = 1_000_000_000


@pytest.mark.parametrize(
    ("kind", "taken_s", "there_s", "killed_s", "fate"),
    [
        ("transcript", None, (0, 9), None, "lost"),
        ("transcript", 0.1, (5, 9), None, "lost"),
        ("transcript", 0.1, (0, 0.3), 0.3, "forgotten"),
        ("transcript", 0.1, (0, 9), 0.3, "forgotten"),
        ("transcript", 0.1, (0, 9), 5, "lost"),
        ("command", 0.1, (0, 9), None, "lost"),
        ("command", 0.1, (0, 0.3), None, "expired_at_broker"),
        ("command", 0.1, (3, 9), None, "lost"),
        ("command", 0.1, (9, 19), None, "expired_at_broker"),
        ("command", 0.1, (9, 19), 1, "forgotten"),
        ("command", None, (9, 19), None, "lost"),
    ],
)
def test_what_never_came_is_excused_only_where_the_broker_had_it_and_the_consumer_could_not_get_it(
    kind: str, taken_s: float | None, there_s: tuple[float, float], killed_s: float | None, fate: str
) -> None:
    one = Promise(1, new_id(), kind, 10 * SECOND)
    found = settle(
        Account("books"),
        [one],
        [],
        acknowledged_ns={} if taken_s is None else {one.id: round(taken_s * SECOND)},
        presence_ns=[(round(there_s[0] * SECOND), round(there_s[1] * SECOND))],
        broker_kills_ns=[] if killed_s is None else [round(killed_s * SECOND)],
    )
    fates = ("lost", "forgotten", "expired_at_broker")
    assert [getattr(found, each) for each in fates] == [int(each == fate) for each in fates]


def test_only_what_stood_on_a_damaged_page_is_excused_for_it() -> None:
    there, elsewhere = message(1), message(2)
    promised = [Promise(one.seq, one.id, one.category, 0) for one in (there, elsewhere)]
    found = settle(Account("books"), promised, [], damaged={there.id, new_id(), new_id()})
    assert (found.unreadable, found.lost) == (1, 1)


def test_a_second_delivery_is_a_duplicate_and_not_out_of_order() -> None:
    sent = [message(1), message(2)]
    found = account(sent, [delivery(one) for one in (*sent, *sent)])
    assert (found.duplicates, found.reordered, found.violated) == (2, 0, False)


@pytest.mark.parametrize(
    ("kind", "replayed", "reordered"), [("transcript", True, 1), ("command", True, 1), ("command", False, 0)]
)
def test_only_a_live_command_may_overtake(kind: str, *, replayed: bool, reordered: int) -> None:
    first, second = message(1), message(2, kind)
    found = account([first, second], [delivery(second, replayed=replayed), delivery(first, replayed=True)])
    assert found.reordered == reordered


def test_a_live_command_may_not_come_behind_what_is_newer() -> None:
    first, second = message(1, "command"), message(2)
    assert account([first, second], [delivery(second), delivery(first)]).reordered == 1


@pytest.mark.parametrize(("after_s", "stale"), [(LIFE_S - 0.1, 0), (LIFE_S + 0.3, 1)])
def test_a_command_after_its_life_is_stale(after_s: float, stale: int) -> None:
    late = message(1, "command")
    assert account([late], [delivery(late, after_s=after_s)]).stale == stale


def test_one_number_for_two_messages_and_a_payload_against_its_schema_are_foreign() -> None:
    sent = [message(1)]
    assert account(sent, [delivery(sent[0]), delivery(message(1))]).foreign == 1
    whole = delivery(sent[0])
    assert account(sent, [Delivery(whole.topic, whole.body.replace(b'"language"', b'"tongue"'), 0)]).foreign == 1
    assert contract.TRANSCRIPT in whole.topic


@pytest.mark.parametrize(("kind", "overtook"), [("transcript", 0), ("command", 1)])
def test_only_what_was_in_flight_with_a_refused_message_may_come_before_it(kind: str, overtook: int) -> None:
    older, refused, also_refused, with_both, later = (message(seq + 1, kind) for seq in range(5))
    both = {with_both.id}
    in_flight_with = {refused.id: {also_refused.id, *both}, also_refused.id: both}

    def reordered(*delivered: Message) -> int:
        arrived = [delivery(one) for one in delivered]
        return settle(Account("books"), [], arrived, in_flight_with=in_flight_with).reordered

    assert reordered(older, with_both, refused, also_refused, later) == 0
    assert reordered(older, with_both, also_refused, refused, later) == 0
    assert reordered(older, with_both, later, refused, also_refused) == 2
    assert reordered(with_both, older, refused, also_refused, later) == 1
    assert reordered(older, message(9, "command"), with_both, refused, also_refused, later) == 4 * overtook


def test_the_longest_wait_counts_a_command_that_came_as_expired_and_one_that_never_came() -> None:
    backlog, prompt, expired, never = (message(seq, "command") for seq in range(1, 5))
    sent = (backlog, prompt, expired, never, message(5))
    promised = [Promise(one.seq, one.id, one.category, one.expires_ns or 0) for one in sent]
    at_its_end = RENDERER.message(expired, replayed=False, life_left_s=0.0)
    late_ns = expired.created_ns + 3 * clock.NS_PER_S
    history = delivery(backlog, replayed=True, after_s=60.0)
    came = [history, delivery(prompt, after_s=0.1), Delivery(at_its_end.topic, at_its_end.body, late_ns)]
    end_ns = never.created_ns + 5 * clock.NS_PER_S
    waits = figures.command_waits_s(promised, came, LIFE_S, end_ns)
    assert waits == pytest.approx([0.1, 3.0, 5.0], abs=0.05)


def test_the_tables_replace_what_an_earlier_run_wrote_into_the_document(tmp_path: Path) -> None:
    document = tmp_path / "reliability.md"
    shipped = (CHECKOUT / "docs" / "reliability.md").read_text(encoding="utf-8")
    document.write_text(shipped, encoding="utf-8")
    for text in ("first run", "second run"):
        report.put_into(document, [text])
    written = document.read_text(encoding="utf-8")
    before, _, after = written.partition(f"{report.BEGIN}\n\nsecond run\n\n{report.END}")
    assert shipped.startswith(before)
    assert after
    assert shipped.endswith(after)
    document.write_text("no place", encoding="utf-8")
    with pytest.raises(ValueError, match="has no line"):
        report.put_into(document, ["lost"])
