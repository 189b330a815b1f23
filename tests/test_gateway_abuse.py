"""What the gateway takes without harm: half-open connections by the thousand, too many of everything, any bytes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import soundfile
from aiohttp import WSCloseCode, web
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from edge_asr.audio import quiet, read_file
from edge_asr.events import SAMPLE_RATE
from edge_asr.gateway import certificates, wire
from edge_asr.gateway import rules as rules_room
from edge_asr.gateway.addresses import NETWORK_SHARE
from edge_asr.gateway.container import ContainerError, decode
from edge_asr.gateway.rules import Handler, Pace, Rules
from edge_asr.gateway.session import Session
from edge_asr.gateway.sessions import _why_over
from edge_asr.gateway.tokens import LOCAL, Station, Tokens
from edge_asr.gateway.transcriptions import FIELD_BYTES, MAX_FIELDS_BYTES, _Collected
from edge_asr.gateway.websocket import REPLACED, UNAUTHORIZED
from edge_asr.process_state import cpu_s
from edge_asr.settings import Gateway
from tests import fuzz_gateway
from tests.bench_gateway import hold
from tests.broker import wait_until
from tests.fuzz_gateway import PARSERS
from tests.gateway import OFFER, Box, box, run, transcribed
from tests.sysbox import CHECKOUT
from tests.test_gateway import STOP, encoded

HALF_OPEN = 1000
LOOK_S = 0.5
"""What looking at the log adds."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A box with little room, and no broker."""
    room: dict[str, Any] = {"max_sessions": 4, "max_sessions_per_address": 3, "max_sessions_per_token": 2}
    with box(tmp_path_factory.mktemp("abused"), **room) as started:
        yield started


# ---------------------------------------------------------------- the door


def half_open(port: int, number: int, tls: ssl.SSLContext) -> socket.socket:
    """A connection that stops somewhere: before TLS, within it, within the header, or with one byte at a time."""
    plain = socket.create_connection(("127.0.0.1", port), timeout=5, source_address=(f"127.0.{number // 64 + 1}.1", 0))
    if number % 8 == 1:
        plain.sendall(b"\x16\x03\x01")
    if number % 8 == 2:
        with contextlib.suppress(OSError, ssl.SSLError):
            secure = tls.wrap_socket(plain, server_hostname="localhost")
            secure.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
            return secure
    return plain


