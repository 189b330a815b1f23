"""Shows one utterance's way as an OpenTelemetry trace: gate, recognize, interpret, outbox, publish. Off by default.

Law: a trace's id is its utterance's id without the dashes, so the journal, the messages and the trace find each other.
Nothing that was said is in it. Spans leave in a thread of their own; a collector that is away costs spans, never audio.
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from typing import Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags

import edge_asr
from edge_asr import clock
from edge_asr.events import Command, Message
from edge_asr.pipeline import Timing, Understanding

EXPORT_LIMIT_S: Final = 2
"""A collector that takes longer gets this batch no more; a stop waits no longer either."""


SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)


class _Ids(IdGenerator):
    """Ids of a trace's root are those of its utterance; every other span's are random."""

    def __init__(self) -> None:
        self._random = RandomIdGenerator()
        self.utterance_id: str | None = None
        """Of the trace that begins now."""

    def generate_trace_id(self) -> int:
        return self._random.generate_trace_id() if self.utterance_id is None else uuid.UUID(self.utterance_id).int

    def generate_span_id(self) -> int:
        return self._random.generate_span_id() if self.utterance_id is None else _root_id(self.utterance_id)


class Tracer:
    """Tells a collector of every utterance; to be called from one thread."""

    def __init__(self, endpoint: str, device: str) -> None:
        """``endpoint``: OTLP over HTTP, e.g. ``http://127.0.0.1:4318/v1/traces``."""
        logging.getLogger("opentelemetry").setLevel(logging.ERROR)  # it says at each attempt that the collector is away
        about = {"service.name": "edge-asr", "service.version": edge_asr.__version__, "service.instance.id": device}
        self._ids = _Ids()
        self._provider = TracerProvider(resource=Resource(about), id_generator=self._ids, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_LIMIT_S)
        self._spans = BatchSpanProcessor(exporter, export_timeout_millis=EXPORT_LIMIT_S * 1000)
        self._provider.add_span_processor(self._spans)
        self._tracer = self._provider.get_tracer("edge_asr")

    def note(self, heard: Understanding, timing: Timing) -> None:
        """Tell of an utterance of which everything is committed."""
        utterance, after_ns = heard.utterance, clock.NS_PER_S
        ended_ns = utterance.ended_ns + clock.wall_ns() - clock.boottime_ns()
        began_ns = ended_ns - round(utterance.duration_s * after_ns)
        taken_ns = ended_ns + round(timing.waited_s * after_ns)
        recognized_ns = taken_ns + round(heard.recognized_s * after_ns)
        interpreted_ns = recognized_ns + round(heard.interpreted_s * after_ns)
        committed_ns = ended_ns + round(timing.total_s * after_ns)
        self._ids.utterance_id = utterance.id
        root = self._tracer.start_span("utterance", Context(), SpanKind.CONSUMER, _about(heard), start_time=began_ns)
        self._ids.utterance_id = None
        within = trace.set_span_in_context(root, Context())
        for name, since_ns, until_ns in (
            ("gate", began_ns, taken_ns),
            ("recognize", taken_ns, recognized_ns),
            ("interpret", recognized_ns, interpreted_ns),
            ("outbox", committed_ns - round(timing.committed_s * after_ns), committed_ns),
        ):
            self._tracer.start_span(name, within, start_time=since_ns).end(until_ns)
        root.end(committed_ns)

    def delivered(self, topic: str, message: Message) -> None:
        """Tell of a message that the broker has acknowledged just now; alarms have no utterance and no span."""
        utterance_id = message.data.get("utterance_id")
        if not isinstance(utterance_id, str):
            return
        root = SpanContext(uuid.UUID(utterance_id).int, _root_id(utterance_id), is_remote=False, trace_flags=SAMPLED)
        about = {"messaging.system": "mqtt", "messaging.destination.name": topic, "messaging.message.id": message.id}
        now_ns = clock.wall_ns()
        same_boot = message.boot_id == clock.boot_id()
        waited_ns = clock.boottime_ns() - message.created_ns if same_boot else now_ns - message.created_wall_ns
        within = trace.set_span_in_context(NonRecordingSpan(root), Context())
        span = self._tracer.start_span("publish", within, SpanKind.PRODUCER, about, start_time=now_ns - waited_ns)
        span.end(now_ns)

    def close(self) -> None:
        """Send what is left, for no longer than :data:`EXPORT_LIMIT_S`."""
        self._spans.force_flush(EXPORT_LIMIT_S * 1000)
        self._provider.shutdown()


def _root_id(utterance_id: str) -> int:
    return int.from_bytes(hashlib.sha256(utterance_id.encode()).digest()[:8], "big")


def _about(heard: Understanding) -> dict[str, str | float]:
    about: dict[str, str | float] = {"source": heard.utterance.source, "speech_s": heard.utterance.duration_s}
    decision = heard.decision
    if isinstance(decision, Command):
        return about | {"outcome": "command", "intent": decision.intent, "confidence": decision.confidence}
    if decision is not None:
        return about | {"outcome": "rejected", "reason": decision.reason}
    return about | {"outcome": "transcript"}
