"""The consumer and its books: what was promised against what came.

Law, for one device:

- lost: ``append`` returned, and it never came. Not ours, if the broker had acknowledged it and the consumer was not
  there to get it: a broker that was then killed forgot it (``forgotten``), or rightly dropped a command whose life
  ended (``expired_at_broker``). Nor is what stood on the very pages that the rig damaged (``unreadable``).
- reordered: at its first delivery something newer had come before. A live command may overtake, and only it; and what
  was in flight with a refused message may come before that.
- duplicates: a second delivery under the same id. Under another id, or one id for two messages, it is ``foreign``.
- stale: ``evt/command`` first came after the command's life, by CLOCK_BOOTTIME: no step of the wall clock moves it. Not
  ours: a broker that was frozen with the command in its hands (``late_from_broker``); consumers compare ``expires_at``.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from typing_extensions import Self

from edge_asr import clock
from tests.faults.device import ROOT
from tests.payloads import complaint

TRAVEL_NS = 100_000_000
"""From the end of a life to its message's arrival: nobody can call back what the network carries."""

HANDED_ON_NS = 500_000_000
"""A broker hands on at once what it acknowledges to a consumer that is there; so long it may take on a busy machine."""

DROPPED_EARLY_NS = 2_000_000_000
"""So long before the end of a command's life the broker may drop it: the message expiry counts whole seconds."""


@dataclass(frozen=True, slots=True)
class Promise:
    """A line of the device's journal."""

    seq: int
    id: str
    category: str
    expires_ns: int


def promises(journal: Path) -> list[Promise]:
    """What ``append`` has returned so far."""
    if not journal.exists():
        return []
    rows = (line.split() for line in journal.read_text(encoding="ascii").splitlines())
    return [Promise(int(seq), id_, category, int(expires_ns)) for seq, id_, category, expires_ns in rows]


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message as it came, unread: reading would delay the next arrival's time."""

    topic: str
    body: bytes
    arrived_ns: int
    """CLOCK_BOOTTIME."""


