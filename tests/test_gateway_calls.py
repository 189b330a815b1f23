"""By which ports and servers a call may look for its way: those of the settings, and none else."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ifaddr
import pytest
from aiortc.sdp import SessionDescription

from edge_asr.gateway.call import OfferError, _announced, _with_usable_candidates, check
from edge_asr.settings import Gateway
from tests.behind_mapping import HOST, PORTS
from tests.broker import free_port, wait_until
from tests.gateway import OFFER, Box, box, isolated, recording, run, transcribed
from tests.test_gateway import WhipClient

STOP = recording("20-emergency-stop")
SECRET = "kept in a file"  # noqa: S105 - of a relay that lives for one test


def own_addresses() -> set[str]:
    found = (ip.ip for adapter in ifaddr.get_adapters() for ip in adapter.ips)
    return {each if isinstance(each, str) else each[0] for each in found}  # IPv6 with its flow and scope


@contextlib.contextmanager
def destinations(running: Box, log: Path) -> Iterator[set[str]]:
    """The addresses to which the daemon sends or connects meanwhile, outside this machine."""
    found: set[str] = set()
    command = ["strace", "-f", "-qq", "-o", str(log), "-e", "trace=connect,sendto,sendmsg,sendmmsg"]
    tracer = subprocess.Popen([*command, "-p", str(running.process.pid)])
    wait_until(lambda: "TracerPid:\t0\n" not in Path(f"/proc/{running.process.pid}/status").read_text(), "strace")
    try:
        yield found
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait(10)
        text = log.read_text(encoding="utf-8", errors="replace")
        found |= set(re.findall(r'inet_addr\("([\d.]+)"\)', text)) | set(re.findall(r'AF_INET6, "([^"]+)"', text))
        found -= own_addresses()


def own_certificate(folder: Path) -> dict[str, Any]:
    """Settings with a certificate that somebody else has made."""
    made = {"cert_file": str(folder / "own.crt"), "key_file": str(folder / "own.key")}
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    for extension in ("subjectAltName=DNS:localhost", "keyUsage=critical,keyCertSign,digitalSignature"):
        command += ["-addext", extension]
    subprocess.run([*command, "-out", made["cert_file"], "-keyout", made["key_file"]], check=True, capture_output=True)
    return made


def test_calls_take_the_ports_and_certificate_of_the_settings_and_ask_nobody_that_these_do_not_name(
    tmp_path: Path,
) -> None:
    port = free_port()

    async def crowd(running: Box) -> tuple[str, list[int], str]:
        bearer = {"Authorization": f"Bearer {running.token}"}
        first, second = WhipClient(running, STOP), WhipClient(running, STOP)
        first.more = "a=candidate:9 1 udp 2130706431 0b5e0a4c-7d2b.local 50000 typ host\r\n"
        async with running.http() as http:
            response = await first.call(http)
            await first.until("ready")
            refused = await second.offer(http)  # no port is left
            statuses = [refused.status]
            await http.delete(running.url + response.headers["Location"], headers=bearer)
            statuses.append((await second.offer(http)).status)
            answer = await response.text()
            assert (await http.get(f"{running.url}/ca.crt")).status == 404  # there is none of ours to install
        await first.peer.close()
        await second.peer.close()
        return answer, statuses, refused.headers["Retry-After"]

    section = {"udp_ports": [port, port], **own_certificate(tmp_path)}
    with box(tmp_path, **section) as running, destinations(running, tmp_path / "strace") as contacted:
        answer, statuses, retry_after = run(lambda: crowd(running))
    assert set(re.findall(r"^a=candidate:\S+ \d udp \d+ \S+ (\d+) typ host", answer, re.MULTILINE)) == {str(port)}
    assert statuses == [503, 201]
    assert retry_after == "5"
    assert contacted == set()
    assert re.search(r'inet_addr\("', (tmp_path / "strace").read_text(encoding="utf-8"))  # it was watched


def test_who_calls_a_container_by_the_address_of_its_host_is_understood() -> None:
    with isolated("tests.behind_mapping") as called:
        found = called()
    assert found["said"] == transcribed(STOP)[0]["text"]
    assert {address for address, _ in found["candidates"]} == {HOST}
    assert all(PORTS[0] <= int(port) <= PORTS[1] for _, port in found["candidates"])


def test_an_announced_address_stands_in_for_our_own_and_not_for_a_relays() -> None:
    own = "a=candidate:1 1 udp 2130706431 172.17.0.2 50000 typ host\r\n"
    relayed = "a=candidate:2 1 udp 16777215 10.0.0.1 49152 typ relay raddr 172.17.0.2 rport 50001\r\n"
    assert _announced(own + relayed, "10.3.7.20") == own.replace("172.17.0.2", "10.3.7.20") + relayed


ENDS = [end for end in map(chr, range(sys.maxunicode)) if end != "\n" and len(f"a{end}b".splitlines()) > 1]
"""Where aiortc begins another line of an SDP, beside the ends that the RFC knows."""


@pytest.mark.parametrize("end", ENDS)
def test_an_offer_whose_lines_end_in_a_way_that_no_sdp_has_is_refused(end: str) -> None:
    check(OFFER.replace("\r\n", "\n"))
    with pytest.raises(OfferError, match="end with CRLF or LF"):
        check(OFFER.replace("a=mid:0", f"a=x{end}m=audio 9 UDP/TLS/RTP/SAVPF 0{end}a=mid:0"))


@pytest.mark.parametrize("space", [" ", "  ", "\t", "\xa0"])
def test_no_name_of_a_candidate_comes_as_far_as_aiortc_however_it_is_written(space: str) -> None:
    named = space.join(["1", "1", "udp", "2130706431", "0b5e.local", "9", "typ", "host"])
    offer = f"{OFFER}a=candidate:{named}\r\na=candidate:{space}{named}\r\na=end-of-candidates\r\n"
    (media,) = SessionDescription.parse(_with_usable_candidates(offer)).media
    assert [candidate.ip for candidate in media.ice_candidates] == ["127.0.0.1"]
    assert not media.ice_candidates_complete


@contextlib.contextmanager
def relay(folder: Path) -> Iterator[int]:
    """A real coturn on this machine; its port."""
    port = free_port()
    command = ["turnserver", "-n", f"--listening-port={port}", "--listening-ip=127.0.0.1", "--relay-ip=127.0.0.1"]
    command += ["--lt-cred-mech", f"--user=press-07:{SECRET}", "--realm=plant", "--allow-loopback-peers", "--no-tls"]
    command += ["--no-dtls", "--no-cli", f"--pidfile={folder / 'pid'}", "--log-file=stdout", "--simple-log"]
    command += ["--log-binding", "--verbose"]
    with (folder / "coturn.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)

    def listens() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        return False

    try:
        wait_until(listens, "coturn listens")
        yield port
    finally:
        process.kill()
        process.wait()


def test_servers_of_the_settings_are_asked_turn_relays_the_call_and_its_password_stands_in_no_log(
    tmp_path: Path,
) -> None:
    (tmp_path / "password").write_text(f"{SECRET}\n", encoding="utf-8")

    async def talk(running: Box) -> str:
        client = WhipClient(running, STOP)
        client.only = "relay"
        async with running.http() as http:
            await client.call(http)
            await client.until("ready")
            client.say(type="start", talk=1)
            said: str = (await client.until("transcript"))["text"]
        await client.peer.close()
        return said

    async def call(running: Box) -> int:
        client = WhipClient(running, STOP)
        async with running.http() as http:
            status = (await client.offer(http)).status
        await client.peer.close()
        return status

    with relay(tmp_path) as port:
        section: dict[str, Any] = {"ice_servers": [f"stun:127.0.0.1:{port}", f"turn:127.0.0.1:{port}?transport=udp"]}
        section |= {"ice_username": "press-07", "ice_password_file": str(tmp_path / "password")}
        with box(tmp_path, **section) as running:
            assert run(lambda: talk(running)) == transcribed(STOP)[0]["text"]
            assert "BINDING processed, success" in (tmp_path / "coturn.log").read_text(encoding="utf-8")
            (tmp_path / "password").unlink()
            assert run(lambda: call(running)) == 503
            assert "ice_password_file" in running.log
            assert SECRET not in running.log


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ({"udp_ports": [50_099, 50_000]}, "udp_ports are the first and the last one"),
        ({"udp_ports": [80, 90]}, "1024"),
        ({"ice_servers": ["http://10.0.0.1"]}, "pattern"),
        ({"ice_servers": ["turn:10.0.0.1"]}, "wants ice_username and ice_password_file"),
        ({"ice_username": "press-07"}, "belong together"),
        ({"announce": "voice.plant"}, "does not appear to be an IPv4 or IPv6 address"),
    ],
)
def test_settings_of_calls_that_cannot_work_are_refused(section: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Gateway.model_validate(section)
