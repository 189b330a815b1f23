"""Traces as a collector gets them: OTLP over HTTP, read with OpenTelemetry's own messages."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.broker import HOST, Broker, Subscriber, free_port
from tests.test_daemon import COMMAND, running, write_settings


class Collector(http.server.ThreadingHTTPServer):
    """Keeps every span that it is sent."""

    def __init__(self) -> None:
        super().__init__((HOST, 0), _Request)
        self.received: list[ExportTraceServiceRequest] = []

    @property
    def endpoint(self) -> str:
        return f"http://{HOST}:{self.server_port}/v1/traces"

    def traces(self) -> dict[str, dict[str, Span]]:
        """Trace id -> its spans by name."""
        found: dict[str, dict[str, Span]] = defaultdict(dict)
        for request in self.received:
            for span in (span for each in request.resource_spans for scope in each.scope_spans for span in scope.spans):
                found[str(uuid.UUID(bytes=span.trace_id))][span.name] = span
        return found


class _Request(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_an_utterances_way_is_one_trace_under_its_own_id_and_tells_no_word(
    collector: Collector, tmp_path: Path
) -> None:
    with Broker(tmp_path) as broker, Subscriber(broker) as subscriber:
        path = write_settings(tmp_path, broker.port, tracing={"endpoint": collector.endpoint})
        with running(path) as box:
            box.say(COMMAND)
            subscriber.wait_for(lambda m: any(x.topic.endswith("evt/command") for x in m), "a command")
            assert box.hang_up() == 0
        (command,) = subscriber.on("evt/command")
    ((trace_id, spans),) = collector.traces().items()
    assert trace_id == command.data["utterance_id"]
    root = spans.pop("utterance")
    assert set(spans) == {"gate", "recognize", "interpret", "outbox", "publish"}
    assert {span.parent_span_id for span in spans.values()} == {root.span_id}
    began = [spans[name].start_time_unix_nano for name in ("gate", "recognize", "interpret", "outbox", "publish")]
    assert began == sorted(began)
    assert began[0] == root.start_time_unix_nano
    assert abs(time.time_ns() - root.start_time_unix_nano) < 60e9
    assert all(span.end_time_unix_nano >= span.start_time_unix_nano for span in [root, *spans.values()])
    assert spans["publish"].end_time_unix_nano > root.end_time_unix_nano, "the broker has it after the outbox"
    about = {each.key: each.value for each in root.attributes}
    assert about["intent"].string_value == command.data["intent"]
    assert not any(b"emergency" in request.SerializeToString() for request in collector.received)
    (resource,) = {
        each.resource.SerializeToString() for request in collector.received for each in request.resource_spans
    }
    assert b"press-07" in resource


def test_a_collector_that_is_away_delays_no_stop_and_no_command(tmp_path: Path) -> None:
    with Broker(tmp_path) as broker, Subscriber(broker) as subscriber:
        endpoint = f"http://{HOST}:{free_port()}/v1/traces"
        with running(write_settings(tmp_path, broker.port, tracing={"endpoint": endpoint})) as box:
            box.say(COMMAND)
            subscriber.wait_for(lambda m: any(x.topic.endswith("evt/command") for x in m), "a command")
            began = time.monotonic()
            assert box.hang_up() == 0
            assert time.monotonic() - began < 10
        assert "Traceback" not in box.log


def test_without_an_endpoint_nothing_of_opentelemetry_is_loaded() -> None:
    loaded = "import sys, edge_asr.daemon; print([name for name in sys.modules if 'opentelemetry' in name])"
    assert subprocess.run([sys.executable, "-c", loaded], check=True, capture_output=True).stdout == b"[]\n"
