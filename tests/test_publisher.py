"""What reaches a subscriber: everything, in order, once or again under the same id, and no command too late."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import Self

from edge_asr import clock, contract, delivery, link, publisher, refusals
from edge_asr.confirmation import Pending
from edge_asr.contract import Renderer
from edge_asr.events import Command, Draft, Rejection, Token, Transcript, Utterance, new_id
from edge_asr.link import WINDOW
from edge_asr.outbox import Outbox
from edge_asr.publisher import Publisher
from edge_asr.refusals import ENDINGS, REFUSALS
from edge_asr.settings import Mqtt
from tests.broker import PATIENCE_S, Broker, Pki, Received, Subscriber, free_port
from tests.payloads import complaint

ROOT = "acme/hall-2/voice/edge01"
RENDERER = Renderer(ROOT, "edge01")
HEARD = Transcript("stop line three", "en", "NEUTRAL", "Speech", 0.9, (Token("stop", 0.4),))
MODEL = ("micro-en", "0" * 64, ("en",), "onnxruntime", "cpu", "cpu")
META = contract.Meta("0.1.0", *MODEL, {}, ("microphone",), 0, "a" * 64, ())


def new_folder(parent: Path, name: str) -> Path:
    folder = parent / name
    folder.mkdir()
    return folder


def spoken(ended_s_ago: float = 0.1) -> Utterance:
    return Utterance(
        new_id(), "microphone", 0, bytes(32_000), clock.boottime_ns() - round(ended_s_ago * clock.NS_PER_S)
    )


def transcript(text: str = "stop line three") -> Draft:
    heard = Transcript(text, "en", "NEUTRAL", "Speech", 0.9, (Token("stop", 0.4),))
    return contract.transcript_draft(spoken(), heard, model="micro-en")


def command(ttl_s: float = 10.0, *, ended_s_ago: float = 0.1) -> Draft:
    said = Command("stop", {"line": 3}, 0.93, "normal", ttl_s)
    return contract.command_draft(spoken(ended_s_ago), HEARD, said, model="micro-en")


def rejection() -> Draft:
    return contract.rejection_draft(spoken(), Rejection("not-understood", "no sentence fits"), HEARD, model="micro-en")


@contextlib.asynccontextmanager
async def publishing(
    mqtt: Mqtt, outbox: Outbox, renderer: Renderer = RENDERER, **more: Any
) -> AsyncIterator[Publisher]:
    """A running publisher; whatever else than being cancelled ends it fails the test."""
    running = Publisher(mqtt, renderer, outbox, **more)
    task = asyncio.create_task(running.run(), name="publisher")
    try:
        yield running
    finally:
        while not task.done():  # again, as the daemon does: before Python 3.12 wait_for may swallow a cancellation
            task.cancel()
            await asyncio.wait([task], timeout=2)
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], Awaitable[object] | object], what: str) -> None:
    """For what the event loop is told and a test is not."""
    end = asyncio.get_running_loop().time() + PATIENCE_S
    while True:
        holds = condition()
        if await holds if isinstance(holds, Awaitable) else holds:
            return
        if asyncio.get_running_loop().time() > end:
            pytest.fail(f"waited {PATIENCE_S} s in vain: {what}")
        await asyncio.sleep(0.005)


async def received(subscriber: Subscriber, condition: Callable[[list[Received]], object], what: str) -> None:
    await asyncio.to_thread(subscriber.wait_for, condition, what)


async def emptied(outbox: Outbox) -> bool:
    return not await outbox.oldest(1)


def events(messages: Sequence[Received]) -> list[Received]:
    """The messages of the outbox."""
    return [message for message in messages if "/evt/" in message.topic]


def seqs(messages: Sequence[Received]) -> list[int]:
    return [message.data["seq"] for message in messages]


def first_deliveries(messages: Sequence[Received]) -> list[Received]:
    """As a consumer does: drop the ids that were seen before. A duplicate must be the same message."""
    first: dict[str, Received] = {}
    for message in messages:
        known = first.setdefault(message.data["id"], message)
        assert known.data["seq"] == message.data["seq"]
    return list(first.values())


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(main)


# -- delivery


def test_what_is_appended_arrives_in_order_described_by_its_properties_and_leaves_the_outbox(
    broker: Broker, outbox: Outbox
) -> None:
    async def main() -> None:
        with Subscriber(broker) as subscriber:
            async with publishing(broker.mqtt(), outbox) as running:
                await until(lambda: running.connected, "a connection")
                for n in range(20):
                    await outbox.append(transcript(f"number {n}"), command())
                await received(subscriber, lambda got: len(got) >= 41, "all messages")
                await until(lambda: emptied(outbox), "an empty outbox")
            got = events(subscriber.messages)
            assert seqs(got) == list(range(1, 41))
            assert [message.topic for message in got[:2]] == [f"{ROOT}/evt/transcript", f"{ROOT}/evt/command"]
            assert not any(message.data["replayed"] for message in got)
            for message in got:
                assert (message.qos, message.retained) == (1, False)
                assert message.properties["ContentType"] == "application/cloudevents+json"
                assert ("seq", str(message.data["seq"])) in message.properties["UserProperty"]
                if message.topic.endswith("command"):
                    assert 8 <= message.properties["MessageExpiryInterval"] <= 10
                else:
                    assert "MessageExpiryInterval" not in message.properties

    run(main())


def test_what_waited_for_the_connection_is_marked_as_replayed(broker: Broker, outbox: Outbox) -> None:
    async def main() -> None:
        await outbox.append(transcript(), transcript())
        with Subscriber(broker) as subscriber:
            async with publishing(broker.mqtt(), outbox):
                await received(subscriber, lambda got: len(events(got)) == 2, "the backlog")
                await outbox.append(transcript())
                await received(subscriber, lambda got: len(events(got)) == 3, "the live message")
            assert [message.data["replayed"] for message in events(subscriber.messages)] == [True, True, False]

    run(main())


def test_a_live_command_goes_before_the_backlog_and_nothing_else_changes_its_place(
    tmp_path: Path, outbox: Outbox
) -> None:
    async def main() -> None:
        await asyncio.gather(*(outbox.append(transcript()) for _ in range(600)))
        with Broker(new_folder(tmp_path, "fast"), durable=False) as broker, Subscriber(broker) as subscriber:
            async with publishing(broker.mqtt(), outbox):
                await received(subscriber, lambda got: len(got) > 20, "the beginning of the backlog")
                await outbox.append(transcript(), command())
                await outbox.append(transcript())
                await received(subscriber, lambda got: len(events(got)) == 603, "everything")
            got = seqs(events(subscriber.messages))
        assert got.index(602) < 500
        got.remove(602)
        assert got == [*range(1, 602), 603]

    run(main())


def test_the_backlog_is_paced_and_what_is_new_is_not(broker: Broker, outbox: Outbox) -> None:
    """The pace leaves the broker's queue short, in which a live command waits for a slow consumer."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        await outbox.append(*[transcript()] * 60)
        with Subscriber(broker) as subscriber:
            began_s = loop.time()
            async with publishing(broker.mqtt(replay_per_s=20), outbox):
                await received(subscriber, lambda got: len(events(got)) >= 60, "the backlog")
                assert loop.time() - began_s >= (60 - WINDOW) / 20
                before_s = loop.time()
                await outbox.append(*[transcript()] * 120)
                await received(subscriber, lambda got: len(events(got)) >= 180, "what is new")
                assert loop.time() - before_s < 120 / 20, "no slower than the pace would be"
            assert seqs(events(subscriber.messages)) == list(range(1, 181))

    run(main())