class Consumer:
    """Keeps what the broker sends, reconnects by itself and lets the broker keep its session meanwhile."""

    def __init__(self, host: str, port: int) -> None:
        self.deliveries: list[Delivery] = []
        self._came_and_went_ns: list[int] = []
        """Connected at the even places, disconnected at the odd ones; CLOCK_BOOTTIME."""
        self._arrived = threading.Condition()
        self._subscribed = threading.Event()
        self._client = Client(CallbackAPIVersion.VERSION2, "books", protocol=MQTTProtocolVersion.MQTTv5)
        self._client.reconnect_delay_set(1, 1)
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = self._on_message
        session = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        session.SessionExpiryInterval = 3600
        self._client.connect(host, port, keepalive=30, clean_start=False, properties=session)

    def __enter__(self) -> Self:
        self._client.loop_start()
        if not self._subscribed.wait(20):
            raise TimeoutError("the broker granted no subscription")
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    @property
    def presence_ns(self) -> list[tuple[int, int]]:
        """From when to when it was connected, up to now."""
        moments = [*self._came_and_went_ns, clock.boottime_ns()]
        return list(zip(moments[::2], moments[1::2], strict=False))

    def has(self, message_id: str) -> bool:
        """Whether that message has come; the newest are looked at first."""
        wanted = message_id.encode()
        return any(wanted in delivery.body for delivery in reversed(list(self.deliveries)))

    def wait(self, limit_s: float) -> None:
        """Return at the next arrival or after the limit."""
        with self._arrived:
            self._arrived.wait(limit_s)

    def wait_for(self, count: int, limit_s: float = 600.0) -> None:
        """Return once so many deliveries have come."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: len(self.deliveries) >= count, limit_s):
                raise TimeoutError(f"{len(self.deliveries)} of {count} messages came in {limit_s:.0f} s")

    def _on_connect(self, client: Client, *_: object) -> None:
        client.subscribe(f"{ROOT}/evt/#", qos=1)
        if len(self._came_and_went_ns) % 2 == 0:
            self._came_and_went_ns.append(clock.boottime_ns())

    def _on_disconnect(self, *_: object) -> None:
        if len(self._came_and_went_ns) % 2 == 1:
            self._came_and_went_ns.append(clock.boottime_ns())

    def _on_message(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        now_ns = clock.boottime_ns()
        with self._arrived:
            self.deliveries.append(Delivery(message.topic, bytes(message.payload), now_ns))
            self._arrived.notify_all()


@dataclass
class Account:
    """What one scenario came to."""

    scenario: str
    kills: int = 0
    committed: int = 0
    lost: int = 0
    reordered: int = 0
    duplicates: int = 0
    stale: int = 0
    expired: int = 0
    """Commands delivered as ``evt/expired``."""
    foreign: int = 0
    """Numbers or ids used twice, and payloads against their schema."""
    expired_at_broker: int = 0
    """Commands that the broker dropped at their message expiry, before the consumer was back."""
    forgotten: int = 0
    """Acknowledged by the broker, which was then killed: no publisher can know."""
    unreadable: int = 0
    """On damaged pages."""
    late_from_broker: int = 0
    """Commands that a frozen broker handed on when it thawed."""
    seconds: float = 0.0
    skipped: str = ""
    """Why it could not be run here."""
    failures: list[str] = field(default_factory=list)
    """What else went wrong, one sentence each."""

    @property
    def violated(self) -> bool:
        """Whether a promise was broken."""
        return bool(self.lost or self.reordered or self.stale or self.foreign or self.failures)

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Seen:
    seq: int
    id: str
    kind: str
    """Last level of the topic."""
    replayed: bool
    arrived_ns: int

    @property
    def may_overtake(self) -> bool:
        return not self.replayed and self.kind in {"command", "expired"}


def settle(
    account: Account,
    promised: Sequence[Promise],
    delivered: Sequence[Delivery],
    *,
    acknowledged_ns: Mapping[str, int] = MappingProxyType({}),
    presence_ns: Sequence[tuple[int, int]] = (),
    broker_kills_ns: Sequence[int] = (),
    broker_frozen: bool = False,
    damaged: Collection[str] = (),
    in_flight_with: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> Account:
    """Fill in the account.

    ``acknowledged_ns``: when the broker took a message, by its id; ``presence_ns``: when the consumer was there;
    ``damaged``: ids that stood on the pages that the rig damaged; ``in_flight_with``: by the id of a refused message
    what followed it before its refusal was known.
    """
    seen, invalid = _read(delivered)
    first: dict[str, _Seen] = {}
    for one in seen:
        first.setdefault(one.id, one)
    missing = [promise for promise in promised if promise.id not in first]
    account.committed = len(promised)
    fates = Counter(
        "unreadable"
        if promise.id in damaged and promise.id not in acknowledged_ns
        else _fate(promise, acknowledged_ns.get(promise.id), presence_ns, broker_kills_ns)
        for promise in missing
    )
    account.expired_at_broker, account.forgotten = fates["expired at broker"], fates["forgotten"]
    account.unreadable, account.lost = fates["unreadable"], fates["lost"]
    account.duplicates = len(seen) - len(first)
    account.reordered = _inversions(_as_meant(first.values(), in_flight_with))
    account.expired = sum(one.kind == "expired" for one in first.values())
    account.foreign = invalid + _foreign(promised, seen)
    expires_ns = {promise.id: promise.expires_ns for promise in promised}
    late = sum(
        one.kind == "command" and one.arrived_ns > expires_ns.get(one.id, one.arrived_ns) + TRAVEL_NS
        for one in first.values()
    )
    account.late_from_broker, account.stale = (late, 0) if broker_frozen else (0, late)
    return account


def _fate(
    promise: Promise, taken_ns: int | None, presence_ns: Sequence[tuple[int, int]], kills_ns: Sequence[int]
) -> str:
    """What became of a message that never came, by what the broker and the consumer can have done."""
    if taken_ns is None:
        return "lost"
    killed_ns = min((kill_ns for kill_ns in kills_ns if kill_ns >= taken_ns), default=None)
    ends_ns = [] if killed_ns is None else [killed_ns]
    ends_ns += [promise.expires_ns - DROPPED_EARLY_NS] if promise.category == "command" else []
    if not ends_ns:
        return "lost"
    until_ns = min(ends_ns)
    together_ns = (min(until_ns, gone_ns) - max(taken_ns, came_ns) for came_ns, gone_ns in presence_ns)
    if max(together_ns, default=0) > HANDED_ON_NS:
        return "lost"
    return "forgotten" if until_ns == killed_ns else "expired at broker"


def _read(delivered: Sequence[Delivery]) -> tuple[list[_Seen], int]:
    """Every delivery read, and how many distinct payloads are against their schema."""
    seen: list[_Seen] = []
    invalid: set[bytes] = set()
    for one in delivered:
        payload = json.loads(one.body)
        if complaint(one.topic, payload):
            invalid.add(one.body)
        data = payload["data"]
        kind = one.topic.rpartition("/")[2]
        seen.append(_Seen(data["seq"], data["id"], kind, data["replayed"], one.arrived_ns))
    return seen, len(invalid)


def _as_meant(first: Iterable[_Seen], in_flight_with: Mapping[str, Collection[str]]) -> list[_Seen]:
    """Refused messages put back before what nobody could call back any more, and before nothing else."""
    meant: list[_Seen] = []
    for one in first:
        companions, place = in_flight_with.get(one.id, ()), len(meant)
        for at in reversed(range(len(meant) if companions else 0)):
            ahead = meant[at]
            if ahead.seq < one.seq or (ahead.may_overtake and not one.may_overtake):
                continue
            if ahead.id not in companions:
                break
            place = at
        meant.insert(place, one)
    return meant


def _inversions(first: Sequence[_Seen]) -> int:
    found = newest = newest_ahead = 0
    for one in first:
        if one.may_overtake:
            found += one.seq < max(newest, newest_ahead)
            newest_ahead = max(newest_ahead, one.seq)
        else:
            found += one.seq < newest
            newest = max(newest, one.seq)
    return found


def _foreign(promised: Sequence[Promise], seen: Sequence[_Seen]) -> int:
    """A number and an id belong to each other for ever."""
    pairs = {(promise.seq, promise.id) for promise in promised} | {(one.seq, one.id) for one in seen}
    numbers, ids = {seq for seq, _ in pairs}, {id_ for _, id_ in pairs}
    return 2 * len(pairs) - len(numbers) - len(ids)
