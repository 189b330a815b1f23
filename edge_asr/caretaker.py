"""Looks after the box while it works: what hears and how, the board, the outbox; tells people, brokers and Prometheus.

Every second the sources are judged (``hearing``); every half minute the board and the outbox are looked at. What is
wrong becomes an alarm when it begins and when it is over (``alarms``), and where a source cannot be trusted its
commands are blocked. What others ask for (/metrics, /livez, /readyz) is read when they ask.

Law: nothing here waits for an outbox that does not answer, for then people ask.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from edge_asr import clock, contract, hearing, metrics, thermal
from edge_asr.alarms import AlarmBoard, Condition, log_line, losses
from edge_asr.attendant import Attendant
from edge_asr.audit import AuditedOutbox
from edge_asr.contract import Health, Meta, MicrophoneHealth, RequestsHealth
from edge_asr.events import Draft
from edge_asr.health import ProcessMeter
from edge_asr.hearing import Capture, HearingJudge
from edge_asr.ledger import Statistics
from edge_asr.link import destinations
from edge_asr.metrics import Metrics, Snapshot
from edge_asr.monitor import Page, Pages, verdict
from edge_asr.outbox import Outbox, OutboxError
from edge_asr.pipeline import Pipeline, with_company
from edge_asr.process_state import cpu_s, resident_bytes
from edge_asr.publisher import Publisher
from edge_asr.settings import Settings
from edge_asr.sources import Microphone
from edge_asr.watchdog import Watchdog
from edge_asr.worker import Worker

log = logging.getLogger(__name__)

T = TypeVar("T")

HEALTH_INTERVAL_S = 30.0

CERTIFICATE_DAYS = 30
"""So long before the gateway's certificate ends people are told: without it no browser gives us its microphone."""

OUTBOX_LIMIT_S = 2.0
"""A tired card may take so long for a commit; then the outbox is left out of the answer."""

BOARD_LIMIT_S = 5.0
"""Some boards take a second for all their sensors; one that hangs is left out until it answers."""

MAX_UNTOLD = 100
"""Alarms that wait for the outbox; one more is in the journal only."""

ATTEND_INTERVAL_S = 1.0
"""Between two looks at what hears; its cost is one percentile a source."""


class Box(Protocol):
    """What is looked after."""

    options: Settings
    outbox: Outbox
    pipeline: Pipeline
    worker: Worker
    publisher: Publisher
    attendant: Attendant
    watchdog: Watchdog
    microphones: Mapping[str, Microphone]
    """By the name of their source."""

    def meta(self) -> Meta:
        """What the device is made of."""


