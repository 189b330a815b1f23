"""Who comes into the gateway: certificates that others' tools accept, tokens that are stored nowhere, the door."""

from __future__ import annotations

import asyncio
import datetime as dt
import importlib.resources
import json
import logging
import os
import re
import ssl
import stat
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_asr.events import RejectionReason
from edge_asr.gateway import GatewayError, certificates, server
from edge_asr.gateway.tokens import Tokens
from edge_asr.settings import Gateway, Settings
from tests.broker import Broker, Subscriber, free_port, wait_until
from tests.test_cli import edge_asr, typed
from tests.test_daemon import running, write_settings


def test_openssl_accepts_the_certificate_for_every_name_and_no_other(tmp_path: Path) -> None:
    held = certificates.make(tmp_path, ["voice.hall-2.example", "10.3.7.20"])
    files = certificates.Files(tmp_path)
    assert {"voice.hall-2.example", "10.3.7.20", "localhost", "127.0.0.1"} <= set(held)
    for option, name, good in (
        ("-verify_hostname", "voice.hall-2.example", True),
        ("-verify_ip", "10.3.7.20", True),
        ("-verify_hostname", "other.example", False),
    ):
        command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", str(files.authority)]
        done = subprocess.run([*command, option, name, str(files.server)], capture_output=True, check=False)
        assert (done.returncode == 0) is good, done.stderr
    shown = subprocess.run(
        ["openssl", "x509", "-in", str(files.authority), "-noout", "-fingerprint", "-sha256"],
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    assert shown.strip().endswith(certificates.fingerprint(files.authority))
    assert stat.S_IMODE(files.server_key.stat().st_mode) == stat.S_IMODE(files.authority_key.stat().st_mode) == 0o600


def test_the_certificate_is_good_for_every_address_by_which_others_reach_this_machine(tmp_path: Path) -> None:
    cards = json.loads(subprocess.run(["ip", "-json", "address"], capture_output=True, check=True).stdout)
    own = {(each["local"], each["scope"]) for card in cards for each in card["addr_info"]}
    held = set(certificates.make(tmp_path, []))
    assert {address for address, scope in own if scope != "link"} <= held
    assert not {address for address, scope in own if scope == "link"} & held


def test_making_it_again_renews_the_server_and_keeps_the_authority(tmp_path: Path) -> None:
    certificates.make(tmp_path, [], now=dt.datetime.now(dt.timezone.utc) - dt.timedelta(days=600))
    files = certificates.Files(tmp_path)
    authority, server = files.authority.read_bytes(), files.server.read_bytes()
    assert certificates.days_left(files.server) < 250
    certificates.make(tmp_path, [])
    assert files.authority.read_bytes() == authority
    assert files.server.read_bytes() != server
    assert certificates.days_left(files.server) > 800
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(files.server, files.server_key)


def test_a_gateway_that_runs_takes_over_a_renewed_certificate_and_keeps_the_old_one_until_its_key_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "CERTIFICATE_S", 0.01)
    caplog.set_level(logging.INFO)
    options = Settings(state_dir=tmp_path, sources=(), gateway=Gateway())
    certificates.make(options.gateway_directory, [])
    files = certificates.Files(options.gateway_directory)
    gateway = server.Gateway(options)
    certificates.make(tmp_path / "another", [])
    another = certificates.Files(tmp_path / "another").server.read_text(encoding="ascii")

    async def shown(at: tuple[str, int]) -> str:
        return await asyncio.to_thread(ssl.get_server_certificate, at)

    async def renew() -> None:
        listening = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=gateway._tls)  # noqa: SLF001
        at = listening.sockets[0].getsockname()
        looking = asyncio.create_task(gateway._renew())  # noqa: SLF001
        await asyncio.sleep(0)  # it knows the first one
        assert await shown(at) == files.server.read_text(encoding="ascii")
        certificates.make(options.gateway_directory, [])
        await asyncio.to_thread(wait_until, lambda: "the certificate was renewed" in caplog.text, "the new one")
        renewed = files.server.read_text(encoding="ascii")
        assert await shown(at) == renewed
        caplog.clear()
        files.server.write_text(another, encoding="ascii")  # its key comes later
        await asyncio.to_thread(wait_until, lambda: "the old certificate stays" in caplog.text, "a complaint")
        assert await shown(at) == renewed
        looking.cancel()
        listening.close()

    asyncio.run(renew())


