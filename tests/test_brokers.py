"""Several brokers in order: the plant's while it is there, else the backup; nothing is lost or renamed in between."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from edge_asr import publisher
from edge_asr.outbox import Outbox
from edge_asr.settings import Mqtt
from tests.broker import Broker, Pki, Received, Subscriber, free_port
from tests.test_publisher import (
    emptied,
    events,
    new_folder,
    publishing,
    received,
    run,
    seqs,
    states,
    tls,
    transcript,
    trouble_of,
    until,
)


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[Broker]:
    with Broker(new_folder(tmp_path, "plant")) as running:
        yield running


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"), "edge01", "subscriber")


@pytest.fixture
def backup(tmp_path: Path, pki: Pki) -> Iterator[Broker]:
    """With an identity of its own: it asks for a certificate."""
    with Broker(new_folder(tmp_path, "backup"), tls=pki) as running:
        yield running


def in_order(plant: Broker, backup: Broker, pki: Pki) -> Mqtt:
    listed: list[dict[str, Any]] = [
        {"host": plant.host, "port": plant.port},
        {"host": backup.host, "port": backup.port, "tls": tls(pki)},
    ]
    return Mqtt.model_validate({"brokers": listed, "max_retry_s": 1})


def address(broker: Broker) -> str:
    return f"{broker.host}:{broker.port}"


def ids_by_seq(messages: Sequence[Received]) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for message in events(messages):
        found.setdefault(message.data["seq"], set()).add(message.data["id"])
    return found


def test_the_backup_takes_over_and_hands_back_without_a_loss_a_new_id_or_another_order(
    plant: Broker, backup: Broker, pki: Pki, outbox: Outbox
) -> None:
    async def main(at_plant: Subscriber, at_backup: Subscriber) -> None:
        done = False

        async def speak() -> None:
            while not done:
                await outbox.append(transcript())
                await asyncio.sleep(0.005)

        async with publishing(in_order(plant, backup, pki), outbox) as running:
            speaking = asyncio.create_task(speak())
            await until(lambda: running.broker == address(plant), "the plant's broker")
            await received(at_plant, lambda got: len(events(got)) > 20, "the first messages at the plant")
            await asyncio.to_thread(plant.stop)
            await received(at_backup, lambda got: len(events(got)) > 20, "messages at the backup")
            assert running.broker == address(backup)
            assert (await outbox.statistics()).broker == address(backup)
            await asyncio.to_thread(plant.start)
            await until(lambda: running.broker == address(plant), "the way back")
            returned_at = outbox.last_seq
            await received(at_plant, lambda got: seqs(events(got))[-1] > returned_at, "new messages at the plant")
            done = True
            await speaking
            await until(lambda: emptied(outbox), "an empty outbox")
            assert (await outbox.statistics()).broker == address(plant)
        newest = outbox.last_seq
        await received(at_plant, lambda got: any(seq == newest for seq in seqs(events(got))), "the newest")
        of_both = ids_by_seq([*at_plant.messages, *at_backup.messages])
        assert sorted(of_both) == list(range(1, newest + 1))
        assert all(len(ids) == 1 for ids in of_both.values())
        for subscriber in (at_plant, at_backup):
            there = seqs(events(subscriber.messages))
            assert list(dict.fromkeys(there)) == sorted(set(there))
        await received(at_backup, lambda _: states(at_backup)[-1] == "offline", "the farewell at the backup")
        assert states(at_backup) == ["online", "offline"]
        assert at_backup.on("/status")[-1].data["reason"] == f"publishing to {address(plant)} again"
        await received(at_plant, lambda _: states(at_plant)[-2:] == ["online", "offline"], "the farewell at the plant")

    with Subscriber(plant) as at_plant, Subscriber(backup, tls=pki) as at_backup:
        run(main(at_plant, at_backup))


def test_what_the_backup_does_not_acknowledge_goes_to_the_plant_under_the_same_id(
    plant: Broker, backup: Broker, pki: Pki, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "_HANDOVER_S", 0.5)

    async def main(at_plant: Subscriber) -> None:
        plant.stop()
        async with publishing(in_order(plant, backup, pki), outbox) as running:
            await until(lambda: running.broker == address(backup), "the backup")
            with backup.frozen():
                sent = await outbox.append(*[transcript()] * 3)
                await asyncio.to_thread(plant.start)
                await until(lambda: running.broker == address(plant), "the way back")
                await until(lambda: emptied(outbox), "the plant to have everything")
        await received(at_plant, lambda got: len(events(got)) >= 3, "all three")
        assert [message.data["id"] for message in events(at_plant.messages)] == [message.id for message in sent]

    with Subscriber(plant) as at_plant:
        run(main(at_plant))


def test_stopping_at_the_backup_says_so_there_and_a_search_for_the_plant_does_not_hold_it_up(
    backup: Broker, pki: Pki, outbox: Outbox, tmp_path: Path
) -> None:
    away = Broker(new_folder(tmp_path, "away"))

    async def main(at_backup: Subscriber) -> None:
        async with publishing(in_order(away, backup, pki), outbox) as running:
            await until(lambda: running.connected, "a connection")
            assert running.broker == address(backup)
            await asyncio.sleep(1.2)  # a search has failed, another is due
            assert running.broker == address(backup)
        await received(at_backup, lambda _: states(at_backup)[-1] == "offline", "the farewell")
        assert states(at_backup) == ["online", "offline"]
        assert (await outbox.statistics()).broker == ""

    with Subscriber(backup, tls=pki) as at_backup:
        run(main(at_backup))


def test_when_no_broker_accepts_us_each_is_named_with_its_key(outbox: Outbox) -> None:
    ports = free_port(), free_port()
    told = trouble_of(Mqtt.model_validate({"brokers": [{"host": "127.0.0.1", "port": port} for port in ports]}), outbox)
    for number, port in enumerate(ports):
        key = f"mqtt.brokers.{number}"
        assert f"127.0.0.1:{port}: nothing listens there; check {key}.host and {key}.port" in told


def test_the_broker_in_use_is_remembered_with_its_time(plant: Broker, outbox: Outbox) -> None:
    async def main() -> None:
        assert (await outbox.statistics()).broker_since == ""
        async with publishing(plant.mqtt(), outbox) as running:
            await until(lambda: running.connected, "a connection")
            await outbox.append(transcript())
            await until(lambda: emptied(outbox), "an empty outbox")
            found = await outbox.statistics()
        assert found.broker == address(plant)
        after = await outbox.statistics()
        assert after.broker == ""
        assert after.broker_since >= found.broker_since > ""

    run(main())