@pytest.fixture(scope="module")
def flood(running: Box) -> Iterator[Future[list[socket.socket]]]:
    """A thousand of them, which come while the first test that wants them runs; those that were not turned away."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    held: list[socket.socket] = []

    def come() -> list[socket.socket]:
        for number in range(HALF_OPEN):
            with contextlib.suppress(OSError):
                held.append(half_open(running.port, number, running.tls))
        return held

    with ThreadPoolExecutor(1) as elsewhere:
        yield elsewhere.submit(come)
    for connection in held:
        connection.close()


def test_a_thousand_half_open_connections_do_not_disturb_who_is_talking(
    running: Box, flood: Future[list[socket.socket]]
) -> None:
    async def talk() -> list[str]:
        async with running.client() as client:
            texts = []
            for number in (1, 2):
                await client.say(read_file(STOP), talk=number)
                await client.send(type="end")
                texts.append((await client.until("transcript"))["text"])
            held = await asyncio.wrap_future(flood)
            assert len(held) == HALF_OPEN
            async with running.client() as late:  # and somebody new still gets in
                await late.until("ready")
            return texts

    assert run(talk) == [transcribed(STOP)[0]["text"]] * 2


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\nAuthorization: Bearer TOKEN\r\nX: " + b"a" * 20_000 + b"\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nAuthorization: Bearer TOKEN" + b"a" * 20_000 + b"\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nAuthorization : Bearer TOKEN\r\n\r\n", b"400"),
        (b"GET /?token=TOKEN HTTP/1.1\r\nHost: localhost\r\nHost: other\r\n\r\n", b"400"),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: [\r\n\r\n", b"4"),
        (b"\x00\xff\r\n\r\n", b"400"),
        (b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", b"404"),
        (b"GET /server.key HTTP/1.1\r\nHost: localhost\r\n\r\n", b"404"),
    ],
)
def test_a_request_that_is_too_large_or_none_is_refused(running: Box, request_: bytes, status: bytes) -> None:
    with (
        socket.create_connection(("127.0.0.1", running.port), timeout=10) as plain,
        running.tls.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        secure.sendall(request_.replace(b"TOKEN", running.token.encode()))
        assert secure.recv(4096).split(b" ")[1].startswith(status)


async def knock(running: Box, address: str, token: str) -> tuple[int, str, str]:
    """What somebody at this address of our own is told: status, when to come again, and why."""
    here = aiohttp.TCPConnector(ssl=running.tls, local_addr=(address, 0))
    async with aiohttp.ClientSession(connector=here, headers={"Authorization": f"Bearer {token}"}) as http:
        response = await http.get(f"https://127.0.0.1:{running.port}/ws", headers={"Upgrade": "websocket"})
        found = await response.json()
        return response.status, response.headers.get("Retry-After", ""), found["error"]["message"]


def test_an_upload_counts_as_a_session_before_its_first_byte_is_read(running: Box) -> None:
    def uploads() -> int:
        return sum(each["kind"] == "upload" for each in running.board()["sessions"])

    async def crowd() -> tuple[int, str]:
        over = asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield b"--x\r\n"
            await over.wait()
            yield b"--x--\r\n"

        async with running.http() as http:
            bearer = {"Authorization": f"Bearer {running.token}"}
            form = {**bearer, "Content-Type": "multipart/form-data; boundary=x"}
            address = f"{running.url}/v1/audio/transcriptions"
            held = [asyncio.create_task(http.post(address, headers=form, data=slow())) for _ in range(2)]
            try:
                await asyncio.to_thread(wait_until, lambda: uploads() == 2, "both are counted")
                refused = await http.post(address, headers=bearer, data=b"")
                return refused.status, (await refused.json())["error"]["message"]
            finally:
                over.set()
                assert [each.status for each in await asyncio.gather(*held)] == [400, 400]

    assert run(crowd) == (503, "tablet has 2 sessions open already")
    wait_until(lambda: uploads() == 0, "what held no recording has gone")


@pytest.mark.parametrize(
    ("name", "value"), [("timestamp_granularities[]", "word" * 500), ("prompt", ""), ("", ""), ("n" * 1000, "")]
)
def test_a_form_may_bring_so_much_beside_its_file_and_no_more(running: Box, name: str, value: str) -> None:
    part = f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
    count = MAX_FIELDS_BYTES // (FIELD_BYTES + len(name) + len(value))

    async def ask(parts: int) -> int:
        async with running.http() as http:
            answer = await http.post(
                f"{running.url}/v1/audio/transcriptions",
                headers={
                    "Authorization": f"Bearer {running.token}",
                    "Content-Type": "multipart/form-data; boundary=x",
                },
                data=part.encode() * parts + b"--x--\r\n",
            )
            return answer.status

    assert [run(lambda: ask(count)), run(lambda: ask(count + 1))] == [400, 413]  # 400: there is no file


def test_beyond_the_limits_one_is_told_to_come_again(running: Box) -> None:
    async def crowd() -> tuple[dict[str, Any], int | None, list[tuple[int, str, str]]]:
        tokens = [running.tokens.add(name, "talk") for name in ("other", "another")]
        async with running.client() as first, running.client() as second:
            await first.until("ready")
            await second.until("ready")
            async with running.client() as third:
                refused = await third.until("error")
                await third.socket.receive(10)
            async with running.client(token=tokens[0]) as last:
                await last.until("ready")
                here = await knock(running, "127.0.0.1", tokens[0])
                connector = aiohttp.TCPConnector(ssl=running.tls, local_addr=("127.0.0.2", 0))
                async with (
                    aiohttp.ClientSession(connector=connector) as http,
                    http.ws_connect(f"https://127.0.0.1:{running.port}/ws") as there,
                ):
                    await there.send_json({"type": "hello", "token": tokens[1]})
                    await there.receive_str()
                    knocks = [here, await knock(running, "127.0.0.3", tokens[1])]
                    return refused, third.socket.close_code, knocks

    refused, code, knocks = run(crowd)
    assert (refused["reason"], refused["detail"]) == ("busy", "tablet has 2 sessions open already")
    assert code == WSCloseCode.TRY_AGAIN_LATER
    assert knocks == [
        (503, "5", "3 sessions are open from 127.0.0.1 already"),
        (503, "5", "all 4 sessions are taken; try again later"),
    ]


def test_who_comes_back_has_its_session_at_once_though_no_room_is_left_and_the_old_link_is_not_known_to_be_dead(
    running: Box,
) -> None:
    async def crowd() -> tuple[list[dict[str, Any]], dict[str, Any], int | None]:
        token = running.tokens.add("neighbour", "talk")
        async with running.client() as first, running.client() as second, running.client(token=token) as third:
            session = (await first.until("ready"))["session"]
            await second.until("ready")
            await third.until("ready")
            refused = []
            for pretended in ("", session):  # nobody's, and somebody else's
                async with running.client(token=token, session=pretended) as stranger:
                    refused.append(await stranger.until("error"))
            async with running.client(session=session) as again:  # the first is still there
                ready = await again.until("ready")
                while not first.socket.closed:
                    await first.socket.receive(10)
                return refused, ready, first.socket.close_code

    refused, ready, code = run(crowd)
    assert [(each["reason"], each["detail"]) for each in refused] == [
        ("busy", "3 sessions are open from 127.0.0.1 already")
    ] * 2
    assert (ready["resumed"], code) == (True, REPLACED)


@pytest.mark.parametrize(
    ("opened_s", "silent_s", "state", "reason"),
    [
        (999, 99, "attached", ""),
        (1001, 1, "talking", "old"),
        (900, 101, "attached", "idle"),
        (900, 101, "talking", ""),
        (900, 29, "alone", ""),
        (900, 31, "alone", "gone"),
    ],
)
def test_a_session_ends_by_age_by_silence_or_when_nobody_comes_back(
    opened_s: float, silent_s: float, state: str, reason: str
) -> None:
    async def scenario() -> str:
        session = Session("tablet", Station("tablet", "talk", "", ""), "127.0.0.1")
        now = session.opened + opened_s
        session.active = now - silent_s
        if state != "alone":
            session.attach(_Collected(), 0)
        if state == "talking":
            session.begin(wire.Start(type="start", talk=1))
        return _why_over(session, Gateway(max_session_s=1000, idle_s=100, resume_s=30), now)[0]

    assert asyncio.run(scenario()) == reason


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]


def processes(running: Box) -> list[int]:
    """The daemon, the recognizer's zygote and the recognizer."""
    (zygote,) = children(running.process.pid)
    (worker,) = children(zygote)
    return [running.process.pid, zygote, worker]


