"""What an MQTT subscriber sees: every message of a device, as lines for people or as JSON for programs.

This is a client like any other: it knows the device only by what the broker delivers.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text
from typing_extensions import Self

from edge_asr import contract
from edge_asr.link import Destination, LinkError, dial

ANSWER_LIMIT_S = 10.0

WAITING_LIMIT = 2000
"""Deliveries that wait for a slow reader; one more drops the oldest and counts it: who looks on wants the newest."""

REMEMBERED = 100
"""Commands of which a receipt can be told in words."""


class SubscriberError(Exception):
    """The broker cannot be reached or refuses; the message says what to check."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message as the broker delivered it."""

    topic: str
    """In full."""
    kind: str
    """See ``contract.kind_of``."""
    data: Mapping[str, Any]
    """The flat data, taken out of its CloudEvents envelope if it came in one."""


class Subscriber:
    """A subscription at the first broker that accepts us: an async context manager to iterate over."""

    def __init__(
        self, brokers: Sequence[Destination], topic_filter: str, *, waiting_limit: int = WAITING_LIMIT
    ) -> None:
        self._brokers = brokers
        self._filter = topic_filter
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Delivery] = deque(maxlen=waiting_limit)
        self._lock = threading.Lock()
        self._arrived = asyncio.Event()
        self.dropped = 0
        """Deliveries that the reader was too slow for."""

    async def __aenter__(self) -> Self:
        problems = []
        for to in self._brokers:
            try:
                await self._subscribe(to)
            except SubscriberError as error:
                problems.append(str(error))
            else:
                return self
        raise SubscriberError("\n".join(problems))

    async def _subscribe(self, to: Destination) -> None:
        self._to = to
        self._subscribed: asyncio.Future[None] = self._loop.create_future()
        self._client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = self._on_subscribe
        self._client.on_message = self._on_message
        try:
            await asyncio.to_thread(dial, self._client, to)
            self._client.loop_start()
            await asyncio.wait_for(self._subscribed, ANSWER_LIMIT_S)
        except LinkError as error:
            raise SubscriberError(str(error)) from None
        except (asyncio.TimeoutError, SubscriberError) as error:
            self._client.loop_stop()
            raise SubscriberError(str(error) or f"{to.address} does not answer; is it an MQTT 5 broker?") from None

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.disconnect()
        await asyncio.to_thread(self._client.loop_stop)

    async def __aiter__(self) -> AsyncIterator[Delivery]:
        while True:
            with self._lock:
                delivery = self._waiting.popleft() if self._waiting else None
                if delivery is None:
                    self._arrived.clear()
            if delivery is None:
                await self._arrived.wait()
            else:
                yield delivery

    def _keep(self, delivery: Delivery) -> None:
        """In paho's thread; the loop may stand still meanwhile, blocked by whoever reads what it prints."""
        with self._lock:
            was_empty = not self._waiting
            self.dropped += len(self._waiting) == self._waiting.maxlen
            self._waiting.append(delivery)
        if was_empty:
            self._loop.call_soon_threadsafe(self._arrived.set)

    def _settle(self, problem: str | None) -> None:
        if self._subscribed.done():
            return
        if problem is None:
            self._subscribed.set_result(None)
        else:
            self._subscribed.set_exception(SubscriberError(problem))

    def _on_connect(self, client: paho.Client, _data: object, _flags: object, reason: Any, _more: object) -> None:  # noqa: ANN401 - paho's
        if reason.is_failure:
            problem = f"the broker refuses: {reason}; check {self._to.key}.username and {self._to.key}.password_file"
            self._loop.call_soon_threadsafe(self._settle, problem)
        else:
            client.subscribe(self._filter, qos=1)

    def _on_subscribe(self, _client: paho.Client, _data: object, _mid: int, reasons: list[Any], _more: object) -> None:
        refused = any(reason.is_failure for reason in reasons)
        problem = f"the broker refuses the subscription to {self._filter}; check its access rules" if refused else None
        self._loop.call_soon_threadsafe(self._settle, problem)

    def _on_message(self, _client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        try:
            content = json.loads(message.payload)
            json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair can be shown nowhere
        except (ValueError, RecursionError):
            return  # somebody else's
        data = content.get("data", content) if isinstance(content, dict) else None
        if isinstance(data, dict):
            self._keep(Delivery(message.topic, contract.kind_of(message.topic), data))


class Screen:
    """Shows deliveries to a person. A partial overwrites itself on a terminal and is left out elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._partial_shown = False
        self._commands: dict[str, str] = {}
        """The last commands by id, to show what a receipt is about."""

    def show(self, delivery: Delivery) -> None:
        """Print one delivery."""
        if delivery.kind == contract.PARTIAL:
            self._show_partial(str(delivery.data.get("text", "")))
            return
        describe = self._receipt if delivery.kind == contract.RECEIPT else _LINES.get(delivery.kind)
        if describe is None:
            return
        try:
            line = describe(delivery.data)
            if delivery.kind == contract.COMMAND:
                self._remember(delivery.data)
        except (LookupError, TypeError, ValueError, AttributeError):  # anybody who may write there can write anything
            line = Text(f"✗ not what {delivery.kind} says of itself: {delivery.topic}", "red")
        self._wipe_partial()
        moment = str(delivery.data.get("time", ""))[11:23]
        self._console.print(Text.assemble((f"{moment:12}  ", "dim"), line), soft_wrap=True)

    def _remember(self, command: Mapping[str, Any]) -> None:
        self._commands[command["id"]] = _call(command)
        if len(self._commands) > REMEMBERED:
            del self._commands[next(iter(self._commands))]

    def _receipt(self, data: Mapping[str, Any]) -> Text:
        """Somebody else's message: nothing in it is sure to be there."""
        command_id, verdict, reason = (str(data.get(key, "")) for key in ("command_id", "verdict", "reason"))
        mark, colour = ("✓", "green") if verdict == "accepted" else ("✗", "yellow")
        about = self._commands.get(command_id, f"command {command_id}")
        return Text.assemble(
            (f"{mark} {verdict} by the MES: {about}", colour), (f"   {reason}" if reason else "", "dim")
        )

    def _show_partial(self, text: str) -> None:
        if self._console.is_terminal:
            self._wipe_partial()
            self._console.print(Text(f"{'':12}  … {text[-max(20, self._console.width - 18) :]}", "dim italic"), end="")
            self._partial_shown = True

    def _wipe_partial(self) -> None:
        if self._partial_shown:
            self._console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))
            self._partial_shown = False