def test_in_plain_mode_the_flat_data_arrives(broker: Broker, outbox: Outbox) -> None:
    async def main() -> None:
        with Subscriber(broker) as subscriber:
            async with publishing(broker.mqtt(), outbox, Renderer(ROOT, "edge01", "plain")):
                await outbox.append(transcript("hello"))
                await received(subscriber, lambda got: len(events(got)) == 1, "the message")
            (message,) = events(subscriber.messages)
        assert message.payload["text"] == "hello"

    run(main())


@pytest.mark.parametrize(("end", "brokers_own_loss"), [(Broker.stop, 0), (Broker.kill, 2 * WINDOW)])
def test_a_broker_that_restarts_under_load_gets_everything_in_order_and_duplicates_under_the_same_id(
    broker: Broker, outbox: Outbox, end: Callable[[Broker], None], brokers_own_loss: int
) -> None:
    """Even with durable settings mosquitto acknowledges what one turn of its loop brought before it saves it."""

    async def main(broker: Broker, subscriber: Subscriber) -> None:
        done = False

        async def speak() -> None:
            while not done:
                await outbox.append(transcript())
                await asyncio.sleep(0.003)

        async def caught_up() -> None:
            newest = outbox.last_seq
            await received(subscriber, lambda got: any(seq >= newest for seq in seqs(events(got))), f"message {newest}")

        async with publishing(broker.mqtt(), outbox) as running:
            speaking = asyncio.create_task(speak())
            for _ in range(2):
                await until(lambda: running.connected, "a connection")
                await outbox.append(transcript())
                await caught_up()
                await asyncio.to_thread(end, broker)
                await asyncio.to_thread(broker.start)
            done = True
            await speaking
            await caught_up()
            await until(lambda: emptied(outbox), "an empty outbox")
        first = seqs(first_deliveries(events(subscriber.messages)))
        assert first == sorted(first)
        assert outbox.last_seq - len(first) <= brokers_own_loss
        sent_again = [message for message in events(subscriber.messages) if not message.duplicate]
        assert len(sent_again) - len(first) <= 2 * 2 * WINDOW

    with Subscriber(broker) as subscriber:
        run(main(broker, subscriber))


def test_a_broker_that_is_killed_after_it_has_saved_delivers_everything_to_a_subscriber_that_was_away(
    broker: Broker, outbox: Outbox
) -> None:
    async def main() -> None:
        async with publishing(broker.mqtt(), outbox):
            messages = await asyncio.gather(*(outbox.append(transcript()) for _ in range(300)))
            await until(lambda: emptied(outbox), "an empty outbox")
            newest = messages[-1][0].id.encode()
            await until(lambda: newest in (broker.folder / "mosquitto.db").read_bytes(), "the broker to save")
            broker.restart()
        with Subscriber(broker) as subscriber:
            await received(subscriber, lambda got: len(events(got)) >= 300, "all of them")
            assert seqs(events(subscriber.messages)) == list(range(1, 301))

    with Subscriber(broker):
        pass  # its session stays and collects
    run(main())


def test_a_smaller_window_of_the_brokers_is_respected(tmp_path: Path, outbox: Outbox) -> None:
    async def main() -> None:
        with Broker(new_folder(tmp_path, "narrow"), extra="max_inflight_messages 2", durable=False) as broker:
            await asyncio.gather(*(outbox.append(transcript()) for _ in range(300)))
            with Subscriber(broker) as subscriber:
                async with publishing(broker.mqtt(), outbox):
                    await received(subscriber, lambda got: len(events(got)) >= 300, "everything")
                assert seqs(events(subscriber.messages)) == list(range(1, 301))

    run(main())


# -- a broker that says no


def test_a_refused_message_is_put_aside_after_its_tries_and_nothing_overtakes_it(
    tmp_path: Path, outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    folder = new_folder(tmp_path, "acl")
    """Mosquitto 2.0.11 hangs up after such a PUBACK, which then may be lost: then it takes some more tries."""
    rules = folder / "rules"
    rules.write_text(f"topic readwrite #\ntopic deny {ROOT}/evt/command\n", encoding="ascii")
    rules.chmod(0o600)
    log = folder / "mosquitto.log"

    def denials() -> int:
        return log.read_text(encoding="utf-8").count("Denied PUBLISH")

    async def main() -> None:
        with Broker(folder, extra=f"acl_file {rules}\nlog_type all") as broker, Subscriber(broker) as subscriber:
            async with publishing(broker.mqtt(), outbox):
                await outbox.append(transcript("before"), command(60))
                await until(denials, "the first refusal")
                await outbox.append(*[transcript("after")] * 20)
                await received(subscriber, lambda got: len(events(got)) == 21, "the messages after")
                assert denials() >= REFUSALS
                assert (await outbox.statistics()).dead_letters == 1
            assert seqs(first_deliveries(events(subscriber.messages))) == [1, *range(3, 23)]

    run(main())
    assert "message 2 is put aside as a dead letter: the broker refused it: Not authorized" in caplog.text


class ScriptedBroker:
    """As much MQTT 5 as it takes to answer each PUBLISH of an event as a script says; for what no real broker does."""

    def __init__(self, script: Callable[[int], int | None], receive_maximum: int = 65_535) -> None:
        """``script`` gets a message's seq and returns the PUBACK's reason code; None: hang up instead."""
        self._script = script
        self._connack = b"\x20\x06\x00\x00\x03\x21" + receive_maximum.to_bytes(2, "big")
        self.states: list[str] = []
        """Of ``status``, in order."""
        self.taken: list[int] = []
        """Sequence numbers acknowledged, in order."""
        self.tries: list[int] = []
        self.topics: dict[int, str] = {}
        """The latest of each message."""
        self.most_unanswered = 0
        self._unanswered: list[tuple[bytes, int]] = []
        self.hold = 1
        """Answers are kept back until so many are due, and are then given last first."""
        self._invalid: list[str] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._talk, "127.0.0.1", 0)
        self.mqtt = Mqtt(host="127.0.0.1", port=self._server.sockets[0].getsockname()[1], max_retry_s=1)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()
        assert self._invalid == []

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._unanswered.clear()
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), closing(writer):
            while True:
                kind, flags, body = await self._packet(reader)
                if kind == 1:
                    writer.write(self._connack)
                elif kind == 3:
                    topic_ends = 2 + int.from_bytes(body[:2], "big")
                    topic = body[2:topic_ends].decode()
                    problem = complaint(topic, json.loads(body[body.index(b'{"') :]))
                    self._invalid += [problem] if problem else []
                    state = re.search(rb'"state":"(\w+)"', body)
                    self.states += [state[1].decode()] if state else []
                    if not flags & 6:  # QoS 0
                        continue
                    packet_id = body[topic_ends : topic_ends + 2]
                    seq = re.search(rb'"seq":(\d+)', body)
                    code = self._answer(int(seq[1]), topic) if seq else 0
                    if code is None:
                        return
                    self._unanswered.append((packet_id, code))
                    self.most_unanswered = max(self.most_unanswered, len(self._unanswered))
                    if len(self._unanswered) >= self.hold:
                        for due_id, due_code in reversed(self._unanswered):
                            writer.write(b"\x40\x03" + due_id + bytes([due_code]))
                        self._unanswered.clear()
                elif kind == 14:
                    return

    def _answer(self, seq: int, topic: str) -> int | None:
        self.tries.append(seq)
        self.topics[seq] = topic
        code = self._script(seq)
        if code == 0:
            self.taken.append(seq)
        return code

    @staticmethod
    async def _packet(reader: asyncio.StreamReader) -> tuple[int, int, bytes]:
        (first,) = await reader.readexactly(1)
        length = shift = 0
        while True:
            (digit,) = await reader.readexactly(1)
            length |= (digit & 127) << shift
            shift += 7
            if digit < 128:
                return first >> 4, first & 15, await reader.readexactly(length)