def test_the_dashboards_cpu_is_the_recognizers_too(running: Box) -> None:
    def used_s() -> float:
        return sum(map(cpu_s, processes(running)))

    async def talk() -> None:
        async with running.client() as client:
            await client.say((read_file(STOP) + quiet(16_000)) * 4)
            await client.send(type="end")
            await client.until("ended")

    time.sleep(1)  # so that the next look begins another window
    began_s = time.monotonic()
    running.board()
    before_s = used_s()
    run(talk)
    time.sleep(1)
    spent_s = used_s() - before_s
    assert running.board()["cpu_load"] * (time.monotonic() - began_s) > 0.9 * spent_s


def test_the_benchmark_holds_every_thread_of_daemon_and_recognizer_to_its_core(running: Box) -> None:
    everywhere = os.sched_getaffinity(0)
    core = {min(everywhere)}
    hold(running.process.pid, core)
    try:
        tasks = [int(each.name) for pid in processes(running) for each in Path(f"/proc/{pid}/task").iterdir()]
        assert len(tasks) > len(processes(running))
        assert all(os.sched_getaffinity(task) == core for task in tasks)
    finally:
        hold(running.process.pid, everywhere)


@contextlib.contextmanager
def stuck_recognizer(running: Box) -> Iterator[None]:
    """The recognizer's process stands still, though not for so long that another takes its place."""
    *_, worker = processes(running)
    os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(worker, signal.SIGCONT)


