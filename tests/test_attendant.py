"""What an MES asks of a running device: the daemon as a process, a real broker, real speech."""

from __future__ import annotations

import asyncio
import json
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_asr import attendant, audit, model_store
from edge_asr.attendant import BURST
from edge_asr.outbox import read_statistics
from edge_asr.requests import RequestError
from tests.broker import Broker, Received, Requester, Subscriber
from tests.test_daemon import COMMAND, RECORDINGS, running, write_settings

ROOT = "acme/voice/press-07"
START = RECORDINGS / "01-start-line-three.flac"
"""A risky command: it waits for a yes."""

LINES = """\
language: en
intents:
  HaltEverything: {sentences: ["[emergency] stop"]}
tests:
  - {say: emergency stop, intent: HaltEverything}
"""


@pytest.fixture
def mes(broker: Broker) -> Iterator[Requester]:
    with Requester(broker, ROOT) as requester:
        yield requester


@pytest.fixture
def subscriber(broker: Broker) -> Iterator[Subscriber]:
    with Subscriber(broker) as everybody:
        yield everybody


@pytest.fixture
def settings(broker: Broker, tmp_path: Path) -> Path:
    return write_settings(tmp_path, broker.port)


def first(subscriber: Subscriber, suffix: str, number: int = 1) -> Received:
    """The first, or another, message on a topic."""
    subscriber.wait_for(lambda m: sum(x.topic.endswith(suffix) for x in m) >= number, f"{suffix} {number}")
    return subscriber.on(suffix)[number - 1]


def ready(subscriber: Subscriber) -> None:
    """Wait until the device has said that it is there: from then on it hears requests."""
    subscriber.wait_for(
        lambda m: [x.data["state"] for x in m if x.topic == f"{ROOT}/status"][-1:] == ["online"], "birth"
    )


def state(subscriber: Subscriber, *, muted: bool) -> None:
    """Wait for a status that says so."""
    subscriber.wait_for(lambda m: [x.data["muted"] for x in m if x.topic == f"{ROOT}/status"][-1:] == [muted], "status")


def question(subscriber: Subscriber, number: int = 1) -> dict[str, Any]:
    """What an MES sends to answer the question that was asked last."""
    data = first(subscriber, "evt/pending", number).data
    return {key: data[key] for key in ("pending_id", "confirmations_left")}


def test_a_question_is_answered_by_request_once_and_only_by_its_name(
    settings: Path, mes: Requester, subscriber: Subscriber
) -> None:
    with running(settings) as box:
        box.say(START)
        asked = question(subscriber)
        assert mes.ask("confirm", {**asked, "pending_id": str(uuid.uuid4())})["reason"] == "not-pending"
        assert mes.ask("confirm", {**asked, "confirmations_left": 2})["reason"] == "not-pending"
        (open_question,) = mes.ask("status")["pending"]
        assert open_question["read_back"] == "start line three?"
        assert mes.ask("confirm", asked)["confirmations_left"] == 0
        command = first(subscriber, "evt/command").data
        assert (command["confirmed"], command["confirmed_by"]) == (True, "request")
        assert mes.ask("confirm", asked)["reason"] == "not-pending"
        box.say(START)
        assert mes.ask("cancel", {"pending_id": question(subscriber, 2)["pending_id"]})["outcome"] == "ok"
        assert first(subscriber, "evt/rejected").data["reason"] == "cancelled"
        assert mes.ask("status")["pending"] == []
        assert box.hang_up() == 0
    assert len(subscriber.on("evt/command")) == 1


def test_a_command_that_wants_a_role_is_confirmed_by_it_and_by_no_voice(
    tmp_path: Path, broker: Broker, mes: Requester, subscriber: Subscriber
) -> None:
    grammar = tmp_path / "site.yaml"
    answers = "  Confirm: {sentences: [confirm], answer: confirm}\n"
    stop = '  Stop: {sentences: ["emergency stop"], roles: [supervisor]}\n'
    grammar.write_text(f"language: en\nintents:\n{stop}{answers}", encoding="utf-8")
    with running(write_settings(tmp_path, broker.port, commands={"grammars": [str(grammar)]})) as box:
        box.say(COMMAND)
        assert first(subscriber, "evt/pending").data["roles"] == ["supervisor"]
        box.say(RECORDINGS / "01b-confirm.flac")
        assert first(subscriber, "evt/rejected").data["reason"] == "not-allowed"
        assert mes.ask("confirm", question(subscriber))["reason"] == "not-allowed"
        assert mes.ask("confirm-worker", question(subscriber))["reason"] == "not-allowed"
        assert mes.ask("confirm-supervisor", question(subscriber))["outcome"] == "ok"
        assert first(subscriber, "evt/command").data["intent"] == "Stop"


