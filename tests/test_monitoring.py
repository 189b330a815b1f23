"""What Prometheus, Grafana and a load balancer see: a real daemon, real promtool, boards made up as sysfs trees."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import yaml

from edge_asr import monitor, thermal
from edge_asr.contract import Meta
from edge_asr.events import Utterance
from edge_asr.metrics import MAX_SOURCES, OTHER, Metrics, Snapshot
from edge_asr.monitor import Monitor, Page, verdict
from edge_asr.pipeline import Timing, Understanding
from tests.broker import HOST, Broker, Subscriber, free_port, wait_until
from tests.soak import family
from tests.sysbox import CHECKOUT
from tests.test_daemon import COMMAND, running, write_settings

FOLDER = CHECKOUT / "monitoring"
RULES = yaml.safe_load((FOLDER / "alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
DASHBOARD = json.loads((FOLDER / "grafana.json").read_text(encoding="utf-8"))
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


def promtool(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    assert shutil.which("promtool"), "promtool is not installed: tools/test installs it"
    return subprocess.run(
        ["promtool", *map(str, arguments)], check=False, capture_output=True, text=True, input=stdin, cwd=FOLDER
    )


def get(port: int, path: str, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    with contextlib.closing(connection):
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read().decode()


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a daemon with a broker shows after a command and something that is none."""
    folder = tmp_path_factory.mktemp("scraped")
    port = free_port()
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(Broker(folder))
        subscriber = stack.enter_context(Subscriber(broker))
        with running(write_settings(folder, broker.port, monitoring={"port": port})) as box:
            box.say(COMMAND)
            box.say(COMMAND.with_name("04-talk-about-the-game.flac"))
            subscriber.wait_for(lambda m: any(x.topic.endswith("evt/rejected") for x in m), "a rejection")
            wait_until(lambda: 'edge_asr_rejections_total{reason="' in get(port, "/metrics")[1], "it is counted")
            assert get(port, "/livez") == (200, "ok\n")
            assert get(port, "/readyz") == (200, "ok\n")
            assert get(port, "/metrics", "HEAD") == (200, "")
            return get(port, "/metrics")[1]


def test_what_prometheus_scrapes_is_right_by_its_own_tool(scraped: str) -> None:
    done = promtool("check", "metrics", stdin=scraped)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "line",
    [
        'edge_asr_utterances_total{outcome="command",source="stdin"} 1.0',
        'edge_asr_confidence_count{kind="command"} 1.0',
        'edge_asr_stage_seconds_count{stage="total"} 2.0',
        "edge_asr_broker_connected 1.0",
        'edge_asr_microphone_alive{source="stdin"}',
        'edge_asr_outbox_dropped_total{category="command"} 0.0',
        'edge_asr_microphone_snr_db{source="stdin"}',
        "edge_asr_outbox_damages_total 0.0",
        'edge_asr_build_info{engine="onnxruntime",model="',
        "edge_asr_recognizer_resident_memory_bytes ",
        "edge_asr_recognizer_cpu_seconds_total ",
    ],
)
def test_the_numbers_tell_what_happened(scraped: str, line: str) -> None:
    assert line in scraped


def test_no_number_tells_what_was_said(scraped: str) -> None:
    assert "emergency" not in scraped.lower()
    assert "game" not in scraped.lower()


def test_rules_and_dashboard_name_only_numbers_that_there_are(scraped: str) -> None:
    there = set(re.findall(r"^# TYPE (\w+) ", scraped, re.MULTILINE))
    for expression in [*EXPRESSIONS, *(rule["expr"] for rule in RULES)]:
        for name in re.findall(r"edge_asr_\w+", expression):
            assert re.sub("_(bucket|sum|count)$", "", name) in there, f"{name} in {expression}"


def test_every_number_is_on_the_dashboard(scraped: str) -> None:
    there = re.findall(r"^# TYPE (edge_asr_\w+) ", scraped, re.MULTILINE)
    asked_for = " ".join(EXPRESSIONS)
    assert [name for name in there if name not in asked_for and not name.startswith("edge_asr_process_")] == []


def test_the_dashboard_has_no_two_panels_in_one_place() -> None:
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in DASHBOARD["panels"]):
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert max(x for x, _ in cells) < 24
        assert not taken & cells
        taken |= cells