def test_a_refused_message_that_is_taken_later_keeps_its_place(outbox: Outbox) -> None:
    refusals = iter([0x97, 0x97])  # quota exceeded

    async def main() -> None:
        await asyncio.gather(*(outbox.append(transcript()) for _ in range(100)))
        async with ScriptedBroker(lambda seq: next(refusals, 0) if seq == 40 else 0) as broker:
            async with publishing(broker.mqtt, outbox):
                await until(lambda: emptied(outbox), "an empty outbox")
            in_flight_with_it = [seq for seq in broker.taken[: broker.taken.index(40)] if seq > 40]
            assert len(in_flight_with_it) < WINDOW
            assert broker.taken == sorted(
                range(1, 101), key=lambda seq: max(in_flight_with_it, default=39) + 0.5 if seq == 40 else seq
            )
            assert broker.tries.count(40) == 3
            assert len(broker.tries) == 102

    run(main())


def test_a_live_command_that_is_refused_once_goes_again_before_the_backlog_and_before_newer_commands(
    outbox: Outbox,
) -> None:
    refusals = iter([0x97])  # quota exceeded

    async def main() -> None:
        await outbox.append(*[transcript()] * 300)
        async with ScriptedBroker(lambda seq: next(refusals, 0) if seq == 301 else 0) as broker:
            async with publishing(broker.mqtt.model_copy(update={"replay_per_s": 200}), outbox):
                await until(lambda: len(broker.tries) > 20, "the beginning of the backlog")
                await outbox.append(command())
                await until(lambda: 301 in broker.tries, "the refusal")
                await outbox.append(command())
                await until(lambda: emptied(outbox), "an empty outbox")
            first, second = broker.taken.index(301), broker.taken.index(302)
            assert first < second < broker.taken.index(300)
            assert first - broker.tries.index(301) < WINDOW, "only what was in flight with it may pass"
            assert broker.tries.count(301) == 2
            assert sorted(broker.taken) == list(range(1, 303)), "nothing is sent twice"

    run(main())


def test_a_message_over_which_the_broker_always_hangs_up_does_not_hold_up_the_others_for_ever(
    outbox: Outbox, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "_FIRST_RETRY_S", 0.0)

    async def main() -> None:
        await asyncio.gather(*(outbox.append(transcript()) for _ in range(60)))
        async with ScriptedBroker(lambda seq: None if seq == 20 else 0) as broker:
            async with publishing(broker.mqtt, outbox):
                await until(lambda: emptied(outbox), "an empty outbox")
            assert list(dict.fromkeys(broker.taken)) == [seq for seq in range(1, 61) if seq != 20]
            assert broker.tries.count(20) == ENDINGS + 2, "with the others, alone, and once more after a witness"

    run(main())
    assert "message 20 is put aside as a dead letter: whenever it is sent, the connection was lost" in caplog.text


def test_hang_ups_and_refusals_over_one_message_are_counted_apart(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "_FIRST_RETRY_S", 0.0)
    hang_ups: list[int | None] = [None] * (REFUSALS + 1)
    answers = iter([*hang_ups, *[0x97] * (REFUSALS - 1)])

    async def main() -> None:
        await outbox.append(*[transcript()] * 40)
        async with ScriptedBroker(lambda seq: next(answers, 0) if seq == 20 else 0) as broker:
            async with publishing(broker.mqtt, outbox):
                await until(lambda: emptied(outbox), "an empty outbox")
            assert sorted(set(broker.taken)) == list(range(1, 41))
            assert (await outbox.statistics()).dead_letters == 0

    run(main())


def test_a_broker_that_dies_now_and_then_makes_no_dead_letters(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "_FIRST_RETRY_S", 0.0)
    luck = random.Random(7)  # noqa: S311 - repeatable

    async def main() -> None:
        await asyncio.gather(*(outbox.append(transcript()) for _ in range(200)))
        async with ScriptedBroker(lambda _: None if luck.random() < 0.1 else 0) as broker:
            async with publishing(broker.mqtt, outbox):
                await until(lambda: emptied(outbox), "an empty outbox")
            assert list(dict.fromkeys(broker.taken)) == list(range(1, 201))
            assert (await outbox.statistics()).dead_letters == 0

    run(main())


def test_late_acknowledgements_in_any_order_are_waited_for_within_the_window(outbox: Outbox) -> None:
    async def main() -> None:
        async with ScriptedBroker(lambda _: 0) as broker:
            async with publishing(broker.mqtt, outbox):
                await until(lambda: broker.states, "the answer to the birth")
                broker.hold = WINDOW
                await asyncio.gather(*(outbox.append(transcript()) for _ in range(WINDOW * 6)))
                await until(lambda: emptied(outbox), "an empty outbox")
            assert broker.taken == list(range(1, WINDOW * 6 + 1))
            assert broker.most_unanswered == WINDOW

    run(main())