def test_when_the_recognizer_is_behind_nobody_new_comes_in_and_no_final_is_dropped(running: Box) -> None:
    said = 10

    async def talk() -> tuple[list[tuple[int, str]], list[str]]:
        async with running.client() as client, running.http() as http:
            await client.until("ready")
            with stuck_recognizer(running):
                await client.say((read_file(STOP) + quiet(16_000)) * said)
                await client.until("overloaded")
                bearer = {"Authorization": f"Bearer {running.token}"}
                offered = {**bearer, "Content-Type": "application/sdp"}
                refused = [
                    await http.get(f"{running.url}/ws", headers={**bearer, "Upgrade": "websocket"}),
                    await http.post(f"{running.url}/whip", headers=offered, data=OFFER.encode()),
                    await http.post(f"{running.url}/v1/audio/transcriptions", headers=bearer, data=b""),
                ]
            await client.send(type="end")
            await client.until("ended")
            return (
                [(each.status, each.headers["Retry-After"]) for each in refused],
                [event["text"].split()[0] for event in client.of("transcript")],
            )

    assert run(talk) == ([(503, "5")] * 3, ["emergency"] * said)


def test_a_peer_that_has_died_without_a_word_while_nobody_spoke_is_noticed_within_ten_seconds(
    running: Box, tmp_path: Path
) -> None:
    certificates.make(tmp_path, [])
    files = certificates.Files(tmp_path)
    soundfile.write(tmp_path / "silence.wav", np.zeros(60 * SAMPLE_RATE, np.int16), SAMPLE_RATE)
    command = [sys.executable, "-m", "tests.whip_by_ffmpeg", f"{running.url}/whip", running.tokens.add("phone", "talk")]
    command += [str(tmp_path / "silence.wav"), str(files.server), str(files.server_key)]

    def rests(name: str) -> bool:
        """Whether a talk is under way; as nobody speaks in it, it is read in rounds."""
        return any(each["source"] == name and each["talking"] for each in running.board()["sessions"])

    def since(words: str, began_s: float) -> float:
        """Seconds until the log says so."""
        wait_until(lambda: words in running.log, words)
        return time.monotonic() - began_s

    async def die(calling: subprocess.Popen[bytes]) -> tuple[float, float]:
        async with running.http() as http, http.ws_connect(f"{running.url}/ws", autoping=False) as mute:
            await mute.send_str(json.dumps({"type": "hello", "token": running.tokens.add("mute", "talk")}))
            await mute.send_str(json.dumps({"type": "start", "talk": 1}))
            await asyncio.to_thread(wait_until, lambda: rests("mute"), "a talk by WebSocket")
            silent_s = time.monotonic()
            await asyncio.to_thread(since, "phone: session opened by webrtc", silent_s)
            await asyncio.to_thread(wait_until, lambda: rests("phone"), "a talk by WebRTC")
            calling.kill()
            calling.wait()
            killed_s = time.monotonic()
            return await asyncio.gather(
                asyncio.to_thread(since, "mute: the connection is gone", silent_s),
                asyncio.to_thread(since, "phone: session closed", killed_s),
            )

    calling = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    mute_s, call_s = run(lambda: die(calling))
    assert mute_s < 10 + LOOK_S
    assert call_s < 10 + LOOK_S


def test_half_open_connections_are_closed_in_the_end(flood: Future[list[socket.socket]]) -> None:
    for connection in flood.result(60):
        connection.settimeout(20)
        with contextlib.suppress(OSError, ssl.SSLError):
            while connection.recv(4096):
                pass  # an alert of TLS may come before the end