def _transcript(data: Mapping[str, Any]) -> Text:
    tags = [data["language"], *(t for t in (data["event"], data["emotion"]) if t not in _UNREMARKABLE)]
    details = f"   {' '.join(tags)} · confidence {data['confidence']:.2f} · {data['duration_s']:.1f} s{_late(data)}"
    return Text.assemble(("“" + data["text"] + "”", "bold"), (details, "dim"))


def _command(data: Mapping[str, Any]) -> Text:
    risk = "" if data["risk"] == "normal" else f" · risk {data['risk']}"
    details = f"   confidence {data['confidence']:.2f}{risk} · valid until {data['expires_at'][11:19]}{_late(data)}"
    return Text.assemble(("► " + _call(data), "bold green"), (details, "dim"))


def _pending(data: Mapping[str, Any]) -> Text:
    how_often = "" if data["confirmations_left"] == 1 else f" ({data['confirmations_left']} times)"
    details = f"   “{data['read_back']}” · confirm until {data['confirm_until'][11:19]}{how_often}"
    return Text.assemble(("? " + _call(data), "bold cyan"), (details, "dim"))


def _expired(data: Mapping[str, Any]) -> Text:
    return Text.assemble(("✗ expired: " + _call(data), "yellow"), (f"   at {data['expires_at'][11:19]}", "dim"))


def _rejected(data: Mapping[str, Any]) -> Text:
    return Text.assemble(("✗ " + str(data["reason"]).replace("-", " "), "yellow"), (f"   {data['detail']}", "dim"))


def _alarm(data: Mapping[str, Any]) -> Text:
    return Text.assemble((f"! {data['kind']}", "bold red"), f"   {data['detail']}")


def _again(data: Mapping[str, Any]) -> Text:
    return Text.assemble((f"↻ “{data['text']}”", "cyan"), (f"   the {data['said']} again", "dim"))


def _status(data: Mapping[str, Any]) -> Text:
    colour = {"online": "green", "degraded": "yellow"}.get(data["state"], "red")
    return Text.assemble((f"● {data['state']}", colour), (f"   {data['device']} {data['reason']}", "dim"))


def _meta(data: Mapping[str, Any]) -> Text:
    languages = ", ".join(data["languages"])
    return Text(f"  edge-asr {data['version']} · model {data['model']} ({languages}) · {data['provider']}", "dim")


def _call(data: Mapping[str, Any]) -> str:
    """``SetSpeed(machine=press, speed=1200 rpm)``."""
    units = data.get("units", {})
    inside = ", ".join(
        f"{name}={value}{' ' + units[name] if name in units else ''}" for name, value in data["slots"].items()
    )
    return f"{data['intent']}({inside})"


def _late(data: Mapping[str, Any]) -> str:
    return " · replayed" if data.get("replayed") else f" · {data['latency_ms']:.0f} ms" if "latency_ms" in data else ""


_UNREMARKABLE = {"Speech", "EMO_UNKNOWN", "NEUTRAL"}

_LINES: Mapping[str, Callable[[Mapping[str, Any]], Text]] = {
    contract.TRANSCRIPT: _transcript,
    contract.COMMAND: _command,
    contract.PENDING: _pending,
    contract.EXPIRED: _expired,
    contract.REJECTED: _rejected,
    contract.AGAIN: _again,
    contract.ALARM: _alarm,
    contract.STATUS: _status,
    contract.META: _meta,
}