@pytest.mark.parametrize("code", [0x97, 0x87, None])
def test_a_broker_that_refuses_everything_makes_no_dead_letters_and_gets_all_in_order_when_it_takes_them(
    outbox: Outbox, code: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quota exceeded, not authorized, and mosquitto's way: hanging up."""
    monkeypatch.setattr(publisher, "_FIRST_RETRY_S", 0.0)
    monkeypatch.setattr(refusals, "ENDINGS", 3)
    monkeypatch.setattr(refusals, "_TRY_AGAIN_S", 0.01)
    monkeypatch.setattr(refusals, "_FIRST_HOLD_S", 0.05)
    expires_ns = clock.boottime_ns() + 2 * clock.NS_PER_S
    refuses = True

    def answer(seq: int) -> int | None:
        """It changes its mind while the queue is held, after the last witness."""
        nonlocal refuses
        answered = code if refuses else 0
        refuses = refuses and (seq != 2 or not told or clock.boottime_ns() < expires_ns)
        return answered

    told: list[refusals.Trouble | None] = []

    async def main() -> None:
        changes = 0

        def changed() -> None:
            nonlocal changes
            changes += 1

        await outbox.append(*[transcript(), rejection()] * 20, command(3.0, ended_s_ago=0), command(60))
        async with ScriptedBroker(answer) as broker:
            async with publishing(broker.mqtt, outbox, on_change=changed) as running:
                await until(lambda: running.refusal, "the refusal to be noticed")
                trouble, told_of, at_first = running.refusal, changes, len(broker.tries)
                assert trouble is not None
                await until(lambda: len(broker.tries) > at_first + 8, "some pauses")
                await outbox.append(transcript("meanwhile"))
                statistics = await outbox.statistics()
                assert statistics.dead_letters == 0
                assert statistics.refusal.endswith(trouble.remedy)
                told.append(trouble)
                await until(lambda: emptied(outbox), "an empty outbox")
                await until(lambda: running.refusal is None, "the end of the refusal")
                assert changes > told_of
            assert broker.taken == list(range(1, 44))
            assert broker.topics[41].endswith("evt/expired")
            assert broker.topics[42].endswith("evt/command")
        statistics = await outbox.statistics()
        assert (statistics.refusal, statistics.dead_letters) == ("", 0)

    run(main())


def test_a_real_broker_whose_rules_forbid_everything_gets_it_all_once_they_are_mended(
    tmp_path: Path, outbox: Outbox
) -> None:
    """The state is refused as well, and mosquitto 2.0.11 hangs up over it before any message is sent."""
    folder = new_folder(tmp_path, "acl")
    rules = folder / "rules"
    rules.write_text("topic read #\n", encoding="ascii")
    rules.chmod(0o600)

    async def main() -> None:
        with Broker(folder, extra=f"acl_file {rules}") as broker, Subscriber(broker) as subscriber:
            await outbox.append(*[transcript()] * 3, rejection())
            async with publishing(broker.mqtt(), outbox) as running:
                await until(lambda: running.refusal, "the refusal to be noticed")
                assert running.refusal
                assert "access rules" in running.refusal.remedy
                assert (await outbox.statistics()).dead_letters == 0
                rules.write_text("topic readwrite #\n", encoding="ascii")
                broker.reload()
                await received(subscriber, lambda got: len(events(got)) >= 4, "everything")
                await until(lambda: running.refusal is None, "the end of the refusal")
            assert seqs(first_deliveries(events(subscriber.messages))) == [1, 2, 3, 4]

    run(main())


def test_one_forbidden_topic_goes_to_the_dead_letters_and_the_others_to_the_broker(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "_TRY_AGAIN_S", 0.01)
    monkeypatch.setattr(refusals, "_FIRST_HOLD_S", 0.05)

    async def main() -> None:
        await outbox.append(*[transcript()] * 40, rejection(), command(60), *[transcript()] * 3)
        async with ScriptedBroker(lambda seq: 0 if seq in {41, 42} else 0x87) as broker:
            async with publishing(broker.mqtt, outbox) as running:
                await until(lambda: emptied(outbox), "an empty outbox")
                assert running.refusal is None
            assert sorted(broker.taken) == [41, 42]
            assert min(Counter(broker.tries)[seq] for seq in (*range(1, 41), 43, 44, 45)) >= REFUSALS
        assert (await outbox.statistics()).refused == {"transcript": 43, "rejection": 0, "alarm": 0, "command": 0}

    run(main())


def test_what_is_alone_and_refused_waits_until_something_else_says_whether_it_is_the_only_one(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "_TRY_AGAIN_S", 0.01)
    monkeypatch.setattr(refusals, "_FIRST_HOLD_S", 3600.0)

    async def main() -> None:
        await outbox.append(*[transcript()] * 2)
        async with ScriptedBroker(lambda seq: 0x87 if seq < 3 else 0) as broker:
            async with publishing(broker.mqtt.model_copy(update={"max_retry_s": 3600.0}), outbox) as running:
                await until(lambda: running.refusal, "the refusal to be noticed")
                assert (await outbox.statistics()).dead_letters == 0
                await outbox.append(command(10))
                await until(lambda: 3 in broker.taken, "the command, for which no pause is waited out")
                await until(lambda: emptied(outbox), "an empty outbox")
            assert (await outbox.statistics()).dead_letters == 2

    run(main())


def test_a_quota_of_one_message_at_a_time_makes_no_dead_letters(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is taken after it was refused says nothing against what is refused next."""
    monkeypatch.setattr(refusals, "_TRY_AGAIN_S", 0.01)
    monkeypatch.setattr(refusals, "_FIRST_HOLD_S", 0.05)
    head, renewed = 1, False

    def drip(seq: int) -> int:
        nonlocal head, renewed
        if seq == head and renewed:
            head, renewed = head + 1, False
            return 0
        renewed = renewed or seq > head  # while the queue is held after a witness
        return 0x97

    async def main() -> None:
        await outbox.append(*[transcript(), rejection()] * 6)
        async with ScriptedBroker(drip) as broker:
            async with publishing(broker.mqtt, outbox):
                await until(lambda: head == 12, "all but the last")
                await outbox.append(transcript())
                await until(lambda: head == 13, "the last")
            assert broker.taken == list(range(1, 13))
            assert (await outbox.statistics()).dead_letters == 0

    run(main())


def test_states_and_the_farewell_keep_to_the_brokers_receive_maximum(outbox: Outbox) -> None:
    """HiveMQ's is 10; here it is 2, and the broker keeps its answers back."""

    async def main() -> None:
        await outbox.append(*[transcript()] * 50)
        async with ScriptedBroker(lambda _: 0, receive_maximum=2) as broker:
            broker.hold = 2
            async with publishing(broker.mqtt, outbox) as running:
                for n in range(30):
                    running.publish_retained(contract.STATUS, contract.status_data("degraded", f"trouble {n}"))
                    running.publish_retained(contract.META, contract.meta_data(META))
                    await asyncio.sleep(0)
                await until(lambda: len(broker.taken) >= 48, "the messages")
                running.publish_retained(contract.STATUS, contract.status_data("degraded", "the last"))
                running.publish_retained(contract.META, contract.meta_data(META))
                broker.hold = 1000
            await until(lambda: broker.states[-1] == "offline", "the farewell")
            assert broker.most_unanswered == 2

    run(main())


def test_a_bug_beside_the_delivery_ends_the_publisher_instead_of_hiding(
    tmp_path: Path, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise ZeroDivisionError

    async def main(mqtt: Mqtt) -> None:
        for room, name in ((publisher.Publisher, "_find_better"), (delivery.Delivery, "_watch")):
            with monkeypatch.context() as patch:
                patch.setattr(room, name, broken)
                with pytest.raises(ZeroDivisionError):
                    await asyncio.wait_for(Publisher(mqtt, RENDERER, outbox).run(), PATIENCE_S)

    with Broker(new_folder(tmp_path, "well")) as broker:
        run(main(broker.mqtt()))


def test_a_message_larger_than_the_broker_takes_is_put_aside_and_does_not_end_the_connection(
    tmp_path: Path, outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        with Broker(new_folder(tmp_path, "small"), extra="max_packet_size 3000") as broker:
            await outbox.append(transcript("x" * 3000), transcript("short"))
            with Subscriber(broker) as subscriber:
                async with publishing(broker.mqtt(), outbox):
                    await received(subscriber, lambda got: len(events(got)) == 1, "the short message")
                    await until(lambda: emptied(outbox), "an empty outbox")
                await received(subscriber, lambda _: states(subscriber)[-1] == "offline", "the farewell")
                assert states(subscriber) == ["online", "offline"], "the connection ended in between"
                assert seqs(events(subscriber.messages)) == [2]

    run(main())
    assert "larger than the broker's maximum packet size" in caplog.text


# -- no command too late


def test_a_command_that_waited_too_long_is_delivered_as_expired_only(broker: Broker, outbox: Outbox) -> None:
    async def main() -> None:
        await outbox.append(command(10, ended_s_ago=9.5), command(10))
        with Subscriber(broker) as subscriber:
            async with publishing(broker.mqtt(), outbox):
                await received(subscriber, lambda got: len(events(got)) == 2, "both")
            assert [message.topic for message in events(subscriber.messages)] == [
                f"{ROOT}/evt/expired",
                f"{ROOT}/evt/command",
            ]

    run(main())


def question(window_s: float) -> Draft:
    said = Command("start", {"line": 3}, 0.93, "confirm", 10.0, words="start line 3")
    until_ns = clock.boottime_ns() + round(window_s * clock.NS_PER_S)
    return contract.pending_draft(Pending(new_id(), spoken(), HEARD, said, 1, until_ns), model="micro-en")


def test_a_question_goes_before_the_backlog_like_a_live_command_and_the_broker_drops_it_with_its_window(
    broker: Broker, outbox: Outbox
) -> None:
    async def main() -> None:
        await outbox.append(*[transcript()] * 300)
        with Subscriber(broker) as subscriber:
            async with publishing(broker.mqtt(replay_per_s=100), outbox):
                await received(subscriber, lambda got: len(events(got)) > 20, "the beginning of the backlog")
                await outbox.append(transcript(), question(15.0), command(10))
                await received(subscriber, lambda _: subscriber.on("/evt/command"), "the command")
                (asked,) = subscriber.on("/evt/pending")
                assert 12 <= asked.properties["MessageExpiryInterval"] <= 14
                assert len(subscriber.on("/evt/transcript")) < 250
                kinds = [message.topic.rpartition("/")[2] for message in events(subscriber.messages)]
                assert kinds.index("pending") < kinds.index("command")

    run(main())


def test_a_question_that_nobody_can_answer_any_more_is_for_the_record_only(broker: Broker, outbox: Outbox) -> None:
    async def main() -> None:
        (sent,) = await outbox.append(question(1.9))
        with Subscriber(broker) as subscriber:
            async with publishing(broker.mqtt(), outbox):
                await received(subscriber, lambda got: len(events(got)) == 1, "it")
            (expired,) = subscriber.on("/evt/expired")
            assert expired.data["pending_id"] == sent.data["pending_id"]
            assert (expired.data["confirmed"], expired.data["expires_at"]) == (False, sent.data["confirm_until"])
            assert "read_back" not in expired.data

    run(main())


def test_after_a_reboot_a_waiting_command_is_delivered_as_expired(
    broker: Broker, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        await outbox.append(command(3600))
        monkeypatch.setattr(clock, "boot_id", new_id)
        with Subscriber(broker) as subscriber:
            async with publishing(broker.mqtt(), outbox):
                await received(subscriber, lambda got: len(events(got)) == 1, "the command")
            assert subscriber.on("expired")

    run(main())


def test_a_year_back_and_forth_on_the_wall_clock_neither_expires_nor_revives_a_command(
    broker: Broker, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    year_ns = 365 * 86_400 * clock.NS_PER_S
    wall_ns = clock.wall_ns

    async def main() -> None:
        with Subscriber(broker) as subscriber:
            for step_ns in (year_ns, -year_ns):
                await outbox.append(command(10, ended_s_ago=9.5), command(10))
                monkeypatch.setattr(clock, "wall_ns", lambda step_ns=step_ns: wall_ns() + step_ns)
                async with publishing(broker.mqtt(), outbox):
                    await until(lambda: emptied(outbox), "an empty outbox")
            await received(subscriber, lambda got: len(events(got)) == 4, "all four")
            kinds = [message.topic.rpartition("/")[2] for message in events(subscriber.messages)]
            assert kinds == ["expired", "command"] * 2

    run(main())


def test_a_broker_that_counts_whole_seconds_does_not_hand_a_command_on_after_its_life(
    broker: Broker, outbox: Outbox
) -> None:
    """Two consumers are away when the command comes; one is back in time, the other just too late."""

    async def main() -> None:
        async with publishing(broker.mqtt(), outbox) as running:
            await until(lambda: running.connected, "a connection")
            await asyncio.sleep(1 - clock.wall_ns() % clock.NS_PER_S / clock.NS_PER_S)  # mosquitto drops the fraction
            sent, _ = await outbox.append(command(3.1, ended_s_ago=0), transcript("comes in any case"))
            await until(lambda: emptied(outbox), "the broker to have both")
            assert await returning("prompt") == ["command", "transcript"]
            assert sent.expires_ns
            await asyncio.sleep((sent.expires_ns - clock.boottime_ns()) / clock.NS_PER_S)
            assert await returning("tardy") == ["transcript"]

    async def returning(client_id: str) -> list[str]:
        with Subscriber(broker, "+/+/voice/+/evt/#", client_id=client_id) as subscriber:
            await received(subscriber, lambda _: subscriber.on("transcript"), "the transcript")
            return [message.topic.rpartition("/")[2] for message in subscriber.messages]

    for client_id in ("prompt", "tardy"):
        with Subscriber(broker, "+/+/voice/+/evt/#", client_id=client_id):
            pass  # its session stays and collects
    run(main())


def test_a_command_in_flight_to_a_broker_that_does_not_answer_ends_the_connection_with_its_life(
    broker: Broker, outbox: Outbox
) -> None:
    async def main() -> None:
        async with publishing(broker.mqtt(), outbox) as running:
            await until(lambda: running.connected, "a connection")
            with broker.frozen():
                (sent,) = await outbox.append(command(3))
                await until(lambda: not running.connected, "the end of the connection")
                assert sent.expires_ns
                assert 0 <= clock.boottime_ns() - sent.expires_ns < clock.NS_PER_S
                await until(lambda: "life ended" in running.trouble, "why it ended")  # told once all of it is closed
            with Subscriber(broker) as subscriber:
                await received(subscriber, lambda got: [m for m in got if m.topic.endswith("expired")], "its end")

    run(main())


def test_a_command_in_flight_while_the_box_was_suspended_ends_the_connection_when_it_wakes(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_ns = clock.boottime_ns

    async def main() -> None:
        await outbox.append(command(600))
        async with ScriptedBroker(lambda _seq: 0) as broker:
            broker.hold = 1000  # it never answers
            async with publishing(broker.mqtt, outbox) as running:
                await until(lambda: broker.topics.get(1, "").endswith("evt/command"), "it to be sent")
                monkeypatch.setattr(clock, "boottime_ns", lambda: now_ns() + 3600 * clock.NS_PER_S)
                await until(lambda: "life ended" in running.trouble, "the end of the connection")
                await until(lambda: broker.topics[1].endswith("evt/expired"), "what became of it")

    run(main())


class Cable:
    """Two network namespaces joined by a cable that can be cut."""

    near, far = "10.177.0.1", "10.177.0.2"

    def __init__(self) -> None:
        self.name = f"edge{os.getpid()}"
        for arguments in (
            f"netns add {self.name}",
            f"link add {self.name}n type veth peer name {self.name}f netns {self.name}",
            f"addr add {self.near}/30 dev {self.name}n",
            f"link set {self.name}n up",
            f"-n {self.name} addr add {self.far}/30 dev {self.name}f",
            f"-n {self.name} link set {self.name}f up",
            f"-n {self.name} link set lo up",
        ):
            self._ip(arguments)

    def close(self) -> None:
        self._ip(f"netns delete {self.name}")

    def cut(self) -> None:
        self._ip(f"link set {self.name}n down")

    def mend(self) -> None:
        self._ip(f"link set {self.name}n up")

    @staticmethod
    def _ip(arguments: str) -> None:
        subprocess.run(["ip", *arguments.split()], check=True)


def test_a_command_on_a_cut_cable_does_not_come_out_when_the_cable_is_mended(tmp_path: Path, outbox: Outbox) -> None:
    """The subscriber sits beside the broker, so that only the publisher's link is cut."""

    async def main(cable: Cable, broker: Broker) -> None:
        async with publishing(broker.mqtt(keepalive_s=5), outbox) as running:
            await until(lambda: running.connected, "a connection")
            await outbox.append(transcript("before"))
            await until(lambda: emptied(outbox), "the delivery before the cut")
            cable.cut()
            await outbox.append(command(3), transcript("meanwhile"))
            await until(lambda: not running.connected, "the end of the connection")
            cable.mend()
            await until(lambda: running.connected, "a new connection")
            await outbox.append(transcript("after"))
            await until(lambda: emptied(outbox), "the delivery of everything")
        with Subscriber(broker, client_id="recorder") as recorder:
            await received(recorder, lambda got: len(events(got)) >= 4, "what was recorded")
            got = events(recorder.messages)
        assert seqs(got) == [1, 2, 3, 4]
        assert [message.topic.rpartition("/")[2] for message in got] == ["transcript", "expired", *["transcript"] * 2]

    with closing(Cable()) as cable:
        prefix = ("ip", "netns", "exec", cable.name)
        with Broker(new_folder(tmp_path, "far"), host=cable.far, prefix=prefix) as broker:
            with Subscriber(broker, client_id="recorder"):
                pass  # its session stays and collects
            run(main(cable, broker))


# -- what the broker shows of the device


def states(subscriber: Subscriber) -> list[str]:
    return [message.data["state"] for message in subscriber.on("/status")]


def test_birth_and_farewell_are_retained_and_every_connection_brings_them_again(broker: Broker, outbox: Outbox) -> None:
    async def main() -> None:
        with Subscriber(broker) as subscriber:
            async with publishing(broker.mqtt(), outbox) as running:
                running.publish_retained(contract.META, contract.meta_data(META))
                await received(subscriber, lambda got: len(got) == 2, "the birth")
                await asyncio.to_thread(broker.stop)
                running.publish_retained(contract.STATUS, contract.status_data("degraded", "no audio; check the cable"))
                await asyncio.to_thread(broker.start)
                await received(subscriber, lambda _: states(subscriber)[-1] == "degraded", "the second birth")
                await received(subscriber, lambda _: len(subscriber.on("/meta")) >= 2, "meta again")
            await received(subscriber, lambda _: states(subscriber)[-1] == "offline", "the farewell")
            assert all(message.retained and message.qos == 1 for message in subscriber.messages)
        with Subscriber(broker, client_id="later") as later:
            await received(later, lambda got: len(got) == 2, "what is retained")
            (status,) = later.on("/status")
            assert status.data["reason"] == "the daemon was stopped"
            assert later.on("/meta")[0].data["model"] == "micro-en"

    run(main())


PUBLISHER = """
import asyncio, pathlib, sys
from edge_asr import contract
from edge_asr.contract import Renderer
from edge_asr.outbox import Outbox
from edge_asr.publisher import Publisher
from edge_asr.settings import Mqtt

async def main():
    path, port = sys.argv[1:]
    outbox = Outbox(pathlib.Path(path), 50_000_000)
    mqtt = Mqtt(host="127.0.0.1", port=int(port), max_retry_s=1)
    publisher = Publisher(mqtt, Renderer("acme/hall-2/voice/edge01", "edge01"), outbox)
    publishing = asyncio.create_task(publisher.run())
    alarm = contract.alarm_draft("test", "Nothing; it is a test.", severity="warning")
    while True:
        for message in await outbox.append(alarm, alarm):
            print(message.seq, message.id, flush=True)

asyncio.run(main())
"""


def test_kills_of_the_daemon_lose_nothing_and_the_last_will_tells_of_them(broker: Broker) -> None:
    path, kills = broker.folder / "killed.db", 6
    luck = random.Random(5)  # noqa: S311 - repeatable
    committed: dict[int, str] = {}
    with Subscriber(broker) as subscriber:
        for n in range(kills):
            daemon = subprocess.Popen(
                [sys.executable, "-c", PUBLISHER, str(path), str(broker.port)], stdout=subprocess.PIPE, text=True
            )
            assert daemon.stdout
            lines = [daemon.stdout.readline() for _ in range(luck.randrange(1, 40))]
            if n % 2:
                subscriber.wait_for(lambda _: states(subscriber)[-1:] == ["online"], "a birth")
            daemon.kill()
            lines += daemon.stdout.read().splitlines()
            daemon.stdout.close()
            assert daemon.wait() == -signal.SIGKILL
            pairs = (line.split() for line in lines)
            committed |= {int(pair[0]): pair[1] for pair in pairs if len(pair) == 2 and len(pair[1]) == 36}

        async def rest() -> None:
            with closing(Outbox(path, 50_000_000)) as left:
                async with publishing(broker.mqtt(), left):
                    await until(lambda: emptied(left), "an empty outbox")
                    newest = left.last_seq
                    await received(subscriber, lambda got: newest in seqs(events(got)), "the last message")

        run(rest())
        first = first_deliveries(events(subscriber.messages))
        assert seqs(first) == list(range(1, len(first) + 1))
        assert committed.items() <= {message.data["seq"]: message.data["id"] for message in first}.items()
        assert len(committed) > 10 * kills
        again = [message for message in events(subscriber.messages) if not message.duplicate]
        assert len(again) - len(first) <= kills * 2 * WINDOW
        wills = [message for message in subscriber.on("/status") if message.data["reason"] == "the connection was lost"]
        assert len(wills) >= kills // 2


def test_partials_reach_those_who_listen_and_are_never_kept(broker: Broker, outbox: Outbox) -> None:
    partial = contract.partial_data(spoken(), HEARD)

    async def main() -> None:
        with Subscriber(broker) as subscriber:
            async with publishing(broker.mqtt(), outbox) as running:
                running.publish_live(contract.PARTIAL, partial)
                await until(lambda: running.connected, "a connection")
                running.publish_live(contract.PARTIAL, partial)
                await received(subscriber, lambda _: subscriber.on("/partial"), "the partial")
                (message,) = subscriber.on("/partial")
                assert (message.qos, message.retained, message.data["text"]) == (0, False, "stop line three")
            assert outbox.last_seq == 0

    run(main())


def test_without_a_broker_in_the_settings_the_outbox_keeps_everything(outbox: Outbox) -> None:
    async def main() -> None:
        async with publishing(Mqtt(), outbox) as running:
            await outbox.append(transcript())
            running.publish_live(contract.PARTIAL, contract.partial_data(spoken(), HEARD))
            assert not running.connected
        assert len(await outbox.oldest(5)) == 1

    run(main())


# -- trouble with the connection


def test_stopping_does_not_wait_for_a_frozen_broker(broker: Broker, outbox: Outbox) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with publishing(broker.mqtt(), outbox) as running:
            await until(lambda: running.connected, "a connection")
            freezer = contextlib.ExitStack()
            freezer.enter_context(broker.frozen())
            began = loop.time()
        assert loop.time() - began < 4
        freezer.close()

    run(main())


def test_stopping_while_the_name_server_hangs_does_not_wait_for_it(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answer = threading.Event(), threading.Event()

    def hang(*_: object, **__: object) -> None:
        asked.set()
        answer.wait(PATIENCE_S)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "create_connection", hang)

    async def main() -> None:
        async with publishing(Mqtt(host="broker.example"), outbox):
            await until(asked.is_set, "the question")

    began = clock.boottime_ns()
    run(main())
    assert clock.boottime_ns() - began < 5 * clock.NS_PER_S
    answer.set()


def test_dialling_that_hangs_is_given_up_and_never_becomes_a_connection_afterwards(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CONNECT that comes late would throw the connection out that has taken its place."""
    monkeypatch.setattr(link, "_DIAL_TIMEOUT_S", 0.1)
    answer = threading.Event()
    connect = socket.create_connection

    def hang(*arguments: Any, **more: Any) -> socket.socket:
        answer.wait(PATIENCE_S)
        return connect(*arguments, **more)

    monkeypatch.setattr(socket, "create_connection", hang)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE_S)
        port = server.getsockname()[1]
        mqtt = Mqtt(host="127.0.0.1", port=port, max_retry_s=3600)
        assert "no connection within 0.1 s; check the name server" in trouble_of(mqtt, outbox)
        answer.set()
        late, _ = server.accept()
        with late:
            late.settimeout(PATIENCE_S)
            assert late.recv(100) == b""


def test_a_tls_handshake_that_nobody_answers_is_given_up(
    outbox: Outbox, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "_DIAL_TIMEOUT_S", 0.1)
    with silent_server() as silent:
        mqtt = Mqtt.model_validate({"host": "127.0.0.1", "port": silent, "tls": tls(pki)})
        assert "no connection within" in trouble_of(mqtt, outbox)


@contextlib.contextmanager
def silent_server() -> Iterator[int]:
    """Accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"), "edge01", "subscriber")


def tls(pki: Pki, client: str | None = "edge01", **more: Any) -> dict[str, Any]:
    identity = {"cert_file": pki.cert(client), "key_file": pki.key(client)} if client else {}
    return {"ca_file": pki.ca, **identity, **more}


def trouble_of(mqtt: Mqtt, outbox: Outbox) -> str:
    """The one line that tells what is wrong."""
    found: list[str] = []

    async def main() -> None:
        async with publishing(mqtt, outbox) as running:
            await until(lambda: running.trouble, "trouble")
            assert not running.connected
            found.append(running.trouble)

    run(main())
    assert "\n" not in found[0]
    return found[0]


def test_an_unknown_host_a_closed_port_and_a_foreign_port_are_named_with_the_remedy(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "_CONSENT_TIMEOUT_S", 0.2)
    port = free_port()
    assert "check mqtt.host and the name server" in trouble_of(Mqtt(host="no..such..host"), outbox)
    assert trouble_of(Mqtt(host="127.0.0.1", port=port), outbox) == (
        f"127.0.0.1:{port}: nothing listens there; check mqtt.host and mqtt.port, and that the broker runs"
    )
    with silent_server() as silent:
        assert "is that an MQTT 5 broker's port?" in trouble_of(Mqtt(host="127.0.0.1", port=silent), outbox)


def test_wrong_credentials_are_named_and_right_ones_are_taken_without_a_restart(tmp_path: Path, outbox: Outbox) -> None:
    folder = new_folder(tmp_path, "guarded")
    subprocess.run(["mosquitto_passwd", "-b", "-c", folder / "users", "edge01", "right"], check=True)
    password = tmp_path / "password"

    async def main() -> None:
        with Broker(folder, anonymous=False, extra=f"password_file {folder}/users") as broker:
            async with publishing(broker.mqtt(username="edge01", password_file=password), outbox) as running:
                await until(lambda: str(password) in running.trouble, "a missing file")
                password.write_text("wrong\n", encoding="ascii")
                await until(lambda: "username" in running.trouble, "a refusal")
                assert "the broker refuses: Not authorized; check mqtt.username" in running.trouble
                password.write_text("right\n", encoding="ascii")
                await until(lambda: running.connected, "a connection")
                assert running.trouble == ""

    run(main())


def test_a_client_certificate_opens_a_broker_that_asks_for_one(tmp_path: Path, outbox: Outbox, pki: Pki) -> None:
    folder = new_folder(tmp_path, "tls")
    rules = folder / "rules"
    rules.write_text(f"user edge01\ntopic write {ROOT}/#\nuser subscriber\ntopic read #\n", encoding="ascii")
    rules.chmod(0o600)

    async def main() -> None:
        with Broker(folder, tls=pki, extra=f"acl_file {rules}") as broker, Subscriber(broker, tls=pki) as subscriber:
            await asyncio.gather(*(outbox.append(transcript("x" * 1500)) for _ in range(200)))
            async with publishing(broker.mqtt(tls=tls(pki)), outbox):
                await received(subscriber, lambda got: len(events(got)) >= 200, "everything")
            assert seqs(events(subscriber.messages)) == list(range(1, 201))

    run(main())


def test_what_is_wrong_with_tls_is_named(tmp_path: Path, outbox: Outbox, pki: Pki) -> None:
    stranger = Pki(new_folder(tmp_path, "stranger"), "edge01")
    with Broker(new_folder(tmp_path, "tls"), tls=pki) as broker, Broker(new_folder(tmp_path, "plain")) as plain:
        cases = {
            "the broker's certificate is not trusted": broker.mqtt(tls=tls(pki, ca_file=stranger.ca)),
            "check mqtt.tls.ca_file and mqtt.host": broker.mqtt(host="127.1", tls=tls(pki)),
            "does it accept mqtt.tls.cert_file?": broker.mqtt(tls=tls(pki, None)),
            "mqtt.tls.ca_file: /nowhere cannot be used (No such file": broker.mqtt(tls=tls(pki, ca_file="/nowhere")),
            f"mqtt.tls.cert_file: {pki.ca} with": broker.mqtt(tls=tls(pki, cert_file=pki.ca)),
            "check mqtt.port and the certificates": plain.mqtt(tls=tls(pki)),
            "does it want TLS there (mqtt.tls)?": broker.mqtt(),
        }
        for expected, mqtt in cases.items():
            assert expected in trouble_of(mqtt, outbox)


def test_a_lasting_trouble_is_logged_once_and_a_new_one_at_once(
    tmp_path: Path, outbox: Outbox, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "_FIRST_RETRY_S", 0.01)
    caplog.set_level(logging.INFO, logger="edge_asr.publisher")
    broker = Broker(new_folder(tmp_path, "late"))
    dialled = 0

    def counted(*arguments: Any, original: Callable[..., Any] = link.dial) -> Any:
        nonlocal dialled
        dialled += 1
        return original(*arguments)

    monkeypatch.setattr(link, "dial", counted)

    async def main() -> None:
        async with publishing(broker.mqtt(), outbox) as running:
            await until(lambda: dialled >= 4, "some attempts")
            with broker:
                await until(lambda: running.connected, "a connection")
            await until(lambda: not running.connected, "its end")
            await until(lambda: dialled >= 8, "more attempts")

    run(main())
    told = [record.getMessage().partition(": ")[0] for record in caplog.records]
    assert told == [
        "not publishing, the outbox keeps everything",
        f"connected to the broker at 127.0.0.1:{broker.port}",
        "not publishing, the outbox keeps everything",
        "not publishing, the outbox keeps everything",
    ]


def test_when_the_broker_ends_a_connection_it_is_quoted(tmp_path: Path, outbox: Outbox) -> None:
    async def main() -> None:
        with Broker(new_folder(tmp_path, "leaving"), extra="max_packet_size 20000") as broker:
            async with publishing(broker.mqtt(), outbox) as running:
                await until(lambda: running.connected, "a connection")
                too_long = contract.status_data("degraded", "x" * 30_000)
                running.publish_retained(contract.STATUS, too_long)
                await until(lambda: running.trouble, "trouble")
                # The broker's last word may be lost: a reset drops what the kernel has not handed over yet.
                words = ("the broker ended the connection: Packet too large", "Connection reset by peer", "Broken pipe")
                assert any(each in running.trouble for each in words)

    run(main())


def test_the_pauses_between_attempts_grow_to_the_longest_and_vary() -> None:
    pauses = [[publisher.pause_s(failures, 30) for failures in range(12)] for _ in range(200)]
    for failures, column in enumerate(zip(*pauses, strict=True)):
        limit = min(30, 0.5 * 2**failures)
        assert limit / 2 <= min(column) < max(column) <= limit


def test_a_device_may_publish_to_one_place_only(tmp_path: Path, outbox: Outbox) -> None:
    """Every topic lies under the root, so one rule of the broker is enough."""
    folder = new_folder(tmp_path, "strict")
    rules = folder / "rules"
    rules.write_text(f"topic read #\ntopic write {ROOT}/#\n", encoding="ascii")
    rules.chmod(0o600)

    async def main() -> None:
        with Broker(folder, extra=f"acl_file {rules}") as broker, Subscriber(broker) as subscriber:
            async with publishing(broker.mqtt(), outbox):
                await outbox.append(transcript(), command(10), command(10, ended_s_ago=10))
                await received(subscriber, lambda got: len(events(got)) == 3, "all three")
            assert (await outbox.statistics()).dead_letters == 0

    run(main())