def test_no_secret_is_in_the_log(running: Box) -> None:
    assert "session opened" in running.log
    assert running.token not in running.log
    assert running.watch not in running.log


@pytest.mark.parametrize(
    ("message", "codes"),
    [
        ('{"type":"hello"', {WSCloseCode.UNSUPPORTED_DATA}),
        ('{"type":"start","talk":1}', {WSCloseCode.UNSUPPORTED_DATA}),
        ('{"type":"hello","token":"wrong"}', {UNAUTHORIZED}),
        ('{"type":"hello","token":"WATCH"}', {UNAUTHORIZED}),  # who may watch may not talk
        ("[" * 10_000, {WSCloseCode.UNSUPPORTED_DATA}),
        (b"\x00\x00\x00\x00\x00\x00", {WSCloseCode.UNSUPPORTED_DATA}),
        # What was not read yet of it may end the connection before the word does.
        (b"x" * (wire.MAX_MESSAGE_BYTES + 1), {WSCloseCode.MESSAGE_TOO_BIG, WSCloseCode.ABNORMAL_CLOSURE}),
    ],
)
def test_a_first_message_that_is_no_good_hello_ends_the_connection(
    running: Box, message: str | bytes, codes: set[int]
) -> None:
    async def ask() -> int | None:
        async with running.http() as http, http.ws_connect(f"{running.url}/ws") as socket_:
            if isinstance(message, str):
                await socket_.send_str(message.replace("WATCH", running.watch))
            else:
                await socket_.send_bytes(message)
            while not socket_.closed:
                await socket_.receive(10)
            return socket_.close_code

    assert run(ask) in codes


@pytest.mark.timeout(600)  # it gives way to tests that listen in real time
def test_a_minute_of_any_bytes_into_every_parser_finds_nothing() -> None:
    fuzz = ["nice", "-n", "5", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/fuzz_gateway.py"]
    done = subprocess.run(fuzz, check=False, capture_output=True, text=True, cwd=CHECKOUT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{PARSERS} passed" in done.stdout


def test_fuzzing_begins_from_another_seed_each_time_though_in_ci_nothing_else_is_random(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fuzz_gateway, "FUZZ_S", float(PARSERS))
    seen: set[int] = set()

    @fuzz_gateway.for_a_while
    @given(st.integers(0, 2**64))
    @hypothesis_settings(derandomize=True, database=None, max_examples=2)
    def look(number: int) -> None:
        seen.add(number)

    look()
    assert len(seen) > 2


# ---------------------------------------------------------------- paces, formats, names


def test_an_upload_of_an_unknown_codec_is_refused() -> None:
    with pytest.raises(ContainerError, match="codec is unknown"):
        decode(encoded(STOP, "webm").replace(b"A_OPUS", b"A_OPUX"), 10.0)


def test_an_address_may_make_so_many_requests_and_then_as_many_as_refill() -> None:
    pace = Pace(per_s=2.0, burst=5.0)
    assert [pace.allows("a", 0.0) for _ in range(6)] == [True] * 5 + [False]
    assert pace.allows("b", 0.0)
    assert not pace.allows("a", 0.1)
    assert [pace.allows("a", 1.2), pace.allows("a", 1.2), pace.allows("a", 1.2)] == [True, True, False]


async def guarded(rules: Rules, remote: str, handler: Handler, **headers: str) -> web.StreamResponse:
    """What the middleware makes of a request from an address."""
    request = make_mocked_request("GET", "/", headers={"Host": "localhost", **headers}).clone(remote=remote)
    return await rules.guard(request, handler)


def test_who_makes_too_many_requests_by_one_token_or_from_one_address_or_network_is_told_to_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules_room, "BURST", 20.0)
    monkeypatch.setattr(rules_room, "REQUESTS_PER_S", 0.1)
    tokens = Tokens(tmp_path / "tokens.json")
    busy, calm = (tokens.add(name, "talk") for name in ("busy", "calm"))
    rules = Rules(Gateway(), tokens, lambda _: None)

    async def served(request: web.Request) -> web.StreamResponse:
        rules.admit(request)
        return web.Response()

    def ask(token: str, addresses: Iterable[str]) -> list[web.StreamResponse]:
        async def all_of_them() -> list[web.StreamResponse]:
            return [await guarded(rules, each, served, Authorization=f"Bearer {token}") for each in addresses]

        return asyncio.run(all_of_them())

    for answers, many in (
        (ask(busy, (f"10.0.0.{number}" for number in range(30))), 20),
        (ask("wrong", ["10.1.0.1"] * 30), 20),
        (ask("wrong", (f"2001:db8::{number:x}" for number in range(100))), 20 * NETWORK_SHARE),
    ):
        assert [each.status for each in answers[:many]] == [200] * many
        assert (answers[-1].status, answers[-1].headers["Retry-After"]) == (429, "5")
    for address in ("10.2.0.1", "2001:db8:0:1::1"):
        (answer,) = ask(calm, [address])
        assert answer.status == 200


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/ws", 200), ("POST", "/ws", 408), ("GET", "/x", 408)])
def test_only_a_websocket_has_more_time_than_a_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, path: str, status: int
) -> None:
    monkeypatch.setattr(rules_room, "REQUEST_S", 0.01)
    rules = Rules(Gateway(), Tokens(tmp_path / "tokens.json"), lambda _: None)

    async def slow(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.1 if status == 200 else 30)
        return web.Response()

    headers = {"Host": "localhost", "Upgrade": "WebSocket"}
    served = rules.guard(make_mocked_request(method, path, headers=headers).clone(remote="10.0.0.1"), slow)
    assert asyncio.run(served).status == status