def test_an_authority_whose_key_was_moved_away_is_never_replaced_silently(tmp_path: Path) -> None:
    certificates.make(tmp_path, [])
    files = certificates.Files(tmp_path)
    authority = files.authority.read_bytes()
    key = files.authority_key.read_bytes()
    files.authority_key.unlink()
    with pytest.raises(GatewayError, match=r"ca.key: is not there; bring it back, or remove ca.crt"):
        certificates.make(tmp_path, [])
    assert files.authority.read_bytes() == authority
    files.authority_key.write_bytes(key)
    certificates.make(tmp_path, [])
    assert files.authority.read_bytes() == authority


def test_a_certificate_is_due_that_is_not_there_lacks_a_name_or_ends_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert certificates.is_due(tmp_path, [])
    certificates.make(tmp_path, ["tablet.example", "10.3.7.20"])
    assert not certificates.is_due(tmp_path, [])
    assert not certificates.is_due(tmp_path, ["tablet.example", "10.3.7.20"])
    assert certificates.is_due(tmp_path, ["other.example"])
    assert certificates.is_due(tmp_path, ["10.3.7.21"])
    monkeypatch.setattr(certificates, "SERVER_DAYS", certificates.DUE_DAYS)
    certificates.make(tmp_path, [])
    assert certificates.is_due(tmp_path, [])


def test_an_alarm_says_that_the_certificate_ends_soon(
    tmp_path: Path, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates, "SERVER_DAYS", 20)
    certificates.make(tmp_path / "state/gateway", [])
    path = write_settings(tmp_path, broker.port, gateway={"port": free_port()}, monitoring={"port": None})
    with Subscriber(broker) as subscriber, running(path):
        subscriber.wait_for(lambda m: any(x.topic.endswith("evt/alarm") for x in m), "an alarm")
        (alarm,) = subscriber.on("evt/alarm")
    assert (alarm.data["kind"], alarm.data["state"]) == ("certificate-ends", "raised")
    assert alarm.data["detail"] == "the gateway's certificate ends in 19 days"


def test_a_box_that_woke_up_in_1970_signs_nothing(tmp_path: Path) -> None:
    with pytest.raises(GatewayError, match="the clock shows 1970-01-01; set it first"):
        certificates.make(tmp_path, [], now=dt.datetime(1970, 1, 1, tzinfo=dt.timezone.utc))
    assert not list(tmp_path.iterdir())


@given(st.text(max_size=40))
def test_any_text_is_a_host_name_an_address_or_a_value_error(name: str) -> None:
    try:
        certificates.general_name(name)
    except ValueError as error:
        assert repr(name) in str(error)  # noqa: PT017 - either outcome is right


def test_a_token_is_stored_nowhere_and_works_until_it_is_revoked(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path / "gateway/tokens.json")
    talk, watch = tokens.add("tablet-3", "talk"), tokens.add("wall", "watch")
    other = Tokens(tokens.path)  # the daemon, while the command line writes
    station = other.admit(talk)
    assert station
    assert (station.name, station.role) == ("tablet-3", "talk")
    assert other.admit(watch) != station
    assert other.admit(talk + "x") is None
    assert not any(talk in file.read_text(encoding="utf-8") for file in tokens.path.parent.iterdir())
    assert stat.S_IMODE(tokens.path.stat().st_mode) == 0o600
    tokens.revoke("tablet-3")
    assert other.admit(talk) is None
    assert not other.holds(station)
    assert other.admit(watch)


def test_a_name_has_one_token(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path / "tokens.json")
    tokens.add("tablet-3", "talk")
    with pytest.raises(GatewayError, match="tablet-3 has a token already; revoke it first"):
        tokens.add("tablet-3", "watch")
    with pytest.raises(ValueError, match="'hall 2/tablet' may hold only"):
        tokens.add("hall 2/tablet", "talk")
    with pytest.raises(GatewayError, match="nobody has no token; there are: tablet-3"):
        tokens.revoke("nobody")