class Caretaker:
    """One box's alarms, health and numbers."""

    def __init__(self, box: Box, before: Statistics | None) -> None:
        """``before`` is what the outbox said before it was opened (``alarms.earlier``)."""
        self._box = box
        self._before = before
        self._meter = ProcessMeter()
        self._alarms = AlarmBoard()
        self._thermals = thermal.NOTHING
        self._certificate_days: float | None = None
        self._looking: concurrent.futures.Future[tuple[thermal.Thermals, float | None]] | None = None
        self._judges: dict[str, HearingJudge] = {}
        self._untold: asyncio.Queue[Draft] = asyncio.Queue(MAX_UNTOLD)
        self.metrics = Metrics()
        self.health_is_due = asyncio.Event()
        """Set, it is published at once."""

    @property
    def trouble(self) -> str:
        """The worst that is wrong; empty: nothing much."""
        return next(iter([*self._waited_for, *self._critical]), "")

    @property
    def _waited_for(self) -> list[str]:
        """What keeps the box from its work at this moment."""
        box = self._box
        found = dict.fromkeys((box.pipeline.trouble, box.watchdog.trouble, box.worker.pause))
        return [each for each in found if each]

    @property
    def _critical(self) -> list[str]:
        return [each.detail for each in self._alarms.raised if each.severity == "critical"]

    @property
    def alarms(self) -> list[str]:
        """What is wrong, a sentence each, but for what :meth:`Daemon._status` sees by itself."""
        return [each.detail for each in self._alarms.raised if each.kind not in {"microphone-gone", "broker-refused"}]

    @property
    def pages(self) -> Pages:
        """What may be asked for."""
        return {"/metrics": self._show_metrics, "/livez": self._show_life, "/readyz": self._show_readiness}

    async def run(self) -> None:
        """Until cancelled."""
        attending = asyncio.create_task(self._attend(), name="attend")
        await with_company(self._report_health(), attending, asyncio.create_task(self._commit_alarms(), name="alarms"))

    async def _report_health(self) -> None:
        """Publish how the box does, and raise an alarm whenever a message was given up."""
        while True:
            await self._look_at_board()
            statistics = await self._ask_outbox(tidy=True)
            if statistics is not None:
                self._tell(losses(self._before, statistics, self._box.options.outbox_path))
                self._before = statistics
            if self._before is not None:
                self._box.publisher.publish_retained(contract.HEALTH, contract.health_data(self._health(self._before)))
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.health_is_due.wait(), HEALTH_INTERVAL_S)
            self.health_is_due.clear()

    async def _look_at_board(self) -> None:
        """A sensor or a disk that hangs holds up this one look, one thread, and neither health nor the daemon's end."""
        if self._looking is None:
            self._looking = _in_a_thread(lambda: (thermal.read(), _certificate_days(self._box.options)))
            await asyncio.wait([asyncio.wrap_future(self._looking)], timeout=BOARD_LIMIT_S)
            if not self._looking.done():
                self._thermals = thermal.NOTHING
                log.warning(
                    "the board's sensors have not answered for %g s; health goes on without them", BOARD_LIMIT_S
                )
        if self._looking.done():
            (self._thermals, self._certificate_days), self._looking = self._looking.result(), None

    async def _ask_outbox(self, *, tidy: bool = False) -> Statistics | None:
        """What the outbox says of itself, ``tidy``: without what is outdated; None: it does not answer."""
        outbox = self._box.outbox
        try:
            if tidy:
                await asyncio.wait_for(outbox.drop_outdated(), OUTBOX_LIMIT_S)
            return await asyncio.wait_for(outbox.statistics(), OUTBOX_LIMIT_S)
        except (OutboxError, asyncio.TimeoutError):  # pipeline and watchdog tell why
            return None

    def _tell(self, alarms: Sequence[Draft]) -> None:
        """The journal at once, everybody else as soon as the outbox can."""
        for alarm in alarms:
            log.warning(log_line(alarm))
            with contextlib.suppress(asyncio.QueueFull):
                self._untold.put_nowait(alarm)

    async def _commit_alarms(self) -> None:
        while True:
            drafts = [await self._untold.get()]
            while not self._untold.empty():
                drafts.append(self._untold.get_nowait())
            with contextlib.suppress(OutboxError):  # full: the pipeline says so, and health shows it
                await self._box.outbox.append(*drafts)

    def _health(self, statistics: Statistics) -> Health:
        box, asked = self._box, self._box.attendant
        health = self._meter.read(
            self._microphone_health(),
            statistics,
            box.pipeline.real_time_factor,
            self._thermals.hottest_c,
            muted=box.pipeline.muted,
            requests=RequestsHealth(asked.ok, asked.refused, asked.dropped),
            recognizer=box.worker.pid,
        )
        stuck_s = round(box.outbox.unanswered_s, 1)
        health = replace(
            health,
            provider=box.worker.facts.provider,
            recognizers_replaced=box.worker.replaced,
            outbox=replace(health.outbox, unanswered_s=stuck_s),
        )
        if isinstance(box.outbox, AuditedOutbox):
            health = replace(health, audit_newest=box.outbox.audit.newest)
        return health

    def _microphone_health(self) -> dict[str, MicrophoneHealth]:
        troubles: dict[str, list[str]] = {}
        for condition in self._alarms.raised:
            if condition.source is not None:
                troubles.setdefault(condition.source, []).append(condition.kind)
        found = {}
        for name, ear in self._box.pipeline.ears.items():
            microphone = self._box.microphones.get(name)
            found[name] = replace(ear.meter.read(), troubles=troubles.get(name, []))
            if microphone is not None:
                error = None if microphone.rate_error is None else round(microphone.rate_error, 4)
                found[name] = replace(found[name], rate_error=error, captures_replaced=microphone.replaced)
        return found

    async def _show_metrics(self) -> Page:
        return Page(self.metrics.render(await self.snapshot()), metrics.CONTENT_TYPE)

    async def _show_life(self) -> Page:
        """Whether the work goes on: what answers no more is restarted by systemd, whatever asks here may do so too.

        A recognizer that is being replaced is no reason for that: the daemon ends by itself where none can be had.
        """
        hang = self._box.watchdog.hang()
        return verdict([hang] if hang else [])

    async def _show_readiness(self) -> Page:
        """Whether what is said is heard and kept; a broker that is away is no reason, for that there is the outbox."""
        return verdict([*self._critical, *self._waited_for])

    async def snapshot(self) -> Snapshot:
        """Everything there is to be seen at this moment."""
        statistics = await self._ask_outbox()
        worker_bytes = worker_cpu_s = None
        with contextlib.suppress(OSError):  # it is being replaced
            pid = self._box.worker.pid
            worker_bytes, worker_cpu_s = resident_bytes(pid), cpu_s(pid)
        return Snapshot(
            meta=self._box.meta(),
            microphones=self._microphone_health(),
            outbox=statistics,
            outbox_unanswered_s=self._box.outbox.unanswered_s,
            alarms=self._alarms.raised,
            thermals=self._thermals,
            broker_refuses=self._box.publisher.refusal is not None,
            broker_connected=self._box.publisher.connected if destinations(self._box.options.mqtt) else None,
            finals_waiting=self._box.pipeline.finals_waiting,
            partials_dropped=self._box.pipeline.partials_dropped,
            recognizers_replaced=self._box.worker.replaced,
            captures_replaced={name: each.replaced for name, each in self._box.microphones.items()},
            recognizer_bytes=worker_bytes,
            recognizer_cpu_s=worker_cpu_s,
            clock_synchronized=clock.time_quality() == "synchronized",
        )

    async def _attend(self) -> None:
        """Look after everything that hears, and tell people when a trouble begins and when it is over."""
        while True:
            conditions = list(self._conditions())
            self._box.pipeline.distrusted = {
                each.source: f"{each.detail}; {each.remedy}"
                for each in conditions
                if each.kind == hearing.TOO_NOISY and each.source is not None
            }
            drafts = self._alarms.update(conditions, clock.boottime_ns())
            self._tell(drafts)
            if drafts:
                self.health_is_due.set()  # it shows what is raised
            await asyncio.sleep(clock.until_next(ATTEND_INTERVAL_S))

    def _conditions(self) -> Iterator[Condition]:
        """Everything that is wrong at this moment."""
        ears = self._box.pipeline.ears
        own = {source.name for source in self._box.options.sources}
        known, self._judges = self._judges, {}
        for name in ears:  # guests come and go
            self._judges[name] = known.get(name) or HearingJudge(name, guest=name not in own)
        for name, ear in ears.items():
            microphone = self._box.microphones.get(name)
            capture = None
            if microphone is not None:
                capture = Capture(microphone.state == "lost", microphone.trouble, microphone.rate_error)
            yield from self._judges[name].look(ear.meter, capture, self._box.options.commands.max_noise_dbfs)
        yield from thermal.conditions(self._thermals)
        refusal = self._box.publisher.refusal
        if refusal is not None:
            yield Condition("broker-refused", None, "critical", refusal.detail, refusal.remedy)
        days = self._certificate_days
        if days is not None and days < CERTIFICATE_DAYS:
            detail = (
                f"the gateway's certificate ends in {days:.0f} days" if days > 0 else "the gateway's certificate ended"
            )
            yield Condition("certificate-ends", None, "warning", detail, "renew it: `edge-asr gateway cert`")
        outbox = self._box.outbox
        if isinstance(outbox, AuditedOutbox) and (outbox.trouble or outbox.audit.damage):
            detail = f"no audit records are written: {outbox.trouble}" if outbox.trouble else outbox.audit.damage
            yield Condition("audit-failed", None, "warning", detail, "see to the disk; the box works on")
        wanted, in_use = self._box.options.model.provider, self._box.worker.facts.provider
        if in_use != wanted:
            detail = f"the model runs on {in_use} instead of {wanted}"
            remedy = "install a matching wheel; see docs/jetson.md"
            yield Condition("provider-fallback", None, "warning", detail, remedy)


def _in_a_thread(work: Callable[[], T]) -> concurrent.futures.Future[T]:
    """Done by a thread that nobody waits for at the end, unlike the event loop's own."""
    found: concurrent.futures.Future[T] = concurrent.futures.Future()

    def do() -> None:
        try:
            found.set_result(work())
        except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
            found.set_exception(error)

    threading.Thread(target=do, name="board", daemon=True).start()
    return found


def _certificate_days(options: Settings) -> float | None:
    """Days until the gateway's certificate ends; None: there is no gateway, or none that has one."""
    if options.gateway is None or not options.gateway.tls:
        return None
    from edge_asr.gateway import GatewayError, certificates  # noqa: PLC0415 - 9 MB that only a gateway needs

    try:
        return certificates.days_left(options.gateway.cert_file or certificates.Files(options.gateway_directory).server)
    except GatewayError:  # being renewed; at a start it is one line and exit code 78
        return None