@pytest.mark.parametrize(
    ("path", "upgrade", "status"), [("/vosk", "", 400), ("/vosk", "h2c", 400), ("/", "h2c", 200), ("/", "", 200)]
)
def test_a_request_that_is_no_handshake_is_answered_as_what_it_is(
    running: Box, path: str, upgrade: str, status: int
) -> None:
    async def ask() -> int:
        async with running.http() as http:
            headers = {"Authorization": f"Bearer {running.token}", **({"Upgrade": upgrade} if upgrade else {})}
            return (await http.get(running.url + path, headers=headers)).status

    assert run(ask) == status


def test_an_open_gateway_takes_any_key_for_none_and_a_token_for_itself(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path / "tokens.json")
    watch = tokens.add("wall", "watch")

    def admitted(key: str, options: Gateway) -> str | None:
        headers = {"Host": "localhost", "Authorization": f"Bearer {key}"}
        station = Rules(options, tokens, lambda _: None).admit(make_mocked_request("GET", "/", headers=headers))
        return station.role if station else None

    assert [admitted(key, Gateway(open=True, tls=False)) for key in ("sk-none", watch)] == [LOCAL.role, "watch"]
    assert [admitted(key, Gateway()) for key in ("sk-none", watch)] == [None, "watch"]


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost:8443", None, 200),
        ("127.0.0.1:8443", "http://127.0.0.1:8443", 200),
        ("[::1]:8443", None, 200),
        ("evil.example", None, 403),
        ("localhost:8443", "https://evil.example", 403),
        ("localhost:8443", "null", 403),
        ("localhost:8443", "https://mes.plant", 200),
    ],
)
def test_a_gateway_without_tokens_serves_this_machines_names_and_pages_alone(
    tmp_path: Path, host: str, origin: str | None, status: int
) -> None:
    options = Gateway(open=True, tls=False, origins=("https://mes.plant",))
    rules = Rules(options, Tokens(tmp_path / "tokens.json"), lambda _: None)

    async def served(_: web.Request) -> web.StreamResponse:
        return web.Response()

    sent = {"Host": host, **({} if origin is None else {"Origin": origin})}
    assert asyncio.run(guarded(rules, "127.0.0.1", served, **sent)).status == status