@pytest.mark.parametrize("content", ["", "[", "{}", '[{"name": "x"}]', "[1]", "\x00"])
def test_a_damaged_file_of_tokens_admits_nobody_and_says_so(tmp_path: Path, content: str) -> None:
    tokens = Tokens(tmp_path / "tokens.json")
    token = tokens.add("tablet-3", "talk")
    (tmp_path / "tokens.json").write_text(content, encoding="utf-8")
    assert tokens.admit(token) is None
    if content != "{}":  # an empty collection is one
        with pytest.raises(GatewayError, match=r"tokens\.json: is damaged; remove it"):
            tokens.stations()


def test_what_root_makes_for_the_service_belongs_to_the_service(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(tmp_path, 12345, 12345)
    tokens = Tokens(tmp_path / "gateway/tokens.json")
    tokens.add("tablet-3", "talk")
    assert tokens.path.stat().st_uid == tokens.path.parent.stat().st_uid == 12345


def test_the_command_line_makes_lists_and_revokes(tmp_path: Path) -> None:
    state = ("--set", f"state_dir={tmp_path}")
    made = typed("gateway", "token", "add", "tablet-3", *state)
    assert made.returncode == 0
    token = made.stdout.strip()
    assert Tokens(tmp_path / "gateway/tokens.json").admit(token)
    assert f"https://HOST:8443/#token={token}" in made.stderr
    listed = typed("gateway", "token", "list", "--json", *state)
    assert json.loads(listed.stdout)["name"] == "tablet-3"
    assert token not in listed.stdout
    assert typed("gateway", "token", "revoke", "tablet-3", *state).returncode == 0
    again = typed("gateway", "token", "revoke", "tablet-3", *state)
    assert (again.returncode, again.stderr) == (69, "edge-asr: tablet-3 has no token; there are: none\n")
    certificate = typed("gateway", "cert", "10.3.7.20", *state)
    assert certificate.returncode == 0
    assert certificates.fingerprint(tmp_path / "gateway/ca.crt") in certificate.stdout
    assert "neither a host name nor an IP address" in typed("gateway", "cert", "a b", *state).stderr


def test_without_its_packages_the_gateway_is_one_line_that_says_how_to_get_them(tmp_path: Path) -> None:
    program = "import sys; sys.modules['aiohttp'] = None; from edge_asr.cli import main; main()"
    options = ["--set", f"state_dir={tmp_path}", "--set", "gateway={}", "--set", "sources=[]"]
    done = subprocess.run(
        [sys.executable, "-c", program, "run", *options], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 78
    line = done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert "needs packages that are not here (aiohttp)" in line
    assert "pip install 'edge-asr[gateway]'" in line


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ("{}", "server.crt is not there; make it with `edge-asr gateway cert`"),
        ("{host: 0.0.0.0, open: true}", "open without tokens, host must be 127.0.0.1"),
        ("{host: 10.1.2.3, tls: false}", "without TLS, or open without tokens, host must be 127.0.0.1"),
        ("{cert_file: x.crt}", "cert_file and key_file belong together"),
    ],
)
def test_a_gateway_that_cannot_be_opened_safely_is_one_line(tmp_path: Path, section: str, complaint: str) -> None:
    done = edge_asr("run", "--set", f"state_dir={tmp_path}", "--set", f"gateway={section}", "--set", "sources=[]")
    assert done.returncode == 78
    *before, line = done.stderr.splitlines()
    assert complaint in line
    assert not any(complaint in each or "Traceback" in each for each in before)


def test_the_page_has_every_word_in_both_languages_and_one_for_every_rejection_and_error() -> None:
    page = importlib.resources.files("edge_asr.gateway") / "page"
    english, chinese = (page / "texts.js").read_text(encoding="utf-8").split("  zh: {")
    keys = re.findall(r'"([\w-]+)":', english)
    assert sorted(keys) == sorted(re.findall(r'"([\w-]+)":', chinese))
    assert len(keys) == len(set(keys))
    assert {f"reason-{reason}" for reason in get_args(RejectionReason)} <= set(keys)
    documented = (Path(__file__).parents[1] / "docs/gateway.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| `error` \| .*`reason`: (.*) \|$", documented, re.MULTILINE)
    assert {f"error-{reason}" for reason in re.findall(r"`(\w+)`", row)} <= set(keys)
    for file in page.iterdir():  # what a screen reader says
        assert not re.search(r'aria-label="', file.read_text(encoding="utf-8"))
