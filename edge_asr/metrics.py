"""Carries the box's numbers to Prometheus: `edge_asr_*`, base units, no text of anybody's.

Counters and histograms grow with every utterance; everything else is read when somebody asks (:class:`Snapshot`), so a
box that nobody watches pays nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from edge_asr.alarms import Condition
from edge_asr.contract import Meta, MicrophoneHealth
from edge_asr.events import Command, Rejection
from edge_asr.ledger import Statistics
from edge_asr.pipeline import Timing, Understanding
from edge_asr.thermal import Thermals

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST

MAX_SOURCES: Final = 64
OTHER: Final = "other"
"""The label of all sources beyond so many: guests come and go, and every label costs memory for ever."""

_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_FACTORS: Final = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
_SHARES: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that is not counted but looked at."""

    meta: Meta
    microphones: dict[str, MicrophoneHealth]
    outbox: Statistics | None
    """None: it cannot be asked, or does not answer."""
    outbox_unanswered_s: float
    """For how long it has answered nobody."""
    alarms: Sequence[Condition]
    thermals: Thermals
    broker_connected: bool | None
    """None: none is set."""
    broker_refuses: bool
    """It is there and takes nothing."""
    finals_waiting: int
    partials_dropped: int
    recognizers_replaced: int
    captures_replaced: Mapping[str, int]
    """By the name of their source."""
    recognizer_bytes: int | None
    recognizer_cpu_s: float | None
    clock_synchronized: bool


# Else every counter has a second series, which says when the daemon started.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """The registry of one daemon."""

    def __init__(self) -> None:
        self._sources: set[str] = set()
        self._registry = CollectorRegistry()
        ProcessCollector(namespace="edge_asr", registry=self._registry)
        self._latest = _Latest()
        self._registry.register(self._latest)
        kept = self._registry
        self._utterances = Counter("edge_asr_utterances", "Utterances committed.", ["source", "outcome"], registry=kept)
        self._speech = Counter("edge_asr_speech_seconds", "Seconds of speech heard.", ["source"], registry=kept)
        self._rejections = Counter("edge_asr_rejections", "Speech not acted upon.", ["reason"], registry=kept)
        self._confidence = Histogram(
            "edge_asr_confidence", "Confidence 0..1.", ["kind"], buckets=_SHARES, registry=kept
        )
        self._stages = Histogram(
            "edge_asr_stage_seconds",
            "Time of an utterance in each stage; total: from the end of speech to the commit.",
            ["stage"],
            buckets=_SECONDS,
            registry=kept,
        )
        self._factor = Histogram(
            "edge_asr_real_time_factor", "Work per second of speech.", buckets=_FACTORS, registry=kept
        )
        self._rollbacks = Counter(
            "edge_asr_model_rollbacks", "Newly activated models that failed since the start.", registry=kept
        )

    def count(self, heard: Understanding, timing: Timing) -> None:
        """Take an utterance that was committed."""
        source, decision = self._label(heard.utterance.source), heard.decision
        outcome = {Command: "command", Rejection: "rejected", type(None): "transcript"}[type(decision)]
        self._utterances.labels(source, outcome).inc()
        self._speech.labels(source).inc(heard.utterance.duration_s)
        self._factor.observe(timing.understood_s / heard.utterance.duration_s)
        stages = {
            "wait": timing.waited_s,
            "recognize": heard.recognized_s,
            "interpret": heard.interpreted_s,
            "commit": timing.committed_s,
            "total": timing.total_s,
        }
        for stage, seconds in stages.items():
            self._stages.labels(stage).observe(seconds)
        if isinstance(decision, Rejection):
            self._rejections.labels(decision.reason).inc()
        if decision is not None:
            self._confidence.labels(outcome).observe(decision.confidence)
        if heard.transcript is not None:
            self._confidence.labels("transcript").observe(heard.transcript.confidence)

    def count_rollback(self) -> None:
        """A newly activated model had to make way."""
        self._rollbacks.inc()

    def render(self, snapshot: Snapshot) -> bytes:
        """Everything in Prometheus' text format."""
        self._latest.snapshot = snapshot
        return generate_latest(self._registry)

    def _label(self, source: str) -> str:
        if source not in self._sources and len(self._sources) == MAX_SOURCES:
            return OTHER
        self._sources.add(source)
        return source


class _Latest(Collector):
    """What the last snapshot holds."""

    def __init__(self) -> None:
        self.snapshot: Snapshot | None = None

    def collect(self) -> Iterator[Metric]:
        """Every family, with the samples there are."""
        if self.snapshot is None:
            return
        yield _about(self.snapshot.meta)
        yield from _of_the_box(self.snapshot)
        yield from _of_microphones(self.snapshot.microphones)
        about = "For how long the outbox has answered nobody of those who wait for it; 0: nobody waits."
        yield _gauge("outbox_unanswered_seconds", about, self.snapshot.outbox_unanswered_s)
        yield from _of_the_outbox(self.snapshot.outbox)


def _gauge(name: str, about: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"edge_asr_{name}", about, value=value)


def _about(meta: Meta) -> Metric:
    labels = ("version", "model", "engine", "provider")
    family = GaugeMetricFamily("edge_asr_build_info", "What the device is made of.", labels=labels)
    family.add_metric([meta.version, meta.model, meta.engine, meta.provider], 1)
    return family