def test_every_alert_is_valid_and_was_provoked() -> None:
    for arguments in (("check", "rules", "alerts.yml"), ("test", "rules", "alerts.test.yml")):
        done = promtool(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    tested = yaml.safe_load((FOLDER / "alerts.test.yml").read_text(encoding="utf-8"))["tests"][0]["alert_rule_test"]
    assert {each["alertname"] for each in tested if each["exp_alerts"]} == {rule["alert"] for rule in RULES}


def test_the_example_configuration_is_valid() -> None:
    done = promtool("check", "config", "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_panel_asks_what_prometheus_understands(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel{i}", "expr": expression.replace("$instance", ".*")}
        for i, expression in enumerate(EXPRESSIONS)
    ]
    path = tmp_path / "panels.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}), encoding="utf-8")
    done = promtool("check", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_box_in_trouble_is_not_ready_and_says_why_but_is_alive(tmp_path: Path) -> None:
    port = free_port()
    path = write_settings(tmp_path, free_port(), monitoring={"port": port})
    with running(path) as box:
        box.feed(bytes(2 * 16_000 * 12))
        assert alive(port)
        wait_until(lambda: get(port, "/readyz")[0] == 503, "not ready")
        assert get(port, "/readyz")[1] == "stdin: only digital silence arrives\n"
        assert get(port, "/livez")[0] == 200
        assert (
            'edge_asr_alarm{kind="microphone-silent",severity="critical",source="stdin"} 1.0'
            in get(port, "/metrics")[1]
        )


HELD = """
import os, time
from edge_asr import cli, inference
load = inference.load_tokens
def when_it_may(*files):
    while os.path.exists(os.environ["HOLD"]):
        time.sleep(0.02)
    return load(*files)
inference.load_tokens = when_it_may
cli.main()
"""
"""A daemon whose recognizers cannot be loaded while a file is there."""


def test_a_box_whose_recognizer_is_being_replaced_says_so_to_everybody_until_another_hears(
    tmp_path: Path, broker: Broker
) -> None:
    port = free_port()
    path = write_settings(tmp_path, broker.port, monitoring={"port": port})
    hold = tmp_path / "hold"
    told = b""

    def told_to_systemd(what: bytes) -> bool:
        nonlocal told
        with contextlib.suppress(BlockingIOError):
            told += manager.recv(4096, socket.MSG_DONTWAIT)
        return what in told

    with Subscriber(broker) as subscriber, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        with running(path, program=("-c", HELD), HOLD=str(hold), NOTIFY_SOCKET=str(tmp_path / "notify")) as box:
            subscriber.wait_for(lambda m: any(x.topic.endswith("/status") for x in m), "online")
            assert alive(port)
            assert get(port, "/readyz") == (200, "ok\n")
            hold.touch()  # whoever loads now hangs, as on a dead card
            os.kill(family(box.process.pid)[-1], signal.SIGKILL)
            box.say(COMMAND)
            trouble = "the recognizer ended by SIGKILL; a new one takes its place"
            wait_until(lambda: get(port, "/readyz") == (503, f"{trouble}\n"), "not ready")
            assert get(port, "/livez") == (200, "ok\n")
            reasons = [trouble, ""]
            subscriber.wait_for(lambda m: any(x.data.get("reason") == trouble for x in m), "degraded")
            wait_until(lambda: told_to_systemd(f"STATUS=Recognizing nothing: {trouble}".encode()), "the status line")
            hold.unlink()
            wait_until(lambda: get(port, "/readyz") == (200, "ok\n"), "ready again")
            subscriber.wait_for(lambda m: any(x.topic.endswith("evt/command") for x in m), "the command")
            subscriber.wait_for(lambda _: [x.data["reason"] for x in subscriber.on("/status")][-2:] == reasons, "well")


def alive(port: int) -> bool:
    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((HOST, port)) == 0

    wait_until(answers, "the monitor listens")
    return True


def test_a_port_that_is_taken_is_a_warning_and_the_box_works(tmp_path: Path) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with running(write_settings(tmp_path, free_port(), monitoring={"port": port})) as box:
            box.wait_for_log(f"monitoring: {HOST}:{port} cannot be used")
            box.wait_for_log("listening to stdin")
            assert box.hang_up() == 0


@contextlib.asynccontextmanager
async def served(port: int) -> AsyncIterator[None]:
    async def page() -> Page:
        return Page(b"x" * 100_000)

    task = asyncio.create_task(Monitor(HOST, port, {"/metrics": page}).run())
    try:
        await asyncio.to_thread(alive, port)
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [("/metrics?x=1", "GET", 200), ("/", "GET", 404), ("/metrics", "POST", 405), ("/metrics", "HEAD", 200)],
)
def test_only_what_there_is_can_be_asked_for(path: str, method: str, status: int) -> None:
    async def main() -> tuple[int, str]:
        port = free_port()
        async with served(port):
            return await asyncio.to_thread(get, port, path, method)

    assert asyncio.run(main())[0] == status


@pytest.mark.parametrize(
    "request_", [b"GET /metrics", b"x" * (2 * monitor.MAX_REQUEST_BYTES), b"\r\n\r\n", b"GET\r\n\r\n"]
)
def test_whoever_is_slow_or_talks_nonsense_is_hung_up_on(monkeypatch: pytest.MonkeyPatch, request_: bytes) -> None:
    monkeypatch.setattr(monitor, "REQUEST_LIMIT_S", 0.2)

    async def main() -> bytes:
        port = free_port()
        async with served(port):
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(request_)
            try:
                return await asyncio.wait_for(reader.read(), 10)
            except ConnectionResetError:
                return b""
            finally:
                writer.close()

    assert b" 200 " not in asyncio.run(main())