def test_what_was_said_is_said_again_and_commands_nothing(
    settings: Path, mes: Requester, subscriber: Subscriber
) -> None:
    with running(settings) as box:
        ready(subscriber)
        assert mes.ask("say-again")["reason"] == "nothing-said"
        box.say(COMMAND)
        command = first(subscriber, "evt/command").data
        again = mes.ask("say-again", {"source": "stdin"})
        assert (again["said"], again["said_id"], again["text"]) == ("command", command["id"], "emergency stop")
        assert first(subscriber, "live/again").data["text"] == "emergency stop"
        assert mes.ask("say-again", {"source": "another"})["reason"] == "nothing-said"
        box.say(START)
        asked = question(subscriber)
        again = mes.ask("say-again")
        assert (again["said"], again["said_id"], again["text"]) == ("pending", asked["pending_id"], "start line three?")
        assert box.hang_up() == 0
    assert len(subscriber.on("evt/command")) == 1


def test_a_closed_ear_hears_nothing_until_it_is_opened_also_after_a_restart(
    settings: Path, mes: Requester, subscriber: Subscriber
) -> None:
    with running(settings) as box:
        box.say(START)
        question(subscriber)
        assert mes.ask("mute")["outlives_restart"] is True
        assert first(subscriber, "evt/rejected").data["reason"] == "not-confirmed"
        state(subscriber, muted=True)
        box.say(COMMAND)
        assert box.hang_up() == 0
    with running(settings) as box:
        ready(subscriber)
        status = mes.ask("status")
        assert (status["muted"], status["reason"]) == (True, "muted by request")
        assert subscriber.on("/meta")[-1].data["standing"] == ["muted"]
        box.say(COMMAND)
        assert mes.ask("unmute")["muted"] is False
        box.say(COMMAND)
        first(subscriber, "evt/command")
        assert box.hang_up() == 0
    assert len(subscriber.on("evt/command")) == 1


def test_a_list_of_hotwords_is_used_outlives_a_restart_and_is_taken_whole_or_not_at_all(
    settings: Path, mes: Requester, subscriber: Subscriber
) -> None:
    with running(settings) as box:
        ready(subscriber)
        taken = mes.ask("hotwords", {"phrases": ["EMERGENCY", {"phrase": "palletizer", "weight": 3}]})
        assert taken["hotwords"] == 2
        refused = mes.ask("hotwords", {"phrases": ["good", "...", "机器", "good"]})
        assert {each["item"] for each in refused["problems"]} == {"...", "good"}
        refused = mes.ask("hotwords", {"phrases": ["good", "机器"]})
        assert refused["problems"] == [{"item": "机器", "problem": "the model cannot write it; give it `spoken`"}]
    with running(settings) as box:
        box.say(COMMAND)
        assert first(subscriber, "evt/transcript").data["text"] == "EMERGENCY stop"
        meta = subscriber.on("/meta")[-1].data
        assert (meta["hotwords"], meta["hotwords_sha256"]) == (2, taken["hotwords_sha256"])
        assert mes.ask("hotwords", {"restore": True})["hotwords"] == 0
        box.say(COMMAND)
        assert first(subscriber, "evt/transcript", 2).data["text"] == "emergency stop"
        assert subscriber.on("/meta")[-1].data["standing"] == []


def test_a_grammar_is_used_outlives_a_restart_and_is_taken_only_if_it_keeps_what_it_promises(
    settings: Path, mes: Requester, subscriber: Subscriber
) -> None:
    with running(settings) as box:
        ready(subscriber)
        assert mes.ask("grammar", {"grammar": LINES})["name"] == "factory.en"
        box.say(COMMAND)
        assert first(subscriber, "evt/command").data["intent"] == "HaltEverything"
        shown = subscriber.on("/meta")[-1].data
        assert list(shown["grammars"]) == ["factory.en"]
        assert shown["standing"] == ["grammar factory.en"]
        wrong = {
            "test 'start'": LINES + "  - {say: start, intent: HaltEverything}\n",
            "is missing": LINES.replace("[emergency]", "[emergency"),
            "YAML alias": "a: &a [1]\nb: [*a, *a]\n" + LINES,
        }
        for words, text in wrong.items():
            assert words in mes.ask("grammar", {"grammar": text})["detail"]
        assert mes.ask("grammar", {"grammar": LINES, "name": "another"})["reason"] == "unusable"
    with running(settings) as box:
        box.say(COMMAND)
        assert first(subscriber, "evt/command", 2).data["intent"] == "HaltEverything"
        assert mes.ask("grammar", {"restore": True})["outcome"] == "ok"
        box.say(COMMAND)
        assert first(subscriber, "evt/command", 3).data["intent"] == "EmergencyStop"
        assert subscriber.on("/meta")[-1].data["grammars"] != shown["grammars"]


def test_a_grammar_that_takes_too_much_to_look_through_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attendant, "LOOK_LIMIT_S", 1)  # of the four or so that these take
    slots = "".join(f"  {name}: {{range: [0, 99999]}}\n" for name in "abc")
    grammar = tmp_path / "site.yaml"
    grammar.write_text(
        f'language: en\nslots:\n{slots}intents:\n  Set: {{sentences: ["set {{a}} then {{b}} and {{c}}"]}}\n',
        encoding="utf-8",
    )
    model = model_store.locate("micro-en").model.parent
    with pytest.raises(RequestError, match="are not enough"):
        asyncio.run(attendant.look_through(grammar, "site", model))