def _of_the_box(now: Snapshot) -> Iterator[Metric]:
    yield _gauge("finals_waiting", "Utterances that wait for the recognizer.", now.finals_waiting)
    about = "Partials that gave way to something newer."
    yield CounterMetricFamily("edge_asr_partials_dropped", about, value=now.partials_dropped)
    about = "Recognizer processes that died, hung, grew or heard wrongly."
    yield CounterMetricFamily("edge_asr_recognizers_replaced", about, value=now.recognizers_replaced)
    about = "Processes of a microphone whose sound driver crashed, hung or leaked."
    captures = CounterMetricFamily("edge_asr_captures_replaced", about, labels=("source",))
    for source, count in now.captures_replaced.items():
        captures.add_metric([source], count)
    yield captures
    if now.recognizer_bytes is not None:
        yield _gauge("recognizer_resident_memory_bytes", "Of the recognizer's process.", now.recognizer_bytes)
    if now.recognizer_cpu_s is not None:
        about = "CPU time of the recognizer's process; begins anew with each of them."
        yield CounterMetricFamily("edge_asr_recognizer_cpu_seconds", about, value=now.recognizer_cpu_s)
    if now.broker_connected is not None:
        yield _gauge("broker_connected", "1: the broker has accepted us.", now.broker_connected)
        yield _gauge("broker_refuses", "1: the broker is there and takes nothing.", now.broker_refuses)
    yield _gauge("clock_synchronized", "1: a time service has set the clock since boot.", now.clock_synchronized)
    alarms = GaugeMetricFamily("edge_asr_alarm", "1: raised.", labels=("kind", "severity", "source"))
    for each in now.alarms:
        alarms.add_metric([each.kind, each.severity, each.source or ""], 1)
    yield alarms
    degrees = GaugeMetricFamily("edge_asr_temperature_celsius", "Of each thermal zone.", labels=("zone",))
    for zone, value in now.thermals.temperatures_c.items():
        degrees.add_metric([zone], value)
    yield degrees
    throttled = GaugeMetricFamily("edge_asr_throttled", "1: the board works slower than it could.", labels=("cause",))
    for cause in now.thermals.throttled:
        throttled.add_metric([cause], 1)
    yield throttled


def _of_microphones(microphones: dict[str, MicrophoneHealth]) -> Iterator[Metric]:
    families = {
        "alive": GaugeMetricFamily("edge_asr_microphone_alive", "1: audio arrives.", labels=("source",)),
        "level_dbfs": _of_source("level_dbfs", "Loud moments of 30 s."),
        "noise_dbfs": _of_source("noise_dbfs", "Quiet moments of 30 s."),
        "snr_db": _of_source("snr_db", "Loud over quiet moments of 30 s: the signal-to-noise ratio."),
        "clipped": _of_source("clipped_ratio", "Share of frames with samples at full scale."),
        "offset": _of_source("offset_ratio", "Constant part of the signal, of full scale."),
        "rate_error": _of_source("rate_error_ratio", "Measured sample rate over the nominal one, less one."),
    }
    lost = CounterMetricFamily("edge_asr_audio_lost_seconds", "Audio lost since the start.", labels=("source",))
    for source, health in microphones.items():
        lost.add_metric([source], health.lost_s)
        for field, family in families.items():
            value = getattr(health, field)
            if value is not None:
                family.add_metric([source], value)
    yield from families.values()
    yield lost


def _of_source(name: str, about: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"edge_asr_microphone_{name}", about, labels=("source",))


def _of_the_outbox(outbox: Statistics | None) -> Iterator[Metric]:
    if outbox is None:
        return
    about = "Commands that the MES accepted or rejected, and receipts that were missing."
    receipts = CounterMetricFamily("edge_asr_receipts", about, labels=("verdict",))
    for verdict, count in outbox.receipts.items():
        receipts.add_metric([verdict], count)
    yield receipts
    waiting = GaugeMetricFamily("edge_asr_outbox_messages", "Messages that wait.", labels=("category",))
    for category, count in outbox.waiting.items():
        waiting.add_metric([category], count)
    yield waiting
    held = GaugeMetricFamily("edge_asr_outbox_class_bytes", "Of the messages of a class.", labels=("category",))
    for category, count in outbox.class_bytes.items():
        held.add_metric([category], count)
    yield held
    lost = {
        "dropped": ("Given up because there was no room.", outbox.dropped),
        "outdated": ("Given up because of their age.", outbox.outdated),
        "refused": ("Refused by the broker for good.", outbox.refused),
    }
    for name, (about, counts) in lost.items():
        family = CounterMetricFamily(f"edge_asr_outbox_{name}", about, labels=("category",))
        for category, count in counts.items():
            family.add_metric([category], count)
        yield family
    yield _gauge("outbox_dead_letters", "Kept of what the broker refused for good.", outbox.dead_letters)
    about = "Times a damaged file was put aside; what was not readable in it is in no other count."
    yield CounterMetricFamily("edge_asr_outbox_damages", about, value=outbox.damages)
    yield _gauge("outbox_bytes", "In use in the file.", outbox.bytes)
    yield _gauge("outbox_oldest_age_seconds", "Age of the oldest waiting message; 0: none.", outbox.oldest_age_s or 0)
    yield CounterMetricFamily("edge_asr_outbox_messages_committed", "Sequence number.", value=outbox.last_seq)
