"""Builds the product from its settings and runs it: the only room, with ``cli``, that names concrete classes.

Start: settings, models and grammars are checked before anything is opened; then outbox, publisher, sources. SIGTERM
and SIGINT close the sources and let the pipeline commit what was heard. SIGHUP reads the settings again and applies
what can be applied between two utterances.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import logging
import signal
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import edge_asr
from edge_asr import (
    clock,
    contract,
    grammar,
    installation,
    logs,
    model_store,
    prepared,
    settings,
    systemd,
)
from edge_asr.alarms import earlier, log_line, missing_receipts
from edge_asr.attendant import Attendant
from edge_asr.audit import FILES as AUDIT_FILES
from edge_asr.audit import AuditedOutbox, AuditLog
from edge_asr.caretaker import HEALTH_INTERVAL_S, Caretaker
from edge_asr.contract import Meta, Renderer
from edge_asr.engine import Engine
from edge_asr.events import Category, Json, Message
from edge_asr.file_retention import SEALED, FileRetention, Tidier
from edge_asr.gateway.box import Box, Broker
from edge_asr.health import give_back
from edge_asr.home_assistant import discovery
from edge_asr.hotwords import HotwordError
from edge_asr.inference import SileroDetector
from edge_asr.link import destinations
from edge_asr.model_store import ModelError, ModelFiles
from edge_asr.monitor import Monitor
from edge_asr.outbox import Outbox, OutboxError
from edge_asr.pipeline import Pipeline, Source, Timing, Understanding, with_company
from edge_asr.publisher import Publisher
from edge_asr.retention import DROP_ORDER, Limits
from edge_asr.settings import Settings
from edge_asr.sources import Files, Microphone, Stdin
from edge_asr.sparkplug import Mirror, Node, group_of
from edge_asr.standing import StandingOrders
from edge_asr.watchdog import Watchdog
from edge_asr.worker import Worker, WorkerError
from edge_asr.zygote import Zygote

if TYPE_CHECKING:
    from edge_asr.gateway.server import Gateway
    from edge_asr.recorder import Recorder
    from edge_asr.traces import Tracer

log = logging.getLogger(__name__)

_REFUSALS = (settings.SettingsError, ModelError, HotwordError, grammar.GrammarError, WorkerError, OSError)
"""What may be wrong with settings that are to be taken over, or with the disk that they are on."""

OPTIMIZE_AFTER_S = 60.0
"""The first minute belongs to the start; what makes a graph then takes CPU time that nobody else wants."""

GOODBYE_LIMIT_S = 0.5
"""What was just committed may still go out when the daemon is told to stop; it is safe in the outbox in any case."""

DRAIN_LIMIT_S = 10.0
"""Sources that ended by themselves (recordings, a pipe) leave the broker so long to take the rest."""

STATUS_INTERVAL_S = 5.0

RELOADED = ("log", "hotwords", "commands", "model")
"""Sections of the settings that SIGHUP takes over."""


def build_source(options: settings.SourceSettings, zygote: Zygote) -> Source:
    """The source that the settings describe."""
    if isinstance(options, settings.MicrophoneSource):
        return Microphone(options, zygote)
    return Files(options) if isinstance(options, settings.FilesSource) else Stdin(options)


def open_gateway(options: Settings) -> Gateway | None:
    """The gateway that the settings ask for. Raises SettingsError."""
    if options.gateway is None:
        return None
    try:
        from edge_asr.gateway.server import Gateway  # noqa: PLC0415 - 40 MB that only this extra brings
    except ModuleNotFoundError as error:
        remedy = "install them with `pip install 'edge-asr[gateway]'`, or remove the section"
        raise settings.SettingsError(f"gateway: needs packages that are not here ({error.name}); {remedy}") from None
    return Gateway(options)


def open_mirror(options: Settings, model: str) -> Mirror | None:
    """The Sparkplug mirror that the settings ask for. Raises SettingsError."""
    if not options.sparkplug.enabled:
        return None
    if importlib.util.find_spec("google.protobuf") is None:
        remedy = "install it with `pip install 'edge-asr[sparkplug]'`, or leave it disabled"
        raise settings.SettingsError(f"sparkplug: needs protobuf, which is not here; {remedy}")
    node = Node(group_of(options), options.device, {"Version": edge_asr.__version__, "Model": model})
    return Mirror(node, f"{options.mqtt.client_id or f'edge-asr-{options.device}'}-sparkplug")


def plan(options: Settings) -> Iterator[str]:
    """What a daemon under these settings would do, a line each; everything is loaded, nothing opened.

    Raises ModelError, HotwordError, GrammarError.
    """
    engine = Engine.build(options)
    manifest = engine.files.manifest
    yield f"listen to   {', '.join(f'{source.name} ({source.type})' for source in options.sources)}"
    yield f"hear with   {manifest.name} {manifest.version} on {engine.recognizer.provider}"
    yield f"understand  {', '.join(options.commands.grammars) or 'no commands, transcripts only'}"
    yield f"keep in     {options.outbox_path}"
    brokers = ", ".join(each.address for each in destinations(options.mqtt))
    yield f"publish to  {brokers or 'no broker'}, below {options.topic_root}/"
    if options.monitoring.port is not None:
        yield f"answer on   http://{options.monitoring.host}:{options.monitoring.port}/metrics"
    if options.gateway is not None:
        yield f"let talk    through the gateway on {options.gateway.host}:{options.gateway.port}"


def open_tracer(options: Settings) -> Tracer | None:
    """The tracer that the settings ask for. Raises SettingsError."""
    if options.tracing.endpoint is None:
        return None
    try:
        from edge_asr.traces import Tracer  # noqa: PLC0415 - what only this extra brings
    except ModuleNotFoundError as error:
        remedy = "install them with `pip install 'edge-asr[otel]'`, or remove the section"
        raise settings.SettingsError(f"tracing: needs packages that are not here ({error.name}); {remedy}") from None
    return Tracer(options.tracing.endpoint, options.device)


def open_outbox(options: Settings) -> Outbox:
    """The outbox; with an audit log where the settings ask for one. Raises OutboxError."""
    place, limits = (options.outbox_path, options.outbox.max_bytes), limits_of(options)
    if not options.audit.enabled:
        return Outbox(*place, limits=limits)
    texts = options.audit.texts and options.privacy.publish == "everything"
    return AuditedOutbox(*place, AuditLog(options.audit_directory, texts=texts), limits=limits)


def kept_files(options: Settings) -> list[FileRetention]:
    """What was said and is no message; its days are kept to also where nothing more is kept."""
    audit_log = options.audit
    return [
        FileRetention(options.recordings_directory, f"*{SEALED}", options.recorder.days),
        FileRetention(options.audit_directory, AUDIT_FILES, audit_log.days, spare_newest=audit_log.enabled),
    ]


def limits_of(options: Settings) -> dict[Category, Limits]:
    """What each class of messages may be."""
    days = {category: getattr(options.outbox.limits, category).days for category in DROP_ORDER}
    shorter = [each for each in (days["transcript"], options.privacy.transcript_days) if each is not None]
    days["transcript"] = min(shorter, default=None)
    return {
        category: Limits(
            max_bytes=getattr(options.outbox.limits, category).max_bytes,
            max_age_s=None if days[category] is None else days[category] * 86_400,
        )
        for category in DROP_ORDER
    }


def open_recorder(options: Settings) -> Recorder | None:
    """What keeps doubtful utterances; None where nothing does. Raises SettingsError."""
    if options.recorder.public_key is None:
        return None
    from edge_asr.recorder import Recorder  # noqa: PLC0415 - 9 MB of cryptography that is off by default

    return Recorder(options.recorder, options.recordings_directory)


class Daemon:
    """One running box. Construction checks everything that can be wrong; :meth:`run` does the work."""

    def __init__(self, options: Settings, reload: Callable[[], Settings] | None = None) -> None:
        self.options = options
        self._read_settings = reload
        self.standing = StandingOrders(options.state_directory)
        self._effective = self.standing.over(options)
        self._zygote = Zygote(systemd.handed_over())  # what was heard is the daemon's: children would never close it
        try:
            self.worker = Worker(self._effective, self._zygote)
        except BaseException:
            self._zygote.close()
            raise
        self._stands = self.standing.names(options)
        self.vocabulary = self.worker.vocabulary
        """The words and grammars that ``options`` stand for."""
        self._vad = model_store.locate_vad()
        self._fitting = asyncio.Lock()
        self._before = earlier(options.outbox_path)
        self.outbox = open_outbox(options)
        self._recorder = open_recorder(options)
        self._gateway = open_gateway(options)
        self._tracer = open_tracer(options)
        self.stopped = False
        """Whether somebody asked it to stop."""

    async def run(self, sources: Sequence[Source] | None = None) -> None:
        """Listen until the sources end or a signal comes, then commit what was heard. Raises OutboxError."""
        options = self.options
        chosen = [build_source(each, self._zygote) for each in options.sources] if sources is None else sources
        self.attendant = Attendant(self)
        self._caretaker = Caretaker(self, self._before)
        self._mirror = open_mirror(options, self.worker.name)
        self.publisher = self._open_publisher()
        self.microphones = {source.name: source for source in chosen if isinstance(source, Microphone)}
        self.pipeline = Pipeline(
            options,
            sources=chosen,
            new_detector=lambda: SileroDetector(self._vad),
            engine=self.worker,
            outbox=self.outbox,
            live=self.live,
        )
        self.pipeline.muted = self.standing.muted
        self.pipeline.turned = self._turn
        self.watchdog = Watchdog(self._zygote, self.outbox, self.worker)
        self.show()
        background = self._background()
        tidier = Tidier(kept_files(options))
        give_back()  # what loading left behind
        gc.freeze()  # what it made stays: every full collection looked at it, for 30 ms in which nobody is heard
        with self._signals():
            systemd.ready(self._status())
            await self._tell_of_model()
            names = [source.name for source in chosen] + ["the gateway's guests"] * (self._gateway is not None)
            log.info("listening to %s", ", ".join(names))
            try:
                await with_company(self._hear(), *background)
            finally:
                self.worker.close()
                self._zygote.close()
                self.outbox.close()
                tidier.close()
                if self._recorder is not None:
                    self._recorder.close()
                if self._tracer is not None:
                    await asyncio.to_thread(self._tracer.close)

    def _background(self) -> list[asyncio.Task[None]]:
        """Everything that goes on beside hearing."""
        options = self.options
        background = [
            asyncio.create_task(self.publisher.run(), name="publish"),
            asyncio.create_task(self._caretaker.run(), name="care"),
            asyncio.create_task(self._tell_state(), name="status"),
            asyncio.create_task(self.watchdog.run(), name="watchdog"),
            asyncio.create_task(self.attendant.run(), name="requests"),
            asyncio.create_task(self._optimize(), name="optimize"),
        ]
        if self._mirror is not None:
            background.append(asyncio.create_task(self._mirror.run(), name="sparkplug"))
        self.pipeline.noted = self._note
        if options.monitoring.port is not None:
            monitor = Monitor(options.monitoring.host, options.monitoring.port, self._caretaker.pages)
            background.append(asyncio.create_task(monitor.run(), name="monitor"))
        if options.requests.receipt_within_s is not None:
            receipts = self._await_receipts(options.requests.receipt_within_s)
            background.append(asyncio.create_task(receipts, name="receipts"))
        if self._gateway is not None:
            self.pipeline.understood, self.pipeline.told = self._gateway.understood, self._gateway.told
            self.pipeline.awaits_guests = True
            SileroDetector(self._vad)  # all share one network: it is opened now, not while the first guest speaks
            background.append(asyncio.create_task(self._gateway.run(self._box()), name="gateway"))
        return background

    def _turn(self, source: str, speaking: bool) -> None:  # noqa: FBT001 - as the pipeline calls it
        if source in self.microphones:
            self.microphones[source].attend(speaking=speaking)
        elif self._gateway is not None:
            self._gateway.turned(source, speaking=speaking)

    def _note(self, heard: Understanding, timing: Timing) -> None:
        self._caretaker.metrics.count(heard, timing)
        if self._tracer is not None:
            self._tracer.note(heard, timing)
        if self._recorder is not None:
            self._recorder.offer(heard)

    def _open_publisher(self) -> Publisher:
        options = self.options
        renderer = Renderer(options.topic_root, options.device, options.mqtt.payload)
        assistant = options.home_assistant
        found_by = discovery(renderer, assistant.prefix, version=edge_asr.__version__, model=self.worker.name)
        return Publisher(
            options.mqtt,
            renderer,
            self.outbox,
            on_change=self._on_broker,
            on_request=self.attendant.take if options.requests.allow else None,
            on_delivered=self._show_delivered,
            announcements=[found_by] if assistant.enabled else [],
        )

    def _show_delivered(self, topic: str, message: Message, replayed: bool) -> None:  # noqa: FBT001 - the publisher's
        if self._mirror is not None:
            self._mirror.show(topic, message, replayed)
        if self._tracer is not None:
            self._tracer.delivered(topic, message)

    def _box(self) -> Box:
        """What the gateway sees of us."""

        def broker() -> Broker:
            if not destinations(self.options.mqtt):
                return "none"
            return "connected" if self.publisher.connected else "offline"

        return Box(self.pipeline, broker, self._caretaker.snapshot)

    def live(self, topic: str, data: Mapping[str, Json]) -> None:
        """Partials go to the broker, and to the session that speaks."""
        self.publisher.publish_live(topic, data)
        if self._gateway is not None:
            self._gateway.live(topic, data)

    async def _hear(self) -> None:
        try:
            await self.pipeline.run()
            await self._drain(GOODBYE_LIMIT_S if self.stopped else DRAIN_LIMIT_S)
        finally:
            systemd.stopping("saying goodbye to the broker")

    async def stop(self) -> None:
        """Close the sources; :meth:`run` returns when everything heard is committed."""
        log.info("stopping")
        systemd.stopping("committing what was heard")
        self.stopped = True
        await self.pipeline.close()

    async def _drain(self, limit_s: float) -> None:
        """Give the broker a moment for the rest; the outbox keeps what it does not take."""
        deadline = asyncio.get_running_loop().time() + limit_s
        while self.publisher.connected and asyncio.get_running_loop().time() < deadline:
            if not await self.outbox.oldest(1):
                return
            await asyncio.sleep(0.02)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        tasks: set[asyncio.Task[None]] = set()

        def begin(work: Coroutine[None, None, None], name: str) -> None:
            task = asyncio.create_task(work, name=name)
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        def stop() -> None:
            loop.remove_signal_handler(signal.SIGINT)  # a second Ctrl-C ends at once
            begin(self.stop(), "stop")

        handlers: dict[signal.Signals, Callable[[], None]] = {signal.SIGTERM: stop, signal.SIGINT: stop}
        if self._read_settings is not None:
            handlers[signal.SIGHUP] = lambda: begin(self._reload_for_systemd(), "reload")
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)

    async def _reload_for_systemd(self) -> None:
        """Answer SIGHUP."""
        systemd.reloading()
        try:
            with contextlib.suppress(*_REFUSALS):
                await self.reload()  # which has logged what is wrong
        finally:
            systemd.ready(self._status())

    async def reload(self) -> list[str]:
        """Read the settings again and take over what may change while running: :data:`RELOADED`, and another model.

        Bad settings change nothing. A new model is loaded beside the old one, which goes on working until then. The
        result: what needs a restart. Raises SettingsError, ModelError, HotwordError, GrammarError, WorkerError.
        """
        if self._read_settings is None:
            raise settings.SettingsError("this edge-asr runs without a settings file; there is nothing to reload")
        async with self._fitting:
            try:
                fresh = await asyncio.to_thread(self._read_settings)
                updated = self.options.model_copy(update={name: getattr(fresh, name) for name in RELOADED})
                await self._fit(updated)
            except _REFUSALS as error:
                log.error("reload refused, nothing has changed: %s", error)  # noqa: TRY400 - no bug, no traceback
                raise
            finally:
                await self._tell_of_model()
        logs.configure(fresh.log)
        later = sorted(name for name in Settings.model_fields if getattr(updated, name) != getattr(fresh, name))
        restart = f"; a restart is needed for: {', '.join(later)}" if later else ""
        log.info("reloaded, listening with %s%s", self.worker.name, restart)
        return later

    async def refit(self, order: Callable[[], Callable[[], None]]) -> None:
        """Give a standing order and hear under it; ``order`` writes it and returns how to take it back.

        Raises HotwordError, GrammarError, OSError; then nothing has changed.
        """
        async with self._fitting:
            take_back = await asyncio.to_thread(order)
            try:
                await self._fit(self.options)
            except _REFUSALS:
                await asyncio.to_thread(take_back)
                raise

    async def _fit(self, options: Settings) -> None:
        """Hear with the model, words and grammars of settings, standing orders over them."""
        effective = self.standing.over(options)
        await asyncio.to_thread(self.worker.reload, effective)
        self.options, self._effective, self.vocabulary = options, effective, self.worker.vocabulary
        self.show()

    async def _optimize(self) -> None:
        """Let a graph be made for this CPU where nobody has made one yet, and hear with it from then on."""
        await asyncio.sleep(OPTIMIZE_AFTER_S)
        options, before = self._effective, self.model
        if not prepared.is_wanted(options.model) or prepared.record_of(before, options.models_directory):
            return
        try:
            record = await prepared.prepare_beside(installation.chosen(options), options.models_directory)
            if record.variant != "own":
                async with self._fitting:
                    await self._fit(self.options)
        except _REFUSALS as error:
            log.warning("hearing goes on with the model's own graph: %s", error)
        else:
            log.info("%s is optimized for this CPU: %.2f of the CPU time", record.model, record.cpu_ratio)

    async def _tell_of_model(self) -> None:
        """Let people know that a newly activated model had to make way."""
        trouble, self.worker.trouble = self.worker.trouble, ""
        if not trouble:
            return
        remedy = "import another release; see docs/models.md"
        alarm = contract.alarm_draft("model-rolled-back", trouble, severity="critical", remedy=remedy)
        log.error(log_line(alarm))
        self._caretaker.metrics.count_rollback()
        with contextlib.suppress(OutboxError):  # the disk is full: the log has it
            await self.outbox.append(alarm)

    @property
    def model(self) -> ModelFiles:
        """The model in use."""
        return self.worker.facts.files

    async def note(self, verb: str, role: str) -> None:
        """Keep a record of a request that has changed something, where the settings ask for records."""
        if isinstance(self.outbox, AuditedOutbox):
            self.outbox.note({"what": "request", "verb": verb, "role": role})

    def show(self) -> None:
        """Publish status and meta, for something has changed."""
        self._stands = self.standing.names(self.options)
        self.publisher.publish_retained(contract.STATUS, self.status())
        self.publisher.publish_retained(contract.META, contract.meta_data(self.meta()))

    def status(self) -> contract.Data:
        """What ``status`` says of the device."""
        trouble, muted = self._caretaker.trouble, self.pipeline.muted
        reason = trouble or ("muted by request" if muted else "")
        return contract.status_data("degraded" if trouble else "online", reason, muted=muted)

    def meta(self) -> Meta:
        """What the device is made of, by what was loaded: the files may have been edited since."""
        facts = self.worker.facts
        manifest = facts.files.manifest
        loaded = zip(self.options.commands.grammars, self._effective.commands.grammars, strict=True)
        return Meta(
            version=edge_asr.__version__,
            model=f"{manifest.name} {manifest.version}",
            model_sha256=facts.files.sha256,
            languages=list(manifest.languages),
            engine=self.options.model.engine,
            provider=facts.provider,
            provider_wanted=self.options.model.provider,
            grammars={name: self.vocabulary.grammars_sha256[source] for name, source in loaded},
            sources=[source.name for source in self.options.sources],
            hotwords=len(self.vocabulary.hotwords),
            hotwords_sha256=self.vocabulary.hotwords_sha256,
            standing=self._stands,
            broker=self.publisher.broker or None,
        )

    def _status(self) -> str:
        """One line for `systemctl status`."""
        if not destinations(self.options.mqtt):
            broker = "no broker set"
        elif self.publisher.connected:
            broker = f"connected to {self.publisher.broker}"
        else:
            broker = self.publisher.trouble or "connecting"
        microphones = self.microphones.values()
        away = [f"{each.name} is {each.state}" for each in microphones if each.state in {"opening", "lost"}]
        refusal = self.publisher.refusal
        broker = f"{broker}; {refusal.detail}" if refusal is not None else broker
        doing = "Muted by request" if self.pipeline.muted else f"Listening with {self.worker.name}"
        if self.worker.pause:
            doing = f"Recognizing nothing: {self.worker.pause}, and then hears what is said meanwhile"
        parts = [doing, f"{self.pipeline.utterances} utterances", broker]
        troubles = filter(None, dict.fromkeys([self.pipeline.trouble, self.watchdog.trouble]))
        return "; ".join([*parts, *away, *troubles, *self._caretaker.alarms])

    def _on_broker(self) -> None:
        """The connection has come, gone or changed: what the device is made of says to whom it speaks."""
        self.publisher.publish_retained(contract.META, contract.meta_data(self.meta()))
        if self._mirror is not None:
            self._mirror.follow(self.publisher.to)
        self._caretaker.health_is_due.set()  # the broker that is new to us has none, or an old one
        self._show_status()

    def _show_status(self) -> None:
        systemd.status(self._status())

    async def _tell_state(self) -> None:
        """Keep the status line and the retained status true."""
        changed, loop = asyncio.Event(), asyncio.get_running_loop()

        def look() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended while a thread of the recognizer's goes on
                loop.call_soon_threadsafe(changed.set)

        self.worker.on_change = look
        trouble = ""
        while True:
            changed.clear()
            self._show_status()
            if self._caretaker.trouble != trouble:
                trouble = self._caretaker.trouble
                self.publisher.publish_retained(contract.STATUS, self.status())
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(changed.wait(), clock.until_next(STATUS_INTERVAL_S))

    async def _await_receipts(self, within_s: float) -> None:
        """Raise an alarm for the commands that the MES should have answered by now."""
        while True:
            await asyncio.sleep(min(within_s / 4, HEALTH_INTERVAL_S))
            with contextlib.suppress(OutboxError):  # the pipeline says so
                missing = await self.outbox.miss_receipts(within_s)
                if missing:
                    alarm = missing_receipts(missing, within_s)
                    log.warning(log_line(alarm))
                    await self.outbox.append(alarm)
