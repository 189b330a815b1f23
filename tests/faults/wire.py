"""What stands where the broker stands: one that answers by a script, and a tap that notes what a real one answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Coroutine
from typing import Any, TypeVar

from typing_extensions import Self

from edge_asr import clock
from edge_asr.link import WINDOW
from tests.faults.books import Delivery

T = TypeVar("T")

_PUBLISH, _PUBACK, _CONNECT, _PINGREQ, _DISCONNECT = 3, 4, 1, 12, 14
_QUOTA_EXCEEDED = 0x97
_ID = re.compile(rb'"id":"([0-9a-f-]{36})"')


async def _packet(reader: asyncio.StreamReader) -> tuple[bytes, int, bytes]:
    """One MQTT packet: as it came, its type, and what follows the length."""
    raw = await reader.readexactly(1)
    kind, length, shift = raw[0] >> 4, 0, 0
    while True:
        digit = await reader.readexactly(1)
        raw += digit
        length |= (digit[0] & 127) << shift
        shift += 7
        if digit[0] < 128:
            body = await reader.readexactly(length)
            return raw + body, kind, body


def _published(body: bytes) -> tuple[str, bytes, bytes]:
    """Topic, packet identifier and JSON of a PUBLISH at QoS 1."""
    ends = 2 + int.from_bytes(body[:2], "big")
    return body[2:ends].decode(), body[ends : ends + 2], body[body.index(b'{"', ends) :]


class _Server:
    """A server on the loopback interface with an event loop of its own; a context manager."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _close(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await self._talk(reader, writer)
        writer.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise NotImplementedError


class MoodyBroker(_Server):
    """Acknowledges late, refuses now and then (each message twice at most), hangs up, and never takes one message.

    For a spell it takes nothing at all, as over a quota.
    """

    LATEST_S = 0.1
    REFUSED, HUNG_UP = 0.02, 0.01
    """Shares of the messages."""
    NEVER_TAKEN = 50
    """Sequence number."""
    SPELL_FROM, SPELL_TRIES = 70, 6
    """The sequence number at which the spell begins, and the tries of one message that end it."""

    def __init__(self, luck: random.Random) -> None:
        super().__init__()
        self._luck = luck
        self._refusals: Counter[str] = Counter()
        self._in_spell: Counter[str] = Counter()
        self.accepted: list[Delivery] = []
        """Every PUBLISH of an event that is acknowledged without an error, in order."""
        self.in_flight_with: defaultdict[str, set[str]] = defaultdict(set)
        """By the id of a refused message what followed it on its connection: a window, until it came again."""
        self.acknowledged: set[str] = set()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers: asyncio.Queue[tuple[bytes, int, str]] = asyncio.Queue()
        following: dict[str, int] = {}
        answering = asyncio.create_task(self._answer(answers, writer))
        try:
            while True:
                _, kind, body = await _packet(reader)
                if kind == _CONNECT:
                    writer.write(bytes.fromhex("2003000000"))
                elif kind == _PINGREQ:
                    writer.write(bytes.fromhex("d000"))
                elif kind == _DISCONNECT:
                    return
                elif kind == _PUBLISH:
                    topic, packet_id, text = _published(body)
                    if "/evt/" not in topic:
                        answers.put_nowait((packet_id, 0, ""))
                    elif self._luck.random() < self.HUNG_UP:
                        return
                    else:
                        answers.put_nowait(
                            self._verdict(packet_id, Delivery(topic, text, clock.boottime_ns()), following)
                        )
        finally:
            answering.cancel()

    @property
    def spell_is_over(self) -> bool:
        """Whether there was one."""
        return max(self._in_spell.values(), default=0) >= self.SPELL_TRIES

    def _verdict(self, packet_id: bytes, sent: Delivery, following: dict[str, int]) -> tuple[bytes, int, str]:
        """The answer; ``following``: by the id of a message refused on this connection how many came since."""
        name = json.loads(sent.body)["data"]["id"]
        following.pop(name, None)
        for refused, count in following.items():
            if count < WINDOW - 1:
                self.in_flight_with[refused].add(name)
                following[refused] = count + 1
        seq = json.loads(sent.body)["data"]["seq"]
        spell = seq >= self.SPELL_FROM and not self.spell_is_over
        self._in_spell[name] += spell
        if spell or seq == self.NEVER_TAKEN or (self._refusals[name] < 2 and self._luck.random() < self.REFUSED):
            self._refusals[name] += 1
            following[name] = 0
            return packet_id, _QUOTA_EXCEEDED, ""
        self.accepted.append(sent)
        return packet_id, 0, name

    async def _answer(self, answers: asyncio.Queue[tuple[bytes, int, str]], writer: asyncio.StreamWriter) -> None:
        while True:
            packet_id, code, name = await answers.get()
            await asyncio.sleep(self._luck.uniform(0, self.LATEST_S) if self._luck.random() < 0.1 else 0)
            if name:
                self.acknowledged.add(name)
            writer.write(b"\x40\x03" + packet_id + bytes([code]))


class Tap(_Server):
    """Passes everything on and notes which messages the broker acknowledged: what it forgets then is its own loss."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__()
        self._broker = host, port
        self.acknowledged_ns: dict[str, int] = {}
        """When the broker's answer passed, by the message's id; CLOCK_BOOTTIME."""

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_broker, to_broker = await asyncio.open_connection(*self._broker)
        flying: dict[bytes, str] = {}
        ways = [
            asyncio.create_task(self._there(reader, to_broker, flying)),
            asyncio.create_task(self._back(from_broker, writer, flying)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            to_broker.close()
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _there(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flying: dict[bytes, str]
    ) -> None:
        while True:
            raw, kind, body = await _packet(reader)
            found = _ID.search(body) if kind == _PUBLISH else None
            if found:
                flying[_published(body)[1]] = found[1].decode()
            writer.write(raw)
            await writer.drain()

    async def _back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flying: dict[bytes, str]) -> None:
        while True:
            raw, kind, body = await _packet(reader)
            if kind == _PUBACK and (len(body) < 3 or body[2] < 0x80) and body[:2] in flying:
                self.acknowledged_ns[flying.pop(body[:2])] = clock.boottime_ns()
            writer.write(raw)
            await writer.drain()