def test_receipts_are_counted_and_a_missing_one_raises_an_alarm(
    tmp_path: Path, broker: Broker, mes: Requester, subscriber: Subscriber
) -> None:
    with running(write_settings(tmp_path, broker.port, requests={"receipt_within_s": 2})) as box:
        for number in (1, 2):
            box.say(COMMAND)
            first(subscriber, "evt/command", number)
        answered, missed = (message.data["id"] for message in subscriber.on("evt/command"))
        assert mes.ask("receipt", {"command_id": answered, "verdict": "accepted"})["outcome"] == "ok"
        alarm = first(subscriber, "evt/alarm").data
        assert alarm["kind"] == "receipt-missing"
        assert missed in alarm["detail"]
        box.wait_for_log(f"alarm receipt-missing raised: no receipt for command {missed} within 2 s; see whether")
        assert mes.ask("receipt", {"command_id": str(uuid.uuid4()), "verdict": "accepted"})["reason"] == (
            "unknown-command"
        )
        assert box.hang_up() == 0
    outbox = read_statistics(tmp_path / "state" / "outbox.db")
    assert outbox.receipts == {"accepted": 1, "rejected": 0, "missing": 1}


def test_requests_to_a_device_that_is_away_do_not_act_when_it_is_back_but_receipts_do(
    settings: Path, mes: Requester, subscriber: Subscriber
) -> None:
    with running(settings) as box:
        box.say(COMMAND)
        command = first(subscriber, "evt/command").data["id"]
    muted = mes.send("mute")
    receipt = mes.send("receipt", {"command_id": command, "verdict": "rejected", "reason": "the press is locked"})
    with running(settings):
        assert mes.answers(muted)[0]["reason"] == "stale"
        assert mes.answers(receipt)[0]["outcome"] == "ok"
        assert mes.ask("status")["muted"] is False


def test_a_request_that_comes_twice_acts_once_and_is_answered_twice(
    settings: Path, mes: Requester, subscriber: Subscriber
) -> None:
    with running(settings) as box:
        box.say(START)
        asked = question(subscriber)
        for _ in range(2):
            mes.send("confirm", asked, correlation=b"yes")
        first_answer, second_answer = mes.answers(b"yes", 2)
        assert first_answer["outcome"] == second_answer["outcome"] == "ok"
        mes.send("mute", correlation=b"yes")
        assert mes.answers(b"yes", 3)[2]["reason"] == "conflict"
        assert box.hang_up() == 0
    assert len(subscriber.on("evt/command")) == 1


def test_settings_are_read_again_by_request(
    tmp_path: Path, broker: Broker, mes: Requester, subscriber: Subscriber
) -> None:
    settings = write_settings(tmp_path, broker.port)
    with running(settings):
        ready(subscriber)
        settings.write_text("commands: [", encoding="utf-8")
        assert "settings.yaml" in mes.ask("reload")["detail"]
        write_settings(tmp_path, broker.port, device="another-name")
        assert mes.ask("reload")["restart_needed"] == ["device"]


def test_a_request_that_changed_something_is_in_the_audit_log(
    tmp_path: Path, broker: Broker, mes: Requester, subscriber: Subscriber
) -> None:
    with running(write_settings(tmp_path, broker.port, audit={"enabled": True})):
        ready(subscriber)
        for verb in ("status", "mute", "nonsense", "unmute"):
            mes.ask(verb)
    (log,) = (tmp_path / "state" / "audit").glob(audit.FILES)
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [each["verb"] for each in records if each["what"] == "request"] == ["mute", "unmute"]


def test_a_device_that_allows_nothing_listens_to_nothing(
    tmp_path: Path, broker: Broker, mes: Requester, subscriber: Subscriber
) -> None:
    with running(write_settings(tmp_path, broker.port, requests={"allow": ["ping"]})) as box:
        ready(subscriber)
        assert mes.ask("mute")["reason"] == "not-allowed"
        assert mes.ask("ping")["outcome"] == "ok"
    with running(write_settings(tmp_path, broker.port, requests={"allow": []})) as box:
        correlation = mes.send("ping")
        box.say(COMMAND)
        first(subscriber, "evt/command")
        assert box.hang_up() == 0
    with pytest.raises(pytest.fail.Exception):
        mes.answers(correlation, limit_s=0.1)


def test_a_flood_of_requests_crowds_out_neither_speech_nor_an_orderly_request(
    broker: Broker, settings: Path, mes: Requester, subscriber: Subscriber
) -> None:
    stop = threading.Event()

    def flood(attacker: Requester) -> None:
        while not stop.is_set():
            attacker.send("status", qos=0)

    with running(settings) as box, Requester(broker, ROOT, client_id="attacker", answers="attacker") as attacker:
        ready(subscriber)
        thread = threading.Thread(target=flood, args=(attacker,))
        thread.start()
        try:
            box.say(COMMAND)
            first(subscriber, "evt/command")
            assert mes.ask("ping")["outcome"] == "ok"
        finally:
            stop.set()
            thread.join()
        assert box.hang_up() == 0
        assert attacker.sent > BURST