def test_more_clients_than_there_is_room_for_are_turned_away() -> None:
    async def main() -> bytes:
        port = free_port()
        async with served(port):
            idle = [await asyncio.open_connection(HOST, port) for _ in range(monitor.MAX_CLIENTS)]
            reader, late = await asyncio.open_connection(HOST, port)
            late.write(b"GET /metrics HTTP/1.1\r\n\r\n")
            try:
                answer = await reader.read()
            except ConnectionResetError:
                answer = b""
            for _, writer in (*idle, (reader, late)):
                writer.close()
            await asyncio.to_thread(wait_until, lambda: answers(port), "there is room again")
            return answer

    assert asyncio.run(main()) == b""


def answers(port: int) -> bool:
    try:
        return get(port, "/metrics")[0] == 200
    except (ConnectionError, http.client.HTTPException):  # turned away
        return False


def test_a_verdict_has_one_complaint_a_line() -> None:
    assert verdict(["a", "b"]) == Page(b"a\nb\n", status=HTTPStatus.SERVICE_UNAVAILABLE)


def test_names_of_guests_cannot_fill_the_memory() -> None:
    counter = Metrics()
    for i in range(1000):
        utterance = Utterance(id="", source=f"guest-{i}", start=0, pcm=bytes(3200), ended_ns=0)
        counter.count(Understanding(utterance, None, None), Timing(0, 0, 0, 0))
    shown = counter.render(SNAPSHOT).decode()
    counted = re.findall(r'^edge_asr_utterances_total{outcome="transcript",source="(.*)"} (.*)$', shown, re.MULTILINE)
    assert len(counted) == MAX_SOURCES + 1
    assert ("guest-0", "1.0") in counted
    assert (OTHER, f"{1000.0 - MAX_SOURCES}") in counted


SNAPSHOT = Snapshot(
    meta=Meta("1", "m 1", "", [], "onnxruntime", "cpu", "cpu", {}, [], 0, "", ()),
    microphones={},
    outbox=None,
    outbox_unanswered_s=7.5,
    alarms=(),
    thermals=thermal.Thermals({"cpu-thermal": 48.2}, None, ("under-voltage",)),
    broker_connected=None,
    broker_refuses=False,
    finals_waiting=0,
    partials_dropped=0,
    recognizers_replaced=0,
    captures_replaced={"hall": 1},
    recognizer_bytes=None,
    recognizer_cpu_s=None,
    clock_synchronized=False,
)


def test_what_cannot_be_had_is_left_out_and_never_zero() -> None:
    shown = Metrics().render(SNAPSHOT).decode()
    assert 'edge_asr_temperature_celsius{zone="cpu-thermal"} 48.2' in shown
    assert 'edge_asr_throttled{cause="under-voltage"} 1.0' in shown
    assert "edge_asr_outbox_unanswered_seconds 7.5" in shown
    for absent in ("edge_asr_outbox_bytes", "edge_asr_broker_connected", "edge_asr_recognizer_resident"):
        assert absent not in shown


def tree(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{content}\n", encoding="ascii")
    return folder


ZONE = "class/thermal/thermal_zone"
COOLER = "class/thermal/cooling_device"
JETSON = {
    f"{ZONE}0/type": "cpu-thermal",
    f"{ZONE}0/temp": "97500",
    f"{ZONE}0/trip_point_0_type": "critical",
    f"{ZONE}0/trip_point_0_temp": "102000",
    f"{ZONE}0/trip_point_1_type": "passive",
    f"{ZONE}0/trip_point_1_temp": "99000",
    f"{ZONE}1/type": "gpu-thermal",
    f"{ZONE}1/temp": "61000",
    f"{ZONE}2/type": "cv0-thermal",
    f"{ZONE}2/temp": "off",
    f"{COOLER}0/type": "pwm-fan",
    f"{COOLER}0/cur_state": "3",
    f"{COOLER}1/type": "cpu-throttle-alert",
    f"{COOLER}1/cur_state": "1",
    f"{COOLER}2/type": "gpu-throttle-alert",
    f"{COOLER}2/cur_state": "0",
}
PI = {
    f"{ZONE}0/type": "cpu-thermal",
    f"{ZONE}0/temp": "48200",
    "devices/platform/soc/soc:firmware/get_throttled": "50005",
}


@pytest.mark.parametrize(
    ("files", "expected", "kinds"),
    [
        (
            JETSON,
            thermal.Thermals({"cpu-thermal": 97.5, "gpu-thermal": 61.0}, 102.0, ("cpu-throttle-alert",)),
            ["board-hot", "board-throttled"],
        ),
        (PI, thermal.Thermals({"cpu-thermal": 48.2}, None, ("under-voltage", "throttled")), ["board-throttled"]),
        ({**PI, "devices/platform/soc/soc:firmware/get_throttled": "50000"}, None, []),
        ({}, thermal.Thermals({}, None, ()), []),
    ],
)
def test_boards_tell_how_warm_and_how_slow_they_are(
    tmp_path: Path, files: dict[str, str], expected: Any, kinds: list[str]
) -> None:
    found = thermal.read(tree(tmp_path, files))
    if expected is not None:
        assert found == expected
    assert [condition.kind for condition in thermal.conditions(found)] == kinds
