"""How requests reach the device and answers leave it: what waited is told from what did not, and never too many."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from edge_asr.contract import PayloadMode, Renderer
from edge_asr.mailbox import IN_FLIGHT
from edge_asr.outbox import Outbox
from edge_asr.publisher import Publisher
from edge_asr.requests import Letter, RequestError, refusal
from edge_asr.settings import Mqtt
from tests.broker import HOST, PATIENCE_S, Broker, Requester, Subscriber

ROOT = "acme/voice/edge01"


class Device:
    """A publisher that keeps the letters it gets."""

    def __init__(self, mqtt: Mqtt, outbox: Outbox, mode: PayloadMode = "cloudevents") -> None:
        self.letters: list[Letter] = []
        self._changed = asyncio.Event()
        renderer = Renderer(ROOT, "edge01", mode)
        self.publisher = Publisher(mqtt, renderer, outbox, on_change=self._changed.set, on_request=self._take)

    def _take(self, letter: Letter) -> None:
        self.letters.append(letter)
        self._changed.set()

    async def has(self, count: int) -> list[Letter]:
        """The letters, once there are so many."""
        await self._until(lambda: len(self.letters) >= count)
        return self.letters

    async def _until(self, condition: Callable[[], bool]) -> None:
        async def hold() -> None:
            while not condition():
                self._changed.clear()
                await self._changed.wait()

        await asyncio.wait_for(hold(), PATIENCE_S)

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.publisher.run(), name="publisher")
        try:
            await self._until(lambda: self.publisher.connected)
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


@pytest.mark.parametrize("mode", ["cloudevents", "plain"])
def test_a_request_is_answered_where_and_under_what_it_asked(broker: Broker, outbox: Outbox, mode: PayloadMode) -> None:
    async def main() -> None:
        device = Device(broker.mqtt(), outbox, mode)
        with Requester(broker, ROOT) as mes:
            async with device.connected():
                correlation = await asyncio.to_thread(mes.send, "ping", b"{}", expires_s=9)
                (letter,) = await device.has(1)
                assert (letter.verb, letter.body, letter.correlation) == ("ping", b"{}", correlation)
                assert letter.expires_ns
                assert not letter.waited
                assert not letter.retained
                letter.answer(refusal("ping", RequestError("busy", "not now", "later")))
                (answer,) = await asyncio.to_thread(mes.answers, correlation)
                assert answer["reason"] == "busy"

    asyncio.run(main())


def test_what_waited_in_the_broker_is_told_from_what_came_live(broker: Broker, outbox: Outbox) -> None:
    async def main() -> None:
        device = Device(broker.mqtt(), outbox)
        with Requester(broker, ROOT) as mes:
            async with device.connected():
                await asyncio.to_thread(mes.send, "mute", b"1")
                (first,) = await device.has(1)
                first.taken()
            for qos in (1, 2):
                await asyncio.to_thread(mes.send, "mute", b"2", qos=qos)
            await asyncio.to_thread(mes.send, "mute", b"gone", expires_s=1)
            await asyncio.sleep(2.1)  # the broker's own clock, which nobody can turn
            async with device.connected():
                await device.has(3)
                await asyncio.to_thread(mes.send, "mute", b"3")
                letters = await device.has(4)
        assert [(letter.body, letter.waited) for letter in letters] == [
            (b"1", False),
            (b"2", True),
            (b"2", True),
            (b"3", False),
        ]

    asyncio.run(main())


def test_a_request_that_was_not_taken_comes_again_as_one_that_waited(broker: Broker, outbox: Outbox) -> None:
    async def main() -> None:
        device = Device(broker.mqtt(), outbox)
        with Requester(broker, ROOT) as mes:
            async with device.connected():
                await asyncio.to_thread(mes.send, "mute")
                await device.has(1)
            async with device.connected():
                letters = await device.has(2)
        assert [letter.waited for letter in letters] == [False, True]
        assert letters[0].correlation == letters[1].correlation

    asyncio.run(main())


def test_a_retained_request_is_told_as_one_and_is_not_sent_at_each_connection(broker: Broker, outbox: Outbox) -> None:
    async def main() -> None:
        device = Device(broker.mqtt(), outbox)
        with Requester(broker, ROOT) as mes:
            async with device.connected():
                await asyncio.to_thread(mes.send, "mute", retain=True)
                (letter,) = await device.has(1)
                assert letter.retained
                letter.taken()
            fresh = Device(broker.mqtt(client_id="another"), outbox)
            async with fresh.connected():
                await asyncio.to_thread(mes.send, "ping")
                assert [each.verb for each in await fresh.has(1)] == ["ping"]

    asyncio.run(main())


def test_the_broker_holds_back_what_is_too_much_at_once(broker: Broker, outbox: Outbox) -> None:
    async def main() -> None:
        device = Device(broker.mqtt(), outbox)
        with Requester(broker, ROOT) as mes:
            async with device.connected():
                for _ in range(IN_FLIGHT + 5):
                    await asyncio.to_thread(mes.send, "mute")
                letters = await device.has(IN_FLIGHT)
                await asyncio.to_thread(mes.send, "ping", qos=0)  # overtakes: QoS 0 is not held back
                letters = await device.has(IN_FLIGHT + 1)
                assert [letter.verb for letter in letters].count("mute") == IN_FLIGHT
                for letter in list(letters):
                    letter.taken()
                await device.has(IN_FLIGHT + 6)

    asyncio.run(main())


@pytest.mark.parametrize("topic", [f"{ROOT}/req/mute", "other/voice/edge02/evt/command", "$SYS/x"])
def test_an_answer_never_goes_where_a_device_listens_or_speaks(broker: Broker, outbox: Outbox, topic: str) -> None:
    async def main() -> None:
        device = Device(broker.mqtt(), outbox)
        with Requester(broker, ROOT) as mes, Subscriber(broker) as everybody:
            async with device.connected():
                await asyncio.to_thread(mes.send, "ping", answers=topic)
                (letter,) = await device.has(1)
                letter.answer(refusal("ping", RequestError("busy", "not now", "later")))
                last = await asyncio.to_thread(mes.send, "ping")
                (_, second) = await device.has(2)
                second.answer(refusal("ping", RequestError("busy", "not now", "later")))
                await asyncio.to_thread(mes.answers, last)
            answers = [m.topic for m in everybody.messages if "outcome" in m.data]
            assert answers == ["mes/answers"]

    asyncio.run(main())


def test_a_broker_that_cannot_tell_what_waited_is_asked_to_keep_nothing(outbox: Outbox) -> None:
    clean_start: list[bool] = []

    async def broker(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """CONNACK without subscription identifiers (MQTT 5, 3.2.2.3.12), as some cloud brokers send it."""
        connect = await reader.readuntil(b"\0\4MQTT\5")
        assert connect
        (flags,) = await reader.readexactly(1)
        clean_start.append(bool(flags & 2))
        writer.write(bytes([0x20, 5, 0, 0, 2, 0x29, 0]))
        await reader.read(-1)
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(broker, HOST)
        device = Device(Mqtt(host=HOST, port=server.sockets[0].getsockname()[1]), outbox)
        async with device.connected():
            pass
        server.close()

    asyncio.run(main())
    assert clean_start == [False, True]
